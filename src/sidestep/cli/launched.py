"""Commands under `torchrun` or `accelerate launch` whose processes share out work, and do not train one model."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

OF_GROUPS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK", "LOCAL_WORLD_SIZE")
"""Variables by which libraries find that a process is one of a group."""
CARDS = "CUDA_VISIBLE_DEVICES"


def as_single_process(environment: MutableMapping[str, str] = os.environ) -> int:
    """Make this process work alone, on the card of its own rank, before torch looks for cards.

    Returns:
        How many processes were started together. 1 without a launcher.
    """
    count = int(environment.get("WORLD_SIZE", "1"))
    rank = environment.pop("LOCAL_RANK", None)
    for name in OF_GROUPS:
        environment.pop(name, None)
    if count > 1 and rank is not None:
        cards = environment.get(CARDS, "").split(",")
        environment[CARDS] = cards[int(rank) % len(cards)] if cards != [""] else rank
    return count
