"""Run a real Foundry Local in a child process, and see to it that the process ends.

What runs in the child is ``foundry_child``'s; loading models and asking them is ``endpoint``'s, over HTTP like for any
other service.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from loadbench.errors import TargetError, UsageError
from loadbench.platform import apart
from loadbench.target.containment import Limit, limit_for

START_TIMEOUT_S = 60.0  # it takes 0.2 s; a cold disk and a virus scanner take longer
STOP_TIMEOUT_S = 5.0  # it ends within milliseconds; after this it is killed
KILL_TIMEOUT_S = 5.0  # what the kernel does not end by then hangs in a driver, and no patience helps
LOG_TAIL_BYTES = 64 << 10

COMMAND = (sys.executable, "-m", "loadbench.target.foundry_child")

# `CI` keeps the runtime from uploading anything: the two other switches still leave one event.
QUIET = {"CI": "true", "ORT_TELEMETRY_DISABLED": "1"}


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
    prefix) or, without any, those of the public catalog. ``versions`` maps package to version; ``log`` is the file that
    the child's output goes to; ``limit`` holds its memory, None: nothing does.
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
        self.model_ids: tuple[str, ...] = tuple(answer["models"])
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
    ) -> Self:
        """Start the service with ``models`` (id such as ``name:1`` → folder) registered, none of them loaded.

        Port 0 lets the system choose. Without models, those that the service itself downloads are kept in ``cache``.
        ``limit_kind`` as in ``containment.limit_for``.
        Raises TargetError when the service does not come up, with the reason and where its log is.
        """
        folder = _own_folder(cache)
        request = {
            "models": {model_id: str(path.absolute()) for model_id, path in models.items()},
            "app_data_dir": str(folder),
            # The runtime keeps its register of local models here: shared, two runs would undo each other's.
            "model_cache_dir": str(folder / "models" if models else cache / "catalog"),
            "logs_dir": str(folder),
            "host": host,
            "port": port,
        }
        limit = None if memory_limit_bytes is None else limit_for(COMMAND, memory_limit_bytes, limit_kind)
        process = _spawn(folder / "child.log", limit)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                answer = await asyncio.to_thread(_converse, process, request)
        except TimeoutError:
            answer = {"error": f"no answer within {START_TIMEOUT_S:.0f} s"}
        except BaseException:
            _end(process, grace_s=0)
            _release(limit)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if "error" in answer:
            _end(process, grace_s=0)
            _release(limit)
            log = folder / "child.log"
            raise TargetError(f"the embedded Foundry Local did not start: {answer['error']} (log: {log})")
        return cls(process, folder, answer | {"models": list(models)}, limit)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

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


def _spawn(log: Path, limit: Limit | None) -> subprocess.Popen[bytes]:
    """Start the child out of reach of the terminal's Ctrl-C: it has to serve until we have drained.

    Called in the event loop's thread, since Linux ends the child with the thread that started it, not with the process.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            COMMAND if limit is None else limit.command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env=os.environ | QUIET,
            **apart(),
        )
    if limit is not None:
        limit.hold(process)  # it waits for what it is to serve, so it has not begun
    return process


def _release(limit: Limit | None) -> None:
    if limit is not None:
        limit.release()


def _converse(process: subprocess.Popen[bytes], request: Mapping[str, Any]) -> dict[str, Any]:
    """Tell the child what to serve and wait for its answer, which is an ``error`` if it ends without one."""
    assert process.stdin is not None and process.stdout is not None
    with process.stdout:
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            line = process.stdout.read()
        except BrokenPipeError:
            line = b""
    answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended without a word"}
    return answer


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End the child: by closing its stdin, at which a wedged one ends too; one that is stopped takes a kill."""
    assert process.stdin is not None
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


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the child and what it may have started: on POSIX it leads a process group of its own."""
    if sys.platform == "win32":
        process.kill()
    elif process.poll() is None:  # not reaped yet, so its number is still its own
        os.killpg(process.pid, signal.SIGKILL)
