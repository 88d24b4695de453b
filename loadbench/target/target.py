"""Who is asked: an embedded service of our own or an endpoint somewhere, behind one face for the runner."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic, perf_counter_ns
from typing import Any

from loadbench.errors import TargetError, UsageError
from loadbench.platform import describe_exit
from loadbench.records import Sample
from loadbench.scenario.variables import ENDPOINT_VARIABLE
from loadbench.target.autopsy import KernelLog, last_words, machine_oom_kills
from loadbench.target.catalogue import Progress, download
from loadbench.target.chosen import Chosen, choose
from loadbench.target.endpoint import Endpoint, discover
from loadbench.target.foundry import EmbeddedFoundry, cache_dir, process_state
from loadbench.target.memory import MemoryWatch
from loadbench.target.memory_figures import MemoryFigures
from loadbench.target.models import ModelInfo, Resolved, ensure_loaded, is_loaded, list_models, resolve, took, unload
from loadbench.target.processes import ProcessTree
from loadbench.target.register import ModelFolder, folder_bytes, read_folder
from loadbench.target.state import Evidence, judge

DISCOVER_TIMEOUT_S = 5.0
UNLOAD_PATIENCE_S = 2.0
UNLOAD_PAUSE_S = 0.25
"""Foundry refuses while a session of an answer is still being taken down, some tenths of a second after its end."""

LOADING_PATIENCE_S = 5.0  # a load that nobody waits for any more goes on: seen to its end where that is soon
DYING_TIMEOUT_S = 1.0  # a process that aborts closes its sockets before it has an exit status


@dataclass(slots=True)
class _Marks:
    """How things stood when the target was last judged: what has come since is evidence of the time between."""

    oom_kills: int | None
    machine_oom_kills: int | None
    log_bytes: int
    peak_rss_bytes: int = 0


class Target:
    """An endpoint whose generation is known, with the service behind it where that is ours.

    ``headers`` go with every request and may hold a key; they are kept out of ``facts``. ``members`` are the endpoints
    that it is made of, ``unwatched`` says why the memory of one that has no process here is not known.
    """

    unwatched = "its host is not this machine, and target_probe names none there"

    def __init__(
        self, endpoint: Endpoint, source: str, headers: Mapping[str, str], foundry: EmbeddedFoundry | None
    ) -> None:
        self.endpoint = endpoint
        self.headers = headers
        self.foundry = foundry
        self._source = source
        self._chosen = Chosen()
        self._tree = None if endpoint.pid is None else ProcessTree(endpoint.pid)
        self._start: Callable[[], Awaitable[EmbeddedFoundry]] | None = None
        self._kernel_log = KernelLog()
        self._marks = self._mark()

    @property
    def members(self) -> tuple[Target, ...]:
        return (self,)

    @classmethod
    async def embedded(
        cls,
        asked: Sequence[str],
        source: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        memory_limit_bytes: int | None = None,
        limit_kind: str | None = None,
    ) -> Target:
        """Start a Foundry Local with these models to be had, none loaded, its memory held by ``containment``.

        A model that is not to be had is no error here: ``resolve`` has the reason.
        """
        chosen = await choose(asked, cache_dir())
        start = partial(
            EmbeddedFoundry.start,
            chosen.folders,
            cache_dir(),
            host=host,
            port=port,
            memory_limit_bytes=memory_limit_bytes,
            limit_kind=limit_kind,
        )
        foundry, endpoint = await _started(partial(start, downloaded=chosen.downloaded()))
        target = cls(endpoint, source, {}, foundry)
        target._chosen, target._start = chosen, lambda: start(downloaded=chosen.downloaded())
        return target

    async def restart(self) -> None:
        """End the embedded service, by force if need be, and start it anew: same models, none loaded, same limit.

        Its port and process are new: resolve models again. Raises UsageError for a service that is not ours,
        TargetError when it does not come up; then it is not there.
        """
        if self._start is None or self.foundry is None:
            raise UsageError(f"{self.endpoint.url}: only the embedded service is ours to restart")
        await self.foundry.stop()
        self.foundry, endpoint = await _started(self._start)
        self._take(endpoint)
        self._marks = self._mark()

    @classmethod
    async def at(cls, url: str, source: str, headers: Mapping[str, str]) -> Target:
        """Find out who answers at this address."""
        try:
            return cls(await discover(url, headers=headers, timeout_s=DISCOVER_TIMEOUT_S), source, headers, None)
        except UsageError as error:
            raise UsageError(f"{error} (from {source})" if source == ENDPOINT_VARIABLE else str(error)) from None

    async def look_again(self, timeout_s: float) -> None:
        """Find out who answers at the address now: one started anew has another process. TargetError: nobody."""
        self._take(await discover(self.endpoint.url, headers=self.headers, timeout_s=timeout_s))

    def _take(self, endpoint: Endpoint) -> None:
        if endpoint.pid != self.endpoint.pid:
            self._tree = None if endpoint.pid is None else ProcessTree(endpoint.pid)
        self.endpoint = endpoint

    async def resolve(self, asked: str) -> Resolved:
        """The exact model that was meant. TargetError where there is none, with the reason for this one."""
        if self.foundry is None:
            if asked.startswith("synthetic:"):
                raise UsageError(f"models: {asked} is made for the embedded service; {self.endpoint.url} has its own")
            return await resolve(self.endpoint, asked, headers=self.headers)
        if asked in self._chosen.failed:
            raise TargetError(self._chosen.failed[asked])
        model_id = self._chosen.ids.get(asked, asked)
        if model_id in self.foundry.refused:
            raise TargetError(f"{asked}: {self.endpoint.title} refused it: {self.foundry.refused[model_id]}")
        model = await resolve(self.endpoint, model_id, headers=self.headers)
        if asked == "auto":
            return replace(model, how=f"auto: {model.id}, the synthetic model of the embedded service")
        if model_id in self._chosen.listed and asked != model_id:
            return replace(model, how=f"{model.id} for {asked}, by the public catalogue")
        return model

    async def pull(
        self, asked: str, progress: Progress, *, say: Callable[[str], None] = lambda line: None
    ) -> float | None:
        """Download what the public catalogue has and the cache has not; ms that it took, None: nothing was to be done.

        ``progress`` is called with percents, ``say`` with a line for each time that it broke off and is tried again.
        Raises TargetError when it cannot be downloaded. Another host's service is not told to: see ``models pull``.
        """
        info = self._chosen.listed.get(self._chosen.ids.get(asked, asked))
        if self.foundry is None or info is None or info.path is not None:
            return None
        path, took_ms = await download(cache_dir(), info.id, progress, say=say)
        self._chosen.listed[info.id] = replace(info, cached=True, path=path)
        await self.foundry.adopt(info.id, path)
        return took_ms

    async def info(self, model: Resolved) -> ModelInfo | None:
        """What is known of a resolved model: the service's word, of one's own its folder's; None where nothing is."""
        if (listed := self._chosen.listed.get(model.id)) is not None:
            size = listed.size_bytes if listed.path is None else folder_bytes(listed.path)
            return replace(listed, base_url=model.base_url, loaded=model.loaded, size_bytes=size)
        if (path := self._chosen.folders.get(model.id)) is not None:
            with suppress(UsageError):  # it was read before; a folder that has gone since is told when it is loaded
                return _of_folder(model, read_folder(path))
        with suppress(TargetError):  # no model is worse for a list that fails
            for info in await list_models(self.endpoint, headers=self.headers, base_url=model.base_url):
                if info.id == model.id:
                    return info
        return None

    async def load(self, model: Resolved) -> Resolved:
        """Load it where it is not; ``load_ms`` is set where that was us. TargetError when it cannot be."""
        if self.foundry is None or model.id not in self._chosen.listed or model.loaded:
            return await ensure_loaded(self.endpoint, model, headers=self.headers)
        # By HTTP only an alias can be loaded, which stands for one of its variants, and not always for this one.
        start_ns = perf_counter_ns()
        try:
            await self.foundry.ask({"do": "load", "id": model.id})
        except TargetError as error:
            raise TargetError(f"{model.id}: {self.endpoint.title} refused to load it: {error}") from None
        load_ms = (perf_counter_ns() - start_ns) / 1e6
        return replace(model, loaded=True, load_ms=load_ms, how=f"{model.how}; loaded for this run in {took(load_ms)}")

    async def unload(self, model: Resolved) -> None:
        """Unload it, where the API can. TargetError when the server refuses; a wedged one does."""
        if self.foundry is None or model.id not in self._chosen.listed:
            await unload(self.endpoint, model, headers=self.headers)
        else:
            await self.foundry.ask({"do": "unload", "id": model.id})

    async def unload_patiently(self, model: Resolved, *, loading: bool = False) -> None:
        """Unload it as soon as the server lets us; ``loading``: a load that was not waited for may be under way.

        TargetError when it refuses to the end, or when nobody knows whether the load will end yet.
        """
        until_s = monotonic() + (LOADING_PATIENCE_S if loading else UNLOAD_PATIENCE_S)
        while loading and await is_loaded(self.endpoint, model, headers=self.headers) is False:
            if monotonic() > until_s:
                raise TargetError(f"{model.id}: {self.endpoint.title} may still be loading it, for nobody")
            await asyncio.sleep(UNLOAD_PAUSE_S)
        until_s = monotonic() + UNLOAD_PATIENCE_S
        while True:
            try:
                await self.unload(model)
                return
            except TargetError:
                if monotonic() > until_s:
                    raise
            await asyncio.sleep(UNLOAD_PAUSE_S)

    def is_synthetic(self, asked: str) -> bool:
        return self.foundry is not None and (asked == "auto" or asked.startswith("synthetic:"))

    def rss_bytes(self, relist: bool = False) -> int | None:
        """Resident bytes of the service's processes, None where they cannot be known. ``relist`` finds new children."""
        figures = self._tree.sample(relist=relist) if self._tree is not None else None
        return None if figures is None else figures.rss_bytes

    def memory_watch(self) -> MemoryWatch | None:
        """What reads the memory of the service as it runs now; None where its host is not this one.

        It looks for every source there is and so may block: make it in a thread.
        """
        if not self.endpoint.local:
            return None
        return MemoryWatch(self.endpoint.pid, self.endpoint.pid_absent or "no process is watched")

    def saw(self, figures: MemoryFigures) -> None:
        """Take note of what it holds: evidence, should it die."""
        self._marks.peak_rss_bytes = max(self._marks.peak_rss_bytes, figures.rss_bytes or 0)

    def cpu_s(self) -> float | None:
        """CPU seconds that the service's processes have used so far, None where they cannot be known."""
        return None if self._tree is None else self._tree.cpu_s()

    async def state(
        self,
        canary: Sample | None,
        failed: Mapping[str, int],
        *,
        attempted: int | None = None,
        ended_by: str | None = None,
        starved: int = 0,
    ) -> tuple[str, list[str]]:
        """(state, evidence) after a level, from its failures, a canary, the process, the machine, the control routes.

        What the machine counted and logged is told since the last time that this was asked.
        """
        answers, pid_after = None, None
        if canary is not None and canary.outcome != "connect_refused":
            try:
                again = await discover(self.endpoint.url, headers=self.headers, timeout_s=DISCOVER_TIMEOUT_S)
                answers, pid_after = True, again.pid
            except TargetError:
                answers = False
        if self.foundry is not None and not answers:
            with suppress(TimeoutError):
                async with asyncio.timeout(DYING_TIMEOUT_S):
                    await self.foundry.wait()
        limit = None if self.foundry is None else self.foundry.limit
        before, after, pid = self._marks, self._mark(), self.endpoint.pid
        seen = Evidence(
            canary=canary,
            outcomes=failed,
            exit_code=self.foundry.returncode if self.foundry is not None else None,
            answers_status=answers,
            pid_before=pid,
            pid_after=pid_after,
            attempted=attempted,
            ended_by=ended_by,
            starved=starved,
            process=None if pid is None or answers else process_state(pid),
            oom_kills_before=before.oom_kills,
            oom_kills_after=after.oom_kills,
            machine_oom_kills_before=before.machine_oom_kills if pid is not None else None,
            machine_oom_kills_after=after.machine_oom_kills if pid is not None else None,
            kernel_log=() if pid is None else self._kernel_log.kills_of(pid),
            last_words=() if self.foundry is None else last_words(self.foundry.log_tail(before.log_bytes)),
            limit=limit,
            # A cgroup's own peak has the pages of files too, and is the process's, not the level's.
            peak_bytes=before.peak_rss_bytes or (None if limit is None else limit.peak_bytes),
        )
        self._marks = after
        return judge(seen)

    @property
    def kernel_log_absent(self) -> str | None:
        """Why the kernel's log says nothing here; None where it is read."""
        return self._kernel_log.absent

    def _mark(self) -> _Marks:
        foundry = self.foundry
        limit = None if foundry is None else foundry.limit
        return _Marks(
            oom_kills=None if limit is None else limit.oom_kills,
            machine_oom_kills=machine_oom_kills(),
            log_bytes=0 if foundry is None else foundry.log_bytes(),
        )

    def facts(self) -> dict[str, Any]:
        """``endpoint`` of run.json: who answered, and nothing secret."""
        endpoint = self.endpoint
        ours: dict[str, Any] = {}
        if self.foundry is not None:
            ours["versions"] = self.foundry.versions
            if self.foundry.limit is not None:
                ours["memory_limit"] = self.foundry.limit.as_json()
        return {
            "url": endpoint.url,
            "kind": endpoint.kind,
            "title": endpoint.title,
            "source": self._source,
            "embedded": self.foundry is not None,
            "local": endpoint.local,
            "pid": endpoint.pid,
            "memory_absent": endpoint.pid_absent,
            "facts": endpoint.facts | ours,
        }

    async def ended(self) -> None:
        """Wait until the embedded service has ended by itself; TargetError then, since nobody asked it to."""
        assert self.foundry is not None
        raise TargetError(f"the embedded service ended: {describe_exit(await self.foundry.wait())}")

    async def close(self) -> None:
        self._kernel_log.close()
        if self.foundry is not None:
            await self.foundry.stop()


def _of_folder(model: Resolved, folder: ModelFolder) -> ModelInfo:
    return ModelInfo(
        id=model.id,
        alias=model.id.rpartition(":")[0],
        loaded=model.loaded,
        base_url=model.base_url,
        size_bytes=folder.size_bytes,
        device=folder.device,
        licence=None,
        execution_provider=folder.execution_provider,
        cached=True,
        path=folder.path,
    )


async def _started(start: Callable[[], Awaitable[EmbeddedFoundry]]) -> tuple[EmbeddedFoundry, Endpoint]:
    foundry = await start()
    try:
        return foundry, await discover(foundry.base_url, timeout_s=DISCOVER_TIMEOUT_S)
    except BaseException:
        await foundry.stop()
        raise
