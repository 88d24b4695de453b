"""The one shape of memory figures, whatever platform, process or machine they come from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ENDED = "the process has ended"
GPU_BYTES = 64 << 20  # what a process that only looks for a device takes of it, or a desktop changes by
HELD = {
    "footprint": "footprint_bytes",
    "private": "private_bytes",
    "rss": "rss_bytes",
    "cgroup": "cgroup_current_bytes",
}
"""What processes hold, by the first figure that there is. A cgroup's comes last: page cache is in it, and maybe we."""


class AbsentError(Exception):
    """A source gives no figures here. The message is the reason, one line."""


@dataclass(frozen=True, slots=True)
class GpuFigures:
    """One device. ``used_bytes`` is everybody's, ``process_bytes`` the watched processes'.

    ``shared_bytes`` is system memory that the device uses: AMD's GTT, the shared usage of a Windows adapter.
    """

    index: int
    name: str
    used_bytes: int | None = None
    total_bytes: int | None = None
    process_bytes: int | None = None
    shared_bytes: int | None = None
    utilisation_share: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    clock_mhz: float | None = None


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """What was read at one moment, ``t_ns`` of the run's clock. None: not given here, or not read this time.

    - The process tree: ``rss_bytes`` counts shared pages once for each process, ``pss_bytes`` splits them,
      ``uss_bytes`` leaves them out. ``peak_rss_bytes`` sums each process's own high-water mark since ``reset_peak``:
      the tree's peak, or a little above it where processes peaked at different times.
    - The cgroup: its limit is the smallest on the way up; its peak is since it was made; ``cgroup_ooms`` and
      ``cgroup_oom_kills`` count since then too.
    - Pressure: the share of the last 10 s in which some task, or all of them, waited for memory;
      ``pressure_scope`` says whose (``cgroup`` or ``machine``).
    - Windows: ``private_bytes`` is the commit charge of the tree, ``commit_bytes`` and ``commit_limit_bytes`` the
      machine's: allocations fail where they meet. macOS: ``pressure_level`` is normal, warn or critical.
    """

    t_ns: int = 0
    processes: int | None = None
    rss_bytes: int | None = None
    pss_bytes: int | None = None
    uss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    swap_bytes: int | None = None
    cgroup_current_bytes: int | None = None
    cgroup_peak_bytes: int | None = None
    cgroup_limit_bytes: int | None = None
    cgroup_swap_bytes: int | None = None
    cgroup_oom_kills: int | None = None
    cgroup_ooms: int | None = None
    pressure_some_share: float | None = None
    pressure_full_share: float | None = None
    pressure_scope: str | None = None
    available_bytes: int | None = None
    total_bytes: int | None = None
    gpus: tuple[GpuFigures, ...] = ()
    private_bytes: int | None = None
    commit_bytes: int | None = None
    commit_limit_bytes: int | None = None
    gpu_dedicated_bytes: int | None = None
    gpu_shared_bytes: int | None = None
    footprint_bytes: int | None = None
    pressure_level: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields that have a value."""
        row = _given(asdict(self))
        if gpus := row.pop("gpus"):
            row["gpus"] = [_given(gpu) for gpu in gpus]
        return row


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
