"""UniPT's interaction on the levels of its oracles: the release's module has these as inputs, so no backbone runs."""

from __future__ import annotations

import torch
from torch import Tensor

from parity_files import Names, Oracle, Reproduction, load, rename
from sidestep.methods.unipt import Interaction, Variant

MAPS: Names = (
    (r"confidence\.weight", "gate_layer.weight"),
    (r"up\.(\w+)", r"upsample_layer.1.\1"),
)
VSE_NAMES: Names = (
    (r"levels\.(\d+)\.tap\.(\w+)", r"downsample_layers.\1.0.\2"),
    (r"levels\.(\d+)\.norm\.(\w+)", r"downsample_layers.\1.1.\2"),
    (r"mix\.(\d)\.(\w+)", r"projection_layer.\1.\2"),
    *MAPS,
)
CLIP4CLIP_NAMES: Names = (
    (r"levels\.(\d+)\.tap\.(\w+)", r"downsample_layers.\1.1.\2"),
    (r"anchor\.tap\.(\w+)", r"downsample_layer.1.\1"),
    *MAPS,
)


def unipt_vse(oracle: Oracle) -> Reproduction:
    """The text tower of VSE: a result for every token."""
    net, levels = _prepare(oracle, "vse", VSE_NAMES)
    keep = torch.arange(levels[0].shape[1]) < oracle["in.lengths"][:, None]
    return _finish(oracle, net, net.tokens(levels, keep), VSE_NAMES)


def unipt_clip4clip(oracle: Oracle) -> Reproduction:
    """The text tower of CLIP4Clip: one vector."""
    net, levels = _prepare(oracle, "clip4clip", CLIP4CLIP_NAMES)
    keep = oracle["in.mask"].bool()
    vector = net.vector(levels, oracle["in.last"][:, 0], oracle["in.position"], keep)
    return _finish(oracle, net, vector, CLIP4CLIP_NAMES)


def _prepare(oracle: Oracle, variant: Variant, names: Names) -> tuple[Interaction, list[Tensor]]:
    """The module with the file's weights, and its projections of the file's levels."""
    levels = sum(name.startswith("in.x") for name in oracle.tensors)
    out, hidden = oracle["w.upsample_layer.1.weight"].shape
    net = Interaction(oracle["in.x0"].shape[-1], hidden, levels, out, variant)
    load(net, {own: oracle[f"w.{rename(own, names)}"] for own in net.state_dict()})
    return net, [net.read(number, oracle[f"in.x{number}"]) for number in range(levels)]


def _finish(oracle: Oracle, net: Interaction, y: Tensor, names: Names) -> Reproduction:
    loss = (y * oracle["in.c"]).mean()
    loss.backward()
    gradients = {rename(own, names): parameter.grad for own, parameter in net.named_parameters()}
    return Reproduction(outputs={"y": y.detach(), "loss": loss.detach()}, gradients=gradients)
