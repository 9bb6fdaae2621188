"""The standing hooks that bring a pass to whoever drives a method along it.

No modelling file is forked: masks, rotary embeddings, caches, heads and `generate` are the model's own. The hooks do
nothing unless their driver is running, so the bare backbone stays usable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils import ModelOutput

from sidestep.backbone.calls import argument_names, bound, part_of, with_argument, with_part
from sidestep.backbone.trunk import tower_of
from sidestep.interface.sites import Place, Site

#: Field of `encoder_outputs` in which an encoder's side state travels to the decoder.
CARRIED = "side_state"


class Driver(Protocol):
    """What hooks bring a pass to. Hidden states are as the backbone gives them.

    Attributes:
        running: whether a pass is followed.
        attached: whether the hooks are on the backbone.
        reads_memory: whether decoder blocks may be given another memory than the encoder's.
        reads_raw: whether what goes into the head's final norm is looked at before it.
        reads_output: whether a head may read the trunk's own last hidden state.
    """

    attached: bool

    @property
    def running(self) -> bool: ...
    @property
    def reads_memory(self) -> bool: ...
    @property
    def reads_raw(self) -> bool: ...
    @property
    def reads_output(self) -> bool: ...

    def element(self, site: Site) -> int:
        """Which element of a block's output its hidden state is, where that has several."""

    def seen(self, stack: str) -> int:
        """How many sites of a stack this pass has come by."""

    def begin(self, module: nn.Module, inputs: Mapping[str, Any], *, alone: bool = False) -> None:
        """Start a pass at its outermost module, with the module's inputs by name.

        If `alone`, the inputs count only there: a pass that runs already does not get them.
        """

    def end(self, module: nn.Module) -> None:
        """A module that may have begun a pass has returned."""

    def check(self, given: Tensor, training: bool) -> None:
        """The trunk has given its last hidden state."""

    def read_output(self, given: Tensor) -> None:
        """The trunk has given a last hidden state that a head may read."""

    def encoded(self, module: nn.Module) -> Tensor | None:
        """An encoder that may have run alone has returned. The result goes along with its output."""

    def stage(self, site: Site, order: int, given: Tensor, call: Mapping[str, Any]) -> Tensor:
        """What a stage's first block reads in the place of `given`."""

    def memory(self, site: Site, given: Tensor, call: Mapping[str, Any]) -> Tensor | None:
        """What a decoder block reads in the place of the encoder's output, or None to read the encoder's output."""

    def block(self, site: Site, order: int, given: Tensor, call: Mapping[str, Any]) -> Tensor:
        """What goes on in the place of a block's output."""

    def before_norm(self, site: Site, order: int, raw: Tensor) -> Tensor | None:
        """What the final norm reads, or None to read what the norm is given."""

    def norm(self, site: Site, order: int, module: nn.Module, raw: Tensor, normed: Tensor) -> Tensor | None:
        """What goes on in the place of the final norm's output, or None to go on with that output."""


class Hooks:
    """A driver's hooks on a backbone.

    Args:
        driver: gets the passes.
        entry: the module whose call is a pass (the backbone, or its trunk when another head is put on).
        trunk: the backbone without its head.
        places: the backbone's sites, in order.
    """

    def __init__(self, driver: Driver, entry: nn.Module, trunk: nn.Module, places: Sequence[Place]) -> None:
        self.driver, self.entry, self.trunk, self.places = driver, entry, trunk, places
        self.handles: list[RemovableHandle] = []
        self.visits = Counter(place.module for place in places if place.site.kind == "block")
        self.put()

    def put(self) -> None:
        """Put them on the backbone."""
        self.handles = self._of_modules()
        orders: Counter[str] = Counter()
        ordered: list[tuple[Place, int]] = []
        for place in self.places:
            ordered.append((place, orders[place.site.stack]))
            orders[place.site.stack] += 1
        # the last first: where a block has several sites, one visit is not to be taken for the next one too
        for place, order in reversed(ordered):
            self.handles += self._of_place(place, order)
        self.driver.attached = True

    def remove(self) -> None:
        """Take them off."""
        self.driver.attached = False
        for handle in self.handles:
            handle.remove()

    @property
    def _has_decoder(self) -> bool:
        return len({place.site.stack for place in self.places}) > 1

    def _of_modules(self) -> list[RemovableHandle]:
        driver = self.driver
        tower = tower_of(self.trunk)[1]
        handles = [tower.register_forward_hook(ReadOutput(driver))] if driver.reads_output else []
        handles.append(tower.register_forward_hook(CheckOutput(driver)))
        for module in (self.entry,) if self.entry is self.trunk else (self.entry, self.trunk):
            handles += [
                module.register_forward_pre_hook(Begin(driver, argument_names(module)), with_kwargs=True),
                module.register_forward_hook(End(driver)),
            ]
        if tower is not self.trunk:  # some models write by their language model alone (BLIP)
            handles += [
                tower.register_forward_pre_hook(BeginPart(driver, argument_names(tower)), with_kwargs=True),
                tower.register_forward_hook(End(driver)),
            ]
        if self._has_decoder:
            encoder = self.trunk.get_submodule("encoder")
            handles += [
                encoder.register_forward_pre_hook(BeginPart(driver, argument_names(encoder)), with_kwargs=True),
                encoder.register_forward_hook(EndEncoder(driver)),
            ]
        return handles

    def _of_place(self, place: Place, order: int) -> list[RemovableHandle]:
        driver, site, module = self.driver, place.site, place.module
        names = argument_names(module)
        shared = self.visits[module] > 1
        if site.kind == "stage":
            return [module.register_forward_pre_hook(AtStage(driver, site, order, names, shared), with_kwargs=True)]
        if site.kind == "norm":
            handles = [module.register_forward_hook(AtNorm(driver, site, order))]
            if driver.reads_raw and site.head:
                handles.append(module.register_forward_pre_hook(BeforeNorm(driver, site, order)))
            return handles
        handles = [module.register_forward_hook(AtBlock(driver, site, order, names, shared), with_kwargs=True)]
        if self._has_decoder and site.stack == "decoder" and driver.reads_memory:
            handles.append(module.register_forward_pre_hook(AtMemory(driver, site, names), with_kwargs=True))
        return handles


