"""Small bars on the console: throughput and latency against load, above the tables that have their numbers in full.

A bar begins at nothing and the longest of a model's fills its room, so that lengths can be compared. What stands on too
few samples to be firm is drawn in a lighter ink; where a stream cannot spell blocks, in ASCII.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from loadbench.analysis.metrics import LATENCIES, RATES
from loadbench.analysis.road import is_over
from loadbench.analysis.stats import FLOORS, Distribution
from loadbench.analysis.summary import Level, Summary
from loadbench.records import load_title
from loadbench.report.columns import OVER
from loadbench.report.words import NONE, figure

LEAST, MOST = 6, 28  # columns of the longest bar: in fewer nothing is seen
LEAST_LEVELS, MOST_LEVELS = 2, 30
GAP = "  "
STATISTICS = ("p50", "p95")


@dataclass(frozen=True, slots=True)
class Inks:
    """A character each: of what is firm, of what a p95 adds to a p50, of what is indicative."""

    firm: str
    beyond: str
    indicative: str


BLOCKS, ASCII = Inks("█", "▒", "░"), Inks("#", "=", ".")


@dataclass(frozen=True, slots=True)
class Bars:
    """The levels of one model and kind of load as lines; the first says what the others show."""

    model: str
    loop: str
    lines: tuple[str, ...]
    note: str | None


def bars(summary: Summary, room: int, encoding: str) -> Iterator[Bars]:
    """One for each model and kind of load with several loads, where there is room for it."""
    inks = BLOCKS if _spells(encoding) else ASCII
    shown = (level for level in summary.levels if level.purpose == "level")
    for (model, loop), group in groupby(shown, lambda level: (level.model, level.load.kind)):
        levels = list(group)
        if LEAST_LEVELS <= len(levels) <= MOST_LEVELS and (lines := _lines(levels, room, inks)):
            drawn = "".join(lines[1:])
            note = f"{inks.indicative} and ~: indicative, on few samples" if inks.indicative in drawn else None
            yield Bars(model, loop, tuple(lines), note)


def _spells(encoding: str) -> bool:
    try:
        (BLOCKS.firm + BLOCKS.beyond + BLOCKS.indicative).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _lines(levels: Sequence[Level], room: int, inks: Inks) -> list[str]:
    """None at all where nothing was measured, or there is no room for a bar."""
    metric = next((name for name in ("ttft", "e2e") if any(_told(level, name).p50 for level in levels)), None)
    rate = next((name for name in ("output_tokens_per_s", "requests_per_s") if _most(levels, name)), None)
    if metric is None or rate is None:
        return []
    told = [_told(level, metric) for level in levels]
    loads = ["", *(load_title(level.load) + (OVER if is_over(level.road) else "") for level in levels)]
    rates = [RATES[rate].unit, *(figure(level.throughput[rate]) for level in levels)]
    times = [LATENCIES[metric].unit, *map(_range, told)]
    texts = [[text.ljust(max(map(len, loads))) for text in loads]]
    texts += [[text.rjust(max(map(len, column))) for text in column] for column in (rates, times)]
    length = min(MOST, (room - sum(len(column[0]) for column in texts) - 4 * len(GAP)) // 2)
    if length < LEAST:
        return []
    most, longest_ms = _most(levels, rate), max(one.p95 or one.p50 or 0.0 for one in told)
    first = [RATES[rate].title, *(_rate_bar(level, rate, length / most, inks) for level in levels)]
    title = f"{LATENCIES[metric].title} {inks.firm} p50 {inks.beyond} p95"
    second = [title, *(_time_bar(one, length / longest_ms, inks) for one in told)]
    columns = (texts[0], texts[1], [bar[:length].ljust(length) for bar in first], texts[2], second)
    return [GAP.join(cells).rstrip()[:room] for cells in zip(*columns, strict=True)]


def _told(level: Level, metric: str) -> Distribution:
    return level.latency_ms[metric][level.headline]


def _most(levels: Sequence[Level], rate: str) -> float:
    return max(level.throughput.get(rate) or 0.0 for level in levels)


def _range(told: Distribution) -> str:
    """``54.0 - ~93.4``, each with ~ where it is indicative."""
    known = [
        ("~" if name in told.indicative else "") + figure(value)
        for name in STATISTICS
        if (value := told.value(name)) is not None
    ]
    return " - ".join(known) or NONE


def _rate_bar(level: Level, rate: str, per_unit: float, inks: Inks) -> str:
    ink = inks.firm if level.requests.ok >= FLOORS["p50"] else inks.indicative
    return ink * _columns(level.throughput[rate], per_unit)


def _time_bar(told: Distribution, per_ms: float, inks: Inks) -> str:
    first, whole = _columns(told.p50, per_ms), _columns(told.p95, per_ms)
    begins = inks.indicative if "p50" in told.indicative else inks.firm
    ends = inks.indicative if "p95" in told.indicative else inks.beyond
    return begins * first + ends * (whole - first)


def _columns(value: float | None, per_unit: float) -> int:
    """At least one of what is more than nothing."""
    return max(1, round(value * per_unit)) if value else 0
