"""Which requests and which time of a level count: from the end of its warm-up to where it stopped issuing.

What is left out as warm-up stays in samples.jsonl; requests are counted over the whole level all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loadbench.analysis.metrics import LATENCIES, Series
from loadbench.analysis.rundir import LevelEvents, Mask, RunData, Samples
from loadbench.analysis.stats import FLOORS, Floats
from loadbench.analysis.steady import LEAST_BINS, Beginning, beginning, per_second


@dataclass(frozen=True, slots=True)
class Span:
    """A level's requests of the load phase, in the order in which they were due, and the time that counts.

    ``trimmed_s`` is what was left out at its beginning, None where nothing settles or that cannot be judged;
    ``beginning`` says how the level began where it did not begin as it went on.
    """

    events: LevelEvents
    plan: dict[str, Any]
    headline: Series
    samples: Samples
    ok: Mask
    start_ns: int
    end_ns: int
    trimmed_s: float | None
    beginning: Beginning | None

    @property
    def changes(self) -> bool:
        """Whether the load changes by plan, so that there is no steady state to wait for."""
        return bool(self.plan["load"].get("legs") or self.plan["load"].get("trace"))

    @property
    def is_rung(self) -> bool:
        """Whether it is of a memory ladder, which asks for memory and whose times say nothing of any other load."""
        return bool(self.plan["load"].get("ask"))

    @property
    def since_ns(self) -> float:
        """From when on things count: always, or after the warm-up."""
        return self.start_ns if self.trimmed_s else -np.inf

    @property
    def inside(self) -> Mask:
        """The requests that count."""
        mask: Mask = self.samples.due_ns >= self.since_ns
        return mask

    @property
    def counted(self) -> Samples:
        """The samples that count."""
        return self.samples.take(self.inside) if self.trimmed_s else self.samples

    def unsettled(self) -> Span:
        """The same of a level that was over capacity: it has no warm-up but only grows, until it stops issuing."""
        end_ns = self.end_ns if self.events.issue_end_ns is None else self.events.issue_end_ns
        return replace(self, start_ns=self.events.start_ns, end_ns=end_ns, trimmed_s=None, beginning=None)


def span_of(run: RunData, events: LevelEvents) -> Span:
    """The span of one level."""
    plan = run.facts["levels"][events.index]
    headline: Series = "service" if plan["load"]["kind"] == "closed" else "response"
    samples = run.samples.of_level(events.index)
    ok = samples.said(samples.outcome, "ok")
    span = Span(events, plan, headline, samples, ok, events.start_ns, _end_ns(events, samples), None, None)
    return span if span.changes else _settled(span)


def headline_of(samples: Samples, ok: Mask, headline: Series) -> tuple[str, Floats]:
    """The metric that stands for a level's latency, and its values in nanoseconds, NaN where there is none.

    It is the TTFT, or without streaming the E2E, of the successful requests.
    """
    for name in ("ttft", "e2e"):
        stamps = LATENCIES[name].series[headline]
        assert stamps is not None
        values_ns = np.where(ok, stamps(samples), np.nan)
        if not np.isnan(values_ns).all():
            break
    return name, values_ns


def _settled(span: Span) -> Span:
    """The span without its warm-up, or as it is where that cannot be told.

    Judged on the mean latency of the requests due in each second: latencies are what a warm-up spoils, and completions
    per second are mostly zeros where an answer takes seconds. Nothing is left out that a firm percentile stands on.
    """
    _, values_ns = headline_of(span.samples, span.ok, span.headline)
    known = ~np.isnan(values_ns)
    since_s = np.maximum(span.samples.due_ns[known] - span.start_ns, 0.0) / 1e9
    seconds, means_ns = per_second(values_ns[known], since_s)
    if seconds.size < LEAST_BINS:
        return span
    begun = beginning(means_ns)
    trimmed_s = float(seconds[begun.cut]) if begun and begun.cut else 0.0
    kept = int(np.count_nonzero(since_s >= trimmed_s))
    if any(since_s.size >= floor > kept for floor in FLOORS.values()):
        trimmed_s = 0.0
    return replace(span, start_ns=span.start_ns + int(trimmed_s * 1e9), trimmed_s=trimmed_s, beginning=begun)


def _end_ns(events: LevelEvents, samples: Samples) -> int:
    """When the level stopped issuing, which is the end of what is measured at its load.

    Where it was cut off before, the last thing that happened in it. Where it stopped so early that fewer than half of
    its requests had ended (eight users, eight requests), the end of the last: else nothing would be inside.
    """
    done_ns = samples.done_ns[~np.isnan(samples.done_ns)]
    last_ns = int(done_ns.max()) if done_ns.size else events.start_ns
    if events.issue_end_ns is None:
        return max(last_ns, events.last_tick_ns)
    ended = np.count_nonzero(done_ns <= events.issue_end_ns)
    return events.issue_end_ns if 2 * ended >= len(samples) else max(last_ns, events.issue_end_ns)


def littles_law_error(span: Span) -> float | None:
    """How far apart what the client counted in flight is from throughput × mean latency, as a share of the latter.

    Both over the whole level with its drain, where every request began and ended: so they are the integral of what was
    in flight, and the sum of all times from opening a connection to the end of the answer. None where it was not
    counted, or where a request got no connection and so has no time.
    """
    client = span.events.end["client"] if span.events.end else {}
    counted = [part.get("in_flight_ns") for part in client.get("workers") or [client]]
    samples = span.samples
    started = ~samples.said(samples.outcome, "dropped")
    if None in counted or not started.any() or np.isnan(samples.sent_ns[started]).any():
        return None
    spent_ns = samples.done_ns - samples.sent_ns + np.nan_to_num(samples.connect_ns)
    total_ns = float(np.nansum(spent_ns))
    return (sum(counted) - total_ns) / total_ns if total_ns > 0 else None
