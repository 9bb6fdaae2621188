"""Diff pruning killed at random moments of any stage and resumed. The task has to be that of an undisturbed run.

    python benchmarks/kill_study.py         # runs, and writes results/kill_study.jsonl. Continues where it was stopped
    python benchmarks/kill_study.py table   # the table alone
    python benchmarks/kill_study.py --processes 2   # two processes, one of which is killed (results/kill_study_2.jsonl)
    python benchmarks/kill_study.py table --processes 2

A small BERT (random weights, MiniLM's vocabulary) on disk learns 64 rows of SST-2 by `sidestep train --method
diff_pruning`. It takes 8 steps in the first stage and 32 in the third, with a checkpoint every 2. In each round a run
is killed (SIGKILL) after a random share of the time that the undisturbed one took. It is resumed, and compared with the
undisturbed run by the task's config and all bytes of its tensors. A kill that comes after the end of a run does not
count. Runs are forked from one process, which has imported what they need.

With `--processes 2` torchrun starts each run, and a random one of its two processes is killed. The other has to end
within `LIMIT` seconds. The run is then resumed by two.
"""

from __future__ import annotations

import csv
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.utils.tensorboard
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from sidestep.cli import app
from sidestep.disk import task_folder
from sidestep.training import checkpoints, train
from sidestep.training import dense_stage as relax
from text_tasks import TASKS, encoder

RESULTS = Path(__file__).parent / "results" / "kill_study.jsonl"
OF_TWO = RESULTS.with_stem("kill_study_2")
KILLS, KILLS_OF_TWO = 40, 20
LIMIT = 60
"""Seconds in which a process ends after another one was killed."""
FORK = multiprocessing.get_context("fork")
IMPORTED = (torch.utils.tensorboard, train)  # by a run when it needs them


def prepare(folder: Path) -> list[str]:
    """Write a backbone and rows. The arguments of the run, without its output."""
    torch.manual_seed(0)
    tokenizer = encoder()[1]
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    rows = TASKS["sst-2"].rows()[0].shuffle(seed=0).select(range(80))
    for name, part in (("train", range(64)), ("dev", range(64, 80))):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([("text", "label"), *((rows[i]["sentence"], rows[i]["label"]) for i in part)])
    data = [
        "--train",
        folder / "train.csv",
        "--dev",
        folder / "dev.csv",
        "--text",
        "text",
        "--backbone",
        folder / "backbone",
    ]
    method = ["--method", "diff_pruning", "--set", "lambda_l0=1e-5", "--set", "finetune_epochs=4"]
    how = ["--epochs", "1", "--batch-size", "8", "--save-steps", "2", "--lr", "1e-3", "--quiet"]
    return ["train", *map(str, data), *method, *how]


def started(arguments: list[str], output: Path) -> Any:
    """The process of a run, which goes on with what is in the folder."""
    resume = ["--resume"] if (output / checkpoints.FOLDER / checkpoints.RUN).is_file() else []
    process = FORK.Process(target=_run, args=([*arguments, "--output", str(output), *resume],))
    process.start()
    return process


def _run(arguments: list[str]) -> None:
    with open(os.devnull, "w") as nothing:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nothing.fileno(), stream.fileno())
        app(arguments)


