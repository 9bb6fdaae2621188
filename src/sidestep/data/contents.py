"""What rows hold, as a checksum, by which a resumed run knows that its rows are those that it began with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from sidestep.data.media import is_local
from sidestep.data.pairs import WithImages
from sidestep.data.videos import frames_in

BATCH = 1000  # rows at a time: taken whole, the bytes of files would fill the memory


def content_hash(rows: Dataset) -> str:
    """SHA-256 over all that encoded rows hold: token ids, labels, lengths, and the bytes of files.

    Where a file lies does not count, so a folder of files may move. Each file is read once, and none is decoded. Of a
    file that is not here (in a store, or deleted since) the name counts.

    Args:
        rows: as `encode_text`, `encode_images`, `encode_sounds`, `encode_pairs` or `with_targets` gives them.
    """
    running = hashlib.sha256()
    for part in _parts(rows):
        running.update(part)
    return running.hexdigest()


def row_ids(rows: Dataset, leaving: Collection[str]) -> list[bytes]:
    """16 bytes for each row, by what it holds but for some columns. Equal rows have equal ones, wherever they stand."""
    names = sorted(name for name in rows.column_names if name not in leaving)
    found = []
    for table in rows.with_format("arrow").select_columns(names).iter(batch_size=BATCH):
        for row in table.to_pylist():
            running = hashlib.blake2b(digest_size=16)
            for name in names:
                cell = row[name]
                is_file = isinstance(cell, dict) and cell.keys() == {"bytes", "path"}
                running.update(f"{name} ".encode())
                running.update(_of_file(cell) if is_file else f"{cell!r} ".encode(errors="surrogatepass"))
            found.append(running.digest())
    return found


def _parts(rows: Dataset) -> Iterator[bytes]:
    yield f"{len(rows)} {sorted(rows.column_names)} ".encode()
    for table in rows.with_format("arrow").iter(batch_size=BATCH):
        for name in sorted(table.column_names):
            yield from _of_column(table.column(name))
    transform = rows.format["format_kwargs"].get("transform")
    if isinstance(transform, WithImages):
        yield from _parts(transform.images)


def _of_column(column: pa.ChunkedArray) -> Iterator[bytes]:
    while (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) and not column.null_count:
        yield pc.list_value_length(column).to_numpy().astype(np.int64).tobytes()
        column = pc.list_flatten(column)
    if pa.types.is_struct(column.type) and {field.name for field in column.type} == {"bytes", "path"}:
        yield from map(_of_file, column.to_pylist())
    elif (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)) and not column.null_count:
        yield column.to_numpy().tobytes()
    else:
        yield repr(column.to_pylist()).encode(errors="surrogatepass")


def _of_file(cell: dict[str, Any] | None) -> bytes:
    content = b"" if cell is None else content_of(cell)
    return f"{len(content)} ".encode() + content


def content_of(cell: dict[str, Any]) -> bytes:
    """The bytes of a file in a column. Of a folder of frames, a checksum of each. Of what is not here, the name."""
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    try:
        if is_local(cell["path"]) and os.path.isdir(cell["path"]):
            return b"".join(hashlib.sha256(frame.read_bytes()).digest() for frame in frames_in(cell["path"]))
        if is_local(cell["path"]):
            return Path(cell["path"]).read_bytes()
    except OSError:
        pass  # told when the row is read, with its number
    return str(cell["path"]).encode(errors="surrogatepass")
