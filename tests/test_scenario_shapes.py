"""Ladders, loads over time and stop rules: what a scenario may say of them, what they come to, and what is refused."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadbench.errors import UsageError
from loadbench.records import Closed, Leg, Level, Open, at, load_title
from loadbench.report.plan import print_plan
from loadbench.scenario.load import Loaded, Overrides, load_scenario
from loadbench.scenario.plan import describe, levels
from loadbench.scenario.schema import Scenario, schema_json
from loadbench.scenario.shapes import MOST_RUNGS, StopRules
from loadbench.scenario.stage import Stage

ALL_RULES = StopRules()
NO_RULES = StopRules(gain=None, slo=False, error_rate=None, degraded=False, over_capacity=False)


def read(text: str, **overrides: str) -> Loaded:
    Path("s.yaml").write_text(text, encoding="utf-8")
    return load_scenario(Path("s.yaml"), Overrides(**overrides))  # type: ignore[arg-type]


def stage(**keys: Any) -> Stage:
    return Stage.model_validate(keys)


def users(**keys: Any) -> list[int]:
    return [load.concurrency for load in stage(**keys).loads() if isinstance(load, Closed)]


def rates(**keys: Any) -> list[float]:
    return [load.rate_per_s for load in stage(**keys).loads() if isinstance(load, Open)]


# Ladders


def test_a_ladder_of_users_ends_with_its_last_number_whatever_the_factor() -> None:
    assert users(concurrency={"from": 1, "to": 64, "factor": 2}) == [1, 2, 4, 8, 16, 32, 64]
    assert users(concurrency={"from": 1, "to": 60, "factor": 2}) == [1, 2, 4, 8, 16, 32, 60]
    assert users(concurrency={"from": 3, "to": 3, "factor": 2}) == [3]


def test_a_ladder_of_users_has_whole_numbers_and_each_once() -> None:
    assert users(concurrency={"from": 1, "to": 8, "factor": 1.2}) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_ladder_of_rates_is_as_many_open_loops() -> None:
    keys: dict[str, Any] = {"rate": {"from": "30/min", "to": "3/s", "factor": 2}, "arrivals": "constant"}
    assert rates(**keys) == [0.5, 1, 2, 3]
    assert stage(**keys).loads()[0] == Open(0.5, "constant")
    assert rates(rate={"from": 1, "to": 9, "factor": 3}) == [1, 3, 9]


def test_a_rate_without_a_factor_is_a_ramp_and_no_ladder() -> None:
    ramp = stage(rate={"from": 1, "to": 9})
    assert (len(ramp.loads()), ramp.ladder, ramp.stop) == (1, False, None)


def test_flags_write_a_ladder_with_two_dots(home: Path) -> None:
    text = "stages:\n  - {concurrency: 4, duration: 5s}\n  - {rate: 2/s}\n"
    stages = read(text, concurrency="1..12", rate="1/s..240/min").scenario.stages
    assert [load_title(load) for load in stages[0].loads()] == ["1 user", "2 users", "4 users", "8 users", "12 users"]
    assert [load_title(load) for load in stages[1].loads()] == ["1/s poisson", "2/s poisson", "4/s poisson"]
    assert [one.stop for one in stages] == [ALL_RULES, ALL_RULES]
    assert stages[0].duration_s == 5


def test_a_flag_replaces_a_ladder_by_a_list(home: Path) -> None:
    text = "stages: [{concurrency: {from: 1, to: 64, factor: 2}, rest: 2s}]"
    (listed,) = read(text, concurrency="1,2,3").scenario.stages
    assert (listed.loads(), listed.stop, listed.rest_s) == ((Closed(1), Closed(2), Closed(3)), None, 2)


# Stop rules


def test_a_ladder_has_all_the_rules_but_the_time_unless_it_says_otherwise() -> None:
    ladder = {"from": 1, "to": 8, "factor": 2}
    assert stage(concurrency=ladder).stop == ALL_RULES
    assert (ALL_RULES.gain_share, ALL_RULES.error_rate, ALL_RULES.time_s) == (0.05, 0.1, None)
    some = stage(rate=ladder, stop={"gain": None, "slo": False, "time": "10m"}).stop
    assert some == StopRules(gain=None, slo=False, time=600)
    assert stage(concurrency=ladder, stop=False).stop == NO_RULES


def test_a_list_has_the_rules_that_it_names_and_no_others() -> None:
    assert stage(concurrency=[1, 2, 4]).stop is None
    assert stage(concurrency=[1, 2, 4], stop={"gain": "2%"}).stop == NO_RULES.model_copy(update={"gain_share": 0.02})
    assert stage(concurrency=[1, 2, 4], stop=True).stop == ALL_RULES
    assert stage(rate=[1, 2, 4], stop={}).stop == NO_RULES


@pytest.mark.parametrize("stop", [True, False, {"gain": None}, {"time": "1m", "slo": False}])
@pytest.mark.parametrize("load", [{"concurrency": [1, 2]}, {"concurrency": {"from": 1, "to": 8, "factor": 2}}], ids=str)
def test_rules_are_saved_so_that_no_default_changes_them(load: dict[str, Any], stop: object) -> None:
    asked = Scenario.model_validate({"stages": [{**load, "stop": stop}]})
    saved = json.loads(json.dumps(asked.public_json()))
    assert Scenario.model_validate(saved) == asked
    assert {"gain", "slo", "error_rate", "degraded", "over_capacity"} <= saved["stages"][0]["stop"].keys()


# Over time

SOAK = [
    {"hold": "2/s", "for": "60s"},
    {"ramp": "8/s", "for": "30s"},
    {"spike": "20/s", "for": "10s"},
    {"ramp": "4/s", "for": "20s"},
]


def test_a_load_over_time_is_one_level_of_legs() -> None:
    (load,) = stage(over_time=SOAK).loads()
    assert isinstance(load, Open)
    assert load.legs == (
        Leg("hold", 2, 2, 60),
        Leg("ramp", 2, 8, 30),
        Leg("spike", 20, 20, 10),
        Leg("ramp", 8, 4, 20),  # from where the load was before the spike
    )
    assert (load.arrivals, load.rate_per_s) == ("poisson", (120 + 150 + 200 + 120) / 120)
    assert load_title(load) == "2→8→…→4/s"


def test_whole_numbers_over_time_are_users() -> None:
    (load,) = stage(over_time=[{"ramp": 16, "for": "30s"}, {"spike": 40, "for": 5}, {"hold": 0, "for": 5}]).loads()
    assert load == Closed(40, (Leg("ramp", 0, 16, 30), Leg("spike", 40, 40, 5), Leg("hold", 0, 0, 5)))


def test_a_rate_over_time_may_hold_at_0() -> None:
    (load,) = stage(over_time=[{"hold": 0, "for": 5}, {"hold": "60/min", "for": 5}], burstiness=2).loads()
    assert load == Open(0.5, "gamma", 2.0, (Leg("hold", 0, 0, 5), Leg("hold", 1, 1, 5)))


def test_a_load_over_time_lasts_as_long_as_its_legs() -> None:
    (level,) = levels(Scenario.model_validate({"stages": [{"over_time": SOAK}]}), ("m",))
    assert (level.duration_s, level.requests, level.interval_s) == (120, None, 5)
    assert Level.from_json(json.loads(json.dumps(level.as_json()))) == level


@pytest.mark.parametrize(
    ("duration", "interval_s"),
    [("59s", None), ("60s", 2), ("2m", 5), ("15m", 30), ("1h", 120), ("5h", 600), ("24h", 600), (None, None)],
)
def test_long_levels_are_told_in_some_thirty_intervals(duration: str | None, interval_s: float | None) -> None:
    bound = {"requests": 9} if duration is None else {"duration": duration}
    assert stage(concurrency=1, **bound).telling_s == interval_s
    assert stage(concurrency=1, **bound, interval="3s").telling_s == 3


def test_a_short_load_over_time_is_told_in_intervals_too() -> None:
    assert stage(over_time=[{"hold": 2, "for": "20s"}]).telling_s == 1


loads = st.one_of(st.integers(0, 50), st.floats(0.1, 50).map(lambda rate: f"{rate!r}/s"))
stretches = st.lists(
    st.tuples(st.sampled_from(["hold", "ramp", "spike"]), loads, st.floats(0.1, 100)).map(
        lambda drawn: {drawn[0]: drawn[1], "for": drawn[2]}
    ),
    min_size=1,
)
VALIDATOR = jsonschema.Draft202012Validator(json.loads(schema_json()))


@settings(deadline=None)  # two busy cores are slow now and then
@given(stretches)
def test_what_is_over_time_is_refused_or_saved_as_the_same_and_never_below_0(over_time: list[dict[str, Any]]) -> None:
    kinds = {isinstance(value, str) for one in over_time for key, value in one.items() if key != "for" and value != 0}
    keys = {"stages": [{"over_time": over_time}]}
    VALIDATOR.validate(keys)
    if len(kinds) != 1:
        with pytest.raises(ValueError, match="over_time"):
            Scenario.model_validate(keys)
        return
    scenario = Scenario.model_validate(keys)
    saved = json.loads(json.dumps(scenario.public_json()))
    assert Scenario.model_validate(saved) == scenario
    VALIDATOR.validate(saved)
    (level,) = levels(scenario, ("m",))
    assert isinstance(level.load, Closed) == (kinds == {False})
    top = max(leg.end for leg in level.load.legs)
    assert all(0 <= at(level.load.legs, (level.duration_s or 0) * part / 99) <= top for part in range(100))


# Mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("concurrency: {from: 1, to: 4}", "stages[0].concurrency.factor: expected this key, got nothing"),
        (
            "concurrency: {from: 1, to: 4, factor: 1}",
            "stages[0].concurrency.factor: expected a number above 1.0, got 1",
        ),
        ("concurrency: {from: 4, to: 1, factor: 2}", "stages[0].concurrency: expected from ≤ to, got 4 and 1"),
        (
            "concurrency: {from: 1, to: 64, factor: 1.1}",
            "stages[0].concurrency: expected at most 32 loads in a ladder, got 45: raise factor",
        ),
        (
            "rate: {from: 1, to: 64, factor: 1.0000001}",
            "stages[0].rate: expected at most 32 loads in a ladder, got 41,588,834: raise factor",
        ),
        (
            "rate: {from: 0, to: 4, factor: 2}",
            "stages[0].rate: expected 0 < from ≤ to beside factor, got 0/s and 4/s",
        ),
        ("concurrency: [1, {from: 2, to: 8, factor: 2}]", "stages[0]: expected a ladder on its own, got it in a list"),
        ("concurrency: {from: 1, too: 4, factor: 2}", "stages[0].concurrency.too: unknown key; did you mean to?"),
        ("concurrency: 1..many", 'stages[0].concurrency: expected a whole number, got "1..many"'),
        ("{concurrency: [1, 2], stop: {gian: 5%}}", "stages[0].stop.gian: unknown key; did you mean gain?"),
        ("{concurrency: [1, 2], stop: 5%}", 'stages[0].stop: expected a mapping of keys to values, got "5%"'),
        ("{concurrency: [1, 2], stop: {gain: 2}}", "stages[0].stop.gain: expected a number of at most 1, got 2"),
        (
            "{concurrency: 1, duration: 5s, interval: 1h}",
            "stages[0]: expected interval ≤ the length of a level, got 1h and 5s",
        ),
        ("{concurrency: 1, rest: 5s}", "stages[0]: expected several levels beside rest, got one"),
        ("{over_time: [{hold: 2, for: 5s}], rest: 5s}", "stages[0]: expected several levels beside rest, got one"),
        ("{rate: 2/s, stop: true}", "stages[0]: expected several levels beside stop, got one"),
        ("concurrency: 1000000000000", "stages[0]: expected at most 1,000,000 users, got 1,000,000,000,000"),
        (
            "over_time: [{hold: 1000000000000, for: 5s}]",
            "stages[0].over_time[0].hold: expected at most 1,000,000 users, got 1,000,000,000,000",
        ),
        (
            "concurrency: {from: 1, to: 8, factor: .nan}",
            "stages[0].concurrency.factor: expected a number that is finite, got NaN",
        ),
        ("{concurrency: 1, interval: 10ms}", 'stages[0].interval: expected a number of at least 1, got "10ms"'),
        (
            "over_time: [{hold: 2/s, for: 5s}, {spike: 4, for: 5s}]",
            "stages[0]: expected users or rates in over_time, got both",
        ),
        ("over_time: [{hold: 0, for: 5s}]", "stages[0]: expected users or rates in over_time, got nothing but 0"),
        ("over_time: []", "stages[0].over_time: expected at least 1 in the list, got a list of 0"),
        ("over_time: {hold: 2, for: 5s}", "stages[0].over_time: expected a list, got a mapping"),
        (
            "over_time: [{hold: 2, ramp: 4, for: 5s}]",
            "stages[0].over_time[0]: expected exactly one of hold, ramp, spike, got hold and ramp",
        ),
        ("over_time: [{hold: 2}]", "stages[0].over_time[0].for: expected this key, got nothing"),
        (
            "over_time: [{hold: 2.5, for: 5s}]",
            "stages[0].over_time[0].hold: expected users as a whole number or a rate such as 2/s, got 2.5",
        ),
        (
            "over_time: [{hold: -2/s, for: 5s}]",
            'stages[0].over_time[0].hold: expected users as a whole number or a rate such as 2/s, got "-2/s"',
        ),
        (
            "{over_time: [{hold: 2, for: 5s}], duration: 9s}",
            "stages[0]: expected duration in a stage whose load stays, got it beside over_time",
        ),
        (
            "{over_time: [{hold: 2, for: 5s}], arrivals: poisson}",
            "stages[0]: expected arrivals in a stage with rate, got it beside concurrency",
        ),
        (
            "{over_time: [{hold: 2, for: 5s}], stop: true}",
            "stages[0]: expected stop in a stage whose load stays, got it beside over_time",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_place(home: Path, text: str, message: str) -> None:
    Path("s.yaml").write_text(f"name: x\nstages:\n  - {text}\n", encoding="utf-8")
    with pytest.raises(UsageError) as raised:
        load_scenario(Path("s.yaml"))
    assert str(raised.value).startswith(f"s.yaml:3: {message}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["concurrency", "rate", "over_time"])
def test_an_empty_list_is_one_mistake(home: Path, key: str) -> None:
    with pytest.raises(UsageError) as raised:
        read(f"stages: [{{{key}: []}}]")
    assert str(raised.value) == f"s.yaml:1: stages[0].{key}: expected at least 1 in the list, got a list of 0"


@pytest.mark.parametrize("off", [None, False])
def test_every_rule_is_switched_off_by_null_and_by_false(off: bool | None) -> None:
    every = dict.fromkeys(("gain", "slo", "error_rate", "degraded", "over_capacity", "time"), off)
    made = stage(concurrency={"from": 1, "to": 8, "factor": 2}, stop=every)
    assert made.stop is not None
    assert not made.stop.on
    assert Stage.model_validate(made.model_dump(mode="json", by_alias=True)) == made


def test_a_rule_of_nothing_is_a_rule() -> None:
    made = stage(concurrency="1..8", stop={"error_rate": 0})
    assert made.stop is not None
    assert made.stop.error_rate == 0.0
    with pytest.raises(ValueError, match="greater than 0"):
        stage(concurrency="1..8", stop={"time": 0})


def test_a_duration_by_flag_is_for_the_stages_that_it_fits(home: Path) -> None:
    over = "{over_time: [{hold: 2, for: 5s}]}"
    both = read(f"stages: [{over}, {{concurrency: 2}}]", duration="3s").scenario.stages
    assert [each.length_s for each in both] == [5.0, 3.0]
    with pytest.raises(UsageError, match=r"stages\[0\].*duration in a stage whose load stays"):
        read(f"stages: [{over}]", duration="3s")


def test_a_flag_for_one_load_drops_what_is_about_several(home: Path) -> None:
    (one,) = read("stages: [{concurrency: 1..8, stop: {slo: false}, rest: 2s}]", concurrency="4").scenario.stages
    assert (one.stop, one.rest_s) == (None, 0.0)
    (two,) = read("stages: [{concurrency: 1..8, stop: {slo: false}, rest: 2s}]", concurrency="4,8").scenario.stages
    assert two.rest_s == 2.0


def test_a_flag_for_a_short_duration_drops_an_interval_that_is_longer(home: Path) -> None:
    text = "stages: [{concurrency: 1, duration: 1h, interval: 1m}]"
    assert read(text, duration="10s").scenario.stages[0].interval_s is None
    assert read(text, duration="10m").scenario.stages[0].interval_s == 60.0


def test_a_flag_that_makes_no_ladder_is_named(home: Path) -> None:
    with pytest.raises(UsageError, match=r"^--rate: stages\[0\].rate: expected 0 < from ≤ to beside factor, got 4/s"):
        read("seed: 1", rate="4/s..2/s")


def test_a_ladder_may_have_as_many_rungs_as_are_allowed_and_no_more() -> None:
    assert len(rates(rate={"from": 1, "to": 2 ** (MOST_RUNGS - 1), "factor": 2})) == MOST_RUNGS
    with pytest.raises(ValueError, match="at most 32 loads"):
        stage(rate={"from": 1, "to": 2**MOST_RUNGS, "factor": 2})


# What can be said of them beforehand


def test_a_ladder_takes_at_most_so_long_and_its_rests_count() -> None:
    keys = {"stages": [{"concurrency": {"from": 1, "to": 4, "factor": 2}, "duration": "10s", "rest": "3s"}]}
    scenario = Scenario.model_validate(keys | {"drain": "0s", "canary": False, "warmup": {"requests": 0}})
    plan = describe(scenario, levels(scenario, ("a", "b")))
    assert (plan.may_end_early, plan.estimated_s) == (True, 2 * (3 * 10 + 2 * 3))
    assert plan.at_most_s == plan.estimated_s + 2 * scenario.deadlines.total_s  # the canary that a model begins with


def test_the_time_of_a_stage_bounds_its_levels_and_what_they_take_together() -> None:
    keys = {"concurrency": [1, 2, 4], "duration": "10s", "min_requests": 300, "stop": {"time": "25s"}}
    bare = {"drain": "2s", "canary": False, "warmup": {"requests": 0}, "deadlines": {"first_token": 1, "total": 3}}
    scenario = Scenario.model_validate({"stages": [keys], **bare})
    laid_out = levels(scenario, ("m",))
    assert {level.at_most_s for level in laid_out} == {25.0}
    plan = describe(scenario, laid_out)
    assert (plan.estimated_s, plan.at_most_s) == (25.0, 25.0 + 2.0 + 3.0)  # the drain, and the canary it begins with


def test_without_rules_nothing_ends_early() -> None:
    for keys in ({"concurrency": [1, 2]}, {"concurrency": 1}):
        scenario = Scenario.model_validate({"stages": [keys]})
        assert not describe(scenario, levels(scenario, ("m",))).may_end_early


def test_a_load_that_ends_at_0_is_expected_to_last_its_time_all_the_same() -> None:
    over_time = [{"hold": "2/s", "for": 10}, {"hold": 0, "for": 20}]
    scenario = Scenario.model_validate({"stages": [{"over_time": over_time}], "drain": 0})
    (row,) = describe(scenario, levels(scenario, ("m",))).levels
    assert (row.expected_requests, row.issuing_s, row.at_most_s) == (20, 30, 30)


@pytest.mark.parametrize("width", [80, 120])
def test_the_printed_plan_tells_rules_legs_rests_and_intervals_within_the_width(
    home: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = (
        "stages:\n"
        "  - {concurrency: {from: 1, to: 4, factor: 2}, rest: 2s}\n"
        "  - {rate: [1/s, 2/s], stop: {over_capacity: true, slo: true, time: 90s}}\n"
        "  - {over_time: [{hold: 2, for: 20s}, {ramp: 5, for: 10s}, {spike: 9, for: 5s}], interval: 5s}\n"
        "  - {concurrency: 1, duration: 1h}\n"
        "slo: {error_rate: 1%}\n"
    )
    out = io.StringIO()
    print_plan(read(text), out)
    lines = out.getvalue().splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("Levels 0"))
    told = lines[start:-2]
    assert all(len(line) <= width for line in told)
    assert re.sub(r"\n {4}", " ", "\n".join(told)).splitlines() == [
        "Levels 0 to 2: until gain under 5 % twice, SLO missed, over 10 % failed, target degraded;"
        " rest 2s between them",
        "Levels 3 to 4: until SLO missed, over capacity, 90s passed, in mid-level too",
        "Level 5: hold 2 users for 20s, ramp to 5 users for 10s, spike 9 users for 5s; results every 5s",
        "Level 6: results every 2m",
    ]
    assert "; time at most 1:01:54 plus" in lines[-2]
