"""Several texts in one row: read as if each were alone, or refused with the setting to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from torch.nn import functional as F

import sidestep as ss
from architectures import CAUSAL, TEXT, VOCABULARY
from causal_models import APART, METHODS, TOGETHER, attached, bare
from sidestep.backbone import facts_of
from sidestep.fold.packing import is_packed

LENGTHS = (4, 1, 6, 5)
"""One of them of a single token: its position is no smaller than the one before it."""


def texts() -> list[Tensor]:
    return [torch.randint(3, VOCABULARY, (1, length)) for length in LENGTHS]


def row(rows: list[Tensor]) -> dict[str, Tensor]:
    """The texts behind each other in one row."""
    return {
        "input_ids": torch.cat(rows, 1),
        "position_ids": torch.cat([torch.arange(text.shape[1]) for text in rows])[None],
    }


def loss_of(logits: Tensor, ids: Tensor, first: Tensor) -> Tensor:
    """The sum over the tokens that are not the first of a text."""
    labels = ids.masked_fill(first, -100)
    return F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")


def gradients(model: ss.SideModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.trained_parameters() if p.grad is not None}


def headless(model: ss.SideModel, **batch: Any) -> Tensor:
    """The logits as TRL's trainers compute them: without the model's own forward."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return F.linear(model.base_model(**batch).last_hidden_state, head.weight, head.bias)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # PEFT's, of GPT-2's Conv1D
