"""A server for the tests of this folder, which know its address alone. With `--engine ray` it is one on Ray Serve."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from served import KINDS, METHODS, make_bank, make_tasks, serving
from served_on_ray import on_ray

SERVED = (*METHODS, *KINDS, "short")


@dataclass(frozen=True)
class Server:
    """A server on a bank of tiny tasks.

    Attributes:
        url: of the server.
        tasks: folder of the tasks' folders, with the backbone as "bert".
        bank: folder of the bank.
    """

    url: str
    tasks: Path
    bank: Path


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(tasks: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Server]:
    bank = make_bank(tasks, tmp_path_factory.mktemp("bank"), SERVED)
    start = on_ray if pytestconfig.getoption("--engine") == "ray" else serving
    with start(bank, tasks / "bert") as url:
        yield Server(url, tasks, bank.path)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        deadline = time.monotonic() + 600
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < deadline, "the server is not ready"
            time.sleep(0.05)
        yield client
