"""What holds of the codec for any diff: it comes back bit for bit, and no damage is another error or another diff."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_codec import assert_same, bits

from sidestep.sparse.codec import DTYPES, POSITIONS, VALUES, DamagedDiff, SparseTensor, decode, encode

HASHED_FROM, PACKED_FROM = 40, 44  # behind the checksum, and behind the header's length
Diff = tuple[dict[str, SparseTensor], torch.dtype]


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype) -> SparseTensor:
    """Any entries of a tensor of any shape, with values of any bits."""
    sizes = st.integers(0, 9) | st.integers(1, 1 << 20)
    shape = tuple(draw(st.lists(sizes, max_size=3)))
    numel = math.prod(shape)
    chosen = sorted(draw(st.sets(st.integers(0, numel - 1), max_size=40))) if numel else []
    size = dtype.itemsize * len(chosen)
    values = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8).view(dtype)
    return SparseTensor(shape=shape, positions=torch.tensor(chosen, dtype=torch.int64), values=values)


@st.composite
def diffs(draw: st.DrawFn) -> Diff:
    """Tensors by any names, and the precision of their values."""
    dtype = draw(st.sampled_from(DTYPES))
    return draw(st.dictionaries(st.text(), tensors(dtype), max_size=4)), dtype


@st.composite
def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """Other bytes: some taken out at a place, and others put in."""
    start, out, new = draw(st.integers(0, len(data))), draw(st.integers(0, 40)), draw(st.binary(max_size=40))
    return data[:start] + new + data[start + out :]


def sealed(body: bytes, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `encode` returned with another body and its right checksum."""
    seal = hashlib.sha256(body + bits(stored[VALUES]).numpy().tobytes()).digest()
    return {**stored, POSITIONS: torch.tensor(list(b"sparse01" + seal + body), dtype=torch.uint8)}


def assert_readable_or_damaged(stored: dict[str, torch.Tensor]) -> None:
    try:
        found = decode(stored)
    except DamagedDiff:
        return
    encode(found, stored[VALUES].dtype)  # which looks at positions and shapes


@given(diffs())
def test_any_diff_comes_back_bit_for_bit(diff: Diff) -> None:
    assert_same(decode(encode(*diff)), *diff)


@given(diffs(), st.sampled_from(DTYPES))
def test_values_of_another_precision_come_back_rounded_or_are_refused(diff: Diff, dtype: torch.dtype) -> None:
    parts = diff[0]
    if any(bool((part.values.to(dtype).isinf() & part.values.isfinite()).any()) for part in parts.values()):
        with pytest.raises(ValueError, match="out of the range"):
            encode(parts, dtype)
    else:
        assert_same(decode(encode(parts, dtype)), parts, dtype)


@given(diffs(), st.sampled_from((POSITIONS, VALUES)), st.data())
def test_no_damage_is_taken_for_a_diff(diff: Diff, name: str, data: st.DataObject) -> None:
    stored = encode(*diff)
    before, size = bits(stored[name]).numpy().tobytes(), stored[name].itemsize
    after = data.draw(changed(before))
    after = after[: len(after) // size * size]
    if after != before:
        with pytest.raises(DamagedDiff):
            decode({**stored, name: torch.tensor(list(after), dtype=torch.uint8).view(stored[name].dtype)})


@given(diffs(), st.data())
def test_bytes_that_encode_did_not_write_are_no_other_error(diff: Diff, data: st.DataObject) -> None:
    stored = encode(*diff)
    body = stored[POSITIONS].numpy().tobytes()[HASHED_FROM:]
    assert_readable_or_damaged(sealed(data.draw(changed(body)), stored))


def with_header(stored: dict[str, torch.Tensor], change: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """What `encode` returned with another header and its right checksum."""
    whole = stored[POSITIONS].numpy().tobytes()
    end = PACKED_FROM + struct.unpack_from("<I", whole, HASHED_FROM)[0]
    packed = zlib.compress(change(zlib.decompress(whole[PACKED_FROM:end]).decode()).encode())
    return sealed(struct.pack("<I", len(packed)) + packed + whole[end:], stored)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
shapes = st.dictionaries(st.text(), st.lists(st.integers(), max_size=3), max_size=3)


@given(diffs(), st.sampled_from(("shapes", "dtype", "streams")), json_values | shapes)
def test_a_header_that_encode_did_not_write_is_no_other_error(diff: Diff, key: str, value: Any) -> None:
    stored = encode(*diff)
    assert_readable_or_damaged(with_header(stored, lambda text: json.dumps(json.loads(text) | {key: value})))


def test_a_header_that_is_nested_too_deeply_is_no_other_error() -> None:
    stored = encode({}, torch.float32)
    with pytest.raises(DamagedDiff, match="cannot be read"):
        decode(with_header(stored, lambda text: text.replace("{}", "[" * 100_000 + "]" * 100_000)))
