"""The search for the largest load that keeps the SLO: what a level says about it, which load to try next, and the end.

Running levels is ``runner``'s job. Everything here is a pure function of the levels so far, so that a run that goes on
and its directory, read years later, say the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from loadbench.analysis import words
from loadbench.analysis.findings import Probe, Result, Search
from loadbench.analysis.stats import PERCENTILES, nearest_rank
from loadbench.analysis.summary import Level, SloClause

Find = Literal["max-concurrency", "max-rate"]
Purpose = Literal["probe", "confirmation"]

MOST_PROBES = 16
"""1 to 1,024 users in doublings are 11, and five halvings of the last make 3 %."""

MOST_CONFIRMATIONS = 3

FARTHEST = 3.0
"""Margins are cut here, at 20 times the limit: how far a load missed it says little of where it would have kept it."""

SLIGHT = math.log(2)
"""A load that missed the limit by less than this may be an exception: then one look at twice the load is worth it."""

INSIDE = 0.1
"""A probe keeps this share of the bracket, in ln, from its ends: else a good estimate creeps towards one of them."""

CHANCE = 0.2
"""Margins closer than this, a fifth of the limit, differ by chance: near its limit every target passes and fails."""

UNDECIDED_WEIGHT = 0.25
"""Of an undecided probe in the fit. It has fewer requests than its percentile takes, typically a quarter of them."""

SURE = 0.01
"""How improbable a number of slow requests must be under the SLO before it is missed beyond doubt."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is looked for, between ``low`` and ``high`` (users, whole; or requests/s), to a share ``resolution``."""

    find: Find
    low: float
    high: float
    resolution: float

    @property
    def unit(self) -> Literal["users", "1/s"]:
        return "users" if self.find == "max-concurrency" else "1/s"


@dataclass(frozen=True, slots=True)
class Step:
    """The level to run next. ``load`` is users, a whole number, or requests/s."""

    load: float
    purpose: Purpose


@dataclass(frozen=True, slots=True)
class Tried:
    """All probes of one load together: the worst of their results, and the mean of their margins."""

    load: float
    result: Result
    margin: float | None
    weight: float
    confirmations: int


@dataclass(frozen=True, slots=True)
class Bracket:
    """``passed`` is the largest load that passed below every one that failed. The answer lies from ``low`` to ``high``.

    These may be undecided loads that lean to that side; None: nothing was seen on it.
    """

    passed: float | None
    low: float | None
    high: float | None


def probe_of(level: Level, purpose: str | None = None) -> Probe:
    """What a level says about its load. ``purpose`` unless stated: the level's own."""
    meant: Purpose = "confirmation" if (purpose or level.purpose) == "confirmation" else "probe"
    load = float(words.load_of(level))

    def said(result: Result, because: str, margin: float | None = None, clause: str | None = None) -> Probe:
        return Probe(level.index, load, meant, result, margin, clause, because)

    # Latencies of a target that broke or fell behind say how long the level was: they have no margin.
    if level.target.state not in (None, "healthy"):
        return said("fail", f"the target was {level.target.state} after it")
    if level.road is not None and level.road.result == "over_capacity":
        return said("fail", f"over capacity: {level.road.because}")
    if not level.slo:
        return said("undecided", "there is no SLO")
    judged = [(clause, *_judged(clause, level), _margin(clause, level)) for clause in level.slo]
    known = [(margin, clause) for clause, _, _, margin in judged if margin is not None]
    margin, nearest = min(known, key=lambda pair: pair[0]) if known else (None, level.slo[0])
    for result in ("fail", "undecided"):
        because = next((because for _, its, because, _ in judged if its == result), None)
        if because and result == "fail" and level.client.bound:
            return said("undecided", f"the client was the limit: {because}", margin, nearest.clause)
        if because:
            return said(result, because, margin, nearest.clause)
    if not level.complete:
        return said("undecided", "the level was cut short", margin, nearest.clause)
    return said("pass", told(nearest), margin, nearest.clause)


