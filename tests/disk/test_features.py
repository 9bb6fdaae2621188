"""A store of states gives back what it was given or nothing, whatever becomes of its folder meanwhile."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sidestep.disk import features
from sidestep.disk.atomic import OutputError
from sidestep.disk.features import (
    ABANDONED,
    FORMAT,
    KEY,
    MARK,
    DiskFull,
    Entry,
    FeatureError,
    FeatureStore,
    OverLimit,
)

PLENTY = 2**30
PLACES = ("encoder.block.1", "encoder.block.3")
WIDTH = 3
SHARE = {"backbone": "ours"}
forks = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch is not safe to fork elsewhere")


def ids(count: int, first: int = 0) -> list[bytes]:
    return [hashlib.blake2b(str(number).encode(), digest_size=16).digest() for number in range(first, first + count)]


def state_of(row: bytes, place: str = PLACES[0], dtype: torch.dtype = torch.float32) -> Tensor:
    """(tokens, width) that no other row or place has. Rows have one to five tokens."""
    seed = hashlib.blake2b(row + place.encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed))
    return torch.randn(1 + row[0] % 5, WIDTH, generator=generator).to(dtype)


def add(
    entry: Entry,
    rows: Sequence[bytes],
    places: Iterable[str] = PLACES,
    dtype: torch.dtype = torch.float32,
    seconds: float = 1.0,
) -> None:
    entry.add(rows, {place: [state_of(row, place, dtype) for row in rows] for place in places}, seconds)


def check_served(
    entry: Entry, rows: Iterable[bytes], places: Iterable[str] = PLACES, dtype: torch.dtype = torch.float32
) -> None:
    rows = list(rows)
    assert not entry.lacking(rows, places)
    for row in rows:
        for place in places:
            found = entry.state(row, place)
            assert found.dtype == dtype
            assert torch.equal(found, state_of(row, place, dtype))


def opened(folder: Path, key: Any = SHARE, limit: int = PLENTY) -> Entry:
    """The entry as another process sees it."""
    return FeatureStore(folder, limit).entry(key)


def shards(entry: Entry) -> list[Path]:
    assert entry.folder is not None
    return sorted(entry.folder.glob("*.safetensors"))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["memory", "folder"])
def entry(request: pytest.FixtureRequest, tmp_path: Path) -> Entry:
    return FeatureStore(None if request.param == "memory" else tmp_path / "store", PLENTY).entry(SHARE)


# --- what is given comes back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_come_back_as_they_were_given_in_any_order_and_as_often_as_asked(entry: Entry, dtype: torch.dtype) -> None:
    rows = ids(12)
    assert len({len(state_of(row)) for row in rows}) > 2
    add(entry, rows[:7], dtype=dtype)
    add(entry, rows[7:], dtype=dtype)
    check_served(entry, [*reversed(rows), *rows[3:6], rows[0]], dtype=dtype)


def test_rows_that_are_stored_twice_come_back(entry: Entry) -> None:
    rows = ids(4)
    add(entry, [*rows, rows[1], rows[1]])
    add(entry, rows[2:])
    check_served(entry, rows)
    if entry.folder is not None:
        check_served(opened(entry.folder.parent), rows)


def test_what_is_lacking_is_each_row_once_by_its_first_number(entry: Entry) -> None:
    rows = ids(4)
    add(entry, rows[:2])
    assert entry.lacking([rows[3], rows[0], rows[2], rows[3], rows[1], rows[2]], PLACES) == [0, 2]
    assert entry.lacking([], PLACES) == []
    with pytest.raises(KeyError, match=rows[3].hex()):
        entry.state(rows[3], PLACES[0])


def test_a_place_that_is_not_there_is_lacking_until_it_is_added(entry: Entry) -> None:
    rows = ids(4)
    add(entry, rows, PLACES[:1])
    add(entry, rows[2:], PLACES[1:])
    assert entry.lacking(rows, PLACES[:1]) == []
    assert entry.lacking(rows, PLACES) == [0, 1]
    add(entry, rows[:2], PLACES[1:])
    check_served(entry, rows)


def test_entries_of_other_keys_hold_other_rows(tmp_path: Path) -> None:
    for folder in (None, tmp_path / "store"):
        store = FeatureStore(folder, PLENTY)
        add(store.entry({"backbone": "one"}), ids(3))
        assert store.entry({"backbone": "two"}).lacking(ids(3), PLACES) == [0, 1, 2]
        check_served(store.entry({"backbone": "one"}), ids(3))


def test_the_order_of_a_keys_parts_does_not_matter(tmp_path: Path) -> None:
    add(opened(tmp_path, {"a": 1, "b": {"c": 2, "d": 3}}), ids(2))
    check_served(opened(tmp_path, {"b": {"d": 3, "c": 2}, "a": 1}), ids(2))


def test_a_second_store_reads_what_the_first_wrote_and_the_first_what_the_second_adds(tmp_path: Path) -> None:
    first = FeatureStore(tmp_path / "deep" / "store", PLENTY)
    rows = ids(6)
    add(first.entry(SHARE), rows[:3])
    second = opened(tmp_path / "deep" / "store")
    check_served(second, rows[:3])
    add(second, rows[3:])
    check_served(first.entry(SHARE), rows)


def test_what_was_read_stays_when_another_process_removes_the_files(tmp_path: Path) -> None:
    add(opened(tmp_path), ids(5))
    reader = opened(tmp_path)
    FeatureStore(tmp_path, PLENTY).clear()
    check_served(reader, ids(5))
    add(reader, ids(2, first=5))
    check_served(opened(tmp_path), ids(2, first=5))


def test_the_seconds_of_rows_are_their_shares_of_those_of_their_shards(entry: Entry) -> None:
    rows = ids(6)
    add(entry, rows[:4], seconds=2.0)
    add(entry, rows[4:], seconds=7.5)
    for each in [entry] + ([opened(entry.folder.parent)] if entry.folder else []):
        assert each.seconds(rows, PLACES) == pytest.approx(9.5)
        assert each.seconds([rows[0], rows[0], rows[5]], PLACES) == pytest.approx(0.5 + 3.75)
        assert each.seconds(ids(1, first=90), PLACES) == 0
        assert each.seconds(rows, ["decoder.block.9"]) == 0


def test_what_is_dropped_is_lacking_and_can_be_added_again(entry: Entry) -> None:
    rows = ids(4)
    add(entry, rows)
    entry.drop()
    assert entry.lacking(rows, PLACES) == [0, 1, 2, 3]
    if entry.folder is not None:
        assert opened(entry.folder.parent).lacking(rows, PLACES) == [0, 1, 2, 3]
    add(entry, rows)
    check_served(entry, rows)


def test_what_is_told_of_a_folder_is_what_is_in_it(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, PLENTY)
    for key, count in (({"backbone": "one"}, 5), ({"backbone": "two"}, 3)):
        add(store.entry(key), ids(count))
        add(store.entry(key), ids(1))
    found = {entry.key["backbone"]: entry for entry in store.stored() if entry.key}
    assert {name: entry.rows for name, entry in found.items()} == {"one": 6, "two": 4}
    for entry in found.values():
        assert entry.size == sum(file.stat().st_size for file in (tmp_path / entry.name).iterdir())
        assert abs(entry.used - time.time()) < 60
        assert entry.name == features.name_of(entry.key or {})


@given(st.data())
def test_any_rows_places_and_counts_come_back(data: st.DataObject) -> None:
    places = data.draw(
        st.lists(st.text(min_size=1, max_size=9, alphabet="abz.019"), min_size=1, max_size=3, unique=True)
    )
    widths = [data.draw(st.integers(1, 5)) for _ in places]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    count = data.draw(st.integers(1, 8))
    counts = [[data.draw(st.integers(0, 4)) for _ in range(count)] for _ in places]
    given_states = {
        place: [torch.randn(tokens, width).to(dtype) for tokens in each]
        for place, width, each in zip(places, widths, counts, strict=True)
    }
    cuts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=3))})
    rows = ids(count)
    with tempfile.TemporaryDirectory() as folder:
        for store in (FeatureStore(None, PLENTY), FeatureStore(Path(folder), PLENTY)):
            entry = store.entry(SHARE)
            for start, end in pairwise(cuts):
                entry.add(rows[start:end], {name: each[start:end] for name, each in given_states.items()}, 0.0)
            for read in (entry, *([opened(Path(folder))] if store.folder else [])):
                assert not read.lacking(rows, places)
                for place in places:
                    for row, wanted in zip(rows, given_states[place], strict=True):
                        assert torch.equal(read.state(row, place), wanted)
                        assert read.state(row, place).dtype == dtype


# --- what is damaged is not served -------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, place: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


def from_another_entry(path: Path) -> None:
    other = opened(path.parent.parent, {"backbone": "theirs"})
    add(other, ids(3))
    path.write_bytes(shards(other)[0].read_bytes())


def told(path: Path, **changes: str) -> None:
    with safe_open(path, "pt") as file:
        about = {**file.metadata(), **changes}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={name: value for name, value in about.items() if value})


def newer(path: Path) -> None:
    told(path, format=str(FORMAT + 1))


def without_sum(path: Path) -> None:
    told(path, sum="")


@pytest.mark.parametrize("damage", [truncate, empty, flip, from_another_entry, newer, without_sum])
def test_a_damaged_shard_is_removed_and_only_its_rows_are_lacking(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    writer = opened(tmp_path)
    rows = ids(6)
    add(writer, rows[:3])
    bad = shards(writer)[0]
    add(writer, rows[3:])
    damage(bad)
    with caplog.at_level(logging.WARNING, "sidestep"):
        reader = opened(tmp_path)
    assert f"{bad} are damaged, and are computed again" in caplog.text
    assert not bad.exists()
    assert reader.lacking(rows, PLACES) == [0, 1, 2]
    check_served(reader, rows[3:])
    add(reader, rows[:3])
    check_served(opened(tmp_path), rows)


def test_no_flipped_bit_changes_a_state(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    rows = ids(2)
    add(writer, rows, PLACES[:1])
    path = shards(writer)[0]
    whole, served = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole)
        flip(path, place)
        reader = opened(tmp_path)
        if not reader.lacking(rows, PLACES[:1]):
            check_served(reader, rows, PLACES[:1])
            served += 1
        else:
            assert not path.exists()
    assert served <= 4  # flips in the seconds that it took, as they are told


def test_a_description_that_cannot_be_read_costs_no_state(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    add(writer, ids(3))
    assert writer.folder is not None
    (writer.folder / KEY).write_text("{")
    check_served(opened(tmp_path), ids(3))
    assert [(entry.key, entry.rows) for entry in FeatureStore(tmp_path, PLENTY).stored()] == [(None, 3)]


# --- limits ------------------------------------------------------------------------------------------------------

ONE, TWO, THREE = ({"backbone": name} for name in ("one", "two", "three"))


def used(folder: Path, *keys: Any) -> None:
    """Make it that these entries were used long ago, in this order."""
    for number, key in enumerate(keys):
        os.utime(folder / features.name_of(key) / KEY, (1e9 + number, 1e9 + number))


def size_of(folder: Path) -> int:
    return sum(entry.size for entry in FeatureStore(folder, PLENTY).stored())


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A store with two entries."""
    for key in (ONE, TWO):
        add(opened(tmp_path, key), ids(40))
    return tmp_path


