"""Arrivals: a schedule has the rate and the randomness asked for, and is the same whenever it is drawn again."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from loadbench.records import Leg, Open
from loadbench.scenario.arrivals import PROCESSES, schedule

NS_PER_S = 1_000_000_000
UP = Leg("ramp", 10.0, 90.0, 400.0)
DOWN = Leg("ramp", 90.0, 10.0, 400.0)
FROM_NOTHING = Leg("ramp", 0.0, 100.0, 400.0)


def opened(rate_per_s: float, arrivals: str, burstiness: float = 0.5, legs: tuple[Leg, ...] = ()) -> Open:
    return Open(rate_per_s, arrivals, burstiness if arrivals == "gamma" else None, legs)


def ramped(ramp: Leg, arrivals: str = "poisson") -> Open:
    return opened((ramp.start + ramp.end) / 2, arrivals, legs=(ramp,))


def due_s(load: Open, duration_s: float | None, seed: int, requests: int | None = None) -> npt.NDArray[np.float64]:
    return np.array(list(schedule(load, duration_s, requests, seed))) / NS_PER_S


def expected_by(ramp: Leg, moments_s: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The integral of the rate: how many requests a ramp has up to each moment, on average."""
    slope = (ramp.end - ramp.start) / ramp.over_s
    return ramp.start * moments_s + slope * moments_s**2 / 2


ALL = [
    Open(50.0, "constant"),
    Open(50.0),
    Open(50.0, "gamma", 0.2),
    Open(50.0, "gamma", 5.0),
    ramped(UP),
    ramped(DOWN, "constant"),
    ramped(FROM_NOTHING, "gamma"),
]


# Constant


def test_constant_arrivals_have_exactly_the_rate_and_begin_at_once() -> None:
    due_ns = list(schedule(Open(8.0, "constant"), duration_s=10, requests=None, seed=1))
    assert len(due_ns) == 80
    assert due_ns == [index * NS_PER_S // 8 for index in range(80)]


def test_constant_arrivals_do_not_drift_in_a_million() -> None:
    due_ns = itertools.islice(schedule(Open(3.0, "constant"), None, None, seed=1), 1_000_000, None)
    assert abs(next(due_ns) - 1_000_000 * NS_PER_S // 3) <= 1


def test_constant_counts_are_not_dispersed_at_all() -> None:
    assert np.bincount(due_s(Open(20.0, "constant"), 100, seed=3).astype(int)).var() == 0


# Poisson


def test_poisson_arrivals_come_at_the_rate() -> None:
    count = len(list(schedule(Open(200.0, "poisson"), duration_s=500, requests=None, seed=42)))
    assert count == pytest.approx(100_000, rel=0.005)


def test_poisson_gaps_are_exponential_from_the_first_on() -> None:
    gaps_s = np.diff(due_s(Open(50.0), None, seed=7, requests=20_000), prepend=0)
    assert stats.kstest(gaps_s, "expon", args=(0, 1 / 50)).pvalue > 0.01


def test_poisson_counts_are_as_dispersed_as_their_mean() -> None:
    per_second = np.bincount(due_s(Open(20.0), 2000, seed=3).astype(int), minlength=2000)
    assert per_second.var() / per_second.mean() == pytest.approx(1, abs=0.1)


# Gamma


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 5.0])
def test_gamma_gaps_have_the_shape_that_burstiness_says_and_keep_the_mean(burstiness: float) -> None:
    gaps_s = np.diff(due_s(Open(50.0, "gamma", burstiness), None, seed=7, requests=20_000))
    assert stats.kstest(gaps_s, stats.gamma(burstiness, scale=1 / (50 * burstiness)).cdf).pvalue > 0.01


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_gamma_counts_are_dispersed_by_one_over_burstiness(burstiness: float) -> None:
    load = Open(100.0, "gamma", burstiness)
    counts = np.concatenate(
        [np.bincount((due_s(load, 1000, seed) / 2).astype(int), minlength=500) for seed in range(4)]
    )
    assert counts.mean() == pytest.approx(200, rel=0.01)
    assert counts.var() / counts.mean() == pytest.approx(1 / burstiness, rel=0.1)


