"""The core of a server, without a web framework: requests of any size become batches for a bank, on one thread.

Rows are decoded and tokenised by reading threads. One thread alone has the bank, because a model is not safe for
threads. Between batches it also adds and removes tasks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, TypeVar

from sidestep.disk.task_folder import TaskError
from sidestep.serve.batches import Lanes, Room, Waiting
from sidestep.serve.forms import Answer, Form, Known
from sidestep.serve.known import KnownTasks
from sidestep.serve.problems import Problem
from sidestep.serve.requests import Request, Way
from sidestep.serve.running import Asked, failure, run, unusable
from sidestep.serve.settings import ServeSettings
from sidestep.serve.watch import Watch
from sidestep.tasks.bank import TaskBank

log = logging.getLogger("sidestep.serve")
Result = TypeVar("Result")


class Core:
    """Answers requests from a bank. `start` it first, and `close` it in the end.

    Attributes:
        bank: of the tasks. Nobody else uses it meanwhile.
        settings: limits and times.
        known: what is known of the tasks.
        watch: is told what happens.
    """

    def __init__(self, bank: TaskBank, settings: ServeSettings | None = None, watch: Watch | None = None) -> None:
        self.bank, self.settings, self.watch = bank, settings or ServeSettings(), watch or Watch()
        self.known = KnownTasks(bank, self.settings)
        self._lanes = Lanes(self.settings)
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._change = threading.Condition()
        # slow tasks that write must not take the room of the others
        self._rooms = {writes: Room(self.settings.queue) for writes in (False, True)}
        self._open: set[Request] = set()
        self._state: Literal["new", "open", "draining", "closed"] = "new"
        self._warm = False
        self._readers = ThreadPoolExecutor(self.settings.readers, "sidestep-read")
        self._threads = [
            threading.Thread(target=work, name=f"sidestep-{name}", daemon=True)
            for name, work in (("model", self._work), ("poll", self._poll))
        ]

    # --- life --------------------------------------------------------------------------------------------------------

    def start(self, *, warm: bool = True) -> None:
        """Begin to answer. With `warm`, all tasks are read now, and `ready` is true when they are."""
        self._state = "open"
        for thread in self._threads:
            thread.start()
        if warm:
            for name in self.bank.names:
                self._on_model(partial(self.known.learn, name))
        self._on_model(lambda: setattr(self, "_warm", True))

    @property
    def ready(self) -> bool:
        """Whether requests are answered at once."""
        return self._state == "open" and self._warm

    @property
    def alive(self) -> bool:
        """Whether the thread that has the bank runs."""
        return self._state in ("open", "draining") and self._threads[0].is_alive()

    @property
    def waiting(self) -> int:
        """Rows that have no answer yet."""
        return sum(room.taken for room in self._rooms.values())

    def close(self) -> None:
        """Answer what waits for at most `drain_seconds`, then refuse the rest. The backbone is bare afterwards."""
        with self._change:
            if self._state in ("new", "closed"):
                self._state = "closed"
                return
            self._state = "draining"
            self._change.notify_all()
            self._change.wait_for(lambda: not self.waiting, self.settings.drain_seconds)
            self._state = "closed"
            self._lanes.clear()
            for request in self._open:
                request.fail(_stopping())
            self._change.notify_all()
        self._readers.shutdown(wait=True, cancel_futures=True)
        for thread in self._threads:
            thread.join()
        self.bank.close()

    # --- requests ----------------------------------------------------------------------------------------------------

    def ask(self, request: Request) -> Future[Request]:
        """Let a request wait for its answers. `cancel` it if nobody waits for it any more.

        Raises:
            Problem: if a task is not in the bank, there are too many rows or tasks, or the queue is full. Nothing runs
                then.
        """
        self._check(request)
        request.writes = any(map(self.known.writes, request.names))
        room = self._rooms[request.writes]
        with self._change:
            if self._state != "open":
                raise _stopping()
            if room.taken + len(request.rows) > room.limit:
                self.watch.refused("queue-full")
                raise Problem(
                    "queue-full",
                    f"{room.taken} rows are waiting, and {room.limit} may",
                    f"Try again in {room.seconds} s",
                    retry_after=room.seconds,
                )
            room.taken += len(request.rows)
            self._open.add(request)
        self.watch.queued(self.waiting)
        try:
            self._readers.submit(self._read, request)
        except RuntimeError as error:  # closed meanwhile
            self._give_back(request)
            raise _stopping() from error
        return request.done

    def cancel(self, request: Request) -> None:
        """Nobody waits for a request: its rows leave the queue."""
        request.gone = True
        with self._change:
            for waiting in self._lanes.drop():
                self._settle(waiting, {})

    def task(self, name: str) -> Known:
        """What is known of a task.

        Raises:
            Problem: if the bank holds none of this name, or it cannot be used.
        """
        try:
            return self.known.get(name) or self._on_model(lambda: self.known.learn(name)).result()
        except Exception as error:  # whatever a task's files hold is told as that task's problem
            if name not in self.bank.names:
                raise self.unknown(name) from error
            raise unusable(name, error, self.known) from error

    def unknown(self, name: str) -> Problem:
        """The problem that the bank holds no task of a name. It says which are near."""
        try:
            self.bank.store.folder(name)
        except TaskError as error:
            told = str(error).removeprefix(f"{self.bank.store.path} ")
            return Problem("unknown-task", f"the bank {told}", "Name one of the tasks that GET /v1/tasks lists")
        return Problem("task-removed", f"the task {name!r} has just been changed", "Send the request again")

    # --- tasks -------------------------------------------------------------------------------------------------------

    def change(self, work: Callable[[TaskBank], Result]) -> Future[Result]:
        """Have the bank changed between two batches: `work` is called with it, bare."""

        def bare() -> Result:
            self.bank.deactivate()
            try:
                return work(self.bank)
            finally:
                self._tidy()

        return self._on_model(bare)

    # --- reading -----------------------------------------------------------------------------------------------------

    def _check(self, request: Request) -> None:
        limits = self.settings
        if len(request.rows) > limits.request_rows:
            raise Problem(
                "too-many-rows",
                f"{len(request.rows)} rows, and a request may have {limits.request_rows}",
                "Send them in several requests",
            )
        names = request.names
        if len(names) > limits.request_tasks:
            raise Problem(
                "too-many-tasks",
                f"{len(names)} tasks, and a request may name {limits.request_tasks}",
                "Ask for them in several requests",
            )
        for name in names:
            if request.way == "embeddings" and name == self.known.backbone:
                continue
            try:
                self.bank.store.folder(name)
            except (TaskError, ValueError, OSError) as error:
                raise self.unknown(name) from error

    def _read(self, request: Request) -> None:
        """Encode a request's rows, and let them wait. On a reading thread."""
        try:
            rows, limit = self._encoded(request), self.settings.request_tokens
            request.tokens = sum(row.piece.tokens for row in rows)
            if request.tokens > limit:
                raise Problem(
                    "too-many-tokens",
                    f"{request.tokens} tokens, and a request may have {limit}",
                    "Send the rows in several requests, or shorten them",
                )
        except Exception as error:  # the reading thread goes on, and the caller gets an answer
            self._give_back(request)
            request.fail(error if isinstance(error, Problem) else failure(error))
            return
        request.times["read"] = 1000 * (time.monotonic() - request.began)
        with self._change:
            request.left = len(rows)
            if self._state == "closed":
                request.fail(_stopping())
            elif rows and not request.gone:
                self._lanes.put(rows)
                self._change.notify_all()
                return
        self._give_back(request)
        request.finish()

    def _encoded(self, request: Request) -> list[Waiting]:
        """The rows as their tasks read them. Problems of rows and tasks are in the results."""
        forms: dict[Form, dict[int, list[str]]] = {}
        for name in request.names:
            places = [place for place, row in enumerate(request.tasks) if name in row]
            try:
                form = self._form(name, request.way)
            except Problem as problem:
                for place in places:
                    request.results[place][name] = problem
                continue
            for place in places:
                forms.setdefault(form, {}).setdefault(place, []).append(name)
        waiting: list[Waiting] = []
        for form, asked in forms.items():
            pieces = form.read([request.rows[place] for place in asked])
            for (place, names), piece in zip(asked.items(), pieces, strict=True):
                if not isinstance(piece, Problem) and piece.cut and request.too_long == "refuse":
                    piece = Problem(
                        "too-long",
                        f"the row has more than the {piece.tokens} tokens that are read",
                        'Shorten it, or let it be cut ("too_long": "cut")',
                    )
                if isinstance(piece, Problem):
                    request.results[place] |= dict.fromkeys(names, piece)
                    continue
                if piece.cut:
                    request.cut[place].update(names)
                waiting.append(Waiting(request, place, form, piece, names))
        return waiting

    def _form(self, name: str, way: Way) -> Form:
        if way == "answers":
            known = self.task(name)
            if known.form is None:
                raise Problem("wrong-endpoint", f"{name!r} is not answered here: {known.refused}", "See GET /v1/tasks")
            return known.form
        if name == self.known.backbone and name not in self.bank.names:
            try:
                known = self._on_model(self.known.pooled).result()
            except ValueError as error:
                raise Problem(
                    "wrong-endpoint", f"{name!r} gives no embeddings: {error}", "Name another model"
                ) from error
        else:
            known = self.task(name)
        if known.embeds is None:
            raise Problem(
                "wrong-endpoint",
                f"{name!r} predicts {known.kind.name}, and gives no embeddings",
                f"Name a task of retrieval, or {self.known.backbone!r} for the bare backbone's",
            )
        return known.embeds

    # --- the thread that has the bank --------------------------------------------------------------------------------

    def _on_model(self, work: Callable[[], Result]) -> Future[Result]:
        future: Future[Result] = Future()
        with self._change:
            if self._state == "closed":
                future.set_exception(_stopping())
            else:
                self._jobs.append((work, future))
                self._change.notify_all()
        return future

    def _work(self) -> None:
        while True:
            with self._change:
                batch: list[Waiting] = []
                while not self._jobs and not (batch := self._lanes.take(hurry=self._state != "open")):
                    if self._state == "closed":
                        return
                    self._change.wait(self._lanes.until())
                job = self._jobs.popleft() if self._jobs else None
            if job is not None:
                _do(*job)
            elif batch:
                self._run(batch)

    def _run(self, batch: list[Waiting]) -> None:
        began, switches = time.monotonic(), self.bank.switches
        asked = [Asked(row.piece, row.tasks, row.request.probabilities) for row in batch]
        try:
            found = run(batch[0].form, asked, self.known)
        except Exception as error:  # the thread that has the model goes on
            problem = failure(error)
            found = [dict.fromkeys(row.tasks, problem) for row in batch]
        seconds = time.monotonic() - began
        self._rooms[batch[0].form.writes].ran(len(batch), seconds)
        self.watch.ran(batch, seconds, self.bank.together.passes, self.bank.switches - switches)
        for request in dict.fromkeys(row.request for row in batch):
            request.times["run"] += 1000 * seconds
        with self._change:
            for row, answers in zip(batch, found, strict=True):
                times = row.request.times
                times["wait"] = max(times["wait"], 1000 * (began - row.since))
                self._settle(row, answers)

    def _settle(self, row: Waiting, answers: Mapping[str, Answer | Problem]) -> None:
        """Give a row's answers to its request. The lock is held."""
        request = row.request
        request.settle(row.row, answers)
        if request.left == 0:
            if not request.gone:
                self.watch.answered(request)
            request.finish()
            self._leave(request)

    def _give_back(self, request: Request) -> None:
        with self._change:
            self._leave(request)

    def _leave(self, request: Request) -> None:
        """A request makes room for others. The lock is held."""
        if request in self._open:
            self._open.discard(request)
            self._rooms[request.writes].taken -= len(request.rows)
            self._change.notify_all()

    # --- the folder, which other processes may change ----------------------------------------------------------------

    def _poll(self) -> None:
        """Forget tasks that are gone, and learn those that are new. On a thread of its own."""
        tried = set(self.bank.names)
        while True:
            with self._change:
                if self._change.wait_for(lambda: self._state == "closed", self.settings.poll_seconds):
                    return
            try:
                names = self.bank.names
            except OSError as error:
                log.error("the bank's folder cannot be read: %s", error.strerror)
                continue
            self.watch.tasks(names)
            if tried - set(names):
                self._on_model(self._tidy)
            for name in set(names) - tried:
                self._on_model(partial(self.known.learn, name))
            tried = set(names)

    def _tidy(self) -> None:
        self.bank.tidy()
        self.known.keep(self.bank.names)


def _do(work: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _stopping() -> Problem:
    return Problem(
        "stopping", "the server is stopping", "Send the request to another server, or again later", retry_after=5
    )
