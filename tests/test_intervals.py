"""A level part by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from loadbench.analysis.intervals import MOST
from loadbench.analysis.metrics import RATES
from loadbench.analysis.rundir import read
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Level
from loadbench.records import Closed, Leg, Open
from tests.played import Machine, write_levels
from tests.rundirs import Planned, write_run

SPIKE = (Leg("hold", 2.0, 2.0, 30.0), Leg("ramp", 2.0, 8.0, 20.0), Leg("hold", 8.0, 8.0, 10.0))


def measured(path: Path, planned: Planned, interval_s: float | None, **facts: Any) -> Level:
    """The one level of a run that asks for its intervals."""
    return asking(write_run(path, [planned], **facts), interval_s)


def asking(path: Path, interval_s: float | None) -> Level:
    document = orjson.loads((path / "run.json").read_bytes())
    document["levels"][0]["interval_s"] = interval_s
    (path / "run.json").write_bytes(orjson.dumps(document))
    return summarise(read(path)).levels[0]


def test_a_level_that_asks_for_no_intervals_has_none(tmp_path: Path) -> None:
    assert measured(tmp_path, Planned(Closed(1)), None).intervals == ()


def test_intervals_cover_the_level_and_every_request_is_in_one(tmp_path: Path) -> None:
    level = measured(tmp_path, Planned(Open(5.0), duration_s=64.0), 10.0)
    assert [part.start_s for part in level.intervals] == [0, 10, 20, 30, 40, 50, 60]
    assert [part.length_s for part in level.intervals] == [10] * 6 + [4]
    assert sum(part.requests.attempted for part in level.intervals) == level.requests.attempted
    assert {tuple(part.throughput) for part in level.intervals} == {tuple(RATES)}


def test_a_timer_that_fires_late_makes_no_interval(tmp_path: Path) -> None:
    level = measured(tmp_path, Planned(Closed(1), duration_s=20.01), 10.0)
    assert [part.length_s for part in level.intervals] == [10, pytest.approx(10.01)]


def test_a_long_level_has_at_most_200(tmp_path: Path) -> None:
    level = measured(tmp_path, Planned(Open(1.0), duration_s=601.0), 1.0)
    assert len(level.intervals) <= MOST
    assert level.intervals[0].length_s == 4.0
    assert sum(part.length_s for part in level.intervals) == pytest.approx(601.0)


def test_throughput_and_in_flight_are_of_what_went_on_in_the_interval(tmp_path: Path) -> None:
    level = measured(tmp_path, Planned(Closed(4), duration_s=60.0), 10.0)
    for part in level.intervals:
        assert part.concurrency_reached == pytest.approx(4.0, rel=0.01)
        for name in ("requests_per_s", "output_tokens_per_s"):
            assert part.throughput[name] == pytest.approx(level.throughput[name], rel=0.15)
        assert part.load == 4
    ended = [part.throughput["requests_per_s"] for part in level.intervals]
    assert 10 * sum(per_s for per_s in ended if per_s) == pytest.approx(
        60 * (level.throughput["requests_per_s"] or 0.0)
    )


def test_latencies_are_those_of_the_headline_series_of_what_was_due_in_it(tmp_path: Path) -> None:
    level = measured(tmp_path, Planned(Closed(1), duration_s=60.0, cold_s=10.0), 10.0)
    first, *rest = level.intervals
    assert first.latency_ms["ttft"].p50 == pytest.approx(180, rel=0.15)
    for part in rest:
        assert part.latency_ms["ttft"].p50 == pytest.approx(60, rel=0.15)
        assert set(part.latency_ms) == {"ttft", "e2e", "tpot"}
        assert part.latency_ms["ttft"].n == part.requests.ok
    queue = write_levels(tmp_path / "open", Machine(1, service_s=0.45, chance=0.3), [Open(2.0)], duration_s=20.0)
    opened = asking(queue, 20.0)
    assert opened.intervals[0].latency_ms["ttft"].p50 == opened.latency_ms["ttft"]["response"].p50


def test_goodput_is_told_by_interval(tmp_path: Path) -> None:
    scenario = {"name": "edge", "warmup": {"requests": 2}, "slo": {"ttft": {"p95": "120ms"}}}
    planned = Planned(Closed(1), duration_s=60.0, cold_s=10.0)
    first, *rest = measured(tmp_path, planned, 10.0, scenario=scenario).intervals
    assert first.throughput["goodput_share"] == 0.0
    assert {part.throughput["goodput_share"] for part in rest} == {1.0}
    assert rest[0].throughput["goodput_per_s"] == pytest.approx(rest[0].throughput["requests_per_s"], rel=0.05)


def test_the_load_of_an_interval_is_what_was_asked_for_in_it(tmp_path: Path) -> None:
    level = asking(write_levels(tmp_path, Machine(9), [Open(4.0, legs=SPIKE)], duration_s=60.0), 10.0)
    assert [part.load for part in level.intervals] == pytest.approx([2, 2, 2, 3.5, 6.5, 8])


def test_an_interval_in_which_nothing_was_due_has_no_latency(tmp_path: Path) -> None:
    legs = (Leg("hold", 5.0, 5.0, 10.0), Leg("hold", 0.0, 0.0, 20.0))
    level = asking(write_levels(tmp_path, Machine(9), [Open(5.0, legs=legs)], duration_s=30.0), 10.0)
    quiet = level.intervals[-1]
    assert (quiet.load, quiet.requests.attempted, quiet.latency_ms["ttft"].p50) == (0, 0, None)
    assert quiet.throughput["requests_per_s"] == 0.0
    assert quiet.throughput["goodput_share"] is None
