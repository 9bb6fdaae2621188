"""DTL and SynQT on the backbones of their oracles, attached to through Sidestep's public face."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

import sidestep as ss
from parity_backbones import timm_swin, timm_vit
from parity_files import Names, Oracle, OracleError, Reproduction, load, rename
from sidestep.backbone import find_places
from sidestep.backbone.families import Pool
from sidestep.methods import MethodConfig
from sidestep.model.side_model import SideModel

STEEP = 100.0
"""From this beta on, DTL's gate is so steep that rounding of its input shows in the gradients."""

Build = Callable[[Oracle], nn.Module]

HEAD = (r"head\.linear\.(\w+)", r"head.\1")


def dtl_vit(oracle: Oracle, build: Build = timm_vit) -> Reproduction:
    """DTL on a ViT: the patches' mean is taken before the final norm; one convolution."""
    return _dtl(oracle, build(oracle), pool="mean_pre_norm", fusion="lora_fusion.weight")


def dtl_swin(oracle: Oracle, build: Build = timm_swin) -> Reproduction:
    """DTL on a Swin: the mean is taken after the final norm; one convolution a stage."""
    return _dtl(oracle, build(oracle), pool="mean", fusion=r"lora_fusions.\1.weight")


def _dtl(oracle: Oracle, backbone: nn.Module, *, pool: Pool, fusion: str) -> Reproduction:
    trace = Trace.of(backbone)
    config = _dtl_config(oracle, len(trace.flags))
    names = (
        (r"side\.reads\.(\d+)\.weight", r"lora_dict.\1.lora_A"),
        (r"side\.writes\.(\d+)\.weight", r"lora_dict.\1.lora_B"),
        (r"side\.mixes\.(\d+)\.weight", fusion),
        HEAD,
    )
    outputs, gradients = run(oracle, *fit(oracle, backbone, config, pool, names))
    return Reproduction(
        outputs=outputs,
        gradients=gradients,
        states=trace.states,
        flags={"block_in_requires_grad": trace.flags},
        gradient_tolerance=1e-4 if config.beta >= STEEP else 1e-5,
    )


def _dtl_config(oracle: Oracle, depth: int) -> ss.DTLConfig:
    reads, writes = (oracle.numbers(f"meta.{name}") for name in ("lora_before", "add_after"))
    for blocks in (reads, writes):
        if not blocks or blocks != list(range(blocks[0], depth)):
            raise OracleError(
                f"has reads or writes at {blocks}: Sidestep's DTL has them up to the last block, {depth - 1}"
            )
    return ss.DTLConfig(
        rank=oracle[f"w.lora_dict.{reads[0]}.lora_A"].shape[0],
        first_read=reads[0],
        late_blocks=len(writes),
        beta=oracle.number("meta.beta"),
        kernel=int(oracle.number("meta.fusion_size")),
    )


def synqt(oracle: Oracle, build: Build = timm_vit) -> Reproduction:
    """SynQT on a ViT, in eval mode."""
    backbone = build(oracle)
    trace = Trace.of(backbone, "x_")
    hidden, attention_hidden = oracle.numbers("meta.adapter_hidden")
    config = ss.SynQTConfig(
        queries=int(oracle.number("meta.token_nums")), hidden=hidden, attention_hidden=attention_hidden
    )
    model, official = fit(oracle, backbone, config, None, SYNQT_NAMES)
    for number, block in enumerate(model.side.blocks):
        block.project.register_forward_hook(partial(trace.note, f"qsm{number}.in"))
        block.register_forward_hook(partial(trace.note, f"qsm{number}.out"))
    model.side.token_norm.register_forward_pre_hook(partial(trace.note, "head.feat_in"))
    model.side.head_norm.register_forward_pre_hook(partial(trace.note, "head.combined"))
    outputs, gradients = run(oracle, model, official)
    return Reproduction(
        outputs=outputs, gradients=gradients, states=trace.states, flags={"x_requires_grad": trace.flags}
    )


def _adapter(own: str, official: str) -> Names:
    maps = (("down", "fc1"), ("up", "fc2"))
    return tuple((rf"{own}\.{a}\.(?P<kind>\w+)", rf"{official}.mlp.{b}.\g<kind>") for a, b in maps)


