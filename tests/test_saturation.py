"""Where a model saturates and how it takes several at once, on servers of which that is known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadbench.analysis.findings import Capacity, Estimate
from loadbench.analysis.points import see
from loadbench.analysis.rundir import read
from loadbench.analysis.saturation import capacities
from loadbench.analysis.span import span_of
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Road
from loadbench.records import Closed, Leg, Load, Open
from tests.played import REJECTS_AFTER_S, TOKENS, Machine, Usl, alone, shared, write_levels

LADDER = (1, 2, 4, 8, 16)
QUICK = Machine(service_s=0.1, first_share=0.25, chance=0.3)
SLOTS = replace(QUICK, slots=4)
SEEDS = (1, 2)


def server(**options: Any) -> Machine:
    return replace(QUICK, **options)


def users(*numbers: int) -> list[Load]:
    return [Closed(number) for number in numbers]


def carried(path: Path, roads: Sequence[Road] = ()) -> tuple[Capacity, ...]:
    """What the run's models carry; its levels went along these roads, where given."""
    run = read(path)
    levels = summarise(run).levels
    if roads:
        levels = tuple(replace(level, road=road) for level, road in zip(levels, roads, strict=True))
    return capacities([span_of(run, events) for events in run.levels], levels)


def of(path: Path, machine: Machine, loads: Sequence[Load], **options: Any) -> Capacity:
    (capacity,) = carried(write_levels(path, machine, loads, **options))
    return capacity


def estimate(capacity: Capacity, name: str) -> Estimate:
    (found,) = (estimate for estimate in capacity.estimates if estimate.name == name)
    return found


def firm(capacity: Capacity, name: str) -> float:
    found = estimate(capacity, name)
    assert found.result == "firm" and found.value is not None, found.because
    return found.value


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cv", [0.0, 0.3])
@pytest.mark.parametrize(
    ("machine", "ladder", "nature", "up_to", "carries"),
    [
        (server(slots=1), LADDER, "serves_one_at_a_time", None, 1),
        (server(slots=4), LADDER, "batches", 4, 4),
        (server(slots=16), (1, 2, 4, 8, 16, 32, 64), "batches", 16, 16),
        (server(slots=4, queue=4), (*LADDER, 32), "batches", 4, 4),
        (server(speed=shared), LADDER, "shares_the_processor", None, 1),
        (server(speed=shared, slots=4), LADDER, "shares_in_turns", 4, 1),
    ],
)
def test_the_nature_and_the_capacity_of_a_known_server_are_named(
    tmp_path: Path,
    machine: Machine,
    ladder: tuple[int, ...],
    nature: str,
    up_to: int | None,
    carries: int,
    cv: float,
    seed: int,
) -> None:
    found = of(tmp_path, replace(machine, chance=cv), users(*ladder), seed=seed)
    assert (found.nature, found.up_to, found.saturated) == (nature, up_to, True), found.because
    assert firm(found, "asymptotic") == pytest.approx(carries, rel=0.1)
    assert firm(found, "parallelism") == pytest.approx(carries, rel=0.1)
    assert firm(found, "knee") == carries
    assert found.usl is None
    assert estimate(found, "usl_peak").result == "undecided"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_server_that_always_gains_is_not_saturated(tmp_path: Path, seed: int) -> None:
    found = of(tmp_path, server(speed=alone), users(*LADDER), seed=seed)
    assert (found.nature, found.saturated, found.falls_to) == ("scales", False, None)
    assert found.last_gain == pytest.approx(1.0, abs=0.15)
    assert {estimate(found, name).result for name in ("asymptotic", "knee")} == {"undecided"}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_server_that_gets_slower_past_its_peak_is_told_with_the_law_that_it_follows(
    tmp_path: Path, seed: int
) -> None:
    found = of(tmp_path, server(speed=Usl(0.05, 0.005)), users(*LADDER, 32, 64), seed=seed)
    assert (found.nature, found.saturated) == ("batches", True)
    assert found.falls_to == pytest.approx((64 / 24.31) / (16 / 2.95), rel=0.1)  # of the law
    assert found.usl is not None
    low, high = found.usl.coherency_interval_95
    assert low < 0.005 < high
    assert firm(found, "usl_peak") == pytest.approx((0.95 / 0.005) ** 0.5, rel=0.1)


