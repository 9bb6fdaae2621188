"""Comparisons on rows of a picture and a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pictured_tasks import CHAT, llava_backbone, pictured
from sidestep.compare.bench import pairs
from sidestep.compare.files import comparison_from
from sidestep.compare.runs import run
from sidestep.compare.spec import Comparison
from small_tasks import image_backbone, reviews, text_backbone, write

PICTURED = {"name": "colours", "train": "train.csv", "dev": "dev.csv", "text": "prompt", "image": "picture"}
TEXTS = {"name": "reviews", "train": "reviews.tsv", "text": "text"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with backbones of three sorts, rows of pictures with texts, and texts alone."""
    folder = tmp_path_factory.mktemp("compare_pictured")
    llava_backbone(folder / "llava", chat=CHAT)
    text_backbone(folder / "bert")
    image_backbone(folder / "vit")
    write(folder / "train.csv", pictured(folder / "pictures", 24))
    write(folder / "dev.csv", pictured(folder / "pictures", 12, 1))
    write(folder / "reviews.tsv", reviews(16))
    return folder


def comparison(place: Path, **changes: Any) -> Comparison:
    given = {
        "backbone": [{"model": "llava"}],
        "task": [{**PICTURED, "label": "answer"}],
        "contender": [
            {"method": "read", "rates": [0.01], "set": {"rank": 4}},
            {"method": "lora", "rates": [0.003], "set": {"rank": 2}},
        ],
        "seeds": [0],
        "epochs": 1,
        "batch_size": 8,
        "costs": False,
    }
    return comparison_from({**given, **changes}, place, "the test")


@pytest.mark.parametrize("kind", ["single", "lm"])
def test_contenders_are_scored_and_measured_with_pictures(place: Path, tmp_path: Path, kind: str) -> None:
    task = {**PICTURED, "label": "answer", "kind": kind}
    measured = {"batch": 2, "length": 8, "repeats": 1, "warmup": 0} if kind == "lm" else False
    asked = comparison(place, task=[task], costs=measured)
    found = run(asked, tmp_path / "results.jsonl", tell=lambda text: None).records
    assert {one.status for one in found} == {"ok"}
    costs = [one.settings for one in found if one.kind == "cost"]
    assert len([one for one in found if one.kind == "score"]) == 2
    assert len(costs) == (2 if measured else 0)
    assert all(one["length"] > 8 + 4 and one["image_size"] == 8 for one in costs)  # four tokens a picture, and a chat


def test_a_vision_language_model_reads_texts_alone_too(place: Path) -> None:
    asked = comparison(
        place, backbone=[{"model": "llava"}, {"model": "bert"}], task=[{**PICTURED, "label": "answer"}, TEXTS]
    )
    found = {name: [task.name for task in tasks] for name, tasks in pairs(asked).items()}
    assert found == {"llava": ["colours", "reviews"], "bert": ["reviews"]}


def test_rows_of_pictures_with_texts_need_a_backbone_that_reads_both(place: Path) -> None:
    for model, reads in (("bert", "text"), ("vit", "images")):
        with pytest.raises(ValueError, match=f"backbone '{model}' reads {reads}, but no task has any"):
            pairs(comparison(place, backbone=[{"model": model}]))
    with pytest.raises(ValueError, match="task 'colours' is of pictures with texts, but no backbone reads pictures"):
        pairs(comparison(place, backbone=[{"model": "bert"}], task=[{**PICTURED, "label": "answer"}, TEXTS]))


def test_sounds_stand_alone(place: Path) -> None:
    with pytest.raises(ValueError, match="For a vision-language model name text and image"):
        comparison(place, task=[{"name": "x", "train": "train.csv", "text": "prompt", "audio": "picture"}])
