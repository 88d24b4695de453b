"""One client of the bench in a process of its own: sends closed-loop streams for a while, prints its own cost as JSON.

    python bench/clients.py NAME PORT STREAMS SECONDS TOKENS SPACING_MS

NAME is loadbench (all that `run` does: samples, histograms, telemetry), bare (a Protocol with httptools and orjson that
counts events and nothing more), aiohttp or openai. Start-up and warm connections are outside what is counted.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any, cast

import uvloop

MODEL = "fake-model:1"
PROMPT = "Say something."


class Tally:
    """What a client counted: per request (id, sent, first token, last token, content chunks), stamps in ns."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.rows: list[tuple[str, int, int, int, int]] = []
        self.errors = 0
        self._cpu_s = self._began_ns = self.end_ns = 0.0

    def begin(self) -> None:
        self._cpu_s = time.process_time()
        self._began_ns = time.perf_counter_ns()
        self.end_ns = self._began_ns + self.seconds * 1e9

    def open(self) -> bool:
        return time.perf_counter_ns() < self.end_ns

    def cost(self) -> dict[str, Any]:
        """What the process has spent since `begin`."""
        return {
            "cpu_s": time.process_time() - self._cpu_s,
            "wall_s": (time.perf_counter_ns() - self._began_ns) / 1e9,
            "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


async def closed_loop(streams: int, spacing_s: float, tally: Tally, one: Callable[[int, str], Awaitable[None]]) -> None:
    """N users, each sends its next request when its last is done, starts one spacing apart."""
    numbers = count()

    async def user(place: int) -> None:
        await asyncio.sleep(place * spacing_s)
        while tally.open():
            await one(place, f"bench-{next(numbers)}")

    await asyncio.gather(*(user(place) for place in range(streams)))


async def warm_and_measured(
    streams: int, spacing_s: float, tally: Tally, one: Callable[[int, str], Awaitable[None]]
) -> dict[str, Any]:
    """The closed loop once every user has asked for nothing that counts; its cost."""
    await asyncio.gather(*(one(place, f"warm-{place}") for place in range(streams)))
    tally.rows.clear()
    tally.begin()
    await closed_loop(streams, spacing_s, tally, one)
    return tally.cost()


def body(tokens: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": PROMPT}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": tokens,
    }


async def run_bare(port: int, streams: int, tokens: int, spacing_s: float, tally: Tally) -> dict[str, Any]:
    import httptools
    import orjson

    payload = orjson.dumps(body(tokens))

    class Bare(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.Transport, transport)

        async def ask(self, request_id: str) -> None:
            self.parser = httptools.HttpResponseParser(self)
            self.buffer, self.chunks, self.first, self.last = b"", 0, 0, 0
            self.over = asyncio.get_running_loop().create_future()
            self.sent = time.perf_counter_ns()
            self.transport.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"X-Request-Id: %s\r\nContent-Length: %d\r\n\r\n" % (request_id.encode(), len(payload)) + payload
            )
            await self.over
            tally.rows.append((request_id, self.sent, self.first, self.last, self.chunks))

        def data_received(self, data: bytes) -> None:
            self.now = time.perf_counter_ns()
            self.parser.feed_data(data)

        def on_body(self, data: bytes) -> None:
            *events, self.buffer = (self.buffer + data).split(b"\n\n")
            for event in events:
                if event != b"data: [DONE]":
                    choices = orjson.loads(event[6:])["choices"]
                    if choices and choices[0]["delta"].get("content"):
                        self.first = self.first or self.now
                        self.last = self.now
                        self.chunks += 1

        def on_message_complete(self) -> None:
            self.over.set_result(None)

    loop = asyncio.get_running_loop()
    users = [(await loop.create_connection(Bare, "127.0.0.1", port))[1] for _ in range(streams)]
    tally.begin()
    await closed_loop(streams, spacing_s, tally, lambda place, request_id: users[place].ask(request_id))
    return tally.cost()


