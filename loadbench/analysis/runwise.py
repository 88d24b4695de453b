"""Two sets of runs with a number each: how far apart they are, how sure that is, and whether it is more than chance.

The run is the unit: requests of one run wait for one another, and tests that take them for independent cry wolf on
three of four identical pairs. What the numbers are is somebody else's business; here they are to be subtracted. An
infinite one lies beyond all that are not, by nobody knows how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

from loadbench.analysis.stats import Floats

CONFIDENCE = 0.95
ALARM = 0.01
"""How often a comparison of identical runs may call any figure worse. With five runs a side there are 252 ways to deal
them out, so that one in 100 leaves room for the two furthest."""

MOST_DEALS = 20_000  # 8 against 8 are 12,870; of more so many are drawn
SPREAD_FLOOR = 1e-9  # relative to the largest value: less is rounding


@dataclass(frozen=True, slots=True)
class Shift:
    """By how much the second set lies higher. ``low`` and ``high`` are None where too few runs allow no interval."""

    value: float
    low: float | None
    high: float | None


def shift(base: Floats, new: Floats) -> Shift:
    """The median of all differences (Hodges & Lehmann 1963) with the interval that the exact Mann–Whitney test leaves.

    The interval holds the true shift in at least 95 of 100 cases, whatever the distribution, as long as both sets have
    the same one but for the shift; ties make it wider. (Hollander & Wolfe, Nonparametric Statistical Methods, 4.2-4.3.)
    Two infinite values differ by anything: the interval takes them for the worst on either side.
    """
    with np.errstate(invalid="ignore"):
        differences = np.subtract.outer(new, base).ravel()
    unknown = np.isnan(differences)
    lows, highs = (np.sort(np.where(unknown, end, differences)) for end in (-np.inf, np.inf))
    middle = np.sort(np.where(unknown, 0.0, differences))[(differences.size - 1) // 2 : differences.size // 2 + 1]
    low, high = float(middle[0]), float(middle[-1])
    value = low if low == high else 0.0 if math.isinf(low) and math.isinf(high) else (low + high) / 2
    rank = interval_rank(base.size, new.size)
    if rank is None:
        return Shift(value, None, None)
    return Shift(value, float(lows[rank - 1]), float(highs[-rank]))


@cache
def interval_rank(base: int, new: int, confidence: float = CONFIDENCE) -> int | None:
    """Which of the sorted differences, counted from either end, bounds the interval; None: there is none so sure.

    The greatest k with 2 P(U < k) <= 1 - confidence. 5 against 5: the 3rd of 25, which is sure to 96.8 %.
    """
    counts = mann_whitney_counts(base, new)
    room, below = (1 - confidence) / 2 * math.comb(base + new, new), 0
    for rank, count in enumerate(counts):
        below += count
        if below > room:
            return rank or None
    return None


@cache
def mann_whitney_counts(base: int, new: int) -> tuple[int, ...]:
    """In how many of the orders of ``base`` + ``new`` different values U is 0, 1, 2, …

    The coefficients of the Gaussian binomial: the product over i of (1 - q^(new+i)) / (1 - q^i). (Mann & Whitney 1947;
    Andrews, The Theory of Partitions, 3.2.)
    """
    size = base * new + 1
    counts = [1] + [0] * (size - 1)
    for i in range(1, base + 1):
        for u in range(size - 1, new + i - 1, -1):
            counts[u] -= counts[u - new - i]
        for u in range(i, size):
            counts[u] += counts[u - i]
    return tuple(counts)


def chances(base: Floats, new: Floats) -> Floats:
    """For each column, how likely it is that any of them rises so clearly where the runs do not differ.

    A row is a run, a column a figure that is larger where it is worse; NaN where a run has none. The runs are dealt out
    anew in every way there is, whole rows, and the largest t of all columns is noted each time: this keeps the chance
    of a false alarm over all figures together, with all that they have to do with one another, and costs less than
    Bonferroni's share. (Westfall & Young 1993, single-step maxT. With t, not ranks: with a dozen figures some one has
    the greatest rank sum there is by chance, and five runs a side would never be enough.)
    """
    values = _bounded(np.vstack([base, new]))
    known = ~np.isnan(values)
    largest = np.max(np.abs(values), axis=0, where=known, initial=0.0)
    centred = np.where(known, values - _mean(values, known), 0.0)
    deals = _deals(len(base), len(new))
    taken = deals.astype(np.float64)
    t = _t(taken, centred, known.astype(np.float64), SPREAD_FLOOR * np.maximum(largest, SPREAD_FLOOR))
    most = t.max(axis=1)
    seen = t[0]  # the first deal is the one that was played
    # Rounding must not tell a deal from itself.
    chance = np.mean(most[:, None] >= seen - 1e-9 * np.abs(np.where(np.isfinite(seen), seen, 0.0)), axis=0)
    return np.where(np.isneginf(seen), 1.0, chance)


def _bounded(values: Floats) -> Floats:
    """Infinite values where a t can be had of them: some typical steps beyond the last that is not infinite.

    The step is made from all runs together, whichever set they are of, so that the chance stays what it is.
    """
    found = values.copy()
    for place in np.flatnonzero(np.isinf(values).any(axis=0)):
        column = values[:, place]
        finite = np.sort(column[np.isfinite(column)])
        step = STEPS_BEYOND * float(np.median(np.diff(finite))) if finite.size > 1 else 0.0
        low, high = (finite[0], finite[-1]) if finite.size else (0.0, 0.0)
        found[:, place] = np.clip(column, low - max(step, LEAST_BEYOND), high + max(step, LEAST_BEYOND))
    return found


STEPS_BEYOND = 10
LEAST_BEYOND = 0.05  # of a logarithm: a least effect


def _mean(values: Floats, known: npt.NDArray[np.bool_]) -> Floats:
    counts = np.maximum(known.sum(axis=0), 1)
    mean: Floats = np.where(known, values, 0.0).sum(axis=0) / counts
    return mean


def _deals(base: int, new: int) -> npt.NDArray[np.bool_]:
    """Which runs are the new ones, in every way; the first row is as it was. Of too many ways a seeded choice."""
    runs = base + new
    as_it_was = np.arange(runs) >= base
    if math.comb(runs, new) > MOST_DEALS:
        chance = np.random.default_rng(0)
        drawn = chance.permuted(np.tile(as_it_was, (MOST_DEALS, 1)), axis=1)
        return np.vstack([as_it_was, drawn])
    chosen = np.array(list(combinations(range(runs - 1, -1, -1), new)))
    deals = np.zeros((len(chosen), runs), dtype=bool)
    np.put_along_axis(deals, chosen, True, axis=1)
    return deals


def _t(taken: Floats, values: Floats, known: Floats, floor: Floats) -> Floats:
    """Student's t of every column under every deal, -inf where a side has fewer than two values or nothing differs."""
    n_new, n_base = taken @ known, (1 - taken) @ known
    with np.errstate(divide="ignore", invalid="ignore"):
        new, base = taken @ values / n_new, (1 - taken) @ values / n_base
        squares = np.sum(values**2, axis=0) - n_new * new**2 - n_base * base**2
        spread = np.sqrt(np.maximum(squares, 0.0) / (n_new + n_base - 2) * (1 / n_new + 1 / n_base))
        apart = np.where(np.abs(new - base) > floor, new - base, 0.0)
        t = apart / np.where(spread > floor, spread, 0.0)
    t[np.isnan(t) | (n_new < 2) | (n_base < 2)] = -np.inf
    return t


def runs_needed(base: Floats, new: Floats, distance: float) -> int | None:
    """About how many runs a side would tell a difference of this size; None: more than anybody will make.

    For two normal samples a 95 % interval reaches 1.96 s √(2/n) to either side; the Mann–Whitney one needs π/3 times as
    many values (Lehmann, Nonparametrics, 2.4). ``s`` is pooled.
    """
    if min(base.size, new.size) < 2 or not np.isfinite([*base, *new]).all():
        return None
    squares = float(np.sum((base - base.mean()) ** 2) + np.sum((new - new.mean()) ** 2))
    variance = squares / (base.size + new.size - 2)
    if distance <= 0:
        return None
    needed = math.pi / 3 * 2 * 1.96**2 * variance / distance**2
    return math.ceil(needed) if needed <= MOST_RUNS else None


MOST_RUNS = 100
