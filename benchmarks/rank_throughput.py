"""Rows a second of one and of two processes on the CPU, with a live backbone and from stored features.

    MINILM=FOLDER SIDESTEP_SHARED=FOLDER python benchmarks/rank_throughput.py

READ (rank 128, its default) on all-MiniLM-L6-v2, 1,000 rows of SST-2, batches of 32. Three ways to use two cores: one
process with one thread, one process with two threads, two processes with one thread each (`torchrun`). Each run is
`sidestep train`, and what counts is the median epoch of its results.json, in which 64 dev rows are scored too. The ways
are taken in turns, twice. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

from study import Results

RESULTS = Path(__file__).parent / "results" / "rank_throughput.jsonl"
SHARED = Path(os.environ["SIDESTEP_SHARED"])
ROWS, TURNS = 1000, 2
EPOCHS = {"live": 2, "features": 6}
WAYS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}


def first_rows(source: Path, target: Path, count: int) -> Path:
    """The header and the first rows of a table."""
    opened = gzip.open if source.suffix == ".gz" else open
    with opened(source, "rt", encoding="utf-8") as lines:
        target.write_text("".join(islice(lines, count + 1)), encoding="utf-8")
    return target


def epoch(way: str, kind: str, place: Path) -> float:
    """Seconds of the median epoch of a run."""
    processes, threads = WAYS[way]
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [
        *start, "sidestep.cli", "train", "--quiet", "--backbone", os.environ["MINILM"], "--method", "read",
        "--train", str(place / "train.tsv"), "--dev", str(place / "dev.tsv"), "--text", "sentence", "--no-quoting",
        "--epochs", str(EPOCHS[kind]), "--patience", "0", "--output", str(place / "task"), "--overwrite",
        "--features", "off" if kind == "live" else "disk", "--features-folder", str(place / "features"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    told = json.loads((place / "task" / "results.json").read_text(encoding="utf-8"))
    return statistics.median(told["epoch_seconds"])


def main() -> None:
    """All ways in turns."""
    results = Results(RESULTS)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        first_rows(SHARED / "data/glue/sst2/train.tsv.gz", place / "train.tsv", ROWS)
        first_rows(SHARED / "data/glue/sst2/dev.tsv", place / "dev.tsv", 64)
        for turn in range(TURNS):
            for kind in EPOCHS:
                for way in WAYS:
                    results.once(
                        lambda way=way, kind=kind: {"epoch_seconds": round(epoch(way, kind, place), 3)},
                        rows_from=kind, way=way, turn=turn, rows=ROWS,
                    )  # fmt: skip


if __name__ == "__main__":
    main()
