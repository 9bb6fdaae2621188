"""Measures how plain the project's English is: words in a sentence, semicolons, and "hangs on".

    python tools/prose.py            # a table, one row for each part
    python tools/prose.py --check    # file:line of each fault, and exit code 1, where a limit is broken

A sentence ends at a full stop, a question mark or an exclamation mark, or where its paragraph, list item or
docstring entry ends. Headings, tables, code blocks and citations are not sentences. Inline code counts as one word, and
so does a link's text without its address.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MOST_WORDS = 25


class Limits(NamedTuple):
    """What a part may have at most."""

    long: float  # sentences over MOST_WORDS, in percent
    semicolons: float  # in 100 sentences
    hangs: int  # "hangs on"


#: The goal, and the limits of a part that keeps to it.
PLAIN = Limits(long=0, semicolons=3, hangs=0)

#: The limits of each part. A part that is still to be rewritten has where it stands today (2026-11-29) as its second
#: value, so that it cannot become worse. Delete that value when the part is rewritten.
LIMITS: dict[str, tuple[Limits, Limits | None]] = {
    "README": (PLAIN, None),
    "CONTRIBUTING": (PLAIN, None),
    "docs": (PLAIN, None),
    "docs/backbones": (PLAIN, None),
    "docstrings": (PLAIN, None),
    "messages and help": (PLAIN, None),
}

#: Full stops that end no sentence.
ABBREVIATIONS = frozenset({"e.g.", "i.e.", "vs.", "al.", "cf.", "approx.", "fig.", "eq."})

HANGS = re.compile(r"\bh(?:ang|angs|anging|ung)\s+on\b", re.IGNORECASE)
SECTIONS = frozenset({"Args:", "Attributes:", "Returns:", "Yields:", "Raises:", "Warns:"})
CITED = ("Source:", "Sources:", "Differs:")
ITEM = re.compile(r"(?:[-*+]|\d+[.)])\s+")
ENTRY = re.compile(r"[\w`*.,/ \[\]()=-]{1,60}?:\s+")


class Sentence(NamedTuple):
    """One sentence, and where it begins."""

    file: str
    line: int
    text: str

    @property
    def words(self) -> int:
        """Words: whatever stands between spaces and has a letter or a digit."""
        return sum(any(c.isalnum() for c in word) for word in self.text.split())

    def faults(self) -> list[str]:
        """What is not plain about it, in words."""
        found = [f"{self.words} words"] if self.words > MOST_WORDS else []
        found += ["a semicolon"] * self.text.count(";")
        return found + ['"hangs on"'] * len(HANGS.findall(self.text))


@dataclass
class Count:
    """The figures of one part."""

    sentences: list[Sentence] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Words in a sentence."""
        return sum(s.words for s in self.sentences) / max(len(self.sentences), 1)

    @property
    def longest(self) -> int:
        """Words of the longest sentence."""
        return max((s.words for s in self.sentences), default=0)

    @property
    def limits(self) -> Limits:
        """Where the part stands, in the units of its limits."""
        share = 100 / max(len(self.sentences), 1)
        return Limits(
            long=share * sum(s.words > MOST_WORDS for s in self.sentences),
            semicolons=share * sum(s.text.count(";") for s in self.sentences),
            hangs=sum(len(HANGS.findall(s.text)) for s in self.sentences),
        )


def sentences(lines: Sequence[tuple[int, str]], file: str = "") -> Iterator[Sentence]:
    """The sentences of one paragraph.

    Args:
        lines: numbered lines.
        file: where they stand.
    """
    if not lines:
        return
    numbers, texts = zip(*lines, strict=True)
    words = [
        (number, word)
        for number, line in zip(numbers, plain("\n".join(texts)).split("\n"), strict=True)
        for word in line.split()
    ]
    begin = 0
    for i, (_, word) in enumerate(words):
        if i + 1 == len(words) or ends_sentence(word, words[i + 1][1]):
            yield Sentence(file, words[begin][0], " ".join(word for _, word in words[begin : i + 1]))
            begin = i + 1


def ends_sentence(word: str, following: str) -> bool:
    """Whether a sentence ends with a word."""
    bare = word.rstrip("\"'”’)]*_")
    if not bare.endswith((".", "!", "?", "…")):
        return False
    if bare.lower().lstrip("([\"'") in ABBREVIATIONS or re.fullmatch(r"[A-Z]\.", bare):
        return False
    return not (bare.endswith(("...", "…")) and following[0].islower())


def plain(text: str) -> str:
    """A paragraph without markup, on the same lines: inline code is one word, a link is its text."""
    text = re.sub(r"``[^`]+``|`[^`]+`", lambda match: "\n" * match.group().count("\n") + "`code`", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)\s]*\)", r"\1", text)
    text = re.sub(r"<?https?://[^\s>)]*[^\s>).,;:]>?", "`link`", text)
    text = re.sub(r"<[^<>\s][^<>\n]*>", "", text)
    return re.sub(r"\*\*|__", "", text)


def of_markdown(text: str, file: str = "") -> Iterator[Sentence]:
    """The sentences of a Markdown text, without headings, tables and code."""
    text = re.sub(r"<!--.*?-->", lambda match: "\n" * match.group().count("\n"), text, flags=re.DOTALL)
    paragraph: list[tuple[int, str]] = []
    fence, blank, in_list = "", True, False
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        stripped = line.strip()
        opened = re.match(r"`{3,}|~{3,}", stripped)
        if fence:
            fence = "" if stripped == fence else fence
            continue
        indented = line.startswith("    ") and blank and not in_list and not paragraph
        item = ITEM.match(stripped)
        if opened or not stripped or item or indented or stripped.startswith(("|", "#", ">")):
            yield from sentences(paragraph, file)
            paragraph = []
        blank = not stripped or (blank and indented)
        if opened:
            fence = opened.group()
        elif item:
            in_list = True
            paragraph = [(number, stripped[item.end() :])]
        elif stripped and not indented and not stripped.startswith(("|", "#")):
            in_list = in_list and (line.startswith(" ") or bool(paragraph))
            paragraph.append((number, stripped.lstrip("> ")))


