"""When a ladder stops, rule by rule, on levels as the report tells them."""

from dataclasses import replace
from pathlib import Path

import pytest

from loadbench.analysis.ladder import stop_after
from loadbench.analysis.stats import FLOORS
from loadbench.analysis.summary import ClosedLoad, Level, OpenLoad, Road, ShapedLoad, SloClause
from loadbench.records import Closed, Leg
from loadbench.scenario.shapes import StopRules
from tests.played import Machine, told
from tests.virtual import level as planned

RULES = StopRules()
NONE = StopRules(gain=None, slo=False, error_rate=None, degraded=False, over_capacity=False)


@pytest.fixture(scope="module")
def level(tmp_path_factory: pytest.TempPathFactory) -> Level:
    """One user on an idle machine: 2 requests a second, streamed."""
    return told(tmp_path_factory.mktemp("level"), planned(Closed(1), 20.0), Machine(slots=1), {"e2e": {"p95": "1s"}})


def at(level: Level, users: int, tokens_per_s: float, ok: int = 40) -> Level:
    throughput = level.throughput | {"output_tokens_per_s": tokens_per_s, "requests_per_s": tokens_per_s / 16}
    requests = replace(level.requests, attempted=ok, ok=ok)
    return replace(level, load=ClosedLoad(users), throughput=throughput, requests=requests)


def ladder(level: Level, *tokens_per_s: float) -> list[Level]:
    """1, 2, 4 … users."""
    return [at(level, 2**rung, value) for rung, value in enumerate(tokens_per_s)]


def at_rate(level: Level, asked: float, served: float) -> Level:
    return replace(at(level, 1, 16 * served), load=OpenLoad(asked, "poisson"))


def test_a_ladder_that_gains_goes_on(level: Level) -> None:
    for rungs in range(6):
        assert stop_after(RULES, ladder(level, 32, 64, 128, 200, 230)[:rungs], 60.0) is None


def test_two_steps_in_a_row_that_gain_nothing_end_it_and_are_told(level: Level) -> None:
    levels = ladder(level, 32, 64, 65, 65.2)
    assert stop_after(RULES, levels[:3], 60.0) is None
    assert stop_after(RULES, levels, 60.0) == (
        "gain",
        "throughput gained under 5% twice in a row: +1.6% at 4 users and +0.3% at 8 users",
    )
    assert stop_after(replace_gain(0.003), levels, 60.0) is None
    assert stop_after(replace_gain(None), levels, 60.0) is None


def replace_gain(share: float | None) -> StopRules:
    return RULES.model_copy(update={"gain_share": share})


def test_losing_is_gaining_nothing(level: Level) -> None:
    assert stop_after(RULES, ladder(level, 32, 64, 60, 50), 0.0) == (
        "gain",
        "throughput gained under 5% twice in a row: −6.2% at 4 users and −16.7% at 8 users",
    )


def test_one_bad_level_does_not_end_it(level: Level) -> None:
    assert stop_after(RULES, ladder(level, 32, 64, 64, 100), 0.0) is None
    assert stop_after(RULES, ladder(level, 32, 31, 60, 61), 0.0) is None


def test_levels_of_few_requests_say_nothing_of_the_gain(level: Level) -> None:
    levels = ladder(level, 32, 64, 64, 64)
    levels[1] = at(level, 2, 64, ok=10)
    assert stop_after(RULES, levels, 0.0) is None
    assert stop_after(RULES, [*ladder(level, 32, 32, 32), at(level, 8, 32, ok=10)], 0.0) is None


def test_steps_too_small_to_gain_so_much_need_only_half_of_what_they_add(level: Level) -> None:
    load_and_tokens = [(100, 1000.0), (104, 1030.0), (108, 1060.0)]
    assert stop_after(RULES, [at(level, users, tokens) for users, tokens in load_and_tokens], 0.0) is None
    flat = [at(level, users, 1000.0) for users, _ in load_and_tokens]
    assert stop_after(RULES, flat, 0.0) is not None


def test_a_list_that_goes_down_again_gains_nothing_and_goes_on(level: Level) -> None:
    assert stop_after(RULES, [at(level, users, 64.0) for users in (8, 4, 2)], 0.0) is None


def test_answers_in_one_piece_gain_in_requests(level: Level) -> None:
    empty = replace(level.latency_ms["ttft"]["service"], n=0)
    whole = replace(level, latency_ms=level.latency_ms | {"ttft": {"service": empty, "response": empty}})
    levels = [
        replace(rung, throughput=rung.throughput | {"output_tokens_per_s": tokens})
        for rung, tokens in zip(ladder(whole, 32, 32, 32), (1.0, 2.0, 4.0), strict=True)
    ]
    assert (stop_after(RULES, levels, 0.0) or ("", ""))[0] == "gain"


