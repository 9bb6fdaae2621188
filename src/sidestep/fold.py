"""The fold: standing forward hooks that carry a method's state through the backbone's own loop.

No modelling file is forked: masks, rotary embeddings, caches, heads and `generate` are the model's own. The hooks do
nothing unless their `Fold` is running, so the bare backbone stays usable. What belongs to one forward pass lives in
a `Pass`, made at the backbone's entry and dropped at its exit.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle
from transformers.utils import ModelOutput

from sidestep.backbone import Facts, StackFacts, as_given, as_tokens
from sidestep.backbone.calls import argument_names, bound
from sidestep.caches import SideCache, claim
from sidestep.families import Pool, TokenGrid
from sidestep.layers import last_kept, masked_mean
from sidestep.methods.base import SideNet
from sidestep.padding import kept_tokens, own_tokens
from sidestep.sites import Place, Site

KEY_VALUES = "past_key_values"
"""Name of a key-value cache among a model's inputs."""
#: Field of `encoder_outputs` in which an encoder's side state travels to the decoder.
CARRIED = "side_state"


@dataclass(frozen=True)
class Reading:
    """What a head reads after a pass.

    Attributes:
        hidden: (batch, tokens, width) output of the stack that the head reads; one token if the fold is narrowed.
        site: the end of that stack, with the pass's padding and grid.
        pooled: (batch, width) read-out of the method's own, or None.
        correct: the method's correction of the vector that the head makes of all this, or None.
    """

    hidden: Tensor
    site: Site
    pooled: Tensor | None
    correct: Callable[[Tensor], Tensor] | None = None

    def corrected(self, vector: Tensor) -> Tensor:
        """The head's vector (batch, features) as the method would have it."""
        return vector if self.correct is None else self.correct(vector)


@dataclass
class Pass:
    """What one forward pass carries; `began` is the outermost module of it."""

    inputs: Mapping[str, Any]
    began: nn.Module
    stack: str | None = None
    visited: int = 0
    written: bool = False
    state: Any = None
    carried: Tensor | None = None
    grid: tuple[int, int] | None = None
    past: int = 0
    cache: SideCache | None = None
    cached: bool = False
    row: Tensor | None = None
    output: Tensor | None = None
    reading: Reading | None = None


class FoldError(RuntimeError):
    """The backbone's loop did not do what a fold needs; the message says where and what to do."""


