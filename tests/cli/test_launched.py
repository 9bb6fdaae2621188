"""Commands whose processes, started together, each work alone."""

from __future__ import annotations

import pytest

from sidestep.cli.launched import as_single_process

GROUP = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("visible", "own"), [(None, "1"), ("4,5", "5"), ("7", "7"), ("GPU-a,GPU-b", "GPU-b")])
def test_a_rank_becomes_a_process_of_its_own_with_a_card_of_its_own(visible: str | None, own: str) -> None:
    environment = {**GROUP, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})}
    assert as_single_process(environment) == 4
    assert environment == {"CUDA_VISIBLE_DEVICES": own}


@pytest.mark.parametrize("environment", [{}, {"CUDA_VISIBLE_DEVICES": "0,1"}])
def test_without_a_launcher_nothing_changes(environment: dict[str, str]) -> None:
    before = dict(environment)
    assert as_single_process(environment) == 1
    assert environment == before
