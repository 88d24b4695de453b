"""Who is asked: an embedded service of our own or an endpoint somewhere, behind one face for the runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadbench.errors import TargetError, UsageError
from loadbench.platform import describe_exit
from loadbench.records import Sample
from loadbench.target.endpoint import Endpoint, discover
from loadbench.target.foundry import EmbeddedFoundry, cache_dir
from loadbench.target.memory import ProcessTree
from loadbench.target.models import Resolved, ensure_loaded, resolve, unload
from loadbench.target.state import Evidence, judge
from loadbench.target.synthetic import SYNTHETIC
from loadbench.target.synthetic import ensure as ensure_synthetic

DISCOVER_TIMEOUT_S = 5.0


def folder_of(asked: str) -> tuple[str, Path] | None:
    """(id, folder) of a model that the embedded service is to be given: synthetic:NAME, auto, or a folder's path."""
    name = "edge" if asked == "auto" else asked.removeprefix("synthetic:")
    if asked == "auto" or asked.startswith("synthetic:"):
        model = ensure_synthetic(name, cache_dir())
        return model.model_id, model.path
    folder = Path(asked).expanduser()
    if (folder / "genai_config.json").is_file():
        return f"{folder.resolve().name}:1", folder.resolve()
    return None


class Target:
    """An endpoint whose generation is known, with the service behind it where that is ours.

    ``headers`` go with every request and may hold a key; they are kept out of ``facts``.
    """

    def __init__(
        self, endpoint: Endpoint, source: str, headers: Mapping[str, str], foundry: EmbeddedFoundry | None
    ) -> None:
        self.endpoint = endpoint
        self.headers = headers
        self.foundry = foundry
        self._source = source
        self._ids: dict[str, str] = {}
        self._tree = None if endpoint.pid is None else ProcessTree(endpoint.pid)

    @classmethod
    async def embedded(cls, asked: Sequence[str], source: str, *, host: str = "127.0.0.1", port: int = 0) -> Target:
        """Start a Foundry Local with these models registered, none loaded."""
        ids: dict[str, str] = {}
        folders: dict[str, Path] = {}
        for name in asked:
            found = folder_of(name)
            if found is None:
                known = ", ".join(f"synthetic:{known}" for known in SYNTHETIC)
                raise TargetError(
                    f"models: expected {known} or the folder of an ONNX Runtime GenAI model for the embedded service,"
                    f" got {name}"
                )
            ids[name], folders[found[0]] = found
        foundry = await EmbeddedFoundry.start(folders, cache_dir(), host=host, port=port)
        try:
            endpoint = await discover(foundry.base_url, timeout_s=DISCOVER_TIMEOUT_S)
        except BaseException:
            await foundry.stop()
            raise
        target = cls(endpoint, source, {}, foundry)
        target._ids = ids
        return target

    @classmethod
    async def at(cls, url: str, source: str, headers: Mapping[str, str]) -> Target:
        """Find out who answers at this address."""
        return cls(await discover(url, headers=headers, timeout_s=DISCOVER_TIMEOUT_S), source, headers, None)

    async def resolve(self, asked: str) -> Resolved:
        """The exact model that was meant. TargetError where there is none."""
        if asked.startswith("synthetic:") and self.foundry is None:
            raise UsageError(f"models: {asked} is made for the embedded service; {self.endpoint.url} has its own")
        model = await resolve(self.endpoint, self._ids.get(asked, asked), headers=self.headers)
        if self.foundry is not None and asked == "auto":
            return replace(model, how=f"auto: {model.id}, the synthetic model of the embedded service")
        return model

    async def load(self, model: Resolved) -> Resolved:
        return await ensure_loaded(self.endpoint, model, headers=self.headers)

    async def unload(self, model: Resolved) -> None:
        await unload(self.endpoint, model, headers=self.headers)

    def is_synthetic(self, asked: str) -> bool:
        return self.foundry is not None and (asked == "auto" or asked.startswith("synthetic:"))

    def rss_bytes(self, relist: bool = False) -> int | None:
        """Resident bytes of the service's processes, None where they cannot be known. ``relist`` finds new children."""
        figures = self._tree.sample(relist=relist) if self._tree is not None else None
        return figures.rss_bytes if figures is not None else None

    async def state(
        self,
        canary: Sample | None,
        failed: Mapping[str, int],
        *,
        attempted: int | None = None,
        ended_by: str | None = None,
    ) -> tuple[str, list[str]]:
        """(state, evidence) after a level, from its failures, a canary, the process and the control routes."""
        answers, pid_after = None, None
        if canary is not None and canary.outcome != "connect_refused":
            try:
                again = await discover(self.endpoint.url, headers=self.headers, timeout_s=DISCOVER_TIMEOUT_S)
                answers, pid_after = True, again.pid
            except TargetError:
                answers = False
        return judge(
            Evidence(
                canary=canary,
                outcomes=failed,
                exit_code=self.foundry.returncode if self.foundry is not None else None,
                answers_status=answers,
                pid_before=self.endpoint.pid,
                pid_after=pid_after,
                attempted=attempted,
                ended_by=ended_by,
            )
        )

    def facts(self) -> dict[str, Any]:
        """``endpoint`` of run.json: who answered, and nothing secret."""
        endpoint = self.endpoint
        versions = {} if self.foundry is None else {"versions": self.foundry.versions}
        return {
            "url": endpoint.url,
            "kind": endpoint.kind,
            "title": endpoint.title,
            "source": self._source,
            "embedded": self.foundry is not None,
            "local": endpoint.local,
            "pid": endpoint.pid,
            "memory_absent": endpoint.pid_absent,
            "facts": endpoint.facts | versions,
        }

    async def ended(self) -> None:
        """Wait until the embedded service has ended by itself; TargetError then, since nobody asked it to."""
        assert self.foundry is not None
        raise TargetError(f"the embedded service ended: {describe_exit(await self.foundry.wait())}")

    async def close(self) -> None:
        if self.foundry is not None:
            await self.foundry.stop()
