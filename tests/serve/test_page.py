"""The server's page in headless Chromium. The tests tell what the server would say, so that none is needed."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import PIL.Image
import pytest
from playwright.sync_api import sync_playwright

from sidestep.serve.page import page as page_text
from sidestep.serve.page import page_headers

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PATIENCE = 240_000  # milliseconds, for machines with other work
HOME = "http://bank.test/"
EVIL = "<img src=x onerror=alert(1)>"
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
LIGHT, DARK = "rgb(255, 254, 251)", "rgb(27, 26, 24)"

TASKS = [
    {"name": "mood", "method": "readout", "labels": ["bad", "good", EVIL], "reads": {"text": "text"}},
    {"name": "stars", "method": "read", "labels": None, "reads": {"text": "text"}},
    {"name": "pair", "method": "read", "labels": ["no", "yes"], "reads": {"text": "one", "text2": "other"}},
    {"name": "shape", "method": "dtl", "labels": ["ring", "square"], "reads": {"image": "image"}},
]
ANSWERS = {
    "mood": {"prediction": EVIL, "probability": 0.7, "probabilities": {"bad": 0.1, "good": 0.2, EVIL: 0.7}},
    "stars": {"prediction": 3.51239},
    "pair": {"prediction": "yes", "probability": 0.9, "probabilities": {"no": 0.1, "yes": 0.9}},
    "shape": {"error": {"title": "Broken picture", "detail": "the picture cannot be opened"}},
}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as runner:
        chromium = runner.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Server:
    """What a server says to the page. It notes what it was asked."""

    def __init__(self, key: str | None = None) -> None:
        self.key, self.asked = key, list[dict[str, Any]]()

    def answer(self, route: Any) -> None:
        request = route.request
        if request.url == HOME:
            route.fulfill(body=page_text(), headers={"content-type": "text/html; charset=utf-8", **page_headers()})
        elif self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            route.fulfill(status=401, json={"title": "No key", "detail": "this server asks for a key"})
        elif request.url == f"{HOME}v1/tasks":
            route.fulfill(json={"tasks": TASKS, "unreadable": [{"name": "torn", "reason": "its weights are damaged"}]})
        else:
            body = json.loads(request.post_data)
            self.asked.append(body)
            results = [{name: ANSWERS[name] for name in body["tasks"]}]
            route.fulfill(json={"results": results, "usage": {"tokens": 7}, "timings": {"run_ms": 4.26}})


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a server, and checks when all is done that nothing went wrong and nobody else was asked."""
    troubles: list[str] = []
    contexts = []

    def visited(server: Server, **properties: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **properties})
        contexts.append(context)
        page = context.new_page()
        page.route("**/*", server.answer)
        page.on("console", lambda message: troubles.append(message.text) if "401" not in message.text else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda one: troubles.append(one.url) if not one.url.startswith((HOME, "data:")) else None)
        page.set_default_timeout(PATIENCE)
        page.goto(HOME)
        return page

    yield visited
    for context in contexts:
        context.close()
    assert troubles == []


def choose(page: Any, *names: str) -> None:
    page.click("#none")
    for name in names:
        page.check(f"input[value={name}]")


def test_it_refers_to_nothing_outside() -> None:
    text = page_text()
    assert set(re.findall(r'(?:src|href)="([^"]*)"', text)) == {"data:,", "#answers", "openapi.json"}
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r' on\w+="| style="', text), "the policy forbids them"
    assert "unsafe" not in page_headers()["content-security-policy"]


