"""Labels as numbers: which classes there are, each row's number, and a held-out part with the same shares."""

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, LargeList, List
from sklearn.model_selection import GroupShuffleSplit, train_test_split

from sidestep.data.messages import NAMED, DataError, DataWarning, listed, named_rows
from sidestep.data.tables import check_column
from sidestep.messages import some
from sidestep.metrics import IGNORED, METRICS, WRITTEN, Kind

KINDS = tuple(METRICS)
SEPARATOR = "|"
"""Between the labels of one cell of text; a comma would need quotes in a csv file."""


@dataclass(frozen=True)
class LabelSpace:
    """What a task predicts.

    Attributes:
        kind: one class of several, any number of them, a number, or a text that the model writes.
        names: the classes, in the order of the outputs. It is empty for a number or a text.
        unanswerable: of answers that stand in texts, whether a question may have none.
    """

    kind: Kind
    names: tuple[str, ...]
    unanswerable: bool = False

    @property
    def outputs(self) -> int:
        """Width of the head: one output per class, one for a number (no head for a text)."""
        return len(self.names) or 1

    def stored(self) -> dict[str, Any]:
        """What a task stores of it, as JSON-ready values."""
        return {"problem": self.kind, "labels": list(self.names)}

    def encode(self, rows: Dataset, label_column: str) -> list[Any]:
        """Each row's target: an int (single), 0.0 or 1.0 per class (multi), a float (regress) or a text (written).

        Classes are compared by name, so a dev file may number its labels otherwise or be of another format.

        Raises:
            DataError: for missing or unusable labels and for labels that training never had. It names the rows.
        """
        if self.kind == "regress":
            return _numbers(rows, label_column)
        if self.kind in WRITTEN:
            return target_texts(rows, label_column)
        if self.kind == "single":
            names = class_of_each(rows, label_column)
            index = self._index([[name] for name in names], label_column)
            return [index[name] for name in names]
        cells = _multi(rows, label_column)
        self._index(cells, label_column)
        return [[float(name in cell) for name in self.names] for cell in map(set, cells)]

    def _index(self, cells: Sequence[Sequence[str]], label_column: str) -> dict[str, int]:
        index = {name: place for place, name in enumerate(self.names)}
        unknown = [row for row, cell in enumerate(cells) if not index.keys() >= set(cell)]
        if unknown:
            names = _sorted({name for row in unknown for name in cells[row]} - index.keys())
            raise DataError(
                f"column {label_column!r} holds labels that training never had: {listed(names)}, in "
                f"{named_rows(unknown)}. Training had {listed(self.names, limit=20)}: correct or drop these "
                "rows, or train with all labels"
            )
        return index


def label_space(rows: Dataset, label_column: str, kind: Kind) -> LabelSpace:
    """The classes of the training rows.

    Names of a `ClassLabel` column keep their order. Others are sorted, as numbers if all are whole numbers. For kind
    "multi" a cell is a list of labels, or text with "|" between them (empty: none).

    Raises:
        DataError: for an unknown kind, a missing label, fewer than 2 classes, a target that is not finite, and as
            `target_texts`.

    Warns:
        DataWarning: if classes differ by spaces or case only, with their names.
    """
    if kind not in KINDS:
        raise DataError(f"kind={kind!r}: choose {listed(KINDS)}")
    if kind == "regress":
        _numbers(rows, label_column)
        return LabelSpace("regress", ())
    if kind in WRITTEN:
        target_texts(rows, label_column)
        return LabelSpace(kind, ())
    cells = _multi(rows, label_column) if kind == "multi" else [[name] for name in class_of_each(rows, label_column)]
    feature = _element(rows, label_column)
    names = feature.names if isinstance(feature, ClassLabel) else _sorted({name for cell in cells for name in cell})
    if len(names) < 2:
        raise DataError(
            f"column {label_column!r} holds {len(names)} class ({listed(names)}) in {len(cells)} rows: "
            "a classifier needs at least 2"
        )
    _warn_of_variants(names, label_column)
    return LabelSpace(kind, tuple(names))


