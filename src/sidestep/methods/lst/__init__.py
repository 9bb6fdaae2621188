"""LST: a small Transformer beside the frozen one."""

from sidestep.methods.lst.config import LSTConfig
from sidestep.methods.lst.method import LST

__all__ = ["LST", "LSTConfig"]
