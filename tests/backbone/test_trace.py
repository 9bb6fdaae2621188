"""What a traced pass finds, kind by kind: each on several models, and against what the models do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as t
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

import sidestep as ss
from architectures import ARCHITECTURES, CAUSAL, TEXT, VOCABULARY
from odd_models import MODELS, RECURRENT_GEMMA, made, texts
from prefix_lm import PicturePrefix, PrefixConfig, TypedPrefix
from sidestep.backbone import facts_of, find_places, said_causal, without_values
from sidestep.backbone.facts import Added, Facts
from sidestep.backbone.trace import KEPT_ON
from sidestep.fold import FoldError
from tiny import FAMILIES, FURTHER, randomize

CAUSAL_OF = {
    **dict.fromkeys(
        ["mpt", "xglm", "bloom", "mamba", "rwkv", "mixtral", "bert, decoder", "clip text", "opt", "gpt2"], "yes"
    ),
    **dict.fromkeys(["llama, both ways", "xlnet", "longformer", "big bird"], "no"),
}


def hidden(model: Any, ids: Tensor, **more: Any) -> Tensor:
    """The bare model's last hidden state."""
    with torch.no_grad():
        return model(input_ids=ids, **more).last_hidden_state


# --- causal or not ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL_OF)
def test_causality_is_what_the_model_does(name: str) -> None:
    model = made(name)
    ids = texts()
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 3) % 20 + 5
    moved = (hidden(model, ids)[:, :-1] - hidden(model, other)[:, :-1]).abs().max().item()
    assert facts_of(model).source == "traced"
    assert facts_of(model).head.causal == CAUSAL_OF[name]
    assert (moved > 1e-4) == (CAUSAL_OF[name] == "no")
    pool = ss.attach(model, ss.ProbeConfig(), head=ss.Classify(num_labels=2)).pool
    assert (pool == "last") == (CAUSAL_OF[name] == "yes")


@pytest.mark.parametrize("name", CAUSAL_OF)
def test_causality_is_seen_in_16_bits_too(name: str) -> None:
    facts = facts_of(made(name).bfloat16())
    assert facts.source == "traced"
    assert facts.head.causal == CAUSAL_OF[name]


@pytest.mark.parametrize("name", [name for name, causal in CAUSAL_OF.items() if causal == "yes"])
def test_a_method_that_mixes_tokens_reads_none_that_its_backbone_does_not(name: str) -> None:
    model = ss.attach(made(name), ss.LSTConfig(reduction=4), head=ss.Classify(num_labels=2, pool="cls")).eval()
    randomize(model)
    ids = texts()
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 3) % 20 + 5
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=other).logits, rtol=1e-5, atol=1e-5)
    ss.detach(model)
    with pytest.raises(ss.UnsupportedBackbone, match="this backbone is causal"):
        ss.attach(model.backbone, ss.UniPTConfig(reduction=2), head=ss.Classify(num_labels=2))


@pytest.mark.parametrize("kind", [TypedPrefix, PicturePrefix])
@pytest.mark.parametrize(("both_ways", "causal"), [(1, "partly"), (0, "no"), (None, "yes")])
def test_a_model_that_sees_a_prefix_both_ways_is_told_as_causal_in_part(
    kind: Any, both_ways: int | None, causal: str
) -> None:
    torch.manual_seed(0)
    facts = facts_of(kind(PrefixConfig(both_ways=both_ways)).eval())
    assert facts.head.causal == causal
    assert list(facts.stacks) == ["encoder" if causal == "no" else "decoder"]


def test_a_vision_language_model_whose_answers_alone_see_earlier_ones_is_causal_in_part() -> None:
    """PaliGemma's prompts see each other both ways, and its answers, which have another type, see what came before."""
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = t.PaliGemmaForConditionalGeneration(
        t.PaliGemmaConfig(
            vision_config=t.SiglipVisionConfig(**tower, image_size=8, patch_size=4),
            text_config=t.GemmaConfig(**tower, vocab_size=40, num_key_value_heads=2, head_dim=8),
            image_token_index=39,
            projection_dim=16,
        )
    ).eval()
    facts = facts_of(model)
    assert facts.source == "traced"
    assert {name: stack.causal for name, stack in facts.stacks.items()} == {"decoder": "partly"}


def test_a_model_whose_tokens_tell_each_other_nothing_is_what_the_table_says() -> None:
    """As with weights of zero: no token moves with another one, which is no sign of causality."""
    model = made("llama, both ways")
    assert facts_of(model).head.causal == "no"
    for values in (CAUSAL, {**CAUSAL, "is_causal": False}):
        silent = t.LlamaModel(t.LlamaConfig(**values)).eval()
        for layer in silent.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
        assert facts_of(silent).head.causal == ("yes" if values is CAUSAL else "no")


