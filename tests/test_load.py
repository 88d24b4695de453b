"""The two loops, on a virtual clock: what is due when, who waits for whom, and how a level ends."""

import asyncio
from collections.abc import Sequence
from itertools import count, pairwise

import numpy as np
import pytest

from loadbench.engine.load import FAILURE_SPACING_NS, GONE_AFTER, Issuing, run_level
from loadbench.records import Closed, Leg, Level, Open, Request, Sample, at
from loadbench.scenario.arrivals import schedule
from tests.virtual import PROMPT, VirtualClock, World, level, play, run


def every(step_s: float) -> "count[float]":
    return count(0.0, step_s)


def p99_s(samples: list[Sample], since: str) -> float:
    latencies = [(s.last_token_ns or 0) - (getattr(s, since) or 0) for s in samples if s.outcome == "ok"]
    return float(np.quantile(latencies, 0.99, method="inverted_cdf")) / 1e9


def test_closed_loop_users_send_their_next_request_when_their_last_is_done() -> None:
    world, issuing, ended_s = play(level(Closed(4), 10.0), 0.5)
    assert len(world.samples) == 4 * 20
    assert world.most_in_flight == 4
    assert (issuing.reason, ended_s) == ("duration", 10.0)
    assert sorted({s.user for s in world.samples if s.user is not None}) == [0, 1, 2, 3]


def test_closed_loop_users_start_one_spacing_apart() -> None:
    world, _, _ = play(level(Closed(5), 1.0, start_spacing_s=0.01), 2.0)
    assert [s.sent_ns for s in world.samples] == [0, 10_000_000, 20_000_000, 30_000_000, 40_000_000]


def test_open_loop_never_waits_for_an_answer() -> None:
    world, issuing, ended_s = play(level(Open(10.0, "constant"), 5.0), 2.95, due_s=every(0.1))
    assert world.most_in_flight == 30
    assert [s.sent_ns for s in world.samples[:3]] == [0, 100_000_000, 200_000_000]
    assert len(world.samples) == 50
    assert (issuing.reason, ended_s) == ("duration", 5.0)


def test_a_schedule_is_kept_to_the_nanosecond_however_long() -> None:
    due_ns = list(zip(range(2000), schedule(Open(200.0, "poisson"), None, None, 7), strict=False))
    world, _, _ = play(level(Open(200.0), 9.0), 0.001, due_s=(ns / 1e9 for _, ns in due_ns))
    by_seq = sorted(world.samples)
    assert [s.due_ns for s in by_seq] == [ns for _, ns in due_ns][: len(by_seq)]
    assert all(0 <= (s.sent_ns or 0) - s.due_ns < 1000 for s in by_seq)


def test_what_fell_due_while_we_stood_still_is_sent_late_and_never_left_out() -> None:
    async def freeze(issuing: Issuing) -> None:
        await asyncio.sleep(4.0)
        issuing.clock.origin_ns -= 1_500_000_000  # the clock jumps: for 1.5 s nobody was there to send

    world, issuing, ended_s = play(level(Open(100.0, "constant"), 5.0), 0.01, due_s=every(0.01), meanwhile=freeze)
    assert (len(world.samples), issuing.reason) == (500, "duration")
    assert ended_s >= 5.5
    assert max((s.sent_ns or 0) - s.due_ns for s in world.samples) >= 1_400_000_000


def test_a_level_stops_at_its_requests_before_its_duration() -> None:
    world, issuing, _ = play(level(Closed(2), 100.0, requests=7), 0.1)
    assert (len(world.samples), issuing.reason) == (7, "requests")
    world, issuing, _ = play(level(Open(10.0, "constant"), 100.0, requests=7), 0.1, due_s=every(0.1))
    assert (len(world.samples), issuing.reason) == (7, "requests")


def test_min_requests_keeps_a_level_going_past_its_duration() -> None:
    world, issuing, ended_s = play(level(Closed(1), 1.0, min_requests=30), 0.1)
    assert (len(world.samples), issuing.reason) == (30, "duration")
    assert ended_s == 3.0


def test_what_is_in_flight_at_the_end_is_drained_and_counts() -> None:
    world, _, ended_s = play(level(Closed(3), 1.0), 0.7)
    assert ended_s == 1.0
    assert [s.outcome for s in world.samples] == ["ok"] * 6
    assert max(s.done_ns or 0 for s in world.samples) == 1_400_000_000


