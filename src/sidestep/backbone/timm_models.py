"""Models of timm: made by name, filled from the hub or from a file."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sidestep.backbone.configs import read_npz
from sidestep.backbone.source import NPZ, TIMM, LoadError, as_load_error, warn_of_no_drop_path
from sidestep.messages import some


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
            f"timm cannot be imported ({reason}): install the extra with pip install 'sidestep[vision]'. "
            f"Its torchvision has to be built for torch {torch.__version__}"
        ) from error
    return timm


def timm_parts(name: str) -> tuple[str, str | None]:
    """Model name and weight file of "timm:NAME[@FILE]"."""
    model, at, file = name.removeprefix(TIMM).partition("@")
    if not model or (at and not file):
        raise LoadError(f"{name!r}: write timm:NAME, or timm:NAME@FILE for weights in a .safetensors or .npz file")
    return model, file or None


def load_timm(name: str, dtype: torch.dtype | None, classes: int | None, drop_path: float | None = None) -> nn.Module:
    """A model by its name, "timm:NAME" or "timm:NAME@FILE", in eval mode.

    Raises:
        LoadError: if timm or the model is missing, or the file does not fit it.
    """
    timm = import_timm()
    model_name, file = timm_parts(name)
    if file is not None:
        _check_timm_file(name, Path(file))
    try:
        model = timm.create_model(model_name, pretrained=file is None, num_classes=classes, drop_path_rate=drop_path)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise LoadError(
            f"{name!r} cannot be loaded ({reason}): see timm.list_pretrained() for the names. A hub "
            "that cannot be reached can be replaced by a file, timm:NAME@FILE.safetensors"
        ) from error
    if file is not None:
        _fill_timm(model, model_name, file)
    if drop_path and not any("DropPath" in type(module).__name__ for module in model.modules()):
        warn_of_no_drop_path(name, f"timm's {type(model).__name__}", drop_path)
    return model.to(dtype=dtype).eval()


def _check_timm_file(name: str, file: Path) -> None:
    if not file.is_file():
        raise LoadError(f"{name!r}: there is no file {file}")
    if file.suffix not in (".safetensors", NPZ):
        raise LoadError(f"{name!r}: weights are read from .safetensors and .npz files only, not from {file.name}")


def _fill_timm(model: Any, model_name: str, file: str) -> None:
    """Load a .safetensors file in timm's names or an original ViT's .npz, without a classifier of another size."""
    weights = read_npz(file).for_timm() if Path(file).suffix == NPZ else _read_safetensors(file)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    own = model.state_dict()
    with as_load_error(file, "weights"):
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
    with as_load_error(file, "weights"), safe_open(file, framework="pt") as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - no mapping


def _timm_classifier(model: Any) -> str:
    name = getattr(model, "pretrained_cfg", {}).get("classifier")
    return name if isinstance(name, str) else "head"
