"""Both ends of a socket: the engine's client as a test uses it, and a server that sends the bytes it is told to."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import struct
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from time import perf_counter_ns
from typing import Any, Literal, TypeVar, cast

from loadbench.engine.client import Client
from loadbench.engine.exchange import Wire
from loadbench.records import Prompt, Request, Sample
from loadbench.target.fake import FakeServer, Script, serve

T = TypeVar("T")
MS = 1_000_000

# --- the asking end ---------------------------------------------------------------------------------------------------


def wire_to(port: int, **changes: Any) -> Wire:
    """A streaming request to a port of this machine, patient enough for a busy one."""
    return Wire.to_our_own(port, **{"model": "m:1", "first_token_s": 5.0, "total_s": 10.0, **changes})


@asynccontextmanager
async def client_to(port: int, gaps: array[int] | None = None, **changes: Any) -> AsyncIterator[Client]:
    """A client whose samples are on ``perf_counter_ns`` itself, so that a server's stamps compare with them."""
    kept = array("q") if gaps is None else gaps
    client = Client(wire_to(port, **changes), 0, lambda kind: kept)
    try:
        yield client
    finally:
        client.abort("censored", "the test is over")
        client.close()


async def ask(client: Client, text: str = "hello", *, seq: int = 0, max_tokens: int = 6, phase: str = "load") -> Sample:
    """Send one prompt, due now."""
    prompt = Prompt("chat", seq, ({"role": "user", "content": text},), max_tokens)
    return await client.send(Request(seq, prompt, perf_counter_ns()), level=3, phase=phase)


async def ask_once(port: int, **changes: Any) -> Sample:
    """Send one prompt with a client of its own."""
    async with client_to(port, **changes) as client:
        return await ask(client)


async def measured(measure: Callable[[], Awaitable[T]], good: Callable[[T], bool], tries: int = 8) -> T:
    """Measure again while a busy machine spoils it. The last measurement is returned, good or not: assert on it."""
    for _ in range(tries - 1):
        result = await measure()
        if good(result):
            return result
    return await measure()


# --- the scripted endpoint, on the loop of the test -------------------------------------------------------------------


@asynccontextmanager
async def scripted(host: str = "127.0.0.1", **values: Any) -> AsyncIterator[FakeServer]:
    """One for whole runs."""
    server = await serve(Script(**{"first_token_ms": 5, "gap_ms": 1, **values}), host)
    try:
        yield server
    finally:
        await server.close()


def faking(host: str = "127.0.0.1", **values: Any) -> AbstractAsyncContextManager[FakeServer]:
    """One for single requests: six tokens, at once."""
    return scripted(host, **{"first_token_ms": 0, "tokens": 6, "stall_ms": 30, **values})


# --- bytes at the socket ----------------------------------------------------------------------------------------------


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._transport = cast(asyncio.Transport, writer.transport)
        self._transport.set_write_buffer_limits(high=0)  # uvloop: write at once, not at the end of the turn
        self.left = False

    async def request(self) -> bytes | None:
        """The next request, whole, or None once the client has left."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)^content-length: *(\d+)", head, re.MULTILINE)
            return head + await self._reader.readexactly(int(length[1]) if length else 0)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.left = True
            return None

    def send_now(self, data: bytes) -> None:
        self._transport.write(data)

    async def send(self, *pieces: bytes) -> None:
        """Each piece in a write of its own, with turns of the loop between them in which the client reads."""
        for piece in pieces:
            self.send_now(piece)
            for _ in range(3):
                await asyncio.sleep(0)

    def end(self, how: Literal["close", "half", "reset"]) -> None:
        if how == "half":
            self._transport.write_eof()
        elif how == "close":
            self._transport.close()
        else:
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()


Play = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def listening(play: Play, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that plays this on every connection; gives its port. What it does wrong fails the test."""
    plays: list[asyncio.Future[None]] = []

    async def play_and_leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await play(Peer(reader, writer))
        finally:
            writer.transport.abort()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        plays.append(asyncio.ensure_future(play_and_leave(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls, limit=1 << 20)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in plays:
            task.cancel()
        ends = await asyncio.gather(*plays, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end


def answering(
    *pieces: bytes, end: Literal["stay", "close", "half", "reset"] = "stay", requests: list[bytes] | None = None
) -> Play:
    """Answer every request with these pieces, and end so."""

    async def play(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            if requests is not None:
                requests.append(request)
            await peer.send(*pieces)
            if end != "stay":
                peer.end(end)

    return play


def event(content: str | None = None, finish: str | None = None) -> bytes:
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({'id': 'c-1', 'choices': [choice]})}\n\n".encode()


DONE = b"data: [DONE]\n\n"
EVENTS = (event(""), event("Hel"), event("lo"), event("!"), event(None, "stop"), DONE)
"""An honest answer of three content chunks, event by event."""


def head(*lines: str, status: str = "200 OK", version: str = "1.1") -> bytes:
    return "\r\n".join([f"HTTP/{version} {status}", *lines, "", ""]).encode()


def chunked(payloads: Sequence[bytes] = EVENTS, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(payload), payload) for payload in payloads) + end


STREAM_HEAD = head("Content-Type: text/event-stream", "Transfer-Encoding: chunked")
STREAM = STREAM_HEAD + chunked()
