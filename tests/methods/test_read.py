"""READ against its definition: a hand-unrolled float64 reference, parameter counts, permutations, bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, T5Config, T5Model, ViTConfig, ViTModel

import sidestep as ss
from tiny import FAMILIES, randomize


def side_parameters(model: ss.SideModel) -> int:
    return sum(p.numel() for name, p in model.trained_parameters() if name.startswith("side."))


def bert(depth: int, width: int = 16) -> BertModel:
    config = BertConfig(
        vocab_size=40,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=4 * width,
    )
    return BertModel(config, add_pooling_layer=False)


@pytest.mark.parametrize("cell", ["gru", "rnn"])
@pytest.mark.parametrize("depth", [2, 24])
def test_parameters_do_not_grow_with_depth(cell: Any, depth: int) -> None:
    d, r = 16, 5
    model = ss.attach(bert(depth), ss.ReadConfig(rank=r, cell=cell))
    gates = 3 if cell == "gru" else 1
    assert side_parameters(model) == gates * (d * r + r * r + 2 * r) + r * d + 2 * d


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_the_joiner_adds_its_parameters(cell: Any) -> None:
    d, r, gates = 16, 5, 3 if cell == "gru" else 1
    stack = gates * (d * r + r * r + 2 * r)
    # The encoder feeds the decoder and has no output map; each stack has its own norm (d).
    encoder, decoder = stack + d, stack + r * d + 2 * d
    joiner = r * d + 2 * r * r + gates * r * r
    model = ss.attach(FAMILIES["t5"].model(), ss.ReadConfig(rank=r, cell=cell))
    assert side_parameters(model) == encoder + decoder + joiner


def test_parameters_at_real_size() -> None:
    with torch.device("meta"):
        backbone = T5Model(T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12))
    r, d = 128, 768
    stack = 3 * (d * r + r * r + 2 * r)
    expected = (stack + d) + (stack + r * d + 2 * d) + (r * d + 2 * r * r + 3 * r * r)
    assert side_parameters(ss.attach(backbone, ss.ReadConfig(rank=r))) == expected


# --- the definition, unrolled by hand -----------------------------------------------------------------------


def normed(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale


def unroll(recurrence: Any, taps: list[Tensor], source: Tensor | None, keep: Tensor | None) -> list[Tensor]:
    """h_1..h_N by the formulas of the method's page, gate by gate, nothing shared with the implementation."""
    r, gates, tap = recurrence.rank, recurrence.gates, recurrence.taps[0]
    w_ih, w_hh = tap.weight[: gates * r], recurrence.hidden_weight
    h = torch.zeros(*taps[0].shape[:2], r, dtype=torch.float64)
    states = []
    for phi in taps:
        x = normed(phi, tap.scale) @ w_ih.T + recurrence.input_bias
        if source is not None:
            q = normed(phi, tap.scale) @ tap.weight[gates * r :].T
            k, v = source @ recurrence.key.weight.T, source @ recurrence.value.weight.T
            scores = q @ k.transpose(1, 2) * r**-0.5
            scores = scores if keep is None else scores.masked_fill(~keep[:, None], -torch.inf)
            x = x + (scores.softmax(-1) @ v) @ recurrence.join.weight.T
        y = h @ w_hh.T + recurrence.hidden_bias
        if gates == 1:
            h = torch.tanh(x + y)
        else:
            reset = torch.sigmoid(x[..., :r] + y[..., :r])
            update = torch.sigmoid(x[..., r : 2 * r] + y[..., r : 2 * r])
            new = torch.tanh(x[..., 2 * r :] + reset * y[..., 2 * r :])
            h = (1 - update) * new + update * h
        states.append(h)
    return states


