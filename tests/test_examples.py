"""Every example is short, runs offline, and leaves nothing behind where it is run."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

NEEDS = {"chat_with_trl": "trl"}
"""Packages that no extra but the tests' own installs."""

RUN_EACH = """
import json, os, runpy, sys, tempfile
import datasets, torch, transformers.trainer, sidestep.compare.runs, sidestep.training.run
found = {}
for example, here, arguments in json.loads(sys.argv[1]):
    pid = os.fork()  # each in a process of its own, which need not import the libraries again
    if pid == 0:
        os.chdir(here)
        tempfile.tempdir = None
        os.environ["TMPDIR"] = here + "-scratch"
        with open(here + ".txt", "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            code = 1
            sys.argv = [example, *arguments]
            try:
                runpy.run_path(example, run_name="__main__")
                code = 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    found[example] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps(found))
"""


def router_tables(folder: Path) -> Path:
    """Two tables, in the place of the seven that are made of data sets."""
    folder.mkdir()
    for name, labels in (("mood", ("good", "bad")), ("act", ("question", "statement"))):
        lines = [f"a {label} text of {thing},{label}" for thing in ("film", "book", "phone") for label in labels]
        for part in ("train", "dev"):
            (folder / f"{name}.{part}.csv").write_text("\n".join(["text,label", *(3 * lines), ""]))
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the examples are run in forked processes")
@pytest.mark.parametrize("part", [0, 1], ids=["even", "odd"])
def test_examples_run_offline(part: int, tmp_path: Path) -> None:
    examples = [one for one in EXAMPLES[part::2] if find_spec(NEEDS.get(one.stem, "sidestep"))]
    folders = [tmp_path / one.stem for one in examples]
    for folder in folders:
        folder.mkdir()
        Path(f"{folder}-scratch").mkdir()
    given = {"router": [str(router_tables(tmp_path / "tables"))]}
    runs = zip(examples, folders, strict=True)
    told = json.dumps([(str(one), str(folder), given.get(one.stem, [])) for one, folder in runs])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN_EACH, told]
    run = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    codes = json.loads(run.stdout.splitlines()[-1])
    for example, folder in zip(examples, folders, strict=True):
        said = Path(f"{folder}.txt").read_text(encoding="utf-8")
        assert codes[str(example)] == 0, said
        assert said.strip()
        assert not any(folder.iterdir())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) < 60


def test_there_are_examples() -> None:
    assert EXAMPLES
