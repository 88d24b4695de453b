"""The figures over time: what the target did and what the client did, panel below panel on one time axis."""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.road import is_over
from loadbench.analysis.summary import ClosedLoad, Summary
from loadbench.analysis.timeline import GIVEN_UP, Bin, Timeline
from loadbench.analysis.words import is_fixed, load_of
from loadbench.records import load_title
from loadbench.report import picture
from loadbench.report.escape import plain
from loadbench.report.memory import OF
from loadbench.report.picture import CLOCK, MS, Figure, LeftOut, Spec, layer, tip, told, x_axis, y_axis
from loadbench.report.words import clock, count, figure, milliseconds, octets, share

SECTION = "Over time"
PANEL, STRIP = 110, 34  # pixels
LEAST_WIDTH = 0.03  # of the axis: a narrower level has no name on its strip
MOST_ROWS = 40  # of the table: bins that follow one another are put together until they fit
ROW = {"load": picture.SERIES[0], "warm-up": picture.SERIES[4], "drain": picture.GRID}
WORDS = {"load": "load", "warm-up": "warm-up, left out", "drain": "drain"}


def time_figures(summary: Summary, line: Timeline) -> Iterator[Figure | LeftOut]:
    """What happened when: to the requests, to the target's memory, and to us."""
    yield _requests(summary, line)
    yield _client(summary, line)


def _requests(summary: Summary, line: Timeline) -> Figure | LeftOut:
    title = "What happened when?"
    if not (line.ttft or line.e2e or line.failed or line.in_flight):
        return LeftOut(SECTION, title, "no request was sent in any level")
    x = _axis(line)
    first = ("ttft", line.ttft) if line.ttft else ("e2e", line.e2e)
    views = [_phases(summary, line, x)]
    if first[1]:
        views.append(_banded(first[1], x, line, f"{LATENCIES[first[0]].title}, service", milliseconds, 0, MS))
    if line.tpot:
        views.append(_banded(line.tpot, x, line, "TPOT", milliseconds, 1, MS))
    if line.failed:
        views.append(_failures(line, x))
    views.append(_banded(line.in_flight, x, line, "requests in flight", figure, 2, mean=True))
    if line.memory:
        of = f"the target's {OF.get(line.of or '', 'memory')}"
        views.append(_banded(line.memory, x, line, of, octets, 3))
    absent = [name for name, bins in (("TTFT and TPOT", line.ttft), ("memory", line.memory)) if not bins]
    failed = sum(one.n for one in line.failed if one.outcome != GIVEN_UP)
    slowest = max(first[1], key=lambda bin_: bin_.most, default=None)
    alt = f"{count(failed, 'request')} failed." if failed else "No request failed."
    if slowest is not None:
        name = LATENCIES[first[0]].title
        alt = f"The slowest {name}, {milliseconds(slowest.most)}, was at {clock(slowest.start_s)}. {alt}"
    headings, rows = _table(line, first[0], first[1])
    note = f"bins of {line.step_s:g} s: the band is from the least to the most in each, the line its median"
    note += "; in flight: its mean" + (f"; not drawn, because there is none: {', '.join(absent)}" if absent else "")
    return Figure("over-time", SECTION, title, picture.stack(views), alt, headings, rows, note, core=True)


def _axis(line: Timeline) -> Spec:
    start_s = min([phase.start_s for phase in line.phases], default=0.0)
    domain = [start_s, max(line.end_s, start_s + line.step_s)]
    scale = {"domain": domain, "nice": False}
    return x_axis("x", None, scale=scale, axis={"labelExpr": CLOCK, "tickCount": 8, "labelFlush": True})


def _phases(summary: Summary, line: Timeline, x: Spec) -> Spec:
    """A strip with the levels: load, warm-up that was left out, drain; the load of each where there is room for it."""
    levels = {level.index: level for level in summary.levels}
    rows, names = [], []
    domain = x["scale"]["domain"]
    for phase in line.phases:
        level = levels.get(phase.level)
        title = load_title(level.load) if level else f"level {phase.level}"
        row = {"x": phase.start_s, "x2": phase.end_s, "phase": WORDS[phase.name]}
        row["tip"] = told(
            f"level {phase.level}: {title}",
            f"{WORDS[phase.name]}, {clock(phase.start_s)} to {clock(phase.end_s)}",
            level.model if level else None,
            "over capacity" if level and is_over(level.road) else None,
        )
        rows.append(row)
        wide = (phase.end_s - phase.start_s) / (domain[1] - domain[0])
        if phase.name == "load" and level and wide >= LEAST_WIDTH:
            short = f"{load_of(level):g}" if is_fixed(level) else "~"
            names.append({"x": (phase.start_s + phase.end_s) / 2, "name": short})
    closed = {isinstance(level.load, ClosedLoad) for level in summary.levels}
    unit = "users" if closed == {True} else "requests/s" if closed == {False} else "users, then requests/s"
    domain_names = [WORDS[name] for name in ROW if any(row["phase"] == WORDS[name] for row in rows)]
    colours = [ROW[name] for name in ROW if WORDS[name] in domain_names]
    colour = {
        "field": "phase",
        "type": "nominal",
        "scale": {"domain": domain_names, "range": colours},
        "legend": {"title": None},
    }
    place = {"field": "y", "type": "nominal", "axis": None}
    every = [row | {"y": ""} for row in rows]
    mark = {"type": "bar", "stroke": picture.PAPER, "strokeWidth": 1, "height": {"band": 1}, "opacity": 0.85}
    x = x | {"axis": None}
    layers = [
        layer(every, mark, x=x, x2={"field": "x2"}, y=place, color=colour, tooltip=tip()),
        layer(
            [name | {"y": ""} for name in names],
            {"type": "text", "color": "#ffffff", "fontWeight": "bold", "fontSize": 11},
            x=x,
            y=place,
            text={"field": "name", "type": "nominal"},
        ),
    ]
    return picture.view(layers, f"load, in {unit}", height=STRIP - 10)


