"""Sidestep: tune a frozen pretrained Transformer without back-propagating through it.

In short:

    import sidestep as ss

    model = ss.attach(backbone, ss.ReadConfig(rank=128), head=ss.Classify(num_labels=2))
    transformers.Trainer(model=model, ...).train()
    model.save_pretrained("tasks/rte")
    model = ss.load("tasks/rte")
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sidestep.versions import VERSION

if TYPE_CHECKING:
    from sidestep.disk.task_folder import TaskError
    from sidestep.measure.memory import peak_memory, saved_bytes
    from sidestep.measure.plan import Plan, plan
    from sidestep.methods import (
        BitFitConfig,
        DiffPruningConfig,
        DoraConfig,
        DTLConfig,
        FullConfig,
        IA3Config,
        LateLoraConfig,
        LoraConfig,
        LSTConfig,
        MethodConfig,
        ProbeConfig,
        ReadConfig,
        ReadoutConfig,
        SherlConfig,
        SideAttentionConfig,
        SparseConfig,
        SynQTConfig,
        UniPTConfig,
        UnsupportedBackbone,
        methods,
    )
    from sidestep.model.attach import attach, detach
    from sidestep.model.heads import Answer, Box, Classify, Regress, Retrieve, Span, Tag
    from sidestep.model.initialise import initialise
    from sidestep.model.joint_model import JointModel
    from sidestep.model.pair_model import PairModel
    from sidestep.model.sharding import shard
    from sidestep.model.side_model import SideModel
    from sidestep.serve.client import AsyncClient, Client, ServerError
    from sidestep.tasks.add_diff import DifferentBackbones, add_diff
    from sidestep.tasks.bank import TaskBank
    from sidestep.tasks.bank_folder import BankError
    from sidestep.tasks.load import load
    from sidestep.training.run import DataSpec, ModelSpec, RunSpec, store_features, train
    from sidestep.training.settings import TrainSettings

__version__ = VERSION

__all__ = [
    "Answer",
    "AsyncClient",
    "BankError",
    "BitFitConfig",
    "Box",
    "Classify",
    "Client",
    "DTLConfig",
    "DataSpec",
    "DiffPruningConfig",
    "DifferentBackbones",
    "DoraConfig",
    "FullConfig",
    "IA3Config",
    "JointModel",
    "LSTConfig",
    "LateLoraConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelSpec",
    "PairModel",
    "Plan",
    "ProbeConfig",
    "ReadConfig",
    "ReadoutConfig",
    "Regress",
    "Retrieve",
    "RunSpec",
    "ServerError",
    "SherlConfig",
    "SideAttentionConfig",
    "SideModel",
    "Span",
    "SparseConfig",
    "SynQTConfig",
    "Tag",
    "TaskBank",
    "TaskError",
    "TrainSettings",
    "UniPTConfig",
    "UnsupportedBackbone",
    "add_diff",
    "attach",
    "detach",
    "initialise",
    "load",
    "methods",
    "peak_memory",
    "plan",
    "saved_bytes",
    "shard",
    "store_features",
    "train",
]

_HOMES = {
    "tasks.bank": ("BankError", "TaskBank"),
    "model.heads": ("Answer", "Box", "Classify", "Regress", "Retrieve", "Span", "Tag"),
    "measure.memory": ("peak_memory", "saved_bytes"),
    "methods": (
        "BitFitConfig",
        "DTLConfig",
        "DiffPruningConfig",
        "DoraConfig",
        "FullConfig",
        "IA3Config",
        "LSTConfig",
        "LateLoraConfig",
        "LoraConfig",
        "MethodConfig",
        "ProbeConfig",
        "ReadConfig",
        "ReadoutConfig",
        "SherlConfig",
        "SideAttentionConfig",
        "SparseConfig",
        "SynQTConfig",
        "UniPTConfig",
        "UnsupportedBackbone",
        "methods",
    ),
    "model.side_model": ("SideModel",),
    "serve.client": ("AsyncClient", "Client", "ServerError"),
    "model.attach": ("attach", "detach"),
    "model.joint_model": ("JointModel",),
    "model.pair_model": ("PairModel",),
    "model.sharding": ("shard",),
    "measure.plan": ("Plan", "plan"),
    "model.initialise": ("initialise",),
    "disk.task_folder": ("TaskError",),
    "tasks.load": ("load",),
    "training.run": ("DataSpec", "ModelSpec", "RunSpec", "store_features", "train"),
    "training.settings": ("TrainSettings",),
    "tasks.add_diff": ("DifferentBackbones", "add_diff"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """This package. A public name is imported when it is first used, so that the command's help needs no torch."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{self.__name__}.{_HOME[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # importing the folder sidestep.methods (or plan) would put it in the place of the function of that name
        hides = name in ("methods", "plan") and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if hides else value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
