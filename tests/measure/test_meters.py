from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

import sidestep as ss
from sidestep.measure import meters
from sidestep.measure.meters import Cost, MeterError, Spread, file_bytes, measure, measure_memory, time_steps
from sidestep.model.settings import Settings
from sidestep.model.token_loss import LmLoss
from tiny import FAMILIES, TinyFamily, call, logits

HEAD = ss.Classify(num_labels=3, pool="mean")
READ, FULL, PROBE = (Settings(config, HEAD) for config in (ss.ReadConfig(rank=4), ss.FullConfig(), ss.ProbeConfig()))
FULL_CHECKPOINT = Settings(ss.FullConfig(), HEAD, checkpoint="late")
#: What the results file's contract names (docs/meters.md).
MEASURED = {
    "parameters",
    "backbone_parameters",
    "task_bytes",
    "kept_bytes",
    "kept_by_module",
    "peak_bytes",
    "resident_bytes",
    "model_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "step_seconds",
    "forward_seconds",
    "flops",
    "energy_joules",
    "energy_source",
    "inference_seconds",
    "inference_peak_bytes",
    "planned_peak_bytes",
}


def batch_of(family: TinyFamily) -> dict[str, Tensor]:
    return {**family.inputs(), "labels": family.labels()}


def cost(found: Mapping[str, Cost | Exception], label: str) -> Cost:
    one = found[label]
    assert isinstance(one, Cost), one
    return one


@pytest.fixture(scope="module")
def found() -> dict[str, Cost | Exception]:
    contenders = {"read": READ, "probe": PROBE, "full": FULL, "full+checkpoint": FULL_CHECKPOINT}
    family = FAMILIES["bert"]
    return measure(family.model(), contenders, batch_of(family), repeats=3, planned=lambda model, batch: 7)


def test_a_cost_is_what_the_results_file_holds(found: dict[str, Cost | Exception]) -> None:
    values = json.loads(json.dumps(cost(found, "read").to_dict()))
    assert values.keys() == MEASURED
    assert values["step_seconds"].keys() == {"median", "low", "high", "values"}
    assert len(values["step_seconds"]["values"]) == 3
    assert values["planned_peak_bytes"] == 7


def test_every_round_is_timed_for_all(found: dict[str, Cost | Exception]) -> None:
    for one in found.values():
        assert isinstance(one, Cost)
        for spread in (one.step_seconds, one.forward_seconds, one.inference_seconds):
            assert spread is not None
            assert 0 < spread.low <= spread.median <= spread.high
            assert len(spread.values) == 3
        assert one.forward_seconds == cost(found, "read").forward_seconds


def test_bytes_are_those_of_the_parts(found: dict[str, Cost | Exception]) -> None:
    full, family = cost(found, "full"), FAMILIES["bert"]
    backbone = family.model()
    model = ss.attach(backbone, ss.FullConfig(), head=HEAD).train()
    trained = [parameter for _, parameter in model.trained_parameters()]
    batch = batch_of(family)
    with ss.saved_bytes(model) as kept:
        loss = model(**batch).loss
    loss.backward()
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert full.kept_bytes == kept.total
    assert full.parameters == sum(parameter.numel() for parameter in trained)
    assert full.gradient_bytes == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert full.optimizer_bytes == sum(value.nbytes for value in state)
    assert full.task_bytes == len(save(dict(model.state_dict())))
    assert full.model_bytes == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert full.backbone_parameters == sum(parameter.numel() for parameter in family.model().parameters())


def test_the_peak_is_that_of_a_plain_step(found: dict[str, Cost | Exception]) -> None:
    family = FAMILIES["bert"]
    for label, contender in {"read": READ, "full+checkpoint": FULL_CHECKPOINT}.items():
        model = ss.attach(family.model(), contender.method, head=HEAD, checkpoint=contender.checkpoint).train()
        optimizer = torch.optim.AdamW([p for _, p in model.trained_parameters()], fused=True)
        batch = batch_of(family)

        def step(model: Any = model, optimizer: Any = optimizer, batch: Any = batch) -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # the optimizer's state
        assert cost(found, label).peak_bytes == ss.peak_memory(step).allocated


