"""The fold carries a method's four calls through the model's own loop, and refuses what it cannot fold over."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import sidestep as ss
from architectures import ARCHITECTURES
from sidestep.backbone import facts_of, find_places
from sidestep.backbone.trace import KEPT_ON
from sidestep.fold import FoldError
from sidestep.interface.sites import Site
from sidestep.methods import SideNet
from tiny import FAMILIES, LABELS, logits
from toys import ToyConfig, attach_toy

HEAD = ss.Classify(num_labels=LABELS)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def noise(like: Tensor, seed: int = 5) -> Tensor:
    """Random values of the same shape: another one for every token and channel."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


class Plain(SideNet):
    """A method that does nothing; tests override one call."""

    def __init__(self, config: ToyConfig, sites: Sequence[Site]) -> None:
        super().__init__()


# --- step: a hidden that is written arrives ------------------------------------------------------------------


def writer(kind: str, index: int) -> type[SideNet]:
    """A method that adds noise at one site."""

    class Writer(Plain):
        def write(self, state: Any, hidden: Tensor, site: Site) -> tuple[Any, Tensor]:
            here = (site.kind, site.index) == (kind, index)
            return state, hidden + noise(hidden) if here else hidden

    return Writer


def add(hidden: Tensor) -> Tensor:
    """What `writer` adds, to tokens or to a grid of tokens."""
    tokens = hidden.flatten(1, -2)
    return hidden + noise(tokens).view_as(hidden)


def bert_by_hand(model: nn.Module, batch: dict[str, Tensor], where: tuple[str, int]) -> Tensor:
    trunk: Any = model.base_model
    hidden = trunk.embeddings(batch["input_ids"])
    for index, block in enumerate(trunk.encoder.layer):
        hidden = add(hidden) if where == ("stage", index) else hidden
        hidden = first(block(hidden))
        hidden = add(hidden) if where == ("block", index) else hidden
    return model.classifier(trunk.pooler(hidden))


def vit_by_hand(model: nn.Module, batch: dict[str, Tensor], where: tuple[str, int]) -> Tensor:
    trunk: Any = model.base_model
    hidden = trunk.embeddings(batch["pixel_values"])
    for place in find_places(model):
        if place.site.kind == "block":
            hidden = add(hidden) if where == ("stage", place.site.index) else hidden
            hidden = first(place.module(hidden))
            hidden = add(hidden) if where == ("block", place.site.index) else hidden
    return model.classifier(trunk.layernorm(hidden)[:, 0])


def timm_swin_by_hand(model: Any, batch: dict[str, Tensor], where: tuple[str, int]) -> Tensor:
    hidden, index = model.patch_embed(batch["pixel_values"]), 0
    for stage in model.layers:
        hidden = stage.downsample(hidden)
        for block in stage.blocks:
            assert hidden.ndim == 4
            hidden = add(hidden) if where == ("stage", index) else hidden
            hidden = block(hidden)
            hidden = add(hidden) if where == ("block", index) else hidden
            index += 1
    return model.head(model.norm(hidden))


BY_HAND: dict[str, tuple[Callable[[], nn.Module], str, Callable[..., Tensor]]] = {
    "bert": (FAMILIES["bert"].model, "bert", bert_by_hand),
    "vit": (FAMILIES["vit"].model, "vit", vit_by_hand),
    "timm_swin": (ARCHITECTURES["timm swin"].model, "swin", timm_swin_by_hand),
}


@pytest.mark.parametrize(
    ("family", "kind", "index"),
    [
        *((family, "stage", 0) for family in BY_HAND),
        *((family, "block", 1) for family in BY_HAND),
        ("timm_swin", "stage", 2),
        ("timm_swin", "block", 2),
    ],
)
@torch.no_grad()
def test_a_written_hidden_arrives(family: str, kind: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build, inputs, by_hand = BY_HAND[family]
    batch = {name: value for name, value in FAMILIES[inputs].inputs().items() if name != "attention_mask"}
    backbone = build()
    bare = by_hand(backbone, batch, ("nowhere", 0))
    model = attach_toy(monkeypatch, writer(kind, index), backbone)
    out = logits(model(**batch))
    torch.testing.assert_close(out, by_hand(backbone, batch, (kind, index)), rtol=1e-5, atol=1e-6)
    assert (out - bare).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["swin", "timm_swin"])
