"""SHERL on T5 and BERT, attached to through the public face, and its aggregations alone where that is all of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import sidestep as ss
from parity_backbones import bert, depth, t5
from parity_files import Names, Oracle, Reproduction, load, rename
from sidestep.methods.sherl.parts import Aggregation, ConvAggregation, Maps, PooledAggregation
from sidestep.model.heads import unit
from sidestep.model.heads.gpo import GPO

MDETR_NORM_EPS = 1e-5


def _aggregation(
    own: str, official: str, *, tap: str, norm: str = "", out: str = "fc_out", norm_out: str = ""
) -> Names:
    """The official names of an aggregation's tensors, which begin with `official`."""
    level, last = rf"{official}hor_block.\g<level>", r"\g<kind>"
    parts = {
        r"levels\.(?P<level>\d+)\.tap": f"{level}.{tap}",
        r"levels\.(?P<level>\d+)\.value": f"{level}.fc2",
        r"levels\.(?P<level>\d+)\.gate": f"{level}.fc3",
        r"levels\.(?P<level>\d+)\.norm": f"{level}.{norm}",
        r"merge\.score": f"{official}guide_block.fc_attn",
        r"merge\.mlp\.(?P<map>\d)": rf"{official}guide_block.mlp.\g<map>",
        "out": f"{official}{out}",
        "norm_out": f"{official}{norm_out}",
    }
    maps = tuple((rf"{own}{part}\.(?P<kind>weight|bias)", f"{name}.{last}") for part, name in parts.items())
    return (*maps, (rf"{own}gate", f"{official}gate_params"))


GATED = partial(_aggregation, tap="fc1")
T5_NAMES: Names = (
    *GATED(r"side\.stacks\.(?P<stack>\w+)\.", r"\g<stack>.side_mtsa_block."),
    (r"side\.norms\.(\w+)\.weight", r"\1.final_side_layer_norm.weight"),
)
BERT_NAMES: Names = _aggregation(
    r"side\.stacks\.encoder\.", "side_module.", tap="fc.0", norm="fc.1", out="fc_out.1", norm_out="fc_out.2"
)
GATED_NAMES: Names = GATED("", "")
MDETR_NAMES: Names = _aggregation("", "", tap="fc", norm="norm", norm_out="norm_out")
CNN_NAMES: Names = (
    (r"levels\.(\d+)\.tap\.(\w+)", r"hor_block.\1.conv.0.\2"),
    (r"levels\.(\d+)\.norm\.(\w+)", r"hor_block.\1.conv.1.\2"),
    (r"merge\.score\.(\w+)", r"guide_block.fc_attn.\1"),
    (r"out\.tap\.(\w+)", r"conv_out.0.\1"),
    (r"out\.norm\.(\w+)", r"conv_out.1.\1"),
    (r"gate", r"gate_params"),
)
POOLED_NAMES: Names = (
    (r"levels\.(\d+)\.tap\.(\w+)", r"hor_block.\1.fc.\2"),
    (r"guide\.tap\.(\w+)", r"hor_block_last.fc.\1"),
    (r"merge\.score\.(\w+)", r"guide_block.layer_attn.\1"),
    (r"spatial\.(\d+)\.(\w+)", r"guide_block.spatial_attn.\1.\2"),
    (r"level_gates", r"guide_block.gate_parameters"),
    (r"out\.(\w+)", r"fc_out.\1"),
)


def sherl_t5(oracle: Oracle) -> Reproduction:
    """SHERL on a whole T5, with its language model head."""
    backbone = t5(oracle)
    outputs: dict[str, Tensor] = {}
    for stack in ("encoder", "decoder"):
        norm = backbone.get_submodule(stack).final_layer_norm
        norm.register_forward_hook(partial(_note, outputs, f"{stack}_last_hidden"))
    config = ss.SherlConfig(
        reduction=int(oracle.number("meta.reduction")), layers=tuple(oracle.numbers("meta.side_layers"))
    )
    model = ss.attach(backbone, config).eval()
    official = _fit(model, oracle, T5_NAMES)
    for stack, norm in model.side.norms.items():
        norm.register_forward_hook(partial(_note, outputs, f"{stack}_side_hidden"))
    names = ("input_ids", "attention_mask", "decoder_input_ids", "labels")
    found = model(**{name: oracle[f"in.{name}"] for name in names})
    found.loss.backward()
    outputs |= {"logits": found.logits.detach(), "loss": found.loss.detach()}
    return Reproduction(outputs=outputs, gradients=_gradients(model, official))


