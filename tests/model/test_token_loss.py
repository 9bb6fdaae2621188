"""A language model's loss without its logits: the same loss and gradients, less to keep, and where it does not hold."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import sidestep as ss
from architectures import CAUSAL, VOCABULARY
from sidestep.model import token_loss
from sidestep.model.token_loss import LmLossWarning
from tiny import FAMILIES, randomize

PLAIN = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**CAUSAL)),
    "qwen2, tied": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**dict(CAUSAL, tie_word_embeddings=True))),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=1)
    ),
    "t5": FAMILIES["t5"].model,
}
#: What stands between the head and the loss: scales, a soft cap, and a bias that is added outside of the head.
BEHIND = {
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**CAUSAL)),
    "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**CAUSAL)),
    "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**CAUSAL, logits_scaling=8.0)),
    "bart": lambda: t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=32,
        )
    ),
}


def attached(build: Any, lm_loss: Any = "chunked", method: ss.MethodConfig | None = None) -> ss.SideModel:
    torch.manual_seed(0)
    model = ss.attach(build().eval(), method or ss.ReadConfig(rank=4), lm_loss=lm_loss)
    randomize(model)
    return model.train()


def batch(model: ss.SideModel, labelled: int = 3) -> dict[str, Tensor]:
    """Texts of which the last tokens alone have a label."""
    ids = torch.randint(5, VOCABULARY - 1, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, -labelled:] = ids[:, -labelled:]
    if model.writes == "text2text":
        labels = ids[:, :4].clone()
        labels[0, -1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: ss.SideModel) -> Tensor:
    return torch.cat([p.grad.flatten() for _, p in model.trained_parameters() if p.grad is not None])


@pytest.mark.parametrize("items", [None, 7], ids=["mean", "items"])
@pytest.mark.parametrize("name", PLAIN)
def test_loss_and_gradients_are_the_models_own(name: str, items: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "CHUNK", 5 * VOCABULARY)  # several chunks, and one that is not full
    found = []
    for lm_loss in ("own", "chunked"):
        model = attached(PLAIN[name], lm_loss)
        given: dict[str, Any] = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
        output = model(**batch(model), **given)
        output.loss.backward()
        found.append((output.loss.detach(), gradients(model), output.logits))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-7)
    assert found[0][2] is not None
    assert found[1][2] is None


@pytest.mark.parametrize(
    ("dtype", "items", "scale"), [(torch.bfloat16, 11, 1.0), (torch.float16, 1, 2.0**16)], ids=["bfloat16", "float16"]
)
def test_a_gradient_in_half_precision_is_not_scaled_by_a_rounded_factor(
    dtype: torch.dtype, items: int, scale: float
) -> None:
    """A mean over 11 tokens is no number of bfloat16, and a scaler's factor none of float16."""
    model = attached(PLAIN["llama"])
    given = {**batch(model, 1), "num_items_in_batch": torch.tensor(items)}
    model = model.to(dtype)
    hidden: list[Tensor] = []
    model.trunk.norm.register_forward_hook(lambda module, args, output: hidden.append(output))
    (model(**given).loss * scale).backward(inputs=[hidden_of(hidden)])
    chunked = hidden_of(hidden).grad
    model.token_loss = None
    (model(**given).loss * scale).backward(inputs=[hidden_of(hidden)])
    own = hidden_of(hidden).grad
    assert chunked is not None
    assert own is not None
    assert chunked.isfinite().all()
    torch.testing.assert_close(chunked.norm(dtype=torch.float64), own.norm(dtype=torch.float64), rtol=1e-3, atol=0)


def hidden_of(seen: list[Tensor]) -> Tensor:
    """What the head read last, whose gradient is noted."""
    seen[-1].retain_grad()
    return seen[-1]


