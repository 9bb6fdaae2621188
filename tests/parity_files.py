"""Oracle files: numbers of an official implementation, and what a reproduction of them consists of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

Names = tuple[tuple[str, str], ...]
"""Patterns of names on one side, and the names that they stand for on the other."""


class OracleError(ValueError):
    """A file is no oracle of a known family, or asks for what Sidestep does not have."""


@dataclass(frozen=True)
class Oracle:
    """One file: inputs, weights, settings, outputs and gradients, by the official implementation's names."""

    path: Path
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Oracle:
        """The file's tensors.

        Raises:
            OracleError: if it cannot be read.
        """
        try:
            return cls(path, load_file(path))
        except (OSError, SafetensorError) as error:
            raise OracleError(f"cannot be read: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise OracleError(f"has no tensor {name!r}")
        return self.tensors[name]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, by the rest of their names."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def gradients(self) -> dict[str, Tensor]:
        """The gradients, by the names of their parameters."""
        return self.group("grad.") or self.group("g.")

    def states(self) -> dict[str, Tensor]:
        """What goes in and comes out on the way."""
        side = {name: value for name, value in self.tensors.items() if name.startswith("side_")}
        return self.group("act.") | side

    def numbers(self, name: str) -> list[int]:
        """A list of whole numbers, such as "meta.depths"."""
        return [int(value) for value in self[name].flatten().tolist()]

    def number(self, name: str) -> float:
        """A setting, the first where the file has several; as the decimal that was rounded to float32."""
        return float(f"{self[name].flatten()[0].item():.6g}")


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What Sidestep computes from an oracle's weights and inputs, by the file's names.

    Attributes:
        outputs: without "out.".
        gradients: of the trained parameters, without "grad."; what is not there counts as zero, in the file as well.
        states: what goes in and comes out on the way, without "act.".
        flags: lists of whole numbers that have to be equal, without "meta.".
        gradient_tolerance: largest absolute difference of a gradient.
    """

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    states: dict[str, Tensor] = field(default_factory=dict)
    flags: dict[str, list[int]] = field(default_factory=dict)
    gradient_tolerance: float = 1e-5


def load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model; none may be missing or left over.

    Raises:
        OracleError: naming those that are, or that have another shape.
    """
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise OracleError(f"does not fit {type(model).__name__}: {error}") from error


def rename(name: str, names: Names) -> str:
    """What the first fitting pattern makes of a name.

    Raises:
        OracleError: if none fits.
    """
    for pattern, replacement in names:
        if found := re.fullmatch(pattern, name):
            return found.expand(replacement)
    raise OracleError(f"has no counterpart of {name!r}")
