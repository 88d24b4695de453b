"""One process's share of a run: its connections, its recorder, its pulse, and the once-a-second line of telemetry.

The runner says what comes next; a shard sends it and writes down what happened. It is the `Sender` of the load loops.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loadbench.engine.client import Client
from loadbench.engine.exchange import Wire
from loadbench.engine.load import Clock, Issuing, run_level
from loadbench.engine.pulse import Pulse
from loadbench.engine.recorder import Recorder
from loadbench.hdr import Hdr
from loadbench.records import Asked, Closed, Level, Open, Prompt, Request, Sample
from loadbench.scenario.arrivals import schedule
from loadbench.scenario.prompts import PromptMix

TICK_NS = 1_000_000_000


@dataclass
class Counters:
    """A level so far: what the live view and the telemetry show. ``good``: ended within the recorder's limits.

    ``ok_in_time`` and ``chunks_in_time`` are without what came in the drain. ``starved`` failed with a text that
    speaks of memory under a limit; ``last_token_ns`` is when the last token came, in this level or before, 0: never.
    ``streaming`` are in flight and have had a token. ``endpoints`` counts the outcomes at each of a fleet.
    """

    in_flight: int = 0
    issued: int = 0
    attempted: int = 0
    chunks: int = 0
    good: int = 0
    ok_in_time: int = 0
    chunks_in_time: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    ttft: Hdr = field(default_factory=Hdr)
    e2e: Hdr = field(default_factory=Hdr)
    starved: int = 0
    last_token_ns: int = 0
    streaming: int = 0
    endpoints: list[Counter[str]] = field(default_factory=list)

    @property
    def ended(self) -> int:
        return self.outcomes.total()

    def add(self, other: Counters) -> None:
        """Count the other's too."""
        self.in_flight += other.in_flight
        self.issued += other.issued
        self.attempted += other.attempted
        self.chunks += other.chunks
        self.good += other.good
        self.ok_in_time += other.ok_in_time
        self.chunks_in_time += other.chunks_in_time
        self.outcomes += other.outcomes
        self.ttft.merge(other.ttft)
        self.e2e.merge(other.e2e)
        self.starved += other.starved
        self.last_token_ns = max(self.last_token_ns, other.last_token_ns)
        self.streaming += other.streaming
        pairs = zip_longest(self.endpoints, other.endpoints, fillvalue=Counter[str]())
        self.endpoints = [mine + theirs for mine, theirs in pairs]

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "ttft": self.ttft.encode(), "e2e": self.e2e.encode()}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Counters:
        histograms = {name: Hdr.decode(said[name]) for name in ("ttft", "e2e")}
        counts = {"outcomes": Counter(said["outcomes"]), "endpoints": [Counter(one) for one in said["endpoints"]]}
        return cls(**{**said, **counts, **histograms})


