"""When requests are due in open loop: endless seeded processes or a trace, cut to a level's length. Nobody sleeps here.

A process yields batches of arrivals on a scale on which one comes per unit; the load's rate, which may change, then
says when each is due. So every process can have every rate. One more process is one more function and its row in
``PROCESSES``; whatever parameters it needs are fields of ``records.Open``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from loadbench.records import Open
from loadbench.scenario.traces import replay

Batch = npt.NDArray[np.float64]
_BATCH = 1024
_NS_PER_S = 1e9
_TINY = float(np.finfo(np.float64).tiny)
_NEVER_S = 2.0**62 / _NS_PER_S  # 146 years: due times are whole nanoseconds of 64 bits


def _constant(load: Open, rng: np.random.Generator) -> Iterator[Batch]:
    """Evenly spaced, the first at once. Counted, not added up: rounding does not grow."""
    first = 0
    while True:
        yield np.arange(first, first + _BATCH, dtype=np.float64)
        first += _BATCH


def _poisson(load: Open, rng: np.random.Generator) -> Iterator[Batch]:
    """Independent exponential gaps, one before the first request too, as of somebody who looks at a random moment."""
    return _added_up(0.0, lambda: rng.standard_exponential(_BATCH))


def _gamma(load: Open, rng: np.random.Generator) -> Iterator[Batch]:
    """Independent gamma gaps of shape ``burstiness`` and mean 1, as of ``vllm bench serve --burstiness``.

    Somebody who looks at a random moment more likely finds a long gap, and a random part of it is left: from there the
    mean rate is right in any window (Cox, Renewal Theory, 1962, chapter 5). A long gap is gamma of a shape one higher.
    """
    shape = load.burstiness or 1.0
    left = rng.random() * rng.standard_gamma(shape + 1) / shape
    yield np.array([left])
    yield from _added_up(left, lambda: rng.standard_gamma(shape, _BATCH) / shape)


def _added_up(at: float, gaps: Callable[[], Batch]) -> Iterator[Batch]:
    while True:
        batch = at + np.cumsum(gaps())
        at = float(batch[-1])
        yield batch


PROCESSES: dict[str, Callable[[Open, np.random.Generator], Iterator[Batch]]] = {
    "constant": _constant,
    "poisson": _poisson,
    "gamma": _gamma,
}


def when_s(load: Open, arrivals: Batch) -> Batch:
    """When so many arrivals are to be expected, in seconds from the level's start: the cumulative rate, inverted.

    After the last leg its rate stays. Where that is 0, no more are to be expected in the life of the universe.
    """
    if not load.legs:
        return arrivals / load.rate_per_s
    shapes = [(leg.start, (leg.end - leg.start) / leg.over_s, leg.over_s) for leg in load.legs]
    first, slope, over_s = np.array([*shapes, (load.legs[-1].end, 0.0, np.inf)]).T
    before = np.concatenate(([0.0], np.cumsum([(leg.start + leg.end) / 2 * leg.over_s for leg in load.legs])))
    begin_s = np.concatenate(([0.0], np.cumsum(over_s[:-1])))
    at = np.searchsorted(before[1:], arrivals, side="right")  # right: nothing is due in a leg that holds at 0
    # r(t) = first + slope t, so n = first t + slope t² / 2 within a leg. Of the two forms of the root this one loses no
    # digits where the slope is small; it is 0 / 0 only for the first of a leg that begins at 0.
    within = arrivals - before[at]
    root = np.sqrt(np.maximum(first[at] ** 2 + 2 * slope[at] * within, 0.0))
    with np.errstate(over="ignore"):
        into_s: Batch = np.minimum(2 * within / np.maximum(first[at] + root, _TINY), over_s[at])
    return begin_s[at] + into_s


def schedule(
    load: Open, duration_s: float | None, requests: int | None, seed: int, min_requests: int = 0
) -> Iterator[int]:
    """Due times in whole nanoseconds from the level's start, in order.

    Ends after ``requests``, or at ``duration_s`` but not before ``min_requests``, or with the trace; else endless.
    The same seed gives the same times, so n workers that each take every n-th share one schedule. Raises UsageError
    for a trace that is no longer there.
    """
    due_ns = _drawn(load, seed) if load.trace is None else (row.due_ns for row in replay(load.trace))
    return within(due_ns, duration_s, requests, min_requests)


def within(
    due_ns: Iterator[int], duration_s: float | None, requests: int | None, min_requests: int = 0
) -> Iterator[int]:
    """The times of a level that is bounded so."""
    end_ns = None if duration_s is None else duration_s * _NS_PER_S
    for issued, due in enumerate(due_ns):
        if requests is not None and issued >= requests:
            return
        if end_ns is not None and due >= end_ns and issued >= min_requests:
            return
        yield due


def _drawn(load: Open, seed: int) -> Iterator[int]:
    for batch in PROCESSES[load.arrivals](load, np.random.default_rng(seed)):
        due_s = np.minimum(when_s(load, batch), _NEVER_S)
        yield from np.rint(due_s * _NS_PER_S).astype(np.int64).tolist()
