"""Tiny tasks of every method and of many kinds on one random backbone, and a server on them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import uvicorn
from datasets import Dataset
from torch import nn

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.cli.serve import listening
from sidestep.data import Fields
from sidestep.methods import methods
from sidestep.serve.app import create_app
from sidestep.serve.core import Core
from sidestep.serve.keys import Keys
from sidestep.serve.metrics import Metrics
from sidestep.serve.settings import ServeSettings
from sidestep.tasks.bank_folder import BankFolder
from sidestep.tasks.open_bank import open_bank
from small_tasks import text_backbone, tokenizer
from sweep.methods import config_of

LABELS = ("neg", "neutral", "pos")
TAGS = ("O", "B-PER", "I-PER")
SINGLE = ss.Classify(num_labels=len(LABELS), labels=LABELS)
METHODS = {
    name: config_of(name)
    for name, method in methods().items()
    if method.implementation.__module__.startswith("sidestep.")  # a server of its own imports no method of the tests
}
"""Every registered one. Each reads one text and predicts one of three classes."""
KINDS: dict[str, tuple[Any, str, Sequence[str], dict[str, str]]] = {
    "several": (ss.Classify(num_labels=2, labels=("film", "book"), problem="multi"), "multi", ("film", "book"), {}),
    "number": (ss.Regress(), "regress", (), {}),
    "pair": (SINGLE, "single", LABELS, {"text2": "other"}),
    "named": (SINGLE, "single", LABELS, {"text": "sentence"}),
    "tags": (ss.Tag(num_labels=len(TAGS), labels=TAGS), "tokens", TAGS, {}),
    "tags_too": (ss.Tag(num_labels=len(TAGS), labels=TAGS), "tokens", TAGS, {}),
    "spans": (ss.Span(), "spans", ("start", "end"), {"text": "question", "text2": "context"}),
}
"""Others, by READ: the head, the kind, its names, and columns other than "text"."""


CLOSE = 1e-5
"""Other batches, and side networks that run as one, add up in another order."""


def same(answer: dict[str, Any], table: Dataset, place: int, given: Iterable[str], *, within: float = CLOSE) -> None:
    """An answer is that row of a table of `sidestep predict`, which has the columns `given` besides."""
    row = {name: table[name][place] for name in table.column_names if name not in given}
    shares = {name.removeprefix("p_"): row.pop(name) for name in [*row] if name.startswith("p_")}
    expected = {**row, **({"probabilities": shares} if shares else {})}
    close({name: answer[name] for name in expected}, expected, within)
    assert answer.keys() - expected.keys() <= {"probability"}  # which a table with those of all classes leaves out


def close(found: Any, expected: Any, within: float) -> None:
    """Both are alike, and their floats differ by no more than that, or that share."""
    if isinstance(expected, float):
        assert abs(found - expected) <= within * max(1.0, abs(expected))
    elif isinstance(expected, dict):
        assert [*found] == [*expected]
        close([*found.values()], [*expected.values()], within)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs, within)
    else:
        assert found == expected


def make_tasks(folder: Path) -> Path:
    """A folder with "bert", and a folder of each task beside it."""
    backbone = load_backbone(text_backbone(folder / "bert"))
    for number, (name, method) in enumerate(METHODS.items()):
        save_task(folder / name, backbone, method, SINGLE, "single", LABELS, {}, seed=number)
    for number, (name, (head, kind, names, columns)) in enumerate(KINDS.items(), start=100):
        save_task(folder / name, backbone, ss.ReadConfig(rank=4), head, kind, names, columns, seed=number)
    save_task(folder / "short", backbone, ss.ReadConfig(rank=4), SINGLE, "single", LABELS, {}, seed=7, max_length=4)
    return folder


def save_task(
    folder: Path,
    backbone: nn.Module,
    method: Any,
    head: Any,
    kind: str,
    names: Sequence[str],
    columns: dict[str, str],
    *,
    seed: int,
    max_length: int | None = None,
    processor: Any = None,
    **stored: Any,
) -> None:
    """A task with random values, which no training has made.

    Args:
        folder: that it is saved in.
        backbone: that it is for.
        method: its config.
        head: None: the backbone's own.
        kind: of its answers.
        names: of its classes.
        columns: that it reads. With a `processor` these alone, else a text besides.
        seed: of its values.
        max_length: tokens that it reads.
        processor: None: the tokenizer of small_tasks.
        stored: what else it says of how it reads rows.
    """
    torch.manual_seed(seed)
    model = ss.attach(backbone, method, head=head)
    if isinstance(model, ss.SideModel) and model.sparse is not None:
        model.sparse.place_at_random(seed)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fields = Fields(**(columns if processor is not None else {"text": "text", **columns}))
    model.extras["processor"] = processor or tokenizer(pad=True)
    model.extras["preprocessing"] = {
        "fields": asdict(fields),
        "max_length": max_length,
        "problem": kind,
        "labels": list(names),
        **stored,
    }
    model.save_pretrained(folder)
    ss.detach(model)


def make_bank(tasks: Path, folder: Path, names: Sequence[str]) -> BankFolder:
    """A bank of some of the tasks."""
    bank = BankFolder(folder)
    for name in names:
        bank.add(name, tasks / name)
    return bank


@contextmanager
def serving(
    bank: BankFolder, backbone: Path, settings: ServeSettings | None = None, keys: Keys | None = None
) -> Iterator[str]:
    """A server on a bank, by its address."""
    with listened(Core(open_bank(bank, moved_to=str(backbone), device="cpu"), settings, Metrics()), keys) as url:
        yield url


@contextmanager
def listened(core: Core, keys: Keys | None = None) -> Iterator[str]:
    """A server on a core, by its address."""
    taken = listening("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(core, keys=keys), log_config=None, timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        taken.close()
