"""What sharding a backbone costs and saves: memory of each card and seconds of a step, sharded and whole.

    torchrun --nproc-per-node 2 benchmarks/shard_steps.py FILE             # on two cards; `gpu.py` starts it
    torchrun --nproc-per-node 2 benchmarks/shard_steps.py FILE --small     # whether it runs at all, on a CPU

Every process runs the whole batch, so a step of N cards does N times the work of one.
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
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sidestep as ss
from gpu_cases import CONTENDERS, SCALES
from sidestep import ranks
from sidestep.backbone.shards import shard_bytes
from sidestep.disk.atomic import whole
from sidestep.measure.memory import peak_memory
from sidestep.measure.step import accepted, idle_optimizer, nbytes, seconds_of

BACKBONES = ("llama-1b", "bert-base")
MEASURED = ("read-8", "read-8 replay", "dtl", "lora+checkpoint")
STEPS = 5


def row_of(name: str, label: str, device: torch.device, *, sharded: bool, small: bool) -> dict[str, Any]:
    """What a step of one contender takes on each card."""
    torch.manual_seed(0)
    scale, one = SCALES[name], CONTENDERS[label]
    settings, batch = scale.settings(one), scale.batch(small=small)
    model: Any = ss.attach(
        scale.backbone(small=small),
        settings.method,
        head=settings.head,
        keep=settings.keep,
        checkpoint=settings.checkpoint,
        lm_loss=settings.lm_loss,
    )
    model = ss.shard(model) if sharded else model.to(device)
    names = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    parallel = DistributedDataParallel(model.train())
    inputs = accepted(model, batch)
    with idle_optimizer(model) as optimizer:

        def step() -> None:
            parallel(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # which proves a replay and a chunked loss
        step()
        seconds = [seconds_of(step, device) for _ in range(STEPS)]
        peak = peak_memory(step, device).allocated
    here, all_of_them = shard_bytes(model)
    return {
        "backbone": name,
        "contender": label,
        "cards": ranks.count(),
        "sharded": sharded,
        "weight_bytes": nbytes([*model.parameters(), *model.buffers()]) - all_of_them + here,
        "peak_bytes": peak,
        "step_seconds": statistics.median(seconds),
        "status": "ok",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of each card and seconds of a step, sharded and whole.")
    parser.add_argument("file", type=Path, help="of rows, as JSON")
    parser.add_argument("--small", action="store_true", help="tiny sizes: whether it runs at all")
    given = parser.parse_args()
    ranks.begin()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for name in BACKBONES:
        for label in MEASURED:
            for sharded in (False, True):
                # the same error on all: each has the same contender
                try:
                    rows.append(row_of(name, label, device, sharded=sharded, small=given.small))
                except ValueError as error:
                    rows.append({"backbone": name, "contender": label, "sharded": sharded, "status": str(error)})
                if ranks.is_first():
                    with whole(given.file) as path:
                        path.write_text(json.dumps(rows, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
