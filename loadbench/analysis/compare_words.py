"""The sentences of a comparison: what came of it, what is not counted and why, and what an answer would take."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from loadbench.analysis import words
from loadbench.analysis.compared import Compared, Comparison, Row
from loadbench.analysis.provenance import Difference
from loadbench.analysis.summary import Level
from loadbench.outcomes import OUTCOMES

MOST_TOLD = 4  # of a kind, in a sentence
OF_FEW = ("few_samples", "over_capacity")  # what the interval over runs holds already, or a row of its own tells

WhyNot = Callable[[Level | None], str | None]

BUSY = {"busy_machine": "the machine was busy", "stolen_cpu": "the hypervisor took CPU time"}
"""Cautions on what ran beside the target: one side's runs are not like the other's where only these have them."""
ON_TOP = BUSY | {"client_bound": "client-bound"}
"""Cautions that the first paragraph repeats of runs that count all the same."""


def refusal(differences: Sequence[Difference]) -> str:
    """Why the runs are not compared, in one line."""
    told = [difference(one) for one in differences[:MOST_TOLD]]
    told += [f"{len(differences) - MOST_TOLD} more"] if differences[MOST_TOLD:] else []
    return f"expected runs of the same thing, got {'; '.join(told)}; --force compares them all the same"


def difference(one: Difference) -> str:
    """``machine cpu: A against B``."""
    about = "" if one.about in one.what else f"{one.about} "
    return f"{about}{one.what}: {one.base} against {one.new}"


def by_chance(chance: float) -> str:
    """Of a change beyond the least effect that is not clear enough among all the figures."""
    return f"runs that do not differ show so much in some figure in {chance:.1%} of comparisons: more runs would tell"


def more_runs(needed: int | None, have: int) -> str:
    """How many runs a side would tell."""
    if needed is None:
        return "the change lies at the least effect itself, or scatters too much: more runs will hardly tell"
    return f"about {max(needed, have + 1)} runs a side would tell"


def left_out(base: Sequence[Level | None], new: Sequence[Level | None], why_not: WhyNot) -> Iterator[str]:
    """``client-bound in 2 of 5 new runs``."""
    for side, levels in (("base", base), ("new", new)):
        for why, count in Counter(filter(None, map(why_not, levels))).items():
            yield f"{why} in {count} of {len(levels)} {side} runs"


def doubts(base: Sequence[Level | None], new: Sequence[Level | None], why_not: WhyNot) -> Iterator[str]:
    """``busy machine in 1 of 5 base runs and 2 of 5 new runs``, of the levels that count."""
    found: dict[str, list[int]] = {}
    sides = [[level for level in side if level is not None and why_not(level) is None] for side in (base, new)]
    for place, levels in enumerate(sides):
        for about in (about for level in levels for about in {caution.about for caution in level.cautions}):
            if about not in OUTCOMES and about not in OF_FEW:
                found.setdefault(about, [0, 0])[place] += 1
    for about, counts in found.items():
        told = [
            f"{count} of {len(levels)} {side} runs"
            for count, levels, side in zip(counts, sides, ("base", "new"), strict=True)
            if count
        ]
        yield f"{ON_TOP.get(about, about.replace('_', ' '))} in {' and '.join(told)}"


def lacking(level: Compared, rows: Sequence[Row]) -> str:
    """``TTFT p50 and TPOT p50 at 4 users of phi-4: …``, of figures that lack values; the commonest reason of theirs."""
    more = [f"{len(rows) - MOST_TOLD} more"] if rows[MOST_TOLD:] else []
    what = words.listed([*(row.title for row in rows[:MOST_TOLD]), *more])
    why = Counter(row.because for row in rows if row.because).most_common(1)
    return f"{what} at {level.load} of {level.model}" + (f": {why[0][0]}" if why else "")


def not_held(comparison: Comparison) -> str:
    """Why a gate has no answer, in one line."""
    if not comparison.missing:
        return "nothing could be compared: no figure has an answer"
    told = "; ".join(comparison.missing[:MOST_TOLD]) + _rest(comparison.missing)
    return f"not all that the base has could be compared: {told}"


def change(row: Row) -> str:
    """``21 % higher``; ``2 points lower`` of a share."""
    if _is_unbounded(row):
        return _without_bound(row)
    if row.change is None:
        return "not to be told"
    if row.kind == "difference":
        return f"{abs(100 * row.change):.3g} points {'higher' if row.change > 0 else 'lower'}"
    return f"{abs(100 * (row.change - 1)):.3g} % {'higher' if row.change > 1 else 'lower'}"


def _is_unbounded(row: Row) -> bool:
    """Whether one side has no number to make a ratio of; compare.json has its change as null."""
    if row.change is None:
        return row.base.beyond != row.new.beyond
    return row.kind == "ratio" and (row.change == 0 or math.isinf(row.change))


def _without_bound(row: Row) -> str:
    if row.new.beyond != row.base.beyond:
        now = row.new.beyond > row.base.beyond
        return "beyond any number, over capacity" if now else "a number again, no longer over capacity"
    return "down to nothing" if row.change == 0 else "up from nothing"


def size(row: Row) -> tuple[bool, float]:
    """What is to be told first: requests that fail and targets that die, then the greatest change."""
    if row.kind == "difference":
        return True, abs(row.change or 0.0)
    return False, math.inf if _is_unbounded(row) else abs(math.log(row.change or 1.0))


def text(comparison: Comparison) -> str:
    """The paragraph on top."""
    return " ".join(_sentences(comparison))


def _sentences(comparison: Comparison) -> Iterator[str]:
    rows = [(level, row) for level in comparison.levels for row in level.rows if row.gates]
    least = f"{100 * comparison.least_effect:.3g} %"
    sets = f"{_runs(len(comparison.new), 'new')} against {_runs(len(comparison.base), 'of the base')}"
    counts = Counter(row.answer for _, row in rows)
    yield f"{HEADS[comparison.answer]}: {sets}."
    for answer, told in (("regressed", "Worse"), ("improved", "Better")):
        found = [(level, row) for level, row in rows if row.answer == answer]
        found.sort(key=lambda one: size(one[1]), reverse=True)
        if found:
            named = [f"{row.title} at {level.load}{_of(level, comparison)} {change(row)}" for level, row in found]
            more = [f"{len(named) - MOST_TOLD} more"] if named[MOST_TOLD:] else []
            yield f"{told}: {words.listed([*named[:MOST_TOLD], *more])}."
    if counts["equivalent"]:
        yield f"{counts['equivalent']} of {len(rows)} figures are the same within {least}."
    if counts["inconclusive"]:
        reasons = Counter(row.because for _, row in rows if row.answer == "inconclusive" and row.because)
        (why, count), *others = reasons.most_common() or [("", 0)]
        of_these = f" for {count} of these" if others else ""
        verb = "is" if counts["inconclusive"] == 1 else "are"
        yield f"{counts['inconclusive']} of {len(rows)} {verb} inconclusive{of_these}: {why}."
    yield from _left_out(comparison)
    if comparison.not_compared:
        yield f"Not compared: {words.listed(comparison.not_compared[:MOST_TOLD])}{_rest(comparison.not_compared)}."
    yield from _provenance(comparison)
    yield from _answers(comparison)


def _left_out(comparison: Comparison) -> Iterator[str]:
    """What does not count, and what counts all the same though it is not as it should be."""
    for level in comparison.levels:
        if not level.rows:
            yield f"Nothing counts at {level.load}{_of(level, comparison)}: {words.listed(level.left_out)}."
    counted = [level for level in comparison.levels if level.rows]
    yield from _by_line("Left out", comparison, [(level, line) for level in counted for line in level.left_out])
    doubts = [(level, line) for level in counted for line in level.doubts if line.startswith(tuple(ON_TOP.values()))]
    yield from _by_line("Bear in mind", comparison, doubts)


def _by_line(what: str, comparison: Comparison, told: Sequence[tuple[Compared, str]]) -> Iterator[str]:
    """``Left out: client-bound in 1 of 5 new runs, at 4 users and 8 users.``"""
    for line in list(dict.fromkeys(line for _, line in told))[:MOST_TOLD]:
        places = [f"{level.load}{_of(level, comparison)}" for level, other in told if other == line]
        yield f"{what}: {line}, at {words.listed(places[:MOST_TOLD])}{_rest(places)}."


HEADS = {
    "regressed": "Regressed",
    "improved": "Improved",
    "equivalent": "Equivalent",
    "inconclusive": "Inconclusive",
}


def _provenance(comparison: Comparison) -> Iterator[str]:
    forced = [one for one in comparison.differences if one.about != "instrument"]
    ours = [one for one in comparison.differences if one.about == "instrument"]
    if forced:
        yield f"By force, though these differ: {'; '.join(map(difference, forced[:MOST_TOLD]))}{_rest(forced)}."
    if ours:
        yield f"What measured differs, too: {'; '.join(map(difference, ours[:MOST_TOLD]))}{_rest(ours)}."


def _answers(comparison: Comparison) -> Iterator[str]:
    counts = Counter(said.result for said in comparison.answers)
    if not counts:
        return
    total = len(comparison.answers)
    told = [f"{counts['same']} as before, byte for byte"]
    told += [f"{counts['changed']} otherwise"] if counts["changed"] else []
    told += [f"{counts['unstable']} in several ways in one of the sets"] if counts["unstable"] else []
    yield f"Of {total} prompt{'' if total == 1 else 's'}, answered {words.listed(told)}."


def _rest(told: Sequence[object]) -> str:
    return f" and {len(told) - MOST_TOLD} more" if told[MOST_TOLD:] else ""


def _runs(count: int, of: str) -> str:
    run = "run" if count == 1 else "runs"
    return f"{count} {run} {of}" if of.startswith("of") else f"{count} {of} {run}"


def _of(level: Compared, comparison: Comparison) -> str:
    return f" of {level.model}" if len({other.model for other in comparison.levels}) > 1 else ""
