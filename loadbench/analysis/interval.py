"""How far chance may have moved a mean or a percentile: 95 % intervals, and only where they hold.

Requests of one level resemble their neighbours, so what counts is how many independent ones they are worth. Pure:
takes values in the order of time; whether the level allows an interval at all is its caller's to say.
"""

from __future__ import annotations

import math

import numpy as np

from loadbench.analysis.stats import PERCENTILES, Floats, Intervals, Range

Z = 1.959964  # of a normal distribution, 95 % lie within this many deviations

LEAST_WORTH = 50
"""Independent requests that an interval takes: with fewer the estimate of their number decides. Simulated with this
bar, on AR(1) of φ 0 to 0.95 and queues of 8 and 64 users, at most 6 of 100 levels give an interval that misses."""

LEAST_QUEUED = 200
"""The same for a queue that requests enter unasked, where a level may by chance hold none of the long waits; there the
number is told from the load. M/M/1 at loads of 0.3 to 0.7: 91 to 97 of 100 intervals hold the truth, with half as many
requests 88 to 96."""

FIRST_LAGS = 64  # the sum of most series ends within a few, which cost a tenth of the transform for all of them

MOST_LOAD = 0.7  # MEASUREMENT.md, "How sure we are"


def wilson(share: float, n: int) -> Range:
    """The score interval of a share of ``n`` (Wilson 1927): none of zero width where it is of none or of all."""
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def effective_n(series: Floats) -> float:
    """How many independent values the series is worth for its mean: n / (1 + 2 Σ autocorrelation).

    The sum ends where a pair of neighbouring lags is no longer positive: Geyer's initial positive sequence (1992).
    """
    n = series.size
    around = series - series.mean()
    power = _product(around, 0)
    if n < 4 or power == 0.0:
        return float(n)
    pairs = 0.0
    for lag in range(0, min(FIRST_LAGS, n // 2 * 2), 2):
        pair = _product(around, lag) + _product(around, lag + 1)
        if pair <= 0:
            break
        pairs += pair
    else:
        pairs = _positive_pairs(around)
    return n / max(2 * pairs / power - 1, 1.0)  # the first pair holds lag 0, which counts once


def _product(around: Floats, lag: int) -> float:
    """With itself so much later. Not by BLAS, whose threads wait for one another on a busy machine."""
    return float(np.einsum("i,i->", around[: around.size - lag], around[lag:]))


def _positive_pairs(around: Floats) -> float:
    """The same sum over as many lags as it takes."""
    n = around.size
    # Zero-padded, or the end of the series would be correlated with its beginning; powers of two transform fastest.
    spectrum = np.fft.rfft(around, 1 << (2 * n - 1).bit_length())
    pairs = np.fft.irfft(spectrum * spectrum.conj())[: n // 2 * 2].reshape(-1, 2).sum(axis=1)
    ends = np.flatnonzero(pairs <= 0)
    return float(pairs[: int(ends[0]) if ends.size else pairs.size].sum())


def queue_needs(load: float) -> int:
    """The requests that an interval takes in open loop at this share of the capacity.

    Response times of M/M/1 stay correlated over about ((1 + ρ) / (1 - ρ))² requests, of less random queues over fewer.
    """
    return math.ceil(LEAST_QUEUED * ((1 + load) / (1 - load)) ** 2)


def intervals(values: Floats) -> Intervals | str:
    """The intervals of mean, median and 95th percentile of values in the order of time, or why there are none."""
    n = values.size
    worth = effective_n(values) if n >= LEAST_WORTH else 0.0
    if worth < LEAST_WORTH:
        are = f"{n:,} requests are worth {worth:.0f} independent ones" if worth else f"{n:,} requests"
        return f"{are}; an interval takes {LEAST_WORTH}"
    # Student's t by the first term of its expansion around the normal, good to 0.1 % from 50 on.
    t = Z + (Z**3 + Z) / (4 * (worth - 1))
    half, mean = t * float(values.std(ddof=1)) / math.sqrt(worth), float(values.mean())
    ordered = np.sort(values)
    return Intervals((mean - half, mean + half), _of(values, ordered, "p50"), _of(values, ordered, "p95"))


def _of(values: Floats, ordered: Floats, name: str) -> Range | None:
    """Between the values whose shares are as far from the percentile's as chance takes the share below it.

    Chance is that of a binomial with as many trials as the series "above it or not" is worth. None where too few lie
    beyond to bound it.
    """
    share, n = PERCENTILES[name], values.size
    worth = effective_n((values > np.quantile(values, share)).astype(np.float64))
    off = Z * math.sqrt(share * (1 - share) / worth)
    below, above = math.floor((share - off) * n), math.ceil((share + off) * n)
    return (float(ordered[below - 1]), float(ordered[above])) if below >= 1 and above < n else None
