"""Ladders that stop and searches that end: what a run measures when one level decides about the next."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from loadbench.course import sought
from loadbench.errors import UsageError
from loadbench.records import Closed, Open
from loadbench.scenario.load import load_scenario
from loadbench.target.fake import FakeServer
from tests.asking import scripted
from tests.command import ended, events, eventually, facts, loadbench, started, summary

# 80 ms an answer: of five users each waits 20 ms.
FOUR_AT_ONCE: dict[str, Any] = {"slots": 4, "first_token_ms": 10, "gap_ms": 10}
pytestmark = pytest.mark.alone

WITHIN = "slo: {ttft: {p90: 22ms}}"  # or one in five for 80 ms


def write(folder: Path, *lines: str) -> Path:
    path = folder / "s.yaml"
    text = "name: s\nrequest: {max_tokens: 8}\nprompts: [{name: hello, text: Say hello}]\ndrain: 3s\n"
    path.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    return path


async def run(folder: Path, server: FakeServer, *words: str) -> tuple[int, str, str]:
    return await ended(
        await started("run", "s.yaml", "--endpoint", server.base_url, "--out", "out", *words, cwd=folder)
    )


def level_ends(folder: Path) -> list[int]:
    return [row["level"] for row in events(folder, "level_end")]


# Ladders


async def test_a_ladder_ends_when_its_steps_gain_nothing_and_the_next_stage_is_run(tmp_path: Path) -> None:
    write(
        tmp_path,
        "stages:",
        "  - {concurrency: {from: 2, to: 64, factor: 2}, duration: 1s}",
        "  - {concurrency: 3, requests: 10}",
    )
    async with scripted(slots=1) as server:
        code, _, err = await run(tmp_path, server)
    assert code == 0, err
    document = facts(tmp_path)
    assert document["status"] == "complete"
    (left,) = document["not_run"]
    assert (left["model"], left["stage"], left["rule"]) == ("fake-model:1", 0, "gain")
    assert left["levels"] == list(range(left["after_level"] + 1, 6))
    assert level_ends(tmp_path) == [*range(left["after_level"] + 1), 6]
    (line,) = [line for line in err.splitlines() if line.startswith("stopped the ladder after ")]
    assert line.endswith("64 users were not run")
    assert "not_run" not in {caution["about"] for caution in summary(tmp_path / "out")["cautions"]}


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_the_line_of_a_level_that_ended_has_the_rates_of_the_report(tmp_path: Path, workers: str) -> None:
    write(tmp_path, "stages: [{concurrency: 20, duration: 2s}]", "slo: {error_rate: 100%}")
    async with scripted(**FOUR_AT_ONCE, queue_limit=4) as server:  # of twenty at once, 12 are told to come again
        _, _, err = await run(tmp_path, server, "--workers", workers)
    (line,) = [line for line in err.splitlines() if line.startswith("level 0 ended: ")]
    shown = {unit: float(value.replace(",", "")) for value, unit in re.findall(r"([\d.,]+) (req/s|tok/s|failed)", line)}
    (level,) = summary(tmp_path / "out")["levels"]
    assert shown["failed"] == level["requests"]["attempted"] - level["requests"]["ok"] > 0
    assert shown["req/s"] == pytest.approx(level["throughput"]["requests_per_s"], rel=0.05)
    assert shown["tok/s"] == pytest.approx(level["throughput"]["output_tokens_per_s"], rel=0.05)


async def test_a_list_is_run_to_its_end_however_little_it_gains(tmp_path: Path) -> None:
    write(tmp_path, "stages: [{concurrency: [2, 4, 8, 16], requests: 30}]")
    async with scripted(slots=1) as server:
        code, _, err = await run(tmp_path, server)
    assert code == 0, err
    assert (level_ends(tmp_path), facts(tmp_path)["not_run"]) == ([0, 1, 2, 3], [])


async def test_a_stage_whose_time_is_up_leaves_out_the_rest_for_each_model(tmp_path: Path) -> None:
    write(
        tmp_path,
        "stages: [{concurrency: [1, 2, 3], requests: 5, stop: {time: 200ms}}]",
        "models: [one:1, two:1]",
    )
    async with scripted(models=("one:1", "two:1")) as server:
        code, _, err = await run(tmp_path, server)
    assert code == 0, err
    assert level_ends(tmp_path) == [0, 3]
    assert [(left["model"], left["rule"], left["levels"]) for left in facts(tmp_path)["not_run"]] == [
        ("one:1", "time", [1, 2]),
        ("two:1", "time", [4, 5]),
    ]
    assert err.count("2 and 3 users were not run") == 2


async def test_the_time_of_a_stage_ends_the_level_that_is_running_and_those_after_it(tmp_path: Path) -> None:
    write(tmp_path, "stages: [{concurrency: [1, 2, 3], requests: 5000, stop: {time: 1500ms}}]")
    async with scripted() as server:
        code, _, err = await run(tmp_path, server)
    assert code == 0, err
    (level,) = summary(tmp_path / "out")["levels"]
    assert (level["ended_by"], level["complete"]) == ("time", True)
    assert level["window_s"] + (level["warmup_trimmed_s"] or 0.0) == pytest.approx(1.5, abs=0.2)
    (left,) = facts(tmp_path)["not_run"]
    assert (left["rule"], left["levels"]) == ("time", [1, 2])


async def test_no_level_is_begun_in_the_last_second_of_a_stage(tmp_path: Path) -> None:
    write(tmp_path, "stages: [{concurrency: [1, 2], duration: 300ms, stop: {time: 1s}}]")
    async with scripted() as server:
        code, _, err = await run(tmp_path, server)
    assert code == 0, err
    assert [(left["rule"], left["levels"]) for left in facts(tmp_path)["not_run"]] == [("time", [1])]


async def test_a_ladder_of_several_processes_is_judged_before_their_files_are_together(tmp_path: Path) -> None:
    write(tmp_path, "stages: [{concurrency: {from: 2, to: 8, factor: 2}, requests: 80, stop: {slo: true}}]", WITHIN)
    async with scripted(first_token_ms=30) as server:
        code, _, err = await run(tmp_path, server, "--workers", "2")
    assert code == 99, err
    (left,) = facts(tmp_path)["not_run"]
    assert (left["after_level"], left["rule"], left["levels"]) == (0, "slo", [1, 2])


async def test_ctrl_c_ends_a_rest_at_once(tmp_path: Path) -> None:
    write(tmp_path, "stages: [{concurrency: [1, 2], requests: 5, rest: 10m}]")
    async with scripted() as server:
        words = ("run", "s.yaml", "--endpoint", server.base_url, "--out", "out")
        process = await started(*words, cwd=tmp_path)
        await eventually(lambda: level_ends(tmp_path) == [0])
        process.send_signal(signal.SIGINT)
        code, _, err = await ended(process)
    assert code == 130, err
    assert (facts(tmp_path)["status"], level_ends(tmp_path)) == ("interrupted", [0])


# Searches


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_search_finds_how_many_users_the_slo_bears_and_confirms_it(tmp_path: Path, workers: str) -> None:
    write(tmp_path, "stages: [{concurrency: [3, 6], duration: 500ms}]", WITHIN)
    async with scripted(**FOUR_AT_ONCE) as server:
        code, _, err = await run(tmp_path, server, "--find", "max-concurrency", "--workers", workers)
    assert code == 0, err
    document = facts(tmp_path)
    assert document["find"] == {"find": "max-concurrency", "low": 3.0, "high": 6.0, "resolution": 0.05}
    levels = document["levels"]
    assert levels[-1]["purpose"] == "confirmation"
    assert {level["purpose"] for level in levels[:-1]} == {"probe"}
    assert len({level["seed"] for level in levels}) == len(levels)
    assert levels[-1]["min_requests"] == 2 * levels[0]["min_requests"]
    (search,) = summary(tmp_path / "out")["searches"]
    assert (search["result"], search["answer"]) == ("confirmed", 4.0)
    assert [line for line in err.splitlines() if line.startswith("the search is over: 4 users, ")]


async def test_a_search_for_a_rate_asks_each_model_on_its_own(tmp_path: Path) -> None:
    write(tmp_path, "models: [one:1, two:1]", "slo: {error_rate: 5%}", "stages: [{rate: [100/s, 200/s], duration: 1s}]")
    async with scripted(models=("one:1", "two:1")) as server:
        code, _, err = await run(tmp_path, server, "--find", "max-rate")
    assert code == 0, err
    levels = facts(tmp_path)["levels"]
    asked = {
        model: [(level["load"]["rate_per_s"], level["seed"]) for level in levels if level["model"] == model]
        for model in ("one:1", "two:1")
    }
    assert asked["one:1"] == asked["two:1"]
    assert [search["model"] for search in summary(tmp_path / "out")["searches"]] == ["one:1", "two:1"]


async def test_ctrl_c_in_a_search_keeps_its_probes(tmp_path: Path) -> None:
    write(tmp_path, "stages: [{concurrency: [2, 64], duration: 500ms}]", WITHIN)
    async with scripted(**FOUR_AT_ONCE) as server:
        words = ("run", "s.yaml", "--endpoint", server.base_url, "--out", "out", "--find", "max-concurrency")
        process = await started(*words, cwd=tmp_path)
        await eventually(lambda: len(level_ends(tmp_path)) >= 2)
        process.send_signal(signal.SIGINT)
        code, _, err = await ended(process)
    assert code == 130, err
    assert "Traceback" not in err
    assert facts(tmp_path)["status"] == "interrupted"
    (search,) = summary(tmp_path / "out")["searches"]
    assert (search["result"], search["answer"]) == ("undecided", None)
    assert len(search["probes"]) >= 2


async def test_a_search_that_is_killed_leaves_a_directory_that_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "stages: [{concurrency: [2, 64], duration: 500ms}]", WITHIN)
    async with scripted(**FOUR_AT_ONCE) as server:
        words = ("run", "s.yaml", "--endpoint", server.base_url, "--out", "out", "--find", "max-concurrency")
        process = await started(*words, "--workers", "2", cwd=tmp_path)
        await eventually(lambda: len(level_ends(tmp_path)) >= 2)
        family = psutil.Process(process.pid).children()
        process.kill()
        await process.wait()
        await eventually(lambda: not any(child.is_running() for child in family))
    loadbench("report", "out", cwd=tmp_path)
    document = summary(tmp_path / "out")
    assert document["status"] == "incomplete"
    assert [probe["load"] for probe in document["searches"][0]["probes"]][:2] == [2.0, 4.0]


async def test_a_target_that_dies_under_a_probe_ends_the_search(tmp_path: Path) -> None:
    write(tmp_path, "stages: [{concurrency: [2, 64], duration: 500ms}]", WITHIN)
    async with scripted(**FOUR_AT_ONCE, refuse_after=100, connection_close=True) as server:
        code, _, err = await run(tmp_path, server, "--find", "max-concurrency")
    assert code == 93, err
    document = facts(tmp_path)
    assert document["status"] == "target_died"
    assert (
        document["reason"].startswith("unreachable after level ") and ", which ends the search: " in document["reason"]
    )
    (search,) = summary(tmp_path / "out")["searches"]
    assert search["probes"][-1]["result"] == "fail"
    assert len(search["probes"]) == len(document["levels"])


def test_a_search_without_an_slo_is_refused_in_one_line_that_says_what_to_add(tmp_path: Path) -> None:
    write(tmp_path, "stages: [{concurrency: 2, requests: 5}]")
    done = loadbench("run", "s.yaml", "--find", "max-rate", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "loadbench: --find max-rate: expected an slo in s.yaml, such as slo: {ttft: {p95: 2s}}, got none\n"
    )
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("find", "flags", "refused"),
    [
        ("max-rate", ("--concurrency", "1..4"), "--concurrency: expected --rate 1/s..32/s, or neither, beside --find"),
        ("max-concurrency", ("--rate", "5/s"), "--rate: expected --concurrency 1..64, or neither, beside --find"),
        ("max-rate", ("--rate", "5/s"), "--rate: expected two loads to search between, 1/s..32/s, beside --find"),
        ("max-rate", ("--requests", "5"), "--requests: expected none beside --find"),
    ],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_flag_that_a_search_would_ignore_is_refused(
    tmp_path: Path, command: str, find: str, flags: tuple[str, ...], refused: str
) -> None:
    write(tmp_path, WITHIN)
    done = loadbench(command, "s.yaml", "--find", find, *flags, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"loadbench: {refused}")


def test_check_tells_what_a_search_would_do(tmp_path: Path) -> None:
    write(tmp_path, "stages: [{over_time: [{hold: 2/s, for: 5s}]}, {concurrency: 4}]", WITHIN)
    words = ("check", "s.yaml", "--find", "max-concurrency", "--concurrency", "1..64", "--duration", "5s")
    done = loadbench(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    told = done.stdout.splitlines()
    within = "the largest load within the SLO from 1 user to 64 users, as near as 5 % or one user"
    assert f"Search    max-concurrency: {within}" in told
    assert "SLO       ttft.p90 ≤ 22ms" in told
    probes = "5s and at least 71 requests, but no longer than 1m; the answer is confirmed with twice that"
    assert f"Probes    {probes}" in told
    # 16 and twice 3 minutes, and 19 drains of 3 s
    assert told[-1] == "At most 16 probes and 3 confirmations: no longer than 22:57, with their drains."


def test_check_refuses_a_search_without_an_slo(tmp_path: Path) -> None:
    write(tmp_path, "stages: [{concurrency: 2}]")
    done = loadbench("check", "s.yaml", "--find", "max-rate", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected an slo in s.yaml" in done.stderr


def test_a_search_takes_its_bounds_and_its_manner_from_the_first_stage_of_its_loop(tmp_path: Path) -> None:
    lines = (
        "stages:",
        "  - {over_time: [{hold: 2/s, for: 5s}]}",
        "  - {rate: {from: 1/s, to: 20/s, factor: 3}, duration: 30s, arrivals: constant, max_in_flight: 9, rest: 2s}",
        "  - {concurrency: 4, requests: 100}",
    )
    loaded = load_scenario(write(tmp_path, *lines, "slo: {ttft: {p95: 1s}}"))
    rate = sought("max-rate", loaded)
    assert (rate.low, rate.high, rate.like.stage, rate.rest_s) == (1.0, 20.0, 1, 2.0)
    assert (rate.like.duration_s, rate.like.at_most_s, rate.like.max_in_flight) == (30.0, 90.0, 9)
    assert rate.at(7.5) == Open(7.5, "constant")
    users = sought("max-concurrency", loaded)
    assert (users.low, users.high, users.like.stage) == (1.0, 256.0, 2)
    assert (users.like.duration_s, users.like.at_most_s, users.like.requests) == (15.0, 60.0, None)
    assert users.at(7.0) == Closed(7)


@pytest.mark.parametrize(
    ("slo", "requests"),
    [
        ("{ttft: {p95: 1s}}", 143),
        ("{ttft: {p50: 1s}}", 55),
        ("{e2e: {p99: 9s}, ttft: {p50: 1s}}", 729),
        ("{gap: {p99: 1s}}", 105),  # of the 7 gaps of each answer, 662
        ("{error_rate: 5%}", 130),
        ("{error_rate: 1%}", 300),  # none of 299 fails at 1 % by chance in 5 of 100
        ("{ttft: {p95: 1s}, goodput: 99%}", 300),
        ("{error_rate: 0.01%}", 1000),
    ],
)
def test_a_probe_has_enough_requests_for_the_strictest_percentile(tmp_path: Path, slo: str, requests: int) -> None:
    loaded = load_scenario(write(tmp_path, f"slo: {slo}"))
    assert sought("max-concurrency", loaded).like.min_requests == requests
    assert sought("max-rate", loaded).like.min_requests == 3 * requests


def test_a_search_without_a_stage_of_its_loop_has_bounds_of_its_own(tmp_path: Path) -> None:
    loaded = load_scenario(write(tmp_path, "slo: {error_rate: 1%}", "stages: [{concurrency: [1, 2]}]"))
    found = sought("max-rate", loaded)
    assert (found.low, found.high, found.at(3.0)) == (0.5, 256.0, Open(3.0))
    with pytest.raises(UsageError, match="expected an slo"):
        sought("max-rate", load_scenario(write(tmp_path, "seed: 1")))