def test_gamma_of_shape_one_is_poisson_from_the_first_request_on() -> None:
    firsts_s = [next(schedule(Open(1.0, "gamma", 1.0), None, None, seed)) / NS_PER_S for seed in range(1000)]
    assert stats.kstest(firsts_s, "expon").pvalue > 0.01


@pytest.mark.parametrize("burstiness", [0.1, 10.0])
def test_a_short_window_of_gamma_arrivals_has_the_mean_rate_too(burstiness: float) -> None:
    """A process that began with an ordinary gap would have 4.5 requests too many at a burstiness of 0.1."""
    counts = [len(due_s(Open(2.0, "gamma", burstiness), 2.5, seed)) for seed in range(4000)]
    assert np.mean(counts) == pytest.approx(5, abs=4 * np.std(counts) / np.sqrt(len(counts)))


# Ramps


@pytest.mark.parametrize("ramp", [UP, DOWN, FROM_NOTHING, Leg("ramp", 50.0, 50.0, 400.0)])
def test_a_poisson_ramp_is_poisson_once_its_clock_runs_with_its_rate(ramp: Leg) -> None:
    gaps = np.diff(expected_by(ramp, due_s(ramped(ramp), ramp.over_s, seed=7)), prepend=0)
    assert len(gaps) == pytest.approx(20_000, abs=4 * np.sqrt(20_000))
    assert stats.kstest(gaps, "expon").pvalue > 0.01


@pytest.mark.parametrize("ramp", [UP, DOWN, FROM_NOTHING])
def test_a_constant_ramp_has_each_request_when_its_number_is_expected(ramp: Leg) -> None:
    moments_s = due_s(ramped(ramp, "constant"), ramp.over_s, seed=1)
    assert len(moments_s) == 20_000
    assert moments_s[0] == 0
    # A nanosecond of rounding is 1e-7 of a request at 100 a second.
    assert np.abs(expected_by(ramp, moments_s) - np.arange(20_000)).max() < 1e-7


def test_a_ramp_that_hardly_rises_loses_no_digits() -> None:
    flat, rising = Open(100.0, "constant"), ramped(Leg("ramp", 100.0, 100.0 + 1e-9, 10.0), "constant")
    assert due_s(rising, 10, seed=1) == pytest.approx(due_s(flat, 10, seed=1), abs=2e-9)


def test_a_ramp_stays_at_its_last_rate_when_min_requests_keeps_it_going() -> None:
    load = ramped(Leg("ramp", 1.0, 4.0, 2.0), "constant")  # 5 requests in 2 s
    due_ns = list(schedule(load, 2.0, None, seed=1, min_requests=9))
    assert due_ns[5:] == [2_000_000_000, 2_250_000_000, 2_500_000_000, 2_750_000_000]


# Legs

DAY = (
    Leg("hold", 0.0, 0.0, 30.0),
    Leg("ramp", 0.0, 40.0, 100.0),
    Leg("spike", 90.0, 90.0, 20.0),
    Leg("hold", 0.0, 0.0, 50.0),
    Leg("ramp", 40.0, 0.0, 100.0),
)


def over(legs: tuple[Leg, ...], arrivals: str = "poisson") -> Open:
    requests = sum((leg.start + leg.end) / 2 * leg.over_s for leg in legs)
    return opened(requests / sum(leg.over_s for leg in legs), arrivals, legs=legs)


def test_a_constant_schedule_over_legs_has_each_request_when_the_rate_has_added_up_to_it() -> None:
    moments_s = due_s(over(DAY, "constant"), 300, seed=1)
    assert len(moments_s) == 2000 + 1800 + 2000
    begin_s, before = 0.0, 0.0
    for leg in DAY:
        here = moments_s[(begin_s <= moments_s) & (moments_s < begin_s + leg.over_s)]
        expected = before + expected_by(leg, here - begin_s)
        assert np.abs(expected - np.arange(round(before), round(before) + len(here))).max(initial=0) < 1e-6
        before += (leg.start + leg.end) / 2 * leg.over_s
        begin_s += leg.over_s
    assert moments_s[0] == 30


