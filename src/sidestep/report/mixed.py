"""What differs between results that stand in one table: versions, machines, settings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sidestep.compare.records import Record

#: Settings that say what a line is about, or that a method brings along. Two lines may differ in them.
OWN = frozenset(
    (
        *("backbone", "contender", "method", "config", "checkpoint", "keep"),
        *("score_of", "noise", "task", "seed", "rate", "trials"),
    )
)
#: Settings that belong to a task's rows: compared within a task only.
OF_A_TASK = frozenset(
    {"rows", "shots", "part_rows", "part", "data", "columns", "problem", "metric", "max_length", "epochs"}
)

Facts = Mapping[str, str]


def facts(record: Record) -> dict[str, str]:
    """What has to be the same for two lines of a kind to be comparable, as texts by name."""
    task = record.settings.get("task")
    settings = {
        f"{name} of {task}" if task and name in OF_A_TASK else name: value
        for name, value in record.settings.items()
        if name not in OWN
    }
    versions = {name: value or "not installed" for name, value in record.versions.items()}
    machine = {"machine": record.machine.get("name", "unknown"), "threads": record.machine.get("threads")}
    return {name: text_of(value) for name, value in {**versions, **machine, **settings}.items()}


def usual(records: Iterable[Record]) -> dict[str, str]:
    """The most common value of each fact; of equally common ones the first."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        for name, value in facts(record).items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: values.most_common(1)[0][0] for name, values in counts.items()}


def unusual(records: Iterable[Record], expected: Facts) -> tuple[str, ...]:
    """How some lines differ from the expected facts, one phrase a fact."""
    phrases = (
        f"{name} {value}, elsewhere {expected[name]}"
        for record in records
        for name, value in facts(record).items()
        if expected.get(name, value) != value
    )
    return tuple(dict.fromkeys(phrases))


def differing(records: Sequence[Record], names: Iterable[str]) -> dict[str, list[str]]:
    """Those of the named settings in which lines differ, with their values in order of appearance."""
    found = {name: list(dict.fromkeys(text_of(record.settings.get(name)) for record in records)) for name in names}
    return {name: values for name, values in found.items() if len(values) > 1}


def text_of(value: Any) -> str:
    """A setting as a reader is shown it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={text_of(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return " ".join(map(text_of, value)) or "none"
    return str(value)


def canonical(value: Any) -> str:
    """A text that two equal values share, whatever the order of their names."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
