"""`sidestep serve`: what it refuses before it reads a backbone, and a stop that answers what waits."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import sidestep as ss
from commands import refusal
from served import LABELS, SINGLE, make_bank, save_task
from sidestep.backbone.load import load_backbone
from small_tasks import text_backbone


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    backbone = load_backbone(text_backbone(tmp_path / "bert"))
    save_task(tmp_path / "read", backbone, ss.ReadConfig(rank=4), SINGLE, "single", LABELS, {}, seed=0)
    return make_bank(tmp_path, tmp_path / "bank", ["read"]).path


def test_a_port_in_use(bank: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = refusal("serve", bank, "--port", taken.getsockname()[1])
    assert "is in use: stop what listens there, or choose another (--port)" in told


def test_a_server_for_others_needs_keys(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIDESTEP_KEYS", "SIDESTEP_CHANGE_KEYS"):
        monkeypatch.delenv(name, raising=False)
    told = refusal("serve", bank, "--host", "0.0.0.0", "--port", 0)
    assert "there are no keys: name a file with them (--keys)" in told
    monkeypatch.setenv("SIDESTEP_KEYS", "short")
    assert "fewer than 16 characters" in refusal("serve", bank, "--host", "0.0.0.0", "--port", 0)


def test_a_bank_that_says_nothing_of_its_backbone(tmp_path: Path) -> None:
    assert "say which it is (--backbone)" in refusal("serve", tmp_path / "none", "--port", 0)
    assert "there is no task" not in refusal("serve", tmp_path / "none", "--port", 0, "--max-rows", 0)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_stop_answers_what_waits(bank: Path) -> None:
    command = [sys.executable, "-m", "sidestep.cli", "serve", str(bank), "--port", "0", "--max-wait-ms", "3000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            first = process.stderr.readline()
            found = re.search(r"1 tasks on bert are served without keys, .* on (http://\S+)", first)
            assert found, first
            url, answers = found[1], list[Any]()
            body = {"task": "read", "inputs": "good"}
            calling = threading.Thread(
                target=lambda: answers.append(httpx.post(f"{url}/v1/predict", json=body, timeout=60))
            )
            calling.start()
            until = time.monotonic() + 60
            while "sidestep_queue_rows 1.0" not in httpx.get(f"{url}/metrics", timeout=60).text:
                assert time.monotonic() < until
            process.send_signal(signal.SIGTERM)
            calling.join(60)
            assert answers[0].status_code == 200
            assert process.wait(60) == 0
            assert "Stopped: all requests" in process.stderr.read()
        finally:
            process.kill()
