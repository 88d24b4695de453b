"""One process's share of a run: its connections, its recorder, its pulse, and the once-a-second line of telemetry.

The runner says what comes next; a shard sends it and writes down what happened. It is the `Sender` of the load loops.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from loadbench.engine.client import Client
from loadbench.engine.exchange import Wire
from loadbench.engine.load import Clock, Issuing, run_level
from loadbench.engine.pulse import Pulse
from loadbench.engine.recorder import Recorder
from loadbench.records import Closed, Level, Prompt, Request, Sample

TICK_NS = 1_000_000_000


class Shard:
    """Sends and records. ``read_target_rss`` gives the target's resident bytes, None where they cannot be known."""

    def __init__(
        self, folder: Path, clock: Clock, started_wall_ns: int, read_target_rss: Callable[[], int | None]
    ) -> None:
        self.clock = clock
        self.recorder = Recorder(folder, started_wall_ns, self._on_disk_failure)
        self.pulse = Pulse()
        self.phase = "idle"
        self.level: Level | None = None
        self.issuing: Issuing | None = None
        self.in_flight = 0
        self.target_rss: int | None = None
        self.target_rss_peak: int | None = None
        self.client: Client | None = None
        self.stop_reason: str | None = None
        self._read_target_rss = read_target_rss
        self._e2e_s: float | None = None
        self._ticker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Shard:
        self.pulse.start()
        self._ticker = asyncio.create_task(self._tick_every_second())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        self.pulse.stop()
        if self.client is not None:
            self.client.close()
        self.recorder.close()

    def talk_to(self, wire: Wire) -> None:
        """From now on requests go there."""
        if self.client is not None:
            self.client.close()
        self.client = Client(wire, self.clock.origin_ns, self.recorder.gaps)

    def stop(self, reason: str) -> None:
        """Start nothing any more, in this level or a later one."""
        self.stop_reason = self.stop_reason or reason
        if self.issuing is not None:
            self.issuing.stop(reason)

    # the Sender of the load loops

    async def send(self, request: Request) -> Sample:
        assert self.client is not None
        self.in_flight += 1
        self.recorder.attempted += 1
        try:
            sample = await self.client.send(request, level=self.level.index if self.level else -1, phase="load")
        finally:
            self.in_flight -= 1
        self.recorder.add(sample)
        return sample

    def drop(self, request: Request) -> None:
        assert self.client is not None and self.level is not None
        self.recorder.attempted += 1
        self.recorder.add(self.client.unsent(request, self.level.index, "dropped"))

    def abort(self) -> None:
        if self.client is not None:
            self.client.abort("censored", "unfinished when the drain ended")

    async def one(self, prompt: Prompt, phase: str, level: int) -> Sample:
        """One request outside the load: a canary or a warm-up."""
        assert self.client is not None
        self.phase = phase
        sample = await self.client.send(Request(prompt.index, prompt, self.clock.now_ns()), level=level, phase=phase)
        self.recorder.add(sample)
        if sample.outcome == "ok" and sample.sent_ns is not None and sample.last_token_ns is not None:
            self._e2e_s = (sample.last_token_ns - sample.sent_ns) / 1e9
        self.phase = "idle"
        return sample

    async def measure(
        self, level: Level, prompts: Iterator[Prompt], schedule_ns: Iterator[int], drain_s: float
    ) -> dict[str, Any]:
        """Run one level; returns the client's facts about it (``level_end.client``)."""
        client = self.client
        assert client is not None
        await client.open(self._connections_for(level))
        opened_before = client.connections_opened
        self.level, self.target_rss_peak = level, self.target_rss
        self.pulse.begin()
        self.issuing = issuing = Issuing(level, self.clock)
        self.recorder.begin_level(level.index, issuing.start_ns)
        self.recorder.event(issuing.start_ns, "level_start", level=level.index)
        self.phase = "load"
        try:
            await run_level(issuing, self, prompts, schedule_ns, drain_s=drain_s, on_issue_end=self._on_issue_end)
        finally:
            self.phase = "idle"
            await self.recorder.close_interval(self.clock.now_ns())
            self.issuing = None
        facts = self.pulse.facts()
        facts |= {
            "new_connections": client.connections_opened - opened_before,
            "connections_opened_before": opened_before,
        }
        return facts

    def _connections_for(self, level: Level) -> int:
        """How many streams the level will want at once; in open loop by Little's law, twice over."""
        if isinstance(level.load, Closed):
            return level.load.concurrency
        expected = math.ceil(2 * level.load.rate_per_s * (self._e2e_s or 1.0)) + 4
        return min(expected, 1024, level.max_in_flight or expected, level.requests or expected)

    def _on_issue_end(self, reason: str) -> None:
        assert self.level is not None
        self.phase = "drain"
        self.recorder.event(self.clock.now_ns(), "issue_end", level=self.level.index, reason=reason)

    def _on_disk_failure(self, error: OSError) -> None:
        self.stop("disk_failure")

    async def _tick_every_second(self) -> None:
        due_ns = self.clock.now_ns()
        while True:
            self._tick()
            await self.recorder.close_interval(self.clock.now_ns())
            due_ns = max(due_ns + TICK_NS, self.clock.now_ns())
            await asyncio.sleep((due_ns - self.clock.now_ns()) / 1e9)

    def read_target_rss(self) -> int | None:
        """Ask now; keeps the level's peak."""
        self.target_rss = self._read_target_rss()
        if self.target_rss is not None:
            self.target_rss_peak = max(self.target_rss, self.target_rss_peak or 0)
        return self.target_rss

    def _tick(self) -> None:
        recorder = self.recorder
        in_level = self.phase in ("load", "drain") and self.level is not None
        recorder.event(
            self.clock.now_ns(),
            "tick",
            level=self.level.index if in_level and self.level else None,
            phase=self.phase,
            in_flight=self.in_flight,
            attempted=recorder.attempted,
            ended=recorder.ended,
            ok=recorder.outcomes["ok"],
            chunks=recorder.chunks,
            target_rss_bytes=self.read_target_rss(),
            client_rss_bytes=self.pulse.rss_bytes(),
            client_cpu_s=round(self.pulse.cpu_s(), 3),
            loop_lag_max_ns=self.pulse.take_lag_max(),
        )
