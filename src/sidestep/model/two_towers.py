"""TwoTowers: a dual encoder of images and texts with a method on each tower, whatever is made of the two vectors.

Both towers are ordinary `SideModel`s whose head gives an embedding. So sites, folds, checkpoints, digests and `detach`
are those of one backbone. What is learned of two embeddings is a subclass: `PairModel` compares them, and `JointModel`
answers questions by them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from sidestep.backbone import Digest, default_pool, freeze, joined, new_parameters
from sidestep.backbone.families import DUAL_FAMILIES, Pool, dual_family_of
from sidestep.backbone.frames import VIDEO_AXES
from sidestep.interface.registry import Method
from sidestep.methods import UnsupportedBackbone, method_of
from sidestep.model import saving
from sidestep.model.attached import AttachedModel
from sidestep.model.before import Before
from sidestep.model.frames import embed_videos
from sidestep.model.heads import Retrieve
from sidestep.model.settings import Settings
from sidestep.model.side_model import SideModel

PROJECTIONS = {"image": "visual_projection", "text": "text_projection"}


class TwoTowers(AttachedModel):
    """A dual encoder with a method and an embedding head on each tower.

    `state_dict()` is the task alone, as of a `SideModel`: its names begin with "image." and "text.". What a subclass
    learns besides has names of its own.

    Attributes:
        image, text: the towers, attached.
        backbone: the dual encoder as given (no submodule: the towers hold what is used of it).
        settings, record, extras: as of a `SideModel`.
    """

    main_input_name = "pixel_values"

    def __init__(self, backbone: nn.Module, settings: Settings, embedding: Retrieve) -> None:
        super().__init__()
        if dual_family_of(backbone) is None:
            raise ValueError(
                f"head=ss.Retrieve(...) needs a dual encoder of images and texts ({', '.join(DUAL_FAMILIES)}), but "
                f"{type(backbone).__name__} is none: two encoders make a VisionTextDualEncoderModel"
            )
        self.settings, self.extras = settings, dict[str, Any]()
        self.record: Method = method_of(settings.method)
        object.__setattr__(self, "backbone", backbone)
        self._before = Before.of(backbone)
        new = new_parameters(backbone)
        towers: list[SideModel] = []
        try:
            for name, trunk in (("image", self.backbone.vision_model), ("text", self.backbone.text_model)):
                towers.append(self._tower(name, trunk, new, embedding))
            for name in PROJECTIONS.values():
                freeze(backbone.get_submodule(name))
        except BaseException:
            for tower in towers:
                tower.detach_backbone()
            self._before.restore(backbone)
            raise
        self.image, self.text = towers
        self.backbone.logit_scale.requires_grad_(False)
        self.config = self.backbone.config

    def _tower(self, name: str, trunk: nn.Module, new: set[str], embedding: Retrieve) -> SideModel:
        """The method and the embedding head on one tower. The head starts as the model's own projection if it can."""
        own: nn.Linear = getattr(self.backbone, PROJECTIONS[name])
        loaded = f"{PROJECTIONS[name]}.weight" not in new
        pool, width = self._pool(name, trunk, embedding, loaded=loaded), embedding.dim or own.out_features
        head = replace(embedding, pool=pool, text_pool=None, dim=width)
        try:
            tower = SideModel(trunk, replace(self.settings, head=head))
        except UnsupportedBackbone as error:
            raise UnsupportedBackbone(f"the {name} tower of {type(self.backbone).__name__}: {error}") from error
        assert tower.head is not None
        if loaded and own.weight.shape == tower.head.linear.weight.shape:
            with torch.no_grad():
                tower.head.linear.weight.copy_(own.weight)
        return tower

    def _pool(self, name: str, trunk: nn.Module, embedding: Retrieve, *, loaded: bool) -> Pool:
        asked = (embedding.text_pool if name == "text" else None) or embedding.pool
        family = dual_family_of(self.backbone)
        assert family is not None
        own = family.image_pool if name == "image" else family.text_pool
        return asked or (own if loaded else default_pool(trunk))

    # --- running ---------------------------------------------------------------------------------------------------

    def embeddings(
        self,
        pixel_values: Tensor | None,
        text: Mapping[str, Tensor | None],
        image_index: Tensor | None = None,
        frame_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Embeddings of images or videos and of texts, of length one. None for what is not given.

        Args:
            pixel_values: (images, channels, rows, columns), or of videos (videos, frames, channels, rows, columns).
            text: what the text tower takes, by name.
            image_index: (texts,) the number of each text's image. None: they stand in pairs.
            frame_mask: (videos, frames) bool, False where a video has no more frames. None: all have as many.
        """
        given = {name: value for name, value in text.items() if value is not None}
        images = None if pixel_values is None else self._embed(pixel_values, frame_mask)
        texts = None if "input_ids" not in given else self.text(**given).logits
        if image_index is not None and images is not None:
            images = images[image_index]
        return images, texts

    def _embed(self, pixels: Tensor, frame_mask: Tensor | None) -> Tensor:
        """The embeddings of images or videos."""

        def embed(images: Tensor) -> Tensor:
            embeds: Tensor = self.image(pixel_values=images).logits
            return embeds

        return embed_videos(embed, pixels, frame_mask) if pixels.ndim > VIDEO_AXES else embed(pixels)

    # --- what it holds: as of a `SideModel` ------------------------------------------------------------------------

    @abstractmethod
    def own_tensors(self) -> dict[str, nn.Parameter]:
        """What is trained besides the towers, by name."""

    @property
    def parts(self) -> tuple[SideModel, ...]:
        """The image tower and the text tower."""
        return (self.image, self.text)

    @property
    def towers(self) -> dict[str, SideModel]:
        """The parts by name."""
        return {"image": self.image, "text": self.text}

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
        yield from self.own_tensors().items()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Recompute the blocks that a gradient flows through (`checkpoint="late"`)."""
        for tower in self.parts:
            tower.gradient_checkpointing_enable()

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The task alone."""
        destination = OrderedDict() if destination is None else destination
        for name, tower in self.towers.items():
            tower.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
        for name, tensor in self.own_tensors().items():
            destination[f"{prefix}{name}"] = tensor if keep_vars else tensor.detach()
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
        own_tensors = self.own_tensors()
        if rest != set(own_tensors):
            raise ValueError(f"these weights are of another task: besides the towers' they have {sorted(rest)}")
        with torch.no_grad():
            for name, tensor in own_tensors.items():
                tensor.copy_(state_dict[name])
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
