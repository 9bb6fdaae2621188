"""Made-up results in the form of a comparison's, with everything that a report has to cope with.

No number in here was measured.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sidestep.compare.records import Record, key_of

VERSIONS: dict[str, str | None] = {
    "python": "3.11.7",
    "sidestep": "0.1.0",
    "torch": "2.15.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
}
CPU = {"name": "Sample CPU, 16 cores", "cpu": "Sample CPU", "cores": 16, "threads": 8, "gpu": None}
GPU = {**CPU, "name": "Sample GPU 80 GB", "gpu": "Sample GPU 80 GB"}
TASKS = {"rte": ("accuracy", 0.55), "mrpc": ("accuracy", 0.72), "sts-b": ("pearson", 0.8), "cr": ("accuracy", 0.85)}
MIB = 2**20

#: label -> method, config, trained values, then shares of full tuning's kept bytes and step time, then score gained
CONTENDERS: dict[str, tuple[str, dict[str, Any], int, float, float, float]] = {
    "read": ("read", {"rank": 128, "cell": "gru"}, 248_066, 0.044, 0.37, 0.03),
    "read-32": ("read", {"rank": 32, "cell": "gru"}, 60_100, 0.041, 0.35, 0.02),
    "dtl": ("dtl", {"rank": 2, "late_blocks": 6}, 37_000, 0.31, 0.48, 0.025),
    "probe": ("probe", {}, 770, 0.0001, 0.26, 0.0),
    "bitfit": ("bitfit", {}, 26_498, 0.77, 0.72, 0.022),
    "ia3": ("ia3", {}, 46_000, 0.83, 0.8, 0.024),
    "lora": ("lora", {"rank": 8, "targets": ["query", "value"]}, 148_000, 0.74, 0.7, 0.035),
    "lora+checkpoint": ("lora", {"rank": 8, "targets": ["query", "value"]}, 148_000, 0.11, 1.05, 0.035),
    "dora": ("dora", {"rank": 8, "targets": ["query", "value"]}, 158_000, 0.95, 0.95, 0.034),
    "full": ("full", {}, 22_566_146, 1.0, 1.0, 0.04),
    "full+checkpoint": ("full", {}, 22_566_146, 0.14, 1.36, 0.04),
}
MODULES = {
    "encoder.layer.*.attention.self": 0.3,
    "encoder.layer.*.attention.output.dense": 0.1,
    "encoder.layer.*.intermediate.dense": 0.25,
    "encoder.layer.*.output.LayerNorm": 0.2,
    "encoder.layer.*.output.dropout": 0.15,
}


def record(kind: Any, settings: Mapping[str, Any], measured: Mapping[str, Any] | None, **changes: Any) -> Record:
    """A line of the made-up machine."""
    base = Record(
        kind=kind,
        key=key_of(kind, settings),
        settings=dict(settings),
        measured=None if measured is None else dict(measured),
        versions=VERSIONS,
        machine=CPU,
        date="2026-11-20T10:00:00Z",
        seconds=12.5,
    )
    return replace(base, **changes)


def shared(backbone: str, contender: str, **changes: Any) -> dict[str, Any]:
    """The settings that all kinds of lines have."""
    method, config, *_ = CONTENDERS[contender]
    return {
        "backbone": backbone,
        "model": "sample-encoder",
        "contender": contender,
        "method": method,
        "config": config,
        "checkpoint": contender.endswith("+checkpoint"),
        "noise": "own" if method in ("lora", "dora", "ia3", "full", "bitfit") else "eval",
        "precision": "float32",
        "attention": "sdpa",
        "device": "cpu",
        "optimizer": "AdamW",
        **changes,
    }


def cost(backbone: str, contender: str, size: float = 1.0, **changes: Any) -> Record:
    """What a step costs; `size` scales bytes and seconds."""
    method, _, parameters, kept_share, time_share, _ = CONTENDERS[contender]
    settings = {
        **shared(backbone, contender),
        **{
            "batch": 32,
            "length": 128,
            "image_size": None,
            "head": "Classify(num_labels=2)",
            "repeats": 15,
            "warmup": 3,
        },
        **changes.pop("settings", {}),
    }
    plain = contender.removesuffix("+checkpoint")
    if plain != contender:
        settings["score_of"] = plain
    kept, step = int(1092.5 * MIB * kept_share * size), 2.65 * time_share * size
    gradients = 4 * parameters
    peak = int(kept * 1.12 + gradients + 18 * MIB * size)
    measured = {
        "parameters": parameters,
        "backbone_parameters": 22_713_216,
        "task_bytes": 4 * parameters + 900,
        "kept_bytes": kept,
        "kept_by_module": _kept(method, kept),
        "peak_bytes": peak,
        "resident_bytes": int(peak * 1.2),
        "model_bytes": int(86.6 * MIB * size),
        "gradient_bytes": gradients,
        "optimizer_bytes": 2 * gradients,
        "step_seconds": _spread(step),
        "forward_seconds": _spread(0.66 * size),
        "flops": int(9.1e11 * time_share * size),
        "energy_joules": None,
        "energy_source": "not measured",
        "inference_seconds": _spread(0.7 * size),
        "inference_peak_bytes": int(24 * MIB * size),
        "planned_peak_bytes": int(peak * (1.04 if method != "dora" else 0.87)),
        **changes.pop("measured", {}),
    }
    return record("cost", settings, measured, **changes)


def score(backbone: str, contender: str, task: str, seed: int, **changes: Any) -> Record:
    """A run on all training rows."""
    method, _, parameters, *_, gained = CONTENDERS[contender]
    noise = random.Random(f"{backbone} {contender} {task} {seed}")
    metric, base = TASKS.get(task, ("accuracy", 0.6))
    value = min(base + gained + noise.gauss(0, 0.006), 1.0)
    settings = {
        **shared(backbone, contender),
        **{"task": task, "seed": seed, "rate": 2e-3 if method == "read" else 5e-4, "epochs": 5, "batch": 32},
        **{"max_length": 128, "rows": 2490, "part": "dev", "weight_decay": 0.0, "schedule": "linear", "warmup": 0.06},
        **{"data": "5f1d", "trials": 3},
        **changes.pop("settings", {}),
    }
    measured = {
        "metric": metric,
        "score": value,
        "scores": {metric: value},
        "best_epoch_score": value + 0.002,
        "history": list(_history(value, noise)),
        "parameters": parameters,
        "task_bytes": 4 * parameters + 900,
        "train_seconds": 40.0,
        "epoch_seconds": 8.0,
        **changes.pop("measured", {}),
    }
    return record("score", settings, measured, **changes)


def trial(backbone: str, contender: str, task: str, rate: float) -> Record:
    """A learning rate that was tried."""
    line = score(backbone, contender, task, 0, settings={"rate": rate, "part": "holdout", "rows": 1200})
    settings = {name: value for name, value in line.settings.items() if name != "trials"}
    return replace(line, kind="trial", key=key_of("trial", settings), settings=settings)


def study(
    backbone: str = "all-MiniLM-L6-v2",
    contenders: Sequence[str] = tuple(CONTENDERS),
    tasks: Sequence[str] = tuple(TASKS),
    seeds: int = 3,
) -> list[Record]:
    """Costs, trials and scores of a whole comparison on one backbone."""
    plain = [name for name in contenders if not name.endswith("+checkpoint")]
    lines = [cost(backbone, name) for name in contenders]
    lines += [trial(backbone, name, task, rate) for name in plain for task in tasks for rate in (1e-4, 5e-4, 2e-3)]
    lines += [score(backbone, name, task, seed) for name in plain for task in tasks for seed in range(seeds)]
    return lines


def troubled() -> list[Record]:
    """A second backbone on which everything is a little wrong."""
    name = "T5-base"
    lines = [cost(name, contender, 3.2) for contender in ("read", "lora", "lora+checkpoint", "full")]
    # without meters
    missing = {"peak_bytes": None, "resident_bytes": None, "step_seconds": None, "flops": None, "kept_by_module": None}
    lines.append(cost(name, "dtl", 3.2, measured=missing))
    lines.append(cost(name, "probe", 3.2, versions={**VERSIONS, "torch": "2.14.0"}))
    refused = cost(name, "bitfit", settings={})
    reason = "bitfit cannot work on T5Model: it has no bias vectors"
    lines.append(replace(refused, status="refused", reason=reason, measured=None))
    # one seed only, a score below zero, a metric that is better when smaller, one run that failed
    lines += [score(name, contender, "cr", 0) for contender in ("read", "lora", "full")]
    lines += [
        score(name, contender, "drift", seed, measured={"metric": "pearson", "score": value})
        for seed in range(3)
        for contender, value in (("read", -0.04 + 0.01 * seed), ("lora", 0.1 + 0.02 * seed))
    ]
    lines += [
        score(name, contender, "price", seed, measured={"metric": "mse", "score": value + 0.02 * seed})
        for seed in range(3)
        for contender, value in (("read", 1.31), ("lora", 1.42), ("full", 1.28))
    ]
    lines.append(score(name, "full", "cr", 1, settings={"epochs": 10}))
    failed = score(name, "full", "drift", 0)
    lines.append(replace(failed, status="failed", reason="the loss is not a number after step 31", measured=None))
    return lines


def on_gpu(backbone: str = "BERT-large") -> list[Record]:
    """Costs on a GPU, with energy."""
    energy = {"energy_source": "nvml", "resident_bytes": None}
    return [
        cost(
            backbone,
            contender,
            6.0,
            machine=GPU,
            settings={"device": "cuda"},
            measured={
                **energy,
                "energy_joules": 140.0 * CONTENDERS[contender][4],
                "step_seconds": _spread(0.21 * CONTENDERS[contender][4]),
                "forward_seconds": _spread(0.06),
            },
        )
        for contender in CONTENDERS
    ]


def write(path: Path, lines: Sequence[Record], broken: bool = False) -> Path:
    """A results file; with a broken last line if asked for."""
    text = "".join(json.dumps(asdict(line)) + "\n" for line in lines)
    path.write_text(text + ('{"format": 1, "kind": "cost", "sett' if broken else ""))
    return path


def _spread(median: float) -> dict[str, Any]:
    low, high = median * 0.98, median * 1.03
    return {"median": median, "low": low, "high": high, "values": [low, median, high]}


def _kept(method: str, kept: int) -> dict[str, int]:
    if method in ("read", "dtl", "probe"):
        return {
            "encoder.layer.*": int(kept * 0.9),
            "side.out": int(kept * 0.09),
            "head.linear": int(kept * 0.01),
        }
    return {name: int(kept * share) for name, share in MODULES.items()}


def _history(value: float, noise: random.Random) -> Iterator[dict[str, float]]:
    for epoch in range(1, 6):
        reached = value - 0.12 * 0.5**epoch + noise.gauss(0, 0.003)
        yield {"epoch": float(epoch), "loss": 0.7 * 0.8**epoch + noise.gauss(0, 0.01), "score": reached}
