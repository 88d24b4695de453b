"""Fits a curve to throughput against users: a line and a ceiling, or the Universal Scalability Law where it shows.

Gunther, Guerrilla Capacity Planning (2007): X(N) = λN / (1 + σ(N - 1) + κN(N - 1)).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loadbench.analysis.findings import Point, Usl
from loadbench.analysis.stats import Floats, Range

LEAST_POINTS = 5
MATTERS = 0.05  # what a term has to cost at the highest load to be worth a word


def law(users: Floats, alone: float, contention: float, coherency: float) -> Floats:
    """Requests per second at so many users."""
    costs: Floats = alone * users / (1 + contention * (users - 1) + coherency * users * (users - 1))
    return costs


def fit(points: Sequence[Point]) -> Usl | str:
    """The law, by least squares weighted with what is known of each point; or why it is not told."""
    from scipy.optimize import curve_fit
    from scipy.special import stdtrit

    told = [(p.load, p.per_s, p.per_s_interval_95) for p in points if p.per_s and p.per_s_interval_95]
    if len({load for load, _, _ in told}) < LEAST_POINTS:
        return f"{len({load for load, _, _ in told})} loads can be counted; the law takes {LEAST_POINTS}"
    users, per_s = np.array([row[0] for row in told]), np.array([row[1] for row in told])
    error = np.array([(high - low) / 2 / 1.96 for _, _, (low, high) in told])
    start = (float((per_s / users).max()), 0.01, 0.0001)
    try:
        best, covariance = curve_fit(
            law, users, per_s, start, error, absolute_sigma=True, bounds=(0, np.inf), x_scale="jac"
        )
    except RuntimeError:  # the one that scipy raises when it finds no minimum
        return "no curve of the law fits"
    misfit = float((((law(users, *best) - per_s) / error) ** 2).sum())
    freedom = users.size - 3
    inflation = max(1.0, misfit / freedom)  # points lie further apart than their intervals know
    half = float(stdtrit(freedom, 0.975)) * np.sqrt(np.diag(covariance) * inflation)
    contention, coherency = (_around(float(best[i]), float(half[i])) for i in (1, 2))
    top = float(users.max())
    if max(contention[0] * (top - 1), coherency[0] * top * (top - 1)) < MATTERS:
        return "neither contention nor coherency can be told from none"
    ceiling = _ceiling_misfit(users, per_s, error)
    if _aicc(misfit / inflation, 3, users.size) >= _aicc(ceiling / inflation, 2, users.size):
        return "a line and a ceiling tell the levels as well"
    return Usl(
        float(best[0]), float(best[1]), contention, float(best[2]), coherency, tuple(point.level for point in points)
    )


def peak(law: Usl) -> float | None:
    """The number of users at which the law is highest, None where it never falls or the fall cannot be told."""
    if law.coherency_interval_95[0] <= 0 or law.contention >= 1:
        return None
    return float(((1 - law.contention) / law.coherency) ** 0.5)


def _around(value: float, half: float) -> Range:
    return (max(value - half, 0.0), value + half)


def _ceiling_misfit(users: Floats, per_s: Floats, error: Floats) -> float:
    """How badly min(λN, X_max) does at its best: its kink lies somewhere, and on either side the fit is exact."""
    weight, misfits = error**-2.0, []
    for kink in range(1, users.size + 1):
        below, above = slice(0, kink), slice(kink, None)
        slope = (weight * users * per_s)[below].sum() / (weight * users**2)[below].sum()
        top = (weight * per_s)[above].sum() / weight[above].sum() if kink < users.size else np.inf
        misfits.append(float((((np.minimum(slope * users, top) - per_s) / error) ** 2).sum()))
    return min(misfits)


def _aicc(misfit: float, parameters: int, points: int) -> float:
    """Akaike's criterion for few points (Burnham & Anderson 2002, 2.4), of a misfit in units of the known variance."""
    return misfit + 2 * parameters * points / (points - parameters - 1)
