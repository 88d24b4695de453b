"""The figures over time: what the target did and what the client did, panel below panel on one time axis."""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.summary import Summary
from loadbench.analysis.timeline import GIVEN_UP, Bin, Failed, Timeline
from loadbench.records import load_title
from loadbench.report import picture
from loadbench.report.escape import plain
from loadbench.report.figures_strip import strip
from loadbench.report.memory import OF
from loadbench.report.picture import CLOCK, MS, Figure, LeftOut, Rows, Spec, layer, tip, told, x_axis, y_axis
from loadbench.report.words import clock, count, figure, milliseconds, octets, share

SECTION = "Over time"
PANEL = 110  # pixels
MOST_ROWS = 40  # of the table: bins that follow one another are put together until they fit
MOST_TICKS = 8
TICKS_S = (0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)


def time_figures(summary: Summary, line: Timeline) -> Iterator[Figure | LeftOut]:
    """What happened when: to the requests, to the target's memory, and to us."""
    yield _requests(summary, line)
    yield _client(summary, line)


def _requests(summary: Summary, line: Timeline) -> Figure | LeftOut:
    title = "What happened when?"
    if not (line.ttft or line.e2e or line.failed or line.in_flight):
        return LeftOut(SECTION, title, "no request was sent in any level")
    x, died = _axis(line), _died(summary, line)
    lines, limit = _lines(line, x, died), _limit(summary, line)
    first = ("ttft", line.ttft) if line.ttft else ("e2e", line.e2e)
    views = [strip(summary, line, x)]
    if first[1]:
        views.append(
            _banded(first[1], line, f"{LATENCIES[first[0]].title}, service", milliseconds, 0, MS).view(x, lines)
        )
    if line.tpot:
        views.append(_banded(line.tpot, line, "TPOT", milliseconds, 1, MS).view(x, lines))
    if line.failed:
        views.append(_failures(line, x, lines))
    if line.in_flight:
        views.append(_banded(line.in_flight, line, "requests in flight", figure, 2, mean=True).view(x, lines))
    if line.memory:
        of = f"target: {OF.get(line.of or '', 'memory')}"
        panel = _banded(line.memory, line, of, octets, 3, limit=limit)
        views.append(panel.view(x, lines))
    failed = sum(one.n for one in line.failed if one.outcome != GIVEN_UP)
    slowest = max(first[1], key=lambda bin_: bin_.most, default=None)
    alt = f"{count(failed, 'request')} failed." if failed else "No request failed."
    if slowest is not None:
        name = LATENCIES[first[0]].title
        alt = f"The slowest {name}, {milliseconds(slowest.most)}, was at {clock(slowest.start_s)}. {alt}"
    alt += "".join(f" At {clock(at_s)} the target failed: {state}." for at_s, state in died)
    headings, rows = _table(line, first[0], first[1])
    return Figure(
        "over-time",
        SECTION,
        title,
        picture.stack(views),
        alt,
        headings,
        rows,
        _note(line, bool(died), limit),
        core=True,
    )


def _note(line: Timeline, died: bool, limit: float | None) -> str:
    drawn = {"TTFT and TPOT": line.ttft, "requests in flight": line.in_flight, "memory": line.memory}
    absent = [name for name, bins in drawn.items() if not bins]
    parts = (
        f"bins of {line.step_s:g} s: the band is from the least to the most in each, the line its median; in flight: "
        "its mean",
        "latencies are of requests that succeeded, at when they were due" if line.failed else None,
        "grey lines: a level begins",
        "red line: the target fails" if died else None,
        None if limit is None else f"dashed: the target's limit, {octets(limit)}",
        f"not drawn, because there is none: {', '.join(absent)}" if absent else None,
    )
    return "; ".join(filter(None, parts))


def _died(summary: Summary, line: Timeline) -> list[tuple[float, str]]:
    """When the target failed, to a bin: at the first request that it took with it, else at the end of the level."""
    moments = []
    for recovery in summary.recoveries:
        parts = [phase for phase in line.phases if phase.level == recovery.level]
        if parts:
            start_s, end_s = parts[0].start_s, parts[-1].end_s
            lost = [one.start_s for one in line.failed if one.outcome != GIVEN_UP and start_s <= one.end_s <= end_s + 1]
            moments.append((min([*lost, end_s]), recovery.state.replace("_", " ")))
    return moments


def _limit(summary: Summary, line: Timeline) -> float | None:
    """The limit of the memory that is drawn, where it is not far above it."""
    limits = [level.memory.limit_bytes for level in summary.levels if level.memory and level.memory.limit_bytes]
    top = max((bin_.most for bin_ in line.memory), default=0.0)
    return min(limits) if limits and min(limits) < 3 * top else None


