"""The registry of methods and their configs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

import sidestep as ss
from sidestep.interface import registry, third_parties
from sidestep.methods import MethodConfig, SideNet, method_named, method_of, methods, register
from tiny import FAMILIES


@dataclass(frozen=True, kw_only=True)
class OwnConfig(MethodConfig):
    size: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("size", self.size > 0, "at least 1")


class Own(SideNet):
    """A third party's method.

    With more to say.
    """

    def __init__(self, config: OwnConfig, sites: Any) -> None:
        super().__init__()


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'raed': choose one of bitfit, .*full, .*probe, .*read"):
        method_named("raed")


def test_methods_are_found_by_name_and_by_config() -> None:
    assert method_named("read").config is ss.ReadConfig
    assert method_of(ss.BitFitConfig()).name == "bitfit"
    assert list(methods()) == sorted(methods())


def test_what_is_no_method_config_is_refused_with_the_known() -> None:
    with pytest.raises(TypeError, match=r"OwnConfig\(size=2\) is no method config: pass one of ss\.BitFitConfig"):
        method_of(OwnConfig())
    with pytest.raises(TypeError, match="'read' is no method config"):
        ss.attach(FAMILIES["bert"].model(), "read")


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (ss.LSTConfig(layers=(0, 2)), "layers"),
        (ss.SherlConfig(layers=(0, 2)), "layers"),
        (ss.LoraConfig(targets=("query", "value")), "targets"),
        (ss.DoraConfig(targets=("query",)), "targets"),
        (ss.IA3Config(targets=("key", "fc2"), feedforward=("fc2",)), "feedforward"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_config_read_from_json_equals_the_one_that_was_written(config: MethodConfig, field: str) -> None:
    read = json.loads(json.dumps(config.to_dict()))
    assert isinstance(read[field], list)
    assert type(config).from_dict(read) == config


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match="a method named 'read' is registered already: choose another name"):
        register("read", OwnConfig)(Own)
    assert method_named("read").config is ss.ReadConfig


def test_a_taken_config_is_refused() -> None:
    with pytest.raises(ValueError, match="ReadConfig belongs to the method 'read': give 'own' its own"):
        register("own", ss.ReadConfig)(Own)
    assert "own" not in methods()


def test_a_module_that_is_imported_again_registers_again() -> None:
    register("own", OwnConfig)(Own)
    assert register("own", OwnConfig)(Own) is Own
    assert method_named("own").implementation is Own


@dataclass(frozen=True)
class EntryPoint:
    """Stands for an installed package's entry point: loading it imports the module that registers."""

    def load(self) -> None:
        register("own", OwnConfig)(Own)


def test_an_entry_point_registers_a_third_partys_method(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def entry_points(*, group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint()]

    monkeypatch.setattr(third_parties, "entry_points", entry_points)
    third_parties.import_third_parties.cache_clear()
    assert method_named("own").summary == "A third party's method."
    assert set(asked) == {"sidestep.methods"}
    model = ss.attach(FAMILIES["vit"].model(), OwnConfig(size=3))
    assert isinstance(model.side, Own)


def test_configs_come_back_and_unknown_fields_are_named() -> None:
    assert OwnConfig.from_dict(OwnConfig(size=5).to_dict()) == OwnConfig(size=5)
    with pytest.raises(ValueError, match="OwnConfig has no field rank: it has size"):
        OwnConfig.from_dict({"rank": 5})
    with pytest.raises(ValueError, match="ProbeConfig has no field rank: it has none"):
        ss.ProbeConfig.from_dict({"rank": 5})
    with pytest.raises(ValueError, match="OwnConfig: size=0, but it must be at least 1"):
        OwnConfig.from_dict({"size": 0})


def test_a_refusal_names_the_method_and_the_backbone() -> None:
    class Picky(Own):
        @classmethod
        def check(cls, config: OwnConfig, sites: Any) -> None:
            raise ValueError(f"it needs {config.size} towers")

    register("picky", OwnConfig)(Picky)
    backbone = FAMILIES["bert"].model()
    with pytest.raises(ss.UnsupportedBackbone) as error:
        ss.attach(backbone, OwnConfig())
    assert str(error.value) == "picky does not work on BertForSequenceClassification: it needs 2 towers"
    ss.attach(backbone, ss.ReadConfig(rank=2))
