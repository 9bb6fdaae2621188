"""Diff pruning: a sparse diff of the weights that learns where it is, by gates that a penalty closes.

In a first stage the weights are p0 + z w with a random gate z for each entry, and an L0 penalty for open gates. Then
the diff is projected: the entries largest in magnitude over all weights are kept, exactly as many as the density
allows. These are trained on, as a sparse diff with fixed positions.

Source: Guo, Rush, Kim, "Parameter-Efficient Transfer Learning with Diff Pruning", ACL 2021; dguo98/DiffPruning.

Differs: the density is that of the backbone's weights, without the head. The diff goes on from where its gates left it
(the release takes w without its gates). Masks are drawn once in a step, so that accumulated gradients are exact. For
memory see `diff_optimizer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sidestep.interface.config import UnsupportedBackbone
from sidestep.interface.registry import register
from sidestep.interface.sparse_delta import SparseDelta, SparseDeltaConfig
from sidestep.sparse.diff import SparseDiff
from sidestep.sparse.hard_concrete import HardConcrete, Noise, Penalty, PenaltyKind
from sidestep.sparse.optimizer import DiffPruningOptimizer
from sidestep.sparse.selection import largest

Handover = Literal["continuous", "official"]


@dataclass(frozen=True, kw_only=True)
class DiffPruningConfig(SparseDeltaConfig):
    """Diff pruning, whose first stage has the epochs and the learning rate of training.

    Attributes:
        structured: whether each weight matrix and bias vector has one gate for all of it besides those of its entries.
        penalty: what an open gate costs where a tensor and its entries have gates. "sum" is the sum of the
            probabilities, in which the tensor's gate counts as one entry (the release). "product" is the expected
            number of nonzeros (the paper). It closes the gates of large tensors before their weights have moved, unless
            lambda_l0 is far lower.
        lambda_l0: weight of the penalty, for each expected nonzero. It belongs together with AdamW's epsilon of 1e-8.
        stretch: ends of the gate before it is cut to 0 and 1.
        alpha_init: of the gates. With 5, 99.3 % of them are open.
        alpha_rate: learning rate of the gates, which stays the same.
        handover: which values the second stage begins with. "continuous" is the diff as its gates left it. "official"
            is w without its gates.
        finetune_epochs: of the second stage.
        finetune_rate: learning rate of the second stage.
        state_bits: of each of the first stage's averages of gradients: 32, or 8 with the package bitsandbytes.
    """

    rates = (2e-5, 6e-5, 2e-4)

    structured: bool = True
    penalty: PenaltyKind = "sum"
    lambda_l0: float = 1.25e-7
    stretch: tuple[float, float] = (-1.5, 1.5)
    alpha_init: float = 5.0
    alpha_rate: float = 0.1
    handover: Handover = "continuous"
    finetune_epochs: int = 3
    finetune_rate: float = 5e-5
    state_bits: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("stretch", self.stretch[0] < 0 and self.stretch[1] > 1, "two numbers, below 0 and above 1")
        self.require("lambda_l0", self.lambda_l0 >= 0, "a number of at least 0")
        self.require("state_bits", self.state_bits in (8, 32), "8 or 32")
        for name in ("alpha_rate", "finetune_rate"):
            self.require(name, getattr(self, name) > 0, "a number above 0")
        self.require("finetune_epochs", self.finetune_epochs >= 1, "a whole number of at least 1")


@register("diff_pruning", DiffPruningConfig)
class DiffPruning(SparseDelta):
    """Diff pruning: learns which small share of the backbone's weights to change, and how."""

    @property
    def relaxes(self) -> bool:
        """All weights have gates at first."""
        return True

    def stages(self, epochs: int, rate: float) -> tuple[tuple[int, float], tuple[int, float]]:
        """The settings' are the first stage's."""
        return (epochs, rate), (self.config.finetune_epochs, self.config.finetune_rate)

    def relax(
        self,
        diff: SparseDiff,
        dense: Iterable[nn.Parameter],
        *,
        rate: float,
        weight_decay: float,
        max_norm: float,
        seed: int,
    ) -> DiffPruningOptimizer:
        """The optimizer of the first stage, which owns all weights that the diff may change from here on.

        Args:
            diff: without positions.
            dense: what is trained besides: the head.
            rate: learning rate of w and of the head. At 0 the gates rest too.
            weight_decay: of w and of the head.
            max_norm: where gradients are cut.
            seed: of the gates' noise.

        Raises:
            UnsupportedBackbone: if a weight's entries do not lie in order in memory.
        """
        config = self.config
        for name, tensor in diff.tensors.items():
            if not tensor.is_contiguous():
                raise UnsupportedBackbone(
                    f"diff_pruning does not work on weights that are not contiguous, and {name} is not. Make it so by "
                    ".contiguous(), a model in channels_last by .to(memory_format=torch.contiguous_format), or choose "
                    "sparse"
                )
        diff.unhook()
        for tensor in diff.tensors.values():
            tensor.requires_grad_(True)
        return DiffPruningOptimizer(
            diff.tensors,
            dense,
            lr=rate,
            gate=HardConcrete(low=config.stretch[0], high=config.stretch[1]),
            penalty=Penalty(weight=config.lambda_l0, kind=config.penalty),
            structured=config.structured,
            alpha_init=config.alpha_init,
            alpha_rate=config.alpha_rate if rate else 0.0,
            weight_decay=weight_decay,
            max_norm=max_norm,
            state_bits=config.state_bits,
            noise=Noise(seed),
        )

    def project(self, optimizer: DiffPruningOptimizer, diff: SparseDiff) -> dict[str, Any]:
        """Place the diff where it is largest, so that the weights are the pretrained ones plus the diff.

        Returns:
            What came of it: the share of open gates ("open"), entries kept ("nonzeros") and tensors among them
            ("tensors" of "all_tensors").

        Raises:
            ValueError: if no entry differs from the pretrained one.
        """
        chosen = largest(optimizer.diffs, len(diff.values))
        kept = {name: entries for name, entries in chosen.items() if len(entries[0])}
        if not kept:
            raise ValueError(
                "all gates are closed, so there is no diff to keep. Train for fewer epochs, or choose a lower "
                f"lambda_l0 ({self.config.lambda_l0:g} now) or a higher alpha_init ({self.config.alpha_init:g} now)"
                + (', or penalty="sum"' if self.config.structured and self.config.penalty == "product" else "")
            )
        opened = sum(int((z > 0).sum()) for _, _, z in optimizer.masks())
        if self.config.handover == "official":
            weights = optimizer.weights()
            kept = {name: (positions, weights[name][positions]) for name, (positions, _) in kept.items()}
        optimizer.restore()
        diff.place(kept)
        return {
            "open": opened / diff.total,
            "nonzeros": len(diff.values),
            "tensors": len(kept),
            "all_tensors": len(diff.tensors),
        }
