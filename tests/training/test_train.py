"""Whole training runs on tiny models: what they save, that resuming is exact, and how they refuse or fail."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import own_process
import sidestep as ss
from sidestep import metrics
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.data import DataError, DataWarning, Fields, read
from sidestep.disk import task_folder
from sidestep.disk.table_files import ENDINGS, write_table
from sidestep.kinds import kind_named
from sidestep.kinds.prepare import TaskData, prepare
from sidestep.kinds.running import logits
from sidestep.measure.step import measure_step
from sidestep.methods import MethodConfig
from sidestep.tasks import load as loading
from sidestep.tasks import predict
from sidestep.training import checkpoints, trainer
from sidestep.training.callbacks import ExactResume, StopIfDiverged
from sidestep.training.checkpoints import OutputError
from sidestep.training.settings import TrainSettings
from sidestep.training.train import TrainError, head_for, train
from small_tasks import image_backbone, image_folder, padless_backbone, reviews, text_backbone, tokenizer, write

READ = ss.ReadConfig(rank=8)
TEXT = Fields(text="text", label="label")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_backbone(tmp_path_factory.mktemp("bert"))


def rows(count: int = 64, seed: int = 0) -> Dataset:
    return Dataset.from_list(reviews(count, seed))


def task_data(backbone: Path, fields: Fields = TEXT, **how: Any) -> TaskData:
    return prepare(rows(), how.pop("dev", rows(24, 1)), fields, load_processor(backbone), **how)


def attached(backbone: Path, data: TaskData, method: MethodConfig = READ, seed: int = 0) -> ss.SideModel:
    torch.manual_seed(seed)
    return ss.attach(load_backbone(backbone), method, head=head_for(data))


def settings(output: Path, **changes: Any) -> TrainSettings:
    how: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 0.02, "progress": False, "log_steps": 3}
    return TrainSettings(output=output, **{**how, **changes})


def task_bytes(folder: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(folder / task_folder.WEIGHTS).items()}


def log_of(folder: Path) -> list[dict[str, Any]]:
    """What the last checkpoint says was logged, without times."""
    last = checkpoints.last_complete(folder / checkpoints.FOLDER)
    assert last is not None
    timing = ("runtime", "per_second")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timing)}
        for entry in checkpoints.read_state(last)["log_history"]
    ]


# --- a run, and what it leaves ----------------------------------------------------------------------------


def test_a_run_learns_and_its_saved_task_scores_the_same(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    results = train(attached(backbone, data), data, settings(tmp_path, epochs=8, learning_rate=0.03))
    assert results.scores["accuracy"] > 0.7
    again = predict.evaluate(loading.load(tmp_path), rows(24, 1))
    assert again == results.scores


def test_results_say_what_was_done_and_what_it_cost(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    model = attached(backbone, data)
    train(model, data, settings(tmp_path, bf16=True))
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["scores"].keys() == {"accuracy", "f1", "f1_macro", "f1_micro", "matthews"}
    assert found["trainable_parameters"] == sum(p.numel() for _, p in model.trained_parameters())
    assert found["task_bytes"] == (tmp_path / task_folder.WEIGHTS).stat().st_size
    assert found["step"]["rows"] == 8
    assert found["step"]["tokens"] == max(data.train["length"][:])
    assert 0 < found["step"]["kept_bytes"] < found["step"]["peak_bytes"]
    assert found["backbone"]["digest"] == model.digest.exact
    assert (found["seed"], found["settings"]["bf16"], found["learning_rate"]) == (0, True, 0.02)
    assert found["versions"]["transformers"] == transformers.__version__
    assert found["seconds"] > 0
    assert [entry["epoch"] for entry in found["history"]] == [1.0, 2.0]
    assert found["data"]["dev_source"] == "24 rows of their own"
    assert any("no final norm" in note for note in found["notes"])


def test_checkpoints_hold_the_task_alone_the_best_and_the_last(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    train(attached(backbone, data), data, settings(tmp_path, epochs=5))
    folders = sorted((tmp_path / checkpoints.FOLDER).glob("checkpoint-*"), key=checkpoints.step_of)
    assert len(folders) <= 2
    assert checkpoints.step_of(folders[-1]) == 40
    assert (folders[-1] / "model.safetensors").stat().st_size < 6000  # the backbone has 13,000 bytes
    assert not list(folders[-1].glob("tokenizer*"))


def test_the_best_epoch_is_kept_not_the_last(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.9, 0.7])
    kept: list[dict[str, torch.Tensor]] = []
    data = task_data(backbone)
    model = attached(backbone, data)

    def judge(self: Any, evaluation: Any) -> dict[str, float]:
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"accuracy": next(scores)}

    monkeypatch.setattr(metrics.ComputeMetrics, "__call__", judge)
    results = train(model, data, settings(tmp_path, epochs=3))
    assert results.best_epoch == 2
    saved = loading.load(tmp_path).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in kept[1].items())
    assert not all(torch.equal(saved[name], value) for name, value in kept[2].items())


def test_the_last_epoch_is_kept_when_asked_and_leaves_no_checkpoint(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(metrics.ComputeMetrics, "__call__", lambda self, _: {"accuracy": next(scores)})
    data = task_data(backbone)
    model = attached(backbone, data)
    how = settings(tmp_path, epochs=3, keep="last", checkpoints=False, measure=False)
    results = train(model, data, how)
    assert (results.best_epoch, results.scores) == (3, {"accuracy": 0.7})
    assert results.step is None
    assert not list((tmp_path / checkpoints.FOLDER).glob("checkpoint-*"))
    saved = loading.load(tmp_path).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_the_scores_of_the_last_epoch_are_those_of_the_saved_task(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    results = train(attached(backbone, data), data, settings(tmp_path, keep="last"))
    assert predict.evaluate(loading.load(tmp_path), rows(24, 1)) == results.scores
    assert len(results.epoch_seconds) == 2
    assert 0 < sum(results.epoch_seconds) < results.seconds
    assert len(list((tmp_path / checkpoints.FOLDER).glob("checkpoint-*"))) == 2


def test_early_stopping_waits_for_as_many_epochs_as_asked(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.9, 0.7, 0.8, 0.99])
    monkeypatch.setattr(metrics.ComputeMetrics, "__call__", lambda self, _: {"accuracy": next(scores)})
    data = task_data(backbone)
    results = train(attached(backbone, data), data, settings(tmp_path, epochs=9, patience=2))
    assert (results.epochs, results.best_epoch) == (4, 2)


def test_curves_are_logged_for_tensorboard(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    train(attached(backbone, data), data, settings(tmp_path))
    events = EventAccumulator(str(tmp_path / checkpoints.LOGS))
    events.Reload()
    assert {"train/loss", "eval/accuracy", "eval/loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("eval/accuracy")] == [8, 16]


@pytest.mark.parametrize("method", [ss.ProbeConfig(), ss.BitFitConfig(), ss.FullConfig()])
def test_the_controls_go_through_the_same_path(backbone: Path, tmp_path: Path, method: MethodConfig) -> None:
    data = task_data(backbone)
    results = train(attached(backbone, data, method), data, settings(tmp_path, learning_rate=None))
    assert predict.evaluate(loading.load(tmp_path), rows(24, 1)) == results.scores
    own = not isinstance(method, ss.ProbeConfig)
    assert ("because the method changes its weights" in results.notes[0]) == own


def test_the_backbone_stays_bit_for_bit(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    model = attached(backbone, data)
    train(model, data, settings(tmp_path))
    plain = load_file(backbone / "model.safetensors")
    own = model.backbone.state_dict()
    assert all(torch.equal(own[name], value) for name, value in plain.items())


def test_measuring_a_step_leaves_no_trace(backbone: Path) -> None:
    data = task_data(backbone)
    model = attached(backbone, data).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    cost = measure_step(model, data.collate([data.train[index] for index in range(4)]))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert cost.rows == 4


def test_read_keeps_less_than_full_tuning(backbone: Path) -> None:
    data = task_data(backbone)
    batch = data.collate([data.train[index] for index in range(4)])
    read_bytes, full_bytes = (
        measure_step(attached(backbone, data, method), batch).kept_bytes for method in (READ, ss.FullConfig())
    )
    assert read_bytes < full_bytes / 2


# --- kinds of data ----------------------------------------------------------------------------------------


def test_without_a_dev_set_a_stratified_share_is_held_out(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone, dev=None, dev_fraction=0.25)
    results = train(attached(backbone, data), data, settings(tmp_path))
    assert (results.data["train_rows"], results.data["dev_rows"]) == (48, 16)
    assert results.data["dev_source"] == "16 of the 64 training rows, held out (no dev set was given; seed 0)"
    shares = [sum(part["labels"][:]) / len(part) for part in (data.train, data.dev)]
    assert shares[0] == pytest.approx(shares[1], abs=0.07)


def test_pairs(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone, Fields(text="text", text2="other", label="label"))
    results = train(attached(backbone, data), data, settings(tmp_path))
    assert max(data.train["length"][:]) > max(task_data(backbone).train["length"][:])
    assert predict.evaluate(loading.load(tmp_path), rows(24, 1)) == results.scores


def test_regression_starts_at_the_mean_and_predicts_numbers(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone, Fields(text="text", label="score"), kind="regress")
    model = attached(backbone, data)
    assert model.head is not None
    mean = sum(row["score"] for row in reviews(64)) / 64
    assert model.head.linear.bias.item() == pytest.approx(mean, rel=1e-5)
    results = train(model, data, settings(tmp_path, epochs=6))
    assert results.metric == "pearson"
    assert results.scores["pearson"] > 0.5
    table = predict.predict(loading.load(tmp_path), rows(24, 1).remove_columns("score"))
    assert all(isinstance(value, float) for value in table["prediction"][:])


def test_several_labels_a_row(backbone: Path, tmp_path: Path) -> None:
    def multi(count: int, seed: int) -> Dataset:
        found = reviews(count, seed)
        return Dataset.from_list(
            [{"text": r["text"], "label": [r["label"]] + ["long"] * (len(r["text"]) > 25)} for r in found]
        )

    data = prepare(multi(64, 0), multi(24, 1), TEXT, load_processor(backbone))
    assert data.labels.kind == "multi"
    results = train(attached(backbone, data), data, settings(tmp_path, epochs=8, learning_rate=0.03))
    assert results.metric == "f1_micro"
    table = predict.predict(loading.load(tmp_path), multi(24, 1).remove_columns("label"))
    assert set("|".join(table["prediction"][:]).split("|")) <= {"neg", "pos", "long", ""}
    assert {"p_long", "p_neg", "p_pos"} <= set(table.column_names)
    for row in table:
        assert ("long" in row["prediction"].split("|")) == (row["p_long"] > 0.5)


def test_images(tmp_path: Path) -> None:
    vit, pictures = image_backbone(tmp_path / "vit"), read(image_folder(tmp_path / "pictures"))
    data = prepare(pictures, None, Fields(image="image", label="label"), load_processor(vit), dev_fraction=0.25)
    results = train(attached(vit, data), data, settings(tmp_path / "task", epochs=8))
    assert results.scores["accuracy"] == 1.0
    assert results.step.tokens is None
    table = predict.predict(loading.load(tmp_path / "task"), pictures)
    assert set(table["prediction"][:]) <= {"bright", "dark"}
    assert table["image"][0].endswith("bright/0.png")


def test_an_unreadable_image_is_named_while_training(tmp_path: Path) -> None:
    vit, folder = image_backbone(tmp_path / "vit"), image_folder(tmp_path / "pictures")
    (folder / "dark" / "3.png").write_bytes(b"no image")
    pictures = read(folder)
    data = prepare(pictures, pictures, Fields(image="image", label="label"), load_processor(vit))
    with pytest.raises(DataError, match=r"dark/3\.png' in row 18 cannot be read"):
        train(attached(vit, data), data, settings(tmp_path / "task"))


def test_a_model_without_pad_token_is_padded_and_masked(tmp_path: Path) -> None:
    llama = padless_backbone(tmp_path / "llama")
    data = task_data(llama)
    results = train(attached(llama, data), data, settings(tmp_path / "task"))
    model = loading.load(tmp_path / "task")
    assert model.extras["preprocessing"]["padding"] == "the tokenizer has no pad token: token 0, masked"
    assert predict.evaluate(model, rows(24, 1)) == results.scores
    one_by_one = predict.evaluate(model, rows(24, 1), batch_size=1)
    assert one_by_one == pytest.approx(results.scores)


def test_an_own_head_gets_the_pad_id_and_label_names_that_it_needs(tmp_path: Path) -> None:
    llama = padless_backbone(tmp_path / "llama")
    data = task_data(llama)
    torch.manual_seed(0)
    model = ss.attach(load_backbone(llama, head=True, num_labels=2), READ)
    results = train(model, data, settings(tmp_path / "task"))
    assert model.config.pad_token_id == 0
    again = loading.load(tmp_path / "task")
    assert again.config.id2label == {0: "neg", 1: "pos"}
    assert predict.evaluate(again, rows(24, 1)) == results.scores


# --- resuming ---------------------------------------------------------------------------------------------


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let training end as by Ctrl-C after this step."""

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(StopIfDiverged, "on_step_begin", stop, raising=False)


