"""Rows of a task whose frozen part is stored: what is computed of them once, and how batches get it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from sidestep import ranks
from sidestep.data import Collate
from sidestep.data.contents import row_ids
from sidestep.disk.features import Entry, FeatureStore, name_of
from sidestep.fold import Route, States
from sidestep.kinds.base import UNREAD, kind_named
from sidestep.kinds.feature_keys import key_of
from sidestep.kinds.task_data import TaskData
from sidestep.measure.step import accepted, synchronize
from sidestep.model.features import VECTOR, FeaturesRefused, Recorded, find_route, record
from sidestep.model.side_model import SideModel

STORED = "stored"
"""Column with the number of a row among those that are stored."""
SHARD = 64 * 2**20
"""Bytes of a shard, about. What is computed when a run is killed is lost up to so much."""
PART = 8
"""Batches that a process claims at once. Several processes may fill one folder."""
PARTS = 256
"""Of many rows more are claimed at once, so that there are at most so many parts."""
EXCHANGED = 256
"""Rows whose states are sent to other processes at one time."""
LOOKED_AT = 4
"""Rows of the pass that is looked at, to see what is to be stored."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""How far a state may be from what is stored of it, relative to its norm, by its precision."""


@dataclass(frozen=True)
class Feed:
    """Gives a collator the states of rows. See `data.Collate`.

    Attributes:
        entry: where they are stored.
        route: which they are.
        ids: of the rows, by their number.
        left: whether texts are padded on the left.
        absent: stand-ins for inputs that rows do not hold any more.
    """

    entry: Entry
    route: Route
    ids: Sequence[bytes]
    left: bool
    absent: Mapping[str, Tensor]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> States:
        """The states of a batch."""
        return self.states([self.ids[row[STORED]] for row in rows])

    def states(self, ids: Sequence[bytes]) -> States:
        """The states of the rows with these ids."""
        rows = {name: [self.entry.state(row, name) for row in ids] for name in self.route.places}
        found = {name: self._padded(states) for name, states in rows.items()}
        if self.route.places != (VECTOR,):
            return States(self.route, found, absent=self.absent)
        vector = found[VECTOR].to(self.route.dtypes[VECTOR])
        if self.route.single:
            return States(self.route, vector=vector[:, 0])
        keep = self._padded([row.new_ones(len(row), 1, dtype=torch.bool) for row in rows[VECTOR]])[..., 0]
        return States(self.route, vector=vector, keep=keep)

    def _padded(self, rows: list[Tensor]) -> Tensor:
        longest = max(len(row) for row in rows)
        if all(len(row) == longest for row in rows):
            return torch.stack(rows)
        padded = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
        for place, row in zip(padded, rows, strict=True):
            place[longest - len(row) if self.left else 0 :][: len(row)] = row
        return padded


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What it will take to store what is lacking.

    Attributes:
        rows: that are lacking.
        size: bytes of their states.
        seconds: to compute them.
        fetching: seconds to read them back in batches.
    """

    rows: int
    size: int
    seconds: float
    fetching: float


@dataclass
class Features:
    """The stored part of a task's rows.

    Attributes:
        model: whose frozen part it is.
        data: the rows as they are, with all that the backbone reads.
        entry: where the states are stored.
        route: which they are.
        ids: of the training rows, then of the dev rows.
        lengths: the same of their tokens or samples. Of images 1.
        rounded: whether they are stored in bfloat16.
        batch_size: rows of one frozen pass.
        autocast: whether that pass runs under autocast to bfloat16.
        absent: stand-ins for inputs that need not be read any more.
    """

    model: SideModel
    data: TaskData
    entry: Entry
    route: Route
    ids: Sequence[bytes]
    lengths: Sequence[int]
    rounded: bool
    batch_size: int
    autocast: bool
    absent: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, model: SideModel, data: TaskData, store: FeatureStore, *, rounded: bool, batch_size: int, autocast: bool
    ) -> Features:
        """The features of a task. One batch is run, to see what is to be stored.

        Raises:
            FeaturesRefused: if they cannot be stored, saying why.
        """
        if data.augment is not None:
            raise FeaturesRefused("its images are other views in each epoch (--augment)")
        leaving = tuple(name for name in _unread(data) if not (data.generation is not None and name == "labels"))
        ids = [*row_ids(data.train, leaving), *row_ids(data.dev, leaving)]
        lengths = [*_lengths(data.train), *_lengths(data.dev)]
        batch = data.collate([data.train[number] for number in range(min(LOOKED_AT, len(data.train)))])
        if data.fields.audio is not None and len(set(lengths)) > 1 and "attention_mask" not in batch:
            raise FeaturesRefused("its sounds differ in length and have no mask, so states depend on the whole batch")
        with _autocast(model, autocast):
            inputs = _inputs(model, batch, writes=data.generation is not None)
            route = find_route(model, inputs, unread=_of_one_size(data))
        key = key_of(model, data, route, rounded=rounded, autocast=autocast)
        absent = stand_ins(model, route, batch, unread=_of_one_size(data))
        return cls(model, data, store.entry(key), route, ids, lengths, rounded, batch_size, autocast, absent)

    def moved(self, store: FeatureStore) -> Features:
        """The same rows, to be stored elsewhere."""
        return replace(self, entry=store.entry(self.entry.key))

    # --- how much there is ------------------------------------------------------------------------------------------

    @property
    def lacking(self) -> list[int]:
        """The numbers of the rows that are not stored yet, the shortest first."""
        return sorted(self.entry.lacking(self.ids, self.route.places), key=self.lengths.__getitem__)

    def forecast(self) -> Forecast:
        """What it will take to compute what is lacking, by a batch of middle length, which is computed and stored.

        Raises:
            FeatureError: if there is no room for it.
        """
        if self.entry.folder is None:  # each process has a memory of its own
            own = self._forecast()
            return ranks.first(lambda: own)
        found = ranks.first(self._forecast)
        self.entry.refresh()
        return found

    def _forecast(self) -> Forecast:
        order = self.lacking
        if not order:
            return Forecast(rows=0, size=0, seconds=0.0, fetching=0.0)
        first = max(len(order) - self.batch_size, 0) // 2
        numbers = order[first : first + self.batch_size]
        begin = time.perf_counter()
        states = self.record(numbers)
        synchronize(self.model.device)
        seconds = time.perf_counter() - begin
        self.entry.add([self.ids[number] for number in numbers], states, seconds)
        begin = time.perf_counter()
        self.feed.states([self.ids[number] for number in numbers]).to(self.model.device)
        synchronize(self.model.device)
        fetching = time.perf_counter() - begin
        share = sum(self.lengths[number] for number in order) / sum(self.lengths[number] for number in numbers)
        # of one token as many states are stored as there are rows
        size = (len(order) / len(numbers) if self.route.single else share) * sum(
            state.numel() * state.element_size() for each in states.values() for state in each
        )
        return Forecast(rows=len(order), size=round(size), seconds=share * seconds, fetching=share * fetching)

    # --- computing --------------------------------------------------------------------------------------------------

    def fill(self, *, progress: bool) -> None:
        """Compute and store what is lacking, the shortest rows first. Each process computes its share of the rows.

        Processes that fill one folder at the same time share the rows: who claims a part first computes it. What others
        have claimed is waited for, and computed here if they end before it is stored.

        Raises:
            FeatureError: if there is no room for it.
        """
        lacking = {self.ids[number] for number in self.lacking}
        parts = self._parts()
        if self.entry.folder is None:  # each process has a memory of its own
            parts = [list(ranks.own(part)) for part in parts]
        ranks.each(lambda: self._fill_parts(parts, progress=progress and ranks.is_first()))
        if self.entry.folder is None and ranks.count() > 1:
            own = [self.ids[number] for part in parts for number in part]
            self._exchange([row for row in own if row in lacking])
        self.entry.refresh()

    def _exchange(self, own: Sequence[bytes]) -> None:
        """Send the states of these rows to all other processes, and add theirs."""
        for sender in range(ranks.count()):
            rows = ranks.from_one(sender, own)
            for start in range(0, len(rows), EXCHANGED):
                part = rows[start : start + EXCHANGED]
                if sender == ranks.rank():
                    sent = {name: [self.entry.state(row, name).clone() for row in part] for name in self.route.places}
                    ranks.from_one(sender, sent)
                else:
                    self.entry.add(part, ranks.from_one(sender, {}), 0.0)

    def _fill_parts(self, parts: Sequence[Sequence[int]], *, progress: bool) -> None:
        with _bar(progress) as told:
            bar = told.add_task("features", total=len(self.lacking))

            def advance(rows: int) -> None:
                told.advance(bar, rows)

            claimed = [part for part in parts if not self._fill(part, advance, wait=False)]
            for part in claimed:
                self._fill(part, advance, wait=True)

    def _parts(self) -> list[list[int]]:
        """The numbers of all rows in parts, each row once. They are the same in all processes with these rows."""
        order = sorted({row: number for number, row in enumerate(self.ids)}.values(), key=self.lengths.__getitem__)
        size = self.batch_size * max(PART, math.ceil(len(order) / self.batch_size / PARTS))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _fill(self, part: Sequence[int], advance: Callable[[int], None], *, wait: bool) -> bool:
        """Compute and store what is lacking of a part. Returns whether this could be done: another may have it."""
        ids = [self.ids[number] for number in part]
        with self.entry.claimed(name_of({"rows": [row.hex() for row in ids]}), wait=wait) as ours:
            if not ours:
                return False
            order = [part[index] for index in self.entry.lacking(ids, self.route.places)]
            taken: dict[str, list[Tensor]] = {name: [] for name in self.route.places}
            rows: list[bytes] = []
            size, begin = 0, time.perf_counter()
            for start in range(0, len(order), self.batch_size):
                numbers = order[start : start + self.batch_size]
                for name, states in self.record(numbers).items():
                    taken[name] += states
                    size += sum(state.numel() * state.element_size() for state in states)
                rows += [self.ids[number] for number in numbers]
                advance(len(numbers))
                if size >= SHARD or start + self.batch_size >= len(order):
                    self.entry.add(rows, taken, time.perf_counter() - begin)
                    taken, rows = {name: [] for name in self.route.places}, []
                    size, begin = 0, time.perf_counter()
            return True

    def record(self, numbers: Sequence[int]) -> dict[str, list[Tensor]]:
        """The states of rows by place, computed now."""
        with _autocast(self.model, self.autocast):
            inputs = _inputs(self.model, self._batch(numbers), writes=self.data.generation is not None)
            return self._rows(record(self.model, self.route, inputs))

    def _batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Rows as the model takes them, with labels."""
        count = len(self.data.train)
        rows = [self.data.train[n] if n < count else self.data.dev[n - count] for n in numbers]
        return accepted(self.model, self.data.collate(rows))

    def _rows(self, recorded: Recorded) -> dict[str, list[Tensor]]:
        dtype = torch.bfloat16 if self.rounded else None
        return {name: recorded.rows(name, dtype) for name in self.route.places}

    # --- proof ------------------------------------------------------------------------------------------------------

    def prove(self) -> None:
        """Compare what is stored of the shortest and the longest row with what the backbone gives for both together.

        Raises:
            FeaturesRefused: if the two are not the same, or give another loss (of rows without labels other outputs).
        """
        order = sorted(range(len(self.ids)), key=self.lengths.__getitem__)
        numbers = [order[0], order[-1]]
        for name, states in self.record(numbers).items():
            precision = torch.bfloat16 if self.rounded or self.autocast else self.route.dtypes[name]
            for number, live in zip(numbers, states, strict=True):
                kept = self.entry.state(self.ids[number], name)
                if not _close(kept, live, TOLERANCE[precision]):
                    raise FeaturesRefused(
                        f"the state of a row at {name} is not the one that was stored. Either the model has changed, "
                        "or its states of a row depend on the other rows of a batch"
                    )
        live, fed = (self._outcome(self._batch(numbers), states) for states in (None, numbers))
        precision = torch.bfloat16 if self.rounded or self.autocast else max(self.route.dtypes.values(), key=_coarse)
        if not _close(fed, live, 10 * TOLERANCE[precision]):
            raise FeaturesRefused(
                f"a pass from stored states has a loss of {_told(fed)}, and a live one {_told(live)}. The model reads "
                "more of its blocks than what they hand on"
            )

    def _outcome(self, batch: dict[str, Any], numbers: Sequence[int] | None) -> Tensor:
        """The loss of some rows, or without labels their outputs: live or (with their numbers) from their states."""
        if numbers is not None:
            if self.absent or self._is_vector:
                batch = {name: value for name, value in batch.items() if name == "labels"}
            batch["features"] = self.feed.states([self.ids[number] for number in numbers]).to(self.model.device)
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), _autocast(self.model, self.autocast):
                output = self.model(**batch)
                found: Tensor = output.logits if output.loss is None else output.loss
                return found
        finally:
            self.model.train(training)

    # --- feeding ----------------------------------------------------------------------------------------------------

    @property
    def feed(self) -> Feed:
        """What gives batches their states."""
        collate = self.data.collate
        side = collate.padding_side or getattr(collate.tokenizer, "padding_side", "right")
        return Feed(self.entry, self.route, self.ids, side == "left", self.absent)

    def fed(self) -> TaskData:
        """The rows without what need not be read any more, and with their states in each batch."""
        feed, count = self.feed, len(self.data.train)

        def collator(fields: Any, processor: Any) -> Collate:
            return replace(self.data.collator(fields, processor), features=feed)

        return replace(
            self.data,
            train=self._numbered(self.data.train, 0),
            dev=self._numbered(self.data.dev, count),
            collator=collator,
        )

    @property
    def _is_vector(self) -> bool:
        return self.route.places == (VECTOR,)

    def _numbered(self, rows: Dataset, first: int) -> Dataset:
        if not len(rows):
            return rows
        decoding = rows.format["format_kwargs"].get("transform")
        rows = rows.with_format(None)
        if self.absent or self._is_vector:
            rows, decoding = (
                rows.remove_columns([name for name in rows.column_names if name not in _unread(self.data)]),
                None,
            )
        rows = rows.add_column(STORED, list(range(first, first + len(rows))))
        return rows if decoding is None else rows.with_transform(decoding)


