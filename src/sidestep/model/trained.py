"""What a task trains of a backbone, and what it keeps as its own. It is unfrozen, listed, and put back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sidestep.backbone import Widened, device_of, head_tensors, in_pooler, new_parameters
from sidestep.backbone.quantised import identity_of
from sidestep.interface.offload import offloaded_tensors, values_in
from sidestep.interface.registry import Method
from sidestep.messages import some
from sidestep.methods import UnsupportedBackbone, WeightDelta
from sidestep.model.build import naming
from sidestep.model.outputs import gives_spans
from sidestep.model.settings import Settings
from sidestep.sparse.diff import SparseDiff


class Trained:
    """The backbone's tensors that a task trains or keeps.

    Making one unfreezes what is trained of a frozen backbone.

    Args:
        record: the method.
        settings: what was attached.
        backbone: frozen.
        trunk: the backbone without its own head.
        delta: the method, if it changes weights.
        through: whether the hidden states go on into the backbone's own head, or its own pooled output.

    Attributes:
        sparse: the diff that is trained in the place of weights, or None.
        originals: values from before, on the CPU, by the tensors' names in the backbone.
        wide: what of an own head is trained in float32.
    """

    def __init__(
        self,
        record: Method,
        settings: Settings,
        backbone: nn.Module,
        trunk: nn.Module,
        delta: WeightDelta | None,
        *,
        through: bool,
    ) -> None:
        self.backbone, self.trunk, self.settings, self.through = backbone, trunk, settings, through
        # A Sidestep head does not run through the backbone's own, nor through its pooler unless it reads that.
        new, own = new_parameters(backbone), own_head(backbone, trunk)
        unread: set[int] = set()
        if settings.head is not None:
            unread = own if through else beyond_trunk(backbone, trunk)
        moved = {id(p) for name, p in trunk.named_parameters() if delta and delta.moves(name, p)}
        unfit = unread | own | {id(p) for name, p in backbone.named_parameters() if name in new}
        self.sparse: SparseDiff | None = None
        if delta is not None:
            with naming(record, backbone):
                mine = moved - unfit
                self.sparse = delta.diff({name: p for name, p in trunk.named_parameters() if id(p) in mine})
        try:
            heads = self._unfreeze(unread, own, new, set() if self.sparse is not None else moved, delta)
            with naming(record, backbone):
                self.wide = Widened(backbone, heads)
            self.wide.put()
        except BaseException:
            self.release()
            raise

    def _unfreeze(
        self, unread: set[int], own: set[int], new: set[str], moved: set[int], delta: WeightDelta | None
    ) -> dict[str, nn.Parameter]:
        """Unfreeze what is trained and keep its values. Returns the trained parameters of an own head."""
        stored, heads, elsewhere = [], {}, offloaded_tensors(self.backbone)
        for name, parameter in self.backbone.named_parameters():
            if id(parameter) in unread:
                continue
            if head := self._trains_head(name, id(parameter) in own, new):
                heads[name] = parameter
            trained = head or id(parameter) in moved
            if trained and id(parameter) in elsewhere:
                raise UnsupportedBackbone(
                    f"{name} of {type(self.backbone).__name__} would be trained, and is offloaded: place it in memory "
                    "(device_map), train a head of Sidestep's (head=ss.Classify(...)), or pass train_head=False"
                )
            if self.sparse is None or not self.sparse.covers(parameter):
                parameter.requires_grad_(trained)
            if trained or name in new:
                stored.append(name)
        if delta is not None or self.settings.head is None:
            stored += _running_statistics(self.backbone, but=None if delta is not None else self.trunk)
        tensors = dict([*self.backbone.named_parameters(), *self.backbone.named_buffers()])
        # a backbone without values (a plan's, on the meta device) has none to keep
        place = "meta" if device_of(self.backbone).type == "meta" else "cpu"
        self.originals = {name: tensors[name].detach().to(place, copy=True) for name in stored}
        return heads

    def _trains_head(self, name: str, own: bool, new: set[str]) -> bool:
        """Whether a parameter of the backbone's own head (`own`) or of a pooler is trained."""
        if not (own or in_pooler(name)) or not self.through:
            return False
        if self.settings.train_head is not None:
            return self.settings.train_head and (own or name in new)
        timm = not isinstance(self.backbone, PreTrainedModel)
        known = "Classification" in type(self.backbone).__name__ or gives_spans(self.backbone)
        return name in new or (own and (timm or known))

    @property
    def stored(self) -> dict[str, Tensor]:
        """The backbone's tensors whose values are the task's own, by their names."""
        if not self.originals:  # a walk through the modules takes longer than a switch's other steps
            return {}
        tensors = dict([*self.backbone.named_parameters(), *self.backbone.named_buffers()])
        return {name: tensors[name] for name in self.originals}

    def values(self) -> dict[str, Tensor]:
        """Their values now."""
        return {name: tensor.detach().clone() for name, tensor in self.stored.items()}

    def put(self, values: dict[str, Tensor]) -> None:
        """The task's own values are in the backbone's tensors from here on."""
        self.wide.put()
        with torch.no_grad():
            for name, tensor in self.stored.items():
                tensor.copy_(values[name])
        if self.sparse is not None:
            self.sparse.hook()
            self.sparse.write()

    def put_back(self) -> None:
        """The backbone's tensors have the values of before, bit for bit."""
        self.wide.remove()
        if self.sparse is not None:
            self.sparse.revert()
            self.sparse.unhook()
        with torch.no_grad():
            for name, tensor in self.stored.items():
                tensor.copy_(self.originals[name])
                tensor.grad = None

    def release(self) -> None:
        """Take hooks off the weights, where `attach` fails."""
        if self.sparse is not None:
            self.sparse.unhook()
        if "wide" in vars(self):
            self.wide.remove()


