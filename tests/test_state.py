"""The state a target is in after a level, named from evidence of the canary and of the level itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadbench.records import Sample
from loadbench.target.autopsy import KernelLog, last_words
from loadbench.target.containment import CGROUP_V2, RLIMIT_DATA, Limit
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
        ({"censored": 10, "http_5xx": 2}, "degraded"),  # nor does what the level's end cut off
        ({"censored": 12}, "healthy"),
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


def test_of_requests_that_the_levels_end_cut_off_those_that_ended_are_told_apart() -> None:
    state, words = judge(Evidence(canary(), {"censored": 31, "engine_failed": 1}, attempted=32))
    assert (state, words[-1]) == ("degraded", "1 of 1 request that ended failed (1 engine_failed)")


@pytest.mark.parametrize("outcome", ["engine_failed", "http_5xx", "stream_error"])
def test_no_thread_to_be_had_is_want_of_memory_only_where_allocations_are_made_to_fail(outcome: str) -> None:
    seen = Evidence(canary(), {"censored": 30, outcome: 2}, attempted=32, starved=2)
    state, words = judge(replace(seen, limit=RLIMIT))
    assert state == "oom_reported" and words[1] == "2 requests failed for want of memory and it lives"
    assert [judge(replace(seen, limit=limit))[0] for limit in (CGROUP, None)] == ["degraded"] * 2
    assert judge(replace(seen, exit_code=-6, limit=RLIMIT))[1][-1] == "likely cause: want of memory"
    assert judge(replace(seen, exit_code=-6))[1][-1] == "cause not established"


CGROUP = Limit(CGROUP_V2, 1 << 30, (), folder=Path("cgroup"))
RLIMIT = Limit(RLIMIT_DATA, 1 << 30, (), "no cgroup")
BAD_ALLOC = ("terminate called after throwing an instance of 'std::bad_alloc'",)
NO_THREAD = ("what():  Resource temporarily unavailable",)
UNCOUNTED: dict[str, Any] = {"oom_kills_before": 0, "oom_kills_after": 0}
COUNTED: dict[str, Any] = {"oom_kills_before": 2, "oom_kills_after": 3}
MACHINES: dict[str, Any] = {"machine_oom_kills_before": 2, "machine_oom_kills_after": 3}
KILL_LINE = ("Out of memory: Killed process 7 (python)",)


@pytest.mark.parametrize(
    ("seen", "state", "last"),
    [
        # a kill: only the kernel's own word makes it one for want of memory
        ({"exit_code": -9, **COUNTED}, "oom_killed", "rose from 2 to 3"),
        ({"exit_code": 137, **COUNTED}, "oom_killed", "rose from 2 to 3"),
        ({"exit_code": -9, "kernel_log": KILL_LINE}, "oom_killed", "the kernel's log: Out of memory"),
        ({"exit_code": -9, **UNCOUNTED, **MACHINES}, "crashed", "cause not established"),  # it was another's
        ({"exit_code": -9, **MACHINES}, "crashed", "likely cause: want of memory"),
        ({"exit_code": -9, **UNCOUNTED}, "crashed", "cause not established"),
        ({"exit_code": -9, **UNCOUNTED, "outcomes": {"out_of_memory": 3}}, "crashed", "cause not established"),
        ({"exit_code": -9}, "crashed", "cause not established"),
        # an abort, or another end of its own: signs make it likely, never certain
        ({"exit_code": -6}, "crashed", "cause not established"),
        ({"exit_code": 134, "last_words": BAD_ALLOC}, "crashed", "likely cause: want of memory"),
        ({"exit_code": -6, "outcomes": {"out_of_memory": 3}}, "crashed", "likely cause: want of memory"),
        ({"exit_code": -6, "limit": RLIMIT, "peak_bytes": 1000 << 20}, "crashed", "likely cause: want of memory"),
        ({"exit_code": -6, "limit": RLIMIT, "peak_bytes": 500 << 20}, "crashed", "cause not established"),
        ({"exit_code": -6, "limit": RLIMIT, "last_words": NO_THREAD}, "crashed", "likely cause: want of memory"),
        ({"exit_code": -6, "limit": CGROUP, "last_words": NO_THREAD}, "crashed", "cause not established"),
        ({"exit_code": -6, "last_words": NO_THREAD}, "crashed", "cause not established"),
        ({"exit_code": -11, **COUNTED}, "crashed", "cause not established"),
        ({"exit_code": 1}, "crashed", "cause not established"),
        # asked to end
        ({"exit_code": -15, "outcomes": {"out_of_memory": 3}}, "crashed", "something outside ended it"),
        # not our child: how it ended is its parent's to know
        ({"process": "gone", "pid_before": 7}, "crashed", "cause not established"),
        (
            {"process": "gone", "pid_before": 7, "kernel_log": KILL_LINE},
            "oom_killed",
            "the kernel's log: Out of memory",
        ),
        (
            {"process": "gone", "pid_before": 7, "outcomes": {"out_of_memory": 3}},
            "crashed",
            "likely cause: want of memory",
        ),
        ({"process": "gone", "pid_before": 7, **MACHINES}, "crashed", "likely cause: want of memory"),
    ],
)
def test_a_death_is_named_from_all_that_is_known_and_never_beyond_it(
    seen: dict[str, Any], state: str, last: str
) -> None:
    found, words = judge(Evidence(**{"canary": canary("connection_lost"), "outcomes": {}, **seen}))
    assert found == state and found in DEAD
    assert last in words[-1]


def test_a_death_tells_its_signs_one_by_one() -> None:
    seen = Evidence(
        None,
        {"out_of_memory": 3, "connection_lost": 5},
        exit_code=-6,
        last_words=BAD_ALLOC,
        limit=RLIMIT,
        peak_bytes=1 << 30,
    )
    assert judge(seen)[1] == [
        "the service's process ended: killed by SIGABRT",
        "its last words: terminate called after throwing an instance of 'std::bad_alloc'",
        "3 requests failed for want of memory before",
        "its last words speak of memory",
        "it had been seen to hold 1024 MiB",
        "it ran under a limit of 1024 MiB (RLIMIT_DATA)",
        "likely cause: want of memory",
    ]


def test_a_successor_that_answers_tells_what_the_kernel_did_to_its_predecessor() -> None:
    state, words = judge(Evidence(canary(), {}, pid_before=7, pid_after=8, kernel_log=KILL_LINE))
    assert state == "restarted"
    assert words[-1] == "the kernel's log: Out of memory: Killed process 7 (python)"


@pytest.mark.parametrize("outcome", ["first_token_deadline", "engine_capacity"])
def test_a_status_without_answers_is_a_wedge_and_a_stopped_process_is_told(outcome: str) -> None:
    assert judge(Evidence(canary(outcome), {}, answers_status=True))[0] == "wedged"
    state, words = judge(Evidence(canary(outcome), {}, answers_status=False, process="stopped"))
    assert (state, words[1]) == ("unreachable", "its process is stopped")


def test_the_last_words_of_a_log_are_those_of_its_end_or_of_memory() -> None:
    log = "".join(f"[info] request {n}\n" for n in range(100)) + "[error] std::bad_alloc\n" * 40
    assert last_words(log + "terminate called\n[info] bye\n") == ("[error] std::bad_alloc", "terminate called")
    assert last_words("") == ()


def test_a_kernel_log_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    log = KernelLog(str(tmp_path / "kmsg"))
    assert log.absent is not None and log.absent.endswith("kmsg: No such file or directory")
    assert log.kills_of(7) == ()


def test_the_kernels_log_names_the_killed(tmp_path: Path) -> None:
    # A file with records of /dev/kmsg as they came here: what is there before is skipped.
    path = tmp_path / "kmsg"
    path.write_bytes(b"6,900,1,-;oom-kill:constraint=CONSTRAINT_MEMCG,task_memcg=/x,task=python,pid=28714,uid=0\n")
    log = KernelLog(str(path))
    with path.open("ab") as kernel:
        kernel.write(
            b"3,901,12972049424,-;Memory cgroup out of memory: Killed process 28714 (python) total-vm:1885104kB, "
            b"anon-rss:1045132kB, file-rss:39992kB, shmem-rss:0kB, UID:0 pgtables:2460kB oom_score_adj:0\n"
        )
    assert log.kills_of(28714) == ("Memory cgroup out of memory: Killed process 28714 (python)",)
    assert log.kills_of(2871) == ()
    assert len(log.kills_of(28714)) == 1  # what was read once is kept
    log.close()


async def test_a_target_is_judged_by_what_its_level_went_through() -> None:
    async with faking() as server:
        target = await Target.at(server.base_url, "flag", {})
        answered = await ask_once(server.port)
        assert (await target.state(answered, {}, attempted=12, ended_by="requests"))[0] == "healthy"
        assert (await target.state(answered, {"http_5xx": 12}, attempted=12, ended_by="requests"))[0] == "degraded"
    assert (await target.state(None, {"connect_refused": 20}, attempted=20, ended_by="target_died"))[0] == "unreachable"
