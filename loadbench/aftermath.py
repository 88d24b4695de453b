"""What comes after a target's death: whether the run goes on, and the target's way back, timed.

That it died is ``target.state``'s to say, how it comes back ``target.recovery``'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count

from loadbench.engine.crew import Crew
from loadbench.engine.exchange import Wire
from loadbench.errors import TargetError
from loadbench.progress import Watch
from loadbench.records import Level, Prompt, Sample
from loadbench.target import recovery
from loadbench.target.models import Resolved
from loadbench.target.recovery import Recovery, recover
from loadbench.target.state import DEAD, DEADLINES, SERVERS_DOING
from loadbench.target.target import Target
from loadbench.vigil import Vigil

CANARY = Prompt("canary", 0, ({"role": "user", "content": "Say hello."},), 8)
"""Small enough to answer in a moment on anything, long enough to need more than one token."""

SURE = DEADLINES | {"ok", "connect_refused", "connection_lost", "out_of_memory"}
"""After a rung no second canary would say otherwise; one that got a 503 says nothing of memory."""


class TargetDiedError(Exception):
    """The run ends here. The message says after which level, in what state, on what evidence."""


@dataclass(frozen=True, slots=True)
class Found:
    """How the target was found after a level. ``failed`` counts the requests that were not ok, by outcome."""

    state: str
    evidence: Sequence[str]
    failed: Mapping[str, int]

    @property
    def dead(self) -> bool:
        return self.state in DEAD

    def told(self, level: Level) -> str:
        return f"{self.state} after level {level.index}: {'; '.join(self.evidence)}"


class Canaries:
    """Sends small requests, each with a number of its own. ``usual_ms`` is the TTFT of the last good one."""

    def __init__(self, crew: Crew) -> None:
        self.usual_ms: float | None = None
        self._crew = crew
        self._numbers = count()

    async def send(self, level: int, *, within_s: float | None = None) -> Sample:
        """One, beside the load while a level runs. ``within_s``: where the deadlines are longer it has so long."""
        canary = replace(CANARY, index=next(self._numbers))
        sample = await self._crew.one(canary, "canary", level, within_s=within_s)
        if sample.outcome == "ok" and within_s is None:
            self.usual_ms = first_ms(sample)
        return sample

    async def after(self, level: Level) -> Sample:
        """The one that follows a level."""
        sample = await self.send(level.index)
        if level.purpose == "rung" and sample.outcome not in SURE:
            sample = await self.send(level.index)
        return sample


def first_ms(sample: Sample) -> float | None:
    """Service time to the first token, in milliseconds."""
    if sample.first_token_ns is None or sample.sent_ns is None:
        return None
    return (sample.first_token_ns - sample.sent_ns) / 1e6


@dataclass(slots=True)
class Site:
    """Who takes part: the target, those who ask it and those who watch it.

    ``gone``: the target is there no more, or not to be trusted; ``moved``: where it is now is not where it was at
    first. ``model`` is what is asked now, and ``wire`` where.
    """

    target: Target
    crew: Crew
    vigil: Vigil
    canaries: Canaries
    gone: bool = False
    moved: bool = False
    model: Resolved | None = None
    wire: Wire | None = None

    def talk_to(self, model: Resolved, wire: Wire) -> None:
        """From now on requests are for this model and go there."""
        self.model = model
        if wire != self.wire:
            self.crew.talk_to(wire)
            self.wire = wire

    async def restart(self) -> None:
        """A new process for a service of ours; its models are to be resolved again. TargetError: it stays away."""
        self.gone = self.moved = True
        await self.target.restart()
        self.gone = False
        await self.vigil.renew()

    async def revive(self) -> None:
        """Start a service of ours anew that the model before has taken with it."""
        foundry = self.target.foundry
        if foundry is not None and (self.gone or not foundry.alive()):
            await self.restart()

    async def free(self) -> None:
        """Have the model's memory back: unloaded, or with the process, where that is ours and refuses."""
        try:
            if self.model is not None:
                await self.target.unload(self.model)
        except TargetError:
            if self.target.foundry is None:
                raise
            self.gone = True

    async def look_again(self) -> None:
        """It was started anew by somebody else: watch the process that it is now."""
        with suppress(TargetError):
            await self.target.look_again(recovery.STATUS_TIMEOUT_S)
        await self.vigil.renew()

    async def explained(self, error: TargetError) -> TargetError:
        """The error, with how the service ended where that is ours and did."""
        if self.target.foundry is None:
            return error
        state, evidence = await self.target.state(None, {})
        return TargetError(f"{error}; {state}: {'; '.join(evidence)}") if state in DEAD else error


async def bring_back(site: Site, asked: str, canary: Callable[[Resolved], Awaitable[Sample]]) -> Recovery:
    """Start it anew if it is ours, and time its way back. Ends early when the run is to end."""
    target, vigil, crew = site.target, site.vigil, site.crew
    noticed_ns, limit_s = crew.clock.now_ns(), recovery.LIMIT_S
    # What a level's last requests, its canary and the evidence took belongs to the outage, too.
    since_ns = max(crew.recorder.last_token_ns, crew.counters().last_token_ns) or noticed_ns
    before = None if vigil.before is None else vigil.before.rss_bytes

    async def restart_and_wait() -> Recovery:
        if target.foundry is not None:
            try:
                await site.restart()
            except TargetError as error:
                return Recovery(limit_s, last_failure=str(error))
        found = await recover(
            target,
            asked,
            canary,
            crew.clock,
            since_ns=since_ns,
            noticed_ns=noticed_ns,
            ttft_before_ms=site.canaries.usual_ms,
            rss_before_bytes=before,
            limit_s=limit_s,
        )
        await vigil.renew()
        return found

    work, stop = asyncio.ensure_future(restart_and_wait()), asyncio.ensure_future(crew.stopped())
    try:
        await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Recovery(limit_s, last_failure="the run was ended before it came back")
        return work.result()
    finally:
        stop.cancel()
        work.cancel()
        await asyncio.gather(work, stop, return_exceptions=True)


def record(crew: Crew, watch: Watch, level: Level, found: Found, restarted: bool, back: Recovery) -> None:
    """Write down how it came back, and say it."""
    lost = sum(n for name, n in found.failed.items() if name in SERVERS_DOING | DEADLINES | {"censored"})
    named = {"state": found.state, "restarted": restarted, "lost": lost, "told": back.told()}
    crew.recorder.event(crew.clock.now_ns(), "recovery", level=level.index, **named, **back.as_json())
    watch.note(f"{found.told(level)}; {'started anew; ' if restarted else ''}{back.told()}")
    watch.restarts += restarted and back.back
