"""The published recipes: what their pages say, that each one can be followed, and the command that does."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import sidestep as ss
from sidestep import recipes, store
from sidestep.backbone import drop_path_rate
from sidestep.cli import app
from sidestep.loading import LoadWarning, load_backbone
from sidestep.pixels import ImageTransform
from sidestep.recipes import Recipe, load
from small_tasks import image_backbone, image_folder

VTAB = (
    "cifar_100",
    "caltech101",
    "dtd",
    "flowers102",
    "pets",
    "svhn",
    "sun397",
    "patch_camelyon",
    "eurosat",
    "resisc45",
    "diabetic_retinopathy",
    "clevr_count",
    "clevr_dist",
    "dmlab",
    "kitti",
    "dsprites_loc",
    "dsprites_ori",
    "smallnorb_azi",
    "smallnorb_ele",
)


# --- the files ---------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_task_of_every_benchmark() -> None:
    expected = [f"{group}/{task}" for group in ("dtl/vtab", "dtl/vtab-swin") for task in VTAB]
    sets = ("aircraft", "food101", "flowers102", "pets", "cars")
    few = [f"dtl/fewshot/{name}-{shots}" for name in sets for shots in (1, 2, 4, 8, 16)]
    assert sorted(recipes.names("dtl")) == sorted([*expected, *few])
    assert recipes.names("dtl/vtab") == tuple(expected[:19])
    assert [name.replace("dtlplus", "dtl") for name in recipes.names("dtlplus")] == list(recipes.names("dtl"))
    assert recipes.names("synqt/vtab/") == tuple(f"synqt/vtab/{task}" for task in VTAB)
    assert len(recipes.names()) == 2 * (19 + 19 + 25) + 19
    assert recipes.names("dtl/vtab/svhn") == ("dtl/vtab/svhn",)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_can_be_followed(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    assert recipe.name == name
    assert recipe.config().to_dict() == {**type(recipe.config())().to_dict(), **recipe.method_settings}
    settings = recipe.settings(output=tmp_path)
    assert settings.learning_rate == recipe.training["learning_rate"] > settings.end_rate
    assert recipe.transform().shape == (224, 224)
    assert ss.Classify(num_labels=2, pool=recipe.pool).pool == recipe.pool
    assert 0 <= recipe.drop_path <= 0.5
    assert recipe.noise == ("drop_path" if recipe.drop_path else None)
    assert {"batch_size", "epochs", "drop_last", "weight_decay", "decay", "max_grad_norm", "keep"} <= set(
        recipe.training
    )


def of_method(recipe: Recipe, *names: str) -> tuple[Any, ...]:
    return tuple(recipe.method_settings[name] for name in names)


@pytest.mark.parametrize(
    ("name", "rate", "drop_path", "kernel"),
    [
        ("dtl/vtab/cifar_100", 3e-4, 0.1, 0),
        ("dtl/vtab/svhn", 8e-3, 0.2, 0),
        ("dtl/vtab/dsprites_loc", 1e-2, 0.0, 0),
        ("dtl/vtab/smallnorb_ele", 1e-3, 0.2, 0),
        ("dtlplus/vtab/cifar_100", 5e-4, 0.1, 3),
        ("dtlplus/vtab/pets", 3e-4, 0.0, 3),
        ("dtlplus/vtab/svhn", 5e-3, 0.2, 5),
        ("dtlplus/vtab/patch_camelyon", 3e-3, 0.0, 4),
        ("dtlplus/vtab/resisc45", 1e-2, 0.1, 3),
        ("dtlplus/vtab/smallnorb_ele", 1e-3, 0.1, 5),
        ("dtl/vtab-swin/caltech101", 1e-3, 0.4, 0),
        ("dtl/vtab-swin/patch_camelyon", 3e-3, 0.0, 0),
        ("dtl/vtab-swin/smallnorb_ele", 8e-4, 0.5, 0),
        ("dtlplus/vtab-swin/svhn", 5e-3, 0.5, 5),
        ("dtlplus/vtab-swin/dsprites_loc", 1e-2, 0.5, 5),
        ("dtl/fewshot/food101-1", 3e-3, 0.0, 0),
        ("dtl/fewshot/food101-2", 1e-3, 0.0, 0),
        ("dtl/fewshot/aircraft-16", 8e-3, 0.0, 0),
        ("dtl/fewshot/flowers102-4", 8e-3, 0.0, 0),
        ("dtlplus/fewshot/flowers102-2", 5e-3, 0.0, 3),
        ("dtlplus/fewshot/cars-16", 5e-3, 0.0, 3),
        ("dtlplus/fewshot/pets-8", 1e-3, 0.0, 3),
    ],
)
def test_dtls_numbers_are_those_of_its_page(name: str, rate: float, drop_path: float, kernel: int) -> None:
    recipe = load(name)
    assert (recipe.training["learning_rate"], recipe.drop_path) == (rate, drop_path)
    swin = "swin" in name
    expected = (4, 4, 10, 100.0, kernel) if swin else (2, 0, 6, 100.0, kernel)
    assert of_method(recipe, "rank", "first_read", "late_blocks", "beta", "kernel") == expected
    assert recipe.pool == ("mean" if swin else "mean_pre_norm")
    training = {name: recipe.training[name] for name in ("batch_size", "epochs", "warmup_epochs", "weight_decay")}
    assert training == {"batch_size": 32, "epochs": 110, "warmup_epochs": 10, "weight_decay": 0.05}
    assert recipe.training["max_grad_norm"] == 0
    assert recipe.transform().mean == recipe.transform().std == (0.5, 0.5, 0.5)


def test_kernels_of_dtl_plus_are_counted_as_on_its_page() -> None:
    kernels = [load(f"dtlplus/vtab/{task}").method_settings["kernel"] for task in VTAB]
    assert {kernel: kernels.count(kernel) for kernel in set(kernels)} == {3: 6, 4: 4, 5: 9}


def test_few_shot_recipes_augment_and_choose_on_dev() -> None:
    recipe = load("dtl/fewshot/pets-16")
    assert (recipe.shots, recipe.augment, recipe.training["keep"]) == (16, "randaugment", "best")
    transform = recipe.transform()
    assert (transform.shape, transform.resized, transform.resize) == ((224, 224), (256, 256), "squash")
    vtab = load("dtl/vtab/pets")
    assert (vtab.shots, vtab.augment, vtab.training["keep"]) == (None, None, "last")
    assert vtab.transform() == ImageTransform(size=224, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_synqts_numbers_are_those_of_its_page() -> None:
    scales = ("queries", "attn_scale", "ffn_scale", "feat_scale")
    assert of_method(load("synqt/vtab/caltech101"), *scales) == (4, 0.1, 0.1, 1)
    assert of_method(load("synqt/vtab/cifar_100"), *scales) == (4, 1, 0.1, 0.1)
    assert of_method(load("synqt/vtab/pets"), *scales) == (1, 0.1, 1, 1)
    assert of_method(load("synqt/vtab/smallnorb_ele"), *scales) == (16, 1, 0.1, 0.1)
    queries = [load(f"synqt/vtab/{task}").method_settings["queries"] for task in VTAB]
    assert {count: queries.count(count) for count in set(queries)} == {1: 4, 4: 6, 16: 9}
    recipe = load("synqt/vtab/svhn")
    assert (recipe.drop_path, recipe.pool) == (0.1, None)
    training = {name: recipe.training[name] for name in ("learning_rate", "weight_decay", "decay", "batch_size")}
    assert training == {"learning_rate": 1e-3, "weight_decay": 1e-2, "decay": "all", "batch_size": 64}
    assert (recipe.training["epochs"], recipe.training["warmup_epochs"], recipe.training["end_rate"]) == (50, 10, 1e-6)
    assert recipe.transform() == ImageTransform(size=224)  # bicubic, ImageNet's mean and deviation


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dtl/vtab/svnh", r"did you mean dtl/vtab/svhn.*dtl/vtab has cifar_100, .*, smallnorb_ele$"),
        ("dtl/fewshot/pets-3", r"dtl/fewshot has aircraft-1, .*cars-16$"),
        ("dtl/vtab", r"names begin with dtl/fewshot, dtl/vtab, dtl/vtab-swin, dtlplus/fewshot.*synqt/vtab; `sidestep"),
        ("", r"there is no recipe ''"),
    ],
)
def test_a_recipe_that_there_is_not_is_answered_with_those_there_are(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load(name)


def test_recipes_are_read_without_torch() -> None:
    code = "import sys; from sidestep.recipes import load; load('dtl/vtab/svhn'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# --- weight decay ------------------------------------------------------------------------------------------


def test_dtl_decays_all_but_biases_and_synqt_everything() -> None:
    """DTL's release goes by names that end in ".bias"; ours by what the Trainer exempts, which is the same there."""
    from transformers import Trainer, ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=24, patch_size=4
    )
    dtl = ss.DTLConfig(late_blocks=1, kernel=3)
    model = ss.attach(ViTModel(config, add_pooling_layer=False), dtl, head=ss.Classify(num_labels=3))
    exempted = Trainer.get_decay_parameter_names(None, model)
    trained = {name for name, _ in model.trained_parameters()}
    assert trained & set(exempted) == {name for name in trained if not name.endswith(".bias")}
    assert load("dtl/vtab/svhn").training["decay"] == "weights"


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    image_backbone(folder / "vit")
    image_folder(folder / "images")
    return folder


