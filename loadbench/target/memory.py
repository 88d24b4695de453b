"""The target's memory: which process it is, if it is one of this machine's, and what it holds, source by source.

One source of figures = one function, of this file or of its platform's (``memory_linux``, ``memory_windows``,
``memory_macos``, ``memory_gpu``), and its line in ``MemoryWatch._sources``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns, thread_time
from typing import Any

import psutil

from loadbench.target import memory_gpu, memory_linux, memory_macos, memory_windows
from loadbench.target.memory_figures import ENDED, AbsentError, MemoryFigures
from loadbench.target.processes import ProcessTree

SHARES_EVERY_NS = 10_000_000_000
"""PSS and USS make the kernel walk the page tables: 3.7 ms for the embedded service (52 MB), up to 50 ms a gigabyte."""

GPU_EVERY_NS = 900_000_000
"""Once a second, with room for a sampler that comes a little early: NVML asks the driver eight questions a card."""

REST = 100
"""A source that is not read every time rests for so many times what its last reading took: under 1 % for each."""


@dataclass(frozen=True, slots=True)
class Roots:
    """Where Linux shows its figures. Tests put recorded trees in their place."""

    proc: Path = Path("/proc")
    drm: Path = Path("/sys/class/drm")


Processes = Sequence[psutil.Process]


@dataclass(slots=True)
class _Source:
    read: Callable[[Processes], dict[str, Any]]
    every_ns: int = 0  # 0: each time
    due_ns: int = 0


class MemoryWatch:
    """Reads every source that there is for a process (its tree, its cgroup) and this machine.

    ``pid`` None watches the machine alone, ``reason`` says why. What is not given is in ``absent``, by source, with
    the reason in one line. ``cost_s`` is the CPU time that reading has taken so far: of the embedded service 1.2 to
    1.5 ms each time at 1 Hz and 0.9 to 1.1 ms at 10 Hz (AMD EPYC, two virtual cores): 0.15 % of a core, and 1.1 %.

    One thread at a time may read. A reading blocks, every ten seconds for 5 to 10 ms: beside an event loop that must
    not wait, read in a thread.
    """

    def __init__(
        self,
        pid: int | None,
        reason: str = "no process is watched",
        *,
        roots: Roots = Roots(),
        clock: Callable[[], int] = perf_counter_ns,
    ) -> None:
        self.absent: dict[str, str] = {}
        self.cost_s = 0.0
        self._roots = roots
        self._clock = clock
        self._tree = None if pid is None else ProcessTree(pid)
        if pid is None:
            self.absent["process"] = reason
        self._sources = self._find_sources(pid)

    def read(self, t_ns: int = 0, *, everything: bool = False) -> MemoryFigures:
        """Read what is due: PSS and USS every 10 s, devices every second, the rest each time.

        ``everything`` reads all, new child processes too: for the moments between which figures are compared.
        """
        began_s = thread_time()
        processes = [] if self._tree is None else self._tree.living(relist=everything)
        figures: dict[str, Any] = {}
        for name, source in self._sources.items():
            asked_ns = self._clock()
            if asked_ns < source.due_ns and not everything:
                continue
            try:
                found = source.read(processes)
            except AbsentError as error:
                self.absent[name] = str(error)
            else:
                self.absent.pop(name, None)
                figures |= found | {"gpus": figures.get("gpus", ()) + found.get("gpus", ())}
            if source.every_ns:
                source.due_ns = asked_ns + max(source.every_ns, REST * (self._clock() - asked_ns))
        if "peak" in self.absent:
            figures.pop("peak_rss_bytes", None)
        self.cost_s += thread_time() - began_s
        return MemoryFigures(t_ns, **figures)

    def reset_peak(self) -> None:
        """Let ``peak_rss_bytes`` count from now. Where that cannot be, ``absent`` says so and there is no peak."""
        if self._tree is None or sys.platform != "linux":
            return
        pids = [process.pid for process in self._tree.living(relist=True)]
        try:
            memory_linux.reset_peaks(self._roots.proc, pids)
        except AbsentError as error:
            self.absent["peak"] = str(error)
        else:
            self.absent.pop("peak", None)

    def _find_sources(self, pid: int | None) -> dict[str, _Source]:
        sources = {"machine": _Source(_machine)}
        if sys.platform == "linux":
            sources |= self._linux(pid)
        elif pid is not None:
            sources |= {"process": _Source(_tree_figures), "shares": _Source(_unique, SHARES_EVERY_NS)}
            self.absent["peak"] = "only Linux can set a high-water mark back"
        self._add(sources, "nvidia", lambda: _devices(memory_gpu.Nvidia().read), GPU_EVERY_NS)
        if sys.platform == "darwin":
            sources["pressure"] = _Source(lambda _: memory_macos.read_pressure_level())
            if pid is not None:
                sources["footprint"] = _Source(lambda found: memory_macos.read_footprint(_pids(found)))
        if sys.platform == "win32":
            sources["commit"] = _Source(lambda _: memory_windows.read_commit())
            self._add(sources, "gpu", lambda: _counted("nvidia" in sources), GPU_EVERY_NS)
        return sources

    def _linux(self, pid: int | None) -> dict[str, _Source]:
        proc, drm = self._roots.proc, self._roots.drm
        sources: dict[str, _Source] = {}
        cgroup = None
        if pid is not None:
            sources["process"] = _Source(lambda found: memory_linux.read_processes(proc, _pids(found)))
            sources["shares"] = _Source(lambda found: memory_linux.read_shares(proc, _pids(found)), SHARES_EVERY_NS)
            try:
                cgroup = memory_linux.find_cgroup(proc, pid)
            except AbsentError as error:
                self.absent["cgroup"] = str(error)
            else:
                of_cgroup = cgroup.read
                sources["cgroup"] = _Source(lambda _: of_cgroup())
        sources["pressure"] = _Source(lambda _: memory_linux.read_pressure(proc, cgroup))
        self._add(sources, "amd", lambda: _amd(drm), GPU_EVERY_NS)
        return sources

    def _add(
        self,
        sources: dict[str, _Source],
        name: str,
        make: Callable[[], Callable[[Processes], dict[str, Any]]],
        every_ns: int,
    ) -> None:
        """Add a source that may not be there at all; then it is not looked for again."""
        try:
            sources[name] = _Source(make(), every_ns)
        except AbsentError as error:
            self.absent[name] = str(error)


def _pids(processes: Processes) -> list[int]:
    return [process.pid for process in processes]


def _devices(read: Callable[[list[int]], Any]) -> Callable[[Processes], dict[str, Any]]:
    return lambda processes: {"gpus": read(_pids(processes))}


def _amd(drm: Path) -> Callable[[Processes], dict[str, Any]]:
    memory_gpu.read_amd(drm)
    return lambda _: {"gpus": memory_gpu.read_amd(drm)}


def _counted(nvidia: bool) -> Callable[[Processes], dict[str, Any]]:
    """Windows' GPU counters; the adapters are left out where NVML gives them better."""
    counters = memory_windows.GpuCounters()

    def read(processes: Processes) -> dict[str, Any]:
        found = counters.read(_pids(processes))
        return found | {"gpus": ()} if nvidia else found

    return read


def _machine(_: Processes) -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {"available_bytes": memory.available, "total_bytes": memory.total}


def _tree_figures(processes: Processes) -> dict[str, Any]:
    """Resident bytes and, on Windows, commit charge, where there is no /proc."""
    try:
        infos = [process.memory_info() for process in processes]
    except psutil.Error as error:
        raise AbsentError(f"the process may not be read: {type(error).__name__}") from None
    if not infos:
        raise AbsentError(ENDED)
    private = [size for info in infos if (size := getattr(info, "private", None)) is not None]  # Windows: PrivateUsage
    return {
        "processes": len(infos),
        "rss_bytes": sum(info.rss for info in infos),
        "private_bytes": sum(private) if private else None,
    }


def _unique(processes: Processes) -> dict[str, Any]:
    try:
        sizes = [process.memory_full_info().uss for process in processes]
    except psutil.Error as error:
        raise AbsentError(f"its unique pages may not be read: {type(error).__name__}") from None
    return {"uss_bytes": sum(sizes)} if sizes else {}
