"""A method that runs beside a frozen backbone: a fold over its depth."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from sidestep.interface.pruning import Score
from sidestep.interface.sites import Site


class SideNet(nn.Module, ABC):
    """A fold over depth: it reads the hidden states of a frozen backbone and may write at the end or in late blocks.

    For every stack a pass calls `start` first and `finish` at the stack's end. It calls `advance` and `write` at the
    input of each stage and at the output of each block. Before each decoder block it calls `memory`, and after an
    encoder `carry`. What the method remembers between calls is `state`, any value it likes. The state travels through
    the calls and is never kept on the module.

    `advance` is `step` of what was `read`. Before the first write all that touches a tensor as wide as the backbone is
    in `read`, which knows no state. So a pass can store a site's codes, or compute them again, without the method
    knowing. A method whose definition has no such split leaves `read` out: its codes are the hidden states themselves.

    Class attributes:
        starts_as_identity: before training, outputs equal the frozen model's, bit for bit.
        replays: it runs queries of its own through the frozen blocks (`Site.next_block`), so that `attach` first proves
            that their parts make up the blocks.
        caches: it mixes tokens, and keeps what it needs of earlier ones in `Site.cache`, so that key-value caches are
            exact.

    Attributes:
        tokenwise: a block's codes, step and write treat every token alone, so key-value caches and single-token heads
            are exact.
        pooled_width: channels of what `pooled` returns, set by a method with a read-out of its own. With None the head
            reads the last hidden state.
        pooled_from: in words, what that read-out is made of, where the method has no parameters. Two with equal words
            read equal vectors.
        corrects: whether it changes the vector that the head makes of what it reads (`correct`).
        from_data: whether starting weights depend on training rows: `ss.initialise` calls `initialise` with scores
            taken on the rows.
        least_rows: the fewest rows of a batch that it can be trained on (2 where it has batch norms).
        solved: whether training solves the head from what the method reads, and takes no steps.
    """

    starts_as_identity: ClassVar[bool] = False
    replays: ClassVar[bool] = False
    caches: ClassVar[bool] = False
    tokenwise: bool = False
    pooled_width: int | None = None
    pooled_from: str = ""
    corrects: bool = False
    from_data: bool = False
    least_rows: int = 1
    solved: bool = False

    @property
    def splits(self) -> bool:
        """Whether `read` gives codes that are narrower than the hidden state, so that this state need not be kept."""
        return type(self).read is not SideNet.read

    @property
    def gives_tokens(self) -> bool:
        """Whether it gives a state for each token, for a head that reads them all."""
        return self.pooled_width is None and not self.corrects

    @classmethod
    def check(cls, config: Any, sites: Sequence[Site]) -> None:
        """Raise `ValueError` with the reason if the method cannot work on these sites."""

    @classmethod
    def first_write(cls, config: Any, sites: Sequence[Site]) -> Site | None:
        """The first site at which the method returns another hidden state, or None if it never does.

        Another `memory` changes the block that reads it. Then the first write is the site in front of that block.
        """
        return None

    @classmethod
    def kept_per_token(cls, config: Any, site: Site) -> int:
        """Values that the method keeps for backward per token at a site: its stated bound, tested as a law."""
        return 0

    @classmethod
    def kept_per_row(cls, config: Any, site: Site) -> int:
        """Values that the method also keeps at a site per row of the batch, however many tokens the row has."""
        return 0

    def initialise(self, sites: Sequence[Site], score: Score) -> None:
        """Start from the backbone's own weights (`Site.weights`), of which `score` says how much each matters."""

    def start(self, site: Site, carried: Tensor | None) -> Any:
        """State before a stack's first site, where a decoder's `carried` is what the encoder's `carry` returned."""
        return None

    def read(self, hidden: Tensor, site: Site) -> Any:
        """The codes of a hidden state (batch, tokens, width): a tensor, a tuple of tensors, or None for nothing.

        It may draw random numbers (dropout of what is read). The hidden state may be on another device than the method:
        a `Tap` runs there, and the codes may be on either.
        """
        return hidden

    def step(self, state: Any, codes: Any, site: Site) -> Any:
        """The state behind a site, by what was read there."""
        return state

    def advance(self, state: Any, hidden: Tensor, site: Site) -> Any:
        """`step` of what was `read`: the same to the bit where a method overrides it to keep less for backward."""
        return self.step(state, self.read(hidden, site), site)

    def write(self, state: Any, hidden: Tensor, site: Site) -> tuple[Any, Tensor]:
        """State and hidden state to go on with, after `advance`.

        From the first write on the hidden state is another one.

        A method that reads what it wrote does that here.
        """
        return state, hidden

    def memory(self, state: Any, site: Site) -> Tensor | None:
        """What the decoder block of `site` reads instead of the encoder's output, or None for the encoder's."""
        return None

    def finish(self, state: Any, raw: Tensor, normed: Tensor, site: Site) -> Tensor:
        """The stack's output, from what went into its final norm and what came out.

        The two are the same if the stack has no norm.
        """
        return normed

    def carry(self, state: Any) -> Tensor | None:
        """What a decoder needs of an encoder's state: one tensor (batch, tokens, any), which survives beam search."""
        return None

    def pooled(self, state: Any, site: Site) -> Tensor | None:
        """(batch, pooled_width) for the head, when the method has a read-out of its own.

        (batch, tokens, pooled_width), if the head reads every token (`Site.per_token`) and the method `gives_tokens`.
        """
        return None

    def correct(self, state: Any, site: Site, vector: Tensor) -> Tensor:
        """The head's vector (batch, `site.features`) as the method would have it, when it `corrects`.

        `vector` is what the head reads, or with `Retrieve` its projection.
        """
        return vector
