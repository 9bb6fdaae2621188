"""Backbones and their processors by name: a folder, a hub id, or a file.

Names of files are "timm:NAME@FILE", "vit:FILE.npz" and "gguf:FOLDER@FILE". Weights are read as safetensors, as NumPy
arrays (the original ViT's) or as GGUF. No code of a repository is run, so loading executes nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    PreTrainedModel,
)

from sidestep.backbone import said_causal, trunk_of
from sidestep.backbone.configs import asked, config_of, read_config, read_npz
from sidestep.backbone.families import dual_family_of
from sidestep.backbone.formats import Quantize, check_quantizable, left_plain, quantization_for, without_weights
from sidestep.backbone.gguf import (
    is_gguf,
    unpacking,
)
from sidestep.backbone.placement import DISK, DeviceMap, MaxMemory, Placement, unwarned
from sidestep.backbone.processors import require_dual
from sidestep.backbone.quantised import format_text, stored_quantization
from sidestep.backbone.source import (
    CONFIG,
    TIMM,
    VIT,
    LoadError,
    LoadWarning,
    OtherModel,
    Source,
    as_load_error,
    named_dtype,
    quiet,
    warn_of_no_drop_path,
)
from sidestep.backbone.timm_models import load_timm
from sidestep.interface.offload import offloaded_tensors
from sidestep.messages import some
from sidestep.metrics import Written

CLASSIFIERS = (
    (transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, transformers.AutoModelForSequenceClassification),
    (transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, transformers.AutoModelForImageClassification),
    (transformers.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING, transformers.AutoModelForAudioClassification),
)
"""Models with a classification head of their own, and the class that loads them."""
OwnHead = Literal["rows", "tokens", "spans"]
"""What a head of a model's own gives answers for: whole rows, each token, or the two ends of an answer."""
OWN_HEADS: dict[OwnHead, tuple[tuple[Any, Any], ...]] = {
    "rows": CLASSIFIERS,
    "tokens": ((transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, transformers.AutoModelForTokenClassification),),
    "spans": ((transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING, transformers.AutoModelForQuestionAnswering),),
}


