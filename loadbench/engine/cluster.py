"""A Ray cluster on whose machines the load processes are. Ray's one door: it finds them places and carries the post.

Nothing is tried twice: an actor that is lost is a load that was not sent, and the run that asked for it is invalid.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import platform
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from time import perf_counter_ns
from typing import Any
from urllib.parse import urlsplit

import orjson

from loadbench import __version__
from loadbench.engine.post import Mail, Post
from loadbench.engine.seat import END_TIMEOUT_S, Line
from loadbench.errors import UsageError
from loadbench.platform import describe_exit

PINGS = 8
"""Round trips by which a clock is read; the shortest counts, as in NTP (RFC 5905, the clock filter)."""

PING_GAP_S = 0.02
"""Between them: what makes one slow, a process that starts, has to be over for some."""

CALLS = 4
"""What an actor does at once: the long poll for its post, an order, a ping, and one to spare."""

TAKE_S = 0.25
"""How long a poll waits: as often as a load process tells of itself."""

RAY_CLIENT_PORT = 10001
CONNECT_TIMEOUT_S = 30.0
PLACE_TIMEOUT_S = 120.0
"""A cluster that grows on demand starts a machine within about two minutes."""


QUIET = {"RAY_DEDUP_LOGS_SKIP_REGEX": "^", "RAY_BACKEND_LOG_LEVEL": "fatal"}
"""Ray's own threads print what befalls a node, pages of it and on stdout, where the report goes or JSON. What concerns
us is told by the calls; who looks for more sets the variable, or reads Ray's logs."""


