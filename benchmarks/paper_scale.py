"""Memory, time and energy of every method at the papers' scale. Weights are random, as no cost depends on them.

    python benchmarks/paper_scale.py                        # all. About an hour on 2 CPU cores, in 14 GiB
    python benchmarks/paper_scale.py --only bert-base,vit-b
    python benchmarks/paper_scale.py --again                # measure what is there once more, on a quieter machine
    python benchmarks/paper_scale.py --device cuda          # full sizes, energy too. A results file of the GPU's name
    python benchmarks/paper_scale.py --table                # the tables alone, as Markdown

Contenders are all registered methods in float32, with a two-class head on the mean of the tokens (T5: on the decoder's
first). Methods that change weights train with the backbone's own noise. What was measured is not measured again. A
backbone of which a contender is missing is measured whole, because ratios of times are of one run.

On a CPU, bytes and FLOPs are counted at the full batch on fake tensors, which take no memory. Times and the memory of
inference are measured at a smaller batch ("timed_batch"). The peak of a step at the full batch comes last, and only for
backbones with `peak`. THREADS sets the number of threads (2).
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)
from transformers.initialization import no_init_weights

import sidestep as ss
from sidestep.compare.records import Record, append, key_of, latest, read
from sidestep.compare.spec import default_contenders
from sidestep.measure.memory import mib
from sidestep.measure.meters import FAILURES, Cost, attached, measure, measure_memory, time_steps
from sidestep.measure.plan import PlanError, plan
from sidestep.measure.plan.trace import Device
from sidestep.measure.step import inference_peak, step_peak
from sidestep.methods import SideNet, WeightDelta, method_named, method_of
from sidestep.model.settings import Settings

FOLDER = Path(__file__).parent / "results"
HEAD = ss.Classify(num_labels=2, pool="mean")
#: What weights, their copy, gradients and AdamW's state may take on a CPU: the rest of 14 GiB is for the step.
CPU_BYTES = 11 * 2**30
RIVALS = ("lora", "lora+checkpoint", "full")
WARMUP, GPU_REPEATS = 1, 10


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A backbone at the size of the papers.

    Attributes:
        name: in the results.
        build: the backbone with random weights.
        inputs: a batch of so many rows.
        batch: rows of the papers.
        length, image_size: of a row.
        timed_batch: rows that are timed on a CPU. 0: none.
        repeats: rounds that are timed on a CPU.
        peak: whether the peak of a step at the full batch is measured on a CPU too.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    inputs: Callable[[int], dict[str, Tensor]]
    batch: int = 32
    length: int | None = None
    image_size: int | None = None
    timed_batch: int
    repeats: int = 3
    peak: bool = False


def texts(vocabulary: int, length: int, rows: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, vocabulary, (rows, length)), "labels": torch.randint(0, 2, (rows,))}


def images(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 224, 224), "labels": torch.randint(0, 2, (rows,))}


def vit() -> PreTrainedModel:
    return ViTModel(ViTConfig(), add_pooling_layer=False)


def swin() -> PreTrainedModel:
    config = SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32])
    return SwinModel(config, add_pooling_layer=False)


def bert(large: bool = False) -> PreTrainedModel:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return BertModel(BertConfig(**(sizes if large else {})), add_pooling_layer=False)


def t5(large: bool = False) -> PreTrainedModel:
    width, layers, heads = (1024, 24, 16) if large else (768, 12, 12)
    sizes = {"d_model": width, "d_ff": 4 * width, "num_layers": layers, "num_heads": heads}
    return T5Model(T5Config(**sizes, decoder_start_token_id=0))


def llama() -> PreTrainedModel:
    """The shape of Llama 3.2 1B."""
    return LlamaModel(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            pad_token_id=None,
        )
    )


text = partial(partial, texts)
SCALES = (
    Scale(name="vit-b", build=vit, inputs=images, image_size=224, timed_batch=4, peak=True),
    Scale(name="bert-base", build=bert, inputs=text(30000, 128), length=128, timed_batch=4, peak=True),
    Scale(name="t5-base", build=t5, inputs=text(32000, 128), length=128, timed_batch=4),
    Scale(name="swin-b", build=swin, inputs=images, image_size=224, timed_batch=4),
    Scale(
        name="bert-large",
        build=partial(bert, large=True),
        inputs=text(30000, 128),
        length=128,
        timed_batch=1,
        repeats=2,
    ),
    Scale(
        name="t5-large", build=partial(t5, large=True), inputs=text(32000, 128), length=128, timed_batch=1, repeats=2
    ),
    Scale(name="llama-1b", build=llama, inputs=text(128000, 512), batch=8, length=512, timed_batch=0, repeats=0),
)


def contenders() -> dict[str, Settings]:
    """Every registered method with its defaults, the rivals again with recomputed blocks, and READ at a lower rank."""
    chosen = default_contenders()
    found = {one.name: Settings(one.config, HEAD, checkpoint="late" if one.checkpoint else None) for one in chosen}
    return {**found, "read-32": Settings(ss.ReadConfig(rank=32), HEAD)}


# --- measuring ---------------------------------------------------------------------------------------------------


def run(scale: Scale, path: Path, device: torch.device, *, again: bool = False) -> None:
    """Measure a backbone, unless every contender's result is there and none is wanted again."""
    chosen, known = contenders(), latest(read(path)[0])
    settings = {label: settings_of(scale, label, one, device) for label, one in chosen.items()}
    done = [known.get(key_of("cost", one)) for one in settings.values()]
    if not again and all(one is not None and one.status != "failed" for one in done):
        return
    began, load = time.perf_counter(), os.getloadavg()[0]
    found = on_gpu(scale, chosen, device) if device.type == "cuda" else on_cpu(scale, chosen)
    seconds = (time.perf_counter() - began) / len(found)
    for label, cost in found.items():
        ok = isinstance(cost, Cost)
        record = Record.of(
            "cost",
            settings[label],
            measured=cost.to_dict() if ok else None,
            status="ok" if ok else "failed" if isinstance(cost, torch.OutOfMemoryError | MemoryError) else "refused",
            reason=None if ok else str(cost),
            seconds=seconds,
            threads=torch.get_num_threads(),
            gpu=gpu_name(device),
        )
        append(path, replace(record, machine={**record.machine, "load": round(max(load, os.getloadavg()[0]), 1)}))
    print(f"{scale.name}: {len(found)} contenders, {seconds * len(found) / 60:.0f} minutes", flush=True)


