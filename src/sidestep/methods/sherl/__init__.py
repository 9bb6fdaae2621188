"""SHERL: features of all blocks, merged without their redundancy."""

from sidestep.methods.sherl.config import SherlConfig
from sidestep.methods.sherl.method import Sherl

__all__ = ["Sherl", "SherlConfig"]
