"""Whatever a user has (tables, json, parquet, folders and lists of files, hub ids) as one `datasets.Dataset`.

Differs from `datasets.load_dataset("csv")`. That reader (pandas) turns the text "NA" into a missing value, and drops or
shifts ragged rows. There a stray quote swallows the lines after it. Here every cell of a table stays the text it is,
ragged rows are counted and named, and a stray quote is an error.
"""

import codecs
import csv
import difflib
import gzip
import hashlib
import io
import os
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import datasets
from datasets import Dataset, DatasetDict, Features, LargeList, List, Value

from sidestep.data.conll import FORM as CONLL
from sidestep.data.conll import read_conll
from sidestep.data.json_files import FORM, read_json
from sidestep.data.media_files import read_folder, read_list
from sidestep.data.messages import DataError, DataWarning, listed
from sidestep.data.splits import chosen_split


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How a csv or tsv file is written.

    Attributes:
        columns: the columns' names, in order, for a file without header, or new names for those it has.
        header: whether the first line names the columns.
        quoting: whether a cell may stand in double quotes (False: a quote is a character like any other).
        encoding: a Python encoding name. A byte-order mark is skipped under utf-8.

    Raises:
        DataError: for an unknown encoding, or columns that are empty or named twice.
    """

    columns: tuple[str, ...] | None = None
    header: bool = True
    quoting: bool = True
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=self.encoding)  # a codec such as "hex" is known and reads no text
        except (LookupError, ValueError):
            raise DataError(
                f"encoding={self.encoding!r} is unknown: choose utf-8, latin-1, cp1252 or another of Python's"
            ) from None
        if self.columns is not None:
            _refuse_repeats(self.columns, "columns")


DEFAULTS = TableOptions()
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before utf-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte-order marks, and the encodings that they stand for."""
SNIFFED = 4096
"""Bytes of a file by which an encoding of two or four bytes a character is told."""
OFTEN = 0.02
"""Share of zero bytes above which there are letters, digits and line ends of two bytes."""
PLAIN = {"string_view": Value("string"), "binary_view": Value("binary")}
"""In whose place arrow's views of texts and bytes, as polars and others write them, are read."""


def read(source: str | Path, options: TableOptions = DEFAULTS, *, split: str = "train") -> Dataset:
    """The rows of a file, a folder or a hub id.

    Args:
        source: a .csv, .tsv, .json, .jsonl or .conll file (each may be .gz), or a .parquet file. Or a .txt file that
            lists images or sounds, one "path label" a line, or a folder of class folders of them. Both have the columns
            "image" (or "audio") and "label". Or a folder that `datasets` saved. Or a hub id, with a configuration after
            a colon where it has several ("nyu-mll/glue:rte").
        options: how a table is written. Its cells all stay text. `columns` renames the columns of the other formats
            too.
        split: which split of a hub id, of a saved folder, or of class folders in folders of splits. "val", "dev"
            and "valid" mean "validation". What has no splits is read whole.

    Returns:
        A dataset with at least one row.

    Raises:
        DataError: for what is missing, unreadable, empty, corrupt or in another encoding, and a split that is not
            there.

    Warns:
        DataWarning: if a split is read whose name only means the same, or files beside class folders are left out.
        DataWarning: with the line numbers of ragged rows. If a row has too many fields, the extra ones are dropped and
            the row is kept. If it has too few, the row is skipped.
    """
    if not str(source).strip():
        raise DataError("the name of the rows is empty: name a file, a folder or a hub id")
    path = Path(source).expanduser()
    if os.path.isdir(path):  # `Path.is_dir` raises where a name is too long
        rows = _folder(path, split)
    elif os.path.exists(path) or not _may_be_hub_id(source):
        rows = _file(path, options)
    else:
        rows = _hub(str(source), split)
    if len(rows) == 0:
        raise DataError(f"{source} holds no rows: at least one is needed")
    rows = _with_plain_types(rows)
    return rows if options.columns is None else _rename(rows, options.columns, source)


def check_column(rows: Dataset, name: str) -> None:
    """Refuses a column that does not exist, and suggests the closest one that does."""
    if name in rows.column_names:
        return
    close = difflib.get_close_matches(name.lower(), [column.lower() for column in rows.column_names], n=1)
    meant = [column for column in rows.column_names if column.lower() in close]
    hint = f" (did you mean {meant[0]!r}?)" if meant else ""
    raise DataError(f"there is no column {name!r}{hint}: the columns are {listed(rows.column_names, limit=30)}")


def _file(path: Path, options: TableOptions) -> Dataset:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    _check_readable(path)
    if suffix not in READERS:
        raise DataError(f"{path} ends in {suffix!r}: choose a file that ends in {', '.join(READERS)} (or .gz after it)")
    return READERS[suffix](path, options)


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the path (a relative one starts at {Path.cwd()})") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    if not first:
        raise DataError(f"{path} is empty: give a file with at least one row")


