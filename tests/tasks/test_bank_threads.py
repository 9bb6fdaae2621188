"""Threads on one bank: whoever comes second gets an error that says so, and nobody another task's answer."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bank import BERT, assert_same_weights, attached, backbone, outputs, saved, weights
from torch import Tensor

import sidestep as ss
from sidestep.fold import FoldError
from sidestep.fold.turns import Turn
from sidestep.methods import MethodConfig
from sidestep.tasks.bank_folder import BankError
from tiny import logits

TASKS: dict[str, tuple[MethodConfig, int]] = {
    "read": (ss.ReadConfig(rank=4), 3),
    "sparse": (ss.SparseConfig(density=0.05, select="random"), 3),
    "bitfit": (ss.BitFitConfig(), 3),
    "lora": (ss.LoraConfig(targets=("query", "value")), 3),
}
WAIT = 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A task of each kind: hooks, entries in weights, whole weights, modules within the backbone."""
    place = tmp_path_factory.mktemp("tasks")
    return {name: saved(place / name, *task) for name, task in TASKS.items()}


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A bank's folder, and what each of its tasks answers alone."""
    place = tmp_path_factory.mktemp("made") / "bank"
    bank = ss.TaskBank(backbone(), place)
    for name, folder in folders.items():
        bank.add(name, folder)
    return place, {name: outputs(bank, name) for name in TASKS}


@pytest.fixture
def bank(made: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> ss.TaskBank:
    shutil.copytree(made[0], tmp_path / "bank")
    return ss.TaskBank(backbone(), tmp_path / "bank")


@pytest.fixture
def expected(made: tuple[Path, dict[str, Tensor]]) -> dict[str, Tensor]:
    return made[1]


@contextmanager
def held(module: Any) -> Iterator[threading.Event]:
    """Whoever first comes to the module stays there until the block ends; the event says that somebody has."""
    inside, free, first = threading.Event(), threading.Event(), [True]

    def wait(*args: object) -> None:
        if first:
            first.clear()
            inside.set()
            assert free.wait(WAIT)

    handle = module.register_forward_pre_hook(wait)
    try:
        yield inside
    finally:
        free.set()
        handle.remove()


def answer(model: Any) -> Tensor:
    with torch.no_grad():
        return logits(model(**BERT.inputs()))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("how", ["call", "run"])
def test_nothing_disturbs_a_call_that_another_thread_is_in(
    bank: ss.TaskBank, expected: dict[str, Tensor], folders: dict[str, Path], name: str, how: str
) -> None:
    model, other = bank.activate(name), next(one for one in TASKS if one != name)
    acts: list[Callable[[], object]] = [
        lambda: bank.activate(other),
        lambda: bank.run(other, BERT.inputs()),
        lambda: bank.run(name, BERT.inputs()),
        bank.deactivate,
        bank.close,
        lambda: ss.detach(model),
        lambda: model(**BERT.inputs()),
    ]
    if how == "run":
        acts += [lambda: bank.add("new", folders[other]), lambda: bank.remove(other)]
    with ThreadPoolExecutor(1) as pool:
        with held(bank.backbone.encoder.layer[1]) as inside:
            call = answer if how == "call" else lambda model: outputs(bank, name)
            found = pool.submit(call, model)
            assert inside.wait(WAIT)
            for act in acts:
                with pytest.raises((BankError, FoldError), match=r"in the middle of (another|a) call"):
                    act()
            assert (bank.active, bank.model) == (name, model)
        assert torch.equal(found.result(WAIT), expected[name])
    assert sorted(bank.names) == sorted(TASKS)
    for one in (other, name):
        assert torch.equal(outputs(bank, one), expected[one])


def test_a_task_that_was_trained_in_memory_is_not_lost_when_a_switch_is_refused(bank: ss.TaskBank) -> None:
    trained = bank.activate("read")
    with torch.no_grad():
        trained.head.linear.bias.add_(1.0)
    expected = answer(trained)
    model = bank.activate("sparse")
    with ThreadPoolExecutor(1) as pool, held(bank.backbone.encoder.layer[1]) as inside:
        pool.submit(answer, model)
        assert inside.wait(WAIT)
        with pytest.raises(BankError, match="'sparse' is in the middle of a call, and cannot be left: take turns"):
            bank.activate("read")
    assert bank.activate("read") is trained
    assert torch.equal(answer(trained), expected)


def test_an_active_model_is_not_saved_in_the_middle_of_a_call(
    bank: ss.TaskBank, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    # its digest is taken of the weights without the diff, which would be lifted under the call
    model = bank.activate("sparse")
    model._digest = None
    with ThreadPoolExecutor(1) as pool:
        with held(bank.backbone.encoder.layer[1]) as inside:
            found = pool.submit(answer, model)
            assert inside.wait(WAIT)
            with pytest.raises(FoldError, match="in the middle of another call"):
                bank.add("copy", model)
        assert torch.equal(found.result(WAIT), expected["sparse"])
    assert "copy" not in bank.names
    bank.add("copy", model)
    assert torch.equal(outputs(bank, "copy"), expected["sparse"])


def test_the_bare_backbone_is_bare_beside_a_call_of_a_side_network(
    expected: dict[str, Tensor], bank: ss.TaskBank
) -> None:
    with torch.no_grad():
        bare = bank.deactivate()(**BERT.inputs()).last_hidden_state
    model = bank.activate("read")
    with ThreadPoolExecutor(1) as pool:
        with held(bank.backbone.encoder.layer[1]) as inside, torch.no_grad():
            found = pool.submit(answer, model)
            assert inside.wait(WAIT)
            assert torch.equal(bank.backbone(**BERT.inputs()).last_hidden_state, bare)
        assert torch.equal(found.result(WAIT), expected["read"])


def test_the_active_model_is_not_given_to_a_thread_that_asked_for_another(bank: ss.TaskBank) -> None:
    ours = bank.activate("read")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: bank.model).result(WAIT) is ours  # it has asked for none
        theirs = pool.submit(bank.activate, "sparse").result(WAIT)
        assert pool.submit(lambda: bank.model).result(WAIT) is theirs
        with pytest.raises(BankError, match="this thread has activated 'read', and another one has switched to sparse"):
            _ = bank.model
        with pytest.raises(FoldError, match="was detached"):
            answer(ours)
        assert bank.activate("read") is ours is bank.model
        pool.submit(bank.deactivate).result(WAIT)
        with pytest.raises(BankError, match="this thread has activated 'read', and another one has switched to none"):
            _ = bank.model
        bank.deactivate()
        assert bank.model is None
        # a switch that is refused asks for nothing
        pool.submit(bank.activate, "read").result(WAIT)
        bank.activate("sparse")
        with pytest.raises(BankError, match="no task 'x'"):
            pool.submit(bank.activate, "x").result(WAIT)
        with pytest.raises(BankError, match="this thread has activated 'read'"):
            pool.submit(lambda: bank.model).result(WAIT)


USES: dict[str, Callable[[ss.TaskBank, str], Tensor]] = {
    "run": outputs,
    "activate and call": lambda bank, name: answer(bank.activate(name)),
    "activate and bank.model": lambda bank, name: bank.activate(name) and answer(bank.model),
}


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("use", USES)
def test_without_a_lock_each_answer_is_right_or_an_error(
    bank: ss.TaskBank, expected: dict[str, Tensor], hasty: None, use: str
) -> None:
    plain = weights(bank.deactivate())

    def worker(number: int) -> tuple[int, int]:
        right = refused = 0
        for step in range(12):
            name = list(TASKS)[(number + step) % len(TASKS)]
            try:
                found = USES[use](bank, name)
            except (BankError, FoldError):
                refused += 1
                continue
            assert torch.equal(found, expected[name])
            right += 1
        return right, refused

    with ThreadPoolExecutor(3) as pool:
        counts = list(pool.map(worker, range(3)))
    assert sum(right for right, _ in counts) > 0
    assert sum(map(sum, counts)) == 36
    assert {name: torch.equal(outputs(bank, name), expected[name]) for name in TASKS} == dict.fromkeys(TASKS, True)
    assert_same_weights(bank.deactivate(), plain)


@pytest.mark.parametrize("use", USES)
def test_in_turn_any_thread_may_use_a_bank(
    bank: ss.TaskBank, expected: dict[str, Tensor], hasty: None, use: str
) -> None:
    lock = threading.Lock()

    def worker(number: int) -> None:
        for step in range(4):
            name = list(TASKS)[(number + step) % len(TASKS)]
            with lock:
                assert torch.equal(USES[use](bank, name), expected[name])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(worker, range(3)))


