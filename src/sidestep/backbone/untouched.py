"""Run a model and leave it as it was."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from sidestep.backbone.trunk import device_of

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a model inside of this, in eval mode and frozen, to leave the model as it was.

    Modules that replace each other while they run (BigBird's attention on short texts), modes, attributes, hooks,
    gradient flags and the config are as before. What `undisturbed` names is as before too.
    """
    before, trained = Snapshot(model), [parameter for parameter in model.parameters() if parameter.requires_grad]
    with undisturbed(device_of(model)):
        try:
            model.eval()
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            before.restore()
            for parameter in trained:
                parameter.requires_grad_(True)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Compute inside of this without autocast and under autograd, whatever the caller has set.

    Random numbers go on afterwards as if nobody had drawn any. Autograd is on, because a part that makes a gradient of
    its own has to show it.
    """
    with ExitStack() as stack:
        stack.enter_context(_random_numbers(device))
        stack.enter_context(torch.inference_mode(False))  # caches made under it could not be used in training
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        # of inputs that a model makes for itself: the caller may be planning on the meta device
        stack.enter_context(torch.device(device))
        yield


class Snapshot:
    """What a model is but for the values of its tensors: which modules it has, their modes, attributes and hooks."""

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        self._states = [_State(part) for part in (*model.modules(), *([] if config is None else [config]))]

    def restore(self) -> None:
        """Make the model that again, whatever was done to it."""
        for state in self._states:
            state.restore()


class _State:
    """The attributes of an object, and what is in those that are containers."""

    def __init__(self, owner: Any) -> None:
        self.owner, self.values = owner, dict(vars(owner))
        self.contents = {n: v.copy() for n, v in self.values.items() if type(v) in _CONTAINERS}

    def restore(self) -> None:
        """Put them back, and keep a container the same object, because handles of hooks refer to it."""
        for name, before in self.contents.items():
            container = self.values[name]
            if not _same(container, before):
                container.clear()
                container.extend(before) if type(container) is list else container.update(before)
        if not _same(vars(self.owner), self.values):
            vars(self.owner).clear()
            vars(self.owner).update(self.values)


def _same(now: Any, before: Any) -> bool:
    """Whether two containers of one type hold the same objects in the same order (tensors have no plain equality)."""
    parts = ([*now, *now.values()], [*before, *before.values()]) if isinstance(now, dict) else ([*now], [*before])
    return len(parts[0]) == len(parts[1]) and all(a is b for a, b in zip(*parts, strict=True))


@contextmanager
def _random_numbers(device: torch.device) -> Iterator[None]:
    """Python's, NumPy's and torch's go on afterwards as if nothing had drawn any."""
    pythons, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)
