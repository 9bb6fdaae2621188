"""What is common to attached models, of one backbone or of two towers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sidestep.backbone import Digest
from sidestep.interface.registry import Method
from sidestep.model.settings import Settings
from sidestep.sparse.diff import SparseDiff


class AttachedModel(nn.Module, ABC):
    """A backbone with a task on it.

    Attributes:
        backbone: as given.
        settings: what was attached.
        record: the method as it is registered.
        extras: what is stored with the task besides (tokenizer or processor, preprocessing, scores).
        sparse: the sparse diff that is trained in the place of weights, or None. A pair has one in each tower.
        attached_shapes: shapes of the embedding tables at `attach`, by their names. A pair has them in each tower.
    """

    backbone: Any
    settings: Settings
    record: Method
    extras: dict[str, Any]
    sparse: SparseDiff | None
    attached_shapes: dict[str, tuple[int, ...]]

    @property
    @abstractmethod
    def trunk(self) -> Any:
        """The backbone without its own head."""

    @property
    @abstractmethod
    def towers(self) -> Mapping[str, AttachedModel]:
        """The attached backbones by name. The backbone of a `SideModel` has the name ""."""

    @property
    @abstractmethod
    def head_config(self) -> dict[str, Any] | None:
        """The head's config as JSON-ready values, with its read-out as it was resolved. None for the backbone's own."""

    @property
    @abstractmethod
    def precisions(self) -> str:
        """The precisions of the backbone's weights without the task's, joined by "+"."""

    @property
    @abstractmethod
    def digest(self) -> Digest:
        """The digest of the backbone's pretrained weights, as they were at `attach`."""

    @property
    @abstractmethod
    def head_digest(self) -> Digest | None:
        """The digest of what the task needs of the backbone besides: its own frozen head or loaded pooler."""

    @abstractmethod
    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained."""

    @abstractmethod
    def detach_backbone(self) -> nn.Module:
        """See `detach`."""
