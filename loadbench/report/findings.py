"""Lays out what several levels say together: capacity, search, phases, what was not run, and results by interval.

Every row of these tables names the levels it stands on; ``markdown`` makes links of them. Formats and escaping are
``console``'s and ``markdown``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from loadbench.analysis import words
from loadbench.analysis.findings import Capacity, Estimate, Fit, Phases, Point, Probe, Search
from loadbench.analysis.road import is_over
from loadbench.analysis.stats import Distribution, Range
from loadbench.analysis.summary import ClosedLoad, Interval, Level, Summary
from loadbench.records import load_title
from loadbench.report.content import Cells, Table
from loadbench.report.words import NONE, clock, figure, milliseconds, share

BAR = 12  # columns of the longest bar
_EIGHTHS = " ▏▎▍▌▋▊▉"
_ESTIMATES = {
    "asymptotic": "N* = X_max · R_min",
    "knee": "knee: nearly all the throughput from",
    "usl_peak": "peak by the USL",
    "parallelism": "X_max ÷ X(1)",
    "in_service": "worked on at once",
    "slo": "most within the SLO",
    "sustained": "highest rate kept up with",
}
_FIND = {"max-concurrency": "most users within the SLO", "max-rate": "highest rate within the SLO"}


@dataclass(frozen=True, slots=True)
class Stands:
    """The levels that a row stands on, and what they are called in short."""

    levels: tuple[int, ...]
    text: str


Row = tuple[str | Stands, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """A table of findings of one model; ``notes`` are sentences below it."""

    model: str
    title: str
    headings: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def findings(summary: Summary) -> list[Finding]:
    """What the verdict stands on: searches and capacities with prefill and decode, estimator by estimator."""
    told = [_search(summary, search) for search in summary.searches]
    told += [_capacity(summary, capacity) for capacity in summary.capacity]
    return told + [_phases(summary, phases) for phases in summary.phases]


def points(summary: Summary) -> list[Finding]:
    """The levels as the capacity verdict saw them, number by number."""
    headings = ("load", "req/s", "95 %", "tok/s", "E2E mean", "in service", "firm")
    return [
        Finding(
            capacity.model,
            f"the numbers it stands on, {capacity.loop} loop",
            headings,
            tuple(_point(summary, point) for point in capacity.points),
        )
        for capacity in summary.capacity
    ]


def not_run(summary: Summary) -> list[str]:
    """What stop rules left out, a line a ladder."""
    levels = {level.index: level for level in summary.levels}
    models = len({left.model for left in summary.not_run}) > 1
    return [
        f"{f'{left.model} ' if models else ''}{', '.join(left.loads)}:"
        f" {f'after {load_title(levels[left.after_level].load)}, ' if left.after_level in levels else ''}{left.because}"
        for left in summary.not_run
        if left.loads
    ]


def _capacity(summary: Summary, found: Capacity) -> Finding:
    unit = "users" if found.loop == "closed" else "1/s"
    rows: list[Row] = []
    everything = _stands(summary, found.levels)
    if found.loop == "closed":
        rows.append(("nature", _nature(found), everything, found.because))
        answer = {True: "yes", False: "no", None: "undecided"}[found.saturated]
        gained = "" if found.last_gain is None else f"the last step gained {_signed(found.last_gain)}"
        rows.append(("saturated", answer, everything, gained))
    if found.rejects_from is not None:
        rows.append(("rejects", f"from {words.load(found.rejects_from, unit)} on", everything, "HTTP errors at once"))
    if found.falls_to is not None:
        rows.append(("at the highest load", f"{share(found.falls_to)} of the best", everything, ""))
    rows += [_estimate(summary, estimate) for estimate in found.estimates]
    if found.usl is not None:
        usl, stands = found.usl, _stands(summary, found.usl.levels)
        for name, value, reach in (
            ("USL contention σ", usl.contention, usl.contention_interval_95),
            ("USL coherency κ", usl.coherency, usl.coherency_interval_95),
        ):
            rows.append((name, f"{value:.3g} ({reach[0]:.3g} to {reach[1]:.3g})", stands, ""))
    title = f"capacity, {found.loop} loop, in {unit}"
    return Finding(found.model, title, ("estimator", "value", "stands on", "because"), tuple(rows))


def _nature(found: Capacity) -> str:
    if found.nature is None:
        return "undecided"
    told = found.nature.replace("_", " ")
    return (
        f"{told}, {found.up_to} at a time"
        if found.up_to and found.nature in ("batches", "shares_in_turns", "scales")
        else told
    )


def _estimate(summary: Summary, estimate: Estimate) -> Row:
    stands = _stands(summary, estimate.levels)
    if estimate.result == "undecided" or estimate.value is None:
        return (_ESTIMATES[estimate.name], "undecided", stands, estimate.because)
    reach = estimate.interval_95
    spread = f" ({figure(reach[0])} to {figure(reach[1])})" if reach else ""
    return (_ESTIMATES[estimate.name], _amount(estimate.value, estimate.unit) + spread, stands, estimate.because)


def _amount(value: float, unit: str) -> str:
    if unit == "users" and value == round(value):
        return words.users(value)
    return f"{figure(value)}{'/s' if unit == '1/s' else f' {unit}'}"


def _point(summary: Summary, point: Point) -> Row:
    return (
        _stands(summary, (point.level,)),
        figure(point.per_s),
        _range(point.per_s_interval_95),
        figure(point.tokens_per_s),
        milliseconds(point.e2e_mean_ms),
        figure(point.in_service),
        "yes" if point.firm else "no",
    )


def _range(reach: Range | None) -> str:
    return NONE if reach is None else f"{figure(reach[0])} to {figure(reach[1])}"


def _stands(summary: Summary, indices: Sequence[int]) -> Stands:
    """``1–8 users`` of several closed levels, ``2–8/s`` of rates; else one by one."""
    mine = [level for level in summary.levels if level.index in set(indices)]
    levels = sorted(mine, key=lambda level: (words.load_of(level), level.index))  # a search goes up and down
    closed = [isinstance(level.load, ClosedLoad) for level in levels]
    loads = sorted({words.load_of(level) for level in levels})
    if len(loads) > 1 and all(map(words.is_fixed, levels)) and (all(closed) or not any(closed)):
        text = f"{loads[0]:.4g}–{words.load(loads[-1], 'users' if closed[0] else '1/s')}"
    else:
        text = ", ".join(dict.fromkeys(load_title(level.load) for level in levels))
    return Stands(tuple(level.index for level in levels), text or "–")


def _signed(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{abs(100 * value):.1f} %"


def _search(summary: Summary, found: Search) -> Finding:
    probes = sorted(found.probes, key=lambda probe: (probe.load, probe.level))
    answer = words.load(found.answer, found.unit) if found.answer is not None else found.result
    notes = [f"answer: {answer}, {found.because}"]
    if found.passed is not None or found.failed is not None:
        ends = [
            f"{words.load(value, found.unit)} {word}"
            for value, word in ((found.passed, "passed"), (found.failed, "failed"))
            if value is not None
        ]
        notes.append(f"bracket: {', '.join(ends)}")
    if found.estimate is not None:
        notes.append(f"estimate: the monotone fit crosses the limit at {_amount(found.estimate, found.unit)}")
    notes += [f"more load did better: {odd}" for odd in found.odd]
    headings = ("load", "level", "what for", "result", "margin", "because")
    rows = tuple(_probe(summary, probe) for probe in probes)
    return Finding(found.model, f"search: {_FIND[found.find]}", headings, rows, tuple(notes))


def _probe(summary: Summary, probe: Probe) -> Row:
    return (
        _stands(summary, (probe.level,)),
        str(probe.level),
        probe.purpose,
        probe.result,
        NONE if probe.margin is None else words.margin(probe.margin),
        probe.because or "",
    )


def _phases(summary: Summary, found: Phases) -> Finding:
    speed = found.prefill_tokens_per_s
    prefill = NONE if speed is None else f"{figure(speed)} tokens/s, {milliseconds(found.prefill.fixed_ms)} fixed"
    rows = (
        ("reading the prompt", *_fit(summary, found.prefill, prefill, "a token")),
        ("every output token", *_fit(summary, found.decode, _decode(found.decode), "a further user")),
    )
    return Finding(found.model, "prefill and decode apart", ("phase", "value", "stands on", "because"), rows)


def _decode(fit: Fit) -> str:
    if fit.slope_ms is None or fit.fixed_ms is None:
        return NONE
    reach, one = fit.slope_ms_interval_95, milliseconds(fit.fixed_ms + fit.slope_ms)
    if reach and reach[0] <= 0 <= reach[1]:
        return f"{one}, no more for further users that could be told from none"
    return f"{one} for one, {'−' if fit.slope_ms < 0 else '+'}{milliseconds(abs(fit.slope_ms))} for each further user"


def _fit(summary: Summary, fit: Fit, value: str, what: str) -> Row:
    reach = fit.slope_ms_interval_95
    spread = (
        f"{milliseconds(reach[0])} to {milliseconds(reach[1])} {what}" if reach else "too few levels for an interval"
    )
    because = fit.not_told or ("" if fit.slope_ms is None else spread)
    return ("undecided" if fit.not_told else value, _stands(summary, fit.levels), because)


def interval_tables(summary: Summary, most: int | None = None) -> list[Table]:
    """A table for every level that has results by interval, a row an interval.

    Of more than ``most`` several in a row make one, told by the one whose first token was slowest: no peak is hidden.
    """
    return [_intervals(level, most) for level in summary.levels if level.intervals]


def _intervals(level: Level, most: int | None) -> Table:
    metric = "ttft" if any(_told(part, "ttft").n for part in level.intervals) else "e2e"
    statistic = "p95" if any(_told(part, metric).p95 is not None for part in level.intervals) else "p50"
    height: Callable[[Interval], float] = lambda part: _told(part, metric).value(statistic) or 0.0  # noqa: E731
    shown, every = list(level.intervals), 1
    if most is not None and len(shown) > most:
        every = math.ceil(len(shown) / most)
        shown = [max(shown[at : at + every], key=height) for at in range(0, len(shown), every)]
    title = f"{load_title(level.load)}, {level.headline} time by interval" + (
        "; over capacity: latencies say how long it was" if is_over(level.road) else ""
    )
    note = f"of every {every} intervals the slowest; all are in report.md and intervals.csv" if every > 1 else None
    columns = [*_numbers(shown, isinstance(level.load, ClosedLoad)), *_latencies(shown)]
    columns.append(_bars(metric, statistic, [height(part) for part in shown]))
    return Table(level.model, title, tuple(columns), note)


def _told(part: Interval, metric: str) -> Distribution:
    return part.latency_ms.get(metric) or Distribution(0)


def _numbers(shown: Sequence[Interval], closed: bool) -> Iterator[Cells]:
    yield Cells(("time",), 0, tuple(clock(part.start_s) for part in shown))
    yield Cells(("users" if closed else "asked /s",), 2, tuple(figure(part.load) for part in shown))
    for rank, name, heading in (
        (3, "requests_per_s", "req/s"),
        (4, "output_tokens_per_s", "tok/s"),
        (9, "goodput_per_s", "good/s"),
    ):
        rates = [part.throughput.get(name) for part in shown]
        if any(rate is not None for rate in rates):
            yield Cells((heading,), rank, tuple(map(figure, rates)))
    shares = [part.throughput.get("goodput_share") for part in shown]
    if any(value is not None for value in shares):
        yield Cells(("goodput",), 5, tuple(map(share, shares)))
    yield Cells(("in flight",), 8, tuple(figure(part.concurrency_reached) for part in shown))
    yield Cells(("failed",), 6, tuple(f"{sum(part.requests.failed.values()):,}" for part in shown))


def _latencies(shown: Sequence[Interval]) -> Iterator[Cells]:
    for rank, metric, title, statistic in (
        (3, "ttft", "TTFT", "p50"),
        (1, "ttft", "TTFT", "p95"),
        (10, "e2e", "E2E", "p50"),
        (7, "e2e", "E2E", "p95"),
    ):
        told = [_told(part, metric) for part in shown]
        if any(distribution.value(statistic) is not None for distribution in told):
            yield Cells(
                (title, f"{statistic} ms"),
                rank,
                tuple(_marked(distribution, statistic) for distribution in told),
                statistic,
                any(statistic in distribution.indicative for distribution in told),
                any(distribution.value(statistic) is None for distribution in told),
            )


def _marked(told: Distribution, statistic: str) -> str:
    return f"{'~' if statistic in told.indicative else ''}{figure(told.value(statistic))}"


def _bars(metric: str, statistic: str, heights: Sequence[float]) -> Cells:
    """A bar a row, as long as the value is high: the level as a picture."""
    title = {"ttft": "TTFT", "e2e": "E2E"}[metric]
    top = max(heights, default=0.0)
    return Cells((title, statistic), 2, tuple(bar(value / top if top else 0.0) for value in heights), left=True)


def bar(part: float) -> str:
    """A bar of so much of its full length, in eighths of a column."""
    eighths = round(8 * BAR * min(1.0, max(0.0, part)))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
