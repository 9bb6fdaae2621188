"""VQA and grounding on canvases of real digits: SHERL, READ and LoRA on a frozen encoder of pictures with texts.

    python benchmarks/pictured_tasks.py                        # continues where it was stopped
    METHODS=probe,read SEEDS=0,1 python benchmarks/pictured_tasks.py

The sets of the papers (VQAv2, GQA, RefCOCO) are not at hand. So a canvas of 48 pixels holds three to five of MNIST's
digits, of several sizes and at random places. The questions are which digit is left of (right of, above, below) another
one, how many of a digit there are, whether there is one, and which is the largest. The phrases name one digit: "the 7",
"the digit left of the 3", "the 7 left of the 3", "the largest digit". Their label is its box.

The encoder is a small ViLT (4 blocks, width 64, patches of 16 pixels, in each of which one digit may stand). It is
trained here on other canvases of other digits, 6,000 of the 10,000. It learns which digit a patch shows, and whether
the patch is what a phrase names. Its first token learns which digit that is, and in which of the nine cells. Some
phrases name nothing. Questions, numbers of digits and boxes are new to it. Then it is frozen.

Of the other digits 3,000 make the training rows and 1,000 the dev rows. All methods have the same rows, epochs, batches
and schedule. Each chooses among the three rates of its config, on a fifth of the training rows that is held out for
that. Heads read the first token. Scores are those after the last epoch, with three seeds. THREADS sets the number of
threads (1). ENCODER names a folder in which the encoder is kept for another run.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, ViltConfig, ViltImageProcessor, ViltModel, ViltProcessor

import sidestep as ss
from sidestep.backbone.in_order import in_order
from sidestep.methods import MethodConfig
from study import BATCH, Results, quiet
from text_tasks import SHARED

RESULTS = Path(__file__).parent / "results" / "pictured_tasks.jsonl"
SIDE, CELL = 48, 16
PER_ROW = SIDE // CELL
SIZES = (9, 11, 15)
"""Of digits, in pixels."""
SHARES = "shares.json"
"""What the encoder gets right, beside it."""
STEPS = int(os.environ.get("STEPS", "2000"))
ROWS, DEV_ROWS, EPOCHS = 2000, 500, 6
PARTS = {"pretraining": slice(0, 6000), "train": slice(6000, 9000), "dev": slice(9000, 10000)}
SEEDS = tuple(map(int, os.environ.get("SEEDS", "0,1,2").split(",")))
METHODS: dict[str, MethodConfig] = {
    "probe": ss.ProbeConfig(),
    "read": ss.ReadConfig(rank=32),
    "sherl": ss.SherlConfig(reduction=2),
    "lora": ss.LoraConfig(rank=8),
}
SCORES = {"vqa": "vqa_accuracy", "grounding": "accuracy_iou50"}
CHOSEN = os.environ.get("METHODS", ",".join(METHODS)).split(",")
RELATIONS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
WORDS = (
    *RELATIONS, "of", "the", "digit", "digits", "which", "is", "how", "many", "are", "there", "a", "largest", "?",
)  # fmt: skip
VOCABULARY = ["<pad>", "<s>", "<unk>", *map(str, range(10)), *WORDS]


# --- canvases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """A digit on a canvas: what it is, in which row and column of cells, and its box in pixels."""

    digit: int
    cell: tuple[int, int]
    box: tuple[int, int, int, int]

    @property
    def size(self) -> int:
        return self.box[2] - self.box[0]


@dataclass(frozen=True)
class Canvas:
    """Digits on black. At most one is of the largest size."""

    pixels: NDArray[np.uint8]
    placed: tuple[Placed, ...]

    def unique(self) -> list[Placed]:
        """The digits of which there is one."""
        digits = [one.digit for one in self.placed]
        return [one for one in self.placed if digits.count(one.digit) == 1]

    def beside(self, one: Placed, relation: str) -> Placed | None:
        """The next digit in a direction."""
        down, right = RELATIONS[relation]
        places = {other.cell: other for other in self.placed}
        row, column = one.cell
        for step in range(1, PER_ROW):
            if (found := places.get((row + step * down, column + step * right))) is not None:
                return found
        return None

    @property
    def largest(self) -> Placed:
        return max(self.placed, key=lambda one: one.size)

    def named(self, draw: random.Random) -> tuple[str, Placed] | None:
        """A phrase that names one of the digits, and that digit. None where nothing of the drawn form is there."""
        form = draw.choice(["digit", "beside", "both", "largest"])
        if form == "largest":
            return "the largest digit", self.largest
        if not (ones := self.unique()):
            return None
        one, relation = draw.choice(ones), draw.choice(list(RELATIONS))
        if form == "digit":
            return f"the {one.digit}", one
        if (other := self.beside(one, relation)) is None:
            return None
        what = "digit" if form == "beside" else str(other.digit)
        return f"the {what} {_of(relation)} the {one.digit}", other

    def asked(self, draw: random.Random) -> tuple[str, str] | None:
        """A question and its answer."""
        form, digits = draw.choice(["beside", "many", "there", "largest"]), [one.digit for one in self.placed]
        some = draw.choice(digits) if draw.random() < 0.5 else draw.randrange(10)
        if form == "largest":
            return "which digit is the largest ?", str(self.largest.digit)
        if form == "many":
            return f"how many {some} are there ?", str(digits.count(some))
        if form == "there":
            return f"is there a {some} ?", "yes" if some in digits else "no"
        if not (ones := self.unique()):
            return None
        one, relation = draw.choice(ones), draw.choice(list(RELATIONS))
        other = self.beside(one, relation)
        return None if other is None else (f"which digit is {_of(relation)} the {one.digit} ?", str(other.digit))


def _of(relation: str) -> str:
    return f"{relation} of" if relation in ("left", "right") else relation


def digits_of(part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pictures (rows, 28, 28) of digits, and which they are."""
    with gzip.open(SHARED / "mnist10k" / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(SHARED / "mnist10k" / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    # the second half of the file is of other writers: a permutation mixes them
    order = np.random.default_rng(0).permutation(len(images))[PARTS[part]]
    return images[order, 4:24, 4:24], labels[order]


def canvases(part: str, seed: int) -> Iterator[Canvas]:
    """Canvases without end."""
    images, labels = digits_of(part)
    draw = random.Random(f"{part}, {seed}")
    while True:
        cells = draw.sample(range(PER_ROW**2), draw.randint(3, 5))
        largest, pixels, placed = draw.choice(cells), np.zeros((SIDE, SIDE), np.uint8), []
        for cell in cells:
            number, size = draw.randrange(len(images)), SIZES[-1] if cell == largest else draw.choice(SIZES[:-1])
            row, column = divmod(cell, PER_ROW)
            top, left = (CELL * place + draw.randint(0, CELL - size) for place in (row, column))
            small = Image.fromarray(images[number]).resize((size, size), Image.Resampling.BOX)
            pixels[top : top + size, left : left + size] = np.asarray(small)
            placed.append(Placed(int(labels[number]), (row, column), (left, top, left + size, top + size)))
        yield Canvas(pixels, tuple(placed))


# --- the encoder ------------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


def blank_encoder() -> ViltModel:
    """The ViLT before it has seen anything."""
    config = ViltConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=16,
        image_size=SIDE,
        patch_size=CELL,
        pad_token_id=0,
    )
    model = ViltModel(config, add_pooling_layer=False)
    # from zeros, where transformers starts them, places are learned late
    nn.init.normal_(model.embeddings.position_embeddings, std=0.5)
    return model


def patch_labels(canvas: Canvas, target: Placed | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Of each patch, which is a cell: the digit that stands in it (10: none), and whether it is the target."""
    digits, named = np.full((PER_ROW, PER_ROW), 10), np.zeros((PER_ROW, PER_ROW))
    for one in canvas.placed:
        digits[one.cell], named[one.cell] = one.digit, one is target
    return digits.ravel(), named.ravel()


def pretrained(folder: Path, steps: int) -> dict[str, float]:
    """Train the encoder, and save it with its processor. Returns the shares that it gets right at the end."""
    torch.manual_seed(0)
    begin = time.perf_counter()
    model, words, draw, made = blank_encoder(), tokenizer(), random.Random(0), canvases("pretraining", 0)
    of_patch, belongs, of_named, place = (nn.Linear(64, outputs) for outputs in (11, 1, 11, 10))
    heads = nn.ModuleList([of_patch, belongs, of_named, place])
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    right: list[tuple[float, float]] = []
    for _ in range(steps):
        rows = list(_phrased(made, draw, 2 * BATCH))
        pixels = torch.from_numpy(np.stack([canvas.pixels for canvas, _, _ in rows])) / 127.5 - 1
        text = words([phrase for _, phrase, _ in rows], padding=True, return_tensors="pt")
        both = [patch_labels(canvas, target) for canvas, _, target in rows]
        digits, named = (torch.from_numpy(np.stack(parts)) for parts in zip(*both, strict=True))
        which = torch.tensor([10 if target is None else target.digit for _, _, target in rows])
        where = torch.where(named.any(1), named.argmax(1), PER_ROW**2)
        with in_order(model):
            hidden = model(
                input_ids=text["input_ids"],
                attention_mask=text["attention_mask"],
                pixel_values=pixels[:, None].expand(-1, 3, -1, -1),
            ).last_hidden_state
        patches, first = hidden[:, -digits.shape[1] :], hidden[:, 0]
        shown, marked, found = of_patch(patches), belongs(patches)[..., 0], of_named(first)
        loss = F.cross_entropy(shown.flatten(0, 1), digits.flatten())
        loss = loss + 2 * F.binary_cross_entropy_with_logits(marked, named.float(), pos_weight=torch.tensor(4.0))
        loss = loss + F.cross_entropy(found, which) + F.cross_entropy(place(first), where)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        right.append((_right(shown.argmax(-1) == digits, digits < 10), _right(found.argmax(-1) == which, which < 10)))
    model.eval().save_pretrained(folder)
    images = ViltImageProcessor(size={"shortest_edge": SIDE}, size_divisor=CELL)
    ViltProcessor(images, words).save_pretrained(folder)
    last = np.mean(right[-50:], axis=0)
    found = {"digits_of_patches": float(last[0]), "named_digits": float(last[1])}
    found["training_seconds"] = round(time.perf_counter() - begin, 1)
    (folder / SHARES).write_text(json.dumps(found))
    return found


def _right(found: Tensor, where: Tensor) -> float:
    return float(found[where].float().mean())


def _phrased(made: Iterator[Canvas], draw: random.Random, count: int) -> Iterator[tuple[Canvas, str, Placed | None]]:
    """So many canvases, each with a phrase and what it names. A fifth of the phrases name what is not there."""
    while count:
        canvas = next(made)
        absent = [digit for digit in range(10) if digit not in [one.digit for one in canvas.placed]]
        found = (f"the {draw.choice(absent)}", None) if draw.random() < 0.2 else canvas.named(draw)
        if found is not None:
            yield canvas, *found
            count -= 1


# --- tasks ------------------------------------------------------------------------------------------------------------


def rows_of(kind: str, part: str, count: int, folder: Path) -> Dataset:
    """Rows of a picture, a text and a label."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, made, rows = random.Random(f"{kind}, {part}"), canvases(part, 1), list[dict[str, Any]]()
    while len(rows) < count:
        canvas = next(made)
        found = canvas.asked(draw) if kind == "vqa" else canvas.named(draw)
        if found is None:
            continue
        path = folder / f"{kind}_{part}_{len(rows)}.png"
        Image.fromarray(canvas.pixels).convert("RGB").save(path)
        label = found[1] if isinstance(found[1], str) else list(found[1].box)
        rows.append({"image": str(path), "text": found[0], "label": label})
    return Dataset.from_list(rows)


def run(
    kind: str, name: str, seed: int, data: Sequence[Dataset], encoder: Path, rate: float | None = None
) -> dict[str, Any]:
    """One training run: its scores, those of the best answer for all rows, and its costs."""
    spec = ss.RunSpec(
        data=ss.DataSpec(train=data[0], dev=data[1], image="image", text="text", label="label", kind=kind),
        model=ss.ModelSpec(backbone=encoder, method=METHODS[name]),
        training=quiet(epochs=EPOCHS, seed=seed, learning_rate=rate),
    )
    found = ss.train(spec)[2]
    return {
        **found.scores,
        "constant": found.constant,
        "parameters": found.trainable_parameters,
        "rate": found.learning_rate,
        "epoch_seconds": found.epoch_seconds,
    }


def study(work: Path) -> None:
    """The encoder, and every method on both tasks."""
    results = Results(RESULTS)
    encoder = Path(os.environ.get("ENCODER", work / "encoder"))
    found = json.loads((encoder / SHARES).read_text()) if (encoder / SHARES).is_file() else pretrained(encoder, STEPS)
    results.once(lambda: found, kind="encoder", steps=STEPS)
    for kind in ("vqa", "grounding"):
        data = [rows_of(kind, part, count, work / "canvases") for part, count in (("train", ROWS), ("dev", DEV_ROWS))]
        train, best = data[0], {}
        own, held = train.select(range(ROWS // 5, ROWS)), train.select(range(ROWS // 5))
        about = {"task": kind, "epochs": EPOCHS, "rows": ROWS, "steps": STEPS}
        for name in CHOSEN:
            tried = {
                rate: results.once(
                    partial(run, kind, name, 0, (own, held), encoder, rate),
                    kind="trial", method=name, tried=rate, **about,
                )
                for rate in METHODS[name].rates
            }  # fmt: skip
            best[name] = max(tried, key=lambda rate, tried=tried: tried[rate][SCORES[kind]])
        for seed in SEEDS:
            for name in CHOSEN:
                results.once(
                    partial(run, kind, name, seed, data, encoder, best[name]),
                    kind="score", method=name, seed=seed, **about,
                )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as place:
        study(Path(place))
