"""SHERL against its definition: a plain autograd reference, published counts, bytes, precision, refusals."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration
from transformers.initialization import no_init_weights

import sidestep as ss
from architectures import ARCHITECTURES
from sidestep.methods import UnsupportedBackbone
from sidestep.methods.sherl import parts as sherl
from sidestep.methods.sherl.parts import Aggregation, Merge, PooledAggregation
from tiny import FAMILIES, call, logits, randomize

# --- the definition, unrolled by hand ---------------------------------------------------------------------------------


def merged(codes: list[Tensor], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Steps 3 to 5 of the method's page for one token after the other, without the guide."""
    out = torch.zeros_like(codes[0])
    for row, token in ((row, token) for row in range(out.shape[0]) for token in range(out.shape[1])):
        guide, levels = codes[-1][row, token], [code[row, token] for code in codes[:-1]]
        unit = [z / (z.square().sum().sqrt() + eps) for z in levels]
        scores = []
        for i, z in enumerate(levels):
            redundancy = sum(torch.relu(unit[i] @ other) for other in unit)
            scores.append(torch.relu(weight[0] @ (z * guide) + bias[0]) / redundancy)
        total = sum(score.abs() for score in scores) + eps
        for score, z in zip(scores, levels, strict=True):
            out[row, token] = out[row, token] + score / total * z
    return out


def projected(level: Any, feature: Tensor) -> Tensor:
    def linear(x: Tensor, module: Any) -> Tensor:
        return x @ module.weight.T + module.bias

    if isinstance(level, sherl.Gated):
        u = torch.relu(linear(feature, level.tap))
        return (linear(u, level.value) + u) * torch.sigmoid(linear(u, level.gate))
    if isinstance(level, sherl.LinearNorm):
        return nn.functional.layer_norm(
            linear(feature, level.tap), level.norm.normalized_shape, *level.norm.parameters()
        )
    return linear(torch.relu(feature), level.tap)


def aggregated(block: Aggregation, features: list[Tensor], replaced: Tensor | None = None) -> Tensor:
    codes = [projected(level, feature) for level, feature in zip(block.levels, features, strict=True)]
    mixed = merged(codes, block.merge.score.weight, block.merge.score.bias, block.merge.eps)
    out = torch.relu(block.merge.mlp(mixed) + codes[-1]) @ block.out.weight.T + block.out.bias
    if block.norm_out is not None:
        out = block.norm_out(out)
    return out + torch.tanh(block.gate / 0.1) * (features[-1] if replaced is None else replaced)


def rms(hidden: Tensor, weight: Tensor) -> Tensor:
    return weight * hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()


Edit = Callable[[dict[str, Any]], None]