# --- both ways to find them -------------------------------------------------------------------------------------------

EVERY = {
    **{name: kind.model for name, kind in ARCHITECTURES.items()},
    **{name: lambda n=name: made(n) for name in MODELS},
    "llava": FURTHER["llava"].model,
}
#: Their forward asks for values.
NEEDS_VALUES = ("longformer", "led", "fsmt")


@pytest.mark.parametrize("name", [name for name in EVERY if name not in NEEDS_VALUES])
def test_shapes_and_the_table_say_what_the_pass_of_the_model_shows(name: str) -> None:
    model = EVERY[name]()
    real = facts_of(model)
    trunk = getattr(model, "base_model", model)
    vars(trunk).pop(KEPT_ON)
    shapes = facts_of(without_values(model))
    assert (real.source, shapes.source) == ("traced", "shapes")
    assert list(shapes.stacks) == list(real.stacks)
    for stack, found in shapes.stacks.items():
        expected = real.stacks[stack]
        for what in ("causal", "layout", "element", "widths", "norm", "ends"):
            assert getattr(found, what) == getattr(expected, what), f"{what} of the {stack}"


@pytest.mark.parametrize("name", NEEDS_VALUES)
def test_a_model_that_asks_for_values_is_guessed_without_them(name: str) -> None:
    assert facts_of(without_values(made(name))).source == "guessed"


def test_a_dispatched_model_takes_its_shapes_and_the_tables_word() -> None:
    model = made("mpt")
    for block in model.blocks:
        add_hook_to_module(block, ModelHook())
    forward = model.blocks[0].forward
    facts = facts_of(model)
    assert facts.source == "shapes"
    assert facts.head == replace(facts_of(made("mpt")).head, added=facts.head.added)
    assert model.blocks[0].forward is forward
    attached = ss.attach(model, ss.ReadConfig(rank=2), head=ss.Classify(num_labels=2))
    attached(input_ids=texts(), labels=torch.tensor([0, 1])).loss.backward()


def test_a_side_network_is_where_an_offloaded_backbone_is_computed() -> None:
    model = FAMILIES["llama"].build().eval()
    expected = hidden(model.model, texts())
    offloaded = cpu_offload(model, execution_device="cpu")
    attached = ss.attach(offloaded, ss.ReadConfig(rank=2), head=ss.Classify(num_labels=2, pool="mean"))
    assert attached.facts.source == "shapes"
    with torch.no_grad():
        _, reading = attached.eval().fold.run(attached.trunk, input_ids=texts())
    torch.testing.assert_close(reading.hidden, expected)
    attached.train()(input_ids=texts(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for _, p in attached.trained_parameters())


def test_said_causality_follows_the_config() -> None:
    assert said_causal(t.LlamaModel(t.LlamaConfig(**CAUSAL)))
    assert not said_causal(t.LlamaModel(t.LlamaConfig(**CAUSAL, is_causal=False)))
    assert not said_causal(t.BertModel(t.BertConfig(**TEXT)))
    assert said_causal(t.BertLMHeadModel(t.BertConfig(**TEXT, is_decoder=True)))


def test_an_encoder_of_sounds_is_none_of_the_decoder_that_shares_its_config() -> None:
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config = t.WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=16, decoder_layers=1)
    model = t.WhisperForAudioClassification(config).eval()
    facts = facts_of(model)
    assert (facts.source, list(facts.stacks), facts.head.causal) == ("traced", ["encoder"], "no")
    with torch.no_grad():
        sound = torch.randn(1, 8, 32)
        other = sound.clone()
        other[..., -4:] *= -1
        one, two = (model.encoder(x).last_hidden_state[:, :-4] for x in (sound, other))
    assert (one - two).abs().max() > 0  # exactly zero behind a causal mask


# --- axes -------------------------------------------------------------------------------------------------------------


def test_tokens_first_is_seen_and_read_as_batch_first() -> None:
    model = made("xlnet")
    assert facts_of(model).head.layout == "tokens first"
    ids = texts(rows=3)
    expected = hidden(model, ids)
    attached = ss.attach(model, ss.ProbeConfig(), head=ss.Classify(num_labels=2, pool="mean")).eval()
    with torch.no_grad():
        _, reading = attached.fold.run(attached.trunk, input_ids=ids)
        assert torch.equal(reading.hidden, expected)
        assert attached(input_ids=ids).logits.shape == (3, 2)


