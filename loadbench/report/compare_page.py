"""compare.html: what came of a comparison, every change with its interval, and both curves on one picture.

The page's shell and its policy are ``page``'s, the pieces of its pictures ``picture``'s, its words ``compare``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from loadbench.analysis.compare_words import difference
from loadbench.analysis.compared import Compared, Comparison, Row, Side
from loadbench.errors import UsageError
from loadbench.files import write_whole
from loadbench.report import picture
from loadbench.report.compare import change, comparison_json, interval, markdown_text, notes, tables, value
from loadbench.report.escape import as_line
from loadbench.report.page import Section, grid, listed, page, shown, text
from loadbench.report.page import tables as table_html
from loadbench.report.picture import MS, SERIES, Figure, LeftOut, Spec, key, layer, points, told, x_axis, y_axis
from loadbench.report.words import count

LOOK = {"regressed": "bad", "improved": "good", "inconclusive": "doubt", "equivalent": "good"}
MARKS = {
    "regressed": "✗ regressed",
    "improved": "✓ improved",
    "inconclusive": "? inconclusive",
    "equivalent": "= equivalent",
}
COLOURS = {
    "regressed": picture.BAD,
    "inconclusive": picture.MUTED,
    "equivalent": SERIES[0],
    "improved": SERIES[2],
}
CURVES = ("output_tokens_per_s", "ttft.p50", "ttft.p95", "e2e.p95", "tpot.p50")
MOST_NAMED = 4  # in a sentence
MOST_CHANGES = 60  # in one picture; the tables have them all
UNITS = {"closed": "users", "open": "requests asked for per second"}
WIDE = 4.0  # a ladder that spans more is drawn on a logarithm


def write_comparison(comparison: Comparison, folder: Path, warn: Callable[[str], None] | None = None) -> bool:
    """compare.json, compare.md and compare.html, each whole; what cannot be written is told by ``warn``, and False."""
    say = warn or (lambda line: click.echo(as_line(f"loadbench: {line}"), err=True))
    for name, data in (
        ("compare.json", comparison_json(comparison)),
        ("compare.md", markdown_text(comparison).encode()),
        ("compare.html", html_text(comparison).encode()),
    ):
        try:
            write_whole(folder / name, data)
        except UsageError as error:
            say(str(error))
            return False
    return True


def html_text(comparison: Comparison) -> str:
    """The page of a comparison."""
    changes, curves = list(_changes(comparison)), list(_curves(comparison))
    sections = [
        Section("verdict", "What came of it", _verdict(comparison)),
        Section("changes", "Every change", "".join(map(shown, changes))),
        Section("curves", "Base and new against load", "".join(map(shown, curves))),
        Section("figures", "Figure by figure", _figures(comparison)),
        Section("answers", "The same answers", _answers(comparison)),
        Section("runs", "The runs", _runs(comparison)),
    ]
    drawn = [figure for figure in [*changes, *curves] if isinstance(figure, Figure)]
    button = '<button type="button" id="theme" hidden aria-label="Change between light and dark">Dark</button>'
    sets = f"{count(len(comparison.base), 'run')} of the base, {len(comparison.new)} new"
    head = (
        f'<header><div class="wrap"><h1>{text(comparison.name)} <small>{text(sets)}</small></h1>{button}</div></header>'
    )
    foot = f"<p>loadbench {text(comparison.loadbench)} · <code>loadbench compare BASE… -- NEW…</code></p>"
    return page(f"{comparison.name}: loadbench compare", head, [s for s in sections if s.body], drawn, foot)


def _verdict(comparison: Comparison) -> str:
    mark = f'<li class="{LOOK[comparison.answer]}">{text(MARKS[comparison.answer])}</li>'
    lines = "".join(f"<p>{text(line, 10_000)}</p>" for line in [comparison.text])
    apart = [difference(one) for one in comparison.differences]
    return (
        f'<div class="verdict"><ul class="badges">{mark}</ul>{lines}</div>'
        + (f"<h3>What differs besides</h3>{listed(apart)}" if apart else "")
        + (f"<h3>Not compared</h3>{listed(comparison.not_compared)}" if comparison.not_compared else "")
    )


def _figures(comparison: Comparison) -> str:
    return table_html(tables(comparison, everything=True)) + listed(notes(comparison)) if comparison.levels else ""


def _answers(comparison: Comparison) -> str:
    rows = [
        (said.model, said.kind, str(said.place), said.result, ", ".join(said.base), ", ".join(said.new))
        for said in comparison.answers
    ]
    headings = ("model", "kind", "prompt", "answered", "base", "new")
    return grid(headings, rows, caption="Prompts by the hashes of their answers", left=range(6)) if rows else ""


def _runs(comparison: Comparison) -> str:
    rows = [
        (run.path, side, run.started, run.status, run.scenario[:12])
        for side, runs in (("base", comparison.base), ("new", comparison.new))
        for run in runs
    ]
    headings = ("directory", "set", "started", "status", "scenario (SHA-256)")
    return grid(headings, rows, caption="The runs that were compared", left=range(5))


def _changes(comparison: Comparison) -> Iterator[Figure | LeftOut]:
    """A picture a model: new ÷ base of every judged figure with its interval, beside what a change must be to count."""
    for number, (model, levels) in enumerate(groupby(comparison.levels, lambda level: level.model)):
        rows = [
            (level, row) for level in levels for row in level.rows if row.gates and row.kind == "ratio" and row.change
        ]
        if rows:
            yield _change_picture(comparison, model, number, rows)


def _change_picture(comparison: Comparison, model: str, number: int, rows: Sequence[tuple[Compared, Row]]) -> Figure:
    told_rows = [_change_row(level, row) for level, row in rows[:MOST_CHANGES]]
    drawn = [each for each in told_rows if each["x"] is not None]
    least = comparison.least_effect
    worst = [f"{each['place']} {each['step']}" for each in told_rows if each["answer"] == "regressed"]
    more = f" and {len(worst) - MOST_NAMED} more" if worst[MOST_NAMED:] else ""
    said = f"regressed: {', '.join(worst[:MOST_NAMED])}{more}" if worst else "none has regressed"
    return Figure(
        name=f"changes-{number}",
        section="Every change",
        title=f"What has changed? ({model})",
        spec=picture.picture(_change_layers(drawn, least), height=max(120, 24 * len(drawn))),
        alt=f"Of {len(rows)} figures {said}.",
        headings=("figure", "load", "base", "new", "change", "95 % interval", "answer"),
        rows=tuple((row.title, level.load, *_cells(row)) for level, row in rows),
        note=f"bars: 95 % interval over runs; grey: within {100 * least:g} %, which does not count"
        + (f"; {len(rows) - len(drawn)} more figures in the table" if rows[len(drawn) :] else ""),
    )


def _change_layers(drawn: Sequence[dict[str, Any]], least: float) -> list[Spec]:
    """What does not count as a grey band, and every ratio with its interval on it, on a logarithm."""
    ends = [each[end] for each in drawn for end in ("x", "low", "high") if each[end] is not None]
    domain = [min([1 - 2 * least, *ends]) / 1.02, 1.02 * max([1 + 2 * least, *ends])]
    x = x_axis("x", "new ÷ base", scale={"type": "log", "domain": domain, "nice": False}, axis={"format": "~r"})
    y = {"field": "place", "type": "nominal", "sort": None, "axis": {"title": None, "labelLimit": 240}}
    answers = [answer for answer in COLOURS if any(each["answer"] == answer for each in drawn)]
    colour = {
        "field": "answer",
        "type": "nominal",
        "scale": {"domain": answers, "range": [COLOURS[answer] for answer in answers]},
        "legend": {"title": None},
    }
    shape = picture.shaped("answer", answers) | {"legend": {"title": None}}
    band = [{"x": 1 / (1 + least), "x2": 1 + least}]
    whiskers = [each for each in drawn if each["low"] is not None and each["high"] is not None]
    rule, dot = {"type": "rule", "strokeWidth": 2}, {"type": "point", "filled": True, "size": 70, "opacity": 1}
    return [
        layer(band, {"type": "rect", "color": picture.GRID, "opacity": 0.6}, x=x, x2={"field": "x2"}),
        layer([{"x": 1}], {"type": "rule", "color": picture.MUTED}, x=x),
        layer(whiskers, rule, x=x | {"field": "low"}, x2={"field": "high"}, y=y, color=colour),
        layer(drawn, dot, x=x, y=y, color=colour, shape=shape, tooltip=picture.tip()),
    ]


def _cells(row: Row) -> tuple[str, ...]:
    return value(row, row.base), value(row, row.new), change(row), interval(row), row.answer or "–"


def _change_row(level: Compared, row: Row) -> dict[str, Any]:
    place = f"{row.title}, {level.load}"
    tip = told(
        place,
        f"base {value(row, row.base)}, new {value(row, row.new)}",
        f"{change(row)} ({interval(row)})",
        row.answer,
        row.because,
    )
    found = {"place": place, "x": _drawn(row.change), "low": _drawn(row.low), "high": _drawn(row.high)}
    return found | {"answer": row.answer, "step": change(row), "tip": tip}


def _drawn(ratio: float | None) -> float | None:
    """What a logarithm has a place for."""
    return ratio if ratio and math.isfinite(ratio) else None


def _curves(comparison: Comparison) -> Iterator[Figure | LeftOut]:
    """A picture a model, loop and metric: base and new against load, with the runs' range."""
    fixed = [level for level in comparison.levels if level.x is not None and level.loop in UNITS]
    number = 0
    for (model, loop), group in groupby(fixed, lambda level: (level.model, level.loop)):
        levels, number = list(group), number + 1
        if len({level.x for level in levels}) < 2:
            because = "there is one load only: its figures are in the tables"
            yield LeftOut("Base and new against load", f"How do both go with load? ({model})", because)
            continue
        for metric in CURVES:
            rows = [(level, row) for level in levels for row in level.rows if row.metric == metric]
            if len([row for _, row in rows if _bounded(row.base) and _bounded(row.new)]) >= 2:
                yield _curve(f"{metric.replace('.', '-')}-{number}", model, UNITS[loop], rows)