@contextmanager
def edited(module: nn.Module, before: Edit) -> Iterator[None]:
    """`before` may change the arguments of each call of a module, by name."""
    signature = inspect.signature(type(module).forward)

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        bound = signature.bind(module, *args, **kwargs)
        before(bound.arguments)
        return bound.args[1:], bound.kwargs

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def hidden_states(backbone: nn.Module, blocks: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """What goes into the first block, and what comes out of each."""
    found: list[Tensor] = []
    handles = [blocks[0].register_forward_pre_hook(lambda m, args: found.append(args[0]))]
    for block in blocks:
        handles.append(block.register_forward_hook(lambda m, a, o: found.append(o[0] if isinstance(o, tuple) else o)))
    with torch.no_grad():
        call(backbone, batch)
    for handle in handles:
        handle.remove()
    return found


def blocks_of(family: str, backbone: Any, stack: str = "decoder") -> Any:
    trunk = getattr(backbone, "base_model", backbone)
    return {
        "bert": lambda: trunk.encoder.layer,
        "vit": lambda: trunk.layers,
        "timm_vit": lambda: trunk.blocks,
        "llama": lambda: trunk.layers,
        "t5": lambda: trunk.get_submodule(stack).block,
    }[family]()


def reference(model: ss.SideModel, family: str, batch: dict[str, Tensor]) -> Tensor:
    """Logits of a detached model by the formulas of the method's page, in plain autograd."""
    side, backbone = model.side, model.backbone
    main = "decoder" if family in ("llama", "t5") else "encoder"
    blocks = blocks_of(family, backbone)
    states = hidden_states(backbone, blocks, batch)
    # a feature's number in `states` is one above its block's, as the embeddings come first
    x = aggregated(side.stacks[main], [states[0], *(states[block + 1] for block in side.blocks[main])], states[-2])
    memory = None
    if family == "t5":
        source = hidden_states(backbone, blocks_of(family, backbone, "encoder"), batch)
        features = [source[0], *(source[block + 1] for block in side.blocks["encoder"])]
        memory = rms(aggregated(side.stacks["encoder"], features), side.norms["encoder"].weight)

    def into_last(arguments: dict[str, Any]) -> None:
        name = next(iter(arguments.keys() - {"self"})) if len(arguments) == 2 else list(arguments)[1]
        arguments[name] = x
        if memory is not None:
            arguments["encoder_hidden_states"] = memory

    if main == "encoder":
        with edited(blocks[-1], into_last):
            return logits(call(backbone, batch))
    trunk = backbone.decoder if family == "t5" else backbone.model
    norm = trunk.final_layer_norm if family == "t5" else trunk.norm
    own = norm.register_forward_hook(lambda m, args, out: rms(args[0], side.norms[main].weight))
    with edited(blocks[-1], into_last):
        out = logits(call(backbone, batch))
    own.remove()
    return out


CASES = {
    "bert": ("bert", {}),
    "bert, some layers": ("bert", {"layers": (1,), "hidden": 5}),
    "bert, another guide": ("bert", {"layers": (0,)}),
    "bert, gated": ("bert", {"projection": "gated", "norm_out": True}),
    "vit": ("vit", {"reduction": 2}),
    "timm_vit, relu": ("timm_vit", {"projection": "relu_linear", "eps": 1e-3}),
    "timm_vit, mlp": ("timm_vit", {"merge_mlp": True, "norm_out_eps": 1e-5}),
    "llama": ("llama", {}),
    "llama, normed": ("llama", {"projection": "linear_norm"}),
    "t5": ("t5", {"layers": (1, 2)}),
    "t5, another guide": ("t5", {"layers": (0, 2)}),
    "llama, another guide": ("llama", {"layers": (0,)}),
    "t5, all": ("t5", {"reduction": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_a_plain_reference(case: str) -> None:
    family, settings = CASES[case]
    kind = FAMILIES[family]
    batch = {name: v.double() if v.is_floating_point() else v for name, v in kind.inputs(rows=2, tokens=5).items()}
    model = ss.attach(kind.model().double(), ss.SherlConfig(**{"reduction": 4, **settings}), train_head=False)
    model = model.double().eval()
    randomize(model, scale=0.5)
    names, parameters = zip(*model.trained_parameters(), strict=True)
    out = logits(model(**batch))
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad((out * cotangent).sum(), parameters)
    expected = reference(model, family, batch)
    # T5's and Llama's norms compute in float32
    close = {"rtol": 1e-4, "atol": 1e-5} if family in ("t5", "llama") else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(out, expected, **close)
    for name, mine, theirs in zip(
        names, found, torch.autograd.grad((expected * cotangent).sum(), parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, msg=name, **close)


# --- one vector, corrected by pooled tokens (CLIP4Clip) ---------------------------------------------------------------


def corrected(block: PooledAggregation, levels: list[Tensor], vector: Tensor, length: int, own: int) -> Tensor:
    """Section 1.4 of the method's page for one row: levels (tokens, width) of which `length` tokens are real."""
    guide = vector.relu() @ block.guide.tap.weight.T + block.guide.tap.bias
    pooled = []
    for number, tokens in enumerate(levels):
        z = projected(block.levels[number], tokens)
        scorer = block.spatial[number]
        scores = [(scorer.weight[0] @ (guide * z[n]) + scorer.bias[0]).clamp(min=0) for n in range(length)]
        gate = 1 if block.level_gates is None else torch.sigmoid(block.level_gates[number] / 0.1)
        pooled.append(sum(s / (sum(scores) + 1e-6) * z[n] for n, s in enumerate(scores)) + gate * z[own])
    codes = [x[None, None] for x in (*pooled, guide)]
    mixed = merged(codes, block.merge.score.weight, block.merge.score.bias, 1e-6)[0, 0]
    return vector + torch.relu(mixed + guide) @ block.out.weight.T + block.out.bias


def small_clip() -> CLIPModel:
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"hidden_size": 16, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 39, **sizes}
    image = {"hidden_size": 24, "image_size": 16, "patch_size": 8, **sizes}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=8)).eval()


@pytest.mark.parametrize("gated", [False, True], ids=["msvd", "msrvtt"])
def test_clips_embeddings_are_corrected_by_the_levels_of_their_tower(gated: bool) -> None:
    torch.manual_seed(0)
    clip = small_clip().double()
    ids = torch.randint(3, 38, (2, 6))
    ids[0, 5], ids[1, 3:] = 39, torch.tensor([39, 0, 0])
    texts = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    images = {"pixel_values": torch.randn(2, 3, 16, 16).double()}
    blocks = (clip.vision_model.encoder.layers, clip.text_model.encoder.layers)
    levels = [hidden_states(clip, own, {**texts, **images}) for own in blocks]
    with torch.no_grad():
        plain = [clip.get_image_features(**images).pooler_output, clip.get_text_features(**texts).pooler_output]
    config = ss.SherlConfig(hidden=6, pool_tokens=True, level_gates=gated)
    model = ss.attach(clip, config, head=ss.Retrieve()).double().eval()
    for tower in (model.image, model.text):
        randomize(tower.side, scale=0.5)
        with torch.no_grad():
            for parameter in tower.side.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    found = model(**texts, **images)
    for embeds, tower, states, vectors, ends in (
        (found.image_embeds, model.image, levels[0], plain[0], [(5, 0), (5, 0)]),
        (found.text_embeds, model.text, levels[1], plain[1], [(6, 5), (4, 3)]),
    ):
        (block,) = tower.side.stacks.values()
        rows = zip(vectors, ends, strict=True)
        by_hand = [
            corrected(block, [level[row] for level in states], vector, *end) for row, (vector, end) in enumerate(rows)
        ]
        torch.testing.assert_close(embeds, nn.functional.normalize(torch.stack(by_hand), dim=-1))


def test_parameters_of_clip4clip_on_clip() -> None:
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig())  # the defaults are ViT-B/32's sizes
    for gated, both in ((True, 9_598_006), (False, 9_597_980)):
        config = ss.SherlConfig(hidden=512, pool_tokens=True, level_gates=gated)
        model = ss.attach(clip, config, head=ss.Retrieve())
        image, text = (sum(p.numel() for p in tower.side.parameters()) for tower in (model.image, model.text))
        assert (image, text) == (5_650_971 - 13 * (not gated), 3_947_035 - 13 * (not gated))
        assert image + text == both
        assert [tower.late_blocks() for tower in (model.image, model.text)] == [[], []]
        ss.detach(model)


@pytest.mark.parametrize("settings", [{"norm_out": True}, {"merge_mlp": True}, {"projection": "conv_norm"}])
def test_what_does_not_go_with_pooled_tokens_is_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match="pool_tokens=True, but it must be False with norm_out, merge_mlp and conv_no"):
        ss.SherlConfig(pool_tokens=True, **settings)


