"""The task folder: what is saved comes back bit for bit, and what cannot come back is refused by name."""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import own_process
import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.source import LoadError
from sidestep.disk import task_folder
from sidestep.disk.card import model_card
from sidestep.disk.task_folder import TaskError, inspect_task
from sidestep.model import saving
from sidestep.model.saving import portable_names
from sidestep.tasks import load as loading
from sidestep.tasks.load import BackboneMismatch, DtypeMismatch, load

BERT = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
    num_labels=3,
)
T5 = T5Config(
    vocab_size=50,
    d_model=16,
    d_kv=8,
    d_ff=32,
    num_layers=2,
    num_heads=2,
    decoder_start_token_id=0,
    tie_word_embeddings=True,
)
LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
TEXT = {"input_ids": torch.arange(1, 13).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
HEAD = ss.Classify(num_labels=3, labels=("a", "b", "c"))


def checkpoint(folder: Path, model: nn.Module) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path):
    """A masked language model's checkpoint: neither pooler nor classifier."""
    torch.manual_seed(0)
    return checkpoint(tmp_path / "bert", BertForMaskedLM(BERT))


@pytest.fixture
def t5(tmp_path):
    torch.manual_seed(0)
    return checkpoint(tmp_path / "t5", T5ForConditionalGeneration(T5))


def trained(model: ss.SideModel) -> ss.SideModel:
    """The model after a random step: every trained weight has moved."""
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def logits(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or TEXT)).logits


def make_task(bert: Path, folder: Path, method=None, **kwargs) -> ss.SideModel:
    model = trained(ss.attach(AutoModel.from_pretrained(bert), method or ss.ReadConfig(rank=4), head=HEAD))
    model.save_pretrained(folder, **kwargs)
    return model


# --- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [ss.ReadConfig(rank=4), ss.ProbeConfig(), ss.BitFitConfig(), ss.FullConfig()])
@pytest.mark.parametrize("own_head", [True, False])
def test_a_task_on_a_checkpoint_without_pooler_and_head_comes_back(bert, tmp_path, method, own_head):
    if own_head:
        backbone = BertForSequenceClassification.from_pretrained(bert, num_labels=3)
    else:
        backbone = AutoModel.from_pretrained(bert)
    model = trained(ss.attach(backbone, method, head=None if own_head else HEAD))
    model.save_pretrained(tmp_path / "task")
    again = load(tmp_path / "task")
    assert torch.equal(logits(again), logits(model))
    assert type(again.backbone) is type(backbone)
    assert not again.training
    assert again.settings.method == method


def test_what_the_checkpoint_lacks_is_stored_even_when_it_is_frozen(bert, tmp_path):
    backbone = BertForSequenceClassification.from_pretrained(bert, num_labels=3)
    model = trained(ss.attach(backbone, ss.ReadConfig(rank=4), train_head=False))
    model.save_pretrained(tmp_path / "task")
    assert torch.equal(logits(load(tmp_path / "task")), logits(model))


@pytest.mark.parametrize("method", [ss.ReadConfig(rank=4), ss.BitFitConfig(), ss.FullConfig()])
def test_a_task_made_on_the_base_model_goes_onto_a_class_with_a_head(bert, tmp_path, method):
    model = make_task(bert, tmp_path / "task", method)
    backbone = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=7)
    assert torch.equal(logits(load(tmp_path / "task", backbone)), logits(model))


@pytest.mark.parametrize("method", [ss.ReadConfig(rank=4), ss.BitFitConfig()])
def test_a_task_made_on_a_class_with_a_head_goes_onto_the_base_model(bert, tmp_path, method):
    backbone = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=7)
    model = trained(ss.attach(backbone, method, head=HEAD))
    model.save_pretrained(tmp_path / "task")
    assert torch.equal(logits(load(tmp_path / "task", AutoModel.from_pretrained(bert))), logits(model))
    by_name = load(tmp_path / "task")
    assert type(by_name.backbone) is BertModel
    assert torch.equal(logits(by_name), logits(model))