class Fold:
    """Runs one method over the sites of one backbone.

    Args:
        entry: the module whose call is a pass (the backbone, or its trunk when another head is put on).
        trunk: the backbone without its head.
        places: the backbone's sites, in order.
        method: the side network.
        facts: what the backbone is.
        grid: tells the token grid at a site, where hidden states have no rows and columns of their own.
        narrow: "cls" or "last": only the token that the head reads is given to the method; None: all tokens.
        mean_first: the head reads the mean of the tokens before the final norm, which norms nothing else.
        through: whether a narrowed hidden state also goes on through the backbone's own norm and head (only where the
            family table knows that they take it); else they get all tokens and their result is not used.
        frozen: whether nothing before the method's first write may require a gradient.
        late: whether blocks come after that write: their keys and values in a cache are then of this task alone.
        pools: whether a Sidestep head reads the tokens, which has to know the padding.
    """

    def __init__(
        self,
        entry: nn.Module,
        trunk: nn.Module,
        places: Sequence[Place],
        method: SideNet,
        facts: Facts,
        grid: TokenGrid,
        *,
        narrow: Pool | None,
        mean_first: bool,
        through: bool,
        frozen: bool,
        late: bool,
        pools: bool,
    ) -> None:
        self.trunk, self.method, self.facts, self.grid, self.pools = trunk, method, facts, grid, pools
        self.narrow, self.mean_first, self.through, self.frozen = narrow, mean_first, through, frozen
        # a string, which copies of this fold and of a cache share
        self.late, self.name = late, uuid.uuid4().hex
        self.running, self.attached, self.checked = False, False, False
        self.current: Pass | None = None
        self.finished: Pass | None = None
        self.carries = type(method).carry is not SideNet.carry
        self.last_stack = places[-1].site.stack
        self.lengths = _lengths(places)
        self.entry, self.places = entry, places
        self.put()

    def run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Reading | None]:
        """`call(*args, **kwargs)` with the method active: its result, and what the head reads of the last pass.

        Raises:
            FoldError: if another call is running (one model serves one thread at a time), or the hooks are gone.
        """
        self.require_attached()
        if self.running:
            raise FoldError("this model is in the middle of another call: use one model per thread")
        self.running = True
        try:
            output = call(*args, **kwargs)
            return output, None if self.finished is None else self.finished.reading
        finally:
            self.running, self.current, self.finished = False, None, None

    def require_attached(self) -> None:
        """Raise if the hooks were taken off: the backbone alone would answer, without the task."""
        if not self.attached:
            raise FoldError(
                "this model was detached from its backbone: call ss.attach (or ss.load) again, or activate "
                "its task in the bank"
            )

    def put(self) -> None:
        """Put the hooks on the backbone."""
        self.attached = True
        self.handles = self._hook(self.entry, self.places)

    def remove(self) -> None:
        """Take every hook off the backbone."""
        self.attached = False
        for handle in self.handles:
            handle.remove()

    def _hook(self, entry: nn.Module, places: Sequence[Place]) -> list[RemovableHandle]:
        handles = [self.trunk.register_forward_hook(CheckOutput(self))]
        for module in (entry,) if entry is self.trunk else (entry, self.trunk):
            handles += [
                module.register_forward_pre_hook(Begin(self, argument_names(module)), with_kwargs=True),
                module.register_forward_hook(End(self)),
            ]
        orders: dict[str, int] = {}
        for place in places:
            order = orders[place.site.stack] = orders.get(place.site.stack, -1) + 1
            handles += self._hook_place(place, order)
        if len(orders) > 1:
            encoder = self.trunk.get_submodule("encoder")
            handles += [
                encoder.register_forward_pre_hook(BeginEncoder(self, argument_names(encoder)), with_kwargs=True),
                encoder.register_forward_hook(EndEncoder(self)),
            ]
        return handles

    def _hook_place(self, place: Place, order: int) -> list[RemovableHandle]:
        site, module = place.site, place.module
        names = argument_names(module)
        if site.kind == "stage":
            return [module.register_forward_pre_hook(AtStage(self, site, order, names), with_kwargs=True)]
        if site.kind == "norm":
            handles = [module.register_forward_hook(AtNorm(self, site, order))]
            if self.mean_first and site.head:
                handles.append(module.register_forward_pre_hook(BeforeNorm(self, site, order)))
            return handles
        handles = [module.register_forward_hook(AtBlock(self, site, order, names), with_kwargs=True)]
        cross_attends = len(self.lengths) > 1 and site.stack == "decoder"
        if cross_attends and type(self.method).memory is not SideNet.memory:
            handles.append(module.register_forward_pre_hook(AtMemory(self, site, names), with_kwargs=True))
        return handles

    # --- one pass ------------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Start a pass with a module's inputs by name: the backbone's, or those of a trunk or encoder that runs alone.

        In a pass, note what the trunk itself is given: a model may reshape its inputs first (multiple choice).
        """
        if self.current is not None:
            self.current.inputs = {**self.current.inputs, **inputs}
            return
        self.current = Pass(inputs=inputs, began=module)
        given = inputs.get("encoder_outputs")
        if given is not None and self.carries:
            carried = given.get(CARRIED) if isinstance(given, Mapping) else None
            if carried is None:
                raise FoldError(
                    "encoder_outputs were computed without this task: let the model run its own encoder, "
                    "or generate through the attached model"
                )
            self.current.carried = carried

    def end(self) -> None:
        """Finish a pass: every site of the last stack must have been seen."""
        current = self.current
        assert current is not None
        if current.stack != self.last_stack or current.visited != self.lengths[self.last_stack]:
            raise FoldError(
                f"the backbone ended its pass after {current.visited} of {self.lengths[self.last_stack]} sites of "
                f"its {self.last_stack}: a model that skips blocks or its final norm cannot be folded over"
            )
        self.finished, self.current = current, None

    def check(self, given: Tensor, training: bool) -> None:
        """Once, compare what the last site let go with what the trunk gave as its last hidden state.

        Raises:
            FoldError: if they differ: the final norm was found wrongly, so a head would read something else.
        """
        passed = self.current or self.finished
        if self.checked or training or passed is None or passed.output is None:
            return  # in training, the trunk's own dropout may stand between the two
        self.checked, layout = True, self.facts.head.layout
        if not self.facts.head.ends or given.ndim != passed.output.ndim:
            return  # what follows was seen, and no head of Sidestep reads this
        ours = passed.output
        if given.shape != ours.shape:
            ours, given = as_tokens(ours, layout), as_tokens(given, "tokens")
        if ours is given or isinstance(given, FakeTensor) or ours.shape != given.shape or torch.equal(ours, given):
            return
        raise FoldError(_wrong_norm(self.last_stack, "the trunk's last hidden state is not what came out of it"))

    def is_turn(self, site: Site, order: int) -> bool:
        """Whether a norm is called as the end of its stack: a model may use the same one before its blocks too."""
        current = self.current
        return current is not None and (current.stack, current.visited) == (site.stack, order)

    def visit(self, site: Site, order: int) -> Pass:
        """Count a site, starting its stack at the first.

        Raises:
            FoldError: if sites come twice, out of order, or outside a pass.
        """
        current = self.current
        if current is None:
            raise FoldError("a block ran outside the backbone's own forward: call the attached model")
        if current.stack != site.stack and order == 0:
            current.stack, current.visited = site.stack, 0
            current.state = self.method.start(site, current.carried)
        if current.stack != site.stack or current.visited != order:
            raise FoldError(
                f"block {site.index} of the {site.stack} ran out of turn (site {order}, expected {current.visited}):"
                " blocks that run twice (shared layers) or are skipped (layer drop) cannot be folded over"
            )
        current.visited += 1
        return current

    def seen(self, site: Site, hidden: Tensor, call: Mapping[str, Any]) -> Site:
        """The site with what this pass adds: padding, grid, cache.

        Args:
            site: as it was found.
            hidden: as the backbone hands it on there.
            call: the arguments of the block there, by name.

        Raises:
            ValueError: if the padding matters, and the mask does not say it token by token.
        """
        assert self.current is not None
        facts, inputs = self.facts.stacks[site.stack], self.current.inputs
        states = as_tokens(hidden, facts.layout)
        tokens = states.shape[1]
        decoding = len(self.lengths) > 1 and site.stack == "decoder"
        if site.kind == "stage":
            self._open_cache(self.current, site, call, tokens)
        if site.kind != "norm":
            self.current.grid = self._grid_at(facts, inputs, call, hidden)
        grid, past, cache = self.current.grid, self.current.past, self.current.cache
        mask = inputs.get("decoder_attention_mask" if decoding else "attention_mask") if grid is None else None
        matters = self.pools or not self.method.tokenwise
        if mask is not None and facts.added is not None and matters:
            self._check_mask(mask)
        text, open_ended = self._text_tokens(decoding), self.current.cached or not matters
        keep = kept_tokens(mask, states, tokens, text, facts.added, past if open_ended else None)
        return site.during(
            keep=keep,
            key_keep=keep if cache is None else kept_tokens(mask, states, past + tokens, None, facts.added, 0),
            memory_keep=self._memory_keep(inputs.get("attention_mask")) if decoding else None,
            grid=grid,
            past=past,
            cache=cache,
        )

    def _grid_at(
        self, facts: StackFacts, inputs: Mapping[str, Any], call: Mapping[str, Any], hidden: Tensor
    ) -> tuple[int, int] | None:
        """Rows and columns of the tokens: those of the hidden state, or as the family says."""
        if hidden.ndim == 4:
            rows, columns = hidden.shape[2:] if facts.layout == "channels" else hidden.shape[1:3]
            return rows, columns
        return self.grid(self.trunk, inputs, call, hidden)

    def _text_tokens(self, decoding: bool) -> int | None:
        """How many tokens a stack's text has; None where it reads no text."""
        assert self.current is not None
        names = ("decoder_input_ids", "decoder_inputs_embeds") if decoding else ("input_ids", "inputs_embeds", "inputs")
        given = (self.current.inputs.get(name) for name in names)
        text = next((tensor for tensor in given if isinstance(tensor, Tensor) and tensor.ndim > 1), None)
        return None if text is None else text.shape[1]

    def _memory_keep(self, mask: Any) -> Tensor | None:
        """Which of the encoder's tokens are real, as the method carries them."""
        assert self.current is not None
        carried, added = self.current.carried, self.facts.stacks["encoder"].added
        if carried is None:
            return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and added is not None else None
        return kept_tokens(mask, carried, carried.shape[1], None, added, None)

    def _check_mask(self, mask: Any) -> None:
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return
        what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
        who = "the head reads" if self.method.tokenwise else f"{type(self.method).__name__} mixes"
        raise ValueError(
            f"an attention_mask {what}, but {who} tokens and has to know which are padding: give a mask of (batch, "
            "tokens), 1 for tokens and 0 for padding"
        )

    def _open_cache(self, current: Pass, site: Site, call: Mapping[str, Any], tokens: int) -> None:
        """Note at a stack's start what its key-value cache holds: the blocks add this pass's tokens on the way.

        Raises:
            FoldError: if it holds tokens and the method cannot go on from them.
            ValueError: if others filled it, and this task's blocks would read what those made.
        """
        current.past, current.cache = 0, None
        self._check_other_caches(current.inputs)
        current.cached = any(current.inputs.get(name) is not None for name in self.facts.caches)
        cache = None
        if site.stack == self.last_stack:
            given = (call.get("past_key_values"), call.get("layer_past"), current.inputs.get("past_key_values"))
            cache = next((one for one in given if one is not None), None)
        if cache is None or not _counts(cache):
            return
        current.cached = True
        current.past = cache.get_seq_length()
        if self.method.caches:
            current.cache = SideCache(cache, site.depth, current.past)
        elif not self.method.tokenwise and current.past:
            raise FoldError(
                f"the key-value cache holds {current.past} tokens, and {type(self.method).__name__} mixes tokens "
                "without keeping what it knew of them: pass the whole sequence and use_cache=False"
            )
        if self.late:
            claim(cache, self.name, current.past, tokens)

    def _check_other_caches(self, inputs: Mapping[str, Any]) -> None:
        """Refuse what a model remembers of earlier tokens where no method can add to it.

        Raises:
            FoldError: if there is any, and the method mixes tokens.
        """
        other = [name for name in self.facts.caches if name != KEY_VALUES and inputs.get(name) is not None]
        if other and not self.method.tokenwise:
            raise FoldError(
                f"{other[0]} holds what the model knows of earlier tokens, and {type(self.method).__name__} mixes "
                "tokens without keeping what it knew of them: pass the whole sequence and use_cache=False"
            )

    def as_tokens(self, hidden: Tensor, site: Site) -> Tensor:
        """A module's hidden state, seen as (batch, tokens, width)."""
        return as_tokens(hidden, self.facts.stacks[site.stack].layout)

    def as_given(self, tokens: Tensor, given: Tensor, site: Site) -> Tensor:
        """Tokens in the layout of the hidden state that they stand in for."""
        return as_given(tokens, given, self.facts.stacks[site.stack].layout)

    def narrowed(self, hidden: Tensor, site: Site) -> tuple[Tensor, Site]:
        """Only the token that the head reads, copied so that its neighbours' storage is not kept."""
        if self.narrow is None or not site.head:
            return hidden, site
        if self.narrow == "cls" or site.keep is None:
            first = hidden[:, self._text_start(site) :]
            row = first[:, :1] if self.narrow == "cls" else hidden[:, -1:]
            return row.clone(memory_format=torch.contiguous_format), single_token(site)
        return take_rows(hidden, last_kept(site.keep)), single_token(site)

    def _text_start(self, site: Site) -> int:
        """Where a text's first token stands among those of a stack whose own output leaves out what it added."""
        added = self.facts.stacks[site.stack].added
        return added.before if added is not None and added.cropped else 0

    def _own_tokens(self, site: Site, tokens: Tensor) -> slice:
        """Which of a stack's tokens are in its own output."""
        decoding = len(self.lengths) > 1 and site.stack == "decoder"
        return own_tokens(tokens.shape[1], self._text_tokens(decoding), self.facts.stacks[site.stack].added)

    def step(self, current: Pass, hidden: Tensor, site: Site) -> Tensor:
        """The method's step, with the guards on the batch and on what lies before its first write."""
        if self.method.training and hidden.shape[0] < self.method.least_rows:
            raise ValueError(
                f"{hidden.shape[0]} row in a batch, but {type(self.method).__name__} has batch norms on this backbone, "
                f"which are trained on {self.method.least_rows} or more: give larger batches, or call model.eval()"
            )
        if self.frozen and not current.written and hidden.requires_grad and torch.is_grad_enabled():
            raise FoldError(
                f"the hidden state at {site.kind} {site.index} of the {site.stack} requires a gradient before the "
                "method's first write, so the whole backbone would be kept for backward: do not call "
                "enable_input_require_grads, and keep the embeddings frozen"
            )
        current.state, written = self.method.step(current.state, hidden, site)
        current.written |= written is not hidden
        return written

    def finish(self, current: Pass, raw: Tensor, normed: Tensor, site: Site) -> Tensor:
        """The method's finish; what the head or the decoder reads is noted."""
        output = self.method.finish(current.state, raw, normed, site)
        current.written |= output is not normed
        if site.head:
            correct = partial(self.method.correct, current.state, site) if self.method.corrects else None
            pooled, own = self.method.pooled(current.state, site), self._own_tokens(site, output)
            keep = site.keep if site.keep is None else site.keep[:, own]
            current.reading = Reading(output[:, own], replace(site, keep=keep), pooled, correct)
        elif (carried := self.method.carry(current.state)) is not None:
            current.carried = carried[:, self._own_tokens(site, carried)]
        else:
            current.carried = None
        return output


