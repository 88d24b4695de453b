"""The scripted endpoint, asked through a bare socket: every byte it sends, when it came, and how it ended."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from loadbench.target.fake import FakeServer, Script, Truth, serve

MS = 1_000_000
QUICK: dict[str, Any] = {"first_token_ms": 0, "gap_ms": 0, "tokens": 6, "stall_ms": 30}


@asynccontextmanager
async def running(log: Path | None = None, token: str | None = None, **values: Any) -> AsyncIterator[FakeServer]:
    server = await serve(Script(**{**QUICK, **values}), log=log, token=token)
    try:
        yield server
    finally:
        await server.close()


@dataclass
class Got:
    """What came over the wire: raw bytes, when each read came, and how it ended."""

    raw: bytes = b""
    reads: list[tuple[int, bytes]] = field(default_factory=list)
    sent_ns: int = 0
    was_reset: bool = False

    @property
    def head(self) -> str:
        return self.raw.partition(b"\r\n\r\n")[0].decode()

    @property
    def status(self) -> int:
        return int(self.head.split()[1])

    @property
    def body(self) -> bytes:
        return self.raw.partition(b"\r\n\r\n")[2]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def chunks(self) -> list[bytes]:
        """The chunks of a chunked body, the empty last one included; what is no chunk ends the list."""
        chunks, rest = [], self.body
        while match := re.match(rb"([0-9A-F]+)\r\n", rest):
            size, start = int(match[1], 16), match.end()
            if rest[start + size : start + size + 2] != b"\r\n":
                break
            chunks.append(rest[start : start + size])
            rest = rest[start + size + 2 :]
        return chunks

    @property
    def text(self) -> bytes:
        return b"".join(self.chunks) if "Transfer-Encoding: chunked" in self.head else self.body

    @property
    def ended_as_framed(self) -> bool:
        return self.chunks[-1:] == [b""]

    @property
    def data(self) -> list[str]:
        return [line[6:] for line in self.text.decode().splitlines() if line.startswith("data: ")]

    @property
    def events(self) -> list[Any]:
        return [json.loads(data) for data in self.data if data != "[DONE]"]

    @property
    def contents(self) -> list[str]:
        said = [event["choices"][0]["delta"].get("content") for event in self.events if event.get("choices")]
        return [content for content in said if content]

    @property
    def finish_reason(self) -> str | None:
        reasons = [event["choices"][0]["finish_reason"] for event in self.events if event.get("choices")]
        return next((reason for reason in reasons if reason), None)

    @property
    def done(self) -> bool:
        return "[DONE]" in self.data

    @property
    def keep_alives(self) -> int:
        return self.text.count(b": keep-alive\n\n")

    def arrival_of(self, pattern: bytes) -> int:
        """When the read came that completed the first match."""
        seen = b""
        for at_ns, data in self.reads:
            seen += data
            if re.search(pattern, seen):
                return at_ns
        raise AssertionError(f"{pattern!r} never came")


FIRST_CONTENT = rb'"content":" amber"'


def request_bytes(headers: dict[str, str] | None = None, path: str = "/v1/chat/completions", **body: Any) -> bytes:
    content = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True, **body})
    lines = [f"POST {path} HTTP/1.1", "Host: fake", f"Content-Length: {len(content.encode())}"]
    lines += [f"{name}: {value}" for name, value in {"Connection": "close", **(headers or {})}.items()]
    return "\r\n".join([*lines, "", content]).encode()


async def exchange(server: FakeServer, data: bytes, until: bytes | None = None) -> Got:
    """Send on a connection of its own and read to its end, or until the bytes are seen (then leave)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    got = Got(sent_ns=perf_counter_ns())
    writer.write(data)
    try:
        async with asyncio.timeout(20):
            while (until is None or until not in got.raw) and (data := await reader.read(1 << 16)):
                got.reads.append((perf_counter_ns(), data))
                got.raw += data
    except ConnectionResetError:
        got.was_reset = True
    finally:
        writer.transport.abort()
    return got


async def ask(
    server: FakeServer, headers: dict[str, str] | None = None, until: bytes | None = None, **body: Any
) -> Got:
    return await exchange(server, request_bytes(headers, **body), until)


async def faulty(server: FakeServer, name: str, **body: Any) -> Got:
    return await ask(server, {"X-Fake-Fault": name}, **body)


async def get(server: FakeServer, path: str) -> Got:
    return await exchange(server, f"GET {path} HTTP/1.1\r\nHost: fake\r\nConnection: close\r\n\r\n".encode())


async def holds(condition: Callable[[], Any]) -> None:
    """Let the loop turn until it holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the server has no events for tests
            await asyncio.sleep(0)


def is_answering(server: FakeServer) -> bool:
    return any(connection.stream for connection in server.connections)


async def logged(server: FakeServer, count: int) -> list[Truth]:
    """The log, once it has that many records. The last is written in the turn of the loop after its last byte."""
    await holds(lambda: len(server.records) >= count)
    return sorted(server.records)
