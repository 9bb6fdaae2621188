"""Long texts as windows of tokens that overlap, each token with its place in the text.

A fast tokenizer makes the windows and tells the places. A row without a limit, or a short one, is one window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sidestep.data.encode import token_limit
from sidestep.data.messages import DataError, named_rows

OVERLAP = 4
"""One part of so many of a window is shared with the window before."""
ELSEWHERE = (-1, -1)
"""The place of a token that is not of the text: a special token, or one of the text in front of it."""
ROW, OFFSETS = "row", "offsets"
"""Columns of windows: the number of the row, and the place of each token in its text."""

Place = tuple[int, int]
"""Of the first character, and of the one behind the last."""


class Owned(NamedTuple):
    """Where a stretch of a text is read.

    Attributes:
        window: number of the window, counted over all rows.
        token: number of the first token of the stretch in this window.
    """

    window: int
    token: int


@dataclass(frozen=True)
class Windows:
    """Rows of texts as windows.

    Attributes:
        columns: by name, a list with one entry for each window: the tokenizer's, "row", "offsets" and "length".
    """

    columns: Mapping[str, list[Any]]

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        texts: Sequence[str],
        before: Sequence[str] | None = None,
        *,
        max_length: int | None,
        columns: str,
        first: int = 0,
    ) -> Windows:
        """The windows of texts. The text `before` stands in front of each window whole.

        Args:
            tokenizer: a fast one.
            texts: one a row.
            before: a question for each row, or None.
            max_length: tokens of a window, special ones included. None: the tokenizer's limit.
            columns: where the texts are from, for messages.
            first: number of the first row there, for messages.

        Raises:
            DataError: for a tokenizer that does not tell places, a limit without room, and rows whose text in front
                leaves none. It names the rows.
        """
        pair = before is not None
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} does not tell which token stands where in a text: take a backbone with a "
                "fast tokenizer (a tokenizer.json)"
            )
        limit = token_limit(tokenizer, max_length, pair=pair)
        how: dict[str, Any] = {"padding": False, "return_offsets_mapping": True, "verbose": False}
        if limit is not None:
            shared = limit // OVERLAP
            if before is not None:
                _check_room(tokenizer, before, limit, columns, first)
                shared = min(shared, _least_room(tokenizer, before, limit) // 2)
            shared = min(shared, max(limit - tokenizer.num_special_tokens_to_add(pair=pair) - 1, 0))
            how |= {
                "truncation": "only_second" if pair else True,
                "max_length": limit,
                "stride": shared,
                "return_overflowing_tokens": True,
            }
        given = [list(texts)] if before is None else [list(before), list(texts)]
        found = tokenizer(*given, **how)
        owners = found.pop("overflow_to_sample_mapping", None) or list(range(len(texts)))
        places = found.pop("offset_mapping")
        own = int(pair)
        offsets = [
            [
                tuple(place) if which == own else ELSEWHERE
                for place, which in zip(row, found.sequence_ids(n), strict=True)
            ]
            for n, row in enumerate(places)
        ]
        lengths = [len(ids) for ids in found["input_ids"]]
        return cls({**dict(found), ROW: list(owners), OFFSETS: offsets, "length": lengths})

    def __len__(self) -> int:
        return len(self.columns[ROW])

    @property
    def by_row(self) -> dict[int, list[int]]:
        """The numbers of the windows of each row."""
        found: dict[int, list[int]] = {}
        for window, row in enumerate(self.columns[ROW]):
            found.setdefault(row, []).append(window)
        return found

    def owners(self, stretches: Sequence[Sequence[Place]]) -> list[list[Owned | None]]:
        """Where each stretch of each row is read: in the window in which most tokens stand on its shorter side.

        None for a stretch of which no window has a token (such as a character that the tokenizer drops).

        Args:
            stretches: by row, ascending and apart from each other.
        """
        by_row, offsets = self.by_row, self.columns[OFFSETS]
        return [
            _owners(own, [(window, offsets[window]) for window in by_row[row]]) for row, own in enumerate(stretches)
        ]


def _owners(stretches: Sequence[Place], windows: Sequence[tuple[int, Sequence[Place]]]) -> list[Owned | None]:
    best: list[tuple[float, Owned] | None] = [None] * len(stretches)
    for number, (window, offsets) in enumerate(windows):
        real = [token for token, (start, end) in enumerate(offsets) if end > start >= 0]
        if not real:
            continue
        # beyond an end of the text itself there is nothing to miss
        left = -float("inf") if number == 0 else real[0]
        right = float("inf") if number == len(windows) - 1 else real[-1]
        place = 0
        for token in real:
            start, end = offsets[token]
            while place < len(stretches) and stretches[place][1] <= start:
                place += 1
            # a token may reach over several stretches, and later ones are looked at again by the next token
            for which in range(place, len(stretches)):
                if stretches[which][0] >= end:
                    break
                context = min(token - left, right - token)
                known = best[which]
                if known is None or (known[1].window != window and context > known[0]):
                    best[which] = (context, Owned(window, token))
    return [None if each is None else each[1] for each in best]


def _room(tokenizer: Any, before: Sequence[str], limit: int) -> list[int]:
    """Tokens that are left for the text behind each of the texts in front."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    ids = tokenizer(list(before), add_special_tokens=False, padding=False, truncation=False, verbose=False)["input_ids"]
    return [limit - special - len(row) for row in ids]


def _least_room(tokenizer: Any, before: Sequence[str], limit: int) -> int:
    return min(_room(tokenizer, before, limit))


def _check_room(tokenizer: Any, before: Sequence[str], limit: int, columns: str, first: int) -> None:
    rooms = _room(tokenizer, before, limit)
    if full := [first + row for row, room in enumerate(rooms) if room < 2]:
        raise DataError(
            f"{columns}: the text in front has up to {limit - min(rooms)} tokens, special ones included, in "
            f"{named_rows(full)}. A window has {limit}, so no room is left behind it. Give a larger max_length "
            "(--max-length), or shorten these rows"
        )
