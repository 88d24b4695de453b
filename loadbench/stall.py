"""Sees while a level runs that its target has stopped for ever, and ends the level then: nobody need wait for the rest.

Streams that stand still are one symptom; that a canary beside them is not answered either is the other.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from loadbench.aftermath import Canaries
from loadbench.engine.crew import Crew
from loadbench.records import Level, Sample
from loadbench.target.state import HANGS

LOOK_S = 0.25  # as often as load processes tell of their streams
CANARY_S = 5.0  # so much after the first-token deadline the verdict is known

STALLED = "stalled"


class Stall:
    """Looks for as long as it is entered. ``canaries`` are those that were not answered, none where the level went on.

    What counts is a stream that has begun: no token has come for as long as a first one may take, on any. A prompt that
    is still being read says nothing: a server that is overloaded looks no different, and its deadline is the request's.
    """

    def __init__(self, crew: Crew, canaries: Canaries, level: Level, first_token_s: float | None) -> None:
        """``first_token_s`` is that deadline, None: no canary may be sent, and so nothing is looked for."""
        self.canaries: list[Sample] = []
        self._crew = crew
        self._sender = canaries
        self._level = level
        self._patience_ns = None if first_token_s is None else int(first_token_s * 1e9)
        self._asking = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._patience_ns is not None:
            self._watcher = asyncio.create_task(self._look(self._patience_ns))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher is None:
            return
        try:
            if kind is None:
                async with self._asking:  # what has been asked is waited for: else it would be asked again
                    pass
        finally:
            self._watcher.cancel()
            (ended,) = await asyncio.gather(self._watcher, return_exceptions=True)
        if kind is None and isinstance(ended, Exception):
            raise ended  # it could not look, and the level was not watched over

    async def _look(self, patience_ns: int) -> None:
        crew, asked_ns = self._crew, 0
        while not self.canaries:
            counters, now_ns = crew.counters(), crew.clock.now_ns()
            due_ns = max(counters.last_token_ns, asked_ns) + patience_ns
            if not counters.streaming:
                await asyncio.sleep(LOOK_S)
            elif now_ns < due_ns:
                await asyncio.sleep((due_ns - now_ns) / 1e9)
            else:
                async with self._asking:
                    asked_ns = now_ns
                    await self._ask(counters.last_token_ns)

    async def _ask(self, last_token_ns: int) -> None:
        crew, level = self._crew, self._level.index
        canaries = await self._sender.send(level, within_s=CANARY_S)
        now_ns = crew.clock.now_ns()
        still_s = (canaries[0].due_ns - last_token_ns) / 1e9
        said = ", ".join(canary.outcome for canary in canaries)
        text = f"no stream had had a token for {still_s:.1f} s; a canary beside them: {said}"
        crew.recorder.event(now_ns, "note", level=level, text=text)
        hangs = all(canary.outcome in HANGS and canary.first_token_ns is None for canary in canaries)
        if hangs and crew.counters().last_token_ns == last_token_ns:
            self.canaries = canaries
            crew.cut(STALLED)