@pytest.mark.parametrize(("oldest", "other"), [(ONE, TWO), (TWO, ONE)])
def test_the_entry_that_was_not_used_for_longest_makes_room(two: Path, oldest: Any, other: Any) -> None:
    used(two, oldest, other)
    add(opened(two, THREE, limit=size_of(two) + 200), ids(40))
    assert opened(two, oldest).lacking(ids(40), PLACES)
    for key in (other, THREE):
        check_served(opened(two, key), ids(40))


def test_reading_an_entry_is_using_it(two: Path) -> None:
    used(two, ONE, TWO)
    check_served(opened(two, ONE), ids(40))
    add(opened(two, THREE, limit=size_of(two) + 200), ids(40))
    check_served(opened(two, ONE), ids(40))
    assert opened(two, TWO).lacking(ids(40), PLACES)


def test_the_entry_that_is_written_stays_though_it_is_the_oldest(two: Path) -> None:
    entry = opened(two, ONE, limit=size_of(two) + 200)
    used(two, ONE, TWO)
    add(entry, ids(40, first=40))
    check_served(opened(two, ONE), ids(80))
    assert opened(two, TWO).lacking(ids(40), PLACES)


def test_nothing_is_removed_as_long_as_there_is_room(two: Path) -> None:
    add(opened(two, THREE, limit=2 * size_of(two)), ids(40))
    for key in (ONE, TWO, THREE):
        check_served(opened(two, key), ids(40))


