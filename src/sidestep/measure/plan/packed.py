"""Quantised linear maps of a plan: tensors of the sizes that a format has, and what a map allocates while it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from sidestep.backbone.formats import INT4_GROUP, Format, left_plain
from sidestep.backbone.quantised import format_text, is_packed, is_quantised, stored_quantization, stored_tensors
from sidestep.backbone.source import LoadError

BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4 bits, unless its config says otherwise."""
TILE = 8, 1024
"""Rows and columns to multiples of which torchao fills up weights of 4 bits."""


def _nf4(rows: int, columns: int) -> tuple[Tensor, ...]:
    values = rows * columns
    return torch.empty(-(-values // 2), 1, dtype=torch.uint8), torch.empty(-(-values // BLOCK)), torch.empty(16)


def _llm_int8(rows: int, columns: int) -> tuple[Tensor, ...]:
    return torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows)


def _int8(rows: int, columns: int) -> tuple[Tensor, ...]:
    return *_llm_int8(rows, columns), torch.empty(rows, dtype=torch.int8)


def _int4(rows: int, columns: int) -> tuple[Tensor, ...]:
    rows, columns = (-(-size // tile) * tile for size, tile in zip((rows, columns), TILE, strict=True))
    return (
        torch.empty(rows * columns // 2, dtype=torch.uint8),
        torch.empty(columns // INT4_GROUP, rows, 2, dtype=torch.bfloat16),
    )


SIZES: Mapping[Format, Callable[[int, int], tuple[Tensor, ...]]] = {
    "4bit": _nf4,
    "8bit": _llm_int8,
    "int8": _int8,
    "int4": _int4,
}
"""Empty tensors of a format: the codes of a map of so many rows and columns, and all that stands beside them."""
SAID: Mapping[str, Format] = {
    "4 bit": "4bit",
    "8 bit": "8bit",
    "Int8WeightOnly": "int8",
    "Int4WeightOnly": "int4",
}
"""How the words for a quantization config begin, by format."""


class PackedLinear(nn.Linear):
    """A quantised linear map without values.

    Its weights are written out in the input's precision while the map runs, as bitsandbytes does on a CPU and in
    backward everywhere. So for kernels that read codes a plan is an upper bound.

    Args:
        sizes: rows and columns of the map.
        codes, beside: what is stored.
        bias: None if it has none.
        kept: whether the weights that were written out are kept where a gradient flows, as torchao's are. If not, they
            are written out again in backward.
    """

    def __init__(
        self, sizes: tuple[int, int], codes: Tensor, beside: Iterable[Tensor], bias: nn.Parameter | None, *, kept: bool
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = sizes
        self.weight = nn.Parameter(codes, requires_grad=False)
        for number, tensor in enumerate(beside):
            self.register_buffer(f"beside{number}", tensor)
        self.register_parameter("bias", bias)
        self.kept = kept

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., rows) of (..., columns)."""
        shape = self.out_features, self.in_features
        if self.kept:
            return nn.functional.linear(hidden, hidden.new_empty(shape), self.bias)
        output = _WrittenOut.apply(hidden, shape)
        return output if self.bias is None else output + self.bias


class _WrittenOut(torch.autograd.Function):
    """A product with weights that are there while it is computed."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return nn.functional.linear(hidden, hidden.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ gradient.new_empty(ctx.shape), None


def pack(model: PreTrainedModel, quantize: Format | None, *, own_head: bool) -> PreTrainedModel:
    """Put packed maps in the place of those linear maps that transformers quantises. The model has no values.

    Args:
        model: what is changed.
        quantize: the format. None: that of the model's config, if it has one.
        own_head: whether the head is trained, and so not quantised.

    Raises:
        LoadError: if the config's format is not known.
    """
    said = stored_quantization(model.config)
    if quantize is None and said is None:
        return model
    quantize = quantize or _said(said or {})
    plain = (said or {}).get("llm_int8_skip_modules") or left_plain(model, own_head=own_head)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and should_convert_module(name, plain):
            model.set_submodule(name, _packed(module, quantize))
    return model


def _said(quantization: Mapping[str, Any]) -> Format:
    """The format that a config says.

    Raises:
        LoadError: if a plan does not know it.
    """
    text = format_text(quantization)
    for words, found in SAID.items():
        if text.startswith(words):
            return found
    raise LoadError(
        f"weights {text}: a plan from a config knows {', '.join(SIZES)}. Load and attach the model, and call plan_for"
    )


def _packed(module: Any, quantize: Format) -> PackedLinear:
    rows, columns = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
    codes, *beside = SIZES[quantize](rows, columns)
    return PackedLinear((rows, columns), codes, beside, module.bias, kept=quantize == "int8")


def stand_ins(model: nn.Module, memo: dict[int, Any]) -> None:
    """Add a packed map for each quantised one to the memo of a deepcopy of a model. Errors as of the tensors' copies.

    To be called under a `FakeTensorMode`.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if isinstance(module, PackedLinear) or not (is_quantised(module) and hasattr(module, "in_features")):
            continue
        stored = (one for one in stored_tensors(module) if one is not module.bias)
        codes, *beside = (torch.empty(one.shape, dtype=one.dtype, device="cpu") for one in stored)
        sizes, kept = (module.out_features, module.in_features), is_packed(module.weight)
        bias = None if module.bias is None else copy.deepcopy(module.bias, memo)
        memo[id(module)] = PackedLinear(sizes, codes, beside, bias, kept=kept)
