"""The vocabulary of the pictures: what a figure is, and the pieces of Vega-Lite specs that all of them are made of.

A spec is a plain dict that names its colours as custom properties of the page, ``var(--ink)``, so that one picture is
readable in dark, in light and in print; ``plots`` puts colours in their place for a file of its own. Texts of others
are data, titles or tooltips in a spec and never part of an expression.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadbench.report.escape import plain
from loadbench.report.words import octets

Spec = dict[str, Any]
Rows = Sequence[dict[str, Any]]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # names the grammar; nothing fetches it
INK, MUTED, GRID, DRAIN, PAPER, BAD = (f"var(--{name})" for name in ("ink", "muted", "grid", "drain", "paper", "bad"))
SERIES = tuple(f"var(--s{number})" for number in range(6))
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
MOST_SERIES = len(SERIES)
LIGHT = {
    "ink": "#1b1f24",
    "muted": "#57606a",
    "grid": "#e3e6ea",
    "drain": "#c3c9d0",
    "paper": "#ffffff",
    "bad": "#c0392b",
    "s0": "#0072b2",
    "s1": "#d55e00",
    "s2": "#009e73",
    "s3": "#b5628f",
    "s4": "#e69f00",
    "s5": "#56b4e9",
}
"""Okabe and Ito, Color Universal Design (2008): told apart by people who see red or green less; s3 darker for white
paper. ``page.css`` has them for the page, and others of the same eight for dark."""
LETTER = 7.0  # pixels of a letter of a strip
STEEP = 40.0  # times from the least value of an axis to the most: beyond, a logarithm

MS = (
    "datum.value >= 1000 ? format(datum.value / 1000, '~g') + ' s'"
    " : format(datum.value, '~r') + (datum.value == 0 ? '' : ' ms')"
)
"""Labels of an axis of milliseconds: 20 ms, 1.5 s."""
COUNT = "format(datum.value, datum.value < 10000 ? ',~r' : '~s')"
CLOCK = (
    "(datum.value >= 3600 ? floor(datum.value / 3600) + ':' + format(floor(datum.value / 60) % 60, '02')"
    " : floor(datum.value / 60)) + ':' + format(datum.value % 60, '02')"
)
"""Labels of an axis of seconds: 0:30, 1:05:00."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture that answers ``title``, a question. ``alt`` says in a sentence what is to be seen.

    ``headings`` and ``rows`` are the same as a table. ``name`` is its file's. ``core``: one of those that are made as
    files. ``note`` is a line below it.
    """

    name: str
    section: str
    title: str
    spec: Spec
    alt: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str | None = None
    core: bool = False


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A question that this run has nothing to answer with, and why."""

    section: str
    title: str
    because: str


FIRM, INDICATIVE, DOUBTED = "firm", "indicative, on few samples", "in doubt, the table says why"


def key(rows: Rows, filled: str = FIRM, hollow: str = INDICATIVE) -> str:
    """How the points of these rows are to be read, as far as there are such."""
    sure = {bool(row["sure"]) for row in rows}
    words = (f"filled: {filled}" if True in sure else "", f"hollow: {hollow}" if False in sure else "")
    return " · ".join(filter(None, words))


def picture(layers: Sequence[Spec], above: str | None = None, below: str | None = None, height: int = 280) -> Spec:
    """One view of these layers; ``above`` it what its y counts, ``below`` that how to read it."""
    return {"$schema": SCHEMA, **view(layers, above, below, height)}


def view(layers: Sequence[Spec], above: str | None = None, below: str | None = None, height: int = 280) -> Spec:
    """The same as a part of a stack."""
    made: Spec = {"width": 720, "height": height, "layer": list(layers)}
    if above or below:
        made["title"] = {"text": above or "", "subtitle": below or ""} if below else {"text": above}
    return made


def stack(views: Sequence[Spec], frame: str = "group", **more: Any) -> Spec:
    """Views below one another, each as wide as there is room; their titles begin where their axes do, or labels."""
    made = [{**view, "title": {**view["title"], "frame": frame}} if "title" in view else view for view in views]
    return {
        "$schema": SCHEMA,
        "vconcat": made,
        "spacing": 14,
        "resolve": {"scale": {"color": "independent"}},
        **more,
    }


def fitting(spec: Spec, width: float = 720) -> Spec:
    """The stack with names that have room: else with their ``short`` ones, or none. ``room`` is a share of the width.

    ``page.js`` does the same for the page.
    """

    def fitted(row: dict[str, Any]) -> Rows:
        if "room" not in row:
            return [row]
        names = (row["name"], row.get("short", ""))
        return [row | {"name": name} for name in names if row["room"] * width >= LETTER * len(name)][:1]

    def of(layers: list[Spec]) -> list[Spec]:
        return [
            each | {"data": {"values": [new for row in each["data"]["values"] for new in fitted(row)]}}
            for each in layers
        ]

    views = [view | {"layer": of(view["layer"])} for view in spec.get("vconcat", ())]
    return spec | {"vconcat": views} if views else spec


def layer(rows: Rows, mark: Spec | str, **encoding: Any) -> Spec:
    """Marks of these rows."""
    return {"data": {"values": list(rows)}, "mark": mark, "encoding": {k: v for k, v in encoding.items() if v}}


def x_axis(field: str, title: str | None, **more: Any) -> Spec:
    """A quantitative x. ``scale`` and ``axis`` add to what every axis has."""
    axis = {"title": title, "grid": False, **more.pop("axis", {})}
    return {"field": field, "type": "quantitative", "axis": axis, **more}


