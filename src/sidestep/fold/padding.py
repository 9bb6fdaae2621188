"""Which tokens of a stack are real: a padding mask, brought to the tokens that the stack makes of a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sidestep.backbone.facts import Added
from sidestep.backbone.families import Pool
from sidestep.interface.layers import last_kept, take_rows
from sidestep.interface.sites import Site


def check_mask(mask: Any, who: str) -> None:
    """Raise `ValueError` unless a mask says of each token whether it is padding. `who` reads or mixes tokens."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return
    what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
    raise ValueError(
        f"an attention_mask {what}, but {who} tokens and has to know which are padding. Give a mask of (batch, "
        "tokens), 1 for tokens and 0 for padding"
    )


def kept_tokens(
    mask: Any, states: Tensor, tokens: int, text: int | None, added: Added | None, past: int | Tensor | None
) -> Tensor | None:
    """(batch, tokens) bool, False on padding, or None when nothing is padded.

    Args:
        mask: (batch, tokens of the text) of the model's inputs. With a cache it has the tokens in the cache too.
        states: (batch, any, any) of the pass.
        tokens: of the stack.
        text: of its text. None: as many as the mask has.
        added: where the text stands among the stack's tokens. None: masks do not apply.
        past: tokens in the cache. None: there is no cache, so that the mask may not have more columns than tokens.

    Raises:
        ValueError: if the mask has more columns than there are tokens.
    """
    if added is None:
        return None
    kept = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if kept is None:
        if text is None or tokens <= text or added.kept or added.pictures:
            return None
        # what a model adds of its own accord is padding to everybody else
        kept = torch.ones(states.shape[0], text, dtype=torch.bool, device=states.device)
    if kept.shape[1] > tokens:
        if past is None:
            raise ValueError(
                f"an attention_mask of {kept.shape[1]} tokens, but the model reads {tokens}: give one column for each "
                "token"
            )
        return kept[:, -tokens:]
    before = tokens - kept.shape[1] if added.pictures else added.before
    behind = tokens - kept.shape[1] - before
    if behind == 0 and before == 0:
        return kept
    return F.pad(F.pad(kept, (before, 0), value=True), (0, max(0, behind)), value=added.kept)


def own_tokens(tokens: int, text: int | None, added: Added | None) -> slice:
    """Which of a stack's tokens are in its own output: those of the text, unless what it adds is kept.

    Args:
        tokens: of the stack. It is one where a fold is narrowed to what the head reads.
        text: of its text. None: the stack reads no text.
        added: where the text stands among them.
    """
    if added is None or text is None or added.kept or added.pictures or tokens <= text:
        return slice(None)
    first = added.before if added.cropped else 0
    return slice(first, added.before + text)


def read_token(hidden: Tensor, site: Site, which: Pool, added: Added | None) -> Tensor:
    """(batch, 1, width): the token that the head reads, copied so that its neighbours' storage is not kept.

    Args:
        hidden: (batch, tokens, width).
        site: with the padding.
        which: "cls" or "last".
        added: where a text stands among the tokens. Its first token is the first of all, unless the stack's own output
            leaves out the tokens that it added.
    """
    if which == "cls" or site.keep is None:
        start = added.before if added is not None and added.cropped else 0
        row = hidden[:, start : start + 1] if which == "cls" else hidden[:, -1:]
        return row.clone(memory_format=torch.contiguous_format)
    return take_rows(hidden, last_kept(site.keep))
