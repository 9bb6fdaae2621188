"""Task folders that were damaged at random: each has to be refused with a `TaskError`, or to say the same as before.

    python benchmarks/damaged_tasks.py --damages 2000 --seed 0

A small BERT with a READ side network, a classifying head, label names and a tokenizer is saved once. Each damage is
made on a copy of that task: bytes of every file, files as a whole, values of sidestep.json, and the header of the
weights. The copy is then inspected and loaded by the name of its backbone. The table counts what came of it.
`--before` takes the checksums of sidestep.json and the processor out first, as in tasks of earlier versions: their
damages have to be refused by name as far as they are refused, and some cannot be told from another task.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.utils import logging

import sidestep as ss
from sidestep import card, store

TEXTS = ["the plot was not so good", "a very fine film", "dull"]
WORDS = ("[PAD]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()}))
LABELS = ("bad", "gut", "größer")
PREPROCESSING = {
    "fields": {"text": "sentence", "text2": None, "image": None, "label": "label"},
    "max_length": 12,
    "problem": "single",
    "labels": list(LABELS),
}
PROCESSOR = ("processor/tokenizer.json", "processor/tokenizer_config.json")
FILES = (store.CONFIG, store.CONFIG, store.WEIGHTS, *PROCESSOR, card.CARD)  # sidestep.json twice as often
OTHERS = (None, True, False, 0, -1, 3, 2.5, 1e308, "", "x", "größer", [], ["a"], [[]], {}, {"a": 1}, 10**30)
OUTCOMES = ("TaskError", "loaded right", "uncaught", "loaded otherwise")

Said = tuple[Any, ...]


def make_task(place: Path) -> Path:
    """A task in `place`, on a backbone in `place`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)).save_pretrained(place / "bert")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    head = ss.Classify(num_labels=len(LABELS), labels=LABELS)
    model = ss.attach(ss.loading.load_backbone(place / "bert"), ss.ReadConfig(rank=2), head=head)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(torch.randn_like(parameter))
    model.extras["processor"] = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    model.extras["preprocessing"] = PREPROCESSING
    model.save_pretrained(place / "task", scores={"accuracy": 0.75, "rows": 16})
    return place / "task"


