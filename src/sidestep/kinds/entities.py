"""What tags of words say: which words belong together, and how well that was found.

Source of the reading of tags: conlleval, the scorer of the CoNLL shared tasks, as seqeval has it by default. "I-"
behind another type, or behind nothing, begins an entity. Scores are nervaluate's, by its strict scheme: an entity is
right if type and both ends are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

from sidestep.data.tagged import OUTSIDE, is_scheme

ENDING = "ESLU"
"""Prefixes of a last word."""
BEGINNING = "BSU"
"""Prefixes of a first word."""


class Entity(NamedTuple):
    """Words that belong together.

    Attributes:
        type: what they are.
        start: number of the first word.
        end: number of the word behind the last.
    """

    type: str
    start: int
    end: int


@dataclass(frozen=True)
class Scheme:
    """How tags are read.

    Attributes:
        names: all tags of the task.
    """

    names: Sequence[str]

    @property
    def prefixed(self) -> bool:
        """Whether tags say where something begins."""
        return is_scheme(self.names)

    @property
    def each(self) -> bool:
        """Whether each word is for itself, as parts of speech are: there are neither prefixes nor an outside."""
        return not self.prefixed and OUTSIDE not in self.names

    def entities(self, tags: Sequence[str]) -> list[Entity]:
        """The entities of a row's tags. Plain tags without prefixes: words in a row with the same tag."""
        found: list[Entity] = []
        last, last_type, start = "O", "", 0
        for number, tag in enumerate([*tags, OUTSIDE]):
            prefix, name = self._parts(tag)
            opens = prefix != "O" and (prefix in BEGINNING or last == "O" or last in ENDING or name != last_type)
            if last != "O" and (opens or prefix == "O"):
                found.append(Entity(last_type, start, number))
            if opens:
                start = number
            last, last_type = prefix, name
        return found

    def scores(self, found: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> EntityScores:
        """The scores of rows of tags against the true ones."""
        if self.each:  # words of a long text would all be compared with each other
            return word_scores([*chain(*found)], [*chain(*true)])
        return entity_scores([*map(self.entities, found)], [*map(self.entities, true)])

    def broken(self, tags: Sequence[str]) -> int:
        """How many words go on with what did not begin."""
        if not self.prefixed:
            return 0
        parts = [self._parts(tag) for tag in (OUTSIDE, *tags)]
        return sum(own[0] == "I" and (last[0] in ("O", *ENDING) or last[1] != own[1]) for last, own in pairwise(parts))

    def _parts(self, tag: str) -> tuple[str, str]:
        if tag == OUTSIDE:
            return "O", ""
        if self.prefixed:
            return tag[0], tag[2:]
        return ("S" if self.each else "I"), tag


@dataclass(frozen=True)
class EntityScores:
    """Scores of entities.

    Attributes:
        precision, recall, f1: over all.
        of_type: recall and F1 by type.
    """

    precision: float
    recall: float
    f1: float
    of_type: dict[str, tuple[float, float]]


def entity_scores(found: Sequence[Sequence[Entity]], true: Sequence[Sequence[Entity]]) -> EntityScores:
    """The scores of entities of rows against the true ones. Each is right if type and both ends are."""
    from nervaluate import Evaluator

    types = sorted({entity.type for rows in (found, true) for row in rows for entity in row})
    if not types:
        return EntityScores(0.0, 0.0, 0.0, {})
    given = [[_as_given(row) for row in rows] for rows in (true, found)]
    result = Evaluator(*given, tags=types, loader="dict").evaluate()
    whole = result["overall"]["strict"]
    by_type = {name: result["entities"][name]["strict"] for name in types}
    return EntityScores(
        precision=float(whole.precision),
        recall=float(whole.recall),
        f1=float(whole.f1),
        of_type={name: (float(one.recall), float(one.f1)) for name, one in by_type.items()},
    )


def word_scores(found: Sequence[str], true: Sequence[str]) -> EntityScores:
    """The scores of words that stand each for itself. Over all, each wrong one is one too many and one too few."""
    from sklearn.metrics import precision_recall_fscore_support

    types = sorted({*found, *true})
    _, recalls, f1s, _ = precision_recall_fscore_support(true, found, labels=types, zero_division=0)
    share = sum(own == other for own, other in zip(found, true, strict=True)) / len(true)
    of_type = {name: (float(recall), float(f1)) for name, recall, f1 in zip(types, recalls, f1s, strict=True)}
    return EntityScores(share, share, share, of_type)


def _as_given(row: Sequence[Entity]) -> list[dict[str, Any]]:
    return [{"label": one.type, "start": one.start, "end": one.end - 1} for one in row]
