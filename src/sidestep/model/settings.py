"""What `attach` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from sidestep import backbone as backbones
from sidestep.backbone import Noise
from sidestep.backbone.recompute import Checkpoint
from sidestep.interface.keep import Keep, check_keep
from sidestep.methods import MethodConfig
from sidestep.model.heads import HeadConfig
from sidestep.model.token_loss import LmLoss, check_lm_loss


@dataclass(frozen=True)
class Settings:
    """What `attach` was given besides the backbone. Stored in the task."""

    method: MethodConfig
    head: HeadConfig | None = None
    train_head: bool | None = None
    backbone_noise: Noise | None = None
    checkpoint: Checkpoint | None = None
    keep: Keep = "full"
    lm_loss: LmLoss = "own"

    def __post_init__(self) -> None:
        backbones.check_noise(self.backbone_noise)
        if self.checkpoint not in (None, "late"):
            raise ValueError(f'checkpoint={self.checkpoint!r}: choose None or "late"')
        check_keep(self.keep)
        check_lm_loss(self.lm_loss)
        if self.keep in ("replay", "auto") and self.backbone_noise is not None:
            raise ValueError(
                f"keep={self.keep!r} with backbone_noise={self.backbone_noise!r}: a second pass of the backbone would "
                "have other noise. Leave the noise out, or choose keep='int8', 'bf16', 'offload' or 'full'"
            )
        if self.head is not None and self.train_head is not None:
            raise ValueError(
                f"train_head={self.train_head} with a {type(self.head).__name__} head: a Sidestep head is always "
                "trained, and train_head is about the backbone's own. Leave one of them out"
            )
