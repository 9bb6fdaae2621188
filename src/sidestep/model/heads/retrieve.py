"""The head of a dual encoder's tower: an embedding of an image or of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sidestep.backbone.families import Pool
from sidestep.fold import Reading
from sidestep.metrics import Kind
from sidestep.model.heads.base import Head, HeadConfig, register
from sidestep.model.heads.gpo import GPO

Loss = Literal["contrastive", "triplet"]


@register
@dataclass(frozen=True, kw_only=True)
class Retrieve(HeadConfig):
    """Images and texts as embeddings of one space. What is read goes through a linear map without bias, to length one.

    Attributes:
        pool: for both towers. Besides the values of other heads there are "own" and "gpo". "own" is the pooled output
            of the tower as the model makes it (CLIP: the class token through its norm, the end-of-text token). "gpo" is
            learned weights of the projected tokens sorted by channel. None: what the model projects itself if its
            checkpoint has the projections, else the families' defaults.
        text_pool: of the text tower, if it differs. None: as `pool`.
        dim: channels of the embeddings. None: as the model's own projections. The maps start as these projections if
            the checkpoint has them and they fit. Else they start at random.
        loss: "contrastive" is symmetric cross-entropy over the batch with a trained temperature. "triplet" is hinges
            on the cosine as VSE has them.
        margin: of the triplets.
        hardest: whether a triplet's negative is the hardest of the batch, or the mean is taken over all that violate
            the margin.
        mean_epochs: epochs in which that mean comes before the hardest, whose loss then rises from zero within an epoch
            (VSE: 1). `sidestep.training.train` counts them. In a loop of your own, set `PairModel.epoch`.
    """

    pools: ClassVar[tuple[Pool, ...]] = (*HeadConfig.pools, "own", "gpo")

    text_pool: Pool | None = None
    dim: int | None = None
    loss: Loss = "contrastive"
    margin: float = 0.2
    hardest: bool = True
    mean_epochs: int = 0

    def __post_init__(self) -> None:
        self._check_pool("text_pool", self.text_pool)
        super().__post_init__()
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"dim={self.dim}: at least 1, or None for the model's own")
        if not 0 < self.margin <= 2:
            raise ValueError(f"margin={self.margin}: cosines lie 2 apart at most. Choose a number above 0 and up to 2")
        if self.mean_epochs < 0 or (self.mean_epochs and not self.hardest):
            raise ValueError(f"mean_epochs={self.mean_epochs}: choose 0 or more, and 0 with hardest=False")

    @property
    def outputs(self) -> int:
        """Channels of the embeddings."""
        assert self.dim is not None
        return self.dim

    @property
    def kind(self) -> Kind:
        """Retrieval."""
        return "retrieval"

    def features(self, width: int) -> int:
        """Channels of the embedding. It is corrected before it is brought to length one."""
        return self.outputs

    def build(self, width: int, pool: Pool) -> EmbeddingHead:
        """The map of one tower, with `dim` set."""
        return EmbeddingHead(self, width, pool)

    def blank_labels(self, rows: int, tokens: int) -> Tensor:
        """The number of each row's image."""
        return torch.arange(rows)


class EmbeddingHead(Head):
    """The embedding of one tower of a dual encoder: read, projected ("gpo": projected first), brought to length one."""

    def __init__(self, config: Retrieve, width: int, pool: Pool) -> None:
        super().__init__(config, width, pool, bias=False)
        nn.init.normal_(self.linear.weight, std=width**-0.5)
        self.gpo = GPO() if pool == "gpo" else None

    def forward(self, reading: Reading) -> Tensor:
        """(batch, dim), in float32 at least."""
        return unit(reading.corrected(self.project(reading)))

    def project(self, reading: Reading) -> Tensor:
        """(batch, dim), of any length."""
        if self.gpo is None or reading.pooled is not None:
            return self.map(self.features(reading))
        hidden, site = reading.hidden[:, reading.site.prefix :], reading.site
        keep = None if site.keep is None else site.keep[:, site.prefix :]
        return self.gpo(self.map(hidden), keep)


def unit(x: Tensor) -> Tensor:
    """Each row over its length, which is computed as CLIP does, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / x.pow(2).sum(-1, keepdim=True).pow(0.5).clamp(min=1e-8)
