"""Whether a series had settled, drifts, or repeats itself. Pure: takes arrays in the order of time, gives numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loadbench.analysis.stats import Floats, floor_of

BATCH = 5
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


def effective_n(series: Floats) -> float:
    """How many independent values the series is worth for its mean: n / (1 + 2 Σ autocorrelation).

    The sum ends where a pair of neighbouring lags is no longer positive: Geyer's initial positive sequence (1992).
    """
    n = series.size
    around = series - series.mean()
    power = float(np.dot(around, around))
    if n < 4 or power == 0.0:
        return float(n)
    # Zero-padded, or the end of the series would be correlated with its beginning.
    spectrum = np.fft.rfft(around, 2 * n)
    correlation = np.fft.irfft(spectrum * spectrum.conj())[: n // 2 * 2].reshape(-1, 2) / power
    pairs = correlation.sum(axis=1)
    ends = np.flatnonzero(pairs <= 0)
    kept = float(pairs[: int(ends[0]) if ends.size else pairs.size].sum())
    return n / max(2 * kept - 1, 1.0)  # the first pair holds lag 0, which counts once


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
