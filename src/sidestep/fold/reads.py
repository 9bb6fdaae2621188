"""Reads whose inputs autograd does not keep: the codes go on, and the taps' gradients are made in backward.

In the forward pass a hidden state is read without a graph. Its codes then become leaves of the strand's graph. Backward
first gives the gradients of all codes. Then each hidden state is had again, from where it waits (`forms.FORMS`) or from
a second pass of the frozen blocks. It is read again, and each tap's gradient is added up. Parameters get these
gradients by ordinary accumulation, so autocast, scaling, clipping, hooks and any optimizer work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from sidestep.fold.forms import Form
from sidestep.fold.home import Home
from sidestep.fold.passes import FoldError
from sidestep.interface.layers import matmul_precision
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""How far codes of a second pass may be from the first, relative to their norm, by the precision of what is read.

Equal kernels give equal bits. This leaves room for kernels that add up in another order, and none for noise.
"""


@dataclass
class Read:
    """One site's read.

    Attributes:
        site: with what belongs to the pass.
        shape, dtype, device: of the hidden state.
        precision: in which it was read.
        outputs: how many tensors its codes are.
        codes: of the first pass, where they are to be compared.
        draws: state of the random numbers before it, if it drew any.
        waiting: what waits of the hidden state. From the strand's settling to backward autograd holds it.
        held: how many tensors autograd holds.
        gradients: of the codes, in backward.
    """

    site: Site
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    precision: torch.dtype
    outputs: int
    codes: tuple[Tensor, ...] | None = None
    draws: Tensor | None = None
    waiting: tuple[Tensor, ...] = ()
    held: int = 0
    gradients: Sequence[Tensor | None] = ()


@dataclass
class Reads:
    """All reads of one pass of one method before its border.

    Attributes:
        method: the side network.
        form: in which hidden states wait. None: a second pass brings them.
        second_pass: runs the frozen blocks again and gives each hidden state to `weigh`.
        compares: whether the second pass's codes are compared with the first's.
        home: where the method is.

    Attributes:
        imagined: whether the pass has no values (a plan's).
    """

    method: SideNet
    form: Form | None
    second_pass: Callable[[Reads], None]
    compares: bool
    home: Home = field(default=Home())
    reads: list[Read] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        self.trains = self.method.training
        self.sums: list[Tensor | None] = []
        self.again = 0
        self.imagined = False
        self._cast: dict[str, Any] = {}

    # --- forward -------------------------------------------------------------------------------------------------

    def read(self, hidden: Tensor, site: Site) -> Any:
        """The codes of a hidden state, without a graph."""
        if not self.reads:
            self._cast = _autocast_of(hidden)
            self.imagined = isinstance(hidden, FakeTensor) or hidden.is_meta
        draws = self.trains and not self.imagined
        before = _random_state(hidden) if draws else None
        with torch.no_grad(), self.autocast():
            codes = self.home.read(self.method, hidden, site)
        tensors = tensors_of(codes)
        if not tensors:
            return codes
        precision = matmul_precision(hidden)
        one = Read(site, hidden.shape, hidden.dtype, hidden.device, precision, len(tensors))
        if self.compares and not self.imagined:
            one.codes = tensors
        if before is not None and not torch.equal(before, _random_state(hidden)):
            one.draws = before
        if self.form is not None:
            one.waiting = self.form.pack(hidden.detach())
        self.reads.append(one)
        return codes

    def root(self) -> Tensor:
        """What the codes of a pass hang from: its backward comes after all of theirs."""
        root: Tensor = _Root.apply(self, *self.parameters)
        return root

    def joined(self, root: Tensor, first: int, codes: Sequence[Any]) -> tuple[Tensor, ...]:
        """The tensors of some codes as leaves of a graph.

        Args:
            root: of this pass.
            first: the number of the first read that they are from. They are from all from there on.
            codes: what was read at each site.
        """
        flat = [tensor for one in codes for tensor in tensors_of(one)]
        if not flat:
            return ()
        packed: list[Tensor] = []
        if self.form is not None and self.form.watched:
            for one in self.reads[first:]:
                packed += one.waiting
                one.held, one.waiting = len(one.waiting), ()
        leaves: tuple[Tensor, ...] = _Codes.apply(self, first, root, len(packed), *packed, *flat)
        return leaves

    # --- backward ------------------------------------------------------------------------------------------------

    def receive(self, first: int, packed: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Take the gradients of the codes of all reads from `first` on, and what waits of their hidden states."""
        packed, gradients = list(packed), list(gradients)
        for one in self.reads[first:]:
            if not gradients:
                return
            one.gradients, gradients = gradients[: one.outputs], gradients[one.outputs :]
            if one.held:
                one.waiting, packed = tuple(packed[: one.held]), packed[one.held :]

    def weights(self) -> list[Tensor | None]:
        """The gradients of the method's parameters by all reads."""
        if self.method.training != self.trains:
            raise FoldError(
                "the model was switched between training and eval mode before backward. What is read again would be "
                "another thing: call model.train() or model.eval() after backward"
            )
        self.sums, self.again = [None] * len(self.parameters), 0
        try:
            if self.form is None:
                self.second_pass(self)
            else:
                for one in self.reads:
                    if any(gradient is not None for gradient in one.gradients):
                        of = {"shape": one.shape, "dtype": one.dtype, "device": one.device}
                        self._add(one, self.form.unpack(*one.waiting, **of))
        finally:
            for one in self.reads:
                one.gradients = ()
                one.waiting = () if one.held else one.waiting
        sums, self.sums = self.sums, []
        return sums

    @property
    def wide(self) -> int:
        """Bytes of all hidden states that were read."""
        return sum(one.shape.numel() * one.dtype.itemsize for one in self.reads)

    @property
    def complete(self) -> bool:
        """Whether the second pass has come by all sites that were read."""
        return self.again == len(self.reads)

    def weigh(self, hidden: Tensor, site: Site) -> None:
        """In the second pass: add what this site's read gives to the gradients.

        Raises:
            FoldError: if the codes are not those of the first pass.
        """
        one = self.reads[self.again]
        if (site.stack, site.kind, site.index) != (one.site.stack, one.site.kind, one.site.index):
            return  # nothing was read here
        self.again += 1
        self._add(one, hidden)

    def _add(self, one: Read, hidden: Tensor) -> None:
        with torch.enable_grad(), self.autocast(), _drawing_again(one, hidden):
            codes = tensors_of(self.home.read(self.method, hidden.detach(), one.site))
        if one.codes is not None:
            self._compare(one, codes)
        pairs = [
            pair for pair in zip(codes, one.gradients, strict=False) if pair[0].requires_grad and pair[1] is not None
        ]
        if not pairs:
            return
        outputs, gradients = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, self.parameters, gradients, allow_unused=True)
        for number, gradient in enumerate(found):
            if gradient is not None:
                so_far = self.sums[number]
                self.sums[number] = gradient if so_far is None else so_far + gradient

    def _compare(self, one: Read, codes: Sequence[Tensor]) -> None:
        assert one.codes is not None
        first, one.codes = one.codes, None
        for ours, theirs in zip(codes, first, strict=True):
            if ours.shape != theirs.shape:
                raise FoldError(_differs(one.site, f"shape {tuple(ours.shape)} after {tuple(theirs.shape)}"))
            wide = torch.promote_types(theirs.dtype, torch.float32)
            off = torch.linalg.vector_norm((ours.detach() - theirs).to(wide))
            size = torch.linalg.vector_norm(theirs.to(wide))
            if not bool(off <= TOLERANCE[one.precision] * size):
                raise FoldError(_differs(one.site, f"by {float(off / size):.1e} of their norm"))

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The autocast of the forward pass.

        Without its cache, in which a weight that was cast without a graph would stay so.
        """
        with torch.autocast(**self._cast, cache_enabled=False) if self._cast else nullcontext():
            yield


class _Root(torch.autograd.Function):
    """One number that stands for the method's parameters. Backward gives each of these its gradient by all reads."""

    @staticmethod
    def forward(ctx: Any, reads: Reads, *parameters: Tensor) -> Tensor:
        ctx.reads = reads
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        _ = ctx.saved_tensors  # raises if an optimizer has changed one since
        return None, *ctx.reads.weights()


