"""What many tasks cost from one pass of a bank, over a bare pass of the backbone.

    python benchmarks/bank_together.py          # runs what is missing (about 25 minutes on 2 cores), then the table
    python benchmarks/bank_together.py table    # the table alone
    python benchmarks/bank_together.py plot     # cost against tasks, as docs/bank_together.svg
    python benchmarks/bank_together.py memory   # what a further task takes, on the disk and in memory

BERT-base with 128 tokens, ViT-B/16 with 224 px, random weights, batch 8, float32. A bare pass and a call take turns,
5 rounds after one that is not counted. The ratio is of medians. Beside some of them stand as many passes as there are
tasks (each by itself, already in memory), and the PEFT library's two ways for LoRA: a batch whose rows are repeated
for each adapter, and a loop over `set_adapter`. These long ways take part in two of the rounds. THREADS sets the number
of threads (2).
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sidestep as ss
from read_cost import bert, vit
from sidestep.methods import MethodConfig
from study import Results

RESULTS = Results(Path(__file__).parent / "results" / "bank_together.jsonl")
BACKBONES = {"BERT-base": bert, "ViT-B/16": vit}
BATCH, ROUNDS, LONG_ROUNDS = 8, 5, 2
Banked = tuple[MethodConfig, str]
"""A method, and what its head reads."""
READ: MethodConfig = ss.ReadConfig(rank=128)
MIXED: Sequence[Banked] = (
    *((READ, "cls"), (ss.ReadConfig(rank=8), "mean"), (ss.ReadoutConfig(), "cls")),
    *((ss.ProbeConfig(), "mean"), (ss.SherlConfig(), "cls"), (ss.DTLConfig(), "cls")),
)
CASES: dict[str, tuple[Sequence[Banked], tuple[int, ...]]] = {
    "READ 128, one token": ([(READ, "cls")], (1, 4, 16, 64, 256)),
    "READ 8, all tokens": ([(ss.ReadConfig(rank=8), "mean")], (1, 16, 64)),
    "READ 128, all tokens": ([(READ, "mean")], (4, 16)),
    "readout": ([(ss.ReadoutConfig(), "cls")], (1, 16, 64, 256)),
    "SHERL": ([(ss.SherlConfig(), "cls")], (16,)),
    "DTL": ([(ss.DTLConfig(), "cls")], (16,)),
    "six methods": (MIXED, (12,)),
}


ALONE = (("READ 128, one token", 16), ("SHERL", 16), ("DTL", 16), ("six methods", 12))
"""Where each task is run by itself too."""


def filled(backbone: nn.Module, kinds: Sequence[Banked], count: int, folder: str) -> ss.TaskBank:
    """A bank of so many tasks, each with values of its own."""
    bank = ss.TaskBank(backbone, folder)
    for config, pool in kinds:
        model = ss.attach(backbone, config, head=ss.Classify(num_labels=2, pool=pool))
        for _ in range(count // len(kinds)):
            with torch.no_grad():
                for _, parameter in model.trained_parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
            bank.add(f"task-{len(bank.names)}", model)
        ss.detach(model)
    return bank


def ratios(
    bare: Callable[[], object],
    ways: Mapping[str, Callable[[], object]],
    long: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """Median seconds of each way over those of a bare pass. All take turns, the long ones in fewer rounds."""
    long = long or {}
    seconds: dict[str, list[float]] = {name: [] for name in ("bare", *ways, *long)}
    for number in range(ROUNDS + 1):
        for name, run in (("bare", bare), *ways.items(), *(long.items() if 1 <= number <= LONG_ROUNDS else ())):
            begin = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    bare_seconds = statistics.median(seconds.pop("bare"))
    return {"bare": bare_seconds, **{name: statistics.median(each) / bare_seconds for name, each in seconds.items()}}


def measured(backbone: nn.Module, inputs: dict[str, Tensor], case: str, count: int) -> dict[str, Any]:
    kinds, _ = CASES[case]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        bank = filled(backbone, kinds, count, folder)
        names = bank.names
        for _ in range(3):  # tasks are read, and borders are found and proved
            bank(inputs, tasks=names)
        alone = {"each alone": lambda: [bank.run(name, inputs) for name in names]} if (case, count) in ALONE else {}
        found = ratios(lambda: backbone(**inputs), {"together": lambda: bank(inputs, tasks=names)}, alone)
        size = sum(entry.bytes for entry in bank.entries()) / count
        bank.close()
    return {**found, "passes": bank.together.passes, "bytes_a_task": round(size)}


def peft(backbone: nn.Module, inputs: dict[str, Tensor], count: int = 16) -> dict[str, Any]:
    """LoRA, rank 8 on query and value: PEFT's mixed batch, and a loop over its adapters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules=["query", "value", "q_proj", "v_proj"], init_lora_weights=False)
    with torch.no_grad():
        model = get_peft_model(backbone, config, adapter_name="0")
        for number in range(1, count):
            model.add_adapter(str(number), config)
        model.eval()
        names = [str(number) for number in range(count) for _ in range(BATCH)]
        repeated = {name: tensor.repeat(count, *[1] * (tensor.ndim - 1)) for name, tensor in inputs.items()}

        def loop() -> None:
            for number in range(count):
                model.set_adapter(str(number))
                model(**inputs)

        def bare() -> None:
            with model.disable_adapter():
                model(**inputs)

        long = {"mixed batch": lambda: model(**repeated, adapter_names=names), "set_adapter loop": loop}
        found = ratios(bare, {}, long)
        model.unload()
    return found