def is_hooked(module: nn.Module) -> bool:
    """Whether a driver's hooks are on a module."""
    return any(isinstance(hook, Hook) for hook in module._forward_hooks.values())


# --- module-level classes, so that a hooked model can be copied and pickled -------------------------------------------


@dataclass(eq=False)
class Hook:
    """A standing hook, which does nothing unless its driver is running."""

    driver: Driver


@dataclass(eq=False)
class Begin(Hook):
    """Before the backbone and before its trunk: start a pass."""

    names: list[str]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.driver.running:
            self.driver.begin(module, bound(self.names, args, kwargs))


@dataclass(eq=False)
class End(Hook):
    """After them: end the pass that began there."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.driver.running:
            self.driver.end(module)


@dataclass(eq=False)
class CheckOutput(Hook):
    """After the first pass of the trunk, or of its language model: its last hidden state is what was taken for it."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.driver.running or torch.compiler.is_compiling():
            return
        if (given := _last_hidden(output)) is not None:
            self.driver.check(given, module.training)


@dataclass(eq=False)
class ReadOutput(Hook):
    """After each pass of the trunk, or of its language model: a head may read its last hidden state."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.driver.running and (given := _last_hidden(output)) is not None:
            self.driver.read_output(given)


def _last_hidden(output: Any) -> Tensor | None:
    return output.get("last_hidden_state") if isinstance(output, ModelOutput) else None


@dataclass(eq=False)
class BeginPart(Hook):
    """Before a part of the trunk that `generate` may run alone: an encoder, or the language model."""

    names: list[str]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.driver.running:
            self.driver.begin(module, bound(self.names, args, kwargs), alone=True)


@dataclass(eq=False)
class EndEncoder(Hook):
    """After an encoder that ran outside the trunk: its side state goes along in `encoder_outputs`."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.driver.running:
            return
        carried = self.driver.encoded(module)
        if isinstance(output, ModelOutput) and carried is not None:
            output[CARRIED] = carried


@dataclass(eq=False)
class AtSite(Hook):
    """At a block, which may have several sites, as it runs several times (ALBERT). Then each waits for its turn."""

    site: Site
    order: int
    names: list[str]
    shared: bool

    def waits(self) -> bool:
        """Whether this is none of its calls."""
        if not self.driver.running:
            return True
        return self.shared and self.driver.seen(self.site.stack) != self.order


@dataclass(eq=False)
class AtStage(AtSite):
    """Before the first block of a stage."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self.waits():
            return None
        call, name = bound(self.names, args, kwargs), self.names[0]
        written = self.driver.stage(self.site, self.order, call[name], call)
        return None if written is call[name] else with_argument(self.names, args, kwargs, name, written)


@dataclass(eq=False)
class AtMemory(Hook):
    """Before a decoder block: what it reads of the encoder may be replaced."""

    site: Site
    names: list[str]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not self.driver.running:
            return None
        call, name = bound(self.names, args, kwargs), "encoder_hidden_states"
        memory = self.driver.memory(self.site, call[self.names[0]], call)
        if memory is None:
            return None
        given = call.get(name)
        return with_argument(self.names, args, kwargs, name, memory if given is None else memory.to(given.dtype))


@dataclass(eq=False)
class AtBlock(AtSite):
    """After a block.

    After the last block of a stack without a final norm it is the stack's end too.
    """

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.waits():
            return None
        element = self.driver.element(self.site)
        given = part_of(output, element)
        written = self.driver.block(self.site, self.order, given, bound(self.names, args, kwargs))
        return None if written is given else with_part(output, element, written)


@dataclass(eq=False)
class BeforeNorm(Hook):
    """Before the final norm, where the head reads the mean of what goes in."""

    site: Site
    order: int

    def __call__(self, module: nn.Module, args: Any) -> Any:
        if not self.driver.running:
            return None
        raw = self.driver.before_norm(self.site, self.order, args[0])
        return None if raw is None else (raw, *args[1:])


@dataclass(eq=False)
class AtNorm(Hook):
    """After the final norm: the stack's end."""

    site: Site
    order: int

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return self.driver.norm(self.site, self.order, module, args[0], output) if self.driver.running else None
