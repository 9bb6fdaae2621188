"""Passes whose frozen blocks were computed before: their hidden states come from a store, and the blocks do not run.

The model's own loop still runs, with its embeddings, masks and heads. Its early blocks are passed over, and behind each
of them stands what the store holds. A driver sees the pass as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.backbone.calls import argument_names, bound, replace_forward
from sidestep.backbone.facts import Layout
from sidestep.fold.deferred import Ended
from sidestep.fold.reads import tensors_of
from sidestep.fold.strand import Strand
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Place, Site, same_place


def place_name(site: Site) -> str:
    """The name of a place of a backbone in a store, such as "encoder.block.3"."""
    return f"{site.stack}.{site.kind}.{site.index}"


@dataclass(frozen=True)
class PassedOver:
    """How a block is passed over.

    Attributes:
        names: of its arguments, the hidden state's first.
        element: which element of its output the hidden state is. None: the output is the hidden state.
        others: for each element the argument that it is, or None for nothing.
    """

    names: tuple[str, ...]
    element: int | None = None
    others: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Route:
    """Which blocks are passed over, and what a store holds of them.

    Attributes:
        places: whose hidden states are stored, in the order of a pass.
        over: the blocks that are passed over.
        dtypes: of the hidden states, as the blocks gave them.
        grids: rows and columns of the tokens of those places where they stand in a grid.
        single: whether the states are of one token, which the head reads.
    """

    places: tuple[str, ...]
    over: Mapping[str, PassedOver]
    dtypes: Mapping[str, torch.dtype]
    grids: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    single: bool = False


@dataclass(frozen=True)
class States:
    """What a pass reads in the place of what frozen blocks compute. A batch carries it as "features".

    Attributes:
        route: which blocks these are.
        hidden: (batch, tokens, width) by the name of the place. One token if the route is of one.
        vector: (batch, width) that the head reads, where the method reads nothing else, or (batch, tokens, width). Then
            no part of the backbone runs.
        keep: (batch, tokens) bool, which of the tokens of `vector` are no padding. None: all.
        absent: (1, ...) stand-ins for inputs that are left out. What the model makes of them is not used.
    """

    route: Route
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    vector: Tensor | None = None
    keep: Tensor | None = None
    absent: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: Any, non_blocking: bool = False) -> States:
        """The states on a device."""
        hidden = {name: state.to(device, non_blocking=non_blocking) for name, state in self.hidden.items()}
        vector, keep = (
            None if one is None else one.to(device, non_blocking=non_blocking) for one in (self.vector, self.keep)
        )
        return replace(self, hidden=hidden, vector=vector, keep=keep)

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """The stand-ins as inputs of this batch."""
        rows = next(iter(self.hidden.values())).shape[0]
        return {name: one.to(device).expand(rows, *one.shape[1:]) for name, one in self.absent.items()}

    def at(self, site: Site, given: Tensor, layout: Layout) -> Tensor:
        """The hidden state at a site, as the backbone would give it. `given`, if none is stored of this site.

        Args:
            site: of the pass.
            given: what came by there. It has as many tokens.
            layout: of the hidden states.
        """
        name = place_name(site)
        if name not in self.hidden:
            return given
        state = self.hidden[name].to(self.route.dtypes[name])
        if given.ndim == 4:
            grid = self.route.grids[name]
            if layout == "channels":
                return state.transpose(1, 2).unflatten(2, grid).contiguous()
            return state.unflatten(1, grid)
        tokens = given.shape[0 if layout == "tokens first" else 1]
        if self.route.single:
            state = state.expand(-1, tokens, -1)
        elif state.shape[1] != tokens:
            state = F.pad(state, (0, 0, 0, tokens - state.shape[1]))
        return state.transpose(0, 1) if layout == "tokens first" else state


@contextmanager
def passing_over(places: Sequence[Place], route: Route) -> Iterator[None]:
    """Within it the blocks of a route do not run, and hand on what they are given."""
    with ExitStack() as undo:
        for place in places:
            how = route.over.get(place_name(place.site)) if place.site.kind == "block" else None
            if how is not None:
                undo.callback(replace_forward(place.module, _handing_on(how)))
        yield


def _handing_on(how: PassedOver) -> Callable[..., Any]:
    """What stands in for a block's forward."""

    def passed(*args: Any, **kwargs: Any) -> Any:
        call = bound(how.names, args, kwargs)
        hidden = call[how.names[0]]
        if how.element is None:
            return hidden
        parts = [None if name is None else call.get(name) for name in how.others]
        parts[how.element] = hidden
        return tuple(parts)

    return passed


