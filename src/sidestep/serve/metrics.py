"""What a server counts, as Prometheus reads it. Its registry is its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sidestep.serve.batches import Waiting
from sidestep.serve.problems import Problem
from sidestep.serve.requests import Request
from sidestep.serve.watch import Watch

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NAMESPACE = "sidestep"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics(Watch):
    """Counts of one server.

    Attributes:
        registry: of Prometheus.
        http: requests by address, method and status.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.http = self._counter("http_requests", "Requests by address, method and status", "path", "method", "status")
        self._problems = self._counter("problems", "Problems of requests and rows by their sort", "name")
        self._rows = self._counter("rows", "Answered rows by task", "task")
        self._tokens = self._counter("tokens", "Tokens of answered requests, as often as they are read")
        self._passes = self._counter("passes", "Whole passes of the backbone")
        self._switches = self._counter("switches", "Switches of the active task")
        self._latency = self._histogram("request_seconds", "From a request to its answers, by task", SECONDS, "task")
        self._batches = self._histogram("batch_rows", "Rows of a batch", ROWS)
        self._running = self._histogram("batch_seconds", "What a batch takes", SECONDS)
        self._queue = Gauge("queue_rows", "Rows without an answer", namespace=NAMESPACE, registry=self.registry)
        self._tasks = Gauge("tasks", "Tasks in the bank", namespace=NAMESPACE, registry=self.registry)
        self._named: set[str] = set()

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(name, told, labels, namespace=NAMESPACE, registry=self.registry)

    def _histogram(self, name: str, told: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, told, labels, namespace=NAMESPACE, registry=self.registry, buckets=buckets)

    def text(self) -> bytes:
        """All counts, as Prometheus reads them."""
        return generate_latest(self.registry)

    def queued(self, rows: int) -> None:
        """So many rows have no answer yet."""
        self._queue.set(rows)

    def refused(self, name: str) -> None:
        """A request was refused by a problem of this name."""
        self._problems.labels(name).inc()

    def ran(self, batch: Sequence[Waiting], seconds: float, passes: int, switches: int) -> None:
        """A batch was run, in so many passes and with so many switches of tasks."""
        self._batches.observe(len(batch))
        self._running.observe(seconds)
        self._passes.inc(passes)
        self._switches.inc(switches)

    def answered(self, request: Request) -> None:
        """A request has all its answers."""
        seconds = time.monotonic() - request.began
        self._tokens.inc(request.tokens)
        for found in request.results:
            for name, answer in found.items():
                if isinstance(answer, Problem):
                    self.refused(answer.name)
                else:
                    self._rows.labels(name).inc()
        for name in request.names:
            self._named.add(name)
            self._latency.labels(name).observe(seconds)

    def tasks(self, names: Sequence[str]) -> None:
        """The bank holds these tasks. Those that were removed are counted no longer."""
        self._tasks.set(len(names))
        for name in self._named - set(names):
            self._named.discard(name)
            for counted in (self._rows, self._latency):
                with suppress(KeyError):
                    counted.remove(name)