def test_one_text_is_answered_by_all_chosen_tasks(visit: Callable[..., Any]) -> None:
    page = visit(server := Server())
    page.wait_for_selector("html[data-ready]")
    assert page.inner_text("#chosen") == "4 of 5 chosen"
    assert page.is_disabled("input[value=torn]"), "a task that cannot be read stops no other"
    choose(page, "mood", "stars")
    assert page.locator("#inputs > div").count() == 1, "no column of tasks that are not chosen"
    page.fill("#in-text", 'Good "film" \u2013 <b>really</b>')
    page.click("#send")
    page.wait_for_selector("#found > li")
    asked = {
        "tasks": ["mood", "stars"],
        "inputs": [{"text": 'Good "film" \u2013 <b>really</b>'}],
        "probabilities": "all",
    }
    assert server.asked == [asked]
    assert page.locator("#found h3").all_inner_texts() == ["mood", "stars"]
    assert page.locator("#found .said").all_inner_texts() == [EVIL, "3.512"], "a label is text and no markup"
    assert page.locator(".bars dt").all_inner_texts() == [EVIL, "good", "bad"], "the likeliest first"
    widths = page.locator(".track i").evaluate_all("bars => bars.map((bar) => bar.style.width)")
    assert widths == ["70%", "20%", "10%"]
    assert re.fullmatch(r"2 tasks, 7 tokens, \d+ ms \(of these the server's: run 4.3\)", page.inner_text("#status"))
    assert '"mood"' in page.text_content("#request")


def test_a_column_is_asked_for_once_and_an_empty_one_is_named(visit: Callable[..., Any]) -> None:
    page = visit(server := Server())
    page.wait_for_selector("html[data-ready]")
    choose(page, "mood", "pair")
    assert page.locator("#inputs label").all_inner_texts() == ["Text", "Second text"]
    page.fill("#in-text", "one")
    page.press("#in-text", "Control+Enter")
    assert page.inner_text("#status") == "Type a text first."
    assert page.evaluate("document.activeElement.id") == "in-text2"
    assert server.asked == []
    page.fill("#in-text2", "two")
    page.press("#in-text2", "Control+Enter")
    page.wait_for_selector("#found > li")
    assert server.asked[0]["inputs"] == [{"text": "one", "text2": "two"}]


def test_a_picture_goes_along_and_its_error_is_shown(visit: Callable[..., Any]) -> None:
    page = visit(server := Server())
    page.wait_for_selector("html[data-ready]")
    choose(page, "shape")
    file = io.BytesIO()
    PIL.Image.new("RGB", (3, 2), "red").save(file, "PNG")
    page.set_input_files("#in-image", {"name": "ring.png", "mimeType": "image/png", "buffer": file.getvalue()})
    page.wait_for_selector("img:not([hidden])")
    page.click("#send")
    page.wait_for_selector("#found > li")
    assert server.asked[0]["inputs"][0]["image"].startswith("iVBORw0KGgo"), "base64 without the browser's prefix"
    assert page.inner_text("#found .said") == "the picture cannot be opened"


def test_a_key_is_asked_for_and_sent(visit: Callable[..., Any]) -> None:
    page = visit(Server(key="sesame"))
    page.wait_for_selector("#key-part:not([hidden])")
    assert page.inner_text("#status") == "this server asks for a key"
    page.fill("#key", "sesame")
    page.press("#key", "Enter")
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#tasks li").count() == 5
    assert page.is_hidden("#key-part")


def test_it_fits_a_phone_and_knows_dark_mode(visit: Callable[..., Any]) -> None:
    page = visit(Server(), color_scheme="dark", **PHONE)
    page.wait_for_selector("html[data-ready]")
    choose(page, "mood", "pair", "shape")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == DARK
    small = page.locator("button:visible, #tasks label").evaluate_all(
        "parts => parts.filter((part) => part.getBoundingClientRect().height < 36).length"
    )
    assert small == 0, "what is touched is large enough"
    light = visit(Server(), color_scheme="light")
    assert light.evaluate("getComputedStyle(document.body).backgroundColor") == LIGHT


def test_every_field_has_a_name_and_the_keyboard_reaches_all(visit: Callable[..., Any]) -> None:
    page = visit(Server())
    page.wait_for_selector("html[data-ready]")
    choose(page, "pair")
    unnamed = page.locator("input:visible, textarea:visible").evaluate_all(
        "fields => fields.filter((field) => !field.labels.length).length"
    )
    assert unnamed == 0
    page.focus("#in-text2")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    assert page.get_attribute("#status", "aria-live") == "polite"
