"""The readout: what it reads, and whole runs that solve it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sidestep as ss
from sidestep.data import DataError
from sidestep.methods.readout import ReadoutConfig
from small_tasks import image_backbone, image_folder, reviews, text_backbone, write
from tiny import FAMILIES

HEAD = ss.Classify(num_labels=3)


def vector(family: str, config: ReadoutConfig, batch: dict[str, Tensor]) -> tuple[ss.SideModel, Tensor]:
    model = ss.attach(FAMILIES[family].model(), config, head=HEAD)
    return model, model.vector(dict(batch))[0]


def test_of_each_level_the_first_token_and_the_mean_of_the_kept_ones_are_read() -> None:
    batch = FAMILIES["bert"].inputs()
    model, found = vector("bert", ReadoutConfig(), batch)
    with torch.no_grad():
        levels = model.trunk(**batch, output_hidden_states=True).hidden_states
    keep = batch["attention_mask"].bool()
    wanted = []
    for level in levels:
        means = torch.stack([row[kept].mean(0) for row, kept in zip(level, keep, strict=True)])
        wanted += [level[:, 0], means]
    torch.testing.assert_close(found, torch.cat(wanted, dim=-1), rtol=1e-5, atol=1e-6)


def test_where_a_token_sees_earlier_ones_only_the_last_is_read() -> None:
    batch = FAMILIES["llama"].inputs()
    model, found = vector("llama", ReadoutConfig(levels=1), batch)
    seen: list[Tensor] = []
    handle = model.places[0].module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    last = batch["attention_mask"].sum(1) - 1
    torch.testing.assert_close(found[:, :16], seen[0][torch.arange(4), last])


def test_where_no_token_stands_for_all_the_mean_alone_is_read() -> None:
    for family, blocks in (("swin", [8, 8, 16, 16]), ("resnet", [16, 32, 32])):
        model, found = vector(family, ReadoutConfig(), FAMILIES[family].inputs())
        assert model.side.pooled_width == found.shape[1]
        assert found.shape[1] == sum(blocks) + model.places[0].site.width


@pytest.mark.parametrize(("levels", "blocks"), [(None, (0, 1, 2, 3, 4, 5)), (3, (1, 3, 5)), (1, (5,)), (9, range(6))])
def test_levels_are_spread_evenly_and_the_last_is_among_them(levels: int | None, blocks: Any) -> None:
    assert ReadoutConfig(levels=levels).blocks(6) == tuple(blocks)


def test_it_has_nothing_to_train_but_the_head() -> None:
    model, _ = vector("bert", ReadoutConfig(), FAMILIES["bert"].inputs())
    assert {name.split(".")[0] for name, _ in model.trained_parameters()} == {"head"}


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"levels": 0}, {"penalty": 0.0}, {"class_weights": "some"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ReadoutConfig(**wrong)


# --- whole runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readout")
    text_backbone(folder / "bert")
    write(folder / "train.jsonl", [{**row, "tags": [row["label"], "any"]} for row in reviews(80)])
    write(folder / "dev.jsonl", [{**row, "tags": [row["label"]]} for row in reviews(30, 1)])
    return folder


def trained(place: Path, output: Path, *, label: str = "label", kind: str | None = None, **training: Any) -> Any:
    method = training.pop("method", ReadoutConfig())
    spec = ss.RunSpec(
        data=ss.DataSpec(train=place / "train.jsonl", dev=place / "dev.jsonl", text="text", label=label, kind=kind),
        model=ss.ModelSpec(backbone=place / "bert", method=method),
        training=ss.TrainSettings(output=output, progress=False, measure=False, **training),
    )
    return ss.train(spec)


def test_a_readout_is_solved_saved_and_used_like_any_task(place: Path, tmp_path: Path) -> None:
    model, _, results = trained(place, tmp_path / "task")
    assert results.scores["accuracy"] > results.constant["accuracy"]
    assert results.method["chosen_penalty"] > 0
    assert results.features is not None
    assert results.history[0]["dev_accuracy"] == results.scores["accuracy"]
    again = ss.load(tmp_path / "task")
    rows = [{"text": row["text"]} for row in reviews(9, 2)]
    from sidestep.tasks.predict import evaluate, predict

    assert predict(again, rows)["prediction"][:] == predict(model, rows)["prediction"][:]
    assert evaluate(again, reviews(30, 1))["accuracy"] == pytest.approx(results.scores["accuracy"])


def test_the_same_run_gives_the_same_bits_whatever_the_batch_of_the_frozen_pass(place: Path, tmp_path: Path) -> None:
    maps = []
    for number in range(2):
        model, _, _ = trained(place, tmp_path / str(number))
        maps.append(model.head.linear.weight)
    assert torch.equal(*maps)


@pytest.mark.parametrize(("label", "kind", "metric"), [("score", "regress", "pearson"), ("tags", "multi", "f1_micro")])
def test_numbers_and_several_classes_are_solved_too(
    place: Path, tmp_path: Path, label: str, kind: str, metric: str
) -> None:
    _, _, results = trained(place, tmp_path / "task", label=label, kind=kind)
    assert results.scores[metric] > 0.5


def test_images_are_solved_too(tmp_path: Path) -> None:
    spec = ss.RunSpec(
        data=ss.DataSpec(train=image_folder(tmp_path / "photos"), image="image"),
        model=ss.ModelSpec(backbone=image_backbone(tmp_path / "vit"), method=ReadoutConfig()),
        training=ss.TrainSettings(output=tmp_path / "task", progress=False, measure=False),
    )
    assert ss.train(spec)[2].scores["accuracy"] == 1


def test_a_second_readout_finds_its_vectors_on_the_disk(place: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"features": "disk", "features_folder": tmp_path / "kept"}
    assert trained(place, tmp_path / "one", **how)[2].features["computed"] > 0
    other = trained(place, tmp_path / "two", method=ReadoutConfig(penalty=0.1), **how)[2]
    assert other.features["computed"] == 0  # a penalty changes no vector
    assert other.method["chosen_penalty"] == 0.1
    fewer = trained(place, tmp_path / "three", method=ReadoutConfig(levels=1), **how)[2]
    assert fewer.features["computed"] > 0


def test_a_text_to_write_is_no_readout(place: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", reviews(20))
    with pytest.raises(ValueError, match="needs a decoder"):
        trained(place, tmp_path / "task", label="other", kind="lm")


def test_a_class_with_one_row_is_refused_and_nothing_is_written(place: Path, tmp_path: Path) -> None:
    rows = [*reviews(20), {**reviews(1)[0], "label": "odd"}]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "dev.jsonl", reviews(10, 1))
    (tmp_path / "bert").symlink_to(place / "bert")
    with pytest.raises(DataError, match="fewer than two training rows"):
        trained(tmp_path, tmp_path / "task")
    assert not (tmp_path / "task" / "task.json").exists()


def test_a_readout_over_a_trained_task_leaves_none_of_its_checkpoints(place: Path, tmp_path: Path) -> None:
    trained(place, tmp_path / "task", method=ss.ProbeConfig(), epochs=1)
    assert list((tmp_path / "task" / "checkpoints").glob("checkpoint-*"))
    trained(place, tmp_path / "task", overwrite=True)
    assert not list((tmp_path / "task" / "checkpoints").glob("checkpoint-*"))
