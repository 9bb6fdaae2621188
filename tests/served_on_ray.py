"""A bank on Ray Serve: two replicas on this machine, reached as a server is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from sidestep.tasks.bank_folder import BankFolder

REPLICAS = 2
PATIENCE = 600
"""Seconds for replicas to import their packages, on machines with other work."""


@contextmanager
def on_ray(bank: BankFolder, backbone: Path) -> Iterator[str]:
    """A cluster of this machine alone, by its address."""
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'sidestep[ray]')")
    os.environ.setdefault("RAY_worker_register_timeout_seconds", str(PATIENCE))
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nothing but this machine reaches it
    import ray
    from ray import serve

    from sidestep.cli.serve import listening
    from sidestep.serve.ray import Arguments, deployment

    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
    # two replicas, a proxy and a controller, however many cores there are
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        arguments = Arguments(
            bank=str(bank.path), backbone=str(backbone), replicas=REPLICAS, cpus=0.5, without_keys=True
        )
        serve.run(deployment(arguments), name="sidestep")
        url = f"http://127.0.0.1:{port}"
        _wait(url)
        yield url
    finally:
        serve.shutdown()
        ray.shutdown()


def _wait(url: str) -> None:
    """Until both replicas are ready: a request reaches either of them."""
    end, in_a_row = time.monotonic() + PATIENCE, 0
    with httpx.Client(base_url=url, timeout=60) as http:
        while in_a_row < 20:
            in_a_row = in_a_row + 1 if http.get("/ready").status_code == 200 else 0
            assert time.monotonic() < end, "the replicas are not ready"
            time.sleep(0.05)
