"""Is it us? What one client process can take on this machine, and how far its stamps are off: ``loadbench calibrate``.

Drives the scripted endpoint, in a process of its own, with the engine that every run uses. What comes out is kept in
the user's cache, per machine and version, for `read_calibration`; nothing measures it unasked.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter_ns
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson
import psutil

from loadbench import __version__
from loadbench.analysis.stats import LEASTS, Distribution, describe
from loadbench.engine.environment import environment
from loadbench.engine.exchange import Wire
from loadbench.engine.load import Clock
from loadbench.engine.shard import Shard
from loadbench.errors import TargetError, UsageError
from loadbench.files import write_whole
from loadbench.platform import apart, raise_open_file_limit
from loadbench.progress import Watch
from loadbench.records import Closed, Level, Load, Open, Prompt
from loadbench.report.live import View
from loadbench.scenario.load import Loaded
from loadbench.scenario.plan import levels as plan_levels
from loadbench.scenario.prompts import PromptMix, user_says
from loadbench.scenario.schema import Scenario
from loadbench.target.foundry import cache_dir

GAP_MS = 20.0
FIRST_TOKEN_MS = 20.0  # short: many first tokens in few seconds
JITTER_MS = 20.0  # so that the streams do not march in step
DRAIN_S = 3.0
START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 5.0
MODEL = "calibrate:1"
HELLO = Prompt("warm-up", 0, user_says("Hello."), 2)
FULL = 0.9
"""Of one core, over a trial: whoever uses more was what held it back."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One load on the scripted endpoint, and its pace. ``title`` is what the live view calls it."""

    title: str
    load: Load
    tokens: int
    first_token_ms: float = FIRST_TOKEN_MS
    jitter_ms: float = JITTER_MS
    gap_ms: float = GAP_MS

    @property
    def answer_s(self) -> float:
        """How long an answer takes on average."""
        return (self.first_token_ms + self.jitter_ms / 2 + self.gap_ms * (self.tokens - 1)) / 1e3

    @property
    def streams(self) -> float:
        """How many answers come at once."""
        return self.load.concurrency if isinstance(self.load, Closed) else self.load.rate_per_s * self.answer_s


# One event a read is what the tokens of a model cost. Unpaced, several come in one read and an event costs a quarter
# (5 to 7 µs against 22 here): half of a ceiling from that would be reached with the core long full. With few streams
# every event wakes the process from its sleep (39 µs at 64), which passes as the load grows. Hence 512 streams of one
# each 20 ms: half of a core here, which is where the mark stands.
EVENTS = Trial("tokens, one a read", Closed(512), 64)
REQUESTS = Trial("answers of one token", Closed(64), 1, first_token_ms=0, jitter_ms=0, gap_ms=0)


def shape_of(loaded: Loaded | None) -> Trial:
    """The load under which our own error is measured: the scenario's heaviest, with answers of its mean length.

    The endpoint streams a token every 20 ms, whatever the scenario's own does. Without a scenario it is 64 users.
    """
    if loaded is None:
        return Trial("TTFT error", Closed(64), 16)
    scenario = loaded.scenario
    limits = [(entry.max_tokens or scenario.request.max_tokens, entry.weight) for entry in scenario.prompts]
    tokens = round(sum(limit * weight for limit, weight in limits) / sum(weight for _, weight in limits))
    levels = plan_levels(scenario, ["any"], loaded.traces)
    return max((Trial("TTFT error", _steady(level.load), tokens) for level in levels), key=lambda trial: trial.streams)


def _steady(load: Load) -> Load:
    """An open loop at its highest rate, whatever its arrivals: a trace's mean, for its peaks are no rate."""
    if isinstance(load, Closed):
        return load
    return Open(load.most_per_s)


@dataclass(frozen=True, slots=True)
class Effort:
    """What a trial took: events are content chunks, as samples count them; what else an answer has is in their cost."""

    events: int
    requests: int
    wall_s: float
    client_cpu_s: float
    endpoint_cpu_s: float

    def limit(self, cores: int) -> str:
        """What held the trial back: client, endpoint, their one core, or nothing but the trial's own pace."""
        client, endpoint = self.client_cpu_s / self.wall_s, self.endpoint_cpu_s / self.wall_s
        if cores == 1:
            return "core" if client + endpoint > FULL else "pace"
        return "client" if client > FULL else "endpoint" if endpoint > FULL else "pace"


