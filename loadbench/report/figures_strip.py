"""The strip above the figures over time: which load, of which model, ran when, and what of it is counted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from loadbench.analysis.road import is_over
from loadbench.analysis.summary import ClosedLoad, Level, Summary
from loadbench.analysis.timeline import Timeline
from loadbench.analysis.words import is_fixed, load_of
from loadbench.records import load_title
from loadbench.report import picture
from loadbench.report.escape import plain
from loadbench.report.picture import Rows, Spec, layer, tip, told
from loadbench.report.words import clock

HEIGHT = 22  # pixels of a row
MODEL = "model"
OVER = "load, over capacity"
ROW = {"load": picture.SERIES[0], OVER: picture.SERIES[1], "warm-up": picture.SERIES[4], "drain": picture.DRAIN}
WORDS = {"load": "load", OVER: OVER, "warm-up": "warm-up, left out", "drain": "drain"}


def strip(summary: Summary, line: Timeline, x: Spec) -> Spec:
    """A strip with the levels: load, warm-up that was left out, drain; the load of each where there is room for it."""
    levels = {level.index: level for level in summary.levels}
    rows, names = [], []
    domain = x["scale"]["domain"]
    for phase in line.phases:
        level = levels.get(phase.level)
        title = load_title(level.load) if level else f"level {phase.level}"
        is_load = phase.name == "load"
        word = OVER if is_load and level and is_over(level.road) else WORDS[phase.name]
        row = {"x": phase.start_s, "x2": phase.end_s, "phase": word, "y": ""}
        row["tip"] = told(
            f"level {phase.level}: {title}",
            f"{word}, {clock(phase.start_s)} to {clock(phase.end_s)}",
            level.model if level else None,
        )
        rows.append(row)
        if is_load and level:
            name = _short(level)
            names.append(_named(name, phase.start_s, phase.end_s, domain) | {"short": name.partition("×")[0]})
    closed = {isinstance(level.load, ClosedLoad) for level in summary.levels}
    unit = "users" if closed == {True} else "requests/s" if closed == {False} else "users, then requests/s"
    unit += " × tokens" if any(getattr(level.load, "ask", None) for level in summary.levels) else ""
    domain_names = [WORDS[name] for name in ROW if any(row["phase"] == WORDS[name] for row in rows)]
    colours = [ROW[name] for name in ROW if WORDS[name] in domain_names]
    colour = {
        "field": "phase",
        "type": "nominal",
        "scale": {"domain": domain_names, "range": colours},
        "legend": {"title": None},
    }
    place = {"field": "y", "type": "nominal", "axis": None}
    mark = {"type": "bar", "stroke": picture.PAPER, "strokeWidth": 1, "height": {"band": 1}}
    x = x | {"axis": None}
    layers = [layer(rows, mark, x=x, x2={"field": "x2"}, y=place, color=colour, tooltip=tip())]
    layers.append(_texts(names, x, place, picture.PAPER))
    models = _models(levels, line, domain)
    if models:
        place_of = place | {"field": "y", "scale": {"domain": [MODEL, ""]}}
        layers = [_placed(each, place_of) for each in layers]
        layers.append(_texts(models, x, place_of, picture.INK))
    return picture.view(layers, f"load, in {unit}", height=HEIGHT * (2 if models else 1))


def _placed(of: Spec, place: Spec) -> Spec:
    return of | {"encoding": of["encoding"] | {"y": place}}


def _texts(names: Rows, x: Spec, y: Spec, colour: str) -> Spec:
    mark = {"type": "text", "color": colour, "fontWeight": "bold", "fontSize": 10.5}
    return layer(names, mark, x=x, y=y, text={"field": "name", "type": "nominal"})


def _named(name: str, start_s: float, end_s: float, domain: Sequence[float], y: str = "") -> dict[str, Any]:
    """A name in the middle of its stretch; ``room`` is the stretch's share of the axis, for who draws it to fit."""
    room = (end_s - start_s) / (domain[1] - domain[0])
    return {"x": (start_s + end_s) / 2, "name": plain(name, limit=80), "room": room, "y": y}


def _short(level: Level) -> str:
    """``4``, ``1→8``, ``4×1088``."""
    ask = getattr(level.load, "ask", None)
    if is_fixed(level):
        return f"{load_of(level):g}" + (f"×{ask.tokens}" if ask else "")
    return load_title(level.load).partition("/s")[0].removesuffix(" users")


def _models(levels: dict[int, Level], line: Timeline, domain: Sequence[float]) -> list[dict[str, Any]]:
    """Where there are several, each stretch of levels of one model with its name."""
    known = [phase for phase in line.phases if phase.level in levels]
    if len({levels[phase.level].model for phase in known}) < 2:
        return []
    stretches = [list(group) for _, group in groupby(known, lambda phase: levels[phase.level].model)]
    return [
        _named(levels[parts[0].level].model, parts[0].start_s, parts[-1].end_s, domain, MODEL) for parts in stretches
    ]
