"""Texts from the command line as the values that configs and readers take."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from sidestep.data import TableOptions

Config = TypeVar("Config")
Name = TypeVar("Name", str, str | None)
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def config_from(kind: type[Config], pairs: Sequence[str], start: Mapping[str, Any] | None = None) -> Config:
    """The config with the fields that "name=value" texts set, each read as the field's own type. Others are `start`'s.

    Raises:
        ValueError: for an unknown field (the message lists those there are), a value of another type, or one
            that the config refuses.
    """
    hints, values = get_type_hints(kind), dict(start or {})
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ValueError(f"--set {pair}: write name=value, for example --set rank=64")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"--set {pair}: {kind.__name__} has no field {name!r}{hint}: it has {', '.join(known) or 'none'}"
            )
        values[name] = value_of(hints[name], text, f"--set {pair}")
    return kind(**values)


def backbone_named(backbone: Name, gguf: str | None) -> Name:
    """The name of the backbone that --backbone and --gguf ask for.

    Raises:
        ValueError: for --gguf alone.
    """
    from sidestep.backbone.gguf import gguf_name

    if gguf is None:
        return backbone
    if backbone is None:
        raise ValueError(f"--gguf {gguf} without --backbone: say in which folder or hub id the file is")
    return gguf_name(backbone, gguf)


def placed(device_map: str | None, offload_folder: Path | None, max_memory: str | None) -> dict[str, Any]:
    """The arguments of `load_backbone` that --device-map, --offload-folder and --max-memory ask for.

    Raises:
        ValueError: if the latter is not as "0=10GiB,cpu=600MiB".
    """
    limits = None
    if max_memory is not None:
        pairs = [part.partition("=") for part in max_memory.split(",")]
        if not all(equals and device.strip() and size.strip() for device, equals, size in pairs):
            raise ValueError(f"--max-memory {max_memory}: write device=size, for example 0=10GiB,cpu=600MiB")
        limits = {device.strip(): size.strip() for device, _, size in pairs}
    return {"device_map": device_map, "offload_folder": offload_folder, "max_memory": limits}


def value_of(hint: Any, text: str, where: str) -> Any:
    """A text as a value of an annotated type. `where` begins the message if the text is no such value.

    Raises:
        ValueError: if the text is no such value.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        # an unknown choice is left to the config, whose message lists the known ones
        return next((choice for choice in inner if str(choice) == text), text)
    if origin in (Union, types.UnionType):
        if type(None) in inner and text.lower() == "none":
            return None
        return value_of(next(part for part in inner if part is not type(None)), text, where)
    if origin in (tuple, list, Sequence):
        return tuple(value_of(inner[0], part.strip(), where) for part in text.split(","))
    return _plain(hint, text, where)


def _plain(hint: Any, text: str, where: str) -> Any:
    if hint is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError(f"{where}: {text!r} is neither true nor false")
        return BOOLEANS[text.lower()]
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise ValueError(f"{where}: {text!r} is not {kind}") from None
    return text


def unescaped(text: str | None) -> str | None:
    """A text in which a newline and a tab may be written as in Python. Shells do not read them so."""
    return None if text is None else text.replace("\\n", "\n").replace("\\t", "\t")


def table_options(columns: str | None, no_header: bool, no_quoting: bool, encoding: str) -> TableOptions:
    """How the user's tables are written.

    Raises:
        DataError: as `TableOptions`.
    """
    from sidestep.data import TableOptions

    names = None if columns is None else tuple(name.strip() for name in columns.split(","))
    return TableOptions(columns=names, header=not no_header, quoting=not no_quoting, encoding=encoding)


def feature_options(where: str, folder: Path | None, limit: str, precision: str) -> dict[str, Any]:
    """The options of features as fields of `TrainSettings`."""
    from sidestep.measure.plan import memory_of

    return {
        "features": where,
        "features_folder": folder,
        "features_limit": memory_of(limit),
        "features_precision": precision,
    }


def check_batch(size: int | None) -> None:
    """Refuses a batch without rows."""
    if size is not None and size < 1:
        raise ValueError(f"batch_size={size}, but it must be at least 1")
