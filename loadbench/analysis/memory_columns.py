"""Memory figures as numbers in columns: what telemetry says of the target's memory, reading by reading.

An hour at 10 Hz is 36,000 readings: as dicts they take 70 MB, as numbers 4.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loadbench.analysis.stats import Floats
from loadbench.target.memory_figures import GPU_BYTES, HELD

Figures = Mapping[str, Any]
"""What ``MemoryFigures.as_json`` wrote: absent is not there."""

COLUMNS = (
    *("t_ns", "gpu_process", "gpu_used", *HELD),
    *("swap", "gpu_shared", "available", "total", "pressure", "alarm"),
    *("gpus", "power_all", "gpus_used", "power_used"),
)
ALARMS = {"normal": 0, "warn": 1, "critical": 2}
"""macOS' level of memory pressure."""


def row(figures: Figures) -> tuple[float, ...]:
    """One reading in the order of ``COLUMNS``, NaN where it has no figure."""
    gpus = figures.get("gpus") or ()
    used = [gpu for gpu in gpus if (gpu.get("process_bytes") or 0) >= GPU_BYTES]
    numbers = (
        figures.get("t_ns"),
        _first(figures.get("gpu_dedicated_bytes"), _sum(gpus, "process_bytes")),
        _sum(gpus, "used_bytes"),
        *map(figures.get, HELD.values()),
        _first(figures.get("swap_bytes"), figures.get("cgroup_swap_bytes")),
        _first(figures.get("gpu_shared_bytes"), _sum(gpus, "shared_bytes")),
        figures.get("available_bytes"),
        figures.get("total_bytes"),
        figures.get("pressure_some_share"),
        ALARMS.get(figures.get("pressure_level", "")),
        *(len(gpus), _power(gpus), len(used), _power(used)),
    )
    return tuple(np.nan if number is None else float(number) for number in numbers)


def columns(rows: Sequence[float] | array[float]) -> dict[str, Floats]:
    """Rows laid end to end, as columns by name."""
    table = np.array(rows, np.float64).reshape(-1, len(COLUMNS))
    return {name: table[:, place] for place, name in enumerate(COLUMNS)}


def gpu_total(figures: Figures) -> int | None:
    """What all devices have."""
    return _sum(figures.get("gpus") or (), "total_bytes")


def _first(*numbers: int | None) -> int | None:
    return next((number for number in numbers if number is not None), None)


def _power(gpus: Sequence[Figures]) -> float | None:
    """Watts of all of them; None where one does not say."""
    watts = [gpu["power_w"] for gpu in gpus if gpu.get("power_w") is not None]
    return float(sum(watts)) if gpus and len(watts) == len(gpus) else None


def _sum(gpus: Sequence[Figures], name: str) -> int | None:
    given = [gpu[name] for gpu in gpus if gpu.get(name) is not None]
    return sum(given) if given else None
