"""A bank's tasks do not touch each other, its backbone is the same after any switches, and its folder after any end."""

from __future__ import annotations

import gc
import hashlib
import json
import random
import shutil
import signal
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

import own_process
import sidestep as ss
from sidestep.disk import task_folder
from sidestep.disk.task_folder import CONFIG, WEIGHTS, TaskError
from sidestep.fold import FoldError
from sidestep.methods import MethodConfig
from sidestep.tasks.bank_folder import LOCK, STAGING, BankError, BankFolder
from small_backbone import character_tokenizer, tokenizer
from tiny import FAMILIES, logits

BERT = FAMILIES["bert"]
BF16 = torch.bfloat16
STREAM: dict[str, tuple[MethodConfig, int]] = {
    "read": (ss.ReadConfig(rank=4), 3),
    "sparse": (ss.SparseConfig(density=0.05, select="random"), 3),
    "wide": (ss.SparseConfig(density=0.02, select="random", seed=1), 7),
    "sherl": (ss.SherlConfig(), 2),
    "pruned": (ss.DiffPruningConfig(density=0.01), 4),
}
DENSE: dict[str, tuple[MethodConfig, int]] = {
    "bitfit": (ss.BitFitConfig(), 2),
    "full": (ss.FullConfig(), 3),
    "lora": (ss.LoraConfig(targets=("query", "value")), 2),
}


