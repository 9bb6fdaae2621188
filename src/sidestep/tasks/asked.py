"""What a bank is asked of one batch: its inputs and the tasks' own rows, checked before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.backbone import device_of
from sidestep.fold import Rows
from sidestep.messages import some
from sidestep.tasks.bank_folder import BankError, BankFolder

INTEGERS = (torch.int64, torch.int32)


def check_names(tasks: Sequence[str], store: BankFolder) -> list[str]:
    """The names of tasks.

    Raises:
        BankError: if there is none, one stands there twice, or the bank holds no task of a name.
    """
    if isinstance(tasks, str):
        raise BankError(f"tasks={tasks!r}: give a list of names, such as [{tasks!r}]")
    names = list(tasks)
    if not names:
        raise BankError(f"no task is named: {store.path} holds {some(store.names)}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise BankError(f"{some(map(repr, twice))} is named twice: name each task once")
    for name in names:
        store.folder(name)
    return names


def check_batch(batch: Mapping[str, Any], backbone: nn.Module) -> None:
    """Raise `BankError` if a batch has labels or a cache, or inputs of another kind than the backbone's."""
    given = sorted({"labels", "past_key_values"} & {name for name, value in batch.items() if value is not None})
    if given:
        raise BankError(f"a batch for several tasks has no {' and no '.join(given)}: leave it out")
    main = getattr(backbone, "main_input_name", None)  # timm's models take their inputs by place
    if main is not None and not {main, "inputs_embeds"} & batch.keys():
        raise BankError(f"the batch has {some(batch)}, but {type(backbone).__name__} reads {main}")


def own_rows(
    given: Mapping[str, Sequence[int] | Tensor], names: Collection[str], batch: Mapping[str, Any], backbone: nn.Module
) -> dict[str, Rows]:
    """The rows of tasks that do not run on all rows of a batch, by task.

    Args:
        given: numbers of rows by task.
        names: of the tasks that run.
        batch: of the backbone's inputs.
        backbone: whose inputs these are.

    Raises:
        BankError: if rows are given for another task, or are no numbers of rows of the batch.
    """
    if others := [name for name in given if name not in names]:
        raise BankError(f"rows of {some(map(repr, others))}, but the tasks are {some(names)}: name it in tasks too")
    main = batch.get(getattr(backbone, "main_input_name", ""), batch.get("inputs_embeds"))
    count = len(next(iter(batch.values())) if main is None else main)
    found = {}
    for name, numbers in given.items():
        try:
            index = torch.as_tensor(numbers)
        except (TypeError, ValueError, RuntimeError):
            index = torch.tensor(0)
        if index.ndim != 1 or not len(index):
            raise BankError(f"rows of {name!r} are {numbers!r}: give a list of numbers, or leave the task out")
        if index.dtype not in INTEGERS or index.min() < 0 or index.max() >= count:
            told = some(map(str, index.tolist()))
            raise BankError(f"rows of {name!r} are {told}: give numbers from 0 to {count - 1}, the batch's last row")
        if not torch.equal(index, torch.arange(count, device=index.device)):
            found[name] = Rows(index.long().to(device_of(backbone)), count)
    return found
