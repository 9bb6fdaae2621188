"""The published recipes: what their pages say, that each one can be followed, and the command that does."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner, Result

import sidestep as ss
from sidestep.backbone import drop_path_rate
from sidestep.backbone.load import load_backbone
from sidestep.backbone.pixels import ImageTransform
from sidestep.backbone.source import LoadWarning
from sidestep.cli import app
from sidestep.tasks import load as loading
from sidestep.training import recipes
from sidestep.training.recipes import Recipe, load
from small_tasks import image_backbone, image_folder
from written_tasks import answered, t5_backbone

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
GLUE = ("cola", "mrpc", "rte", "stsb", "mnli", "qnli", "qqp", "sst2")


# --- the files ---------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_task_of_every_benchmark() -> None:
    expected = [f"{group}/{task}" for group in ("dtl/vtab", "dtl/vtab-swin") for task in VTAB]
    sets = ("aircraft", "food101", "flowers102", "pets", "cars")
    few = [f"dtl/fewshot/{name}-{shots}" for name in sets for shots in (1, 2, 4, 8, 16)]
    assert sorted(recipes.names("dtl")) == sorted([*expected, *few])
    assert recipes.names("dtl/vtab") == tuple(expected[:19])
    assert [name.replace("dtlplus", "dtl") for name in recipes.names("dtlplus")] == list(recipes.names("dtl"))
    assert recipes.names("synqt/vtab/") == tuple(f"synqt/vtab/{task}" for task in VTAB)
    assert [recipes.names(f"lst/glue-t5-{size}") for size in ("base", "large", "3b")] == [
        tuple(f"lst/glue-t5-{size}/{task}" for task in GLUE) for size in ("base", "large", "3b")
    ]
    assert [name for name in recipes.names("sherl") if "glue" in name] == [
        name.replace("lst", "sherl") for name in recipes.names("lst")
    ]
    videos = tuple(f"unipt/clip4clip/{name}" for name in ("msrvtt", "msvd"))
    assert recipes.names("unipt") == (*videos, "unipt/vse/f30k", "unipt/vse/coco")
    assert len(recipes.names()) == 2 * (19 + 19 + 25) + 19 + 2 * 3 * 8 + 2 * 2 + 2 * 2
    assert recipes.names("dtl/vtab/svhn") == ("dtl/vtab/svhn",)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_can_be_followed(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    assert recipe.name == name
    assert recipe.config().to_dict() == {**type(recipe.config())().to_dict(), **recipe.method_settings}
    settings = recipe.settings(output=tmp_path)
    assert settings.learning_rate == recipe.training["learning_rate"] > settings.end_rate
    transform = recipe.transform()
    assert (transform is None) == (recipe.problem is not None)
    assert transform is None or transform.shape == (224, 224)
    heads = {None: ss.Classify(num_labels=2), "retrieval": ss.Retrieve(), "text2text": None}
    assert recipe.problem != "text2text" or (recipe.pool, recipe.head) == (None, {})
    if (head := heads[recipe.problem]) is not None:
        assert replace(head, pool=recipe.pool, **recipe.head).pool == recipe.pool
    assert 0 <= recipe.drop_path <= 0.5
    text = "dropout" if recipe.problem == "text2text" else None
    assert recipe.noise == ("drop_path" if recipe.drop_path else text)
    assert {"batch_size", "epochs", "drop_last", "weight_decay", "decay", "max_grad_norm", "keep"} <= set(
        recipe.training
    )


def of(values: Mapping[str, Any], names: Iterable[str]) -> tuple[Any, ...]:
    return tuple(values[name] for name in names)


def of_method(recipe: Recipe, *names: str) -> tuple[Any, ...]:
    return of(recipe.method_settings, names)


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


@pytest.mark.parametrize("method", ["sherl", "lst"])
@pytest.mark.parametrize(("size", "depth"), [("base", 12), ("large", 24), ("3b", 24)])
def test_glues_numbers_are_those_of_the_releases(method: str, size: str, depth: int) -> None:
    epochs = {task: load(f"{method}/glue-t5-{size}/{task}").training["epochs"] for task in GLUE}
    assert epochs == {**dict.fromkeys(GLUE[:4], 20), **dict.fromkeys(GLUE[4:], 10)}
    recipe = load(f"{method}/glue-t5-{size}/rte")
    names = ("learning_rate", "batch_size", "warmup_steps", "schedule", "weight_decay", "keep")
    assert of(recipe.training, names) == (3e-3, 100, 500, "linear", 0, "best")
    assert (recipe.problem, recipe.noise, recipe.max_length) == ("text2text", "dropout", 128)
    expected = {
        ("sherl", "base"): (4, (1, 2, 3, 5, 6, 7, 9, 10, 11)),
        ("sherl", "large"): (8, (*range(1, 23, 2), 22, 23)),
        ("sherl", "3b"): (8, (22, 23)),
        ("lst", "base"): (8, (1, 2, 3, 5, 6, 7, 9, 10, 11)),
        ("lst", "large"): (8, tuple(range(1, 24, 2))),
        ("lst", "3b"): (8, (23,)),
    }
    assert of_method(recipe, "reduction", "layers") == expected[method, size]
    assert recipe.method_settings.get("init") == ("fisher" if method == "lst" else None)
    assert recipe.method_settings["dropout"] == 0.1


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sherl/glue-t5-base/rte", 4_511_812),
        ("sherl/glue-t5-large/rte", 4_700_548),
        ("sherl/glue-t5-3b/rte", 1_087_620),
        ("lst/glue-t5-base/rte", 3_878_712),
        ("lst/glue-t5-large/rte", 9_057_328),
        ("lst/glue-t5-3b/rte", 2_494_896),
    ],
)
def test_glues_recipes_have_the_releases_parameters(name: str, parameters: int) -> None:
    sizes: dict[str, dict[str, Any]] = {
        "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
        "large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
        "3b": {"d_model": 1024, "d_ff": 16384, "d_kv": 128, "num_layers": 24, "num_heads": 32},
    }
    with torch.device("meta"):
        backbone = T5ForConditionalGeneration(T5Config(**sizes[name.split("/")[1].rpartition("-")[2]]))
        model = ss.attach(backbone, load(name).config())
    assert sum(p.numel() for _, p in model.trained_parameters()) == parameters


@pytest.mark.parametrize("method", ["sherl", "unipt"])
def test_retrievals_numbers_are_those_of_the_releases(method: str) -> None:
    recipe = load(f"{method}/vse/f30k")
    names = ("learning_rate", "batch_size", "epochs", "milestones", "weight_decay", "decay", "max_grad_norm")
    assert of(recipe.training, names) == (5e-4, 112, 25, (15,), 1e-2, "all", 2.0)
    assert (recipe.problem, recipe.pool) == ("retrieval", "gpo")
    assert dict(recipe.head) == {"dim": 1024, "loss": "triplet", "mean_epochs": 1}
    assert recipe.method_settings["hidden"] == 512
    head = ss.Retrieve(pool=recipe.pool, **recipe.head)
    assert (head.margin, head.hardest) == (0.2, True)
    assert load(f"{method}/vse/coco").training == recipe.training


@pytest.mark.parametrize("method", ["sherl", "unipt"])
def test_the_numbers_of_videos_are_those_of_the_release(method: str) -> None:
    recipe, other = (load(f"{method}/clip4clip/{name}") for name in ("msrvtt", "msvd"))
    names = ("learning_rate", "batch_size", "epochs", "schedule", "max_grad_norm")
    assert of(recipe.training, names) == of(other.training, names) == (1e-4, 128, 5, "cosine", 1.0)
    assert (recipe.training["weight_decay"], other.training["weight_decay"]) == (0.01, 0)
    assert (recipe.problem, recipe.pool, recipe.frames, recipe.max_length) == ("retrieval", "own", 12, 32)
    assert recipe.method_settings["hidden"] == 512


@pytest.mark.parametrize(("name", "parameters"), [("msrvtt", 9_598_006), ("msvd", 9_598_006 - 26)])
def test_sherl_beside_both_towers_of_clip_has_the_releases_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = ss.attach(CLIPModel(CLIPConfig()), load(f"sherl/clip4clip/{name}").config(), head=ss.Retrieve())
    own = [parameter.numel() for tower in model.parts for parameter in tower.side.parameters()]
    assert sum(own) == parameters


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dtl/vtab/svnh", r"did you mean dtl/vtab/svhn.*dtl/vtab has cifar_100, .*, smallnorb_ele$"),
        ("dtl/fewshot/pets-3", r"dtl/fewshot has aircraft-1, .*cars-16$"),
        (
            "dtl/vtab",
            r"names begin with dtl/fewshot, dtl/vtab, dtl/vtab-swin, dtlplus.*unipt/clip4clip, unipt/vse\. `sidestep",
        ),
        ("", r"there is no recipe ''"),
    ],
)
def test_a_recipe_that_there_is_not_is_answered_with_those_there_are(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load(name)


def test_recipes_are_read_without_torch() -> None:
    code = (
        "import sys; from sidestep.training import recipes as r; r.load('dtl/vtab/svhn'); print('torch' in sys.modules)"
    )
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
    processor = loading.load(tmp_path / "task").extras["processor"]
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

    monkeypatch.setattr("sidestep.training.run.train_model", instead)
    sized = ("--image-size", 160, "--set", "late_blocks=1")
    for options in ((), ("--drop-path", 0.4), ("--drop-path", 0), ("--backbone-noise", "all")):
        result = train(place, tmp_path / "task", *sized, *options, backbone=name)
        assert "far enough" in result.output
    rates = [rate for rate, _, _ in seen]
    assert rates == [pytest.approx(0.2), pytest.approx(0.4), 0.0, pytest.approx(0.2)]
    assert [noise for _, noise, _ in seen] == ["drop_path", "drop_path", None, "all"]
    assert [on for _, _, on in seen] == [True, True, False, True]


def test_another_method_takes_the_recipes_training_only(place: Path, tmp_path: Path) -> None:
    quick = ("--image-size", 16, "--epochs", 3, "--drop-path", 0)
    result = train(place, tmp_path / "task", *quick, "--method", "probe", "--batch-size", 8, "--warmup", 0.3)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "task" / "results.json").read_text())
    assert found["method"] == {"name": "probe"}
    assert found["settings"]["warmup_epochs"] is None
    assert found["recipe"]["overridden"] == {
        "batch_size": 8,
        "drop_path": 0.0,
        "epochs": 3,
        "image_size": 16,
        "method": "probe",
        "warmup": 0.3,
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


def test_a_recipe_of_text_fills_what_was_not_typed(tmp_path: Path) -> None:
    t5_backbone(tmp_path / "t5")
    rows = {
        f"{name}.csv": "text,answer\n" + "".join(f"{r['text']},{r['answer']}\n" for r in answered(count, seed))
        for name, count, seed in (("train", 24, 0), ("dev", 8, 1))
    }
    for name, text in rows.items():
        (tmp_path / name).write_text(text)
    fits = ("--set", "layers=1", "--set", "heads=2", "--set", "head_width=8", "--set", "inner_width=32")
    data = ("--train", tmp_path / "train.csv", "--dev", tmp_path / "dev.csv", "--text", "text", "--target", "answer")
    quick = ("--epochs", 1, "--batch-size", 8, "--quiet")
    given = ("train", "--recipe", "lst/glue-t5-base/rte", "--backbone", tmp_path / "t5", *data, *fits, *quick)
    result = run(*given, "--output", tmp_path / "task")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "task" / "results.json").read_text())
    assert found["method"]["init"] == "fisher"
    assert found["settings"]["warmup_steps"] == 500
    assert found["metric"] == "exact_match"
    assert "dropout of the frozen backbone was on in training" in found["notes"]
    assert loading.load(tmp_path / "task").extras["preprocessing"]["max_length"] == 128
    other = run(*given, "--output", tmp_path / "other", "--warmup", 0.5, "--backbone-noise", "all")
    assert other.exit_code == 0, other.output
    found = json.loads((tmp_path / "other" / "results.json").read_text())
    assert (found["settings"]["warmup_steps"], found["settings"]["warmup"]) == (None, 0.5)
    assert "dropout and drop path of the frozen backbone were on in training" in found["notes"]


# --- in Python ---------------------------------------------------------------------------------------------


def test_a_recipe_is_followed_in_python_too(place: Path) -> None:
    recipe = load("synqt/vtab/svhn")
    torch.manual_seed(0)
    with pytest.warns(LoadWarning, match=r"drop_path=0\.1 is left out"):
        backbone: nn.Module = load_backbone(place / "vit", drop_path=recipe.drop_path)
    model = ss.attach(backbone, recipe.config(), head=ss.Classify(num_labels=2, pool=recipe.pool))
    assert model(pixel_values=torch.randn(2, 3, 16, 16)).logits.shape == (2, 2)
