"""Findings by hand, for the tests of words and reports: what capacities, searches and phases of a run may say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loadbench.analysis.findings import Capacity, Estimate, Fit, Phases, Point, Probe, Search
from loadbench.analysis.stats import Distribution
from loadbench.analysis.summary import Interval, Level, Requests, Road, SloClause, Summary

MODEL = "synthetic-edge:1"


def point(level: int, load: float, tokens_per_s: float, *, firm: bool = True) -> Point:
    return Point(level, load, tokens_per_s / 32, None, tokens_per_s, 200.0, 1.0, firm)


def estimate(name: Any, value: float | None, because: str = "it is so", levels: tuple[int, ...] = (0, 1)) -> Estimate:
    unit: Any = {"parallelism": "×", "in_service": "requests", "sustained": "1/s"}.get(name, "users")
    return Estimate(name, value, unit, "undecided" if value is None else "firm", because, levels)


def capacity(rates: dict[int, float], nature: Any, **more: Any) -> Capacity:
    """Closed, of levels 0, 1, … with so many users and tokens per second."""
    made = Capacity(
        model=MODEL,
        loop="closed",
        nature=nature,
        up_to=None,
        saturated=True,
        last_gain=0.0,
        falls_to=None,
        because="that is what was seen",
        levels=tuple(range(len(rates))),
        points=tuple(point(index, load, rate) for index, (load, rate) in enumerate(rates.items())),
        estimates=(),
        usl=None,
    )
    return replace(made, **more)


def probe(level: int, load: float, result: Any, margin: float | None, purpose: Any = "probe") -> Probe:
    return Probe(level, load, purpose, result, margin, "ttft.p95", f"TTFT p95 of level {level}")


def search(result: Any, **more: Any) -> Search:
    made = Search(
        model=MODEL,
        find="max-concurrency",
        unit="users",
        result=result,
        answer=None,
        passed=None,
        failed=None,
        estimate=None,
        because="so it went",
        odd=(),
        probes=(probe(0, 1.0, "pass", 1.0), probe(1, 2.0, "pass", 0.1133, "confirmation"), probe(2, 4.0, "fail", -0.4)),
    )
    return replace(made, **more)


def phases(**more: Any) -> Phases:
    reading = Fit(12.0, 0.69, (0.6, 0.8), 130, (0,), None)
    return replace(Phases(MODEL, reading, 1450.0, Fit(3.0, 4.1, (3.9, 4.3), 4, (0, 1, 2, 3), None)), **more)


def told(n: int, **values: Any) -> Distribution:
    return Distribution(n, **values)


def interval(number: int, p95: float | None, length_s: float = 10.0) -> Interval:
    """Part ``number`` of a level, with this p95 of the first token."""
    return Interval(
        start_s=number * length_s,
        length_s=length_s,
        load=2.0,
        requests=Requests(150, 149, {"http_5xx": 1}),
        throughput={"requests_per_s": 2.0, "output_tokens_per_s": 64.0, "goodput_per_s": 1.9, "goodput_share": 0.95},
        concurrency_reached=0.4,
        latency_ms={
            "ttft": told(149, p50=60.0, p95=p95, max=p95),
            "e2e": told(149, p50=200.0, p95=300.0, indicative=("p95",)),
            "tpot": told(149, p50=5.0),
        },
    )


def over(level: Level) -> Level:
    return replace(level, road=Road("over_capacity", "in flight grew", 12.0, 3.0, 1.1))


def judged(level: Level, result: Any) -> Level:
    value = {"pass": 200.0, "fail": 600.0, "undecided": 290.0}[result]
    because = "70 samples" if result == "undecided" else None
    return replace(level, slo=(SloClause("ttft.p95", "service", "ms", 300.0, value, 200, result, because),))


def with_levels(summary: Summary, levels: Sequence[Level], **more: Any) -> Summary:
    """The run with these levels, and nothing that the old ones said together."""
    together: dict[str, Any] = {"capacity": (), "phases": ()} | more
    return replace(summary, levels=tuple(levels), **together)