def _axis(line: Timeline) -> Spec:
    start_s = min([phase.start_s for phase in line.phases], default=0.0)
    end_s = max(line.end_s, start_s + line.step_s)
    step_s = next((step for step in TICKS_S if (end_s - start_s) / step <= MOST_TICKS), TICKS_S[-1])
    ticks = [number * step_s for number in range(math.ceil(start_s / step_s), math.floor(end_s / step_s) + 1)]
    scale = {"domain": [start_s, end_s], "nice": False}
    return x_axis("x", None, scale=scale, axis={"labelExpr": CLOCK, "values": ticks, "labelFlush": True})


@dataclass(frozen=True, slots=True)
class Panel:
    """One quantity over time as bins: its rows, its y axis and its colour."""

    rows: Rows
    y: Spec
    title: str
    colour: str

    limit: float | None = None

    def view(self, x: Spec, lines: Sequence[Spec], height: int = PANEL) -> Spec:
        """On ``lines``, which all panels share; ``limit`` is a line across it."""
        hue, y = {"value": self.colour}, self.y
        detail = {"field": "part", "type": "nominal"}
        thin = {"type": "rule", "strokeWidth": 2.4, "opacity": 0.45}
        dot = {"type": "point", "filled": True, "size": 16, "opacity": 1}
        dashed = {"type": "rule", "color": picture.BAD, "strokeDash": [4, 3], "strokeWidth": 1.4}
        layers = [
            *lines,
            *([] if self.limit is None else [layer([{"y": self.limit}], dashed, y=y)]),
            layer(self.rows, thin, x=x, y=y | {"field": "low"}, y2={"field": "high"}, color=hue),
            layer(self.rows, {"type": "line", "strokeWidth": 1.8}, x=x, y=y, color=hue, detail=detail),
            layer(self.rows, dot, x=x, y=y, color=hue, tooltip=tip()),
        ]
        return picture.view(layers, f"{self.title} (log)" if picture.is_log(y) else self.title, height=height)


def _banded(
    bins: Sequence[Bin],
    line: Timeline,
    title: str,
    show: Callable[[float | None], str],
    colour: int,
    labels: str | None = None,
    *,
    mean: bool = False,
    limit: float | None = None,
) -> Panel:
    """The band from the least to the most of each bin, and a line through its median; broken where there is nothing."""
    middle = "mean" if mean else "median"
    rows: list[dict[str, Any]] = []
    part, last_s = 0, -1.0
    gap_s = 3 * line.step_s + 2.0  # a reading a second leaves bins of half a second empty
    starts_s = sorted({phase.level: phase.start_s for phase in reversed(line.phases)}.values())
    for bin_ in bins:
        part += bin_.start_s - last_s > gap_s or bisect(starts_s, bin_.end_s) > bisect(starts_s, last_s + line.step_s)
        last_s = bin_.start_s
        rows.append(
            {
                "x": max((bin_.start_s + bin_.end_s) / 2, *starts_s[:1]),
                "low": bin_.least,
                "y": bin_.median,
                "high": bin_.most,
                "part": part,
                "tip": told(
                    f"{clock(bin_.start_s)}: {title}",
                    f"{middle} {show(bin_.median)}",
                    f"{show(bin_.least)} to {show(bin_.most)}",
                    None if mean else f"n {bin_.n:,}",
                ),
            }
        )
    top = max([bin_.most for bin_ in bins] + ([limit] if limit else []))
    axis: Spec = {"labelExpr": labels} if labels else {}
    if show is octets:
        axis = picture.octet_axis(top)
    y = y_axis("y", scale={"domain": [0, 1.08 * top or 1]}, axis={"tickCount": 4} | axis)
    if labels == MS:
        y = picture.latency_axis("y", [bin_.least for bin_ in bins] + [top], ticks=4)
    return Panel(rows, y, title, picture.SERIES[colour], limit)


def _lines(line: Timeline, x: Spec, died: Sequence[tuple[float, str]]) -> list[Spec]:
    """What goes through all panels: where levels begin, and where the target failed."""
    starts = {phase.level: phase.start_s for phase in reversed(line.phases)}
    begun, ended = [{"x": start_s} for start_s in starts.values()], [{"x": at_s} for at_s, _ in died]
    lines = [layer(begun, {"type": "rule", "color": picture.GRID}, x=x)] if begun else []
    red = {"type": "rule", "color": picture.BAD, "strokeWidth": 1.6}
    return [*lines, *([layer(ended, red, x=x)] if ended else [])]


