"""Memory ladders on the real service, held by a limit: how they end, what they leave, and that the host is spared."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import psutil
import pytest

from loadbench.errors import TargetError, UsageError
from loadbench.order import Order
from loadbench.report.frame import LevelProgress, MemoryShown, Progress, current_line
from loadbench.report.live import QuietView
from loadbench.runner import Run
from loadbench.scenario.load import Overrides, load_scenario
from loadbench.target.containment import RLIMIT_DATA, limit_for
from loadbench.target.target import Target
from tests.asking import scripted
from tests.command import ended, events, eventually, facts, loadbench, rows, started, states, summary

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as on Linux")

BY_RLIMIT = {"LOADBENCH_MEMORY_LIMIT_KIND": RLIMIT_DATA}
MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Models are made once for all these tests."""
    os.environ["LOADBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def write(folder: Path, ladder: str, *lines: str) -> None:
    text = "\n".join(
        ("name: s", "warmup: {requests: 0}", f"stages: [{{memory: {{{ladder}}}, duration: 3s}}]", *lines, "")
    )
    (folder / "s.yaml").write_text(text, encoding="utf-8")


def ladder(folder: Path, *words: str, **env: str) -> tuple[int, str]:
    done = loadbench("run", "s.yaml", "--out", "out", *words, cwd=folder, **env)
    return done.returncode, done.stderr


@contextlib.asynccontextmanager
async def probing() -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """A probe of this process and its children: its URL, and it."""
    probe = await started("probe", "--listen", "127.0.0.1:0", "--pid", str(os.getpid()))
    try:
        assert probe.stdout is not None
        line = (await probe.stdout.readline()).decode()
        yield next(word for word in line.split() if word.startswith("http")), probe
    finally:
        with contextlib.suppress(ProcessLookupError):
            probe.kill()
        await probe.communicate()


def cgroups() -> bool:
    limit = limit_for(("true",), 64 * MIB)
    limit.release()
    return limit.kills


def test_it_ends_at_the_first_failed_allocation_which_is_its_answer(tmp_path: Path) -> None:
    # 90 MiB and 125 of cache for a single one: none fits. It is a small allocation of the runtime's that fails once in
    # many runs, which nobody there catches: that is no failure of ours, as long as it is told for what it is.
    asks = "until: failure, concurrency: [1, 4], max_tokens: [200, 8000]"
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        write(folder, asks, "models: synthetic:kv", "memory_limit: 208MiB")
        code, err = ladder(folder, **BY_RLIMIT)
        assert code == 0, err
        if states(folder)[-1] != "crashed":
            break
        assert events(folder, "level_end")[-1]["target"]["evidence"][-1] == "likely cause: want of memory"
    document = facts(folder)
    assert (document["status"], states(folder)[-1]) == ("complete", "oom_reported")
    (left,) = document["not_run"]
    assert (left["rule"], left["after_level"], left["levels"]) == ("memory_failure", 2, [3])
    assert "for want of memory" in left["because"]
    assert document["memory"]["source"] == "local"
    assert document["memory"]["limit"]["kind"] == RLIMIT_DATA
    assert 0 < document["memory"]["cost_share"] < 0.1


def test_every_rung_has_a_process_of_its_own_and_is_read_ten_times_a_second(tmp_path: Path) -> None:
    write(tmp_path, "until: failure, concurrency: 1, max_tokens: [64, 2000]", "models: synthetic:kv")
    code, err = ladder(tmp_path)
    assert code == 0, err
    assert len(events(tmp_path, "note")) == 2
    before = [row["target"]["memory"]["before"]["rss_bytes"] for row in events(tmp_path, "level_end")]
    assert abs(before[0] - before[1]) < 8 * MIB  # nothing is left of the rung before
    for row in events(tmp_path, "level_end"):
        memory, rss = row["target"]["memory"], row["target"]["rss_bytes"]
        assert memory["peak"]["peak_rss_bytes"] >= memory["peak"]["rss_bytes"] == rss["peak"]
        assert memory["peak"]["available_bytes"] <= memory["before"]["available_bytes"]
        assert (memory["before"]["rss_bytes"], memory["after"]["rss_bytes"]) == (rss["before"], rss["after"])
    read_ns = [row["t_ns"] for row in events(tmp_path, "memory") if row["level"] == 1]
    (start,) = [row["t_ns"] for row in events(tmp_path, "level_start") if row["level"] == 1]
    (end,) = [row["t_ns"] for row in events(tmp_path, "issue_end") if row["level"] == 1]
    assert len(read_ns) >= (end - start) / 1e9 * 5


def test_a_crash_is_an_answer_too_and_the_next_stage_is_measured_on_a_service_started_anew(tmp_path: Path) -> None:
    write(tmp_path, "until: failure, concurrency: 128, max_tokens: 300", "models: synthetic:kv", "memory_limit: 1GiB")
    text = (tmp_path / "s.yaml").read_text().replace("duration: 3s}]", "duration: 9s}, {concurrency: 1, requests: 5}]")
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    code, err = ladder(tmp_path, **BY_RLIMIT)
    assert code == 0, err
    assert (facts(tmp_path)["status"], states(tmp_path)) == ("complete", ["crashed", "healthy"])
    (back,) = events(tmp_path, "recovery")
    assert (back["level"], back["state"], back["restarted"], back["back"]) == (0, "crashed", True, True)
    assert 0 < back["to_port_s"] <= back["to_status_s"] <= back["to_token_s"] < 10
    evidence = events(tmp_path, "level_end")[0]["target"]["evidence"]
    assert evidence[0] == "the service's process ended: killed by SIGABRT"
    assert evidence[-1] == "likely cause: want of memory"
    assert back["lost"] > 20


@pytest.mark.skipif(not cgroups(), reason="no cgroup that limits memory can be made here")
def test_a_kill_by_the_kernel_is_told_by_its_count(tmp_path: Path) -> None:
    write(tmp_path, "until: failure, concurrency: 4, max_tokens: 8000", "models: synthetic:kv", "memory_limit: 192MiB")
    code, err = ladder(tmp_path)
    assert code == 0, err
    assert (facts(tmp_path)["status"], states(tmp_path)) == ("complete", ["oom_killed"])
    assert facts(tmp_path)["memory"]["limit"]["kind"].startswith("cgroup")
    told = events(tmp_path, "level_end")[0]["target"]["evidence"]
    assert any("killed for want of memory rose from 0 to " in line for line in told)


def test_it_ends_where_it_was_to_climb_to(tmp_path: Path) -> None:
    write(tmp_path, "until: 100MiB, concurrency: [1, 2, 4], max_tokens: 1500", "models: synthetic:kv")
    code, err = ladder(tmp_path)
    assert code == 0, err
    (left,) = facts(tmp_path)["not_run"]
    assert left["rule"] == "memory_limit"
    assert left["because"].endswith(" of 100 MiB to climb to")


def test_its_limit_cuts_a_rung_and_is_told_of_the_last_one_too(tmp_path: Path) -> None:
    """The rung would take 2 GiB."""
    write(tmp_path, "until: 300MiB, concurrency: 16, max_tokens: 8000", "models: synthetic:kv")
    code, err = ladder(tmp_path)
    assert code == 0, err
    (left,) = facts(tmp_path)["not_run"]
    assert (left["rule"], left["after_level"], left["levels"]) == ("memory_limit", 0, [])
    assert left["because"].endswith(" of 300 MiB to climb to")
    (end,) = events(tmp_path, "level_end")
    assert not end["complete"] and end["target"]["state"] == "healthy"
    assert end["target"]["memory"]["peak"]["peak_rss_bytes"] < 1536 * MIB
    told = summary(tmp_path / "out")["verdict"]["text"]
    assert "The memory ladder reached its limit after 16 users" in told


@pytest.mark.parametrize("policy", ["stop", "skip_model"])
def test_the_death_that_a_ladder_climbs_for_is_not_what_on_target_death_is_said_of(policy: str, tmp_path: Path) -> None:
    asks = "until: failure, concurrency: 128, max_tokens: 300"
    write(tmp_path, asks, "models: synthetic:kv", "memory_limit: 1GiB", f"on_target_death: {policy}")
    text = (tmp_path / "s.yaml").read_text().replace("duration: 3s}]", "duration: 9s}, {concurrency: 1, requests: 5}]")
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    code, err = ladder(tmp_path, **BY_RLIMIT)
    assert code == 0, err
    assert (facts(tmp_path)["status"], states(tmp_path)) == ("complete", ["crashed", "healthy"])


async def test_one_that_answers_503_is_not_out_of_memory(tmp_path: Path) -> None:
    write(tmp_path, "until: failure, concurrency: [1, 2], max_tokens: 300")
    async with scripted(first_token_ms=1, gap_ms=5) as server:
        words = ("run", "s.yaml", "--out", "out", "--endpoint", server.base_url, "--i-own-the-target")
        process = await started(*words, cwd=tmp_path)
        await eventually(lambda: bool(events(tmp_path, "level_start")))
        server.script = replace(server.script, faults=("http_5xx",))
        code, _, err = await ended(process)
    assert code == 94, err
    (left,) = facts(tmp_path)["not_run"]
    assert (left["rule"], left["after_level"], left["levels"]) == ("target_degraded", 0, [1])
    assert "the memory ladder has no answer" in err
    sent = [row for row in rows(tmp_path / "out" / "samples.jsonl") if row["phase"] == "canary"]
    assert [row["outcome"] for row in sent] == ["ok", "http_5xx", "http_5xx"]


async def test_a_rung_goes_on_while_one_of_its_users_waits(tmp_path: Path) -> None:
    write(tmp_path, "until: 90%, concurrency: 8, max_tokens: 8")
    async with scripted(first_token_ms=1, first_token_jitter_ms=1500, gap_ms=1) as server:
        words = ("run", "s.yaml", "--out", "out", "--endpoint", server.base_url)
        code, _, err = await ended(await started(*words, cwd=tmp_path))
    assert code == 0, err
    sent = [row for row in rows(tmp_path / "out" / "samples.jsonl") if row["phase"] == "load"]
    assert [row["outcome"] for row in sent] == ["ok"] * 8


@pytest.mark.parametrize("until", ["1GiB", "80%"])
async def test_a_ladder_to_a_size_is_refused_where_nobody_reads_the_targets_memory(
    until: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Target, "memory_watch", lambda _: None)  # as for a host that is not this machine
    write(tmp_path, f"until: {until}, concurrency: 1, max_tokens: 8")
    async with scripted(first_token_ms=1, gap_ms=1) as server:
        loaded = load_scenario(tmp_path / "s.yaml", Overrides(endpoint=server.base_url), {})
        run = Run(Order(loaded, tmp_path / "results", tmp_path / "out", "test", {}), QuietView())
        with pytest.raises(UsageError) as refused:
            await run.execute()
        assert not server.records
    assert str(refused.value) == (
        "stages[0].memory.until: expected failure, or a target whose memory can be read (its host is not this machine,"
        f" and target_probe names none there), got {until}"
    )
    assert not (tmp_path / "out").exists()


async def test_a_rung_is_cut_when_nobody_reads_the_host_any_more(tmp_path: Path) -> None:
    write(tmp_path, "until: 90%, concurrency: [2, 3], max_tokens: 4000")
    text = (tmp_path / "s.yaml").read_text().replace("duration: 3s", "duration: 20s")
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    async with scripted(first_token_ms=1, gap_ms=20) as server, probing() as (url, probe):
        words = ("--endpoint", server.base_url, "--set", f"target_probe={url}")
        process = await started("run", "s.yaml", "--out", "out", *words, cwd=tmp_path)
        await eventually(lambda: bool(events(tmp_path, "level_start")))
        probe.kill()
        await probe.wait()
        _, _, err = await ended(process)
    assert "Traceback" not in err
    (left,) = facts(tmp_path)["not_run"]
    assert (left["rule"], left["after_level"], left["levels"]) == ("memory_floor", 0, [1])
    assert left["because"].startswith("nobody has read the host for ")
    (start,), (end,) = events(tmp_path, "level_start"), events(tmp_path, "issue_end")
    assert end["t_ns"] - start["t_ns"] < 10e9


async def test_a_rung_without_a_fresh_process_is_left_out_and_the_next_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, restart = count(1), Target.restart

    async def fails_twice(target: Target) -> None:
        if next(starts) in (2, 3):
            raise TargetError("it did not come up")
        await restart(target)

    monkeypatch.setattr(Target, "restart", fails_twice)
    write(tmp_path, "until: failure, concurrency: [1, 2, 3], max_tokens: 8", "models: synthetic:tiny")
    loaded = load_scenario(tmp_path / "s.yaml", Overrides(), {})
    run = Run(Order(loaded, tmp_path / "results", tmp_path / "out", "test", {}), QuietView())
    assert await run.execute() == "complete"
    (left,) = facts(tmp_path)["not_run"]
    assert (left["rule"], left["after_level"], left["levels"]) == ("not_started", None, [1])
    assert left["because"] == "no fresh process at 2 tries: it did not come up"
    assert [row["level"] for row in events(tmp_path, "level_end")] == [0, 2]
    assert next(starts) == 5


@pytest.mark.parametrize("words", [("--model", "synthetic:tiny"), ()], ids=["embedded", "elsewhere"])
async def test_a_host_with_less_than_the_floor_is_not_loaded_at_all(tmp_path: Path, words: tuple[str, ...]) -> None:
    write(tmp_path, "until: 90%, floor: 4096GiB, concurrency: [1, 2], max_tokens: 8")
    async with scripted(first_token_ms=1, gap_ms=1) as server:
        where = words or ("--endpoint", server.base_url)
        code, _, err = await ended(await started("run", "s.yaml", "--out", "out", *where, cwd=tmp_path))
        asked = len(server.records)
    assert code == 94, err  # nothing was measured
    (left,) = facts(tmp_path)["not_run"]
    assert (left["rule"], left["after_level"]) == ("memory_floor", None)
    assert "less than the floor of 4,096 GiB" in left["because"]
    assert events(tmp_path, "level_start") == []
    assert asked == (0 if words else 1)  # the canary


@pytest.mark.alone
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_guard_cuts_a_rung_that_takes_what_the_host_needs(tmp_path: Path, workers: str) -> None:
    """The rung would take 2 GiB, and the floor lies half a GiB below what there is.

    Not more: of what a process that has ended held, up to 1.3 GiB may count as available only when it is asked for.
    """
    floor_mib = (psutil.virtual_memory().available >> 20) - 512
    if floor_mib < 2048:
        pytest.skip("the machine has too little memory for this")
    asks = f"until: failure, floor: {floor_mib}MiB, concurrency: [16, 17], max_tokens: 8000"
    write(tmp_path, asks, "models: synthetic:kv")
    code, err = ladder(tmp_path, "--workers", workers)
    assert "Traceback" not in err
    assert code in (0, 94), err
    (left,) = facts(tmp_path)["not_run"]
    assert (left["rule"], left["after_level"], left["levels"]) == ("memory_floor", 0, [1])
    (end,) = events(tmp_path, "level_end")
    assert not end["complete"] and end["target"]["state"] == "healthy"
    cut = [row for row in rows(tmp_path / "out" / "samples.jsonl") if row["phase"] == "load"]
    assert {(row["outcome"], row["detail"]) for row in cut} == {("censored", "given up: memory_floor")}
    assert len(cut) == 16


async def test_ctrl_c_ends_a_rung(tmp_path: Path) -> None:
    write(tmp_path, "until: failure, concurrency: 2, max_tokens: 8000", "models: synthetic:kv")
    process = await started("run", "s.yaml", "--out", "out", cwd=tmp_path)
    await eventually(lambda: bool(events(tmp_path, "level_start")))
    process.send_signal(signal.SIGINT)
    code, _, err = await ended(process)
    assert code == 130, err
    assert facts(tmp_path)["status"] == "interrupted"


async def test_the_memory_of_another_host_comes_from_its_probe(tmp_path: Path) -> None:
    write(tmp_path, "until: 90%, concurrency: [1, 2], max_tokens: 300")
    async with scripted(first_token_ms=1, gap_ms=5) as server, probing() as (url, _):
        words = ("--endpoint", server.base_url, "--set", f"target_probe={url}")
        code, _, err = await ended(await started("run", "s.yaml", "--out", "out", *words, cwd=tmp_path))
    assert code == 0, err
    memory = facts(tmp_path)["memory"]
    assert (memory["source"], memory["because"], memory["cost_share"]) == ("probe", None, None)
    assert abs(memory["clock"]["drift_ns"]) < 1e9
    ours = psutil.Process().memory_info().rss
    assert all(row["rss_bytes"] > ours / 2 for row in events(tmp_path, "memory"))  # ours, and our children's
    assert summary(tmp_path / "out")["levels"][0]["target"]["rss_bytes"]["peak"] > 10 * MIB


async def test_a_probe_that_does_not_answer_is_an_error_before_anything_is_asked(tmp_path: Path) -> None:
    write(tmp_path, "until: 90%, concurrency: 1, max_tokens: 8")
    async with scripted(first_token_ms=1, gap_ms=1) as server:
        words = ("--endpoint", server.base_url, "--set", "target_probe=http://127.0.0.1:9", "--quiet")
        code, _, err = await ended(await started("run", "s.yaml", "--out", "out", *words, cwd=tmp_path))
        assert not server.records
    assert (code, err.count("\n")) == (3, 1) and "127.0.0.1:9" in err
    assert not (tmp_path / "out").exists()


def test_a_kind_of_limit_that_there_is_not_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "until: failure", "models: synthetic:tiny")
    code, err = ladder(tmp_path, LOADBENCH_MEMORY_LIMIT_KIND="ulimit")
    assert (code, err.splitlines()[-1]) == (
        2,
        "loadbench: LOADBENCH_MEMORY_LIMIT_KIND: expected RLIMIT_DATA, got ulimit",
    )


