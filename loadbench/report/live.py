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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from loadbench.report.escape import plain
from loadbench.report.words import clock, count, figure, milliseconds, octets

REFRESH_S = 0.25
PLAIN_INTERVAL_S = 5.0
MAX_SHARE = 0.01  # of the time may go into showing it
MAX_LEVELS = 11  # lines of the level list, so that the whole frame stays within 20
NOT_YET = "–"


@dataclass(frozen=True, slots=True)
class LevelProgress:
    """One level of the list; ``ended`` ones carry their headline numbers. ``title`` is such as ``4 users``."""

    title: str
    model: str
    ended: bool = False
    requests_per_s: float | None = None
    tokens_per_s: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """All that a view shows, filled by the runner once per refresh.

    ``current`` is an index into ``levels``, None before the first and after the last. ``share`` is how much of the
    current level is done, 0 to 1; None where nobody can tell. Rates and latencies are those of the current level so
    far; ``latency`` says which one ``p50_ms`` and ``p95_ms`` are (TTFT, or E2E where answers do not stream).
    """

    name: str
    levels: tuple[LevelProgress, ...]
    current: int | None
    phase: str
    elapsed_s: float
    remaining_s: float | None = None
    share: float | None = None
    in_flight: int = 0
    requests_per_s: float | None = None
    tokens_per_s: float | None = None
    latency: str = "TTFT"
    p50_ms: float | None = None
    p95_ms: float | None = None
    failures: Mapping[str, int] = field(default_factory=dict)
    target_rss_bytes: int | None = None
    message: str | None = None


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
    """One line per interval and one per level that ended, for pipes, files and CI."""

    def __init__(self, stream: TextIO, interval_s: float = PLAIN_INTERVAL_S) -> None:
        self.interval_s = interval_s
        self._outlet = _Outlet(stream)
        self._ended = 0
        self._due_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether something is still being written: an update would be left out."""
        return self._outlet.busy

    def start(self) -> None:
        self._outlet.start()

    def update(self, progress: Progress) -> None:
        behind = self.busy
        ended = [(number, level) for number, level in enumerate(progress.levels, 1) if level.ended]
        for number, level in ended[self._ended :]:
            self.note(f"level {number}/{len(progress.levels)} ended: {_ended_line(level, progress.latency)}")
        self._ended = len(ended)
        if progress.elapsed_s >= self._due_s and not behind:
            # Updates come once an interval too, and a timer may fire a little early.
            self._due_s = progress.elapsed_s + 0.98 * self.interval_s
            self.note(f"{clock(progress.elapsed_s)}  {_current_line(progress)}")

    def note(self, text: str) -> None:
        self._outlet.write(plain(text) + "\n")

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
        self._live.update(_Frame(progress), refresh=True)
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


class _Frame:
    """One picture of the run, in segments laid out by hand: rich's Text costs three times as much, its Table ten."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in _frame(self._progress, options.max_width):
            yield from line
            yield Segment.line()


Line = list[Segment]
_STYLES = {name: Style.parse(name) for name in ("bold", "dim", "red", "green", "cyan", "default")}


def _segment(text: str, style: str = "default") -> Segment:
    return Segment(text, _STYLES[style])


def _frame(progress: Progress, width: int) -> Iterator[Line]:
    left = "" if progress.remaining_s is None else f", about {clock(progress.remaining_s)} left"
    yield [_segment(plain(progress.name), "bold"), _segment(f"  {clock(progress.elapsed_s)}{left}")]
    if progress.levels:
        heading = f"   {'load':<17}{'req/s':>8}{'tok/s':>8}{progress.latency + ' p50':>11}{'p95':>10}{'failed':>8}"
        yield [_segment(heading, "dim")]
        yield from _level_lines(progress, width)
    yield [_segment("   " + _now(progress), "dim" if progress.current is None else "default")]
    if progress.failures:
        classes = ", ".join(f"{name} {number:,}" for name, number in progress.failures.items())
        yield [_segment(f"   failures: {classes}", "red")]
    if progress.message:
        yield [_segment("   " + plain(progress.message))]