@pytest.mark.parametrize("config", [ss.ReadConfig(rank=4), ss.LSTConfig(reduction=4), ss.UniPTConfig(reduction=2)])
def test_methods_learn_where_tokens_come_first(config: Any) -> None:
    attached = ss.attach(made("xlnet"), config, head=ss.Classify(num_labels=2)).train()
    randomize(attached)
    attached(input_ids=texts(rows=3), labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in attached.trained_parameters())


class Streams(nn.Module):
    """A block of hyper-connections: it hands on several streams of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.norm(hidden)


class FourDimensional(TypedPrefix):
    def __init__(self, config: PrefixConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(Streams() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = self.embed(input_ids)[:, :, None].expand(-1, -1, 4, -1)
        for block in self.blocks:
            hidden = block(hidden)
        return t.modeling_outputs.BaseModelOutput(last_hidden_state=hidden.mean(2))


def test_text_states_of_four_axes_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"^FourDimensional cannot be folded over: .*blocks.0 .* shape \(4, 9, 4, 16\)"
    ):
        ss.attach(FourDimensional(PrefixConfig()), ss.ReadConfig(rank=2))


def test_a_head_that_gives_no_row_for_each_row_is_an_error() -> None:
    """Here a model that puts the rows of its batch together, in training alone."""
    model = FAMILIES["bert"].model()
    attached = ss.attach(model, ss.ProbeConfig(), head=ss.Classify(num_labels=2))
    attached.trunk.embeddings.register_forward_hook(lambda m, args, out: out.reshape(1, -1, out.shape[-1]))
    batch = FAMILIES["bert"].inputs()
    with pytest.raises(FoldError, match="the head gave 1 rows for a batch of 4"):
        attached(input_ids=batch["input_ids"], labels=torch.tensor([0, 1, 0, 1]))


# --- the final norm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("blenderbot", [None, None]),
        ("led", [None, None]),
        ("pegasus-x", ["encoder.layer_norm", "decoder.layer_norm"]),
        ("opt", ["decoder.final_layer_norm"]),
        ("mamba", ["norm_f"]),
        ("rwkv", ["ln_out"]),
        ("fsmt", [None, None]),
        ("clip text", ["final_layer_norm"]),
    ],
)
def test_the_norm_is_what_the_last_block_feeds(name: str, norms: list[str | None]) -> None:
    model = made(name)
    assert [stack.norm for stack in facts_of(model).stacks.values()] == norms


def test_a_norm_behind_a_pooling_is_none() -> None:
    config = t.CLIPConfig(text_config=TEXT, vision_config={**IMAGES, "projection_dim": 16}, projection_dim=16)
    model = t.CLIPForImageClassification(config).eval()
    assert facts_of(model).head.norm is None
    ss.attach(model, ss.ReadConfig(rank=2))(pixel_values=torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1]))


IMAGES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32} | {
    "image_size": 16,
    "patch_size": 4,
}


class Pooled(t.BertModel):
    """Its last hidden state is no row of tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        output.last_hidden_state = output.last_hidden_state.mean(1)
        return output


def test_a_head_is_refused_where_there_is_no_last_hidden_state_of_tokens() -> None:
    model = Pooled(t.BertConfig(**TEXT), add_pooling_layer=False).eval()
    with pytest.raises(ss.UnsupportedBackbone, match=r"a Classify head does not work on Pooled.*this model gives none"):
        ss.attach(model, ss.ReadConfig(rank=2), head=ss.Classify(num_labels=2))


