"""Embeddings of texts: by a task of retrieval, or by the bare backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sidestep.backbone import device_of, is_encoder_decoder, trunk_of
from sidestep.data import Collate, DataError
from sidestep.data.encode import Tokenize, token_limit
from sidestep.kinds.base import Probabilities
from sidestep.model.pair_model import PairModel
from sidestep.serve.forms import Answer, Asking, Piece, Reading
from sidestep.serve.problems import Problem
from sidestep.tasks.bank import TaskBank

EMBEDDING = "embedding"


@dataclass(eq=False)
class Texts(Reading):
    """Texts as token ids, by a tokenizer alone."""

    def encode(self, cells: list[dict[str, Any]]) -> Sequence[Piece | Problem]:
        """Token ids."""
        assert self.fields.text is not None
        limit = token_limit(self.processor, self.max_length, pair=False)
        call = Tokenize(self.processor, self.fields.text, None, limit, "", "")
        found = call({self.fields.text: [each[self.fields.text] for each in cells]})
        cut = found.pop("truncated")
        pieces: list[Piece | Problem] = []
        for place, length in enumerate(found["length"]):
            row = {name: values[place] for name, values in found.items()}
            try:
                self.check(row["input_ids"], self.fields.text)
                pieces.append(Piece([row], length, length, cut[place]))
            except Problem as problem:
                pieces.append(problem)
        return pieces

    def run(
        self, bank: TaskBank, pieces: Sequence[Piece], tasks: Mapping[str, Asking], modes: Sequence[Probabilities]
    ) -> dict[str, list[Answer | Problem]]:
        """Embeddings of length one, by the text towers of the tasks. Without tasks the backbone's."""
        device = device_of(bank.backbone)
        batch = Collate(self.processor)([piece.parts[0] for piece in pieces])
        batch = {name: value.to(device) for name, value in batch.items() if name in self.takes}
        with torch.inference_mode():
            found = {
                name: self.embed(bank, name, {key: value[task.places] for key, value in batch.items()})
                for name, task in tasks.items()
            }
        return {name: [{EMBEDDING: each} for each in own.float().cpu().tolist()] for name, own in found.items()}

    def embed(self, bank: TaskBank, name: str, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(texts, dim): of a task of retrieval."""
        model = bank.activate(name)
        assert isinstance(model, PairModel)
        embeds = model(**batch).text_embeds
        assert embeds is not None
        return embeds


class Pooled(Texts):
    """The mean of the kept tokens' last hidden states, of length one: what sentence encoders are trained to give."""

    def embed(self, bank: TaskBank, name: str, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(texts, width): of the bare backbone."""
        states = trunk_of(bank.deactivate())(**batch).last_hidden_state.float()
        keep = batch["attention_mask"][..., None].to(states.dtype)
        mean = (states * keep).sum(dim=1) / keep.sum(dim=1)
        return nn.functional.normalize(mean, dim=-1)


def check_pooled(backbone: nn.Module) -> None:
    """Refuse a backbone whose last hidden states are no vectors of its tokens.

    Raises:
        DataError: saying which model it is.
    """
    if getattr(trunk_of(backbone), "main_input_name", None) != "input_ids" or is_encoder_decoder(backbone):
        raise DataError(f"{type(backbone).__name__} is no encoder or decoder of texts alone")
