"""UniPT against its definition: float64 references, parameters at real size, padding, bytes, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

import sidestep as ss
from sidestep.methods import UnsupportedBackbone
from sidestep.methods.unipt import Interaction, UniPT, _gather
from tiny import FAMILIES, logits, randomize


def interaction(variant: Any, width: int = 12, hidden: int = 5, levels: int = 4, out: int = 12) -> Interaction:
    torch.manual_seed(0)
    net = Interaction(width, hidden, levels, out, variant).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return net


def side_parameters(model: ss.SideModel) -> int:
    return sum(p.numel() for p in model.side.parameters() if p.requires_grad)


# --- parameters ---------------------------------------------------------------------------------------------


def test_parameters_of_vse_on_bert_base() -> None:
    # 13 levels of width 768, compared at 512, read out at 1024; the release trains the confidence's bias as well.
    with torch.device("meta"):
        net = Interaction(768, 512, 13, 1024, "vse")
    assert sum(p.numel() for p in net.parameters()) + 1 == 5_921_281


def test_parameters_by_the_formula() -> None:
    d, h, levels = 16, 4, 4
    vse = levels * (d * h + 3 * h) + h * h + 4 * h + h * d + d
    expected = {
        "vse": vse,
        "vil": vse + 2 * d * h + d - h * h,
        "clip4clip": (levels + 1) * (d * h + h) + h + h * d + d,
    }
    for variant, parameters in expected.items():
        config = ss.UniPTConfig(reduction=4, variant=variant)
        model = ss.attach(FAMILIES["bert"].model(), config, head=ss.Classify(num_labels=3))
        assert side_parameters(model) == parameters, variant


# --- the definition, one row and one token at a time --------------------------------------------------------


def project(level: nn.Module, tokens: Tensor, variant: str) -> Tensor:
    if variant == "clip4clip":
        return F.linear(tokens.relu(), level.tap.weight, level.tap.bias)
    return F.layer_norm(F.linear(tokens, level.tap.weight, level.tap.bias), level.norm.normalized_shape, *norm(level))


def norm(level: nn.Module) -> tuple[Tensor, Tensor, float]:
    return level.norm.weight, level.norm.bias, 1e-5


def row_of(net: Interaction, levels: list[Tensor], length: int) -> Tensor:
    """The result for one row (tokens, width) of which `length` tokens are real, by the page's formulas."""
    projected = [project(level, tokens, net.variant) for level, tokens in zip(net.levels, levels, strict=True)]
    *targets, anchor = projected
    trust = torch.stack(
        [net.confidence.weight[0] @ (anchor[:length].mean(0) * target[:length].mean(0)) for target in targets]
    ).softmax(0)
    rows = []
    for token in range(len(anchor)):
        total = torch.zeros_like(anchor[token])
        for weight, target in zip(trust, targets, strict=True):
            scores = [(anchor[token] @ target[key]).clamp(min=0) for key in range(length)]
            share = sum(scores) + 1e-8
            total = total + weight * (sum(s / share * target[key] for key, s in enumerate(scores)) + target[token])
        mixed = anchor[token] + net.mix(total)
        rows.append(net.up(mixed.relu() if net.variant == "vse" else mixed))
    return torch.stack(rows)


@pytest.mark.parametrize("variant", ["vse", "vil"])
def test_tokens_equal_a_reference_that_goes_token_by_token(variant: Any) -> None:
    net = interaction(variant)
    hidden = [torch.randn(3, 6, 12).double() for _ in range(4)]
    lengths = torch.tensor([6, 4, 1])
    keep = torch.arange(6) < lengths[:, None]
    found = net.tokens([net.read(number, tokens) for number, tokens in enumerate(hidden)], keep)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[row], row_of(net, [tokens[row] for tokens in hidden], length))


def test_tokens_that_agree_with_none_find_nothing_in_half_precision() -> None:
    anchor = torch.ones(1, 3, 4, dtype=torch.float16)
    found = _gather(anchor, -anchor, torch.ones(1, dtype=torch.float16), None)
    assert torch.equal(found, -anchor)


def test_a_vector_gathers_from_the_last_level_too() -> None:
    net = interaction("clip4clip", out=7)
    hidden = [torch.randn(2, 5, 12).double() for _ in range(4)]
    vector, position = torch.randn(2, 7).double(), torch.tensor([3, 0])
    keep = torch.arange(5) < torch.tensor([4, 5])[:, None]
    found = net.vector([net.read(n, tokens) for n, tokens in enumerate(hidden)], vector, position, keep)
    for row, length in enumerate((4, 5)):
        anchor = project(net.anchor, vector[row], "clip4clip")
        targets = [project(level, tokens[row], "clip4clip") for level, tokens in zip(net.levels, hidden, strict=True)]
        trust = torch.stack([net.confidence.weight[0] @ (anchor * t[:length].mean(0)) for t in targets]).softmax(0)
        total = torch.zeros(5).double()
        for weight, target in zip(trust, targets, strict=True):
            scores = (target[:length] @ anchor).clamp(min=0)
            found_in = scores / scores.sum().clamp(min=1e-6) @ target[:length]
            total = total + weight * (found_in + target[position[row]])
        torch.testing.assert_close(found[row], vector[row] + net.up(total.relu()))


# --- on a backbone ------------------------------------------------------------------------------------------


