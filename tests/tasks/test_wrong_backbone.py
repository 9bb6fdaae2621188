"""A task and a backbone that is not its own: each ends in one message that says what was made on what.

The kinds: what reads something else, another architecture of the same size, another size, other weights, half a model,
no model at all, a name of another library, two towers in the place of one and the reverse.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from typer.testing import CliRunner

import sidestep as ss
from sidestep.backbone.load import load_backbone, load_pair
from sidestep.cli import app
from sidestep.disk.task_folder import TaskError
from sidestep.tasks import load as loading
from sidestep.tasks.bank_folder import BankFolder
from small_tasks import SPECIAL, WORDS, image_backbone, reviews, text_backbone, tokenizer, write
from written_tasks import llama_backbone, t5_backbone

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SIZES, "vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 32}
TOWER = {**TEXT, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
READ = ss.ReadConfig(rank=4)
TASKS = ("text", "images", "written", "answers", "pairs", "two encoders", "timm")


def _tokenizer_alone(folder: Path) -> None:
    tokenizer(pad=True).save_pretrained(folder)


def _config_alone(folder: Path) -> None:
    t.BertConfig(**TEXT).save_pretrained(folder)


def _weights_of(folder: Path, config: Any, kind: Any = t.AutoModel) -> None:
    torch.manual_seed(1)
    kind.from_config(config).save_pretrained(folder)


BACKBONES: dict[str, Callable[[Path], object]] = {
    "bert": text_backbone,
    "vit": image_backbone,
    "llama": llama_backbone,
    "t5": t5_backbone,
    "clip": lambda folder: _weights_of(
        folder, t.CLIPConfig(text_config=TOWER, vision_config={**SIZES, "image_size": 16, "patch_size": 8})
    ),
    "other weights": lambda folder: text_backbone(folder, seed=1),
    "wider": lambda folder: _weights_of(folder, t.BertConfig(**{**TEXT, "hidden_size": 24})),
    "deeper": lambda folder: _weights_of(folder, t.BertConfig(**{**TEXT, "num_hidden_layers": 3})),
    "more tokens": lambda folder: _weights_of(folder, t.BertConfig(**{**TEXT, "vocab_size": 40})),
    "electra": lambda folder: _weights_of(folder, t.ElectraConfig(**TEXT, embedding_size=16)),
    "gpt2": lambda folder: _weights_of(folder, t.GPT2Config(vocab_size=18, n_embd=16, n_layer=2, n_head=2)),
    "resnet": lambda folder: _weights_of(folder, t.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
    "tokenizer alone": _tokenizer_alone,
    "config alone": _config_alone,
    "empty": Path.mkdir,
    "missing": lambda folder: None,
}
NAMES = ("timm:test_vit", "timm:no such model", "vit:missing.npz", "no-such/model", "")
"""What is no folder."""
OWN = {"text": "bert", "images": "vit", "written": "t5", "answers": "llama", "pairs": "clip"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones of every kind, a task of every kind (untrained), and rows that they could read."""
    folder = tmp_path_factory.mktemp("wrong")
    for name, make in BACKBONES.items():
        make(folder / name)
    heads: dict[str, Any] = {"pairs": ss.Retrieve(), "written": None, "answers": None}
    writes: dict[str, Any] = {"written": "text2text", "answers": "lm"}
    for name, own in OWN.items():
        backbone = load_backbone(folder / own, writes=writes.get(name))
        _save(ss.attach(backbone, READ, head=heads.get(name, ss.Classify(num_labels=2))), folder, name)
    pair = load_pair(str(folder / "vit"), str(folder / "bert"))
    _save(ss.attach(pair, READ, head=ss.Retrieve()), folder, "two encoders")
    _timm_task(folder)
    write(folder / "rows.csv", reviews(8))
    return folder


def _save(model: Any, folder: Path, name: str) -> None:
    model.extras["preprocessing"] = {"fields": {"text": "text", "label": "label"}}
    model.save_pretrained(folder / "tasks" / name)
    if not isinstance(model, ss.PairModel):
        BankFolder(folder / "banks" / name).add("task", folder / "tasks" / name)


def _timm_task(folder: Path) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "test_vit.safetensors")
    backbone = load_backbone(f"timm:test_vit@{folder / 'test_vit.safetensors'}")
    _save(ss.attach(backbone, READ, head=ss.Classify(num_labels=2)), folder, "timm")


