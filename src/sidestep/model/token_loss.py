"""The loss of a frozen language model head without its logits.

Logits over a vocabulary are wider than all else that a step keeps. The head is frozen, so its weights need no gradient.
The gradient of its input is then known in the forward pass, chunk by chunk: it is kept, and no logits are. Positions
without a label are left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers.utils import ModelOutput

from sidestep.metrics import IGNORED

LmLoss = Literal["own", "chunked"]
"""How the loss of a frozen language model head is computed in training: by the model, or without its logits."""

CHUNK = 2**24
"""Logits that are there at one time."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""How far the two losses of the first batch may be apart, relative to the model's own."""
ASKED = ("logits_to_keep", "shift_labels")
"""Arguments that ask for logits, or for a loss of other tokens."""
DECODER_INPUTS = "prepare_decoder_input_ids_from_labels"
PROBE = 1e3
"""A logit that no soft cap and no scale leaves as it is."""


class LmLossWarning(UserWarning):
    """The loss is computed from logits, as the model does it. The message says why."""


def check_lm_loss(lm_loss: str) -> None:
    """Raise `ValueError` for a way that there is not."""
    if lm_loss not in get_args(LmLoss):
        raise ValueError(f"lm_loss={lm_loss!r}: choose {' or '.join(get_args(LmLoss))}")


