"""What a head is: what is learned on top of the last hidden state. A head is a config. `attach` builds its module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from sidestep.backbone.families import Pool
from sidestep.fold import Reading, mean_tokens
from sidestep.interface.annotations import check_fields, from_fields
from sidestep.interface.layers import last_kept, take_rows
from sidestep.metrics import Kind


@dataclass(frozen=True, kw_only=True)
class HeadConfig(ABC):
    """Base of the heads' configs.

    Class attributes:
        pools: what may be read.
        default: what is read if nobody says. None: the family's default.

    Attributes:
        pool: what is read. "cls" is the first token, "last" the last kept one. "mean" is the mean of all kept tokens
            (on images, of the grid's). "mean_pre_norm" is their mean before the backbone's final norm, which then norms
            the mean. Without such a norm it is the same as "mean". "all" is every token. None: the default.
    """

    pools: ClassVar[tuple[Pool, ...]] = ("cls", "mean", "mean_pre_norm", "last")
    default: ClassVar[Pool | None] = None

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
        """Number of values that the head puts out (of each token, if it reads all)."""

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """What the loss and the scores are computed for."""

    @property
    def reads_all(self) -> bool:
        """Whether it reads every token, and puts out values for each."""
        return self.default == "all"

    def described(self) -> dict[str, Any]:
        """The fields of a transformers config that tell others (pipelines) what the head puts out."""
        return {}

    def features(self, width: int) -> int:
        """Channels of the vector that a method may correct, if what is read has `width`."""
        return width

    @abstractmethod
    def build(self, width: int, pool: Pool) -> Head:
        """The module, for features of `width` channels and this read-out."""

    @abstractmethod
    def blank_labels(self, rows: int, tokens: int) -> Tensor:
        """Labels of a batch as the loss takes them, for a plan."""

    def to_dict(self) -> dict[str, Any]:
        """The fields and the head's name, as JSON-ready values."""
        return {"head": type(self).__name__, **asdict(self)}


Config = TypeVar("Config", bound=type[HeadConfig])
HEADS: dict[str, type[HeadConfig]] = {}
"""Every head by name."""


def register(config: Config) -> Config:
    """Class decorator: make a head known under its class's name, so that tasks with it can be loaded.

    Raises:
        ValueError: if the name is taken.
    """
    taken = HEADS.get(config.__name__)
    if taken is not None and taken.__module__ != config.__module__:
        raise ValueError(f"a head named {config.__name__!r} is registered already: choose another name")
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
    """The linear map of a head config, on features of `width` channels. Subclasses have the loss."""

    def __init__(self, config: HeadConfig, width: int, pool: Pool, *, bias: bool = True) -> None:
        super().__init__()
        self.config, self.pool = config, pool
        self.linear = nn.Linear(width, config.outputs, bias=bias)
        nn.init.normal_(self.linear.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, reading: Reading) -> Tensor:
        """(batch, outputs) from what the fold read."""
        return self.map(reading.corrected(self.features(reading)), self.kept(reading))

    def map(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        """The linear map, in its own precision. `keep`: which tokens are no padding, where it is of all tokens."""
        return self.linear(features.to(self.linear.weight.dtype))

    def kept(self, reading: Reading) -> Tensor | None:
        """(batch, tokens) bool, False on padding, for a head of all tokens. None: nothing is padded."""
        return None

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
        """Mean loss over the labels, or their sum over `num_items_in_batch` (the Trainer's, under accumulation)."""
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = self.losses(logits.float(), labels, reduction)
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def losses(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """The loss of a batch, as its "mean" or its "sum". A tower's head has none: embeddings are learned by pairs."""
        raise NotImplementedError(f"a {type(self.config).__name__} head has no loss of its own")
