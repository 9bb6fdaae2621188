"""The ways in which tasks read rows and answer them. Tasks of one form share batches, and passes of the backbone."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from sidestep.backbone import device_of
from sidestep.backbone.processors import tokenizer_of
from sidestep.data import DataError, Fields, LabelSpace, Separators
from sidestep.data.encode import Pixels, Tokenize, token_limit
from sidestep.data.images import IMAGES, size_of
from sidestep.data.windows import ROW
from sidestep.kinds.base import OWN, PREDICTION, PROBABILITY, Probabilities, TaskKind
from sidestep.kinds.from_logits import FromLogits
from sidestep.kinds.from_tokens import FromTokens
from sidestep.serve.cells import FILES, Row, cells_of
from sidestep.serve.problems import Problem
from sidestep.tasks.bank import TaskBank
from sidestep.tasks.predict import predict

Answer = dict[str, Any]
PIXELS = 50_000_000
"""Of a picture. A small file can hold very many."""
NOT_FINITE = Problem(
    "internal", "the task's outputs are not finite numbers", "Train the task with a lower learning rate, or in float32"
)


@dataclass(frozen=True)
class Piece:
    """A row as some tasks read it.

    Attributes:
        parts: encoded rows. Several of them are windows of a long text.
        length: tokens of the longest part. Of pictures 1.
        tokens: of all parts.
        cut: whether tokens were left out.
    """

    parts: list[Any]
    length: int = 1
    tokens: int = 0
    cut: bool = False


@dataclass(frozen=True)
class Known:
    """What is known of a task that is served.

    Attributes:
        name: in the bank.
        identity: of its files.
        kind: of its answers.
        labels: that it predicts.
        form: how it reads rows. None: see `refused`.
        refused: why it is not answered as a row.
        embeds: how its texts become embeddings, where they do.
    """

    name: str
    identity: str
    kind: TaskKind
    labels: LabelSpace
    form: Form | None
    refused: str = ""
    embeds: Form | None = None


@dataclass(frozen=True)
class Asking:
    """A task of a batch.

    Attributes:
        known: what is known of it.
        places: of the pieces that it is asked for, in order.
    """

    known: Known
    places: Sequence[int]


class Form(ABC):
    """How some tasks read rows.

    Attributes:
        key: equal for tasks that share batches.
        writes: whether they write texts, in a lane of their own.
    """

    key: Hashable
    writes: bool = False

    @abstractmethod
    def read(self, rows: Sequence[Row]) -> list[Piece | Problem]:
        """Each row as the tasks read it, or why it cannot be read. Any thread may call this."""

    @abstractmethod
    def run(
        self, bank: TaskBank, pieces: Sequence[Piece], tasks: Mapping[str, Asking], modes: Sequence[Probabilities]
    ) -> dict[str, list[Answer | Problem]]:
        """The answers of each task to its pieces, in order. It is called in the bank's turn, one call at a time.

        Args:
            bank: of the tasks.
            pieces: as `read` gives them.
            tasks: by name.
            modes: which probabilities each piece's answers have.
        """


@dataclass(eq=False)
class Reading(Form):
    """How tasks with stored fields and a processor read rows.

    Attributes:
        fields: columns.
        kind: of a task that reads so.
        processor: tokenizer, image processor or another.
        max_length: tokens kept.
        separators: between texts.
        takes: names of what a model's forward takes.
        most: token ids that the backbone has embeddings for.
        picture: the token that stands for a part of a picture.
    """

    key: Hashable
    fields: Fields
    kind: TaskKind
    processor: Any
    max_length: int | None
    separators: Separators
    takes: frozenset[str] = frozenset()
    most: int | None = None
    picture: int | None = None
    writes: bool = False
    # a fast tokenizer cuts all texts as one thread has set it last
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, rows: Sequence[Row]) -> list[Piece | Problem]:
        """Cells first, each row for itself, then all that are good together."""
        found: list[Piece | Problem | None] = []
        good: list[tuple[int, dict[str, Any]]] = []
        for place, row in enumerate(rows):
            try:
                good.append((place, cells_of(row, self.fields)))
                found.append(None)
            except Problem as problem:
                found.append(problem)
        for (place, _), piece in zip(good, self._together([cells for _, cells in good]), strict=True):
            found[place] = piece
        return [each for each in found if each is not None]

    def _together(self, cells: list[dict[str, Any]]) -> list[Piece | Problem]:
        """Encoded together. If one of them cannot be, each for itself."""
        if not cells:
            return []
        try:
            with self.lock:
                return [*self.encode(cells)]
        except Problem as problem:
            if len(cells) == 1:
                return [problem]
        # what a tokenizer, an image or a sound library raises for an odd cell is of any type
        except Exception as error:
            if len(cells) == 1:
                told = str(error) if isinstance(error, DataError) else f"it cannot be read ({type(error).__name__})"
                return [Problem("bad-row", told, "Correct the row, or leave it out")]
        return [piece for each in cells for piece in self._together([each])]

    @abstractmethod
    def encode(self, cells: list[dict[str, Any]]) -> Sequence[Piece | Problem]:
        """Rows by column as pieces, in one call."""

    def check(self, ids: Sequence[int], column: str) -> None:
        """Refuse tokens that the backbone has no embeddings for. On a GPU they would stop the process."""
        if not ids:
            raise Problem("bad-row", f"{column!r} gives no token", "Leave the row out")
        if self.most is not None and max(ids) >= self.most:
            raise Problem(
                "bad-row",
                f"{column!r} has token {max(ids)}, and the backbone has embeddings for {self.most} tokens",
                "Serve the task with the tokenizer that was saved with the backbone",
            )
        if self.fields.image is None and self.picture in ids:
            raise Problem("bad-row", f"{column!r} holds the token of a picture", "Take it out of the text")

    def tokenize(self, cells: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """Token ids of the texts, with "length" and "truncated"."""
        fields, tokenizer = self.fields, tokenizer_of(self.processor)
        assert fields.text is not None
        for each in cells:
            for column in (fields.text, fields.text2):
                if column is not None and not isinstance(each[column], str):
                    raise Problem("bad-row", f"{column!r} holds a list", "Give the task a text")
        limit = token_limit(tokenizer, self.max_length, pair=fields.text2 is not None)
        call = Tokenize(tokenizer, fields.text, fields.text2, limit, self.separators.pair, "")
        columns = [column for column in (fields.text, fields.text2) if column is not None]
        return call({column: [each[column] for each in cells] for column in columns})


class Rows(Reading):
    """Classes and numbers: a row is encoded once, and its outputs are the head's."""

    def encode(self, cells: list[dict[str, Any]]) -> Sequence[Piece | Problem]:
        """Texts and pictures without a table, others as their kind does it."""
        fields = self.fields
        if fields.text is not None and fields.image is None:
            found = self.tokenize(cells)
            return [self._text(found, place) for place in range(len(cells))]
        if fields.image is not None and fields.text is None:
            images = [_picture(each[fields.image]) for each in cells]
            pixels = Pixels(self.processor, None)(images, [None] * len(images))["pixel_values"]
            return [Piece([{"pixel_values": each}]) for each in pixels]
        return [self._other(row) for row in _encoded(self, cells)]

    def _other(self, row: dict[str, Any]) -> Piece | Problem:
        if "input_ids" not in row:
            return Piece([row])
        self.check(row["input_ids"], self.fields.text or "")
        return Piece([row], int(row["length"]), int(row["length"]))

    def _text(self, found: dict[str, list[Any]], place: int) -> Piece | Problem:
        row = {name: values[place] for name, values in found.items()}
        cut, length = row.pop("truncated"), row["length"]
        try:
            self.check(row["input_ids"], self.fields.text or "")
        except Problem as problem:
            return problem
        return Piece([row], length, length, cut)

    def run(
        self, bank: TaskBank, pieces: Sequence[Piece], tasks: Mapping[str, Asking], modes: Sequence[Probabilities]
    ) -> dict[str, list[Answer | Problem]]:
        """One call of the bank for all tasks, each on its own rows."""
        parts = [piece.parts[0] for piece in pieces]
        rows = {name: task.places for name, task in tasks.items()}
        outputs = bank(_batch(bank, self, parts), tasks=list(tasks), rows=rows)
        answers: dict[str, list[Answer | Problem]] = {}
        for name, task in tasks.items():
            assert isinstance(task.known.kind, FromLogits)
            logits = outputs[name].logits.float().cpu().numpy()
            own = [modes[place] for place in task.places]
            by_mode = {mode: _columns(task.known, logits, mode) for mode in set(own)}
            finite = np.isfinite(logits).all(axis=1)
            answers[name] = [
                answer_at(by_mode[mode], row) if finite[row] else NOT_FINITE for row, mode in enumerate(own)
            ]
        return answers


