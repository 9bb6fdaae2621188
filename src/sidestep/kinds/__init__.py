"""Kinds of task, one file each. Importing this folder registers them."""

from sidestep.kinds.base import TaskKind, kind_named, kinds, register
from sidestep.kinds.classes import Multi, Single
from sidestep.kinds.grounding import Grounding
from sidestep.kinds.numbers import Regression
from sidestep.kinds.pairs import Retrieval
from sidestep.kinds.spans import Spans
from sidestep.kinds.texts import LanguageModel, Text2Text
from sidestep.kinds.tokens import Tokens
from sidestep.kinds.vqa import Vqa

__all__ = [
    "Grounding",
    "LanguageModel",
    "Multi",
    "Regression",
    "Retrieval",
    "Single",
    "Spans",
    "TaskKind",
    "Text2Text",
    "Tokens",
    "Vqa",
    "kind_named",
    "kinds",
    "register",
]
