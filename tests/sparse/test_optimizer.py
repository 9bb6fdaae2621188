"""The lean optimizer computes what autograd and two plain AdamWs do, in nine words for each parameter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidestep.measure.memory import peak_memory
from sidestep.sparse.hard_concrete import HardConcrete, Noise, Penalty
from sidestep.sparse.moments import BLOCK
from sidestep.sparse.optimizer import DiffPruningOptimizer

RATE = 0.03
CHUNK = 10
#: So heavy that the penalty's gradient counts.
PENALTY = {"weight": 0.05}


class Net(nn.Module):
    """Masked weights, one of which no output depends on, and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(2, 2)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    @property
    def masked(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if not name.startswith("head")}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def relaxed(model: Net, **changes: Any) -> DiffPruningOptimizer:
    given = {"lr": RATE, "gate": HardConcrete(), "penalty": Penalty(**PENALTY), "structured": True}
    given |= {"alpha_init": 1.0, "noise": Noise(3), "chunk": CHUNK}
    return DiffPruningOptimizer(model.masked, model.head.parameters(), **(given | changes))


def batch(step: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def backward(model: Net, step: int) -> Tensor:
    loss = (model(batch(step)) ** 2).sum()
    loss.backward()
    return loss.detach()


def noise_of(draw: int, number: int, p: Tensor) -> tuple[Tensor, Tensor]:
    """The noise of a whole parameter and of its gate."""
    parts = [Noise(3)(draw, number, chunk, part) for chunk, part in enumerate(p.flatten().split(CHUNK), start=1)]
    return torch.cat(parts).view_as(p), Noise(3)(draw, number, 0, torch.zeros(()))


def by_autograd(steps: int, *, structured: bool, kind: str, max_norm: float) -> tuple[dict[str, Tensor], Tensor]:
    """theta, w and alpha after some steps, with everything stored, and the last loss."""
    model, gate = net(), HardConcrete()
    w = {name: torch.zeros_like(p).requires_grad_() for name, p in model.masked.items()}
    alpha = {name: torch.ones_like(p).requires_grad_() for name, p in model.masked.items()}
    group = {name: torch.ones((), requires_grad=structured) for name in w}
    alphas = [*alpha.values(), *(group.values() if structured else ())]
    of_w = torch.optim.AdamW([*w.values(), *model.head.parameters()], lr=RATE, weight_decay=0.0)
    of_alpha = torch.optim.AdamW(alphas, lr=0.1, weight_decay=0.0)
    loss = torch.zeros(())

    def weights(draw: int) -> dict[str, Tensor]:
        found = {}
        for number, (name, p) in enumerate(model.masked.items()):
            u, u_group = noise_of(draw, number, p)
            # autograd goes through the formula, not through the gate's own slope
            z = (torch.sigmoid(torch.logit(u, 1e-4) + alpha[name]) * 3 - 1.5).clamp(0, 1)
            if structured:
                z = z * (torch.sigmoid(torch.logit(u_group, 1e-4) + group[name]) * 3 - 1.5).clamp(0, 1)
            found[name] = p.detach() + z * w[name]
        return found

    for step in range(steps):
        theta = {**dict(model.named_parameters()), **weights(step)}
        loss = (torch.func.functional_call(model, theta, (batch(step),)) ** 2).sum()
        total = loss
        for name in w:
            p, p_group = gate.nonzero(alpha[name]).sum(), gate.nonzero(group[name])
            charged = p if not structured else p * p_group if kind == "product" else p + p_group
            total = total + PENALTY["weight"] * charged
        total.backward()
        if max_norm:
            nn.utils.clip_grad_norm_([p for p in of_w.param_groups[0]["params"] if p.grad is not None], max_norm)
            nn.utils.clip_grad_norm_(alphas, max_norm)
        for optimizer in (of_w, of_alpha):
            optimizer.step()
            optimizer.zero_grad()
    found = {f"theta.{name}": value.detach() for name, value in weights(steps).items()}
    found |= {f"w.{name}": value.detach() for name, value in w.items()}
    found |= {f"alpha.{name}": value.detach() for name, value in alpha.items()}
    found |= {f"group.{name}": value.detach() for name, value in group.items() if structured}
    return found | {f"head.{n}": p.detach() for n, p in model.head.named_parameters()}, loss.detach()


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
@pytest.mark.parametrize(("structured", "kind"), [(False, "sum"), (True, "product"), (True, "sum")])
def test_steps_are_those_of_autograd_and_two_adamws(structured: bool, kind: str, max_norm: float) -> None:
    expected, expected_loss = by_autograd(6, structured=structured, kind=kind, max_norm=max_norm)
    model = net()
    optimizer = relaxed(model, structured=structured, penalty=Penalty(**PENALTY, kind=kind), max_norm=max_norm)
    loss = torch.zeros(())
    for step in range(6):
        loss = backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    found = {}
    for name, p in model.masked.items():
        state = optimizer.state[p]
        found |= {f"theta.{name}": p.detach(), f"w.{name}": state["w"].view_as(p)}
        found |= {f"alpha.{name}": state["alpha"].view_as(p)}
        found |= {f"group.{name}": state["group"][0]} if structured else {}
    found |= {f"head.{n}": p.detach() for n, p in model.head.named_parameters()}
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
    # Adam divides by the root of small averages, which makes rounding errors larger
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_it_starts_as_the_pretrained_model_and_gives_it_back() -> None:
    model, before = net(), {name: p.detach().clone() for name, p in net().masked.items()}
    optimizer = relaxed(model)
    assert all(torch.equal(p, before[name]) for name, p in model.masked.items())
    for step in range(3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert not all(torch.equal(p, before[name]) for name, p in model.masked.items())
    optimizer.restore()
    assert all(torch.equal(p, before[name]) for name, p in model.masked.items())


def test_theta_is_the_pretrained_value_plus_the_diff() -> None:
    model, before = net(), {name: p.detach().clone().flatten() for name, p in net().masked.items()}
    optimizer = relaxed(model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    masks = {(name, start): z for name, start, z in optimizer.masks()}
    for name, start, diff in optimizer.diffs():
        span = slice(start, start + len(diff))
        assert torch.equal(model.masked[name].detach().flatten()[span], before[name][span] + diff)
        assert not diff[masks[name, start] == 0].any()
    zeros = sum(int((z == 0).sum()) for z in masks.values())
    assert 0 < zeros < sum(p.numel() for p in model.masked.values())


def test_gradients_of_several_batches_are_summed_under_one_mask() -> None:
    one, two = net(), net()
    first, second = relaxed(one), relaxed(two)
    for step in range(0, 6, 2):
        ((one(torch.cat([batch(step), batch(step + 1)])) ** 2).sum()).backward()
        backward(two, step)
        backward(two, step + 1)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_a_saved_state_goes_on_bit_for_bit(state_bits: int) -> None:
    how = {"state_bits": state_bits, "chunk": BLOCK}
    model = net()
    optimizer = relaxed(model, **how)
    for step in range(5):
        if step == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            head = copy.deepcopy(model.head.state_dict())
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    again = net()
    resumed = relaxed(again, **how)
    again.head.load_state_dict(head)
    resumed.load_state_dict(saved)
    for step in range(2, 5):
        backward(again, step)
        resumed.step()
        resumed.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_states_stay_in_float32_under_a_bfloat16_model() -> None:
    """The penalty's gradient is lost in bfloat16."""
    model = net().bfloat16()
    optimizer = relaxed(model)
    (model(batch(0).bfloat16()) ** 2).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kept = [value for state in optimizer.state.values() for name, value in state.items() if name != "base"]
    assert {value.dtype for value in kept} == {torch.float32}
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_the_penalty_alone_closes_the_gates_as_fast_as_stated() -> None:
    """Alpha goes from 5 to 0 in 174 steps with the paper's lambda and AdamW's own epsilon."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = DiffPruningOptimizer(
        {"p": p}, lr=1e-5, gate=HardConcrete(), penalty=Penalty(weight=1.25e-7), structured=False, noise=Noise(0)
    )
    steps = 0
    while optimizer.state[p]["alpha"][0] > 0:
        p.grad = torch.zeros(4)
        optimizer.step()
        steps += 1
    assert steps == 174


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize(("state_bits", "words"), [(32, 8), (8, 5 + 4 / BLOCK)])
def test_it_keeps_eight_words_for_each_parameter_or_five_and_needs_one_and_a_half_more(
    structured: bool, state_bits: int, words: float
) -> None:
    width, layers, chunk = 512, 6, 1 << 16
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    masked = dict(model.named_parameters())
    word = sum(p.numel() * p.element_size() for p in masked.values())
    optimizer = DiffPruningOptimizer(
        masked,
        lr=RATE,
        gate=HardConcrete(),
        penalty=Penalty(**PENALTY),
        structured=structured,
        state_bits=state_bits,
        noise=Noise(0),
        chunk=chunk,
    )
    kept = [value for p in masked.values() for name, value in optimizer.state[p].items() if name != "group"]
    kept += masked.values()
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) == words * word
    rest = [value for state in optimizer.state.values() for name, value in state.items() if name == "group"]
    assert sum(value.numel() for value in rest) == (3 * len(masked) if structured else 0)

    def step() -> None:
        for p in masked.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert peak_memory(step).allocated <= 1.5 * word


def test_averages_in_8_bits_train_as_float32_does() -> None:
    def trained(**changes: Any) -> tuple[Tensor, float]:
        model = net()
        optimizer = relaxed(model, chunk=BLOCK, **changes)
        loss = torch.zeros(())
        for step in range(20):
            loss = backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat(list(optimizer.weights().values())), float(loss)

    start = float(backward(net(), 19))
    exact, loss = trained()
    rounded, rounded_loss = trained(state_bits=8)
    assert not torch.equal(exact, rounded)
    assert torch.corrcoef(torch.stack([exact, rounded]))[0, 1] > 0.99
    assert abs(rounded_loss - loss) < 0.1 * (start - loss)


def test_averages_in_8_bits_need_chunks_of_whole_blocks() -> None:
    with pytest.raises(ValueError, match="whole blocks of 256 entries, not of 10"):
        relaxed(net(), state_bits=8, chunk=10)
