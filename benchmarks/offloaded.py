"""A backbone of 1.1 B parameters that is trained from disk: anonymous memory, and time beside the plain run.

    python benchmarks/offloaded.py --folder FOLDER --what memory    # one process for each method
    python benchmarks/offloaded.py --folder FOLDER --what time      # offloaded and plain in turns, on a quiet machine
    python benchmarks/offloaded.py --folder FOLDER --what 4bit      # in 4 bit, quantised at load and from packed files
    python benchmarks/offloaded.py --folder FOLDER --what memory --small   # the same on two layers, in seconds

The model has TinyLlama's shape, random weights in bfloat16, and a vocabulary of 32,000 words. It is written to FOLDER
(2.2 GB) if it is not there. Memory is RssAnon of /proc/self/status, sampled every 2 ms, above what the imports take.
Pages of mapped files are not in it: the system drops them when it needs room. Weights of 4 bits are not offloaded:
accelerate loses their scales. But a checkpoint that is in 4 bits already is mapped, and stays in its file on a CPU.
Such a checkpoint is written to FOLDER-4bit (0.6 GB). Results go to results/offloaded.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from sidestep.backbone.load import load_backbone
from sidestep.backbone.placement import Placement
from sidestep.measure.plan import plan
from sidestep.methods import method_named
from sidestep.model.attach import detach
from sidestep.model.heads import Classify
from sidestep.training.run import DataSpec, ModelSpec, RunSpec, train
from sidestep.training.settings import TrainSettings

RESULTS = Path(__file__).parent / "results" / "offloaded.jsonl"
WORDS = 32_000
METHODS = ("read", "readout")


@dataclass(frozen=True)
class Size:
    """The rows of a run."""

    layers: int = 22
    width: int = 2048
    inner: int = 5632
    train: int = 16
    dev: int = 8
    batch: int = 4
    length: int = 32


SMALL = Size(layers=2, width=256, inner=512)


def write_model(folder: Path, size: Size) -> None:
    """Write the model in one safetensors file for each layer, tensor by tensor, and its tokenizer."""
    if (folder / "model.safetensors.index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        pad_token_id=0,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in blank.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "ends"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tensor.shape
    for file, shapes in shards.items():
        tensors = {}
        for name, shape in shapes.items():
            drawn = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.02
            tensors[name] = drawn.bfloat16()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    places = {name: file for file, shapes in shards.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", *(f"w{n}" for n in range(WORDS - 2))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)


def rows(count: int, length: int, seed: int) -> Dataset:
    """Texts of so many words, whose class is told by which words they have."""
    draws = torch.Generator().manual_seed(seed)
    half = (WORDS - 2) // 2
    drawn = torch.randint(0, half, (count, length), generator=draws)
    texts = [" ".join(f"w{int(n) + half * (row % 2)}" for n in words) for row, words in enumerate(drawn)]
    return Dataset.from_list([{"text": text, "label": "ab"[row % 2]} for row, text in enumerate(texts)])


def anonymous() -> int:
    """Bytes of this process's memory that no file holds."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@contextmanager
def highest(found: dict[str, int]) -> Iterator[None]:
    """Note the highest anonymous memory inside of this, above that at its begin."""
    before, done = anonymous(), threading.Event()
    found.update(before=before, highest=before)

    def sample() -> None:
        while not done.wait(0.002):
            found["highest"] = max(found["highest"], anonymous())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found["above"] = found["highest"] - before


def run_once(folder: Path, method: str, size: Size, placed: dict[str, Any], backbone: Any = None) -> Any:
    """One training of a task, in a folder that is dropped."""
    with tempfile.TemporaryDirectory() as output:
        spec = RunSpec(
            data=DataSpec(train=rows(size.train, size.length, 0), dev=rows(size.dev, size.length, 1), text="text"),
            model=ModelSpec(backbone=folder, method=method_named(method).config(), **placed),
            training=TrainSettings(
                output=Path(output) / "task",
                epochs=1,
                batch_size=size.batch,
                eval_batch_size=size.dev,
                progress=False,
                measure=False,
            ),
        )
        return train(spec, backbone=backbone)


