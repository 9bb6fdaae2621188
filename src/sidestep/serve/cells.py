"""The rows of a request as the cells of the columns that a task reads."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from sidestep.data import Fields
from sidestep.messages import some
from sidestep.serve.problems import Problem

Row: TypeAlias = Mapping[str, Any]
"""Cells by column. A column has the name that the task was trained with, or one of `READ`."""
READ = ("text", "text2", "image", "audio", "video")
"""The fields of `Fields` that a served row may have."""
FILES = ("image", "audio", "video")


def cells_of(row: Row, fields: Fields) -> dict[str, Any]:
    """The cells of a row by the columns of a task. Files are as `datasets` holds them, in bytes.

    A path is never followed: a file comes in base64, or as the bytes of an uploaded part.

    Raises:
        Problem: if a column is lacking, or holds something else.
    """
    found: dict[str, Any] = {}
    for field in READ:
        column = getattr(fields, field)
        if column is None:
            continue
        name = column if column in row else field
        if name not in row:
            raise Problem(
                "bad-row",
                f"the task reads {column!r} as {field}, and the row has {some(map(repr, row))}",
                f"Give the row {column!r}, or {field!r} in its place",
            )
        found[column] = _file(row[name], name, field) if field in FILES else _text(row[name], name)
    return found


def _text(cell: Any, name: str) -> str | list[str]:
    if isinstance(cell, str):
        return _clean(cell)
    if isinstance(cell, Sequence) and cell and all(isinstance(word, str) for word in cell):
        return [_clean(word) for word in cell]
    raise Problem("bad-row", f"{name!r} holds no text", "Give a text, or a list of words to a task that tags words")


def _clean(text: str) -> str:
    """A text without halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def _file(cell: Any, name: str, field: str) -> dict[str, Any]:
    if isinstance(cell, bytes):
        return {"bytes": cell, "path": None}
    if not isinstance(cell, str):
        raise Problem("bad-row", f"{name!r} holds no {field}", "Give the bytes of its file in base64")
    content = cell.partition(",")[2] if cell.startswith("data:") else cell
    try:
        return {"bytes": base64.b64decode(content, validate=True), "path": None}
    except (binascii.Error, ValueError) as error:
        raise Problem(
            "bad-row",
            f"{name!r} is not base64 ({error})",
            "Give the bytes of the file in base64. Paths and addresses are not followed",
        ) from error
