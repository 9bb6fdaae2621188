"""Where the weights of a backbone go on this machine: devices, the host's memory, the disk. accelerate brings them.

A placement belongs to a machine, not to a task, so no task stores it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import convert_file_size_to_int, get_balanced_memory, get_max_memory
from torch import nn
from transformers.conversion_mapping import WeightConverter, get_model_conversion_mapping

from sidestep.backbone.source import LoadError
from sidestep.backbone.trunk import trunk_of
from sidestep.messages import some

DeviceMap: TypeAlias = str | Mapping[str, str | int]
MaxMemory: TypeAlias = Mapping[str | int, str | int]

COMPUTED = ("auto", "balanced", "balanced_low_0", "sequential")
"""Names of maps that accelerate makes of the memory there is."""
DISK = "disk"
EXAMPLE = '{"model": "cpu", "lm_head": "disk"}'
HOST_SHARE = 0.9
"""Of the host's free memory that a computed map fills, where nobody says how much it may."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where weights go, as accelerate's `device_map` says it.

    Attributes:
        device_map: "auto", "balanced", "balanced_low_0" or "sequential" (made of the memory there is), a device, or
            "disk". Or the devices by names of modules, such as {"model.layers.0": 0, "lm_head": "disk"}, or the same as
            a .json file or text.
        offload_folder: where weights are written that are offloaded to disk and cannot be read from their checkpoint.
        max_memory: the most that a computed map puts on a device: {0: "10GiB", "cpu": "600MiB"}. Numbers are bytes.

    Raises:
        LoadError: if a setting is none of these.
    """

    device_map: DeviceMap
    offload_folder: str | Path | None = None
    max_memory: MaxMemory | None = None

    def __post_init__(self) -> None:
        if isinstance(self.device_map, str):
            object.__setattr__(self, "device_map", _read(self.device_map))
        if self.max_memory is None:
            return
        if self.device_map not in COMPUTED:
            raise LoadError(
                f"max_memory={dict(self.max_memory)} is for a map that is computed: choose device_map "
                f"{', '.join(COMPUTED)}, or leave max_memory out"
            )
        object.__setattr__(self, "max_memory", {_device(key): _bytes(size) for key, size in self.max_memory.items()})

    @classmethod
    def of(
        cls,
        device_map: DeviceMap | None,
        offload_folder: str | Path | None = None,
        max_memory: MaxMemory | None = None,
    ) -> Placement | None:
        """The placement that three arguments ask for. None: none does.

        Raises:
            LoadError: if there is no map that the others belong to.
        """
        if device_map is not None:
            return cls(device_map=device_map, offload_folder=offload_folder, max_memory=max_memory)
        for name, given in (("offload_folder", offload_folder), ("max_memory", max_memory)):
            if given is not None:
                raise LoadError(f"{name}={given!r} without a device map: say device_map='auto' (--device-map auto)")
        return None

    def map_of(self, blank: nn.Module) -> dict[str, Any]:
        """The device of each module.

        A classification head stays in memory, because what is trained cannot be offloaded.

        Args:
            blank: the model on the meta device.

        Raises:
            LoadError: if a given map names a module that the model does not have, or lacks some.
        """
        asked = self.device_map
        if isinstance(asked, Mapping):
            return _checked(blank, asked)
        if asked == DISK:
            found = {name: DISK for name, _ in (*blank.named_children(), *blank.named_parameters(recurse=False))}
        elif asked in COMPUTED:
            found = dict(infer_auto_device_map(blank, self._memory(blank), sorted(_whole(blank))))
        else:
            return {"": asked}
        main = next((device for device in found.values() if device not in ("cpu", DISK)), "cpu")
        return {
            name: main if device == DISK and _is_trained_head(blank, name) else device for name, device in found.items()
        }

    def _memory(self, blank: nn.Module) -> Any:
        limits = None if self.max_memory is None else dict(self.max_memory)
        if limits is None:
            limits = get_max_memory()
            limits.update({"cpu": int(HOST_SHARE * limits["cpu"])} if "cpu" in limits else {})
        if self.device_map == "sequential":
            return get_max_memory(limits)
        low = self.device_map == "balanced_low_0"
        return get_balanced_memory(blank, limits, sorted(_whole(blank)), low_zero=low)

    def options(self, name: str, make: Callable[[], nn.Module], *, packed: bool) -> dict[str, Any]:
        """What `from_pretrained` is told.

        Weights in safetensors files that the model has in the same form stay in these files. Others are written to the
        offload folder: those of `packed` files, and those that transformers puts together (experts of a mixture).

        Args:
            name: of the backbone.
            make: makes the model, which is done on the meta device.
            packed: whether its weights are in no safetensors file.

        Raises:
            LoadError: if there is no folder to write to, or too little space in it.
        """
        with torch.device("meta"):
            blank = make()
        found = self.map_of(blank)
        size = offloaded_bytes(blank, found)
        if size and (packed or any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(blank))):
            self._check_folder(name, size)
        elif self.offload_folder is not None:
            _make(Path(self.offload_folder))
        folder = None if self.offload_folder is None else str(self.offload_folder)
        return {"device_map": found, "offload_folder": folder}

    def _check_folder(self, name: str, size: int) -> None:
        text = f"the weights of {name} that are offloaded to disk have to be written there ({size / 2**30:.2f} GiB)"
        if self.offload_folder is None:
            raise LoadError(f"{text}: say where, with offload_folder (--offload-folder)")
        folder = Path(self.offload_folder)
        _make(folder)
        if (free := shutil.disk_usage(folder).free) < size:
            raise LoadError(
                f"{text}, and {folder} has {free / 2**30:.2f} GiB left: choose another offload folder, or make room"
            )


def offloaded_bytes(blank: nn.Module, device_map: Mapping[str, Any]) -> int:
    """Bytes of the weights that a map puts on disk."""
    return sum(p.nbytes for name, p in blank.named_parameters() if _placed(name, device_map) == DISK)


def away_bytes(blank: nn.Module, device_map: Mapping[str, Any]) -> int:
    """Bytes of weights that are not in memory during a pass: those on disk but for the largest module's own."""
    disk = {id(p) for name, p in blank.named_parameters() if _placed(name, device_map) == DISK}
    own = (sum(p.nbytes for p in part.parameters(recurse=False) if id(p) in disk) for part in blank.modules())
    return offloaded_bytes(blank, device_map) - max(own, default=0)


