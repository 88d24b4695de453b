"""A run while it goes on, as a picture of at most twenty lines or in one line. Showing it is ``live``'s job."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

from loadbench.report.escape import plain
from loadbench.report.words import clock, count, figure, milliseconds, octets

MAX_LEVELS = 11  # lines of the level list, so that the whole frame stays within 20
TRACK = 12  # characters of the line between what passed and what failed
NOT_YET = "–"


@dataclass(frozen=True, slots=True)
class LevelProgress:
    """One level of the list; ``ended`` ones carry their headline numbers. ``title`` is such as ``4 users``.

    ``left_out``: a stop rule ended its stage before it. ``result`` is what a search made of it: pass, fail,
    undecided. ``good_share`` is of those that ended, None where nothing says what is good.
    """

    title: str
    model: str
    ended: bool = False
    requests_per_s: float | None = None
    tokens_per_s: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    failed: int = 0
    good_share: float | None = None
    left_out: bool = False
    result: str | None = None


@dataclass(frozen=True, slots=True)
class Bracket:
    """Where a search is: the largest load that passed, the smallest above it that failed, and what is measured now.

    ``unit`` is users or /s; ``left`` is about how many levels are to come with this one, None: nobody can tell yet.
    """

    unit: str
    passed: float | None
    failed: float | None
    next: float
    purpose: str = "probe"
    left: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryShown:
    """What the target takes of what it lives in: ``where`` is its GPU, its limit or the host. None: nobody says.

    ``available_bytes`` is what the host has left, ``near`` whether it or the target is near its end.
    """

    held_bytes: int | None
    room_bytes: int | None
    where: str
    available_bytes: int | None
    near: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """All that a view shows, filled by the runner once per refresh.

    ``current`` is an index into ``levels``, None before the first and after the last. ``share`` is how much of the
    current level is done, 0 to 1; None where nobody can tell. Rates and latencies are those of the current level so
    far; ``sickest`` is the load process whose event loop is the latest, and by how many milliseconds, where there are
    several; ``latency`` says which one ``p50_ms`` and ``p95_ms`` are (TTFT, or E2E where answers do not stream).
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
    good_share: float | None = None
    search: Bracket | None = None
    target_rss_bytes: int | None = None
    memory: MemoryShown | None = None
    restarts: int = 0
    sickest: tuple[str, float] | None = None
    message: str | None = None


class Frame:
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
    for line in _sickest(progress):
        yield [_segment(f"   {line}", "dim")]
    if progress.failures:
        classes = ", ".join(f"{name} {number:,}" for name, number in progress.failures.items())
        yield [_segment(f"   failures: {classes}", "red")]
    if progress.search:
        yield [_segment(f"   search   {_closing(progress.search)}")]
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
        yield [_segment(f" ■ {count(first, 'level')} before", "dim")]
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
        return [_segment(f" · {title}" + (f"{'not run':>8}" if level.left_out else ""), "dim")]
    failed = level.failed if now is None else sum(now.failures.values())
    shown = level if now is None else now
    numbers = title + _numbers(shown.requests_per_s, shown.tokens_per_s, shown.p50_ms, shown.p95_ms)
    failures = _segment(f"{failed or NOT_YET:>8}", "red" if failed else "dim")
    if now is None:
        return [_MARKS[level.result], _segment(numbers), failures, *_judged(level)]
    bar = _bar(now.share, min(30, width - len(numbers) - 14))
    return [_segment(f" ▶ {numbers}", "cyan"), failures, _segment(f"  {bar}", "cyan")]


RESULTS = {"pass": "passes", "fail": "fails", "undecided": "undecided"}
_RESULT_STYLES = {"pass": "green", "fail": "red", "undecided": "dim"}
# Only a search judges while it goes on: any other level is over, and the report says whether it kept the SLO.
_MARKS = {
    "pass": _segment(" ✓ ", "green"),
    "fail": _segment(" ✗ ", "red"),
    "undecided": _segment(" ? ", "dim"),
    None: _segment(" ■ ", "dim"),
}


def _judged(level: LevelProgress) -> Line:
    if level.result is not None:
        return [_segment(f"  {RESULTS[level.result]}", _RESULT_STYLES[level.result])]
    return [] if level.good_share is None else [_segment(f"  {_good(level.good_share)}")]


def _good(share: float) -> str:
    """In whole percents, and 100 only where nothing is missing."""
    return f"good {math.floor(round(100 * share, 6))} %"


