"""What a run needs, asked one by one before it: the order of the questions, and the cure for each answer that is no.

Nothing is measured. What the run would load is loaded, and unloaded again where it was not loaded before; nothing is
downloaded. How the list looks is ``report.checklist``'s, why nobody answers ``target.unreachable``'s.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from array import array
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from time import perf_counter_ns

from loadbench.aftermath import CANARY, first_ms
from loadbench.engine.client import Client
from loadbench.engine.exchange import Wire
from loadbench.errors import TargetError
from loadbench.lineup import wire_of
from loadbench.order import open_target, sent_headers
from loadbench.outcomes import OUTCOMES, classify
from loadbench.records import Request, Sample
from loadbench.report.checklist import Item, Mark, Telling
from loadbench.report.words import milliseconds, octets
from loadbench.scenario.endpoints import PROBE_TOKEN_VARIABLE
from loadbench.scenario.load import Loaded
from loadbench.scenario.variables import key_headers
from loadbench.target.catalogue import begun
from loadbench.target.control import UNANSWERED
from loadbench.target.dialects import read_models
from loadbench.target.foundry import cache_dir
from loadbench.target.memory_figures import MemoryFigures
from loadbench.target.models import ModelInfo, Resolved, list_catalogue, match
from loadbench.target.probe_client import RemoteMemory
from loadbench.target.register import folder_bytes
from loadbench.target.remote_pull import can_pull
from loadbench.target.target import Target
from loadbench.target.unreachable import cure_of, key_cure

PACKED = 2.0
"""What a loaded model takes, in sizes of its files: the synthetic ones 1.9 (edge) and 2.0 (batching), whose weights the
runtime packs anew; quantised ones less. Under one it cannot fit; between the two nobody can tell beforehand."""

WHOLE = frozenset({"protocol", "stream_error", "truncated", "empty", "http_4xx", "http_5xx"})
"""After a stream that ended so, the same is asked in one piece: it may be the stream alone that is not to be had."""


@dataclass(frozen=True, slots=True)
class Room:
    """How much memory a model can still take, and whose; ``absent`` says why that cannot be told.

    Of ``limit_bytes`` a cgroup counts ``others_bytes`` as used: page cache, which makes room, or other processes.
    """

    free_bytes: int | None = None
    gpu_free_bytes: int | None = None
    limit_bytes: int | None = None
    others_bytes: int = 0
    absent: str | None = None


class Checklist:
    """One pass through the questions. ``telling`` gets each answer as it comes, and what is being waited for."""

    def __init__(self, loaded: Loaded, telling: Telling) -> None:
        self._loaded, self._scenario = loaded, loaded.scenario
        self._headers = sent_headers(loaded, key_headers(os.environ))
        self._telling, self._say = telling, telling.say
        self._asked: str | None = None  # the model that the questions are about
        self._known: dict[str, str] = {}  # id → the name that it was asked for by

    async def go(self) -> None:
        """Ask everything. UsageError for a scenario that no run would take."""
        try:
            target = await open_target(self._loaded, self._headers, self._say)
        except TargetError as error:
            cure = "read its log, and try `loadbench serve`"
            if not self._scenario.embedded:
                self._say("looking for it elsewhere")
                cure = await cure_of(self._scenario.endpoints[0], error, self._headers)
            self._put("answers", "no", str(error).partition(": is ")[0], cure)  # what it asks the cure has found out
            return
        try:
            ours = ", started for this check" if target.foundry is not None else ""
            self._put("answers", "yes", f"{target.endpoint.title} at {target.endpoint.url}{ours}")
            if self._scenario.target_probe is not None:
                await self._ask_probe()
            for asked in self._scenario.models:
                self._asked = asked
                await self._ask_model(target, asked)
        finally:
            self._say(None)
            await asyncio.shield(target.close())

    def _put(self, question: str, mark: Mark, told: str, cure: str | None = None) -> None:
        self._say(None)
        self._telling.tell(Item(self._asked, question, mark, told, cure))

    def _leave(self, *questions: str, because: str) -> None:
        """What cannot be told any more."""
        self._say(None)
        self._telling.tell(*(Item(self._asked, question, "unknown", because) for question in questions))

    async def _ask_probe(self) -> None:
        figures, error = await self._figures_from_probe()
        if figures is None:
            cure = f"run `loadbench probe` on the target's host, and give its token in {PROBE_TOKEN_VARIABLE}"
            self._put("memory probe", "no", error or "", cure)
        else:
            self._put("memory probe", "yes", f"figures come from {self._scenario.target_probe}")

    async def _figures_from_probe(self) -> tuple[MemoryFigures | None, str | None]:
        probe = RemoteMemory(self._scenario.probes[0], os.environ.get(PROBE_TOKEN_VARIABLE))
        try:
            async with probe:
                return await probe.fetch(), None
        except TargetError as error:
            return None, str(error)

    async def _ask_model(self, target: Target, asked: str) -> None:
        """All about one model."""
        after = ("disk", "memory", "loads", "answers", "streams", "usage")
        self._say(f"looking for {asked}")
        try:
            if target.foundry is not None and not target.foundry.alive():
                await target.restart()
            model = await target.resolve(asked)
        except TargetError as error:
            self._put("is there", "no", _short(error, asked), await self._cure_of_name(target, asked, error))
            self._leave(*after, because="it is not there")
            return
        try:
            await self._ask_resolved(target, model, after)
        finally:
            if model.load_ms is not None:  # Foundry 2 has loaded it to tell what its alias means
                await asyncio.shield(self._unload(target, model))

    async def _ask_resolved(self, target: Target, model: Resolved, after: tuple[str, ...]) -> None:
        if (other := self._known.setdefault(model.id, self._asked or "")) != self._asked:
            self._put("is there", "no", f"{model.id}, as {other} is", "name each model once")
            self._leave(*after, because="asked already")
            return
        info = None
        with suppress(TargetError):
            info = await target.info(model)
        size_bytes = None if info is None else info.size_bytes
        if size_bytes is None and (note := self._loaded.note_of(self._asked or "")) is not None:
            size_bytes = note.size_bytes
        self._put("is there", "yes", model.how)
        here = self._ask_disk(target, model, info, size_bytes)
        fits = await self._ask_memory(target, model, info, size_bytes)
        if not here or not fits:
            self._leave(*after[2:], because="it does not fit" if here else "it is not downloaded")
            return
        loaded = await self._ask_load(target, model)
        if loaded is None:
            self._leave(*after[3:], because="it cannot be loaded")
            return
        try:
            await self._ask_answer(target, loaded)
        finally:
            if loaded.load_ms is not None and model.load_ms is None:
                await asyncio.shield(self._unload(target, loaded))

    async def _cure_of_name(self, target: Target, asked: str, error: TargetError) -> str:
        """A model that is not there: what would bring it there."""
        if target.foundry is not None:
            if "cannot be reached" in str(error):
                return "connect to the internet once, or name what `loadbench models list` has as cached or registered"
            return "`loadbench models list` has the names; `loadbench models add` registers one's own folder"
        endpoint = target.endpoint
        if endpoint.dialect.catalogue is not None:
            with suppress(TargetError):
                rows = read_models(await list_catalogue(endpoint, headers=target.headers))
                offered = [ModelInfo(base_url=endpoint.url, **row) for row in rows]
                if (found := match(offered, asked)) is not None:
                    return f"it is in the catalogue: {_pull(target, asked, found.id)}"
        if endpoint.kind == "ollama":
            return f"{OUTCOMES['model_not_found'].advice}, or {_pull(target, asked, asked)}"
        return OUTCOMES["model_not_found"].advice

    def _ask_disk(self, target: Target, model: Resolved, info: ModelInfo | None, size_bytes: int | None) -> bool:
        """Whether it is on its host's disk, or room for it is; False: it is still to be downloaded."""
        if target.foundry is None or info is None or info.cached is not False:
            known = "" if size_bytes is None else f"its {octets(size_bytes)} are there: "
            self._put("disk", "none", f"{known}nothing is to be downloaded")
            return True
        begun_bytes = sum(map(folder_bytes, begun(cache_dir(), model.id)))
        there = next(folder for folder in (cache_dir(), *cache_dir().absolute().parents) if folder.exists())
        free_bytes = shutil.disk_usage(there).free
        come = f", {octets(begun_bytes)} of which have come before it broke off" if begun_bytes else ""
        told = f"a run downloads its {octets(size_bytes)} first{come}; {octets(free_bytes)} are free"
        fetch = f"`loadbench models pull {self._asked}` fetches it beforehand, and goes on where a download stalled"
        if size_bytes is None:
            self._put("disk", "unknown", told, fetch)
        elif size_bytes - begun_bytes > free_bytes:
            self._put("disk", "no", told, f"make room in {cache_dir()}, or let LOADBENCH_CACHE name another place")
        else:
            self._put("disk", "yes", told, fetch)
        return False

    async def _ask_memory(
        self, target: Target, model: Resolved, info: ModelInfo | None, size_bytes: int | None
    ) -> bool:
        """Whether it fits, by estimate. False: it certainly does not."""
        if model.loaded:
            self._put("memory", "yes", "it is loaded; what its streams take comes on top")
            return True
        room = await self._room(target)
        free_bytes, whose, others_bytes = room.free_bytes, "free there", 0
        cure = "end what else takes memory, or choose a smaller model or variant"
        if info is not None and info.device == "GPU" and room.gpu_free_bytes is not None:
            free_bytes, whose = room.gpu_free_bytes, "free on its GPU"
        elif room.limit_bytes is not None and (free_bytes is None or room.limit_bytes < free_bytes):
            free_bytes, whose, others_bytes = room.limit_bytes, "left of its limit", room.others_bytes
            cure = "raise memory_limit, or whatever else limits the service, or choose a smaller model or variant"
        if size_bytes is None:
            self._put("memory", "unknown", "nobody says how large the model is")
            return True
        if free_bytes is None:
            probe = "run `loadbench probe` there and name it as target_probe: docs/memory.md"
            self._put("memory", "unknown", room.absent or "it is not told here", probe)
            return True
        told = f"{octets(size_bytes)} on disk; {octets(free_bytes)} {whose}"
        if free_bytes < size_bytes:
            self._put("memory", "no", told, cure)
        elif free_bytes - others_bytes < PACKED * size_bytes:
            cached = f", {octets(others_bytes)} of it page cache or other processes'" if others_bytes else ""
            self._put("memory", "unknown", f"{told}{cached}; loaded it may take twice its size", cure)
        else:
            self._put("memory", "yes", f"{told}: it fits by its size on disk alone, without its streams")
        return free_bytes >= size_bytes

    async def _room(self, target: Target) -> Room:
        """The memory of the target's host, as far as it can be seen."""
        if self._scenario.target_probe is not None:
            figures, error = await self._figures_from_probe()
        elif target.endpoint.pid is None or (watch := await asyncio.to_thread(target.memory_watch)) is None:
            figures, error = None, f"{target.endpoint.pid_absent}, and target_probe names none"
        else:
            figures, error = await asyncio.to_thread(watch.read, everything=True), None
        if figures is None:
            return Room(absent=error)
        held_bytes, cgroup = figures.rss_bytes or 0, figures.cgroup_limit_bytes
        limits = [limit - held_bytes for limit in (cgroup, self._scenario.memory_limit_bytes) if limit is not None]
        others_bytes = 0 if cgroup is None else max(0, (figures.cgroup_current_bytes or 0) - held_bytes)
        gpus = [g.total_bytes - (g.used_bytes or 0) for g in figures.gpus if g.total_bytes is not None]
        return Room(figures.available_bytes, max(gpus, default=None), min(limits, default=None), others_bytes)

    async def _ask_load(self, target: Target, model: Resolved) -> Resolved | None:
        """Load it where it is not; None where that fails."""
        if model.loaded:
            cold = f"; loading took {milliseconds(model.load_ms)}" if model.load_ms is not None else ""
            self._put("loads", "yes", f"it is loaded{cold}")
            return model
        self._say(f"loading {model.id}")
        try:
            loaded = await target.load(model)
        except TargetError as error:
            self._put("loads", "no", _short(error, model.id), self._cure_of_load(target, model, error))
            if target.foundry is None and UNANSWERED in str(error):
                await asyncio.shield(self._unload(target, model, loading=True))
            return None
        except asyncio.CancelledError:  # it may be there in a moment
            await asyncio.shield(self._unload(target, model, loading=target.foundry is None))
            raise
        if loaded.load_ms is not None:
            self._put("loads", "yes", f"cold in {milliseconds(loaded.load_ms)}; unloaded again after this check")
        elif loaded.loaded:
            self._put("loads", "yes", "it is loaded")
        else:
            self._put("loads", "none", f"{target.endpoint.title} loads a model at its first request, if at all")
        return loaded

    def _cure_of_load(self, target: Target, model: Resolved, error: TargetError) -> str:
        text = str(error)
        outcome = classify(text, "")
        if outcome == "out_of_memory":
            return "end what else takes memory, unload other models, or choose a smaller one, or another variant"
        if UNANSWERED in text:
            return "a cold load takes that long, or hangs: load it by hand and repeat this check"
        if target.foundry is not None and not target.foundry.alive():
            return f"the service died of it: its log is {target.foundry.log}"
        if outcome in ("model_not_found", "model_not_loaded"):
            return f"load it by hand: {target.endpoint.dialect.instead.get('load', '`foundry model load`')}"
        where = "its folder may be damaged or made for another runtime: fetch or build it anew"
        return where if target.foundry is not None else f"read the service's log; {where}"

    async def _ask_answer(self, target: Target, model: Resolved) -> None:
        """Send the test prompt as the run would, and where a stream fails once more in one piece."""
        wire = wire_of(self._scenario, target, model)
        self._say(f"{model.id} answers a test prompt")
        sample = await _send(wire)
        whole = sample
        if wire.stream and sample.outcome in WHOLE and sample.http_status not in (401, 403):
            whole = await _send(replace(wire, stream=False))
        if whole.outcome != "ok":
            self._put("answers", "no", _happened(sample), self._cure_of_answer(sample, model))
            self._leave("streams", "usage", because="it does not answer")
            return
        took = first_ms(whole) if whole is sample and wire.stream else _took_ms(whole)
        noun = "first token" if whole is sample and wire.stream else "whole answer"
        self._put("answers", "yes", f"{noun} after {milliseconds(took)}")
        if not wire.stream:
            self._put("streams", "none", "the scenario asks for answers in one piece")
        elif whole is not sample:
            cure = f"{_advice(sample)}; or set request.stream to false"
            self._put("streams", "no", _happened(sample), cure)
        elif sample.chunks == 1:
            told = "all that came was one event: a short answer, or a proxy that holds it back"
            self._put("streams", "unknown", told)
        else:
            self._put("streams", "yes", f"{sample.chunks} events with content")
        self._put("usage", *_judge_usage(whole))

    def _cure_of_answer(self, sample: Sample, model: Resolved) -> str:
        if sample.http_status in (401, 403):
            return key_cure(self._headers)
        if sample.outcome == "first_token_deadline":
            if not model.loaded:
                return "a cold load may take that long: load the model first, or raise deadlines.first_token"
            return "the service hangs or is busy: start it anew, or raise deadlines.first_token"
        return _advice(sample)

    async def _unload(self, target: Target, model: Resolved, *, loading: bool = False) -> None:
        """Leave the service as it was found; a service of ours ends with what it has loaded, if this was the last."""
        if target.foundry is not None and (len(self._scenario.models) == 1 or not target.foundry.alive()):
            return
        self._say(f"unloading {model.id}")
        try:
            await target.unload_patiently(model, loading=loading)
        except TargetError as error:
            instead = target.endpoint.dialect.instead.get("unload", "start the service anew").format(name=model.id)
            self._put("unloads", "no", _short(error, model.id), instead)
        self._say(None)