def stored_vocabulary(source: Source) -> int | None:
    """How many tokens the config says that a backbone of this name has.

    None if the backbone has no name, or no config is at hand.
    """
    if source.library != "transformers" or not source.id:
        return None
    try:
        config = read_config(source.id, source.revision, local_files_only=True)
    except (OSError, ValueError):  # neither here nor in the cache, or a config of the user's own class
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def load_backbone(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    head: bool | OwnHead = False,
    num_labels: int | None = None,
    writes: Written | None = None,
    drop_path: float | None = None,
    quantize: Quantize | None = None,
    device_map: DeviceMap | None = None,
    offload_folder: str | Path | None = None,
    max_memory: MaxMemory | None = None,
) -> nn.Module:
    """The pretrained model of this name, in eval mode.

    Args:
        name: a folder or hub id for transformers, or one of four forms. "timm:NAME" is for timm's pretrained weights.
            "timm:NAME@FILE" is for weights in a safetensors file or an original ViT's .npz file. "vit:FILE" is for such
            a .npz file as transformers' ViT. "gguf:FOLDER@FILE" is for a GGUF file.
        dtype: precision of the weights, such as torch.bfloat16 or "bfloat16". None is the checkpoint's own. For
            quantised weights of a GGUF file, which are unpacked, None is float32.
        revision: branch, tag or commit of a hub id.
        head: whether the model comes with a classification head of its own (text, images or sounds). "tokens" and
            "spans" are its heads of each token, and of the two ends of an answer.
        num_labels: classes of that head. None: the checkpoint's.
        writes: "text2text" or "lm": the model comes with its language model head, as an encoder-decoder or a decoder.
        drop_path: rate of the last block's drop path, which grows with depth from 0. None: the model's own. It acts in
            training alone, with `attach(..., backbone_noise="drop_path")`.
        quantize: "4bit", "8bit", "int8" or "int4" (see `Format`), or a quantization config of transformers. None: as
            the checkpoint is, quantised or not.
        device_map, offload_folder, max_memory: where the weights go (`Placement`). "auto" fills the devices there are,
            then memory, then the disk. None: memory.

    Raises:
        LoadError: if there is no such model, files are missing or unreadable, or the weights are of another
            architecture. Also if the model writes no text, or not in the way that is asked for. Also if weights cannot
            be placed as asked, or have to be written to a folder without space.

    Warns:
        LoadWarning: if weights of the backbone itself (not its pooler or head) were not in the checkpoint. Also if the
            model has no drop path whose rate could be set.
    """
    if num_labels is not None and not head:
        raise LoadError(
            f"num_labels={num_labels} without head=True: a backbone without a head of its own has no classes"
        )
    if drop_path is not None and not 0 <= drop_path < 1:
        raise LoadError(f"drop_path={drop_path}: it is a rate from 0 to below 1")
    if quantize is not None:
        check_quantizable(quantize, str(name))
    wanted, placement = named_dtype(dtype), Placement.of(device_map, offload_folder, max_memory)
    if str(name).startswith(TIMM):
        _refuse_placement(str(name), placement)
        if writes is not None:
            raise LoadError(f"{name} reads images and writes no text: choose problem single, multi or regress")
        if revision is not None:
            raise LoadError(f"revision={revision!r}: timm names its versions by tag, as in timm:NAME.TAG")
        classes = num_labels if head else 0
        return load_timm(str(name), wanted, classes, drop_path)
    config = config_of(str(name), revision, {} if num_labels is None else {"num_labels": num_labels})
    if drop_path is not None:
        _set_drop_path(str(name), config, drop_path)
    if writes is not None:
        kind: Any = _writing_class(str(name), config, writes)
    elif str(name).startswith(VIT):
        kind = transformers.ViTForImageClassification if head else transformers.ViTModel
    else:
        kind = classifier_of(config, "rows" if head is True else head) if head else headless_of(config)
    return _load_transformers(kind, str(name), config, wanted, revision, quantize, placement, own_head=bool(head))


def check_writes(name: str | Path, writes: Written, *, revision: str | None = None) -> None:
    """Refuses a model that does not write text in this way, without reading weights.

    Raises:
        LoadError: naming what to choose.
    """
    if str(name).startswith(TIMM):
        raise LoadError(f"{name} reads images and writes no text: choose problem single, multi or regress")
    _writing_class(str(name), config_of(str(name), revision), writes)


