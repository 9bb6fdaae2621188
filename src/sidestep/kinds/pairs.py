"""What a dual encoder says about images and captions: recalls, and what is closest to what."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader

from sidestep.data import DataError, Fields
from sidestep.data.images import undecoded
from sidestep.data.pairs import CollatePairs, captioned, encode_pairs
from sidestep.data.vocabulary import check_tokens
from sidestep.measure.step import accepted
from sidestep.metrics import scores, similarities
from sidestep.model.attach import Attached
from sidestep.model.pair_model import PairModel

TOP = 5
"""How many neighbours a table of predictions names."""


def cosines(
    model: Attached, encoded: Dataset, *, batch_size: int = 64, workers: int = 0, progress: bool = False
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Similarities (captions, images) and the number of each caption's image (captions,).

    Args:
        model: with a `PairProcessor` as `extras["processor"]`.
        encoded: as `encode_pairs` gives them.
        batch_size: pairs of one pass; an image stands in it once.
        workers: processes that load data.
        progress: whether a bar is shown.

    Raises:
        DataError: if the model is no dual encoder, or has no embeddings for tokens of the captions.
    """
    if not isinstance(model, PairModel):
        raise DataError(f"retrieval needs a dual encoder, but the task is on {type(model.backbone).__name__}")
    check_tokens(model.text.backbone, encoded, model.extras["processor"].text)
    collate = CollatePairs(model.extras["processor"].text)
    loader = DataLoader(encoded, batch_size=batch_size, collate_fn=collate, num_workers=workers)
    parts: dict[str, list[NDArray[Any]]] = {"image_embeds": [], "text_embeds": [], "labels": []}
    model.eval()
    with torch.inference_mode():
        for batch in track(loader, "predicting", console=Console(stderr=True), disable=not progress, transient=True):
            owners = batch.pop("labels")
            out = model(**accepted(model, batch))
            for name, values in (("labels", owners), *out.items()):
                parts[name].append(values.cpu().numpy())
    images, texts, owners = (np.concatenate(values) for values in parts.values())
    return similarities(images, texts, owners)


def recalls(model: Attached, encoded: Dataset, **how: Any) -> dict[str, float]:
    """Recalls in both directions, and their sum (see `metrics.scores`); arguments as of `cosines`."""
    return scores("retrieval", *cosines(model, encoded, **how))


def neighbours(model: Attached, rows: Dataset, fields: Fields, *, top: int = TOP, **how: Any) -> Dataset:
    """The captions closest to each image, then the images closest to each caption, best first.

    Args:
        model: as of `cosines`, as are further arguments.
        rows: images and captions.
        fields: their columns.
        top: how many are named of each.

    Returns:
        Rows with "query" ("image" or "text"), "image", "text", "rank" (from 1) and "score" (the cosine).

    Raises:
        DataError: for rows that are no pairs.
    """
    assert fields.image is not None
    rows = captioned(rows, fields)
    length = (model.extras.get("preprocessing") or {}).get("max_length")
    by_text, _ = cosines(model, encode_pairs(rows, fields, model.extras["processor"], length)[0], **how)
    cells = undecoded(rows, fields.image)[fields.image][:]
    images = [cell["path"] or f"image {number + 1}" for number, cell in enumerate(cells)]
    texts = [text for cell in rows[fields.text][:] for text in cell]
    found: dict[str, list[Any]] = {name: [] for name in ("query", "image", "text", "rank", "score")}
    for query, table in (("image", by_text.T), ("text", by_text)):
        for number, line in enumerate(table):
            for rank, other in enumerate(np.argsort(-line, kind="stable")[:top]):
                image, text = (number, other) if query == "image" else (other, number)
                values = (query, images[image], texts[text], rank + 1, float(line[other]))
                for name, value in zip(found, values, strict=True):
                    found[name].append(value)
    return Dataset.from_dict(found)