def test_a_poisson_schedule_over_legs_is_poisson_in_each_at_its_rate() -> None:
    counts = np.array([np.histogram(due_s(over(DAY), 300, seed), [0, 30, 130, 150, 200, 300])[0] for seed in range(50)])
    assert counts.mean(axis=0) == pytest.approx([0, 2000, 1800, 0, 2000], abs=4 * np.sqrt(2000 / 50))
    assert counts[:, 2].var() == pytest.approx(1800, rel=0.6)


@pytest.mark.parametrize("arrivals", sorted(PROCESSES))
def test_after_a_load_that_ends_at_0_nothing_is_due_for_a_lifetime(arrivals: str) -> None:
    due_ns = list(itertools.islice(schedule(over(DAY, arrivals), None, None, seed=3), 8000))
    assert due_ns == sorted(due_ns)
    assert {due > 100 * 365 * 86_400 * NS_PER_S for due in due_ns if due > 300 * NS_PER_S} == {True}


def test_a_load_that_does_not_end_at_0_goes_on_at_its_last_rate() -> None:
    due_ns = list(schedule(over((Leg("hold", 1.0, 1.0, 2.0), Leg("spike", 4.0, 4.0, 1.0)), "constant"), None, 9, 1))
    assert [due / NS_PER_S for due in due_ns] == [0, 1, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5]


# All of them


@pytest.mark.parametrize("load", ALL, ids=str)
def test_the_mean_over_seeds_is_the_rate_asked_for(load: Open) -> None:
    over_s = load.legs[0].over_s if load.legs else 20.0
    counts = [len(due_s(load, over_s, seed)) for seed in range(100)]
    error = 4 * np.std(counts) / np.sqrt(len(counts)) + 1e-9
    assert np.mean(counts) == pytest.approx(load.rate_per_s * over_s, abs=error)


@pytest.mark.parametrize("load", ALL, ids=str)
def test_a_schedule_ends_with_duration_or_requests_whichever_comes_first(load: Open) -> None:
    assert len(list(schedule(load, duration_s=60, requests=30, seed=1))) == 30
    by_clock = list(schedule(load, duration_s=12, requests=100_000, seed=1))
    assert 0 < len(by_clock) < 2000
    assert by_clock[-1] < 12 * NS_PER_S


def test_min_requests_keeps_a_schedule_going_past_its_duration() -> None:
    due_ns = list(schedule(Open(1.0, "constant"), duration_s=3, requests=None, seed=1, min_requests=10))
    assert len(due_ns) == 10
    assert due_ns[-1] == 9 * NS_PER_S


@settings(deadline=None)  # two busy cores are slow now and then
@given(
    seed=st.integers(0, 2**63 - 1),
    rate_per_s=st.floats(0.001, 100_000),
    arrivals=st.sampled_from(sorted(PROCESSES)),
    burstiness=st.floats(0.001, 1000),
    start=st.none() | st.floats(0, 2),
    over_s=st.floats(0.001, 100_000),
)
def test_the_same_seed_gives_the_same_times_in_order(
    seed: int, rate_per_s: float, arrivals: str, burstiness: float, start: float | None, over_s: float
) -> None:
    """``start``: what part of the mean rate a ramp begins with."""
    end = (2 - (start or 0)) * rate_per_s
    legs = () if start is None else (Leg("ramp", start * rate_per_s, max(end, 1e-6), over_s),)
    load = opened(rate_per_s, arrivals, burstiness, legs)
    first, again = (list(schedule(load, None, 1500, seed)) for _ in range(2))
    assert first == again
    assert first == sorted(first)
    assert first[0] >= 0
    assert all(type(due_ns) is int for due_ns in first)


def test_another_seed_gives_other_times() -> None:
    first, other = (next(schedule(Open(1.0), None, None, seed)) for seed in (1, 2))
    assert first != other


@pytest.mark.parametrize("load", ALL, ids=str)
def test_shards_of_one_schedule_make_it_up_again(load: Open) -> None:
    shards = [itertools.islice(schedule(load, 40, None, seed=5), index, None, 4) for index in range(4)]
    whole = list(schedule(load, 40, None, seed=5))
    assert sorted(itertools.chain(*shards)) == whole
    assert len(whole) > 50
