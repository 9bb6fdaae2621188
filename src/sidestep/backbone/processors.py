"""Tokenizers, image processors and feature extractors, by the name of their backbone or from a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
)

from sidestep.backbone.configs import asked, config_of, npz_as_load_error, read_config
from sidestep.backbone.families import DUAL_FAMILIES
from sidestep.backbone.frames import FRAMES_FILE, FrameProcessor
from sidestep.backbone.gguf import (
    is_gguf,
)
from sidestep.backbone.pixels import IMAGE_TRANSFORM, ImageTransform, to_rgb
from sidestep.backbone.source import (
    CONFIG,
    PROCESSOR_FILES,
    TIMM,
    TIMM_PROCESSOR,
    TOKENIZER_FILES,
    VIT,
    LoadError,
    Reads,
    as_load_error,
    quiet,
    read_by_files,
    require_any,
)
from sidestep.backbone.timm_models import import_timm, timm_parts
from sidestep.backbone.trunk import SOUND_INPUTS
from sidestep.backbone.vision_language import VisionLanguageProcessor
from sidestep.backbone.vit_npz import read_sizes

LOADED_BY: Mapping[Reads, tuple[Any, str, tuple[str, ...]]] = {
    "text": (AutoTokenizer, "tokenizer", TOKENIZER_FILES),
    "image": (AutoImageProcessor, "image processor", PROCESSOR_FILES),
    "audio": (AutoFeatureExtractor, "feature extractor", PROCESSOR_FILES),
}
"""The class that loads a processor, by what that reads, its name in words, and its files."""
MAIN_INPUTS: Mapping[str, Reads] = {"pixel_values": "image", **dict.fromkeys(SOUND_INPUTS, "audio")}
"""What models read whose first input is called so. Others read text."""
IN_WORDS: Mapping[Reads, str] = {"text": "text", "image": "images", "audio": "sounds"}


def load_processor(name: str | Path, *, revision: str | None = None, pictures: bool = False) -> Any:
    """The tokenizer, image processor or feature extractor of a model of this name, or of a folder with one alone.

    Args:
        name: of the model, as for `load_backbone`, or the folder.
        revision: branch, tag or commit of a hub id.
        pictures: whether rows hold pictures. Then a vision-language model gives a `VisionLanguageProcessor`, and else
            its tokenizer.

    Raises:
        LoadError: if there is no such processor.
    """
    if str(name).startswith(TIMM):
        return TimmProcessor.of(timm_parts(str(name))[0])
    if str(name).startswith(VIT):
        return _npz_processor(str(name).removeprefix(VIT))
    folder = Path(name)
    if all((folder / part).is_dir() for part in PairProcessor.PARTS):
        return PairProcessor(*(load_processor(folder / part) for part in PairProcessor.PARTS))
    if (folder / FRAMES_FILE).is_file():
        with as_load_error(str(folder / FRAMES_FILE), "processor"):
            return FrameProcessor.from_pretrained(folder, load_processor)
    if (folder / TIMM_PROCESSOR).is_file():
        return TimmProcessor.from_pretrained(folder)
    if (folder / IMAGE_TRANSFORM).is_file():
        with as_load_error(str(folder / IMAGE_TRANSFORM), "processor"):
            return ImageTransform.from_pretrained(folder)
    if _reads_both(str(name), folder, revision, pictures=pictures):
        return _load_vision_language(name, revision)
    return _load_processor(name, _reads(str(name), folder, revision), revision)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor that reads images too, or the processor itself."""
    return getattr(processor, "text", processor)


