"""Every example is short, runs offline, and leaves nothing behind where it is run."""

from importlib.util import find_spec
from pathlib import Path

import pytest

import own_process

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

NEEDS = {"chat_with_trl": "trl"}
"""Packages that no extra but the tests' own installs."""


def router_tables(folder: Path) -> Path:
    """Two tables, in the place of the seven that are made of data sets."""
    folder.mkdir()
    for name, labels in (("mood", ("good", "bad")), ("act", ("question", "statement"))):
        lines = [f"a {label} text of {thing},{label}" for thing in ("film", "book", "phone") for label in labels]
        for part in ("train", "dev"):
            (folder / f"{name}.{part}.csv").write_text("\n".join(["text,label", *(3 * lines), ""]))
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_offline(example: Path, tmp_path: Path) -> None:
    if not find_spec(NEEDS.get(example.stem, "sidestep")):
        pytest.skip(f"{NEEDS[example.stem]} is not installed")
    here, scratch = tmp_path / "here", tmp_path / "scratch"
    here.mkdir()
    scratch.mkdir()
    given = [router_tables(tmp_path / "tables")] if example.stem == "router" else []
    done = own_process.run(example, *given, env={"TMPDIR": str(scratch)}, at=here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).strip()
    assert not any(here.iterdir())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) < 60


def test_there_are_examples() -> None:
    assert EXAMPLES
