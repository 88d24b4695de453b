"""The figure of the slowest: latency by percentile in the form of HdrHistogram, service and response time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.percentile_curve import METRICS, PercentileCurve
from loadbench.analysis.road import is_over
from loadbench.analysis.summary import ClosedLoad, Level, Summary
from loadbench.analysis.words import is_fixed, load_of
from loadbench.records import load_title
from loadbench.report import picture
from loadbench.report.escape import plain
from loadbench.report.picture import Figure, LeftOut, Rows, Spec, key, latency_axis, layer, points, told, x_axis
from loadbench.report.words import NONE, milliseconds, share

OVER = "↑"


def percentile_figures(summary: Summary, curves: Sequence[PercentileCurve]) -> Iterator[Figure | LeftOut]:
    """Latency by percentile, a figure for each model, loop and metric."""
    if not curves:
        because = "no two requests succeeded at any load"
        if summary.levels and all(level.purpose == "rung" for level in summary.levels):
            because = "a rung of a memory ladder ends before its answers do, so that it has no latencies"
        yield LeftOut("Percentiles", "How slow are the slowest?", because)
    models = dict.fromkeys(level.model for level in summary.levels)
    shown = [level for level in summary.levels if any(curve.level == level.index for curve in curves)]
    shown.sort(key=lambda level: ([*models].index(level.model), level.load.kind))
    for number, ((model, loop), group) in enumerate(groupby(shown, lambda level: (level.model, level.load.kind))):
        levels = list(group)
        for metric in METRICS:
            mine = [curve for curve in curves if curve.metric == metric and curve.level in {x.index for x in levels}]
            of = f"{model}, {loop} loop" if len(models) > 1 else f"{loop} loop"
            if mine:
                yield _percentiles(levels, mine, metric, of, f"percentiles-{metric}-{loop}-{number}")


def _chosen(levels: Sequence[Level]) -> list[Level]:
    """As many as can be told apart: all, or from the least load to the most in even steps."""
    if len(levels) <= picture.MOST_SERIES:
        return list(levels)
    ordered = sorted(levels, key=lambda level: (is_fixed(level), load_of(level)))
    return [ordered[round(place)] for place in np.linspace(0, len(ordered) - 1, picture.MOST_SERIES)]


def _percentiles(levels: list[Level], curves: list[PercentileCurve], metric: str, of: str, name: str) -> Figure:
    titles = _titles(levels)
    known = [level for level in levels if any(curve.level == level.index for curve in curves)]
    chosen = {level.index for level in _chosen(known)}
    same = isinstance(levels[0].load, ClosedLoad) and _alike(curves)
    drawn = [c for c in curves if c.level in chosen and not (same and c.series == "response")]
    names = [titles[index] for index in titles if index in chosen]
    rows = [row for curve in drawn for row in _rows(curve, titles[curve.level])]
    y = latency_axis("y", [float(row["y"]) for row in rows])
    series = [one for one in ("response", "service") if any(row["time"] == one for row in rows)]
    first = levels[0].headline if levels[0].headline in series else series[0]  # as the table and the verdict have it
    marked = [row for row in rows if row["time"] == first and row["named"]]
    above = f"{LATENCIES[metric].title}{f', {series[0]}' if len(series) < 2 else ''}"
    notes = [] if len(names) == len(titles) else [f"{len(names)} of {len(titles)} loads are drawn; the table has all"]
    if same:
        notes.append("response time, from when a request was due, is the same within 2 %")
    return Figure(
        name=name,
        section="Percentiles",
        title=f"How slow are the slowest? {LATENCIES[metric].title} by percentile ({of})",
        spec=picture.picture(
            _layers(rows, marked, _x_axis(max(float(row["x"]) for row in rows)), y, names, series),
            f"{above}{' (log)' if picture.is_log(y) else ''}",
            key(marked),
            height=300,
        ),
        alt="; ".join(f"{titles[c.level]}: {_in_words(c)}" for c in _ends(drawn, first)) + ".",
        headings=("load", "time", "n", "50 %", "90 %", "95 %", "99 %", "99.9 %", "slowest"),
        rows=tuple(
            (titles[c.level], c.series, f"{c.n:,}", *(_at(c, p) for p in (0.5, 0.9, 0.95, 0.99, 0.999)), _last(c))
            for c in curves
        ),
        note="; ".join([*notes, *_doubts(known, titles)]) or None,
    )


def _ends(drawn: Sequence[PercentileCurve], series: str) -> list[PercentileCurve]:
    """The curves of the first and the last load: what lies between is in the picture and in its table."""
    mine = [curve for curve in drawn if curve.series == series]
    return mine if len(mine) < 3 else [mine[0], mine[-1]]


def _rows(curve: PercentileCurve, title: str) -> Iterator[dict[str, Any]]:
    for step in curve.steps:
        yield {
            "x": step.x,
            "y": step.ms,
            "series": title,
            "time": curve.series,
            "sure": step.firm,
            "line": f"{curve.level} {curve.series}",
            "named": step.named,
            "tip": told(
                f"{title}, {curve.series}",
                f"{share(step.share)} took at most {milliseconds(step.ms)}",
                f"{curve.n:,} samples: {'firm' if step.firm else 'indicative'} here",
            ),
        }


def _x_axis(most: float) -> Spec:
    """1 / (1 − p): every further nine takes as much room as the last. The axis begins at the fastest."""
    ticks = [2, 4, 10, 20, *(float(10**power) for power in range(2, 8))]
    return x_axis(
        "x",
        "share of the requests that were as fast or faster",
        scale={"type": "log", "domain": [1, most * 1.05], "nice": False},
        axis={
            "values": [tick for tick in ticks if tick <= most * 1.05],
            "labelExpr": "format(100 - 100 / datum.value, '.6~g') + ' %'",
            "grid": True,
        },
    )


def _layers(rows: Rows, marked: Rows, x: Spec, y: Spec, names: Sequence[str], series: Sequence[str]) -> list[Spec]:
    """Stairs, as each value is one that a request took, with points at the percentiles that have a name."""
    dash = {
        "field": "time",
        "type": "nominal",
        "scale": {"domain": series, "range": [[1, 0], [5, 3]][: len(series)]},
        "legend": {"title": None, "symbolType": "stroke", "symbolSize": 300} if len(series) > 1 else None,
    }
    line = {"type": "line", "interpolate": "step-before", "strokeWidth": 2}
    detail = {"field": "line", "type": "nominal"}
    return [
        layer(rows, line, x=x, y=y, color=picture.coloured("series", names), strokeDash=dash, detail=detail),
        *points(marked, x, y, names, size=46),
    ]


def _doubts(levels: Sequence[Level], titles: dict[int, str]) -> Iterator[str]:
    """What the curves cannot show: requests that never ended well, and latencies that grow with the level."""
    lost = {level.index: 1 - level.requests.ok / level.requests.attempted for level in levels}
    failed = [f"{share(lost[index])} at {titles[index]}" for index in lost if lost[index] > 0]
    if failed:
        yield f"only of requests that succeeded; failed: {', '.join(failed)}"
    if any(is_over(level.road) for level in levels):
        yield f"{OVER} over capacity: its curve only says how long the level was"


def _titles(levels: Sequence[Level]) -> dict[int, str]:
    """By level its load; with its number where two have the same."""
    titles = {
        level.index: plain(load_title(level.load), limit=80) + (f" {OVER}" if is_over(level.road) else "")
        for level in levels
    }
    twice = {title for title in titles.values() if [*titles.values()].count(title) > 1}
    return {index: f"{title} (level {index})" if title in twice else title for index, title in titles.items()}


def _alike(curves: Sequence[PercentileCurve]) -> bool:
    """Whether service and response time cannot be told apart in a picture."""
    by = {(curve.level, curve.series): curve for curve in curves}
    pairs = [(curve, by.get((curve.level, "response"))) for curve in curves if curve.series == "service"]
    return all(
        other is not None
        and all(abs(a.ms - b.ms) <= 0.02 * b.ms + 0.1 for a, b in zip(one.steps, other.steps, strict=False))
        for one, other in pairs
    )


def _at(curve: PercentileCurve, wanted: float) -> str:
    """The value at a percentile, as far as the samples tell one."""
    if curve.n < round(1 / (1 - wanted)):
        return NONE
    step = next((step for step in curve.steps if step.share >= wanted - 1e-9), curve.steps[-1])
    return f"{'' if step.firm else '~'}{milliseconds(step.ms)}"


def _in_words(curve: PercentileCurve) -> str:
    parts = ((name, _at(curve, wanted)) for name, wanted in (("half", 0.5), ("95 %", 0.95)))
    return ", ".join([*(f"{name} within {told}" for name, told in parts if told != NONE), f"all within {_last(curve)}"])


def _last(curve: PercentileCurve) -> str:
    return milliseconds(curve.steps[-1].ms)
