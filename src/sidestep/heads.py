"""Heads: what is learned on top of the last hidden state. A head is a config; `attach` builds its module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.families import Pool
from sidestep.fold import Reading, last_kept, mean_tokens, take_rows

POOLS: tuple[Pool, ...] = get_args(Pool)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Base of the heads' configs.

    Attributes:
        pool: what is read: "cls" (the first token), "mean" (all kept tokens; on images the grid's), "mean_pre_norm"
            (their mean before the backbone's final norm, which then norms it; without such a norm the same as "mean")
            or "last" (the last kept token). None: the family's default.
    """

    pool: Pool | None = None

    def __post_init__(self) -> None:
        if self.pool is not None and self.pool not in POOLS:
            raise ValueError(f"pool={self.pool!r}: choose None or one of {', '.join(POOLS)}")

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Number of values that the head puts out."""

    @property
    @abstractmethod
    def kind(self) -> Literal["single", "multi", "regress"]:
        """What the loss and the scores are computed for."""

    def to_dict(self) -> dict[str, Any]:
        """The fields and the head's name, as JSON-ready values."""
        return {"head": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Classify(HeadConfig):
    """Classification with a linear map of the pooled hidden state.

    Attributes:
        num_labels: number of classes.
        labels: their names, in order; they come back in predictions.
        problem: "single" (one class per example, softmax) or "multi" (any number, one sigmoid each).
    """

    num_labels: int
    labels: Sequence[str] | None = None
    problem: Literal["single", "multi"] = "single"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.problem == "token":
            raise ValueError('problem="token": token classification is not supported yet; choose "single" or "multi"')
        if self.problem not in ("single", "multi"):
            raise ValueError(f'problem={self.problem!r}: choose "single" or "multi"')
        if self.num_labels < (2 if self.problem == "single" else 1):
            raise ValueError(f"num_labels={self.num_labels}: a {self.problem}-label head needs more")
        if self.labels is not None and len(self.labels) != self.num_labels:
            raise ValueError(f"num_labels={self.num_labels}, but {len(self.labels)} label names were given")

    @property
    def outputs(self) -> int:
        """One logit per class."""
        return self.num_labels

    @property
    def kind(self) -> Literal["single", "multi", "regress"]:
        """The problem."""
        return self.problem


@dataclass(frozen=True, kw_only=True)
class Regress(HeadConfig):
    """Regression with a linear map of the pooled hidden state and the mean squared error.

    Attributes:
        targets: number of values per example.
        center: mean of the training targets; the head's bias starts there.
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
    def kind(self) -> Literal["single", "multi", "regress"]:
        """Regression."""
        return "regress"


HEADS: dict[str, type[HeadConfig]] = {"Classify": Classify, "Regress": Regress}


def head_from_dict(values: dict[str, Any]) -> HeadConfig:
    """The head config that `HeadConfig.to_dict` wrote.

    Raises:
        ValueError: if the head is unknown.
    """
    values = dict(values)
    name = values.pop("head")
    if name not in HEADS:
        raise ValueError(f"unknown head {name!r}: this version knows {', '.join(HEADS)}")
    return HEADS[name](**values)


class Head(nn.Module):
    """The linear map of a head config, on features of `width` channels."""

    def __init__(self, config: HeadConfig, width: int, pool: Pool) -> None:
        super().__init__()
        self.config, self.pool = config, pool
        self.linear = nn.Linear(width, config.outputs)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.constant_(self.linear.bias, getattr(config, "center", 0.0))

    def forward(self, reading: Reading) -> Tensor:
        """(batch, outputs) from what the fold read."""
        features = reading.pooled if reading.pooled is not None else self.read(reading)
        return self.linear(features.to(self.linear.weight.dtype))

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
        return hidden[:, 0 if self.pool == "cls" else -1].clone()

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
