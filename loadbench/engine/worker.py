"""One of several load processes: a shard that takes its orders on stdin and answers on stdout, a JSON line each.

``python -m loadbench.engine.worker``. Its part of a level is a pure function of the scenario, its number and how many
there are; it never talks to the others. When stdin closes, whoever started it is gone and it ends.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from loadbench.engine.exchange import Wire
from loadbench.engine.load import Clock
from loadbench.engine.recorder import Limits
from loadbench.engine.shard import Shard
from loadbench.platform import raise_open_file_limit, run_in_loop
from loadbench.records import Level, Open
from loadbench.scenario.prompts import PromptMix
from loadbench.scenario.schema import Scenario

REPORT_S = 0.25
"""How often the counters are told, for the live view: as often as that looks."""


def tell(**answer: Any) -> None:
    """One line to whoever started us; if nobody is there any more, end."""
    try:
        sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os._exit(1)


async def serve(order: dict[str, Any], lines: asyncio.Queue[dict[str, Any]]) -> None:
    """Carry out orders until told to end."""
    raise_open_file_limit()
    scenario, prompts = Scenario.model_validate(order["scenario"]), Path(order["prompts"])
    clock, place = Clock(order["origin_ns"]), (order["index"], order["count"])
    async with Shard(Path(order["folder"]), clock, order["started_wall_ns"], *place) as shard:
        shard.recorder.limits = Limits.of(scenario.slo)
        tell(answer="ready")
        reporter = asyncio.create_task(_report(shard))
        level: asyncio.Task[None] | None = None
        while (line := await lines.get())["do"] != "end":
            if line["do"] == "talk_to":
                shard.talk_to(*(Wire(**wire) for wire in line["wires"]), per_user=line["per_user"])
                mix = PromptMix(scenario, prompts, line["chars_per_token"])
            elif line["do"] == "prepare":
                shard.e2e_s = line["e2e_s"]
                await shard.prepare(_level(line, order["traces"]))
                if line["warm_up"] and scenario.warmup.requests:
                    # The run's own warm-up has had the first of this draw.
                    mine = islice(mix.draw(scenario.seed), scenario.warmup.requests + order["index"], None)
                    await shard.each(next(mine), "warmup", line["level"]["index"])
                tell(answer="ready")
            elif line["do"] == "measure":
                level = asyncio.create_task(_measure(shard, mix, _level(line, order["traces"]), line))
                level.add_done_callback(_tell_failure)
            elif line["do"] == "stop":
                shard.stop(line["reason"])
            elif line["do"] == "cut":
                shard.cut(line["reason"])
        if level is not None:
            await level
        reporter.cancel()


def _level(line: dict[str, Any], traces: dict[str, str]) -> Level:
    """The level of an order. A trace that was sent along has another name here."""
    level = Level.from_json(line["level"])
    if not isinstance(level.load, Open) or level.load.trace is None:
        return level
    trace = level.load.trace
    return replace(level, load=replace(level.load, trace=replace(trace, file=traces.get(trace.file, trace.file))))


async def _measure(shard: Shard, mix: PromptMix, level: Level, line: dict[str, Any]) -> None:
    client = await shard.measure(level, mix, line["drain_s"], start_ns=line["start_ns"])
    ended = {"reason": shard.reason, "issue_end_ns": shard.issue_end_ns, "failure": shard.failure}
    tell(answer="measured", client=client, counters=shard.counters().as_json(), lag_ns=shard.lag_ns, **ended)


def _tell_failure(level: asyncio.Task[None]) -> None:
    """A level that cannot be measured is this process's end: whoever waits for it must not wait for ever."""
    if not level.cancelled() and (error := level.exception()) is not None:
        tell(answer="failed", text=str(error) or type(error).__name__)
        os._exit(1)


async def _report(shard: Shard) -> None:
    while True:
        await asyncio.sleep(REPORT_S)
        if shard.start_ns is None or shard.clock.now_ns() < shard.start_ns:
            tell(answer="counters")  # it lives; and nothing that takes time before all begin
        else:
            tell(answer="counters", counters=shard.counters().as_json(), lag_ns=shard.lag_ns)


def _read(lines: asyncio.Queue[dict[str, Any]], loop: asyncio.AbstractEventLoop) -> None:
    """In a thread of its own: a pipe as stdin is no socket, and Windows' loops read sockets only."""
    for line in sys.stdin.buffer:
        loop.call_soon_threadsafe(lines.put_nowait, orjson.loads(line))
    os._exit(1)  # whoever started us is gone; what has ended is on disk


async def main() -> None:
    order = orjson.loads(sys.stdin.buffer.readline())
    lines: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    threading.Thread(target=_read, args=(lines, asyncio.get_running_loop()), daemon=True).start()
    await serve(order, lines)


if __name__ == "__main__":
    run_in_loop(main())
    os._exit(0)  # all files are closed, and the reading thread would be in Python's way
