"""VQA and grounding end to end, on encoders that read a picture beside a text, among its tokens, or in two towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, ViltConfig, ViltModel, ViltProcessor

import sidestep as ss
from beside_tasks import beside, image_processor, tokenizer, vilt_backbone
from commands import refusal, succeed, table
from dual_encoders import IMAGE, clip
from pictured_tasks import llava_backbone
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.backbone.vision_language import SideBySideProcessor
from sidestep.data import DataError, Fields
from sidestep.disk import task_folder
from sidestep.kinds.prepare import TaskData, head_for, prepare
from sidestep.kinds.running import logits
from sidestep.measure.plan import plan_for
from sidestep.metrics import METRICS
from sidestep.tasks.predict import evaluate, predict
from sidestep.training.callbacks import StopIfDiverged
from sidestep.training.settings import TrainSettings
from sidestep.training.train import train
from small_tasks import image_backbone, text_backbone, write
from tiny import randomize

COLUMNS = {"vqa": ("question", "answers"), "grounding": ("phrase", "box")}
KINDS = tuple(COLUMNS)
DEV = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ViLT, a CLIP and a Llava, and files of rows."""
    folder = tmp_path_factory.mktemp("beside")
    vilt_backbone(folder / "vilt")
    llava_backbone(folder / "llava")
    image_backbone(folder / "vit")
    text_backbone(folder / "bert")
    clip().save_pretrained(folder / "clip")
    size = {"height": IMAGE["image_size"], "width": IMAGE["image_size"]}
    CLIPImageProcessor(size=size, do_center_crop=False).save_pretrained(folder / "clip")
    tokenizer().save_pretrained(folder / "clip")
    for name, count in (("train", 36), ("dev", DEV)):
        found = beside(folder / "pictures", count, seed=len(name))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def rows(place: Path, name: str = "train") -> Dataset:
    return Dataset.from_list([json.loads(line) for line in (place / f"{name}.jsonl").read_text().splitlines()])


def task_data(place: Path, kind: str, backbone: str = "vilt", **how: Any) -> TaskData:
    text, label = COLUMNS[kind]
    fields = Fields(text=text, image="picture", label=label)
    processor = load_processor(place / backbone, pictures=True)
    return prepare(rows(place), rows(place, "dev"), fields, processor, kind=kind, **how)


def attached(place: Path, data: TaskData, backbone: str = "vilt", method: Any = None, seed: int = 0) -> ss.SideModel:
    torch.manual_seed(seed)
    return ss.attach(load_backbone(place / backbone), method or ss.SherlConfig(reduction=2), head=head_for(data))


def settings(output: Path, **changes: Any) -> TrainSettings:
    how = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "progress": False, "measure": False, "patience": 0}
    return TrainSettings(output=output, **{**how, **changes})


# --- rows and passes --------------------------------------------------------------------------------------------------


def test_a_processor_that_reads_both_apart_is_found_by_looking(place: Path, tmp_path: Path) -> None:
    found = load_processor(place / "vilt", pictures=True)
    assert isinstance(found, SideBySideProcessor)
    assert found.picture == ("pixel_values", "pixel_mask")
    found.save_pretrained(tmp_path / "alone")
    assert isinstance(load_processor(tmp_path / "alone"), SideBySideProcessor)
    assert load_processor(place / "vilt").pad_token == "<pad>"  # without pictures its tokenizer


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("method", [ss.ReadConfig(rank=4), ss.SideAttentionConfig(rank=4, heads=2)])
def test_a_row_alone_is_read_as_beside_pictures_of_other_shapes(place: Path, pool: Any, method: Any) -> None:
    """Padded patches and words are left out. The tolerance is rounding: matrix products of other shapes."""
    data = task_data(place, "vqa")
    model = ss.attach(load_backbone(place / "vilt"), method, head=ss.Answer(num_labels=3, pool=pool))
    randomize(model)
    model.extras["processor"] = data.processor
    batch = data.collate([data.dev[number] for number in range(DEV)])
    assert not bool(batch["pixel_mask"].all())
    assert not bool(batch["attention_mask"].all())
    together, alone = (logits(model, data.dev, data.fields, batch_size=size) for size in (DEV, 1))
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert np.ptp(together[:, 0]) > 1e-2