def own_head(backbone: nn.Module, trunk: nn.Module) -> set[int]:
    """Identities of the parameters of the backbone's own head. A weight that is tied to the trunk's does not count."""
    inside = {id(p) for p in trunk.parameters()}
    return ({id(p) for p in backbone.parameters()} - inside) | head_tensors(trunk)


def beyond_trunk(backbone: nn.Module, trunk: nn.Module) -> set[int]:
    """Identities of the backbone's parameters behind the last hidden state: its own head, poolers."""
    return {id(p) for name, p in trunk.named_parameters() if in_pooler(name)} | own_head(backbone, trunk)


def tensors_beyond_trunk(
    backbone: nn.Module, trunk: nn.Module, *, own: bool, but: Collection[str]
) -> list[tuple[str, Tensor]]:
    """Tensors behind the last hidden state, `own` heads included, but for some names. Sorted by name."""
    beyond = beyond_trunk(backbone, trunk) - (set() if own else own_head(backbone, trunk))
    value_of = values_in(backbone)
    return [
        part
        for name, parameter in sorted(backbone.named_parameters(), key=lambda item: item[0])
        if id(parameter) in beyond and name not in but
        for part in identity_of(name, value_of(parameter), backbone.get_submodule(name.rpartition(".")[0]))
    ]


def precisions(backbone: nn.Module, trunk: nn.Module, delta: WeightDelta | None, wide: Widened) -> str:
    """The precisions of a backbone's weights without the task's, joined by "+". An own head counts as it was given."""
    inserted: set[int] = set()
    if delta is not None:
        inserted = {id(p) for name, p in trunk.named_parameters() if delta.plain_name(name) is None}
    own = [p for p in backbone.parameters() if p.is_floating_point() and id(p) not in inserted]
    return "+".join(sorted({str(wide.own_dtype(p)).removeprefix("torch.") for p in own}))


def check_state(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless `given` has the names and shapes of a task's `own` tensors. A diff has any size."""
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    shapes = {
        name: (tuple(value.shape), tuple(own[name].shape))
        for name, value in given.items()
        if name in own and value.shape != own[name].shape and not name.startswith("sparse.")
    }
    if missing or unexpected or shapes:
        raise ValueError(
            f"these weights are of another task: missing {some(missing)}; unexpected {some(unexpected)}; "
            f"other shapes {some(f'{name} {there} for {here}' for name, (there, here) in shapes.items())}"
        )


def _running_statistics(backbone: nn.Module, but: nn.Module | None) -> Iterator[str]:
    """Batch norms' buffers, which move in training mode. `but`: a part that stays in eval mode."""
    still = set() if but is None else set(but.modules())
    for path, module in backbone.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in still:
            yield from (f"{path}.{name}" for name, _ in module.named_buffers(recurse=False))
