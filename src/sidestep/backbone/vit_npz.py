"""Weights of the original Vision Transformers as their authors published them: NumPy archives (.npz).

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; the checkpoints of
google-research/vision_transformer, such as ViT-B_16.npz (ImageNet-21k), which DTL and SynQT start from.
Arrays are read by name and nothing is unpickled.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from sidestep.messages import some

NORM_EPS = 1e-6
"""Of every LayerNorm in the original code; the files do not say it."""


def _whole(array: Tensor) -> Tensor:
    return array


def _dense(array: Tensor) -> Tensor:
    """(in, out) to (out, in)."""
    return array.T


def _convolution(array: Tensor) -> Tensor:
    """(rows, columns, in, out) to (out, in, rows, columns)."""
    return array.permute(3, 2, 0, 1)


def _into_heads(array: Tensor) -> Tensor:
    """(in, heads, head width) to (out, in)."""
    return array.flatten(1).T


def _out_of_heads(array: Tensor) -> Tensor:
    """(heads, head width, out) to (out, in)."""
    return array.flatten(0, 1).T


def _flat(array: Tensor) -> Tensor:
    """(heads, head width) to (out,)."""
    return array.flatten()


Part = tuple[str, str, Callable[[Tensor], Tensor]]
"""A tensor's name in transformers' ViT, in timm's, and how the array becomes that tensor."""

STEM: dict[str, Part] = {
    "cls": ("embeddings.cls_token", "cls_token", _whole),
    "embedding/kernel": ("embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight", _convolution),
    "embedding/bias": ("embeddings.patch_embeddings.projection.bias", "patch_embed.proj.bias", _whole),
    "Transformer/posembed_input/pos_embedding": ("embeddings.position_embeddings", "pos_embed", _whole),
    "Transformer/encoder_norm/scale": ("layernorm.weight", "norm.weight", _whole),
    "Transformer/encoder_norm/bias": ("layernorm.bias", "norm.bias", _whole),
}
# timm has query, key and value in one tensor, in this order
BLOCK: dict[str, Part] = {
    "LayerNorm_0/scale": ("layernorm_before.weight", "norm1.weight", _whole),
    "LayerNorm_0/bias": ("layernorm_before.bias", "norm1.bias", _whole),
    "MultiHeadDotProductAttention_1/query/kernel": ("attention.q_proj.weight", "attn.qkv.weight", _into_heads),
    "MultiHeadDotProductAttention_1/query/bias": ("attention.q_proj.bias", "attn.qkv.bias", _flat),
    "MultiHeadDotProductAttention_1/key/kernel": ("attention.k_proj.weight", "attn.qkv.weight", _into_heads),
    "MultiHeadDotProductAttention_1/key/bias": ("attention.k_proj.bias", "attn.qkv.bias", _flat),
    "MultiHeadDotProductAttention_1/value/kernel": ("attention.v_proj.weight", "attn.qkv.weight", _into_heads),
    "MultiHeadDotProductAttention_1/value/bias": ("attention.v_proj.bias", "attn.qkv.bias", _flat),
    "MultiHeadDotProductAttention_1/out/kernel": ("attention.o_proj.weight", "attn.proj.weight", _out_of_heads),
    "MultiHeadDotProductAttention_1/out/bias": ("attention.o_proj.bias", "attn.proj.bias", _whole),
    "LayerNorm_2/scale": ("layernorm_after.weight", "norm2.weight", _whole),
    "LayerNorm_2/bias": ("layernorm_after.bias", "norm2.bias", _whole),
    "MlpBlock_3/Dense_0/kernel": ("mlp.fc1.weight", "mlp.fc1.weight", _dense),
    "MlpBlock_3/Dense_0/bias": ("mlp.fc1.bias", "mlp.fc1.bias", _whole),
    "MlpBlock_3/Dense_1/kernel": ("mlp.fc2.weight", "mlp.fc2.weight", _dense),
    "MlpBlock_3/Dense_1/bias": ("mlp.fc2.bias", "mlp.fc2.bias", _whole),
}
HEAD: dict[str, Part] = {
    "head/kernel": ("classifier.weight", "head.weight", _dense),
    "head/bias": ("classifier.bias", "head.bias", _whole),
}
# a dense layer with tanh between the class token and the head: transformers' pooler, and nothing of today's timm
PRE_LOGITS: dict[str, Part] = {
    "pre_logits/kernel": ("pooler.dense.weight", "", _dense),
    "pre_logits/bias": ("pooler.dense.bias", "", _whole),
}


class NpzError(ValueError):
    """A file does not hold the weights of a Vision Transformer, and the message says what it holds instead."""


@dataclass(frozen=True, kw_only=True)
class ViTSizes:
    """What the shapes of a checkpoint's arrays tell.

    Attributes:
        width: channels of a token.
        depth: blocks.
        heads: of each attention.
        mlp_width: channels within the MLP.
        patch: rows (and columns) of a patch.
        image: rows (and columns) of an image.
        channels: of an image.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int
    image: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class ViTArchive:
    """A checkpoint's arrays by their official names, and its sizes.

    A head that reads a pre-logits layer (ImageNet-21k) is left out: no model of today has that layer before its head.
    """

    sizes: ViTSizes
    arrays: Mapping[str, Tensor]

    def for_transformers(self) -> dict[str, Tensor]:
        """The tensors of a `ViTModel` by name, and those of its pooler or of a classifier, if the file has them."""
        return {name: change(self.arrays[official]).contiguous() for official, (name, _, change) in self._parts()}

    def for_timm(self) -> dict[str, Tensor]:
        """The tensors of timm's `VisionTransformer` by name, and those of a classifier that reads the final norm."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for official, (_, name, change) in self._parts():
            if name:
                found[name].append(change(self.arrays[official]))
        return {name: torch.cat(tensors).contiguous() for name, tensors in found.items()}

    def _parts(self) -> list[tuple[str, Part]]:
        parts = {**_layout(self.sizes.depth), **HEAD, **PRE_LOGITS}
        return [(official, part) for official, part in parts.items() if official in self.arrays]


