"""The stretched hard-concrete gate of diff pruning, its L0 penalty, and noise that is made again and not stored.

A gate z is exactly 0 or 1 with a positive probability and has a gradient in between. So the number of entries that
differ from the pretrained model can be trained.

Sources: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018; Guo, Rush,
Kim, "Parameter-Efficient Transfer Learning with Diff Pruning", ACL 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PenaltyKind = Literal["product", "sum"]

EDGE = 1e-4
"""Noise is kept this far from 0 and 1, where its logit is infinite."""

_WORD = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class HardConcrete:
    """z = clamp(sigmoid(logit(u) + alpha) (high - low) + low, 0, 1) for noise u from 0 to 1.

    Attributes:
        low: below 0, so that z is 0 with a positive probability. At 0, z is never 0.
        high: above 1, so that z is 1 with a positive probability.
    """

    low: float = -1.5
    high: float = 1.5

    def mask(self, alpha: Tensor, u: Tensor) -> Tensor:
        """z, of the shape of alpha and u."""
        return self._stretched(self._sigmoid(alpha, u)).clamp_(0, 1)

    def mask_and_slope(self, alpha: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """z as `mask` has it, bit for bit, and dz / dalpha."""
        s = self._sigmoid(alpha, u)
        slope = torch.addcmul(s, s, s, value=-1).mul_(self.high - self.low)
        stretched = self._stretched(s)
        # one pass where products with `z > 0` and `z < 1` are six
        slope = torch.ops.aten.hardtanh_backward(slope, stretched, 0.0, 1.0)
        return stretched.clamp_(0, 1), slope

    def nonzero(self, alpha: Tensor) -> Tensor:
        """The probability that z is not 0 (with low = 0, where it is 1, the release's value)."""
        shift = math.log(-self.low / self.high) if self.low else 0.0
        return torch.sigmoid(alpha - shift)

    def _sigmoid(self, alpha: Tensor, u: Tensor) -> Tensor:
        return torch.logit(u, EDGE).add_(alpha).sigmoid_()

    def _stretched(self, s: Tensor) -> Tensor:
        return s.mul_(self.high - self.low).add_(self.low)


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """The L0 penalty of one tensor: what the expected number of its nonzeros costs.

    A tensor may have one gate for all of it (`group`, the probability that it is not 0) besides those of its entries.
    Then an entry differs if both gates are open. The paper charges for the product of the probabilities. The release
    charges for their sum, in which closing the tensor saves as much as closing one entry.

    Attributes:
        weight: lambda, for each expected nonzero. It is summed over entries, never averaged.
        kind: "sum" or "product". Without a gate for the tensor they are the same.
    """

    weight: float
    kind: PenaltyKind = "sum"

    def value(self, expected: Tensor, group: Tensor | None) -> Tensor:
        """The penalty, for the sum of the entries' probabilities."""
        if group is None:
            return self.weight * expected
        return self.weight * (expected * group if self.kind == "product" else expected + group)

    def entry_factor(self, group: Tensor | None) -> Tensor | float:
        """The penalty's derivative by the probability of an entry."""
        return self.weight * group if group is not None and self.kind == "product" else self.weight

    def group_factor(self, expected: Tensor) -> Tensor | float:
        """The penalty's derivative by the probability of the tensor's gate."""
        return self.weight * expected if self.kind == "product" else self.weight


def sigmoid_slope(p: Tensor) -> Tensor:
    """The derivative of a sigmoid where its value is p."""
    return torch.addcmul(p, p, p, value=-1)


@dataclass(frozen=True)
class Noise:
    """Uniform noise as a function of where it is used, so that it is made again instead of being stored.

    A generator is seeded again for every chunk. The same numbers come again on the same kind of device, not on another.
    """

    seed: int

    def __call__(self, draw: int, tensor: int, chunk: int, like: Tensor) -> Tensor:
        """Float32 numbers from 0 to below 1 of the shape and on the device of `like`.

        Args:
            draw: its number.
            tensor: the number of the tensor.
            chunk: the number of the chunk in it.
            like: any tensor.
        """
        generator = torch.Generator(like.device).manual_seed(_mixed(self.seed, draw, tensor, chunk))
        return torch.rand(like.shape, generator=generator, device=like.device)


def _mixed(*numbers: int) -> int:
    """63 bits that depend on every bit of the numbers and on their order (the rounds of SplitMix64)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & _WORD
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
        mixed ^= mixed >> 31
    return mixed >> 1
