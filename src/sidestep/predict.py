"""What a task says about rows: logits, scores, and a table with label names and probabilities."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Subset

from sidestep.data import DataError, Fields, Kind, LabelSpace
from sidestep.data.labels import SEPARATOR
from sidestep.heads import Classify
from sidestep.metrics import scores
from sidestep.model import SideModel
from sidestep.prepare import collator, encode, stored_fields, stored_labels
from sidestep.step import accepted

PREDICTION = "prediction"
PROBABILITY = "p_"


def evaluate(
    model: SideModel,
    rows: Dataset,
    *,
    fields: Fields | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, float]:
    """The scores of a task on rows with labels.

    Args:
        model: with `extras["processor"]` and `extras["preprocessing"]`, as `load` and `train` leave it.
        rows: as `data.read` gives them.
        fields: None: the columns that the task was trained on.
        batch_size: rows of one pass.
        progress: whether a bar is shown.

    Raises:
        DataError: for missing columns, and labels that training never had.
    """
    fields, labels = _reading(model, fields)
    if fields.label is None:
        raise DataError("scores need a label column: name it (--label)")
    encoded = _encode(model, rows, fields, labels)
    found = logits(model, encoded, fields, batch_size=batch_size, progress=progress)
    return scores(labels.kind, found, np.array(encoded.with_format(None)["labels"][:]), labels.names or None)


def predict(
    model: SideModel,
    rows: Dataset,
    *,
    fields: Fields | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Dataset:
    """The rows with a column "prediction" and, for classes, one "p_NAME" with the probability of each.

    Several labels of a row are joined by "|"; an image stays as its path.

    Args:
        model: as for `evaluate`.
        rows: as `data.read` gives them; labels are not needed.
        fields: None: the columns that the task was trained on.
        batch_size: rows of one pass.
        progress: whether a bar is shown.

    Raises:
        DataError: for missing columns, or a column that has the name of one of these.
    """
    fields, labels = _reading(model, fields)
    found = logits(model, _encode(model, rows, fields, None), fields, batch_size=batch_size, progress=progress)
    columns = predicted(labels, found)
    taken = [name for name in columns if name in rows.column_names]
    if taken:
        raise DataError(f"the rows have columns named {', '.join(taken)} already: rename them")
    table = _readable(rows, fields)
    for name, values in columns.items():
        table = table.add_column(name, values)
    return table


def predicted(labels: LabelSpace, found: NDArray[Any]) -> dict[str, list[Any]]:
    """Predictions and probabilities by column name, from logits (rows, outputs)."""
    if labels.kind == "regress":
        return {PREDICTION: found[:, 0].astype(float).tolist()}
    values = torch.from_numpy(found).double()
    shares = values.softmax(-1) if labels.kind == "single" else values.sigmoid()
    if labels.kind == "single":
        chosen = [labels.names[index] for index in found.argmax(axis=1)]
    else:
        chosen = [_joined(labels, row) for row in found > 0]
    probabilities = zip(labels.names, shares.T.tolist(), strict=True)
    return {PREDICTION: chosen, **{f"{PROBABILITY}{name}": values for name, values in probabilities}}


def logits(
    model: SideModel,
    encoded: Dataset,
    fields: Fields,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> NDArray[Any]:
    """(rows, outputs) in the order of the rows; they are run sorted by length, so that little is padding."""
    order = _by_length(encoded)
    if "labels" in encoded.column_names:
        encoded = encoded.remove_columns("labels")
    loader = DataLoader(
        Subset(encoded, order.tolist()),
        batch_size=batch_size,
        collate_fn=collator(fields, model.extras.get("processor")),
        num_workers=workers,
    )
    bar = track(loader, "predicting", console=Console(stderr=True), disable=not progress, transient=True)
    model.eval()
    with torch.inference_mode():
        parts = [model(**accepted(model, batch)).logits.float().cpu().numpy() for batch in bar]
    found = np.concatenate(parts)
    back = np.empty_like(found)
    back[order] = found
    return back


def write_table(rows: Dataset, path: Path, *, overwrite: bool = False) -> None:
    """Write rows to a .csv, .tsv, .json, .jsonl or .parquet file, in one step.

    Raises:
        DataError: if the file exists already, or ends in something else.
    """
    check_table(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    WRITERS[path.suffix.lower()](rows, str(beside))
    os.replace(beside, path)


def check_table(path: Path, *, overwrite: bool) -> None:
    """Refuses a file that `write_table` would refuse.

    Raises:
        DataError: if the file exists already, or ends in something unknown.
    """
    if path.suffix.lower() not in WRITERS:
        raise DataError(f"{path} ends in {path.suffix!r}: choose a file that ends in {', '.join(WRITERS)}")
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists already: choose another file, or replace it with --overwrite")


def _write_json(rows: Dataset, path: str) -> None:
    # not `to_json`, which rounds numbers
    text = json.dumps(list(rows), indent=1, ensure_ascii=False, default=str)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _write_lines(rows: Dataset, path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


WRITERS: dict[str, Callable[[Dataset, str], object]] = {
    ".csv": lambda rows, path: rows.to_csv(path),
    ".tsv": lambda rows, path: rows.to_csv(path, sep="\t"),
    ".json": _write_json,
    ".jsonl": _write_lines,
    ".parquet": lambda rows, path: rows.to_parquet(path),
}


def _reading(model: SideModel, fields: Fields | None) -> tuple[Fields, LabelSpace]:
    preprocessing = model.extras.get("preprocessing") or {}
    if model.extras.get("processor") is None:
        raise DataError("this task holds no tokenizer or image processor: set model.extras['processor']")
    labels = stored_labels(preprocessing) if "problem" in preprocessing else labels_of(model)
    return fields or stored_fields(preprocessing), labels


def labels_of(model: SideModel) -> LabelSpace:
    """What a model's head says that it predicts: of a task that was saved from Python, without `sidestep train`."""
    head, config = model.settings.head, getattr(model, "config", None)
    if isinstance(head, Classify):
        names = head.labels or map(str, range(head.num_labels))
        return LabelSpace(head.kind, tuple(names))
    if head is not None or getattr(config, "problem_type", None) == "regression":
        return LabelSpace("regress", ())
    if config is None or not config.id2label:
        raise DataError("this task does not say what it predicts: train it with `sidestep train`, or a Sidestep head")
    kind: Kind = "multi" if config.problem_type == "multi_label_classification" else "single"
    return LabelSpace(kind, tuple(config.id2label[index] for index in sorted(config.id2label)))


