"""How the inputs of taps are kept for backward: the names of the ways."""

from __future__ import annotations

from typing import Literal, get_args

Keep = Literal["full", "bf16", "int8", "offload", "replay", "auto"]
"""How the inputs of taps are kept for backward.

full: as they are. bf16, int8: rounded, for the taps' gradients alone. offload: as they are, in the host's memory.
replay: not at all, a second pass of the frozen blocks brings them. auto: the first of full, offload (on a GPU) and
replay that fits.
"""
KEEPS: tuple[Keep, ...] = get_args(Keep)
ROUNDED: tuple[Keep, ...] = ("bf16", "int8")
"""The ways that change the taps' gradients a little. All others give the same gradients."""


def check_keep(keep: str) -> None:
    """Raise `ValueError` for a way that there is not."""
    if keep not in KEEPS:
        raise ValueError(f"keep={keep!r}: choose one of {', '.join(KEEPS)}")
