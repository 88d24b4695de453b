"""The figures that compare within a run: its kinds of prompt, and its models side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from loadbench.analysis.decision import FIGURES, Decision
from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.summary import Level, Summary
from loadbench.records import load_title
from loadbench.report import decision, picture
from loadbench.report.escape import plain
from loadbench.report.picture import FILLED, MS, Figure, LeftOut, Spec, layer, points, told, x_axis
from loadbench.report.words import milliseconds

COMPARED = (
    *("ttft_p50_ms", "e2e_p50_ms", "tokens_per_s", "best_tokens_per_s", "memory_loaded_bytes", "cold_start_ms"),
    *("quality", "failed_share"),
)
ROW_HEIGHT = 26


def kind_figures(summary: Summary) -> Iterator[Figure | LeftOut]:
    """The first token by kind of prompt, against load."""
    section, title = "Kinds of prompt", "Which kind of prompt waits longest?"
    levels = [level for level in summary.levels if level.by_kind]
    if not levels:
        yield LeftOut(section, title, "no level had more than one kind of prompt")
        return
    several = len({level.model for level in levels}) > 1
    groups = groupby(levels, lambda level: (level.model, level.load.kind))
    for number, ((model, loop), group) in enumerate(groups):
        of = f"{model}, {loop} loop" if several else f"{loop} loop"
        yield _kinds(list(group), f"{title} ({of})", f"kinds-{loop}-{number}")


def _kinds(levels: list[Level], title: str, name: str) -> Figure | LeftOut:
    """A row a load and kind, a point for p50 and one for p95: few kinds at few loads are read as a list."""
    rows, table, order = [], [], []
    metric = "ttft" if any(kind.latency_ms["ttft"]["service"].n for x in levels for kind in x.by_kind) else "e2e"
    kinds = list(dict.fromkeys(kind.kind for level in levels for kind in level.by_kind))
    for level in levels:
        for kind in sorted(level.by_kind, key=lambda kind: kinds.index(kind.kind)):
            found = kind.latency_ms[metric][level.headline]
            where = plain(f"{load_title(level.load)} · {kind.kind}", limit=80)
            order.append(where)
            cells = []
            for statistic in ("p50", "p95"):
                value, firm = found.value(statistic), statistic not in found.indicative
                cells.append(f"{'' if firm else '~'}{milliseconds(value)}")
                if value is not None:
                    tip = told(where, f"{LATENCIES[metric].title} {statistic} {milliseconds(value)}", f"n {found.n:,}")
                    rows.append({"x": value, "y": where, "series": statistic, "sure": firm, "tip": tip})
            counts = kind.requests
            table.append((load_title(level.load), kind.kind, f"{counts.ok:,}/{counts.attempted:,}", *cells))
    if not rows:
        return LeftOut("Kinds of prompt", title, "too few requests of any kind to tell a median")
    order = list(dict.fromkeys(order))
    x = x_axis(
        "x", f"{LATENCIES[metric].title}, {levels[0].headline}", axis={"labelExpr": MS, "grid": True, "tickCount": 6}
    )
    y = {"field": "y", "type": "nominal", "scale": {"domain": order}}
    y |= {"axis": {"title": None, "grid": True, "labelLimit": 150, "ticks": False}}
    slowest = max(rows, key=lambda row: float(str(row["x"])))
    return Figure(
        name=name,
        section="Kinds of prompt",
        title=title,
        spec=picture.picture(points(rows, x, y, ["p50", "p95"]), None, FILLED, max(80, ROW_HEIGHT * len(order))),
        alt=f"The longest wait, {slowest['series']} {milliseconds(float(str(slowest['x'])))}, is of {slowest['y']}.",
        headings=("load", "kind of prompt", "ok", "p50", "p95"),
        rows=tuple(table),
    )


def model_figures(found: Decision | None) -> Iterator[Figure | LeftOut]:
    """Models side by side: a panel a figure, a point a model, with its interval."""
    section, title = "Models side by side", "Which model does what better?"
    candidates = [] if found is None else [one for one in found.candidates if one.status == "ok"]
    if len(candidates) < 2 or found is None:
        yield LeftOut(section, title, "fewer than two models were measured")
        return
    names = [plain(one.model) for one in candidates]
    views: list[Spec] = []
    for name in COMPARED:
        rows = []
        compared = FIGURES[name]
        for one in candidates:
            each = getattr(one, name)
            if each.value is None:
                continue
            value, unit = _unit(compared.unit, each.value)
            reach = each.interval_95
            row = {"x": value, "y": plain(one.model), "series": plain(one.model), "sure": each.firm is not False}
            row["tip"] = told(
                f"{one.model}: {compared.title} {decision.words(compared, each.value, one.currency)}",
                None
                if reach is None
                else f"95 %: {decision.words(compared, reach[0], None)} to {decision.words(compared, reach[1], None)}",
                None if each.n is None else f"n {each.n:,}",
                None if each.at is None else f"at {each.at}",
                each.source,
            )
            if reach is not None:
                row |= {"low": _unit(compared.unit, reach[0])[0], "high": _unit(compared.unit, reach[1])[0]}
            rows.append(row)
        if len(rows) > 1:
            views.append(_compared(rows, names, f"{compared.title}{unit}", CRITERION.get(name, "")))
    if not views:
        yield LeftOut(section, title, "no figure is known of two models")
        return
    headings = ("model", *(FIGURES[name].title for name in COMPARED))
    table = tuple(
        (one.model, *(decision.words(FIGURES[name], getattr(one, name).value, one.currency) for name in COMPARED))
        for one in candidates
    )
    alt = f"{len(views)} figures of {', '.join(names)}."
    yield Figure("models", section, title, picture.stack(views), alt, headings, table, "bars: 95 % interval", core=True)


CRITERION = {
    **dict.fromkeys(
        ("ttft_p50_ms", "e2e_p50_ms", "memory_loaded_bytes", "cold_start_ms", "failed_share"), "less is better"
    ),
    **dict.fromkeys(("tokens_per_s", "best_tokens_per_s", "quality"), "more is better"),
}


def _unit(unit: str, value: float) -> tuple[float, str]:
    if unit == "bytes":
        return value / 2**20, ", MiB"
    return (100 * value, ", %") if unit == "share" else (value, ", ms" if unit == "ms" else "")


def _compared(rows: list[dict[str, Any]], names: Sequence[str], title: str, better: str) -> Spec:
    text = f"{title} ({better})" if better else title
    axis = {
        "grid": True,
        "tickCount": 5,
        "titleAnchor": "start",
        "labelExpr": picture.COUNT,
    }
    x = x_axis("x", None, scale={"zero": True, "nice": True}, axis=axis)
    y = {"field": "y", "type": "nominal", "scale": {"domain": list(names)}}
    y |= {"axis": {"title": None, "labelLimit": 130, "ticks": False, "grid": True, "offset": 8}}
    whiskers = [row for row in rows if "low" in row]
    low = x | {"field": "low"}
    colour = picture.coloured("series", names, legend=None)
    marks = points(rows, x, y, names)
    for mark in marks:  # the axis names them
        for channel in ("color", "fill", "shape"):
            if channel in mark["encoding"]:
                mark["encoding"][channel] = mark["encoding"][channel] | {"legend": None}
    layers = [layer(whiskers, "rule", x=low, x2={"field": "high"}, y=y, color=colour)] if whiskers else []
    return picture.view([*layers, *marks], text, height=ROW_HEIGHT * len(names))
