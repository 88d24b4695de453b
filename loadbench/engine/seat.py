"""One load process as the run sees it: what it is told, what it says, whether it lives; and the pipe to one here.

The way to one on another machine is ``cluster``'s. What goes over either is the same: a JSON line each.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import orjson

from loadbench.engine.shard import Counters
from loadbench.platform import apart, describe_exit

END_TIMEOUT_S = 5.0


class Line(Protocol):
    """What lies between the run and a load process. ``node`` is the machine that it is on, None: this one.

    ``round_trip_ns`` is the longest that an answer was seen to take. ``end`` says how it ended, once it has.
    """

    node: str | None
    round_trip_ns: int
    end: str | None

    def tell(self, line: bytes) -> None:
        """Send one line; headers with a key go this way too, and never by argument or environment."""

    async def hear(self) -> list[bytes] | None:
        """Wait for what it says next; no line at all is a sign of life, too. None: it has ended."""

    def kill(self) -> None:
        """End it by force."""

    async def close(self) -> None:
        """Clear up after it; it has ended."""


class Pipe:
    """A `Line` to a process of ours."""

    node: str | None = None
    round_trip_ns = 0

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.end: str | None = None
        self._process = process

    @classmethod
    async def start(cls, order: Mapping[str, Any]) -> Line:
        """Start a process that carries out this order."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "loadbench.engine.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 22,
            **apart(),
        )
        pipe = cls(process)
        pipe.tell(orjson.dumps(order) + b"\n")
        return pipe

    def tell(self, line: bytes) -> None:
        assert self._process.stdin is not None
        if self._process.returncode is None and not self._process.stdin.is_closing():
            self._process.stdin.write(line)

    async def hear(self) -> list[bytes] | None:
        assert self._process.stdout is not None
        if line := await self._process.stdout.readline():
            return [line]
        self.end = f"died: {describe_exit(await self._process.wait())}"
        return None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it is gone already
            self._process.kill()

    async def close(self) -> None:
        """Nothing is left of it."""


class Seat:
    """One process of the crew. ``counters`` is what it last said of the level, ``lag_ns`` how late its loop was in the
    last second. ``on_death`` is told how it ended, if that was not asked for.
    """

    def __init__(self, line: Line, index: int, on_death: Callable[[Seat, str], None]) -> None:
        self.counters = Counters()
        self.lag_ns = 0
        self._line = line
        self._index = index
        self._on_death = on_death
        self._ending = False
        self._end: str | None = None
        self._heard_s = 0.0
        self._answers: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._reader = asyncio.create_task(self._read())

    @property
    def name(self) -> str:
        """``worker 1 on node-b``."""
        return f"worker {self._index}" + ("" if self._line.node is None else f" on {self._line.node}")

    @property
    def place(self) -> dict[str, Any]:
        """Whose the facts of a level are."""
        return {"worker": self._index} | ({} if self._line.node is None else {"node": self._line.node})

    @property
    def lost(self) -> bool:
        return self._reader.done()

    @property
    def round_trip_ns(self) -> int:
        return self._line.round_trip_ns

    def tell(self, **order: Any) -> None:
        self._line.tell(orjson.dumps(order) + b"\n")

    async def says(self, answer: str, silence_s: float) -> dict[str, Any] | None:
        """Its next answer of that name; None where it died instead, or was killed for saying nothing for so long."""
        loop = asyncio.get_running_loop()
        self._heard_s = loop.time()
        while True:
            try:
                async with asyncio.timeout_at(self._heard_s + silence_s):
                    said = await self._answers.get()
            except TimeoutError:
                if loop.time() >= self._heard_s + silence_s:
                    self._end = self._end or f"said nothing for {silence_s:g} s and was killed"
                    self._line.kill()
                    silence_s = END_TIMEOUT_S + silence_s
                continue
            if said is None:
                self._answers.put_nowait(None)  # it stays dead
                return None
            if said["answer"] == answer:
                return said | {"client": {**self.place, **said["client"]}} if "client" in said else said

    async def _read(self) -> None:
        while (lines := await self._line.hear()) is not None:
            self._heard_s = asyncio.get_running_loop().time()
            for line in lines:
                self._take(orjson.loads(line))
        if not self._ending:
            self._on_death(self, self._end or self._line.end or "ended")
        self._answers.put_nowait(None)  # after the reason is known: whoever waits for an answer then asks for it

    def _take(self, said: dict[str, Any]) -> None:
        if said["answer"] == "failed":
            self._end = f"failed: {said['text']}"
        if "counters" in said:
            self.counters, self.lag_ns = Counters.from_json(said["counters"]), said["lag_ns"]
        if said["answer"] != "counters":
            self._answers.put_nowait(said)

    async def end(self) -> None:
        """Let it close its files and go; by force if it is silent instead."""
        self._ending = True
        self.tell(do="end")
        loop = asyncio.get_running_loop()
        self._heard_s = loop.time()
        while not self._reader.done():
            left_s = self._heard_s + END_TIMEOUT_S - loop.time()
            if left_s <= 0:
                self._line.kill()
                await self._reader
            else:
                await asyncio.wait({self._reader}, timeout=left_s)
        await self._reader
        await self._line.close()
