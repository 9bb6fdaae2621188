"""Running a comparison: rates are chosen on held-out training rows, then every seed is scored once on dev.

Every contender goes through the same code: it is attached to the backbone, trained by `training.train`, and detached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from sidestep.backbone import Digest
from sidestep.compare.bench import Bench, Prepared, Rows, measured_as, pairs, processor_of, written_by
from sidestep.compare.budget import Search, Spent
from sidestep.compare.costs import measure_costs
from sidestep.compare.files import check_results
from sidestep.compare.forecast import Forecast, Run, step_pace
from sidestep.compare.ledger import Ledger, Tell
from sidestep.compare.outcomes import Choice, best, measured, told
from sidestep.compare.records import Kind, Record
from sidestep.compare.spec import Comparison, Contender, Task
from sidestep.data.joins import NOTHING
from sidestep.disk.features import FeatureStore
from sidestep.kinds.prepare import TaskData
from sidestep.messages import about, counted
from sidestep.methods import method_of
from sidestep.model.attach import Attached, detach
from sidestep.training.run import DataSpec, RunSpec, train
from sidestep.training.settings import TrainSettings


class Work(Protocol):
    """A run, which another process may have taken. Then it is not done, but with `wait`."""

    def __call__(self, *, wait: bool = False) -> bool:
        """Whether it is done."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a comparison.

    Attributes:
        records: of this comparison, those that were there already included.
        ran: how many of them are new.
        broken: lines of the results file that could not be read.
    """

    records: list[Record]
    ran: int
    broken: int


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The runs of one contender on one task and backbone."""

    backbone: str
    task: str
    contender: Contender
    trials: int
    scores: int


def planned(comparison: Comparison) -> list[Planned]:
    """The runs that a comparison consists of, without those that were refused.

    Raises:
        ValueError: as `bench.pairs`.
    """
    trials = _trials(comparison)
    return [
        Planned(backbone=backbone, task=task.name, contender=one, trials=trials, scores=len(comparison.seeds))
        for backbone, tasks in pairs(comparison).items()
        for task in tasks
        for one in comparison.scored
    ]


def run(comparison: Comparison, output: Path, *, tell: Tell = print, shared: bool = False) -> Outcome:
    """Run what is not in the results file yet.

    A comparison that is stopped has about as much of every contender. So the runs go task by task: first the trials and
    the first seed of all contenders, then the other seeds.

    Args:
        comparison: what is compared.
        output: the results file (JSON lines).
        tell: takes a line of progress.
        shared: whether other processes may run parts of this comparison at the same time, all with the same file. Each
            ends when all is done. Without it the file is this process's alone.

    Raises:
        OutputError: if the results cannot go there, or another process writes them.
        ValueError: if data cannot be read or prepared for a backbone, and nothing has been run then. Also if a backbone
            cannot be loaded.
    """
    check_results(comparison, output)
    prepared = _prepared(comparison, pairs(comparison), tell)
    with Ledger.opened(output, tell, shared=shared) as ledger:
        for spec in comparison.backbones:
            tasks = prepared[spec.name]
            writes = written_by([task.task for task in tasks])
            own = [task.task for task in tasks]
            bench = Bench.load(
                spec,
                attention=comparison.attention,
                bf16=comparison.bf16,
                pictured=any(task.task.pictured for task in tasks),
                writes=writes,
                measured_as=measured_as(own),
            )
            _Session(comparison, bench, ledger).run(tasks)
        return Outcome(records=list(ledger.touched.values()), ran=ledger.ran, broken=ledger.broken)


