"""What the commands print: tables on stdout, remarks on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sidestep.messages import about, counted

NARROW = 100
"""Columns of the tables of scores."""

if TYPE_CHECKING:
    from sidestep.kinds.assess import Assessment
    from sidestep.kinds.prepare import TaskData
    from sidestep.model.attach import Attached
    from sidestep.training.results import Results
    from sidestep.training.settings import TrainSettings


MANY = 20_000
"""Rows that take more than a few seconds to tokenize."""
SHOWN = 10
"""Names of labels that are shown."""
EXAMPLE = 80
"""Characters of a text that are shown of an example."""


def show_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]], *, piped: int = 140) -> None:
    """Print a table, numbers to the right. It is as wide as the terminal at most, or `piped` without a terminal."""
    if not is_first():
        return
    names, lines = list(columns), [list(row) for row in rows]
    table = Table(show_header=any(names))
    for place, name in enumerate(names):
        numbers = all(isinstance(line[place], int | float) for line in lines)
        table.add_column(name, justify="right" if numbers and lines else "left", overflow="fold")
    for line in lines:
        table.add_row(*(cell(value) for value in line))
    # a pipe has no width. It gets whole lines
    console = Console(width=None if sys.stdout.isatty() else piped, highlight=False, markup=False)
    console.print(title, style="bold")
    console.print(table)


def show_facts(title: str, facts: Mapping[str, object], *, piped: int = 140) -> None:
    """Print a table of names and values. `piped` as of `show_table`."""
    show_table(title, ("", ""), ((name, cell(value)) for name, value in facts.items()), piped=piped)


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
    if is_first():
        print(text, file=sys.stderr, flush=True)


def is_first() -> bool:
    """Whether this process prints: the only one, or the first of several."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def hush() -> None:
    """Turn off the progress bars of `datasets`. Most are gone at once, and they name steps of its own."""
    import datasets

    datasets.disable_progress_bars()


def show_many(rows: int) -> None:
    """Say that it takes a while to prepare many rows."""
    if rows >= MANY:
        remark(f"{rows:,} rows are being prepared")


def show_start(model: Attached, data: TaskData, settings: TrainSettings) -> None:
    """Say what is about to be trained on what."""
    from sidestep.kinds.base import kind_named
    from sidestep.training import dense_stage as relax

    kind = kind_named(data.labels.kind)
    count = sum(parameter.numel() for _, parameter in model.trained_parameters())
    names = ", ".join(data.labels.names[:SHOWN]) + (", ..." if len(data.labels.names) > SHOWN else "")
    remark(f"{model.record.name} on {type(model.backbone).__name__}: {count:,} parameters are trained")
    remark(f"{len(data.train)} training rows, each with {kind.answer.format(names=names)}")
    remark(f"dev: {data.dev_source}")
    _show_joins(data)
    remark(f"learning rate {settings.rate(model.record.config):g}, seed {settings.seed}")
    metric = kind.best_by(settings.metric, len(data.labels.names))
    own = relax.last_stage(model, settings) if relax.relaxes(model) else settings
    first = ""
    if relax.relaxes(model):
        first = f"{counted(relax.own(model, settings).epochs, 'epoch')} of all weights, then "
    if 0 < own.waits < own.epochs:
        remark(
            f"{first}at most {counted(own.epochs, 'epoch')}: training stops after {own.waits} without a better dev "
            f"{metric} (--patience 0: never early)"
        )
    else:
        remark(f"{first}{counted(own.epochs, 'epoch')}")


def _show_joins(data: TaskData) -> None:
    """Say what stands between texts, and show the first row that a model is to write an answer to."""
    from sidestep.data.written import as_text
    from sidestep.kinds.base import kind_named

    if data.separators.pair:
        remark(f"between the two texts of a row stands {data.separators.pair!r} (--separator chooses another)")
    if (kind := kind_named(data.labels.kind).writes) is not None:
        read, written = as_text(data.train[0], data.processor, kind)
        start = "..." if len(read) > EXAMPLE else ""
        joined = "+" if kind == "lm" else "->"
        remark(f"example, what is read {joined} what is written: {start + read[-EXAMPLE:]!r} {joined} {written!r}")