def of_docstring(text: str, first: int = 1, file: str = "") -> Iterator[Sentence]:
    """The sentences of a docstring, without its sections' names, its arguments' names, its code and its sources."""
    head, _, rest = text.partition("\n")
    lines = [head.strip(), *textwrap.dedent(rest).splitlines(), ""]
    paragraph: list[tuple[int, str]] = []
    section, entry_indent, blank, code = "", 0, False, False
    for number, line in enumerate(lines, start=first):
        stripped, indent = line.strip(), len(line) - len(line.lstrip())
        if stripped and section and not indent:
            section = ""
        code = bool(stripped) and not section and indent > 0 and (code or blank) and not ITEM.match(stripped)
        starts = not stripped or stripped in SECTIONS or bool(ITEM.match(stripped))
        starts = starts or (bool(section) and indent <= entry_indent) or stripped.startswith(CITED)
        if starts or code:
            yield from _cited(paragraph, file)
            paragraph = []
        if stripped in SECTIONS:
            section, entry_indent = stripped, 4
        elif stripped and not code and not stripped.startswith((">>>", "|")):
            if not paragraph:
                stripped = ITEM.sub("", stripped, count=1) if ITEM.match(stripped) else stripped
                if section in ("Args:", "Attributes:", "Raises:", "Warns:") and indent <= entry_indent:
                    stripped = ENTRY.sub("", stripped, count=1) if ENTRY.match(stripped) else stripped
            paragraph.append((number, stripped))
        blank = not stripped


def _cited(paragraph: list[tuple[int, str]], file: str) -> Iterator[Sentence]:
    if paragraph and not paragraph[0][1].startswith(CITED[:2]):
        yield from sentences(paragraph, file)


def docstrings(tree: ast.Module, file: str = "") -> Iterator[Sentence]:
    """The sentences of all docstrings of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield from of_docstring(text, node.body[0].lineno, file)


def messages(tree: ast.Module, file: str = "") -> Iterator[Sentence]:
    """The sentences of errors that are raised, of warnings, and of the command line's help."""
    for node in ast.walk(tree):
        texts: list[ast.expr] = []
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            texts = list(node.exc.args)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = list(node.args[:1]) if name == "warn" else list(node.args[1:2]) if name == "require" else []
            texts += [keyword.value for keyword in node.keywords if keyword.arg == "help"]
        for expression in texts:
            for line, text in _texts(expression):
                for part in text.split("\n"):
                    if " " in part.strip():
                        yield from sentences([(line, part)], file)


def _texts(node: ast.expr) -> Iterator[tuple[int, str]]:
    """The texts that an expression may give, with a word in the place of each value."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = list(_texts(node.left)), list(_texts(node.right))
        if len(left) == len(right) == 1:
            yield left[0][0], left[0][1] + right[0][1]
        else:
            yield from [*left, *right]
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body)
        yield from _texts(node.orelse)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    elif isinstance(node, ast.JoinedStr):
        pieces = (v.value if isinstance(v, ast.Constant) else "value" for v in node.values)
        yield node.lineno, "".join(map(str, pieces))


def count(root: Path) -> dict[str, Count]:
    """The figures of each part of a repository."""
    counts = {part: Count() for part in LIMITS}
    for path in [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("**/*.md"))]:
        name = path.relative_to(root).as_posix()
        part = name.removesuffix(".md")
        part = part if part in counts else "docs"
        counts[part].sentences += of_markdown(path.read_text(encoding="utf-8"), name)
    for path in sorted((root / "src").glob("**/*.py")):
        name = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        counts["docstrings"].sentences += docstrings(tree, name)
        counts["messages and help"].sentences += messages(tree, name)
    return counts


def faults(part: str, figures: Count) -> list[str]:
    """One line for each fault of each kind whose limit a part breaks."""
    goal, today = LIMITS[part]
    found = []
    kinds = zip(Limits._fields, figures.limits, today or goal, (" words", "a semicolon", '"hangs on"'), strict=True)
    for kind, value, limit, says in kinds:
        if value > limit:
            found.append(f"{part}: {kind} {value:.2f}, where at most {limit} is allowed")
            for sentence in figures.sentences:
                here = [fault for fault in sentence.faults() if says in fault]
                found += [f"{sentence.file}:{sentence.line}: {fault}: {sentence.text}" for fault in here]
    return found


def table(counts: dict[str, Count]) -> str:
    """The figures as a table."""
    rows = [f"{'part':<18} sentences  mean  over {MOST_WORDS}  longest  semicolons in 100  hangs on"]
    for part, figures in counts.items():
        long, semicolons, hangs = figures.limits
        rows.append(
            f"{part:<18} {len(figures.sentences):9}  {figures.mean:4.1f}  {long:6.1f}%  {figures.longest:7}"
            f"  {semicolons:17.1f}  {hangs:8}"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """The command: 1 if a limit is broken and `--check` was given, else 0."""
    parser = argparse.ArgumentParser(description="How plain the English of the documents, docstrings and messages is.")
    parser.add_argument("--check", action="store_true", help="list the faults where a limit is broken")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the repository")
    options = parser.parse_args(arguments)
    counts = count(options.root)
    if not options.check:
        print(table(counts))
        return 0
    found = [line for part, figures in counts.items() for line in faults(part, figures)]
    print("\n".join(found) or "prose: within the limits")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
