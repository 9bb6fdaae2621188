"""What `tests/model/test_sharding.py` looks at: processes that shard, train and save models.

    torchrun --nproc-per-node 2 tests/sharded_processes.py FOLDER

Process 0 writes FOLDER/found.json, a list of what each process has found. FOLDER/bert, FOLDER/llama, FOLDER/texts.csv
and FOLDER/answers.jsonl are there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel

import sidestep as ss
from dual_encoders import clip
from sidestep.backbone import digest_of, pretrained_tensors
from sidestep.backbone.shards import is_shard, is_sharded, shard_bytes
from sidestep.measure.memory import peak_memory
from sidestep.model.features import check_storable
from sidestep.tasks.predict import predict
from small_tasks import reviews
from tiny import FAMILIES, LABELS, logits, randomize

ROWS = 4

#: The case's name: the family, the method, what is attached besides, and the precision of the backbone.
CASES: dict[str, tuple[str, ss.MethodConfig, dict[str, Any], torch.dtype]] = {
    "read": ("bert", ss.ReadConfig(rank=4), {}, torch.float32),
    "read, replayed": ("bert", ss.ReadConfig(rank=4), {"keep": "replay"}, torch.float32),
    "read, int8": ("bert", ss.ReadConfig(rank=4), {"keep": "int8"}, torch.float32),
    "read on an LM": ("llama", ss.ReadConfig(rank=4), {"keep": "replay", "lm_loss": "chunked"}, torch.float32),
    "sherl": ("bert", ss.SherlConfig(reduction=4, dropout=0.0), {}, torch.float32),
    "sherl, replayed": ("bert", ss.SherlConfig(reduction=4, dropout=0.0), {"keep": "replay"}, torch.float32),
    "dtl": ("bert", ss.DTLConfig(rank=4, late_blocks=2), {}, torch.float32),
    "dtl, replayed": ("bert", ss.DTLConfig(rank=4, late_blocks=2), {"keep": "replay"}, torch.float32),
    "dtl, recomputed": ("bert", ss.DTLConfig(rank=4, late_blocks=2), {"checkpoint": "late"}, torch.float32),
    "lst on t5": ("t5", ss.LSTConfig(reduction=2, dropout=0.0), {}, torch.float32),
    "lst": ("bert", ss.LSTConfig(reduction=2, dropout=0.0), {"keep": "replay"}, torch.float32),
    "side_attention": (
        "llama",
        ss.SideAttentionConfig(rank=4, heads=2, dropout=0.0),
        {"keep": "replay"},
        torch.float32,
    ),
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


def blocks_of(model: ss.SideModel) -> set[nn.Module]:
    """The blocks of a model."""
    return {place.module for place in model.places if place.site.kind == "block"}


def whole_blocks(model: ss.SideModel) -> int:
    """How many blocks' weights are whole in this process now."""
    return sum(not any(is_shard(parameter) for parameter in block.parameters()) for block in blocks_of(model))


def case_of(case: str, folder: Path) -> dict[str, Any]:
    """What is found for a case."""
    rank, batch = dist.get_rank(), batch_of(case)
    plain, low = attached(case), CASES[case][3] != torch.float32
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        wanted_output = logits(plain.eval()(**inputs))
    plain.train()
    # in low precision a batch's rows are rounded otherwise in a larger batch
    if plain.delta is not None:
        plain.eval()  # without dropout
    wanted = gradients(plain, plain, *(halves(batch) if low else [batch]))
    wanted_digest = digest_of(pretrained_tensors(plain.backbone, plain.trained.originals, plain_name(plain)))

    model = attached(case)
    ss.shard(model)
    model.eval()
    with torch.inference_mode():  # what is made in it could not be used in training
        before = logits(model(**inputs))
    model.train(model.delta is None)
    here, whole = shard_bytes(model)
    parallel = DistributedDataParallel(model)
    mine = list(halves(batch))[rank]
    first = distance(gradients(model, parallel, mine), wanted)
    left_whole = whole_blocks(model)
    second = distance(gradients(model, parallel, mine), wanted)
    with torch.no_grad():
        output = logits(model.eval()(**inputs))
    found = {
        "first": first,
        "second": second,
        "left whole": [left_whole, whole_blocks(model)],
        "outputs": bool(torch.equal(before, wanted_output) and torch.equal(output, wanted_output)),
        "share": here / whole,
        "blocks": len(blocks := blocks_of(model)),
        "sharded blocks": sum(any(is_shard(parameter) for parameter in block.parameters()) for block in blocks),
        "digest": model.digest == wanted_digest,
        "gathered digest": digest_of(pretrained_tensors(model.backbone, model.trained.originals, plain_name(model)))
        == wanted_digest,
    }
    # each process's own values: what is saved by the first is what all of them have
    same = [None] * dist.get_world_size()
    dist.all_gather_object(same, {name: value.tolist() for name, value in model.state_dict().items()})
    found["own values"] = all(one == same[0] for one in same)
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


