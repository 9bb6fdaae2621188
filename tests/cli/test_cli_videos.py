"""Video-text retrieval from the command line: a tiny CLIP on clips in files and in folders of frames."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
from typer.testing import CliRunner

import sidestep as ss
from sidestep.backbone.load import load_pair
from sidestep.cli import app
from sidestep.data import Fields, TableOptions
from sidestep.data.contents import content_hash
from sidestep.disk.task_folder import WEIGHTS
from sidestep.kinds.prepare import read_rows
from sidestep.tasks.bank import TaskBank
from sidestep.tasks.predict import evaluate, predict
from sidestep.training.callbacks import TellEpoch
from sidestep.training.run import DataSpec, ModelSpec, RunSpec
from sidestep.training.run import train as run_train
from sidestep.training.settings import TrainSettings
from small_tasks import SPECIAL, WORDS, tokenizer, write
from small_videos import cut, folder_of_frames, video

COLUMNS = ["--kind", "retrieval", "--video", "clip", "--text", "caption"]
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
FIELDS = Fields(video="clip", text="caption")
CLIPS = 8


def name_of(number: int) -> str:
    """Every second clip is a folder of frames."""
    return f"clips/{number}" if number % 2 else f"clips/{number}.mp4"


def rows() -> list[dict[str, str]]:
    return [
        {"clip": name_of(number), "caption": f"{first} {WORDS[number]} film"}
        for number in range(CLIPS)
        for first in ("the", "a")
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP, and eight clips of three to ten frames with two captions each."""
    folder = tmp_path_factory.mktemp("videos")
    torch.manual_seed(0)
    ids = {"vocab_size": len(SPECIAL) + len(WORDS), "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    text = {"hidden_size": 16, "max_position_embeddings": 32, **SMALL, **ids}
    image = {"hidden_size": 24, "image_size": 16, "patch_size": 8, **SMALL}
    CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=8)).save_pretrained(folder / "clip")
    tokenizer(pad=True).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder / "clip")
    for number in range(CLIPS):
        (folder_of_frames if number % 2 else video)(folder / name_of(number), 3 + number)
    write(folder / "pairs.csv", rows())
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(place: Path, output: Path, *more: object, source: str = "pairs.csv") -> Result:
    data = ["--train", place / source, "--output", output, "--epochs", 1, "--batch-size", 4, "--dev-fraction", 0.25]
    return run("train", *COLUMNS, *data, "--backbone", place / "clip", "--quiet", *more)


def told(result: Result) -> str:
    return " ".join(result.stderr.split())


def test_a_task_of_videos_is_trained_scored_used_and_banked(place: Path, tmp_path: Path) -> None:
    result = train(place, tmp_path / "task", "--frames", 5, "--set", "rank=2")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "task" / "results.json").read_text())
    assert found["metric"] == "rsum"
    assert (found["data"]["videos"], found["data"]["frames"]) == ({"train": 6, "dev": 2}, 5)
    assert found["data"]["dev_source"].startswith("2 of the 8 videos, held out")
    config = json.loads((tmp_path / "task" / "sidestep.json").read_text())
    assert config["preprocessing"]["fields"] == {**dict.fromkeys(config["preprocessing"]["fields"]), **vars(FIELDS)}
    scored = run("eval", tmp_path / "task", "--data", place / "pairs.csv", "--quiet")
    assert scored.exit_code == 0, scored.output
    output = ["--output", tmp_path / "near.csv", "--quiet"]
    assert run("predict", tmp_path / "task", "--data", place / "pairs.csv", *output).exit_code == 0
    with (tmp_path / "near.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == CLIPS * 5 + 2 * CLIPS * 5
    assert {line["query"] for line in lines} == {"video", "text"}
    assert {Path(line["video"]).name for line in lines if line["query"] == "video"} == {
        Path(name_of(number)).name for number in range(CLIPS)
    }
    assert run("inspect", tmp_path / "task").exit_code == 0
    assert '"clip": "clip.mp4"' in (tmp_path / "task" / "README.md").read_text()

    model = ss.load(tmp_path / "task")
    assert model.extras["processor"].image.frames == 5
    given = read_rows(str(place / "pairs.csv"), FIELDS, TableOptions(), "retrieval", split="train")
    alone = evaluate(model, given)
    assert all(f"{name} " in scored.stdout for name in alone)
    expected = predict(model, given)
    ss.detach(model)
    assert run("bank", "add", tmp_path / "bank", "films", tmp_path / "task").exit_code == 0
    bank = TaskBank(load_pair(str(place / "clip")), tmp_path / "bank")
    again = predict(bank.activate("films"), given)
    assert again.to_dict() == expected.to_dict()
    refused = run(
        "bank", "run", tmp_path / "bank", "--task", "films", "--data", place / "pairs.csv", *output, "--overwrite"
    )
    assert "is a task of retrieval, which looks at rows together" in told(refused)


def test_a_stopped_run_of_videos_goes_on_bit_for_bit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ["--frames", 3, "--augment", "crop", "--epochs", 2]
    assert train(place, tmp_path / "whole", *how).exit_code == 0

    def stop(self: TellEpoch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.epoch = state.global_step / self.steps_per_epoch
        if state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TellEpoch, "on_step_begin", stop)
        train(place, tmp_path / "parts", *how)
    other = train(place, tmp_path / "parts", "--frames", 4, *how[2:], "--resume")
    assert "another run" in told(other) or "frames" in told(other)
    result = train(place, tmp_path / "parts", *how, "--resume")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "parts" / "results.json").read_text())["resumed_from"] == 3
    whole, parts = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_papers_recipe_sets_frames_and_words(place: Path, tmp_path: Path) -> None:
    quick = ["--set", "hidden=4", "--epochs", 1, "--batch-size", 4, "--quiet", "--output", tmp_path / "task"]
    data = ["--train", place / "pairs.csv", "--video", "clip", "--text", "caption", "--dev-fraction", 0.25]
    recipe = ["--recipe", "sherl/clip4clip/msrvtt", "--backbone", place / "clip"]
    result = run("train", *recipe, *data, *quick)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "task" / "results.json").read_text())
    assert (found["data"]["frames"], found["head"]["loss"], found["head"]["pool"]) == (12, "contrastive", "own")
    assert (found["learning_rate"], found["settings"]["schedule"]) == (1e-4, "cosine")
    stored = json.loads((tmp_path / "task" / "sidestep.json").read_text())["preprocessing"]
    assert stored["max_length"] == 32


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"clip": "clips/none.mp4"}, "1 of 9 videos are not there: 'clips/none.mp4', looked for from"),
        ({"clip": "bad/empty"}, " videos of column 'clip' cannot be read: "),
        ({"clip": ""}, "1 of 17 rows have a caption and no video, row 17"),
        ({"caption": " "}, "1 of 17 rows have no caption for their video: "),
    ],
)
def test_bad_rows_are_named(place: Path, tmp_path: Path, changed: dict[str, str], said: str) -> None:
    (place / "bad" / "empty").mkdir(parents=True, exist_ok=True)
    write(place / "bad.csv", [*rows(), {"clip": name_of(0), "caption": "a film", **changed}])
    result = train(place, tmp_path / "never", source="bad.csv")
    assert result.exit_code == 2, result.output
    assert said in told(result)


