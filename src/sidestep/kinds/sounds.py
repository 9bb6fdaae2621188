"""Whether a model takes what an extractor makes of the sounds of rows. One of them is tried."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from sidestep.data import Collate, DataError
from sidestep.data.encode_sounds import MISFITS, inputs_of, least, noise, refuse_shorter
from sidestep.measure.step import accepted
from sidestep.model.side_model import SideModel


def check_sounds(model: SideModel, rows: Dataset, extractor: Any, split: str = "") -> None:
    """Refuses sounds that a model cannot take, by a pass of noise that is as long as the shortest of them.

    Args:
        model: that reads them.
        rows: encoded.
        extractor: that encoded them.
        split: what the rows are called in the message.

    Raises:
        DataError: if the extractor is none for this model, or naming the rows with sounds that are too short.
    """
    rate, lengths = extractor.sampling_rate, rows["length"][:] if "length" in rows.column_names else []
    shortest = min(lengths, default=rate)
    if (reason := _refusal(model, extractor, shortest)) is None:
        return
    longest = max(rate, *lengths, shortest)
    if _refusal(model, extractor, longest) is not None:
        raise DataError(
            f"{type(model.backbone).__name__} cannot take what {type(extractor).__name__} makes of a sound: {reason}. "
            "Take the feature extractor that was saved with the backbone"
        )
    needed = least(lambda samples: _refusal(model, extractor, samples) is None, longest)
    where = f" of the {split} rows" if split else ""
    refuse_shorter(lengths, needed, rate, type(model.backbone).__name__, where)


def _refusal(model: SideModel, extractor: Any, samples: int) -> str | None:
    """Why a model does not take a sound of so many samples. None if it does."""
    training = model.training
    model.eval()
    try:
        made = inputs_of(extractor, noise(samples))
        inputs = accepted(model, Collate(extractor=extractor)([made]))
        if model.main_input_name not in inputs:
            return f"it reads {model.main_input_name}, and not {', '.join(made)}"
        with torch.inference_mode():
            model(**inputs)
    except torch.OutOfMemoryError:
        raise
    except MISFITS as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    finally:
        model.train(training)
    return None