@pytest.mark.parametrize("method", [ss.ReadConfig(rank=4), ss.FullConfig()])
def test_tied_t5_weights_come_back_and_are_stored_once(t5, tmp_path, method):
    model = trained(ss.attach(T5ForConditionalGeneration.from_pretrained(t5), method))
    model.save_pretrained(tmp_path / "task")
    again = load(tmp_path / "task")
    inputs = {**TEXT, "decoder_input_ids": torch.arange(4).view(2, 2)}
    assert torch.equal(logits(again, **inputs), logits(model, **inputs))
    stored = load_file(tmp_path / "task" / "task.safetensors")
    tied = [name for name in stored if name.startswith("trunk.") and stored[name].shape == (50, 16)]
    assert tied == (["trunk.shared.weight"] if method == ss.FullConfig() else [])
    assert again.backbone.lm_head.weight is again.backbone.shared.weight


def test_a_task_on_t5_with_a_sidestep_head_comes_back(t5, tmp_path):
    model = trained(ss.attach(AutoModel.from_pretrained(t5), ss.ReadConfig(rank=4), head=HEAD))
    model.save_pretrained(tmp_path / "task")
    assert torch.equal(logits(load(tmp_path / "task")), logits(model))


def test_a_causal_model_comes_back(tmp_path):
    folder = checkpoint(tmp_path / "llama", LlamaForCausalLM(LLAMA))
    model = trained(ss.attach(AutoModel.from_pretrained(folder), ss.ReadConfig(rank=4), head=HEAD))
    model.save_pretrained(tmp_path / "task")
    assert torch.equal(logits(load(tmp_path / "task")), logits(model))


def test_the_backbones_own_pad_token_and_labels_come_back(tmp_path):
    folder = checkpoint(tmp_path / "llama", LlamaForCausalLM(LLAMA))
    backbone = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, pad_token_id=9, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
    )
    model = trained(ss.attach(backbone, ss.ReadConfig(rank=4)))
    model.save_pretrained(tmp_path / "task")
    again = load(tmp_path / "task")
    assert again.config.pad_token_id == 9
    assert again.config.id2label == {0: "no", 1: "yes"}
    assert inspect_task(tmp_path / "task")["labels"] == ["no", "yes"]
    assert torch.equal(logits(again), logits(model))


def test_a_timm_model_comes_back(tmp_path):
    timm = pytest.importorskip("timm")
    weights = timm.create_model("test_vit", num_classes=0)
    save_file(weights.state_dict(), tmp_path / "vit.safetensors")
    backbone = load_backbone(f"timm:test_vit@{tmp_path / 'vit.safetensors'}")
    model = trained(ss.attach(backbone, ss.ReadConfig(rank=4), head=HEAD))
    model.save_pretrained(tmp_path / "task")
    image = {"pixel_values": torch.randn(2, 3, 160, 160)}
    assert torch.equal(logits(load(tmp_path / "task"), **image), logits(model, **image))
    assert torch.equal(logits(load(tmp_path / "task", weights), **image), logits(model, **image))


def test_a_fresh_process_predicts_the_same(bert, tmp_path):
    model = trained(ss.attach(BertForSequenceClassification.from_pretrained(bert, num_labels=3), ss.ReadConfig(rank=4)))
    model.save_pretrained(tmp_path / "task")
    program = (
        "import sys, torch; from sidestep.tasks.load import load; from safetensors.torch import save_file\n"
        "torch.manual_seed(7); model = load(sys.argv[1]); ids = torch.arange(1, 13).view(2, 6)\n"
        "mask = torch.ones_like(ids)\n"
        "with torch.no_grad(): out = model(input_ids=ids, attention_mask=mask).logits\n"
        "save_file({'logits': out}, sys.argv[2])\n"
    )
    out = tmp_path / "out.safetensors"
    done = own_process.run(program, tmp_path / "task", out)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(out)["logits"], logits(model))


def test_other_tensor_dtypes_and_the_pool_come_back(bert, tmp_path):
    model = make_task(bert, tmp_path / "task")
    assert load(tmp_path / "task").settings.head.pool == model.pool
    assert {value.dtype for value in load_file(tmp_path / "task" / "task.safetensors").values()} == {torch.float32}


