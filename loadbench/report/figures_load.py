"""The figures of load: throughput with its bounds and estimates, and the first token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from loadbench.analysis.findings import Capacity, Point
from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.road import is_over
from loadbench.analysis.slo import slo_of
from loadbench.analysis.summary import Level, Summary
from loadbench.analysis.words import head, load_of, users
from loadbench.records import load_title
from loadbench.report import picture
from loadbench.report.escape import plain
from loadbench.report.picture import (
    DOUBTED,
    Figure,
    LeftOut,
    Rows,
    Spec,
    key,
    latency_axis,
    layer,
    points,
    told,
    x_axis,
    y_axis,
)
from loadbench.report.words import NONE, figure, milliseconds, percentile, share

SECTION = "Load"
STATISTICS = ("p50", "p95", "p99")
STEPS = 48  # of a drawn curve
SORT = {"field": "sort", "type": "nominal"}
WIDE = {"users": 8.0, "rates": 20.0}  # times from the least load to the most: beyond, doublings crowd a linear axis
MANY_FAILED = 0.01  # of a load's requests: from here on its point says how many
REACH = 2.5  # times the slowest: an SLO's limit that is further off is named and not drawn
ALONE, ASKED = "nobody waits: N ÷ R alone", "all that was asked for"  # the straight lines
_COUNTED = {
    "closed": "counted once every user had an answer, by the share of each that lies in the level; the table of levels"
    " counts what ended in its whole window",
    "open": "counted once the first request had an answer; the table of levels counts the whole window",
}
OVER, LOST = "↑", "✗"


def load_figures(summary: Summary) -> Iterator[Figure | LeftOut]:
    """How much each model carries, and what its first token takes at it."""
    several = len({capacity.model for capacity in summary.capacity}) > 1
    for number, capacity in enumerate(summary.capacity):
        of = f"{capacity.model}, {capacity.loop} loop" if several else f"{capacity.loop} loop"
        name = f"{capacity.loop}-{number}" if several else capacity.loop
        yield _throughput(summary, capacity, of, name)
        levels = [level for level in summary.levels if level.index in capacity.levels]
        yield _first_token(capacity, levels, of, name)
    if not summary.capacity:
        because = "a curve takes two loads that do not change; this run has fewer"
        if summary.levels and all(level.purpose == "rung" for level in summary.levels):
            because = "a memory ladder asks how much fits, one request from every user, and not how much is carried"
        yield LeftOut(SECTION, "How much does it carry?", because)


def _throughput(summary: Summary, found: Capacity, of: str, name: str) -> Figure | LeftOut:
    known = [point for point in found.points if point.per_s is not None]
    title = f"How much does it carry? ({of})"
    if len(known) < 2:
        return LeftOut(SECTION, title, "fewer than two loads gave successful requests")
    unit = "users" if found.loop == "closed" else "requests asked for per second"
    x = _load_axis([point.load for point in known], unit)
    top = 1.15 * max((point.per_s_interval_95 or (0, point.per_s or 0))[1] for point in known)
    y = y_axis("y", scale={"domain": [0, top]})
    rows = [_told_point(summary, point) for point in known]
    levels = [level for level in summary.levels if level.index in {point.level for point in known}]
    curves, rules = _bounds(found, known, levels, top)
    names = list(dict.fromkeys(row["bound"] for row in [*curves, *rules]))
    whiskers = [row for row in rows if "low" in row]
    series = {"color": {"value": picture.SERIES[0]}}
    layers = [
        *picture.bounds(curves, rules, names, x, y),
        layer(rows, {"type": "line", "strokeWidth": 2.5}, x=x, y=y, detail=SORT, **series),
        layer(
            whiskers, {"type": "rule", "strokeWidth": 1.6}, x=x, y=y | {"field": "low"}, y2={"field": "high"}, **series
        ),
        *points(rows, x, y, ["measured"]),
        *_marked(rows, x, y),
    ]
    bare = found.loop == "closed" and not curves and not any(name.startswith("knee") for name in names)
    undrawn = f"no knee and no bound is drawn: {found.because}" if bare else None
    bars = "bars: 95 % interval" if whiskers else None
    notes = [bars, _COUNTED[found.loop], *_signs(levels, "over capacity"), undrawn]
    return Figure(
        name=f"throughput-{name}",
        section=SECTION,
        title=title,
        spec=picture.picture(layers, "successful requests per second", key(rows, hollow=DOUBTED)),
        alt=f"{_best(found, known)} {_words(names)}".strip(),
        headings=("load", "requests/s", "95 %", "tokens/s", "E2E mean", "requests ok", ""),
        rows=tuple(_point_row(summary, point) for point in found.points),
        note="; ".join(filter(None, notes)) or None,
        core=True,
    )


def _marked(rows: Rows, x: Spec, y: Spec) -> list[Spec]:
    """A sign above the points that have something to say of themselves; ``_signs`` says what."""
    marked = [row for row in rows if row["mark"]]
    mark = {"type": "text", "dy": -14, "color": picture.BAD, "fontSize": 13, "fontWeight": "bold"}
    above = [row | {"y": row.get("high", row["y"])} for row in marked]
    return [layer(above, mark, x=x, y=y, text={"field": "mark", "type": "nominal"})] if above else []


def _mark(level: Level) -> str:
    return (OVER if is_over(level.road) else "") + (LOST if _lost(level) >= MANY_FAILED else "")


def _lost(level: Level) -> float:
    return 1 - level.requests.ok / level.requests.attempted if level.requests.attempted else 0.0


def _signs(levels: Sequence[Level], over: str) -> list[str]:
    """What the signs above the points mean, with how many failed where."""
    told_signs = [f"{OVER} {over}"] if any(OVER in _mark(level) for level in levels) else []
    lost = [f"{share(_lost(level))} at {load_title(level.load)}" for level in levels if LOST in _mark(level)]
    return [*told_signs, f"{LOST} failed: {', '.join(lost)}"] if lost else told_signs


def _sort(level: Level) -> str:
    """Levels of one sort are on one line: loads that differ by their number only."""
    held_back = " dropped" if level.requests.failed.get("dropped") else ""
    return plain(load_title(level.load)[len(head(level)) :].removesuffix("s")) + held_back


def _best(found: Capacity, known: Sequence[Point]) -> str:
    best = max(known, key=lambda point: point.per_s or 0.0)
    unit = "users" if found.loop == "closed" else "requests/s asked for"
    return f"The most was {figure(best.per_s)} requests/s, at {best.load:g} {unit}."


def _words(names: Sequence[str]) -> str:
    """The estimates that are drawn; the straight lines are told by their names in the picture."""
    told_names = "; ".join(name for name in names if name not in (ALONE, ASKED))
    return f"{told_names[0].upper()}{told_names[1:]}." if told_names else ""


def _told_point(summary: Summary, point: Point) -> dict[str, Any]:
    level = next(level for level in summary.levels if level.index == point.level)
    reach = point.per_s_interval_95
    row: dict[str, Any] = {"x": point.load, "y": point.per_s, "series": "measured", "sure": point.firm}
    row |= {"sort": _sort(level), "mark": _mark(level)}
    if reach:
        row |= {"low": reach[0], "high": reach[1]}
    return row | {
        "tip": told(
            load_title(level.load),
            f"{figure(point.per_s)} requests/s" + (f" ({figure(reach[0])} to {figure(reach[1])})" if reach else ""),
            f"{figure(point.tokens_per_s)} tokens/s",
            f"E2E mean {milliseconds(point.e2e_mean_ms)}",
            f"{level.requests.ok:,} of {level.requests.attempted:,} requests ok",
            _firmness(point),
            "over capacity" if is_over(level.road) else None,
        )
    }


def _point_row(summary: Summary, point: Point) -> tuple[str, ...]:
    level = next(level for level in summary.levels if level.index == point.level)
    reach = point.per_s_interval_95
    return (
        load_title(level.load),
        figure(point.per_s),
        f"{figure(reach[0])} to {figure(reach[1])}" if reach else NONE,
        figure(point.tokens_per_s),
        milliseconds(point.e2e_mean_ms),
        f"{level.requests.ok:,}/{level.requests.attempted:,}",
        _firmness(point),
    )


def _firmness(point: Point) -> str:
    return "firm" if point.firm else f"in doubt: {point.doubt}" if point.doubt else "in doubt"


def _bounds(found: Capacity, known: Sequence[Point], levels: Sequence[Level], top: float) -> tuple[Rows, Rows]:
    """The bounds and estimates as curves and upright rules, each with its value in its name."""
    curves: list[dict[str, Any]] = []
    rules: list[dict[str, Any]] = []
    low, high = min(point.load for point in known), max(point.load for point in known)
    grid = np.geomspace(low, high, STEPS) if low > 0 else np.linspace(low, high, STEPS)

    def curve(bound: str, heights: Iterable[float]) -> None:
        pairs = zip(grid.tolist(), heights, strict=True)
        curves.extend({"x": x, "y": y, "bound": bound} for x, y in pairs if y <= 1.02 * top)

    if found.loop == "open":
        curve(ASKED, grid.tolist())
    for estimate in found.estimates:
        value, decided = estimate.value, "" if estimate.result == "firm" else ", undecided"
        alone = next((p for p in known if p.load == 1 and p.firm and p.e2e_mean_ms), None)
        if value is None:
            continue
        if estimate.name == "asymptotic" and alone is not None and alone.e2e_mean_ms:
            each_s = alone.e2e_mean_ms / 1e3
            curve(ALONE, (grid / each_s).tolist())
            curve(f"levels off at: {figure(value / each_s)}/s{decided}", [value / each_s] * STEPS)
        words = {
            "asymptotic": f"N* = {figure(value)} users{decided}",
            "knee": f"knee: {users(value)}{decided}",
            "usl_peak": f"peak by the USL: {figure(value)} users{decided}",
            "slo": f"SLO kept {_reach(found, levels, value)}{decided}",
            "sustained": f"kept up with: {value:g}/s{decided}",
        }
        if estimate.name in words and low <= value <= high:
            rules.append(
                {"x": value, "bound": words[estimate.name], "tip": told(words[estimate.name], estimate.because)}
            )
    if found.usl is not None:
        usl = found.usl
        costs = 1 + usl.contention * (grid - 1) + usl.coherency * grid * (grid - 1)
        name = f"USL: σ {usl.contention:.2g}, κ {usl.coherency:.2g}"
        curve(name, (usl.per_s_alone * grid / costs).tolist())
    return curves, rules


def _reach(found: Capacity, levels: Sequence[Level], most: float) -> str:
    """``up to 8 users`` where every load below was seen to keep the SLO too, else ``at 8 users``."""
    all_below = all(slo_of(level) == "pass" for level in levels if level.slo and load_of(level) <= most)
    return f"{'up to' if all_below else 'at'} {users(most) if found.loop == 'closed' else f'{most:g}/s'}"


def _load_axis(loads: Sequence[float], unit: str) -> Spec:
    """Users or rates: a logarithm where a ladder spans much, its ticks the loads that were measured."""
    low, high, known = min(loads), max(loads), sorted(set(loads))
    wide = low > 0 and high / low >= WIDE["users" if unit == "users" else "rates"]
    scale = {"type": "log", "base": 2, "domain": [low / 1.1, high * 1.1]} if wide else {"zero": False, "padding": 16}
    axis = {"values": known, "format": "~g", "labelOverlap": True} if wide or len(known) <= 12 else {"format": "~g"}
    return x_axis("x", unit, scale=scale, axis=axis)


def _first_token(found: Capacity, levels: Sequence[Level], of: str, name: str) -> Figure | LeftOut:
    metric = "ttft" if any(level.latency_ms["ttft"][level.headline].n for level in levels) else "e2e"
    what = {"ttft": "the first token", "e2e": "the whole answer (nothing was streamed)"}[metric]
    title = f"How long until {what} as load grows? ({of})"
    rows = [row for level in levels for row in _statistics(level, metric)]
    if len({row["x"] for row in rows}) < 2:
        return LeftOut(SECTION, title, "fewer than two loads gave a percentile")
    names = [name for name in STATISTICS if any(row["series"] == name for row in rows)]
    limits = _limits(levels, metric)
    slowest = max(float(row["y"]) for row in rows)
    far = [row for row in limits if row["y"] > REACH * slowest]
    limits = [row for row in limits if row not in far]
    y = latency_axis("y", [float(row["y"]) for row in [*rows, *limits]])
    above = f"time to {what}, {levels[0].headline}" + (" (log)" if picture.is_log(y) else "")
    unit = "users" if found.loop == "closed" else "requests asked for per second"
    x = _load_axis([load_of(level) for level in levels], unit)
    knee = [
        {"x": each.value, "bound": f"knee: {users(each.value)}", "tip": told("knee", each.because)}
        for each in found.estimates
        if each.name == "knee" and each.value is not None and each.result == "firm"
    ]
    bounds = [row["bound"] for row in [*limits, *knee]]
    layers = [
        *picture.bounds([], limits, bounds, x, y, upright=False),
        *picture.bounds([], knee, bounds, x, y),
        layer(rows, {"type": "line", "strokeWidth": 2}, x=x, y=y, color=picture.coloured("series", names), detail=SORT),
        *points(rows, x, y, names),
        *_marked(_tops(rows), x, y),
    ]
    first, last = (max((row for row in rows if row["x"] == edge), key=lambda row: row["y"]) for edge in _edges(rows))
    notes = [
        *_signs(levels, "over capacity: the latency only says how long the level was"),
        "of the requests that succeeded" if any(_lost(level) for level in levels) else None,
        *(f"{row['bound']}: far above what is drawn" for row in far),
    ]
    return Figure(
        name=f"{metric}-{name}",
        section=SECTION,
        title=title,
        spec=picture.picture(layers, above, key(rows)),
        alt=f"{_in_words(first)}, {_in_words(last)}.",
        headings=("load", "n", *(percentile(statistic) for statistic in names)),
        rows=tuple(_latency_row(level, metric, names) for level in levels),
        note="; ".join(filter(None, notes)) or None,
        core=True,
    )


def _in_words(row: dict[str, Any]) -> str:
    return f"{row['series']} {'' if row['sure'] else '~'}{milliseconds(row['y'])} at {row['load']}"


def _tops(rows: Rows) -> Rows:
    """The highest point of each load."""
    tops: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["load"] not in tops or row["y"] > tops[row["load"]]["y"]:
            tops[row["load"]] = row
    return list(tops.values())


def _edges(rows: Rows) -> tuple[float, float]:
    at = [row["x"] for row in rows]
    return min(at), max(at)


def _limits(levels: Sequence[Level], metric: str) -> list[dict[str, Any]]:
    """The SLO's limits on this metric, a line each."""
    limits = {clause.clause: clause.limit for level in levels for clause in level.slo if clause.unit == "ms"}
    told_limits = []
    for clause, limit in limits.items():
        of, _, statistic = clause.partition(".")
        if of == metric:
            bound = f"SLO: {percentile(statistic)} ≤ {milliseconds(limit)}"
            told_limits.append({"y": limit, "bound": bound, "tip": told(bound)})
    return told_limits


def _statistics(level: Level, metric: str) -> Iterator[dict[str, Any]]:
    found = level.latency_ms[metric][level.headline]
    for statistic in STATISTICS:
        value = found.value(statistic)
        if value is not None:
            firm = statistic not in found.indicative
            yield {
                "x": load_of(level),
                "y": value,
                "series": statistic,
                "sort": _sort(level),
                "sure": firm,
                "mark": _mark(level),
                "load": load_title(level.load),
                "tip": told(
                    load_title(level.load),
                    f"{LATENCIES[metric].title} {percentile(statistic)} {milliseconds(value)}",
                    f"{found.n:,} samples: {'firm' if firm else 'indicative'}",
                    "over capacity" if is_over(level.road) else None,
                ),
            }


def _latency_row(level: Level, metric: str, names: Sequence[str]) -> tuple[str, ...]:
    found = level.latency_ms[metric][level.headline]
    cells = (f"{'~' if name in found.indicative else ''}{milliseconds(found.value(name))}" for name in names)
    return (load_title(level.load), f"{found.n:,}", *cells)
