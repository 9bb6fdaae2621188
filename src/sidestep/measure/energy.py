"""Energy counters: NVML's of an NVIDIA GPU, RAPL's of the processor. What neither measures is not guessed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch

Source = Literal["nvml", "rapl"]

POWERCAP = Path("/sys/class/powercap")
#: Seconds that a reading has to span. GPUs renew NVML's counter every 20 to 100 ms (RAPL's: 1 ms). So at both ends of
#: a reading of this length together no more than 2 % is lost or won.
READING_SECONDS = 5.0


class MeterError(RuntimeError):
    """A meter that was asked for cannot measure here. The message says why and what to do."""


class EnergyCounter(Protocol):
    """A counter of the energy that a device has used."""

    @property
    def source(self) -> Source:
        """What counts."""

    def read(self) -> Any:
        """The counter's state now, for `joules`."""

    def joules(self, start: Any, end: Any) -> float:
        """The energy between two readings."""


def energy_counter(device: torch.device, source: Source | None = None) -> EnergyCounter | None:
    """The counter of a device, or None if it has none that can be read.

    Args:
        device: where the model is: NVML counts a CUDA device, RAPL the processor.
        source: asks for one of them, and then there has to be one.

    Raises:
        ValueError: if the source is unknown.
        MeterError: if the source that was asked for cannot measure this device.
    """
    if source is not None and source not in get_args(Source):
        raise ValueError(f"energy={source!r}: choose None or one of {', '.join(get_args(Source))}")
    if source == "nvml" and device.type != "cuda":
        raise MeterError(
            f"energy='nvml', but the model is on {str(device)!r}: NVML measures NVIDIA GPUs. Move it to one"
        )
    if source == "rapl" and device.type != "cpu":
        raise MeterError(f"energy='rapl', but the model is on {str(device)!r}: RAPL measures the processor")
    try:
        if device.type == "cuda":
            return Nvml.of(device)
        return Rapl.of(POWERCAP) if device.type == "cpu" else None
    except MeterError:
        if source is not None:
            raise
        return None


def energy_per_step(
    step: Callable[[], object], counter: EnergyCounter, wait: Callable[[], None], *, seconds: float = READING_SECONDS
) -> float:
    """Joules of a step. It is the mean over as many steps as a reading takes.

    All that the device uses in that time counts, also its idle power and what other processes do on it.

    Args:
        step: called at least once.
        counter: see `energy_counter`.
        wait: returns when the device has done all its work.
        seconds: that the reading spans. A shorter one is less exact.
    """
    wait()
    steps, begin, start = 0, time.perf_counter(), counter.read()
    while steps == 0 or time.perf_counter() - begin < seconds:
        step()
        wait()
        steps += 1
    return counter.joules(start, counter.read()) / steps


@dataclass(frozen=True)
class Nvml:
    """The total-energy counter of an NVIDIA GPU (Volta and later), in millijoules since the driver was loaded."""

    nvml: Any
    handle: Any
    source: Source = "nvml"

    @classmethod
    def of(cls, device: torch.device) -> Nvml:
        """The counter of a CUDA device.

        Raises:
            MeterError: if nvidia-ml-py is not installed, or the GPU has no such counter.
        """
        try:
            nvml = import_module("pynvml")
        except ModuleNotFoundError as error:
            raise MeterError(
                'energy on a GPU needs nvidia-ml-py, which is not installed: pip install "sidestep[compare]"'
            ) from error
        try:
            nvml.nvmlInit()
            # by identity: NVML counts all GPUs, torch those in CUDA_VISIBLE_DEVICES
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError as error:
            raise MeterError(
                f"NVML does not count the energy of {str(device)!r} ({error}): measure without it"
            ) from error
        return cls(nvml, handle)

    def read(self) -> int:
        """Millijoules."""
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)

    def joules(self, start: int, end: int) -> float:
        """The energy between two readings."""
        return (end - start) / 1000


@dataclass(frozen=True)
class Zone:
    """A RAPL domain: its counter file, and the value in microjoules at which the counter starts again from 0."""

    file: Path
    span: int


@dataclass(frozen=True)
class Rapl:
    """The processor's packages and their memory, through Linux's powercap files."""

    zones: Sequence[Zone]
    source: Source = "rapl"

    @classmethod
    def of(cls, folder: Path) -> Rapl:
        """The zones under a powercap folder.

        Raises:
            MeterError: if there are none, or they cannot be read.
        """
        try:
            # The platform's zone ("psys") holds the packages, and a package its cores: neither is added again.
            zones = [
                Zone(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()))
                for zone in sorted(folder.glob("intel-rapl:*"))
                if (zone / "name").read_text().startswith(("package", "dram"))
            ]
            for zone in zones:
                zone.file.read_text()
        except OSError as error:
            raise MeterError(
                f"RAPL's counter cannot be read ({error}): let this user read it, or measure without it"
            ) from error
        if not zones:
            raise MeterError(f"there is no RAPL counter under {folder}: measure without it")
        return cls(zones)

    def read(self) -> list[int]:
        """Microjoules of each zone."""
        return [int(zone.file.read_text()) for zone in self.zones]

    def joules(self, start: list[int], end: list[int]) -> float:
        """The energy between two readings less than one wrap-around (ten minutes and more) apart."""
        used = (
            after - before if after >= before else after + zone.span - before
            for zone, before, after in zip(self.zones, start, end, strict=True)
        )
        return sum(used) / 1e6