def test_no_logits_are_kept_and_one_gradient_for_each_labelled_token() -> None:
    kept = {}
    for labelled in (2, 5):
        model = attached(PLAIN["llama"])
        rows = batch(model, labelled)
        model(**rows)
        with ss.saved_bytes(model) as saved:
            model(**rows)
        kept[labelled] = saved.total
        assert all(VOCABULARY not in row.shape for row in saved.rows)
    # a position (int64) and a gradient (float32) of the width for each token more
    assert kept[5] - kept[2] == 4 * 3 * (8 + 4 * CAUSAL["hidden_size"])


@pytest.mark.parametrize("name", BEHIND)
def test_what_stands_behind_the_head_is_seen_and_the_models_own_loss_taken(name: str) -> None:
    model = attached(BEHIND[name])
    with pytest.warns(LmLossWarning, match=r"is not that of its head alone.*Its own loss is taken"):
        output = model(**batch(model))
    wanted = attached(BEHIND[name], "own")(**batch(model))
    torch.testing.assert_close(output.loss, wanted.loss)
    assert output.logits is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        model(**batch(model)).loss.backward()


def test_a_loss_with_another_term_is_seen_on_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = t.LlamaForCausalLM.loss_function.fget
    wanted = attached(PLAIN["llama"], "own")
    model = attached(PLAIN["llama"])
    expected = wanted(**batch(wanted)).loss + 0.5
    more = property(lambda self: lambda *args, **kwargs: plain(self)(*args, **kwargs) + 0.5)
    monkeypatch.setattr(t.LlamaForCausalLM, "loss_function", more)
    with pytest.warns(LmLossWarning, match="on the first batch it is"):
        loss = model(**batch(model)).loss
    torch.testing.assert_close(loss, expected)


def test_dropout_of_the_method_is_the_same_in_both_losses_of_the_first_batch() -> None:
    """Else the first batch would differ, and the model's own loss would be taken."""
    model = attached(PLAIN["llama"], method=ss.LSTConfig(reduction=2, heads=2, dropout=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch(model)).loss.backward()
    assert model.token_loss is not None
    assert model.token_loss.proved


@pytest.mark.parametrize("keep", ["replay", "int8"])
def test_it_goes_with_every_way_of_keeping(keep: Any) -> None:
    found = []
    for how in ({}, {"keep": keep, "lm_loss": "chunked"}):
        torch.manual_seed(0)
        model = ss.attach(PLAIN["llama"]().eval(), ss.ReadConfig(rank=4), **how)
        randomize(model)
        model.train()(**batch(model)).loss.backward()
        found.append(gradients(model))
    assert torch.cosine_similarity(*found, dim=0) > 0.9999


def test_outside_of_training_logits_are_there() -> None:
    model = attached(PLAIN["llama"])
    assert model.eval()(**batch(model)).logits is not None
    with torch.no_grad():
        assert model.train()(**batch(model)).logits is not None
    rows = batch(model)
    rows.pop("labels")
    assert model(**rows).logits is not None


def test_a_trained_head_takes_its_own_loss() -> None:
    torch.manual_seed(0)
    model = ss.attach(PLAIN["qwen2, tied"]().eval(), ss.FullConfig(), lm_loss="chunked").train()
    assert model(**batch(model)).logits is not None


def test_the_head_is_as_before_also_after_an_error() -> None:
    model = attached(PLAIN["llama"])
    head: nn.Module = model.backbone.get_output_embeddings()
    rows, norm = batch(model), model.trunk.norm

    def fails(*_: Any) -> None:
        raise RuntimeError("on the way")

    model(**rows)
    handle = norm.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="on the way"):
        model(**rows)
    handle.remove()
    assert "forward" not in vars(head)


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="lm_loss='fast': choose own or chunked"):
        attached(PLAIN["llama"], "fast")


def test_a_task_stores_it(tmp_path: Path) -> None:
    attached(PLAIN["llama"]).save_pretrained(tmp_path / "task")
    torch.manual_seed(0)
    loaded = ss.load(tmp_path / "task", backbone=PLAIN["llama"]().eval())
    assert loaded.settings.lm_loss == "chunked"
