"""PairModel: two towers whose embeddings are compared, with a trained temperature and the losses of retrieval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from sidestep import ranks
from sidestep.model.heads import Retrieve
from sidestep.model.losses import LARGEST_SCALE, contrastive_loss, triplet_loss
from sidestep.model.settings import Settings
from sidestep.model.two_towers import TwoTowers


@dataclass
class RetrievalOutput(ModelOutput):
    """What a `PairModel` gives.

    Attributes:
        loss: of training, where labels were given.
        image_embeds: (pairs, dim) of length one, of images or videos. None without them.
        text_embeds: (pairs, dim) of length one. None without texts.
    """

    loss: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class PairModel(TwoTowers):
    """A dual encoder with a method and an embedding head on each tower. Make one with `attach` or `load`.

    "logit_scale" of its `state_dict()` is the trained temperature.

    Attributes:
        logit_scale: logarithm of what cosines are multiplied by. None with the triplet loss.
        epoch: how far training is, in epochs, for a loss that depends on it (`Retrieve.mean_epochs`). Else past all.
        gathers: whether the loss of training is that of the pairs of all processes.
        accepts_loss_kwargs: no. The Trainer divides the loss by the batches that it accumulates: a batch's negatives
            are its own.
    """

    accepts_loss_kwargs = False

    def __init__(self, backbone: nn.Module, settings: Settings) -> None:
        assert isinstance(settings.head, Retrieve)
        super().__init__(backbone, settings, settings.head)
        self.epoch, self.gathers = math.inf, False
        scale = self.backbone.logit_scale.detach().float().clone()
        self.logit_scale = nn.Parameter(scale) if self.head.loss == "contrastive" else None
        self.train(self._before.training)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_index: Tensor | None = None,
        labels: Tensor | None = None,
        frame_mask: Tensor | None = None,
    ) -> RetrievalOutput:
        """Embeddings of images or videos, of texts, or of both, and with labels the loss of the pairs.

        Args:
            pixel_values: (images, channels, rows, columns), or of videos (videos, frames, channels, rows, columns).
            input_ids, attention_mask, token_type_ids, position_ids: (texts, tokens), as the text tower takes them.
            image_index: (texts,) the number of each text's image in `pixel_values`. None: they stand in pairs.
            labels: (texts,) which image it is. Texts of the same image are no negatives of each other.
            frame_mask: (videos, frames) bool, False where a video has no more frames. None: all have as many.

        Raises:
            ValueError: if there are labels without images and texts in pairs.
        """
        text = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        images, texts = self.embeddings(pixel_values, text, image_index, frame_mask)
        loss = None if labels is None else self._loss(images, texts, labels)
        return RetrievalOutput(loss=loss, image_embeds=images, text_embeds=texts)

    def _loss(self, images: Tensor | None, texts: Tensor | None, labels: Tensor) -> Tensor:
        if images is None or texts is None or not len(images) == len(texts) == len(labels):
            counts = ", ".join(
                f"{0 if part is None else len(part)} {name}"
                for name, part in (("images", images), ("texts", texts), ("labels", labels))
            )
            raise ValueError(f"a loss needs pairs, but there are {counts}: give image_index where an image has several")
        if self.gathers and self.training:
            images, texts, labels = (ranks.gathered(part) for part in (images, texts, labels))
        same = labels[:, None] == labels
        with torch.autocast(images.device.type, enabled=False):
            cosines = images @ texts.T
            if self.logit_scale is None:
                return self._triplet_loss(cosines, same)
            if self.training:
                with torch.no_grad():
                    self.logit_scale.clamp_(0, LARGEST_SCALE)
            return contrastive_loss(cosines * self.logit_scale.exp(), same)

    def _triplet_loss(self, cosines: Tensor, same: Tensor) -> Tensor:
        """In training the loss of the present epoch. It is over all violations first, then rising, of the hardest."""
        head, epoch = self.head, self.epoch if self.training else math.inf
        if epoch < head.mean_epochs:
            return triplet_loss(cosines, same, head.margin, hardest=False)
        rise = min(1.0, epoch - head.mean_epochs) if head.mean_epochs else 1.0
        return rise * triplet_loss(cosines, same, head.margin, hardest=head.hardest)

    @property
    def head(self) -> Retrieve:
        """The config of the heads."""
        assert isinstance(self.settings.head, Retrieve)
        return self.settings.head

    @property
    def head_config(self) -> dict[str, Any]:
        """The head's config as JSON-ready values, with read-outs and width as they were resolved."""
        width = self.image.head.config.outputs if self.image.head is not None else None
        return {**self.head.to_dict(), "pool": self.image.pool, "text_pool": self.text.pool, "dim": width}

    def own_tensors(self) -> dict[str, nn.Parameter]:
        """The temperature, if there is one."""
        return {} if self.logit_scale is None else {"logit_scale": self.logit_scale}
