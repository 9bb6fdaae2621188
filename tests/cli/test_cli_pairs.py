"""Retrieval from the command line: dual encoders and pairs of encoders on tiny images with captions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from datasets import Dataset
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
from typer.testing import CliRunner

import sidestep as ss
from sidestep.backbone.processors import load_pair_processor
from sidestep.cli import app
from sidestep.data import Fields
from sidestep.data.pairs import captioned
from sidestep.disk.task_folder import WEIGHTS
from sidestep.kinds.prepare import prepare
from sidestep.training.callbacks import TellEpoch
from sidestep.training.trainer import largest_batch
from small_tasks import SPECIAL, WORDS, image_backbone, image_folder, text_backbone, tokenizer, write

FIELDS = Fields(image="image", text="caption")
COLUMNS = ["--task", "retrieval", "--image", "image", "--text", "caption"]
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def rows() -> list[dict[str, str]]:
    return [
        {"image": f"images/{kind}/{number}.png", "caption": f"{first} {WORDS[number]} {last} film"}
        for kind, last in (("bright", "good"), ("dark", "bad"))
        for number in range(4)
        for first in ("the", "a")
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones, eight images with two captions each."""
    folder = tmp_path_factory.mktemp("pairs")
    ids = {"vocab_size": len(SPECIAL) + len(WORDS), "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    text = {"hidden_size": 16, "max_position_embeddings": 32, **SMALL, **ids}
    image = {"hidden_size": 24, "image_size": 16, "patch_size": 8, **SMALL}
    CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=8)).save_pretrained(folder / "clip")
    tokenizer(pad=True).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder / "clip")
    text_backbone(folder / "bert")
    image_backbone(folder / "vit")
    image_folder(folder / "images", per_class=4)
    write(folder / "pairs.csv", rows())
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(place: Path, output: Path, *more: object, source: str = "pairs.csv") -> Result:
    data = ["--train", place / source, "--output", output, "--epochs", 1, "--batch-size", 4, "--dev-fraction", 0.25]
    return run("train", *COLUMNS, *data, "--quiet", *more)


@pytest.mark.parametrize("two", [False, True], ids=["clip", "two encoders"])
def test_a_task_of_pairs_is_trained_scored_and_used(place: Path, tmp_path: Path, two: bool) -> None:
    both = ["--backbone", place / "vit", "--text-backbone", place / "bert", "--dim", 8, "--loss", "triplet"]
    result = train(place, tmp_path / "task", *(both if two else ["--backbone", place / "clip"]))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "task" / "results.json").read_text())
    assert found["metric"] == "rsum"
    assert found["data"]["images"] == {"train": 6, "dev": 2}
    assert (found["data"]["train_rows"], found["data"]["dev_rows"]) == (12, 4)  # whole images are held out
    config = json.loads((tmp_path / "task" / "sidestep.json").read_text())
    assert {name: len(tower["digest"]["exact"]) for name, tower in config["backbone"]["towers"].items()} == {
        "image": 64,
        "text": 64,
    }
    assert (config["head"]["pool"], config["head"]["text_pool"]) == (("cls", "mean") if two else ("own", "own"))
    scored = run("eval", tmp_path / "task", "--data", place / "pairs.csv", "--quiet")
    assert scored.exit_code == 0, scored.output
    assert "t2i_r10" in scored.stdout
    output = ["--output", tmp_path / "near.csv", "--quiet"]
    used = run("predict", tmp_path / "task", "--data", place / "pairs.csv", *output)
    assert used.exit_code == 0, used.output
    with (tmp_path / "near.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8 * 5 + 16 * 5
    assert {line["query"] for line in lines} == {"image", "text"}
    assert run("inspect", tmp_path / "task").exit_code == 0


@pytest.mark.parametrize("method", ["sherl", "unipt"])
def test_a_recipe_of_retrieval_fills_what_was_not_typed(place: Path, tmp_path: Path, method: str) -> None:
    both = ["--backbone", place / "vit", "--text-backbone", place / "bert", "--dim", 8, "--set", "hidden=4"]
    data = ["--train", place / "pairs.csv", "--image", "image", "--text", "caption", "--dev-fraction", 0.25]
    quick = ["--epochs", 3, "--batch-size", 4, "--quiet", "--output", tmp_path / "task"]
    result = run("train", "--recipe", f"{method}/vse/f30k", *both, *data, *quick)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "task" / "results.json").read_text())
    assert found["metric"] == "rsum"
    assert (found["head"]["pool"], found["head"]["loss"], found["head"]["dim"]) == ("gpo", "triplet", 8)
    assert found["head"]["mean_epochs"] == 1
    assert found["settings"]["milestones"] == [2]  # 15 of 25, of 3
    assert (found["settings"]["schedule"], found["settings"]["warmup_steps"]) == ("step", 0)
    assert found["recipe"]["overridden"] == {"batch_size": 4, "dim": 8, "epochs": 3, "set": ["hidden=4"]}


