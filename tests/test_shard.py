"""Shards that run by themselves: nobody tells them of each other, and together they send what one run would send."""

from __future__ import annotations

import asyncio
import re
import shlex
import time
from collections import Counter
from collections.abc import Mapping
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadbench.analysis.provenance import differences
from loadbench.analysis.rundir import read
from loadbench.analysis.sharded import users_of
from loadbench.analysis.summarise import summarise
from loadbench.analysis.verdict import exit_code
from loadbench.cli import main
from loadbench.engine.crew import Crew
from loadbench.engine.load import Clock
from loadbench.engine.seat import Line
from loadbench.errors import UsageError
from loadbench.hdr import HlogReader, split_tag
from loadbench.order import Order
from loadbench.records import Level, Open
from loadbench.report.live import QuietView
from loadbench.runner import Run
from loadbench.scenario import plan
from loadbench.scenario.arrivals import schedule
from loadbench.scenario.load import Overrides, load_scenario
from loadbench.scenario.plan import levels, slots
from loadbench.scenario.prompts import PromptMix
from loadbench.scenario.schema import Scenario
from loadbench.shard_facts import read_parts
from loadbench.shards import put_together
from loadbench.slots import moment_of, shard_of
from loadbench.target.fake import FakeServer
from tests import rundirs
from tests.asking import scripted
from tests.command import ROOT, loadbench, rows

