"""A few rows of each class, as few-shot learning trains on."""

import os
from collections import defaultdict
from hashlib import sha256
from pathlib import Path

from datasets import Dataset

from sidestep.data.encode import Fields
from sidestep.data.labels import class_of_each, label_space
from sidestep.data.media import undecoded
from sidestep.data.messages import NAMED, DataError


def few_shot(rows: Dataset, fields: Fields, shots: int, seed: int) -> Dataset:
    """So many rows of each class, in the order of the file.

    A row is drawn by a hash of the seed, its text and its file. So neither the order of the rows matters, nor where a
    folder of files lies. The rows of fewer shots are among those of more.

    Args:
        rows: with one class each.
        fields: the columns, with `label`.
        shots: rows of each class.
        seed: of the draw.

    Raises:
        DataError: if a class has fewer rows. Also for shots below 1, and labels that are no single classes.
    """
    if shots < 1:
        raise DataError(f"shots={shots}: choose at least 1 row of each class")
    if fields.label is None:
        raise DataError(f"shots={shots} without a label column: name it as label")
    members = defaultdict(list)
    for row, name in enumerate(class_of_each(rows, fields.label)):
        members[name].append(row)
    names = label_space(rows, fields.label, "single").names
    short = [f"{name!r} has {len(members[name])}" for name in names if len(members[name]) < shots]
    if short:
        raise DataError(
            f"shots={shots}, but {len(short)} of {len(names)} classes have fewer training rows "
            f"({', '.join(short[:NAMED])}{', ...' if len(short) > NAMED else ''}): choose fewer shots, or add rows"
        )
    ranks = [sha256(f"{seed}\0{content}".encode()).digest() for content in _contents(rows, fields)]
    chosen = [row for group in members.values() for row in sorted(group, key=ranks.__getitem__)[:shots]]
    return rows.select(sorted(chosen))


def _contents(rows: Dataset, fields: Fields) -> list[str]:
    """What tells a row from others: its texts, and what tells its file from others."""
    plain = rows.with_format(None)
    columns = [plain[name][:] for name in (fields.text, fields.text2) if name is not None]
    if fields.files is not None:
        columns.append(_files(rows, fields.files[1]))
    return ["\0".join(parts) for parts in zip(*columns, strict=True)]


def _files(rows: Dataset, column: str) -> list[str]:
    """A file's path within the common folder, or its bytes' digest."""
    cells = undecoded(rows, column)[column]
    found = [sha256(cell["bytes"]).hexdigest() if cell["bytes"] else cell["path"] for cell in cells]
    files = [cell["path"] for cell in cells if not cell["bytes"]]
    if not files:
        return found
    root = os.path.commonpath([os.path.abspath(file) for file in files])
    inside = {file: Path(os.path.relpath(file, root)).as_posix() for file in files}
    return [inside.get(content, content) for content in found]
