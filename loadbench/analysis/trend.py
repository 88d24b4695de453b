"""What a scenario's figures did from run to run: as series, with the runs at which they changed.

Only like is held against like: runs of another scenario under the same name, of another machine or target make no
series with these. Where a series changes is told by ruptures: PELT with the least-squares cost (Killick et al. 2012).
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from loadbench.analysis.history import FIGURES, Figure, Row
from loadbench.analysis.stats import Floats

FEWEST = 10
"""Runs with a value, before a change is told: in fewer, one that is not far greater than the noise is not found."""

SEGMENT = 3  # runs on either side of a change: less than three are an outlier or two
ALARM = 0.001
"""How often a series without a change may be said to have one; there are dozens of series to look at."""

WORTH = 0.05  # a change of less is nobody's business, however sure


@dataclass(frozen=True, slots=True)
class Change:
    """The run, by its place, from which on a series has another level; medians from change to change."""

    run: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Series:
    """One figure of one load on one model, a value for each run; None: it has none, or did not count.

    ``indicative`` are those on few samples. ``changes`` is None where none can be told: too few runs with a value, or
    ruptures is not installed.
    """

    model: str
    load: str
    figure: Figure
    values: tuple[float | None, ...]
    indicative: tuple[bool, ...]
    changes: tuple[Change, ...] | None


@dataclass(frozen=True, slots=True)
class Trend:
    """The runs of one scenario that are like the last of them, oldest first. ``unlike`` counts the others."""

    scenario: str
    rows: tuple[Row, ...]
    unlike: int
    series: tuple[Series, ...]


def can_tell() -> bool:
    """Whether what finds changes is installed."""
    return importlib.util.find_spec("ruptures") is not None


def trend(rows: Sequence[Row], figures: Sequence[str], last: int) -> Trend:
    """Of the rows of one scenario, oldest first; at most the ``last`` ones."""
    like = [row for row in rows if _kind(row) == _kind(rows[-1])]
    unlike, like = len(rows) - len(like), like[-last:]
    places = dict.fromkeys(place for row in like for place in row.levels)
    found = []
    for model, load, number in places:
        for name in figures:
            values = tuple(_value(row, (model, load, number), name) for row in like)
            if any(value is not None for value in values):
                title = load + (f" (number {number + 1})" if number else "")
                few = tuple(name in row.indicative.get((model, load, number), ()) for row in like)
                found.append(Series(model, title, FIGURES[name], values, few, changes(values)))
    return Trend(rows[-1].scenario, tuple(like), unlike, tuple(found))


def _kind(row: Row) -> tuple[str, str, str]:
    return row.scenario_hash, row.machine, row.served_at


def _value(row: Row, place: tuple[str, str, int], figure: str) -> float | None:
    return row.levels.get(place, {}).get(figure)


def changes(values: Sequence[float | None]) -> tuple[Change, ...] | None:
    """Where the level changed; None where that cannot be told."""
    places = [place for place, value in enumerate(values) if value is not None]
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if known.size < FEWEST or not can_tell():
        return None
    borders = [0, *_borders(known), known.size]
    found: list[Change] = []
    before = statistics.median(known[: borders[1]])
    for start, end in pairwise(borders[1:]):
        after = statistics.median(known[start:end])
        if abs(after - before) > WORTH * abs(before):
            found.append(Change(places[start], float(before), float(after)))
            before = after
    return tuple(found)


def _borders(values: Floats) -> list[int]:
    """Where another level begins, as ruptures has it."""
    import ruptures

    scaled = np.log(values) if values.min() > 0 else values  # what doubles and what halves is as far
    spread = float(scaled.std())
    if spread <= 1e-9 * max(1.0, abs(float(scaled.mean()))):
        return []
    found = ruptures.Pelt(model="l2", min_size=SEGMENT, jump=1).fit(((scaled - scaled.mean()) / spread)[:, None])
    return [int(border) for border in found.predict(pen=penalty(values.size))[:-1]]


def penalty(runs: int) -> float:
    """What another change has to explain of the squares, in units of the series' variance.

    With one change, the share R² that it explains is beta distributed where there is none: (1/2, (n - 2)/2), which is
    the two-sample t test in other words; divided among the places where it can be (Bonferroni). So of 400 series of
    noise each, of 10 to 60 runs, at most one had a change, and 3 to 16 where each run took 0.4 of its noise from the
    one before. A step of 20 % in noise of 3 % was found to the run in 91 % three runs after it, in 97 % after five.
    """
    from scipy.stats import beta

    return runs * float(beta.ppf(1 - ALARM / (runs - 2 * SEGMENT + 1), 0.5, (runs - 2) / 2))
