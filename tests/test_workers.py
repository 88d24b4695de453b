"""Several load processes: together they send what one would have sent, and one that dies is never overlooked."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from scipy import stats

from loadbench.engine.crew import Crew, workers_wanted
from loadbench.engine.load import Clock
from loadbench.engine.merge import merge_shards, parts
from loadbench.engine.recorder import Limits, Recorder
from loadbench.hdr import HlogReader, split_tag
from loadbench.records import Closed, Level, Load, Open, Request, Trace
from loadbench.scenario.prompts import PromptMix
from loadbench.scenario.schema import Scenario
from loadbench.target.fake import FakeServer
from tests.asking import scripted, wire_to
from tests.command import ended, eventually, rows, started, summary
from tests.virtual import PROMPT, sample


def write(folder: Path, stages: str) -> None:
    text = "request: {max_tokens: 4}\nwarmup: {requests: 1}\ndrain: 3s\nprompts:\n  - {name: a, text: one}\n"
    text += "  - {name: b, weight: 2, input_tokens: {mean: 30, stdev: 9, min: 5}}\n"
    (folder / "w.yaml").write_text(f"{text}stages: {stages}\n", encoding="utf-8")


async def run(folder: Path, server: FakeServer, workers: int | str, *more: str) -> tuple[int, str, str]:
    words = (
        "run",
        "w.yaml",
        "--endpoint",
        server.base_url,
        "--workers",
        str(workers),
        "--out",
        f"out-{workers}",
        *more,
    )
    return await ended(await started(*words, cwd=folder))


def load_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder / "samples.jsonl") if row["phase"] == "load"]


async def test_workers_together_send_the_one_global_schedule(tmp_path: Path) -> None:
    write(tmp_path, "[{rate: 150/s, duration: 3s}]")
    sent = {}
    async with scripted() as server:
        for workers in (1, 3):
            code, _, err = await run(tmp_path, server, workers)
            assert code == 0, err
            found = sorted(load_rows(tmp_path / f"out-{workers}"), key=lambda row: row["seq"])
            start = next(
                event["t_ns"]
                for event in rows(tmp_path / f"out-{workers}" / "telemetry.jsonl")
                if event["event"] == "level_start"
            )
            sent[workers] = [(row["seq"], row["kind"], row["due_ns"] - start) for row in found]
    assert len(sent[1]) > 400
    # The last arrivals may fall on either side of the end of the level.
    assert abs(len(sent[1]) - len(sent[3])) <= 1
    assert sent[1][:-1] == sent[3][: len(sent[1]) - 1]


async def test_what_workers_wrote_becomes_one_run_directory(tmp_path: Path) -> None:
    write(tmp_path, "[{concurrency: 5, requests: 83}]")
    async with scripted() as server:
        code, _, err = await run(tmp_path, server, 3)
        assert code == 0, err
        answered = Counter(truth.request_id for truth in server.records)
    out = tmp_path / "out-3"
    assert not (out / "shards").exists()
    found = load_rows(out)
    assert {row["user"] for row in found} == set(range(5))
    sent = Counter(f"load-0-{row['seq']}" for row in found)
    assert sent == Counter(name for name in answered.elements() if str(name).startswith("load-"))
    assert len(found) == 83
    document = summary(out)
    assert document["levels"][0]["requests"] == {"attempted": 83, "ok": 83, "failed": {}}
    counts: Counter[str] = Counter()
    for interval in HlogReader(out / "histograms.hlog"):
        parts = split_tag(interval.tag or "")
        assert parts is not None
        counts[parts[0]] += interval.hdr.total
    assert counts["ttft_service"] == counts["e2e_response"] == counts["lag"] == 83
    assert counts["gap"] == 83 * 3
    assert {event["worker"] for event in rows(out / "telemetry.jsonl") if "worker" in event} == {0, 1, 2}


async def test_poisson_stays_poisson_over_workers(tmp_path: Path) -> None:
    workers = 4
    write(tmp_path, "[{rate: 200/s, duration: 6s}]")
    async with scripted(first_token_ms=1, gap_ms=0) as server:
        code, _, err = await run(tmp_path, server, workers)
        assert code in (0, 94), err
    found = load_rows(tmp_path / f"out-{workers}")
    due_s = np.sort([row["due_ns"] for row in found]).astype(float) / 1e9
    counts = np.histogram(due_s, bins=np.arange(due_s[0], due_s[-1], 0.05))[0]
    assert abs(counts.var() / counts.mean() - 1) < 0.4  # 120 bins of 10: three standard errors of the index are 0.39
    assert stats.kstest(np.diff(due_s), "expon", args=(0, 1 / 200)).pvalue > 0.001
    level = summary(tmp_path / f"out-{workers}")["levels"][0]
    assert level["requests"]["attempted"] == len(found)


async def test_a_worker_that_dies_makes_the_run_invalid_and_keeps_what_was_measured(tmp_path: Path) -> None:
    write(tmp_path, "[{concurrency: 6, duration: 60s}, {concurrency: 9, duration: 60s}]")
    async with scripted() as server:
        words = ("run", "w.yaml", "--endpoint", server.base_url, "--workers", "2", "--out", "out")
        process = await started(*words, cwd=tmp_path)
        await eventually(lambda: len(server.records) > 200)
        victim = min(psutil.Process(process.pid).children(), key=lambda child: child.pid)
        victim.kill()
        code, out, err = await ended(process)
    assert code == 94, err
    assert re.search(r"worker 0 died: killed by SIGKILL, \d+\.\d s into level 0", " ".join(out.split()))
    document = summary(tmp_path / "out")
    assert document["status"] == "failed"
    assert document["levels"][0]["requests"]["ok"] > 100
    assert len(document["levels"]) == 1
    assert not (tmp_path / "out" / "shards").exists()


async def test_a_killed_run_leaves_no_worker_and_its_report_has_all_that_they_wrote(tmp_path: Path) -> None:
    write(tmp_path, "[{concurrency: 6, duration: 60s}]")
    async with scripted() as server:
        words = ("run", "w.yaml", "--endpoint", server.base_url, "--workers", "2", "--out", "out")
        process = await started(*words, cwd=tmp_path)
        await eventually(lambda: len(server.records) > 200)
        family = psutil.Process(process.pid).children()
        assert len(family) == 2
        process.kill()
        await process.wait()
        await eventually(lambda: not any(child.is_running() for child in family))
    await ended(await started("report", "out", cwd=tmp_path))
    document = summary(tmp_path / "out")
    assert document["status"] == "incomplete"
    assert document["levels"][0]["requests"]["ok"] > 150


async def test_a_worker_that_hangs_is_killed_and_makes_the_run_invalid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadbench.engine.crew.SILENCE_S", 1.0)
    clock = Clock()
    scenario = Scenario.model_validate({"prompts": [{"name": "a", "text": "one"}], "request": {"max_tokens": 4}})
    async with scripted() as server, Crew(tmp_path, clock, 0) as crew:
        crew.talk_to(wire_to(server.port))
        await crew.hire(2, scenario.public_json(), tmp_path)
        level = asyncio.create_task(crew.measure(whole(Closed(4)), PromptMix(scenario, tmp_path), 2.0))
        await eventually(lambda: crew.counters().ended > 20)
        victim = psutil.Process().children()[0]
        victim.suspend()
        await asyncio.wait_for(level, 20)
        assert crew.failure is not None and "said nothing for 1 s and was killed" in crew.failure
        assert crew.stop_reason == "worker_died"
        assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE


async def test_what_is_good_is_counted_over_workers_as_the_report_counts_it(tmp_path: Path) -> None:
    clock = Clock()
    slo = {"ttft": {"p50": "1ms", "p95": "20ms"}, "e2e": {"p95": "10s"}}
    scenario = Scenario.model_validate({"prompts": [{"name": "a", "text": "one"}], "slo": slo})
    async with scripted(first_token_jitter_ms=40) as server, Crew(tmp_path, clock, 0) as crew:
        crew.talk_to(wire_to(server.port))
        await crew.hire(2, scenario.public_json(), tmp_path)
        await asyncio.wait_for(crew.measure(whole(Closed(8)), PromptMix(scenario, tmp_path), 2.0), 30)
        counters = crew.counters()
    found = [row for shard in ("0", "1") for row in load_rows(tmp_path / "shards" / shard)]
    within = [row["first_token_ns"] - row["sent_ns"] <= 20e6 for row in found if row["outcome"] == "ok"]
    assert counters.ended == len(found)
    assert counters.good == sum(within)
    assert 0 < counters.good < counters.ended


def test_what_is_good_in_open_loop_counts_from_when_it_was_due(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, lambda error: None)
    limits = Scenario.model_validate({"slo": {"ttft": {"p50": "3s"}, "gap": {"p99": "1ms"}, "goodput": "90%"}}).slo
    recorder.limits = Limits.of(limits)
    late = sample(Request(0, PROMPT, 0), 2_000_000_000, 6_000_000_000)._replace(first_token_ns=4_000_000_000)
    counted = []
    for from_due in (False, True):
        recorder.begin_level(0, 0, from_due=from_due)
        recorder.add(late)
        recorder.add(late._replace(outcome="truncated"))
        counted.append(recorder.good)
    recorder.close()
    assert counted == [1, 0]
    assert Limits.of(Scenario.model_validate({"slo": {"error_rate": "1%"}}).slo) is None


async def test_a_level_that_a_worker_cannot_measure_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    clock = Clock()
    scenario = Scenario.model_validate({"prompts": [{"name": "a", "text": "one"}]})
    trace = Trace("gone.jsonl", "0" * 64, None, 1.0, 5, 5.0)
    async with scripted() as server, Crew(tmp_path, clock, 0) as crew:
        crew.talk_to(wire_to(server.port))
        await crew.hire(2, scenario.public_json(), tmp_path)
        level = whole(Open(1.0, "trace", trace=trace))
        await asyncio.wait_for(crew.measure(level, PromptMix(scenario, tmp_path), 2.0), 30)
        assert crew.failure is not None and "failed: " in crew.failure and "gone.jsonl" in crew.failure


async def test_one_valve_is_not_held_by_several_processes(tmp_path: Path) -> None:
    write(tmp_path, "[{rate: 5/s, duration: 1s, max_in_flight: 1}]")
    async with scripted() as server:
        code, _, err = await run(tmp_path, server, 2, "--quiet")
    assert (code, err) == (
        2,
        "loadbench: --workers: max_in_flight is one valve, which several processes cannot hold: use one\n",
    )


@pytest.mark.parametrize("moved", [None, 0, 1, 3])
def test_a_merge_that_is_cut_off_anywhere_counts_every_request_once(tmp_path: Path, moved: int | None) -> None:
    names = ("samples.jsonl", "telemetry.jsonl", "histograms.hlog")
    folder, other = tmp_path / "run", tmp_path / "merged elsewhere"
    for part, done in ((folder, [1]), (folder / "shards" / "0", [2, 4]), (folder / "shards" / "1", [3])):
        part.mkdir(parents=True, exist_ok=True)
        lines = "".join(f'{{"done_ns": {ns}, "t_ns": {ns}, "event": "tick"}}\n' for ns in done)
        for name in names[:2]:
            (part / name).write_text(lines + '{"torn')
    if moved is None:
        merge_shards(folder, 0)
        assert not (folder / "shards").exists() and not (folder / "merged").exists()
    else:  # what a kill leaves after so many files have been moved
        shutil.copytree(folder, other)
        merge_shards(other, 0)
        (folder / "merged").mkdir()
        for place, name in enumerate(names):
            shutil.copy(other / name, (folder if place < moved else folder / "merged") / name)
    found = [row["done_ns"] for path in parts(folder, "samples.jsonl") for row in rows(path)]
    assert found == [1, 2, 3, 4]


def whole(load: Load) -> Level:
    return Level(0, 0, "fake-model:1", load, 3.0, None, 0, 1)


async def test_ctrl_c_drains_every_worker(tmp_path: Path) -> None:
    write(tmp_path, "[{concurrency: 6, duration: 60s}]")
    async with scripted(gap_ms=10) as server:
        words = ("run", "w.yaml", "--endpoint", server.base_url, "--workers", "2", "--out", "out")
        process = await started(*words, cwd=tmp_path)
        await eventually(lambda: len(server.records) > 30)
        process.send_signal(signal.SIGINT)
        code, _, err = await ended(process)
    assert code == 130, err
    document = summary(tmp_path / "out")
    assert (document["status"], document["levels"][0]["requests"]["failed"]) == ("interrupted", {})


async def test_a_wrong_number_of_workers_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, "[{concurrency: 1}]")
    for wrong in ("0", "many", "-1", "65"):
        code, _, err = await ended(await started("run", "w.yaml", "--workers", wrong, cwd=tmp_path))
        assert (code, err) == (2, f"loadbench: --workers: expected auto or a number from 1 to 64, got {wrong}\n")


def level(load: Load, **options: object) -> Level:
    return Level(0, 0, "m:1", load, 5.0, None, 0, 1, **options)  # type: ignore[arg-type]


def test_a_level_is_dealt_out_without_loss() -> None:
    whole = Level(0, 0, "m:1", Closed(10), None, 83, 41, 1)
    shares = [whole.share(index, 4) for index in range(4)]
    assert [share.requests for share in shares] == [21, 21, 21, 20]
    assert sum(share.min_requests for share in shares) == 41
    assert Level.from_json(whole.as_json()) == whole


def test_auto_hires_only_what_the_calibrated_ceiling_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    warm = sample(Request(0, PROMPT, 0), 0, 1_000_000_000)._replace(first_token_ns=0, chunks=50)  # 50 events a second
    assert workers_wanted([level(Closed(512))], warm, 128, None) == 1
    assert workers_wanted([level(Closed(512))], warm, 128, 60_000) == 1
    assert workers_wanted([level(Closed(64)), level(Closed(2048))], warm, 128, 60_000) == 4
    assert workers_wanted([level(Open(1000.0))], warm, 100, 50_000) == 4
    assert workers_wanted([level(Closed(100_000))], warm, 128, 60_000) == 7


async def test_auto_without_a_calibration_is_one_process(tmp_path: Path) -> None:
    write(tmp_path, "[{concurrency: 2, requests: 10}]")
    async with scripted() as server:
        code, _, err = await run(tmp_path, server, "auto")
    assert code == 0, err
    assert not any("worker" in event for event in rows(tmp_path / "out-auto" / "telemetry.jsonl"))
