"""A tap is an optional fixed form and a linear map, and keeps its input once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sidestep as ss
from sidestep.interface.taps import Form, Tap

BATCH, TOKENS, WIDTH, RANK = 3, 11, 32, 2
FORMS: list[Form] = ["none", "relu", "rms"]


def tap(form: Form, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> Tap:
    made = Tap(WIDTH, RANK, form=form, bias=bias).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made


def explicit(made: Tap, hidden: Tensor) -> Tensor:
    """The same, written as its definition."""
    if made.form == "relu":
        hidden = hidden.clamp(min=0)
    if made.form == "rms":
        hidden = hidden / (hidden.square().mean(-1, keepdim=True) + made.eps).sqrt() * made.scale
    return hidden @ made.weight.T + (0 if made.bias is None else made.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_tap_equals_its_definition_with_all_gradients(form: Form, bias: bool) -> None:
    made = tap(form, bias=bias, dtype=torch.float64)
    hidden = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(BATCH, TOKENS, RANK, dtype=torch.float64)
    wanted = [hidden, *made.parameters()]
    out, expected = made(hidden), explicit(made, hidden)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad((out * weights).sum(), wanted)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), wanted))
    assert len(wanted) == 2 + bias + (form == "rms")


@pytest.mark.parametrize("form", FORMS)
def test_an_input_without_gradient_gets_none(form: Form) -> None:
    hidden = torch.randn(BATCH, TOKENS, WIDTH)
    tap(form)(hidden).sum().backward()
    assert hidden.grad is None


def kept_by(made: Tap, hidden: Tensor) -> list[ss.memory.Kept]:
    with ss.saved_bytes(made) as record:
        made(hidden)
    return record.rows


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_keeps_its_input_once_and_small_tensors(form: Form, dtype: torch.dtype) -> None:
    rows = kept_by(tap(form), torch.randn(BATCH, TOKENS, WIDTH).to(dtype))
    wide = [row for row in rows if row.shape[-1] == WIDTH and len(row.shape) > 1]
    # No float32 copy of a bfloat16 input.
    assert {row.dtype for row in wide} == {dtype}
    assert sum(row.counted for row in wide) == BATCH * TOKENS * WIDTH * dtype.itemsize
    # "rms" keeps the map's output and two scalars per token besides.
    small = sum(row.counted for row in rows) - sum(row.counted for row in wide)
    assert small <= (4 * BATCH * TOKENS * (RANK + 3) if form == "rms" else 0)


def test_taps_of_one_input_share_its_storage() -> None:
    both = nn.ModuleList([tap("rms"), tap("none")])
    hidden = torch.randn(BATCH, TOKENS, WIDTH)
    with ss.saved_bytes(both) as record:
        for made in both:
            made(hidden)
    wide = [row.counted for row in record.rows if row.shape[-1] == WIDTH]
    assert sum(wide) == hidden.nbytes


def test_the_result_is_in_the_taps_precision() -> None:
    made = tap("rms")
    hidden = torch.randn(BATCH, TOKENS, WIDTH)
    out = made(hidden.bfloat16())
    assert out.dtype == torch.float32
    # bfloat16 rounds inputs and weights at 2^-9 each.
    torch.testing.assert_close(out, made(hidden), rtol=0.05, atol=0.1)


def test_relu_reads_positive_values_only() -> None:
    made, hidden = tap("relu"), torch.randn(BATCH, TOKENS, WIDTH)
    assert torch.equal(made(hidden), made(hidden.relu()))
    assert not torch.equal(made(hidden), F.linear(hidden, made.weight, made.bias))
