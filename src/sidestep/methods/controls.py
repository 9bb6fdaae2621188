"""The controls that every method is compared with: a linear probe, BitFit and full tuning.

Source: BitFit is Ben Zaken, Goldberg, Ravfogel, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models", ACL 2022 (all bias terms). They go through the same interface, so that a comparison runs one
code path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sidestep.interface.config import MethodConfig
from sidestep.interface.registry import register
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site
from sidestep.interface.weight_delta import WeightDelta, refuse_codes


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(MethodConfig):
    """A linear probe: only the head is trained, on the frozen backbone's output."""

    rates = (3e-3, 1e-2, 5e-2)


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(MethodConfig):
    """BitFit: only the backbone's bias vectors and the head are trained."""

    rates = (5e-4, 2e-3, 5e-3)


@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodConfig):
    """Full fine-tuning: every weight of the backbone is trained."""

    rates = (2e-5, 6e-5, 2e-4)


@register("probe", ProbeConfig)
class Probe(SideNet):
    """Linear probe: trains the head alone."""

    tokenwise = True
    starts_as_identity = True

    def __init__(self, config: ProbeConfig, sites: Sequence[Site]) -> None:
        super().__init__()

    def read(self, hidden: Tensor, site: Site) -> None:
        """Nothing."""
        return


@register("bitfit", BitFitConfig)
class BitFit(WeightDelta):
    """BitFit: trains the backbone's bias vectors."""

    def moves(self, name: str, parameter: Tensor) -> bool:
        """Bias vectors: of linear maps and norms."""
        return name.rpartition(".")[2].endswith("bias") and parameter.ndim == 1

    def check(self, moved: Sequence[str]) -> None:
        """Raise if the backbone has no bias."""
        if not moved:
            raise ValueError("it has no bias vectors to train")


@register("full", FullConfig)
class Full(WeightDelta):
    """Full fine-tuning: trains every weight of the backbone."""

    def insert(self, trunk: nn.Module) -> None:
        """Raise if the backbone is quantised."""
        refuse_codes(trunk, "full tuning trains plain ones (LoRA trains plain matrices beside codes)")

    def moves(self, name: str, parameter: Tensor) -> bool:
        """Every floating-point weight."""
        return parameter.is_floating_point()
