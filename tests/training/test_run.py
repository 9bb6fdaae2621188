"""One call from rows and names to a trained task, the same as the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from typer.testing import CliRunner

import sidestep as ss
from sidestep.cli import app
from sidestep.data import DataError
from sidestep.disk.atomic import OutputError
from small_tasks import reviews, text_backbone, write

HOW = {"epochs": 2, "batch_size": 8, "progress": False, "measure": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    text_backbone(folder / "bert")
    write(folder / "train.csv", reviews(32, 0))
    write(folder / "dev.csv", reviews(12, 1))
    return folder


def spec(place: Path, output: Path, **data: object) -> ss.RunSpec:
    rows = {"train": place / "train.csv", "dev": place / "dev.csv", "text": "text", **data}
    return ss.RunSpec(
        data=ss.DataSpec(**rows),
        model=ss.ModelSpec(backbone=place / "bert", method=ss.ReadConfig(rank=4)),
        training=ss.TrainSettings(output=output, **HOW),
    )


def test_the_call_and_the_command_train_the_same_task(place: Path, tmp_path: Path) -> None:
    model, data, results = ss.train(spec(place, tmp_path / "called"))
    assert not model.training
    assert data.labels.names == ("neg", "pos")
    command = f"train --backbone {place}/bert --train {place}/train.csv --dev {place}/dev.csv --text text --set rank=4"
    command += f" --epochs 2 --batch-size 8 --quiet --output {tmp_path}/told"
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    called, told = (load_file(tmp_path / name / "task.safetensors") for name in ("called", "told"))
    assert all(torch.equal(value, told[name]) for name, value in called.items())
    assert results.scores == ss.load(tmp_path / "told").extras["scores"]


def test_rows_may_be_a_data_set_and_a_part_of_them_is_held_out(place: Path, tmp_path: Path) -> None:
    rows = Dataset.from_list(reviews(40, 2))
    _, data, _ = ss.train(spec(place, tmp_path / "task", train=rows, dev=None, dev_fraction=0.25))
    assert (len(data.train), len(data.dev)) == (30, 10)


def test_what_cannot_be_is_refused_before_anything_is_loaded(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="choose single"):
        ss.train(spec(place, tmp_path / "task", kind="tags"))
    with pytest.raises(OutputError, match=r"train\.csv"):
        ss.train(spec(place, place / "train.csv"))
    pair = ss.ModelSpec(backbone="bert", method=ss.ReadConfig(), text_backbone="bert")
    with pytest.raises(ValueError, match="are for pairs"):
        ss.train(replace(spec(place, tmp_path / "task"), model=pair))
    assert not (tmp_path / "task").exists()


def test_a_run_that_began_before_there_were_features_is_the_same_run(tmp_path: Path) -> None:
    plain, rounded = (ss.TrainSettings(output=tmp_path, features_precision=one) for one in ("same", "bf16"))
    assert not [name for name in plain.fixed() if name.startswith("features")]
    assert rounded.fixed()["features_precision"] == "bf16"
