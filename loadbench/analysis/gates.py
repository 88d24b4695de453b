"""Holds what was asserted on the command line against the levels of a run: pass, fail, or invalid without a firm value.

What is asserted of no level in particular is asserted of those by which the SLO decides the exit code: of a ladder the
lowest rung, as it asks how far a target goes and is to miss above that; of a search the load that it answers with, as
its probes are there to miss. Whoever means another level names it. A rung of a memory ladder has no times to assert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from loadbench.analysis import words
from loadbench.analysis.assertion import ERROR_RATE, WHOLE_SLO, Assertion, Comparison, Scope, parse
from loadbench.analysis.metrics import LATENCIES, RATES, Series
from loadbench.analysis.road import FALLS, GROWS, is_over
from loadbench.analysis.slo import CUT, GateResult, as_gate, broken, doubt, missed, series_of
from loadbench.analysis.stats import FLOORS, PERCENTILES
from loadbench.analysis.summary import ClosedLoad, Gate, Level, SloClause, Summary
from loadbench.errors import UsageError
from loadbench.files import write_whole
from loadbench.records import load_title

FILE = "gates.json"
"""What a run was started with, so that every report of it exits alike; what a report asks for is of that report."""

FIRM = FLOORS["p50"]  # requests: the fewest on which a mean or a rate is more than chance
MOST_SHOWN = 8  # levels in an error

_FALL = {"goodput_share", "goodput_per_s"}  # over capacity, with the length of the level, as latencies grow
_HIGHEST = PERCENTILES | {"mean": 0.5, "max": 1.0}
"""Of a statistic the share of requests that it speaks for: where more failed than it leaves out, it is infinite."""
_TAKES = {
    "goodput_share": "no value: goodput takes an slo in the scenario",
    "goodput_per_s": "no value: goodput takes an slo in the scenario",
    "joules_per_output_token": "no value: no power was measured",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asserted beside the scenario's SLO, and whether of both values on few samples count as they are."""

    assertions: tuple[Assertion, ...]
    allow_indicative: bool = False

    def keep(self, run_dir: Path) -> None:
        """Note beside the run what it was started with."""
        texts = [assertion.text for assertion in self.assertions]
        document = {"assert": texts, "allow_indicative": self.allow_indicative}
        write_whole(run_dir / FILE, orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


@dataclass(frozen=True, slots=True)
class _Seen:
    """The value of a level with its samples. ``doubt``: why it is not firm; ``sure``: why it is missed all the same."""

    value: float | None
    n: int
    series: Series | None = None
    doubt: str | None = None
    sure: str | None = None


def asked(texts: Sequence[str], allow_indicative: bool) -> Asked | None:
    """None where nothing is said. UsageError where a text is no assertion."""
    return Asked(tuple(map(parse, texts)), allow_indicative) if texts or allow_indicative else None


def kept(run_dir: Path) -> Asked | None:
    """What the run was started with; None: nothing."""
    path = run_dir / FILE
    try:
        document = orjson.loads(path.read_bytes())
        return asked([str(text) for text in document["assert"]], bool(document["allow_indicative"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: expected what --assert said, got {error}") from error


def of_report(said: Asked | None, run_dir: Path) -> Asked | None:
    """What a report of the run asserts: what was said to it, else what the run was started with.

    Whoever only allows indicative values has asserted nothing instead.
    """
    if said is not None and said.assertions:
        return said
    started = kept(run_dir)
    return started if said is None else replace(started or said, allow_indicative=said.allow_indicative)


def held(asked: Asked, summary: Summary, counting: Sequence[Level]) -> tuple[Gate, ...]:
    """Every assertion at every level that it is of; ``counting`` are those by which the SLO decides."""
    answers = _answers(summary)
    counting = counting or [level for level in summary.levels if level.index in answers]
    meant = [(assertion, _meant(assertion.scope, summary, counting)) for assertion in asked.assertions]
    stated = {level.index for assertion, levels in meant if assertion.is_share for level in levels}
    stated |= {level.index for level in summary.levels if any(clause.unit == "share" for clause in level.slo)}
    told: list[Gate] = []
    for assertion, levels in meant:
        if not levels:
            told.append(_gate(assertion, None, _Seen(None, 0), "invalid", _absent(assertion.scope, summary)))
        for level in levels:
            if assertion.metric == WHOLE_SLO:
                found = _of_slo(assertion, level, asked.allow_indicative)
            else:
                found = [_held(assertion, level, asked.allow_indicative, level.index in stated)]
            told += (_whole(gate, level) for gate in found)
    return tuple(told)


def _answers(summary: Summary) -> set[int]:
    """The levels that confirmed what the searches answer."""
    return {
        probe.level
        for search in summary.searches
        for probe in search.probes
        if probe.purpose == "confirmation" and probe.result == "pass" and probe.load == search.answer
    }


def _meant(scope: Scope | None, summary: Summary, counting: Sequence[Level]) -> list[Level]:
    if scope is None:
        return [level for level in counting if not _is_rung(level)]
    return [level for level in summary.levels if not _is_rung(level) and _is_meant(level, scope)]


def _is_rung(level: Level) -> bool:
    return isinstance(level.load, ClosedLoad) and level.load.ask is not None


def _is_meant(level: Level, scope: Scope) -> bool:
    if scope.model not in (None, level.model, level.model.partition(":")[0]):
        return False
    if scope.load is None:
        return level.index == scope.number
    title = load_title(level.load)
    rate = title.partition(" ")[0]
    return _typed(scope.load) in (_typed(title), rate if rate.endswith("/s") else None)


def _typed(load: str) -> str:
    """However it is typed: ``4 Users``, ``1 users``, ``1->8 users``."""
    parts = load.casefold().replace("->", "→").replace(",", "").split()
    return " ".join("user" if word == "users" else word for word in parts)


def _absent(scope: Scope | None, summary: Summary) -> str:
    """Why there is no level to hold it against."""
    timed = [level for level in summary.levels if not _is_rung(level)]
    if not timed:
        return "a rung of a memory ladder has no times" if summary.levels else "no level was measured"
    if scope is None:
        return "the search has no answer"
    several = len({level.model for level in timed}) > 1
    names = (load_title(level.load) + (f" of {level.model}" if several else "") for level in timed)
    there = list(dict.fromkeys(names))
    shown = ", ".join(there[:MOST_SHOWN]) + (f" and {len(there) - MOST_SHOWN} more" if there[MOST_SHOWN:] else "")
    return f"no such level was measured; there are {shown}"


def _held(assertion: Assertion, level: Level, allow_indicative: bool, stated: bool) -> Gate:
    """One assertion on one level; ``stated``: somebody has said how many requests may fail there."""
    is_latency = assertion.metric in LATENCIES
    seen = _latency(assertion, level) if is_latency else _rate(assertion.metric, level)
    met = seen.value is not None and assertion.met(seen.value)
    if met and assertion.is_share:
        seen = replace(seen, doubt=_coarse(assertion, seen.n))
    result: GateResult = "pass" if met else "fail"
    because = seen.doubt
    if seen.doubt and seen.sure and not met:
        because = seen.sure
    elif seen.doubt and allow_indicative and seen.value is not None:
        because = f"indicative: {seen.doubt}"
    elif seen.doubt:
        result = "invalid"
    highest = None if stated else _HIGHEST.get(assertion.statistic or "")
    if result != "fail" and (broke := broken(level.requests, level.target.state, highest)):
        result, because = "fail", broke
    elif is_over(level.road) and (is_latency or assertion.metric in _FALL):
        result, because = "fail" if result == "fail" else "invalid", GROWS if is_latency else FALLS
    return _gate(assertion, level, seen, result, because)


def _latency(assertion: Assertion, level: Level) -> _Seen:
    series = assertion.series or series_of(assertion.metric, level.headline)
    told, statistic = level.latency_ms[assertion.metric][series], assertion.statistic or ""
    if not told.n and told.p99_all is None:
        return _Seen(None, 0, series, "no samples")
    if statistic in PERCENTILES:
        sure = missed(told, statistic, assertion.limit or 0.0)
        return _Seen(told.value(statistic), told.n, series, doubt(told, statistic), sure)
    if statistic == "p99_all":
        value, attempted = told.p99_all, level.requests.attempted
        few = None
        if told.firm(statistic) is None:
            few = f"{attempted} requests; p99_all is firm from {FLOORS['p99']}"
        return _Seen(math.inf if value == "inf" else value, attempted, series, few)
    few = _few(told.n, "mean") if statistic == "mean" else None  # the extremes are what happened, no estimate
    return _Seen(told.value(statistic), told.n, series, few)


def _rate(metric: str, level: Level) -> _Seen:
    attempted, ok = level.requests.attempted, level.requests.ok
    if metric == ERROR_RATE:
        return _Seen((attempted - ok) / attempted, attempted) if attempted else _Seen(None, 0, doubt="no samples")
    value, is_share = level.throughput.get(metric), RATES[metric].unit == "share"
    n = attempted if is_share else ok
    if value is None or not n:
        return _Seen(None, 0, doubt=_TAKES.get(metric, "no samples"))
    if metric == "output_tokens_per_s_per_user":
        tpot = level.latency_ms["tpot"]["service"]
        return _Seen(value, tpot.n, doubt=doubt(tpot, "p50"))
    return _Seen(value, n, doubt=None if is_share else _few(n, "rate"))


def _coarse(assertion: Assertion, n: int) -> str | None:
    """Why too few requests met a limit on how many may fail: it takes as many as it allows one failure of.

    Two of two say nothing of 1 %; a hundred do, of which a target that fails that often shows one in 63 % of levels.
    That none at all may fail is what happened, on any number of requests. A miss is one, too.
    """
    limit = assertion.limit or 0.0
    allowed = limit if assertion.metric == ERROR_RATE else 1 - limit
    floor = math.ceil(1 / allowed - 1e-9) if allowed > 0 else 0
    return f"{words.requests(n)}; it is firm from {floor:,}, of which one may fail" if n < floor else None


def _few(n: int, what: str) -> str | None:
    return f"{n} samples; a {what} is firm from {FIRM}" if n < FIRM else None


def _of_slo(assertion: Assertion, level: Level, allow_indicative: bool) -> list[Gate]:
    """The clauses of the scenario's SLO as they were judged; one that is undecided is no pass here."""
    if not level.slo:
        return [_gate(assertion, level, _Seen(None, 0), "invalid", "the scenario has no slo")]
    return [_of_clause(assertion, level, clause, allow_indicative) for clause in level.slo]


def _of_clause(assertion: Assertion, level: Level, clause: SloClause, allow_indicative: bool) -> Gate:
    comparison: Comparison = ">=" if clause.clause == "goodput" else "<="
    result, because = as_gate(clause, allow_indicative)
    return Gate(
        assertion.text,
        level.index,
        clause.clause,
        clause.series,
        comparison,
        clause.limit,
        clause.value,
        clause.unit,
        clause.n,
        result,
        because,
    )


def _whole(gate: Gate, level: Level) -> Gate:
    """A miss stays one; that nothing was missed until a level was cut short says nothing of the rest of it."""
    if level.complete or gate.result != "pass":
        return gate
    return replace(gate, result="invalid", because=CUT)


def _gate(assertion: Assertion, level: Level | None, seen: _Seen, result: GateResult, because: str | None) -> Gate:
    infinite = seen.value == math.inf
    return Gate(
        asserted=assertion.text,
        level=None if level is None else level.index,
        clause=assertion.clause,
        series=seen.series,
        comparison=assertion.comparison,
        limit=assertion.limit,
        value=None if infinite else seen.value,
        unit=assertion.unit,
        n=seen.n,
        result=result,
        because=because or ("more than 1 % failed, which counts as infinite" if infinite else None),
    )
