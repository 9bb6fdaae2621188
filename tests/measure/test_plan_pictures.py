"""Plans of vision-language models: a picture's tokens beside each text, and the tower that reads the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import sidestep as ss
from pictured_tasks import llava_backbone, qwen_backbone
from sidestep.measure.plan import Plan, plan
from sidestep.measure.plan.trace import PICTURES_NOTE

PICTURE = 4
"""Tokens of LLaVA's picture."""


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_backbone(tmp_path_factory.mktemp("plan") / "llava")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_backbone(tmp_path_factory.mktemp("plan") / "qwen")


def planned(backbone: Any, method: Any, **how: Any) -> Plan:
    return plan(backbone, method, **{"batch": 8, "length": 32, **how})


@pytest.mark.parametrize("writes", ["lm", None])
@pytest.mark.parametrize(
    "method", [ss.ReadConfig(rank=4), ss.LoraConfig(rank=4), ss.FullConfig()], ids=["read", "lora", "full"]
)
def test_a_plan_with_a_picture_is_near_what_is_measured(llava: Path, method: Any, writes: Any) -> None:
    found, real = (planned(llava, method, writes=writes, measure=measure) for measure in (False, True))
    assert (found.length, found.pictured) == (real.length, real.pictured) == (32 + PICTURE, True)
    assert found.peak_bytes == pytest.approx(real.peak_bytes, rel=0.1)
    assert found.batch_bytes == real.batch_bytes


def test_the_picture_is_more_than_its_tokens_where_its_tower_is_trained(llava: Path) -> None:
    alone = planned(AutoConfig.from_pretrained(llava), ss.FullConfig(), length=32 + PICTURE, writes="lm")
    with_picture = planned(llava, ss.FullConfig(), writes="lm")
    assert (alone.length, alone.pictured) == (with_picture.length, False)
    assert with_picture.kept_bytes is not None
    assert alone.kept_bytes is not None
    assert with_picture.kept_bytes > 1.1 * alone.kept_bytes


def test_a_larger_picture_has_more_tokens(qwen: Path) -> None:
    small, large = (planned(qwen, ss.LoraConfig(rank=4), writes="lm", image_size=size) for size in (16, 32))
    assert large.length is not None
    assert small.length is not None
    assert large.length - small.length == 16 - 4
    assert large.peak_bytes > small.peak_bytes


def test_a_tower_that_looks_at_values_is_left_out_and_said_so_and_can_be_measured(qwen: Path) -> None:
    found, real = (planned(qwen, ss.LoraConfig(rank=4), writes="lm", measure=measure) for measure in (False, True))
    assert PICTURES_NOTE in found.notes[0]
    assert "--measure" in found.notes[0]
    assert (found.length, found.pictured, real.notes) == (real.length, True, ())
    assert found.peak_bytes == pytest.approx(real.peak_bytes, rel=0.1)


def test_a_picture_for_a_model_without_a_processor_is_refused(llava: Path) -> None:
    with pytest.raises(ValueError, match="image_size=16, but LlavaModel has no processor of pictures here"):
        planned(AutoConfig.from_pretrained(llava), ss.ReadConfig(rank=4), image_size=16)
