"""Columns of files, of images, sounds and videos: cells with "bytes" or a "path", named where they cannot be read."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow.compute as pc
from datasets import Dataset, Image, LargeList, List, Value

from sidestep.data.messages import DataError, DataWarning, listed, named_rows

TEXT_TYPES = ("string", "large_string")

Make: TypeAlias = Callable[[Iterable[Any], list[int | None]], Mapping[str, Any]]
"""Gives columns of decoded files, which are decoded as they are asked for, and of the numbers of their rows."""


@dataclass(frozen=True, kw_only=True)
class Medium:
    """What files of one sort are called, and how one is opened.

    Attributes:
        name: of one of them.
        field: of `Fields`. Folders and lists of such files have a column of this name.
        feature: of `datasets`, that a column of them gets.
        extensions: of their names, in lower case.
        opened: gives what a processor reads, from the "bytes" or the "path" of a cell.
        errors: that `opened` raises for what it cannot read.
        is_there: whether a path is of such a file. A video may be a folder.
    """

    name: str
    field: Literal["image", "audio", "video"]
    feature: Any
    extensions: frozenset[str]
    opened: Callable[[dict[str, Any]], Any]
    errors: tuple[type[Exception], ...] = (OSError, ValueError)
    is_there: Callable[[str], bool] = os.path.isfile

    def names(self, file: str | Path) -> bool:
        """Whether a file has the name of such a file."""
        return Path(file).suffix.lower() in self.extensions

    def holds(self, feature: Any) -> bool:
        """Whether a column with this feature of `datasets` holds such files."""
        return isinstance(feature, type(self.feature))

    def check(self, rows: Dataset, column: str) -> None:
        """Refuses a column that holds something else, or nothing in some rows.

        Raises:
            DataError: naming the column, and rows that hold nothing.
        """
        feature = rows.features[column]
        if isinstance(feature, List | LargeList):
            raise DataError(
                f"column {column!r} holds lists, and a row is read with one {self.name}: give each row one of them"
            )
        if not self.holds(feature) and not (isinstance(feature, Value) and feature.dtype in TEXT_TYPES):
            raise DataError(f"column {column!r} holds {feature}, not {self.name}s or paths of {self.name}s")
        cells = rows.select_columns([column]).with_format("arrow")[:].column(column)
        missing = [index for index, valid in enumerate(cells.is_valid().to_pylist()) if not valid]
        if missing:
            raise DataError(
                f"{self.name} column {column!r} has no {self.name} in {named_rows(missing)}: drop these rows"
            )

    def decode(self, cell: dict[str, Any], row: int | None) -> Any:
        """What a processor reads of a file.

        Args:
            cell: "bytes" or "path" of it.
            row: its number, from 1, or None if it is not known.

        Raises:
            DataError: if it cannot be read, with its file or row.
        """
        try:
            return self.opened(cell)
        except self.errors as error:
            place = " in ".join([repr(cell["path"])] * bool(cell["path"]) + [f"row {row}"] * bool(row))
            raise DataError(
                f"{self.name} {place or '(no path)'} cannot be read ({error}): replace or drop it, or leave out all "
                "such with --skip-bad-files"
            ) from error

    def drop_unreadable(self, rows: Dataset, column: str, what: str = "rows") -> Dataset:
        """The rows whose files can be read.

        Each file is decoded once to find out.

        Args:
            rows: with a column of such files, or of their paths.
            column: its name.
            what: the rows, as a warning calls them.

        Raises:
            DataError: if no file can be read.

        Warns:
            DataWarning: if some cannot, with their count and the first of them.
        """
        good, bad = [], []
        for place, cell in enumerate(undecoded(rows, column)[column]):
            try:
                self.decode(cell, place + 1)
                good.append(place)
            except DataError:
                bad.append(name_of(cell, place))
        if not good:
            raise DataError(
                f"none of {len(rows)} {self.name}s of the {what} can be read: {listed(bad)}: check the files"
            )
        if not bad:
            return rows
        warnings.warn(
            f"{len(bad)} of {len(rows)} {self.name}s of the {what} cannot be read and were left out: {listed(bad)}",
            DataWarning,
            stacklevel=2,
        )
        return rows.select(good)

    def refuse_absent(self, rows: Dataset, column: str) -> None:
        """Refuses files that are not there or hold nothing, which costs no decoding.

        Raises:
            DataError: naming the first of them.
        """
        bad = [path for path in _local_paths(rows, column) if not (self.is_there(path) and _holds_something(path))]
        if bad:
            raise DataError(
                f"{len(bad)} of {len(rows)} {self.name}s of column {column!r} are not there or empty (0 bytes): "
                f"{listed(bad)}. Replace or drop them, or leave out all such with --skip-bad-files"
            )

    def decoded(
        self,
        rows: Dataset,
        column: str,
        name: str,
        make: Make,
        labels: Sequence[Any] | None,
    ) -> Dataset:
        """The rows with files that are decoded when they are read.

        Args:
            rows: with a column of such files, or of their paths.
            column: its name.
            name: of what a backbone reads. The undecoded file has it too, so that it is kept where columns that a
                backbone does not read are removed.
            make: see `Make`.
            labels: of the rows.

        Raises:
            DataError: if files are not there or empty. When a row is read, also for one that cannot be read.
        """
        self.refuse_absent(rows, column)
        files = numbered(rows, column, name)
        if labels is not None:
            files = files.add_column("labels", labels)
        return files.with_transform(Decode(self, name, make))


@dataclass(frozen=True)
class Decode:
    """Rows whose undecoded file has this name, with what is made of it, and of its row's number, in its place."""

    medium: Medium
    name: str
    make: Make

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        """The batch with what was made.

        Raises:
            DataError: for a file that cannot be read.
        """
        out: dict[str, Any] = {name: cells for name, cells in batch.items() if name not in (self.name, "row")}
        if self.name in batch:
            cells = batch[self.name]
            # the Trainer's column removal takes the row numbers away
            rows = batch.get("row", [None] * len(cells))
            # one after the other: the decoded files of a batch may not all fit into memory
            out |= self.make((self.medium.decode(cell, row) for cell, row in zip(cells, rows, strict=True)), rows)
        return out


