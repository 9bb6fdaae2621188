"""Oracle files of other sizes than the official ones, computed by the methods' formulas written out.

They are in the official files' format, so that `parity.py` is known to take sizes from the file. Nothing of Sidestep
runs here: blocks are called one by one, and autograd keeps what it likes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

Weights = dict[str, Tensor]


def dtl_vit(
    path: Path,
    *,
    width: int = 12,
    depth: int = 3,
    heads: int = 3,
    patch: int = 2,
    grid: int = 5,
    classes: int = 3,
    batch: int = 2,
    rank: int = 1,
    first_read: int = 0,
    first_late: int = 1,
    beta: float = 2.0,
    kernel: int = 0,
    seed: int = 1,
) -> Path:
    """DTL on a ViT, as section 1.1 of its page states it."""
    torch.manual_seed(seed)
    backbone, frozen = _vit(width, depth, heads, patch, grid)
    trained = _reads(dict.fromkeys(range(first_read, depth), width), rank) | _head(width, classes)
    if kernel:
        trained["lora_fusion.weight"] = 0.2 * torch.randn(width, 1, kernel, kernel)
    images, labels = torch.randn(batch, 3, grid * patch, grid * patch), torch.arange(batch) % classes
    _track(trained)
    with torch.no_grad():
        hidden = backbone._pos_embed(backbone.patch_embed(images))
    state, flags = torch.zeros(()), []
    for number, block in enumerate(backbone.blocks):
        flags.append(int(hidden.requires_grad))
        if number >= first_read:
            state = state + _read(trained, number, hidden)
        hidden = block(hidden)
        if number >= first_late:
            gated = state * torch.sigmoid(beta * state)
            if kernel:
                mixed = _convolve(gated[:, 1:], trained["lora_fusion.weight"], (grid, grid))
                gated = torch.cat([gated[:, :1], mixed], 1)
            hidden = hidden + gated
    features = backbone.norm(hidden[:, 1:].mean(1))
    meta = {
        "add_after": range(first_late, depth),
        "beta": [beta],
        "block_in_requires_grad": flags,
        "fusion_size": [kernel],
        "ln_eps": [1e-6],
        "lora_before": range(first_read, depth),
        "num_heads": [heads],
        "patch_size": [patch],
    }
    return _save(path, images, labels, features, frozen, trained, meta)


def dtl_swin(
    path: Path,
    *,
    width: int = 6,
    depths: Sequence[int] = (1, 3),
    heads: Sequence[int] = (1, 3),
    patch: int = 2,
    grid: int = 12,
    window: int = 3,
    classes: int = 4,
    batch: int = 2,
    rank: int = 3,
    first_read: int = 0,
    first_late: int = 2,
    beta: float = 1.0,
    kernel: int = 0,
    seed: int = 1,
) -> Path:
    """DTL on a Swin, as section 1.4 of its page states it."""
    torch.manual_seed(seed)
    depth = sum(depths)
    backbone = SwinTransformer(
        img_size=grid * patch,
        patch_size=patch,
        embed_dim=width,
        depths=tuple(depths),
        num_heads=tuple(heads),
        window_size=window,
        mlp_ratio=2,
        num_classes=0,
    ).eval()
    frozen = {_older_swin_name(name): value for name, value in _randomise(backbone).items()}
    widths = [width * 2**stage for stage, blocks in enumerate(depths) for _ in range(blocks)]
    trained = _reads({number: widths[number] for number in range(first_read, depth)}, rank) | _head(widths[-1], classes)
    if kernel:
        sizes = {f"lora_fusions.{stage}.weight": width * 2**stage for stage in range(4)}
        trained |= {name: 0.2 * torch.randn(size, 1, kernel, kernel) for name, size in sizes.items()}
    images, labels = torch.randn(batch, 3, grid * patch, grid * patch), torch.arange(batch) % classes
    _track(trained)
    with torch.no_grad():
        hidden = backbone.patch_embed(images)
    flags: list[int] = []
    for stage, layer in enumerate(backbone.layers):
        hidden, state = layer.downsample(hidden), torch.zeros(())
        for block in layer.blocks:
            number = len(flags)
            flags.append(int(hidden.requires_grad))
            tokens = hidden.flatten(1, 2)
            if number >= first_read:
                state = state + _read(trained, number, tokens)
            shape, tokens = hidden.shape, block(hidden).flatten(1, 2)
            if number >= first_late:
                gated = state * torch.sigmoid(beta * state)
                if kernel:
                    gated = _convolve(gated, trained[f"lora_fusions.{stage}.weight"], shape[1:3])
                tokens = tokens + gated
            hidden = tokens.view(shape)
    features = backbone.norm(hidden).flatten(1, 2).mean(1)
    meta = {
        "add_after": range(first_late, depth),
        "beta": [beta],
        "block_in_requires_grad": flags,
        "depths": depths,
        "fusion_size": [kernel],
        "ln_eps": [1e-5],
        "lora_before": range(first_read, depth),
        "num_heads": heads,
        "window": [window],
    }
    return _save(path, images, labels, features, frozen, trained, meta)


def synqt(
    path: Path,
    *,
    width: int = 12,
    depth: int = 2,
    heads: int = 3,
    patch: int = 2,
    grid: int = 4,
    classes: int = 3,
    batch: int = 2,
    queries: int = 3,
    hidden: int = 5,
    attention_hidden: int = 2,
    seed: int = 1,
) -> Path:
    """SynQT without noise, as section 2.1 of its page states it: the queries' keys and values are formed."""
    torch.manual_seed(seed)
    backbone, frozen = _vit(width, depth, heads, patch, grid)
    trained = _synqt_weights(width, depth, queries, hidden, attention_hidden) | _head(width, classes)
    images, labels = torch.randn(batch, 3, grid * patch, grid * patch), torch.arange(batch) % classes
    _track(trained)

    def adapter(name: str, x: Tensor) -> Tensor:
        return x + linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", x)))

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, trained[f"synqt.{name}.weight"], trained[f"synqt.{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), trained[f"synqt.{name}.weight"], trained[f"synqt.{name}.bias"])

    with torch.no_grad():
        x = backbone._pos_embed(backbone.patch_embed(images))
    outputs, attended, transformed = [], [], []
    for number, block in enumerate(backbone.blocks):
        qsm = f"qsm_block.{number}"
        p = trained["synqt.q"][number].expand(batch, -1, -1)
        if outputs:
            p = p + trained["synqt.feat_scale"] * outputs[-1]
        p = adapter(f"prompt_ffn.{number}", p)
        u = norm(f"{qsm}.norm1", p)
        q, kv = norm(f"{qsm}.attn.q_norm", u), norm(f"{qsm}.attn.kv_norm", u)
        q, k, v = (adapter(f"{qsm}.attn.{part}_proj", y) for part, y in (("q", q), ("k", kv), ("v", kv)))
        weights = (q @ k.transpose(1, 2) * width**-0.5).softmax(-1)
        p = p + trained[f"synqt.{qsm}.attn_scale"] * adapter(f"{qsm}.attn.proj", weights @ v)
        p = p + trained[f"synqt.{qsm}.ffn_scale"] * adapter(f"{qsm}.mlp", norm(f"{qsm}.norm2", p))
        query = block.attn.qkv(block.norm1(p)).chunk(3, -1)[0]
        _, key, value = block.attn.qkv(block.norm1(x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (query, key, value))
        weights = (q @ k.transpose(2, 3) * (width // heads) ** -0.5).softmax(-1)
        attention = block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        p = p + attention
        mlp = block.mlp(block.norm2(p))
        p = p + mlp
        for store, y in ((outputs, p), (attended, attention), (transformed, mlp)):
            store.append(y.mean(1, keepdim=True))
        with torch.no_grad():
            x = block(x)
    tokens = torch.cat([outputs[-1], *outputs, *attended, *transformed], 1)
    tokens = tokens + adapter("mlp", norm("out_norm", tokens))
    gates = torch.tanh(F.gelu(linear("out_combine.get_weight.fc1", tokens[:, 0])))
    combined = (torch.cat([torch.ones(batch, 1), gates], 1)[..., None] * tokens).mean(1)
    meta = {
        "adapter_hidden": [hidden, attention_hidden],
        "ln_eps_backbone_synqt": [1e-6, 1e-5],
        "num_heads": [heads],
        "patch_size": [patch],
        "token_nums": [queries],
        "x_requires_grad": [0] * depth,
    }
    return _save(path, images, labels, norm("head_norm", combined), frozen, trained, meta)


def _synqt_weights(width: int, depth: int, queries: int, hidden: int, attention_hidden: int) -> Weights:
    adapters = {"mlp": hidden}
    norms = ["out_norm", "head_norm"]
    scales = ["feat_scale"]
    for number in range(depth):
        qsm = f"qsm_block.{number}"
        adapters |= {f"prompt_ffn.{number}": hidden, f"{qsm}.mlp": hidden}
        adapters |= {f"{qsm}.attn.{part}": attention_hidden for part in ("q_proj", "k_proj", "v_proj", "proj")}
        norms += [f"{qsm}.{part}" for part in ("norm1", "norm2", "attn.q_norm", "attn.kv_norm")]
        scales += [f"{qsm}.attn_scale", f"{qsm}.ffn_scale"]
    shapes: dict[str, tuple[int, ...]] = {"q": (depth, queries, width)}
    for name, inner in adapters.items():
        shapes |= {f"{name}.mlp.fc1.weight": (inner, width), f"{name}.mlp.fc1.bias": (inner,)}
        shapes |= {f"{name}.mlp.fc2.weight": (width, inner), f"{name}.mlp.fc2.bias": (width,)}
    shapes |= {f"{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}
    shapes |= {"out_combine.get_weight.fc1.weight": (3 * depth, width), "out_combine.get_weight.fc1.bias": (3 * depth,)}
    shapes |= dict.fromkeys(scales, (1,))
    return {f"synqt.{name}": 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def _vit(width: int, depth: int, heads: int, patch: int, grid: int) -> tuple[VisionTransformer, Weights]:
    backbone = VisionTransformer(
        img_size=grid * patch,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=2,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    return backbone, _randomise(backbone)


def _read(trained: Weights, number: int, hidden: Tensor) -> Tensor:
    down, up = (trained[f"lora_dict.{number}.lora_{part}"] for part in "AB")
    return hidden @ down.T @ up.T


def _convolve(tokens: Tensor, weight: Tensor, grid: Sequence[int]) -> Tensor:
    before, after = (weight.shape[-1] - 1) // 2, weight.shape[-1] // 2
    image = F.pad(tokens.transpose(1, 2).unflatten(2, tuple(grid)), (before, after) * 2)
    return F.conv2d(image, weight, groups=len(weight)).flatten(2).transpose(1, 2)


def _reads(widths: dict[int, int], rank: int) -> Weights:
    down = {f"lora_dict.{number}.lora_A": 0.2 * torch.randn(rank, width) for number, width in widths.items()}
    return down | {f"lora_dict.{number}.lora_B": 0.2 * torch.randn(width, rank) for number, width in widths.items()}


def _head(width: int, classes: int) -> Weights:
    return {"head.weight": 0.2 * torch.randn(classes, width), "head.bias": 0.1 * torch.randn(classes)}


def _randomise(backbone: nn.Module) -> Weights:
    """Draw all weights anew, so that no bias is zero and no norm the identity."""
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            scale = 1.0 if name.endswith("weight") and parameter.dim() == 1 else 0.0
            parameter.copy_(scale + 0.15 * torch.randn_like(parameter))
    return {name: value.clone() for name, value in backbone.requires_grad_(False).eval().state_dict().items()}


def _older_swin_name(name: str) -> str:
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) - 1}.downsample.", name)


def _track(trained: Weights) -> None:
    for value in trained.values():
        value.requires_grad_()


def _save(
    path: Path,
    images: Tensor,
    labels: Tensor,
    features: Tensor,
    frozen: Weights,
    trained: Weights,
    meta: dict[str, Iterable[float]],
) -> Path:
    """Head, loss and gradients, and all of it in a file."""
    logits = F.linear(features, trained["head.weight"], trained["head.bias"])
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    tensors = {"in.x": images, "in.y": labels, "out.logits": logits.detach(), "out.loss": loss.detach()}
    tensors |= {f"w.{name}": value.detach() for name, value in (frozen | trained).items()}
    tensors |= {f"grad.{name}": value.grad for name, value in trained.items() if value.grad is not None}
    for name, values in meta.items():
        numbers = torch.tensor(list(values))
        tensors[f"meta.{name}"] = numbers.float() if numbers.is_floating_point() else numbers
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path
