"""The methods, one file each; importing this folder registers them."""

from sidestep.methods.base import (
    Method,
    MethodConfig,
    SideNet,
    UnsupportedBackbone,
    WeightDelta,
    method_named,
    method_of,
    methods,
    register,
)
from sidestep.methods.controls import BitFitConfig, FullConfig, ProbeConfig
from sidestep.methods.read import ReadConfig

__all__ = [
    "BitFitConfig",
    "FullConfig",
    "Method",
    "MethodConfig",
    "ProbeConfig",
    "ReadConfig",
    "SideNet",
    "UnsupportedBackbone",
    "WeightDelta",
    "method_named",
    "method_of",
    "methods",
    "register",
]
