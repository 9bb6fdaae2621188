"""Texts that a model is to write: prompts and targets as token ids, and batches of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from sidestep.backbone.processors import tokenizer_of
from sidestep.data.encode import Collate, Fields, encode_text, refuse_empty, refuse_ignored, token_limit
from sidestep.data.joins import NOTHING, Separators
from sidestep.data.messages import DataError, DataWarning, listed, named_rows
from sidestep.metrics import IGNORED, Written


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How a task's texts are written.

    Attributes:
        max_new_tokens: at most, the end-of-sequence token included.
        num_beams: of beam search. 1: the likeliest token each time.

    Raises:
        DataError: if one is below 1.
    """

    max_new_tokens: int = 32
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise DataError(f"{name}={value}, but it must be at least 1")


def encode_prompts(
    rows: Dataset,
    fields: Fields,
    tokenizer: Any,
    kind: Written,
    max_length: int | None,
    separators: Separators = NOTHING,
) -> tuple[Dataset, int]:
    """The texts that a model reads before it writes, as `encode_text` gives them, and how many were cut.

    A decoder's prompt is cut from the left, as its end stands next to what is to be written. The prompt does not end in
    an end-of-sequence token.

    Args:
        rows: with the columns that `fields` names.
        fields: one text or a pair.
        tokenizer: a Hugging Face tokenizer.
        kind: which of the two models reads them.
        max_length: tokens kept of a prompt. None: the tokenizer's limit.
        separators: between the texts of a pair, and at a prompt's end.

    Raises:
        DataError: as `encode_text`.

    Warns:
        DataWarning: if prompts were cut, with their count and share.
    """
    if kind == "text2text":
        return encode_text(rows, fields, tokenizer, None, max_length, separator=separators.pair)
    from_left = copy.deepcopy(tokenizer)
    from_left.truncation_side = "left"
    encoded, cut = encode_text(
        rows, fields, from_left, None, max_length, separator=separators.pair, end=separators.prompt_end
    )
    prompts = encoded.map(
        _Open(end_token(tokenizer)), batched=True, remove_columns=encoded.column_names, desc="tokenizing"
    )
    refuse_empty(prompts, fields.text or "")
    return prompts, cut


