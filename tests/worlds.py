"""Servers whose truth is known, played out event by event into run directories: no sockets, no clock, seeded.

A request is an amount of work. Up to ``slots`` are worked on at once, the others wait in line; together ``speed(n)``
times as much work is done in a second when ``n`` are worked on as for one alone, and all of them get the same of it.
So ``speed = n`` is k slots that know nothing of each other, ``speed = 1`` is one processor shared.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import orjson

from loadbench.records import Closed, Load, Open, Sample
from tests import rundirs
from tests.rundirs import Planned

FOREVER = math.inf
REJECTS_AFTER_S = 0.05


def alone(n: int) -> float:
    """Each as fast as if it were alone."""
    return n


def shared(n: int) -> float:
    """One processor for all."""
    return 1.0


def usl(contention: float, coherency: float) -> Callable[[int], float]:
    """The Universal Scalability Law."""
    return lambda n: n / (1 + contention * (n - 1) + coherency * n * (n - 1))


@dataclass(frozen=True)
class Server:
    """``service_s`` is what a request takes alone, on average, ``cv`` its coefficient of variation (lognormal).

    ``first_share`` of it passes before the first token. More than ``queue`` in line are rejected.
    """

    slots: float = FOREVER
    speed: Callable[[int], float] = alone
    service_s: float = 0.1
    cv: float = 0.3
    first_share: float = 0.25
    queue: float = FOREVER
    stream: bool = True


@dataclass
class _Job:
    number: int
    due_s: float
    user: int | None
    work: float
    first_s: float | None = None
    done_s: float = 0.0
    ok: bool = True


@dataclass
class _Play:
    """``done_work`` is what each request that was there all the time has had; ``agenda`` is in its units."""

    server: Server
    randomness: random.Random
    now_s: float = 0.0
    done_work: float = 0.0
    agenda: list[tuple[float, int, bool, _Job]] = field(default_factory=list)
    working: int = 0
    line: deque[_Job] = field(default_factory=deque)
    jobs: list[_Job] = field(default_factory=list)

    def come(self, due_s: float, user: int | None) -> _Job:
        """A request arrives now: it is worked on, waits, or is rejected (its done_s says until when)."""
        spread = math.sqrt(math.log1p(self.server.cv**2))
        job = _Job(
            len(self.jobs),
            due_s,
            user,
            self.server.service_s * self.randomness.lognormvariate(-(spread**2) / 2, spread),
        )
        self.jobs.append(job)
        if self.working < self.server.slots:
            self._begin(job)
        elif len(self.line) < self.server.queue:
            self.line.append(job)
        else:
            job.ok, job.done_s = False, due_s + REJECTS_AFTER_S
        return job

    def _begin(self, job: _Job) -> None:
        self.working += 1
        for share in (self.server.first_share, 1.0):
            heappush(self.agenda, (self.done_work + share * job.work, job.number, share == 1.0, job))

    def next_s(self) -> float:
        """When the next token of interest comes."""
        if not self.agenda:
            return FOREVER
        return self.now_s + (self.agenda[0][0] - self.done_work) * self.working / self.server.speed(self.working)

    def pass_until(self, moment_s: float) -> None:
        if self.working:
            self.done_work += (moment_s - self.now_s) * self.server.speed(self.working) / self.working
        self.now_s = moment_s

    def step(self) -> _Job | None:
        """Go to the next token of interest; the job that it ends, if it does."""
        self.pass_until(self.next_s())
        self.done_work, _, last, job = heappop(self.agenda)
        if not last:
            job.first_s = self.now_s
            return None
        job.done_s = self.now_s
        self.working -= 1
        if self.line:
            self._begin(self.line.popleft())
        return job


def play(server: Server, load: Load, duration_s: float, seed: int) -> list[_Job]:
    """Every request of one level, which begins at 0 with an empty server; what is in flight at its end is served."""
    world = _Play(server, random.Random(seed))
    arrivals: list[tuple[float, int, int | None]] = []
    if isinstance(load, Open):
        due_s, count = world.randomness.expovariate(load.rate_per_s), 0
        while due_s < duration_s:
            arrivals.append((due_s, count, None))
            due_s, count = due_s + world.randomness.expovariate(load.rate_per_s), count + 1
    else:
        arrivals = [(user / 1e3, user, user) for user in range(load.concurrency)]

    def again(job: _Job) -> None:
        if isinstance(load, Closed) and job.done_s < duration_s:
            heappush(arrivals, (job.done_s, len(world.jobs), job.user))

    while arrivals or world.agenda:
        if arrivals and arrivals[0][0] <= world.next_s():
            due_s, _, user = heappop(arrivals)
            world.pass_until(due_s)
            job = world.come(due_s, user)
            if not job.ok:
                again(job)
        elif ended := world.step():
            again(ended)
    return world.jobs


def write_world(
    path: Path, server: Server, loads: Sequence[Load], *, duration_s: float = 15.0, seed: int = 1, **facts: Any
) -> Path:
    """The run directory of these levels on this server; ``facts`` replace keys of run.json."""
    path.mkdir(parents=True, exist_ok=True)
    levels = [Planned(load, duration_s=duration_s, stream=server.stream) for load in loads]
    telemetry: list[dict[str, Any]] = []
    now_ns = 2_000_000_000
    with (path / "samples.jsonl").open("wb") as file:
        for index, level in enumerate(levels):
            made = list(_samples(server, level, index, now_ns, seed))
            file.writelines(orjson.dumps(sample._asdict()) + b"\n" for sample in made)
            end_ns = now_ns + round(duration_s * 1e9)
            drained_ns = max([end_ns, *(sample.done_ns or 0 for sample in made)])
            spent_ns = sum((sample.done_ns or 0) - (sample.sent_ns or 0) for sample in made)
            telemetry += rundirs._events(level, index, now_ns, end_ns, drained_ns, spent_ns)
            now_ns = drained_ns + 500_000_000
    (path / "telemetry.jsonl").write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in telemetry))
    document = rundirs._facts(levels, "complete", now_ns) | facts
    (path / "run.json").write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    return path


def _samples(server: Server, level: Planned, index: int, start_ns: int, seed: int) -> Iterator[Sample]:
    jobs = play(server, level.load, level.duration_s, seed * 1000 + index)
    for seq, job in enumerate(sorted(jobs, key=lambda job: job.done_s)):
        due_ns, done_ns = start_ns + round(job.due_s * 1e9), start_ns + round(job.done_s * 1e9)
        first_ns = None if job.first_s is None or not server.stream else start_ns + round(job.first_s * 1e9)
        yield Sample(
            level=index,
            phase="load",
            seq=seq,
            kind="chat",
            user=job.user,
            due_ns=due_ns,
            sent_ns=due_ns + 50_000,
            headers_ns=due_ns + 60_000,
            first_event_ns=first_ns,
            first_token_ns=first_ns,
            last_token_ns=done_ns if job.ok else None,
            done_ns=done_ns,
            outcome="ok" if job.ok else "http_5xx",
            detail=None if job.ok else "queue full",
            http_status=200 if job.ok else 503,
            finish_reason="length" if job.ok else None,
            input_tokens=40 if job.ok else None,
            output_tokens=32 if job.ok else None,
            token_source="usage" if job.ok else None,
            chunks=32 if job.ok and server.stream else 0,
            keep_alives=0,
            max_gap_ns=5_000_000 if first_ns else None,
            stall_ns=0 if first_ns else None,
            bytes_received=6400,
            connect_ns=None,
        )