async def check_all(loaded: Loaded, *, as_json: bool) -> int:
    """Go through the list, for each endpoint of a fleet on its own, and tell of it; the exit code."""
    telling, scenario = Telling(as_json=as_json), loaded.scenario
    for url, probe in zip_longest(scenario.endpoints, scenario.probes):
        alone = replace(loaded, scenario=scenario.model_copy(update={"endpoint": url, "target_probe": probe}))
        await Checklist(alone, telling).go()
    return telling.end()


async def _send(wire: Wire) -> Sample:
    """One small request, and nothing of it in any figure."""
    gaps = array("q")
    client = Client(wire, perf_counter_ns(), lambda kind: gaps)
    try:
        return await client.send(Request(0, CANARY, 0), level=0, phase="canary")
    finally:
        client.close()


def _judge_usage(sample: Sample) -> tuple[Mark, str, str | None]:
    """Whether the server counts tokens, and can be believed."""
    counted = sample.output_tokens
    if sample.token_source != "usage" or counted is None:
        told = "it does not count tokens: events with content are counted in their place, and prompts not at all"
        return "no", told, "take a newer server, or one that heeds stream_options.include_usage"
    told = f"{sample.input_tokens if sample.input_tokens is not None else 'no'} tokens in, {counted} out"
    disbelief = "do not trust its tokens/s; a newer server, or no proxy before it"
    if counted > CANARY.max_tokens:
        return "no", f"{told}, though at most {CANARY.max_tokens} were asked for", disbelief
    if counted < sample.chunks:
        return "no", f"{told}, though {sample.chunks} events with content came", disbelief
    return "yes", told, None


def _advice(sample: Sample) -> str:
    """What the outcome's row says; what a run keeps, a check has on the screen."""
    advice = OUTCOMES[sample.outcome].advice
    return "read what it says; its log has more" if "samples.jsonl" in advice else advice


def _happened(sample: Sample) -> str:
    meaning = OUTCOMES[sample.outcome].meaning
    return meaning if sample.detail is None else f"{meaning}: {sample.detail}"


def _took_ms(sample: Sample) -> float | None:
    return None if sample.done_ns is None or sample.sent_ns is None else (sample.done_ns - sample.sent_ns) / 1e6


def _short(error: TargetError, name: str) -> str:
    return str(error).removeprefix(f"{name}: ")


def _pull(target: Target, asked: str, name: str) -> str:
    if can_pull(target.endpoint):
        return f"`loadbench models pull {asked} --endpoint {target.endpoint.url}`"
    return str(target.endpoint.dialect.instead.get("pull", "download it on its host")).format(name=name)
