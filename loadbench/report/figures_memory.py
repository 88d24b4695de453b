"""The figures of what a model takes: memory against load, and the time for reading a prompt and for every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from loadbench.analysis import memory_fit
from loadbench.analysis.findings import Fit, LevelMemory, Memory, Phases
from loadbench.analysis.rundir import RunData
from loadbench.analysis.stats import NS_PER_MS
from loadbench.analysis.summary import Level, Summary
from loadbench.analysis.words import is_fixed, load_of
from loadbench.records import load_title
from loadbench.report import picture
from loadbench.report.memory import OF
from loadbench.report.picture import MS, Figure, LeftOut, Rows, Spec, key, layer, points, told, x_axis, y_axis
from loadbench.report.words import NONE, figure, milliseconds, octets

MOST_POINTS = 600  # of a cloud: more are no clearer
FITTED, HELD = "the fit", "held"


def memory_figures(summary: Summary) -> Iterator[Figure | LeftOut]:
    """Peaks against load with the fit, model by model."""
    models = dict.fromkeys(level.model for level in summary.levels)
    for number, model in enumerate(models):
        of = f" ({model})" if len(models) > 1 else ""
        known = [
            (level, level.memory)
            for level in summary.levels
            if level.model == model and level.memory is not None and level.memory.peak_bytes is not None
        ]
        yield _memory(summary, model, known, f"What does memory grow with?{of}", f"memory-{number}")


def _memory(
    summary: Summary, model: str, known: Sequence[tuple[Level, LevelMemory]], title: str, name: str
) -> Figure | LeftOut:
    section = "Memory"
    known = [(level, memory) for level, memory in known if memory.streams]
    if len(known) < 2:
        because = "memory was read at fewer than two levels" if known else "nothing was read of the target's memory"
        return LeftOut(section, title, because)
    found = next((fit for fit in summary.memory if fit.model == model), None)
    by_tokens = found is not None and found.per_token.value_bytes is not None
    rows = [_told_peak(level, memory, by_tokens) for level, memory in known]
    if len({row["x"] for row in rows}) < 2:
        return LeftOut(section, title, "all levels had the same number of streams")
    unit = "tokens asked for, all streams together" if by_tokens else "requests in flight at most"
    top = max(float(row["y"]) for row in rows)
    limit = min((m.limit_bytes for _, m in known if m.limit_bytes and m.of != "rss"), default=None)
    limit = limit or min((m.limit_bytes for _, m in known if m.limit_bytes), default=None)
    shown_limit = limit is not None and limit < 3 * top
    fitted = [] if found is None else _fitted(found, known, by_tokens)
    curves = [{"x": x, "y": y, "bound": FITTED} for x, y in sorted(fitted)]
    limits = [{"y": limit, "bound": f"limit: {octets(limit)}"}] if shown_limit else []
    limits = [row | {"tip": told(str(row["bound"]))} for row in limits]
    bounds = [*([FITTED] if curves else []), *(str(row["bound"]) for row in limits)]
    top = max([top, *(y for _, y in fitted), *([limit] if shown_limit and limit else [])]) * 1.06
    most = max(float(row["x"]) for row in rows)
    x = x_axis(
        "x",
        unit,
        scale={"domain": [0, 1.03 * most], "nice": False},
        axis={"labelExpr": picture.COUNT, "tickMinStep": 1, "tickCount": 8},
    )
    of = next((OF[memory.of] for _, memory in known if memory.of), "memory")
    y = y_axis("y", scale={"domain": [0, top]}, axis=picture.octet_axis(top))
    names = list(dict.fromkeys(str(row["series"]) for row in sorted(rows, key=lambda row: row["series"] != HELD)))
    layers = [
        *picture.bounds(curves, [], bounds, x, y),
        *picture.bounds([], limits, bounds, x, y, upright=False),
        *points(rows, x, y, names),
        *_failed(rows, x, y, most),
    ]
    best = max(rows, key=lambda row: row["y"])
    said = f"The fit: {_fit_words(found)}." if found is not None and fitted else ""
    notes = [
        None if fitted or found is None else f"no fit is drawn: {found.base.not_told or found.per_stream.not_told}",
        "a peak above the limit: pages of mapped files are resident, and no limit counts them"
        if any(m.of == "rss" and m.limit_bytes and (m.peak_bytes or 0) > m.limit_bytes for _, m in known)
        else None,
    ]
    return Figure(
        name=name,
        section=section,
        title=title,
        spec=picture.picture(layers, f"most {of}", key(rows, "high-water mark", "highest of samples")),
        alt=f"The most was {octets(float(best['y']))}, at {best['load']}. {said}".strip(),
        headings=("load", "streams", "tokens each", "before", "peak", "by the fit", "limit", "verdict"),
        rows=tuple(_peak_row(level, memory, found) for level, memory in known),
        note="; ".join(filter(None, notes)) or None,
        core=True,
    )


def _failed(rows: Rows, x: Spec, y: Spec, most: float) -> list[Spec]:
    """The loads that did not hold, by their names beside their points."""
    layers = []
    for side, sign in (("right", -1), ("left", 1)):
        mine = [row for row in rows if row["series"] != HELD and (row["x"] > most / 2) is (side == "right")]
        mark = {"type": "text", "align": side, "dx": 9 * sign, "dy": -10, "color": picture.BAD, "fontSize": 11.5}
        layers += [layer(mine, mark, x=x, y=y, text={"field": "load", "type": "nominal"})] if mine else []
    return layers


def _fit_words(found: Memory) -> str:
    parts = [octets(found.base.value_bytes)]
    for each, name in ((found.per_stream, "a stream"), (found.per_token, "a token")):
        if each.value_bytes is not None:
            size = each.value_bytes
            parts.append(f"{octets(size) if abs(size) >= 2**20 else f'{figure(size / 1024)} KiB'} {name}")
    return " + ".join(parts)


def _fitted(found: Memory, known: Sequence[tuple[Level, LevelMemory]], by_tokens: bool) -> list[tuple[float, float]]:
    """What the fit gives at the loads that were measured."""
    told_at = {}
    for _, memory in known:
        tokens = memory.tokens if memory.tokens is not None else found.at_tokens
        at = _at(memory, by_tokens)
        need = memory_fit.predict(found, memory.streams or 0, tokens or 0.0)
        if at is not None and need is not None:
            told_at[at] = need
    return list(told_at.items())


def _at(memory: LevelMemory, by_tokens: bool) -> float | None:
    if not by_tokens:
        return memory.streams
    return None if memory.tokens is None or memory.streams is None else memory.tokens * memory.streams


def _told_peak(level: Level, memory: LevelMemory, by_tokens: bool) -> dict[str, Any]:
    """``sure`` is whether the peak is a high-water mark: the highest of samples may have been passed unseen."""
    failed = memory.verdict in ("out_of_memory", "spills", "leaks", "under_pressure")
    return {
        "x": _at(memory, by_tokens),
        "y": memory.peak_bytes,
        "series": memory.verdict.replace("_", " ") if failed else HELD,
        "sure": memory.exact,
        "load": load_title(level.load),
        "tip": told(
            load_title(level.load),
            f"peak {octets(memory.peak_bytes)}, before {octets(memory.before_bytes)}",
            f"{figure(memory.streams)} streams of {figure(memory.tokens)} tokens",
            memory.verdict.replace("_", " "),
            "high-water mark" if memory.exact else "the highest of samples",
        ),
    }


def _peak_row(level: Level, memory: LevelMemory, found: Memory | None) -> tuple[str, ...]:
    need = None if found is None else memory_fit.predict(found, memory.streams or 0, memory.tokens or 0.0)
    return (
        load_title(level.load),
        f"{memory.streams:,}",
        NONE if memory.tokens is None else f"{memory.tokens:,.0f}",
        octets(memory.before_bytes),
        octets(memory.peak_bytes),
        octets(need),
        octets(memory.limit_bytes),
        memory.verdict.replace("_", " "),
    )


def phase_figures(summary: Summary, run: RunData) -> Iterator[Figure | LeftOut]:
    """Reading the prompt and making the answer apart, model by model."""
    for number, phases in enumerate(summary.phases):
        of = f" ({phases.model})" if len(summary.phases) > 1 else ""
        yield _prefill(phases, run, f"How fast does it read a prompt?{of}", f"prefill-{number}")
        yield _decode(summary, phases, f"What does company cost each token?{of}", f"decode-{number}")


def _line(fit: Fit, low: float, high: float, name: str) -> list[dict[str, Any]]:
    if fit.slope_ms is None or fit.fixed_ms is None:
        return []
    return [{"x": x, "y": fit.fixed_ms + fit.slope_ms * x, "bound": name} for x in (low, high)]


def _prefill(phases: Phases, run: RunData, title: str, name: str) -> Figure | LeftOut:
    section, fit, samples = "Prefill and decode", phases.prefill, run.samples
    mine = samples.said(samples.phase, "load") & samples.said(samples.outcome, "ok")
    mine &= np.isin(samples.level, fit.levels)
    tokens, first_ms = samples.input_tokens[mine], ((samples.first_token_ns - samples.sent_ns) / NS_PER_MS)[mine]
    known = ~np.isnan(tokens) & ~np.isnan(first_ms)
    tokens, first_ms = tokens[known], first_ms[known]
    if tokens.size < 2 or tokens.min() == tokens.max():
        return LeftOut(section, title, fit.not_told or "all prompts had as many tokens")
    curves = _line(fit, float(tokens.min()), float(tokens.max()), FITTED)
    order = np.argsort(tokens, kind="stable")
    shown = _thinned(first_ms[order])
    rows = [
        {
            "x": float(tokens[place]),
            "y": float(first_ms[place]),
            "series": "a request",
            "tip": told(
                f"{tokens[place]:,.0f} input tokens", f"first token after {milliseconds(float(first_ms[place]))}"
            ),
        }
        for place in order[shown].tolist()
    ]
    x = x_axis("x", "input tokens", scale={"zero": False, "padding": 10}, axis={"tickCount": 6})
    y = y_axis("y", axis={"labelExpr": MS}, scale={"zero": True})
    dot = {"type": "point", "filled": True, "size": 26, "opacity": 0.6, "color": picture.SERIES[0]}
    parts = np.array_split(np.arange(tokens.size)[order], min(8, tokens.size))
    cut = (
        f"{len(rows)} of {tokens.size:,} requests are drawn, the extremes among them"
        if len(rows) < tokens.size
        else None
    )
    why = f"no line is drawn: {fit.not_told}" if fit.not_told else None
    return Figure(
        name=name,
        section=section,
        title=title,
        spec=picture.picture(
            [layer(rows, dot, x=x, y=y, tooltip=picture.tip()), *picture.bounds(curves, [], [FITTED], x, y)]
            if curves
            else [layer(rows, dot, x=x, y=y, tooltip=picture.tip())],
            "time to the first token, nothing queueing",
            height=240,
        ),
        alt=_read_at(phases) if curves else f"{tokens.size:,} requests; {why}.",
        headings=("input tokens", "n", "least", "median", "most"),
        rows=tuple(
            (
                f"{tokens[part].min():,.0f} to {tokens[part].max():,.0f}",
                f"{part.size:,}",
                milliseconds(float(first_ms[part].min())),
                milliseconds(float(np.median(first_ms[part]))),
                milliseconds(float(first_ms[part].max())),
            )
            for part in parts
        ),
        note=cut,
    )


def _read_at(phases: Phases) -> str:
    fixed_ms = phases.prefill.fixed_ms or 0.0
    besides = f" and {milliseconds(fixed_ms)} for any prompt" if fixed_ms > 0 else ""
    return f"The fit: a second for every {figure(phases.prefill_tokens_per_s)} tokens{besides}."


def _thinned(values: Any) -> Any:
    """Places of values in the order of x: of more than can be drawn every so many, and in each stretch its extremes."""
    if values.size <= MOST_POINTS:
        return np.arange(values.size)
    parts = np.array_split(np.arange(values.size), MOST_POINTS // 3)
    kept = [{int(part[0]), int(part[values[part].argmin()]), int(part[values[part].argmax()])} for part in parts]
    return np.array(sorted(set().union(*kept)))


def _decode(summary: Summary, phases: Phases, title: str, name: str) -> Figure | LeftOut:
    section, fit = "Prefill and decode", phases.decode
    levels = [level for level in summary.levels if level.model == phases.model and level.load.kind == "closed"]
    told_levels = [
        (load_of(level), level.latency_ms["tpot"]["service"], level)
        for level in levels
        if is_fixed(level) and getattr(level.load, "ask", None) is None
    ]
    rows: list[dict[str, Any]] = [
        {
            "x": users,
            "y": found.p50,
            "series": "TPOT p50",
            "sure": "p50" not in found.indicative,
            "tip": told(load_title(level.load), f"TPOT p50 {milliseconds(found.p50)}", f"{found.n:,} samples"),
        }
        for users, found, level in told_levels
        if found.p50 is not None
    ]
    if len({row["x"] for row in rows}) < 2:
        return LeftOut(section, title, fit.not_told or "TPOT is known at fewer than two numbers of users")
    low, high = min(float(row["x"]) for row in rows), max(float(row["x"]) for row in rows)
    curves = _line(fit, low, high, FITTED)
    ticks = {"values": sorted({row["x"] for row in rows}), "format": "~g"}
    x = x_axis("x", "users", scale={"zero": False, "padding": 16, "nice": False}, axis=ticks)
    y = y_axis("y", axis={"labelExpr": MS}, scale={"zero": True})
    return Figure(
        name=name,
        section=section,
        title=title,
        spec=picture.picture(
            [*(picture.bounds(curves, [], [FITTED], x, y) if curves else []), *points(rows, x, y, ["TPOT p50"])],
            "time per output token, p50",
            key(rows),
            height=220,
        ),
        alt=f"The fit: {milliseconds(fit.slope_ms)} more for each further user."
        if curves
        else f"{milliseconds(rows[0]['y'])} at {rows[0]['x']:g} users, {milliseconds(rows[-1]['y'])} at {high:g}.",
        headings=("load", "n", "TPOT p50", "p95"),
        rows=tuple(
            (load_title(level.load), f"{found.n:,}", milliseconds(found.p50), milliseconds(found.p95))
            for _, found, level in told_levels
        ),
        note=f"no line is drawn: {fit.not_told}" if fit.not_told else None,
    )
