"""Holds a level against the scenario's SLO: clause by clause, and request by request for goodput. Firm values only."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from loadbench.analysis.findings import Result
from loadbench.analysis.metrics import LATENCIES, Series
from loadbench.analysis.road import FALLS, GROWS, is_over
from loadbench.analysis.rundir import Mask, Samples
from loadbench.analysis.stats import FLOORS, LEASTS, NS_PER_MS, PERCENTILES, Distribution, nearest_rank
from loadbench.analysis.summary import Latencies, Level, Requests, Road, SloClause
from loadbench.analysis.words import time
from loadbench.scenario.schema import Slo

GateResult = Literal["pass", "fail", "invalid"]
RESULTS: tuple[Result, ...] = ("fail", "undecided", "pass")  # worst first
CUT = "the level did not end as planned"
SURE = 0.01
"""How improbable a number of slow requests must be under the SLO before it is missed beyond doubt."""


def worst(results: Collection[Result]) -> Result | None:
    """None of none."""
    return next((result for result in RESULTS if result in results), None)


def slo_of(level: Level) -> Result | None:
    """The worst of its clauses: one that failed fails it, else one undecided leaves it so. None without an SLO."""
    return worst([clause.result for clause in level.slo])


def as_gate(clause: SloClause, allow_indicative: bool) -> tuple[GateResult, str | None]:
    """What a clause is worth where a pass or a miss decides, and why: one without a firm value is no pass.

    ``allow_indicative``: a value on too few samples counts as it is; of a level over capacity or cut short never.
    """
    if clause.result != "undecided":
        return clause.result, clause.because
    if not allow_indicative or clause.value is None or clause.because in (GROWS, FALLS, CUT):
        return "invalid", clause.because
    met = clause.value >= clause.limit if clause.clause == "goodput" else clause.value <= clause.limit
    return "pass" if met else "fail", f"indicative: {clause.because}"


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
    state: str | None = None,
) -> tuple[SloClause, ...]:
    """Every clause of the SLO on one level, after which the target was in this state.

    Over capacity latencies grow with the length of the level: a longer one would break the limit that this one kept.
    Of a target that broke, or one that failed most, no latency is worth a pass: it is that of what it left undone.
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
    stated = slo.error_rate is not None or slo.goodput is not None
    highest = None if stated else max(PERCENTILES[percentile] for _, percentile, _ in slo.limits())
    if broke := broken(requests, state, highest):
        return tuple(c if c.result == "fail" else replace(c, result="fail", because=broke) for c in clauses)
    if not is_over(road):
        return tuple(clauses)
    return tuple(_beyond(clause) for clause in clauses)


def until_cut(clauses: Sequence[SloClause]) -> tuple[SloClause, ...]:
    """The same of a level that did not end as planned: what was missed is, what was not says nothing of the rest."""
    return tuple(
        clause if clause.result == "fail" else replace(clause, result="undecided", because=CUT) for clause in clauses
    )


def _beyond(clause: SloClause) -> SloClause:
    """The same of a level over its capacity: a limit that it broke is broken, by what means nothing."""
    if clause.clause == "error_rate":
        return clause
    because = GROWS if clause.unit == "ms" else FALLS
    if clause.result == "fail":
        return replace(clause, because=because)
    return replace(clause, result="undecided", because=because) if clause.result == "pass" else clause


def _latency(metric: str, percentile: str, limit_ms: float, latency_ms: Latencies, headline: Series) -> SloClause:
    series = series_of(metric, headline)
    distribution = latency_ms[metric][series]
    value, n = distribution.value(percentile), distribution.n
    because = doubt(distribution, percentile)
    met = value is not None and value <= limit_ms
    result: Result = "undecided" if because else "pass" if met else "fail"
    if because and (sure := missed(distribution, percentile, limit_ms)):
        result, because = "fail", sure
    return SloClause(f"{metric}.{percentile}", series, "ms", limit_ms, value, n, result, because)


def doubt(seen: Distribution, percentile: str) -> str | None:
    """Why a percentile is not firm; None: it is."""
    if not seen.n:
        return "no samples"
    told, firm = f"{seen.n} samples; {percentile}", f"is firm from {FLOORS[percentile]}"
    if seen.value(percentile) is None:
        return f"{told} can be told from {LEASTS[percentile]} and {firm}"
    return f"{told} {firm}" if percentile in seen.indicative else None


def missed(seen: Distribution, percentile: str, limit_ms: float) -> str | None:
    """Why a limit is missed beyond doubt by a percentile that is not firm itself; None: it is not.

    Either a lower percentile is firm and above it already, or so many requests were that a target which keeps the limit
    has so many in one level of a hundred at most.
    """
    for name, share in sorted(PERCENTILES.items(), key=lambda row: -row[1]):
        value = seen.value(name)
        if share > PERCENTILES[percentile] or value is None or value <= limit_ms:
            continue
        above = seen.n - nearest_rank(share, seen.n) + 1
        if seen.firm(name) is not None or _chance(above, seen.n, 1 - PERCENTILES[percentile]) < SURE:
            return f"at least {above} of {seen.n} requests took longer than {time(limit_ms)}"
    return None


def _chance(least: int, n: int, share: float) -> float:
    """The probability of at least so many of ``n`` when each is one with this probability (binomial, exact)."""
    from scipy.special import bdtrc

    return float(bdtrc(least - 1, n, share))


def broken(requests: Requests, state: str | None, highest: float | None) -> str | None:
    """Why nothing of a level passes: a target not healthy after it, or too many failed where no share is asked for.

    A request that failed took for ever: where more did than the ``highest`` percentile leaves out, beyond doubt, that
    one is infinite. Whoever states an error rate or a goodput has said himself how many may: None.
    """
    if state not in (None, "healthy"):
        return f"the target was {state} after it"
    failed, attempted = requests.attempted - requests.ok, requests.attempted
    if not failed or highest is None:
        return None
    most = 1 - highest
    if failed > attempted / 2 or (failed > most * attempted and _chance(failed, attempted, most) < SURE):
        return f"{failed:,} of {attempted:,} requests failed"
    return None


def _share(name: str, limit: float, value: float | None, n: int, at_most: bool) -> SloClause:
    """A share of the requests of this level: what happened, not an estimate, so it is decided on any number of them."""
    if value is None:
        return SloClause(name, None, "share", limit, None, n, "undecided", "no samples")
    met = value <= limit if at_most else value >= limit
    return SloClause(name, None, "share", limit, value, n, "pass" if met else "fail", None)
