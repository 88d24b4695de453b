"""What a client costs and how far its stamps are from the truth: `make bench`.

Drives the scripted endpoint, pinned to one core, with one client after the other, pinned to another, all in one run.
Compare the ratios: the figures themselves are this machine's, this minute. "Stamped late" is, request by request, from
the endpoint's writing of the first token to the client's stamp: the part that is the client's. The endpoint's own
lateness is in both TTFT columns and beside them. "loadbench" is the engine that `run` uses with all that it records,
without the command line around it. ``--write`` puts the table into RESULTS.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadbench.engine.environment import cpu_name

HERE = Path(__file__).parent
CLIENTS = ("loadbench", "bare", "aiohttp", "openai")
EVENTS_BESIDE_CONTENT = 4  # role, finish, usage, [DONE]


@dataclass(frozen=True)
class Case:
    """One load: ``gap_ms`` between tokens (0: as fast as it can), starts one ``spacing_ms`` apart."""

    title: str
    streams: int
    gap_ms: float
    tokens: int
    seconds: float
    spacing_ms: float = 1.0
    clients: tuple[str, ...] = CLIENTS


CASES = (
    Case("1 stream × 20 ms", 1, 20, 128, 6),
    Case("64 streams × 20 ms", 64, 20, 128, 8),
    Case("512 streams × 20 ms", 512, 20, 128, 10),
    Case("512 streams × 20 ms, all at once", 512, 20, 128, 8, spacing_ms=0),
    Case("1 stream, unpaced", 1, 0, 128, 4),
    Case("64 streams, unpaced", 64, 0, 128, 5),
    Case("64 streams, one token each", 64, 0, 1, 5),
    Case("2,000 streams × 50 ms", 2000, 50, 128, 12, clients=("loadbench", "bare")),  # the others take minutes to drain
)


def cores() -> tuple[str, str]:
    """(server's, client's) core, the first two that we may use."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    return str(usable[0]), str(usable[-1])


def pinned(core: str, command: list[str]) -> list[str]:
    return ["taskset", "-c", core, *command] if sys.platform == "linux" else command


def measure(case: Case, client: str) -> dict[str, Any]:
    """One client on one case, against a server of its own."""
    server_core, client_core = cores()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "truth.jsonl"
        serve = [sys.executable, "-m", "loadbench", "fake", "--first-token-ms", "50", "--first-token-jitter-ms", "20"]
        serve += ["--gap-ms", str(case.gap_ms), "--log", str(log), "--until-stdin-closes"]
        server = subprocess.Popen(pinned(server_core, serve), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert server.stdin is not None and server.stdout is not None
        port = server.stdout.readline().strip().split(":")[-1].split("/")[0]
        arguments = (client, port, case.streams, case.seconds, case.tokens, case.spacing_ms)
        command = [sys.executable, str(HERE / "clients.py"), *map(str, arguments)]
        done = subprocess.run(pinned(client_core, command), capture_output=True, text=True, check=False)
        server.stdin.close()
        server.wait(10)
        if done.returncode:
            sys.exit(f"bench: {client} on {case.title}: {done.stderr.strip().splitlines()[-1]}")
        truth = {row["request_id"]: row for row in map(json.loads, log.read_text().splitlines())}
    return figures(json.loads(done.stdout), truth)


def figures(seen: dict[str, Any], truth: dict[str, Any]) -> dict[str, Any]:
    """Cost and error. The true TTFT is from the client's sending to the endpoint's writing of the first token, two
    stamps of one clock: what a client with no cost of its own would have seen, the endpoint's own lateness included.
    """
    rows = [row for row in seen["rows"] if row[0] in truth and truth[row[0]]["first_token_ns"]]
    chunks = sum(row[4] for row in rows)
    events = chunks + EVENTS_BESIDE_CONTENT * len(rows)
    own = np.array([row[2] - row[1] for row in rows]) / 1e6
    real = np.array([truth[row[0]]["first_token_ns"] - row[1] for row in rows]) / 1e6
    between = np.array([(row[3] - row[2]) / (row[4] - 1) for row in rows if row[4] > 1]) / 1e6
    apart = [truth[r] for r, *_, n in rows if n > 1]
    real_between = np.array([(t["last_token_ns"] - t["first_token_ns"]) / (t["tokens"] - 1) for t in apart]) / 1e6
    return {
        "cpu_us_per_event": seen["cpu_s"] * 1e6 / events,
        "cpu_us_per_request": seen["cpu_s"] * 1e6 / len(rows),
        "events_per_s": events / seen["wall_s"],
        "ttft_p99_ms": float(np.quantile(own, 0.99)),
        "ttft_p99_truth_ms": float(np.quantile(real, 0.99)),
        "late_p99_ms": float(np.quantile(own - real, 0.99)),
        "gap_error": float(between.mean() / real_between.mean() - 1) if len(between) else None,
        "rss_mib": seen["rss_mib"],
        "errors": seen["errors"],
        "requests": len(rows),
        "server_late_ms": max((truth[request_id]["max_late_ns"] or 0) for request_id, *_ in rows) / 1e6,
    }


HEAD = (
    "| case | client | CPU µs/event | × bare | CPU µs/request | events/s | TTFT p99 ms | truth | stamped late, p99 ms"
    " | inter-chunk error | RSS MiB | errors | endpoint late, worst ms |"
)


def line(case: Case, client: str, got: dict[str, Any], bare: dict[str, Any] | None) -> str:
    ratio = "" if bare is None else f"{got['cpu_us_per_event'] / bare['cpu_us_per_event']:.2f}"
    gap = "" if got["gap_error"] is None or not case.gap_ms else f"{got['gap_error']:+.2%}"
    cells = (
        case.title,
        client,
        f"{got['cpu_us_per_event']:.1f}",
        ratio,
        f"{got['cpu_us_per_request']:,.0f}",
        f"{got['events_per_s']:,.0f}",
        f"{got['ttft_p99_ms']:.1f}",
        f"{got['ttft_p99_truth_ms']:.1f}",
        f"{got['late_p99_ms']:.2f}",
        gap,
        f"{got['rss_mib']:.0f}",
        str(got["errors"]),
        f"{got['server_late_ms']:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def machine() -> str:
    cpu = cpu_name()
    packages = ("uvloop", "httptools", "orjson", "aiohttp", "openai", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    system = f"{platform.platform(terse=True)}, Python {platform.python_version()}"
    return f"{cpu}, {os.cpu_count()} cores, {system}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default=",".join(CLIENTS))
    parser.add_argument("--only", default="", help="cases whose title contains this")
    parser.add_argument("--write", action="store_true", help="write bench/RESULTS.md")
    options = parser.parse_args()
    clients = [name for name in CLIENTS if name in options.clients.split(",")]
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    print("\n".join(lines), flush=True)
    for case in (case for case in CASES if options.only in case.title):
        got = {client: measure(case, client) for client in clients if client in case.clients}
        for client in got:
            lines.append(line(case, client, got[client], got.get("bare")))
            print(lines[-1], flush=True)
    if options.write:
        written = (
            f"# What `make bench` showed\n\n{time.strftime('%Y-%m-%d')}, {machine()}.\n\n" + "\n".join(lines) + "\n"
        )
        (HERE / "RESULTS.md").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