def settings_of(scale: Scale, label: str, contender: Settings, device: torch.device) -> dict[str, Any]:
    """What a line was measured with."""
    on_cpu = device.type == "cpu"
    method = method_of(contender.method)
    return {
        "backbone": scale.name,
        "model": f"{type(skeleton(scale)).__name__} with random weights",
        "contender": label,
        "method": method.name,
        "config": contender.method.to_dict(),
        "checkpoint": contender.checkpoint is not None,
        "noise": "own" if issubclass(method.implementation, WeightDelta) else "eval",
        "precision": "float32",
        "attention": skeleton(scale).config._attn_implementation,
        "device": device.type,
        "optimizer": "AdamW",
        "batch": scale.batch,
        "timed_batch": scale.timed_batch if on_cpu else scale.batch,
        "length": scale.length,
        "image_size": scale.image_size,
        "head": f"Classify(num_labels={HEAD.num_labels}, pool={HEAD.pool})",
        "repeats": scale.repeats if on_cpu else GPU_REPEATS,
        "warmup": WARMUP,
    }


@cache
def skeleton(scale: Scale) -> PreTrainedModel:
    """The backbone without weights."""
    with torch.device("meta"):
        return scale.build()


def on_gpu(scale: Scale, chosen: Mapping[str, Settings], device: torch.device) -> dict[str, Cost | Exception]:
    """Everything at the full batch."""
    with device:
        backbone, batch = scale.build().eval(), scale.inputs(scale.batch)
    found = measure(backbone, chosen, batch, repeats=GPU_REPEATS, warmup=WARMUP)
    return {label: with_plan(scale, chosen[label], cost, "cuda") for label, cost in found.items()}