def load_class(
    source: Source,
    *,
    class_name: str,
    dtype: torch.dtype | str | None = None,
    config: Mapping[str, Any],
    placement: Placement | None = None,
) -> nn.Module:
    """The backbone of a source as a given class of transformers (or timm), with config fields set.

    Raises:
        OtherModel: if the source holds a model of another kind. No weights are read.
        LoadError: as `load_backbone`, and if transformers has no class of this name.
    """
    wanted, is_timm = named_dtype(dtype), source.id.startswith(TIMM)
    if is_timm != (source.library == "timm"):
        what = "a model of timm" if is_timm else "no model of timm, as timm:NAME or timm:NAME@FILE is"
        raise OtherModel(f"{source.id} is {what}")
    if is_timm:
        _refuse_placement(source.id, placement)
        return load_timm(source.id, wanted, config.get("num_classes", 0))
    kind = getattr(transformers, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise LoadError(
            f"transformers {transformers.__version__} has no model class {class_name}: "
            "load the backbone yourself and pass it"
        )
    loaded = _config_of(kind, source, config)
    own = stored_quantization(loaded)  # a checkpoint that is quantised already says so itself
    return _load_transformers(
        kind, source.id, loaded, wanted, source.revision, source.quantization if own is None else None, placement
    )


def _refuse_placement(name: str, placement: Placement | None) -> None:
    if placement is not None:
        raise LoadError(
            f"{name} with device_map={placement.device_map!r}: models of timm are loaded whole. Leave it out"
        )


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


def load_pair(
    name: str,
    text_name: str | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    drop_path: float | None = None,
    quantize: Quantize | None = None,
    device_map: DeviceMap | None = None,
    offload_folder: str | Path | None = None,
    max_memory: MaxMemory | None = None,
) -> nn.Module:
    """A dual encoder by its name, or of an encoder of images and one of texts, with new projections.

    Raises:
        LoadError: if it cannot be loaded, is no dual encoder, or an encoder is timm's. Also if one model of both is
            asked for in torchao's formats, or two encoders are to be placed on devices.
    """
    if text_name is None and quantize in ("int8", "int4"):
        raise LoadError(
            f"quantize={quantize!r} with {name}: transformers loads no dual encoder in torchao's formats. "
            "Choose 4bit or 8bit"
        )
    if text_name is not None and device_map is not None:
        raise LoadError(f"device_map={device_map!r} with two encoders, which are put together in memory: leave it out")
    how: dict[str, Any] = {"device_map": device_map, "offload_folder": offload_folder, "max_memory": max_memory}
    model = load_backbone(name, dtype=dtype, revision=revision, drop_path=drop_path, quantize=quantize, **how)
    if text_name is not None:
        return paired(model, load_backbone(text_name, dtype=dtype, quantize=quantize))
    require_dual(name, getattr(getattr(model, "config", None), "model_type", "timm model"))
    return model


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
                "VisionTextDualEncoderModel projects from. Give an encoder that has one, as ViT and BERT do"
            )
    names = [encoder.config._name_or_path for encoder in (image, text)]
    model: Any = transformers.VisionTextDualEncoderModel(vision_model=image, text_model=text).eval()
    # the towers' configs are copies now, and by these names they are loaded again
    for tower, name in zip((model.vision_model, model.text_model), names, strict=True):
        tower.config._name_or_path = name
    return model


def _set_drop_path(name: str, config: Any, rate: float) -> None:
    if "drop_path_rate" in config.to_dict():
        config.drop_path_rate = rate
    elif rate:
        warn_of_no_drop_path(name, f"transformers' {config.model_type!r} model", rate)


def headless_of(config: Any) -> Any:
    """The auto class for this config, whose head is not used: of an encoder-decoder of sounds that of its encoder."""
    of_two = getattr(config, "is_encoder_decoder", False)
    hears = type(config) in transformers.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING
    return transformers.AutoModelForAudioClassification if hears and of_two else AutoModel


def classifier_of(config: Any, head: OwnHead = "rows") -> Any:
    """The auto class with such a head for this config.

    Raises:
        LoadError: if there is none.
    """
    found = next((kind for mapping, kind in OWN_HEADS[head] if type(config) in mapping), None)
    if found is None:
        raise LoadError(
            f"transformers has no {config.model_type!r} model with a head of {head}: take it without a head of its own "
            "(head=False, without --own-head)"
        )
    return found


def _writing_class(name: str, config: Any, writes: Written) -> Any:
    """The auto class with a language model head for this config."""
    both = transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    reads_images = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    able: Written | None = "text2text" if type(config) in both else None
    if able is None and (reads_images or _is_decoder(config)):
        able = "lm"
    if able != writes:
        is_what = {"text2text": "an encoder-decoder", "lm": "a decoder", None: "neither encoder-decoder nor decoder"}
        choose = {"text2text": "--kind text2text", "lm": "--kind lm", None: "--kind single, multi or regress"}
        raise LoadError(
            f"task {writes!r} needs {is_what[writes]}, but {name} ({config.model_type!r}) is {is_what[able]}: choose "
            f"{choose[able]}, or another backbone"
        )
    if able == "text2text":
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForImageTextToText if reads_images else transformers.AutoModelForCausalLM


def _is_decoder(config: Any) -> bool:
    """Whether transformers' language model of this config sees earlier tokens only."""
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    # BERT-type models have such a class as well: their attention tells
    with torch.device("meta"), quiet(local=True):
        return said_causal(transformers.AutoModelForCausalLM.from_config(config))


