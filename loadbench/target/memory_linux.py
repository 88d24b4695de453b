"""Memory figures that Linux gives in files: /proc of each process, its cgroup (v1 or v2), pressure.

Every function takes the root that it reads under, so that recorded trees are read like the real one. Figures that a
kernel does not give are None; AbsentError says that a whole source is not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadbench.target.memory_figures import ENDED, AbsentError

UNLIMITED_BYTES = 1 << 60
"""v1 says "no limit" as the largest multiple of a page: 9223372036854771712."""

Figures = dict[str, Any]


def read_processes(proc: Path, pids: Iterable[int]) -> Figures:
    """Resident, swapped and highest resident bytes of all of them, from one file each. The first is the root.

    A zombie's file has no VmRSS: it holds nothing any more.
    """
    every = [_kibibytes(proc / str(pid) / "status") for pid in pids]
    rows = [row for row in every if "VmRSS" in row]
    if not every or "VmRSS" not in every[0]:
        raise AbsentError(ENDED)
    return {
        "processes": len(rows),
        "rss_bytes": _total(row.get("VmRSS") for row in rows),
        "swap_bytes": _total(row.get("VmSwap") for row in rows),
        "peak_rss_bytes": _total(row.get("VmHWM") for row in rows),
    }


def read_shares(proc: Path, pids: Iterable[int]) -> Figures:
    """PSS and USS, for which the kernel walks the page tables."""
    rows = []
    for pid in pids:
        try:
            rows.append(_kibibytes(proc / str(pid) / "smaps_rollup", strict=True))
        except (FileNotFoundError, ProcessLookupError):
            if not (proc / str(pid)).exists():
                continue  # it has ended since it was listed
            raise AbsentError("this kernel has no smaps_rollup (it came with 4.14)") from None
        except OSError as error:
            raise AbsentError(f"smaps_rollup of process {pid} may not be read: {error.strerror}") from None
    if not rows:
        raise AbsentError(ENDED)
    return {
        "pss_bytes": _total(row.get("Pss") for row in rows),
        "uss_bytes": _total(row.get("Private_Clean", 0) + row.get("Private_Dirty", 0) for row in rows),
    }


def reset_peaks(proc: Path, pids: Iterable[int]) -> None:
    """Set each process's high-water mark (VmHWM) back to what it holds now. AbsentError where that is not allowed.

    5 in clear_refs does this and nothing else (Linux 4.0, proc(5)); it takes the right to write to the process's files.
    """
    for pid in pids:
        try:
            (proc / str(pid) / "clear_refs").write_text("5")
        except (FileNotFoundError, ProcessLookupError):
            continue
        except OSError as error:
            raise AbsentError(f"the high-water mark of process {pid} may not be set back: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A cgroup's directory for memory, below ``mount``. It can be read when its process is gone, as after a kill."""

    path: Path
    mount: Path
    version: int

    def read(self) -> Figures:
        """What it holds now, its limit, its kills."""
        figures = self._v2() if self.version == 2 else self._v1()
        if figures["cgroup_current_bytes"] is None:
            raise AbsentError("the target's cgroup is gone" if not self.path.exists() else "it may not be read")
        return figures

    def _v2(self) -> Figures:
        events = _pairs(self.path / "memory.events")
        return {
            "cgroup_current_bytes": _number(self.path / "memory.current"),
            "cgroup_peak_bytes": _number(self.path / "memory.peak"),  # Linux 5.19
            "cgroup_limit_bytes": self._limit("memory.max"),
            "cgroup_swap_bytes": _number(self.path / "memory.swap.current"),
            "cgroup_ooms": events.get("oom"),
            "cgroup_oom_kills": events.get("oom_kill"),
        }

    def _v1(self) -> Figures:
        current = _number(self.path / "memory.usage_in_bytes")
        both = _number(self.path / "memory.memsw.usage_in_bytes")  # where swap is accounted
        return {
            "cgroup_current_bytes": current,
            "cgroup_peak_bytes": _number(self.path / "memory.max_usage_in_bytes"),
            "cgroup_limit_bytes": self._limit("memory.limit_in_bytes"),
            "cgroup_swap_bytes": None if both is None or current is None else max(both - current, 0),
            "cgroup_oom_kills": _pairs(self.path / "memory.oom_control").get("oom_kill"),  # Linux 4.13
        }

    def _limit(self, name: str) -> int | None:
        """The smallest limit of the cgroup and those above it: the one that is met first when it is alone."""
        levels = [self.path]
        while levels[-1] != self.mount:
            levels.append(levels[-1].parent)
        limits = (_number(level / name) for level in levels)
        return min((limit for limit in limits if limit is not None and limit < UNLIMITED_BYTES), default=None)


