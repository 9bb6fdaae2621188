"""Images from the command line: lists, shots, views, sizes, and that a task reads images as it was trained to."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.cli import app
from sidestep.data import Fields, ImageTransform, read
from sidestep.disk import task_folder
from sidestep.kinds import kind_named
from sidestep.kinds.prepare import TaskData, prepare
from sidestep.kinds.running import logits
from sidestep.tasks import load as loading
from sidestep.training.callbacks import StopIfDiverged
from sidestep.training.settings import TrainSettings
from sidestep.training.train import head_for, train
from small_tasks import image_backbone, image_folder

FAST = ["--epochs", "2", "--batch-size", "8", "--quiet"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of two blocks for 16 by 16, images of two classes, and lists of them."""
    folder = tmp_path_factory.mktemp("images")
    image_backbone(folder / "vit")
    image_folder(folder / "all images", per_class=12)
    names = [f"all images/{kind}/{place}.png" for place in range(12) for kind in ("bright", "dark")]
    for name, part in (("train800val200.txt", names[:16]), ("test.txt", names[16:])):
        (folder / name).write_text("".join(f"{file} {int('dark' in file)}\n" for file in part))
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def trained(place: Path, output: Path, *arguments: object) -> dict[str, Any]:
    rows = ["--train", place / "train800val200.txt", "--dev", place / "test.txt", "--image", "image"]
    result = run("train", "--backbone", place / "vit", *rows, "--output", output, *FAST, *arguments)
    assert result.exit_code == 0, result.output
    return json.loads((output / "results.json").read_text())


def refusal(place: Path, *arguments: object, rows: Path | None = None) -> str:
    source = ["--train", rows or place / "train800val200.txt", "--image", "image", "--output", place / "never"]
    result = run("train", "--backbone", place / "vit", *source, *FAST, *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert not (place / "never").exists()
    return " ".join(result.stderr.split("Error: ")[1].split())


def test_a_task_from_a_list_is_scored_and_used_as_it_was_trained(place: Path, tmp_path: Path) -> None:
    how = ["--augment", "randaugment", "--shots", "4", "--normalize", "imagenet", "--image-size", "16"]
    found = trained(place, tmp_path / "task", *how)
    assert (found["data"]["train_rows"], found["data"]["shots"], found["data"]["shots_seed"]) == (8, 4, 0)
    assert (found["data"]["augment"], found["data"]["augment_seed"]) == ("randaugment", 0)
    assert found["labels"] == ["0", "1"]
    again = trained(place, tmp_path / "again", *how)
    assert [entry["train_loss"] for entry in again["history"]] == [entry["train_loss"] for entry in found["history"]]
    transform = load_processor(tmp_path / "task" / "processor")
    assert transform == ImageTransform(size=16, interpolation="bilinear")
    shown = run("eval", tmp_path / "task", "--data", place / "test.txt", "--quiet").stdout
    assert f"{found['scores']['accuracy']:.4g}" in shown
    out = tmp_path / "out.csv"
    assert run("predict", tmp_path / "task", "--data", place / "test.txt", "--output", out).exit_code == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["image"]).name for row in rows] == [f"{name}.png" for name in (8, 8, 9, 9, 10, 10, 11, 11)]


@pytest.mark.filterwarnings("always::sidestep.data.DataWarning")
def test_bad_images_are_an_error_or_left_out(place: Path, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", per_class=8)
    (folder / "bright" / "3.png").write_bytes(b"")
    said = refusal(place, rows=folder)
    assert "1 of 14 images of column 'image' are not there or empty (0 bytes): " in said
    assert "bright/3.png" in said
    rows = ["--train", folder, "--dev", place / "all images", "--image", "image", "--output", tmp_path / "task"]
    result = run("train", "--backbone", place / "vit", *rows, *FAST, "--skip-bad-images")
    assert result.exit_code == 0, result.output
    assert "Warning: 1 of 16 images of the training rows cannot be read and were left out: " in result.stderr
    data = json.loads((tmp_path / "task" / "results.json").read_text())["data"]
    assert (data["train_rows"], data["skipped_files"]) == (15, 1)
    for command in (["eval"], ["predict", "--output", tmp_path / "out.csv"]):
        source = [command[0], tmp_path / "task", "--data", folder, *command[1:]]
        assert run(*source).exit_code == 2
        result = run(*source, "--skip-bad-images")
        assert result.exit_code == 0, result.output
        assert "1 of 16 images of the rows cannot be read" in result.stderr


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--image-size", "24"], "ViTModel cannot take images of 3 x 24 x 24 (channels x rows x columns); it was made"),
        (["--image-size", "0"], "size=0 of an image transform, but it must be a whole number above 0"),
        (["--normalize", "caffe"], "normalize='caffe': choose imagenet or half"),
        (["--augment", "mixup"], "augment='mixup': choose 'none', 'flip', 'crop', 'randaugment'"),
        (["--shots", "9"], "shots=9, but 2 of 2 classes have fewer training rows ('0' has "),
    ],
)
def test_what_cannot_be_done_is_said_before_training(place: Path, asked: list[str], said: str) -> None:
    assert said in refusal(place, *asked)


