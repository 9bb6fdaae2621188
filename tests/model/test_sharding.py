"""Sharded backbones: what two processes with gloo find, in one launch of `tests/sharded_processes.py`."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

import own_process
import sidestep as ss
from sharded_processes import CASES
from sidestep.model import build
from small_tasks import reviews, text_backbone, write
from tiny import FAMILIES, LABELS
from written_tasks import answered, llama_backbone

WORKER = Path(__file__).parents[1] / "sharded_processes.py"
PROCESSES = 2
CLOSE = 1e-6
"""How far gradients of two halves of a batch may be from the whole batch's, relative to the largest."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has found."""
    folder = tmp_path_factory.mktemp("sharded")
    text_backbone(folder / "bert")
    llama_backbone(folder / "llama")
    write(folder / "texts.csv", reviews(9))
    write(folder / "answers.jsonl", answered(9))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(PROCESSES)}
    both = [
        own_process.start(
            WORKER, folder, said=folder / f"{rank}", env={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(PROCESSES)
    ]
    for rank, process in enumerate(both):
        assert own_process.ended(process) == 0, (folder / f"{rank}.err").read_text()[-4000:]
    told: list[dict[str, Any]] = json.loads((folder / "found.json").read_text())
    assert len(told) == PROCESSES
    return told


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_learns_and_answers_as_one_process_does(found: list[dict[str, Any]], case: str) -> None:
    for one in found:
        here = one["cases"][case]
        assert here["first"] < CLOSE
        assert here["second"] < CLOSE  # the first step proves a replay and a chunked loss
        assert here["outputs"], "not the bits of the model on one process"


@pytest.mark.parametrize("case", CASES)
def test_each_process_holds_its_part_of_the_blocks_between_the_passes(found: list[dict[str, Any]], case: str) -> None:
    for one in found:
        here = one["cases"][case]
        assert here["share"] == pytest.approx(1 / PROCESSES, abs=0.01)
        assert here["sharded blocks"] == here["blocks"]
        assert here["left whole"] == [0, 0]  # after backward, with a second pass in it, and after an evaluation


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_the_task_by_the_digest_of_the_plain_backbone(found: list[dict[str, Any]], case: str) -> None:
    for one in found:
        here = one["cases"][case]
        assert here["digest"]
        assert here["gathered digest"]
        assert here["loaded"], "the saved task on a plain backbone gives other outputs"
    first = found[0]["cases"][case]
    assert first["own values"], "what was saved is not what every process has"
    assert first["saved"] < 2 * first["task"] + 4096  # a header besides


def test_a_step_gathers_few_blocks_at_a_time(found: list[dict[str, Any]]) -> None:
    """Of 12. FSDP gathers into a buffer, copies out of it, and in backward gathers the next block ahead."""
    for one in found:
        assert 0 < one["rises"]["read"] < 3.5
        assert 0 < one["rises"]["dtl"] < 5.5


def test_what_cannot_be_sharded_is_refused_by_name(found: list[dict[str, Any]]) -> None:
    for one in found:
        told = one["refusals"]
        assert told["synqt"].startswith("synqt cannot be sharded: it reads through parts of the block ahead")
        assert "writes its values into whole weights. Choose a side network or LoRA" in told["diff_pruning"]
        assert "full cannot be sharded: it trains all weights of the blocks" in told["full"]
        assert "keep='auto'" in told["auto"]
        assert "BertForSequenceClassification is sharded already" in told["twice"]
        assert told["detached"] == "True"  # the sharded backbone alone runs on
        assert "attach to a whole backbone first, and then call ss.shard(model)" in told["attached"]
        assert "quantised weights" in told["packed"]
        assert "accelerate#3983" in told["packed"]


def test_a_solved_head_reads_the_same(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["read-out"]["equal"]
        assert "its blocks are sharded" in one["read-out"]["stored"]


def test_a_pass_that_failed_leaves_nothing_behind(found: list[dict[str, Any]]) -> None:
    for one in found:
        after = one["after an error"]
        assert after["off"] < CLOSE
        assert len(set(after["noted"])) == 1, "what FSDP notes of passes grows"


def test_both_towers_of_a_pair_are_sharded(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["two towers"]["equal"]
        assert one["two towers"]["shares"] == pytest.approx([1 / PROCESSES] * 2, abs=0.01)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_sharded_run_is_that_of_whole_backbones(found: list[dict[str, Any]], name: str) -> None:
    """By accelerate's switch (bert) and by ours (llama, which writes texts), with an odd number of rows."""
    for one in found:
        plain, sharded = one[name], one[f"{name}, sharded"]
        assert (plain["sharded"], sharded["sharded"]) == (False, True)
        assert sharded["history"] == plain["history"]
        assert sharded["weights"] == plain["weights"]
        assert sharded["answers"] == plain["answers"]
    assert found[0][f"{name}, sharded"] == found[1][f"{name}, sharded"]


def test_one_process_cannot_shard() -> None:
    model = ss.attach(FAMILIES["bert"].model(), ss.ReadConfig(rank=4), head=ss.Classify(num_labels=LABELS))
    with pytest.raises(ValueError, match="start with torchrun --nproc-per-node N"):
        ss.shard(model)


def test_zero_3_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"ZeRO-3 .* \(DeepSpeed#8130, transformers#47254\).* ZeRO-1 or ZeRO-2"):
        ss.attach(FAMILIES["bert"].model(), ss.ReadConfig(rank=4))
