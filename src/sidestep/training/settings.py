"""What a training run is asked to do: plain data, checked when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from sidestep.disk.feature_options import LIMIT, FeatureOptions, Precision, Where
from sidestep.interface.annotations import check_fields
from sidestep.interface.config import MethodConfig
from sidestep.measure.rows import ROWS

Schedule = Literal["linear", "cosine", "cosine_epochs", "step", "constant"]
Keep = Literal["best", "last"]
Decay = Literal["weights", "all"]

PATIENCE = 3
"""Epochs without a better dev score after which training stops, unless it is told otherwise."""

FREE_TO_CHANGE = (
    *("output", "resume", "overwrite", "progress", "workers", "eval_batch_size", "measure"),
    *("features", "features_folder", "features_limit"),
)
"""What a resumed run may set otherwise: none of it changes what is computed."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a task is trained. Checkpointing of late blocks and noise belong to `attach`.

    Attributes:
        output: the task folder. Checkpoints, logs and results.json go there too.
        epochs: passes over the training rows.
        batch_size: rows of one forward and backward pass, of all processes together.
        eval_batch_size: rows of one forward pass over the dev rows and of a frozen pass, of all processes together.
            None: 64, or with an offloaded backbone as many as memory has room for.
        learning_rate: None: the `rate` of the method's config.
        weight_decay: AdamW's.
        decay: which weights it acts on. "weights" are all but biases and norms, "all" is whatever is trained.
        warmup: share of the steps in which the rate rises to its value.
        warmup_epochs: the same in epochs. It takes precedence over `warmup`.
        warmup_steps: the same in steps, which may be more than the run has. It takes precedence over `warmup`.
        schedule: what the rate does after that (see `schedules.rate_factor`).
        start_rate: the rate that the warm-up begins at.
        end_rate: the rate that a schedule other than "constant" and "step" ends at.
        milestones: epochs after which the schedule "step" divides the rate by 10, ascending.
        drop_last: whether the (shuffled) training rows that fill no whole batch are left out of an epoch.
        accumulate: batches for one optimizer step.
        max_grad_norm: the gradient's norm is cut to this. 0: it is not cut.
        label_smoothing: for single-label classification.
        seed: of weights, order and noise.
        bf16: autocast to bfloat16 in training. What is trained stays in fp32.
        patience: stop after so many epochs without a better dev score. 0: never. None: `PATIENCE`, and with keep="last"
            never. A run that is resumed keeps the patience that it began with. See `waits`.
        metric: the dev score that chooses the best epoch. None: the problem's first.
        keep: "best" keeps the epoch with the best dev score. "last" keeps the last one, so nothing is chosen on dev.
        checkpoints: whether a run leaves checkpoints to continue from. Without them only the last epoch can be kept.
        measure: whether the memory of a step is measured before training.
        save_steps: steps between two checkpoints, besides the one of each epoch. None: no further ones.
        log_steps: steps between two log entries.
        workers: processes that load data. 0: this one alone.
        resume: continue from the last complete checkpoint in `output`.
        overwrite: replace what `output` holds.
        progress: whether progress bars are shown.
        features: where the frozen part is kept, which then runs once and not in each epoch: "ram", "disk", "off", or
            "auto" where it pays. See `tasks.features`.
        features_folder, features_limit, features_precision: as of `FeatureOptions`.

    Raises:
        ValueError: if a value is out of range.
    """

    output: Path
    epochs: int = 10
    batch_size: int = 32
    eval_batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    decay: Decay = "weights"
    warmup: float = 0.06
    warmup_epochs: int | None = None
    warmup_steps: int | None = None
    schedule: Schedule = "linear"
    start_rate: float = 0.0
    end_rate: float = 0.0
    milestones: tuple[int, ...] = ()
    drop_last: bool = False
    accumulate: int = 1
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    seed: int = 0
    bf16: bool = False
    patience: int | None = None
    metric: str | None = None
    keep: Keep = "best"
    checkpoints: bool = True
    measure: bool = True
    save_steps: int | None = None
    log_steps: int = 10
    workers: int = 0
    resume: bool = False
    overwrite: bool = False
    progress: bool = True
    features: Where = "off"
    features_folder: Path | None = None
    features_limit: int = LIMIT
    features_precision: Precision = "same"

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("epochs", "batch_size", "accumulate", "log_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        rows = self.eval_batch_size
        self._require("eval_batch_size", rows is None or rows >= 1, "at least 1, or not given")
        self._require("save_steps", self.save_steps is None or self.save_steps >= 1, "at least 1, or not given")
        self._require("patience", self.patience is None or self.patience >= 0, "at least 0 (0: never stop early)")
        for name in ("weight_decay", "max_grad_norm", "start_rate", "end_rate", "workers"):
            value = getattr(self, name)
            self._require(name, value >= 0, "a number of at least 0")
        for name in ("warmup", "label_smoothing"):
            self._require(name, 0 <= getattr(self, name) < 1, "a share from 0 to below 1")
        self._require("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295")
        self._require("learning_rate", self.learning_rate is None or self.learning_rate > 0, "a number above 0")
        self._check_warmup()
        self._check_milestones()
        _ = self.feature_options
        if self.keep == "last" and self.patience:
            raise ValueError(
                f"patience={self.patience} with keep='last': stopping early chooses an epoch on dev. Leave patience out"
            )
        if not self.checkpoints and (self.keep == "best" or self.resume or self.save_steps):
            raise ValueError(
                "checkpoints=False: there is no best epoch to go back to and nothing to resume. Set keep='last', "
                "without resume and save_steps"
            )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite: choose one, to continue a run or to start it anew")

    def _check_milestones(self) -> None:
        ascending = all(0 < a < b for a, b in pairwise((*self.milestones, self.epochs)))
        within = f"epochs from 1 to {self.epochs - 1}, ascending"
        self._require("milestones", not self.milestones or ascending, within)
        if bool(self.milestones) != (self.schedule == "step"):
            raise ValueError(
                f"milestones={self.milestones} with schedule={self.schedule!r}: the schedule 'step' needs the epochs "
                "after which the rate falls, and no other takes them"
            )

    def _check_warmup(self) -> None:
        steps = self.warmup_steps
        self._require("warmup_steps", steps is None or steps >= 0, "at least 0, or not given")
        if steps is not None and (self.warmup_epochs is not None or self.schedule == "cosine_epochs"):
            raise ValueError(
                f"warmup_steps={steps} with warmup_epochs={self.warmup_epochs} and schedule={self.schedule!r}: give "
                "one of the two, and epochs where the schedule is set once an epoch"
            )
        if self.warmup_epochs is not None:
            within = f"at least 0 and below the {self.epochs} epochs"
            self._require("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, within)
        rise = self.rise(1)
        if self.schedule == "cosine_epochs" and 2 * rise >= self.epochs:
            raise ValueError(
                f"a warm-up of {rise} of {self.epochs} epochs with schedule='cosine_epochs': its cosine counts from "
                "the first epoch and would be at its end after the warm-up. Warm up for less than half of the epochs"
            )

    def _require(self, name: str, allowed: bool, what: str) -> None:
        if not allowed:
            raise ValueError(f"{name}={getattr(self, name)!r}, but it must be {what}")

    @property
    def eval_rows(self) -> int:
        """Rows of one forward pass over the dev rows."""
        return self.eval_batch_size or ROWS

    @property
    def feature_options(self) -> FeatureOptions:
        """Where and how the frozen part is kept."""
        return FeatureOptions(
            where=self.features,
            folder=self.features_folder,
            limit=self.features_limit,
            precision=self.features_precision,
        )

    def rate(self, method: type[MethodConfig]) -> float:
        """The learning rate that is used with the method of this config."""
        return self.learning_rate or method.rate

    def steps_per_epoch(self, rows: int) -> int:
        """Optimizer steps of an epoch of so many rows. The last step may have fewer batches."""
        whole, rest = divmod(rows, self.batch_size)
        batches = whole + (rest > 0 and not self.drop_last)
        return -(-batches // self.accumulate)

    def rise(self, steps_per_epoch: int) -> int:
        """Optimizer steps in which the rate rises. They are whole epochs if the rate is set once per epoch."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.warmup_epochs is not None:
            return self.warmup_epochs * steps_per_epoch
        if self.schedule == "cosine_epochs":
            return int(self.warmup * self.epochs) * steps_per_epoch
        return int(self.warmup * self.epochs * steps_per_epoch)

    @property
    def waits(self) -> int:
        """Epochs without a better dev score after which training stops. 0: it does not stop early."""
        if self.patience is None:
            return PATIENCE if self.keep == "best" else 0
        return self.patience

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values. A patience of null means that training does not stop early."""
        plain = {"output": str(self.output), "milestones": list(self.milestones), "patience": self.waits or None}
        plain["features_folder"] = None if self.features_folder is None else str(self.features_folder)
        return {**asdict(self), **plain}

    def fixed(self) -> dict[str, Any]:
        """The fields that a resumed run has to share with the one that it continues."""
        fixed = {name: value for name, value in self.to_dict().items() if name not in FREE_TO_CHANGE}
        if self.features_precision == "same":  # runs that began before there were features do not say it
            del fixed["features_precision"]
        return fixed
