"""Backbones and their processors by name: a folder, a hub id, or a file.

Names of files are "timm:NAME@FILE", "vit:FILE.npz" and "gguf:FOLDER@FILE". Weights are read as safetensors, as NumPy
arrays (the original ViT's) or as GGUF. No code of a repository is run, so loading executes nothing.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar, Literal

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from sidestep.backbone import said_causal, trunk_of
from sidestep.backbone.families import DUAL_FAMILIES, dual_family_of
from sidestep.backbone.gguf import (
    GgufError,
    check_gguf,
    gguf_file,
    gguf_files,
    gguf_name,
    gguf_parts,
    is_gguf,
    unpacking,
)
from sidestep.backbone.pixels import IMAGE_TRANSFORM, ImageTransform, to_rgb
from sidestep.backbone.vit_npz import NORM_EPS, NpzError, ViTArchive, read_sizes, read_vit
from sidestep.messages import some
from sidestep.metrics import Written

Library = Literal["transformers", "timm"]

TIMM = "timm:"
VIT = "vit:"
NPZ = ".npz"
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TIMM_PROCESSOR = "timm_processor.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


class LoadError(ValueError):
    """A backbone or processor cannot be loaded; the message says what was looked for and what to do."""


class OtherModel(LoadError):
    """What a name loads is of another kind than the class that is asked for; the message begins with the name."""


class LoadWarning(UserWarning):
    """A backbone was loaded, but not all of it came from its checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a backbone came from.

    Attributes:
        id: the name that loads it, as it was given (hub id, folder, "timm:NAME[@FILE]", "vit:FILE",
            "gguf:FOLDER@FILE"); "" when unknown.
        revision: commit of a hub id, or None.
        class_name: of the model.
        library: "transformers" or "timm".
        dtype: of its weights ("float32", ...; several joined by "+").
    """

    id: str
    revision: str | None
    class_name: str
    library: Library
    dtype: str


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
        )
    known = _timm_id(getattr(backbone, "pretrained_cfg", None) or {})
    return Source(id=known, revision=None, class_name=name, library="timm", dtype=dtype)


def stored_vocabulary(source: Source) -> int | None:
    """How many tokens the config says that a backbone of this name has; None: it has no name, or none is at hand."""
    if source.library != "transformers" or not source.id:
        return None
    try:
        config = _read_config(source.id, source.revision, local_files_only=True)
    except (OSError, ValueError):  # neither here nor in the cache, or a config of the user's own class
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def load_backbone(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    head: bool = False,
    num_labels: int | None = None,
    writes: Written | None = None,
    drop_path: float | None = None,
) -> nn.Module:
    """The pretrained model of this name, in eval mode.

    Args:
        name: a folder or hub id for transformers, "timm:NAME" for timm's pretrained weights,
            "timm:NAME@FILE" for weights in a safetensors file or an original ViT's .npz file,
            "vit:FILE" for such a .npz file as transformers' ViT, or "gguf:FOLDER@FILE" for a GGUF file.
        dtype: precision of the weights, such as torch.bfloat16 or "bfloat16"; None: the checkpoint's own, and
            float32 for quantised weights of a GGUF file, which are unpacked.
        revision: branch, tag or commit of a hub id.
        head: whether the model comes with a classification head of its own (text or images).
        num_labels: classes of that head; None: the checkpoint's.
        writes: "text2text" or "lm": the model comes with its language model head, as an encoder-decoder or a decoder.
        drop_path: rate of the last block's drop path, which grows with depth from 0; None: the model's own. It acts in
            training alone, with `attach(..., backbone_noise="drop_path")`.

    Raises:
        LoadError: if there is no such model, files are missing or unreadable, or the weights are of another
            architecture; if the model writes no text, or not in the way that is asked for.

    Warns:
        LoadWarning: if weights of the backbone itself (not its pooler or head) were not in the checkpoint, or if the
            model has no drop path whose rate could be set.
    """
    if num_labels is not None and not head:
        raise LoadError(
            f"num_labels={num_labels} without head=True: a backbone without a head of its own has no classes"
        )
    if drop_path is not None and not 0 <= drop_path < 1:
        raise LoadError(f"drop_path={drop_path}: it is a rate from 0 to below 1")
    wanted = _dtype(dtype)
    if str(name).startswith(TIMM):
        if writes is not None:
            raise LoadError(f"{name} reads images and writes no text: choose problem single, multi or regress")
        if revision is not None:
            raise LoadError(f"revision={revision!r}: timm names its versions by tag, as in timm:NAME.TAG")
        classes = num_labels if head else 0
        return _load_timm(str(name), wanted, classes, drop_path)
    config = config_of(str(name), revision, {} if num_labels is None else {"num_labels": num_labels})
    if drop_path is not None:
        _set_drop_path(str(name), config, drop_path)
    if writes is not None:
        kind: Any = _writing_class(str(name), config, writes)
    elif str(name).startswith(VIT):
        kind = transformers.ViTForImageClassification if head else transformers.ViTModel
    else:
        kind = _auto_class(config) if head else AutoModel
    return _load_transformers(kind, str(name), config, wanted, revision)


def check_writes(name: str | Path, writes: Written, *, revision: str | None = None) -> None:
    """Refuses a model that does not write text in this way; no weights are read.

    Raises:
        LoadError: naming what to choose.
    """
    if str(name).startswith(TIMM):
        raise LoadError(f"{name} reads images and writes no text: choose problem single, multi or regress")
    _writing_class(str(name), config_of(str(name), revision), writes)


def load_class(
    source: Source, *, class_name: str, dtype: torch.dtype | str | None = None, config: Mapping[str, Any]
) -> nn.Module:
    """The backbone of a source as a given class of transformers (or timm), with config fields set.

    Raises:
        OtherModel: if the source holds a model of another kind; no weights are read.
        LoadError: as `load_backbone`, and if transformers has no class of this name.
    """
    wanted, is_timm = _dtype(dtype), source.id.startswith(TIMM)
    if is_timm != (source.library == "timm"):
        what = "a model of timm" if is_timm else "no model of timm, as timm:NAME or timm:NAME@FILE is"
        raise OtherModel(f"{source.id} is {what}")
    if is_timm:
        return _load_timm(source.id, wanted, config.get("num_classes", 0))
    kind = getattr(transformers, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise LoadError(
            f"transformers {transformers.__version__} has no model class {class_name}: "
            "load the backbone yourself and pass it"
        )
    loaded = _config_of(kind, source, config)
    return _load_transformers(kind, source.id, loaded, wanted, source.revision)


def _config_of(kind: type[PreTrainedModel], source: Source, fields: Mapping[str, Any]) -> Any:
    """The config of a source, or the part of it that is for this class (CLIP's text tower), with some fields set.

    Raises:
        OtherModel: if no part of it is for this class.
    """
    whole = config_of(source.id, source.revision)
    parts = [whole, *(getattr(whole, name, None) for name in whole.sub_configs)]
    found = next((part for part in parts if isinstance(part, kind.config_class)), None)
    if found is None:
        raise OtherModel(
            f"{source.id} is a model of type {whole.model_type!r}, and not {kind.config_class.model_type!r}"
        )
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def load_processor(name: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer or image processor of a model of this name, or of a folder that one was saved in.

    Raises:
        LoadError: if there is none.
    """
    if str(name).startswith(TIMM):
        return TimmProcessor.of(_timm_parts(str(name))[0])
    if str(name).startswith(VIT):
        return _npz_processor(str(name).removeprefix(VIT))
    folder = Path(name)
    if all((folder / part).is_dir() for part in PairProcessor.PARTS):
        return PairProcessor(*(load_processor(folder / part) for part in PairProcessor.PARTS))
    if (folder / TIMM_PROCESSOR).is_file():
        return TimmProcessor.from_pretrained(folder)
    if (folder / IMAGE_TRANSFORM).is_file():
        with _as_load_error(str(folder / IMAGE_TRANSFORM), "processor"):
            return ImageTransform.from_pretrained(folder)
    return _load_processor(name, _reads_images(str(name), folder, revision), revision)


def _load_processor(name: str | Path, images: bool, revision: str | None) -> Any:
    """The image processor or the tokenizer of a transformers model."""
    place, options = _asked(str(name), revision)
    folder = Path(place)
    if folder.is_dir() and not is_gguf(name):
        _require_any(folder, IMAGE_FILES if images else TOKENIZER_FILES, "image processor" if images else "tokenizer")
    kind = AutoImageProcessor if images else AutoTokenizer
    with _quiet(local=folder.is_dir()), _as_load_error(str(name), "processor" if images else "tokenizer"):
        processor = kind.from_pretrained(place, **options)
    if not images and (most := _most_tokens(str(name), folder, revision)) is not None:
        # not every tokenizer knows what its model takes
        processor.model_max_length = min(processor.model_max_length, most)
    return processor


@dataclass(frozen=True)
class PairProcessor:
    """What a dual encoder's images and texts are read with.

    Attributes:
        image: image processor, or an `ImageTransform`.
        text: tokenizer.
    """

    PARTS: ClassVar = ("image", "text")

    image: Any
    text: Any

    @property
    def pad_token_id(self) -> int | None:
        """The tokenizer's."""
        return self.text.pad_token_id

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both to folders of their own."""
        for part in self.PARTS:
            getattr(self, part).save_pretrained(str(Path(folder) / part))


def load_pair_processor(name: str, text_name: str | None = None, *, revision: str | None = None) -> PairProcessor:
    """The image processor and the tokenizer of a dual encoder, or of two encoders.

    Raises:
        LoadError: if one is missing.
    """
    if text_name is None:
        _require_dual(name, config_of(name, revision).model_type)
        return PairProcessor(*(_load_processor(name, images, revision) for images in (True, False)))
    image, text = load_processor(name, revision=revision), load_processor(text_name)
    for processor, wanted, given in ((image, False, name), (text, True, text_name)):
        if isinstance(processor, PreTrainedTokenizerBase) != wanted:
            raise LoadError(
                f"{given} reads {'images' if wanted else 'text'}: --backbone is the encoder of images and "
                "--text-backbone that of texts"
            )
    return PairProcessor(image, text)


def load_pair(
    name: str,
    text_name: str | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    drop_path: float | None = None,
) -> nn.Module:
    """A dual encoder by its name, or of an encoder of images and one of texts, with new projections.

    Raises:
        LoadError: if it cannot be loaded, is no dual encoder, or an encoder is timm's.
    """
    model = load_backbone(name, dtype=dtype, revision=revision, drop_path=drop_path)
    if text_name is not None:
        return paired(model, load_backbone(text_name, dtype=dtype))
    _require_dual(name, getattr(getattr(model, "config", None), "model_type", "timm model"))
    return model


def _require_dual(name: str, kind: str) -> None:
    if kind not in DUAL_FAMILIES:
        raise LoadError(
            f"{name} is a {kind}, no dual encoder ({', '.join(DUAL_FAMILIES)}): give one, or name the encoder of texts "
            "beside it (--text-backbone)"
        )


def paired(image: Any, text: Any) -> nn.Module:
    """A dual encoder of two encoders, with new projections.

    Raises:
        LoadError: if one of them is not of transformers.
    """
    for encoder in (image, text):
        if not isinstance(encoder, PreTrainedModel) or dual_family_of(encoder) is not None:
            raise LoadError(f"{type(encoder).__name__} cannot be one of two towers: give an encoder of transformers")
        if not hasattr(encoder.config, "hidden_size"):
            raise LoadError(
                f"{type(encoder).__name__} cannot be one of two towers: its config has no hidden_size, which "
                "VisionTextDualEncoderModel projects from: give an encoder that has one, as ViT and BERT do"
            )
    names = [encoder.config._name_or_path for encoder in (image, text)]
    model: Any = transformers.VisionTextDualEncoderModel(vision_model=image, text_model=text).eval()
    # the towers' configs are copies now; by these names they are loaded again
    for tower, name in zip((model.vision_model, model.text_model), names, strict=True):
        tower.config._name_or_path = name
    return model


@dataclass(frozen=True, kw_only=True)
class TimmProcessor:
    """timm's evaluation transform under the interface of an image processor.

    Attributes:
        input_size: (channels, rows, columns).
        interpolation, mean, std, crop_pct, crop_mode: as timm names them.
    """

    input_size: tuple[int, int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str

    @classmethod
    def of(cls, model: str | nn.Module) -> TimmProcessor:
        """The processor of a timm model, or of the pretrained weights of this name.

        Raises:
            LoadError: if timm does not know the name.
        """
        timm = import_timm()
        config = timm.get_pretrained_cfg(model) if isinstance(model, str) else getattr(model, "pretrained_cfg", None)
        if config is None:
            raise LoadError(f"timm {timm.__version__} has no model named {model!r}: see timm.list_pretrained()")
        values = config if isinstance(config, Mapping) else config.to_dict()
        return cls._from(timm.data.resolve_data_config(pretrained_cfg=values))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TimmProcessor:
        """The processor that `save_pretrained` wrote."""
        path = Path(folder) / TIMM_PROCESSOR
        with _as_load_error(str(path), "processor"):
            return cls._from(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def _from(cls, values: Mapping[str, Any]) -> TimmProcessor:
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the fields to a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (Path(folder) / TIMM_PROCESSOR).write_text(text, encoding="utf-8")

    def __call__(self, images: Any, return_tensors: str = "pt") -> dict[str, Tensor]:
        """{"pixel_values": (images, channels, rows, columns)} of one PIL image or a sequence of them."""
        transform = _timm_transform(self)
        several = images if isinstance(images, Sequence) else [images]
        return {"pixel_values": torch.stack([transform(to_rgb(image)) for image in several])}


@lru_cache(maxsize=8)
def _timm_transform(processor: TimmProcessor) -> Any:
    return import_timm().data.create_transform(**processor.to_dict(), is_training=False)


# --- transformers ------------------------------------------------------------------------------------------


def config_of(name: str, revision: str | None = None, fields: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The config of a backbone that `load_backbone` takes (but timm's), with some fields set.

    Raises:
        LoadError: if there is none, or the folder has no weights.
    """
    if name.startswith(VIT):
        if revision is not None:
            raise LoadError(f"revision={revision!r}: {name} is a file, which has no revisions")
        return npz_config(name, fields)
    folder = Path(name)
    if folder.is_file() and not is_gguf(name):
        raise LoadError(f"{name} is a file: give the folder that holds {CONFIG} and the weights")
    if folder.is_dir():
        _check_folder(folder)
    with _quiet(local=folder.exists()), _as_load_error(name, CONFIG):
        return _read_config(name, revision, **fields)


def _read_config(name: str, revision: str | None, **fields: Any) -> Any:
    """What transformers reads as the config of a name, with some fields set."""
    place, options = _asked(name, revision)
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


def _asked(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """What transformers' `from_pretrained` is called with for a name: a folder or hub id, and options.

    Raises:
        LoadError: if the name is that of a GGUF file which cannot be read.
    """
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    if not is_gguf(name):
        return name, options
    with _gguf_as_load_error():
        check_gguf(name)
        return gguf_parts(name)[0], {**options, "gguf_file": gguf_file(name)}


@contextmanager
def _gguf_as_load_error() -> Iterator[None]:
    try:
        yield
    except GgufError as error:
        raise LoadError(str(error)) from error


def _set_drop_path(name: str, config: Any, rate: float) -> None:
    if "drop_path_rate" in config.to_dict():
        config.drop_path_rate = rate
    elif rate:
        _warn_of_no_drop_path(name, f"transformers' {config.model_type!r} model", rate)


def _warn_of_no_drop_path(name: str, kind: str, rate: float) -> None:
    warnings.warn(
        f"drop_path={rate} is left out: {name} is loaded as {kind}, which has no drop path; timm's layout of a ViT has "
        "it (timm:NAME, or timm:NAME@FILE for weights from a file)",
        LoadWarning,
        stacklevel=4,
    )


def _check_folder(folder: Path) -> None:
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


def _auto_class(config: Any) -> Any:
    """The auto class with a classification head for this config."""
    text = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    images = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if type(config) in text:
        return transformers.AutoModelForSequenceClassification
    if type(config) in images:
        return transformers.AutoModelForImageClassification
    raise LoadError(
        f"transformers has no classification model for {config.model_type!r}: load it without a "
        "head of its own (head=False) and attach with ss.Classify"
    )


def _writing_class(name: str, config: Any, writes: Written) -> Any:
    """The auto class with a language model head for this config."""
    both = transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    if type(config) in both:
        able: Written | None = "text2text"
    else:
        able = "lm" if _is_decoder(config) else None
    if able != writes:
        is_what = {"text2text": "an encoder-decoder", "lm": "a decoder", None: "neither encoder-decoder nor decoder"}
        choose = {"text2text": "--task text2text", "lm": "--task lm", None: "--task single, multi or regress"}
        raise LoadError(
            f"task {writes!r} needs {is_what[writes]}, but {name} ({config.model_type!r}) is {is_what[able]}: choose "
            f"{choose[able]}, or another backbone"
        )
    return transformers.AutoModelForSeq2SeqLM if able == "text2text" else transformers.AutoModelForCausalLM


def _is_decoder(config: Any) -> bool:
    """Whether transformers' language model of this config sees earlier tokens only."""
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    # BERT-type models have such a class as well: their attention tells
    with torch.device("meta"), _quiet(local=True):
        return said_causal(transformers.AutoModelForCausalLM.from_config(config))


def _load_transformers(
    kind: Any, name: str, config: Any, dtype: torch.dtype | None, revision: str | None
) -> PreTrainedModel:
    weights = _read_npz(name.removeprefix(VIT)).for_transformers() if name.startswith(VIT) else None
    place, options = _asked(name, revision)
    with _quiet(local=weights is not None or Path(place).is_dir()), _as_load_error(name, "weights"):
        model, report = kind.from_pretrained(
            None if weights else place,
            **options,
            **(unpacking() if is_gguf(name) else {}),
            config=config,
            state_dict=weights,
            dtype=dtype or ("auto" if weights is None else torch.float32),
            use_safetensors=True,
            output_loading_info=True,
            # judged below, with names and shapes in the message
            ignore_mismatched_sizes=True,
        )
    _check_report(name, model, report)
    # what `source_of` reads; from_pretrained sets it to what it was given
    model.config._name_or_path = name
    return model.eval()


def _check_report(name: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Refuse a backbone that did not come from the checkpoint; new poolers and heads are no news."""
    kind = type(model).__name__
    trunk = {id(parameter) for parameter in trunk_of(model).parameters()}
    inside = [key for key, parameter in model.named_parameters() if id(parameter) in trunk]
    mismatched = {key: (tuple(given), tuple(own)) for key, given, own in report["mismatched_keys"]}
    if wrong := [key for key in inside if key in mismatched]:
        given, own = mismatched[wrong[0]]
        raise LoadError(
            f"the weights of {name} do not fit its {CONFIG}: {wrong[0]} has shape {given}, but "
            f"{kind} needs {own} ({len(wrong)} such): the folder mixes two models"
        )
    missing = [key for key in inside if key in report["missing_keys"]]
    if len(missing) == len(inside):
        raise LoadError(
            f"no weight of {name} matches {kind} (it has {some(sorted(report['unexpected_keys']))}; {kind} needs "
            f"{some(sorted(inside))}): the weights are of another architecture than {CONFIG} says"
        )
    if news := [key for key in missing if "pooler" not in key.split(".")]:
        warnings.warn(
            f"{len(news)} of {len(inside)} weights of {kind} are not in {name} and are random: {some(sorted(news))}",
            LoadWarning,
            stacklevel=4,
        )


def _reads_images(name: str, folder: Path, revision: str | None) -> bool:
    """Whether a model (or a folder of a processor alone) takes images rather than text."""
    if is_gguf(name):
        return False  # transformers reads language models alone from such files
    if folder.is_dir() and not (folder / CONFIG).is_file():
        return not any((folder / file).is_file() for file in TOKENIZER_FILES)
    with _quiet(local=folder.is_dir()), _as_load_error(name, CONFIG):
        config = _read_config(name, revision)
    mapping = transformers.MODEL_MAPPING
    return type(config) in mapping and mapping[type(config)].main_input_name == "pixel_values"


def _most_tokens(name: str, folder: Path, revision: str | None) -> int | None:
    """How many tokens a model has positions for; None: it does not say, or a folder holds a processor alone."""
    if folder.is_dir() and not (folder / CONFIG).is_file() and not is_gguf(name):
        return None
    with _quiet(local=folder.is_dir()), _as_load_error(name, CONFIG):
        config = _read_config(name, revision)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def _quiet(*, local: bool) -> Iterator[None]:
    """Keep transformers' load report to itself; the bars of a download stay, those of a local file do not."""
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
def _as_load_error(name: str, what: str) -> Iterator[None]:
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


# --- the original ViT ----------------------------------------------------------------------------------------


def npz_config(name: str, fields: Mapping[str, Any]) -> transformers.ViTConfig:
    """The config that the arrays of "vit:FILE" tell, with some fields set.

    Raises:
        LoadError: if the file holds no Vision Transformer.
    """
    file = name.removeprefix(VIT)
    with _npz_as_load_error():
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


def _read_npz(file: str) -> ViTArchive:
    with _npz_as_load_error():
        return read_vit(file)


def _npz_processor(file: str) -> transformers.ViTImageProcessor:
    """The image size of the file, and -1 to 1 for the darkest to the brightest pixel, as the original code has it."""
    with _npz_as_load_error():
        side = read_sizes(file).image
    size = {"height": side, "width": side}
    return transformers.ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


@contextmanager
def _npz_as_load_error() -> Iterator[None]:
    try:
        yield
    except NpzError as error:
        raise LoadError(str(error)) from error


# --- timm --------------------------------------------------------------------------------------------------


def import_timm() -> ModuleType:
    """The timm package.

    Raises:
        LoadError: if it is not installed, or its torchvision does not match the installed torch.
    """
    try:
        import timm
        import timm.data
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise LoadError(
            f"timm cannot be imported ({reason}): install the extra with pip install 'sidestep[vision]'; "
            f"its torchvision has to be built for torch {torch.__version__}"
        ) from error
    return timm


def _timm_parts(name: str) -> tuple[str, str | None]:
    """Model name and weight file of "timm:NAME[@FILE]"."""
    model, at, file = name.removeprefix(TIMM).partition("@")
    if not model or (at and not file):
        raise LoadError(f"{name!r}: write timm:NAME, or timm:NAME@FILE for weights in a .safetensors or .npz file")
    return model, file or None


def _timm_id(config: Mapping[str, Any]) -> str:
    """The name that loads a timm model of this pretrained_cfg."""
    if not config.get("architecture"):
        return ""
    tag, file = config.get("tag"), config.get("file")
    return TIMM + config["architecture"] + (f".{tag}" if tag else "") + (f"@{file}" if file else "")


def _load_timm(name: str, dtype: torch.dtype | None, classes: int | None, drop_path: float | None = None) -> nn.Module:
    timm = import_timm()
    model_name, file = _timm_parts(name)
    if file is not None:
        _check_timm_file(name, Path(file))
    try:
        model = timm.create_model(model_name, pretrained=file is None, num_classes=classes, drop_path_rate=drop_path)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise LoadError(
            f"{name!r} cannot be loaded ({reason}): see timm.list_pretrained() for the names; a hub "
            "that cannot be reached can be replaced by a file, timm:NAME@FILE.safetensors"
        ) from error
    if file is not None:
        _fill_timm(model, model_name, file)
    if drop_path and not any("DropPath" in type(module).__name__ for module in model.modules()):
        _warn_of_no_drop_path(name, f"timm's {type(model).__name__}", drop_path)
    return model.to(dtype=dtype).eval()


def _check_timm_file(name: str, file: Path) -> None:
    if not file.is_file():
        raise LoadError(f"{name!r}: there is no file {file}")
    if file.suffix not in (".safetensors", NPZ):
        raise LoadError(f"{name!r}: weights are read from .safetensors and .npz files only, not from {file.name}")


def _fill_timm(model: Any, model_name: str, file: str) -> None:
    """Load a .safetensors file in timm's names or an original ViT's .npz; a classifier of another size is left out."""
    weights = _read_npz(file).for_timm() if Path(file).suffix == NPZ else _read_safetensors(file)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    own = model.state_dict()
    with _as_load_error(file, "weights"):
        weights = dict(convert(weights, model)) if convert else weights
    head = {f"{_timm_classifier(model)}.{part}" for part in ("weight", "bias")}
    weights = {key: value for key, value in weights.items() if key in own or key not in head}
    wrong = [key for key, value in weights.items() if key in own and value.shape != own[key].shape]
    # PyTorch itself does not ask for this count, which older files lack
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    if bad := [key for key in (*wrong, *missing) if key not in head]:
        raise LoadError(
            f"the weights of {file} do not fit {model_name}: {len(missing)} of {len(own)} are missing, "
            f"{len(wrong)} have another shape ({some(sorted(bad))}): the file is of another model"
        )
    model.load_state_dict({k: v for k, v in weights.items() if k in own and k not in wrong}, strict=False)
    # what `source_of` reads the file's name from
    model.pretrained_cfg = {**model.pretrained_cfg, "file": file}


def _read_safetensors(file: str) -> dict[str, Tensor]:
    with _as_load_error(file, "weights"), safe_open(file, framework="pt") as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - no mapping


def _timm_classifier(model: Any) -> str:
    name = getattr(model, "pretrained_cfg", {}).get("classifier")
    return name if isinstance(name, str) else "head"


# --- small parts -------------------------------------------------------------------------------------------


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = getattr(torch, dtype, None)
    if not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise LoadError(f"dtype={dtype!r}: choose float32, bfloat16, float16 or float64")
    return known


def _require_any(folder: Path, names: Sequence[str], what: str) -> None:
    if not any((folder / name).is_file() for name in names):
        _refuse_packed(folder)
        raise LoadError(f"{folder} has no {what}: looked for {', '.join(names)} ({_holds(folder)})")


def _holds(folder: Path) -> str:
    return f"it holds {some(sorted(path.name for path in folder.iterdir()))}"
