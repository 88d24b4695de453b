"""Runs a child process under a memory limit of its own, so that what it takes cannot be the machine's.

A cgroup where one can be made (root, or a delegated one): it counts every page, and the kernel kills what goes beyond.
Else ``RLIMIT_DATA``, under which allocations fail instead; not ``RLIMIT_AS``, which counts what is only reserved too.
On Windows a Job Object, under which allocations fail as well. Linux is run here; the Windows side is written from its
documentation. What a death under a limit means is ``state``'s.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadbench.errors import UsageError
from loadbench.target.processes import machine_bytes

CGROUP_V2, CGROUP_V1, RLIMIT_DATA, JOB_OBJECT = "cgroup v2", "cgroup v1", "RLIMIT_DATA", "Job Object"

# The limit is there before the child's first instruction, and `exec` keeps the pid. $0 is the folder or the KiB.
_ENTER_CGROUP = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
_LOWER_RLIMIT = 'ulimit -d "$0" && exec "$@"'

_FILES = {  # limit, limit with swap (v1) or of swap (v2), peak, and where the kills are counted
    CGROUP_V2: ("memory.max", "memory.swap.max", "memory.peak", "memory.events"),
    CGROUP_V1: (
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
        "memory.max_usage_in_bytes",
        "memory.oom_control",
    ),
}


@dataclass(frozen=True, slots=True)
class Limit:
    """A memory limit and the ``command`` to start under it; ``kind`` says what holds it.

    ``instead_of`` tells why it is not the better kind, None where it is the best. ``folder`` is the cgroup's.
    """

    kind: str
    limit_bytes: int
    command: tuple[str, ...]
    instead_of: str | None = None
    folder: Path | None = None
    job: int | None = None

    @property
    def kills(self) -> bool:
        """Whether going beyond it ends in a kill by the kernel; else allocations fail, and the child sees to them."""
        return self.folder is not None

    @property
    def oom_kills(self) -> int | None:
        """How many processes the kernel has killed in this cgroup; None where there is none."""
        if self.folder is None:
            return None
        for line in _read(self.folder / _FILES[self.kind][3]).splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
        return None

    @property
    def peak_bytes(self) -> int | None:
        """The most that the cgroup has held, pages of files included; None where there is none."""
        if self.folder is None:
            return None
        peak = _read(self.folder / _FILES[self.kind][2]).strip()
        return int(peak) if peak else None

    def hold(self, process: subprocess.Popen[bytes]) -> None:
        """Put the started child under the limit where that takes its handle: a Job Object. Call it before it works."""
        if self.job is not None:
            _assign(self.job, process)

    def release(self) -> None:
        """Remove what was made for the limit, after the child has ended."""
        if self.folder is not None:
            with suppress(OSError):  # a process in it that does not end: the next run tidies up
                self.folder.rmdir()
        if self.job is not None:
            ctypes.windll.kernel32.CloseHandle(self.job)  # type: ignore[attr-defined]

    def as_json(self) -> dict[str, Any]:
        named = {"kind": self.kind, "bytes": self.limit_bytes}
        return named if self.instead_of is None else named | {"instead_of": self.instead_of}


def limit_for(command: Sequence[str], limit_bytes: int, kind: str | None = None) -> Limit:
    """The best limit that this machine lets us set, and the command that starts ``command`` under it.

    ``kind`` RLIMIT_DATA takes that though a cgroup could be made: to see allocations fail before the kernel kills.
    Raises UsageError for a limit that holds nothing, and where there is no way to hold one.
    """
    total_bytes = machine_bytes()
    if limit_bytes > total_bytes:
        has, got = (f"{size / 2**30:,.1f} GiB" for size in (total_bytes, limit_bytes))
        raise UsageError(f"memory limit: expected no more than this machine's {has}, got {got}")
    if sys.platform == "win32":
        return Limit(JOB_OBJECT, limit_bytes, tuple(command), job=_make_job(limit_bytes))
    if sys.platform != "linux":
        cure = "go without one: --set memory_limit=null"
        raise UsageError(f"memory limit: expected Linux or Windows, got {sys.platform}, which enforces none; {cure}")
    reasons = []
    for found, parent in _hierarchies() if kind != RLIMIT_DATA else ():
        try:
            folder = _make_cgroup(found, parent, limit_bytes)
        except OSError as error:
            reasons.append(f"no {found} in {parent}: {error.strerror}")
            continue
        enter = ("/bin/sh", "-c", _ENTER_CGROUP, str(folder), *command)
        return Limit(found, limit_bytes, enter, "; ".join(reasons) or None, folder)
    if not reasons:
        reasons = ["it was asked for" if kind == RLIMIT_DATA else "no cgroup hierarchy that limits memory is mounted"]
    lower = ("/bin/sh", "-c", _LOWER_RLIMIT, str(limit_bytes >> 10), *command)
    return Limit(RLIMIT_DATA, limit_bytes, lower, "; ".join(reasons))


def _hierarchies() -> list[tuple[str, Path]]:
    """(kind, the cgroup we are in) of every mounted hierarchy that can limit memory, v2 first."""
    own: dict[str, str] = {}
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    found: list[tuple[str, Path]] = []
    for line in _read(Path("/proc/self/mounts")).splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup2" and "memory" in _read(Path(mount, "cgroup.controllers")).split():
            found.insert(0, (CGROUP_V2, Path(mount + own.get("", "/"))))
        elif kind == "cgroup" and "memory" in options.split(","):
            # In a container the path is the host's, and what is mounted is ours already.
            here = Path(mount + own.get("memory", "/"))
            found.append((CGROUP_V1, here if here.is_dir() else Path(mount)))
    return found


def _make_cgroup(kind: str, parent: Path, limit_bytes: int) -> Path:
    """A new cgroup with this limit and no swap beyond it. OSError where that cannot be."""
    if kind == CGROUP_V2 and "memory" not in _read(parent / "cgroup.subtree_control").split():
        if (parent / "cgroup.type").exists() and (parent.parent / "cgroup.subtree_control").exists():
            parent = parent.parent  # one with processes in it, as ours, may not limit its children: go beside it
        (parent / "cgroup.subtree_control").write_text("+memory")
    for left in parent.glob("loadbench-*"):
        if not Path("/proc", left.name.split("-")[1]).exists():  # of one who was killed
            with suppress(OSError):
                left.rmdir()
    folder = Path(tempfile.mkdtemp(prefix=f"loadbench-{os.getpid()}-", dir=parent))
    limit, swap, *_ = _FILES[kind]
    try:
        (folder / limit).write_text(str(limit_bytes))
        if (folder / swap).exists():  # not there where the kernel does not account for swap
            (folder / swap).write_text("0" if kind == CGROUP_V2 else str(limit_bytes))
    except OSError:
        folder.rmdir()
        raise
    return folder


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _make_job(limit_bytes: int) -> int:
    """A Job Object whose processes get no more commit than this and end when its handle is closed."""
    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined]
    kernel32.CreateJobObjectW.restype = ctypes.c_void_p
    job: int | None = kernel32.CreateJobObjectW(None, None)
    extended_limit_information = 9
    limits = _job_limits(limit_bytes)
    size = ctypes.sizeof(limits)
    if job is None or not kernel32.SetInformationJobObject(
        ctypes.c_void_p(job), extended_limit_information, ctypes.byref(limits), size
    ):
        raise UsageError(f"memory limit: Windows refused a Job Object (error {kernel32.GetLastError()})")
    return job


def _job_limits(limit_bytes: int) -> ctypes.Structure:
    """``JOBOBJECT_EXTENDED_LIMIT_INFORMATION`` of <winnt.h>."""
    quad, word, size = ctypes.c_int64, ctypes.c_uint32, ctypes.c_size_t

    class Basic(ctypes.Structure):
        _fields_ = (
            *(("per_process_user_time", quad), ("per_job_user_time", quad), ("flags", word)),
            *(("minimum_working_set", size), ("maximum_working_set", size), ("active_processes", word)),
            *(("affinity", size), ("priority_class", word), ("scheduling_class", word)),
        )

    class Extended(ctypes.Structure):
        _fields_ = (
            *(("basic", Basic), ("io", ctypes.c_uint64 * 6), ("process_memory", size), ("job_memory", size)),
            *(("peak_process_memory", size), ("peak_job_memory", size)),
        )

    limits = Extended()
    job_memory, kill_on_job_close = 0x200, 0x2000
    limits.basic.flags = job_memory | kill_on_job_close
    limits.job_memory = limit_bytes
    return limits


def _assign(job: int, process: subprocess.Popen[bytes]) -> None:
    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined]
    handle = ctypes.c_void_p(int(process._handle))  # type: ignore[attr-defined]
    if not kernel32.AssignProcessToJobObject(ctypes.c_void_p(job), handle):
        raise UsageError(f"memory limit: Windows refused the Job Object (error {kernel32.GetLastError()})")
