"""Foundry's public catalogue and the cache of what was downloaded from it.

Asked through a child process of its own, never through the one that serves a run: what a download costs in memory and
processor must not be the service's, and a download that hangs can only be killed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, perf_counter_ns
from typing import Any, TypeVar

from loadbench.errors import TargetError
from loadbench.target.control import HopelessError
from loadbench.target.foundry import EmbeddedFoundry, catalogue_dir
from loadbench.target.models import ModelInfo, nearest, split_device, version_of
from loadbench.target.register import folder_bytes

T = TypeVar("T")

STALL_S = 120.0
"""Nothing written for so long is a stall. The runtime tells of a piece of 2 MiB when it is whole, and has 64 in flight:
at 1 MB/s its first progress comes after two minutes, which is why the bytes written count as well."""

LOG_DELAY_S = 2.0  # what takes longer to answer has tried several times; seen: 5 s, and a log 10 ms behind
TRIES = 6  # in a row without any progress; after any progress they are counted anew
BACKOFF_S = (2.0, 5.0, 15.0, 30.0, 60.0)
HOPELESS = ("No space left", "not enough space on the disk", "not in the catalogue")
"""Where it is the runtime that says so; of the disk in Linux's and macOS's words, and in Windows'."""

UNREACHABLE = "the model catalogue cannot be reached: connect to the internet (HTTPS_PROXY is honoured) and repeat"
CANCEL_TIMEOUT_S = 3.0  # then it is killed, and fetches at most 16 MiB a file again

Progress = Callable[[float], None]
"""Called with percents of a download."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A model for one device, as the catalogue lists it. ``preferred``: what its alias stands for on this machine."""

    info: ModelInfo
    preferred: bool


class Catalogue:
    """What the catalogue listed when it was opened. ``reachable`` is False where that is what it had listed before."""

    def __init__(self, cache: Path, variants: Sequence[Variant], reachable: bool) -> None:
        self.cache = cache
        self.variants = variants
        self.reachable = reachable

    @classmethod
    async def read(cls, cache: Path) -> Catalogue:
        """Ask for the list. An unreachable catalogue takes five seconds and is no error here: downloads still work."""
        async with open_child(cache) as child:
            asked_s = monotonic()
            rows = await child.ask({"do": "list"})
            answered_s = monotonic()
            # That it was not reached the runtime only logs, from a thread of its own, which may be behind.
            patience_s = LOG_DELAY_S if answered_s - asked_s > LOG_DELAY_S else LOG_DELAY_S / 20
            while reachable := "failed to fetch catalog" not in child.log_tail():
                if monotonic() - answered_s > patience_s:
                    break
                await asyncio.sleep(LOG_DELAY_S / 40)
        return cls(cache, [_variant(row) for row in rows], reachable)

    def find(self, asked: str) -> ModelInfo:
        """The variant that a name means: an exact id, a name without its version, or an alias, with @cpu, @gpu or @npu.

        Raises TargetError with what to do instead.
        """
        name, device = split_device(asked)
        wanted = name.lower()
        named = [v for v in self.variants if wanted in (v.info.id.lower(), v.info.id.rpartition(":")[0].lower())]
        aliased = [v for v in self.variants if wanted == (v.info.alias or "").lower()]
        fitting = [v for v in named or aliased if device is None or (v.info.device or "").upper() == device]
        if fitting:
            best = max(fitting, key=lambda v: (bool(aliased) and v.preferred, version_of(v.info.id)))
            return best.info
        if named or aliased:
            devices = ", ".join(sorted({f"@{v.info.device.lower()}" for v in named or aliased if v.info.device}))
            raise TargetError(f"{asked}: for this machine the catalogue has it for {devices or 'no device'} only")
        if not self.reachable:
            raise TargetError(f"{asked}: {self._unreachable}")
        known = {key.lower(): key for v in self.variants for key in (v.info.alias or "", v.info.id) if key}
        alike = nearest(wanted, known)
        raise TargetError(
            f"{asked}: neither synthetic, nor a folder, nor registered (loadbench models add), nor in the catalogue"
            + (f"; the nearest of it: {', '.join(alike)}" if alike else "")
        )

    def obtain(self, asked: str) -> ModelInfo:
        """The same, of what is in the cache or can be downloaded now. TargetError for anything else."""
        info = self.find(asked)
        if info.path is None and not self.reachable:
            raise TargetError(f"{asked}: {self._unreachable}")
        return info

    def infos(self) -> list[ModelInfo]:
        """All of them, the size of what is in the cache as it is there: the catalogue's is rounded to MiB."""
        infos = [variant.info for variant in self.variants]
        return [info if info.path is None else replace(info, size_bytes=folder_bytes(info.path)) for info in infos]

    @property
    def _unreachable(self) -> str:
        """What to tell who named a model, where the catalogue does not answer."""
        return f"{UNREACHABLE}, or name a model that `loadbench models list` shows as cached or registered"


