"""How many users or requests a second a model carries: one function for each answer there is to that.

Each says what it stands on, or why it is undecided; they may disagree, and are told side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from loadbench.analysis import usl, words
from loadbench.analysis.curve import NEARLY_ALL, Curve, per_s, times
from loadbench.analysis.findings import Estimate, Point, Result, Usl
from loadbench.analysis.road import is_over
from loadbench.analysis.slo import slo_of
from loadbench.analysis.stats import Range
from loadbench.analysis.summary import Level

WIDEST = 0.25  # of an estimate: how far its 95 % may reach
ALL_SHARE = 0.78  # of the users: sharing all is seen as 80 % and more, 6 slots under 8 users are 75 %
NEARLY_ALL_SHARE = 0.9
# What a doubling of the users adds to those in service, as a share.
STAYS = 0.2  # below it: where the others queue it adds none, where all share all
SLOWS = 0.65  # at most, where slots run out on the way: 6 slots from 4 to 8 users add half
DOUBLES = 0.8  # at least, where all are in service: they grow nearly as the users do

Firm = Literal["firm", "undecided"]
Unit = Literal["users", "1/s"]

NOT_ALONE = "no level at 1 user with enough requests: what it does without company is not known"
GROWS_YET = "; whether more users would add to it is not told"


def most(curve: Curve) -> str:
    """X_max in words, with where it was reached."""
    loads = [f"{load:g}" for load in dict.fromkeys(point.load for point in curve.full)]
    return f"{words.number(curve.most_per_s)}/s at {words.listed(loads)} user{'' if loads == ['1'] else 's'}"


def rate(point: Point) -> str:
    return f"{words.number(per_s(point))}/s"


def _indices(*points: Point) -> tuple[int, ...]:
    return tuple(sorted({point.level for point in points}))


def asymptotic(curve: Curve, saturated: bool | None) -> Estimate:
    """N* = X_max · R_min: as many users as fit side by side into the best throughput (Denning & Buzen 1978)."""
    alone = curve.alone
    if alone is None or alone.e2e_mean_ms is None:
        return Estimate("asymptotic", None, "users", "undecided", NOT_ALONE, _indices(*curve.full))
    value = curve.most_per_s * alone.e2e_mean_ms / 1e3
    because = f"{most(curve)} × {words.number(alone.e2e_mean_ms)} ms alone" + ("" if saturated else GROWS_YET)
    levels = _indices(alone, *curve.full)
    interval = times(value, alone, curve.surest)
    result, because = _if_narrow(interval, value, because) if saturated else ("undecided", because)
    return Estimate("asymptotic", value, "users", result, because, levels, interval)


def _if_narrow(interval: Range, value: float, because: str) -> tuple[Firm, str]:
    """Firm, where the interval lies close enough around the value to plan by it."""
    if interval[1] <= (1 + WIDEST) * value:
        return "firm", because
    return "undecided", f"{because}: {interval[0]:.3g} to {interval[1]:.3g} by chance, which is too wide"


def knee(curve: Curve, saturated: bool | None, left_out: Sequence[float] = ()) -> Estimate:
    """The smallest load with nearly all the throughput; not told where a load that was ``left_out`` may have it too."""
    knee, best = curve.full[0], curve.best
    below = max((point.load for point in curve.points if point.load < knee.load), default=0.0)
    unseen = sorted({load for load in left_out if below < load < knee.load})
    share = per_s(knee) / per_s(best)
    at, best_at = words.users(knee.load), words.users(best.load)
    because = f"{rate(knee)} at {at} is {share:.0%} of the best, {rate(best)} at {best_at}"
    because += "" if share >= NEARLY_ALL else ", which chance explains"
    because += "" if saturated else GROWS_YET
    if unseen:
        loads = words.listed([*(f"{load:g}" for load in unseen[:-1]), words.users(unseen[-1])])
        because += f"; at {loads}, left out, it may be as high"
    result: Firm = "firm" if saturated and not unseen else "undecided"
    return Estimate("knee", knee.load, "users", result, because, _indices(knee, best))


def parallelism(curve: Curve) -> Estimate:
    alone = curve.alone
    if alone is None:
        return Estimate("parallelism", None, "×", "undecided", NOT_ALONE, _indices(*curve.full))
    value = curve.most_per_s / per_s(alone)
    because = f"{most(curve)} against {rate(alone)} at 1 user"
    interval = times(value, alone, curve.surest)
    result, because = _if_narrow(interval, value, because)
    return Estimate("parallelism", value, "×", result, because, _indices(alone, *curve.full), interval)


def in_service(curve: Curve) -> Estimate:
    """How many are worked on at once, where more users no longer add to them or where it is all of them."""
    told = [point for point in curve.points if point.in_service is not None]
    if not told:
        why = "without a stream, waiting cannot be told from being served"
        return Estimate("in_service", None, "requests", "undecided", why, tuple(p.level for p in curve.points))
    top, base = told[-1], Curve(tuple(told)).base
    served = _served(top)
    if base is None:
        return Estimate("in_service", served, "requests", "undecided", "one load alone tells it", (top.level,))
    growth = (served / _served(base)) ** (1 / math.log2(top.load / base.load)) - 1
    flat = [point for point in told if point.load >= base.load]
    because = f"{_served(base):.1f} at {words.users(base.load)}, {served:.1f} at {words.users(top.load)}"
    levels = tuple(point.level for point in flat)
    if growth < STAYS:
        return Estimate("in_service", float(np.mean([*map(_served, flat)])), "requests", "firm", because, levels)
    share = served / top.load
    if share >= NEARLY_ALL_SHARE or (share >= ALL_SHARE and growth >= DOUBLES):
        return Estimate("in_service", served, "requests", "firm", f"{because}: all of them", levels)
    if share < ALL_SHARE and growth <= SLOWS:
        return Estimate("in_service", served, "requests", "firm", f"{because}: the others queue", levels)
    return Estimate("in_service", served, "requests", "undecided", f"{because}: neither all nor as many", levels)


def _served(point: Point) -> float:
    assert point.in_service is not None
    return point.in_service


def usl_peak(curve: Curve, fitted: Usl | str) -> Estimate:
    """The load beyond which the law falls."""
    levels = tuple(point.level for point in curve.points)
    if isinstance(fitted, str):
        return Estimate("usl_peak", None, "users", "undecided", fitted, levels)
    peak = usl.peak(fitted)
    if peak is None:
        return Estimate("usl_peak", None, "users", "undecided", "coherency cannot be told from none", levels)
    because = f"√((1 − σ) / κ) with σ {fitted.contention:.3g} and κ {fitted.coherency:.3g}"
    if peak > curve.top.load:
        return Estimate("usl_peak", peak, "users", "undecided", f"{because}, beyond the loads measured", levels)
    return Estimate("usl_peak", peak, "users", "firm", because, levels)


def slo(unit: Unit, levels: Sequence[Level]) -> tuple[Estimate, ...]:
    """The largest load that keeps the SLO, where there is one."""
    judged = [(level, result, _broken(level)) for level in levels if (result := slo_of(level))]
    return (_largest("slo", unit, judged, "kept it", "did not"),) if judged else ()


def sustained(levels: Sequence[Level]) -> Estimate:
    """The largest rate that stayed on the road."""
    results: dict[str, Result] = {"steady": "pass", "over_capacity": "fail", "undecided": "undecided"}
    judged = [(level, results[level.road.result], level.road.because) for level in levels if level.road]
    return _largest("sustained", "1/s", judged, "stayed steady", "was over capacity")


def _broken(level: Level) -> str:
    """The clauses that a level breaks, else those that it leaves undecided."""
    broken = [
        f"{words.clause_title(clause.clause)}, {clause.because}"
        if is_over(level.road) and clause.because
        else words.clause(clause)
        for clause in level.slo
        if clause.result == "fail"
    ]
    return "; ".join(
        broken or [f"{words.clause_title(clause.clause)}: {clause.because}" for clause in level.slo if clause.because]
    )


def _largest(
    name: Literal["slo", "sustained"],
    unit: Unit,
    judged: Sequence[tuple[Level, Result, str]],
    kept: str,
    broke: str,
) -> Estimate:
    """The largest load that passed below the smallest that failed; firm where nothing undecided lies between them."""
    loads = sorted((words.load_of(level), level.index, result, why) for level, result, why in judged)
    fail = next((row for row in loads if row[2] == "fail"), None)
    below = [row for row in loads if fail is None or row[0] < fail[0]]
    passed = next((row for row in reversed(below) if row[2] == "pass"), None)
    between = [row for row in below if row[2] == "undecided" and (passed is None or row[0] > passed[0])]
    told = [f"{words.load(passed[0], unit) if passed else 'no load'} {kept}"]
    told += [f"{words.load(row[0], unit)} is undecided ({row[3]})" for row in between[:1]]
    if fail:
        told.append(f"{words.load(fail[0], unit)} {broke} ({fail[3]})")
    elif passed and not between:
        told.append("no larger load was measured")
    return Estimate(
        name=name,
        value=passed[0] if passed else None,
        unit=unit,
        result="firm" if passed and fail and not between else "undecided",
        because="; ".join(told),
        levels=tuple(row[1] for row in (passed, *between, fail) if row),
    )
