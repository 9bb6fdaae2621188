"""The methods that can be tried, with settings that fit tiny models."""

from __future__ import annotations

from typing import Any

from sidestep.methods import MethodConfig, methods

SETTINGS: dict[str, dict[str, Any]] = {
    "diff_pruning": {"density": 0.05},
    "dtl": {"rank": 4, "late_blocks": 2},
    "late_lora": {"rank": 4, "blocks": 1},
    "lst": {"reduction": 4, "heads": 2, "dropout": 0.0},
    "sherl": {"reduction": 4, "dropout": 0.0},
    "side_attention": {"rank": 4, "heads": 2, "dropout": 0.0},
    "sparse": {"density": 0.05, "select": "random"},
    "synqt": {"queries": 2, "hidden": 6, "attention_hidden": 3, "dropout": 0.0, "head_drop_path": 0.0},
}
DEFAULT = ("read", "side_attention", "lora", "sherl", "probe")
"""Methods that the command tries unless others are named."""
NEED_HEAD = ("probe", "readout", "synqt")
"""Methods that train nothing, or can be read by nothing, without a Sidestep head."""


def config_of(name: str) -> MethodConfig:
    """A method's config for tiny models.

    Raises:
        ValueError: if no method has this name.
    """
    known = methods()
    if name not in known:
        raise ValueError(f"unknown method {name!r}: choose among {', '.join(known)}")
    kind = known[name].config
    return kind(**SETTINGS.get(name, {"rank": 4} if "rank" in kind.__dataclass_fields__ else {}))
