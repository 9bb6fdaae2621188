"""What a launcher's config asks for that is done here in another way, or is refused."""

from __future__ import annotations

import os

from sidestep import ranks
from sidestep.model.attach import Attached
from sidestep.model.pair_model import PairModel
from sidestep.model.side_model import SideModel
from sidestep.training.settings import TrainSettings

FSDP = "ACCELERATE_USE_FSDP"
"""Environment variable in which `accelerate launch` says that its config asks for FSDP."""


def asks_for_fsdp() -> bool:
    """Whether accelerate's config asks several processes for FSDP. accelerate itself is told no more of that.

    It would shard what is trained too. It would also load the weights in the first process alone, so the others could
    not see what the backbone is.
    """
    return os.environ.pop(FSDP, "false").lower() in ("1", "true") and ranks.count() > 1


def check_passes(model: Attached) -> None:
    """Refuse a model of which processes that share rows would not make the same passes, as a sharded one needs.

    Raises:
        ValueError: saying what to do instead.
    """
    if isinstance(model, PairModel):
        raise ValueError("--shard with --kind retrieval: pairs are not shared out evenly yet. Leave --shard out")


def check_shardable(model: Attached, settings: TrainSettings) -> None:
    """Refuse a run on a sharded backbone that would store what frozen blocks give, besides what `check_passes` does.

    Raises:
        ValueError: saying what to do instead.
    """
    check_passes(model)
    if isinstance(model, SideModel) and model.side.solved:
        raise ValueError(
            f"--shard with --method {model.record.name}: it is solved from stored features, and those of a sharded "
            "backbone are not stored. Choose another method, or leave --shard out"
        )
    if settings.features in ("ram", "disk"):
        raise ValueError(
            f"--shard with --features {settings.features}: what a sharded backbone gives is not stored. "
            "Choose --features off"
        )
