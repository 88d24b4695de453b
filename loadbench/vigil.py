"""Watches the target's memory beside the run, writes down what it reads, and guards the host on a memory ladder.

Reading is ``target.memory``'s or a probe's job, judging ``analysis``'; here is when to read, and what ends a rung.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from loadbench.engine.crew import Crew
from loadbench.errors import TargetError
from loadbench.records import Level
from loadbench.report.frame import MemoryShown
from loadbench.report.words import octets, share
from loadbench.scenario.endpoints import PROBE_TOKEN_VARIABLE
from loadbench.scenario.memory import MemoryLadder
from loadbench.target.memory import MemoryWatch
from loadbench.target.memory_figures import GPU_BYTES, HELD, MemoryFigures
from loadbench.target.probe_client import RemoteMemory
from loadbench.target.target import Target

USUAL_NS = 1_000_000_000
CLOSE_NS = 100_000_000
"""On a rung, and where less than `EDGE` is left: a service that takes 2 GB/s passes a floor of 512 MiB in a quarter
of a second. Ten readings cost 1.1 % of a core, one 0.15 %."""

EDGE = 0.10
READ_TIMEOUT_S = 5.0  # a reading takes milliseconds; one that hangs in the kernel must not hold up the run

FLOOR, LIMIT = "memory_floor", "memory_limit"
BLIND_S = 5.0  # a rung goes on without a reading: at 2 GB/s that is more than the floor of any host

T = TypeVar("T")


class Vigil:
    """Reads once a second, or ten times, for as long as it is entered; `begin` and `end` bracket a level.

    Every reading becomes a ``memory`` event of the telemetry. ``before``, ``peak`` and ``after`` are the level's, the
    peak field by field the worst of it; ``cut`` says by which rule the guard ended it and why, None where it did not.
    Figures of a host that nobody reads are None.
    """

    def __init__(self, target: Target, crew: Crew, probe_url: str | None) -> None:
        """``probe_url``: the target's host has a probe, which is asked with the token of LOADBENCH_PROBE_TOKEN."""
        self.latest: MemoryFigures | None = None
        self.before: MemoryFigures | None = None
        self.peak: MemoryFigures | None = None
        self.after: MemoryFigures | None = None
        self.cut: tuple[str, str] | None = None
        self._target = target
        self._crew = crew
        token = os.environ.get(PROBE_TOKEN_VARIABLE)
        self._probe = None if probe_url is None else RemoteMemory(probe_url, token, clock=crew.clock.now_ns)
        self._watch: MemoryWatch | None = None
        self._ladder: MemoryLadder | None = None
        self._turn = asyncio.Lock()
        self._pending: asyncio.Future[Any] | None = None
        self._hurry = asyncio.Event()
        self._sampler: asyncio.Task[None] | None = None
        self._began_ns = self._read_ns = crew.clock.now_ns()
        self._cost_s = 0.0
        self._failed: str | None = None
        self._clocks: dict[str, int] | None = None

    async def __aenter__(self) -> Self:
        """TargetError where a probe was named that does not answer."""
        if self._probe is not None:
            await self._probe.__aenter__()
        await self.renew()
        self._sampler = asyncio.create_task(self._sample())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sampler is not None:
            self._sampler.cancel()
        if self._probe is not None:
            with suppress(TargetError):
                self._clocks = await self._probe.finish()
            await self._probe.__aexit__(kind, error, trace)

    async def renew(self) -> None:
        """The target may be another process now: watch that one."""
        if self._probe is None:
            self._cost_s += 0.0 if self._watch is None else self._watch.cost_s
            self._watch = await self._in_turn(self._target.memory_watch)
        await self._read(everything=True)

    async def begin(self, level: Level, ladder: MemoryLadder | None) -> None:
        """The level is about to start; ``ladder`` is the one that it is a rung of, whose floor is guarded."""
        if self._watch is not None:
            await self._in_turn(self._watch.reset_peak)
        self.peak, self.after, self.cut = None, None, None
        self.before = await self._read(everything=True)
        self._ladder = ladder
        self._hurry.set()

    async def end(self) -> None:
        """The level is over, its drain and its canary too."""
        self._ladder = None
        self.after = await self._read(everything=True)

    async def rss_bytes(self) -> int | None:
        """What the target holds in resident memory now."""
        figures = await self._read(everything=True)
        return None if figures is None else figures.rss_bytes

    async def low(self, ladder: MemoryLadder) -> str | None:
        """What the host has left, in words, where that is less than the ladder's floor."""
        figures = await self._read()
        return None if figures is None else _below_floor(figures, ladder)

    def reached(self, ladder: MemoryLadder) -> str | None:
        """How much the target took at its peak, in words, where that is as much as the ladder climbs to."""
        if self.peak is None:
            return None
        peak = self.peak  # what is told is its high-water mark, where there is one
        held, room, _ = self._held(replace(peak, rss_bytes=max(peak.rss_bytes or 0, peak.peak_rss_bytes or 0) or None))
        if held is None:
            return None
        if ladder.until_bytes is not None and held >= ladder.until_bytes:
            return f"it took {octets(held)}, of {octets(ladder.until_bytes)} to climb to"
        if ladder.until_share is not None and room and held >= ladder.until_share * room:
            return f"it took {octets(held)}, {share(held / room)} of {octets(room)}, of {ladder.until} to climb to"
        return None

    def cannot_tell(self, ladder: MemoryLadder) -> str | None:
        """Why nobody could say that the target holds as much as the ladder climbs to; None where that can be said."""
        held, room = (None, None) if self.latest is None else self._held(self.latest)[:2]
        if ladder.until_failure or (held is not None and (room is not None or ladder.until_share is None)):
            return None
        facts = self.facts()
        return facts["because"] or "; ".join(f"{name}: {why}" for name, why in facts["absent"].items()) or "not given"

    def level_facts(self) -> dict[str, Any]:
        """``rss_bytes`` and ``memory`` of ``level_end.target``."""
        read = {"before": self.before, "peak": self.peak, "after": self.after}
        return {
            "rss_bytes": {name: figures and figures.rss_bytes for name, figures in read.items()},
            "memory": {name: figures and _row(figures) for name, figures in read.items()},
        }

    def facts(self) -> dict[str, Any]:
        """``memory`` of run.json: where the figures come from, what they lack, and what they cost."""
        source = "probe" if self._probe is not None else None if self._watch is None else "local"
        because = None if source else self._target.unwatched
        limit = None if self._target.foundry is None else self._target.foundry.limit
        elapsed_s = (self._crew.clock.now_ns() - self._began_ns) / 1e9
        read = self._watch or self._probe
        absent = {} if read is None else dict(read.absent)
        return {
            "source": source,
            "because": because,
            "absent": absent if self._failed is None else absent | {"readings": self._failed},
            "limit": None if limit is None else limit.as_json(),
            "clock": self._clocks,
            "cost_share": None if self._watch is None else round((self._cost_s + self._watch.cost_s) / elapsed_s, 5),
        }

    async def _sample(self) -> None:
        """One reading after the other, never two at once; what took longer than its time is not made up for."""
        clock, due_ns = self._crew.clock, self._crew.clock.now_ns()
        while True:
            due_ns = max(due_ns + self._period_ns(), clock.now_ns())
            with suppress(TimeoutError):
                async with asyncio.timeout((due_ns - clock.now_ns()) / 1e9):
                    await self._hurry.wait()
            if self._hurry.is_set():
                self._hurry.clear()
                due_ns = clock.now_ns()
            figures, ladder = await self._read(), self._ladder
            if ladder is not None and self._crew.start_ns is not None:
                self.cut = self.cut or self._guard(figures, ladder)
                if self.cut is not None:  # again and again: a load process may not have begun when it was first told
                    self._crew.cut(self.cut[0])

    def _guard(self, figures: MemoryFigures | None, ladder: MemoryLadder) -> tuple[str, str] | None:
        """By which rule the rung must end now, and why. A host that nobody ever read is not guarded."""
        if figures is None:
            blind_s = (self._crew.clock.now_ns() - self._read_ns) / 1e9
            told = f"nobody has read the host for {blind_s:.0f} s"
            return (FLOOR, told) if self.latest is not None and blind_s >= BLIND_S else None
        low, reached = _below_floor(figures, ladder), self.reached(ladder)
        return (FLOOR, low) if low else (LIMIT, reached) if reached else None

    def _period_ns(self) -> int:
        close = self._ladder is not None or (self.latest is not None and self._is_near(self.latest))
        return CLOSE_NS if close else USUAL_NS

    async def _read(self, *, everything: bool = False) -> MemoryFigures | None:
        figures = await self._ask(everything)
        if figures is None:
            return None
        self.latest, self._crew.target_rss = figures, figures.rss_bytes
        self._read_ns = self._crew.clock.now_ns()
        self.peak = figures if self.peak is None else _worse(self.peak, figures)
        self._target.saw(figures)
        level, phase = self._crew.place
        self._crew.recorder.event(figures.t_ns, "memory", level=level, phase=phase, **_row(figures))
        return figures

    async def _ask(self, everything: bool) -> MemoryFigures | None:
        if self._probe is not None:
            try:
                return await self._probe.fetch()
            except TargetError as error:
                self._failed = f"some failed: {error}"
                return None
        if self._watch is None:
            return None
        return await self._in_turn(partial(self._watch.read, self._crew.clock.now_ns(), everything=everything))

    async def _in_turn(self, work: Callable[[], T]) -> T | None:
        """Have it done in a thread, one at a time; None where it takes too long, or the one before still does."""
        with suppress(TimeoutError):
            async with asyncio.timeout(READ_TIMEOUT_S), self._turn:
                if self._pending is None or self._pending.done():
                    self._pending = doing = asyncio.ensure_future(asyncio.to_thread(work))
                    return await asyncio.shield(doing)
        self._failed = f"some took longer than {READ_TIMEOUT_S:g} s"
        return None

    def shown(self) -> MemoryShown | None:
        """For the live view."""
        if self.latest is None:
            return None
        near = self._ladder is not None or self._is_near(self.latest)
        return MemoryShown(*self._held(self.latest), self.latest.available_bytes, near)

    def _held(self, figures: MemoryFigures) -> tuple[int | None, int | None, str]:
        """What the target takes of what it lives in, how much that is, and what: its GPU, its limit or the host."""
        if (on_gpus := in_gpus(figures))[0] >= GPU_BYTES:
            return *on_gpus, "GPU"
        held = next((size for name in HELD.values() if (size := getattr(figures, name))), None)
        limit = None if self._target.foundry is None else self._target.foundry.limit
        given = [None if limit is None else limit.limit_bytes, figures.cgroup_limit_bytes, figures.total_bytes]
        room = min((size for size in given if size is not None), default=None)
        return held, room, "host" if room == figures.total_bytes else "limit"

    def _is_near(self, figures: MemoryFigures) -> bool:
        """Whether less than a tenth is left of what the target lives in, of a GPU, or of the host."""
        held, room, _ = self._held(figures)
        full = [(held, room), *((gpu.used_bytes, gpu.total_bytes) for gpu in figures.gpus)]
        if any(used > (1 - EDGE) * total for used, total in full if used and total):
            return True
        available, total = figures.available_bytes, figures.total_bytes
        return available is not None and total is not None and available < EDGE * total


