"""Many tasks from one pass: those that only read follow it to its end, and others go on from their own borders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sidestep.fold import CannotShare, Route, Rows, SharedFold, States
from sidestep.model.attach import Attached
from sidestep.model.features import VECTOR, FeaturesRefused, check_storable, find_route
from sidestep.model.side_model import SideModel

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""How far a task's outputs from its border may be from those of a pass of its own, relative to the largest of them."""


class Ready(Protocol):
    """A task in memory that is not on the backbone. Its identity changes when another task gets its name."""

    @property
    def model(self) -> SideModel:
        """The task's."""

    @property
    def identity(self) -> str:
        """Of the task."""


class Together:
    """Runs several tasks of one backbone on a batch.

    Args:
        switch: puts a task on the backbone, and gives its model.

    Attributes:
        passes: how many whole passes of the backbone the last run took.
        alone: why tasks of the last run had passes of their own, by their names.
        borders: how tasks that write go on, by their identity.
    """

    def __init__(self, switch: Callable[[str], Attached]) -> None:
        self.switch = switch
        self.passes = 0
        self.alone: dict[str, str] = {}
        self.borders: dict[str, Border] = {}

    def run(
        self, tasks: Mapping[str, Ready | None], batch: Mapping[str, Any], rows: Mapping[str, Rows]
    ) -> dict[str, Any]:
        """The outputs of tasks by their names. The backbone is bare when this begins.

        Args:
            tasks: by name. None: a task that has to be put on the backbone to be in memory at all.
            batch: of the backbone's inputs.
            rows: of the batch, by task. A task that is not named here runs on all.
        """
        self.passes, self.alone = 0, {}
        readers = {
            name: one for name, one in tasks.items() if one and one.model.only_reads and self._border(one).follows
        }
        going = {
            name: (border, route)
            for name, one in tasks.items()
            if one and name not in readers and (route := (border := self._border(one)).route) is not None
        }
        outputs: dict[str, Any] = {}
        if readers or len(going) > 1:
            one = next(ready.model for ready in tasks.values() if ready is not None)
            wanted = {place for _, route in going.values() for place in route.places}
            found = _follow(one, {name: ready.model for name, ready in readers.items()}, wanted, batch, rows)
            self.passes += 1
            outputs = found.outputs
            for name in found.refused:
                self._border(readers[name]).follows = False
            for name, (border, route) in going.items():
                states = States(route, {place: found.taken[place] for place in route.places})
                outputs[name] = self._from_border(self.switch(name), border, states, batch, rows.get(name))
        for name, ready in tasks.items():
            if name not in outputs:
                model = self.switch(name)
                outputs[name] = _run(model, batch, rows.get(name))
                self.passes += 1
                self.alone[name] = f"{model.record.name} is read anew for each call"
                if ready is not None:
                    border = self._border(ready)
                    border.look(ready.model, batch)
                    self.alone[name] = border.reason or "it goes on from its border from the next call on"
        return {name: outputs[name] for name in tasks}

    def forget(self, identities: Collection[str]) -> None:
        """Forget how all tasks go on but those with these identities."""
        for identity in self.borders.keys() - set(identities):
            del self.borders[identity]

    def _border(self, one: Ready) -> Border:
        return self.borders.setdefault(one.identity, Border())

    def _from_border(
        self, model: Attached, border: Border, states: States, batch: Mapping[str, Any], rows: Rows | None
    ) -> Any:
        """A task's output from what was taken. At first it is compared with a pass of its own."""
        output = _run(model, batch, rows, states)
        if border.proved:
            return output
        own = _run(model, batch, rows)
        self.passes += 1
        border.proved = True
        if _differ(output, own):
            border.route, border.reason = None, "from its border it gives other outputs than in a pass of its own"
        return own


@dataclass
class Border:
    """How a task goes on that cannot follow a shared pass to its end.

    Attributes:
        follows: whether it can, if it only reads.
        looked: whether the route was looked for.
        route: the blocks before the border, and the places whose hidden states are needed. None: it runs alone.
        reason: why it does, if it was tried.
        proved: whether its outputs were compared with those of a pass of its own.
    """

    follows: bool = True
    looked: bool = False
    route: Route | None = None
    reason: str | None = None
    proved: bool = False

    def look(self, model: SideModel, batch: Mapping[str, Any]) -> None:
        """Find the route once, by a pass of the task alone. It is on the backbone."""
        if self.looked:
            return
        self.looked = True
        try:
            route = find_route(check_storable(model), batch)
        except FeaturesRefused as error:
            self.reason = str(error)
            return
        if route.over and VECTOR not in route.places:
            self.route = route
        else:
            self.reason = f"{model.record.name} writes in front of the first block"