@pytest.mark.filterwarnings("always::sidestep.data.DataWarning")
def test_bad_files_are_left_out_and_counted(place: Path, tmp_path: Path) -> None:
    (place / "bad").mkdir(exist_ok=True)
    cut(video(place / "bad" / "noise.mp4"), 0.02)
    cut(video(place / "bad" / "short.mp4", 40), 0.5)
    more = [{"clip": f"bad/{name}.mp4", "caption": f"a {name} film"} for name in ("noise", "short")]
    write(place / "some.csv", [*rows(), *more])
    result = train(place, tmp_path / "task", "--skip-bad-files", source="some.csv")
    assert result.exit_code == 0, result.output
    assert "Warning: 1 of 10 videos of the training rows cannot be read and were left out: " in told(result)
    assert told(result).count("videos of column 'clip' end too early") == 1
    found = json.loads((tmp_path / "task" / "results.json").read_text())["data"]
    assert (found["skipped_files"], sum(found["videos"].values())) == (1, CLIPS + 1)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--frames", "0"], "frames=0: give a whole number of at least 1"),
        (["--image", "clip"], "so name one column of images (--image) or of videos (--video)"),
        (
            ["--kind", "single", "--label", "caption"],
            "with their captions on a dual encoder: say --kind retrieval",
        ),
    ],
)
def test_what_cannot_be_done_is_said(place: Path, tmp_path: Path, asked: list[str], said: str) -> None:
    result = train(place, tmp_path / "never", *asked)
    assert result.exit_code == 2, result.output
    assert said in told(result)


def test_frames_are_for_videos(place: Path, tmp_path: Path) -> None:
    write(place / "images.csv", [{"clip": "clips/1/frame0.png", "caption": "a film"}] * 3)
    data = ["--train", place / "images.csv", "--backbone", place / "clip", "--output", tmp_path / "never", "--quiet"]
    result = run("train", "--kind", "retrieval", "--image", "clip", "--text", "caption", "--frames", 3, *data)
    assert "frames=3 is for a column of videos (--video): leave --frames out" in told(result)


def test_videos_from_python(place: Path, tmp_path: Path) -> None:
    given = read_rows(str(place / "pairs.csv"), FIELDS, TableOptions(), "retrieval", split="train")
    spec = RunSpec(
        data=DataSpec(train=given, video="clip", text="caption", kind="retrieval", frames=2, dev_fraction=0.25),
        model=ModelSpec(backbone=place / "clip", method=ss.ReadConfig(rank=2)),
        training=TrainSettings(output=tmp_path / "task", epochs=1, batch_size=4, progress=False),
    )
    model, data, results = run_train(spec)
    assert isinstance(model, ss.PairModel)
    assert data.train[0]["pixel_values"].shape == (2, 3, 16, 16)
    assert content_hash(data.train) != content_hash(data.dev)
    assert results.data["frames"] == 2
