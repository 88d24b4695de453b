"""What may be said of a set of numbers: percentiles with how sure we are of them. Knows no requests and no files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from loadbench.hdr import Hdr

Floats = npt.NDArray[np.float64]

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}

TELLS = 3.0  # ÷ a share: of so many requests none fails by chance in 5 of 100, and so they tell it (Hanley 1983)
NS_PER_MS = 1e6


def floor_of(share: float, confidence: float = 0.99) -> int:
    """The fewest samples on which the ``share`` quantile is firm.

    Enough that, with this confidence, at least two of them lie beyond the true quantile, so that the estimate is not
    the extreme and has a sample above it to bound it. The number beyond is binomial (n, 1 - share): the smallest n with
    share**n + n (1 - share) share**(n - 1) <= 1 - confidence. (David & Nagaraja, Order Statistics, section 7.1.)
    """
    n = 2
    while not is_firm(share, n, confidence):
        n += 1
    return n


def is_firm(share: float, n: int, confidence: float = 0.99) -> bool:
    """Whether the ``share`` quantile of so many samples is firm, as `floor_of` has it."""
    return share**n + n * (1 - share) * share ** (n - 1) <= 1 - confidence


def least_of(share: float) -> int:
    """The fewest samples on which the quantile is not the maximum by another name: 1 / (1 - share)."""
    return math.ceil(round(1 / (1 - share), 9))


FLOORS = {name: floor_of(share) for name, share in PERCENTILES.items()}
LEASTS = {name: least_of(share) for name, share in PERCENTILES.items()}


Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Intervals:
    """95 % confidence intervals; that of p95 is None where too few values lie above it."""

    mean: Range
    p50: Range | None
    p95: Range | None


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles of the successful requests, by nearest rank. ``n`` 0 leaves all but ``p99_all`` None.

    ``indicative`` names the percentiles that stand on fewer samples than ``FLOORS`` asks for; one that is None stands
    on too few to be told from the maximum. ``p99_all`` counts failed requests as infinite: ``"inf"`` where more than
    1 % failed. ``interval_95`` is given only where it holds; else ``not_estimable`` says why not.
    """

    n: int
    mean: float | None = None
    min: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    p99_9: float | None = None
    max: float | None = None
    p99_all: float | Literal["inf"] | None = None
    indicative: tuple[str, ...] = ()
    interval_95: Intervals | None = None
    not_estimable: str | None = None

    def value(self, name: str) -> float | None:
        """The percentile, mean or extreme of this name."""
        value: float | None = getattr(self, name)
        return value

    def firm(self, name: str) -> float | None:
        """The percentile of this name where it is firm, else None."""
        return None if name in self.indicative else self.value(name)


def nearest_rank(share: float, n: int) -> int:
    """The 1-based rank of the smallest of ``n`` sorted values that at least ``share`` of them do not exceed."""
    return max(1, math.ceil(round(share * n, 9)))  # rounded: 0.07 * 100 is 7.000000000000001


def _told(n: int) -> dict[str, float]:
    """The percentiles that ``n`` samples can tell at all."""
    return {name: share for name, share in PERCENTILES.items() if n >= LEASTS[name]}


def describe(values_ns: Floats, failed: int | None = None) -> Distribution:
    """The distribution in milliseconds of values in nanoseconds; NaN is absent and does not count.

    ``failed`` requests, where they have a meaning for these values, make ``p99_all``.
    """
    ordered = np.sort(values_ns[~np.isnan(values_ns)]) / NS_PER_MS
    n = ordered.size
    p99_all: float | Literal["inf"] | None = None
    indicative = [name for name in _told(n) if n < FLOORS[name]]
    if failed is not None and n + failed >= LEASTS["p99"]:
        rank = nearest_rank(PERCENTILES["p99"], n + failed)
        p99_all = float(ordered[rank - 1]) if rank <= n else "inf"
        if n + failed < FLOORS["p99"]:
            indicative.append("p99_all")
    if not n:
        return Distribution(0, p99_all=p99_all, indicative=tuple(indicative))
    percentiles: dict[str, Any] = {name: float(ordered[nearest_rank(share, n) - 1]) for name, share in _told(n).items()}
    return Distribution(
        n=n,
        mean=float(ordered.mean()),
        min=float(ordered[0]),
        max=float(ordered[-1]),
        p99_all=p99_all,
        indicative=tuple(indicative),
        **percentiles,
    )


def describe_hdr(hdr: Hdr) -> Distribution:
    """The same of a histogram, to its three digits."""
    if hdr.min_ns is None or hdr.max_ns is None or hdr.mean_ns is None:
        return Distribution(0)
    told = _told(hdr.total)
    values_ns = {name: hdr.percentile(100 * share) for name, share in told.items()}
    percentiles: dict[str, Any] = {name: ns / NS_PER_MS for name, ns in values_ns.items() if ns is not None}
    return Distribution(
        n=hdr.total,
        mean=hdr.mean_ns / NS_PER_MS,
        min=hdr.min_ns / NS_PER_MS,
        max=hdr.max_ns / NS_PER_MS,
        indicative=tuple(name for name in told if hdr.total < FLOORS[name]),
        **percentiles,
    )