def _judged(clause: SloClause, level: Level) -> tuple[Result, str]:
    """The clause's result; where its percentile is not firm, it may still be missed beyond doubt."""
    metric, _, percentile = clause.clause.partition(".")
    if clause.result != "undecided" or clause.series is None:
        return clause.result, told(clause)
    seen = level.latency_ms[metric][clause.series]
    for name, share in sorted(PERCENTILES.items(), key=lambda row: -row[1]):
        value = seen.value(name)
        if share > PERCENTILES[percentile] or value is None or value <= clause.limit:
            continue
        above = seen.n - nearest_rank(share, seen.n) + 1
        if seen.firm(name) is not None or _chance(above, seen.n, 1 - PERCENTILES[percentile]) < SURE:
            took = f"took longer than the {words.time(clause.limit)} of {words.clause_title(clause.clause)}"
            return "fail", f"at least {above} of {seen.n} requests {took}"
    return "undecided", f"{words.clause_title(clause.clause)}: {clause.because}"


def _chance(least: int, n: int, share: float) -> float:
    """The probability of at least so many of ``n`` when each is one with this probability (binomial, exact)."""
    return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(least, n + 1))


def _margin(clause: SloClause, level: Level) -> float | None:
    """ln(limit / value), above 0 within; of shares that may be 0, with half a request's worth added to both."""
    value, limit = clause.value, clause.limit
    if clause.series is not None:
        if value is None:  # too few to tell it from the maximum, which is then the nearest rank
            value = level.latency_ms[clause.clause.partition(".")[0]][clause.series].max
        return None if not value else _cut(math.log(limit / value))
    if value is None or not clause.n:
        return None
    if clause.clause == "goodput":
        value, limit = 1 - value, 1 - limit
    little = 0.5 / clause.n
    return _cut(math.log((limit + little) / (value + little)))


def _cut(margin: float) -> float:
    return max(-FARTHEST, min(FARTHEST, margin))


def next_step(bounds: Bounds, probes: Sequence[Probe]) -> Step | None:
    """The level to run next; None: the search is over."""
    if not probes:
        return Step(float(bounds.low), "probe")
    tried, confirmations = _tried(probes), sum(probe.purpose == "confirmation" for probe in probes)
    bracket = _bracket(tried)
    if _confirmed(probes, bracket) or _lowest_failed(bounds, tried) or confirmations >= MOST_CONFIRMATIONS:
        return None
    if len(probes) - confirmations < MOST_PROBES:
        load = _probe_at(bounds, tried, bracket, probes)
        if load is not None:
            return Step(load, "probe")
    return Step(_candidate(bounds, tried, bracket), "confirmation")


def _candidate(bounds: Bounds, tried: Sequence[Tried], bracket: Bracket) -> float:
    """The load to confirm: the largest that passed. Where one was tried and fell, a whole resolution below that: of
    several loads near the limit the largest that passed is the one that was lucky, and so is the next.
    """
    largest = float(next((load for load in (bracket.passed, bracket.low) if load is not None), bounds.low))
    below = min((one.load for one in tried if one.confirmations), default=math.inf) / (1 + bounds.resolution)
    if largest <= below:
        return largest
    lower = float(math.floor(below)) if bounds.unit == "users" else float(f"{below:.3g}")
    return max(float(bounds.low), min(largest, lower))


def _confirmed(probes: Sequence[Probe], bracket: Bracket) -> Probe | None:
    """The fresh level that bears the answer out."""
    last = probes[-1]
    held = last.purpose == "confirmation" and last.result == "pass"
    return last if held and bracket.passed is not None and last.load <= bracket.passed else None


def _lowest_failed(bounds: Bounds, tried: Sequence[Tried]) -> bool:
    return tried[0].load == bounds.low and tried[0].result == "fail"