def run(*arguments: object) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("default", LoadWarning)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(place: Path, output: Path, *options: object, name: str = "dtl/vtab/svhn", backbone: object = None) -> Result:
    given = ("--backbone", backbone or place / "vit", "--train", place / "images", "--image", "image", "--quiet")
    return run("train", "--recipe", name, *given, "--output", output, *options)


def test_a_recipe_fills_what_was_not_typed(place: Path, tmp_path: Path) -> None:
    quick = ("--set", "late_blocks=1", "--image-size", 16, "--epochs", 4, "--batch-size", 4)
    result = train(place, tmp_path / "task", *quick, "--lr", "1e-3")
    assert result.exit_code == 0, result.output
    assert "Warning: drop_path=0.2 is left out" in result.output
    assert "recipe dtl/vtab/svhn, but batch_size=4, epochs=4" in result.output
    found = json.loads((tmp_path / "task" / "results.json").read_text())
    assert found["method"] == {"name": "dtl", **load("dtl/vtab/svhn").method_settings, "late_blocks": 1}
    assert found["head"]["pool"] == "mean_pre_norm"
    assert found["recipe"] == {
        "name": "dtl/vtab/svhn",
        "overridden": {
            "batch_size": 4,
            "epochs": 4,
            "image_size": 16,
            "learning_rate": 1e-3,
            "set": ["late_blocks=1"],
        },
    }
    kept = {name: found["settings"][name] for name in ("schedule", "end_rate", "weight_decay", "drop_last", "keep")}
    assert kept == {
        "schedule": "cosine_epochs",
        "end_rate": 1e-8,
        "weight_decay": 0.05,
        "drop_last": True,
        "keep": "last",
    }
    assert found["settings"]["warmup_epochs"] == 0  # 10 of 110, of 4
    assert found["settings"]["learning_rate"] == 1e-3
    assert (found["best_epoch"], found["epochs"]) == (4, 4)
    processor = store.load(tmp_path / "task").extras["processor"]
    assert processor == ImageTransform(size=16, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_drop_path_is_the_recipes_in_training(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    name = f"timm:test_vit@{tmp_path / 'vit.safetensors'}"
    seen: list[tuple[float, str | None, bool]] = []

    def instead(model: ss.SideModel, *others: Any, **how: Any) -> None:
        model.train()
        paths = [module for module in model.trunk.modules() if "DropPath" in type(module).__name__]
        on = any(module.training for module in paths)
        seen.append((drop_path_rate(model.trunk), model.settings.backbone_noise, on))
        raise ValueError("far enough")

    monkeypatch.setattr("sidestep.train.train", instead)
    sized = ("--image-size", 160, "--set", "late_blocks=1")
    for options in ((), ("--drop-path", 0.4), ("--drop-path", 0), ("--backbone-noise", "all")):
        result = train(place, tmp_path / "task", *sized, *options, backbone=name)
        assert "far enough" in result.output
    rates = [rate for rate, _, _ in seen]
    assert rates == [pytest.approx(0.2), pytest.approx(0.4), 0.0, pytest.approx(0.2)]
    assert [noise for _, noise, _ in seen] == ["drop_path", "drop_path", None, "all"]
    assert [on for _, _, on in seen] == [True, True, False, True]


def test_another_method_takes_the_recipes_training_only(place: Path, tmp_path: Path) -> None:
    quick = ("--image-size", 16, "--epochs", 2, "--drop-path", 0)
    result = train(place, tmp_path / "task", *quick, "--method", "probe", "--batch-size", 8, "--warmup", 0.5)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "task" / "results.json").read_text())
    assert found["method"] == {"name": "probe"}
    assert found["settings"]["warmup_epochs"] is None
    assert found["recipe"]["overridden"] == {
        "batch_size": 8,
        "drop_path": 0.0,
        "epochs": 2,
        "image_size": 16,
        "method": "probe",
        "warmup": 0.5,
    }


