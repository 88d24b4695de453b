"""Series in the order of time: how they begin, whether they drift, and what chance may have done to them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from loadbench.analysis.interval import LEAST_WORTH, effective_n, intervals, queue_needs
from loadbench.analysis.stats import Floats, Intervals
from loadbench.analysis.steady import LEAST_BINS, Beginning, beginning, drift, mser5, per_second

Randomness = np.random.Generator


@pytest.fixture
def randomness() -> Randomness:
    return np.random.default_rng(20)


def sticky(randomness: Randomness, n: int, phi: float, spread: float = 0.2) -> Floats:
    """Latencies around 1 whose logarithms are AR(1), begun in its steady state."""
    noise = randomness.normal(0, spread * np.sqrt(1 - phi**2), n)
    values = np.empty(n)
    values[0] = randomness.normal(0, spread)
    for i in range(1, n):
        values[i] = phi * values[i - 1] + noise[i]
    result: Floats = np.exp(values)
    return result


def queue(randomness: Randomness, n: int, load: float) -> Floats:
    """Response times of M/M/1 in units of the mean service, after it has settled: Lindley's recursion, summed up."""
    settle = 3_000
    service = randomness.exponential(1, n + settle)
    steps = np.concatenate([[0.0], np.cumsum(service[:-1] - randomness.exponential(1 / load, n + settle)[1:])])
    response: Floats = (steps - np.minimum.accumulate(steps) + service)[settle:]
    return response


# How a level begins


def test_mser5_cuts_off_the_warm_up_and_nothing_else() -> None:
    settled = np.random.default_rng(4).normal(100, 1, 200)
    found = mser5(np.concatenate([np.linspace(300, 100, 40), settled]))
    assert found is not None
    assert 30 <= found <= 45
    assert mser5(np.repeat(100.0, 50)) == 0


def test_mser5_says_when_a_series_never_settled() -> None:
    assert mser5(np.linspace(1, 100, 200)) is None
    assert mser5(np.ones(7)) is None


@pytest.mark.parametrize(
    ("shape", "cut"),
    [(lambda t: 1 + 3 * np.exp(-t / 5), (10, 25)), (lambda t: 1 - 0.8 * np.exp(-t / 10), (10, 40))],
    ids=["slow at first", "fast at first"],
)
def test_a_planted_warm_up_is_found_nine_times_in_ten(
    shape: Callable[[Floats], Floats], cut: tuple[int, int], randomness: Randomness
) -> None:
    grown = shape(np.arange(120.0))
    found = [beginning(sticky(randomness, 120, 0.5, 0.15) * grown) for _ in range(100)]
    cuts = [one.cut for one in found if one is not None and one.cut is not None]
    assert len(cuts) >= 80
    assert cut[0] <= np.median(cuts) <= cut[1]


@pytest.mark.parametrize(("phi", "n"), [(0.0, 30), (0.5, 30), (0.5, 60), (0.5, 300), (0.8, 120), (0.8, 300)])
def test_a_steady_series_has_no_warm_up_in_95_of_100(phi: float, n: int, randomness: Randomness) -> None:
    assert sum(beginning(sticky(randomness, n, phi)) is not None for _ in range(300)) <= 15


def test_mser5_alone_would_cut_a_third_of_all_steady_series(randomness: Randomness) -> None:
    assert sum(mser5(sticky(randomness, 60, 0.5)) != 0 for _ in range(300)) > 100


def test_a_freeze_in_the_middle_is_no_warm_up_though_mser5_would_cut_it_out(randomness: Randomness) -> None:
    frozen = sticky(randomness, 60, 0.3, 0.05)
    frozen[8:11] = 20.0
    assert mser5(frozen) not in (0, 5, 10)
    assert beginning(frozen) is None


def test_what_goes_on_changing_never_settled(randomness: Randomness) -> None:
    found = beginning(np.linspace(100, 200, 60) * sticky(randomness, 60, 0.0, 0.02))
    assert found is not None
    assert found.cut is None
    assert found.first < 110 < 160 < found.rest


