"""LST against its definition: T5's own blocks, parameters and bytes at real size, positions, masks, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5EncoderModel, T5ForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.t5.modeling_t5 import T5Attention, T5Block

import sidestep as ss
from sidestep.fold.caches import SideCache
from sidestep.measure.plan.fakes import fake_copy
from sidestep.methods import UnsupportedBackbone
from sidestep.methods.lst.config import Sizes
from sidestep.methods.lst.method import LST, Ladder
from sidestep.methods.lst.parts import Attention, relative_buckets, rotate
from tiny import FAMILIES, logits, randomize


class DynamicSubclass(DynamicCache):
    """Such as assisted decoding's, which count their tokens in ways of their own."""


TINY: dict[str, Any] = {"reduction": 2, "heads": 2}
QUIET: dict[str, Any] = {**TINY, "dropout": 0.0}
BASE: dict[str, Any] = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
LST_8 = ss.LSTConfig(reduction=8, dropout=0.0)
LARGE: dict[str, Any] = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16}


def side_parameters(model: ss.SideModel) -> int:
    return sum(p.numel() for p in model.side.parameters() if p.requires_grad)


# --- real size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "parameters"), [(BASE, 3_878_712), (LARGE, 9_057_328)], ids=["base", "large"])
def test_parameters_on_t5(sizes: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        model = ss.attach(T5ForConditionalGeneration(T5Config(**sizes)), ss.LSTConfig(reduction=8))
    assert side_parameters(model) == parameters
    assert sum(p.numel() for _, p in model.trained_parameters()) == parameters


def test_rungs_on_t5_are_the_releases() -> None:
    with torch.device("meta"):
        base, large = (
            ss.attach(T5ForConditionalGeneration(T5Config(**sizes)), ss.LSTConfig()) for sizes in (BASE, LARGE)
        )
    for stack in ("encoder", "decoder"):
        assert list(base.side.ladders[stack].blocks) == ["1", "2", "3", "5", "6", "7", "9", "10", "11"]
        assert list(large.side.ladders[stack].blocks) == [str(block) for block in range(1, 24, 2)]


def test_sizes_that_follow_from_the_width_are_those_of_t5() -> None:
    for sizes in (BASE, LARGE):
        expected = Sizes(
            width=sizes["d_model"] // 8,
            heads=sizes["num_heads"],
            head_width=sizes["d_kv"] // 8,
            inner_width=sizes["d_ff"] // 8,
        )
        assert ss.LSTConfig(reduction=8).sizes(sizes["d_model"]) == expected


def test_sizes_that_are_left_open_are_the_t5s() -> None:
    """Whatever its heads and its MLP; T5-3B has the width and depth of T5-large."""
    config = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    side = ss.attach(T5ForConditionalGeneration(config), ss.LSTConfig(reduction=4)).side
    for ladder in side.ladders.values():
        for block in ladder.blocks.values():
            assert block.attention.heads == 4
            assert block.attention.query.weight.shape == (8, 8)
            assert block.inner.weight.shape == (12, 8)
        assert ladder.bias.shape == (32, 4)
    explicit = {"heads": 32, "head_width": 128, "inner_width": 16384}
    with torch.device("meta"):
        largest = T5ForConditionalGeneration(T5Config(**LARGE | {"d_kv": 128, "d_ff": 16384, "num_heads": 32}))
        model = ss.attach(largest, ss.LSTConfig(layers=(23,)))
        open_ones = {name: p.shape for name, p in model.side.named_parameters()}
        model = ss.attach(ss.detach(model), ss.LSTConfig(layers=(23,), **explicit))
    assert open_ones == {name: p.shape for name, p in model.side.named_parameters()}


def test_a_given_size_goes_before_the_t5s() -> None:
    side = ss.attach(FAMILIES["t5"].model(), ss.LSTConfig(reduction=2, heads=1, inner_width=8)).side
    block: Any = side.ladders["encoder"].blocks["0"]
    assert (block.attention.heads, block.attention.query.out_features, block.inner.out_features) == (1, 4, 4)


def test_bytes_kept_on_t5_base() -> None:
    # On fake tensors, which take neither memory nor time. The release keeps 37.7 MiB for each example.
    with torch.device("meta"):
        model = ss.attach(T5ForConditionalGeneration(T5Config(**BASE, decoder_start_token_id=0)), LST_8)
    with FakeTensorMode():
        model = fake_copy(model).train()
        batch = {name: torch.ones(4, 128, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        with ss.saved_bytes(model) as kept:
            model(**batch, labels=torch.ones(4, 4, dtype=torch.long))
    assert kept.total / 4 <= 22 * 2**20, str(kept)
    # what is read takes 10 hidden states of the encoder alone
    assert kept.total / 4 >= 10 * 128 * 768 * 4


def test_parameters_by_the_formula() -> None:
    d, s, heads, k, blocks, rungs = 16, 8, 2, 4, 3, 2
    stack = (rungs + 1) * (d * s + s) + rungs * (4 * s * heads * k + 2 * s) + blocks + s
    mlp = rungs * 2 * s * (4 * d) // 2  # that of T5 is known, 2 d wide
    crosses = rungs * (4 * s * heads * k + s)
    up = s * d + d
    layers = (0, 2)
    single = ss.attach(FAMILIES["bert"].model(), ss.LSTConfig(**TINY, layers=layers), head=ss.Classify(num_labels=3))
    assert side_parameters(single) == stack + mlp + up
    pair = ss.attach(FAMILIES["t5"].model(), ss.LSTConfig(**TINY, layers=layers))
    assert side_parameters(pair) == 2 * (stack + mlp // 2 + 32 * heads) + crosses + up


# --- T5's parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("buckets", [8, 32])
def test_buckets_are_t5s(causal: bool, buckets: int) -> None:
    distance = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(
        distance, bidirectional=not causal, num_buckets=buckets, max_distance=128
    )
    assert torch.equal(relative_buckets(distance, buckets, causal=causal), expected)


@pytest.mark.parametrize("decoder", [False, True])
@torch.no_grad()
def test_a_side_block_is_t5s_block(decoder: bool) -> None:
    """With a closed gate a rung is T5's block at the side's width, with its bias and masks."""
    torch.manual_seed(0)
    kind = FAMILIES["t5"]
    model = ss.attach(kind.model(), ss.LSTConfig(**QUIET, buckets=8)).eval()
    randomize(model)
    stack = "decoder" if decoder else "encoder"
    ladder: Ladder = model.side.ladders[stack]
    ladder.gates.fill_(100.0)
    config = T5Config(
        d_model=8, d_kv=4, d_ff=16, num_heads=2, relative_attention_num_buckets=8, dropout_rate=0.0, is_decoder=decoder
    )
    config._attn_implementation = "eager"
    block = T5Block(config, has_relative_attention_bias=True, layer_idx=0).eval()
    copy(ladder, block)
    state, memory = torch.randn(2, 6, 8), torch.randn(2, 5, 8)
    keep = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    memory_keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    site = next(p.site for p in model.places if p.site.stack == stack and p.site.kind == "block")
    read = memory_keep if decoder else None
    site = site.during(keep=keep, key_keep=keep, memory_keep=read, grid=None, past=0, cache=None)
    found = ladder.climb(torch.randn(2, 6, 16), state, memory if decoder else None, site)
    seen = keep[:, None, None].expand(-1, 1, 6, -1)
    seen = seen & torch.ones(6, 6, dtype=torch.bool).tril() if decoder else seen
    expected = block(
        state,
        attention_mask=torch.where(seen, 0.0, torch.finfo().min),
        encoder_hidden_states=memory if decoder else None,
        encoder_attention_mask=torch.where(memory_keep[:, None, None], 0.0, torch.finfo().min) if decoder else None,
    )[0]
    torch.testing.assert_close(found, expected)


def copy(ladder: Ladder, block: T5Block) -> None:
    """The weights of a ladder's first rung into a block of T5's."""
    side: Any = ladder.blocks["0"]
    pairs = [(side.norm_attention, block.layer[0].layer_norm), (side.norm_mlp, block.layer[-1].layer_norm)]
    pairs += attention_pairs(side.attention, block.layer[0].SelfAttention)
    if side.crosses:
        pairs += [(side.norm_cross, block.layer[1].layer_norm)]
        pairs += attention_pairs(side.cross, block.layer[1].EncDecAttention)
    mlp = block.layer[-1].DenseReluDense
    for source, target in [*pairs, (side.inner, mlp.wi), (side.outer, mlp.wo)]:
        target.weight.copy_(source.weight)
    block.layer[0].SelfAttention.relative_attention_bias.weight.copy_(ladder.bias)


def attention_pairs(side: Any, theirs: Any) -> list[tuple[Any, Any]]:
    return [(side.query, theirs.q), (side.key, theirs.k), (side.value, theirs.v), (side.out, theirs.o)]


# --- the ladder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_gates_weigh_the_state_against_the_block(family: str) -> None:
    kind = FAMILIES[family]
    model = ss.attach(kind.model(), ss.LSTConfig(**QUIET)).eval()
    randomize(model)
    before = logits(model(**kind.inputs()))
    with torch.no_grad():
        for ladder in model.side.ladders.values():
            ladder.gates.fill_(100.0)
            for down in ladder.downs.values():
                down.weight.add_(torch.randn_like(down.weight))
    closed = logits(model(**kind.inputs()))
    assert not torch.allclose(closed, before, atol=1e-3)
    with torch.no_grad():
        for ladder in model.side.ladders.values():
            for down in ladder.downs.values():
                down.weight.add_(torch.randn_like(down.weight))
    # with all gates at the side's own state, what the blocks give is not seen
    torch.testing.assert_close(logits(model(**kind.inputs())), closed)


def test_blocks_without_a_rung_are_not_read() -> None:
    kind = FAMILIES["bert"]
    model = ss.attach(kind.model(), ss.LSTConfig(**QUIET, layers=(0, 2)), head=ss.Classify(num_labels=3))
    randomize(model)
    with ss.saved_bytes(model) as kept:
        model(**kind.inputs(), labels=kind.labels()).loss.backward()
    ladder = model.side.ladders["encoder"]
    assert set(ladder.downs) == set(ladder.blocks) == {"0", "2"}
    assert ladder.gates.grad[1] == 0
    assert (ladder.gates.grad[[0, 2]] != 0).all()
    assert kept.total < 4 * 4 * 7 * (3 * 16 + 6 * 8)  # three hidden states, and narrow ones


def test_a_causal_ladder_does_not_see_later_tokens() -> None:
    kind = FAMILIES["llama"]
    model = ss.attach(kind.model(), ss.LSTConfig(**QUIET)).eval()
    randomize(model)
    ids = torch.randint(3, 40, (2, 8))
    other = torch.cat([ids[:, :5], (ids[:, 5:] + 1) % 37 + 3], dim=1)
    one, two = (model(input_ids=x).logits for x in (ids, other))
    torch.testing.assert_close(one[:, :5], two[:, :5])
    assert not torch.allclose(one[:, 5:], two[:, 5:], atol=1e-3)


def test_rotary_scores_hang_on_distances_alone() -> None:
    query, key = torch.randn(2, 1, 1, 1, 6).double()
    scores = [
        (rotate(query, torch.tensor([at])) @ rotate(key, torch.tensor([at + 3])).transpose(2, 3)).item()
        for at in (0, 1, 50)
    ]
    assert scores[1:] == [pytest.approx(scores[0])] * 2
    other = rotate(query, torch.tensor([0])) @ rotate(key, torch.tensor([4])).transpose(2, 3)
    assert other.item() != pytest.approx(scores[0])
    assert torch.equal(rotate(query, torch.tensor([0])), query)


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_the_order_of_the_tokens_matters_to_the_ladder(positions: Any) -> None:
    backbone = T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).eval()
    model = ss.attach(backbone, ss.LSTConfig(**QUIET, positions=positions), head=ss.Classify(num_labels=3)).eval()
    randomize(model, scale=1.0)
    ladder = model.side.ladders["encoder"]
    assert (ladder.bias is not None) == (positions == "relative")
    site = next(place.site for place in model.places if place.site.kind == "block")
    hidden, state = torch.randn(1, 5, 16), torch.randn(1, 5, 8)
    one = ladder.climb(hidden, state, None, site)
    other = ladder.climb(hidden.flip(1), state.flip(1), None, site).flip(1)
    assert not torch.allclose(one, other, atol=1e-2)


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_without_a_cache_follows_the_forward_pass(family: str, beams: int) -> None:
    kind = FAMILIES[family]
    model = ss.attach(kind.model(), ss.LSTConfig(**QUIET)).eval()
    randomize(model, scale=1.0)
    batch = {name: value[:3] for name, value in kind.inputs().items() if name != "decoder_input_ids"}
    made = model.generate(
        **batch,
        use_cache=False,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        num_beams=beams,
        return_dict_in_generate=True,
        output_scores=True,
    )
    if beams > 1:
        assert made.sequences.shape[0] == 3
        return
    if family == "t5":
        plain = model(**batch, decoder_input_ids=made.sequences[:, :-1]).logits
    else:
        mask = torch.ones_like(made.sequences)
        plain = model(input_ids=made.sequences, attention_mask=mask).logits[:, 6:-1]
    allowed = [token for token in range(plain.shape[-1]) if token != 1]  # the end is not allowed before the length
    scores = torch.stack(made.scores, dim=1)
    torch.testing.assert_close(scores[..., allowed], plain[..., allowed], rtol=1e-4, atol=1e-4)


# --- a start from the backbone ------------------------------------------------------------------------------

T5_SIZES: dict[str, Any] = {"heads": 2, "head_width": 8, "inner_width": 32, "dropout": 0.0}


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("index", [0, 2])
@torch.no_grad()
def test_undivided_a_side_block_is_the_backbones(stack: str, index: int) -> None:
    model = ss.attach(FAMILIES["t5"].model(), ss.LSTConfig(reduction=1, init="magnitude", **T5_SIZES)).eval()
    ladder: Ladder = model.side.ladders[stack]
    ladder.gates.fill_(100.0)
    theirs = getattr(model.backbone, stack)
    state, memory = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    places = [place for place in model.places if place.site.stack == stack and place.site.kind == "block"]
    causal = stack == "decoder"
    found = ladder.climb(torch.randn(2, 6, 16), state, memory if causal else None, places[index].site)
    mask = torch.full((6, 6), torch.finfo().min).triu(1)[None, None] if causal else None
    bias = theirs.block[0].layer[0].SelfAttention.compute_bias(6, 6)
    bias = bias if mask is None else bias + mask
    expected = theirs.block[index](state, position_bias=bias, encoder_hidden_states=memory if causal else None)[0]
    torch.testing.assert_close(found, expected)
    assert torch.equal(ladder.norm.weight, theirs.final_layer_norm.weight)


@torch.no_grad()
def test_side_blocks_share_their_channels() -> None:
    """What block 2 of the decoder hands to the next is in the same channels as what the encoder's blocks hand on."""
    backbone = FAMILIES["t5"].model()
    kept = [0, 2, 3, 5, 10, 11, 14, 15]
    for block in (*backbone.encoder.block, *backbone.decoder.block):
        block.layer[-1].DenseReluDense.wo.weight[kept] *= 20
    model = ss.attach(backbone, ss.LSTConfig(reduction=2, init="magnitude", **T5_SIZES))
    for stack in ("encoder", "decoder"):
        ladder, theirs = model.side.ladders[stack], getattr(backbone, stack)
        assert torch.equal(ladder.norm.weight, theirs.final_layer_norm.weight[kept])
        assert torch.equal(ladder.bias, theirs.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
        for index, block in enumerate(theirs.block):
            side: Any = ladder.blocks[str(index)]
            assert torch.equal(side.norm_mlp.weight, block.layer[-1].layer_norm.weight[kept])
            assert side.attention.query.weight.shape == (8, 8)
    assert model.side.from_data is False


def test_parameters_and_copies_do_not_hang_on_the_start() -> None:
    with torch.device("meta"):
        model = ss.attach(T5ForConditionalGeneration(T5Config(**BASE)), ss.LSTConfig(init="fisher"))
    assert side_parameters(model) == 3_878_712
    assert model.side.from_data
    half = ss.attach(FAMILIES["t5"].model().bfloat16(), ss.LSTConfig(reduction=2, init="magnitude", **T5_SIZES))
    assert {p.dtype for p in half.side.parameters()} == {torch.float32}


def gated_t5() -> nn.Module:
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    config.feed_forward_proj, config.is_gated_act, config.dense_act_fn = "gated-gelu", True, "gelu_new"
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("build", "settings", "says"),
    [
        (FAMILIES["bert"].model, {}, r"those of T5 \(RMS norms, relative positions, an MLP with ReLU\): choose init="),
        (FAMILIES["llama"].model, {}, "which needs those of T5"),
        (gated_t5, {}, "which needs those of T5"),
        (FAMILIES["t5"].model, {"positions": "rotary"}, 'have relative positions: choose positions="relative"'),
        (FAMILIES["t5"].model, {"buckets": 16}, "other sizes than the side network is made for: set buckets=32"),
        (FAMILIES["t5"].model, {"heads": 1, "inner_width": 64}, "set heads=2, inner_width=32"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(build: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedBackbone, match=says):
        ss.attach(build(), ss.LSTConfig(**{**T5_SIZES, "reduction": 2, "init": "fisher", **settings}))


# --- generation with a cache --------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def short_decoder() -> nn.Module:
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2, pad_token_id=0
    )
    config.decoder_start_token_id, config.eos_token_id = 0, 1
    return T5ForConditionalGeneration(config).eval()


def padded(causal: bool) -> dict[str, Tensor]:
    """Five texts of five lengths, padded on the side on which the kind of model wants it."""
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(3, 40, (5, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 1, 6])[:, None]).long()
    mask = mask.flip(1) if causal else mask
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize(
    ("build", "causal", "settings"),
    [
        (FAMILIES["t5"].model, False, {}),
        (FAMILIES["t5"].model, False, {"layers": (1,), "positions": "rotary"}),
        (short_decoder, False, {"layers": (0, 1)}),
        (FAMILIES["llama"].model, True, {}),
        (FAMILIES["llama"].model, True, {"layers": (0, 2), "positions": "relative", "buckets": 8}),
        (gpt2, True, {}),
    ],
    ids=["t5", "t5-rotary", "t5-short", "llama", "llama-relative", "gpt2"],
)
@pytest.mark.parametrize("how", [{}, {"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3}])
def test_generation_with_a_cache_equals_generation_without(
    build: Callable[[], nn.Module], causal: bool, settings: dict[str, Any], how: dict[str, Any]
) -> None:
    model = ss.attach(build(), ss.LSTConfig(**QUIET, **settings)).eval()
    randomize(model, scale=1.0)
    common = dict(max_new_tokens=8, pad_token_id=0, return_dict_in_generate=True, output_scores=True, **how)
    with_cache = model.generate(**padded(causal), **common, do_sample=False)
    without = model.generate(**padded(causal), **common, do_sample=False, use_cache=False)
    assert torch.equal(with_cache.sequences, without.sequences)
    for one, other in zip(with_cache.scores, without.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_with_a_cache_each_token_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ss.attach(FAMILIES["t5"].model(), ss.LSTConfig(**QUIET)).eval()
    read: list[tuple[bool, int]] = []
    source = Attention.source
    cross = {id(block.cross) for block in model.side.ladders["decoder"].blocks.values()}

    def spy(self: Attention, tokens: Tensor, positions: Tensor | None = None) -> Any:
        read.append((id(self) in cross, tokens.shape[1]))
        return source(self, tokens, positions)

    monkeypatch.setattr(Attention, "source", spy)
    model.generate(**padded(False), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert [tokens for crosses, tokens in read if crosses] == [7] * 3  # each rung, in the first pass
    assert sorted(tokens for crosses, tokens in read if not crosses) == [1] * 4 * 3 + [7] * 3


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("given", [False, True])
@torch.no_grad()
def test_a_sequence_in_parts_is_the_sequence(family: str, given: bool) -> None:
    """Also through a cache that knows no config, whose layers are made as they come."""
    kind = FAMILIES[family]
    model = ss.attach(kind.model(), ss.LSTConfig(**QUIET)).double().eval()
    randomize(model, scale=1.0)
    ids = torch.randint(3, 40, (2, 9))
    encoder = kind.encoder_decoder
    name, text = ("decoder_input_ids", {"input_ids": ids}) if encoder else ("input_ids", {})
    whole = model(**text, **{name: ids}, use_cache=False).logits
    cache: Any = None
    if given:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if encoder else DynamicCache()
    parts = []
    for part in ids.split([4, 1, 3, 1], dim=1):
        out = model(**text, **{name: part}, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == 9


def test_a_pass_with_a_cache_has_the_same_gradients() -> None:
    kind = FAMILIES["llama"]
    model = ss.attach(kind.model(), ss.LSTConfig(**QUIET)).eval()
    randomize(model)
    found = []
    for use_cache in (True, False):
        model.zero_grad()
        model(**kind.inputs(), labels=kind.inputs()["input_ids"], use_cache=use_cache).loss.backward()
        found.append([p.grad.clone() for _, p in model.trained_parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_cache_of_the_bare_backbone_is_refused() -> None:
    backbone, ids = FAMILIES["llama"].model(), torch.randint(3, 40, (2, 4))
    cache = backbone(input_ids=ids, use_cache=True).past_key_values
    model = ss.attach(backbone, ss.LSTConfig(**QUIET)).eval()
    with pytest.raises(ValueError, match="the cache holds 4 tokens, of which 0 went through this task's model"):
        model(input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({"cache_implementation": "static"}, "a StaticCache takes no further layers"),
        ({"past_key_values": DynamicSubclass()}, "a DynamicSubclass takes no further layers"),
    ],
)
def test_a_cache_that_cannot_grow_is_refused(how: dict[str, Any], kind: str) -> None:
    model = ss.attach(FAMILIES["llama"].model(), ss.LSTConfig(**QUIET)).eval()
    with pytest.raises(ValueError, match=rf"{kind}\. Leave out cache_implementation, .* or use_cache=False"):
        model.generate(torch.randint(3, 40, (2, 4)), max_new_tokens=2, **how)


def test_an_offloaded_cache_is_refused() -> None:
    cache = DynamicCache()
    cache.offloading = True  # made offloaded, it asks for a GPU
    with pytest.raises(ValueError, match="an offloaded DynamicCache takes no further layers"):
        SideCache(cache, 2, 0)


def test_dropout_is_drawn_the_same_in_backward() -> None:
    kind = FAMILIES["bert"]
    model = ss.attach(kind.model(), ss.LSTConfig(**TINY, dropout=0.4), head=ss.Classify(num_labels=3)).train()
    randomize(model)
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        model.zero_grad()
        loss = model(**kind.inputs(), labels=kind.labels()).loss
        torch.rand(5)  # what is drawn between must not matter
        loss.backward()
        found.append([p.grad.clone() for _, p in model.trained_parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    quiet = model.eval()(**kind.inputs(), labels=kind.labels()).loss
    assert quiet != loss


def test_it_starts_as_the_release_says() -> None:
    torch.manual_seed(0)
    model = ss.attach(FAMILIES["t5"].model(), ss.LSTConfig(**TINY))
    ladder = model.side.ladders["decoder"]
    assert torch.equal(ladder.gates, torch.zeros(3))
    for linear in (ladder.first, *ladder.downs.values(), model.side.up):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.3)
        assert torch.equal(linear.bias, torch.zeros_like(linear.bias))
    assert torch.equal(ladder.norm.weight, torch.ones(8))


def test_it_writes_at_the_end_only() -> None:
    model = ss.attach(FAMILIES["t5"].model(), ss.LSTConfig(**TINY))
    write = LST.first_write(model.side.config, [place.site for place in model.places])
    assert (write.stack, write.kind) == ("decoder", "norm")
    assert model.late_blocks() == []


# --- config and refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("reduction", 0, "reduction=0, but it must be a whole number of at least 1"),
        ("layers", (), r"layers=\(\), but it must be block numbers from 0, ascending"),
        ("layers", (2, 1), r"layers=\(2, 1\), but it must be block numbers from 0, ascending"),
        ("layers", (1, 1), "ascending"),
        ("layers", (-1, 1), "ascending"),
        ("heads", 0, "heads=0, but it must be a whole number of at least 1, or None"),
        ("head_width", 2.5, "head_width=2.5, but"),
        ("inner_width", -1, "inner_width=-1, but"),
        ("positions", "absolute", 'positions=\'absolute\', but it must be "relative", "rotary" or None'),
        ("buckets", 6, "buckets=6, but it must be a multiple of 4"),
        ("init", "pruned", 'init=\'pruned\', but it must be "random", "magnitude" or "fisher"'),
        ("dropout", 1.0, "dropout=1.0, but it must be at least 0 and less than 1"),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ss.LSTConfig(**{field: value})


@pytest.mark.parametrize(
    ("family", "config", "says"),
    [
        ("swin", QUIET, "this backbone is hierarchical"),
        ("t5", {**QUIET, "layers": (0, 3)}, r"layers=\(0, 3\), but the encoder has 3 blocks: choose from 0 to 2"),
        ("bert", {"reduction": 3}, "reduction=3 does not divide the backbone's width, 16: choose a divisor"),
        ("bert", {"reduction": 4, "heads": 8}, "backbone's head_width, 2: choose a divisor, or set head_width to a"),
        ("bert", {"reduction": 4, "inner_width": 30}, "does not divide the backbone's inner_width, 30"),
        ("t5", {"reduction": 16}, "reduction=16 does not divide the backbone's head_width, 8: choose a divisor"),
        ("bert", {"reduction": 16, "heads": 1}, "a side head has 1: choose another reduction, heads or head_width"),
    ],
)
def test_what_does_not_fit_is_refused(family: str, config: dict[str, Any], says: str) -> None:
    backbone: nn.Module = FAMILIES[family].model()
    with pytest.raises(UnsupportedBackbone, match=says):
        ss.attach(backbone, ss.LSTConfig(**config))


def test_odd_heads_are_no_matter_to_a_bias() -> None:
    model = ss.attach(FAMILIES["t5"].model(), ss.LSTConfig(reduction=8, dropout=0.0))
    assert model.side.ladders["encoder"].blocks["0"].attention.query.out_features == 2  # two heads of one channel
    out: Tensor = logits(model(**FAMILIES["t5"].inputs()))
    assert torch.isfinite(out).all()
