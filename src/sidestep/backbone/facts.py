"""What a backbone is: the facts that a fold, a method and a head rely on.

They are found by running the bare model (`trace`), not by its class name. Some models cannot be run as they are, and a
pass of fake tensors does not show everything. The missing facts then come from the family table and from transformers'
own lists of classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from sidestep.backbone.calls import argument_names
from sidestep.backbone.families import family_of
from sidestep.backbone.trunk import is_encoder_decoder, trunk_of

Layout = Literal["tokens", "tokens first", "width first", "grid", "channels"]
"""Axes of a hidden state: (batch, tokens, width), (tokens, batch, width), (batch, width, tokens), (batch, rows,
columns, width) or (batch, width, rows, columns)."""
Source = Literal["traced", "shapes", "guessed"]
FRAMES: dict[str, Callable[[Any, int, Tensor], Tensor]] = {
    "_get_feature_vector_attention_mask": lambda bring, tokens, mask: bring(tokens, mask),
    "_get_output_attention_mask": lambda bring, tokens, mask: bring(mask, target_length=tokens),
}
"""What transformers calls the methods that bring a mask of samples or frames to tokens, and how each is called."""
Causal = Literal["no", "yes", "partly"]
Left = Literal["kept", "positions", "moved"]


@dataclass(frozen=True, kw_only=True)
class Added:
    """Tokens that a stack puts around those of a text.

    Attributes:
        before: how many stand in front.
        kept: whether the tokens behind the text are in the model's own output too. Then they are no padding.
        cropped: whether the model's own output is without both.
        pictures: whether the tokens of a picture stand in front of the text, as many as there are, and in the model's
            own output too (GIT).
    """

    before: int = 0
    kept: bool = False
    cropped: bool = False
    pictures: bool = False


@dataclass(frozen=True, kw_only=True)
class StackFacts:
    """Of one stack.

    Attributes:
        causal: whether a token sees earlier ones only. "partly": in a text, but some kinds of token see each other.
        layout: the axes of the hidden states between its blocks.
        element: which element of a block's tuple or list is the hidden state.
        stages: the names of each stage's blocks within the trunk, in the order of a pass. A stage begins with a list of
            blocks, and where a block changes tokens or width. A block that runs several times has a name for each time
            (shared weights).
        widths: of each stage, the channels of its input and of the output of each of its blocks.
        reshapes: whether the first block of a stage changes the number or the width of the tokens on the way.
        spatial: whether the tokens stand in a grid.
        norm: the name of the final norm within the trunk, or None if there is no such norm.
        ends: whether the stack's own output is what came out of that norm, or of the last block if the stack has no
            norm.
        after: where something follows, the width of the trunk's last hidden state, which a head can read (DINOv3's
            ConvNeXt). None: nothing follows, or it gives no (batch, tokens, width).
        mixed: whether the model mixes the last block's output with earlier ones on the way to that norm.
        again: whether the model gives the last block's output to that norm more than once (DAB-DETR).
        added: where the tokens of a text (or the masked frames of a sound) stand among the stack's. None: they cannot
            be told, and masks do not apply.
        prefixes: of each stage, how many tokens stand before the grid in its input and behind its blocks, where tokens
            become fewer. None: as the family table says.
        linear: the names within the trunk of the blocks' linear maps that are called in a pass. None: not known.
        frames: the name within the trunk of the module that brings a mask of samples or frames to the tokens that are
            made of them. None: there is no such mask.
    """

    causal: Causal
    layout: Layout = "tokens"
    element: int = 0
    stages: tuple[tuple[str, ...], ...]
    widths: tuple[tuple[int, ...], ...]
    reshapes: bool = False
    spatial: bool = False
    norm: str | None
    ends: bool = True
    after: int | None = None
    mixed: bool = False
    again: bool = False
    added: Added | None = None
    prefixes: tuple[tuple[int, int], ...] | None = None
    linear: frozenset[str] | None = field(default=None, repr=False)
    frames: str | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of a backbone.

    Attributes:
        source: "traced": from a pass of the model itself. "shapes": from a pass without values, with causality from the
            table. "guessed": from the order of its modules, because nothing that we know how to make is an input of it.
        stacks: by name, in running order. A lone stack is "decoder" if it is causal.
        padding: whether kept tokens stay as they are (to 1e-5 in float32) when padding is added. None: not known.
        left: what padding on the left does to kept tokens: nothing ("kept"), nothing if positions are given
            ("positions"), or it moves them ("moved"). None: not known.
        packs: whether a lone causal stack reads the texts of one row as if each were alone. Positions start again with
            each text, without a mask and a cache. None: not known yet.
        caches: names under which the model takes what it returned for the tokens before.
        read: the shapes, without rows, of the images or sounds that were read in the pass, by the names of the inputs.
            Of a model of texts the pictures that it cannot do without.
    """

    source: Source
    stacks: dict[str, StackFacts] = field(default_factory=dict)
    padding: bool | None = None
    left: Left | None = None
    packs: bool | None = None
    caches: tuple[str, ...] = ()
    read: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def is_causal(self) -> bool:
        """Whether there is one stack, and it is causal."""
        return len(self.stacks) == 1 and self.head.causal != "no"

    @property
    def head(self) -> StackFacts:
        """Of the stack that a head reads: the last."""
        return list(self.stacks.values())[-1]


def said_causal(model: nn.Module) -> bool:
    """Whether the only stack of a model is causal, as far as its family, its config and its classes say."""
    if is_encoder_decoder(model):
        return False
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_causal", None) is False:
        return False
    if any(getattr(module, "is_causal", False) is True for module in trunk_of(model).modules()):
        return True
    if (told := family_of(model).causal) is not None:
        return told
    kind = getattr(config, "model_type", None)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        # BERT-type models have a class for either: they are decoders if their config says so
        return bool(getattr(config, "is_decoder", False))
    # Whisper has such a class too, and its encoder reads sounds
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "input_ids" in argument_names(trunk_of(model))


def mask_of_frames(module: nn.Module, tokens: int, mask: Tensor) -> Tensor | None:
    """A mask (batch, samples or frames) brought to so many tokens by the module itself. None: it has no such method."""
    for name, call in FRAMES.items():
        if hasattr(module, name):
            return call(getattr(module, name), tokens, mask).bool()
    return None


def as_tokens(hidden: Tensor, layout: Layout) -> Tensor:
    """A hidden state of this layout, seen as (batch, tokens, width)."""
    if layout == "tokens first":
        return hidden.transpose(0, 1)
    if layout == "width first":
        return hidden.transpose(1, 2)
    if hidden.ndim == 4:
        return hidden.flatten(2).transpose(1, 2) if layout == "channels" else hidden.flatten(1, 2)
    return hidden


def as_given(tokens: Tensor, given: Tensor, layout: Layout) -> Tensor:
    """Tokens (batch, tokens, width) in the layout of the hidden state that they stand in for."""
    if layout == "tokens first":
        return tokens.transpose(0, 1)
    if layout == "width first":
        return tokens.transpose(1, 2)
    if given.ndim == 4 and layout == "channels":
        # in its order of memory too, or what stands behind would go on by other kernels
        last = not given.is_contiguous() and given.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if last else torch.contiguous_format
        return tokens.transpose(1, 2).reshape(given.shape).contiguous(memory_format=order)
    return tokens.reshape(given.shape)
