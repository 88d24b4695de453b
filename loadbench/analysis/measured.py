"""A set of requests, described: how they ended, their tokens, and every latency of METRICS with its intervals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loadbench.analysis.interval import intervals
from loadbench.analysis.metrics import LATENCIES, Metric, Series
from loadbench.analysis.rundir import Mask, Samples
from loadbench.analysis.stats import NS_PER_MS, Distribution, Floats, describe, describe_hdr
from loadbench.analysis.summary import Latencies, Requests, Tokens
from loadbench.hdr import Hdr


@dataclass(frozen=True, slots=True)
class Measured:
    """Samples in the order in which they were due, and which of them succeeded and were sent."""

    samples: Samples
    ok: Mask
    sent: Mask

    @classmethod
    def of(cls, samples: Samples) -> Measured:
        return cls(samples, samples.said(samples.outcome, "ok"), ~np.isnan(samples.sent_ns))

    def requests(self) -> Requests:
        outcomes = self.samples.counts(self.samples.outcome)
        return Requests(len(self.samples), outcomes.pop("ok", 0), outcomes)

    def tokens(self) -> Tokens:
        output = self.samples.output_tokens[self.ok]
        return Tokens(
            input_mean=_mean(self.samples.input_tokens[self.ok]),
            output_mean=_mean(output),
            output_total=int(np.nansum(output)),
            source=self.samples.counts(self.samples.token_source[self.ok]),
        )

    def values(self) -> Iterator[tuple[Metric, Series, Floats | None]]:
        """Every series of every metric in nanoseconds, NaN where it does not exist; None for what is a histogram."""
        counted = {"ok": self.ok, "sent": self.sent}
        for metric in LATENCIES.values():
            for series, stamps in metric.series.items():
                yield metric, series, None if stamps is None else stamps(self.samples)[counted[metric.of]]

    def latencies(self, gaps: Hdr, no_interval: str | None) -> Latencies:
        """Every series of every metric; what no successful request has is empty.

        ``no_interval`` says why these requests allow no confidence interval; None: they may.
        """
        latencies: Latencies = {name: {} for name in LATENCIES}
        for metric, series, values_ns in self.values():
            if values_ns is None:
                told = describe_hdr(gaps)
                unordered = "gaps are kept as counts, without their order"
                latencies[metric.name][series] = replace(told, not_estimable=unordered if told.n else None)
                continue
            # Failures count where the metric applies to these requests at all; non-streaming ones have no TTFT.
            applies = metric.of == "ok" and not (values_ns.size and np.isnan(values_ns).all())
            failed = int(np.count_nonzero(~self.ok)) if applies else None
            latencies[metric.name][series] = _with_intervals(describe(values_ns, failed), values_ns, no_interval)
        return latencies


def _with_intervals(told: Distribution, values_ns: Floats, no_interval: str | None) -> Distribution:
    if not told.n:
        return told
    found = no_interval or intervals(values_ns[~np.isnan(values_ns)] / NS_PER_MS)
    if isinstance(found, str):
        return replace(told, not_estimable=found)
    return replace(told, interval_95=found, not_estimable=None if found.p95 else "p95: too few values lie above it")


def _mean(values: Any) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None