@pytest.mark.parametrize(
    ("how", "stops"),
    [
        # checkpoints within an epoch of 8 steps: of the second, and of the third
        ({"save_steps": 5}, {13: 10, 21: 20}),
        # at the end of one
        ({"patience": 2}, {9: 8, 16: 16}),
    ],
)
def test_an_interrupted_run_continues_to_the_same_bits(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], stops: dict[int, int]
) -> None:
    data, whole = task_data(backbone), tmp_path / "whole"
    train(attached(backbone, data), data, settings(whole, epochs=3, **how))
    for stop, resumed_from in stops.items():
        parts = tmp_path / f"parts {stop}"
        with monkeypatch.context() as patched:
            interrupt_at(patched, stop)
            with pytest.raises(KeyboardInterrupt):
                train(attached(backbone, data), data, settings(parts, epochs=3, **how))
        # other initial weights: all that counts comes from the checkpoint
        results = train(attached(backbone, data, seed=9), data, settings(parts, epochs=3, **how, resume=True))
        assert results.resumed_from == resumed_from
        assert task_bytes(parts) == task_bytes(whole)
        assert log_of(parts) == log_of(whole)


def test_images_and_noise_resume_exactly_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit, pictures = image_backbone(tmp_path / "vit"), read(image_folder(tmp_path / "pictures"))
    data = prepare(pictures, pictures, Fields(image="image", label="label"), load_processor(vit))
    how: dict[str, Any] = {"epochs": 3, "batch_size": 4, "save_steps": 4, "accumulate": 2, "log_steps": 1}

    def run(name: str, **more: Any) -> None:
        # 3 optimizer steps an epoch of 6 batches
        backbone = load_backbone(vit)
        torch.manual_seed(0)
        model = ss.attach(backbone, READ, head=head_for(data), backbone_noise="dropout")
        train(model, data, settings(tmp_path / name, **how, **more))

    run("whole")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            run("parts")
    run("parts", resume=True)
    assert task_bytes(tmp_path / "parts") == task_bytes(tmp_path / "whole")
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


