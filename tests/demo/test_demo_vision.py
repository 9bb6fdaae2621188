"""The vision demo: the backbone that comes with Sidestep, its images, and its whole course on a tiny backbone."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from typer.testing import CliRunner

import own_process
import sidestep
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.cli import app
from sidestep.demo import vision as demo_vision
from sidestep.demo.vision import digits
from small_tasks import image_backbone


def test_the_backbone_is_stored_in_half_and_loaded_in_single_precision() -> None:
    assert demo_vision.BACKBONE.is_relative_to(Path(sidestep.__file__).parent)
    stored = load_file(demo_vision.BACKBONE / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    backbone = load_backbone(demo_vision.BACKBONE)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    processed = load_processor(demo_vision.BACKBONE)(images=[np.zeros((8, 8, 3), np.uint8)], return_tensors="pt")
    assert processed["pixel_values"].shape == (1, 3, 32, 32)
    assert backbone(**processed).last_hidden_state.isfinite().all()


def test_its_files_say_what_it_is() -> None:
    names = {path.name for path in demo_vision.BACKBONE.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    about = (demo_vision.BACKBONE / "README.md").read_text()
    assert "CIFAR-10" in about
    assert "Caltech-101" in about


def test_its_files_are_package_data() -> None:
    root = Path(sidestep.__file__).parent
    project = Path(__file__).parents[2] / "pyproject.toml"
    patterns = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["sidestep"]
    packed = {path for pattern in patterns for path in root.glob(pattern)}
    assert set(demo_vision.BACKBONE.iterdir()) <= packed


def test_the_images_are_the_same_every_time_and_of_all_classes() -> None:
    train, test = digits()
    assert (len(train), len(test)) == (400, 1397)
    counts = [train["label"][:].count(name) for name in "0123456789"]
    assert set(counts) <= {38, 39, 40, 41, 42}
    pixels = np.asarray(train[0]["image"])
    assert pixels.shape == (8, 8)
    assert pixels.max() == 255
    again, _ = digits()
    assert train["label"][:] == again["label"][:]
    assert (np.asarray(again[0]["image"]) == pixels).all()


def test_no_held_out_image_is_trained_on() -> None:
    train, test = digits()
    seen = {row["image"].tobytes() for row in train}
    assert not any(row["image"].tobytes() in seen for row in test)


def few() -> tuple[Dataset, Dataset]:
    train, test = digits()
    return train.select(range(40)), test.select(range(30))


def test_the_demo_trains_compares_and_predicts_in_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_vision, "BACKBONE", image_backbone(tmp_path / "vit"))
    monkeypatch.setattr(demo_vision, "digits", few)
    monkeypatch.setattr(demo_vision, "CURVE", 10)
    monkeypatch.setattr(demo_vision, "EPOCHS", 1)
    monkeypatch.setattr("sidestep.demo.shared.subprocess.run", lambda command, **_: own_process.run(*command[2:]))
    left = tmp_path / "runs" / "images" / "9" / "old.png"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"what an earlier demo left is replaced")
    demo_vision.run(tmp_path / "runs")
    shown = capsys.readouterr().out
    for part in ("linear probe", "DTL+", "SynQT", "majority", "full tuning", "kept for backward", "task file"):
        assert part in shown
    predictions = [json.loads(line) for line in (tmp_path / "runs" / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == demo_vision.SHOWN
    assert {row["prediction"] for row in predictions} <= set("0123456789")
    assert all("/".join(Path(row["image"]).parts[-2:]) in shown for row in predictions)


def test_the_flag_chooses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(demo_vision, "run", chosen.append)
    done = CliRunner().invoke(app, ["demo", "--vision", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert chosen == [tmp_path]
