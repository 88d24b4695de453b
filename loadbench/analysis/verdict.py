"""The paragraph on top of a report, as an engineer would say it to a colleague, and the exit code.

From the Summary's numbers alone, and only from firm ones; where they are not, it says so. What a model carries is told
by ``sentences`` and ``open_words``, what its memory does by ``memory_words``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from loadbench.analysis import fleet, left_out, memory_words, open_words, sentences, sharded, words
from loadbench.analysis.assertion import WHOLE_SLO
from loadbench.analysis.cautions import ENDED, STATUS
from loadbench.analysis.findings import Result
from loadbench.analysis.ladder import MEMORY_FAILURE
from loadbench.analysis.ranking import side_by_side
from loadbench.analysis.slo import GateResult, as_gate, slo_of, worst
from loadbench.analysis.summary import ClosedLoad, Gate, Level, SloClause, Summary, Verdict
from loadbench.records import load_title
from loadbench.target.state import DEAD

# Worst first; as MEASUREMENT.md names them.
STATES = ("oom_killed", "crashed", "unreachable", "wedged", "oom_reported", "restarted", "degraded", "healthy")
MOST_GATES = 5  # told in one sentence
_SEARCHED: dict[str, Result] = {"confirmed": "pass", "unbounded": "pass", "none": "fail", "undecided": "undecided"}


def of(summary: Summary) -> Verdict:
    """The verdict on a run."""
    return Verdict(text=" ".join(_sentences(summary)), target=_worst_state(summary), slo=_slo_result(summary))


def exit_code(summary: Summary) -> int:
    """0 done · 3 a model was not servable · 93 target died · 94 invalid · 99 SLO or gate missed · 130 interrupted.

    What asks how far a target goes is answered, not failed, by the load at which it ends. So of a search its result
    counts and no probe: 99 where even the lowest load misses the SLO, 94 where it found no answer, as for every gate
    without a firm value. And of a ladder its lowest rung counts, whichever rules end it: that one must hold, or no load
    does, and those above are there to be missed. A list that the SLO may end is one too; any other list names its loads
    as those to hold, and every one counts. A memory ladder until failure asks for the target's death; any other death
    is one, even if the run went on after it. What was asserted counts wherever it was held, and an assertion without a
    firm value is no pass: 94, unless something was missed, which no further sample would mend. So it is of the SLO,
    at the levels where it counts.
    """
    if summary.status == "target_died":
        return 93
    if summary.status == "interrupted":
        return 130
    if _died(summary) or fleet.deaths(summary.levels):
        return 93
    if any(model.status == "failed" for model in summary.models):
        return 3
    levels, summary = summary.levels, sharded.of_its_part(summary)
    if summary.status != "complete" or any(_invalid(level, summary) for level in _valid_needed(summary)):
        return 94
    if not levels:
        answered = answers_only(summary) and any(told.answers > told.failed for told in summary.quality)
        return 0 if answered and not summary.gates else 94
    if any(search.result == "undecided" for search in summary.searches) or _gave_up(summary):
        return 94
    results = {gate.result for gate in summary.gates} | {result for _, _, result, _ in _promised(summary)}
    if "fail" in results or any(search.result == "none" for search in summary.searches):
        return 99
    return 94 if "invalid" in results else 0


def answers_only(summary: Summary) -> bool:
    """Whether the run was to gather answers for quality, and no level was asked for."""
    return not summary.levels_planned and bool(summary.quality)


def why(summary: Summary, code: int) -> str:
    """Why the exit code is what it is, in one line."""
    if code == 99:
        missed = [f"{s.model} {s.because.removeprefix('missed ')}" for s in summary.searches if s.result == "none"]
        missed += [f"{c.clause} at {named(level, summary)}" for level, c, how, _ in _promised(summary) if how == "fail"]
        told = [f"SLO missed: {', '.join(missed)}"] if missed else []
        asserted = _of_gates(summary, "fail")
        return "; ".join([*told, *([f"gate missed: {'; '.join(asserted)}"] if asserted else [])])
    if code == 3:
        unserved = [(model.id or model.asked, model.reason) for model in summary.models if model.status == "failed"]
        reasons = [reason if name in reason else f"{name}: {reason}" for name, reason in unserved if reason]
        return f"not every model could be served: {'; '.join(reasons)}"
    if code == 93 and summary.status != "target_died":
        died = [f"{level.target.state} at {load_title(level.load)} of {level.model}" for level in _died(summary)]
        return f"target died: {'; '.join([*died, *fleet.deaths(summary.levels)])}"
    if summary.reason:
        return f"{'target died' if code == 93 else 'result invalid'}: {summary.reason}"
    if summary.status != "complete":
        ended = sum(level.complete for level in summary.levels)
        return f"result invalid: {STATUS[summary.status]} when {ended} of {summary.levels_planned} levels had ended"
    summary = sharded.of_its_part(summary)
    if gave_up := _gave_up(summary):
        return f"result invalid: the memory ladder has no answer: {gave_up}"
    unanswered = [search.because for search in summary.searches if search.result == "undecided"]
    invalid = next((level for level in _valid_needed(summary) if _invalid(level, summary)), None)
    if unanswered and invalid is None:
        return f"result invalid: the search has no answer: {'; '.join(unanswered)}"
    if any(_is_rung(level) and level.memory and level.memory.of is None for level in _valid_needed(summary)):
        return "result invalid: no memory of the target was read, so that the memory ladder has no answer"
    untold = [*_of_slo(summary), *_of_gates(summary, "invalid")]
    if untold and invalid is None:
        return f"result invalid: a gate without a firm value: {'; '.join(untold)}"
    attempted = sum(level.requests.attempted for level in summary.levels)
    if not attempted:
        stopped = [f": {left.because}" for left in summary.not_run]
        return f"result invalid: no request was sent{''.join(stopped[:1])}"
    failed = _failed(summary.levels)
    if invalid is not None and not any(invalid.requests.failed.values()):
        return f"result invalid: {_empty(invalid)} at {named(invalid, summary)}"
    kinds = ", ".join(f"{n:,} {name}" for name, n in failed.most_common())
    return f"result invalid: {failed.total():,} of {attempted:,} requests failed ({kinds})"


def _empty(level: Level) -> str:
    """What a level lacks that is invalid though no request failed."""
    without = [words.clause_title(clause.clause) for clause in level.slo if clause.n == 0]
    return f"no sample of {without[0]}" if without and level.requests.attempted else "no request was due"


def _gave_up(summary: Summary) -> str | None:
    """Why a memory ladder ended, where it ended neither at its limit nor for want of memory nor to spare the host."""
    return next((left.because for left in summary.not_run if left.rule == "target_degraded"), None)


def _promised(summary: Summary) -> list[tuple[Level, SloClause, GateResult, str | None]]:
    """Every clause of the SLO where it counts, what it is worth there, and why."""
    return [
        (level, clause, *as_gate(clause, summary.allow_indicative)) for level in gates(summary) for clause in level.slo
    ]


def _of_slo(summary: Summary) -> list[str]:
    """Each clause that cannot be told, at the first level where it cannot; the others are counted."""
    untold: dict[str, list[str]] = {}
    for level, clause, result, because in _promised(summary):
        if result == "invalid":
            told = f"{words.clause_title(clause.clause)} at {named(level, summary)}, by the SLO ({because})"
            untold.setdefault(clause.clause, []).append(told)
    return [first + (f", and at {len(others)} more" if others else "") for first, *others in untold.values()]


def _of_gates(summary: Summary, result: str) -> list[str]:
    """What came of each assertion with this result, at the first level that has it; the others are counted.

    What became of a whole SLO that was asserted is told where the SLO's is.
    """
    promised = {(level.index, clause.clause) for level, clause, _, _ in _promised(summary)}
    by_clause: dict[tuple[str, str], list[Gate]] = {}
    for gate in summary.gates:
        whole = gate.asserted.startswith(WHOLE_SLO) and (gate.level, gate.clause) in promised
        if gate.result == result and not whole:
            by_clause.setdefault((gate.asserted, gate.clause), []).append(gate)
    levels = {level.index: f" at {named(level, summary)}" for level in summary.levels}
    told = []
    for first, *others in by_clause.values():
        more = f", and at {len(others)} more" if others else ""
        told.append(words.gate(first, "" if first.level is None else levels[first.level]) + more)
    return told


def named(level: Level, summary: Summary) -> str:
    """A level by its load, and by what else it takes to tell it from the others: its model, its number."""
    title = load_title(level.load)
    if len({other.model for other in summary.levels}) > 1:
        title += f" of {level.model}"
    alike = [other for other in summary.levels if (other.model, other.load) == (level.model, level.load)]
    return title if len(alike) < 2 else f"{title} (level {level.index})"


def gates(summary: Summary) -> list[Level]:
    """The levels whose SLO clauses count for the exit code: no probe, and of a ladder the lowest."""
    climbing = {ladder.stage for ladder in summary.ladders if ladder.climbs or "slo" in ladder.rules}
    return [level for level in summary.levels if level.purpose == "level" and not _above(level, summary, climbing)]


def _above(level: Level, summary: Summary, climbing: set[int]) -> bool:
    """Whether it is a rung of such a ladder above the lowest."""
    if level.purpose != "level" or level.stage not in climbing:
        return False
    rungs = (other for other in summary.levels if other.purpose == "level")
    mine = (words.load_of(o) for o in rungs if (o.model, o.stage) == (level.model, level.stage))
    return words.load_of(level) > min(mine)


def _valid_needed(summary: Summary) -> list[Level]:
    """The levels that make a run invalid if they are: neither a probe that did not pass nor a rung where errors may
    end the ladder."""
    failed = {probe.level for search in summary.searches for probe in search.probes if probe.result != "pass"}
    climbing = {ladder.stage for ladder in summary.ladders if ladder.climbs or "error_rate" in ladder.rules}
    return [
        level
        for level in summary.levels
        if level.index not in failed and not _above(level, summary, climbing) and not _answers(level, summary)
    ]


def _died(summary: Summary) -> list[Level]:
    """The levels after which the target was dead, but for those in which that was what the run was asked to find."""
    failing = {ladder.stage for ladder in summary.ladders if MEMORY_FAILURE in ladder.rules}
    return [
        level
        for level in summary.levels
        if level.target.state in DEAD and not (_is_rung(level) and level.stage in failing)
    ]


def _is_rung(level: Level) -> bool:
    return isinstance(level.load, ClosedLoad) and level.load.ask is not None


def _answers(level: Level, summary: Summary) -> bool:
    """Whether it is a rung of a memory ladder that says something of memory, whatever became of its requests: what was
    held, or that it was too much. One at which nothing succeeded for another reason than memory and time says nothing.
    """
    if not _is_rung(level) or level.memory is None:
        return False
    if level.memory.verdict == "out_of_memory" or level.target.state in DEAD:
        return True
    failing = {ladder.stage for ladder in summary.ladders if MEMORY_FAILURE in ladder.rules}
    in_time = level.requests.ok or any(level.requests.failed.get(name) for name in ("censored", "total_deadline"))
    return bool(in_time) and (level.memory.of is not None or (level.stage in failing and _has_failed(level, summary)))


def _has_failed(level: Level, summary: Summary) -> bool:
    """Whether its ladder found the load that is too much."""
    ladder = (other for other in summary.levels if (other.model, other.stage) == (level.model, level.stage))
    return any(
        other.target.state in DEAD or (other.memory is not None and other.memory.verdict == "out_of_memory")
        for other in ladder
    )


def _invalid(level: Level, summary: Summary) -> bool:
    """Nothing succeeded, most failed and neither SLO nor gate says what to make of it, or a clause of the SLO has no
    samples.

    And a rung of a memory ladder that has no answer.
    """
    if _is_rung(level):
        return True
    attempted, ok = level.requests.attempted, level.requests.ok
    judged = any(clause.unit == "share" for clause in level.slo)
    judged |= any(gate.level == level.index and gate.clause in ("error_rate", "goodput") for gate in summary.gates)
    return ok == 0 or (ok < attempted / 2 and not judged) or any(clause.n == 0 for clause in level.slo)


def _worst_state(summary: Summary) -> str | None:
    states = {level.target.state for level in summary.levels}
    return next((state for state in STATES if state in states), None)


def _slo_result(summary: Summary) -> Result | None:
    """The worst of the searches' answers and of the levels that are gates; None without an SLO."""
    results = {_SEARCHED[search.result] for search in summary.searches}
    results |= {result for level in gates(summary) if (result := slo_of(level))}
    return worst(results)