def test_pooled_tokens_take_one_stack_and_a_head() -> None:
    with pytest.raises(ValueError, match="level_gates=True, but it must be False without pool_tokens"):
        ss.SherlConfig(level_gates=True)
    for family, says in (("t5", "is an encoder-decoder"), ("swin", "is hierarchical"), ("resnet", "is convolutional")):
        with pytest.raises(UnsupportedBackbone, match=f"one stack of one stage, and this backbone {says}"):
            ss.attach(FAMILIES[family].model(), ss.SherlConfig(pool_tokens=True))
    with pytest.raises(ValueError, match="a read-out of its own, which the own head of BertFor"):
        ss.attach(FAMILIES["bert"].model(), ss.SherlConfig(pool_tokens=True))


# --- on backbones -----------------------------------------------------------------------------------------------------


def test_recomputing_gives_the_gradients_of_keeping_under_dropout_too() -> None:
    kind = FAMILIES["t5"]
    model = ss.attach(kind.model(), ss.SherlConfig(reduction=4, dropout=0.5, norm_out=True)).train()
    randomize(model)

    def gradients() -> list[Tensor]:
        torch.manual_seed(5)
        loss = logits(model(**kind.inputs())).square().sum()
        return list(torch.autograd.grad(loss, [p for _, p in model.trained_parameters()]))

    found = gradients()
    with mock.patch.object(sherl, "recompute", lambda function, *args, random=False: function(*args)):
        kept = gradients()
    for mine, theirs in zip(found, kept, strict=True):
        assert torch.equal(mine, theirs)
    torch.manual_seed(6)
    assert not torch.equal(logits(model(**kind.inputs())), logits(model(**kind.inputs())))
    assert torch.equal(logits(model.eval()(**kind.inputs())), logits(model(**kind.inputs())))