def refusal(*arguments: object) -> str:
    """The one message that a command ends with."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--quiet"])
    assert result.exit_code == 2, (arguments, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.output.count("Error: ") == 1
    return " ".join(result.stderr.split())


@pytest.mark.parametrize("task", TASKS)
def test_every_wrong_backbone_is_one_message(
    place: Path, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    wrong = [place / name for name in BACKBONES if OWN.get(task) != name]
    for backbone in (*wrong, *NAMES):
        given = ["--data", place / "rows.csv", "--backbone", backbone]
        said = refusal("eval", place / "tasks" / task, *given)
        assert said.startswith("Error: ")
        assert said == refusal("predict", place / "tasks" / task, *given, "--output", tmp_path / "out.csv")
        if (place / "banks" / task).exists():
            refusal("bank", "run", place / "banks" / task, *given, "--task", "task", "--output", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("task", "backbone", "said"),
    [
        (
            "text",
            "vit",
            "made on BertModel .*bert, but .*vit is a model of type 'vit', and not 'bert': load the task's",
        ),
        ("text", "electra", "made on BertModel .*bert, but .*electra is a model of type 'electra', and not 'bert'"),
        ("text", "clip", "made on BertModel .*bert, but .*clip is a model of type 'clip', and not 'bert'"),
        ("text", "wider", r"made on BertModel .*with digest \w{16} .*, but this backbone is BertModel .*wider"),
        ("text", "other weights", "but this backbone is BertModel .*other weights with digest .*: load the task's own"),
        ("text", "tokenizer alone", r"tokenizer alone has no config\.json: give a folder that a model was saved in"),
        ("text", "missing", "missing' cannot be loaded: there is no such folder here, and it is no hub id"),
        ("images", "bert", "made on ViTModel .*vit, but .*bert is a model of type 'bert', and not 'vit'"),
        ("answers", "bert", "made on LlamaForCausalLM .*, but .*bert is a model of type 'bert', and not 'llama'"),
        ("pairs", "vit", "made on CLIPModel .*, but .*vit is a model of type 'vit', and not 'clip'"),
        ("two encoders", "bert", "made on VisionTextDualEncoderModel of .*vit and .*bert, but .*type 'bert', and not"),
    ],
)
def test_the_message_says_what_is_there(place: Path, task: str, backbone: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        loading.load(
            place / "tasks" / task, loading.stored_backbone(place / "tasks" / task, moved_to=str(place / backbone))
        )


def test_the_libraries_are_told_apart(place: Path) -> None:
    with pytest.raises(TaskError, match="but timm:test_vit is a model of timm: load the task's own backbone"):
        loading.stored_backbone(place / "tasks" / "text", moved_to="timm:test_vit")
    with pytest.raises(TaskError, match=r"made on VisionTransformer timm:test_vit.*vit is no model of timm, as"):
        loading.stored_backbone(place / "tasks" / "timm", moved_to=str(place / "vit"))


def test_another_model_in_the_place_of_the_stored_one(place: Path, tmp_path: Path) -> None:
    ss.load(place / "tasks" / "text").save_pretrained(tmp_path / "task")
    backbone = text_backbone(tmp_path / "bert")
    model = ss.attach(load_backbone(backbone), READ, head=ss.Classify(num_labels=2))
    model.save_pretrained(tmp_path / "task", overwrite=True)
    shutil.rmtree(backbone)
    shutil.copytree(place / "vit", backbone)
    with pytest.raises(TaskError, match=r"made on BertModel .* is a model of type 'vit', and not 'bert'"):
        ss.load(tmp_path / "task")


@pytest.mark.parametrize("tower", [t.CLIPTextModel, t.CLIPVisionModel])
def test_a_task_on_one_tower_finds_it_in_the_whole(place: Path, tmp_path: Path, tower: Any) -> None:
    backbone = tower.from_pretrained(place / "clip")
    ss.attach(backbone, READ, head=ss.Classify(num_labels=2)).save_pretrained(tmp_path / "task")
    assert type(ss.load(tmp_path / "task").backbone) is tower


def test_the_same_weights_elsewhere_are_no_wrong_backbone(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "bert", tmp_path / "moved")
    loading.load(
        place / "tasks" / "text", loading.stored_backbone(place / "tasks" / "text", moved_to=str(tmp_path / "moved"))
    )
