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
from loadbench.analysis.stats import TELLS
from loadbench.analysis.summary import Level, SloClause
from loadbench.records import Find

Purpose = Literal["probe", "confirmation"]

MOST_PROBES = 16
"""1 to 1,024 users in doublings are 11, and five halvings of the last make 3 %."""

MOST_CONFIRMATIONS = 3

MOST_LOWEST = 3
"""The least load is tried so often before it is said to fail."""

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
    """All probes of one load together: failed unless more passed, and the mean of their margins."""

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
    doubts = [doubt.reason for doubt in level.cautions if doubt.about == "busy_machine"]
    failed, attempted = level.requests.attempted - level.requests.ok, level.requests.attempted
    unasked = failed and not any(clause.unit == "share" for clause in level.slo)

    def said(result: Result, because: str, margin: float | None = None, clause: str | None = None) -> Probe:
        doubted = [f"{failed:,} of {attempted:,} requests failed"] if unasked and result == "pass" else []
        doubted += _coarse(level) if result == "pass" else []
        because += "".join(f", while {doubt}" for doubt in doubted + doubts)
        return Probe(level.index, load, meant, result, margin, clause, because)

    # Latencies of a target that broke or fell behind say how long the level was: they have no margin.
    if level.target.state not in (None, "healthy") and not (level.client.bound and level.target.state == "degraded"):
        return said("fail", f"the target was {level.target.state} after it")
    if level.road is not None and level.road.result == "over_capacity":
        if level.client.bound:
            return said("undecided", f"the client was the limit, over capacity: {level.road.because}")
        return said("fail", f"over capacity: {level.road.because}")
    if not level.slo:
        return said("undecided", "there is no SLO")
    known = [(margin, clause) for clause in level.slo if (margin := _margin(clause, level)) is not None]
    margin, nearest = min(known, key=lambda pair: pair[0]) if known else (None, level.slo[0])
    for result in ("fail", "undecided"):
        because = next((told(clause) for clause in level.slo if clause.result == result), None)
        if because and result == "fail" and margin is not None and margin > 0:  # not by its value
            margin = None
        if because and result == "fail" and level.client.bound:
            return said("undecided", f"the client was the limit: {because}", margin, nearest.clause)
        if because:
            return said(result, because, margin, nearest.clause)
    if not level.complete:
        return said("undecided", "the level was cut short", margin, nearest.clause)
    return said("pass", told(nearest), margin, nearest.clause)


def _coarse(level: Level) -> list[str]:
    """The shares that a level had too few requests to tell."""
    told = []
    for clause in level.slo:
        room = clause.limit if clause.clause == "error_rate" else 1 - clause.limit
        if clause.unit == "share" and clause.n * room < TELLS:
            least = f"{math.ceil(TELLS / room):,} tell it" if room > 0 else "none tell it"
            told.append(f"{clause.n:,} requests hardly tell the {words.clause_title(clause.clause)}; {least}")
    return told


def _margin(clause: SloClause, level: Level) -> float | None:
    """ln(limit / value), above 0 within; of shares, with half a request's worth added to both.

    A share of which nothing was used has none: how far it is from its limit says only how many requests there were.
    """
    value, limit = clause.value, clause.limit
    if clause.series is not None:
        if value is None:  # too few to tell it from the maximum, which is then the nearest rank
            value = level.latency_ms[clause.clause.partition(".")[0]][clause.series].max
        return None if not value else _cut(math.log(limit / value))
    if value is None or not clause.n:
        return None
    if clause.clause == "goodput":
        value, limit = 1 - value, 1 - limit
    if not value:
        return None
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
    lowest = _lowest(bounds, probes)
    if lowest == "again":
        return Step(float(bounds.low), "probe")
    if _confirmed(probes, bracket) or lowest or confirmations >= MOST_CONFIRMATIONS:
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


