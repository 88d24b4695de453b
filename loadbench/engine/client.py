"""Sends one request over HTTP/1.1 and says what happened: ``send(Request) -> Sample``. Load is somebody else's job.

A Protocol on httptools, not aiohttp, because starting a request through aiohttp costs 166 µs and an event 29 µs, and
that time would be inside the numbers. Every stamp is taken when bytes arrive, before any parsing. Nothing is retried: a
retry inside a measurement hides a failure and adds a request that nobody asked for.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from array import array
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from loadbench.engine.exchange import BODY_LIMIT_BYTES, Exchange, Wire, request_body, request_head
from loadbench.engine.sse import readable
from loadbench.platform import acknowledge_always, acknowledge_at_once
from loadbench.records import Asked, Request, Sample

GRACE_NS = 1_000_000_000
"""How long after [DONE] the HTTP message may take to end before the connection is given up (the sample is whole)."""

OPEN_TIMEOUT_S = 5.0
"""How long a connection may take that is made ready before a level: one of a fleet may never answer again."""


class Client:
    """Connections to one endpoint, kept warm, and one request at a time on each.

    ``gaps(kind)`` returns the array that the gaps between content chunks of that kind of prompt are appended to, in
    nanoseconds. ``origin_ns`` is the run's zero on ``perf_counter_ns``: samples are relative to it.
    """

    def __init__(self, wire: Wire, origin_ns: int, gaps: Callable[[str], array[int]]) -> None:
        self.wire = wire
        self.connections_opened = 0
        self._origin_ns = origin_ns
        self._gaps = gaps
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._connecting: dict[Exchange, asyncio.Timeout] = {}
        self._head = request_head(wire)
        self._tls = ssl.create_default_context() if wire.tls else None

    async def open(self, connections: int) -> None:
        """Have that many connections ready, so that none is set up inside the level. What fails shows when it sends."""
        missing = connections - len(self._idle)
        for start in range(0, missing, 64):  # in batches: a listen backlog is finite
            batch = [self._connect_in_time() for _ in range(min(64, missing - start))]
            opened = await asyncio.gather(*batch, return_exceptions=True)
            self._idle += [connection for connection in opened if isinstance(connection, _Connection)]
            if any(isinstance(failure, OSError) for failure in opened):
                return

    async def send(self, request: Request, *, level: int, phase: str, within_s: float | None = None) -> Sample:
        """Send one request and wait for its end, ``within_s`` at most. Raises nothing that a server can cause."""
        return (await self._exchanged(request, level, phase, within_s)).sample(self._origin_ns)

    async def ask(self, request: Request, *, level: int, phase: str, within_s: float | None = None) -> Asked:
        """The same, with what was answered."""
        exchange = await self._exchanged(request, level, phase, within_s)
        return Asked(exchange.sample(self._origin_ns), exchange.text())

    async def _exchanged(self, request: Request, level: int, phase: str, within_s: float | None) -> Exchange:
        gaps = self._gaps(request.prompt.kind) if phase == "load" else array("q")
        wire = self.wire if within_s is None else self.wire.within(within_s)
        exchange = Exchange(request, level, phase, wire, gaps)
        connection = self._take_idle()
        if connection is None:
            began = perf_counter_ns()
            try:
                connection = await self._connect_in_time(exchange)
            except OSError as error:
                exchange.fail("connect_refused", _why_refused(error))
                return exchange
            exchange.connect_ns = perf_counter_ns() - began
        self._busy.add(connection)
        try:
            await connection.exchange(exchange, self._head, request_body(self.wire, request))
        finally:
            self._busy.discard(connection)
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.abort()
        return exchange

    def unsent(self, request: Request, level: int, outcome: str) -> Sample:
        """The record of a request that was never sent."""
        exchange = Exchange(request, level, "load", self.wire, self._gaps(request.prompt.kind))
        exchange.fail(outcome, None)
        return exchange.sample(self._origin_ns)

    def streaming(self) -> tuple[int, int]:
        """How many requests of the load are under way and have had a token, and when the last of these tokens came."""
        streams = [load.stream for connection in self._busy if (load := connection.load)]
        had_ns = [stream.last_token_ns for stream in streams if stream.last_token_ns is not None]
        return len(had_ns), max(had_ns, default=self._origin_ns) - self._origin_ns

    def abort(self, outcome: str, detail: str) -> None:
        """End every request of the load in flight now, with this outcome."""
        for connection in tuple(self._busy):
            if connection.load is not None:
                connection.give_up(outcome, detail)
        for exchange, patience in self._connecting.items():
            exchange.fail(outcome, detail)
            if not patience.expired():
                patience.reschedule(0)

    def close(self) -> None:
        """Close every idle connection."""
        while self._idle:
            self._idle.pop().abort()

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_quiet():
                return connection
            connection.abort()
        return None

    async def _connect_in_time(self, exchange: Exchange | None = None) -> _Connection:
        """Connect before the first-token deadline, for this exchange if `abort` is to end it too."""
        wire = self.wire if exchange is None else exchange.wire
        longest_s = wire.first_token_s if exchange is not None else min(wire.first_token_s, OPEN_TIMEOUT_S)
        async with asyncio.timeout(longest_s) as patience:
            if exchange is None:
                return await self._connect()
            self._connecting[exchange] = patience
            try:
                return await self._connect()
            finally:
                del self._connecting[exchange]

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        wire = self.wire
        name = urlsplit(f"//{wire.authority}").hostname if self._tls else None
        sock = socket.socket(socket.AF_INET6 if ":" in wire.host else socket.AF_INET)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, (wire.host, wire.port))
            _, connection = await loop.create_connection(
                lambda: _Connection(sock, self._forget), sock=sock, ssl=self._tls, server_hostname=name
            )
        except BaseException:  # cancelled, too: nobody else would close it
            sock.close()
            raise
        acknowledge_always(sock)
        self.connections_opened += 1
        return connection

    def _forget(self, connection: _Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)


class _Connection(asyncio.Protocol):
    """One TCP connection. httptools calls the ``on_`` methods; between answers ``_exchange`` is None."""

    def __init__(self, sock: socket.socket, forget: Callable[[_Connection], None]) -> None:
        self._socket = sock  # the loop's own view of it costs 2.4 µs a call instead of 0.7
        self._forget = forget
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._over: asyncio.Future[None] | None = None
        self._parser: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._now_ns = 0
        self._deadline_ns = 0
        self._complete = False
        self._ending = False
        self._until_close = True
        self._is_json = False
        self._location = ""
        self._refused: str | None = None
        self.reusable = False

    async def exchange(self, exchange: Exchange, head: bytes, body: bytes) -> None:
        """Send and wait until the answer is over or given up."""
        loop = asyncio.get_running_loop()
        self._exchange, self._over = exchange, loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._complete, self._ending, self._refused = False, False, None
        self.reusable = False  # until the answer is whole
        transport, request = self._transport, exchange.request
        if transport is None or transport.is_closing():
            exchange.fail("connection_lost", "closed before the request was sent")
            return
        request_id = exchange.phase.encode(), exchange.level, request.seq
        data = head % (*request_id, len(body)) + body
        exchange.sent_ns = perf_counter_ns()
        self._deadline_ns = exchange.sent_ns + int(min(exchange.wire.first_token_s, exchange.wire.total_s) * 1e9)
        transport.write(data)
        acknowledge_at_once(self._socket)
        self._timer = loop.call_later((self._deadline_ns - exchange.sent_ns) / 1e9, self._on_deadline)
        try:
            await self._over
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._exchange = None

    @property
    def load(self) -> Exchange | None:
        """What is under way on it, where that is a request of the load."""
        return self._exchange if self._exchange is not None and self._exchange.phase == "load" else None

    def is_quiet(self) -> bool:
        """Whether the server has neither closed nor said anything since its last answer.

        Asks the kernel, since the loop may not have looked yet: what is sent to a server that has closed is lost, and
        the fault would be ours. Costs 1.4 µs.
        """
        if self._transport is None or self._transport.is_closing():
            return False
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def give_up(self, outcome: str, detail: str | None) -> None:
        """End the exchange here and now; the connection cannot be used again."""
        self.reusable = False
        if self._exchange is not None:
            self._exchange.fail(outcome, detail)
        self._finish()
        self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:  # nobody asked: whatever it is, it is not the answer to the next request
            self.abort()
            return
        self._now_ns = perf_counter_ns()
        exchange.bytes_received += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            raise error.__context__ or error from None  # a bug of ours: never the server's protocol error
        except httptools.HttpParserUpgrade:
            self._refused = self._refused or "the server wants to switch protocols"
        except httptools.HttpParserError as error:
            self._refused = self._refused or f"not HTTP: {error}: {readable(data, 80)}"
        if self._refused is not None:
            self.give_up("protocol", self._refused)
        elif self._complete:
            exchange.settle(self._now_ns)
            self._finish()
        else:
            acknowledge_at_once(self._socket)
            if exchange.stream.over and not self._ending:
                self._ending = True  # all is said but the HTTP message goes on
                self._deadline_ns = self._now_ns + GRACE_NS
                self._rearm(GRACE_NS)

    def eof_received(self) -> bool | None:
        return None  # close: connection_lost tells the rest

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        self._forget(self)
        exchange = self._exchange
        if exchange is None:
            return
        now_ns, stream = perf_counter_ns(), exchange.stream
        if error is None and exchange.headers_ns is not None and self._until_close:
            exchange.settle(now_ns)
        elif stream.problem or (stream.done_ns is not None and stream.finish_reason is not None):
            exchange.settle(now_ns)  # all is said; only the framing was cut
        else:
            exchange.fail("connection_lost", _why_lost(error, exchange))
        self._finish()

    # what the HTTP parser calls

    def on_message_begin(self) -> None:
        if self._complete:
            self._refused = "bytes after the end of the answer"
        self._until_close, self._is_json, self._location = True, False, ""  # an interim answer has headers too

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower in (b"content-length", b"transfer-encoding"):
            self._until_close = False
        elif lower == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            self._refused = f"content-encoding {readable(value)}, though identity was asked for"
        elif lower == b"content-type":
            self._is_json = value.strip().lower().startswith(b"application/json")
        elif lower == b"location":
            self._location = readable(value)

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if 100 <= status < 200 or self._complete:
            return
        exchange = self._exchange
        assert exchange is not None
        exchange.headers_ns, exchange.http_status = self._now_ns, status
        if 300 <= status < 400:
            self._refused = f"redirect ({status}) to {self._location or 'nowhere'} refused: name the final URL"
        exchange.streamed = exchange.wire.stream and status == 200 and not self._is_json

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        assert exchange is not None
        if self._complete:
            return
        if exchange.streamed:
            exchange.stream.feed(body, self._now_ns)
        elif not exchange.keep(body):
            self._refused = f"an answer of more than {BODY_LIMIT_BYTES >> 20} MiB"

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:
            self._complete = True
            self.reusable = self._parser.should_keep_alive() and not self._until_close

    # deadlines: on the clock, since keep-alives keep a silent socket busy for ever

    def _rearm(self, delay_ns: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay_ns / 1e9, self._on_deadline)

    def _on_deadline(self) -> None:
        exchange, now_ns = self._exchange, perf_counter_ns()
        if exchange is None or exchange.sent_ns is None:
            return
        stream = exchange.stream
        total_ns = exchange.sent_ns + int(exchange.wire.total_s * 1e9)
        if now_ns < self._deadline_ns:  # timers are whole milliseconds and may fire early
            self._rearm(self._deadline_ns - now_ns)
        elif self._ending:
            exchange.settle(now_ns)
            self._finish()
        elif now_ns >= total_ns:
            self.give_up("total_deadline", f"not complete after {exchange.wire.total_s:g} s")
        elif exchange.wire.stream and stream.first_token_ns is None:
            self.give_up("first_token_deadline", f"no token after {exchange.wire.first_token_s:g} s")
        else:
            self._deadline_ns = total_ns
            self._rearm(total_ns - now_ns)

    def _finish(self) -> None:
        self._exchange = None
        if self._over is not None and not self._over.done():
            self._over.set_result(None)


def _why_refused(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):  # its errno is OpenSSL's
        return str(error)
    if error.errno:
        return os.strerror(error.errno)
    late = isinstance(error, TimeoutError)
    return "no connection before the first-token deadline" if late else str(error) or type(error).__name__


def _why_lost(error: Exception | None, exchange: Exchange) -> str:
    where = "before the headers" if exchange.headers_ns is None else f"after {exchange.stream.chunks} content chunks"
    if isinstance(error, OSError) and error.errno:
        return f"{os.strerror(error.errno)} {where}"
    return f"closed {where}"
