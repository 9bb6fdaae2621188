"""Whether a backbone has embeddings for the tokens that its tokenizer makes of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from torch import nn

from sidestep.backbone import picture_token, token_rows
from sidestep.backbone.processors import tokenizer_of
from sidestep.data.messages import DataError, named_rows
from sidestep.metrics import Written


def check_tokens(
    backbone: nn.Module, rows: Dataset, processor: Any, *, kind: Written | None = None, split: str = ""
) -> None:
    """Refuse rows with tokens that the backbone has no embeddings for, padding included.

    Rows of a picture without a token for it are refused too, and the reverse.

    Only the tokens that are there count. A tokenizer may know more than it uses, and a table may be padded.

    Args:
        backbone: that reads them. Of a dual encoder it is the tower of texts.
        rows: encoded, with "input_ids", and where texts are written "labels".
        processor: that made them, a tokenizer or one that has a tokenizer.
        kind: of the texts that are written. None: labels are no tokens.
        split: what the rows are called in the message.

    Raises:
        DataError: naming the token and the rows.
    """
    tokenizer = tokenizer_of(processor)
    reads, writes = token_rows(backbone)
    plain = rows.with_format(None)
    names = {"input_ids": reads, **({"labels": writes} if kind is not None else {})}
    for name, most in names.items():
        if name not in plain.column_names or most is None:
            continue
        ids = plain[name][:]
        highest = [max(row, default=0) for row in ids]
        if wrong := [place for place, token in enumerate(highest) if token >= most]:
            raise DataError(_too_high(backbone, tokenizer, highest[wrong[0]], most, f"in {_named(wrong, split)}"))
        if name == "input_ids" and (pad := _padding(tokenizer, ids)) is not None and pad >= most:
            raise DataError(_too_high(backbone, tokenizer, pad, most, "with which texts are padded"))
    if (mark := picture_token(backbone)) is not None and "input_ids" in plain.column_names:
        _check_pictures(backbone, plain, tokenizer, mark, split)


def _check_pictures(backbone: nn.Module, rows: Dataset, tokenizer: Any, mark: int, split: str) -> None:
    """Refuse rows without a picture that have a token for it, and the reverse."""
    pictures, ids = "pixel_values" in rows.column_names, rows["input_ids"][:]
    wrong = [place for place, row in enumerate(ids) if (mark in row) != pictures]
    if not wrong:
        return
    what = f"token {mark} ({tokenizer.convert_ids_to_tokens(mark)!r})"
    if pictures:
        raise DataError(
            f"{type(backbone).__name__} reads a picture where {what} stands, and there is none in "
            f"{_named(wrong, split)}: take the processor that was saved with the backbone"
        )
    raise DataError(
        f"{what} stands for a picture and is in {_named(wrong, split)}, but no column of images is read. Name the "
        "column (--image), or take the token out of the texts"
    )


def _named(places: Sequence[int], split: str) -> str:
    return named_rows(places) + (f" of the {split} rows" if split else "")


def _padding(tokenizer: Any, ids: Sequence[Sequence[int]]) -> int | None:
    """The token that stands behind the shorter of these texts."""
    return tokenizer.pad_token_id if len({len(row) for row in ids}) > 1 else None


def _too_high(backbone: nn.Module, tokenizer: Any, token: int, most: int, where: str) -> str:
    return (
        f"the tokenizer has token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), {where}, but "
        f"{type(backbone).__name__} has embeddings for {most} tokens, 0 to {most - 1}: take the tokenizer that was "
        "saved with the backbone, or give the backbone more (model.resize_token_embeddings(len(tokenizer))) and save "
        "both in a folder that you name as the backbone"
    )
