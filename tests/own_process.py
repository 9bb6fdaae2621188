"""Processes of their own, forked from a server that has imported other packages and nothing of Sidestep.

A new interpreter takes eight seconds to import torch, transformers and what they bring, which is longer than most of
what is tested. Here they are imported once for each worker. Whatever a process needs of Sidestep it imports by itself,
and of the test's state it has nothing but the environment.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

LIBRARIES = [
    "torch",
    "datasets",
    "pandas",
    "safetensors.torch",
    "sklearn.metrics",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
]
"""What the server imports."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""What libraries read when they are imported."""
LIMIT = 600
"""Seconds after which a process counts as stuck."""


def start(
    program: str | Path,
    *arguments: object,
    said: Path | None = None,
    env: Mapping[str, str] | None = None,
    at: Path | None = None,
) -> ForkServerProcess:
    """A process that runs a program.

    Args:
        program: lines of Python, the path of a file, or the name of a module, as of `python -m`.
        arguments: its `sys.argv[1:]`.
        said: what it prints goes to this path with the suffixes ".out" and ".err". None: nowhere.
        env: what differs from the environment of the test.
        at: its working directory. None: the test's.
    """
    words, variables = [str(one) for one in arguments], {**os.environ, **(env or {})}
    process = _server().Process(target=_run, args=(program, words, said, variables, at or Path.cwd()))
    process.start()
    return process


def run(
    program: str | Path, *arguments: object, env: Mapping[str, str] | None = None, at: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The same, waited for: its exit status and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        process = start(program, *arguments, said=said, env=env, at=at)
        code = ended(process)
        out, err = (said.with_suffix(end).read_text(encoding="utf-8") for end in (".out", ".err"))
    return subprocess.CompletedProcess([str(program), *map(str, arguments)], code, out, err)


def ended(process: ForkServerProcess) -> int:
    """The exit status of a process, once it has ended."""
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"process {process.pid} has not ended within {LIMIT} s")
    return process.exitcode


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    before = dict(os.environ)
    os.environ.update(OFFLINE)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _run(program: str | Path, arguments: list[str], said: Path | None, variables: dict[str, str], at: Path) -> None:
    import torch

    gc.freeze()  # the libraries are no garbage, see conftest.py
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update({**variables, **OFFLINE})
    os.chdir(at)
    tempfile.tempdir = None
    for stream, end in ((1, ".out"), (2, ".err")):
        with open(os.devnull if said is None else said.with_suffix(end), "w") as file:
            os.dup2(file.fileno(), stream)
    sys.argv = ["program", *arguments]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    elif "\n" in program:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