def refusals() -> dict[str, str]:
    """What is said where weights cannot be sharded, by what was tried."""
    bert, head = FAMILIES["bert"], ss.Classify(num_labels=LABELS)
    tried: dict[str, tuple[ss.MethodConfig, dict[str, Any]]] = {
        "synqt": (ss.SynQTConfig(), {}),
        "diff_pruning": (ss.SparseConfig(), {}),
        "full": (ss.FullConfig(), {}),
        "auto": (ss.ReadConfig(rank=4), {"keep": "auto"}),
    }
    told = {}
    for name, (method, how) in tried.items():
        model = ss.attach(bert.model(), method, head=head, **how)
        told[name] = error_of(lambda model=model: ss.shard(model))  # type: ignore[misc]
    sharded = ss.shard(ss.attach(bert.model(), ss.ReadConfig(rank=4), head=head))
    told["twice"] = error_of(lambda: ss.shard(sharded))
    bare, inputs = ss.detach(sharded), bert.inputs()
    with torch.no_grad():
        told["detached"] = str(torch.equal(logits(bare(**inputs)), logits(bert.model()(**inputs))))
    told["attached"] = error_of(lambda: ss.attach(bare, ss.ReadConfig(rank=4), head=head))
    packed = ss.attach(bert.model(), ss.ReadConfig(rank=4), head=head)
    packed.backbone.bert.encoder.layer[0].output.dense.weight = nn.Parameter(
        torch.zeros(16, 32, dtype=torch.uint8), requires_grad=False
    )
    told["packed"] = error_of(lambda: ss.shard(packed))
    return told