def test_a_limit_below_a_row_is_refused_and_what_was_stored_in_the_entry_stays(tmp_path: Path) -> None:
    add(opened(tmp_path), ids(3))
    before = files(tmp_path)
    with pytest.raises(OverLimit, match=r"more than the limit of .*--features-limit.*sidestep features clear"):
        add(opened(tmp_path, limit=9), ids(1, first=3))
    assert files(tmp_path) == before
    check_served(opened(tmp_path), ids(3))


def test_memory_over_the_limit_is_refused_and_what_was_stored_stays() -> None:
    rows = ids(4)
    size = sum(state_of(row, place).nbytes for row in rows for place in PLACES)
    entry = FeatureStore(None, size).entry(SHARE)
    add(entry, rows)
    with pytest.raises(OverLimit, match="features in memory would take more than the limit of"):
        add(entry, ids(1, first=4))
    check_served(entry, rows)
    assert entry.lacking(ids(5), PLACES) == [4]
    with pytest.raises(OverLimit):
        add(FeatureStore(None, 9).entry(SHARE), ids(1))


def test_what_does_not_fit_anyhow_removes_no_other_entry(two: Path) -> None:
    with pytest.raises(OverLimit):
        add(opened(two, THREE, limit=900), ids(400))
    for key in (ONE, TWO):
        check_served(opened(two, key), ids(40))


