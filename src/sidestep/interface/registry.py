"""What a method is: a fold over the depth of a frozen backbone (`SideNet`) or a change of its weights (`WeightDelta`).

To add a method, write one file beside this one: a frozen config dataclass and a class decorated with `@register`.
The laws in `tests/laws` then cover it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from itertools import pairwise
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from sidestep.interface.annotations import check_fields, from_fields
from sidestep.interface.pruning import Score
from sidestep.interface.sites import Site
from sidestep.sparse.diff import SparseDiff


class UnsupportedBackbone(ValueError):
    """A method cannot work on this backbone; the message names both and says why."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's config: plain data, checked in `__post_init__`.

    Fields have to be what their annotations say (see `annotations.check_fields`); ranges are the subclass's to check.
    """

    def __post_init__(self) -> None:
        check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MethodConfig:
        """The config with these fields.

        Raises:
            ValueError: if a field is unknown or out of range.
        """
        return from_fields(cls, values)

    def require(self, name: str, allowed: bool, what: str) -> None:
        """Raise unless `allowed`, saying what the field was given and what it may be."""
        if not allowed:
            raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r}, but it must be {what}")


def is_ascending(blocks: Sequence[int]) -> bool:
    """Whether there are block numbers, from 0 in order and each once."""
    return bool(blocks) and blocks[0] >= 0 and all(a < b for a, b in pairwise(blocks))


class SideNet(nn.Module, ABC):
    """A fold over depth: it reads the hidden states of a frozen backbone and may write at the end or in late blocks.

    A pass calls, for every stack: `start`; `advance` and `write` at the input of each stage and the output of each
    block; before each decoder block `memory`; `finish` at the stack's end; and after an encoder `carry`. What the
    method remembers between calls is `state`, any value it likes, which travels through the calls and is never kept on
    the module.

    `advance` is `step` of what was `read`. Before the first write all that touches a tensor as wide as the backbone is
    in `read`, which knows no state. So a pass can store a site's codes, or compute them again, without the method
    knowing. A method whose definition has no such split leaves `read` out: its codes are the hidden states themselves.

    Class attributes:
        starts_as_identity: before training, outputs equal the frozen model's, bit for bit.
        replays: it runs queries of its own through the frozen blocks (`Site.next_block`), so that `attach` first proves
            that their parts make up the blocks.
        caches: it mixes tokens, and keeps what it needs of earlier ones in `Site.cache`, so that key-value caches are
            exact.

    Attributes:
        tokenwise: a block's codes, step and write treat every token alone, so key-value caches and single-token heads
            are exact.
        pooled_width: channels of what `pooled` returns, set by a method with a read-out of its own; None: the head
            reads the last hidden state.
        corrects: whether it changes the vector that the head makes of what it reads (`correct`).
        from_data: its start hangs on training rows: `ss.initialise` calls `initialise` with scores taken on them.
        least_rows: the fewest rows of a batch that it can be trained on (2 where it has batch norms).
    """

    starts_as_identity: ClassVar[bool] = False
    replays: ClassVar[bool] = False
    caches: ClassVar[bool] = False
    tokenwise: bool = False
    pooled_width: int | None = None
    corrects: bool = False
    from_data: bool = False
    least_rows: int = 1

    @classmethod
    def check(cls, config: Any, sites: Sequence[Site]) -> None:
        """Raise `ValueError` with the reason if the method cannot work on these sites."""

    @classmethod
    def first_write(cls, config: Any, sites: Sequence[Site]) -> Site | None:
        """The first site at which the method returns another hidden state; None if it never does.

        Another `memory` changes the block that reads it: its first write is the site in front of that block.
        """
        return None

    @classmethod
    def kept_per_token(cls, config: Any, site: Site) -> int:
        """Values that the method keeps for backward per token at a site: its stated bound, tested as a law."""
        return 0

    @classmethod
    def kept_per_row(cls, config: Any, site: Site) -> int:
        """What it keeps at a site besides, per row of the batch, however many tokens that has."""
        return 0

    def initialise(self, sites: Sequence[Site], score: Score) -> None:
        """Start from the backbone's own weights (`Site.weights`), by what `score` says that they are worth."""

    def start(self, site: Site, carried: Tensor | None) -> Any:
        """State before a stack's first site; in a decoder, `carried` is what the encoder's `carry` returned."""
        return None

    def read(self, hidden: Tensor, site: Site) -> Any:
        """The codes of a hidden state (batch, tokens, width): a tensor, a tuple of tensors, or None for nothing.

        It may draw random numbers (dropout of what is read).
        """
        return hidden

    def step(self, state: Any, codes: Any, site: Site) -> Any:
        """The state behind a site, by what was read there."""
        return state

    def advance(self, state: Any, hidden: Tensor, site: Site) -> Any:
        """`step` of what was `read`: the same to the bit where a method overrides it to keep less for backward."""
        return self.step(state, self.read(hidden, site), site)

    def write(self, state: Any, hidden: Tensor, site: Site) -> tuple[Any, Tensor]:
        """State and hidden state to go on with, after `advance`: others from the first write on.

        A method that reads what it wrote does that here.
        """
        return state, hidden

    def memory(self, state: Any, site: Site) -> Tensor | None:
        """What the decoder block of `site` reads instead of the encoder's output, or None for the encoder's."""
        return None

    def finish(self, state: Any, raw: Tensor, normed: Tensor, site: Site) -> Tensor:
        """The stack's output, from what went into its final norm and what came out (the same where it has none)."""
        return normed

    def carry(self, state: Any) -> Tensor | None:
        """What a decoder needs of an encoder's state: one tensor (batch, tokens, any), which survives beam search."""
        return None

    def pooled(self, state: Any, site: Site) -> Tensor | None:
        """(batch, pooled_width) for the head, when the method has a read-out of its own."""
        return None

    def correct(self, state: Any, site: Site, vector: Tensor) -> Tensor:
        """The head's vector (batch, `site.features`) as the method would have it, when it `corrects`.

        It is what the head reads, or with `Retrieve` its projection.
        """
        return vector


