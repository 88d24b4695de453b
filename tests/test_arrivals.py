"""Arrivals: a schedule has the rate and the randomness asked for, and is the same whenever it is drawn again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from loadbench.records import Open
from loadbench.scenario.arrivals import PROCESSES, schedule

NS_PER_S = 1_000_000_000


def test_constant_arrivals_have_exactly_the_rate_and_begin_at_once() -> None:
    due_ns = list(schedule(Open(8.0, "constant"), duration_s=10, requests=None, seed=1))
    assert len(due_ns) == 80
    assert due_ns == [index * NS_PER_S // 8 for index in range(80)]


def test_constant_arrivals_do_not_drift_in_a_million() -> None:
    due_ns = itertools.islice(schedule(Open(3.0, "constant"), None, None, seed=1), 1_000_000, None)
    assert abs(next(due_ns) - 1_000_000 * NS_PER_S // 3) <= 1


def test_poisson_arrivals_come_at_the_rate() -> None:
    count = len(list(schedule(Open(200.0, "poisson"), duration_s=500, requests=None, seed=42)))
    assert count == pytest.approx(100_000, rel=0.005)


def test_poisson_gaps_are_exponential_from_the_first_on() -> None:
    due_ns = np.array(list(schedule(Open(50.0), duration_s=None, requests=20_000, seed=7)))
    gaps_s = np.diff(due_ns, prepend=0) / NS_PER_S
    assert stats.kstest(gaps_s, "expon", args=(0, 1 / 50)).pvalue > 0.01


def test_poisson_counts_are_as_dispersed_as_their_mean() -> None:
    due_ns = np.array(list(schedule(Open(20.0), duration_s=2000, requests=None, seed=3)))
    per_second = np.bincount(due_ns // NS_PER_S, minlength=2000)
    assert per_second.var() / per_second.mean() == pytest.approx(1, abs=0.1)


def test_constant_counts_are_not_dispersed_at_all() -> None:
    due_ns = np.array(list(schedule(Open(20.0, "constant"), duration_s=100, requests=None, seed=3)))
    assert np.bincount(due_ns // NS_PER_S).var() == 0


@pytest.mark.parametrize("arrivals", PROCESSES)
def test_a_schedule_ends_with_duration_or_requests_whichever_comes_first(arrivals: str) -> None:
    load = Open(100.0, arrivals)
    assert len(list(schedule(load, duration_s=60, requests=30, seed=1))) == 30
    by_clock = list(schedule(load, duration_s=2, requests=100_000, seed=1))
    assert 100 < len(by_clock) < 300
    assert by_clock[-1] < 2 * NS_PER_S


def test_min_requests_keeps_a_schedule_going_past_its_duration() -> None:
    due_ns = list(schedule(Open(1.0, "constant"), duration_s=3, requests=None, seed=1, min_requests=10))
    assert len(due_ns) == 10
    assert due_ns[-1] == 9 * NS_PER_S


@settings(deadline=None)  # two busy cores are slow now and then
@given(
    seed=st.integers(0, 2**63 - 1),
    rate_per_s=st.floats(0.001, 100_000),
    arrivals=st.sampled_from(sorted(PROCESSES)),
)
def test_the_same_seed_gives_the_same_times_in_order(seed: int, rate_per_s: float, arrivals: str) -> None:
    first, again = (list(schedule(Open(rate_per_s, arrivals), None, 1500, seed)) for _ in range(2))
    assert first == again
    assert first == sorted(first)
    assert first[0] >= 0
    assert all(type(due_ns) is int for due_ns in first)


def test_another_seed_gives_other_times() -> None:
    first, other = (next(schedule(Open(1.0), None, None, seed)) for seed in (1, 2))
    assert first != other


def test_shards_of_one_schedule_make_it_up_again() -> None:
    def draw() -> list[int]:
        return list(schedule(Open(100.0), duration_s=20, requests=None, seed=5))

    shards = [draw()[index::4] for index in range(4)]
    assert sorted(itertools.chain(*shards)) == draw()
