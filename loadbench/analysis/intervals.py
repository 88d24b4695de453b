"""A level part by part: the numbers of the whole, for every so many seconds of it. What they mean is in ``metrics``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from loadbench.analysis import slo
from loadbench.analysis.measured import Measured
from loadbench.analysis.metrics import RATES, Window
from loadbench.analysis.road import asked_until
from loadbench.analysis.rundir import Mask
from loadbench.analysis.span import Span
from loadbench.analysis.summary import Interval
from loadbench.hdr import Hdr
from loadbench.records import Closed, Open, load_from_json
from loadbench.scenario.schema import Slo

MOST = 200
REST_SHARE = 0.1  # of an interval: less is left over when a timer fires late, and belongs to the last


def intervals_of(span: Span, plan: dict[str, Any], objective: Slo | None) -> tuple[Interval, ...]:
    """The parts of a level that asks for them with ``interval_s``, up to where it stopped issuing, its warm-up too.

    At most 200: of more, so many together that they are no more. The last may be shorter.
    """
    start_ns, interval_s = span.events.start_ns, plan.get("interval_s")
    end_ns = span.end_ns if span.events.issue_end_ns is None else span.events.issue_end_ns
    length_s = (end_ns - start_ns) / 1e9
    if not interval_s or length_s <= 0:
        return ()
    each_s = interval_s * math.ceil(length_s / interval_s / MOST)
    count = max(1, math.ceil(length_s / each_s - REST_SHARE))
    edges_s = [each_s * number for number in range(count)] + [length_s]
    good = slo.good(objective, span.samples, span.ok, span.headline) if objective else None
    return tuple(_interval(span, plan, good, *edges_s[place : place + 2]) for place in range(count))


def _interval(span: Span, plan: dict[str, Any], good: Mask | None, from_s: float, to_s: float) -> Interval:
    start_ns, end_ns = (span.events.start_ns + round(edge_s * 1e9) for edge_s in (from_s, to_s))
    samples = span.samples
    due = (samples.due_ns >= start_ns) & (samples.due_ns < end_ns)
    measured = Measured.of(samples.take(due))
    latency_ms = measured.latencies(Hdr(), "told of the whole level only")
    there = due | ((samples.due_ns < end_ns) & ~(samples.done_ns < start_ns))
    window = Window(
        samples=samples.take(there),
        ok=span.ok[there],
        inside=due[there],
        good=None if good is None else good[there],
        start_ns=start_ns,
        end_ns=end_ns,
        latency_ms=latency_ms,
    )
    return Interval(
        start_s=from_s,
        length_s=to_s - from_s,
        load=_load(plan, from_s, to_s, int(np.count_nonzero(due))),
        requests=measured.requests(),
        throughput={rate.name: rate.how(window) for rate in RATES.values()},
        concurrency_reached=window.in_flight(),
        latency_ms={name: latency_ms[name][slo.series_of(name, span.headline)] for name in ("ttft", "e2e", "tpot")},
    )


def _load(plan: dict[str, Any], from_s: float, to_s: float, due: int) -> float:
    """Users or requests/s asked for, on average; of a trace, what was due."""
    load = load_from_json(plan["load"])
    if load.legs:
        before, after = asked_until(load.legs, np.array([from_s, to_s]))
        return float(after - before) / (to_s - from_s)
    if isinstance(load, Open) and load.trace:
        return due / (to_s - from_s)
    return load.concurrency if isinstance(load, Closed) else load.rate_per_s
