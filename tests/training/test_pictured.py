"""Tasks of a picture and a text, end to end: loss, training, saving, padded batches, features, banks, commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn import functional as F

import sidestep as ss
from commands import refusal, succeed, table
from pictured_tasks import CHAT, PICTURE, llava_backbone, llava_processor, pictured, qwen_backbone
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.backbone.vision_language import VisionLanguageProcessor
from sidestep.data import DataError, Fields
from sidestep.disk import task_folder
from sidestep.disk.feature_options import FeatureOptions
from sidestep.kinds.prepare import TaskData, prepare
from sidestep.kinds.running import logits, written
from sidestep.measure.plan import plan
from sidestep.measure.step import accepted
from sidestep.methods import MethodConfig
from sidestep.tasks import load as loading
from sidestep.tasks import predict
from sidestep.training.callbacks import StopIfDiverged
from sidestep.training.settings import TrainSettings
from sidestep.training.train import head_for, train
from small_tasks import write
from tiny import randomize

BACKBONES = ("llava", "qwen")
LABELS = {"lm": "answer", "single": "answer", "regress": "blue"}
SHERL = ss.SherlConfig(reduction=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both backbones, and files of rows."""
    folder = tmp_path_factory.mktemp("pictured")
    llava_backbone(folder / "llava", chat=CHAT)
    qwen_backbone(folder / "qwen")
    write(folder / "train.csv", pictured(folder / "pictures", 48))
    write(folder / "dev.csv", pictured(folder / "pictures", 12, 1))
    return folder


def rows(place: Path, count: int = 48, seed: int = 0) -> Dataset:
    return Dataset.from_list(pictured(place / "pictures", count, seed))


def task_data(place: Path, name: str, kind: str = "lm", **how: Any) -> TaskData:
    fields = Fields(text="prompt", image="picture", label=LABELS[kind])
    processor = load_processor(place / name, pictures=True)
    return prepare(rows(place), rows(place, 12, 1), fields, processor, kind=kind, **how)


def attached(place: Path, name: str, data: TaskData, method: MethodConfig = SHERL, seed: int = 0) -> ss.SideModel:
    torch.manual_seed(seed)
    backbone = load_backbone(place / name, writes="lm" if data.labels.kind == "lm" else None)
    return ss.attach(backbone, method, head=head_for(data))


def settings(output: Path, **changes: Any) -> TrainSettings:
    how = {"epochs": 2, "batch_size": 8, "learning_rate": 0.03, "progress": False, "measure": False, "patience": 0}
    return TrainSettings(output=output, **{**how, **changes})


# --- loss and batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_the_loss_is_on_the_answers_alone(place: Path, name: str) -> None:
    data = task_data(place, name)
    model = attached(place, name, data)
    randomize(model)
    model.eval()
    some = [data.train[number] for number in range(4)]
    expected, count = torch.tensor(0.0), 0
    for row in some:
        batch = accepted(model, data.collate([row]))
        labels, first = batch.pop("labels")[0], len(row["input_ids"])
        # the logits at a place are for the token after it
        found = model(**batch).logits[0, first - 1 : -1]
        expected, count = expected + F.cross_entropy(found, labels[first:], reduction="sum"), count + len(row["labels"])
    torch.testing.assert_close(model(**accepted(model, data.collate(some))).loss, expected / count)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("kind", ["lm", "single"])
