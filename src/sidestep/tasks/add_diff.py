"""Sums of sparse diffs: a task's and a language's or a domain's on one backbone, as in composable sparse tuning.

Source: Ansell, Ponti, Korhonen, Vulic, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022: diffs that
were trained apart are added to the same pretrained weights.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from sidestep.backbone import Digest
from sidestep.disk.task_folder import TaskError, read
from sidestep.model.side_model import SideModel
from sidestep.model.two_towers import TwoTowers
from sidestep.sparse.codec import POSITIONS, VALUES
from sidestep.tasks.load import diff_of, dtype_mismatch


class DifferentBackbones(TaskError):
    """Diffs were learned on different pretrained weights. Their sum means nothing."""


def add_diff(model: SideModel, folder: str | Path, scale: float = 1.0, *, allow_mismatch: bool = False) -> None:
    """Add the sparse diff of a task to that of a model. Head and labels stay the model's.

    If both change an entry, the changes are summed. The model's stored scores are dropped. Afterwards the model can be
    saved, trained on with a new optimizer, and detached, like any other.

    Args:
        model: with a sparse diff that has been trained or loaded.
        folder: a task with a sparse diff of the same backbone.
        scale: the factor of the task's changes. -1 takes a diff away that was added (up to rounding).
        allow_mismatch: whether a diff of the same backbone in another precision is a warning rather than an error.

    Raises:
        DifferentBackbones: if the diffs belong to different pretrained weights.
        TaskError: if the folder is no task or is damaged. If either has no sparse diff or is of a dual encoder. If the
            diff was learned in another precision, or sums do not fit the precision of the model's diff or weights.
        ValueError: if `scale` is no finite number.

    Warns:
        DtypeMismatch: if the diff was learned on the same weights in another precision, and `allow_mismatch` is set.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale}, but it must be a finite number")
    task = read(folder)
    for what, is_pair in (("the model", isinstance(model, TwoTowers)), (folder, "towers" in task.config["backbone"])):
        if is_pair:
            raise TaskError(f"{what} is of a dual encoder, and diffs of pairs cannot be added: give one backbone's")
    diff = model.sparse
    if diff is None or not diff.is_placed:
        raise TaskError(f"the model's method, {model.record.name}, has no trained sparse diff to add one to")
    if not task.tensors.keys() >= {POSITIONS, VALUES}:
        raise TaskError(f"{folder} is a task of {task.config['method']['name']}, which is no sparse diff")
    wanted = Digest(**task.config["backbone"]["digest"])
    match = model.digest.matches(wanted)
    if match == "different":
        raise DifferentBackbones(
            f"{folder} was learned on weights with digest {wanted.exact[:16]}, and the model's diff on "
            f"{model.digest.exact[:16]}: diffs add up on one backbone only. Train both on the same"
        )
    if match == "dtype":
        found = dtype_mismatch(task.folder, wanted, model.digest, is_diff=True, allow_mismatch=allow_mismatch)
        warnings.warn(found, stacklevel=2)
    entries, sums, tensors = diff_of(task, diff), diff.entries(), diff.tensors
    for name, (positions, values) in entries.items():
        old, own = sums.get(name, (positions[:0], values[:0]))
        everywhere, order = torch.cat([old.cpu(), positions]).unique(return_inverse=True)
        changes = torch.cat([own.cpu().float(), scale * values.float()])
        sums[name] = everywhere, torch.zeros(len(everywhere)).index_add_(0, order, changes)
        _check_fits(sums[name][1], name, (diff.value_dtype, tensors[name].dtype))
    diff.place(sums)
    model.extras.pop("scores", None)  # they were those of the diff alone


def _check_fits(values: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    for dtype in dtypes:
        if not values.to(dtype).isfinite().all():
            raise TaskError(
                f"the sum of the diffs has values up to {float(values.abs().max()):.4g} in {name}, out of the range of "
                f"{dtype}. Choose a smaller scale, or a wider precision of the diff and the weights"
            )