def _prepared(comparison: Comparison, tasks: Mapping[str, Sequence[Task]], tell: Tell) -> dict[str, list[Prepared]]:
    """The rows as each backbone reads them, all before the first run. An error would else come hours later."""
    rows = {task.name: Rows.of(task, comparison) for task in comparison.tasks}
    found = {}
    for spec in comparison.backbones:
        processors = {
            pictured: processor_of(spec, pictured=pictured) for pictured in {task.pictured for task in tasks[spec.name]}
        }
        found[spec.name] = [
            Prepared.of(rows[task.name], processors[task.pictured], comparison) for task in tasks[spec.name]
        ]
        for task in found[spec.name]:
            if between := task.trial.separators.pair:
                tell(f"{spec.name}: between the two texts of a row of {task.task.name} stands {between!r}")
    return found


class _Session:
    """A comparison on one backbone."""

    def __init__(self, comparison: Comparison, bench: Bench, ledger: Ledger) -> None:
        self.comparison, self.bench, self.ledger = comparison, bench, ledger
        refused = {one.name: bench.refusal(one) for one in comparison.contenders}
        self.refused = {name: reason for name, reason in refused.items() if reason is not None}
        self.running = [one for one in comparison.scored if one.name not in self.refused]
        self.done, self.total = 0, 0
        self.shared = FeatureStore(None, comparison.features.limit)
        self.spent: dict[tuple[str, str], Spent] = {}
        self.forecast, self.started = Forecast({}, {}), False

    def run(self, prepared: list[Prepared]) -> None:
        """Trials and scores of every contender on these tasks."""
        first, *others = self.comparison.seeds
        self.total = len(prepared) * len(self.running) * (_trials(self.comparison) + len(self.comparison.seeds))
        self._refuse(prepared)
        if (costs := self.comparison.costs) is not None:
            frames = max((task.trial.handling.get("frames", 0) for task in prepared), default=0)
            with self.ledger.claims.of(f"costs on {self.bench.spec.name}", wait=True):
                self.ledger.refresh()
                measure_costs(self.comparison, costs, self.bench, self.ledger, self.refused, frames or None)
        self.forecast = self._forecast(prepared)
        chosen, left = {}, []
        for task in prepared:
            chosen[task.task.name] = self._chosen(task)
            left += _done(self._scores(task, chosen[task.task.name], first))
        for seed in others:
            for task in prepared:
                left += _done(self._scores(task, chosen[task.task.name], seed))
        for work in left:
            work(wait=True)

    def _refuse(self, prepared: list[Prepared]) -> None:
        for one in self.comparison.scored:
            if (reason := self.refused.get(one.name)) is not None:
                self.ledger.tell(f"{self.bench.spec.name}: {one.name} is refused: {reason}")
                for task in prepared:
                    self.ledger.without("score", self._settings(task, one, "dev", None, None), "refused", reason)

    def _chosen(self, task: Prepared) -> dict[str, Choice | None]:
        """The best rate and epochs of each contender on held-out training rows. None if it failed at every rate."""
        epochs, seed, budget = self.comparison.epochs, self.comparison.seeds[0], self.comparison.budget
        if budget is not None:
            chosen: dict[str, Choice | None] = {}

            def searched(one: Contender, *, wait: bool = False) -> bool:
                with self.ledger.claims.of(f"the search of {one.name} on {task.task.name}", wait=wait) as ours:
                    if ours:
                        self.ledger.refresh()
                        chosen[one.name] = self._within(task, one, budget)
                    return ours

            for work in _done([partial(searched, one) for one in self.running]):
                work(wait=True)
            return chosen
        if not _trials(self.comparison):
            return {one.name: (one.rates[0], epochs) for one in self.running}
        found: dict[str, dict[Choice, Record]] = {one.name: {} for one in self.running}

        def tried(one: Contender, rate: float, *, wait: bool = False) -> bool:
            record = self._once("trial", task, one, "holdout", (rate, epochs), seed, wait=wait)
            if record is not None:
                found[one.name][rate, epochs] = record
            return record is not None

        trials = [partial(tried, one, one.rates[n]) for n in range(_trials(self.comparison)) for one in self.running]
        for work in _done(trials):
            work(wait=True)
        return {name: best(trials) for name, trials in found.items()}

    def _within(self, task: Prepared, one: Contender, budget: float) -> Choice | None:
        """The best rate and epochs that a contender finds in its time."""
        spent = self.spent[task.task.name, one.name] = Spent(budget)
        seed = self.comparison.seeds[0]
        whole, part = (Run.of(one.name, data, 1).work for data in (task.data[seed], task.trial))

        def trial(rate: float, epochs: int) -> Record:
            record = self._once("trial", task, one, "holdout", (rate, epochs), seed, wait=True)
            assert record is not None  # it was waited for
            return record

        search = Search(
            rates=one.rates,
            trial=trial,
            share=whole / part,
            spent=spent,
            solved=method_of(one.config).solved,
        )
        return best(search.run())

    def _scores(self, task: Prepared, chosen: Mapping[str, Choice | None], seed: int) -> list[Work]:
        """Every contender with one seed, on all training rows."""
        return [partial(self._score, task, one, chosen[one.name], seed) for one in self.running]

    def _score(self, task: Prepared, one: Contender, choice: Choice | None, seed: int, *, wait: bool = False) -> bool:
        """A contender with one seed. False: another process runs it."""
        if choice is None:
            self.done += 1
            self.forecast.done(self._run_of(one, task.data[seed]))
            reason = "the trial of every learning rate failed"
            self.ledger.without("score", self._settings(task, one, "dev", None, seed), "failed", reason)
            return True
        record = self._once("score", task, one, "dev", choice, seed, wait=wait)
        spent = self.spent.get((task.task.name, one.name))
        if record is not None and spent is not None and seed == self.comparison.seeds[0]:
            spent.charge(record)
            self.ledger.tell(
                f"{task.task.name}, {one.name}: {counted(choice[1], 'epoch')}, {about(spent.seconds)} of "
                f"{about(spent.budget)} spent"
            )
        return record is not None

    def _once(
        self, kind: Kind, task: Prepared, one: Contender, part: str, choice: Choice, seed: int, *, wait: bool
    ) -> Record | None:
        """A run's result. None: another process runs it."""
        before = self.ledger.ran
        data = task.trial if kind == "trial" else task.data[seed]
        settings, run = self._settings(task, one, part, choice, seed), self._run_of(one, data)
        record = self.ledger.once(kind, settings, lambda: self._train(one, data, choice, seed), wait=wait)
        if record is None:
            return None
        self.done += 1
        if self.ledger.ran > before:
            self.forecast.done(run, record.seconds if record.measured is not None else None)
            self.ledger.tell(f"[{self.done}{self._of()}] {told(record)}{self._time_left()}")
        else:
            self.forecast.done(run)
        return record

    def _of(self) -> str:
        """How many runs there are. With a budget nobody knows."""
        return f"/{self.total}" if self.comparison.budget is None else ""

    def _forecast(self, prepared: list[Prepared]) -> Forecast:
        """The forecast of all runs on this backbone, with the steps that were measured."""
        runs: Counter[Run] = Counter()
        for task in prepared:
            for one in self.running:
                runs[self._run_of(one, task.trial)] += _trials(self.comparison)
                runs.update(self._run_of(one, data) for data in task.data.values())
        costs = [record for record in self.ledger.touched.values() if record.kind == "cost"]
        steps = {cost.settings["contender"]: step_pace(cost) for cost in costs if self._is_own(cost)}
        known = {name: pace for name, pace in steps.items() if pace is not None}
        return Forecast(runs, known, steps_tell=self.bench.writes is None)

    def _run_of(self, one: Contender, data: TaskData) -> Run:
        return Run.of(one.name, data, self.comparison.epochs)

    def _is_own(self, record: Record) -> bool:
        return record.settings["backbone"] == self.bench.spec.name

    def _say_how_long(self) -> None:
        """Once, before the first run that is not in the results file, if steps were measured."""
        if self.comparison.budget is None and not self.started and (seconds := self.forecast.seconds) is not None:
            self.ledger.tell(
                f"{self.bench.spec.name}: {self.forecast.runs} runs, {about(seconds)} by the measured steps"
            )
        self.started = True

    def _time_left(self) -> str:
        if self.comparison.budget is not None:
            return ""
        seconds = self.forecast.seconds
        return f"; {about(seconds)} left" if self.forecast.runs and seconds is not None else ""

    def _train(self, one: Contender, data: TaskData, choice: Choice, seed: int) -> dict[str, Any]:
        self._say_how_long()
        rate, epochs = choice
        spec = RunSpec(
            data=DataSpec(train=data.train),
            model=self.bench.model_spec(one),
            training=self.comparison.training(self.ledger.claims.scratch, rate, seed, epochs),
        )
        watch, backbone = _Known(self.bench.known), self.bench.model
        model, _, results = train(spec, watch, backbone=backbone, data=data, store=self.shared)
        try:
            return measured(results, model)
        finally:
            detach(model)

    def _settings(
        self, task: Prepared, one: Contender, part: str, choice: Choice | None, seed: int | None
    ) -> dict[str, Any]:
        """What a result says. It is found again by all of this."""
        asked, trial = self.comparison, part == "holdout"
        rate, epochs = (None, asked.epochs) if choice is None else choice
        timed = asked.budget is not None and not trial  # the rate and the epochs are what was found then
        data = task.trial if trial else task.data[asked.seeds[0] if seed is None else seed]
        settings = {
            **self.bench.settings(one),
            **_about(task.task),
            **_joined(data),
            **{name: value for name, value in data.handling.items() if name == "frames"},
            "problem": data.labels.kind,
            "seed": seed,
            "rate": None if timed else rate,
            "epochs": None if timed else epochs,
            "batch": asked.batch_size,
            "max_length": asked.max_length,
            "rows": len(data.train),
            "part": part,
            "part_rows": len(data.dev),
            "weight_decay": asked.weight_decay,
            "schedule": asked.schedule,
            "warmup": asked.warmup,
            "data": task.trial_fingerprint if trial else task.fingerprint,
        }
        # what is new is told only where it is not as ever, so that results of before are found again
        if asked.features.where != "off":
            settings["features"] = f"{asked.features.where}, {asked.features.precision}"
        if timed:
            settings["budget"] = asked.budget
        elif not trial:
            tried = _trials(asked)
            settings["trials"] = {"rates": max(tried, 1), "rows": len(task.trial.train) if tried else 0}
        return settings


