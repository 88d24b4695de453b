"""Prints what a scenario would do, before any traffic: levels, requests, time."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Iterator
from typing import TextIO

from rich import box
from rich.table import Table
from rich.text import Text

from loadbench.errors import UsageError
from loadbench.records import Closed, Leg, Load, load_title
from loadbench.report.console import console_on
from loadbench.report.escape import plain
from loadbench.report.words import clock, count
from loadbench.scenario.load import Loaded
from loadbench.scenario.plan import LevelPlan, Plan, describe, levels
from loadbench.scenario.schema import EMBEDDED, Scenario
from loadbench.scenario.shapes import StopRules
from loadbench.scenario.stage import Stage
from loadbench.scenario.units import DURATION
from loadbench.target.synthetic import SYNTHETIC

WIDEST = 120


def print_plan(loaded: Loaded, stream: TextIO | None = None) -> None:
    """The plan of a scenario that has been read. Raises UsageError for a synthetic model that there is not."""
    scenario = loaded.scenario
    _judge_models(loaded)
    plan = describe(scenario, levels(scenario, scenario.models, loaded.traces))
    console = console_on(stream or sys.stdout)
    console.soft_wrap = True
    console.print(Text.assemble((plain(scenario.name), "bold"), f" · {plain(loaded.path)} is valid"))
    if scenario.description:
        console.print(Text(plain(scenario.description)))
    console.print(Text(f"Endpoint  {plain(scenario.redacted().endpoint)} (from {plain(loaded.endpoint_source)})"))
    console.print(Text(f"Models    {plain(', '.join(plan.models))}"))
    console.print(Text(f"Prompts   {plain(', '.join(_kind(entry.name, entry.weight) for entry in scenario.prompts))}"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("level", "model", "load", "requests", "time"):
        table.add_column(column, justify="left" if column in ("model", "load") else "right")
    for row in plan.levels:
        model, load = Text(plain(row.level.model)), Text(plain(load_title(row.level.load)))
        table.add_row(str(row.level.index), model, load, _requests(row), _time(row))
    console.print(table)
    for line in _particulars(scenario, plan):
        console.print(Text(textwrap.fill(line, min(console.width, WIDEST), subsequent_indent="    ")))
    for line in _times(plan):
        console.print(Text(line))


def _particulars(scenario: Scenario, plan: Plan) -> Iterator[str]:
    """What the table has no column for, a line for each stage that has something of the kind."""
    for number, stage in enumerate(scenario.stages):
        rows = [row.level for row in plan.levels if row.level.stage == number and row.level.model == plan.models[0]]
        told = []
        if stage.over_time:
            told.append(", ".join(_leg(leg, rows[0].load) for leg in rows[0].load.legs))
        if len(rows) > 1 and stage.stop is not None and (rules := list(_rules(stage, scenario.slo is not None))):
            told.append(f"until {', '.join(rules)}")
        if len(rows) > 1 and stage.rest_s:
            told.append(f"rest {_span(stage.rest_s)} between them")
        if rows[0].interval_s:
            told.append(f"results every {_span(rows[0].interval_s)}")
        if told:
            places = str(rows[0].index) if len(rows) == 1 else f"{rows[0].index} to {rows[-1].index}"
            yield f"{'Level' if len(rows) == 1 else 'Levels'} {places}: {'; '.join(told)}"


def _leg(leg: Leg, load: Load) -> str:
    unit = " users" if isinstance(load, Closed) else "/s"
    return f"{leg.name} {'to ' if leg.name == 'ramp' else ''}{leg.end:g}{unit} for {_span(leg.over_s)}"


def _rules(stage: Stage, has_slo: bool) -> Iterator[str]:
    """The stop rules of a stage that can apply."""
    stop = stage.stop or StopRules()
    if stop.gain_share is not None:
        yield f"gain under {100 * stop.gain_share:g} % twice"
    if stop.slo and has_slo:
        yield "SLO missed"
    if stop.error_rate is not None:
        yield f"over {100 * stop.error_rate:g} % failed"
    if stop.degraded:
        yield "target degraded"
    if stop.over_capacity and stage.rates_per_s is not None:
        yield "over capacity"
    if stop.time_s is not None:
        yield f"{_span(stop.time_s)} passed"


def _times(plan: Plan) -> Iterator[str]:
    """How long it takes, as far as that can be known beforehand."""
    word = "at most" if plan.may_end_early else "about"
    known = f"{word} {clock(plan.estimated_s)}" if plan.estimated_s else "unknown"
    open_ended = plan.open_ended or any(_may_go_on(row) for row in plan.levels)
    more = "; levels bounded by a number of requests take as long as the target does" if open_ended else ""
    warm = f", {count(plan.warmup_requests, 'warm-up request')}" if plan.warmup_requests else ""
    yield f"{count(len(plan.levels), 'level')}{warm}; time {known} plus starting, loading and draining{more}."
    yield f"No longer than {clock(plan.at_most_s)}, even if every request ran into its deadline."


def _judge_models(loaded: Loaded) -> None:
    """What an endpoint serves only it knows; the synthetic models of the embedded one are ours."""
    for model in loaded.scenario.models if loaded.scenario.endpoint == EMBEDDED else ():
        kind, colon, name = model.partition(":")
        if colon and kind == "synthetic" and name not in SYNTHETIC:
            raise UsageError(
                f"{loaded.path}: models: expected synthetic: with one of {', '.join(SYNTHETIC)}, got {model}"
            )


def _kind(name: str, weight: float) -> str:
    return f"{name} × {weight:g}"


def _requests(row: LevelPlan) -> str:
    if row.level.requests is not None and row.level.duration_s is not None:
        return f"at most {row.level.requests:,}"
    expected = row.expected_requests
    if expected is None or math.isinf(expected):
        return f"at least {row.level.min_requests:,}" if row.level.min_requests else "as many as it answers"
    return f"{expected:,.0f}" if row.level.requests is not None else f"about {expected:,.0f}"


def _time(row: LevelPlan) -> str:
    if row.issuing_s is None:
        return "as long as it takes"
    return f"{'from ' if _may_go_on(row) else ''}{clock(row.issuing_s)}"


def _may_go_on(row: LevelPlan) -> bool:
    """A closed loop goes on past its duration until its least number of requests is issued."""
    return isinstance(row.level.load, Closed) and row.level.min_requests > 0


def _span(seconds: float) -> str:
    """A time as a scenario writes it: 30s, 5m."""
    return DURATION.write(seconds)