def _level_lines(progress: Progress, width: int) -> Iterator[Line]:
    """The list around the current level, with a line for what does not fit before and after it."""
    levels = progress.levels
    several = len({level.model for level in levels}) > 1
    here = progress.current if progress.current is not None else sum(level.ended for level in levels)
    room = MAX_LEVELS - 4 if several else MAX_LEVELS - 2  # two for what is left out, two for models that begin
    first = max(0, min(here - room // 2, len(levels) - room))
    if first:
        yield [_segment(f" ✓ {count(first, 'level')} before", "green")]
    model = None
    for index, level in enumerate(levels[first : first + room], first):
        if several and level.model != model:
            model = level.model
            yield [_segment(f"   {plain(model)}", "dim")]
        yield _level_line(level, progress if index == progress.current else None, width)
    rest = len(levels) - first - room
    if rest > 0:
        yield [_segment(f" · {count(rest, 'level')} to come", "dim")]


def _level_line(level: LevelProgress, now: Progress | None, width: int) -> Line:
    title = f"{plain(level.title):<17.17}"
    if now is None and not level.ended:
        return [_segment(f" · {title}", "dim")]
    failed = level.failed if now is None else sum(now.failures.values())
    shown = level if now is None else now
    numbers = title + _numbers(shown.requests_per_s, shown.tokens_per_s, shown.p50_ms, shown.p95_ms)
    failures = _segment(f"{failed or NOT_YET:>8}", "red" if failed else "dim")
    if now is None:
        return [_segment(" ✓ ", "green"), _segment(numbers), failures]
    bar = _bar(now.share, min(30, width - len(numbers) - 14))
    return [_segment(f" ▶ {numbers}", "cyan"), failures, _segment(f"  {bar}", "cyan")]


def _numbers(requests_per_s: float | None, tokens_per_s: float | None, p50: float | None, p95: float | None) -> str:
    cells = [NOT_YET if value is None else figure(value) for value in (requests_per_s, tokens_per_s)]
    cells += [NOT_YET if value is None else milliseconds(value) for value in (p50, p95)]
    return f"{cells[0]:>8}{cells[1]:>8}{cells[2]:>11}{cells[3]:>10}"


def _bar(share: float | None, width: int) -> str:
    if share is None or width < 6:
        return ""
    done = round(min(1.0, max(0.0, share)) * width)
    return "━" * done + "╌" * (width - done)


def _now(progress: Progress) -> str:
    parts = [plain(progress.phase)]
    if progress.current is not None:
        parts.append(f"{progress.in_flight} in flight")
    if progress.target_rss_bytes is not None:
        parts.append(f"target {octets(progress.target_rss_bytes)}")
    return " · ".join(parts)


def _rates(requests_per_s: float | None, tokens_per_s: float | None) -> list[str]:
    named = ((requests_per_s, "req/s"), (tokens_per_s, "tok/s"))
    return [f"{figure(value)} {unit}" for value, unit in named if value is not None]


def _latencies(name: str, p50: float | None, p95: float | None) -> list[str]:
    return [] if p50 is None else [f"{name} p50 {milliseconds(p50)}" + (f" p95 {milliseconds(p95)}" if p95 else "")]


def _ended_line(level: LevelProgress, latency: str) -> str:
    parts = [level.model, level.title, *_rates(level.requests_per_s, level.tokens_per_s)]
    parts += _latencies(latency, level.p50_ms, level.p95_ms)
    return " · ".join([*parts, f"{level.failed} failed"])


def _current_line(progress: Progress) -> str:
    parts = []
    if progress.current is not None:
        parts = [f"level {progress.current + 1}/{len(progress.levels)}", progress.levels[progress.current].title]
    parts += [_now(progress), *_rates(progress.requests_per_s, progress.tokens_per_s)]
    parts += _latencies(progress.latency, progress.p50_ms, progress.p95_ms)
    if failed := sum(progress.failures.values()):
        parts.append(f"{failed} failed")
    if progress.remaining_s is not None:
        parts.append(f"about {clock(progress.remaining_s)} left")
    return " · ".join([*parts, *([progress.message] if progress.message else [])])
