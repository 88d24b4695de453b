"""Memory figures as numbers in columns: what telemetry says of the target's memory, reading by reading.

An hour at 10 Hz is 36,000 readings: as dicts they take 70 MB, as numbers 4.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loadbench.analysis.stats import Floats

Figures = Mapping[str, Any]
"""What ``MemoryFigures.as_json`` wrote: absent is not there."""

COLUMNS = (
    *("t_ns", "gpu_process", "gpu_used", "footprint", "private", "rss", "cgroup"),
    *("swap", "gpu_shared", "available", "total", "pressure", "alarm"),
)
ALARMS = {"normal": 0, "warn": 1, "critical": 2}
"""macOS' level of memory pressure."""


def row(figures: Figures) -> tuple[float, ...]:
    """One reading in the order of ``COLUMNS``, NaN where it has no figure."""
    gpus = figures.get("gpus") or ()
    numbers = (
        figures.get("t_ns"),
        _first(figures.get("gpu_dedicated_bytes"), _sum(gpus, "process_bytes")),
        _sum(gpus, "used_bytes"),
        figures.get("footprint_bytes"),
        figures.get("private_bytes"),
        figures.get("rss_bytes"),
        figures.get("cgroup_current_bytes"),
        _first(figures.get("swap_bytes"), figures.get("cgroup_swap_bytes")),
        _first(figures.get("gpu_shared_bytes"), _sum(gpus, "shared_bytes")),
        figures.get("available_bytes"),
        figures.get("total_bytes"),
        figures.get("pressure_some_share"),
        ALARMS.get(figures.get("pressure_level", "")),
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


def _sum(gpus: Sequence[Figures], name: str) -> int | None:
    given = [gpu[name] for gpu in gpus if gpu.get(name) is not None]
    return sum(given) if given else None
