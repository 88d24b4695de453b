"""Compares two sets of runs, level by level and figure by figure: regressed, equivalent, improved or inconclusive.

The run is the unit: whether two sets may be compared at all is ``provenance``'s, how far apart they are ``runwise``'s,
what that makes of a figure ``compare_judge``'s, how it is put into words ``compare_words``'. A figure has regressed
where

- there are five runs a side or more,
- the whole interval of its change lies beyond the least effect, and
- so clear a change in *any* figure that gates, on any level, comes by chance in one comparison of a hundred at most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from loadbench import __version__
from loadbench.analysis import compare_words, provenance
from loadbench.analysis.compare_figures import DIED, FIGURES, OF_RUNGS, Figure
from loadbench.analysis.compare_judge import RUNS, Cells, has_answer, judged, missing, worst
from loadbench.analysis.compare_words import BUSY, WhyNot
from loadbench.analysis.compared import SCHEMA, Compared, Comparison, RunName, Said, Side
from loadbench.analysis.group import Loaded
from loadbench.analysis.road import is_over
from loadbench.analysis.runwise import ALARM
from loadbench.analysis.summary import ClosedLoad, Level, Summary
from loadbench.analysis.words import is_fixed, load_of
from loadbench.errors import UsageError
from loadbench.records import load_title
from loadbench.target.state import DEAD

LEAST_EFFECT = 0.05


class ProvenanceError(UsageError):
    """The runs do not measure the same thing."""


def compare(
    base: Sequence[Loaded],
    new: Sequence[Loaded],
    *,
    least_effect: float = LEAST_EFFECT,
    force: bool = False,
    allow_doubtful: bool = False,
) -> Comparison:
    """The new runs against the base. ProvenanceError where they do not measure the same thing, unless ``force``.

    ``allow_doubtful`` counts runs, too, that the client shaped, or something else that was busy on one side only.
    """
    found = provenance.differences([one.facts for one in base], [one.facts for one in new])
    apart = [difference for difference in found if difference.about != "instrument"]
    if apart and not force:
        raise ProvenanceError(compare_words.refusal(apart))
    paired = _pairs(base, new)
    matched, gone, come = _levels(base, new, paired, doubtful=allow_doubtful)
    levels = judged(matched, least_effect)
    comparison = Comparison(
        schema=SCHEMA,
        loadbench=__version__,
        name=new[0].summary.name,
        base=tuple(map(_name, base)),
        new=tuple(map(_name, new)),
        least_effect=least_effect,
        alarm=ALARM,
        answer=worst(levels, least_effect, incomplete=bool(gone or come)),
        compared=any(map(has_answer, levels)),
        text="",
        differences=found,
        levels=tuple(levels),
        not_compared=(*gone, *come),
        answers=_answers(base, new, paired),
        environment=new[0].summary.environment,
        endpoint=new[0].summary.endpoint,
        missing=(*gone, *missing(levels, matched)),
    )
    return replace(comparison, text=compare_words.text(comparison))


def repeated(runs: Sequence[Loaded]) -> list[tuple[Compared, list[Cells]]]:
    """The figures of one set, level by level: how they scatter from run to run."""
    found, _, _ = _levels(runs, runs, {model: model for model in _models(runs)}, doubtful=True)
    return [(level, [bounded for cells in told if (bounded := _bounded(cells)).base.runs]) for level, told in found]


def _bounded(cells: Cells) -> Cells:
    """Without what is worse than any number: it has no scatter."""
    values = tuple(None if value is None or math.isinf(value) else value for value in cells.base.values)
    return replace(cells, base=_of_values(values, cells.base.indicative))


def _name(one: Loaded) -> RunName:
    summary = one.summary
    return RunName(str(one.path), summary.started, summary.status, provenance.hash_of(one.facts))


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
    base: Sequence[Loaded], new: Sequence[Loaded], paired: Mapping[str, str], *, doubtful: bool
) -> tuple[list[tuple[Compared, list[Cells]]], list[str], list[str]]:
    """Every level that both sets have, with its values; what only the base has; what only the new runs have."""
    same = {model: model for model in _models(base)}
    ours, theirs = [_by_key(one.summary, same) for one in base], [_by_key(one.summary, paired) for one in new]
    known = [dict.fromkeys(key for run in side for key in run) for side in (ours, theirs)]
    both = [key for key in known[0] if key in known[1]]
    found = [
        _level(key, [run.get(key) for run in ours], [run.get(key) for run in theirs], paired, doubtful=doubtful)
        for key in both
    ]
    found += _searches(base, new, paired)
    gone = [f"{_titled(key)} of {key[0]}: in no new run" for key in known[0] if key not in known[1]]
    come = [f"{_titled(key)} of {key[0]}: in no base run" for key in known[1] if key not in known[0]]
    return found, gone, come


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
    key: Key, base: Sequence[Level | None], new: Sequence[Level | None], paired: Mapping[str, str], *, doubtful: bool
) -> tuple[Compared, list[Cells]]:
    model, purpose = key[:2]
    one = next(level for level in new if level is not None)
    counts = _why_not_if_doubtful if doubtful else _why_not
    why_not = counts if doubtful else _with_busy(base, new)
    cells = []
    for figure in OF_RUNGS if purpose == "rung" else FIGURES:
        before, after = _side(figure, base, counts), _side(figure, new, counts)
        if _is_told(figure, before, after):
            needs = min(RUNS, before.runs)
            cells.append(Cells(figure, _side(figure, base, why_not), _side(figure, new, why_not), needs))
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
    return compared, cells


def _is_told(figure: Figure, base: Side, new: Side) -> bool:
    values = [value for value in (*base.values, *new.values) if value is not None]
    return bool(values) and (figure.always or any(values))


def _why_not(level: Level | None) -> str | None:
    """Why a level of a run does not count; None: it does."""
    if level is not None and level.complete and level.client.bound and level.purpose != "rung":
        return _why_not_if_doubtful(level) or "client-bound"
    return _why_not_if_doubtful(level)


def _why_not_if_doubtful(level: Level | None) -> str | None:
    if level is None:
        return "not measured"
    if level.target.state in DEAD:
        return f"target {level.target.state.replace('_', ' ')}"
    return None if level.complete else "cut short"


def _with_busy(base: Sequence[Level | None], new: Sequence[Level | None]) -> WhyNot:
    """Why a level does not count, with what was busy beside it on one side more often than on the other.

    Runs that something else slows on one side only are not like the others, and "one false alarm in a hundred" holds
    of runs that are. Where both sides had as much of it, they are.
    """
    sides = [[level for level in side if _why_not(level) is None] for side in (base, new)]
    shares = {
        about: [sum(_is_marked(level, about) for level in side) / max(1, len(side)) for side in sides] for about in BUSY
    }
    apart = [about for about, (ours, theirs) in shares.items() if ours != theirs]

    def why_not(level: Level | None) -> str | None:
        return _why_not(level) or next((BUSY[about] for about in apart if _is_marked(level, about)), None)

    return why_not


def _is_marked(level: Level | None, about: str) -> bool:
    return level is not None and level.purpose != "rung" and any(caution.about == about for caution in level.cautions)


def _side(figure: Figure, levels: Sequence[Level | None], why_not: WhyNot) -> Side:
    values = tuple(_value(figure, level, why_not) for level in levels)
    counted = [level for level, value in zip(levels, values, strict=True) if level is not None and value is not None]
    return _of_values(values, sum(figure.indicative(level) for level in counted if not is_over(level.road)))


def _of_values(values: tuple[float | None, ...], indicative: int = 0) -> Side:
    known = [value for value in values if value is not None]
    beyond = sum(map(math.isinf, known))
    return Side(values, float(np.median(known)) if known else None, indicative, beyond)


def _value(figure: Figure, level: Level | None, why_not: WhyNot) -> float | None:
    if level is None or (why_not(level) is not None and figure is not DIED):
        return None
    value = figure.get(level)
    # Over capacity a latency only says how long the level was, and is worse than any that says more.
    return math.inf if value is not None and figure.times and is_over(level.road) else value


def _searches(
    base: Sequence[Loaded], new: Sequence[Loaded], paired: Mapping[str, str]
) -> list[tuple[Compared, list[Cells]]]:
    """The largest load within the SLO, where both sets searched for it."""
    found = []
    sought = {(search.model, search.find, search.unit) for one in base for search in one.summary.searches}
    for model, find, unit in sorted(sought):
        theirs = {theirs for theirs, ours in paired.items() if ours == model}
        before, after = (
            _of_values(
                tuple(
                    next((s.answer for s in one.summary.searches if s.model in names and s.find == find), None)
                    for one in side
                )
            )
            for side, names in ((base, {model}), (new, theirs))
        )
        figure = Figure("search.answer", "Largest load", unit, lambda level: None, lower_is_better=False)
        told = Compared(model, next(iter(theirs), model), find, "search", None, None, (), (), ())
        found.append((told, [Cells(figure, before, after, min(RUNS, before.runs))]))
    return found


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
        place = (names.get(told.model, told.model), told.of, told.place)
        found.setdefault(place, set()).update(variant.answer_hash for variant in told.variants)
    return found
