"""Diff pruning's oracles: gates, a relaxed step, projection and a step under a fixed mask.

The step files drive a toy model whose parts have BERT's names. It runs here with `DiffPruningOptimizer` holding its
weights; the file's noise takes the place of the generator's, and chunks are small, so that every tensor has several.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity_files import Oracle, OracleError
from sidestep.sparse.diff import SparseDiff
from sidestep.sparse.hard_concrete import HardConcrete, Penalty
from sidestep.sparse.optimizer import DiffPruningOptimizer
from sidestep.sparse.selection import largest, sweep_over

RELATIVE = 1e-5
ABSOLUTE = 1e-7
ABSOLUTE_ALPHA = 1e-9  # gradients of alpha: the penalty's is 3e-8 at most
LAMBDA = 1.25e-7
BISECTION = 1e-6  # how far below its threshold the release's bisection may leave entries out
EMBEDDING = "bert.embeddings.word_embeddings.weight"
CHUNK = 7
PARTS = ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias")


@dataclass
class Comparison:
    """How far what was found is from a file, as shares of what is allowed: absolute + relative * size, per entry."""

    shares: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, found: Tensor, expected: Tensor, absolute: float = ABSOLUTE) -> None:
        """Compare a tensor.

        Raises:
            OracleError: if the shapes differ.
        """
        if found.shape != expected.shape:
            raise OracleError(f"has {name} of shape {tuple(expected.shape)}, Sidestep's has {tuple(found.shape)}")
        share = (found - expected).abs() / (absolute + RELATIVE * expected.abs())
        self.shares[name] = torch.nan_to_num(share, nan=torch.inf).max().item()

    def require(self, name: str, holds: bool) -> None:
        """Note what has to be exactly so."""
        self.shares[name] = 0.0 if holds else torch.inf

    @property
    def passed(self) -> bool:
        """Whether all is within its tolerance."""
        return all(share <= 1 for share in self.shares.values())

    def __str__(self) -> str:
        worst = max(self.shares, key=lambda name: self.shares[name])
        return (
            f"{'ok  ' if self.passed else 'FAIL'} {len(self.shares)} tensors, the farthest is {worst} at "
            f"{self.shares[worst]:.3f} of its tolerance (relative {RELATIVE:.0e}, absolute {ABSOLUTE:.0e}, for "
            f"gradients of alpha {ABSOLUTE_ALPHA:.0e})"
        )


def diff_z(oracle: Oracle) -> Comparison:
    """Gates for several stretches."""
    found, alpha, u = Comparison(), oracle["alpha"], oracle["u"]
    for tag in {name.rpartition(".")[0] for name in oracle.tensors if name.endswith(".z")}:
        ends = re.fullmatch(r"l(-?[\d.]+)_r([\d.]+)", tag)
        if ends is None:
            raise OracleError(f"has the stretch {tag!r}: it has to be named as l-1.5_r1.5")
        gate = HardConcrete(low=float(ends[1]), high=float(ends[2]))
        z, slope = gate.mask_and_slope(alpha, u)
        found.require(f"{tag}.z as drawn alone", torch.equal(z, gate.mask(alpha, u)))
        found.add(f"{tag}.z", z, oracle[f"{tag}.z"])
        found.add(f"{tag}.dz_dalpha", slope, oracle[f"{tag}.dz_dalpha"])
        found.add(f"{tag}.p_nonzero", gate.nonzero(alpha), oracle[f"{tag}.p_nonzero"])
    return found


def diff_step(oracle: Oracle) -> Comparison:
    """A relaxed step, with or without a gate for each tensor."""
    found, structured = Comparison(), bool(oracle.group("alpha_group."))
    theta, optimizer = _relaxed(oracle, structured, Penalty(weight=LAMBDA, kind="sum"))
    _add_backward(found, oracle, theta)
    gates = _joined(optimizer.masks())
    for name, z in gates.items():
        found.add(f"z_eff.{name}", z, oracle[f"z_eff.{name}"].flatten())
    _add_gradients(found, oracle, optimizer, "total")
    found.add("l0_loss", torch.tensor([optimizer.penalty_value()]), oracle["l0_loss"])
    dense = sum(value.numel() for name, value in theta.items() if name not in gates)
    nonzero = sum(int((z > 0).sum()) for z in gates.values()) + dense
    found.require("nonzero_params", nonzero == int(oracle["nonzero_params"]))

    free, without_penalty = _relaxed(oracle, structured, Penalty(weight=0.0))
    for name, value in theta.items():
        free[name].grad = value.grad
    _add_gradients(found, oracle, without_penalty, "task")
    plain = _relaxed(oracle, False, Penalty(weight=1.0))[1]
    found.add("l0_pen_elem_sum", torch.tensor([plain.penalty_value()]), oracle["l0_pen_elem_sum"])
    if structured:
        paper = _relaxed(oracle, True, Penalty(weight=1.0, kind="product"))[1]
        name = "paper_expected_l0_product_form"
        found.add(name, torch.tensor([paper.penalty_value()]), oracle[name])
    return found


def diff_project(oracle: Oracle) -> Comparison:
    """Projection to several densities.

    The release finds its threshold by bisection to 1e-6 and may keep fewer entries than the density allows. What it
    keeps has to be kept here too with the same values; what is kept here besides has to lie within 1e-6 below its
    threshold, and the entries kept may not be more than the density allows.
    """
    found, base = Comparison(), oracle.group("p0.")
    diffs = {name: value - base[name] for name, value in oracle.group("theta.").items()}
    total = sum(diff.numel() for diff in diffs.values())
    for tag in sorted({name.removesuffix(".threshold") for name in oracle.tensors if name.endswith(".threshold")}):
        kept = largest(sweep_over(diffs, CHUNK), int(float(tag.removeprefix("t")) * total))
        own = {name: _dense(diff, *kept[name]) for name, diff in diffs.items()}
        threshold = oracle[f"{tag}.threshold"].item()
        for name, expected in oracle.group(f"{tag}.delta.").items():
            more = (own[name] != 0) & (expected == 0)
            below = own[name][more].abs().double()
            found.require(f"{tag}: what is kept of {name} besides", bool((below >= threshold - BISECTION).all()))
            found.add(f"{tag}.delta.{name}", own[name].masked_fill(more, 0), expected)
        achieved = sum(len(positions) for positions, _ in kept.values()) / total
        official = oracle[f"{tag}.achieved"].item()
        found.require(f"{tag}.achieved", official - 1e-9 <= achieved <= float(tag.removeprefix("t")))
    return found


def diff_fixmask(oracle: Oracle) -> Comparison:
    """A step under a fixed mask, from raw w: by the file, entries of w that the mask leaves out play no part."""
    found, base, w = Comparison(), oracle.group("p0."), oracle.group("w.")
    theta = {name: nn.Parameter(value.clone()) for name, value in base.items()}
    masked = {name: p for name, p in theta.items() if "classifier" not in name}
    places = {name: oracle[f"mask.{name}"].flatten().nonzero().flatten() for name in masked}
    diff = SparseDiff(masked, sum(map(len, places.values())), torch.float32)
    diff.place({name: (index, w[name].flatten()[index]) for name, index in places.items()})
    seen: dict[str, Tensor] = {}
    diff.watch(lambda name, gradient: seen.update({name: gradient}))
    for name in theta.keys() - masked.keys():
        theta[name].data += w[name]
    _add_backward(found, oracle, theta, seen)
    gathered = diff.values.grad.split([len(index) for index in places.values()])
    for (name, index), gradient in zip(places.items(), gathered, strict=True):
        found.add(f"grad_w.{name}", _dense(base[name], index, gradient), oracle[f"grad_w.{name}"])
    for name in theta.keys() - masked.keys():
        found.add(f"grad_w.{name}", theta[name].grad, oracle[f"grad_w.{name}"])
    return found


class _FileNoise:
    """A file's noise in the place of a generator's."""

    def __init__(self, oracle: Oracle, names: list[str]) -> None:
        self.oracle, self.names = oracle, names

    def __call__(self, draw: int, tensor: int, chunk: int, like: Tensor) -> Tensor:
        name = self.names[tensor]
        if chunk == 0:
            return self.oracle[f"u_group.{name}"][0]
        return self.oracle[f"u.{name}"].flatten()[(chunk - 1) * CHUNK :][: like.numel()]


def _relaxed(
    oracle: Oracle, structured: bool, penalty: Penalty
) -> tuple[dict[str, nn.Parameter], DiffPruningOptimizer]:
    """The toy's weights and the optimizer that holds them, at the file's w and alpha."""
    base = oracle.group("p0.")
    theta = {name: nn.Parameter(value.clone()) for name, value in base.items()}
    masked = {name: p for name, p in theta.items() if "classifier" not in name}
    dense = {name: p for name, p in theta.items() if name not in masked}
    optimizer = DiffPruningOptimizer(
        masked,
        dense.values(),
        lr=1e-5,
        gate=HardConcrete(),
        penalty=penalty,
        structured=structured,
        noise=_FileNoise(oracle, list(masked)),
        chunk=CHUNK,
    )
    with torch.no_grad():
        for name, p in masked.items():
            optimizer.state[p]["w"].copy_(oracle[f"w.{name}"].flatten())
            optimizer.state[p]["alpha"].copy_(oracle[f"alpha.{name}"].flatten())
            if structured:
                optimizer.state[p]["group"][0] = oracle[f"alpha_group.{name}"][0]
        for name, p in dense.items():
            p += oracle[f"w.{name}"]
    optimizer.draw()
    return theta, optimizer


def _add_backward(
    found: Comparison, oracle: Oracle, theta: Mapping[str, nn.Parameter], freed: Mapping[str, Tensor] | None = None
) -> None:
    """Weights, loss and the gradients of the weights (those that were freed, as they were seen before)."""
    loss = F.cross_entropy(_toy(theta, oracle["input_ids"]), oracle["labels"])
    loss.backward()
    found.add("loss", loss.detach()[None], oracle["loss"])
    for name, value in theta.items():
        found.add(f"theta.{name}", value.detach(), oracle[f"theta.{name}"])
        gradient = (freed or {}).get(name, value.grad)
        found.add(f"grad_theta.{name}", gradient, oracle[f"grad_theta.{name}"])


def _add_gradients(found: Comparison, oracle: Oracle, optimizer: DiffPruningOptimizer, kind: str) -> None:
    """The gradients of w and of the alphas as a step uses them."""
    for weight in optimizer.relaxed:
        chunks = [(of_w.clone(), of_alpha, sums) for _, of_w, of_alpha, sums in weight.sweep(0)]
        of_w, of_alpha, sums = (list(parts) for parts in zip(*chunks, strict=True))
        found.add(f"grad_w.{weight.name}", torch.cat(of_w), oracle[f"grad_w.{weight.name}"].flatten())
        name = f"grad_alpha_{kind}.{weight.name}"
        found.add(name, torch.cat(of_alpha), oracle[name].flatten(), ABSOLUTE_ALPHA)
        of_group = weight.group_gradient(0, torch.stack(sums).sum(0))
        if of_group is not None:
            name = f"grad_alpha_group_{kind}.{weight.name}"
            found.add(name, of_group[None], oracle[name], ABSOLUTE_ALPHA)
            found.add(f"z_group.{weight.name}", weight.group_mask(0)[None], oracle[f"z_group.{weight.name}"])


def _toy(weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """The files' model: (rows, tokens) -> (rows, classes)."""
    if EMBEDDING not in weights:
        raise OracleError(f"has no weights named {EMBEDDING}")
    hidden, layer = F.embedding(ids, weights[EMBEDDING]), 0
    while f"bert.encoder.layer.{layer}.dense.weight" in weights:
        own = {name: weights[f"bert.encoder.layer.{layer}.{name}"] for name in PARTS}
        changed = hidden + torch.tanh(F.linear(hidden, own["dense.weight"], own["dense.bias"]))
        hidden = F.layer_norm(changed, changed.shape[-1:], own["LayerNorm.weight"], own["LayerNorm.bias"])
        layer += 1
    return F.linear(hidden.mean(1), weights["classifier.weight"], weights["classifier.bias"])


def _joined(chunks: Iterator[tuple[str, int, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for name, _, part in chunks:
        found.setdefault(name, []).append(part)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _dense(like: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    return torch.zeros_like(like).flatten().index_copy(0, positions, values).view_as(like)
