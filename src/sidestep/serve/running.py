"""A batch through the bank. What fails is told to its own rows and tasks, and touches no others."""

from __future__ import annotations

import logging
import secrets
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sidestep.disk.task_folder import TaskError
from sidestep.kinds.base import Probabilities
from sidestep.serve.forms import Answer, Asking, Form, Known, Piece
from sidestep.serve.known import KnownTasks
from sidestep.serve.problems import Problem
from sidestep.tasks.bank_folder import NoSuchTask

log = logging.getLogger("sidestep.serve")
TELLING = (RuntimeError, MemoryError, OSError)
"""Errors of torch and of the system, whose messages hold no text of a request."""


@dataclass(frozen=True)
class Asked:
    """A row of a batch: what was read of it, its tasks, and which probabilities their answers have."""

    piece: Piece
    tasks: Sequence[str]
    mode: Probabilities


def run(form: Form, batch: Sequence[Asked], known: KnownTasks) -> list[dict[str, Answer | Problem]]:
    """The answers to each row, by its tasks. It is called in the bank's turn.

    If the batch fails, tasks that cannot be used are left out. Then its halves are run, down to one row and one task.
    """
    names = [*dict.fromkeys(name for row in batch for name in row.tasks)]
    tasks, bad = _usable(form, names, known)
    rows = [row for row in batch if any(name in tasks for name in row.tasks)]
    found = dict(zip(map(id, rows), _answers(form, rows, tasks, known), strict=True)) if rows else {}
    return [{name: bad[name] if name in bad else found[id(row)][name] for name in row.tasks} for row in batch]


def _answers(
    form: Form, batch: Sequence[Asked], tasks: Mapping[str, Known], known: KnownTasks
) -> list[dict[str, Answer | Problem]]:
    places = {name: [place for place, row in enumerate(batch) if name in row.tasks] for name in tasks}
    wanted = {name: Asking(tasks[name], own) for name, own in places.items() if own}
    try:
        columns = form.run(known.bank, [row.piece for row in batch], wanted, [row.mode for row in batch])
        answers: list[dict[str, Answer | Problem]] = [{} for _ in batch]
        for name, asked in wanted.items():
            for place, answer in zip(asked.places, columns[name], strict=True):
                answers[place][name] = answer
        return answers
    except Exception as error:  # of whatever kind: it is narrowed down to its row and task
        if len(batch) > 1:
            half = len(batch) // 2
            return _answers(form, batch[:half], tasks, known) + _answers(form, batch[half:], tasks, known)
        if len(wanted) > 1:
            found: dict[str, Answer | Problem] = {}
            for name in wanted:
                found |= _answers(form, batch, {name: tasks[name]}, known)[0]
            return [found]
        return [{name: unusable(name, error, known) for name in wanted}]


def _usable(form: Form, names: Sequence[str], known: KnownTasks) -> tuple[dict[str, Known], dict[str, Problem]]:
    """The tasks as they are now, and why others have no answer."""
    good: dict[str, Known] = {}
    bad: dict[str, Problem] = {}
    for name in names:
        try:
            task = known.learn(name) if name != known.backbone or name in known.bank.names else known.pooled()
            if form.key not in [each.key for each in (task.form, task.embeds) if each is not None]:
                raise Problem("task-removed", f"another task has the name {name!r} now", "Send the request again")
            good[name] = task
        except Problem as problem:
            bad[name] = problem
        except Exception as error:  # one task's files are no reason to lose the others
            bad[name] = unusable(name, error, known)
    return good, bad


def unusable(name: str, error: Exception, known: KnownTasks) -> Problem:
    """Why a task that was there cannot answer. Another process may have removed it meanwhile."""
    if isinstance(error, NoSuchTask) or name not in known.bank.names:
        return Problem(
            "task-removed", f"the task {name!r} was removed while the request waited", "See /v1/tasks for those there"
        )
    if isinstance(error, TaskError):
        return Problem("task-damaged", str(error), "Remove the task, and add it again")
    return failure(error)


def failure(error: Exception) -> Problem:
    """What a caller is told of an error that is not the caller's. The log has the rest under the same number."""
    number = secrets.token_hex(8)
    where = "".join(traceback.format_tb(error.__traceback__))
    told = f": {error}" if isinstance(error, TELLING) else ""
    log.error("failure %s: %s%s\n%s", number, type(error).__name__, told, where)
    return Problem(
        "internal",
        f"the server failed while it ran this row ({number})",
        "Tell whoever runs the server this number, under which its log has the error",
        members={"failure": number},
    )
