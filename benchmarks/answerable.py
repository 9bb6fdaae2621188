"""The questions of squad_small that have an answer, as a file for `sidestep compare benchmarks/spans.toml`.

    SIDESTEP_SHARED=FOLDER python benchmarks/answerable.py OUT.jsonl

A third of the training questions have none, and no dev question does. A weak model then learns to answer none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from text_tasks import SHARED


def main() -> None:
    lines = (SHARED / "squad_small" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["answers"]["text"]]
    Path(sys.argv[1]).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    print(f"{len(kept)} of {len(lines)} questions have an answer")


if __name__ == "__main__":
    main()
