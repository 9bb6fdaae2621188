"""Plans of dual encoders: both towers are counted, and every frame of a video."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, ViTConfig
from typer.testing import CliRunner

import sidestep as ss
from dual_encoders import END, IMAGE, TEXT, clip
from sidestep.backbone.source import LoadError
from sidestep.cli import app
from sidestep.measure.plan import plan, plan_for
from sidestep.measure.step import measure_step
from sidestep.methods import MethodConfig

PAIRS, FRAMES = 3, 4
METHODS: dict[str, MethodConfig] = {
    "read": ss.ReadConfig(rank=4),
    "sherl": ss.SherlConfig(pool_tokens=True, hidden=8),
}


def batch(frames: int = FRAMES) -> dict[str, Tensor]:
    mask = torch.ones(PAIRS, 7, dtype=torch.long)
    mask[-1, 1:] = 0
    pixels = torch.zeros(PAIRS, frames, 3, 16, 16)
    return {
        "pixel_values": pixels,
        "input_ids": mask * END,
        "attention_mask": mask,
        "labels": torch.arange(PAIRS),
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_of_videos_is_within_a_tenth_of_a_step(name: str) -> None:
    model = ss.attach(clip(), METHODS[name], head=ss.Retrieve())
    inputs = batch() | {"frame_mask": torch.ones(PAIRS, FRAMES, dtype=torch.bool)}
    inputs["frame_mask"][0, -1] = False
    cost = measure_step(model, inputs)
    found = plan_for(model, inputs, optimizer="AdamW (fused)")
    assert found.saved_bytes == pytest.approx(cost.kept_bytes, rel=0.1)
    assert found.peak_bytes == pytest.approx(cost.peak_bytes, rel=0.1)
    assert (found.batch, found.length, found.image_size, found.frames) == (PAIRS, 7, 16, FRAMES)


def test_a_plan_by_the_config_is_that_of_the_model() -> None:
    how = {"head": ss.Retrieve(), "batch": PAIRS, "length": 7}
    by_frames = {}
    for frames in (1, FRAMES):
        model = ss.attach(clip(), METHODS["read"], head=ss.Retrieve())
        found = plan(model.backbone.config, METHODS["read"], frames=frames, **how)
        expected = plan_for(model, batch(frames))
        assert found.to_dict() == expected.to_dict()
        by_frames[frames] = found.saved_bytes
    images = plan(clip().config, METHODS["read"], **how)
    assert images.frames is None
    assert images.saved_bytes < by_frames[1] < by_frames[FRAMES]


def test_a_plan_of_two_encoders() -> None:
    how = {"head": ss.Retrieve(dim=8), "batch": PAIRS, "length": 7, "frames": FRAMES}
    found = plan(ViTConfig(**IMAGE), METHODS["read"], text_backbone=BertConfig(**TEXT), **how)
    assert (found.frames, found.image_size, found.length) == (FRAMES, 16, 7)
    with pytest.raises(LoadError, match=r"no dual encoder \(clip, "):
        plan(ViTConfig(**IMAGE), METHODS["read"], **how)


def test_frames_of_what_reads_none_are_refused() -> None:
    with pytest.raises(ValueError, match="frames=4, but BertModel reads no videos"):
        plan(BertConfig(**TEXT), METHODS["read"], frames=FRAMES)
    with pytest.raises(ValueError, match="frames=0, but it must be at least 1"):
        plan(clip().config, METHODS["read"], head=ss.Retrieve(), frames=0)


def test_the_command_plans_videos(tmp_path: Path) -> None:
    clip().config.save_pretrained(tmp_path)
    asked = ["--kind", "retrieval", "--backbone", str(tmp_path), "--batch", "3", "--length", "7", "--set", "rank=4"]
    shown = CliRunner().invoke(app, ["plan", *asked, "--frames", "4"])
    assert shown.exit_code == 0, shown.output
    assert "3 x (7 tokens, 4 frames of 16 px)" in " ".join(shown.stdout.split())
    found = CliRunner().invoke(app, ["plan", *asked, "--frames", "4", "--json"])
    expected = plan(clip().config, METHODS["read"], head=ss.Retrieve(), batch=3, length=7, frames=4)
    assert json.loads(found.stdout)["plan"]["peak_bytes"] == expected.peak_bytes
