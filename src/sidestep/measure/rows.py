"""How many rows go through an offloaded backbone at once, so that its weights are read few times."""

from __future__ import annotations

import psutil
import torch
from torch import nn

from sidestep.backbone import trunk_of
from sidestep.interface.offload import is_offloaded
from sidestep.model.attach import Attached

ROWS = 64
"""Of a pass without gradients, on a backbone whose weights stay in memory."""
MOST = 2048
ROOM = 0.25
"""Share of the free memory that states of such a pass may take."""
TOKENS = 512
"""Of a row, where nobody knows."""
WIDTHS, INNER = 8, 4
"""How many hidden states, and how many results of a block's widest map, are taken to live at once."""


def rows_at_once(model: Attached, tokens: int | None = None) -> int:
    """Rows of one pass without gradients: `ROWS`, or as many as memory has room for if the backbone is offloaded.

    Args:
        model: attached.
        tokens: of the longest row. None: `TOKENS`.
    """
    if not is_offloaded(model.backbone):
        return ROWS
    device = model.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    row = (tokens or TOKENS) * model.dtype.itemsize * max(_values(part.backbone) for part in model.parts)
    return max(1, min(MOST, int(ROOM * free) // row))


def _values(backbone: nn.Module) -> int:
    """How many values of a token live at once."""
    maps = [part for part in trunk_of(backbone).modules() if isinstance(part, nn.Linear)]
    width = max((part.in_features for part in maps), default=1)
    return WIDTHS * width + INNER * max((part.out_features for part in maps), default=1)