class Shown:
    """Shows how far a run is (see `training.run.Watch`)."""

    def __init__(self, recipe: Mapping[str, Any] | None) -> None:
        self.recipe = recipe

    def read(self, rows: int) -> None:
        """Say that it takes a while to prepare many rows."""
        show_many(rows)

    def started(self, model: Attached, data: TaskData, settings: TrainSettings) -> None:
        """Say what is about to be trained on what."""
        show_start(model, data, settings)
        if self.recipe is not None:
            show_recipe(self.recipe)

    def tell(self, line: str) -> None:
        """Say it."""
        remark(line)


def show_answers(model: Attached, data: TaskData) -> None:
    """Show what a task that writes texts says of the first dev rows."""
    from sidestep.tasks.predict import first_answers

    answers = first_answers(model, data)
    if answers:
        show_table(f"The first {len(answers)} dev rows", ("row", "expected", "written"), answers)


def show_recipe(record: Mapping[str, Any]) -> None:
    """Say which recipe a run follows, and what was set otherwise."""
    changed = cell(record["overridden"])
    remark(f"recipe {record['name']}" + (f", but {changed}" if record["overridden"] else ""))


def score_facts(judged: Assessment | Results, before: str = "") -> dict[str, object]:
    """Scores by name, each beside that of one answer for all, and the recall of each class if there are few."""
    from sidestep.kinds.assess import FEW

    facts: dict[str, object] = {}
    for name, value in judged.scores.items():
        same = judged.constant.get(name)
        beside = "" if same is None else f" (one answer for all: {cell(same)})"
        facts[f"{before}{name}"] = f"{cell(value)}{beside}"
    for name, each in judged.classes.items() if len(judged.classes) <= FEW else ():
        found = f"{cell(each.recall)} of {cell(each.rows)} rows" if each.rows else "no row"
        facts[f"recall of {name}"] = found if each.f1 is None else f"{found}, F1 {cell(each.f1)}"
    return facts


def show_unnamed(config: Mapping[str, Any], before: str = "") -> None:
    """Say of a task whose classes are numbers how they get names."""
    from sidestep.disk.card import unnamed_classes
    from sidestep.messages import some

    if names := unnamed_classes(config):
        remark(
            f"note: {before}the classes have no names, only numbers ({some(names, 10)}). For predictions in words, "
            "train with words in the label column, or attach with ss.Classify(labels=[...])"
        )


def _kept(results: Results) -> str:
    """Which epoch was kept, and why training ended before its last one."""
    if (penalty := results.method.get("chosen_penalty")) is not None:
        return f"none: the head was solved, with a penalty of {penalty:g}"
    epochs, planned = f"{results.epochs:g}", f"{results.planned_epochs:g}"
    if results.settings["keep"] == "last":
        return f"{epochs}, the last: none was chosen on these rows"
    kept = f"{results.best_epoch:g}, the best of {epochs} by {results.metric} on these same rows"
    if results.epochs >= results.planned_epochs:
        return kept
    waited = f"no better {results.metric} for {counted(results.settings['patience'], 'epoch')}"
    return f"{kept}\nstopped after {epochs} of {planned}: {waited}"


def show_results(results: Results, folder: Path) -> None:
    """Print the outcome of a run."""
    from sidestep.measure.memory import format_bytes
    from sidestep.training.results import FILE

    facts: dict[str, Any] = {
        "dev rows": results.data["dev_source"],
        "epoch kept": _kept(results),
        **score_facts(results, "dev "),
        "trained parameters": results.trainable_parameters,
        "task file": format_bytes(results.task_bytes),
        "seconds": results.seconds,
    }
    if (kept := results.features) is not None:
        facts["features"] = f"{kept['rows']:,} rows, {kept['spent_seconds']:.1f} s besides"
    if (auto := results.auto) is not None:
        facts["chosen"] = f"{auto['chosen']}, of {len({trial['candidate'] for trial in auto['trials']})} candidates"
        facts["search"] = f"{len(auto['trials'])} trials, {about(auto['search_seconds'])}"
    if (step := results.step) is not None:
        facts["kept for backward"] = f"{format_bytes(step.kept_bytes)} in a step of {step.rows} rows"
        facts["peak of a step"] = None if step.peak_bytes is None else format_bytes(step.peak_bytes)
    show_facts(f"Task {folder}", facts, piped=NARROW)
    for note in results.notes:
        remark(f"note: {note}")
    curves = f"; curves: tensorboard --logdir {folder / 'logs'}" if (folder / "logs").exists() else ""
    remark(f"details: {folder / FILE}{curves}")
