"""The probe: serves this machine's memory figures, and its clock, to a loadbench on another host. Read-only.

What it takes is bounded: GET of two paths, 4 KiB of request, no body, eight connections, five seconds for a request to
arrive. However often it is asked, figures are read no more than 20 times a second.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from time import perf_counter_ns, time_ns
from typing import Any, TextIO

import orjson

from loadbench.errors import TargetError, UsageError
from loadbench.target.memory import MemoryWatch
from loadbench.target.memory_figures import MemoryFigures
from loadbench.target.processes import find_service

SCHEMA = "loadbench-probe/1"
REQUEST_LIMIT_BYTES = 4096
CONNECTIONS_LIMIT = 8
REQUEST_TIMEOUT_S = 5.0
IDLE_TIMEOUT_S = 60.0
"""Between the requests of somebody who has shown the token; before that, REQUEST_TIMEOUT_S is all there is."""
FRESH_NS = 50_000_000
SEARCH_EVERY_NS = 1_000_000_000  # for the successor of a service that has ended: it reads every process

_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed"}
_REASONS |= {408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}

Find = Callable[[], tuple[int | None, str]]


TOKEN_LEAST = 16  # characters beyond loopback, where anybody may try: of a word of eight it would take a night


def check_token(token: str | None, given_by: str = "probe: --token or LOADBENCH_PROBE_TOKEN") -> str | None:
    """The token, if it fits into a header. UsageError, without it, if not: an empty one is a mistake, not no token."""
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise UsageError(f"{given_by}: expected printable ASCII without spaces, got something else")
    return token


class TargetWatch:
    """The figures of a service. When it has ended, ``find`` looks for its successor, unless it was ``named_by_pid``.

    Raises TargetError where nothing is found at the start.
    """

    def __init__(self, find: Find, *, named_by_pid: bool, clock: Callable[[], int] = perf_counter_ns) -> None:
        pid, self.what = find()
        if pid is None:
            raise TargetError(f"probe: {self.what}")
        self._find = find
        self._may_return = not named_by_pid  # a pid's next owner is somebody else
        self._clock = clock
        self._searched_ns = self._read_ns = 0
        self._asking = asyncio.Lock()
        self._watch = MemoryWatch(pid)
        self._figures = MemoryFigures()

    async def figures(self) -> tuple[MemoryFigures, dict[str, str]]:
        """Figures no older than FRESH_NS, on this machine's monotonic clock, and what is absent."""
        async with self._asking:
            if not self._read_ns or self._clock() - self._read_ns > FRESH_NS:
                self._figures = await asyncio.to_thread(self._read)
            return self._figures, dict(self._watch.absent)

    def _read(self) -> MemoryFigures:
        self._read_ns = self._clock()
        found = self._watch.read(self._read_ns)
        if found.processes is None and self._may_return and self._read_ns - self._searched_ns > SEARCH_EVERY_NS:
            self._searched_ns = self._read_ns
            pid, what = self._find()
            if pid is not None:
                self.what, self._watch = what, MemoryWatch(pid)
                found = self._watch.read(self._read_ns)
        return found


