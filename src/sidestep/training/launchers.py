"""What a launcher's config asks for that is done here in another way, or is refused."""

from __future__ import annotations

import os

from sidestep import ranks
from sidestep.kinds.base import kind_named
from sidestep.kinds.task_data import TaskData
from sidestep.model.attach import Attached
from sidestep.model.side_model import SideModel
from sidestep.training.settings import TrainSettings

FSDP = "ACCELERATE_USE_FSDP"
"""Environment variable in which `accelerate launch` says that its config asks for FSDP."""


def asks_for_fsdp() -> bool:
    """Whether accelerate's config asks several processes for FSDP. accelerate itself is told no more of that.

    It would shard what is trained too, and load the weights in the first process alone, so that the others would not
    know what the backbone is.
    """
    return os.environ.pop(FSDP, "false").lower() in ("1", "true") and ranks.count() > 1


def check_shardable(model: Attached, data: TaskData, settings: TrainSettings) -> None:
    """Refuse runs in which the processes would not make the same passes of a sharded backbone.

    Raises:
        ValueError: saying what to do instead.
    """
    if isinstance(model, SideModel) and model.side.solved:
        raise ValueError(
            f"--shard with --method {model.record.name}: it is solved from stored features, and those of a sharded "
            "backbone are not stored. Choose another method, or leave --shard out"
        )
    if kind_named(data.labels.kind).dual:
        raise ValueError(f"--shard with --kind {data.labels.kind}: two encoders are not sharded yet. Leave --shard out")
    if settings.features in ("ram", "disk"):
        raise ValueError(
            f"--shard with --features {settings.features}: what a sharded backbone gives is not stored. "
            "Choose --features off"
        )
