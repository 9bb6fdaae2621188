"""What the ways of keeping taps' inputs save, and what they cost, beside LoRA and LoRA with checkpointing.

    python benchmarks/keep_cost.py bytes      # ViT-B/16, BERT-base and T5-base at batch 32, counted on fake tensors
    python benchmarks/keep_cost.py gradients  # against keep="full": ViT-B/16, BERT-base, and three real models
    python benchmarks/keep_cost.py peak       # how far memory rises in a step, over a bare pass, at batch 32
    python benchmarks/keep_cost.py time       # a step over a bare pass, interleaved, at batch 8
    python benchmarks/keep_cost.py llama      # a Llama of 1B as a language model: plans, and 4 of its layers measured
    python benchmarks/keep_cost.py scores     # the same training with "full" and "replay", on a text and an image task
    python benchmarks/keep_cost.py            # all of these
    python benchmarks/keep_cost.py table      # the tables alone

Weights are random with seed 0 but in the real models of `gradients` (MODELS names their folders: encoder=...,vit=...,
lm=FOLDER@FILE.gguf). Float32, all tokens, the mean of the tokens before a head of two classes. What is in the results
is not measured again. THREADS sets the number of threads (2).
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sidestep as ss
from paper_scale import SCALES, fakes
from sidestep.backbone.load import load_backbone
from sidestep.interface.keep import Keep
from sidestep.measure.memory import mib, peak_memory
from sidestep.measure.meters import attached, measure_memory
from sidestep.measure.plan import plan
from sidestep.measure.step import idle_optimizer, settle, step_peak, train_step
from sidestep.model.settings import Settings
from study import Results

RESULTS = Results(Path(__file__).parent / "results" / "keep_cost.jsonl")
HEAD = ss.Classify(num_labels=2, pool="mean")
SCALE = {scale.name: scale for scale in SCALES}
WAYS: tuple[Keep, ...] = ("full", "replay", "int8", "bf16")


def read(rank: int, keep: Keep = "full") -> Settings:
    return Settings(ss.ReadConfig(rank=rank), HEAD, keep=keep)


def contenders() -> dict[str, Settings]:
    """By label, in the order of the tables."""
    found = {f"read, rank {rank}, {way}": read(rank, way) for rank in (8, 64, 128) for way in WAYS}
    sides = {
        "lst": ss.LSTConfig(),
        "sherl": ss.SherlConfig(),
        "dtl": ss.DTLConfig(),
        "unipt": ss.UniPTConfig(),
    }
    for name, config in sides.items():
        found |= {f"{name}, {way}": Settings(config, HEAD, keep=way) for way in ("full", "replay", "int8")}
    lora = Settings(ss.LoraConfig(rank=8), HEAD)
    return {
        **found,
        "synqt": Settings(ss.SynQTConfig(), HEAD),
        "lora": lora,
        "lora+checkpoint": replace(lora, checkpoint="late"),
        "full tuning": Settings(ss.FullConfig(), HEAD),
        "probe": Settings(ss.ProbeConfig(), HEAD),
    }


# --- bytes -------------------------------------------------------------------------------------------------------


def bytes_kept() -> None:
    """What each contender keeps for backward beyond the batch, at batch 32."""
    for name in ("vit-b", "bert-base", "t5-base"):
        for label, one in contenders().items():
            key = {"part": "bytes", "backbone": name, "contender": label, "batch": 32}
            RESULTS.once(lambda n=name, o=one: counted(n, o), **key)


def counted(name: str, contender: Settings) -> dict[str, Any]:
    scale = SCALE[name]
    try:
        with fakes():
            backbone = scale.build().eval()
            backbone.tie_weights()
            cost = measure_memory(backbone, contender, scale.inputs(32))
    except ValueError as error:  # a method may refuse the backbone, or have nothing to keep in another way
        return {"kept": None, "reason": str(error)}
    return {"kept": cost.kept_bytes, "flops": cost.flops}


# --- gradients ---------------------------------------------------------------------------------------------------


def gradients() -> None:
    """How far each way's gradients are from those of what is kept in full."""
    for name, rows in (("vit-b", 2), ("bert-base", 4)):
        key = {"part": "gradients", "backbone": name, "rows": rows, "rank": 8}
        RESULTS.once(lambda n=name, r=rows: compared(SCALE[n].build().eval(), SCALE[n].inputs(r)), **key)
    given = dict(pair.partition("=")[::2] for pair in os.environ.get("MODELS", "").split(",") if pair)
    for name in ("encoder", "vit", "lm"):
        if name not in given:
            print(f"gradients: no {name} in MODELS, left out")
            continue
        key = {"part": "gradients", "backbone": name, "rows": 8, "rank": 8}
        RESULTS.once(lambda n=name, p=given[name]: real(n, p), **key)


