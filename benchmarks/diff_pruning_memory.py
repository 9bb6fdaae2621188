"""What diff pruning's first stage takes for each parameter of a BERT-base with random weights, in words of 4 bytes.

    python benchmarks/diff_pruning_memory.py [cpu|cuda]  # measures, and writes them into results
    python benchmarks/diff_pruning_memory.py table       # the table alone

The tensors that are kept from step to step are counted. How far a step's allocations rise above them, which includes
the gradient, is measured twice. Once it is the optimizer's step alone, with gradients given. Once it is with a forward
and backward pass over one row of 8 tokens, which adds what these keep. The release's words are counted in its source.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from sidestep.measure.memory import peak_memory
from sidestep.sparse.hard_concrete import HardConcrete, Noise, Penalty
from sidestep.sparse.optimizer import DiffPruningOptimizer
from sidestep.versions import versions

FOLDER = Path(__file__).parent / "results"
TIMED = 3
#: Model, p0, w, alpha, a gradient of each but p0, and four averages. Then what a step makes besides.
RELEASE, RELEASE_STEP = 11, 6


def measure(device: str, state_bits: int) -> None:
    """Measure on a device and write the numbers."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(), add_pooling_layer=False).to(device).train()
    masked = dict(model.named_parameters())
    numel = sum(p.numel() for p in masked.values())
    given = {"gate": HardConcrete(), "penalty": Penalty(weight=1.25e-7), "structured": True, "noise": Noise(0)}
    optimizer = DiffPruningOptimizer(masked, lr=1e-5, state_bits=state_bits, **given)
    ids = torch.randint(0, 30000, (1, 8), device=device)

    def step() -> None:
        for p in masked.values():
            p.grad = torch.full_like(p, 1e-6)
        optimizer.step()
        optimizer.zero_grad()

    def training_step() -> None:
        model(input_ids=ids).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    training_step()
    kept = [*masked.values(), *(value for state in optimizer.state.values() for value in state.values())]
    numbers = {
        "parameters": numel,
        "kept": sum(tensor.numel() * tensor.element_size() for tensor in kept) / (4 * numel),
        "step": peak_memory(step, device).allocated / (4 * numel),
        "training_step": peak_memory(training_step, device).allocated / (4 * numel),
        "seconds": statistics.median(_seconds(step) for _ in range(TIMED)),
        "state_bits": state_bits,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)",
        "versions": versions(("torch", "transformers", "bitsandbytes")),
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"diff_pruning_memory-{device}-{state_bits}.json"
    path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def table() -> None:
    """Show what was measured."""
    print("| words of 4 bytes for each parameter | kept | a step besides | optimizer's step | device |")
    print("|---|---|---|---|---|")
    print(f"| release (counted; its gradients are kept) | {RELEASE} | {RELEASE_STEP} | | |")
    for path in sorted(FOLDER.glob("diff_pruning_memory-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        print(
            f"| Sidestep, averages in {found['state_bits']} bits (measured, gradient and passes included) | "
            f"{found['kept']:.3f} | "
            f"{found['training_step']:.3f} | {found['seconds']:.2f} s | {found['device']} |"
        )


def _seconds(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    if sys.argv[1:] != ["table"]:
        for bits in (32, 8):
            measure(*sys.argv[1:] or ["cpu"], bits)
    table()