def test_settings_extras_and_scores_come_back(bert, tmp_path):
    vocabulary = {"[UNK]": 0, "good": 1, "bad": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = ss.attach(
        AutoModel.from_pretrained(bert),
        ss.ReadConfig(rank=4),
        head=HEAD,
        backbone_noise="dropout",
        checkpoint="late",
    )
    model.extras["processor"] = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    model.extras["preprocessing"] = {"max_length": 8, "fields": {"text": "sentence", "text2": None}}
    model.save_pretrained(tmp_path / "task", scores={"accuracy": torch.tensor(0.5), "rows": 4})
    again = load(tmp_path / "task")
    assert again.extras["processor"]("good bad worse")["input_ids"] == [1, 2, 0]
    assert again.extras["preprocessing"] == model.extras["preprocessing"]
    assert again.extras["scores"] == {"accuracy": 0.5, "rows": 4}
    assert (again.settings.backbone_noise, again.settings.checkpoint) == ("dropout", "late")
    again.save_pretrained(tmp_path / "copy")
    assert inspect_task(tmp_path / "copy")["scores"] == {"accuracy": 0.5, "rows": 4}


def test_names_are_relative_to_the_trunk(bert):
    backbone = BertForSequenceClassification.from_pretrained(bert, num_labels=3)
    names = portable_names(ss.attach(backbone, ss.ReadConfig(rank=4)))
    assert names["backbone.bert.pooler.dense.weight"] == "trunk.pooler.dense.weight"
    assert names["backbone.classifier.bias"] == "own.classifier.bias"
    assert names["side.out.bias"] == "side.out.bias"


# --- precision and other backbones -------------------------------------------------------------------------


def test_another_precision_is_a_warning(bert, tmp_path):
    make_task(bert, tmp_path / "task")
    with pytest.warns(DtypeMismatch, match=r"these weights in float32, and the backbone is in bfloat16"):
        model = load(tmp_path / "task", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(logits(model)).all()


def test_a_task_made_in_bfloat16_is_loaded_in_it(bert, tmp_path, recwarn):
    backbone = AutoModel.from_pretrained(bert, dtype=torch.bfloat16)
    model = trained(ss.attach(backbone, ss.ReadConfig(rank=4), head=HEAD))
    model.save_pretrained(tmp_path / "task")
    again = load(tmp_path / "task")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    assert not [warning for warning in recwarn if issubclass(warning.category, DtypeMismatch)]


def test_another_backbone_is_refused_with_both_digests(bert, tmp_path):
    model = make_task(bert, tmp_path / "task")
    other = AutoModel.from_pretrained(checkpoint(tmp_path / "other", BertModel(BERT)))
    flags = [parameter.requires_grad for parameter in other.parameters()]
    with pytest.raises(TaskError) as error:
        load(tmp_path / "task", other)
    text = str(error.value)
    assert model.digest.exact[:16] in text
    assert str(bert) in text
    assert str(tmp_path / "other") in text
    assert "allow_mismatch=True" in text
    assert [parameter.requires_grad for parameter in other.parameters()] == flags
    with pytest.warns(BackboneMismatch, match="outputs are not those of the task"):
        loaded = load(tmp_path / "task", other, allow_mismatch=True)
    assert loaded.digest.exact[:16] in text
    assert torch.equal(loaded.head.linear.weight, model.head.linear.weight)


def test_a_backbone_of_another_size_does_not_fit_even_with_allow_mismatch(bert, tmp_path):
    make_task(bert, tmp_path / "task")
    wide = BertModel(BertConfig(**{**BERT.to_dict(), "hidden_size": 32}))
    with (
        pytest.warns(BackboneMismatch),
        pytest.raises(TaskError, match=r"do not fit BertModel .*other shapes"),
    ):
        load(tmp_path / "task", wide, allow_mismatch=True)


def test_a_task_with_the_backbones_own_head_names_the_class_it_needs(bert, tmp_path):
    backbone = BertForSequenceClassification.from_pretrained(bert, num_labels=3)
    ss.attach(backbone, ss.ReadConfig(rank=4)).save_pretrained(tmp_path / "task")
    with pytest.raises(TaskError, match=r"made on BertForSequenceClassification\).*place own\.classifier\.bias"):
        load(tmp_path / "task", AutoModel.from_pretrained(bert))


def test_an_unsupported_backbone_is_named_with_the_tasks_own(bert, tmp_path):
    make_task(bert, tmp_path / "task", ss.BitFitConfig())
    with pytest.raises(ss.UnsupportedBackbone, match=r"made on BertModel .*bitfit does not work on LlamaModel"):
        load(tmp_path / "task", LlamaForCausalLM(LLAMA).model, allow_mismatch=True)


def test_other_weights_are_told_of_before_the_method_is_tried_on_them(bert, tmp_path):
    make_task(bert, tmp_path / "task", ss.BitFitConfig())
    others = (
        LlamaForCausalLM(LLAMA).model,
        BertModel(BertConfig(**{**BERT.to_dict(), "hidden_size": 32})),
        nn.Linear(2, 3),
    )
    for other in others:
        with pytest.raises(
            TaskError, match=r"made on BertModel .* but this backbone is .*load the task's own backbone"
        ):
            load(tmp_path / "task", other)
    with pytest.raises(TypeError, match="str is no torch module"):
        load(tmp_path / "task", "bert")


def test_a_backbone_without_a_name_has_to_be_passed(tmp_path):
    backbone = BertModel(BERT)
    model = trained(ss.attach(backbone, ss.ReadConfig(rank=4), head=HEAD))
    model.save_pretrained(tmp_path / "task")
    with pytest.raises(TaskError, match=r"BertModel that was not loaded by name\).*pass backbone="):
        load(tmp_path / "task")
    expected = logits(model)
    assert torch.equal(logits(load(tmp_path / "task", ss.detach(model))), expected)


def test_dtype_beside_a_backbone_is_refused(bert, tmp_path):
    make_task(bert, tmp_path / "task")
    with pytest.raises(TaskError, match=r"convert it first, with backbone\.to\(dtype\)"):
        load(tmp_path / "task", BertModel(BERT), dtype="bfloat16")


# --- writing -----------------------------------------------------------------------------------------------


def test_another_task_is_refused_and_overwritten_only_when_asked(bert, tmp_path):
    first = make_task(bert, tmp_path / "task")
    with pytest.raises(TaskError, match=rf"holds another task \(read on BertModel {bert}\).*--overwrite"):
        make_task(bert, tmp_path / "task", ss.ProbeConfig())
    assert torch.equal(logits(load(tmp_path / "task")), logits(first))
    second = make_task(bert, tmp_path / "task", ss.ProbeConfig(), overwrite=True)
    assert torch.equal(logits(load(tmp_path / "task")), logits(second))
    assert sorted(item.name for item in (tmp_path / "task").iterdir()) == [
        "README.md",
        "sidestep.json",
        "task.safetensors",
    ]


def test_other_things_in_the_folder_stay(bert, tmp_path):
    folder = tmp_path / "task"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "state").write_text("x")
    (folder / "README.md").write_text("mine")
    make_task(bert, folder)
    make_task(bert, folder, overwrite=True)
    assert (folder / "checkpoints" / "state").read_text() == "x"
    assert (folder / "README.md").read_text() == "mine"
    load(folder)


def test_a_file_is_no_folder(bert, tmp_path):
    (tmp_path / "task").write_text("x")
    with pytest.raises(TaskError, match="is a file: choose a folder"):
        make_task(bert, tmp_path / "task")


@pytest.mark.parametrize("key", ["preprocessing", "scores"])
def test_what_is_no_plain_data_is_refused_before_anything_is_written(bert, tmp_path, key):
    model = ss.attach(AutoModel.from_pretrained(bert), ss.ReadConfig(rank=4), head=HEAD)
    model.extras[key] = {"a": object()}
    with pytest.raises(TaskError, match=rf"{key} cannot be stored \(a object is no plain data\)"):
        model.save_pretrained(tmp_path / "task")
    assert not (tmp_path / "task").exists()


class Crash(BaseException):
    """Stands for a killed process."""


@dataclass
class Processor:
    """A stand-in whose file says which task it belongs to."""

    text: str

    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "name").write_text(self.text)