def _sentences(summary: Summary) -> Iterator[str]:
    if summary.status != "complete":
        told = STATUS[summary.status]
        yield f"{told[0].upper()}{told[1:]}: what follows is what was measured until then."
    if answers_only(summary):
        yield "No level was asked for: answers were gathered."
    elif not summary.levels:
        yield "Nothing was measured."
    if summary.decision and summary.levels:
        yield from side_by_side(summary.decision.candidates)
    for model in dict.fromkeys(level.model for level in summary.levels):
        yield f"{model} on {_where(summary)}."
        yield from _model(summary, [level for level in summary.levels if level.model == model], model)
    yield from (f"One of the endpoints died: {death}." for death in fleet.deaths(summary.levels))
    yield from _gates(summary)
    yield from _doubts(summary)


def _gates(summary: Summary) -> Iterator[str]:
    """What was asserted on the command line: that it holds, or each that does not."""
    for result, told in (("fail", "missed"), ("invalid", "not to be told")):
        found = _of_gates(summary, result)
        more = [f"{len(found) - MOST_GATES} more"] if found[MOST_GATES:] else []
        if found:
            yield f"Asserted, and {told}: {'; '.join([*found[:MOST_GATES], *more])}."
    held = sum(gate.result == "pass" for gate in summary.gates)
    if held and held == len(summary.gates):
        yield "What was asserted holds."


