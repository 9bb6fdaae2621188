"""How the Trainer's work is shared out to processes, so that many compute what one does.

A batch is the whole batch, of which every process takes its share of rows. Their gradients are averaged by PyTorch's
DistributedDataParallel. Those of a sparse diff, which are gathered outside of autograd, are averaged here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader

from sidestep import ranks
from sidestep.measure.step import sparse_deltas
from sidestep.model.attach import Attached
from sidestep.training.results import PACKAGES
from sidestep.versions import versions


class SharedBatches(BatchSampler):
    """This process's share of each batch. Shares differ by at most one row, so none is padded with other rows."""

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield list(ranks.own(batch))


def shared(loader: DataLoader) -> DataLoader:
    """A loader of this process's shares of the batches of accelerate's loader, in the order that one process has."""
    batches: Any = loader.batch_sampler
    if isinstance(inner := getattr(batches, "batch_sampler", None), BatchSampler):
        batches = inner
    batches.sampler.generator = None  # as one process, each draws the order from the epoch's seed
    own = DataLoader(
        loader.dataset,
        batch_sampler=SharedBatches(batches.sampler, batches.batch_size, batches.drop_last),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )
    return prepare_data_loader(
        own, getattr(loader, "device", None), num_processes=1, process_index=0, put_on_device=True
    )


def keep_apart(model: Attached) -> None:
    """Tell DistributedDataParallel what it should neither send nor wait for: frozen weights, and what stands for them.

    The gradients of weights that a sparse diff is written into are gathered and freed, see `average_sparse`.
    """
    own = {id(parameter) for _, parameter in model.trained_parameters()}
    for part in model.parts:
        if part.sparse is not None:
            own.discard(id(part.sparse.values))
            if not part.sparse.gathers:  # a first stage trains the weights themselves
                own |= {id(tensor) for tensor in part.sparse.tensors.values()}
    kept = {id(buffer) for part in model.parts for buffer in part.side.buffers()}
    tensors: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    apart = [name for name, tensor in tensors.items() if id(tensor) not in own | kept]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, apart)


def average_sparse(model: Attached) -> None:
    """Average the gradients of sparse diffs over all processes."""
    for _, diff in sparse_deltas(model.parts):
        if diff.gathers and diff.values.grad is not None:
            ranks.total(diff.values.grad).div_(ranks.count())


def agree_on_run(identity: Mapping[str, Any]) -> None:
    """Compare what the processes are about to train, before anything is written.

    Raises:
        RanksDiffer: naming who differs in what.
    """
    ranks.agree({**identity, "versions": versions(PACKAGES)})


def start_alike(model: Attached) -> None:
    """Give all processes the first one's starting weights."""
    if ranks.count() > 1:
        model.load_state_dict(ranks.of_first(model.state_dict()))
