from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sidestep.compare.records import Kind, Record, append, key_of, latest, machine, read

SETTINGS = {
    "backbone": "tiny",
    "contender": "read",
    "method": "read",
    "task": "rte",
    "rate": 1e-3,
    "config": {"rank": 4, "after": None},
}
MEASURED = {"metric": "accuracy", "score": 0.5, "history": []}


def made(**changes: object) -> Record:
    return Record.of("score", {**SETTINGS, **changes}, measured=MEASURED, seconds=1.23456)


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    lines = [made(), made(rate=2e-3), Record.of("cost", SETTINGS, status="refused", reason="no – it does not")]
    for line in lines:
        append(path, line)
    assert read(path) == (lines, 0)
    assert path.read_text().count("\n") == 3


def test_a_file_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert read(tmp_path / "none.jsonl") == ([], 0)


@pytest.mark.parametrize("cut", [1, 7, 200])
def test_a_broken_last_line_is_counted_and_the_next_writer_starts_on_a_new_one(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.jsonl"
    append(path, made())
    append(path, made(note="é"))
    path.write_bytes(path.read_bytes()[:-cut])
    before = [made().key] if cut > 1 else [made().key, made(note="é").key]
    assert [record.key for record in read(path)[0]] == before
    append(path, made(rate=3e-3))
    found, broken = read(path)
    assert [record.key for record in found] == [*before, made(rate=3e-3).key]
    assert broken == (cut > 1)


@pytest.mark.parametrize(
    "line",
    ['{"format": 1}', "[1, 2]", "null", "\x00\x00", '{"format": 2, "kind": "score"}'],
)
def test_a_line_that_is_no_result_is_counted(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line + "\n")
    append(path, made())
    assert read(path)[0][0].key == made().key
    assert read(path)[1] == 1


def test_the_key_depends_on_kind_and_settings_and_not_on_their_order() -> None:
    assert key_of("score", SETTINGS) == key_of("score", dict(reversed(SETTINGS.items())))
    others = {key_of("trial", SETTINGS), made(rate=2e-3).key, made(config={"rank": 5, "after": None}).key}
    assert len({key_of("score", SETTINGS), *others}) == 4
    assert len(made().key) == 16


def test_the_last_result_of_a_key_counts(tmp_path: Path) -> None:
    failed = replace(made(), status="failed", measured=None, reason="out of memory")
    assert latest([failed, made(rate=2e-3), made()])[failed.key].status == "ok"


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append(path, replace(made(), measured={**MEASURED, "history": [{"loss": float("nan")}]}))
    assert read(path)[0][0].measured == {**MEASURED, "history": [{"loss": None}]}


@pytest.mark.parametrize("kind", ["trial", "score"])
@pytest.mark.parametrize("score", [math.nan, math.inf, None])
def test_a_run_without_a_finite_score_has_failed(tmp_path: Path, kind: Kind, score: float | None) -> None:
    path = tmp_path / "results.jsonl"
    append(path, Record.of(kind, SETTINGS, measured={**MEASURED, "score": score}))
    ((found,), broken) = read(path)
    assert (found.status, found.reason, found.measured) == ("failed", "its score is no finite number", None)
    assert broken == 0


@pytest.mark.parametrize("written", [0, 1, 40])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    path = tmp_path / "results.jsonl"
    append(path, made())
    before, write, left = path.read_bytes(), os.write, [written]

    def full(descriptor: int, content: bytes) -> int:
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[: left.pop()])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        append(path, made(rate=2e-3))
    assert path.read_bytes() == before


def test_a_line_that_is_written_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "results.jsonl", os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:7]))
    append(path, made())
    assert [record.key for record in read(path)[0]] == [made().key]


def test_the_machine_is_described_without_its_host_name() -> None:
    found = machine(threads=1, gpu="Some GPU")
    assert found["name"] == found["gpu"] == "Some GPU"
    assert found["threads"] == 1
    assert machine()["gpu"] is None
    assert set(found) == {"name", "cpu", "cores", "threads", "memory_bytes", "gpu"}


def test_reading_needs_no_torch() -> None:
    code = "import sys, sidestep.compare.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
