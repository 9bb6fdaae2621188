"""Padding: a text's answer does not depend on the batch it is in, where the bare model's own states do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor
from torch.nn import functional as F

import sidestep as ss
from architectures import TEXT
from odd_models import FSMT, GPT2, LED, MODELS, PEGASUS_X, made, texts
from sidestep.backbone import facts_of
from sidestep.backbone.facts import Added
from sidestep.fold.padding import kept_tokens, own_tokens
from tiny import FAMILIES, randomize

PAD = 1
SIDE: dict[str, Any] = {
    "probe": ss.ProbeConfig(),
    "read": ss.ReadConfig(rank=4),
    "lst": ss.LSTConfig(reduction=4),
    "unipt": ss.UniPTConfig(reduction=2),
    "sherl": ss.SherlConfig(reduction=4),
}
#: RWKV reads no mask, CLIP's text tower has its own end token, FSMT's decoder gives words, which no head reads.
#: UniPT takes bidirectional stacks alone.
BOTH_WAYS = ("llama, both ways", "xlnet", "longformer", "big bird", "bert")
PADDED = [
    (name, method)
    for name in MODELS
    for method in SIDE
    if name not in ("rwkv", "clip text", "fsmt") and (method != "unipt" or name in BOTH_WAYS)
]


def padded(ids: Tensor, tokens: int, *, left: bool = False, pad: int = PAD) -> dict[str, Tensor]:
    """The texts in a batch of longer ones."""
    sides = (tokens - ids.shape[1], 0) if left else (0, tokens - ids.shape[1])
    return {"input_ids": F.pad(ids, sides, value=pad), "attention_mask": F.pad(torch.ones_like(ids), sides)}


@pytest.mark.parametrize(
    ("name", "method", "pool"),
    [
        # each pair with one pooling in turn
        pytest.param(*pair, pool, marks=() if (number + number // 3) % 3 == turn else pytest.mark.all_laws)
        for number, pair in enumerate(PADDED)
        for turn, pool in enumerate((None, "mean", "last"))
    ],
)
def test_padding_moves_an_answer_only_where_it_moves_the_bare_model(name: str, pool: Any, method: str) -> None:
    model = made(name)
    assert facts_of(model).padding is True
    attached = ss.attach(model, SIDE[method], head=ss.Classify(num_labels=3, pool=pool)).eval()
    randomize(attached)
    ids = texts(tokens=11)
    with torch.no_grad():
        alone = attached(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        unmasked = attached(input_ids=ids).logits
        longer = attached(**padded(ids, 21)).logits
    torch.testing.assert_close(longer, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unmasked, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["read", "lst"])
def test_a_head_reads_the_tokens_of_the_text_alone(method: str) -> None:
    """Longformer fills up its tokens inside, and leaves that out of its last hidden state."""
    model = made("longformer")
    ids = texts(tokens=11)
    attached = ss.attach(model, SIDE[method], head=ss.Classify(num_labels=2))
    attached.eval()
    with torch.no_grad():
        out, reading = attached.fold.run(attached.trunk, input_ids=ids)
    assert reading.hidden.shape == out.last_hidden_state.shape == (2, 11, 16)
    assert torch.equal(reading.hidden, out.last_hidden_state)
    assert reading.site.keep.shape == (2, 11)
    assert reading.site.keep.all()


@pytest.mark.parametrize("config", [ss.ReadConfig(rank=4), ss.LSTConfig(reduction=4), ss.SherlConfig(reduction=4)])
@pytest.mark.parametrize(
    "build",
    [
        lambda: t.PegasusXForConditionalGeneration(PEGASUS_X),
        lambda: t.LEDForConditionalGeneration(LED),
        lambda: t.FSMTForConditionalGeneration(FSMT),
    ],
    ids=["pegasus-x", "led", "fsmt"],
)
def test_what_is_written_depends_on_neither_padding_nor_cache(build: Any, config: Any) -> None:
    torch.manual_seed(0)
    model = ss.attach(build().eval(), config).eval()
    randomize(model)
    ids, how = texts(tokens=11), {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    assert torch.equal(model.generate(**padded(ids, 19), **how), expected)
    assert torch.equal(model.generate(**padded(ids, 19), use_cache=False, **how), expected)


# --- padding on the left ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, method)
        for name in ("gpt2", "bert", "xglm", "opt", "mpt")
        for method in (*SIDE, "bitfit")
        # MPT has no biases
        if (method != "unipt" or name in BOTH_WAYS) and (name, method) != ("mpt", "bitfit")
    ],
)
def test_padding_on_the_left_moves_no_answer(name: str, method: str) -> None:
    model = FAMILIES["bert"].model() if name == "bert" else made(name)
    config = {**SIDE, "bitfit": ss.BitFitConfig()}[method]
    attached = ss.attach(model, config, head=ss.Classify(num_labels=3, pool="mean")).eval()
    randomize(attached)
    ids = texts(tokens=9)
    with torch.no_grad():
        alone = attached(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        left = attached(**padded(ids, 17, left=True)).logits
        positional = attached(*padded(ids, 17, left=True).values()).logits if name == "bert" else left
    torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(positional, left)


def test_the_own_head_of_a_language_model_gets_positions_too() -> None:
    torch.manual_seed(0)
    model = ss.attach(t.GPT2LMHeadModel(t.GPT2Config(**GPT2)).eval(), ss.ReadConfig(rank=4)).eval()
    randomize(model)
    ids = texts(tokens=9)
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        left = model(**padded(ids, 14, left=True)).logits[:, -9:]
        own = model(**padded(ids, 14, left=True), position_ids=torch.arange(14)[None]).logits[:, -9:]
    torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-5)
    assert (own - alone).abs().max() > 1e-3  # positions that are given are taken


def test_padding_on_the_right_leaves_positions_as_they_are() -> None:
    model = t.GPT2Model(t.GPT2Config(**GPT2)).eval()
    batch = padded(texts(tokens=9), 14)
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        attached = ss.attach(model, ss.ProbeConfig(), head=ss.Classify(num_labels=2)).eval()
        out, _ = attached.fold.run(
            attached.trunk, **attached.inputs.completed(attached.trunk, (), dict(batch), training=False)
        )
    assert torch.equal(out.last_hidden_state, before)


@pytest.mark.parametrize("name", ["led", "blenderbot", "pegasus-x"])
def test_padding_on_the_left_is_refused_where_positions_cannot_be_given(name: str) -> None:
    model = made(name)
    assert facts_of(model).left == "moved"
    attached = ss.attach(model, ss.ReadConfig(rank=4), head=ss.Classify(num_labels=2)).eval()
    ids = texts(tokens=9)
    attached(**padded(ids, 12))
    with pytest.raises(ValueError, match=r"padded on the left, and \w+ counts its positions .* Pad on the right"):
        attached(**padded(ids, 12, left=True))


# --- masks ------------------------------------------------------------------------------------------------------------


def test_a_mask_of_more_tokens_than_there_are_is_an_error() -> None:
    attached = ss.attach(made("xlnet"), ss.LSTConfig(reduction=4), head=ss.Classify(num_labels=2)).eval()
    ids = texts(tokens=9)
    with pytest.raises(ValueError, match="an attention_mask of 11 tokens, but the model reads 9"):
        kept_tokens(torch.ones(2, 11), torch.zeros(2, 9, 4), 9, 9, Added(), None)
    attached(input_ids=ids)


@pytest.mark.parametrize("config", [ss.LSTConfig(reduction=4), ss.ProbeConfig()])
def test_a_mask_of_pairs_of_tokens_is_refused_where_padding_matters(config: Any) -> None:
    model = FAMILIES["llama"].model()
    attached = ss.attach(model, config, head=ss.Classify(num_labels=2)).eval()
    mask = torch.zeros(2, 1, 9, 9)
    with pytest.raises(ValueError, match=r"an attention_mask of shape \(2, 1, 9, 9\), but .* Give a mask of \(batch"):
        attached(input_ids=texts(tokens=9), attention_mask=mask)


def test_a_tokenwise_method_under_a_language_models_head_takes_any_mask() -> None:
    attached = ss.attach(FAMILIES["llama"].model(), ss.ReadConfig(rank=4)).eval()
    assert attached(input_ids=texts(tokens=9), attention_mask=torch.zeros(2, 1, 9, 9)).logits.shape[:2] == (2, 9)


def test_inputs_that_a_model_flattens_in_front_of_its_trunk_keep_their_padding() -> None:
    """Multiple choice: (batch, choices, tokens) become (batch x choices, tokens)."""
    torch.manual_seed(0)
    model = t.BertForMultipleChoice(t.BertConfig(**TEXT)).eval()
    attached = ss.attach(model, ss.LSTConfig(reduction=4)).eval()
    randomize(attached)
    ids = texts(rows=6, tokens=9).view(2, 3, 9)
    alone = attached(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    more = {name: value.view(2, 3, 15) for name, value in padded(ids.view(6, 9), 15).items()}
    torch.testing.assert_close(attached(**more).logits, alone, rtol=1e-4, atol=1e-5)
    keep: list[Any] = []
    advance = attached.side.advance
    object.__setattr__(attached.side, "advance", lambda *given: keep.append(given[2].keep) or advance(*given))
    attached(**more)
    assert {tuple(mask.shape) for mask in keep} == {(6, 15)}


# --- the function itself ----------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    ("tokens", "added", "expected"),
    [
        (3, Added(), [[1, 1, 1], [1, 1, 0]]),
        (5, Added(), [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]),
        (5, Added(kept=True), [[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]]),
        (5, Added(before=2, cropped=True), [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
        (2, Added(), [[1, 1], [1, 0]]),
    ],
)
def test_a_mask_is_brought_to_the_tokens(tokens: int, added: Added, expected: list[list[int]]) -> None:
    found = kept_tokens(MASK, torch.zeros(2, tokens, 4), tokens, 3, added, 1)
    assert found.tolist() == [[bool(x) for x in row] for row in expected]


def test_without_a_mask_only_what_a_model_fills_up_is_padding() -> None:
    states = torch.zeros(2, 5, 4)
    assert kept_tokens(None, states, 5, 5, Added(), None) is None
    assert kept_tokens(None, states, 5, 3, Added(kept=True), None) is None
    assert kept_tokens(None, states, 5, 3, Added(), None).tolist() == [[True] * 3 + [False] * 2] * 2
    assert kept_tokens(MASK, states, 5, 3, None, None) is None


def test_own_tokens() -> None:
    tokens = torch.zeros(2, 8, 4)
    cases = {Added(): (0, 5), Added(before=3, cropped=True): (3, 8), Added(kept=True): (0, 8)}
    for added, (first, last) in cases.items():
        assert list(range(8))[own_tokens(tokens.shape[1], 5, added)] == list(range(first, last))
    assert own_tokens(1, 5, Added()) == slice(None)
    assert own_tokens(8, None, Added()) == slice(None)
