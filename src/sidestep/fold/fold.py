"""The live fold: one method along the backbone's own loop.

What belongs to one forward pass lives in a `Pass` and a `Strand`, made at the backbone's entry and dropped at its exit.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.backbone import Facts, as_given, as_tokens
from sidestep.backbone.facts import mask_of_frames
from sidestep.backbone.families import Pool
from sidestep.backbone.grids import TokenGrid, counted_prefix, sides
from sidestep.backbone.in_order import in_order
from sidestep.fold.caches import SideCache, claim
from sidestep.fold.deferred import SecondStrand
from sidestep.fold.group import Group, GroupStrand
from sidestep.fold.home import Home, differ
from sidestep.fold.hooks import CARRIED
from sidestep.fold.keeping import Keeping
from sidestep.fold.padding import check_mask, kept_tokens, own_tokens, read_token
from sidestep.fold.passes import KEY_VALUES, FoldError, Pass, Reading, grid_at, mean_tokens, single_token, wrong_norm
from sidestep.fold.reads import Reads
from sidestep.fold.sharded import directly
from sidestep.fold.stored import RecordedStrand, Recorder, States
from sidestep.fold.strand import Strand
from sidestep.fold.turns import BUSY, Turn
from sidestep.interface.keep import Keep
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Place, Site
from sidestep.sparse.diff import SparseDiff


class Fold:
    """Runs one method over the sites of one backbone, in the passes that `Hooks` bring.

    Args:
        trunk: the backbone without its head.
        places: the backbone's sites, in order.
        method: the side network.
        facts: what the backbone is.
        grid: tells the token grid at a site, where hidden states have no rows and columns of their own.
        narrow: "cls" or "last": only the token that the head reads is given to the method. None: all tokens.
        mean_first: the head reads the tokens' mean. The mean is taken before the final norm, and only the mean is
            normed.
        through: whether a narrowed hidden state also goes on through the backbone's own norm and head. It does only
            where the family table knows that they take it. Else they get all tokens and their result is not used.
        frozen: whether nothing before the method's first write may require a gradient. If False the backbone's own
            weights are trained, and no block is read.
        late: whether blocks come after that write. Then the keys and values of these blocks in a cache are of this task
            alone.
        border: the site of that write, or None.
        keep: how what the method reads before that write is kept for backward.
        pools: whether a Sidestep head reads the tokens. Such a head has to know the padding.
        home: where the method is.
        diff: a sparse diff, which is written into the weights before each call. None: there is no diff.
    """

    def __init__(
        self,
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
        border: Site | None,
        keep: Keep,
        pools: bool,
        home: Home,
        diff: SparseDiff | None = None,
    ) -> None:
        self.trunk, self.places, self.method, self.facts = trunk, places, method, facts
        self.grid, self.pools = grid, pools
        self.narrow, self.through, self.frozen = narrow, through, frozen
        # a string, which copies of this fold and of a cache share
        self.late, self.name = late, uuid.uuid4().hex
        self.keeping, self.home = Keeping(method, border, keep, frozen=frozen, home=home), home
        self.within: Callable[..., Any] = directly
        self.call: partial[Any] | None = None
        self.again: Reads | None = None
        self.stored: States | None = None
        self.recorder: Recorder | None = None
        self.group: Group | None = None
        self.turn, self.diff, self.attached, self.checked = Turn(FoldError(BUSY)), diff, False, False
        self.current: tuple[Pass, Strand] | None = None
        self.finished: tuple[Pass, Strand] | None = None
        self.carries = type(method).carry is not SideNet.carry
        self.reads_memory, self.reads_raw = type(method).memory is not SideNet.memory, mean_first
        self.reads_output = pools and (not frozen or facts.head.after is not None)
        self.last_stack = places[-1].site.stack
        self.lengths = Counter(place.site.stack for place in places)

    def run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Reading | None]:
        """`call(*args, **kwargs)` with the method active: its result, and what the head reads of the last pass.

        Raises:
            FoldError: if another call is running (one model serves one thread at a time), or the hooks were taken off.
        """
        with self.turn, in_order(self.trunk):  # nobody takes the hooks or the diff off meanwhile
            self.require_attached()
            if self.diff is not None:
                self.diff.write()
            self.call = partial(call, *args, **kwargs)
            try:
                output = self.within(self.call, again=False)
                return output, None if self.finished is None else self.finished[1].reading
            finally:
                self.current, self.finished, self.call = None, None, None

    def second_pass(self, call: Callable[[], Any], reads: Reads) -> None:
        """Run a pass again in backward, which brings what was read to `reads` and ends there.

        Raises:
            FoldError: if another call is running, or the hooks were taken off.
        """
        with self.turn, in_order(self.trunk), torch.no_grad(), reads.autocast():
            self.require_attached()
            self.again = reads
            try:
                self.within(call, again=True)
            finally:
                self.current, self.finished, self.again = None, None, None

    @property
    def running(self) -> bool:
        """Whether a call is running in this thread.

        In any other thread the hooks do nothing.
        """
        return self.turn.mine

    def require_attached(self) -> None:
        """Raise if the hooks were taken off: the backbone alone would answer, without the task."""
        if not self.attached:
            raise FoldError(
                "this model was detached from its backbone: call ss.attach (or ss.load) again, or activate "
                "its task in the bank"
            )

    def seen(self, stack: str) -> int:
        """How many sites of a stack this pass has come by."""
        return 0 if self.current is None else self.current[0].seen(stack)

    # --- the ends of a pass --------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, inputs: Mapping[str, Any], *, alone: bool = False) -> None:
        """Start a pass with a module's inputs by name: the backbone's, or those of a trunk or encoder that runs alone.

        In a pass, note what the trunk itself is given: a model may reshape its inputs first (multiple choice).

        Raises:
            FoldError: if an encoder ran without this task.
        """
        if self.current is not None:
            passed, _ = self.current
            passed.inputs = passed.inputs if alone else {**passed.inputs, **inputs}
            return
        self.current = Pass(inputs, module, skips=not self.frozen), self._strand(self._carried(inputs))

    def _strand(self, carried: Tensor | None) -> Strand:
        if self.recorder is not None:
            return RecordedStrand(self.method, self.frozen, carried, recorder=self.recorder)
        if self.group is not None:
            return GroupStrand(self.method, self.frozen, carried, group=self.group, mean_first=self.reads_raw)
        if self.again is not None:
            return SecondStrand(self.method, self.frozen, carried, reads=self.again)
        # the states of the batch are there, however they are kept, or others share the pass and none learns
        if self.stored is not None or self.call is None:
            return self.keeping.plain(carried)
        cached = any(self.call.keywords.get(name) is not None for name in self.facts.caches)
        return self.keeping.strand(carried, self.call, self.second_pass, cached=cached)

    def _carried(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """What an encoder that ran before gave along, if the method needs that."""
        given = inputs.get("encoder_outputs")
        if given is None or not self.carries:
            return None
        carried: Tensor | None = given.get(CARRIED) if isinstance(given, Mapping) else None
        if carried is None:
            raise FoldError(
                "encoder_outputs were computed without this task: let the model run its own encoder, "
                "or generate through the attached model"
            )
        return carried

    def end(self, module: nn.Module) -> None:
        """Finish the pass that began at a module: every site of the last stack must have been seen, if one is read."""
        if self.current is None or self.current[0].began is not module:
            return
        passed, strand = self.current
        complete = (passed.stack, passed.visited) == (self.last_stack, self.lengths[self.last_stack])
        if not complete and not (passed.skips and (strand.reading is not None or not self.pools)):
            raise FoldError(
                f"the backbone ended its pass after {passed.visited} of {self.lengths[self.last_stack]} sites of "
                f"its {self.last_stack}. A model that skips blocks or its final norm cannot be folded over"
            )
        self.finished, self.current = self.current, None
        self.keeping.ended(self.finished[1])

    def encoded(self, module: nn.Module) -> Tensor | None:
        """End a pass of an encoder alone: what its decoder will need of it."""
        if self.current is None or self.current[0].began is not module:
            return None
        carried, self.current = self.current[1].carried, None
        return carried

    def check(self, given: Tensor, training: bool) -> None:
        """Once, compare the hidden state after the last site with the trunk's last hidden state.

        Raises:
            FoldError: if they differ: the final norm was found wrongly, so a head would read something else.
        """
        ours = next((one[0].output for one in (self.current, self.finished) if one is not None), None)
        if self.checked or training or ours is None:
            return  # in training, the trunk's own dropout may stand between the two
        self.checked, layout = True, self.facts.head.layout
        if not self.facts.head.ends or given.ndim != ours.ndim:
            return  # what follows was seen, and no head of Sidestep reads this
        if given.shape != ours.shape:
            ours, given = as_tokens(ours, layout), as_tokens(given, "tokens")
        if ours.shape == given.shape and differ(ours, given):
            raise FoldError(wrong_norm(self.last_stack, "the trunk's last hidden state is not what came out of it"))

    def read_output(self, given: Tensor) -> None:
        """Let the head read the trunk's own output, where something follows the last site, or it was left out."""
        if self.current is None or (self.facts.head.after is None and self.current[1].reading is not None):
            return
        strand, site = self.current[1], self.places[-1].site
        here, image = self._seen(site, given, {}), sides(self.current[0].inputs)
        if image is not None and given.ndim == 3:
            here = replace(here, prefix=counted_prefix(image, given.shape[1]))
        strand.read_output(given if given.ndim == 3 else self._as_tokens(given, site), here)

    # --- its sites -----------------------------------------------------------------------------------------------

    def element(self, site: Site) -> int:
        """Which element of a block's output its hidden state is, where that has several."""
        return self.facts.stacks[site.stack].element

    def stage(self, site: Site, order: int, given: Tensor, call: Mapping[str, Any]) -> Tensor:
        """What a stage's first block reads in the place of `given`."""
        _, strand = self._visit(site, order)
        given = self._known(site, given)
        here = self._seen(site, given, call)
        read, narrow = self._narrowed(self._as_tokens(given, site), here)
        written = strand.step(read, narrow)
        return given if written is read else self._as_given(written, given, site)

    def memory(self, site: Site, given: Tensor, call: Mapping[str, Any]) -> Tensor | None:
        """What a decoder block reads in the place of the encoder's output, or None to read the encoder's output."""
        if self.current is None:
            return None
        memory = self.current[1].memory(self._seen(site, given, call))
        first = self.facts.stacks["encoder"].layout == "tokens first"
        return memory.transpose(0, 1) if first and memory is not None else memory

    def block(self, site: Site, order: int, given: Tensor, call: Mapping[str, Any]) -> Tensor:
        """What goes on in the place of a block's output."""
        passed, strand = self._visit(site, order)
        given = self._known(site, given)
        here = self._seen(site, given, call)
        read, narrow = self._narrowed(self._as_tokens(given, site), here)
        written = strand.step(read, narrow)
        if site.last and not site.final_norm:
            written = strand.finish(written, written, narrow, self._own_tokens(passed, site))
        if self.narrow and site.head:
            if not site.last:
                return given
            strand.row = written
            passed.output = written if self.through else given
        else:
            passed.output = given if written is read else self._as_given(written, given, site)
        return passed.output

    def _known(self, site: Site, given: Tensor) -> Tensor:
        """What a store holds of a site, or else what came by there."""
        return given if self.stored is None else self.stored.at(site, given, self.facts.stacks[site.stack].layout)

    def before_norm(self, site: Site, order: int, raw: Tensor) -> Tensor | None:
        """Where the head reads the mean of what goes into the norm, the tokens pass without their gradient."""
        if self.current is None or not self.current[0].is_turn(site, order):
            return None
        tokens = self._as_tokens(raw, site)
        self.current[1].row = mean_tokens(tokens, self._seen(site, raw, {}))[:, None]
        return raw.detach()

    def norm(self, site: Site, order: int, module: nn.Module, raw: Tensor, normed: Tensor) -> Tensor | None:
        """What goes on in the place of the final norm's output.

        None if the norm is not called as the end of its stack. The same again if the model asks for it twice.
        """
        if self.current is None:
            return None
        if not self.current[0].is_turn(site, order):
            asked_again = self.facts.stacks[site.stack].again and self.current[0].is_turn(site, order + 1)
            return self.current[0].output if asked_again else None
        passed, strand = self._visit(site, order)
        if raw.ndim < 3 or self._as_tokens(raw, site).shape[-1] != site.width:
            raise FoldError(wrong_norm(site.stack, f"it got a tensor of shape {tuple(raw.shape)}"))
        here, own = self._seen(site, raw, {}), self._own_tokens(passed, site)
        if strand.row is None or not site.head:
            raw, tokens = self._as_tokens(raw, site), self._as_tokens(normed, site)
            finished = strand.finish(raw, tokens, here, own)
            passed.output = self._as_given(finished, normed, site)
            return passed.output
        # Only the row that the head reads goes through the norm with its gradient.
        row = normed if self.through else module.forward(strand.row)
        finished = strand.finish(strand.row, row, single_token(here), own)
        passed.output = finished if self.through else normed
        return passed.output

    def _visit(self, site: Site, order: int) -> tuple[Pass, Strand]:
        """Count a site, starting its stack at the first.

        Raises:
            FoldError: if sites come twice, out of order, or outside a pass.
        """
        if self.current is None:
            raise FoldError("a block ran outside the backbone's own forward: call the attached model")
        passed, strand = self.current
        if passed.visit(site, order):
            strand.start(site)
        return passed, strand

    # --- what a site is in this pass -----------------------------------------------------------------------------

    def _seen(self, site: Site, hidden: Tensor, call: Mapping[str, Any]) -> Site:
        """The site with what this pass adds: padding, grid, cache.

        Args:
            site: as it was found.
            hidden: as the backbone hands it on there.
            call: the arguments of the block there, by name.

        Raises:
            ValueError: if the padding matters, and the mask does not say it token by token.
        """
        assert self.current is not None
        passed, strand = self.current
        facts, inputs = self.facts.stacks[site.stack], passed.inputs
        states = as_tokens(hidden, facts.layout)
        tokens, decoding = states.shape[1], self._is_decoding(site)
        if site.kind == "stage":
            self._open_cache(passed, strand, site, call, tokens)
        if site.kind != "norm":
            passed.grid = grid_at(hidden, site, facts, inputs, self.grid(self.trunk, inputs, call, hidden))
            passed.see_mask(call, tokens, facts)
        mask = inputs.get("decoder_attention_mask" if decoding else "attention_mask") if passed.grid is None else None
        mask = mask.to(hidden.device) if isinstance(mask, Tensor) else mask
        matters = self.pools or not self.method.tokenwise
        if facts.frames is not None and mask is not None:
            kept = mask_of_frames(self.trunk.get_submodule(facts.frames), tokens, mask)
            return site.during(keep=kept, key_keep=kept, memory_keep=None, grid=None, past=0, cache=None)
        if mask is not None and facts.added is not None and matters:
            check_mask(mask, "the head reads" if self.method.tokenwise else f"{type(self.method).__name__} mixes")
        text, open_ended = passed.text_tokens(decoding=decoding), passed.cached or not matters
        past, uncached = passed.past, strand.cache is None
        keep = None if passed.told is None else passed.told.to(hidden.device)
        if keep is None:
            keep = kept_tokens(mask, states, tokens, text, facts.added, past if open_ended else None)
        return site.during(
            keep=keep,
            key_keep=keep if uncached else kept_tokens(mask, states, past + tokens, None, facts.added, 0),
            memory_keep=self._memory_keep(strand.carried, inputs.get("attention_mask")) if decoding else None,
            grid=passed.grid,
            past=past,
            cache=strand.cache,
        )

    def _is_decoding(self, site: Site) -> bool:
        return len(self.lengths) > 1 and site.stack == "decoder"

    def _memory_keep(self, carried: Tensor | None, mask: Any) -> Tensor | None:
        """Which of the encoder's tokens are real, as the method carries them."""
        added = self.facts.stacks["encoder"].added
        if carried is None:
            return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and added is not None else None
        return kept_tokens(mask, carried, carried.shape[1], None, added, None)

    def _open_cache(self, passed: Pass, strand: Strand, site: Site, call: Mapping[str, Any], tokens: int) -> None:
        """Note what a stack's key-value cache holds, and what the method has in it.

        Raises:
            FoldError: if it holds tokens and the method cannot go on from them.
            ValueError: if others filled it, and this task's blocks would read what those made.
        """
        other = [name for name in self.facts.caches if name != KEY_VALUES and passed.inputs.get(name) is not None]
        if other:
            self._refuse_past(f"{other[0]} holds what the model knows of earlier tokens")
        passed.open_cache(site, call, last=site.stack == self.last_stack, names=tuple(self.facts.caches))
        strand.check(passed)
        strand.cache = None
        if passed.cache is None:
            return
        if self.method.caches:
            strand.cache = SideCache(passed.cache, site.depth, passed.past)
        elif not self.method.tokenwise and passed.past:
            self._refuse_past(f"the key-value cache holds {passed.past} tokens")
        if self.late:
            claim(passed.cache, self.name, passed.past, tokens)

    def _refuse_past(self, what: str) -> None:
        """Refuse to go on from earlier tokens if the method mixes tokens.

        No method can add to the model's memory of earlier tokens.
        """
        if not self.method.tokenwise:
            raise FoldError(
                f"{what}, and {type(self.method).__name__} mixes tokens without keeping what it knew of them: pass the "
                "whole sequence and use_cache=False"
            )

    # --- tokens --------------------------------------------------------------------------------------------------

    def _as_tokens(self, hidden: Tensor, site: Site) -> Tensor:
        """A module's hidden state, seen as (batch, tokens, width)."""
        return as_tokens(hidden, self.facts.stacks[site.stack].layout)

    def _as_given(self, tokens: Tensor, given: Tensor, site: Site) -> Tensor:
        """Tokens in the layout of the hidden state that they stand in for."""
        return as_given(tokens, given, self.facts.stacks[site.stack].layout)

    def _narrowed(self, hidden: Tensor, site: Site) -> tuple[Tensor, Site]:
        """Only the token that the head reads, where the fold is narrowed."""
        if self.narrow is None or not site.head:
            return hidden, site
        added = self.facts.stacks[site.stack].added
        return read_token(hidden, site, self.narrow, added), single_token(site)

    def _own_tokens(self, passed: Pass, site: Site) -> Callable[[Tensor], slice]:
        """Tells which of a tensor's tokens are in the stack's own output."""
        text, added = passed.text_tokens(decoding=self._is_decoding(site)), self.facts.stacks[site.stack].added
        return lambda tokens: own_tokens(tokens.shape[1], text, added)