def test_memory_that_is_dropped_can_be_used_again() -> None:
    rows = ids(4)
    size = sum(state_of(row, place).nbytes for row in rows for place in PLACES)
    entry = FeatureStore(None, size).entry(SHARE)
    for _ in range(3):
        add(entry, rows)
        entry.drop()


# --- folders that cannot be used ---------------------------------------------------------------------------------


def test_a_folder_with_other_files_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FeatureError, match=r"holds other files, and no features: name another folder"):
        FeatureStore(tmp_path, PLENTY)
    assert files(tmp_path) == {"thesis.txt"}


@pytest.mark.parametrize("mark", ["", "[]", "{}", "nothing"])
def test_a_mark_that_cannot_be_read_is_refused(tmp_path: Path, mark: str) -> None:
    (tmp_path / MARK).write_text(mark)
    with pytest.raises(FeatureError, match="holds other files"):
        FeatureStore(tmp_path, PLENTY)


@pytest.mark.parametrize("told", [FORMAT + 1, "next"])
def test_a_newer_format_is_refused_and_stays(tmp_path: Path, told: Any) -> None:
    add(opened(tmp_path), ids(2))
    (tmp_path / MARK).write_text(json.dumps({"format": told}))
    before = files(tmp_path)
    with pytest.raises(FeatureError, match=rf"features of format {told}, and this version knows {FORMAT}.*update"):
        FeatureStore(tmp_path, PLENTY)
    assert files(tmp_path) == before


def denied(*args: object, **kwargs: object) -> Any:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # patched, as tests may be run by one who may write everywhere
    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with pytest.raises(OutputError, match=r"store cannot be written \(Permission denied\): choose another place"):
        FeatureStore(tmp_path / "store", PLENTY)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="file is a file: choose a folder"):
        FeatureStore(tmp_path / "file", PLENTY)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="this user may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="cannot be written"):
        FeatureStore(tmp_path / "store", PLENTY)