def memory(folder: Path, method: str, size: Size, device_map: str | None) -> dict[str, Any]:
    """What one run takes, and what a plan says of it."""
    found: dict[str, int] = {}
    placed: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    gc.collect()
    with highest(found):
        run_once(folder, method, size, placed)
    planned = None
    if method != "readout":  # which has no step
        how = {"batch": size.batch, "length": size.length, "precision": "bfloat16", "head": Classify(num_labels=2)}
        where = None if device_map is None else Placement(device_map=device_map)
        planned = plan(folder, method_named(method).config(), placement=where, **how).total_bytes
    return {"anonymous_bytes": found["above"], "planned_bytes": planned}


def write_packed(folder: Path, packed: Path) -> None:
    """Write the model's trunk in 4 bit, with the tokenizer, if it is not there."""
    if (packed / "config.json").is_file():
        return
    load_backbone(folder, quantize="4bit").save_pretrained(packed)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(packed)


def in_4bit(folder: Path, method: str, size: Size, packed: Path | None) -> dict[str, Any]:
    """What loading in 4 bit takes at most, what is held then, and what a run takes with it: anonymous bytes."""
    loading: dict[str, int] = {}
    running: dict[str, int] = {}
    gc.collect()
    with highest(loading):
        backbone = load_backbone(folder, quantize="4bit") if packed is None else load_backbone(packed)
    gc.collect()
    held = anonymous() - loading["before"]
    with highest(running):
        run_once(folder, method, size, {}, backbone)
    return {
        "loading_bytes": loading["above"],
        "held_bytes": held,
        "anonymous_bytes": max(running["highest"], loading["highest"]) - loading["before"],
        "code_bytes": sum(parameter.nbytes for parameter in backbone.parameters()),
    }


def times(folder: Path, method: str, size: Size, turns: int) -> dict[str, Any]:
    """Seconds of a run offloaded and plain, in turns. The loading of the model does not count."""
    seconds: dict[str, list[float]] = {"disk": [], "plain": []}
    for _ in range(turns):
        for name, device_map in (("disk", "disk"), ("plain", None)):
            backbone = load_backbone(folder, device_map=device_map)
            begin = time.perf_counter()
            model = run_once(folder, method, size, {}, backbone)[0]
            seconds[name].append(round(time.perf_counter() - begin, 2))
            detach(model)
            del model, backbone
            gc.collect()
    return {"seconds": seconds, "ratio": round(min(seconds["disk"]) / min(seconds["plain"]), 3)}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--what", choices=("memory", "time", "4bit"), default="memory")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--plain", action="store_true", help="memory of the plain run instead")
    parser.add_argument("--turns", type=int, default=3, help="of --what time")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    size, packed = SMALL if asked.small else Size(), asked.folder.with_name(f"{asked.folder.name}-4bit")
    write_model(asked.folder, size)
    if asked.way == "write":
        write_packed(asked.folder, packed)
        return
    if asked.one:
        found = in_4bit if asked.what == "4bit" else memory
        where = {"at load": None, "file": packed, "disk": "disk", "plain": None}[asked.way]
        print("RESULT " + json.dumps(found(asked.folder, asked.one, size, where)))
        return
    if asked.what == "4bit":
        alone("write")  # it takes memory, which is to be another process's
    ways = ("at load", "file") if asked.what == "4bit" else ("plain" if asked.plain else "disk",)
    for method, way in product(asked.methods.split(","), ways):
        found = times(asked.folder, method, size, asked.turns) if asked.what == "time" else alone(way, "--one", method)
        about = {"what": asked.what, "method": method, "weights": way, **vars(size), **found}
        about |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        print(json.dumps(about))
        if not asked.small:
            with RESULTS.open("a") as file:
                file.write(json.dumps(about) + "\n")


def alone(way: str, *more: str) -> dict[str, Any]:
    """What a process of its own finds, with this one's options and some more."""
    own = [sys.executable, __file__, *sys.argv[1:], "--way", way, *more]
    told = subprocess.run(own, check=True, capture_output=True, text=True).stdout
    return json.loads(next((line[7:] for line in told.splitlines() if line.startswith("RESULT")), "{}"))


if __name__ == "__main__":
    main()
