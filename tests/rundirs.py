"""Run directories as a run would leave them, seeded, for the tests of analysis and report: no server, no clock.

The made-up engine shares itself between its streams: with N in flight the first token takes N times as long and so does
every other, but for ``batches`` streams at once, which cost no more than one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from loadbench.hdr import Hdr, HlogWriter, make_tag
from loadbench.records import Closed, Load, Open, Sample

STARTED_NS = 1_795_357_200_123_000_000  # 2026-11-22T14:20:00.123Z
ORIGIN_NS = 5_000_000_000_000
FIRST_NS = 60_000_000
TOKEN_NS = 5_000_000
TOKENS = 32
MIB = 1 << 20


@dataclass(frozen=True)
class Planned:
    """A level of a made-up run. ``fails`` is the share of requests that fails, and how.

    For its first ``cold_s`` seconds the first token takes three times as long. ``slower`` times as long takes all.
    With ``prompts`` there are so many of each kind in a file, and each is always answered alike.
    """

    load: Load
    model: str = "synthetic-edge:1"
    duration_s: float = 15.0
    kinds: tuple[str, ...] = ("chat",)
    stream: bool = True
    batches: int = 1
    fails: float = 0.0
    cold_s: float = 0.0
    slower: float = 1.0
    outcome: str = "out_of_memory"
    token_source: str = "usage"
    rss_after: int = 130 * MIB
    memory: Held | None = None
    state: str | None = None
    evidence: tuple[str, ...] = ()
    stage: int = 0
    complete: bool = True
    prompts: int = 0


@dataclass(frozen=True)
class Held:
    """What the target holds before a level, at most in it and after it; of ``figure``.

    While it issues, readings go evenly from ``before`` to ``peak``, with noise of ``noise`` bytes; every
    reading has ``also``, the last of all ``at_end`` too. ``mark``: there is a high-water mark. With ``settles_s`` they
    go there exponentially.
    """

    before: int
    peak: int
    after: int
    figure: str = "rss_bytes"
    mark: bool = True
    noise: int = 0
    also: dict[str, Any] = field(default_factory=dict)
    at_end: dict[str, Any] = field(default_factory=dict)
    settles_s: float | None = None


def write_run(path: Path, levels: Sequence[Planned], *, seed: int = 1, status: str = "complete", **facts: Any) -> Path:
    """Make the directory with everything but a summary; ``facts`` replace keys of run.json."""
    path.mkdir(parents=True, exist_ok=True)
    randomness = random.Random(seed)
    telemetry: list[dict[str, Any]] = []
    now_ns = 2_000_000_000
    with (path / "samples.jsonl").open("wb") as samples, (path / "histograms.hlog").open("w", encoding="ascii") as hlog:
        writer = HlogWriter(hlog, STARTED_NS)
        for seq in range(2):
            warm = _answer(replace(levels[0], fails=0.0), 0, "warmup", seq, now_ns, 1, randomness)
            samples.write(sample_line(warm))
        for index, level in enumerate(levels):
            start_ns, end_ns = now_ns, now_ns + round(level.duration_s * 1e9)
            made = list(_samples(level, index, start_ns, end_ns, randomness))
            samples.writelines(sample_line(sample) for sample in sorted(made, key=lambda sample: sample.done_ns or 0))
            drained_ns = max([end_ns, *(sample.done_ns or 0 for sample in made)])
            _write_gaps(writer, index, made, start_ns, drained_ns)
            telemetry += level_events(level, index, start_ns, end_ns, drained_ns, sum(map(_spent_ns, made)))
            now_ns = drained_ns + 500_000_000
    (path / "telemetry.jsonl").write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in telemetry))
    document = run_facts(levels, status, now_ns) | facts
    (path / "run.json").write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    return path


def closed_ladder(path: Path, **facts: Any) -> Path:
    """1, 2, 4 and 8 users on an engine that serves one at a time."""
    return write_run(path, [Planned(Closed(users)) for users in (1, 2, 4, 8)], **facts)


def batching_ladder(path: Path, **facts: Any) -> Path:
    """The same on an engine that batches up to four."""
    planned = Planned(Closed(1), model="synthetic-batching:1", batches=4)
    return write_run(path, [replace(planned, load=Closed(users)) for users in (1, 2, 4, 8)], **facts)


def two_kinds(path: Path, **facts: Any) -> Path:
    """Two kinds of prompt, closed and open loop."""
    kinds = ("chat", "summarise")
    return write_run(path, [Planned(Closed(4), kinds=kinds), Planned(Open(2.0), duration_s=20.0, kinds=kinds)], **facts)


def open_loop(path: Path, **facts: Any) -> Path:
    """2 and 3 requests a second."""
    return write_run(path, [Planned(Open(rate), duration_s=60.0) for rate in (2.0, 3.0)], **facts)


def failures(path: Path, **facts: Any) -> Path:
    """A tenth fails at four users, two thirds at eight."""
    return write_run(path, [Planned(Closed(4), fails=0.1), Planned(Closed(8), fails=0.67)], **facts)


def all_failed(path: Path, **facts: Any) -> Path:
    """Nothing succeeds."""
    return write_run(path, [Planned(Closed(2), duration_s=3.0, fails=1.0, outcome="http_5xx")], **facts)


def refused(path: Path) -> Path:
    """Nobody listens: no request could be sent."""
    write_run(path, [Planned(Closed(2), duration_s=3.0, fails=1.0, outcome="connect_refused")])
    rows = [orjson.loads(line) for line in (path / "samples.jsonl").read_bytes().splitlines()]
    for row in rows:
        row |= {"sent_ns": None} if row["phase"] == "load" else {}
    (path / "samples.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def non_streaming(path: Path, **facts: Any) -> Path:
    """Answers in one piece."""
    return write_run(path, [Planned(Closed(users), stream=False) for users in (1, 2)], **facts)


def empty_level(path: Path, **facts: Any) -> Path:
    """A level in which nothing was due."""
    return write_run(path, [Planned(Closed(1)), Planned(Open(0.01), duration_s=1.0)], **facts)


def torn(path: Path) -> Path:
    """Killed in the second of four levels: half lines at the ends of all logs, no end anywhere."""
    closed_ladder(path, status="running")
    facts = orjson.loads((path / "run.json").read_bytes())
    facts["anchors"]["end"] = None
    (path / "run.json").write_bytes(orjson.dumps(facts))
    telemetry = (path / "telemetry.jsonl").read_bytes().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(telemetry) if b'"issue_end","level":1' in line)
    (path / "telemetry.jsonl").write_bytes(b"".join(telemetry[:cut]) + telemetry[cut][:20])
    for name, last in (("samples.jsonl", b'{"level":1,'), ("histograms.hlog", b"Tag=gap.chat.L1,")):
        lines = (path / name).read_bytes().splitlines(keepends=True)
        keep = max(i for i, line in enumerate(lines) if line.startswith(last))
        (path / name).write_bytes(b"".join(lines[:keep]) + lines[keep][: len(lines[keep]) // 2])
    return path


def _samples(level: Planned, index: int, start_ns: int, end_ns: int, randomness: random.Random) -> Iterator[Sample]:
    if isinstance(level.load, Open):
        due_ns = start_ns + randomness.expovariate(level.load.rate_per_s) * 1e9
        seq = 0
        while due_ns < end_ns:
            busy = 1 + int(level.load.rate_per_s * (FIRST_NS + TOKENS * TOKEN_NS) / 1e9)
            yield _answer(level, index, "load", seq, int(due_ns), busy, randomness, start_ns)
            due_ns += randomness.expovariate(level.load.rate_per_s) * 1e9
            seq += 1
        return
    seq = 0
    ready_ns = [start_ns + user * 1_000_000 for user in range(level.load.concurrency)]
    once = level.load.concurrency if isinstance(level.load, Closed) and level.load.ask else None
    while min(ready_ns) < end_ns and seq != once:
        user = ready_ns.index(min(ready_ns))
        busy = level.load.concurrency
        sample = _answer(level, index, "load", seq, ready_ns[user], busy, randomness, start_ns)._replace(user=user)
        ready_ns[user] = sample.done_ns or 0
        seq += 1
        yield sample


def _answer(
    level: Planned,
    index: int,
    phase: str,
    seq: int,
    due_ns: int,
    busy: int,
    randomness: random.Random,
    start_ns: int = 0,
) -> Sample:
    """One request with ``busy`` in flight in a level that began at ``start_ns``."""
    kind = level.kinds[seq % len(level.kinds)]
    ask = level.load.ask if isinstance(level.load, Closed) else None
    tokens = TOKENS * (1 + level.kinds.index(kind)) if ask is None else ask.max_tokens
    shared = max(1.0, busy / level.batches)
    waits = FIRST_NS * (1 if level.batches == 1 else 8) if busy > level.batches else FIRST_NS
    waits = round(waits * level.slower)
    first_ns = int(waits * (shared if level.batches == 1 else 1.0) * randomness.lognormvariate(0, 0.1))
    first_ns *= 3 if due_ns - start_ns < level.cold_s * 1e9 else 1
    token_ns = int(TOKEN_NS * level.slower * shared * randomness.lognormvariate(0, 0.05))
    sent_ns = due_ns + randomness.randrange(20_000, 200_000)
    last_ns = sent_ns + first_ns + (tokens - 1) * token_ns
    failed = randomness.random() < level.fails
    good = not failed
    place = seq % level.prompts if level.prompts else None
    return Sample(
        level=index,
        phase=phase,
        seq=seq,
        kind=kind,
        user=None,
        due_ns=due_ns,
        sent_ns=sent_ns,
        headers_ns=sent_ns + 2_000_000,
        first_event_ns=sent_ns + 3_000_000 if level.stream else None,
        first_token_ns=sent_ns + first_ns if level.stream and good else None,
        last_token_ns=last_ns if good else None,
        done_ns=(last_ns if good else sent_ns + first_ns) + 100_000,
        outcome="ok" if good else level.outcome,
        detail=None if good else "Could not allocate the key-value cache buffer",
        http_status=200,
        finish_reason="length" if good else None,
        input_tokens=(40 if ask is None else ask.input_tokens) if good else None,
        output_tokens=tokens if good else None,
        token_source=level.token_source if good else None,
        chunks=tokens if level.stream and good else 0,
        keep_alives=0,
        max_gap_ns=token_ns if level.stream and good else None,
        stall_ns=0 if level.stream and good else None,
        bytes_received=200 * tokens,
        connect_ns=None,
        place=place,
        answer_hash=f"{1 + place:016x}" if good and place is not None else None,
    )


def _spent_ns(sample: Sample) -> int:
    return (sample.done_ns or 0) - (sample.sent_ns or 0)


def sample_line(sample: Sample) -> bytes:
    return orjson.dumps(sample._asdict()) + b"\n"


def _write_gaps(writer: HlogWriter, index: int, samples: list[Sample], start_ns: int, end_ns: int) -> None:
    hdr = Hdr()
    for kind in sorted({sample.kind for sample in samples}):
        gaps = [
            sample.max_gap_ns
            for sample in samples
            if sample.kind == kind and sample.max_gap_ns
            for _ in range(sample.chunks - 1)
        ]
        hdr.reset()
        hdr.add(np.array(gaps, dtype=np.int64))
        writer.write(make_tag("gap", kind, index), start_ns, end_ns, hdr)


def level_events(
    level: Planned, index: int, start_ns: int, end_ns: int, drained_ns: int, in_flight_ns: int
) -> Iterator[dict[str, Any]]:
    yield {"t_ns": start_ns, "event": "level_start", "level": index}
    for t_ns in range(start_ns, drained_ns, 1_000_000_000):
        yield {
            "t_ns": t_ns,
            "event": "tick",
            "level": index,
            "phase": "load" if t_ns < end_ns else "drain",
            "in_flight": 1,
            "attempted": 0,
            "ended": 0,
            "ok": 0,
            "chunks": 0,
            "target_rss_bytes": 140 * MIB,
            "client_rss_bytes": 70 * MIB,
            "client_cpu_s": t_ns / 1e10,
            "loop_lag_max_ns": 400_000,
        }
    if level.memory:
        yield from _readings(level.memory, index, start_ns, end_ns)
    yield {"t_ns": end_ns, "event": "issue_end", "level": index, "reason": "duration"}
    died = level.fails == 1.0
    held = level.memory
    figures = {} if held is None else {"memory": _border(held)}
    evidence = level.evidence or (("a canary failed: http_5xx",) if died else ("a canary answered in 0.21 s",))
    yield {
        "t_ns": drained_ns,
        "event": "level_end",
        "level": index,
        "complete": level.complete,
        "target": {
            "state": level.state or ("degraded" if died else "healthy"),
            "evidence": [*evidence],
            "rss_bytes": {"before": 120 * MIB, "peak": 140 * MIB, "after": level.rss_after}
            if held is None
            else {"before": held.before, "peak": held.peak, "after": held.after},
            **figures,
        },
        "client": {
            "cpu_s": 1.2,
            "cpu_share": 0.08,
            "loop_lag_p99_ns": 300_000,
            "loop_lag_max_ns": 900_000,
            "gc_pauses": 0,
            "gc_pause_max_ns": None,
            "steal_share": 0.001,
            "new_connections": 0,
            "connections_opened_before": 8,
            "in_flight_ns": in_flight_ns,
            "rss_bytes": 71 * MIB,
        },
    }


def _readings(held: Held, index: int, start_ns: int, end_ns: int) -> Iterator[dict[str, Any]]:
    """One a second."""
    randomness = random.Random(index)
    for t_ns in range(start_ns, end_ns, 1_000_000_000):
        share = (t_ns - start_ns) / (end_ns - start_ns)
        if held.settles_s:
            share = 1 - math.exp(-(t_ns - start_ns) / 1e9 / held.settles_s)
        bytes_held = round(held.before + share * (held.peak - held.before) + randomness.gauss(0, held.noise))
        said = {held.figure: bytes_held} | held.also
        yield {"t_ns": t_ns, "event": "memory", "level": index, "phase": "load", **said}


def _border(held: Held) -> dict[str, Any]:
    mark = {"peak_rss_bytes": held.peak} if held.mark and held.figure == "rss_bytes" else {}
    return {
        "before": {held.figure: held.before} | held.also,
        "peak": {held.figure: held.peak} | mark | held.also,
        "after": {held.figure: held.after} | held.also | held.at_end,
    }


def model_row(model: str, **more: Any) -> dict[str, Any]:
    """A row of run.json's models, as of one that was registered, loaded and answered."""
    return {
        "asked": "auto",
        "id": model,
        "synthetic": model.startswith("synthetic"),
        "status": "ok",
        "reason": None,
        "failed_at": None,
        "alias": model.partition(":")[0],
        "device": "CPU",
        "execution_provider": "CPUExecutionProvider",
        "capabilities": ["chat"],
        "licence": None,
        "size_bytes": 120 * MIB,
        "downloaded_ms": None,
        "load_ms": 812.1,
        "first_ms": 95.0,
        "rss_idle_bytes": 90 * MIB,
        "rss_loaded_bytes": 210 * MIB,
    } | more