def test_a_crash_at_any_step_leaves_a_complete_task(bert, tmp_path, monkeypatch):
    """Every file operation of an overwriting save fails in turn; the folder is the old or the new task."""
    folder = tmp_path / "task"
    backbone = AutoModel.from_pretrained(bert)
    tasks = {}
    for name, method in (("old", ss.ProbeConfig()), ("new", ss.ReadConfig(rank=4))):
        tasks[name] = trained(ss.attach(AutoModel.from_pretrained(bert), method, head=HEAD))
        tasks[name].extras["processor"] = Processor(name)
    monkeypatch.setattr(loading, "load_processor", lambda path: (path / "name").read_text())
    outcomes = []
    for step in range(100):
        tasks["old"].save_pretrained(folder, overwrite=True)
        crashed = crash_at(step, lambda: tasks["new"].save_pretrained(folder, overwrite=True))
        loaded = load(folder, backbone)
        outcome = loaded.extras["processor"]
        assert loaded.record.name == {"old": "probe", "new": "read"}[outcome]
        assert torch.equal(logits(loaded), logits(tasks[outcome]))
        ss.detach(loaded)
        outcomes.append(outcome)
        if not crashed:
            break
    assert not crashed
    assert outcomes == sorted(outcomes, reverse=True)
    assert {"old", "new"} == set(outcomes)
    assert sorted(item.name for item in folder.iterdir()) == [
        "README.md",
        "processor",
        "sidestep.json",
        "task.safetensors",
    ]


