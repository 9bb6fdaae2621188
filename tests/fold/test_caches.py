"""A key-value cache that others filled is refused where this task's blocks would read what those made."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import sidestep as ss
from sidestep.methods import MethodConfig
from tiny import FAMILIES, randomize

#: Each writes in front of a block of the decoder.
LATE: dict[str, MethodConfig] = {
    "sherl": ss.SherlConfig(reduction=4, dropout=0.0),
    "dtl": ss.DTLConfig(late_blocks=2),
    "full": ss.FullConfig(),
}
#: Their blocks read what the bare backbone's do.
EARLY: dict[str, MethodConfig] = {"read": ss.ReadConfig(rank=2), "dtl": ss.DTLConfig(late_blocks=1)}
HELD, TOKENS = 4, 7


def text() -> Tensor:
    return torch.randint(3, 40, (2, TOKENS), generator=torch.Generator().manual_seed(3))


def attached(backbone: nn.Module, config: MethodConfig, seed: int = 0) -> ss.SideModel:
    model = ss.attach(backbone, config).eval()
    randomize(model, seed=seed)
    return model


def run(model: Any, family: str, ids: Tensor, **cache: Any) -> Any:
    """A pass over a part of the text: of a decoder, or behind an encoder that has all of it."""
    if FAMILIES[family].encoder_decoder:
        return model(input_ids=text(), decoder_input_ids=ids, **cache)
    return model(input_ids=ids, **cache)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("method", LATE)
@torch.no_grad()
def test_a_cache_that_others_filled_is_refused(method: str, family: str) -> None:
    """The bare backbone, another task of the same settings, or the bare backbone from where this task had come."""
    ids, backbone = text(), FAMILIES[family].model()
    other = attached(backbone, LATE[method], seed=1)
    caches = [run(model, family, ids[:, :HELD], use_cache=True).past_key_values for model in (backbone, other)]
    ss.detach(other)
    model = attached(backbone, LATE[method])
    says = "made by this task's model" if family == "t5" else "4 tokens, of which 0 went through this task's model"
    for cache in caches:
        with pytest.raises(ValueError, match=rf"{says}: start from an empty cache, or from one that the attached"):
            run(model, family, ids[:, HELD:], past_key_values=cache)
        assert cache.get_seq_length() == HELD
    mixed = run(model, family, ids[:, :HELD], use_cache=True).past_key_values
    run(model.backbone, family, ids[:, HELD : HELD + 1], past_key_values=mixed)
    with pytest.raises(ValueError, match="the cache holds 5 tokens, of which 4 went through this task's model"):
        run(model, family, ids[:, HELD + 1 :], past_key_values=mixed)


@pytest.mark.parametrize("method", EARLY)
@torch.no_grad()
def test_a_method_that_writes_behind_the_last_block_goes_on_from_any(method: str) -> None:
    ids, backbone = text(), FAMILIES["llama"].model()
    cache = backbone(input_ids=ids[:, :HELD], use_cache=True).past_key_values
    model = attached(backbone, EARLY[method])
    whole = model(input_ids=ids, use_cache=False).logits[:, HELD:]
    torch.testing.assert_close(model(input_ids=ids[:, HELD:], past_key_values=cache).logits, whole)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("method", ["sherl", "dtl"])
@torch.no_grad()
def test_its_own_cache_and_copies_are_gone_on_from(method: str, family: str) -> None:
    """Filled in several passes, copied, cropped, and by a copy of the model."""
    ids, model = text(), attached(FAMILIES[family].model(), LATE[method])
    whole = run(model, family, ids, use_cache=False).logits
    cache: Any = DynamicCache()
    if family == "t5":
        cache = EncoderDecoderCache(cache, DynamicCache())
    for part in ids[:, :HELD].split([1, 2, 1], dim=1):
        run(model, family, part, past_key_values=cache)
    twin, taken = copy.deepcopy(model), copy.deepcopy(cache)
    for runs, held in ((model, cache), (model, copy.deepcopy(taken)), (twin, taken)):
        found = run(runs, family, ids[:, HELD:], past_key_values=held).logits
        torch.testing.assert_close(found, whole[:, HELD:], rtol=1e-4, atol=1e-5)
    cache.crop(2 - TOKENS)
    found = run(model, family, ids[:, 2:], past_key_values=cache).logits
    torch.testing.assert_close(found, whole[:, 2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["sherl", "dtl"])
def test_cross_attention_of_others_is_refused_without_a_token(method: str) -> None:
    """As of a decoder that was cropped to its start, whose encoder had read the same text."""
    backbone, ids = FAMILIES["t5"].model(), text()
    cache = run(backbone, "t5", ids, use_cache=True).past_key_values
    cache.crop(-TOKENS)
    model = attached(backbone, LATE[method])
    with pytest.raises(ValueError, match="the cache holds cross-attention that was not made by this task's model"):
        run(model, "t5", ids, past_key_values=cache)


@pytest.mark.parametrize("method", ["sherl", "dtl"])
@torch.no_grad()
def test_generation_with_static_caches_equals_generation_without(method: str) -> None:
    """Twice: the backbone keeps such a cache, which the bare backbone fills between."""
    backbone, common = FAMILIES["llama"].model(), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    model = attached(backbone, LATE[method])
    plain = model.generate(text(), use_cache=False, **common)
    for _ in range(2):
        assert torch.equal(model.generate(text(), cache_implementation="static", **common), plain)
        backbone.generate(text(), cache_implementation="static", **common)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", ["sherl", "dtl"])
@torch.no_grad()
def test_generation_goes_on_from_a_copied_prompt(method: str, beams: int) -> None:
    """The prompt's cache is filled once and copied for each text that begins with it."""
    model = attached(FAMILIES["llama"].model(), LATE[method])
    common = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    ids = text()
    prompt = model(input_ids=ids[:, :HELD].repeat_interleave(beams, 0), use_cache=True).past_key_values
    plain = model.generate(ids, use_cache=False, **common)
    for _ in range(2):
        assert torch.equal(model.generate(ids, past_key_values=copy.deepcopy(prompt), **common), plain)
