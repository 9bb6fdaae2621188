"""Choosing a method: a stated list of candidates on one stored pass, by successive halving on held-out training rows.

All candidates that only read the frozen model share its states. The worse half leaves after each round, and the others
go on with three times the epochs, as long as the time allows. The best is then trained on all rows. Dev rows take no
part in the choice.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from sidestep.backbone.load import load_backbone
from sidestep.backbone.recompute import Checkpoint
from sidestep.data import DataError, holdout
from sidestep.data.windows import ROW
from sidestep.disk.features import FeatureStore
from sidestep.kinds.base import kind_named
from sidestep.kinds.task_data import TaskData
from sidestep.messages import about, counted
from sidestep.methods import (
    LateLoraConfig,
    MethodConfig,
    ReadConfig,
    ReadoutConfig,
    SideAttentionConfig,
    method_of,
)
from sidestep.model.attach import Attached, detach
from sidestep.training.results import Results
from sidestep.training.run import RunSpec, Watch, check_places, task_data, train
from sidestep.training.solved import PROBLEMS

JUDGED = (*PROBLEMS, "tokens", "spans")
"""The kinds of task that methods are judged on."""
HELD_OUT = 0.2
FIRST, MORE = 2, 3
"""Epochs of the first round, and how many times more each later one has."""
STEPS = 40
"""Steps of the first round at least. After fewer, methods that start slowly look worse than they are."""
MOST = 54
"""Epochs of the last round."""


LEADING, FIFTHS = 3, 5
"""How many are tried on further fifths in the end, and on how many at most."""
SHARES = ("accuracy", "f1", "f1_macro", "f1_micro")
CORRELATIONS = ("pearson", "spearman", "matthews")
"""Scores whose standard error is known."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is tried.

    Attributes:
        name: in what is told.
        config: the method's.
        rate, weight_decay: of its training.
        checkpoint: what is computed again in backward.
        passes: seconds of an epoch over those of the frozen pass, roughly. They count until it was tried.
    """

    name: str
    config: MethodConfig
    rate: float
    weight_decay: float = 0.0
    checkpoint: Checkpoint | None = None
    passes: float = 1.0

    @property
    def solved(self) -> bool:
        """Whether one trial tells all: there are no epochs."""
        return method_of(self.config).solved


CANDIDATES: tuple[Candidate, ...] = (
    Candidate(name="readout", config=ReadoutConfig(), rate=ReadoutConfig.rate),
    Candidate(name="read, rank 32", config=ReadConfig(rank=32), rate=6e-3, passes=0.5),
    # late blocks keep one hidden state each, so that no candidate takes the memory of LoRA
    Candidate(name="late_lora, 2e-3", config=LateLoraConfig(), rate=2e-3, checkpoint="late", passes=2.0),
    Candidate(name="read, rank 128", config=ReadConfig(rank=128), rate=6e-3, passes=0.6),
    Candidate(name="side_attention", config=SideAttentionConfig(), rate=3e-3, weight_decay=0.05),
    Candidate(name="late_lora, 5e-3", config=LateLoraConfig(), rate=5e-3, checkpoint="late", passes=2.0),
)
"""What is tried, in this order."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial on held-out training rows.

    Attributes:
        candidate: its name.
        epochs: that it was trained.
        fifth: which fifth of the rows was held out. Each is drawn anew.
        score, loss: of the held-out rows. None: it failed.
        seconds: that it took.
        reason: why it failed.
    """

    candidate: str
    epochs: int
    fifth: int = 0
    score: float | None
    loss: float | None
    seconds: float
    reason: str | None = None


def auto(
    spec: RunSpec,
    watch: Watch | None = None,
    *,
    budget: float,
    candidates: Sequence[Candidate] = CANDIDATES,
    backbone: Any = None,
    data: TaskData | None = None,
) -> tuple[Attached, TaskData, Results]:
    """Choose a method in a time, train it, and save the task in `spec.training.output`.

    Args:
        spec: a run. Its method, rate, epochs and weight decay are those of the candidate that is chosen.
        watch: is told what is tried and how it went.
        budget: seconds for all of it, with the frozen pass and the last training. To load the model does not count.
        candidates: what is tried.
        backbone, data: as of `train`.

    Returns:
        As `train`. The results tell all trials (`Results.auto`).

    Raises:
        ValueError: if the kind of task cannot be judged so, the time is too short for a trial, or all of them failed.
        Exception: as of `train`.
    """
    check_places(spec)
    if spec.model.own_head:
        raise ValueError("--own-head with --method auto: its candidates have heads of Sidestep's. Leave it out")
    data = task_data(spec, watch) if data is None else data
    if data.labels.kind not in JUDGED:
        raise ValueError(
            f"auto judges methods for {', '.join(JUDGED)}, and the problem is {data.labels.kind!r}: name a method "
            "(--method)"
        )
    if backbone is None:
        backbone = load_backbone(
            spec.model.name,
            dtype=spec.model.dtype,
            revision=spec.model.revision,
            drop_path=spec.model.drop_path,
            device_map=spec.model.device_map,
            offload_folder=spec.model.offload_folder,
            max_memory=spec.model.max_memory,
            quantize=spec.model.quantize,
        )
    tell = (lambda line: None) if watch is None else watch.tell
    tell(f"auto: {len(candidates)} candidates in {about(budget)}: {'; '.join(one.name for one in candidates)}")
    search = _Search(spec, data, backbone, budget, tell)
    best, epochs = search.run(candidates)
    tell(f"auto: {best.name} with {counted(epochs, 'epoch')} is trained on all rows")
    begin, searched = time.perf_counter(), search.spent
    chosen = _asked(spec, best, epochs)
    model, data, results = train(chosen, watch, backbone=backbone, data=data, store=search.store)
    told = {
        "budget": budget,
        "chosen": best.name,
        "epochs": epochs,
        "trials": [asdict(trial) for trial in search.trials],
        "search_seconds": round(searched, 3),
        "final_seconds": round(time.perf_counter() - begin, 3),
    }
    results = replace(results, auto=told)
    results.write(spec.training.output)
    return model, data, results


class _Search:
    """The rounds of one choice."""

    def __init__(
        self, spec: RunSpec, data: TaskData, backbone: nn.Module, budget: float, tell: Callable[[str], object]
    ) -> None:
        self.spec, self.data, self.backbone, self.budget, self.tell = spec, data, backbone, budget, tell
        self.rows = _apart(data, spec.training.seed)
        self.metric = kind_named(data.labels.kind).best_by(spec.training.metric, len(data.labels.names))
        self.sign = 1 if kind_named(data.labels.kind).greater_is_better(self.metric) else -1
        self.store = FeatureStore(None, spec.training.features_limit)
        self.trials: list[Trial] = []
        self.paces: dict[MethodConfig, float] = {}  # the least seconds an epoch
        self.begin = time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since the search began."""
        return time.perf_counter() - self.begin

    def run(self, candidates: Sequence[Candidate]) -> tuple[Candidate, int]:
        """The best candidate and its epochs.

        Raises:
            ValueError: if there is no time for a trial, or none came through.
        """
        left, epochs, best = list(candidates), self.first, dict[str, list[Trial]]()
        while left:
            trained = [one for one in left if self._better(one, epochs, best) and not one.solved]
            if not trained:
                break
            ranked = [trials[0].candidate for trials in self._ranked([best[one.name] for one in trained])]
            left = [one for one in trained if one.name in ranked[: math.ceil(len(trained) / 2)]]
            if epochs >= MOST or (len(left) == 1 and len(trained) == 1):
                break
            epochs *= MORE
        if not best:
            reasons = "; ".join(f"{trial.candidate}: {trial.reason}" for trial in self.trials if trial.reason)
            raise ValueError(f"no candidate came through in {about(self.budget)}: {reasons or 'give a longer budget'}")
        named = {one.name: one for one in candidates}
        winner = self._confirmed(named, self._ranked(best.values())[:LEADING])
        return named[winner.candidate], winner.epochs

    def _better(self, one: Candidate, epochs: int, best: dict[str, list[Trial]]) -> bool:
        """Try a candidate, if there is time, and keep its best trial. Returns whether it was tried and came through."""
        count = self._affordable(one, epochs, best)
        if count is None:
            return False
        trial = self._try(one, 1 if one.solved else count)
        if trial.score is None:
            return False
        known = best.get(one.name)
        best[one.name] = [trial] if known is None else self._ranked([known, [trial]])[0]
        return True

    def _confirmed(self, candidates: Mapping[str, Candidate], leading: list[list[Trial]]) -> Trial:
        """The best of the leading ones, which are all tried on further fifths as long as the time allows.

        No other may win: its score is of a single fifth, and may be luck.
        """
        for fifth in range(1, FIFTHS):
            last = max(trials[0].seconds for trials in leading) / (1 - HELD_OUT) + self.judging
            again = sum(trials[0].seconds for trials in leading)
            if len(leading) < 2 or self.spent + again + last > self.budget:
                break
            tried = [
                [*trials, self._try(candidates[trials[0].candidate], trials[0].epochs, fifth)] for trials in leading
            ]
            leading = [trials for trials in tried if trials[-1].score is not None] or leading
        return self._ranked(leading)[0][0]

    def _ranked(self, found: Iterable[list[Trial]]) -> list[list[Trial]]:
        """The best first, of each the trials on different fifths, whose means count.

        Scores within a standard error of the best are equal, and the smaller loss decides.
        """
        means = [(self.sign * _mean(one.score for one in trials), trials) for trials in found]
        top, trials = max(means, key=lambda pair: pair[0])
        least = top - _standard_error(self.metric, abs(top), len(self.rows.dev) * len(trials))

        def order(pair: tuple[float, list[Trial]]) -> tuple[float, float]:
            score, trials = pair
            return (0.0 if score >= least else top - score), _mean(one.loss for one in trials)

        return [trials for _, trials in sorted(means, key=order)]

    @property
    def first(self) -> int:
        """Epochs of the first round."""
        steps = math.ceil(len(self.rows.train) / self.spec.training.batch_size)
        return max(FIRST, math.ceil(STEPS / steps))

    def _affordable(self, one: Candidate, epochs: int, best: Mapping[str, list[Trial]]) -> int | None:
        """The epochs of a trial for which there is time, and for training it or the best so far on all rows after it.

        As many as asked for, or fewer, but half more than were tried already. None if there is no time for these. The
        first trial is taken in any case: it says what the frozen pass takes.

        Raises:
            ValueError: if that alone has spent the time.
        """
        if not self.trials:
            return epochs
        if len(self.trials) == 1 and self.trials[0].seconds > self.budget:
            least = math.ceil(2 * self.trials[0].seconds + self.judging)
            raise ValueError(
                f"budget: {self.budget:g}s is too short, as the frozen pass and the first trial took "
                f"{self.trials[0].seconds:.1f}s. Give at least {least}s"
            )
        first = self.trials[0]  # with the frozen pass
        pace = self.paces.get(one.config, one.passes * first.seconds / first.epochs)
        so_far = self._ranked(best.values())[0][0].seconds if best else 0.0
        left = self.budget - self.spent - self.judging
        most = min(left / (1 + 1 / (1 - HELD_OUT)), left - so_far / (1 - HELD_OUT)) / pace
        tried = best[one.name][0].epochs if one.name in best else None
        if most >= epochs:
            return epochs
        return int(most) if tried is not None and most >= 1.5 * tried else None

    @property
    def judging(self) -> float:
        """Seconds for the dev rows after the last training, by the first trial. That one ran as much for each row."""
        return self.trials[0].seconds * len(self.data.dev) / len(self.data.train)

    def _try(self, one: Candidate, epochs: int, fifth: int = 0) -> Trial:
        rows = self.rows if fifth == 0 else _apart(self.data, self.spec.training.seed + fifth)
        folder, begin = Path(tempfile.mkdtemp(prefix="sidestep-")), time.perf_counter()
        asked = _asked(self.spec, one, epochs)
        quiet = replace(
            asked.training,
            output=folder,
            keep="last",
            patience=None,
            checkpoints=False,
            measure=False,
            save_steps=None,
            resume=False,
            overwrite=True,
            progress=False,
        )
        score = loss = reason = None
        try:
            model, _, results = train(
                replace(asked, training=quiet), backbone=self.backbone, data=rows, store=self.store
            )
            detach(model)
            score, loss = results.scores[self.metric], results.history[-1].get("dev_loss")
            if not math.isfinite(score):
                score, reason = None, f"{self.metric} is no finite number"
        except (ValueError, RuntimeError, ModuleNotFoundError) as error:
            reason = str(error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        trial = Trial(
            candidate=one.name,
            epochs=epochs,
            fifth=fifth,
            score=score,
            loss=loss,
            seconds=round(time.perf_counter() - begin, 3),
            reason=reason,
        )
        self.trials.append(trial)
        if not one.solved:
            self.paces[one.config] = min(trial.seconds / epochs, self.paces.get(one.config, math.inf))
        how = f"failed ({reason})" if score is None else f"{self.metric} {score:.4f}"
        again = f", fifth {fifth + 1}" if fifth else ""
        self.tell(f"auto: {one.name}, {counted(epochs, 'epoch')}{again}: {how}, {trial.seconds:.0f} s")
        return trial


def _mean(values: Iterable[float | None]) -> float:
    """Infinity if one is not known."""
    found = [math.inf if value is None else value for value in values]
    return sum(found) / len(found)


def _standard_error(metric: str, score: float, rows: int) -> float:
    """Of a score on so many rows: a share's, or a correlation's. 0 for what is neither."""
    if not 0 <= score <= 1:
        return 0.0
    if metric in CORRELATIONS:
        return (1 - score**2) / math.sqrt(rows)
    return math.sqrt(score * (1 - score) / rows) if metric in SHARES else 0.0


def _asked(spec: RunSpec, one: Candidate, epochs: int) -> RunSpec:
    """The run of a candidate."""
    training = replace(
        spec.training,
        epochs=epochs,
        learning_rate=one.rate,
        weight_decay=one.weight_decay,
        warmup_epochs=None,
        warmup_steps=None,
        milestones=(),
        schedule="linear",
        features="ram" if spec.training.features in ("auto", "off") else spec.training.features,
    )
    model = replace(spec.model, method=one.config, checkpoint=one.checkpoint or spec.model.checkpoint)
    return replace(spec, model=model, training=training)


def _apart(data: TaskData, seed: int) -> TaskData:
    """The training rows in two parts, of which the second is held out. Each class has its share in both.

    That is a fifth, and more where classes have fewer than five rows, as each has a row in both.
    """
    share, by = HELD_OUT, None
    if data.labels.kind == "single":
        share, by = max(HELD_OUT, len(data.labels.names) / len(data.train)), "labels"
    if len(data.train) < 2 or share > 0.5:
        raise DataError(
            f"auto holds out training rows of each class, and there are {counted(len(data.train), 'row')} for "
            f"{len(data.labels.names)} classes. Give at least two of each, or name a method (--method)"
        )
    if kind_named(data.labels.kind).of_tokens:
        rows, apart = _texts_apart(data.train, share, seed)
    else:
        rows, apart = holdout(data.train, by, share, seed)
    return replace(data, train=rows, dev=apart, dev_source=f"{share:.0%} of the training rows (seed {seed})")


def _texts_apart(windows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """The windows in two parts, those of one text together."""
    owners = np.array(windows.with_format(None)[ROW][:])
    _, apart = holdout(Dataset.from_dict({ROW: np.unique(owners)}), None, share, seed)
    inside = np.isin(owners, apart[ROW][:])
    return windows.select(np.flatnonzero(~inside)), windows.select(np.flatnonzero(inside))
