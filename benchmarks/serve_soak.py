"""Minutes of mixed load on `sidestep serve`, with tasks added and removed, bad clients, and kill -9.

    python benchmarks/serve_soak.py 20      # minutes. A line goes into results/serve_soak.jsonl
    RESULTS=FILE python benchmarks/serve_soak.py 0.5    # a short try

Labels are the names of their tasks, so an answer of another task is seen. 8 clients ask for up to 8 of 32 tasks that
stay and 8 that come and go: each second one of the latter is added or removed. A client stalls in the middle of its
bodies, and one sends broken ones. The server is killed (-9) after a twentieth and a tenth of the time, and started
again. Then every task whose addition was confirmed has to be there, and none whose removal was. Memory is compared
between minute 5 (or 30 % of the time, if that is less) and the end. The run fails if an answer is of another task, if
a task is lost, if a bad body is answered with 5xx, or if memory has grown by more than 5 %.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

import sidestep as ss
from served_bank import RESULTS, TEXT, Process, make_bank, make_tasks, serving, task_names, write

FILE = Path(os.environ.get("RESULTS", RESULTS / "serve_soak.jsonl"))
STAYING, MOVING, CLIENTS, MOST = 32, 8, 8, 8
UNKNOWN = 0.1
"""Share of the requests that also name a task that may not be there."""
KILLS = (0.05, 0.1)
"""When the server is killed, as shares of the time."""
GROWTH = 0.05
BROKEN: tuple[tuple[bytes, str], ...] = (
    (b"{", "application/json"),
    (b'{"inputs": NaN, "task": "task000"}', "application/json"),
    (b'{"inputs": [], "task": "task000"}', "application/json"),
    (b'{"inputs": [{"text": 5}], "task": "task000"}', "application/json"),
    (b'{"inputs": "a", "task": "no such task"}', "application/json"),
    (b'{"inputs": "a", "task": "task000", "more": 1}', "application/json"),
    (b"\xff\xfe\x00", "application/json"),
    (b"inputs=a", "text/plain"),
)


@dataclass
class Soak:
    """A run.

    Attributes:
        server: that is asked.
        tasks: folders by name.
        end: of the run, by `time.monotonic`.
        there: tasks whose addition was confirmed, and removal not begun.
        unsure: tasks whose change a kill may have interrupted.
        down: whether the server is being started again. Its clients' errors do not count then.
        counts, faults: what happened, and what must not.
    """

    server: Process
    tasks: dict[str, Path]
    began: float
    end: float
    there: set[str]
    unsure: set[str] = field(default_factory=set)
    down: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)

    @property
    def running(self) -> bool:
        return time.monotonic() < self.end

    async def asker(self, number: int) -> None:
        chance, moving = random.Random(number), list(self.tasks)[STAYING:]
        async with ss.AsyncClient(self.server.url) as client:
            while self.running:
                if self.down:
                    await asyncio.sleep(0.2)
                    continue
                asked = chance.sample(sorted(self.there), chance.randint(1, MOST))
                if chance.random() < UNKNOWN:
                    asked = list(dict.fromkeys([*asked, chance.choice(moving)]))
                text = " ".join(chance.choices(TEXT.split(), k=chance.randint(1, 60)))
                before, was_down = set(self.there), self.down
                try:
                    found = (await client.predict([text], asked)).rows[0]
                except ss.ServerError as error:
                    sure = set(asked) <= before & self.there - self.unsure
                    if sure and not (was_down or self.down):
                        self.faults.append(f"{asked} were there, and {error}")
                    self.counts["unknown" if error.status == 404 else "refused"] += 1
                    await asyncio.sleep(0.05)
                    continue
                self.check(asked, found)

    def check(self, asked: list[str], found: dict[str, Any]) -> None:
        for name in asked:
            answer = found.get(name, {})
            if "error" in answer and name not in self.there - self.unsure:
                self.counts["unknown"] += 1
            elif not str(answer.get("prediction")).startswith(f"{name}/"):
                self.faults.append(f"{name} was asked, and the answer is {answer}")
            else:
                self.counts["answers"] += 1

    async def changer(self) -> None:
        """Adds or removes a task each second."""
        chance, moving = random.Random(0), list(self.tasks)[STAYING:]
        async with ss.AsyncClient(self.server.url, patience=10) as client:
            while self.running:
                await asyncio.sleep(1)
                name = chance.choice(moving)
                if self.down or name in self.unsure:
                    continue
                self.unsure.add(name)
                try:
                    if name in self.there:
                        self.there.discard(name)
                        await client.remove(name)
                        self.counts["removed"] += 1
                    else:
                        await client.add(name, self.tasks[name])
                        self.there.add(name)
                        self.counts["added"] += 1
                    self.unsure.discard(name)
                except ss.ServerError as error:
                    # killed meanwhile: it is looked at when the server is there again
                    if error.status:
                        self.faults.append(f"{name} was not changed: {error}")

    async def staller(self) -> None:
        """Sends half a body, waits, and goes away."""
        port = int(self.server.url.rpartition(":")[2])
        while self.running:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                writer.write(head + b'Content-Length: 100\r\n\r\n{"inputs": "')
                await writer.drain()
                await asyncio.sleep(5)
                writer.close()
                self.counts["stalled"] += 1
            await asyncio.sleep(0.5)

    async def breaker(self) -> None:
        """Sends bodies that are refused."""
        chance = random.Random(1)
        async with httpx2.AsyncClient(base_url=self.server.url, timeout=60) as http:
            while self.running:
                body, kind = chance.choice(BROKEN)
                try:
                    answer = await http.post("/v1/predict", content=body, headers={"content-type": kind})
                except httpx2.HTTPError:
                    await asyncio.sleep(0.5)  # it is being killed
                    continue
                if not 400 <= answer.status_code < 500 and answer.status_code != 503:
                    self.faults.append(f"{body!r} was answered with {answer.status_code}")
                self.counts["broken"] += 1
                await asyncio.sleep(0.2)

    async def killer(self) -> None:
        for share in KILLS:
            await asyncio.sleep(max(0.0, self.began + share * (self.end - self.began) - time.monotonic()))
            self.down = True
            self.server.kill()
            self.server.start()
            seconds = await asyncio.to_thread(self.server.wait_until_ready)
            self.end += seconds  # the minutes are those in which there is a server
            self.counts["killed"] += 1
            print(f"killed, and ready again after {seconds:.1f} s", flush=True)
            await self.look()
            self.down = False

    async def look(self) -> None:
        """Whether the bank holds what was confirmed, and nothing else."""
        async with ss.AsyncClient(self.server.url) as client:
            names = {task["name"] for task in await client.tasks()}
        if lost := self.there - names - self.unsure:
            self.faults.append(f"lost: {sorted(lost)}")
        if back := names - self.there - self.unsure:
            self.faults.append(f"removed, and there again: {sorted(back)}")
        for name in [*self.unsure]:
            (self.there.add if name in names else self.there.discard)(name)
        self.unsure.clear()

    async def sampler(self) -> None:
        while self.running:
            if not self.down:
                self.memory.append((time.monotonic() - self.began, self.server.mib))
            await asyncio.sleep(1)

    async def run(self) -> None:
        parts: list[Callable[[], Awaitable[None]]] = [
            *(self.changer, self.staller, self.breaker, self.killer, self.sampler),
            *(lambda number=number: self.asker(number) for number in range(CLIENTS)),
        ]
        await asyncio.gather(*(part() for part in parts))
        await self.look()


def level(memory: list[tuple[float, float]], until: float, span: float) -> float:
    """Mean MiB in the span before a moment, or the nearest sample."""
    found = [mib for when, mib in memory if until - span <= when <= until]
    return sum(found) / len(found) if found else min(memory, key=lambda sample: abs(sample[0] - until))[1]


def main(minutes: float) -> list[str]:
    names = task_names(STAYING + MOVING)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tasks = {path.name: path for path in sorted(make_tasks(place / "tasks", names))}
        bank = make_bank(place / "bank", [tasks[name] for name in names[:STAYING]])
        with serving(bank, place / "log.txt") as server:
            began = time.monotonic()
            soak = Soak(server, tasks, began, began + 60 * minutes, set(names[:STAYING]))
            asyncio.run(soak.run())
    seconds = soak.end - began
    mark = min(300.0, 0.3 * seconds)
    span = min(30.0, 0.1 * seconds)
    levels = level(soak.memory, mark, span), level(soak.memory, soak.memory[-1][0], span)
    if levels[1] > (1 + GROWTH) * levels[0]:
        soak.faults.append(f"memory grew from {levels[0]:.0f} to {levels[1]:.0f} MiB")
    write(
        FILE,
        {
            "minutes": minutes,
            **soak.counts,
            "mark_seconds": mark,
            "mib_at_mark": round(levels[0], 1),
            "mib_at_end": round(levels[1], 1),
            "faults": len(soak.faults),
        },
    )
    return soak.faults


if __name__ == "__main__":
    found = main(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0)
    print("\n".join(found[:50]))
    sys.exit(bool(found))