def test_methods_are_ordered_as_they_should_be(found: dict[str, Cost | Exception]) -> None:
    read, probe, full, recomputed = (cost(found, label) for label in ("read", "probe", "full", "full+checkpoint"))
    assert probe.kept_bytes < read.kept_bytes < recomputed.kept_bytes < full.kept_bytes
    assert probe.flops < read.flops < full.flops < recomputed.flops
    assert recomputed.inference_peak_bytes == full.inference_peak_bytes
    assert read.peak_bytes is not None
    assert full.peak_bytes is not None
    assert read.peak_bytes < full.peak_bytes
    assert full.peak_bytes > full.kept_bytes


def test_bytes_by_module_sum_to_the_total_and_put_blocks_together(found: dict[str, Cost | Exception]) -> None:
    for one in found.values():
        assert isinstance(one, Cost)
        assert sum(one.kept_by_module.values()) == one.kept_bytes
        assert not any(part.isdigit() for name in one.kept_by_module for part in name.split("."))
    assert any("layer.*" in name for name in cost(found, "full").kept_by_module)


def test_the_smallest_modules_go_together() -> None:
    from sidestep.measure.step import MODULES, OTHER, _grouped

    assert _grouped({"a.0": 1, "a.1": 2, "": 5, "b2": 4}) == {"(model)": 5, "b2": 4, "a.*": 3}
    names = {f"m{index:02}": 100 - index for index in range(MODULES + 3)}
    grouped = _grouped(names)
    assert len(grouped) == MODULES
    assert sum(grouped.values()) == sum(names.values())
    assert grouped[OTHER] == 61 + 60 + 59 + 58


def test_energy_that_nothing_counts_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "energy_counter", lambda device, source=None: None)
    family = FAMILIES["bert"]
    times = time_steps(family.model(), {"probe": PROBE}, batch_of(family), repeats=1, warmup=0)
    assert (times["probe"].energy_joules, times["probe"].energy_source) == (None, "not measured")


def test_energy_is_taken_of_every_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counter:
        source = "rapl"

    counter = Counter()
    monkeypatch.setattr(meters, "energy_counter", lambda device, source=None: counter)
    monkeypatch.setattr(meters, "energy_per_step", lambda step, counter, wait: (step(), wait(), 2.5)[2])
    family = FAMILIES["bert"]
    times = time_steps(family.model(), {"probe": PROBE, "read": READ}, batch_of(family), repeats=1, warmup=0)
    assert [(one.energy_joules, one.energy_source) for one in times.values()] == [(2.5, "rapl")] * 2


def test_a_gpu_meter_without_a_gpu_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "measure_memory", lambda *args, **kwargs: pytest.fail("measured"))
    family = FAMILIES["bert"]
    with pytest.raises(MeterError, match="energy='nvml', but the model is on 'cpu': NVML measures NVIDIA GPUs"):
        measure(family.model(), {"probe": PROBE}, batch_of(family), energy="nvml")


@pytest.mark.parametrize("name", ["bert", "swin", "timm_vit"])
def test_the_backbone_and_the_random_numbers_are_as_before(name: str) -> None:
    family = FAMILIES[name]
    backbone, batch = family.model(), batch_of(family)
    inputs = family.inputs()
    before, flags = logits(call(backbone, inputs)), [p.requires_grad for p in backbone.parameters()]
    state = torch.get_rng_state()
    measure(backbone, {"full": FULL, "read": READ}, batch, repeats=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not backbone.training
    assert [p.requires_grad for p in backbone.parameters()] == flags
    assert all(p.grad is None for p in backbone.parameters())
    assert torch.equal(logits(call(backbone, inputs)), before)


def test_a_refused_contender_does_not_stop_the_others() -> None:
    family = FAMILIES["t5"]
    bitfit = Settings(ss.BitFitConfig(), HEAD)
    found = measure(family.model(), {"bitfit": bitfit, "read": READ}, batch_of(family), repeats=1, warmup=0)
    assert isinstance(found["bitfit"], ss.UnsupportedBackbone)
    assert "bitfit does not work on T5ForConditionalGeneration" in str(found["bitfit"])
    assert cost(found, "read").step_seconds is not None
    only = measure(family.model(), {"bitfit": bitfit}, batch_of(family))
    assert list(only) == ["bitfit"]


def test_a_contender_without_memory_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    real = meters.measure_step

    def step(model: ss.SideModel, batch: Any, *, bf16: bool) -> Any:
        if model.record.name == "full":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch, bf16=bf16)

    monkeypatch.setattr(meters, "measure_step", step)
    family = FAMILIES["bert"]
    found = measure(family.model(), {"full": FULL, "read": READ}, batch_of(family), repeats=1, warmup=0)
    error = found["full"]
    assert isinstance(error, torch.OutOfMemoryError)
    assert error.__traceback__ is None  # it would keep the step's tensors alive
    assert cost(found, "read").step_seconds is not None


