"""Side attention against its definition, unrolled by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sidestep as ss
from sidestep.interface.layers import rotate
from tiny import FAMILIES, randomize


def side_parameters(model: ss.SideModel) -> int:
    return sum(p.numel() for name, p in model.trained_parameters() if name.startswith("side."))


@pytest.mark.parametrize(("rank", "expansion", "levels", "read"), [(8, 2, None, 4), (6, 3, 2, 3)])
def test_parameters_are_as_stated(rank: int, expansion: int, levels: int | None, read: int) -> None:
    config = ss.SideAttentionConfig(rank=rank, heads=2, expansion=expansion, levels=levels)
    d, r, e = 16, rank, expansion
    level = d * r + d + r + 4 * r * r + 2 * e * r * r + e * r + r + 1
    model = ss.attach(FAMILIES["bert"].model(), config, head=ss.Classify(num_labels=3))
    assert side_parameters(model) == read * level + r * d + d


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def unrolled(side: Any, hidden: list[Tensor], keep: Tensor, *, causal: bool, heads: int, rotary: bool) -> Tensor:
    """The stream by the formulas of the method's page, head by head."""
    state = torch.zeros(())
    for (name, level), h in zip(side.levels.items(), hidden, strict=True):
        tap = side.taps[name]
        normed = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * tap.scale
        x = state + normed @ tap.weight.T + tap.bias
        z = rms(x)
        q, k, v = (z @ level.attend.weight.T).chunk(3, dim=-1)
        tokens, width = x.shape[1], q.shape[-1] // heads
        read = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            query, key = q[..., own], k[..., own]
            if rotary:
                places = torch.arange(tokens)
                query, key = (rotate(one[:, None], places)[:, 0] for one in (query, key))
            scores = query @ key.transpose(1, 2) / math.sqrt(width)
            seen = keep[:, None].expand(-1, tokens, -1)
            if causal:
                seen = seen & torch.ones(tokens, tokens).tril().bool()
            read.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[..., own])
        attended = torch.cat(read, dim=-1) @ level.out.weight.T
        mlp = F.gelu(z @ level.inner.weight.T + level.inner.bias) @ level.outer.weight.T + level.outer.bias
        state = x + level.gate * (attended + mlp)
    return state


@pytest.mark.parametrize(("family", "rotary"), [("bert", False), ("bert", True), ("llama", True), ("llama", False)])
def test_the_stream_is_what_the_definition_says(family: str, rotary: bool) -> None:
    positions: Any = "rotary" if rotary else "none"
    config = ss.SideAttentionConfig(rank=8, heads=2, dropout=0.0, positions=positions)
    model = ss.attach(FAMILIES[family].model(), config, head=ss.Classify(num_labels=3, pool="mean")).eval()
    randomize(model)
    states: list[Tensor] = []
    write = model.side.write

    def noting(state: Any, hidden: Tensor, site: Any) -> Any:
        if site.last:
            states.append(state)
        return write(state, hidden, site)

    model.side.write = noting  # type: ignore[method-assign]
    batch = FAMILIES[family].inputs()
    keep, hidden = batch["attention_mask"].bool(), levels_of(model, batch)
    with torch.no_grad():
        model(**batch)
        wanted = unrolled(model.side, hidden, keep, causal=family == "llama", heads=2, rotary=rotary)
    torch.testing.assert_close(states[0][keep], wanted[keep], rtol=1e-4, atol=1e-5)


def levels_of(model: ss.SideModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """What goes into the bare backbone's first block, and what each block gives."""
    blocks, found = [place.module for place in model.places if place.site.kind == "block"], list[Tensor]()
    hooks = [blocks[0].register_forward_pre_hook(lambda module, args: found.append(args[0]))]
    for block in blocks:
        hooks.append(
            block.register_forward_hook(
                lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out)
            )
        )
    with torch.no_grad():
        model.trunk(**batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("depth", "levels", "blocks"),
    [(3, None, (0, 1, 2)), (24, None, tuple(range(1, 24, 2))), (30, 3, (9, 19, 29)), (6, 1, (5,))],
)
def test_levels_are_spread_evenly_and_the_last_is_among_them(
    depth: int, levels: int | None, blocks: tuple[int, ...]
) -> None:
    assert ss.SideAttentionConfig(levels=levels).blocks(depth) == blocks


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"heads": 3}, {"expansion": 0}, {"levels": 0}, {"dropout": 1.0}, {"positions": "learned"}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ss.SideAttentionConfig(**wrong)


def test_a_head_that_cannot_be_turned_is_refused_on_a_causal_backbone() -> None:
    config = ss.SideAttentionConfig(rank=6, heads=2)
    with pytest.raises(ss.UnsupportedBackbone, match="rotary positions turn pairs of channels, but a head has 3"):
        ss.attach(FAMILIES["llama"].model(), config, head=ss.Classify(num_labels=3))
    ss.attach(FAMILIES["bert"].model(), config, head=ss.Classify(num_labels=3))