def _banded(
    bins: Sequence[Bin],
    x: Spec,
    line: Timeline,
    title: str,
    show: Callable[[float | None], str],
    colour: int,
    labels: str | None = None,
    *,
    mean: bool = False,
    height: int = PANEL,
) -> Spec:
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
                "x": (bin_.start_s + bin_.end_s) / 2,
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
    top = max(bin_.most for bin_ in bins)
    axis: Spec = {"labelExpr": labels} if labels else {}
    if show is octets:
        axis = picture.octet_axis(top)
    y = y_axis("y", scale={"domain": [0, 1.08 * top or 1]}, axis={"tickCount": 4} | axis)
    if labels == MS:
        y = picture.latency_axis("y", [bin_.least for bin_ in bins] + [top], ticks=4)
    hue = {"value": picture.SERIES[colour]}
    detail = {"field": "part", "type": "nominal"}
    thin = {"type": "rule", "strokeWidth": 2.4, "opacity": 0.45}
    return picture.view(
        [
            *_borders(line, x),
            layer(rows, thin, x=x, y=y | {"field": "low"}, y2={"field": "high"}, color=hue),
            layer(rows, {"type": "line", "strokeWidth": 1.8}, x=x, y=y, color=hue, detail=detail),
            layer(
                rows,
                {"type": "point", "filled": True, "size": 16, "opacity": 1},
                x=x,
                y=y,
                color=hue,
                tooltip=tip(),
            ),
        ],
        f"{title} (log)" if picture.is_log(y) else title,
        height=height,
    )


def _borders(line: Timeline, x: Spec) -> list[Spec]:
    starts = {phase.level: phase.start_s for phase in reversed(line.phases)}
    rows = [{"x": start_s} for start_s in starts.values()]
    return [layer(rows, {"type": "rule", "color": picture.GRID}, x=x)] if rows else []


def _failures(line: Timeline, x: Spec) -> Spec:
    outcomes = list(dict.fromkeys(failed.outcome for failed in line.failed))
    below: Counter[float] = Counter()
    rows = []
    for failed in line.failed:
        name, base = plain(failed.outcome.replace("_", " ")), below[failed.start_s]
        below[failed.start_s] += failed.n
        place = {"x": failed.start_s, "x2": failed.end_s, "n": base + failed.n, "n0": base, "outcome": name}
        rows.append(place | {"tip": told(clock(failed.start_s), f"{failed.n:,} {name}")})
    names = [plain(outcome.replace("_", " ")) for outcome in outcomes]
    colours = [picture.BAD, *picture.SERIES[3:], *picture.SERIES[:3]]
    colour = {
        "field": "outcome",
        "type": "nominal",
        "scale": {"domain": names, "range": [colours[place % len(colours)] for place in range(len(names))]},
        "legend": {"title": None},
    }
    most = max(below.values())
    y = y_axis("n", scale={"domain": [0, most]}, axis=picture.count_axis(most))
    ends = {"x2": {"field": "x2"}, "y2": {"field": "n0"}}
    bars = layer(rows, {"type": "rect", "minWidth": 3}, x=x, y=y, color=colour, tooltip=tip(), **ends)
    return picture.view(
        [*_borders(line, x), bars],
        "failed requests" + (" and those given up as planned" if GIVEN_UP in outcomes else ""),
        height=PANEL - 40,
    )


def _table(line: Timeline, metric: str, bins: Sequence[Bin]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The same by the clock, with bins put together so that there are few enough rows to be read out."""
    ends = [*bins, *line.in_flight]
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
    panels = (
        (line.lag, "event loop late by at most", milliseconds, 1, MS),
        (line.cpu, "CPU of our process, of one core", share, 0, "format(datum.value, '.0%')"),
        (line.rss, "memory of our process", octets, 3, None),
    )
    views = [
        _banded(bins, x, line, name, show, hue, labels, height=84) for bins, name, show, hue, labels in panels if bins
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
    return Figure("client", section, title, picture.stack(views), alt, headings, tuple(rows), None)
