"""What a task says about rows: logits or texts, scores, and a table with label names and probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from sidestep.data import Collate, DataError, Fields, Generation, Kind, LabelSpace, Separators, encode_prompts
from sidestep.data.labels import SEPARATOR
from sidestep.data.pairs import captioned, encode_pairs
from sidestep.data.vocabulary import check_tokens
from sidestep.disk.table_files import DIGITS
from sidestep.kinds.assess import Assessment, assess, assess_texts
from sidestep.kinds.pairs import neighbours, recalls
from sidestep.kinds.prepare import (
    TaskData,
    encode,
    prompt_collator,
    stored_fields,
    stored_generation,
    stored_labels,
    stored_separators,
    written_kind,
)
from sidestep.measure.step import accepted
from sidestep.model.attach import Attached
from sidestep.model.heads import Classify
from sidestep.model.pair_model import PairModel
from sidestep.model.side_model import SideModel

Probabilities = Literal["all", "one", "none"]
"""A column of probabilities for each class, one for that of the prediction, or none."""
Rows: TypeAlias = Dataset | Sequence[Mapping[str, Any]]
"""As `data.read` gives them, or a list of dictionaries."""

PREDICTION = "prediction"
PROBABILITY = "p_"
OWN = "probability"


def evaluate(
    model: Attached,
    rows: Rows,
    *,
    fields: Fields | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, float]:
    """The scores of a task on rows with labels; where it writes texts, of these.

    Args:
        model: with `extras["processor"]` and `extras["preprocessing"]`, as `load` and `train` leave it.
        rows: see `Rows`.
        fields: None: the columns that the task was trained on.
        batch_size: rows of one pass.
        progress: whether a bar is shown.

    Raises:
        DataError: for missing columns, and labels that training never had.
    """
    return judge(model, rows, fields=fields, batch_size=batch_size, progress=progress).scores


def judge(
    model: Attached, rows: Rows, *, fields: Fields | None = None, batch_size: int = 64, progress: bool = False
) -> Assessment:
    """As `evaluate`, with what the scores are to be seen against."""
    rows, (fields, labels) = as_dataset(rows), _reading(model, fields)
    if labels.kind == "retrieval":
        encoded, _ = encode_pairs(captioned(rows, fields), fields, model.extras["processor"], _max_length(model))
    elif fields.label is None:
        raise DataError("scores need a label column: name it (--label)")
    else:
        assert isinstance(model, SideModel)
        encoded = _encode(model, rows, fields, labels)
    return judge_encoded(
        model, encoded, fields, labels, _generation(model), batch_size=batch_size, workers=0, progress=progress
    )


def judge_encoded(
    model: Attached,
    encoded: Dataset,
    fields: Fields,
    labels: LabelSpace,
    generation: Generation,
    *,
    batch_size: int,
    workers: int,
    progress: bool = False,
) -> Assessment:
    """As `judge`, of encoded rows with labels.

    Args:
        model: as for `evaluate`.
        encoded: as `prepare` gives them.
        fields: the columns that they were made of.
        labels: what the task predicts.
        generation: how texts are written, where they are.
        batch_size: rows of one pass.
        workers: processes that load data.
        progress: whether a bar is shown.
    """
    how: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": progress}
    if labels.kind == "retrieval":
        return Assessment(scores=recalls(model, encoded, **how))
    assert isinstance(model, SideModel)
    if written_kind(labels.kind):
        return assess_texts(written(model, encoded, generation, **how), encoded["target"][:])
    targets = np.array(encoded.with_format(None)["labels"][:])
    return assess(labels.kind, logits(model, encoded, fields, **how), targets, labels.names or None)


def predict(
    model: Attached,
    rows: Rows,
    *,
    fields: Fields | None = None,
    batch_size: int = 64,
    progress: bool = False,
    probabilities: Probabilities = "all",
) -> Dataset:
    """The rows with a column "prediction" and, for classes, one "p_NAME" with the probability of each.

    Of retrieval, what is closest to each image and each caption (see `retrieval.neighbours`).

    Several labels of a row are joined by "|"; an image stays as its path; a text is as the model writes it.

    Args:
        model: as for `evaluate`.
        rows: see `Rows`; labels are not needed.
        fields: None: the columns that the task was trained on.
        batch_size: rows of one pass.
        progress: whether a bar is shown.
        probabilities: "one": instead of those columns a single one, "probability", of what is predicted (of several
            labels joined as they are); "none": no such column.

    Raises:
        DataError: for missing columns, or a column that has the name of one of these.
    """
    check_probabilities(probabilities)
    rows, (fields, labels) = as_dataset(rows), _reading(model, fields)
    if labels.kind == "retrieval":
        return neighbours(model, rows, fields, batch_size=batch_size, progress=progress)
    assert isinstance(model, SideModel)
    if (kind := written_kind(labels.kind)) is not None:
        prompts, _ = encode_prompts(
            rows, replace(fields, label=None), model.extras["processor"], kind, _max_length(model), _separators(model)
        )
        texts = written(model, prompts, _generation(model), batch_size=batch_size, progress=progress)
        columns: dict[str, list[Any]] = {PREDICTION: [_separators(model).without_start(text) for text in texts]}
    else:
        encoded = _encode(model, rows, fields, None)
        found = logits(model, encoded, fields, batch_size=batch_size, progress=progress)
        columns = predicted(labels, found, probabilities)
    taken = [name for name in columns if name in rows.column_names]
    if taken:
        raise DataError(f"the rows have columns named {', '.join(taken)} already: rename them")
    table = _readable(rows, fields)
    for name, values in columns.items():
        table = table.add_column(name, values)
    return table


def predicted(labels: LabelSpace, found: NDArray[Any], probabilities: Probabilities = "all") -> dict[str, list[Any]]:
    """Predictions and probabilities by column name, from logits (rows, outputs)."""
    if labels.kind == "regress":
        return {PREDICTION: found[:, 0].astype(float).tolist()}
    values = torch.from_numpy(found).double()
    shares = values.softmax(-1) if labels.kind == "single" else values.sigmoid()
    own: list[Any]
    if labels.kind == "single":
        chosen = [labels.names[index] for index in found.argmax(axis=1)]
        own = shares.amax(-1).tolist()
    else:
        chosen = [_joined(labels.names, row) for row in found > 0]
        texts = ([f"{share:.{DIGITS}f}" for share in row] for row in shares.tolist())
        own = [_joined(row, yes) for row, yes in zip(texts, found > 0, strict=True)]
    columns = {
        "all": {f"{PROBABILITY}{name}": each for name, each in zip(labels.names, shares.T.tolist(), strict=True)},
        "one": {OWN: own},
        "none": {},
    }
    return {PREDICTION: chosen, **columns[probabilities]}


def check_probabilities(asked: str) -> Probabilities:
    """A way to write probabilities that a user named.

    Raises:
        DataError: for one that there is not.
    """
    if asked not in get_args(Probabilities):
        raise DataError(f"probabilities={asked!r}: choose {', '.join(get_args(Probabilities))}")
    return cast(Probabilities, asked)


def share_columns(found: Dataset, rows: Dataset) -> list[str]:
    """The columns of probabilities that predicting has added to rows."""
    new = [name for name in found.column_names if name not in rows.column_names]
    return [name for name in new if name == OWN or name.startswith(PROBABILITY)]


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


def first_answers(model: Attached, data: TaskData, count: int = 3) -> list[tuple[int, str, str]]:
    """The first dev rows of a task that writes texts: their number, what was expected, what is written; else none."""
    if data.generation is None:
        return []
    assert isinstance(model, SideModel)
    rows = data.dev.select(range(min(count, len(data.dev))))
    texts = zip(rows["target"][:], written(model, rows, data.generation), strict=True)
    clean = data.separators.without_start
    return [(number, clean(target), clean(text)) for number, (target, text) in enumerate(texts, start=1)]


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


def _reading(model: Attached, fields: Fields | None) -> tuple[Fields, LabelSpace]:
    preprocessing = model.extras.get("preprocessing") or {}
    if model.extras.get("processor") is None:
        raise DataError("this task holds no tokenizer or image processor: set model.extras['processor']")
    labels = stored_labels(preprocessing) if "problem" in preprocessing else labels_of(model)
    return fields or stored_fields(preprocessing), labels


def as_dataset(rows: Rows) -> Dataset:
    """Rows as a data set."""
    return rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])


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
    processor, separators = model.extras["processor"], _separators(model)
    return encode(rows, wanted, processor, labels, _max_length(model), separators=separators)[0]


def _max_length(model: Attached) -> int | None:
    return (model.extras.get("preprocessing") or {}).get("max_length")


def _generation(model: Attached) -> Generation:
    return stored_generation(model.extras.get("preprocessing") or {})


def _separators(model: SideModel) -> Separators:
    return stored_separators(model.extras.get("preprocessing") or {})


def _by_length(encoded: Dataset) -> NDArray[np.int64]:
    if "length" not in encoded.column_names:
        return np.arange(len(encoded))
    return np.argsort(encoded["length"][:], kind="stable")


def _joined(names: Sequence[str], chosen: NDArray[np.bool_]) -> str:
    return SEPARATOR.join(name for name, yes in zip(names, chosen, strict=True) if yes)


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
