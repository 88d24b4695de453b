"""Which processes the target is, if they are this machine's: found by port, pid or name, and followed as a tree."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from ipaddress import ip_address
from time import perf_counter_ns

import psutil

RELIST_NS = 10_000_000_000
"""How old the list of child processes may get: listing them reads every process of the machine (2.5 ms for 77 of them,
in which no event is read), the figures of a known one 30 to 60 µs."""

CARRIERS = "ssh|docker|podman|rootlessport|slirp4netns|pasta|wslrelay|socat|nginx|caddy|haproxy|traefik|envoy"
"""Names of what listens for a server that runs elsewhere: behind a tunnel, in a container, beyond a proxy."""

FOUNDRY_PORTS = (5272, 5273)  # CLI up to 0.8; newer ones take any that is free
FOUNDRY_NAME = "foundry|inference.service"


@dataclass(frozen=True, slots=True)
class TreeFigures:
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

    def living(self, *, relist: bool = False) -> list[psutil.Process]:
        """The root, then its descendants; none when the root has ended.

        With ``relist`` a child that has just come, as when a model was loaded, is not overlooked.
        """
        if self._root is None or not self._root.is_running():
            return []
        now_ns = perf_counter_ns()
        if relist or self._listed_ns is None or now_ns - self._listed_ns > RELIST_NS:
            try:
                self._children = self._root.children(recursive=True)
            except psutil.Error:
                return []
            self._listed_ns = now_ns
        children = [child for child in self._children if child.is_running()]
        if len(children) < len(self._children):
            self._listed_ns = None  # one has ended: what took its place is looked for next time
        return [self._root, *children]

    def sample(self, *, relist: bool = False) -> TreeFigures | None:
        """Read the figures now; None when the process has ended or may not be read."""
        sizes = [_rss_bytes(process) for process in self.living(relist=relist)]
        if not sizes or sizes[0] is None:
            return None
        held = [size for size in sizes if size is not None]
        if len(held) < len(sizes):
            self._listed_ns = None
        return TreeFigures(sum(held), len(held))

    def cpu_s(self) -> float | None:
        """CPU seconds that those who live have used so far; None when the root has ended or may not be read."""
        try:
            times = [process.cpu_times() for process in self.living()]
        except psutil.Error:
            return None
        return sum(time.user + time.system for time in times) if times else None


def _rss_bytes(process: psutil.Process) -> int | None:
    try:
        return process.memory_info().rss or None  # 0: it has ended, and its parent has not taken notice
    except psutil.Error:
        return None


@dataclass(frozen=True, slots=True)
class Born:
    """A process, told by its birth from a later one that was given the same pid; in seconds since the epoch."""

    pid: int
    at_s: float

    @classmethod
    def of(cls, pid: int) -> Born:
        """A child of ours, which has its pid until we have waited for it."""
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except psutil.Error:
            return cls(pid, 0.0)


SAME_BIRTH_S = 2.0  # the birth is counted from the boot, whose time moves when the clock is set
END_WAIT_S = 20.0


def end_tree(born: Born) -> bool:
    """End a process and its descendants: it is asked to first. False where it is gone already."""
    try:
        root = psutil.Process(born.pid)
        if abs(root.create_time() - born.at_s) > SAME_BIRTH_S or root.status() == psutil.STATUS_ZOMBIE:
            return False
        tree = [root, *root.children(recursive=True)]
        root.terminate()
    except psutil.Error:
        return False
    _, alive = psutil.wait_procs(tree, END_WAIT_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, END_WAIT_S)
    return True


def machine_bytes() -> int:
    """How much memory this machine has."""
    return int(psutil.virtual_memory().total)


def is_this_machine(ip: str) -> bool:
    """Whether ``ip`` is the loopback or the address of one of this machine's interfaces."""
    address = ip_address(ip)
    if address.is_loopback:
        return True
    own = (interface.address.partition("%")[0] for found in psutil.net_if_addrs().values() for interface in found)
    return any(text == str(address) for text in own)


