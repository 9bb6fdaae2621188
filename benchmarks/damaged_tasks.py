"""Damaged task folders. Each has to be refused with a `TaskError`, or to say the same as before.

    python benchmarks/damaged_tasks.py --damages 2000 --seed 0

A small BERT with a READ side network, a classifying head, label names and a tokenizer is saved once. Hypothesis (extra
"test") makes the damages, each of one file in a copy of that task. It damages bytes of every file, files as a whole,
and values of sidestep.json, of the processor's files and of the weights' header. The copy is then inspected and loaded
by the name of its backbone. The table counts the outcomes. `--before` takes the checksums of sidestep.json and the
processor out first, as in tasks of earlier versions. Such damages have to be refused by name if they are refused. Some
of them cannot be told from another task.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.utils import logging

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.disk import task_folder

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
ADDED = ("special_tokens_map.json", "preprocessor_config.json", "added_tokens.json", "vocab.txt")
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
    model = ss.attach(load_backbone(place / "bert"), ss.ReadConfig(rank=2), head=head)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(torch.randn_like(parameter))
    model.extras["processor"] = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    model.extras["preprocessing"] = PREPROCESSING
    model.save_pretrained(place / "task", scores={"accuracy": 0.75, "rows": 16})
    return place / "task"


def as_before(task: Path) -> None:
    """Take out of a task what earlier versions did not write."""
    config = json.loads((task / task_folder.CONFIG).read_text(encoding="utf-8"))
    metadata = task_folder.weights_metadata(config)
    del metadata[task_folder.SEALED[0]], config["config_sha256"], config["processor_sha256"]
    save_file(load_file(task / task_folder.WEIGHTS), task / task_folder.WEIGHTS, metadata=metadata)
    (task / task_folder.CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- damages -----------------------------------------------------------------------------------------------

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Damage:
    """What became of one file: other bytes, or no file."""

    file: str
    how: str
    content: bytes | Literal["lost", "a folder"] = field(repr=False)

    def apply(self, task: Path) -> None:
        """Damage a task."""
        path = task / self.file
        path.unlink(missing_ok=True)
        if self.content == "a folder":
            path.mkdir()
        elif isinstance(self.content, bytes):
            path.write_bytes(self.content)


def files_of(task: Path) -> Files:
    """What a task's files hold, by their names."""
    paths = (path for path in sorted(task.rglob("*")) if path.is_file())
    return {path.relative_to(task).as_posix(): path.read_bytes() for path in paths}


@st.composite
def some_bytes(draw: st.DrawFn, files: Files) -> Damage:
    """Bytes of a file are flipped, replaced, put in, taken out, cut off, exchanged or repeated."""
    name = draw(st.sampled_from(sorted(files)))
    old = files[name]
    start, length = draw(st.integers(0, len(old) - 1)), draw(st.integers(1, 40))
    end = min(start + length, len(old))
    how = draw(st.sampled_from(("flip", "replace", "insert", "delete", "truncate", "swap", "repeat")))
    if how == "flip":
        new = bytes([old[start] ^ 1 << draw(st.integers(0, 7))]) + old[start + 1 : end]
    elif how == "replace":
        new = draw(st.binary(min_size=end - start, max_size=end - start) | digits(end - start))
    elif how == "insert":
        new = draw(st.binary(min_size=1, max_size=40) | digits(1)) + old[start:end]
    else:
        new = {"delete": b"", "truncate": b"", "swap": old[start:end][::-1], "repeat": old[start:end] * 2}[how]
    after = b"" if how == "truncate" else old[end:]
    return Damage(name, f"{how} {start}:{end} -> {new!r}", old[:start] + new + after)


def digits(length: int) -> st.SearchStrategy[bytes]:
    """What leaves JSON more often whole than other bytes do."""
    return st.text('0123456789ae"{}[],: ', min_size=length, max_size=length).map(str.encode)


@st.composite
def whole_file(draw: st.DrawFn, files: Files) -> Damage:
    """A file is lost, empty, a folder, another's, in another encoding, nested too deeply, or one too many."""
    name = draw(st.sampled_from(sorted(files)))
    how = draw(st.sampled_from(("lost", "a folder", "empty", "another's", "in utf-16", "deep", "one too many")))
    if how == "one too many":
        name = f"processor/{draw(st.sampled_from(ADDED))}"
        return Damage(name, how, draw(st.sampled_from((b"{}", b"[PAD]\nthe\n", b'{"the": 3}', b'{"sep_token": "a"}'))))
    if how in ("lost", "a folder"):
        return Damage(name, how, how)
    deep = draw(st.sampled_from((90, 900, 5000, 200_000)))
    nested = b"[" * deep + b"]" * deep
    content = {
        "empty": b"",
        "another's": files[draw(st.sampled_from(sorted(files)))],
        "in utf-16": files[name].decode("latin-1").encode("utf-16"),
        "deep": draw(st.sampled_from((nested, b'{"format": 1, "a":' + nested + b"}"))),
    }
    return Damage(name, how, content[how])


