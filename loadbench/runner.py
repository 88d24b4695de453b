"""The order of things: target, models, levels, files. It measures nothing itself; what is next is ``course``'s."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadbench.course import Course, Find, Sought, sought
from loadbench.engine.crew import Crew, workers_wanted
from loadbench.engine.exchange import Wire
from loadbench.engine.merge import merge_shards
from loadbench.engine.recorder import Limits
from loadbench.errors import TargetError, UsageError
from loadbench.journal import Journal
from loadbench.platform import raise_open_file_limit
from loadbench.progress import Watch
from loadbench.records import Level, Prompt, Sample
from loadbench.report.live import View
from loadbench.scenario.load import Loaded
from loadbench.scenario.plan import levels as plan_levels
from loadbench.scenario.prompts import PromptMix
from loadbench.scenario.schema import EMBEDDED
from loadbench.target.models import Resolved
from loadbench.target.state import DEAD
from loadbench.target.target import Target

CANARY = Prompt("canary", 0, ({"role": "user", "content": "Say hello."},), 8)
"""Small enough to answer in a moment on anything, long enough to need more than one token."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the command line asks for besides the scenario. ``headers`` may hold a key and are never written.

    ``workers`` is the number of load processes, None: as many as the calibrated ceiling asks for. ``find``: search for
    that instead of measuring the stages.
    """

    loaded: Loaded
    results: Path
    out: Path | None
    command: str
    headers: Mapping[str, str]
    workers: int | None = 1
    find: Find | None = None


class Run:
    """One run: a directory that fills while it goes on. `execute` does it all; `stop` ends it early and tidily."""

    def __init__(self, order: Order, view: View) -> None:
        self.order = order
        self.scenario = order.loaded.scenario
        self._sought: Sought | None = None if order.find is None else sought(order.find, order.loaded)
        self.journal = Journal(order.loaded, order.command, order.results, order.out)
        self._watch = Watch(view, self.scenario.name, self.journal.clock)
        self._crew: Crew | None = None
        self._measured = False

    @property
    def folder(self) -> Path:
        return self.journal.folder

    def stop(self, reason: str) -> bool:
        """End early: nothing is started any more, what is in flight may finish, everything is written.

        False where nothing has been measured yet: there is nothing to wait for.
        """
        if not self._measured:
            return False
        self._watch.say("stopping: waiting for what is in flight (Ctrl-C again quits)")
        if self._crew is not None:
            self._crew.stop(reason)
        return True

    async def execute(self) -> str:
        """Run to the end; returns the status that was written. LoadbenchError: nothing could be measured."""
        raise_open_file_limit()
        target: Target | None = None
        try:
            self._watch.start()
            target = await self._open_target()
            status, reason = await self._measure_all(target)
        except BaseException as error:
            interrupted = isinstance(error, asyncio.CancelledError | KeyboardInterrupt)
            self._give_up(*("interrupted", None) if interrupted else ("failed", str(error) or type(error).__name__))
            raise
        finally:
            self._watch.stop()
            if target is not None:
                await asyncio.shield(target.close())
        self.journal.write(status, reason, ended=True)
        if self._crew is not None and self._crew.stop_reason == "disk_failure":
            raise UsageError(f"{reason}; what was measured until then is kept")
        return status

    def _give_up(self, status: str, reason: str | None) -> None:
        """Before the first measured request nothing of ours is left behind; after it everything is kept."""
        if self._measured:
            self.journal.write(status, reason, ended=True)
        else:
            self.journal.abandon()

    async def _open_target(self) -> Target:
        scenario, source = self.scenario, self.order.loaded.endpoint_source
        if scenario.endpoint == EMBEDDED:
            self._watch.say("starting an embedded Foundry Local")
            return await Target.embedded(scenario.models, source)
        self._watch.say(f"asking {scenario.redacted().endpoint} what it is")
        said = {
            name.lower() for name in scenario.request.headers
        }  # HTTP does not tell Authorization from authorization
        ours = {name: value for name, value in self.order.headers.items() if name.lower() not in said}
        return await Target.at(scenario.endpoint, source, {**ours, **scenario.request.headers})

    async def _measure_all(self, target: Target) -> tuple[str, str | None]:
        journal = self.journal
        journal.describe(target)
        models = await self._resolve(target)
        levels = self._plan([model.id for model in models.values()])
        journal.facts["levels"] = [level.as_json() for level in levels]
        journal.facts["find"] = None if self._sought is None else self._sought.as_json()
        limits = Limits.of(self.scenario.slo)
        self._watch.expect(levels, stream=self.scenario.request.stream, judged=limits is not None)
        death: str | None = None
        async with Crew(self.folder, journal.clock, journal.started_wall_ns, target.rss_bytes) as crew:
            self._crew, self._watch.shard = crew, crew
            crew.recorder.limits = limits
            for place, model in models.items():
                mine = [level for level in levels if level.model == model.id]
                try:
                    death = await self._measure_model(target, crew, place, model, mine)
                except TargetError as error:
                    self._fail_model(place, error)
                if death is not None or crew.stop_reason is not None:
                    break
        self._watch.say("putting the workers' files together" if crew.size > 1 else None)
        merge_shards(self.folder, journal.started_wall_ns)
        return ("target_died", death) if death is not None else self._how_it_ended(crew)

    def _plan(self, models: list[str]) -> tuple[Level, ...]:
        """The levels that are known beforehand: of a search none."""
        return () if self._sought is not None else plan_levels(self.scenario, models, self.order.loaded.traces)

    async def _resolve(self, target: Target) -> dict[int, Resolved]:
        """The models that there are, by their place in the scenario. TargetError where there is none of them."""
        models: dict[int, Resolved] = {}
        for place, asked in enumerate(self.scenario.models):
            try:
                model = await target.resolve(asked)
            except TargetError as error:
                self._fail_model(place, error)
                continue
            for other, known in models.items():
                if known.id == model.id:
                    names = f"{self.scenario.models[other]} and {asked}"
                    raise UsageError(f"models: expected each model once, got {model.id} as {names}")
            models[place] = model
            self.journal.facts["models"][place] |= {"id": model.id, "how": model.how}
        return models

    def _fail_model(self, place: int, error: TargetError) -> None:
        """Give the model a row with the reason and let the others go on; where none is left, that is the end."""
        rows = self.journal.facts["models"]
        rows[place] |= {"status": "failed", "reason": str(error)}
        if all(row["status"] == "failed" for row in rows):
            raise error

    def _how_it_ended(self, crew: Crew) -> tuple[str, str | None]:
        if crew.failure is not None:
            return "failed", crew.failure
        if crew.stop_reason is not None:
            return "interrupted", None
        return "complete", None

    async def _measure_model(
        self, target: Target, crew: Crew, place: int, model: Resolved, levels: list[Level]
    ) -> str | None:
        """Load, try, warm up, and run the levels of one model; how the target died, where it did."""
        row = self.journal.facts["models"][place]
        self._watch.say(f"loading {model.id}")
        model = await target.load(model)
        crew.talk_to(self._wire(target, model))
        mix = PromptMix(self.scenario, self.order.loaded.folder, 1.0 if row["synthetic"] else 4.0)
        first = levels[0].index if levels else len(self.journal.facts["levels"])
        last = await self._try_out(crew, model, row, mix, first)
        await self._hire(crew, [self._sought.highest] if self._sought is not None else levels, last)
        self.journal.write("running")
        async with contextlib.aclosing(self._course(crew, model.id, levels)) as course:
            async for level in course:
                if crew.stop_reason is not None:  # in a rest
                    break
                state, evidence = await self._measure_level(target, crew, mix, level)
                if state in DEAD:
                    search = "" if self._sought is None else ", which ends the search"
                    return f"{state} after level {level.index}{search}: {'; '.join(evidence)}"
                if crew.stop_reason is not None:
                    break
        if len(self.journal.facts["models"]) > 1 and crew.stop_reason is None:
            await target.unload(model)  # two models must not share the memory
        return None

    def _course(self, crew: Crew, model: str, levels: list[Level]) -> AsyncGenerator[Level]:
        course = Course(self.journal, self._watch, crew)
        if self._sought is not None:
            return course.search(self._sought, model)
        return course.planned(levels, self.scenario.stages)

    async def _hire(self, crew: Crew, levels: list[Level], last: Sample) -> None:
        """Start the load processes that ``--workers`` asks for; ``auto``: as many as the calibrated ceiling wants."""
        workers = self.order.workers
        if workers is None:
            ceiling = (self.journal.facts["calibration"] or {}).get("events_per_s")
            workers = workers_wanted(levels, last, self.scenario.request.max_tokens, ceiling)
        if workers > 1 and any(level.max_in_flight is not None for level in levels):
            if self.order.workers is not None:
                raise UsageError("--workers: max_in_flight is one valve, which several processes cannot hold: use one")
            workers = 1
        if crew.size == 1 and workers > 1:
            self._watch.say(f"starting {workers} load processes")
            await crew.hire(workers, self.scenario.public_json(), self.order.loaded.folder)
        self.journal.facts["workers"] = crew.size

    async def _try_out(self, crew: Crew, model: Resolved, row: dict[str, Any], mix: PromptMix, level: int) -> Sample:
        """One canary, which says whether the model can be served at all, then the warm-up; returns the last of it."""
        self._watch.say("sending a canary")
        canary = last = await crew.one(CANARY, "canary", level)
        if canary.outcome != "ok":
            found = canary.outcome + (f": {canary.detail}" if canary.detail else "")
            raise TargetError(f"{model.id} at {self.journal.facts['endpoint']['url']}: a canary failed: {found}")
        row.update(load_ms=model.load_ms, first_ms=_first_ms(canary), status="ok", how=model.how)
        draw = mix.draw(self.scenario.seed)
        for number in range(self.scenario.warmup.requests):
            if crew.stop_reason is None:
                self._watch.say(f"warm-up {number + 1} of {self.scenario.warmup.requests}")
                last = await crew.one(next(draw), "warmup", level)
        self._watch.say(None)
        return last

    async def _measure_level(self, target: Target, crew: Crew, mix: PromptMix, level: Level) -> tuple[str, list[str]]:
        self._measured = True
        self._watch.begin(level)
        target.rss_bytes(relist=True)
        before, began_s = crew.read_target_rss(), target.cpu_s()
        client = await crew.measure(level, mix, self.scenario.drain_s)
        ended_s = target.cpu_s()
        counters = crew.counters()
        attempted, failed = counters.attempted, {name: n for name, n in counters.outcomes.items() if name != "ok"}
        self._watch.end(level)
        canary = None
        if self.scenario.canary and crew.stop_reason is None:
            self._watch.say("sending a canary")
            canary = await crew.one(CANARY, "canary", level.index)
            self._watch.say(None)
        state, evidence = await target.state(canary, failed, attempted=attempted, ended_by=crew.reason)
        after = crew.read_target_rss()
        crew.recorder.event(
            self.journal.clock.now_ns(),
            "level_end",
            level=level.index,
            complete=crew.stop_reason is None and state not in DEAD,
            target={
                "state": state,
                "evidence": evidence,
                "rss_bytes": {"before": before, "peak": crew.target_rss_peak, "after": after},
                "cpu_s": None if began_s is None or ended_s is None else round(ended_s - began_s, 3),
            },
            client=client,
        )
        return state, evidence

    def _wire(self, target: Target, model: Resolved) -> Wire:
        address, request, deadlines = target.endpoint.address, self.scenario.request, self.scenario.deadlines
        return Wire(
            host=address.ip,
            port=address.port,
            authority=address.host_header,
            path=model.chat_path,
            tls=address.scheme == "https",
            model=model.id,
            stream=request.stream,
            temperature=request.temperature,
            first_token_s=deadlines.first_token_s,
            total_s=deadlines.total_s,
            headers=target.headers,
            extra=request.extra,
        )


def _first_ms(sample: Sample) -> float | None:
    """Service time to the first token, in milliseconds."""
    if sample.first_token_ns is None or sample.sent_ns is None:
        return None
    return (sample.first_token_ns - sample.sent_ns) / 1e6
