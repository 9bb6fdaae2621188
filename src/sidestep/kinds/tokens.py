"""Tags of words: entities, parts of speech and the like."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from scipy.special import softmax

from sidestep.data import Augmentation, DataError, DataWarning, Fields, LabelSpace, Separators
from sidestep.data.joins import NOTHING
from sidestep.data.tagged import (
    ENDS,
    OUTSIDE,
    PLACES,
    SPLIT,
    STARTS,
    TAGS,
    TEXT,
    WORDS,
    CollateTagged,
    encode_tagged,
    tag_space,
)
from sidestep.data.windows import ROW
from sidestep.kinds.assess import Assessment, OfClass
from sidestep.kinds.base import PREDICTION, Probabilities, register
from sidestep.kinds.entities import Scheme
from sidestep.kinds.from_tokens import FromTokens, Outputs
from sidestep.kinds.steps import check_text_alone
from sidestep.kinds.task_data import TaskData
from sidestep.metrics import IGNORED, METRICS
from sidestep.model.heads import Tag

PREDICTED_TAGS = "predicted_tags"


class Words(NamedTuple):
    """The words of one row of the user's.

    Attributes:
        found: (words,) numbers of the predicted tags.
        shares: (words,) their probabilities.
        true: (words,) numbers of the tags. Empty where there are none.
        starts, ends: (words,) places in the text.
        text: of the row.
        split: whether the row came as words.
    """

    found: NDArray[Any]
    shares: NDArray[Any]
    true: NDArray[Any]
    starts: list[int]
    ends: list[int]
    text: str
    split: bool


@register
class Tokens(FromTokens):
    """A tag for each word.

    Rows are lists of words with lists of tags, or texts with lists of spans.
    """

    name = "tokens"
    answer = "a tag of {names} for each word"
    metrics, best = METRICS["tokens"], "f1"
    beside = (WORDS, PLACES, STARTS, ENDS, TAGS, TEXT, SPLIT)
    own_head = "tokens"

    def check_columns(self, rows: Dataset, fields: Fields) -> None:
        """Refuses anything but one column of texts or words."""
        check_text_alone(rows, fields, self.name)

    def labels(self, rows: Dataset, fields: Fields) -> LabelSpace:
        """The tags of the training rows."""
        return tag_space(rows, fields, self.name)

    def encode(
        self,
        rows: Dataset,
        fields: Fields,
        processor: Any,
        labels: LabelSpace | None,
        max_length: int | None,
        augment: Augmentation | None = None,
        *,
        separators: Separators = NOTHING,
    ) -> tuple[Dataset, int]:
        """Windows with a label at the first token of each word."""
        self.check_columns(rows, fields)
        encoded, cut = encode_tagged(rows, fields, processor, labels, max_length)
        if labels is not None:
            _warn_of_broken(encoded, labels, fields.label)
        return encoded, cut

    def collate(self, fields: Fields, processor: Any) -> CollateTagged:
        """Labels padded as their texts are."""
        return CollateTagged(processor, padding_side="right")

    def head(self, data: TaskData, pool: Any = None) -> Tag:
        """A logit for each tag and token."""
        return Tag(num_labels=data.labels.outputs, labels=data.labels.names, pool=pool)

    def blank_head(self, outputs: int, pool: Any = None) -> Tag:
        """The same for a plan."""
        return Tag(num_labels=outputs, pool=pool)

    def score(self, outputs: Outputs, encoded: Dataset, labels: LabelSpace) -> Assessment:
        """Precision, recall and F1 of entities, and the share of words with the right tag."""
        scheme, names = Scheme(labels.names), labels.names
        rows = [*_by_row(encoded, outputs, labels)]
        kept = [row.true != IGNORED for row in rows]
        found, true = (
            [[names[number] for number in part[keep]] for part, keep in zip(parts, kept, strict=True)]
            for parts in ([row.found for row in rows], [row.true for row in rows])
        )
        flat = [tag for tags in true for tag in tags]
        if not flat:
            raise DataError("no word has a label, so there is nothing to score")
        right = sum(
            own == other
            for tags, others in zip(found, true, strict=True)
            for own, other in zip(tags, others, strict=True)
        )
        usual, count = Counter(flat).most_common(1)[0]
        scored = scheme.scores(found, true)
        constant = scheme.scores([[usual] * len(tags) for tags in true], true)
        counts = Counter(entity.type for tags in true for entity in scheme.entities(tags))
        return Assessment(
            scores={
                "f1": scored.f1,
                "precision": scored.precision,
                "recall": scored.recall,
                "accuracy": right / len(flat),
            },
            constant={"f1": constant.f1, "accuracy": count / len(flat)},
            classes={
                name: OfClass(rows=counts[name], recall=recall if counts[name] else None, f1=f1)
                for name, (recall, f1) in scored.of_type.items()
            },
        )

    def columns(
        self, outputs: Outputs, encoded: Dataset, labels: LabelSpace, probabilities: Probabilities
    ) -> dict[str, list[Any]]:
        """The entities of each row, with text, places and probability, and the tag of each word.

        Places are characters, or words where rows came as words. The probability is that of the least certain word.
        """
        scheme, names = Scheme(labels.names), labels.names
        spans: list[list[dict[str, Any]]] = []
        tags: list[list[str]] = []
        for row in _by_row(encoded, outputs, labels):
            own = [names[number] for number in row.found]
            tags.append(own)
            spans.append([])
            for kind, start, end in scheme.entities(own):
                places = (start, end) if row.split else (row.starts[start], row.ends[end - 1])
                span: dict[str, Any] = {
                    "type": kind,
                    "text": row.text[row.starts[start] : row.ends[end - 1]],
                    "start": places[0],
                    "end": places[1],
                }
                if probabilities != "none":
                    span["probability"] = float(row.shares[start:end].min())
                spans[-1].append(span)
        return {PREDICTION: spans, PREDICTED_TAGS: tags}


def _by_row(encoded: Dataset, outputs: Outputs, labels: LabelSpace) -> Iterator[Words]:
    """The words of each row in their order, from all of its windows."""
    table = encoded.with_format(None)
    names = [ROW, WORDS, PLACES, STARTS, ENDS, TEXT, SPLIT, *([TAGS] if TAGS in table.column_names else [])]
    columns = {name: table[name][:] for name in names}
    windows: dict[int, list[int]] = {}
    for window, row in enumerate(columns[ROW]):
        windows.setdefault(row, []).append(window)
    outside = labels.names.index(OUTSIDE) if OUTSIDE in labels.names else 0
    for own in windows.values():
        words: list[tuple[int, int, float, int, int, int]] = []
        for window in own:
            shares = softmax(outputs[window].astype(np.float64), axis=-1)
            last = -1
            true = columns[TAGS][window] if TAGS in columns else [IGNORED] * len(columns[WORDS][window])
            parts = (columns[WORDS][window], columns[PLACES][window], columns[STARTS][window], columns[ENDS][window])
            for word, place, start, end, tag in zip(*parts, true, strict=True):
                best = outside if place < 0 else int(shares[place].argmax())
                share = float(shares[place, best]) if place >= 0 else 1.0
                if place == last and place >= 0:  # two words of one token: the second goes on with the first
                    best = _going_on(labels.names, best)
                last = place
                words.append((word, best, share, tag, start, end))
        words.sort()
        first = own[0]
        yield Words(
            found=np.array([word[1] for word in words], dtype=int),
            shares=np.array([word[2] for word in words]),
            true=np.array([word[3] for word in words], dtype=int),
            starts=[word[4] for word in words],
            ends=[word[5] for word in words],
            text=columns[TEXT][first],
            split=columns[SPLIT][first],
        )


def _going_on(names: tuple[str, ...], tag: int) -> int:
    """The tag that goes on with what this one begins."""
    on = f"I-{names[tag][2:]}"
    return names.index(on) if names[tag].startswith("B-") and on in names else tag


def _warn_of_broken(encoded: Dataset, labels: LabelSpace, column: str | None) -> None:
    """Say how many words go on with what did not begin: they are read as beginnings."""
    scheme = Scheme(labels.names)
    if not scheme.prefixed:
        return
    table = encoded.with_format(None)
    rows: dict[int, list[tuple[int, int]]] = {}
    for row, words, tags in zip(table[ROW][:], table[WORDS][:], table[TAGS][:], strict=True):
        rows.setdefault(row, []).extend(zip(words, tags, strict=True))
    of_rows = (sorted(words) for words in rows.values())
    broken = sum(
        scheme.broken([OUTSIDE if tag == IGNORED else labels.names[tag] for _, tag in words]) for words in of_rows
    )
    if broken:
        warnings.warn(
            f"column {column!r} has {broken} tags I- that go on with nothing or with another type. As the standard "
            "scorer does, each is read as a beginning",
            DataWarning,
            stacklevel=2,
        )