KILLED_HOW: dict[str, Any] = {"epochs": 4, "save_steps": 3}
KILLED = """
import os, signal, sys
from pathlib import Path
import datasets, transformers
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
import test_train as t

step = t.trainer.TaskTrainer.training_step

def killed(self, *given, **how):
    loss = step(self, *given, **how)
    if self.state.global_step == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss

backbone, output, resume = Path(sys.argv[1]), Path(sys.argv[2]), len(sys.argv) > 3
if not resume:
    t.trainer.TaskTrainer.training_step = killed
data = t.task_data(backbone)
t.train(t.attached(backbone, data), data, t.settings(output, resume=resume, **t.KILLED_HOW))
"""


def test_a_run_killed_in_the_middle_of_an_epoch_ends_with_the_same_bits(backbone: Path, tmp_path: Path) -> None:
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert own_process.run(KILLED, backbone, parts).returncode == -signal.SIGKILL
    assert not (parts / "results.json").exists()
    last = checkpoints.last_complete(parts / checkpoints.FOLDER)
    assert last is not None
    assert checkpoints.step_of(last) == 18  # in an epoch of 8 steps
    # and what a kill in the middle of a save leaves behind
    half = last.with_name("checkpoint-9999")
    half.mkdir()
    shutil.copy(last / "model.safetensors", half)
    resumed = own_process.run(KILLED, backbone, parts, "resume")
    assert resumed.returncode == 0, resumed.stderr
    data = task_data(backbone)
    train(attached(backbone, data), data, settings(whole, **KILLED_HOW))
    assert not half.exists()
    assert json.loads((parts / "results.json").read_text())["resumed_from"] == 18
    assert task_bytes(parts) == task_bytes(whole)
    assert log_of(parts) == log_of(whole)


