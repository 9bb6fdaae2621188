"""Share a frozen backbone's weights out among processes: each holds a part, and gathers one block at a time (FSDP2).

Every block is a unit, and so is the table of tokens. What is trained is in no unit: it stays whole and in its own
precision in every process. No gradient of a frozen weight is ever asked for, so units are gathered and freed, and never
reduced. Gradients of what is trained are averaged by `DistributedDataParallel`, which leaves the units out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from sidestep.backbone.fakes import is_dispatched
from sidestep.backbone.quantised import is_quantised
from sidestep.backbone.shards import is_shard, is_sharded
from sidestep.fold.sharded import Root
from sidestep.methods import UnsupportedBackbone
from sidestep.model.initialise import samples_of
from sidestep.model.side_model import SideModel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from sidestep.model.attach import Attached


def shard(model: Attached, mesh: DeviceMesh | None = None) -> Attached:
    """Shard the frozen blocks of an attached model among all processes, and put the rest on this process's device.

    Each process calls it with the same model, still on the CPU. Weights that were loaded there are read from the
    file's pages, which the processes of one machine share. A device gets one block at a time, and keeps its part.

    Afterwards wrap the model in `DistributedDataParallel` for training, as `sidestep.train` does. All processes have to
    make the same calls, because each call gathers from all. Evaluate with batches for every process.

    Args:
        model: with one backbone or two towers. It is changed in place.
        mesh: of devices, as of `torch.distributed.fsdp.fully_shard`. None: all processes in one row.

    Returns:
        The same model. Its digest was taken before.

    Raises:
        ValueError: if there is no process group, or the model was sharded before.
        UnsupportedBackbone: if the weights are quantised or dispatched, or the method needs whole weights.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "sharding needs several processes, and there is no process group: start with "
            "torchrun --nproc-per-node N, and call torch.distributed.init_process_group() in a script of your own"
        )
    for part in model.parts:
        _check(part)
    mesh = _all_processes() if mesh is None else mesh
    for part in model.parts:
        _ = part.digest  # of whole weights
        _shard(part, mesh)
    _put_rest(model, mesh)
    names = [name for name, parameter in model.named_parameters() if is_shard(parameter)]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return model


def _all_processes() -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return init_device_mesh("cpu" if device is None else device.type, (dist.get_world_size(),))


def _check(part: SideModel) -> None:
    """Refuse what would be wrong with shards, by name.

    Raises:
        ValueError: if the backbone was sharded before.
        UnsupportedBackbone: if the backbone or the method does not work so.
    """
    kind, method = type(part.backbone).__name__, part.record.name
    if is_sharded(part.backbone):
        raise ValueError(f"{kind} is sharded already: attach before you shard, and shard once")
    if any(is_quantised(module) for module in part.backbone.modules()):
        raise UnsupportedBackbone(
            f"{kind} has quantised weights, and as shards they may silently give wrong outputs (accelerate#3983). "
            "Load it in bfloat16 and shard that, or leave sharding out: then each process holds the quantised model"
        )
    if is_dispatched(part.backbone):
        raise UnsupportedBackbone(
            f"{kind} was dispatched by accelerate, which moves its weights by itself: load it without device_map"
        )
    why = None
    if part.sparse is not None:
        why = "writes its values into whole weights. Choose a side network or LoRA, or leave sharding out"
    elif part.side.replays:
        why = "reads through parts of the block ahead, whose weights are not here yet. Choose another method"
    elif samples_of(part):
        why = "starts from gradients of all weights. Choose a start without data"
    elif part.settings.keep == "auto":
        why = "would choose in each process by that one's memory (keep='auto'). Choose keep='replay' or 'full'"
    elif not any(_frozen(part, block) for block in _blocks(part)):
        why = "trains all weights of the blocks. Full fine-tuning is sharded by transformers' own Trainer (fsdp=)"
    if why is not None:
        raise UnsupportedBackbone(f"{method} cannot be sharded: it {why}")


def _shard(part: SideModel, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard

    blocks: list[Any] = _blocks(part)
    whole = _kept_whole(part, blocks)
    units = [unit for unit in [*_tables(part, blocks), *blocks] if any(p not in whole for p in unit.parameters())]
    part.attachment.hooks.remove()  # they are put on again behind FSDP's, so that a pass may end at any of them
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        unit.register_forward_hook(free)
    root = Root(units)
    fully_shard(root, mesh=mesh, ignored_params=whole)
    part.attachment.hooks.put()
    root(lambda: None, again=False)  # the first call tells FSDP what the root is
    for unit in units:  # whole weights that are first made under inference_mode could not be used in training
        unit.unshard()
        unit.reshard()
    part.fold.within = root.run
    part.backbone._is_fsdp_managed_module = True  # transformers' `generate` waits for the longest text of all processes


def free(unit: Any, args: Any, output: Any) -> None:
    """Free what a unit has gathered if nothing of its pass will be needed in backward.

    FSDP does that by itself, but not in a pass inside backward, which it takes for a recomputation.
    """
    if not torch.is_grad_enabled():
        unit.reshard()


def _blocks(part: SideModel) -> list[nn.Module]:
    """The blocks, each once."""
    return list(dict.fromkeys(place.module for place in part.places if place.site.kind == "block"))


def _frozen(part: SideModel, block: nn.Module) -> bool:
    return any(not parameter.requires_grad for parameter in block.parameters())


def _tables(part: SideModel, blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """The table of tokens. One that is tied to a head stays whole, because heads are not run by the trunk."""
    trunk = part.trunk
    if not isinstance(trunk, PreTrainedModel) or trunk.main_input_name != "input_ids":
        return
    table = trunk.get_input_embeddings()
    if isinstance(table, nn.Embedding) and not any(table in block.modules() for block in blocks):
        yield table


def _kept_whole(part: SideModel, blocks: list[nn.Module]) -> set[nn.Parameter]:
    """Parameters that are in no unit.

    These are what is trained, what is the task's own besides, what several modules share, and single numbers.
    """
    own = {id(tensor) for tensor in part.trained.stored.values()}
    named = [*part.backbone.named_parameters(remove_duplicate=False)]
    modules = {id(module): module for module in part.backbone.modules()}.values()
    uses = Counter(id(p) for module in modules for p in module.parameters(recurse=False))
    return {p for _, p in named if p.requires_grad or id(p) in own or uses[id(p)] > 1 or p.ndim == 0}


def _put_rest(model: nn.Module, mesh: DeviceMesh) -> None:
    """Put what is not sharded on this process's device. Parameters stay the same objects."""
    device = torch.device(mesh.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, torch.accelerator.current_device_index())
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_shard(tensor) and tensor.device != device:
            tensor.data = tensor.data.to(device)