@contextmanager
def unwarned() -> Iterator[None]:
    """Within it accelerate does not tell that weights are offloaded, as they were asked to be."""
    log = logging.getLogger("accelerate.big_modeling")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _read(text: str) -> DeviceMap:
    """A name of a map as it is, or the map of a .json file or text.

    Raises:
        LoadError: if it is none.
    """
    if text in (*COMPUTED, DISK):
        return text
    if not text.lstrip().startswith("{") and not text.endswith(".json"):
        try:
            torch.device(text)
        except RuntimeError as error:
            raise LoadError(
                f"device_map={text!r}: choose {', '.join(COMPUTED)}, {DISK}, a device such as cpu or cuda:0, or JSON "
                "with devices by names of modules, as a .json file or text"
            ) from error
        return text
    try:
        found = json.loads(Path(text).read_text(encoding="utf-8") if text.endswith(".json") else text)
    except (OSError, ValueError) as error:
        raise LoadError(f"device_map={text!r} cannot be read ({error}): give JSON such as {EXAMPLE}") from error
    if not isinstance(found, dict) or not all(isinstance(device, str | int) for device in found.values()):
        raise LoadError(f"device_map={text!r} holds no devices by names of modules: write for example {EXAMPLE}")
    return {name: _device(device) for name, device in found.items()}


def _device(given: str | int) -> str | int:
    """A device as accelerate calls it: a card by its number."""
    return int(given) if isinstance(given, str) and given.isdecimal() else given


def _bytes(given: str | int) -> int:
    try:
        return convert_file_size_to_int(given)
    except ValueError as error:
        raise LoadError(f"max_memory={given!r} is no size of memory: write for example 10GiB") from error


def _checked(blank: nn.Module, asked: Mapping[str, str | int]) -> dict[str, Any]:
    """A given map, which has to place every tensor of a model.

    Raises:
        LoadError: naming what it has too much or too little.
    """
    known = {name for name, _ in (*blank.named_modules(), *blank.named_parameters(), *blank.named_buffers())}
    if strange := [name for name in asked if name not in known]:
        has = some([name for name, _ in blank.named_children()])
        raise LoadError(f"device_map names {some(strange)}, which {type(blank).__name__} does not have: it has {has}")
    if missed := [name for name, _ in blank.named_parameters() if _placed(name, asked) is None]:
        raise LoadError(f"device_map does not place {some(missed)} of {type(blank).__name__}: name these modules too")
    found = {name: _device(device) for name, device in asked.items()}
    # accelerate takes a map of one entry for the whole, and no other entry beside it
    return {name: found[""] for name, _ in blank.named_children()} if found == {"": DISK} else found


def _placed(name: str, device_map: Mapping[str, Any]) -> Any:
    """The device of a tensor: that of the longest name that it lies under. None: there is no such name."""
    under = [key for key in device_map if not key or name == key or name.startswith(f"{key}.")]
    return device_map[max(under, key=len)] if under else None


def _whole(blank: Any) -> set[str]:
    """Names of the classes of modules that stay on one device."""
    return set(getattr(blank, "_no_split_modules", None) or ())


def _is_trained_head(blank: nn.Module, name: str) -> bool:
    """Whether a module is part of a classification head of the model's own."""
    if not any(kind in type(blank).__name__ for kind in ("Classification", "QuestionAnswering")):
        return False
    trunk = trunk_of(blank)
    prefix = next((own for own, part in blank.named_modules() if part is trunk), "")
    return bool(prefix) and name != prefix and not name.startswith(f"{prefix}.")


def _make(folder: Path) -> None:
    """Make a folder that can be written to.

    Raises:
        LoadError: if it cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoadError(f"the offload folder {folder} cannot be made ({error}): choose another") from error
    if not os.access(folder, os.W_OK):
        raise LoadError(f"the offload folder {folder} cannot be written to: choose another")
