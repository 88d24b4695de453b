"""A target that dies, hangs or lies at each phase of a level: its name, what is lost, and that the run goes on.

Every run here has deadlines of a second or two, and none may take longer than they allow.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import pytest

from loadbench.order import Order
from loadbench.report.live import QuietView
from loadbench.runner import Run
from loadbench.scenario.load import Overrides, load_scenario
from loadbench.target import recovery
from loadbench.target.fake import FakeServer, serve
from loadbench.target.fake_script import Script
from tests.asking import scripted
from tests.command import ended, events, eventually, facts, rows, started, states, summary

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills and stops processes as POSIX does")

PHASES = ("before", "load", "drain", "between")
BOUND_S = 20.0  # from the fault to the end of the run
QUICK = Script(first_token_ms=5, gap_ms=1)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Models are made once for all these tests."""
    os.environ["LOADBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def write(folder: Path, phase: str, *lines: str, tokens: int = 600) -> None:
    """Three levels, of which the fault hits the first or, ``between`` levels, the second.

    ``before``: nobody asks in the first second. ``drain``: its answers take longer than the level.
    """
    folder.mkdir(exist_ok=True)
    first = {
        "before": "{over_time: [{hold: 0/s, for: 1s}, {hold: 30/s, for: 1s}]}, {concurrency: 1, requests: 3}",
        "drain": "{concurrency: 6, duration: 200ms}, {concurrency: 1, requests: 3}",
    }.get(phase, "{concurrency: [2, 1], duration: 1s, rest: 1s}")
    text = (
        "name: s",
        f"request: {{max_tokens: {tokens if phase in ('load', 'drain') else 8}}}",
        "prompts: [{name: hello, text: Say hello}]",
        "warmup: {requests: 0}",
        "drain: 2s",
        "deadlines: {first_token: 1s, total: 2s}",
        f"stages: [{first}, {{concurrency: 1, requests: 4}}]",
        *lines,
        "",
    )
    (folder / "s.yaml").write_text("\n".join(text), encoding="utf-8")


def outcomes(folder: Path, level: int) -> set[str]:
    samples = rows(folder / "out" / "samples.jsonl")
    return {row["outcome"] for row in samples if (row["phase"], row["level"]) == ("load", level)}


async def reached(folder: Path, phase: str) -> None:
    """Return when the run is in that phase of its first level, or after it."""
    begun = {"between": "level_end", "drain": "issue_end"}.get(phase, "level_start")
    await eventually(lambda: bool(events(folder, begun)))
    if phase == "load":
        await asyncio.sleep(0.4)  # in the middle of it: no event of ours says so


def service_of(process: asyncio.subprocess.Process) -> psutil.Process:
    (found,) = [
        child for child in psutil.Process(process.pid).children(True) if "foundry_child" in " ".join(child.cmdline())
    ]
    return found


async def struck(folder: Path, phase: str, number: signal.Signals) -> float:
    """Run on the embedded service, send its process the signal in that phase; how long the run went on, in seconds."""
    write(folder, phase)
    process = await started("run", "s.yaml", "--model", "synthetic:tiny", "--out", "out", cwd=folder)
    await reached(folder, phase)
    service = service_of(process)
    service.send_signal(number)
    began_s = perf_counter()
    code, _, err = await ended(process)
    assert "Traceback" not in err, err
    assert code == 93, (code, err)
    assert not service.is_running()
    return perf_counter() - began_s


def hit(phase: str) -> int:
    """The level that the fault strikes."""
    return 1 if phase == "between" else 0


def survived(folder: Path, phase: str, state: str) -> dict[str, Any]:
    """Check what every death has in common; returns its recovery."""
    struck_level = hit(phase)
    found = states(folder)
    assert found[struck_level] == state, (phase, found)
    others = found[:struck_level] + found[struck_level + 1 :]
    assert others == ["healthy"] * 2, (phase, found)
    assert facts(folder)["status"] == "complete"
    (back,) = events(folder, "recovery")
    assert (back["level"], back["state"], back["back"]) == (struck_level, state, True)
    assert 0 <= back["noticed_s"] <= back["to_port_s"] <= back["to_status_s"] <= back["to_token_s"]
    assert back["to_token_s"] - back["noticed_s"] < 15
    assert back["told"].startswith(f"back {back['to_token_s']:.1f} s after the last good token (")
    return back


async def each_phase(work: Callable[[str], Coroutine[Any, Any, float]]) -> dict[str, float]:
    """All phases beside each other: they mostly wait."""
    took_s = await asyncio.gather(*(work(phase) for phase in PHASES))
    return dict(zip(PHASES, took_s, strict=True))


# The embedded service: killed, it is started anew and the run goes on


async def test_kill_9_at_any_phase_is_a_crash_and_the_run_goes_on(tmp_path: Path) -> None:
    took_s = await each_phase(lambda phase: struck(tmp_path / phase, phase, signal.SIGKILL))
    for phase in PHASES:
        folder = tmp_path / phase
        back = survived(folder, phase, "crashed")
        assert back["restarted"] is True
        evidence = events(folder, "level_end")[hit(phase)]["target"]["evidence"]
        assert evidence[0] == "the service's process ended: killed by SIGKILL"
        assert evidence[-1] == "cause not established"
        failed = outcomes(folder, hit(phase)) - {"ok"}
        assert failed and failed <= {"connection_lost", "connect_refused", "truncated"}, (phase, failed)
        assert back["lost"] == sum(
            row["outcome"] != "ok"
            for row in rows(folder / "out" / "samples.jsonl")
            if (row["phase"], row["level"]) == ("load", hit(phase))
        )
        assert took_s[phase] < BOUND_S


async def test_one_that_is_stopped_at_any_phase_is_killed_and_started_anew(tmp_path: Path) -> None:
    took_s = await each_phase(lambda phase: struck(tmp_path / phase, phase, signal.SIGSTOP))
    for phase in PHASES:
        folder = tmp_path / phase
        assert survived(folder, phase, "unreachable")["restarted"] is True
        evidence = events(folder, "level_end")[hit(phase)]["target"]["evidence"]
        assert "its process is stopped" in evidence and evidence[-1] == "its status route does not answer"
        failed = outcomes(folder, hit(phase)) - {"ok"}
        assert failed and failed <= {"first_token_deadline", "total_deadline", "censored"}, (phase, failed)
        assert took_s[phase] < BOUND_S


async def test_the_wedge_is_told_while_its_level_runs_cured_and_the_next_model_measured(tmp_path: Path) -> None:
    lines = "models: ['synthetic:wedge', 'synthetic:tiny']\nrequest: {max_tokens: 200}\nwarmup: {requests: 0}\n"
    lines += "prompts: [{name: p, input_tokens: {mean: 24}}]\ndeadlines: {first_token: 2s, total: 20s}\ndrain: 1s\n"
    lines += "stages: [{concurrency: 2, duration: 15s}, {concurrency: 1, requests: 2}]\n"

    async def wedge(workers: str) -> None:
        folder = tmp_path / workers
        folder.mkdir()
        (folder / "s.yaml").write_text(lines, encoding="utf-8")
        code, _, err = await ended(await started("run", "s.yaml", "--out", "out", "--workers", workers, cwd=folder))
        assert code == 93, err
        assert states(folder) == ["wedged", "healthy", "healthy", "healthy"]
        start, issued, end = (events(folder, name)[0] for name in ("level_start", "issue_end", "level_end"))
        assert end["t_ns"] - start["t_ns"] < (2 + 5 + 1.5) * 1e9  # the deadline, five seconds, a busy machine
        assert (issued["reason"], end["complete"]) == ("stalled", False)
        assert end["target"]["evidence"][0] == "no stream had a token for as long as a first one may take"
        assert end["target"]["evidence"][-1] == "its status route answers"
        assert outcomes(folder, 0) == {"censored"}
        (back,) = events(folder, "recovery")
        assert (back["state"], back["restarted"], back["lost"]) == ("wedged", True, 2)
        assert [model["status"] for model in facts(folder)["models"]] == ["ok", "ok"]

    await asyncio.gather(wedge("1"), wedge("2"))


async def test_a_model_that_dies_on_two_levels_in_a_row_is_left_and_the_next_is_measured(tmp_path: Path) -> None:
    lines = "models: ['synthetic:tiny', 'synthetic:edge']\nwarmup: {requests: 0}\nrequest: {max_tokens: 8}\n"
    lines += "stages: [{concurrency: [1, 2, 3], duration: 1s}]\n"
    (tmp_path / "s.yaml").write_text(lines, encoding="utf-8")
    process = await started("run", "s.yaml", "--out", "out", cwd=tmp_path)
    for deaths in range(2):
        await eventually(lambda deaths=deaths: len(events(tmp_path, "level_start")) > deaths)  # type: ignore[misc]
        service_of(process).kill()
    code, _, err = await ended(process)
    assert code == 93, err
    assert states(tmp_path) == ["crashed", "crashed", "healthy", "healthy", "healthy"]
    (left,) = facts(tmp_path)["not_run"]
    assert (left["rule"], left["model"], left["levels"]) == ("target_died", "synthetic-tiny:1", [2])
    assert [model["status"] for model in facts(tmp_path)["models"]] == ["ok", "ok"]


async def test_a_run_that_is_to_skip_goes_on_with_the_next_model(tmp_path: Path) -> None:
    lines = "models: ['synthetic:tiny', 'synthetic:edge']\nwarmup: {requests: 0}\nrequest: {max_tokens: 8}\n"
    lines += "stages: [{concurrency: [1, 2], duration: 1s}]\non_target_death: skip_model\n"
    (tmp_path / "s.yaml").write_text(lines, encoding="utf-8")
    process = await started("run", "s.yaml", "--out", "out", cwd=tmp_path)
    await eventually(lambda: bool(events(tmp_path, "level_start")))
    service_of(process).kill()
    code, _, err = await ended(process)
    assert code == 93, err
    assert states(tmp_path) == ["crashed", "healthy", "healthy"]
    assert [left["levels"] for left in facts(tmp_path)["not_run"]] == [[1]]


# The scripted endpoint: not ours, so it is waited for


class Stage:
    """A scripted endpoint that changes when the run reaches a phase: by the requests it gets, or what is on disk."""

    def __init__(self, folder: Path, phase: str) -> None:
        self.folder = folder
        self.phase = phase
        self.server: FakeServer | None = None

    async def play(self, fault: Callable[[FakeServer], None], *words: str, back_after_s: float | None = None) -> int:
        """Run, do that to the endpoint in the phase, have it back on its port some time later; the exit code."""
        long = self.phase in ("load", "drain")
        write(self.folder, self.phase, "on_target_death: restart", tokens=400 if long else 8)
        server = await serve(QUICK)
        url, canary = server.base_url, asyncio.Event()
        answer = server.take

        def take(connection: Any, message: Any) -> None:
            if (message.header(b"x-request-id") or "").startswith("canary-0-1"):
                canary.set()
                fault(server)
            answer(connection, message)

        if self.phase == "canary":
            server.take = take  # type: ignore[method-assign]
        process = await started("run", "s.yaml", "--endpoint", url, "--out", "out", *words, cwd=self.folder)
        try:
            if self.phase == "canary":
                async with asyncio.timeout(30):
                    await canary.wait()
            else:
                await reached(self.folder, self.phase)
                fault(server)
            if back_after_s is not None:
                await asyncio.sleep(back_after_s)
                await server.close()
                server = await serve(QUICK, port=server.port)
            began_s = perf_counter()
            code, _, err = await ended(process)
            assert perf_counter() - began_s < BOUND_S
        finally:
            await server.close()
        assert "Traceback" not in err, err
        return code


async def test_streams_that_stand_still_and_go_on_are_not_cut(tmp_path: Path) -> None:
    lines = "request: {max_tokens: 300}\nwarmup: {requests: 0}\nprompts: [{name: hello, text: Say hello}]\n"
    lines += "deadlines: {first_token: 1s, total: 9s}\nstages: [{concurrency: 1, requests: 1}]\n"

    async def stall(workers: str, **script: Any) -> str:
        """What came of the canary that was sent beside the load."""
        folder = tmp_path / f"{workers}{len(script)}"
        folder.mkdir()
        (folder / "s.yaml").write_text(lines, encoding="utf-8")
        async with scripted(faults=("stall@2",), stall_ms=1500, gap_ms=4, **script) as server:
            words = ("run", "s.yaml", "--endpoint", server.base_url, "--out", "out", "--workers", workers)
            code, _, err = await ended(await started(*words, cwd=folder))
        assert code == 0, err
        assert (states(folder), outcomes(folder, 0)) == (["healthy"], {"ok"})
        (end,), (issued,), (note,) = (events(folder, name) for name in ("level_end", "issue_end", "note"))
        assert (end["complete"], issued["reason"]) == (True, "requests")
        (level,) = summary(folder / "out")["levels"]
        assert level["requests"]["attempted"] == 1
        told, _, outcome = note["text"].rpartition(": ")
        assert told.startswith("no stream had had a token for 1.")
        return str(outcome)

    found = await asyncio.gather(*(stall(workers, **one) for workers in ("1", "2") for one in ({}, {"slots": 1})))
    # It is answered at once; or where it has to wait for the stream, that goes on before it is given up.
    assert found == ["ok", "first_token_deadline"] * 2


def zombie(server: FakeServer) -> None:
    """Every chat gets a 503, the status routes go on answering."""
    server.script = replace(server.script, faults=("http_5xx",))


async def test_one_that_resets_its_streams_is_waited_for_until_it_is_back(tmp_path: Path) -> None:
    phases = (*PHASES, "canary")
    plays = [Stage(tmp_path / phase, phase).play(FakeServer.crash, back_after_s=2.5) for phase in phases]
    assert await asyncio.gather(*plays) == [93] * len(phases)
    for phase in phases:
        folder = tmp_path / phase
        back = survived(folder, phase, "unreachable")
        assert back["restarted"] is False
        failed = outcomes(folder, hit(phase)) - {"ok"}
        cut_off = {"connection_lost"} if phase in ("load", "drain") else set()
        refused = {"connect_refused"} if phase in ("before", "load", "between") else set()
        assert cut_off <= failed <= cut_off | refused, (phase, failed)
        assert bool(failed) == (phase != "canary")
        noticed_ns = events(folder, "level_end")[hit(phase)]["t_ns"]
        tokens_ns = [row["last_token_ns"] or 0 for row in rows(folder / "out" / "samples.jsonl")]
        last_s = max(token_ns for token_ns in tokens_ns if token_ns < noticed_ns) / 1e9
        assert back["noticed_s"] == pytest.approx(noticed_ns / 1e9 - last_s, abs=0.25), phase


async def test_a_503_zombie_is_degraded_at_any_phase_and_hangs_nobody(tmp_path: Path) -> None:
    phases = (*PHASES, "canary")
    codes = await asyncio.gather(*(Stage(tmp_path / phase, phase).play(zombie) for phase in phases))
    assert codes == [94] * len(phases)
    for phase in phases:
        folder = tmp_path / phase
        assert states(folder)[hit(phase) :] == ["degraded"] * (3 - hit(phase)), phase
        assert outcomes(folder, 2) == {"http_5xx"}
        evidence = events(folder, "level_end")[2]["target"]["evidence"]
        assert evidence[0].startswith("a canary failed: http_5xx") and evidence[1] == "its status route answers"
        assert events(folder, "recovery") == []


async def test_one_that_stays_away_ends_the_run_after_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "LIMIT_S", 0.5)
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "load", "on_target_death: restart", tokens=8)
    async with scripted(refuse_after=60, connection_close=True) as server:
        loaded = load_scenario(tmp_path / "s.yaml", Overrides(endpoint=server.base_url), {})
        run = Run(Order(loaded, tmp_path / "results", tmp_path / "out", "test", {}), QuietView())
        assert await run.execute() == "target_died"
    (back,) = events(tmp_path, "recovery")
    assert back["back"] is False and back["limit_s"] == 0.5 and "to_port_s" not in back
    assert "did not come back within 0.5 s" in facts(tmp_path)["reason"]
    assert states(tmp_path) == ["unreachable"]


async def test_ctrl_c_ends_the_waiting_for_a_target(tmp_path: Path) -> None:
    write(tmp_path, "load", "on_target_death: restart", tokens=8)
    async with scripted(refuse_after=60, connection_close=True) as server:
        process = await started("run", "s.yaml", "--endpoint", server.base_url, "--out", "out", cwd=tmp_path)
        await eventually(lambda: bool(events(tmp_path, "level_end")))
        process.send_signal(signal.SIGINT)
        began_s = perf_counter()
        code, _, err = await ended(process)
    assert perf_counter() - began_s < 10
    assert code == 93, err
    assert "the run was ended before it came back" in facts(tmp_path)["reason"]
    assert summary(tmp_path / "out")["status"] == "target_died"
