"""The rivals that a comparison needs: LoRA, DoRA and IA3, as the PEFT library computes them.

PEFT's own modules are put into the backbone and taken out again by `detach`. Nothing is written again. They need the
extra "compare".

Sources: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; Liu et al., "DoRA:
Weight-Decomposed Low-Rank Adaptation", ICML 2024; Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and
Cheaper than In-Context Learning", NeurIPS 2022 (IA3).
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.interface.config import MethodConfig
from sidestep.interface.layers import is_linear
from sidestep.interface.registry import register
from sidestep.interface.sites import Place, Site
from sidestep.interface.weight_delta import WeightDelta, refuse_codes

ADAPTER = "default"  # PEFT's own name for the only adapter
OWN = ("lora_", "ia3_")  # how the names of PEFT's parameters begin
#: Where PEFT's table does not know a model: query and value, key and value, and what leads out of the MLP.
QUERY_VALUE = ("query", "value", "q_proj", "v_proj", "q", "v", "q_lin", "v_lin", "qkv", "query_key_value", "Wqkv")
KEY_VALUE = ("key", "value", "k_proj", "v_proj", "k", "v", "k_lin", "v_lin", "qkv", "query_key_value", "Wqkv")
MLP_OUT = ("output.dense", "fc2", "down_proj", "wo", "lin2", "mlp.Wo", "output_dense", "ffn_output")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(MethodConfig):
    """LoRA: a low-rank change of some linear maps.

    Attributes:
        rank: of the change.
        alpha: the change is scaled by alpha / rank.
        dropout: on the change's input, in training.
        targets: ends of the names of the linear maps. None is PEFT's choice for the model, which is query and value.
            Where neither is found, these are all linear maps of the attentions, or of blocks that do not attend.
    """

    rates = (5e-4, 2e-3, 5e-3)

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rank", self.rank >= 1, "a whole number of at least 1")
        self.require("alpha", self.alpha >= 1, "a whole number of at least 1")
        self.require("dropout", 0 <= self.dropout < 1, "a number of at least 0 and less than 1")


@dataclass(frozen=True, kw_only=True)
class DoraConfig(LoraConfig):
    """DoRA: LoRA on the direction of the weights, and a learned length. The fields are LoRA's."""

    rates = (5e-4, 2e-3, 5e-3)


@dataclass(frozen=True, kw_only=True)
class LateLoraConfig(LoraConfig):
    """LoRA of the last blocks alone. The fields are LoRA's, and one more.

    Attributes:
        blocks: how many, of the stack that the head reads. None: half of them, at least one.
    """

    rates = (5e-4, 2e-3, 5e-3)

    blocks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("blocks", self.blocks is None or self.blocks >= 1, "a whole number of at least 1, or None")

    def count(self, depth: int) -> int:
        """How many of `depth` blocks are changed."""
        return max(depth // 2, 1) if self.blocks is None else self.blocks


@dataclass(frozen=True, kw_only=True)
class IA3Config(MethodConfig):
    """IA3: a learned scale on keys, values and the MLP.

    Attributes:
        targets: ends of the names of the linear maps that are scaled. None is PEFT's choice for the model.
        feedforward: those of them whose input is scaled, not the output. None is PEFT's choice.
    """

    rates = (1e-3, 5e-3, 2e-2)

    targets: tuple[str, ...] | None = None
    feedforward: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.targets is None) == (self.feedforward is None)
        self.require("feedforward", given, "given together with targets")


