"""The target's memory: which process it is, if it is one of this machine's, and what that process's tree holds.

One source of figures = one function of this file behind ``ProcessTree.sample``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from time import perf_counter_ns

import psutil

RELIST_NS = 10_000_000_000
"""How old the list of child processes may get: listing them reads every process of the machine (2.5 ms for 77 of them,
in which no event is read), the figures of a known one 30 to 60 µs."""


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """What a process tree holds: resident bytes, pages that its processes share counted once for each of them."""

    rss_bytes: int
    processes: int


class ProcessTree:
    """A process and its descendants. The pid is bound to the process that has it now: a successor is not sampled."""

    def __init__(self, pid: int) -> None:
        self._listed_ns: int | None = None
        self._children: list[psutil.Process] = []
        try:
            self._root: psutil.Process | None = psutil.Process(pid)
        except psutil.Error:
            self._root = None

    def sample(self, *, relist: bool = False) -> MemoryFigures | None:
        """Read the figures now; None when the process has ended or may not be read.

        With ``relist`` a child that has just come, as when a model was loaded, is not overlooked.
        """
        if self._root is None or (root_bytes := _rss_bytes(self._root)) is None:
            return None
        now_ns = perf_counter_ns()
        if relist or self._listed_ns is None or now_ns - self._listed_ns > RELIST_NS:
            try:
                self._children = self._root.children(recursive=True)
            except psutil.Error:
                return None
            self._listed_ns = now_ns
        children = [size for child in self._children if (size := _rss_bytes(child)) is not None]
        if len(children) < len(self._children):
            self._listed_ns = None  # one has ended: what took its place is looked for next time
        return MemoryFigures(root_bytes + sum(children), 1 + len(children))


def _rss_bytes(process: psutil.Process) -> int | None:
    try:
        # 0: it has ended, and its parent has not taken notice.
        return process.memory_info().rss or None if process.is_running() else None
    except psutil.Error:
        return None


def is_this_machine(ip: str) -> bool:
    """Whether ``ip`` is the loopback or the address of one of this machine's interfaces."""
    address = ip_address(ip)
    if address.is_loopback:
        return True
    own = (interface.address.partition("%")[0] for found in psutil.net_if_addrs().values() for interface in found)
    return any(text == str(address) for text in own)


def find_process(ip: str, port: int, claimed: int | None, name: str | None) -> tuple[int | None, str | None]:
    """Find the process that serves ``ip:port`` on this machine: its pid, or None and the reason.

    ``claimed`` is the pid that the service says it has; behind a tunnel or in a container that is another machine's
    number, so it counts only if that process listens on the port. Without one the port's listener is taken if its name
    matches ``name``. Without either nothing is known.
    """
    if not is_this_machine(ip):
        return None, "the endpoint is on another machine"
    if claimed is not None:
        return _verify(claimed, port)
    if name is None:
        return None, "which process holds the models is not known for this kind of server"
    try:
        listeners = [c.pid for c in psutil.net_connections("tcp") if _listens(c.status, c.laddr, port) and c.pid]
    except psutil.AccessDenied:
        return None, f"which process listens on port {port} may not be read by this user"
    names = {pid: psutil.Process(pid).name() for pid in set(listeners) if psutil.pid_exists(pid)}
    for pid, found in names.items():
        if re.search(name, found, re.IGNORECASE):
            return pid, None
    seen = ", ".join(sorted(names.values())) or "a process of another user"
    return None, f"port {port} is served by {seen}, which does not hold the models itself"


def _verify(claimed: int, port: int) -> tuple[int | None, str | None]:
    try:
        connections = psutil.Process(claimed).net_connections("tcp")
    except psutil.NoSuchProcess:
        return None, f"there is no process {claimed} on this machine: the service is behind a tunnel or in a container"
    except psutil.AccessDenied:
        return None, f"process {claimed} belongs to another user, so whether it is the service cannot be told"
    if any(_listens(c.status, c.laddr, port) for c in connections):
        return claimed, None
    return None, f"process {claimed} does not listen on port {port}: the service is behind a tunnel or in a container"


def _listens(status: str, local: object, port: int) -> bool:
    return status == psutil.CONN_LISTEN and getattr(local, "port", None) == port
