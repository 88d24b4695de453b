"""What a schedule of requests meets, in sentences: rates kept up with, rushes, lateness; and how a level changed.

A level that was over capacity has no latency here: its percentiles say how long it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loadbench.analysis import words
from loadbench.analysis.road import AT_ONCE_S, is_over
from loadbench.analysis.sentences import MOST_TOLD
from loadbench.analysis.stats import Distribution
from loadbench.analysis.summary import ClosedLoad, Interval, Level
from loadbench.analysis.words import listed, number, time
from loadbench.records import load_title

LEAST_INTERVALS = 4


def open_loop(levels: Sequence[Level]) -> Iterator[str]:
    """Which rates it keeps up with, and how late answers are at those."""
    opened = [level for level in levels if not isinstance(level.load, ClosedLoad)]
    whole = (level for level in opened if words.is_fixed(level) and level.road and level.complete)
    rates = sorted(whole, key=words.load_of)
    kept, over, unsure = (
        [level for level in rates if level.road and level.road.result == result]
        for result in ("steady", "over_capacity", "undecided")
    )
    parts = []
    if kept:
        parts.append(f"keeps up with {load_title(kept[-1].load)}")
    if over:
        served = over[0].throughput["requests_per_s"]
        gives = "" if served is None else f", where {number(served)}/s were served"
        parts.append(f"is over capacity at {load_title(over[0].load)}{gives}")
    if parts:
        yield f"It {listed(parts)}."
    yield from _unsure(unsure)
    for level in opened:
        if is_over(level.road):
            yield from _left_the_road(level)
        yield from _rush(level)
    on_road = [level for level in opened if not is_over(level.road)]
    for level in on_road if len(on_road) <= MOST_TOLD else kept[-1:] or on_road[-1:]:
        yield _lateness(level)


def _unsure(levels: Sequence[Level]) -> Iterator[str]:
    """Where it is undecided, reason by reason."""
    by_reason: dict[str, list[Level]] = {}
    for level in levels:
        if level.road:
            by_reason.setdefault(level.road.because, []).append(level)
    told = [*by_reason.items()]
    for because, alike in told[:MOST_TOLD]:
        yield f"Whether it keeps up {words.where(alike)} is undecided: {because}."
    if others := [level for _, alike in told[MOST_TOLD:] for level in alike]:
        yield f"Nor is it decided {words.where(others)}."


def _left_the_road(level: Level) -> Iterator[str]:
    assert level.road is not None and level.road.left_s is not None  # judged to be over capacity, it has it
    left_s = level.road.left_s
    since = f" from {left_s:.3g} s on" if left_s >= AT_ONCE_S else " from its start on"
    asked = "" if level.road.left_at is None or words.is_fixed(level) else f", at {level.road.left_at:.3g}/s,"
    yield (
        f"At {load_title(level.load)} more came than went{since}{asked or ','} so its latencies only say how long the"
        " level was."
    )


def _rush(level: Level) -> Iterator[str]:
    """Whether it came back after the most there was; of a load that changes."""
    road = level.road
    if road is None or road.most_in_flight is None or road.most_at_s is None:
        return
    back = "the queue was not worked off"
    if road.worked_off_s is not None:
        back = f"the queue was worked off at {road.worked_off_s:.3g} s"
        back += ", when no more came" if road.worked_off_s > level.window_s else ""
    most = f"at most {road.most_in_flight:,} were in flight, {road.most_at_s:.3g} s after its start"
    yield f"At {load_title(level.load)} {most}; {back}."


def _lateness(level: Level) -> str:
    name = "first token" if level.latency_ms["ttft"]["response"].n else "whole answer"
    response = level.latency_ms["ttft" if name == "first token" else "e2e"]["response"]
    told = [f"{time(value)} (p{q})" for q in (50, 95) if (value := response.firm(f"p{q}")) is not None]
    if told:
        return f"At {load_title(level.load)} the {name} comes {listed(told)} after it was due."
    return f"At {load_title(level.load)} too few requests succeeded to speak of their latency."


def over_time(level: Level) -> Iterator[str]:
    """How the first token, or without streaming the whole answer, changed over a level with results by interval."""
    if len(level.intervals) < LEAST_INTERVALS or is_over(level.road):
        return
    for metric, title in (("ttft", "first token"), ("e2e", "whole answer")):
        for statistic in ("p95", "p50"):
            told = [
                (value, part) for part in level.intervals if (value := _of(part, metric).firm(statistic)) is not None
            ]
            if len(told) >= LEAST_INTERVALS:
                (low, _), (high, worst) = (found(told, key=lambda pair: pair[0]) for found in (min, max))
                yield (
                    f"At {load_title(level.load)} the {title}'s {statistic} of an interval lies between {time(low)} and"
                    f" {time(high)}, highest {worst.start_s:.4g} s after the level's start."
                )
                return


def _of(part: Interval, metric: str) -> Distribution:
    return part.latency_ms.get(metric) or Distribution(0)