def run() -> None:
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    for name, build in BACKBONES.items():
        torch.manual_seed(0)
        backbone, inputs = build(BATCH)
        backbone.eval()
        for case, (_, counts) in CASES.items():
            for count in counts:
                key = {"backbone": name, "case": case, "tasks": count}
                RESULTS.once(lambda b=backbone, i=inputs, c=case, n=count: measured(b, i, c, n), **key)
        RESULTS.once(lambda b=backbone, i=inputs: peft(b, i), backbone=name, case="LoRA (PEFT)", tasks=16)


def table() -> None:
    print("| tasks | | " + " | ".join(f"{name}: together | each alone" for name in BACKBONES) + " |")
    print("|---|---:" + "|---:|---:" * len(BACKBONES) + "|")
    for case, (_, counts) in CASES.items():
        for count in counts:
            lines = [RESULTS.find(backbone=name, case=case, tasks=count) for name in BACKBONES]
            if all(lines):
                cells = [
                    f"{line['together']:.2f} | {line.get('each alone', float('nan')):.1f}" for line in lines if line
                ]
                print(f"| {case} | {count} | {' | '.join(cells).replace('nan', '–')} |")
    lines = [RESULTS.find(backbone=name, case="LoRA (PEFT)", tasks=16) for name in BACKBONES]
    for way in ("mixed batch", "set_adapter loop"):
        if all(lines):
            print(f"| LoRA, PEFT's {way} | 16 | {' | '.join(f'{line[way]:.1f} | –' for line in lines if line)} |")


def plot() -> None:
    """Cost against the number of tasks."""
    import altair as alt

    points = [
        {
            "backbone": line["backbone"],
            "tasks of": line["case"],
            "tasks": line["tasks"],
            "bare passes": line["together"],
        }
        for line in RESULTS.lines
        if "together" in line and len(CASES[line["case"]][1]) > 1
    ]
    chart = alt.Chart(alt.Data(values=points)).mark_line(point=True)
    chart = chart.encode(
        x=alt.X("tasks:Q", scale=alt.Scale(type="log", base=4)),
        y=alt.Y("bare passes:Q", scale=alt.Scale(zero=True)),
        color="tasks of:N",
    ).properties(width=260, height=200)
    chart.facet("backbone:N").save(str(Path(__file__).parents[1] / "docs" / "bank_together.svg"))


def memory() -> None:
    """What a further task takes: its file, and its values in memory."""
    print("| tasks | " + " | ".join(f"{name}: file, MiB | in memory, MiB" for name in BACKBONES) + " |")
    print("|---" + "|---:|---:" * len(BACKBONES) + "|")
    backbones = {name: build(BATCH)[0].eval() for name, build in BACKBONES.items()}
    for case in (case for case, (kinds, _) in CASES.items() if len(kinds) == 1):
        cells = []
        for backbone in backbones.values():
            with tempfile.TemporaryDirectory() as folder:
                bank = filled(backbone, CASES[case][0], 1, folder)
                (entry,) = bank.entries()
                values = sum(tensor.nbytes for tensor in bank.activate(entry.name).state_dict().values())
                bank.close()
            cells += [f"{entry.bytes / 2**20:.2f}", f"{values / 2**20:.2f}"]
        print(f"| {case} | {' | '.join(cells)} |")


def main() -> None:
    asked = sys.argv[1] if len(sys.argv) > 1 else "run"
    if asked in ("plot", "memory"):
        {"plot": plot, "memory": memory}[asked]()
        return
    if asked == "run":
        run()
    table()


if __name__ == "__main__":
    main()