@pytest.mark.parametrize("run", [lambda model, **batch: model(**batch).logits, headless], ids=["whole", "headless"])
@pytest.mark.parametrize("backbone", APART)
@pytest.mark.parametrize("method", METHODS)
def test_texts_of_one_row_train_as_texts_alone(method: str, backbone: str, run: Callable[..., Tensor]) -> None:
    if method == "bitfit" and backbone == "llama":
        pytest.skip("has no biases")
    model = attached(APART[backbone], METHODS[method]).train()
    rows = texts()
    together = row(rows)
    loss = loss_of(run(model, **together), together["input_ids"], together["position_ids"] == 0)
    found = gradients(model, loss)
    alone = [loss_of(run(model, input_ids=text), text, torch.arange(text.shape[1])[None] == 0) for text in rows]
    expected = gradients(model, torch.stack(alone).sum())
    torch.testing.assert_close(loss, torch.stack(alone).sum(), rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    assert any(bool(value.any()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("backbone", APART)
def test_texts_of_one_row_are_read_as_texts_alone_in_eval_mode_too(backbone: str) -> None:
    # transformers' own default would be a cache, and with one it takes a row for one text
    model = attached(APART[backbone], ss.ReadConfig(rank=4)).eval()
    rows = texts()
    with torch.no_grad():
        parts = model(**row(rows)).logits.split([text.shape[1] for text in rows], dim=1)
        for text, part in zip(rows, parts, strict=True):
            torch.testing.assert_close(part, model(input_ids=text).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", TOGETHER)
def test_backbones_that_read_a_row_as_one_text_are_refused(backbone: str) -> None:
    assert not facts_of(bare(TOGETHER[backbone])).packs
    model = attached(TOGETHER[backbone], ss.ReadConfig(rank=4))
    with pytest.raises(
        ValueError, match=r"reads a row as one text all the same: .*packing=False and padding_free=False"
    ):
        model(**row(texts()))
    model(input_ids=texts()[0])


@pytest.mark.parametrize("backbone", APART)
def test_methods_that_mix_tokens_are_refused(backbone: str) -> None:
    model = attached(APART[backbone], ss.LSTConfig(reduction=4))
    with pytest.raises(
        ValueError, match=r"LST mixes tokens, .* packing=False and padding_free=False\), or take a method"
    ):
        model(**row(texts()))
    model(input_ids=torch.cat(texts(), 1), position_ids=torch.arange(sum(LENGTHS))[None] + 3)


def test_a_mask_a_cache_and_a_head_make_one_text_of_a_row() -> None:
    model, together = attached(APART["llama"], ss.ReadConfig(rank=4)), row(texts())
    with pytest.raises(ValueError, match="with an attention_mask LlamaForCausalLM reads a row as one text: leave the"):
        model(**together, attention_mask=torch.ones_like(together["input_ids"]))
    with pytest.raises(ValueError, match=r"with a key-value cache .* pass use_cache=False"):
        model(**together, use_cache=True)
    with pytest.raises(ValueError, match="give each prompt a row of its own"):
        model.generate(**together)
    pooled = ss.attach(ss.detach(model), ss.ReadConfig(rank=4), head=ss.Classify(num_labels=3))
    with pytest.raises(ValueError, match="the head reads one text of each row"):
        pooled(**together)


@pytest.mark.parametrize(("backbone", "apart"), [("llama", True), ("opt", False)])
def test_a_backbone_that_was_not_run_at_attach_is_tried_when_rows_are_packed(
    backbone: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as a quantised one: nothing of it is run then
    monkeypatch.setattr("sidestep.backbone.trace.has_values", lambda model: False)
    model = attached((APART | TOGETHER)[backbone], ss.ReadConfig(rank=4))
    assert model.inputs.packs is None
    for _ in range(2):
        if apart:
            model(**row(texts()))
        else:
            with pytest.raises(ValueError, match="reads a row as one text all the same"):
                model(**row(texts()))
        assert model.inputs.packs is apart


def test_a_mask_of_the_callers_own_may_keep_texts_apart() -> None:
    model, rows = attached(APART["llama"], ss.ReadConfig(rank=4)).eval(), texts()
    number = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(LENGTHS))
    own = (number[:, None] == number) & torch.ones(sum(LENGTHS), sum(LENGTHS)).tril().bool()
    with torch.no_grad():
        expected = model(**row(rows)).logits
        torch.testing.assert_close(model(**row(rows), attention_mask=own[None, None]).logits, expected)


def test_a_compiled_pass_reads_them_alike_or_refuses_them_too() -> None:
    small = t.LlamaConfig(**{**CAUSAL, "num_hidden_layers": 1})
    together, plain = row(texts()), torch.arange(sum(LENGTHS))[None]
    with torch.no_grad():
        model = attached(lambda: t.LlamaForCausalLM(small), ss.ReadConfig(rank=4)).eval()
        expected = model(**together).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**together).logits, expected)
        mixes = torch.compile(
            attached(lambda: t.LlamaForCausalLM(small), ss.LSTConfig(reduction=4)).eval(), backend="eager"
        )
        mixes(input_ids=together["input_ids"], position_ids=plain)
        with pytest.raises(RuntimeError, match="LST mixes tokens"):
            mixes(**together)


def test_an_encoders_positions_may_be_anything_for_methods_that_treat_tokens_alone() -> None:
    model = attached(lambda: t.BertForMaskedLM(t.BertConfig(**TEXT)), ss.ReadConfig(rank=4))
    model(**row(texts()))


def nothing() -> str | None:
    """No reason to refuse anything."""
    return None


@pytest.mark.parametrize(
    ("positions", "mask", "expected"),
    [
        ([0, 1, 0, 1], None, True),
        ([0, 0, 1, 2], None, True),
        ([0, 1, 5, 6], None, True),  # so does transformers
        ([3, 4, 5, 6], None, False),
        ([0, 1, 0, 1], [1, 1, 1, 1], True),
        ([0, 0, 1, 2], [1, 1, 1, 1], True),
        ([0, 1, 0, 0], [1, 1, 0, 0], False),
        ([1, 1, 0, 1], [0, 0, 1, 1], False),
        ([0, 1, 9, 0], [1, 1, 0, 1], True),
        ([0, 1, 9, 2], [1, 1, 0, 1], False),
        ([0], None, False),
    ],
)
def test_a_row_is_packed_where_positions_of_kept_tokens_start_again(
    positions: list[int], mask: list[int] | None, expected: bool
) -> None:
    given = {"position_ids": torch.tensor([positions])}
    if mask is not None:
        given["attention_mask"] = torch.tensor([mask])
    assert is_packed(given, nothing) is expected
    if expected:
        with pytest.raises(ValueError, match=r"within a row .*, and so it is"):
            is_packed(given, lambda: "so it is")


def test_what_is_no_position_of_a_token_tells_nothing() -> None:
    assert not is_packed({}, nothing)
    assert not is_packed(
        {"position_ids": torch.zeros(3, 2, 5)}, nothing
    )  # three positions a token, of rows and columns
    assert not is_packed({"position_ids": torch.zeros(2, 5, device="meta")}, nothing)
