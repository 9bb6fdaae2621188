"""Backbones of bitsandbytes' codes: attach, save and detach leave them as they are, run before or not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import sidestep as ss
from odd_models import texts
from sidestep.backbone import digest_of, facts_of, pretrained_tensors
from sidestep.backbone.load import load_backbone
from sidestep.backbone.source import LoadError
from tiny import randomize

bitsandbytes = pytest.importorskip("bitsandbytes")
MAPS = Path("/proc/self/maps")
CODES = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "4, nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    8: {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=64, num_hidden_layers=3, **sizes))
    model.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes' own
        yield


def load(folder: Path, bits: Any) -> Any:
    quantization = t.BitsAndBytesConfig(**CODES[bits])
    return t.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=texts()).logits


@pytest.mark.parametrize("ran", [True, False], ids=["ran", "fresh"])
@pytest.mark.parametrize("bits", CODES)
def test_the_bare_model_answers_as_before(folder: Path, tmp_path: Path, bits: Any, ran: bool) -> None:
    model = load(folder, bits)
    expected = logits(load(folder, bits))
    if ran:
        assert torch.equal(logits(model), expected)
    attached = ss.attach(model, ss.ReadConfig(rank=4)).eval()
    randomize(attached)
    answer = logits(attached)
    attached.save_pretrained(tmp_path / "task")
    assert torch.equal(logits(attached), answer)
    ss.detach(attached)
    assert torch.equal(logits(model), expected)
    fresh = load(folder, bits)
    for _ in range(2):
        again = ss.load(tmp_path / "task", backbone=fresh).eval()
        assert torch.equal(logits(again), answer)
        ss.detach(again)
    assert torch.equal(logits(fresh), expected)


@pytest.mark.parametrize("bits", CODES)
def test_the_digest_does_not_depend_on_whether_the_model_ran(folder: Path, bits: Any) -> None:
    model = load(folder, bits)
    before = digest_of(pretrained_tensors(model))
    out = logits(model)
    assert digest_of(pretrained_tensors(model)) == before
    assert torch.equal(logits(model), out)


@pytest.mark.skipif(not MAPS.exists(), reason="no list of mapped files")
def test_codes_of_a_checkpoint_stay_in_its_file(folder: Path, tmp_path: Path) -> None:
    load(folder, 4).model.save_pretrained(tmp_path / "codes")
    model = load_backbone(tmp_path / "codes")
    mapped = [line.split()[0].split("-") for line in MAPS.read_text().splitlines() if line.endswith(".safetensors")]
    places = [range(int(begin, 16), int(end, 16)) for begin, end in mapped]
    for name, weight in model.named_parameters():
        assert any(weight.data_ptr() in place for place in places), name


@pytest.mark.parametrize("quantised", [True, False], ids=["already", "as it is loaded"])
def test_codes_on_disk_are_refused(folder: Path, tmp_path: Path, quantised: bool) -> None:
    if quantised:
        load(folder, 4).model.save_pretrained(tmp_path / "codes")
    place, how = (tmp_path / "codes", {}) if quantised else (folder, {"quantize": "4bit"})
    with pytest.raises(LoadError, match="Leave device_map out"):
        load_backbone(place, device_map="disk", **how)


@pytest.mark.parametrize("bits", CODES)
def test_the_trace_runs_no_quantised_weight(folder: Path, bits: Any) -> None:
    model = load(folder, bits)
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.data_ptr(), weight.shape, dict(vars(weight))
    facts = facts_of(model)
    assert (weight.data_ptr(), weight.shape, dict(vars(weight))) == before
    assert facts.source == "shapes"
    assert (facts.head.norm, facts.head.causal, facts.head.widths) == ("norm", "yes", ((64, 64, 64, 64),))