def real(name: str, place: str) -> dict[str, Any]:
    """A pretrained model on inputs of its kind: texts of this project's documents, or images of noise over a ramp."""
    folder, _, file = place.partition("@")
    backbone = load_backbone(f"gguf:{folder}@{file}" if file else folder, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        ramp = torch.linspace(-1, 1, 112)[None, None, None, :]
        batch = {"pixel_values": ramp + 0.5 * torch.randn(8, 3, 112, 112, generator=generator)}
    else:
        from sidestep.backbone.processors import load_processor

        tokenizer = load_processor(f"gguf:{folder}@{file}" if file else folder)
        text = (Path(__file__).parent.parent / "docs" / "design.md").read_text().split("\n\n")
        chosen = [part for part in text if len(part) > 200][:8]
        batch = dict(tokenizer(chosen, truncation=True, max_length=64, padding=True, return_tensors="pt"))
    labels = torch.randint(0, 2, (8,), generator=generator)
    return {"model": type(backbone).__name__, **compared(backbone, {**batch, "labels": labels})}


def compared(backbone: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """By way: the relative distance of the taps' gradients from those of "full", and their cosine."""
    found: dict[str, Tensor] = {}
    for way in WAYS:
        torch.manual_seed(0)
        model = ss.attach(backbone, ss.ReadConfig(rank=8), head=HEAD, keep=way).train()
        side: Any = model.side
        nn.init.normal_(side.out.weight, std=0.02)  # from zero, where this map starts, taps would get no gradient
        model(**batch).loss.backward()
        found[way] = torch.cat([p.grad.flatten() for name, p in model.trained_parameters() if "taps" in name])
        ss.detach(model)
    full = found["full"].double()
    return {
        way: {
            "distance": float((one.double() - full).norm() / full.norm()),
            "cosine": float(torch.cosine_similarity(one.double(), full, dim=0)),
        }
        for way, one in found.items()
        if way != "full"
    }


# --- peaks and times ---------------------------------------------------------------------------------------------


def peaks(rows: int = 32) -> None:
    """How far allocated memory rises in a step, over weights and optimizer state, and in a bare pass."""
    for name in ("vit-b", "bert-base"):
        chosen = {label: one for label, one in contenders().items() if label in TIMED}
        keys = {label: {"part": "peak", "backbone": name, "contender": label, "batch": rows} for label in chosen}
        if all(RESULTS.find(**key) for key in keys.values()):
            continue
        backbone, batch = SCALE[name].build().eval(), SCALE[name].inputs(rows)
        inputs = {one: value for one, value in batch.items() if one != "labels"}
        RESULTS.once(
            lambda b=backbone, i=inputs: {"peak": bare_peak(b, i)},
            part="peak",
            backbone=name,
            contender="bare pass",
            batch=rows,
        )
        for label, one in chosen.items():
            RESULTS.once(lambda b=backbone, o=one, i=batch: {"peak": peak_of(b, o, i)}, **keys[label])


def bare_peak(backbone: nn.Module, inputs: dict[str, Tensor]) -> int:
    with torch.no_grad():
        return peak_memory(lambda: backbone(**inputs)).allocated


def peak_of(backbone: nn.Module, contender: Settings, batch: dict[str, Tensor]) -> int:
    with attached(backbone, contender) as model:
        rise = step_peak(model, batch)
    assert rise is not None
    return rise.allocated


TIMED = (
    *(f"read, rank {rank}, {way}" for rank in (8, 128) for way in ("full", "replay", "int8")),
    "lora",
    "lora+checkpoint",
)


def times(rows: int = 8, rounds: int = 5) -> None:
    """Medians of interleaved steps over the median of the bare pass, the first round left out."""
    for name in ("vit-b", "bert-base"):
        key = {"part": "time", "backbone": name, "batch": rows, "rounds": rounds}
        RESULTS.once(lambda n=name: timed(n, rows, rounds), **key)


def timed(name: str, rows: int, rounds: int) -> dict[str, Any]:
    backbone, batch = SCALE[name].build().eval(), SCALE[name].inputs(rows)
    inputs = {one: value for one, value in batch.items() if one != "labels"}
    chosen = {label: one for label, one in contenders().items() if label in TIMED}
    seconds: dict[str, list[float]] = {label: [] for label in ("bare pass", *chosen)}
    for turn in range(rounds + 1):
        labels = list(seconds)
        for label in labels[turn % len(labels) :] + labels[: turn % len(labels)]:
            seconds[label].append(
                bare_seconds(backbone, inputs) if label == "bare pass" else step(backbone, chosen[label], batch)
            )
    rounds_of = {label: [round(value, 3) for value in values[1:]] for label, values in seconds.items()}
    return {
        "rounds_of": rounds_of,
        "medians": {label: statistics.median(values) for label, values in rounds_of.items()},
    }


def bare_seconds(backbone: nn.Module, inputs: dict[str, Tensor]) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        backbone(**inputs)
    return time.perf_counter() - start


def step(backbone: nn.Module, contender: Settings, batch: dict[str, Tensor]) -> float:
    with attached(backbone, contender) as model:
        model.train()
        with idle_optimizer(model) as optimizer:
            settle(model, batch, optimizer, bf16=False)
            start = time.perf_counter()
            train_step(model, batch, optimizer, bf16=False)
            return time.perf_counter() - start


# --- a language model --------------------------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
LLAMA_ROWS, LLAMA_TOKENS = 8, 512


def llama() -> None:
    """Bytes that a token of a language model keeps, in bf16, by plans of 16 layers, and of 4 by a real step too."""
    methods = {"read, rank 128": ss.ReadConfig(), "read, rank 8": ss.ReadConfig(rank=8), "lora": ss.LoraConfig(rank=8)}
    for layers, rows in ((16, LLAMA_ROWS), (4, 1)):
        for label, config in methods.items():
            for keep in ("full", "replay"):
                for lm_loss in ("own", "chunked"):
                    for checkpoint in (None, "late") if label == "lora" else (None,):
                        if label == "lora" and keep == "replay":
                            continue
                        key = {
                            "part": "llama",
                            "layers": layers,
                            "rows": rows,
                            "contender": label + ("+checkpoint" if checkpoint else ""),
                            "keep": keep,
                            "lm_loss": lm_loss,
                        }
                        how = {"keep": keep, "lm_loss": lm_loss, "checkpoint": checkpoint}
                        RESULTS.once(lambda c=config, n=layers, r=rows, h=how: language_model(c, n, r, h), **key)


def language_model(config: Any, layers: int, rows: int, how: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig

    def planned(measure: bool) -> Any:
        shape = AutoConfig.for_model(**{**LLAMA, "num_hidden_layers": layers})
        return plan(
            shape,
            config,
            head=None,
            writes="lm",
            batch=rows,
            length=LLAMA_TOKENS,
            precision="bfloat16",
            measure=measure,
            **how,
        )

    found = planned(measure=False)
    tokens = rows * LLAMA_TOKENS
    result = {"kept": found.saved_bytes, "kept_a_token": found.saved_bytes / tokens, "peak": found.peak_bytes}
    if layers == 4:
        real = planned(measure=True)
        result |= {"measured_kept": real.saved_bytes, "measured_peak": real.peak_bytes}
    return result


# --- scores ------------------------------------------------------------------------------------------------------

SCORED_ROWS, SCORED_EPOCHS, SCORED_BATCH = 500, 3, 25


def scores() -> None:
    """READ (rank 32) in three epochs on 500 rows: customer reviews on all-MiniLM-L6-v2, digits on the shared ViT."""
    for task in ("cr", "digits"):
        for seed in (0, 1):
            for keep in ("full", "replay", "int8"):
                key = {"part": "scores", "task": task, "seed": seed, "keep": keep}
                RESULTS.once(lambda t=task, s=seed, k=keep: trained(t, s, k), **key)


def trained(task: str, seed: int, keep: Any) -> dict[str, Any]:
    """The loss of every step, and the accuracy on the dev rows."""
    backbone, batches, classes = text_batches() if task == "cr" else image_batches()
    torch.manual_seed(seed)
    head = ss.Classify(num_labels=classes, pool="mean")
    model = ss.attach(backbone, ss.ReadConfig(rank=32), head=head, keep=keep).train()
    optimizer = torch.optim.AdamW([p for _, p in model.trained_parameters()], lr=ss.ReadConfig.rate)
    losses = []
    for _ in range(SCORED_EPOCHS):
        for start in torch.randperm(SCORED_ROWS // SCORED_BATCH).tolist():
            loss = model(**batches(start * SCORED_BATCH, SCORED_BATCH)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    right = []
    for start in range(SCORED_ROWS, SCORED_ROWS + 300, SCORED_BATCH):
        batch = batches(start, SCORED_BATCH)
        labels = batch.pop("labels")
        with torch.no_grad():
            right.append(model(**batch).logits.argmax(-1) == labels)
    return {"losses": losses, "accuracy": float(torch.cat(right).float().mean())}


def text_batches() -> tuple[nn.Module, Callable[[int, int], dict[str, Tensor]], int]:
    from text_tasks import encoded, encoder

    backbone, tokenizer = encoder()
    found = encoded("cr", tokenizer)
    order = torch.randperm(len(found.train), generator=torch.Generator().manual_seed(0)).tolist()
    rows = found.train.select(order)

    def batch(start: int, size: int) -> dict[str, Tensor]:
        made = found.collate([rows[place] for place in range(start, start + size)])
        return {name: value for name, value in made.items() if name != "length"}

    return backbone, batch, len(found.labels.names)


def image_batches() -> tuple[nn.Module, Callable[[int, int], dict[str, Tensor]], int]:
    from image_tasks import SIDE, digits, vision_backbone

    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]

    def batch(start: int, size: int) -> dict[str, Tensor]:
        part = images[start : start + size, None].expand(-1, 3, -1, -1)
        pixels = nn.functional.interpolate(part, size=(SIDE, SIDE), mode="bilinear") * 2 - 1
        return {"pixel_values": pixels, "labels": labels[start : start + size]}

    return vision_backbone().eval(), batch, 10


# --- tables ------------------------------------------------------------------------------------------------------


def tables() -> Iterator[str]:
    """All tables as Markdown."""
    lines = RESULTS.lines
    kept = {(line["backbone"], line["contender"]): line for line in lines if line["part"] == "bytes"}
    names = list(dict.fromkeys(name for name, _ in kept))
    if kept:
        yield "| kept for backward, MiB | " + " | ".join(names) + " |\n|---|" + "---:|" * len(names)
        for label in contenders():
            cells = [kept.get((name, label), {}).get("kept") for name in names]
            if any(cell is not None for cell in cells):
                yield f"| {label} | " + " | ".join("–" if cell is None else f"{mib(cell):.1f}" for cell in cells) + " |"
        yield ""
    found = [line for line in lines if line["part"] == "gradients"]
    if found:
        yield "| gradients of taps | replay: distance | bf16: cosine | int8: cosine |\n|---|---|---|---|"
        for line in found:
            name = f"{line['backbone']} ({line['model']})" if "model" in line else line["backbone"]
            yield (
                f"| {name} | {line['replay']['distance']:.1e} | {line['bf16']['cosine']:.6f} | "
                f"{line['int8']['cosine']:.6f} |"
            )
        yield ""
    rises = {(line["backbone"], line["contender"]): line["peak"] for line in lines if line["part"] == "peak"}
    took = {line["backbone"]: line for line in lines if line["part"] == "time"}
    for name in dict.fromkeys([*(name for name, _ in rises), *took]):
        yield f"| {name} | peak of a step, MiB (batch 32) | step over bare passes (batch 8) |\n|---|---:|---:|"
        for label in ("bare pass", *TIMED):
            peak = rises.get((name, label))
            medians = took.get(name, {}).get("medians", {})
            over = f"{medians[label] / medians['bare pass']:.2f}" if label in medians else "–"
            yield f"| {label} | {'–' if peak is None else f'{mib(peak):.0f}'} | {over} |"
        yield ""
    runs = {(line["task"], line["seed"], line["keep"]): line for line in lines if line["part"] == "scores"}
    if runs:
        yield "| task | seed | keep | accuracy | largest distance of a step's loss from full |\n|---|---|---|---:|---:|"
        for (task, seed, keep), line in runs.items():
            full = runs[task, seed, "full"]["losses"]
            off = max(abs(one - other) for one, other in zip(line["losses"], full, strict=True))
            yield f"| {task} | {seed} | {keep} | {line['accuracy']:.3f} | {off:.1e} |"
        yield ""
    models = [line for line in lines if line["part"] == "llama"]
    if models:
        columns = "kept a token, KiB | peak, MiB | measured: kept a token, KiB | peak, MiB"
        yield f"| language model | layers | keep | loss | {columns} |\n|---|---|---|---|---:|---:|---:|---:|"
        for line in models:
            tokens = line["rows"] * LLAMA_TOKENS
            real = (
                f"{line['measured_kept'] / tokens / 1024:.1f} | {mib(line['measured_peak']):.0f}"
                if "measured_kept" in line
                else "– | –"
            )
            yield (
                f"| {line['contender']} | {line['layers']} | {line['keep']} | {line['lm_loss']} | "
                f"{line['kept_a_token'] / 1024:.1f} | {mib(line['peak']):.0f} | {real} |"
            )


PARTS: dict[str, Callable[[], None]] = {
    "bytes": bytes_kept,
    "gradients": gradients,
    "peak": peaks,
    "time": times,
    "llama": llama,
    "scores": scores,
}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    asked = sys.argv[1:]
    for name, part in PARTS.items():
        if not asked or name in asked:
            part()
            gc.collect()
    print("\n".join(tables()))


if __name__ == "__main__":
    main()
