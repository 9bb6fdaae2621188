"""Generalised pooling: a learned weighted mean of sorted values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class GPO(nn.Module):
    """Generalised pooling. In each channel the tokens are sorted, and weighted by their place in that order.

    The weights depend only on the number of tokens. Sinusoidal codes of the places go through a bidirectional GRU.

    Source: Chen et al., "Learning the Best Pooling Strategy for Visual Semantic Embedding", CVPR 2021 (VSE-infinity).

    Args:
        code: channels of a place's code.
        hidden: of the GRU, in each direction.
    """

    temperature = 0.1

    def __init__(self, code: int = 32, hidden: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(code, hidden, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(hidden, 1, bias=False)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """(batch, width) of tokens (batch, tokens, width). `keep` is (batch, tokens) bool. None keeps all tokens."""
        if keep is None:
            keep = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        lengths, which = keep.sum(1).unique(return_inverse=True)
        weights = self.weights(lengths)[which]
        last = torch.finfo(tokens.dtype).min
        ordered = tokens.masked_fill(~keep[..., None], last).sort(dim=1, descending=True).values
        return torch.einsum("bn,bnd->bd", weights.to(tokens.dtype), ordered[:, : weights.shape[1]])

    def weights(self, lengths: Tensor) -> Tensor:
        """(lengths, longest): the weights of the places of as many sorted tokens, 0 behind them."""
        places = torch.arange(int(lengths.max()), device=lengths.device)
        packed = pack_padded_sequence(
            self._codes(places).expand(len(lengths), -1, -1), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        both, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        scores = self.linear(torch.stack(both.chunk(2, -1)).mean(0)).squeeze(-1)
        beyond = places >= lengths[:, None]
        return (scores / self.temperature).masked_fill(beyond, -torch.inf).softmax(1)

    def _codes(self, places: Tensor) -> Tensor:
        """(places, code): sines and cosines in turns."""
        width, kind = self.gru.input_size, self.linear.weight.dtype
        rates = 10000.0 ** (-torch.arange(0, width, 2, device=places.device, dtype=kind) / width)
        angles = places[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]
