"""`sidestep plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sidestep.cli import options as opt
from sidestep.cli.errors import reporting
from sidestep.cli.values import backbone_named, config_from, placed
from sidestep.console import remark, show_facts, show_table

if TYPE_CHECKING:
    from sidestep.measure.plan import Alternative, Plan

GROUPS = 8
RULE = (
    "rule: what fits in full is fastest. If a step does not fit, take --keep replay, for about a second pass of the "
    "frozen blocks. It pays where codes are narrow (of READ 3 x rank values a token). --keep auto decides so"
)


def plan(
    backbone: opt.Planned,
    gguf: opt.Gguf = None,
    method: opt.Method = "read",
    set_: opt.Set = None,
    labels: opt.Labels = 2,
    pool: opt.Pool = None,
    own_head: opt.OwnHead = False,
    checkpoint: opt.Checkpoint = None,
    taps: opt.Keep = "full",
    lm_loss: opt.LmLoss = "chunked",
    backbone_noise: opt.Noise = None,
    revision: opt.Revision = None,
    device_map: opt.DeviceMap = None,
    offload_folder: opt.OffloadFolder = None,
    max_memory: opt.MaxMemory = None,
    batch: opt.Batch = 32,
    length: opt.Length = None,
    image_size: opt.ImageSize = None,
    frames: opt.PlannedFrames = None,
    text_backbone: opt.TextBackbone = None,
    gpu: opt.Gpu = None,
    kind: opt.PlannedKind = None,
    precision: opt.Precision = None,
    bf16: opt.Bf16 = False,
    dtype: opt.PlannedDtype = None,
    quantize: opt.Quantize = None,
    optimizer: opt.Optimizer = "AdamW",
    measure: opt.Measure = False,
    as_json: opt.AsJson = False,
    debug: opt.Debug = False,
) -> None:
    """Predict the memory of training, and what fits, from a config alone."""
    with reporting(debug):
        from sidestep.backbone.placement import Placement
        from sidestep.interface.keep import check_keep
        from sidestep.kinds.base import kind_named
        from sidestep.measure.plan import alternatives, best_device, fastest, largest_batch, memory_of, ways_of_keeping
        from sidestep.measure.plan import plan as planned
        from sidestep.methods import method_named

        limit = None if gpu is None else memory_of(gpu)
        if own_head and pool is not None:
            raise ValueError(f"--pool {pool} with --own-head: the backbone's own head reads what it reads")
        config = config_from(method_named(method).config, set_ or [])
        check_keep(taps)
        of = kind_named(kind or "single")
        if not of.dual and (frames, text_backbone) != (None, None):
            raise ValueError("--frames and --text-backbone are for pairs: say --kind retrieval")
        if of.dual and own_head:
            raise ValueError("--own-head with --kind retrieval: the embeddings are Sidestep's. Leave it out")
        if of.writes and own_head:
            raise ValueError(f"--kind {of.name} is written by the backbone's own head: leave --own-head out")
        head = of.blank_head(labels, pool)  # a head refuses a pool that it does not know
        settings: dict[str, Any] = {
            "head": None if own_head else head,
            "own_head": of.own_head,
            "writes": of.writes,
            "lm_loss": lm_loss if of.writes else "own",
            "length": length,
            "image_size": image_size,
            "frames": frames,
            "text_backbone": text_backbone,
            "backbone_noise": backbone_noise,
            "precision": _precision(precision, bf16, dtype),
            "optimizer": optimizer,
            # a measured step runs on what there is
            "device": best_device() if measure else "cpu" if limit is None else "cuda",
            "revision": revision,
            "quantize": quantize,
            "measure": measure,
            "placement": Placement.of(**placed(device_map, offload_folder, max_memory)),
        }
        make: Any = partial(planned, backbone_named(backbone, gguf), **settings)
        why, once = None, partial(make, config, batch=batch, checkpoint=checkpoint)
        if taps == "auto":
            if limit is None:
                raise ValueError("--keep auto takes what fits: say in how much memory, with --gpu such as --gpu 16GB")
            plans = _by_way(once, ways_of_keeping("cuda"), limit)
            taps, why = fastest({way: plan.total_bytes for way, plan in plans.items()}, limit)
            found = plans[taps]
        else:
            found = once(keep=taps)
        if limit is None or measure:
            _print(found, as_json, limit)
            return
        largest = largest_batch(
            lambda rows: make(config, batch=rows, checkpoint=checkpoint, keep=taps).total_bytes,
            limit,
            start=batch,
            fixed=found.weights_bytes + found.optimizer_bytes,
        )
        others = alternatives(partial(make, batch=batch), config)
        _print(found, as_json, limit, largest, others, why)


def _precision(precision: str | None, bf16: bool, dtype: str | None) -> str:
    """The precision of a step, as a plan calls it, from what the options of `train` say."""
    if precision is not None and (bf16 or dtype is not None):
        raise ValueError("--precision with --bf16 or --dtype: they say the same, so leave one out")
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype}: a plan knows float32 and bfloat16")
    if bf16 and dtype == "bfloat16":
        raise ValueError("--bf16 with --dtype bfloat16: the weights are in that precision already. Leave --bf16 out")
    return precision or ("bf16 autocast" if bf16 else dtype or "float32")


def _by_way(make: Any, ways: Sequence[Any], limit: int) -> dict[Any, Plan]:
    """The plans by way of keeping, up to the first that fits. A method without a choice has one way."""
    found: dict[Any, Plan] = {}
    for way in ways:
        try:
            found[way] = make(keep=way)
        except ValueError:
            if way == "full":
                raise
            continue
        if found[way].total_bytes <= limit:
            break
    return found


def _print(
    plan: Plan,
    as_json: bool,
    limit: int | None = None,
    largest: int | None = None,
    others: Sequence[Alternative] = (),
    why: str | None = None,
) -> None:
    if as_json:
        about = {
            "plan": plan.to_dict(),
            "limit_bytes": limit,
            "fits": None if limit is None else plan.total_bytes <= limit,
            "largest_batch": largest,
            "alternatives": [other.to_dict() for other in others],
            "keep_because": why,
        }
        print(json.dumps(about, indent=2, ensure_ascii=False))
        return
    _show_plan(plan, limit, largest)
    if others:
        _show_alternatives(others, limit or 0)
    if why is not None:
        remark(f"keep: {plan.keep}, because {why}")
    elif others:
        remark(RULE)
    for note in plan.notes:
        remark(f"note: {note}")


def _show_plan(plan: Plan, limit: int | None, largest: int | None) -> None:
    from sidestep.measure.memory import format_bytes

    sizes = {
        "weights": plan.weights_bytes,
        "optimizer state": plan.optimizer_bytes,
        "batch": plan.batch_bytes,
        "gradients at the peak": plan.gradient_bytes,
        "kept for backward at the peak": plan.kept_bytes,
        "temporary at the peak": plan.temporary_bytes,
        "peak of a step, above the model": plan.peak_bytes,
        "in all": plan.total_bytes,
    }
    facts: dict[str, object] = {name: None if size is None else format_bytes(size) for name, size in sizes.items()}
    if plan.source == "traced":
        facts["peak reached in"] = f"{plan.peak_phase} ({plan.peak_op})"
        facts["attention"] = ", ".join(plan.attention)
    if limit is not None:
        fits = "fits" if plan.total_bytes <= limit else "does not fit"
        facts[f"on {format_bytes(limit)}"] = fits if largest is None else f"{fits}; largest batch {largest}"
    sounds = "spectrograms" if plan.length is None else f"{plan.length} samples"
    image = f"{plan.image_size} px" if plan.frames is None else f"{plan.frames} frames of {plan.image_size} px"
    text = f"{plan.length} tokens"
    if plan.pictured:
        text += ", a picture among them"
    elif plan.image_size is not None:
        text = f"({text}, {image})"
    what = {"text": text, "image": image, "audio": sounds}[plan.reads]
    late = " with late blocks recomputed" if plan.checkpoint else ""
    late += f", keep={plan.keep}" if plan.keep != "full" else ""
    how = "predicted" if plan.source == "traced" else plan.source
    title = f"{plan.method}{late}, {plan.batch} x {what}, {plan.precision}, {plan.optimizer}, {plan.device}, {how}"
    show_facts(title, facts)
    rows = [(name, format_bytes(size)) for name, size in plan.saved_by_module.items() if size]
    show_table("Kept for backward after the forward pass", ("module", "bytes"), rows[:GROUPS])
    if len(rows) > GROUPS:
        remark(f"and {len(rows) - GROUPS} smaller ones: see --json")


def _show_alternatives(others: Sequence[Alternative], limit: int) -> None:
    from sidestep.measure.memory import format_bytes

    rows = [
        (
            other.label,
            "-" if other.plan is None else format_bytes(other.plan.total_bytes),
            "-" if other.plan is None else format_bytes(other.plan.peak_bytes),
            other.reason or ("yes" if other.plan is not None and other.plan.total_bytes <= limit else "no"),
        )
        for other in others
    ]
    show_table(f"Methods on {format_bytes(limit)}", ("method", "in all", "peak of a step", "fits"), rows)
