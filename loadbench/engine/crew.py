"""Several load processes that look like one shard: each sends its part of every level, all start at one moment.

The canary, the warm-up and the run's telemetry stay with this process, which sends no load of its own. A worker that
dies makes the run invalid; what it had measured is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadbench.engine.exchange import Wire
from loadbench.engine.load import Clock
from loadbench.engine.pulse import together
from loadbench.engine.seat import Line, Pipe, Seat
from loadbench.engine.shard import Counters, Shard
from loadbench.records import Closed, Level, Sample
from loadbench.scenario.prompts import PromptMix

HEAD_START_NS = 200_000_000
"""Between the order to measure and the moment at which all start: orders arrive within a few ms."""

HEAD_START_TRIPS = 4
"""The same in round trips to the worker that is slowest to answer, where that is more."""

START_TIMEOUT_S = 60.0
SILENCE_S = 10.0  # a worker that measures speaks four times a second

Start = Callable[[Mapping[str, Any]], Awaitable[Line]]
"""Starts a load process that carries out an order."""


class Crew(Shard):
    """A `Shard` that can hire others to send its load; until it does, it sends by itself."""

    def __init__(self, folder: Path, clock: Clock, started_wall_ns: int, index: int = 0, count: int = 1) -> None:
        super().__init__(folder, clock, started_wall_ns, index, count)
        self._folder = folder
        self._started_wall_ns = started_wall_ns
        self._workers: list[Seat] = []
        self._wires: dict[str, Any] = {}
        self._told_wires: dict[str, Any] | None = None
        self._warm: set[str] = set()
        self._stopped = asyncio.Event()

    @property
    def size(self) -> int:
        """How many processes send."""
        return len(self._workers) or 1

    @property
    def hired(self) -> bool:
        """Whether others send."""
        return bool(self._workers)

    async def hire(self, workers: int, scenario: Mapping[str, Any], prompts: Path, start: Start = Pipe.start) -> None:
        """Start so many processes, once. ``scenario`` is the resolved one as JSON, ``prompts`` its folder.

        ``start`` says where: here, or somewhere on a cluster.
        """
        orders, (mine, count) = [], self._place
        for index in range(workers):
            folder = self._folder / "shards" / str(index)
            folder.mkdir(parents=True)
            orders.append(
                {
                    "index": mine + count * index,  # together they are this shard of ``count``
                    "count": count * workers,
                    "folder": str(folder),
                    "origin_ns": self.clock.origin_ns,
                    "started_wall_ns": self._started_wall_ns,
                    "scenario": scenario,
                    "prompts": str(prompts),
                    "traces": {},
                    "endpoints": [(wire["host"], wire["port"]) for wire in self._wires.get("wires", ())],
                }
            )
        lines = await asyncio.gather(*map(start, orders))
        self._workers = [Seat(line, index, self._on_death) for index, line in enumerate(lines)]
        await self._all_say("ready", START_TIMEOUT_S)

    async def __aexit__(self, *error: Any) -> None:
        """Send the workers home, then close our own files."""
        await asyncio.gather(*(worker.end() for worker in self._workers))
        await super().__aexit__(*error)

    def talk_to(self, *wires: Wire, per_user: bool = False) -> None:
        super().talk_to(*wires, per_user=per_user)
        self._wires = {"wires": [asdict(wire) for wire in wires], "per_user": per_user}
        self._told_wires = None

    def stop(self, reason: str) -> None:
        super().stop(reason)
        self._stopped.set()
        for worker in self._workers:
            worker.tell(do="stop", reason=reason)

    def cut(self, reason: str) -> None:
        super().cut(reason)
        self._tell_all(do="cut", reason=reason)

    async def stopped(self) -> None:
        """Return when the run is to end."""
        await self._stopped.wait()

    async def rest(self, seconds: float) -> None:
        """Send nothing for so long; a stop ends it at once."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()

    def counters(self) -> Counters:
        """The sum of what the workers last said, at most a quarter of a second ago."""
        if not self._workers:
            return super().counters()
        total = Counters()
        for worker in self._workers:
            total.add(worker.counters)
        return total

    def sickest(self) -> tuple[str, int] | None:
        if len(self._workers) < 2:
            return None
        worst = max(self._workers, key=lambda worker: worker.lag_ns)
        return worst.name, worst.lag_ns

    async def measure(
        self, level: Level, mix: PromptMix, drain_s: float, start_ns: int | None = None
    ) -> dict[str, Any]:
        if not self._workers:
            return await super().measure(level, mix, drain_s, start_ns)
        await self.get_ready(level, mix)
        self.level = level
        self.pulse.begin()
        slowest_ns = max(worker.round_trip_ns for worker in self._workers)
        if start_ns is None:
            start_ns = self.clock.now_ns() + max(HEAD_START_NS, HEAD_START_TRIPS * slowest_ns)
        self.start_ns, self.phase = start_ns, "load"
        for worker in self._workers:
            worker.counters = Counters()
        self.recorder.event(start_ns, "level_start", level=level.index)
        self._tell_all(do="measure", drain_s=drain_s, start_ns=start_ns, level=level.as_json())
        said = await self._all_say("measured", SILENCE_S)
        reasons = [answer["reason"] for answer in said]
        self.reason = next((reason for reason in reasons if reason not in ("duration", "requests")), None) or (
            reasons[0] if reasons else "worker_died"
        )
        if failure := next((answer["failure"] for answer in said if answer["failure"]), None):
            self.failure = failure
            self.stop("disk_failure")
        issued_ns = max((answer["issue_end_ns"] for answer in said), default=self.clock.now_ns())
        self.issued_s = (issued_ns - start_ns) / 1e9
        self.recorder.event(issued_ns, "issue_end", level=level.index, reason=self.reason)
        self.start_ns, self.phase = None, "idle"
        facts = together(self.pulse.facts(), [answer["client"] for answer in said])
        facts["workers"] += [worker.place for worker in self._workers if worker.lost]  # who tell nothing more
        return facts

    async def get_ready(self, level: Level, mix: PromptMix) -> None:
        """Have every worker connected and, once a model, warmed up: none has its first request in a level."""
        if self._told_wires != self._wires:  # else their connections are kept
            self._tell_all(do="talk_to", **self._wires, chars_per_token=mix.chars_per_token)
            self._told_wires = self._wires
        warm_up = level.model not in self._warm
        self._warm.add(level.model)
        self._tell_all(do="prepare", level=level.as_json(), e2e_s=self.e2e_s, warm_up=warm_up)
        await self._all_say("ready", START_TIMEOUT_S)

    def _tell_all(self, **order: Any) -> None:
        for worker in self._workers:
            worker.tell(**order)

    async def _all_say(self, answer: str, silence_s: float) -> list[dict[str, Any]]:
        """One such answer of every worker that lives to give it; one that is silent for so long does not live."""
        said = await asyncio.gather(*(worker.says(answer, silence_s) for worker in self._workers))
        return [one for one in said if one is not None]

    def _on_death(self, worker: Seat, how: str) -> None:
        when = ""
        if self.start_ns is not None and self.level is not None:
            when = f", {(self.clock.now_ns() - self.start_ns) / 1e9:.1f} s into level {self.level.index}"
        self.failure = self.failure or f"{worker.name} {how}{when}"
        self.stop("worker_died")


def workers_wanted(
    levels: Sequence[Level], last: Sample, max_tokens: int, events_per_s: float | None, most: int | None = None
) -> int:
    """How many processes keep each below half of its ceiling of content chunks; at most ``most``, or if that is None
    one less than there are cores here.

    In closed loop every user streams as fast as the ``last`` warm-up request did; in open loop every answer has
    ``max_tokens``. One, where there is no calibration to say that more are needed.
    """
    if events_per_s is None:
        return 1
    streaming_ns = (last.last_token_ns or 0) - (last.first_token_ns or 0)
    per_user_s = last.chunks / streaming_ns * 1e9 if streaming_ns > 0 else 0.0
    wanted = max(
        level.load.concurrency * per_user_s if isinstance(level.load, Closed) else level.load.most_per_s * max_tokens
        for level in levels
    )
    return max(1, min(math.ceil(wanted / (events_per_s / 2)), most or (os.cpu_count() or 2) - 1))
