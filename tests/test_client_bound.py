"""Is it us? A client that does not get its core says so in the report, and one that does says nothing of the kind."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.asking import scripted
from tests.command import ended, eventually, rows, started, summary

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(
        not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
        reason="needs a core for the client alone, and to say which",
    ),
]

HOGS = 24
"""With so many on its core a fair scheduler leaves the client 4 % of it; 64 streams of a token every 20 ms take 6 % or
more. Fewer do not decide it: a process that uses less than its share is let in before those that use all of theirs."""

SCENARIO = """
name: s
request: {max_tokens: 16}
prompts: [{name: hello, text: Say hello}]
stages: [{concurrency: 64, duration: 2s}]
"""


@contextlib.contextmanager
def hogs_on(core: int, number: int) -> Iterator[None]:
    """So many processes that compute for ever, on this core only."""
    hogs = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(number)]
    try:
        for hog in hogs:
            os.sched_setaffinity(hog.pid, {core})
        yield
    finally:
        for hog in hogs:
            hog.kill()
        for hog in hogs:
            hog.wait()


async def report_of_a_run_beside(hogs: int, folder: Path) -> tuple[dict[str, Any], str]:
    """(the level of summary.json, the console) of a run on one core, shared with hogs while its level is issued."""
    (folder / "s.yaml").write_text(SCENARIO, encoding="utf-8")
    core = max(os.sched_getaffinity(0))
    async with scripted(first_token_ms=200, gap_ms=20) as server:  # a tenth of the 200 may be lag: several slices
        process = await started("run", "s.yaml", "--endpoint", server.base_url, "--out", "out", cwd=folder)
        os.sched_setaffinity(process.pid, {core})
        await eventually(lambda: len(server.records) > 64)
        with hogs_on(core, hogs):
            telemetry = folder / "out" / "telemetry.jsonl"
            await eventually(lambda: any(row["event"] == "issue_end" for row in rows(telemetry)))
        code, out, err = await ended(process)
    assert code == 0, err
    (level,) = summary(folder / "out")["levels"]
    return level, out


async def test_cpu_hogs_beside_the_client_make_the_level_client_bound(tmp_path: Path) -> None:
    level, out = await report_of_a_run_beside(HOGS, tmp_path)
    assert level["client"]["bound"] is True
    assert any("late" in reason for reason in level["client"]["bound_because"])
    assert "client_bound" in [caution["about"] for caution in level["cautions"]]
    assert "client bound" in out


async def test_without_them_it_is_not(tmp_path: Path) -> None:
    level, out = await report_of_a_run_beside(0, tmp_path)
    assert level["client"]["bound"] is False, level["client"]["bound_because"]
    assert "client_bound" not in [caution["about"] for caution in level["cautions"]]
    assert "client bound" not in out
