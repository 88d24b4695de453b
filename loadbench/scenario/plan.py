"""The levels that a scenario comes to, and what can be said of them before anything is sent. Data only, no words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import numpy as np

from loadbench.records import Level, Open, Trace
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
                    requests=_requests(stage, traces.get(number)),
                    min_requests=stage.min_requests,
                    seed=_seed(scenario.seed, number, place),
                    start_spacing_s=stage.start_spacing_s or 0.0,
                    max_in_flight=stage.max_in_flight,
                    interval_s=stage.telling_s,
                )
                laid_out.append(level)
    return tuple(laid_out)


def _requests(stage: Stage, trace: Trace | None) -> int | None:
    """A trace that nothing cuts short ends a level by its number of requests."""
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
    reached when every request, the warm-up's and the canaries' too, runs into its deadline.
    """

    levels: tuple[LevelPlan, ...]
    models: tuple[str, ...]
    warmup_requests: int
    estimated_s: float
    open_ended: bool
    may_end_early: bool
    at_most_s: float


def describe(scenario: Scenario, laid_out: Sequence[Level]) -> Plan:
    """What can be said of these levels before the target has answered anything."""
    models = tuple(dict.fromkeys(level.model for level in laid_out))
    plans = tuple(_expected(scenario, level) for level in laid_out)
    warmup_requests = scenario.warmup.requests * len(models)
    canaries = len(models) + (len(plans) if scenario.canary else 0)  # a model is tried out in any case
    rests_s = sum(
        scenario.stages[one.stage].rest_s
        for one, after in pairwise(laid_out)
        if (one.stage, one.model) == (after.stage, after.model)
    )
    spare_s = (warmup_requests + canaries) * scenario.deadlines.total_s
    return Plan(
        levels=plans,
        models=models,
        warmup_requests=warmup_requests,
        estimated_s=rests_s + sum(plan.issuing_s for plan in plans if plan.issuing_s is not None),
        open_ended=any(plan.issuing_s is None for plan in plans),
        may_end_early=any(len(stage.loads()) > 1 for stage in scenario.stages if stage.stop is not None),
        at_most_s=rests_s + sum(plan.at_most_s for plan in plans) + spare_s,
    )


def _expected(scenario: Scenario, level: Level) -> LevelPlan:
    total_s = scenario.deadlines.total_s
    drain_s = min(scenario.drain_s, total_s)
    load = level.load
    if isinstance(load, Open):
        requests, issuing_s = _expected_open(level, load)
        return LevelPlan(level, requests, issuing_s, issuing_s + drain_s)

    def longest_s(requests: int) -> float:
        """The longest that users take for so many requests: one deadline after another."""
        return math.ceil(requests / load.concurrency) * total_s

    by_count_s = math.inf if level.requests is None else longest_s(level.requests)
    by_clock_s = math.inf if level.duration_s is None else max(level.duration_s, longest_s(level.min_requests))
    # As fast as its target: only the clock can tell its time beforehand.
    count = level.requests if level.duration_s is None else None
    return LevelPlan(level, count, level.duration_s, min(by_count_s, by_clock_s) + drain_s)


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
