"""Compares two sets of runs, level by level and figure by figure: regressed, equivalent, improved or inconclusive.

The run is the unit: how far apart two sets are is ``runwise``'s, whether they may be compared at all ``provenance``'s,
how it is put into words ``compare_words``'. A figure has regressed where

- there are five runs a side or more,
- the whole interval of its change lies beyond the least effect, and
- so clear a change in *any* figure that gates, on any level, comes by chance in one comparison of a hundred at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from loadbench import __version__
from loadbench.analysis import compare_words, provenance
from loadbench.analysis.compare_figures import DIED, FIGURES, OF_RUNGS, Figure
from loadbench.analysis.compare_words import WhyNot
from loadbench.analysis.compared import SCHEMA, Answer, Compared, Comparison, Row, RunName, Said, Side
from loadbench.analysis.group import Loaded
from loadbench.analysis.road import is_over
from loadbench.analysis.runwise import ALARM, chances, runs_needed, shift
from loadbench.analysis.stats import Floats
from loadbench.analysis.summary import ClosedLoad, Level, Summary
from loadbench.analysis.words import is_fixed, load_of
from loadbench.errors import UsageError
from loadbench.records import load_title
from loadbench.target.state import DEAD

RUNS = 5  # a side: 4 against 4 can be dealt out in 70 ways only
LEAST_EFFECT = 0.05


class ProvenanceError(UsageError):
    """The runs do not measure the same thing."""


def compare(
    base: Sequence[Loaded], new: Sequence[Loaded], *, least_effect: float = LEAST_EFFECT, force: bool = False
) -> Comparison:
    """The new runs against the base. ProvenanceError where they do not measure the same thing, unless ``force``.

    ``force`` also counts what the client shaped.
    """
    found = provenance.differences([one.facts for one in base], [one.facts for one in new])
    apart = [difference for difference in found if difference.about != "instrument"]
    if apart and not force:
        raise ProvenanceError(compare_words.refusal(apart))
    paired = _pairs(base, new)
    matched, unmatched = _levels(base, new, paired, _why_not_by_force if force else _why_not)
    levels = _judged(matched, least_effect)
    told = [row for level in levels for row in level.rows if row.gates]
    comparison = Comparison(
        schema=SCHEMA,
        loadbench=__version__,
        name=new[0].summary.name,
        base=tuple(map(_name, base)),
        new=tuple(map(_name, new)),
        least_effect=least_effect,
        alarm=ALARM,
        answer=_worst(told, bool(unmatched)),
        compared=any(row.answer not in (None, "inconclusive") for row in told),
        text="",
        differences=found,
        levels=tuple(levels),
        not_compared=tuple(unmatched),
        answers=_answers(base, new, paired),
        environment=new[0].summary.environment,
        endpoint=new[0].summary.endpoint,
    )
    return replace(comparison, text=compare_words.text(comparison))


def repeated(runs: Sequence[Loaded]) -> list[tuple[Compared, list[Cells]]]:
    """The figures of one set, level by level: how they scatter from run to run."""
    return _levels(runs, runs, {model: model for model in _models(runs)}, _why_not_by_force)[0]


def _name(one: Loaded) -> RunName:
    summary = one.summary
    return RunName(str(one.path), summary.started, summary.status, provenance.hash_of(one.facts))


def _worst(rows: Sequence[Row], incomplete: bool) -> Answer:
    answers = {row.answer for row in rows}
    if "regressed" in answers:
        return "regressed"
    if incomplete or not answers:
        return "inconclusive"
    order: tuple[Answer, ...] = ("improved", "inconclusive", "equivalent")
    return next(answer for answer in order if answer in answers)


@dataclass(frozen=True, slots=True)
class Cells:
    """The values of one figure of one level, run by run, before anything is made of them."""

    figure: Figure
    base: Side
    new: Side


Key = tuple[str, str, str, int]
"""Model (as the base calls it), rung or level, load, and which of several of that load."""


def _pairs(base: Sequence[Loaded], new: Sequence[Loaded]) -> dict[str, str]:
    """What the base calls each model of the new runs: the same, but where as many others stand in their places."""
    ours, theirs = _models(base), _models(new)
    gone, come = [m for m in ours if m not in theirs], [m for m in theirs if m not in ours]
    return {model: model for model in theirs} | (dict(zip(come, gone, strict=True)) if len(gone) == len(come) else {})


def _models(side: Sequence[Loaded]) -> list[str]:
    return list(dict.fromkeys(model.id for one in side for model in one.summary.models if model.id is not None))


def _levels(
    base: Sequence[Loaded], new: Sequence[Loaded], paired: Mapping[str, str], why_not: WhyNot
) -> tuple[list[tuple[Compared, list[Cells]]], list[str]]:
    """Every level that both sets have, with its values; and what only one of them has."""
    same = {model: model for model in _models(base)}
    ours, theirs = [_by_key(one.summary, same) for one in base], [_by_key(one.summary, paired) for one in new]
    known = [dict.fromkeys(key for run in side for key in run) for side in (ours, theirs)]
    both = [key for key in known[0] if key in known[1]]
    found = [
        _level(key, [run.get(key) for run in ours], [run.get(key) for run in theirs], paired, why_not) for key in both
    ]
    found += _searches(base, new, paired)
    unmatched = [
        f"{_titled(key)} of {key[0]}: in no {missing} run"
        for here, there, missing in ((known[0], known[1], "new"), (known[1], known[0], "base"))
        for key in here
        if key not in there
    ]
    return found, unmatched


def _titled(key: Key) -> str:
    _, _, load, number = key
    return load + (f" (number {number + 1})" if number else "")


def _by_key(summary: Summary, names: Mapping[str, str]) -> dict[Key, Level]:
    found: dict[Key, Level] = {}
    seen: Counter[tuple[str, str, str]] = Counter()
    for level in summary.levels:
        if level.purpose in ("level", "rung"):  # the probes of a search are where it looked, which differs every time
            key = (names.get(level.model, level.model), level.purpose, load_title(level.load))
            found[*key, seen[key]] = level
            seen[key] += 1
    return found


def _level(
    key: Key, base: Sequence[Level | None], new: Sequence[Level | None], paired: Mapping[str, str], why_not: WhyNot
) -> tuple[Compared, list[Cells]]:
    model, purpose = key[:2]
    one = next(level for level in new if level is not None)
    figures = OF_RUNGS if purpose == "rung" else FIGURES
    cells = [Cells(figure, _side(figure, base, why_not), _side(figure, new, why_not)) for figure in figures]
    compared = Compared(
        model=model,
        new_model=next((theirs for theirs, ours in paired.items() if ours == model), model),
        load=_titled(key),
        loop="closed" if isinstance(one.load, ClosedLoad) else "open",
        x=load_of(one) if is_fixed(one) else None,
        headline=one.headline,
        rows=(),
        left_out=tuple(compare_words.left_out(base, new, why_not)),
        doubts=tuple(compare_words.doubts(base, new, why_not)),
    )
    return compared, [cell for cell in cells if _is_told(cell)]


def _is_told(cells: Cells) -> bool:
    values = [value for value in (*cells.base.values, *cells.new.values) if value is not None]
    return bool(values) and (cells.figure.always or any(values))


def _why_not(level: Level | None) -> str | None:
    """Why a level of a run does not count; None: it does."""
    if level is None:
        return "not measured"
    if level.target.state in DEAD:
        return f"target {level.target.state.replace('_', ' ')}"
    if not level.complete:
        return "cut short"
    return "client-bound" if level.client.bound and level.purpose != "rung" else None


def _why_not_by_force(level: Level | None) -> str | None:
    why = _why_not(level)
    return None if why == "client-bound" else why


def _side(figure: Figure, levels: Sequence[Level | None], why_not: WhyNot) -> Side:
    values = tuple(_value(figure, level, why_not) for level in levels)
    counted = [level for level, value in zip(levels, values, strict=True) if level is not None and value is not None]
    return _of_values(values, sum(figure.indicative(level) for level in counted))


def _of_values(values: tuple[float | None, ...], indicative: int = 0) -> Side:
    known = [value for value in values if value is not None]
    return Side(values, float(np.median(known)) if known else None, indicative)


def _value(figure: Figure, level: Level | None, why_not: WhyNot) -> float | None:
    if level is None or (why_not(level) is not None and figure is not DIED):
        return None
    return None if figure.times and is_over(level.road) else figure.get(level)


def _searches(
    base: Sequence[Loaded], new: Sequence[Loaded], paired: Mapping[str, str]
) -> list[tuple[Compared, list[Cells]]]:
    """The largest load within the SLO, where both sets searched for it."""
    found = []
    sought = {(search.model, search.find, search.unit) for one in base for search in one.summary.searches}
    for model, find, unit in sorted(sought):
        theirs = {theirs for theirs, ours in paired.items() if ours == model}
        sides = [
            _of_values(
                tuple(
                    next((s.answer for s in one.summary.searches if s.model in names and s.find == find), None)
                    for one in side
                )
            )
            for side, names in ((base, {model}), (new, theirs))
        ]
        figure = Figure("search.answer", "Largest load", unit, lambda level: None, lower_is_better=False)
        told = Compared(model, next(iter(theirs), model), find, "search", None, None, (), (), ())
        found.append((told, [Cells(figure, *sides)]))
    return found


def _judged(levels: Sequence[tuple[Compared, Sequence[Cells]]], least_effect: float) -> list[Compared]:
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
        replace(level, rows=tuple(_row(c, by_cells.get(id(c)), least_effect) for c in cells)) for level, cells in levels
    ]


def _row(cells: Cells, chance: tuple[float, float] | None, least_effect: float) -> Row:
    """``chance`` is of so clear a change for the worse and for the better, None: of too few runs."""
    figure = cells.figure
    base, new = (_known(figure, side) for side in (cells.base, cells.new))
    apart = shift(base, new) if base.size and new.size else None
    low, high = (None, None) if apart is None else (apart.low, apart.high)
    answer: Answer | None = None
    because: str | None = None
    worse = apart is not None and apart.value > 0
    if figure.gates:
        answer, because = "inconclusive", _takes(figure, base, new, least_effect)
        least = figure.least(least_effect)
        if chance is not None and low is not None and high is not None:
            if -least <= low and high <= least:
                answer = "equivalent"
            elif low > least and chance[0] <= ALARM:
                answer = "regressed"
            elif high < -least and chance[1] <= ALARM:
                answer = "improved"
            elif low > least or high < -least:
                because = compare_words.by_chance(chance[0] if worse else chance[1])
        because = because if answer == "inconclusive" else None
    ends = sorted(end for end in (figure.change(low), figure.change(high)) if end is not None)
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
        low=ends[0] if ends else None,
        high=ends[1] if ends else None,
        chance=None if chance is None else chance[0] if worse else chance[1],
        answer=answer,
        because=because,
    )


def _known(figure: Figure, side: Side) -> Floats:
    values = np.array([figure.worse(value) for value in side.values])
    known: Floats = values[~np.isnan(values)]
    return known


def _takes(figure: Figure, base: Floats, new: Floats, least_effect: float) -> str:
    """What it would take for an answer."""
    have = min(base.size, new.size)
    if not have:
        few = "too few samples in a run, or all runs left out" if figure.times else "no run has a value"
        return f"nothing in {'the base' if new.size else 'the new runs'} to compare with: {few}"
    least = figure.least(least_effect)
    needed = runs_needed(base, new, abs(abs(shift(base, new).value) - least))
    if have < RUNS:
        wanted = max(RUNS, needed or RUNS)
        return f"{wanted} runs a side are needed, {base.size} and {new.size} have a value"
    return compare_words.more_runs(needed, have)


def _answers(base: Sequence[Loaded], new: Sequence[Loaded], paired: Mapping[str, str]) -> tuple[Said, ...]:
    """The prompts that both sets answered, by the hashes of their answers."""
    ours, theirs = _hashes(base, {}), _hashes(new, paired)
    found = []
    for place in sorted(ours.keys() & theirs.keys()):
        before, after = ours[place], theirs[place]
        result: Literal["same", "changed", "unstable"] = "unstable"
        if len(before) == len(after) == 1:
            result = "same" if before == after else "changed"
        found.append(Said(*place, result, tuple(sorted(before)), tuple(sorted(after))))
    return tuple(found)


def _hashes(side: Sequence[Loaded], names: Mapping[str, str]) -> dict[tuple[str, str, int], set[str]]:
    found: dict[tuple[str, str, int], set[str]] = {}
    for told in (told for one in side for told in one.summary.answers):
        place = (names.get(told.model, told.model), told.kind, told.place)
        found.setdefault(place, set()).update(variant.answer_hash for variant in told.variants)
    return found