def test_sites_know_their_grid(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[Any] = []

    class Looks(Plain):
        def step(self, state: Any, codes: Tensor, site: Site) -> Any:
            assert site.grid is not None
            assert codes.shape[1:] == (site.grid[0] * site.grid[1], site.width)
            grids.append((site.kind, site.grid))
            return state

    backbone = ARCHITECTURES["timm swin"].model() if family == "timm_swin" else FAMILIES["swin"].model()
    attach_toy(monkeypatch, Looks, backbone)(**FAMILIES["swin"].inputs())
    stage = [("stage", 8), ("block", 8), ("block", 8), ("stage", 4), ("block", 4), ("block", 4)]
    assert grids == [(kind, (side, side)) for kind, side in stage]


def test_sites_know_the_padding_of_their_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looks(Plain):
        def step(self, state: Any, codes: Tensor, site: Site) -> Any:
            own, other = (target, source) if site.stack == "decoder" else (source, None)
            assert site.keep is not None
            assert torch.equal(site.keep, own.bool())
            assert (site.memory_keep is None) == (other is None)
            assert other is None or torch.equal(site.memory_keep, other.bool())
            return state

    batch = FAMILIES["t5"].inputs()
    source, target = batch["attention_mask"], torch.tensor([[1, 1, 1, 1]] * 3 + [[1, 1, 0, 0]])
    attach_toy(monkeypatch, Looks, FAMILIES["t5"].model())(**batch, decoder_attention_mask=target)


# --- finish --------------------------------------------------------------------------------------------------


class Finishes(Plain):
    """Its stack's output is made of the raw and the normed hidden state."""

    def __init__(self, config: ToyConfig, sites: Sequence[Site]) -> None:
        super().__init__(config, sites)
        self.map = nn.Linear(sites[-1].width, sites[-1].width)

    def finish(self, state: Any, raw: Tensor, normed: Tensor, site: Site) -> Tensor:
        return normed + self.map(raw) if site.head else normed


@pytest.mark.parametrize("family", ["vit", "bert", "timm_vit"])
def test_finish_gets_the_norms_input_and_output_and_gives_the_stacks_output(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = FAMILIES[family]
    model = attach_toy(monkeypatch, Finishes, kind.model(), head=HEAD)
    last = find_places(kind.model())[-1].site
    seen: list[Tensor] = []
    block = next(p.module for p in reversed(model.places) if p.site.kind == "block")
    # Ahead of the fold's hook: without a final norm, what leaves the last block is finished already.
    block.register_forward_hook(lambda module, args, out: seen.append(first(out)), prepend=True)
    reading = model.fold.run(model.trunk, *kind.inputs().values())[1]
    normed = model.places[-1].module.forward(seen[0]) if last.final_norm else seen[0]
    assert reading is not None
    torch.testing.assert_close(reading.hidden, normed + model.side.map(seen[0]))


def test_a_finished_encoder_is_what_the_decoder_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    class FinishesEncoder(Finishes):
        def finish(self, state: Any, raw: Tensor, normed: Tensor, site: Site) -> Tensor:
            return normed if site.head else normed + self.map(raw)

    batch = FAMILIES["t5"].inputs()
    model = attach_toy(monkeypatch, FinishesEncoder, FAMILIES["t5"].model())
    seen: list[tuple[Tensor, Tensor]] = []
    norm = model.trunk.encoder.final_layer_norm
    norm.register_forward_pre_hook(lambda module, args: seen.append((args[0], module.forward(args[0]))))
    out = model(**batch)
    raw, normed = seen[0]
    expected = model.backbone(
        encoder_outputs=BaseModelOutput(last_hidden_state=normed + model.side.map(raw)),
        attention_mask=batch["attention_mask"],
        decoder_input_ids=batch["decoder_input_ids"],
    )
    torch.testing.assert_close(out.logits, expected.logits)
    (out.logits * noise(out.logits)).sum().backward()
    assert model.side.map.weight.grad.abs().max() > 0


# --- pooled --------------------------------------------------------------------------------------------------


class Pools(Plain):
    """A read-out of its own: a map of the mean over all tokens of the first block's output."""

    tokenwise = True

    def __init__(self, config: ToyConfig, sites: Sequence[Site]) -> None:
        super().__init__(config, sites)
        self.pooled_width = 5
        self.map = nn.Linear(sites[0].width, 5)

    def step(self, state: Any, codes: Tensor, site: Site) -> Any:
        return codes if site.kind == "block" and site.index == 0 else state

    def pooled(self, state: Any, site: Site) -> Tensor:
        return self.map(state.mean(1))


def test_the_head_reads_a_methods_own_read_out_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = FAMILIES["vit"]
    # Even where the head's own pool would read the class token only.
    head = ss.Classify(num_labels=LABELS, pool="cls")
    model = attach_toy(monkeypatch, Pools, kind.model(), head=head)
    seen: list[Tensor] = []
    model.places[1].module.register_forward_hook(lambda module, args, out: seen.append(first(out)))
    out = model(**kind.inputs()).logits
    assert model.head is not None
    assert model.head.linear.in_features == 5
    torch.testing.assert_close(out, model.head.linear(model.side.map(seen[0].mean(1))))


# --- memory and carry ----------------------------------------------------------------------------------------


class NewMemory(Plain):
    """The decoder's last block reads a map of the encoder's first block instead of the encoder's output."""

    def __init__(self, config: ToyConfig, sites: Sequence[Site]) -> None:
        super().__init__(config, sites)
        self.map = nn.Linear(sites[0].width, sites[0].width)

    def start(self, site: Site, carried: Tensor | None) -> Tensor | None:
        return carried

    def step(self, state: Any, codes: Tensor, site: Site) -> Any:
        taken = site.stack == "encoder" and site.kind == "block" and site.index == 0
        return self.map(codes) if taken else state

    def carry(self, state: Any) -> Tensor:
        return state

    def memory(self, state: Any, site: Site) -> Tensor | None:
        assert site.stack == "decoder"
        assert site.kind == "block"
        return state if site.last else None


def test_memory_replaces_what_one_decoder_block_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = FAMILIES["t5"].inputs()
    model = attach_toy(monkeypatch, NewMemory, FAMILIES["t5"].model())
    trunk, outs = model.trunk, []
    calls: list[tuple[Any, dict[str, Any]]] = []
    encoder, block = trunk.encoder.block[0], trunk.decoder.block[-1]
    block.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    for module in (encoder, block):
        module.register_forward_hook(lambda m, args, out: outs.append(out[0]))
    # Without a cache: the block is called again below, and would find its own keys there.
    model.backbone(**batch, use_cache=False)
    ((args, kwargs),), (tapped, plain) = calls, list(outs)
    outs.clear()
    model(**batch, use_cache=False)
    call = inspect.signature(block.forward).bind(*args, **kwargs)
    call.arguments["encoder_hidden_states"] = model.side.map(tapped)
    expected = block.forward(*call.args, **call.kwargs)[0]
    torch.testing.assert_close(outs[-1], expected)
    assert (outs[-1] - plain).abs().max() > 1e-2


def test_memory_gets_a_gradient_and_nothing_before_its_block_keeps_one(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = FAMILIES["t5"].inputs()
    model = attach_toy(monkeypatch, NewMemory, FAMILIES["t5"].model()).train()
    with ss.saved_bytes(model) as kept:
        out = model(**batch).logits
    (out * noise(out)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.side.parameters())
    assert not [row for row in kept.rows if "decoder.block.0." in row.module or "decoder.block.1." in row.module]


def greedy(model: ss.SideModel, batch: dict[str, Tensor], steps: int) -> Tensor:
    """Greedy decoding by calling the model on the whole prefix at every step."""
    tokens = torch.zeros(len(batch["input_ids"]), 1, dtype=torch.long)
    for _ in range(steps):
        out = model(**batch, decoder_input_ids=tokens).logits
        tokens = torch.cat([tokens, out[:, -1:].argmax(-1)], 1)
    return tokens


@torch.no_grad()
def test_generation_with_memory_equals_calling_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = FAMILIES["t5"].inputs()
    del batch["decoder_input_ids"]
    model = attach_toy(monkeypatch, NewMemory, FAMILIES["t5"].model())
    nn.init.normal_(model.side.map.weight, std=2.0)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [1]}
    with pytest.raises(ValueError, match=r"toy mixes tokens, so a cache .* pass use_cache=False"):
        model.generate(**batch, **how)
    found = model.generate(**batch, **how, use_cache=False)
    bias = torch.zeros(model.backbone.config.vocab_size)
    bias[1] = -torch.inf
    model.backbone.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    assert torch.equal(found, greedy(model, batch, 5))
    assert not torch.equal(found, model.backbone.generate(**batch, **how))


@torch.no_grad()
def test_what_an_encoder_carries_is_expanded_with_its_beams(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    class Carries(NewMemory):
        def start(self, site: Site, carried: Tensor | None) -> Tensor | None:
            if site.stack == "decoder":
                assert carried is not None
                seen.append(carried)
            return carried

        def memory(self, state: Any, site: Site) -> None:
            return None

    batch = FAMILIES["t5"].inputs()
    del batch["decoder_input_ids"]
    model = attach_toy(monkeypatch, Carries, FAMILIES["t5"].model())
    model.generate(**batch, num_beams=3, max_new_tokens=2, min_new_tokens=2, use_cache=False)
    model(**batch, decoder_input_ids=torch.zeros(4, 1, dtype=torch.long))
    *expanded, whole = seen
    assert len(expanded) == 2
    for carried in expanded:
        torch.testing.assert_close(carried, whole.repeat_interleave(3, 0))


def test_encoder_outputs_without_the_task_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = FAMILIES["t5"].inputs()
    backbone = FAMILIES["t5"].model()
    rest = {name: batch[name] for name in ("attention_mask", "decoder_input_ids")}
    with torch.no_grad():
        given = backbone.encoder(batch["input_ids"], attention_mask=batch["attention_mask"])
        # A method that carries nothing takes them.
        probe = ss.attach(backbone, ss.ProbeConfig()).eval()
        assert torch.equal(probe(encoder_outputs=given, **rest).logits, backbone(**batch).logits)
    ss.detach(probe)
    model = attach_toy(monkeypatch, NewMemory, backbone)
    for outputs in (given, (given[0],)):
        with pytest.raises(FoldError, match="encoder_outputs were computed without this task: let the model run"):
            model(encoder_outputs=outputs, **rest)
    mask = batch["attention_mask"]
    with pytest.raises(FoldError, match="or generate through the attached model"):
        model.generate(encoder_outputs=given, attention_mask=mask, use_cache=False, max_new_tokens=2)


# --- guards --------------------------------------------------------------------------------------------------


def test_a_call_within_a_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class CallsItself(Plain):
        def step(self, state: Any, codes: Tensor, site: Site) -> Any:
            model(**batch)
            return state

    batch = FAMILIES["bert"].inputs()
    model = attach_toy(monkeypatch, CallsItself, FAMILIES["bert"].model())
    with pytest.raises(FoldError, match="in the middle of another call: use one model per thread"):
        model(**batch)


def test_two_threads_are_refused_and_the_first_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, done = threading.Event(), threading.Event()

    class Waits(Plain):
        def write(self, state: Any, hidden: Tensor, site: Site) -> tuple[Any, Tensor]:
            if site.kind == "block" and site.index == 1 and not done.is_set():
                inside.set()
                assert done.wait(10)
            return state, hidden + noise(hidden) if site.last else hidden

    batch = FAMILIES["bert"].inputs()
    model = attach_toy(monkeypatch, Waits, FAMILIES["bert"].model())
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(model(**batch).logits))
    thread.start()
    assert inside.wait(10)
    try:
        with pytest.raises(FoldError, match="use one model per thread"):
            model(**batch)
    finally:
        done.set()
        thread.join()
    torch.testing.assert_close(found[0], model(**batch).logits)


def test_a_failed_pass_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(Plain):
        failing = True

        def step(self, state: Any, codes: Tensor, site: Site) -> Any:
            if self.failing and site.last:
                raise KeyError("once")
            return state

    batch, backbone = FAMILIES["bert"].inputs(), FAMILIES["bert"].model()
    expected = backbone(**batch).logits
    model = attach_toy(monkeypatch, Fails, backbone)
    with pytest.raises(KeyError, match="once"):
        model(**batch)
    assert torch.equal(backbone(**batch).logits, expected)
    model.side.failing = False
    torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_an_input_that_requires_a_gradient_is_refused(family: str) -> None:
    kind = FAMILIES[family]
    backbone = kind.model()
    backbone.enable_input_require_grads()
    model = ss.attach(backbone, ss.ReadConfig(rank=2))
    says = r"stage 0 of the \w+ requires a gradient before the method's first write\..* enable_input_require_grads"
    with pytest.raises(FoldError, match=says):
        model(**kind.inputs())
    with torch.no_grad():
        model(**kind.inputs())


def test_a_block_outside_a_pass_is_refused() -> None:
    model = ss.attach(FAMILIES["bert"].model(), ss.ReadConfig(rank=2))
    block = model.places[0].module
    with pytest.raises(FoldError, match="a block ran outside the backbone's own forward: call the attached model"):
        model.fold.run(block, torch.randn(2, 3, 16))


def test_a_skipped_block_is_refused() -> None:
    model = ss.attach(FAMILIES["bert"].model(), ss.ReadConfig(rank=2))
    layers = model.trunk.encoder.layer
    last = layers.pop(2)
    with pytest.raises(FoldError, match="ended its pass after 3 of 4 sites of its encoder"):
        model(**FAMILIES["bert"].inputs())
    layers[1] = last
    with pytest.raises(FoldError, match=r"block 2 of the encoder ran out of turn \(site 3, expected 2\)"):
        model(**FAMILIES["bert"].inputs())


def mistaken(backbone: nn.Module, **facts: Any) -> nn.Module:
    """The backbone, of which other facts are kept than it has, as if it ran otherwise from now on."""
    found = facts_of(backbone)
    stacks = {name: replace(stack, **facts) for name, stack in found.stacks.items()}
    kept = vars(backbone.base_model)
    kept[KEPT_ON] = kept[KEPT_ON][0], replace(found, stacks=stacks)
    return backbone


def test_a_final_norm_that_is_none_is_named() -> None:
    model = ss.attach(mistaken(FAMILIES["bert"].model(), norm="pooler.dense"), ss.ReadConfig(rank=2))
    says = r"wrong module was taken for the encoder's final norm \(it got a tensor of shape \(4, 16\)\): the model does"
    with pytest.raises(FoldError, match=says):
        model(**FAMILIES["bert"].inputs())


@pytest.mark.parametrize("wrong", ["embeddings.LayerNorm", "unused"])
def test_a_norm_that_does_not_run_after_the_blocks_is_named(wrong: str) -> None:
    backbone = FAMILIES["bert"].model()
    backbone.bert.unused = nn.LayerNorm(16)
    with pytest.raises(FoldError, match="A model that skips blocks or its final norm cannot be folded over"):
        ss.attach(mistaken(backbone, norm=wrong), ss.ReadConfig(rank=2))(**FAMILIES["bert"].inputs())


def test_a_trunk_that_changes_its_output_behind_the_last_site_is_named() -> None:
    """A head must not read what the trunk does not give, also where it gave that when it was looked at."""
    backbone = FAMILIES["bert"].model()
    model = ss.attach(backbone, ss.ProbeConfig(), head=ss.Classify(num_labels=2)).eval()
    backbone.bert.encoder.register_forward_hook(lambda m, a, output: type(output)(last_hidden_state=2 * output[0]))
    with pytest.raises(FoldError, match="the trunk's last hidden state is not what came out of it"):
        model(**FAMILIES["bert"].inputs())


# --- key-value caches ---------------------------------------------------------------------------------------


def test_the_past_is_that_before_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every site, though the blocks add the tokens of this pass to the cache on the way."""
    seen: list[tuple[int, int]] = []

    class Positions(Plain):
        tokenwise = True

        def step(self, state: Any, codes: Tensor, site: Site) -> Any:
            seen.append((site.past, site.positions(codes)[0].item()))
            assert site.cache is None  # it declares no `caches`
            return state

        def finish(self, state: Any, raw: Tensor, normed: Tensor, site: Site) -> Tensor:
            seen.append((site.past, site.positions(normed)[0].item()))
            return normed

    model = attach_toy(monkeypatch, Positions, FAMILIES["llama"].model())
    ids = torch.randint(3, 40, (2, 5))
    cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    model(input_ids=ids[:, 3:], past_key_values=cache)
    assert seen == [(0, 0)] * 5 + [(3, 3)] * 5


def test_a_method_that_mixes_tokens_is_refused_a_filled_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach_toy(monkeypatch, Plain, FAMILIES["llama"].model())
    ids = torch.randint(3, 40, (2, 5))
    cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values  # an empty one does no harm
    with pytest.raises(FoldError, match="the key-value cache holds 3 tokens, and Plain mixes tokens"):
        model(input_ids=ids[:, 3:], past_key_values=cache)