def test_the_encoders_merged_features_reach_the_last_decoder_block_alone() -> None:
    kind = FAMILIES["t5"]
    model = ss.attach(kind.model(), ss.SherlConfig(reduction=4)).eval()
    read: list[Tensor] = []
    with torch.no_grad():
        own = model.backbone.encoder(**{k: v for k, v in kind.inputs().items() if not k.startswith("decoder")})[0]
        for block in model.backbone.decoder.block:
            cross = block.layer[1].EncDecAttention
            cross.k.register_forward_hook(lambda m, args, out: read.append(args[0]))
        model(**kind.inputs())
    assert len(read) == 3
    assert torch.equal(read[0], own)
    assert torch.equal(read[1], own)
    assert not torch.allclose(read[2], own)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "swin" not in name])
def test_every_plain_architecture_trains_through_its_last_block_alone(name: str) -> None:
    kind = ARCHITECTURES[name]
    model = ss.attach(kind.model(), ss.SherlConfig(reduction=4), head=ss.Classify(num_labels=2)).train()
    randomize(model)
    with ss.saved_bytes(model) as kept:
        loss = model(**kind.inputs(), labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.side.parameters())
    modules = {module: path for path, module in model.named_modules()}
    *early, last = [modules[place.module] for place in model.places if place.site.kind == "block"]
    within = {path for path in (*early, last) for row in kept.rows if row.module.startswith(f"{path}.")}
    assert within == {last}


# --- what is read, and where it starts --------------------------------------------------------------------------------


def test_layers_by_default_and_as_given() -> None:
    def blocks(family: str, **settings: Any) -> dict[str, tuple[int, ...]]:
        return ss.attach(FAMILIES[family].model(), ss.SherlConfig(reduction=4, **settings)).side.blocks

    assert blocks("bert") == {"encoder": (0, 1)}
    assert blocks("llama") == {"decoder": (0, 1)}
    assert blocks("t5") == {"encoder": (0, 1, 2), "decoder": (0, 1)}
    assert blocks("t5", layers=(1, 2)) == {"encoder": (1, 2), "decoder": (1,)}
    assert blocks("bert", layers=(1, 2)) == {"encoder": (1,)}
    # the guide is the last that is listed
    assert blocks("bert", layers=(0, 2)) == {"encoder": (0,)}
    assert blocks("t5", layers=(0, 2)) == {"encoder": (0, 2), "decoder": (0,)}


@pytest.mark.parametrize(
    ("depth", "last"), [(12, (1, 2, 3, 5, 6, 7, 9, 10, 11)), (24, (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 22, 23))]
)
def test_an_encoder_decoder_of_a_published_depth_reads_the_published_layers(depth: int, last: tuple[int, ...]) -> None:
    with torch.device("meta"):
        config = T5Config(vocab_size=9, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=depth)
        model = ss.attach(T5ForConditionalGeneration(config), ss.SherlConfig())
    assert model.side.blocks == {"encoder": last, "decoder": last[:-1]}


def test_the_kind_of_backbone_chooses_what_is_left_open() -> None:
    def settings(family: str, **given: Any) -> tuple[Any, ...]:
        side = ss.attach(FAMILIES[family].model(), ss.SherlConfig(reduction=4, **given)).side
        found = side.config
        return found.projection, found.norm_out, found.eps, sorted(side.norms)

    assert settings("bert") == ("linear_norm", True, 1e-8, [])
    assert settings("vit") == ("linear_norm", True, 1e-8, [])
    assert settings("llama") == ("gated", False, 1e-6, ["decoder"])
    assert settings("t5") == ("gated", False, 1e-6, ["decoder", "encoder"])
    assert settings("bert", projection="gated") == ("gated", False, 1e-6, [])
    assert settings("bert", norm_out=False, eps=1e-6) == ("linear_norm", False, 1e-6, [])