def sherl_vse_bert(oracle: Oracle) -> Reproduction:
    """SHERL on a BERT, with the linear map and the pooling of VSE-infinity behind it."""
    backbone = bert(oracle)
    states: dict[str, Tensor] = {}
    blocks = backbone.encoder.layer
    for number, block in enumerate(blocks):
        name = "side_out" if number == len(blocks) - 1 else f"side_in.feat{number}"
        block.register_forward_pre_hook(partial(_note_input, states, name))
    blocks[-2].register_forward_hook(partial(_note, states, f"side_in.feat{len(blocks) - 1}"))
    hidden = oracle["w.side_module.hor_block.0.fc.0.weight"].shape[0]
    model = ss.attach(backbone, ss.SherlConfig(hidden=hidden)).eval()
    official = _fit(model.side, oracle, BERT_NAMES, own="side.")
    head = TextHead.of(oracle)
    lengths = oracle["in.lengths"]
    ids = oracle["in.input_ids"]
    keep = torch.arange(ids.shape[1]) < lengths[:, None]
    tokens = model(input_ids=ids, attention_mask=keep.long()).last_hidden_state
    embedding = head(tokens, lengths)
    loss = _loss(oracle, embedding)
    gradients = _gradients(model.side, official) | _gradients(head, {name: name for name, _ in head.named_parameters()})
    return Reproduction(outputs={"emb": embedding.detach(), "loss": loss}, gradients=gradients, states=states)


def sherl_block(oracle: Oracle) -> Reproduction:
    """The aggregation of CLIP-ViL or MDETR on given features."""
    mdetr = "w.guide_block.mlp.0.weight" in oracle.tensors
    hidden, width = oracle["w.guide_block.fc_attn.weight"].shape[1], oracle["in.x0"].shape[-1]
    config = ss.SherlConfig(hidden=hidden, projection="gated")
    if mdetr:
        config = ss.SherlConfig(
            hidden=hidden,
            projection="linear_norm",
            norm_out=True,
            norm_out_eps=MDETR_NORM_EPS,
            merge_mlp=True,
            eps=1e-6,
        )
    features = _features(oracle)
    block = Aggregation(width, len(features), config.filled([])).eval()
    official = _fit(block, oracle, MDETR_NAMES if mdetr else GATED_NAMES)
    codes = [level(feature) for level, feature in zip(block.levels, features, strict=True)]
    return _of_block(oracle, block, official, block(features[-1], *codes))


def sherl_vse_cnn(oracle: Oracle) -> Reproduction:
    """The aggregation of VSE-infinity's ResNet on given feature maps, by the batch's or the running statistics."""
    number = len(oracle.group("in.x"))
    features = [oracle[f"in.x{level}"] for level in range(number)]
    hidden, eps = oracle["w.guide_block.fc_attn.weight"].shape[1], 1e-8
    config = ss.SherlConfig(hidden=hidden, projection="conv_norm", eps=eps)
    block = ConvAggregation([feature.shape[1] for feature in features], config)
    block.train(oracle.path.name.startswith("sherl_vse_cnn_train"))
    official = {name: rename(name, CNN_NAMES) for name, _ in block.named_parameters()}
    for name, parameter in block.named_parameters():
        parameter.data = oracle[f"w.{official[name]}"].reshape(parameter.shape)
    grid = features[-1].shape[-2:]
    pooled = (Maps().at(x.shape[-2:]).adding(x.flatten(2).mT).at(grid) for x in features)
    maps = Maps(tuple(pair for found in pooled for pair in found.pairs), grid)
    output = block(maps.pairs[-1][0], maps).mT.unflatten(-1, grid)
    found = _of_block(oracle, block, official, output)
    # the official convolutions have kernels of 1 x 1
    shaped = {name: value.view_as(oracle[f"w.{name}"]) for name, value in found.gradients.items()}
    return replace(found, gradients=shaped)


