"""The curve that the points of one loop make: its best, its knee, its last step, and whether it still grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadbench.analysis.findings import Point
from loadbench.analysis.stats import Range

GAIN_SHARE = 0.05  # per doubling of the load: less is none
GAIN_DOUBT = 0.10  # and surely no more than this; 15 s of a mix of prompts seldom tell 5 % from nothing
FALL_SHARE = 0.10
NEARLY_ALL, CLEARLY_LESS = 0.95, 0.85
STEP = 1.5  # loads closer together (a search closes in) are no step
Z, Z_ONE_SIDED = 1.96, 1.645  # 95 %


def per_s(point: Point) -> float:
    assert point.per_s is not None  # a firm point has it
    return point.per_s


def _range(point: Point) -> Range:
    assert point.per_s_interval_95 is not None
    return point.per_s_interval_95


def _error(point: Point) -> float:
    """The standard error of the throughput's logarithm."""
    return (_range(point)[1] / per_s(point) - 1) / Z  # the lower end is never below 0


@dataclass(frozen=True, slots=True)
class Curve:
    """The firm points of a closed loop by users, at least one; ``alone`` is that of one user."""

    points: tuple[Point, ...]

    @property
    def alone(self) -> Point | None:
        return next((point for point in self.points if point.load == 1), None)

    @property
    def best(self) -> Point:
        return max(self.points, key=per_s)

    @property
    def top(self) -> Point:
        return self.points[-1]

    @property
    def full(self) -> tuple[Point, ...]:
        """Those with nearly all the throughput of the best, as far as chance lets tell; the knee is the first."""

        def less(point: Point) -> bool:
            short = math.log(NEARLY_ALL * per_s(self.best) / per_s(point))
            return short > Z_ONE_SIDED * math.hypot(_error(point), _error(self.best))

        least = CLEARLY_LESS * per_s(self.best)
        return tuple(point for point in self.points if per_s(point) >= least and not less(point))

    @property
    def most_per_s(self) -> float:
        """X_max: the mean of those, since the best of several is by chance too good."""
        weights = [(_error(point) * per_s(point)) ** -2.0 for point in self.full]
        return float(np.average([per_s(point) for point in self.full], weights=weights))

    @property
    def surest(self) -> Point:
        """Of those the one that is known best: their mean is known no worse."""
        return min(self.full, key=_error)

    @property
    def base(self) -> Point | None:
        """Whence the last step was taken: the highest load clearly below the top."""
        return next((point for point in reversed(self.points) if point.load * STEP <= self.top.load), None)

    @property
    def loads(self) -> int:
        return len({point.load for point in self.points})


def _per_doubling(points: Sequence[Point], z: float) -> tuple[float, float, float] | None:
    """What a doubling of the load adds to the throughput, as a share: at least, by a line through logarithms, at most.

    Points further from the line than their intervals know widen it. None for one load.
    """
    if len({point.load for point in points}) < 2:
        return None
    x = np.log2([point.load for point in points])
    y = np.log([per_s(point) for point in points])
    weight = np.array([_error(point) for point in points]) ** -2.0
    x = x - np.average(x, weights=weight)
    power = float((weight * x * x).sum())
    slope = float((weight * x * y).sum()) / power
    off = y - np.average(y, weights=weight) - slope * x
    inflation = max(1.0, float((weight * off**2).sum()) / max(len(points) - 2, 1))
    half = z * math.sqrt(inflation / power)
    return (math.expm1(slope - half), math.expm1(slope), math.expm1(slope + half))


def saturated(curve: Curve) -> bool | None:
    """Whether another doubling would add next to nothing; None: chance decides.

    Throughput bends down if it bends, so that the last step gains no more than the last few together, which are told
    more surely. A throughput that was higher before is past its best. Another doubling adds where the top is above all
    before the last step: one that was too low by chance makes a gain out of nothing.
    """
    if _range(curve.top)[1] < _range(curve.best)[0]:
        return True
    for first in range(len(curve.points) - 1):
        gain = _per_doubling(curve.points[first:], Z_ONE_SIDED)
        if gain and gain[1] < GAIN_SHARE and gain[2] < GAIN_DOUBT:
            return True
    before = [point for point in curve.points if point.load * STEP <= curve.top.load]
    last = _per_doubling([max(before, key=per_s), curve.top], Z_ONE_SIDED) if before else None
    return False if last and last[0] > GAIN_SHARE else None


def last_gain(curve: Curve) -> float | None:
    return per_s(curve.top) / per_s(curve.base) - 1 if curve.base else None


def falls_to(curve: Curve) -> float | None:
    share = per_s(curve.top) / per_s(curve.best)
    return share if share < 1 - FALL_SHARE and _range(curve.top)[1] < _range(curve.best)[0] else None


def times(value: float, *points: Point) -> Range:
    """The interval of a product or quotient of these points' throughputs."""
    half = Z * math.sqrt(sum(_error(point) ** 2 for point in points))
    return (value * math.exp(-half), value * math.exp(half))