class Probe:
    """A probe that listens at ``url``. ``what`` it watches may change: a service may come back as another process."""

    def __init__(self, watch: TargetWatch, token: str | None) -> None:
        self._watch = watch
        self._token = token
        self._talks: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], None] = {}  # have not been answered yet; oldest first

    @property
    def what(self) -> str:
        return self._watch.what

    async def listen(self, host: str, port: int) -> None:
        """Raises UsageError where nobody can listen there."""
        try:
            self._server = await asyncio.start_server(self._accept, host, port, limit=REQUEST_LIMIT_BYTES)
        except socket.gaierror:
            raise UsageError(
                f"probe: --listen: expected an address of this machine, got {host}: no such host"
            ) from None
        except OSError as error:
            raise UsageError(f"probe: --listen: expected an address that is free, got {host}:{port}: {error}") from None
        ip, port = self._server.sockets[0].getsockname()[:2]
        self.url = f"http://[{ip}]:{port}" if ":" in ip else f"http://{ip}:{port}"

    async def close(self) -> None:
        self._server.close()
        for talk in self._talks:
            talk.cancel()
        await asyncio.gather(*self._talks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        full = len(self._talks) >= CONNECTIONS_LIMIT and not self._end_a_stranger()
        self._talks.add(task)
        self._strangers[task] = None
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                if full:
                    writer.write(_answer(503, {"error": "too many connections"}, close=True))
                else:
                    await self._talk(reader, writer)
        finally:
            self._talks.discard(task)
            self._strangers.pop(task, None)
            writer.close()

    def _end_a_stranger(self) -> bool:
        """Have the oldest connection that has shown no token make room: silent ones must not keep others out."""
        oldest = next(iter(self._strangers), None)
        if oldest is None:
            return False
        del self._strangers[oldest]
        oldest.cancel()
        return True

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request after the other; whoever asks what is not offered is answered once."""
        allowed_s = REQUEST_TIMEOUT_S
        status = 200
        while status == 200:
            body: dict[str, Any] = {}
            try:
                async with asyncio.timeout(allowed_s):
                    head = await reader.readuntil(b"\r\n\r\n")
                status, body = await self._reply(head, perf_counter_ns())
                if status == 200 and (task := asyncio.current_task()) is not None:
                    self._strangers.pop(task, None)
            except TimeoutError:
                status = 408
            except asyncio.LimitOverrunError:
                status = 431
            writer.write(_answer(status, body or {"error": _REASONS[status]}, close=status != 200))
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await writer.drain()
            allowed_s = IDLE_TIMEOUT_S

    async def _reply(self, head: bytes, received_ns: int) -> tuple[int, dict[str, Any]]:
        line, *rest = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (each.partition(":") for each in rest)}
        method, _, target = line.partition(" ")
        path, _, version = target.partition(" ")
        if self._token is not None:  # before anything else is told
            shown = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(shown, f"Bearer {self._token}".encode("latin-1")):
                return 401, {}
        if not version.startswith("HTTP/1."):
            return 400, {}
        if method != "GET":
            return 405, {}
        if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
            return 400, {}
        if path == "/v1/clock":
            return 200, {"schema": SCHEMA, "received_ns": received_ns, "sent_ns": perf_counter_ns()}
        if path == "/v1/memory":
            figures, absent = await self._watch.figures()
            body = {"schema": SCHEMA, "t_ns": figures.t_ns, "wall_ns": time_ns(), "service": self._watch.what}
            return 200, body | {"figures": figures.as_json(), "absent": absent}
        return 404, {}


def _answer(status: int, body: dict[str, Any], *, close: bool) -> bytes:
    data = orjson.dumps(body)
    head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    more = "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
    return (head + more + ("Connection: close\r\n" if close else "") + "\r\n").encode("ascii") + data


async def serve_probe(
    host: str,
    port: int,
    token: str | None = None,
    *,
    pid: int | None = None,
    service_port: int | None = None,
    name: str | None = None,
) -> Probe:
    """Start to serve the figures of one process on the running loop; ``port`` 0: any that is free.

    Which process: ``pid``, or the listener of ``service_port``, or what is called like the pattern ``name``, or what
    looks like Foundry Local. Raises UsageError without a token that is hard to guess beyond loopback, TargetError where
    there is no process.
    """
    if check_token(token) is None and not _is_loopback(host):
        raise UsageError(f"probe: --listen: expected a loopback address unless a token is given, got {host}")
    if token is not None and len(token) < TOKEN_LEAST and not _is_loopback(host):
        wanted = f"expected a token of {TOKEN_LEAST} characters or more to listen on {host}"
        raise UsageError(f"probe: --token or LOADBENCH_PROBE_TOKEN: {wanted}, got one of {len(token)}")
    probe = Probe(TargetWatch(lambda: find_service(pid, service_port, name), named_by_pid=pid is not None), token)
    await probe.listen(host, port)
    return probe


async def run_probe(
    host: str,
    port: int,
    token: str | None,
    *,
    pid: int | None,
    service_port: int | None,
    name: str | None,
    out: TextIO,
) -> None:
    """Serve until SIGINT or SIGTERM. The first line that ``out`` gets is the address, the second what is watched."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    probe = await serve_probe(host, port, token, pid=pid, service_port=service_port, name=name)
    try:
        out.write(f"{probe.url}\nwatching {probe.what}\n")
        out.flush()
        await stop.wait()
    finally:
        await probe.close()


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