def test_rates_that_the_throughput_no_longer_follows_end_a_ladder_of_rates(level: Level) -> None:
    followed = [at_rate(level, rate, rate) for rate in (1.0, 2.0, 4.0)]
    assert stop_after(RULES, followed, 0.0) is None
    lost = [at_rate(level, rate, min(rate, 4.1)) for rate in (2.0, 4.0, 8.0, 16.0)]
    assert stop_after(RULES, lost, 0.0) == (
        "gain",
        "throughput gained under 5% twice in a row: +2.5% at 8/s poisson and +0.0% at 16/s poisson",
    )


def test_a_load_that_changes_has_no_gain(level: Level) -> None:
    shaped = ShapedLoad(4.0, "poisson", "open", None, (Leg("ramp", 1.0, 7.0, 10.0),))
    assert stop_after(RULES, [replace(rung, load=shaped) for rung in ladder(level, 32, 32, 32)], 0.0) is None


def test_a_missed_slo_ends_it_where_it_is_firm(level: Level) -> None:
    missed = SloClause("e2e.p95", "service", "ms", 400.0, 500.0, 160, "fail", None)
    found = stop_after(RULES, [replace(level, slo=(*level.slo, missed))], 0.0)
    assert found == ("slo", "the SLO is missed at 1 user: E2E p95 is 500 ms, the limit 400 ms (160 requests)")
    undecided = replace(missed, result="undecided")
    assert stop_after(RULES, [replace(level, slo=(undecided,))], 0.0) is None


def test_an_slo_missed_beyond_doubt_ends_it_though_requests_are_few(tmp_path: Path) -> None:
    few = told(tmp_path, planned(Closed(8), 5.0), Machine(slots=1), {"ttft": {"p90": "300ms"}})
    assert few.requests.ok < FLOORS["p90"]
    rule, because = stop_after(RULES, [few], 0.0) or ("", "")
    assert rule == "slo"
    assert because.startswith("the SLO is missed at 8 users: TTFT p90: at least ")
    assert because.endswith(" requests took longer than 300 ms")


def test_too_many_failures_end_it(level: Level) -> None:
    failing = replace(level, requests=replace(level.requests, attempted=60, ok=48))
    found = stop_after(RULES, [failing], 0.0)
    assert found == ("error_rate", "12 of 60 requests failed at 1 user: 20%, over 10%")
    assert stop_after(RULES.model_copy(update={"error_rate": 0.2}), [failing], 0.0) is None


def test_an_open_loop_over_its_capacity_ends_it(level: Level) -> None:
    over = replace(at_rate(level, 8.0, 4.0), road=Road("over_capacity", "4 more in flight every second"))
    found = stop_after(RULES, [over], 0.0)
    assert found == ("over_capacity", "over capacity: 4 more in flight every second")
    assert stop_after(RULES, [replace(over, road=Road("undecided", "short"))], 0.0) is None


def test_a_target_that_is_not_well_ends_it(level: Level) -> None:
    found = stop_after(RULES, [replace(level, target=replace(level.target, state="wedged"))], 0.0)
    assert found == ("degraded", "the target was wedged after it")
    assert stop_after(RULES, [replace(level, target=replace(level.target, state=None))], 0.0) is None


def test_the_time_of_a_stage_ends_it(level: Level) -> None:
    timed = RULES.model_copy(update={"time_s": 600.0})
    assert stop_after(timed, [level], 599.0) is None
    assert stop_after(timed, [level], 612.0) == ("time", "the stage has taken 612 s, and its time is 600 s")


def test_the_gravest_is_told_and_rules_that_are_off_are_not_held(level: Level) -> None:
    missed = SloClause("e2e.p95", "service", "ms", 400.0, 500.0, 160, "fail", None)
    bad = replace(
        level,
        slo=(missed,),
        requests=replace(level.requests, attempted=60, ok=48),
        road=Road("over_capacity", "4 more in flight every second"),
        target=replace(level.target, state="degraded"),
    )
    rules = RULES
    for rule, off in (("degraded", False), ("error_rate", None), ("over_capacity", False), ("slo", False)):
        assert (stop_after(rules, [bad], 0.0) or ("", ""))[0] == rule
        rules = rules.model_copy(update={rule: off})
    assert stop_after(rules, [bad], 0.0) is None
    assert stop_after(NONE, [bad], 1e9) is None


def test_the_first_level_that_went_well_before_a_bad_one_does_not_matter_the_last_does(level: Level) -> None:
    failing = replace(level, requests=replace(level.requests, attempted=60, ok=48))
    assert stop_after(RULES, [failing, level], 0.0) is None