def test_what_cannot_be_used_is_an_error_of_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FeatureError, match="file is a file: choose a folder"):
        FeatureStore(tmp_path / "file", PLENTY)
    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with pytest.raises(FeatureError, match="cannot be written"):
        FeatureStore(tmp_path / "store", PLENTY)


@contextmanager
def cleared(folder: Path, seconds: float | None = None) -> Iterator[None]:
    """Somebody else clears the folder, for so long or until the end."""
    begun, end = threading.Event(), threading.Event()

    def clear() -> None:
        with FileLock(folder / "clearing.lock"):
            begun.set()
            end.wait(seconds)

    thread = threading.Thread(target=clear)
    thread.start()
    try:
        assert begun.wait(10)
        yield
    finally:
        end.set()
        thread.join()


def test_a_folder_that_is_being_cleared_is_refused_until_that_is_done(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, PLENTY)
    with cleared(tmp_path):
        with pytest.raises(FeatureError, match=r"another process is clearing the features in .*: try again when it is"):
            FeatureStore(tmp_path, PLENTY)
        with pytest.raises(FeatureError, match="another process is clearing"):
            store.clear()
    FeatureStore(tmp_path, PLENTY).clear()


def test_a_store_that_is_being_opened_can_be_opened_by_another(tmp_path: Path) -> None:
    FeatureStore(tmp_path, PLENTY)
    with cleared(tmp_path, seconds=0.1):  # opening takes the lock too, and gives it back at once
        FeatureStore(tmp_path, PLENTY)


def test_a_store_that_is_being_made_can_be_opened_by_another(tmp_path: Path) -> None:
    (tmp_path / ".0123456789abcdef.new").write_text("")  # its mark, before it has its name
    FeatureStore(tmp_path, PLENTY)


# --- clearing ----------------------------------------------------------------------------------------------------


def test_entries_are_cleared_by_their_names(two: Path) -> None:
    store = FeatureStore(two, PLENTY)
    sizes = {entry.name: entry.size for entry in store.stored()}
    name = features.name_of(ONE)
    assert store.clear(["no such", name]) == sizes[name]
    assert [entry.name for entry in store.stored()] == [features.name_of(TWO)]
    check_served(opened(two, TWO), ids(40))
    assert store.clear([]) == 0
    check_served(opened(two, TWO), ids(40))


def test_all_are_cleared_where_none_is_named_and_the_folder_is_a_store_still(two: Path) -> None:
    size = size_of(two)
    assert FeatureStore(two, PLENTY).clear() == size
    assert files(two) - {"clearing.lock"} == {MARK}
    add(opened(two, ONE), ids(3))
    check_served(opened(two, ONE), ids(3))


def test_an_entry_is_told_and_cleared_while_a_file_of_it_vanishes(two: Path) -> None:
    (two / features.name_of(ONE) / ".0123.new").symlink_to("renamed meanwhile")
    assert {entry.name for entry in FeatureStore(two, PLENTY).stored()} == {
        features.name_of(ONE),
        features.name_of(TWO),
    }
    FeatureStore(two, PLENTY).clear()
    assert not list(FeatureStore(two, PLENTY).stored())


def test_files_that_nobody_finished_are_removed_after_an_hour(tmp_path: Path) -> None:
    entry = opened(tmp_path)
    add(entry, ids(2))
    assert entry.folder is not None
    ages = {".old.new": ABANDONED + 60, ".young.new": ABANDONED - 60}
    for name, age in ages.items():
        (entry.folder / name).write_text("half")
        os.utime(entry.folder / name, (time.time() - age,) * 2)
    check_served(opened(tmp_path), ids(2))
    assert [(entry.folder / name).exists() for name in ages] == [False, True]


# --- a full disk -------------------------------------------------------------------------------------------------


