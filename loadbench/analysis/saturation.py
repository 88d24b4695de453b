"""Where a model saturates, how many it carries and how it takes several at once: from its plain levels of one loop.

What each level gave is in ``points``, the curve they make in ``curve``, the single answers in ``estimates``; here is
what they come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loadbench.analysis import estimates, usl
from loadbench.analysis.curve import Curve, falls_to, last_gain, saturated
from loadbench.analysis.findings import Capacity, Estimate
from loadbench.analysis.points import Seen, rejects_from, see, with_in_service
from loadbench.analysis.span import Span
from loadbench.analysis.summary import Level
from loadbench.analysis.words import listed, users

ONE, SEVERAL = 1.25, 1.3  # X_max / X(1) up to, and from: an engine on a desktop wobbles by 13 % from level to level
TWO = 1.6  # and what one at a time is surely below: a second one at full speed would double it
LEAST_LOADS = 3

Nature = Literal["serves_one_at_a_time", "shares_the_processor", "shares_in_turns", "batches", "scales"]


def capacities(spans: Sequence[Span], levels: Sequence[Level]) -> tuple[Capacity, ...]:
    """What each model carries, by loop; spans and levels are of the same levels in the same order.

    Levels whose load changes by plan, rungs of memory ladders and levels that were cut off say nothing; nor does a
    single load.
    """
    groups: dict[tuple[str, str], list[tuple[Span, Level]]] = {}
    for span, level in zip(spans, levels, strict=True):
        if level.complete and not (span.changes or span.is_rung):
            groups.setdefault((level.model, level.load.kind), []).append((span, level))
    found = []
    for (model, loop), pairs in groups.items():
        seen = sorted((see(*pair) for pair in pairs), key=lambda one: (one.point.load, one.point.level))
        if len({one.point.load for one in seen}) > 1:
            found.append((_closed if loop == "closed" else _open)(model, seen, [level for _, level in pairs]))
    return tuple(found)


def _closed(model: str, seen: Sequence[Seen], levels: Sequence[Level]) -> Capacity:
    seen = with_in_service(seen)
    points = tuple(one.point for one in seen)
    curve = Curve(tuple(point for point in points if point.firm))
    slo = estimates.slo("users", levels)
    indices = tuple(sorted(level.index for level in levels))
    if curve.loads < 2:
        of = len({point.load for point in points})
        why = [f"of {of} loads {curve.loads or 'none'} can be counted, and it takes 2", _doubts(seen, levels)]
        because = "; ".join(filter(None, why))
        return Capacity(model, "closed", None, None, None, None, None, because, indices, points, slo, None)
    full, fitted = saturated(curve), usl.fit(curve.points)
    in_service, peak = estimates.in_service(curve), estimates.usl_peak(curve, fitted)
    knee = estimates.knee(curve, full, [point.load for point in points if not point.firm])
    nature, up_to, because = _nature(curve, full, in_service, peak, knee)
    doubts = _doubts(seen, levels)
    return Capacity(
        model=model,
        loop="closed",
        nature=nature,
        up_to=up_to,
        saturated=None if nature == "scales" and up_to else full,  # others queue, and it may gain no more
        last_gain=last_gain(curve),
        falls_to=falls_to(curve),
        because=f"{because}; {doubts}" if doubts else because,
        levels=indices,
        points=points,
        estimates=(
            estimates.asymptotic(curve, full),
            knee,
            estimates.parallelism(curve),
            in_service,
            peak,
            *slo,
        ),
        usl=None if isinstance(fitted, str) else fitted,
        rejects_from=rejects_from(seen),
    )


def _open(model: str, seen: Sequence[Seen], levels: Sequence[Level]) -> Capacity:
    curve = Curve(tuple(one.point for one in seen if one.point.firm))
    roads = {level.road.result if level.road else "undecided" for level in levels}
    return Capacity(
        model=model,
        loop="open",
        nature=None,
        up_to=None,
        saturated=True if "over_capacity" in roads else False if roads == {"steady"} else None,
        last_gain=None,  # up to its capacity it gives what was asked for
        falls_to=falls_to(curve) if curve.loads > 1 else None,
        because="how it takes several at once is told from a closed loop",
        levels=tuple(sorted(level.index for level in levels)),
        points=tuple(one.point for one in seen),
        estimates=(estimates.sustained(levels), *estimates.slo("1/s", levels)),
        usl=None,
        rejects_from=rejects_from(seen),
    )


def _doubts(seen: Sequence[Seen], levels: Sequence[Level]) -> str:
    """What was left out and why, and where most failed."""
    failed = {level.index for level in levels if level.requests.ok < level.requests.attempted / 2}
    loads = [users(one.point.load) for one in seen if one.point.level in failed]
    left_out = [f"{users(one.point.load)} ({one.doubt})" for one in seen if one.doubt]
    told = [f"left out: {', '.join(left_out)}"] if left_out else []
    return "; ".join(told + ([f"more than half failed at {listed(loads)}"] if loads else []))


def _nature(
    curve: Curve, full: bool | None, in_service: Estimate, peak: Estimate, knee: Estimate
) -> tuple[Nature | None, int | None, str]:
    """How it takes several at once, up to how many, and what that stands on or why it is undecided.

    What it gains by several and how many are worked on have to agree.
    """
    if curve.loads < LEAST_LOADS:
        return None, None, f"{curve.loads} loads with enough requests; it takes {LEAST_LOADS}"
    several = estimates.parallelism(curve)
    if curve.alone is None or several.value is None or several.interval_95 is None:
        return None, None, several.because
    times, (low, high) = several.value, several.interval_95
    because = f"{estimates.most(curve)} is {times:.2g} × the {estimates.rate(curve.alone)} at 1 user"
    if full is None:
        return None, None, f"{because}; whether more users would add to it is not told from chance"
    if ONE < times < SEVERAL:
        return None, None, f"{because}: between one at a time and several"
    if low < ONE if times >= SEVERAL else high > TWO:
        return None, None, f"{because}; by chance it may be {low:.2g} to {high:.2g} ×: one at a time or several"
    if full is False:
        because += f", and the last step up to {users(curve.top.load)} added {last_gain(curve):.0%}"
    because += f"; worked on at once: {in_service.because}"
    told = round(in_service.value) if in_service.value and in_service.result == "firm" else None
    everyone = told is not None and told >= estimates.ALL_SHARE * curve.top.load
    if full is False:
        if in_service.value is None:  # not streamed: then as many times the throughput says that all are
            everyone = high >= curve.top.load
        elif told and curve.base and told > curve.base.load and low >= SEVERAL:
            return "scales", None if everyone else told, because
        return "scales" if everyone and low >= SEVERAL else None, None, because
    if times >= SEVERAL:
        return _batches(told, everyone, peak, knee, because)
    if told is None:
        return None, None, because
    if everyone:
        return "shares_the_processor", None, because
    return ("serves_one_at_a_time", None, because) if told <= 1 else ("shares_in_turns", told, because)


def _batches(
    told: int | None, everyone: bool, peak: Estimate, knee: Estimate, because: str
) -> tuple[Nature | None, int | None, str]:
    """Up to as many as are worked on at once; up to where throughput stops growing, where that is all of them, far more
    than it takes to get there, or not told.
    """
    if told is not None and told <= 1:
        return None, None, f"{because}: the throughput speaks of several, and this of one at a time"
    stops = knee.value if knee.result == "firm" else None
    if told is not None and not everyone and not (stops and told >= 2 * stops):
        return "batches", told, because
    ends = peak if peak.result == "firm" else knee
    if ends.value is None or ends.result != "firm":
        return None, None, f"{because}; {ends.because}"
    return "batches", round(ends.value), because