def block_outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The embeddings and every block's output."""
    found: list[Tensor] = []
    first, *_ = blocks = list(model.bert.encoder.layer)
    handles = [first.register_forward_pre_hook(lambda module, args: found.append(args[0]))]
    handles += [block.register_forward_hook(lambda module, args, output: found.append(output)) for block in blocks]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return [output[0] if isinstance(output, tuple) else output for output in found]


def test_the_result_takes_the_last_hidden_states_place() -> None:
    kind = FAMILIES["bert"]
    backbone, batch = kind.model(), kind.inputs()
    levels = block_outputs(backbone, batch)
    model = ss.attach(backbone, ss.UniPTConfig()).eval()
    randomize(model)
    net = model.side.interaction
    projected = [net.read(number, tokens) for number, tokens in enumerate(levels)]
    last = net.tokens(projected, batch["attention_mask"].bool())
    expected = backbone.classifier(backbone.bert.pooler(last))
    torch.testing.assert_close(logits(model(**batch)), expected)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_vector_is_what_the_head_reads_corrected(family: str) -> None:
    kind = FAMILIES[family]
    backbone, batch = kind.model(), kind.inputs()
    with torch.no_grad():
        plain = backbone.base_model(**batch).last_hidden_state[:, 0]
    head = ss.Classify(num_labels=3, pool="cls")
    model = ss.attach(backbone, ss.UniPTConfig(variant="clip4clip"), head=head).eval()
    torch.nn.init.zeros_(model.side.interaction.up.weight)
    torch.nn.init.zeros_(model.side.interaction.up.bias)
    # with nothing to add, the head reads the backbone's own first token
    torch.testing.assert_close(logits(model(**batch)), model.head.linear(plain))
    randomize(model)
    assert not torch.allclose(logits(model(**batch)), model.head.linear(plain), atol=1e-3)


def test_it_corrects_the_embeddings_of_both_towers_of_clip() -> None:
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig())
    model = ss.attach(clip, ss.UniPTConfig(hidden=512, variant="clip4clip"), head=ss.Retrieve())
    for tower, width in ((model.image, 768), (model.text, 512)):
        assert side_parameters(tower) == 13 * (width * 512 + 512) + 2 * (512 * 512 + 512) + 512
        assert tower.late_blocks() == []


def test_what_stands_in_the_padding_does_not_matter() -> None:
    net = interaction("vse")
    hidden = [torch.randn(1, 6, 12).double() for _ in range(4)]
    other = [torch.cat([tokens[:, :4], torch.randn(1, 2, 12).double()], 1) for tokens in hidden]
    keep = torch.tensor([[True] * 4 + [False] * 2])
    one, two = (net.tokens([net.read(n, t) for n, t in enumerate(levels)], keep) for levels in (hidden, other))
    torch.testing.assert_close(one[:, :4], two[:, :4])
    assert not torch.allclose(one[:, 4:], two[:, 4:])


@pytest.mark.parametrize("variant", ["vse", "vil", "clip4clip"])
def test_bytes_grow_with_the_levels_not_with_the_square_of_the_tokens(variant: Any) -> None:
    d, h, blocks = 32, 8, 3
    config = BertConfig(
        vocab_size=40, hidden_size=d, num_hidden_layers=blocks, num_attention_heads=2, intermediate_size=64
    )
    method = ss.UniPTConfig(reduction=d // h, variant=variant)
    model = ss.attach(BertModel(config, add_pooling_layer=False), method, head=ss.Classify(num_labels=2)).train()
    found = []
    for tokens in (32, 128):
        with ss.saved_bytes(model) as kept:
            model(input_ids=torch.randint(0, 40, (1, tokens)), labels=torch.zeros(1, dtype=torch.long))
        found.append(kept.total)
    per_token = (blocks + 1) * (d + h) + (h if variant != "clip4clip" else 0)
    # the head's pooling keeps one number per token
    assert found[1] - found[0] <= 4 * 96 * (per_token + 1)


# --- config and refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("reduction", 0, "reduction=0, but it must be a whole number of at least 1"),
        ("reduction", 2.5, "reduction=2.5, but it must be a whole number"),
        ("variant", "bert", "variant='bert', but it must be \"vse\""),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ss.UniPTConfig(**{field: value})


@pytest.mark.parametrize(
    ("family", "says"),
    [("llama", "is causal"), ("t5", "is an encoder-decoder"), ("swin", "is hierarchical")],
)
def test_other_stacks_are_refused_with_the_reason(family: str, says: str) -> None:
    with pytest.raises(UnsupportedBackbone, match=f"one bidirectional stack of one stage, and this backbone {says}"):
        ss.attach(FAMILIES[family].model(), ss.UniPTConfig())


def test_a_reduction_that_does_not_divide_the_width_is_refused() -> None:
    with pytest.raises(UnsupportedBackbone, match="reduction=3 does not divide the backbone's width, 16"):
        ss.attach(FAMILIES["bert"].model(), ss.UniPTConfig(reduction=3))


def test_it_reads_before_it_writes() -> None:
    model = ss.attach(FAMILIES["vit"].model(), ss.UniPTConfig())
    sites = [place.site for place in model.places]
    assert UniPT.first_write(model.side.config, sites).kind == "norm"
    assert model.late_blocks() == []
