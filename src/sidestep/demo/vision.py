"""`sidestep demo --vision`: DTL+, SynQT and a linear probe on a real vision Transformer, with real images.

The backbone, vit-small-32, comes with Sidestep. The task is to tell scikit-learn's handwritten digits apart. Nothing is
downloaded.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
from datasets import Dataset, Features, Image, Value
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.console import remark, show_table
from sidestep.data import Fields
from sidestep.demo.shared import Contestant, full_step, majority, predict_elsewhere, show_costs, train_contestant
from sidestep.kinds.base import PREDICTION, PROBABILITY
from sidestep.kinds.prepare import prepare
from sidestep.methods import DTLConfig, ProbeConfig, SynQTConfig
from sidestep.training.settings import TrainSettings

BACKBONE = Path(__file__).parent / "backbones" / "vit-small-32"

TRAINING = 400
SEED = 0
EPOCHS = 10
BATCH = 8
CURVE = 16
"""Test images that are scored after every epoch; all of them are scored once, at the end."""
SHOWN = 5
FIELDS = Fields(image="image", label="label")
COLUMNS = Features({"image": Image(), "label": Value("string")})

# Read-outs and rates come from short searches on a fifth of the training images (80), 2026-11-23. The epochs come from
# what a demo may take.
CONTESTANTS = (
    Contestant(name="linear probe", config=ProbeConfig(), rate=0.1, pool="cls"),
    Contestant(name="DTL+", config=DTLConfig(rank=8, kernel=3), rate=1e-2, pool="cls"),
    # in so few steps SynQT's dropout and drop path cost it about ten points there
    Contestant(name="SynQT", config=SynQTConfig(queries=4, dropout=0.0, head_drop_path=0.0), rate=2.5e-3),
)


def run(output: Path) -> None:
    """Train all three, show what they reach and cost, and use DTL+'s saved task in a new process.

    Args:
        output: a folder for the tasks. What an earlier demo left there is replaced.

    Raises:
        DemoError: if the new process fails.
    """
    begin = time.perf_counter()
    datasets.disable_progress_bars()
    remark(f"backbone: {BACKBONE.name}, frozen; images: scikit-learn's handwritten digits, 8 x 8 pixels, enlarged")
    train_rows, test_rows = digits()
    remark(f"{len(train_rows)} images to train on, {len(test_rows)} held out")
    data = prepare(train_rows, test_rows.select(range(CURVE)), FIELDS, load_processor(BACKBONE))
    backbone = load_backbone(BACKBONE)
    settings = training(output)
    found = {one.name: train_contestant(one, BACKBONE, backbone, data, settings, test_rows) for one in CONTESTANTS}
    full = full_step(backbone, data, settings)
    show_costs(f"A training step of {full.rows} images", found, full, majority(test_rows["label"][:]))
    _show_predictions(output / "dtl", test_rows)
    remark(f"all in {time.perf_counter() - begin:.0f} seconds; the tasks are in {output}")


def training(output: Path) -> TrainSettings:
    """How a contestant is trained. The last epoch is kept, so that nothing is chosen on images that are held out."""
    return TrainSettings(output=output, epochs=EPOCHS, batch_size=BATCH, keep="last", checkpoints=False)


def digits() -> tuple[Dataset, Dataset]:
    """Images and the names of their classes, to train on and held out: always the same, equally many a class."""
    raw = load_digits()
    grey = (raw.images * (255 / raw.images.max())).round().astype(np.uint8)
    images, labels = [PIL.Image.fromarray(image) for image in grey], raw.target.astype(str).tolist()
    parts = train_test_split(np.arange(len(labels)), train_size=TRAINING, stratify=labels, random_state=SEED)
    chosen = [{"image": [images[i] for i in part], "label": [labels[i] for i in part]} for part in parts]
    train_rows, test_rows = (Dataset.from_dict(columns, features=COLUMNS) for columns in chosen)
    return train_rows, test_rows


def _show_predictions(task: Path, rows: Dataset) -> None:
    """Label a few held-out images with the saved task, which finds them in a folder."""
    folder = task.parent / "images"
    shutil.rmtree(folder, ignore_errors=True)
    for number, row in enumerate(rows.select(range(SHOWN))):
        path = folder / row["label"] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    predicted = predict_elsewhere(task, folder, task.parent / "predictions.jsonl")
    print()
    show_table(
        f"{SHOWN} held-out images, labelled by {task} in a new process",
        ("image", "digit", "predicted", "probability"),
        [
            (
                Path(row["image"]).relative_to(folder.resolve()),
                row["label"],
                row[PREDICTION],
                f"{row[PROBABILITY + row[PREDICTION]]:.2f}",
            )
            for row in predicted
        ],
    )
