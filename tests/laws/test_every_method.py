"""The laws: every registered method on every family. A new method is covered the moment it is registered."""

from __future__ import annotations

import copy
import gc
import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chosen import chosen
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sidestep as ss
from sidestep.backbone import CheckpointedForward, find_places
from sidestep.disk.task_folder import TaskError
from sidestep.interface.registry import Method
from sidestep.methods import SideNet, UnsupportedBackbone, WeightDelta, methods
from sidestep.methods.sherl.parts import PooledAggregation
from sweep.methods import SETTINGS
from tiny import ALL, FAMILIES, FURTHER, LABELS, TinyFamily, call, logits, randomize

#: Settings that fit tiny models, where the defaults do not.
TINY: dict[str, dict[str, Any]] = {**SETTINGS, "lst": {**SETTINGS["lst"], "reduction": 2}}
#: Further settings of a method that run other code.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dtl+": ("dtl", {"rank": 4, "late_blocks": 2, "kernel": 2}),
    "sherl-vector": ("sherl", {"reduction": 4, "pool_tokens": True, "level_gates": True}),
    "unipt-vector": ("unipt", {"variant": "clip4clip"}),
}

Law = Callable[..., None]

METHODS = {name: method for name, method in methods().items() if name != "collect"}
METHODS |= {name: METHODS[method] for name, (method, _) in VARIANTS.items()}
#: Methods that only a Sidestep head can read.
OWN_READ_OUT = ("readout", "synqt", "sherl-vector", "unipt-vector")
SIDE = [name for name, method in METHODS.items() if issubclass(method.implementation, SideNet)]
#: Those under which a language model's own head writes text.
WRITING = [name for name in SIDE if name not in OWN_READ_OUT]
DELTA = [name for name, method in METHODS.items() if issubclass(method.implementation, WeightDelta)]

#: They read tokens of one width and one grid, or change the linear maps of an attention: none of it is in a ResNet.
ONE_VECTOR = ("sherl-vector", "unipt-vector")
NOT_ON_RESNETS = (
    "dtl",
    "dtl+",
    "lst",
    "side_attention",
    "synqt",
    "unipt",
    *ONE_VECTOR,
    "lora",
    "late_lora",
    "dora",
    "ia3",
    "late_writer",
)
#: The pairs that must be refused; every other pair must work.
REFUSED = {
    *((method, family) for method in NOT_ON_RESNETS for family in ("resnet", "timm_resnet")),
    *(("bitfit", family) for family in ("t5", "llama")),
    *(("dtl+", family) for family in ("bert", "t5", "llama")),
    ("sherl", "swin"),
    ("lst", "swin"),
    ("side_attention", "swin"),
    *(("synqt", family) for family in ("swin", "t5", "llama")),
    *(("unipt", family) for family in ("swin", "t5", "llama")),
    *((method, family) for method in ONE_VECTOR for family in ("swin", "t5")),
    ("late_writer", "swin"),
    *(("synqt", family) for family in FURTHER),
    *(("dtl+", family) for family in FURTHER if family != "swinv2"),
    *((method, "swinv2") for method in ("lst", "sherl", "side_attention", "unipt", *ONE_VECTOR, "late_writer")),
    *((method, "convnext") for method in NOT_ON_RESNETS if method not in ("lora", "late_lora", "dora")),
    ("unipt", "llava"),
    ("bitfit", "modernbert"),
    ("late_lora", "albert"),
}


def pairs(names: list[str], families: Sequence[str] = tuple(ALL)) -> Callable[[Law], Any]:
    """Every supported pair of these methods and families, of which `make test` runs those that `chosen` names."""
    ids = [(m, f) for m in names for f in families if (m, f) not in REFUSED]

    def of(law: Law) -> Any:
        quick = chosen(ids, law.__name__)
        marks = {pair: () if pair in quick else pytest.mark.all_laws for pair in ids}
        cases = [pytest.param(m, f, marks=marks[m, f], id=f"{m}-{f}") for m, f in ids]
        return pytest.mark.parametrize(("method", "family"), cases)(law)

    return of