def test_a_peak_in_the_middle_is_saturated_though_the_highest_loads_say_nothing_of_it(tmp_path: Path) -> None:
    found = of(tmp_path, server(speed=Usl(0.1, 0.02)), users(1, 2, 6, 32))
    assert found.saturated is True
    assert found.falls_to is not None


def test_a_point_is_what_was_served_once_every_user_had_an_answer(tmp_path: Path) -> None:
    found = of(tmp_path, replace(SLOTS, chance=0.0), users(1, 16))
    lone, crowd = found.points
    assert (lone.load, crowd.load) == (1, 16)
    assert lone.per_s == pytest.approx(10, rel=0.001)
    assert crowd.per_s == pytest.approx(40, rel=0.001)
    assert crowd.e2e_mean_ms == pytest.approx(400, rel=0.01)  # N = X · E2E
    assert crowd.in_service == pytest.approx(4, rel=0.01)
    assert crowd.tokens_per_s == pytest.approx(TOKENS * 40, rel=0.001)
    assert crowd.per_s_interval_95 is not None
    assert crowd.per_s_interval_95[0] < 0.99 * 40 < 1.01 * 40 < crowd.per_s_interval_95[1]


def test_rejected_requests_are_no_throughput(tmp_path: Path) -> None:
    found = of(tmp_path, replace(SLOTS, queue=0), users(1, 2, 8))
    assert found.points[-1].per_s == pytest.approx(40, rel=0.1)
    assert REJECTS_AFTER_S < 0.1  # faster than any answer, and so the most of what ended


def test_levels_with_few_requests_leave_everything_undecided(tmp_path: Path) -> None:
    found = of(tmp_path, replace(SLOTS, service_s=6.0), users(*LADDER))
    assert not any(point.firm for point in found.points)
    assert (found.nature, found.up_to) == (None, None)
    assert "; it takes 11)" in found.because
    assert all(told.result == "undecided" for told in found.estimates)


def test_a_level_that_hardly_outlasts_its_first_answers_is_not_firm(tmp_path: Path) -> None:
    found = of(tmp_path, server(speed=shared), users(1, 2, 60))
    assert [point.firm for point in found.points] == [True, True, False]
    assert "an answer takes" in found.because


def test_two_loads_tell_the_gain_but_no_nature(tmp_path: Path) -> None:
    found = of(tmp_path, SLOTS, users(1, 4))
    assert found.nature is None
    assert "2 loads" in found.because
    assert found.saturated is False
    assert found.last_gain == pytest.approx(3.0, rel=0.15)


def test_loads_close_together_as_a_search_leaves_them_are_no_steps(tmp_path: Path) -> None:
    found = of(tmp_path, SLOTS, users(1, 2, 4, 8, 6, 5, 5))
    assert [point.load for point in found.points] == [1, 2, 4, 5, 5, 6, 8]
    assert (found.nature, found.up_to, found.saturated) == ("batches", 4, True)
    assert found.last_gain == pytest.approx(0.0, abs=0.1)  # from 5 to 8


def test_a_load_at_which_most_fails_is_named(tmp_path: Path) -> None:
    found = of(tmp_path, replace(SLOTS, queue=4), users(1, 4, 8, 32))
    assert "more than half failed at 32 users" in found.because


def test_one_load_says_nothing_of_capacity(tmp_path: Path) -> None:
    assert carried(write_levels(tmp_path, SLOTS, users(4, 4))) == ()


def test_without_a_level_at_one_user_the_parallelism_is_undecided(tmp_path: Path) -> None:
    found = of(tmp_path, SLOTS, users(2, 4, 8, 16))
    assert (found.nature, found.saturated) == (None, True)
    for name in ("parallelism", "asymptotic"):
        assert (estimate(found, name).value, estimate(found, name).result) == (None, "undecided")
    assert "no level at 1 user" in found.because
    assert firm(found, "knee") == 4


