"""What a line of a results file may hold: whatever reads a record can count on it.

A table says what each value that is computed with may be. All other values are shown as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]

HALF = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair: no file can hold it."""

DEEPEST = 50
"""How many lists and tables may lie within each other."""
LARGEST = 1e150
"""Of numbers: sums of their squares are finite."""


def is_text(value: Any) -> bool:
    """Whether it is a text that can be written to a file."""
    return isinstance(value, str) and not HALF.search(value)


def is_number(value: Any) -> bool:
    """Whether it is a finite number that can be computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def is_size(value: Any) -> bool:
    """Whether it is a number of bytes, seconds or the like."""
    return is_number(value) and value >= 0


def is_shown(value: Any) -> bool:
    """Whether it can be shown: any JSON value whose texts are texts, and that is not nested without end."""
    return _is_shown(value, DEEPEST)


def _is_shown(value: Any, left: int) -> bool:
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else None
    if parts is None:
        return is_text(value) or not isinstance(value, str)
    return left > 0 and all(_is_shown(part, left - 1) for part in parts)


def maybe(check: Check) -> Check:
    """The check, or None."""
    return lambda value: value is None or check(value)


def table(**fields: Check) -> Check:
    """The check of a table: each named field passes. A missing field counts as None."""
    return lambda value: isinstance(value, dict) and all(check(value.get(name)) for name, check in fields.items())


def rows(check: Check) -> Check:
    """The check of a list: each item passes."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def named(check: Check) -> Check:
    """The check of a table: each value passes."""
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


_name, _number, _size = maybe(is_text), maybe(is_number), maybe(is_size)
_SIZES = (
    "parameters",
    "task_bytes",
    "kept_bytes",
    "peak_bytes",
    "resident_bytes",
    "model_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "flops",
    "energy_joules",
    "inference_peak_bytes",
    "planned_peak_bytes",
)
_TIMES = ("step_seconds", "forward_seconds", "inference_seconds")
_SPREAD = maybe(table(median=_size, low=_size, high=_size))
_EPOCHS = maybe(rows(table(epoch=_number, loss=_number, dev_loss=_number, score=_number)))
_RUN = {
    "metric": is_text,
    "score": is_number,
    "history": _EPOCHS,
    "parameters": _size,
    "constant": maybe(named(_number)),  # files of before have none
}

OF_ALL: Mapping[str, Check] = {
    "key": is_text,
    "reason": _name,
    "versions": named(_name),
    "machine": table(memory_bytes=_size),
    "date": is_text,
    "seconds": is_size,
}
SETTINGS: Mapping[str, Mapping[str, Check]] = {
    "cost": {"score_of": _name},
    "trial": {"task": is_text},
    "score": {"task": is_text},
}
MEASURED: Mapping[str, Check] = {
    "cost": table(
        **dict.fromkeys(_SIZES, _size),
        **dict.fromkeys(_TIMES, _SPREAD),
        kept_by_module=maybe(named(is_size)),
    ),
    "trial": table(**_RUN),
    "score": table(**_RUN),
}


def is_line(values: Mapping[str, Any]) -> bool:
    """Whether a line whose kind and status are known holds what its kind has to hold."""
    settings = table(
        backbone=is_text,
        contender=is_text,
        method=is_text,
        seed=lambda value: _name(value) or is_number(value),
        config=maybe(table()),
        **SETTINGS[values["kind"]],
    )
    came_out = MEASURED[values["kind"]] if values["status"] == "ok" else _is_none
    return is_shown(values) and table(**OF_ALL, settings=settings, measured=came_out)(values)


def _is_none(value: Any) -> bool:
    return value is None
