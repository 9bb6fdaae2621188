"""Checks whether a value is what an annotation says, and puts annotations in words, for configs and JSON files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


@dataclass(frozen=True)
class Rule:
    """What an annotation cannot say: in words, and as a function of the value."""

    words: str
    allows: Callable[[Any], bool]


def check_fields(config: Any) -> None:
    """Raise unless each field of a frozen dataclass is what its annotation says.

    Where the field is a tuple, a list becomes one. Where the field is an int, a whole decimal number becomes one. So a
    config read from JSON or TOML equals the one that was written.

    Raises:
        ValueError: with the field, what it was given and what it may be.
    """
    for name, kind in _annotations(type(config)).items():  # type: ignore[arg-type] # mypy: no type is Hashable
        given = getattr(config, name)
        value = _as_declared(given, kind)
        if not fits(value, kind):
            raise ValueError(f"{type(config).__name__}: {name}={given!r}, but it must be {worded(kind, null='None')}")
        object.__setattr__(config, name, value)


def from_fields(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The config with these fields.

    Raises:
        ValueError: if a field is unknown, lacking or out of range.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := values.keys() - known.keys():
        raise ValueError(
            f"{kind.__name__} has no field {', '.join(sorted(unknown))}: it has {', '.join(known) or 'none'}"
        )
    required = {name for name, field in known.items() if field.default is field.default_factory is MISSING}
    if lacking := required - values.keys():
        raise ValueError(f"{kind.__name__} needs {', '.join(sorted(lacking))}")
    return kind(**values)


@cache
def _annotations(kind: type) -> dict[str, Any]:
    """The annotations of a config's fields."""
    try:
        hints = get_type_hints(kind, include_extras=True)
    except NameError:  # of another package, which imports its types for a type checker alone
        hints = {}
    return {field.name: hints.get(field.name, Any) for field in fields(kind)}


def _as_declared(value: Any, kind: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    is_whole = isinstance(value, float) and value.is_integer() and not fits(value, kind)
    return int(value) if is_whole and fits(int(value), kind) else value


def fits(value: Any, kind: Any) -> bool:
    """Whether a value out of JSON is what an annotation says, where a list may stand for a tuple.

    True is no number here, and neither infinity nor NaN is a float. An annotation that is not known fits everything.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return fits(value, args[0]) and all(rule.allows(value) for rule in args[1:] if isinstance(rule, Rule))
    if origin is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in args)
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple) and _fit_each(value, origin, args)
    if origin in (dict, Mapping):
        is_dict = isinstance(value, dict)
        return is_dict and all(fits(key, args[0]) and fits(inner, args[1]) for key, inner in value.items())
    return _is_plain(value, kind)


def _fit_each(values: Sequence[Any], origin: Any, args: tuple[Any, ...]) -> bool:
    if origin is tuple and args[1:] != (...,):
        return len(values) == len(args) and all(map(fits, values, args))
    return all(fits(value, args[0]) for value in values)


def _is_plain(value: Any, kind: Any) -> bool:
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (None, NoneType):
        return value is None
    return isinstance(value, kind) if kind in (bool, str) else True


def worded(kind: Any, null: str = "null") -> str:
    """An annotation in words, with `null` for None."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return next((rule.words for rule in args[1:] if isinstance(rule, Rule)), worded(args[0], null))
    if origin in (Literal, Union, UnionType):
        *most, last = _choices(kind, null)
        return f"{', '.join(most)} or {last}" if most else last
    if origin is tuple and args[1:] != (...,):
        return f"a list of {len(args)}: {', '.join(worded(arg, null) for arg in args)}"
    if origin in (tuple, list, Sequence):
        return f"a list of which each is {worded(args[0], null)}"
    if origin in (dict, Mapping):
        return f"an object whose keys are {worded(args[0], null)} and whose values are {worded(args[1], null)}"
    plain = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false", NoneType: null}
    return plain.get(kind, "anything")


def _choices(kind: Any, null: str) -> list[str]:
    """Each of what an annotation allows, in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return [json.dumps(allowed) for allowed in args]
    return (
        [word for arg in args for word in _choices(arg, null)] if origin in (Union, UnionType) else [worded(kind, null)]
    )