def read_by(processor: Any) -> Reads:
    """What a processor reads."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return "text"
    return "audio" if isinstance(processor, SequenceFeatureExtractor) else "image"


def _load_vision_language(name: str | Path, revision: str | None) -> VisionLanguageProcessor:
    place, options = asked(str(name), revision)
    folder = Path(place)
    if folder.is_dir():
        require_any(folder, PROCESSOR_FILES, "processor of pictures and texts")
    with quiet(local=folder.is_dir()), as_load_error(str(name), "processor"):
        processor = VisionLanguageProcessor.of(AutoProcessor.from_pretrained(place, **options))
    _limit(processor.text, str(name), folder, revision)
    return processor


def _load_processor(name: str | Path, reads: Reads, revision: str | None) -> Any:
    """The processor of a transformers model."""
    place, options = asked(str(name), revision)
    folder = Path(place)
    kind, what, files = LOADED_BY[reads]
    if folder.is_dir() and not is_gguf(name):
        require_any(folder, files, what)
    with quiet(local=folder.is_dir()), as_load_error(str(name), what):
        processor = kind.from_pretrained(place, **options)
    if reads == "text":
        _limit(processor, str(name), folder, revision)
    return processor


def _limit(tokenizer: Any, name: str, folder: Path, revision: str | None) -> None:
    """Tell a tokenizer what its model takes, which not every tokenizer knows."""
    if (most := _most_tokens(name, folder, revision)) is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, most)


@dataclass(frozen=True)
class PairProcessor:
    """What a dual encoder's images and texts are read with.

    Attributes:
        image: image processor, or an `ImageTransform`. Of videos a `FrameProcessor`.
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
        require_dual(name, config_of(name, revision).model_type)
        return PairProcessor(_load_processor(name, "image", revision), _load_processor(name, "text", revision))
    image, text = load_processor(name, revision=revision), load_processor(text_name)
    for processor, wanted, given in ((image, "image", name), (text, "text", text_name)):
        if (reads := read_by(processor)) != wanted:
            raise LoadError(
                f"{given} reads {IN_WORDS[reads]}: --backbone is the encoder of images and --text-backbone that of "
                "texts"
            )
    return PairProcessor(image, text)


def require_dual(name: str, kind: str) -> None:
    """Raise `LoadError` unless models of this type have a tower of images and one of texts."""
    if kind not in DUAL_FAMILIES:
        raise LoadError(
            f"{name} is a {kind}, no dual encoder ({', '.join(DUAL_FAMILIES)}): give one, or name the encoder of texts "
            "beside it (--text-backbone)"
        )


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
        with as_load_error(str(path), "processor"):
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


def _reads_both(name: str, folder: Path, revision: str | None, *, pictures: bool) -> bool:
    """Whether a model takes pictures among texts and both are wanted, or a folder holds a processor of both alone."""
    if is_gguf(name):
        return False
    if folder.is_dir() and not (folder / CONFIG).is_file():
        return all(any((folder / file).is_file() for file in files) for files in (TOKENIZER_FILES, PROCESSOR_FILES))
    if not pictures or _reads(name, folder, revision) == "image":
        return False
    with quiet(local=folder.is_dir()), as_load_error(name, CONFIG):
        return type(read_config(name, revision)) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _reads(name: str, folder: Path, revision: str | None) -> Reads:
    """What a model (or the processor in a folder that holds it alone) reads."""
    if is_gguf(name):
        return "text"  # transformers reads language models alone from such files
    if folder.is_dir() and not (folder / CONFIG).is_file():
        return read_by_files(folder) or "image"
    with quiet(local=folder.is_dir()), as_load_error(name, CONFIG):
        config = read_config(name, revision)
    mapping = transformers.MODEL_MAPPING
    return MAIN_INPUTS.get(mapping[type(config)].main_input_name, "text") if type(config) in mapping else "text"


def _most_tokens(name: str, folder: Path, revision: str | None) -> int | None:
    """How many tokens a model has positions for.

    None if the model does not say, or the folder holds a processor alone.
    """
    if folder.is_dir() and not (folder / CONFIG).is_file() and not is_gguf(name):
        return None
    with quiet(local=folder.is_dir()), as_load_error(name, CONFIG):
        config = read_config(name, revision)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _npz_processor(file: str) -> transformers.ViTImageProcessor:
    """The image size of the file, and -1 to 1 for the darkest to the brightest pixel, as the original code has it."""
    with npz_as_load_error():
        side = read_sizes(file).image
    size = {"height": side, "width": side}
    return transformers.ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