class Shard:
    """Sends and records its part of a run: number ``index`` of ``count``.

    ``target_rss`` is what the target was last seen to hold, None where nobody says. ``failure`` says what makes the run
    invalid, ``start_ns`` when the level that is being measured began, ``issued_s`` how long the last one issued,
    ``lag_ns`` how late the event loop was at most in the last second.
    """

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        started_wall_ns: int,
        index: int = 0,
        count: int = 1,
    ) -> None:
        self.clock = clock
        self.recorder = Recorder(folder, started_wall_ns, self._on_disk_failure)
        self.pulse = Pulse()
        self.phase = "idle"
        self.level: Level | None = None
        self.start_ns: int | None = None
        self.reason: str | None = None
        self.stop_reason: str | None = None
        self.failure: str | None = None
        self.in_flight = 0
        self._in_flight_ns = 0
        self.target_rss: int | None = None
        self.e2e_s: float | None = None
        self._clients: list[Client] = []
        self._per_user = False
        self._issuing: Issuing | None = None
        self.issue_end_ns = 0
        self.issued_s = 0.0
        self.lag_ns = 0
        self._in_time: tuple[int, int] | None = None
        self._place = (index, count)
        self._ticker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.pulse.start()
        self._ticker = asyncio.create_task(self._tick_every_second())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        self.pulse.stop()
        for client in self._clients:
            client.close()
        self.recorder.close()

    def talk_to(self, *wires: Wire, per_user: bool = False) -> None:
        """From now on requests go there; to the endpoints of a fleet in turn, or each user to one of them."""
        for client in self._clients:
            client.close()
        self._clients = [Client(wire, self.clock.origin_ns, self.recorder.gaps) for wire in wires]
        self._per_user = per_user

    def stop(self, reason: str) -> None:
        """Start nothing any more, in this level or a later one."""
        self.stop_reason = self.stop_reason or reason
        if self._issuing is not None:
            self._issuing.stop(reason)

    def cut(self, reason: str) -> None:
        """End this level now: start nothing more of it, and give up what is in flight."""
        if self._issuing is not None:
            self._issuing.stop(reason)
            for client in self._clients:
                client.abort("censored", f"given up: {reason}")

    @property
    def place(self) -> tuple[int | None, str]:
        """Where the run is: the level that is being measured, if any, and the phase."""
        in_level = self.phase in ("load", "drain") and self.level is not None
        return self.level.index if in_level and self.level else None, self.phase

    # the Sender of the load loops

    async def send(self, request: Request) -> Sample:
        client = self._client_of(request)
        self.in_flight += 1
        self._in_flight_ns -= self.clock.now_ns()
        self.recorder.attempted += 1
        try:
            sample = await client.send(request, level=self.level.index if self.level else -1, phase="load")
        finally:
            self.in_flight -= 1
        # Until the answer was whole: that its HTTP message ends later is the server's affair, and in no sample.
        self._in_flight_ns += self.clock.now_ns() if sample.done_ns is None else sample.done_ns
        self.recorder.add(sample)
        return sample

    def drop(self, request: Request) -> None:
        assert self.level is not None
        self.recorder.attempted += 1
        self.recorder.add(self._client_of(request).unsent(request, self.level.index, "dropped"))

    def abort(self) -> None:
        for client in self._clients:
            client.abort("censored", "unfinished when the drain ended")

    def _client_of(self, request: Request) -> Client:
        """Whose turn it is in a fleet. The same for every number of shards, but in closed loop without ``per_user``:

        there the requests that a shard sends are not every ``count``-th of one order, and it goes round by its own.
        """
        (index, count), turn = self._place, request.seq
        if request.user is not None:
            turn = request.user if self._per_user else request.seq // count + index
        return self._clients[turn % len(self._clients)]

    async def each(self, prompt: Prompt, phase: str, level: int, *, within_s: float | None = None) -> list[Sample]:
        """One request to each endpoint outside the load, if need be beside it: a canary or a warm-up."""
        places = range(len(self._clients))
        asked = [self.ask(prompt, phase, level, within_s=within_s, endpoint=place) for place in places]
        return [one.sample for one in await asyncio.gather(*asked)]

    async def one(self, prompt: Prompt, phase: str, level: int, *, within_s: float | None = None) -> Sample:
        """One request outside the load, to the first endpoint."""
        return (await self.ask(prompt, phase, level, within_s=within_s)).sample

    async def ask(
        self, prompt: Prompt, phase: str, level: int, *, within_s: float | None = None, endpoint: int = 0
    ) -> Asked:
        """The same, with what was answered."""
        beside = self.start_ns is not None
        self.phase = self.phase if beside else phase
        request = Request(prompt.index, prompt, self.clock.now_ns())
        try:
            asked = await self._clients[endpoint].ask(request, level=level, phase=phase, within_s=within_s)
        finally:
            self.phase = self.phase if beside else "idle"
        sample = asked.sample
        self.recorder.add(sample)
        if not beside and sample.outcome == "ok" and sample.sent_ns is not None and sample.last_token_ns is not None:
            self.e2e_s = max(self.e2e_s or 0.0, (sample.last_token_ns - sample.sent_ns) / 1e9)
        return asked

    async def prepare(self, level: Level) -> None:
        """Open the connections that the level will want, so that none is set up inside it."""
        await asyncio.gather(*(client.open(self._connections_for(level)) for client in self._clients))

    async def measure(
        self, level: Level, mix: PromptMix, drain_s: float, start_ns: int | None = None
    ) -> dict[str, Any]:
        """Run this shard's part of a level; returns the client's facts about it (``level_end.client``).

        The prompts and, in open loop, the schedule are the whole level's, drawn from its seed; a shard takes every
        ``count``-th of them. All shards of a level start at the same ``start_ns`` of their common clock.
        """
        await self.prepare(level)
        index, count = self._place
        prompts = islice(mix.draw(level.seed, level.load), index, None, count)
        due = iter(()) if isinstance(level.load, Closed) else schedule(level.load, None, None, level.seed)
        opened_before = sum(client.connections_opened for client in self._clients)
        self.level = level
        self.pulse.begin()
        self._in_flight_ns = 0
        self._issuing = issuing = Issuing(level.share(index, count), self.clock, start_ns, index, count)
        issuing.endpoints = len(self._clients)
        if self.stop_reason is not None:  # told while the connections were being opened
            issuing.stop(self.stop_reason)
        self.start_ns, self.phase, self._in_time = issuing.start_ns, "load", None
        self.recorder.begin_level(level.index, issuing.start_ns, from_due=isinstance(level.load, Open))
        self.recorder.event(issuing.start_ns, "level_start", level=level.index)
        await issuing.sleep_until(issuing.start_ns)
        late_ns = max(0, self.clock.now_ns() - issuing.start_ns)
        try:
            self.reason = await run_level(
                issuing,
                self,
                prompts,
                islice(due, index, None, count),
                drain_s=drain_s,
                on_issue_end=self._on_issue_end,
            )
        finally:
            await self.recorder.close_interval(self.clock.now_ns())
            self.start_ns, self._issuing, self.phase = None, None, "idle"
        facts = self.pulse.facts()
        return facts | {
            "start_late_ns": late_ns,
            "new_connections": sum(client.connections_opened for client in self._clients) - opened_before,
            "connections_opened_before": opened_before,
            # The integral of what was in flight, now that nothing is; analysis holds the samples to it by Little's law.
            "in_flight_ns": self._in_flight_ns,
        }

    def counters(self) -> Counters:
        """The level so far."""
        recorder, issuing = self.recorder, self._issuing
        streams = [client.streaming() for client in self._clients]
        ok_in_time, chunks_in_time = self._in_time or (recorder.outcomes["ok"], recorder.chunks)
        return Counters(
            self.in_flight,
            issuing.issued if issuing is not None else recorder.attempted,
            recorder.attempted,
            recorder.chunks,
            recorder.good,
            ok_in_time,
            chunks_in_time,
            recorder.outcomes,
            recorder.ttft,
            recorder.e2e,
            recorder.starved,
            max([recorder.last_token_ns, *(last_token_ns for _, last_token_ns in streams)]),
            sum(streaming for streaming, _ in streams),
            recorder.endpoints,
        )

    def sickest(self) -> tuple[str, int] | None:
        """Of several processes that send, whose event loop was latest in the last second, and by how many ns."""
        return None

    def _connections_for(self, level: Level) -> int:
        """How many streams the level will want at once at an endpoint; in open loop by Little's law, twice over.

        Users that go round a fleet gather where it is slow: twice their share, and what is more is opened as it comes.
        """
        (index, count), endpoints = self._place, len(self._clients)
        if isinstance(level.load, Closed):
            users = len(range(index, level.load.concurrency, count))
            return min(users, math.ceil(users / endpoints) * (1 if self._per_user else 2))
        share = level.share(index, count)
        rate_per_s = level.load.most_per_s / endpoints
        expected = math.ceil(2 * rate_per_s / count * (self.e2e_s or 1.0)) + 4
        return min(expected, 1024, share.max_in_flight or expected, share.requests or expected)

    def _on_issue_end(self, reason: str) -> None:
        assert self.level is not None
        self.phase, self.issue_end_ns = "drain", self.clock.now_ns()
        self.issued_s = (self.issue_end_ns - (self.start_ns or 0)) / 1e9
        self._in_time = (self.recorder.outcomes["ok"], self.recorder.chunks)
        self.recorder.event(self.issue_end_ns, "issue_end", level=self.level.index, reason=reason)

    def _on_disk_failure(self, error: OSError) -> None:
        self.failure = f"the results cannot be written: {error.strerror}"
        self.stop("disk_failure")

    async def _tick_every_second(self) -> None:
        due_ns = self.clock.now_ns()
        while True:
            self._tick()
            await self.recorder.close_interval(self.clock.now_ns())
            due_ns = max(due_ns + TICK_NS, self.clock.now_ns())
            await asyncio.sleep((due_ns - self.clock.now_ns()) / 1e9)

    def _tick(self) -> None:
        level, phase = self.place
        counters, self.lag_ns = self.counters(), self.pulse.take_lag_max()
        self.recorder.event(
            self.clock.now_ns(),
            "tick",
            level=level,
            phase=phase,
            in_flight=counters.in_flight,
            attempted=counters.attempted,
            ended=counters.ended,
            ok=counters.outcomes["ok"],
            chunks=counters.chunks,
            target_rss_bytes=self.target_rss,
            client_rss_bytes=self.pulse.rss_bytes(),
            client_cpu_s=round(self.pulse.cpu_s(), 3),
            loop_lag_max_ns=self.lag_ns,
        )
