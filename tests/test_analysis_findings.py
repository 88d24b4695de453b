"""What several levels say together: a run that goes on, a search, what a rule left out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadbench.analysis.findings import NotRun
from loadbench.analysis.rundir import read
from loadbench.analysis.summarise import so_far, summarise
from loadbench.errors import UsageError
from loadbench.records import Closed, Leg, Open
from tests import rundirs
from tests.rundirs import Planned, write_run


def edit_facts(path: Path, **facts: Any) -> dict[str, Any]:
    """Change keys of run.json."""
    document: dict[str, Any] = orjson.loads((path / "run.json").read_bytes()) | facts
    (path / "run.json").write_bytes(orjson.dumps(document))
    return document


# A run that goes on


def test_the_levels_that_ended_are_told_while_the_next_is_running(tmp_path: Path) -> None:
    cut = so_far(rundirs.torn(tmp_path / "cut"), {0, 1})
    whole = summarise(read(rundirs.closed_ladder(tmp_path / "whole"))).levels
    assert [level.index for level in cut] == [0]
    assert cut[0].latency_ms == whole[0].latency_ms
    assert cut[0].throughput == whole[0].throughput


def test_before_a_level_has_ended_there_is_none(tmp_path: Path) -> None:
    path = rundirs.closed_ladder(tmp_path, status="running")
    for name in ("samples.jsonl", "telemetry.jsonl", "histograms.hlog"):
        (path / name).unlink()
    assert so_far(path, {0}) == ()


def test_the_shards_of_several_workers_count_before_they_are_merged(tmp_path: Path) -> None:
    path = rundirs.open_loop(tmp_path, status="running", workers=2)
    merged = so_far(path, {0})
    lines = (path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    for shard in (0, 1):
        folder = path / "shards" / str(shard)
        folder.mkdir(parents=True)
        (folder / "samples.jsonl").write_bytes(b"".join(lines[shard::2]))
    (path / "samples.jsonl").write_bytes(b"")
    shutil.move(path / "histograms.hlog", path / "shards" / "0" / "histograms.hlog")
    apart = so_far(path, {0})
    assert [level.requests for level in apart] == [level.requests for level in merged]
    assert [level.latency_ms for level in apart] == [level.latency_ms for level in merged]
    assert [level.road for level in apart] == [level.road for level in merged]


def test_a_level_that_ended_is_told_without_reading_what_came_before_it(tmp_path: Path) -> None:
    levels = [Planned(Closed(8), duration_s=900.0, batches=8), Planned(Closed(4), batches=4), Planned(Closed(2))]
    path = write_run(tmp_path, levels, status="running")
    whole = summarise(read(path)).levels
    lines = (path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (path / "samples.jsonl").write_bytes(b"".join([b'{"level": 0}\n', *lines]))
    with pytest.raises(UsageError):
        so_far(path, {0})
    last = so_far(path, {1, 2})
    assert [(level.index, level.requests, level.latency_ms) for level in last] == [
        (level.index, level.requests, level.latency_ms) for level in whole[1:]
    ]


# What a rule left out


def test_levels_that_a_rule_left_out_are_told_with_it_and_are_no_doubt(tmp_path: Path) -> None:
    path = rundirs.closed_ladder(tmp_path)
    planned = orjson.loads((path / "run.json").read_bytes())["levels"]
    more = [planned[0] | {"index": 4 + at, "load": Closed(users).as_json()} for at, users in enumerate((16, 32))]
    left = {
        "model": "synthetic-edge:1",
        "stage": 0,
        "after_level": 3,
        "rule": "gain",
        "because": "two levels gained nothing",
        "levels": [4, 5],
    }
    edit_facts(path, levels=planned + more, not_run=[left])
    summary = summarise(read(path))
    loads = ("16 users", "32 users")
    assert summary.not_run == (NotRun("synthetic-edge:1", 0, 3, "gain", "two levels gained nothing", loads),)
    assert not any(caution.about == "not_run" for caution in summary.cautions)
    edit_facts(path, not_run=[left | {"levels": [4]}])
    (caution,) = (caution for caution in summarise(read(path)).cautions if caution.about == "not_run")
    assert caution.reason == "1 of 6 planned levels were not run"


# A search


def test_a_search_is_concluded_from_its_probes_model_by_model(tmp_path: Path) -> None:
    scenario = {"name": "edge", "warmup": {"requests": 2}, "slo": {"ttft": {"p50": "300ms"}}}
    users = (1, 2, 4, 8)
    planned = [Planned(Closed(n), model=model) for model in ("a:1", "b:1") for n in users]
    path = write_run(tmp_path, planned, scenario=scenario)
    levels = [level | {"purpose": "probe"} for level in orjson.loads((path / "run.json").read_bytes())["levels"]]
    edit_facts(path, levels=levels, find={"find": "max-concurrency", "low": 1, "high": 64, "resolution": 0.05})
    summary = summarise(read(path))
    assert {level.purpose for level in summary.levels} == {"probe"}
    first, second = summary.searches
    assert (first.model, second.model) == ("a:1", "b:1")
    assert [probe.level for probe in second.probes] == [4, 5, 6, 7]
    assert (first.passed, first.failed, first.answer) == (4, 8, None)


def test_runs_of_before_there_were_searches_have_none(tmp_path: Path) -> None:
    path = rundirs.open_loop(tmp_path)
    summary = summarise(read(path))
    assert (summary.searches, summary.not_run) == ((), ())
    assert {level.purpose for level in summary.levels} == {"level"}


def test_goodput_stands_beside_the_throughput_of_every_level(tmp_path: Path) -> None:
    scenario = {"name": "edge", "warmup": {"requests": 2}, "slo": {"ttft": {"p50": "300ms"}}}
    path = write_run(tmp_path, [Planned(Closed(1)), Planned(Closed(8)), Planned(Open(1.0))], scenario=scenario)
    alone, crowded, _ = summarise(read(path)).levels
    assert alone.throughput["goodput_per_s"] == alone.throughput["requests_per_s"]
    assert crowded.throughput["goodput_per_s"] == 0.0
    rates = list(alone.throughput)
    assert rates[:3] == ["requests_per_s", "goodput_per_s", "goodput_share"]


def test_users_that_come_and_go_by_plan_are_not_missed(tmp_path: Path) -> None:
    legs = (Leg("hold", 1.0, 1.0, 10.0), Leg("hold", 8.0, 8.0, 5.0))
    path = write_run(tmp_path, [Planned(Closed(8), duration_s=15.0)])
    levels = orjson.loads((path / "run.json").read_bytes())["levels"]
    edit_facts(path, levels=[levels[0] | {"load": Closed(8, legs).as_json(), "interval_s": 5.0}])
    lines = (path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    few = [line for line in lines if b'"user":0,' in line or orjson.loads(line)["due_ns"] >= 12_000_000_000]
    (path / "samples.jsonl").write_bytes(b"".join(few))
    (level,) = summarise(read(path)).levels
    assert not any(caution.about == "concurrency_missed" for caution in level.cautions)
    assert [part.load for part in level.intervals] == [1, 1, 8]
    ttft = level.latency_ms["ttft"]["service"]
    assert (ttft.interval_95, ttft.not_estimable) == (None, "the load changes by plan")