def block_outputs(model: torch.nn.Module, stack: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda m, a, o: found.append(o[0] if isinstance(o, tuple) else o))
        for block in stack
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("cell", ["gru", "rnn"])
@pytest.mark.parametrize("aggregate", ["last", "mean"])
@pytest.mark.parametrize("correction", ["pre_norm", "post_norm"])
@pytest.mark.parametrize(("family", "scale"), [("bert", 1.0), ("vit", 0.5), ("t5", 30.0)])
def test_equals_a_hand_unrolled_reference(
    cell: Any, aggregate: Any, correction: Any, family: str, scale: float
) -> None:
    kind = FAMILIES[family]
    backbone, batch = kind.model().double(), kind.inputs()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    trunk = backbone.base_model
    joined = family == "t5"
    encoder = trunk.encoder.block if joined else (trunk.encoder.layer if family == "bert" else trunk.layers)
    frozen = block_outputs(backbone, encoder, batch)
    decoder = block_outputs(backbone, trunk.decoder.block, batch) if joined else frozen
    config = ss.ReadConfig(rank=3, cell=cell, aggregate=aggregate, correction=correction, scale=scale)
    model = ss.attach(backbone, config).double()
    randomize(model, scale=0.5)

    source, keep = None, None
    if joined:
        keep = batch["attention_mask"].bool()
        source = unroll(model.side.stacks["encoder"], frozen, None, None)[-1]
    states = unroll(model.side.stacks["decoder" if joined else "encoder"], decoder, source, keep)
    read = states[-1] if aggregate == "last" else torch.stack(states).mean(0)
    delta = scale * (read @ model.side.out.weight.T + model.side.out.bias)
    norm = {
        "bert": lambda x: x,
        "vit": lambda x: trunk.layernorm(x),
        "t5": lambda x: trunk.decoder.final_layer_norm(x),
    }[family]
    expected = norm(decoder[-1] + delta) if correction == "pre_norm" else norm(decoder[-1]) + delta

    got: list[Tensor] = []
    finish = model.side.finish
    model.side.finish = lambda *a: got.append(finish(*a)) or got[-1]
    sites = [place for place in model.places if place.site.kind == "norm"]
    model(**batch)
    result = got[-1]
    if correction == "pre_norm" and sites:
        # `finish` sees the norm's output; T5's norm computes in float32.
        torch.testing.assert_close(result, expected[:, : result.shape[1]], rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(result, expected[:, : result.shape[1]], rtol=1e-6, atol=1e-6)


def test_permuting_tokens_permutes_the_correction() -> None:
    model = ss.attach(bert(3).double(), ss.ReadConfig(rank=4)).double()
    randomize(model, scale=0.5)
    hidden = [torch.randn(2, 6, 16, dtype=torch.float64) for _ in model.places]
    order = torch.randperm(6)

    def correction(rows: list[Tensor]) -> Tensor:
        state = model.side.start(model.places[0].site, None)
        for place, row in zip(model.places, rows, strict=True):
            state, written = model.side.write(model.side.advance(state, row, place.site), row, place.site)
        return written - rows[-1]

    torch.testing.assert_close(correction([h[:, order] for h in hidden]), correction(hidden)[:, order])


# --- what is kept for backward ------------------------------------------------------------------------------


def kept(backbone: torch.nn.Module, config: ss.ReadConfig, pool: Any, batch: dict[str, Tensor]) -> int:
    model = ss.attach(backbone, config, head=ss.Classify(num_labels=2, pool=pool)).train()
    with ss.saved_bytes(model) as found:
        model(**batch, labels=torch.zeros(len(next(iter(batch.values()))), dtype=torch.long))
    return found.total


@pytest.mark.parametrize("cell", ["gru", "rnn"])
@pytest.mark.parametrize(("rank", "bound"), [(32, 1.30), (128, 1.45)])
def test_all_tokens_keep_little_more_than_the_taps_inputs(cell: Any, rank: int, bound: float) -> None:
    # The published sizes at batch 2: what is kept is proportional to the batch.
    config = ss.ReadConfig(rank=rank, cell=cell)
    text = kept(bert_base(), config, "mean", {"input_ids": torch.randint(0, 100, (2, 128))})
    assert text <= bound * 12 * 2 * 128 * 768 * 4
    image = kept(vit_base(), config, "mean", {"pixel_values": torch.randn(2, 3, 224, 224)})
    one_wide = 2 * 197 * 768 * 4  # the final norm's input
    assert image - one_wide <= bound * 12 * one_wide


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_one_token_heads_keep_one_token(name: str) -> None:
    batch = (
        {"input_ids": torch.randint(0, 100, (2, 128))}
        if name == "bert"
        else {"pixel_values": torch.randn(2, 3, 224, 224)}
    )
    backbone = bert_base() if name == "bert" else vit_base()
    # Under 3 MiB at batch 32.
    assert kept(backbone, ss.ReadConfig(), "cls", batch) < 3 * 2**20 * 2 / 32


def test_bytes_do_not_grow_with_the_backbones_inner_width() -> None:
    batch = {"input_ids": torch.randint(0, 40, (2, 12))}
    found = []
    for inner in (32, 512):
        config = BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=inner
        )
        found.append(kept(BertModel(config, add_pooling_layer=False), ss.ReadConfig(rank=4), "mean", batch))
    assert found[0] == found[1]


def bert_base() -> BertModel:
    return BertModel(BertConfig(vocab_size=100), add_pooling_layer=False)


def vit_base() -> ViTModel:
    return ViTModel(ViTConfig(), add_pooling_layer=False)


@pytest.mark.parametrize("pool", ["cls", "last"])
@pytest.mark.parametrize("family", ["bert", "vit", "llama", "t5", "timm_vit"])
def test_computing_one_token_equals_computing_all(pool: Any, family: str) -> None:
    kind = FAMILIES[family]
    if pool == "last" and kind.image is not None:
        pytest.skip("images have no last token")
    results = []
    for narrow in (True, False):
        model = ss.attach(kind.model(), ss.ReadConfig(rank=4), head=ss.Classify(num_labels=3, pool=pool))
        randomize(model, scale=0.5)
        assert model.fold.narrow == pool
        if not narrow:
            model.fold.narrow = None
        out = model(**kind.inputs(), labels=kind.labels())
        out.loss.backward()
        results.append((out.logits, {name: p.grad for name, p in model.trained_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-5, atol=1e-6, msg=name)


# --- config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("rank", 0, "rank=0, but it must be a whole number of at least 1"),
        ("rank", 1.5, "rank=1.5, but it must be a whole number"),
        ("cell", "lstm", 'cell=\'lstm\', but it must be "gru" or "rnn"'),
        ("aggregate", "sum", "aggregate='sum', but it must be"),
        ("correction", "both", "correction='both', but it must be"),
        ("scale", 0, "scale=0, but it must be a number above 0"),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ss.ReadConfig(**{field: value})