async def download(
    cache: Path, model_id: str, progress: Progress, *, say: Callable[[str], None], stall_s: float = STALL_S
) -> tuple[Path, float]:
    """Fetch a model into the cache: (its folder, ms that it took). Stalled or cut, it is tried again and resumed."""

    async def once(advance: Progress) -> Path:
        async with open_child(cache) as child:
            return Path((await _watched(child, cache, model_id, advance, stall_s))["path"])

    start_ns = perf_counter_ns()
    path = await patiently(model_id, once, progress, say)
    return path, (perf_counter_ns() - start_ns) / 1e6


async def patiently(
    name: str, once: Callable[[Progress], Awaitable[T]], progress: Progress, say: Callable[[str], None]
) -> T:
    """Download with ``once``, again and again while that helps; ``say`` is told of every break.

    Raises TargetError when ``TRIES`` in a row have brought nothing, and at once where no further one could.
    """
    failed, reached = 0, 0.0

    def advance(percent: float) -> None:
        nonlocal reached, failed
        if percent > reached:
            reached, failed = percent, 0
        progress(max(percent, reached))

    while True:
        try:
            return await once(advance)
        except TargetError as error:
            failed += 1
            hopeless = isinstance(error, HopelessError) or any(word in str(error) for word in HOPELESS)
            if failed == TRIES or hopeless:
                raise TargetError(f"{name}: the download failed at {reached:.0f} %: {error}") from None
            wait_s = BACKOFF_S[min(failed, len(BACKOFF_S)) - 1]
            say(f"{name}: the download broke off at {reached:.0f} % ({error}); again in {wait_s:g} s")
            await asyncio.sleep(wait_s)


async def remove(cache: Path, info: ModelInfo) -> None:
    """Delete a download from the cache. Raises TargetError where the runtime does not."""
    assert info.path is not None
    async with open_child(cache) as child:
        await child.ask({"do": "remove", "id": info.id})
    with suppress(OSError):  # the runtime leaves its folder, empty; the publisher's may hold others
        info.path.rmdir()
        info.path.parent.rmdir()


@asynccontextmanager
async def open_child(cache: Path) -> AsyncIterator[EmbeddedFoundry]:
    """A service that serves nothing and works in the catalogue's own cache."""
    child = await EmbeddedFoundry.start({}, cache)
    try:
        yield child
    finally:
        await child.stop()


def begun(cache: Path, model_id: str) -> list[Path]:
    """The folders of a model in the cache, whole or broken off: one at most, below its publisher's."""
    return list(catalogue_dir(cache).glob(f"*/{model_id.replace(':', '-')}"))


def _traces(child: EmbeddedFoundry, cache: Path, model_id: str) -> object:
    """What is another from one look to the next as long as bytes come."""
    if (written := child.written_bytes()) is not None:
        return written
    # The runtime may make a file whole before it fills it: its size says nothing then, but when it was written does.
    files = [file for folder in begun(cache, model_id) for file in folder.rglob("*")]
    with suppress(FileNotFoundError):  # one has been renamed meanwhile, which is a trace, too
        return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return None


async def _watched(child: EmbeddedFoundry, cache: Path, model_id: str, advance: Progress, stall_s: float) -> Any:
    """Download, unless nothing moves for so long. In that case the child is told, and ended by whoever opened it."""
    moved = monotonic()

    def moving(percent: float) -> None:
        nonlocal moved
        moved = monotonic()
        loop.call_soon_threadsafe(advance, percent)

    loop, traces = asyncio.get_running_loop(), _traces(child, cache, model_id)
    work = asyncio.ensure_future(child.ask({"do": "download", "id": model_id}, moving, timeout_s=None))
    try:
        while not (await asyncio.wait([work], timeout=min(1.0, stall_s / 4)))[0]:
            if (now_traces := _traces(child, cache, model_id)) != traces:
                traces, moved = now_traces, monotonic()
            if monotonic() - moved > stall_s:
                raise TargetError(f"nothing came for {stall_s:g} s")
        return await work
    finally:
        if not work.done():
            child.cancel()
            with suppress(TimeoutError, TargetError, asyncio.CancelledError):
                await asyncio.wait_for(asyncio.shield(work), CANCEL_TIMEOUT_S)
            work.add_done_callback(lambda task: task.cancelled() or task.exception())


def _variant(row: dict[str, Any]) -> Variant:
    preferred, path = row.pop("preferred"), row.pop("path")
    capabilities = tuple(row.pop("capabilities"))
    return Variant(ModelInfo(base_url="", path=path and Path(path), capabilities=capabilities, **row), preferred)
