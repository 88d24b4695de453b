"""The scripted endpoint's side of a connection: HTTP in, a paced answer out. What to answer is ``fake``'s job.

A stamp is taken just before the bytes are handed to the kernel: no client can have them earlier.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections import deque
from collections.abc import Iterator
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple, cast

import httptools

from loadbench.target.fake_answer import KEEP_ALIVE, Ask, Step, error_body, reply
from loadbench.target.fake_faults import End

if TYPE_CHECKING:
    from loadbench.target.fake import FakeServer

NEVER = sys.maxsize
FOUNDRY_KEEP_ALIVE_NS = 250_000_000
LINGER_0 = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)  # closing sends an RST


class Message(NamedTuple):
    """One HTTP request, whole. ``received_ns`` is when its last byte was read."""

    method: str
    path: str
    headers: dict[bytes, bytes]
    body: bytes
    received_ns: int
    keep_alive: bool

    def header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")


class Connection(asyncio.Protocol):
    """One client's connection: bytes to messages, and one answer at a time."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        server.connections_seen += 1
        self.number = server.connections_seen
        self.writable = True
        self.stream: Stream | None = None
        self._busy = False
        self._waiting: deque[Message] = deque()
        self._parser = httptools.HttpRequestParser(self)
        self._stamp_ns = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        # 0: uvloop sends at once and not at the end of its turn, and a client that does not read is noticed at once.
        self.transport.set_write_buffer_limits(high=0)
        if self.server.script.nagle:
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        self.server.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._stamp_ns = perf_counter_ns()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.transport.write(reply(400, error_body(400, f"not HTTP: {error}"), close=True))
            self.transport.close()

    def on_message_begin(self) -> None:
        self._path = b""
        self._headers: dict[bytes, bytes] = {}
        self._body = b""

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        message = Message(
            self._parser.get_method().decode(),
            self._path.partition(b"?")[0].decode("latin-1"),
            self._headers,
            self._body,
            self._stamp_ns,
            self._parser.should_keep_alive(),
        )
        if self._busy:
            self._waiting.append(message)
        else:
            self._busy = True
            self.server.take(self, message)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        if self.stream is not None:
            self.stream.resume()

    def connection_lost(self, error: Exception | None) -> None:
        self.leave()

    def leave(self) -> None:
        """Nobody is there any more."""
        self.server.connections.discard(self)
        if self.stream is not None:
            self.stream.abandon()

    def finish(self, end: End, close: bool) -> None:
        """The answer is over: close, or take the next message."""
        self.stream = None
        self._busy = False
        if end is End.RESET:
            self.reset()
        elif close or end is End.FIN or not self.server.listening:
            self.transport.close()
        elif self._waiting:
            self._busy = True
            self.server.loop.call_soon(self.server.take, self, self._waiting.popleft())

    def close_if_idle(self) -> None:
        if not self._busy:
            self.transport.close()

    def reset(self) -> None:
        """End the connection with an RST."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        self.transport.abort()


class Stream:
    """One chat request on its way: what is due next, and what was sent when."""

    def __init__(self, server: FakeServer, connection: Connection, message: Message, ask: Ask) -> None:
        self.server = server
        self.connection = connection
        self.message = message
        self.ask = ask
        keep_alive_ms = ask.script.keep_alive_ms
        self._keep_alive_ns = None if keep_alive_ms is None else int(keep_alive_ms * 1e6)
        if ask.fault.name == "first_token_deadline" and self._keep_alive_ns is None:
            self._keep_alive_ns = FOUNDRY_KEEP_ALIVE_NS
        if not ask.stream:
            self._keep_alive_ns = None
        self._steps: Iterator[Step] = iter(())
        self._head = ask.head() if ask.stream else b""
        self._payload: bytes | End = b""
        self._tokens_due = 0
        self._base_ns = 0
        self._due_ns = NEVER
        self._wake_ns = NEVER
        self._sent_ns = message.received_ns
        self._parked = False
        self._was_parked = False
        self._over = False
        self.started_ns: int | None = None
        self.first_ns: int | None = None
        self.last_ns: int | None = None
        self.tokens = 0
        self.max_late_ns: int | None = None

    def open(self) -> None:
        """Take the connection, and send what goes out before there is a slot."""
        self.connection.stream = self
        if self.ask.script.role_chunk == "receipt" and self.ask.fault.head == "at_once" and (role := self.ask.role()):
            self._sent_ns = perf_counter_ns()
            self._write(role)

    def wait(self) -> None:
        """Queue: nothing is due, but keep-alives go on."""
        self._arm()

    def begin(self, at_ns: int) -> None:
        """Serve it from ``at_ns`` on: the schedule counts from there, even if that is a little past."""
        self.started_ns = self._base_ns = self._due_ns = at_ns
        self._steps = self.ask.steps()
        self._next()

    def resume(self) -> None:
        """The client reads again."""
        if self._parked:
            self._parked = False
            self.server.pacer.call_at(self._wake_ns, self._wake)

    def postpone(self, by_ns: int) -> None:
        """Move the rest of the schedule; the pacer moves its own part."""
        self._base_ns += by_ns
        self._due_ns += by_ns
        self._wake_ns += by_ns

    def abandon(self) -> None:
        """The client has left."""
        if not self._over:
            self._over = True
            self.server.record(self, None)
            self.server.release(self, perf_counter_ns())

    def _next(self) -> None:
        step = next(self._steps, None)
        if step is None:
            self._end(End.COMPLETE, self._sent_ns)
        else:
            after_ns, self._payload, self._tokens_due = step
            self._due_ns = max(self._base_ns + after_ns, self._due_ns)
            self._arm()

    def _arm(self) -> None:
        wake_ns = self._due_ns
        if self._keep_alive_ns is not None:
            wake_ns = min(wake_ns, self._sent_ns + self._keep_alive_ns)
        if wake_ns < NEVER:
            self._wake_ns = wake_ns
            self.server.pacer.call_at(wake_ns, self._wake)

    def _wake(self, at_ns: int) -> None:
        if at_ns != self._wake_ns or self._over:
            return  # a call that a later one replaced
        if not self.connection.writable:
            self._parked = self._was_parked = True
            return
        now_ns = perf_counter_ns()
        payload: bytes | End = self._payload
        if now_ns < self._due_ns:
            self._sent_ns = now_ns
            self._write(self.ask.frame(KEEP_ALIVE))
            self._arm()
        elif isinstance(payload, End):
            self._end(payload, now_ns)
        else:
            if self._tokens_due:
                if self.first_ns is None:
                    self.first_ns = now_ns
                self.last_ns = now_ns
                self.tokens += self._tokens_due
                late_ns = now_ns - self._due_ns
                if self.max_late_ns is None or late_ns > self.max_late_ns:
                    self.max_late_ns = late_ns
            if payload:
                self._sent_ns = now_ns
                self._write(payload)
            self._next()

    def _write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        self.connection.transport.write(data)

    def _end(self, end: End, now_ns: int) -> None:
        if end is End.HANG:
            self._due_ns = NEVER
            self._arm()
            return
        self._over = True
        self.server.record(self, now_ns)
        # By the schedule and not by the clock: lateness must not add up from one customer of a slot to the next.
        self.server.release(self, now_ns if self._was_parked else self._due_ns)
        self.connection.finish(end, self.ask.close)
        if self.ask.fault.server == "crashes":
            self.server.crash()
