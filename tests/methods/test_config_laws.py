"""What holds of the config of every method and head: JSON gives it back, and a value that it cannot take is named."""

from __future__ import annotations

import json
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestep.methods import methods
from sidestep.model.heads import HEADS, head_from_dict

#: The classes, and how they are made of what JSON holds.
CONFIGS = {method.config: method.config.from_dict for method in methods().values()}
CONFIGS |= dict.fromkeys(HEADS.values(), head_from_dict)
REQUIRED = {HEADS[name]: {"num_labels": 2} for name in ("Answer", "Classify", "Tag")}
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-1, 40) | st.integers() | st.integers(-1, 40).map(float),
    float: st.floats(0, 2) | st.floats() | st.integers(),
    bool: st.booleans(),
    str: st.text(max_size=5),
    NoneType: st.none(),
}
fewer = settings(max_examples=settings().max_examples // 4)
each_config = pytest.mark.parametrize(
    "kind", [kind for kind in CONFIGS if fields(kind)], ids=lambda kind: kind.__name__
)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation, whether a config takes them or not."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, UnionType):
        return st.one_of(*map(values_of, args))
    if origin is tuple and args[1:] != (...,):
        return st.tuples(*map(values_of, args))
    if origin is not None:
        some = st.lists(values_of(args[0]), max_size=4)
        return some | some.map(tuple) | some.map(lambda found: sorted(set(found)))
    return PLAIN[kind]


anything = st.recursive(
    st.one_of(*PLAIN.values()) | st.sampled_from((10**400, b"x", 1j, object(), "none", "gru")),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


def assert_comes_back_or_is_refused(kind: type, values: dict[str, Any]) -> None:
    message = ""
    try:
        config = kind(**REQUIRED.get(kind, {}) | values)
    except ValueError as error:
        message = str(error)
    if message:
        assert any(field in message for field in values), message
    else:
        back = CONFIGS[kind](json.loads(json.dumps(config.to_dict(), allow_nan=False)))
        assert (back, hash(back)) == (config, hash(config))  # whole also if it was given lists


@each_config
@fewer
@given(data=st.data())
def test_values_of_its_fields_types_come_back_or_are_refused(kind: type, data: st.DataObject) -> None:
    hints = get_type_hints(kind)
    names = data.draw(st.lists(st.sampled_from([field.name for field in fields(kind)]), unique=True))
    assert_comes_back_or_is_refused(kind, {name: data.draw(values_of(hints[name]), label=name) for name in names})


@each_config
@fewer
@given(data=st.data())
def test_any_value_of_a_field_comes_back_or_is_refused_by_name(kind: type, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([field.name for field in fields(kind)]))
    assert_comes_back_or_is_refused(kind, {name: data.draw(anything)})
