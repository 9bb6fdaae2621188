"""A sparse diff of the backbone's weights on a support that is chosen before training, or moved while it runs.

The trained state is as large as the diff. Forward and backward use the dense weights, into which the diff is written.
Sources: "fisher" is the FISH mask, Sung, Nair, Raffel, "Training Neural Networks with Fixed Sparse Masks", NeurIPS
2021; "magnitude" is LT-SFT, Ansell et al., "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022; "grow"
follows SpIEL, Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", 2024.

Differs: "grow" looks for new entries in the gradients of one optimizer step, all weights at once. SpIEL sums several
steps, and has a fixed number of entries for each matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sidestep.interface.registry import register
from sidestep.interface.sparse_delta import SparseDelta, SparseDeltaConfig
from sidestep.sparse.diff import SparseDiff
from sidestep.sparse.selection import CHUNK, largest, sweep_over

Select = Literal["fisher", "magnitude", "random", "grow"]


@dataclass(frozen=True, kw_only=True)
class SparseConfig(SparseDeltaConfig):
    """A sparse diff with memory for its nonzeros alone.

    Attributes:
        select: how the support is chosen. "fisher": where the squared gradient of the loss is largest, the mean over
            training rows before training. "magnitude": where all weights, trained at first, changed most. "random": at
            random. "grow": at random first, and then moved. A move gives up the entries that changed least for those
            with the largest gradient.
        seed: of a random support.
        samples: "fisher": the most training rows that are looked at.
        full_epochs: "magnitude": of the first stage, which trains all weights. Epochs and rate of training are those of
            the second stage, which trains the diff.
        full_rate: "magnitude": learning rate of the first stage.
        rewind: "magnitude": whether the second stage begins where the first did, head included (LT-SFT). Otherwise it
            goes on from the changes that were kept (non-adaptive diff pruning).
        grow_every: "grow": optimizer steps from one move to the next.
        grow_share: "grow": share of the entries that the first move gives up. It falls linearly to 0 at the last step.
    """

    select: Select = "fisher"
    seed: int = 0
    samples: int = 1024
    full_epochs: int = 3
    full_rate: float = 6e-5
    rewind: bool = True
    grow_every: int = 20
    grow_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("seed", self.seed >= 0, "a whole number of at least 0")
        self.require("full_rate", self.full_rate > 0, "a number above 0")
        for name in ("samples", "full_epochs", "grow_every"):
            self.require(name, getattr(self, name) >= 1, "a whole number of at least 1")
        self.require("grow_share", 0 < self.grow_share < 1, "a number above 0 and below 1")


@register("sparse", SparseConfig)
class Sparse(SparseDelta):
    """Sparse tuning: trains a small share of the backbone's weights, chosen before training or while it runs."""

    def __init__(self, config: SparseConfig) -> None:
        super().__init__(config)
        self.samples = config.samples if config.select == "fisher" else 0
        self._candidates: Candidates | None = None
        self._told = False

    def diff(self, tensors: Mapping[str, nn.Parameter]) -> SparseDiff | None:
        """The diff, with its positions where no data are needed to choose them."""
        diff = super().diff(tensors)
        if diff is not None and self.config.select in ("random", "grow"):
            try:
                diff.place_at_random(self.config.seed)
            except BaseException:  # out of memory: nobody else knows of the diff yet
                diff.revert()
                diff.unhook()
                raise
        return diff

    @property
    def wanders(self) -> bool:
        """Only where entries are given up for others."""
        return self.config.select == "grow"

    @property
    def relaxes(self) -> bool:
        """Only where the support is that of the largest changes."""
        return self.config.select == "magnitude"

    def stages(self, epochs: int, rate: float) -> tuple[tuple[int, float], tuple[int, float]]:
        """The settings' are the second stage's."""
        return (self.config.full_epochs, self.config.full_rate), (epochs, rate)

    def relax(
        self,
        diff: SparseDiff,
        dense: Iterable[nn.Parameter],
        *,
        rate: float,
        weight_decay: float,
        max_norm: float,
        seed: int,
    ) -> FreeWeights:
        """AdamW on all weights."""
        diff.unhook()
        return FreeWeights(diff.tensors, list(dense), rate, weight_decay, max_norm)

    def project(self, optimizer: FreeWeights, diff: SparseDiff) -> dict[str, Any]:
        """Place the diff where the weights changed most.

        The diff has those changes, or zeros if the config says `rewind`.
        """
        found = {name: kept for name, kept in largest(optimizer.diffs, len(diff.values)).items() if len(kept[0])}
        optimizer.restore(head=self.config.rewind)
        diff.place({name: kept[0] if self.config.rewind else kept for name, kept in found.items()})
        return {"nonzeros": len(diff.values), "tensors": len(found), "all_tensors": len(diff.tensors)}

    def choose(self, diff: SparseDiff, squares: Mapping[str, Tensor]) -> None:
        """Place the diff where the squared gradient is largest."""
        found = largest(sweep_over(squares), len(diff.values))
        diff.place({name: positions for name, (positions, _) in found.items()})

    def before_step(self, diff: SparseDiff, step: int, steps: int) -> None:
        """Look out for new entries in the step that a move follows."""
        self._told = True
        count = self._moved(diff, step, steps)
        if count:
            self._candidates = Candidates(diff, count)
            diff.watch(self._candidates.see)

    def after_step(self, diff: SparseDiff, optimizer: Any) -> None:
        """Give up the entries that changed least for those that were found.

        The averages of all other entries move with them.
        """
        found, self._candidates, self._told = self._candidates, None, False
        if found is None:
            return
        diff.watch(None)
        grown = found.best()
        dropped = diff.values.detach().abs().topk(len(grown), largest=False).indices
        keep = torch.ones_like(diff.positions, dtype=torch.bool)
        keep[dropped] = False
        positions, order = torch.cat([diff.positions[keep], grown]).sort()

        def moved(entries: Tensor) -> Tensor:
            return torch.cat([entries[keep], entries.new_zeros(len(grown))])[order]

        for name, average in optimizer.state[diff.values].items():
            if isinstance(average, Tensor) and average.shape == diff.values.shape:
                optimizer.state[diff.values][name] = moved(average)
        diff.place_flat(positions, moved(diff.values.detach()))

    def check_told(self, diff: SparseDiff) -> None:
        """Raise if "grow" has learned already but nobody has told it of this step.

        Raises:
            ValueError: saying how it is told.
        """
        if self.config.select != "grow" or self._told or not diff.values.detach().any():
            return
        raise ValueError(
            'select="grow" moves its entries between the steps of training, and nothing tells it of them, so they '
            "would stay. Give the Trainer callbacks=[sidestep.training.callbacks.MoveSupport([model])], or train with "
            '`sidestep train`. For entries that are to stay, choose select="random"'
        )

    def _moved(self, diff: SparseDiff, step: int, steps: int) -> int:
        """How many entries move after optimizer step `step` of `steps`."""
        if self.config.select != "grow" or step % self.config.grow_every:
            return 0
        return int(self.config.grow_share * (1 - step / steps) * len(diff.values))


