"""Reads the memory of a fleet's hosts from their probes beside the run: figures of each, none of all together."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from loadbench.engine.crew import Crew
from loadbench.errors import TargetError
from loadbench.scenario.endpoints import PROBE_TOKEN_VARIABLE
from loadbench.target.probe_client import RemoteMemory

PERIOD_S = 1.0


class Hosts:
    """What is resident at each, once a second for as long as it is entered; `begin` and `end` bracket a level.

    Every reading is a ``host_memory`` event of the telemetry. A probe that fails leaves a gap: its host may be gone.
    """

    def __init__(self, probes: Sequence[str], crew: Crew) -> None:
        """``probes`` are URLs in the order of the endpoints; none where there is one endpoint, or none was named."""
        token = os.environ.get(PROBE_TOKEN_VARIABLE) if probes else None
        self._crew = crew
        self._probes = [RemoteMemory(url, token, clock=crew.clock.now_ns) for url in probes]
        self._before: list[int | None] = []
        self._peak: list[int | None] = []
        self._sampler: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """TargetError where a probe does not answer."""
        for probe in self._probes:
            await probe.__aenter__()
        if self._probes:
            self._sampler = asyncio.create_task(self._sample())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sampler is not None:
            self._sampler.cancel()
        for probe in self._probes:
            await probe.__aexit__(kind, error, trace)

    async def begin(self) -> None:
        self._peak = []
        self._before = await self._read()

    async def end(self) -> list[dict[str, Any]]:
        """``rss_bytes`` of each endpoint's row in ``level_end.target``."""
        after = await self._read()
        told = zip(self._before, self._peak, after, strict=True)
        return [{"rss_bytes": dict(zip(("before", "peak", "after"), figures, strict=True))} for figures in told]

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            await self._read()

    async def _read(self) -> list[int | None]:
        now = list(await asyncio.gather(*(self._fetch(place, probe) for place, probe in enumerate(self._probes))))
        peaks = zip(self._peak or now, now, strict=True)
        self._peak = [max((size for size in pair if size is not None), default=None) for pair in peaks]
        return now

    async def _fetch(self, place: int, probe: RemoteMemory) -> int | None:
        try:
            figures = await probe.fetch()
        except TargetError:
            return None
        level, phase = self._crew.place
        told = {name: value for name, value in figures.as_json().items() if name != "t_ns"}
        where = {"level": level, "phase": phase, "endpoint": place}
        self._crew.recorder.event(figures.t_ns, "host_memory", **where, **told)
        return figures.rss_bytes
