"""Formats in which weights are quantised while a backbone is loaded, by name, and what transformers is told of them."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationConfigMixin

from sidestep.backbone.gguf import is_gguf
from sidestep.backbone.quantised import format_text
from sidestep.backbone.source import TIMM, VIT, LoadError

Format = Literal["4bit", "8bit", "int8", "int4"]
"""bitsandbytes' NF4 and LLM.int8, and torchao's whole numbers of 8 and 4 bits. Only weights are quantised."""
Quantize: TypeAlias = Format | QuantizationConfigMixin | Mapping[str, Any]
"""A format by its name, or a quantization config of transformers, or such a config as plain data."""
INT4_GROUP = 128
"""Weights that share a scale and a zero point in torchao's 4 bits."""
CLASS = re.compile(r"torch\.dtype|[A-Z]\w*")
"""What a config may name. torchao builds what is named."""


def _nf4(dtype: torch.dtype) -> QuantizationConfigMixin:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _llm_int8(dtype: torch.dtype) -> QuantizationConfigMixin:
    return BitsAndBytesConfig(load_in_8bit=True)


def _int8(dtype: torch.dtype) -> QuantizationConfigMixin:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _int4(dtype: torch.dtype) -> QuantizationConfigMixin:
    from torchao.quantization import Int4WeightOnlyConfig

    if not torch.cuda.is_available():
        raise LoadError(
            "quantize='int4': torchao has kernels for weights of 4 bits on GPUs, and none on a CPU. Choose 4bit "
            "(bitsandbytes), which runs on both, or int8"
        )
    if dtype is not torch.bfloat16:
        raise LoadError(f"quantize='int4' with {_name(dtype)}: torchao's kernel needs dtype=bfloat16, or choose 4bit")
    return TorchAoConfig(Int4WeightOnlyConfig(group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d"))


FORMATS: dict[Format, tuple[str, Callable[[torch.dtype], QuantizationConfigMixin]]] = {
    "4bit": ("bitsandbytes", _nf4),
    "8bit": ("bitsandbytes", _llm_int8),
    "int8": ("torchao", _int8),
    "int4": ("torchao", _int4),
}
"""The package of each format, and what makes its config for a backbone of a precision."""
SKIPPED = {BitsAndBytesConfig: "llm_int8_skip_modules", TorchAoConfig: "modules_to_not_convert"}
"""The field with the names of what is left as it is."""


def quantization_for(quantize: Quantize, dtype: torch.dtype, plain: Callable[[], list[str]]) -> QuantizationConfigMixin:
    """The quantization config that a backbone is loaded with.

    Args:
        quantize: what was asked for (see `check_quantizable`).
        dtype: of its other weights, in which 4-bit weights are multiplied.
        plain: names of the modules that are not quantised (`left_plain`), where a config does not name them.

    Raises:
        LoadError: if its package is missing, or it does not run on this machine or in this precision.
    """
    found = _config(quantize, dtype)
    field = SKIPPED.get(type(found))
    if field is not None and getattr(found, field) is None:
        found = copy.deepcopy(found)
        setattr(found, field, plain())
    if getattr(found, "load_in_8bit", False):
        # said at every call of every linear map
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return found


def left_plain(model: PreTrainedModel, *, own_head: bool) -> list[str]:
    """The names of what is not quantised of a model: what transformers leaves as it is, and poolers.

    A checkpoint may lack a pooler, and random weights are never quantised. With `own_head` the head is left too,
    because it is trained.
    """
    heads = (name for name, _ in model.named_children() if own_head and name != model.base_model_prefix)
    poolers = (name for name, _ in model.named_modules() if name.endswith("pooler"))
    return sorted({*get_keys_to_not_convert(model), *heads, *poolers})


def without_weights(kind: Any, config: Any) -> PreTrainedModel:
    """A model of a class, or of an auto class, on the meta device."""
    with torch.device("meta"):
        return (
            kind(config) if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else kind.from_config(config)
        )


def _config(quantize: Quantize, dtype: torch.dtype) -> QuantizationConfigMixin:
    if isinstance(quantize, str):
        package, made = FORMATS[cast("Format", quantize)]
        try:
            import_module(package)
        except ImportError as error:
            extra = {"bitsandbytes": "quantize"}.get(package, package)
            raise LoadError(
                f"quantize={quantize!r} needs {package}, which cannot be imported ({error}): "
                f'pip install "sidestep[{extra}]"'
            ) from error
        return made(dtype)
    if isinstance(quantize, QuantizationConfigMixin):
        return quantize
    if bad := [text for text in _named(quantize) if not CLASS.fullmatch(text)]:
        raise LoadError(f"the quantization config names {bad[0]!r}, but it may name classes only")
    try:
        return AutoQuantizationConfig.from_dict(dict(quantize))
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise LoadError(f"transformers cannot read the quantization config {_shown(quantize)}: {error}") from error


def check_format(quantize: str | None) -> None:
    """Raise `LoadError` unless `quantize` is None or the name of a format."""
    if quantize is not None and quantize not in get_args(Format):
        raise LoadError(f"quantize={quantize!r}: choose one of {', '.join(get_args(Format))}, or leave it out")


def check_quantizable(quantize: Quantize, name: str) -> None:
    """Raise `LoadError` unless there is such a format, and a backbone of this name can be loaded in it."""
    if isinstance(quantize, str):
        check_format(quantize)
    if name.startswith((TIMM, VIT)):
        raise LoadError(
            f"quantize={_shown(quantize)} with {name}: weights are quantised by transformers as it loads them. Give a "
            "folder or hub id of transformers, which has these models too"
        )
    if is_gguf(name):
        raise LoadError(
            f"quantize={_shown(quantize)} with {name}: a GGUF file is unpacked as it is loaded. Save the model "
            "(load_backbone(...).save_pretrained(FOLDER)), and give that folder"
        )


def _named(value: Any) -> Iterator[str]:
    """What a config names as types, at any depth."""
    if isinstance(value, Mapping):
        if "_type" in value:
            yield str(value["_type"])
        for inner in value.values():
            yield from _named(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner)


def _shown(quantize: Quantize) -> str:
    if isinstance(quantize, str):
        return repr(quantize)
    return type(quantize).__name__ if isinstance(quantize, QuantizationConfigMixin) else format_text(quantize)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
