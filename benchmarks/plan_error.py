"""How far a plan is from a measured step, for every method on six backbones: `python benchmarks/plan_error.py`.

The backbones have random weights (memory does not depend on them). A batch with padding takes one training step with
the optimizer's state in place. The rise above model and optimizer state is compared: the plan's `peak_bytes` against
what PyTorch's allocator handed out (`ss.peak_memory`). The rise of the resident set stands beside it. On a machine with
a GPU, `--device cuda` compares with `max_memory_allocated`. Pairs that are in results/plan_error.jsonl are not run
again.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, LlamaConfig, PreTrainedConfig, ResNetConfig, SwinConfig, T5Config, ViTConfig

import sidestep as ss
from sidestep.measure.memory import mib
from sidestep.measure.plan import plan
from sidestep.measure.plan.blank import blank_batch, build
from sidestep.methods import UnsupportedBackbone, WeightDelta, methods
from study import Results

RESULTS = Results(Path(__file__).parent / "results" / "plan_error.jsonl")
HEAD = ss.Classify(num_labels=2)

BACKBONES: dict[str, PreTrainedConfig] = {
    "BERT-base": BertConfig(),
    "ViT-B/16": ViTConfig(),
    "T5-base": T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0),
    "Llama-like": LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
    ),
    "Swin-T": SwinConfig(),
    "ResNet-50": ResNetConfig(),
}


def contenders() -> list[tuple[str, Any, str | None]]:
    """Every registered method with its defaults. Those with blocks in the graph also with recomputation."""
    found: list[tuple[str, Any, str | None]] = []
    for name, method in methods().items():
        if name == "collect":  # records taps for other studies
            continue
        found.append((name, method.config(), None))
        if issubclass(method.implementation, WeightDelta):
            found.append((f"{name}+checkpoint", method.config(), "late"))
    return found


def compare(config: PreTrainedConfig, method: Any, checkpoint: Any, batch: int, device: Any) -> dict[str, Any]:
    """Predicted and measured bytes of one pair."""
    try:
        planned = plan(config, method, head=HEAD, batch=batch, checkpoint=checkpoint, device=device)
    except UnsupportedBackbone as refusal:
        return {"status": "refused", "reason": str(refusal)}
    with torch.device(device):
        model = ss.attach(build(config), method, head=HEAD, checkpoint=checkpoint).train()
        inputs = blank_batch(model, batch, None, None)
    if model.relaxes:
        optimizer = model.relax(rate=0.0)
    else:
        model.place_anywhere()
        optimizer = torch.optim.AdamW([parameter for _, parameter in model.trained_parameters()])

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    measured = ss.peak_memory(step, device)
    return {
        "status": "ok",
        "predicted": planned.peak_bytes,
        "measured": measured.allocated,
        "resident": measured.resident,
        "phase": planned.peak_phase,
        "attention": list(planned.attention),
    }


def table() -> str:
    """Every pair as Markdown."""
    lines = [
        "| backbone | method | predicted, MiB | measured, MiB | error | resident, MiB | attention |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in sorted(RESULTS.lines, key=lambda line: list(BACKBONES).index(line["backbone"])):
        start = f"| {line['backbone']} | {line['method']} |"
        if line["status"] == "refused":
            lines.append(f"{start} refused | | | | |")
            continue
        resident = "" if line["resident"] is None else f"{mib(line['resident']):.1f}"
        error = line["predicted"] / line["measured"] - 1
        lines.append(
            f"{start} {mib(line['predicted']):.1f} | {mib(line['measured']):.1f} | {error:+.1%} | {resident} | "
            f"{', '.join(line['attention'])} |"
        )
    errors = [abs(line["predicted"] / line["measured"] - 1) for line in RESULTS.lines if line["status"] == "ok"]
    return "\n".join([*lines, "", f"largest error {max(errors, default=0):.1%} of {len(errors)} pairs"])


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", choices=BACKBONES, help="one backbone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    for backbone, config in BACKBONES.items():
        if given.only not in (None, backbone):
            continue
        for label, method, checkpoint in contenders():
            RESULTS.once(
                lambda c=config, m=method, k=checkpoint: compare(c, m, k, given.batch, given.device),
                backbone=backbone,
                method=label,
                batch=given.batch,
                device=given.device,
                precision="float32",
            )
            gc.collect()
    print(table())


if __name__ == "__main__":
    main()
