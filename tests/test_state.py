"""The state a target is in after a level, named from evidence of the canary and of the level itself."""

from __future__ import annotations

from typing import Any

import pytest

from loadbench.records import Sample
from loadbench.target.state import DEAD, Evidence, judge
from loadbench.target.target import Target
from tests.asking import ask_once, faking


def canary(outcome: str = "ok") -> Sample:
    nothing: dict[str, Any] = dict.fromkeys(Sample._fields)
    return Sample(**{**nothing, "sent_ns": 0, "done_ns": 210_000_000, "outcome": outcome})


@pytest.mark.parametrize("outcome", ["engine_failed", "engine_capacity", "http_5xx", "connection_lost", "truncated"])
def test_a_level_that_failed_by_the_servers_doing_is_not_healthy_though_a_canary_passes(outcome: str) -> None:
    state, words = judge(Evidence(canary(), {outcome: 12}, attempted=12))
    assert state == "degraded"
    assert words == ["a canary answered in 0.21 s", f"12 of 12 requests failed (12 {outcome})"]


@pytest.mark.parametrize(
    ("failed", "state"),
    [
        ({"http_5xx": 6}, "healthy"),  # half is not more than half
        ({"http_5xx": 4, "engine_failed": 3}, "degraded"),
        ({"http_4xx": 12}, "healthy"),
        ({"first_token_deadline": 12}, "healthy"),  # overload, and it is over
        ({"out_of_memory": 12}, "oom_reported"),
        ({"dropped": 10, "http_5xx": 2}, "degraded"),  # what was never sent says nothing of the server
        ({}, "healthy"),
    ],
)
def test_with_a_canary_answered_it_takes_more_than_half_of_what_was_sent(failed: dict[str, int], state: str) -> None:
    assert judge(Evidence(canary(), failed, attempted=12))[0] == state


@pytest.mark.parametrize(
    ("failed", "state", "words"),
    [
        ({}, "healthy", []),
        ({"dropped": 12}, "healthy", []),
        ({"http_4xx": 3}, "healthy", []),
        ({"http_5xx": 1}, "degraded", ["1 of 12 requests failed (1 http_5xx)"]),
        ({"first_token_deadline": 2}, "degraded", ["2 of 12 requests failed (2 first_token_deadline)"]),
        ({"censored": 12}, "degraded", ["none of 12 requests succeeded"]),
    ],
)
def test_without_a_canary_the_level_itself_is_the_evidence(
    failed: dict[str, int], state: str, words: list[str]
) -> None:
    assert judge(Evidence(None, failed, attempted=12)) == (state, ["no canary was sent", *words])


def test_a_level_that_ended_because_nobody_was_there_any_more_leaves_the_target_unreachable() -> None:
    state, words = judge(Evidence(None, {"connect_refused": 20}, attempted=100, ended_by="target_died"))
    assert state == "unreachable" and state in DEAD
    assert words[-1] == "20 of 100 requests failed (20 connect_refused)"


def test_a_target_that_was_gone_and_answers_again_is_not_healthy() -> None:
    seen = Evidence(canary(), {"connect_refused": 20}, attempted=100, ended_by="target_died")
    assert judge(seen)[0] == "degraded"
    assert judge(Evidence(canary(), {}, pid_before=7, pid_after=8, ended_by="target_died"))[0] == "restarted"


async def test_a_target_is_judged_by_what_its_level_went_through() -> None:
    async with faking() as server:
        target = await Target.at(server.base_url, "flag", {})
        answered = await ask_once(server.port)
        assert (await target.state(answered, {}, attempted=12, ended_by="requests"))[0] == "healthy"
        assert (await target.state(answered, {"http_5xx": 12}, attempted=12, ended_by="requests"))[0] == "degraded"
    assert (await target.state(None, {"connect_refused": 20}, attempted=20, ended_by="target_died"))[0] == "unreachable"
