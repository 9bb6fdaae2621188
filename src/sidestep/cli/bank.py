"""`sidestep bank`: many tasks on one backbone, in one folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import typer

from sidestep.cli import options as opt
from sidestep.cli.errors import reporting
from sidestep.cli.values import backbone_named, check_batch, table_options
from sidestep.console import hush, remark, show_table, show_unnamed

if TYPE_CHECKING:
    from datasets import Dataset

    from sidestep.disk.feature_options import Where
    from sidestep.tasks.bank_folder import BankFolder, Entry

SEPARATOR = "|"
"""Between the names of several tasks in a cell."""

bank = typer.Typer(name="bank", help="Keep many tasks on one backbone, and run them.", no_args_is_help=True)


@bank.command()
def add(folder: opt.Bank, name: opt.BankName, task: opt.Task, debug: opt.Debug = False) -> None:
    """Copy a task into a bank. The bank is made with its first task."""
    with reporting(debug):
        from sidestep.disk.atomic import check_folder
        from sidestep.measure.memory import format_bytes
        from sidestep.tasks.bank_folder import BankFolder

        check_folder(folder)
        held = BankFolder(folder)
        held.add(name, task)
        remark(f"{name} added to {folder}: {format_bytes(held.entry(name).bytes)}, {len(held.names)} tasks")


@bank.command("list")
def list_(folder: opt.Bank, as_json: opt.AsJson = False, debug: opt.Debug = False) -> None:
    """List a bank's tasks and what they take on the disk."""
    with reporting(debug):
        from sidestep.tasks.bank_folder import BankError

        held = _open(folder)
        entries, unreadable = held.entries()
        if as_json:
            others = [{"name": name, "unreadable": reason} for name, reason in unreadable.items()]
            print(json.dumps([asdict(entry) for entry in entries] + others, indent=2, ensure_ascii=False))
        else:
            _show(held, entries, unreadable)
        if unreadable:
            raise BankError("\n".join(f"{name}: {reason}" for name, reason in unreadable.items()))


@bank.command()
def remove(folder: opt.Bank, name: opt.BankName, debug: opt.Debug = False) -> None:
    """Delete a task from a bank."""
    with reporting(debug):
        _open(folder).remove(name)
        remark(f"{name} removed from {folder}")


