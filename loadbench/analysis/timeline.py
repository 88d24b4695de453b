"""A run over its time, thinned for a picture: bins that keep the least, the median and the most of what is in them.

No outlier can fall between two bins or be averaged away: what is extreme in a bin is in its extremes. A bin is so long
that a run has at most ``MOST_BINS`` of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from loadbench.analysis import memory_columns
from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.rundir import TICKS, LevelEvents, Mask, RunData, Samples
from loadbench.analysis.stats import NS_PER_MS, Floats
from loadbench.target.memory_figures import HELD

MOST_BINS = 180
GIVEN_UP = "given_up"  # of a rung of a memory ladder: what is unanswered at its end was to be
STEPS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)


@dataclass(frozen=True, slots=True)
class Bin:
    """``n`` values between ``start_s`` and ``end_s`` of the run, by their extremes and their median."""

    start_s: float
    end_s: float
    n: int
    least: float
    median: float
    most: float


@dataclass(frozen=True, slots=True)
class Failed:
    """``n`` requests of one outcome that ended in a bin, or were given up in it as planned."""

    start_s: float
    end_s: float
    outcome: str
    n: int


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a level: ``warm-up`` (left out of its figures), ``load`` or ``drain``."""

    level: int
    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """All of it on one axis, seconds since the run began; ``step_s`` is the length of a bin.

    Latencies are in ms, by the second in which a request was due; memory in bytes, ``of`` as in `findings.LevelMemory`;
    ``cpu`` in shares of a core. Only seconds within levels are told.
    """

    step_s: float
    end_s: float
    ttft: tuple[Bin, ...] = ()
    e2e: tuple[Bin, ...] = ()
    tpot: tuple[Bin, ...] = ()
    in_flight: tuple[Bin, ...] = ()
    memory: tuple[Bin, ...] = ()
    of: str | None = None
    lag: tuple[Bin, ...] = ()
    cpu: tuple[Bin, ...] = ()
    rss: tuple[Bin, ...] = ()
    failed: tuple[Failed, ...] = ()
    phases: tuple[Phase, ...] = field(default=())


def timeline(run: RunData, trimmed_s: dict[int, float | None], most: int = MOST_BINS) -> Timeline:
    """The run's levels over time. ``trimmed_s`` is by level what was left out as warm-up."""
    samples = run.samples
    loaded = samples.said(samples.phase, "load")  # by masks: a copy of a million samples is 150 MB
    phases = tuple(part for events in run.levels for part in _phases(events, samples, trimmed_s.get(events.index)))
    end_s = max([part.end_s for part in phases], default=0.0)
    start_s = min([part.start_s for part in phases], default=0.0)
    step_s = next((step for step in STEPS_S if (end_s - start_s) / step <= most), (end_s - start_s) / most)
    ok = loaded & samples.said(samples.outcome, "ok")

    def of_request(metric: str) -> tuple[Bin, ...]:
        stamps = LATENCIES[metric].series["service"]
        assert stamps is not None
        return _bins(samples.due_ns[ok] / 1e9, stamps(samples)[ok] / NS_PER_MS, step_s)

    memory, of = _memory(run.levels, step_s)
    ticks = [_ticks(events) for events in run.levels]
    return Timeline(
        step_s=step_s,
        end_s=end_s,
        ttft=of_request("ttft"),
        e2e=of_request("e2e"),
        tpot=of_request("tpot"),
        in_flight=_in_flight(samples.sent_ns[loaded], samples.done_ns[loaded], step_s),
        memory=memory,
        of=of,
        lag=_of_ticks(ticks, lambda tick: tick["loop_lag_max_ns"] / NS_PER_MS, step_s),
        cpu=_of_ticks(ticks, _cpu, step_s),
        rss=_of_ticks(ticks, lambda tick: tick["client_rss_bytes"], step_s),
        failed=tuple(_failed(run, loaded, step_s)),
        phases=phases,
    )


def _bins(at_s: Floats, values: Floats, step_s: float) -> tuple[Bin, ...]:
    known = ~np.isnan(values) & ~np.isnan(at_s)
    place = np.floor(at_s[known] / step_s).astype(np.int64)
    order = np.argsort(place, kind="stable")  # nearly sorted as it is
    values = values[known][order]
    filled, first = np.unique(place[order], return_index=True)
    made = []
    for bin_, inside in zip(filled.tolist(), np.split(values, first[1:]), strict=False):  # no values: one empty part
        least, median, most = float(inside.min()), float(np.median(inside)), float(inside.max())
        made.append(Bin(round(bin_ * step_s, 3), round((bin_ + 1) * step_s, 3), inside.size, least, median, most))
    return tuple(made)