def test_half_written_checkpoints_are_passed_over(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    train(attached(backbone, data), data, settings(tmp_path))
    folder = tmp_path / checkpoints.FOLDER
    good = checkpoints.last_complete(folder)
    assert good is not None
    for step, spoil in enumerate(
        [
            lambda path: (path / "trainer_state.json").unlink(),
            lambda path: (path / "trainer_state.json").write_text('{"epoch": 2.0, "log_hi'),
            lambda path: (path / "model.safetensors").write_bytes(b"\0" * 20),
            lambda path: (path / "optimizer.pt").write_bytes(b""),
            lambda path: (path / "rng_state.pth").unlink(),
        ]
    ):
        copy = folder / f"checkpoint-{100 + step}"
        shutil.copytree(good, copy)
        spoil(copy)
        assert not checkpoints.is_complete(copy)
    assert checkpoints.last_complete(folder) == good


def test_a_run_that_ended_is_not_trained_further(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    first = train(attached(backbone, data), data, settings(tmp_path))
    before = task_bytes(tmp_path)
    (tmp_path / "results.json").unlink()  # as if killed between the last checkpoint and the end
    again = train(attached(backbone, data, seed=9), data, settings(tmp_path, resume=True))
    assert again.scores == first.scores
    assert again.history == first.history
    assert task_bytes(tmp_path) == before


def test_a_moved_folder_still_finds_its_best_checkpoint(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.9, 0.5, 0.4, 0.3])
    monkeypatch.setattr(metrics.ComputeMetrics, "__call__", lambda self, _: {"accuracy": next(scores)})
    data = task_data(backbone)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 17)
        with pytest.raises(KeyboardInterrupt):
            train(attached(backbone, data), data, settings(tmp_path / "here", epochs=4))
    (tmp_path / "here").rename(tmp_path / "there")
    results = train(attached(backbone, data), data, settings(tmp_path / "there", epochs=4, resume=True))
    assert results.best_epoch == 1
    best = load_file(tmp_path / "there" / checkpoints.FOLDER / "checkpoint-8" / "model.safetensors")
    saved = loading.load(tmp_path / "there").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in best.items())