@dataclass(eq=False)
class Windows(Reading):
    """Tags and spans: a row is one or several windows, and its outputs are those of their tokens.

    Attributes:
        max_tokens: of a pass, padding included. A long text has many windows.
    """

    max_tokens: int = 16384

    def encode(self, cells: list[dict[str, Any]]) -> Sequence[Piece | Problem]:
        """The windows of each row."""
        windows: dict[int, list[Any]] = {}
        for row in _encoded(self, cells):
            windows.setdefault(row[ROW], []).append(row)
        for own in windows.values():
            for row in own:
                self.check(row["input_ids"], self.fields.text or "")
        return [
            Piece(own, max(row["length"] for row in own), sum(row["length"] for row in own))
            for own in (windows[place] for place in range(len(cells)))
        ]

    def run(
        self, bank: TaskBank, pieces: Sequence[Piece], tasks: Mapping[str, Asking], modes: Sequence[Probabilities]
    ) -> dict[str, list[Answer | Problem]]:
        """One call of the bank for all tasks, or several where there are very many windows."""
        parts = [{**part, ROW: place} for place, piece in enumerate(pieces) for part in piece.parts]
        outputs: dict[str, list[NDArray[Any]]] = {name: [] for name in tasks}
        windows = {name: _windows_of(parts, task.places) for name, task in tasks.items()}
        step = max(1, self.max_tokens // max(part["length"] for part in parts))
        for start in range(0, len(parts), step):
            some = parts[start : start + step]
            rows = {
                name: [each - start for each in own if start <= each < start + step] for name, own in windows.items()
            }
            rows = {name: own for name, own in rows.items() if own}
            for name, output in bank(_batch(bank, self, some), tasks=list(rows), rows=rows).items():
                found = _token_outputs(output)
                outputs[name] += [values[: some[row]["length"]] for values, row in zip(found, rows[name], strict=True)]
        encoded = Dataset.from_list(parts)
        answers: dict[str, list[Answer | Problem]] = {}
        for name, task in tasks.items():
            kind, labels, own = task.known.kind, task.known.labels, windows[name]
            assert isinstance(kind, FromTokens)
            odd = {parts[each][ROW] for each, one in zip(own, outputs[name], strict=True) if not np.isfinite(one).all()}
            clean = [np.nan_to_num(one) for one in outputs[name]] if odd else outputs[name]
            its = encoded if len(own) == len(parts) else encoded.select(own)
            asked = [modes[place] for place in task.places]
            by_mode = {mode: kind.columns(clean, its, labels, mode) for mode in set(asked)}
            answers[name] = [
                NOT_FINITE if place in odd else answer_at(by_mode[mode], row)
                for row, (place, mode) in enumerate(zip(task.places, asked, strict=True))
            ]
        return answers


class Alone(Reading):
    """Texts to write, boxes, and tasks on a dual encoder: by `predict`, one task after the other."""

    def encode(self, cells: list[dict[str, Any]]) -> Sequence[Piece | Problem]:
        """The cells as they are, with the length of the texts. Pictures are opened, to find the broken ones."""
        fields = self.fields
        if fields.image is not None:
            for each in cells:
                _picture(each[fields.image])
        if fields.text is None:
            return [Piece([each]) for each in cells]
        found = self.tokenize(cells)
        for ids in found["input_ids"]:
            self.check(ids, fields.text)
        sizes = zip(cells, found["length"], found["truncated"], strict=True)
        return [Piece([each], length, length, cut) for each, length, cut in sizes]

    def run(
        self, bank: TaskBank, pieces: Sequence[Piece], tasks: Mapping[str, Asking], modes: Sequence[Probabilities]
    ) -> dict[str, list[Answer | Problem]]:
        """As `sidestep predict` does it."""
        table = _table(self, [piece.parts[0] for piece in pieces])
        answers: dict[str, list[Answer | Problem]] = {}
        for name, task in tasks.items():
            model, rows, own = bank.activate(name), table.select(task.places), [modes[place] for place in task.places]
            by_mode = {}
            for mode in set(own):
                found = predict(model, rows, fields=self.fields, batch_size=len(rows), probabilities=mode)
                by_mode[mode] = {name: found[name][:] for name in found.column_names if name not in rows.column_names}
            answers[name] = [answer_at(by_mode[mode], row) for row, mode in enumerate(own)]
        return answers


def _windows_of(parts: Sequence[Mapping[str, Any]], places: Sequence[int]) -> list[int]:
    """The numbers of the windows of some pieces."""
    wanted = set(places)
    return [number for number, part in enumerate(parts) if part[ROW] in wanted]


def answer_at(columns: Mapping[str, Sequence[Any]], place: int) -> Answer:
    """A row's answer, from columns as a kind of task gives them. Probabilities of classes stand in one object."""
    answer: Answer = {PREDICTION: columns[PREDICTION][place]}
    shares: dict[str, Any] = {}
    for name, values in columns.items():
        if name.startswith(PROBABILITY):
            shares[name.removeprefix(PROBABILITY)] = values[place]
        else:
            answer[name] = values[place]
    return {**answer, "probabilities": shares} if shares else answer


def _picture(cell: dict[str, Any]) -> Any:
    """A picture, if its header does not tell of too many pixels to open."""
    width, height = size_of(cell, 1)
    if width * height > PIXELS:
        raise Problem("bad-row", f"the picture has {width} x {height} pixels", f"Send one of at most {PIXELS} pixels")
    return IMAGES.decode(cell, None)


def _columns(known: Known, logits: NDArray[Any], mode: Probabilities) -> dict[str, list[Any]]:
    """With "all" also the probability of what is predicted, which a table of `predict` leaves out."""
    assert isinstance(known.kind, FromLogits)
    columns = known.kind.columns(known.labels, logits, mode)
    if mode == "all" and OWN not in columns:
        columns |= known.kind.columns(known.labels, logits, "one")
    return columns


def _batch(bank: TaskBank, form: Reading, parts: Sequence[Any]) -> dict[str, Any]:
    """Tensors of encoded rows, on the backbone's device."""
    collate, device = form.kind.collate(form.fields, form.processor), device_of(bank.backbone)
    given = collate([{name: value for name, value in part.items() if name != "labels"} for part in parts])
    return {name: value.to(device) for name, value in given.items() if name in form.takes}


def _token_outputs(output: Any) -> NDArray[Any]:
    """(windows, tokens, outputs): of a Sidestep head, or of the backbone's own of spans."""
    if "start_logits" in output:
        parts = (output.start_logits, output.end_logits)
        return np.stack([part.float().cpu().numpy() for part in parts], axis=-1)
    found: NDArray[Any] = output.logits.float().cpu().numpy()
    return found


def _table(form: Reading, cells: Sequence[dict[str, Any]]) -> Dataset:
    """Rows as a data set, whose files have their type."""
    rows = Dataset.from_list([dict(each) for each in cells])
    for name in FILES:
        column = getattr(form.fields, name)
        if column is not None and form.fields.files is not None:
            rows = rows.cast_column(column, form.fields.files[0].feature)
    return rows


def _encoded(form: Reading, cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as their kind encodes them. A picture or a sound is decoded here."""
    encoded, _ = form.kind.encode(
        _table(form, cells), form.fields, form.processor, None, form.max_length, separators=form.separators
    )
    return [encoded[place] for place in range(len(encoded))]