def find_cgroup(proc: Path, pid: int) -> Cgroup:
    """Find the cgroup that accounts for the memory of ``pid``. AbsentError says why there is none."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
        mounts = list(_mounts((proc / "self" / "mountinfo").read_text()))
    except OSError as error:
        raise AbsentError(f"the cgroup of process {pid} may not be read: {error.strerror}") from None
    entries = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    # With both, memory is accounted where the controller is named: the line of v2 is then there for systemd alone.
    found = next(((path, 1) for _, names, path in entries if "memory" in names.split(",")), None)
    found = found or next(((path, 2) for number, names, path in entries if (number, names) == ("0", "")), None)
    if found is None:
        raise AbsentError("the kernel accounts for no memory in cgroups")
    inside, version = found
    if ".." in Path(inside).parts:
        raise AbsentError("the target's cgroup lies outside of the part that this process may see")
    for root, mount, kind in mounts:
        if kind == version and Path(inside).is_relative_to(root):
            cgroup = Cgroup(mount / Path(inside).relative_to(root), mount, version)
            return _worth_reading(cgroup)
    raise AbsentError(f"the cgroup {inside} of the target is not mounted here")


def _worth_reading(cgroup: Cgroup) -> Cgroup:
    if cgroup.version == 2 and not (cgroup.path / "memory.current").exists():
        whole = cgroup.path == cgroup.mount
        raise AbsentError(
            "the target is in the root cgroup, which has no figures of its own"
            if whole
            else "the target's cgroup does not account for memory (its memory controller is off)"
        )
    if cgroup.version == 1 and cgroup.path == cgroup.mount and cgroup.read()["cgroup_limit_bytes"] is None:
        raise AbsentError("the target is in the root cgroup, whose figures are the machine's")
    return cgroup


def _mounts(mountinfo: str) -> Iterator[tuple[str, Path, int]]:
    """(root within the hierarchy, mount point, version) of each hierarchy that can account for memory: proc(5)."""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        mount, system = left.split(), right.split()
        if len(mount) < 5 or len(system) < 3:
            continue
        point = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mount[4]))  # a space is \040
        if system[0] == "cgroup2":
            yield mount[3], point, 2
        elif system[0] == "cgroup" and "memory" in system[2].split(","):
            yield mount[3], point, 1


def read_pressure(proc: Path, cgroup: Cgroup | None) -> Figures:
    """Pressure stall information of memory: the cgroup's where it has any (v2), else the machine's."""
    files = [(proc / "pressure" / "memory", "machine")]
    if cgroup is not None and cgroup.version == 2:
        files.insert(0, (cgroup.path / "memory.pressure", "cgroup"))
    for path, scope in files:
        try:
            text = path.read_text()
        except OSError:  # not there, or switched off: reading says "operation not supported"
            continue
        share = {kind: float(value) / 100 for kind, value in re.findall(r"^(some|full) avg10=([\d.]+)", text, re.M)}
        if share:
            return {
                "pressure_some_share": share.get("some"),
                "pressure_full_share": share.get("full"),
                "pressure_scope": scope,
            }
    raise AbsentError("this kernel gives no pressure stall information (CONFIG_PSI, psi=1)")


def _total(values: Iterable[int | None]) -> int | None:
    """The sum, None where any is missing: half a sum is no figure."""
    every = list(values)
    return None if None in every else sum(value for value in every if value is not None)


def _kibibytes(path: Path, *, strict: bool = False) -> dict[str, int]:
    """The ``Name:  123 kB`` lines of a file, in bytes. Without ``strict`` a file that is gone has none."""
    try:
        text = path.read_bytes()
    except OSError:
        if strict:
            raise
        return {}
    return {name.decode(): int(value) << 10 for name, value in re.findall(rb"^(\w+):\s+(\d+) kB$", text, re.M)}


def _pairs(path: Path) -> dict[str, int]:
    """``name 123`` lines."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file, or ``max`` in it."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
