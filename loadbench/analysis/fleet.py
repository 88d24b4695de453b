"""What a level was at each endpoint of a fleet, which of them died and when, and what together says of none of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loadbench.analysis.measured import Measured
from loadbench.analysis.metrics import LATENCIES, RATES, Window
from loadbench.analysis.rundir import RunData
from loadbench.analysis.span import Span
from loadbench.analysis.stats import Distribution
from loadbench.analysis.summary import AtEndpoint, Level, Rss
from loadbench.hdr import Hdr
from loadbench.records import load_title
from loadbench.target.state import DEAD

DIFFER_TIMES = 2.0
"""Medians so many times apart are no fleet of equals: the percentiles of all together lie between them, at none."""


def endpoints_of(run: RunData, span: Span) -> tuple[AtEndpoint, ...]:
    """Each endpoint's part of a level; none where there is one endpoint."""
    rows = run.facts["endpoint"].get("endpoints") or ()
    states = (span.events.end or {}).get("target", {}).get("endpoints") or [{}] * len(rows)
    return tuple(
        _at(str(row["url"]), state, _part(span, place))
        for place, (row, state) in enumerate(zip(rows, states, strict=True))
    )


def _part(span: Span, place: int) -> Span:
    mine = span.samples.endpoint == place
    return replace(span, samples=span.samples.take(mine), ok=span.ok[mine])


def _at(url: str, state: dict[str, Any], part: Span) -> AtEndpoint:
    everything = Measured.of(part.samples)
    latency_ms = Measured.of(part.counted).latencies(Hdr(), "told of the whole level only")
    window = Window(part.samples, part.ok, part.inside, None, part.start_ns, part.end_ns, latency_ms)
    named = state.get("state")
    return AtEndpoint(
        url=url,
        requests=everything.requests(),
        throughput={rate.name: rate.how(window) for rate in RATES.values()},
        tokens=everything.tokens(),
        latency_ms=latency_ms,
        state=named,
        evidence=tuple(state.get("evidence") or ()),
        rss_bytes=Rss(**(state.get("rss_bytes") or {})),
        died_after_s=_died_after_s(part) if named in DEAD else None,
    )


def _died_after_s(part: Span) -> float | None:
    """When the first request failed after which none succeeded, from the level's start; None: none failed so."""
    done_ns, ok = part.samples.done_ns, part.ok
    last_ns = np.nanmax(done_ns[ok], initial=-np.inf)
    failed_ns = done_ns[~ok & (done_ns > last_ns)]
    return float(failed_ns.min() - part.events.start_ns) / 1e9 if failed_ns.size else None


def deaths(levels: Sequence[Level]) -> list[str]:
    """Every death of an endpoint, with level and moment, and whether it came back."""
    told = []
    for place in range(max((len(level.endpoints) for level in levels), default=0)):
        down: str | None = None
        for level in (level for level in levels if level.endpoints):
            here = level.endpoints[place]
            if here.state in DEAD and down is None:
                since = (
                    "" if here.died_after_s is None else f": nothing succeeded there from {here.died_after_s:.1f} s on"
                )
                state, load = here.state.replace("_", " "), load_title(level.load)
                down = f"{here.url} was found {state} after level {level.index} ({load} of {level.model}){since}"
            elif here.state is not None and here.state not in DEAD and down is not None:
                told.append(f"{down}; it was back after level {level.index}")
                down = None
        told += [] if down is None else [f"{down}; it did not come back"]
    return told


def doubts(level: Level) -> Iterator[tuple[str, str, str]]:
    """What is to be said against a fleet's level: about, reason, advice."""
    for here in level.endpoints:
        if here.state in (None, "healthy"):
            continue
        since = "" if here.died_after_s is None else f" (nothing succeeded from {here.died_after_s:.1f} s on)"
        died = here.state in DEAD
        what = "; figures of all together are those of the others from then on" if died else ""
        reason = f"{here.url} was {here.state} at the end of the level{since}: {'; '.join(here.evidence)}"
        yield "endpoint_died" if died else "unhealthy_endpoint", reason, f"read its service's log{what}"
    for metric in ("ttft", "e2e"):
        found = [(told.p50, here.url) for here in level.endpoints if (told := _firm(here, metric)).p50]
        if len(found) > 1 and min(found)[0] * DIFFER_TIMES <= max(found)[0]:
            (least_ms, fast), (most_ms, slow) = min(found), max(found)
            title = f"{LATENCIES[metric].title} p50"
            reason = f"{title} is {least_ms:,.3g} ms at {fast} and {most_ms:,.3g} ms at {slow}: a mixture, whose"
            advice = "read the rows by endpoint, or measure each on its own"
            yield "endpoints_differ", f"{reason} percentiles are those of neither", advice
            break


def _firm(here: AtEndpoint, metric: str) -> Distribution:
    told = here.latency_ms[metric]["service"]
    return told if told.firm("p50") is not None else Distribution(0)