def costly_pairs(names: list[str], families: Sequence[str] = ("bert", "vit"), quick: Sequence[str] = ()) -> Any:
    """Every supported pair, of which `make test` runs these families and `make laws-all` the others too.

    If `quick` names methods, `make test` runs these alone.
    """
    ids = [(m, f) for m in names for f in FAMILIES if (m, f) not in REFUSED]
    runs = [(m, f) for m, f in ids if f in families and (not quick or m in quick)]
    marks = {pair: () if pair in runs else pytest.mark.all_laws for pair in ids}
    cases = [pytest.param(m, f, marks=marks[m, f], id=f"{m}-{f}") for m, f in ids]
    return pytest.mark.parametrize(("method", "family"), cases)


every = pairs(list(METHODS))
side_nets = pairs(SIDE)
weight_deltas = pairs(DELTA)


def config_of(method: str) -> Any:
    """A config for tiny models: a rank that fits them."""
    kind = METHODS[method].config
    if method in VARIANTS or method in TINY:
        return kind(**(VARIANTS[method][1] if method in VARIANTS else TINY[method]))
    return kind(rank=4) if "rank" in kind.__dataclass_fields__ else kind()


def attach(
    method: str, family: TinyFamily, backbone: nn.Module | None = None, *, head: bool = False, **kwargs: Any
) -> ss.SideModel:
    """The tiny model with the method attached, on its own head or a Sidestep one."""
    torch.manual_seed(3)
    backbone = family.model() if backbone is None else backbone
    own = head or method in OWN_READ_OUT
    return placed(
        ss.attach(backbone, config_of(method), head=ss.Classify(num_labels=LABELS) if own else None, **kwargs)
    )


def placed(model: ss.SideModel) -> ss.SideModel:
    """The model, with positions for a sparse diff that would get them in training."""
    if model.sparse is not None and not model.sparse.is_placed:
        model.sparse.place_at_random(0)
    return model


def loss_of(model: ss.SideModel, family: TinyFamily, batch: dict[str, Tensor] | None = None) -> Tensor:
    """A scalar that depends on every output: random weights on the logits."""
    batch = family.inputs() if batch is None else batch
    out = logits(model(**batch))
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype)).sum()


