"""What is said of data that cannot be used, or not as it stands."""

from collections.abc import Iterable, Sequence

from sidestep.messages import some

NAMED = 5
"""How many rows, lines or names a message lists before it says how many more there are."""


class DataError(ValueError):
    """Data that cannot be used: what was given, what is allowed, what to do."""


class DataWarning(UserWarning):
    """Data that was used, but not all of it or not as it stands."""


def listed(items: Iterable[object], limit: int = NAMED) -> str:
    """The items as text, those after the limit as a count."""
    return some((repr(item) if isinstance(item, str) else str(item) for item in items), limit)


def named_rows(indices: Sequence[int]) -> str:
    """The rows' numbers as a user counts them: from 1, without the header."""
    return f"{'row' if len(indices) == 1 else 'rows'} {listed(index + 1 for index in indices)} (the first is 1)"
