"""Sparse diffs come back bit for bit, near their bound, or not at all."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidestep.sparse.codec import (
    DTYPES,
    POSITIONS,
    VALUES,
    DamagedDiff,
    SparseTensor,
    decode,
    encode,
    position_bound,
)


def sparse(shape: tuple[int, ...], positions: list[int] | np.ndarray, seed: int = 0) -> SparseTensor:
    values = torch.randn(len(positions), generator=torch.Generator().manual_seed(seed))
    return SparseTensor(shape=shape, positions=torch.as_tensor(positions, dtype=torch.int64), values=values)


def uniform(shape: tuple[int, ...], density: float, seed: int) -> SparseTensor:
    chosen = np.flatnonzero(np.random.default_rng(seed).random(int(np.prod(shape))) < density)
    return sparse(shape, chosen, seed)


def bits(values: Tensor) -> Tensor:
    return values.view(torch.uint8)


def assert_same(found: dict[str, SparseTensor], wanted: dict[str, SparseTensor], dtype: torch.dtype) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].positions, tensor.positions)
        assert found[name].values.dtype == dtype
        assert torch.equal(bits(found[name].values), bits(tensor.values.to(dtype)))


def bound(tensors: dict[str, SparseTensor]) -> float:
    return sum(position_bound(tensor.numel, len(tensor.positions)) for tensor in tensors.values())


EDGES = {
    "no tensor": {},
    "nothing in a tensor": {"a": sparse((3, 4), [])},
    "a tensor without entries": {"a": sparse((0, 4), []), "b": sparse((2,), [1])},
    "all of a tensor": {"a": sparse((3, 4), range(12))},
    "a scalar": {"a": sparse((), [0]), "b": sparse((), [])},
    "first and last": {"a": sparse((70, 70), [0, 4899]), "b": sparse((5,), [0, 4])},
    "the same in the next tensor": {"a": sparse((9,), [4]), "b": sparse((9,), [4]), "c": sparse((9,), [4])},
    "beyond 2^31": {"a": sparse((1 << 20, 1 << 20), [5, (1 << 31) + 1, (1 << 40) - 1]), "b": sparse((9,), [3])},
    "a name in other letters": {"gewicht/ä.權重": sparse((2, 2), [1])},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tensors", EDGES.values(), ids=EDGES)
def test_what_comes_back_is_what_went_in(tensors: dict[str, SparseTensor], dtype: torch.dtype) -> None:
    assert_same(decode(encode(tensors, dtype)), tensors, dtype)


@pytest.mark.parametrize("seed", range(20))
def test_random_diffs_come_back(seed: int) -> None:
    random = np.random.default_rng(seed)
    tensors = {}
    for index in range(random.integers(1, 8)):
        shape = tuple(int(size) for size in random.integers(1, 60, random.integers(1, 4)))
        tensors[f"layer.{index}.weight"] = uniform(shape, random.choice([0, 0.001, 0.01, 0.3, 0.9, 1]), seed + index)
    dtype = DTYPES[seed % 3]
    assert_same(decode(encode(tensors, dtype)), tensors, dtype)


def test_more_positions_than_are_decoded_at_a_time_come_back() -> None:
    tensors = {"a": uniform((300, 1000), 0.4, 0), "b": uniform((3000, 1000), 0.005, 1)}
    assert_same(decode(encode(tensors, torch.bfloat16)), tensors, torch.bfloat16)


def test_every_class_of_gaps_comes_back_at_its_borders() -> None:
    borders = [0, 159, 160, 415, 416, 20639, 20640, 86175, 86176, 1003679, 1003680, (1 << 40) - 1, 1 << 62]
    positions = np.cumsum(np.array(borders) + 1) - 1
    tensors = {"a": sparse(((1 << 63) - 1,), positions)}
    assert_same(decode(encode(tensors, torch.float32)), tensors, torch.float32)


def test_values_keep_signed_zeros_infinities_and_nans() -> None:
    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45])
    given = {"a": SparseTensor(shape=(9,), positions=torch.arange(6), values=values)}
    assert torch.equal(bits(decode(encode(given, torch.float32))["a"].values), bits(values))


def test_the_tensors_go_through_a_safetensors_file_with_others(tmp_path) -> None:
    tensors = {"a": uniform((100, 100), 0.01, 0)}
    save_file({**encode(tensors, torch.bfloat16), "head.weight": torch.ones(2, 2)}, tmp_path / "task.safetensors")
    assert_same(decode(load_file(tmp_path / "task.safetensors")), tensors, torch.bfloat16)


def test_encoding_is_deterministic() -> None:
    first, second = (encode({"a": uniform((300, 300), 0.01, 0)}, torch.float16) for _ in range(2))
    assert torch.equal(first[POSITIONS], second[POSITIONS])


# --- size --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.001, 0.0025, 0.005, 0.01])
def test_positions_take_at_most_a_tenth_more_than_the_bound(density: float) -> None:
    names = ("attention.query", "attention.output", "intermediate", "output")
    tensors = {
        f"encoder.layer.{layer}.{name}.{kind}": uniform(shape, density, 10 * layer + len(name))
        for layer in range(6)
        for name in names
        for kind, shape in (("weight", (600, 600)), ("bias", (600,)))
    }
    assert len(encode(tensors, torch.bfloat16)[POSITIONS]) <= 1.10 * bound(tensors)


def test_clusters_take_less_than_uniform_positions() -> None:
    rows = np.sort(np.random.default_rng(0).choice(30_000, 150, replace=False))
    touched = (rows[:, None] * 100 + np.arange(100)).reshape(-1)
    uniformly = {"a": uniform((30_000, 100), 0.005, 0)}
    clustered = {"a": sparse((30_000, 100), touched)}
    assert len(encode(clustered, torch.bfloat16)[POSITIONS]) < 0.1 * len(encode(uniformly, torch.bfloat16)[POSITIONS])


@pytest.mark.parametrize("density", [0.3, 0.5, 0.7, 0.95, 1.0])
def test_dense_tensors_take_at_most_a_bitmap(density: float) -> None:
    tensors = {"a": uniform((1000, 1000), density, 0)}
    taken = len(encode(tensors, torch.bfloat16)[POSITIONS])
    assert taken < 1.01 * 1000 * 1000 / 8
    if density == 1.0:
        assert taken < 2000


def test_the_bound_is_the_logarithm_of_the_choices() -> None:
    assert position_bound(10, 3) == pytest.approx(np.log2(120) / 8)
    assert position_bound(10, 0) == position_bound(10, 10) == 0


# --- damage ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return encode({"a.weight": uniform((80, 80), 0.02, 0), "b": sparse((9,), range(9))}, torch.bfloat16)


def test_a_flipped_bit_anywhere_is_found(stored: dict[str, Tensor]) -> None:
    for name in (POSITIONS, VALUES):
        length = stored[name].numel() * stored[name].element_size()
        for place in range(length):
            damaged = {key: value.clone() for key, value in stored.items()}
            bits(damaged[name])[place] ^= 1 << place % 8
            with pytest.raises(DamagedDiff):
                decode(damaged)


@pytest.mark.parametrize("name", [POSITIONS, VALUES])
def test_truncation_is_found(stored: dict[str, Tensor], name: str) -> None:
    for length in range(len(stored[name])):
        with pytest.raises(DamagedDiff):
            decode({**stored, name: stored[name][:length]})


def test_values_of_another_diff_or_dtype_are_found(stored: dict[str, Tensor]) -> None:
    for values in (stored[VALUES].flip(0), stored[VALUES].view(torch.float16)):
        with pytest.raises(DamagedDiff):
            decode({**stored, VALUES: values})


def test_the_errors_say_what_to_do(stored: dict[str, Tensor]) -> None:
    with pytest.raises(DamagedDiff, match=r"truncated or altered\. Copy it again"):
        decode({**stored, POSITIONS: stored[POSITIONS][:-1]})
    with pytest.raises(DamagedDiff, match=r"does not begin with 'sparse01'.*load it with the version that wrote it"):
        decode({**stored, POSITIONS: stored[POSITIONS].flip(0)})
    with pytest.raises(DamagedDiff, match=r"no sparse\.values among the tensors: give what encode returned"):
        decode({POSITIONS: stored[POSITIONS]})
    with pytest.raises(DamagedDiff, match=r"torch\.float64: give what encode returned"):
        decode({**stored, VALUES: stored[VALUES].double()})


@pytest.mark.parametrize("keep", [0, 2, 60, -3])
def test_a_forged_checksum_over_broken_content_is_no_other_error(stored: dict[str, Tensor], keep: int) -> None:
    data = bytearray(stored[POSITIONS].numpy().tobytes())
    body = data[40:]
    body[keep] ^= 0x55
    values = bits(stored[VALUES]).numpy().tobytes()
    forged = bytes(data[:8]) + hashlib.sha256(bytes(body) + values).digest() + bytes(body)
    with pytest.raises(DamagedDiff, match="checksum is right, but it cannot be read"):
        decode({**stored, POSITIONS: torch.tensor(list(forged), dtype=torch.uint8)})


@pytest.mark.parametrize("gap", [-(1 << 40), (1 << 63) - 1])
def test_forged_gaps_cannot_lead_backwards(gap: int) -> None:
    data = encode({"a": sparse((1 << 40,), [1, 1 << 30])}, torch.float32)[POSITIONS].numpy().tobytes()
    forged = zlib.compress(np.array([gap], "<i8").tobytes())
    length = struct.unpack_from("<I", data, 40)[0]
    header = json.loads(zlib.decompress(data[44 : 44 + length]))
    end, header["streams"][-1] = len(data) - header["streams"][-1], len(forged)
    packed = zlib.compress(json.dumps(header).encode())
    body = struct.pack("<I", len(packed)) + packed + data[44 + length : end] + forged
    values = torch.ones(2)
    whole = data[:8] + hashlib.sha256(body + bits(values).numpy().tobytes()).digest() + body
    with pytest.raises(DamagedDiff, match="positions do not increase"):
        decode({POSITIONS: torch.tensor(list(whole), dtype=torch.uint8), VALUES: values})


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "values", "message"),
    [
        (torch.tensor([1.0]), torch.ones(1), r"torch\.float32: give one dimension of torch\.int64"),
        (torch.tensor([[1]]), torch.ones(1, 1), r"\(1, 1\) torch\.int64: give one dimension"),
        (torch.tensor([1, 2]), torch.ones(1), r"\(1,\) values for 2 positions: give one value"),
    ],
)
def test_positions_and_values_that_do_not_belong_together_are_refused(
    positions: Tensor, values: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SparseTensor(shape=(3, 4), positions=positions, values=values)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([2, 1], "the positions of a are not strictly increasing: sort them"),
        ([1, 1], "the positions of a are not strictly increasing: sort them"),
        ([1, 12], r"a has positions from 1 to 12 and the shape \(3, 4\).*0 to 11"),
        ([-1, 1], r"a has positions from -1 to 1 and the shape \(3, 4\)"),
    ],
)
def test_positions_that_fit_no_tensor_are_refused(positions: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode({"b": sparse((2,), [1]), "a": sparse((3, 4), positions)}, torch.float32)


def test_values_that_a_dtype_cannot_hold_are_refused() -> None:
    large = SparseTensor(shape=(3,), positions=torch.tensor([1]), values=torch.tensor([1e6]))
    with pytest.raises(ValueError, match=r"b has values up to 1e\+06, out of the range of torch\.float16: choose"):
        encode({"b": large}, torch.float16)
    with pytest.raises(ValueError, match=r"value_dtype=torch\.int8: choose one of torch\.bfloat16, "):
        encode({"b": large}, torch.int8)


def test_more_entries_than_positions_can_count_are_refused() -> None:
    huge = sparse((1 << 62,), [0])
    with pytest.raises(ValueError, match=r"2\^63 entries or more together: encode them in parts"):
        encode({"a": huge, "b": huge}, torch.float32)