class Adapter(WeightDelta):
    """A method of the PEFT library."""

    def insert(self, trunk: nn.Module) -> None:
        """Put PEFT's modules around the linear maps that the config names.

        Raises:
            ModuleNotFoundError: if PEFT is not installed.
            ValueError: if the backbone has no such linear map, or holds PEFT's modules already.
        """
        if hasattr(trunk, "peft_config"):
            raise ValueError("it holds modules of PEFT already: merge them into its weights, or unload them, first")
        try:
            import peft
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'{type(self).__name__} is the PEFT library\'s: pip install "sidestep[compare]"'
            ) from error
        config = getattr(trunk, "config", None)
        self.tuner = self.build(peft, trunk, getattr(config, "model_type", ""))
        for name, parameter in trunk.named_parameters():
            # what is trained is in float32 on a backbone of half precision, as get_peft_model has it
            if self.moves(name, parameter) and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()

    @abstractmethod
    def build(self, peft: Any, trunk: nn.Module, model_type: str) -> Any:
        """PEFT's tuner of the trunk, where `model_type` is the key of PEFT's tables."""

    def remove(self, trunk: nn.Module) -> None:
        """Take PEFT's modules out."""
        self.tuner.unload()
        trunk.__dict__.pop("peft_config", None)  # older releases leave it behind

    def moves(self, name: str, parameter: Tensor) -> bool:
        """PEFT's own parameters."""
        return self.plain_name(name) is None

    def plain_name(self, name: str) -> str | None:
        """The name without PEFT's wrapper around a linear map."""
        if any(part.startswith(OWN) for part in name.split(".")):
            return None
        return name.replace(".base_layer.", ".")


@register("lora", LoraConfig)
class Lora(Adapter):
    """LoRA, through PEFT: trains a low-rank change of the query and value maps."""

    def see(self, places: Sequence[Place]) -> None:
        """Note the blocks. Other towers of a model stay as they are."""
        self.blocks = [place for place in places if place.site.kind == "block"]

    def build(self, peft: Any, trunk: nn.Module, model_type: str) -> Any:
        """PEFT's LoRA tuner, or its DoRA tuner where the config is DoRA's."""
        table = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        known = table.get(model_type)
        if isinstance(known, str):  # a pattern
            known = tuple(name for name, _ in trunk.named_modules() if re.fullmatch(known, name))
        targets = self.config.targets or known or self._usual(trunk)
        if not (targets and self._runs(trunk, tuple(targets))):
            targets = self._all(trunk)
        config = peft.LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            target_modules=list(self.chosen(trunk, tuple(targets))),
            use_dora=isinstance(self.config, DoraConfig),
        )
        return peft.LoraModel(trunk, config, ADAPTER)

    def chosen(self, trunk: nn.Module, targets: tuple[str, ...]) -> tuple[str, ...]:
        """The linear maps that are changed: by the ends of their names, or by whole names where others end so too."""
        inside = self.inside(trunk, targets)
        others = any(
            f".{name}".endswith(_ends(targets)) and is_linear(module) and name not in inside
            for name, module in trunk.named_modules()
        )
        return tuple(inside) if inside and others else targets

    def inside(self, trunk: nn.Module, targets: tuple[str, ...]) -> list[str]:
        """The whole names of linear maps in the blocks, whose names end so."""
        ids = {id(module) for place in self.blocks for module in place.module.modules()}
        return [
            name
            for name, module in trunk.named_modules()
            if id(module) in ids and is_linear(module) and f".{name}".endswith(_ends(targets))
        ]

    def _usual(self, trunk: nn.Module) -> tuple[str, ...]:
        """The usual names of query and value that are there."""
        return tuple(end for end in QUERY_VALUE if self.inside(trunk, (end,)))

    def _runs(self, trunk: nn.Module, targets: tuple[str, ...]) -> bool:
        """Whether linear maps are called. Some models read the weights themselves (WavLM), and what is added is lost.

        Raises:
            ValueError: if they are not, and the config names them.
        """
        names, called = self.inside(trunk, targets), self._called
        if not names or called is None or called.intersection(names):
            return True
        if self.config.targets:
            raise ValueError(
                f"targets={targets}: the model reads the weights of these linear maps and never calls them, so what "
                "is added there has no effect. Name others, or leave targets out"
            )
        return False

    @property
    def _called(self) -> frozenset[str] | None:
        known = [place.linear for place in self.blocks if place.linear is not None]
        return frozenset[str]().union(*known) if known else None

    def _all(self, trunk: nn.Module) -> tuple[str, ...]:
        """All linear maps of the attentions that are called, or of the blocks, that read or give a hidden state."""
        widths, called = {place.site.width for place in self.blocks}, self._called
        parts = [part for place in self.blocks for part in place.module.modules()]
        # fused kernels of state-space mixers read the weights of their last map themselves, and PEFT refuses it
        fused = {id(part.out_proj) for part in parts if hasattr(part, "conv1d") and hasattr(part, "out_proj")}
        attentions = [part for part in parts if "attention" in type(part).__name__.lower()]
        for some in (attentions, parts):
            ids = {id(module) for part in some for module in part.modules()} - fused
            found = tuple(
                name
                for name, module in trunk.named_modules()
                if id(module) in ids
                and is_linear(module)
                and widths & set(module.weight.shape)
                and (called is None or name in called)
            )
            if found:
                return found
        raise ValueError("its blocks have no linear map: name some with targets=(...), or choose another method")


