"""What a caller may ask of an output besides logits: a tuple, hidden states, attentions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t

import sidestep as ss
from architectures import CAUSAL, PAIR, TEXT
from tiny import FAMILIES, LABELS

HEAD = ss.Classify(num_labels=LABELS)
READ = ss.ReadConfig(rank=2)
MODELS: dict[str, Any] = {
    "bert": lambda: t.BertModel(t.BertConfig(**TEXT, attn_implementation="eager")),
    "llama": lambda: t.LlamaModel(t.LlamaConfig(**CAUSAL, attn_implementation="eager")),
    "bart": lambda: t.BartModel(t.BartConfig(**PAIR, attn_implementation="eager")),
    "vit": lambda: t.ViTModel(
        t.ViTConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            intermediate_size=32,
            patch_size=4,
            attn_implementation="eager",
        )
    ),
}
ASKED = {"output_hidden_states": True, "output_attentions": True}


def made(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if name == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = torch.randint(3, 40, (2, 6))
    return model, {"input_ids": ids, **({"decoder_input_ids": ids[:, :3]} if name == "bart" else {})}


@pytest.mark.parametrize("name", MODELS)
def test_states_and_attentions_are_those_of_the_bare_model(name: str) -> None:
    backbone, batch = made(name)
    with torch.no_grad():
        bare = backbone(**batch, **ASKED)
        model = ss.attach(backbone, READ, head=HEAD).eval()
        found, plain = model(**batch, **ASKED), model(**batch)
    assert torch.equal(found.logits, plain.logits)
    assert set(plain.keys()) == {"logits"}
    traces = {key for key, value in bare.items() if key.endswith(("hidden_states", "attentions")) and len(value)}
    assert traces == set(found) - {"logits"}
    for key in traces:
        assert len(found[key]) == len(bare[key])
        # the last one may stand behind the final norm, where READ writes
        assert all(torch.equal(*pair) for pair in zip(found[key][:-1], bare[key][:-1], strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_tuple_holds_the_same_in_the_same_order(name: str) -> None:
    backbone, batch = made(name)
    model = ss.attach(backbone, READ, head=HEAD).eval()
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        named = model(**batch, labels=labels, **ASKED)
        found = model(**batch, labels=labels, **ASKED, return_dict=False)
        assert torch.equal(model(**batch, return_dict=False)[0], named.logits)
    assert isinstance(found, tuple)
    assert len(found) == len(named.to_tuple())
    assert torch.equal(found[0], named.loss)
    assert torch.equal(found[1], named.logits)


@pytest.mark.parametrize("pool", [None, "mean", "mean_pre_norm"])
def test_a_config_that_asks_for_tuples_is_followed(pool: Any) -> None:
    backbone, batch = made("vit")
    head = ss.Classify(num_labels=LABELS, pool=pool)
    with torch.no_grad():
        expected = ss.attach(backbone, READ, head=head).eval()
        logits = expected(**batch).logits
        expected.config.return_dict = False
        found = expected(**batch)
        assert isinstance(found, tuple)
        assert torch.equal(found[0], logits)
        assert torch.equal(expected(**batch, return_dict=True).logits, logits)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_an_own_head_gives_the_tuple_of_the_bare_model(family: str) -> None:
    kind = FAMILIES[family]
    backbone, batch = kind.model(), kind.inputs()
    words = {"t5": "decoder_input_ids", "llama": "input_ids"}
    labels = batch[words[family]] if family in words else kind.labels()
    with torch.no_grad():
        bare = backbone(**batch, labels=labels, return_dict=False)
        model = ss.attach(backbone, READ, train_head=family == "bert").eval()
        found = model(**batch, labels=labels, return_dict=False)
        named = model(**batch, labels=labels, num_items_in_batch=7)
        scaled = model(**batch, labels=labels, num_items_in_batch=7, return_dict=False)
    assert isinstance(found, tuple)
    torch.testing.assert_close(found[1], bare[1])
    torch.testing.assert_close(found[0], bare[0])
    torch.testing.assert_close(scaled[0], named.loss)


@pytest.mark.parametrize("head", [HEAD, None])
def test_a_timm_model_gives_tuples_and_refuses_the_rest_in_words(head: Any) -> None:
    kind = FAMILIES["timm_vit"]
    model = ss.attach(kind.model(), READ, head=head).eval()
    with torch.no_grad():
        logits = model(**kind.inputs(), output_attentions=False).logits
        assert torch.equal(model(**kind.inputs(), return_dict=False)[0], logits)
        for name in ASKED:
            with pytest.raises(ValueError, match=rf"{name}=True, but VisionTransformer is timm's .* leave it out"):
                model(**kind.inputs(), **{name: True})