def test_a_recipe_for_one_epoch_has_no_milestone_left(place: Path, tmp_path: Path) -> None:
    how = ["--backbone", place / "vit", "--text-backbone", place / "bert", "--dim", 8, "--set", "hidden=4"]
    result = train(place, tmp_path / "task", "--recipe", "sherl/vse/f30k", *how, "--batch-size", 4, "--epochs", 1)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "task" / "results.json").read_text())["settings"]
    assert (found["schedule"], found["milestones"]) == ("constant", [])


def test_a_stopped_run_of_augmented_images_goes_on_bit_for_bit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ["--backbone", place / "clip", "--augment", "crop", "--epochs", 3, "--loss", "triplet"]
    assert train(place, tmp_path / "whole", *how).exit_code == 0

    def stop(self: TellEpoch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.epoch = state.global_step / self.steps_per_epoch
        if state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TellEpoch, "on_step_begin", stop)
        train(place, tmp_path / "parts", *how)
    assert not (tmp_path / "parts" / "results.json").exists()
    result = train(place, tmp_path / "parts", *how, "--resume")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "parts" / "results.json").read_text())["resumed_from"] == 3
    whole, parts = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    plain = train(place, tmp_path / "plain", *how[:2], *how[4:])
    assert plain.exit_code == 0, plain.output
    other = load_file(tmp_path / "plain" / WEIGHTS)
    assert not all(torch.equal(whole[name], other[name]) for name in whole)  # the images were augmented


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"image": "images/none.png"}, "1 of 9 images are not there: 'images/none.png', looked for from"),
        ({"caption": " "}, "1 of 17 rows have no caption for their image: "),
        ({"image": ""}, "1 of 17 rows have a caption and no image, row 17"),
    ],
)
def test_bad_pairs_are_named(place: Path, tmp_path: Path, changed: dict[str, str], said: str) -> None:
    write(place / "bad.csv", [*rows(), {"image": "images/dark/0.png", "caption": "a film", **changed}])
    result = train(place, tmp_path / "never", "--backbone", place / "clip", source="bad.csv")
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--backbone", "clip", "--batch-size", "1"], "batch_size=1 for retrieval: the other pairs of a batch are"),
        (["--backbone", "vit"], "is a vit, no dual encoder (clip, "),
        (["--backbone", "bert", "--text-backbone", "vit"], "--backbone is the encoder of images"),
        (["--backbone", "clip", "--method", "unipt"], "the text tower of CLIPModel: unipt does not work on"),
        (["--backbone", "clip", "--shots", "2"], "retrieval has no classes"),
        (["--backbone", "clip", "--max-length", "33"], "has 32 positions: choose at most 32"),
    ],
)
def test_what_cannot_be_done_is_said(place: Path, tmp_path: Path, asked: list[str], said: str) -> None:
    named = [place / word if word in ("clip", "vit", "bert") else word for word in asked]
    result = train(place, tmp_path / "never", *named)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())


def test_captions_in_lists_and_in_rows_are_the_same_data(place: Path) -> None:
    flat = captioned(Dataset.from_list(rows()), FIELDS, place)
    assert [len(texts) for texts in flat["caption"][:]] == [2] * 8
    again = captioned(flat, FIELDS)
    assert again["caption"][:] == flat["caption"][:]


def test_an_image_stands_in_a_batch_once(place: Path) -> None:
    data = prepare(
        captioned(Dataset.from_list(rows()), FIELDS, place),
        None,
        FIELDS,
        load_pair_processor(str(place / "clip")),
        kind="retrieval",
        dev_fraction=0.25,
    )
    batch = data.collate([data.train[place] for place in (0, 1, 5)])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["labels"].tolist() == [0, 0, 2]
    assert batch["image_index"].tolist() == [0, 0, 1]
    assert len(batch["input_ids"]) == 3


def test_the_largest_batch_has_an_image_for_each_caption(place: Path) -> None:
    """It is planned and measured, so no batch of a run may be larger."""
    given = captioned(Dataset.from_list(rows()), FIELDS, place)
    data = prepare(given, None, FIELDS, load_pair_processor(str(place / "clip")), kind="retrieval", dev_fraction=0.25)
    for size in (2, 6):
        batch = largest_batch(data, size)
        assert (len(batch["pixel_values"]), len(batch["input_ids"])) == (size, size)
    assert len(largest_batch(data, 8)["pixel_values"]) == 6  # of so many images
    assert batch["input_ids"].shape[1] == max(data.train["length"][:])


def test_a_pair_from_python(place: Path) -> None:
    model = ss.attach(CLIPModel.from_pretrained(place / "clip"), ss.ReadConfig(rank=2), head=ss.Retrieve())
    assert isinstance(model, ss.PairModel)
