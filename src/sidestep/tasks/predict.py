"""What a task says about rows: logits or texts, scores, and a table with label names and probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast, get_args

from datasets import ClassLabel, Dataset

from sidestep import ranks
from sidestep.data import Collate, DataError, Fields, Generation, Kind, LabelSpace
from sidestep.data.media import name_of, undecoded
from sidestep.disk.feature_options import FeatureOptions
from sidestep.kinds.assess import Assessment
from sidestep.kinds.base import OWN, PROBABILITY, Probabilities, kind_named
from sidestep.kinds.prepare import stored_labels
from sidestep.kinds.running import written
from sidestep.kinds.task_data import TaskData, stored_fields, stored_generation, stored_separators
from sidestep.measure.rows import rows_at_once
from sidestep.model.attach import Attached
from sidestep.model.heads import Classify, Tag
from sidestep.model.outputs import gives_spans
from sidestep.model.pair_model import PairModel
from sidestep.model.side_model import SideModel
from sidestep.tasks.features import Tell, kept_features

Rows: TypeAlias = Dataset | Sequence[Mapping[str, Any]]
"""As `data.read` gives them, or a list of dictionaries."""


def evaluate(
    model: Attached,
    rows: Rows,
    *,
    fields: Fields | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    features: FeatureOptions | None = None,
) -> dict[str, float]:
    """The scores of a task on rows with labels. If it writes texts, they are the scores of the texts.

    Processes that a launcher has started share the rows. Each gets the scores of all.

    Args:
        model: with `extras["processor"]` and `extras["preprocessing"]`, as `load` and `train` leave it.
        rows: see `Rows`.
        fields: None: the columns that the task was trained on.
        batch_size: rows of one pass. None: `rows_at_once`.
        progress: whether a bar is shown.
        features: where what frozen blocks compute of the rows is kept. None: not at all.

    Raises:
        DataError: for missing columns, and labels that training never had.
    """
    return judge(model, rows, fields=fields, batch_size=batch_size, progress=progress, features=features).scores


def judge(
    model: Attached,
    rows: Rows,
    *,
    fields: Fields | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    features: FeatureOptions | None = None,
    tell: Tell | None = None,
) -> Assessment:
    """As `evaluate`, with what the scores are to be compared with. `tell` is told what is stored."""
    ranks.begin()
    rows, (fields, labels) = as_dataset(rows), _reading(model, fields)
    if fields.label is None and not kind_named(labels.kind).dual:
        raise DataError("scores need a label column: name it (--label)")
    encoded = _encode(model, rows, fields, labels)
    how: dict[str, Any] = {"batch_size": batch_size or _rows_at_once(model), "progress": progress}
    if features is not None:
        data = only(model, encoded, fields, labels)
        kept = kept_features(model, data, features, passes=1, autocast=False, tell=tell, **how)
        if kept is not None:
            encoded, how["collate"] = kept.data.train, kept.data.collate
    return judge_encoded(model, encoded, fields, labels, _generation(model), workers=0, **how)


def only(model: Attached, encoded: Dataset, fields: Fields, labels: LabelSpace) -> TaskData:
    """Rows with labels as the data of a task that is not trained."""
    kind, stored = kind_named(labels.kind), model.extras.get("preprocessing") or {}
    return TaskData(
        train=encoded,
        dev=encoded.select(range(0)),
        labels=labels,
        fields=fields,
        processor=model.extras["processor"],
        max_length=stored.get("max_length"),
        truncated=0,
        dev_source="",
        collator=kind.collate,
        generation=stored_generation(stored) if kind.writes else None,
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
    collate: Collate | None = None,
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
        collate: makes batches of rows whose frozen part is stored. None: they hold all that the backbone reads.
    """
    how: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": progress}
    if collate is not None and collate.features is not None:
        how["collate"] = collate
    return kind_named(labels.kind).judge(model, encoded, fields, labels, generation, **how)


def predict(
    model: Attached,
    rows: Rows,
    *,
    fields: Fields | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    probabilities: Probabilities = "all",
) -> Dataset:
    """The rows with a column "prediction" and, for classes, one "p_NAME" with the probability of each.

    Of retrieval, what is closest to each image and each caption (see `retrieval.neighbours`).

    Processes that a launcher has started share the rows. Each gets the answers to all.

    Several labels of a row are joined by "|". An image or a sound stays as its path. A text is as the model writes it.

    Args:
        model: as for `evaluate`.
        rows: see `Rows`. Labels are not needed.
        fields: None: the columns that the task was trained on.
        batch_size: rows of one pass. None: `rows_at_once`.
        progress: whether a bar is shown.
        probabilities: "one" gives instead of those columns a single one, "probability", of what is predicted (of
            several labels joined as they are). "none" gives no such column.

    Raises:
        DataError: for missing columns, or a column that has the name of one of these.
    """
    ranks.begin()
    check_probabilities(probabilities)
    rows, (fields, labels) = as_dataset(rows), _reading(model, fields)
    kind = kind_named(labels.kind)
    how: dict[str, Any] = {"batch_size": batch_size or _rows_at_once(model), "progress": progress}
    read = rows if kind.dual else _encode(model, rows, fields, None)
    columns = kind.predict(model, read, fields, labels, probabilities, **how)
    if isinstance(columns, Dataset):
        return columns
    taken = [name for name in columns if name in rows.column_names]
    if taken:
        raise DataError(f"the rows have columns named {', '.join(taken)} already: rename them")
    table = _readable(rows, fields)
    for name, values in columns.items():
        table = table.add_column(name, values)
    return table