def error_of(call: Callable[[], object]) -> str:
    """What a call refuses."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def read_out() -> dict[str, Any]:
    """Whether what a solved head reads is the same of a sharded backbone, and whether its store is refused."""
    vectors, inputs = [], FAMILIES["bert"].inputs(rows=ROWS)
    for sharded in (False, True):
        model = ss.attach(FAMILIES["bert"].model(), ss.ReadoutConfig(), head=ss.Classify(num_labels=LABELS))
        vectors.append((ss.shard(model) if sharded else model).eval().vector(dict(inputs))[0])
    return {"equal": bool(torch.equal(*vectors)), "stored": error_of(lambda: check_storable(model))}


def two_towers() -> dict[str, Any]:
    """Whether a sharded pair learns and answers as a whole one does, of the same pairs in every process."""
    batch = FAMILIES["llama"].inputs(rows=ROWS) | FAMILIES["vit"].inputs(rows=ROWS)
    found, models = [], []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = ss.attach(clip(), ss.DTLConfig(rank=4, late_blocks=1), head=ss.Retrieve(), keep="replay")
        for part in model.parts:
            randomize(part)
        models.append(ss.shard(model) if sharded else model)
        model.train()
        output = model(**batch, labels=torch.arange(ROWS))
        output.loss.backward()
        found.append([output.text_embeds, *(p.grad for _, p in model.trained_parameters())])
    equal = [torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True)]
    return {"equal": all(equal), "shares": [here / whole for here, whole in map(shard_bytes, models[1].parts)]}


def rises() -> dict[str, float]:
    """By how much more memory rises in a step with shards than with whole weights, in blocks of one of 12."""
    methods: dict[str, tuple[ss.MethodConfig, dict[str, Any]]] = {
        "read": (ss.ReadConfig(rank=4), {"keep": "replay"}),
        "dtl": (ss.DTLConfig(rank=4, late_blocks=6), {"keep": "replay"}),
    }
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 50}
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.zeros(1, dtype=torch.long)}
    found = {}
    for name, (method, how) in methods.items():
        peaks = []
        for sharded in (False, True):
            backbone = BertModel(BertConfig(num_hidden_layers=12, **sizes), add_pooling_layer=False)
            block = sum(parameter.nbytes for parameter in backbone.encoder.layer[0].parameters())
            model = ss.attach(backbone, method, head=ss.Classify(num_labels=2), **how).train()
            model = ss.shard(model) if sharded else model

            def step(model: nn.Module = model) -> None:
                model(**batch).loss.backward()
                model.zero_grad()

            step()  # which compares the two passes
            peaks.append(peak_memory(step).allocated)
        found[name] = (peaks[1] - peaks[0]) / block
    return found


def after_an_error() -> dict[str, Any]:
    """How far gradients are from one process's, after a pass that failed in the middle of the blocks.

    And how many passes FSDP has noted after one and after several that had no backward.
    """
    wanted = gradients(plain := attached("dtl"), plain, batch := batch_of("dtl"))
    model = attached("dtl")
    ss.shard(model)
    failing = next(place.module for place in reversed(model.places) if place.site.kind == "block")
    handle = failing.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        model(**batch)
    except ZeroDivisionError:
        handle.remove()
    mine = list(halves(batch))[dist.get_rank()]
    off = distance(gradients(model, DistributedDataParallel(model), mine), wanted)
    noted = []
    with torch.no_grad():
        for _ in range(3):
            model(**batch)
            noted.append(len(fully_shard.state(model.fold.within.__self__)._comm_ctx.post_forward_order))
    return {"off": off, "noted": noted}


def run(folder: Path, name: str, *, sharded: bool) -> dict[str, Any]:
    """The scores and losses of a run, and its weights as numbers. Rows are odd in number."""
    writes = name == "llama"
    rows = folder / ("answers.jsonl" if writes else "texts.csv")
    data = ss.DataSpec(
        train=rows,
        dev=rows,
        text="text",
        label="answer" if writes else "label",
        kind="lm" if writes else None,
        max_new_tokens=3 if writes else None,
    )
    model = ss.ModelSpec(
        backbone=folder / name,
        method=ss.LoraConfig(rank=2) if writes else ss.DTLConfig(rank=4, late_blocks=1),
        keep="full" if writes else "replay",
        shard=sharded,
    )
    settings = ss.TrainSettings(
        output=folder / f"{name} {sharded} {os.environ.get('ACCELERATE_USE_FSDP')}",
        epochs=1,
        batch_size=4,
        eval_batch_size=4,
        drop_last=True,
        learning_rate=0.01,
        measure=sharded,  # which a sharded run leaves out
        features="off",
        progress=False,
    )
    trained, _, results = ss.train(ss.RunSpec(data=data, model=model, training=settings))
    answers = predict(trained, [{"text": row["text"]} for row in reviews(9)], batch_size=2)["prediction"][:]
    weights = {key: value.double().sum().item() for key, value in trained.state_dict().items()}
    return {"history": results.history, "weights": weights, "answers": answers, "sharded": is_sharded(trained)}


def main(folder: Path) -> None:
    """Look at every case."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo")
    cases = sys.argv[2:] or CASES
    found: dict[str, Any] = {"cases": {case: case_of(case, folder) for case in cases}}
    found |= {
        "refusals": refusals(),
        "read-out": read_out(),
        "after an error": after_an_error(),
        "two towers": two_towers(),
    }
    found["rises"] = rises()
    for name in ("bert", "llama"):
        found[name] = run(folder, name, sharded=False)
        if name == "bert":  # as accelerate's launcher would ask for it
            os.environ["ACCELERATE_USE_FSDP"] = "true"
        found[f"{name}, sharded"] = run(folder, name, sharded=name != "bert")
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, found)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(everybody))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