def read_sizes(path: str | Path) -> ViTSizes:
    """The sizes of the Vision Transformer in a .npz file, without reading its large arrays.

    Raises:
        NpzError: as `read_vit`.
    """
    with _opened(path) as archive:
        return _sizes(path, archive)


def read_vit(path: str | Path) -> ViTArchive:
    """The Vision Transformer in a .npz file.

    Raises:
        NpzError: if the file is missing, is no archive, is damaged or holds pickled objects. Also if its arrays are not
            those of a Vision Transformer. The message then names what is missing and what is not expected.
    """
    with _opened(path) as archive:
        sizes = _sizes(path, archive)
        named = set(archive.files)
        expected = set(_layout(sizes.depth))
        missing, unexpected = expected - named, named - expected - set(HEAD) - set(PRE_LOGITS)
        if missing or unexpected:
            raise _another(path, missing, unexpected)
        last = set(PRE_LOGITS) if set(PRE_LOGITS) <= named else set(HEAD)
        arrays = {name: torch.from_numpy(archive[name]) for name in expected | last & named}
    wrong = [
        f"{name} {tuple(arrays[name].shape)}" for name, shape in _shapes(sizes).items() if arrays[name].shape != shape
    ]
    if wrong:
        raise NpzError(f"{path}: arrays do not fit each other ({some(sorted(wrong))}), for a ViT of {sizes}")
    return ViTArchive(sizes=sizes, arrays=arrays)


def _layout(depth: int) -> dict[str, Part]:
    """Every array of a checkpoint without its head, by its official name."""
    parts = dict(STEM)
    for index in range(depth):
        for inner, (transformers, timm, change) in BLOCK.items():
            name = f"Transformer/encoderblock_{index}/{inner}"
            parts[name] = (f"layers.{index}.{transformers}", f"blocks.{index}.{timm}", change)
    return parts


def _shapes(sizes: ViTSizes) -> dict[str, tuple[int, ...]]:
    """The shape of every array of `_layout`."""
    width, heads, mlp = sizes.width, sizes.heads, sizes.mlp_width
    each = width // heads
    tokens = (sizes.image // sizes.patch) ** 2 + 1
    stem = {
        "cls": (1, 1, width),
        "embedding/kernel": (sizes.patch, sizes.patch, sizes.channels, width),
        "Transformer/posembed_input/pos_embedding": (1, tokens, width),
    }
    block = {
        "query/kernel": (width, heads, each),
        "key/kernel": (width, heads, each),
        "value/kernel": (width, heads, each),
        "query/bias": (heads, each),
        "key/bias": (heads, each),
        "value/bias": (heads, each),
        "out/kernel": (heads, each, width),
        "Dense_0/kernel": (width, mlp),
        "Dense_0/bias": (mlp,),
        "Dense_1/kernel": (mlp, width),
    }
    return {
        name: stem.get(name) or block.get("/".join(name.split("/")[-2:]), (width,)) for name in _layout(sizes.depth)
    }


@contextmanager
def _opened(path: str | Path) -> Iterator[NpzFile]:
    """The archive, with what goes wrong in reading it as a `NpzError`."""
    file = Path(path)
    if not file.is_file():
        raise NpzError(f"there is no file {path}")
    if not zipfile.is_zipfile(file):
        raise NpzError(f"{path} ({file.stat().st_size} bytes) is no .npz archive, or was cut short: copy it again")
    try:
        with np.load(file, allow_pickle=False) as archive:
            yield archive
    except NpzError:
        raise
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise NpzError(f"{path} cannot be read ({error}): copy it again") from error


def _sizes(path: str | Path, archive: NpzFile) -> ViTSizes:
    first = "Transformer/encoderblock_0/"
    needed = (
        "embedding/kernel",
        "Transformer/posembed_input/pos_embedding",
        f"{first}MultiHeadDotProductAttention_1/query/bias",
        f"{first}MlpBlock_3/Dense_0/bias",
    )
    if missing := set(needed) - set(archive.files):
        raise _another(path, missing, set(archive.files) - set(_layout(1)))
    kernel, positions, query, mlp = (archive[name].shape for name in needed)
    if (len(kernel), len(positions), len(query), len(mlp)) != (4, 3, 2, 1):
        raise NpzError(f"{path}: {', '.join(needed)} have shapes {kernel}, {positions}, {query}, {mlp}: no ViT's")
    side = math.isqrt(positions[1] - 1)
    if kernel[0] != kernel[1] or side**2 != positions[1] - 1:
        raise NpzError(
            f"{path}: patches of {kernel[0]} x {kernel[1]} and {positions[1]} positions: only square patches on a "
            "square grid, with one class token, are read"
        )
    depth = len({name.split("/")[1] for name in archive.files if name.startswith("Transformer/encoderblock_")})
    return ViTSizes(
        width=kernel[3],
        depth=depth,
        heads=query[0],
        mlp_width=mlp[0],
        patch=kernel[0],
        image=side * kernel[0],
        channels=kernel[2],
    )


def _another(path: str | Path, missing: set[str], unexpected: set[str]) -> NpzError:
    return NpzError(
        f"{path} is no Vision Transformer as google-research/vision_transformer stores it: it lacks "
        f"{some(sorted(missing))} and has, beyond what is read, {some(sorted(unexpected))}"
    )