# --- hooks: module-level classes, so that a hooked model can be copied and pickled ------------------------------------


@dataclass(eq=False)
class Hook:
    """A standing hook; does nothing unless its fold is running."""

    fold: Fold


@dataclass(eq=False)
class Begin(Hook):
    """Before the backbone and before its trunk: start a pass."""

    names: list[str]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.fold.running:
            self.fold.begin(module, bound(self.names, args, kwargs))


@dataclass(eq=False)
class End(Hook):
    """After the module at which the pass began: end it."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.fold.running and self.fold.current is not None and self.fold.current.began is module:
            self.fold.end()


@dataclass(eq=False)
class CheckOutput(Hook):
    """After the trunk's first pass: its last hidden state is what the fold took for it."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.fold.running and not torch.compiler.is_compiling():
            given = output.get("last_hidden_state") if isinstance(output, ModelOutput) else None
            if given is not None:
                self.fold.check(given, module.training)


@dataclass(eq=False)
class BeginEncoder(Hook):
    """Before the encoder: start a pass if `generate` runs it outside the trunk."""

    names: list[str]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.fold.running and self.fold.current is None:
            self.fold.begin(module, bound(self.names, args, kwargs))


@dataclass(eq=False)
class EndEncoder(Hook):
    """After an encoder that ran outside the trunk: its side state goes along in `encoder_outputs`."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        current = self.fold.current
        if not self.fold.running or current is None or current.began is not module:
            return
        if isinstance(output, ModelOutput) and current.carried is not None:
            output[CARRIED] = current.carried
        self.fold.current = None


@dataclass(eq=False)
class AtStage(Hook):
    """Before the first block of a stage."""

    site: Site
    order: int
    names: list[str]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not self.fold.running:
            return None
        current = self.fold.visit(self.site, self.order)
        call = bound(self.names, args, kwargs)
        given = call[self.names[0]]
        site = self.fold.seen(self.site, given, call)
        hidden = self.fold.as_tokens(given, self.site)
        read, narrow = self.fold.narrowed(hidden, site)
        written = self.fold.step(current, read, narrow)
        if written is read:
            return None
        return _with_argument(self.names, args, kwargs, self.names[0], self.fold.as_given(written, given, self.site))


@dataclass(eq=False)
class AtMemory(Hook):
    """Before a decoder block: what it reads of the encoder may be replaced."""

    site: Site
    names: list[str]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        current = self.fold.current
        if not self.fold.running or current is None:
            return None
        call = bound(self.names, args, kwargs)
        site = self.fold.seen(self.site, call[self.names[0]], call)
        memory = self.fold.method.memory(current.state, site)
        if memory is None:
            return None
        current.written = True
        return _with_argument(self.names, args, kwargs, "encoder_hidden_states", memory)


@dataclass(eq=False)
class AtBlock(Hook):
    """After a block; after the last one of a stack without a final norm, the stack's end too."""

    site: Site
    order: int
    names: list[str]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self.fold.running:
            return None
        fold, current = self.fold, self.fold.visit(self.site, self.order)
        element = fold.facts.stacks[self.site.stack].element
        given = output[element] if isinstance(output, tuple) else output
        site = fold.seen(self.site, given, bound(self.names, args, kwargs))
        read, narrow = fold.narrowed(fold.as_tokens(given, site), site)
        written = fold.step(current, read, narrow)
        if site.last and not site.final_norm:
            written = fold.finish(current, written, written, narrow)
        if fold.narrow and site.head:
            if not site.last:
                return None
            current.row = written
            current.output = written if fold.through else given
            return _with_element(output, element, current.output)
        current.output = given if written is read else fold.as_given(written, given, site)
        return None if written is read else _with_element(output, element, current.output)


