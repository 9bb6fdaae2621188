"""`sidestep predict --url`: rows that a server's tasks label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidestep.console import remark

if TYPE_CHECKING:
    from datasets import Dataset

    from sidestep.data import Fields, TableOptions

FILES = ("image", "audio")
TEXTS = ("text", "text2")


def label(
    url: str,
    key: str | None,
    rows: str,
    output: Path,
    *,
    tasks: str,
    given: Fields,
    table: TableOptions,
    split: str,
    batch_size: int,
    overwrite: bool,
) -> None:
    """Write the rows with each task's prediction and its probability, as `sidestep bank run --tasks` does.

    Args:
        url, key: of the server.
        rows: file, folder or hub id.
        output: the file to write.
        tasks: names, with commas.
        given: columns to read in the place of those that the tasks were trained on.
        table: how a file of rows is read.
        split: of the rows, where they have several.
        batch_size: rows of one request.
        overwrite: whether a file that is there is replaced.

    Raises:
        ServerError: if the server refuses a request, or could not answer some rows. The others are written.
        DataError: if the rows lack a column.
    """
    from sidestep.data import read
    from sidestep.disk.atomic import refuse_inputs
    from sidestep.disk.sources import rows_at
    from sidestep.disk.table_files import check_table, write_table
    from sidestep.serve.client import Client, ServerError, told
    from sidestep.tasks.predict import share_columns
    from sidestep.tasks.predict_together import Answers

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    check_table(output, overwrite=overwrite)
    refuse_inputs([output], rows_at(rows))
    found = read(rows, table, split=split)
    answers: list[dict[str, dict[str, Any]]] = []
    with Client(url, key) as client:
        sent = _sent(found, _read_by(client.tasks(), names), given)
        starts = range(0, len(found), batch_size)
        for start in starts:
            part = _rows(found.select(range(start, min(start + batch_size, len(found)))), sent)
            answers += client.predict(part, names).rows
    labelled = Answers(answers, passes=0, batches=len(starts)).table(found)
    write_table(labelled, output, shares=share_columns(labelled, found), overwrite=overwrite)
    remark(f"{len(names)} tasks, {len(found)} rows in {len(starts)} requests: written to {output}")
    lacking = [
        f"row {number}, {name}: {told(answer['error'])}"
        for number, row in enumerate(answers, start=1)
        for name, answer in row.items()
        if answer.get("error")
    ]
    if lacking:
        raise ServerError(f"{len(lacking)} answers are lacking: " + "\n".join(lacking[:20]))


def _read_by(tasks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The columns that tasks read, by what they are read as. Names that are not there are left to the server."""
    reads = {task["name"]: task["reads"] or {"text": "text"} for task in tasks}
    return {name: reads[name] for name in names if name in reads}


def _sent(rows: Dataset, reads: Mapping[str, Mapping[str, str]], given: Fields) -> dict[str, tuple[str, str]]:
    """What rows are sent with: by its name there, the column here, and what it is read as.

    Raises:
        DataError: if a column is not there.
    """
    from sidestep.data import DataError
    from sidestep.data.messages import listed

    others = {part: column for part, column in asdict(given).items() if column}
    sent: dict[str, tuple[str, str]] = {}
    for name, parts in reads.items():
        for part in (*TEXTS, *FILES):
            if part not in parts:
                continue
            column = others.get(part, parts[part])
            if column not in rows.column_names:
                raise DataError(
                    f"there is no column {column!r} (read by {name}): the columns are "
                    f"{listed(rows.column_names, limit=30)}. Name the column (--text, --text2, --image, --audio)"
                )
            sent[part if part in others else column] = (column, part)
    return sent


def _rows(rows: Dataset, sent: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows as a client sends them. Files are read here, because a server follows no path."""
    from sidestep.data.media import undecoded

    columns = {}
    for name, (column, part) in sent.items():
        if part in FILES:
            columns[name] = [_file(cell) for cell in undecoded(rows, column)[column]]
        else:
            columns[name] = rows.with_format(None)[column][:]
    return [{name: cells[place] for name, cells in columns.items()} for place in range(len(rows))]


def _file(cell: Mapping[str, Any]) -> bytes:
    """The bytes of a file, which a table holds or names."""
    return Path(cell["path"]).read_bytes() if cell["bytes"] is None else bytes(cell["bytes"])
