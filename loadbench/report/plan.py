"""Prints what a scenario would do, before any traffic: levels, requests, time."""

from __future__ import annotations

import math
import sys
from typing import TextIO

from rich import box
from rich.table import Table
from rich.text import Text

from loadbench.errors import UsageError
from loadbench.records import Closed, load_title
from loadbench.report.console import console_on
from loadbench.report.escape import plain
from loadbench.report.words import clock, count
from loadbench.scenario.load import Loaded
from loadbench.scenario.plan import LevelPlan, describe, levels
from loadbench.scenario.schema import EMBEDDED
from loadbench.target.synthetic import SYNTHETIC


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
    known = f"about {clock(plan.estimated_s)}" if plan.estimated_s else "unknown"
    open_ended = plan.open_ended or any(_may_go_on(row) for row in plan.levels)
    more = "; levels bounded by a number of requests take as long as the target does" if open_ended else ""
    warm = f", {count(plan.warmup_requests, 'warm-up request')}" if plan.warmup_requests else ""
    console.print(
        Text(f"{count(len(plan.levels), 'level')}{warm}; time {known} plus starting, loading and draining{more}.")
    )
    console.print(Text(f"No longer than {clock(plan.at_most_s)}, even if every request ran into its deadline."))


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
