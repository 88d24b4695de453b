"""Memory figures that macOS gives beyond psutil's. Written from its headers; not run here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from loadbench.target.memory_figures import AbsentError

LEVELS = {1: "normal", 2: "warn", 4: "critical"}
"""``kern.memorystatus_vm_pressure_level``, in the values of DISPATCH_MEMORYPRESSURE_* (<dispatch/source.h>)."""


class RusageInfo(ctypes.Structure):
    """``rusage_info_v0`` of <sys/resource.h>."""

    _fields_ = (
        ("ri_uuid", ctypes.c_uint8 * 16),
        ("ri_user_time", ctypes.c_uint64),
        ("ri_system_time", ctypes.c_uint64),
        ("ri_pkg_idle_wkups", ctypes.c_uint64),
        ("ri_interrupt_wkups", ctypes.c_uint64),
        ("ri_pageins", ctypes.c_uint64),
        ("ri_wired_size", ctypes.c_uint64),
        ("ri_resident_size", ctypes.c_uint64),
        ("ri_phys_footprint", ctypes.c_uint64),
        ("ri_proc_start_abstime", ctypes.c_uint64),
        ("ri_proc_exit_abstime", ctypes.c_uint64),
    )


def read_footprint(pids: Iterable[int]) -> dict[str, int]:
    """Physical footprint of the processes: what Activity Monitor calls memory, compressed and GPU memory included."""
    system = ctypes.CDLL("libSystem.dylib", use_errno=True)
    total = 0
    for pid in pids:
        info = RusageInfo()
        if system.proc_pid_rusage(pid, 0, ctypes.byref(info)) != 0:  # 0: RUSAGE_INFO_V0
            raise AbsentError(f"the footprint of process {pid} may not be read (errno {ctypes.get_errno()})")
        total += int(info.ri_phys_footprint)
    return {"footprint_bytes": total}


def read_pressure_level() -> dict[str, str]:
    """The machine's memory pressure in the system's own three words."""
    system = ctypes.CDLL("libSystem.dylib", use_errno=True)
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    name = b"kern.memorystatus_vm_pressure_level"
    if system.sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        raise AbsentError(f"sysctl {name.decode()} may not be read (errno {ctypes.get_errno()})")
    return {"pressure_level": level_name(value.value)}


def level_name(value: int) -> str:
    """The word for the system's number. AbsentError for one that no header names."""
    if value not in LEVELS:
        raise AbsentError(f"kern.memorystatus_vm_pressure_level: expected 1, 2 or 4, got {value}")
    return LEVELS[value]
