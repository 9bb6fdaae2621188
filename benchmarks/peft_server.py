"""Many LoRA tasks served by hand: PEFT's adapters of one model, switched by `set_adapter`, behind FastAPI.

Started by `serve_load.py`. It takes the requests that the study sends, and answers in the form of `sidestep serve`.
Each request has the model for itself, because an adapter is active for all rows of a call. All heads have one size.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from served_bank import BACKBONE, labels_of, task_names


def build(count: int) -> FastAPI:
    names = task_names(count)
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    model: Any = AutoModelForSequenceClassification.from_pretrained(BACKBONE, num_labels=2)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=["query", "value"])
    model = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()
    turn, app = threading.Lock(), FastAPI()

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/predict")
    def predict(body: dict[str, Any]) -> dict[str, Any]:
        batch = tokenizer(body["inputs"], padding=True, truncation=True, max_length=128, return_tensors="pt")
        rows: list[dict[str, Any]] = [{} for _ in body["inputs"]]
        for name in body["tasks"]:
            with turn, torch.inference_mode():
                model.set_adapter(name)
                found = model(**batch).logits.softmax(dim=-1).max(dim=-1)
            for row, share, place in zip(rows, found.values.tolist(), found.indices.tolist(), strict=True):
                row[name] = {"prediction": labels_of(name, 2)[place], "probability": share}
        return {"results": rows, "usage": {"tokens": int(batch["attention_mask"].sum())}, "timings": {}}

    return app


if __name__ == "__main__":
    uvicorn.run(build(int(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