def raising(error: Exception) -> Callable[..., Any]:
    def fail(tensors: Any, path: Path, **how: Any) -> None:
        path.write_bytes(b"half of what was to be")
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_no_file_and_what_was_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    entry = opened(tmp_path)
    add(entry, ids(3))
    before = files(tmp_path)
    monkeypatch.setattr(features, "save_file", raising(error))
    with pytest.raises(DiskFull, match=f"the disk of {tmp_path} is full"):
        add(entry, ids(2, first=3))
    assert files(tmp_path) == before
    monkeypatch.undo()
    check_served(entry, ids(3))
    add(entry, ids(2, first=3))
    check_served(opened(tmp_path), ids(5))


def test_a_full_disk_is_told_of_the_last_step_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = opened(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *paths: raising(OSError(errno.ENOSPC, "full"))(None, Path(paths[0])))
    with pytest.raises(DiskFull):
        add(entry, ids(2))
    assert not [name for name in files(tmp_path) if name.endswith((".new", ".safetensors"))]


def test_a_disk_that_fails_otherwise_is_told_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = opened(tmp_path)
    monkeypatch.setattr(features, "save_file", raising(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(FeatureError, match=r"features cannot be written to .*Input/output error") as raised:
        add(entry, ids(2))
    assert not isinstance(raised.value, DiskFull)


def test_a_store_cannot_be_made_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", lambda *paths: raising(OSError(errno.ENOSPC, "full"))(None, Path(paths[0])))
    with pytest.raises(DiskFull, match="is full"):
        FeatureStore(tmp_path / "store", PLENTY)


# --- processes that are killed, and several at once --------------------------------------------------------------


def forked(act: Callable[[], object]) -> int:
    """The id of a process like this one that does something, and ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a test runner's own threads do nothing that it needs
        process = os.fork()
    if process:
        return process
    try:
        act()
        os._exit(0)
    finally:
        os._exit(1)


def write_for_ever(folder: Path, first: int, ready: int) -> None:
    entry = opened(folder)
    os.write(ready, b"!")
    for number in range(first, first + 100_000, 2):
        add(entry, ids(2, first=number), PLACES[:1])


@forks
def test_a_hundred_killed_writers_leave_only_right_states(tmp_path: Path) -> None:
    chance, rows, served, unfinished = random.Random(0), ids(60), 0, 0
    FeatureStore(tmp_path, PLENTY)
    reading, ready = os.pipe()
    for number in range(100):
        process = forked(lambda first=number % 50: write_for_ever(tmp_path, first, ready))
        os.read(reading, 1)
        time.sleep(chance.uniform(0, 0.015))
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        if number % 5 < 4:
            continue
        unfinished += sum(name.endswith(".new") for name in files(tmp_path))
        reader = opened(tmp_path)
        there = [row for row in rows if not reader.lacking([row], PLACES[:1])]
        check_served(reader, there, PLACES[:1])
        served += len(there)
        add(reader, ids(1, first=1000 + number), PLACES[:1])
        check_served(opened(tmp_path), ids(1, first=1000 + number), PLACES[:1])
        if number % 20 == 19:
            FeatureStore(tmp_path, PLENTY).clear()
    for end in (reading, ready):
        os.close(end)
    assert min(served, unfinished) > 10  # many were killed while they wrote


@forks
def test_two_writers_of_the_same_rows_leave_all_rows(tmp_path: Path) -> None:
    rows = ids(12)
    for run in range(20):
        folder = tmp_path / str(run)
        store = FeatureStore(folder, PLENTY)
        together = multiprocessing.get_context("fork").Barrier(2)

        def write(order: int, store: FeatureStore = store, together: Any = together) -> None:
            together.wait(10)
            for start in range(0, len(rows), 3)[::order]:
                numbers = store.entry(SHARE).lacking(rows[start : start + 3], PLACES)
                if numbers:
                    add(store.entry(SHARE), [rows[start + number] for number in numbers])
            check_served(store.entry(SHARE), rows)

        processes = [forked(lambda order=order, write=write: write(order)) for order in (1, -1)]
        ends = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        assert ends == [0, 0]
        check_served(opened(folder), rows)
        assert not [name for name in files(folder) if name.endswith(".new")]
