"""Runs the command line as a user does: in a process of its own, and looks at what it prints, writes and exits with."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

ROOT = Path(__file__).parent.parent
DEADLINE_S = 60.0


def environment(**more: str) -> dict[str, str]:
    """Ours without what would change the answer: no key, no endpoint, no colours, a terminal of 120 columns."""
    hidden = ("OPENAI_API_KEY", "API_KEY", "FOUNDRY_LOCAL_ENDPOINT", "FOUNDRY_LOCAL_ALIAS")
    kept = {name: value for name, value in os.environ.items() if name not in hidden and not name.startswith("BENCH_")}
    return kept | {"COLUMNS": "120", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"} | more


def loadbench(*words: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "loadbench", *map(str, words)],
        cwd=cwd,
        env=environment(PYTHONPATH=str(ROOT), **env),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=DEADLINE_S,
        check=False,
    )


async def started(*words: str | Path, cwd: Path = ROOT, **env: str) -> asyncio.subprocess.Process:
    """Start a command and leave it running."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "loadbench",
        *map(str, words),
        cwd=cwd,
        env=environment(PYTHONPATH=str(ROOT), **env),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[int, str, str]:
    """Its exit code, stdout and stderr."""
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def eventually(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Wait until the condition holds; TimeoutError when it does not come to that."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)  # another process and its files set no event of ours


def rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file."""
    if not path.exists():
        return []
    whole = (line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n"))
    return [orjson.loads(line) for line in whole]


def facts(folder: Path) -> dict[str, Any]:
    """run.json of the run into ``out``."""
    found: dict[str, Any] = orjson.loads((folder / "out" / "run.json").read_bytes())
    return found


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    """The events of that name in its telemetry."""
    return [row for row in rows(folder / "out" / "telemetry.jsonl") if row["event"] == name]


def states(folder: Path) -> list[str]:
    """What the target was in after each level."""
    return [row["target"]["state"] for row in events(folder, "level_end")]


def summary(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = orjson.loads((folder / "summary.json").read_bytes())
    return document
