"""Keeps a model warm while nothing is measured: a light prompt whenever it has been idle for so long."""

from __future__ import annotations

from dataclasses import replace

from loadbench.aftermath import CANARY
from loadbench.engine.crew import Crew

PHASE = "keep_warm"
"""Of the samples, which count in no figure."""


class KeepWarm:
    """Rests that are no longer idle than ``idle_s``; None: as long as they are."""

    def __init__(self, crew: Crew, idle_s: float | None) -> None:
        self._crew = crew
        self._idle_s = idle_s
        self._sent = 0

    async def rest(self, seconds: float, level: int) -> None:
        """Ask for nothing that counts for so long, after this level; a stop ends it at once.

        The level that follows does not begin before the last light prompt is answered, however long that takes.
        """
        crew, idle_s = self._crew, self._idle_s
        until_ns = crew.clock.now_ns() + int(seconds * 1e9)
        while (left_s := (until_ns - crew.clock.now_ns()) / 1e9) > 0 and crew.stop_reason is None:
            if idle_s is None or left_s <= idle_s:
                await crew.rest(left_s)
                continue
            await crew.rest(idle_s)
            if crew.stop_reason is None:
                await crew.each(replace(CANARY, index=self._sent), PHASE, level)
                self._sent += 1
