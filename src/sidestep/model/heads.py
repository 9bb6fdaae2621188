"""Heads: what is learned on top of the last hidden state. A head is a config. `attach` builds its module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.backbone.families import Pool
from sidestep.fold import Reading, mean_tokens
from sidestep.interface.annotations import check_fields, from_fields
from sidestep.interface.layers import last_kept, take_rows
from sidestep.metrics import Kind
from sidestep.model.gpo import GPO

Loss = Literal["contrastive", "triplet"]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Base of the heads' configs.

    Attributes:
        pool: what is read. "cls" is the first token, "last" the last kept one. "mean" is the mean of all kept tokens
            (on images, of the grid's). "mean_pre_norm" is their mean before the backbone's final norm, which then norms
            the mean. Without such a norm it is the same as "mean". None: the family's default.
    """

    pools: ClassVar[tuple[Pool, ...]] = ("cls", "mean", "mean_pre_norm", "last")

    pool: Pool | None = None

    def __post_init__(self) -> None:
        self._check_pool("pool", self.pool)
        check_fields(self)

    def _check_pool(self, name: str, pool: Pool | None) -> None:
        if pool is not None and pool not in self.pools:
            raise ValueError(f"{name}={pool!r}: choose None or one of {', '.join(self.pools)}")

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Number of values that the head puts out."""

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """What the loss and the scores are computed for."""

    def described(self) -> dict[str, Any]:
        """The fields of a transformers config that tell others (pipelines) what the head puts out."""
        return {}

    def features(self, width: int) -> int:
        """Channels of the vector that a method may correct, if what is read has `width`."""
        return width

    def build(self, width: int, pool: Pool) -> Head:
        """The module, for features of `width` channels and this read-out."""
        return Head(self, width, pool)

    def to_dict(self) -> dict[str, Any]:
        """The fields and the head's name, as JSON-ready values."""
        return {"head": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Classify(HeadConfig):
    """Classification with a linear map of the pooled hidden state.

    Attributes:
        num_labels: number of classes.
        labels: their names, in order. They come back in predictions.
        problem: "single" (one class per example, softmax) or "multi" (any number, one sigmoid each).
    """

    num_labels: int
    labels: Sequence[str] | None = None
    problem: Literal["single", "multi"] = "single"

    def __post_init__(self) -> None:
        if self.problem == "token":
            raise ValueError('problem="token": token classification is not supported yet. Choose "single" or "multi"')
        super().__post_init__()
        if self.num_labels < (2 if self.problem == "single" else 1):
            raise ValueError(f"num_labels={self.num_labels}: a {self.problem}-label head needs more")
        if self.labels is not None and len(self.labels) != self.num_labels:
            raise ValueError(f"num_labels={self.num_labels}, but {len(self.labels)} label names were given")

    @property
    def outputs(self) -> int:
        """One logit per class."""
        return self.num_labels

    @property
    def kind(self) -> Kind:
        """The problem."""
        return self.problem

    def described(self) -> dict[str, Any]:
        """The classes by number and by name, and whether one or several of them hold."""
        names = self.labels or [f"LABEL_{index}" for index in range(self.num_labels)]
        return {**named(names), "problem_type": f"{self.problem}_label_classification"}


@dataclass(frozen=True, kw_only=True)
class Regress(HeadConfig):
    """Regression with a linear map of the pooled hidden state and the mean squared error.

    Attributes:
        targets: number of values per example.
        center: mean of the training targets. The head's bias starts there.
    """

    targets: int = 1
    center: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets < 1:
            raise ValueError(f"targets={self.targets}: at least 1")

    @property
    def outputs(self) -> int:
        """One value per target."""
        return self.targets

    @property
    def kind(self) -> Kind:
        """Regression."""
        return "regress"

    def described(self) -> dict[str, Any]:
        """One output per target, which is a number and no share."""
        return {**named([f"LABEL_{index}" for index in range(self.targets)]), "problem_type": "regression"}


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

    def build(self, width: int, pool: Pool) -> Head:
        """The map of one tower, with `dim` set."""
        return EmbeddingHead(self, width, pool)


HEADS: dict[str, type[HeadConfig]] = {"Classify": Classify, "Regress": Regress, "Retrieve": Retrieve}
OfHead = TypeVar("OfHead", bound=type[HeadConfig])


def register_head(config: OfHead) -> OfHead:
    """Class decorator: tasks with this head can be stored and loaded."""
    HEADS[config.__name__] = config
    return config


def head_from_dict(values: dict[str, Any]) -> HeadConfig:
    """The head config that `HeadConfig.to_dict` wrote.

    Raises:
        ValueError: if the head is unknown, or a field is unknown, lacking or out of range.
    """
    name = values.get("head")
    if name not in HEADS:
        raise ValueError(f"unknown head {name!r}: this version knows {', '.join(HEADS)}")
    return from_fields(HEADS[name], {field: value for field, value in values.items() if field != "head"})


def named(classes: Sequence[str]) -> dict[str, Any]:
    """The fields of a transformers config that name the classes. None if there are none."""
    if not classes:
        return {}
    return {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}


class Head(nn.Module):
    """The linear map of a head config, on features of `width` channels."""

    def __init__(self, config: HeadConfig, width: int, pool: Pool) -> None:
        super().__init__()
        self.config, self.pool = config, pool
        self.linear = nn.Linear(width, config.outputs, bias=config.kind != "retrieval")
        nn.init.normal_(self.linear.weight, std=0.02)
        if self.linear.bias is not None:
            nn.init.constant_(self.linear.bias, getattr(config, "center", 0.0))

    def forward(self, reading: Reading) -> Tensor:
        """(batch, outputs) from what the fold read."""
        return self.map(reading.corrected(self.features(reading)))

    def map(self, features: Tensor) -> Tensor:
        """The linear map, in its own precision."""
        return self.linear(features.to(self.linear.weight.dtype))

    def features(self, reading: Reading) -> Tensor:
        """(batch, width): what is read, or the method's own read-out."""
        return reading.pooled if reading.pooled is not None else self.read(reading)

    def read(self, reading: Reading) -> Tensor:
        """(batch, width): the pooled hidden state."""
        hidden, site = reading.hidden, reading.site
        if hidden.shape[1] == 1:
            return hidden[:, 0]
        if self.pool in ("mean", "mean_pre_norm"):
            return mean_tokens(hidden, site)
        if self.pool == "last" and site.keep is not None:
            return take_rows(hidden, last_kept(site.keep))[:, 0]
        # Copied: a view of one row would keep the storage of all tokens for backward.
        return hidden[:, {"cls": 0, "last": -1}[self.pool]].clone()

    def loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Mean loss over the examples, or their sum over `num_items_in_batch` (the Trainer's, under accumulation)."""
        reduction = "mean" if num_items_in_batch is None else "sum"
        logits = logits.float()
        if self.config.kind == "single":
            loss = F.cross_entropy(logits, labels.long(), reduction=reduction)
        elif self.config.kind == "multi":
            loss = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction=reduction)
        else:
            loss = F.mse_loss(logits, labels.float().view_as(logits), reduction=reduction)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


class EmbeddingHead(Head):
    """The embedding of one tower of a dual encoder: read, projected ("gpo": projected first), brought to length one."""

    def __init__(self, config: Retrieve, width: int, pool: Pool) -> None:
        super().__init__(config, width, pool)
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