def test_the_gated_variant_starts_small_and_without_the_last_feature() -> None:
    torch.manual_seed(0)
    block = Aggregation(256, 3, ss.SherlConfig(hidden=64, projection="gated").filled([]))
    maps = [module for module in block.modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]
    assert len(maps) == 3 * 3 + 2
    assert all(abs(module.weight.std().item() / 0.01 - 1) < 0.3 and not module.bias.any() for module in maps)
    features = [torch.randn(2, 3, 256) for _ in range(3)]
    codes = [level(feature) for level, feature in zip(block.levels, features, strict=True)]
    assert torch.equal(block(features[-1], *codes), block(torch.zeros(2, 3, 256), *codes))
    with torch.no_grad():
        block.gate.fill_(0.05)
    difference = block(features[-1], *codes) - block(torch.zeros(2, 3, 256), *codes)
    torch.testing.assert_close(difference, 0.4621172 * features[-1])  # tanh(0.5)


@pytest.mark.parametrize(
    ("settings", "bound"), [({}, 256**-0.5), ({"merge_mlp": True}, (6 / (256 + 64)) ** 0.5)], ids=["torch", "xavier"]
)
def test_other_variants_start_as_their_releases_do(settings: Any, bound: float) -> None:
    torch.manual_seed(0)
    block = Aggregation(256, 2, ss.SherlConfig(hidden=64, projection="linear_norm", **settings).filled([]))
    largest = block.levels[0].tap.weight.abs().max().item()
    assert 0.98 * bound < largest <= bound
    assert 0 < block.levels[0].tap.bias.abs().max() <= 256**-0.5
    block = Aggregation(256, 2, ss.SherlConfig(hidden=64, projection="gated", init_std=0.02).filled([]))
    assert abs(block.out.weight.std().item() / 0.02 - 1) < 0.1


# --- degenerate inputs and precision ----------------------------------------------------------------------------------


def merge_of(*codes: Tensor) -> tuple[Merge, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    merge = Merge(codes[0].shape[-1], 1e-6)
    leaves = [code.clone().requires_grad_() for code in codes]
    return merge, merge(*leaves), leaves


def test_levels_of_zeros_get_no_weight_and_finite_gradients() -> None:
    guide, level, zeros = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.zeros(2, 3, 8)
    merge, out, leaves = merge_of(guide, zeros, level)
    with torch.no_grad():
        merge.score.bias.fill_(1.0)
    out = merge(*leaves)
    out.square().sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)
    torch.testing.assert_close(out, merge(guide, level))
    _, out, leaves = merge_of(zeros, zeros, zeros)
    out.sum().backward()
    assert torch.equal(out, zeros)
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_where_no_level_fits_the_guide_remains() -> None:
    guide, levels = torch.rand(2, 3, 8), [torch.rand(2, 3, 8) for _ in range(3)]
    merge, _, _ = merge_of(guide, *levels)
    with torch.no_grad():
        merge.score.weight.fill_(-1.0)
        merge.score.bias.zero_()
    assert torch.equal(merge(guide, *levels), guide)


