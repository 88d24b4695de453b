"""Prints what a scenario would do, before any traffic: levels, requests, time."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TextIO

from rich import box
from rich.table import Table
from rich.text import Text

from loadbench.errors import UsageError
from loadbench.records import Closed, Find, Leg, Level, Load, load_title
from loadbench.report.console import console_on
from loadbench.report.escape import plain
from loadbench.report.github import verbatim
from loadbench.report.words import clock, count, octets
from loadbench.scenario.endpoints import PROBE_TOKEN_VARIABLE
from loadbench.scenario.load import Loaded
from loadbench.scenario.memory import FLOOR_SHARE, LEAST_FLOOR_BYTES, MemoryLadder
from loadbench.scenario.plan import LevelPlan, Plan, describe, levels, order_of_models
from loadbench.scenario.schema import PromptEntry, Scenario
from loadbench.scenario.shapes import StopRules, each
from loadbench.scenario.stage import Stage
from loadbench.scenario.units import DURATION, POWER
from loadbench.target.synthetic import SYNTHETIC

WIDEST = 120


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """What ``--find`` does with a scenario: probes ``like`` this one between two loads, for so long on each model.

    ``levels`` are the most probes and the most confirmations, which are twice as long; ``most_s`` is without drains.
    """

    find: Find
    low: Load
    high: Load
    like: Level
    resolution: float
    levels: tuple[int, int]
    most_s: float


@verbatim()
def print_plan(loaded: Loaded, stream: TextIO | None = None, search: SearchPlan | None = None) -> None:
    """The plan of a scenario that has been read, or of a search that takes its loads and its SLO.

    Raises UsageError for a synthetic model that there is not.
    """
    scenario = loaded.scenario
    _judge_models(loaded)
    models = [scenario.models[place] for place in order_of_models(scenario)]
    asked = len(loaded.quality_prompts) * (scenario.quality.repeats if scenario.quality else 0)
    plan = describe(scenario, levels(scenario, models, loaded.traces), asked)
    console = console_on(stream or sys.stdout)
    console.soft_wrap = True
    console.print(Text.assemble((plain(scenario.name), "bold"), f" · {plain(loaded.path)} is valid"))
    if scenario.description:
        console.print(Text(plain(scenario.description)))
    endpoints = ", ".join(scenario.redacted().endpoints)
    console.print(Text(f"Endpoint  {plain(endpoints)} (from {plain(loaded.endpoint_source)})"))
    console.print(Text(f"Models    {plain(', '.join(models) + _why_these(loaded))}"))
    console.print(Text(f"Prompts   {plain(', '.join(_kind(entry) for entry in scenario.prompts))}"))
    for line in (*_target(scenario), *_beside_levels(loaded)):
        console.print(Text(line))
    if search is not None:
        for line in _search(scenario, search):
            console.print(Text(line))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("level", "model", "load", "requests", "time"):
        table.add_column(column, justify="left" if column in ("model", "load") else "right")
    for cells in _rows(plan):
        table.add_row(*(Text(plain(cell)) for cell in cells))
    console.print(table)
    for line in (*_particulars(scenario, plan), *_consent(loaded)):
        console.print(Text(textwrap.fill(line, min(console.width, WIDEST), subsequent_indent="    ")))
    for line in _times(plan):
        console.print(Text(line))
    if scenario.repeat > 1:
        console.print(Text(f"{scenario.repeat} runs of it, one after another: {scenario.repeat} times as long."))


def _search(scenario: Scenario, search: SearchPlan) -> Iterator[str]:
    """Between which loads it looks, under what, with probes of which size, and how long that may take."""
    low, high = load_title(search.low), load_title(search.high)
    step = f"{100 * search.resolution:g} %" + (" or one user" if search.find == "max-concurrency" else "")
    yield f"Search    {search.find}: the largest load within the SLO from {low} to {high}, as near as {step}"
    yield f"SLO       {', '.join(_limits(scenario))}"
    like, (probes, confirmations) = search.like, search.levels
    least, most = count(like.min_requests, "request"), _span(like.at_most_s or 0.0)
    length = f"{_span(like.duration_s or 0.0)} and at least {least}, but no longer than {most}"
    yield f"Probes    {length}; the answer is confirmed with twice that"
    most_s = search.most_s + (probes + confirmations) * min(scenario.drain_s, scenario.deadlines.total_s)
    model = "" if len(scenario.models) == 1 else " on each model"
    levels = f"{probes} probes and {count(confirmations, 'confirmation')}{model}"
    yield f"At most {levels}: no longer than {clock(most_s)}, with their drains."


def _limits(scenario: Scenario) -> Iterator[str]:
    """The clauses of the SLO."""
    slo = scenario.slo
    if slo is not None:
        yield from (f"{metric}.{percentile} ≤ {_span(limit_s)}" for metric, percentile, limit_s in slo.limits())
        yield from [] if slo.error_rate is None else [f"error_rate ≤ {100 * slo.error_rate:g} %"]
        yield from [] if slo.goodput is None else [f"goodput ≥ {100 * slo.goodput:g} %"]


def _target(scenario: Scenario) -> Iterator[str]:
    """What is said of the target besides its address and its models."""
    if scenario.target_probe is not None:
        yield f"Probe     {plain(', '.join(scenario.probes))}, with the token in {PROBE_TOKEN_VARIABLE}"
    if scenario.memory_limit_bytes is not None:
        yield f"Limit     {octets(scenario.memory_limit_bytes)} of memory"
    back = "restart it" if scenario.embedded else "wait for it to come back"
    told = {"stop": "end the run", "restart": f"{back} and go on", "skip_model": "go on with the next model"}
    yield f"On death  {told[scenario.on_target_death or 'stop']}"


def _rows(plan: Plan) -> Iterator[tuple[str, str, str, str, str]]:
    """Each level's number, model, load, requests and time; the rungs of a memory ladder are told as one."""
    for (model, rungs, _), group in groupby(plan.levels, key=_row_of):
        rows = list(group)
        if not rungs:
            yield str(rows[0].level.index), model, load_title(rows[0].level.load), _requests(rows[0]), _time(rows[0])
            continue
        loads = [load for row in rows if isinstance(load := row.level.load, Closed)]
        users = _from_to([load.concurrency for load in loads], "user")
        tokens = _from_to([load.ask.tokens for load in loads if load.ask is not None], "token")
        requests = f"at most {sum(load.concurrency for load in loads):,}"
        time = f"at most {clock(sum(row.issuing_s or 0.0 for row in rows))}"
        yield _places([row.level for row in rows]), model, f"{users} × {tokens}", requests, time


