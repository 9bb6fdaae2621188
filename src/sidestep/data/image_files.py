"""Images in files: a folder of class folders, or a list of paths with labels as VTAB-1K has them."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from sidestep.data.messages import DataError, DataWarning, listed
from sidestep.data.splits import chosen_split, is_split_name

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NAMING = "file_name"
"""The column of a metadata file that names the images, relative to its folder."""
ALLOWED = (
    "give a folder with one folder of images per class (archives are not opened), a folder that "
    "datasets.save_to_disk made, or a file"
)
LISTED = Features({"image": Image(), "label": Value("string")})


def read_list(path: Path, lines: Iterable[str]) -> Dataset:
    """The images that a list names, in columns "image" and "label".

    Args:
        path: of the list. The images' paths are relative to its folder.
        lines: each a path and a label, the last word of the line. Blank lines are passed over.

    Raises:
        DataError: for an empty list, a line without a label, images that are not there.
    """
    rows = [(number, line.strip().rsplit(maxsplit=1)) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} is empty: give a list with one 'path label' a line")
    short = [number for number, parts in rows if len(parts) < 2]
    if short:
        raise DataError(
            f"{path} has no label in {len(short)} of {len(rows)} lines (line {listed(short)}): a .txt file is a list "
            "of images, one 'path label' a line"
        )
    folder = path.parent
    files = {name: folder / name for _, (name, _) in rows}
    missing = [name for name, file in files.items() if not os.path.isfile(file)]
    if missing:
        raise DataError(
            f"{path} names {len(missing)} of {len(files)} images that are not there: {listed(missing)}, looked for in "
            f"{folder.resolve()}: the paths of a list are relative to its folder"
        )
    columns = {"image": [str(files[name]) for _, (name, _) in rows], "label": [label for _, (_, label) in rows]}
    return Dataset.from_dict(columns, features=LISTED)


def read_folder(path: Path, split: str, table: Callable[[Path], Dataset]) -> Dataset:
    """The images of class folders, in columns "image" and "label".

    A folder is a class with all that lies below it. Images that lie in no class folder have no "label". A file
    "metadata.csv" (or .jsonl, .parquet) gives the columns in the place of the folders: its "file_name" names the image.

    Args:
        path: of the class folders, or of folders of splits that hold them.
        split: which split is read, if there are splits.
        table: reads a metadata file.

    Raises:
        DataError: if there is no image, none in one of the class folders, or no such split.

    Warns:
        DataWarning: if a split of another name is read. Also if images are left out, because they lie beside class
            folders or no metadata file names them.
    """
    root = path.resolve()
    while not (splits := _splits(root, split)) and (inner := _wrapped(root)):
        root = inner
    if splits:
        root = (root / chosen_split(splits, split, root)).resolve()
        while inner := _wrapped(root):
            root = inner
    files = sorted(_files(root), key=str)
    images = [file for file in files if _is_image(file)]
    if metadata := [file for file in files if file.name in METADATA]:
        rows = _with_metadata(root, metadata, table)
        _warn_of_unnamed(root, images, rows)
        return rows
    if not images:
        raise DataError(f"{path} holds no images: {ALLOWED}")
    _refuse_empty_classes(root, images)
    return _labelled(root, images)


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


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in ImageFolder.EXTENSIONS


def _is_used(folder: Path) -> bool:
    return any(_is_image(file) or file.name in METADATA for file in _files(folder))


def _holds_classes(folder: Path) -> bool:
    return any(_is_image(file) and file.parent != folder for file in _files(folder))


def _has_metadata(folder: Path) -> bool:
    return any((folder / name).is_file() for name in METADATA)


def _with_metadata(root: Path, files: Iterable[Path], read: Callable[[Path], Dataset]) -> Dataset:
    """The rows of metadata files, each with its "file_name" as an image, where the name begins at the file's folder."""
    tables = [_with_images(file, read(file)) for file in files]
    if any(table.features != tables[0].features for table in tables):
        raise DataError(
            f"the metadata files of {root} have different columns ({listed(tables[0].column_names)} and others): give "
            "them the same ones, of the same types"
        )
    return datasets.concatenate_datasets(tables)


def _warn_of_unnamed(root: Path, images: Sequence[Path], rows: Dataset) -> None:
    cells = rows.select_columns("image").cast_column("image", Image(decode=False))["image"]
    named = {os.path.abspath(cell["path"]) for cell in cells}
    unnamed = [image for image in images if str(image) not in named]
    if unnamed:
        warnings.warn(
            f"{root}: {len(unnamed)} of {len(images)} images stand in no metadata file and were left out: "
            f"{listed(str(image.relative_to(root)) for image in unnamed)}",
            DataWarning,
            stacklevel=5,
        )


def _with_images(file: Path, rows: Dataset) -> Dataset:
    if rows.features.get(NAMING) not in (Value("string"), Value("large_string")):
        raise DataError(
            f"{file} has no column {NAMING!r} of texts, but {listed(rows.column_names)}: name each image there"
        )
    others = [name for name in rows.column_names if name != NAMING]
    if "image" in others:
        raise DataError(f"{file} has columns {NAMING!r} and 'image': rename the second, as the images get that name")
    paths = [None if name is None else str(file.parent / name) for name in rows[NAMING][:]]
    missing = [path for path in paths if path is None or not os.path.isfile(path)]
    if missing:
        raise DataError(f"{file} names {len(missing)} of {len(paths)} images that are not there: {listed(missing)}")
    return (
        rows.remove_columns(NAMING)
        .add_column("image", paths)
        .cast_column("image", Image())
        .select_columns(["image", *others])
    )


def _wrapped(root: Path) -> Path | None:
    """The only folder in a folder, if that holds nothing but folders in its turn: it is no class."""
    folders = _folders(root)
    if len(folders) != 1 or folders[0].is_symlink() or not _holds_classes(folders[0]):
        return None
    beside = [child for folder in (root, folders[0]) for child in folder.iterdir() if child.is_file()]
    return None if any(_is_image(file) or file.name in METADATA for file in beside) else folders[0]


def _labelled(root: Path, images: list[Path]) -> Dataset:
    loose = [image for image in images if image.parent == root]
    names = {image: image.relative_to(root).parts[0] for image in images if image.parent != root}
    classes = sorted(set(names.values()))
    if loose and len(classes) < 2:  # so few classes are none
        return Dataset.from_dict({"image": list(map(str, images))}, features=Features({"image": Image()}))
    if loose:
        warnings.warn(
            f"{root}: {len(loose)} of {len(images)} images lie beside the {len(classes)} class folders, in none of "
            f"them, and were left out: {listed(image.name for image in loose)}",
            DataWarning,
            stacklevel=5,
        )
    numbers = {name: number for number, name in enumerate(classes)}
    columns = {"image": list(map(str, names)), "label": [numbers[name] for name in names.values()]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=classes)}))


def _refuse_empty_classes(root: Path, images: Sequence[Path]) -> None:
    filled = {image.relative_to(root).parts[0] for image in images}
    classes = [folder.name for folder in _folders(root)]
    empty = [name for name in classes if name not in filled]
    if empty and len(empty) < len(classes):
        raise DataError(
            f"{root} has {len(empty)} of {len(classes)} class folders without an image: {listed(empty)}: put images "
            "there (links to folders are not followed), or remove the folder"
        )
