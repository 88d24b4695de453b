"""Adds up histogram logs: one interval a tag and second out of those of many shards, counts added.

``python -m loadbench.engine.sums`` does a part of it for `add_up`, which shares much of it out to several processes:
unpacking is all the work, and no two logs wait for each other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from loadbench.files import lines_of
from loadbench.hdr import Hdr, HlogWriter, Line, Room, read_line
from loadbench.platform import apart

INTERVAL_S = 1.0
"""Shards close their intervals about every second, each in its own moment: what began in one second is added up."""

SHARE_BYTES = 32 << 20  # of logs, for a process of their own: a second of work, against the 0.3 s in which it starts
BLOCKS_BYTES = 32 << 20  # of all logs together that are held at a time
MOST_PROCESSES = 4
"""Each holds what it has read ahead, and a thousand shards take some 120 MB in each: more of them are quicker, at more
memory than a small machine has."""


def add_up(paths: Sequence[Path], started_wall_ns: int, out: Path) -> int:
    """Write to ``out`` the sum of these logs, of which some may be missing. OSError where the disk does not take it.

    Lines that cannot be read, as a full disk leaves them, are left out: how many there were.
    """
    there = [path for path in paths if path.exists()]
    size_bytes = sum(path.stat().st_size for path in there)
    processes = min(os.cpu_count() or 1, MOST_PROCESSES, len(there), size_bytes // SHARE_BYTES)
    if processes < 2:
        return _add_up_here(there, started_wall_ns, out)
    parts = [out.with_name(f"{out.name}.{index}") for index in range(processes)]
    torn = 0
    with contextlib.ExitStack() as stack:
        shares = [(there[index::processes], started_wall_ns, part) for index, part in enumerate(parts)]
        for process in [stack.enter_context(_process(*share)) for share in shares]:
            assert process.stdout is not None
            told = process.stdout.read().decode(errors="replace").strip().rpartition("\n")[2]
            if (code := process.wait()) != 0:
                raise OSError(0, (told if code > 0 else "") or f"a process that adds up histograms {_ended(code)}")
            torn += int(told)
    torn += _add_up_here(parts, started_wall_ns, out)
    for part in parts:
        part.unlink()
    return torn


def _ended(code: int) -> str:
    """How a process did that said nothing."""
    if code > 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}" + (", likely for want of memory" if name == "SIGKILL" else "")


@contextlib.contextmanager
def _process(paths: Sequence[Path], started_wall_ns: int, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that adds up these, and ends with us."""
    process = subprocess.Popen(
        [sys.executable, "-m", "loadbench.engine.sums"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **apart(),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        with contextlib.suppress(OSError):  # it has gone already, and says why; of Windows EINVAL
            process.stdin.write(orjson.dumps([[str(path) for path in paths], started_wall_ns, str(out)]) + b"\n")
            process.stdin.flush()
        yield process  # with its stdin open: when that closes, because we are gone, it ends
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()


def _add_up_here(paths: Sequence[Path], started_wall_ns: int, out: Path) -> int:
    """How many lines were torn."""
    block_bytes = min(1 << 20, max(1 << 13, BLOCKS_BYTES // max(1, len(paths))))
    all_logs = logs = [_Log(path, block_bytes) for path in paths]
    sums, room = dict[str, _Sum](), Room()
    with out.open("w", encoding="ascii", newline="\n") as file:
        writer = HlogWriter(file, started_wall_ns)
        while logs := [log for log in logs if log.line is not None]:
            second = min(log.second for log in logs)
            for log in logs:
                log.add_second(second, sums, room)
            for tag, found in sums.items():
                found.write(tag, writer)
            sums = {tag: found for tag, found in sums.items() if found.used}  # the others' level is over
    return sum(log.torn for log in all_logs)


class _Log:
    """A log, as far as it has been read: ``line`` is the next one, None at the end, and begins in ``second``; ``torn``
    counts those that could not be read."""

    def __init__(self, path: Path, block_bytes: int) -> None:
        self.line: Line | None = None
        self.second = self.torn = 0
        self._lines = self._read(path, block_bytes)
        self._advance()

    def add_second(self, second: int, sums: dict[str, _Sum], room: Room) -> None:
        """Add what begins in that second."""
        while self.line is not None and self.second <= second:
            tag = self.line.tag or ""
            if tag not in sums:
                sums[tag] = _Sum()
            try:
                sums[tag].add(self.line, room)
            except ValueError:
                self.torn += 1
            self._advance()

    def _advance(self) -> None:
        self.line = next(self._lines, None)
        if self.line is not None:
            self.second = int(self.line.start_s / INTERVAL_S)

    def _read(self, path: Path, block_bytes: int) -> Iterator[Line]:
        """The lines that can be read."""
        for text in lines_of(path, block_bytes):
            try:
                line = read_line(text.decode("ascii", "replace"))
            except ValueError:
                self.torn += 1
                continue
            if line is not None:
                yield line


class _Sum:
    """A tag's second, and then its next: the histogram is used again, since a new one takes 0.1 ms to encode at first.

    ``used``: there was something in the second that was written last.
    """

    def __init__(self) -> None:
        self.used = False
        self._hdr = Hdr()
        self._start_s = self._end_s = 0.0

    def add(self, line: Line, room: Room) -> None:
        """ValueError where it is torn."""
        empty, end_s = not self._hdr.total, line.start_s + line.length_s
        self._hdr.add_line(line, room)
        self._start_s = line.start_s if empty else min(line.start_s, self._start_s)
        self._end_s = end_s if empty else max(end_s, self._end_s)

    def write(self, tag: str, writer: HlogWriter) -> None:
        self.used = self._hdr.total > 0
        if self.used:
            writer.write(tag, round(self._start_s * 1e9), round(self._end_s * 1e9), self._hdr)
            self._hdr.reset()


def main() -> None:
    paths, started_wall_ns, out = orjson.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        torn = _add_up_here([Path(path) for path in paths], started_wall_ns, Path(out))
    except OSError as error:
        raise SystemExit(error.strerror) from None
    sys.stdout.write(f"{torn}\n")


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):  # by the descriptor: a reader of sys.stdin has its lock when we end
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
