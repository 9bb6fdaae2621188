"""PairModel: a dual encoder of images and texts with a method on each tower.

Both towers are ordinary `SideModel`s whose head gives an embedding. So sites, folds, checkpoints, digests and `detach`
are those of one backbone. This module has what belongs to both towers: the temperature and the losses.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers.utils import ModelOutput

from sidestep.backbone import (
    Digest,
    default_pool,
    freeze,
    joined,
    new_parameters,
)
from sidestep.backbone.families import DUAL_FAMILIES, Pool, dual_family_of
from sidestep.backbone.frames import VIDEO_AXES
from sidestep.interface.registry import Method
from sidestep.methods import UnsupportedBackbone, method_of
from sidestep.model import saving
from sidestep.model.attached import AttachedModel
from sidestep.model.before import Before
from sidestep.model.frames import embed_videos
from sidestep.model.heads import Retrieve
from sidestep.model.losses import LARGEST_SCALE, contrastive_loss, triplet_loss
from sidestep.model.settings import Settings
from sidestep.model.side_model import SideModel

PROJECTIONS = {"image": "visual_projection", "text": "text_projection"}


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


class PairModel(AttachedModel):
    """A dual encoder with a method and an embedding head on each tower. Make one with `attach` or `load`.

    `state_dict()` is the task alone, as of a `SideModel`: its names begin with "image." and "text.", and "logit_scale"
    is the trained temperature.

    Attributes:
        image, text: the towers, attached.
        logit_scale: logarithm of what cosines are multiplied by. None with the triplet loss.
        epoch: how far training is, in epochs, for a loss that depends on it (`Retrieve.mean_epochs`). Else past all.
        backbone: the dual encoder as given (no submodule: the towers hold what is used of it).
        settings, record, extras: as of a `SideModel`.
    """

    main_input_name = "pixel_values"
    accepts_loss_kwargs = False
    """The Trainer divides the loss by the batches that it accumulates: a batch's negatives are its own."""

    def __init__(self, backbone: nn.Module, settings: Settings) -> None:
        super().__init__()
        if dual_family_of(backbone) is None:
            raise ValueError(
                f"head=ss.Retrieve(...) needs a dual encoder of images and texts ({', '.join(DUAL_FAMILIES)}), but "
                f"{type(backbone).__name__} is none: two encoders make a VisionTextDualEncoderModel"
            )
        self.settings, self.extras, self.epoch = settings, dict[str, Any](), math.inf
        self.record: Method = method_of(settings.method)
        object.__setattr__(self, "backbone", backbone)
        self._before = Before.of(backbone)
        new = new_parameters(backbone)
        towers: list[SideModel] = []
        try:
            for name, trunk in (("image", self.backbone.vision_model), ("text", self.backbone.text_model)):
                towers.append(self._tower(name, trunk, new))
            for name in PROJECTIONS.values():
                freeze(backbone.get_submodule(name))
        except BaseException:
            for tower in towers:
                tower.detach_backbone()
            self._before.restore(backbone)
            raise
        self.image, self.text = towers
        self.backbone.logit_scale.requires_grad_(False)
        scale = self.backbone.logit_scale.detach().float().clone()
        self.logit_scale = nn.Parameter(scale) if self.head.loss == "contrastive" else None
        self.config = self.backbone.config
        self.train(self._before.training)

    def _tower(self, name: str, trunk: nn.Module, new: set[str]) -> SideModel:
        """The method and the embedding head on one tower. The head starts as the model's own projection if it can."""
        own: nn.Linear = getattr(self.backbone, PROJECTIONS[name])
        loaded = f"{PROJECTIONS[name]}.weight" not in new
        pool, width = self._pool(name, trunk, loaded), self.head.dim or own.out_features
        head = replace(self.head, pool=pool, text_pool=None, dim=width)
        try:
            tower = SideModel(trunk, replace(self.settings, head=head))
        except UnsupportedBackbone as error:
            raise UnsupportedBackbone(f"the {name} tower of {type(self.backbone).__name__}: {error}") from error
        assert tower.head is not None
        if loaded and own.weight.shape == tower.head.linear.weight.shape:
            with torch.no_grad():
                tower.head.linear.weight.copy_(own.weight)
        return tower

    def _pool(self, name: str, trunk: nn.Module, loaded: bool) -> Pool:
        asked = (self.head.text_pool if name == "text" else None) or self.head.pool
        family = dual_family_of(self.backbone)
        assert family is not None
        own = family.image_pool if name == "image" else family.text_pool
        return asked or (own if loaded else default_pool(trunk))

    # --- running ---------------------------------------------------------------------------------------------------

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
        given = {name: value for name, value in text.items() if value is not None}
        images = None if pixel_values is None else self._embed(pixel_values, frame_mask)
        texts = None if input_ids is None else self.text(**given).logits
        if image_index is not None and images is not None:
            images = images[image_index]
        loss = None if labels is None else self._loss(images, texts, labels)
        return RetrievalOutput(loss=loss, image_embeds=images, text_embeds=texts)

    def _embed(self, pixels: Tensor, frame_mask: Tensor | None) -> Tensor:
        """The embeddings of images or videos."""

        def embed(images: Tensor) -> Tensor:
            embeds: Tensor = self.image(pixel_values=images).logits
            return embeds

        return embed_videos(embed, pixels, frame_mask) if pixels.ndim > VIDEO_AXES else embed(pixels)

    def _loss(self, images: Tensor | None, texts: Tensor | None, labels: Tensor) -> Tensor:
        if images is None or texts is None or not len(images) == len(texts) == len(labels):
            counts = ", ".join(
                f"{0 if part is None else len(part)} {name}"
                for name, part in (("images", images), ("texts", texts), ("labels", labels))
            )
            raise ValueError(f"a loss needs pairs, but there are {counts}: give image_index where an image has several")
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

    # --- what it holds: as of a `SideModel` ------------------------------------------------------------------------

    @property
    def head(self) -> Retrieve:
        """The config of the heads."""
        assert isinstance(self.settings.head, Retrieve)
        return self.settings.head

    @property
    def parts(self) -> tuple[SideModel, ...]:
        """The image tower and the text tower."""
        return (self.image, self.text)

    @property
    def towers(self) -> dict[str, SideModel]:
        """The parts by name."""
        return {"image": self.image, "text": self.text}

    @property
    def head_config(self) -> dict[str, Any]:
        """The head's config as JSON-ready values, with read-outs and width as they were resolved."""
        width = self.image.head.config.outputs if self.image.head is not None else None
        return {**self.head.to_dict(), "pool": self.image.pool, "text_pool": self.text.pool, "dim": width}

    @property
    def trunk(self) -> Any:
        """The dual encoder."""
        return self.backbone

    @property
    def device(self) -> torch.device:
        """Where the towers are."""
        return self.image.device

    @property
    def dtype(self) -> torch.dtype:
        """The image tower's precision."""
        return self.image.dtype

    @property
    def precisions(self) -> str:
        """The precisions of the towers' weights, joined by "+"."""
        return "+".join(sorted({name for tower in self.parts for name in tower.precisions.split("+")}))

    @property
    def digest(self) -> Digest:
        """One digest of both towers' pretrained weights."""
        return joined([tower.digest for tower in self.parts])

    @property
    def head_digest(self) -> Digest | None:
        """The digest of the poolers that the task uses as they were loaded."""
        found = [digest for tower in self.parts if (digest := tower.head_digest) is not None]
        return joined(found) if found else None

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained."""
        for name, tower in self.towers.items():
            yield from ((f"{name}.{own}", parameter) for own, parameter in tower.trained_parameters())
        if self.logit_scale is not None:
            yield "logit_scale", self.logit_scale

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Recompute the blocks that a gradient flows through (`checkpoint="late"`)."""
        for tower in self.parts:
            tower.gradient_checkpointing_enable()

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The task alone."""
        destination = OrderedDict() if destination is None else destination
        for name, tower in self.towers.items():
            tower.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
        if self.logit_scale is not None:
            destination[f"{prefix}logit_scale"] = self.logit_scale if keep_vars else self.logit_scale.detach()
        return destination

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load a task's tensors. It is always strict, but over the task's names only.

        Raises:
            ValueError: if names are missing or unexpected, or a shape differs.
        """
        rest = set(state_dict)
        for name, tower in self.towers.items():
            own = [key for key in state_dict if key.startswith(f"{name}.")]
            tower.load_state_dict({key.removeprefix(f"{name}."): state_dict[key] for key in own})
            rest -= set(own)
        if rest != ({"logit_scale"} if self.logit_scale is not None else set()):
            raise ValueError(f"these weights are of another task: besides the towers' they have {sorted(rest)}")
        if self.logit_scale is not None:
            with torch.no_grad():
                self.logit_scale.copy_(state_dict["logit_scale"])
        return _IncompatibleKeys([], [])

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the task folder (see `sidestep.disk.task_folder`)."""
        saving.save(self, folder, **kwargs)

    def detach_backbone(self) -> nn.Module:
        """See `detach`."""
        if not self.image.fold.attached:
            return self.backbone
        with self.image.fold.turn, self.text.fold.turn:  # both or none
            for tower in self.parts:
                tower.attachment.leave()
        self._before.restore(self.backbone)
        return self.backbone.to(self.device)

    def _replicate_for_data_parallel(self) -> Any:
        return self.image._replicate_for_data_parallel()