@register("dora", DoraConfig)
class Dora(Lora):
    """DoRA, through PEFT: LoRA with a learned length of the weights."""

    starts_as_identity = False  # up to rounding only: the weights are divided and multiplied by their lengths

    def build(self, peft: Any, trunk: nn.Module, model_type: str) -> Any:
        """PEFT's DoRA tuner.

        Raises:
            ValueError: if the backbone is in bitsandbytes' 8 bits.
        """
        if any(type(parameter).__name__ == "Int8Params" for parameter in trunk.parameters()):
            raise ValueError(
                "PEFT loses the scales of 8-bit codes where it reads the weights' lengths: choose lora, or load the "
                "backbone in 4 bit"
            )
        return super().build(peft, trunk, model_type)


@register("late_lora", LateLoraConfig)
class LateLora(Lora):
    """Late LoRA, through PEFT: LoRA of the last blocks, behind states that need be computed once only."""

    late = True

    def see(self, places: Sequence[Place]) -> None:
        """Note the blocks of the stack that the head reads.

        Raises:
            ValueError: if there are fewer than the config asks for, or early ones share their weights.
        """
        own = [place for place in places if place.site.head and place.site.kind == "block"]
        count = self.config.count(len(own))
        if count > len(own):
            raise ValueError(f"blocks={count}, but there are {len(own)} blocks: choose from 1 to {len(own)}")
        self.blocks = own[-count:]
        if {place.module for place in self.blocks} & {place.module for place in own[:-count]}:
            raise ValueError("its blocks share their weights, so the last ones cannot be changed alone: choose lora")

    def border(self, places: Sequence[Place]) -> Site:
        """The place in front of the first block that is changed."""
        order = next(number for number, place in enumerate(places) if place.site == self.blocks[0].site)
        return places[order - 1].site

    def chosen(self, trunk: nn.Module, targets: tuple[str, ...]) -> tuple[str, ...]:
        """Those in the last blocks, by their whole names.

        Raises:
            ValueError: if there is none.
        """
        found = tuple(self.inside(trunk, targets))
        if not found:
            raise ValueError(
                f"the last {len(self.blocks)} blocks have no linear map whose name ends in {', '.join(targets)}: name "
                "some with targets=(...)"
            )
        return found


@register("ia3", IA3Config)
class IA3(Adapter):
    """IA3, through PEFT: trains scales of keys, values and the MLP."""

    def build(self, peft: Any, trunk: nn.Module, model_type: str) -> Any:
        """PEFT's IA3 tuner.

        Raises:
            ValueError: if the backbone is quantised.
        """
        refuse_codes(trunk, "PEFT cannot take IA3 off them again (it can with LoRA)")
        tables: tuple[Mapping[str, Any], ...] = (
            peft.utils.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
            peft.utils.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
        )
        if self.config.targets is not None:
            targets, feedforward = self.config.targets, self.config.feedforward
        elif all(model_type in table for table in tables):
            targets, feedforward = (table[model_type] for table in tables)
        else:
            feedforward = present(trunk, MLP_OUT)
            targets = (*present(trunk, KEY_VALUE), *feedforward)
        config = peft.IA3Config(target_modules=list(targets), feedforward_modules=list(feedforward))
        return peft.IA3Model(trunk, config, ADAPTER)


def _ends(targets: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{target}" for target in targets)


def present(trunk: nn.Module, ends: tuple[str, ...]) -> tuple[str, ...]:
    """Those ends that linear maps' names have.

    Raises:
        ValueError: if no linear map's name has one of these ends.
    """
    linear = [f".{name}" for name, module in trunk.named_modules() if is_linear(module)]
    found = tuple(end for end in ends if any(name.endswith(f".{end}") for name in linear))
    if not found:
        raise ValueError(f"it has no linear map whose name ends in {', '.join(ends)}: name some with targets=(...)")
    return found
