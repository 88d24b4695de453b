"""The search for the largest load within the SLO: on made-up margins, and against queueing theory in virtual time."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadbench.analysis.findings import Probe, Result, Search
from loadbench.analysis.search import (
    FARTHEST,
    MOST_CONFIRMATIONS,
    MOST_LOWEST,
    MOST_PROBES,
    Bounds,
    conclude,
    next_step,
    probe_of,
)
from loadbench.analysis.stats import Distribution
from loadbench.analysis.summary import Caution, Level, Road, SloClause
from loadbench.records import Closed, Open
from tests import virtual
from tests.played import Machine, searched, told

USERS = Bounds("max-concurrency", 1, 256, 0.05)
RATE = Bounds("max-rate", 0.5, 256.0, 0.05)
Margin = Callable[[float], float | None]


def search(bounds: Bounds, margin: Margin, decided: Callable[[float], bool] = lambda load: True) -> Search:
    """A whole search against made-up margins; None is over capacity."""
    probes: list[Probe] = []
    while step := next_step(bounds, probes):
        value = margin(step.load)
        result: Result = "fail" if value is None or value < 0 else "pass"
        if not decided(step.load):
            result = "undecided"
        cut = None if value is None else max(-FARTHEST, min(FARTHEST, value))
        probes.append(Probe(len(probes), step.load, step.purpose, result, cut, "ttft.p95", "as made up"))
        assert len(probes) <= MOST_PROBES + MOST_CONFIRMATIONS
    return conclude(bounds, "m:1", probes, True)


def up_to(truth: float) -> Margin:
    """A latency that grows as the load does and reaches its limit at ``truth``."""
    return lambda load: math.log(truth / load)


def wall(truth: float) -> Margin:
    """One that does not grow at all until there is no more capacity."""
    return lambda load: 0.5 if load <= truth else None


@pytest.mark.parametrize("users", [1, 2, 3, 4, 5, 7, 8, 15, 16, 19])
def test_the_most_users_are_found_to_the_one_where_one_is_more_than_the_resolution(users: int) -> None:
    for margin in (up_to(users + 0.5), wall(users)):
        found = search(USERS, margin)
        assert (found.result, found.answer, found.failed) == ("confirmed", users, users + 1)
        assert len(found.probes) <= 13


def test_the_answer_is_the_last_level_which_is_fresh_and_called_a_confirmation() -> None:
    found = search(USERS, up_to(12.5))
    assert [p.purpose for p in found.probes].count("confirmation") == 1
    assert found.probes[-1].purpose == "confirmation"
    assert found.because == f"confirmed by level {found.probes[-1].level}: as made up"


def test_the_estimate_is_where_the_fit_crosses_the_limit() -> None:
    found = search(RATE, up_to(17.0))
    assert found.estimate == pytest.approx(17.0, rel=0.01)


def test_a_fit_closes_the_bracket_in_fewer_levels_than_halving() -> None:
    """From 16 to 32 to 1 % halving takes seven; a wall leaves nothing else."""
    narrow = replace(RATE, low=16.0, high=32.0, resolution=0.01)
    fitted, halved = ([p.load for p in search(narrow, of(23.4)).probes] for of in (up_to, wall))
    assert len(halved) == 2 + 7 + 1
    assert len(fitted) <= 2 + 4 + 1


def test_a_target_that_carries_the_most_allowed_is_told_as_unbounded_after_a_fresh_level_at_it() -> None:
    found = search(Bounds("max-concurrency", 1, 48, 0.05), up_to(1000.0))
    assert (found.result, found.answer, found.failed) == ("unbounded", 48, None)
    assert [p.load for p in found.probes] == [1, 2, 4, 8, 16, 32, 48, 48]
    assert found.because == "the most that was allowed, confirmed by level 7: as made up"


def test_a_target_that_misses_it_at_the_least_load_ends_the_search_there() -> None:
    found = search(RATE, up_to(0.1))
    assert (found.result, found.answer, len(found.probes)) == ("none", None, 2)
    assert found.because == "missed at 0.5/s, the least that was allowed (level 0): as made up"


def test_the_least_load_that_passes_and_then_fails_its_confirmation_is_undecided() -> None:
    answers = iter([0.1, -1.0, -0.1])
    found = search(USERS, lambda load: next(answers))
    assert [p.load for p in found.probes] == [1, 2, 1]
    assert (found.result, found.answer) == ("undecided", None)
    assert (
        found.because
        == "at 1 user, the least that was allowed, it passed in level 0 and failed in level 2 (as made up)"
    )


def test_the_least_load_that_fails_once_is_tried_again_before_no_load_is_said_to_do() -> None:
    cold = iter([-0.05])
    found = search(USERS, lambda load: next(cold, math.log(4.5 / load)))
    assert [p.load for p in found.probes[:3]] == [1, 1, 1]
    assert (found.result, found.answer) == ("confirmed", 4)
    twice = iter([-0.05, 0.1, -0.05])
    found = search(USERS, lambda load: next(twice))
    assert [p.load for p in found.probes] == [1, 1, 1]
    assert (found.result, found.answer) == ("undecided", None)


def test_a_firm_result_outranks_what_was_undecided_at_the_same_load() -> None:
    """A probe of too few requests is undecided; the confirmation at its load is twice as long, and firm."""
    probes: list[Probe] = []
    while step := next_step(USERS, probes):
        margin = math.log(5.2 / step.load)
        told = step.purpose == "confirmation" or margin < -0.3
        result: Result = "undecided" if not told else "pass" if margin >= 0 else "fail"
        probes.append(Probe(len(probes), step.load, step.purpose, result, margin, "ttft.p95", "as made up"))
    found = conclude(USERS, "m:1", probes, True)
    assert (found.result, found.answer) == ("confirmed", 5)
    assert [p.purpose for p in probes].count("confirmation") == 1


def test_the_estimate_lies_within_what_passed_and_what_failed() -> None:
    """The fit goes through means, and may cross the limit beyond a load that failed."""
    told: list[tuple[float, Result, float]] = [
        (12, "pass", 0.5),
        (13, "fail", -0.01),
        (13.5, "pass", 0.4),
        (14, "fail", -0.5),
    ]
    probes = [Probe(i, load, "probe", result, margin, None, "") for i, (load, result, margin) in enumerate(told)]
    found = conclude(RATE, "m:1", probes, False)
    assert (found.passed, found.failed) == (12, 13)
    assert found.estimate == 13


def test_a_confirmation_that_fails_steps_down_and_is_tried_again() -> None:
    seen: dict[float, int] = {}

    def optimistic_once(load: float) -> float:
        seen[load] = seen.get(load, 0) + 1
        return math.log((12.5 if seen[load] == 1 else 10.5) / load)

    found = search(USERS, optimistic_once)
    confirmations = [p.load for p in found.probes if p.purpose == "confirmation"]
    assert confirmations == [12, 11, 10]
    assert (found.result, found.answer, found.failed) == ("confirmed", 10, 11)


def test_three_failed_confirmations_leave_it_undecided_with_what_was_seen() -> None:
    seen: set[float] = set()

    def never_twice(load: float) -> float:
        first = load not in seen
        seen.add(load)
        return math.log(12.5 / load) if first else -0.1

    found = search(USERS, never_twice)
    assert (found.result, found.answer, found.passed) == ("undecided", None, 9)
    assert found.because.startswith("no fresh level bore one out in 3 tries; passed at 1, 2, 4, 8")


def test_more_load_that_did_better_is_told_and_the_answer_stays_below_it() -> None:
    found = search(USERS, lambda load: 0.3 if load <= 3 or 6 <= load <= 20 else -0.3)
    assert (found.result, found.answer, found.failed) == ("confirmed", 3, 4)
    assert found.odd == ("4 users failed (as made up, level 2) and 8 users passed (as made up, level 3)",)


def test_a_single_load_is_told_as_one() -> None:
    cut = conclude(USERS, "m:1", search(USERS, up_to(12.5)).probes[:1], False)
    assert cut.because == "cut short; passed at 1 user"


def test_loads_that_do_both_near_the_limit_are_not_odd() -> None:
    randomness = random.Random(3)
    found = search(RATE, lambda load: math.log(17.0 / load) + randomness.gauss(0.0, 0.03))
    assert found.result == "confirmed"
    assert found.odd == ()


def test_a_load_that_is_far_from_it_is_not_doubled_once_more() -> None:
    found = search(USERS, lambda load: 0.1 if load <= 8 else -1.0)
    assert max(p.load for p in found.probes) == 16


def test_undecided_loads_show_the_way_and_are_never_the_answer() -> None:
    found = search(USERS, up_to(20.5), decided=lambda load: load <= 12)
    assert found.result == "confirmed"
    assert found.answer == found.passed == 8
    assert "; undecided at 16" in found.because


def test_few_requests_at_little_load_do_not_end_a_search() -> None:
    found = search(USERS, up_to(20.5), decided=lambda load: load >= 6)
    assert (found.result, found.answer) == ("confirmed", 20)


def test_what_is_never_decided_is_undecided() -> None:
    found = search(USERS, up_to(20.5), decided=lambda load: False)
    assert (found.result, found.answer, found.passed, found.failed) == ("undecided", None, None, None)


def test_a_search_that_was_cut_short_says_how_far_it_came() -> None:
    whole = search(USERS, up_to(12.5))
    cut = conclude(USERS, "m:1", whole.probes[:5], False)
    assert (cut.result, cut.answer, cut.passed, cut.failed) == ("undecided", None, 8, 16)
    assert cut.because == "cut short; passed at 1, 2, 4 and 8 users; failed at 16 users"
    nothing = conclude(USERS, "m:1", [], False)
    assert (nothing.result, nothing.because, nothing.probes) == ("undecided", "no level was run", ())


def test_every_step_is_a_function_of_the_probes_so_that_a_run_directory_tells_the_same() -> None:
    whole = search(RATE, up_to(17.0))
    for done in range(len(whole.probes)):
        step = next_step(RATE, whole.probes[:done])
        assert step is not None
        assert (step.load, step.purpose) == (whole.probes[done].load, whole.probes[done].purpose)
    assert next_step(RATE, whole.probes) is None


@settings(deadline=None, max_examples=150)
@given(
    truth=st.floats(0.2, 2000.0),
    steepness=st.floats(0.1, 20.0),
    low=st.sampled_from([0.5, 1.0, 3.0]),
    times=st.sampled_from([1.5, 10.0, 256.0]),
    resolution=st.sampled_from([0.01, 0.05, 0.2]),
    whole=st.booleans(),
)
def test_of_a_margin_that_falls_the_answer_is_right_to_the_resolution(
    truth: float, steepness: float, low: float, times: float, resolution: float, whole: bool
) -> None:
    low = math.ceil(low) if whole else low
    high = math.ceil(low * times) if whole else low * times
    bounds = Bounds("max-concurrency" if whole else "max-rate", low, high, resolution)
    found = search(bounds, lambda load: steepness * math.log(truth / load))
    loads = [p.load for p in found.probes]
    assert all(low <= load <= high for load in loads)
    assert not whole or all(load == int(load) for load in loads)
    probed = [p.load for p in found.probes if p.purpose == "probe"]
    above = [load for load in probed if load > low]  # the least may be tried again
    assert len(set(above)) == len(above)
    assert found.odd == ()
    if truth < low:
        assert (found.result, found.answer) == ("none", None)
    elif truth >= high:
        assert (found.result, found.answer) == ("unbounded", high)
    elif len(probed) < MOST_PROBES:
        assert found.result == "confirmed" and found.answer is not None
        assert found.answer <= truth
        assert truth - found.answer <= max(1.0 if whole else 0.0, resolution * found.answer)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(["pass", "fail", "undecided"]), st.none() | st.floats(-9, 9)), max_size=40))
def test_whatever_the_levels_say_the_search_ends_stays_in_bounds_and_keeps_to_what_passed(
    said: list[tuple[Result, float | None]],
) -> None:
    probes: list[Probe] = []
    while step := next_step(RATE, probes):
        result, margin = said[len(probes)] if len(probes) < len(said) else ("pass", 0.1)
        assert RATE.low <= step.load <= RATE.high
        assert step.purpose == "confirmation" or step.load not in {p.load for p in probes} - {RATE.low}
        probes.append(Probe(len(probes), step.load, step.purpose, result, margin, None, "so"))
        assert len(probes) <= MOST_PROBES + MOST_CONFIRMATIONS + MOST_LOWEST
    found = conclude(RATE, "m:1", probes, True)
    failed = [p.load for p in probes if p.result == "fail"]
    if found.answer is not None:
        assert found.passed is not None and found.answer == probes[-1].load <= found.passed
        assert all(found.answer < load for load in failed if load > RATE.low)


# What a level says.

HALF_A_SECOND = Machine(slots=4)


@pytest.fixture(scope="module")
def level(tmp_path_factory: pytest.TempPathFactory) -> Level:
    """Four users on four slots of half a second; 160 requests, all of 500 ms."""
    one = replace(virtual.level(Closed(4), 20.0), index=3)
    return told(tmp_path_factory.mktemp("level"), one, HALF_A_SECOND, {"e2e": {"p95": "1s"}})


def clause(name: str, limit: float, value: float | None, result: Result, n: int = 100) -> SloClause:
    latency = "." in name
    because = "few" if result == "undecided" else None
    if latency:
        return SloClause(name, "service", "ms", limit, value, n, result, because)
    return SloClause(name, None, "share", limit, value, n, result, because)


def with_e2e(level: Level, clause: SloClause, seen: Distribution) -> Level:
    latency_ms = {**level.latency_ms, "e2e": {**level.latency_ms["e2e"], "service": seen}}
    return replace(level, slo=(clause,), latency_ms=latency_ms)


def test_a_level_that_keeps_every_clause_passes_by_its_narrowest(level: Level) -> None:
    two = (*level.slo, clause("error_rate", 0.1, 0.0, "pass"))
    probe = probe_of(replace(level, slo=two))
    assert (probe.level, probe.load, probe.purpose, probe.result, probe.clause) == (3, 4.0, "probe", "pass", "e2e.p95")
    assert probe.margin == pytest.approx(math.log(2), abs=0.01)
    assert probe.because == "E2E p95 is 500 ms, the limit 1 s (160 requests)"
    assert probe_of(replace(level, purpose="confirmation")).purpose == "confirmation"
    assert probe_of(level, "confirmation").purpose == "confirmation"


def test_one_clause_that_is_missed_fails_a_level(level: Level) -> None:
    probe = probe_of(replace(level, slo=(*level.slo, clause("error_rate", 0.1, 0.25, "fail"))))
    assert (probe.result, probe.clause) == ("fail", "error_rate")
    assert probe.margin == pytest.approx(math.log(0.105 / 0.255))
    assert probe.because == "error rate is 25.0%, the limit 10.0% (100 requests)"


def test_goodput_has_a_margin_by_what_it_leaves_out(level: Level) -> None:
    probe = probe_of(replace(level, slo=(clause("goodput", 0.9, 0.95, "pass"),)))
    assert probe.margin == pytest.approx(math.log(0.105 / 0.055))


def test_margins_are_cut(level: Level) -> None:
    assert probe_of(replace(level, slo=(clause("e2e.p95", 1000.0, 1.0, "pass"),))).margin == FARTHEST
    assert probe_of(replace(level, slo=(clause("e2e.p95", 1.0, 1000.0, "fail"),))).margin == -FARTHEST


def test_over_capacity_and_a_target_that_broke_fail_a_level_and_say_nothing_of_the_margin(level: Level) -> None:
    over = probe_of(replace(level, road=Road("over_capacity", "1.5 more in flight every second")))
    assert (over.result, over.margin, over.because) == ("fail", None, "over capacity: 1.5 more in flight every second")
    broken = probe_of(replace(level, target=replace(level.target, state="degraded")))
    assert (broken.result, broken.margin, broken.because) == ("fail", None, "the target was degraded after it")
    assert probe_of(replace(level, road=Road("undecided", "20 requests"))).result == "pass"


def test_a_level_that_was_cut_short_does_not_pass(level: Level) -> None:
    probe = probe_of(replace(level, complete=False))
    assert (probe.result, probe.because) == ("undecided", "the level was cut short")


def test_a_missed_limit_is_not_the_targets_where_the_client_was_the_limit(level: Level) -> None:
    missed = replace(level, slo=(clause("e2e.p95", 400.0, 500.0, "fail"),), client=replace(level.client, bound=True))
    for state, result in (("degraded", "undecided"), ("wedged", "fail")):
        assert probe_of(replace(missed, target=replace(level.target, state=state))).result == result
    beyond = replace(missed, road=Road("over_capacity", "in flight grew"))
    assert probe_of(beyond).because == "the client was the limit, over capacity: in flight grew"
    assert probe_of(beyond).result == "undecided"
    assert probe_of(missed).result == "undecided"
    assert "the client was the limit" in (probe_of(missed).because or "")


def test_a_percentile_that_is_not_firm_is_undecided_and_its_margin_is_known(level: Level) -> None:
    seen = Distribution(40, p50=500.0, p90=600.0, p95=800.0, max=900.0, indicative=("p90", "p95"))
    probe = probe_of(with_e2e(level, clause("e2e.p95", 1000.0, 800.0, "undecided", 40), seen))
    assert (probe.result, probe.because) == ("undecided", "E2E p95: few")
    assert probe.margin == pytest.approx(math.log(1000 / 800))
    few = Distribution(8, p50=500.0, max=2000.0, indicative=("p50",))
    assert probe_of(with_e2e(level, clause("e2e.p95", 1000.0, None, "undecided", 8), few)).margin == pytest.approx(
        math.log(1000 / 2000)
    )


def test_a_clause_that_is_missed_beyond_doubt_fails_it_with_its_reason(level: Level) -> None:
    seen = Distribution(40, p50=1100.0, p90=1200.0, p95=1300.0, max=1400.0, indicative=("p90", "p95"))
    missed = replace(clause("e2e.p95", 1000.0, 1300.0, "fail", 40), because="at least 21 of 40 requests took longer")
    probe = probe_of(with_e2e(level, missed, seen))
    assert (probe.result, probe.because) == ("fail", "E2E p95: at least 21 of 40 requests took longer")
    assert probe.margin == pytest.approx(math.log(1000 / 1300))


def test_a_level_that_fails_whatever_its_latency_has_no_margin(level: Level) -> None:
    failed = replace(clause("e2e.p95", 1000.0, 500.0, "fail"), because="720 of 868 requests failed")
    probe = probe_of(replace(level, slo=(failed,)))
    assert (probe.result, probe.margin, probe.because) == ("fail", None, "E2E p95: 720 of 868 requests failed")


def test_no_failure_at_all_is_no_distance_from_a_limit_on_failures(level: Level) -> None:
    """Of few requests half a failure is most of 1 %: the nearest limit would be the one that is never met."""
    far = (clause("e2e.p95", 1000.0, 400.0, "pass"), clause("error_rate", 0.01, 0.0, "pass", 71))
    probe = probe_of(replace(level, slo=far))
    assert probe.clause == "e2e.p95"
    assert probe.margin == pytest.approx(math.log(2.5))
    assert probe_of(replace(level, slo=(clause("goodput", 0.9, 1.0, "pass"),))).margin is None
    assert probe_of(replace(level, slo=far[1:])).margin is None


def test_failures_for_which_the_slo_sets_no_limit_are_told_with_a_pass(level: Level) -> None:
    some = replace(level, requests=replace(level.requests, attempted=1260, ok=900))
    assert probe_of(some).result == "pass"
    assert (
        probe_of(some).because == "E2E p95 is 500 ms, the limit 1 s (160 requests), while 360 of 1,260 requests failed"
    )
    limited = replace(some, slo=(*some.slo, clause("error_rate", 0.5, 0.29, "pass")))
    assert "failed" not in (probe_of(limited).because or "")


def test_a_machine_that_others_used_is_told_with_what_it_showed(level: Level) -> None:
    reason = "other programs used 66% of this machine's CPU"
    busy = replace(level, cautions=(Caution("busy_machine", "m:1 at 4 users", reason, "close them"),))
    told = f"E2E p95 is 500 ms, the limit 1 s (160 requests), while {reason}"
    assert (probe_of(busy).result, probe_of(busy).because) == ("pass", told)


def test_a_level_without_an_slo_says_nothing(level: Level) -> None:
    assert probe_of(replace(level, slo=())).result == "undecided"


# Against queueing theory.


@pytest.mark.parametrize("slots", [1, 4, 16])
def test_on_k_slots_the_most_users_are_those_who_wait_for_whole_rounds_within_the_limit(
    tmp_path: Path, slots: int
) -> None:
    """Half a second for each round of ``slots``: within 3.3 s there are six rounds and no seventh."""
    bounds = replace(USERS, low=2 * slots, high=12 * slots)
    found = searched(tmp_path, bounds, Machine(slots), {"e2e": {"p95": "3.3s"}}, seed=1, seconds=15, requests=150)
    assert found.result == "confirmed" and found.answer is not None
    assert 6 * slots / 1.05 - 1 <= found.answer <= 6 * slots
    assert found.failed is not None and found.failed > 6 * slots


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_highest_rate_of_a_single_server_is_found_within_a_tenth_of_the_truth(tmp_path: Path, seed: int) -> None:
    """M/M/1: the response time is exponential with mean 1/(μ - λ), so its p95 is ln(20)/(μ - λ)."""
    served_per_s, limit_s = 20.0, 0.3
    truth = served_per_s - math.log(20) / limit_s
    machine = Machine(1, service_s=0.05, chance="exponential")
    bounds = Bounds("max-rate", 4.0, 16.0, 0.05)
    found = searched(tmp_path, bounds, machine, {"e2e": {"p95": "300ms"}}, seed=seed, seconds=15, requests=2000)
    assert found.result == "confirmed"
    assert found.answer == pytest.approx(truth, rel=0.1)


def test_loads_are_tried_from_small_to_large_and_then_only_inside_the_bracket() -> None:
    found = search(RATE, up_to(17.0))
    loads = [p.load for p in found.probes]
    top = loads.index(max(loads))
    assert all(lower < higher for lower, higher in pairwise(loads[: top + 1]))
    assert all(found.probes[top - 2].load < load < loads[top] for load in loads[top + 1 :])
    assert Open(loads[-1]).rate_per_s == found.answer


def test_a_pass_on_fewer_requests_than_tell_its_error_rate_says_so(level: Level) -> None:
    """Of 160 none fails at 1 % by chance in 20 of 100, at 2 % in 4."""
    rate = SloClause("error_rate", None, "share", 0.01, 0.0, 160, "pass", None)
    told = probe_of(replace(level, slo=(rate,)))
    assert told.result == "pass"
    assert (told.because or "").endswith(", while 160 requests hardly tell the error rate; 300 tell it")
    assert "hardly" not in (probe_of(replace(level, slo=(replace(rate, limit=0.02),))).because or "")