def check_probabilities(asked: str) -> Probabilities:
    """The way to write probabilities that a user named.

    Raises:
        DataError: if it is unknown.
    """
    if asked not in get_args(Probabilities):
        raise DataError(f"probabilities={asked!r}: choose {', '.join(get_args(Probabilities))}")
    return cast(Probabilities, asked)


def share_columns(found: Dataset, rows: Dataset) -> list[str]:
    """The columns of probabilities that predicting has added to rows."""
    new = [name for name in found.column_names if name not in rows.column_names]
    return [name for name in new if name == OWN or name.startswith((PROBABILITY, f"{OWN}_"))]


def first_answers(model: Attached, data: TaskData, count: int = 3) -> list[tuple[int, str, str]]:
    """The first dev rows of a task that writes texts: number, expected text, written text. For other tasks empty."""
    if data.generation is None:
        return []
    assert isinstance(model, SideModel)
    rows = data.dev.select(range(min(count, len(data.dev))))
    texts = zip(rows["target"][:], written(model, rows, data.generation), strict=True)
    clean = data.separators.without_start
    return [(number, clean(target), clean(text)) for number, (target, text) in enumerate(texts, start=1)]


def _reading(model: Attached, fields: Fields | None) -> tuple[Fields, LabelSpace]:
    preprocessing = model.extras.get("preprocessing") or {}
    if model.extras.get("processor") is None:
        raise DataError(
            "this task holds no tokenizer, image processor or feature extractor: set model.extras['processor']"
        )
    return fields or stored_fields(preprocessing), labels_of_task(model)


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
    if isinstance(head, Classify | Tag):
        names = head.labels or map(str, range(head.num_labels))
        return kind_named(head.kind).stored_labels(tuple(names))
    if head is not None:
        return kind_named(head.kind).stored_labels(())
    if gives_spans(model.backbone):
        return LabelSpace("spans", ())
    if getattr(config, "problem_type", None) == "regression":
        return LabelSpace("regress", ())
    if config is None or not config.id2label:
        raise DataError("this task does not say what it predicts: train it with `sidestep train`, or a Sidestep head")
    kind: Kind = "multi" if config.problem_type == "multi_label_classification" else "single"
    return LabelSpace(kind, tuple(config.id2label[index] for index in sorted(config.id2label)))


def _encode(model: Attached, rows: Dataset, fields: Fields, labels: LabelSpace | None) -> Dataset:
    """Rows as the task reads them, without labels if `labels` is None."""
    stored = model.extras.get("preprocessing") or {}
    kind = kind_named(labels_of_task(model).kind)
    wanted = replace(fields, label=fields.label if labels else None)
    separators, processor = stored_separators(stored), model.extras["processor"]
    return kind.encode(rows, wanted, processor, labels, stored.get("max_length"), separators=separators)[0]


def encoded_for(model: Attached, rows: Dataset, fields: Fields) -> Dataset:
    """Rows without labels, as a task reads them."""
    return _encode(model, rows, fields, None)


def labels_of_task(model: Attached) -> LabelSpace:
    """What a task predicts: as it is stored, or as its head says."""
    stored = model.extras.get("preprocessing") or {}
    return stored_labels(stored) if "problem" in stored else labels_of(model)


def _rows_at_once(model: Attached) -> int:
    """Rows of one pass over rows that may be as long as the task reads them."""
    return rows_at_once(model, (model.extras.get("preprocessing") or {}).get("max_length"))


def _generation(model: Attached) -> Generation:
    return stored_generation(model.extras.get("preprocessing") or {})


def _readable(rows: Dataset, fields: Fields) -> Dataset:
    """The rows with an image or a sound as its path and a class number as its name."""
    rows = rows.with_format(None)
    for name, feature in rows.features.items():
        if isinstance(feature, ClassLabel):
            names = [None if index is None or index < 0 else feature.names[index] for index in rows[name][:]]
            rows = _replaced(rows, name, names)
        elif fields.files is not None and name == fields.files[1] and fields.files[0].holds(feature):
            paths = [name_of(cell, index) for index, cell in enumerate(undecoded(rows, name)[name][:])]
            rows = _replaced(rows, name, paths)
    return rows


def _replaced(rows: Dataset, name: str, cells: list[Any]) -> Dataset:
    """The rows with other cells in a column."""
    beside = f"{name} in other words"  # first added, as a table without a column has no rows
    return rows.add_column(beside, cells).remove_columns(name).rename_column(beside, name)