class _Codes(torch.autograd.Function):
    """The codes of some reads, as they are. Backward notes their gradients."""

    @staticmethod
    def forward(ctx: Any, reads: Reads, first: int, root: Tensor, count: int, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.reads, ctx.first, ctx.size, ctx.root = reads, first, len(tensors), (root.dtype, root.device)
        ctx.save_for_backward(*tensors[:count])
        return tuple(code.view_as(code) for code in tensors[count:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        ctx.reads.receive(ctx.first, ctx.saved_tensors, gradients)
        dtype, device = ctx.root
        return None, None, torch.zeros((), dtype=dtype, device=device), None, *[None] * ctx.size


def tensors_of(codes: Any) -> tuple[Tensor, ...]:
    """The tensors of what `SideNet.read` gives."""
    return () if codes is None else (codes,) if isinstance(codes, Tensor) else tuple(codes)


def form_of(codes: Any) -> int | None:
    """How the tensors of codes stand together: None for nothing, 0 for one tensor, else how many a tuple has."""
    return None if codes is None else 0 if isinstance(codes, Tensor) else len(codes)


def formed(form: int | None, tensors: Iterator[Tensor]) -> Any:
    """The next tensors in a form."""
    return None if form is None else next(tensors) if form == 0 else tuple(next(tensors) for _ in range(form))


def _autocast_of(x: Tensor) -> dict[str, Any]:
    """The autocast that runs on a tensor's device. Nothing if none does."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return {"device_type": kind, "dtype": torch.get_autocast_dtype(kind)} if on else {}


def _random_state(hidden: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(hidden.device) if hidden.device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _drawing_again(one: Read, hidden: Tensor) -> Iterator[None]:
    """The random numbers that a read drew in the first pass, and those after it as they are."""
    if one.draws is None:
        yield
        return
    devices = [hidden.device] if hidden.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if devices:
            torch.cuda.set_rng_state(one.draws, hidden.device)
        else:
            torch.set_rng_state(one.draws)
        yield


def _differs(site: Site, how: str) -> str:
    return (
        f"keep='replay' runs the frozen blocks twice, and at {site.kind} {site.index} of the {site.stack} the second "
        f"pass read something else than the first ({how}). Something in the model is random (noise, masking, routing, "
        "views of images made inside), keeps a state between passes, or runs other kernels. Turn that off, or choose "
        "another keep: 'int8' or 'bf16' take no second pass"
    )
