"""The figures that compare within a run: its kinds of prompt, and its models side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from loadbench.analysis.decision import FIGURES, Candidate, Decision
from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.summary import Level, Summary
from loadbench.records import load_title
from loadbench.report import decision, picture
from loadbench.report.escape import plain
from loadbench.report.picture import MS, Figure, LeftOut, Spec, key, layer, points, told, x_axis
from loadbench.report.words import milliseconds

COMPARED = (
    *("ttft_p50_ms", "e2e_p50_ms", "tokens_per_s", "best_tokens_per_s", "memory_loaded_bytes", "cold_start_ms"),
    *("quality", "failed_share"),
)
ROW_HEIGHT = 26
LABEL, LETTER = 130, 7  # pixels of a model's name at most, and of a letter of it
ROOM = 1.5  # times the most on an axis: its value stands beside it


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
    above = f"{LATENCIES[metric].title}, {levels[0].headline}"
    x = x_axis("x", None, axis={"labelExpr": MS, "grid": True, "tickCount": 5})
    y = {"field": "y", "type": "nominal", "scale": {"domain": order}}
    y |= {"axis": {"title": None, "grid": True, "labelLimit": 150, "ticks": False}}
    slowest = max(rows, key=lambda row: float(str(row["x"])))
    return Figure(
        name=name,
        section="Kinds of prompt",
        title=title,
        spec=picture.picture(points(rows, x, y, ["p50", "p95"]), above, key(rows), max(80, ROW_HEIGHT * len(order))),
        alt=f"The longest: {slowest['series']} {milliseconds(float(str(slowest['x'])))}, of {slowest['y']}.",
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
    said: list[str] = []
    for name in COMPARED:
        rows = [row for one in candidates if (row := _row(one, name)) is not None]
        if len(rows) > 1:
            unit = _unit(FIGURES[name].unit, 0.0)[1]
            views.append(_compared(rows, names, f"{FIGURES[name].title}{unit}", CRITERION.get(name, "")))
            said += [_range(name, rows)] if name in TOLD else []
    if not views:
        yield LeftOut(section, title, "no figure is known of two models")
        return
    headings = ("model", *(FIGURES[name].title for name in COMPARED))
    table = tuple(
        (one.model, *(decision.words(FIGURES[name], getattr(one, name).value, one.currency) for name in COMPARED))
        for one in candidates
    )
    note = "bars: 95 % interval; filled: firm; hollow: indicative, on few samples, taken once or in doubt"
    left = 38 + min(LABEL, LETTER * max(map(len, names)))
    spec = picture.stack(views, "bounds", usermeta={"left": left})
    yield Figure("models", section, title, spec, " ".join(said), headings, table, note, core=True)


TOLD = ("ttft_p50_ms", "best_tokens_per_s", "memory_loaded_bytes", "quality")  # in the sentence above the picture
CRITERION = {
    **dict.fromkeys(
        ("ttft_p50_ms", "e2e_p50_ms", "memory_loaded_bytes", "cold_start_ms", "failed_share"), "less is better"
    ),
    **dict.fromkeys(("tokens_per_s", "best_tokens_per_s", "quality"), "more is better"),
}


def _row(one: Candidate, name: str) -> dict[str, Any] | None:
    """One figure of one model; None where it is not known."""
    each, compared = getattr(one, name), FIGURES[name]
    if each.value is None:
        return None
    reach, sure = each.interval_95, each.firm is not False
    value = _unit(compared.unit, each.value)[0]
    words = f"{'' if sure else '~'}{decision.words(compared, each.value, one.currency)}"
    row = {"x": value, "y": plain(one.model), "series": plain(one.model), "sure": sure, "words": words}
    between = None if reach is None else " to ".join(decision.words(compared, end, None) for end in reach)
    row["tip"] = told(
        f"{one.model}: {compared.title} {words}",
        None if between is None else f"95 %: {between}",
        None if each.n is None else f"n {each.n:,}",
        None if each.at is None else f"at {each.at}",
        each.source,
    )
    if reach is not None:
        row |= {"low": _unit(compared.unit, reach[0])[0], "high": _unit(compared.unit, reach[1])[0]}
    return row


def _range(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """From which model to which a figure goes; whether that is more than chance is the ranking's to say."""
    least, most = min(rows, key=lambda row: row["x"]), max(rows, key=lambda row: row["x"])
    return (
        f"{FIGURES[name].title[0].upper()}{FIGURES[name].title[1:]}:"
        f" from {least['words']} ({least['y']}) to {most['words']} ({most['y']})."
    )


def _unit(unit: str, value: float) -> tuple[float, str]:
    if unit == "bytes":
        return value / 2**20, ", MiB"
    return (100 * value, ", %") if unit == "share" else (value, ", ms" if unit == "ms" else "")


def _compared(rows: list[dict[str, Any]], names: Sequence[str], title: str, better: str) -> Spec:
    text = f"{title} ({better})" if better else title
    axis = {
        "grid": True,
        "tickCount": 4,
        "labelExpr": picture.COUNT,
    }
    most = max(row.get("high", row["x"]) for row in rows)
    x = x_axis("x", None, scale={"domain": [0, ROOM * most or 1], "nice": False}, axis=axis)
    y = {"field": "y", "type": "nominal", "scale": {"domain": list(names)}}
    y |= {"axis": {"title": None, "labelLimit": LABEL, "ticks": False, "grid": True, "offset": 8}}
    whiskers = [row for row in rows if "low" in row]
    low = x | {"field": "low"}
    colour = picture.coloured("series", names, legend=None)
    marks = points(rows, x, y, names)
    for mark in marks:  # the axis names them
        for channel in ("color", "fill", "shape"):
            if channel in mark["encoding"]:
                mark["encoding"][channel] = mark["encoding"][channel] | {"legend": None}
    layers = [layer(whiskers, "rule", x=low, x2={"field": "high"}, y=y, color=colour)] if whiskers else []
    # Beside the mark, or above it where its interval is in the way: at the end of that it would read as the end's.
    wide = [row for row in rows if "high" in row]
    mark = {"type": "text", "align": "left", "dx": 10, "color": picture.INK, "fontSize": 11.5}
    words = [
        layer(some, mark | {"dy": dy}, x=x, y=y, text={"field": "words", "type": "nominal"})
        for some, dy in (([row for row in rows if row not in wide], 0), (wide, -8))
        if some
    ]
    return picture.view([*layers, *marks, *words], text, height=ROW_HEIGHT * len(names))