def encode_targets(
    texts: Sequence[str], tokenizer: Any, kind: Written, column: str, *, start: str = ""
) -> list[list[int]]:
    """Each text as token ids that end in the end-of-sequence token.

    A decoder's texts have no other special token.

    Args:
        texts: of all rows.
        tokenizer: a Hugging Face tokenizer.
        kind: which of the two models writes them.
        column: where they are from, for messages.
        start: spaces that are put before each text.

    Raises:
        DataError: for a tokenizer without an end-of-sequence token, and texts without any token. It names the rows.

    Warns:
        DataWarning: if the tokenizer does not know a part of some texts.
    """
    end = end_token(tokenizer)
    given = [start, *(start + text for text in texts)]
    how: dict[str, Any] = {"text": given, "add_special_tokens": False} if kind == "lm" else {"text_target": given}
    spaces, *encoded = tokenizer(**how, padding=False, truncation=False, verbose=False)["input_ids"]
    ids = [row if row[-1:] == [end] else [*row, end] for row in encoded]
    blank = {*spaces, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    empty = [row for row, tokens in enumerate(ids) if blank.issuperset(tokens)]
    if empty:
        raise DataError(f"column {column!r} gives no token to write in {named_rows(empty)}: drop these rows")
    unknown = [row for row, tokens in enumerate(ids) if tokenizer.unk_token_id in tokens]
    if unknown:
        warnings.warn(
            f"column {column!r}: the tokenizer has no token for a part of {len(unknown)} of {len(ids)} texts, "
            f"{named_rows(unknown)}. They can never be written as they stand",
            DataWarning,
            stacklevel=2,
        )
    return ids


def with_targets(prompts: Dataset, texts: Sequence[str], targets: Sequence[Sequence[int]], tokenizer: Any) -> Dataset:
    """The prompts with "labels" (the targets' ids), "target" (their texts) and the "length" of both together.

    The texts are as the tokenizer writes them (it may change case and spaces). Texts with a part that the tokenizer
    does not know stay as they are.
    """
    known = tokenizer.batch_decode(list(targets), skip_special_tokens=True)
    told = [
        text if tokenizer.unk_token_id in ids else back for text, ids, back in zip(texts, targets, known, strict=True)
    ]
    lengths = [length + len(ids) for length, ids in zip(prompts["length"][:], targets, strict=True)]
    rows = prompts.remove_columns("length").add_column("length", lengths)
    return rows.add_column("labels", list(targets)).add_column("target", told)


def as_text(row: Mapping[str, Any], processor: Any, kind: Written) -> tuple[str, str]:
    """What a model reads of a row with a target, and what it is to write, special tokens included."""
    prompt, target, tokenizer = row["input_ids"], row["labels"], tokenizer_of(processor)
    if kind == "text2text":
        return tokenizer.decode(prompt), tokenizer.decode(target)
    before = tokenizer.decode(prompt)
    return before, tokenizer.decode([*prompt, *target])[len(before) :]


def prompt_limit(
    tokenizer: Any, max_length: int | None, targets: Sequence[Sequence[int]], new: int, *, pair: bool
) -> int | None:
    """How many tokens of a decoder's prompt are kept, so that the longest target still fits behind it, or None for all.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens of prompt and target together. None: the tokenizer's limit.
        targets: of all rows.
        new: tokens that the model may write.
        pair: whether a prompt is made of two texts.

    Raises:
        DataError: if nothing would be left of the prompt. It names the rows.
    """
    limit = token_limit(tokenizer, max_length, pair=pair)
    if limit is None:
        return None
    least = tokenizer.num_special_tokens_to_add(pair=pair) + (2 if pair else 1)
    long = [row for row, ids in enumerate(targets) if len(ids) > limit - least]
    if long:
        raise DataError(
            f"prompt and completion may have {limit} tokens together, but the completions alone have up to "
            f"{max(map(len, targets))}, in {named_rows(long)}: they are never cut. Shorten or drop these rows, or give "
            "a larger max_length if the model can read more"
        )
    if new > limit - least:
        raise DataError(f"max_new_tokens={new} leaves no room for a prompt: both together may have {limit} tokens")
    return limit - max(new, *map(len, targets))


def end_token(tokenizer: Any) -> int:
    """The token at which a text ends.

    Raises:
        DataError: if the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{type(tokenizer).__name__} has no end-of-sequence token, so a model would never stop writing: set its "
            "eos_token and save it beside the backbone"
        )
    return tokenizer.eos_token_id


@dataclass
class CollateWritten(Collate):
    """A Trainer's data collator: prompts with targets as one batch, padding left out of the loss.

    For an encoder-decoder, prompts and targets are padded each for itself, and the model makes the decoder's input of
    the labels. For a decoder, each target stands behind its prompt, on which there is no loss, and padding behind both.

    Attributes:
        kind: which of the two models reads them.
    """

    kind: Written = "text2text"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """{"input_ids", "attention_mask", "labels"} with the rows along the first axis.

        With pictures also what is read of them, and with features their `States` as "features".

        Raises:
            DataError: for rows without prompt or target, and if the loss would leave out all tokens.
        """
        if not {"input_ids", "labels"} <= rows[0].keys():
            raise DataError(f"rows hold {listed(rows[0])}: a batch needs input_ids and labels")
        refuse_ignored([label for row in rows for label in row["labels"]])
        texts = [_joined(row, self._types) for row in rows] if self.kind == "lm" else rows
        labels = pad_sequence([torch.tensor(row["labels"]) for row in texts], batch_first=True, padding_value=IGNORED)
        batch: dict[str, Any] = {**self._pad(texts), **self._pixels(rows), "labels": labels}
        return batch if self.features is None else {**batch, "features": self.features(rows)}


def _joined(row: Mapping[str, Any], types: Mapping[str, int]) -> dict[str, Any]:
    prompt, target = row["input_ids"], row["labels"]
    return {
        "input_ids": [*prompt, *target],
        "labels": [*[IGNORED] * len(prompt), *target],
        **{name: [*row[name], *[own] * len(target)] for name, own in types.items() if name in row},
    }


@dataclass(frozen=True)
class _Open:
    """Takes the end-of-sequence token off prompts, where the tokenizer puts one there."""

    end: int

    def __call__(self, batch: Mapping[str, list[list[int]]]) -> dict[str, list[Any]]:
        prompts = [ids[:-1] if ids[-1:] == [self.end] else ids for ids in batch["input_ids"]]
        return {"input_ids": prompts, "length": [len(ids) for ids in prompts]}