def on_cpu(scale: Scale, chosen: Mapping[str, Settings]) -> dict[str, Cost | Exception]:
    """Counts at the full batch, times and the memory of inference at a smaller one."""
    found = {label: with_plan(scale, one, counted(scale, one), "cpu") for label, one in chosen.items()}
    able = {label: cost for label, cost in found.items() if isinstance(cost, Cost) and scale.timed_batch and fits(cost)}
    if not able:
        return found
    backbone, small = scale.build().eval(), scale.inputs(scale.timed_batch)
    times = time_steps(backbone, {label: chosen[label] for label in able}, small, repeats=scale.repeats, warmup=WARMUP)
    for label, cost in able.items():
        with attached(backbone, chosen[label]) as model:
            found[label] = replace(cost, **vars(times[label]), inference_peak_bytes=inference_peak(model, small))
    return found


def add_peaks(scale: Scale, path: Path) -> None:
    """Measure the peak of a step at the full batch for every contender whose result has none, on a CPU."""
    known, backbone, batch = latest(read(path)[0]), scale.build().eval(), scale.inputs(scale.batch)
    for label, contender in contenders().items():
        record = known.get(key_of("cost", settings_of(scale, label, contender, torch.device("cpu"))))
        if record is None or record.measured is None or record.measured["peak_bytes"] is not None:
            continue
        with attached(backbone, contender) as model:
            rise = step_peak(model, batch)
        peaks = {"peak_bytes": rise.allocated, "resident_bytes": rise.resident}
        append(path, replace(record, measured={**record.measured, **peaks}))
        print(f"{scale.name}: peak of {label} {mib(rise.allocated):.0f} MiB", flush=True)


def counted(scale: Scale, contender: Settings) -> Cost | Exception:
    """What is counted at the full batch, on fake tensors."""
    try:
        with fakes():
            backbone = scale.build().eval()
            backbone.tie_weights()
            return measure_memory(backbone, contender, scale.inputs(scale.batch))
    except FAILURES as error:
        return error.with_traceback(None)


@contextmanager
def fakes() -> Iterator[None]:
    """New tensors are fake: they have a shape and a dtype, and take no memory.

    Fake parameters cannot be moved and need not be, and there is nothing to initialise.
    """
    with (
        FakeTensorMode(),
        no_init_weights(),
        mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module),
    ):
        yield


def with_plan(scale: Scale, contender: Settings, cost: Cost | Exception, device: Device) -> Cost | Exception:
    """The cost with the planner's prediction, where it makes one."""
    if not isinstance(cost, Cost):
        return cost
    try:
        predicted = plan(
            scale.build,
            contender.method,
            head=HEAD,
            batch=scale.batch,
            length=scale.length,
            image_size=scale.image_size,
            checkpoint=contender.checkpoint,
            device=device,
        )
    except PlanError:
        return cost
    return replace(cost, planned_peak_bytes=predicted.peak_bytes)


def fits(cost: Cost) -> bool:
    """Whether weights, the copy of those that are trained, their gradients and AdamW's state leave room for a step."""
    return cost.model_bytes + 2 * cost.gradient_bytes + cost.optimizer_bytes <= CPU_BYTES


# --- tables ------------------------------------------------------------------------------------------------------


def tables(records: Sequence[Record]) -> str:
    """A table for each backbone: every contender's cost and its ratios over the rivals'. "p" marks a planned peak."""
    backbones = dict.fromkeys(record.settings["backbone"] for record in records)
    return "\n\n".join(
        table(name, [record for record in records if record.settings["backbone"] == name]) for name in backbones
    )


def table(backbone: str, records: Sequence[Record]) -> str:
    """One backbone's, with what it was measured with above it."""
    first = records[0]
    size = f"length {first.settings['length']}" if first.settings["length"] else f"{first.settings['image_size']} px"
    timed = f"batch {first.settings['timed_batch']}" if first.settings["timed_batch"] else "none"
    over = f"over {', '.join(RIVALS)}"
    lines = [
        f"**{backbone}**, batch {first.settings['batch']}, {size} (times: {timed}); "
        f"{first.settings['attention']} attention, {first.settings['precision']}; {first.machine['name']}, "
        f"{first.machine['threads']} threads, load {first.machine['load']}, torch {first.versions['torch']}, "
        f"{first.date[:10]}",
        "",
        f"| | kept, MiB | {over} | peak, MiB | {over} | step, s | {over} | trained | task file, MiB | GFLOP | J |",
        f"|---|{'---|' * 10}",
    ]
    by_label = {record.settings["contender"]: record for record in records}
    return "\n".join([*lines, *(row(record, by_label) for record in records)])