@pytest.mark.parametrize(
    ("shown", "told"),
    [
        (None, "target 512 MiB"),
        (MemoryShown(600 * MIB, 8192 * MIB, "host", 4096 * MIB), "target 600 MiB"),
        (MemoryShown(600 * MIB, 1024 * MIB, "limit", 4096 * MIB), "target 600 MiB of the limit's 1 GiB"),
        (
            MemoryShown(7800 * MIB, 8192 * MIB, "host", 400 * MIB, near=True),
            "target 7.62 GiB of the host's 8 GiB · host 400 MiB left",
        ),
    ],
)
def test_the_live_view_tells_how_near_the_end_is_and_how_often_it_was_started_anew(
    shown: MemoryShown | None, told: str
) -> None:
    progress = Progress(
        "s", (LevelProgress("2 users", "m:1"),), 0, "load", 1.0, target_rss_bytes=512 * MIB, memory=shown, restarts=2
    )
    assert current_line(progress).endswith(f"0 in flight · {told} · restarted 2 times")


@pytest.mark.parametrize(
    ("model", "max_tokens", "times"), [("synthetic:kv", "[500, 2000]", 1), ("synthetic:kv-growing", "[100, 300]", 2)]
)
def test_what_a_token_takes_is_what_the_arithmetic_says(
    model: str, max_tokens: str, times: int, tmp_path: Path
) -> None:
    """One cache where it is reserved; where it grows two, the old one and the new one."""
    write(tmp_path, f"until: failure, concurrency: [1, 2], max_tokens: {max_tokens}", f"models: {model}")
    if times == 2:  # to the end of its answers, for only then is it as large as it was asked to be
        text = (tmp_path / "s.yaml").read_text().replace("duration: 3s", "duration: 30s")
        (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    code, err = ladder(tmp_path)
    assert code == 0, err
    (found,) = summary(tmp_path / "out")["memory"]
    assert found["levels"] == [0, 1, 2, 3]
    each, stream = (found[name]["value_bytes"] or 0 for name in ("per_token", "per_stream"))
    arithmetic = times * (16 << 10)
    assert each == pytest.approx(arithmetic, rel=0.15)
    tokens = int(max_tokens.strip("[]").split(", ")[1]) + 64
    assert stream + tokens * each == pytest.approx(tokens * arithmetic, rel=0.15)  # and so does a stream
