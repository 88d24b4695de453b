"""Levels against a server of known arithmetic, on the virtual clock, as run directories: what queueing theory knows."""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import orjson

from loadbench.analysis import rundir, search, summarise
from loadbench.analysis.findings import Probe, Search
from loadbench.analysis.summary import Level as Told
from loadbench.engine.load import Issuing, run_level
from loadbench.records import Closed, Level, Load, Open, Request, Sample
from loadbench.scenario.arrivals import schedule
from tests import rundirs
from tests.virtual import PROMPT, VirtualClock, World, run

TOKENS = 16
REJECTS_AFTER_S = 0.05
"""A rejection takes so long: users who are rejected at once would ask a million times."""

CHANCES: dict[str, Callable[[random.Random], float]] = {
    "constant": lambda chance: 1.0,
    "uniform": lambda chance: chance.uniform(0.8, 1.2),
    "exponential": lambda chance: chance.expovariate(1.0),
}


def alone(n: int) -> float:
    """Each gets on as if there were no others."""
    return 1.0


def shared(n: int) -> float:
    """One processor for all."""
    return 1 / n


@dataclass(frozen=True)
class Usl:
    """The Universal Scalability Law."""

    contention: float
    coherency: float

    def __call__(self, n: int) -> float:
        return 1 / (1 + self.contention * (n - 1) + self.coherency * n * (n - 1))

    @property
    def peak(self) -> float:
        """At how many its throughput peaks."""
        return math.sqrt((1 - self.contention) / self.coherency)


@dataclass(frozen=True)
class Machine:
    """A server that works on up to ``slots`` requests at a time and queues the others, up to ``queue``.

    An answer is ``service_s`` of work, on average and of a request alone, ``first_share`` of it before the first token;
    ``speed(n)`` is how fast each of n in service gets on. ``chance`` is how work varies: constant, uniform (by a fifth
    to either side), exponential, or lognormal with this coefficient of variation.
    """

    slots: int | None = None
    service_s: float = 0.5
    first_share: float = 0.2
    speed: Callable[[int], float] = alone
    queue: int | None = None
    chance: str | float = "constant"
    stream: bool = True

    def work_s(self, randomness: random.Random) -> float:
        """What one request takes alone."""
        if isinstance(self.chance, str):
            return self.service_s * CHANCES[self.chance](randomness)
        spread = math.sqrt(math.log1p(self.chance**2))
        return self.service_s * randomness.lognormvariate(-(spread**2) / 2, spread)


