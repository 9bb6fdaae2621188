"""The rivals are PEFT's own: same modules, same outputs, same gradients, same bytes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn
from transformers import WavLMConfig, WavLMModel

import sidestep as ss
from sidestep.methods import MethodConfig
from tiny import FAMILIES, FURTHER, LABELS, SIZES, logits, randomize

# PEFT and older transformers know checkpointing by the older names.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")

CONFIGS: dict[str, MethodConfig] = {
    "lora": ss.LoraConfig(rank=4),
    "dora": ss.DoraConfig(rank=4),
    "ia3": ss.IA3Config(),
}
THEIRS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=16),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=16, use_dora=True),
    "ia3": lambda: peft.IA3Config(),
}


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's parameters, by their names within the backbone."""
    named = model.named_parameters()
    return {re.sub(r"^.*?(bert|vit)\.", "", n): p for n, p in named if "lora_" in n or "ia3_" in n}


@pytest.mark.parametrize("method", CONFIGS)
def test_it_is_pefts_own_model(method: str) -> None:
    kind = FAMILIES["bert"]
    ours = ss.attach(kind.model(), CONFIGS[method]).eval()
    theirs = peft.get_peft_model(kind.model(), THEIRS[method]()).eval()
    for parameter in theirs.get_base_model().classifier.parameters():
        parameter.requires_grad_(True)
    randomize(ours)
    own, other = adapters(ours), adapters(theirs)
    assert own.keys() == other.keys()
    with torch.no_grad():
        for name, parameter in other.items():
            parameter.copy_(own[name])
        theirs.get_base_model().classifier.load_state_dict(ours.backbone.classifier.state_dict())
    first, second = logits(ours(**kind.inputs())), logits(theirs(**kind.inputs()))
    assert torch.equal(first, second)
    first.square().sum().backward()
    second.square().sum().backward()
    assert all(torch.equal(own[name].grad, other[name].grad) for name in own)


def test_checkpointing_keeps_what_pefts_users_keep_at_best() -> None:
    """`checkpoint="late"` is for LoRA what `gradient_checkpointing_enable` is for a PEFT model.

    Except for what transformers makes it keep of the embeddings besides, which only reentrant checkpointing needs.
    """
    kind = FAMILIES["bert"]
    batch = kind.inputs(rows=8, tokens=32)
    ours = ss.attach(kind.model(), CONFIGS["lora"], checkpoint="late").train()
    theirs = peft.get_peft_model(kind.model(), THEIRS["lora"]()).train()
    theirs.get_base_model().classifier.requires_grad_(True)
    theirs.gradient_checkpointing_enable({"use_reentrant": False})
    kept = []
    for model in (ours, theirs):
        with ss.saved_bytes(model) as record:
            logits(model(**batch))
        kept.append(sum(size for name, size in record.by_module().items() if "embeddings" not in name))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("method", CONFIGS)
def test_a_backbone_that_peft_does_not_know(method: str) -> None:
    """PEFT's tables know no Vision Transformer; ours names its maps by their usual names."""
    model = ss.attach(FAMILIES["vit"].model(), CONFIGS[method], head=ss.Classify(num_labels=LABELS))
    maps = {name.split(".lora_")[0].split(".ia3_")[0] for name in adapters(model)}
    ends = {name.rpartition(".")[2] for name in maps}
    assert ends == ({"key", "value", "q_proj", "v_proj", "k_proj", "fc2", "dense"} & ends)
    assert len(maps) == len(model.late_blocks()) * (3 if method == "ia3" else 2)


def test_targets_are_the_users() -> None:
    model = ss.attach(FAMILIES["bert"].model(), ss.LoraConfig(rank=2, targets=("key",)))
    assert {name.split(".self.")[1].split(".")[0] for name in adapters(model)} == {"key"}


def test_targets_that_are_not_there_are_refused() -> None:
    backbone = FAMILIES["bert"].model()
    with pytest.raises(ss.UnsupportedBackbone, match="lora does not work on BertForSequenceClassification"):
        ss.attach(backbone, ss.LoraConfig(targets=("nothing",)))
    assert not adapters(backbone)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: ss.LoraConfig(rank=0), "rank=0, but it must be a whole number of at least 1"),
        (lambda: ss.LoraConfig(dropout=1.0), "dropout=1.0"),
        (lambda: ss.IA3Config(targets=("key",)), "given together with targets"),
    ],
)
def test_values_out_of_range(build: Callable[[], MethodConfig], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build()


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"sidestep\[compare\]"):
        ss.attach(FAMILIES["bert"].model(), ss.LoraConfig())


@pytest.mark.parametrize("method", CONFIGS)
def test_what_is_trained_is_in_float32_on_a_backbone_in_bfloat16(method: str) -> None:
    kind = FAMILIES["bert"]
    model = ss.attach(kind.model().bfloat16(), CONFIGS[method], head=ss.Classify(num_labels=LABELS)).train()
    assert {parameter.dtype for parameter in adapters(model).values()} == {torch.float32}
    model(**kind.inputs(), labels=kind.labels()).loss.backward()
    assert all(parameter.grad is not None for parameter in adapters(model).values())


def test_a_backbone_with_pefts_modules_in_it_is_refused() -> None:
    backbone = FAMILIES["bert"].model()
    ss.detach(ss.attach(backbone, CONFIGS["lora"]))
    ss.detach(ss.attach(backbone, CONFIGS["ia3"]))
    peft.inject_adapter_in_model(THEIRS["lora"](), backbone.bert)
    with pytest.raises(ss.UnsupportedBackbone, match="holds modules of PEFT already: merge them"):
        ss.attach(backbone, CONFIGS["lora"])


def wavlm() -> nn.Module:
    """Its attention reads the weights of its maps of query and value, and never calls them."""
    front = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 4}
    return WavLMModel(WavLMConfig(**SIZES, **front, num_conv_pos_embedding_groups=2, mask_time_prob=0.0)).eval()


def test_maps_that_no_pass_calls_are_left_out() -> None:
    model = ss.attach(wavlm(), ss.LoraConfig(rank=2), head=ss.Classify(num_labels=2))
    names = [name for name, _ in model.trained_parameters() if "lora_" in name]
    assert names
    assert not any("q_proj" in name for name in names)
    model.train()(input_values=torch.randn(2, 200), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for name, p in model.trained_parameters() if "lora_" in name)


def test_named_maps_that_no_pass_calls_are_refused() -> None:
    with pytest.raises(ss.UnsupportedBackbone, match="reads the weights of these linear maps and never calls them"):
        ss.attach(wavlm(), ss.LoraConfig(rank=2, targets=("q_proj",)), head=ss.Classify(num_labels=2))


def test_other_towers_of_a_model_stay_as_they_are() -> None:
    model = ss.attach(FURTHER["llava"].model(), ss.LoraConfig(rank=2), head=ss.Classify(num_labels=2))
    names = [name for name, _ in model.trained_parameters() if "lora_" in name]
    assert names
    assert all(".language_model." in name for name in names)


def test_late_lora_is_refused_where_blocks_share_their_weights() -> None:
    with pytest.raises(ss.UnsupportedBackbone, match="its blocks share their weights"):
        ss.attach(FURTHER["albert"].model(), ss.LateLoraConfig(rank=2, blocks=1))
