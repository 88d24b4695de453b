"""Judges the figures of two sets of runs: what each answer takes, and what a gate could not hold.

How far apart two sets are is ``runwise``'s; whose values they are is no business of this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loadbench.analysis import compare_words
from loadbench.analysis.compare_figures import LEAST_SHARE, MEMORY, Figure
from loadbench.analysis.compared import Answer, Compared, Row, Side
from loadbench.analysis.runwise import ALARM, Shift, chances, runs_needed, shift
from loadbench.analysis.stats import Floats

RUNS = 5  # a side: 4 against 4 can be dealt out in 70 ways only


@dataclass(frozen=True, slots=True)
class Cells:
    """The values of one figure of one level, run by run, before anything is made of them.

    ``needs``: as many runs a side must have a value, or a gate does not hold what the base has: five, or as many as the
    base had before runs were left out because something else was busy.
    """

    figure: Figure
    base: Side
    new: Side
    needs: int


Matched = tuple[Compared, Sequence[Cells]]


def judged(levels: Sequence[Matched], least_effect: float) -> list[Compared]:
    """Every level with its rows; which changes are more than chance is asked of all of them at once."""
    gating = [c for _, cells in levels for c in cells if c.figure.gates and min(c.base.runs, c.new.runs) >= RUNS]
    by_cells: dict[int, tuple[float, float]] = {}
    if gating:
        base, new = (
            np.array([[c.figure.worse(v) for v in (c.base, c.new)[side].values] for c in gating]).T for side in (0, 1)
        )
        both = zip(chances(base, new).tolist(), chances(-base, -new).tolist(), strict=True)
        by_cells = {id(c): chance for c, chance in zip(gating, both, strict=True)}
    return [
        replace(level, rows=tuple(_row(c, by_cells.get(id(c)), least_effect, level.left_out) for c in cells))
        for level, cells in levels
    ]


def worst(levels: Sequence[Compared], least_effect: float, *, incomplete: bool) -> Answer:
    """What is told of all: better only where nothing that is judged may be worse."""
    rows = [row for level in levels for row in level.rows if row.gates]
    answers = {row.answer for row in rows}
    if "regressed" in answers:
        return "regressed"
    if incomplete or not answers:
        return "inconclusive"
    if "improved" in answers and not any(_may_be_worse(row, least_effect) for row in rows):
        return "improved"
    return "equivalent" if answers == {"equivalent"} else "inconclusive"


def _may_be_worse(row: Row, least_effect: float) -> bool:
    if row.answer != "inconclusive" or not _has_number(row.base):
        return False
    if row.low is None or row.high is None:
        return True
    least = LEAST_SHARE if row.kind == "difference" else least_effect
    none = 0.0 if row.kind == "difference" else 1.0
    return row.high > none + least if row.lower_is_better else row.low < none - least


def _has_number(side: Side) -> bool:
    return any(value is not None and math.isfinite(value) for value in side.values)


def has_answer(level: Compared) -> bool:
    """Whether what the level is about has one: that none failed, twice, says nothing of speed, nor does memory."""
    of_size = [row for row in level.rows if row.gates and row.kind == "ratio"]
    telling = [row for row in of_size if row.metric != MEMORY.name] or of_size
    return any(row.answer not in (None, "inconclusive") for row in telling)


def missing(levels: Sequence[Compared], matched: Sequence[Matched]) -> Iterator[str]:
    """A line for every level in which figures that the base has lack values: a gate does not hold those."""
    for level, (_, all_cells) in zip(levels, matched, strict=True):
        told = {cells.figure.name: cells for cells in all_cells}
        rows = [row for row in level.rows if row.gates and row.answer == "inconclusive"]
        lacking = [row for row in rows if _lacks(told[row.metric])]
        if lacking:
            yield compare_words.lacking(level, lacking)


def _lacks(cells: Cells) -> bool:
    return min(_known(cells.figure, side).size for side in (cells.base, cells.new)) < cells.needs


def _row(cells: Cells, chance: tuple[float, float] | None, least_effect: float, left_out: Sequence[str]) -> Row:
    """``chance`` is of so clear a change for the worse and for the better, None: of too few runs."""
    figure = cells.figure
    base, new = (_known(figure, side) for side in (cells.base, cells.new))
    apart = shift(base, new) if np.isfinite([*base, *new]).any() and base.size and new.size else None
    answer, because = None, None
    if figure.gates:
        answer, because = _answer(figure, apart, chance, least_effect)
        if answer == "inconclusive" and because is None:
            because = _takes(figure, base, new, least_effect, left_out)
    ends = [] if apart is None else [figure.change(end) for end in (apart.low, apart.high)]
    low, high = sorted(end for end in ends if end is not None) or (None, None)
    return Row(
        metric=figure.name,
        title=figure.title,
        unit=figure.unit,
        kind=figure.kind,
        lower_is_better=figure.lower_is_better,
        gates=figure.gates,
        base=cells.base,
        new=cells.new,
        change=None if apart is None else figure.change(apart.value),
        low=low,
        high=high,
        chance=None if chance is None else chance[0] if apart is not None and apart.value > 0 else chance[1],
        answer=answer,
        because=because,
    )


def _answer(
    figure: Figure, apart: Shift | None, chance: tuple[float, float] | None, least_effect: float
) -> tuple[Answer, str | None]:
    """The answer, and of a change that may be chance how likely that is."""
    if apart is None or apart.low is None or apart.high is None or chance is None:
        return "inconclusive", None
    least = figure.least(least_effect)
    if -least <= apart.low and apart.high <= least:
        return "equivalent", None
    if apart.low > least:
        return ("regressed", None) if chance[0] <= ALARM else ("inconclusive", compare_words.by_chance(chance[0]))
    if apart.high < -least:
        return ("improved", None) if chance[1] <= ALARM else ("inconclusive", compare_words.by_chance(chance[1]))
    return "inconclusive", None


def _known(figure: Figure, side: Side) -> Floats:
    values = np.array([figure.worse(value) for value in side.values])
    known: Floats = values[~np.isnan(values)]
    return known


def _takes(figure: Figure, base: Floats, new: Floats, least_effect: float, left_out: Sequence[str]) -> str:
    """What it would take for an answer."""
    why = f"{'; '.join(left_out)}: " if left_out and min(base.size, new.size) < RUNS else ""
    if not base.size or not new.size:
        few = "" if why else ": no run has samples enough" if figure.times else ": no run has a value"
        return f"{why}nothing in {'the base' if new.size else 'the new runs'} to compare with{few}"
    if not np.isfinite([*base, *new]).any():
        return "over capacity in all runs of both, where latencies only say how long a level was"
    least = figure.least(least_effect)
    needed = runs_needed(base, new, abs(abs(shift(base, new).value) - least))
    have = min(base.size, new.size)
    if have < RUNS:
        return f"{why}{max(RUNS, needed or RUNS)} runs a side are needed, {base.size} and {new.size} have a value"
    if not np.isfinite([*base, *new]).all():
        return "over capacity in some runs, and not in others: more runs would tell"
    return compare_words.more_runs(needed, have)
