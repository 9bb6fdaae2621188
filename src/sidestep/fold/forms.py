"""The forms in which a hidden state that was read waits for backward: smaller, or elsewhere.

Taps read tensors as wide as the backbone, and in backward only the taps' own gradients need these tensors. They are
most of what a side network keeps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from sidestep.interface.keep import Keep

GROUP = 64
"""Neighbouring channels that share a scale in int8."""
ROOM = 0.5
"""Share of the free memory that `auto` gives to the inputs of taps: a step needs the rest for what it computes."""


class KeepWarning(UserWarning):
    """A way of keeping does not do here what it is for. The message says what it does."""


@dataclass(frozen=True)
class Form:
    """A form in which a hidden state waits for backward.

    Attributes:
        pack: of (batch, tokens, width): the tensors that wait.
        unpack: of these, with its shape, precision and device by name: (batch, tokens, width) again.
        watched: whether autograd holds them, so that they count as kept on the device.
    """

    pack: Callable[[Tensor], tuple[Tensor, ...]]
    unpack: Callable[..., Tensor]
    watched: bool = True


def _to_int8(hidden: Tensor) -> tuple[Tensor, ...]:
    width = hidden.shape[-1]
    # in float32: in less, 127 may be rounded to 128, which int8 does not hold
    groups = F.pad(hidden.float(), (0, -width % GROUP)).unflatten(-1, (-1, GROUP))
    # at least the smallest normal number: a group of zeros stays zeros
    scale = (groups.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (groups / scale[..., None]).round_().to(torch.int8).flatten(-2)[..., :width]
    return codes.contiguous(), scale


def _from_int8(codes: Tensor, scale: Tensor, *, dtype: torch.dtype, **of: Any) -> Tensor:
    width = codes.shape[-1]
    groups = F.pad(codes, (0, -width % GROUP)).unflatten(-1, (-1, GROUP))
    return (groups * scale[..., None]).flatten(-2)[..., :width].to(dtype)


def _to_host(hidden: Tensor) -> tuple[Tensor, ...]:
    if hidden.device.type != "cuda":
        return (hidden,)
    waiting = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
    beside = _beside(hidden.device)
    beside.wait_stream(torch.cuda.current_stream(hidden.device))
    with torch.cuda.stream(beside):
        waiting.copy_(hidden, non_blocking=True)
    hidden.record_stream(beside)  # its memory is free only when it has been copied
    return (waiting,)


def _from_host(waiting: Tensor, *, device: torch.device, **of: Any) -> Tensor:
    if device.type != "cuda":
        return waiting
    torch.cuda.current_stream(device).wait_stream(_beside(device))
    return waiting.to(device, non_blocking=True)


_BESIDE: dict[torch.device, Any] = {}


def _beside(device: torch.device) -> Any:
    """The stream of copies to the host, beside the computation."""
    if device not in _BESIDE:
        _BESIDE[device] = torch.cuda.Stream(device)
    return _BESIDE[device]


FORMS: dict[str, Form] = {
    "bf16": Form(lambda hidden: (hidden.to(torch.bfloat16),), lambda packed, *, dtype, **of: packed.to(dtype)),
    "int8": Form(_to_int8, _from_int8),
    "offload": Form(_to_host, _from_host, watched=False),
}
"""The forms by the names of their ways. A replay stores none."""


ELSEWHERE = Form(
    lambda hidden: (),
    lambda *, shape, dtype, device: torch.empty(shape, dtype=dtype, device=device),
    watched=False,
)
"""Offload as a plan for a GPU sees it, whose tensors have no values: gone in between."""


def warn_if_idle(keep: str, device: torch.device) -> None:
    """Say it where a way is of no use on a device.

    Warns:
        KeepWarning: for "offload" without a GPU.
    """
    if keep == "offload" and device.type == "cpu":
        warnings.warn(
            "keep='offload' on the CPU: the hidden states wait in the memory that the model is in, so nothing is "
            "saved. Choose 'replay' (exact), 'int8' or 'bf16'",
            KeepWarning,
            stacklevel=2,
        )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device: of a GPU its own, else those of the machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def fitting(wide: int, device: torch.device) -> Keep:
    """The first of full, offload (on a GPU) and replay whose memory is there.

    Args:
        wide: bytes of what taps read in a step.
        device: where the step runs.
    """
    free = free_memory(device)
    if wide <= ROOM * free:
        return "full"
    host = device.type == "cuda" and wide <= ROOM * psutil.virtual_memory().available
    return "offload" if host else "replay"