def find_process(ip: str, port: int, claimed: int | None, name: str | None) -> tuple[int | None, str | None]:
    """Find the process that serves ``ip:port`` on this machine: its pid, or None and the reason; with a pid that is
    taken for it without a name to know it by, how it was found.

    ``claimed`` is the pid that the service says it has; behind a tunnel or in a container that is another machine's
    number, so it counts only if that process listens on the port. Without one the port's listener is taken if its name
    matches ``name``. Without either it is taken whatever its name, unless that is known to serve for others.
    """
    if not is_this_machine(ip):
        return None, "the endpoint is on another machine"
    if claimed is not None:
        return _verify(claimed, port)
    if name is None:
        pid, what = _listening(port)
        if pid is not None and re.search(CARRIERS, _called(pid), re.IGNORECASE):
            return None, f"port {port} is served by {_called(pid)}, which does not hold the models itself"
        return pid, what if pid is None else f"{what}: what listens there, since the server does not name its process"
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


def find_service(pid: int | None = None, port: int | None = None, name: str | None = None) -> tuple[int | None, str]:
    """Find the process of a service on this machine, by pid, by the port that it listens on or by its name's pattern.

    Without any, what listens on Foundry Local's usual ports or is called like it. (pid, what it is), or (None, reason).
    """
    if pid is not None:
        return (pid, _called(pid)) if psutil.pid_exists(pid) else (None, f"there is no process {pid}")
    if port is not None:
        return _listening(port)
    if name is None:
        for usual in FOUNDRY_PORTS:
            found, what = _listening(usual)
            if found is not None:
                return found, what
    pattern = FOUNDRY_NAME if name is None else name
    named = [p for p in psutil.process_iter(["name", "ppid"]) if re.search(pattern, p.info["name"] or "", re.I)]
    pids = {process.pid for process in named}
    roots = [process.pid for process in named if process.info["ppid"] not in pids]
    if len(roots) == 1:
        return roots[0], _called(roots[0])
    if roots:
        return None, f"several processes are called like {pattern}: {', '.join(map(_called, roots))}: give one's pid"
    ports = "" if name is not None else f" or listens on port {' or '.join(map(str, FOUNDRY_PORTS))}"
    return None, f"no process is called like {pattern}{ports}: give the service's port or pid"


def foundry_ports() -> list[int]:
    """The ports on which what is called like Foundry Local, or runs it for us, listens here, as far as may be seen."""
    try:
        listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except psutil.AccessDenied:
        return []
    theirs = [c.laddr for c in listening if c.pid and re.search(FOUNDRY_NAME, _started_as(c.pid), re.IGNORECASE)]
    return sorted({address.port for address in theirs if address})


def _started_as(pid: int) -> str:
    """Its name and its command line."""
    try:
        return " ".join([_called(pid), *psutil.Process(pid).cmdline()])
    except psutil.Error:
        return _called(pid)


def _listening(port: int) -> tuple[int | None, str]:
    try:
        found = {c.pid for c in psutil.net_connections("tcp") if _listens(c.status, c.laddr, port)}
    except psutil.AccessDenied:
        return None, f"which process listens on port {port} may not be read by this user"
    pids = sorted({_eldest(pid, port) for pid in found if pid})
    if len(pids) == 1:
        return pids[0], f"{_called(pids[0])} on port {port}"
    if pids:
        return None, f"several processes listen on port {port}: {', '.join(map(_called, pids))}: give one's pid"
    return None, f"port {port} is " + ("another user's" if found else "not listened on")


def _eldest(pid: int, port: int) -> int:
    """The first of the ancestors that share its listening socket: of a server that has forked, the whole tree counts.

    psutil names but one of the processes that have a socket.
    """
    try:
        for parent in psutil.Process(pid).parents():
            if not any(_listens(c.status, c.laddr, port) for c in parent.net_connections("tcp")):
                break
            pid = parent.pid
    except psutil.Error:  # ended, or another user's: so far it is known
        pass
    return pid


def _called(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).name()} ({pid})"
    except psutil.Error:
        return f"process {pid}"