async def calibrate(loaded: Loaded | None, seconds: float, view: View) -> dict[str, Any]:
    """Measure, keep and return what this machine can do; ``seconds`` is how long each of three trials goes on.

    UsageError where the result cannot be kept, before anything is measured; TargetError where the endpoint does not
    start or answer.
    """
    if not 0.1 <= seconds <= 60:
        raise UsageError(f"--seconds: expected 0.1 to 60, got {seconds:g}")
    machine, shape = environment(), shape_of(loaded)
    path = _path(machine)
    _check_writable(path.parent)
    raise_open_file_limit()
    with tempfile.TemporaryDirectory(prefix="loadbench-") as folder:
        events, requests, error = await _measure(shape, seconds, view, Path(folder))
    cores = usable_cores()
    found = {
        "schema": 1,
        "measured": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "machine": _identity(machine),
        "usable_cores": cores,
        "events_per_s": _per_s(events.events, events.client_cpu_s),
        "requests_per_s": _per_s(requests.requests, requests.client_cpu_s),
        "ttft_error_p50_ms": error.p50,
        "ttft_error_p99_ms": error.p99,
        "ttft_error_n": error.n,
        "indicative": [f"ttft_error_{name}_ms" for name in ("p50", "p99") if name in error.indicative],
        "shape": {"load": shape.load.as_json(), "tokens": shape.tokens, "gap_ms": GAP_MS},
        "endpoint": {
            "events_per_s": _per_s(events.events, events.endpoint_cpu_s),
            "requests_per_s": _per_s(requests.requests, requests.endpoint_cpu_s),
        },
        "limit": {"events": events.limit(cores), "requests": requests.limit(cores)},
    }
    write_whole(path, orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")
    return found


def read_calibration(machine: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was kept for this machine (``environment()``) and this version; None: nothing. 0.1 ms."""
    try:
        kept: dict[str, Any] = orjson.loads(_path(machine).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    return kept


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _identity(machine: Mapping[str, Any]) -> dict[str, Any]:
    """What a figure holds for: another processor, system, interpreter, loop or version of ours has other ones."""
    return {name: machine[name] for name in ("cpu", "cores", "os", "python", "event_loop")} | {"loadbench": __version__}


def _path(machine: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(orjson.dumps(_identity(machine), option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
    return cache_dir() / "calibration" / f"{key}.json"


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"{folder}: expected a cache folder to write to ({error.strerror}); set LOADBENCH_CACHE"
        ) from error


def _per_s(number: int, cpu_s: float) -> float | None:
    """How many a full second of the process's one core does. None: too little CPU time to have been counted."""
    return round(number / cpu_s, 1) if cpu_s > 0 else None


async def _measure(shape: Trial, seconds: float, view: View, folder: Path) -> tuple[Effort, Effort, Distribution]:
    """The two ceilings and the floor, the latter in milliseconds."""
    # As long again for the requests that a p99 takes at least, where they come in that time.
    least = LEASTS["p99"] if shape.streams / shape.answer_s * 2 * seconds >= LEASTS["p99"] else 0
    levels = tuple(
        Level(index, index, trial.title, trial.load, seconds, None, requests, seed=1)
        for index, (trial, requests) in enumerate(((EVENTS, 0), (REQUESTS, 0), (shape, least)))
    )
    clock, log = Clock(), folder / "endpoint.jsonl"
    watch = Watch(view, "calibrate", clock)
    watch.start()
    try:
        watch.expect(levels, stream=True)
        async with Shard(folder, clock, time.time_ns()) as shard:
            watch.shard = shard
            events = await _try(shard, watch, EVENTS, levels[0])
            requests = await _try(shard, watch, REQUESTS, levels[1])
            await _try(shard, watch, shape, levels[2], log)
    finally:
        watch.stop()
    return events, requests, describe(_ttft_errors_ns(folder / "samples.jsonl", log, clock.origin_ns))


async def _try(shard: Shard, watch: Watch, trial: Trial, level: Level, log: Path | None = None) -> Effort:
    """Run one trial on an endpoint of its own."""
    watch.say("starting the scripted endpoint")
    async with _endpoint(trial, log) as (port, pid):
        shard.talk_to(Wire.to_our_own(port, MODEL))
        hello = await shard.one(HELLO, "warmup", level.index)
        if hello.outcome != "ok":
            raise TargetError(f"the scripted endpoint did not answer: {hello.outcome}: {hello.detail}")
        watch.say(None)
        watch.begin(level)
        endpoint_cpu_s, began_ns = _cpu_s(pid), perf_counter_ns()
        facts = await shard.measure(level, _mix(trial.tokens), DRAIN_S)
        counters = shard.counters()
        effort = Effort(
            events=counters.chunks,
            requests=counters.outcomes["ok"],
            wall_s=(perf_counter_ns() - began_ns) / 1e9,
            client_cpu_s=facts["cpu_s"],
            endpoint_cpu_s=_cpu_s(pid) - endpoint_cpu_s,
        )
        watch.end(level)
        if shard.failure is not None:
            raise UsageError(shard.failure)
    return effort


@asynccontextmanager
async def _endpoint(trial: Trial, log: Path | None) -> AsyncIterator[tuple[int, int]]:
    """The scripted endpoint's port and pid. It ends with this block, and with us however we end."""
    command = [sys.executable, "-m", "loadbench", "fake", "--until-stdin-closes", "--model", MODEL]
    command += ["--first-token-ms", str(trial.first_token_ms), "--first-token-jitter-ms", str(trial.jitter_ms)]
    command += ["--gap-ms", str(trial.gap_ms), *(["--log", str(log)] if log is not None else [])]
    pipe = asyncio.subprocess.PIPE
    env = {name: value for name, value in os.environ.items() if name != "LOADBENCH_FAKE_TOKEN"}
    try:
        child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, **apart())
    except OSError as error:
        raise TargetError(f"the scripted endpoint did not start: {sys.executable}: {error.strerror}") from error
    assert child.stdin is not None
    try:
        yield await _port_said(child), child.pid
    finally:
        child.stdin.close()
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await child.wait()
        except TimeoutError:
            child.kill()
            await child.wait()


async def _port_said(child: asyncio.subprocess.Process) -> int:
    """The port of the URL that the endpoint prints once it listens."""
    assert child.stdout is not None and child.stderr is not None
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            if url := (await child.stdout.readline()).decode().strip():
                return urlsplit(url).port or 0
            said = (await child.stderr.read()).decode(errors="replace").strip().splitlines()
            why = said[-1] if said else "it ended without a word"
    except TimeoutError:
        why = f"no answer within {START_TIMEOUT_S:g} s"
    raise TargetError(f"the scripted endpoint did not start: {why}")


def _cpu_s(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error as error:
        raise TargetError("the scripted endpoint ended before its time") from error
    return float(times.user + times.system)


def _mix(tokens: int) -> PromptMix:
    prompts = [{"name": "calibrate", "text": "Say something.", "max_tokens": tokens}]
    return PromptMix(Scenario.model_validate({"prompts": prompts}), Path())


def _ttft_errors_ns(samples: Path, log: Path, origin_ns: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of each request that got a first token: TTFT as we stamped it less TTFT as the endpoint did, on the same clock.

    From when the endpoint had read the request, not from when it came: what it idled away is not ours.
    """
    truths = {row["request_id"]: row for row in map(orjson.loads, log.read_bytes().splitlines())}
    errors: list[int] = []
    for sample in map(orjson.loads, samples.read_bytes().splitlines()):
        truth = truths.get(f"load-{sample['level']}-{sample['seq']}") if sample["phase"] == "load" else None
        if truth is not None and sample["first_token_ns"] is not None and truth["first_token_ns"] is not None:
            ours = sample["first_token_ns"] - sample["sent_ns"]
            errors.append(ours - (truth["first_token_ns"] - truth["received_ns"]))
    return np.array(errors, dtype=np.float64)
