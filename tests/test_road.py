"""Whether an open-loop level stayed on the road, on queues whose capacity is known."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadbench.analysis.road import road_of, roads_of
from loadbench.analysis.rundir import read
from loadbench.analysis.span import span_of
from loadbench.analysis.summarise import so_far, summarise
from loadbench.analysis.summary import Level, Road
from loadbench.records import Closed, Leg, Load, Open, Trace
from tests import virtual
from tests.played import Machine, play, shared, write, write_levels
from tests.rundirs import Planned, write_run

LEVELS = 40


def road(level: Level) -> Road:
    assert level.road is not None
    return level.road


def results(path: Path, load: Open, requests: int, slots: int, cv: float) -> Counter[str]:
    """How often each result is given on levels of so many requests; a slot serves one request a second."""
    duration_s = requests / load.rate_per_s
    machine = Machine(slots, service_s=1.0, chance=cv)
    run = read(write_levels(path, machine, [load] * LEVELS, duration_s=duration_s))
    roads = [road_of(span_of(run, events)) for events in run.levels]
    return Counter(road.result for road in roads if road)


@pytest.mark.parametrize(
    ("share", "slots", "cv", "requests"),
    [(0.5, 1, 1.0, 50), (0.95, 1, 0.0, 200), (0.95, 1, 1.0, 50), (0.95, 1, 1.0, 200), (0.95, 4, 0.3, 100)],
)
def test_below_its_capacity_next_to_no_level_is_said_to_be_over_it(
    tmp_path: Path, share: float, slots: int, cv: float, requests: int
) -> None:
    assert results(tmp_path, Open(share * slots), requests, slots, cv)["over_capacity"] <= 1


@pytest.mark.parametrize("load", [Open(3.8), Open(3.8, "constant"), Open(3.8, "gamma", 0.5)], ids=lambda x: x.arrivals)
def test_bursts_of_arrivals_are_no_lack_of_capacity(tmp_path: Path, load: Open) -> None:
    assert results(tmp_path, load, 100, 4, 0.3)["over_capacity"] <= 1


@pytest.mark.parametrize(
    ("load", "requests", "cv", "least"),
    [
        (Open(8.0), 50, 0.3, 0.85),
        (Open(8.0), 100, 1.0, 0.85),
        (Open(5.2, "constant"), 100, 0.3, 0.95),
        (Open(5.2), 200, 0.3, 0.8),
        (Open(5.2), 500, 1.0, 0.8),
    ],
)
def test_above_its_capacity_a_level_is_found_out(
    tmp_path: Path, load: Open, requests: int, cv: float, least: float
) -> None:
    assert results(tmp_path, load, requests, 4, cv)["over_capacity"] >= least * LEVELS


def played(path: Path, machine: Machine, *loads: Load, duration_s: float, seed: int = 1) -> tuple[Level, ...]:
    return summarise(read(write_levels(path, machine, loads, duration_s=duration_s, seed=seed))).levels


SLOW = Machine(speed=shared, service_s=0.72, chance=0.1)  # 1.39/s


@pytest.mark.parametrize(("rate", "duration_s"), [(4.0, 20.0), (8.0, 12.0)])
def test_a_shared_processor_far_beyond_its_capacity_is_found_out_by_what_one_user_takes(
    tmp_path: Path, rate: float, duration_s: float
) -> None:
    """Every answer there is was slowed down, and the first of them end when the level does."""
    for seed in range(5):
        _, level = played(tmp_path / str(seed), SLOW, Closed(1), Open(rate), duration_s=duration_s, seed=seed)
        assert road(level).result == "over_capacity"
        assert (road(level).left_s or 0.0) < 2.5
        assert road(level).given_per_s == pytest.approx(1 / 0.72, rel=0.15)


def test_what_an_answer_takes_is_known_from_the_warm_up_too(tmp_path: Path) -> None:
    path = write_levels(tmp_path, SLOW, [Open(8.0)], duration_s=12.0)
    lines = (path / "samples.jsonl").read_bytes()
    warm = orjson.loads(lines.splitlines()[0]) | {"phase": "warmup", "sent_ns": 0, "done_ns": 720_000_000}
    warm |= {"first_token_ns": 180_000_000, "last_token_ns": 720_000_000}
    (path / "samples.jsonl").write_bytes(orjson.dumps(warm) + b"\n" + lines)
    (level,) = summarise(read(path)).levels
    assert road(level).result == "over_capacity"


def test_answers_that_take_as_long_as_the_level_are_no_lack_of_capacity(tmp_path: Path) -> None:
    endless = Machine(service_s=10.0, chance=0.1)
    for seed in range(5):
        _, level = played(tmp_path / str(seed), endless, Closed(1), Open(8.0), duration_s=10.0, seed=seed)
        assert road(level).result == "undecided"


@pytest.mark.parametrize(
    "machine", [Machine(slots=4, service_s=1.0, chance=0.3), Machine(speed=shared, service_s=0.25, chance=0.3)]
)
def test_steady_is_said_with_time_to_spare_and_hardly_without(tmp_path: Path, machine: Machine) -> None:
    def said(rate: float) -> int:
        path = tmp_path / f"{rate:g}"
        run = read(write_levels(path, machine, [Closed(1), *[Open(rate)] * 20], duration_s=200 / rate))
        return Counter(road.result for road in roads_of(run, [span_of(run, events) for events in run.levels]) if road)[
            "steady"
        ]

    assert said(2.0) >= 17
    assert said(4.0) <= 5
    assert said(4.4) <= 2
    assert said(5.2) == 0


def test_a_rate_whose_latencies_rise_is_not_said_to_be_kept_up_with(tmp_path: Path) -> None:
    """48/s for 8 s on 47/s, as it came out on the scripted endpoint: what is in flight could be chance."""
    machine = Machine(slots=4, service_s=4 / 47, chance=0.01)
    for seed in range(20):
        (level,) = played(tmp_path / str(seed), machine, Open(48.0), duration_s=8.0, seed=seed)
        if {caution.about for caution in level.cautions} & {"drift"}:
            assert road(level).result != "steady"
            return
    raise AssertionError("none of them drifts")


def test_no_rate_is_kept_up_with_where_a_lower_one_was_over_capacity(tmp_path: Path) -> None:
    over = virtual.level(Open(4.0), 60.0), Machine(1, chance=0.3)
    kept = virtual.level(Open(6.0), 60.0), Machine(1, service_s=0.05, chance=0.3)
    path = write(tmp_path, [(level, play(level, machine)) for level, machine in (over, kept)])
    beyond, level = summarise(read(path)).levels
    assert road(beyond).result == "over_capacity"
    assert (road(level).result, road(level).because) == ("undecided", "4/s was over capacity")


def test_a_probe_is_judged_as_it_was_while_the_run_went_on(tmp_path: Path) -> None:
    """A search read it alone, and what it decided must not be contradicted by what other levels tell."""
    path = write_levels(tmp_path, SLOW, [Closed(1), Open(8.0)], duration_s=12.0)
    facts = orjson.loads((path / "run.json").read_bytes())
    facts["levels"][1]["purpose"] = "probe"
    (path / "run.json").write_bytes(orjson.dumps(facts))
    assert summarise(read(path)).levels[1].road == so_far(path, {1})[0].road


def test_a_ramp_says_where_it_left_the_road(tmp_path: Path) -> None:
    ramp = Open(5.0, legs=(Leg("ramp", 0.0, 10.0, 60.0),))
    for slots in (1, 4):
        machine = Machine(slots, service_s=slots / 5.0, chance=0.3)
        for level in played(tmp_path / str(slots), machine, *[ramp] * 10, duration_s=60.0):
            assert road(level).result == "over_capacity"
            assert road(level).left_at == pytest.approx(5.0, rel=0.15)
            assert road(level).left_s == pytest.approx(30.0, rel=0.15)
            assert (road(level).growth_per_s or 0.0) > 1


def test_a_ramp_that_ends_below_the_capacity_stays_on_the_road(tmp_path: Path) -> None:
    ramp = Open(5.0, legs=(Leg("ramp", 0.0, 10.0, 60.0),))
    (level,) = played(tmp_path, Machine(4, service_s=4 / 12, chance=0.3), ramp, duration_s=60.0, seed=2)
    assert road(level).result == "steady"
    assert road(level).most_in_flight is None


def test_a_spike_that_is_worked_off_is_none_and_one_that_is_not_is_told_with_its_moment(tmp_path: Path) -> None:
    legs = (Leg("hold", 2.0, 2.0, 60.0), Leg("spike", 20.0, 20.0, 10.0), Leg("hold", 2.0, 2.0, 60.0))
    spike = Open(440 / 130, legs=legs)
    quick, slow = (
        played(tmp_path / f"{rate:g}", Machine(1, service_s=1 / rate, chance=0.3), spike, duration_s=130.0)[0]
        for rate in (8.0, 3.0)
    )
    assert road(quick).result == "steady"
    assert (road(quick).most_in_flight or 0) > 90
    assert road(quick).most_at_s == pytest.approx(70.0, abs=2.0)
    assert road(quick).worked_off_s == pytest.approx(70.0 + 120 / 6, rel=0.1)
    assert road(slow).result == "over_capacity"
    assert (road(slow).worked_off_s or 0.0) > 130.0
    assert road(slow).left_at == 20.0
    assert road(slow).left_s == pytest.approx(60.0, abs=1.0)


def test_a_trace_is_held_against_its_mean_rate(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("\n".join(["timestamp", *(f"{at / 4}" for at in range(240))]))
    trace = Trace(str(file), hashlib.sha256(file.read_bytes()).hexdigest(), None, 1.0, requests=240, length_s=59.75)
    load = Open(4.0, "trace", trace=trace)
    kept, left = (
        played(tmp_path / f"{service_s:g}", Machine(1, service_s, chance=0.3), load, duration_s=60.0)[0]
        for service_s in (0.2, 0.4)
    )
    assert road(kept).result == "steady"
    assert road(left).result == "over_capacity"
    assert road(left).left_at == pytest.approx(4.0)


def test_a_capacity_that_is_lost_in_mid_level_is_told_with_its_moment(tmp_path: Path) -> None:
    """At 40 s the server begins to take 1 s for each of 2 requests a second, which took 0.1 s before."""
    path = write_levels(tmp_path, Machine(1, service_s=0.1), [Open(2.0, "constant")], duration_s=80.0)
    lines = [orjson.loads(line) for line in (path / "samples.jsonl").read_bytes().splitlines()]
    free_ns = 0
    for line in lines:
        if line["due_ns"] >= lines[0]["due_ns"] + 40e9:
            done_ns = max(line["sent_ns"], free_ns) + 1_000_000_000
            line.update(first_token_ns=done_ns - 750_000_000, last_token_ns=done_ns, done_ns=done_ns)
            free_ns = done_ns
    (path / "samples.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    (level,) = summarise(read(path)).levels
    assert road(level).result == "over_capacity"
    assert road(level).left_s == pytest.approx(40.0, abs=2.0)
    assert road(level).left_at == 2.0
    assert road(level).growth_per_s == pytest.approx(1.0, rel=0.15)


def test_where_nothing_can_be_told_the_reason_is(tmp_path: Path) -> None:
    planned = [Planned(Closed(2)), Planned(Open(2.0), duration_s=5.0), Planned(Open(5.0), duration_s=10.0, fails=1.0)]
    closed, short, failed = summarise(read(write_run(tmp_path, planned))).levels
    assert closed.road is None
    assert road(short).result == road(failed).result == "undecided"
    assert road(short).because == f"{short.requests.attempted} requests; it takes 20"
    assert road(failed).because == "nothing succeeded"


def test_what_a_valve_dropped_could_not_grow(tmp_path: Path) -> None:
    path = write_levels(tmp_path, Machine(1, service_s=0.1, chance=0.3), [Open(4.0, "constant")], duration_s=20.0)
    lines = [orjson.loads(line) for line in (path / "samples.jsonl").read_bytes().splitlines()]
    for line in lines[10:15]:
        line.update(outcome="dropped", sent_ns=None, first_token_ns=None, last_token_ns=None, done_ns=None)
    (path / "samples.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    (level,) = summarise(read(path)).levels
    assert road(level).result == "undecided"
    assert "5 of 80 requests were dropped" in road(level).because


# What it means for the level


def over(path: Path, slo: dict[str, Any] | None = None) -> Level:
    (level,) = summarise(read(write_levels(path, Machine(1, chance=0.3), [Open(4.0)], duration_s=60.0, slo=slo))).levels
    return level


def test_over_capacity_is_the_one_thing_told_of_its_growing_latencies(tmp_path: Path) -> None:
    level = over(tmp_path)
    abouts = {caution.about for caution in level.cautions}
    assert "over_capacity" in abouts
    assert not abouts & {"drift", "warmup", "warmup_kept", "never_settled"}
    (caution,) = (caution for caution in level.cautions if caution.about == "over_capacity")
    assert re.match(r"more came than could be served from (its start|\d s) on, at 4/s: ", caution.reason)
    assert "latencies tell how long the level was" in caution.reason


def test_no_interval_and_no_warm_up_is_told_of_a_level_over_capacity(tmp_path: Path) -> None:
    level = over(tmp_path)
    ttft = level.latency_ms["ttft"]["response"]
    assert ttft.interval_95 is None
    assert ttft.not_estimable == "over capacity: it grows with the length of the level"
    assert level.warmup_trimmed_s is None
    assert level.window_s == 60.0
    assert level.issued_per_s == pytest.approx(4.0, rel=0.2)
    assert level.throughput["requests_per_s"] == pytest.approx(2.0, rel=0.1)


def test_over_capacity_a_limit_that_was_kept_is_undecided_and_one_that_was_broken_stays_broken(tmp_path: Path) -> None:
    limits = {"ttft": {"p50": "1h"}, "e2e": {"p50": "10s"}, "error_rate": "1%", "goodput": "10%"}
    level = over(tmp_path, limits)
    clauses = {clause.clause: (clause.result, clause.because) for clause in level.slo}
    assert clauses["ttft.p50"] == ("undecided", "over capacity: it grows with the length of the level")
    assert clauses["e2e.p50"] == ("fail", "over capacity: it grows with the length of the level")
    assert clauses["error_rate"] == ("pass", None)
    assert clauses["goodput"] == ("undecided", "over capacity: it falls with the length of the level")