def test_what_the_drain_does_not_finish_is_censored_and_never_forgotten() -> None:
    world, _, _ = play(level(Closed(3), 1.0), 100.0, drain_s=5.0)
    assert [(s.outcome, s.done_ns) for s in world.samples] == [("censored", 6_000_000_000)] * 3


def test_the_valve_drops_what_would_exceed_it_and_says_so() -> None:
    one = level(Open(10.0, "constant"), 2.0, max_in_flight=5)
    world, _, _ = play(one, 1.0, due_s=every(0.1))
    dropped = [s for s in world.samples if s.outcome == "dropped"]
    assert world.most_in_flight == 5
    assert len(world.samples) == 20
    assert len(dropped) == 10 and all(s.sent_ns is None for s in dropped)


def test_the_valve_holds_when_requests_fall_due_together() -> None:
    one = level(Open(5.0, "constant"), 2.0, max_in_flight=2)
    world, _, _ = play(one, 1.0, due_s=iter([0.0] * 5))
    assert world.most_in_flight == 2
    assert sorted(s.outcome for s in world.samples) == ["dropped"] * 3 + ["ok"] * 2


def test_a_target_that_is_gone_ends_the_level() -> None:
    world, issuing, ended_s = play(level(Closed(4), 1000.0), 0.001, outcome=lambda request: "connect_refused")
    assert issuing.reason == "target_died"
    assert GONE_AFTER <= len(world.samples) < GONE_AFTER + 4
    assert ended_s < GONE_AFTER / 4 * (FAILURE_SPACING_NS / 1e9 + 0.002)


def test_refusals_with_answers_between_them_do_not_end_the_level() -> None:
    world, issuing, _ = play(
        level(Closed(1), 60.0), 0.1, outcome=lambda request: "ok" if request.seq % 5 == 0 else "connect_refused"
    )
    assert issuing.reason == "duration"
    assert len(world.samples) > 5 * GONE_AFTER


def test_a_failure_never_stops_the_level() -> None:
    world, issuing, _ = play(level(Closed(2), 5.0), 0.1, outcome=lambda request: "http_5xx")
    assert (len(world.samples), issuing.reason) == (100, "duration")


def test_a_user_whose_request_failed_at_once_does_not_ask_again_at_once() -> None:
    world, _, _ = play(level(Closed(2), 5.0), 0.001, outcome=lambda request: "http_5xx")
    assert len(world.samples) == 2 * 50  # without a pause between them: 10,000
    of_one = sorted(s.sent_ns or 0 for s in world.samples if s.user == 0)
    assert {after - before for before, after in pairwise(of_one)} == {FAILURE_SPACING_NS}
    assert all(s.due_ns == s.sent_ns for s in world.samples)  # the pause is the user's, no lateness of ours


def test_a_failure_that_took_long_enough_is_followed_at_once() -> None:
    world, _, _ = play(level(Closed(1), 5.0), 0.5, outcome=lambda request: "http_5xx")
    assert [s.sent_ns for s in world.samples] == [500_000_000 * place for place in range(10)]


def test_a_limit_ends_a_level_before_its_least_number_of_requests() -> None:
    world, issuing, ended_s = play(level(Closed(1), 1.0, min_requests=30, at_most_s=2.0), 0.1)
    assert (len(world.samples), issuing.reason, ended_s) == (20, "time", 2.0)
    one = level(Open(10.0, "constant"), 1.0, min_requests=30, at_most_s=2.0)
    world, issuing, ended_s = play(one, 0.1, due_s=every(0.1))
    assert (len(world.samples), issuing.reason, ended_s) == (20, "time", 2.0)


def test_a_limit_is_seen_while_every_user_waits() -> None:
    world, issuing, ended_s = play(level(Closed(2), 1.0, min_requests=30, at_most_s=2.0), 50.0, drain_s=100.0)
    assert (len(world.samples), issuing.reason, ended_s) == (2, "time", 2.0)


def test_a_limit_may_come_before_the_duration() -> None:
    closed, opened = level(Closed(1), 5.0, at_most_s=2.0), level(Open(10.0, "constant"), 5.0, at_most_s=2.0)
    for one, due_s in ((closed, None), (opened, every(0.1))):
        world, issuing, ended_s = play(one, 0.1, due_s=due_s)
        assert (len(world.samples), issuing.reason, ended_s) == (20, "time", 2.0)