def backbone(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    return BERT.model(seed).base_model.to(dtype)


def attached(config: MethodConfig, labels: int = 3, on: nn.Module | None = None, seed: int = 5) -> ss.SideModel:
    """A model whose task is random in every part."""
    model = ss.attach(on or backbone(), config, head=ss.Classify(num_labels=labels))
    if model.sparse is not None:
        model.sparse.place_at_random(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def saved(folder: Path, config: MethodConfig, labels: int = 3, dtype: torch.dtype = torch.float32) -> Path:
    attached(config, labels, backbone(dtype=dtype)).save_pretrained(folder)
    return folder


def stream(place: Path, tasks: dict[str, tuple[MethodConfig, int]], dtype: torch.dtype = torch.float32) -> list[Path]:
    return [saved(place / name, config, labels, dtype) for name, (config, labels) in tasks.items()]


def outputs(bank: ss.TaskBank, name: str) -> Tensor:
    return logits(bank.run(name, BERT.inputs()))


def hashed(bank: ss.TaskBank, name: str) -> str:
    return hashlib.sha256(outputs(bank, name).float().numpy().tobytes()).hexdigest()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def assert_same_weights(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = weights(model)
    assert now.keys() == before.keys()
    # as bytes: a zero's sign counts
    assert all(torch.equal(now[name].view(torch.uint8), before[name].view(torch.uint8)) for name in now)


def altered(source: Path, target: Path, part: str, **values: Any) -> Path:
    """A copy of a task with the same tensors and other values in one part of its config."""
    shutil.copytree(source, target)
    config = json.loads((target / CONFIG).read_text())
    config[part] |= values
    if part == "head":  # a task says its labels twice
        config["labels"] = config["head"]["labels"]
    (target / CONFIG).write_text(json.dumps(task_folder.sealed(config)))
    return target


def state(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# --- tasks do not touch each other -------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [STREAM, DENSE], ids=["stream", "dense"])
def test_adding_a_task_changes_no_bit_of_an_earlier_ones_outputs(
    tmp_path: Path, tasks: dict[str, tuple[MethodConfig, int]]
) -> None:
    bank, known = ss.TaskBank(backbone(), tmp_path / "bank"), {}
    for folder in stream(tmp_path, tasks):
        bank.add(folder.name, folder)
        known[folder.name] = hashed(bank, folder.name)
        assert {name: hashed(bank, name) for name in known} == known
        alone = ss.load(folder, backbone())
        with torch.no_grad():
            expected = logits(alone(**BERT.inputs()))
        assert torch.equal(outputs(bank, folder.name), expected)
        assert expected.shape[1] == tasks[folder.name][1]
    assert len(set(known.values())) == len(tasks)
    again = ss.TaskBank(backbone(), tmp_path / "bank", keep=0)
    assert {name: hashed(again, name) for name in known} == known


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_the_backbone_is_the_same_bit_for_bit_after_any_switches(tmp_path: Path, dtype: torch.dtype) -> None:
    model = backbone(dtype=dtype)
    before, flags = weights(model), {name: p.requires_grad for name, p in model.named_parameters()}
    bank, chance = ss.TaskBank(model, tmp_path / "bank", keep=3), random.Random(0)
    for folder in stream(tmp_path, STREAM | DENSE, dtype):
        bank.add(folder.name, folder)
    known = {name: hashed(bank, name) for name in bank.names}
    for name in chance.choices(bank.names, k=50):
        bank.activate(name)
        if chance.random() < 0.3:
            assert hashed(bank, name) == known[name]
        if chance.random() < 0.1:
            assert_same_weights(bank.deactivate(), before)
    assert_same_weights(bank.deactivate(), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_switch_writes_in_place_and_draws_no_random_numbers(tmp_path: Path) -> None:
    bank = ss.TaskBank(backbone(), tmp_path / "bank")
    for folder in stream(tmp_path, STREAM):
        bank.add(folder.name, folder)
    where = [p.data_ptr() for p in bank.backbone.parameters()]
    drawn = torch.random.get_rng_state()
    models = {name: bank.activate(name) for name in bank.names}
    assert all(bank.activate(name) is model for name, model in models.items())
    assert [p.data_ptr() for p in bank.backbone.parameters()] == where
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert bank.seconds.keys() == set(bank.names)
    assert all(seconds > 0 for seconds in bank.seconds.values())


def test_a_task_is_added_while_another_is_in_use(tmp_path: Path) -> None:
    folders = stream(tmp_path, STREAM)
    bank, other = ss.TaskBank(backbone(), tmp_path / "bank"), BankFolder(tmp_path / "bank")
    bank.add("sparse", folders[1])
    model = bank.activate("sparse")
    with torch.no_grad():
        expected = logits(model(**BERT.inputs()))
        bank.add("read", folders[0])
        other.add("sherl", folders[3])  # as another process does
        assert torch.equal(logits(model(**BERT.inputs())), expected)
    assert bank.names == ["read", "sherl", "sparse"]
    assert outputs(bank, "sherl").shape[1] == 2
    with pytest.raises(FoldError, match="detached"):
        model(**BERT.inputs())


def test_training_goes_on_where_it_was_left(tmp_path: Path) -> None:
    folders = stream(tmp_path, STREAM | DENSE)
    bank = ss.TaskBank(backbone(), tmp_path / "bank")
    for folder in folders:
        bank.add(folder.name, folder)
    labels = torch.tensor([0, 1, 0, 1])
    for name in ("sparse", "read", "bitfit"):
        model, alone = bank.activate(name), ss.load(tmp_path / name, backbone())
        for each, switch in ((alone, False), (model, True)):
            optimizer = torch.optim.AdamW([p for _, p in each.trained_parameters()], lr=0.01, fused=False)
            for _ in range(3):
                each(**BERT.inputs(), labels=labels).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if switch:
                    outputs(bank, "pruned")
                    assert bank.activate(name) is model
        ours, theirs = model.state_dict(), alone.state_dict()
        assert all(torch.equal(ours[part], theirs[part]) for part in theirs)


def test_a_model_trained_on_the_banks_own_backbone_is_added(tmp_path: Path) -> None:
    bank = ss.TaskBank(backbone())
    before = weights(bank.backbone)
    model = attached(ss.SparseConfig(density=0.05, select="random"), on=bank.deactivate())
    with torch.no_grad():
        expected = logits(model(**BERT.inputs()))
    bank.add("mine", model)
    with pytest.raises(ValueError, match="has a task attached already"):
        bank.activate("mine")
    ss.detach(model)
    assert torch.equal(outputs(bank, "mine"), expected)
    bank.close()
    assert_same_weights(bank.backbone, before)
    assert not bank.store.path.exists()


def test_what_is_kept_in_memory_can_be_limited(tmp_path: Path) -> None:
    folders = stream(tmp_path, STREAM)
    with ss.TaskBank(backbone(), tmp_path / "bank", keep=1) as bank:
        for folder in folders:
            bank.add(folder.name, folder)
        first = bank.activate("read")
        assert bank.activate("sparse") is not first
        assert bank.activate("read") is first
        bank.activate("sparse")
        bank.activate("wide")
        assert bank.activate("read") is not first
    assert bank.active is None


def test_a_task_that_was_replaced_by_another_process_is_read_again(tmp_path: Path) -> None:
    folders = stream(tmp_path, STREAM)
    bank, other = ss.TaskBank(backbone(), tmp_path / "bank"), BankFolder(tmp_path / "bank")
    bank.add("task", folders[1])
    for folder, labels in ((folders[1], 3), (folders[2], 7), (folders[0], 3)):
        other.remove("task")
        other.add("task", folder)
        assert outputs(bank, "task").shape[1] == labels
        if labels == 7:
            bank.deactivate()


@pytest.mark.parametrize("method", ["read", "sparse"])
def test_the_same_tensors_with_other_labels_are_another_task(tmp_path: Path, method: str) -> None:
    first, between = saved(tmp_path / "first", *STREAM[method]), saved(tmp_path / "between", *STREAM["sherl"])
    second = altered(first, tmp_path / "second", "head", labels=["x", "y", "z"])
    bank, other = ss.TaskBank(backbone(), tmp_path / "bank"), BankFolder(tmp_path / "bank")
    bank.add("task", first)
    bank.add("between", between)
    old = bank.activate("task")
    for path in ([], ["between"], ["between", "task", "between"]):
        for source, labels in ((second, ["x", "y", "z"]), (first, None)):
            other.remove("task")
            other.add("task", source)
            new = [bank.activate(name) for name in [*path, "task"]][-1]
            assert new is not old
            assert new.settings.head.labels == (labels and tuple(labels))
            assert bank.activate("task") is new
            old = new


def test_the_same_tensors_with_other_settings_are_looked_at_again(tmp_path: Path) -> None:
    first = saved(tmp_path / "first", *STREAM["read"])
    wider = altered(first, tmp_path / "wider", "head", num_labels=5)
    digest = json.loads((first / CONFIG).read_text())["backbone"]["digest"]
    half = {**digest, "dtype": "bfloat16", "exact": digest["rounded"]["bfloat16"], "rounded": {}}
    bank = ss.TaskBank(backbone(), tmp_path / "bank")
    bank.add("task", first)
    with pytest.raises(TaskError, match="do not fit"):
        bank.add("wider", wider)
    other = BankFolder(bank.store.path)
    other.remove("task")
    other.add("task", altered(first, tmp_path / "half", "backbone", digest=half))
    with pytest.raises(BankError, match="the same in another precision"):
        bank.activate("task")


def test_entries_say_what_is_there_and_ss_load_reads_them(tmp_path: Path) -> None:
    bank = ss.TaskBank(backbone(), tmp_path / "bank")
    source = saved(tmp_path / "sparse", ss.SparseConfig(density=0.05, select="random"))
    (source / "checkpoints").mkdir()
    (source / "checkpoints" / "big").write_text("left where it is")
    bank.add("sparse", source)
    (entry,) = bank.entries()
    assert (entry.name, entry.method) == ("sparse", "sparse")
    assert entry.bytes == sum(len(content) for content in state(tmp_path / "bank" / "sparse").values())
    assert {*state(tmp_path / "bank" / "sparse")} == {"sidestep.json", "task.safetensors", "README.md"}
    expected = outputs(bank, "sparse")
    with torch.no_grad():
        assert torch.equal(logits(ss.load(bank.store.folder("sparse"), backbone())(**BERT.inputs())), expected)


# --- what is refused, and changes nothing ------------------------------------------------------------------------


@pytest.fixture
def bank(tmp_path: Path) -> ss.TaskBank:
    """A bank with two tasks, of which one is active."""
    bank = ss.TaskBank(backbone(), tmp_path / "bank")
    for name in ("read", "sparse"):
        bank.add(name, saved(tmp_path / name, *STREAM[name]))
    bank.activate("sparse")
    return bank


def assert_refused(bank: ss.TaskBank, task: Path | ss.SideModel, match: str, name: str = "new") -> None:
    before, known, active = state(bank.store.path), outputs(bank, "sparse"), bank.active
    with pytest.raises((TaskError, ss.UnsupportedBackbone), match=match):
        bank.add(name, task)
    assert state(bank.store.path) == before
    assert (bank.active, bank.names) == (active, ["read", "sparse"])
    assert torch.equal(outputs(bank, "sparse"), known)


def test_tasks_of_another_backbone_are_refused(bank: ss.TaskBank, tmp_path: Path) -> None:
    for name, config in (("a", ss.ReadConfig(rank=4)), ("b", ss.SparseConfig(density=0.05, select="random"))):
        attached(config, on=backbone(9)).save_pretrained(tmp_path / name)
        assert_refused(bank, tmp_path / name, "new was made on a BertModel with digest .*a bank has one backbone")
        fresh = ss.TaskBank(backbone(), tmp_path / f"fresh {name}")
        with pytest.raises(BankError, match="load the task's own backbone, with its embeddings not resized"):
            fresh.add("new", tmp_path / name)
        assert fresh.names == []
    with pytest.raises(
        BankError, match=r"the tasks in .*bank belong to weights with digest .* load their own backbone"
    ):
        ss.TaskBank(backbone(9), tmp_path / "bank")


def test_tasks_of_another_precision_are_refused(bank: ss.TaskBank, tmp_path: Path) -> None:
    half = saved(tmp_path / "half", ss.SparseConfig(density=0.05, select="random"), dtype=BF16)
    assert_refused(bank, half, r"\(bfloat16\), which is not the .* \(float32\)")
    fresh = ss.TaskBank(backbone(dtype=BF16), tmp_path / "fresh")
    with pytest.raises(
        BankError, match=r"the same in another precision\. Load the backbone in float32, or put the task"
    ):
        fresh.add("new", tmp_path / "sparse")


def test_a_diff_for_embeddings_that_were_resized_is_refused(tmp_path: Path) -> None:
    grown = backbone()
    grown.resize_token_embeddings(50, mean_resizing=False)
    bank = ss.TaskBank(grown, tmp_path / "bank")
    with pytest.raises(TaskError, match=r"word_embeddings.weight \(40, 16\).*with its embeddings not resized"):
        bank.add("new", saved(tmp_path / "task", ss.SparseConfig(density=0.5, select="random")))


def test_a_diff_on_a_quantised_backbone_is_refused_and_says_what_works(tmp_path: Path) -> None:
    codes = backbone()
    layer = codes.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    bank = ss.TaskBank(codes, tmp_path / "bank")
    with pytest.raises(ss.UnsupportedBackbone, match=r"quantised.*train a side network"):
        bank.add("new", saved(tmp_path / "task", ss.SparseConfig(density=0.05, select="random")))
    assert bank.names == []


@pytest.mark.parametrize("kind", ["truncated", "bit", "no config", "no task"])
def test_damaged_tasks_are_refused(bank: ss.TaskBank, tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path / "task", ss.SparseConfig(density=0.05, select="random"))
    file = folder / "task.safetensors"
    content = bytearray(file.read_bytes())
    if kind == "truncated":
        file.write_bytes(content[:-7])
    elif kind == "bit":
        content[-5] ^= 4
        file.write_bytes(content)
    elif kind == "no config":
        (folder / "sidestep.json").unlink()
    else:
        shutil.rmtree(folder)
    assert_refused(bank, folder, f"{folder}.* (damaged|is no task folder)")


def test_a_task_that_was_damaged_in_the_bank_leaves_the_active_one(bank: ss.TaskBank) -> None:
    known = outputs(bank, "sparse")
    file = bank.store.folder("read") / "task.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(TaskError, match="is damaged"):
        bank.activate("read")
    assert bank.active == "sparse"
    assert torch.equal(outputs(bank, "sparse"), known)


@pytest.mark.parametrize("left", [b"{", None], ids=["altered", "lost"])
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_damaged_task_stops_no_other_and_can_be_replaced(
    bank: ss.TaskBank, tmp_path: Path, file: str, left: bytes | None
) -> None:
    digest, known = bank.store.digest(), outputs(bank, "sparse")
    damaged = bank.store.folder("read") / file
    damaged.unlink()
    if left is not None:
        damaged.write_bytes(left)
    opened = ss.TaskBank(backbone(), bank.store.path)
    for act in (opened.activate, opened.store.entry):
        with pytest.raises(BankError, match=rf"{file} .*: remove 'read' \(`sidestep bank remove`\) and add it again"):
            act("read")
    with pytest.warns(UserWarning, match=f"{file} .*: remove 'read'"):
        assert "read" not in {entry.name for entry in opened.entries()}
    assert "read" in opened.names
    assert torch.equal(outputs(opened, "sparse"), known)
    assert opened.store.digest() == digest
    attached(ss.ReadConfig(rank=4), on=backbone(9)).save_pretrained(tmp_path / "stranger")
    with pytest.raises(BankError, match="a bank has one backbone"):
        opened.store.add("stranger", tmp_path / "stranger")
    opened.remove("read")
    opened.add("read", tmp_path / "read")
    assert outputs(opened, "read").shape[1] == 3


def test_a_model_that_rests_leaves_the_active_task_alone(bank: ss.TaskBank) -> None:
    resting = bank.activate("sparse")
    state, known, own = resting.state_dict(), outputs(bank, "read"), bank.activate("read")
    resting._digest = None
    for act in (
        lambda: resting(**BERT.inputs()),
        lambda: resting.load_state_dict(state),
        lambda: resting.digest,
    ):
        with pytest.raises((FoldError, ValueError), match=r"detached from its backbone|a task attached already"):
            act()
    assert torch.equal(outputs(bank, "read"), known)
    assert bank.model is own
    plain = backbone().state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in bank.deactivate().state_dict().items())
    assert resting.digest == bank.digest


def test_tasks_within_one_autocast_context_do_not_share_weights(bank: ss.TaskBank) -> None:
    alone, names = {}, bank.names
    for name in names:
        with torch.autocast("cpu", torch.bfloat16):
            alone[name] = bank.activate(name)(**BERT.inputs()).logits
    with torch.autocast("cpu", torch.bfloat16):
        for name in names * 2:
            assert torch.equal(bank.activate(name)(**BERT.inputs()).logits, alone[name]), name


def test_a_task_first_used_under_inference_mode_can_be_trained(bank: ss.TaskBank) -> None:
    with torch.inference_mode():
        bank.run("read", BERT.inputs())
    bank.activate("read")(**BERT.inputs(), labels=BERT.labels()).loss.backward()


def test_a_task_that_cannot_be_activated_keeps_what_was_trained(bank: ss.TaskBank) -> None:
    model = bank.activate("sparse")
    with torch.no_grad():
        model.sparse.values.add_(1)
    other = ss.attach(bank.deactivate(), ss.ReadConfig(rank=2), head=ss.Classify(num_labels=2))
    trained = model.sparse.values.detach().clone()
    with pytest.raises(ValueError, match="a task attached already"):
        bank.activate("sparse")
    ss.detach(other)
    assert bank.activate("sparse") is model
    assert torch.equal(model.sparse.values, trained)


@pytest.mark.parametrize("name", ["sparse", "bitfit", "read"])
@pytest.mark.parametrize("kept", [True, False], ids=["from memory", "from disk"])
@pytest.mark.parametrize(
    "at",
    ["sidestep.fold.Hooks.put", "sidestep.sparse.diff.SparseDiff.write", "sidestep.model.before.Before.restore"],
)
def test_a_switch_that_fails_half_way_leaves_backbone_and_task_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kept: bool, at: str
) -> None:
    bare = backbone()
    before = weights(bare)
    bank = ss.TaskBank(bare, tmp_path / "bank")
    for source in ("sherl", name):
        bank.add(source, saved(tmp_path / source, *(STREAM | DENSE)[source]))
    if kept:
        bank.activate(name)
    known, active = outputs(bank, "sherl"), bank.model

    def fail(*_: Any) -> None:
        monkeypatch.undo()
        raise MemoryError("out of memory")

    monkeypatch.setattr(at, fail)
    with suppress(MemoryError):
        bank.activate(name)
        bank.activate("sherl")
    assert bank.model is active
    assert torch.equal(outputs(bank, "sherl"), known)
    assert_same_weights(bank.deactivate(), before)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in bare.parameters())
    with torch.no_grad():
        assert torch.equal(outputs(bank, name), logits(ss.load(tmp_path / name, backbone())(**BERT.inputs())))


def test_nothing_is_removed_from_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="holds no task 'x': it holds nothing"):
        BankFolder(tmp_path / "none").remove("x")
    assert not (tmp_path / "none").exists()


def test_names_that_are_taken_impossible_or_unknown(bank: ss.TaskBank, tmp_path: Path) -> None:
    assert_refused(bank, tmp_path / "read", "holds 'read' already: choose another name", name="read")
    with pytest.raises(BankError, match="holds no task 'xxx"):
        bank.activate("x" * 300)
    for name in ("", ".hidden", "../up", "a/b", "a b", "ä" * 128):
        assert_refused(bank, tmp_path / "read", "cannot be a task's name", name=name)
    for act in (bank.activate, bank.remove, bank.store.entry):
        with pytest.raises(BankError, match="holds no task 'other': it holds read, sparse"):
            act("other")
    (tmp_path / "file").write_text("")
    with pytest.raises(BankError, match="is a file: a bank is a folder"):
        BankFolder(tmp_path / "file")
    with pytest.raises(ValueError, match="keep=-1"):
        ss.TaskBank(backbone(), keep=-1)


def test_the_active_task_is_not_removed(bank: ss.TaskBank) -> None:
    with pytest.raises(BankError, match="'sparse' is active: activate another task"):
        bank.remove("sparse")
    bank.activate("read")
    bank.remove("sparse")
    assert bank.names == ["read"]
    assert {file.partition("/")[0] for file in state(bank.store.path)} - {LOCK} == {"read"}


def test_one_process_writes_at_a_time(bank: ss.TaskBank, tmp_path: Path) -> None:
    before = state(bank.store.path)
    with FileLock(bank.store.path / LOCK):
        for act in (lambda: bank.add("new", tmp_path / "read"), lambda: bank.remove("read")):
            with pytest.raises(BankError, match=r"another process is writing .*bank: try again when it is done"):
                act()
        assert outputs(bank, "read").shape[1] == 3
        assert ss.TaskBank(backbone(), bank.store.path).names == ["read", "sparse"]
    assert state(bank.store.path) == before
    bank.add("new", tmp_path / "read")


# --- what is killed ----------------------------------------------------------------------------------------------

ADDING = """
import sys
from pathlib import Path
from sidestep.tasks.bank_folder import BankFolder
Path(sys.argv[3]).touch()
for number in range(1000):
    BankFolder(sys.argv[1]).add(f"task{number}", sys.argv[2])
"""


def test_a_killed_process_leaves_the_old_state_or_the_new_one(tmp_path: Path) -> None:
    source, folder, ready = saved(tmp_path / "task", *STREAM["sparse"]), tmp_path / "bank", tmp_path / "ready"
    expected = {name: content for name, content in state(source).items() if name != "README.md"}
    chance = random.Random(0)
    for _ in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        ready.unlink(missing_ok=True)
        process = own_process.start(ADDING, folder, source, ready)
        while not ready.exists():
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(chance.uniform(0.05, 0.3))  # a random moment of the additions that go on there
        process.kill()
        assert own_process.ended(process) == -signal.SIGKILL
        bank = BankFolder(folder)
        assert not list(folder.glob(f"{STAGING}*"))
        for name in bank.names:
            found = {file: content for file, content in state(folder / name).items() if file != "README.md"}
            assert found == expected
        bank.add("after", source)
        assert "after" in bank.names


def test_tasks_with_the_same_tokenizer_share_it_while_one_of_them_is_there(tmp_path: Path) -> None:
    model = attached(ss.ReadConfig(rank=4))
    for name, words in (("one", tokenizer()), ("two", tokenizer()), ("other", character_tokenizer())):
        model.extras["processor"] = words
        model.save_pretrained(tmp_path / name)
    bank = ss.TaskBank(backbone(), tmp_path / "bank")
    for name in ("one", "two", "other"):
        bank.add(name, tmp_path / name)
    used = {name: bank.activate(name).extras["processor"] for name in bank.names}
    assert used["one"] is used["two"]
    assert used["other"].get_vocab() != used["one"].get_vocab()
    given_up = weakref.ref(used.pop("one"))
    used.clear()
    bank.deactivate()
    bank.remove("one")
    assert given_up() is not None
    bank.remove("two")
    gc.collect()  # a tokenizer may be in a cycle of its own
    assert given_up() is None
