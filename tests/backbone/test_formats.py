"""Backbones that are quantised as they are loaded: by name, stored in a task, and never unpacked to be recognised."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import own_process
import sidestep as ss
from commands import FAST, refusal, succeed, table
from dual_encoders import clip
from odd_models import texts
from sidestep.backbone import digest_of, pretrained_tensors, without_values
from sidestep.backbone.load import load_backbone, load_pair
from sidestep.backbone.quantised import bytes_of, is_quantised
from sidestep.backbone.source import LoadError
from sidestep.compare.spec import Backbone
from sidestep.tasks.load import BackboneMismatch
from small_tasks import reviews, text_backbone, write
from tiny import randomize

pytest.importorskip("bitsandbytes")
torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
FORMATS = ("4bit", "8bit", pytest.param("int8", marks=torchao))
HERE = ("4bit", "8bit", *(("int8",) if importlib.util.find_spec("torchao") else ()))
READ = ss.ReadConfig(rank=4)
TWO = ss.Classify(num_labels=2)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    t.LlamaModel(t.LlamaConfig(vocab_size=64, num_hidden_layers=2, num_key_value_heads=2, **SIZES)).save_pretrained(
        path
    )
    return path


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes' own, and torch's of its forks
        warnings.simplefilter("error", BackboneMismatch)
        yield


@pytest.fixture
def no_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever unpacks weights fails."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were unpacked")

    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", fail)
    monkeypatch.setattr("bitsandbytes.functional.int8_vectorwise_dequant", fail)
    if importlib.util.find_spec("torchao"):
        monkeypatch.setattr("torchao.quantization.Int8Tensor.dequantize", fail)


def digest(model: Any) -> Any:
    return digest_of(pretrained_tensors(model))


@torch.no_grad()
def states(model: Any) -> torch.Tensor:
    return model(input_ids=texts()).last_hidden_state


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=texts()).logits


def task(folder: Path, at: Path, quantize: Any, method: Any = READ) -> torch.Tensor:
    """Save a task with random weights on a fresh backbone. Its logits."""
    model = ss.attach(load_backbone(folder, quantize=quantize), method, head=TWO).eval()
    randomize(model)
    model.save_pretrained(at)
    return logits(model)


def test_a_task_is_the_same_in_another_process(folder: Path, tmp_path: Path) -> None:
    expected = {name: task(folder, tmp_path / name, name) for name in HERE}
    script = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "import sidestep as ss, torch; from safetensors.torch import load_file, save_file\n"
        f"folder, ids = {str(tmp_path)!r}, load_file({str(tmp_path / 'ids')!r})['ids']\n"
        f"models = {{name: ss.load(folder + '/' + name) for name in {HERE!r}}}\n"
        "with torch.no_grad(): found = {name: one(input_ids=ids).logits for name, one in models.items()}\n"
        f"save_file(found, {str(tmp_path / 'found')!r})"
    )
    save_file({"ids": texts()}, tmp_path / "ids")
    done = own_process.run(script)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found")
    assert all(torch.equal(found[name], expected[name]) for name in HERE)


@pytest.mark.parametrize("quantize", FORMATS)
def test_attach_and_detach_leave_the_bare_outputs(folder: Path, quantize: str) -> None:
    backbone = load_backbone(folder, quantize=quantize)
    expected = states(backbone)
    assert not torch.equal(expected, states(load_backbone(folder)))
    for method in (READ, ss.ReadoutConfig(), ss.DTLConfig(), ss.LoraConfig(rank=2)):
        model = ss.attach(backbone, method, head=TWO)
        randomize(model)
        model(input_ids=texts(), labels=torch.arange(len(texts())) % 2).loss.backward()
        assert all(parameter.grad is not None for _, parameter in model.trained_parameters())
        ss.detach(model)
        assert torch.equal(states(backbone), expected)


@pytest.mark.parametrize("quantize", FORMATS)
def test_the_digest_reads_codes_and_scales_alone(folder: Path, quantize: str, no_unpacking: None) -> None:
    fresh = load_backbone(folder, quantize=quantize)
    before = digest(fresh)
    assert before.dtype == "float32"
    assert digest(fresh).exact != digest(load_backbone(folder)).exact
    assert all(parameter.is_meta for parameter in without_values(fresh).parameters())
    weight: Any = fresh.layers[0].mlp.up_proj.weight
    scales = {"4bit": lambda: weight.quant_state.absmax, "8bit": lambda: weight.SCB, "int8": lambda: weight.scale}
    scales[quantize]().mul_(2)
    assert digest(fresh).matches(before) == "different"


@pytest.mark.parametrize("quantize", FORMATS)
def test_the_digest_does_not_depend_on_whether_the_model_ran(folder: Path, quantize: str) -> None:
    model = load_backbone(folder, quantize=quantize)
    before, size = digest(model), bytes_of(model)
    states(model)
    assert (digest(model), bytes_of(model)) == (before, size)


@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
def test_the_digest_is_that_of_codes_packed_for_a_cpu(folder: Path, nested: bool) -> None:
    """What bitsandbytes does at the first pass on a CPU with AVX512 and bfloat16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    config = t.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    model = load_backbone(folder, quantize=config)
    before = digest(model)
    for module in model.modules():
        if is_quantised(module):
            weight: Any = module.weight
            weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert digest(model) == before