def test_two_passes_are_the_same_bit_for_bit(place: Path) -> None:
    """ViLT itself draws the order of its patches."""
    data = task_data(place, "vqa")
    model = attached(place, data, method=ss.ReadConfig(rank=4))
    batch = data.collate([data.dev[number] for number in range(4)])
    names = ("input_ids", "attention_mask", "pixel_values", "pixel_mask")
    batch = {name: batch[name] for name in names}
    with torch.no_grad():
        ours = [model(**batch).logits for _ in range(2)]
        bare = [model.backbone(**batch).last_hidden_state for _ in range(2)]
    assert torch.equal(*ours)
    assert not torch.equal(*bare)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_taps_may_read_again_in_backward(place: Path, pool: Any) -> None:
    data, found = task_data(place, "grounding"), []
    batch = data.collate([data.train[number] for number in range(6)])
    names = ("input_ids", "attention_mask", "pixel_values", "pixel_mask", "labels")
    for keep in ("full", "replay"):
        torch.manual_seed(0)
        model = ss.attach(load_backbone(place / "vilt"), ss.ReadConfig(rank=4), head=ss.Box(pool=pool), keep=keep)
        randomize(model)
        model.train()(**{name: batch[name] for name in names}).loss.backward()
        found.append({name: p.grad for name, p in model.trained_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


@pytest.mark.parametrize(
    ("head", "method"),
    [(ss.Answer(num_labels=20), ss.SherlConfig(reduction=4)), (ss.Box(pool="mean"), ss.ReadConfig(rank=8))],
    ids=["vqa", "grounding"],
)
def test_a_plan_is_within_a_tenth_of_what_a_step_takes(head: Any, method: Any) -> None:
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    config = ViltConfig(vocab_size=100, max_position_embeddings=16, image_size=96, patch_size=8, **sizes)
    torch.manual_seed(0)
    model = ss.attach(ViltModel(config), method, head=head).train()
    batch = {
        "input_ids": torch.randint(3, 100, (16, 12)),
        "attention_mask": torch.ones(16, 12, dtype=torch.long),
        "pixel_values": torch.randn(16, 3, 96, 96),
        "pixel_mask": torch.ones(16, 96, 96, dtype=torch.long),
        "labels": torch.rand(16, head.outputs) * 0.4 + 0.3,
    }
    optimizer = torch.optim.AdamW([parameter for _, parameter in model.trained_parameters()])

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    measured = ss.peak_memory(step, "cpu").allocated
    assert plan_for(model, batch).peak_bytes == pytest.approx(measured, rel=0.1)
    assert ss.plan(config, method, head=head, batch=16, length=12).peak_bytes == pytest.approx(measured, rel=0.1)


# --- a run, and what it leaves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", ["vilt", "llava"])
def test_training_learns_the_pictures_and_a_reloaded_task_answers_the_same(
    place: Path, tmp_path: Path, backbone: str, kind: str
) -> None:
    data = task_data(place, kind, backbone)
    results = train(attached(place, data, backbone), data, settings(tmp_path / "task", epochs=6))
    losses = [entry["train_loss"] for entry in results.history]
    assert losses[-1] < losses[0]
    assert results.scores.keys() == set(METRICS[kind])
    again, dev = ss.load(tmp_path / "task"), rows(place, "dev")
    assert evaluate(again, dev) == pytest.approx(results.scores, rel=1e-6)
    label = COLUMNS[kind][1]
    found = predict(again, dev.remove_columns(label), batch_size=5)
    assert found["picture"][:] == dev["picture"][:]
    if kind == "vqa":
        names = again.extras["preprocessing"]["labels"]
        assert set(found["prediction"]) <= set(names)
        assert found.column_names[-3:] == [f"p_{name}" for name in names]
        right = [
            people[0]["answer"].lower() == said
            for people, said in zip(dev["answers"], found["prediction"], strict=True)
        ]
        assert np.mean(right) == pytest.approx(results.scores["accuracy"])
        return
    for path, box in zip(found["picture"], found["prediction"], strict=True):
        with PIL.Image.open(path) as picture:
            assert 0 <= box[0] <= box[2] <= picture.width
            assert 0 <= box[1] <= box[3] <= picture.height
    assert np.mean([overlap(*pair) for pair in zip(dev["box"], found["prediction"], strict=True)]) == pytest.approx(
        results.scores["mean_iou"], rel=1e-4
    )


def overlap(one: list[float], other: list[float]) -> float:
    """Intersection over union in pixels, by hand."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(across, 0) * max(down, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared)


def test_a_box_is_stored_and_predicted_in_its_own_form(place: Path, tmp_path: Path) -> None:
    found = rows(place).to_list()
    for row in found:
        left, top, right, bottom = row["box"]
        row["box"] = [left, top, right - left, bottom - top]
    fields = Fields(text="phrase", image="picture", label="box")
    processor = load_processor(place / "vilt", pictures=True)
    wide = prepare(Dataset.from_list(found), None, fields, processor, kind="grounding", boxes="xywh")
    plain = prepare(rows(place), None, fields, processor, kind="grounding")
    np.testing.assert_allclose(wide.train["labels"][:], plain.train["labels"][:])
    train(attached(place, wide), wide, settings(tmp_path / "task", epochs=1))
    again = ss.load(tmp_path / "task")
    assert again.extras["preprocessing"]["boxes"] == "xywh"
    (box,) = predict(again, Dataset.from_list(found[:1]))["prediction"]
    again.extras["preprocessing"]["boxes"] = "xyxy"
    (corners,) = predict(again, Dataset.from_list(found[:1]))["prediction"]
    assert box[2:] == pytest.approx([corners[2] - corners[0], corners[3] - corners[1]])


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_continues_to_the_same_bits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Step 7 continues from a checkpoint within epoch 2 (step 6)."""
    data, how = task_data(place, kind), {"save_steps": 6}

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt

    train(attached(place, data), data, settings(tmp_path / "whole", **how))
    with monkeypatch.context() as patched:
        patched.setattr(StopIfDiverged, "on_step_begin", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(attached(place, data), data, settings(tmp_path / "parts", **how))
    results = train(attached(place, data, seed=9), data, settings(tmp_path / "parts", **how, resume=True))
    assert results.resumed_from == 6
    found = [load_file(tmp_path / name / task_folder.WEIGHTS) for name in ("whole", "parts")]
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_stored_features_give_the_same_training(place: Path, tmp_path: Path, kind: str) -> None:
    data, found = task_data(place, kind), []
    for where in ("off", "ram"):
        model = attached(place, data, method=ss.ReadConfig(rank=4))
        results = train(model, data, settings(tmp_path / where, features=where))
        found.append([entry["train_loss"] for entry in results.history])
        assert (results.features is not None) == (where == "ram")
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_bank_answers_and_finds_on_one_backbone(place: Path, tmp_path: Path) -> None:
    backbone = load_backbone(place / "vilt")
    for kind in KINDS:
        data = task_data(place, kind)
        model = ss.attach(backbone, ss.ReadConfig(rank=4), head=head_for(data))
        train(model, data, settings(tmp_path / kind, epochs=1))
        ss.detach(model)
        succeed("bank", "add", tmp_path / "bank", kind, tmp_path / kind)
    how = ["--tasks", "vqa,grounding", "--data", place / "dev.jsonl", "--output", tmp_path / "out.jsonl", "--quiet"]
    succeed("bank", "run", tmp_path / "bank", *how)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for kind in KINDS:
        alone = predict(ss.load(tmp_path / kind), rows(place, "dev"))["prediction"][:]
        told = [row[f"prediction_{kind}"] for row in found]
        assert told == alone if kind == "vqa" else np.allclose(told, alone, rtol=1e-4)


# --- two towers -------------------------------------------------------------------------------------------------------


def test_a_dual_encoder_answers_by_both_vectors_and_their_product(place: Path, tmp_path: Path) -> None:
    data = task_data(place, "vqa", "clip")
    model = attached(place, data, "clip", ss.ReadConfig(rank=4))
    assert isinstance(model, ss.JointModel)
    results = train(model, data, settings(tmp_path / "task", epochs=4))
    losses = [entry["train_loss"] for entry in results.history]
    assert losses[-1] < losses[0]
    again, dev = ss.load(tmp_path / "task"), rows(place, "dev")
    assert isinstance(again, ss.JointModel)
    assert evaluate(again, dev) == pytest.approx(results.scores, rel=1e-6)
    assert predict(again, dev)["prediction"][:] == predict(model, dev, batch_size=5)["prediction"][:]
    batch = data.collate([data.dev[number] for number in range(3)])
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    names = ("pixel_values", "input_ids", "attention_mask")
    out = [again(**{name: one[name] for name in names}).logits for one in (batch, other)]
    assert not torch.allclose(*out)
    images, texts = again.embeddings(batch["pixel_values"], {name: batch[name] for name in names[1:]})
    both = again.joint(images, texts)
    torch.testing.assert_close(both[:, 16:], both[:, :8] * both[:, 8:16])
    backbone = ss.detach(again)
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert type(backbone).__name__ == "CLIPModel"


def test_a_box_is_not_read_from_two_vectors(place: Path) -> None:
    with pytest.raises(DataError, match="makes one vector of a whole picture before it knows the phrase"):
        task_data(place, "grounding", "clip")
    with pytest.raises(ValueError, match="a Box head on a dual encoder: of its two vectors classes and answers are"):
        ss.attach(clip(), ss.ReadConfig(rank=4), head=ss.Box())


# --- commands ---------------------------------------------------------------------------------------------------------


def asked(place: Path, kind: str, output: Path, backbone: str = "vilt", beside: str | None = None) -> list[object]:
    text, label = COLUMNS[kind]
    source = ["--train", place / "train.jsonl", "--dev", place / "dev.jsonl", "--output", output]
    columns = ["--text", text, "--image", "picture", "--label", label, "--kind", kind]
    how = ["--set", "rank=4", "--epochs", "1", "--batch-size", "8", "--quiet"]
    two = [] if beside is None else ["--text-backbone", place / beside]
    return ["train", "--backbone", place / backbone, *two, *source, *columns, *how]


@pytest.mark.parametrize(("kind", "backbones"), [("vqa", ("vit", "bert")), ("grounding", ("vilt",))])
def test_the_commands_train_score_and_predict(place: Path, tmp_path: Path, kind: str, backbones: Any) -> None:
    succeed(*asked(place, kind, tmp_path / "task", *backbones))
    results = json.loads((tmp_path / "task" / "results.json").read_text())
    shown = succeed("eval", tmp_path / "task", "--data", place / "dev.jsonl", "--quiet").output
    score = METRICS[kind][0]
    assert f"{results['scores'][score]:.4g}" in shown
    succeed("predict", tmp_path / "task", "--data", place / "dev.jsonl", "--output", tmp_path / "out.csv", "--quiet")
    first = table(tmp_path / "out.csv")[0]["prediction"]
    assert len(json.loads(first)) == 4 if kind == "grounding" else first in results["labels"]


def test_a_comparison_has_both_kinds(place: Path, tmp_path: Path) -> None:
    tasks = "".join(
        f'[[task]]\nname = "{kind}"\ntrain = "train.jsonl"\ndev = "dev.jsonl"\ntext = "{text}"\nimage = "picture"\n'
        f'label = "{label}"\nkind = "{kind}"\n'
        for kind, (text, label) in COLUMNS.items()
    )
    how = "epochs = 1\nseeds = [0]\nbatch_size = 8\n[costs]\nlength = 8\nrepeats = 1\n"
    contender = '[[contender]]\nmethod = "read"\nrates = [0.01]\n[contender.set]\nrank = 4\n'
    (place / "both.toml").write_text(f'{how}[[backbone]]\nmodel = "vilt"\n{tasks}{contender}')
    succeed("compare", place / "both.toml", "--output", tmp_path / "both.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "both.jsonl").read_text().splitlines()]
    scored = {line["settings"]["problem"]: line["measured"] for line in lines if line["kind"] == "score"}
    assert scored.keys() == set(KINDS)
    assert all(scored[kind]["scores"].keys() == set(METRICS[kind]) for kind in KINDS)
    (cost,) = [line for line in lines if line["kind"] == "cost"]
    assert cost["status"] == "ok"


@pytest.mark.parametrize(("kind", "backbone"), [("vqa", "vilt"), ("vqa", "clip"), ("grounding", "vilt")])
def test_a_plan_is_made_of_a_config_alone(place: Path, kind: str, backbone: str) -> None:
    shown = succeed("plan", "--backbone", place / backbone, "--kind", kind, "--batch", "4", "--length", "8", "--json")
    plan = json.loads(shown.output)["plan"]
    assert plan["source"] == "traced"
    assert plan["head"]["head"] == {"vqa": "Answer", "grounding": "Box"}[kind]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_training(place: Path, tmp_path: Path) -> None:
    fields, processor = (
        Fields(text="phrase", image="picture", label="box"),
        load_processor(place / "vilt", pictures=True),
    )
    found = rows(place)
    with pytest.raises(DataError, match="kind='grounding' reads a picture and a text of each row: name both columns"):
        prepare(found, None, Fields(text="phrase", label="box"), processor, kind="grounding")
    with pytest.raises(DataError, match="TokenizersBackend reads one of them"):
        prepare(found, None, fields, load_processor(place / "vilt"), kind="grounding")
    with pytest.raises(DataError, match="answers=3 with kind='single': it is for vqa"):
        prepare(found, None, fields, processor, kind="single", answers=3)
    with pytest.raises(DataError, match="shots=2: vqa has no classes"):
        prepare(found, None, Fields(text="question", image="picture", label="answers"), processor, kind="vqa", shots=2)
    crop = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 24, "width": 24})
    whole = ViltProcessor(image_processor(), tokenizer())
    whole.image_processor = crop
    both = SideBySideProcessor.of(whole)
    with pytest.raises(DataError, match="ViltProcessor cuts edges off pictures, so boxes would not be where"):
        prepare(found, None, fields, both, kind="grounding")
    said = refusal(*asked(place, "grounding", tmp_path / "never"), "--boxes", "yxyx")
    assert "boxes='yxyx': choose xyxy or xywh" in said
    assert "answers=1: choose at least 2" in refusal(*asked(place, "vqa", tmp_path / "never"), "--answers", "1")
    assert not (tmp_path / "never").exists()


def test_a_picture_that_cannot_be_read_is_named_or_left_out(place: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    bad = [{**row, "picture": str(broken)} if number == 2 else row for number, row in enumerate(rows(place).to_list())]
    fields, processor = (
        Fields(text="phrase", image="picture", label="box"),
        load_processor(place / "vilt", pictures=True),
    )
    with pytest.raises(DataError, match=r"broken.png' in row 3 cannot be read"):
        prepare(Dataset.from_list(bad), None, fields, processor, kind="grounding")
    with pytest.warns(match="1 of 36 images of the training rows cannot be read and were left out"):
        data = prepare(
            Dataset.from_list(bad), rows(place, "dev"), fields, processor, kind="grounding", skip_bad_files=True
        )
    assert len(data.train) == 35


def test_dev_answers_that_training_never_had_are_counted_and_wrong(place: Path) -> None:
    fields = Fields(text="question", image="picture", label="answers")
    dev = [{**row, "answers": [{"answer": "purple"}]} for row in rows(place, "dev").to_list()[:3]]
    both = Dataset.from_list([*dev, *rows(place, "dev").to_list()[3:]])
    with pytest.warns(match="3 of 12 rows have none of the 3 answers that are learned, rows 1, 2, 3"):
        data = prepare(rows(place), both, fields, load_processor(place / "vilt", pictures=True), kind="vqa")
    model = attached(place, data)
    model.extras["processor"], model.extras["preprocessing"] = data.processor, data.preprocessing()
    with pytest.warns(match="They count as wrong"):
        assert evaluate(model, both)["accuracy"] <= 0.75


def test_rows_of_a_table_are_read(place: Path, tmp_path: Path) -> None:
    """In csv, answers stand with "|" between them, and boxes as four numbers."""
    flat = [
        {**row, "answers": "|".join(each["answer"] for each in row["answers"]), "box": " ".join(map(str, row["box"]))}
        for row in rows(place).to_list()
    ]
    write(tmp_path / "rows.csv", flat)
    for kind, (text, label) in COLUMNS.items():
        data = ss.DataSpec(train=tmp_path / "rows.csv", text=text, image="picture", label=label, kind=kind)
        read = data.rows(data.train, "train")
        found = prepare(read, None, data.fields, load_processor(place / "vilt", pictures=True), kind=kind)
        plain = prepare(rows(place), None, data.fields, load_processor(place / "vilt", pictures=True), kind=kind)
        np.testing.assert_allclose(found.train["labels"][:], plain.train["labels"][:])
