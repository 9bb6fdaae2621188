"""What the traced pass adds to the first `attach` on a backbone, as a share of one bare forward pass.

    python benchmarks/trace_cost.py [--repeats 5] [--models bert,vit,timm,llama]

Random weights of real sizes, float32, batch 8: texts of 128 tokens, images of 224 px. Trace and pass take turns. The
medians are compared. Results go to benchmarks/results/trace_cost.json. The table is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as t
from torch import nn

from sidestep.backbone import facts_of, trunk_of
from sidestep.backbone.trace import KEPT_ON

RESULTS = Path(__file__).parent / "results" / "trace_cost.json"
LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "bert": ("BERT-base", lambda: t.BertModel(t.BertConfig())),
    "vit": ("ViT-B/16 (transformers)", lambda: t.ViTModel(t.ViTConfig())),
    "timm": ("ViT-B/16 (timm)", lambda: timm.create_model("vit_base_patch16_224", num_classes=0)),
    "llama": ("Llama of 1B shapes", lambda: t.LlamaModel(t.LlamaConfig(**LLAMA_1B))),
}
BATCH, TOKENS, PIXELS = 8, 128, 224


def batch_of(model: nn.Module) -> dict[str, Any]:
    if getattr(model, "main_input_name", "pixel_values") == "pixel_values":
        return {"pixel_values": torch.randn(BATCH, 3, PIXELS, PIXELS)}
    ids = torch.randint(5, 1000, (BATCH, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(build: Callable[[], nn.Module], repeats: int) -> dict[str, float]:
    """Median seconds of a pass and of a trace, and the trace's share."""
    torch.manual_seed(0)
    model = build().eval()
    batch = batch_of(model)

    def forward() -> None:
        with torch.no_grad():
            model(**batch) if isinstance(model, t.PreTrainedModel) else model(*batch.values())

    def trace() -> None:
        vars(trunk_of(model)).pop(KEPT_ON, None)
        assert facts_of(model).source == "traced"

    forward(), trace()
    turns = [(seconds(forward), seconds(trace)) for _ in range(repeats)]
    passes, traces = (statistics.median(column) for column in zip(*turns, strict=True))
    return {"pass": passes, "trace": traces, "share": traces / passes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", default=",".join(MODELS))
    asked = parser.parse_args()
    found = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "models": {}}
    found |= {"torch": torch.__version__, "transformers": t.__version__, "date": time.strftime("%Y-%m-%d")}
    print("| backbone | a pass, s | the trace, s | share |\n|---|---|---|---|")
    for name in asked.models.split(","):
        title, build = MODELS[name]
        row = found["models"][name] = measure(build, asked.repeats)
        print(f"| {title} | {row['pass']:.2f} | {row['trace']:.3f} | {row['share']:.1%} |", flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