class Cluster:
    """A connection to a cluster. ``cpus`` is how many it has; each load process asks for one of them."""

    def __init__(self, ray: Any, address: str, ours: bool) -> None:
        self._ray = ray
        self._address = address
        self._ours = ours
        self._lines: list[_Mailbox] = []

    @classmethod
    async def connect(cls, address: str) -> Cluster:
        """Join the cluster at ``auto`` (RAY_ADDRESS, else the one here), ``host:port`` or ``ray://host:port``.

        UsageError: why not.
        """
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError as error:
            missing = "Ray, which is not installed" if error.name == "ray" else f"Ray, which lacks {error.name}"
            raise UsageError(f"--cluster: expected {missing}: pip install 'loadbench[ray]'") from None
        ours = not ray.is_initialized()  # a notebook may have joined one, and stays in it
        if ours:
            if address == "auto":
                address = os.environ.get("RAY_ADDRESS", address)
            if address != "auto":
                await _answers(address)
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
            errors = (OSError, RuntimeError, ValueError, ray.exceptions.RayError)
            await _join(lambda: ray.init(address=address, **quiet), address, errors)
        return cls(ray, address, ours)

    @property
    def cpus(self) -> int:
        return int(self._ray.cluster_resources().get("CPU", 0))

    async def start(self, order: Mapping[str, Any]) -> Line:
        """Start a load process somewhere on the cluster that carries out this order. UsageError where it cannot be."""
        options = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": CALLS}
        actor = self._ray.remote(Post).options(scheduling_strategy="SPREAD", **options).remote()
        files, order = _shipped(order)
        line = _Mailbox(self._ray, actor, Path(order["folder"]), order["index"])
        self._lines.append(line)
        try:
            line.facts |= await self._placed(line, files)
            line.node = line.facts["node"]
            _check_versions(line.node, line.facts)
            for host, port in order["endpoints"]:
                await line.check_reach(host, port)
            await line.read_clock("")
        except self._ray.exceptions.RayError as error:
            reason = _first_line(error)
            if "No module named" in str(error):
                reason = "a node has no loadbench: install it there, in the Python that runs Ray"
            raise UsageError(f"--cluster: load process {line.index} did not start: {reason}") from None
        there = {"folder": ".", "prompts": ".", "origin_ns": order["origin_ns"] + line.facts["offset_ns"]}
        line.tell(orjson.dumps({**order, **there}) + b"\n")
        return line

    async def _placed(self, line: _Mailbox, files: Mapping[str, bytes]) -> dict[str, Any]:
        """Where the cluster has put it."""
        try:
            async with asyncio.timeout(PLACE_TIMEOUT_S):
                facts: dict[str, Any] = await line.call("open", files)
        except TimeoutError:
            free = self._ray.available_resources().get("CPU", 0)
            found = f"{free:g} of the cluster's {self.cpus} are free"
            reason = f"load process {line.index} found no place in {PLACE_TIMEOUT_S:g} s"
            raise UsageError(f"--cluster: {reason}: each asks for one CPU, and {found}") from None
        return facts

    async def read_clocks(self) -> None:
        """Read every clock once more, at the end of a run; those that do not answer are left out."""
        living = (line for line in self._lines if line.end is None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                await asyncio.gather(*(line.read_clock("end_") for line in living), return_exceptions=True)

    def facts(self) -> dict[str, Any]:
        """``cluster`` of run.json."""
        workers = [line.facts for line in sorted(self._lines, key=lambda line: line.index)]
        return {"address": self._address, "ray": self._ray.__version__, "workers": workers}

    async def close(self) -> None:
        """Leave the cluster; what of ours is still there ends, and leaves nothing behind."""
        await asyncio.gather(*(line.close() for line in self._lines if not line.closed))
        if self._ours:
            await asyncio.to_thread(self._ray.shutdown)


class _Mailbox:
    """A `Line` to a load process, by way of the actor that started it. ``facts`` is what is known of it."""

    def __init__(self, ray: Any, actor: Any, folder: Path, index: int) -> None:
        self.index = index
        self.node: str | None = None
        self.round_trip_ns = 0
        self.end: str | None = None
        self.facts: dict[str, Any] = {"index": index}
        self.closed = False
        self._lost = (ray.exceptions.RayError, ConnectionError)
        self._ray = ray
        self._actor = actor
        self._folder = folder
        self._orders = b""
        self._sender: asyncio.Task[None] | None = None
        self._given_up = asyncio.Event()

    async def call(self, method: str, *values: Any) -> Any:
        """What the method returns. Shielded, since Ray does not bear that a future is cancelled under its hands."""
        called = asyncio.wrap_future(getattr(self._actor, method).remote(*values).future())
        called.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may wait for it any more
        return await asyncio.shield(called)

    async def check_reach(self, host: str, port: int) -> None:
        """UsageError where the endpoint cannot be reached from its machine."""
        elsewhere = self.node != socket.gethostname()
        if elsewhere and ipaddress.ip_address(host).is_loopback:
            found = f"{host}:{port}, which is another thing on {self.node}"
            raise UsageError(f"--cluster: expected an endpoint that every node can reach, got {found}")
        if why := await self.call("reaches", host, port):
            raise UsageError(f"--cluster: {self.node} cannot connect to the endpoint at {host}:{port}: {why}")

    async def read_clock(self, when: str) -> None:
        """Note how far ahead of ours its clock is, and by how much that may be wrong."""
        trips: list[tuple[int, int]] = []
        for _ in range(PINGS):
            sent_ns = perf_counter_ns()
            theirs_ns = await self.call("now_ns")
            back_ns = perf_counter_ns()
            trips.append((back_ns - sent_ns, theirs_ns - (sent_ns + back_ns) // 2))
            await asyncio.sleep(PING_GAP_S)
        round_trip_ns, offset_ns = min(trips)
        self.round_trip_ns = max(self.round_trip_ns, *(trip for trip, _ in trips))
        self.facts |= {f"{when}offset_ns": offset_ns, f"{when}error_ns": round_trip_ns // 2}

    def tell(self, line: bytes) -> None:
        """One call is under way at a time: Ray keeps no order between those of an actor with several threads."""
        self._orders += line
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())

    async def _send(self) -> None:
        with contextlib.suppress(*self._lost):  # `hear` tells of that
            while self._orders:
                lines, self._orders = self._orders, b""
                await self.call("tell", lines)

    async def hear(self) -> list[bytes] | None:
        """One poll is under way at a time: what is written faster than it comes waits on its machine's disk."""
        while self.end is None:
            poll = asyncio.create_task(self.call("take", TAKE_S))
            given_up = asyncio.create_task(self._given_up.wait())
            await asyncio.wait({poll, given_up}, return_when=asyncio.FIRST_COMPLETED)
            given_up.cancel()
            if not poll.done():
                poll.cancel()
                self.end = "was lost: its node does not answer"
                break
            try:
                mail: Mail = poll.result()
            except self._lost as error:
                self.end = f"was lost: {_why_lost(error)}"
                break
            try:
                for name, piece in mail.pieces.items():
                    _append(self._folder / name, piece)
            except OSError as error:
                self.end = f"sent what cannot be written here: {error.strerror}"
                break
            if mail.code is not None:
                self.end = f"died: {describe_exit(mail.code)}"
            if mail.lines or mail.pieces:
                return mail.lines
        return None

    def kill(self) -> None:
        """Its last words are waited for, though not for ever: with its node it may have gone altogether."""
        self._actor.kill.remote()
        asyncio.get_running_loop().call_later(END_TIMEOUT_S, self._given_up.set)

    async def close(self) -> None:
        self.closed = True
        with contextlib.suppress(*self._lost, TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                await self.call("close")
        self._ray.kill(self._actor)


def _append(path: Path, piece: bytes) -> None:
    with path.open("ab") as file:
        file.write(piece)


def _shipped(order: Mapping[str, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The bytes of all files that the scenario reads, by the names that they get, and the order with such names."""
    files: dict[str, bytes] = {}
    folder, scenario = Path(order["prompts"]), order["scenario"]

    def ship(path: Path) -> str:
        name = f"{len(files)}-{path.name}"
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
        return name

    prompts = [
        entry | {"file": ship(folder / entry["file"])} if entry.get("file") else entry for entry in scenario["prompts"]
    ]
    paths = {folder / stage["trace"] for stage in scenario["stages"] if stage.get("trace")}
    traces = {path.as_posix(): ship(path) for path in sorted(paths)}
    return files, {**order, "scenario": {**scenario, "prompts": prompts}, "traces": traces}


def _check_versions(node: str, facts: Mapping[str, Any]) -> None:
    """Both sides speak to each other, and draw the same schedule: they are to be of the same making."""
    for what, ours in (("loadbench", __version__), ("python", platform.python_version())):
        theirs, digits = facts[what], None if what == "loadbench" else 2
        if theirs.split(".")[:digits] != ours.split(".")[:digits]:
            raise UsageError(f"--cluster: expected {what} {ours} on {node}, as here, got {theirs}")


async def _answers(address: str) -> None:
    """UsageError where nobody listens at an address: Ray itself would try for minutes, and say so on the terminal."""
    try:
        split = urlsplit(address if "://" in address else f"//{address}")
        host, port = split.hostname, split.port or (RAY_CLIENT_PORT if split.scheme == "ray" else None)
    except ValueError:
        host, port = None, None
    if host is None or port is None:
        raise UsageError(f"--cluster: expected auto, HOST:PORT or ray://HOST:PORT, got {address}")
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
        writer.close()
    except OSError as error:  # a time-out, too
        reason = os.strerror(error.errno) if error.errno else "nobody answers"
        raise UsageError(f"--cluster {address}: cannot be connected to: {reason}") from None


async def _join(join: Callable[[], Any], address: str, errors: tuple[type[Exception], ...]) -> None:
    """Let Ray connect, in a thread that may be left alone: it cannot be interrupted, and takes over no signal there."""
    done: Future[Any] = Future()

    def work() -> None:
        done.set_running_or_notify_cancel()  # nobody who stops waiting can take it back
        try:
            done.set_result(join())
        except errors as error:
            done.set_exception(error)

    threading.Thread(target=work, name="ray", daemon=True).start()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await asyncio.wrap_future(done)
    except ConnectionError as error:
        if address != "auto":
            raise UsageError(f"--cluster {address}: {_first_line(error)}") from None
        found = "none that runs here; start one with: ray start --head"
        raise UsageError(f"--cluster auto: expected a Ray cluster, found {found}") from None
    except TimeoutError:
        raise UsageError(f"--cluster {address}: no Ray cluster answers there") from None
    except errors as error:
        raise UsageError(f"--cluster {address}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    """Ray's errors are pages, of which the first line says it; of what a call raised, its own."""
    lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return " ".join(lines)[:300] if first.endswith(":") else first  # a list follows, of versions that differ


def _why_lost(error: Exception) -> str:
    told = str(error)
    if "node" in told and ("node has died" in told or "node died" in told):
        return "its node died"
    if "owner has died" in told or "owner died" in told:
        return "Ray on the machine of this run died, and with it the actors"
    return "its actor died" if "actor" in told.lower() else _first_line(error)
