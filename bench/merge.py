"""What merging shards costs: seconds and peak memory of ``loadbench merge``, and how both grow with the shards.

`make bench-merge`: 1,000 shards of 100,000 samples each, 1,000 requests/s for 100 s, with as many histograms by the
second as such a run leaves. Ten of them are made and linked a hundred times: to read them costs what it would if all
differed, and takes 53 GB less of disk. Exits with 1 where a thousand take 30 s or 1 GB. ``--write`` puts it into
RESULTS-merge.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from loadbench.analysis.rundir import HISTOGRAMS
from loadbench.engine.environment import cpu_name
from loadbench.hdr import Hdr, HlogReader, HlogWriter, make_tag
from loadbench.records import Level, Open, Sample
from tests.rundirs import STARTED_NS, Planned, level_events, run_facts, sample_line

HERE = Path(__file__).parent
ROOT = HERE.parent
MOST_S, MOST_MB = 30.0, 1000.0
DISTINCT = 10
SECONDS, PER_S, GAPS = 100, 1000, 31
LOAD = Planned(Open(float(PER_S)), duration_s=float(SECONDS))
FIRST_S = 30  # of a shard's first level


@dataclass(frozen=True)
class Cost:
    """Of one merge, all its processes together. Megabytes are millions of bytes; ``read_mb`` are the histograms'."""

    shards: int
    wall_s: float
    cpu_s: float
    peak_mb: float
    read_mb: float


