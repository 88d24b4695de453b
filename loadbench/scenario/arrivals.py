"""When requests are due in open loop: endless seeded processes, cut to a level's length. Nobody sleeps here.

A process yields batches of due times in nanoseconds from the level's start. One more process is one more function and
its row in ``PROCESSES``; whatever parameters it needs are fields of ``records.Open``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from loadbench.records import Open

Batch = npt.NDArray[np.float64]
_BATCH = 1024
_NS_PER_S = 1e9


def _constant(load: Open, rng: np.random.Generator) -> Iterator[Batch]:
    """Evenly spaced, the first at once. Each time is index × period: rounding does not add up."""
    period_ns = _NS_PER_S / load.rate_per_s
    first = 0
    while True:
        yield np.arange(first, first + _BATCH, dtype=np.float64) * period_ns
        first += _BATCH


def _poisson(load: Open, rng: np.random.Generator) -> Iterator[Batch]:
    """Independent exponential gaps, one before the first request too, as of somebody who looks at a random moment."""
    period_ns = _NS_PER_S / load.rate_per_s
    elapsed_ns = 0.0  # a float64 is exact to a nanosecond for 104 days
    while True:
        due_ns = elapsed_ns + np.cumsum(rng.exponential(period_ns, _BATCH))
        elapsed_ns = float(due_ns[-1])
        yield due_ns


PROCESSES: dict[str, Callable[[Open, np.random.Generator], Iterator[Batch]]] = {
    "constant": _constant,
    "poisson": _poisson,
}


def schedule(
    load: Open, duration_s: float | None, requests: int | None, seed: int, min_requests: int = 0
) -> Iterator[int]:
    """Due times in whole nanoseconds from the level's start, in order.

    Ends after ``requests``, or at ``duration_s`` but not before ``min_requests``; endless with neither. The same seed
    gives the same times, so n workers that each take every n-th share one schedule.
    """
    end_ns = None if duration_s is None else duration_s * _NS_PER_S
    issued = 0
    for batch in PROCESSES[load.arrivals](load, np.random.default_rng(seed)):
        for due_ns in np.rint(batch).astype(np.int64).tolist():
            if requests is not None and issued >= requests:
                return
            if end_ns is not None and due_ns >= end_ns and issued >= min_requests:
                return
            yield due_ns
            issued += 1
