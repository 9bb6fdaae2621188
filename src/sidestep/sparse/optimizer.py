"""The optimizer of diff pruning's relaxed masks: nine words for each parameter, gradient included, instead of 17.

A backbone's weights are theta = p0 + z w with random gates z (`hard_concrete`). The release keeps copies of the model,
z w and the masks, and gradients of w and alpha beside that of theta. Here the parameter itself is theta, both gradients
come from its gradient where they are used, and the noise is made again. A step goes twice over the entries, in chunks.
The first sweep finds the norms by which the two kinds of gradients are cut. The second updates, draws the next mask and
writes theta. A mask holds from one step to the next, so gradients of several batches may be summed exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from sidestep.sparse.hard_concrete import HardConcrete, Penalty, sigmoid_slope
from sidestep.sparse.moments import BLOCK, EightBit, Float32
from sidestep.sparse.selection import CHUNK

ENTRIES = ("w", "alpha")
"""What is trained for each entry of a masked parameter, in float32."""

AVERAGES = {"average": True, "square": False}
"""What AdamW keeps of the gradients of each of `ENTRIES` ("w_average" and so on), and whether it has a sign."""


class DrawNoise(Protocol):
    """Uniform noise that depends on where it is used alone, as `hard_concrete.Noise`."""

    def __call__(self, draw: int, tensor: int, chunk: int, like: Tensor) -> Tensor:
        """Numbers from 0 to 1 of the shape of `like`."""


class DiffPruningOptimizer(Optimizer):
    """AdamW on w, on the gates' alpha, and on dense parameters (a head).

    First the penalty's gradient is added. Then gradients of w and of the dense parameters are cut to one global norm,
    and those of all alphas to another. The learning rate is that of w and of the dense parameters. Alpha's rate stays
    as it is. Epsilon matters: the penalty's gradient is of the order of 1e-8.

    Args:
        masked: the parameters with gates, by name, at their pretrained values. From now on each holds theta, until
            `restore` is called.
        dense: the parameters without gates.
        lr: of w and of the dense parameters.
        gate: the gates' shape.
        penalty: the L0 penalty.
        structured: whether a parameter has one gate for all of it besides those of its entries.
        alpha_init: alpha at first.
        alpha_rate: the learning rate of alpha.
        weight_decay: of w and of the dense parameters.
        max_norm: where the two global norms are cut. At 0 they are not cut.
        betas: of all averages.
        eps: of all updates.
        state_bits: 32, or 8 for averages of the masked parameters' gradients as `averages.EightBit` keeps them.
        noise: the masks' noise: (draw, parameter, chunk, a tensor of the shape) -> uniform numbers.
        chunk: entries that are worked on at a time. The noise depends on this number.

    Attributes:
        relaxed: the parameters with gates.
    """

    def __init__(
        self,
        masked: Mapping[str, nn.Parameter],
        dense: Iterable[nn.Parameter] = (),
        *,
        lr: float,
        gate: HardConcrete,
        penalty: Penalty,
        structured: bool,
        alpha_init: float = 5.0,
        alpha_rate: float = 0.1,
        weight_decay: float = 0.0,
        max_norm: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        state_bits: int = 32,
        noise: DrawNoise,
        chunk: int = CHUNK,
    ) -> None:
        self.averages = EightBit() if state_bits == 8 else Float32()
        if state_bits == 8 and chunk % BLOCK:
            raise ValueError(f"averages in 8 bits need chunks of whole blocks of {BLOCK} entries, not of {chunk}")
        groups = [{"params": list(masked.values())}, {"params": list(dense)}]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "step": 0})
        self.alpha_rate, self.max_norm, self.betas, self.eps = alpha_rate, max_norm, betas, eps
        self.relaxed = []
        for number, (name, p) in enumerate(masked.items()):
            for entry, fill in zip(ENTRIES, (0.0, alpha_init), strict=True):
                self.state[p][entry] = torch.full((p.numel(),), fill, dtype=torch.float32, device=p.device)
                for average, signed in AVERAGES.items():
                    self.state[p] |= self.averages.zeros(f"{entry}_{average}", self.state[p][entry], signed=signed)
            if structured:
                self.state[p]["group"] = torch.tensor([alpha_init, 0.0, 0.0], device=p.device)
            self.state[p]["base"] = p.detach().flatten().clone()
            self.relaxed.append(
                RelaxedWeight(name, p, self.state[p], gate, penalty, partial(noise, tensor=number), chunk)
            )
        for p in self._dense:
            for name in ("average", "square"):
                self.state[p][name] = torch.zeros_like(p, dtype=torch.float32)
        self._shorten()

    @property
    def steps(self) -> int:
        """Steps taken, which is also the number of the present draw of the masks."""
        return self.param_groups[0]["step"]

    @torch.no_grad()
    def draw(self) -> None:
        """Write theta for the present draw of the masks: the same bits whenever it is called between two steps."""
        for weight in self.relaxed:
            weight.write(self.steps)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the parameters their pretrained values back, bit for bit."""
        for weight in self.relaxed:
            weight.theta.copy_(weight.base)

    @torch.no_grad()
    def masks(self) -> Iterator[tuple[str, int, Tensor]]:
        """The present gates, a parameter's own included: its name, where a chunk begins, and its entries."""
        for weight in self.relaxed:
            for span, z in weight.masks(self.steps):
                yield weight.name, span.start, z

    @torch.no_grad()
    def diffs(self) -> Iterator[tuple[str, int, Tensor]]:
        """The present z w in the same way."""
        for weight in self.relaxed:
            for span, diff in weight.diffs(self.steps):
                yield weight.name, span.start, diff

    def weights(self) -> dict[str, Tensor]:
        """w without its gates, flat, by name."""
        return {weight.name: weight.state["w"] for weight in self.relaxed}

    @torch.no_grad()
    def penalty_value(self) -> float:
        """The L0 penalty, with its weight."""
        return sum(float(weight.penalty_value()) for weight in self.relaxed)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update from the gradients of theta, and the next draw of the masks."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        w_cut, alpha_cut, group_gradients = self._cuts()
        masked, dense = self.param_groups
        for weight, of_group in zip(self.relaxed, group_gradients, strict=True):
            for span, of_w, of_alpha, _ in weight.sweep(self.steps):
                self._update(weight.state, "w", span, of_w.mul_(w_cut), masked["lr"], masked["weight_decay"])
                self._update(weight.state, "alpha", span, of_alpha.mul_(alpha_cut), self.alpha_rate)
            if of_group is not None:
                self._adamw(*_with_gradient(weight.state["group"], of_group * alpha_cut), self.alpha_rate)
        for p in self._dense:
            if p.grad is not None:
                average, square = self.state[p]["average"], self.state[p]["square"]
                self._adamw(p, p.grad.float() * w_cut, average, square, dense["lr"], dense["weight_decay"])
        masked["step"] += 1
        self.draw()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state without the pretrained values, with which another optimizer begins anyway."""
        saved = super().state_dict()
        saved["state"] = {
            index: {name: value for name, value in kept.items() if name != "base"}
            for index, kept in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a saved state in place and in float32, and write theta for it."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
            for p, index in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"][index].items():
                    self.state[p][name].copy_(value)
        self.draw()

    def _shorten(self) -> None:
        """Leave steps of a plan, on tensors without values, a few chunks: they take as much memory as all do."""
        longest = max(self.relaxed, key=lambda weight: len(weight.theta))
        if isinstance(longest.theta, FakeTensor):
            longest.theta = longest.theta[: 3 * longest.chunk]
            self.relaxed = [longest]

    @property
    def _dense(self) -> list[nn.Parameter]:
        return self.param_groups[1]["params"]

    def _cuts(self) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The first sweep: what gradients of w and of alpha are multiplied with, and the gradients of groups."""
        of_w, of_alpha, of_groups = [], [], []
        for weight in self.relaxed:
            sums = torch.zeros(2, dtype=torch.float64, device=weight.theta.device)
            for _, w, alpha, share in weight.sweep(self.steps):
                of_w.append(torch.linalg.vector_norm(w))
                of_alpha.append(torch.linalg.vector_norm(alpha))
                sums += share
            of_groups.append(weight.group_gradient(self.steps, sums))
        of_alpha += [group.abs() for group in of_groups if group is not None]
        of_w += [torch.linalg.vector_norm(p.grad.float()) for p in self._dense if p.grad is not None]
        return self._cut(of_w), self._cut(of_alpha), of_groups

    def _cut(self, norms: list[Tensor]) -> Tensor:
        total = torch.linalg.vector_norm(torch.stack(norms))
        # with the summand of torch's clip_grad_norm_
        return (self.max_norm / (total + 1e-6)).clamp_(max=1.0) if self.max_norm else torch.ones_like(total)

    def _update(
        self, state: Mapping[str, Tensor], entry: str, span: slice, grad: Tensor, rate: float, decay: float = 0.0
    ) -> None:
        """One update of a chunk of w or alpha, and of its averages."""
        kept = {
            name: self.averages.read(state, f"{entry}_{name}", span, signed=signed) for name, signed in AVERAGES.items()
        }
        self._adamw(state[entry][span], grad, kept["average"], kept["square"], rate, decay)
        for name, signed in AVERAGES.items():
            self.averages.write(kept[name], state, f"{entry}_{name}", span, signed=signed)

    def _adamw(
        self, value: Tensor, grad: Tensor, average: Tensor, square: Tensor, rate: float, decay: float = 0.0
    ) -> None:
        """One update in place, as torch's AdamW computes it."""
        (first, second), step = self.betas, self.steps + 1
        value.mul_(1 - rate * decay)
        average.lerp_(grad, 1 - first)
        square.mul_(second).addcmul_(grad, grad, value=1 - second)
        root = square.sqrt().div_(math.sqrt(1 - second**step)).add_(self.eps)
        value.addcdiv_(average, root, value=-rate / (1 - first**step))


