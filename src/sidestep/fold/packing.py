"""Several texts in one row, told apart by position ids alone. Who would read such a row as one text is refused.

Trainers pack texts to waste nothing on padding (TRL's `packing` and `padding_free`). Transformers' masks keep the texts
of a row apart where their positions start again, without an attention mask and without a cache. Not every model uses
these masks, and methods that mix tokens do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sidestep.interface.side_net import SideNet

A_ROW_EACH = "give each text a row of its own (in TRL's SFTConfig: packing=False and padding_free=False)"


def is_packed(inputs: Mapping[str, Any], refusal: Callable[[], str | None]) -> bool:
    """Whether the position ids of a pass do not count on within a row.

    A compiled pass may be packed if it has any position ids.

    Args:
        inputs: of the pass, by name.
        refusal: why such a row would be read as one text, and what to do, or None if it would not.

    Raises:
        ValueError: if there is a reason. In a compiled pass it is PyTorch's own `RuntimeError` with this message.
    """
    apart = _apart(inputs)
    compiling = torch.compiler.is_compiling()
    if apart is None or not (compiling or apart):
        return False
    if (reason := refusal()) is not None:
        message = f"position_ids start again within a row (several texts packed into one), and {reason}"
        if not compiling:
            raise ValueError(message)
        torch._assert_async(~apart, message)
    return True


def refusal(
    inputs: Mapping[str, Any],
    method: SideNet,
    model: str,
    packs: Callable[[], bool | None],
    *,
    causal: bool,
    pools: bool,
) -> str | None:
    """Why a row of several texts would be read as one, and what to do, or None if it would not.

    Args:
        inputs: of the pass, by name.
        method: what is attached.
        model: the backbone's name.
        packs: tells whether the backbone keeps the texts of a row apart. None: that is not known.
        causal: whether it is a decoder alone.
        pools: whether a Sidestep head reads the tokens.
    """
    if not method.tokenwise:
        return (
            f"{type(method).__name__} mixes tokens, also those of different texts: {A_ROW_EACH}, or take a method that "
            "treats tokens alone (read, dtl, sherl)"
        )
    if not causal:
        return None  # an encoder's positions may be anything
    if pools:
        return f"the head reads one text of each row: {A_ROW_EACH}"
    if mask_of(inputs) is not None:
        return f"with an attention_mask {model} reads a row as one text: leave the mask out, or {A_ROW_EACH}"
    if inputs.get("use_cache") or inputs.get("past_key_values") is not None:
        return f"with a key-value cache {model} reads a row as one text: pass use_cache=False, or {A_ROW_EACH}"
    found = packs()
    if found is None:
        return f"it is not known whether {model} keeps them apart: call it once before it is compiled, or {A_ROW_EACH}"
    return None if found else f"{model} reads a row as one text all the same: {A_ROW_EACH}"


def mask_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """The padding mask (batch, tokens), if there is one. The caller answers for masks of other forms."""
    mask = inputs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _apart(inputs: Mapping[str, Any]) -> Tensor | None:
    """Whether positions (batch, tokens) do not count on within a row, as one bool.

    None where no positions are given.
    """
    positions, mask = inputs.get("position_ids"), mask_of(inputs)
    if not isinstance(positions, Tensor) or isinstance(positions, FakeTensor) or positions.is_meta:
        return None
    if positions.ndim != 2 or positions.shape[1] < 2:
        return None  # a model of pictures may have three positions a token
    if mask is None or mask.shape != positions.shape:
        return (positions.diff(dim=1) != 1).any()  # as transformers does
    kept = mask.bool()
    so_far = positions.masked_fill(~kept, -1).cummax(1).values
    return (kept[:, 1:] & (positions[:, 1:] <= so_far[:, :-1])).any()
