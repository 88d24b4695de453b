"""What is measured next: the planned levels, less those that a stop rule leaves out, or one probe of a search after
the other.

Both ask the analysis that the report asks: between levels, in a thread, of what is on disk by then. It is imported
there and then, so that neither the start of a run nor a level pays for it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loadbench.aftermath import Found
from loadbench.analysis.stats import FLOORS, TELLS
from loadbench.analysis.words import listed
from loadbench.engine.crew import Crew
from loadbench.errors import UsageError
from loadbench.journal import Journal
from loadbench.keep_warm import KeepWarm
from loadbench.progress import Watch
from loadbench.records import Closed, Find, Level, Load, Open, load_title
from loadbench.report.frame import Bracket
from loadbench.report.words import count
from loadbench.scenario.load import Loaded
from loadbench.scenario.memory import MemoryLadder
from loadbench.scenario.schema import Slo
from loadbench.scenario.stage import DEFAULT_DURATION, Stage
from loadbench.scenario.units import DURATION
from loadbench.vigil import FLOOR, LIMIT, Vigil

if TYPE_CHECKING:
    from loadbench.analysis import summary
    from loadbench.analysis.findings import Probe, Search
    from loadbench.analysis.search import Step
    from loadbench.report.plan import SearchPlan
    from loadbench.scenario.shapes import StopRules

DEFAULT_BOUNDS = {"max-concurrency": (1.0, 256.0), "max-rate": (0.5, 256.0)}
"""Users and requests/s between which a search looks where the scenario names no two loads."""

RESOLUTION = 0.05  # of the load: as near as a search comes to its answer
FEWEST = 50  # requests of a probe, however lenient the SLO
OPEN_TIMES = 3  # more under a rate: waits for a server resemble their neighbours, and 400 of them say what 100 would
MARGIN = 1.1  # more requests than the percentile's floor: some fail, some are left out as a warm-up
MOST_FOR_SHARES = 1000  # requests, for an error rate of 0.3 %; of a smaller one the probe says that it hardly tells it
LONGEST_S, LONGEST_TIMES = 60.0, 3  # a probe may take, or so many times the stage's duration
LEAST_S = 1.0  # left of a stage's time: with less no level of it is begun any more
NOT_STARTED = "not_started"
STARVED = "a canary failed: out_of_memory"  # in the evidence of a target that is degraded for want of memory
PROBES = 1 << 20  # part of a probe's seed: no stage has this number


@dataclass(frozen=True, slots=True)
class Sought:
    """What a search looks for: ``find`` between the loads ``low`` and ``high``. A probe is ``like`` this level."""

    find: Find
    low: float
    high: float
    like: Level
    rest_s: float
    resolution: float = RESOLUTION

    @property
    def unit(self) -> str:
        return "users" if self.find == "max-concurrency" else "/s"

    def as_json(self) -> dict[str, Any]:
        return {"find": self.find, "low": self.low, "high": self.high, "resolution": self.resolution}

    @property
    def highest(self) -> Level:
        """The most that may be asked: what load processes are hired for."""
        return replace(self.like, load=self.at(self.high))

    def at(self, load: float) -> Load:
        """The load of a probe."""
        like = self.like.load
        return Closed(round(load)) if isinstance(like, Closed) else replace(like, rate_per_s=load)

    def plan(self) -> SearchPlan:
        """What ``check`` tells of it."""
        from loadbench.analysis.search import MOST_CONFIRMATIONS, MOST_PROBES
        from loadbench.report.plan import SearchPlan

        like, probe_s = self.like, self.like.at_most_s or LONGEST_S
        most_s = (MOST_PROBES + 2 * MOST_CONFIRMATIONS) * probe_s
        most_s += (MOST_PROBES + MOST_CONFIRMATIONS - 1) * self.rest_s
        levels = (MOST_PROBES, MOST_CONFIRMATIONS)
        return SearchPlan(self.find, self.at(self.low), self.at(self.high), like, self.resolution, levels, most_s)

    def level(self, index: int, model: str, step: Step, number: int) -> Level:
        """Probe ``number`` of a model. A confirmation is twice as much of everything, so that it is the firmer one."""
        times = 2 if step.purpose == "confirmation" else 1
        return replace(
            self.like,
            index=index,
            model=model,
            load=self.at(step.load),
            min_requests=times * self.like.min_requests,
            at_most_s=times * (self.like.at_most_s or LONGEST_S),
            seed=int(np.random.SeedSequence((self.like.seed, PROBES, number)).generate_state(1)[0]),
            purpose=step.purpose,
        )


def sought(find: Find, loaded: Loaded) -> Sought:
    """What the scenario and ``--find`` ask for together. UsageError without an SLO to search under."""
    scenario = loaded.scenario
    if scenario.slo is None:
        example = "slo: {ttft: {p95: 2s}}"
        raise UsageError(f"--find {find}: expected an slo in {loaded.path}, such as {example}, got none")
    if find == "max-rate" and scenario.balance == "per_user":
        raise UsageError(f"--find {find}: expected users beside balance: per_user, got requests that are nobody's")
    number, stage, loads = _stage_for(find, scenario.stages)
    values = [load.concurrency if isinstance(load, Closed) else load.rate_per_s for load in loads]
    low, high = (min(values), max(values)) if len(set(values)) > 1 else DEFAULT_BOUNDS[find]
    duration_s = stage.duration_s or DURATION.read(DEFAULT_DURATION)
    like = Level(
        index=0,
        stage=number,
        model="",
        load=loads[0],
        duration_s=duration_s,
        requests=None,
        min_requests=_requests_for(scenario.slo, scenario.request.max_tokens)
        * (OPEN_TIMES if find == "max-rate" else 1),
        seed=scenario.seed,
        start_spacing_s=stage.start_spacing_s or 0.0,
        max_in_flight=stage.max_in_flight,
        at_most_s=max(LONGEST_S, LONGEST_TIMES * duration_s),
        purpose="probe",
    )
    return Sought(find, float(low), float(high), like, stage.rest_s)


def _stage_for(find: Find, stages: Sequence[Stage]) -> tuple[int, Stage, list[Closed | Open]]:
    """The first stage of the loop that is searched whose loads stay where they are, else a default one."""
    kind = Closed if find == "max-concurrency" else Open
    for number, stage in enumerate(stages):
        loads = [] if stage.trace is not None or stage.memory is not None else list(stage.loads())
        if loads and all(isinstance(load, kind) and not load.legs for load in loads):
            return number, stage, loads
    usual = {"concurrency": 1} if find == "max-concurrency" else {"rate": "1/s"}
    stage = Stage.model_validate(usual)
    return 0, stage, list(stage.loads())


def _requests_for(slo: Slo, max_tokens: int) -> int:
    """So many requests that the strictest percentile that the SLO names is firm, and within reason its shares.

    An answer has many gaps.
    """
    limits = [
        math.ceil(FLOORS[percentile] / max(1, max_tokens - 1)) if metric == "gap" else FLOORS[percentile]
        for metric, percentile, _ in slo.limits()
    ]
    shares = [slo.error_rate or 0.0, 1 - slo.goodput if slo.goodput is not None else 0.0]
    told = max((math.ceil(round(TELLS / share, 6)) for share in shares if share > 0), default=0)
    firm = math.ceil(round(MARGIN * max(FEWEST, *limits), 6)) if limits else FLOORS["p95"]
    return max(firm, min(told, MOST_FOR_SHARES))


def ask_whether_memory_shows(stages: Sequence[Stage], vigil: Vigil) -> None:
    """UsageError for a ladder to so much memory where nobody can say how much is held."""
    for number, stage in enumerate(stages):
        if stage.memory is not None and (why := vigil.cannot_tell(stage.memory)):
            where, got = f"stages[{number}].memory.until", stage.memory.until
            raise UsageError(f"{where}: expected failure, or a target whose memory can be read ({why}), got {got}")


class Course:
    """The levels of one model after the other; each is decided when the one before it is through.

    ``found`` is to be how the target was found after that one.
    """

    def __init__(self, journal: Journal, watch: Watch, crew: Crew, vigil: Vigil, warm: KeepWarm) -> None:
        self.found: Found | None = None
        self._journal = journal
        self._watch = watch
        self._crew = crew
        self._vigil = vigil
        self._warm = warm

    async def planned(self, levels: Sequence[Level], stages: Sequence[Stage]) -> AsyncGenerator[Level]:
        """The levels, stage by stage, until the stage's stop rules say that it is enough."""
        for number, group in groupby(levels, key=lambda level: level.stage):
            stage, mine = stages[number], list(group)
            begun_ns = self._crew.clock.now_ns()
            for place, level in enumerate(mine, start=1):
                left_s = math.inf if stage.budget_s is None else stage.budget_s - self._since_s(begun_ns)
                if place > 1 and left_s < LEAST_S:
                    told = f"the stage has had its {stage.budget_s:g} s: {self._since_s(begun_ns):.0f} s"
                    self._leave_out(mine[place - 2], mine[place - 1 :], "time", told)
                    break
                if stage.memory is not None and (low := await self._vigil.low(stage.memory)):
                    self._leave_out(mine[place - 2] if place > 1 else None, mine[place - 1 :], FLOOR, low)
                    break
                yield level if left_s == math.inf else replace(level, at_most_s=left_s)
                done, left = mine[:place], mine[place:]
                over = None if stage.memory is None else self._rung_ends(stage.memory)
                if stage.memory is not None and over is not None:
                    self._leave_out(level, left, *over)
                    break
                if left and stage.stop is not None:
                    over = await self._ask(_stop_after, stage.stop, done, self._since_s(begun_ns))
                if left and over is not None:
                    self._leave_out(level, left, *over)
                    break
                if left:
                    await self._rest(stage.rest_s, level)

    def _since_s(self, moment_ns: int) -> float:
        return (self._crew.clock.now_ns() - moment_ns) / 1e9

    def give_up(self, after: Level, levels: Sequence[Level], because: str) -> None:
        """Leave out what is left of the model: its target died and will not do."""
        left = (level for level in levels if level.index > after.index)
        for _, group in groupby(left, key=lambda level: level.stage):
            self._leave_out(after, list(group), "target_died", because)

    def _rung_ends(self, ladder: MemoryLadder) -> tuple[str, str] | None:
        """The rule by which this rung of a memory ladder was the last, and why."""
        found = self.found
        if found is None:  # it was not run
            return None
        if failed := found.failed.get("out_of_memory"):
            told = f"{count(failed, 'request')} failed for want of memory, and the target is {found.state}"
            return "memory_failure", told
        if found.state != "healthy":
            told = f"the target is {found.state}: {'; '.join(found.evidence)}"
            if found.state != "degraded" or any(STARVED in line for line in found.evidence):
                return "memory_failure", told
            return self._vigil.cut or ("target_degraded", told)
        if self._vigil.cut is not None:
            return self._vigil.cut
        reached = self._vigil.reached(ladder)
        return None if reached is None else (LIMIT, reached)

    async def search(self, search: Sought, model: str) -> AsyncGenerator[Level]:
        """Probes until the search is over; each is planned, and written down as planned, when it is its turn."""
        levels: list[Any] = self._journal.facts["levels"]
        probes: list[Probe] = []
        level: Level | None = None
        while True:
            step, so_far = await self._ask(_next_step, search, model, tuple(probes))
            self._watch.close_in(None if step is None else _bracket(search, so_far, step))
            if step is None:
                answer = "" if so_far.answer is None else f"{load_title(search.at(so_far.answer))}, "
                self._watch.note(f"the search is over: {answer}{so_far.because}")
                return
            if level is not None:
                await self._rest(search.rest_s, level)
            level = search.level(len(levels), model, step, len(probes))
            levels.append(level.as_json())
            self._journal.write("running")
            self._watch.add(level)
            yield level
            probe = await self._ask(_probe_of, level)
            probes.append(probe)
            self._watch.judge(level, probe.result)

    async def _ask(self, question: Any, *about: Any) -> Any:
        """What the analysis says to that, from a thread."""
        self._watch.say("deciding what comes next")
        answer = await asyncio.to_thread(question, self._journal.folder, *about)
        self._watch.say(None)
        return answer

    async def _rest(self, seconds: float, after: Level) -> None:
        if seconds > 0:
            self._watch.say(f"resting for {seconds:g} s")
            await self._warm.rest(seconds, after.index)
            self._watch.say(None)

    def cannot_begin(self, rung: Level, because: str) -> None:
        """Leave out a rung for which there was no fresh process."""
        self.found = None
        self._leave_out(None, [rung], NOT_STARTED, because)

    def _leave_out(self, after: Level | None, left: Sequence[Level], rule: str, because: str) -> None:
        """A rule ends a stage, after no level of it at all: write down which levels are not run, and say it."""
        skipped = [level.index for level in left]
        of = after or left[0]
        self._journal.facts["not_run"].append(
            {
                "model": of.model,
                "stage": of.stage,
                "after_level": None if after is None else after.index,
                "rule": rule,
                "because": because,
                "levels": skipped,
            }
        )
        self._journal.write("running")
        self._watch.leave_out(skipped)
        were = "was" if len(left) == 1 else "were"
        titles = f"; {_titles([level.load for level in left])} {were} not run" if left else ""
        if rule == NOT_STARTED:
            self._watch.note(f"{_titles([level.load for level in left])} was not run: {because}")
            return
        where = "before its first rung" if after is None else f"after {load_title(after.load)}"
        self._watch.note(f"stopped the ladder {where}: {because}{titles}")