# --- recording --------------------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """Takes the hidden states of a live pass.

    Attributes:
        route: what is to be taken. The pass ends when it has all. None: the pass is looked at, to find the route.
        taken: the hidden state (batch, tokens, width) of each place, with which of its tokens are real.
        grids: of the places.
        read: the places at which the method reads something.
    """

    route: Route | None = None
    taken: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def take(self, method: SideNet, hidden: Tensor, site: Site) -> None:
        """Take what comes by at a site.

        Raises:
            Ended: when there is nothing more to take.
        """
        name = place_name(site)
        if self.route is None:
            with torch.random.fork_rng(devices=[hidden.device] if hidden.device.type == "cuda" else []):
                if tensors_of(method.read(hidden, site)):
                    self.read.add(name)
        elif name not in self.route.places:
            return
        self.taken[name] = hidden, site.keep
        if site.grid is not None:
            self.grids[name] = site.grid
        if self.route is not None and name == self.route.places[-1]:
            raise Ended


@dataclass
class RecordedStrand(Strand):
    """No method runs along this pass. Its hidden states are taken."""

    recorder: Recorder = field(kw_only=True)

    def start(self, site: Site) -> None:
        """There is no state."""

    def advance(self, hidden: Tensor, site: Site) -> Tensor:
        """Take it, and hand it on."""
        self.recorder.take(self.method, hidden, site)
        return hidden

    def memory(self, site: Site) -> None:
        """None: the encoder's own output."""
        return

    def finish(self, raw: Tensor, normed: Tensor, site: Site, own: Callable[[Tensor], slice]) -> Tensor:
        """The stack's own output."""
        return normed


def _start_of(site: Site) -> str:
    return f"{site.stack}.stage.0"


@dataclass
class _Output:
    """What a block gave in the pass that is looked at."""

    how: PassedOver
    makes: bool
    reshapes: bool


class Look:
    """Finds the route of a model by one live pass.

    Args:
        places: the backbone's sites, in order.
        border: the site of the method's first write, or None if it never writes.
        elements: which element of a block's tuple the hidden state is, by stack.
    """

    def __init__(self, places: Sequence[Place], border: Site | None, elements: Mapping[str, int]) -> None:
        self.places, self.elements = places, elements
        blocks = [place for place in places if place.site.kind == "block"]
        last = next((n for n, one in enumerate(places) if border is not None and same_place(one.site, border)), None)
        early = places if last is None else places[: last + 1]
        self.early = [place for place in early if place.site.kind == "block"]
        self.late = len(self.early) < len(blocks)
        self.shares = len({place.module for place in blocks}) < len(blocks)
        self.outputs: dict[str, _Output] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it the outputs of the early blocks are looked at."""
        handles = [
            place.module.register_forward_hook(self._watch(place), with_kwargs=True, prepend=True)
            for place in self.early
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, place: Place) -> Callable[..., None]:
        names, element = argument_names(place.module), self.elements[place.site.stack]

        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = bound(names, args, kwargs)
            given = call[names[0]]
            if not isinstance(output, tuple | list):
                self.outputs[place_name(place.site)] = _Output(
                    PassedOver(tuple(names)), False, output.shape != given.shape
                )
                return
            others: list[str | None] = []
            makes = False
            for number, part in enumerate(output):
                source = next((name for name, value in call.items() if value is part and part is not None), None)
                makes |= number != element and source is None and part is not None
                others.append(None if number == element else source)
            how = PassedOver(tuple(names), element, tuple(others))
            self.outputs[place_name(place.site)] = _Output(how, makes, output[element].shape != given.shape)

        return look

    def route(self, recorder: Recorder, *, single: bool, unread: bool) -> Route:
        """The route, when the pass is over.

        Args:
            recorder: of the pass.
            single: whether the head reads one token, which alone the method is given.
            unread: whether the inputs are files that are not decoded any more, so that a stack's input is stored too.
        """
        over, places = {}, set(recorder.read)
        names = [place_name(place.site) for place in self.early]
        for number, (name, place) in enumerate(zip(names, self.early, strict=True)):
            seen = self.outputs[name]
            following = self.early[number + 1] if number + 1 < len(names) else None
            ends = following is None or (following.site.stack, following.site.stage) != (
                place.site.stack,
                place.site.stage,
            )
            if seen.makes and self.late:  # a late block reads what it makes, so it runs
                before = self.early[number - 1].site if number else None
                first = before is None or before.stack != place.site.stack
                places.add(_start_of(place.site) if first else names[number - 1])
            else:
                over[name] = seen.how
            if ends or seen.reshapes:
                places.add(name)
        known = {place_name(place.site): place.site for place in self.places}
        # what goes into a stage is made of what is passed on, but for files that nobody decodes
        live = {name for name, site in known.items() if site.kind == "stage" and (site.stage > 0 or not unread)}
        chosen = tuple(name for name in known if name in places - live and (name in names or "stage" in name))
        return Route(
            places=chosen,
            over=over,
            dtypes={name: recorder.taken[name][0].dtype for name in chosen},
            grids={name: recorder.grids[name] for name in chosen if name in recorder.grids},
            single=single,
        )
