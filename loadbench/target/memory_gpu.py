"""What graphics devices hold: NVIDIA's through NVML, AMD's through the files of its Linux driver."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from loadbench.target.memory_figures import AbsentError, GpuFigures


class Nvidia:
    """NVIDIA's devices. Raises AbsentError where there is no driver or no device."""

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise AbsentError("nvidia-ml-py is not installed") from None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            self._devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        except pynvml.NVMLError as error:
            raise AbsentError(f"NVIDIA's management library: {error}") from None
        if not self._devices:
            raise AbsentError("no NVIDIA device")
        self._names = [self._ask(pynvml.nvmlDeviceGetName, device) for device in self._devices]

    def read(self, pids: Collection[int]) -> tuple[GpuFigures, ...]:
        """Figures of each device, and what the processes ``pids`` hold on it."""
        return tuple(self._device(index, device, pids) for index, device in enumerate(self._devices))

    def _device(self, index: int, device: Any, pids: Collection[int]) -> GpuFigures:
        nvml, ask = self._nvml, self._ask
        memory = ask(nvml.nvmlDeviceGetMemoryInfo, device)
        busy = ask(nvml.nvmlDeviceGetUtilizationRates, device)
        milliwatts = ask(nvml.nvmlDeviceGetPowerUsage, device)
        # A process that computes through Vulkan is listed among the graphics ones, or in both lists.
        users = [
            (process.pid, process.usedGpuMemory)
            for list_processes in (
                nvml.nvmlDeviceGetComputeRunningProcesses,
                nvml.nvmlDeviceGetGraphicsRunningProcesses,
            )
            for process in ask(list_processes, device) or ()
        ]
        return GpuFigures(
            index,
            self._names[index] or "NVIDIA",
            used_bytes=None if memory is None else memory.used,
            total_bytes=None if memory is None else memory.total,
            process_bytes=held_by(pids, users),
            utilisation_share=None if busy is None else busy.gpu / 100,
            power_w=None if milliwatts is None else milliwatts / 1000,
            temperature_c=ask(nvml.nvmlDeviceGetTemperature, device, nvml.NVML_TEMPERATURE_GPU),
            clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, device, nvml.NVML_CLOCK_SM),
        )

    def _ask(self, question: Callable[..., Any], *args: Any) -> Any:
        """The answer, None where the device or its driver does not give it."""
        try:
            return question(*args)
        except self._nvml.NVMLError:
            return None


def held_by(pids: Collection[int], users: Iterable[tuple[int, int | None]]) -> int | None:
    """What ``pids`` hold of a device; None where none of them is listed or the driver does not say (Windows' WDDM).

    In a container none is: the driver lists the numbers that the processes have outside.
    """
    held: dict[int, int] = {}
    for pid, size in users:
        if pid in pids and size is not None:
            held[pid] = max(size, held.get(pid, 0))
    return sum(held.values()) if held else None


def read_amd(drm: Path) -> tuple[GpuFigures, ...]:
    """AMD's cards under ``drm`` (/sys/class/drm), from the files of amdgpu. AbsentError where there is none."""
    cards = [card for card in drm.glob("card*") if re.fullmatch(r"card\d+", card.name)]
    cards = [card for card in cards if (card / "device" / "mem_info_vram_total").exists()]
    if not cards:
        raise AbsentError("no card of the amdgpu driver")
    return tuple(_amd_card(card) for card in sorted(cards, key=_index))


def _amd_card(card: Path) -> GpuFigures:
    device = card / "device"
    sensors = next(iter(sorted((device / "hwmon").glob("hwmon*"))), device / "hwmon")
    microwatts = _number(sensors / "power1_average")
    if microwatts is None:  # some cards give the moment's value instead
        microwatts = _number(sensors / "power1_input")
    busy, millidegrees = _number(device / "gpu_busy_percent"), _number(sensors / "temp1_input")
    hertz = _number(sensors / "freq1_input")
    return GpuFigures(
        _index(card),
        _text(device / "product_name") or f"AMD {card.name}",
        used_bytes=_number(device / "mem_info_vram_used"),
        total_bytes=_number(device / "mem_info_vram_total"),
        shared_bytes=_number(device / "mem_info_gtt_used"),
        utilisation_share=None if busy is None else busy / 100,
        power_w=None if microwatts is None else microwatts / 1e6,
        temperature_c=None if millidegrees is None else millidegrees / 1000,
        clock_mhz=None if hertz is None else hertz / 1e6,
    )


def _index(card: Path) -> int:
    return int(card.name.removeprefix("card"))


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:  # a sleeping card refuses its sensors
        return None


def _number(path: Path) -> int | None:
    text = _text(path) or ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None
