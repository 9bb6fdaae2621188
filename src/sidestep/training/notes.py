"""What else a reader of a run's results should know, in words."""

from __future__ import annotations

from collections.abc import Iterator

from sidestep.backbone import drop_path_rate
from sidestep.methods import WeightDelta
from sidestep.model.attach import Attached

NOISE = {
    "dropout": "dropout of the frozen backbone was on in training",
    "drop_path": "drop path of the frozen backbone was on in training",
    "all": "dropout and drop path of the frozen backbone were on in training",
}
NO_NOISE = "dropout and drop path of the frozen backbone were off in training (--backbone-noise turns them on)"
OWN_NOISE = "dropout and drop path of the backbone were on in training, because the method changes its weights"
NO_NORM = "has no final norm, so correction=pre_norm and correction=post_norm are the same"


def notes_of(model: Attached, *, writes: bool) -> Iterator[str]:
    """What the settings of a run lead to. `writes`: the task's answers are texts."""
    yield _noise(model)
    if writes and not model.caches:
        name = model.record.name
        yield f"texts are written without a key-value cache, which takes longer: with one {name} is not exact"
    if "correction" in model.settings.method.to_dict():
        for part in model.parts:
            if not any(place.site.kind == "norm" for place in part.places):
                yield f"{type(part.backbone).__name__} {NO_NORM}"


def _noise(model: Attached) -> str:
    changes_weights = issubclass(model.record.implementation, WeightDelta)
    asked, rate = model.settings.backbone_noise, drop_path_rate(model.trunk)
    if asked is None and not changes_weights:
        return NO_NOISE
    text = OWN_NOISE if asked is None else NOISE[asked]
    return f"{text} (rate of its drop path: {rate:g})" if rate or asked == "drop_path" else text