def _row_of(row: LevelPlan) -> tuple[str, bool, int]:
    level = row.level
    return (level.model, True, level.stage) if level.purpose == "rung" else (level.model, False, level.index)


def _from_to(numbers: Sequence[int], noun: str) -> str:
    """``64 tokens``, ``1..16 users``."""
    least, most = min(numbers), max(numbers)
    return count(most, noun) if least == most else f"{least:,}..{count(most, noun)}"


def _places(levels: Sequence[Level]) -> str:
    first, last = levels[0].index, levels[-1].index
    return str(first) if first == last else f"{first} to {last}"


def _particulars(scenario: Scenario, plan: Plan) -> Iterator[str]:
    """What the table has no column for, a line for each stage that has something of the kind."""
    for number, stage in enumerate(scenario.stages):
        rows = [row.level for row in plan.levels if row.level.stage == number and row.level.model == plan.models[0]]
        told = [] if stage.memory is None else [*_climb(stage.memory, stage.duration_s or 0.0, ours=scenario.embedded)]
        if stage.over_time:
            told.append(", ".join(_leg(leg, rows[0].load) for leg in rows[0].load.legs))
        if len(rows) > 1 and stage.stop is not None and (rules := list(_rules(stage, scenario.slo is not None))):
            told.append(f"until {', '.join(rules)}")
        if len(rows) > 1 and stage.rest_s:
            told.append(f"rest {_span(stage.rest_s)} between them")
        if rows[0].interval_s:
            told.append(f"results every {_span(rows[0].interval_s)}")
        if told:
            yield f"{'Level' if len(rows) == 1 else 'Levels'} {_places(rows)}: {'; '.join(told)}"


def _climb(ladder: MemoryLadder, bound_s: float, *, ours: bool) -> Iterator[str]:
    """What a memory ladder does, and where it ends."""
    keys = {"concurrency": ladder.concurrency, "max_tokens": ladder.max_tokens, "input_tokens": ladder.input_tokens}
    told = (f"{key} {', '.join(f'{n:,}' for n in sorted(set(each(counts))))}" for key, counts in keys.items())
    several = len(ladder.rungs()) > 1
    yield " × ".join(told) + (", least memory first" if several else "")
    yield f"{'a fresh service and ' if ours else ''}at most {_span(bound_s)}{' for each' if several else ''}"
    if ladder.until_bytes is not None:
        end = f"it takes {octets(ladder.until_bytes)}"
    elif ladder.until_share is not None:
        end = f"it takes {ladder.until} of its limit, its GPU or the machine"
    else:
        end = "it fails"
    floor = f"{100 * FLOOR_SHARE:g} % of its memory, or {octets(LEAST_FLOOR_BYTES)}, left"
    if ladder.floor_bytes is not None:
        floor = f"{octets(ladder.floor_bytes)} left"
    yield f"until {end}, or the host has less than {floor}"


def _consent(loaded: Loaded) -> Iterator[str]:
    """What a run needs besides the scenario."""
    if loaded.breaks is not None:
        yield f"A run needs --i-own-the-target: {plain(loaded.breaks)}"


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
        yield f"{_span(stop.time_s)} passed, in mid-level too"


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
    for model in loaded.scenario.models if loaded.scenario.embedded else ():
        kind, colon, name = model.partition(":")
        if colon and kind == "synthetic" and name not in SYNTHETIC:
            raise UsageError(
                f"{loaded.path}: models: expected synthetic: with one of {', '.join(SYNTHETIC)}, got {model}"
            )


def _why_these(loaded: Loaded) -> str:
    """Who named the models, and in whose order they are."""
    told = [] if loaded.models_source == "default" else [f"from {loaded.models_source}"]
    if len(loaded.scenario.models) > 1:
        drawn = loaded.scenario.model_order == "shuffled"
        told.append("one after another" + (f", in an order drawn by seed {loaded.scenario.seed}" if drawn else ""))
    return f" ({'; '.join(told)})" if told else ""


def _beside_levels(loaded: Loaded) -> Iterator[str]:
    """What is asked and reckoned besides the levels."""
    scenario = loaded.scenario
    if scenario.quality is not None:
        times = "" if scenario.quality.repeats == 1 else f", {scenario.quality.repeats} times each"
        yield f"Quality   {count(len(loaded.quality_prompts), 'prompt')}{times}, whose answers are kept for marking"
    if scenario.keep_warm_s is not None:
        yield f"Warm      a light prompt to a model that has been idle for {_span(scenario.keep_warm_s)}"
    if scenario.power_w is not None:
        yield f"Power     {POWER.write(scenario.power_w)}, as stated"
    if scenario.price_per_kwh is not None:
        yield f"Price     {scenario.price_per_kwh:g} {plain(scenario.currency or '')} per kWh"


def _kind(entry: PromptEntry) -> str:
    return f"{entry.name} × {entry.weight:g}" + (", in order" if entry.order == "sequential" else "")


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