def _unread(data: TaskData) -> tuple[str, ...]:
    """Columns that a classifier's backbone does not read."""
    return (*UNREAD, *kind_named(data.labels.kind).beside, STORED)


def _of_one_size(data: TaskData) -> bool:
    """Whether rows are files that need no decoding once their states are stored: their inputs have one shape.

    Of sounds of many lengths the model makes its masks.
    """
    return data.fields.files is not None and "length" not in data.train.column_names


def stand_ins(model: SideModel, route: Route, batch: Mapping[str, Any], *, unread: bool = False) -> dict[str, Tensor]:
    """Stand-ins for the inputs that need not be read: images, other files if `unread`, texts of which one token is."""
    name = model.main_input_name
    if unread or name == "pixel_values":
        return {name: torch.zeros(()).expand(1, *batch[name].shape[1:])}
    alone = route.single and len(model.facts.stacks) == 1 and model.main_input_name == "input_ids"
    alone = alone and not model.facts.read  # a picture is needed beside a text
    return {"input_ids": torch.zeros(1, 1, dtype=torch.long)} if alone else {}


def _inputs(model: SideModel, batch: Mapping[str, Any], *, writes: bool) -> dict[str, Any]:
    """What the backbone reads of a batch. An encoder-decoder makes its decoder's input of the labels."""
    return {name: value for name, value in accepted(model, batch).items() if writes or name != "labels"}


def _coarse(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _lengths(rows: Dataset) -> list[int]:
    return rows["length"][:] if "length" in rows.column_names else [1] * len(rows)


def _close(kept: Tensor, live: Tensor, tolerance: float) -> bool:
    if kept.shape != live.shape:
        return False
    kept, live = kept.double(), live.double()
    return bool(torch.linalg.vector_norm(kept - live) <= tolerance * torch.linalg.vector_norm(live))


def _told(found: Tensor) -> str:
    return f"{float(found.float().mean()):.6g}"


def _autocast(model: SideModel, on: bool) -> Any:
    return torch.autocast(model.device.type, torch.bfloat16) if on else nullcontext()


@contextmanager
def _bar(shown: bool) -> Iterator[Progress]:
    with Progress(console=Console(stderr=True), transient=True, disable=not shown) as progress:
        yield progress
