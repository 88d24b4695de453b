"""Which numbers of a level are compared between runs, and on what scale a change of each counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from loadbench.analysis.metrics import LATENCIES, RATES
from loadbench.analysis.road import is_over
from loadbench.analysis.stats import Distribution
from loadbench.analysis.summary import Level
from loadbench.target.state import DEAD

LEAST_SHARE = 0.01  # of requests that fail, and of all other shares
GATING = {"ttft.p50", "ttft.p95", "e2e.p50", "e2e.p95", "tpot.p50", "output_tokens_per_s"}


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that a level has in every run. ``times``: a latency, which means nothing on a level over capacity."""

    name: str
    title: str
    unit: str
    get: Callable[[Level], float | None]
    lower_is_better: bool = True
    gates: bool = True
    kind: Literal["ratio", "difference"] = "ratio"
    times: bool = False
    always: bool = True

    def worse(self, value: float | None) -> float:
        """The value on a scale on which more is worse and changes add up; NaN where there is none, infinite of a rate
        of nothing."""
        if value is None or (self.kind == "ratio" and value <= 0):
            return math.nan if value is None or self.lower_is_better else math.inf
        scaled = math.log(value) if self.kind == "ratio" else value
        return scaled if self.lower_is_better else -scaled

    def indicative(self, level: Level) -> bool:
        """Whether it stands on fewer samples than a firm percentile takes."""
        metric, _, statistic = self.name.partition(".")
        return self.times and statistic in _distribution(level, metric).indicative

    def change(self, worse: float | None) -> float | None:
        """The ratio or difference that a step on that scale is."""
        if worse is None:
            return None
        step = worse if self.lower_is_better else -worse
        return math.exp(step) if self.kind == "ratio" else step

    def least(self, effect: float) -> float:
        """What a change must be to count, on that scale; ``effect`` is a ratio's."""
        return math.log1p(effect) if self.kind == "ratio" else LEAST_SHARE


def _latency(level: Level, metric: str, statistic: str) -> float | None:
    return _distribution(level, metric).value(statistic)


def _rate(level: Level, name: str) -> float | None:
    return level.throughput[name]


def _distribution(level: Level, metric: str) -> Distribution:
    told = level.latency_ms[metric]
    return told.get(level.headline, told["service"])


def _memory(level: Level) -> float | None:
    if level.memory is not None and level.memory.peak_bytes is not None:
        return level.memory.peak_bytes
    return level.target.rss_bytes.peak


def _failed(level: Level) -> float | None:
    return sum(level.requests.failed.values()) / level.requests.attempted if level.requests.attempted else None


MEMORY = Figure("memory.peak", "Memory peak", "bytes", _memory)
DIED = Figure(
    "target_died",
    "Target died",
    "share",
    lambda level: float(level.target.state in DEAD),
    kind="difference",
    always=False,
)
FIGURES = (
    *(
        Figure(
            f"{metric.name}.{statistic}",
            f"{metric.title} {statistic}",
            metric.unit,
            partial(_latency, metric=metric.name, statistic=statistic),
            gates=f"{metric.name}.{statistic}" in GATING,
            times=True,
        )
        for metric in LATENCIES.values()
        if metric.name != "lag"
        for statistic in ("p50", "p95")
    ),
    *(
        Figure(
            rate.name,
            rate.title,
            rate.unit,
            partial(_rate, name=rate.name),
            rate.lower_is_better,
            rate.name in GATING,
            "difference" if rate.unit == "share" else "ratio",
        )
        for rate in RATES.values()
    ),
    Figure("failed_share", "Failed", "share", _failed, kind="difference"),
    MEMORY,
    DIED,
    Figure(
        "over_capacity",
        "Over capacity",
        "share",
        lambda level: float(is_over(level.road)),
        kind="difference",
        always=False,
    ),
)
"""What is compared, by name as in compare.json: rows of METRICS come here by themselves."""
OF_RUNGS = (MEMORY, DIED)  # whose times are no measurement