def test_an_own_head_reads_what_follows_the_last_block() -> None:
    """OPT-350m projects what its last block gives."""
    config = t.OPTConfig(**{**TEXT, "ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False})
    model = t.OPTForCausalLM(config).eval()
    assert not facts_of(model).head.ends
    assert facts_of(model).head.after == 8
    ids = texts()
    ss.attach(model, ss.ReadConfig(rank=2)).train()(input_ids=ids, labels=ids).loss.backward()


class Twice(t.BertModel):
    """Its blocks run over two inputs, one after the other."""

    def __init__(self) -> None:
        super().__init__(t.BertConfig(**TEXT), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        super().forward(input_ids=input_ids.flip(1), attention_mask=attention_mask)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


# --- what the trace contradicts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (
            lambda: t.FunnelModel(t.FunnelConfig(vocab_size=VOCABULARY, d_model=16, n_head=2, d_head=8, d_inner=32)),
            "none of its blocks runs in a pass|the number of tokens changes",
        ),
        (Twice, "its block .* does not run on what .* gave"),
    ],
    ids=["skipped", "several inputs"],
)
def test_what_no_fold_can_follow_is_refused_at_attach_and_nothing_is_left(
    build: Callable[[], nn.Module], why: str
) -> None:
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=why):
        ss.attach(model, ss.ReadConfig(rank=2))
    assert state(model) == before


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """Which modules a model has, in which mode, with which hooks, and which parameters require a gradient."""
    modules = [(name, id(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()]
    return modules + [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


# --- stacks that take a look ------------------------------------------------------------------------------------------


def test_a_shared_block_has_a_place_for_each_visit() -> None:
    model = FURTHER["albert"].model()
    blocks = [place for place in find_places(model) if place.site.kind == "block"]
    assert [place.site.index for place in blocks] == [0, 1, 2]
    assert len({place.module for place in blocks}) == 1


def test_a_vision_language_models_stack_is_its_language_model() -> None:
    places = find_places(FURTHER["llava"].model())
    assert all(place.name.startswith("language_model.") for place in places)
    assert len([place for place in places if place.site.kind == "block"]) == 3


def test_a_mask_of_samples_is_brought_to_the_tokens_that_are_made_of_them() -> None:
    """What stands in masked samples moves no prediction."""
    family = FURTHER["wav2vec2"]
    model = ss.attach(family.model(), ss.ReadConfig(rank=2), head=ss.Classify(num_labels=2, pool="mean"))
    randomize(model)
    model.eval()
    batch = family.inputs()
    other = {**batch, "input_values": batch["input_values"].clone()}
    other["input_values"][-1, family.samples // 2 + 10 :] = 1.0
    alone = {name: value[-1:, : family.samples // 2] for name, value in batch.items()}
    with torch.no_grad():
        first, moved, own = (model(**each).logits for each in (batch, other, alone))
    torch.testing.assert_close(moved, first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own[0], first[-1], rtol=0.1, atol=0.05)  # the front's edge is another one


@pytest.mark.parametrize("name", ["swinv2", "convnext"])
def test_blocks_are_looked_for_within_stages(name: str) -> None:
    blocks = [place.site for place in find_places(FURTHER[name].model()) if place.site.kind == "block"]
    assert [(site.stage, site.width) for site in blocks] == [(0, 8), (0, 8), (1, 16), (1, 16)]
    assert all(site.spatial for site in blocks)


# --- kept on the backbone ---------------------------------------------------------------------------------------------


def test_facts_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[Any] = []
    from sidestep.backbone import watch

    run = watch.output_of
    monkeypatch.setattr(watch, "output_of", lambda trunk, inputs: passes.append(trunk) or run(trunk, inputs))
    backbone = FAMILIES["bert"].build().eval()
    ss.detach(ss.attach(backbone, ss.ReadConfig(rank=2)))
    first = len(passes)
    assert first > 0
    for config in (ss.LoraConfig(rank=2), ss.ProbeConfig(), ss.LSTConfig(reduction=2)):
        ss.detach(ss.attach(backbone, config))
    assert len(passes) == first
    backbone.config.is_decoder = True  # another config is another model
    facts_of(backbone)
    assert len(passes) > first


def test_a_banks_switches_do_not_trace_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from sidestep.backbone import watch

    backbone = FAMILIES["bert"].model()
    bank = ss.TaskBank(backbone)
    for name, config in {"one": ss.LoraConfig(rank=2), "two": ss.ReadConfig(rank=2)}.items():
        model = ss.attach(backbone, config, head=ss.Classify(num_labels=2))
        bank.add(name, model)
        ss.detach(model)

    def refuse(*_: Any) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(watch, "output_of", refuse)
    for name in ("one", "two", "one"):
        bank.run(name, FAMILIES["bert"].inputs())
    bank.close()


def test_facts_found_without_values_are_found_again_with_them() -> None:
    with torch.device("meta"):
        model = t.LlamaModel(t.LlamaConfig(**CAUSAL))
    assert facts_of(model).source == "shapes"
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert facts_of(model).source in ("traced", "guessed")


# --- caches -----------------------------------------------------------------------------------------------------------


def language_model(name: str) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3}
    return {
        "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(**sizes, state_size=4)),
        "rwkv": lambda: t.RwkvForCausalLM(t.RwkvConfig(**sizes)),
        "recurrent gemma": lambda: t.RecurrentGemmaForCausalLM(RECURRENT_GEMMA),
    }[name]().eval()


@pytest.mark.parametrize(("name", "cache"), [("mamba", "cache_params"), ("rwkv", "state")])
def test_a_memory_under_another_name_is_no_cache_for_a_method_that_mixes_tokens(name: str, cache: str) -> None:
    model = ss.attach(language_model(name), ss.LSTConfig(reduction=4)).eval()
    randomize(model)
    ids = texts(rows=1)
    assert model.facts.caches == (cache,)
    assert not model.caches
    with pytest.raises(ValueError, match=r"lst mixes tokens, so a cache .* pass use_cache=False"):
        model.generate(ids, max_new_tokens=2)
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
    with pytest.raises(FoldError, match=f"^{cache} holds what the model knows of earlier tokens"):
        model(input_ids=ids[:, -1:], use_cache=True, **{cache: out[cache]})
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": False}
    written = model.generate(ids, **how)
    for end in range(ids.shape[1], written.shape[1]):
        with torch.no_grad():
            assert model(input_ids=written[:, :end], use_cache=False).logits[0, -1].argmax() == written[0, end]


def test_a_memory_inside_of_the_modules_is_no_cache_either() -> None:
    model = ss.attach(language_model("recurrent gemma"), ss.LSTConfig(reduction=4)).eval()
    assert model.facts.caches == ()
    with pytest.raises(ValueError, match=r"lst mixes tokens, so a cache .* pass use_cache=False"):
        model.generate(texts(rows=1), max_new_tokens=2)


@pytest.mark.parametrize("name", ["mamba", "recurrent gemma"])
def test_a_tokenwise_method_goes_on_from_any_memory(name: str) -> None:
    model = ss.attach(language_model(name), ss.ReadConfig(rank=4)).eval()
    randomize(model)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    ids = texts(rows=2)
    assert torch.equal(model.generate(ids, **how), model.generate(ids, use_cache=False, **how))


# --- small parts ------------------------------------------------------------------------------------------------------


def test_places_carry_what_was_found() -> None:
    sites = [place.site for place in find_places(made("mpt"))]
    assert all(site.causal and site.stack == "decoder" for site in sites)
    assert facts_of(made("longformer")).head.added == Added(cropped=True)


def test_facts_are_plain_data() -> None:
    import copy
    import pickle

    facts = facts_of(made("gpt2"))
    assert isinstance(facts, Facts)
    assert pickle.loads(pickle.dumps(facts)) == copy.deepcopy(facts) == facts


# --- blocks that a fold could follow, and no gradient could ----------------------------------------------------------


class Own(torch.autograd.Function):
    """Marks what it gives as having a gradient, though nothing that it is given has one."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Any:
        return gradient[0]


class Graded(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.block, self.weight = nn.LayerNorm(16), block, nn.Parameter(torch.ones(16))

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        return Own.apply(self.block(hidden, seen) * self.weight.detach().requires_grad_())


class Reversible(TypedPrefix):
    """Its blocks run without autograd, as those of Reformer do."""

    def run(self, *given: Any) -> Any:
        with torch.no_grad():
            return super().run(*given)


def test_blocks_that_make_a_gradient_of_their_own_are_refused() -> None:
    model = TypedPrefix(PrefixConfig()).eval()
    model.blocks = nn.ModuleList(Graded(block) for block in model.blocks)
    with pytest.raises(ValueError, match=r"its block blocks\.0 has a gradient, though the whole model is frozen"):
        ss.attach(model, ss.ReadConfig(rank=2))


def test_blocks_that_run_without_autograd_are_refused() -> None:
    with pytest.raises(ValueError, match=r"its block blocks\.0 runs without autograd"):
        ss.attach(Reversible(PrefixConfig()).eval(), ss.ReadConfig(rank=2))


def test_embeddings_that_require_a_gradient_leave_a_weight_delta_alone() -> None:
    """PEFT's preparation for LoRA asks for that; a side network refuses it in its first pass."""
    model = made("gpt2")
    model.enable_input_require_grads()
    attached = ss.attach(model, ss.BitFitConfig(), head=ss.Classify(num_labels=2)).train()
    attached(input_ids=texts(), labels=torch.tensor([0, 1])).loss.backward()


def test_a_norm_that_runs_before_the_blocks_too_ends_the_stack() -> None:
    torch.manual_seed(0)
    sizes = {name: value for name, value in CAUSAL.items() if name != "head_dim"}
    model = t.NanoChatForCausalLM(t.NanoChatConfig(**sizes)).eval()
    assert facts_of(model).head.norm == "norm"
    attached = ss.attach(model, ss.ProbeConfig(), head=ss.Classify(num_labels=2, pool="mean")).eval()
    with torch.no_grad():
        out, reading = attached.fold.run(attached.trunk, input_ids=texts())
    assert torch.equal(reading.hidden, out.last_hidden_state)
