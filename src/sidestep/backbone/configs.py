"""Configs of backbones, by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import transformers
from transformers import (
    AutoConfig,
)

from sidestep.backbone.gguf import (
    check_gguf,
    gguf_file,
    gguf_parts,
    is_gguf,
)
from sidestep.backbone.source import CONFIG, VIT, LoadError, as_load_error, check_folder, gguf_as_load_error, quiet
from sidestep.backbone.vit_npz import NORM_EPS, NpzError, ViTArchive, read_sizes, read_vit


def config_of(name: str, revision: str | None = None, fields: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The config of a backbone that `load_backbone` takes (but timm's), with some fields set.

    Raises:
        LoadError: if there is no such backbone, or the folder has no weights.
    """
    if name.startswith(VIT):
        if revision is not None:
            raise LoadError(f"revision={revision!r}: {name} is a file, which has no revisions")
        return npz_config(name, fields)
    folder = Path(name)
    if folder.is_file() and not is_gguf(name):
        raise LoadError(f"{name} is a file: give the folder that holds {CONFIG} and the weights")
    if folder.is_dir():
        check_folder(folder)
    with quiet(local=folder.exists()), as_load_error(name, CONFIG):
        return read_config(name, revision, **fields)


def read_config(name: str, revision: str | None, **fields: Any) -> Any:
    """What transformers reads as the config of a name, with some fields set."""
    place, options = asked(name, revision)
    file = options.get("gguf_file")
    if file is None or not Path(file).is_file():
        return AutoConfig.from_pretrained(place, **options, **fields)
    config = copy.deepcopy(_gguf_config(file, Path(file).stat().st_mtime_ns))
    fields.pop("local_files_only", None)
    config.update(fields)
    return config


@lru_cache(maxsize=2)
def _gguf_config(file: str, _changed: int) -> Any:
    """The config of a local GGUF file. Kept, because with its vocabulary it takes seconds to read."""
    return AutoConfig.from_pretrained(str(Path(file).parent), gguf_file=file)


def asked(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """What transformers' `from_pretrained` is called with for a name: a folder or hub id, and options.

    Raises:
        LoadError: if the name is that of a GGUF file which cannot be read.
    """
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    if not is_gguf(name):
        return name, options
    with gguf_as_load_error():
        check_gguf(name)
        return gguf_parts(name)[0], {**options, "gguf_file": gguf_file(name)}


def npz_config(name: str, fields: Mapping[str, Any]) -> transformers.ViTConfig:
    """The config that the arrays of "vit:FILE" tell, with some fields set.

    Raises:
        LoadError: if the file holds no Vision Transformer.
    """
    file = name.removeprefix(VIT)
    with npz_as_load_error():
        sizes = read_sizes(file)
    own = {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.mlp_width,
        "image_size": sizes.image,
        "patch_size": sizes.patch,
        "num_channels": sizes.channels,
        "layer_norm_eps": NORM_EPS,
    }
    return transformers.ViTConfig(**{**own, **fields})


def read_npz(file: str) -> ViTArchive:
    """The weights in a file of the original ViT.

    Raises:
        LoadError: if it cannot be read as such.
    """
    with npz_as_load_error():
        return read_vit(file)


@contextmanager
def npz_as_load_error() -> Iterator[None]:
    """Raise what is wrong with such a file as a `LoadError`."""
    try:
        yield
    except NpzError as error:
        raise LoadError(str(error)) from error
