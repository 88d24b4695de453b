"""What a model carries, in sentences: the search's answer, its nature, the SLO, prefill and decode.

From what ``findings`` hold and only from firm values; where these are not, the sentence says so and why. A level that
was over capacity has no latency here: its percentiles say how long it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loadbench.analysis import words
from loadbench.analysis.estimates import ALL_SHARE
from loadbench.analysis.findings import Capacity, Estimate, Phases, Point, Result, Search
from loadbench.analysis.points import REFUSALS
from loadbench.analysis.road import is_over
from loadbench.analysis.slo import RESULTS, slo_of
from loadbench.analysis.stats import FLOORS
from loadbench.analysis.summary import ClosedLoad, Level
from loadbench.analysis.words import listed, load, number, time, users
from loadbench.records import load_title

ONE_RATE_SHARE = 0.15  # throughput within this is one number: issue 2's bar for a serial engine, and about its scatter
SLIGHT = 0.05  # of a token's time: less for a further user is none, where few levels leave no interval
APART = 2.0  # a ladder of doublings cannot tell a knee closer than that
MOST_TOLD = 3  # schedules whose latency the paragraph tells one by one

Levels = Mapping[int, Level]


def search(found: Search) -> Iterator[str]:
    """The answer of a search, or why there is none."""
    most = "The most users" if found.unit == "users" else "The highest rate"
    if found.result == "confirmed" and found.answer is not None:
        failed = next((p for p in found.probes if p.result == "fail" and p.load == found.failed), None)
        missed = f"; it is missed at {load(failed.load, found.unit)} ({failed.because})" if failed else ""
        answer = f"{found.answer:,.4g}" if found.unit == "users" else load(found.answer, found.unit)
        yield f"{most} within the SLO: {answer}, {found.because}{missed}."
    elif found.result == "unbounded":
        held = "" if found.answer is None else f"{load(found.answer, found.unit)}, "
        further = "Raise the stage's highest load to find the end."
        yield f"The SLO holds wherever it was tried: {held}{found.because}. {further}"
    elif found.result == "none":
        one = found.unit == "users" and found.probes[0].load == 1  # of which there is no less
        lower = "" if one else " Lower the stage's lowest load to find the end."
        yield f"{'No load' if one else 'Not even the lowest load'} keeps the SLO: {found.because}.{lower}"
    else:
        yield f"{most} within the SLO: undecided, {found.because}."
    if found.odd:
        yield f"More load did better in places: {'; '.join(found.odd)}."


def capacity(found: Capacity, levels: Levels, climbs: bool) -> Iterator[str]:
    """How a model takes several at once, where it ends, and what speaks against it. ``climbs``: of a ladder."""
    points = [point for point in found.points if point.firm and _rate(point) is not None]
    points.sort(key=lambda point: point.load)
    if found.loop == "closed":
        undecided = f"What it carries is undecided: {_short(found.because)}."
        yield _nature(found, points, levels) if points else undecided
    if found.saturated is False and found.last_gain is not None and found.loop == "closed":
        step = "doubling" if len(points) > 1 and points[-1].load == 2 * points[-2].load else "step up"
        more = "raise `to`" if climbs else "try more users"
        yield f"Not saturated: the last {step} still gained {found.last_gain:.0%}: {more}."
    elif found.nature == "scales" and found.up_to is not None and found.last_gain is not None:
        yield (
            f"The last step up still gained {found.last_gain:.0%}, though some queue already: measure {found.up_to}"
            f" users too, or more than {points[-1].load:.4g}."
        )
    elif found.saturated is None and found.nature is not None and found.loop == "closed":
        yield f"Whether it is saturated is undecided{_because(_estimate(found, 'knee'))}."
    if found.falls_to is not None and points and _falls(found) and not _peaks(found):
        at = load(points[-1].load, "users" if found.loop == "closed" else "1/s")
        yield f"Past its peak it degrades: at {at} throughput is {found.falls_to:.0%} of the best."
    yield from _rejects(found, levels)
    yield from _apart(found)
    if found.usl is not None:
        peak = _firm(found, "usl_peak")
        top = f", its peak at {users(round(peak.value))}" if peak and peak.value is not None else ""
        low, high = found.usl.contention_interval_95
        yield (
            f"The Universal Scalability Law fits: contention {found.usl.contention:.2g} ({low:.2g} to {high:.2g}),"
            f" coherency {found.usl.coherency:.2g}{top}."
        )


def _nature(found: Capacity, points: Sequence[Point], levels: Levels) -> str:
    """One sentence on how it takes several at once, with the throughput and first tokens that show it."""
    first, last = points[0], points[-1]
    best = max(points, key=_served)
    flat, shown = _flat(points), _through(points)
    knee, bound = _firm(found, "knee"), _firm(found, "asymptotic")
    limit = f" (N* = {bound.value:.2g})" if bound and bound.value is not None else ""
    reached = f", so capacity is reached at {users(knee.value)}{limit}" if knee and knee.value is not None else limit
    slower = _first_tokens(levels, first, last)
    if found.nature == "shares_the_processor":
        return f"It shares the processor: {shown}{reached}; each further user only makes all slower{slower}."
    if found.nature == "serves_one_at_a_time":
        return f"It serves one at a time: {shown}{reached}; further users queue{slower}."
    if found.nature is None:
        return f"{_capital(shown)}; how it takes several at once is undecided: {_short(found.because)}."
    if found.nature == "scales" and found.up_to is not None:
        return f"It works on {found.up_to} of {users(last.load)} at once, the others queue: {shown}{slower}."
    if found.nature == "scales":
        return f"It takes all {users(last.load)} at once: {shown}{slower}."
    full = max((point for point in points if point.load <= (found.up_to or 0)), key=lambda p: p.load, default=first)
    queue = f"{beyond}{_first_tokens(levels, full, last)}" if (beyond := _beyond(found, last)) else ""
    if found.nature == "shares_in_turns":
        return f"It works on {found.up_to} at a time, which share the processor: {shown}{reached}{queue}."
    if _peaks(found) and found.falls_to is not None:
        left = f"{found.falls_to:.0%} of the best"
        return f"It batches up to {found.up_to} and degrades past that: {shown}, {left}{queue}."
    if flat or best is first or found.saturated is not True:
        return f"It batches up to {found.up_to}: {shown}{queue}."
    top = next((point for point in points if knee and point.load == knee.value), best)
    return (
        f"It batches up to {found.up_to}: throughput grows {_rate_of(top) / _rate_of(first):.2g}-fold from"
        f" {number(_rate_of(first))} {_unit(points)} at {users(first.load)} to {number(_rate_of(top))} at"
        f" {top.load:.4g} and not beyond{queue}."
    )


def _falls(found: Capacity) -> bool:
    return found.falls_to is not None and found.falls_to < 1 - ONE_RATE_SHARE


def _peaks(found: Capacity) -> bool:
    """Whether it gains by several and loses by many."""
    return found.nature == "batches" and _falls(found)


def _rejects(found: Capacity, levels: Levels) -> Iterator[str]:
    """From when on requests are refused, which no queue and no throughput shows."""
    if found.rejects_from is None:
        return
    first = next(point for point in found.points if point.load == found.rejects_from)
    at, level = load(first.load, "users" if found.loop == "closed" else "1/s"), levels.get(first.level)
    shares = ""
    if level is not None and level.requests.attempted:
        refused = sum(level.requests.failed.get(name, 0) for name in REFUSALS) / level.requests.attempted
        shares = f": {refused:.0%} of those at {at}"
    yield f"From {at} on it rejects requests instead of queueing them{shares}."


def _beyond(found: Capacity, last: Point) -> str:
    """What becomes of further users, where it was seen: a queue leaves some of them unserved."""
    if found.up_to is None or last.load <= found.up_to or last.in_service is None:
        return ""
    queue = last.in_service < ALL_SHARE * last.load
    return f"; beyond {found.up_to} further users {'queue' if queue else 'slow each other down'}"


def _through(points: Sequence[Point]) -> str:
    """``throughput stays at about 144 tok/s from 1 to 8 users``, or how it went."""
    first, last, unit = points[0], points[-1], _unit(points)
    best = max(points, key=_served)
    if len(points) == 1:
        return f"it gives {number(_rate_of(first))} {unit} at {users(first.load)}"
    if _flat(points):
        middle = sorted(map(_rate_of, points))[len(points) // 2]
        return f"throughput stays at about {number(middle)} {unit} from {first.load:.4g} to {users(last.load)}"
    told = f"throughput is {number(_rate_of(first))} {unit} at {users(first.load)}"
    told += "" if best in (first, last) else f", {number(_rate_of(best))} at {best.load:.4g}"
    return f"{told}{',' if best not in (first, last) else ''} and {number(_rate_of(last))} at {last.load:.4g}"


def _flat(points: Sequence[Point]) -> bool:
    rates = [*map(_rate_of, points)]
    return max(rates) <= (1 + ONE_RATE_SHARE) * min(rates)


def _rate(point: Point) -> float | None:
    return point.tokens_per_s or point.per_s


def _served(point: Point) -> float:
    """What the nature and the knee go by; tokens are only told."""
    return point.per_s or 0.0


def _rate_of(point: Point) -> float:
    rate = _rate(point)
    assert rate is not None, "points without throughput are left out before"
    return rate


def _unit(points: Sequence[Point]) -> str:
    return "tok/s" if all(point.tokens_per_s for point in points) else "requests/s"


def _first_tokens(levels: Levels, first: Point, last: Point) -> str:
    """`` (first token 32 → 308 ms)``, the medians; nothing where they are not firm."""
    before, after = (_median(levels.get(point.level)) for point in (first, last))
    if before is None or after is None or first is last:
        return ""
    return f" (first token {time(before)} → {time(after)})"


def _median(level: Level | None) -> float | None:
    return None if level is None else level.latency_ms["ttft"]["service"].firm("p50")


def _estimate(found: Capacity, name: str) -> Estimate | None:
    return next((estimate for estimate in found.estimates if estimate.name == name), None)


def _firm(found: Capacity, name: str) -> Estimate | None:
    estimate = _estimate(found, name)
    return estimate if estimate is not None and estimate.result == "firm" and estimate.value is not None else None


def _short(because: str) -> str:
    """Without the levels that were left out one by one: the table below has them."""
    return because.partition("; left out: ")[0]


def _because(estimate: Estimate | None) -> str:
    return f": {estimate.because}" if estimate is not None and estimate.because else ""


def _apart(found: Capacity) -> Iterator[str]:
    """Estimators of the same thing that disagree, each with its own number."""
    titles = {"asymptotic": "N* by the asymptotic bound", "knee": "the knee measured", "usl_peak": "the USL's peak"}
    told = {t: e.value for name, t in titles.items() if (e := _firm(found, name)) is not None and e.value}
    if told and max(told.values()) > APART * min(told.values()):
        yield f"The estimators disagree: {listed([f'{title} is {value:.3g}' for title, value in told.items()])}."


def alone(levels: Sequence[Level]) -> Iterator[str]:
    """What a model gives where nothing is known of its capacity: a single level, or none that ended as planned."""
    closed = [level for level in levels if isinstance(level.load, ClosedLoad) and level.load.ask is None]
    whole = [level for level in closed if level.complete]
    if closed and not whole:
        yield "No level ended as planned: the throughput in the tables is that of what was measured."
    told = [level for level in whole if level.requests.ok >= FLOORS["p50"]]
    if whole and not told:
        yield f"Too few requests succeeded to speak of throughput (under {FLOORS['p50']} in every level)."
    for level in told[:MOST_TOLD]:
        rate, first = level.throughput["output_tokens_per_s"], _median(level)
        token = "" if first is None else f", the first token after {time(first)} (p50)"
        if rate is not None:
            yield f"It gives {number(rate)} tok/s at {load_title(level.load)}{token}."


def slo(levels: Sequence[Level]) -> Iterator[str]:
    """Where the SLO holds, where it does not and by what, and where that cannot be said."""
    judged = [level for level in levels if level.slo]
    by_result = {result: [level for level in judged if slo_of(level) == result] for result in RESULTS}
    parts = []
    if by_result["pass"]:
        parts.append(f"holds {_reach(by_result['pass'], judged, 'pass')}")
    if by_result["fail"]:
        parts.append(f"is missed {_reach(by_result['fail'], judged, 'fail')} ({_missed(by_result['fail'])})")
    if by_result["undecided"]:
        open_ = by_result["undecided"]
        parts.append(f"is undecided {_reach(open_, judged, 'undecided')} ({_untold(open_)})")
    if parts:
        yield f"The SLO {listed(parts)}."


def _missed(levels: Sequence[Level]) -> str:
    """By what the lowest load missed it; beyond capacity a latency is none, so a load that is not is told by its name.

    The first load that the sentence names needs none.
    """
    named = _as_named(levels)
    lowest = next((level for level in named if not is_over(level.road)), named[0])
    missed = next(clause for clause in lowest.slo if clause.result == "fail")
    if is_over(lowest.road):
        return f"over capacity; {words.clause_title(missed.clause)}"
    return ("" if lowest is named[0] else f"at {load_title(lowest.load)} ") + words.clause(missed)


def _untold(levels: Sequence[Level]) -> str:
    """Why the lowest load is undecided; by its name where that is not why all of them are."""
    named = _as_named(levels)
    reasons = [next(clause for clause in level.slo if clause.result == "undecided") for level in named]
    alike = len({(clause.clause, clause.because) for clause in reasons}) == 1
    why = f"{words.clause_title(reasons[0].clause)}: {reasons[0].because}"
    return why if alike else f"at {load_title(named[0].load)} {why}"


def _as_named(levels: Sequence[Level]) -> list[Level]:
    """In the order in which a sentence names them."""
    return [level for same in words.sorts(levels) for level in same]


def _reach(levels: Sequence[Level], judged: Sequence[Level], result: Result) -> str:
    """``up to 8 users`` where all below passed too, ``from 16 users on`` where all above failed; else one by one."""
    told = []
    for same in words.sorts(judged):
        mine = [level for level in same if level in levels]
        if not mine:
            continue
        first, last = words.load_of(mine[0]), words.load_of(mine[-1])
        below = [level for level in same if words.load_of(level) <= last]
        above = [level for level in same if words.load_of(level) >= first]
        if result == "pass" and len(mine) > 1 and below == mine:
            told.append(f"up to {words.together(mine[-1:])}")
        elif result == "fail" and len(mine) > 1 and above == mine:
            told.append(f"from {words.together(mine[:1])} on")
        elif len(mine) > MOST_TOLD and [level for level in below if level in above] == mine:
            told.append(f"from {words.head(mine[0])} to {words.together(mine[-1:])}")
        else:
            told.append(f"at {words.together(mine)}")
    return listed(told)


def phases(found: Phases) -> Iterator[str]:
    """What reading a prompt and one more user cost; nothing where the fit tells nothing."""
    parts = []
    prefill, decode = found.prefill, found.decode
    if found.prefill_tokens_per_s is not None and prefill.fixed_ms is not None:
        reach = prefill.slope_ms_interval_95
        spread = ""
        if reach and reach[0] > 0:
            spread = f" ({number(1e3 / reach[1])} to {number(1e3 / reach[0])})"
        parts.append(
            f"reading the prompt goes at {number(found.prefill_tokens_per_s)} tokens/s{spread}"
            + (f" plus {time(prefill.fixed_ms)}" if prefill.fixed_ms > 0 else "")
        )
    if decode.slope_ms is not None and decode.fixed_ms is not None and decode.slope_ms > 0:
        reach = decode.slope_ms_interval_95
        spread = f" (±{time((reach[1] - reach[0]) / 2)})" if reach else ""
        if reach[0] > 0 if reach else decode.slope_ms > SLIGHT * decode.fixed_ms:
            parts.append(f"each further user adds {time(decode.slope_ms)}{spread} to every token")
    if parts:
        yield f"{_capital('; '.join(parts))}."


# What says how many are served at once, by kind of endpoint; FOUNDRY.md for the first two, the servers' manuals.
_SETTING = {
    "ollama": "Ollama's OLLAMA_NUM_PARALLEL",
    "llama.cpp": "llama.cpp's --parallel",
    "vllm": "vLLM's --max-num-seqs",
    "lm-studio": "LM Studio's setting for parallel requests",
}


def advice(found: Capacity, kind: str | None) -> Iterator[str]:
    """What to do at the target at hand, where its capacity was reached."""
    if found.loop != "closed" or not found.saturated or found.nature in (None, "scales"):
        return
    most = _firm(found, "knee")
    most_users = found.up_to if found.nature == "batches" or most is None else most.value
    beyond = "that" if most_users is None else users(most_users)
    if kind == "foundry-2" and found.nature in ("shares_the_processor", "serves_one_at_a_time"):
        yield (
            f"Beyond {beyond} queue in the app, or use a model with `engine.dynamic_batching` in its genai_config.json,"
            " which takes several in one step."
        )
    elif kind == "foundry-2":
        yield f"Beyond {beyond} queue in the app, or raise `max_batch_size` in the model's genai_config.json."
    elif kind == "foundry-0.8":
        yield "Foundry Local up to 0.8 serves one request after another: queue in the app, or move to 2.x."
    else:
        setting = _SETTING.get(kind or "", "the server's own setting for parallel requests")
        yield f"Beyond {beyond} queue in the app; how many are served at once is {setting}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
