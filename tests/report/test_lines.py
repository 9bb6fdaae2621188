"""Whatever stands in a line: it is skipped and counted, or shown, and never the end of a report or a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import sample
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sidestep.compare.outcomes import best
from sidestep.compare.records import read
from sidestep.compare.summary import summary
from sidestep.report.figures import figures
from sidestep.report.load import load
from sidestep.report.markdown import markdown
from sidestep.report.page import _made_with, details
from sidestep.report.verdict import by_task, verdicts

#: One line of each kind, with everything that a line may have, and one that failed.
LINES: list[dict[str, Any]] = [
    asdict(line)
    for line in (
        sample.cost("b", "read"),
        sample.cost("b", "lora+checkpoint"),
        sample.trial("b", "read", "rte", 1e-3),
        sample.score("b", "read", "rte", 0, measured={"constant": {"accuracy": 0.527}}, settings={"part_rows": 277}),
        sample.score("b", "read", "price", 0, measured={"metric": "mse", "score": 1.5}),
    )
] + [{**asdict(sample.score("b", "full", "rte", 0)), "status": "failed", "reason": "no memory", "measured": None}]
#: The lines that stand around it.
OTHERS = [asdict(line) for line in sample.study("b", ("read", "lora"), tasks=("rte",), seeds=1)]

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 1e308, -1e308, 5e-324, 10**400, True]))
TEXTS = st.one_of(
    st.text(st.characters(codec=None), max_size=8),  # half a surrogate pair included
    st.sampled_from(["", "a\nb", "=1+1", "a|b", "</script>", "\x1b[31m", "\x00", "rte", "read", "mse", "x" * 400]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
MISSING = object()


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value within a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        yield (*here, name)
        yield from paths(part, (*here, name))


PLACES = [(number, path) for number, line in enumerate(LINES) for path in paths(line)]
#: A newer format is the only value that ends a report, with an error that says so.
WITHOUT_FORMAT = [place for place in PLACES if place[1] != ("format",)]


def changed(line: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of a line with another value at a path, or nothing there."""
    found = json.loads(json.dumps(line))
    part = found
    for name in path[:-1]:
        part = part[name]
    if value is MISSING:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return found


def file_with(folder: Path, *lines: Any) -> Path:
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*OTHERS, *lines]))
    return path


def look_at(path: Path) -> tuple[str, int]:
    """All that is made of a results file but for drawings: its Markdown, and how many lines were broken."""
    results = load([path])
    text = markdown(results, command="sidestep report")
    text.encode()
    for group in results.groups:
        for figure in figures(group, by_task=True):
            json.dumps(figure.rows, allow_nan=False)
        for row in group.rows:
            details(group, row)
        for verdict in verdicts(group):
            json.dumps([verdict.headline, verdict.remarks])
        by_task(verdicts(group))
    _made_with(results.records)
    records, broken = read(path)
    assert broken == results.broken
    assert len(records) + broken == len(path.read_text().splitlines())
    summary(records)
    best({(float(number), 1): record for number, record in enumerate(records) if record.kind == "trial"})
    return text, broken


@pytest.mark.parametrize(
    "value",
    [MISSING, None, "x", -1, math.nan, [], {}],
    ids=lambda value: "missing" if value is MISSING else repr(value),
)
def test_every_value_of_a_line_may_be_missing_or_of_another_type(tmp_path: Path, value: Any) -> None:
    lines = []
    for number, path in PLACES:
        # keys of their own, as the last line of a key counts alone
        line = {**LINES[number], "key": f"{number} {path}"}
        lines.append(changed(line, path, value))
    text, broken = look_at(file_with(tmp_path, *lines))
    assert 0 < broken < len(lines)
    assert "| read |" in text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(WITHOUT_FORMAT), value=VALUES)
@example(place=(3, ("measured", "score")), value=None)
@example(place=(3, ("settings", "seed")), value=[1])
@example(place=(0, ("measured", "step_seconds")), value={"median": "x"})
@example(place=(0, ("machine", "memory_bytes")), value="16 GB")
def test_any_json_value_at_any_place_of_a_line(tmp_path: Path, place: tuple[int, tuple[Any, ...]], value: Any) -> None:
    number, path = place
    text, broken = look_at(file_with(tmp_path, changed(LINES[number], path, value)))
    assert broken in (0, 1)
    assert "| read |" in text  # the other lines are there


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=VALUES)
@example(value=[[[]]])
def test_a_line_that_is_any_json_value(tmp_path: Path, value: Any) -> None:
    assert look_at(file_with(tmp_path, value))[1] == 1


@pytest.mark.parametrize("depth", [60, 900, 5000, 200_000])
def test_values_without_end_are_a_broken_line(tmp_path: Path, depth: int) -> None:
    deep = json.dumps(LINES[3]).replace('"batch": 32', f'"batch": {"[" * depth}{"]" * depth}')
    path = file_with(tmp_path)
    path.write_text(path.read_text() + deep + "\n")
    assert look_at(path)[1] == 1


def test_what_is_only_shown_may_be_anything(tmp_path: Path) -> None:
    odd = {"data": [1, {"a": None}], "batch": "many", "rate": None, "trials": True, "new": -1.5}
    line = changed(LINES[3], ("settings",), {**LINES[3]["settings"], **odd})
    assert look_at(file_with(tmp_path, line))[1] == 0