def _model(summary: Summary, levels: Sequence[Level], model: str) -> Iterator[str]:
    """What is most asked for first: how many it carries, how it does that, then the rest."""
    by_index = {level.index: level for level in levels}
    for search in summary.searches:
        if search.model == model:
            yield from sentences.search(search)
    yield from sentences.slo([level for level in levels if level.purpose == "level"])
    capacities, late = [capacity for capacity in summary.capacity if capacity.model == model], list[str]()
    for capacity in capacities:
        climbs = bool(capacity.levels) and _climbs(by_index[capacity.levels[-1]], summary)
        told = [*sentences.capacity(capacity, by_index, climbs)]
        if capacity.nature is None and len(summary.models) > 1:  # who compares models asked for something else
            late += told
        else:
            yield from told
        yield from sentences.advice(capacity, summary.endpoint.get("kind"))
    if not any(capacity.loop == "closed" for capacity in capacities):
        yield from sentences.alone(levels)
    yield from open_words.open_loop(levels)
    for level in levels:
        yield from open_words.over_time(level)
    for left in summary.not_run:
        if left.model == model:
            brief = re.sub(r"the target is oom_killed\b.*", "killed by the kernel for want of memory", left.because)
            yield left_out.not_run(replace(left, because=brief), by_index)
    for phases in summary.phases:
        if phases.model == model:
            yield from sentences.phases(phases)
    yield from memory_words.no_failure([level for level in levels if _has_held(level, summary)])
    takes = next((found for found in summary.memory if found.model == model), None)
    yield from memory_words.memory(takes, levels, bool(summary.endpoint.get("local")))
    for recovery in summary.recoveries:
        if recovery.level in by_index:
            yield memory_words.recovery(recovery)
    yield from _failures(levels)
    yield from late


