"""What one training step keeps for backward, and who keeps it: full tuning, and READ kept in three ways.

The model is a small BERT with random weights; the bytes do not depend on their values.
"""

import torch
from transformers import BertConfig, BertModel

import sidestep as ss

torch.manual_seed(0)
config = BertConfig(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512)
batch = {"input_ids": torch.randint(0, 1000, (8, 64)), "labels": torch.randint(0, 2, (8,))}
CASES = {
    "full tuning": (ss.FullConfig(), "mean", "full"),
    "READ, mean of all tokens": (ss.ReadConfig(rank=16), "mean", "full"),
    "READ, the same, replayed": (ss.ReadConfig(rank=16), "mean", "replay"),
    "READ, first token": (ss.ReadConfig(rank=16), "cls", "full"),
}

backbone = BertModel(config, add_pooling_layer=False)
for name, (method, pool, keep) in CASES.items():
    model = ss.attach(backbone, method, head=ss.Classify(num_labels=2, pool=pool), keep=keep).train()
    with ss.saved_bytes(model) as kept:
        loss = model(**batch).loss
    loss.backward()
    print(f"{name:26} {kept.total / 2**20:7.2f} MiB")
    for module, size in list(kept.by_module(depth=3).items())[:2]:
        print(f"    {size / 2**20:7.2f} MiB  {module}")
    assert ss.detach(model) is backbone  # weights, hooks and modes as they were
