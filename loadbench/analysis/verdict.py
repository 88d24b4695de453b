"""The paragraph on top of a report, as an engineer would say it to a colleague, and the exit code.

From the Summary's numbers alone, and only from firm ones; where they are not, it says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from loadbench.analysis.cautions import STATUS
from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.stats import FLOORS
from loadbench.analysis.summary import ClosedLoad, Level, Result, SloClause, Summary, Verdict
from loadbench.records import load_title

FLAT_SHARE = 0.15  # throughput within this is one number: issue 2's bar for a serial engine, and about its scatter
NEAR_SHARE = 0.05  # the smallest load this near the best throughput is where it is reached
STEADY_RATIO = 1.5  # a first token that grows by less has not left its level
STEP_RATIO = 2.0
LINE_R2 = 0.9  # a slope is told only where a line explains the medians

# Worst first; as MEASUREMENT.md names them.
RESULTS: tuple[Result, ...] = ("fail", "undecided", "pass")
STATES = ("oom_killed", "crashed", "unreachable", "wedged", "oom_reported", "restarted", "degraded", "healthy")


def of(summary: Summary) -> Verdict:
    """The verdict on a run."""
    return Verdict(text=" ".join(_sentences(summary)), target=_worst_state(summary), slo=_slo_result(summary.levels))


def exit_code(summary: Summary) -> int:
    """0 done · 3 a model was not servable · 93 target died · 94 invalid · 99 SLO missed · 130 interrupted."""
    if summary.status == "target_died":
        return 93
    if summary.status == "interrupted":
        return 130
    if any(model.status == "failed" for model in summary.models):
        return 3
    if summary.status != "complete" or not summary.levels or any(_invalid(level) for level in summary.levels):
        return 94
    return 99 if summary.verdict.slo == "fail" else 0


def _invalid(level: Level) -> bool:
    """Nothing succeeded, most failed and no SLO says what to make of it, or a clause of the SLO has no samples."""
    attempted, ok = level.requests.attempted, level.requests.ok
    judged = any(clause.unit == "share" for clause in level.slo)
    return ok == 0 or (ok < attempted / 2 and not judged) or any(clause.n == 0 for clause in level.slo)


def _worst_state(summary: Summary) -> str | None:
    states = {level.target.state for level in summary.levels}
    return next((state for state in STATES if state in states), None)


def _slo_result(levels: Iterable[Level]) -> Result | None:
    """Failed once is failed; else undecided once is undecided; None without an SLO."""
    results: set[Result] = {clause.result for level in levels for clause in level.slo}
    return next((result for result in RESULTS if result in results), None)


def _sentences(summary: Summary) -> Iterator[str]:
    if summary.status != "complete":
        told = STATUS[summary.status]
        yield f"{told[0].upper()}{told[1:]}: what follows is what was measured until then."
    if not summary.levels:
        yield "Nothing was measured."
    for model in dict.fromkeys(level.model for level in summary.levels):
        levels = [level for level in summary.levels if level.model == model]
        yield f"{model} on {_where(summary)}."
        closed = sorted((level for level in levels if isinstance(level.load, ClosedLoad)), key=_users)
        yield from _throughput(closed)
        yield from _first_token_cost(closed)
        yield from _open(levels)
        yield from _slo(levels)
        yield from _memory(levels)
        yield from _failures(levels)
    yield from _doubts(summary)


def _where(summary: Summary) -> str:
    endpoint, environment = summary.endpoint, summary.environment
    cpu, cores, memory = environment.get("cpu"), environment.get("cores"), environment.get("memory_bytes")
    parts = [cpu, f"{cores} cores" if cores else None, f"{memory / 2**30:.0f} GiB" if memory else None]
    machine = ", ".join(part for part in parts if part)
    served = endpoint.get("title") or "the endpoint"
    if endpoint.get("local"):
        return f"{served} ({machine})" if machine else str(served)
    return f"{served} at {endpoint.get('url')}, asked from another machine"


def _users(level: Level) -> int:
    assert isinstance(level.load, ClosedLoad)
    return level.load.concurrency


def _throughput(levels: Sequence[Level]) -> Iterator[str]:
    """Total throughput over concurrency: flat, still growing, or grown up to somewhere.

    Of whole levels only: one that was cut short has time in it in which nothing was measured any more.
    """
    whole = [level for level in levels if level.complete]
    if levels and not whole:
        yield "No level ended as planned, so there is no throughput to speak of."
        return
    levels = whole
    rates = [
        (_users(level), rate)
        for level in levels
        if (rate := level.throughput["output_tokens_per_s"]) and level.requests.ok >= FLOORS["p50"]
    ]
    if not rates:
        if levels:
            yield f"Too few requests succeeded to speak of throughput (under {FLOORS['p50']} in every level)."
        return
    (first_users, first), (last_users, last) = rates[0], rates[-1]
    best = max(rate for _, rate in rates)
    users_at_best, reached = next((users, rate) for users, rate in rates if rate >= (1 - NEAR_SHARE) * best)
    if len(rates) == 1:
        yield f"It gives {_number(first)} tok/s at {_count(first_users)}."
    elif best <= (1 + FLAT_SHARE) * min(rate for _, rate in rates):
        yield (
            f"Total throughput stays at about {_number(float(np.median([rate for _, rate in rates])))} tok/s from"
            f" {first_users} to {_count(last_users)}: more users only wait longer."
        )
    elif users_at_best == first_users and last <= (1 - FLAT_SHARE) * first:
        start_at = f"{_number(first)} tok/s at {_count(first_users)}"
        yield f"Total throughput falls from {start_at} to {_number(last)} at {last_users}."
    elif users_at_best == first_users:
        spread = f"{_number(min(rate for _, rate in rates))} to {_number(best)} tok/s"
        users = f"{first_users} and {_count(last_users)}"
        yield f"Total throughput does not grow with users: {spread} between {users}, in no order."
    elif users_at_best == last_users:
        yield (
            f"Total throughput still grows at {_count(last_users)}, the most that was tried: {_number(first)} tok/s at"
            f" {first_users}, {_number(last)} at {last_users}."
        )
    else:
        after = f"; at {last_users} it is {_number(last)}" if last_users != users_at_best else ""
        yield (
            f"Total throughput grows from {_number(first)} tok/s at {_count(first_users)} to {_number(reached)} at"
            f" {users_at_best} and not beyond{after}."
        )


def _first_token_cost(levels: Sequence[Level]) -> Iterator[str]:
    """What one more user costs in time to first token; told from more than two levels with a firm median."""
    points = [
        (_users(level), p50) for level in levels if (p50 := level.latency_ms["ttft"]["service"].firm("p50")) is not None
    ]
    if len(points) < 3:
        return
    users, medians = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    (first_users, first), (last_users, last) = points[0], points[-1]
    if medians.max() <= STEADY_RATIO * medians.min():
        yield f"The first token stays at about {_about(float(np.median(medians)))} (p50) up to {_count(last_users)}."
        return
    steady = [point for point in points if point[1] <= STEADY_RATIO * first]
    for (before_users, before), (after_users, after) in pairwise(points):
        # Growing in step with the users is a slope; far more than that, after a level stretch, is a step.
        if (before_users, before) == steady[-1] and len(steady) > 1 and after >= STEP_RATIO * before:
            yield (
                f"The first token takes about {_about(before)} (p50) up to {_count(before_users)} and steps up to"
                f" {_time(after)} at {after_users}."
            )
            return
    slope, start = np.polyfit(users, medians, 1)
    left = float(np.sum((medians - start - slope * users) ** 2))
    if slope > 0 and 1 - left / float(np.sum((medians - medians.mean()) ** 2)) >= LINE_R2:
        yield (
            f"Each further user adds about {_about(float(slope))} to the first token: p50 {_time(first)} at"
            f" {_count(first_users)}, {_time(last)} at {last_users}."
        )
    else:
        start_at, end_at = f"{_time(first)} (p50) at {_count(first_users)}", f"{_time(last)} at {last_users}"
        yield f"The first token goes from {start_at} to {end_at}."


def _open(levels: Sequence[Level]) -> Iterator[str]:
    for level in levels:
        if isinstance(level.load, ClosedLoad):
            continue
        name = "first token" if level.latency_ms["ttft"]["response"].n else "whole answer"
        response = level.latency_ms["ttft" if name == "first token" else "e2e"]["response"]
        told = [f"{_time(value)} (p{q})" for q in (50, 95) if (value := response.firm(f"p{q}")) is not None]
        if told:
            yield f"At {load_title(level.load)} the {name} comes {_list(told)} after it was due."
        else:
            yield f"At {load_title(level.load)} too few requests succeeded to speak of their latency."


def _slo(levels: Sequence[Level]) -> Iterator[str]:
    """Where the SLO holds, where it does not and by what, and where that cannot be said."""
    if not any(level.slo for level in levels):
        return
    by_result = {result: [level for level in levels if _slo_result([level]) == result] for result in RESULTS}
    parts = []
    if by_result["pass"]:
        parts.append(f"holds {_loads(by_result['pass'])}")
    if by_result["fail"]:
        missed = next(clause for clause in by_result["fail"][0].slo if clause.result == "fail")
        parts.append(f"is missed {_loads(by_result['fail'])} ({_clause(missed)})")
    if by_result["undecided"]:
        open_clause = next(clause for clause in by_result["undecided"][0].slo if clause.result == "undecided")
        parts.append(f"is undecided {_loads(by_result['undecided'])} ({_title(open_clause)}: {open_clause.because})")
    yield f"The SLO {_list(parts)}."


def _memory(levels: Sequence[Level]) -> Iterator[str]:
    """From before the first level, over the highest, to after the last."""
    rss = [level.target.rss_bytes for level in levels]
    peaks = [figures.peak for figures in rss if figures.peak is not None]
    if not peaks:
        return
    before, after = rss[0].before, rss[-1].after
    told = [f"{_mib(before)} before" if before is not None else "", f"{_mib(max(peaks))} at its peak"]
    told.append(f"{_mib(after)} after" if after is not None else "")
    yield f"The service's memory: {', '.join(part for part in told if part)}."


def _failures(levels: Sequence[Level]) -> Iterator[str]:
    attempted = sum(level.requests.attempted for level in levels)
    failed: dict[str, int] = {}
    for level in levels:
        for outcome, count in level.requests.failed.items():
            failed[outcome] = failed.get(outcome, 0) + count
    if failed:
        told = ", ".join(f"{count} {outcome}" for outcome, count in failed.items())
        yield f"{sum(failed.values())} of {attempted} requests failed ({told})."
    elif attempted:
        yield f"All requests succeeded ({attempted})."


def _doubts(summary: Summary) -> Iterator[str]:
    """Every caution in short; failures have had their sentence."""
    doubts = [caution.reason for caution in summary.cautions if caution.about != summary.status]
    where: dict[str, list[Level]] = {}
    for level in summary.levels:
        for caution in level.cautions:
            if caution.about not in level.requests.failed:
                where.setdefault(caution.about, []).append(level)
    for about, levels in where.items():
        places = "on every level" if 1 < len(levels) == len(summary.levels) else _loads(levels)
        doubts.append(f"{about.replace('_', ' ')} {places}")
    if doubts:
        yield f"Bear in mind: {'; '.join(doubts)}."


def _loads(levels: Sequence[Level]) -> str:
    """``at 1, 2 and 4 users and at 2/s poisson``."""
    users = sorted({_users(level) for level in levels if isinstance(level.load, ClosedLoad)})
    schedules = dict.fromkeys(load_title(level.load) for level in levels if not isinstance(level.load, ClosedLoad))
    parts = []
    if users:
        parts.append(f"at {_list([str(n) for n in users])} user{'' if users == [1] else 's'}")
    if schedules:
        parts.append(f"at {_list([*schedules])}")
    return _list(parts)


def _clause(clause: SloClause) -> str:
    told = _time if clause.unit == "ms" else "{:.1%}".format
    value = "unknown" if clause.value is None else told(clause.value)
    return f"{_title(clause)} is {value}, the limit {told(clause.limit)}"


def _title(clause: SloClause) -> str:
    """``TTFT p95`` of ttft.p95, ``error rate`` of error_rate."""
    metric, _, percentile = clause.clause.partition(".")
    return f"{LATENCIES[metric].title} {percentile}" if percentile else metric.replace("_", " ")


def _list(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if words[1:] else words[0]


def _count(users: int) -> str:
    return f"{users} user{'' if users == 1 else 's'}"


def _number(value: float) -> str:
    """Three digits: no throughput of some seconds is known better."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _time(milliseconds: float) -> str:
    if milliseconds < 1000:
        return f"{milliseconds:.3g} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"
    return f"{milliseconds / 1e3:.3g} s"


def _about(milliseconds: float) -> str:
    """Two digits, for what a fit or several levels say together."""
    return _time(float(f"{milliseconds:.2g}"))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"