def row(record: Record, others: Mapping[str, Record]) -> str:
    label, found = record.settings["contender"], record.measured
    if found is None:
        return f"| {label} | {record.status}: {record.reason} |{' |' * 9}"
    rivals = [others[rival].measured if rival in others else None for rival in RIVALS]
    ours = is_ours(record.settings["method"])
    kept, peak, step = (verdicts(ratio, found, rivals, ours) for ratio in (kept_ratio, peak_ratio, time_ratio))
    seconds = None if found["step_seconds"] is None else found["step_seconds"]["median"]
    cells = [
        f"{label} | {mib(found['kept_bytes']):.1f} | {kept}",
        f"{peak_text(found)} | {peak}",
        f"{number(seconds)} | {step}",
        f"{found['parameters']:,} | {mib(found['task_bytes']):.2f} | {number(found['flops'], 1e9)}",
        number(found["energy_joules"]),
    ]
    return f"| {' | '.join(cells)} |"


def number(value: float | None, unit: float = 1) -> str:
    """In units of `unit`, three digits or all before the point. "-" if not measured."""
    if value is None:
        return "-"
    return f"{value / unit:.0f}" if value >= 100 * unit else f"{value / unit:.3g}"


def verdicts(ratio: Callable[[Any, Any], float | None], found: Any, rivals: Sequence[Any], ours: bool) -> str:
    """The ratios over the rivals, marked where a method of ours does not win. "-" where one was not measured."""
    ratios = [None if rival is None else ratio(found, rival) for rival in rivals]
    return ", ".join("-" if one is None else f"{one:.2f}" + (" (no)" if ours and one >= 1 else "") for one in ratios)


def kept_ratio(one: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    return one["kept_bytes"] / other["kept_bytes"]


def peak_ratio(one: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """Of measured peaks, or else of planned ones: never of one of each."""
    for name in ("peak_bytes", "planned_peak_bytes"):
        if None not in (one[name], other[name]):
            return one[name] / other[name]
    return None


def peak_text(found: Mapping[str, Any]) -> str:
    """The measured peak in MiB, or else the planned one, marked."""
    if found["peak_bytes"] is None and found["planned_peak_bytes"] is not None:
        return f"{number(found['planned_peak_bytes'], 2**20)} p"
    return number(found["peak_bytes"], 2**20)


def time_ratio(one: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """Median over the rounds of the ratio within a round, in which both met the same machine."""
    if None in (one["step_seconds"], other["step_seconds"]):
        return None
    rounds = zip(one["step_seconds"]["values"], other["step_seconds"]["values"], strict=True)
    return statistics.median(mine / theirs for mine, theirs in rounds)


def is_ours(method: str) -> bool:
    """Whether it is a side network that does more than nothing."""
    return issubclass(method_named(method).implementation, SideNet) and method != "probe"


def gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def results_file(device: torch.device) -> Path:
    name = gpu_name(device)
    return FOLDER / (
        "paper_scale.jsonl" if name is None else f"paper_scale_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.jsonl"
    )


def main() -> None:
    names = [scale.name for scale in SCALES]
    parser = argparse.ArgumentParser(description="What every method costs at the papers' scale.")
    parser.add_argument("--only", default=",".join(names), help=f"backbones, of {','.join(names)}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--again", action="store_true", help="measure also what was measured before")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the tables")
    given = parser.parse_args()
    if unknown := set(given.only.split(",")) - set(names):
        parser.error(f"--only {','.join(sorted(unknown))}: choose of {','.join(names)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but CUDA is not available: measure on the CPU")
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    device = torch.device(given.device)
    path = results_file(device)
    for scale in SCALES:
        if scale.name in given.only.split(",") and not given.table:
            run(scale, path, device, again=given.again)
            gc.collect()
    for scale in SCALES:
        if scale.peak and scale.name in given.only.split(",") and device.type == "cpu" and not given.table:
            add_peaks(scale, path)
            gc.collect()
    current = {
        key_of("cost", settings_of(scale, label, one, device))
        for scale in SCALES
        for label, one in contenders().items()
    }
    print(tables([record for key, record in latest(read(path)[0]).items() if key in current]))


if __name__ == "__main__":
    main()
