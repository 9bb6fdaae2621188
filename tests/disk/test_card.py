"""Model cards: their lines of Python are run as they stand, for every kind of task."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

import sidestep as ss
from sidestep.backbone.load import load_backbone, load_pair
from sidestep.backbone.processors import load_pair_processor, load_processor
from sidestep.data import Fields
from sidestep.disk import card, task_folder
from sidestep.kinds.prepare import TaskData, prepare
from sidestep.tasks.predict import predict
from sidestep.training.settings import TrainSettings
from sidestep.training.train import head_for, train
from small_tasks import image_backbone, image_folder, reviews, text_backbone
from written_tasks import answered, llama_backbone, t5_backbone

Attached = Any
METHOD = ss.ReadConfig(rank=4)
ODD = 'the "text"\n'  # a column's name may be anything


def code(folder: Path) -> str:
    found = re.search("```python\n(.*?)```", (folder / card.CARD).read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, **known: Any) -> dict[str, Any]:
    """What the card's lines have made, run where the folder lies."""
    monkeypatch.chdir(folder.parent)
    made = dict(known)
    exec(code(folder), made)
    return made


def trained(backbone: Any, data: TaskData, output: Path) -> Attached:
    torch.manual_seed(0)
    model = ss.attach(backbone, METHOD, head=head_for(data))
    train(model, data, TrainSettings(output=output, epochs=1, batch_size=8, progress=False, measure=False))
    return model


def of_text(folder: Path, rows: list[dict[str, Any]], output: Path, fields: Fields, **how: Any) -> Attached:
    name = text_backbone(folder / "bert")
    data = prepare(Dataset.from_list(rows), None, fields, load_processor(name), **how)
    return trained(load_backbone(name), data, output)


def of_words(make: Callable[[Path], Path], kind: Any) -> Callable[[Path, Path], Attached]:
    def build(folder: Path, output: Path) -> Attached:
        name = make(folder / kind)
        fields = Fields(text="text", label="answer")
        data = prepare(Dataset.from_list(answered(16)), None, fields, load_processor(name), kind=kind)
        return trained(load_backbone(name, writes=kind), data, output)

    return build


def of_images(folder: Path, output: Path) -> Attached:
    name, photos = image_backbone(folder / "vit"), image_folder(folder / "photos", per_class=6)
    rows = [{"file": str(path), "label": path.parent.name} for path in sorted(photos.glob("*/*.png"))]
    data = prepare(Dataset.from_list(rows), None, Fields(image="file", label="label"), load_processor(name))
    return trained(load_backbone(name), data, output)


def of_pairs(folder: Path, output: Path) -> Attached:
    vision, text = str(image_backbone(folder / "vit")), str(text_backbone(folder / "bert"))
    photos = sorted(image_folder(folder / "photos", per_class=6).glob("*/*.png"))
    rows = Dataset.from_list([{"picture": str(path), "says": f"the {path.parent.name} film"} for path in photos])
    fields = Fields(image="picture", text="says")
    data = prepare(rows, None, fields, load_pair_processor(vision, text), kind="retrieval", dev_fraction=0.3)
    model = ss.attach(load_pair(vision, text_name=text), METHOD, head=ss.Retrieve(dim=4))
    train(model, data, TrainSettings(output=output, epochs=1, batch_size=4, progress=False, measure=False))
    return model


def of_own_head(folder: Path, output: Path) -> Attached:
    name = text_backbone(folder / "bert")
    data = prepare(Dataset.from_list(reviews(24)), None, Fields(text="text", label="label"), load_processor(name))
    model = ss.attach(load_backbone(name, head=True, num_labels=2), METHOD)
    train(model, data, TrainSettings(output=output, epochs=1, batch_size=8, progress=False, measure=False))
    return model


def of_text_kind(**how: Any) -> Callable[[Path, Path], Attached]:
    def build(folder: Path, output: Path) -> Attached:
        rows = [{**row, ODD: row["text"], "both": [row["label"], "any"]} for row in reviews(24)]
        return of_text(folder, rows, output, Fields(**how["fields"]), kind=how.get("kind"))

    return build


TASKS: dict[str, tuple[Callable[[Path, Path], Attached], set[str]]] = {
    "text": (of_text_kind(fields={"text": ODD, "label": "label"}), {"p_neg", "p_pos"}),
    "pair": (of_text_kind(fields={"text": "text", "text2": "other", "label": "label"}), {"p_neg", "p_pos"}),
    "number": (of_text_kind(fields={"text": "text", "label": "score"}, kind="regress"), set()),
    "several": (of_text_kind(fields={"text": "text", "label": "both"}), {"p_neg", "p_pos", "p_any"}),
    "own head": (of_own_head, {"p_neg", "p_pos"}),
    "images": (of_images, {"p_bright", "p_dark"}),
    "text2text": (of_words(t5_backbone, "text2text"), set()),
    "lm": (of_words(llama_backbone, "lm"), set()),
}