def _warn_of_variants(names: Sequence[str], label_column: str) -> None:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups["".join(name.split()).casefold()].append(name)
    alike = [group for group in groups.values() if len(group) > 1]
    if alike:
        warnings.warn(
            f"column {label_column!r} holds labels that differ by spaces or upper and lower case only: "
            f"{some((' and '.join(map(repr, group)) for group in alike), NAMED)}. They are classes of their own. Write "
            "them alike if they mean the same",
            DataWarning,
            stacklevel=3,
        )


def class_of_each(rows: Dataset, column: str) -> list[str]:
    """Each row's class name.

    Raises:
        DataError: for lists of labels, and missing ones.
    """
    check_column(rows, column)
    if isinstance(rows.features[column], List | LargeList):
        raise DataError(f"column {column!r} holds lists of labels: choose kind 'multi' (several labels a row)")
    feature = _element(rows, column)
    names = [_name(cell, feature) for cell in _cells(rows, column)]
    _refuse_missing(column, [row for row, name in enumerate(names) if not name], len(names))
    return [name for name in names if name]


def target_texts(rows: Dataset, column: str) -> list[str]:
    """Each row's target as a text, which in a `ClassLabel` column is the class's name.

    Raises:
        DataError: for lists, numbers (by type, or text that is a number in every row), missing and empty texts. It
            names the rows.
    """
    check_column(rows, column)
    feature, cells = rows.features[column], _cells(rows, column)
    if isinstance(feature, List | LargeList):
        raise DataError(f"column {column!r} holds lists: a text to write is one text a row")
    if isinstance(feature, ClassLabel):
        return class_of_each(rows, column)
    _refuse_missing(column, [row for row, cell in enumerate(cells) if cell is None], len(cells))
    empty = [row for row, cell in enumerate(cells) if isinstance(cell, str) and not cell.strip()]
    if empty:
        raise DataError(
            f"column {column!r} has an empty text in {len(empty)} of {len(cells)} rows, {named_rows(empty)}: there is "
            "nothing to learn to write. Fill or drop these rows"
        )
    if not all(isinstance(cell, str) for cell in cells) or all(_finite(cell) is not None for cell in cells):
        raise DataError(
            f"column {column!r} holds labels that are no text ({listed(dict.fromkeys(cells), limit=3)}). Write words "
            "in their place (such as negative and positive for 0 and 1), or choose --kind single or "
            "regress. If numbers are what the model should write, put a word before them"
        )
    return cells


