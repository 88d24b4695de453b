"""Holds a level against the scenario's SLO: clause by clause, and request by request for goodput. Firm values only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loadbench.analysis.findings import Result
from loadbench.analysis.metrics import LATENCIES, Series
from loadbench.analysis.road import FALLS, GROWS, is_over
from loadbench.analysis.rundir import Mask, Samples
from loadbench.analysis.stats import FLOORS, LEASTS, NS_PER_MS
from loadbench.analysis.summary import Latencies, Requests, Road, SloClause
from loadbench.scenario.schema import Slo


def series_of(metric: str, headline: Series) -> Series:
    """The series of a metric to look at first; some have one only."""
    return headline if headline in LATENCIES[metric].series else "service"


def good(slo: Slo, samples: Samples, ok: Mask, headline: Series) -> Mask:
    """Which requests succeeded within every latency limit; of several limits on one metric the highest percentile's.

    Gaps have no say: of each request only the largest is known. Nor has a metric that a request does not have.
    """
    limits_ms: dict[str, float] = {}
    for metric, _, limit_s in slo.limits():
        limits_ms[metric] = max(limit_s * 1e3, limits_ms.get(metric, 0.0))
    met = ok.copy()
    for metric, limit_ms in limits_ms.items():
        if stamps := LATENCIES[metric].series[series_of(metric, headline)]:
            values_ns = stamps(samples)
            met &= np.isnan(values_ns) | (values_ns <= limit_ms * NS_PER_MS)
    return met


def judge(
    slo: Slo,
    requests: Requests,
    latency_ms: Latencies,
    goodput_share: float | None,
    headline: Series,
    road: Road | None,
) -> tuple[SloClause, ...]:
    """Every clause of the SLO on one level.

    Over capacity latencies grow with the length of the level: a longer one would break the limit that this one kept.
    """
    clauses = [
        _latency(metric, percentile, limit_s * 1e3, latency_ms, headline)
        for metric, percentile, limit_s in slo.limits()
    ]
    attempted = requests.attempted
    if slo.error_rate is not None:
        failed = (attempted - requests.ok) / attempted if attempted else None
        clauses.append(_share("error_rate", slo.error_rate, failed, attempted, at_most=True))
    if slo.goodput is not None:
        clauses.append(_share("goodput", slo.goodput, goodput_share, attempted, at_most=False))
    if not is_over(road):
        return tuple(clauses)
    return tuple(
        replace(clause, result="undecided", because=GROWS if clause.unit == "ms" else FALLS)
        if clause.result == "pass" and clause.clause != "error_rate"
        else clause
        for clause in clauses
    )


def _latency(metric: str, percentile: str, limit_ms: float, latency_ms: Latencies, headline: Series) -> SloClause:
    series = series_of(metric, headline)
    distribution = latency_ms[metric][series]
    value, n = distribution.value(percentile), distribution.n
    because = None
    if not n:
        because = "no samples"
    elif value is None:
        because = (
            f"{n} samples; {percentile} can be told from {LEASTS[percentile]} and is firm from {FLOORS[percentile]}"
        )
    elif percentile in distribution.indicative:
        because = f"{n} samples; {percentile} is firm from {FLOORS[percentile]}"
    met = value is not None and value <= limit_ms
    result: Result = "undecided" if because else "pass" if met else "fail"
    return SloClause(f"{metric}.{percentile}", series, "ms", limit_ms, value, n, result, because)


def _share(name: str, limit: float, value: float | None, n: int, at_most: bool) -> SloClause:
    """A share of the requests of this level: what happened, not an estimate, so it is decided on any number of them."""
    if value is None:
        return SloClause(name, None, "share", limit, None, n, "undecided", "no samples")
    met = value <= limit if at_most else value >= limit
    return SloClause(name, None, "share", limit, value, n, "pass" if met else "fail", None)