def test_a_few_shot_recipe_draws_and_augments(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    quick = ("--image-size", 16, "--epochs", 1, "--set", "late_blocks=1")
    few = train(place, tmp_path / "task", *quick, name="dtl/fewshot/pets-4")
    assert "drop_last with 8 training rows and batch_size=32" in few.output
    result = train(place, tmp_path / "task", *quick, "--no-drop-last", name="dtl/fewshot/pets-4")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "task" / "results.json").read_text())
    assert found["data"]["train_rows"] == 8
    assert found["data"]["augment"] == "randaugment"
    assert found["recipe"]["overridden"]["drop_last"] is False


def test_the_command_names_recipes_that_there_are(place: Path, tmp_path: Path) -> None:
    result = train(place, tmp_path / "task", name="dtl/vtab/svnh")
    assert result.exit_code == 2
    assert "there is no recipe 'dtl/vtab/svnh' (did you mean dtl/vtab/svhn" in result.output
    assert "images of 3 x 224 x 224" in train(place, tmp_path / "task", "--set", "late_blocks=1").output


def test_recipes_are_listed() -> None:
    assert "dtlplus/vtab-swin" in run("recipes").output
    listed = run("recipes", "synqt/vtab").output
    assert all(f"synqt/vtab/{task}" in listed for task in VTAB)
    one = run("recipes", "dtl/vtab/svhn").output
    assert "schedule=cosine_epochs" in one
    assert "dtl/vtab/pets" not in one
    missing = run("recipes", "zork")
    assert (missing.exit_code, "there is no recipe 'zork'" in missing.output) == (2, True)


# --- in Python ---------------------------------------------------------------------------------------------


def test_a_recipe_is_followed_in_python_too(place: Path) -> None:
    recipe = load("synqt/vtab/svhn")
    torch.manual_seed(0)
    with pytest.warns(LoadWarning, match=r"drop_path=0\.1 is left out"):
        backbone: nn.Module = load_backbone(place / "vit", drop_path=recipe.drop_path)
    model = ss.attach(backbone, recipe.config(), head=ss.Classify(num_labels=2, pool=recipe.pool))
    assert model(pixel_values=torch.randn(2, 3, 16, 16)).logits.shape == (2, 2)
