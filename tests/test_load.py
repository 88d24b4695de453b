"""The two loops, on a virtual clock: what is due when, who waits for whom, and how a level ends."""

import asyncio
from itertools import count

import numpy as np

from loadbench.engine.load import GONE_AFTER, PAUSE_AFTER_LOSS_NS, Issuing
from loadbench.records import Closed, Open, Sample
from loadbench.scenario.arrivals import schedule
from tests.virtual import level, play


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
    assert ended_s < GONE_AFTER / 4 * (PAUSE_AFTER_LOSS_NS / 1e9 + 0.002)


def test_refusals_with_answers_between_them_do_not_end_the_level() -> None:
    world, issuing, _ = play(
        level(Closed(1), 60.0), 0.1, outcome=lambda request: "ok" if request.seq % 5 == 0 else "connect_refused"
    )
    assert issuing.reason == "duration"
    assert len(world.samples) > 5 * GONE_AFTER


def test_a_failure_never_stops_the_level() -> None:
    world, issuing, _ = play(level(Closed(2), 5.0), 0.1, outcome=lambda request: "http_5xx")
    assert (len(world.samples), issuing.reason) == (100, "duration")


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
