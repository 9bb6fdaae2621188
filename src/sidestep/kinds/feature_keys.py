"""What the stored states of a row depend on besides the row: the key of an entry in a store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from sidestep.data.encode_sounds import inputs_of, noise
from sidestep.fold import Route
from sidestep.kinds.task_data import TaskData
from sidestep.model.features import VECTOR, FeaturesRefused
from sidestep.model.side_model import SideModel
from sidestep.versions import version_of

OF_TASKS = (
    *("id2label", "label2id", "problem_type", "pad_token_id"),
    *("_name_or_path", "architectures", "dtype", "use_cache"),
)
"""Fields of a config that do not change what frozen blocks compute of a row."""


def key_of(model: SideModel, data: TaskData, route: Route, *, rounded: bool, autocast: bool) -> dict[str, Any]:
    """All that the states of a row depend on besides the row and the place."""
    single = model.fold.narrow if route.single else None
    backbone = model.backbone
    return {
        "backbone": model.digest.exact,
        "structure": _structure(model),
        "precision": f"{model.precisions}{' under autocast' if autocast else ''}",
        "stored": "bfloat16" if rounded else "as given",
        "tokens": _vector_of(model) if route.places == (VECTOR,) else single or "all",
        "attention": getattr(getattr(backbone, "config", None), "_attn_implementation", None),
        "pixels": None if data.fields.image is None else _hash_of(data, _pixels),
        # what is new stands there only where it is read, so that what was stored before is found again
        **({} if data.fields.audio is None else {"sounds": _hash_of(data, _heard)}),
        "device": model.device.type,
        "versions": {name: version_of(name) for name in ("torch", "transformers", "timm")},
        "model": type(model.trunk).__name__,
    }


def _vector_of(model: SideModel) -> str:
    """What makes a vector: the head's way of reading, or the method's own read-out."""
    return f"vector, {model.pool if model.side.pooled_width is None else model.side.pooled_from}"


def _structure(model: SideModel) -> str:
    """A hash of what the weights do not tell of the trunk: its class, and its config or timm's of it."""
    backbone = model.backbone
    if isinstance(backbone, PreTrainedModel):
        config = {name: value for name, value in backbone.config.to_dict().items() if name not in OF_TASKS}
    else:
        config = dict(getattr(backbone, "pretrained_cfg", {}))
    told = f"{type(model.trunk).__name__} {json.dumps(config, sort_keys=True, default=str)}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _hash_of(data: TaskData, makes: Callable[[Any], Iterator[Tensor]]) -> str:
    """A hash of what the processor makes of two files, which are always the same.

    Raises:
        FeaturesRefused: if it makes something else of them each time.
    """
    first, again = (_hash(makes(data.processor)) for _ in range(2))
    if first != again:
        raise FeaturesRefused("its processor makes other inputs of a file each time")
    return first


def _pixels(processor: Any) -> Iterator[Tensor]:
    for size in ((61, 37), (48, 90)):
        picture = Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 40).convert("RGB")
        yield torch.as_tensor(np.asarray(processor(images=[picture], return_tensors="pt")["pixel_values"][0]))


def _heard(extractor: Any) -> Iterator[Tensor]:
    for samples in (extractor.sampling_rate // 2, extractor.sampling_rate):
        yield from (torch.as_tensor(value) for value in inputs_of(extractor, noise(samples)).values())


def _hash(tensors: Iterator[Tensor]) -> str:
    running = hashlib.sha256()
    for tensor in tensors:
        running.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        running.update(tensor.contiguous().numpy().tobytes())
    return running.hexdigest()[:16]
