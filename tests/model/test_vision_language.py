"""A vision-language model from a folder: both heads, pictures that count, text that is written with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sidestep as ss
from sidestep.backbone import positions
from sidestep.backbone.load import load_backbone
from tiny import FURTHER, LABELS, logits, randomize

LLAVA = FURTHER["llava"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llava")
    LLAVA.model().save_pretrained(place)
    return place


@pytest.mark.parametrize(("loaded", "head"), [({}, ss.Classify(num_labels=LABELS)), ({"writes": "lm"}, None)])
@torch.no_grad()
def test_a_task_is_saved_and_loaded_and_reads_the_picture(
    folder: Path, tmp_path: Path, loaded: dict[str, Any], head: Any
) -> None:
    model = ss.attach(load_backbone(folder, **loaded), ss.ReadConfig(rank=4), head=head)
    randomize(model)
    model.eval()
    batch = LLAVA.inputs()
    expected = logits(model(**batch))
    model.save_pretrained(tmp_path / "task")
    again = ss.load(tmp_path / "task", load_backbone(folder, **loaded)).eval()
    assert torch.equal(logits(again(**batch)), expected)
    other = {**batch, "pixel_values": -batch["pixel_values"]}
    assert not torch.allclose(logits(again(**other)), expected)


@pytest.mark.parametrize("config", [ss.ReadConfig(rank=4), ss.SideAttentionConfig(rank=4, heads=2)])
def test_text_about_a_picture_is_written_with_a_cache_as_without(folder: Path, config: Any) -> None:
    model = ss.attach(load_backbone(folder, writes="lm"), config)
    randomize(model)
    model.eval()
    row = {name: tensor[:1] for name, tensor in LLAVA.inputs().items()}
    with_cache, without = (
        model.generate(**row, max_new_tokens=6, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_positions_are_those_of_the_language_model() -> None:
    """The table of its vision tower has five rows."""
    assert positions(LLAVA.model()) == (None, None)
