"""Makes the load: two loops that look like what they mean. What a request is and where it goes is somebody else's job.

`closed` is N users of whom each sends its next request when its last one is done; `open_` follows a schedule laid down
before it starts and never waits for an answer. Schedules are endless: the level's bounds are kept in one place,
`Issuing`. `run_level` runs one of the loops, stops it, and drains.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from time import perf_counter_ns
from typing import Protocol

from loadbench.records import Closed, Leg, Level, Prompt, Request, Sample

GONE_AFTER = 20
"""So many refused connections in a row, with nothing answered between them, and an endpoint counts as gone."""

STARTS_A_TURN = 4
"""Requests that may start before the loop looks at its sockets again: a start takes some 50 µs, and of 512 at once the
first would have their answers stamped when the last has been sent, 25 ms late."""

FAILURE_SPACING_NS = 100_000_000
"""A user whose request failed sends its next no earlier than so long after it. A target that is dead, or answers 503 in
no time, would else be asked thousands of times a second, by users of whom none would do that."""


class Clock:
    """The run's clock: nanoseconds since its zero. Tests put a virtual one in its place."""

    def __init__(self, origin_ns: int | None = None) -> None:
        self.origin_ns = perf_counter_ns() if origin_ns is None else origin_ns

    def now_ns(self) -> int:
        return perf_counter_ns() - self.origin_ns


class Sender(Protocol):
    """What the loops need of the world: something that sends, something that drops, something that gives up."""

    def send(self, request: Request) -> Awaitable[Sample]: ...

    def drop(self, request: Request) -> None: ...

    def abort(self) -> None: ...


class Issuing:
    """Whether a level still starts requests; ``reason``: why not (duration, requests, time, schedule, or as told).

    It is shard ``index`` of ``count``: its requests are numbered so that no two shards use a number twice. On the rung
    of a memory ladder (``once``) each user asks once, and it lasts until all are answered or its time is up. The target
    is gone when all its ``endpoints`` are: until then what is due at one that is gone is tried, and fails.
    """

    def __init__(self, level: Level, clock: Clock, start_ns: int | None = None, index: int = 0, count: int = 1) -> None:
        self.level = level
        self.clock = clock
        self.start_ns = clock.now_ns() if start_ns is None else start_ns
        self.index, self.count = index, count
        self.once = level.purpose == "rung"
        self.end_ns = None if level.duration_s is None else self.start_ns + int(level.duration_s * 1e9)
        self.limit_ns = None if level.at_most_s is None else self.start_ns + int(level.at_most_s * 1e9)
        self.issued = 0
        self.in_flight = 0
        self.reason: str | None = None
        self.stopped = asyncio.Event()
        self._sleepers: set[asyncio.Future[None]] = set()
        self.endpoints = 1
        self._refused_in_a_row: Counter[int] = Counter()

    def may_start(self) -> bool:
        """Closed loop: whether one more request may start now."""
        level = self.level
        if self.reason is None:
            now_ns, enough = self.clock.now_ns(), self.issued >= level.min_requests
            if enough and level.requests is not None and self.issued >= level.requests and not self.once:
                self.stop("requests")
            elif enough and self.end_ns is not None and now_ns >= self.end_ns:
                self.stop("duration")
            elif self.limit_ns is not None and now_ns >= self.limit_ns:
                self.stop("time")
        return self.reason is None

    def drain_s(self, longest_s: float) -> float:
        """How long what is in flight may still take: on a rung no longer than its time."""
        if not self.once or self.limit_ns is None:
            return longest_s
        return min(longest_s, max(0.0, (self.limit_ns - self.clock.now_ns()) / 1e9))

    def is_over_at(self, offset_ns: int) -> str | None:
        """Open loop: whether a request that is due so long after the start is none of the level's, and why."""
        level = self.level
        enough = self.issued >= level.min_requests
        if enough and level.requests is not None and self.issued >= level.requests:
            return "requests"
        end_s, limit_s = level.duration_s if enough else None, level.at_most_s
        if limit_s is not None and offset_ns >= limit_s * 1e9 and (end_s is None or limit_s < end_s):
            return "time"
        return "duration" if end_s is not None and offset_ns >= end_s * 1e9 else None

    def next_request(self, prompts: Iterator[Prompt], due_ns: int, user: int | None = None) -> Request:
        request = Request(self.issued * self.count + self.index, next(prompts), due_ns, user)
        self.issued += 1
        return request

    def stop(self, reason: str) -> None:
        """Start nothing any more; what is in flight may end."""
        if self.reason is None:
            self.reason = reason
            self.stopped.set()
            for sleeper in tuple(self._sleepers):
                _wake(sleeper)

    def landed(self, _: asyncio.Task[Sample]) -> None:
        """A request of the open loop has ended."""
        self.in_flight -= 1

    def learn(self, sample: Sample) -> None:
        """Take note of an answer: too many refusals in a row mean that nobody is there."""
        endpoint, refused = sample.endpoint or 0, self._refused_in_a_row
        refused[endpoint] = refused[endpoint] + 1 if sample.outcome == "connect_refused" else 0
        if refused[endpoint] == GONE_AFTER and sum(n >= GONE_AFTER for n in refused.values()) == self.endpoints:
            self.stop("target_died")

    async def sleep_until(self, moment_ns: int) -> None:
        """Return at that moment, or when the level stops. Asks the clock again: loop timers may fire 1.3 ms early."""
        loop = asyncio.get_running_loop()
        while self.reason is None and (left_ns := moment_ns - self.clock.now_ns()) > 0:
            sleeper = loop.create_future()
            self._sleepers.add(sleeper)
            timer = loop.call_later(left_ns / 1e9, _wake, sleeper)
            try:
                await sleeper
            finally:
                timer.cancel()
                self._sleepers.discard(sleeper)


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


