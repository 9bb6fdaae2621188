"""Imports flow one way: a module imports only what stands before it in `ORDER`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sidestep

ROOT = Path(sidestep.__file__).parent

#: The package from the bottom up. A folder counts as one module, except for the methods and their base.
ORDER = [
    "wording",
    "annotations",
    "sparse_codec",
    "diffs",
    "sites",
    "taps",
    "layers",
    "pruning",
    "hard_concrete",
    "selection",
    "averages",
    "diff_optimizer",
    "families",
    "pixels",
    "backbone",
    "methods.base",
    "methods",
    "turns",
    "fold",
    "metrics",
    "assess",
    "heads",
    "memory",
    "before",
    "trainer_face",
    "model",
    "starts",
    "pair",
    "energy",
    "step",
    "vit_npz",
    "gguf",
    "loading",
    "versions",
    "disk",
    "sources",
    "task_fields",
    "card",
    "store",
    "meters",
    "sums",
    "bank",
    "plan",
    "data",
    "settings",
    "schedules",
    "recipes",
    "callbacks",
    "prepare",
    "results",
    "checkpoints",
    "retrieval",
    "table_files",
    "predict",
    "predict_each",
    "relax",
    "pace",
    "run_checks",
    "notes",
    "train",
    "show",
    "demo_corpus",
    "demos",
    "demo",
    "demo_vision",
    "compare",
    "report",
    "cli",
]

#: Imports inside a function that go the other way, with the reason.
UPWARDS = dict.fromkeys(
    (("model", "store"), ("pair", "store")), "save_pretrained of a model is a shortcut to store.save"
)

#: All that a method may import: it never sees a Hugging Face class, so it cannot fork one.
FOR_METHODS = {
    "annotations",
    "sites",
    "taps",
    "layers",
    "pruning",
    "diffs",
    "hard_concrete",
    "selection",
    "diff_optimizer",
} | {"methods.base"}
LIBRARIES_FOR_METHODS = {"torch", "einops"}
#: The registry finds third parties' methods by entry point; LoRA and its like are PEFT's.
EXTRA_LIBRARIES = {"methods.base": {"importlib"}, "methods.adapters": {"peft"}}
STANDARD_LIBRARY = {"__future__", "abc", "collections", "dataclasses", "itertools", "math", "typing"}


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


def place(module: str) -> str:
    """The entry of `ORDER` that a module belongs to."""
    return module if module == "methods.base" else module.partition(".")[0]


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


def test_every_module_has_its_place() -> None:
    assert {place(module) for module in SOURCES} <= set(ORDER)


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    here = place(module)
    allowed = set(ORDER[: ORDER.index(here)]) | {other for one, other in UPWARDS if one == module}
    if here != "methods.base":
        allowed.add(here)
    assert {place(name) for name in own_imports(SOURCES[module])} <= allowed
    assert "sidestep" not in imported(SOURCES[module]), "import the module, not the public face"


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("methods.")])
def test_a_method_sees_no_backbone(module: str) -> None:
    assert own_imports(SOURCES[module]) <= FOR_METHODS
    roots = {name.partition(".")[0] for name in imported(SOURCES[module])}
    allowed = LIBRARIES_FOR_METHODS | STANDARD_LIBRARY | {"sidestep"}
    assert roots - allowed == EXTRA_LIBRARIES.get(module, set())


def test_every_exception_is_still_needed() -> None:
    for module, other in UPWARDS:
        assert other in own_imports(SOURCES[module])


def test_public_names_are_listed_once_and_exist() -> None:
    assert len(sidestep.__all__) == len(set(sidestep.__all__))
    assert all(hasattr(sidestep, name) for name in sidestep.__all__)


def test_errors_that_public_functions_raise_are_public() -> None:
    for name in ("BankError", "DifferentBackbones", "TaskError", "UnsupportedBackbone"):
        assert name in sidestep.__all__
        assert issubclass(getattr(sidestep, name), ValueError)