def _has_held(level: Level, summary: Summary) -> bool:
    """Whether it is a rung of a ladder until failure that found none, and went to its end."""
    failing = {ladder.stage for ladder in summary.ladders if MEMORY_FAILURE in ladder.rules}
    ended = any((left.model, left.stage) == (level.model, level.stage) for left in summary.not_run)
    held = _is_rung(level) and level.stage in failing and not ended and summary.status == "complete"
    return held and not _has_failed(level, summary)


def _climbs(level: Level, summary: Summary) -> bool:
    """Whether it is of a ladder that went to its own end, and would go on if that were higher."""
    ended = any((left.model, left.stage) == (level.model, level.stage) for left in summary.not_run)
    return level.purpose == "level" and not ended and level.stage in {ladder.stage for ladder in summary.ladders}


def _where(summary: Summary) -> str:
    endpoint, environment = summary.endpoint, summary.environment
    cpu, cores, memory = environment.get("cpu"), environment.get("cores"), environment.get("memory_bytes")
    parts = [cpu, f"{cores} cores" if cores else None, f"{memory / 2**30:.0f} GiB" if memory else None]
    machine = ", ".join(part for part in parts if part)
    served = endpoint.get("title") or "the endpoint"
    if endpoint.get("local"):
        return f"{served} ({machine})" if machine else str(served)
    return f"{served} at {endpoint.get('url')}, asked from another machine"


