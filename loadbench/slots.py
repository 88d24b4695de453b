"""When the levels of a shard begin that runs by itself: it follows from the scenario and one time of the wall clock.

Such shards never speak with each other. Each waits for the same moment by its own clock, which NTP is to keep right,
and from then on reads its monotonic clock like every run.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from datetime import datetime
from time import perf_counter_ns
from typing import Any

from loadbench.engine.crew import HEAD_START_NS, Crew
from loadbench.engine.load import Clock
from loadbench.errors import UsageError
from loadbench.keep_warm import KeepWarm
from loadbench.order import Order
from loadbench.platform import clock_id
from loadbench.records import Level
from loadbench.scenario.plan import LEAD_S, Slot, refuse_shards, slots
from loadbench.scenario.prompts import PromptMix

FURTHEST_S = 24 * 3600.0  # what is further away is a slip, or a number of milliseconds
PREPARE_S = 2.0
"""Before its slot a level is made ready: a thousand connections take a tenth of that, and servers close idle ones after
five seconds."""

LOOK_S = 1.0  # the wall clock is asked again: NTP may move it while we wait


class Slots:
    """The slots of one shard. ``zero_wall_ns`` is when its run's clock, like every other shard's, begins at 0."""

    def __init__(self, order: Order) -> None:
        """UsageError where the scenario is not for shards, and where the time to start is too near."""
        self.index, self.count = order.shard
        assert order.start_at_wall_ns is not None
        if order.find is not None:
            raise UsageError("--find: expected no --shard beside it: a search is decided in one place")
        if order.cluster is not None:
            raise UsageError("--cluster: expected no --shard beside it: its workers are shards already")
        refuse_shards(order.loaded.scenario)
        away_s = (order.start_at_wall_ns - time.time_ns()) / 1e9
        if not LEAD_S <= away_s <= FURTHEST_S:
            got = f"{away_s:.0f} s from now" if away_s >= 0 else f"{-away_s:.0f} s ago"
            raise UsageError(
                f"--start-at: expected a time from {LEAD_S:g} s, in which to get ready, to a day from now, got {got}"
            )
        self.zero_wall_ns = order.start_at_wall_ns - int(LEAD_S * 1e9)
        self._scenario = order.loaded.scenario
        self._slots: tuple[Slot, ...] = ()

    @property
    def name(self) -> str:
        return f"shard {self.index}/{self.count}"

    def told(self) -> str:
        return f"{self.name} waits until {datetime.fromtimestamp(self.zero_wall_ns / 1e9):%H:%M:%S}"

    def journal(self) -> dict[str, Any]:
        """What the run's directory has of its own."""
        return {"zero_wall_ns": self.zero_wall_ns, "suffix": f"-shard-{self.index}-of-{self.count}"}

    def facts(self) -> dict[str, Any]:
        """``shard`` of run.json. ``machine``: whose clock it went by."""
        return {"index": self.index, "count": self.count, "machine": clock_id()}

    def lay_out(self, levels: Sequence[Level]) -> None:
        self._slots = slots(self._scenario, levels)

    async def open(self, clock: Clock) -> None:
        """Wait for the zero, and have the clock begin there."""
        while (left_s := (self.zero_wall_ns - time.time_ns()) / 1e9) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(left_s, LOOK_S))  # a clock that is set sets no event
        clock.origin_ns = perf_counter_ns() - (time.time_ns() - self.zero_wall_ns)

    async def reach(self, level: Level, mix: PromptMix, crew: Crew, warm: KeepWarm) -> int | None:
        """Return shortly before a level is to begin, and when that is; None where the run was stopped, or is too late.

        A shard that is late would measure another load than the others think: the run ends there, and is invalid.
        """
        start_ns = int(self._slots[level.index].start_s * 1e9)
        if crew.hired:
            await crew.get_ready(level, mix)
        await warm.rest((start_ns - crew.clock.now_ns()) / 1e9 - PREPARE_S, level.index)
        late_s = (crew.clock.now_ns() + HEAD_START_NS - start_ns) / 1e9
        if crew.stop_reason is None and late_s > 0:
            crew.failure = f"{self.name} was not ready for level {level.index} at its time: {late_s:.1f} s too late"
            crew.stop("late")
        return start_ns if crew.stop_reason is None else None

    async def over(self, level: Level, crew: Crew) -> None:
        """Return when this level is over on every shard."""
        await crew.rest(max(0.0, self._slots[level.index].end_s - crew.clock.now_ns() / 1e9))


def shard_of(text: str | None) -> tuple[int, int]:
    """``--shard 3/8``: the fourth of eight. None: all of the run."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text or "0/1")
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(f"--shard: expected a number and how many there are, from 0/8 to 7/8, got {text}")
    return int(match[1]), int(match[2])


def moment_of(text: str | None, shard: str | None) -> int | None:
    """``--start-at`` in nanoseconds of the wall clock: an RFC 3339 time, or seconds since 1970.

    No time from now: each shard would reckon it from its own start, and no two would have the same.
    """
    if (text is None) != (shard is None):
        got = "--shard" if text is None else "--start-at"
        raise UsageError(f"{got}: expected --shard I/N and --start-at TIME together, got one of them")
    if text is None:
        return None
    if re.fullmatch(r"\d{1,12}(\.\d+)?", text):
        return int(float(text) * 1e9)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise UsageError(
            "--start-at: expected a time such as 2026-11-22T14:20:00Z or seconds since 1970, the same for all shards,"
            f" got {text}"
        )
    return round(moment.timestamp() * 1e6) * 1000
