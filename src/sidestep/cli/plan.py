"""`sidestep plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sidestep.cli import options as opt
from sidestep.cli.errors import reporting
from sidestep.cli.values import backbone_named, config_from
from sidestep.console import remark, show_facts, show_table

if TYPE_CHECKING:
    from sidestep.measure.plan import Alternative, Plan

GROUPS = 8


def plan(
    backbone: opt.Planned,
    gguf: opt.Gguf = None,
    method: opt.Method = "read",
    set_: opt.Set = None,
    labels: opt.Labels = 2,
    pool: opt.Pool = None,
    own_head: opt.OwnHead = False,
    checkpoint: opt.Checkpoint = None,
    backbone_noise: opt.Noise = None,
    revision: opt.Revision = None,
    batch: opt.Batch = 32,
    length: opt.Length = None,
    image_size: opt.ImageSize = None,
    gpu: opt.Gpu = None,
    precision: opt.Precision = "float32",
    optimizer: opt.Optimizer = "AdamW",
    measure: opt.Measure = False,
    as_json: opt.AsJson = False,
    debug: opt.Debug = False,
) -> None:
    """Predict the memory of training, and what fits, from a config alone."""
    with reporting(debug):
        from sidestep.measure.plan import alternatives, best_device, largest_batch, memory_of
        from sidestep.measure.plan import plan as planned
        from sidestep.methods import method_named
        from sidestep.model.heads import Classify

        limit = None if gpu is None else memory_of(gpu)
        if own_head and pool is not None:
            raise ValueError(f"--pool {pool} with --own-head: the backbone's own head reads what it reads")
        config = config_from(method_named(method).config, set_ or [])
        settings: dict[str, Any] = {
            # Classify refuses a pool that it does not know
            "head": None if own_head else Classify(num_labels=labels, pool=pool),  # type: ignore[arg-type]
            "length": length,
            "image_size": image_size,
            "backbone_noise": backbone_noise,
            "precision": precision,
            "optimizer": optimizer,
            # a measured step runs on what there is
            "device": best_device() if measure else "cpu" if limit is None else "cuda",
            "revision": revision,
            "measure": measure,
        }
        make: Any = partial(planned, backbone_named(backbone, gguf), **settings)
        found = make(config, batch=batch, checkpoint=checkpoint)
        if limit is None or measure:
            _print(found, as_json, limit)
            return
        largest = largest_batch(
            lambda rows: make(config, batch=rows, checkpoint=checkpoint).total_bytes,
            limit,
            start=batch,
            fixed=found.weights_bytes + found.optimizer_bytes,
        )
        others = alternatives(partial(make, batch=batch), config)
        _print(found, as_json, limit, largest, others)


def _print(
    plan: Plan,
    as_json: bool,
    limit: int | None = None,
    largest: int | None = None,
    others: Sequence[Alternative] = (),
) -> None:
    if as_json:
        about = {
            "plan": plan.to_dict(),
            "limit_bytes": limit,
            "fits": None if limit is None else plan.total_bytes <= limit,
            "largest_batch": largest,
            "alternatives": [other.to_dict() for other in others],
        }
        print(json.dumps(about, indent=2, ensure_ascii=False))
        return
    _show_plan(plan, limit, largest)
    if others:
        _show_alternatives(others, limit or 0)
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
    what = f"{plan.length} tokens" if plan.length is not None else f"{plan.image_size} px"
    late = " with late blocks recomputed" if plan.checkpoint else ""
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
