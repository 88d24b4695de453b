"""A summary as metrics for monitoring: names, units, labels and the numbers that there are; formats are elsewhere's.

Names follow Prometheus (base units, unit last) and are the same wherever they are sent. METRICS names the latencies and
rates, so a metric added there is exported. What has no number has no point; one that is indicative says so in a label.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

from loadbench.analysis.metrics import LATENCIES, RATES
from loadbench.analysis.stats import PERCENTILES, Distribution
from loadbench.analysis.summary import ClosedLoad, Level, Summary
from loadbench.analysis.verdict import exit_code
from loadbench.records import load_title
from loadbench.report.escape import plain

PREFIX = "loadbench_"
Number = float | int | None
Labelled = Iterator[tuple[dict[str, str], Number]]


@dataclass(frozen=True, slots=True)
class Point:
    """One number; its labels are harmless text."""

    labels: dict[str, str]
    value: float | int


@dataclass(frozen=True, slots=True)
class Family:
    """The points of one name, all gauges. ``unit`` is UCUM's code, as OpenTelemetry has it: s, By, 1, 1/s.

    Percentiles are no Prometheus summary: all of one have the same labels but ``quantile``, and ours are each firm or
    indicative. A collector would part them, and make up a count and a sum of 0 for the parts without.
    """

    name: str
    unit: str
    about: str
    points: tuple[Point, ...]


def families(summary: Summary) -> list[Family]:
    """Every metric of the run and its levels that has a number, in an order of their own."""
    found = [_of_runs(*row, summary) for row in _OF_RUNS]
    found += [_of_levels(*row, summary) for row in _OF_LEVELS]
    found += [
        _of_levels(_spelt(rate.name), _UCUM.get(rate.unit, rate.unit), rate.definition, _rate(rate.name), summary)
        for rate in RATES.values()
    ]
    for metric in LATENCIES.values():
        name, about = metric.name, metric.definition
        found.append(_of_levels(f"{name}_seconds", "s", f"{about} p99_all: {_ALL}", _percentiles(name), summary))
        found.append(_of_levels(f"{name}_mean_seconds", "s", f"{about} The mean.", _of(name, _mean), summary))
        found.append(_of_levels(f"{name}_max_seconds", "s", f"{about} The largest.", _of(name, _max), summary))
        found.append(_of_levels(f"{name}_samples", "1", f"{about} How many there are.", _of(name, _n), summary))
    return [family for family in found if family.points]


_UCUM = {"share": "1", "tok/s": "1/s"}
_ALL = "of all requests, failed ones counted as infinite."


def _spelt(name: str) -> str:
    """The name of a rate as Prometheus wants it: words, no abbreviated units, shares as ratios."""
    return re.sub(r"_share$", "_ratio", re.sub(r"_per_s(?=_|$)", "_per_second", name))


def _of_runs(name: str, unit: str, about: str, get: Callable[[Summary], Labelled], summary: Summary) -> Family:
    points = tuple(Point(_clean(summary, labels), value) for labels, value in get(summary) if value is not None)
    return Family(PREFIX + name, unit, about, points)


def _of_levels(name: str, unit: str, about: str, get: Callable[[Level], Labelled], summary: Summary) -> Family:
    points = tuple(
        Point(_clean(summary, _where(level) | labels), value)
        for level in summary.levels
        for labels, value in get(level)
        if value is not None
    )
    return Family(PREFIX + name, unit, about, points)


def _where(level: Level) -> dict[str, str]:
    return {"model": level.model, "level": str(level.index), "load": load_title(level.load)}


def _clean(summary: Summary, labels: dict[str, str]) -> dict[str, str]:
    """With the scenario's name: files of several runs in one collector must not say the same of different things.

    The run's own name would make new series every night, and is in no label.
    """
    return {name: plain(value) for name, value in {"scenario": summary.name, **labels}.items()}


def _percentiles(metric: str) -> Callable[[Level], Labelled]:
    def get(level: Level) -> Labelled:
        for series, told in level.latency_ms[metric].items():
            for name in (*PERCENTILES, "p99_all"):
                doubt = {"indicative": "true"} if name in told.indicative else {}
                yield {"series": series, "percentile": name} | doubt, _seconds(told.value(name))

    return get


def _of(metric: str, get: Callable[[Distribution], Number]) -> Callable[[Level], Labelled]:
    def labelled(level: Level) -> Labelled:
        yield from (({"series": series}, get(told)) for series, told in level.latency_ms[metric].items())

    return labelled


def _mean(told: Distribution) -> Number:
    return _seconds(told.mean)


def _max(told: Distribution) -> Number:
    return _seconds(told.max)


def _n(told: Distribution) -> Number:
    return told.n or None


def _seconds(value_ms: float | str | None) -> Number:
    return None if value_ms is None else float(value_ms) / 1e3


def _rate(name: str) -> Callable[[Level], Labelled]:
    return _one(lambda level: level.throughput.get(name))


def _one(get: Callable[[Level], Number]) -> Callable[[Level], Labelled]:
    def labelled(level: Level) -> Labelled:
        yield {}, get(level)

    return labelled


def _requests(level: Level) -> Labelled:
    for outcome, number in {"ok": level.requests.ok, **level.requests.failed}.items():
        yield {"outcome": outcome}, number


def _memory(level: Level) -> Labelled:
    held, rss = level.memory, level.target.rss_bytes
    figures = {"before": rss.before, "peak": rss.peak, "after": rss.after}
    if held is not None and held.of is not None:
        figures = {"before": held.before_bytes, "peak": held.peak_bytes, "after": held.after_bytes}
    of = held.of if held is not None and held.of is not None else "rss"
    yield from (({"moment": moment, "of": of}, size) for moment, size in figures.items())


def _state(level: Level) -> Labelled:
    if level.target.state is not None:
        yield {"state": level.target.state}, 1


def _clauses(level: Level) -> Labelled:
    for clause in level.slo:
        yield {"clause": clause.clause}, _told(clause.result)


def _gates(summary: Summary) -> Labelled:
    """What is asserted twice is told once."""
    where = {level.index: _where(level) for level in summary.levels}
    results = {(g.level, g.asserted, g.clause, g.series or ""): g.result for g in summary.gates}
    for (level, asserted, clause, series), result in results.items():
        labels = {"asserted": asserted, "clause": clause} | ({"series": series} if series else {})
        yield ({} if level is None else where[level]) | labels, _told(result)


def _told(result: str | None) -> Number:
    """1 where it passed, 0 where it failed, nothing where that is not known."""
    return {"pass": 1, "fail": 0}.get(result or "")


def _info(summary: Summary) -> Labelled:
    engine = str(summary.endpoint.get("title") or summary.endpoint.get("kind") or "")
    yield {"version": summary.loadbench, "status": summary.status, "engine": engine}, 1


def _began(summary: Summary) -> Labelled:
    yield {}, started_ns(summary) // 10**6 / 1e3


def started_ns(summary: Summary) -> int:
    """When the run began, in nanoseconds since the epoch."""
    return round(datetime.fromisoformat(summary.started).timestamp() * 1e6) * 1000


_OF_RUNS: tuple[tuple[str, str, str, Callable[[Summary], Labelled]], ...] = (
    ("run_info", "1", "The last run of a scenario: always 1.", _info),
    ("run_start_time_seconds", "s", "When the run began, in seconds since the epoch.", _began),
    ("run_duration_seconds", "s", "How long the run took.", lambda run: iter([({}, run.duration_s)])),
    ("run_exit_code", "1", "What the run exited with; 0 is well.", lambda run: iter([({}, exit_code(run))])),
    ("gate_met", "1", "Whether what was asserted held; absent: no firm value.", _gates),
    ("run_slo_met", "1", "Whether the SLO held; absent: undecided.", lambda run: iter([({}, _told(run.verdict.slo))])),
)

_OF_LEVELS: tuple[tuple[str, str, str, Callable[[Level], Labelled]], ...] = (
    ("level_complete", "1", "Whether the level ran to its end.", _one(lambda level: int(level.complete))),
    ("level_window_seconds", "s", "The time that the level's figures are of.", _one(lambda level: level.window_s)),
    ("level_cautions", "1", "Doubts about the level's figures.", _one(lambda level: len(level.cautions))),
    ("level_requests", "1", "Requests of the level, by how they ended.", _requests),
    (
        "offered_users",
        "1",
        "Users of a closed loop, as asked for.",
        _one(lambda level: level.load.concurrency if isinstance(level.load, ClosedLoad) else None),
    ),
    (
        "offered_requests_per_second",
        "1/s",
        "Requests per second of an open loop, as asked for.",
        _one(lambda level: None if isinstance(level.load, ClosedLoad) else level.load.rate_per_s),
    ),
    ("issued_requests_per_second", "1/s", "Requests per second sent.", _one(lambda level: level.issued_per_s)),
    ("in_flight", "1", "Requests in flight, the mean over time.", _one(lambda level: level.concurrency_reached)),
    ("target_memory_bytes", "By", "Memory of the target around the level; of: what counts.", _memory),
    ("target_state", "1", "The state that the target was in after the level: always 1.", _state),
    ("slo_clause_met", "1", "Whether a clause of the SLO held; absent: undecided.", _clauses),
    (
        "client_bound",
        "1",
        "Whether the client, not the target, shaped the figures.",
        _one(lambda level: None if level.client.bound is None else int(level.client.bound)),
    ),
    ("client_cpu_ratio", "1", "CPU of the client, of one core.", _one(lambda level: level.client.cpu_share)),
    (
        "client_loop_lag_p99_seconds",
        "s",
        "How late the client's event loop was.",
        _one(lambda level: _seconds(level.client.loop_lag_p99_ms)),
    ),
)
