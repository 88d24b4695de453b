"""Draws trends in the terminal, a bar for each run, or gives them as JSON. Foreign text passes ``plain``."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from rich.text import Text

from loadbench.analysis.history import FIGURES, Figure, Row
from loadbench.analysis.trend import FEWEST, Series, Trend, can_tell
from loadbench.report.console import console_on
from loadbench.report.escape import plain
from loadbench.report.github import verbatim
from loadbench.report.words import count, figure, milliseconds, octets

BARS, PLAIN_BARS, NO_BAR = "▁▂▃▄▅▆▇█", "12345678", "×"
ROOM = 0.2  # of the median is what the bars span at least: noise of a hundredth shall look like none
LONGEST_LOAD = 24
MOST_BARS = 72
FEWEST_BARS = 24  # in a narrower place the lowest and highest are left out
HOW = "pip install 'loadbench[trend]'"


@verbatim()
def print_trends(trends: Sequence[Trend], unreadable: int, stream: TextIO) -> None:
    """Each scenario's series and their changes, as wide as the terminal is."""
    console = console_on(stream)
    bars = BARS if _spells(stream, BARS) else PLAIN_BARS
    for trend in trends:
        for line in _lines(trend, console.width, bars):
            console.print(line, soft_wrap=True)
        console.print()
    if unreadable:
        console.print(
            Text(f"{count(unreadable, 'line')} of the history cannot be read and {_are(unreadable)} left out")
        )


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _spells(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _lines(trend: Trend, width: int, bars: str) -> Iterator[Text]:
    rows = trend.rows
    where = (rows[-1].machine_title, rows[-1].engine.partition(",")[0], _elsewhere(rows[-1]))
    days = rows[0].time[:10], rows[-1].time[:10]
    span = days[0] if days[0] == days[1] else f"{days[0]} to {days[1]}"
    facts = " · ".join(part for part in (count(len(rows), "run"), span, *where) if part)
    yield Text.assemble((plain(trend.scenario), "bold"), f" · {plain(facts)}")
    if trend.unlike:
        yield Text(f"left out: {count(trend.unlike, 'run')} of another version of it, another machine or target", "dim")
    if not trend.series:
        yield Text("no run has any of these figures")
        return
    widths = (
        min(LONGEST_LOAD, max(len(series.load) for series in trend.series)),
        max(len(series.figure.title) for series in trend.series),
        max(len(_last(series)) for series in trend.series),
        max(len(_range(series)) for series in trend.series),
    )
    room = width - sum(widths) - 10
    ranged = room >= min(FEWEST_BARS, len(rows))
    room = max(8, min(MOST_BARS, room if ranged else room + widths[3] + 2))
    shown = min(room, len(rows))
    model, load = "", ""
    for series in trend.series:
        if series.model != model:
            model, load = series.model, ""
            yield Text(plain(model), "bold")
        name = plain(series.load, LONGEST_LOAD) if series.load != load else ""
        load = series.load
        last, span = _last(series), _range(series) if ranged else ""
        drawn = draw(series.values, bars)[-shown:]
        yield Text(
            f"  {name:<{widths[0]}}  {series.figure.title:<{widths[1]}}  {drawn:<{shown}}"
            f"  {last:>{widths[2]}}  {span}".rstrip()
        )
    yield Text(_legend(trend, shown, ranged), "dim")
    yield from _changes(trend)


def _elsewhere(row: Row) -> str:
    return "" if row.served_at == "this machine" else row.served_at


def _legend(trend: Trend, shown: int, ranged: bool) -> str:
    which = f"the last {shown} runs" if shown < len(trend.rows) else "runs"
    missing = any(value is None for series in trend.series for value in series.values)
    note = f"; {NO_BAR}: it gave none" if missing else ""
    span = f", and lowest … highest of {len(trend.rows)}" if ranged else ""
    few = " ~: on few samples." if any(series.indicative[-1] for series in trend.series) else ""
    return f"Bars: {which}, oldest first{note}. Then the last run's{span}.{few}"


def draw(values: Sequence[float | None], bars: str = BARS) -> str:
    """A bar for each value, from the lowest to the highest; they span at least a fifth of the median."""
    known = [value for value in values if value is not None]
    if not known:
        return NO_BAR * len(values)
    low, high, middle = min(known), max(known), statistics.median(known)
    if missing := max(0.0, ROOM * abs(middle) - (high - low)):
        low, high = low - missing / 2, high + missing / 2
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(NO_BAR if value is None else bars[round((value - low) * scale)] for value in values)


def _last(series: Series) -> str:
    return ("~" if series.indicative[-1] else "") + told(series.figure, series.values[-1])


def _range(series: Series) -> str:
    known = [value for value in series.values if value is not None]
    return f"{told(series.figure, min(known))} … {told(series.figure, max(known))}"


def told(of: Figure, value: float | None) -> str:
    """A value of a figure with its unit."""
    if of.unit == "ms":
        return milliseconds(value)
    if of.unit == "bytes":
        return octets(value)
    if value is None or not of.unit:
        return figure(value) if value is None or value % 1 else f"{value:,.0f}"
    return f"{figure(value)} {of.unit}"


def _changes(trend: Trend) -> Iterator[Text]:
    most = max(sum(value is not None for value in series.values) for series in trend.series)
    if most < FEWEST:
        yield Text(f"No change can be told yet: it takes {FEWEST} runs with a figure, there {_are(most)} {most}.")
        return
    if not can_tell():
        yield Text(f"No change can be told: that takes ruptures. {HOW}")
        return
    found: dict[int, list[Text]] = {}
    for series in trend.series:
        for change in series.changes or ():
            better = (change.after < change.before) == series.figure.lower_is_better
            share = f" ({(change.after - change.before) / abs(change.before):+.0%})" if change.before else ""
            where = f"{series.figure.title} at {plain(series.load)} of {plain(series.model)}"
            figures = f"{told(series.figure, change.before)} → {told(series.figure, change.after)}"
            word = ("better", "green") if better else ("worse ", "red")
            line = Text.assemble("  ", word, f"  {where}: {figures}{share.replace('-', '−')}")
            found.setdefault(change.run, []).append(line)
    if not found:
        yield Text("No change.")
    for run, lines in sorted(found.items()):
        yield Text(f"Changed on {plain(trend.rows[run].time[:10])}: {plain(trend.rows[run].path)}", "bold")
        yield Text(f"  {plain(_with(trend, run))}")
        yield from lines


def _with(trend: Trend, run: int) -> str:
    """What the first run of a new level came with, beside the last of the old one."""
    before, now = trend.rows[run - 1], trend.rows[run]
    if now.commit is None:
        told = "at no known commit"
    else:
        told = f"with commit {now.commit.id[:12]}{' and changes to it' if now.commit.dirty else ''}"
        if before.commit is not None:
            same = before.commit.id == now.commit.id
            told += ", as before" if same else f"; before it {before.commit.id[:12]}"
    for what, old, new in (("engine", before.engine, now.engine), ("loadbench", before.loadbench, now.loadbench)):
        told += f"; {what}: {old} → {new}" if old != new else ""
    return told


def trends_json(trends: Sequence[Trend], unreadable: int) -> dict[str, Any]:
    """The same, to compute with: values by run, null where a run has none; ``changes`` null where none can be told."""
    return {
        "schema": 1,
        "fewest_runs": FEWEST,
        "can_tell_changes": can_tell(),
        "unreadable_lines": unreadable,
        "scenarios": [_trend_json(trend) for trend in trends],
    }


def _trend_json(trend: Trend) -> dict[str, Any]:
    return {
        "scenario": trend.scenario,
        "scenario_hash": trend.rows[-1].scenario_hash,
        "machine": trend.rows[-1].machine,
        "unlike_runs": trend.unlike,
        "runs": [_run_json(row) for row in trend.rows],
        "series": [_series_json(series, trend) for series in trend.series],
    }


def _run_json(row: Row) -> dict[str, Any]:
    commit = row.commit
    return {
        "time": row.time,
        "path": row.path,
        "commit": None if commit is None else commit.id,
        "dirty": None if commit is None else commit.dirty,
        "engine": row.engine,
        "loadbench": row.loadbench,
        "status": row.status,
        "exit_code": row.exit_code,
    }


def _series_json(series: Series, trend: Trend) -> dict[str, Any]:
    changes = [
        {"run": found.run, **_run_json(trend.rows[found.run]), "before": found.before, "after": found.after}
        for found in series.changes or ()
    ]
    return {
        "model": series.model,
        "load": series.load,
        "metric": series.figure.name,
        "unit": series.figure.unit or "1",
        "values": series.values,
        "indicative": series.indicative,
        "changes": None if series.changes is None else changes,
    }


def metric_names() -> str:
    """What may be asked for, in one line."""
    return ", ".join(FIGURES)