@pytest.mark.parametrize(("machine", "nature"), [(SLOTS, "batches"), (server(slots=1), None)])
def test_without_a_stream_waiting_is_not_told_from_being_served(
    tmp_path: Path, machine: Machine, nature: str | None
) -> None:
    found = of(tmp_path, replace(machine, stream=False), users(*LADDER))
    assert (found.nature, found.up_to) == (nature, 4 if nature else None)
    assert "without a stream" in found.because
    assert {point.in_service for point in found.points} == {None}
    assert estimate(found, "in_service").result == "undecided"


def test_a_client_that_was_the_limit_says_nothing_of_the_target(tmp_path: Path) -> None:
    path = write_levels(tmp_path, SLOTS, users(*LADDER))
    events = [orjson.loads(line) for line in (path / "telemetry.jsonl").read_bytes().splitlines()]
    for event in events:
        if event["event"] == "level_end" and event["level"] >= 2:
            event["client"]["cpu_share"] = 0.97
    (path / "telemetry.jsonl").write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in events))
    (found,) = carried(path)
    assert [point.firm for point in found.points] == [True, True, False, False, False]
    assert found.nature is None
    assert "97% of a core" in found.because


def lagging(path: Path, lag_ms: float, *levels: int) -> Path:
    """The run, with the client's event loop so late on these levels."""
    events = [orjson.loads(line) for line in (path / "telemetry.jsonl").read_bytes().splitlines()]
    for event in events:
        if event["event"] == "level_end" and event["level"] in levels:
            event["client"]["loop_lag_p99_ns"] = int(lag_ms * 1e6)
    (path / "telemetry.jsonl").write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in events))
    return path


def test_a_client_that_was_late_for_a_first_token_and_not_for_an_answer_is_no_limit_of_the_throughput(
    tmp_path: Path,
) -> None:
    """5 ms are a fifth of the first token and a twentieth of the answer."""
    (found,) = carried(lagging(write_levels(tmp_path, replace(SLOTS, chance=0.0), users(*LADDER)), 5.0, 2))
    assert all(point.firm for point in found.points)
    assert firm(found, "knee") == 4


def test_the_knee_is_undecided_where_the_load_below_it_was_left_out(tmp_path: Path) -> None:
    (found,) = carried(lagging(write_levels(tmp_path, SLOTS, users(*LADDER)), 80.0, 2))
    assert [point.firm for point in found.points] == [True, True, False, True, True]
    told = estimate(found, "knee")
    assert (told.value, told.result) == (8, "undecided")
    assert told.because.endswith("; at 4 users, left out, it may be as high")
    assert (found.nature, found.up_to) == ("batches", 4)  # by how many are worked on
    (above,) = carried(lagging(write_levels(tmp_path / "above", SLOTS, users(*LADDER)), 80.0, 3))
    assert firm(above, "knee") == 4


def test_without_a_stream_nothing_tells_up_to_how_many_where_the_knee_does_not(tmp_path: Path) -> None:
    path = write_levels(tmp_path, replace(SLOTS, stream=False), users(*LADDER))
    (found,) = carried(lagging(path, 80.0, 2))
    assert (found.nature, found.up_to) == (None, None)
    assert "at 4 users, left out, it may be as high" in found.because


def test_where_no_two_loads_can_be_counted_it_says_so_before_it_names_them(tmp_path: Path) -> None:
    (found,) = carried(lagging(write_levels(tmp_path, SLOTS, users(1, 2)), 80.0, 0, 1))
    assert found.because.startswith("of 2 loads none can be counted, and it takes 2; left out: 1 user (the client was")


def test_levels_that_change_by_plan_or_were_cut_off_do_not_count(tmp_path: Path) -> None:
    changing = Closed(16, legs=(Leg("ramp", 1.0, 16.0, 15.0),))
    path = write_levels(tmp_path, SLOTS, [*users(1, 2, 4, 8), changing])
    events = [orjson.loads(line) for line in (path / "telemetry.jsonl").read_bytes().splitlines()]
    kept = [event for event in events if event["event"] != "level_end" or event["level"] != 3]
    (path / "telemetry.jsonl").write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in kept))
    (found,) = carried(path)
    assert found.levels == (0, 1, 2)