def made(folder: Path, seed: int) -> None:
    """The files of a shard but for its run.json: lognormal latencies, 32 tokens an answer."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    with (
        (folder / "samples.jsonl").open("wb") as samples,
        (folder / HISTOGRAMS).open("w", encoding="ascii") as hlog,
    ):
        writer, hdr = HlogWriter(hlog, STARTED_NS), Hdr()
        for second in range(SECONDS):
            lag, ttft = draw.exponential(60e3, PER_S), draw.lognormal(np.log(80e6), 0.3, PER_S)
            gaps = draw.lognormal(np.log(20e6), 0.1, (PER_S, 1)) * draw.lognormal(0.0, 0.2, (PER_S, GAPS))
            due = np.sort(draw.uniform(FIRST_S + second, FIRST_S + second + 1, PER_S)) * 1e9
            e2e = ttft + gaps.sum(axis=1)
            series = {"gap": gaps.ravel(), "tpot": gaps.mean(axis=1), "lag": lag}
            series |= {"ttft_service": ttft, "ttft_response": ttft + lag}
            series |= {"e2e_service": e2e, "e2e_response": e2e + lag}
            for name, values in series.items():
                hdr.reset()
                hdr.add(values.astype(np.int64))
                start_ns = (FIRST_S + second) * 10**9
                writer.write(make_tag(name, "chat", 0), start_ns, start_ns + 10**9, hdr)
            stamps = np.stack([due, due + lag, due + lag + ttft, due + lag + e2e, gaps.max(axis=1)], axis=1)
            for place, row in enumerate(stamps.astype(np.int64).tolist()):
                samples.write(sample(second * PER_S + place, *row))
    start_ns, end_ns = FIRST_S * 10**9, (FIRST_S + SECONDS) * 10**9
    events = level_events(LOAD, 0, start_ns, end_ns, end_ns + 10**9, 10**14)
    (folder / "telemetry.jsonl").write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in events))


def sample(seq: int, due_ns: int, sent_ns: int, first_ns: int, last_ns: int, gap_ns: int) -> bytes:
    """A line of samples.jsonl."""
    told = Sample(
        level=0,
        phase="load",
        seq=seq,
        kind="chat",
        user=None,
        due_ns=due_ns,
        sent_ns=sent_ns,
        headers_ns=first_ns,
        first_event_ns=first_ns,
        first_token_ns=first_ns,
        last_token_ns=last_ns,
        done_ns=last_ns + 100_000,
        outcome="ok",
        detail=None,
        http_status=200,
        finish_reason="length",
        input_tokens=100,
        output_tokens=GAPS + 1,
        token_source="usage",
        chunks=GAPS + 1,
        keep_alives=0,
        max_gap_ns=gap_ns,
        stall_ns=0,
        bytes_received=6400,
        connect_ns=None,
    )
    return sample_line(told)


def shards_in(folder: Path, ready: Sequence[Path], count: int) -> None:
    """``count`` shards of one run, below this folder."""
    level = Level(0, 0, LOAD.model, LOAD.load, float(SECONDS), None, 0, 1).as_json()
    facts = run_facts([LOAD], "complete", (FIRST_S + SECONDS + 1) * 10**9) | {"levels": [level]}
    for index in range(count):
        shard = folder / f"{index}"
        shard.mkdir(parents=True)
        for file in ready[index % len(ready)].iterdir():
            os.link(file, shard / file.name)
        place = {"index": index, "count": count, "machine": f"{index:012x}"}
        (shard / "run.json").write_bytes(orjson.dumps(facts | {"shard": place}))


def cost(folder: Path, count: int, out: Path) -> Cost:
    """Merge them, watched: of all processes together no system tells the peak."""
    began_ns = time.perf_counter_ns()
    command = [sys.executable, "-m", "loadbench", "merge", str(folder), "--out", str(out), "--no-report"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = [0]
    watch = threading.Thread(target=_watch, args=(child.pid, peak), daemon=True)
    watch.start()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: exited with {child.returncode}")
    wall_s = (time.perf_counter_ns() - began_ns) / 1e9
    watch.join()
    total = sum(interval.hdr.total for interval in HlogReader(out / HISTOGRAMS, lambda tag: tag == "lag.chat.L0"))
    if total != count * SECONDS * PER_S:
        raise SystemExit(f"{out}: expected {count * SECONDS * PER_S:,} values of lag, got {total:,}")
    read = sum(file.stat().st_size for file in folder.glob(f"*/{HISTOGRAMS}"))
    return Cost(count, wall_s, used.ru_utime + used.ru_stime, peak[0] / 1e6, read / 1e6)


def _watch(pid: int, peak: list[int]) -> None:
    """Until it has ended: the largest sum of what it and its children hold, looked at fifty times a second."""
    try:
        while True:
            family = [psutil.Process(pid), *psutil.Process(pid).children()]
            held = [process.memory_info().rss for process in family if process.is_running()]
            peak[0] = max(peak[0], sum(held))
            time.sleep(0.02)
    except psutil.Error:
        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--times", type=int, default=3, help="how often each is merged; the quickest is told")
    parser.add_argument("--write", action="store_true", help="write RESULTS-merge.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        ready = [Path(name) / f"made-{seed}" for seed in range(DISTINCT)]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(made, ready, range(DISTINCT)))
        sample_mb = sum((folder / "samples.jsonl").stat().st_size for folder in ready) / len(ready) / 1e6
        costs = []
        for count in asked.shards:
            folder = Path(name) / f"shards-{count}"
            shards_in(folder, ready, count)
            tries = [cost(folder, count, Path(name) / f"out-{count}-{time_}") for time_ in range(asked.times)]
            costs.append(min(tries, key=lambda cost: cost.wall_s))
            print(costs[-1], flush=True)
    text = told(sample_mb, costs, asked.times)
    print(text)
    if asked.write:
        (HERE / "RESULTS-merge.md").write_text(text, encoding="utf-8")
    raise SystemExit(any(c.wall_s >= MOST_S or c.peak_mb >= MOST_MB for c in costs))


def told(sample_mb: float, costs: Sequence[Cost], times: int) -> str:
    """The page."""
    each, log_kb = SECONDS * PER_S, 1000 * costs[-1].read_mb / costs[-1].shards
    lines = [
        "# What merging shards costs",
        "",
        f"`make bench-merge` on {cpu_name()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}. A shard is"
        f" {each:,} samples ({sample_mb:.0f} MB), {PER_S:,} requests a second for {SECONDS} s, and"
        f" {7 * SECONDS} histograms ({log_kb:.0f} kB). Samples of more than 1 GiB in all are linked and not read; what"
        f" takes the time is unpacking histograms. The quickest of {times}; limits: {MOST_S:.0f} s and"
        f" {MOST_MB:.0f} MB.",
        "",
        "| shards | samples | seconds | CPU seconds | peak MB, all processes | histograms read, MB | ms a shard |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {c.shards:,} | {c.shards * each:,} | {c.wall_s:.1f} | {c.cpu_s:.1f} | {c.peak_mb:.0f} | {c.read_mb:.0f}"
        f" | {1000 * c.wall_s / c.shards:.0f} |"
        for c in costs
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