def sherl_pooled(oracle: Oracle) -> Reproduction:
    """The aggregation of CLIP4Clip on given features: a vector, corrected by the levels' pooled tokens."""
    features, vector = _features(oracle), oracle["in.last"][:, 0]
    gated = "w.guide_block.gate_parameters" in oracle.tensors
    config = ss.SherlConfig(hidden=oracle["w.fc_out.weight"].shape[1], pool_tokens=True, level_gates=gated)
    block = PooledAggregation(features[0].shape[-1], len(features), vector.shape[-1], config.filled([]))
    official = _fit(block, oracle, POOLED_NAMES)
    codes = [level(feature) for level, feature in zip(block.levels, features, strict=True)]
    mask = oracle.tensors.get("in.mask")
    position = oracle.tensors.get("in.position", torch.zeros(len(vector), dtype=torch.long))
    output = block(vector, codes, position, None if mask is None else mask.bool())
    return _of_block(oracle, block, official, output)


class TextHead(nn.Module):
    """VSE-infinity's `text_fc` and GPO pooling (section 1.2 of the method's page)."""

    def __init__(self, width: int, embedding: int, code: int, hidden: int) -> None:
        super().__init__()
        self.text_fc = nn.Linear(width, embedding)
        self.text_agg = GPO(code, hidden)

    @classmethod
    def of(cls, oracle: Oracle) -> TextHead:
        """With the file's weights."""
        recurrent = oracle["w.text_agg.gru.weight_hh_l0"].shape[1]
        code = oracle["w.text_agg.gru.weight_ih_l0"].shape[1]
        embedding, width = oracle["w.text_fc.weight"].shape
        head = cls(width, embedding, code, recurrent)
        load(head, {name: oracle[f"w.{name}"] for name in head.state_dict()})
        return head

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(batch, embedding) of length one from (batch, tokens, width)."""
        keep = torch.arange(tokens.shape[1]) < lengths[:, None]
        return unit(self.text_agg(self.text_fc(tokens), keep))


def _features(oracle: Oracle) -> list[Tensor]:
    return [oracle[f"in.x{number}"] for number in range(depth(oracle.group("w."), "hor_block"))]


def _fit(model: nn.Module, oracle: Oracle, names: Names, own: str = "") -> dict[str, str]:
    """Load the file's weights; the official name of each tensor of the model."""
    official = {name: rename(f"{own}{name}", names) for name in model.state_dict()}
    load(model, {name: oracle[f"w.{other}"] for name, other in official.items()})
    return official


def _loss(oracle: Oracle, output: Tensor) -> Tensor:
    """The mean of the output times the file's cotangent, with gradients taken."""
    loss = (output * oracle["in.c"]).sum() / output.numel()
    loss.backward()
    return loss.detach()


def _of_block(oracle: Oracle, block: nn.Module, official: Mapping[str, str], output: Tensor) -> Reproduction:
    loss = _loss(oracle, output)
    return Reproduction(outputs={"y": output.detach(), "loss": loss}, gradients=_gradients(block, official))


def _gradients(model: nn.Module, official: Mapping[str, str]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {other: grad for name, other in official.items() if (grad := parameters[name].grad) is not None}


def _note(store: dict[str, Tensor], name: str, module: nn.Module, args: object, output: object) -> None:
    """Keep what a module gave."""
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, Tensor)
    store[name] = first.detach().clone()


def _note_input(store: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Keep what a module was given."""
    store[name] = args[0].detach().clone()
