"""The law of a bank's shared pass: every registered method on every family gives what its task gives alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_every_method import METHODS, REFUSED, attach
from torch import nn

import sidestep as ss
from sidestep.fold.group import GroupStrand
from sidestep.model.forward import Forward
from tiny import ALL, FURTHER, TinyFamily, logits, randomize

COSTLY = [pytest.param(name, marks=pytest.mark.all_laws if name in FURTHER else ()) for name in ALL]

OWN = ([0], [3, 1], [2, 0, 3])
"""Rows of tasks. The last row of a batch of texts is padded."""


def filled(family: TinyFamily, folder: Path) -> tuple[ss.TaskBank, nn.Module, list[str]]:
    """A bank with a task of every method that works on the family, each random in every part."""
    made = family.model()
    bank, names = ss.TaskBank(made, folder), []
    for method in METHODS:
        if (method, family.name) in REFUSED:
            continue
        model = attach(method, family, made, head=True)
        if model.sparse is not None:
            model.sparse.place_at_random(1)
        randomize(model)
        names.append(method.replace("+", "-plus"))
        bank.add(names[-1], model)
        ss.detach(model)
    return bank, made, names


@pytest.mark.parametrize("family", list(ALL))
def test_all_tasks_together_give_what_each_gives_alone(family: str, tmp_path: Path) -> None:
    tiny = ALL[family]
    bank, made, names = filled(tiny, tmp_path)
    inputs = tiny.inputs()
    expected = {name: logits(bank.run(name, inputs)) for name in names}
    bank.deactivate()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    for _ in range(3):  # in the first call the borders are looked for, and in the second one they are proved
        found = bank(inputs, tasks=names)
        assert list(found) == names
        for name in names:
            torch.testing.assert_close(logits(found[name]), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    readers = [name for name in names if bank.activate(name) and _only_reads(bank)]
    bank.deactivate()
    going = [border for border in bank.together.borders.values() if border.route is not None]
    alone = len(names) - len(readers) - len(going)
    rows = {name: OWN[number % len(OWN)] for number, name in enumerate(names)}
    for given in (rows, {}):
        found = bank(inputs, tasks=names, rows=given)
        assert bank.together.passes == 1 + alone
        for name in names:
            own = expected[name][given.get(name, [0, 1, 2, 3])]
            torch.testing.assert_close(logits(found[name]), own, rtol=1e-5, atol=1e-6, msg=f"{name} {given}")
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())


def _only_reads(bank: ss.TaskBank) -> bool:
    model = bank.model
    assert isinstance(model, Forward)
    return model.only_reads


@pytest.mark.parametrize("family", COSTLY)
def test_tasks_of_one_shape_run_as_one(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, sizes = ALL[family], []
    run = GroupStrand._run
    monkeypatch.setattr(GroupStrand, "_run", lambda strand: sizes.append(len(strand.group.methods)) or run(strand))
    for method in METHODS:
        if (method, family) in REFUSED:
            continue
        made = tiny.model()
        bank = ss.TaskBank(made, tmp_path / method)
        model = attach(method, tiny, made, head=True)
        joined = model.fold.carries and len(model.fold.lengths) > 1
        if not model.only_reads or model.side.corrects or joined or not list(model.side.parameters()):
            continue
        for number in range(3):
            randomize(model)
            bank.add(f"task-{number}", model)
        ss.detach(model)
        expected = {name: logits(bank.run(name, tiny.inputs())) for name in bank.names}
        found = bank(tiny.inputs(), tasks=bank.names)
        assert sizes == [3], method
        sizes.clear()
        for name in bank.names:
            torch.testing.assert_close(
                logits(found[name]), expected[name], rtol=1e-5, atol=1e-6, msg=f"{method} {name}"
            )
        rows = dict(zip(bank.names, ([1, 3, 0], [2], [3, 2, 1, 0]), strict=True))
        found = bank(tiny.inputs(), tasks=bank.names, rows=rows)
        sizes.clear()
        for name, own in rows.items():
            torch.testing.assert_close(
                logits(found[name]), expected[name][own], rtol=1e-5, atol=1e-6, msg=f"{method} {name}"
            )


@pytest.mark.parametrize("family", COSTLY)
def test_those_that_read_share_one_pass_to_the_bit(family: str, tmp_path: Path) -> None:
    tiny = ALL[family]
    bank, _, names = filled(tiny, tmp_path)
    shared = [name for name in names if bank.activate(name) and _only_reads(bank)]
    assert {"read", "probe", "readout"} <= set(shared)
    inputs = tiny.inputs()
    expected = {name: logits(bank.run(name, inputs)) for name in shared}
    found = bank(inputs, tasks=shared)
    assert bank.together.passes == 1
    assert all(torch.equal(logits(found[name]), expected[name]) for name in shared)