def y_axis(field: str, **more: Any) -> Spec:
    """A quantitative y. What it counts stands above the picture, where it can be read without turning one's head."""
    given = more.pop("axis", {})
    axis = {"title": None, **({} if "values" in given else {"tickCount": 5}), **given}
    return {"field": field, "type": "quantitative", "axis": axis, **more}


def latency_axis(field: str, values: Sequence[float], ticks: int = 5) -> Spec:
    """Milliseconds or seconds from zero; where they span much a logarithm, with ticks at 1, 2 and 5 of each decade."""
    low, high = min(values), max(values)
    if low > 0 and high / low > STEEP:
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if ticks > 4 and high / low < 1000 else (1, 3) if high / low < 1000 else (1,)
        marks = [step * 10.0**decade for decade in decades for step in steps]
        scale = {"type": "log", "domain": [low / 1.2, high * 1.2], "nice": False}
        axis: Spec = {"labelExpr": MS, "values": [mark for mark in marks if low / 1.2 <= mark <= high * 1.2]}
        axis["labelOverlap"] = False
        return y_axis(field, scale=scale, axis=axis)
    return y_axis(field, scale={"domain": [0, 1.08 * high or 1]}, axis={"labelExpr": MS, "tickCount": ticks})


def is_log(axis: Spec) -> bool:
    return bool(axis["scale"].get("type") == "log")


def tip() -> Spec:
    """What a mark says when it is pointed at: the row's ``tip``, lines of text that the page shows as text."""
    return {"field": "tip", "type": "nominal"}


def coloured(field: str, names: Sequence[str], **more: Any) -> Spec:
    """A colour for each of these names, always in this order."""
    colours = [SERIES[place % MOST_SERIES] for place in range(len(names))]
    legend = {"title": None} if len(names) > 1 else None
    return {
        "field": field,
        "type": "nominal",
        "scale": {"domain": list(names), "range": colours},
        "legend": legend,
        **more,
    }


def shaped(field: str, names: Sequence[str]) -> Spec:
    """A shape for each, beside its colour."""
    shapes = [SHAPES[place % MOST_SERIES] for place in range(len(names))]
    return coloured(field, names) | {"scale": {"domain": list(names), "range": shapes}}


def points(rows: Rows, x: Spec, y: Spec, names: Sequence[str], field: str = "series", size: int = 70) -> list[Spec]:
    """Points with a tooltip: filled where their row's ``sure`` is firm, hollow where it is indicative."""
    colour, shape = coloured(field, names), shaped(field, names)
    hollow = [row for row in rows if not row["sure"]]
    mark = {"type": "point", "filled": False, "size": size, "opacity": 1, "strokeWidth": 2}
    full = {"condition": {"test": "datum.sure", "value": 1}, "value": 0}
    paper = [layer(hollow, mark | {"fill": PAPER, "stroke": PAPER}, x=x, y=y, shape=shape)] if hollow else []
    return [
        *paper,
        layer(rows, mark, x=x, y=y, color=colour, fill=colour, fillOpacity=full, shape=shape, tooltip=tip()),
    ]


def bounds(curves: Rows, rules: Rows, names: Sequence[str], x: Spec, y: Spec, *, upright: bool = True) -> list[Spec]:
    """Thin lines that are not measured, each named in the legend: ``curves`` of x and y, ``rules`` at an x or a y."""
    dashes = [[6, 3], [2, 3], [9, 3, 2, 3], [1, 2], [12, 4], [4, 4]]
    grey = [MUTED, SERIES[3], SERIES[4], SERIES[1], SERIES[2], INK]
    order = {"domain": list(names)}
    legend = {"title": None, "symbolType": "stroke", "symbolSize": 300}
    look = {
        "strokeDash": {
            "field": "bound",
            "type": "nominal",
            "scale": order | {"range": dashes[: len(names)]},
            "legend": legend,
        },
        "stroke": {
            "field": "bound",
            "type": "nominal",
            "scale": order | {"range": grey[: len(names)]},
            "legend": legend,
        },
    }
    made = []
    if curves:
        made.append(layer(curves, {"type": "line", "strokeWidth": 1.6, "clip": True}, x=x, y=y, **look))
    if rules:
        place = {"x": x} if upright else {"y": y}
        made.append(layer(rules, {"type": "rule", "strokeWidth": 1.6, "clip": True}, tooltip=tip(), **place, **look))
    return made


def told(*lines: str | None) -> str:
    """A tooltip: these lines, each a plain one."""
    return "\n".join(plain(line, limit=200) for line in lines if line)


def count_axis(most: float) -> Spec:
    """Some three ticks at whole numbers: 0, 20, 40."""
    step = next(m * 10**power for power in range(12) for m in (1, 2, 5) if 3 * m * 10**power >= most)
    return {"values": list(range(0, int(most) + 1, step)), "format": "~s"}


def octet_axis(most: float) -> Spec:
    """Ticks of an axis of bytes at round binary sizes, with their units."""
    step = 2.0**10
    while most / step > 6:
        step *= 2
    values = [step * number for number in range(int(most / step) + 2)]
    # An expression may hold nothing of others': these are our own numbers and words.
    words = {f"{value:.0f}": "0" if not value else octets(value) for value in values}
    return {"values": values, "labelExpr": f"({_literal(words)})[format(datum.value, '.0f')]"}


def _literal(words: dict[str, str]) -> str:
    return "{" + ", ".join(f"'{key}': '{value}'" for key, value in words.items()) + "}"
