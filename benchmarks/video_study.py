"""Video-text retrieval on clips that pan over pictures of Flickr8k: methods at equal settings against chance.

    VIT_S14=FOLDER python benchmarks/video_study.py       # continues where it was stopped

The papers' own sets (MSR-VTT, MSVD) are not at hand. Each clip is an mp4 of 12 frames of 84 x 84 pixels, which PyAV
writes into a temporary folder. A window of three quarters of a picture's shorter side goes over the picture, from one
end to the other and from one side to the other. No frame shows the whole picture. The captions are the picture's.

The dual encoder is ViT-S/14 and MiniLM with new projections of 128 channels. `VIT_S14` is a folder with the former, as
the tool in the shared data makes it. Frames are read at 56 pixels (16 patches) by the class token, captions of up to 32
tokens by their mean. 640 clips with their first caption train, and 100 other clips with all five captions test.

All methods have the same settings, which were not tuned: 3 frames, 2 epochs, batch 16, AdamW at 2e-3, 6 % warm-up,
linear decay, contrastive loss, seed 0. SHERL and UniPT are in CLIP4Clip's form, on both towers. THREADS sets the number
of threads (1). CLIPS and EPOCHS cut a run short for a test, into a results file of its own.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image

import sidestep as ss
from retrieval_study import text_encoder
from sidestep.backbone.load import load_pair
from sidestep.backbone.pixels import adjusted
from sidestep.backbone.processors import PairProcessor, load_pair_processor
from sidestep.data import Fields, TableOptions
from sidestep.kinds.pairs import recalls
from sidestep.kinds.prepare import TaskData, prepare, read_rows
from sidestep.methods import MethodConfig
from sidestep.training.settings import TrainSettings
from sidestep.training.train import train
from study import Results
from text_tasks import SHARED

CLIPS, EPOCHS = int(os.environ.get("CLIPS", "640")), int(os.environ.get("EPOCHS", "2"))
WHOLE = (CLIPS, EPOCHS) == (640, 2)
RESULTS = Path(__file__).parent / "results" / f"video_study{'' if WHOLE else '-short'}.jsonl"
FIELDS = Fields(video="clip", text="caption")
TEST, LENGTH, SIDE, READ_AT, DIM = 100, 12, 84, 56, 128
HOW: dict[str, Any] = {"kind": "retrieval", "max_length": 32, "frames": 3}
METHODS: dict[str, MethodConfig | None] = {
    "untrained": None,
    "probe": ss.ProbeConfig(),
    "read": ss.ReadConfig(),
    "sherl": ss.SherlConfig(pool_tokens=True, hidden=DIM),
    "unipt": ss.UniPTConfig(variant="clip4clip", hidden=DIM),
    "lora": ss.LoraConfig(),
}


def clips(folder: Path) -> tuple[Dataset, Dataset]:
    """Training and test clips with their captions, from other pictures. The clips are written into a folder."""
    source = SHARED / "flickr8k_1k"
    with zipfile.ZipFile(source / "images.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        order = np.random.default_rng(0).permutation(len(names))[: TEST + CLIPS]
        for number, place in enumerate(order):
            with archive.open(names[place]) as file:
                picture = Image.open(file).convert("RGB")
            write(folder / f"{Path(names[place]).stem}.mp4", pan(picture, seed=number))
    lines = (source / "captions.txt").read_text().splitlines()
    there = [Path(names[place]).stem for place in order]
    captions = "\n".join(line.replace(".jpg", ".mp4", 1) for line in lines[1:] if line.partition(".jpg")[0] in there)
    (folder / "captions.csv").write_text(f"clip,caption\n{captions}\n")
    rows = read_rows(str(folder / "captions.csv"), FIELDS, TableOptions(), "retrieval", split="train")
    rank = {stem: number for number, stem in enumerate(there)}
    paths = [Path(cell["path"]).stem for cell in rows["clip"][:]]
    rows = rows.select(np.argsort([rank[stem] for stem in paths]))
    return rows.select(range(TEST, TEST + CLIPS)).map(_first), rows.select(range(TEST))


def _first(row: dict[str, Any]) -> dict[str, Any]:
    return {FIELDS.text: row[FIELDS.text][:1]}


def pan(picture: Image.Image, seed: int) -> list[Image.Image]:
    """A window that goes over a picture, from one corner to the opposite one. The corner is drawn."""
    side = min(picture.size) * 3 // 4
    free = np.array(picture.size) - side
    corner = np.random.default_rng(seed).integers(0, 2, 2)
    frames = []
    for share in np.linspace(0, 1, LENGTH):
        left, top = (free * np.abs(corner - share)).round().astype(int).tolist()
        frames.append(picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return frames


def write(path: Path, frames: list[Image.Image]) -> None:
    """The frames as a video file, four a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4, options={"qscale": "3"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def run(config: MethodConfig | None, data: TaskData, test: TaskData, output: Path) -> dict[str, Any]:
    """One training run and its scores on the test clips. Without a config the scores before training."""
    torch.manual_seed(0)
    backbone = load_pair(os.environ["VIT_S14"], text_encoder())
    model = ss.attach(backbone, config or ss.ProbeConfig(), head=ss.Retrieve(dim=DIM))
    if config is None:
        model.extras["processor"] = data.processor
        return recalls(model, test.dev)
    settings = TrainSettings(
        output=output, epochs=EPOCHS, batch_size=16, learning_rate=2e-3, keep="last", checkpoints=False, overwrite=True,
        progress=False,
    )  # fmt: skip
    found = train(model, data, settings)
    return {
        **recalls(model, test.dev),
        "parameters": found.trainable_parameters,
        "kept_bytes": None if found.step is None else found.step.kept_bytes,
        "epoch_seconds": found.epoch_seconds,
    }


def study(work: Path) -> None:
    """Scores of every method."""
    results = Results(RESULTS)
    train_rows, test_rows = clips(work)
    both = load_pair_processor(os.environ["VIT_S14"], text_encoder())
    processor = PairProcessor(adjusted(both.image, size=READ_AT), both.text)
    # scored after each epoch, which would take as long as training on all test clips
    data = prepare(train_rows, test_rows.select(range(8)), FIELDS, processor, **HOW)
    test = prepare(train_rows.select(range(2)), test_rows, FIELDS, processor, **HOW)
    for name, config in METHODS.items():
        results.once(
            lambda config=config: run(config, data, test, work / "task"),
            kind="score", method=name, seed=0, clips=CLIPS, epochs=EPOCHS, rate=None if config is None else 2e-3,
        )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as place:
        study(Path(place))
