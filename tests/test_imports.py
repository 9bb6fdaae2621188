"""Imports flow one way: a room imports only rooms below it, and nothing goes round in a circle."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sidestep

ROOT = Path(sidestep.__file__).parent

#: The rooms from the bottom up: a room imports only rooms that stand before it.
ROOMS = [
    "messages",
    "versions",
    "ranks",
    "metrics",
    "sparse",
    "interface",
    "methods",
    "backbone",
    "data",
    "disk",
    "fold",
    "model",
    "measure",
    "kinds",
    "tasks",
    "serve",
    "training",
    "compare",
    "console",
    "report",
    "demo",
    "cli",
]

#: Besides the standard library and other methods: a method never sees a Hugging Face class, so it cannot fork one.
FOR_METHODS = {"interface", "sparse", "methods"}
LIBRARIES_FOR_METHODS = {"torch", "einops"}
#: LoRA and its like are PEFT's.
EXTRA_LIBRARIES = {"methods.adapters": {"peft"}}
STANDARD_LIBRARY = {"re", "__future__", "abc", "collections", "dataclasses", "itertools", "math", "typing"}


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name, without the public face."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


SOURCES = sources()


def room(module: str) -> str:
    return module.partition(".")[0]


@cache
def imported(path: Path) -> set[str]:
    """Full dotted names of what a file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            own = {name for name in modules if name.removeprefix("sidestep.") in SOURCES}
            names |= own or {str(node.module)}
    return names


def own_imports(path: Path) -> set[str]:
    return {name.removeprefix("sidestep.") for name in imported(path) if name.startswith("sidestep.")}


def test_every_module_has_its_room() -> None:
    assert {room(module) for module in SOURCES} == set(ROOMS)


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_rooms_below(module: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room(module)) + 1])
    assert {room(name) for name in own_imports(SOURCES[module])} <= allowed
    assert "sidestep" not in imported(SOURCES[module]), "import the module, not the public face"


def test_no_circle_inside_a_room() -> None:
    graph = {
        name: {other for other in own_imports(path) if other in SOURCES} - {name} for name, path in SOURCES.items()
    }
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", SOURCES)
def test_no_file_is_longer_than_can_be_read_in_one_sitting(module: str) -> None:
    assert len(SOURCES[module].read_text().splitlines()) <= 450


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("methods.")])
def test_a_method_sees_no_backbone(module: str) -> None:
    assert {room(name) for name in own_imports(SOURCES[module])} <= FOR_METHODS
    roots = {name.partition(".")[0] for name in imported(SOURCES[module])}
    allowed = LIBRARIES_FOR_METHODS | STANDARD_LIBRARY | {"sidestep"}
    assert roots - allowed == EXTRA_LIBRARIES.get(module, set())


def test_public_names_are_listed_once_and_exist() -> None:
    assert len(sidestep.__all__) == len(set(sidestep.__all__))
    assert all(hasattr(sidestep, name) for name in sidestep.__all__)


def test_errors_that_public_functions_raise_are_public() -> None:
    for name in ("BankError", "DifferentBackbones", "TaskError", "UnsupportedBackbone"):
        assert name in sidestep.__all__
        assert issubclass(getattr(sidestep, name), ValueError)
