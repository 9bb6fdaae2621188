"""What `attach` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from sidestep import backbone as backbones
from sidestep.backbone import Noise
from sidestep.backbone.recompute import Checkpoint
from sidestep.methods import MethodConfig
from sidestep.model.heads import HeadConfig


@dataclass(frozen=True)
class Settings:
    """What `attach` was given besides the backbone. Stored in the task."""

    method: MethodConfig
    head: HeadConfig | None = None
    train_head: bool | None = None
    backbone_noise: Noise | None = None
    checkpoint: Checkpoint | None = None

    def __post_init__(self) -> None:
        backbones.check_noise(self.backbone_noise)
        if self.checkpoint not in (None, "late"):
            raise ValueError(f'checkpoint={self.checkpoint!r}: choose None or "late"')
        if self.head is not None and self.train_head is not None:
            raise ValueError(
                f"train_head={self.train_head} with a {type(self.head).__name__} head: a Sidestep head is always "
                "trained, and train_head is about the backbone's own. Leave one of them out"
            )
