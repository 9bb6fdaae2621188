"""How a bank is served: batches, limits and times."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

MIB = 1024**2


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of a server.

    Attributes:
        max_tokens: of a batch, padding included.
        max_rows: of a batch.
        max_wait_ms: how long a row waits for others to fill its batch.
        writing_rows: rows of a batch of tasks that write texts.
        queue: rows that may wait, of tasks that write texts and of others each. Further requests are refused until some
            are answered.
        request_rows: of one request.
        request_tasks: of one request, all rows together.
        request_tokens: of one request, all rows together. A row counts once for each way in which its tasks read it.
        body_bytes: of a request, uploads excepted.
        upload_bytes: of an uploaded task, packed and unpacked alike.
        upload_files: in it.
        seconds: until a request has to be answered.
        drain_seconds: for requests that wait when the server is stopped.
        poll_seconds: between looks at the bank's folder, which other processes may change.
        readers: threads that decode and tokenise rows.
        root: folder from which tasks may be added by path. None: the bank's own.
    """

    max_tokens: int = 16384
    max_rows: int = 64
    max_wait_ms: float = 2.0
    writing_rows: int = 8
    queue: int = 1024
    request_rows: int = 256
    request_tasks: int = 256
    request_tokens: int = 131072
    body_bytes: int = 32 * MIB
    upload_bytes: int = 1024 * MIB
    upload_files: int = 1000
    seconds: float = 60.0
    drain_seconds: float = 30.0
    poll_seconds: float = 2.0
    readers: int = 2
    root: Path | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "root":
                if value is not None and not Path(value).is_dir():
                    raise ValueError(f"root={str(value)!r} is no folder: name one that holds task folders (--root)")
            elif value < 0 or (value == 0 and each.name not in ("max_wait_ms", "drain_seconds")):
                raise ValueError(f"{each.name}={value}, but it must be above 0")
        if self.request_rows > self.queue:
            raise ValueError(
                f"request_rows={self.request_rows}, but only queue={self.queue} rows may wait: choose at least as many"
            )