class _Service:
    """A machine at work. Work done for each in service is counted as one growing number, and who waits for which."""

    def __init__(self, machine: Machine, clock: VirtualClock, seed: int) -> None:
        self.machine, self.clock = machine, clock
        self.first_ns: dict[int, int] = {}
        self._random = random.Random(seed)
        self._active, self._done, self._since_s = 0, 0.0, 0.0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._goals: list[tuple[float, int, asyncio.Future[None]]] = []
        self._number = count()
        self._timer: asyncio.TimerHandle | None = None

    async def serve(self, request: Request) -> str:
        machine = self.machine
        if machine.slots is not None and self._active >= machine.slots:
            if machine.queue is not None and len(self._queue) >= machine.queue:
                await asyncio.sleep(REJECTS_AFTER_S)
                return "http_5xx"
            place = asyncio.get_running_loop().create_future()
            self._queue.append(place)
            await place  # whoever ends hands its slot on
        else:
            self._change(+1)
        work_s = machine.work_s(self._random)
        begun = self._done_by_now()
        await self._until(begun + work_s * machine.first_share)
        self.first_ns[request.seq] = self.clock.now_ns()
        await self._until(begun + work_s)
        if self._queue:
            self._queue.popleft().set_result(None)
        else:
            self._change(-1)
        return "ok"

    def _done_by_now(self) -> float:
        now_s = asyncio.get_running_loop().time()
        self._done += (now_s - self._since_s) * self.machine.speed(max(self._active, 1))
        self._since_s = now_s
        return self._done

    def _change(self, by: int) -> None:
        self._done_by_now()
        self._active += by
        self._wait()

    async def _until(self, goal: float) -> None:
        reached = asyncio.get_running_loop().create_future()
        heapq.heappush(self._goals, (goal, next(self._number), reached))
        self._wait()
        await reached

    def _wait(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None
        if self._goals:
            left = max(0.0, self._goals[0][0] - self._done_by_now())
            after_s = left / self.machine.speed(max(self._active, 1))
            self._timer = asyncio.get_running_loop().call_later(after_s, self._reach)

    def _reach(self) -> None:
        done = self._done_by_now()
        while self._goals and self._goals[0][0] <= done + 1e-9:
            heapq.heappop(self._goals)[2].set_result(None)
        self._wait()


def play(level: Level, machine: Machine, drain_s: float = 120.0) -> list[Sample]:
    """The samples of a level that begins at 0."""

    async def main() -> list[Sample]:
        clock = VirtualClock(asyncio.get_running_loop())
        service = _Service(machine, clock, level.seed)
        world, issuing = World(clock, service.serve), Issuing(level, clock)
        load = level.load
        due = schedule(load, None, None, level.seed) if isinstance(load, Open) else iter(())
        prompts = (PROMPT for _ in count())
        await run_level(issuing, world, prompts, due, drain_s=drain_s, on_issue_end=lambda reason: None)
        return [_told(sample, machine, service.first_ns) for sample in world.samples]

    return run(main)


def _told(sample: Sample, machine: Machine, first_ns: dict[int, int]) -> Sample:
    """With what a client sees of the answer."""
    if sample.outcome != "ok":
        return sample
    sample = sample._replace(output_tokens=TOKENS, token_source="usage")
    if not machine.stream:
        return sample._replace(first_event_ns=None, first_token_ns=None, chunks=0)
    first = first_ns[sample.seq]
    gap_ns = ((sample.last_token_ns or 0) - first) // (TOKENS - 1)
    return sample._replace(first_event_ns=first, first_token_ns=first, chunks=TOKENS, max_gap_ns=gap_ns, stall_ns=0)


def write(path: Path, played: Sequence[tuple[Level, list[Sample]]], slo: dict[str, Any] | None = None) -> Path:
    """The run directory of levels that were played one after the other."""
    path.mkdir(parents=True, exist_ok=True)
    now_ns, lines = 1_000_000_000, list[bytes]()
    events: list[dict[str, Any]] = []
    for index, (level, samples) in enumerate(played):
        stop_ns = max((sample.due_ns for sample in samples), default=0)
        end_ns = now_ns + max(round((level.duration_s or 0.0) * 1e9), stop_ns)
        moved = [_moved(sample, index, now_ns) for sample in samples]
        drained_ns = max([end_ns, *(sample.done_ns or 0 for sample in moved)])
        spent_ns = sum((sample.done_ns or 0) - (sample.sent_ns or 0) for sample in moved if sample.sent_ns is not None)
        lines += [rundirs.sample_line(sample) for sample in sorted(moved, key=lambda sample: sample.done_ns or 0)]
        planned = rundirs.Planned(level.load)
        events += rundirs.level_events(planned, index, now_ns, end_ns, drained_ns, spent_ns)
        now_ns = drained_ns + 500_000_000
    planned_levels = [rundirs.Planned(level.load, model=level.model) for level, _ in played]
    facts = rundirs.run_facts(planned_levels, "complete", now_ns)
    facts["levels"] = [level.as_json() | {"index": index} for index, (level, _) in enumerate(played)]
    facts["scenario"]["slo"] = slo
    (path / "samples.jsonl").write_bytes(b"".join(lines))
    (path / "telemetry.jsonl").write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in events))
    (path / "run.json").write_bytes(orjson.dumps(facts))
    return path


def write_levels(
    path: Path,
    machine: Machine,
    loads: Sequence[Load],
    *,
    duration_s: float = 15.0,
    seed: int = 1,
    slo: dict[str, Any] | None = None,
) -> Path:
    """The run directory of these loads on this machine, one after the other."""
    levels = [
        Level(index, 0, "synthetic-edge:1", load, duration_s, None, 0, 1000 * seed + index)
        for index, load in enumerate(loads)
    ]
    return write(path, [(level, play(level, machine)) for level in levels], slo)


def _moved(sample: Sample, level: int, by_ns: int) -> Sample:
    stamps = ("due_ns", "sent_ns", "headers_ns", "first_event_ns", "first_token_ns", "last_token_ns", "done_ns")
    values = {name: getattr(sample, name) for name in stamps}
    return sample._replace(level=level, **{name: value + by_ns for name, value in values.items() if value is not None})


def told(path: Path, level: Level, machine: Machine, slo: dict[str, Any]) -> Told:
    """A level as the report tells it."""
    (found,) = summarise.summarise(rundir.read(write(path, [(level, play(level, machine))], slo))).levels
    return replace(found, index=level.index, purpose=level.purpose)


def searched(
    path: Path,
    bounds: search.Bounds,
    machine: Machine,
    slo: dict[str, Any],
    *,
    seed: int,
    seconds: float,
    requests: int,
) -> Search:
    """A whole search. A probe takes ``seconds`` and at least so many ``requests``, a confirmation twice as many."""
    probes: list[Probe] = []
    while step := search.next_step(bounds, probes):
        times = 2 if step.purpose == "confirmation" else 1
        level = Level(
            index=len(probes),
            stage=0,
            model="m:1",
            load=Closed(round(step.load)) if bounds.unit == "users" else Open(step.load),
            duration_s=seconds,
            requests=None,
            min_requests=times * requests,
            seed=1000 * seed + len(probes),
            start_spacing_s=0.001,
            purpose=step.purpose,
        )
        probes.append(search.probe_of(told(path / str(len(probes)), level, machine, slo)))
    return search.conclude(bounds, "m:1", probes, True)
