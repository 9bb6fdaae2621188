"""What is refused before a run: settings, rows and a model that do not fit each other."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sidestep import ranks
from sidestep.backbone import positions
from sidestep.backbone.pixels import check_image_size
from sidestep.backbone.vision_language import PicturedProcessor
from sidestep.data import DataError
from sidestep.data.messages import named_rows
from sidestep.data.vocabulary import check_tokens
from sidestep.kinds.base import kind_named
from sidestep.kinds.sounds import check_sounds
from sidestep.kinds.task_data import TaskData
from sidestep.measure.step import accepted, sparse_deltas
from sidestep.messages import counted
from sidestep.model.attach import Attached
from sidestep.model.saving import check_sizes
from sidestep.training.settings import TrainSettings


def check_run(model: Attached, data: TaskData, settings: TrainSettings) -> None:
    """Refuse what a run cannot do.

    Raises:
        DataError: if rows do not fit the backbone.
        TaskError: if the task could not be loaded again.
        ValueError: if a setting does not fit the problem, or texts the backbone's positions.
    """
    smoothing, kind = settings.label_smoothing, kind_named(data.labels.kind)
    if smoothing and not kind.smooths:
        raise ValueError(
            f"label_smoothing={smoothing} with problem {data.labels.kind!r}: it is for single-label "
            "classification. Leave it at 0"
        )
    if smoothing and not hasattr(model, "config"):
        raise ValueError(
            f"label_smoothing={smoothing}: the Trainer smooths labels of transformers models only, and "
            f"{type(model.backbone).__name__} is timm's. Leave it at 0"
        )
    kind.check(model, settings.batch_size)
    check_sizes(model)  # before a long run, at whose end nothing could be saved
    pictured = isinstance(data.processor, PicturedProcessor)
    if (data.fields.image is not None and not pictured) or data.fields.video is not None:
        reader, pixels = model.parts[0], data.train[0]["pixel_values"]
        check_image_size(reader.backbone, reader.trunk, pixels if data.fields.video is None else pixels[0])
    if data.fields.audio is not None:
        for split, rows in (("training", data.train), ("dev", data.dev)):
            check_sounds(model.parts[0], rows, data.processor, split)
    if data.fields.text is not None:
        _check_positions(model.parts[-1].backbone, data)
        _check_tokens(model, data)
    if pictured:
        _check_pictures(model, data)
    if settings.drop_last and len(data.train) < settings.batch_size:
        raise ValueError(
            f"drop_last with {len(data.train)} training rows and batch_size={settings.batch_size}: no batch would be "
            "left. Lower the batch size, or train on the last batch too"
        )
    _check_shares(model, data, settings)
    _check_rows(model, data, settings)
    if torch.cuda.is_available() and torch.cuda.device_count() > 1 and not torch.distributed.is_initialized():
        raise ValueError(
            f"{torch.cuda.device_count()} GPUs are visible: show one (CUDA_VISIBLE_DEVICES=0), or start one "
            "process per GPU with torchrun"
        )


def _check_pictures(model: Attached, data: TaskData) -> None:
    """Refuse pictures that the backbone cannot read beside their texts. The first training row is tried."""
    batch = {name: value for name, value in data.collate([data.train[0]]).items() if name != "labels"}
    backbone = model.backbone
    try:
        with torch.inference_mode():
            backbone(**accepted(model, batch))
    except torch.OutOfMemoryError:
        raise
    # transformers compares the picture's tokens with its states, and torch says which shapes do not fit
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{type(backbone).__name__} cannot read what {data.processor.name} makes of the first training row. It "
            f"says: {reason}. Take the processor that was saved with the backbone"
        ) from error


def _check_shares(model: Attached, data: TaskData, settings: TrainSettings) -> None:
    """Refuse batches, the last one of an epoch included, and dev rows of which a process would get none."""
    processes, given = ranks.count(), f"{ranks.count()} processes"
    if processes > 1 and any(delta.wanders for delta, _ in sparse_deltas(model.parts)):
        raise ValueError(
            f"{model.record.name} as configured moves its entries by the gradients of one process, and there are "
            f'{processes}: choose select="fisher", "magnitude" or "random", or start one process'
        )
    if settings.batch_size < processes:
        raise ValueError(
            f"batch_size={settings.batch_size} with {given}: it is the rows of all of them together. Choose at least "
            f"{processes}, or start fewer processes"
        )
    for split, count in (("training", len(data.train)), ("dev", len(data.dev))):
        if count < processes:
            raise DataError(f"{count} {split} rows for {given}: start at most {count}, or give more rows")
    rest = len(data.train) % settings.batch_size
    if 0 < rest < processes and not settings.drop_last:
        raise ValueError(
            f"batch_size={settings.batch_size} with {len(data.train)} training rows leaves {counted(rest, 'row')} for "
            f"the last batch of an epoch, and {given} share it. Choose another batch size, or leave that batch out "
            "(--drop-last)"
        )


def _check_rows(model: Attached, data: TaskData, settings: TrainSettings) -> None:
    """Refuse batches that are too small for a method's batch norms, the last one of an epoch included."""
    least = max(part.side.least_rows for part in model.parts)
    rest = 0 if settings.drop_last else len(data.train) % settings.batch_size
    smallest = (rest or settings.batch_size) // ranks.count()
    if smallest < least:
        raise ValueError(
            f"batch_size={settings.batch_size} with {len(data.train)} training rows makes a batch of "
            f"{smallest}, but {model.record.name} has batch norms here, which are "
            f"trained on {least} rows or more. Choose another batch size"
            + (", or leave the last batch out (--drop-last)" if rest and rest != len(data.train) else "")
        )


def _check_positions(backbone: nn.Module, data: TaskData) -> None:
    """Refuse texts, asked for or there, that are longer than the backbone's tables of positions."""
    name, (reads, writes) = type(backbone).__name__, positions(backbone)
    parts = [rows.with_format(None) for rows in (data.train, data.dev)]
    new = 0 if data.generation is None else data.generation.max_new_tokens
    targets = [[len(ids) for ids in rows["labels"][:]] if new else [0] * len(rows) for rows in parts]
    prompts = [np.subtract(rows["length"][:], own).max() for rows, own in zip(parts, targets, strict=True)]
    behind = max(new, *map(max, targets)) if kind_named(data.labels.kind).writes == "lm" else 0
    longest = behind + (max(prompts) if data.max_length is None else data.max_length)
    if reads is not None and longest > reads:
        given = f"max_length={longest}"
        if data.max_length is None:
            given = f"max_length=None leaves texts of up to {longest} tokens"
        raise ValueError(f"{given}, but {name} has {reads} positions: choose at most {reads}")
    if writes is None or kind_named(data.labels.kind).writes != "text2text":
        return
    for split, lengths in zip(("training", "dev"), targets, strict=True):
        if long := [row for row, length in enumerate(lengths) if length > writes]:
            raise DataError(
                f"the decoder of {name} has {writes} positions, but targets have up to {max(lengths)} tokens, in "
                f"{named_rows(long)} of the {split} rows: they are never cut. Shorten or drop these rows"
            )
    if new > writes:
        raise ValueError(
            f"max_new_tokens={new}, but the decoder of {name} has {writes} positions: choose at most {writes}"
        )


def _check_tokens(model: Attached, data: TaskData) -> None:
    """Refuse rows with tokens that the backbone has no embeddings for."""
    kind = kind_named(data.labels.kind).writes
    for split, rows in (("training", data.train), ("dev", data.dev)):
        check_tokens(model.parts[-1].backbone, rows, data.processor, kind=kind, split=split)
