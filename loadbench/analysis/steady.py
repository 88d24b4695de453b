"""Whether a series had settled, and whether it drifts. Pure: takes arrays in the order of time, gives numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loadbench.analysis.stats import Floats, floor_of

BATCH = 5
LEAST_BINS = 30  # six batches: of four it may cut off one, and most clear warm-ups look like no steady state
FIRST_BINS = 3
SURE_Z = 3.29  # two-sided 0.1 %: one false alarm in a thousand levels


def mser5(series: Floats) -> int | None:
    """How many leading values to leave out as warm-up; None where the series never settled.

    White, "An effective truncation heuristic for bias reduction in simulation output" (1997), on means of five: the
    truncation that minimises the standard error of what is left. A minimum at the limit, half the series, is none.
    """
    batches = series[: series.size // BATCH * BATCH].reshape(-1, BATCH).mean(axis=1)
    limit = batches.size // 2
    if limit == 0:
        return None
    errors = [float(batches[cut:].var()) / (batches.size - cut) for cut in range(limit + 1)]
    best = int(np.argmin(errors))
    return None if best == limit else best * BATCH


@dataclass(frozen=True, slots=True)
class Beginning:
    """How a series begins: ``cut`` leading values are warm-up, None: it never settled.

    ``first`` is the mean of its first values, ``rest`` that of what is kept, or of the second half of what never
    settled.
    """

    cut: int | None
    first: float
    rest: float


def beginning(series: Floats, least_share: float = 0.2) -> Beginning | None:
    """What MSER-5 would leave out, where that is a warm-up; None where the series begins as it goes on.

    By itself MSER-5 cuts 30 to 70 % of stationary series of this length: something always has the least error. A
    warm-up is there from the start and for a while, and it matters: the first three values lie outside everything
    that is kept, on one side, and a fifth away from its mean. Of stationary AR(1) series that finds one in at most 1 of
    100 where φ is 0.5, 5 where it is 0.8; a freeze in mid-series, which MSER-5 would cut out with all before it, stays.
    """
    if series.size < LEAST_BINS:
        return None
    cut = mser5(series)
    if cut == 0:
        return None
    first, kept = series[:FIRST_BINS], series[series.size // 2 if cut is None else cut :]
    apart = first.max() < kept.min() or first.min() > kept.max()
    matters = abs(first.mean() - kept.mean()) > least_share * kept.mean()
    return Beginning(cut, float(first.mean()), float(kept.mean())) if apart and matters else None


def per_second(values: Floats, seconds: Floats) -> tuple[Floats, Floats]:
    """The seconds in which there are values, and their means in each."""
    bins = seconds.astype(np.int64)
    counts = np.bincount(bins)
    filled = np.flatnonzero(counts)
    return filled.astype(np.float64), np.bincount(bins, values)[filled] / counts[filled]


@dataclass(frozen=True, slots=True)
class Drift:
    """Medians of the first and the last third of a series that do not look like one."""

    first: float
    last: float


def drift(series: Floats, least_share: float = 0.2) -> Drift | None:
    """The drift inside a level; None where the medians differ by less, or where chance could explain it.

    Mann–Whitney between the thirds, by its normal approximation, which holds from eight values a side; medians are firm
    from eleven.
    """
    third = series.size // 3
    if third < floor_of(0.5):
        return None
    first, last = series[:third], series[-third:]
    ranks = np.concatenate([first, last]).argsort().argsort() + 1.0
    excess = ranks[third:].sum() - third * (2 * third + 1) / 2
    z = excess / math.sqrt(third * third * (2 * third + 1) / 12)
    before, after = float(np.median(first)), float(np.median(last))
    changed = abs(after - before) > least_share * before
    return Drift(before, after) if changed and abs(z) > SURE_Z else None
