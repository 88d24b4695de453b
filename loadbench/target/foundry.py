"""Run a real Foundry Local in a child process, and see to it that the process ends.

What runs in the child is ``foundry_child``'s; loading models and asking them is ``endpoint``'s, over HTTP like for any
other service.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
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

START_TIMEOUT_S = 60.0  # it takes 0.2 s; a cold disk and a virus scanner take longer
STOP_TIMEOUT_S = 5.0  # it ends within milliseconds; after this it is killed

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
    the child's output goes to.
    """

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, answer: Mapping[str, Any]) -> None:
        self._process = process
        self._folder = folder
        self.root_url: str = answer["url"].replace("//0.0.0.0:", "//127.0.0.1:")  # bound to all is no address to call
        self.base_url = self.root_url + ("/catalogs/local/v1" if answer["models"] else "/v1")
        self.pid: int = answer["pid"]
        self.versions: dict[str, str] = answer["versions"]
        self.model_ids: tuple[str, ...] = tuple(answer["models"])
        self.log = folder / "child.log"

    @classmethod
    async def start(cls, models: Mapping[str, Path], cache: Path, *, host: str = "127.0.0.1", port: int = 0) -> Self:
        """Start the service with ``models`` (id such as ``name:1`` → folder) registered, none of them loaded.

        Port 0 lets the system choose. Without models, those that the service itself downloads are kept in ``cache``.
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
        process = _spawn(folder / "child.log")
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                answer = await asyncio.to_thread(_converse, process, request)
        except TimeoutError:
            answer = {"error": f"no answer within {START_TIMEOUT_S:.0f} s"}
        except BaseException:
            _end(process, grace_s=0)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if "error" in answer:
            _end(process, grace_s=0)
            log = folder / "child.log"
            raise TargetError(f"the embedded Foundry Local did not start: {answer['error']} (log: {log})")
        return cls(process, folder, answer | {"models": list(models)})

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
            await asyncio.sleep(0.5)  # a process that is not asyncio's signals no event
        return code

    async def stop(self) -> None:
        """End the child, by force if need be. Its folder goes too, but not if it had died before: the log tells why."""
        await asyncio.to_thread(self._stop)  # in a thread, so that being cancelled does not leave it half done

    def _stop(self) -> None:
        died = not self.alive()
        _end(self._process, STOP_TIMEOUT_S)
        if not died:
            shutil.rmtree(self._folder, ignore_errors=True)


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


def _spawn(log: Path) -> subprocess.Popen[bytes]:
    """Start the child out of reach of the terminal's Ctrl-C: it has to serve until we have drained.

    Called in the event loop's thread, since Linux ends the child with the thread that started it, not with the process.
    """
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "loadbench.target.foundry_child"],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env=os.environ | QUIET,
            **apart(),
        )


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
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
