"""The own head of a half-precision backbone: trained in float32, and given back bit for bit in its own precision."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import sidestep as ss
from architectures import CAUSAL, IMAGE, TEXT, VOCABULARY, timm_vit
from sidestep.disk.task_folder import inspect_task
from sidestep.methods import UnsupportedBackbone
from tiny import FAMILIES, LABELS, call, logits

READ = ss.ReadConfig(rank=2)
METHODS = {"read": READ, "lora": ss.LoraConfig(rank=2), "probe": ss.ProbeConfig()}
HALF = [torch.bfloat16, torch.float16]
BERT = t.BertConfig(**TEXT, num_labels=LABELS)

#: Heads of one map, of several, with a pooler, with batch norms, at the last token, and timm's.
HEADS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: t.BertForSequenceClassification(BERT),
    "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**TEXT, num_labels=LABELS)),
    "tokens": lambda: t.BertForTokenClassification(BERT),
    "llama": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**CAUSAL, num_labels=LABELS)),
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE, num_labels=LABELS)),
    "resnet": FAMILIES["resnet"].model,
    "timm": timm_vit,
}


def backbone(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return HEADS[name]().to(dtype).eval()


def batch(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if getattr(model, "main_input_name", "pixel_values") == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).to(dtype)}
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 7), generator=generator)}


def labels(name: str) -> Tensor:
    return torch.ones(2, 7, dtype=torch.long) if name == "tokens" else torch.tensor([0, 2])


def trained(model: ss.SideModel) -> list[nn.Parameter]:
    return [parameter for _, parameter in model.trained_parameters()]


def halves(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = halves(model)
    return now.keys() == before.keys() and all(
        value.dtype == before[name].dtype and torch.equal(value, before[name]) for name, value in now.items()
    )


def train(model: ss.SideModel, inputs: dict[str, Tensor], target: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(trained(model), lr=2e-5)
    for _ in range(steps):
        model.train()(**inputs, labels=target).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HEADS)
def test_what_is_trained_is_in_float32_moves_and_is_given_back(name: str, method: str, dtype: torch.dtype) -> None:
    if method == "lora" and name == "resnet":
        pytest.skip("LoRA is refused on ResNets")
    plain = backbone(name, dtype)
    inputs, before = batch(plain, dtype), halves(plain)
    with torch.no_grad():
        bare = logits(call(plain, inputs))
    model = ss.attach(plain, METHODS[method]).eval()
    assert all(parameter.dtype == torch.float32 for parameter in trained(model))
    with torch.no_grad():
        out = logits(model(**inputs))
    assert out.dtype == bare.dtype == dtype
    torch.testing.assert_close(out, bare, rtol=2e-2, atol=2e-2)
    own = [p for p in trained(model) if any(p is q for q in plain.parameters())]
    start = [parameter.detach().clone() for parameter in own]
    train(model, inputs, labels(name))
    assert own
    assert not any(torch.equal(*pair) for pair in zip(own, start, strict=True))
    assert same(ss.detach(model), before)
    with torch.no_grad():
        assert torch.equal(logits(call(plain, inputs)), bare)
    assert not any("forward" in module.__dict__ for module in plain.modules())


def test_float16_trains_with_a_gradient_scaler() -> None:
    for method in METHODS.values():
        plain = backbone("roberta", torch.float16)
        model, scaler = ss.attach(plain, method).train(), torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
        start = [parameter.detach().clone() for parameter in trained(model)]
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch(plain, torch.float16), labels=torch.tensor([0, 2])).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert any(not torch.equal(*pair) for pair in zip(trained(model), start, strict=True))


@pytest.mark.parametrize("name", ["bert", "roberta", "timm"])
def test_a_saved_task_is_float32_and_loads_bit_equal_on_the_same_precision(name: str, tmp_path: Path) -> None:
    plain = backbone(name, torch.bfloat16)
    inputs = batch(plain, torch.bfloat16)
    model = ss.attach(plain, READ)
    train(model, inputs, labels(name))
    with torch.no_grad():
        expected = logits(model.eval()(**inputs))
    model.save_pretrained(tmp_path)
    about = inspect_task(tmp_path)
    assert about["backbone"]["dtype"] == "bfloat16"
    assert {tensor["dtype"] for tensor in about["tensors"].values()} == {"F32"}
    loaded = ss.load(tmp_path, backbone(name, torch.bfloat16))
    with torch.no_grad():
        assert torch.equal(logits(loaded(**inputs)), expected)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("method", ["read", "lora"])
def test_a_task_names_the_precision_of_its_backbone_alone(method: str) -> None:
    model = ss.attach(backbone("bert", torch.bfloat16), METHODS[method])
    assert model.precisions == "bfloat16"
    assert ss.attach(backbone("bert", torch.float32), METHODS[method]).precisions == "float32"


def test_a_bank_switches_between_such_tasks(tmp_path: Path) -> None:
    plain = backbone("roberta", torch.bfloat16)
    inputs, before, expected = batch(plain, torch.bfloat16), halves(plain), {}
    for name, method in (("a", READ), ("b", READ), ("c", ss.BitFitConfig())):
        model = ss.attach(plain, method)
        train(model, inputs, labels("roberta"), steps=1 + len(expected))
        with torch.no_grad():
            expected[name] = logits(model.eval()(**inputs))
        model.save_pretrained(tmp_path / name)
        ss.detach(model)
    with ss.TaskBank(plain, tmp_path) as bank:
        for name in ("a", "b", "a", "c", "b", "a"):
            with torch.inference_mode():
                model = bank.activate(name)
            assert torch.equal(logits(bank.run(name, inputs)), expected[name])
        assert all(parameter.dtype == torch.float32 for parameter in trained(model))
        train(model, inputs, labels("roberta"))  # what rested under inference mode can be trained
        assert same(bank.deactivate(), before)


def test_a_copy_is_wide_by_itself() -> None:
    plain = backbone("roberta", torch.bfloat16)
    model, inputs = ss.attach(plain, READ).eval(), batch(plain, torch.bfloat16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            before = model(**inputs).logits
            for parameter in trained(twin):
                parameter.add_(1.0)
            assert torch.equal(model(**inputs).logits, before)
            assert not torch.equal(twin(**inputs).logits, before)


def test_a_head_of_a_model_that_is_cast_whole_stays_as_it_was_cast() -> None:
    for start, cast in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        plain = backbone("roberta", start)
        model = ss.attach(plain, READ).to(cast).eval()
        with torch.no_grad():
            assert model(**batch(plain, cast)).logits.dtype == cast
        assert {parameter.dtype for parameter in ss.detach(model).parameters()} == {cast}


def test_it_compiles() -> None:
    torch._dynamo.reset()
    plain = backbone("roberta", torch.bfloat16)
    model, inputs = ss.attach(plain, READ).eval(), batch(plain, torch.bfloat16)
    expected = model(**inputs).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=2e-2, atol=2e-2)


@pytest.fixture
def new_language_head(tmp_path: Path) -> t.BertForMaskedLM:
    """Its output matrix is tied to the embeddings, which are loaded; the rest of the head is new."""
    t.BertModel(t.BertConfig(**TEXT)).save_pretrained(tmp_path / "bert")
    return t.BertForMaskedLM.from_pretrained(tmp_path / "bert", dtype=torch.bfloat16).eval()


def test_a_bias_beside_a_frozen_weight_is_wide_too(new_language_head: Any) -> None:
    plain = new_language_head
    before, inputs = halves(plain), {"input_ids": torch.arange(3, 17).view(2, 7)}
    bare = plain(**inputs).logits
    model = ss.attach(plain, READ)
    assert all(parameter.dtype == torch.float32 for parameter in trained(model))
    assert plain.cls.predictions.decoder.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model.eval()(**inputs).logits, bare, rtol=2e-2, atol=2e-2)
    train(model, inputs, inputs["input_ids"])
    assert same(ss.detach(model), before)


class ScaledForSequenceClassification(t.BertForSequenceClassification):
    """A head with a weight that no module of its own uses."""

    def __init__(self, config: t.BertConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(()))


def test_what_cannot_be_widened_is_refused_and_the_backbone_is_as_it_was() -> None:
    plain = ScaledForSequenceClassification(BERT).bfloat16().train()
    before = halves(plain)
    with pytest.raises(UnsupportedBackbone, match=r"read does not work on Scaled.*: scale is trained.* leave bfloat16"):
        ss.attach(plain, READ)
    assert same(plain, before)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert ss.attach(plain, READ, train_head=False)


def test_a_refusal_after_widening_leaves_the_head_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("no fold")

    plain = backbone("roberta", torch.bfloat16)
    before = halves(plain)
    monkeypatch.setattr("sidestep.model.side_model.Fold", fails)
    with pytest.raises(ValueError, match="no fold"):
        ss.attach(plain, READ)
    assert same(plain, before)
    assert not any("forward" in module.__dict__ for module in plain.modules())


def test_weight_deltas_keep_the_precision_of_the_weights_that_they_move() -> None:
    for method in (ss.BitFitConfig(), ss.FullConfig()):
        plain = backbone("bert", torch.bfloat16)
        before = halves(plain)
        model = ss.attach(plain, method)
        own = {id(parameter) for parameter in plain.classifier.parameters()}
        assert {p.dtype for p in trained(model) if id(p) in own} == {torch.float32}
        assert {p.dtype for p in trained(model) if id(p) not in own} == {torch.bfloat16}
        train(model, batch(plain, torch.bfloat16), labels("bert"))
        assert same(ss.detach(model), before)


def test_a_float32_backbone_is_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ss.attach(backbone("roberta", torch.float32), READ)
    assert not any("forward" in module.__dict__ for module in model.backbone.modules())
