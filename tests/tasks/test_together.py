"""Several tasks of a bank on one batch: what is run, what is refused, and what is as before afterwards."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from test_bank import BERT, backbone, outputs, saved
from torch.utils.flop_counter import FlopCounterMode

import sidestep as ss
from sidestep.disk.task_folder import WEIGHTS, TaskError
from sidestep.tasks import bank as module
from sidestep.tasks.bank_folder import BankError, BankFolder
from tiny import FAMILIES, logits, randomize

TASKS: dict[str, tuple[Any, int]] = {
    "read": (ss.ReadConfig(rank=4), 3),
    "wider": (ss.ReadConfig(rank=8), 5),
    "probe": (ss.ProbeConfig(), 2),
    "readout": (ss.ReadoutConfig(), 4),
    "another": (ss.ReadoutConfig(penalty=0.1), 2),
    "dtl": (ss.DTLConfig(rank=4, late_blocks=2), 3),
    "sparse": (ss.SparseConfig(density=0.05, select="random"), 3),
    "lora": (ss.LoraConfig(targets=("query", "value")), 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("together")
    bank = ss.TaskBank(backbone(), place / "bank")
    for name, (config, labels) in TASKS.items():
        bank.add(name, saved(place / name, config, labels))
    return place / "bank"


@pytest.fixture
def bank(folder: Path, tmp_path: Path) -> ss.TaskBank:
    shutil.copytree(folder, tmp_path / "bank")
    return ss.TaskBank(backbone(), tmp_path / "bank")


def test_heads_of_any_size_come_from_few_passes(bank: ss.TaskBank) -> None:
    expected = {name: outputs(bank, name) for name in TASKS}
    names = list(TASKS)
    passes = []
    for _ in range(3):
        found = bank(BERT.inputs(), tasks=names)
        passes.append(bank.together.passes)
        for name in names:
            assert logits(found[name]).shape[1] == TASKS[name][1]
            torch.testing.assert_close(logits(found[name]), expected[name], rtol=1e-5, atol=1e-6)
    # dtl first runs alone, then it is compared with a pass of its own, then it goes on from its border
    assert passes == [4, 4, 3]
    assert bank.together.alone == {
        "sparse": "sparse changes the backbone's weights, so its states change with each step",
        "lora": "lora is read anew for each call",
    }


def test_a_task_costs_its_own_rows(tmp_path: Path) -> None:
    bank = ss.TaskBank(backbone(), tmp_path / "bank")
    names = [f"task-{number}" for number in range(4)]
    for name in names:
        bank.add(name, saved(tmp_path / name, ss.ReadConfig(rank=4), 3))

    def products(tasks: list[str], rows: dict[str, list[int]]) -> int:
        with FlopCounterMode(display=False) as counter:
            bank(BERT.inputs(), tasks=tasks, rows=rows)
        return int(counter.get_total_flops())

    with FlopCounterMode(display=False) as counter:
        bank.backbone(**BERT.inputs())
    bare, one = counter.get_total_flops(), products(names[:1], {})
    assert one > bare
    assert products(names, {}) - bare == 4 * (one - bare)
    assert products(names, {name: [number] for number, name in enumerate(names)}) == one
    assert products(names[:2], {names[0]: [3], names[1]: [0, 1, 2]}) == one
    padded = products(names[:2], {names[0]: [1, 2, 3], names[1]: [3, 2, 1, 0]}) - bare
    assert (
        7 / 4 * (one - bare) < padded < 2 * (one - bare)
    )  # side networks that run at once, and heads on their own rows


def test_inputs_that_are_not_of_rows_go_to_tasks_alone_as_they_are(bank: ss.TaskBank) -> None:
    batch = BERT.inputs()
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    expected = {name: outputs(bank, name) for name in TASKS}
    for _ in range(3):
        found = bank(batch, tasks=list(TASKS), rows={name: [3, 0] for name in TASKS})
        for name in TASKS:
            torch.testing.assert_close(logits(found[name]), expected[name][[3, 0]], rtol=1e-5, atol=1e-6)


def test_what_is_asked_of_the_pass_besides_is_of_the_own_rows(bank: ss.TaskBank) -> None:
    batch = {**BERT.inputs(), "output_hidden_states": True}
    found = bank(batch, tasks=["read", "readout", "lora", "probe"], rows={"read": [2], "readout": [2], "lora": [2]})
    states = [one.hidden_states[-1] for one in found.values()]
    assert [len(state) for state in states] == [1, 1, 1, 4]
    assert torch.equal(states[0], states[3][2:3])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"probe": [0]}, "rows of 'probe', but the tasks are read: name it in tasks too"),
        ({"read": []}, r"rows of 'read' are \[\]: give a list of numbers, or leave the task out"),
        ({"read": 1}, "rows of 'read' are 1: give a list of numbers"),
        ({"read": ["first"]}, r"rows of 'read' are \['first'\]: give a list of numbers"),
        ({"read": [4]}, "rows of 'read' are 4: give numbers from 0 to 3"),
        ({"read": [-1]}, "rows of 'read' are -1: give numbers from 0 to 3"),
        ({"read": [True, False]}, "rows of 'read' are True, False: give numbers from 0 to 3"),
    ],
)
def test_rows_that_cannot_be_are_refused_before_anything_runs(bank: ss.TaskBank, rows: Any, message: str) -> None:
    with pytest.raises(BankError, match=message):
        bank(BERT.inputs(), tasks=["read"], rows=rows)
    assert not bank.seconds


def test_what_stands_before_the_final_norm_has_writers_go_on_from_their_border(tmp_path: Path) -> None:
    """A copy before the norm might be anything, so what READ writes cannot be followed there."""
    llama = FAMILIES["llama"]
    made = llama.model().base_model
    made.norm.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    bank = ss.TaskBank(made, tmp_path / "bank")
    for name, config in (("read", ss.ReadConfig(rank=4)), ("probe", ss.ProbeConfig()), ("readout", ss.ReadoutConfig())):
        model = ss.attach(llama.model().base_model, config, head=ss.Classify(num_labels=3, pool="mean"))
        randomize(model)
        bank.add(name, model)
    names = bank.names
    expected = {name: logits(bank.run(name, llama.inputs())) for name in names}
    for passes in (2, 2, 1):  # READ alone, then from its border with a proof, then without
        found = bank(llama.inputs(), tasks=names)
        assert bank.together.passes == passes
        assert all(torch.equal(logits(found[name]), expected[name]) for name in names)


def test_what_was_active_is_so_afterwards(bank: ss.TaskBank) -> None:
    model = bank.activate("sparse")
    expected = logits(model(**BERT.inputs()))
    bank(BERT.inputs(), tasks=["read", "probe"])
    assert bank.active == "sparse"
    assert bank.model is model
    assert torch.equal(logits(model(**BERT.inputs())), expected)


def test_a_task_that_another_process_replaced_answers_anew(bank: ss.TaskBank, folder: Path) -> None:
    bank(BERT.inputs(), tasks=["read", "wider"])
    other = ss.TaskBank(backbone(), bank.store.path)
    other.remove("read")
    other.add("read", folder / "wider")
    found = bank(BERT.inputs(), tasks=["read", "wider"])
    assert torch.equal(logits(found["read"]), logits(found["wider"]))
    other.remove("wider")
    with pytest.raises(BankError, match="holds no task 'wider'"):
        bank(BERT.inputs(), tasks=["read", "wider"])


def test_what_another_process_removed_is_not_active_again(bank: ss.TaskBank) -> None:
    bank.activate("sparse")
    expected = bank(BERT.inputs(), tasks=["read", "probe"])
    BankFolder(bank.store.path).remove("sparse")
    found = bank(BERT.inputs(), tasks=["read", "probe"])
    assert bank.active is None
    for name, output in found.items():
        assert torch.equal(logits(output), logits(expected[name]))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "no task is named: .* holds another, dtl, lora"),
        ("read", r"tasks='read': give a list of names, such as \['read'\]"),
        (["read", "probe", "read"], "'read' is named twice"),
        (["read", "reed"], "holds no task 'reed': did you mean 'read'"),
        (["read", "unheard-of"], "holds no task 'unheard-of': it holds another"),
    ],
)
def test_names_that_cannot_be_run_are_refused_before_anything_runs(bank: ss.TaskBank, tasks: Any, message: str) -> None:
    with pytest.raises(BankError, match=message):
        bank(BERT.inputs(), tasks=tasks)
    assert not bank.seconds


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_backbone_serves_any_mix_without_compiling_again(bank: ss.TaskBank) -> None:
    expected = {name: outputs(bank, name) for name in TASKS}
    bank.compile(dynamic=True, backend="eager")
    counters = torch._dynamo.utils.counters
    counters.clear()
    names = list(TASKS)
    for _ in range(3):
        found = bank(BERT.inputs(), tasks=names)
    compiled = dict(counters["stats"])
    assert compiled["unique_graphs"] >= 1
    for mix in (["lora", "read"], ["dtl", "sparse"], names[::2], ["readout"]):
        found |= bank(BERT.inputs(), tasks=mix)
        assert dict(counters["stats"]) == compiled
    for name in names:
        torch.testing.assert_close(logits(found[name]), expected[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(BankError, match="compiled already"):
        bank.compile()
    twin = copy.deepcopy(bank.backbone)  # runs its own blocks
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        before = bank.backbone(**BERT.inputs()).last_hidden_state
        assert not torch.equal(twin(**BERT.inputs()).last_hidden_state, before)
    bank.close()
    assert not any("forward" in vars(module) for module in bank.backbone.modules())


def test_blocks_that_another_library_runs_are_not_compiled(tmp_path: Path) -> None:
    made = backbone()
    add_hook_to_module(made.encoder.layer[0], ModelHook())
    with pytest.raises(ValueError, match="the blocks of BertModel are run by another library"):
        ss.TaskBank(made, tmp_path / "bank").compile()


def test_labels_and_caches_are_refused(bank: ss.TaskBank) -> None:
    with pytest.raises(BankError, match="a batch for several tasks has no labels"):
        bank({**BERT.inputs(), "labels": torch.zeros(2)}, tasks=["read"])


def test_a_batch_of_another_kind_is_refused(bank: ss.TaskBank) -> None:
    with pytest.raises(BankError, match="the batch has pixel_values, but BertModel reads input_ids"):
        bank({"pixel_values": torch.zeros(2, 3, 8, 8)}, tasks=["read"])


def test_a_damaged_task_is_named_and_the_others_go_on(bank: ss.TaskBank) -> None:
    file = bank.store.path / "read" / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(TaskError, match="read"):
        bank(BERT.inputs(), tasks=["probe", "read"])
    found = bank(BERT.inputs(), tasks=["probe", "readout"])
    assert torch.equal(logits(found["probe"]), outputs(bank, "probe"))


def test_more_tasks_than_memory_holds_are_refused_with_how_many_fit(
    bank: ss.TaskBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    smallest = min(bank.store.entry(name).bytes for name in ("read", "probe"))
    monkeypatch.setattr(module, "free_memory", lambda device: smallest + 1)
    with pytest.raises(BankError, match=r"2 tasks have .* of memory are free: call with fewer tasks \(1 fit\)"):
        bank(BERT.inputs(), tasks=["read", "probe"])