def _wanted_s(legs: Sequence[Leg], number: int, since_s: float) -> float:
    """When, from ``since_s`` on, the legs' load first rounds above ``number``; if it does not, when they are over."""
    begin_s, enough = 0.0, number + 0.5
    for leg in legs:
        into_s = max(0.0, since_s - begin_s)
        if into_s < leg.over_s:
            if leg.start + (leg.end - leg.start) * into_s / leg.over_s >= enough:
                return max(since_s, begin_s)
            if leg.end >= enough:
                return begin_s + leg.over_s * (enough - leg.start) / (leg.end - leg.start)
        begin_s += leg.over_s
    return begin_s


async def closed(issuing: Issuing, sender: Sender, prompts: Iterator[Prompt], users: range) -> None:
    """N users; each sends its next request when its last one is done. They come one spacing apart.

    With legs a user whose number is not wanted sleeps until it is; what it has asked by then is answered all the same.
    """
    spacing_ns = int(issuing.level.start_spacing_s * 1e9)
    legs = issuing.level.load.legs

    def wanted_ns(number: int, since_ns: int) -> int:
        if not legs:
            return since_ns
        since_s = (since_ns - issuing.start_ns) / 1e9
        wanted_s = _wanted_s(legs, number, since_s)
        return since_ns if wanted_s == since_s else issuing.start_ns + int(wanted_s * 1e9) + number * spacing_ns

    async def user(number: int, due_ns: int) -> None:
        while True:
            due_ns = wanted_ns(number, due_ns)
            await issuing.sleep_until(due_ns)
            if not issuing.may_start():
                return
            sample = await _send(issuing, sender, issuing.next_request(prompts, due_ns, number))
            if issuing.once:
                return
            due_ns = issuing.clock.now_ns()
            if sample.outcome != "ok":
                asked_ns = sample.due_ns if sample.sent_ns is None else sample.sent_ns
                due_ns = max(due_ns, asked_ns + FAILURE_SPACING_NS)

    async with asyncio.TaskGroup() as group:
        for place, number in enumerate(users):
            due_ns = issuing.start_ns + (0 if legs else number * spacing_ns)
            await issuing.sleep_until(due_ns)
            group.create_task(user(number, due_ns))
            if place % STARTS_A_TURN == 0:
                await asyncio.sleep(0)


async def open_(issuing: Issuing, sender: Sender, prompts: Iterator[Prompt], schedule_ns: Iterator[int]) -> None:
    """Start each request when the schedule says, however many are unanswered, up to the valve ``max_in_flight``.

    What is due inside the level is sent, however late we are: whoever leaves out what he was too late for measures a
    load that was never asked for, and calls it fine.
    """
    valve, ended_by = issuing.level.max_in_flight, "schedule"
    async with asyncio.TaskGroup() as group:
        for offset_ns in schedule_ns:
            if over := issuing.is_over_at(offset_ns):
                ended_by = over
                break
            due_ns = issuing.start_ns + offset_ns
            await issuing.sleep_until(due_ns)
            if issuing.reason is not None:
                break
            request = issuing.next_request(prompts, due_ns)
            if valve is not None and issuing.in_flight >= valve:
                sender.drop(request)
            else:
                issuing.in_flight += 1  # here, since the task may begin after the next request is due
                group.create_task(_send(issuing, sender, request)).add_done_callback(issuing.landed)
                if issuing.issued % STARTS_A_TURN == 0:
                    await asyncio.sleep(0)
        end_ns = {"duration": issuing.end_ns, "time": issuing.limit_ns}.get(ended_by)
        if end_ns is not None:
            await issuing.sleep_until(end_ns)
        issuing.stop(ended_by)  # a reason that was given before stands


async def _send(issuing: Issuing, sender: Sender, request: Request) -> Sample:
    sample = await sender.send(request)
    issuing.learn(sample)
    return sample


async def run_level(
    issuing: Issuing,
    sender: Sender,
    prompts: Iterator[Prompt],
    schedule_ns: Iterator[int],
    *,
    drain_s: float,
    on_issue_end: Callable[[str], None],
) -> str:
    """Run one level to its end: issue, stop, drain, and abort what is unfinished then. Returns why issuing stopped."""
    load = issuing.level.load
    if isinstance(load, Closed):
        work = closed(issuing, sender, prompts, range(issuing.index, load.concurrency, issuing.count))
    else:
        work = open_(issuing, sender, prompts, schedule_ns)
    issuer = asyncio.create_task(work)
    watch = asyncio.create_task(_watch(issuing))
    try:
        await asyncio.wait({issuer, watch}, return_when=asyncio.FIRST_COMPLETED)
        issuing.stop("requests")  # every user is done; a reason that was given before stands
        on_issue_end(issuing.reason or "")
        _, unfinished = await asyncio.wait({issuer}, timeout=issuing.drain_s(drain_s))
        if unfinished:
            sender.abort()
        await issuer
    finally:
        watch.cancel()
        issuer.cancel()
    return issuing.reason or ""


async def _watch(issuing: Issuing) -> None:
    """See the end of a closed loop's time even while every user waits for an answer."""
    ends_ns = (issuing.end_ns, issuing.limit_ns) if isinstance(issuing.level.load, Closed) else ()
    for end_ns in sorted(end_ns for end_ns in ends_ns if end_ns is not None):
        await issuing.sleep_until(end_ns)
        issuing.may_start()
    await issuing.stopped.wait()
