"""Names that mean something to Markdown, a spreadsheet, a page or a drawing are shown as they are, and do nothing."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.dom import minidom

import pytest
import sample

from sidestep.compare.records import Record
from sidestep.report.files import write_figures, write_page
from sidestep.report.load import load
from sidestep.report.markdown import markdown
from sidestep.report.rows import Results
from sidestep.report.texts import as_code, in_cell, in_markdown, legible

NAMES = [
    "new\nline",
    "re\r\nturn",
    "=1+1",
    "@SUM(A1)",
    "a|b",
    "back\\|slash",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "`code`",
    "*bold* _it_ [l](u) &amp;",
    "\x1b[31mred\x00",
    "\u2028",
    "漢字",
    "x" * 300,
    "",
]


#: Of which file names keep the same.
TASKS = ["=漢|\n", "<字>"]


def named(line: Record, contender: str, task: str | None = None) -> Record:
    names = {"contender": contender, "backbone": NAMES[0], **({} if task is None else {"task": task})}
    return replace(line, key=f"{line.kind} {contender} {task}", settings={**line.settings, **names})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results whose backbone, contenders, task and reason have such names."""
    lines = [named(sample.cost("b", "read"), name) for name in NAMES]
    score = sample.score("b", "read", "rte", 0, measured={"history": []})
    lines += [named(score, name, task) for name in NAMES for task in TASKS]
    failed = replace(named(sample.cost("b", "full"), "full"), status="failed", measured=None, reason="\n".join(NAMES))
    return load([sample.write(tmp_path_factory.mktemp("names") / "results.jsonl", [*lines, failed])])


def test_a_markdown_table_stays_one(results: Results) -> None:
    text = markdown(results, command="sidestep report 'a\nb`c`'")
    assert "\n\n" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u2028\u2029]|<script|<img", text)
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert tables
    for table in tables:
        # as GitHub splits cells: at each | without a backslash before it
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1
    notes = text.rstrip().split("\n\n")[-1].splitlines()
    assert all(note.startswith("- ") for note in notes)


def test_figures_are_drawn_and_no_cell_is_a_formula(results: Results, tmp_path: Path) -> None:
    written = write_figures(results, tmp_path)
    assert len({*written}) == len(written) == len([*tmp_path.iterdir()])
    assert max(len(path.name) for path in written) < 200
    for path in written:
        if path.suffix == ".svg":
            minidom.parse(str(path))
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                rows = list(csv.reader(file))
            assert {len(row) for row in rows} == {len(rows[0])}
            assert not any(cell[:1] in ("=", "@") or "\n" in cell for row in rows for cell in row)


class Elements(HTMLParser):
    """The scripts of a page, and every attribute of its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def test_a_page_has_no_element_of_a_name(results: Results, tmp_path: Path) -> None:
    write_page(results, tmp_path / "page.html", command="sidestep report '<script>alert(2)</script>'")
    found = Elements()
    found.feed((tmp_path / "page.html").read_text())
    assert found.tags.count("script") == 3  # the specifications, Vega and the page's own
    assert "img" not in found.tags
    assert "onerror" not in found.attributes


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("diff_pruning+checkpoint", "diff_pruning+checkpoint"),
        ("0.83×, +1.2", "0.83×, +1.2"),
        ("a|b", r"a\|b"),
        ("a\\|b", r"a\\\|b"),
        ("a\n\n b", "a b"),
        ("_x_ and *y*", r"\_x\_ and \*y\*"),
        ("<b> &amp; & c", r"&lt;b> \&amp; & c"),
        ("# x", r"\# x"),
        ("\x1b", "␛"),
    ],
)
def test_in_markdown(text: str, shown: str) -> None:
    assert in_markdown(text) == shown


def test_code_keeps_backticks() -> None:
    assert as_code("a b") == "`a b`"
    assert as_code("a `b` ``c``\n d") == "``` a `b` ``c`` d ```"


def test_a_number_is_no_formula() -> None:
    assert [in_cell(value) for value in (-1.5, None, True, "-x", "=1", "a=1")] == [
        -1.5,
        None,
        True,
        "'-x",
        "'=1",
        "a=1",
    ]


def test_a_legible_value_has_the_same_form() -> None:
    value = {"a\nb": [1, None, {"c": "\td\x00"}], "e": "plain  text"}
    assert legible(value) == {"a b": [1, None, {"c": " d␀"}], "e": "plain  text"}