def test_resuming_with_other_settings_or_data_is_refused(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    train(attached(backbone, data), data, settings(tmp_path))
    with pytest.raises(OutputError, match=r"holds another run \(batch_size is 4 and was 8\): resume with the"):
        train(attached(backbone, data), data, settings(tmp_path, batch_size=4, resume=True))
    wider = attached(backbone, data, replace(READ, rank=5))
    with pytest.raises(OutputError, match=r"holds another run \(method.rank is 5 and was 8\): resume"):
        train(wider, data, settings(tmp_path, resume=True))
    other = prepare(rows(64, 7), rows(24, 1), TEXT, load_processor(backbone))
    with pytest.raises(OutputError, match=r"holds another run \(training rows is"):
        train(attached(backbone, other), other, settings(tmp_path, resume=True))


def test_resuming_with_other_texts_of_the_same_length_is_refused(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    train(attached(backbone, data), data, settings(tmp_path))
    ids = data.train["input_ids"][:]
    ids[-1][1], ids[-1][2] = ids[-1][2], ids[-1][1]
    assert ids != data.train["input_ids"][:]
    features = data.train.features["input_ids"]
    other = replace(data, train=data.train.remove_columns("input_ids").add_column("input_ids", ids, feature=features))
    with pytest.raises(OutputError, match=r"holds another run \(training rows is"):
        train(attached(backbone, other), other, settings(tmp_path, resume=True))


def test_resuming_with_other_pictures_of_the_same_labels_is_refused(tmp_path: Path) -> None:
    vit, folder = image_backbone(tmp_path / "vit"), image_folder(tmp_path / "pictures")

    def run(place: Path, **more: Any) -> None:
        pictures = read(place)
        data = prepare(pictures, pictures, Fields(image="image", label="label"), load_processor(vit))
        torch.manual_seed(0)
        model = ss.attach(load_backbone(vit), READ, head=head_for(data))
        train(model, data, settings(tmp_path / "run", **more))

    run(folder)
    moved = folder.rename(tmp_path / "moved")
    run(moved, resume=True)
    first, *_, last = sorted(moved.rglob("*.png"))
    last.write_bytes(first.read_bytes())
    with pytest.raises(OutputError, match=r"holds another run \(dev rows is .*; training rows is"):
        run(moved, resume=True)


def test_a_second_seed_has_an_order_of_its_own() -> None:
    def first_number(seed: int, epoch: float) -> float:
        ExactResume(seed, 8, None).on_epoch_begin(None, type("State", (), {"epoch": epoch})(), None)
        return torch.rand(()).item()

    assert first_number(0, 1.0) == first_number(0, 1.5)
    assert len({first_number(seed, epoch) for seed in range(3) for epoch in (0.0, 1.0, 2.0)}) == 9


# --- refusals and failures --------------------------------------------------------------------------------


def test_a_taken_folder_is_refused_before_training_and_replaced_when_asked(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    train(attached(backbone, data), data, settings(tmp_path))
    before = task_bytes(tmp_path)
    with pytest.raises(OutputError, match=r"holds another task: choose another folder, or .* --overwrite"):
        train(attached(backbone, data), data, settings(tmp_path, seed=1))
    assert task_bytes(tmp_path) == before
    train(attached(backbone, data), data, settings(tmp_path, seed=1, overwrite=True))
    assert task_bytes(tmp_path) != before


def test_an_unfinished_run_is_refused_without_resume(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = task_data(backbone)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 12)
        with pytest.raises(KeyboardInterrupt):
            train(attached(backbone, data), data, settings(tmp_path))
    with pytest.raises(OutputError, match="holds a run that did not end: continue it with --resume"):
        train(attached(backbone, data), data, settings(tmp_path))
    with pytest.raises(OutputError, match="holds no run to resume"):
        train(attached(backbone, data), data, settings(tmp_path / "other", resume=True))


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_divergence_says_what_to_change_and_keeps_the_last_good_checkpoint(
    backbone: Path, tmp_path: Path, poison: str
) -> None:
    data = task_data(backbone)
    model = attached(backbone, data)
    assert model.head is not None
    calls = 0

    def spoil(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += module.training
        # five measured steps, 8 of the first epoch: the 17th is in the second
        if calls != 17 or not module.training:
            return output
        output.register_hook(lambda grad: grad * float("nan"))
        return output * float("nan") if poison == "loss" else output

    model.head.register_forward_hook(spoil)
    with pytest.raises(TrainError) as caught:
        train(model, data, settings(tmp_path, epochs=4, bf16=True))
    text = str(caught.value)
    assert "training diverged (" in text
    assert "choose a lower learning rate (--lr), or look for odd rows in the data, or train in fp32" in text
    last = tmp_path / checkpoints.FOLDER / "checkpoint-8"
    assert text.endswith(f"The last good checkpoint stays at {last}")
    assert all(value.isfinite().all() for value in load_file(last / "model.safetensors").values())


def test_no_checkpoint_yet_is_said_too(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    with pytest.raises(TrainError, match=r"diverged .*No checkpoint had been written"):
        train(
            attached(backbone, data),
            data,
            settings(tmp_path, learning_rate=1e30, max_grad_norm=0, weight_decay=1e9, epochs=5),
        )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_change(backbone: Path, tmp_path: Path, error: BaseException) -> None:
    data = task_data(backbone)
    model = attached(backbone, data)
    assert model.head is not None
    calls = 0

    def fail(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += module.training
        if calls == 17:
            raise error

    model.head.register_forward_pre_hook(fail)
    with pytest.raises(TrainError) as caught:
        train(model, data, settings(tmp_path))
    text = str(caught.value)
    assert text.startswith("out of memory (")
    for word in ("--batch-size (8 now", "--accumulate", "--max-length", "--checkpoint late"):
        assert word in text
    assert text.endswith(f"The last good checkpoint stays at {tmp_path / 'checkpoints' / 'checkpoint-8'}")


def test_other_errors_are_not_taken_for_those(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    model = attached(backbone, data)
    assert model.head is not None

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("something else")

    model.head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        train(model, data, settings(tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 0}, "epochs=0, but it must be at least 1"),
        ({"batch_size": 0}, "batch_size=0, but it must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0, but it must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan, but it must be a finite number or None"),
        ({"warmup": 1.0}, "warmup=1.0, but it must be a share from 0 to below 1"),
        ({"patience": -1}, "patience=-1, but it must be at least 0 (0: never stop early)"),
        ({"seed": -1}, "seed=-1, but it must be from 0 to 4294967295"),
        (
            {"schedule": "stairs"},
            'schedule=\'stairs\', but it must be "linear", "cosine", "cosine_epochs", "step" or "constant"',
        ),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1, but it must be a share from 0 to below 1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0, but it must be a number of at least 0"),
        ({"resume": True, "overwrite": True}, "resume and overwrite: choose one"),
        ({"keep": "first"}, 'keep=\'first\', but it must be "best" or "last"'),
        ({"keep": "last", "patience": 2}, "patience=2 with keep='last'"),
        ({"checkpoints": False}, "checkpoints=False: there is no best epoch to go back to"),
        ({"checkpoints": False, "keep": "last", "save_steps": 5}, "checkpoints=False"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"must be|choose one|keep=.last") as caught:
        settings(tmp_path, **changes)
    assert said in str(caught.value)


def test_label_smoothing_is_for_single_labels_only(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone, Fields(text="text", label="score"), kind="regress")
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 with problem 'regress': it is for single-label"):
        train(attached(backbone, data), data, settings(tmp_path, label_smoothing=0.1))
    data = task_data(backbone)
    train(attached(backbone, data), data, settings(tmp_path, label_smoothing=0.1))


def test_a_metric_of_another_problem_is_refused(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    with pytest.raises(ValueError, match="metric='pearson': two-class single problems have accuracy, f1, f1_macro"):
        train(attached(backbone, data), data, settings(tmp_path, metric="pearson"))


def test_texts_longer_than_the_models_positions_are_refused_before_anything_is_written(
    backbone: Path, tmp_path: Path
) -> None:
    data = task_data(backbone, max_length=33)
    with pytest.raises(ValueError, match="max_length=33, but BertModel has 32 positions: choose at most 32"):
        train(attached(backbone, data), data, settings(tmp_path / "task"))
    unlimited = load_processor(backbone)
    unlimited.model_max_length = 10**30
    long = Dataset.from_list([{"text": "good " * 40, "label": "pos"}, *reviews(8)])
    data = prepare(rows(), long, TEXT, unlimited)
    with pytest.raises(ValueError, match="texts of up to 42 tokens, but BertModel has 32 positions"):
        train(attached(backbone, data), data, settings(tmp_path / "task"))
    assert not (tmp_path / "task").exists()
    data = prepare(rows(), rows(8), TEXT, unlimited)
    train(attached(backbone, data), data, settings(tmp_path / "task", epochs=1))


def test_rotary_positions_read_texts_longer_than_those_of_pretraining(tmp_path: Path) -> None:
    folder = padless_backbone(tmp_path / "llama")
    long = Dataset.from_list([{**row, "text": f"{row['text']} the" * 6} for row in reviews(16)])
    data = prepare(long, rows(8), TEXT, load_processor(folder), max_length=100)
    assert max(data.train["length"][:]) > load_backbone(folder).config.max_position_embeddings
    train(attached(folder, data), data, settings(tmp_path / "task", epochs=1))


def test_numbers_that_may_be_targets_have_to_be_called_so(backbone: Path) -> None:
    with pytest.raises(DataError, match=r"holds numbers that are not all whole .*Say --kind regress"):
        task_data(backbone, Fields(text="text", label="score"))


def test_every_setting_reaches_the_trainer(backbone: Path, tmp_path: Path) -> None:
    data = task_data(backbone)
    how = settings(tmp_path, weight_decay=0.1, accumulate=2, max_grad_norm=0.5)
    arguments = trainer._arguments(attached(backbone, data), data, how, "f1")
    assert (arguments.weight_decay, arguments.max_grad_norm) == (0.1, 0.5)
    assert arguments.gradient_accumulation_steps == 2
    assert arguments.train_sampling_strategy == "group_by_length"
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == ("f1", True)


def test_default_rates_are_the_methods_own(tmp_path: Path) -> None:
    plain = TrainSettings(output=tmp_path)
    for method in ss.methods().values():
        assert plain.rate(method.config) == method.config.rate == method.config.rates[1]
        assert list(method.config.rates) == sorted(method.config.rates)
        assert method.config().rate == method.config.rate
    assert settings(tmp_path, learning_rate=0.5).rate(ss.ReadConfig) == 0.5


def test_files_of_every_kind_come_out(tmp_path: Path) -> None:
    table = Dataset.from_dict(
        {"text": ['a "quoted", text', "tab\there"], "prediction": ["x", "y"], "p_x": [0.1, 1 / 3]}
    )
    for suffix in ENDINGS:
        path = tmp_path / f"out{suffix}"
        write_table(table, path)
        back = read(path)
        assert back["text"][:] == table["text"][:]
        assert [float(value) for value in back["p_x"][:]] == pytest.approx(
            table["p_x"][:],
            rel=1e-9,  # `datasets` reads ten digits of a .json list
        )
        with pytest.raises(DataError, match="exists already"):
            write_table(table, path)
    with pytest.raises(DataError, match=r"ends in '.txt': choose a file that ends in .csv, .tsv"):
        write_table(table, tmp_path / "out.txt")
    assert not list(tmp_path.glob(".*"))


def test_a_written_file_reads_as_rows(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "rows.csv", reviews(5)))) == 5


# --- tokenizers that pad on the left ------------------------------------------------------------------------


def padding_left(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer(pad=True).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(folder, padding_side="left").save_pretrained(folder)
    return folder


def scores_alone_and_together(task: Path) -> tuple[list[Any], list[Any]]:
    """The logits of the same texts, one to a batch and all in one."""
    model, few = loading.load(task), rows(6, 3)
    encoded = kind_named("single").encode(few, TEXT, model.extras["processor"], None, None)[0]
    alone, together = (logits(model, encoded, TEXT, batch_size=size) for size in (1, 6))
    return alone.flatten().tolist(), together.flatten().tolist()


def test_a_backbone_that_takes_no_positions_is_padded_on_the_right_and_that_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer(pad=True)), "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = transformers.BlenderbotSmallConfig(**sizes, pad_token_id=0, decoder_start_token_id=2)
    folder = padding_left(tmp_path / "backbone", transformers.BlenderbotSmallModel(config))
    data = task_data(folder)
    with pytest.warns(DataWarning, match=r"texts are padded on the right, and not on the left as \w+ does: Blenderbot"):
        train(attached(folder, data), data, settings(tmp_path / "task", epochs=1))
    assert loading.load(tmp_path / "task").extras["processor"].padding_side == "right"
    alone, together = scores_alone_and_together(tmp_path / "task")
    assert alone == pytest.approx(together, abs=1e-5)


def test_a_backbone_that_takes_positions_is_padded_as_its_tokenizer_says(tmp_path: Path) -> None:
    plain = text_backbone(tmp_path / "bert")
    folder = padding_left(tmp_path / "left", transformers.BertModel.from_pretrained(plain, add_pooling_layer=False))
    data = task_data(folder)
    train(attached(folder, data), data, settings(tmp_path / "task", epochs=1))
    assert loading.load(tmp_path / "task").extras["processor"].padding_side == "left"
    alone, together = scores_alone_and_together(tmp_path / "task")
    assert alone == pytest.approx(together, abs=1e-5)