def test_the_largest_load_within_the_slo_lies_below_the_first_without(tmp_path: Path) -> None:
    slo = {"ttft": {"p50": "150ms"}}
    found = of(tmp_path, SLOTS, users(*LADDER), slo=slo)
    assert firm(found, "slo") == 8  # the other four wait 100 ms for a slot
    assert estimate(found, "slo").levels == (3, 4)


def test_a_load_that_rejects_most_does_not_keep_the_slo_however_fast_the_rest_is(tmp_path: Path) -> None:
    slo = {"ttft": {"p50": "9s"}}
    found = of(tmp_path, replace(SLOTS, queue=4), users(1, 4, 8, 32), slo=slo)
    assert firm(found, "slo") == 8
    assert re.search(r"32 users did not \(TTFT p50: [\d,]+ of [\d,]+ requests failed\)", estimate(found, "slo").because)


def test_an_slo_that_no_load_breaks_or_that_is_not_told_has_no_firm_largest_load(tmp_path: Path) -> None:
    kept = of(tmp_path / "kept", SLOTS, users(1, 2), slo={"ttft": {"p50": "9s"}})
    assert (estimate(kept, "slo").value, estimate(kept, "slo").result) == (2, "undecided")
    assert estimate(kept, "slo").because == "2 users kept it; no larger load was measured"
    few = of(tmp_path / "few", SLOTS, users(1, 2), slo={"ttft": {"p99": "1s"}})
    assert (estimate(few, "slo").value, estimate(few, "slo").result) == (None, "undecided")
    assert "firm from 662" in estimate(few, "slo").because


def road(result: Any) -> Road:
    return Road(result, "in flight grew" if result == "over_capacity" else "in flight stayed")


@pytest.mark.parametrize(
    ("results", "sustained", "saturated"),
    [
        (("steady", "steady", "over_capacity"), (20, "firm"), True),
        (("steady", "undecided", "over_capacity"), (10, "undecided"), True),
        (("steady", "steady", "steady"), (60, "undecided"), False),
        (("steady", "steady", "undecided"), (20, "undecided"), None),
        (("over_capacity", "steady", "over_capacity"), (None, "undecided"), True),
    ],
)
def test_an_open_loop_sustains_what_stays_on_the_road(
    tmp_path: Path, results: tuple[str, ...], sustained: tuple[float | None, str], saturated: bool | None
) -> None:
    path = write_levels(tmp_path, SLOTS, [Open(10.0), Open(20.0), Open(60.0)])
    (found,) = carried(path, [road(result) for result in results])
    told = estimate(found, "sustained")
    assert (told.value, told.result, found.saturated) == (*sustained, saturated)
    assert found.last_gain is None  # no more than was asked for
    assert (found.loop, found.nature) == ("open", None)
    assert "closed loop" in found.because


def test_beyond_capacity_no_percentile_is_told_for_what_the_slo_was_missed_by(tmp_path: Path) -> None:
    slo = {"ttft": {"p50": "150ms"}}
    (found,) = carried(write_levels(tmp_path, SLOTS, [Open(10.0), Open(90.0)], slo=slo))
    because = estimate(found, "slo").because
    assert because == "10/s kept it; 90/s did not (TTFT p50, over capacity: it grows with the length of the level)"


def test_an_open_loop_beyond_capacity_is_served_at_capacity(tmp_path: Path) -> None:
    (found,) = carried(write_levels(tmp_path, SLOTS, [Open(10.0), Open(60.0)]))
    assert found.points[0].per_s == pytest.approx(10, rel=0.25)
    assert found.points[1].per_s == pytest.approx(40, rel=0.06)


@pytest.mark.parametrize(
    ("machine", "duration_s", "seed", "nature"),
    [
        (server(slots=1, service_s=0.8, chance=0.3), 15, 4, "serves_one_at_a_time"),
        (server(speed=shared, service_s=0.8, chance=1.0), 30, 1, "shares_the_processor"),
    ],
)
def test_a_load_that_did_worse_by_chance_makes_no_server_scale(
    tmp_path: Path, machine: Machine, duration_s: float, seed: int, nature: str
) -> None:
    """The last step up gained, from 2 users that were slow by chance, and that alone was called scaling."""
    found = of(tmp_path, machine, users(*LADDER), duration_s=duration_s, seed=seed)
    assert found.nature in (None, nature), found.because
    assert found.saturated is not False


