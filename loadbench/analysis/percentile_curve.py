"""Latency by percentile as HdrHistogram draws it: x = 1 / (1 − p), so that every nine takes as much room as the last.

The values are of an HDR histogram of the requests that count, those that a level's percentiles stand on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from loadbench.analysis.measured import Measured
from loadbench.analysis.metrics import Series
from loadbench.analysis.road import told_spans
from loadbench.analysis.rundir import RunData
from loadbench.analysis.stats import NS_PER_MS, PERCENTILES, is_firm
from loadbench.analysis.summary import Summary
from loadbench.hdr import Hdr

METRICS = ("ttft", "e2e")
PER_DECADE = 12  # steps of 1 / (1 − p): a curve of a thousand requests has 37


@dataclass(frozen=True, slots=True)
class Step:
    """``share`` of the values are at most ``ms``; ``x`` is 1 / (1 − share), of the largest value how many there are.

    ``firm``: there are enough values for it; ``named``: it is p50, p90 and so on, or the largest value.
    """

    x: float
    share: float
    ms: float
    firm: bool
    named: bool


@dataclass(frozen=True, slots=True)
class PercentileCurve:
    """One series of one metric on one level, of ``n`` values, up to the largest of them."""

    level: int
    metric: str
    series: Series
    n: int
    steps: tuple[Step, ...]


def percentile_curves(run: RunData, summary: Summary) -> Iterator[PercentileCurve]:
    """TTFT and E2E, service and response, of every level in which requests succeeded."""
    for level, span in told_spans(run, summary.levels):
        if span.is_rung:
            continue
        for metric, series, values_ns in Measured.of(span.counted).values():
            if metric.name in METRICS and values_ns is not None:
                hdr = Hdr()
                hdr.add(values_ns[~np.isnan(values_ns)].astype(np.int64))
                if hdr.total > 1:
                    yield PercentileCurve(level.index, metric.name, series, hdr.total, tuple(_steps(hdr)))


def _steps(hdr: Hdr) -> Iterator[Step]:
    """From the least value to the largest, which all values are at most: it stands at n."""
    firm_to = _firm_to(hdr.total)
    grid = np.geomspace(1.0, hdr.total, max(2, round(PER_DECADE * np.log10(hdr.total)) + 1)).tolist()
    named = {x for share in PERCENTILES.values() if (x := round(1 / (1 - share), 6)) <= hdr.total}
    for x in sorted(named | {round(step, 6) for step in grid[:-1]}):
        share = 1 - 1 / x
        value_ns = hdr.percentile(100 * share)
        assert value_ns is not None
        yield Step(x, share, value_ns / NS_PER_MS, share <= firm_to, x in named)
    assert hdr.max_ns is not None
    yield Step(float(hdr.total), 1.0, hdr.max_ns / NS_PER_MS, firm=False, named=True)


def _firm_to(n: int) -> float:
    """The highest percentile that is firm on so many values, as `stats.floor_of` has it; to a thousandth of 1 − p."""
    low, high = 0.0, 1 - 1 / n
    while (1 - low) / (1 - high) > 1.001:
        middle = 1 - ((1 - low) * (1 - high)) ** 0.5
        low, high = (middle, high) if is_firm(middle, n) else (low, middle)
    return low
