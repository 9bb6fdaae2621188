"""The inputs of a pass, completed: no cache where nothing is generated, a decoder's first token, positions.

Sounds are brought to the precision of the weights.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from sidestep.backbone import Facts, is_encoder_decoder, packs, positions
from sidestep.backbone.calls import takes
from sidestep.backbone.trunk import SOUND_INPUTS
from sidestep.fold.packing import is_packed, refusal
from sidestep.methods import SideNet
from sidestep.metrics import IGNORED

TYPES = "mm_token_type_ids"
"""Name of the input that says which tokens are of a text (0), of a picture or of a sound."""


class Inputs:
    """What is done to inputs before the backbone sees them.

    Args:
        backbone: as given to `attach`.
        facts: what it is.
        side: the side network.
        headed: whether a Sidestep head reads the trunk.
    """

    def __init__(self, backbone: Any, facts: Facts, side: SideNet, *, headed: bool) -> None:
        self.backbone, self.facts, self.side, self.headed = backbone, facts, side, headed
        self.packs = facts.packs

    @property
    def main_name(self) -> str:
        """Name of the first input."""
        return getattr(self.backbone, "main_input_name", "pixel_values")

    def completed(
        self, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool
    ) -> dict[str, Any]:
        """The keyword arguments of a call of `entry`, with what it needs besides.

        Raises:
            ValueError: if rows of several texts, or texts that are padded on the left, would be read otherwise than
                each text alone.
        """
        if not isinstance(self.backbone, PreTrainedModel):
            return kwargs
        if self.main_name in SOUND_INPUTS and isinstance(sounds := kwargs.get(self.main_name), Tensor):
            # models of texts and images bring their inputs to the precision of their weights themselves
            kwargs[self.main_name] = sounds.to(self.backbone.dtype)
        names = list(inspect.signature(type(entry).forward).parameters)[1:]
        if entry is not self.backbone and not args and names[0] not in kwargs:
            # so does the model itself, whose trunk has another name for what it reads (Perceiver)
            for name in [name for name in kwargs if takes(self.backbone, name) and not takes(entry, name)]:
                kwargs[names[0]] = kwargs.pop(name)
        # with a cache, transformers takes a row of several texts for one
        packed = self._is_packed({**dict(zip(names, args, strict=False)), **kwargs})
        if "past_key_values" not in kwargs and (self.headed or training or packed) and takes(entry, "use_cache"):
            kwargs.setdefault("use_cache", False)
        if self.headed and is_encoder_decoder(self.backbone):
            given = (kwargs.get(name) for name in (self.main_name, "inputs_embeds"))
            first = args[0] if args else next((tensor for tensor in given if tensor is not None), None)
            if first is not None and kwargs.get("decoder_input_ids") is None:
                start = torch.full((first.shape[0], 1), self._decoder_start(), device=first.device)
                kwargs["decoder_input_ids"] = start
        if training and takes(entry, TYPES):
            kwargs = self._with_types(args, kwargs, names)
        return self._with_positions(args, kwargs, names)

    def _with_types(self, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]) -> dict[str, Any]:
        """The inputs with the types of tokens that are no picture's. Molmo 2 wants them in training."""
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        if ids is None or given.get(TYPES) is not None or _has_pictures(given):
            return kwargs
        return {**kwargs, TYPES: torch.zeros_like(ids)}

    def _is_packed(self, inputs: dict[str, Any]) -> bool:
        """Whether rows hold several texts each, which are then read as if each were alone."""

        def known_packs() -> bool | None:
            if self.packs is None and not torch.compiler.is_compiling():
                self.packs = packs(self.backbone)
            return self.packs

        name, causal = type(self.backbone).__name__, self.facts.is_causal
        return is_packed(
            inputs, lambda: refusal(inputs, self.side, name, known_packs, causal=causal, pools=self.headed)
        )

    def _with_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]) -> dict[str, Any]:
        """The inputs with positions that count from each text's first token, where the model would count padding."""
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        if self.facts.left in (None, "kept") or not isinstance(mask, Tensor) or mask.ndim != 2 or not _pads_left(mask):
            return kwargs
        ids = given.get("input_ids", given.get("inputs_embeds"))
        if self.facts.left == "moved" and self.facts.padding and not torch.compiler.is_compiling():
            raise ValueError(
                f"a text is padded on the left, and {type(self.backbone).__name__} counts its positions from there, "
                "so that a text would be read otherwise in other batches. Pad on the right "
                '(tokenizer.padding_side="right")'
            )
        if self.facts.left == "moved" or ids is None or given.get("position_ids") is not None or _has_pictures(given):
            return kwargs
        padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
        places = (torch.arange(mask.shape[1], device=mask.device) - padding).clamp(min=0)
        return {**kwargs, "position_ids": places[:, -ids.shape[1] :]}

    def _decoder_start(self) -> int:
        """The token that a decoder begins with."""
        config, generation = self.backbone.config, getattr(self.backbone, "generation_config", None)
        for holder in (config, generation):
            if (token := getattr(holder, "decoder_start_token_id", None)) is not None:
                return token
        return config.pad_token_id

    def check_prompts(self, tokens: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Refuse prompts that are longer than the backbone's table of positions. Masked padding does not count.

        Raises:
            ValueError: saying how long they may be.
        """
        most, _ = positions(self.backbone)
        if most is None or tokens is None or self.main_name != "input_ids":
            return
        mask = kwargs.get("attention_mask")
        longest = tokens.shape[1] if mask is None else int(mask.sum(1).max())
        if longest > most:
            raise ValueError(
                f"a prompt of {longest} tokens, but {type(self.backbone).__name__} has {most} positions: give at most "
                f"{most}"
            )


def check_labels(labels: Tensor) -> None:
    """Raise `ValueError` if the loss would leave out all classes or tokens. The mean over none is no number."""
    # not on an accelerator, where to look would be to wait for it: there the collators have looked
    if labels.device.type != "cpu" or isinstance(labels, FakeTensor) or torch.compiler.is_compiling():
        return
    if labels.numel() and not labels.is_floating_point() and bool((labels == IGNORED).all()):
        raise ValueError(
            f"all {labels.numel()} labels of a batch are {IGNORED}, which the loss leaves out, so there is nothing to "
            "learn from. Leave the batch out, or give no labels"
        )


def _pads_left(mask: Tensor) -> bool:
    """Whether a text is padded on the left. A compiled pass counts as padded so, and a plan's batch does not."""
    if mask.is_meta or isinstance(mask, FakeTensor):
        return False
    return torch.compiler.is_compiling() or bool((mask[:, 0] == 0).any())


def _has_pictures(given: dict[str, Any]) -> bool:
    """Whether there are pictures or sounds beside texts. Their positions are for the model to tell (Hunyuan-VL)."""
    others = (value for name, value in given.items() if not name.endswith(("inputs_embeds", "attention_mask")))
    return any(isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 for value in others)
