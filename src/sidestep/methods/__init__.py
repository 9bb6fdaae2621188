"""The methods, one file each, which importing this folder registers."""

from sidestep.interface.config import MethodConfig, UnsupportedBackbone
from sidestep.interface.registry import Method, method_named, method_of, methods, register
from sidestep.interface.side_net import SideNet
from sidestep.interface.weight_delta import WeightDelta
from sidestep.methods.adapters import DoraConfig, IA3Config, LateLoraConfig, LoraConfig
from sidestep.methods.controls import BitFitConfig, FullConfig, ProbeConfig
from sidestep.methods.diff_pruning import DiffPruningConfig
from sidestep.methods.dtl import DTLConfig
from sidestep.methods.lst import LSTConfig
from sidestep.methods.read import ReadConfig
from sidestep.methods.readout import ReadoutConfig
from sidestep.methods.sherl import SherlConfig
from sidestep.methods.side_attention import SideAttentionConfig
from sidestep.methods.sparse import SparseConfig
from sidestep.methods.synqt import SynQTConfig
from sidestep.methods.unipt import UniPTConfig

__all__ = [
    "BitFitConfig",
    "DTLConfig",
    "DiffPruningConfig",
    "DoraConfig",
    "FullConfig",
    "IA3Config",
    "LSTConfig",
    "LateLoraConfig",
    "LoraConfig",
    "Method",
    "MethodConfig",
    "ProbeConfig",
    "ReadConfig",
    "ReadoutConfig",
    "SherlConfig",
    "SideAttentionConfig",
    "SideNet",
    "SparseConfig",
    "SynQTConfig",
    "UniPTConfig",
    "UnsupportedBackbone",
    "WeightDelta",
    "method_named",
    "method_of",
    "methods",
    "register",
]
