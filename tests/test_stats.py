"""Percentiles, and how sure we are of them."""

from __future__ import annotations

import numpy as np
import pytest

from loadbench.analysis.stats import FLOORS, LEASTS, Floats, describe, describe_hdr, floor_of, nearest_rank
from loadbench.hdr import Hdr

MS = 1e6


def milliseconds(*values: float) -> Floats:
    return np.array(values, dtype=np.float64) * MS


def up_to(n: int) -> Floats:
    """1, 2, … n ms, shuffled."""
    return np.random.default_rng(1).permutation(np.arange(1, n + 1)) * MS


def test_the_floors_are_those_of_the_one_sided_99_percent_argument() -> None:
    assert FLOORS == {"p50": 11, "p90": 64, "p95": 130, "p99": 662, "p99_9": 6636}


def test_under_the_floor_a_percentile_can_be_told_from_one_over_one_minus_p() -> None:
    assert LEASTS == {"p50": 2, "p90": 10, "p95": 20, "p99": 100, "p99_9": 1000}


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95])
def test_at_the_floor_two_samples_lie_beyond_the_true_quantile_in_99_of_100_draws(share: float) -> None:
    randomness = np.random.default_rng(7)
    beyond = (randomness.random((20_000, floor_of(share))) > share).sum(axis=1)
    assert (beyond >= 2).mean() >= 0.989


@pytest.mark.parametrize(
    ("share", "n", "rank"),
    [(0.5, 10, 5), (0.5, 11, 6), (0.99, 100, 99), (0.999, 1000, 999), (0.07, 100, 7), (0.5, 1, 1)],
)
def test_the_rank_is_the_nearest_whatever_floats_say(share: float, n: int, rank: int) -> None:
    assert nearest_rank(share, n) == rank


def test_percentiles_are_values_that_occurred_in_milliseconds() -> None:
    told = describe(up_to(10_000))
    assert (told.p50, told.p90, told.p95, told.p99, told.p99_9) == (5_000, 9_000, 9_500, 9_900, 9_990)
    assert (told.n, told.min, told.max, told.mean) == (10_000, 1, 10_000, 5_000.5)
    assert told.indicative == ()


@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_a_percentile_is_firm_from_its_floor_and_indicative_just_under_it(name: str, floor: int) -> None:
    assert name not in describe(up_to(floor)).indicative
    under = describe(up_to(floor - 1))
    assert name in under.indicative
    assert under.value(name) is not None
    assert under.firm(name) is None


@pytest.mark.parametrize(("name", "least"), LEASTS.items())
def test_a_percentile_on_too_few_samples_is_absent(name: str, least: int) -> None:
    assert describe(up_to(least)).value(name) is not None
    under = describe(up_to(least - 1))
    assert under.value(name) is None
    assert name not in under.indicative


def test_no_samples_leave_everything_absent_and_nothing_zero() -> None:
    told = describe(milliseconds())
    assert told.n == 0
    assert [told.mean, told.min, told.p50, told.p99_9, told.max, told.p99_all] == [None] * 6


def test_absent_values_do_not_count() -> None:
    told = describe(milliseconds(1, float("nan"), 3))
    assert (told.n, told.mean) == (2, 2)


def test_failures_count_as_infinite_in_p99_all_alone() -> None:
    without, few, many = (describe(up_to(1_000), failed) for failed in (0, 5, 20))
    assert without.p99_all == without.p99 == 990
    assert few.p99 == many.p99 == 990
    assert few.p99_all == 995  # the 995th of 1,005
    assert many.p99_all == "inf"
    assert describe(milliseconds(), failed=200).p99_all == "inf"


def test_p99_all_is_marked_and_left_out_like_any_percentile() -> None:
    assert describe(up_to(90), failed=9).p99_all is None
    told = describe(up_to(90), failed=10)
    assert told.p99_all == "inf"
    assert "p99_all" in told.indicative


def test_a_histogram_is_described_like_its_values() -> None:
    values_ns = np.random.default_rng(3).lognormal(17, 1, 700).astype(np.int64)
    hdr = Hdr()
    hdr.add(values_ns)
    told, exact = describe_hdr(hdr), describe(values_ns.astype(np.float64))
    assert (told.n, told.indicative, told.p99_9) == (exact.n, exact.indicative, None)
    for name in ("mean", "min", "p50", "p90", "p95", "p99", "max"):
        assert told.value(name) == pytest.approx(exact.value(name), rel=1e-3)
    assert describe_hdr(Hdr()) == describe(milliseconds())