@dataclass(eq=False)
class BeforeNorm(Hook):
    """Before the final norm, where the head reads the mean of what goes in: the tokens pass without their gradient."""

    site: Site
    order: int

    def __call__(self, module: nn.Module, args: Any) -> Any:
        current = self.fold.current
        if not self.fold.running or current is None or not self.fold.is_turn(self.site, self.order):
            return None
        raw = args[0]
        tokens = self.fold.as_tokens(raw, self.site)
        current.row = mean_tokens(tokens, self.fold.seen(self.site, raw, {}))[:, None]
        return (raw.detach(), *args[1:])


@dataclass(eq=False)
class AtNorm(Hook):
    """After the final norm: the stack's end."""

    site: Site
    order: int

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self.fold.running or not self.fold.is_turn(self.site, self.order):
            return None
        fold, raw = self.fold, args[0]
        current = fold.visit(self.site, self.order)
        if raw.shape[-1] != self.site.width or raw.ndim < 3:
            raise FoldError(_wrong_norm(self.site.stack, f"it got a tensor of shape {tuple(raw.shape)}"))
        site = fold.seen(self.site, raw, {})
        if current.row is None or not site.head:
            finished = fold.finish(current, fold.as_tokens(raw, site), fold.as_tokens(output, site), site)
            current.output = fold.as_given(finished, output, site)
            return current.output
        # Only the row that the head reads goes through the norm with its gradient.
        normed = output if fold.through else type(module).forward(module, current.row)
        finished = fold.finish(current, current.row, normed, single_token(site))
        current.output = finished if fold.through else output
        return current.output


