"""One pass of the bare backbone that many methods follow, each with a strand of its own.

The methods only read. What one of them writes behind the last block is its own. The final norm is applied to it once
more. The backbone goes on as if nobody was there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sidestep.backbone import Facts, as_tokens
from sidestep.fold.fold import Fold
from sidestep.fold.group import Group, GroupStrand
from sidestep.fold.hooks import Hooks
from sidestep.fold.passes import FoldError, Reading
from sidestep.fold.rows import Rows
from sidestep.fold.stored import place_name
from sidestep.fold.turns import BUSY, Turn
from sidestep.interface.sites import Place, Site


class CannotShare(FoldError):
    """Something stands between the last block and the final norm, so that what methods write cannot be followed."""


class SharedFold:
    """The driver of a pass that several folds share. The backbone has no other hooks meanwhile.

    Args:
        trunk: the backbone without its head.
        places: its sites, in order.
        facts: what the backbone is.
        wanted: names of places whose hidden states are taken, for methods that go on from there.

    Attributes:
        taken: (batch, tokens, width) of these places.
    """

    reads_memory = False
    reads_raw = True
    reads_output = False

    def __init__(self, trunk: nn.Module, places: Sequence[Place], facts: Facts, wanted: Collection[str] = ()) -> None:
        self.trunk, self.places, self.facts, self.wanted = trunk, places, facts, frozenset(wanted)
        self.taken: dict[str, Tensor] = {}
        self.attached, self.turn = False, Turn(FoldError(BUSY))
        self.folds: Sequence[Fold] = ()
        self.written: dict[int, Tensor] = {}
        self.visits: Counter[str] = Counter()
        self.last: Tensor | None = None

    def run(
        self,
        groups: Sequence[Sequence[Fold]],
        call: Callable[[], Any],
        rows: Sequence[Sequence[Rows] | None] | None = None,
    ) -> tuple[Any, list[list[Reading]]]:
        """What `call` gives, which runs the trunk once, and what the head of each fold reads.

        Args:
            groups: of folds. Those of a group with several are of one shape, and run as one at the end of the pass.
            call: runs the trunk.
            rows: of the batch, for each fold of each group. None in the place of a group's: all rows.

        Raises:
            CannotShare: if a method writes and what follows cannot be followed.
            FoldError: as `Fold.run`.
        """
        hooks = Hooks(self, self.trunk, self.trunk, self.places)
        self.folds = [group[0] for group in groups]
        for fold, group, own in zip(self.folds, groups, rows or [None] * len(groups), strict=True):
            alone = len(group) == 1 and own is None
            fold.group = None if alone else Group([one.method for one in group], fold.home, own)
        try:
            with self.turn:
                output = call()
                return output, [_readings(fold) for fold in self.folds]
        finally:
            hooks.remove()
            for fold in self.folds:
                fold.current, fold.finished, fold.group = None, None, None
            self.folds, self.last = (), None
            self.written.clear()
            self.visits.clear()

    @property
    def running(self) -> bool:
        """Whether this thread's pass is running."""
        return self.turn.mine

    # --- what hooks bring ------------------------------------------------------------------------------------------

    def element(self, site: Site) -> int:
        """Which element of a block's output its hidden state is, where that has several."""
        return self.facts.stacks[site.stack].element

    def seen(self, stack: str) -> int:
        """How many sites of a stack this pass has come by."""
        return self.visits[stack]

    def begin(self, module: nn.Module, inputs: Mapping[str, Any], *, alone: bool = False) -> None:
        """Start the pass of each."""
        for fold in self.folds:
            fold.begin(module, inputs, alone=alone)

    def end(self, module: nn.Module) -> None:
        """End the pass of each."""
        for fold in self.folds:
            fold.end(module)

    def check(self, given: Tensor, training: bool) -> None:
        """Nothing: the trunk's output is the bare model's, and not what a method has written."""

    def read_output(self, given: Tensor) -> None:
        """Nothing: it is the bare model's too, so such tasks do not share a pass."""
        return

    def encoded(self, module: nn.Module) -> None:
        """Nothing: an encoder runs within its trunk's pass."""
        return

    def stage(self, site: Site, order: int, given: Tensor, call: Mapping[str, Any]) -> Tensor:
        """What is given."""
        self._take(site, given)
        self.visits[site.stack] += 1
        for fold in self.folds:
            fold.stage(site, order, given, call)
        return given

    def memory(self, site: Site, given: Tensor, call: Mapping[str, Any]) -> None:
        """The encoder's output."""
        return

    def block(self, site: Site, order: int, given: Tensor, call: Mapping[str, Any]) -> Tensor:
        """What is given. What a method writes in its place is kept."""
        self._take(site, given)
        self.visits[site.stack] += 1
        for number, fold in enumerate(self.folds):
            written = fold.block(site, order, given, call)
            if written is not given:
                self.written[number] = written
        self.last = given
        return given

    def before_norm(self, site: Site, order: int, raw: Tensor) -> None:
        """What is given. Heads that read the mean of what goes in take it."""
        for number, fold in enumerate(self.folds):
            if fold.reads_raw:
                fold.before_norm(site, order, self._raw(number, raw))

    def norm(self, site: Site, order: int, module: nn.Module, raw: Tensor, normed: Tensor) -> None:
        """What is given. What was written goes through the norm for its own method."""
        for number, fold in enumerate(self.folds):
            own = self._raw(number, raw)
            fold.norm(site, order, module, own, normed if own is raw else module.forward(own))
        self.written.clear()

    def _take(self, site: Site, given: Tensor) -> None:
        if (name := place_name(site)) in self.wanted:
            self.taken[name] = as_tokens(given, self.facts.stacks[site.stack].layout)

    def _raw(self, number: int, raw: Tensor) -> Tensor:
        """What goes into the final norm for a fold.

        Raises:
            CannotShare: if it wrote, and the norm is not given what the last block gave.
        """
        fold = self.folds[number]
        writes = number in self.written or (fold.group is not None and fold.keeping.border is not None)
        if writes and raw is not self.last:
            raise CannotShare("what the final norm is given is not what the last block gave")
        return self.written.get(number, raw)


def _readings(fold: Fold) -> list[Reading]:
    assert fold.finished is not None
    strand = fold.finished[1]
    if isinstance(strand, GroupStrand):
        return strand.readings
    assert strand.reading is not None
    return [strand.reading]
