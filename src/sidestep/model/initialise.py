"""Starting weights that depend on training data, by how much each backbone weight matters to the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor

from sidestep.interface.offload import is_offloaded
from sidestep.interface.pruning import Scores
from sidestep.interface.sparse_delta import SparseDelta
from sidestep.model.side_model import SideModel

SAMPLES = 1024  # the release's


def initialise(model: SideModel, batches: Iterable[Mapping[str, Tensor]], *, samples: int | None = None) -> int:
    """Start a method from its backbone by the Fisher information of each weight.

    LSTConfig(init="fisher") takes from it which channels its side network begins with. SparseConfig(select="fisher")
    takes which weights are trained. The information is the squared gradient of the loss (LST: of the backbone's own),
    summed over batches. With batches of one row it is the empirical Fisher information. Larger batches are faster and
    average before they square.

    Args:
        model: attached with such a method.
        batches: of what its forward takes, with labels.
        samples: the most batches that are looked at. None: as many as the method's config says, or 1024.

    Returns:
        How many batches were looked at.

    Raises:
        ValueError: if the method's start takes no rows, there are none, or the model is a pair.
    """
    if not any(samples_of(part) for part in model.parts):
        raise ValueError(
            f"{model.record.name} as configured starts without data: there is nothing to initialise "
            '(LSTConfig(init="fisher") and SparseConfig(select="fisher") ask for it)'
        )
    if len(model.parts) > 1:
        raise ValueError(
            f"{model.record.name} as configured would start by one backbone's loss, and this is a pair: choose a start "
            'without data (select="random" or "grow")'
        )
    batches = islice(batches, samples_of(model) if samples is None else samples)
    if model.sparse is not None:
        return _choose_support(model, batches)
    sites = [place.site for place in model.places]
    scores, seen = _fisher(model, batches)
    if not seen:
        raise ValueError("there are no rows to initialise from: give at least one batch")
    model.side.initialise(sites, lambda weight: scores[weight])
    return seen


def samples_of(model: SideModel) -> int:
    """How many training rows the method's start looks at. 0: it looks at none."""
    if isinstance(model.delta, SparseDelta):
        return model.delta.samples
    return SAMPLES if model.side.from_data else 0


def _choose_support(model: SideModel, batches: Iterable[Mapping[str, Tensor]]) -> int:
    """Place a sparse diff by the sums of squared gradients of all weights. Returns the number of batches."""
    diff, delta = model.sparse, model.delta
    assert diff is not None
    assert isinstance(delta, SparseDelta)
    squares = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in diff.tensors.items()}

    def add(name: str, gradient: Tensor) -> None:
        gradient = gradient.float()
        squares[name].addcmul_(gradient, gradient)

    training, seen = model.training, 0
    model.eval()
    diff.watch(add)
    try:
        with torch.enable_grad():
            for batch in batches:
                inputs = {name: value.to(model.device) for name, value in batch.items()}
                model(**inputs).loss.backward()
                model.zero_grad()
                seen += 1
    finally:
        diff.watch(None)
        model.train(training)
    if not seen:
        raise ValueError("there are no rows to initialise from: give at least one batch")
    delta.choose(diff, squares)
    return seen


def _fisher(model: SideModel, batches: Iterable[Mapping[str, Tensor]]) -> tuple[dict[Tensor, Scores], int]:
    """Sums of squared gradients by row and by column of each weight in a block, and the number of batches."""
    if is_offloaded(model.backbone):
        raise ValueError(
            f"{model.record.name} as configured starts by gradients of the backbone's weights, which are offloaded: "
            'choose init="magnitude" or "random", or leave the weights in memory'
        )
    weights = [p for place in model.places if place.site.kind == "block" for p in place.module.parameters()]
    flags = {weight: weight.requires_grad for weight in weights}
    scores: dict[Tensor, Scores] = {}

    def add(weight: Tensor) -> None:
        """Take a gradient as soon as it is there, so that those of all weights are never held at once."""
        assert weight.grad is not None
        new, old = Scores.of(weight.grad.float().square()), scores.get(weight)
        scores[weight] = new if old is None else Scores(old.rows + new.rows, old.columns + new.columns)
        weight.grad = None

    training, seen = model.training, 0
    model.eval()
    handles = [weight.requires_grad_().register_post_accumulate_grad_hook(add) for weight in weights]
    try:
        with torch.enable_grad():
            for batch in batches:
                inputs = {name: value.to(model.device) for name, value in batch.items()}
                # the bare backbone: hooks do nothing unless their fold runs
                model.backbone(**inputs).loss.backward()
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
        for weight, flag in flags.items():
            weight.requires_grad_(flag)
        model.train(training)
    return scores, seen
