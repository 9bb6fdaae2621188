"""What an attached model gives: the trunk's output with a Sidestep head's logits, and its loss."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import (
    ImageClassifierOutput,
    Seq2SeqSequenceClassifierOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput

from sidestep.backbone import is_encoder_decoder
from sidestep.fold import FoldError

SPAN = ("start_positions", "end_positions")
"""The labels of a head of a model's own for the ends of an answer."""
TRACES = (
    "hidden_states",
    "attentions",
    "encoder_hidden_states",
    "encoder_attentions",
    "decoder_hidden_states",
    "decoder_attentions",
    "cross_attentions",
)
"""What a trunk's output holds besides its last hidden state if it is asked to."""


def classified(
    loss: Tensor | None, logits: Tensor, output: Any, backbone: nn.Module, *, reads_images: bool
) -> ModelOutput:
    """The output of a Sidestep head, with what was asked for of the trunk's own (`output`) besides."""
    kind: type[ModelOutput] = ImageClassifierOutput if reads_images else SequenceClassifierOutput
    if logits.ndim == 3:
        kind = TokenClassifierOutput
    named = output if isinstance(output, ModelOutput) else {}
    extra = {name: named[name] for name in TRACES if named.get(name) is not None}
    if extra and is_encoder_decoder(backbone):
        kind = Seq2SeqSequenceClassifierOutput
    fields = kind.__dataclass_fields__
    return kind(loss=loss, logits=logits, **{name: value for name, value in extra.items() if name in fields})


def gives_spans(backbone: nn.Module) -> bool:
    """Whether a model's own head gives the two ends of an answer (BertForQuestionAnswering and the like)."""
    return SPAN[0] in inspect.signature(type(backbone).forward).parameters


def own_labels(backbone: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """Labels by the names that a model with a head of its own takes."""
    return dict(zip(SPAN, labels.unbind(-1), strict=True)) if gives_spans(backbone) else {"labels": labels}


def check_rows(logits: Tensor, given: Any, backbone: nn.Module) -> None:
    """Raise `FoldError` unless the head gave a row for each row of the batch, and for each token if it reads them all.

    `given` is an input of the backbone.
    """
    if isinstance(given, Tensor) and logits.ndim == 3 and logits.shape[1] != given.shape[1]:
        raise FoldError(
            f"the head gave outputs for {logits.shape[1]} tokens of texts of {given.shape[1]}. The last states of "
            f"{type(backbone).__name__} do not belong to the tokens that it is given: choose another backbone"
        )
    if isinstance(given, Tensor) and logits.shape[0] != given.shape[0]:
        raise FoldError(
            f"the head gave {logits.shape[0]} rows for a batch of {given.shape[0]}. The hidden states of "
            f"{type(backbone).__name__} do not have the batch as their first axis in this pass, or it puts "
            "rows together. Give it one example a row"
        )


def refuse_timm_options(kwargs: dict[str, Any], backbone: nn.Module) -> None:
    """Refuse options that a timm model's forward does not know. Take out those that are off."""
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.pop(name, None):
            raise ValueError(
                f"{name}=True, but {type(backbone).__name__} is timm's and gives logits alone: leave it out, "
                "or call model.backbone.forward_intermediates"
            )


def pop_return_dict(kwargs: dict[str, Any], config: Any) -> bool:
    """Whether an output with names is asked for. The trunk's own always has them, as the head reads by name."""
    asked, usual = kwargs.pop("return_dict", None), getattr(config, "return_dict", True)
    if not usual:
        kwargs["return_dict"] = True
    return usual if asked is None else asked


def loss_of(output: Any) -> Tensor | None:
    """The loss in a model's output. A tuple does not say whether it begins with one."""
    return output.get("loss") if isinstance(output, ModelOutput) else None


def scaled(output: Any, factor: Tensor) -> Any:
    """A model's output with its loss times a factor. A tuple begins with the loss."""
    if isinstance(output, tuple):
        return (output[0] * factor, *output[1:])
    output.loss = output.loss * factor
    return output
