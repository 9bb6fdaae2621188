"""What a task says about rows: logits or texts, scores, and a table with label names and probabilities."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from sidestep.bank import TaskBank
from sidestep.data import Collate, DataError, Fields, Generation, Kind, LabelSpace, encode_prompts
from sidestep.data.labels import SEPARATOR
from sidestep.data.pairs import captioned, encode_pairs
from sidestep.data.vocabulary import check_tokens
from sidestep.disk import check_file, whole
from sidestep.heads import Classify
from sidestep.metrics import scores, text_scores
from sidestep.model import SideModel
from sidestep.pair import Attached, PairModel
from sidestep.prepare import (
    encode,
    prompt_collator,
    stored_fields,
    stored_generation,
    stored_labels,
    written_kind,
)
from sidestep.retrieval import neighbours, recalls
from sidestep.step import accepted

PREDICTION = "prediction"
PROBABILITY = "p_"


def evaluate(
    model: Attached,
    rows: Dataset,
    *,
    fields: Fields | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, float]:
    """The scores of a task on rows with labels; where it writes texts, of these.

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
    if labels.kind == "retrieval":
        pairs, _ = encode_pairs(captioned(rows, fields), fields, model.extras["processor"], _max_length(model))
        return recalls(model, pairs, batch_size=batch_size, progress=progress)
    assert isinstance(model, SideModel)
    if fields.label is None:
        raise DataError("scores need a label column: name it (--label)")
    encoded = _encode(model, rows, fields, labels)
    if written_kind(labels.kind):
        texts = written(model, encoded, _generation(model), batch_size=batch_size, progress=progress)
        return text_scores(texts, encoded["target"][:])
    found = logits(model, encoded, fields, batch_size=batch_size, progress=progress)
    return scores(labels.kind, found, np.array(encoded.with_format(None)["labels"][:]), labels.names or None)


