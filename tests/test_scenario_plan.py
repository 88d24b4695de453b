"""The plan: which levels a scenario comes to, with which seeds, and what can be said of them beforehand."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest

from loadbench.errors import UsageError
from loadbench.records import Closed, Open
from loadbench.report.plan import print_plan
from loadbench.scenario.load import load_scenario
from loadbench.scenario.plan import Plan, describe, levels
from loadbench.scenario.schema import Scenario


def scenario(**keys: Any) -> Scenario:
    return Scenario.model_validate(keys)


def plan_of(tested: Scenario, *models: str) -> Plan:
    return describe(tested, levels(tested, models or ("m",)))


LADDER = [{"concurrency": [1, 4], "duration": "5s"}, {"rate": ["2/s", "30/min"], "arrivals": "constant", "requests": 9}]


def test_every_model_gets_every_load_of_every_stage_in_order() -> None:
    laid_out = levels(scenario(stages=LADDER), ("a", "b"))
    assert [level.index for level in laid_out] == list(range(8))
    assert [level.model for level in laid_out] == ["a"] * 4 + ["b"] * 4
    assert [level.stage for level in laid_out[:4]] == [0, 0, 1, 1]
    assert [level.load for level in laid_out[:4]] == [
        Closed(1),
        Closed(4),
        Open(2.0, "constant"),
        Open(0.5, "constant"),
    ]
    assert [(level.duration_s, level.requests) for level in laid_out[:4]] == [(5.0, None)] * 2 + [(None, 9)] * 2


def test_levels_have_seeds_of_their_own_that_models_share() -> None:
    laid_out = levels(scenario(stages=LADDER), ("a", "b"))
    seeds = [level.seed for level in laid_out]
    assert len(set(seeds[:4])) == 4
    assert seeds[:4] == seeds[4:]


def test_seeds_follow_the_scenarios_seed_and_ignore_what_is_added_behind() -> None:
    few = levels(scenario(stages=LADDER[:1]), ("a",))
    more = levels(scenario(stages=LADDER), ("a",))
    other = levels(scenario(stages=LADDER, seed=1), ("a",))
    assert [level.seed for level in few] == [level.seed for level in more[:2]]
    assert not {level.seed for level in more} & {level.seed for level in other}


def test_seeds_never_change_between_versions() -> None:
    """Else yesterday's results and today's were asked different things under the same name."""
    seeds = [level.seed for level in levels(scenario(stages=LADDER, seed=42), ("a",))]
    assert seeds == [3444837047, 1896493428, 3329053876, 2134191843]


def test_a_stages_options_reach_its_levels() -> None:
    stages = [
        {"concurrency": 2, "start_spacing": "20ms", "min_requests": 3},
        {"concurrency": 2},
        {"rate": "1/s", "max_in_flight": 8},
    ]
    spaced, usual, valved = levels(scenario(stages=stages), ("m",))
    assert (spaced.start_spacing_s, spaced.min_requests) == (0.02, 3)
    assert usual.start_spacing_s == 0.001
    assert valved.max_in_flight == 8


def test_an_open_loop_is_expected_to_ask_at_its_rate() -> None:
    plan = plan_of(
        scenario(stages=[{"rate": "2/s", "duration": "20s"}], drain="10s", canary=False, warmup={"requests": 0})
    )
    (level,) = plan.levels
    assert (level.expected_requests, level.issuing_s, level.at_most_s) == (40, 20, 30)
    assert (plan.estimated_s, plan.open_ended) == (20, False)
    assert plan.at_most_s == 30 + 180  # the canary that every model begins with


def test_an_open_loop_ends_with_requests_or_duration_whichever_comes_first() -> None:
    (level,) = plan_of(scenario(stages=[{"rate": "2/s", "duration": "20s", "requests": 10}])).levels
    assert (level.expected_requests, level.issuing_s) == (10, 5)
    (level,) = plan_of(scenario(stages=[{"rate": "2/s", "duration": "20s", "requests": 100}])).levels
    assert (level.expected_requests, level.issuing_s) == (40, 20)
    (level,) = plan_of(scenario(stages=[{"rate": "2/s", "duration": "20s", "min_requests": 100}])).levels
    assert (level.expected_requests, level.issuing_s) == (100, 50)


def test_a_ramp_is_expected_to_ask_at_its_mean_rate_and_slower_where_it_is_still_low() -> None:
    ramp = {"from": "0/s", "to": "8/s"}
    whole, part, more = plan_of(
        scenario(
            stages=[
                {"rate": ramp, "duration": "20s"},
                {"rate": ramp, "duration": "20s", "requests": 20},
                {"rate": ramp, "duration": "20s", "min_requests": 160},
            ]
        )
    ).levels
    assert (whole.expected_requests, whole.issuing_s) == (80, 20)
    assert (part.expected_requests, part.issuing_s) == (20, 10)  # a quarter of the requests in half of the time
    assert (more.expected_requests, more.issuing_s) == (160, 30)  # at 8/s once the ramp is over


def test_gamma_arrivals_are_expected_like_any_others_of_their_rate() -> None:
    (level,) = plan_of(scenario(stages=[{"rate": "2/s", "burstiness": 0.5, "duration": "20s"}])).levels
    assert (level.expected_requests, level.issuing_s) == (40, 20)


def test_the_printed_plan_names_every_kind_of_load(tmp_path: Path) -> None:
    (tmp_path / "azure.csv").write_text("TIMESTAMP\n" + "2023-11-16 18:15:46.68\n" * 3)
    (tmp_path / "s.yaml").write_text(
        "stages:\n"
        "  - {concurrency: 4}\n"
        "  - {rate: 2/s}\n"
        "  - {rate: 2/s, burstiness: 0.5}\n"
        "  - {rate: [{from: 1/s, to: 8/s}], duration: 20s}\n"
        "  - {rate: {from: 1/s, to: 8/s}, arrivals: constant}\n"
        "  - {rate: {from: 1/s, to: 8/s}, burstiness: 3}\n"
        "  - {trace: azure.csv, speed: 2}\n"
        "  - {trace: azure.csv}\n"
    )
    printed = io.StringIO()
    print_plan(load_scenario(tmp_path / "s.yaml"), printed)
    rows = [re.split(r" {2,}", line.strip()) for line in printed.getvalue().splitlines() if re.match(r" +\d", line)]
    assert [row[2:] for row in rows] == [
        ["4 users", "as many as it answers", "0:15"],
        ["2/s poisson", "about 30", "0:15"],
        ["2/s gamma 0.5", "about 30", "0:15"],
        ["1→8/s", "about 90", "0:20"],
        ["1→8/s constant", "about 68", "0:15"],
        ["1→8/s gamma 3", "about 68", "0:15"],
        ["trace azure.csv ×2", "3", "0:00"],
        ["trace azure.csv", "3", "0:00"],
    ]


def printed_plan(tmp_path: Path, text: str, encoding: str = "utf-8") -> str:
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    print_plan(load_scenario(tmp_path / "s.yaml"), stream)
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_a_plan_is_printed_where_its_signs_cannot_be_spelt(tmp_path: Path) -> None:
    assert "s ? " in printed_plan(tmp_path, "name: s\ndescription: in Köln", "ascii")


def test_the_printed_plan_counts_one_in_the_singular_and_bounds_its_time(tmp_path: Path) -> None:
    text = "warmup: {requests: 1}\ndeadlines: {first_token: 1s, total: 10s}\nstages: [{concurrency: 1, requests: 5}]"
    printed = printed_plan(tmp_path, text)
    assert "\n1 level, 1 warm-up request; time unknown" in printed
    # Five requests, the drain, the warm-up and two canaries, ten seconds each.
    assert printed.endswith("\nNo longer than 1:30, even if every request ran into its deadline.\n")


def test_a_synthetic_model_that_there_is_not_is_refused_where_it_would_be_ours(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"s\.yaml: models: expected synthetic: with one of tiny, .*, got synthetic:no$"
    ):
        printed_plan(tmp_path, "models: [auto, 'synthetic:tiny', 'synthetic:no']")
    assert "synthetic:no" in printed_plan(tmp_path, "models: ['synthetic:no']\nendpoint: http://h:1")


def test_a_closed_loop_by_the_clock_has_a_time_and_no_number() -> None:
    plan = plan_of(scenario(stages=[{"concurrency": 4, "duration": "20s"}]))
    assert (plan.levels[0].expected_requests, plan.levels[0].issuing_s) == (None, 20)
    assert not plan.open_ended


def test_a_closed_loop_by_number_takes_as_long_as_it_takes_and_at_most_its_deadlines() -> None:
    deadlines = {"first_token": "10s", "total": "60s"}
    plan = plan_of(scenario(stages=[{"concurrency": 4, "requests": 10}], deadlines=deadlines, drain="30s"))
    (level,) = plan.levels
    assert (level.expected_requests, level.issuing_s) == (10, None)
    assert level.at_most_s == 3 * 60 + 30  # four users, so three rounds
    assert (plan.open_ended, plan.estimated_s) == (True, 0)


def test_min_requests_can_hold_a_closed_loop_up_to_its_deadlines() -> None:
    deadlines = {"first_token": "10s", "total": "60s"}
    stages = [{"concurrency": 2, "duration": "20s", "min_requests": 5}]
    (level,) = plan_of(scenario(stages=stages, deadlines=deadlines, drain="0s")).levels
    assert level.at_most_s == 3 * 60


def test_warm_ups_count_once_a_model_and_canaries_once_a_model_and_level() -> None:
    deadlines = {"first_token": "5s", "total": "10s"}
    tested = scenario(stages=LADDER[:1], warmup={"requests": 3}, deadlines=deadlines, drain="0s")
    plan = plan_of(tested, "a", "b")
    assert plan.models == ("a", "b")
    assert plan.warmup_requests == 6
    assert plan.at_most_s == 4 * 5 + (6 + 2 + 4) * 10
