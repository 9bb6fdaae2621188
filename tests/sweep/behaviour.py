"""What a model does with padding, with later tokens and with a cache, bare or with a method attached.

Each function says how far a model is from what it should do, as a share of its largest output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sweep.configs import ORDINARY, VOCABULARY
from sweep.inputs import ROWS, Batch, call

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "bbox")
"""Inputs with one entry a token of the text."""
LONGER, STEPS = 3, 3
"""How many tokens the other text has more, and how many tokens are written."""
SUPPRESSED = [token for token in range(VOCABULARY) if token not in ORDINARY]
"""Tokens that would end a text or ask for a picture."""


def padding(model: Any, batch: Batch, pad: int, *, side: Literal["left", "right"]) -> float:
    """How far the outputs for a text are apart, alone and padded on one side beside a longer text."""
    alone = output(model, rows_of(batch, 1))[0]
    padded = output(model, beside_longer(batch, pad, side=side))[0]
    return apart(alone, padded[: len(alone)] if side == "right" else padded[-len(alone) :])


def later(model: Any, batch: Batch, pad: int) -> float:
    """How far the outputs for all tokens but the last move with another last token."""
    one = rows_of(batch, 1)
    name = written_name(one)
    other = one[name].clone()
    other[:, -1] = ORDINARY.start + (other[:, -1] + 1) % len(ORDINARY)
    return apart(output(model, one)[:, :-1], output(model, {**one, name: other})[:, :-1])


@torch.no_grad()
def cache(model: Any, batch: Batch, pad: int) -> float:
    """How far the logits of a text that is written with a cache are from those of one pass over the whole text."""
    two = rows_of(batch, 2)
    written = model.generate(
        **two,
        use_cache=True,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        num_beams=1,
        suppress_tokens=SUPPRESSED,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = output(model, followed_by(two, written.sequences))
    return apart(whole[:, -STEPS - 1 : -1], torch.stack(written.logits, 1))


Law = Callable[[Any, Batch, int], float]
LAWS: dict[str, Law] = {
    "padding right": partial(padding, side="right"),
    "padding left": partial(padding, side="left"),
    "later tokens": later,
    "cache": cache,
}


def laws_for(batch: Batch, *, tokens: bool) -> list[str]:
    """The laws that a batch can show.

    Args:
        batch: of the model.
        tokens: whether the model gives an output for each token, and not one for each row.
    """
    pads = "input_ids" in batch and "attention_mask" in batch
    return [*(["padding right", "padding left"] if pads else []), *(["later tokens", "cache"] if tokens else [])]


def output(model: Any, batch: Batch) -> Tensor:
    """Logits, or what a model without a head gives last."""
    out = call(model, batch)
    found: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found.float()


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value of `a`. Infinite where the shapes differ."""
    if a.shape != b.shape:
        return math.inf
    share = ((a - b).abs().max() / a.abs().max().clamp(min=1e-12)).item()
    return share if math.isfinite(share) else math.inf


# --- batches ----------------------------------------------------------------------------------------------------------


def written_name(batch: Batch) -> str:
    """The name of the tokens that the model goes on from."""
    return "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"


def rows_of(batch: Batch, rows: int) -> Batch:
    """The first rows of a batch, in which an image may have several rows of patches. Their texts have no padding."""
    return {name: tensor[: rows * len(tensor) // ROWS] for name, tensor in batch.items()}


def beside_longer(batch: Batch, pad: int, *, side: Literal["left", "right"]) -> Batch:
    """The first text, padded on one side, and the second one with more tokens behind it."""
    two = rows_of(batch, 2)
    return two | {name: _widened(name, two[name], pad, side) for name in PER_TOKEN if name in two}


def _widened(name: str, tensor: Tensor, pad: int, side: Literal["left", "right"]) -> Tensor:
    short, longer = tensor.new_zeros(2, LONGER, *tensor.shape[2:])
    if name == "input_ids":
        short, longer = torch.full_like(short, pad), torch.arange(LONGER) + ORDINARY.start
    elif name == "attention_mask":
        longer = torch.ones_like(longer)
    first = [short, tensor[0]] if side == "left" else [tensor[0], short]
    return torch.stack([torch.cat(first), torch.cat([tensor[1], longer])])


def followed_by(batch: Batch, written: Tensor) -> Batch:
    """A batch whose texts have what was written behind them."""
    name = written_name(batch)
    found = {**batch, name: written}
    if name == "decoder_input_ids":
        return found
    more = written.shape[1] - batch[name].shape[1]
    for per_token in PER_TOKEN:
        if per_token in batch and per_token != name:
            tensor = batch[per_token]
            tail = tensor.new_full((len(tensor), more, *tensor.shape[2:]), int(per_token == "attention_mask"))
            found[per_token] = torch.cat([tensor, tail], 1)
    return found
