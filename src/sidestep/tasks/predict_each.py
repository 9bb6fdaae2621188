"""Predictions for rows of several tasks: each by its own task of a bank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from sidestep.data import DataError, Fields
from sidestep.kinds.base import PREDICTION, Probabilities
from sidestep.model.pair_model import PairModel
from sidestep.tasks.bank import TaskBank
from sidestep.tasks.predict import Rows, as_dataset, predict
from sidestep.tasks.predict_together import readings


def predict_each(
    bank: TaskBank,
    rows: Rows,
    names: Sequence[str],
    *,
    columns: Fields | None = None,
    batch_size: int = 64,
    progress: bool = False,
    probabilities: Probabilities | None = None,
) -> Dataset:
    """As `predict`, each row by the task of a bank that is named for it, with one switch for each task.

    The columns are those of all these tasks. A row has None in columns that its task does not write. Predictions are
    texts if one task's predictions are.

    Args:
        bank: of the tasks.
        rows: see `Rows`.
        names: of the task of each row.
        columns: to read in the place of those that the tasks were trained on. Tasks that read a pair take `text2`.
        batch_size: rows of one pass.
        progress: whether a bar is shown.
        probabilities: as for `predict`. None: "all" if there is one task, else "one". Several tasks' columns would be
            empty in the rows of the others.

    Raises:
        BankError: if the bank holds no task of such a name.
        DataError: as `predict`, and for tasks of retrieval, whose rows belong together.
    """
    rows, cells = as_dataset(rows), dict[str, list[Any]]()
    tasks = {name: [index for index, own in enumerate(names) if own == name] for name in dict.fromkeys(names)}
    wanted = probabilities or ("all" if len(tasks) == 1 else "one")
    reads = {name: one.fields for name, one in readings(bank, tasks, columns, rows.column_names).items()}
    for name, index in tasks.items():
        model = bank.activate(name)
        if isinstance(model, PairModel):
            raise DataError(f"{name!r} is a task of retrieval, which looks at rows together: use `sidestep predict`")
        found = predict(
            model,
            rows.select(index),
            fields=reads[name],
            batch_size=batch_size,
            progress=progress,
            probabilities=wanted,
        )
        for column in found.column_names:
            values = cells.setdefault(column, [None] * len(rows))
            for place, value in zip(index, found[column], strict=True):
                values[place] = value
    if any(isinstance(value, str) for value in cells[PREDICTION]):
        cells[PREDICTION] = [str(value) for value in cells[PREDICTION]]
    return Dataset.from_dict(cells)