@bank.command()
def run(
    folder: opt.Bank,
    rows: opt.Rows,
    output: opt.Table,
    task_column: opt.TaskColumn = None,
    task: opt.OneTask = None,
    tasks: opt.AllTasks = None,
    text: opt.Text = None,
    text2: opt.Text2 = None,
    image: opt.Image = None,
    audio: opt.Audio = None,
    split: opt.Split = "test",
    columns: opt.Columns = None,
    no_header: opt.NoHeader = False,
    no_quoting: opt.NoQuoting = False,
    encoding: opt.Encoding = "utf-8",
    backbone: opt.OtherBackbone = None,
    gguf: opt.Gguf = None,
    batch_size: opt.BatchSize = 64,
    probabilities: opt.BankProbabilities = None,
    features: opt.Features = "off",
    features_folder: opt.FeaturesFolder = None,
    features_limit: opt.FeaturesLimit = "50GB",
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Label rows of several tasks on one backbone. Each row is labelled by its own task, in the rows' order."""
    with reporting(debug):
        from sidestep.data import Fields, read
        from sidestep.disk.atomic import refuse_inputs
        from sidestep.disk.feature_options import FeatureOptions
        from sidestep.disk.sources import backbones_at, rows_at, stored_backbones_at
        from sidestep.disk.table_files import check_table, write_table
        from sidestep.disk.task_folder import TaskError
        from sidestep.measure.plan import memory_of
        from sidestep.tasks import predict as predicting
        from sidestep.tasks.open_bank import open_bank
        from sidestep.tasks.predict_each import predict_each
        from sidestep.tasks.predict_together import predict_together

        hush()
        failed: dict[str, str] = {}
        check_batch(batch_size)
        shares = None if probabilities is None else predicting.check_probabilities(probabilities)
        check_table(output, overwrite=overwrite)
        held = _open(folder)
        refuse_inputs([output], [*rows_at(rows), folder, *backbones_at(backbone_named(backbone, gguf))])
        found = read(rows, table_options(columns, no_header, no_quoting, encoding), split=split)
        asked = _asked(found, task_column, task, tasks)
        names = [name for row in asked for name in row]
        several = tasks is not None or any(len(row) > 1 for row in asked)
        if several and shares not in (None, "one"):
            raise ValueError(
                f"--probabilities {shares} is for rows of one task each. Of several tasks each has a prediction "
                "with its probability. Leave it out"
            )
        kept = FeatureOptions(where=cast("Where", features), folder=features_folder, limit=memory_of(features_limit))
        if kept.where != "off" and not several:
            raise ValueError(f"--features {kept.where} is for rows that several tasks answer: leave it out")
        where = backbone_named(backbone, gguf)
        if empty := [number for number, row in enumerate(asked, start=1) if not row]:
            raise ValueError(f"row {empty[0]} of {rows} names no task: {len(empty)} of {len(asked)} rows do not")
        for name in () if where else dict.fromkeys(names):
            refuse_inputs([output], stored_backbones_at(held.config(name)))
        with open_bank(held, names=dict.fromkeys(names), moved_to=where) as loaded:
            reads = Fields(text=text, text2=text2, image=image, audio=audio)
            if not several:
                table = predict_each(
                    loaded,
                    found,
                    names,
                    columns=reads,
                    batch_size=batch_size,
                    progress=not quiet,
                    probabilities=shares,
                )
                for name, count in Counter(names).items():
                    remark(f"{name}: {count} rows; switched to in {1000 * loaded.seconds[name]:.0f} ms")
            else:
                how: dict[str, Any] = {"batch_size": batch_size, "features": None if kept.where == "off" else kept}
                answers = predict_together(loaded, found, asked, columns=reads, **how)
                failed = answers.failed
                table = answers.table(found)
                counts = Counter(names)
                remark(
                    f"{len(counts)} tasks, {len(names)} answers for {len(found)} rows: {answers.passes} passes of the "
                    f"backbone over {answers.batches} batches"
                )
            for name in dict.fromkeys(name for name in names if name not in failed):
                show_unnamed(held.config(name), f"{name}: ")
        write_table(table, output, shares=predicting.share_columns(table, found), overwrite=overwrite)
        remark(f"{len(table)} rows written to {output}")
        if failed:
            raise TaskError("\n".join(f"{name} gave no answers: {reason}" for name, reason in failed.items()))


def _open(folder: opt.Bank) -> BankFolder:
    from sidestep.tasks.bank_folder import BankError, BankFolder

    if not folder.exists():
        raise BankError(f"there is no bank {folder}: `sidestep bank add` makes one")
    return BankFolder(folder)


def _show(held: BankFolder, entries: list[Entry], unreadable: Iterable[str]) -> None:
    from sidestep.measure.memory import format_bytes

    rows: list[tuple[object, ...]] = [
        (each.name, each.method, _head(each), each.values, format_bytes(each.bytes)) for each in entries
    ]
    rows += [(name, "unreadable", None, None, None) for name in unreadable]
    show_table(f"Bank {held.path}", ("name", "method", "head", "stored values", "on disk"), rows)
    digest = held.digest()
    backbone = f", on weights with digest {digest.exact[:16]} ({digest.dtype})" if digest else ""
    remark(f"{len(entries)} tasks, {format_bytes(sum(entry.bytes for entry in entries))}{backbone}")


def _head(entry: Entry) -> str:
    if entry.labels:
        return ", ".join(entry.labels)
    return "the backbone's own" if entry.outputs is None else f"{entry.outputs} outputs"


def _asked(rows: Dataset, column: str | None, task: str | None, tasks: str | None) -> list[list[str]]:
    """The names of each row's tasks."""
    if sum(given is not None for given in (column, task, tasks)) != 1:
        raise ValueError(
            "say which tasks the rows are for: one of --task NAME, --tasks NAME,NAME and --task-column COLUMN"
        )
    if column is None:
        names = [str(task)] if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
        return [names] * len(rows)
    if column not in rows.column_names:
        raise ValueError(f"there is no column {column!r}: the rows have {', '.join(rows.column_names)}")
    cells = rows.with_format(None)[column][:]
    texts = ["" if cell is None else str(cell) for cell in cells]
    return [[part.strip() for part in text.split(SEPARATOR)] if text.strip() else [] for text in texts]