def undecoded(rows: Dataset, column: str, *others: str) -> Dataset:
    """That column as "bytes" and "path", and other columns beside it."""
    # `datasets` stores sounds as it stores images
    return rows.with_format(None).select_columns([column, *others]).cast_column(column, Image(decode=False))


def numbered(rows: Dataset, column: str, name: str) -> Dataset:
    """The undecoded files of a column under another name, with the numbers of their "row" from 1."""
    files = undecoded(rows, column)
    if column != name:
        files = files.rename_column(column, name)
    return files.add_column("row", list(range(1, len(rows) + 1)))


def is_local(path: str | None) -> bool:
    """Whether it is a file.

    `datasets` itself reads what is in a store.
    """
    return path is not None and "://" not in path


def name_of(cell: dict[str, Any], place: int) -> str:
    """What a message calls a file: its path, or else its row by its place from 0."""
    return cell["path"] or f"row {place + 1}"


def _local_paths(rows: Dataset, column: str) -> Iterator[str]:
    """The files that are not in the rows themselves."""
    # batch by batch: taken whole, the bytes of files would fill the memory
    for table in undecoded(rows, column).with_format("arrow").iter(batch_size=1000):
        cells = table.column(column)
        outside = pc.struct_field(cells, "path").filter(pc.struct_field(cells, "bytes").is_null())
        yield from filter(is_local, outside.to_pylist())


def _holds_something(path: str) -> bool:
    try:
        return os.path.isdir(path) or os.stat(path).st_size > 0
    except OSError:
        return False
