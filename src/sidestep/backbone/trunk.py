"""The part of a model that Sidestep tunes, without its task head, and the length of what it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from sidestep.backbone.calls import argument_names

LANGUAGE_WITH_OTHERS = frozenset((*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES))
"""Types of models whose language model reads pictures or sounds among its tokens."""

IS_TRUNK = "_sidestep_is_trunk"
"""Attribute of a model: whether it is its own trunk, although transformers names a part of it. Looked at once, because
a compiled forward pass asks for the trunk too."""

SOUND_INPUTS = ("input_values", "input_features")
"""What transformers calls the first input of models of sounds: samples, or frames of a spectrogram."""


def trunk_of(model: Any) -> Any:
    """The backbone without its task head: a Hugging Face model's base model, or a timm model itself.

    What transformers calls the base model may be a part that does not take the model's inputs (DINOv3's encoder). Then
    the model has no head, and is the trunk itself.
    """
    if not isinstance(model, PreTrainedModel):
        return model
    known = vars(model).get(IS_TRUNK)
    if known is None:
        base, given = model.base_model, model.main_input_name
        known = given in argument_names(model) and given not in argument_names(base)
        vars(model)[IS_TRUNK] = known
    return model if known else model.base_model


def tower_of(trunk: Any) -> tuple[str, Any]:
    """The module whose blocks are the stack, and its name. It is the trunk, or of a vision-language model a part."""
    if reads_mixed(trunk):
        decoder = trunk.get_decoder()
        return next((named for named in trunk.named_modules() if named[1] is decoder), ("", trunk))
    return "", trunk


def other_towers(trunk: Any, root: nn.Module) -> list[str]:
    """The names of a stack's parts that read pictures or sounds, where there are others that read texts."""
    if getattr(trunk, "config", None) is None or not reads_texts(trunk):
        return []
    parts = ((name, part) for name, part in root.named_modules() if name and isinstance(part, PreTrainedModel))
    return [name for name, part in parts if part.main_input_name != "input_ids"]


def reads_texts(trunk: Any) -> bool:
    """Whether a model reads texts, alone or with pictures or sounds among them."""
    return trunk.main_input_name == "input_ids" or reads_mixed(trunk)


def reads_mixed(trunk: Any) -> bool:
    """Whether a model is a language model that reads pictures or sounds among its tokens."""
    return getattr(getattr(trunk, "config", None), "model_type", None) in LANGUAGE_WITH_OTHERS


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter is, or, if accelerate has offloaded the module, where it is computed."""
    first = next(module.parameters()).device
    hooks = (vars(part).get("_hf_hook") for part in module.modules()) if first.type == "meta" else ()
    return next(
        (torch.device(d) for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None), first
    )


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has both stacks (an encoder taken out of one does not)."""
    trunk = trunk_of(model)
    return hasattr(trunk, "encoder") and hasattr(trunk, "decoder") and trunk.config.is_encoder_decoder


POSITION_TABLES = ("position_embeddings", "position_embedding", "positions_embed", "embed_positions", "wpe")
"""What transformers' models call the table in which each position has a row."""


def positions(model: nn.Module) -> tuple[int | None, int | None]:
    """How many tokens a model of texts has positions for: of those that it reads, and of those that it writes.

    None where the model has no such table: rotary and relative positions go on beyond the length of pretraining. A
    model of one stack has one table for both.
    """
    trunk = trunk_of(model)
    if is_encoder_decoder(model):
        return _positions(trunk.encoder), _positions(trunk.decoder)
    both = _positions(tower_of(trunk)[1])
    return both, both


def _positions(stack: nn.Module) -> int | None:
    tables = (module for name, module in stack.named_modules() if name.rpartition(".")[2] in POSITION_TABLES)
    return min((_token_rows(table) for table in tables if isinstance(table, nn.Embedding)), default=None)


def _token_rows(table: nn.Embedding) -> int:
    """The rows of tokens alone. RoBERTa's rows come after that of padding, and BART's after two that nothing uses."""
    first = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - first


def token_rows(model: nn.Module) -> tuple[int | None, int | None]:
    """How many tokens a model of texts has embeddings for: of those that it reads, and of those that it writes.

    None where the model has no such table. A tokenizer's size does not tell, because tables are often padded, and
    tokens added.
    """
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids":
        return None, None
    reads = _table_rows(model.get_input_embeddings())
    if not is_encoder_decoder(model):
        return reads, reads
    tables = (getattr(trunk_of(model).decoder, "embed_tokens", None), model.get_output_embeddings())
    return reads, min((rows for table in tables if (rows := _table_rows(table)) is not None), default=None)


def picture_token(model: nn.Module) -> int | None:
    """The token in whose place a vision-language model reads a part of a picture. None: the model has no such token."""
    return getattr(getattr(model, "config", None), "image_token_id", None)


def _table_rows(table: nn.Module | None) -> int | None:
    if isinstance(table, nn.Linear):  # a quantised one's weight is packed
        return table.out_features
    return table.weight.shape[0] if isinstance(table, nn.Embedding) else None


def embedding_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tables of embeddings, by their names."""
    tables = ((name, part) for name, part in model.named_modules() if isinstance(part, nn.Embedding))
    return {f"{name}.weight": tuple(part.weight.shape) for name, part in tables}