def test_a_limit_changes_nothing_for_a_level_that_ends_before_it() -> None:
    for at_most_s in (1.0, 2.0):
        _, issuing, ended_s = play(level(Closed(1), 1.0, min_requests=5, at_most_s=at_most_s), 0.1)
        assert (issuing.reason, ended_s) == ("duration", 1.0)
        one = level(Open(10.0, "constant"), 1.0, at_most_s=at_most_s)
        _, issuing, ended_s = play(one, 0.1, due_s=every(0.1))
        assert (issuing.reason, ended_s) == ("duration", 1.0)


def test_a_rung_lasts_until_every_user_has_his_answer_and_each_asks_once() -> None:
    rung = level(Closed(4), None, requests=4, at_most_s=15.0, purpose="rung")
    world, issuing, ended_s = play(rung, lambda request, _: 1.0 + request.seq * 3.0)
    assert [(s.outcome, s.user) for s in world.samples] == [("ok", user) for user in range(4)]
    assert (issuing.reason, ended_s) == ("requests", 10.0)


def test_a_rungs_time_is_its_bound_and_says_so() -> None:
    rung = level(Closed(4), None, requests=4, at_most_s=5.0, purpose="rung")
    world, issuing, ended_s = play(rung, lambda request, _: 1.0 + request.seq * 3.0, drain_s=100.0)
    assert [(s.outcome, s.done_ns) for s in world.samples[:2]] == [("ok", 1_000_000_000), ("ok", 4_000_000_000)]
    assert [(s.outcome, s.done_ns) for s in world.samples[2:]] == [("censored", 5_000_000_000)] * 2
    assert (issuing.reason, ended_s) == ("time", 5.0)


def test_a_rung_that_is_stopped_drains_no_longer_than_its_time() -> None:
    async def stop(issuing: Issuing) -> None:
        await asyncio.sleep(2.0)
        issuing.stop("interrupted")

    rung = level(Closed(2), None, requests=2, at_most_s=5.0, purpose="rung")
    for drain_s, end_s in ((100.0, 5.0), (1.0, 3.0)):
        world, issuing, _ = play(rung, 50.0, drain_s=drain_s, meanwhile=stop)
        assert [s.done_ns for s in world.samples] == [end_s * 1e9] * 2
        assert issuing.reason == "interrupted"


# Loads over time

HOLD, RAMP = Leg("hold", 2, 2, 10), Leg("ramp", 2, 8, 12)
SPIKE, REST, BACK = Leg("spike", 20, 20, 5), Leg("hold", 0, 0, 5), Leg("hold", 3, 3, 8)
DAY = (HOLD, RAMP, SPIKE, REST, BACK)


def users(legs: Sequence[Leg], **options: float) -> Level:
    return level(Closed(round(max(leg.end for leg in legs)), tuple(legs)), sum(leg.over_s for leg in legs), **options)


def in_flight_at(samples: list[Sample], moment_s: float) -> int:
    return sum((s.sent_ns or 0) <= moment_s * 1e9 < (s.done_ns or 0) for s in samples)


def test_users_over_time_are_as_many_as_the_legs_say_and_return_after_a_spike() -> None:
    world, issuing, ended_s = play(users(DAY), 0.05)
    assert (issuing.reason, ended_s) == ("duration", 40.0)
    moments_s = [place / 10 + 0.06 for place in range(399)]
    # Whoever is wanted no more has his last answer within 50 ms; by then the ramp has gone on by 0.025 users.
    for moment_s in moments_s:
        wanted = {int(at(DAY, moment_s - late_s) + 0.5) for late_s in (0.0, 0.05)}
        assert in_flight_at(world.samples, moment_s) in wanted, moment_s
    assert world.most_in_flight == 20
    assert not any(27.0 <= (s.sent_ns or 0) / 1e9 < 32.0 for s in world.samples)


def test_a_user_begins_when_the_ramp_wants_him_to_the_nanosecond() -> None:
    world, _, _ = play(users([Leg("ramp", 0, 10, 10.0)]), 0.01)
    firsts_ns = [min(s.sent_ns or 0 for s in world.samples if s.user == number) for number in range(10)]
    assert firsts_ns == pytest.approx([(number + 0.5) * 1e9 for number in range(10)], abs=1000)
    assert all((s.sent_ns or 0) - s.due_ns < 1000 for s in world.samples)


