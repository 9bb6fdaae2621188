"""Shards of a store of hidden states: files in safetensors format with a checksum, each with some rows."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT = 1
ROWS = "rows"
COUNTS = "#tokens"

_log = logging.getLogger("sidestep")


@dataclass(frozen=True)
class Shard:
    """The states of some rows.

    Attributes:
        rows: the number of each row by its id.
        states: (tokens of all rows, width) by place.
        ends: where each row's tokens end, by place, with a 0 in front.
        seconds: that the states took to compute.
    """

    rows: Mapping[bytes, int]
    states: Mapping[str, Tensor]
    ends: Mapping[str, Sequence[int]]
    seconds: float

    @classmethod
    def of(
        cls, ids: Sequence[bytes], states: Mapping[str, Tensor], counts: Mapping[str, list[int]], seconds: float
    ) -> Shard:
        """The shard of these rows."""
        ends = {place: [0, *accumulate(each)] for place, each in counts.items()}
        return cls({row: number for number, row in enumerate(ids)}, states, ends, seconds)

    def row(self, number: int, place: str) -> Tensor:
        """(tokens, width) of a row."""
        ends = self.ends[place]
        return self.states[place][ends[number] : ends[number + 1]]


def read_shard(path: Path, entry: str) -> Shard | None:
    """A shard, or None if it is damaged or of another entry. Then it is removed."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        if (about.get("format"), about.get("entry"), about.get("sum")) != (str(FORMAT), entry, checksum(tensors)):
            raise ValueError("it is not what was written")
        rows = [bytes(row) for row in tensors.pop(ROWS).numpy()]
        counts = {name: tensors.pop(f"{name}{COUNTS}").tolist() for name in list(tensors) if not name.endswith(COUNTS)}
        return Shard.of(rows, tensors, counts, float(about["seconds"]))
    except FileNotFoundError:
        return None  # another process has removed it
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        _log.warning("stored features of %s are damaged, and are computed again (%s)", path, error)
        with suppress(OSError):
            path.unlink()
        return None


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A checksum over names, shapes and bytes."""
    running = 0
    for name, tensor in sorted(tensors.items()):
        running = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), running)
        running = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, running)
    return f"{running:08x}"
