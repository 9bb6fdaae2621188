from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidestep.measure import energy
from sidestep.measure.energy import MeterError, Nvml, Rapl, energy_counter, energy_per_step

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def zone(folder: Path, path: str, name: str, energy: int, span: int = 1_000_000) -> None:
    (folder / path).mkdir(parents=True)
    for file, value in {"name": name, "energy_uj": energy, "max_energy_range_uj": span}.items():
        (folder / path / file).write_text(f"{value}\n")


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages, one with memory of its own; the platform and the cores hold nothing new."""
    zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:0:1", "dram", 500, span=65_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 100)
    zone(tmp_path, "intel-rapl:2", "psys", 1)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    return tmp_path


def test_rapl_adds_packages_and_memory_once(powercap: Path) -> None:
    counter = energy_counter(CPU)
    assert counter is not None
    assert counter.source == "rapl"
    start = counter.read()
    assert start == [900_000, 500, 100]
    assert counter.joules(start, [950_000, 600, 150]) == pytest.approx(0.05015)


def test_a_counter_that_began_again_is_unwrapped(powercap: Path) -> None:
    counter = Rapl.of(powercap)
    assert counter.joules([900_000, 64_000, 0], [100_000, 1_000, 0]) == pytest.approx(0.2 + 0.002)


def test_without_a_counter_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "missing")
    assert energy_counter(CPU) is None
    assert energy_counter(torch.device("meta")) is None
    with pytest.raises(MeterError, match=r"there is no RAPL counter under .*missing: measure without it"):
        energy_counter(CPU, "rapl")


def test_a_counter_that_cannot_be_read_is_not_used(powercap: Path) -> None:
    (powercap / "intel-rapl:1" / "energy_uj").unlink()  # root may read whatever its mode
    assert energy_counter(CPU) is None
    with pytest.raises(MeterError, match=r"RAPL's counter cannot be read .* let this user read it"):
        energy_counter(CPU, "rapl")


def test_a_counter_of_another_device_is_refused() -> None:
    with pytest.raises(MeterError, match="energy='nvml', but the model is on 'cpu': NVML measures NVIDIA GPUs"):
        energy_counter(CPU, "nvml")
    with pytest.raises(MeterError, match="energy='rapl', but the model is on 'cuda:0': RAPL measures the processor"):
        energy_counter(CUDA, "rapl")
    with pytest.raises(ValueError, match="energy='battery': choose None or one of nvml, rapl"):
        energy_counter(CPU, "battery")


class NvmlError(Exception):
    pass


@pytest.fixture
def pynvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for nvidia-ml-py with one GPU, whose counter goes up by 3 J a reading."""
    readings = iter(range(1_000, 1_000_000, 3_000))

    def handle(uuid: str) -> str:
        if uuid != "GPU-abc":
            raise NvmlError("Not Found")
        return uuid

    module: Any = SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings),
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    return module


def test_nvml_counts_the_gpu_by_its_identity(pynvml: Any) -> None:
    counter = energy_counter(CUDA, "nvml")
    assert isinstance(counter, Nvml)
    assert (counter.source, counter.handle) == ("nvml", "GPU-abc")
    start = counter.read()
    assert counter.joules(start, counter.read()) == 3.0


def test_a_gpu_without_a_counter_is_not_measured(pynvml: Any) -> None:
    def refuse(handle: str) -> int:
        raise NvmlError("Not Supported")

    pynvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert energy_counter(CUDA) is None
    with pytest.raises(MeterError, match=r"does not count the energy of 'cuda:0' \(Not Supported\)"):
        energy_counter(CUDA, "nvml")


def test_without_nvidia_ml_py_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_counter(CUDA) is None
    with pytest.raises(
        MeterError, match=r'needs nvidia-ml-py, which is not installed: pip install "sidestep\[compare\]"'
    ):
        energy_counter(CUDA, "nvml")


class Watts:
    """A counter of 10 W on a clock that the test moves."""

    source = "rapl"

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def joules(self, start: float, end: float) -> float:
        return 10 * (end - start)


@pytest.mark.parametrize(("seconds", "steps"), [(2.0, 3), (0.5, 10), (30.0, 1)])
def test_a_reading_spans_five_seconds_or_one_step(monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int) -> None:
    counter = Watts()
    monkeypatch.setattr(energy.time, "perf_counter", lambda: counter.now)
    done: list[float] = []

    def step() -> None:
        counter.now += seconds
        done.append(seconds)

    waits: list[int] = []
    joules = energy_per_step(step, counter, lambda: waits.append(len(done)))
    assert len(done) == steps
    assert waits == list(range(steps + 1))  # the device is idle when a reading is taken
    assert joules == pytest.approx(10 * seconds)