@dataclass(frozen=True)
class _Known:
    """Tells a model which backbone (or towers) it is on, so that each run need not find out."""

    digests: tuple[Digest, ...]

    def read(self, rows: int) -> None:
        """Rows are prepared already."""

    def started(self, model: Attached, data: TaskData, settings: TrainSettings) -> None:
        """The weights are those that were loaded: `detach` brings them back to the bit."""
        for part, digest in zip(model.parts, self.digests, strict=True):
            part.digest = digest

    def tell(self, line: str) -> None:
        """Nobody is told."""


def _done(works: Iterable[Work]) -> list[Work]:
    """Do what no other process does. The rest is left."""
    return [work for work in works if not work()]


def _trials(comparison: Comparison) -> int:
    """Trials of each contender. A single rate needs none."""
    count = len(comparison.contenders[0].rates)
    return count if count > 1 else 0


def _about(task: Task) -> dict[str, Any]:
    columns = {name: column for name, column in asdict(task.fields).items() if column is not None}
    found = {"task": task.name, "columns": columns}
    usual = {"shots": None, "answers": None, "boxes": "xyxy"}
    return found | {name: value for name in usual if (value := getattr(task, name)) != usual[name]}


def _joined(data: TaskData) -> dict[str, Any]:
    """What stands between texts, if anything. Earlier results, when nothing did, are not those of such rows."""
    return {} if data.separators == NOTHING else {"separators": asdict(data.separators)}
