"""Shows a run while it runs: at most twenty lines on a terminal, plain lines elsewhere, or nothing. Measures nothing.

Everything goes to stderr: stdout belongs to the report, so that ``loadbench run > report.txt`` and
``loadbench run --json | jq`` still show how far they are.

The load generator shares the process, so a view may cost little and may never wait. A thread does the writing: a
terminal that has stopped reading (Ctrl-S, a slow link) then loses frames and the measurement loses nothing. A refresh
that costs more than 1 % of the time makes the refreshes rarer.
"""

from __future__ import annotations

import io
import os
import queue
import sys
import threading
import time
from typing import Protocol, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from loadbench.report.escape import as_line, plain
from loadbench.report.frame import RESULTS, Frame, Progress, current_line, ended_line
from loadbench.report.words import clock

REFRESH_S = 0.25
PLAIN_INTERVAL_S = 5.0
MAX_SHARE = 0.01  # of the time may go into showing it


class View(Protocol):
    """``update`` is wanted every ``interval_s`` and at each level's end; ``note`` is one line that stays."""

    interval_s: float

    def start(self) -> None: ...
    def update(self, progress: Progress) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class QuietView:
    """``--quiet``: errors and the last lines come from elsewhere, and nothing from here."""

    interval_s = 3600.0

    def start(self) -> None: ...
    def update(self, progress: Progress) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class PlainView:
    """One line per interval, one per level that ended and one per level that a search judged, for pipes and CI."""

    def __init__(self, stream: TextIO, interval_s: float = PLAIN_INTERVAL_S) -> None:
        self.interval_s = interval_s
        self._outlet = _Outlet(stream)
        self._ended = self._judged = 0
        self._due_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether something is still being written: an update would be left out."""
        return self._outlet.busy

    def start(self) -> None:
        self._outlet.start()

    def update(self, progress: Progress) -> None:
        behind = self.busy
        ended = [(index, level) for index, level in enumerate(progress.levels) if level.ended]
        for index, level in ended[self._ended :]:
            self.note(f"level {index} ended: {ended_line(level, progress.latency)}")
        judged = [(index, level.title, RESULTS[level.result]) for index, level in ended if level.result is not None]
        for index, title, result in judged[self._judged :]:
            self.note(f"level {index} · {title} · {result}")
        self._ended, self._judged = len(ended), len(judged)
        if progress.elapsed_s >= self._due_s and not behind:
            # Updates come once an interval too, and a timer may fire a little early.
            self._due_s = progress.elapsed_s + 0.98 * self.interval_s
            self.note(f"{clock(progress.elapsed_s)} {current_line(progress)}")

    def note(self, text: str) -> None:
        self._outlet.write(as_line(text) + "\n")

    def stop(self) -> None:
        self._outlet.stop()


class TerminalView:
    """The live frame: progress, the levels with their numbers, and how it goes now."""

    def __init__(self, stream: TextIO, *, keep: bool = False) -> None:
        """``keep``: leave the last frame standing, for when no report follows on this terminal."""
        self.interval_s = REFRESH_S
        self._outlet = _Outlet(stream)
        self._console = Console(file=cast(TextIO, self._outlet), highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=not keep)

    @property
    def busy(self) -> bool:
        """Whether something is still being written: an update would be left out."""
        return self._outlet.busy

    def start(self) -> None:
        self._outlet.start()
        self._live.start()

    def update(self, progress: Progress) -> None:
        if self.busy:
            return
        begun_ns = time.perf_counter_ns()
        self._live.update(Frame(progress), refresh=True)
        cost_s = (time.perf_counter_ns() - begun_ns) / 1e9
        self.interval_s = max(REFRESH_S, cost_s / MAX_SHARE)

    def note(self, text: str) -> None:
        self._console.print(Text(plain(text)))

    def stop(self) -> None:
        self._live.stop()
        self._outlet.stop()


def choose_view(stream: TextIO | None = None, *, quiet: bool = False, keep: bool = False) -> View:
    """The view for ``stream`` (stderr): live on a terminal that can, plain lines elsewhere, nothing when ``quiet``."""
    stream = stream or sys.stderr
    if quiet:
        return QuietView()
    able = stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown") and not os.environ.get("CI")
    # The old Windows console is driven by calls beside the stream, which a writing thread would overtake.
    if able and not Console(file=stream).legacy_windows:
        return TerminalView(stream, keep=keep)
    return PlainView(stream)


class _Outlet(io.TextIOBase):
    """A text stream whose writes return at once; a thread passes them on to the real one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._pass_on, name="view", daemon=True)

    @property
    def encoding(self) -> str:  # type: ignore[override]  # rich asks it whether box characters can be shown
        return self._stream.encoding or "utf-8"

    @property
    def busy(self) -> bool:
        return self._queue.unfinished_tasks > 0

    def start(self) -> None:
        self._thread.start()

    def write(self, text: str) -> int:
        self._queue.put(text)
        return len(text)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def stop(self) -> None:
        """Wait for what is written, but not for ever: the other side may never read again."""
        self._queue.put(None)
        self._thread.join(timeout=1.0)

    def _pass_on(self) -> None:
        for text in iter(self._queue.get, None):
            try:
                self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
                self._stream.flush()
            except (OSError, ValueError):
                pass  # the reader has gone or the stream is closed; the run goes on without an audience
            self._queue.task_done()
        self._queue.task_done()
