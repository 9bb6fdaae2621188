"""What a comparison is asked to do: contenders x tasks x backbones x seeds, as plain data."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast, get_args

from datasets import Dataset

from sidestep.backbone import Noise, check_noise
from sidestep.backbone.families import Pool
from sidestep.backbone.formats import Format, check_format
from sidestep.backbone.processors import IN_WORDS
from sidestep.backbone.source import Reads
from sidestep.data import Fields, Kind, TableOptions
from sidestep.data.boxes import BoxForm
from sidestep.disk.feature_options import FeatureOptions
from sidestep.interface.keep import ROUNDED, Keep, check_keep
from sidestep.kinds.base import kind_named
from sidestep.kinds.prepare import hold_out, read_rows
from sidestep.methods import MethodConfig, method_named, method_of, methods
from sidestep.model.heads import HeadConfig
from sidestep.training.settings import Schedule, TrainSettings

CHECKPOINTED = ("lora", "full")
"""Methods that stand in a default comparison a second time, with their blocks recomputed in backward."""
CHECKPOINT = "+checkpoint"

QUICK_ROWS, QUICK_EPOCHS, QUICK_RATES, QUICK_REPEATS = 128, 2, 2, 2

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
Attention = Literal["sdpa", "eager"]
DTYPES = ("float32", "bfloat16", "float16", "float64")
NEVER = 10**9  # steps between log entries: the loss is that of a whole epoch then, logged at its end
AS_USUAL = TableOptions()
Holds = Literal[Reads, "pictured", "pairs"]
"""What the rows of a task are: of one sort, pictures with texts, or pairs, which a dual encoder reads."""


def in_words(holds: Holds) -> str:
    """What rows are, in words."""
    if holds == "pairs":
        return "pairs"
    return "pictures with texts" if holds == "pictured" else IN_WORDS[holds]


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A pretrained model, loaded once for all that is compared on it.

    Attributes:
        name: in the results.
        model: hub id, folder, timm:NAME or timm:NAME@FILE.
        text_model: the encoder of texts beside one of images, where tasks are of pairs and the two are no pair yet.
        dtype: precision of the weights. None: the checkpoint's.
        revision: branch, tag or commit of a hub id.
        quantize: the format in which its weights are quantised. None: as the checkpoint is.
        pool: what the heads read. None: the family's default.
    """

    name: str
    model: str
    text_model: str | None = None
    dtype: str | None = None
    revision: str | None = None
    quantize: Format | None = None
    pool: Pool | None = None

    def __post_init__(self) -> None:
        _check_pool(self.pool, f"backbone {self.name!r}")
        _require("dtype", self.dtype, self.dtype in (None, *DTYPES), f"{', '.join(DTYPES)}, or not given")
        check_format(self.quantize)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows with labels, and how they are read.

    Attributes:
        name: in the results.
        train: file, folder of images, sounds or videos, or hub id.
        dev: None: a fifth of the training rows, stratified.
        fields: the columns.
        problem: None: several labels a row where the column holds lists, else one. With "text2text" or "lm" the label
            is a text to write, and with "retrieval" a row is an image or a video with its captions.
        options: how the files are written.
        train_split, dev_split: of sources that have splits.
        rows: most training rows. None: the comparison's.
        shots: training rows of each class, drawn again with every seed. They replace `rows`. None: no such draw.
        separator: between texts that are put behind each other, as in `prepare`.
        frames: taken of a video, as in `prepare`.
        answers, boxes: as in `prepare`.
    """

    name: str
    train: str
    dev: str | None = None
    fields: Fields
    problem: Kind | None = None
    options: TableOptions = AS_USUAL
    train_split: str = "train"
    dev_split: str = "validation"
    rows: int | None = None
    shots: int | None = None
    separator: str | None = None
    frames: int | None = None
    answers: int | None = None
    boxes: BoxForm = "xyxy"

    def __post_init__(self) -> None:
        _require("shots", self.shots, self.shots is None or self.shots >= 1, "at least 1, or not given")
        _require("rows", self.rows, self.rows is None or self.rows >= 2, "at least 2, or not given")
        _require("frames", self.frames, self.frames is None or self.frames >= 1, "at least 1, or not given")

    @property
    def holds(self) -> Holds:
        """What a row is."""
        if self.problem is not None and kind_named(self.problem).dual:
            return "pairs"
        if self.fields.files is None:
            return "text"
        return "pictured" if self.fields.text is not None else cast("Reads", self.fields.files[0].field)

    @property
    def pictured(self) -> bool:
        """Whether a row is a picture with a text."""
        return self.holds == "pictured"

    def read(self) -> tuple[Dataset, Dataset]:
        """All training rows and all dev rows.

        Raises:
            DataError: if they cannot be read.
        """
        train = read_rows(self.train, self.fields, self.options, self.problem, split=self.train_split)
        if self.dev is None:
            return hold_out(train, self.problem, self.fields, 0.2, seed=0)
        return train, read_rows(self.dev, self.fields, self.options, self.problem, split=self.dev_split)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method with its config, as it is compared.

    Attributes:
        name: in the results.
        config: of the method.
        rates: learning rates to choose from, on held-out training rows.
        checkpoint: whether the blocks after the method's first write are recomputed in backward.
        keep: how the inputs of taps are kept for backward (see `attach`).
        noise: of the backbone in training. None: the method's own way. That is none for a side network, and the
            backbone's own for a method that changes weights.
        pool: what the head reads. None: the backbone's.
    """

    name: str
    config: MethodConfig
    rates: tuple[float, ...]
    checkpoint: bool = False
    keep: Keep = "full"
    noise: Noise | None = None
    pool: Pool | None = None

    def __post_init__(self) -> None:
        check_noise(self.noise)
        check_keep(self.keep)
        _check_pool(self.pool, f"contender {self.name!r}")
        if not self.rates or not all(math.isfinite(rate) and rate > 0 for rate in self.rates):
            raise ValueError(f"rates={list(self.rates)} of {self.name!r}: give numbers above 0")
        if len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates={list(self.rates)} of {self.name!r}: one stands there twice")

    @property
    def method(self) -> str:
        """Name of the method."""
        return method_of(self.config).name

    @classmethod
    def named(cls, name: str) -> Contender:
        """The method of this name with its default config.

        "NAME+checkpoint" recomputes its blocks, "NAME+replay" (or another way of `Keep`) keeps its taps' inputs so.

        Raises:
            ValueError: if there is no such method.
        """
        method, *ways = name.split("+")
        checkpoint = "checkpoint" in ways
        keeps = [way for way in ways if way != "checkpoint"]
        require_known("method", method if len(keeps) < 2 else name, methods())
        for way in keeps:
            check_keep(way)
        config = method_named(method).config()
        keep = cast("Keep", keeps[0]) if keeps else "full"
        return cls(name=name, config=config, rates=type(config).rates, checkpoint=checkpoint, keep=keep)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """How a step's memory and time are measured.

    Attributes:
        batch: rows of a step.
        length: tokens of a text. None: 128, or what the backbone takes at most.
        repeats: timed steps of each contender, interleaved.
        warmup: steps of each before.
    """

    batch: int = 32
    length: int | None = None
    repeats: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "repeats"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _require("length", self.length, self.length is None or self.length >= 1, "at least 1, or not given")
        _require("warmup", self.warmup, self.warmup >= 0, "at least 0")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Every contender on every task and every backbone that reads it, with every seed. All have the same settings.

    Attributes:
        backbones, tasks, contenders: what is compared.
        seeds: of weights, order and noise. The first seed is also that of the trials.
        rows: most training rows of a task (the first of a fixed permutation). None: all.
        dev_rows: the same for dev rows.
        epochs, batch_size, weight_decay, warmup, schedule, bf16: as in `TrainSettings`.
        max_length: tokens kept of a text. None: the tokenizer's limit.
        holdout: share of the training rows on which rates are chosen.
        attention: implementation. None: the backbone's default.
        costs: None: no steps are measured.
        budget: seconds that every contender has for a task, for its trials and its first score together. It affords
            many epochs or few, and `epochs` does not matter (see `compare.budget`). None: equal trials of `epochs`.
        features: where what frozen blocks compute is kept. The contenders that only read it share it.

    Raises:
        ValueError: if something is named twice, out of range, or contenders have different numbers of rates.
    """

    backbones: tuple[Backbone, ...]
    tasks: tuple[Task, ...]
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: int | None = None
    dev_rows: int | None = None
    epochs: int = 3
    batch_size: int = 32
    weight_decay: float = 0.0
    warmup: float = 0.06
    schedule: Schedule = "linear"
    bf16: bool = False
    max_length: int | None = None
    holdout: float = 0.2
    attention: Attention | None = None
    costs: Costs | None = field(default_factory=Costs)
    budget: float | None = None
    features: FeatureOptions = field(default_factory=FeatureOptions)

    def __post_init__(self) -> None:
        for name in ("backbones", "tasks", "contenders", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"no {name}: a comparison needs at least one")
        for what, parts in (("backbone", self.backbones), ("task", self.tasks), ("contender", self.contenders)):
            _check_names(what, [part.name for part in parts])
        _refuse_repeats("seed", self.seeds)
        for name in ("rows", "dev_rows", "max_length"):
            value = getattr(self, name)
            _require(name, value, value is None or value >= 2, "at least 2, or not given")
        # the schedule "step" needs milestones, of which a comparison has none
        schedules = [name for name in get_args(Schedule) if name != "step"]
        _require("schedule", self.schedule, self.schedule in schedules, " or ".join(schedules))
        for seed in self.seeds:
            self.training(Path(), self.contenders[0].rates[0], seed)
        _require("budget", self.budget, self.budget is None or self.budget > 0, "a time such as 10m, or not given")
        _require("holdout", self.holdout, 0 < self.holdout < 1, "a share between 0 and 1")
        _require("attention", self.attention, self.attention in (None, *get_args(Attention)), "sdpa or eager")
        self._check_effort()

    def training(self, output: Path, rate: float, seed: int, epochs: int | None = None) -> TrainSettings:
        """How a contender is trained, for other `epochs` if some are given.

        Raises:
            ValueError: if a setting is out of range.
        """
        return TrainSettings(
            output=output,
            epochs=epochs or self.epochs,
            batch_size=self.batch_size,
            learning_rate=rate,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            schedule=self.schedule,
            seed=seed,
            bf16=self.bf16,
            keep="last",
            checkpoints=False,
            measure=False,
            log_steps=NEVER,
            overwrite=True,
            progress=False,
            features=self.features.where,
            features_folder=self.features.folder,
            features_limit=self.features.limit,
            features_precision=self.features.precision,
        )

    def _check_effort(self) -> None:
        """Refuses contenders that are tuned more than others. With a budget their time is equal."""
        if self.budget is not None:
            return
        counts = {contender.name: len(contender.rates) for contender in self.contenders}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"unequal tuning effort: {', '.join(f'{name} has {n} rates' for name, n in counts.items())}. "
                "Give every contender the same number of rates"
            )

    def score_of(self, contender: Contender) -> str | None:
        """The contender whose score is this one's too. To recompute, to read again and to move give the same gradients.

        None for a contender that has a score of its own.
        """
        gradients = contender.keep if contender.keep in ROUNDED else "full"
        if not contender.checkpoint and contender.keep == gradients:
            return None
        for other in self.contenders:
            if other.checkpoint or other.keep != gradients:
                continue
            if (other.config, other.noise, other.pool) == (contender.config, contender.noise, contender.pool):
                return other.name
        return None

    @property
    def scored(self) -> tuple[Contender, ...]:
        """The contenders that are trained."""
        return tuple(contender for contender in self.contenders if self.score_of(contender) is None)

    def only(self, names: Sequence[str]) -> Comparison:
        """The comparison of these contenders alone.

        Raises:
            ValueError: if one is not in the comparison.
        """
        for name in names:
            require_known("contender", name, [contender.name for contender in self.contenders])
        return replace(self, contenders=tuple(one for one in self.contenders if one.name in names))


def default_contenders() -> tuple[Contender, ...]:
    """Every registered method, and those of `CHECKPOINTED` a second time with their blocks recomputed."""
    names = list(methods())
    return tuple(map(Contender.named, [*names, *(f"{name}{CHECKPOINT}" for name in CHECKPOINTED if name in names)]))


def quick(comparison: Comparison) -> tuple[Comparison, list[str]]:
    """A comparison that ends in minutes, and in words what it leaves out."""
    rates = {one.name: one.rates[-QUICK_RATES:] for one in comparison.contenders}
    small = replace(
        comparison,
        seeds=comparison.seeds[:1],
        rows=min(comparison.rows or QUICK_ROWS, QUICK_ROWS),
        dev_rows=min(comparison.dev_rows or QUICK_ROWS, QUICK_ROWS),
        epochs=min(comparison.epochs, QUICK_EPOCHS),
        tasks=tuple(replace(task, rows=None) for task in comparison.tasks),
        contenders=tuple(replace(one, rates=rates[one.name]) for one in comparison.contenders),
        costs=comparison.costs and replace(comparison.costs, repeats=min(comparison.costs.repeats, QUICK_REPEATS)),
    )
    cut = [
        f"{name} {_short(getattr(comparison, name))} -> {_short(getattr(small, name))}"
        for name in ("seeds", "rows", "dev_rows", "epochs")
        if getattr(comparison, name) != getattr(small, name)
    ]
    before, after = (len(one.contenders[0].rates) for one in (comparison, small))
    if before != after:
        cut.append(f"rates {before} -> {after} a contender (the larger ones)")
    return small, cut


def require_known(what: str, given: str, known: Iterable[str]) -> None:
    """Refuses a name that is not among the known, and suggests the closest one that is.

    Raises:
        ValueError: listing the known.
    """
    names = list(known)
    if given in names:
        return
    close = difflib.get_close_matches(given, names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown {what} {given!r}{hint}: choose one of {', '.join(names) or 'none'}")


def _check_pool(pool: Pool | None, of: str) -> None:
    if pool is not None and pool not in HeadConfig.pools:
        raise ValueError(f"pool={pool!r} of {of}: choose {', '.join(HeadConfig.pools)}")


def _check_names(what: str, names: Sequence[str]) -> None:
    """Refuses names that stand there twice, or that would not show in a table."""
    for name in names:
        if not name.strip() or CONTROL.search(name):
            raise ValueError(f"{what} {name!r}: a name is a line of text without control characters")
    _refuse_repeats(what, names)


def _refuse_repeats(what: str, names: Sequence[object]) -> None:
    repeated = [str(name) for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{what} {', '.join(repeated)} stands there twice: give each a name of its own")


def _require(name: str, value: object, allowed: bool, what: str) -> None:
    if not allowed:
        raise ValueError(f"{name}={value!r}, but it must be {what}")


def _short(value: object) -> str:
    if value is None:
        return "all"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