def _lowest(bounds: Bounds, probes: Sequence[Probe]) -> Literal["again", "none", "undecided"] | None:
    """What the least load that is allowed says once it failed; None: nothing, or it passed more often.

    Nothing is below it, so that once is not enough: it is tried again, and twice where it then passes.
    """
    there = [probe.result for probe in probes if probe.load == bounds.low]
    passed, failed = there.count("pass"), there.count("fail")
    if not failed or passed > failed:
        return None
    first = next(result for result in there if result != "undecided")
    if first == "fail" and failed == 1 and len(there) < MOST_LOWEST:
        return "again"
    return "undecided" if passed or failed == 1 else "none"


def _tried(probes: Sequence[Probe]) -> list[Tried]:
    """By load, the smallest first. Where something firm is known of a load, what is undecided adds nothing."""
    found = []
    for load, group in groupby(_by_load(probes), key=_load):
        same = list(group)
        confirmations = sum(probe.purpose == "confirmation" for probe in same)
        same = [probe for probe in same if probe.result != "undecided"] or same
        margins = [probe.margin for probe in same if probe.margin is not None]
        passed, failed = (sum(probe.result == result for probe in same) for result in ("pass", "fail"))
        result: Result = "fail" if failed and failed >= passed else "pass" if passed else "undecided"
        weight = sum(UNDECIDED_WEIGHT if p.result == "undecided" else 1.0 for p in same if p.margin is not None)
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
    failed = min(
        (one.load for one in tried if one.result == "fail" and one.load > (bracket.passed or 0.0)), default=None
    )
    return Search(
        model=model,
        find=bounds.find,
        unit=bounds.unit,
        result=result,
        answer=answer,
        passed=bracket.passed,
        failed=failed,
        estimate=None if root is None else _between(math.exp(root), bracket.passed, failed),
        because=because,
        odd=tuple(_odd(bounds, probes)),
        probes=tuple(probes),
    )


def _between(load: float, passed: float | None, failed: float | None) -> float:
    """Within what was seen: the fit goes through means, of loads that passed and of loads that failed alike."""
    return min(max(load, passed or 0.0), math.inf if failed is None else failed)


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
            return last.load, "unbounded", f"the most that was allowed, {by}"
        unsure = [one for one in tried if one.load > last.load and one.result == "undecided"]
        return last.load, "confirmed", "; ".join([by, *_seen(bounds, unsure)])
    lowest, least = _lowest(bounds, probes), f"{words.load(bounds.low, bounds.unit)}, the least that was allowed"
    if lowest in ("none", "undecided"):
        there = [probe for probe in probes if probe.load == bounds.low]
        missed = next(probe for probe in there if probe.result == "fail")
        if lowest == "none":
            return None, "none", f"missed at {least} (level {missed.level}): {missed.because}"
        results = words.listed([f"{_RESULTS[probe.result]} in level {probe.level}" for probe in there])
        return None, "undecided", f"at {least}, it {results} ({missed.because})"
    if not complete:
        return None, "undecided", "; ".join(["cut short", *_seen(bounds, tried)])
    tries = sum(probe.purpose == "confirmation" for probe in probes)
    return None, "undecided", "; ".join([f"no fresh level bore one out in {tries} tries", *_seen(bounds, tried)])


_RESULTS: dict[Result, str] = {"pass": "passed", "fail": "failed", "undecided": "was undecided"}


def _seen(bounds: Bounds, tried: Sequence[Tried]) -> Iterator[str]:
    """``passed at 1, 2 and 4 users``, ``failed at 8 and 16 users``."""
    for result, word in (("pass", "passed"), ("fail", "failed"), ("undecided", "undecided")):
        if loads := [one.load for one in tried if one.result == result]:
            titles = [*(f"{load:g}" for load in loads[:-1]), words.load(loads[-1], bounds.unit)]
            yield f"{word} at {words.listed(titles)}"


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
    """``TTFT p95 is 1.2 s, the limit 1 s (260 requests)``, or why it is not told by its value."""
    if clause.because:
        return f"{words.clause_title(clause.clause)}: {clause.because}"
    return f"{words.clause(clause)} ({clause.n:,} requests)"
