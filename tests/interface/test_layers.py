"""Shared layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sidestep as ss
from sidestep.interface.layers import masked_mean, recompute, regrid


class Gate(nn.Module):
    """A chain of elementwise products, each of which keeps its operands; recomputed or not."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.linear, self.again, self.runs = nn.Linear(6, 6), again, 0

    def chain(self, x: Tensor, y: Tensor | None) -> Tensor:
        self.runs += 1
        gate = torch.sigmoid(self.linear(x))
        return gate * torch.tanh(x) if y is None else gate * torch.tanh(x) * y.exp()

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        return recompute(self.chain, x, y) if self.again else self.chain(x, y)


def test_recomputing_gives_the_same_gradients_and_keeps_the_inputs_only() -> None:
    plain, again = Gate(False), Gate(True)
    again.load_state_dict(plain.state_dict())
    x, y = torch.randn(4, 5, 6, requires_grad=True), torch.randn(4, 5, 6, requires_grad=True)
    found, kept = [], []
    for gate in (plain, again):
        with ss.saved_bytes(gate) as record:
            out = gate(x, y)
        kept.append(record.total)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found.append(torch.autograd.grad((out * weights).sum(), [x, y, *gate.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert kept[1] == x.nbytes + y.nbytes < kept[0]
    assert (plain.runs, again.runs) == (1, 2)


def test_without_a_graph_nothing_runs_twice() -> None:
    gate = Gate(True)
    with torch.no_grad():
        assert not gate(torch.randn(2, 6), None).requires_grad
    assert gate.runs == 1


def test_regrid_averages_the_tokens_of_each_cell() -> None:
    tokens = torch.randn(2, 4 * 6, 3)
    pooled = regrid(tokens, (4, 6), (2, 3))
    for row in range(2):
        for column in range(3):
            cell = [(2 * row + i) * 6 + 2 * column + j for i in range(2) for j in range(2)]
            torch.testing.assert_close(pooled[:, row * 3 + column], tokens[:, cell].mean(1))


def test_prefix_tokens_that_begin_with_a_stage_begin_as_the_mean() -> None:
    tokens = torch.randn(2, 1 + 4 * 6, 3)
    plain = regrid(tokens[:, 1:], (4, 6), (2, 3))
    kept = regrid(tokens, (4, 6), (2, 3), (1, 1))
    torch.testing.assert_close(kept, torch.cat([tokens[:, :1], plain], 1))
    torch.testing.assert_close(regrid(tokens, (4, 6), (2, 3), (1, 0)), plain)
    made = regrid(tokens[:, 1:], (4, 6), (2, 3), (0, 1))
    torch.testing.assert_close(made, torch.cat([plain.mean(1, keepdim=True), plain], 1))


def test_a_masked_mean_is_of_the_kept_tokens() -> None:
    tokens = torch.randn(3, 4, 5, dtype=torch.float64)
    keep = torch.tensor([[True, True, True, True], [False, True, False, True], [False, False, False, False]])
    expected = torch.stack([tokens[0].mean(0), tokens[1, [1, 3]].mean(0), torch.zeros(5, dtype=torch.float64)])
    torch.testing.assert_close(masked_mean(tokens, keep), expected)
    torch.testing.assert_close(masked_mean(tokens, None), tokens.mean(1))