def _encode(model: SideModel, rows: Dataset, fields: Fields, labels: LabelSpace | None) -> Dataset:
    length = (model.extras.get("preprocessing") or {}).get("max_length")
    wanted = Fields(text=fields.text, text2=fields.text2, image=fields.image, label=fields.label if labels else None)
    return encode(rows, wanted, model.extras["processor"], labels, length)[0]


def _by_length(encoded: Dataset) -> NDArray[np.int64]:
    if "length" not in encoded.column_names:
        return np.arange(len(encoded))
    return np.argsort(encoded["length"][:], kind="stable")


def _joined(labels: LabelSpace, chosen: NDArray[np.bool_]) -> str:
    return SEPARATOR.join(name for name, yes in zip(labels.names, chosen, strict=True) if yes)


def _readable(rows: Dataset, fields: Fields) -> Dataset:
    """The rows with an image as its path and a class number as its name."""
    rows = rows.with_format(None)
    for name, feature in rows.features.items():
        if isinstance(feature, ClassLabel):
            names = [None if index is None or index < 0 else feature.names[index] for index in rows[name][:]]
            rows = rows.remove_columns(name).add_column(name, names)
        elif name == fields.image and isinstance(feature, Image):
            cells = rows.cast_column(name, Image(decode=False))[name][:]
            paths = [cell["path"] or f"row {index + 1}" for index, cell in enumerate(cells)]
            rows = rows.remove_columns(name).add_column(name, paths)
    return rows
