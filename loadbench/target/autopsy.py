"""What a machine can tell of a process that died for want of memory: counts and lines, no judgement (``state``'s)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from loadbench.outcomes import classify, is_starved

_KILL = re.compile(r".*Killed process (\d+) \(.*?\)")  # the `oom-kill:` line that comes with it tells no more
_END = re.compile(
    r"terminate called|what\(\):|fatal|abort|cannot allocate|Resource temporarily unavailable", re.IGNORECASE
)
_LINES, _WIDTH = 3, 160


class KernelLog:
    """What the kernel says from now on. ``absent`` is why it cannot be read: mostly because that is root's."""

    def __init__(self, path: str = "/dev/kmsg") -> None:
        self.absent: str | None = None
        self._kills: list[tuple[int, str]] = []
        self._fd: int | None = None
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            self.absent = f"{path}: {error.strerror}"

    def kills_of(self, pid: int) -> tuple[str, ...]:
        """The lines that say that the kernel has killed this process for want of memory."""
        for line in self._new_lines():
            if found := _KILL.match(line):
                self._kills.append((int(found[1]), found[0]))
        return tuple(line for killed, line in self._kills if killed == pid)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _new_lines(self) -> list[str]:
        lines = []
        while self._fd is not None:
            try:
                record = os.read(self._fd, 8192)  # one record a read; a smaller buffer is refused
            except BrokenPipeError:
                continue  # some were overwritten before we came: go on with the oldest there is
            except OSError:
                break
            if not record:
                break
            lines.append(record.decode(errors="replace").partition(";")[2].partition("\n")[0])
        return lines


def machine_oom_kills() -> int | None:
    """How many processes this machine's kernel has killed for want of memory since it started; Linux only."""
    try:
        text = Path("/proc/vmstat").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


def last_words(log: str) -> tuple[str, ...]:
    """The last lines of a service's own log that speak of its end or of memory, each once."""
    lines = [line.strip() for line in log.splitlines()]
    telling = [line[:_WIDTH] for line in lines if _END.search(line) or _speaks_of_memory(line)]
    return tuple(dict.fromkeys(telling))[-_LINES:]


def speaks_of_memory(line: str, limited: bool) -> bool:
    """Whether a line of a log means that memory could not be had.

    ``limited``: under a limit at which allocations fail no thread can be started either, for want of its stack, and
    the service says "Resource temporarily unavailable". Elsewhere that may mean a limit of threads.
    """
    return _speaks_of_memory(line) or (limited and is_starved(line))


def _speaks_of_memory(line: str) -> bool:
    return classify(line, "") == "out_of_memory" or "annot allocate" in line