def test_repeated_levels_share_the_weight_of_one() -> None:
    guide, one, other = (torch.rand(2, 3, 8) for _ in range(3))
    merge, _, _ = merge_of(guide, one, other)
    with torch.no_grad():
        merge.score.weight.fill_(1.0)
    orthogonal = torch.zeros(1, 1, 8).repeat(2, 3, 1), torch.zeros(1, 1, 8).repeat(2, 3, 1)
    orthogonal[0][..., :4], orthogonal[1][..., 4:] = one[..., :4], other[..., 4:]
    twice = merge(guide, orthogonal[0], orthogonal[0], orthogonal[1])
    torch.testing.assert_close(twice, merge(guide, *orthogonal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_computed_in_float32_under_reduced_precision(dtype: torch.dtype) -> None:
    codes = [1e-3 * torch.randn(2, 3, 8).to(dtype) for _ in range(4)]
    merge, _, _ = merge_of(*codes)
    expected = merge(*(code.float() for code in codes))
    with torch.autocast("cpu", dtype):
        found = merge(*codes)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# --- published sizes --------------------------------------------------------------------------------------------------


def t5(size: str) -> T5ForConditionalGeneration:
    sizes = {
        "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
        "large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
        "3b": {"d_model": 1024, "d_ff": 16384, "num_layers": 24, "num_heads": 32, "d_kv": 128},
    }
    return T5ForConditionalGeneration(T5Config(vocab_size=32128, decoder_start_token_id=0, **sizes[size]))


@pytest.mark.parametrize(
    ("size", "config", "parameters"),
    [
        ("base", ss.SherlConfig(reduction=2), 11_822_212),
        ("base", ss.SherlConfig(reduction=4), 4_511_812),
        ("base", ss.SherlConfig(reduction=8), 1_907_236),
        ("base", ss.SherlConfig(reduction=16), 867_604),
        ("large", ss.SherlConfig(reduction=8), 4_700_548),
        ("3b", ss.SherlConfig(reduction=8, layers=(22, 23)), 1_087_620),
    ],
)
def test_parameters_on_t5(size: str, config: ss.SherlConfig, parameters: int) -> None:
    with torch.device("meta"):
        model = ss.attach(t5(size), config)
    assert sum(parameter.numel() for _, parameter in model.trained_parameters()) == parameters


def test_parameters_of_the_other_releases() -> None:
    with torch.device("meta"):
        bert = ss.attach(BertModel(BertConfig(), add_pooling_layer=False), ss.SherlConfig(hidden=512)).side
        vil = ss.SherlConfig(reduction=2, projection="gated")
        mdetr = ss.SherlConfig(reduction=2, projection="linear_norm", merge_mlp=True)
        blocks = (bert, Aggregation(768, 12, vil.filled([])), Aggregation(256, 4, mdetr.filled([])))
    counts = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    assert counts == [5_133_058, 7_387_778, 232_450]


@contextmanager
def fakes() -> Iterator[None]:
    """New tensors have a shape and take no memory; fake parameters cannot be moved and need not be."""
    stay = mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module)
    with FakeTensorMode(), no_init_weights(), stay:
        yield


@pytest.mark.parametrize(("reduction", "official", "bound"), [(8, 9.46, 8.5), (4, 12.31, 11.0)])
def test_bytes_kept_on_t5_base(reduction: int, official: float, bound: float) -> None:
    rows, length, targets = 4, 128, 4
    with fakes():
        backbone = t5("base").eval()
        backbone.tie_weights()
        model = ss.attach(backbone, ss.SherlConfig(reduction=reduction, dropout=0.0)).train()
        ids = torch.randint(2, 30_000, (rows, length))
        with ss.saved_bytes(model) as kept:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.randint(2, 30_000, (rows, targets)))
    per_example = kept.total / rows / 2**20
    assert per_example <= bound < official
    inputs = (10 * length + 9 * targets) * 768 * 4 / 2**20
    # beside the levels' inputs: keys and values of the last cross-attention, log-probabilities, the levels' codes
    codes = (10 * length + 9 * targets) * (768 // reduction) * 4 / 2**20
    rest = 2 * length * 768 * 4 / 2**20 + targets * 32128 * 4 / 2**20
    assert per_example <= 1.1 * (inputs + codes + rest)


# --- convolutional networks -------------------------------------------------------------------------------------------


@pytest.fixture
def resnet() -> ss.SideModel:
    """The tiny timm ResNet (stages of 1, 1, 1 and 2 blocks) with random weights and running statistics."""
    return on_resnet()


def on_resnet(**settings: Any) -> ss.SideModel:
    config = ss.SherlConfig(hidden=6, **settings)
    model = ss.attach(FAMILIES["timm_resnet"].model(), config, head=ss.Classify(num_labels=3))
    randomize(model)
    return model


def by_hand(model: ss.SideModel, pixels: Tensor) -> Tensor:
    """(batch, classes): the release's form, of PyTorch's own convolutions and batch norms, on the bare backbone."""
    trunk, block = model.trunk, model.side.stacks["encoder"]
    x = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(pixels))))
    features = []
    for layer in (trunk.layer1, trunk.layer2, trunk.layer3):
        features.append(x := layer(x))
    features.append(last := trunk.layer4[0](x))

    def conv_norm(layer: Any, x: Tensor) -> Tensor:
        norm = nn.BatchNorm2d(len(layer.norm.weight)).to(x.dtype).train(model.training)
        norm.load_state_dict(layer.norm.state_dict())
        x = nn.functional.conv2d(x, layer.tap.weight[..., None, None], layer.tap.bias)
        # the module's own parameters, for their gradients
        return torch.func.functional_call(norm, {"weight": layer.norm.weight, "bias": layer.norm.bias}, x)

    codes = []
    for level, feature in zip(block.levels, features, strict=True):
        kernel = feature.shape[-1] // last.shape[-1]
        pooled = nn.functional.max_pool2d(feature, kernel) + nn.functional.avg_pool2d(feature, kernel)
        codes.append(conv_norm(level, pooled).flatten(2).mT)
    mixed = merged(codes, block.merge.score.weight, block.merge.score.bias, block.merge.eps) + codes[-1]
    y = conv_norm(block.out, mixed.mT.unflatten(-1, last.shape[-2:])).relu() + torch.tanh(block.gate / 0.1) * last
    assert model.head is not None
    return model.head.linear(trunk.layer4[1](y).mean((2, 3)))


