"""The results file of a comparison: JSON lines, one result a line, appended so that a killed writer costs one line.

Nothing here imports torch, so that a report is built without it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from sidestep.compare.lines import is_line
from sidestep.versions import versions

FORMAT = 1
PACKAGES = ("sidestep", "torch", "transformers", "datasets", "accelerate", "peft", "timm", "numpy")

Kind = Literal["cost", "trial", "score"]
Status = Literal["ok", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One result, with everything that is needed to get it again.

    Attributes:
        format: of the line. It is `FORMAT`.
        kind: "cost" is the memory, time and energy of a step. "trial" is a learning rate on held-out training rows.
            "score" is a run on all training rows, scored once on dev.
        key: `key_of(kind, settings)`. Results are found again by it.
        status: "refused" if the method does not work on the backbone or is not installed, "failed" if the run broke.
        reason: why, where the status is not "ok".
        settings: what was asked for, as JSON-ready values.
        measured: what came out. None where the status is not "ok".
        versions: of Python and the packages that a result depends on.
        machine: see `machine`.
        date: in UTC, ISO 8601.
        seconds: that the result took.
    """

    format: int = FORMAT
    kind: Kind
    key: str
    status: Status = "ok"
    reason: str | None = None
    settings: dict[str, Any]
    measured: dict[str, Any] | None = None
    versions: dict[str, str | None]
    machine: dict[str, Any]
    date: str
    seconds: float = 0.0

    @classmethod
    def of(
        cls,
        kind: Kind,
        settings: Mapping[str, Any],
        *,
        measured: Mapping[str, Any] | None = None,
        status: Status = "ok",
        reason: str | None = None,
        seconds: float = 0.0,
        threads: int | None = None,
        gpu: str | None = None,
    ) -> Record:
        """A result of this machine, now. `threads` and `gpu` as `machine` takes them."""
        return cls(
            kind=kind,
            key=key_of(kind, settings),
            status=status,
            reason=reason,
            settings=dict(settings),
            measured=None if measured is None else dict(measured),
            versions=versions(PACKAGES),
            machine=machine(threads=threads, gpu=gpu),
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            seconds=round(seconds, 3),
        )


def key_of(kind: Kind, settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits for a kind and its settings, whatever the order of their names."""
    canonical = json.dumps([kind, settings], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def append(path: Path, record: Record) -> None:
    """Add a line that has reached the disk when this returns. If that fails, the file is as before.

    A broken last line, left by a killed writer, is ended first. Numbers that are not finite become null.

    Raises:
        OSError: if the disk is full, or the file cannot be written.
    """
    line = json.dumps(_finite(asdict(record)), ensure_ascii=False, allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if size and _last_byte(descriptor, size) != b"\n":
            line = "\n" + line
        left = line.encode()
        try:
            while left:  # one write may take a part alone
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def read(path: Path) -> tuple[list[Record], int]:
    """The results in a file, oldest first, and how many lines are broken.

    A line is broken if it is no JSON, lacks a field, has a value of a wrong type, or is of another format. A run
    without a finite score counts as failed. A file that does not exist has no results.

    Raises:
        OSError: if the file is there and cannot be read.
    """
    if not path.exists():
        return [], 0
    found = [_parsed(line) for line in lines_of(path)]
    records = [record for record in found if record is not None]
    return records, len(found) - len(records)


def lines_of(path: Path) -> list[str]:
    """The lines of a results file that are not empty."""
    # a killed writer may leave half a character behind, and some editors a byte-order mark
    return [line for line in path.read_bytes().decode("utf-8-sig", errors="replace").split("\n") if line.strip()]


def latest(records: Iterable[Record]) -> dict[str, Record]:
    """The last result of each key. A result that failed and was tried again counts as it came out at last."""
    return {record.key: record for record in records}


def machine(*, threads: int | None = None, gpu: str | None = None) -> dict[str, Any]:
    """What the results were made on. It has no host name, which is nobody's business.

    Args:
        threads: that torch computes with. None: as many as there are cores.
        gpu: name of the GPU, where one was used.
    """
    cpu, cores = _cpu(), os.cpu_count()
    return {
        "name": gpu or f"{cpu}, {cores} cores",
        "cpu": cpu,
        "cores": cores,
        "threads": threads or cores,
        "memory_bytes": _memory(),
        "gpu": gpu,
    }


def _parsed(line: str) -> Record | None:
    """The record of a line. None if the line is broken."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return None
    if values.get("kind") not in get_args(Kind) or values.get("status") not in get_args(Status):
        return None
    names = {field.name for field in fields(Record)}
    if not names <= values.keys():
        return None
    values = _with_failure({name: values[name] for name in names})
    return Record(**values) if is_line(values) else None


def _with_failure(values: dict[str, Any]) -> dict[str, Any]:
    """A run whose score was no finite number counts as one that failed. That score stands in the file as null."""
    measured = values["measured"]
    if values["kind"] == "cost" or values["status"] != "ok" or not isinstance(measured, dict):
        return values
    if "score" not in measured or measured["score"] is not None:
        return values
    return {**values, "status": "failed", "reason": "its score is no finite number", "measured": None}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _last_byte(descriptor: int, size: int) -> bytes:
    os.lseek(descriptor, size - 1, os.SEEK_SET)
    return os.read(descriptor, 1)


def _cpu() -> str:
    """The processor's model, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
