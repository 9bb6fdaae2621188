"""The outputs of a model on encoded rows, in their order: logits, or texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from sidestep import ranks
from sidestep.backbone import picture_token
from sidestep.backbone.processors import tokenizer_of
from sidestep.data import Collate, DataError, Fields, Generation
from sidestep.data.vocabulary import check_tokens
from sidestep.kinds.sounds import check_sounds
from sidestep.measure.step import accepted
from sidestep.metrics import Written
from sidestep.model.joint_model import JointModel
from sidestep.model.side_model import SideModel

T = TypeVar("T")
Headed = SideModel | JointModel
"""Models with one head, whose outputs are scored."""


def logits(
    model: Headed,
    encoded: Dataset,
    fields: Fields,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
    collate: Collate | None = None,
) -> NDArray[Any]:
    """(rows, outputs) in the order of the rows. They are run sorted by length, so that little is padding.

    With `collate` batches are made by it: of rows whose frozen part is stored.

    Raises:
        DataError: as `check_encoded`.
    """
    processor = model.extras.get("processor")
    if collate is None:
        check_encoded(model, encoded, fields, processor)
    order = _by_length(encoded)
    collate = collate or Collate.of(fields, processor)
    how: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": progress}
    found = np.concatenate([*_outputs(model, encoded, _share(order), collate, **how)])
    shares = ranks.each(lambda: found)
    back = np.empty((len(order), *found.shape[1:]), found.dtype)
    for number, part in enumerate(shares):
        rows = order[number :: len(shares)]
        back[rows] = part[: len(rows)]
    return back


def token_logits(
    model: SideModel, encoded: Dataset, fields: Fields, *, collate: Collate, **how: Any
) -> list[NDArray[Any]]:
    """(tokens, outputs) of each row without padding, in the order of the rows.

    Args:
        model: with outputs for every token.
        encoded: with "length".
        fields: the columns that they were made of.
        collate: pads texts on the right.
        how: as of `logits`.

    Raises:
        DataError: as `check_encoded`.
    """
    if "input_ids" in encoded.column_names:
        check_encoded(model, encoded, fields, model.extras.get("processor"))
    order, lengths = _by_length(encoded), encoded.with_format(None)["length"][:]
    own, found = _share(order), list[NDArray[Any]]()
    for batch in _outputs(model, encoded, own, collate, **how):
        found += [values[: lengths[row]] for row, values in zip(own[len(found) :], batch, strict=False)]
    return _back(order, found)


def _outputs(
    model: Headed,
    encoded: Dataset,
    order: NDArray[np.int64],
    collate: Collate,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> Iterator[NDArray[Any]]:
    """The outputs of rows in this order, in batches."""
    model.eval()
    batches = _batches(model, encoded, order, collate, batch_size=batch_size, workers=workers, progress=progress)
    for batch in batches:
        with torch.inference_mode():
            output = model(**batch)
            found = (
                torch.stack([output.start_logits, output.end_logits], -1) if "start_logits" in output else output.logits
            )
        yield found.float().cpu().numpy()


def check_encoded(model: Headed, encoded: Dataset, fields: Fields, processor: Any) -> None:
    """Refuses rows that a model cannot read.

    Raises:
        DataError: for tokens that the backbone has no embeddings for, and sounds that are too short for it.
    """
    if fields.text is not None:
        check_tokens(model.parts[-1].backbone, encoded, processor)
    if fields.audio is not None and "length" in encoded.column_names:
        check_sounds(model.parts[0], encoded, processor)


def written(
    model: SideModel,
    encoded: Dataset,
    generation: Generation,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> list[str]:
    """The texts that a task writes after prompts, in the order of the rows, without special tokens.

    With a key-value cache where the method is exact with one (`model.caches`).

    Args:
        model: with a language model head, and the tokenizer or its processor as `extras["processor"]`.
        encoded: prompts as `encode_prompts` gives them, with targets or without.
        generation: how they are written.
        batch_size: rows of one pass. They are run sorted by length.
        workers: processes that load data.
        progress: whether a bar is shown.

    Raises:
        DataError: if the model writes no text, or has no embeddings for tokens of the prompts.
    """
    processor, kind = model.extras["processor"], model.writes
    tokenizer = tokenizer_of(processor)
    if kind is None:
        raise DataError(f"{type(model.backbone).__name__} as it is attached writes no text")
    check_tokens(model.backbone, encoded, processor)
    order, end = _by_length(encoded), tokenizer.eos_token_id
    collate = prompt_collator(processor, kind)
    how: dict[str, Any] = {
        **asdict(generation),
        "do_sample": False,
        "use_cache": model.caches,
        "eos_token_id": end,
        "pad_token_id": end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    if (mark := picture_token(model.backbone)) is not None:
        how["suppress_tokens"] = [mark]  # written, it would ask for a picture that there is not
    own, texts = _share(order), list[str]()
    model.eval()
    # tensors made under inference_mode could not be used in training, which goes on after an evaluation
    with torch.no_grad():
        for batch in _batches(model, encoded, own, collate, batch_size=batch_size, workers=workers, progress=progress):
            ids = model.generate(**batch, **how)
            new = ids[:, batch["input_ids"].shape[1] :] if kind == "lm" else ids
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return _back(order, texts)


def prompt_collator(processor: Any, kind: Written) -> Collate:
    """Makes batches of encoded prompts to write after: a decoder's end where the written text begins."""
    return Collate(processor, padding_side="left" if kind == "lm" else None)


def _batches(
    model: Headed,
    encoded: Dataset,
    order: NDArray[np.int64],
    collate: Collate,
    *,
    batch_size: int,
    workers: int,
    progress: bool,
) -> Iterator[dict[str, Tensor]]:
    """What the model takes of the rows without labels, in this order."""
    kept = encoded.remove_columns([name for name in ("labels", "target") if name in encoded.column_names])
    rows = Subset(kept, order.tolist())
    loader = DataLoader(rows, batch_size=ranks.share(batch_size), collate_fn=collate, num_workers=workers)
    hidden = not progress or not ranks.is_first()
    for batch in track(loader, "predicting", console=Console(stderr=True), disable=hidden, transient=True):
        yield accepted(model, batch)


def _share(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of this process, in their order.

    All processes get as many, because those that share a sharded backbone have to make the same passes. So the last row
    may be there twice, and `_back` leaves the second out.

    Raises:
        DataError: if there are fewer rows than processes.
    """
    if len(order) < ranks.count():
        raise DataError(f"{len(order)} rows for {ranks.count()} processes: start at most {max(len(order), 1)}")
    own = order[ranks.rank() :: ranks.count()]
    return own if len(own) == ranks.share(len(order)) else np.append(own, own[-1])


def _back(order: NDArray[np.int64], own: list[T]) -> list[T]:
    """What each process has found of its share, in the order of the rows."""
    found: list[Any] = [None] * len(order)
    mine = own[: len(order[ranks.rank() :: ranks.count()])]
    for row, value in zip(order, ranks.woven(ranks.each(lambda: mine)), strict=True):
        found[row] = value
    return found


def _by_length(encoded: Dataset) -> NDArray[np.int64]:
    if "length" not in encoded.column_names:
        return np.arange(len(encoded))
    return np.argsort(encoded["length"][:], kind="stable")