@pytest.mark.parametrize("training", [False, True], ids=["running", "batch"])
def test_a_resnets_outputs_and_gradients_equal_a_plain_reference(resnet: ss.SideModel, training: bool) -> None:
    model, batch = resnet.double(), {"pixel_values": FAMILIES["timm_resnet"].inputs()["pixel_values"].double()}
    model.side.train(training)
    model.training = training
    expected = by_hand(model, batch["pixel_values"])
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), [p for _, p in model.trained_parameters()])
    found = logits(model(**batch))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad((found * weights).sum(), [p for _, p in model.trained_parameters()])
    for (name, _), gradient, value in zip(model.trained_parameters(), gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-7, atol=1e-9, msg=name)


def test_running_statistics_move_as_batch_norms_do_and_are_in_the_task(resnet: ss.SideModel, tmp_path: Path) -> None:
    kind, side = FAMILIES["timm_resnet"], resnet.side
    layers = [*side.stacks["encoder"].levels, side.stacks["encoder"].out]
    twins = [nn.BatchNorm1d(len(layer.norm.weight)) for layer in layers]
    codes: dict[int, Tensor] = {}
    for number, layer in enumerate(layers):
        layer.tap.register_forward_hook(lambda module, args, out, number=number: codes.update({number: out.detach()}))
    for seed in range(2):
        loss = resnet.train()(**kind.inputs(seed=seed), labels=kind.labels()).loss
        for number, twin in enumerate(twins):
            twin(codes[number].flatten(0, 1))
        loss.backward()  # all of it is computed again
    for layer, twin in zip(layers, twins, strict=True):
        for name, value in twin.named_buffers():
            torch.testing.assert_close(layer.norm.get_buffer(name), value, rtol=1e-5, atol=1e-6, msg=name)
        assert layer.norm.num_batches_tracked == 2
    resnet.eval().save_pretrained(tmp_path / "task")
    again = ss.load(tmp_path / "task", kind.model())
    for name, value in side.named_buffers():
        assert torch.equal(again.side.get_buffer(name), value), name
    expected = logits(resnet(**kind.inputs()))
    assert torch.equal(logits(again(**kind.inputs())), expected)
    assert torch.equal(logits(resnet(**kind.inputs())), expected)  # and inference moves nothing