def _titles(loads: Sequence[Load]) -> str:
    """``16, 32 and 64 users``, ``8/s and 16/s``, ``3 rungs``."""
    if any(isinstance(load, Closed) and load.ask is not None for load in loads):
        return count(len(loads), "rung")
    if all(isinstance(load, Closed) and not load.legs for load in loads):
        *first, last = (load.concurrency for load in loads if isinstance(load, Closed))
        told = [*(f"{users:,}" for users in first), count(last, "user")]
    else:
        told = [load_title(load).removesuffix(" poisson") for load in loads]
    return listed(told)


def _bracket(search: Sought, so_far: Search, step: Step) -> Bracket:
    """Where the search is, for the view; how many probes are left can be told once both ends are known."""
    passed, failed, left = so_far.passed, so_far.failed, None
    if step.purpose == "confirmation":
        left = 1
    elif passed is not None and failed is not None:
        closest = max(search.resolution * passed, 1.0 if search.unit == "users" else 0.0)
        left = 1 + max(1, math.ceil(math.log2(max(1.0, (failed - passed) / closest))))
    return Bracket(search.unit, passed, failed, step.load, step.purpose, left)


# What the analysis is asked, in a thread.


def _so_far(folder: Path, levels: Sequence[Level]) -> list[summary.Level]:
    from loadbench.analysis.summarise import so_far

    return list(so_far(folder, {level.index for level in levels}))


def _stop_after(folder: Path, rules: StopRules, done: Sequence[Level], elapsed_s: float) -> tuple[str, str] | None:
    from loadbench.analysis.ladder import stop_after

    return stop_after(rules, _so_far(folder, done), elapsed_s)


def _probe_of(folder: Path, level: Level) -> Probe:
    from loadbench.analysis.search import probe_of

    (found,) = _so_far(folder, [level])
    return probe_of(found)


def _next_step(_: Path, search: Sought, model: str, probes: Sequence[Probe]) -> tuple[Step | None, Search]:
    from loadbench.analysis.search import Bounds, conclude, next_step

    bounds = Bounds(search.find, search.low, search.high, search.resolution)
    step = next_step(bounds, probes)
    return step, conclude(bounds, model, probes, complete=step is None)