def test_a_list_with_missing_images_or_labels(place: Path) -> None:
    lines = place / "lines.txt"
    lines.write_text((place / "test.txt").read_text() + "no such.png 1\n")
    assert "names 1 of 9 images that are not there: 'no such.png', looked for in " in refusal(place, rows=lines)
    lines.write_text("a.png\n")
    assert "has no label in 1 of 1 lines (line 1)" in refusal(place, rows=lines)


def test_a_reloaded_task_reads_images_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    transform = ImageTransform(size=16, resize="crop", resize_to=19, interpolation="lanczos", mean=(0.1, 0.2, 0.3))
    rows = read(place / "train800val200.txt")
    data = prepare(rows, read(place / "test.txt"), Fields(image="image", label="label"), transform)
    model = attached(place, data)
    train(model, data, TrainSettings(output=tmp_path / "task", epochs=1, progress=False))
    again = loading.load(tmp_path / "task")
    assert again.extras["processor"] == transform
    encoded = kind_named("single").encode(rows, data.fields, again.extras["processor"], None, None)[0]
    before = logits(model, data.train, data.fields)
    assert (logits(again, encoded, data.fields) == before).all()


def attached(place: Path, data: TaskData) -> ss.SideModel:
    torch.manual_seed(0)
    return ss.attach(load_backbone(place / "vit"), ss.ReadConfig(rank=4), head=head_for(data), backbone_noise="dropout")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_with_views_is_resumed_exactly(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Stopped within epoch 3, taken up from a checkpoint within epoch 2 or at its end."""
    fields = Fields(image="image", label="label")

    def run(name: str, **more: Any) -> list[float]:
        # the rows are read anew, as a new process would
        data = prepare(
            read(place / "train800val200.txt"), read(place / "test.txt"), fields, load_processor(place / "vit"),
            augment="randaugment",
        )  # fmt: skip
        how = {"epochs": 3, "batch_size": 4, "save_steps": 3, "workers": workers, "progress": False, "measure": False}
        results = train(attached(place, data), data, TrainSettings(output=tmp_path / name, **how, **more))
        assert data.augment is not None
        assert data.augment.epoch.number == 2  # the Trainer's last, counted from 0
        return [entry["train_loss"] for entry in results.history]

    whole = run("whole")
    for step in (7, 10):
        with monkeypatch.context() as patched:

            def stop(self: Any, args: Any, state: Any, control: Any, step: int = step, **kwargs: Any) -> None:
                if state.global_step == step:
                    raise KeyboardInterrupt

            patched.setattr(StopIfDiverged, "on_step_begin", stop, raising=False)
            with pytest.raises(KeyboardInterrupt):
                run(f"parts{step}")
        assert run(f"parts{step}", resume=True) == whole
        before, after = (load_file(tmp_path / name / task_folder.WEIGHTS) for name in ("whole", f"parts{step}"))
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_sherl_trains_beside_a_timm_resnet(place: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = timm.create_model("test_resnet", num_classes=0).state_dict()
    # as older files are, without the counts of batches
    kept = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    save_file(kept, tmp_path / "resnet.safetensors")
    rows = ["--train", place / "train800val200.txt", "--dev", place / "test.txt", "--image", "image"]
    how = [
        "--backbone",
        f"timm:test_resnet@{tmp_path / 'resnet.safetensors'}",
        "--method",
        "sherl",
        "--image-size",
        "32",
    ]
    result = run("train", *how, *rows, "--output", tmp_path / "task", *FAST, "--batch-size", "15")
    assert result.exit_code == 2, result.output
    said = " ".join(result.stderr.split())
    assert "batch_size=15 with 16 training rows makes a batch of 1, but sherl has batch norms here" in said
    assert "or leave the last batch out (--drop-last)" in said
    assert not (tmp_path / "task").exists()
    result = run("train", *how, *rows, "--output", tmp_path / "task", *FAST, "--batch-size", "15", "--drop-last")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "task" / "results.json").read_text())
    assert found["method"]["name"] == "sherl"
    tensors = load_file(tmp_path / "task" / task_folder.WEIGHTS)
    counts = [value.item() for name, value in tensors.items() if name.endswith("num_batches_tracked")]
    # the measured step before training leaves no trace: two epochs of one batch
    assert set(counts) <= {1, 2}
    assert len(counts) == 4  # its four stages have a block each, of which the last is the late one; and the way out
    shown = run("eval", tmp_path / "task", "--data", place / "test.txt", "--quiet").stdout
    assert f"{found['scores']['accuracy']:.4g}" in shown


def test_a_run_with_other_views_or_shots_is_another_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    rows = ["--train", place / "train800val200.txt", "--dev", place / "test.txt", "--image", "image"]
    task = ["train", "--backbone", place / "vit", *rows, "--output", tmp_path / "task", *FAST]
    with monkeypatch.context() as patched:
        patched.setattr(StopIfDiverged, "on_step_begin", stop, raising=False)
        assert run(*task, "--augment", "crop", "--shots", "4").exit_code == 130
    for other in (["--augment", "flip", "--shots", "4"], ["--augment", "crop", "--shots", "4", "--shots-seed", "1"]):
        result = run(*task, *other, "--resume")
        assert result.exit_code == 2
        assert "holds another run (handling." in " ".join(result.stderr.split())
