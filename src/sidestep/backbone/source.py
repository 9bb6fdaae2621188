"""Where a backbone is to be had: hub id, folder, file, or the name of a model of timm."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import (
    PreTrainedModel,
)
from transformers.utils import logging

from sidestep.backbone.gguf import (
    GgufError,
    gguf_files,
    gguf_name,
    gguf_parts,
    is_gguf,
)
from sidestep.backbone.quantised import stored_quantization
from sidestep.messages import some

Library = Literal["transformers", "timm"]
Reads = Literal["text", "image", "audio", "both"]
"""What a backbone reads, as the field of a task's rows is called. "both" is a picture with a text."""
TIMM = "timm:"
VIT = "vit:"
NPZ = ".npz"
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TIMM_PROCESSOR = "timm_processor.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Of image processors and of feature extractors of sounds."""
EXTRACTOR, IMAGE_PROCESSOR = "feature_extractor_type", "image_processor_type"
"""What such a file says of a feature extractor, and of an image processor. One of long ago says both."""


class LoadError(ValueError):
    """A backbone or processor cannot be loaded, and the message says what was looked for and what to do."""


class OtherModel(LoadError):
    """What a name loads is of another kind than the class that is asked for.

    The message begins with the name.
    """


class LoadWarning(UserWarning):
    """A backbone was loaded, but not all of it came from its checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a backbone came from.

    Attributes:
        id: the name that loads it, as it was given (hub id, folder, "timm:NAME[@FILE]", "vit:FILE",
            "gguf:FOLDER@FILE"), or "" when unknown.
        revision: commit of a hub id, or None.
        class_name: of the model.
        library: "transformers" or "timm".
        dtype: of its weights ("float32", ..., or several joined by "+").
        quantization: transformers' config of it, as plain data. None: weights are not quantised, or it is not known.
    """

    id: str
    revision: str | None
    class_name: str
    library: Library
    dtype: str
    quantization: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values. A quantization is told only where there is one."""
        return {name: value for name, value in asdict(self).items() if name != "quantization" or value is not None}


def source_of(backbone: nn.Module) -> Source:
    """Where a backbone came from, as far as it says so itself."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in backbone.parameters() if p.is_floating_point()}
    name, dtype = type(backbone).__name__, "+".join(sorted(dtypes))
    if isinstance(backbone, PreTrainedModel):
        config = backbone.config
        return Source(
            id=str(getattr(config, "_name_or_path", None) or ""),
            revision=getattr(config, "_commit_hash", None),
            class_name=name,
            library="transformers",
            dtype=dtype,
            quantization=stored_quantization(config),
        )
    known = _timm_id(getattr(backbone, "pretrained_cfg", None) or {})
    return Source(id=known, revision=None, class_name=name, library="timm", dtype=dtype)


@contextmanager
def gguf_as_load_error() -> Iterator[None]:
    """Raise what is wrong with a GGUF file as a `LoadError`."""
    try:
        yield
    except GgufError as error:
        raise LoadError(str(error)) from error


def warn_of_no_drop_path(name: str, kind: str, rate: float) -> None:
    """Warn that a rate of drop path was asked for and the model has none."""
    warnings.warn(
        f"drop_path={rate} is left out: {name} is loaded as {kind}, which has no drop path. Timm's layout of a ViT has "
        "it (timm:NAME, or timm:NAME@FILE for weights from a file)",
        LoadWarning,
        stacklevel=4,
    )


def check_folder(folder: Path) -> None:
    """Raise `LoadError` unless a folder holds a config and weights that are no pickle."""
    _refuse_packed(folder)
    if not (folder / CONFIG).is_file():
        raise LoadError(f"{folder} has no {CONFIG}: give a folder that a model was saved in ({_holds(folder)})")
    if not any((folder / name).is_file() for name in WEIGHTS):
        pickled = (folder / "pytorch_model.bin").is_file() or (folder / "pytorch_model.bin.index.json").is_file()
        hint = (
            "pytorch_model.bin is a pickle, which is not read: load it with transformers and save it again"
            if pickled
            else _holds(folder)
        )
        raise LoadError(f"{folder} has no weights: looked for {' and '.join(WEIGHTS)} ({hint})")


def _refuse_packed(folder: Path) -> None:
    """Say how the GGUF file of a folder is named, where the folder has no other weights."""
    if not any((folder / name).is_file() for name in WEIGHTS) and (packed := gguf_files(folder)):
        raise LoadError(
            f"{folder} holds its weights in {some(packed)}: say --backbone {folder} --gguf {packed[0]}, or in Python "
            f"and in files of a comparison {gguf_name(folder, packed[0])!r}"
        )


@contextmanager
def quiet(*, local: bool) -> Iterator[None]:
    """Keep transformers' load report to itself.

    The progress bars of a download stay, and those of a local file do not.
    """
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if local:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def as_load_error(name: str, what: str) -> Iterator[None]:
    """Say which name and which part of it could not be loaded, and whether a folder or the hub was asked."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:  # what a damaged file makes transformers and safetensors raise is theirs
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        place = gguf_parts(name)[0] if is_gguf(name) else name
        if is_gguf(name) and Path(place).is_dir():
            raise LoadError(
                f"transformers {transformers.__version__} cannot read the {what} of {name} ({reason}): copy the file "
                "again if it may be damaged, or take the model's safetensors"
            ) from error
        if Path(name).exists():
            advice = "check or copy it again"
            raise LoadError(f"the {what} of {name} cannot be read ({reason}): {advice}") from error
        hub = f"as a hub id its {what} cannot be had (unreachable, private, or no such model: {reason})"
        no_hub = f"it is no hub id (a relative path starts at {Path.cwd()})"
        raise LoadError(
            f"{name!r} cannot be loaded: there is no such folder here, and {hub if HUB_ID.fullmatch(place) else no_hub}"
        ) from error


def _timm_id(config: Mapping[str, Any]) -> str:
    """The name that loads a timm model of this pretrained_cfg."""
    if not config.get("architecture"):
        return ""
    tag, file = config.get("tag"), config.get("file")
    return TIMM + config["architecture"] + (f".{tag}" if tag else "") + (f"@{file}" if file else "")


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its name ("float32", "bfloat16", ...).

    Raises `LoadError` if there is no such dtype.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = getattr(torch, dtype, None)
    if not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise LoadError(f"dtype={dtype!r}: choose float32, bfloat16, float16 or float64")
    return known


def read_by_files(folder: Path) -> Reads | None:
    """What a processor that was saved in a folder reads. None if the folder holds none.

    Raises:
        LoadError: if its file cannot be read.
    """
    if any((folder / file).is_file() for file in TOKENIZER_FILES):
        return "text"
    found = next((folder / file for file in PROCESSOR_FILES if (folder / file).is_file()), None)
    if found is None:
        return None
    with as_load_error(str(found), "processor"):
        said = json.loads(found.read_text(encoding="utf-8"))
        return "audio" if EXTRACTOR in said and IMAGE_PROCESSOR not in said else "image"


def require_any(folder: Path, names: Sequence[str], what: str) -> None:
    """Raise `LoadError` unless a folder holds a file of one of these names."""
    if not any((folder / name).is_file() for name in names):
        _refuse_packed(folder)
        raise LoadError(f"{folder} has no {what}: looked for {', '.join(names)} ({_holds(folder)})")


def _holds(folder: Path) -> str:
    return f"it holds {some(sorted(path.name for path in folder.iterdir()))}"
