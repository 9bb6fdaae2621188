"""What goes wrong for a caller: one type, with a status, what happened and what to do (RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True)
class Sort:
    """A sort of problem: its HTTP status, and its title."""

    status: int
    title: str


SORTS: dict[str, Sort] = {
    "bad-json": Sort(400, "The body is not JSON"),
    "no-key": Sort(401, "A key is needed"),
    "wrong-key": Sort(401, "The key is not known"),
    "not-allowed": Sort(403, "The key does not allow this"),
    "other-host": Sort(403, "The request was made for another host"),
    "outside-root": Sort(403, "The path lies outside of what may be read"),
    "not-found": Sort(404, "There is nothing at this address"),
    "unknown-task": Sort(404, "The bank holds no such task"),
    "task-removed": Sort(404, "The task was removed while the request waited"),
    "wrong-method": Sort(405, "The address does not take this method"),
    "stalled": Sort(408, "The body did not come in time"),
    "task-exists": Sort(409, "The bank holds another task of this name"),
    "other-backbone": Sort(409, "The task belongs to another backbone"),
    "bank-busy": Sort(409, "Another process is changing the bank"),
    "body-too-large": Sort(413, "The body is too large"),
    "too-many-rows": Sort(413, "The request has too many rows"),
    "too-many-tasks": Sort(413, "The request names too many tasks"),
    "too-many-tokens": Sort(413, "The request has too many tokens"),
    "wrong-media-type": Sort(415, "The body is of a type that is not read here"),
    "invalid-request": Sort(422, "The request is not as the schema says"),
    "wrong-endpoint": Sort(422, "The task is answered at another address"),
    "bad-row": Sort(422, "The row cannot be read"),
    "too-long": Sort(422, "The row has more tokens than the task reads"),
    "bad-upload": Sort(422, "The upload is no task that can be added"),
    "bad-name": Sort(422, "The name cannot be a task's"),
    "queue-full": Sort(429, "Too many rows are waiting"),
    "internal": Sort(500, "The server failed"),
    "task-damaged": Sort(500, "The task's files cannot be used"),
    "stopping": Sort(503, "The server is stopping"),
    "not-ready": Sort(503, "The server is not ready yet"),
    "timeout": Sort(504, "The answer took too long"),
}
"""By the end of a problem's type."""


class Problem(Exception):
    """A request, or a row of one, has no answer.

    Attributes:
        name: of its sort, a key of `SORTS`.
        detail: what happened, in a sentence that holds no more of a request than its caller gave.
        advice: what to do.
        retry_after: seconds until another try is worthwhile. None: the same request fails again.
        members: further members of the answer.
    """

    def __init__(
        self,
        name: str,
        detail: str,
        advice: str,
        *,
        retry_after: int | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.name, self.detail, self.advice = name, detail, advice
        self.retry_after, self.members = retry_after, dict(members or {})

    @property
    def status(self) -> int:
        """The HTTP status."""
        return SORTS[self.name].status

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """The problem as JSON-ready values."""
        found: dict[str, Any] = {
            "type": f"urn:sidestep:problem:{self.name}",
            "title": SORTS[self.name].title,
            "status": self.status,
            "detail": self.detail,
            "advice": self.advice,
        }
        if self.retry_after is not None:
            found["retry_after"] = self.retry_after
        if request_id is not None:
            found["request_id"] = request_id
        return {**found, **self.members}