class WeightDelta(ABC):
    """A method that changes the backbone's own weights (full tuning, BitFit, diff pruning, LoRA).

    The backbone trains with its own noise; `detach` puts every weight back bit for bit. A method that works by modules
    of its own inside the backbone puts them there in `insert`.

    Class attributes:
        starts_as_identity: before training, outputs equal the frozen model's, bit for bit.
    """

    starts_as_identity: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def moves(self, name: str, parameter: Tensor) -> bool:
        """Whether the method trains the backbone parameter of this name (relative to the base model)."""

    def insert(self, trunk: nn.Module) -> None:  # noqa: B027 - most methods insert nothing
        """Put modules of the method's own into the backbone's trunk; raise `ValueError` if they do not fit."""

    def remove(self, trunk: nn.Module) -> None:  # noqa: B027 - as for insert
        """Undo `insert`: the trunk has its own modules under their own names again."""

    def plain_name(self, name: str) -> str | None:
        """What a tensor of this name is called in the untouched trunk; None for the method's own."""
        return name

    def check(self, moved: Sequence[str]) -> None:  # noqa: B027 - most methods have nothing to refuse
        """Raise `ValueError` with the reason if the method cannot work on a backbone in which it moves these."""

    def diff(self, tensors: Mapping[str, nn.Parameter]) -> SparseDiff | None:
        """What is trained in place of the tensors that the method moves, if it is a sparse diff of them.

        Args:
            tensors: the moved ones by their names in the trunk, without heads and what the checkpoint did not have.
        """
        return None


ValueDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class SparseDeltaConfig(MethodConfig):
    """A sparse diff of the backbone's weights.

    Attributes:
        density: share of the weights' entries that are changed, above 0 and at most 1.
        value_dtype: precision of the changes, in training and in the task's file.
    """

    density: float = 0.005
    value_dtype: ValueDtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("density", 0 < self.density <= 1, "a number above 0 and at most 1")


