"""Servers for the endpoint tests: recorded answers played back over HTTP, and bytes of one's own at the socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

RECORDED = Path(__file__).parent / "recorded"


class Replay:
    """A server that answers from a recording, by path and query, by ``POST path`` for posts, by ``*`` for the rest.

    A list of lists is a series: one for each time it is asked, the last one again and again. ``asked`` is what came,
    ``headers`` what the last request carried.
    """

    def __init__(self, recording: dict[str, Any], below: str = "") -> None:
        self.recording = recording
        self.answers: dict[str, Any] = {
            path if path == "*" or path.startswith("POST ") else below + path: answer
            for path, answer in recording["answers"].items()
        }
        self.asked: list[str] = []
        self.bodies: list[Any] = []
        self.headers: dict[str, str] = {}
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        key = request.raw_path if request.method == "GET" else f"{request.method} {request.raw_path}"
        self.asked.append(key)
        self.headers = dict(request.headers)
        if request.can_read_body:
            self.bodies.append(await request.json())
        answer = self.answers.get(key, self.answers.get("*"))
        if isinstance(answer, list) and answer and all(isinstance(step, list) for step in answer):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        headers = self.recording.get("headers")
        if answer is None:
            return web.Response(status=404, text="not found", headers=headers)
        if isinstance(answer, dict) and "status" in answer and ("json" in answer or "text" in answer):
            text = answer["text"] if "text" in answer else json.dumps(answer["json"])
            return web.Response(status=answer["status"], text=text, headers=headers)
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return web.Response(text=text, content_type="application/json", headers=headers)


def recorded(name: str) -> dict[str, Any]:
    """Read a recording: ``about``, ``headers`` and ``answers``."""
    recording: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    return recording


@asynccontextmanager
async def replay(recording: str | dict[str, Any], below: str = "") -> AsyncIterator[Replay]:
    """Play a recording back on a loopback port, with its paths below ``below``."""
    server = Replay(recorded(recording) if isinstance(recording, str) else recording, below)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


@asynccontextmanager
async def at_socket(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], host: str = "127.0.0.1"
) -> AsyncIterator[str]:
    """Serve every connection with ``talk``; yields the URL. Connections still open at the end are cut."""
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        try:
            await talk(reader, writer)
        except ConnectionError:
            pass  # the client had enough
        finally:
            writer.close()

    server = await asyncio.start_server(serve, host, 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