def crash_at(step: int, call) -> bool:
    """Run `call` with its `step`-th file operation replaced by a crash; whether there were so many."""
    count = 0

    def counting(operation):
        def run(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step + 1:
                raise Crash
            return operation(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "link"), (os, "fsync"), (shutil, "rmtree")):
            patch.setattr(owner, name, counting(getattr(owner, name)))
        patch.setattr(saving, "save_file", counting(saving.save_file))
        try:
            call()
        except Crash:
            return True
    return False


def test_a_file_system_without_hard_links_is_written_to(bert, tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    model = make_task(bert, tmp_path / "task")
    assert torch.equal(logits(load(tmp_path / "task")), logits(model))


def test_the_model_card_says_how_to_load(bert, tmp_path):
    make_task(bert, tmp_path / "task", scores={"accuracy": 0.8125, "rows": 16})
    card = (tmp_path / "task" / "README.md").read_text()
    assert "library_name: sidestep" in card
    assert 'ss.load("task")' in card
    assert "| accuracy | 0.8125 |" in card
    assert "base_model" not in card  # a folder of this machine is nobody's base model
    config = json.loads((tmp_path / "task" / "sidestep.json").read_text())
    config["backbone"].update(id="org/name", revision="0" * 40)
    assert "base_model: org/name" in model_card(config, "task")


def test_inspect_reads_no_weights(bert, tmp_path, monkeypatch):
    make_task(bert, tmp_path / "task", scores={"accuracy": 0.5})
    monkeypatch.setattr(task_folder, "checksum", None)
    report = inspect_task(tmp_path / "task")
    tensors = load_file(tmp_path / "task" / "task.safetensors")
    assert report["parameters"] == sum(value.numel() for value in tensors.values())
    assert set(report["tensors"]) == set(tensors)
    assert report["tensors"]["head.linear.bias"] == {"shape": [3], "dtype": "F32", "trained": True}
    assert report["method"] == {"name": "read", "config": ss.ReadConfig(rank=4).to_dict()}
    assert report["labels"] == ["a", "b", "c"]
    assert report["backbone"]["id"] == str(bert)
    assert set(report["files"]) == {"sidestep.json", "task.safetensors"}


# --- bad folders -------------------------------------------------------------------------------------------


def edit(folder: Path, **changes) -> None:
    """Another task, rather than a damaged one: its checksum is that of the changed values."""
    config = json.loads((folder / "sidestep.json").read_text())
    (folder / "sidestep.json").write_text(json.dumps(task_folder.sealed({**config, **changes})))


def damage(folder: Path, how: str) -> None:
    """One way to spoil a task folder."""
    weights, config = folder / "task.safetensors", folder / "sidestep.json"
    data = bytearray(weights.read_bytes())
    if how == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        data[-5] ^= 1
        weights.write_bytes(data)
    elif how == "exchanged":
        save_file(load_file(weights), weights, metadata={"sha256": "0"})
    elif how == "without weights":
        weights.unlink()
    elif how == "without config":
        config.unlink()
    elif how == "unreadable config":
        config.write_text(config.read_text()[:100])
    elif how == "foreign config":
        config.write_text('["no task"]')
    elif how == "incomplete config":
        edit(folder, backbone={"id": "x"})
    elif how == "newer":
        edit(folder, format=2, sidestep="9.0")
    elif how == "unknown method":
        edit(folder, method={"name": "zork", "config": {}})
    elif how == "unknown setting":
        edit(folder, method={"name": "read", "config": {"zork": 1}})
    elif how == "setting out of range":
        edit(folder, method={"name": "read", "config": {"rank": 0}})
    elif how == "unknown head":
        edit(folder, head={"head": "Zork"})
    elif how == "outside":
        edit(folder, files={"weights": "../task.safetensors", "processor": None})


BAD = {
    "truncated": r"task\.safetensors is damaged .*copy the task again",
    "flipped": r"task\.safetensors is damaged \(its checksum differs\)",
    "exchanged": r"task\.safetensors belongs to another task than .*sidestep\.json",
    "without weights": r"is no complete task: task\.safetensors is missing",
    "without config": r"is no task folder: sidestep\.json is missing \(it holds README\.md, task",
    "unreadable config": r"sidestep\.json cannot be read .*copy the task again",
    "foreign config": r"was not written by sidestep: it states no format",
    "incomplete config": r"sidestep\.json lacks backbone\.revision",
    "newer": r"written by sidestep 9\.0 in format 2, and this version \(.*\) reads up to 1: upgrade",
    "unknown method": r"unknown method 'zork': choose one of .*read.*entry point group \"sidestep\.methods\"",
    "unknown setting": r"cannot be used: ReadConfig has no field zork",
    "setting out of range": r"cannot be used: ReadConfig: rank=0",
    "unknown head": r"cannot be used: unknown head 'Zork'",
    "outside": r"weights is \"\.\./task\.safetensors\", but it must be the name of a file inside the task's folder",
}


@pytest.mark.parametrize("how", BAD)
def test_a_bad_folder_is_refused(bert, tmp_path, how):
    make_task(bert, tmp_path / "task")
    damage(tmp_path / "task", how)
    with pytest.raises(TaskError, match=BAD[how]):
        load(tmp_path / "task")


@pytest.mark.parametrize("how", ["truncated", "without weights", "without config", "newer"])
def test_inspect_refuses_a_bad_folder_too(bert, tmp_path, how):
    make_task(bert, tmp_path / "task")
    damage(tmp_path / "task", how)
    with pytest.raises(TaskError, match=BAD[how]):
        inspect_task(tmp_path / "task")


def test_a_missing_folder_is_named(tmp_path):
    folder = tmp_path / "no"
    with pytest.raises(TaskError, match=rf"{re.escape(str(folder))} is no task folder: there is no such folder"):
        load(folder)


def test_a_damaged_task_can_be_overwritten(bert, tmp_path):
    make_task(bert, tmp_path / "task")
    damage(tmp_path / "task", "unreadable config")
    with pytest.raises(TaskError, match=r"holds another task \(its sidestep\.json cannot be read\)"):
        make_task(bert, tmp_path / "task")
    model = make_task(bert, tmp_path / "task", overwrite=True)
    assert torch.equal(logits(load(tmp_path / "task")), logits(model))


def test_a_backbone_folder_that_moved_is_named(bert, tmp_path, monkeypatch):
    make_task(bert, tmp_path / "task")
    bert.rename(tmp_path / "moved")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match=r"there is no such folder here.*say where it is now \(--backbone\)"):
        load(tmp_path / "task")
    load(tmp_path / "task", AutoModel.from_pretrained(tmp_path / "moved"))
