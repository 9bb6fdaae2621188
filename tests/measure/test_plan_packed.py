"""Plans of quantised backbones: the bytes of their weights, and weights that are written out while a map runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import sidestep as ss
from commands import refusal, succeed
from sidestep.backbone.load import load_backbone
from sidestep.backbone.quantised import bytes_of
from sidestep.backbone.source import LoadError
from sidestep.measure.plan import plan, plan_for

pytest.importorskip("bitsandbytes")
torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
FORMATS = ("4bit", "8bit", pytest.param("int8", marks=torchao))
TWO = ss.Classify(num_labels=2)
ROWS, LENGTH = 4, 16
WIDTH, INNER = 128, 512
LARGEST = WIDTH * INNER * 4
"""Bytes of the largest map in float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 4, "num_hidden_layers": 3}
    t.BertModel(t.BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)).save_pretrained(path)
    return path


def planned(folder: Path, method: Any, **given: Any) -> Any:
    return plan(folder, method, head=TWO, batch=ROWS, length=LENGTH, **given)


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("method", [ss.ReadConfig(rank=4), ss.LoraConfig(rank=4)])
def test_a_plan_counts_the_bytes_of_packed_weights(folder: Path, quantize: Any, method: Any) -> None:
    found = planned(folder, method, quantize=quantize)
    model = ss.attach(load_backbone(folder, quantize=quantize), method, head=TWO)
    assert found.weights_bytes == pytest.approx(bytes_of(model), rel=0.1)
    plain = planned(folder, method)
    assert found.weights_bytes < plain.weights_bytes / 2
    batch = {"input_ids": torch.ones(ROWS, LENGTH, dtype=torch.long), "labels": torch.zeros(ROWS, dtype=torch.long)}
    of_model = plan_for(model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])})
    assert of_model.weights_bytes == bytes_of(model)
    assert of_model.peak_bytes == pytest.approx(found.peak_bytes, rel=0.01)


def test_weights_are_written_out_one_map_at_a_time(folder: Path) -> None:
    """READ's peak is within the forward pass of a frozen model: it rises by the largest map, and by no more."""
    plain, packed = (planned(folder, ss.ReadConfig(rank=4), quantize=quantize) for quantize in (None, "4bit"))
    assert packed.saved_bytes == plain.saved_bytes
    assert 0 < packed.peak_bytes - plain.peak_bytes <= LARGEST


def test_under_a_gradient_torchao_keeps_what_is_written_out(folder: Path) -> None:
    plain, bits, whole = (planned(folder, ss.LoraConfig(rank=4), quantize=q) for q in (None, "8bit", "int8"))
    assert bits.saved_bytes == plain.saved_bytes
    assert whole.saved_bytes > plain.saved_bytes + 3 * LARGEST


def test_a_plan_knows_the_format_of_a_config(folder: Path, tmp_path: Path) -> None:
    load_backbone(folder, quantize="4bit").save_pretrained(tmp_path)
    own, asked = planned(tmp_path, ss.ReadConfig(rank=4)), planned(folder, ss.ReadConfig(rank=4), quantize="4bit")
    assert own.weights_bytes == asked.weights_bytes
    config = t.BertConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(LoadError, match="quantised by gptq: a plan from a config knows 4bit, 8bit, int8, int4"):
        plan(config, ss.ReadConfig(rank=4), head=TWO, batch=ROWS)


def test_the_command_plans_a_format_and_measures_none(folder: Path) -> None:
    asked = ("plan", "--backbone", folder, "--quantize", "int4", "--batch", ROWS, "--length", LENGTH)
    assert "weights" in succeed(*asked).output
    assert "cannot be measured with random weights" in refusal(*asked, "--measure")
