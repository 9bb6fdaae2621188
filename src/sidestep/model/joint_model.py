"""JointModel: two towers whose vectors are put together, and a head on that: questions about pictures (VQA).

Source: the product of two projected vectors is low-rank bilinear pooling (Kim et al., "Hadamard Product for Low-rank
Bilinear Pooling", ICLR 2017).
Differs: both vectors stand beside their product, and there is no other layer before the head's map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from sidestep.model.heads import Classify, Retrieve
from sidestep.model.settings import Settings
from sidestep.model.two_towers import TwoTowers

PARTS = 3
"""The vector of the picture, that of the text, and their product."""


class JointModel(TwoTowers):
    """A dual encoder whose two embeddings are read together by one head. Make one with `attach` or `load`.

    Names of the head in its `state_dict()` begin with "head.".

    Attributes:
        head: the head, on both embeddings and their product.
        writes: no text.
    """

    accepts_loss_kwargs = True
    writes = None

    def __init__(self, backbone: nn.Module, settings: Settings) -> None:
        config = settings.head
        if not isinstance(config, Classify):
            raise ValueError(
                f"a {type(config).__name__} head on a dual encoder: of its two vectors classes and answers are read "
                "(ss.Classify, ss.Answer), and ss.Retrieve compares them"
            )
        super().__init__(backbone, settings, Retrieve(pool=config.pool))
        assert self.image.head is not None
        self.dim = self.image.head.config.outputs
        self.head = config.build(PARTS * self.dim, "cls").to(self.device)
        self.train(self._before.training)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SequenceClassifierOutput:
        """Logits of pictures with texts, and with labels their loss.

        Args:
            pixel_values: (rows, channels, rows, columns).
            input_ids, attention_mask, token_type_ids, position_ids: (rows, tokens), as the text tower takes them.
            labels: as the head's loss takes them.
            num_items_in_batch: as the Trainer counts labels under accumulation.

        Raises:
            ValueError: unless there is a text for each picture.
        """
        text = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        images, texts = self.embeddings(pixel_values, text)
        if images is None or texts is None or len(images) != len(texts):
            counts = [0 if part is None else len(part) for part in (images, texts)]
            raise ValueError(f"{counts[0]} pictures with {counts[1]} texts: give each row one of both")
        logits = self.head.map(self.joint(images, texts))
        loss = None if labels is None else self.head.loss(logits, labels, num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def joint(self, images: Tensor, texts: Tensor) -> Tensor:
        """(rows, 3 x dim): both vectors and their product, with channels of about one in size."""
        images, texts = (self.dim**0.5 * part for part in (images, texts))
        return torch.cat([images, texts, images * texts], -1)

    @property
    def head_config(self) -> dict[str, Any]:
        """The head's config as JSON-ready values."""
        return self.head.config.to_dict()

    def own_tensors(self) -> dict[str, nn.Parameter]:
        """The weights of the head."""
        return {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