def test_a_bank_that_another_thread_made_is_used_added_to_and_closed(folders: dict[str, Path], tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        model = backbone()
        before = weights(model)
        bank = pool.submit(ss.TaskBank, model).result(WAIT)
        for name, folder in folders.items():
            pool.submit(bank.add, name, folder).result(WAIT)
        there = {name: pool.submit(outputs, bank, name).result(WAIT) for name in TASKS}
        assert all(torch.equal(outputs(bank, name), found) for name, found in there.items())
        bank.remove("read")
        pool.submit(bank.close).result(WAIT)
    assert_same_weights(model, before)


def test_training_in_another_thread_goes_on_where_it_was_left(bank: ss.TaskBank) -> None:
    labels = torch.tensor([0, 1, 0, 1])

    def steps(name: str) -> list[float]:
        model = bank.activate(name).train()
        optimizer = torch.optim.SGD([p for _, p in model.trained_parameters()], lr=0.1)
        losses = []
        for _ in range(3):
            loss = model(**BERT.inputs(), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    with ThreadPoolExecutor(1) as pool:
        for name in ("read", "sparse"):
            first = pool.submit(steps, name).result(WAIT)
            outputs(bank, "bitfit")
            assert steps(name)[-1] < first[0]


def test_a_turn_is_free_after_an_error_and_in_a_copy() -> None:
    import copy
    import pickle

    turn = Turn(ValueError("busy"))
    with pytest.raises(KeyError), turn:
        raise KeyError
    with turn:
        assert turn.mine
        with pytest.raises(ValueError, match="busy"), turn:
            pass
        for other in (copy.deepcopy(turn), pickle.loads(pickle.dumps(turn))):
            assert not other.mine
            with other:
                pass
    assert not turn.mine


def test_a_copy_of_a_model_writes_its_own_diff() -> None:
    import copy

    model = attached(ss.SparseConfig(density=0.05, select="random")).eval()
    twin = copy.deepcopy(model)
    assert twin.fold.diff is twin.sparse is not model.sparse
    with torch.no_grad():
        twin.sparse.values.mul_(3)
    before = answer(model)
    assert not torch.equal(answer(twin), before)
    assert torch.equal(answer(model), before)
