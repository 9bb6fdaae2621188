"""What `tests/model/test_sharding.py` looks at: started by torchrun, every process trains and saves sharded models.

    torchrun --nproc-per-node 2 tests/sharded_processes.py FOLDER

Process 0 writes FOLDER/found.json: what was found for each case, and what all cases have in common.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sidestep as ss
from sidestep.backbone import digest_of, pretrained_tensors
from sidestep.backbone.shards import is_shard, shard_bytes
from sidestep.model.sharding import shard
from tiny import FAMILIES, LABELS, logits, randomize

ROWS = 4

#: The case's name: the family, the method, what is attached besides, and the precision of the backbone.
CASES: dict[str, tuple[str, ss.MethodConfig, dict[str, Any], torch.dtype]] = {
    "read": ("bert", ss.ReadConfig(rank=4), {}, torch.float32),
    "read, replayed": ("bert", ss.ReadConfig(rank=4), {"keep": "replay"}, torch.float32),
    "read, int8": ("bert", ss.ReadConfig(rank=4), {"keep": "int8"}, torch.float32),
    "read on an LM": ("llama", ss.ReadConfig(rank=4), {"keep": "replay", "lm_loss": "chunked"}, torch.float32),
    "sherl": ("bert", ss.SherlConfig(reduction=4), {}, torch.float32),
    "sherl, replayed": ("bert", ss.SherlConfig(reduction=4), {"keep": "replay"}, torch.float32),
    "dtl": ("bert", ss.DTLConfig(rank=4, late_blocks=2), {}, torch.float32),
    "dtl, replayed": ("bert", ss.DTLConfig(rank=4, late_blocks=2), {"keep": "replay"}, torch.float32),
    "dtl, recomputed": ("bert", ss.DTLConfig(rank=4, late_blocks=2), {"checkpoint": "late"}, torch.float32),
    "lst on t5": ("t5", ss.LSTConfig(reduction=2), {}, torch.float32),
    "lst": ("bert", ss.LSTConfig(reduction=2), {"keep": "replay"}, torch.float32),
    "side_attention": ("llama", ss.SideAttentionConfig(rank=4, heads=2), {"keep": "replay"}, torch.float32),
    "lora": ("bert", ss.LoraConfig(rank=4), {}, torch.float32),
    "lora, recomputed": ("llama", ss.LoraConfig(rank=4), {"checkpoint": "late"}, torch.float32),
    "bitfit": ("bert", ss.BitFitConfig(), {}, torch.float32),
    "read, bfloat16": ("bert", ss.ReadConfig(rank=4), {"keep": "replay"}, torch.bfloat16),
    "dtl, bfloat16": ("llama", ss.DTLConfig(rank=4, late_blocks=2), {"keep": "replay"}, torch.bfloat16),
}


def attached(case: str) -> ss.SideModel:
    """The model of a case, the same in every process and at every call."""
    family, method, how, dtype = CASES[case]
    backbone = FAMILIES[family].model().to(dtype)
    torch.manual_seed(3)
    head = None if "lm_loss" in how else ss.Classify(num_labels=LABELS)
    model = ss.attach(backbone, method, head=head, **how)
    randomize(model)
    return model.train()


def batch_of(case: str) -> dict[str, Tensor]:
    """A batch with labels."""
    family = FAMILIES[CASES[case][0]]
    batch = family.inputs(rows=ROWS)
    batch["labels"] = batch["input_ids"] if "lm_loss" in CASES[case][2] else family.labels(ROWS)
    return batch


def halves(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Each process's rows."""
    size = ROWS // dist.get_world_size()
    for rank in range(dist.get_world_size()):
        yield {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}


def gradients(model: ss.SideModel, run: Callable[..., Any], *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of what is trained by the mean of the losses of some batches."""
    model.zero_grad()
    for batch in batches:
        (run(**batch).loss / len(batches)).backward()
    return {name: p.grad.clone() for name, p in model.trained_parameters() if p.grad is not None}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest gradient."""
    assert ours.keys() == theirs.keys()
    assert len(ours) > 0
    size = max(float(one.abs().max()) for one in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours) / size


def gathered_units(model: nn.Module) -> int:
    """How many blocks' weights are whole in this process now."""
    places = {place.module for place in model.places if place.site.kind == "block"}
    return sum(not any(is_shard(p) for p in block.parameters()) for block in places)


def case_of(case: str, folder: Path) -> dict[str, Any]:
    """What is found for a case."""
    rank, batch = dist.get_rank(), batch_of(case)
    plain, low = attached(case), CASES[case][3] != torch.float32
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        wanted_output = logits(plain.eval()(**inputs))
    plain.train()
    # in low precision a batch's rows are rounded otherwise in a larger batch
    wanted = gradients(plain, plain, *(halves(batch) if low else [batch]))
    wanted_digest = digest_of(pretrained_tensors(plain.backbone, plain.trained.originals, plain_name(plain)))

    model = attached(case)
    shard(model)
    here, whole = shard_bytes(model)
    parallel = DistributedDataParallel(model)
    mine = list(halves(batch))[rank]
    first = distance(gradients(model, parallel, mine), wanted)
    left_whole = gathered_units(model)
    second = distance(gradients(model, parallel, mine), wanted)
    with torch.no_grad():
        output = logits(model.eval()(**inputs))
    found = {
        "first": first,
        "second": second,
        "left whole": [left_whole, gathered_units(model)],
        "outputs": bool(torch.equal(output, wanted_output)),
        "share": here / whole,
        "blocks": len({place.module for place in model.places if place.site.kind == "block"}),
        "digest": model.digest == wanted_digest,
        "again": digest_of(pretrained_tensors(model.backbone, model.trained.originals, plain_name(model)))
        == wanted_digest,
    }
    saved = folder / case
    if rank == 0:
        model.save_pretrained(saved)
        found["saved"] = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
        found["task"] = sum(tensor.nbytes for tensor in model.state_dict().values())
    dist.barrier()
    fresh = FAMILIES[CASES[case][0]].model().to(CASES[case][3])
    with torch.no_grad():
        found["loaded"] = bool(torch.equal(logits(ss.load(saved, fresh).eval()(**inputs)), wanted_output))
    return found


def plain_name(model: ss.SideModel) -> Callable[[str], str | None]:
    """Gives back the names that weights had before the method."""
    return str if model.delta is None else model.delta.plain_name


@contextmanager
def refused() -> Iterator[dict[str, str]]:
    """Notes the error that is raised within."""
    told: dict[str, str] = {}
    try:
        yield told
    except ValueError as error:
        told["error"] = str(error)


def main(folder: Path) -> None:
    """Look at every case."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo")
    cases = sys.argv[2:] or CASES
    found: dict[str, Any] = {case: case_of(case, folder) for case in cases}
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, found)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(everybody))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