def as_before(task: Path) -> None:
    """Take out of a task what earlier versions did not write."""
    config = json.loads((task / store.CONFIG).read_text(encoding="utf-8"))
    metadata = store._metadata(config)
    del metadata[store.SEALED[0]], config["config_sha256"], config["processor_sha256"]
    save_file(load_file(task / store.WEIGHTS), task / store.WEIGHTS, metadata=metadata)
    (task / store.CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- damages -----------------------------------------------------------------------------------------------


def bytes_of(draw: random.Random, task: Path) -> None:
    """Bytes of one file are changed, taken out, put in, cut off or exchanged."""
    file = task / draw.choice(FILES)
    content = bytearray(file.read_bytes())
    start, length = draw.randrange(len(content)), draw.choice((1, 1, 1, 2, 5, 40))
    noise = bytes(draw.randrange(256) for _ in range(length))
    how = draw.choice(("bit", "bit", "byte", "noise", "digit", "out", "in", "cut", "twice"))
    if how == "bit":
        content[start] ^= 1 << draw.randrange(8)
    elif how == "byte":
        content[start] = draw.randrange(256)
    elif how == "digit":
        content[start] = draw.choice(b'0123456789ae"{}[],: ')
    elif how == "cut":
        del content[start:]
    else:
        part = {"out": b"", "in": bytes([*noise, *content[start : start + length]]), "noise": noise}
        content[start : start + length] = part.get(how, bytes(content[start : start + length] * 2))
    file.write_bytes(bytes(content))


def whole_file(draw: random.Random, task: Path) -> None:
    """A file is lost, empty, a folder, another's, in another encoding, nested too deeply, or one too many."""
    name = draw.choice(FILES)
    file, how = task / name, draw.randrange(8)
    if how == 7:
        added = draw.choice(("special_tokens_map.json", "preprocessor_config.json", "added_tokens.json", "vocab.txt"))
        (task / "processor" / added).write_text(draw.choice(("{}", "[PAD]\nthe\n", '{"the": 3}', '{"sep_token": "a"}')))
        return
    content = file.read_bytes()
    file.unlink()
    if how == 1:
        file.mkdir()
    elif how > 1:
        other = (task / draw.choice(FILES[2:])).read_bytes() if name == store.CONFIG else b"{}"
        deep = draw.choice((90, 900, 5000, 200_000))
        in_utf16 = content.decode("latin-1").encode("utf-16")
        nested = (b"[" * deep + b"]" * deep, b'{"format": 1, "a":' + b"[" * deep + b"]" * deep + b"}")
        file.write_bytes((b"", other, in_utf16, *nested)[how - 2])


def json_value(draw: random.Random, task: Path) -> None:
    """One value of a JSON file is replaced by one of another kind, moved a little, taken out or added."""
    file = task / draw.choice((*[store.CONFIG] * 4, *PROCESSOR))
    config = json.loads(file.read_text(encoding="utf-8"))
    part, key = draw.choice(list(_places(config)))
    how = draw.choice(("other", "other", "near", "near", "out", "in"))
    if how == "other":
        part[key] = draw.choice(OTHERS)
    elif how == "near":
        part[key] = _near(draw, part[key])
    elif how == "out":
        del part[key]
    elif isinstance(part, list):
        part.insert(key, draw.choice(OTHERS))
    else:
        part[draw.choice(("zork", "labels", "rank", "num_classes", "towers", "generation", "text2"))] = draw.choice(
            OTHERS
        )
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each container within a value, with each of its keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def _near(draw: random.Random, value: Any) -> Any:
    """A value of the same type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + draw.choice((1, -1, 7))
    if isinstance(value, str):
        return draw.choice((value + "x", value[:-1], value.upper(), value.replace("a", "4")))
    return list(reversed(value)) if isinstance(value, list) else dict(list(value.items())[1:])


def weights_header(draw: random.Random, task: Path) -> None:
    """The header of the weights says another length, dtype, shape, place or name, or is no JSON."""
    file = task / store.WEIGHTS
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, tensors = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = draw.choice([name for name in header if name != "__metadata__"])
    how = draw.randrange(6)
    if how == 0:
        header[name]["dtype"] = draw.choice(("I32", "F16", "BF16", "F64", "F8_E4M3", "F4", "U32", "BOOL", "C64", "X"))
    elif how == 1:
        header[name]["shape"] = draw.choice(([], [1], [-1], [2**62], "x", header[name]["shape"][::-1], [0]))
    elif how == 2:
        header[name]["data_offsets"] = draw.choice(([0, 0], [5, 2], [0, 2**63], None, [0]))
    elif how == 3:
        header[draw.choice((name.upper(), name + "0", ""))] = header.pop(name)
    elif how == 4:
        part = header["__metadata__"]
        part[draw.choice(list(part))] = draw.choice(("", "0", 1, None, {}))
    text = b"[" * 5000 if how == 5 else json.dumps(header).encode()
    stated = draw.choice((len(text), len(text), len(text), 0, 2**63, len(text) - 1))
    file.write_bytes(struct.pack("<Q", stated) + text + tensors)


DAMAGES: dict[str, Callable[[random.Random, Path], None]] = {
    "bytes of a file": bytes_of,
    "a whole file": whole_file,
    "a value of a JSON file": json_value,
    "the weights' header": weights_header,
}


# --- what comes of them ------------------------------------------------------------------------------------


def said(task: Path) -> Said:
    """All that users see of a task: outputs, labels, preprocessing, tokens, and what `inspect` shows of these.

    Raises:
        TaskError: if the task is damaged.
    """
    about = store.inspect_task(task)
    model = ss.load(task)
    batch = model.extras["processor"](TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**inputs).logits
    outputs = (logits.numpy().tobytes(), *(tensor.numpy().tobytes() for tensor in inputs.values()))
    labels = list(model.settings.head.labels or ())
    return outputs, labels, about["labels"], model.extras["preprocessing"], about["tensors"], model.settings


def outcome(task: Path, right: Said) -> tuple[str, str]:
    """One of `OUTCOMES`, and the error if there was one."""
    try:
        found = said(task)
    except store.TaskError as error:
        return "TaskError", str(error)
    except BaseException as error:  # also what Rust code panics with
        if isinstance(error, KeyboardInterrupt):
            raise
        return "uncaught", f"{type(error).__name__}: {error}"
    return ("loaded right" if found == right else "loaded otherwise"), ""


def study(task: Path, place: Path, damages: int, seed: int) -> list[tuple[int, str, str, str]]:
    """Number, kind, outcome and error of each damage; kinds take turns, and a number gives the same damage again."""
    right, found = said(task), []
    for number in range(damages):
        kind = list(DAMAGES)[number % len(DAMAGES)]
        copy = place / "damaged"
        shutil.copytree(task, copy)
        DAMAGES[kind](random.Random(f"{seed} {number}"), copy)
        found.append((number, kind, *outcome(copy, right)))
        shutil.rmtree(copy)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--damages", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--before", action="store_true", help="without the checksums that earlier versions lack")
    options = parser.parse_args()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(Path(folder))
        if options.before:
            as_before(task)
        found = study(task, Path(folder), options.damages, options.seed)
    counts = Counter((kind, result) for _, kind, result, _ in found)
    print(f"| damage | {' | '.join(OUTCOMES)} |\n|---|{'---|' * len(OUTCOMES)}")
    for kind in DAMAGES:
        print(f"| {kind} | {' | '.join(str(counts[kind, result]) for result in OUTCOMES)} |")
    bad = [row for row in found if row[2] in OUTCOMES[2:]]
    for number, kind, result, error in bad:
        print(f"{number}, {kind}: {result} {error}"[:300], file=sys.stderr)
    return 1 if bad and not options.before else 0


if __name__ == "__main__":
    raise SystemExit(main())
