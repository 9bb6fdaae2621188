"""What a store is to hold of a batch for a model, and how it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sidestep.backbone.shards import is_sharded
from sidestep.fold import Look, Recorder, Route
from sidestep.model.outputs import gives_spans
from sidestep.model.two_towers import TwoTowers

if TYPE_CHECKING:
    from sidestep.model.attach import Attached
    from sidestep.model.side_model import SideModel

VECTOR = "head"
"""The place of the vector that a head reads, or of those of all tokens."""


class FeaturesRefused(ValueError):
    """The frozen part of a model cannot be stored, and the message says why."""


@dataclass(frozen=True)
class Recorded:
    """What was computed of a batch.

    Attributes:
        states: by place the hidden state (batch, tokens, width), with which of its tokens are real (None: all).
    """

    states: Mapping[str, tuple[Tensor, Tensor | None]]

    def rows(self, place: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """(tokens, width) of each row, without padding, on the CPU.

        Args:
            place: whose state it is.
            dtype: to round to. None: as the block gave it.

        Raises:
            FeaturesRefused: if padding stands between tokens.
        """
        hidden, keep = self.states[place]
        # the batch at once: row by row a GPU would be waited for as often
        hidden = hidden.to("cpu", dtype or hidden.dtype)
        if keep is None:
            return list(hidden.unbind())
        keep = keep.cpu()
        edges = torch.diff(keep.int(), dim=1, prepend=keep.new_zeros(keep.shape[0], 1).int()) == 1
        if bool((edges.sum(1) > 1).any()):
            raise FeaturesRefused("its texts have padding between tokens")
        return [row[kept] for row, kept in zip(hidden, keep, strict=True)]


def check_storable(model: Attached) -> SideModel:
    """The model, if what its method reads can be stored.

    Raises:
        FeaturesRefused: saying why not.
    """
    if isinstance(model, TwoTowers):
        raise FeaturesRefused("a dual encoder's task is on two backbones at once, whose states are not stored yet")
    if is_sharded(model):
        raise FeaturesRefused("its blocks are sharded, so no process can run them without the others")
    if model.sparse is not None or (model.delta is not None and not model.delta.late):
        raise FeaturesRefused(
            f"{model.record.name} changes the backbone's weights, so its states change with each step"
        )
    if model.facts.head.after is not None and model.head is not None:
        raise FeaturesRefused("its head reads what the model makes of its last block")
    if model.settings.backbone_noise is not None:
        raise FeaturesRefused(
            f"backbone_noise={model.settings.backbone_noise!r}: the states are other ones in each epoch"
        )
    if model.head is None and gives_spans(model.backbone):
        raise FeaturesRefused(
            f"the own head of {type(model.backbone).__name__} reads padding as a part of each text, and padding is not "
            "stored. Sidestep's head (ss.Span, without --own-head) leaves it out"
        )
    return model


def find_route(model: SideModel, batch: Mapping[str, Any], *, unread: bool = False) -> Route:
    """The route of a model, by one live pass that is looked at.

    Images are not read any more once their states are stored, nor (if `unread`) are other inputs.
    """
    fold, elements = model.fold, {name: stack.element for name, stack in model.facts.stacks.items()}
    look, recorder = Look(fold.places, fold.keeping.border, elements), Recorder()
    if look.late and look.shares:
        raise FeaturesRefused("its blocks share their weights, so early ones cannot be left out")
    with look.watching():
        _run(model, recorder, batch)
    if _reads_vector(model):
        with _evaluating(model):
            vector, _ = model.vector(dict(batch))
        return Route(places=(VECTOR,), over={}, dtypes={VECTOR: vector.dtype}, single=vector.ndim == 2)
    return look.route(
        recorder, single=fold.narrow is not None, unread=unread or model.main_input_name == "pixel_values"
    )


def record(model: SideModel, route: Route, batch: Mapping[str, Any]) -> Recorded:
    """The states of a batch. The pass ends with the last of them."""
    if route.places == (VECTOR,):
        with _evaluating(model):
            return _of_vector(*model.vector(dict(batch)))
    recorder = Recorder(route)
    _run(model, recorder, batch)
    return Recorded({name: recorder.taken[name] for name in route.places})


def _reads_vector(model: SideModel) -> bool:
    """Whether nothing is learned but the map of a vector that a Sidestep head reads."""
    learns = any(True for _ in model.side.parameters())
    return model.head is not None and not learns and not model.side.corrects and model.fold.keeping.border is None


def _of_vector(vector: Tensor, keep: Tensor | None) -> Recorded:
    return Recorded({VECTOR: (vector[:, None], None) if vector.ndim == 2 else (vector, keep)})


def _run(model: SideModel, recorder: Recorder, batch: Mapping[str, Any]) -> None:
    with _evaluating(model):
        model.take(recorder, dict(batch))


@contextmanager
def _evaluating(model: SideModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