LEAD_S, SETTLE_S = 3.0, 1.5


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute to get ready is more than the scripted endpoint takes."""
    monkeypatch.setattr("loadbench.slots.LEAD_S", LEAD_S)
    monkeypatch.setattr("loadbench.slots.PREPARE_S", 0.3)
    monkeypatch.setattr("loadbench.scenario.plan.LEAD_S", LEAD_S)
    monkeypatch.setattr("loadbench.scenario.plan.SETTLE_S", SETTLE_S)


def write(folder: Path, stages: str, more: str = "") -> Path:
    path = folder / "s.yaml"
    text = f"request: {{max_tokens: 4}}\nwarmup: {{requests: 1}}\ndrain: 1s\n{more}prompts:\n"
    text += "  - {name: a, text: one}\n  - {name: b, weight: 2, input_tokens: {mean: 30, stdev: 9, min: 5}}\n"
    path.write_text(f"{text}stages: {stages}\n", encoding="utf-8")
    return path


async def shards(folder: Path, server: FakeServer, count: int) -> list[Path]:
    """Run them all, each to its end, and say where."""
    start_ns = time.time_ns() + int((plan.LEAD_S + 1.0) * 1e9)
    folders = [folder / f"part-{index}" for index in range(count)]
    orders = [
        Order(
            load_scenario(folder / "s.yaml", Overrides(endpoint=server.base_url), {}),
            folder,
            out,
            f"loadbench run s.yaml --shard {index}/{count}",
            {},
            shard=(index, count),
            start_at_wall_ns=start_ns,
        )
        for index, out in enumerate(folders)
    ]
    await asyncio.gather(*(Run(order, QuietView()).execute() for order in orders))
    return folders


def loads(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder / "samples.jsonl") if row["phase"] == "load"]


@pytest.mark.usefixtures("soon")
async def test_shards_put_together_are_the_one_run_request_by_request(tmp_path: Path) -> None:
    write(tmp_path, "[{rate: 80/s, duration: 2s}, {concurrency: 5, duration: 1s}]")
    async with scripted() as server:
        parts = await shards(tmp_path, server, 3)
        answered = Counter(truth.request_id for truth in server.records)
    put_together(read_parts(parts), out := tmp_path / "whole")
    found = loads(out)
    assert Counter(f"load-{row['level']}-{row['seq']}" for row in found) == Counter(
        name for name in answered.elements() if str(name).startswith("load-")
    )
    run = read(out)
    assert run.facts["status"] == "complete", run.facts["reason"]
    opened = Level.from_json(run.facts["levels"][0])
    assert isinstance(opened.load, Open)
    due_ns = list(takewhile(lambda ns: ns < 2e9, schedule(opened.load, None, None, opened.seed)))
    mix = PromptMix(Scenario.model_validate(run.facts["scenario"]), tmp_path, 4.0)
    kinds = [prompt.kind for prompt in islice(mix.draw(opened.seed, opened.load), len(due_ns))]
    sent = sorted((row["seq"], row["kind"], row["due_ns"]) for row in found if row["level"] == 0)
    start_ns = run.levels[0].start_ns
    assert sent == [(seq, kind, start_ns + ns) for seq, (kind, ns) in enumerate(zip(kinds, due_ns, strict=True))]
    assert {row["user"] for row in found if row["level"] == 1} == set(range(5))
    over_s = LEAD_S + 2 + 1  # then the first level's drain is over, of all of them
    for index, part in enumerate(parts):
        assert {row["seq"] % 3 for row in loads(part)} == {index}
        after = [
            row for row in rows(part / "samples.jsonl") if row["phase"] == "canary" and row["sent_ns"] > LEAD_S * 1e9
        ]
        assert [row["level"] for row in after] == [0, 1]
        assert after[0]["sent_ns"] >= over_s * 1e9

    first, second = summarise(run).levels
    assert (start_ns, run.levels[1].start_ns) == (LEAD_S * 1e9, (LEAD_S + 2 + 1 + SETTLE_S) * 1e9)
    assert (first.requests.attempted, first.requests.ok) == (len(due_ns), len(due_ns))
    assert first.littles_law_error is not None and abs(first.littles_law_error) < 0.1
    assert second.concurrency_reached is not None and 4 < second.concurrency_reached <= 5
    counts: Counter[str] = Counter()
    for interval in HlogReader(out / "histograms.hlog"):
        tag = split_tag(interval.tag or "")
        assert tag is not None
        counts[tag[0]] += interval.hdr.total
    assert counts["lag"] == counts["ttft_service"] == len(found)
    assert ([shard["index"] for shard in run.facts["shards"]], run.facts["workers"]) == ([0, 1, 2], 3)
    (client,) = (events.end["client"] for events in run.levels[:1] if events.end)
    assert [one["shard"] for one in client["workers"]] == [0, 1, 2]
    assert client["start_late_ns"] == max(one["start_late_ns"] for one in client["workers"])

    alone = summarise(read(parts[0]))
    assert any(caution.about == "a_part" for caution in alone.cautions)
    assert [users_of(read(part).facts, 5) for part in parts] == [2, 2, 1]
    apart = differences([run.facts], [read(parts[1]).facts])
    assert ("scenario", "load", "all of it", "the part of shard 1/3") in {
        (one.about, one.what, one.base, one.new) for one in apart
    }
    assert "load" not in {one.what for one in differences([run.facts], [run.facts])}


@pytest.mark.usefixtures("soon")
async def test_a_shard_that_is_not_ready_in_time_makes_the_run_invalid_and_says_by_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("slots", "scenario.plan"):
        monkeypatch.setattr(f"loadbench.{module}.LEAD_S", 0.5)
    write(tmp_path, "[{rate: 20/s, duration: 1s}]")
    async with scripted(first_token_ms=600) as server:  # a canary and a warm-up: 1.2 s of 0.5
        (part,) = await shards(tmp_path, server, 1)
    facts = read(part).facts
    assert facts["status"] == "failed"
    assert facts["reason"].startswith("shard 0/1 was not ready for level 0 at its time: ")
    assert facts["reason"].endswith(" s too late")
    assert loads(part) == []


async def test_the_workers_of_a_shard_take_its_part_and_no_other(tmp_path: Path) -> None:
    orders: list[Mapping[str, Any]] = []

    async def note(order: Mapping[str, Any]) -> Line:
        orders.append(order)
        raise UsageError("noted")

    async with Crew(tmp_path, Clock(), 0, 1, 3) as crew:
        with pytest.raises(UsageError, match="noted"):
            await crew.hire(2, {}, tmp_path, note)
    assert sorted((order["index"], order["count"]) for order in orders) == [(1, 6), (4, 6)]
    assert {number for first in (1, 4) for number in range(first, 60, 6)} == set(range(1, 60, 3))


def test_slots_follow_from_the_scenario_alone() -> None:
    stages = [
        {"concurrency": [1, 2], "duration": "10s", "rest": "5s"},
        {"rate": "2/s", "duration": "20s", "requests": 3},
    ]
    scenario = Scenario.model_validate({"endpoint": "http://h:1", "stages": stages, "drain": "4s"})
    found = slots(scenario, levels(scenario, ["m", "n"]))
    # 30 s of lead for a model, 4 s of drain and 10 s to settle after a level.
    assert [slot.start_s for slot in found] == [30, 59, 83, 147, 176, 200]
    assert [slot.end_s for slot in found] == [44, 73, 107, 161, 190, 224]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"endpoint": "embedded"}, "endpoint: expected one that all machines reach"),
        ({"repeat": 2}, "repeat: expected 1"),
        ({"quality": {"prompts": "q.json"}}, "quality: expected none"),
        ({"stages": [{"memory": {"until": "failure"}}]}, "stages[0]"),
        ({"stages": [{"concurrency": 1}, {"concurrency": "1..8"}]}, "stages[1].stop: expected false"),
        ({"stages": [{"rate": "2/s", "max_in_flight": 4}]}, "stages[0].max_in_flight: expected none"),
        ({"stages": [{"rate": "2/s", "min_requests": 4}]}, "stages[0].min_requests: expected 0"),
        ({"stages": [{"concurrency": 2, "requests": 40}]}, "stages[0]: expected a duration"),
    ],
)
def test_what_shards_cannot_know_beforehand_is_refused_with_its_place(changes: dict[str, Any], where: str) -> None:
    scenario = Scenario.model_validate({"endpoint": "http://h:1"} | changes)
    with pytest.raises(UsageError) as refused:
        slots(scenario, ())
    assert str(refused.value).startswith(where)
    assert "--shard" in str(refused.value)


def test_a_moment_is_a_time_with_its_zone_or_seconds_and_none_that_each_shard_would_reckon_for_itself() -> None:
    expected_ns = 1_795_357_200 * 10**9
    assert moment_of("2026-11-22T14:20:00Z", "0/2") == expected_ns
    assert moment_of("2026-11-22T15:20:00+01:00", "0/2") == expected_ns
    assert moment_of("1795357200", "0/2") == expected_ns
    assert moment_of(None, None) is None
    for wrong in ("2026-11-22T14:20:00", "soon", "-5", "+1h", "+90", "+90s"):
        with pytest.raises(UsageError, match="--start-at: expected a time such as"):
            moment_of(wrong, "0/2")
    for lone in ((None, "0/2"), ("1795357200", None)):
        with pytest.raises(UsageError, match="together, got one of them"):
            moment_of(*lone)


def test_shards_are_counted_from_0() -> None:
    assert shard_of("3/8") == (3, 8)
    assert shard_of(None) == (0, 1)
    for wrong in ("8/8", "1", "1/", "-1/8", "a/b", "0/0"):
        with pytest.raises(UsageError, match="--shard: expected a number and how many there are, from 0/8 to 7/8"):
            shard_of(wrong)


def test_a_start_that_is_too_near_or_over_is_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path, "[{rate: 20/s, duration: 1s}]")
    words = ("run", "s.yaml", "--endpoint", "http://127.0.0.1:9", "--shard", "0/2", "--start-at")
    for moment, told in ((f"{time.time() + 5:.0f}", "from now"), ("2026-01-01T00:00:00Z", "s ago")):
        done = loadbench(*words, moment, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(
            "loadbench: --start-at: expected a time from 30 s, in which to get ready, to a day"
        )
        assert done.stderr.endswith(f"{told}\n")
    assert not (tmp_path / "results").exists()


def test_a_level_of_which_a_shard_has_no_part_is_no_failure_of_its(tmp_path: Path) -> None:
    whole = summarise(read(rundirs.empty_level(tmp_path / "whole")))
    assert whole.levels[1].requests.attempted == 0
    assert exit_code(whole) == 94
    facts = {"shard": {"index": 1, "count": 3, "machine": "m"}}
    assert exit_code(summarise(read(rundirs.empty_level(tmp_path / "part", **facts)))) == 0
    assert exit_code(summarise(read(rundirs.all_failed(tmp_path / "failed", **facts)))) == 94


def test_the_job_of_the_page_runs_a_shard_of_as_many_as_it_has_pods() -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    (job,) = (found for found in map(yaml.safe_load, blocks) if "kind" in found)
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    (script,) = container["args"]
    assert (job["kind"], spec["completionMode"], spec["completions"]) == ("Job", "Indexed", spec["parallelism"])
    words = shlex.split(script.replace("$JOB_COMPLETION_INDEX", "3").replace("START_AT", "2026-11-22T14:20:00Z"))
    assert words[:2] == ["loadbench", "run"]
    with main.commands["run"].make_context("run", words[2:]) as run:
        assert shard_of(run.params["shard"]) == (3, spec["completions"])
        assert moment_of(run.params["start_at"], run.params["shard"]) == 1_795_357_200 * 10**9
        assert str(run.params["out"]) == "/results/part-3"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
