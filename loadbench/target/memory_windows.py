"""Memory figures that Windows gives beyond psutil's: its commit charge, and GPU memory by process. Not run here.

GPU memory comes from the performance counters that Task Manager shows, through pdh.dll: ``typeperf`` would start a
process for every reading, and its counter names and numbers are in the language of the system.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from loadbench.target.memory_figures import AbsentError, GpuFigures

COUNTERS = {
    "process_dedicated": r"\GPU Process Memory(*)\Dedicated Usage",
    "process_shared": r"\GPU Process Memory(*)\Shared Usage",
    "adapter_dedicated": r"\GPU Adapter Memory(*)\Dedicated Usage",
    "adapter_shared": r"\GPU Adapter Memory(*)\Shared Usage",
}
"""In English whatever the system's language; Windows 10 1709 and later with a WDDM 2 driver have them."""

_PROCESS = re.compile(r"pid_(\d+)_(luid_\w+)")
_FMT_LARGE, _MORE_DATA = 0x400, 0x800007D2  # PDH_FMT_LARGE, PDH_MORE_DATA: <pdh.h>, <pdhmsg.h>

Instances = Iterable[tuple[str, int]]
"""(instance, bytes): ``pid_8268_luid_0x00000000_0x0000C85A_phys_0``, an adapter's without the pid."""


class _Value(ctypes.Structure):
    """PDH_FMT_COUNTERVALUE_ITEM_W, with the union read as ``largeValue``."""

    _fields_ = (("name", ctypes.c_wchar_p), ("status", ctypes.c_uint32), ("value", ctypes.c_int64))


class _Performance(ctypes.Structure):
    """PERFORMANCE_INFORMATION of <psapi.h>."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        *((name, ctypes.c_size_t) for name in ("commit_total", "commit_limit", "commit_peak", "physical_total")),
        *((name, ctypes.c_size_t) for name in ("physical_available", "system_cache", "kernel_total", "kernel_paged")),
        *((name, ctypes.c_size_t) for name in ("kernel_nonpaged", "page_size")),
        *((name, ctypes.c_uint32) for name in ("handles", "processes", "threads")),
    )


def read_commit() -> dict[str, int]:
    """The machine's commit charge and its limit: Windows overcommits nothing, allocations fail where they meet."""
    if sys.platform != "win32":
        raise AbsentError("only Windows has a commit charge")
    found = _Performance(size=ctypes.sizeof(_Performance))
    if not ctypes.windll.psapi.GetPerformanceInfo(ctypes.byref(found), found.size):
        raise AbsentError("GetPerformanceInfo failed")
    return {
        "commit_bytes": found.commit_total * found.page_size,
        "commit_limit_bytes": found.commit_limit * found.page_size,
    }


class GpuCounters:
    """The four counters, open. Raises AbsentError where the system has none."""

    _pdh: Any
    _query: ctypes.c_void_p
    _counters: dict[str, ctypes.c_void_p]

    def __init__(self) -> None:
        if sys.platform != "win32":
            raise AbsentError("only Windows has these counters")
        self._pdh = ctypes.windll.pdh
        self._query = ctypes.c_void_p()
        self._counters = {}
        self._ask("PdhOpenQueryW", None, None, ctypes.byref(self._query))
        for name, path in COUNTERS.items():
            counter = ctypes.c_void_p()
            self._ask("PdhAddEnglishCounterW", self._query, ctypes.c_wchar_p(path), None, ctypes.byref(counter))
            self._counters[name] = counter

    def read(self, pids: Collection[int]) -> dict[str, Any]:
        """What ``pids`` hold, and the adapters' figures as those of devices."""
        self._ask("PdhCollectQueryData", self._query)
        return gpu_figures({name: self._instances(counter) for name, counter in self._counters.items()}, pids)

    def _instances(self, counter: ctypes.c_void_p) -> list[tuple[str, int]]:
        size, count = ctypes.c_uint32(0), ctypes.c_uint32(0)
        of = (counter, ctypes.c_uint32(_FMT_LARGE), ctypes.byref(size), ctypes.byref(count))
        if self._pdh.PdhGetFormattedCounterArrayW(*of, None) & 0xFFFFFFFF != _MORE_DATA:
            return []  # no instance: nothing uses a GPU
        buffer = ctypes.create_string_buffer(size.value)
        self._ask("PdhGetFormattedCounterArrayW", *of, buffer)
        items = ctypes.cast(buffer, ctypes.POINTER(_Value))
        return [(items[i].name, items[i].value) for i in range(count.value) if items[i].status in (0, 1)]  # valid, new

    def _ask(self, function: str, *args: Any) -> None:
        if status := getattr(self._pdh, function)(*args) & 0xFFFFFFFF:
            raise AbsentError(f"the GPU memory counters: {function} failed with 0x{status:08X}")


def gpu_figures(counters: Mapping[str, Instances], pids: Collection[int]) -> dict[str, Any]:
    """Figures from the instances of the four counters: those of ``pids`` summed, the adapters one by one."""
    adapters = {side: dict(counters[f"adapter_{side}"]) for side in ("dedicated", "shared")}
    held = {side: _by_adapter(counters[f"process_{side}"], pids) for side in ("dedicated", "shared")}
    return {
        "gpu_dedicated_bytes": sum(held["dedicated"].values()) if held["dedicated"] else None,
        "gpu_shared_bytes": sum(held["shared"].values()) if held["shared"] else None,
        "gpus": tuple(
            GpuFigures(
                index,
                f"adapter {name}",
                used_bytes=used,
                shared_bytes=adapters["shared"].get(name),
                process_bytes=held["dedicated"].get(name),
            )
            for index, (name, used) in enumerate(sorted(adapters["dedicated"].items()))
        ),
    }


def _by_adapter(instances: Instances, pids: Collection[int]) -> dict[str, int]:
    held: dict[str, int] = {}
    for name, size in instances:
        found = _PROCESS.fullmatch(name)
        if found and int(found[1]) in pids:
            held[found[2]] = held.get(found[2], 0) + size
    return held
