"""Heads that read every token of a text: a class for each of them, or where an answer begins and ends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sidestep.backbone.families import Pool
from sidestep.fold import Reading
from sidestep.metrics import IGNORED, Kind
from sidestep.model.heads.base import Head, HeadConfig, named, register


@dataclass(frozen=True, kw_only=True)
class ReadsTokens(HeadConfig):
    """What heads of all tokens have in common."""

    pools: ClassVar[tuple[Pool, ...]] = ("all",)
    default: ClassVar[Pool | None] = "all"

    @abstractmethod
    def terms(self, labels: Sequence[int], tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The tokens of a row that count, and the target of each, for a head that is solved token by token."""


@register
@dataclass(frozen=True, kw_only=True)
class Tag(ReadsTokens):
    """A class for each token, with a linear map of its hidden state.

    The labels of a batch are (batch, tokens). -100 leaves a token out of the loss.

    Attributes:
        num_labels: number of classes.
        labels: their names, in order. They come back in predictions.
    """

    num_labels: int
    labels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_labels < 2:
            raise ValueError(f"num_labels={self.num_labels}: a head of tags needs at least 2")
        if self.labels is not None and len(self.labels) != self.num_labels:
            raise ValueError(f"num_labels={self.num_labels}, but {len(self.labels)} label names were given")

    @property
    def outputs(self) -> int:
        """One logit per class."""
        return self.num_labels

    @property
    def kind(self) -> Kind:
        """Tags of tokens."""
        return "tokens"

    def described(self) -> dict[str, Any]:
        """The classes by number and by name."""
        return named(self.labels or [f"LABEL_{index}" for index in range(self.num_labels)])

    def build(self, width: int, pool: Pool) -> TagHead:
        """With the cross-entropy of the tokens."""
        return TagHead(self, width, pool)

    def terms(self, labels: Sequence[int], tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Those with a label, and its number."""
        numbers = np.asarray(labels, dtype=np.int64)
        places = np.flatnonzero(numbers != IGNORED)
        return places, numbers[places]

    def blank_labels(self, rows: int, tokens: int) -> Tensor:
        """The first class for each token."""
        return torch.zeros(rows, tokens, dtype=torch.long)


@register
@dataclass(frozen=True, kw_only=True)
class Span(ReadsTokens):
    """Where an answer begins and where it ends among the tokens, with a linear map of the hidden states.

    The labels of a batch are (batch, 2): the first and the last token of the answer.
    """

    @property
    def outputs(self) -> int:
        """A logit for the beginning, and one for the end."""
        return 2

    @property
    def kind(self) -> Kind:
        """Spans of tokens."""
        return "spans"

    def build(self, width: int, pool: Pool) -> SpanHead:
        """With the cross-entropy of both over the tokens."""
        return SpanHead(self, width, pool)

    def terms(self, labels: Sequence[int], tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """All, each with whether an answer begins and whether one ends there."""
        places = np.arange(tokens)
        return places, np.stack([places == labels[0], places == labels[1]], axis=1).astype(np.int64)

    def blank_labels(self, rows: int, tokens: int) -> Tensor:
        """The first token."""
        return torch.zeros(rows, 2, dtype=torch.long)


class TokenHead(Head):
    """The linear map of every token."""

    def read(self, reading: Reading) -> Tensor:
        """(batch, tokens, width), without tokens that the model puts in front of a text."""
        return reading.hidden[:, reading.site.prefix :]

    def kept(self, reading: Reading) -> Tensor | None:
        """Those of the same tokens."""
        keep = reading.site.keep
        return None if keep is None else keep[:, reading.site.prefix :]


class TagHead(TokenHead):
    """(batch, tokens, classes)."""

    def losses(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """The cross-entropy of the tokens that have a label."""
        return F.cross_entropy(logits.flatten(0, 1), labels.long().flatten(), reduction=reduction, ignore_index=IGNORED)


class SpanHead(TokenHead):
    """(batch, tokens, 2). Padding is no answer: its logits are the lowest number there is."""

    def map(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits of the beginning and of the end."""
        logits = super().map(features)
        return logits if keep is None else logits.masked_fill(~keep[..., None], torch.finfo(logits.dtype).min)

    def losses(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """The cross-entropy of the two places over the tokens."""
        return F.cross_entropy(logits.transpose(1, 2).flatten(0, 1), labels.long().flatten(), reduction=reduction)
