"""The frozen backbone: what it is, its blocks and norms, how it is frozen and held in eval mode, and its digest."""

from sidestep.backbone.compiled import CompiledBlocks
from sidestep.backbone.digest import (
    Digest,
    digest_of,
    head_tensors,
    in_pooler,
    joined,
    new_parameters,
    pretrained_tensors,
)
from sidestep.backbone.facts import Facts, StackFacts, as_given, as_tokens, said_causal
from sidestep.backbone.fakes import without_values
from sidestep.backbone.find import Stack, default_pool, find_places, find_stacks, prove_replay
from sidestep.backbone.freeze import Noise, check_noise, drop_path_rate, freeze, hold_fronts, set_noise
from sidestep.backbone.packs import packs
from sidestep.backbone.recompute import CheckpointedForward, checkpoint_blocks, uncheckpoint_blocks
from sidestep.backbone.trace import facts_of
from sidestep.backbone.trunk import (
    device_of,
    embedding_shapes,
    is_encoder_decoder,
    picture_token,
    positions,
    token_rows,
    trunk_of,
)
from sidestep.backbone.untouched import Snapshot
from sidestep.backbone.wide import Widened

__all__ = [
    "CheckpointedForward",
    "CompiledBlocks",
    "Digest",
    "Facts",
    "Noise",
    "Snapshot",
    "Stack",
    "StackFacts",
    "Widened",
    "as_given",
    "as_tokens",
    "check_noise",
    "checkpoint_blocks",
    "default_pool",
    "device_of",
    "digest_of",
    "drop_path_rate",
    "embedding_shapes",
    "facts_of",
    "find_places",
    "find_stacks",
    "freeze",
    "head_tensors",
    "hold_fronts",
    "in_pooler",
    "is_encoder_decoder",
    "joined",
    "new_parameters",
    "packs",
    "picture_token",
    "positions",
    "pretrained_tensors",
    "prove_replay",
    "said_causal",
    "set_noise",
    "token_rows",
    "trunk_of",
    "uncheckpoint_blocks",
    "without_values",
]
