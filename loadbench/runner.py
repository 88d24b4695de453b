"""The order of things: target, models, levels, files. It measures nothing itself; what is next is ``course``'s."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path

from loadbench.afresh import outcome_of, start_afresh
from loadbench.aftermath import Canaries, Found, Site, TargetDiedError, bring_back, first_ms, record
from loadbench.course import Course, Sought, ask_whether_memory_shows, sought
from loadbench.engine.cluster import Cluster
from loadbench.engine.crew import Crew, workers_wanted
from loadbench.engine.merge import merge_shards
from loadbench.engine.recorder import Limits
from loadbench.engine.seat import Pipe
from loadbench.errors import TargetError, UsageError
from loadbench.hosts import Hosts
from loadbench.journal import ANSWERS, Journal
from loadbench.keep_warm import KeepWarm
from loadbench.lineup import Lineup
from loadbench.order import Order, open_target
from loadbench.platform import raise_open_file_limit
from loadbench.progress import Watch
from loadbench.quality_answers import append, collect
from loadbench.records import Level, Sample
from loadbench.report.live import View
from loadbench.scenario.memory import MemoryLadder
from loadbench.scenario.plan import levels as plan_levels
from loadbench.scenario.prompts import PromptMix
from loadbench.slots import Slots
from loadbench.stall import STALLED, Stall
from loadbench.target.models import Resolved
from loadbench.target.recovery import Recovery
from loadbench.target.target import Target
from loadbench.vigil import Vigil

MOST_DEATHS = 2  # of a model's levels in a row; the third would not be the one that it survives


class Run:
    """One run: a directory that fills while it goes on. `execute` does it all; `stop` ends it early and tidily."""

    def __init__(self, order: Order, view: View) -> None:
        self.order = order
        self.scenario = order.loaded.scenario
        if order.find is None and not order.quality_only:
            order.loaded.ask_owner(order.i_own_the_target)
        self._sought: Sought | None = None if order.find is None else sought(order.find, order.loaded)
        self._slots = None if order.start_at_wall_ns is None else Slots(order)
        own = {} if self._slots is None else self._slots.journal()
        self.journal = Journal(order.loaded, order.command, order.results, order.out, **own)
        self._watch = Watch(view, self.scenario.name, self.journal.clock)
        self._lineup = Lineup(order.loaded, self.journal, self._watch)
        self._crew: Crew | None = None
        self._cluster: Cluster | None = None
        self._levels: tuple[Level, ...] = ()
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
            if self._slots is not None:
                self._watch.say(self._slots.told())
                await self._slots.open(self.journal.clock)
            if self.order.cluster is not None:
                self._watch.say("joining the cluster")
                self._cluster = await Cluster.connect(self.order.cluster)
            target = await open_target(self.order.loaded, self.order.headers, self._watch.say)
            status, reason = await self._measure_all(target)
        except BaseException as error:  # Ctrl-C, too: whatever ends a run, what was measured is kept
            interrupted = isinstance(error, asyncio.CancelledError | KeyboardInterrupt)
            self._give_up(*("interrupted", None) if interrupted else ("failed", str(error) or type(error).__name__))
            raise
        finally:
            self._watch.stop()
            if target is not None:
                await asyncio.shield(target.close())
            if self._cluster is not None:
                await asyncio.shield(self._cluster.close())
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

    async def _measure_all(self, target: Target) -> tuple[str, str | None]:
        journal = self.journal
        journal.describe(target)
        self._levels = self._plan(await self._lineup.resolve(target))
        journal.facts["levels"] = [level.as_json() for level in self._levels]
        if self._slots is not None:
            self._slots.lay_out(self._levels)
            journal.facts["shard"] = self._slots.facts()
        journal.facts["find"] = None if self._sought is None else self._sought.as_json()
        limits = Limits.of(self.scenario.slo)
        self._watch.expect(self._levels, stream=self.scenario.request.stream, judged=limits is not None)
        death: str | None = None
        async with Crew(self.folder, journal.clock, journal.started_wall_ns, *self.order.shard) as crew:
            self._crew, self._watch.shard = crew, crew
            crew.recorder.limits = limits
            probe = self.scenario.target_probe if isinstance(self.scenario.target_probe, str) else None
            vigil = self._watch.vigil = Vigil(target, crew, probe)
            try:
                async with vigil, Hosts(() if probe else self.scenario.probes, crew) as hosts:
                    journal.facts["memory"] = vigil.facts()
                    if self._sought is None and self._levels:
                        ask_whether_memory_shows(self.scenario.stages, vigil)
                    await self._measure_models(self._site(target, crew, vigil, hosts))
            except TargetDiedError as died:
                death = str(died)
            finally:
                journal.facts["memory"] = vigil.facts()
            if self._cluster is not None:
                await self._cluster.read_clocks()
                journal.facts["cluster"] = self._cluster.facts()
        self._watch.say("putting the workers' files together" if crew.hired else None)
        journal.facts["torn"] = merge_shards(self.folder, journal.started_wall_ns)
        return ("target_died", death) if death is not None else self._how_it_ended(crew)

    def _site(self, target: Target, crew: Crew, vigil: Vigil, hosts: Hosts) -> Site:
        return Site(target, crew, vigil, Canaries(crew), hosts, per_user=self.scenario.balance == "per_user")

    async def _measure_models(self, site: Site) -> None:
        """One model after the other. TargetDiedError where that ends the run."""
        for place in self._lineup.models:
            failed: TargetError | None = None
            try:
                if (model := await self._lineup.enter(site, place)) is not None:
                    await self._measure_model(site, place, model)
            except TargetError as error:
                failed = await site.explained(error)
            except TargetDiedError:
                site.gone = True
                raise
            finally:  # a full disk and a second Ctrl-C leave nothing loaded either
                await asyncio.shield(self._lineup.leave(site, place))
            if failed is not None:
                self._lineup.fail(place, failed)
            if site.crew.stop_reason is not None:
                break

    def _plan(self, models: list[str]) -> tuple[Level, ...]:
        """The levels that are known beforehand: of a search none."""
        if self._sought is not None or self.order.quality_only:
            return ()
        return plan_levels(self.scenario, models, self.order.loaded.traces)

    def _how_it_ended(self, crew: Crew) -> tuple[str, str | None]:
        if crew.failure is not None:
            return "failed", crew.failure
        if crew.stop_reason is not None:
            return "interrupted", None
        return "complete", None

    async def _measure_model(self, site: Site, place: int, model: Resolved) -> None:
        """Try, warm up, and run the levels of a model that is loaded. TargetDiedError where its death ends the run."""
        target, crew = site.target, site.crew
        site.talk_to(model, self._lineup.wires(target, model))
        levels = [level for level in self._levels if level.model == model.id]
        synthetic = target.is_synthetic(self.scenario.models[place])
        mix = PromptMix(self.scenario, self.order.loaded.folder, 1.0 if synthetic else 4.0)
        first = levels[0].index if levels else len(self.journal.facts["levels"])
        last = await self._try_out(site, place, model, mix, first)
        if not self.order.quality_only:
            await self._hire(crew, [self._sought.highest] if self._sought is not None else levels, last)
        self.journal.write("running")
        await self._collect(crew, model.id, first)
        if not self.order.quality_only:
            await self._measure_levels(site, place, model, mix, levels)
        if self._slots is not None and self._lineup.several:
            await self._slots.over(levels[-1], crew)

    async def _measure_levels(
        self, site: Site, place: int, model: Resolved, mix: PromptMix, levels: list[Level]
    ) -> None:
        """One level of a model after the other."""
        target, crew, warm = site.target, site.crew, KeepWarm(site.crew, self.scenario.keep_warm_s)
        course, deaths, stillborn = Course(self.journal, self._watch, crew, site.vigil, warm), 0, 0
        found: Found | None = None
        async with contextlib.aclosing(self._steps(course, model.id, levels)) as steps:
            async for level in steps:
                if crew.stop_reason is not None:  # in a rest
                    return
                ladder = self._ladder_of(level)
                if target.foundry is not None and (ladder is not None or site.gone):
                    self._watch.say("starting the service afresh for the rung")
                    why = await start_afresh(site, self.scenario.models[place], level, self._lineup.wires)
                    self._watch.say(None)
                    stillborn = 0 if why is None else stillborn + 1
                    if why is not None and (ladder is None or stillborn == MOST_DEATHS):
                        raise TargetError(why)
                    if why is not None:
                        course.cannot_begin(level, why)
                        continue
                await site.rejoin(self.scenario.models[place], found)
                start_ns = None if self._slots is None else await self._slots.reach(level, mix, crew, warm)
                if crew.stop_reason is not None:  # on the way there
                    return
                course.found = found = await self._measure_level(site, mix, level, ladder, start_ns)
                if not found.dead:
                    deaths = 0
                    if crew.stop_reason is not None:
                        return
                elif self._is_answered(level):
                    site.gone = True
                else:
                    deaths += ladder is None
                    if not await self._goes_on(site, place, level, found, deaths):
                        course.give_up(level, levels, found.told(level))
                        break

    async def _collect(self, crew: Crew, model: str, level: int) -> None:
        """Ask a model the prompts whose answers are to be marked, where the scenario has some."""
        quality = self.scenario.quality
        if quality is None:
            return
        self._measured = True
        await collect(
            crew,
            model,
            self.order.loaded.quality_prompts,
            quality.repeats,
            quality.max_tokens or self.scenario.request.max_tokens,
            partial(append, self.folder / ANSWERS),
            level=level,
            progress=lambda done, of: self._watch.say(f"asking for quality: {done + 1} of {of}"),
        )
        self._watch.say(None)

    def _steps(self, course: Course, model: str, levels: list[Level]) -> AsyncGenerator[Level]:
        if self._sought is not None:
            return course.search(self._sought, model)
        return course.planned(levels, self.scenario.stages)

    def _ladder_of(self, level: Level) -> MemoryLadder | None:
        """The memory ladder that a level is a rung of."""
        return self.scenario.stages[level.stage].memory if level.purpose == "rung" else None

    def _is_answered(self, level: Level) -> bool:
        """Whether a death there is all that was still to be found out, by a run that is to stop at deaths."""
        if level.purpose != "rung" or self.scenario.on_target_death != "stop":
            return False
        place = (level.model, level.stage)
        return all((other.model, other.stage) == place for other in self._levels[level.index :])

    async def _goes_on(self, site: Site, place: int, level: Level, found: Found, deaths: int) -> bool:
        """Whether the model is measured on after a death; TargetDiedError where the run ends with it.

        What to do at a death is not said of one that the ladder was climbed for.
        """
        ladder, policy = self._ladder_of(level), self.scenario.on_target_death
        if ladder is not None and ladder.until_failure:
            policy = "restart"
        if policy == "stop" or site.crew.stop_reason is not None:
            search = "" if self._sought is None else ", which ends the search"
            raise TargetDiedError(found.told(level).replace(": ", f"{search}: ", 1))
        back = await self._bring_back(site, place, level, found)
        if site.crew.stop_reason is not None or (back.to_status_s is None and site.target.foundry is None):
            raise TargetDiedError(f"{found.told(level)}; {back.told()}")
        return back.back and deaths < MOST_DEATHS and policy == "restart"

    async def _bring_back(self, site: Site, place: int, level: Level, found: Found) -> Recovery:
        """How the target came to serve the model again; it is in the telemetry, too."""
        target, crew = site.target, site.crew
        restarted = target.foundry is not None
        self._watch.say("starting the service anew" if restarted else "waiting for the target to come back")

        async def canary(model: Resolved) -> Sample:
            site.talk_to(model, self._lineup.wires(target, model))
            return (await site.canaries.send(level.index))[0]

        asked = self.scenario.models[place]
        back = await bring_back(site, asked, level.index, canary)
        site.gone = not back.back
        record(crew, self._watch, level, found, restarted, back)
        self._watch.say(None)
        return back

    async def _hire(self, crew: Crew, levels: list[Level], last: Sample) -> None:
        """Start the load processes that ``--workers`` asks for; ``auto``: as many as the calibrated ceiling wants."""
        workers, cluster = self.order.workers, self._cluster
        if workers is None:
            ceiling = (self.journal.facts["calibration"] or {}).get("events_per_s")
            ceiling = ceiling and ceiling * self.order.shard[1]  # the others have their part of the load
            most = None if cluster is None else cluster.cpus
            workers = workers_wanted(levels, last, self.scenario.request.max_tokens, ceiling, most)
        if workers > 1 and any(level.max_in_flight is not None for level in levels):
            if self.order.workers is not None:
                raise UsageError("--workers: max_in_flight is one valve, which several processes cannot hold: use one")
            workers = 1
        if not crew.hired and (workers > 1 or cluster is not None):
            where = "" if cluster is None else " on the cluster"
            self._watch.say(f"starting {workers} load process{'' if workers == 1 else 'es'}{where}")
            start = Pipe.start if cluster is None else cluster.start
            await crew.hire(workers, self.scenario.public_json(), self.order.loaded.folder, start)
            self._watch.say(None)
        self.journal.facts["workers"] = crew.size
        if cluster is not None:
            self.journal.facts["cluster"] = cluster.facts()

    async def _try_out(self, site: Site, place: int, model: Resolved, mix: PromptMix, level: int) -> Sample:
        """One canary, which says whether the model can be served at all, then the warm-up; returns the last of it."""
        self._watch.say("sending a canary")
        canaries = await site.canaries.send(level)
        for canary, member in zip(canaries, site.target.members, strict=True):
            if canary.outcome != "ok":
                raise TargetError(f"{model.id} at {member.endpoint.url}: a canary failed: {outcome_of(canary)}")
        await self._lineup.answered(site, place, max(first_ms(canary) or 0.0 for canary in canaries) or None)
        last = canaries[0]
        draw = mix.draw(self.scenario.seed)
        for number in range(self.scenario.warmup.requests):
            if site.crew.stop_reason is None:
                self._watch.say(f"warm-up {number + 1} of {self.scenario.warmup.requests}")
                last = (await site.crew.each(next(draw), "warmup", level))[0]
        self._watch.say(None)
        return last

    async def _measure_level(
        self, site: Site, mix: PromptMix, level: Level, ladder: MemoryLadder | None, start_ns: int | None
    ) -> Found:
        target, crew, vigil = site.target, site.crew, site.vigil
        self._measured = True
        self._watch.begin(level)
        await vigil.begin(level, ladder)
        await site.hosts.begin()
        began_s = target.cpu_s()
        patience_s = self.scenario.deadlines.first_token_s if self.scenario.canary else None
        async with Stall(crew, site.canaries, level, patience_s) as stall:
            client = await crew.measure(level, mix, self.scenario.drain_s, start_ns)
        ended_s = target.cpu_s()
        counters = crew.counters()
        self._watch.end(level)
        canaries, ended_by = stall.canaries, STALLED if stall.canaries else crew.reason
        if self._slots is not None and not canaries and ended_by != "target_died":
            await self._slots.over(level, crew)  # or our canary would come beside what other shards have in flight
        if not canaries and self.scenario.canary and crew.stop_reason is None:
            self._watch.say("sending a canary")
            canaries = await site.canaries.after(level)
            self._watch.say(None)
        found = await site.found(canaries, counters, ended_by, rung=ladder is not None)
        await vigil.end()
        crew.recorder.event(
            self.journal.clock.now_ns(),
            "level_end",
            level=level.index,
            complete=crew.stop_reason is None and not found.dead and vigil.cut is None,
            target={
                "state": found.state,
                "evidence": found.evidence,
                "endpoints": found.rows(await site.hosts.end()),
                **vigil.level_facts(),
                "cpu_s": None if began_s is None or ended_s is None else round(ended_s - began_s, 3),
            },
            client=client,
        )
        if "restarted" in (found.state, *(state for state, _ in found.endpoints)):
            await site.look_again()
        return found