def _tried(probes: Sequence[Probe]) -> list[Tried]:
    """By load, the smallest first."""
    worst: tuple[Result, ...] = ("fail", "undecided", "pass")
    found = []
    for load, group in groupby(_by_load(probes), key=_load):
        same = list(group)
        margins = [probe.margin for probe in same if probe.margin is not None]
        result = min((probe.result for probe in same), key=worst.index)
        weight = sum(UNDECIDED_WEIGHT if p.result == "undecided" else 1.0 for p in same if p.margin is not None)
        confirmations = sum(probe.purpose == "confirmation" for probe in same)
        found.append(Tried(load, result, sum(margins) / len(margins) if margins else None, weight, confirmations))
    return found


def _bracket(tried: Sequence[Tried]) -> Bracket:
    """Undecided loads lean to where their margin says; without one, up until something has passed below them."""
    fails = min((one.load for one in tried if one.result == "fail"), default=math.inf)
    passed = max((one.load for one in tried if one.result == "pass" and one.load < fails), default=None)

    def over(one: Tried) -> bool:
        if one.result != "undecided":
            return one.result == "fail"
        return bool(one.confirmations) or (passed is not None if one.margin is None else one.margin < 0)

    high = min((one.load for one in tried if over(one) and one.load > (passed or 0.0)), default=None)
    low = max((one.load for one in tried if not over(one) and one.load < (high or math.inf)), default=None)
    return Bracket(passed, low, high)


def _probe_at(bounds: Bounds, tried: Sequence[Tried], bracket: Bracket, probes: Sequence[Probe]) -> float | None:
    """The next load to try, None where the bracket is as narrow as was asked for."""
    low, high, last = bracket.low, bracket.high, tried[-1]
    if high is None:
        return None if low is None or low >= bounds.high else min(2.0 * low, float(bounds.high))
    if high == last.load < bounds.high and last.margin is not None and last.margin > -SLIGHT:
        return min(2.0 * high, float(bounds.high))
    if low is None or _is_narrow(bounds, low, high):
        return None
    ends = math.log(low), math.log(high)
    root = None if _is_one_sided(probes, low, high) else _root(tried)
    near = INSIDE * (ends[1] - ends[0])
    x = sum(ends) / 2 if root is None else min(max(root, ends[0] + near), ends[1] - near)
    if bounds.unit == "users":
        return min(max(float(math.floor(math.exp(x))), low + 1.0), high - 1.0)
    rounded = (float(f"{math.exp(x):.{digits}g}") for digits in range(3, 18))
    return next((load for load in rounded if ends[0] + near / 2 < math.log(load) < ends[1] - near / 2), math.exp(x))


def _is_narrow(bounds: Bounds, low: float, high: float) -> bool:
    return high - low <= max(1.0 if bounds.unit == "users" else 0.0, bounds.resolution * low)


def _is_one_sided(probes: Sequence[Probe], low: float, high: float) -> bool:
    """Whether the last two probes moved the same end, or none: then the fit leans, and halving is safer."""
    last = [probe.load for probe in probes[-2:]]
    return all(load <= low for load in last) or all(load >= high for load in last)


def _root(tried: Sequence[Tried]) -> float | None:
    """ln of the load at which the monotone fit of the margins crosses the limit; None where it does not."""
    import numpy as np
    from scipy.interpolate import PchipInterpolator
    from scipy.optimize import isotonic_regression

    known = [one for one in tried if one.margin is not None]
    if len(known) < 2:
        return None
    x, weights = np.log([one.load for one in known]), [one.weight for one in known]
    fitted = isotonic_regression([one.margin for one in known], weights=weights, increasing=False).x
    roots = PchipInterpolator(x, fitted).roots(extrapolate=False)
    return next((float(root) for root in roots if math.isfinite(root)), None)  # not finite: flat at the limit