def test_users_who_are_wanted_at_once_come_one_spacing_apart() -> None:
    world, _, _ = play(users([Leg("hold", 1, 1, 1), Leg("hold", 4, 4, 1)], start_spacing_s=0.1), 0.03)
    firsts_s = [min(s.sent_ns or 0 for s in world.samples if s.user == number) / 1e9 for number in range(4)]
    assert firsts_s == pytest.approx([0.0, 1.1, 1.2, 1.3], abs=1e-5)


def test_a_user_who_is_wanted_all_the_time_is_never_made_to_wait() -> None:
    """Seconds of a moment, and the same moment counted from the second leg on, differ in their last digit."""
    legs = [Leg("hold", 3, 3, 0.1), Leg("ramp", 3, 4, 0.7), Leg("hold", 4, 4, 9.3)]
    world, _, _ = play(users(legs, start_spacing_s=0.5), 0.0137)
    for number in range(3):
        of_one = sorted((s.sent_ns or 0, s.done_ns or 0) for s in world.samples if s.user == number)
        assert max(sent_ns - done_ns for (_, done_ns), (sent_ns, _) in pairwise(of_one)) < 1000


def test_what_was_asked_before_the_load_fell_is_answered() -> None:
    world, _, ended_s = play(users([Leg("hold", 3, 3, 1), Leg("ramp", 1, 0, 2)]), 2.5)
    assert sorted((s.sent_ns, s.outcome) for s in world.samples) == [(0, "ok")] * 3
    assert ended_s == 3.0  # a load that has come to rest lasts its time


def test_shards_of_users_over_time_are_as_many_together() -> None:
    async def main() -> list[Sample]:
        clock = VirtualClock(asyncio.get_running_loop())

        async def serve(request: Request) -> str:
            await asyncio.sleep(0.05)
            return "ok"

        async def shard(index: int) -> list[Sample]:
            world, one = World(clock, serve), users(DAY)
            issuing = Issuing(one.share(index, 3), clock, 0, index, 3)
            asked = (PROMPT for _ in count())
            await run_level(issuing, world, asked, iter(()), drain_s=30.0, on_issue_end=lambda reason: None)
            return world.samples

        return [sample for samples in await asyncio.gather(*map(shard, range(3))) for sample in samples]

    samples = run(main)
    assert [in_flight_at(samples, moment_s) for moment_s in (5.01, 21.51, 24.51, 30.01, 35.01)] == [2, 8, 20, 0, 3]


def test_an_open_loop_that_comes_to_rest_lasts_its_time_and_sends_nothing_more() -> None:
    load = Open(1.0, "constant", legs=(Leg("hold", 2, 2, 5), Leg("hold", 0, 0, 5)))
    due_s = (due_ns / 1e9 for due_ns in schedule(load, None, None, 1))
    world, issuing, ended_s = play(level(load, 10.0), 0.1, due_s=due_s)
    assert (len(world.samples), issuing.reason, ended_s) == (10, "duration", 10.0)


def test_stopping_wakes_a_schedule_that_sleeps() -> None:
    async def interrupt(issuing: Issuing) -> None:
        await asyncio.sleep(2.5)
        issuing.stop("interrupted")

    world, issuing, ended_s = play(level(Open(1.0, "constant"), 3600.0), 0.1, due_s=every(60.0), meanwhile=interrupt)
    assert (len(world.samples), issuing.reason, ended_s) == (1, "interrupted", 2.5)


# The stall demonstration: 10 ms of service, 4 connections, 100 requests a second for 20 s, one stall of 2 s.


def stall(_request: object, now_s: float) -> float:
    """10 ms; who comes during the stall waits for its end first."""
    return 0.010 + max(0.0, 12.0 - now_s) * (10.0 <= now_s < 12.0)


def test_open_loop_response_times_show_the_stall_that_closed_loop_and_service_times_hide() -> None:
    world, _, _ = play(level(Open(100.0, "constant"), 20.0), stall, due_s=every(0.01), connections=4)
    assert len(world.samples) == 2000
    assert 1.75 < p99_s(world.samples, "due_ns") < 1.9
    assert p99_s(world.samples, "sent_ns") < 0.011

    world, _, _ = play(level(Closed(4), 20.0), stall)
    assert p99_s(world.samples, "due_ns") < 0.011
