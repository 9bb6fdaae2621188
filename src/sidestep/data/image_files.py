"""Images in files: a folder of class folders, or a list of paths with labels as VTAB-1K has them."""

import glob
from collections.abc import Iterable
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, Features, Image, Value

from sidestep.data.messages import DataError, listed

LISTED = Features({"image": Image(), "label": Value("string")})


def read_list(path: Path, lines: Iterable[str]) -> Dataset:
    """The images that a list names, in columns "image" and "label".

    Args:
        path: of the list; the images' paths are relative to its folder.
        lines: each a path and a label, the last word of the line; blank lines are passed over.

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
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise DataError(
            f"{path} names {len(missing)} of {len(files)} images that are not there: {listed(missing)}, looked for in "
            f"{folder.resolve()}: the paths of a list are relative to its folder"
        )
    columns = {"image": [str(files[name]) for _, (name, _) in rows], "label": [label for _, (_, label) in rows]}
    return Dataset.from_dict(columns, features=LISTED)


def read_folder(path: Path) -> Dataset:
    """The images of class folders, in columns "image" and "label".

    Raises:
        DataError: if there is no image, or none in one of the class folders.
    """
    # data_files, not data_dir: with data_dir a class called "test" would be taken for a split and left out
    pattern = f"{glob.escape(str(path.resolve()))}/**"
    try:
        rows = datasets.load_dataset("imagefolder", data_files={"train": [pattern]}, split="train")
    except Exception as error:  # the readers of `datasets` raise what they like
        raise DataError(
            f"{path} holds no images ({error.__cause__ or error}): give a folder with one folder of images "
            "per class, a folder that datasets.save_to_disk made, or a file"
        ) from error
    # a metadata file adds columns, and then a folder is no class
    if set(rows.column_names) <= {"image", "label"} and isinstance(rows.features.get("label"), ClassLabel | None):
        _refuse_empty_classes(path, rows)
    return rows


def _refuse_empty_classes(path: Path, rows: Dataset) -> None:
    cells = rows.cast_column("image", Image(decode=False))["image"][:]
    root = path.resolve()
    filled = {Path(cell["path"]).relative_to(root).parts[0] for cell in cells}
    folders = [child.name for child in sorted(root.iterdir()) if child.is_dir()]
    classes = [name for name in folders if not name.startswith((".", "__"))]  # `datasets` passes over the others
    empty = [name for name in classes if name not in filled]
    if empty and len(empty) < len(classes):
        raise DataError(
            f"{path} has {len(empty)} of {len(classes)} class folders without an image: {listed(empty)}: put images "
            "there (links to folders are not followed), or remove the folder"
        )
