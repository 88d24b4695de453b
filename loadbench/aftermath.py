"""What comes after a target's death: whether the run goes on, and the target's way back, timed.

That it died is ``target.state``'s to say, how it comes back ``target.recovery``'s.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, zip_longest
from typing import Any

from loadbench.engine.crew import Crew
from loadbench.engine.exchange import Wire
from loadbench.engine.shard import Counters
from loadbench.errors import TargetError
from loadbench.hosts import Hosts
from loadbench.progress import Watch
from loadbench.records import Level, Prompt, Sample
from loadbench.target import recovery
from loadbench.target.fleet import together
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
    """How the target was found after a level. ``failed`` counts the requests that were not ok, by outcome.

    ``endpoints`` has state and evidence of each of a fleet.
    """

    state: str
    evidence: Sequence[str]
    failed: Mapping[str, int]
    endpoints: Sequence[tuple[str, list[str]]] = ()

    @property
    def dead(self) -> bool:
        return self.state in DEAD

    def rows(self, memory: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """``endpoints`` of ``level_end.target``, each with what was read of its host's memory, if that was."""
        read = memory or [{}] * len(self.endpoints)
        pairs = zip(self.endpoints, read, strict=True)
        return [{"state": state, "evidence": why, **figures} for (state, why), figures in pairs]

    def told(self, level: Level) -> str:
        return f"{self.state} after level {level.index}: {'; '.join(self.evidence)}"


class Canaries:
    """Sends small requests, one to each endpoint, each time with a number of its own.

    ``usual_ms`` is the TTFT of the last good one, of a fleet's the longest.
    """

    def __init__(self, crew: Crew) -> None:
        self.usual_ms: float | None = None
        self._crew = crew
        self._numbers = count()

    async def send(self, level: int, *, within_s: float | None = None) -> list[Sample]:
        """One each, beside the load while a level runs. ``within_s``: where the deadlines are longer it has so long."""
        canary = replace(CANARY, index=next(self._numbers))
        samples = await self._crew.each(canary, "canary", level, within_s=within_s)
        good_ms = [first_ms(sample) for sample in samples if sample.outcome == "ok"]
        if good_ms and within_s is None:
            self.usual_ms = max((ms for ms in good_ms if ms is not None), default=None)  # absent without streaming
        return samples

    async def at(self, endpoint: int, level: int) -> Sample:
        """One to one of a fleet."""
        canary = replace(CANARY, index=next(self._numbers))
        return (await self._crew.ask(canary, "canary", level, endpoint=endpoint)).sample

    async def after(self, level: Level) -> list[Sample]:
        """Those that follow a level."""
        samples = await self.send(level.index)
        if level.purpose == "rung" and samples[0].outcome not in SURE:
            samples = await self.send(level.index)
        return samples


def first_ms(sample: Sample) -> float | None:
    """Service time to the first token, in milliseconds."""
    if sample.first_token_ns is None or sample.sent_ns is None:
        return None
    return (sample.first_token_ns - sample.sent_ns) / 1e6


@dataclass(slots=True)
class Site:
    """Who takes part: the target, those who ask it and those who watch it.

    ``gone``: the target is there no more, or not to be trusted; ``moved``: where it is now is not where it was at
    first. ``model`` is what is asked now, and ``wires`` where: at a fleet's endpoints in turn, or ``per_user``.
    """

    target: Target
    crew: Crew
    vigil: Vigil
    canaries: Canaries
    hosts: Hosts
    gone: bool = False
    moved: bool = False
    model: Resolved | None = None
    wires: tuple[Wire, ...] = ()
    per_user: bool = False

    def talk_to(self, model: Resolved, wires: tuple[Wire, ...]) -> None:
        """From now on requests are for this model and go there."""
        self.model = model
        if wires != self.wires:
            self.crew.talk_to(*wires, per_user=self.per_user)
            self.wires = wires

    async def found(self, canaries: Sequence[Sample], counters: Counters, ended_by: str | None, *, rung: bool) -> Found:
        """How the target is after a level, from the ``canaries`` that followed it, if any, and what became of it."""
        members = self.target.members
        outcomes = [counters.outcomes] if len(members) == 1 else counters.endpoints
        states = await asyncio.gather(
            *(
                _state(member, canary, ended or Counter(), ended_by, counters.starved, rung)
                for member, canary, ended in zip_longest(members, canaries, outcomes)
            )
        )
        state, evidence = together(states, [member.endpoint.url for member in members])
        failed = {name: n for name, n in counters.outcomes.items() if name != "ok"}
        return Found(state, evidence, failed, states if len(members) > 1 else ())

    async def rejoin(self, asked: str, before: Found | None) -> None:
        """Have the model loaded at those of a fleet that were dead after the level before and are back by now."""
        if before is None or self.model is None:
            return
        members = list(self.model.each)
        for place, (state, _) in enumerate(before.endpoints):
            with suppress(TargetError, TimeoutError):
                if state in DEAD:
                    member = self.target.members[place]
                    async with asyncio.timeout(recovery.STATUS_TIMEOUT_S):
                        model = await member.resolve(asked)
                    members[place] = await member.load(model)
        if before.endpoints:
            self.model = replace(self.model, members=tuple(members))

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


async def _state(
    member: Target, canary: Sample | None, ended: Mapping[str, int], ended_by: str | None, starved: int, rung: bool
) -> tuple[str, list[str]]:
    attempted, failed = sum(ended.values()), {name: n for name, n in ended.items() if name != "ok"}
    if rung:
        attempted -= failed.pop("censored", 0)  # a rung gives up what it has under way, as planned
    return await member.state(canary, failed, attempted=attempted, ended_by=ended_by, starved=starved)


async def _first_back(site: Site, asked: str, level: int, known: dict[str, Any]) -> Recovery:
    """Wait until one of a fleet serves again; else what was the matter with the first."""

    def ask(place: int) -> Callable[[Resolved], Awaitable[Sample]]:
        return lambda _: site.canaries.at(place, level)

    clock, members = site.crew.clock, site.target.members
    waits = [recover(member, asked, ask(place), clock, **known) for place, member in enumerate(members)]
    waiting = [asyncio.ensure_future(wait) for wait in waits]
    try:
        for done in asyncio.as_completed(waiting):
            if (found := await done).back:
                return found
        return waiting[0].result()
    finally:
        for wait in waiting:
            wait.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def bring_back(site: Site, asked: str, level: int, canary: Callable[[Resolved], Awaitable[Sample]]) -> Recovery:
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
        known: dict[str, Any] = {"since_ns": since_ns, "noticed_ns": noticed_ns, "limit_s": limit_s}
        known |= {"ttft_before_ms": site.canaries.usual_ms, "rss_before_bytes": before}
        if len(target.members) == 1:
            found = await recover(target, asked, canary, crew.clock, **known)
        else:
            found = await _first_back(site, asked, level, known)
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