def test_bfloat16_keeps_less() -> None:
    family = FAMILIES["bert"]
    full, half = (measure_memory(family.model(), FULL, batch_of(family), bf16=bf16) for bf16 in (False, True))
    assert half.kept_bytes < full.kept_bytes
    assert half.gradient_bytes == full.gradient_bytes


def test_rounds_out_of_range_are_refused() -> None:
    family = FAMILIES["bert"]
    backbone, batch = family.model(), batch_of(family)
    with pytest.raises(ValueError, match="no contenders: name at least one"):
        measure(backbone, {}, batch)
    with pytest.raises(ValueError, match="repeats=0, warmup=1: at least one round is timed"):
        measure(backbone, {"read": READ}, batch, repeats=0)
    with pytest.raises(ValueError, match="energy='sun': choose None or one of nvml, rapl"):
        measure(backbone, {"read": READ}, batch, energy="sun")


def test_each_round_begins_with_another_and_attaches_to_the_one_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    seconds = iter(range(1, 100))
    monkeypatch.setattr(meters, "seconds_of", lambda run, device: (run(), float(next(seconds)))[1])
    monkeypatch.setattr(
        meters, "train_step", lambda model, *rest: order.append(f"{model.record.name} {id(model.backbone)}")
    )
    family = FAMILIES["bert"]
    backbone = family.model()
    times = time_steps(backbone, {"read": READ, "full": FULL}, batch_of(family), repeats=2, warmup=1)
    assert order == [f"{name} {id(backbone)}" for name in ("read", "full", "read", "full", "full", "read")]
    # bare, read (step, inference), full | read, full, bare | full, bare, read
    assert times["read"].step_seconds.values == [6, 14]
    assert times["full"].inference_seconds.values == [9, 12]
    assert times["read"].forward_seconds.values == [10, 13]


def test_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(median=3, low=2, high=4, values=[4, 1, 3, 2, 5])
    assert Spread.of([2.0]) == Spread(median=2, low=2, high=2, values=[2])


def test_the_size_of_a_task_file_is_that_of_the_real_one() -> None:
    tensors = {
        "a.weight": torch.zeros(3, 5),
        "é": torch.zeros(7, dtype=torch.bfloat16),
        "steps": torch.tensor(3),
        "mask": torch.zeros(11, dtype=torch.bool),
        "empty": torch.zeros(0, 4),
        "long." * 30: torch.zeros(1001, dtype=torch.float16),
    }
    assert file_bytes(tensors) == len(save(tensors))
    assert file_bytes({}) == len(save({}))
    with pytest.raises(ValueError, match=r"z is torch.complex64, but a task file holds torch.int64, .*: convert it"):
        file_bytes({"z": torch.zeros(1, dtype=torch.complex64)})


@pytest.mark.parametrize("contender", [READ, FULL, FULL_CHECKPOINT], ids=["read", "full", "full+checkpoint"])
@pytest.mark.parametrize("name", ["bert", "vit", "swin", "t5", "llama"])
def test_fake_tensors_give_the_counts_of_real_ones(name: str, contender: Settings) -> None:
    family = FAMILIES[name]
    real = measure_memory(family.build(), contender, batch_of(family))
    mode = FakeTensorMode()
    batch = {key: mode.from_tensor(value) for key, value in batch_of(family).items()}
    # fake parameters cannot be moved, and need not
    with mode, no_init_weights(), mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module):
        backbone: Any = family.build()
        backbone.tie_weights()
        fake = measure_memory(backbone, contender, batch)
    measured = {"peak_bytes", "resident_bytes", "inference_peak_bytes"}
    for field in fields(Cost):
        value = getattr(fake, field.name)
        assert value == (None if field.name in measured else getattr(real, field.name)), field.name


def test_a_chunked_loss_is_measured_and_keeps_no_logits() -> None:
    """The counters' hooks on the head's input ask for more of autograd than runs inside of that loss."""
    family, kept = FAMILIES["llama"], {}
    batch = family.inputs()
    for loss in get_args(LmLoss):
        contender = Settings(ss.ReadConfig(rank=4), lm_loss=loss)
        kept[loss] = measure_memory(family.model(), contender, {**batch, "labels": batch["input_ids"]}).kept_bytes
    assert kept["chunked"] < kept["own"]