def conclude(bounds: Bounds, model: str, probes: Sequence[Probe], complete: bool) -> Search:
    """What the search found, or had found when it was cut short; ``complete``: it came to its own end."""
    tried = _tried(probes)
    bracket, root = _bracket(tried), _root(tried)
    answer, result, because = _outcome(bounds, probes, complete)
    failed = (one.load for one in tried if one.result == "fail" and one.load > (bracket.passed or 0.0))
    return Search(
        model=model,
        find=bounds.find,
        unit=bounds.unit,
        result=result,
        answer=answer,
        passed=bracket.passed,
        failed=min(failed, default=None),
        estimate=None if root is None else math.exp(root),
        because=because,
        odd=tuple(_odd(bounds, probes)),
        probes=tuple(probes),
    )


def _outcome(
    bounds: Bounds, probes: Sequence[Probe], complete: bool
) -> tuple[float | None, Literal["confirmed", "unbounded", "none", "undecided"], str]:
    """The answer, the result, and what it stands on."""
    if not probes:
        return None, "undecided", "no level was run"
    tried = _tried(probes)
    bracket = _bracket(tried)
    if last := _confirmed(probes, bracket):
        by = f"confirmed by level {last.level}: {last.because}"
        if bracket.high is None and last.load >= bounds.high:
            return last.load, "unbounded", f"{words.load(last.load, bounds.unit)} is the most that was allowed, {by}"
        unsure = [one for one in tried if one.load > last.load and one.result == "undecided"]
        return last.load, "confirmed", "; ".join([by, *_seen(bounds, unsure)])
    if _lowest_failed(bounds, tried):
        least = next(probe for probe in probes if probe.load == bounds.low and probe.result == "fail")
        where = f"{words.load(bounds.low, bounds.unit)}, the least that was allowed (level {least.level})"
        return None, "none", f"missed at {where}: {least.because}"
    if not complete:
        return None, "undecided", "; ".join(["cut short", *_seen(bounds, tried)])
    tries = sum(probe.purpose == "confirmation" for probe in probes)
    return None, "undecided", "; ".join([f"no fresh level bore one out in {tries} tries", *_seen(bounds, tried)])


def _seen(bounds: Bounds, tried: Sequence[Tried]) -> Iterator[str]:
    """``passed at 1, 2, 4 users``, ``failed at 8, 16 users``."""
    for result, word in (("pass", "passed"), ("fail", "failed"), ("undecided", "undecided")):
        if loads := [f"{one.load:g}" for one in tried if one.result == result]:
            yield f"{word} at {words.listed(loads)}{'/s' if bounds.unit == '1/s' else ' users'}"


def _odd(bounds: Bounds, probes: Sequence[Probe]) -> Iterator[str]:
    """Every pair of which the lower load failed and the higher one passed, by more than chance does to either.

    A load that has done both is near its limit, where every target does.
    """
    results = {load: {p.result for p in same} for load, same in groupby(_by_load(probes), key=_load)}
    clear = [probe for probe in _by_load(probes) if results[probe.load] != {"pass", "fail"}]
    for place, lower in enumerate(clear):
        for higher in clear[place + 1 :]:
            apart = (higher.margin or 0.0) - (-FARTHEST if lower.margin is None else lower.margin)
            if (lower.result, higher.result) == ("fail", "pass") and apart > CHANCE:
                yield (
                    f"{words.load(lower.load, bounds.unit)} failed ({lower.because}, level {lower.level}) and"
                    f" {words.load(higher.load, bounds.unit)} passed ({higher.because}, level {higher.level})"
                )


def _load(probe: Probe) -> float:
    return probe.load


def _by_load(probes: Sequence[Probe]) -> list[Probe]:
    return sorted(probes, key=_load)


def told(clause: SloClause) -> str:
    """``TTFT p95 is 1.2 s, the limit 1 s (260 requests)``."""
    return f"{words.clause(clause)} ({clause.n:,} requests)"