def test_the_same_codes_beside_another_precision_are_known(folder: Path) -> None:
    half, single = (load_backbone(folder, quantize="4bit", dtype=dtype) for dtype in ("bfloat16", "float32"))
    again = load_backbone(folder, quantize="4bit", dtype="bfloat16")
    assert digest(half).matches(digest(again)) == "same"
    assert digest(half).dtype == "bfloat16"
    assert half.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert digest(single).matches(digest(half)) != "same"


@pytest.mark.parametrize(("made", "given"), [("4bit", None), (None, "4bit"), ("4bit", "8bit")])
def test_a_task_on_weights_of_another_format_is_refused_and_names_both(
    folder: Path, tmp_path: Path, made: Any, given: Any
) -> None:
    task(folder, tmp_path / "task", made)
    words = {"4bit": "in 4 bit by bitsandbytes with", "8bit": "in 8 bit by bitsandbytes with", None: f"{folder} with"}
    with pytest.raises(ss.TaskError) as refused:
        ss.load(tmp_path / "task", load_backbone(folder, quantize=given))
    first, second = str(refused.value).split("but this backbone")
    assert words[made] in first
    assert words[given] in second
    with pytest.warns(BackboneMismatch, match="outputs are not those of the task"):
        ss.load(tmp_path / "task", load_backbone(folder, quantize=given), allow_mismatch=True)


def test_a_quantization_config_of_ones_own_and_a_quantised_checkpoint(folder: Path, tmp_path: Path) -> None:
    own = t.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["down_proj"])
    expected = task(folder, tmp_path / "task", own)
    loaded = ss.load(tmp_path / "task")
    assert torch.equal(logits(loaded), expected)
    assert not is_quantised(loaded.backbone.layers[0].mlp.down_proj)
    load_backbone(folder, quantize="4bit").save_pretrained(tmp_path / "checkpoint")
    expected = task(tmp_path / "checkpoint", tmp_path / "other", None)
    assert torch.equal(logits(ss.load(tmp_path / "other")), expected)
    with pytest.raises(LoadError, match=r"quantised already \(4 bit by bitsandbytes\)\. Leave quantize out"):
        load_backbone(tmp_path / "checkpoint", quantize="8bit")


