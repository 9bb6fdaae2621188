"""A language model that is causal in part: tokens of one type, or of a picture in front, see each other both ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

WIDTH = 16


class PrefixConfig(PreTrainedConfig):
    model_type = "prefix-lm"

    def __init__(self, both_ways: int | None = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.both_ways = 40, both_ways
        self.num_channels, self.image_size, self.patch_size = 3, 8, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        q, k, v = self.attention(self.norm(hidden)).chunk(3, -1)
        return hidden + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))


class PrefixModel(PreTrainedModel):
    """Tokens of type `config.both_ways` see all others of it; None: every token sees earlier ones only."""

    config_class = PrefixConfig

    def __init__(self, config: PrefixConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def run(self, hidden: Tensor, kinds: Tensor, mask: Tensor | None) -> BaseModelOutput:
        tokens = hidden.shape[1]
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(len(hidden), -1, -1)
        if self.config.both_ways is not None:
            one = kinds == self.config.both_ways
            seen = seen | (one[:, None] & one[:, :, None])
        if mask is not None:
            seen = seen & (mask[:, None].bool() | torch.eye(tokens, dtype=torch.bool))
        for block in self.blocks:
            hidden = block(hidden, seen)
        return BaseModelOutput(last_hidden_state=self.norm(hidden))


class TypedPrefix(PrefixModel):
    """Which tokens see each other is said by their types."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> BaseModelOutput:
        return self.run(
            self.embed(input_ids),
            torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
            attention_mask,
        )


class PicturePrefix(PrefixModel):
    """The patches of a picture stand in front of the text."""

    def __init__(self, config: PrefixConfig) -> None:
        super().__init__(config)
        self.patches = nn.Linear(3 * 4 * 4, WIDTH)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> BaseModelOutput:
        hidden, kinds = self.embed(input_ids), torch.zeros_like(input_ids)
        if pixel_values is not None:
            patches = self.patches(F.unfold(pixel_values, 4, stride=4).transpose(1, 2))
            hidden = torch.cat([patches, hidden], 1)
            kinds = torch.cat([torch.ones(patches.shape[:2], dtype=kinds.dtype), kinds], 1)
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (patches.shape[1], 0), value=1)
        return self.run(hidden, kinds, attention_mask)
