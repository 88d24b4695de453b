"""The scripted endpoint: an OpenAI-compatible server that lies on demand, and logs what it really did.

Chat answers come at the script's times (``fake_script``), as bytes made by ``fake_answer``, with faults from
``fake_faults``, paced by ``fake_pacer``, over the connections of ``fake_wire``. All times are ``perf_counter_ns``; on
Linux that is CLOCK_MONOTONIC, one clock for all processes, so a client may compare them with its own.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from collections import deque
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from random import Random
from time import perf_counter_ns
from typing import Any, BinaryIO, NamedTuple

import orjson

from loadbench.errors import UsageError
from loadbench.platform import loop_factory
from loadbench.target.fake_answer import Ask, error_body, reply
from loadbench.target.fake_faults import HONEST, End, Fault
from loadbench.target.fake_flavours import CHAT, FLAVOURS, Shelf
from loadbench.target.fake_pacer import Pacer
from loadbench.target.fake_script import Script, choose_answer, choose_fault, script_from_json, stretch
from loadbench.target.fake_wire import Connection, Message, Stream

__all__ = ["FakeServer", "Script", "Truth", "run_fake", "serve"]

RECORDS_KEPT = 100_000  # some 50 MB


class Truth(NamedTuple):
    """What one chat request really got; one line of the log. Times are ``perf_counter_ns``, None: it never happened.

    ``slot_wait_ns`` runs from receipt to service. ``first_token_ns`` and ``last_token_ns`` are content, ``done_ns`` is
    the end as the server made it; None if the client left before. ``max_late_ns`` is the worst content event against
    the schedule: this server's own fault, or a client that does not read.
    """

    seq: int
    connection: int
    request_id: str | None
    status: int
    fault: str | None
    received_ns: int
    slot_wait_ns: int | None
    first_token_ns: int | None
    last_token_ns: int | None
    done_ns: int | None
    tokens: int
    max_late_ns: int | None


class FakeServer:
    """A listening scripted endpoint. ``records`` is the log, or its last hundred thousand lines."""

    def __init__(self, script: Script, log: Path | None, token: str | None) -> None:
        self.script = script
        self.loop = asyncio.get_running_loop()
        self.pacer = Pacer(self.loop)
        self.records: deque[Truth] = deque(maxlen=RECORDS_KEPT)
        self.connections: set[Connection] = set()
        self.connections_seen = 0
        self.listening = True
        self.host = ""
        self.port = 0
        self._token = token
        try:
            self._log: BinaryIO | None = None if log is None else log.open("ab")
        except OSError as error:
            raise UsageError(f"fake: --log: expected a file that can be written, got {log}: {error.strerror}") from None
        self._flavour = FLAVOURS[script.flavour]
        loaded = script.models if script.loaded is None else script.loaded
        self._shelf = Shelf(script.models, set(loaded), script.prefix, base_url="")
        self._draw = Random(script.seed)
        self._seq = 0
        self._active: set[Stream] = set()
        self._queue: deque[Stream] = deque()
        self._leaked: list[bytes] = []
        self._held: list[tuple[Connection, Message]] | None = None  # what came while everything stands still
        self._thawed_ns = 0

    @property
    def base_url(self) -> str:
        """The URL that a client is given, up to ``/v1``."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}{self.script.prefix}/v1"

    @property
    def stands_still(self) -> bool:
        """Whether the one stall of the whole server (``stall_at_s``) is on."""
        return self._held is not None

    async def listen(self, host: str, port: int) -> None:
        """Bind. Raises UsageError where that cannot be."""
        try:
            self._listener = await self.loop.create_server(lambda: Connection(self), host, port, backlog=4096)
        except OSError as error:
            raise UsageError(f"fake: cannot listen on {host}:{port}: {error.strerror or error}") from None
        self.host, self.port = self._listener.sockets[0].getsockname()[:2]
        self._shelf.base_url = self.base_url.removesuffix(f"{self.script.prefix}/v1")

    async def close(self) -> None:
        """Stop, reset what is still connected, log it, and close the log."""
        self.crash()
        for connection in list(self.connections):
            connection.leave()
        self.pacer.close()
        if self._log is not None:
            self._log.close()

    def stop_listening(self) -> None:
        """Refuse new connections from now on; those that are busy end with their answer."""
        self.listening = False
        self._listener.close()
        for connection in list(self.connections):
            connection.close_if_idle()

    def crash(self) -> None:
        """Look like a server that was killed."""
        self.stop_listening()
        for connection in list(self.connections):
            connection.reset()

    def take(self, connection: Connection, message: Message) -> None:
        """Answer a message, now or once the server moves again."""
        path = message.path
        if self._held is not None:
            self._held.append((connection, message))
        elif self._token is not None and message.header(b"authorization") != f"Bearer {self._token}":
            self._reply(connection, message, 401, error_body(401, "a bearer token is required"))
        elif message.method == "POST" and (shelf := self._flavour.shelf_below(self._shelf, path, CHAT)) is not None:
            self._chat(connection, message, shelf)
        elif message.method == "GET":
            self._reply(connection, message, *self._flavour.get(self._shelf, path))
        else:
            self._reply(connection, message, *self._flavour.post(self._shelf, path, message.body))

    def record(self, stream: Stream, done_ns: int | None) -> None:
        """Log a chat request that was served."""
        message = stream.message
        self._record(
            Truth(
                stream.ask.seq,
                stream.connection.number,
                message.header(b"x-request-id"),
                200,
                stream.ask.fault.label,
                message.received_ns,
                None if stream.started_ns is None else stream.started_ns - message.received_ns,
                stream.first_ns,
                stream.last_ns,
                done_ns,
                stream.tokens,
                stream.max_late_ns,
            )
        )

    def release(self, stream: Stream, at_ns: int) -> None:
        """Give a stream's slot to the next in the queue, which is served from ``at_ns`` on."""
        if stream not in self._active:
            self._queue.remove(stream)
            return
        self._active.remove(stream)
        if self._queue:
            follower = self._queue.popleft()
            self._begin(follower, max(at_ns, follower.message.received_ns))

    def _chat(self, connection: Connection, message: Message, shelf: Shelf) -> None:
        script = self.script
        self._seq += 1
        if self._seq == 1 and script.stall_at_s is not None:
            self.pacer.call_at(message.received_ns + int(script.stall_at_s * 1e9), self._freeze)
        if script.leak_bytes:
            self._leaked.append(b"\x01" * script.leak_bytes)  # written, so that it is resident
        try:
            ask = self._understand(message)
        except UsageError as error:
            self._refuse(connection, message, 400, error_body(400, str(error)))
            return
        fault = ask.fault
        if fault.server == "refuses" or self._seq == script.refuse_after:
            ask.close = True
            self.stop_listening()
        if (refusal := self._flavour.refusal(shelf, ask.model)) is not None:
            self._refuse(connection, message, refusal[0], error_body(*refusal))
        elif ask.status != 200 or fault.body is not None:
            body = error_body(ask.status, fault.text) if fault.text is not None else fault.body or b""
            self._refuse(connection, message, ask.status, body, fault)
        else:
            self._admit(Stream(self, connection, message, ask))

    def _understand(self, message: Message) -> Ask:
        """Read a chat request. Raises UsageError, which the client gets as its 400."""
        body = _object(message.body)
        model, messages = body.get("model"), body.get("messages")
        if not isinstance(model, str) or not isinstance(messages, list):
            raise UsageError("body: expected a model and messages")
        script, override = self.script, message.header(b"x-fake-script")
        if override is not None:
            script = script_from_json(override, "X-Fake-Script", script)
        texts = [_text(message) for message in messages]
        fault = choose_fault(script, self._seq, self._draw, message.header(b"x-fake-fault"), (model, *texts[-1:]))
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        if limit is not None and (type(limit) is not int or limit < 0):
            raise UsageError(f"body: max_tokens: expected a whole number, got {limit!r}")
        stream = body.get("stream") is True
        options = body.get("stream_options")
        return Ask(
            script,
            fault,
            self._seq,
            model,
            stream,
            tokens=script.tokens if limit is None else limit,
            finish_reason="stop" if limit is None else "length",
            input_tokens=sum(len(text.encode()) for text in texts),
            include_usage=script.usage and isinstance(options, dict) and options.get("include_usage") is True,
            close=not message.keep_alive or script.connection_close or (stream and script.framing == "close"),
            jitter_ns=int(script.first_token_jitter_ms * 1e6 * self._draw.random()),
            stretch=self._stretch,
            text=choose_answer(script, self._seq, texts[-1] if texts else "") if script.answers else None,
        )

    def _admit(self, stream: Stream) -> None:
        """Serve it, let it queue, or send it away."""
        slots, limit = self.script.slots, self.script.queue_limit
        if slots is None or len(self._active) < slots:
            stream.open()
            self._begin(stream, stream.message.received_ns)
        elif limit is None or len(self._queue) < limit:
            self._queue.append(stream)
            stream.open()
            stream.wait()
        else:
            body = error_body(503, f"the queue is full: {limit} requests wait")
            self._refuse(stream.connection, stream.message, 503, body)

    def _begin(self, stream: Stream, at_ns: int) -> None:
        self._active.add(stream)
        stream.begin(max(at_ns, self._thawed_ns))

    def _stretch(self) -> float:
        return stretch(self.script, len(self._active))

    def _freeze(self, due_ns: int) -> None:
        """Stand still: nothing is sent, nothing is read, and the work of everybody takes so much longer."""
        by_ns = int(self.script.stall_for_s * 1e9)
        self._held = []
        self.pacer.postpone(by_ns)
        for stream in (*self._active, *self._queue):
            stream.postpone(by_ns)
        self._thawed_ns = due_ns + by_ns
        self.pacer.call_at(self._thawed_ns, self._thaw)

    def _thaw(self, due_ns: int) -> None:
        held, self._held = self._held or [], None
        for connection, message in held:
            if connection in self.connections:
                self.take(connection, message)

    def _refuse(
        self, connection: Connection, message: Message, status: int, body: bytes, fault: Fault = HONEST
    ) -> None:
        """Answer a chat request at once, with what is no completion, and log it."""
        done_ns = perf_counter_ns()
        self._reply(connection, message, status, body, fault.headers)
        self._record(
            Truth(
                seq=self._seq,
                connection=connection.number,
                request_id=message.header(b"x-request-id"),
                status=status,
                fault=fault.label,
                received_ns=message.received_ns,
                slot_wait_ns=None,
                first_token_ns=None,
                last_token_ns=None,
                done_ns=done_ns,
                tokens=0,
                max_late_ns=None,
            )
        )

    def _reply(self, connection: Connection, message: Message, status: int, body: Any, headers: str = "") -> None:
        close = not message.keep_alive or self.script.connection_close or not self.listening
        connection.transport.write(reply(status, body, f"Server: {self._flavour.server}\r\n{headers}", close))
        connection.finish(End.COMPLETE, close)

    def _record(self, truth: Truth) -> None:
        self.records.append(truth)
        if self._log is not None:
            self._log.write(orjson.dumps(truth._asdict()) + b"\n")
            self._log.flush()


