"""Makes the decision's candidates: every model of run.json with its figures, from its levels and what those say.

A figure that cannot be told is None with the reason; a model that never answered has a row all the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np

from loadbench.analysis import words
from loadbench.analysis.decision import Candidate, Decision, Figure
from loadbench.analysis.interval import Z, wilson
from loadbench.analysis.memory_fit import OFF_SHARE, PAGES_BYTES
from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.points import BUSY_SHARE, SERVES_ON, see
from loadbench.analysis.ranking import rank
from loadbench.analysis.rundir import RunData
from loadbench.analysis.span import Span
from loadbench.analysis.stats import FLOORS, LEASTS, NS_PER_MS, Distribution, Floats, Range
from loadbench.analysis.summary import ClosedLoad, Level, Summary
from loadbench.records import load_title

ONCE_TIMES = 1.5
"""How far off a time is that was taken once: of eight loads of one small model by one service, on two busy cores, seven
took within this factor of their median (143 to 400 ms around 280)."""


MOST_THROWS = 1000  # beyond, the normal distribution is as good


@dataclass(frozen=True, slots=True)
class _Measured:
    """What there is of one model: its row of run.json, its plain levels with their spans, and the run as a whole."""

    row: Mapping[str, Any]
    levels: Sequence[tuple[Level, Span]]
    summary: Summary
    lowest: Level | None
    absent: str  # why it has no levels
    after: str | None  # the model that the same process had held before


def decide(
    run: RunData, spans: Sequence[Span], summary: Summary, weights: Mapping[str, float] | None
) -> Decision | None:
    """The table, ranked where there are weights; None for a run of one model of which nobody asks for quality."""
    asked = bool(weights) or bool(run.facts["scenario"].get("quality")) or bool(summary.quality)
    if len(run.facts["models"]) < 2 and not asked:
        return None
    pairs = [pair for pair in zip(summary.levels, spans, strict=True) if not pair[1].is_rung]
    after = _after(run)
    rows = enumerate(run.facts["models"])
    candidates = tuple(_candidate(replace(_of(row, pairs, summary), after=after.get(place))) for place, row in rows)
    return Decision(candidates, rank(candidates, weights) if weights else None)


def _of(row: Mapping[str, Any], pairs: Sequence[tuple[Level, Span]], summary: Summary) -> _Measured:
    mine = [pair for pair in pairs if pair[0].model == row["id"]]
    absent = "no level of it was run" if row["status"] == "ok" else "not measured"
    answered = [level for level, _ in mine if level.requests.ok]
    lowest = min(answered or [level for level, _ in mine], key=load_order, default=None)
    return _Measured(row, mine, summary, lowest, absent, None)


def _after(run: RunData) -> dict[int, str]:
    """By place in the scenario, the model that was loaded last before it by the same process.

    The embedded service is started anew for every model; any other keeps what it has once taken.
    """
    if run.facts["endpoint"].get("embedded"):
        return {}
    rows, found, last = run.facts["models"], dict[int, str](), None
    for place in run.facts.get("model_order") or range(len(rows)):
        if last is not None:
            found[place] = last
        if rows[place]["load_ms"] is not None or rows[place].get("failed_at") in ("load", "answer"):
            last = rows[place]["id"] or rows[place]["asked"]
    return found


def load_order(level: Level) -> tuple[int, float, int]:
    """Closed loops first, the fewest users; of several levels with as many, that with the most answers."""
    changes = bool(getattr(level.load, "legs", ()) or getattr(level.load, "trace", None))
    closed = isinstance(level.load, ClosedLoad)
    load = level.load.concurrency if isinstance(level.load, ClosedLoad) else level.load.rate_per_s
    return 2 * changes + (not closed), load, -level.requests.ok


def _candidate(of: _Measured) -> Candidate:
    row = of.row
    load_ms, first_ms = (_once(row.get(name)) for name in ("load_ms", "first_ms"))
    unloaded = None if row["status"] == "ok" else of.absent
    energy = None if of.lowest is None else of.lowest.energy
    return Candidate(
        model=row["id"] or row["asked"],
        asked=row["asked"],
        status=row["status"],
        failed_at=row.get("failed_at"),
        reason=row["reason"],
        device=row.get("device"),
        execution_provider=row.get("execution_provider"),
        licence=row.get("licence"),
        capabilities=tuple(row.get("capabilities") or ()),
        at=None if of.lowest is None else load_title(of.lowest.load),
        ttft_p50_ms=_latency(of, "ttft", "p50"),
        ttft_p95_ms=_latency(of, "ttft", "p95"),
        e2e_p50_ms=_latency(of, "e2e", "p50"),
        e2e_p95_ms=_latency(of, "e2e", "p95"),
        tokens_per_s=_speed(of),
        best_tokens_per_s=_best(of),
        memory_loaded_bytes=_loaded(of),
        memory_per_stream_bytes=_per_stream(of),
        download_ms=_or(_once(row.get("downloaded_ms")), unloaded or "it was there, or nobody says"),
        load_ms=_or(load_ms, unloaded or "it was loaded already, or nobody says"),
        first_token_ms=_or(first_ms, unloaded or "no first answer was timed"),
        cold_start_ms=_cold(load_ms, first_ms, unloaded),
        disk_bytes=_disk(row),
        quality=_quality(of),
        failed_share=_failed(of),
        joules_per_output_token=_joules(of),
        cost_per_million_output_tokens=_cost(of),
        currency=None if energy is None else energy.currency,
        outcomes=dict(_outcomes(of).most_common()),
    )


def _absent(because: str) -> Figure:
    return Figure(None, because=because)


def _or(figure: Figure | None, because: str) -> Figure:
    return figure or _absent(because)


def _once(value: float | None) -> Figure | None:
    """A time that was taken once: nobody knows how far chance moved it."""
    if value is None:
        return None
    rough = (value / ONCE_TIMES, value * ONCE_TIMES)
    return Figure(value, n=1, firm=False, source="measured", because="taken once", rough=rough)


def _cold(load_ms: Figure | None, first_ms: Figure | None, unloaded: str | None) -> Figure:
    if load_ms is None or first_ms is None:
        missing = "the load" if load_ms is None else "the first token"
        return _absent(unloaded or f"{missing} was not timed; a model that is loaded already has no cold start")
    assert load_ms.value is not None and first_ms.value is not None
    return _or(_once(load_ms.value + first_ms.value), "")


def _latency(of: _Measured, metric: str, statistic: str) -> Figure:
    level = of.lowest
    if level is None:
        return _absent(of.absent)
    told: Distribution = level.latency_ms[metric][level.headline]
    at, value = load_title(level.load), told.value(statistic)
    if value is None:
        why = "no request succeeded" if not level.requests.ok else "nothing was streamed"
        few = f"{told.n} samples, where it takes {LEASTS[statistic]}"
        return Figure(None, n=told.n, at=at, because=few if told.n else why)
    reach: Range | None = getattr(told.interval_95, statistic, None)
    doubt = _doubt(level)
    kept = None if doubt else reach
    rough = None if kept else reach
    if rough is None and kept is None and statistic == "p50":
        rough = of_median(_values(of, level, metric))
    return Figure(
        value=value,
        interval_95=kept,
        n=told.n,
        firm=doubt is None and statistic not in told.indicative,
        source="measured",
        at=at,
        because=doubt or (None if reach else told.not_estimable),
        rough=rough,
    )


def _doubt(level: Level) -> str | None:
    """Why the level's times are not the target's own, as ``points`` doubts what it served."""
    if level.client.bound:
        return f"the client was the limit: {'; '.join(level.client.bound_because)}"
    if level.target.state not in SERVES_ON:
        return f"the target was {level.target.state} after it"
    others = level.client.others_share
    return f"other programs used {others:.0%} of this machine's CPU" if others and others > BUSY_SHARE else None


def _values(of: _Measured, level: Level, metric: str) -> Floats:
    span = next(span for found, span in of.levels if found.index == level.index)
    stamps = LATENCIES[metric].series[level.headline]
    assert stamps is not None
    counted = span.samples.take(span.ok & span.inside) if span.trimmed_s else span.samples.take(span.ok)
    values = stamps(counted)
    return np.sort(values[~np.isnan(values)]) / NS_PER_MS


def of_median(ordered: Floats) -> Range | None:
    """What the median would lie in if its values were independent, the sign test's interval: of so many throws of a
    coin fewer than that show heads in 2.5 of 100 cases. None for fewer than six values, which bound nothing."""
    n, below = ordered.size, 0
    if n > MOST_THROWS:
        below = math.floor((n - Z * math.sqrt(n)) / 2)
    else:
        fewer = 1
        while 40 * fewer <= 2**n:
            below += 1
            fewer += math.comb(n, below)
    return (float(ordered[below - 1]), float(ordered[n - below])) if below else None


def _speed(of: _Measured) -> Figure:
    level = of.lowest
    if level is None:
        return _absent(of.absent)
    if not isinstance(level.load, ClosedLoad) or level.load.concurrency != 1 or level.load.legs:
        return _absent(f"no level of one user; the lowest load is {load_title(level.load)}")
    return _rate(of, level)


def _best(of: _Measured) -> Figure:
    found = [_rate(of, level) for level, _ in of.levels]
    told = [figure for figure in found if figure.value is not None]
    best = max(told, key=attrgetter("value"), default=None)  # a doubt about it is told, never left out
    return _or(best, of.absent if not of.levels else "no level gave a token")


def _rate(of: _Measured, level: Level) -> Figure:
    """Output tokens per second of the level. Answers per second have an interval; tokens are taken to be as sure."""
    value, at = level.throughput["output_tokens_per_s"], load_title(level.load)
    if not value:
        return Figure(None, n=level.requests.ok, at=at, because="no token arrived in its window")
    span = next(span for found, span in of.levels if found.index == level.index)
    if span.changes or not level.complete:
        why = "the load changes by plan" if span.changes else "the level was cut off"
        return Figure(value, None, level.requests.ok, False, "measured", at, why)
    seen = see(span, level)
    point, reach = seen.point, seen.point.per_s_interval_95
    interval = (value * reach[0] / point.per_s, value * reach[1] / point.per_s) if reach and point.per_s else None
    kept = point.firm and interval is not None
    return Figure(
        value=value,
        interval_95=interval if kept else None,
        n=level.requests.ok,
        firm=point.firm,
        source="measured",
        at=at,
        because=seen.doubt,
        rough=None if kept else interval,
    )


def _loaded(of: _Measured) -> Figure:
    """Resident memory after the load less that before it; of a model on a device, what its processes hold there."""
    row = of.row
    takes = next((memory for memory in of.summary.memory if memory.model == row["id"]), None)
    if takes is not None and takes.of == "gpu":
        held = [level.memory.before_bytes for level, _ in of.levels if level.memory and level.memory.before_bytes]
        return _held(of, held[0]) if held else _absent("GPU memory was not read before its first level")
    idle, loaded = row.get("rss_idle_bytes"), row.get("rss_loaded_bytes")
    if idle is None or loaded is None:
        return _absent(of.absent if row["status"] != "ok" else "the service's memory was not read around the load")
    if loaded <= idle:
        return _absent("the service held no more after the load than before: it had kept what an earlier model took")
    return _held(of, loaded - idle)


def _held(of: _Measured, value: int) -> Figure:
    """Bytes that were read once, as sure as a reading of resident memory is."""
    off = PAGES_BYTES + OFF_SHARE * value
    if of.after is not None:
        why = f"at least: the same process had held {of.after}, and what that left behind was there to be used again"
        return Figure(value, n=1, firm=False, source="measured", because=why, at_least=True)
    if value <= off:
        return _absent(f"{words.size(value)} more than before, and a reading is {words.size(off)} off")
    pressed = {level.memory.verdict for level, _ in of.levels if level.memory} & {*_PRESSED}
    told = [_PRESSED[verdict] for verdict in sorted(pressed)]
    told += [_APART] if len({takes.of == "gpu" for takes in of.summary.memory}) > 1 else []
    doubt = "; ".join(told) or None
    rough = (max(value - off, 1.0), value + off)
    return Figure(value, n=1, firm=doubt is None, source="measured", because=doubt, rough=rough)


_APART = "of this run's models some are in a GPU's memory and some in the machine's: two different things"
_PRESSED = {
    "spills": "memory spilled under load: what is swapped out, or shared with the host, is not counted",
    "under_pressure": "the machine was short of memory: what is swapped out is not counted",
}


def _per_stream(of: _Measured) -> Figure:
    takes = next((memory for memory in of.summary.memory if memory.model == of.row["id"]), None)
    if takes is None:
        return _absent(of.absent if of.row["status"] != "ok" else "no memory of the target was read")
    stream, token = takes.per_stream, takes.per_token
    if token.value_bytes is not None:
        if stream.value_bytes is None:  # unknown is not nothing: its tokens alone would be too little
            return _absent(stream.not_told or "the levels do not tell it")
        known = [level.memory.tokens for level, _ in of.levels if level.memory and level.memory.tokens]
        if not known:
            return _absent("it depends on the tokens, and the levels do not say how many were asked for")
        tokens: float | None = known[0]
        value = stream.value_bytes + token.value_bytes * known[0]
        interval = None
        if stream.interval_95 is not None and token.interval_95 is not None:
            low, high = (one + each * known[0] for one, each in zip(stream.interval_95, token.interval_95, strict=True))
            interval = low, high
    elif stream.value_bytes is not None:
        value, interval, tokens = stream.value_bytes, stream.interval_95, takes.at_tokens
    else:
        return _absent(stream.not_told or token.not_told or "the levels do not tell it")
    at = f"{tokens:,.0f} tokens each" if tokens else None
    why = None if interval else stream.not_told or token.not_told
    return Figure(value, interval, len(takes.levels), interval is not None, "measured", at, why)


def _disk(row: Mapping[str, Any]) -> Figure:
    size = row.get("size_bytes")
    return _absent("nobody says how large it is on disk") if size is None else Figure(size, firm=True, source="told")


def _quality(of: _Measured) -> Figure:
    found = next((one for one in of.summary.quality if one.model == of.row["id"]), None)
    if found is None or found.mark is None:
        why = of.absent if of.row["status"] != "ok" else "no answer of it has a mark"
        return _absent(why)
    mark = found.mark
    source = "itself" if mark.itself else mark.source
    return Figure(mark.value, mark.interval_95, mark.n, mark.firm, source, mark.basis, mark.doubt)


def _outcomes(of: _Measured) -> Counter[str]:
    return sum((Counter(level.requests.failed) for level, _ in of.levels), Counter[str]())


def _failed(of: _Measured) -> Figure:
    """The share with Wilson's score interval (1927), which is none of zero width where nothing failed."""
    n = sum(level.requests.attempted for level, _ in of.levels)
    if not n:
        return _absent(of.absent)
    share = _outcomes(of).total() / n
    return Figure(share, wilson(share, n), n, n >= FLOORS["p95"], "measured")