@torch.no_grad()
def test_a_row_alone_is_read_as_in_a_padded_batch(place: Path, name: str, kind: str) -> None:
    """The tolerance is rounding: matrix products of other shapes."""
    data = task_data(place, name, kind)
    model = attached(place, name, data, ss.ReadConfig(rank=4))
    randomize(model)
    model.extras["processor"] = data.processor
    assert len(set(data.dev["length"][:])) > 1
    if kind == "lm":
        together, alone = (written(model, data.dev, data.generation, batch_size=size) for size in (12, 1))
        assert together == alone
        assert len(set(together)) > 1
    else:
        together, alone = (logits(model, data.dev, data.fields, batch_size=size) for size in (12, 1))
        torch.testing.assert_close(torch.from_numpy(together), torch.from_numpy(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_answers_are_the_same_with_a_cache_and_without(place: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    data = task_data(place, name)
    model = attached(place, name, data, ss.SideAttentionConfig(rank=4, heads=2))
    randomize(model)
    model.extras["processor"] = data.processor
    generation = replace(data.generation, max_new_tokens=5)
    cached = written(model, data.dev, generation)
    assert model.caches
    monkeypatch.setattr(type(model), "caches", False)
    assert written(model, data.dev, generation) == cached


# --- a run, and what it leaves -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_training_learns_the_pictures_and_a_reloaded_task_writes_the_same(
    place: Path, tmp_path: Path, name: str
) -> None:
    data = task_data(place, name)
    model = attached(place, name, data)
    results = train(model, data, settings(tmp_path / "task", epochs=8, learning_rate=0.04))
    losses = [entry["train_loss"] for entry in results.history]
    assert losses[-1] < 0.6 * losses[0]
    # the questions do not tell, and each answer is that of a third of the rows
    assert results.scores["exact_match"] > 0.4
    before = written(model, data.dev, data.generation)
    again = loading.load(tmp_path / "task")
    assert isinstance(again.extras["processor"], VisionLanguageProcessor)
    dev = rows(place, 12, 1)
    assert predict.evaluate(again, dev) == results.scores
    found = predict.predict(again, dev.remove_columns("answer"), batch_size=5)
    assert found["prediction"][:] == before
    assert found["picture"][:] == dev["picture"][:]
    with PIL.Image.open(dev[0]["picture"]) as picture:
        one = predict.predict(again, [{"prompt": dev[0]["prompt"], "picture": picture.copy()}])
    assert one["prediction"][0] == before[0]


def test_an_interrupted_run_continues_to_the_same_bits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 8 continues from a checkpoint within epoch 2 (step 7)."""
    data, how = task_data(place, "qwen"), {"save_steps": 7}

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt

    train(attached(place, "qwen", data), data, settings(tmp_path / "whole", **how))
    with monkeypatch.context() as patched:
        patched.setattr(StopIfDiverged, "on_step_begin", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(attached(place, "qwen", data), data, settings(tmp_path / "parts", **how))
    results = train(attached(place, "qwen", data, seed=9), data, settings(tmp_path / "parts", **how, resume=True))
    assert results.resumed_from == 7
    found = [load_file(tmp_path / name / task_folder.WEIGHTS) for name in ("whole", "parts")]
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


@pytest.mark.parametrize(("name", "kind"), [("llava", "lm"), ("qwen", "lm"), ("qwen", "single"), ("llava", "regress")])
def test_stored_features_give_the_same_training(place: Path, tmp_path: Path, name: str, kind: str) -> None:
    data = task_data(place, name, kind)
    found = []
    for where in ("off", "ram"):
        model = attached(place, name, data, ss.ReadConfig(rank=4))
        options = FeatureOptions(where=where)
        results = train(model, data, settings(tmp_path / where, features=options.where))
        found.append([entry["train_loss"] for entry in results.history])
        assert (results.features is not None) == (where == "ram")
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_bank_holds_tasks_of_pictures_and_texts(place: Path, tmp_path: Path) -> None:
    backbone = load_backbone(place / "qwen")
    for kind in ("single", "regress"):
        data = task_data(place, "qwen", kind)
        model = ss.attach(backbone, ss.ReadConfig(rank=4), head=head_for(data))
        train(model, data, settings(tmp_path / kind, epochs=1))
        ss.detach(model)
        succeed("bank", "add", tmp_path / "bank", kind, tmp_path / kind)
    how = ["--tasks", "single,regress", "--data", place / "dev.csv", "--output", tmp_path / "out.csv", "--quiet"]
    succeed("bank", "run", tmp_path / "bank", *how)
    alone = predict.predict(loading.load(tmp_path / "single"), rows(place, 12, 1))["prediction"][:]
    assert [row["prediction_single"] for row in table(tmp_path / "out.csv")] == alone


# --- commands ----------------------------------------------------------------------------------------------


def asked(place: Path, name: str, kind: str, output: Path) -> list[object]:
    source = ["--train", place / "train.csv", "--dev", place / "dev.csv", "--output", output]
    columns = ["--prompt", "prompt", "--image", "picture", "--label", LABELS[kind]]
    how = ["--kind", kind, "--set", "rank=4", "--epochs", "1", "--batch-size", "8", "--quiet"]
    return ["train", "--backbone", place / name, *source, *columns, *how]


@pytest.mark.parametrize(("name", "kind"), [("llava", "lm"), ("qwen", "single"), ("qwen", "regress")])
def test_the_commands_train_score_and_predict(place: Path, tmp_path: Path, name: str, kind: str) -> None:
    said = succeed(*asked(place, name, kind, tmp_path / "task")).output
    assert "learning rate" in said
    results = json.loads((tmp_path / "task" / "results.json").read_text())
    shown = succeed("eval", tmp_path / "task", "--data", place / "dev.csv", "--quiet").output
    score = {"lm": "exact_match", "single": "accuracy", "regress": "mse"}[kind]
    assert f"{results['scores'][score]:.4g}" in shown
    succeed("predict", tmp_path / "task", "--data", place / "dev.csv", "--output", tmp_path / "out.csv", "--quiet")
    found = table(tmp_path / "out.csv")
    assert len(found) == 12
    assert "prediction" in found[0]


def test_commands_say_what_is_amiss_before_training(place: Path, tmp_path: Path) -> None:
    command = asked(place, "llava", "lm", tmp_path / "never")
    at = command.index("--image")
    without = [*command[:at], *command[at + 2 :]]
    said = refusal(*without[: without.index("--prompt")], *without[without.index("--label") :], "--image", "picture")
    assert "reads a picture with a text (LlavaProcessor), but 'picture' alone is named" in said
    assert "leave these options out" in refusal(*command, "--image-size", "16")
    assert not (tmp_path / "never").exists()


def test_a_vision_language_model_is_planned_by_its_text(place: Path) -> None:
    for name in BACKBONES:
        found = plan(place / name, SHERL, writes="lm", batch=2, length=16)
        assert found.peak_bytes > 0


# --- a processor of another model --------------------------------------------------------------------------


def other_processor(place: Path, folder: Path, **changes: Any) -> Path:
    """A folder of the Llava with another processor."""
    folder.mkdir()
    for file in (place / "llava").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    llava_processor(chat=CHAT, **changes).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch_size": 2}, "Image features and image tokens do not match"),
        ({"side": 16}, "doesn't match model (8*8)"),
    ],
)
def test_pictures_of_another_form_are_refused(place: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    other_processor(place, tmp_path / "other", **changes)
    found = refusal(*asked(tmp_path, "other", "lm", tmp_path / "never")[:3], *asked(place, "llava", "lm", tmp_path)[3:])
    assert "cannot read what LlavaProcessor makes of the first training row. It says: " in found
    assert said in found


def test_other_tokens_for_a_picture_are_refused(place: Path, tmp_path: Path) -> None:
    data = task_data(place, "llava")
    model = attached(place, "llava", data)
    model.backbone.config.image_token_index = PICTURE + 1
    with pytest.raises(DataError, match=rf"reads a picture where token {PICTURE + 1} .* stands, and there is none in"):
        train(model, data, settings(tmp_path / "never"))
    small = load_backbone(place / "llava", writes="lm")
    small.resize_token_embeddings(PICTURE)
    small.save_pretrained(tmp_path / "small")
    few = ss.attach(load_backbone(tmp_path / "small", writes="lm"), SHERL)
    with pytest.raises(DataError, match=rf"has embeddings for {PICTURE} tokens"):
        train(few, data, settings(tmp_path / "never"))


def test_a_text_that_holds_a_pictures_token_and_no_picture_is_refused(place: Path, tmp_path: Path) -> None:
    texts = [{**row, "prompt": f"<|image_pad|> {row['prompt']}"} for row in pictured(place / "pictures", 12)]
    found = Dataset.from_list(texts)
    processor = load_processor(place / "llava")
    data = prepare(found, found, Fields(text="prompt", label="answer"), processor, kind="lm", separator=" ")
    model = attached(place, "llava", data)
    with pytest.raises(DataError, match=r"stands for a picture and is in rows 1, 2, .* of the training rows, but no"):
        train(model, data, settings(tmp_path / "never"))
