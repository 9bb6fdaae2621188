"""Where an optimizer keeps its running averages: in float32, or in 8 bits with a scale for each block of entries.

The 8-bit codes and their rounding are bitsandbytes'. Source: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers
via Block-wise Quantization", ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

BLOCK = 256
"""Entries that share a scale, as in bitsandbytes' optimizers."""


class Float32:
    """Averages as they are."""

    def zeros(self, name: str, like: Tensor, *, signed: bool) -> dict[str, Tensor]:
        """What is kept of an average before there is any, by name, for a flat tensor of float32."""
        return {name: torch.zeros_like(like)}

    def read(self, state: Mapping[str, Tensor], name: str, span: slice, *, signed: bool) -> Tensor:
        """A part of an average, to be changed in place and given to `write`."""
        return state[name][span]

    def write(self, values: Tensor, state: Mapping[str, Tensor], name: str, span: slice, *, signed: bool) -> None:
        """Keep a part, with nothing to do, because `read` gave the kept tensor itself."""


class EightBit(Float32):
    """Averages as codes of 8 bits, where parts begin at the start of a block.

    Raises:
        ModuleNotFoundError: without bitsandbytes.
    """

    def __init__(self) -> None:
        try:
            from bitsandbytes import functional
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'averages in 8 bits need bitsandbytes, which is not installed: pip install "sidestep[quantize]"'
            ) from error
        self._library = functional
        with unset_fake_temporarily():  # the map is made from values, which tensors of a plan do not have
            maps = {signed: functional.create_dynamic_map(signed=signed).tolist() for signed in (True, False)}
        self._maps = {signed: torch.tensor(values) for signed, values in maps.items()}

    def zeros(self, name: str, like: Tensor, *, signed: bool) -> dict[str, Tensor]:
        """Codes (uint8, one for each entry) and scales (float32, one for each block), where scales of 0 make zeros."""
        codes = torch.zeros_like(like, dtype=torch.uint8)
        return {name: codes, _scale(name): like.new_zeros(-(-len(like) // BLOCK))}

    def read(self, state: Mapping[str, Tensor], name: str, span: slice, *, signed: bool) -> Tensor:
        """A copy of a part of an average, in float32."""
        codes, scales = state[name][span], state[_scale(name)][_blocks(span)]
        code = self._maps[signed].to(codes.device)
        return self._library.dequantize_blockwise(codes, absmax=scales, code=code, blocksize=BLOCK)

    def write(self, values: Tensor, state: Mapping[str, Tensor], name: str, span: slice, *, signed: bool) -> None:
        """Keep a part, rounded to what its blocks' scales allow."""
        codes, how = self._library.quantize_blockwise(
            values, code=self._maps[signed].to(values.device), blocksize=BLOCK
        )
        state[name][span] = codes
        state[_scale(name)][_blocks(span)] = how.absmax


def _scale(name: str) -> str:
    return f"{name}_scale"


def _blocks(span: slice) -> slice:
    return slice(span.start // BLOCK, -(-span.stop // BLOCK))
