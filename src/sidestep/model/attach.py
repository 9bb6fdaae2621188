"""`attach` and `detach`, for one backbone or a pair of towers."""

from __future__ import annotations

from typing import Any, overload

from torch import nn

from sidestep.backbone import (
    Digest,
    Noise,
    digest_of,
    pretrained_tensors,
)
from sidestep.backbone.families import dual_family_of
from sidestep.backbone.recompute import Checkpoint
from sidestep.interface.keep import Keep
from sidestep.methods import MethodConfig
from sidestep.model.build import check_attachable
from sidestep.model.heads import HeadConfig, Retrieve
from sidestep.model.joint_model import JointModel
from sidestep.model.pair_model import PairModel
from sidestep.model.settings import Settings
from sidestep.model.side_model import SideModel
from sidestep.model.token_loss import LmLoss
from sidestep.model.two_towers import TwoTowers


# Retrieve is a HeadConfig too: mypy calls that an overlap, and takes the first that fits, which is what is meant.
@overload
def attach(  # type: ignore[overload-overlap]
    backbone: nn.Module,
    method: MethodConfig,
    *,
    head: Retrieve,
    train_head: bool | None = None,
    backbone_noise: Noise | None = None,
    checkpoint: Checkpoint | None = None,
    keep: Keep = "full",
    lm_loss: LmLoss = "own",
) -> PairModel: ...


@overload
def attach(
    backbone: nn.Module,
    method: MethodConfig,
    *,
    head: HeadConfig | None = None,
    train_head: bool | None = None,
    backbone_noise: Noise | None = None,
    checkpoint: Checkpoint | None = None,
    keep: Keep = "full",
    lm_loss: LmLoss = "own",
) -> SideModel: ...  # or, on a dual encoder, a `JointModel`: what a backbone is, types do not tell


def attach(
    backbone: nn.Module,
    method: MethodConfig,
    *,
    head: HeadConfig | None = None,
    train_head: bool | None = None,
    backbone_noise: Noise | None = None,
    checkpoint: Checkpoint | None = None,
    keep: Keep = "full",
    lm_loss: LmLoss = "own",
) -> SideModel | PairModel | JointModel:
    """A model that tunes `method` (and a head) on a backbone. The backbone is frozen and in eval mode from here on.

    Args:
        backbone: a Hugging Face model, with or without a task head, or a timm model. With `Retrieve` a dual encoder, as
            `CLIPModel` or `VisionTextDualEncoderModel`. On one, `Classify` and `Answer` read both towers together.
        method: for example `ReadConfig(rank=128)`. In a dual encoder each tower gets its own.
        head: `Classify`, `Regress`, `Retrieve`, `Answer`, `Box`, or None for the backbone's own head.
        train_head: with head=None, whether the backbone's own head is trained. None: if it is new or the class is a
            For...Classification or ForQuestionAnswering class. A pooler is trained if it is new.
        backbone_noise: "drop_path", "dropout" or "all" leave that noise on in training. None: eval mode. A method that
            changes the backbone's weights trains with the backbone's own noise in any case.
        checkpoint: "late" recomputes the blocks after the method's first write in backward.
        keep: how the inputs of the method's taps are kept for backward (`Keep`). "full": as they are. "replay": not at
            all, the frozen blocks run a second time. "bf16", "int8": rounded. "offload": in the host's memory. "auto":
            what fits, exactly.
        lm_loss: with the own head of a language model. "chunked" computes the loss of training steps without logits:
            the head is frozen, so the gradient is known in the forward pass. Outputs then hold no logits in training.

    Raises:
        UnsupportedBackbone: if the method cannot work on this backbone, or on one of its towers.
        ValueError: if the backbone is compiled, attached already, no dual encoder where one is needed, or a setting is
            out of range.
        TypeError: if the backbone is no torch module.
    """
    settings = Settings(method, head, train_head, backbone_noise, checkpoint, keep, lm_loss)
    if isinstance(backbone, TwoTowers):
        raise ValueError("this is an attached model already: call ss.detach(model) first, then attach again")
    check_attachable(backbone)
    if isinstance(head, Retrieve):
        return PairModel(backbone, settings)
    of_both = head is not None and dual_family_of(backbone) is not None
    return JointModel(backbone, settings) if of_both else SideModel(backbone, settings)


def detach(model: Attached) -> nn.Module:
    """The untouched backbone. Hooks are removed, and weights, gradient flags and mode are as before `attach`."""
    return model.detach_backbone()


def digests_of(backbone: nn.Module) -> list[Digest]:
    """The digests of a bare backbone as the parts of an attached model have them: one, or each tower's."""
    dual: Any = backbone
    towers = [backbone] if dual_family_of(backbone) is None else [dual.vision_model, dual.text_model]
    return [digest_of(pretrained_tensors(tower)) for tower in towers]


Attached = SideModel | PairModel | JointModel
"""What `attach` gives."""