def _table(path: Path, options: TableOptions) -> Dataset:
    lines = _parse(path, options)
    if not lines:
        raise DataError(f"{path} is empty: give a file with at least one row")
    names = _names(path, lines, options.header)
    if options.header:
        lines = lines[1:]
    if not lines:
        raise DataError(f"{path} holds a header and no rows: if it has no header, say header=False (--no-header)")
    body = _square(path, lines, len(names))
    columns = {name: [cells[place] for cells in body] for place, name in enumerate(names)}
    return Dataset.from_dict(columns, features=Features({name: Value("string") for name in names}))


def _parse(path: Path, options: TableOptions) -> list[tuple[int, list[str]]]:
    """The cells of each row with the number of its first line, without blank lines at either end."""
    with _open(path, options.encoding) as file:
        lines = _cells(path, file, options)
    full = [place for place, (_, cells) in enumerate(lines) if cells]
    return lines[full[0] : full[-1] + 1] if full else []


@contextmanager
def _open(path: Path, encoding: str) -> Iterator[TextIO]:
    """The file as text, with the file's name in the error when reading fails."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rb") as file:
            encoding = _encoding(path, file.read(SNIFFED), encoding)
        with opened(path, "rt", encoding=encoding, newline="") as file:
            yield file
    except UnicodeError as error:
        at = (
            f"byte {error.object[error.start]:#04x}: {error.reason}" if isinstance(error, UnicodeDecodeError) else error
        )
        other = "utf-8" if _family(encoding) else "latin-1"
        raise DataError(
            f"{path} is not {encoding.removesuffix('-sig')} ({at}): give its encoding, most often {other} "
            f"(--encoding {other})"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): it may be cut short. Make or fetch it again") from error


def _encoding(path: Path, start: bytes, given: str) -> str:
    """The encoding to read a file with that begins so.

    A byte-order mark would become a part of the first name.
    """
    found = _wide_encoding(start)
    if found is None:
        return "utf-8-sig" if codecs.lookup(given).name == "utf-8" else given
    marked = found == _family(found)
    if not marked and _family(given) and codecs.lookup(given).name != _family(found):
        return given  # by name, down to the order of bytes or of another width: that is worth more than a guess
    if _family(given) != _family(found):
        raise DataError(f"{path} is not {given}, but {found}: give that as its encoding (--encoding {found})")
    return found


def _family(encoding: str) -> str | None:
    """ "utf-16" or "utf-32" of any byte order, or None for encodings with single bytes."""
    return next((family for family in ("utf-16", "utf-32") if codecs.lookup(encoding).name.startswith(family)), None)


def _wide_encoding(start: bytes) -> str | None:
    """The encoding of a file that begins so, if its characters have two or four bytes each."""
    for mark, encoding in MARKS.items():
        if start.startswith(mark):
            return encoding
    # without a mark: four bytes of a text in another encoding are hardly ever one character
    whole = start[: len(start) // 4 * 4]
    for encoding in ("utf-32-le", "utf-32-be"):
        with suppress(UnicodeError):
            return encoding if whole.decode(encoding) else None
    # and letters have zero bytes, which no text of single bytes holds
    zeros = [start[place::4].count(0) * 4 / max(len(start), 1) for place in range(4)]
    for order, places in (("le", zeros), ("be", zeros[::-1])):
        if min(places[1::2]) > OFTEN and sum(places[1::2]) > sum(places[::2]):
            return f"utf-16-{order}"
    return None


def _cells(path: Path, file: TextIO, options: TableOptions) -> list[tuple[int, list[str]]]:
    reader = csv.reader(
        file,
        delimiter=_delimiter(path, file),
        quoting=csv.QUOTE_MINIMAL if options.quoting else csv.QUOTE_NONE,
        strict=True,
    )
    limit = csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document
    lines, start = [], 1
    try:
        for cells in reader:
            lines.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {start}: {str(error).expandtabs(1)}. If quotes in this file are plain "
            "characters, say quoting=False (--no-quoting)"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return lines


def _delimiter(path: Path, file: TextIO) -> str:
    """A tab for .tsv, and for a .csv whose first lines all hold one, or else a comma."""
    if ".tsv" in path.suffixes[-2:]:
        return "\t"
    first = [line for _, line in zip(range(10), file, strict=False) if line.strip("\r\n")]
    file.seek(0)
    return "\t" if first and all("\t" in line for line in first) else ","


def _names(path: Path, lines: list[tuple[int, list[str]]], header: bool) -> list[str]:
    """The header, or column1, column2, ... for the number of fields that most rows have."""
    if not header:
        width = Counter(len(cells) for _, cells in lines).most_common(1)[0][0]
        return [f"column{place + 1}" for place in range(width)]
    names = [name or f"column{place + 1}" for place, name in enumerate(lines[0][1])]
    _refuse_repeats(names, f"the header of {path}")
    return names


def _refuse_repeats(names: Sequence[str], where: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated or not all(names):
        raise DataError(f"{where}: {listed(names)}. Every column needs a name of its own")
    if any("\0" in name for name in names):
        raise DataError(f"{where}: {listed(names)}. A name cannot hold a zero byte: give the file's encoding")


def _square(path: Path, lines: list[tuple[int, list[str]]], width: int) -> list[list[str]]:
    """The rows cut to the width, with a warning of what was cut or skipped."""
    more = [line for line, cells in lines if len(cells) > width]
    fewer = [line for line, cells in lines if len(cells) < width]
    # no row that fits: another delimiter, or a header without the name of the row index: nothing to guess
    if len(more) + len(fewer) == len(lines):
        raise DataError(
            f"{path}: the header names {width} columns, but no row has {width} fields "
            f"(line {lines[0][0]} has {len(lines[0][1])}). Check the header and "
            "the delimiter (.tsv for tabs, .csv for commas)"
        )
    parts = []
    if more:
        parts.append(f"{len(more)} with more than {width} fields, the extra ones dropped (lines {listed(more)})")
    if fewer:
        parts.append(f"{len(fewer)} with fewer than {width} fields, skipped (lines {listed(fewer)})")
    if parts:
        warnings.warn(f"{path}: of {len(lines)} rows, {'; '.join(parts)}", DataWarning, stacklevel=2)
    return [cells[:width] for _, cells in lines if len(cells) >= width]


def _json(path: Path, options: TableOptions) -> Dataset:
    with _open(path, options.encoding) as file:
        text = file.read()
    try:
        return read_json(text)
    except ValueError as error:
        raise _corrupt(path, FORM, error) from error


def _conll(path: Path, options: TableOptions) -> Dataset:
    with _open(path, options.encoding) as file:
        try:
            return read_conll(file)
        except ValueError as error:
            raise _corrupt(path, CONLL, error) from error


def _parquet(path: Path, _: TableOptions) -> Dataset:
    # `datasets` keeps what it read under the file's time, which a file may share with the one that it replaces
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        return Dataset.from_parquet(str(path), config_name=content)
    except Exception as error:  # the readers of `datasets` raise what they like
        raise _corrupt(path, "parquet", error) from error


def _with_plain_types(rows: Dataset) -> Dataset:
    """The rows with texts and bytes in the types that `datasets` and this package know: the cells are the same."""
    features = Features({name: _plain(feature) for name, feature in rows.features.items()})
    return rows if features == rows.features else rows.cast(features)


def _plain(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _plain(inner) for name, inner in feature.items()}
    if isinstance(feature, List):
        return List(_plain(feature.feature), length=feature.length)
    if isinstance(feature, LargeList):
        return LargeList(_plain(feature.feature))
    return PLAIN.get(feature.dtype, feature) if isinstance(feature, Value) else feature


def _list(path: Path, options: TableOptions) -> Dataset:
    with _open(path, options.encoding) as file:
        return read_list(path, file)


def _corrupt(path: Path, form: str, error: Exception) -> DataError:
    reason = error.__cause__ or error
    return DataError(f"{path} cannot be read as {form} ({type(reason).__name__}: {reason}): make or fetch it again")


READERS: dict[str, Callable[[Path, TableOptions], Dataset]] = {
    ".csv": _table,
    ".tsv": _table,
    ".json": _json,
    ".jsonl": _json,
    ".conll": _conll,
    ".parquet": _parquet,
    ".txt": _list,
}


def _folder(path: Path, split: str) -> Dataset:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path, split)
    return read_folder(path, split, lambda file: _file(file, DEFAULTS))


def _saved(path: Path, split: str) -> Dataset:
    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path} cannot be read as a saved dataset ({error}): save it again") from error
    return rows[chosen_split(rows, split, path)] if isinstance(rows, DatasetDict) else rows


def _may_be_hub_id(source: str | Path) -> bool:
    text = str(source)
    known = any(text.lower().removesuffix(".gz").endswith(suffix) for suffix in READERS)
    return isinstance(source, str) and not known and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", text) is not None


def _hub(source: str, split: str) -> Dataset:
    name, _, configuration = source.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:
        names = _hub_splits(name, configuration) if isinstance(error, ValueError) else []
        if names and split not in names:
            return _hub(source, chosen_split(names, split, source))
        raise DataError(
            f"{source!r} is no file or folder here, and looking it up on the Hugging Face hub failed "
            f"({type(error).__name__}: {error}). Check the path, or the hub id, its split {split!r} "
            "and the network"
        ) from error


def _hub_splits(name: str, configuration: str) -> list[str]:
    """The splits of a hub id, or an empty list if they cannot be looked up."""
    try:
        return datasets.get_dataset_split_names(name, configuration or None)
    except Exception:  # the first error says more
        return []


def _rename(rows: Dataset, columns: tuple[str, ...], source: str | Path) -> Dataset:
    if len(columns) != len(rows.column_names):
        raise DataError(
            f"columns names {len(columns)} columns ({listed(columns)}), but {source} has "
            f"{len(rows.column_names)}: name each of them"
        )
    return rows.rename_columns(dict(zip(rows.column_names, columns, strict=True)))