def _closing(search: Bracket) -> str:
    """``8 passes ──●── 16 fails · next 11 · about 6 probes``: the two loads with the answer between them."""
    unit = search.unit if search.unit.startswith("/") else ""
    ends = [None if end is None else f"{end:g}{unit}" for end in (search.passed, search.failed)]
    track = "─" * TRACK
    if search.passed is not None and search.failed is not None:
        place = (search.next - search.passed) / (search.failed - search.passed)
        at = round(min(1.0, max(0.0, place)) * (TRACK - 1))
        track = track[:at] + "●" + track[at + 1 :]
    parts = [f"{ends[0]} passes"] if ends[0] else []
    parts += [track] if parts or ends[1] else []
    parts += [f"{ends[1]} fails"] if ends[1] else []
    return " · ".join([*([" ".join(parts)] if parts else []), *_coming(search, unit)])


def _coming(search: Bracket, unit: str) -> list[str]:
    what = "confirming" if search.purpose == "confirmation" else "next"
    return [f"{what} {search.next:g}{unit}", *([] if search.left is None else [f"about {count(search.left, 'probe')}"])]


def _plain_search(search: Bracket) -> str:
    """The same in words."""
    unit = search.unit if search.unit.startswith("/") else ""
    ends = ((search.passed, "passes"), (search.failed, "fails"))
    parts = [f"{end:g}{unit} {what}" for end, what in ends if end is not None]
    return "search: " + ", ".join([*parts, *_coming(search, unit)])


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
    if progress.good_share is not None:
        parts.append(_good(progress.good_share))
    parts += _memory(progress)
    if progress.restarts:
        parts.append(f"restarted {count(progress.restarts, 'time')}")
    return " · ".join(parts)


def _sickest(progress: Progress) -> list[str]:
    """The load process that harms its stamps most, by a name that may be long."""
    if progress.sickest is None:
        return []
    name, late_ms = progress.sickest
    return [f"{plain(name, 50)} up to {milliseconds(late_ms)} late"]


def _memory(progress: Progress) -> list[str]:
    """``target 512 MiB``; where it is held by a limit, or little is left, of how much, and what the host has left."""
    memory = progress.memory
    held = progress.target_rss_bytes if memory is None or memory.held_bytes is None else memory.held_bytes
    told = [] if held is None else [f"target {octets(held)}"]
    if memory is None or not (memory.near or memory.where != "host"):
        return told
    if told and memory.room_bytes is not None:
        told[0] += f" of the {memory.where}'s {octets(memory.room_bytes)}"
    if memory.near and memory.available_bytes is not None:
        told.append(f"host {octets(memory.available_bytes)} left")
    return told


def _rates(requests_per_s: float | None, tokens_per_s: float | None) -> list[str]:
    named = ((requests_per_s, "req/s"), (tokens_per_s, "tok/s"))
    return [f"{figure(value)} {unit}" for value, unit in named if value is not None]


def _latencies(name: str, p50: float | None, p95: float | None) -> list[str]:
    return [] if p50 is None else [f"{name} p50 {milliseconds(p50)}" + (f" p95 {milliseconds(p95)}" if p95 else "")]


def ended_line(level: LevelProgress, latency: str) -> str:
    parts = [level.model, level.title, *_rates(level.requests_per_s, level.tokens_per_s)]
    parts += _latencies(latency, level.p50_ms, level.p95_ms)
    parts.append(f"{level.failed} failed")
    if level.good_share is not None:
        parts.append(_good(level.good_share))
    return " · ".join(parts)


def _which(progress: Progress, index: int) -> str:
    """``level 2, 3 to come``, by the number that files and reports have; of a search nobody knows how many come."""
    left = sum(not level.left_out for level in progress.levels[index + 1 :])
    return f"level {index}" if progress.search or not left else f"level {index}, {left} to come"


def current_line(progress: Progress) -> str:
    parts = []
    if progress.current is not None:
        parts = [_which(progress, progress.current), progress.levels[progress.current].title]
    parts += [_now(progress), *_sickest(progress), *_rates(progress.requests_per_s, progress.tokens_per_s)]
    parts += _latencies(progress.latency, progress.p50_ms, progress.p95_ms)
    if failed := sum(progress.failures.values()):
        parts.append(f"{failed} failed")
    if progress.remaining_s is not None:
        parts.append(f"about {clock(progress.remaining_s)} left")
    if progress.search:
        parts.append(_plain_search(progress.search))
    return " · ".join([*parts, *([progress.message] if progress.message else [])])