def started_together(arguments: list[str], output: Path) -> subprocess.Popen[bytes]:
    """As `started`, by two processes. The returned one is torchrun."""
    resume = ["--resume"] if (output / checkpoints.FOLDER / checkpoints.RUN).is_file() else []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "sidestep.cli", *arguments, "--output", str(output), *resume]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_one_of_two() -> None:
    """The rounds of two processes that are missing."""
    done = rounds(OF_TWO)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        arguments, output = prepare(folder), folder / "killed"
        begin = time.perf_counter()
        if started_together(arguments, folder / "whole").wait():
            raise RuntimeError("the undisturbed run failed")
        whole = time.perf_counter() - begin
        expected = task(folder / "whole")
        for number in itertools.count(1 + max((one["number"] for one in done), default=-1)):
            if len(done) >= KILLS_OF_TWO:
                break
            shutil.rmtree(output, ignore_errors=True)
            chance, launcher = random.Random(number), started_together(arguments, output)
            delay, rank = chance.uniform(0, whole), chance.randrange(2)
            time.sleep(delay)
            found = {one.environ().get("RANK"): one for one in psutil.Process(launcher.pid).children(recursive=True)}
            if launcher.poll() is not None or str(rank) not in found:
                launcher.wait()
                continue
            found[str(rank)].kill()
            begin = time.perf_counter()
            _, alive = psutil.wait_procs([psutil.Process(launcher.pid), *found.values()], timeout=LIMIT)
            seconds, stage = round(time.perf_counter() - begin, 1), stage_of(output)
            if alive:
                raise RuntimeError(f"round {number}: {len(alive)} processes were alive after {LIMIT} s")
            if started_together(arguments, output).wait():
                raise RuntimeError(f"round {number}: the resumed run failed")
            one = {"number": number, "after": round(delay / whole, 3), "stage": stage, "rank": rank}
            done.append({**one, "seconds": seconds, "equal": task(output) == expected, "date": f"{date.today()}"})
            with OF_TWO.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]) + "\n")


def ended(process: Any) -> None:
    """Wait for a run, which must end well."""
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a run ended with {process.exitcode}")


def stage_of(output: Path) -> str:
    """How far a run came, by what it left."""
    folder = output / checkpoints.FOLDER
    if not (folder / checkpoints.RUN).is_file():
        return "before the first stage"
    if not (folder / relax.FOLDER / relax.PROJECTED).is_file():
        return "relaxed"
    if not any(folder.glob("checkpoint-*")):
        return "projected"
    return "saved" if (output / task_folder.CONFIG).is_file() else "trained on"


def main() -> None:
    """The rounds that are missing."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    done = rounds()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        arguments = prepare(folder)
        begin = time.perf_counter()
        ended(started(arguments, folder / "whole"))
        whole = time.perf_counter() - begin
        expected = task(folder / "whole")
        output = folder / "killed"
        for number in itertools.count(1 + max((one["number"] for one in done), default=-1)):
            if len(done) >= KILLS:
                break
            shutil.rmtree(output, ignore_errors=True)
            process, delay = started(arguments, output), random.Random(number).uniform(0, whole)
            process.join(delay)
            if process.exitcode is not None:
                continue
            process.kill()
            process.join()
            found = stage_of(output)
            ended(started(arguments, output))
            equal = task(output) == expected
            share = round(delay / whole, 3)
            done.append({"number": number, "after": share, "stage": found, "equal": equal, "date": f"{date.today()}"})
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]) + "\n")


def task(folder: Path) -> tuple[str, dict[str, bytes]]:
    """A task's config, and the bytes of its tensors (safetensors writes its metadata in any order)."""
    tensors = load_file(folder / task_folder.WEIGHTS)
    return (folder / task_folder.CONFIG).read_text(), {name: value.numpy().tobytes() for name, value in tensors.items()}


def rounds(results: Path = RESULTS) -> list[dict[str, Any]]:
    """What has been run."""
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


def table(results: Path = RESULTS) -> None:
    """Kills and equal tasks by stage."""
    done = rounds(results)
    equal = Counter(one["stage"] for one in done if one["equal"])
    print("| killed when | kills | tasks equal to the undisturbed run's |\n|---|---|---|")
    for stage, kills in Counter(one["stage"] for one in done).items():
        print(f"| {stage} | {kills} | {equal[stage]} |")


if __name__ == "__main__":
    together = "--processes" in sys.argv
    if "table" not in sys.argv:
        (kill_one_of_two if together else main)()
    table(OF_TWO if together else RESULTS)