@pytest.mark.parametrize(
    ("name", "quantize", "message"),
    [
        ("folder", "3bit", "choose one of 4bit, 8bit, int8, int4"),
        ("timm:vit_tiny_patch16_224", "4bit", "quantised by transformers as it loads them"),
        ("vit:file.npz", "4bit", "quantised by transformers as it loads them"),
        ("folder", {"quant_method": "nonesuch"}, "transformers cannot read the quantization config"),
        ("folder", {"quant_method": "torchao", "quant_type": {"default": {"_type": "quantize_"}}}, "classes only"),
        pytest.param("folder", "int4", "none on a CPU. Choose 4bit", marks=torchao),
    ],
)
def test_what_cannot_be_quantised_says_what_to_do(folder: Path, name: str, quantize: Any, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load_backbone(folder if name == "folder" else name, quantize=quantize)


def test_without_its_package_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(LoadError, match=r"torchao.*pip install \"sidestep\[torchao\]\""):
        load_backbone(folder, quantize="int8")


@pytest.mark.parametrize("method", [ss.FullConfig(), ss.DiffPruningConfig(), ss.IA3Config()])
def test_methods_that_change_codes_are_refused_by_name(folder: Path, method: Any) -> None:
    backbone = load_backbone(folder, quantize="4bit")
    with pytest.raises(
        ss.UnsupportedBackbone, match=r"does not work on LlamaModel: its weights are quantised.*train a"
    ):
        ss.attach(backbone, method, head=TWO)
    with pytest.raises(ss.UnsupportedBackbone, match=r"loses the scales of 8-bit codes.*choose lora"):
        ss.attach(load_backbone(folder, quantize="8bit"), ss.DoraConfig(), head=TWO)


@pytest.mark.parametrize("quantize", FORMATS)
def test_an_own_head_and_pooler_stay_plain_and_are_loaded_again(tmp_path: Path, quantize: str) -> None:
    torch.manual_seed(0)
    t.BertModel(t.BertConfig(vocab_size=64, num_hidden_layers=2, **SIZES)).save_pretrained(tmp_path / "bert")
    model = ss.attach(load_backbone(tmp_path / "bert", quantize=quantize, head=True, num_labels=2), READ).eval()
    assert {part.weight.dtype for part in (model.backbone.classifier, model.backbone.bert.pooler.dense)} == {
        torch.float32
    }
    randomize(model)
    model.save_pretrained(tmp_path / "task")
    assert torch.equal(logits(ss.load(tmp_path / "task")), logits(model))


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_both_towers_of_a_dual_encoder(tmp_path: Path, quantize: str) -> None:
    clip().save_pretrained(tmp_path / "clip")
    model = ss.attach(load_pair(str(tmp_path / "clip"), quantize=quantize), READ, head=ss.Retrieve(dim=8)).eval()
    randomize(model)
    batch = {"input_ids": texts(3) % 38, "pixel_values": torch.rand(3, 3, 16, 16)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    model.save_pretrained(tmp_path / "task")
    again = ss.load(tmp_path / "task")
    with torch.no_grad():
        expected, found = (one(**batch) for one in (model, again))
    assert torch.equal(found.text_embeds, expected.text_embeds)
    assert torch.equal(found.image_embeds, expected.image_embeds)
    assert any(is_quantised(part) for part in again.image.backbone.modules())
    with pytest.raises(LoadError, match=r"no dual encoder in torchao's formats\. Choose 4bit or"):
        load_pair(str(tmp_path / "clip"), quantize="int8")


def test_the_commands_store_the_format_and_load_it(tmp_path: Path) -> None:
    text_backbone(tmp_path / "bert")
    rows = write(tmp_path / "rows.csv", reviews(24))
    made = ("train", "--backbone", tmp_path / "bert", "--train", rows, "--text", "text", *FAST)
    for place, format_ in (("task", ("--quantize", "4bit")), ("plain", ())):
        succeed(*made, *format_, "--output", tmp_path / place)
    stored, plain = (json.loads((tmp_path / name / "sidestep.json").read_text()) for name in ("task", "plain"))
    assert stored["backbone"]["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert "quantization" not in plain["backbone"]
    of_rows = ("--data", rows, "--quiet", "--output")
    succeed("predict", tmp_path / "task", *of_rows, tmp_path / "out.csv")
    succeed("bank", "add", tmp_path / "bank", "one", tmp_path / "task")
    succeed("bank", "run", tmp_path / "bank", "--task", "one", *of_rows, tmp_path / "bank.csv")
    one, bank = (table(tmp_path / name) for name in ("out.csv", "bank.csv"))
    assert [row["prediction"] for row in bank] == [row["prediction"] for row in one]
    assert "choose one of 4bit" in refusal(*made, "--quantize", "5bit", "--output", tmp_path / "other")


def test_a_comparison_names_a_format_and_refuses_others(tmp_path: Path) -> None:
    backbone = Backbone(name="b", model="folder", quantize="8bit")
    assert backbone.quantize == "8bit"
    with pytest.raises(LoadError, match="choose one of 4bit, 8bit"):
        Backbone(name="b", model="folder", quantize="5bit")  # type: ignore[arg-type]
