"""Comparisons of methods on pairs: both towers of a dual encoder, images and videos."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
from typer.testing import CliRunner

from sidestep.cli import app
from sidestep.compare.files import comparison_from
from sidestep.compare.records import Record, read
from sidestep.compare.runs import run
from small_tasks import SPECIAL, WORDS, image_backbone, text_backbone, tokenizer, write
from small_videos import folder_of_frames

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CLIPS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP, two encoders, and clips of three to ten frames with two captions each."""
    folder = tmp_path_factory.mktemp("pairs")
    ids = {"vocab_size": len(SPECIAL) + len(WORDS), "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    text = {"hidden_size": 16, "max_position_embeddings": 32, **SMALL, **ids}
    image = {"hidden_size": 24, "image_size": 16, "patch_size": 8, **SMALL}
    CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=8)).save_pretrained(folder / "clip")
    tokenizer(pad=True).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder / "clip")
    text_backbone(folder / "bert")
    image_backbone(folder / "vit")
    rows = []
    for number in range(CLIPS):
        folder_of_frames(folder / "clips" / str(number), 3 + number)
        rows += [{"clip": f"clips/{number}", "caption": f"{first} {WORDS[number]} film"} for first in ("the", "a")]
    write(folder / "pairs.csv", rows)
    write(folder / "images.csv", [{**row, "clip": f"{row['clip']}/frame0.png"} for row in rows])
    return folder


def records_of(path: Path) -> dict[tuple[str, str], Record]:
    found, broken = read(path)
    assert not broken
    return {(record.kind, record.settings["contender"]): record for record in found}


def test_methods_are_compared_on_videos(place: Path, tmp_path: Path) -> None:
    (place / "study.toml").write_text(
        """
seeds = [0]
epochs = 1
batch_size = 4
holdout = 0.34
[[backbone]]
model = "clip"
[[task]]
name = "films"
train = "pairs.csv"
dev = "pairs.csv"
kind = "retrieval"
video = "clip"
text = "caption"
frames = 3
[[contender]]
method = "read"
set = { rank = 2 }
rates = [1e-3, 3e-3]
[[contender]]
method = "sherl"
set = { pool_tokens = true, hidden = 8 }
rates = [1e-3, 3e-3]
[[contender]]
method = "unipt"
rates = [1e-3, 3e-3]
[costs]
batch = 3
length = 7
repeats = 1
warmup = 0
"""
    )
    result = CliRunner().invoke(app, ["compare", str(place / "study.toml"), "--output", str(tmp_path / "out.jsonl")])
    assert result.exit_code == 0, result.output
    found = records_of(tmp_path / "out.jsonl")
    assert found["score", "unipt"].status == "refused"
    assert "the text tower of CLIPModel" in str(found["score", "unipt"].reason)
    for name in ("read", "sherl"):
        score, cost = found["score", name], found["cost", name]
        assert (score.measured["metric"], score.settings["frames"]) == ("rsum", 3)
        assert score.settings["columns"] == {"text": "caption", "video": "clip"}
        assert score.settings["rows"] == 2 * CLIPS
        assert cost.settings["frames"] == 3
        assert cost.measured["planned_peak_bytes"] == pytest.approx(cost.measured["peak_bytes"], rel=0.1)
        assert cost.measured["step_seconds"]["median"] > 0
    again = CliRunner().invoke(app, ["compare", str(place / "study.toml"), "--output", str(tmp_path / "out.jsonl")])
    assert ", 0 of them new" in again.output
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "out.jsonl"), "--markdown"])
    assert shown.exit_code == 0, shown.output
    assert "films" in shown.output


def test_two_encoders_are_compared_on_images(place: Path, tmp_path: Path) -> None:
    asked = ["--kind", "retrieval", "--image", "clip", "--text", "caption", "--methods", "probe", "--seeds", "1"]
    both = ["--backbone", str(place / "vit"), "--text-backbone", str(place / "bert"), "--no-costs", "--quick"]
    data = ["--train", str(place / "images.csv"), "--epochs", "1", "--batch-size", "4"]
    result = CliRunner().invoke(app, ["compare", *both, *asked, *data, "--output", str(tmp_path / "out.jsonl")])
    assert result.exit_code == 0, result.output
    score = records_of(tmp_path / "out.jsonl")["score", "probe"]
    assert score.status == "ok"
    assert score.settings["model"] == "VisionTextDualEncoderModel of vit and bert"


@pytest.mark.parametrize(
    ("backbone", "task", "said"),
    [
        (
            {"model": "vit"},
            {"kind": "retrieval", "video": "clip", "text": "caption"},
            "'vit' reads images, but no task",
        ),
        ({"model": "clip"}, {"text": "caption"}, "'clip' reads pairs, but no task has any"),
        ({"model": "clip"}, {"kind": "retrieval", "text": "caption"}, r"so name one column of images \(--image\) or"),
        ({"model": "clip"}, {"kind": "single", "video": "clip"}, "images or videos are for kind = retrieval"),
        (
            {"model": "clip"},
            {"kind": "retrieval", "video": "clip", "text": "caption", "frames": 0},
            "frames=0, but it must be at least 1",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(
    place: Path, tmp_path: Path, backbone: dict[str, str], task: dict[str, str], said: str
) -> None:
    values = {"backbone": [backbone], "task": [{"train": "pairs.csv", **task}], "methods": ["probe"], "costs": False}
    with pytest.raises(ValueError, match=said):
        run(comparison_from(values, place, "the test"), tmp_path / "out.jsonl")
