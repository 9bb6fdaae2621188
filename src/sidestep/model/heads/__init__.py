"""Heads: what is learned on top of the last hidden state.

To add a head, write a config with the decorator `register` (`base`) and the module that it builds.
"""

from sidestep.model.heads.base import HEADS, Head, HeadConfig, head_from_dict, named, register
from sidestep.model.heads.gpo import GPO
from sidestep.model.heads.pooled import Classify, Regress
from sidestep.model.heads.retrieve import Loss, Retrieve, unit
from sidestep.model.heads.tokens import Span, Tag

__all__ = [
    "GPO",
    "HEADS",
    "Classify",
    "Head",
    "HeadConfig",
    "Loss",
    "Regress",
    "Retrieve",
    "Span",
    "Tag",
    "head_from_dict",
    "named",
    "register",
    "unit",
]
