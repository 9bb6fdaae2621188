"""Images, sounds or videos in files: a folder of class folders, or a list of paths with labels as VTAB-1K has them."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, Features, Value

from sidestep.data.images import IMAGES
from sidestep.data.media import Medium, undecoded
from sidestep.data.messages import DataError, DataWarning, listed
from sidestep.data.sounds import SOUNDS
from sidestep.data.splits import chosen_split, is_split_name
from sidestep.data.videos import VIDEOS

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NAMING = "file_name"
"""The column of a metadata file that names the images, sounds or videos, relative to its folder."""
ALLOWED = (
    "give a folder with one folder of images, sounds or videos per class (archives are not opened), a folder that "
    "datasets.save_to_disk made, or a file"
)
MEDIA = (IMAGES, SOUNDS, VIDEOS)


def read_list(path: Path, lines: Iterable[str]) -> Dataset:
    """The files that a list names, in columns "image" (or "audio", "video") and "label".

    Args:
        path: of the list. The files' paths are relative to its folder.
        lines: each a path and a label, the last word of the line. Blank lines are passed over.

    Raises:
        DataError: for an empty list, a line without a label, files that are not there.
    """
    rows = [(number, line.strip().rsplit(maxsplit=1)) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} is empty: give a list with one 'path label' a line")
    short = [number for number, parts in rows if len(parts) < 2]
    if short:
        raise DataError(
            f"{path} has no label in {len(short)} of {len(rows)} lines (line {listed(short)}): a .txt file lists "
            "images, sounds or videos, one 'path label' a line"
        )
    folder = path.parent
    files = {name: folder / name for _, (name, _) in rows}
    medium = _prevailing(files.values())
    missing = [name for name, file in files.items() if not os.path.isfile(file)]
    if missing:
        raise DataError(
            f"{path} names {len(missing)} of {len(files)} {medium.name}s that are not there: {listed(missing)}, looked "
            f"for in {folder.resolve()}: the paths of a list are relative to its folder"
        )
    columns = {medium.field: [str(files[name]) for _, (name, _) in rows], "label": [label for _, (_, label) in rows]}
    return Dataset.from_dict(columns).cast_column(medium.field, medium.feature)


def read_folder(path: Path, split: str, table: Callable[[Path], Dataset]) -> Dataset:
    """The files of class folders, in columns "image" (or "audio", "video") and "label".

    A folder is a class with all that lies below it. Files that lie in no class folder have no "label". A file
    "metadata.csv" (or .jsonl, .parquet) gives the columns in the place of the folders: its "file_name" names the image,
    the sound or the video. Where there are several sorts, the most numerous are read.

    Args:
        path: of the class folders, or of folders of splits that hold them.
        split: which split is read, if there are splits.
        table: reads a metadata file.

    Raises:
        DataError: if there is no file to read, none in one of the class folders, or no such split.

    Warns:
        DataWarning: if a split of another name is read. Also if files are left out, because they lie beside class
            folders, no metadata file names them, or there are more of the other sort.
    """
    root = path.resolve()
    while not (splits := _splits(root, split)) and (inner := _wrapped(root)):
        root = inner
    if splits:
        root = (root / chosen_split(splits, split, root)).resolve()
        while inner := _wrapped(root):
            root = inner
    files = sorted(_files(root), key=str)
    medium = _prevailing(files)
    found = [file for file in files if medium.names(file)]
    _warn_of_others(root, medium, files)
    if metadata := [file for file in files if file.name in METADATA]:
        rows = _with_metadata(root, medium, metadata, table)
        _warn_of_unnamed(root, medium, found, rows)
        return rows
    if not found:
        raise DataError(f"{path} holds no images, no sounds and no videos: {ALLOWED}")
    _refuse_empty_classes(root, medium, found)
    return _labelled(root, medium, found)


def _splits(path: Path, wanted: str) -> list[str]:
    """The folders that are splits, or an empty list where the folders are classes.

    A class may be called "train", so a name alone makes no split. There are splits if a folder of such a name holds
    class folders or a metadata file, or if no folder has another name.
    """
    folders = {child.name: child for child in _folders(path)}
    candidates = [folder for name, folder in folders.items() if name == wanted or is_split_name(name)]
    if not any(_holds_classes(folder) or _has_metadata(folder) for folder in candidates):
        flat = all(map(is_split_name, folders)) and not _has_metadata(path)
        if not (flat and any(_is_used(folder) for folder in folders.values())):
            return []
    return [name for name, folder in folders.items() if _is_used(folder)]


def _folders(path: Path) -> list[Path]:
    return [child for child in sorted(path.iterdir()) if child.is_dir() and _is_visible(child.name)]


def _files(path: Path) -> Iterator[Path]:
    """All files below a folder, without following links to folders, and without hidden names."""
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(filter(_is_visible, inner))
        yield from (Path(folder, name) for name in names if _is_visible(name))


def _is_visible(name: str) -> bool:
    return not name.startswith((".", "__"))  # `datasets` passes over the same ones


def _is_read(file: Path) -> bool:
    return any(medium.names(file) for medium in MEDIA)


def _prevailing(files: Iterable[Path]) -> Medium:
    """What most of the files are. Of sorts of which there are as many, the first of `MEDIA`."""
    counts = Counter(medium.name for file in files for medium in MEDIA if medium.names(file))
    return max(MEDIA, key=lambda medium: counts[medium.name])


def _warn_of_others(root: Path, medium: Medium, files: Iterable[Path]) -> None:
    others = [file for file in files if _is_read(file) and not medium.names(file)]
    if others:
        warnings.warn(
            f"{root}: {len(others)} files are no {medium.name}s, as most are, and were left out: "
            f"{listed(str(file.relative_to(root)) for file in others)}",
            DataWarning,
            stacklevel=4,
        )


def _is_used(folder: Path) -> bool:
    return any(_is_read(file) or file.name in METADATA for file in _files(folder))


def _holds_classes(folder: Path) -> bool:
    return any(_is_read(file) and file.parent != folder for file in _files(folder))


def _has_metadata(folder: Path) -> bool:
    return any((folder / name).is_file() for name in METADATA)


def _with_metadata(root: Path, medium: Medium, files: Iterable[Path], read: Callable[[Path], Dataset]) -> Dataset:
    """The rows of metadata files, each with its "file_name" as a file, where the name begins at the table's folder."""
    tables = [_with_files(file, medium, read(file)) for file in files]
    if any(table.features != tables[0].features for table in tables):
        raise DataError(
            f"the metadata files of {root} have different columns ({listed(tables[0].column_names)} and others): give "
            "them the same ones, of the same types"
        )
    return datasets.concatenate_datasets(tables)


