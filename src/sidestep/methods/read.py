"""READ: a small recurrent network over the depth of a frozen backbone learns the correction of its last hidden state.

Source: Wang et al., "READ: Recurrent Adaptation of Large Transformers", arXiv 2305.15348. No official code was
released, so what the paper leaves open is fixed here: the cell is a GRU or an Elman RNN on the RMS-normed block
outputs, its output map starts at zero, and an encoder's recurrent state reaches the decoder's recurrence through a
rank-r cross-attention (the Joiner).
Differs: gates are recomputed in backward, so each block output is kept once and nothing else that wide. On hierarchical
backbones (not in the paper) every stage has its own input map. There the state is average-pooled at each patch merging.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.interface.config import MethodConfig
from sidestep.interface.layers import recompute, regrid
from sidestep.interface.registry import register
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site, of_stack, stacks
from sidestep.interface.taps import Tap

GATES = {"gru": 3, "rnn": 1}


@dataclass(frozen=True, kw_only=True)
class ReadConfig(MethodConfig):
    """Settings of READ.

    The defaults are measured with `benchmarks/read_defaults.py` (dev accuracy, 3 seeds, 2026-11-22). One factor at a
    time was changed from gru / last / pre_norm. Text is RTE, MRPC and CR with all-MiniLM-L6-v2 and 1,500 rows. gru/last
    has 0.492, 0.640, 0.863. rnn/last has 0.507, 0.645, 0.852. gru/mean has 0.486, 0.693, 0.866. RTE is at chance, with
    deviations up to 0.03. Images are digits, MNIST and Caltech-101 with vit-small-32. pre_norm has 0.909, 0.604, 0.356.
    post_norm has 0.905, 0.618, 0.334.

    Attributes:
        rank: width r of the recurrent state.
        cell: "gru" or "rnn" (tanh).
        aggregate: what the correction is read from: the "last" state over depth or the "mean" of all.
        correction: where it is added: before the backbone's final norm ("pre_norm") or after it ("post_norm"). On
            backbones without a final norm (BERT) they are the same.
        scale: what the correction is multiplied with. The length of Adam's steps does not depend on the gradient's. So
            the output map learns that many times faster than the recurrence. The small T5 on which this was measured
            learns with 30, "post_norm" and a rate of 3e-4, and hardly without (docs/methods/read.md).
    """

    rates = (5e-4, 2e-3, 6e-3)

    rank: int = 128
    cell: Literal["gru", "rnn"] = "gru"
    aggregate: Literal["last", "mean"] = "mean"
    correction: Literal["pre_norm", "post_norm"] = "pre_norm"
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rank", self.rank >= 1, "a whole number of at least 1")
        self.require("scale", self.scale > 0, "a number above 0")


class Recurrence(nn.Module):
    """One shared cell that steps through the blocks of a stack.

    Args:
        widths: channels of each stage.
        rank: width r of the state.
        gates: 3 for a GRU, 1 for an Elman RNN.
        joined: whether it also attends to an encoder's states (the Joiner).
    """

    def __init__(self, widths: Sequence[int], rank: int, gates: int, *, joined: bool) -> None:
        super().__init__()
        self.rank, self.gates = rank, gates
        # The Joiner's query reads the same normed tap, so it is further rows of the same map.
        rows = gates * rank + (rank if joined else 0)
        self.taps = nn.ModuleList(Tap(width, rows, form="rms", bias=False) for width in widths)
        self.input_bias = nn.Parameter(torch.zeros(gates * rank))
        self.hidden_weight = nn.Parameter(torch.empty(gates * rank, rank))
        self.hidden_bias = nn.Parameter(torch.zeros(gates * rank))
        for gate in self.hidden_weight.chunk(gates):
            nn.init.orthogonal_(gate)
        if joined:
            self.key = nn.Linear(rank, rank, bias=False)
            self.value = nn.Linear(rank, rank, bias=False)
            self.join = nn.Linear(rank, gates * rank, bias=False)

    def forward(self, read: Tensor, state: Tensor | None, source: Tensor | None, source_keep: Tensor | None) -> Tensor:
        """The next state (batch, tokens, rank) from a block's codes, the last state and the encoder's states."""
        x = read[..., : self.gates * self.rank] + self.input_bias
        if source is not None:
            query = read[..., self.gates * self.rank :]
            x = x + self.join(self._attend(query, source, source_keep))
        recurrent = self.hidden_bias if state is None else F.linear(state, self.hidden_weight, self.hidden_bias)
        return self._elman(x, recurrent) if self.gates == 1 else self._gru(x, recurrent, state)

    def _attend(self, query: Tensor, source: Tensor, keep: Tensor | None) -> Tensor:
        key, value = self.key(source), self.value(source)
        mask = None if keep is None else keep[:, None, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    @staticmethod
    def _elman(x: Tensor, recurrent: Tensor) -> Tensor:
        return torch.tanh(x + recurrent)

    @staticmethod
    def _gru(x: Tensor, recurrent: Tensor, state: Tensor | None) -> Tensor:
        x_reset, x_update, x_new = x.chunk(3, dim=-1)
        reset, update, new = recurrent.chunk(3, dim=-1)
        update = torch.sigmoid(x_update + update)
        new = torch.tanh(x_new + torch.sigmoid(x_reset + reset) * new)
        return new - update * new if state is None else new + update * (state - new)


@dataclass(frozen=True)
class ReadState:
    """What travels along a stack.

    These are the state, the sum of all states, the encoder's states, and the present grid with the tokens before it.
    """

    hidden: Tensor | None = None
    total: Tensor | None = None
    source: Tensor | None = None
    grid: tuple[int, int] | None = None
    prefix: int = 0


@register("read", ReadConfig)
class Read(SideNet):
    """READ: a recurrent network over depth corrects the last hidden state.

    Parameters per stack of width d (one stage), whatever the depth: GRU 3(dr + r^2 + 2r) + rd + 2d, RNN dr + r^2 + 2r +
    rd + 2d. An encoder that feeds a decoder has no output map (rd + d less). The decoder's Joiner adds rd + 2r^2 + (3
    or 1) r^2.
    """

    tokenwise = True
    starts_as_identity = True

    def __init__(self, config: ReadConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        self.config = config
        joined = len(stacks(sites)) > 1
        self.stacks = nn.ModuleDict()
        for name in stacks(sites):
            widths = list({site.stage: site.width for site in of_stack(sites, name) if site.kind == "block"}.values())
            self.stacks[name] = Recurrence(widths, config.rank, GATES[config.cell], joined=joined and name == "decoder")
        width = next(site.width for site in reversed(sites) if site.head)
        self.out = nn.Linear(config.rank, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @classmethod
    def first_write(cls, config: ReadConfig, sites: Sequence[Site]) -> Site | None:
        """The end of the stack that the head reads."""
        kind = "norm" if config.correction == "post_norm" and sites[-1].final_norm else "block"
        return next(site for site in reversed(sites) if site.kind == kind)

    @classmethod
    def kept_per_token(cls, config: ReadConfig, site: Site) -> int:
        """Each block output once, the state, and the corrected hidden state, which the final norm keeps."""
        if site.kind == "stage":
            return 0
        if site.kind == "norm":
            return site.width + 2 if site.head and config.correction == "pre_norm" else 0
        return site.width + config.rank

    def start(self, site: Site, carried: Tensor | None) -> ReadState:
        """No state yet, except that a decoder has the encoder's recurrent states."""
        return ReadState(source=carried)

    def read(self, hidden: Tensor, site: Site) -> Tensor | None:
        """The gates' inputs, (batch, tokens, gates x rank), and in a decoder that joins the query behind them."""
        if site.kind == "stage":
            return None
        codes: Tensor = self._recurrence(site).taps[site.stage](hidden)
        return codes

    def step(self, state: ReadState, codes: Tensor | None, site: Site) -> ReadState:
        """Advance the recurrence at a block, and fit the state to the grid where the grid has become coarser."""
        state = self._regrid(state, site)
        if codes is None:
            return state
        recurrence = self._recurrence(site)
        return self._with(state, recompute(recurrence, codes, state.hidden, state.source, site.memory_keep))

    def advance(self, state: ReadState, hidden: Tensor, site: Site) -> ReadState:
        """The codes are computed again in backward, so that only the block's output and the state are kept."""
        state = self._regrid(state, site)
        if site.kind == "stage":
            return state
        return self._with(state, recompute(self._rung, site, hidden, state.hidden, state.source, site.memory_keep))

    def write(self, state: ReadState, hidden: Tensor, site: Site) -> tuple[ReadState, Tensor]:
        """Correct the last block's output, unless the config asks for that after the final norm."""
        if site.last and site.head and not self._after_norm(site):
            hidden = self._corrected(hidden, state, site)
        return state, hidden

    def finish(self, state: ReadState, raw: Tensor, normed: Tensor, site: Site) -> Tensor:
        """Add the correction after the final norm, where the config asks for it there."""
        if not site.head or not self._after_norm(site):
            return normed
        return self._corrected(normed, state, site)

    def carry(self, state: ReadState) -> Tensor | None:
        """The encoder's last recurrent states (batch, tokens, rank)."""
        return state.hidden

    def _recurrence(self, site: Site) -> Any:
        return self.stacks[site.stack]

    def _rung(self, site: Site, hidden: Tensor, *others: Tensor | None) -> Tensor:
        new: Tensor = self._recurrence(site)(self.read(hidden, site), *others)
        return new

    def _with(self, state: ReadState, new: Tensor) -> ReadState:
        """The state with a new recurrent one, (batch, tokens, rank)."""
        total = state.total
        if self.config.aggregate == "mean":
            total = new if total is None else total + new
        return replace(state, hidden=new, total=total)

    def _after_norm(self, site: Site) -> bool:
        return self.config.correction == "post_norm" and site.final_norm

    def _corrected(self, hidden: Tensor, state: ReadState, site: Site) -> Tensor:
        read = state.hidden
        if self.config.aggregate == "mean":
            assert state.total is not None
            read = state.total / site.depth
        return torch.add(hidden, self.out(read).to(hidden.dtype), alpha=self.config.scale)

    def _regrid(self, state: ReadState, site: Site) -> ReadState:
        old, new, prefixes = state.grid, site.grid, (state.prefix, site.prefix)
        known = replace(state, grid=new, prefix=site.prefix)
        if old is None or new is None or (old == new and len(set(prefixes)) == 1) or state.hidden is None:
            return known
        total = None if state.total is None else regrid(state.total, old, new, prefixes)
        return replace(known, hidden=regrid(state.hidden, old, new, prefixes), total=total)