async def run_aiohttp(port: int, streams: int, tokens: int, spacing_s: float, tally: Tally) -> dict[str, Any]:
    import aiohttp
    import orjson

    url, payload = f"http://127.0.0.1:{port}/v1/chat/completions", orjson.dumps(body(tokens))
    headers = {"Content-Type": "application/json"}

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:

        async def one(_: int, request_id: str) -> None:
            sent, first, last, chunks, buffer = time.perf_counter_ns(), 0, 0, 0, b""
            async with session.post(url, data=payload, headers={**headers, "X-Request-Id": request_id}) as response:
                while data := await response.content.readany():
                    now = time.perf_counter_ns()
                    *events, buffer = (buffer + data).split(b"\n\n")
                    for event in events:
                        if event != b"data: [DONE]":
                            choices = orjson.loads(event[6:])["choices"]
                            if choices and choices[0]["delta"].get("content"):
                                first, last, chunks = first or now, now, chunks + 1
            tally.rows.append((request_id, sent, first, last, chunks))

        return await warm_and_measured(streams, spacing_s, tally, one)


async def run_openai(port: int, streams: int, tokens: int, spacing_s: float, tally: Tally) -> dict[str, Any]:
    import openai

    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)

    async def one(_: int, request_id: str) -> None:
        sent, first, last, chunks = time.perf_counter_ns(), 0, 0, 0
        try:
            stream = await client.chat.completions.create(**body(tokens), extra_headers={"X-Request-Id": request_id})
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    now = time.perf_counter_ns()
                    first, last, chunks = first or now, now, chunks + 1
        except openai.OpenAIError:
            tally.errors += 1
            return
        tally.rows.append((request_id, sent, first, last, chunks))

    return await warm_and_measured(streams, spacing_s, tally, one)


async def run_loadbench(port: int, streams: int, tokens: int, spacing_s: float, tally: Tally) -> dict[str, Any]:
    from loadbench.engine.exchange import Wire
    from loadbench.engine.load import Clock
    from loadbench.engine.shard import Shard
    from loadbench.platform import raise_open_file_limit
    from loadbench.records import Closed, Level
    from loadbench.scenario.prompts import PromptMix
    from loadbench.scenario.schema import Scenario

    raise_open_file_limit()
    prompts = {"prompts": [{"name": "bench", "text": PROMPT}], "request": {"max_tokens": tokens}}
    mix = PromptMix(Scenario.model_validate(prompts), Path())
    with tempfile.TemporaryDirectory() as name:
        clock = Clock()
        async with Shard(Path(name), clock, time.time_ns()) as shard:
            shard.talk_to(Wire.to_our_own(port, MODEL, total_s=600.0))
            level = Level(0, 0, MODEL, Closed(streams), tally.seconds, None, 0, 1, spacing_s)
            await shard.prepare(level)
            tally.begin()
            await shard.measure(level, mix, 60.0)
            cost = tally.cost()
        for line in (Path(name) / "samples.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["outcome"] != "ok":
                tally.errors += 1
                continue
            sent, first, last = (row[key] + clock.origin_ns for key in ("sent_ns", "first_token_ns", "last_token_ns"))
            tally.rows.append((f"load-0-{row['seq']}", sent, first, last, row["chunks"]))
    return cost


CLIENTS = {"loadbench": run_loadbench, "bare": run_bare, "aiohttp": run_aiohttp, "openai": run_openai}


def main() -> None:
    name, port, streams, seconds, tokens, spacing_ms = sys.argv[1:]
    tally = Tally(float(seconds))
    cost = uvloop.run(CLIENTS[name](int(port), int(streams), int(tokens), float(spacing_ms) / 1e3, tally))
    json.dump(cost | {"errors": tally.errors, "rows": tally.rows}, sys.stdout)


if __name__ == "__main__":
    main()