def in_gpus(figures: MemoryFigures) -> tuple[int, int | None]:
    """What the target takes of GPUs, Windows' own count first, as in the report; and how much they have."""
    used = [gpu for gpu in figures.gpus if gpu.process_bytes]
    held = figures.gpu_dedicated_bytes
    if held is None:
        held = sum(gpu.process_bytes or 0 for gpu in used)
    return held, sum(gpu.total_bytes or 0 for gpu in used or figures.gpus) or None


def _row(figures: MemoryFigures) -> dict[str, Any]:
    """Without its time, which is the event's."""
    return {name: value for name, value in figures.as_json().items() if name != "t_ns"}


def _below_floor(figures: MemoryFigures, ladder: MemoryLadder) -> str | None:
    available, total = figures.available_bytes, figures.total_bytes
    if available is None or total is None or available >= (floor := ladder.floor_of(total)):
        return None
    return f"the host has {octets(available)} available, less than the floor of {octets(floor)}"


def _worse(one: MemoryFigures, other: MemoryFigures) -> MemoryFigures:
    """Field by field: of what is available the least, of everything else the most; of texts the last."""
    worst: dict[str, Any] = {}
    for field in fields(MemoryFigures):
        first, second = getattr(one, field.name), getattr(other, field.name)
        if field.name == "gpus":
            worst["gpus"] = max(first, second, key=lambda gpus: sum(gpu.used_bytes or 0 for gpu in gpus))
        elif first is None or second is None or isinstance(second, str):
            worst[field.name] = first if second is None else second
        else:
            worst[field.name] = (min if field.name == "available_bytes" else max)(first, second)
    return MemoryFigures(**worst)
