"""Sidestep: tune a frozen pretrained Transformer without back-propagating through it."""

from sidestep.methods import BitFitConfig, FullConfig, ProbeConfig, ReadConfig, UnsupportedBackbone, methods
from sidestep.heads import Classify, Regress
from sidestep.model import SideModel, attach, detach

__version__ = "0.1.0"