def _joules(of: _Measured) -> Figure:
    level = of.lowest
    if level is None:
        return _absent(of.absent)
    at, energy = load_title(level.load), level.energy
    if energy is None or energy.joules_per_output_token is None:
        return Figure(None, at=at, because=energy.because if energy else "no power was read, and none is stated")
    if not energy.joules_per_output_token or not energy.watts:
        return Figure(None, at=at, because="the power that was read is 0 W: its meter does not count here")
    value, rate = energy.joules_per_output_token, _rate(of, level)
    watts = energy.watts
    spread = energy.watts_interval_95 or (watts, watts)
    reach = (
        rate.reach
        and rate.value
        and (
            value * spread[0] / watts * rate.value / rate.reach[1],
            value * spread[1] / watts * rate.value / max(rate.reach[0], 1e-9),
        )
    )
    sure = rate.interval_95 is not None and (energy.source == "stated" or energy.watts_interval_95 is not None)
    return Figure(
        value=value,
        interval_95=(reach or None) if sure else None,
        n=rate.n,
        firm=bool(rate.firm and energy.firm),
        source=energy.source,
        at=at,
        because=energy.because,
        rough=None if sure else reach or None,
    )


def _cost(of: _Measured) -> Figure:
    joules = _joules(of)
    energy = None if of.lowest is None else of.lowest.energy
    if joules.value is None or energy is None:
        return joules
    if energy.cost_per_million_output_tokens is None:
        return Figure(None, at=joules.at, because="the scenario has no price_per_kwh")
    each = energy.cost_per_million_output_tokens / joules.value
    told = replace(joules, value=energy.cost_per_million_output_tokens)
    return replace(told, interval_95=_times(joules.interval_95, each), rough=_times(joules.rough, each))


def _times(reach: Range | None, factor: float) -> Range | None:
    return None if reach is None else (reach[0] * factor, reach[1] * factor)
