"""Sidestep: tune a frozen pretrained Transformer without back-propagating through it.

    import sidestep as ss

    model = ss.attach(backbone, ss.ReadConfig(rank=128), head=ss.Classify(num_labels=2))
    transformers.Trainer(model=model, ...).train()
    model.save_pretrained("tasks/rte")
    model = ss.load("tasks/rte")
"""

from sidestep.heads import Classify, Regress
from sidestep.memory import peak_memory, saved_bytes
from sidestep.methods import (
    BitFitConfig,
    FullConfig,
    MethodConfig,
    ProbeConfig,
    ReadConfig,
    UnsupportedBackbone,
    methods,
)
from sidestep.model import SideModel, attach, detach
from sidestep.store import load

__version__ = "0.1.0"

__all__ = [
    "BitFitConfig",
    "Classify",
    "FullConfig",
    "MethodConfig",
    "ProbeConfig",
    "ReadConfig",
    "Regress",
    "SideModel",
    "UnsupportedBackbone",
    "attach",
    "detach",
    "load",
    "methods",
    "peak_memory",
    "saved_bytes",
]