def test_a_compiled_training_step_moves_the_running_statistics_too() -> None:
    torch._dynamo.reset()
    kind, models = FAMILIES["timm_resnet"], [on_resnet().train(), on_resnet().train()]
    models[0](**kind.inputs(), labels=kind.labels()).loss.backward()
    compiled = torch.compile(models[1], backend="aot_eager", fullgraph=True)
    compiled(**kind.inputs(), labels=kind.labels()).loss.backward()
    plain, other = (dict(model.side.named_buffers()) for model in models)
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for (name, one), (_, two) in zip(*(model.trained_parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_of_each_feature_only_what_is_pooled_is_kept() -> None:
    """Four rows of 64 x 64: grids of 16, 8, 4 and 2 a side, all of which come down to the guide's 2."""
    channels = (8, 16, 32, 64)
    backbone = timm.create_model("resnet10t", layers=(1, 1, 1, 2), channels=channels, num_classes=0)
    model = ss.attach(backbone, ss.SherlConfig(hidden=4)).train()
    with ss.saved_bytes(model) as kept:
        model(pixel_values=torch.randn(4, 3, 64, 64))
    inside = sum(row.counted for row in kept.rows if row.module.startswith("backbone.layer4.1."))
    assert kept.total - inside <= 4 * 4 * 4 * sum(channels) + 4 * 4  # float32, rows, positions; the gate


def test_parameters_on_resnext101() -> None:
    with torch.device("meta"):
        backbone = timm.create_model("resnext101_32x8d", num_classes=0)
        model = ss.attach(backbone, ss.SherlConfig(hidden=512))
    assert sum(p.numel() for _, p in model.trained_parameters()) == 3_027_458
    assert model.side.blocks == {"encoder": (2, 6, 29, 31)}


def test_a_batch_of_one_is_refused_in_training(resnet: ss.SideModel) -> None:
    inputs = FAMILIES["timm_resnet"].inputs(rows=1)
    said = r"1 row in a batch, but Sherl has batch norms on this backbone, which are trained on 2 or more\. Give larger"
    with pytest.raises(ValueError, match=said):
        resnet.train()(**inputs)
    assert all(norm.num_batches_tracked == 0 for norm in resnet.modules() if isinstance(norm, sherl.BatchNorm))
    assert logits(resnet.eval()(**inputs)).shape == (1, 3)


def test_images_whose_grids_do_not_divide_are_pooled_too(resnet: ss.SideModel) -> None:
    model = resnet.train()
    model(pixel_values=torch.randn(2, 3, 50, 37), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in model.trained_parameters())


def test_layers_of_a_resnet_are_the_last_of_each_stage_or_as_given() -> None:
    assert on_resnet().side.blocks == {"encoder": (0, 1, 2, 3)}
    assert on_resnet(layers=(1, 3)).side.blocks == {"encoder": (1, 3)}
    with pytest.raises(UnsupportedBackbone, match=r"lack the guide, block 3"):
        on_resnet(layers=(0, 1))


def test_a_form_of_another_kind_of_backbone_is_refused() -> None:
    for settings in ({"projection": "gated"}, {"norm_out": True}, {"merge_mlp": True}):
        with pytest.raises(
            UnsupportedBackbone, match="on convolutional networks there is one form, of 1x1 convolutions"
        ):
            on_resnet(**settings)
    with pytest.raises(UnsupportedBackbone, match="projection='conv_norm' is for convolutional networks"):
        ss.attach(FAMILIES["bert"].model(), ss.SherlConfig(reduction=4, projection="conv_norm"))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_hierarchical_backbone_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedBackbone, match=r"^sherl does not work on Swin.*hierarchical: its stages"):
        ss.attach(FAMILIES["swin"].model(), ss.SherlConfig(reduction=4))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reduction": 3}, "reduction=3 does not divide the width 16: choose one that does, or set hidden"),
        ({"layers": (0, 1, 3)}, r"layers=\(0, 1, 3\), but the encoder has 3 blocks: choose from 0 to 2"),
        ({"layers": (2,)}, r"layers=\(2,\) name no block before the last of the \w+, 2, .*choose from 0 to 1"),
    ],
)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_what_does_not_fit_the_backbone_is_refused(settings: dict[str, Any], said: str, family: str) -> None:
    backbone = FAMILIES[family].model()
    with pytest.raises(UnsupportedBackbone, match=said):
        ss.attach(backbone, ss.SherlConfig(**{"reduction": 4, **settings}))
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_a_single_block_is_refused() -> None:
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(UnsupportedBackbone, match="there is 1 block"):
        ss.attach(BertModel(config), ss.SherlConfig())


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("reduction", 0, "a whole number of at least 1"),
        ("hidden", 1.5, "a whole number or None"),
        ("layers", (1, 1), "block numbers from 0, ascending"),
        ("layers", (3, 2), "block numbers from 0, ascending"),
        ("layers", (-1, 2), "block numbers from 0, ascending"),
        ("layers", (), "block numbers from 0, ascending"),
        ("projection", "linear", '"gated", "linear_norm", "relu_linear", "conv_norm" or None'),
        ("norm_out_eps", 0.0, "a number above 0"),
        ("eps", float("nan"), "a finite number or None"),
        ("eps", "a", "a finite number or None"),
        ("init_std", -0.1, "a number above 0"),
        ("dropout", 1.0, "a number of at least 0 and less than 1"),
        ("dropout", "0.1", "a finite number"),
    ],
)
def test_a_setting_out_of_range_is_named(field: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"SherlConfig: {field}=.*must be {said}"):
        ss.SherlConfig(**{field: value})


def test_a_config_comes_back_from_its_json() -> None:
    config = ss.SherlConfig(layers=(1, 2), projection="gated", norm_out=False)
    assert ss.SherlConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