def _warn_of_unnamed(root: Path, medium: Medium, files: Sequence[Path], rows: Dataset) -> None:
    cells = undecoded(rows, medium.field)[medium.field]
    named = {os.path.abspath(cell["path"]) for cell in cells}
    unnamed = [file for file in files if str(file) not in named]
    if unnamed:
        warnings.warn(
            f"{root}: {len(unnamed)} of {len(files)} {medium.name}s stand in no metadata file and were left out: "
            f"{listed(str(file.relative_to(root)) for file in unnamed)}",
            DataWarning,
            stacklevel=5,
        )


def _with_files(table: Path, medium: Medium, rows: Dataset) -> Dataset:
    if rows.features.get(NAMING) not in (Value("string"), Value("large_string")):
        raise DataError(
            f"{table} has no column {NAMING!r} of texts, but {listed(rows.column_names)}: name each {medium.name} there"
        )
    others = [name for name in rows.column_names if name != NAMING]
    field = medium.field
    if field in others:
        raise DataError(
            f"{table} has columns {NAMING!r} and {field!r}: rename the second, as the {medium.name}s get that name"
        )
    paths = [None if name is None else str(table.parent / name) for name in rows[NAMING][:]]
    missing = [path for path in paths if path is None or not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"{table} names {len(missing)} of {len(paths)} {medium.name}s that are not there: {listed(missing)}"
        )
    return (
        rows.remove_columns(NAMING)
        .add_column(field, paths)
        .cast_column(field, medium.feature)
        .select_columns([field, *others])
    )


def _wrapped(root: Path) -> Path | None:
    """The only folder in a folder, if that holds nothing but folders in its turn: it is no class."""
    folders = _folders(root)
    if len(folders) != 1 or folders[0].is_symlink() or not _holds_classes(folders[0]):
        return None
    beside = [child for folder in (root, folders[0]) for child in folder.iterdir() if child.is_file()]
    return None if any(_is_read(file) or file.name in METADATA for file in beside) else folders[0]


def _labelled(root: Path, medium: Medium, files: list[Path]) -> Dataset:
    field = medium.field
    loose = [file for file in files if file.parent == root]
    names = {file: file.relative_to(root).parts[0] for file in files if file.parent != root}
    classes = sorted(set(names.values()))
    if loose and len(classes) < 2:  # so few classes are none
        return Dataset.from_dict({field: list(map(str, files))}).cast_column(field, medium.feature)
    if loose:
        warnings.warn(
            f"{root}: {len(loose)} of {len(files)} {medium.name}s lie beside the {len(classes)} class folders, in none "
            f"of them, and were left out: {listed(file.name for file in loose)}",
            DataWarning,
            stacklevel=5,
        )
    numbers = {name: number for number, name in enumerate(classes)}
    columns = {field: list(map(str, names)), "label": [numbers[name] for name in names.values()]}
    features = Features({field: Value("string"), "label": ClassLabel(names=classes)})
    return Dataset.from_dict(columns, features=features).cast_column(field, medium.feature)


def _refuse_empty_classes(root: Path, medium: Medium, files: Sequence[Path]) -> None:
    filled = {file.relative_to(root).parts[0] for file in files}
    classes = [folder.name for folder in _folders(root)]
    empty = [name for name in classes if name not in filled]
    if empty and len(empty) < len(classes):
        raise DataError(
            f"{root} has {len(empty)} of {len(classes)} class folders without {medium.name}s: {listed(empty)}: put "
            f"{medium.name}s there (links to folders are not followed), or remove the folder"
        )
