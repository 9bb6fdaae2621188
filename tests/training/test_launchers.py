"""What launchers ask for: FSDP is done by `shard`, and runs that would not keep step are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import sidestep as ss
from dual_encoders import clip
from sidestep import ranks
from sidestep.training.launchers import FSDP, asks_for_fsdp, check_shardable
from tiny import FAMILIES, LABELS


@pytest.mark.parametrize(("said", "processes", "asks"), [("true", 2, True), ("true", 1, False), ("false", 2, False)])
def test_fsdp_is_asked_for_once_and_accelerate_is_not_told(
    monkeypatch: pytest.MonkeyPatch, said: str, processes: int, asks: bool
) -> None:
    monkeypatch.setenv(FSDP, said)
    monkeypatch.setattr(ranks, "count", lambda: processes)
    assert asks_for_fsdp() is asks
    assert FSDP not in os.environ
    assert not asks_for_fsdp()


def test_runs_that_would_not_keep_step_are_refused(tmp_path: Path) -> None:
    settings = ss.TrainSettings(output=tmp_path)
    head = ss.Classify(num_labels=LABELS)
    solved = ss.attach(FAMILIES["bert"].model(), ss.ReadoutConfig(), head=head)
    with pytest.raises(ValueError, match="--shard with --method readout: it is solved from stored features"):
        check_shardable(solved, settings)
    with pytest.raises(ValueError, match="--shard with --kind retrieval"):
        check_shardable(ss.attach(clip(), ss.ReadConfig(rank=4), head=ss.Retrieve()), settings)
    read = ss.attach(FAMILIES["bert"].model(), ss.ReadConfig(rank=4), head=head)
    check_shardable(read, settings)
    with pytest.raises(ValueError, match=r"--shard with --features ram: .* Choose --features off"):
        check_shardable(read, ss.TrainSettings(output=tmp_path, features="ram"))