def _norm(own: str, official: str) -> Names:
    return ((rf"{own}\.(?P<kind>\w+)", rf"{official}.\g<kind>"),)


_OWN, _OFFICIAL = r"side\.blocks\.(?P<block>\d+)", r"synqt.qsm_block.\g<block>"

SYNQT_NAMES: Names = (
    (r"side\.queries", "synqt.q"),
    (r"side\.feat_scale", "synqt.feat_scale"),
    *_adapter(rf"{_OWN}\.project", r"synqt.prompt_ffn.\g<block>"),
    *_norm(rf"{_OWN}\.norm_attention", rf"{_OFFICIAL}.norm1"),
    *_norm(rf"{_OWN}\.norm_query", rf"{_OFFICIAL}.attn.q_norm"),
    *_norm(rf"{_OWN}\.norm_value", rf"{_OFFICIAL}.attn.kv_norm"),
    *_adapter(rf"{_OWN}\.(?P<part>[qkv])(uery|ey|alue)", rf"{_OFFICIAL}.attn.\g<part>_proj"),
    *_adapter(rf"{_OWN}\.out", rf"{_OFFICIAL}.attn.proj"),
    *_norm(rf"{_OWN}\.norm_mlp", rf"{_OFFICIAL}.norm2"),
    *_adapter(rf"{_OWN}\.mlp", rf"{_OFFICIAL}.mlp"),
    (rf"{_OWN}\.(?P<part>attn|ffn)_scale", rf"{_OFFICIAL}.\g<part>_scale"),
    *_norm(r"side\.token_norm", "synqt.out_norm"),
    *_adapter(r"side\.token_adapter", "synqt.mlp"),
    *_norm(r"side\.gate", "synqt.out_combine.get_weight.fc1"),
    *_norm(r"side\.head_norm", "synqt.head_norm"),
    HEAD,
)


@dataclass
class Trace:
    """What goes into a backbone's blocks, and what comes out of them before a method adds to it."""

    prefix: str = ""
    states: dict[str, Tensor] = field(default_factory=dict)
    flags: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, backbone: nn.Module, prefix: str = "") -> Trace:
        """A trace that the next pass fills; made before `attach`, so that it sees the block's own output."""
        trace = cls(prefix)
        for number, place in enumerate(place for place in find_places(backbone) if place.site.kind == "block"):
            trace.flags.append(0)
            place.module.register_forward_pre_hook(partial(trace.before, number))
            place.module.register_forward_hook(partial(trace.after, number))
        return trace

    def before(self, number: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep a block's input and whether it requires a gradient."""
        self.flags[number] = int(args[0].requires_grad)
        self.states[f"block{number}.{self.prefix}in"] = _tokens(args[0])

    def after(self, number: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep a block's own output."""
        self.states[f"block{number}.{self.prefix}out"] = _tokens(output)

    def note(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None) -> None:
        """Keep a module's output, or at a hook before it its input."""
        self.states[name] = (args[0] if output is None else output).detach().clone()


def _tokens(hidden: Tensor) -> Tensor:
    """(batch, tokens, width), where timm's Swin has (batch, rows, columns, width)."""
    return (hidden.flatten(1, 2) if hidden.dim() == 4 else hidden).detach().clone()


def fit(
    oracle: Oracle, backbone: nn.Module, config: MethodConfig, pool: Pool | None, names: Names
) -> tuple[SideModel, dict[str, str]]:
    """A method and a head with the file's weights.

    Args:
        names: the official names of Sidestep's.

    Returns:
        The model in eval mode, and the official name of each tensor of its task.
    """
    head = ss.Classify(num_labels=oracle["w.head.weight"].shape[0], pool=pool)
    model = ss.attach(backbone, config, head=head)
    official = {own: rename(own, names) for own in model.state_dict()}
    load(model, {own: oracle[f"w.{name}"] for own, name in official.items()})
    return model.eval(), official


def run(oracle: Oracle, model: SideModel, official: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients."""
    output = model(oracle["in.x"], labels=oracle["in.y"])
    output.loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {name: gradient for own, name in official.items() if (gradient := parameters[own].grad) is not None}
    return {"logits": output.logits.detach(), "loss": output.loss.detach()}, gradients
