"""Run a real Foundry Local in a child process, and see to it that the process ends.

What runs in the child is ``foundry_child``'s; loading models and asking them is ``models``'s, over HTTP like for any
other service. Only what HTTP cannot say goes to the child itself, by ``ask``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from loadbench.errors import TargetError, UsageError
from loadbench.platform import apart
from loadbench.target.containment import Limit, limit_for
from loadbench.target.control import without_whereabouts

START_TIMEOUT_S = 60.0  # it takes 0.2 s; a cold disk and a virus scanner take longer
STOP_TIMEOUT_S = 5.0  # it ends within milliseconds; after this it is killed
ASK_TIMEOUT_S = 600.0  # to load tens of gigabytes from a slow disk
KILL_TIMEOUT_S = 5.0  # what the kernel does not end by then hangs in a driver, and no patience helps
LOG_TAIL_BYTES = 64 << 10

CATALOGUE_VARIABLE = "LOADBENCH_CATALOG_URL"
"""Names another public catalogue; its path ends in /asset-gallery/v1.0/models."""

COMMAND = (sys.executable, "-m", "loadbench.target.foundry_child")

# `CI` keeps the runtime from uploading anything: the two other switches still leave one event.
QUIET = {"CI": "true", "ORT_TELEMETRY_DISABLED": "1"}

# For a synthetic model without the runtime's arena, there to be held against arithmetic: every buffer is a mapping of
# its own, which goes back when it is freed. Else glibc raises this threshold to what was last freed, and a cache that
# grows is kept in fragments, too: 37 to 41 KiB a token, not 32. Not for anybody's own models: it takes three times the
# CPU time, and is not what their users have.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(32 << 10)}


def cache_dir() -> Path:
    """Return the folder for what is made once and used again: ``LOADBENCH_CACHE``, or the system's place for such."""
    if chosen := os.environ.get("LOADBENCH_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "loadbench"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "loadbench"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loadbench"


class EmbeddedFoundry:
    """A Foundry Local of our own, for as long as this object is entered or until ``stop``.

    ``root_url`` is where the service answers, ``base_url`` where the models registered here do (one's own models have a
    prefix) or, without any, those of the public catalog. ``refused`` has the reason for each model that the service did
    not take. ``versions`` maps package to version; ``log`` is the file that the child's output goes to; ``limit`` holds
    its memory, None: nothing does.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], folder: Path, answer: Mapping[str, Any], limit: Limit | None
    ) -> None:
        self._process = process
        self._folder = folder
        self.limit = limit
        self.root_url: str = answer["url"].replace("//0.0.0.0:", "//127.0.0.1:")  # bound to all is no address to call
        self.base_url = self.root_url + ("/catalogs/local/v1" if answer["models"] else "/v1")
        self.pid: int = answer["pid"]
        self.versions: dict[str, str] = answer["versions"]
        self.refused: dict[str, str] = answer["refused"]
        self.model_ids: tuple[str, ...] = tuple(id_ for id_ in answer["models"] if id_ not in self.refused)
        self._asking = asyncio.Lock()
        self._unanswered: str | None = None
        self.log = folder / "child.log"

    @classmethod
    async def start(
        cls,
        models: Mapping[str, Path],
        cache: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        memory_limit_bytes: int | None = None,
        limit_kind: str | None = None,
        downloaded: Mapping[str, Path] | None = None,
    ) -> Self:
        """Start the service with ``models`` (id such as ``name:1`` → folder) registered, none of them loaded.

        Port 0 lets the system choose. ``downloaded`` are models of the public catalogue (id → folder in the cache) that
        it is to serve beside them, none of them where all are still to come. Without models and ``downloaded`` it
        works in the catalogue's own cache, where downloads belong.
        ``limit_kind`` as in ``containment.limit_for``.
        Raises TargetError when the service does not come up, with the reason and where its log is.
        """
        folder = _own_folder(cache)
        try:
            link_downloads((downloaded or {}).values(), catalogue_dir(cache), folder / "models")
        except TargetError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        request = {
            "models": {model_id: str(path.absolute()) for model_id, path in models.items()},
            "app_data_dir": str(folder),
            # The runtime keeps its register of local models here: shared, two runs would undo each other's. So a run
            # has a folder of its own, in which the downloads that it serves are linked.
            "model_cache_dir": str(catalogue_dir(cache) if downloaded is None and not models else folder / "models"),
            "catalog_url": os.environ.get(CATALOGUE_VARIABLE) or None,
            "logs_dir": str(folder),
            "host": host,
            "port": port,
        }
        limit = None if memory_limit_bytes is None else limit_for(COMMAND, memory_limit_bytes, limit_kind)
        mapped = any(path.parent == cache / "synthetic" and _without_arena(path) for path in models.values())
        process = _spawn(folder / "child.log", limit, MAPPED if mapped else {})
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                answer = await asyncio.to_thread(_converse, process, request, _ignore)
        except TimeoutError:
            answer = {"error": f"no answer within {START_TIMEOUT_S:.0f} s"}
        except BaseException:  # cancelled, too: no process and no folder is left behind
            _end(process, grace_s=0)
            _release(limit)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if "error" in answer:
            _end(process, grace_s=0)
            _release(limit)
            why, log = without_whereabouts(answer["error"]), folder / "child.log"
            raise TargetError(f"the embedded Foundry Local did not start: {why} (log: {log})")
        return cls(process, folder, answer["done"] | {"models": list(models)}, limit)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def ask(
        self,
        request: Mapping[str, Any],
        progress: Callable[[float], None] | None = None,
        timeout_s: float | None = ASK_TIMEOUT_S,
    ) -> Any:
        """Ask the child for what HTTP cannot say (``foundry_child``) and wait for it; one question at a time.

        ``progress`` is called with percents, in another thread. Raises TargetError with the child's reason, or when it
        has none in time: it is not asked again then, since its next answer would be to this.
        """
        async with self._asking:
            if self._unanswered is not None:
                raise TargetError(f"the embedded service has not answered to: {self._unanswered}")
            self._unanswered = str(request["do"])
            try:
                async with asyncio.timeout(timeout_s):
                    answer = await asyncio.to_thread(_converse, self._process, request, progress or _ignore)
            except TimeoutError:
                raise TargetError(f"the embedded service did not {self._unanswered} within {timeout_s:g} s") from None
            self._unanswered = None
        if "error" in answer:
            raise TargetError(without_whereabouts(answer["error"]))
        return answer["done"]

    def cancel(self) -> None:
        """Have what was asked for end early, with an error, as soon as the runtime notices."""
        with contextlib.suppress(OSError):  # it has ended
            _tell(self._process, {"do": "cancel"})

    async def adopt(self, model_id: str, path: Path) -> None:
        """Serve a model of the public catalogue that has been downloaded since this service was started."""
        cache = self._folder.parent.parent
        link_downloads([path], catalogue_dir(cache), self._folder / "models")
        await self.ask({"do": "download", "id": model_id})  # it finds it in its cache

    def written_bytes(self) -> int | None:
        """What the child has written to files so far; None where the system does not tell: macOS."""
        try:
            return int(psutil.Process(self.pid).io_counters().write_bytes)
        except (psutil.Error, AttributeError):  # macOS has no such counters
            return None

    @property
    def returncode(self) -> int | None:
        """The child's exit status, negative for a signal's number; None while it lives."""
        return self._process.poll()

    def alive(self) -> bool:
        """Whether the child process is there; a wedged one is."""
        return self.returncode is None

    async def wait(self) -> int:
        """Wait until the child ends by itself; returns its exit status."""
        while (code := self._process.poll()) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # a process that is not asyncio's signals no event
        return code

    async def stop(self) -> None:
        """End the child, by force if need be. Its folder goes too, but not if it had died before: the log tells why."""
        await asyncio.to_thread(self._stop)  # in a thread, so that being cancelled does not leave it half done

    def _stop(self) -> None:
        died = not self.alive()
        stopped = process_state(self.pid) == "stopped"  # by a signal: it does not see its stdin close
        _end(self._process, 0 if stopped else STOP_TIMEOUT_S)
        _release(self.limit)
        if not died:
            shutil.rmtree(self._folder, ignore_errors=True)

    def log_tail(self, since_bytes: int = 0) -> str:
        """The end of what the child has printed since it had printed so many bytes, at most 64 KiB of it."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(since_bytes, self.log_bytes() - LOG_TAIL_BYTES))
                return log.read(LOG_TAIL_BYTES).decode(errors="replace")
        except OSError:
            return ""

    def log_bytes(self) -> int:
        """How much the child has printed; 0 where its log is gone."""
        try:
            return self.log.stat().st_size
        except OSError:
            return 0


def catalogue_dir(cache: Path) -> Path:
    """Where the downloads from the public catalogue are kept, as the runtime lays them out: publisher, then model."""
    return cache / "catalog"


def link_downloads(paths: Iterable[Path], catalogue: Path, models: Path) -> None:
    """Lay out these models of the catalogue's cache in the cache folder of one run, without copying a byte.

    Hard links, in folders of its own: the runtime refuses paths that lead out of its cache, and onnxruntime weights
    that lie outside their model's folder. Removing the run's folder leaves the catalogue's files where they are. Where
    the file system has no hard links (exFAT, some shares) files are copied after all; TargetError where that fails.
    """
    models.mkdir(exist_ok=True)
    known = catalogue / "foundry.modelinfo.json"  # what the catalogue said last: offline the runtime reads this
    for source in [known, *(file for path in paths for file in path.rglob("*"))]:
        target = models / source.relative_to(catalogue)
        if source.is_file() and not target.exists():
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if source == known:
                    shutil.copyfile(source, target)  # the runtime writes to it
                else:
                    _link_or_copy(source, target)
            except OSError as error:
                told = f"{target}: cannot lay out what the service is to serve: {error.strerror}"
                raise TargetError(f"{told}; let LOADBENCH_CACHE name a folder on another disk") from error


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def process_state(pid: int) -> str:
    """What the system says of a process of this machine: running, sleeping, stopped, zombie…, or gone."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return "gone"
    except psutil.AccessDenied:
        return "not ours to look at"


def _own_folder(cache: Path) -> Path:
    """Make a folder for one instance, named after this process; remove those whose process is gone."""
    instances = cache / "instances"
    try:
        instances.mkdir(parents=True, exist_ok=True)
        for folder in instances.iterdir():
            owner = folder.name.partition("-")[0]
            if owner.isdigit() and not psutil.pid_exists(int(owner)):
                shutil.rmtree(folder, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=instances))
    except OSError as error:
        raise UsageError(
            f"{instances}: expected a cache folder to write to ({error.strerror}); set LOADBENCH_CACHE"
        ) from error


def _without_arena(folder: Path) -> bool:
    """Whether the model's configuration takes the runtime's arena away. What is wrong with it, the runtime says."""
    try:
        config = json.loads((folder / "genai_config.json").read_bytes())
        return config["model"]["decoder"]["session_options"]["enable_cpu_mem_arena"] is False
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _spawn(log: Path, limit: Limit | None, malloc: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the child out of reach of the terminal's Ctrl-C: it has to serve until we have drained.

    Called in the event loop's thread, since Linux ends the child with the thread that started it, not with the process.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            COMMAND if limit is None else limit.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**malloc, **os.environ, **QUIET},
            **apart(),
        )
    if limit is not None:
        limit.hold(process)  # it waits for what it is to serve, so it has not begun
    return process


def _release(limit: Limit | None) -> None:
    if limit is not None:
        limit.release()


def _converse(
    process: subprocess.Popen[bytes], request: Mapping[str, Any], progress: Callable[[float], None]
) -> dict[str, Any]:
    """Ask the child and wait for its answer, which is an ``error`` if it ends without one."""
    assert process.stdout is not None
    try:
        _tell(process, request)
        while line := process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            if "progress" not in answer:
                return answer
            progress(answer["progress"])
    except (BrokenPipeError, ValueError):  # ValueError: a pipe that we have closed, or half a line
        pass
    return {"error": "it ended without a word"}


def _tell(process: subprocess.Popen[bytes], request: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()


def _ignore(percent: float) -> None:
    pass


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End the child: by closing its stdin, at which a wedged one ends too; one that is stopped takes a kill."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # a cancelled request may lie in the buffer still
        process.stdin.close()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        _kill(process)
        try:
            process.wait(KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise TargetError(
                f"the embedded service's process {process.pid} did not end within {KILL_TIMEOUT_S:.0f} s of its kill"
            ) from None
    if process.stdout is not None:
        process.stdout.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the child and what it may have started: on POSIX it leads a process group of its own."""
    if sys.platform == "win32":
        process.kill()
    elif process.poll() is None:  # not reaped yet, so its number is still its own
        os.killpg(process.pid, signal.SIGKILL)