def _curve(name: str, model: str, unit: str, rows: Sequence[tuple[Compared, Row]]) -> Figure:
    first = rows[0][1]
    drawn = [
        _curve_row(level, row, side, series)
        for level, row in rows
        for series, side in (("base", row.base), ("new", row.new))
        if _bounded(side)
    ]
    top = max(each["high"] for each in drawn)
    of_time = {"labelExpr": MS} if first.unit == "ms" else {}
    x = _load_axis(sorted({level.x or 0.0 for level, _ in rows}), unit)
    y = y_axis("y", scale={"domain": [0, 1.08 * top]}, axis=of_time)
    names = ["base", "new"]
    colour = picture.coloured("series", names)
    layers: list[Spec] = [
        layer(drawn, {"type": "line", "strokeWidth": 2}, x=x, y=y, color=colour),
        layer(
            drawn, {"type": "rule", "strokeWidth": 1.6}, x=x, y=y | {"field": "low"}, y2={"field": "high"}, color=colour
        ),
        *points(drawn, x, y, names),
    ]
    level, row = rows[-1]
    return Figure(
        name=f"curve-{name}",
        section="Base and new against load",
        title=f"How does {first.title} go with load? ({model})",
        spec=picture.picture(layers, f"{first.title}, in {first.unit}", key(drawn)),
        alt=f"At {level.load} {value(row, row.base)} in the base and {value(row, row.new)} now.",
        headings=("load", "base", "new", "change", "95 % interval", "answer"),
        rows=tuple((at.load, *_cells(one)) for at, one in rows),
        note="points: median of the runs; bars: from the lowest to the highest run",
    )


def _bounded(side: Side) -> bool:
    """Whether its median is a number: over capacity a latency has none."""
    return side.median is not None and math.isfinite(side.median)


def _curve_row(level: Compared, row: Row, side: Side, series: str) -> dict[str, Any]:
    known = [each for each in side.values if each is not None and math.isfinite(each)]
    tip = told(
        f"{series}, {level.load}",
        f"{row.title} {value(row, side)}, {len(known)} runs",
        f"{change(row)} ({interval(row)})",
    )
    place = {"x": level.x, "y": side.median, "low": min(known), "high": max(known)}
    return place | {"series": series, "sure": not side.indicative, "tip": tip}


def _load_axis(loads: Sequence[float], unit: str) -> Spec:
    wide = loads[0] > 0 and loads[-1] / loads[0] >= WIDE
    scale = {"type": "log", "base": 2, "domain": [loads[0] / 1.1, loads[-1] * 1.1]} if wide else {"zero": False}
    axis = {"format": "~g", "labelOverlap": True} | ({"values": list(loads)} if wide or len(loads) <= 12 else {})
    return x_axis("x", unit, scale=scale, axis=axis)