def _load_transformers(
    kind: Any,
    name: str,
    config: Any,
    dtype: torch.dtype | None,
    revision: str | None,
    quantize: Quantize | None = None,
    placement: Placement | None = None,
    *,
    own_head: bool = False,
) -> PreTrainedModel:
    weights = read_npz(name.removeprefix(VIT)).for_transformers() if name.startswith(VIT) else None
    place, options = asked(name, revision)
    if quantize is not None:
        options |= _quantising(quantize, name, kind, config, dtype, own_head)
    placed: dict[str, Any] = {}
    if placement is not None:
        wide = dtype or getattr(config, "dtype", None) or torch.float32
        blank = partial(getattr(kind, "from_config", None) or kind._from_config, copy.deepcopy(config), dtype=wide)
        placed = placement.options(name, blank, packed=weights is not None)
        on_disk = DISK in placed["device_map"].values()
        if on_disk and (quantize is not None or stored_quantization(config) is not None):
            raise LoadError(
                f"{name} is quantised, and codes cannot be brought from {DISK} for each call. Leave device_map out: on "
                "a CPU the codes of a checkpoint that is quantised already stay in its file. Or leave quantize out"
            )
        if is_gguf(name) and on_disk:
            raise LoadError(f"{name} cannot be placed on {DISK}: transformers unpacks it in memory. Take safetensors")
    with quiet(local=weights is not None or Path(place).is_dir()), as_load_error(name, "weights"), unwarned():
        model, report = kind.from_pretrained(
            None if weights else place,
            **options,
            **(unpacking() if is_gguf(name) else {}),
            **placed,
            config=config,
            state_dict=weights,
            dtype=dtype or ("auto" if weights is None else torch.float32),
            use_safetensors=True,
            output_loading_info=True,
            # judged below, with names and shapes in the message
            ignore_mismatched_sizes=True,
        )
    _check_report(name, model, report)
    _check_new(name, model, report)
    # what `source_of` reads: from_pretrained sets it to what it was given
    model.config._name_or_path = name
    return model.eval()


def _check_new(name: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Refuse weights on disk that the checkpoint does not have: they would never be found there."""
    new = offloaded_tensors(model)
    if lost := [key for key, p in model.named_parameters() if id(p) in new and key in report["missing_keys"]]:
        raise LoadError(
            f"device_map puts {some(lost)} on {DISK}, which {name} does not have (new weights of a head): place these "
            "modules on cpu, or say auto"
        )


def _quantising(
    quantize: Quantize, name: str, kind: Any, config: Any, dtype: torch.dtype | None, own_head: bool
) -> dict[str, Any]:
    """What tells `from_pretrained` to quantise weights as they are loaded.

    Raises:
        LoadError: if they are quantised already, or cannot be.
    """
    if (own := stored_quantization(config)) is not None:
        raise LoadError(f"quantize={quantize!r}: {name} is quantised already ({format_text(own)}). Leave quantize out")
    found = quantization_for(
        quantize,
        dtype or config.dtype or torch.float32,
        lambda: left_plain(without_weights(kind, config), own_head=own_head),
    )
    return {"quantization_config": found}


def _without_heads(model: PreTrainedModel) -> nn.Module:
    """The trunk. Of Whisper's encoder with a head, which transformers takes for a trunk as it is, the encoder."""
    trunk = trunk_of(model)
    of_two = getattr(trunk.config, "is_encoder_decoder", False)
    return trunk.encoder if of_two and hasattr(trunk, "encoder") and not hasattr(trunk, "decoder") else trunk


def _check_report(name: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Refuse a backbone that did not come from the checkpoint, but accept new poolers and heads."""
    kind = type(model).__name__
    trunk = {id(parameter) for parameter in _without_heads(model).parameters()}
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
            f"no weight of {name} matches {kind} (it has {some(sorted(report['unexpected_keys']))}, and {kind} needs "
            f"{some(sorted(inside))}): the weights are of another architecture than {CONFIG} says"
        )
    if news := [key for key in missing if "pooler" not in key.split(".")]:
        warnings.warn(
            f"{len(news)} of {len(inside)} weights of {kind} are not in {name} and are random: {some(sorted(news))}",
            LoadWarning,
            stacklevel=4,
        )
