"""The own head of a half-precision backbone, which is held and computed in float32 while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HALF = (torch.float16, torch.bfloat16)


class WideForward:
    """A module's `forward` in the precision of its weights, with a result in the precision of the input."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before = module, module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output for its arguments."""
        given = next(_precisions((args, kwargs)), None)
        wide = next(self.module.parameters()).dtype
        args, kwargs = _cast(args, wide), _cast(kwargs, wide)
        output = self._run(*args, **kwargs)
        return output if given is None else _cast(output, given)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


class WideBiasForward:
    """A linear map's `forward` where its bias alone is trained: the weight stays in half precision."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before = module, module.__dict__.get("forward")

    def __call__(self, hidden: Tensor) -> Tensor:
        """The output, in the precision of what goes in."""
        product = F.linear(hidden, self.module.get_parameter("weight"))
        return (product + self.module.get_parameter("bias")).to(product.dtype)


class Widened:
    """Parameters that are trained in float32 on a half-precision backbone, and the modules that compute with them.

    A parameter stays the same object, so what holds it (ties, lists of an optimizer) holds it still.

    Raises:
        ValueError: if a parameter is used by no module of its own, so that nothing could bring it and what it meets to
            one precision.
    """

    def __init__(self, backbone: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        half = {name: parameter for name, parameter in trained.items() if parameter.dtype in HALF}
        ids = {id(parameter) for parameter in half.values()}
        self._whole = [module for module in backbone.modules() if _consists_of(module, ids)]
        self._biased = [module for module in backbone.modules() if _has_only_bias_of(module, ids)]
        parts = [*(p for module in self._whole for p in module.parameters()), *(m.bias for m in self._biased)]
        covered = {id(part) for part in parts if isinstance(part, Tensor)}
        if missed := [name for name, parameter in half.items() if id(parameter) not in covered]:
            dtype = str(half[missed[0]].dtype).removeprefix("torch.")
            raise ValueError(
                f"{missed[0]} is trained, and it belongs to a module with frozen weights, so it cannot leave {dtype}. "
                f"Load the backbone in float32 (and train under {dtype} autocast), or pass train_head=False"
            )
        buffers = [b for module in self._whole for b in module.buffers() if b.dtype in HALF]
        self._tensors = [*half.values(), *{id(buffer): buffer for buffer in buffers}.values()]
        self._own = [tensor.dtype for tensor in self._tensors]
        # the first weight that is none of them shows whether somebody has cast the whole model meanwhile
        self._other = next((p for p in backbone.parameters() if id(p) not in ids and p.is_floating_point()), None)
        self._others = None if self._other is None else self._other.dtype

    def put(self) -> None:
        """Bring the parameters to float32."""
        with torch.inference_mode(False):
            for tensor in self._tensors:
                if tensor.dtype in HALF:
                    tensor.data = tensor.data.float()
        _wrap(self._whole, WideForward)
        _wrap(self._biased, WideBiasForward)

    def remove(self) -> None:
        """Bring them back to their own precision, unless the whole model has another one by now."""
        for module in (*self._whole, *self._biased):
            forward = module.__dict__.get("forward")
            if isinstance(forward, WideForward | WideBiasForward):
                del module.forward
                if forward.before is not None:
                    module.forward = forward.before
        if self._other is not None and self._other.dtype != self._others:
            return
        with torch.inference_mode(False):
            for tensor, own in zip(self._tensors, self._own, strict=True):
                tensor.grad = None
                if tensor.dtype == torch.float32:
                    tensor.data = tensor.data.to(own)

    def own_dtype(self, tensor: Tensor) -> torch.dtype:
        """The precision that a tensor of the backbone has but for this."""
        found = (own for one, own in zip(self._tensors, self._own, strict=True) if one is tensor)
        return next(found, tensor.dtype) if tensor.dtype == torch.float32 else tensor.dtype


def _wrap(modules: Sequence[nn.Module], kind: Callable[[nn.Module], Any]) -> None:
    for module in modules:
        module.forward = kind(module)


def _consists_of(module: nn.Module, ids: set[int]) -> bool:
    """Whether a module runs and has these parameters and no others."""
    own = [id(parameter) for parameter in module.parameters()]
    return bool(own) and set(own) <= ids and type(module).forward is not nn.Module.forward


def _has_only_bias_of(module: nn.Module, ids: set[int]) -> bool:
    """Whether a linear map has its bias among these parameters, and not its weight."""
    if type(module) is not nn.Linear or module.bias is None:
        return False
    return id(module.bias) in ids and id(module.weight) not in ids


def _precisions(value: Any) -> Iterator[torch.dtype]:
    """Those of the floating-point tensors in a value."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.dtype
    elif isinstance(value, list | tuple | dict):
        for part in _parts(value):
            yield from _precisions(part)


def _parts(value: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A value with its floating-point tensors in another precision."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        cast = {name: _cast(part, dtype) for name, part in value.items()}
        return cast if type(value) is dict else type(value)(**cast)
    if isinstance(value, list | tuple):
        parts = [_cast(part, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_make") else type(value)(parts)
    return value
