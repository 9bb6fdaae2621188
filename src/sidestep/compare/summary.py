"""The table at a comparison's end: one line a contender, from its records."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from sidestep.compare.records import Record
from sidestep.measure.memory import format_bytes

PARTS_OF_ONE = (
    "accuracy",
    "f1",
    "f1_macro",
    "f1_micro",
    "matthews",
    "pearson",
    "spearman",
    "exact_match",
    "token_f1",
)


def summary(found: Iterable[Record]) -> tuple[list[str], list[list[object]]]:
    """Columns and lines: mean score of each task with its standard deviation over seeds, parameters, memory, time.

    A contender whose blocks are recomputed shows the score of the same method without that.
    """
    lines = [record for record in found if record.kind in ("score", "cost")]
    tasks = list(dict.fromkeys(line.settings["task"] for line in lines if line.kind == "score"))
    rivals = dict.fromkeys((line.settings["backbone"], line.settings["contender"]) for line in lines)
    columns = ["backbone", "contender", *tasks, "parameters", "kept", "peak", "step, s"]
    return columns, [_line(backbone, contender, tasks, lines) for backbone, contender in rivals]


def _line(backbone: str, contender: str, tasks: Sequence[str], lines: Sequence[Record]) -> list[object]:
    own = [line for line in lines if line.settings["backbone"] == backbone]
    cost = next((line for line in own if line.kind == "cost" and line.settings["contender"] == contender), None)
    scored_as = (cost.settings.get("score_of") if cost is not None else None) or contender
    scores = [line for line in own if line.kind == "score" and line.settings["contender"] == scored_as]
    cells = [_score([line for line in scores if line.settings["task"] == task]) for task in tasks]
    costs = {} if cost is None or cost.measured is None else cost.measured
    trained = next((line.measured.get("parameters") for line in scores if line.measured is not None), None)
    step = costs.get("step_seconds")
    return [
        backbone,
        contender,
        *cells,
        costs.get("parameters", trained),
        _bytes(costs.get("kept_bytes")),
        _bytes(costs.get("peak_bytes")),
        None if step is None else step.get("median"),
    ]


def _score(lines: Sequence[Record]) -> str | None:
    """Mean ± standard deviation over seeds, in percent if the score is a share. Else why there is no score."""
    measured = [line.measured for line in lines if line.measured is not None]
    if not measured:
        return lines[-1].status if lines else None
    scale, digits = (100, 1) if measured[0]["metric"] in PARTS_OF_ONE else (1, 3)
    values = [scale * part["score"] for part in measured]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _bytes(size: int | None) -> str | None:
    return None if size is None else format_bytes(size)
