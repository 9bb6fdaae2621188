"""The page in headless Chromium: no error, no request, sorting, filtering, widths, colours."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sample
from playwright.sync_api import sync_playwright

from sidestep.report.files import write_page
from sidestep.report.load import load

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 240_000  # milliseconds, for machines with other work
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
LIGHT, DARK = "rgb(255, 254, 251)", "rgb(27, 26, 24)"

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    lines = [*sample.study(), *sample.troubled(), *sample.on_gpu()]
    path = sample.write(folder / "results.jsonl", lines, broken=True)
    write_page(load([path]), folder / "report.html", command="sidestep report results.jsonl --output report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as runner:
        chromium = runner.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, page_file: Path) -> Iterator[Any]:
    """Opens the page in a browser window of given properties, and checks when all is done that nothing went wrong."""
    troubles: list[str] = []
    contexts = []

    def opened(file: Path = page_file, **properties: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **properties})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: troubles.append(request.url) if request.url != file.as_uri() else None)
        page.set_default_timeout(PATIENCE)
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-drawn]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [trouble for trouble in troubles if not trouble.startswith("data:")] == []


def names(page: Any) -> list[str]:
    """The contenders of the rows that are shown, in order; folds that are closed show none."""
    found: list[str] = page.locator(".results > tbody:visible").evaluate_all(
        "bodies => bodies.map((body) => body.dataset.contender)"
    )
    return found


def values(page: Any, column: str) -> list[float | None]:
    """The sortable values of a column of the first table, in order."""
    found: list[float | None] = page.evaluate(
        """(name) => {
            const table = document.querySelector(".results");
            const place = table.querySelector(`[data-column="${name}"]`).cellIndex;
            const values = [...table.tBodies].map((body) => body.rows[0].cells[place].dataset.value);
            return values.map((value) => value === undefined ? null : Number(value));
        }""",
        column,
    )
    return found


def test_the_file_is_whole_and_small(page_file: Path) -> None:
    text = page_file.read_text()
    assert len(text) < 3_000_000
    assert re.findall(r'<(?:script|link)[^>]* (?:src|href)="([^"]*)"', text) == ["data:,"]
    # the page itself forbids every request
    assert "default-src 'none'" in text


def test_hundreds_of_rows_stay_small(tmp_path: Path) -> None:
    many = [
        sample.cost("crowded", "read", 1 + number / 50, settings={"contender": f"read-{number}"})
        for number in range(150)
    ]
    lines = many + [sample.cost(f"backbone-{number}", name) for number in range(15) for name in sample.CONTENDERS]
    results = load([sample.write(tmp_path / "results.jsonl", lines)])
    assert sum(len(group.rows) for group in results.groups) == 315
    write_page(results, tmp_path / "report.html", command="sidestep report")
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_names_from_a_file_are_text_and_no_code(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    lines = [sample.cost("b", "read"), sample.cost("b", "lora", settings={"contender": evil})]
    write_page(load([sample.write(tmp_path / "r.jsonl", lines)]), tmp_path / "report.html", command=evil)
    assert evil not in (tmp_path / "report.html").read_text()


@needs_chromium
def test_it_draws_every_figure_without_error_or_request(open_page: Any) -> None:
    page = open_page()
    charts = page.locator(".chart").count()
    # three backbones: scores for two, costs and memory for all, curves of four and three tasks
    assert charts == 2 * 3 + 3 + 3 + 2 * 4 + 2 * 3
    # of the answers one backbone is drawn at a time
    for backbone in page.locator("[name=of] option").all_inner_texts():
        page.select_option("[name=of]", backbone)
        assert page.locator(".answer:visible").count() == 1
        page.wait_for_selector(".answer:not([hidden]) .chart svg.marks")
    assert page.locator(".chart > svg, .chart svg.marks").count() >= charts
    assert page.locator("#broken").inner_text().startswith("1 broken line was skipped: 1 in results.jsonl")
    assert "torch 2.14.0, elsewhere 2.15.0" in page.locator("#mixed").inner_text()
    assert "it has no bias vectors" in page.locator("main").inner_text()


def test_the_answer_and_its_picture_come_before_any_table(page_file: Path) -> None:
    text = page_file.read_text()
    places = [
        text.index(part)
        for part in ("<h1>", 'class="headline"', 'class="chart"', 'class="data results"', 'id="figures"', 'id="ratios"')
    ]
    assert places == sorted(places)
    # the first picture is of scores against memory, and it is not drawn a second time below
    first = re.search(r'class="chart"[^>]*aria-label="([^"]*)"', text)
    assert first is not None
    assert first[1] == "Score against peak memory above the weights, all-MiniLM-L6-v2"
    assert len(re.findall(r'class="chart"[^>]*aria-label="Score against peak memory[^"]*MiniLM', text)) == 1


def test_the_table_is_folded_by_backbone(page_file: Path, tmp_path: Path) -> None:
    folds = re.findall(r'<details class="fold" data-backbone="([^"]*)"( open)?>', page_file.read_text())
    assert folds == [("all-MiniLM-L6-v2", ""), ("T5-base", ""), ("BERT-large", "")]
    write_page(load([sample.write(tmp_path / "r.jsonl", sample.study())]), tmp_path / "one.html", command="sidestep")
    assert '<details class="fold" data-backbone="all-MiniLM-L6-v2" open>' in (tmp_path / "one.html").read_text()


def test_a_quick_run_says_so_under_the_title(tmp_path: Path) -> None:
    lines = [sample.score("b", name, "rte", 0, settings={"part_rows": 64}) for name in ("read", "lora")]
    write_page(load([sample.write(tmp_path / "r.jsonl", lines)]), tmp_path / "quick.html", command="sidestep report")
    text = (tmp_path / "quick.html").read_text()
    assert text.index("</h1>") < text.index("Quick: 64 dev rows of rte.") < text.index('class="headline"')


@needs_chromium
def test_the_answer_follows_backbone_and_score(open_page: Any) -> None:
    page = open_page()
    headline = page.locator(".headline:visible")
    assert headline.count() == 1
    assert "on average over 4 tasks" in headline.inner_text()
    page.select_option("[name=by]", "rte")
    assert "on rte" in headline.inner_text()
    # T5-base has no rte, and BERT-large has no scores
    page.select_option("[name=of]", "T5-base")
    assert page.locator("[name=by] option").all_inner_texts() == ["average", "cr", "drift", "price"]
    assert "on average over 2 tasks" in headline.inner_text()
    page.select_option("[name=of]", "BERT-large")
    assert headline.inner_text().startswith("There are no scores here")
    assert not page.locator("[name=by]").is_visible()
    # the filters of the tables leave the answer as it is
    page.select_option("[name=backbone]", "T5-base")
    assert headline.inner_text().startswith("There are no scores here")


@needs_chromium
def test_a_backbone_whose_name_has_odd_spaces_has_its_answer(open_page: Any, tmp_path: Path) -> None:
    # a browser reads an option's text with single spaces
    lines = [sample.cost(backbone, name) for backbone in ("one", " a  b ") for name in ("read", "lora")]
    write_page(load([sample.write(tmp_path / "r.jsonl", lines)]), tmp_path / "odd.html", command="sidestep report")
    page = open_page(file=tmp_path / "odd.html")
    page.select_option("[name=of]", index=1)
    assert page.locator(".headline:visible").count() == 1


@needs_chromium
def test_a_filter_opens_the_folds_that_it_finds(open_page: Any) -> None:
    page = open_page()
    page.select_option("[name=backbone]", "T5-base")
    assert page.locator(".fold[open]").count() == 1
    assert set(names(page)) == {"read", "dtl", "probe", "lora", "lora+checkpoint", "full"}


@needs_chromium
def test_sorting_by_mouse_and_keyboard(open_page: Any, tmp_path: Path) -> None:
    # dtl has no peak
    lines = [sample.cost("b", name) for name in ("read", "lora", "lora+checkpoint", "full", "probe")]
    lines.append(sample.cost("b", "dtl", measured={"peak_bytes": None}))
    one_backbone = tmp_path / "one.html"
    write_page(load([sample.write(tmp_path / "r.jsonl", lines)]), one_backbone, command="sidestep report")
    page = open_page(file=one_backbone)
    head = page.locator(".results [data-column=peak]")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    found = values(page, "peak")
    known = [value for value in found if value is not None]
    assert known == sorted(known)
    assert found[-1] is None
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    found = values(page, "peak")
    assert found[: len(known)] == sorted(known, reverse=True)
    assert found[-1] is None
    other = page.locator(".results [data-column=contender]")
    other.locator("button").click()
    assert head.get_attribute("aria-sort") == "none"
    assert names(page) == sorted(names(page))


@needs_chromium
def test_details_go_with_their_row(open_page: Any) -> None:
    page = open_page()
    page.locator(".fold summary").first.click()
    row = page.locator(".results > tbody[data-contender=lora]").first
    row.locator("button.more").click()
    details = row.locator("tr.details")
    assert details.is_visible()
    assert row.locator("button.more").get_attribute("aria-expanded") == "true"
    text = details.inner_text()
    assert "query value" in text
    assert "rate 0.0005" in text
    assert "transformers 5.23.0" in text
    page.locator(".results [data-column=kept] button").first.click()
    assert row.locator("tr.details").is_visible()


@needs_chromium
def test_filters(open_page: Any) -> None:
    page = open_page()
    assert names(page) == []  # folded
    page.fill("[name=contender]", "LoRA")
    assert set(names(page)) == {"lora", "lora+checkpoint"}
    assert page.locator(".filters output").inner_text() == "6 of 28 rows"
    page.select_option("[name=backbone]", "T5-base")
    assert page.locator(".filters output").inner_text() == "2 of 28 rows"
    assert page.locator(".panels.score:visible").count() == 1
    page.select_option("[name=task]", "cr")
    heads = page.locator(".results thead th[data-task]:visible")
    assert [text.split()[0] for text in heads.all_inner_texts()] == ["cr"]
    assert page.locator(".panels.curve .panel:visible h4").all_inner_texts() == ["cr: dev score", "cr: training loss"]
    page.click("text=Clear")
    page.wait_for_function("document.querySelector('.filters output').value === '28 of 28 rows'")


@needs_chromium
def test_the_task_filter_changes_the_scores_that_are_drawn(open_page: Any) -> None:
    page = open_page()
    ticks = page.locator(".panels.score").first.locator(".chart").first.locator(".role-axis-label text")
    before = ticks.all_text_contents()
    page.select_option("[name=task]", "rte")
    page.wait_for_timeout(300)
    assert len(before) > 5
    assert ticks.all_text_contents() != before
    # T5-base has no "rte", so nothing is drawn of it
    assert page.locator(".panels.score:visible h3").all_inner_texts() == ["all-MiniLM-L6-v2"]


@needs_chromium
def test_a_phone_never_scrolls_the_page_sideways(open_page: Any) -> None:
    page = open_page(viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator(".fold summary").first.click()
    page.locator(".results button.more").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    widths = page.locator(".chart:visible svg").evaluate_all("charts => charts.map((chart) => chart.clientWidth)")
    assert all(200 < width <= 340 for width in widths)


@needs_chromium
@pytest.mark.parametrize(("scheme", "paper"), [("light", LIGHT), ("dark", DARK)])
def test_colours_follow_the_readers_scheme(open_page: Any, scheme: str, paper: str) -> None:
    page = open_page(color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    label = page.locator(".chart .mark-text.role-mark text").first
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert label.evaluate("text => getComputedStyle(text).fill") == ink


@needs_chromium
def test_paper_is_white_and_without_controls(open_page: Any) -> None:
    page = open_page(color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".filters").is_visible()
    assert page.locator(".chart svg").first.is_visible()


@needs_chromium
def test_scores_alone_and_costs_alone(open_page: Any, tmp_path: Path) -> None:
    scores = [sample.score("b", name, "rte", seed) for name in ("read", "lora") for seed in range(2)]
    costs = [sample.cost("b", name, measured={"peak_bytes": None}) for name in ("read", "lora")]
    for name, lines in {"scores": scores, "costs": costs}.items():
        path = tmp_path / f"{name}.html"
        write_page(load([sample.write(tmp_path / f"{name}.jsonl", lines)]), path, command="sidestep report")
        page = open_page(file=path)
        assert names(page) == ["read", "lora"]
        assert page.locator(".chart svg.marks").count() == {"scores": 2, "costs": 2}[name]


@needs_chromium
def test_a_comparison_that_has_only_begun(open_page: Any, tmp_path: Path) -> None:
    lines = [sample.trial("b", "read", "rte", 1e-3)]
    write_page(load([sample.write(tmp_path / "r.jsonl", lines)]), tmp_path / "begun.html", command="sidestep report")
    page = open_page(file=tmp_path / "begun.html")
    assert "There is no cost and no score yet: the files hold 1 other result" in page.locator("main").inner_text()
