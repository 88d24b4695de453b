"""Several load processes that look like one shard: each sends its part of every level, all start at one moment.

The canary, the warm-up and the run's telemetry stay with this process, which sends no load of its own. A worker that
dies makes the run invalid; what it had measured is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from loadbench.engine.exchange import Wire
from loadbench.engine.load import Clock
from loadbench.engine.shard import Counters, Shard
from loadbench.platform import apart, describe_exit
from loadbench.records import Closed, Level, Sample
from loadbench.scenario.prompts import PromptMix

HEAD_START_NS = 200_000_000
"""Between the order to measure and the moment at which all start: orders arrive within a few ms."""

START_TIMEOUT_S = 60.0
SILENCE_S = 10.0  # a worker that measures speaks four times a second
END_TIMEOUT_S = 5.0


class Crew(Shard):
    """A `Shard` that can hire others to send its load; until it does, it sends by itself."""

    def __init__(self, folder: Path, clock: Clock, started_wall_ns: int) -> None:
        super().__init__(folder, clock, started_wall_ns)
        self._folder = folder
        self._started_wall_ns = started_wall_ns
        self._workers: list[_Worker] = []
        self._wire: dict[str, Any] = {}
        self._stopped = asyncio.Event()

    @property
    def size(self) -> int:
        """How many processes send."""
        return len(self._workers) or 1

    async def hire(self, workers: int, scenario: Mapping[str, Any], prompts: Path) -> None:
        """Start so many processes, once. ``scenario`` is the resolved one as JSON, ``prompts`` its folder."""
        for index in range(workers):
            folder = self._folder / "shards" / str(index)
            folder.mkdir(parents=True)
            order = {
                "index": index,
                "count": workers,
                "folder": str(folder),
                "origin_ns": self.clock.origin_ns,
                "started_wall_ns": self._started_wall_ns,
                "scenario": scenario,
                "prompts": str(prompts),
            }
            self._workers.append(await _Worker.start(order, self._on_death))
        await self._all_say("ready", START_TIMEOUT_S)

    async def __aexit__(self, *error: Any) -> None:
        """Send the workers home, then close our own files."""
        await asyncio.gather(*(worker.end() for worker in self._workers))
        await super().__aexit__(*error)

    def talk_to(self, wire: Wire) -> None:
        super().talk_to(wire)
        self._wire = asdict(wire)

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

    async def measure(
        self, level: Level, mix: PromptMix, drain_s: float, start_ns: int | None = None
    ) -> dict[str, Any]:
        if not self._workers:
            return await super().measure(level, mix, drain_s, start_ns)
        told = {"level": level.as_json()}
        self._tell_all(do="talk_to", wire=self._wire, e2e_s=self.e2e_s, chars_per_token=mix.chars_per_token)
        self._tell_all(do="prepare", **told)
        await self._all_say("ready", START_TIMEOUT_S)
        self.level = level
        self.pulse.begin()
        start_ns = self.clock.now_ns() + HEAD_START_NS
        self.start_ns, self.phase = start_ns, "load"
        for worker in self._workers:
            worker.counters = Counters()
        self.recorder.event(start_ns, "level_start", level=level.index)
        self._tell_all(do="measure", drain_s=drain_s, start_ns=start_ns, **told)
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
        return self._client_facts([answer["client"] for answer in said])

    def _client_facts(self, workers: list[dict[str, Any]]) -> dict[str, Any]:
        """The crew's state over a level: costs are added up, of what harms a stamp the sickest worker's counts."""
        worst = {"cpu_share", "loop_lag_p99_ns", "loop_lag_max_ns", "gc_pause_max_ns"}
        facts = self.pulse.facts()
        for name in facts.keys() & (worst | {"cpu_s", "gc_pauses", "rss_bytes"}):
            values = [one[name] for one in (*workers, facts) if one[name] is not None]
            facts[name] = (max(values) if name in worst else sum(values)) if values else None
        for name in ("new_connections", "connections_opened_before", "in_flight_ns"):
            facts[name] = sum(one[name] for one in workers)
        return facts | {"workers": workers}

    def _tell_all(self, **order: Any) -> None:
        for worker in self._workers:
            worker.tell(**order)

    async def _all_say(self, answer: str, silence_s: float) -> list[dict[str, Any]]:
        """One such answer of every worker that lives to give it; one that is silent for so long does not live."""
        said = await asyncio.gather(*(worker.says(answer, silence_s) for worker in self._workers))
        return [one for one in said if one is not None]

    def _on_death(self, index: int, how: str) -> None:
        self.failure = self.failure or f"worker {index} {how}"
        self.stop("worker_died")


class _Worker:
    """One process of the crew, as seen from here. ``counters`` is what it last said of the level."""

    def __init__(self, process: asyncio.subprocess.Process, index: int, on_death: Callable[[int, str], None]) -> None:
        self.counters = Counters()
        self._process = process
        self._index = index
        self._on_death = on_death
        self._ending = False
        self._end: str | None = None
        self._heard_s = 0.0
        self._answers: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, order: Mapping[str, Any], on_death: Callable[[int, str], None]) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "loadbench.engine.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 22,
            **apart(),
        )
        worker = cls(process, order["index"], on_death)
        worker._write(order)
        return worker

    def tell(self, **order: Any) -> None:
        self._write(order)

    def _write(self, order: Mapping[str, Any]) -> None:
        """Headers with a key go this way too: a pipe, and never an argument or the environment."""
        assert self._process.stdin is not None
        if self._process.returncode is None and not self._process.stdin.is_closing():
            self._process.stdin.write(orjson.dumps(order) + b"\n")

    async def says(self, answer: str, silence_s: float) -> dict[str, Any] | None:
        """Its next answer of that name; None where it died instead, or was killed for saying nothing for so long."""
        loop = asyncio.get_running_loop()
        self._heard_s = loop.time()
        while True:
            try:
                async with asyncio.timeout_at(self._heard_s + silence_s):
                    said = await self._answers.get()
            except TimeoutError:
                if loop.time() >= self._heard_s + silence_s:
                    self._end = f"said nothing for {silence_s:g} s and was killed"
                    with contextlib.suppress(ProcessLookupError):  # it is gone already: that is the error to be told
                        self._process.kill()
                    silence_s = END_TIMEOUT_S + silence_s
                continue
            if said is None:
                self._answers.put_nowait(None)  # it stays dead
                return None
            if said["answer"] == answer:
                return said

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            said = orjson.loads(line)
            self._heard_s = asyncio.get_running_loop().time()
            if said["answer"] == "failed":
                self._end = f"failed: {said['text']}"
            if "counters" in said:
                self.counters = Counters.from_json(said["counters"])
            if said["answer"] != "counters":
                self._answers.put_nowait(said)
        code = await self._process.wait()
        if not self._ending:
            self._on_death(self._index, self._end or f"died: {describe_exit(code)}")
        self._answers.put_nowait(None)  # after the reason is known: whoever waits for an answer then asks for it

    async def end(self) -> None:
        """Let it close its files and go; by force if it does not."""
        self._ending = True
        self.tell(do="end")
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reader


def workers_wanted(levels: Sequence[Level], last: Sample, max_tokens: int, events_per_s: float | None) -> int:
    """How many processes keep each below half of its ceiling of content chunks, at most one less than there are cores.

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
    return max(1, min(math.ceil(wanted / (events_per_s / 2)), (os.cpu_count() or 2) - 1))