def _failures(levels: Sequence[Level]) -> Iterator[str]:
    attempted = sum(level.requests.attempted for level in levels)
    lost, stopped, cut = (sum(level.requests.failed.get("censored", 0) for level in of) for of in _given_up(levels))
    failed, asked = _failed(levels) - Counter(censored=lost + stopped + cut), words.requests(attempted)
    if failed:
        told = ", ".join(f"{count} {outcome}" for outcome, count in failed.items())
        yield f"{failed.total()} of {asked} failed ({told})."
    elif attempted and not lost + stopped + cut:
        yield f"All requests succeeded ({attempted})."
    if lost:
        yield f"{lost} of {asked} were lost when the target died."
    if stopped:
        yield f"{stopped} of {asked} were cut off with their rung, before it was through."
    if cut:
        yield f"{cut} of {asked} were given up at the end of their rung, as planned."


def _given_up(levels: Sequence[Level]) -> tuple[list[Level], list[Level], list[Level]]:
    """The rungs that ended with the target, that were stopped before their bound, and that ended by it."""
    rungs = [level for level in levels if _is_rung(level)]
    lost = [level for level in rungs if level.target.state in (*DEAD, "restarted")]
    others = [level for level in rungs if level not in lost]
    stopped = [level for level in others if not level.complete or level.ended_by in (*ENDED, "memory_floor")]
    return lost, stopped, [level for level in others if level not in stopped]


def _failed(levels: Sequence[Level]) -> Counter[str]:
    return sum((Counter(level.requests.failed) for level in levels), Counter[str]())


def _doubts(summary: Summary) -> Iterator[str]:
    """Every caution in short; failures have had their sentence."""
    several = len(summary.models) > 1  # the side by side names those that failed, and the cautions say why in full
    told = {summary.status, "model"} if several and summary.levels else {summary.status}
    doubts = [caution.reason for caution in summary.cautions if caution.about not in told]
    where: dict[str, list[Level]] = {}
    for level in summary.levels:
        for caution in level.cautions:
            if caution.about not in level.requests.failed:
                where.setdefault(caution.about, []).append(level)
    for about, levels in where.items():
        places = "on every level" if 1 < len(levels) == len(summary.levels) else words.where(levels)
        doubts.append(f"{about.replace('_', ' ')} {places}")
    if doubts:
        yield f"Bear in mind: {'; '.join(doubts)}."
