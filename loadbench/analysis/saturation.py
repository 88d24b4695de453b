"""Where a model saturates, how many it carries and how it takes several at once: from its plain levels of one loop.

What each level gave is in ``points``, the curve they make in ``curve``, the single answers in ``estimates``; here is
what they come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loadbench.analysis import estimates, usl
from loadbench.analysis.curve import Curve, falls_to, last_gain, per_s, saturated
from loadbench.analysis.findings import Capacity, Estimate
from loadbench.analysis.points import Seen, see, with_in_service
from loadbench.analysis.span import Span
from loadbench.analysis.summary import Level
from loadbench.analysis.words import listed, users

ONE, SEVERAL = 1.25, 1.3  # X_max / X(1) up to, and from: an engine on a desktop wobbles by 13 % from level to level
LEAST_LOADS = 3

Nature = Literal["serves_one_at_a_time", "shares_the_processor", "shares_in_turns", "batches", "scales"]


def capacities(spans: Sequence[Span], levels: Sequence[Level]) -> tuple[Capacity, ...]:
    """What each model carries, by loop; spans and levels are of the same levels in the same order.

    Levels whose load changes by plan, and those that were cut off, say nothing; nor does a single load.
    """
    groups: dict[tuple[str, str], list[tuple[Span, Level]]] = {}
    for span, level in zip(spans, levels, strict=True):
        if level.complete and not span.changes:
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
        why = _doubts(seen, levels) or "too few levels with enough requests"
        return Capacity(model, "closed", None, None, None, None, None, why, indices, points, slo, None)
    full, fitted = saturated(curve), usl.fit(curve.points)
    in_service, peak = estimates.in_service(curve), estimates.usl_peak(curve, fitted)
    nature, up_to, because = _nature(curve, full, in_service, peak)
    doubts = _doubts(seen, levels)
    return Capacity(
        model=model,
        loop="closed",
        nature=nature,
        up_to=up_to,
        saturated=full,
        last_gain=last_gain(curve),
        falls_to=falls_to(curve),
        because=f"{because}; {doubts}" if doubts else because,
        levels=indices,
        points=points,
        estimates=(
            estimates.asymptotic(curve, full),
            estimates.knee(curve, full),
            estimates.parallelism(curve),
            in_service,
            peak,
            *slo,
        ),
        usl=None if isinstance(fitted, str) else fitted,
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
        last_gain=last_gain(curve) if curve.loads > 1 else None,
        falls_to=falls_to(curve) if curve.loads > 1 else None,
        because="how it takes several at once is told from a closed loop",
        levels=tuple(sorted(level.index for level in levels)),
        points=tuple(one.point for one in seen),
        estimates=(estimates.sustained(levels), *estimates.slo("1/s", levels)),
        usl=None,
    )


def _doubts(seen: Sequence[Seen], levels: Sequence[Level]) -> str:
    """What was left out and why, and where most failed."""
    failed = {level.index for level in levels if level.requests.ok < level.requests.attempted / 2}
    loads = [users(one.point.load) for one in seen if one.point.level in failed]
    left_out = [f"{users(one.point.load)} ({one.doubt})" for one in seen if one.doubt]
    told = [f"left out: {', '.join(left_out)}"] if left_out else []
    return "; ".join(told + ([f"more than half failed at {listed(loads)}"] if loads else []))


def _nature(
    curve: Curve, full: bool | None, in_service: Estimate, peak: Estimate
) -> tuple[Nature | None, int | None, str]:
    """How it takes several at once, up to how many, and what that stands on or why it is undecided.

    It batches up to as many as are worked on at once; where that is all, or is not told, up to where throughput stops
    growing.
    """
    if curve.loads < LEAST_LOADS:
        return None, None, f"{curve.loads} loads with enough requests; it takes {LEAST_LOADS}"
    if curve.alone is None:
        return None, None, estimates.NOT_ALONE
    times = curve.most_per_s / per_s(curve.alone)
    because = f"{estimates.most(curve)} is {times:.2g} × the {estimates.rate(curve.alone)} at 1 user"
    if full is False:
        step = f"the last step up to {users(curve.top.load)} added {last_gain(curve):.0%}"
        return "scales", None, f"{because}, and {step}"
    if full is None:
        return None, None, f"{because}; whether more users would add to it is not told from chance"
    if ONE < times < SEVERAL:
        return None, None, f"{because}: between one at a time and several"
    because += f"; worked on at once: {in_service.because}"
    told = in_service.value if in_service.result == "firm" else None
    everyone = told is not None and told >= estimates.ALL_SHARE * curve.top.load
    if times >= SEVERAL:
        stops_at = peak.value if peak.value and peak.result == "firm" else curve.full[0].load
        return "batches", round(stops_at if told is None or everyone else told), because
    if told is None:
        return None, None, because
    if everyone:
        return "shares_the_processor", None, because
    return ("serves_one_at_a_time", None, because) if round(told) <= 1 else ("shares_in_turns", round(told), because)
