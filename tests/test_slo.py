"""A level held against the SLO: what is firm, what is missed beyond doubt, and what no latency makes good."""

from __future__ import annotations

from typing import Any

import pytest

from loadbench.analysis.slo import judge
from loadbench.analysis.stats import Distribution
from loadbench.analysis.summary import Requests, SloClause
from loadbench.scenario.schema import Slo

NONE = Distribution(0)
WELL = Requests(100, 100, {})
MOSTLY_FAILED = Requests(868, 148, {"http_5xx": 720})
FAST = Distribution(148, p50=50.0, p90=140.0, p95=150.0, max=160.0)


def judged(slo: dict[str, Any], seen: Distribution, requests: Requests = WELL, **more: Any) -> tuple[SloClause, ...]:
    latency_ms = {metric: {"service": seen, "response": NONE} for metric in ("ttft", "e2e")}
    share = more.pop("goodput_share", None)
    return judge(Slo.model_validate(slo), requests, latency_ms, share, "service", None, **more)


def of(slo: dict[str, Any], seen: Distribution, requests: Requests = WELL, **more: Any) -> tuple[str, str | None]:
    (clause,) = judged(slo, seen, requests, **more)
    return clause.result, clause.because


def test_a_lower_percentile_that_is_firm_and_above_the_limit_fails_a_higher_one() -> None:
    p95 = {"e2e": {"p95": "1s"}}
    seen = Distribution(100, p50=500.0, p90=1100.0, p95=1200.0, max=1300.0, indicative=("p95",))
    assert of(p95, seen) == ("fail", "at least 11 of 100 requests took longer than 1 s")
    only_p95 = Distribution(100, p50=500.0, p90=999.0, p95=1200.0, max=1300.0, indicative=("p95",))
    assert of(p95, only_p95) == ("undecided", "100 samples; p95 is firm from 130")


def test_a_few_requests_of_which_far_too_many_were_slow_fail_it() -> None:
    """Five of eight above a p95: by chance in 1 of 60,000. One of 20 is as it should be."""
    p95 = {"e2e": {"p95": "1s"}}
    eight = Distribution(8, p50=1500.0, max=2000.0, indicative=("p50",))
    assert of(p95, eight) == ("fail", "at least 5 of 8 requests took longer than 1 s")
    twenty = Distribution(20, p50=500.0, p90=600.0, p95=1100.0, max=1100.0, indicative=("p90", "p95"))
    assert of(p95, twenty)[0] == "undecided"


def test_few_requests_never_pass() -> None:
    fast = Distribution(60, p50=10.0, p90=11.0, p95=12.0, max=13.0, indicative=("p90", "p95"))
    assert of({"e2e": {"p90": "1s"}}, fast) == ("undecided", "60 samples; p90 is firm from 64")


def test_most_failed_is_no_pass_however_fast_the_others_were() -> None:
    slo = {"ttft": {"p90": "300ms"}}
    assert of(slo, FAST, MOSTLY_FAILED) == ("fail", "720 of 868 requests failed")
    assert of(slo, NONE, Requests(40, 0, {"http_5xx": 40})) == ("fail", "40 of 40 requests failed")


def test_more_failed_than_a_percentile_leaves_out_is_no_pass_once_chance_is_ruled_out() -> None:
    slo = {"ttft": {"p90": "300ms"}}
    assert of(slo, FAST, Requests(200, 148, {"http_5xx": 52})) == ("fail", "52 of 200 requests failed")
    assert of(slo, FAST, Requests(165, 148, {"http_5xx": 17})) == ("pass", None)
    assert of(slo, FAST, Requests(200_000, 100_000, {"http_5xx": 100_000}))[0] == "fail"


def test_an_slo_that_says_how_many_may_fail_is_taken_at_its_word() -> None:
    allowed = judged({"ttft": {"p90": "300ms"}, "error_rate": "90%"}, FAST, MOSTLY_FAILED)
    assert [clause.result for clause in allowed] == ["pass", "pass"]
    missed = judged({"ttft": {"p90": "300ms"}, "goodput": "90%"}, FAST, MOSTLY_FAILED, goodput_share=0.17)
    assert [clause.result for clause in missed] == ["pass", "fail"]


@pytest.mark.parametrize(("state", "result"), [(None, "pass"), ("healthy", "pass"), ("degraded", "fail")])
def test_a_target_that_was_not_well_afterwards_kept_nothing(state: str | None, result: str) -> None:
    clauses = judged({"ttft": {"p90": "300ms"}, "error_rate": "1%"}, FAST, WELL, state=state)
    assert {clause.result for clause in clauses} == {result}
    assert {clause.because for clause in clauses} == {
        "the target was degraded after it" if state == "degraded" else None
    }


def test_a_value_over_its_limit_is_told_by_the_value_though_the_target_broke_too() -> None:
    slow = Distribution(148, p50=500.0, p90=900.0, p95=950.0, max=960.0)
    assert of({"ttft": {"p90": "300ms"}}, slow, state="degraded") == ("fail", None)
