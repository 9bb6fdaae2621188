"""Predictions of several tasks for each row, from as few passes of the backbone as the tasks allow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn

from sidestep.data import Collate, DataError, Fields, LabelSpace
from sidestep.data.messages import listed
from sidestep.disk.feature_options import FeatureOptions
from sidestep.disk.features import FeatureStore
from sidestep.disk.task_folder import TaskError
from sidestep.kinds.base import OWN, PREDICTION, kind_named
from sidestep.kinds.from_logits import FromLogits
from sidestep.kinds.prepare import chosen_fields, stored_labels
from sidestep.kinds.running import check_encoded, logits
from sidestep.measure.step import accepted
from sidestep.messages import some
from sidestep.model.attach import Attached
from sidestep.model.side_model import SideModel
from sidestep.tasks.bank_folder import BankError, BankFolder
from sidestep.tasks.features import kept_features
from sidestep.tasks.predict import Rows, as_dataset, encoded_for, labels_of_task, only, predict
from sidestep.tasks.together import Together


class Bank(Protocol):
    """What is needed of a `TaskBank`."""

    store: BankFolder
    together: Together

    def activate(self, name: str) -> Attached:
        """Switch to a task."""

    def damaged(self, names: Iterable[str]) -> dict[str, str]:
        """Why tasks cannot be read, by name."""

    def deactivate(self) -> nn.Module:
        """Leave the bare backbone."""

    def __call__(
        self, batch: Mapping[str, Any], *, tasks: Sequence[str], rows: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, Any]:
        """The outputs of several tasks for a batch, each for its own rows of it."""


@dataclass(frozen=True)
class Answers:
    """Predictions for rows.

    Attributes:
        rows: for each row, by the names of its tasks, the prediction and (of classes and spans) its probability.
        passes: how many whole passes of the backbone were run over a batch, all batches together.
        batches: how many batches there were.
        failed: why tasks gave no answers, by name. Their files are damaged.
    """

    rows: list[dict[str, dict[str, Any]]]
    passes: int
    batches: int
    failed: dict[str, str] = field(default_factory=dict)

    def table(self, rows: Dataset) -> Dataset:
        """The rows with columns "prediction_TASK" and "probability_TASK". They are None where a task was not asked.

        Raises:
            DataError: if the rows have such a column already.
        """
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        for name in names:
            for part in (PREDICTION, OWN):
                values = [row.get(name, {}).get(part) for row in self.rows]
                if all(value is None for value in values):
                    continue
                column = f"{part}_{name}"
                if column in rows.column_names:
                    raise DataError(f"the rows have a column named {column} already: rename it")
                if any(isinstance(value, str) for value in values):
                    values = [None if value is None else str(value) for value in values]
                rows = rows.add_column(column, values)
        return rows


def predict_together(
    bank: Bank,
    rows: Rows,
    tasks: Sequence[Sequence[str]],
    *,
    columns: Fields | None = None,
    batch_size: int = 64,
    features: FeatureOptions | None = None,
) -> Answers:
    """What each row's tasks predict for it.

    Rows are read once for all tasks that read them alike: by the same processor, columns and length. These tasks share
    their passes (`TaskBank.__call__`).

    Args:
        bank: of the tasks.
        rows: see `predict.Rows`.
        tasks: the names for each row.
        columns: to read in the place of those that the tasks were trained on.
        batch_size: rows of one pass.
        features: where what frozen blocks give for the rows is kept. Tasks that read it run without the backbone.
            None: nowhere.

    Raises:
        BankError: if a row has no task or one twice, or the bank holds no task of such a name.
        DataError: as `predict`.
        TaskError: if the files of all of the tasks are damaged. One that is damaged among others is in `failed`.
    """
    rows = as_dataset(rows)
    places = _places(tasks, len(rows))
    failed = bank.damaged(places)
    if failed and len(failed) == len(places):
        raise TaskError("\n".join(failed.values()))
    places = {name: numbers for name, numbers in places.items() if name not in failed}
    tasks_of = readings(bank, places, columns, rows.column_names)
    answers: list[dict[str, dict[str, Any]]] = [{} for _ in range(len(rows))]
    tally = _Tally()
    for names in _alike(tasks_of):
        numbers = sorted({number for name in names for number in places[name]})
        fields = tasks_of[names[0]].fields
        spaces = {name: tasks_of[name].labels or labels_of_task(bank.activate(name)) for name in names}
        kinds = {name: kind_named(space.kind) for name, space in spaces.items()}
        heads = [name for name in names if isinstance(kinds[name], FromLogits) and not _is_dual(bank, name)]
        where = {number: place for place, number in enumerate(numbers)}
        own = {name: [where[number] for number in places[name]] for name in heads}
        outputs = _logits(bank, own, rows.select(numbers), fields, batch_size, tally, features) if heads else {}
        for name in names:
            kind = kinds[name]
            if isinstance(kind, FromLogits) and name in outputs:
                found = kind.columns(spaces[name], outputs[name], "one")
            else:
                part = rows.select(places[name])
                model = bank.activate(name)
                table = predict(model, part, fields=fields, batch_size=batch_size, probabilities="one")
                new = [column for column in table.column_names if column not in part.column_names]
                found = {column: table[column][:] for column in (PREDICTION, OWN) if column in new}
            for place, number in enumerate(places[name]):
                answers[number][name] = {column: values[place] for column, values in found.items()}
    ordered = [
        {name: found[name] for name in asked if name not in failed} for asked, found in zip(tasks, answers, strict=True)
    ]
    return Answers(ordered, tally.passes, tally.batches, failed)


def _is_dual(bank: Bank, name: str) -> bool:
    """Whether a task is on the two towers of a dual encoder. It runs in passes of its own."""
    return "towers" in bank.store.config(name)["backbone"]


@dataclass
class _Tally:
    passes: int = 0
    batches: int = 0


def _places(tasks: Sequence[Sequence[str]], count: int) -> dict[str, list[int]]:
    """The numbers of the rows of each task."""
    if len(tasks) != count:
        raise BankError(f"there are {count} rows, and tasks for {len(tasks)}: name the tasks of each row")
    places: dict[str, list[int]] = {}
    for number, names in enumerate(tasks):
        if isinstance(names, str) or not names:
            raise BankError(f"row {number + 1} has no list of tasks ({names!r}): name at least one")
        for name in names:
            places.setdefault(name, []).append(number)
        if len(set(names)) < len(names):
            raise BankError(f"row {number + 1} names a task twice ({', '.join(names)}): name each once")
    return places


@dataclass(frozen=True)
class Reads:
    """How a task reads rows.

    Attributes:
        fields: the columns.
        key: equal for tasks that read rows alike.
        labels: what it predicts, where it is stored.
    """

    fields: Fields
    key: str
    labels: LabelSpace | None


def readings(bank: Bank, names: Iterable[str], given: Fields | None, there: Sequence[str]) -> dict[str, Reads]:
    """How tasks of a bank read rows, each by its own columns or by those that are named in their place.

    Args:
        bank: of the tasks.
        names: of the tasks.
        given: columns to read in the place of those that the tasks were trained on.
        there: the columns of the rows.

    Raises:
        BankError: if the bank holds no task of such a name.
        DataError: if a column is not there, or a second text is named and none of the tasks reads one.
    """
    found = {name: reads_of(name, bank.store.config(name), given or Fields()) for name in names}
    if given is not None and given.text2 and not any(one.fields.text2 for one in found.values()):
        raise DataError(f"text2={given.text2!r}, but none of these tasks reads a second text: leave it out (--text2)")
    asked = {name: [column for column in asdict(one.fields).values() if column] for name, one in found.items()}
    lacking = [
        f"{column!r} (read by {name})" for name, columns in asked.items() for column in columns if column not in there
    ]
    if lacking:
        raise DataError(
            f"there is no column {some(lacking)}: the columns are {listed(there, limit=30)}. Name the column that all "
            "tasks are to read (--text, --text2, --image, --audio)"
        )
    return found


def reads_of(name: str, config: Mapping[str, Any], given: Fields) -> Reads:
    """How a task reads rows, by its config, or by columns that are named in the place of its own.

    Raises:
        DataError: if neither says which columns are read.
    """
    known = config["preprocessing"] or {}
    pair = "fields" not in known or known["fields"].get("text2")
    fields = replace(chosen_fields(known, given if pair else replace(given, text2=None)), label=None)
    # a task without a checksum of its processor reads like no other
    processor = config.get("processor_sha256") or name
    how = {key: value for key, value in known.items() if key not in ("labels", "problem", "fields", "generation")}
    key = json.dumps([processor, astuple(fields), how], sort_keys=True)
    return Reads(fields, key, stored_labels(known) if "problem" in known else None)


def _alike(tasks: Mapping[str, Reads]) -> list[list[str]]:
    """The tasks, together where they read rows alike."""
    groups: dict[str, list[str]] = {}
    for name, one in tasks.items():
        groups.setdefault(one.key, []).append(name)
    return list(groups.values())


def _logits(
    bank: Bank,
    places: Mapping[str, Sequence[int]],
    rows: Dataset,
    fields: Fields,
    batch_size: int,
    tally: _Tally,
    features: FeatureOptions | None,
) -> dict[str, NDArray[Any]]:
    """(its rows, outputs) of each task, for places among rows that all of them read alike."""
    names = list(places)
    model = bank.activate(names[0])
    assert isinstance(model, SideModel)
    encoded, processor = encoded_for(model, rows, fields), model.extras["processor"]
    check_encoded(model, encoded, fields, processor)
    stored = {} if features is None else _from_store(bank, names, encoded, fields, batch_size, features)
    found = {name: outputs[list(places[name])] for name, outputs in stored.items()}
    left = {name: np.array(own) for name, own in places.items() if name not in stored}
    if not left:
        return found
    collate = Collate.of(fields, processor)
    lengths = encoded["length"][:] if "length" in encoded.column_names else range(len(encoded))
    # rows that no task is left for do not run
    read = np.unique(np.concatenate([*left.values()]))
    order = read[np.argsort(np.asarray(lengths)[read], kind="stable")]
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in left}
    bank.deactivate()
    for start in range(0, len(order), batch_size):
        here = order[start : start + batch_size]
        batch = accepted(model, collate([encoded[int(number)] for number in here]))
        among = {name: np.flatnonzero(np.isin(here, own)) for name, own in left.items()}
        asked = {name: own.tolist() for name, own in among.items() if len(own)}
        for name, output in bank(batch, tasks=list(asked), rows=asked).items():
            parts[name].append(output.logits.float().cpu().numpy())
        tally.passes += bank.together.passes
        tally.batches += 1
    for name, own in left.items():
        # its rows came in the order of the batches, and are asked for in their own
        found[name] = np.concatenate(parts[name])[np.argsort(order[np.isin(order, own)])]
    return found


def _from_store(
    bank: Bank, names: Sequence[str], encoded: Dataset, fields: Fields, batch_size: int, features: FeatureOptions
) -> dict[str, NDArray[Any]]:
    """(rows, outputs) of the tasks that can run from stored features. What is lacking is computed once for all."""
    store = FeatureStore(None, features.limit)  # of "ram", and it says that a task that cannot be stored is no error
    found: dict[str, NDArray[Any]] = {}
    for name in names:
        model = bank.activate(name)
        assert isinstance(model, SideModel)
        data = only(model, encoded, fields, labels_of_task(model))
        kept = kept_features(
            model, data, features, passes=len(names), batch_size=batch_size, autocast=False, store=store
        )
        if kept is not None:
            found[name] = logits(model, kept.data.train, fields, batch_size=batch_size, collate=kept.data.collate)
    return found
