"""The levels that a scenario comes to, and what can be said of them before anything is sent; among that when each would
begin on machines that do not speak with each other. Data only, no words but those of a refusal."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType

import numpy as np

from loadbench.errors import UsageError
from loadbench.records import Closed, Level, Load, Open, Trace
from loadbench.scenario.arrivals import when_s
from loadbench.scenario.schema import Scenario
from loadbench.scenario.stage import Stage


def levels(
    scenario: Scenario, models: Sequence[str], traces: Mapping[int, Trace] = MappingProxyType({})
) -> tuple[Level, ...]:
    """One level for each model, stage and load, in that nesting, so that a model is loaded once.

    A level's seed comes from the scenario's seed, the stage and the place in the stage, and not from the model: all
    models are asked the same things at the same times. It is for arrivals and for the words of made-up texts; which
    work is asked is the scenario's seed's business and the same at every level. ``traces`` are those of the stages, by
    their numbers.
    """
    laid_out: list[Level] = []
    for model in models:
        for number, stage in enumerate(scenario.stages):
            for place, load in enumerate(stage.loads(traces.get(number))):
                level = Level(
                    index=len(laid_out),
                    stage=number,
                    model=model,
                    load=load,
                    duration_s=stage.length_s,
                    requests=_requests(stage, load, traces.get(number)),
                    min_requests=stage.min_requests,
                    seed=_seed(scenario.seed, number, place),
                    start_spacing_s=stage.start_spacing_s or 0.0,
                    max_in_flight=stage.max_in_flight,
                    at_most_s=stage.duration_s if stage.memory else stage.budget_s,
                    interval_s=stage.telling_s,
                    purpose="rung" if stage.memory else "level",
                )
                laid_out.append(level)
    return tuple(laid_out)


def order_of_models(scenario: Scenario) -> tuple[int, ...]:
    """The places of the scenario's models in the order in which they are measured."""
    places = list(range(len(scenario.models)))
    if scenario.model_order == "shuffled":
        random.Random(f"models {scenario.seed}").shuffle(places)
    return tuple(places)


def _requests(stage: Stage, load: Load, trace: Trace | None) -> int | None:
    """A trace that nothing cuts short ends a level by its number of requests, a rung has one from each user."""
    if isinstance(load, Closed) and load.ask is not None:
        return load.concurrency
    return stage.requests if trace is None or stage.duration_s is not None else trace.requests


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


@dataclass(frozen=True, slots=True)
class LevelPlan:
    """What to expect of a level. None: depends on how fast the target is.

    ``expected_requests`` is a mean in open loop. ``issuing_s`` is how long requests are issued, the most of it where
    requests end the level too; ``at_most_s`` has the drain in it, and every deadline where nothing else ends it.
    """

    level: Level
    expected_requests: float | None
    issuing_s: float | None
    at_most_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What to expect of a run. ``estimated_s`` sums the levels whose time is known, and the rests between levels.

    ``open_ended``: there are other levels. ``may_end_early``: a stage's rules may leave levels out. ``at_most_s`` is
    reached when every request, the warm-up's, the canaries' and those for quality too, runs into its deadline.
    """

    levels: tuple[LevelPlan, ...]
    models: tuple[str, ...]
    warmup_requests: int
    estimated_s: float
    open_ended: bool
    may_end_early: bool
    at_most_s: float


def describe(scenario: Scenario, laid_out: Sequence[Level], quality_requests: int = 0) -> Plan:
    """What can be said of these levels before the target has answered anything.

    ``quality_requests`` are those that every model is asked beside its levels.
    """
    models = tuple(dict.fromkeys(level.model for level in laid_out))
    plans = tuple(_expected(scenario, level) for level in laid_out)
    warmup_requests = scenario.warmup.requests * len(models)
    # A model is tried out in any case, and again before each rung that gets a service of its own.
    tried = len(models) + sum(level.purpose == "rung" for level in laid_out if scenario.embedded)
    canaries = tried + (len(plans) if scenario.canary else 0)
    times = [
        _times(scenario, list(group)) for _, group in groupby(plans, lambda plan: (plan.level.model, plan.level.stage))
    ]
    spare_s = (warmup_requests + canaries + quality_requests * len(models)) * scenario.deadlines.total_s
    return Plan(
        levels=plans,
        models=models,
        warmup_requests=warmup_requests,
        estimated_s=sum(estimated_s for estimated_s, _ in times),
        open_ended=any(plan.issuing_s is None for plan in plans),
        may_end_early=any(
            stage.memory is not None or (stage.stop is not None and len(stage.loads()) > 1) for stage in scenario.stages
        ),
        at_most_s=sum(at_most_s for _, at_most_s in times) + spare_s,
    )


def _times(scenario: Scenario, plans: Sequence[LevelPlan]) -> tuple[float, float]:
    """How long a model's levels of one stage take with the rests between them, and the most of it, in seconds.

    The stage's time ends the level that is running; its drain still comes.
    """
    stage = scenario.stages[plans[0].level.stage]
    rests_s = stage.rest_s * (len(plans) - 1)
    budget_s = math.inf if stage.budget_s is None else stage.budget_s
    estimated_s = rests_s + sum(plan.issuing_s for plan in plans if plan.issuing_s is not None)
    at_most_s = rests_s + sum(plan.at_most_s for plan in plans)
    drain_s = min(scenario.drain_s, scenario.deadlines.total_s)
    return min(budget_s, estimated_s), min(budget_s + drain_s, at_most_s)


def _expected(scenario: Scenario, level: Level) -> LevelPlan:
    total_s = scenario.deadlines.total_s
    drain_s = min(scenario.drain_s, total_s)
    load = level.load
    if isinstance(load, Open):
        requests, issuing_s = _expected_open(level, load)
        if level.at_most_s is not None and issuing_s > level.at_most_s:
            requests, issuing_s = requests * level.at_most_s / issuing_s, level.at_most_s
        return LevelPlan(level, requests, issuing_s, issuing_s + drain_s)
    if load.ask is not None:  # all is sent at once, and what is unanswered at the rung's end is given up
        bound_s = level.at_most_s or total_s
        return LevelPlan(level, level.requests, bound_s, bound_s)

    def longest_s(requests: int) -> float:
        """The longest that users take for so many requests: one deadline after another."""
        return math.ceil(requests / load.concurrency) * total_s

    by_count_s = math.inf if level.requests is None else longest_s(level.requests)
    by_clock_s = math.inf if level.duration_s is None else max(level.duration_s, longest_s(level.min_requests))
    # As fast as its target: only the clock can tell its time beforehand.
    count = level.requests if level.duration_s is None else None
    most_s = math.inf if level.at_most_s is None else level.at_most_s
    known_s = None if level.duration_s is None else min(level.duration_s, most_s)
    return LevelPlan(level, count, known_s, min(by_count_s, by_clock_s, most_s) + drain_s)


def _expected_open(level: Level, load: Open) -> tuple[float, float]:
    """How many requests the schedule is expected to hold, and by when the last of them is expected, in seconds."""
    if load.trace is not None:
        return load.trace.requests, load.trace.length_s
    by_count = math.inf if level.requests is None else level.requests
    by_clock = math.inf if level.duration_s is None else load.rate_per_s * level.duration_s
    if by_clock <= by_count and by_clock >= level.min_requests:  # a load that ends at 0 has its last request before
        return by_clock, level.duration_s or 0.0
    requests = min(by_count, max(by_clock, level.min_requests))
    return requests, float(when_s(load, np.array([requests]))[0])


LEAD_S = 30.0
"""Before a model's first level: it is found, loaded, tried out and warmed up."""