@pytest.fixture(scope="module", params=TASKS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A kind of task, and a folder with one, and an image beside it."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    ss.detach(TASKS[request.param][0](folder, folder / "task"))
    PIL.Image.new("RGB", (20, 20)).save(folder / "photo.jpg")
    return request.param, folder / "task"


def test_the_lines_of_a_card_predict(made: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, task = made
    found = run(task, monkeypatch)["found"][0]
    assert {name for name in found if name.startswith("p_")} == TASKS[kind][1]
    assert isinstance(found["prediction"], float if kind == "number" else str)
    lines = [line for line in code(task).splitlines() if line and "import" not in line]
    assert len(lines) == 3


def test_the_lines_of_a_card_find_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ss.detach(of_pairs(tmp_path, tmp_path / "task"))
    PIL.Image.new("RGB", (20, 20)).save(tmp_path / "photo.jpg")
    found = run(tmp_path / "task", monkeypatch)["found"]
    assert found["query"][:] == ["image", "text"]


@pytest.mark.parametrize("reads", ["text", "image"])
def test_a_task_from_python_is_told_the_column(reads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `train` a task does not say which columns it reads."""
    name = (text_backbone if reads == "text" else image_backbone)(tmp_path / "model")
    model = ss.attach(load_backbone(name), METHOD, head=ss.Classify(num_labels=2, labels=("no", "yes")))
    model.extras["processor"] = load_processor(name)
    model.save_pretrained(tmp_path / "task")
    ss.detach(model)
    PIL.Image.new("RGB", (20, 20)).save(tmp_path / "photo.jpg")
    found = run(tmp_path / "task", monkeypatch)["found"][0]
    assert found["prediction"] in ("no", "yes")


def test_a_task_without_a_processor_or_a_name_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    backbone = BertModel(config, add_pooling_layer=False)
    model = ss.attach(backbone, METHOD, head=ss.Classify(num_labels=2))
    model.save_pretrained(tmp_path / "task")
    ss.detach(model)
    made = run(tmp_path / "task", monkeypatch, backbone=backbone)
    assert made["model"].backbone is backbone
    assert "# then model(**inputs), with what a BertModel takes" in code(tmp_path / "task")


# --- names of classes --------------------------------------------------------------------------------------


def test_a_loaded_task_names_its_classes(made: tuple[str, Path]) -> None:
    kind, task = made
    assert card.unnamed_classes(task_folder.read_config(task)) == []
    if not (shares := TASKS[kind][1]):
        return
    model = ss.load(task)
    assert {f"p_{name}" for name in model.config.id2label.values()} == shares
    assert model.config.label2id == {name: index for index, name in model.config.id2label.items()}


def test_names_of_the_data_stand_for_a_head_without_names(tmp_path: Path) -> None:
    """`train` stores what the rows' classes are called, whatever the head was attached with."""
    name = text_backbone(tmp_path / "bert")
    data = prepare(Dataset.from_list(reviews(24)), None, Fields(text="text", label="label"), load_processor(name))
    model = ss.attach(load_backbone(name), METHOD, head=ss.Classify(num_labels=2))
    train(model, data, TrainSettings(output=tmp_path / "task", epochs=1, progress=False, measure=False))
    assert model.config.id2label == {0: "neg", 1: "pos"}
    assert ss.load(tmp_path / "task").config.id2label == {0: "neg", 1: "pos"}
    assert predict(model, [{"text": "a film"}])["prediction"][0] in ("neg", "pos")


@pytest.mark.parametrize("own", [False, True], ids=["sidestep's head", "own head"])
def test_classes_without_names_are_known_as_such(own: bool, tmp_path: Path) -> None:
    name = text_backbone(tmp_path / "bert")
    if own:
        model = ss.attach(AutoModelForSequenceClassification.from_pretrained(name, num_labels=2), METHOD)
    else:
        model = ss.attach(load_backbone(name), METHOD, head=ss.Classify(num_labels=2))
    model.save_pretrained(tmp_path / "task")
    expected = ["LABEL_0", "LABEL_1"] if own else ["0", "1"]
    assert card.unnamed_classes(task_folder.read_config(tmp_path / "task")) == expected


@pytest.mark.parametrize("own", [False, True], ids=["sidestep's head", "own head"])
def test_a_number_has_no_classes(own: bool, tmp_path: Path) -> None:
    name = text_backbone(tmp_path / "bert")
    if own:
        backbone = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, problem_type="regression")
        model = ss.attach(backbone, METHOD)
    else:
        model = ss.attach(load_backbone(name), METHOD, head=ss.Regress())
    model.save_pretrained(tmp_path / "task")
    assert card.unnamed_classes(task_folder.read_config(tmp_path / "task")) == []