def broken_row(model: str, failed_at: str = "load", reason: str = "no file model.onnx") -> dict[str, Any]:
    """A row of one that never answered."""
    unknown = ("device", "execution_provider", "licence", "size_bytes", "load_ms", "first_ms", "rss_idle_bytes")
    absent = dict.fromkeys((*unknown, "rss_loaded_bytes", "id"))
    return model_row(model, status="failed", failed_at=failed_at, reason=reason, asked=model, capabilities=[]) | absent


def three_models(path: Path, **facts: Any) -> Path:
    """A quick small one, a slow large one that batches, and one that does not load; 1 and 4 users each."""
    quick, slow = Planned(Closed(1), model="quick-cpu:1"), Planned(Closed(1), model="slow-gpu:1", batches=4, slower=2.0)
    levels = [replace(level, load=Closed(users)) for level in (quick, slow) for users in (1, 4)]
    models = [
        model_row(quick.model, licence="MIT"),
        broken_row("broken:1"),
        model_row(slow.model, device="GPU", licence="Apache-2.0", load_ms=2812.0, rss_loaded_bytes=900 * MIB),
    ]
    return write_run(path, levels, **{"models": models} | facts)


def run_facts(levels: Sequence[Planned], status: str, end_ns: int) -> dict[str, Any]:
    models = dict.fromkeys(level.model for level in levels)
    return {
        "schema": 1,
        "loadbench": "0.1.0",
        "name": "edge",
        "status": status,
        "reason": None,
        "started": "2026-11-22T14:20:00.123Z",
        "command": "loadbench run scenarios/edge.yaml",
        "scenario": {"name": "edge", "warmup": {"requests": 2}},
        "scenario_file": "scenarios/edge.yaml",
        "seed": 42,
        "anchors": {
            "start": {"wall_ns": STARTED_NS, "monotonic_ns": ORIGIN_NS},
            "end": {"wall_ns": STARTED_NS + end_ns, "monotonic_ns": ORIGIN_NS + end_ns},
        },
        "environment": {
            "os": "Linux 6.1 (Debian 12)",
            "machine": "x86_64",
            "cpu": "AMD EPYC 7B13",
            "cores": 2,
            "memory_bytes": 8 << 30,
            "python": "3.11.7",
            "event_loop": "uvloop 0.23.0",
            "versions": {"aiohttp": "3.14.5", "numpy": "2.4.6"},
        },
        "endpoint": {
            "url": "http://127.0.0.1:40123/catalogs/local/v1",
            "kind": "foundry-2",
            "title": "Foundry Local 2.2.1",
            "source": "default",
            "embedded": True,
            "local": True,
            "pid": 123,
            "facts": {},
        },
        "models": [model_row(model) for model in models],
        "levels": [
            {
                "index": index,
                "stage": level.stage,
                "model": level.model,
                "load": level.load.as_json(),
                "duration_s": level.duration_s,
                "requests": None,
                "min_requests": 0,
            }
            for index, level in enumerate(levels)
        ],
    }
