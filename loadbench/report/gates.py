"""What became of every promise of a run: the clauses of its SLO, its searches, and what its command line asserted.

They tell what the exit code tells. A clause that is not kept where that is an answer, as above the lowest rung of a
ladder or at a probe, is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from loadbench.analysis import verdict, words
from loadbench.analysis.assertion import WHOLE_SLO
from loadbench.analysis.slo import as_gate
from loadbench.analysis.summary import Gate, Level, Summary
from loadbench.report.content import place

Kept = Literal["pass", "fail", "invalid", "skipped"]


@dataclass(frozen=True, slots=True)
class Promise:
    """One clause at one level; ``where`` names that. ``told``: how it went. None: of no level, or model, that is."""

    name: str
    model: str | None
    level: Level | None
    where: str
    kept: Kept
    told: str

    @property
    def title(self) -> str:
        return f"{self.name} at {self.where}" if self.where else self.name


def promises(summary: Summary) -> Iterator[Promise]:
    """Model by model, level by level, the SLO's before what was asserted; last what is of no level."""
    counting = {level.index for level in verdict.gates(summary)}
    models = list(dict.fromkeys(level.model for level in summary.levels))
    for model in models:
        for level in (level for level in summary.levels if level.model == model):
            yield from _of_level(level, summary, level.index in counting)
        yield from _of_search(model, summary)
    yield from (_asserted(gate, None, summary) for gate in summary.gates if gate.level is None)


def _of_level(level: Level, summary: Summary, counts: bool) -> Iterator[Promise]:
    gates = [gate for gate in summary.gates if gate.level == level.index]
    asserted = any(gate.asserted.startswith(WHOLE_SLO) for gate in gates)
    for clause in () if asserted else level.slo:
        kept: Kept
        kept, because = as_gate(clause, summary.allow_indicative)
        told = words.clause(clause)
        if kept != "pass" and not counts:
            kept, told = "skipped", f"{told}; only the lowest load has to keep it"
        if clause.result == "undecided" and because:
            told += f" ({because})"
        yield Promise(f"slo {clause.clause}", level.model, level, verdict.named(level, summary), kept, told)
    yield from (_asserted(gate, level, summary) for gate in gates)


def _of_search(model: str, summary: Summary) -> Iterator[Promise]:
    for search in summary.searches:
        if search.model == model:
            kept: Kept = "pass"
            if search.result in ("none", "undecided"):
                kept = "fail" if search.result == "none" else "invalid"
            answer = "" if search.answer is None else f"{words.load(search.answer, search.unit)}, "
            yield Promise(f"search {search.find}", model, None, "", kept, f"{answer}{search.because}")


def _asserted(gate: Gate, level: Level | None, summary: Summary) -> Promise:
    if level is None:
        return Promise(gate.asserted, None, None, "", gate.result, words.gate(gate))
    where = verdict.named(level, summary)
    name = gate.asserted.partition("@")[0].strip()
    return Promise(_with_clause(name, gate), level.model, level, where, gate.result, words.gate(gate))


def _with_clause(name: str, gate: Gate) -> str:
    """Of a whole SLO that was asserted the clause too."""
    return f"{name} {gate.clause}" if gate.asserted.startswith(WHOLE_SLO) and gate.clause != WHOLE_SLO else name


def lines(summary: Summary) -> list[tuple[str, str]]:
    """Each assertion with where it passed, failed or could not be told, and by what value."""
    return [
        (title, "; ".join(f"{result} {_told(told[result])}" for result in _WORST_FIRST if result in told))
        for title, told in results(summary).items()
    ]


def _told(found: list[tuple[str, str]]) -> str:
    return ", ".join(f"at {where} {why}" if where else why for where, why in found)


def results(summary: Summary) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """By assertion and result its places, each with its value or reason; a place is empty where it is of no level."""
    levels = {level.index: level for level in summary.levels}
    told: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for gate in summary.gates:
        value = [] if gate.value is None else [words.measured(gate.value, gate.unit)]
        where = "" if gate.level is None else place(summary, levels[gate.level])
        known = ", ".join([*value, *([gate.because] if gate.because else [])])
        told.setdefault(_with_clause(gate.asserted, gate) + _limit(gate), {}).setdefault(gate.result, []).append(
            (where, f"({known})")
        )
    return told


def _limit(gate: Gate) -> str:
    """The scenario's limit where the whole SLO is asserted: an assertion of its own says it itself."""
    if gate.limit is None or not gate.asserted.startswith(WHOLE_SLO):
        return ""
    return f" {'≥' if gate.comparison == '>=' else '≤'} {words.measured(gate.limit, gate.unit)}"


_WORST_FIRST = ("fail", "invalid", "pass")
