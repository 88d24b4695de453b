"""Whether a target keeps memory for every request: told only where that goes on, evenly, and load does not explain it.

An allocator keeps what it was given back, a heap grows until it is swept, and caches fill: all of that slows down. A
leak does not. So the time is cut into parts, and each must have grown, the last ones nearly as fast as the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from loadbench.analysis.findings import Share
from loadbench.analysis.stats import Floats

LEAST_REQUESTS, LEAST_READINGS = 50, 12  # a level of 15 s, the shortest that is usual
LEAST_BYTES, LEAST_SHARE = 16 << 20, 0.02  # together they grew: under it, arenas (64 MiB apart, 4 KiB wide) explain it
PARTS = 5
LEAST_STEPS = 3
GOES_ON = 0.75  # the later half against the first: a growth that fills up over twice the time seen falls to 0.74
SETTLES = 2  # requests of every user: by then each has had its first answer beside all others
LONG_S = 280.0  # five minutes but for what settles: a cache for prompts or threads is full by then, or said to grow
AGREEING, ALIKE_SHARE = 3, 0.25  # so many levels that keep as much for a request, by so much
RETURNED = 0.5  # of what grew was gone after the drain: it was in use


@dataclass(frozen=True, slots=True)
class Kept:
    """Memory kept for each of ``requests``, with a 95 % interval; ``sure``: for so long that it is a leak and no cache
    that fills."""

    bytes_each: float
    low: float
    high: float
    requests: int
    sure: bool = False

    def share(self) -> Share:
        """For every 1,000 requests."""
        return Share(1e3 * self.bytes_each, (1e3 * self.low, 1e3 * self.high), None)


KEPT = "kept for every request"
SO_FAR = "a leak, or a cache that fills; a run of five minutes or more tells which"


class TooFew(str):
    """Why nothing could be judged, neither a leak nor that there is none."""

    __slots__ = ()


def is_told(because: Sequence[str]) -> bool:
    """Whether the evidence of a level says that the target leaks, and not only that it may."""
    return any(KEPT in line and SO_FAR not in line for line in because)


def agree(kept: Sequence[Kept]) -> bool:
    """Whether so many levels keep as much for a request that it is no cache that fills."""
    each = sorted(one.bytes_each for one in kept)
    return len(each) >= AGREEING and each[-1] - each[0] <= ALIKE_SHARE * each[len(each) // 2]


def within(t_ns: Floats, held: Floats, done_ns: Floats, users: int, end_ns: float, after: float | None) -> Kept | str:
    """What one level under a constant load keeps, from readings while it issued requests; or why none is told.

    ``done_ns`` is when its requests ended, in order; ``after`` was held after its drain.
    """
    settled = done_ns[min(done_ns.size - 1, SETTLES * users)] if done_ns.size else np.inf
    use = (t_ns > settled) & (t_ns <= end_ns) & ~np.isnan(held)
    t_ns, held = t_ns[use], held[use]
    requests = np.searchsorted(done_ns, t_ns, side="right").astype(np.float64)
    if t_ns.size < LEAST_READINGS or requests[-1] - requests[0] < LEAST_REQUESTS:
        count = int(requests[-1] - requests[0]) if t_ns.size else 0
        return TooFew(f"{t_ns.size} readings over {count} requests; it takes {LEAST_READINGS} over {LEAST_REQUESTS}")
    edges = np.linspace(0, t_ns.size, PARTS + 2).round().astype(np.intp)
    middles = [slice(first, last) for first, last in pairwise(edges)]
    at = np.array([np.median(requests[part]) for part in middles])
    level = np.array([np.median(held[part]) for part in middles])
    found = _kept(np.diff(at), np.diff(level), float(level[0]))
    if isinstance(found, str):
        return found
    if after is not None and after < level[-1] - RETURNED * (level[-1] - level[0]):
        return f"{(level[-1] - after) / 2**20:,.0f} MiB of what it grew by were given back after the drain"
    some = np.linspace(0, t_ns.size - 1, min(t_ns.size, 500)).astype(np.intp)
    each = _slope(requests[some], held[some])
    off = (found.high - found.low) / 2 + abs(each - found.bytes_each)  # two ways to tell it, and neither is the truth
    long = float(t_ns[-1] - t_ns[0]) >= LONG_S * 1e9
    return Kept(each, each - off, each + off, int(requests[-1] - requests[0]), long)


def across(requests: Sequence[int], loads: Sequence[float], held: Sequence[tuple[float, float]]) -> Kept | str:
    """What the levels of one model keep, from what was held before and after each; or why none is told.

    Only levels count that ask for no more than one before them did: more load takes more memory, and an allocator keeps
    that. Where a level began with much less than the last one left, the process was another.
    """
    steps: list[tuple[int, float]] = []
    most, last = 0.0, None
    for count, load, (before, after) in zip(requests, loads, held, strict=True):
        if last is not None and before < last - LEAST_BYTES:
            most = 0.0
        if load <= most and count:
            steps.append((count, after - before))
        most, last = max(most, load), after
    if len(steps) < LEAST_STEPS or sum(count for count, _ in steps) < LEAST_REQUESTS:
        return TooFew(f"{len(steps)} levels asked for no more than one before them; it takes {LEAST_STEPS}")
    counts, grown = np.array(steps, np.float64).T
    found = _kept(counts, grown, held[0][0])
    return found if isinstance(found, str) else replace(found, sure=True)


def _kept(requests: Floats, grown: Floats, held: float) -> Kept | str:
    """Judge steps of so many requests, in which so many bytes were kept."""
    from scipy.special import stdtrit  # not at the start of every run

    total, count = float(grown.sum()), int(requests.sum())
    if total < max(LEAST_BYTES, LEAST_SHARE * held):
        return f"{total / 2**20:,.0f} MiB more after {count:,} requests: no more than allocators keep"
    if (requests <= 0).any() or (grown <= 0).any():
        return f"{total / 2**20:,.0f} MiB more after {count:,} requests, but not with every part of them"
    slopes, half = grown / requests, (requests.size + 1) // 2
    first, later = grown[:half].sum() / requests[:half].sum(), grown[-half:].sum() / requests[-half:].sum()
    if later < GOES_ON * first:
        return f"it grew by {first / 1024:,.0f} KiB a request at first and by {later / 1024:,.0f} KiB later: it settles"
    spread = float(stdtrit(slopes.size - 1, 0.975)) * float(slopes.std(ddof=1)) / slopes.size**0.5
    each = total / count
    if spread >= each:
        return f"{total / 2**20:,.0f} MiB more after {count:,} requests, but too unevenly to be theirs"
    return Kept(each, each - spread, each + spread, count)


def _slope(x: Floats, y: Floats) -> float:
    """Theil and Sen's: a third of the readings may be anything."""
    from scipy.stats import theilslopes

    return float(theilslopes(y, x)[0])
