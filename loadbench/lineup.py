"""The models of a run: which they are, in what order, how each comes into the service's memory and leaves it again.

Each has its row of run.json, whatever becomes of it. What is asked of a model is ``runner``'s.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from loadbench.aftermath import Site
from loadbench.engine.crew import Crew
from loadbench.engine.exchange import Wire
from loadbench.errors import TargetError, UsageError
from loadbench.journal import Journal
from loadbench.progress import Watch
from loadbench.report.models import Pace
from loadbench.scenario.load import Loaded
from loadbench.scenario.plan import order_of_models
from loadbench.scenario.schema import Scenario
from loadbench.target.control import UNANSWERED
from loadbench.target.models import Resolved
from loadbench.target.target import Target

T = TypeVar("T")


class Lineup:
    """The models in the order in which they are measured. ``models`` has those that were found, by their places.

    Of a service of ours each gets a process of its own: one that has unloaded a model keeps a part of what it took
    (of 100 MB three quarters), and what the next one takes could not be told. Of another service, what was loaded
    before the run stays loaded, and what the run has loaded is unloaded.
    """

    def __init__(self, loaded: Loaded, journal: Journal, watch: Watch) -> None:
        self.models: dict[int, Resolved] = {}
        self._loaded = loaded
        self._journal = journal
        self._watch = watch
        self._step: str | None = None
        self._paths: dict[int, Path] = {}
        self._used = False
        self._ours = False
        self._loading = False

    @property
    def several(self) -> bool:
        return len(self._loaded.scenario.models) > 1

    async def resolve(self, target: Target) -> list[str]:
        """Find them; returns their ids. TargetError where there is none of them, UsageError for one named twice."""
        places = order_of_models(self._loaded.scenario)
        self._journal.facts["model_order"] = places
        for place in places:
            self._watch.say(f"looking for {self._loaded.scenario.models[place]}")
            self._step = "resolve"
            try:
                model = await target.resolve(self._loaded.scenario.models[place])
                if self.several and model.load_ms is not None:  # Foundry 2 tells what an alias means by loading it
                    await target.unload(model)
                    model = model.unloaded()
                self._refuse_twice(place, model)
            except TargetError as error:
                self.fail(place, error)
                continue
            self.models[place] = model
            self._row(place).update(id=model.id, how=model.how, **await self._known(target, place, model))
        return [model.id for model in self.models.values()]

    async def enter(self, site: Site, place: int) -> Resolved | None:
        """Have a model downloaded where it must be, and loaded; None: the run was ended meanwhile. TargetError: it
        cannot be had.
        """
        target, crew, asked, row = site.target, site.crew, self._loaded.scenario.models[place], self._row(place)
        self._step = "load"
        if self._used and target.foundry is not None:
            self._watch.say("starting the service afresh for the next model")
            await site.restart()
        else:
            await site.revive()
        model = await target.resolve(asked) if site.moved else self.models[place]
        self._step = "download"
        told = telling(model.id, row["size_bytes"], self._watch.say)
        row["downloaded_ms"] = await unless_stopped(crew, target.pull(asked, told, say=self._watch.note))
        if row["downloaded_ms"] is not None:
            model = await target.resolve(asked)
            row.update(await self._known(target, place, model))
        if crew.stop_reason is not None:
            return None
        self._step = "load"
        self._watch.say(f"loading {model.id}")
        row["rss_idle_bytes"] = None if model.loaded else await site.vigil.rss_bytes()
        was_loaded, self._used = model.loaded, True
        # A service that is not ours goes on loading whoever leaves: what it loads for us is waited for, and unloaded.
        self._ours = self._loading = target.foundry is None and not model.loaded
        site.model = model
        try:
            loaded = await (target.load(model) if target.foundry is None else unless_stopped(crew, target.load(model)))
        except TargetError as error:
            self._loading = self._loading and UNANSWERED in str(error)
            raise
        self._loading = False
        if loaded is None:
            return None
        site.model, self._ours = loaded, not was_loaded or loaded.load_ms is not None
        if crew.stop_reason is not None:
            return None
        if self.several and not self._ours:
            loaded = replace(loaded, how=f"{loaded.how}; it was loaded before the run and stays so")
        self._step = "answer"
        row.update(how=loaded.how, load_ms=loaded.load_ms)
        return loaded

    async def answered(self, site: Site, place: int, first_ms: float | None) -> None:
        """It has given its first answer, whose first token came after so long."""
        self._step = None
        held = await site.vigil.rss_bytes()
        self._row(place).update(status="ok", reason=None, first_ms=first_ms, rss_loaded_bytes=held)

    async def leave(self, site: Site, place: int) -> None:
        """Unload what this run has loaded, where it has several models: two must not share the memory."""
        ours, loading, self._ours, self._loading = self._ours, self._loading, False, False
        if not ours or not self.several or site.gone or site.model is None:
            return
        foundry = site.target.foundry
        if foundry is not None and (site.crew.stop_reason is not None or not foundry.alive()):
            return  # it ends, or has ended, with all that it has loaded
        self._watch.say(f"unloading {site.model.id}")
        try:
            await site.target.unload_patiently(site.model, loading=loading)
        except TargetError as error:
            if foundry is not None:
                site.gone = True  # the next model has a process of its own
            else:
                self._row(place)["how"] = f"{self._row(place)['how']}; it stays loaded: {error}"
                self._watch.note(f"{site.model.id} stays loaded: {error}")
        self._watch.say(None)

    def fail(self, place: int, error: TargetError) -> None:
        """Give the model's row the reason and let the others go on; where none is left, that is the end."""
        rows, row, reason = self._journal.facts["models"], self._row(place), str(error)
        if place in self._paths:  # where it lies on this disk is nothing for results that are shown around
            reason = reason.replace(f"{self._paths[place]}{os.sep}", "")
        reason = reason.removeprefix(f"{row['asked']}: ").removeprefix(f"{row['id']}: ")
        row.update(status="failed", failed_at=self._step, reason=reason)
        if all(other["status"] == "failed" for other in rows):
            named = [f"{other['id'] or other['asked']}: {other['reason']}" for other in rows]
            raise error if len(rows) == 1 else TargetError("; ".join(named)) from error
        self._watch.note(f"{row['id'] or row['asked']} failed{f' at {self._step}' if self._step else ''}: {reason}")
        self._watch.give_up(row["id"])
        self._journal.write("running")

    def wires(self, target: Target, model: Resolved) -> tuple[Wire, ...]:
        """How a model is asked at each endpoint."""
        scenario, members = self._loaded.scenario, target.members
        wires = (wire_of(scenario, member, one) for member, one in zip(members, model.each, strict=True))
        return tuple(replace(wire, endpoint=place) if len(members) > 1 else wire for place, wire in enumerate(wires))

    def _row(self, place: int) -> dict[str, Any]:
        row: dict[str, Any] = self._journal.facts["models"][place]
        return row

    def _refuse_twice(self, place: int, model: Resolved) -> None:
        for other, known in self.models.items():
            if known.id == model.id:
                first, second = (self._loaded.scenario.models[at] for at in sorted((other, place)))
                raise UsageError(f"models: expected each model once, got {model.id} as {first} and {second}")

    async def _known(self, target: Target, place: int, model: Resolved) -> dict[str, Any]:
        """What the service says of it, and the scenario's models file where that says nothing."""
        info = None
        with suppress(TargetError):  # no model is worse for what is not known of it
            info = await target.info(model)
        if info is not None and info.path is not None:
            self._paths[place] = info.path
        note = self._loaded.note_of(self._loaded.scenario.models[place])
        plain = ("alias", "device", "execution_provider", "licence", "size_bytes", "capabilities")
        known = {name: getattr(info, name, None) for name in plain}
        if note is not None:
            known["capabilities"] = known["capabilities"] or note.capabilities
            known["size_bytes"] = note.size_bytes if known["size_bytes"] is None else known["size_bytes"]
        return known | {"capabilities": list(known["capabilities"] or ())}


def wire_of(scenario: Scenario, target: Target, model: Resolved) -> Wire:
    """How a model is asked by this scenario."""
    address, request, deadlines = target.endpoint.address, scenario.request, scenario.deadlines
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


def telling(name: str, size_bytes: int | None, say: Callable[[str], None]) -> Callable[[float], None]:
    """What is called with the percents of a download, and tells of each."""
    pace = Pace(size_bytes)
    return lambda percent: say(" · ".join([f"downloading {name}", *pace.told(percent, monotonic())]))


async def unless_stopped(crew: Crew, work: Awaitable[T]) -> T | None:
    """What comes of it; None where the run was ended meanwhile, and the work given up."""
    doing, stop = asyncio.ensure_future(work), asyncio.ensure_future(crew.stopped())
    try:
        await asyncio.wait({doing, stop}, return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        stop.cancel()
        doing.cancel()
        await asyncio.gather(doing, stop, return_exceptions=True)