SETTLE_S = 10.0
"""After a level's drain: the canary is answered, the target's state is seen, the next connections are opened."""


@dataclass(frozen=True, slots=True)
class Slot:
    """When a level begins, and by when all its requests have ended, in seconds since the run's zero."""

    start_s: float
    end_s: float


def slots(scenario: Scenario, laid_out: Sequence[Level]) -> tuple[Slot, ...]:
    """When each level begins if nobody knows how the one before it went: a function of the scenario alone.

    The first begins `LEAD_S` after the zero. UsageError where it depends on more, or on one process.
    """
    refuse_shards(scenario)
    found: list[Slot] = []
    drain_s = min(scenario.drain_s, scenario.deadlines.total_s)
    for level, before in zip(laid_out, (None, *laid_out), strict=False):
        start_s = found[-1].end_s + SETTLE_S if found else 0.0
        if before is None or before.model != level.model:
            start_s += LEAD_S
        elif before.stage == level.stage:
            start_s += scenario.stages[level.stage].rest_s
        trace = level.load.trace if isinstance(level.load, Open) else None
        issuing_s = level.duration_s if level.duration_s is not None or trace is None else trace.length_s
        assert issuing_s is not None, "refused above"
        found.append(Slot(start_s, start_s + issuing_s + drain_s))
    return tuple(found)


def refuse_shards(scenario: Scenario) -> None:
    """UsageError for a scenario that machines which do not speak with each other cannot carry out together."""
    beside = "beside --shard"
    if scenario.embedded:
        raise UsageError(f"endpoint: expected one that all machines reach {beside}, got {scenario.endpoint}")
    if scenario.quality is not None:
        raise UsageError(f"quality: expected none {beside}, since one machine is to gather answers, got some")
    if scenario.repeat > 1:
        raise UsageError(f"repeat: expected 1 {beside}, got {scenario.repeat}")
    for number, stage in enumerate(scenario.stages):
        where = f"stages[{number}]"
        if stage.memory is not None:
            raise UsageError(f"{where}: expected a load that is known beforehand {beside}, got a memory ladder")
        if stage.stop is not None and stage.stop.on:
            raise UsageError(f"{where}.stop: expected false {beside}: no machine sees what the others saw")
        if stage.max_in_flight is not None:
            raise UsageError(f"{where}.max_in_flight: expected none {beside}: it is one valve, and one process's")
        if stage.min_requests:
            raise UsageError(f"{where}.min_requests: expected 0 {beside}: how long it takes is not known beforehand")
        if stage.length_s is None and stage.trace is None:
            raise UsageError(f"{where}: expected a duration {beside}: how long its requests take is not known")
