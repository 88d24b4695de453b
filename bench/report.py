"""What a report of a million samples costs: seconds and peak memory of ``loadbench report``, all its files written.

`make bench-report`: a run directory as a run of that length leaves it, with histograms by the second and readings of
memory, made up by the tests' arithmetic; then the command on it, in a process of its own. Exits with 1 where it takes
20 s or 500 MB. ``--write`` puts it into RESULTS-report.md, ``--keep`` leaves the directories for a profiler.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from loadbench.analysis import rundir
from loadbench.analysis.measured import Measured
from loadbench.engine.environment import cpu_name
from loadbench.hdr import Hdr, HlogWriter, make_tag
from loadbench.records import Closed, Load, Open
from tests.rundirs import MIB, STARTED_NS, Held, Planned, write_run

HERE = Path(__file__).parent
ROOT = HERE.parent
MOST_S, MOST_MB = 20.0, 500.0
WRITTEN_BY_A_RUN = ("run.json", "samples.jsonl", "telemetry.jsonl", rundir.HISTOGRAMS)
KINDS = ("chat", "summarise", "code")
BATCHES = 128
LOADS: tuple[tuple[Load, float], ...] = (
    (Closed(16), 0.05),
    (Closed(32), 0.1),
    (Closed(64), 0.2),
    (Closed(128), 0.35),
    (Open(200.0), 0.15),
    (Open(400.0), 0.15),
)
"""With the share of the samples that each gets."""


@dataclass(frozen=True)
class Cost:
    """Of a command, each time that it ran. Megabytes are millions of bytes."""

    samples: int
    size_mb: float
    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    peak_mb: tuple[float, ...]

    @property
    def is_low(self) -> bool:
        return max(self.wall_s) < MOST_S and max(self.peak_mb) < MOST_MB


def made(folder: Path, samples: int) -> None:
    """The run's directory: six levels, three kinds of prompt, a failure in a hundred."""
    levels = [
        Planned(
            load,
            duration_s=share * samples / per_s(load),
            kinds=KINDS,
            batches=BATCHES,
            fails=0.01,
            prompts=50,
            memory=Held(200 * MIB, (250 + 50 * place) * MIB, 210 * MIB, noise=MIB),
        )
        for place, (load, share) in enumerate(LOADS)
    ]
    slo = {"ttft": {"p95": "2s"}, "error_rate": 0.05}
    write_run(folder, levels, scenario={"name": "edge", "slo": slo, "request": {"temperature": 0}})
    by_the_second(folder)


def per_s(load: Load) -> float:
    """How many requests a second it is, or a few less; an answer takes 0.375 s on average."""
    return load.rate_per_s if isinstance(load, Open) else load.concurrency / 0.38


def by_the_second(folder: Path) -> None:
    """The histogram log as a run writes it: every latency of each kind, an interval a second."""
    samples = rundir.read(folder).samples
    with (folder / rundir.HISTOGRAMS).open("w", encoding="ascii") as file:
        writer, hdr = HlogWriter(file, STARTED_NS), Hdr()
        for level in range(len(LOADS)):
            for kind in KINDS:
                mine = samples.of_level(level)
                mine = mine.take(mine.said(mine.kind, kind) & mine.said(mine.outcome, "ok"))
                mine = mine.take(np.argsort(mine.done_ns, kind="stable"))
                seconds, starts = np.unique(mine.done_ns // 1e9, return_index=True)
                series = [(m.name, s, values) for m, s, values in Measured.of(mine).values() if m.name != "max_gap"]
                for name, which, values in series:
                    tag = make_tag(name if name in ("gap", "tpot", "lag") else f"{name}_{which}", kind, level)
                    gaps = np.repeat(mine.max_gap_ns[:, None], 31, axis=1) if values is None else values
                    for second, part in zip(seconds, np.split(gaps, starts[1:]), strict=True):
                        hdr.reset()
                        hdr.add(part[~np.isnan(part)].astype(np.int64))
                        writer.write(tag, int(second * 1e9), int((second + 1) * 1e9), hdr)


def cost(folder: Path, times: int) -> Cost:
    """Of the report of this directory. What it says is of no interest, but that it ends well."""
    size_mb = sum((folder / name).stat().st_size for name in WRITTEN_BY_A_RUN) / 1e6
    with (folder / "samples.jsonl").open("rb") as file:
        samples = sum(1 for _ in file)
    runs = [_once([sys.executable, "-m", "loadbench", "report", str(folder), "--quiet"]) for _ in range(times)]
    return Cost(samples, size_mb, *zip(*runs, strict=True))


def _once(command: Sequence[str]) -> tuple[float, float, float]:
    began_ns = time.perf_counter_ns()
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    wall_s = (time.perf_counter_ns() - began_ns) / 1e9
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: exited with {child.returncode}")
    per_mb = 1e6 if sys.platform == "darwin" else 1e6 / 1024  # macOS counts bytes, Linux KiB
    return wall_s, used.ru_utime + used.ru_stime, used.ru_maxrss / per_mb


def text(costs: Sequence[Cost]) -> str:
    lines = [
        "# What `make bench-report` showed",
        "",
        f"{date.today()}, {cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy"
        f" {np.__version__}.",
        "",
        f"`loadbench report` on made-up runs: {len(LOADS)} levels, {len(KINDS)} kinds of prompt, histograms by the"
        " second. Least to most of as many times as it ran; CPU is of all its threads. The aim is under"
        f" {MOST_S:.0f} s and {MOST_MB:.0f} MB for a million samples.",
        "",
        "| samples | directory | seconds | CPU seconds | peak memory |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {cost.samples:,} | {cost.size_mb:,.0f} MB | {spread(cost.wall_s, '.1f')} | {spread(cost.cpu_s, '.1f')}"
        f" | {spread(cost.peak_mb, '.0f')} MB |"
        for cost in costs
    ]
    return "\n".join([*lines, ""])


def spread(values: Sequence[float], form: str) -> str:
    low, high = (f"{value:{form}}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--times", type=int, default=3, help="how often each report is made")
    parser.add_argument("--keep", type=Path, help="make the directories in here, or use what is there")
    parser.add_argument("--write", action="store_true", help="write RESULTS-report.md")
    asked = parser.parse_args()
    costs = []
    with tempfile.TemporaryDirectory() as name:
        for samples in asked.samples:
            folder = (asked.keep or Path(name)) / f"run-{samples}"
            if not (folder / "run.json").exists():
                # A child begins with its parent's peak memory, so that another has to make the directory.
                with ProcessPoolExecutor(1) as pool:
                    pool.submit(made, folder, samples).result()
            costs.append(cost(folder, asked.times))
    print(text(costs))
    if asked.write:
        (HERE / "RESULTS-report.md").write_text(text(costs), encoding="utf-8")
    raise SystemExit(not all(cost.is_low for cost in costs))


if __name__ == "__main__":
    main()