@pytest.mark.parametrize(("slots", "ladder"), [(5, (1, 2, 4, 8)), (6, (1, 2, 4, 8)), (10, LADDER)])
def test_a_ladder_that_ends_where_some_queue_already_says_how_many_are_worked_on(
    tmp_path: Path, slots: int, ladder: tuple[int, ...]
) -> None:
    found = of(tmp_path, server(slots=slots), users(*ladder))
    assert (found.nature, found.up_to, found.saturated) == ("scales", slots, None)
    assert firm(found, "in_service") == pytest.approx(slots, rel=0.05)
    assert "the others queue" in found.because


def test_as_many_slots_as_the_most_users_are_all_of_them(tmp_path: Path) -> None:
    found = of(tmp_path, server(slots=8), users(1, 2, 4, 8))
    assert (found.nature, found.up_to, found.saturated) == ("scales", None, False)


def test_a_throughput_that_speaks_of_several_and_a_stream_that_speaks_of_one_decide_nothing(tmp_path: Path) -> None:
    """The seed gives the lone user long answers: the others then look 1.4 times as fast as one at a time can be."""
    found = of(tmp_path, server(slots=1, service_s=0.8, chance=1.0), users(*LADDER), duration_s=30.0, seed=12)
    assert found.nature is None, found.because


def test_more_than_the_queue_holds_is_rejected_and_the_load_from_which_on_is_told(tmp_path: Path) -> None:
    limited = of(tmp_path / "limited", replace(SLOTS, queue=4), users(*LADDER))
    assert (limited.nature, limited.up_to, limited.rejects_from) == ("batches", 4, 16)  # 4 are worked on and 4 wait
    assert of(tmp_path / "unlimited", SLOTS, users(*LADDER)).rejects_from is None
    everywhere = of(tmp_path / "everywhere", replace(SLOTS, slots=1, queue=0), users(2, 4, 8))
    assert everywhere.rejects_from is None  # no load from which on, but whatever comes


def test_an_estimate_is_firm_only_where_its_interval_is_narrow(tmp_path: Path) -> None:
    wide = of(tmp_path / "wide", replace(SLOTS, service_s=0.8, chance=1.0), users(*LADDER))
    assert {estimate(wide, name).result for name in ("asymptotic", "parallelism")} == {"undecided"}
    assert "by chance, which is too wide" in estimate(wide, "parallelism").because
    narrow = of(tmp_path / "narrow", SLOTS, users(*LADDER))
    assert {estimate(narrow, name).result for name in ("asymptotic", "parallelism")} == {"firm"}


@pytest.mark.parametrize(("state", "told"), [("wedged", False), ("restarted", False), ("degraded", True)])
def test_a_level_after_which_the_target_was_broken_is_no_point(tmp_path: Path, state: str, told: bool) -> None:
    run = read(write_levels(tmp_path, SLOTS, users(*LADDER)))
    *whole, last = summarise(run).levels
    levels = [*whole, replace(last, target=replace(last.target, state=state))]
    (found,) = capacities([span_of(run, events) for events in run.levels], levels)
    assert found.points[-1].firm is told
    assert (f"16 users (the target was {state} after it)" in found.because) is not told


@pytest.mark.parametrize(
    ("machine", "per_s"), [(server(slots=4, service_s=1.0), 4), (server(slots=1, service_s=0.3), 3.33)]
)
def test_of_a_level_of_a_few_answers_the_interval_knows_how_little_it_knows(
    tmp_path: Path, machine: Machine, per_s: float
) -> None:
    """16 users have three or four answers each in 20 s. By shares of them 7 of the first 12 held the truth."""
    held = 0
    for seed in range(12):
        run = read(write_levels(tmp_path / str(seed), machine, users(16), duration_s=20.0, seed=seed))
        (level,) = summarise(run).levels
        low, high = see(span_of(run, run.levels[0]), level).point.per_s_interval_95 or (0.0, 0.0)
        held += low <= per_s <= high
    assert held >= 11