class SparseDelta(WeightDelta):
    """A weight delta that ends as a sparse diff: zero but at a share `config.density` of the weights' entries.

    Attributes:
        samples: training rows that `ss.initialise` looks at for `choose`; 0: positions are chosen without.
    """

    samples: int = 0

    def moves(self, name: str, parameter: Tensor) -> bool:
        """Every floating-point weight may be changed."""
        return parameter.is_floating_point()

    def insert(self, trunk: nn.Module) -> None:
        """Raise if the backbone is quantised: its stored weights are codes, to which nothing can be added."""
        codes = {str(tensor.dtype).removeprefix("torch.") for tensor in trunk.parameters() if not is_plain(tensor)}
        if codes or getattr(getattr(trunk, "config", None), "quantization_config", None) is not None:
            raise ValueError(
                f"its weights are quantised ({', '.join(sorted(codes)) or 'by its config'}), and a diff is added to "
                "plain ones: load it unquantised, or train a side network (read, dtl, sherl, ...), which leaves "
                "weights alone"
            )

    def diff(self, tensors: Mapping[str, nn.Parameter]) -> SparseDiff | None:
        """The diff, without positions yet."""
        total = sum(tensor.numel() for tensor in tensors.values())
        nonzeros = int(self.config.density * total)
        if not nonzeros:
            raise ValueError(
                f"density={self.config.density} of its {total} weights is less than one: "
                f"choose at least {1 / total:.2g}"
            )
        return SparseDiff(tensors, nonzeros, getattr(torch, self.config.value_dtype))

    @property
    def relaxes(self) -> bool:
        """Whether training begins with a stage in which all weights are free, between `relax` and `project`."""
        return False

    def stages(self, epochs: int, rate: float) -> tuple[tuple[int, float], tuple[int, float]]:
        """Epochs and learning rate of that first stage and of the training of the diff, for those of the settings."""
        return (epochs, rate), (epochs, rate)

    def relax(
        self,
        diff: SparseDiff,
        dense: Iterable[nn.Parameter],
        *,
        rate: float,
        weight_decay: float,
        max_norm: float,
        seed: int,
    ) -> Any:
        """The optimizer of the first stage; all weights that the diff may change are its own from here on.

        Its `restore` gives the weights their pretrained values back; a checkpoint of it holds all that it needs.

        Args:
            diff: without positions.
            dense: what is trained besides: the head.
            rate: learning rate; at 0 nothing moves.
            weight_decay: of the weights and of the head.
            max_norm: where gradients are cut; 0 leaves them.
            seed: of what is random in it.

        Raises:
            NotImplementedError: of a method without this stage, for which nobody calls it (see `relaxes`).
        """
        raise NotImplementedError(f"{type(self).__name__} has one stage")

    def project(self, optimizer: Any, diff: SparseDiff) -> dict[str, Any]:
        """Place the diff by what the first stage learned; what came of it, for the results.

        Raises:
            NotImplementedError: as `relax`.
        """
        raise NotImplementedError(f"{type(self).__name__} has one stage")

    def choose(self, diff: SparseDiff, squares: Mapping[str, Tensor]) -> None:
        """Place the diff by the sums of squared gradients of all weights, by the names in `diff.tensors`."""

    def before_step(self, diff: SparseDiff, step: int, steps: int) -> None:
        """Called in training before the batches of optimizer step `step` (from 1) of `steps`."""

    def after_step(self, diff: SparseDiff, optimizer: Any) -> None:
        """Called after the same step, when gradients are gone; the optimizer holds its state of `diff.values`."""

    def check_told(self, diff: SparseDiff) -> None:
        """Called in every training pass: a method that needs `before_step` raises if nobody called it."""


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that can be added to."""
    return tensor.is_floating_point() and tensor.itemsize > 1


@dataclass(frozen=True)
class Method:
    """A registered method: its name, config class and implementation."""

    name: str
    config: type[MethodConfig]
    implementation: type[SideNet] | type[WeightDelta]

    @property
    def summary(self) -> str:
        """First line of the implementation's module docstring."""
        return (self.implementation.__doc__ or "").strip().partition("\n")[0]


Implementation = TypeVar("Implementation", bound=type[SideNet] | type[WeightDelta])
_REGISTRY: dict[str, Method] = {}


def register(name: str, config: type[MethodConfig]) -> Callable[[Implementation], Implementation]:
    """Class decorator: make a method known under `name`, chosen by its config's class.

    Raises:
        ValueError: if the name or the config class is taken.
    """

    def add(implementation: Implementation) -> Implementation:
        taken = _REGISTRY.get(name)
        if taken is not None and taken.implementation.__qualname__ != implementation.__qualname__:
            raise ValueError(f"a method named {name!r} is registered already: choose another name")
        for other in _REGISTRY.values():
            if other.config is config and other.name != name:
                raise ValueError(f"{config.__name__} belongs to the method {other.name!r}: give {name!r} its own")
        _REGISTRY[name] = Method(name, config, implementation)
        return implementation

    return add


def methods() -> dict[str, Method]:
    """Every registered method by name; modules under the entry point group "sidestep.methods" are imported first."""
    for point in entry_points(group="sidestep.methods"):
        point.load()
    return dict(sorted(_REGISTRY.items()))


def method_named(name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: if there is none (the message lists the known).
    """
    known = methods()
    if name not in known:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(known)}")
    return known[name]


def method_of(config: MethodConfig) -> Method:
    """The method that a config belongs to.

    Raises:
        TypeError: if the object is no registered config.
    """
    for method in methods().values():
        if type(config) is method.config:
            return method
    known = ", ".join(f"ss.{method.config.__name__}" for method in methods().values())
    raise TypeError(f"{config!r} is no method config: pass one of {known}")
