"""What the commands print: tables on stdout, remarks on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sidestep.pair import Attached
    from sidestep.prepare import TaskData
    from sidestep.results import Results
    from sidestep.settings import TrainSettings


EXAMPLE = 80
"""Characters of a text that are shown of an example."""


def show_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; numbers to the right."""
    names, lines = list(columns), [list(row) for row in rows]
    table = Table(show_header=any(names))
    for place, name in enumerate(names):
        numbers = all(isinstance(line[place], int | float) for line in lines)
        table.add_column(name, justify="right" if numbers and lines else "left", overflow="fold")
    for line in lines:
        table.add_row(*(cell(value) for value in line))
    # a pipe has no width: let it have the lines whole
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    console.print(title, style="bold")
    console.print(table)


def show_facts(title: str, facts: Mapping[str, object]) -> None:
    """Print a table of names and values."""
    show_table(title, ("", ""), ((name, cell(value)) for name, value in facts.items()))


def cell(value: object) -> str:
    """A value as a table shows it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={cell(part)}" for name, part in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return str(value)


def remark(text: str) -> None:
    """Print a line that is no result."""
    print(text, file=sys.stderr, flush=True)


def hush(quiet: bool) -> None:
    """Turn off the progress bars of `datasets` where the user wants none."""
    if quiet:
        import datasets

        datasets.disable_progress_bars()


def show_start(model: Attached, data: TaskData, settings: TrainSettings) -> None:
    """Say what is about to be trained on what."""
    count = sum(parameter.numel() for _, parameter in model.trained_parameters())
    classes = f" ({', '.join(data.labels.names[:10])})" if data.labels.names else ""
    remark(f"{model.record.name} on {type(model.backbone).__name__}: {count:,} parameters are trained")
    remark(f"{len(data.train)} training rows, {data.labels.kind}{classes}")
    remark(f"dev: {data.dev_source}")
    _show_joins(data)
    remark(f"learning rate {settings.rate(model.record.name):g}, seed {settings.seed}")


def _show_joins(data: TaskData) -> None:
    """Say what stands between texts, and show the first row that a model is to write an answer to."""
    from sidestep.data.written import as_text
    from sidestep.prepare import written_kind

    if data.separators.pair:
        remark(f"between the two texts of a row stands {data.separators.pair!r} (--separator chooses another)")
    if (kind := written_kind(data.labels.kind)) is not None:
        read, written = as_text(data.train[0], data.processor, kind)
        start = "..." if len(read) > EXAMPLE else ""
        joined = "+" if kind == "lm" else "->"
        remark(f"example, what is read {joined} what is written: {start + read[-EXAMPLE:]!r} {joined} {written!r}")


def show_answers(model: Attached, data: TaskData) -> None:
    """Show what a task that writes texts says of the first dev rows."""
    from sidestep.predict import first_answers

    answers = first_answers(model, data)
    if answers:
        show_table(f"The first {len(answers)} dev rows", ("row", "expected", "written"), answers)


def show_recipe(record: Mapping[str, Any]) -> None:
    """Say which recipe a run follows, and what was set otherwise."""
    changed = cell(record["overridden"])
    remark(f"recipe {record['name']}" + (f", but {changed}" if record["overridden"] else ""))


def show_results(results: Results, folder: Path) -> None:
    """Print what a run came to."""
    from sidestep.memory import format_bytes
    from sidestep.results import FILE

    keep = results.settings["keep"]
    chosen = f", by {results.metric}" if keep == "best" else ""
    facts: dict[str, Any] = {
        **{f"dev {name}": value for name, value in results.scores.items()},
        f"{keep} epoch": f"{results.best_epoch:g} of {results.epochs:g}{chosen}",
        "trained parameters": results.trainable_parameters,
        "task file": format_bytes(results.task_bytes),
        "seconds": results.seconds,
    }
    if (step := results.step) is not None:
        facts["kept for backward"] = f"{format_bytes(step.kept_bytes)} in a step of {step.rows} rows"
        facts["peak of a step"] = None if step.peak_bytes is None else format_bytes(step.peak_bytes)
    show_facts(f"Task {folder}", facts)
    for note in results.notes:
        remark(f"note: {note}")
    remark(f"details: {folder / FILE}; curves: tensorboard --logdir {folder / 'logs'}")