class TokenLoss:
    """The loss of a model's own head over tokens.

    Args:
        backbone: with that head.
        shifted: whether a position's label is that of the next one (a decoder alone), or its own.

    Attributes:
        proved: whether it gave the model's own loss on the first batch. None before that.
    """

    def __init__(self, backbone: Any, *, shifted: bool) -> None:
        self.backbone, self.shifted = backbone, shifted
        self.proved: bool | None = None

    def applies(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether this call's loss can be computed so: a training step on a frozen head, and nobody asks for more."""
        if self.proved is False or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        head, return_dict = self.backbone.get_output_embeddings(), kwargs.get("return_dict")
        if head is None or return_dict is False or any(kwargs.get(name) is not None for name in ASKED):
            return False
        makes = self.shifted or hasattr(self.backbone, DECODER_INPUTS) or kwargs.get("decoder_input_ids") is not None
        return makes and not any(weight.requires_grad for weight in head.parameters())

    def run(self, call: Callable[..., Any], labels: Tensor, kwargs: Mapping[str, Any]) -> Any:
        """The model's output with its loss and without logits.

        Args:
            call: the backbone, of keyword arguments, with the task active.
            labels: (batch, tokens), `IGNORED` where there is none.
            kwargs: of the call, without labels. Among them `num_items_in_batch`, the tokens that the loss is a mean of,
                if these are not the batch's.

        Returns:
            None if this call is not for it, or the first batch shows that the model's own loss is another. The latter
            is said, once.
        """
        if not self.applies(kwargs):
            return None
        kwargs = dict(kwargs)
        items = kwargs.pop("num_items_in_batch", None)
        given = self._with_decoder_inputs(labels, kwargs)
        own = None
        if self.proved is None and not isinstance(labels, FakeTensor):
            devices = [labels.device] if labels.device.type == "cuda" else []
            # the same dropout in both
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                extra = {} if items is None or not self.shifted else {"num_items_in_batch": items}
                own = call(**kwargs, labels=labels, **extra).loss
        with self._without_logits() as seen:
            output = call(**given)
        found = self._given_up(output, seen)
        if found is None:
            hidden = seen[0]
            index, targets = self._labelled(labels, hidden)
            loss = _Chunked.apply(hidden, seen.head, index, targets, len(targets) if items is None else items)
            if own is not None and items is not None and not self.shifted:
                own = own * len(targets) / items  # an encoder-decoder's is a mean over the batch
            if own is not None and (off := _distance(loss, own)) > TOLERANCE[hidden.dtype]:
                ours = float(loss.detach())
                found = f"on the first batch it is {float(own):.6g}, and that of the head {ours:.6g} ({off:.0e})"
        if found is not None:
            self.proved = False
            warnings.warn(
                f"lm_loss='chunked', but the loss of {type(self.backbone).__name__} is not that of its head alone: "
                f"{found}. Its own loss is taken, and logits are kept",
                LmLossWarning,
                stacklevel=2,
            )
            return None
        self.proved = True
        rest = {name: value for name, value in output.items() if name not in ("loss", "logits")}
        return type(output)(loss=loss, **rest)

    def _with_decoder_inputs(self, labels: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments without labels, of which an encoder-decoder makes what its decoder reads."""
        if self.shifted or kwargs.get("decoder_input_ids") is not None:
            return dict(kwargs)
        return {**kwargs, "decoder_input_ids": getattr(self.backbone, DECODER_INPUTS)(labels=labels)}

    @contextmanager
    def _without_logits(self) -> Iterator[_Seen]:
        """Within it the head notes what it is given, and gives one logit, which shows what is done to logits."""
        head = self.backbone.get_output_embeddings()
        seen = _Seen(head)
        before = head.__dict__.get("forward")

        def noting(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(hidden)
            return hidden.new_full((*hidden.shape[:-1], 1), PROBE)

        head.forward = noting
        try:
            yield seen
        finally:
            if before is None:
                del head.forward
            else:
                head.forward = before

    def _given_up(self, output: Any, seen: _Seen) -> str | None:
        """Why the loss cannot be computed from what the head is given. None if it can."""
        if len(seen) != 1:
            return f"its head ran {len(seen)} times"
        logits = output.get("logits") if isinstance(output, ModelOutput) else None
        if logits is None or logits.shape != (*seen[0].shape[:-1], 1):
            return "what it gives is not what its head gave"
        if self.proved is None and not isinstance(logits, FakeTensor) and not bool((logits == PROBE).all()):
            became = float(logits.flatten()[0])
            return f"it changes logits behind its head, by a scale or a cap ({PROBE:g} becomes {became:g})"
        return None

    def _labelled(self, labels: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(labelled,) positions among all of a batch, and their labels. In a plan all positions are labelled."""
        targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if self.shifted else labels
        targets = targets.to(hidden.device).flatten()
        if isinstance(targets, FakeTensor):
            return torch.arange(len(targets), device=hidden.device), targets
        index = (targets != IGNORED).nonzero().flatten()
        return index, targets[index]


class _Seen(list[Tensor]):
    """What a head was given, and the head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head


class _Chunked(torch.autograd.Function):
    """Cross entropy over a frozen head's logits, of which there are never more than `CHUNK`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Module, index: Tensor, targets: Tensor, count: Any) -> Tensor:
        rows = hidden.detach().flatten(0, -2)
        gradient = rows.new_empty(len(index), rows.shape[-1])
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=rows.device)
        weight: Any = head.weight
        step = max(1, CHUNK // weight.shape[0])
        for start in range(0, len(index), step):
            part = slice(start, start + step)
            # these tensors are gone at the chunk's end, so no hook of the caller's counts or moves them
            with torch.enable_grad(), saved_tensors_hooks(torch.Tensor.detach, _as_it_is):
                chunk = rows[index[part]].requires_grad_()
                # the head sees no leaf: hooks of counters on its input ask for more than `grad` runs
                logits = head(chunk.view_as(chunk)).to(wide)
                loss = F.cross_entropy(logits, targets[part], reduction="sum")
            gradient[part] = torch.autograd.grad(loss, chunk)[0]
            total += loss.detach()
        ctx.save_for_backward(index, gradient)
        ctx.shape, ctx.count = hidden.shape, count
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        index, gradient = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.shape)
        # in the loss's precision: a factor rounded to less would scale all of it, and a scaler's may not even fit
        scaled = gradient.to(gradients[0].dtype) * (gradients[0] / ctx.count)
        whole.flatten(0, -2)[index] = scaled.to(gradient.dtype)
        return whole, None, None, None, None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach() - theirs).abs() / theirs.abs().clamp(min=1e-6))
