"""Small methods of a test's own, attached without staying in the registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch import nn

import sidestep as ss
from sidestep.interface import registry
from sidestep.methods import MethodConfig, SideNet, register


@dataclass(frozen=True, kw_only=True)
class ToyConfig(MethodConfig):
    """No settings."""


def attach_toy(
    monkeypatch: pytest.MonkeyPatch, method: type[SideNet], backbone: nn.Module, **kwargs: Any
) -> ss.SideModel:
    """The backbone with `method` attached under the name "toy", which is forgotten after the test."""
    known = {name: record for name, record in registry._REGISTRY.items() if name != "toy"}
    monkeypatch.setattr(registry, "_REGISTRY", known)
    register("toy", ToyConfig)(method)
    return ss.attach(backbone, ToyConfig(), **kwargs).eval()