@dataclass
class _Followed:
    """What came of one pass: outputs by task, hidden states by place, and tasks that could not follow it."""

    outputs: dict[str, Any]
    taken: dict[str, Tensor]
    refused: list[str] = field(default_factory=list)


def _run(model: Attached, batch: Mapping[str, Any], rows: Rows | None, states: States | None = None) -> Any:
    """A task's output for its rows, in a pass of its own or from states that were taken of the whole batch."""
    parts = rows is not None and rows.can_part(batch)
    if rows is not None and parts:
        batch = rows.part(dict(batch))
        states = None if states is None else replace(states, hidden=rows.part(dict(states.hidden)))
    output = model(**batch) if states is None else model(**batch, features=states)
    return output if rows is None or parts else rows.part(output)


def _follow(
    one: SideModel,
    readers: Mapping[str, SideModel],
    wanted: Collection[str],
    batch: Mapping[str, Any],
    rows: Mapping[str, Rows],
) -> _Followed:
    """Run the bare backbone once, and all tasks that only read along with it.

    Args:
        one: any model that was made on the backbone.
        readers: models that only read, by the names of their tasks.
        wanted: places whose hidden states are taken.
        batch: of the backbone's inputs.
        rows: of the batch, by task, where these are not all.
    """
    groups = _groups(readers, _strands(readers), rows)
    driver = SharedFold(one.trunk, one.places, one.facts, wanted)
    try:
        folds = [[readers[names[0]].fold for names in group] for group in groups]
        own = [_own_rows(readers, group, rows) for group in groups]
        output, readings = driver.run(folds, lambda: one.bare(dict(batch)), own)
    except CannotShare:
        writing = [name for name, model in readers.items() if model.fold.keeping.border is not None]
        left = {name: model for name, model in readers.items() if name not in writing}
        return replace(_follow(one, left, wanted, batch, rows), refused=writing)
    outputs: dict[str, Any] = {}
    for group, has_rows, found in zip(groups, own, readings, strict=True):
        for names, reading in zip(group, found, strict=True):
            for name in names:
                if (its := rows.get(name)) is None:
                    outputs[name] = readers[name].answer(reading, output, batch)
                else:
                    read = its.reading(reading) if has_rows is None else reading
                    outputs[name] = readers[name].answer(read, its.part(output), its.part(dict(batch)))
    return _Followed(outputs, driver.taken)


def _strands(readers: Mapping[str, SideModel]) -> list[list[str]]:
    """The tasks, together where their methods read equal vectors, as those without parameters do."""
    together: dict[Hashable, list[str]] = {}
    for name, model in readers.items():
        side, fold = model.side, model.fold
        reads = (type(side), side.pooled_from, fold.narrow, fold.reads_raw)
        together.setdefault(name if _is_own(model) else reads, []).append(name)
    return list(together.values())


def _is_own(model: SideModel) -> bool:
    """Whether what a method reads is its own: it has parameters, or changes the head's vector."""
    return model.side.corrects or any(True for _ in model.side.parameters())


def _groups(
    readers: Mapping[str, SideModel], strands: Sequence[Sequence[str]], rows: Mapping[str, Rows]
) -> list[list[Sequence[str]]]:
    """The strands, together where their side networks have one shape, so that their products are batched."""
    together: dict[Hashable, list[Sequence[str]]] = {}
    for names in strands:
        model = readers[names[0]]
        side, fold = model.side, model.fold
        dtypes = frozenset(parameter.dtype for parameter in side.parameters())
        joined = fold.carries and len(fold.lengths) > 1
        alike = dtypes and not (side.training or side.corrects or joined)
        how = (type(side), model.settings.method, fold.narrow, fold.reads_raw, dtypes, names[0] in rows)
        together.setdefault(how if alike else names[0], []).append(names)
    return list(together.values())


def _own_rows(
    readers: Mapping[str, SideModel], group: Sequence[Sequence[str]], rows: Mapping[str, Rows]
) -> list[Rows] | None:
    """The rows of each side network of a group. None: all. What has no parameters costs little, and is read of all."""
    first = group[0][0]
    return [rows[names[0]] for names in group] if first in rows and _is_own(readers[first]) else None


def _differ(output: Any, own: Any) -> bool:
    ours, theirs = (one["logits"] if "logits" in one else one[0] for one in (output, own))
    if ours.shape != theirs.shape:
        return True
    return bool((ours - theirs).abs().max() > TOLERANCE[theirs.dtype] * (theirs.abs().max() + 1))
