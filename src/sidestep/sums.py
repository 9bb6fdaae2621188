"""Sums of sparse diffs: a task's and a language's or a domain's on one backbone, as in composable sparse tuning.

Source: Ansell, Ponti, Korhonen, Vulic, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022: diffs that
were trained apart are added to the same pretrained weights.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sidestep.backbone import Digest
from sidestep.model import SideModel
from sidestep.sparse_codec import POSITIONS, VALUES
from sidestep.store import TaskError, diff_of, read


class DifferentBackbones(TaskError):
    """Diffs were learned on different pretrained weights: their sum means nothing."""


def add_diff(model: SideModel, folder: str | Path, scale: float = 1.0) -> None:
    """Add the sparse diff of a task to that of a model; head and labels stay the model's.

    Where both change an entry, the changes are summed. The model is then as any other: it can be saved, trained on with
    a new optimizer, and detached.

    Args:
        model: with a sparse diff that has been trained or loaded.
        folder: a task with a sparse diff of the same backbone.
        scale: what its changes are multiplied by; -1 takes a diff away that was added (up to rounding).

    Raises:
        DifferentBackbones: if the diffs belong to different pretrained weights.
        TaskError: if the folder is no task or is damaged, or either has no sparse diff.
    """
    diff, task = model.sparse, read(folder)
    if diff is None or not diff.is_placed:
        raise TaskError(f"the model's method, {model.record.name}, has no trained sparse diff to add one to")
    if not task.tensors.keys() >= {POSITIONS, VALUES}:
        raise TaskError(f"{folder} is a task of {task.config['method']['name']}, which is no sparse diff")
    wanted = Digest(**task.config["backbone"]["digest"])
    if model.digest.matches(wanted) == "different":
        raise DifferentBackbones(
            f"{folder} was learned on weights with digest {wanted.exact[:16]}, and the model's diff on "
            f"{model.digest.exact[:16]}: diffs add up on one backbone only; train both on the same"
        )
    entries, sums = diff_of(task, diff), diff.entries()
    for name, (positions, values) in entries.items():
        old, own = sums.get(name, (positions[:0], values[:0]))
        everywhere, order = torch.cat([old.cpu(), positions]).unique(return_inverse=True)
        changes = torch.cat([own.cpu().float(), scale * values.float()])
        sums[name] = everywhere, torch.zeros(len(everywhere)).index_add_(0, order, changes)
    diff.place(sums)