def holdout(rows: Dataset, label_column: str | None, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """The rows in two parts, `(train, dev)`, each in the order of the file, the same for the same seed.

    Where the labels are classes, both parts have the same shares of each. A class of a single row stays in train.
    Numbers that are not all whole, lists and texts with "|" are no classes: the split is random then.

    Args:
        rows: at least two.
        label_column: None for a random split.
        fraction: dev's share, between 0 and 1.
        seed: of the permutation.

    Raises:
        DataError: if the fraction is out of range, or gives a part fewer rows than there are classes.
    """
    if not 0 < fraction < 1:
        raise DataError(f"fraction={fraction}: choose a share between 0 and 1, for example 0.1")
    classes = None if label_column is None else _strata(rows, label_column)
    counts = Counter(classes)
    pool = [row for row in range(len(rows)) if classes is None or counts[classes[row]] > 1]
    try:
        train, dev = train_test_split(
            pool,
            test_size=fraction,
            random_state=seed,
            stratify=None if classes is None else [classes[row] for row in pool],
        )
    except ValueError as error:
        raise DataError(
            f"fraction={fraction} cannot divide {len(rows)} rows, {len(counts)} classes ({error}): "
            "choose another fraction, or give a dev file"
        ) from error
    train = sorted(set(range(len(rows))) - set(dev))
    return rows.select(train), rows.select(sorted(dev))


def holdout_whole(rows: Dataset, column: str, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """As `holdout`, but rows with the same cell in a column are in the same part. The share is one of such cells.

    Raises:
        DataError: if the fraction is out of range, or a part would have no row.
    """
    if not 0 < fraction < 1:
        raise DataError(f"fraction={fraction}: choose a share between 0 and 1, for example 0.1")
    cells = _cells(rows, column)
    try:
        split = GroupShuffleSplit(n_splits=1, test_size=fraction, random_state=seed)
        train, dev = next(split.split(cells, groups=cells))
    except ValueError as error:
        raise DataError(
            f"fraction={fraction} cannot divide {len(rows)} rows with {len(set(cells))} different cells in {column!r}, "
            f"which are to stay whole ({error}): choose another fraction, or give a dev file"
        ) from error
    return rows.select(sorted(train)), rows.select(sorted(dev))


def _strata(rows: Dataset, column: str) -> list[str] | None:
    """Each row's class, or None where the labels are no classes (as lists, or numbers that are not all whole)."""
    feature = _element(rows, column)
    if isinstance(rows.features[column], List | LargeList):
        return None
    names = [_name(cell, feature) or "" for cell in _cells(rows, column)]
    if isinstance(feature, ClassLabel):
        return names
    numbers = [_finite(name) for name in names]
    measured = all(number is not None for number in numbers) and not all(map(_is_whole, names))
    return None if measured or any(SEPARATOR in name for name in names) else names


def _multi(rows: Dataset, column: str) -> list[list[str]]:
    """Each row's class names."""
    check_column(rows, column)
    feature, cells = _element(rows, column), _cells(rows, column)
    _refuse_missing(column, [row for row, cell in enumerate(cells) if cell is None], len(cells))
    split = [_split(cell) for cell in cells]
    names = [[_name(item, feature) or "" for item in items] for items in split]
    _refuse_missing(column, [row for row, cell in enumerate(names) if not all(cell)], len(cells))
    repeated = [row for row, cell in enumerate(names) if len(set(cell)) < len(cell)]
    if repeated:
        raise DataError(
            f"column {column!r} names a label twice in {named_rows(repeated)}: give each row the list of its "
            "labels' names (not a 0 or 1 for every class)"
        )
    return names


def _split(cell: Any) -> list[Any]:
    if isinstance(cell, str):
        return [part.strip() for part in cell.split(SEPARATOR)] if cell.strip() else []
    return cell if isinstance(cell, list) else [cell]


def _numbers(rows: Dataset, column: str) -> list[float]:
    """Each row's target."""
    check_column(rows, column)
    cells = _cells(rows, column)
    numbers = [_finite(cell) for cell in cells]
    bad = [row for row, number in enumerate(numbers) if number is None]
    if bad:
        raise DataError(
            f"column {column!r} holds targets that are no finite numbers: "
            f"{listed(cells[row] for row in bad)}, in {named_rows(bad)}: "
            "correct or drop these rows, or choose kind 'single' if they are classes"
        )
    return [number for number in numbers if number is not None]


def _finite(cell: Any) -> float | None:
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _cells(rows: Dataset, column: str) -> list[Any]:
    return rows.with_format(None)[column][:]


def _element(rows: Dataset, column: str) -> Any:
    """The feature of one label: of the column, or of the lists in it."""
    check_column(rows, column)
    feature = rows.features[column]
    return feature.feature if isinstance(feature, List | LargeList) else feature


def _name(cell: Any, feature: Any) -> str | None:
    """A label's name, or None where it is missing.

    The hub marks rows without a label by -1, and transformers those that the loss leaves out by -100.
    """
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if not isinstance(cell, str) and cell == IGNORED:
        return None
    if isinstance(feature, ClassLabel):
        return feature.int2str(cell) if cell >= 0 else None
    # a column of whole numbers with a gap comes out of pandas as floats
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell)


def _refuse_missing(column: str, missing: list[int], count: int) -> None:
    if missing:
        raise DataError(
            f"column {column!r} has no label in {len(missing)} of {count} rows, {named_rows(missing)}: "
            "label or drop these rows"
        )


def _is_whole(name: str) -> bool:
    digits = name.removeprefix("-")
    return digits.isascii() and digits.isdecimal()


def _sorted(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (int(name), name)) if all(map(_is_whole, names)) else sorted(names)
