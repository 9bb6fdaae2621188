"""Kinds of task, one file each. Importing this folder registers them."""

from sidestep.kinds.base import TaskKind, kind_named, kinds, register
from sidestep.kinds.classes import Multi, Single
from sidestep.kinds.numbers import Regression
from sidestep.kinds.pairs import Retrieval
from sidestep.kinds.texts import LanguageModel, Text2Text
from sidestep.kinds.tokens import Tokens

__all__ = [
    "LanguageModel",
    "Multi",
    "Regression",
    "Retrieval",
    "Single",
    "TaskKind",
    "Text2Text",
    "Tokens",
    "kind_named",
    "kinds",
    "register",
]