class FreeWeights(torch.optim.AdamW):
    """AdamW on whole weights, which can put them back.

    Its checkpoints hold the pretrained weights, because a sparse task's do not.
    """

    state: Any  # under "before" also the weights' first values

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        head: list[nn.Parameter],
        rate: float,
        weight_decay: float,
        max_norm: float,
    ) -> None:
        super().__init__([*weights.values(), *head], lr=rate, weight_decay=weight_decay)
        self._weights, self._head, self._max_norm = dict(weights), head, max_norm
        self._before = {p: p.detach().clone() for p in (*self._weights.values(), *head)}
        self.state["before"] = self._before  # counts so as what the optimizer keeps

    def step(self, closure: Any = None) -> Any:
        """A step, after the gradients' common norm was cut."""
        if self._max_norm:
            nn.utils.clip_grad_norm_(list(self._before), self._max_norm)
        return super().step(closure)

    @torch.no_grad()
    def restore(self, *, head: bool = False) -> None:
        """Give the weights the values back that they had at first, and the head too if asked."""
        for parameter in (*self._weights.values(), *(self._head if head else ())):
            parameter.copy_(self._before[parameter])

    def diffs(self) -> Iterator[tuple[str, int, Tensor]]:
        """How the weights changed: name, where a chunk begins, and its entries."""
        for name, weight in self._weights.items():
            new, old = (tensor.detach().reshape(-1).split(CHUNK) for tensor in (weight, self._before[weight]))
            for number, (after, before) in enumerate(zip(new, old, strict=True)):
                yield name, number * CHUNK, after.float() - before.float()

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, the weights instead of what they were at first, and the head's first values."""
        saved = super().state_dict()
        saved["state"] = {index: kept for index, kept in saved["state"].items() if index != "before"}
        weights = {name: weight.detach() for name, weight in self._weights.items()}
        return {**saved, "weights": weights, "head": [self._before[parameter] for parameter in self._head]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse."""
        for name, value in state_dict["weights"].items():
            self._weights[name].copy_(value)
        for parameter, value in zip(self._head, state_dict["head"], strict=True):
            self._before[parameter].copy_(value)
        own = {name: value for name, value in state_dict.items() if name not in ("weights", "head")}
        super().load_state_dict(own)
        self.state["before"] = self._before


class Candidates:
    """Entries without a diff where the gradients of an optimizer step are largest.

    The first batch of the step proposes twice as many as are wanted, over all tensors. On these the gradients of the
    step's other batches are added. So no more than a tensor's gradient is held at a time.
    """

    def __init__(self, diff: SparseDiff, count: int) -> None:
        self.count, self._starts, self._support = count, diff.starts, diff.support()
        self._seen: set[str] = set()
        self._positions = diff.positions.new_zeros(0)
        self._sums = diff.values.detach().new_zeros(0)

    def see(self, name: str, gradient: Tensor) -> None:
        """Take a tensor's gradient into account."""
        start, flat = self._starts[name], gradient.reshape(-1)
        if name in self._seen:
            own = (self._positions >= start) & (self._positions < start + len(flat))
            self._sums[own] += flat[self._positions[own] - start]
            return
        self._seen.add(name)
        size = flat.abs()
        if name in self._support:
            size[self._support[name]] = 0
        best = size.topk(min(2 * self.count, len(flat))).indices
        best = best[size[best] > 0]
        positions = torch.cat([self._positions, best + start])
        sums = torch.cat([self._sums, flat[best].to(self._sums.dtype)])
        kept = sums.abs().topk(min(2 * self.count, len(sums))).indices
        self._positions, self._sums = positions[kept], sums[kept]

    def best(self) -> Tensor:
        """The positions in all tensors laid end to end, as many as are wanted or were found."""
        return self._positions[self._sums.abs().topk(min(self.count, len(self._sums))).indices]
