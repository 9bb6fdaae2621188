"""Who may use a server: bearer keys of two sorts, compared in constant time."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sidestep.serve.problems import Problem

USE, CHANGE = "SIDESTEP_KEYS", "SIDESTEP_CHANGE_KEYS"
"""Variables with keys to use tasks and keys to change them too, with commas between them."""
LEAST = 16
"""Characters of a key. Shorter ones can be guessed."""


@dataclass(frozen=True)
class Keys:
    """Keys as their SHA-256.

    Attributes:
        use: allow to ask for answers.
        change: allow to add and remove tasks besides.
    """

    use: tuple[bytes, ...]
    change: tuple[bytes, ...]

    @classmethod
    def of(cls, use: Iterable[str], change: Iterable[str] = ()) -> Keys:
        """The keys that are given as texts.

        Raises:
            ValueError: for one that is too short.
        """
        given = [[key.strip() for key in keys if key.strip()] for keys in (use, change)]
        if short := [key for keys in given for key in keys if len(key) < LEAST]:
            raise ValueError(
                f"{len(short)} of the keys have fewer than {LEAST} characters: make longer ones, such as by `openssl "
                "rand -hex 32`"
            )
        return cls(*(tuple(_digest(key) for key in keys) for keys in given))

    @classmethod
    def found(cls, file: Path | None, environment: Mapping[str, str] = os.environ) -> Keys | None:
        """The keys of a file and of the environment. None if there are none.

        Each line of the file is "use KEY" or "change KEY". Empty lines, and those that begin with "#", are left out.

        Raises:
            ValueError: for another line, which is not shown, or a key that is too short.
            OSError: if the file cannot be read.
        """
        given: dict[str, list[str]] = {
            "use": environment.get(USE, "").split(","),
            "change": environment.get(CHANGE, "").split(","),
        }
        lines = file.read_text(encoding="utf-8").splitlines() if file is not None else []
        for number, line in enumerate(lines, start=1):
            parts = line.split()
            if not parts or parts[0].startswith("#"):
                continue
            if len(parts) != 2 or parts[0] not in given:
                raise ValueError(f"line {number} of {file} is no key: write 'use KEY' or 'change KEY'")
            given[parts[0]].append(parts[1])
        keys = cls.of(given["use"], given["change"])
        if not keys.use and not keys.change:
            if file is not None:
                raise ValueError(f"{file} holds no key: write lines such as 'use KEY' or 'change KEY'")
            return None
        return keys

    def check(self, header: str | None, *, change: bool) -> None:
        """Refuse a request by its header "Authorization".

        Raises:
            Problem: without a key, with an unknown one, or with one that does not allow to change tasks.
        """
        scheme, _, key = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Problem("no-key", "the request has no bearer key", 'Send the header "Authorization: Bearer KEY"')
        own = _digest(key.strip())
        # all are compared, so that the time tells nothing of which one it is
        may_change, may_use = (
            sum(hmac.compare_digest(own, known) for known in keys) > 0 for keys in (self.change, self.use)
        )
        if not (may_change or may_use):
            raise Problem("wrong-key", "the bearer key is not one of this server's", "Send another one")
        if change and not may_change:
            raise Problem("not-allowed", "the key allows to use tasks alone", "Send a key that may change them")


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()