def gradients(model: ss.SideModel, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of what is trained, by name."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.trained_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# --- 1 ------------------------------------------------------------------------------------------------------


def hooks_of(backbone: nn.Module) -> list[tuple[str, int, int]]:
    """How many hooks each module has. Some models have their own."""
    return [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in backbone.named_modules()]


@every
def test_detached_outputs_are_the_backbones_own_and_nothing_is_held(method: str, family: str) -> None:
    kind = ALL[family]
    backbone, batch = kind.model(), kind.inputs()
    before, hooks = logits(call(backbone, batch)), hooks_of(backbone)
    model = attach(method, kind, backbone)
    randomize(model)
    if trained := [p for _, p in model.trained_parameters()]:
        loss_of(model.train(), kind).backward()
        torch.optim.SGD(trained, lr=0.1).step()
    assert ss.detach(model) is backbone
    assert torch.equal(logits(call(backbone, batch)), before)
    assert hooks_of(backbone) == hooks
    # a reference cycle holds tensors until the collector runs, which does not see how large they are
    given_up = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert given_up() is None
    finally:
        gc.enable()


# Frozen and trainable weights may take different attention kernels, so bit-equality is asked for without gradients.


@pairs([name for name, method in METHODS.items() if method.implementation.starts_as_identity])
@torch.no_grad()
def test_a_zero_start_shows_the_frozen_model(method: str, family: str) -> None:
    kind = ALL[family]
    before = logits(call(kind.model(), kind.inputs()))
    assert torch.equal(logits(attach(method, kind).eval()(**kind.inputs())), before)


@side_nets
@torch.no_grad()
def test_the_bare_backbone_stays_usable(method: str, family: str) -> None:
    kind = ALL[family]
    backbone, batch = kind.model(), kind.inputs()
    before = logits(call(backbone, batch))
    model = attach(method, kind, backbone)
    randomize(model)
    assert torch.equal(logits(call(backbone, batch)), before)


# --- 2 ------------------------------------------------------------------------------------------------------


@side_nets
def test_every_site_is_visited_once_in_order(method: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ALL[family]
    model = attach(method, kind)
    seen: list[tuple[str, str, int]] = []
    visit = model.fold._visit

    def spy(site: Any, order: int) -> Any:
        seen.append((site.stack, site.kind, site.index))
        return visit(site, order)

    monkeypatch.setattr(model.fold, "_visit", spy)
    model(**kind.inputs())
    expected = [(p.site.stack, p.site.kind, p.site.index) for p in find_places(model.backbone)]
    assert seen == expected
    seen.clear()
    model(**kind.inputs())
    assert seen == expected


# --- 3 ------------------------------------------------------------------------------------------------------


@side_nets
def test_bytes_kept_are_within_the_stated_formula(method: str, family: str) -> None:
    kind = ALL[family]
    model = attach(method, kind, head=True)
    randomize(model)
    batch = kind.inputs(rows=4, tokens=32) if kind.image is None else kind.inputs()
    tokens = tokens_per_site(model, batch)
    with ss.saved_bytes(model) as kept:
        loss = model.train()(**batch, labels=kind.labels()).loss
    # The blocks through which a gradient flows keep what they keep.
    late = inside(model, model.late_blocks())
    total = kept.total - sum(row.counted for row in kept.rows if row.module.startswith(late))
    config, implementation = config_of(method), METHODS[method].implementation
    stated = sum(4 * n * implementation.kept_per_token(config, site) for site, n in tokens)
    stated += sum(4 * 4 * implementation.kept_per_row(config, site) for site, _ in tokens)
    # What a head keeps for 4 rows (features, probabilities, labels, pooling weights), and the padding masks.
    width = model.head.linear.in_features
    slack = 4 * (4 * (4 * width + 6 * LABELS)) + sum(n for _, n in tokens) * 5
    assert total <= stated + slack, str(kept)
    assert loss.requires_grad


def tokens_per_site(model: ss.SideModel, batch: dict[str, Tensor]) -> list[tuple[Any, int]]:
    """Each site with the number of tokens (rows times tokens) that the method is given there."""
    found: list[tuple[Any, int]] = []
    advance, finish = model.side.advance, model.side.finish

    def count_advance(state: Any, hidden: Tensor, site: Any) -> Any:
        found.append((site, hidden.shape[0] * hidden.shape[1]))
        return advance(state, hidden, site)

    def count_finish(state: Any, raw: Tensor, normed: Tensor, site: Any) -> Any:
        if site.kind == "norm":
            found.append((site, raw.shape[0] * raw.shape[1]))
        return finish(state, raw, normed, site)

    with torch.no_grad(), patched(model.side, advance=count_advance, finish=count_finish):
        model(**batch)
    return found


@contextmanager
def patched(module: nn.Module, **methods_: Any) -> Iterator[None]:
    for name, function in methods_.items():
        object.__setattr__(module, name, function)
    try:
        yield
    finally:
        for name in methods_:
            object.__delattr__(module, name)


@side_nets
def test_nothing_of_the_backbone_is_kept_before_the_first_write(method: str, family: str) -> None:
    kind = ALL[family]
    model = attach(method, kind)
    if not any(True for _ in model.trained_parameters()):
        pytest.skip("nothing is trained")
    late = {id(block) for block in model.late_blocks()}
    early = [p.module for p in model.places if p.site.kind == "block" and id(p.module) not in late]
    with ss.saved_bytes(model) as kept:
        loss_of(model.train(), kind)
    assert [row for row in kept.rows if row.module.startswith(inside(model, early))] == []


@side_nets
def test_advancing_is_a_step_of_what_was_read(method: str, family: str) -> None:
    """To the bit, gradients and dropout included, also where a method overrides `advance` to keep less."""
    kind = ALL[family]
    model = attach(method, kind).train()
    randomize(model)
    trained = dict(model.trained_parameters())

    def run() -> tuple[Tensor, dict[str, Tensor | None]]:
        torch.manual_seed(7)
        loss = loss_of(model, kind)
        if not loss.requires_grad:
            return loss, {}
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return loss, dict(zip(trained, found, strict=True))

    loss, gradients = run()
    with patched(model.side, advance=partial(SideNet.advance, model.side)):
        plain, others = run()
    assert torch.equal(loss, plain)
    for name, gradient in gradients.items():
        other = others[name]
        assert (gradient is None and other is None) or torch.equal(gradient, other), name


@side_nets
@torch.no_grad()
def test_before_the_first_write_codes_are_all_that_a_method_needs(method: str, family: str) -> None:
    """A pass that has stored them gives the same output without looking at a hidden state there."""
    kind = ALL[family]
    model = attach(method, kind).eval()
    randomize(model)
    border = METHODS[method].implementation.first_write(config_of(method), [place.site for place in model.places])
    end = None if border is None else (border.stack, border.kind, border.index)
    codes: dict[tuple[str, str, int], Any] = {}

    def store(state: Any, hidden: Tensor, site: Any) -> Any:
        found = codes[site.stack, site.kind, site.index] = model.side.read(hidden, site)
        return model.side.step(state, found, site)

    def replay(state: Any, hidden: Tensor, site: Any) -> Any:
        here = (site.stack, site.kind, site.index)
        passed.append(here)
        behind = end in passed[:-1]
        return model.side.step(state, model.side.read(hidden, site) if behind else codes[here], site)

    passed: list[tuple[str, str, int]] = []
    with patched(model.side, advance=store):
        stored = logits(model(**kind.inputs()))
    with patched(model.side, advance=replay):
        assert torch.equal(logits(model(**kind.inputs())), stored)


def inside(model: ss.SideModel, blocks: list[nn.Module]) -> tuple[str, ...]:
    """What the names of modules inside of these blocks begin with."""
    return tuple(f"{name}." for name, module in model.named_modules() if any(module is block for block in blocks))


# --- 4 ------------------------------------------------------------------------------------------------------


@side_nets
def test_no_backbone_tensor_gets_a_gradient_or_moves(method: str, family: str) -> None:
    kind = ALL[family]
    backbone = kind.model()
    names = [name for name, _ in backbone.named_parameters()]
    before = {name: t.clone() for name, t in [*backbone.named_parameters(), *backbone.named_buffers()]}
    model = ss.attach(backbone, config_of(method), head=ss.Classify(num_labels=LABELS))
    randomize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model.train()(**kind.inputs(), labels=kind.labels()).loss.backward()
        optimizer.step()
    assert [name for name, _ in backbone.named_parameters()] == names
    assert all(p.grad is None for p in backbone.parameters())
    after = dict([*backbone.named_parameters(), *backbone.named_buffers()])
    assert all(torch.equal(after[name], value) for name, value in before.items())


@weight_deltas
def test_a_weight_delta_moves_only_what_it_declares_and_detach_restores_it(method: str, family: str) -> None:
    kind = ALL[family]
    backbone = kind.model()
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    model = placed(ss.attach(backbone, config_of(method)))
    declared = {name.removeprefix("backbone.") for name, _ in model.trained_parameters()}
    if model.sparse is not None:
        declared |= {name for name, p in backbone.named_parameters() if model.sparse.covers(p)}
    start = {name: p.clone() for name, p in backbone.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss_of(model.train(), kind).backward()
    optimizer.step()
    loss_of(model, kind)  # a sparse diff is written into the weights before a pass
    moved = {name for name, p in backbone.named_parameters() if not torch.equal(p, start[name])}
    assert moved
    assert moved <= declared
    ss.detach(model)
    assert [name for name, _ in backbone.named_parameters()] == list(before)
    assert all(torch.equal(p, before[name]) for name, p in backbone.named_parameters())


# --- 5 ------------------------------------------------------------------------------------------------------


@every
def test_every_trained_parameter_gets_a_gradient_within_two_steps(method: str, family: str) -> None:
    kind = ALL[family]
    # A weight delta is asked through the backbone's own head: what a Sidestep head does not read gets no gradient.
    # So is LST on T5: the first decoder token, which that head reads, attends to itself alone.
    model = attach(method, kind, head=method in SIDE and (method, family) != ("lst", "t5"))
    awake(model.side)
    optimizer = torch.optim.SGD([p for _, p in model.trained_parameters()], lr=0.5)
    reached: set[str] = set()
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model.train(), kind).backward()
        reached |= {n for n, p in model.trained_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    missed = {name for name, _ in model.trained_parameters()} - reached
    # Softmax does not see a key's bias, and LLaVA takes its tower's states from in front of that norm.
    unread = (".key.bias", ".k_proj.bias", ".vision_tower.post_layernorm.weight", ".vision_tower.post_layernorm.bias")
    assert {name for name in missed if not name.endswith(unread)} == set()


def awake(side: nn.Module) -> None:
    """Lift the scores of one vector above their ReLU: four rows may well leave all of a level's below it."""
    for module in side.modules():
        if isinstance(module, PooledAggregation):
            for scorer in (module.merge.score, *module.spatial):
                nn.init.constant_(scorer.bias, 10.0)


# --- 6 ------------------------------------------------------------------------------------------------------


@side_nets
def test_a_tokenwise_step_changes_its_own_row_only(method: str, family: str) -> None:
    kind = ALL[family]
    model = attach(method, kind).double()
    randomize(model, scale=1.0)
    if not model.side.tokenwise:
        pytest.skip(f"{method} mixes tokens")
    encoder = torch.randn(2, 6, config_of(method).rank).double() if hasattr(config_of(method), "rank") else None
    for stack in dict.fromkeys(place.site.stack for place in model.places):
        sites = [place.site for place in model.places if place.site.stack == stack and place.site.stage == 0]
        hidden = [torch.randn(2, 5, site.width).double() for site in sites]
        other = [h.clone() for h in hidden]
        for changed in other:
            changed[:, 3] += torch.randn(changed[:, 3].shape)
        carried = encoder if stack == "decoder" and kind.encoder_decoder else None
        first, second = (run_stack(model.side, sites, h, carried) for h in (hidden, other))
        for a, b in zip(first, second, strict=True):
            rows = (a - b).abs().amax(dim=(0, 2))
            assert rows[[0, 1, 2, 4]].max() == 0
            assert rows[3] > 0


def run_stack(side: SideNet, sites: Any, hidden: list[Tensor], carried: Tensor | None) -> list[Tensor]:
    """What a method returns and remembers along a stack fed with given hidden states."""
    state = side.start(sites[0], carried)
    out: list[Tensor] = []
    for site, h in zip(sites, hidden, strict=True):
        if site.kind == "norm":
            written = side.finish(state, h, h, site)
        else:
            state, written = side.write(side.advance(state, h, site), h, site)
        out.append(written)
        memory = getattr(state, "hidden", None)
        out += [memory] if isinstance(memory, Tensor) else []
    return out


@pytest.mark.parametrize(
    ("method", "family"), [(m, f) for m in WRITING for f in ("llama", "t5") if (m, f) not in REFUSED]
)
@pytest.mark.parametrize(
    "how",
    [{"num_beams": 1}, {"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3}],
    ids=["greedy", "beam4", "beam4-return3"],
)
def test_cached_generation_equals_uncached(method: str, family: str, how: dict[str, int]) -> None:
    kind = ALL[family]
    model = attach(method, kind).eval()
    randomize(model, scale=1.0)
    batch = {k: v for k, v in kind.inputs().items() if k != "decoder_input_ids"}
    if kind.causal:  # decoders are padded on the left for generation
        batch = {name: value.flip(1) for name, value in batch.items()}
    common = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_scores=True, **how)
    if not (model.side.tokenwise or model.side.caches):
        with pytest.raises(ValueError, match="use_cache=False"):
            model.generate(**batch, use_cache=True, **common)
        return
    cached = model.generate(**batch, use_cache=True, **common)
    plain = model.generate(**batch, use_cache=False, **common)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.scores, plain.scores, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    frozen = kind.model().generate(**batch, use_cache=True, **common)
    if method != "probe":
        assert frozen.scores[0].shape != cached.scores[0].shape or not torch.allclose(
            frozen.scores[0], cached.scores[0]
        )


# --- 7 ------------------------------------------------------------------------------------------------------


@every
def test_gradients_equal_finite_differences(method: str, family: str) -> None:
    if method == "dora":
        pytest.skip("DoRA takes the weights' lengths as constants in backward (its paper, section 4.3)")
    kind = ALL[family]
    head = ss.Classify(num_labels=LABELS)
    model = ss.attach(with_exact_norms(kind.model()), config_of(method), head=head).double()
    randomize(model)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in kind.inputs().items()}
    parameters = dict(model.trained_parameters())
    generator = torch.Generator().manual_seed(5)
    direction = {n: torch.randn(p.shape, generator=generator).double() for n, p in parameters.items()}

    def loss_at(step: float) -> Tensor:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(step * direction[name])
            value = loss_of(model, kind, batch)
            for name, parameter in parameters.items():
                parameter.sub_(step * direction[name])
        return value

    slope = sum((g * direction[n]).sum() for n, g in gradients(model, loss_of(model, kind, batch)).items())
    step = 1e-8  # UniPT on ALBERT bends within 1e-6
    numeric = (loss_at(step) - loss_at(-step)) / (2 * step)
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-7)


class ExactNorm(nn.Module):
    """An RMS norm in the input's own precision: T5's and Llama's compute in float32 whatever the model's."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def with_exact_norms(model: nn.Module) -> nn.Module:
    """The model with every RMS norm replaced by an `ExactNorm` of the same name."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            model.set_submodule(name, ExactNorm(module))
    return model


# --- 8 ------------------------------------------------------------------------------------------------------


@every
def test_checkpointing_keeps_gradients_and_runs_late_blocks_twice(method: str, family: str) -> None:
    kind = ALL[family]
    plain, saving = attach(method, kind, head=True), attach(method, kind, head=True, checkpoint="late")
    randomize(plain)
    randomize(saving)
    late = list(dict.fromkeys(saving.late_blocks()))
    visits = Counter(id(place.module) for place in saving.places if place.site.kind == "block")  # ALBERT's share one
    runs = {id(block): 0 for block in late}

    def count(block: nn.Module, args: Any, output: Any) -> None:
        runs[id(block)] += 1

    # A block's own child counts its runs: the block's hooks stand outside the checkpoint.
    kinds = nn.Linear | nn.Conv2d
    watched = [next(m for m in block.modules() if isinstance(m, kinds)) for block in late]
    for block, child in zip(late, watched, strict=True):
        child.register_forward_hook(lambda m, a, o, block=block: count(block, a, o))
    kept, found = [], []
    for model in (plain, saving):
        if method in SIDE:
            model.train()  # a weight delta's own dropout would differ between two runs
        with ss.saved_bytes(model) as record:
            loss = loss_of(model, kind)
        kept.append(record.total)
        found.append(gradients(model, loss))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-6, msg=name)
    assert all(count <= 2 * visits[block] for block, count in runs.items())
    assert (kept[1] < kept[0]) == bool(runs)
    write = plain._first_write()
    assert bool(runs) == (write is not None and write.kind != "norm" and not write.last)
    forwards = [block.__dict__.get("forward") for block in saving.late_blocks()]
    assert all(isinstance(forward, CheckpointedForward) for forward in forwards)


# --- 9 ------------------------------------------------------------------------------------------------------


# reads that are mixed, writes, and modules in the blocks. A plain read is compiled below
@costly_pairs(list(METHODS), ["vit"], quick=["sherl", "dtl", "lora"])
def test_compiled_equals_eager(method: str, family: str) -> None:
    torch._dynamo.reset()
    kind = ALL[family]
    model = attach(method, kind, head=True).eval()
    randomize(model)
    eager = loss_of(model, kind)
    expected = gradients(model, eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = loss_of(compiled, kind)
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.skipif(shutil.which("cc") is None, reason="Inductor needs a C compiler")
def test_inductor_equals_eager() -> None:
    torch._dynamo.reset()
    kind = FAMILIES["bert"]
    model = attach("read", kind, head=True).eval()
    randomize(model)
    eager = loss_of(model, kind)
    expected = gradients(model, eager)
    loss = loss_of(torch.compile(model, fullgraph=True), kind)
    torch.testing.assert_close(loss, eager, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_attach_after_compile_raises(family: str) -> None:
    compiled = torch.compile(ALL[family].model(), backend="aot_eager")
    with pytest.raises(ValueError, match=r"Attach first, then torch\.compile"):
        ss.attach(compiled, ss.ReadConfig(rank=4))


# --- 10 -----------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("head", [False, True], ids=["own", "sidestep"])
@torch.no_grad()
def test_saved_and_loaded_outputs_are_bit_equal(method: str, family: str, head: bool, tmp_path: Path) -> None:
    kind = ALL[family]
    model = attach(method, kind, head=head).eval()
    for parameter in (p for _, p in model.trained_parameters()):
        parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model(**kind.inputs()))
    model.save_pretrained(tmp_path / "task")
    assert torch.equal(logits(ss.load(tmp_path / "task", kind.model())(**kind.inputs())), expected)
    with pytest.raises(TaskError, match="digest"):
        ss.load(tmp_path / "task", kind.model(seed=9))


# --- 11, 12, 13 ---------------------------------------------------------------------------------------------


@side_nets
@pytest.mark.parametrize("noise", [None, "drop_path", "dropout", "all"])
def test_the_backbone_stays_in_eval_mode_unless_noise_is_asked_for(method: str, family: str, noise: Any) -> None:
    kind = ALL[family]
    model = attach(method, kind, head=True, backbone_noise=noise).train()
    training = {type(m).__name__ for m in model.trunk.modules() if m.training}
    if noise is None:
        assert training == set()
    else:
        drop_path = {name for name in training if "DropPath" in name}
        assert (noise == "drop_path") == (training == drop_path) or not training
        assert noise != "dropout" or not drop_path
        assert not any("BatchNorm" in name for name in training)
    assert not any(m.training for m in model.eval().modules())


@every
def test_under_no_grad_nothing_requires_a_gradient(method: str, family: str) -> None:
    kind = ALL[family]
    model = attach(method, kind, head=True)
    with torch.no_grad():
        assert not model(**kind.inputs(), labels=kind.labels()).loss.requires_grad


@pytest.mark.parametrize(("method", "family"), sorted(REFUSED))
def test_an_unsupported_pair_is_refused_by_name(method: str, family: str) -> None:
    backbone = ALL[family].model()
    name = METHODS[method].name
    with pytest.raises(UnsupportedBackbone, match=f"^{name} does not work on {type(backbone).__name__}"):
        ss.attach(backbone, config_of(method))
    assert all(parameter.requires_grad for parameter in backbone.parameters())


# --- 14 -----------------------------------------------------------------------------------------------------


TEXTS = [name for name, family in FAMILIES.items() if family.image is None]


@pairs(list(METHODS), TEXTS)
def test_twice_the_padding_on_the_right_gives_the_same_outputs(method: str, family: str) -> None:
    check_padding(method, family, "right")


# the plain BERT counts positions from the left
@pairs(list(METHODS), [name for name in TEXTS if name != "bert"])
def test_twice_the_padding_on_the_left_gives_the_same_outputs(method: str, family: str) -> None:
    check_padding(method, family, "left")


def check_padding(method: str, family: str, side: str) -> None:
    kind = ALL[family]
    model = attach(method, kind, head=True).eval()
    randomize(model, scale=0.5)
    batch = kind.inputs()
    padded = {name: value if name == "decoder_input_ids" else pad(value, 4, side) for name, value in batch.items()}
    if kind.causal and side == "left":
        rows = {n: v[:3] for n, v in padded.items()}  # the last row is padded on the right too
        positions = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
        out = logits(model(**rows, position_ids=positions))
        torch.testing.assert_close(out, logits(model(**batch))[:3], rtol=1e-4, atol=1e-5)
        return
    torch.testing.assert_close(logits(model(**padded)), logits(model(**batch)), rtol=1e-4, atol=1e-5)


def pad(value: Tensor, by: int, side: str) -> Tensor:
    zeros = value.new_zeros(value.shape[0], by)
    return torch.cat([value, zeros] if side == "right" else [zeros, value], dim=1)


# --- 15 -----------------------------------------------------------------------------------------------------


@side_nets
@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_bfloat16_is_finite_and_close(method: str, family: str, precision: str) -> None:
    kind = ALL[family]
    exact = attach(method, kind, head=True)
    randomize(exact, scale=0.05)
    smooth(exact.side)
    expected = gradients(exact, loss_of(exact, kind))
    backbone = kind.model()
    if precision == "weights":
        backbone = backbone.to(torch.bfloat16)
    model = ss.attach(backbone, config_of(method), head=ss.Classify(num_labels=LABELS))
    model.load_state_dict(exact.state_dict())
    smooth(model.side)
    batch = kind.inputs()
    if precision == "weights":
        batch = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batch.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss = loss_of(model, kind, batch)
    found = gradients(model, loss)
    assert all(p.dtype == torch.float32 for _, p in model.trained_parameters())
    whole = torch.cat([g.flatten() for g in expected.values()])
    error = torch.cat([(found[name] - g).flatten() for name, g in expected.items()])
    assert torch.isfinite(error).all()
    # bf16 rounds at 2^-9; three blocks and their norms add up to a few times that.
    assert error.norm() / whole.norm() < 3e-2


@side_nets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_is_cast_whole_is_finite_and_close(method: str, family: str, dtype: torch.dtype) -> None:
    kind = ALL[family]
    model = attach(method, kind, head=True).eval()
    randomize(model, scale=0.05)
    smooth(model.side)
    batch = kind.inputs()
    with torch.no_grad():
        expected = logits(model(**batch))
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        found = logits(model.to(dtype)(**cast)).float()
    assert torch.isfinite(found).all()
    assert (found - expected).norm() / expected.norm() < 3e-2


def smooth(side: nn.Module) -> None:
    """GELU for every ReLU: one unit that rounding brings over the kink is a large share of so narrow a network."""
    for name, module in list(side.named_modules()):
        if isinstance(module, nn.ReLU):
            side.set_submodule(name, nn.GELU())


# --- 16, 17 -----------------------------------------------------------------------------------------------------


@costly_pairs(list(METHODS))
def test_a_training_step_stays_on_the_device_of_the_weights(
    method: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors of the meta device stand for a GPU's: a tensor made on the CPU would be refused beside them."""
    kind = ALL[family]
    model = attach(method, kind, head=True)
    # there is no autocast for the meta device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        moved = on_meta(model).train()
        batch = {name: meta_like(value) for name, value in {**kind.inputs(), "labels": kind.labels()}.items()}
        if moved.relaxes:
            optimizer = moved.relax(rate=0.1)
        else:
            moved.place_anywhere()
            optimizer = torch.optim.AdamW(parameter for _, parameter in moved.trained_parameters())
        loss = moved(**batch).loss
        loss.backward()
        optimizer.step()
        assert loss.device.type == "meta"


def on_meta(model: ss.SideModel) -> ss.SideModel:
    """A copy of what `model.to("meta")` would move, as fake tensors; tensors that are plain attributes stay."""
    memo: dict[int, Any] = {id(model.extras): {}, **{id(part.trained.originals): {} for part in model.parts}}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = meta_like(tensor)
    return copy.deepcopy(model, memo)


def meta_like(tensor: Tensor) -> Tensor:
    """The fake of a tensor, a parameter of a parameter."""
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


@every
def test_accumulation_gives_the_gradients_of_the_whole_batch(method: str, family: str) -> None:
    kind = ALL[family]
    model = attach(method, kind, head=True)
    randomize(model)
    batch, labels = kind.inputs(rows=8), kind.labels(8)
    whole = gradients(model, model(**batch, labels=labels).loss)
    model.zero_grad()
    for start in range(0, 8, 2):
        part = {name: value[start : start + 2] for name, value in batch.items()}
        model(**part, labels=labels[start : start + 2], num_items_in_batch=8).loss.backward()
    for name, parameter in model.trained_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", OWN_READ_OUT)
def test_a_read_out_of_its_own_needs_a_sidestep_head(method: str) -> None:
    backbone = FAMILIES["vit"].model()
    with pytest.raises(ValueError, match=f"{METHODS[method].name} has a read-out of its own.*pass head=ss.Classify"):
        ss.attach(backbone, config_of(method))
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_the_registry_is_what_the_laws_cover() -> None:
    assert {"read", "probe", "bitfit", "full", "late_writer"} <= set(METHODS)
    assert all(isinstance(method, Method) for method in METHODS.values())