async def serve(
    script: Script, host: str = "127.0.0.1", port: int = 0, log: Path | None = None, token: str | None = None
) -> FakeServer:
    """Start a scripted endpoint on the running loop; port 0: any.

    ``log`` gets a JSON line per chat request, when it ends. With ``token`` every request must bear it; without, only
    loopback is served: raises UsageError.
    """
    if token is None and not _is_loopback(host):
        raise UsageError(f"fake: --host: expected a loopback address unless --token is given, got {host}")
    server = FakeServer(script, log, token)
    await server.listen(host, port)
    return server


def run_fake(
    script: Script,
    host: str = "127.0.0.1",
    port: int = 0,
    log: Path | None = None,
    duration_s: float | None = None,
    token: str | None = None,
    until_stdin_closes: bool = False,
) -> None:
    """Serve from a process of its own: print the base URL as the first line, end by SIGINT, SIGTERM or ``duration_s``.

    ``until_stdin_closes`` ends it with its parent, however that ends.
    """

    async def main() -> None:
        stop = asyncio.Event()
        _set_when_told(stop, until_stdin_closes)
        server = await serve(script, host, port, log, token)
        gc.collect()
        gc.freeze()  # a full collection pauses everybody; what is alive now stays alive
        sys.stdout.write(server.base_url + "\n")
        sys.stdout.flush()
        with suppress(TimeoutError):
            async with asyncio.timeout(duration_s):
                await stop.wait()
        await server.close()

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main())


def _set_when_told(stop: asyncio.Event, until_stdin_closes: bool) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))

    def watch_stdin() -> None:
        while os.read(0, 4096):
            pass
        loop.call_soon_threadsafe(stop.set)

    if until_stdin_closes:
        threading.Thread(target=watch_stdin, daemon=True).start()


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise UsageError("body: expected a JSON object")
    return value


def _text(message: Any) -> str:
    """The text of a chat message: its content, or the text parts of it."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""
