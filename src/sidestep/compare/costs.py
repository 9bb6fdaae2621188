"""The cost lines of a comparison: memory, time and energy of one step, for all contenders in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sidestep.backbone.frames import VIDEO_AXES
from sidestep.compare.bench import Bench
from sidestep.compare.ledger import Ledger
from sidestep.compare.spec import Comparison, Contender, Costs
from sidestep.measure.meters import Cost, measure
from sidestep.measure.plan import plan_for
from sidestep.measure.plan.blank import IMAGE_SIZE, blank_batch
from sidestep.measure.plan.pictures import picture_of
from sidestep.model.attach import Attached, detach
from sidestep.model.heads import HeadConfig, Retrieve
from sidestep.model.settings import Settings
from sidestep.model.side_model import SideModel


def measure_costs(
    comparison: Comparison,
    costs: Costs,
    bench: Bench,
    ledger: Ledger,
    refused: Mapping[str, str],
    frames: int | None = None,
) -> None:
    """Measure every contender on a backbone, unless each has its line already.

    All are measured together or none is. Times taken in turns can be compared, but not with times of another day.

    Args:
        comparison: what is compared.
        costs: how.
        bench: the backbone.
        ledger: where the lines go.
        refused: contenders that cannot be attached, with the reason.
        frames: of the videos in its tasks. None: there are none.
    """
    plain = Contender.named("probe")
    probe = bench.attach(plain, bench.blank_head(plain), seed=0)
    try:
        picture = picture_of(bench.spec.model, bench.spec.revision, IMAGE_SIZE) if bench.pictured else None
        batch = blank_batch(probe, costs.batch, costs.length if bench.reads_text else None, None, frames, picture)
        default = probe.pool if isinstance(probe, SideModel) else None
    finally:
        detach(probe)
    batch = {name: value.to(bench.device) for name, value in batch.items()}
    heads = {one.name: bench.blank_head(one, default) for one in comparison.contenders}
    settings = {
        one.name: _settings(comparison, costs, bench, one, batch, heads[one.name]) for one in comparison.contenders
    }
    for name, reason in refused.items():
        ledger.without("cost", settings.pop(name), "refused", reason)
    if not settings or all(ledger.find("cost", asked) for asked in settings.values()):
        return
    ledger.tell(f"{bench.spec.name}: measuring memory and time of {', '.join(settings)}")
    begin = time.perf_counter()
    able = [one for one in comparison.contenders if one.name in settings]
    contenders = {one.name: _attached_with(bench, one, heads[one.name]) for one in able}
    found: Mapping[str, Cost | Exception]
    try:
        found = measure(
            bench.model,
            contenders,
            batch,
            repeats=costs.repeats,
            warmup=costs.warmup,
            bf16=comparison.bf16,
            planned=lambda model, inputs: _planned(model, inputs, bench.precision),
        )
    # whatever breaks the meters is no reason to lose the scores
    except Exception as error:
        found = dict.fromkeys(settings, error)
    seconds = (time.perf_counter() - begin) / len(found)
    for name, cost in found.items():
        if isinstance(cost, Cost):
            ledger.add("cost", settings[name], measured=cost.to_dict(), seconds=seconds)
        else:
            ledger.add("cost", settings[name], status="failed", reason=f"{type(cost).__name__}: {cost}")


def _settings(
    comparison: Comparison,
    costs: Costs,
    bench: Bench,
    one: Contender,
    batch: Mapping[str, Tensor],
    head: HeadConfig | None,
) -> dict[str, Any]:
    given, images = batch.get("input_ids", batch.get("input_values")), batch.get("pixel_values")
    return {
        **bench.settings(one),
        "batch": costs.batch,
        "length": None if given is None or given.ndim > 2 else given.shape[1],
        "image_size": None if images is None or images.ndim < 4 else images.shape[-1],
        **({} if images is None or images.ndim <= VIDEO_AXES else {"frames": images.shape[1]}),
        "head": _worded(head),
        "repeats": costs.repeats,
        "warmup": costs.warmup,
        "score_of": comparison.score_of(one),
    }


def _worded(head: HeadConfig | None) -> str:
    if head is None:
        return "its language model head"
    classes = "" if isinstance(head, Retrieve) else "num_labels=2, "
    return f"{type(head).__name__}({classes}pool={head.pool})"


def _attached_with(bench: Bench, one: Contender, head: HeadConfig | None) -> Settings:
    return Settings(
        one.config,
        head,
        backbone_noise=one.noise,
        checkpoint="late" if one.checkpoint else None,
        keep=one.keep,
        lm_loss=bench.lm_loss,
    )


def _planned(model: Attached, batch: Mapping[str, Tensor], precision: str) -> int | None:
    """What the planner predicts. None where it cannot, as for weights of another precision than it knows."""
    try:
        return plan_for(model, batch, precision=precision).peak_bytes  # type: ignore[arg-type]
    except ValueError:
        return None
