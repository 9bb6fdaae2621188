"""Requests a second, latencies, memory and cold starts of `sidestep serve` with 1 to 256 tasks on all-MiniLM-L6-v2.

    python benchmarks/serve_load.py          # all that is not in results/serve_load.jsonl yet
    python benchmarks/serve_load.py table    # the tables alone
    SECONDS=3 TASKS=1,4 MEMORY=1,4 RESULTS=FILE python benchmarks/serve_load.py    # a short try

Tasks are READ of rank 128 with random values and 2 to 8 classes. 16 clients in one process send one row each and wait
for the answer, for SECONDS (20) behind a second of warming up. The server, the clients and the model share the cores
of the machine. CPU time is the server's own, whatever else runs. "one" is a request to one task at random, as teams
with a task each send them. "all" asks all tasks for a row. The rival is `peft_server.py`, a FastAPI server by hand:
LoRA of rank 8 on query and value, by `set_adapter`.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import sidestep as ss
from served_bank import RESULTS, TEXT, Process, free_port, make_bank, make_tasks, process, serving, task_names
from served_bank import write as append
from served_bank import written as lines_of

FILE = Path(os.environ.get("RESULTS", RESULTS / "serve_load.jsonl"))
SECONDS = float(os.environ.get("SECONDS", "20"))
TASKS = [int(count) for count in os.environ.get("TASKS", "1,16,64").split(",")]
MEMORY = [int(count) for count in os.environ.get("MEMORY", "1,64,256").split(",")]
CLIENTS, WARMING, COLD = 16, 1.0, 10
MODES = ("one", "all")


def quantile(values: list[float], share: float) -> float | None:
    """In milliseconds. None: no request was answered in the time."""
    ordered = sorted(values)
    return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


async def load(server: Process, names: list[str], mode: str) -> dict[str, float | None]:
    """Clients that ask in a closed loop."""
    latencies: list[float] = []
    every, cpu, began = 0, server.cpu_seconds, time.perf_counter()
    start, end = began + WARMING, began + WARMING + SECONDS

    async def ask(number: int) -> None:
        nonlocal every
        chance = random.Random(number)
        async with ss.AsyncClient(server.url) as client:
            while (sent := time.perf_counter()) < end:
                asked = [chance.choice(names)] if mode == "one" else names
                found = await client.predict([TEXT], asked)
                if sorted(found.rows[0]) != sorted(asked) or any("error" in one for one in found.rows[0].values()):
                    raise RuntimeError(f"{asked} were asked, and the answer is {found.rows[0]}")
                every += 1
                if sent >= start:
                    latencies.append(time.perf_counter() - sent)

    await asyncio.gather(*map(ask, range(CLIENTS)))
    return {
        "requests_per_second": len(latencies) / SECONDS,
        "answers_per_second": len(latencies) / SECONDS * (1 if mode == "one" else len(names)),
        **{f"p{share}_ms": quantile(latencies, share / 100) for share in (50, 95, 99)},
        "cpu_ms_per_request": 1000 * (server.cpu_seconds - cpu) / every,
        "requests": len(latencies),
    }


def by_hand(count: int, log: Path) -> AbstractContextManager[Process]:
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("peft_server.py")), str(count), str(port)]
    return process(command, f"http://127.0.0.1:{port}", log)


def cold(server: Process, tasks: list[Path]) -> dict[str, float]:
    """Milliseconds to add a task over HTTP, of its first answer, and of a later one."""
    found: dict[str, list[float]] = {"add_ms": [], "first_ms": [], "later_ms": []}
    with ss.Client(server.url) as client:
        for task in tasks:
            for part, call in (
                ("add_ms", lambda task=task: client.add(task.name, task)),
                ("first_ms", lambda task=task: client.predict(TEXT, task.name)),
                ("later_ms", lambda task=task: client.predict(TEXT, task.name)),
            ):
                began = time.perf_counter()
                call()
                found[part].append(1000 * (time.perf_counter() - began))
    return {part: statistics.median(values) for part, values in found.items()}


def study(place: Path) -> None:
    done = {(line["study"], line["server"], line["tasks"], line.get("mode")) for line in lines_of(FILE)}
    names = task_names(max(*TASKS, *MEMORY) + COLD)
    tasks = sorted(make_tasks(place / "tasks", names))
    log = place / "log.txt"

    def note(study: str, server: str, count: int, mode: str | None, values: dict[str, float]) -> None:
        values = {name: None if value is None else round(value, 3) for name, value in values.items()}
        append(FILE, {"study": study, "server": server, "tasks": count, "mode": mode, **values})

    for count in sorted({*TASKS, *MEMORY}):
        modes = [mode for mode in MODES if count in TASKS and ("load", "sidestep", count, mode) not in done]
        memory = count in MEMORY and ("memory", "sidestep", count, None) not in done
        starts = count == TASKS[0] and ("cold", "sidestep", count, None) not in done
        if modes or memory or starts:
            bank = make_bank(place / f"bank{count}", tasks[:count])
            with serving(bank, log) as server:
                with ss.Client(server.url) as client:
                    client.predict(TEXT, names[:count])  # all of them are in memory then
                if memory:
                    note("memory", "sidestep", count, None, {"mib": server.mib})
                for mode in modes:
                    note("load", "sidestep", count, mode, asyncio.run(load(server, names[:count], mode)))
                if starts:
                    note("cold", "sidestep", count, None, cold(server, tasks[-COLD:]))
        rivals = [mode for mode in MODES if count in TASKS and ("load", "peft", count, mode) not in done]
        if rivals:
            with by_hand(count, log) as server:
                for mode in rivals:
                    note("load", "peft", count, mode, asyncio.run(load(server, names[:count], mode)))


def table() -> None:
    found: list[dict[str, Any]] = lines_of(FILE)
    print("| server | tasks | asked | requests/s | answers/s | p50, ms | p95, ms | p99, ms | CPU, ms a request |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for line in (line for line in found if line["study"] == "load"):
        times = " | ".join("" if (one := line[f"p{share}_ms"]) is None else f"{one:.0f}" for share in (50, 95, 99))
        rates = f"{line['requests_per_second']:.1f} | {line['answers_per_second']:.0f}"
        cpu = f"{line['cpu_ms_per_request']:.1f}"
        print(f"| {line['server']} | {line['tasks']} | {line['mode']} | {rates} | {times} | {cpu} |")
    for line in (line for line in found if line["study"] == "memory"):
        print(f"{line['tasks']} tasks: {line['mib']:.0f} MiB resident")
    for line in (line for line in found if line["study"] == "cold"):
        print(f"added in {line['add_ms']:.0f} ms, first answer in {line['first_ms']:.0f}, later {line['later_ms']:.0f}")


if __name__ == "__main__":
    if sys.argv[1:] != ["table"]:
        with tempfile.TemporaryDirectory() as folder:
            study(Path(folder))
    table()
