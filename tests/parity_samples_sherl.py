"""Files of SHERL in the official ones' format, of other sizes, computed by the method's formulas written out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from parity_sherl import TextHead

Weights = dict[str, Tensor]


def sherl_t5(
    path: Path,
    *,
    width: int = 12,
    heads: int = 3,
    head_width: int = 5,
    inner: int = 20,
    depth: int = 5,
    layers: Sequence[int] = (1, 3, 4),
    buckets: int = 6,
    vocabulary: int = 30,
    reduction: int = 3,
    seed: int = 1,
) -> Path:
    """SHERL on T5, as section 1.1 of its page states it."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=head_width,
        d_ff=inner,
        num_layers=depth,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config).eval()
    frozen = {n: v for n, v in _randomise(model).items() if "embed_tokens" not in n and not n.startswith("lm_head")}
    counts = {"encoder": 1 + len(layers), "decoder": 1 + sum(layer < depth - 1 for layer in layers)}
    trained: Weights = {}
    for stack, levels in counts.items():
        trained |= _gated(f"{stack}.side_mtsa_block.", width, width // reduction, levels)
        trained[f"{stack}.final_side_layer_norm.weight"] = 1 + 0.1 * torch.randn(width)
    _track(trained)
    ids = torch.randint(1, vocabulary, (2, 8))
    keep = (torch.arange(8) < torch.tensor([[8], [5]])).long()
    inputs = {
        "input_ids": ids * keep,
        "attention_mask": keep,
        "decoder_input_ids": torch.randint(0, vocabulary, (2, 4)),
    }
    labels = torch.tensor([[3, 7, 1, -100], [9, 2, 4, 1]])

    raw: dict[str, list[Tensor]] = {stack: _listen(model.get_submodule(stack).block) for stack in counts}
    with torch.no_grad():
        outputs = {"encoder_last_hidden": model.encoder(ids * keep, keep)[0]}
        raw["encoder"].clear()
        model(**inputs)

    def merged(stack: str) -> Tensor:
        read = [layer for layer in layers if stack == "encoder" or layer < depth - 1]
        features = [raw[stack][0], *(raw[stack][layer + 1] for layer in read)]
        return aggregate(trained, f"{stack}.side_mtsa_block.", features, _gate, out="fc_out")

    def own_norm(stack: str, hidden: Tensor) -> Tensor:
        scale = trained[f"{stack}.final_side_layer_norm.weight"]
        return scale * hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    memory, x = own_norm("encoder", merged("encoder")), merged("decoder")
    raw["decoder"].clear()
    with _replaced(model.decoder.block[-1], hidden_states=x, encoder_hidden_states=memory):
        model(**inputs)
    late = raw["decoder"][-1]
    last = own_norm("decoder", late)
    logits = (last * width**-0.5) @ frozen["shared.weight"].T
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    outputs |= {
        "encoder_side_hidden": memory,
        "decoder_side_hidden": last,
        "decoder_last_hidden": model.decoder.final_layer_norm(late),
        "logits": logits,
        "loss": loss,
    }
    meta = {
        "d_kv": [head_width],
        "num_heads": [heads],
        "reduction": [reduction],
        "relative_buckets": [buckets],
        "side_layers": layers,
    }
    return _save(path, inputs | {"labels": labels}, outputs, frozen, trained, meta)


def sherl_vse_bert(
    path: Path,
    *,
    width: int = 12,
    heads: int = 3,
    depth: int = 3,
    embedding: int = 10,
    code: int = 6,
    recurrent: int = 7,
    seed: int = 1,
) -> Path:
    """SHERL on BERT, as section 1.2 of its page states it; the side network's width does not divide BERT's."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=25,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=20,
        max_position_embeddings=11,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    frozen = {f"bert.{name}": value for name, value in _randomise(model).items()}
    trained = _normed("side_module.", width, embedding // 2, depth)
    head = TextHead(width, embedding, code, recurrent)
    _randomise(head)
    _track(trained)
    lengths = torch.tensor([5, 9, 3])
    ids = torch.randint(1, 25, (3, 9)) * (torch.arange(9) < lengths[:, None])
    raw = _listen(model.encoder.layer)
    with torch.no_grad():
        model(ids, (ids != 0).long())
    features = raw[:-1]
    y = aggregate(trained, "side_module.", features, _norm, out="fc_out.1", norm_out=("fc_out.2", 1e-12), eps=1e-8)
    with _replaced(model.encoder.layer[-1], hidden_states=y):
        tokens = model(ids, (ids != 0).long()).last_hidden_state
    output = head.requires_grad_()(tokens, lengths)
    cotangent = torch.randn_like(output)
    states = {f"side_in.feat{number}": feature for number, feature in enumerate(features)} | {"side_out": y}
    trained |= dict(head.named_parameters())
    loss = (output * cotangent).sum() / output.numel()
    inputs = {"c": cotangent, "input_ids": ids, "lengths": lengths}
    meta = {"factor": [2], "num_heads": [heads]}
    return _save(path, inputs, {"emb": output, "loss": loss}, frozen, trained, meta, states)


def sherl_block(path: Path, *, width: int = 10, hidden: int = 5, levels: int = 3, seed: int = 1) -> Path:
    """The aggregation of CLIP-ViL or MDETR alone."""
    torch.manual_seed(seed)
    features = [torch.randn(2, 4, width) for _ in range(levels)]
    if "mdetr" in path.name:
        trained = _mdetr(width, hidden, levels)
        _track(trained)
        y = aggregate(trained, "", features, _norm_named, out="fc_out", norm_out=("norm_out", 1e-5))
    else:
        trained = _gated("", width, hidden, levels)
        _track(trained)
        y = aggregate(trained, "", features, _gate, out="fc_out")
    cotangent = torch.randn_like(y)
    loss = (y * cotangent).sum() / y.numel()
    inputs = {f"x{number}": feature for number, feature in enumerate(features)} | {"c": cotangent}
    return _save(path, inputs, {"y": y, "loss": loss}, {}, trained, {})


def sherl_vse_cnn(
    path: Path,
    *,
    widths: tuple[int, ...] = (5, 7, 9),
    sides: tuple[int, ...] = (12, 6, 2),
    hidden: int = 3,
    rows: int = 3,
    seed: int = 1,
) -> Path:
    """The aggregation of feature maps alone, as section 1.3 of its page states it."""
    torch.manual_seed(seed)
    training = path.name.startswith("sherl_vse_cnn_train")
    features = [torch.randn(rows, width, side, side) for width, side in zip(widths, sides, strict=True)]
    maps = {f"hor_block.{number}.conv.0": (hidden, width, 1, 1) for number, width in enumerate(widths)}
    norms = {f"hor_block.{number}.conv.1": hidden for number in range(len(widths))} | {"conv_out.1": widths[-1]}
    trained = _draw("", maps | {"guide_block.fc_attn": (1, hidden), "conv_out.0": (widths[-1], hidden, 1, 1)}, norms)
    _track(trained)

    def conv_norm(x: Tensor, convolution: str, norm: str) -> Tensor:
        x = F.conv2d(x, trained[f"{convolution}.weight"], trained[f"{convolution}.bias"])
        mean, variance = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
        if training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        unit = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return unit * trained[f"{norm}.weight"][:, None, None] + trained[f"{norm}.bias"][:, None, None]

    codes = []
    for number, feature in enumerate(features):
        kernel, name = feature.shape[-1] // sides[-1], f"hor_block.{number}.conv"
        pooled = F.max_pool2d(feature, kernel) + F.avg_pool2d(feature, kernel)
        codes.append(conv_norm(pooled, f"{name}.0", f"{name}.1").movedim(1, -1))
    merged = merge(trained, "", codes, 1e-8).movedim(-1, 1)
    y = conv_norm(merged, "conv_out.0", "conv_out.1").relu() + torch.tanh(trained["gate_params"] / 0.1) * features[-1]
    cotangent = torch.randn_like(y)
    loss = (y * cotangent).sum() / y.numel()
    inputs = {f"x{number}": feature for number, feature in enumerate(features)} | {"c": cotangent}
    return _save(path, inputs, {"y": y, "loss": loss}, {}, trained, {})


# --- the formulas -----------------------------------------------------------------------------------------------------


def aggregate(
    weights: Weights,
    prefix: str,
    features: Sequence[Tensor],
    project: Callable[[Weights, str, Tensor], Tensor],
    *,
    out: str,
    norm_out: tuple[str, float] | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Steps 1 to 6 of the page's first section."""
    codes = [project(weights, f"{prefix}hor_block.{number}.", feature) for number, feature in enumerate(features)]
    y = _linear(weights, f"{prefix}{out}", merge(weights, prefix, codes, eps).relu())
    if norm_out is not None:
        y = _layer_norm(weights, f"{prefix}{norm_out[0]}", y, norm_out[1])
    return y + torch.tanh(weights[f"{prefix}gate_params"] / 0.1) * features[-1]


def merge(weights: Weights, prefix: str, codes: Sequence[Tensor], eps: float) -> Tensor:
    """Steps 2 to 5."""
    guide, levels = codes[-1], codes[:-1]
    unit = [z / (z.norm(dim=-1, keepdim=True) + eps) for z in levels]
    redundancy = [sum(((s * other).sum(-1, keepdim=True)).relu() for other in unit) for s in unit]
    scores = [
        _linear(weights, f"{prefix}guide_block.fc_attn", z * guide).relu() / r
        for z, r in zip(levels, redundancy, strict=True)
    ]
    total = sum(score.abs() for score in scores) + eps
    mixed = sum(score / total * z for score, z in zip(scores, levels, strict=True))
    mlp = f"{prefix}guide_block.mlp"
    if f"{mlp}.0.weight" in weights:
        mixed = _layer_norm(
            weights, f"{mlp}.3", _linear(weights, f"{mlp}.2", _linear(weights, f"{mlp}.0", mixed).relu())
        )
    return mixed + guide


def _gate(weights: Weights, name: str, feature: Tensor) -> Tensor:
    u = _linear(weights, f"{name}fc1", feature).relu()
    return (_linear(weights, f"{name}fc2", u) + u) * torch.sigmoid(_linear(weights, f"{name}fc3", u))


def _norm(weights: Weights, name: str, feature: Tensor) -> Tensor:
    return _layer_norm(weights, f"{name}fc.1", _linear(weights, f"{name}fc.0", feature))


def _norm_named(weights: Weights, name: str, feature: Tensor) -> Tensor:
    return _layer_norm(weights, f"{name}norm", _linear(weights, f"{name}fc", feature))


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _layer_norm(weights: Weights, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


# --- random weights ---------------------------------------------------------------------------------------------------


def _gated(prefix: str, width: int, hidden: int, levels: int) -> Weights:
    maps = {"guide_block.fc_attn": (1, hidden), "fc_out": (width, hidden)}
    for level in range(levels):
        maps |= {f"hor_block.{level}.fc1": (hidden, width)}
        maps |= {f"hor_block.{level}.{name}": (hidden, hidden) for name in ("fc2", "fc3")}
    return _draw(prefix, maps, {})


def _normed(prefix: str, width: int, hidden: int, levels: int) -> Weights:
    maps = {f"hor_block.{level}.fc.0": (hidden, width) for level in range(levels)}
    norms = {f"hor_block.{level}.fc.1": hidden for level in range(levels)} | {"fc_out.2": width}
    return _draw(prefix, maps | {"guide_block.fc_attn": (1, hidden), "fc_out.1": (width, hidden)}, norms)


def _mdetr(width: int, hidden: int, levels: int) -> Weights:
    maps = {f"hor_block.{level}.fc": (hidden, width) for level in range(levels)}
    maps |= {"guide_block.fc_attn": (1, hidden), "fc_out": (width, hidden)}
    maps |= {"guide_block.mlp.0": (width, hidden), "guide_block.mlp.2": (hidden, width)}
    norms = {f"hor_block.{level}.norm": hidden for level in range(levels)}
    return _draw("", maps, norms | {"norm_out": width, "guide_block.mlp.3": hidden})


def _draw(prefix: str, maps: dict[str, tuple[int, ...]], norms: dict[str, int]) -> Weights:
    drawn = {f"{name}.weight": 0.3 * torch.randn(shape) for name, shape in maps.items()}
    drawn |= {f"{name}.bias": 0.1 * torch.randn(shape[0]) for name, shape in maps.items()}
    drawn |= {f"{name}.weight": 1 + 0.1 * torch.randn(size) for name, size in norms.items()}
    drawn |= {f"{name}.bias": 0.1 * torch.randn(size) for name, size in norms.items()}
    drawn["gate_params"] = 0.05 * torch.randn(1)
    return {f"{prefix}{name}": value for name, value in drawn.items()}


def _randomise(model: nn.Module) -> Weights:
    """Draw all weights anew, so that no bias is zero and no norm the identity."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = name.endswith("weight") and parameter.dim() == 1
            parameter.copy_(float(norm) + (0.1 if norm else 0.2) * torch.randn_like(parameter))
    return {name: value.clone() for name, value in model.requires_grad_(False).state_dict().items()}


def _track(weights: Weights) -> None:
    for value in weights.values():
        value.requires_grad_()


# --- the frozen model -------------------------------------------------------------------------------------------------


def _listen(blocks: Any) -> list[Tensor]:
    """A list that each pass adds to: what goes into the first block, and what comes out of each."""
    found: list[Tensor] = []
    blocks[0].register_forward_pre_hook(lambda module, args: found.append(args[0]))
    for block in blocks:
        block.register_forward_hook(lambda m, args, out: found.append(out[0] if isinstance(out, tuple) else out))
    return found


@contextmanager
def _replaced(block: nn.Module, **values: Tensor) -> Any:
    """A block is given other tensors than the model hands it."""
    signature = inspect.signature(type(block).forward)

    def replace(module: nn.Module, args: Any, kwargs: Any) -> Any:
        bound = signature.bind(module, *args, **kwargs)
        bound.arguments.update(values)
        return bound.args[1:], bound.kwargs

    handle = block.register_forward_pre_hook(replace, with_kwargs=True)
    yield
    handle.remove()


def _save(
    path: Path,
    inputs: Weights,
    outputs: Weights,
    frozen: Weights,
    trained: Weights,
    meta: dict[str, Sequence[int]],
    states: Weights | None = None,
) -> Path:
    """Gradients of the loss, and all of it in a file."""
    outputs["loss"].backward()
    tensors = {f"in.{name}": value for name, value in inputs.items()} | (states or {})
    tensors |= {f"out.{name}": value for name, value in outputs.items()}
    tensors |= {f"w.{name}": value for name, value in (frozen | trained).items()}
    tensors |= {f"g.{name}": value.grad for name, value in trained.items() if value.grad is not None}
    tensors |= {f"meta.{name}": torch.tensor(list(values)) for name, values in meta.items()}
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path)
    return path