def _with_gradient(group: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alpha, average, square = group.unbind()
    return alpha, grad, average, square


class RelaxedWeight:
    """A parameter theta = p0 + z w, with a gate for each entry and perhaps one for all of it.

    All that goes over its entries does so in chunks, and takes the number of the draw whose masks are meant.

    Args:
        name: the parameter's.
        parameter: holds theta.
        state: "base", which is p0, and `ENTRIES`, all flat. With a gate for all of it also "group": that gate's alpha
            and its two averages.
        gate: the gates' shape.
        penalty: the L0 penalty.
        noise: (draw, chunk=..., like=...) -> uniform numbers.
        chunk: entries of a chunk.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        state: Mapping[str, Tensor],
        gate: HardConcrete,
        penalty: Penalty,
        noise: Callable[..., Tensor],
        chunk: int,
    ) -> None:
        self.name, self.parameter, self.state = name, parameter, state
        self.theta, self.base = parameter.detach().view(-1), state["base"]
        self.gate, self.penalty, self.noise, self.chunk = gate, penalty, noise, chunk

    def masks(self, draw: int) -> Iterator[tuple[slice, Tensor]]:
        """z, the whole parameter's gate included."""
        group = self.group_mask(draw)
        for number, span in self._chunks():
            alpha = self.state["alpha"][span]
            z = self.gate.mask(alpha, self.noise(draw, chunk=number, like=alpha))
            yield span, z if group is None else z.mul_(group)

    def diffs(self, draw: int) -> Iterator[tuple[slice, Tensor]]:
        """z w."""
        for span, z in self.masks(draw):
            yield span, z.mul_(self.state["w"][span])

    def write(self, draw: int) -> None:
        """Set theta."""
        for span, diff in self.diffs(draw):
            self.theta[span] = diff.add_(self.base[span])

    def sweep(self, draw: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Gradients of w and alpha, the penalty's included, and shares of the two sums for `group_gradient`.

        The sums are those of dL/dtheta w z and of the entries' probabilities. Once a chunk
        was given, its alpha and w may be changed. The whole parameter's gate may be changed only after all chunks.
        """
        group = self.group_mask(draw)
        factor = self.penalty.entry_factor(self._group_nonzero())
        for number, span in self._chunks():
            w, alpha, grad = self.state["w"][span], self.state["alpha"][span], self._gradient(span)
            z, slope = self.gate.mask_and_slope(alpha, self.noise(draw, chunk=number, like=alpha))
            of_w, of_alpha = z.mul_(grad), slope.mul_(grad).mul_(w)
            through_group = torch.dot(of_w, w)
            if group is not None:
                of_w.mul_(group)
                of_alpha.mul_(group)
            p = self.gate.nonzero(alpha)
            # exact enough within a chunk: only the sum of all chunks needs more digits
            sums = torch.stack([through_group, p.sum()]).double()
            yield span, of_w, of_alpha.add_(sigmoid_slope(p).mul_(factor)), sums

    def group_gradient(self, draw: int, sums: Tensor) -> Tensor | None:
        """The gradient of the whole parameter's alpha from the sums over a sweep, the penalty's included."""
        if "group" not in self.state:
            return None
        alpha = self.state["group"][0]
        through_group, expected = sums.float()
        slope = self.gate.mask_and_slope(alpha, self.noise(draw, chunk=0, like=alpha))[1]
        charge = sigmoid_slope(self.gate.nonzero(alpha)) * self.penalty.group_factor(expected)
        return slope * through_group + charge

    def group_mask(self, draw: int) -> Tensor | None:
        """The whole parameter's gate, or None."""
        if "group" not in self.state:
            return None
        alpha = self.state["group"][0]
        return self.gate.mask(alpha, self.noise(draw, chunk=0, like=alpha))

    def penalty_value(self) -> Tensor:
        """This parameter's part of the L0 penalty, with its weight."""
        parts = [self.gate.nonzero(part).sum(dtype=torch.float64) for part in self.state["alpha"].split(self.chunk)]
        return self.penalty.value(torch.stack(parts).sum(), self._group_nonzero())

    def _group_nonzero(self) -> Tensor | None:
        return self.gate.nonzero(self.state["group"][0]) if "group" in self.state else None

    def _gradient(self, span: slice) -> Tensor:
        grad = self.parameter.grad
        # what no output depends on still costs its penalty
        return torch.zeros_like(self.state["w"][span]) if grad is None else grad.reshape(-1)[span].float()

    def _chunks(self) -> Iterator[tuple[int, slice]]:
        """Numbers from 1, which leaves 0 for the whole parameter's gate, and places."""
        for number, start in enumerate(range(0, len(self.theta), self.chunk), start=1):
            yield number, slice(start, min(start + self.chunk, len(self.theta)))
