"""Sparse diffs as two tensors for a safetensors file: positions near their entropy, values as they are.

All tensors are laid end to end, so that a diff is one sorted list of positions. Each gap between neighbours becomes a
one-byte token. A token for wide gaps stands for several, and extra bytes tell which of them it is. zlib's Huffman codes
take the tokens to their entropy, in dense and in empty regions. docs/sparse_format.md gives the format byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: What `encode` names its tensors.
POSITIONS = "sparse.positions"
VALUES = "sparse.values"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_MAGIC = b"sparse01"
_PREFIX = struct.Struct("<8s32sI")  # magic, SHA-256 of what follows it, bytes of the header
_HASHED_FROM = 40
_PIECE = 1 << 15  # positions decoded at a time

# Tokens of four classes: how many there are, how many gaps each stands for, and what says which of them it is.
_COUNTS = (160, 80, 15, 1)
_WIDTHS = (1, 1 << 8, 1 << 16, 0)
_EXTRAS = ("<u1", "<u2", "<i8")
_FIRSTS = np.cumsum((0, *_COUNTS)).tolist()
_SMALLEST = np.concatenate(([0], np.cumsum(np.repeat(_WIDTHS, _COUNTS))[:-1]))


class DamagedDiff(ValueError):
    """Stored diffs are truncated, altered or of another format, and nothing of them was returned."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseTensor:
    """The nonzeros of one tensor.

    Attributes:
        shape: of the dense tensor.
        positions: (nonzeros,) int64, strictly increasing indices into the flat tensor.
        values: (nonzeros,).

    Raises:
        ValueError: if there are not as many values as positions, or positions are no int64. `encode` looks at their
            order and range, which takes time.
    """

    shape: tuple[int, ...]
    positions: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        positions, values = self.positions, self.values
        if positions.dtype != torch.int64 or positions.ndim != 1:
            raise ValueError(
                f"positions are {tuple(positions.shape)} {positions.dtype}: give one dimension of torch.int64"
            )
        if values.shape != positions.shape:
            raise ValueError(
                f"{tuple(values.shape)} values for {len(positions)} positions: give one value for each position"
            )

    @property
    def numel(self) -> int:
        """Entries of the dense tensor."""
        return math.prod(self.shape)


def position_bound(numel: int, nonzeros: int) -> float:
    """Bytes that the positions of `nonzeros` among `numel` entries need at least, all choices being as likely."""
    choices = math.lgamma(numel + 1) - math.lgamma(nonzeros + 1) - math.lgamma(numel - nonzeros + 1)
    return choices / math.log(2) / 8


def encode(tensors: Mapping[str, SparseTensor], value_dtype: torch.dtype) -> dict[str, Tensor]:
    """Two tensors on the CPU from which `decode` restores `tensors`.

    Args:
        tensors: by name, on any device.
        value_dtype: bfloat16, float16 or float32. Values are rounded to it.

    Returns:
        `POSITIONS`, uint8, with names, shapes, positions and a checksum over everything. `VALUES` in `value_dtype`.
        The first one's length is all that the positions take.

    Raises:
        ValueError: if `value_dtype` is another one, or a value lies out of its range. Also if positions are not
            increasing or do not fit their shape, or the tensors have 2^63 entries or more.
    """
    if value_dtype not in DTYPES:
        raise ValueError(f"value_dtype={value_dtype}: choose one of {', '.join(map(str, DTYPES))}")
    if sum(tensor.numel for tensor in tensors.values()) >= 1 << 63:
        raise ValueError("the tensors have 2^63 entries or more together: encode them in parts")
    values = [_rounded(name, tensor.values, value_dtype) for name, tensor in tensors.items()]
    joined = torch.cat(values) if values else torch.empty(0, dtype=value_dtype)
    streams = [_deflate(stream) for stream in _streams(_gaps(tensors))]
    header = {
        "shapes": {name: tensor.shape for name, tensor in tensors.items()},
        "dtype": str(value_dtype).removeprefix("torch."),
        "streams": [len(stream) for stream in streams],
    }
    packed = _deflate(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode())
    body = struct.pack("<I", len(packed)) + packed + b"".join(streams)
    stored = _MAGIC + _digest(body, joined) + body
    return {POSITIONS: torch.from_numpy(np.frombuffer(stored, np.uint8).copy()), VALUES: joined}


