"""What counts as a sentence, a word and a fault, and that the repository keeps to its limits."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import prose

ROOT = Path(__file__).parents[1]


def texts(found: object) -> list[str]:
    return [sentence.text for sentence in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One thing. Another thing!\n", ["One thing.", "Another thing!"]),
        ("A line\nthat goes on. Next\n", ["A line that goes on.", "Next"]),
        (
            "As et al. say, e.g. here, J. Smith reads 1.5 of 2.\n",
            ["As et al. say, e.g. here, J. Smith reads 1.5 of 2."],
        ),
        ("It says (in short.) Then more\n", ["It says (in short.)", "Then more"]),
        ("Use 1, 2, ... and more\n", ["Use 1, 2, ... and more"]),
        ("# A heading\n\n| a | table. |\n|---|---|\n\nText\n", ["Text"]),
        ("```python\nx = 1  # no. sentence.\n```\nText\n", ["Text"]),
        ("Before:\n\n    x = 1; y = 2\n\n    z = 3\n\nAfter\n", ["Before:", "After"]),
        ("- one item\n  goes on\n- another. And more\n", ["one item goes on", "another.", "And more"]),
        ("- an item\n\n      its second paragraph\n", ["an item", "its second paragraph"]),
        ("Call `a; b. c` or [a page](x.md#y).\n", ["Call `code` or a page."]),
        ("Code `over a\nline` is one word.\n", ["Code `code` is one word."]),
        ("**Bold.** Not bold <!-- nor; this -->\n", ["Bold.", "Not bold"]),
        ("See https://example.org/a.b. Then\n", ["See `link`.", "Then"]),
    ],
)
def test_the_sentences_of_markdown(text: str, expected: list[str]) -> None:
    assert texts(prose.of_markdown(text)) == expected


def test_the_sentences_of_a_docstring() -> None:
    text = """Mean of the kept tokens.

    Source: Somebody; "A. Paper", 2024.
    Differs: the grid. It is ours.

    As a formula:

        y = x; z = y

    Args:
        tokens: (batch, tokens, width). What
            is read.
        keep: False marks padding.

    Returns:
        (batch, width).

    Raises:
        ValueError: if a row keeps none.
    """
    assert texts(prose.of_docstring(text)) == [
        "Mean of the kept tokens.",
        "Differs: the grid.",
        "It is ours.",
        "As a formula:",
        "(batch, tokens, width).",
        "What is read.",
        "False marks padding.",
        "(batch, width).",
        "if a row keeps none.",
    ]


def test_the_texts_of_errors_warnings_and_help() -> None:
    source = """
raise ValueError(f"late={late}, but {name} " + "has few: choose fewer")
raise KeyError("one word" if a else "or another")
warnings.warn("a; b", stacklevel=2)
self.require(x > 0, "is above 0")
Option(help="Rows of a step.")
raise Other("short")
print("not a message")
"""
    assert sorted(texts(prose.messages(ast.parse(source)))) == sorted(
        [
            "late=value, but value has few: choose fewer",
            "one word",
            "or another",
            "a; b",
            "is above 0",
            "Rows of a step.",
        ]
    )


def test_lines_are_those_of_the_file() -> None:
    found = list(prose.of_markdown("# Title\n\nOne. Two\nlines. Three\n", "a.md"))
    assert [(s.file, s.line, s.text) for s in found] == [
        ("a.md", 3, "One."),
        ("a.md", 3, "Two lines."),
        ("a.md", 4, "Three"),
    ]


def test_what_is_a_fault() -> None:
    plain = prose.Sentence("a.md", 1, "word " * prose.MOST_WORDS)
    assert plain.faults() == []
    assert prose.Sentence("a.md", 1, "word – " * (prose.MOST_WORDS + 1)).faults() == ["26 words"]
    assert prose.Sentence("a.md", 1, "It hangs on this; or hung\ton that.").faults() == [
        "a semicolon",
        *['"hangs on"'] * 2,
    ]


def repository(folder: Path, text: str) -> Path:
    (folder / "docs").mkdir()
    for name in ("README.md", "CONTRIBUTING.md", "docs/page.md"):
        (folder / name).write_text("# Title\n\nShort.\n")
    (folder / "docs/page.md").write_text(text)
    return folder


def test_a_broken_limit_is_told_with_each_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = repository(tmp_path, "# Page\n\nFine.\n\n" + "word " * 26 + "\n")
    assert prose.main(["--check", "--root", str(root)]) == 1
    first, fault = capsys.readouterr().out.splitlines()
    assert first == "docs: long 50.00, where at most 0 is allowed"
    assert fault.startswith("docs/page.md:5: 26 words: word word")


def test_a_plain_repository_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = repository(tmp_path, "# Page\n\nFine.\n")
    assert prose.main(["--check", "--root", str(root)]) == 0
    assert prose.main(["--root", str(root)]) == 0
    assert "docs/backbones" in capsys.readouterr().out


def test_every_part_keeps_its_limits() -> None:
    assert [line for part, figures in prose.count(ROOT).items() for line in prose.faults(part, figures)] == []


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in a link."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_and_the_glossary_name_what_is_there() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert [page for page in pages if page != "index.md" and f"({page})" not in index] == []
    glossary = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    words = {word for row in re.findall(r"^- \*\*([^*]+)\*\*", glossary, re.MULTILINE) for word in row.split(", ")}
    named = {re.sub(r"s$", "", " ".join(word.split())) for word in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", glossary)}
    assert named - {re.sub(r"s$", "", word) for word in words} - {"italic"} == set()
