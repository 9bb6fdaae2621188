"""LST on the T5 of its oracles, attached to through Sidestep's public face."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

import sidestep as ss
from parity_backbones import t5
from parity_files import Names, Oracle, Reproduction, load, rename
from sidestep.model.side_model import SideModel

STACK, BLOCK = r"side\.ladders\.(?P<stack>\w+)", r"\g<stack>.side_block.\g<block>.layer"
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}


def lst_t5(oracle: Oracle) -> Reproduction:
    """A whole T5 with its ladders and its language model head."""
    backbone = t5(oracle)
    outputs: dict[str, Tensor] = {}
    for stack in ("encoder", "decoder"):
        norm = backbone.get_submodule(stack).final_layer_norm
        norm.register_forward_hook(partial(_note, outputs, f"{stack}_last_hidden"))
    config = ss.LSTConfig(
        reduction=int(oracle.number("meta.reduction")),
        layers=tuple(oracle.numbers("meta.side_layers")),
        heads=backbone.config.num_heads,
        head_width=backbone.config.d_kv,
        inner_width=backbone.config.d_ff,
        buckets=backbone.config.relative_attention_num_buckets,
    )
    model = ss.attach(backbone, config).eval()
    official = _fit(model, oracle)
    for stack, ladder in model.side.ladders.items():
        ladder.norm.register_forward_hook(partial(_note, outputs, f"{stack}_side_hidden"))
    names = ("input_ids", "attention_mask", "decoder_input_ids", "labels")
    found = model(**{name: oracle[f"in.{name}"] for name in names})
    found.loss.backward()
    outputs |= {"logits": found.logits.detach(), "loss": found.loss.detach()}
    return Reproduction(outputs=outputs, gradients=_gradients(model, official))


def _fit(model: SideModel, oracle: Oracle) -> dict[str, str]:
    """Load the file's weights; the official name of each tensor but the gates, which it has one by one."""
    first = oracle.numbers("meta.side_layers")[0]
    parts, weights = names(first), {}
    official = {own: rename(own, parts) for own in model.state_dict()}
    for own, name in official.items():
        one_by_one = own.endswith(".gates")
        weights[own] = _gates(oracle, name) if one_by_one else oracle[f"w.{name}"]
    load(model, weights)
    return official


def _gates(oracle: Oracle, name: str) -> Tensor:
    """The gates of a stack (blocks,), those without a rung among them."""
    found = oracle.group(f"w.{name}.")
    return nn.utils.parameters_to_vector(found[str(block)] for block in range(len(found)))


def _gradients(model: SideModel, official: dict[str, str]) -> dict[str, Tensor]:
    """By official names; a gate that is never read has the gradient zero."""
    found: dict[str, Tensor] = {}
    for own, parameter in model.trained_parameters():
        name, gradient = official[own], parameter.grad
        if own.endswith(".gates"):
            found |= {f"{name}.{block}": part[None] for block, part in enumerate(gradient)}
        else:
            found[name] = gradient
    return found


def names(first: int) -> Names:
    """The official names of the side's tensors; the first rung's block holds the table of relative positions."""
    attention = (("attention", r"0", "SelfAttention"), ("cross", r"1", "EncDecAttention"))
    block = rf"{STACK}\.blocks\.(?P<block>\d+)"
    maps = tuple(
        (rf"{block}\.{own}\.{part}\.weight", rf"{BLOCK}.{layer}.{module}.{short}.weight")
        for own, layer, module in attention
        for part, short in _ATTENTION.items()
    )
    mlp = tuple(
        (
            rf"side\.ladders\.{stack}\.blocks\.(\d+)\.{own}\.weight",
            rf"{stack}.side_block.\1.layer.{layer}.{name}.weight",
        )
        for stack, layer in (("encoder", 1), ("decoder", 2))
        for own, name in (
            ("norm_mlp", "layer_norm"),
            ("inner", "DenseReluDense.wi"),
            ("outer", "DenseReluDense.wo"),
        )
    )
    table = rf"\g<stack>.side_block.{first}.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        *maps,
        *mlp,
        (rf"{block}\.norm_attention\.weight", rf"{BLOCK}.0.layer_norm.weight"),
        (rf"{block}\.norm_cross\.weight", rf"{BLOCK}.1.layer_norm.weight"),
        (rf"{STACK}\.first\.(?P<kind>\w+)", r"\g<stack>.side_first_downsample.\g<kind>"),
        (rf"{STACK}\.downs\.(?P<block>\d+)\.(?P<kind>\w+)", r"\g<stack>.side_downsamples.\g<block>.\g<kind>"),
        (rf"{STACK}\.gates", r"\g<stack>.side_gate_params"),
        (rf"{STACK}\.norm\.weight", r"\g<stack>.final_side_layer_norm.weight"),
        (rf"{STACK}\.bias", table),
        (r"side\.up\.(\w+)", r"side_final_upsample.\1"),
    )


def _note(outputs: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    outputs[name] = output.detach()
