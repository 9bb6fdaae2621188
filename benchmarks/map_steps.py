"""What a backbone over two cards costs: a step beside that of one card, memory of each card, and what crosses.

    python benchmarks/map_steps.py FILE             # on two cards; `gpu.py` starts it
    python benchmarks/map_steps.py FILE --small     # whether it runs at all, on a CPU

The first half of the blocks is on one card, the rest on the other, by accelerate's hooks. Nothing runs at once: a step
waits for each card in turn. So two cards buy memory and not time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import Tensor, nn

import sidestep as ss
from gpu_cases import CONTENDERS, SCALES
from sidestep.disk.atomic import whole
from sidestep.measure.memory import peak_memory
from sidestep.measure.step import accepted, idle_optimizer, nbytes, seconds_of

BACKBONES = ("llama-1b", "bert-base")
MEASURED = ("read-8", "read-8 replay", "dtl")
STEPS = 5


def halves(backbone: Any, cards: list[torch.device]) -> nn.Module:
    """A backbone with about half of its weights on each card, as accelerate shares them out."""
    size = nbytes([*backbone.parameters(), *backbone.buffers()])
    found = infer_auto_device_map(backbone, {0: int(0.55 * size), 1: 2 * size}, backbone._no_split_modules)
    return dispatch_model(backbone, {name: cards[int(place)] for name, place in found.items()}, force_hooks=True)


def step_of(name: str, label: str, cards: list[torch.device], *, small: bool) -> tuple[dict[str, Any], Tensor, Tensor]:
    """What a step of one contender takes on some cards, its loss, and the gradients in a row."""
    torch.manual_seed(0)
    scale, one = SCALES[name], CONTENDERS[label]
    settings, batch = scale.settings(one), scale.batch(small=small)
    backbone = scale.backbone(small=small)
    backbone = halves(backbone, cards) if len(cards) > 1 else backbone.to(cards[0])
    model: Any = ss.attach(backbone, settings.method, head=settings.head, keep=settings.keep)
    model.train()
    inputs = accepted(model, batch)
    loss = model(**inputs).loss
    loss.backward()
    gradients = torch.cat([p.grad.flatten().cpu() for _, p in model.trained_parameters() if p.grad is not None])
    model.zero_grad()
    with idle_optimizer(model) as optimizer:

        def step() -> None:
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        seconds = [seconds_of(step, cards[0]) for _ in range(STEPS)]
        peaks = [peak_memory(step, card).allocated for card in dict.fromkeys(cards)]
    row = {"cards": len(cards), "step_seconds": statistics.median(seconds), "peak_bytes": peaks}
    return row, loss.detach().cpu(), gradients


def row_of(name: str, label: str, cards: list[torch.device], *, small: bool) -> dict[str, Any]:
    """A step on one card and on all, and how far they are apart."""
    one, loss, gradients = step_of(name, label, cards[:1], small=small)
    two, own_loss, own_gradients = step_of(name, label, cards, small=small)
    apart = (own_gradients - gradients).norm() / gradients.norm()
    return {
        "backbone": name,
        "contender": label,
        "one": one,
        "two": two,
        "loss_apart": float((own_loss - loss).abs()),
        "gradients_apart": float(apart),
        "status": "ok",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A step on a backbone over two cards beside that of one card.")
    parser.add_argument("file", type=Path, help="of rows, as JSON")
    parser.add_argument("--small", action="store_true", help="tiny sizes: whether it runs at all")
    given = parser.parse_args()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = [torch.device("cuda", number) for number in range(2)] if count > 1 else [torch.device("cpu")] * 2
    rows = [row_of(name, label, cards, small=given.small) for name in BACKBONES for label in MEASURED]
    with whole(given.file) as path:
        path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
