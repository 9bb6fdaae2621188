"""Texts of results, whatever they hold: as one line, in Markdown and in a cell of a spreadsheet."""

from __future__ import annotations

import re
from typing import Any

_BREAK = re.compile("\\s*[\t\n\v\f\r\x1c-\x1f\x85\u2028\u2029]\\s*")
#: A control character as its picture, and what no XML can hold as the sign for that: a figure would not be drawn.
_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20)},
    0x7F: 0x2421,
    **dict.fromkeys([*range(0x80, 0xA0), 0xFFFE, 0xFFFF], 0xFFFD),
}
#: What has a meaning in a line of Markdown: anywhere, at a word's edge, before a name, and at the line's beginning.
_MARKS = re.compile(r"[\\`*~$<|\[\]]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|^[-+#>](?=[\s#>])")


def legible(value: Any) -> Any:
    """A JSON value with each text on one line, without control characters."""
    if isinstance(value, str):
        return _BREAK.sub(" ", value).translate(_PICTURES)
    if isinstance(value, dict):
        return {legible(name): legible(part) for name, part in value.items()}
    return [legible(part) for part in value] if isinstance(value, list) else value


def in_markdown(text: str) -> str:
    """A text that shows as it is, in a table or a list."""
    return _MARKS.sub(lambda found: "&lt;" if found[0] == "<" else f"\\{found[0]}", legible(text))


def as_code(text: str) -> str:
    """A text as code in a line of Markdown."""
    text = legible(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"


def in_cell(value: Any) -> Any:
    """A value of a csv file; a text that a spreadsheet would compute begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
