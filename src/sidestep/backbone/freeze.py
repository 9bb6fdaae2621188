"""Stop the gradients of a backbone, and hold it in eval mode."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

Noise = Literal["drop_path", "dropout", "all"]


def freeze(model: nn.Module) -> None:
    """Stop every gradient: the one place that does."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def set_noise(trunk: nn.Module, noise: Noise | None) -> None:
    """Put a frozen trunk in eval mode, except for the noise that was asked for.

    Batch norms stay in eval mode in any case: in training mode they would move the frozen model's buffers. So do
    modules that would leave out blocks, because a method reads every block. So do wav2vec2's fronts, which would make
    sounds require a gradient.
    """
    trunk.eval()
    if noise is None:
        return
    for module in trunk.modules():
        if "BatchNorm" in type(module).__name__ or _drops_layers(module) or vars(module).get("_requires_grad"):
            continue
        if noise == "all" or _is_drop_path(module) == (noise == "drop_path"):
            module.training = True


def drop_path_rate(trunk: nn.Module) -> float:
    """The highest rate of a trunk's drop paths, which is the last block's, or 0 where the trunk has no drop path."""
    rates: list[Any] = [module.drop_prob for module in trunk.modules() if _is_drop_path(module)]
    return max((float(rate or 0) for rate in rates), default=0.0)


def _is_drop_path(module: nn.Module) -> bool:
    kind = type(module).__name__
    return "DropPath" in kind or "StochasticDepth" in kind


def hold_fronts(trunk: nn.Module) -> None:
    """Put fronts that would make sounds require a gradient (wav2vec2's) in eval mode, if nothing of them is trained.

    In training mode all that they compute would be kept for backward, for no weight.
    """
    for module in trunk.modules():
        if vars(module).get("_requires_grad") and not any(part.requires_grad for part in module.parameters()):
            module.eval()


def _drops_layers(module: Any) -> bool:
    """Whether a module runs blocks in a loop that leaves some out in training (layer drop)."""
    if not any(isinstance(part, nn.ModuleList) for part in module.children()):
        return False
    owners = [vars(owner) for owner in (module, getattr(module, "config", None)) if owner is not None]
    return any(rate for own in owners for name, rate in own.items() if name.endswith("layerdrop"))


def check_noise(noise: str | None) -> None:
    """Raise unless `noise` is None or a known kind."""
    if noise is not None and noise not in get_args(Noise):
        raise ValueError(f"backbone_noise={noise!r}: choose None or one of {', '.join(get_args(Noise))}")