def _failures(line: Timeline, x: Spec, lines: Sequence[Spec]) -> Spec:
    outcomes = list(dict.fromkeys(failed.outcome for failed in line.failed))
    below: Counter[float] = Counter()
    rows = []
    for failed in line.failed:
        name, base = plain(failed.outcome.replace("_", " ")), below[failed.start_s]
        below[failed.start_s] += failed.n
        place = {"x": failed.start_s, "x2": failed.end_s, "n": base + failed.n, "n0": base, "outcome": name}
        rows.append(place | {"tip": told(clock(failed.start_s), f"{failed.n:,} {name}")})
    names = [plain(outcome.replace("_", " ")) for outcome in outcomes]
    others = cycle([picture.BAD, *(picture.SERIES[place] for place in (4, 0, 2, 3, 5))])
    colours = [picture.MUTED if outcome == GIVEN_UP else next(others) for outcome in outcomes]
    colour = {
        "field": "outcome",
        "type": "nominal",
        "scale": {"domain": names, "range": colours},
        "legend": {"title": None},
    }
    most = max(below.values())
    y = y_axis("n", scale={"domain": [0, most]}, axis=picture.count_axis(most))
    ends = {"x2": {"field": "x2"}, "y2": {"field": "n0"}}
    bars = layer(rows, {"type": "rect", "minWidth": 3}, x=x, y=y, color=colour, tooltip=tip(), **ends)
    return picture.view(
        [*lines, bars],
        "failed requests" + (", and given up as planned" if GIVEN_UP in outcomes else ""),
        height=PANEL - 40,
    )


def _table(line: Timeline, metric: str, bins: Sequence[Bin]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The same by the clock, with bins put together so that there are few enough rows to be read out."""
    ends: list[Bin | Failed] = [*bins, *line.in_flight, *line.failed]
    if not ends:
        return ("time",), ()
    start_s, end_s = min(bin_.start_s for bin_ in ends), max(bin_.end_s for bin_ in ends)
    every_s = line.step_s
    while (end_s - start_s) / every_s > MOST_ROWS:
        every_s *= 2
    title = LATENCIES[metric].title
    headings: tuple[str, ...] = (
        "time",
        f"{title} n",
        f"{title} least",
        f"{title} most",
        "TPOT most",
        "in flight at most",
        "failed",
    )
    headings += ("memory at most",) if line.memory else ()
    rows = []
    for number in range(int((end_s - start_s) / every_s) + 1):
        low_s, high_s = start_s + number * every_s, start_s + (number + 1) * every_s

        def inside(of: Sequence[Bin], low_s: float = low_s, high_s: float = high_s) -> list[Bin]:
            return [bin_ for bin_ in of if low_s <= bin_.start_s < high_s - 1e-9]

        latencies, tpot, flying, held = map(inside, (bins, line.tpot, line.in_flight, line.memory))
        lost = [one for one in line.failed if one.outcome != GIVEN_UP]
        failed = sum(one.n for one in lost if low_s <= one.start_s < high_s - 1e-9)
        cells = (
            clock(low_s) if every_s >= 1 else f"{low_s:.1f} s",
            f"{sum(bin_.n for bin_ in latencies):,}",
            milliseconds(min((bin_.least for bin_ in latencies), default=None)),
            milliseconds(max((bin_.most for bin_ in latencies), default=None)),
            milliseconds(max((bin_.most for bin_ in tpot), default=None)),
            figure(max((bin_.most for bin_ in flying), default=None)),
            f"{failed:,}",
        )
        if latencies or flying or failed or held:
            rows.append(cells + ((octets(max((b.most for b in held), default=None)),) if line.memory else ()))
    return headings, tuple(rows)


def _client(summary: Summary, line: Timeline) -> Figure | LeftOut:
    title = "Was it us? The client itself over time"
    section = "The client itself"
    if not (line.lag or line.cpu):
        because = "no ticks of one process were recorded: several workers keep their own, and the table has their worst"
        return LeftOut(section, title, because)
    x = _axis(line)
    lines = _lines(line, x, _died(summary, line))
    panels = (
        (line.lag, "event loop late by at most", milliseconds, 1, MS),
        (line.cpu, "CPU of our process, of one core", share, 0, "format(datum.value, '.0%')"),
        (line.rss, "memory of our process", octets, 3, None),
    )
    views = [
        _banded(bins, line, name, show, hue, labels).view(x, lines, height=84)
        for bins, name, show, hue, labels in panels
        if bins
    ]
    rows = []
    for level in summary.levels:
        client = level.client
        bound = {True: "yes", False: "no", None: "undecided"}[client.bound]
        rows.append(
            (
                load_title(level.load),
                bound,
                "; ".join(client.bound_because),
                share(client.cpu_share),
                milliseconds(client.loop_lag_p99_ms),
                milliseconds(client.loop_lag_max_ms),
                "n/a" if client.new_connections is None else f"{client.new_connections:,}",
                share(client.steal_share),
                share(client.ceiling_share),
            )
        )
    times = sum(level.client.bound is True for level in summary.levels)
    alt = f"The client shaped the numbers at {count(times, 'level')}." if times else "It shaped no level's numbers."
    headings = (
        "load",
        "client-bound",
        "because",
        "CPU",
        "lag p99",
        "lag at most",
        "new connections",
        "steal",
        "of ceiling",
    )
    note = "grey lines: a level begins"
    return Figure("client", section, title, picture.stack(views), alt, headings, tuple(rows), note)
