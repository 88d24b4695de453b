"""Fills the live view while a run goes on, from the shard's counters; what a run comes to is analysis' job."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from loadbench.analysis.stats import LEASTS
from loadbench.engine.load import Clock
from loadbench.engine.shard import Shard
from loadbench.records import Level, load_title
from loadbench.report.frame import Bracket, LevelProgress, Progress
from loadbench.report.live import View
from loadbench.vigil import Vigil

RATE_WINDOW_NS = 5_000_000_000
"""Rates "now" are those of the last five seconds: long enough to be calm, short enough to see a stall."""


class Watch:
    """What the view is told. The runner says where it is; ``shard`` and ``vigil`` are read for the figures.

    ``restarts`` counts how often the target was started anew after a death.
    """

    def __init__(self, view: View, name: str, clock: Clock) -> None:
        self.shard: Shard | None = None
        self.vigil: Vigil | None = None
        self.restarts = 0
        self._view = view
        self._name = name
        self._clock = clock
        self._levels: list[LevelProgress] = []
        self._planned: list[Level] = []
        self._search: Bracket | None = None
        self._searching = False
        self._judged = False
        self._current: Level | None = None
        self._message: str | None = None
        self._streamed = True
        self._marks: deque[tuple[int, int, int]] = deque()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._view.start()
        self._task = asyncio.create_task(self._refresh())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
            self._view.stop()

    def expect(self, levels: tuple[Level, ...], *, stream: bool, judged: bool = False) -> None:
        """These levels will come. ``judged``: it is told how many requests are good."""
        self._planned, self._streamed, self._judged = list(levels), stream, judged
        self._levels = [LevelProgress(load_title(level.load), level.model) for level in levels]

    def add(self, level: Level) -> None:
        """This level will come, too."""
        self._planned.append(level)
        self._levels.append(LevelProgress(load_title(level.load), level.model))

    def close_in(self, search: Bracket | None) -> None:
        """Where the search is, None: it is over."""
        self._search, self._searching = search, True
        self._view.update(self._progress())

    def judge(self, level: Level, result: str) -> None:
        """What the search makes of a level."""
        self._levels[level.index] = replace(self._levels[level.index], result=result)
        self._view.update(self._progress())

    def leave_out(self, levels: Sequence[int]) -> None:
        """These will not come after all."""
        for index in levels:
            self._levels[index] = replace(self._levels[index], left_out=True)
        self._view.update(self._progress())

    def give_up(self, model: str) -> None:
        """Nor will what is left of this model."""
        self.leave_out([at for at, level in enumerate(self._levels) if level.model == model and not level.ended])

    def note(self, text: str) -> None:
        """One line that stays."""
        self._view.note(text)

    def say(self, message: str | None) -> None:
        self._message = message
        self._view.update(self._progress())

    def begin(self, level: Level) -> None:
        self._current = level
        self._marks.clear()
        self._marks.append((self._clock.now_ns(), 0, 0))

    def end(self, level: Level) -> None:
        """The level is over: its line keeps its figures as a whole until the report has better ones."""
        assert self.shard is not None
        progress, counters, issued_s = self._progress(), self.shard.counters(), self.shard.issued_s
        # Where most answers came in the drain the report's window reaches into that: its figures are then others.
        told = issued_s > 0 and 2 * counters.ok_in_time >= counters.outcomes["ok"]
        self._levels[level.index] = replace(
            self._levels[level.index],
            ended=True,
            requests_per_s=counters.ok_in_time / issued_s if told else None,
            tokens_per_s=counters.chunks_in_time / issued_s if told and self._streamed else None,
            p50_ms=progress.p50_ms,
            p95_ms=progress.p95_ms,
            failed=sum(progress.failures.values()),
            good_share=progress.good_share,
        )
        self._current = None
        self._view.update(self._progress())

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(self._view.interval_s)
            self._view.update(self._progress())

    def _progress(self) -> Progress:
        now_ns, shard, level = self._clock.now_ns(), self.shard, self._current
        base = Progress(
            name=self._name,
            levels=tuple(self._levels),
            current=None if level is None else level.index,
            phase=self._phase(),
            elapsed_s=now_ns / 1e9,
            remaining_s=self._remaining_s(now_ns),
            latency="TTFT" if self._streamed else "E2E",
            target_rss_bytes=None if shard is None else shard.target_rss,
            memory=None if self.vigil is None else self.vigil.shown(),
            restarts=self.restarts,
            message=self._message,
            search=self._search,
        )
        if shard is None or level is None:
            return base
        counters, sickest = shard.counters(), shard.sickest()
        since_ns, ok, chunks = self._mark(now_ns, counters.outcomes["ok"], counters.chunks)
        elapsed_s = (now_ns - since_ns) / 1e9
        histogram = counters.ttft if self._streamed else counters.e2e
        p50_ns = histogram.percentile(50)
        p95_ns = histogram.percentile(95) if histogram.total >= LEASTS["p95"] else None
        return replace(
            base,
            share=_share(level, shard.start_ns, counters.issued, now_ns),
            in_flight=counters.in_flight,
            sickest=None if sickest is None else (sickest[0], sickest[1] / 1e6),
            requests_per_s=(counters.outcomes["ok"] - ok) / elapsed_s if elapsed_s > 0 else None,
            tokens_per_s=(counters.chunks - chunks) / elapsed_s if elapsed_s > 0 and self._streamed else None,
            p50_ms=None if p50_ns is None else p50_ns / 1e6,
            p95_ms=None if p95_ns is None else p95_ns / 1e6,
            failures={name: n for name, n in counters.outcomes.items() if name != "ok"},
            good_share=counters.good / counters.ended if self._judged and counters.ended else None,
        )

    def _phase(self) -> str:
        if self.shard is not None and self._current is not None:
            return self.shard.phase
        return "between levels" if any(level.ended for level in self._levels) else "setting up"

    def _mark(self, now_ns: int, ok: int, chunks: int) -> tuple[int, int, int]:
        """Note where the counters are; returns the oldest note inside the rate's window."""
        marks = self._marks
        marks.append((now_ns, ok, chunks))
        while len(marks) > 2 and marks[1][0] < now_ns - RATE_WINDOW_NS:
            marks.popleft()
        return marks[0]

    def _remaining_s(self, now_ns: int) -> float | None:
        """Time left of the levels whose length the clock decides; None where one of them ends by count, or in a search,
        of which nobody knows how many levels it takes."""
        if self._searching:
            return None
        left_s = 0.0
        for level, shown in zip(self._planned, self._levels, strict=True):
            if shown.ended or shown.left_out:
                continue
            if level.duration_s is None:
                return None
            left_s += level.duration_s
        start_ns = self.shard.start_ns if self.shard is not None else None
        if self._current is not None and start_ns is not None and self._current.duration_s is not None:
            left_s -= min(self._current.duration_s, (now_ns - start_ns) / 1e9)
        return left_s if self._planned else None


def _share(level: Level, start_ns: int | None, issued: int, now_ns: int) -> float | None:
    """How much of the level is done: by the clock or by count, whichever is further, but not without its least."""
    if start_ns is None:
        return None
    elapsed_s = (now_ns - start_ns) / 1e9
    shares = [elapsed_s / level.duration_s] if level.duration_s else []
    shares += [issued / level.requests] if level.requests else []
    done = [max(shares)] if shares else []
    done += [issued / level.min_requests] if shares and level.min_requests else []
    share = min(done) if done else None
    if share is not None and level.at_most_s:
        share = max(share, elapsed_s / level.at_most_s)
    return None if share is None else min(1.0, share)