def test_a_warm_up_that_does_not_matter_or_too_short_a_series_is_left_alone() -> None:
    assert beginning(np.concatenate([np.repeat(110.0, 10), np.repeat(100.0, 90)])) is None
    assert beginning(np.concatenate([np.repeat(300.0, 5), np.repeat(100.0, LEAST_BINS - 6)])) is None
    clear = np.concatenate([np.repeat(300.0, 10), np.repeat(100.0, 90)])
    assert beginning(clear) == Beginning(10, 300.0, 100.0)


def test_seconds_without_a_request_are_no_zeros() -> None:
    seconds, means = per_second(np.array([1.0, 3.0, 5.0]), np.array([0.1, 0.9, 7.2]))
    assert (seconds.tolist(), means.tolist()) == ([0.0, 7.0], [2.0, 5.0])


def test_drift_is_found_where_there_is_one_and_rarely_where_there_is_none() -> None:
    randomness = np.random.default_rng(6)
    slowing = randomness.lognormal(0, 0.2, 90) * np.linspace(100, 200, 90)
    found = drift(slowing)
    assert found is not None
    assert found.first < 125 < 165 < found.last
    alarms = sum(drift(randomness.lognormal(0, 1, 90)) is not None for _ in range(2_000))
    assert alarms <= 10


def test_drift_is_not_told_from_few_values_or_small_changes() -> None:
    assert drift(np.linspace(100, 200, 32)) is None
    assert drift(np.linspace(100, 110, 300)) is None


# How far chance reaches


def test_effective_n_is_n_for_independent_values_and_less_for_sticky_ones(randomness: Randomness) -> None:
    assert effective_n(randomness.normal(0, 1, 20_000)) == pytest.approx(20_000, rel=0.1)
    # AR(1): n (1 - φ) / (1 + φ)
    assert effective_n(np.log(sticky(randomness, 20_000, 0.8))) == pytest.approx(20_000 / 9, rel=0.2)
    assert effective_n(np.ones(100)) == 100


def coverage(draw: Callable[[], Floats], true: dict[str, float]) -> dict[str, float]:
    """How many of the intervals that were given hold the truth."""
    hits: dict[str, list[bool]] = {name: [] for name in true}
    for _ in range(1_000):
        found = intervals(draw())
        for name, held in hits.items():
            given = getattr(found, name) if isinstance(found, Intervals) else None
            if given is not None:
                held.append(given[0] <= true[name] <= given[1])
    assert all(len(held) >= 700 for held in hits.values())
    return {name: float(np.mean(held)) for name, held in hits.items()}


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7])
def test_intervals_of_a_queue_hold_the_truth_nine_times_in_ten_where_they_are_given(
    load: float, randomness: Randomness
) -> None:
    n, mean = queue_needs(load), 1 / (1 - load)  # response times of M/M/1 are exponential
    true = {"mean": mean, "p50": mean * math.log(2), "p95": mean * math.log(20)}
    held = coverage(lambda: queue(randomness, n, load), true)
    assert min(held.values()) >= 0.9, held


@pytest.mark.parametrize(("phi", "n"), [(0.0, 140), (0.5, 300), (0.8, 1000)])
def test_intervals_of_users_in_closed_loop_hold_the_truth_nine_times_in_ten(
    phi: float, n: int, randomness: Randomness
) -> None:
    true = {"mean": math.exp(0.2**2 / 2), "p50": 1.0, "p95": math.exp(1.6449 * 0.2)}
    held = coverage(lambda: sticky(randomness, n, phi), true)
    assert min(held.values()) >= 0.9, held


def test_an_interval_is_refused_with_its_reason_where_requests_are_too_few_or_too_alike(randomness: Randomness) -> None:
    assert intervals(np.ones(LEAST_WORTH - 1)) == "49 requests; an interval takes 50"
    found = intervals(sticky(randomness, 300, 0.95))
    assert isinstance(found, str)
    assert found.startswith("300 requests are worth ")


def test_p95_has_no_interval_where_too_few_values_lie_above_to_bound_it(randomness: Randomness) -> None:
    found = intervals(randomness.exponential(1, 100))
    assert isinstance(found, Intervals)
    assert found.p50 is not None
    assert found.p95 is None


def test_a_busier_queue_takes_more_requests() -> None:
    assert [queue_needs(load) for load in (0.0, 0.5, 0.7)] == [200, 1800, 6423]