def decode(stored: Mapping[str, Tensor]) -> dict[str, SparseTensor]:
    """The sparse tensors that `encode` was given, on the CPU, after their checksum was found right.

    Positions and values are views of one tensor each.

    Args:
        stored: `POSITIONS` and `VALUES`. Other tensors beside them are not looked at.

    Raises:
        DamagedDiff: if either is missing, truncated, altered or of another format.
    """
    data, values = _checked(stored)
    try:
        shapes, streams = _parts(data, values.dtype)
        return dict(_split(shapes, _restored(streams, len(values)), values))
    except (zlib.error, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DamagedDiff(
            f"the diff's checksum is right, but it cannot be read ({error}): what wrote it does not keep to the "
            "format. Write it again with sidestep.sparse.codec.encode"
        ) from error


# --- values ------------------------------------------------------------------------------------------------


def _rounded(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    values = values.detach().cpu()
    rounded = values.to(dtype)
    if bool((rounded.isinf() & values.isfinite()).any()):
        largest = float(values[values.isfinite()].abs().max())
        raise ValueError(f"{name} has values up to {largest:.4g}, out of the range of {dtype}: choose torch.float32")
    return rounded


# --- gaps and tokens ---------------------------------------------------------------------------------------


def _gaps(tensors: Mapping[str, SparseTensor]) -> NDArray[np.int64]:
    """(nonzeros,) zeros in front of each nonzero, over all tensors end to end."""
    start, parts = 0, [np.array([-1])]
    for name, tensor in tensors.items():
        parts.append(_fitting(name, tensor) + start)
        start += tensor.numel
    return np.diff(np.concatenate(parts)) - 1


def _fitting(name: str, tensor: SparseTensor) -> NDArray[np.int64]:
    """The positions of a tensor, if they increase and fit its shape."""
    positions = tensor.positions.cpu().numpy()
    if not np.all(positions[1:] > positions[:-1]):
        raise ValueError(
            f"the positions of {name} are not strictly increasing: sort them, and sum the values of equal ones"
        )
    if len(positions) and (positions[0] < 0 or positions[-1] >= tensor.numel):
        raise ValueError(
            f"{name} has positions from {positions[0]} to {positions[-1]} and the shape {tuple(tensor.shape)}: "
            f"give indices into the flat tensor, 0 to {tensor.numel - 1}"
        )
    return positions


def _streams(gaps: NDArray[np.int64]) -> Iterator[bytes]:
    """Tokens, then the extra bytes of each class that has any."""
    tokens = np.searchsorted(_SMALLEST, gaps, side="right") - 1
    yield tokens.astype(np.uint8).tobytes()
    rest = gaps - _SMALLEST[tokens]
    for index, dtype in enumerate(_EXTRAS, start=1):
        yield rest[_of_class(tokens, index)].astype(dtype).tobytes()


def _restored(streams: list[memoryview], nonzeros: int) -> NDArray[np.int64]:
    """(nonzeros,) positions in the tensors laid end to end."""
    tokens = np.frombuffer(_inflate(streams[0], nonzeros), np.uint8)
    extras = {}
    for index, dtype in enumerate(_EXTRAS, start=1):
        count = int(np.count_nonzero(_of_class(tokens, index)))
        extra = np.frombuffer(_inflate(streams[index], count * np.dtype(dtype).itemsize), dtype)
        if count:
            extras[index] = extra
    return _summed(tokens, extras)


def _summed(tokens: NDArray[np.uint8], extras: Mapping[int, NDArray[np.integer]]) -> NDArray[np.int64]:
    """Positions from tokens and the extras of each class, in pieces that stay in the processor's cache."""
    positions = np.empty(len(tokens), np.int64)
    steps = _SMALLEST + 1
    used, last = dict.fromkeys(extras, 0), -1
    for start in range(0, len(tokens), _PIECE):
        piece, own = tokens[start : start + _PIECE], positions[start : start + _PIECE]
        np.take(steps, piece, out=own, mode="clip")  # twice as fast as with checks: there are 256 steps
        for index, extra in extras.items():
            places = np.flatnonzero(_of_class(piece, index))
            own[places] += extra[used[index] : used[index] + len(places)]
            used[index] += len(places)
        own[0] += last
        np.cumsum(own, out=own)
        if own[0] <= last or not np.all(own[1:] > own[:-1]):
            raise ValueError("positions do not increase")
        last = own[-1]
    return positions


def _of_class(tokens: NDArray[np.integer], index: int) -> NDArray[np.bool_]:
    return (tokens >= _FIRSTS[index]) & (tokens < _FIRSTS[index + 1])


def _split(
    shapes: Mapping[str, list[int]], positions: NDArray[np.int64], values: Tensor
) -> Iterator[tuple[str, SparseTensor]]:
    ends = np.cumsum([0, *(math.prod(shape) for shape in shapes.values())])
    cuts = np.searchsorted(positions, ends)
    if cuts[-1] != len(positions):
        raise ValueError("positions beyond the last tensor")
    counts = np.diff(cuts)
    positions -= np.repeat(ends[:-1], counts)
    sizes = counts.tolist()
    parts = zip(shapes.items(), torch.from_numpy(positions).split(sizes), values.split(sizes), strict=True)
    for (name, shape), own_positions, own_values in parts:
        yield name, SparseTensor(shape=tuple(shape), positions=own_positions, values=own_values)


# --- bytes -------------------------------------------------------------------------------------------------


def _deflate(data: bytes) -> bytes:
    """The shortest zlib stream of three: symbols alone, runs, and repeats (supports along rows and columns)."""
    found = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_DEFAULT_STRATEGY):
        packer = zlib.compressobj(strategy=strategy)
        found.append(packer.compress(data) + packer.flush())
    return min(found, key=len)


def _inflate(data: memoryview, size: int) -> bytes:
    """The `size` bytes of a zlib stream, which may not have more, so that a forged one cannot fill the memory."""
    unpacker = zlib.decompressobj()
    found = unpacker.decompress(data, size + 1)
    if len(found) != size or not unpacker.eof:
        raise ValueError(f"a stream that is to hold {size} bytes holds {len(found)}")
    return found


def _digest(body: bytes | memoryview, values: Tensor) -> bytes:
    running = hashlib.sha256(body)
    running.update(values.view(torch.uint8).numpy().data)
    return running.digest()


def _checked(stored: Mapping[str, Tensor]) -> tuple[memoryview, Tensor]:
    """The bytes of `POSITIONS` and the values, on the CPU, if their checksum is right."""
    missing = [name for name in (POSITIONS, VALUES) if name not in stored]
    if missing:
        raise DamagedDiff(f"no {' and no '.join(missing)} among the tensors: give what encode returned")
    positions, values = (stored[name].cpu().contiguous() for name in (POSITIONS, VALUES))
    if positions.dtype != torch.uint8 or positions.ndim != 1 or values.dtype not in DTYPES or values.ndim != 1:
        raise DamagedDiff(
            f"{POSITIONS} is {tuple(positions.shape)} {positions.dtype} and {VALUES} {tuple(values.shape)} "
            f"{values.dtype}: give what encode returned"
        )
    data = positions.numpy().data
    if len(data) < _PREFIX.size or data[: len(_MAGIC)] != _MAGIC:
        raise DamagedDiff(
            f"{POSITIONS} does not begin with {_MAGIC.decode()!r}: it is damaged or was written by another version of "
            "Sidestep. Copy the file again, or load it with the version that wrote it"
        )
    if data[len(_MAGIC) : _HASHED_FROM] != _digest(data[_HASHED_FROM:], values):
        raise DamagedDiff(
            f"the checksum of the diff ({len(data)} bytes of positions, {len(values)} values) is wrong: the file is "
            "truncated or altered. Copy it again from where it was made, or save the task again"
        )
    return data, values


def _parts(data: memoryview, dtype: torch.dtype) -> tuple[dict[str, list[int]], list[memoryview]]:
    """Shapes by name, and the streams."""
    *_, length = _PREFIX.unpack_from(data)
    place = _PREFIX.size + length
    header = json.loads(zlib.decompress(data[_PREFIX.size : place]))
    if header["dtype"] != str(dtype).removeprefix("torch."):
        raise ValueError(f"values are {dtype} and were {header['dtype']}")
    streams = []
    for size in header["streams"]:
        streams.append(data[place : place + size])
        place += size
    return header["shapes"], streams