#: What stands for text that Python's json does not write.
RAW = {'"<huge>"': "1" * 5000, '"<deep>"': "[" * 5000 + "]" * 5000, '"<open>"': "{"}
NUMBERS = (1e308, 1e400, 10**30, 10**400, 2**63, -1)
ODD = (*(text.strip('"') for text in RAW), *NUMBERS, "\ud83d", "größer", "I32", "F8_E4M3")
LISTS = ([], [0], [-1], [2**62], [5, 2], [0, 2**63], [[]], ["a"], {})
TWICE = "<twice>"  # stands for the key of another value of the same object
KEYS = ("zork", "labels", "rank", "num_classes", "towers", "generation", "text2", "__metadata__", "")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3) | st.sampled_from(LISTS),
    max_leaves=6,
)


@st.composite
def json_value(draw: st.DrawFn, files: Files) -> Damage:
    """A value of a JSON file is replaced by another, moved a little, taken out, added or written twice."""
    name = draw(st.sampled_from((task_folder.CONFIG, *PROCESSOR)))
    how, text = draw(other_json(files[name].decode()))
    return Damage(name, how, text)


@st.composite
def header(draw: st.DrawFn, files: Files) -> Damage:
    """So is one of the weights' header, or its length is another."""
    content = files[task_folder.WEIGHTS]
    end = 8 + int.from_bytes(content[:8], "little")
    how, text = draw(other_json(content[8:end].decode()))
    stated = draw(st.sampled_from((len(text), len(text), len(text), end - 8, 0, 2**63, len(text) - 1)))
    return Damage(task_folder.WEIGHTS, f"{how}, length {stated}", struct.pack("<Q", stated) + text + content[end:])


@st.composite
def other_json(draw: st.DrawFn, text: str) -> tuple[str, bytes]:
    """Another text of a JSON document, and what was done to it."""
    document = json.loads(text)
    places = _places(document)
    where, part, key = places[draw(st.integers(0, len(places) - 1))]
    how, value = draw(st.sampled_from(("other", "other", "near", "out", "in", "twice"))), draw(VALUES)
    if how == "other":
        part[key] = value
    elif how == "near":
        part[key] = value = draw(_near(part[key]))
    elif how == "out":
        del part[key]
    elif isinstance(part, list):
        part.insert(key, value)
    elif how == "in":
        part[draw(st.sampled_from(KEYS) | st.text())] = value
    else:
        part[TWICE] = value
    new = json.dumps(document).replace(json.dumps(TWICE), json.dumps(key))
    for short, raw in RAW.items():
        new = new.replace(short, raw)
    return f"{how} {where}: {value!r}", new.encode()


def _places(value: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Each container within a value with each of its keys, and their dotted names."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((f"{name}{key}", value, key), *_places(value[key], f"{name}{key}."))]


def _near(value: Any) -> st.SearchStrategy[Any]:
    """Other values of the same type."""
    if isinstance(value, bool) or value is None:
        return st.just(not value)
    if isinstance(value, int | float):
        return st.sampled_from((value + 1, value - 1, value + 7, -value))
    if isinstance(value, str):
        return st.sampled_from((value + "x", value[:-1], value.upper(), value.replace("a", "4")))
    return st.just(list(reversed(value)) if isinstance(value, list) else dict(list(value.items())[1:]))


DAMAGES: dict[str, Callable[[Files], st.SearchStrategy[Damage]]] = {
    "bytes of a file": some_bytes,
    "a whole file": whole_file,
    "a value of a JSON file": json_value,
    "the weights' header": header,
}


# --- what comes of them ------------------------------------------------------------------------------------


def said(task: Path) -> Said:
    """All that users see of a task: outputs, labels, preprocessing, tokens, and what `inspect` shows of these.

    Raises:
        TaskError: if the task is damaged.
    """
    about = task_folder.inspect_task(task)
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
    except task_folder.TaskError as error:
        return "TaskError", str(error)
    except BaseException as error:  # also what Rust code panics with
        if isinstance(error, KeyboardInterrupt):
            raise
        return "uncaught", f"{type(error).__name__}: {error}"
    return ("loaded right" if found == right else "loaded otherwise"), ""


@contextmanager
def damaged(task: Path, damage: Damage) -> Iterator[Path]:
    """A damaged copy of a task, which is removed again."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(task, Path(place) / "task"))
        damage.apply(copy)
        yield copy


def study(task: Path, kind: str, damages: int, number: int) -> list[tuple[Damage, str, str]]:
    """Damage, outcome and error of as many damages of a kind. The same number of a study gives the same again."""
    right, found = said(task), []

    @seed(number)
    @settings(max_examples=damages, deadline=None, database=None, phases=[Phase.generate])
    @given(DAMAGES[kind](files_of(task)))
    def one(damage: Damage) -> None:
        with damaged(task, damage) as copy:
            found.append((damage, *outcome(copy, right)))

    one()
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
        found = {kind: study(task, kind, options.damages // len(DAMAGES), options.seed) for kind in DAMAGES}
    print(f"| damage | {' | '.join(OUTCOMES)} |\n|---|{'---|' * len(OUTCOMES)}")
    for kind, rows in found.items():
        counts = Counter(result for _, result, _ in rows)
        print(f"| {kind} | {' | '.join(str(counts[result]) for result in OUTCOMES)} |")
    bad = [row for rows in found.values() for row in rows if row[1] in OUTCOMES[2:]]
    for damage, result, error in bad:
        print(f"{damage}: {result} {error}"[:400], file=sys.stderr)
    return 1 if bad and not options.before else 0


if __name__ == "__main__":
    raise SystemExit(main())