def _in_flight(sent_ns: Floats, done_ns: Floats, step_s: float) -> tuple[Bin, ...]:
    """Requests between sent and done: the least and the most of each bin, and the mean over its time as its middle."""
    both = ~np.isnan(sent_ns) & ~np.isnan(done_ns)
    if not both.any():
        return ()
    sent_s, done_s = np.sort(sent_ns[both]) / 1e9, np.sort(done_ns[both]) / 1e9
    edges = np.arange(np.floor(sent_s[0] / step_s), np.floor(max(sent_s[-1], done_s[-1]) / step_s) + 2) * step_s
    sent, done = np.searchsorted(sent_s, edges, "right"), np.searchsorted(done_s, edges, "right")
    made = []
    for place, (start_s, end_s) in enumerate(pairwise(edges.tolist())):  # one by one: all at once takes 130 MB
        begun, ended = sent_s[sent[place] : sent[place + 1]], done_s[done[place] : done[place + 1]]
        at_s = np.concatenate([[start_s], begun, ended])
        change = np.concatenate([[sent[place] - done[place]], np.ones(begun.size), -np.ones(ended.size)])
        order = np.argsort(at_s, kind="stable")
        # The count holds from each event to the next; between those of one moment for no time.
        held, lasts_s = np.cumsum(change[order]), np.diff(at_s[order], append=end_s)
        held, lasts_s = held[lasts_s > 0], lasts_s[lasts_s > 0]
        mean = float(np.dot(held, lasts_s) / lasts_s.sum())
        least, most = float(held.min()), float(held.max())
        made.append(Bin(round(start_s, 3), round(start_s + step_s, 3), held.size, least, mean, most))
    return tuple(made)


def _memory(levels: Sequence[LevelEvents], step_s: float) -> tuple[tuple[Bin, ...], str | None]:
    """What the target held, by the first figure that there is of it; of a run without readings its ticks' RSS."""
    tables = [memory_columns.columns(events.memory) for events in levels if events.memory]
    for of, name in (("gpu", "gpu_process"), *((held, held) for held in HELD)):
        known = [table for table in tables if not np.isnan(table[name]).all()]
        if of == "gpu":
            known = [table for table in known if np.nanmax(table[name]) > 0]
        if known:
            at_s = np.concatenate([table["t_ns"] for table in known]) / 1e9
            return _bins(at_s, np.concatenate([table[name] for table in known]), step_s), of
    told = _of_ticks([_ticks(events) for events in levels], lambda tick: tick["target_rss_bytes"], step_s)
    return told, "rss" if told else None


def _ticks(events: LevelEvents) -> dict[str, Floats]:
    table = np.array(events.ticks, np.float64).reshape(-1, len(TICKS))
    return {name: table[:, place] for place, name in enumerate(TICKS)}


def _of_ticks(
    ticks: Sequence[dict[str, Floats]], how: Callable[[dict[str, Floats]], Floats], step_s: float
) -> tuple[Bin, ...]:
    if not ticks:
        return ()
    at_s = np.concatenate([tick["t_ns"] for tick in ticks]) / 1e9
    return _bins(at_s, np.concatenate([how(tick) for tick in ticks]), step_s)


def _cpu(tick: dict[str, Floats]) -> Floats:
    """CPU seconds per second since the tick before; the first of a level has none."""
    share = np.full(tick["t_ns"].shape, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        share[1:] = np.diff(tick["client_cpu_s"]) / (np.diff(tick["t_ns"]) / 1e9)
    share[~np.isfinite(share)] = np.nan
    return share


def _failed(run: RunData, loaded: Mask, step_s: float) -> Iterator[Failed]:
    samples = run.samples
    rungs = [index for index, level in enumerate(run.facts["levels"]) if level["load"].get("ask")]
    planned = loaded & samples.said(samples.outcome, "censored") & np.isin(samples.level, rungs)
    yield from _of_outcome(samples.take(planned), GIVEN_UP, step_s)
    for outcome in samples.counts(samples.outcome[loaded]):
        if outcome != "ok":
            mine = loaded & samples.said(samples.outcome, outcome) & ~planned
            yield from _of_outcome(samples.take(mine), outcome, step_s)


def _of_outcome(samples: Samples, outcome: str, step_s: float) -> Iterator[Failed]:
    ended_ns = np.where(np.isnan(samples.done_ns), samples.due_ns, samples.done_ns)
    places, counts = np.unique(np.floor(ended_ns / 1e9 / step_s), return_counts=True)
    for place, n in zip(places.tolist(), counts.tolist(), strict=True):
        yield Failed(round(place * step_s, 3), round((place + 1) * step_s, 3), outcome, n)


def _phases(events: LevelEvents, samples: Samples, trimmed_s: float | None) -> Iterator[Phase]:
    start_s, mine = (
        events.start_ns / 1e9,
        samples.done_ns[(samples.level == events.index) & samples.said(samples.phase, "load")],
    )
    last_ns = max(events.last_tick_ns, events.start_ns, 0 if np.isnan(mine).all() else int(np.nanmax(mine)))
    issue_end_s = (last_ns if events.issue_end_ns is None else events.issue_end_ns) / 1e9
    settled_s = min(start_s + (trimmed_s or 0.0), issue_end_s)
    if settled_s > start_s:
        yield Phase(events.index, "warm-up", start_s, settled_s)
    yield Phase(events.index, "load", settled_s, issue_end_s)
    end_s = (events.end["t_ns"] if events.end else last_ns) / 1e9
    if end_s > issue_end_s:
        yield Phase(events.index, "drain", issue_end_s, end_s)