# --- small parts ------------------------------------------------------------------------------------------------------


def take_rows(hidden: Tensor, index: Tensor) -> Tensor:
    """(batch, 1, width): one token of each row of (batch, tokens, width), copied."""
    return hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[-1]))


def mean_tokens(hidden: Tensor, site: Site) -> Tensor:
    """(batch, width): mean of the kept tokens of (batch, tokens, width), without those before the grid."""
    keep = None if site.keep is None else site.keep[:, site.prefix :]
    return masked_mean(hidden[:, site.prefix :], keep)


def single_token(site: Site) -> Site:
    """The site as a fold that is narrowed to one token sees it: nothing padded, no grid."""
    return replace(site, keep=None, grid=None)


def _wrong_norm(stack: str, why: str) -> str:
    return (
        f"the wrong module was taken for the {stack}'s final norm ({why}): the model does not run as it did on the "
        "tiny inputs with which attach looked at it, or it could not be looked at; attach to a part that always runs "
        "alike"
    )


def _with_element(output: Any, element: int, hidden: Tensor) -> Any:
    """A block's output with another hidden state."""
    if not isinstance(output, tuple):
        return hidden
    parts = (*output[:element], hidden, *output[element + 1 :])
    return output._make(parts) if hasattr(output, "_make") else parts


def _counts(cache: Any) -> bool:
    """Whether a cache holds keys and values of tokens, and so knows how many (state-space layers do not)."""
    try:
        cache.get_seq_length()
    except (AttributeError, ValueError):
        return False
    return True


def _lengths(places: Sequence[Place]) -> dict[str, int]:
    lengths: dict[str, int] = {}
    for place in places:
        lengths[place.site.stack] = lengths.get(place.site.stack, 0) + 1
    return lengths


def _with_argument(
    names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with one argument replaced, whether it was given by position or by name."""
    if name in kwargs or list(names).index(name) >= len(args):
        return args, {**kwargs, name: value}
    position = list(names).index(name)
    return (*args[:position], value, *args[position + 1 :]), kwargs