def predict(
    model: Attached,
    rows: Dataset,
    *,
    fields: Fields | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Dataset:
    """The rows with a column "prediction" and, for classes, one "p_NAME" with the probability of each.

    Of retrieval, what is closest to each image and each caption (see `retrieval.neighbours`).

    Several labels of a row are joined by "|"; an image stays as its path; a text is as the model writes it.

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
    if labels.kind == "retrieval":
        return neighbours(model, rows, fields, batch_size=batch_size, progress=progress)
    assert isinstance(model, SideModel)
    if (kind := written_kind(labels.kind)) is not None:
        prompts, _ = encode_prompts(
            rows, replace(fields, label=None), model.extras["processor"], kind, _max_length(model)
        )
        texts = written(model, prompts, _generation(model), batch_size=batch_size, progress=progress)
        columns: dict[str, list[Any]] = {PREDICTION: texts}
    else:
        encoded = _encode(model, rows, fields, None)
        columns = predicted(labels, logits(model, encoded, fields, batch_size=batch_size, progress=progress))
    taken = [name for name in columns if name in rows.column_names]
    if taken:
        raise DataError(f"the rows have columns named {', '.join(taken)} already: rename them")
    table = _readable(rows, fields)
    for name, values in columns.items():
        table = table.add_column(name, values)
    return table


def predict_each(
    bank: TaskBank, rows: Dataset, names: Sequence[str], *, batch_size: int = 64, progress: bool = False
) -> Dataset:
    """As `predict`, each row by the task of a bank that is named for it, with one switch for each task.

    The columns are those of all these tasks; a row has None in those that its task does not write. Predictions are
    texts if those of one task are.

    Args:
        bank: its tasks read the columns that they were trained on.
        rows: as `data.read` gives them.
        names: of the task of each row.
        batch_size: rows of one pass.
        progress: whether a bar is shown.

    Raises:
        BankError: if the bank holds no task of such a name.
        DataError: as `predict`, and for tasks of retrieval, whose rows belong together.
    """
    columns: dict[str, list[Any]] = {}
    tasks = {name: [index for index, own in enumerate(names) if own == name] for name in dict.fromkeys(names)}
    for name in tasks:
        bank.store.folder(name)
    for name, index in tasks.items():
        model = bank.activate(name)
        if isinstance(model, PairModel):
            raise DataError(f"{name!r} is a task of retrieval, which looks at rows together: use `sidestep predict`")
        found = predict(model, rows.select(index), batch_size=batch_size, progress=progress)
        for column in found.column_names:
            cells = columns.setdefault(column, [None] * len(rows))
            for place, value in zip(index, found[column], strict=True):
                cells[place] = value
    if any(isinstance(value, str) for value in columns[PREDICTION]):
        columns[PREDICTION] = [str(value) for value in columns[PREDICTION]]
    return Dataset.from_dict(columns)


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
    """(rows, outputs) in the order of the rows; they are run sorted by length, so that little is padding.

    Raises:
        DataError: for tokens that the backbone has no embeddings for.
    """
    if fields.text is not None:
        check_tokens(model.backbone, encoded, model.extras["processor"])
    order, collate = _by_length(encoded), Collate(model.extras.get("processor") if fields.text else None)
    batches = _batches(model, encoded, order, collate, batch_size=batch_size, workers=workers, progress=progress)
    model.eval()
    with torch.inference_mode():
        parts = [model(**batch).logits.float().cpu().numpy() for batch in batches]
    found = np.concatenate(parts)
    back = np.empty_like(found)
    back[order] = found
    return back


def written(
    model: SideModel,
    encoded: Dataset,
    generation: Generation,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> list[str]:
    """The texts that a task writes after prompts, in the order of the rows, without special tokens.

    With a key-value cache where the method is exact with one (`model.caches`).

    Args:
        model: with a language model head, and the tokenizer as `extras["processor"]`.
        encoded: prompts as `encode_prompts` gives them, with targets or without.
        generation: how they are written.
        batch_size: rows of one pass; they are run sorted by length.
        workers: processes that load data.
        progress: whether a bar is shown.

    Raises:
        DataError: if the model writes no text, or has no embeddings for tokens of the prompts.
    """
    tokenizer, kind = model.extras["processor"], model.writes
    if kind is None:
        raise DataError(f"{type(model.backbone).__name__} as it is attached writes no text")
    check_tokens(model.backbone, encoded, tokenizer)
    order, end = _by_length(encoded), tokenizer.eos_token_id
    collate = prompt_collator(tokenizer, kind)
    how: dict[str, Any] = {
        **asdict(generation),
        "do_sample": False,
        "use_cache": model.caches,
        "eos_token_id": end,
        "pad_token_id": end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    texts = [""] * len(encoded)
    model.eval()
    start = 0
    # tensors made under inference_mode could not be used in training, which goes on after an evaluation
    with torch.no_grad():
        for batch in _batches(
            model, encoded, order, collate, batch_size=batch_size, workers=workers, progress=progress
        ):
            ids = model.generate(**batch, **how)
            new = ids[:, batch["input_ids"].shape[1] :] if kind == "lm" else ids
            for text in tokenizer.batch_decode(new, skip_special_tokens=True):
                texts[order[start]] = text
                start += 1
    return texts


def _batches(
    model: SideModel,
    encoded: Dataset,
    order: NDArray[np.int64],
    collate: Collate,
    *,
    batch_size: int,
    workers: int,
    progress: bool,
) -> Iterator[dict[str, Tensor]]:
    """What the model takes of the rows without labels, in this order."""
    kept = encoded.remove_columns([name for name in ("labels", "target") if name in encoded.column_names])
    rows = Subset(kept, order.tolist())
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=collate, num_workers=workers)
    for batch in track(loader, "predicting", console=Console(stderr=True), disable=not progress, transient=True):
        yield accepted(model, batch)


def write_table(rows: Dataset, path: Path, *, overwrite: bool = False) -> None:
    """Write rows to a .csv, .tsv, .json, .jsonl or .parquet file, in one step.

    Raises:
        DataError: if the file exists already, or ends in something else.
        OutputError: if it cannot be written.
    """
    check_table(path, overwrite=overwrite)
    with whole(path) as beside:
        WRITERS[path.suffix.lower()](rows, str(beside))


def check_table(path: Path, *, overwrite: bool) -> None:
    """Refuses a file that `write_table` would refuse.

    Raises:
        DataError: if the file exists already, or ends in something unknown.
        OutputError: if it could not be written.
    """
    check_file(path)
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


def _write_csv(rows: Dataset, path: str, delimiter: str = ",") -> None:
    # not `to_csv`, whose reader (pandas) turns whole numbers beside a missing one into decimal ones
    with open(path, "w", encoding="utf-8", newline="") as file:
        # a line end of two characters, so that a cell with either of them is put in quotes
        writer = csv.writer(_Lines(file), delimiter=delimiter, lineterminator="\r\n")
        writer.writerow(rows.column_names)
        writer.writerows([_cell(value) for value in row.values()] for row in rows)


def _cell(value: Any) -> str:
    """A value as the text of one cell; None, like no number, is an empty one."""
    if value is None or value != value:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)


@dataclass
class _Lines:
    """Writes lines that end in one character."""

    file: TextIO

    def write(self, line: str) -> int:
        return self.file.write(line.removesuffix("\r\n") + "\n")


WRITERS: dict[str, Callable[[Dataset, str], object]] = {
    ".csv": _write_csv,
    ".tsv": lambda rows, path: _write_csv(rows, path, "\t"),
    ".json": _write_json,
    ".jsonl": _write_lines,
    ".parquet": lambda rows, path: rows.to_parquet(path),
}


def _reading(model: Attached, fields: Fields | None) -> tuple[Fields, LabelSpace]:
    preprocessing = model.extras.get("preprocessing") or {}
    if model.extras.get("processor") is None:
        raise DataError("this task holds no tokenizer or image processor: set model.extras['processor']")
    labels = stored_labels(preprocessing) if "problem" in preprocessing else labels_of(model)
    return fields or stored_fields(preprocessing), labels


def labels_of(model: Attached) -> LabelSpace:
    """What a model's head says that it predicts: of a task that was saved from Python, without `sidestep train`."""
    if isinstance(model, PairModel):
        return LabelSpace("retrieval", ())
    if model.writes is not None:
        return LabelSpace(model.writes, ())
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
    wanted = Fields(text=fields.text, text2=fields.text2, image=fields.image, label=fields.label if labels else None)
    return encode(rows, wanted, model.extras["processor"], labels, _max_length(model))[0]


def _max_length(model: Attached) -> int | None:
    return (model.extras.get("preprocessing") or {}).get("max_length")


def _generation(model: SideModel) -> Generation:
    return stored_generation(model.extras.get("preprocessing") or {})


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
