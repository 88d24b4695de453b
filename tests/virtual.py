"""A world in which time costs nothing: an event loop whose clock jumps to the next timer, and an arithmetic server."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from itertools import count
from typing import Any, TypeVar

from loadbench.engine.load import Clock, Issuing, run_level
from loadbench.records import Closed, Level, Load, Prompt, Request, Sample

T = TypeVar("T")
PROMPT = Prompt("chat", 0, ({"role": "user", "content": "hello"},), 16)


class _Jump(selectors.SelectSelector):
    """Instead of waiting for the next timer, makes it be that late."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout:
            self.now_s += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now_s


class VirtualClock(Clock):
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.origin_ns = 0
        self._loop = loop

    def now_ns(self) -> int:
        return round(self._loop.time() * 1e9) - self.origin_ns


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run it on a virtual clock. A deadlock raises at once: there is no timer to jump to."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


def sample(request: Request, sent_ns: int | None, done_ns: int, outcome: str = "ok") -> Sample:
    """A sample of which only the times and the outcome matter: one token, at the end."""
    answered = done_ns if outcome == "ok" else None
    return Sample(
        level=0,
        phase="load",
        seq=request.seq,
        kind=request.prompt.kind,
        user=request.user,
        due_ns=request.due_ns,
        sent_ns=sent_ns,
        headers_ns=answered,
        first_event_ns=answered,
        first_token_ns=answered,
        last_token_ns=answered,
        done_ns=done_ns,
        outcome=outcome,
        detail=None,
        http_status=200 if outcome == "ok" else None,
        finish_reason="length" if outcome == "ok" else None,
        input_tokens=None,
        output_tokens=1 if outcome == "ok" else None,
        token_source="chunks" if outcome == "ok" else None,
        chunks=1 if outcome == "ok" else 0,
        keep_alives=0,
        max_gap_ns=None,
        stall_ns=None,
        bytes_received=0,
        connect_ns=None,
    )


class World:
    """The `Sender` of the load loops: ``serve(request)`` is what the server does with it, on the virtual clock.

    ``connections`` limits how many requests are with the server at once; a request counts as sent when it has one.
    """

    def __init__(
        self,
        clock: Clock,
        serve: Callable[[Request], Awaitable[str]],
        connections: int | None = None,
    ) -> None:
        self.clock = clock
        self.in_flight = 0
        self.most_in_flight = 0
        self.samples: list[Sample] = []
        self.aborted = asyncio.Event()
        self._serve = serve
        self._connections = asyncio.Semaphore(connections or 1_000_000)

    async def send(self, request: Request) -> Sample:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        async with self._connections:
            sent_ns = self.clock.now_ns()
            served = asyncio.ensure_future(self._serve(request))
            given_up = asyncio.ensure_future(self.aborted.wait())
            await asyncio.wait({served, given_up}, return_when=asyncio.FIRST_COMPLETED)
            outcome = served.result() if served.done() else "censored"
            for task in (served, given_up):
                task.cancel()
        self.in_flight -= 1
        self.samples.append(sample(request, sent_ns, self.clock.now_ns(), outcome))
        return self.samples[-1]

    def drop(self, request: Request) -> None:
        self.samples.append(sample(request, None, self.clock.now_ns(), "dropped"))

    def abort(self) -> None:
        self.aborted.set()


def level(load: Load, duration_s: float | None = 10.0, **options: Any) -> Level:
    options = {"requests": None, "min_requests": 0, "start_spacing_s": 0.0, **options}
    return Level(index=0, stage=0, model="m:1", load=load, duration_s=duration_s, seed=1, **options)


def play(
    one: Level,
    service_s: Callable[[Request, float], float] | float,
    *,
    due_s: Iterator[float] | None = None,
    connections: int | None = None,
    drain_s: float = 30.0,
    outcome: Callable[[Request], str] = lambda request: "ok",
    meanwhile: Callable[[Issuing], Awaitable[None]] | None = None,
) -> tuple[World, Issuing, float]:
    """Run one level against a server that takes ``service_s``; returns the world, the issuing, and when that ended."""

    async def main() -> tuple[World, Issuing, float]:
        clock = VirtualClock(asyncio.get_running_loop())

        async def serve(request: Request) -> str:
            now_s = clock.now_ns() / 1e9
            await asyncio.sleep(service_s if isinstance(service_s, float) else service_s(request, now_s))
            return outcome(request)

        world = World(clock, serve, connections)
        issuing = Issuing(one, clock)
        ended: list[float] = []
        schedule = iter(()) if due_s is None else (round(moment * 1e9) for moment in due_s)
        side = asyncio.ensure_future(meanwhile(issuing)) if meanwhile else None
        await run_level(
            issuing,
            world,
            (PROMPT for _ in count()),
            schedule,
            drain_s=drain_s,
            on_issue_end=lambda reason: ended.append(clock.now_ns() / 1e9),
        )
        if side is not None:
            await side
        assert isinstance(one.load, Closed) == (due_s is None)
        return world, issuing, ended[0]

    return run(main)
