"""A bank's folder as a bank, on the backbone that its tasks name."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sidestep.backbone.load import load_backbone
from sidestep.tasks.bank import TaskBank
from sidestep.tasks.bank_folder import BankError, BankFolder
from sidestep.tasks.load import stored_backbone


def open_bank(
    folder: BankFolder,
    *,
    names: Iterable[str] | None = None,
    moved_to: str | None = None,
    device: str | None = None,
    keep: int | None = None,
) -> TaskBank:
    """The bank of a folder. Its backbone has its own head if one of the tasks uses that.

    Args:
        folder: of the bank.
        names: of the tasks that are used. None: all that can be read.
        moved_to: where the backbone is, if it has moved. An empty folder says nothing of it.
        device: None: a GPU if there is one.
        keep: as of `TaskBank`.

    Raises:
        BankError: if there is no task and it is not said where the backbone is.
        TaskError: if the tasks are damaged.
        LoadError: if the backbone cannot be loaded.
    """
    asked = folder.names if names is None else list(names)
    readable = [entry for entry in folder.entries()[0] if entry.name in asked]
    entries = readable or [folder.entry(name) for name in asked]  # the latter say what is wrong
    if entries:
        wanted = next((entry for entry in entries if entry.outputs is None), entries[0])
        backbone = stored_backbone(folder.folder(wanted.name), moved_to=moved_to)
    elif moved_to is not None:
        backbone = load_backbone(moved_to)
    else:
        raise BankError(f"{folder.path} holds no task that names its backbone: say which it is (--backbone)")
    return TaskBank(backbone.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), folder.path, keep=keep)
