"""What the target's memory did, told from run directories: verdicts, streams and tokens, leaks, recoveries."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from loadbench.analysis import memory_fit, memory_leak, verdict
from loadbench.analysis.findings import Memory
from loadbench.analysis.memory_fit import Rung
from loadbench.analysis.rundir import read
from loadbench.analysis.stats import Floats
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Level, Summary
from loadbench.analysis.words import size
from loadbench.records import Ask, Closed, Open
from loadbench.target.memory import MemoryWatch
from tests.asking import ask, client_to
from tests.rundirs import MIB, Held, Planned, write_run

KIB = 1 << 10
GIB = 1 << 30
UNTIL_FAILURE = {"stages": [{"memory": {"until": "failure"}}]}
DEAD = ("the service's process ended: killed by SIGABRT", "likely cause: want of memory")


def told(path: Path, levels: list[Planned], **facts: Any) -> Summary:
    return summarise(read(write_run(path, levels, **facts)))


def only(path: Path, held: Held | None, **planned: Any) -> Level:
    [level] = told(path, [Planned(Closed(2), memory=held, **planned)]).levels
    return level


def rung(users: int, tokens: int, peak: int, **more: Any) -> Planned:
    """A rung in a fresh process of 80 MiB."""
    load = Closed(users, ask=Ask(tokens - 64, 64))
    return Planned(load, duration_s=3.0, memory=Held(80 * MIB, peak, peak - MIB), **more)


def arithmetic(users: int, tokens: int) -> int:
    return 82 * MIB + users * (300 * KIB + tokens * 16 * KIB)


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [(999, "999 B"), (1000, "0.977 KiB"), (999 * KIB, "999 KiB"), (1004 * MIB, "0.98 GiB"), (2.5 * GIB, "2.5 GiB")],
)
def test_a_size_has_three_digits_and_none_more_before_its_point(size_bytes: float, words: str) -> None:
    assert size(size_bytes) == words


RUNGS = [(1, 320), (2, 320), (4, 320), (1, 1088), (2, 1088), (4, 1088)]


def abouts(level: Level) -> set[str]:
    return {caution.about for caution in level.cautions}


# --- a level ----------------------------------------------------------------------------------------------------------


def test_a_run_without_memory_events_keeps_what_its_levels_say(tmp_path: Path) -> None:
    memory = only(tmp_path, None).memory
    assert memory is not None
    assert (memory.of, memory.before_bytes, memory.peak_bytes) == ("rss", 120 * MIB, 140 * MIB)
    assert (memory.verdict, memory.exact) == ("fits", False)


def test_without_a_single_figure_the_verdict_is_undecided(tmp_path: Path) -> None:
    path = write_run(tmp_path, [Planned(Closed(1))])
    lines = (path / "telemetry.jsonl").read_text().replace(f"{120 * MIB}", "null").replace(f"{140 * MIB}", "null")
    (path / "telemetry.jsonl").write_text(lines.replace(f"{130 * MIB}", "null"))
    summary = summarise(read(path))
    memory = summary.levels[0].memory
    assert memory is not None
    assert (memory.of, memory.peak_bytes, memory.verdict) == (None, None, "undecided")
    assert summary.memory == ()


def test_a_torn_line_and_readings_between_levels_are_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path, [Planned(Closed(1), memory=Held(100 * MIB, 110 * MIB, 105 * MIB))])
    with (path / "telemetry.jsonl").open("a") as file:
        file.write('{"t_ns": 99, "event": "memory", "level": null, "rss_bytes": 999999999999}\n')
        file.write('{"t_ns": 99, "event": "memory", "level": 0, "rss_by')
    run = read(path)
    assert run.torn == {"telemetry.jsonl": 1}
    memory = summarise(run).levels[0].memory
    assert memory is not None
    assert memory.peak_bytes == 110 * MIB


def test_a_high_water_mark_is_exact_and_the_highest_of_readings_is_not(tmp_path: Path) -> None:
    with_mark = only(tmp_path / "a", Held(100 * MIB, 300 * MIB, 120 * MIB)).memory
    without = only(tmp_path / "b", Held(100 * MIB, 300 * MIB, 120 * MIB, mark=False)).memory
    assert with_mark is not None
    assert without is not None
    assert (with_mark.peak_bytes, with_mark.exact, with_mark.after_bytes) == (300 * MIB, True, 120 * MIB)
    assert not without.exact


def gpu(**figures: Any) -> dict[str, Any]:
    return {"gpus": [{"index": 0, "name": "a card", "total_bytes": 8 * GIB, **figures}]}


def test_what_counts_is_the_device_where_the_target_holds_some_of_it(tmp_path: Path) -> None:
    held = Held(200 * MIB, 300 * MIB, 250 * MIB, also=gpu(used_bytes=6 * GIB, process_bytes=5 * GIB))
    memory = only(tmp_path, held).memory
    assert memory is not None
    assert (memory.of, memory.peak_bytes, memory.limit_bytes, memory.exact) == ("gpu", 5 * GIB, 8 * GIB, False)


def test_a_device_that_others_use_is_not_the_targets_memory(tmp_path: Path) -> None:
    memory = only(tmp_path, Held(200 * MIB, 300 * MIB, 250 * MIB, also=gpu(used_bytes=6 * GIB))).memory
    assert memory is not None
    assert (memory.of, memory.peak_bytes) == ("rss", 300 * MIB)


@pytest.mark.parametrize(("figure", "of"), [("footprint_bytes", "footprint"), ("private_bytes", "private")])
def test_every_platform_has_a_figure_of_its_own(figure: str, of: str, tmp_path: Path) -> None:
    memory = only(tmp_path, Held(100 * MIB, 120 * MIB, 110 * MIB, figure=figure, also={"rss_bytes": 90 * MIB})).memory
    assert memory is not None
    assert (memory.of, memory.before_bytes, memory.after_bytes) == (of, 100 * MIB, 110 * MIB)


def test_the_smallest_limit_is_the_limit(tmp_path: Path) -> None:
    held = Held(100 * MIB, 120 * MIB, 110 * MIB, also={"cgroup_limit_bytes": 4 * GIB})
    [level] = told(
        tmp_path, [Planned(Closed(1), memory=held)], memory={"limit": {"kind": "RLIMIT_DATA", "bytes": GIB}}
    ).levels
    assert level.memory is not None
    assert level.memory.limit_bytes == GIB


# --- its verdict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("also", "at_end", "result", "evidence"),
    [
        ({}, {}, "fits", "no failure"),
        ({"pressure_some_share": 0.05, "pressure_scope": "machine"}, {}, "fits", "no failure"),
        ({"pressure_some_share": 0.14, "pressure_scope": "machine"}, {}, "under_pressure", "of the machine waited"),
        ({"pressure_some_share": 0.14, "pressure_scope": "cgroup"}, {}, "under_pressure", "of its cgroup waited"),
        ({"pressure_level": "warn"}, {}, "under_pressure", "pressure was warn"),
        ({"available_bytes": GIB, "total_bytes": 8 * GIB}, {}, "fits", "no failure"),
        (
            {"available_bytes": GIB // 4, "total_bytes": 8 * GIB},
            {},
            "under_pressure",
            "256 MiB were available at least",
        ),
        ({"swap_bytes": 0}, {"swap_bytes": 65 * MIB}, "spills", "swap grew by 65 MiB"),
        ({"swap_bytes": 70 * MIB}, {"swap_bytes": 75 * MIB}, "fits", "no failure"),
        ({"gpu_shared_bytes": 10 * MIB}, {"gpu_shared_bytes": 210 * MIB}, "spills", "grew by 200 MiB"),
        ({"cgroup_oom_kills": 2}, {"cgroup_oom_kills": 3}, "out_of_memory", "1 more"),
    ],
)
def test_a_verdict_has_its_evidence(
    also: dict[str, Any], at_end: dict[str, Any], result: str, evidence: str, tmp_path: Path
) -> None:
    memory = only(tmp_path, Held(100 * MIB, 101 * MIB, 101 * MIB, also=also, at_end=at_end)).memory
    assert memory is not None
    assert memory.verdict == result
    assert any(evidence in line for line in memory.because), memory.because


def test_shared_memory_of_a_gpu_that_has_room_is_no_spill(tmp_path: Path) -> None:
    for place, (used, result) in enumerate(((2 * GIB, "fits"), (7 * GIB, "spills"))):
        also = gpu(used_bytes=used, process_bytes=used) | {"gpu_shared_bytes": 0}
        held = Held(100 * MIB, 101 * MIB, 101 * MIB, also=also, at_end={"gpu_shared_bytes": GIB})
        memory = only(tmp_path / str(place), held).memory
        assert memory is not None
        assert memory.verdict == result


@pytest.mark.parametrize(
    ("state", "evidence", "result"),
    [
        ("crashed", DEAD, "out_of_memory"),
        ("crashed", ("the service's process ended: killed by SIGSEGV", "cause not established"), "undecided"),
        (
            "oom_killed",
            ("its cgroup's count of processes killed for want of memory rose from 0 to 1",),
            "out_of_memory",
        ),
        ("wedged", ("its status route answers",), "undecided"),
    ],
)
def test_a_death_is_for_want_of_memory_only_where_the_evidence_says_so(
    state: str, evidence: tuple[str, ...], result: str, tmp_path: Path
) -> None:
    held = Held(100 * MIB, 101 * MIB, 101 * MIB)
    memory = only(tmp_path, held, state=state, evidence=evidence).memory
    assert memory is not None
    assert memory.verdict == result


def test_the_worst_that_is_true_is_the_verdict_and_all_that_is_true_the_evidence(tmp_path: Path) -> None:
    also = {"swap_bytes": 0, "pressure_level": "critical"}
    held = Held(100 * MIB, 101 * MIB, 101 * MIB, also=also, at_end={"swap_bytes": GIB})
    level = only(tmp_path, held, fails=0.3)
    assert level.memory is not None
    assert level.memory.verdict == "out_of_memory"
    said = " ".join(level.memory.because)
    assert all(words in said for words in ("for want of memory", "critical", "swap grew"))


@pytest.mark.parametrize(
    ("also", "at_end", "about"),
    [
        ({"swap_bytes": 0}, {"swap_bytes": GIB}, "memory_spill"),
        ({"pressure_level": "warn"}, {}, "memory_pressure"),
    ],
)
def test_short_memory_is_a_doubt_about_the_levels_latencies(
    also: dict[str, Any], at_end: dict[str, Any], about: str, tmp_path: Path
) -> None:
    level = only(tmp_path, Held(100 * MIB, 101 * MIB, 101 * MIB, also=also, at_end=at_end))
    assert about in abouts(level)


# --- what a stream and a token take -----------------------------------------------------------------------------------


def fit_of(path: Path, rungs: list[Planned]) -> Memory:
    [memory] = told(path, rungs).memory
    return memory


def value(share: Any) -> float:
    assert share.value_bytes is not None, share.not_told
    return float(share.value_bytes)


def test_base_stream_and_token_are_told_apart_from_rungs_in_fresh_processes(tmp_path: Path) -> None:
    memory = fit_of(tmp_path, [rung(users, tokens, arithmetic(users, tokens)) for users, tokens in RUNGS])
    assert value(memory.base) == pytest.approx(82 * MIB, rel=0.01)
    assert value(memory.per_stream) == pytest.approx(300 * KIB, rel=0.05)
    assert value(memory.per_token) == pytest.approx(16 * KIB, rel=0.01)
    assert memory.levels == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("seed", range(20))
def test_the_interval_of_a_token_holds_the_truth_with_peaks_that_are_off(seed: int) -> None:
    noise = random.Random(seed)
    rungs = [
        Rung(place, users, tokens, tokens, 80 * MIB, arithmetic(users, tokens) + round(noise.gauss(0, 2 * MIB)))
        for place, (users, tokens) in enumerate([*RUNGS, (8, 320), (8, 1088), (4, 4160), (8, 4160)])
    ]
    share = memory_fit.fit(rungs).per_token
    assert share.interval_95 is not None
    low, high = share.interval_95
    assert low - KIB / 4 <= 16 * KIB <= high + KIB / 4  # one in twenty lies outside, by a little
    assert value(share) == pytest.approx(16 * KIB, rel=0.15)


def test_with_one_number_of_tokens_only_the_stream_is_told(tmp_path: Path) -> None:
    memory = fit_of(tmp_path, [rung(users, 320, arithmetic(users, 320)) for users in (1, 2, 4, 8)])
    assert value(memory.per_stream) == pytest.approx(300 * KIB + 320 * 16 * KIB, rel=0.01)
    assert memory.at_tokens == 320
    assert memory.per_token.not_told == "every level asked for as many tokens"


def test_with_one_number_of_users_only_the_token_is_told(tmp_path: Path) -> None:
    memory = fit_of(tmp_path, [rung(4, tokens, arithmetic(4, tokens)) for tokens in (320, 576, 1088, 2112)])
    assert value(memory.per_token) == pytest.approx(16 * KIB, rel=0.01)
    assert memory.per_stream.not_told == "every level had as many streams"


def test_two_loads_tell_nothing(tmp_path: Path) -> None:
    memory = fit_of(tmp_path, [rung(users, 320, arithmetic(users, 320)) for users in (1, 2)])
    assert memory.base.value_bytes is None
    assert memory.per_token.not_told == "2 different loads raised the peak and did not fail; it takes 3"


def test_three_rungs_for_three_unknowns_tell_nothing_either() -> None:
    rungs = [Rung(i, n, t, t, 80 * MIB, arithmetic(n, t)) for i, (n, t) in enumerate(RUNGS[:2] + RUNGS[3:4])]
    assert "3 levels for 3 unknowns" in str(memory_fit.fit(rungs).per_token.not_told)


def test_what_does_not_grow_beyond_its_scatter_is_not_told_from_none() -> None:
    noise = random.Random(4)
    rungs = [Rung(i, n, t, t, 80 * MIB, 90 * MIB + noise.randrange(MIB)) for i, (n, t) in enumerate(RUNGS)]
    found = memory_fit.fit(rungs)
    assert "not told from none" in str(found.per_token.not_told)
    assert value(found.base) == pytest.approx(90.5 * MIB, rel=0.01)


@pytest.mark.parametrize(("reading", "how"), [("asked", "reserved"), ("held", "grows")])
def test_a_reserved_cache_is_told_from_one_that_grows_where_answers_end_early(reading: str, how: str) -> None:
    early = (256, 200, 320, 700, 150, 500)
    rungs = []
    for place, ((users, asked), held) in enumerate(zip(RUNGS, early, strict=True)):
        peak = arithmetic(users, asked if reading == "asked" else held)
        rungs.append(Rung(place, users, asked, held, 80 * MIB, peak))
    found = memory_fit.fit(rungs)
    assert found.allocates == how
    assert value(found.per_token) == pytest.approx(16 * KIB, rel=0.01)


def test_where_every_answer_has_all_that_it_asked_for_nobody_can_tell_how_it_allocates(tmp_path: Path) -> None:
    memory = fit_of(tmp_path, [rung(users, tokens, arithmetic(users, tokens)) for users, tokens in RUNGS])
    assert memory.allocates is None


def test_a_rung_that_failed_for_want_of_memory_is_left_out_and_is_the_first_failure(tmp_path: Path) -> None:
    rungs = [rung(users, tokens, arithmetic(users, tokens)) for users, tokens in RUNGS]
    rungs.append(rung(16, 4160, 500 * MIB, fails=0.5, state="oom_reported"))
    memory = fit_of(tmp_path, rungs)
    assert (memory.first_failure, memory.how) == (6, "as allocation errors that the service survived")
    assert memory.levels == (0, 1, 2, 3, 4, 5)
    assert value(memory.per_token) == pytest.approx(16 * KIB, rel=0.01)


def test_in_one_long_lived_process_only_peaks_above_all_before_count() -> None:
    def kept(place: int, users: int, before: int, peak: int) -> Rung:
        return Rung(place, users, 320, 320, before * MIB, peak * MIB)

    rungs = [
        kept(0, 1, 80, 90),
        kept(1, 2, 89, 100),
        kept(2, 8, 99, 160),
        kept(3, 4, 158, 160),  # it takes what the eight left
        kept(4, 1, 158, 160),
        kept(5, 16, 158, 240),
    ]
    found = memory_fit.fit(rungs)
    assert found.levels == (0, 1, 2, 5)
    assert value(found.per_stream) == pytest.approx(10 * MIB, rel=0.01)


def climbs_in_one_process(users: tuple[int, ...]) -> list[Rung]:
    """Every request keeps 5 MiB; and no stream takes any."""
    rungs, held = [], 45 * MIB
    for place, streams in enumerate(users):
        rungs.append(Rung(place, streams, 40, 40, held, held + streams * 5 * MIB))
        held += streams * 5 * MIB
    return rungs


@pytest.mark.parametrize("users", [(1, 2, 4, 8), (1, 1, 2, 2, 4, 4), (1, 2, 8, 4, 1, 16)])
def test_what_a_process_of_many_levels_kept_is_not_taken_for_what_streams_hold(users: tuple[int, ...]) -> None:
    found = memory_fit.fit(climbs_in_one_process(users))
    assert "kept what earlier ones took" in str(found.per_stream.not_told)
    assert found.base.value_bytes is None
    assert found.levels == ()


def test_levels_that_are_known_to_keep_nothing_for_a_request_tell_their_load_in_one_process() -> None:
    rungs = [Rung(i, n, 40, 40, (80 + 5 * n) * MIB, (80 + 10 * n) * MIB) for i, n in enumerate((1, 2, 4, 8, 16))]
    assert memory_fit.fit(rungs).per_stream.value_bytes is None
    assert value(memory_fit.fit(rungs, leaks_not=True).per_stream) == pytest.approx(10 * MIB, rel=0.01)


def test_peaks_that_lie_on_no_line_have_no_interval() -> None:
    loads = [(users, tokens) for users in (1, 2, 4, 8, 16) for tokens in (320, 1088)]
    rungs = [
        Rung(i, n, t, t, 80 * MIB, 82 * MIB + round((arithmetic(n, t) - 82 * MIB) * (0.3 if n in (2, 8) else 1.0)))
        for i, (n, t) in enumerate(loads)
    ]
    found = memory_fit.fit(rungs)
    assert found.per_token.interval_95 is None
    assert "do not lie on a line" in str(found.base.not_told)


def test_a_server_that_queues_beyond_four_has_no_line_through_its_peaks() -> None:
    loads = [(users, tokens) for users in (1, 2, 4, 8, 16) for tokens in (320, 1088, 4160)]
    rungs = [Rung(i, n, t, t, 80 * MIB, arithmetic(min(n, 4), t)) for i, (n, t) in enumerate(loads)]
    assert memory_fit.fit(rungs).per_token.not_told == (
        "the peaks do not lie on a line: it seems to queue what is beyond 4"
    )


def test_a_climb_of_short_levels_in_one_process_tells_nothing_of_a_stream(tmp_path: Path) -> None:
    levels, held = [], 100
    for users in (1, 2, 4, 8):
        grown = held + 40 * users
        levels.append(Planned(Closed(users), duration_s=4.0, memory=Held(held * MIB, grown * MIB, grown * MIB)))
        held = grown
    memory = fit_of(tmp_path, levels)
    assert memory.per_stream.value_bytes is None
    assert "kept what earlier ones took" in str(memory.per_stream.not_told)


def test_a_fit_to_answers_that_were_cut_off_has_no_interval_and_is_a_doubt(tmp_path: Path) -> None:
    rungs = [
        replace(rung(users, 320, arithmetic(users, 320), fails=1.0, outcome="censored"), state="healthy")
        for users in (1, 2, 4, 8)
    ]
    summary = told(tmp_path, rungs)
    [memory] = summary.memory
    assert memory.allocates != "reserved"
    told_shares = [share for share in (memory.per_stream, memory.per_token) if share.value_bytes is not None]
    assert told_shares
    assert all(
        share.interval_95 is None and "100% of the answers were cut off" in str(share.not_told) for share in told_shares
    )
    [doubt] = [caution for caution in summary.cautions if caution.about == "answers_cut"]
    assert "lengthen the rung" in doubt.advice


def test_the_same_levels_in_fresh_processes_all_count() -> None:
    loads = (1, 2, 8, 4, 1, 16)
    rungs = [Rung(place, users, 320, 320, 80 * MIB, (80 + 10 * users) * MIB) for place, users in enumerate(loads)]
    assert memory_fit.fit(rungs).levels == (0, 1, 2, 3, 4, 5)


def test_max_tokens_of_a_kind_come_from_the_scenario(tmp_path: Path) -> None:
    scenario = {"request": {"max_tokens": 64}, "prompts": [{"name": "chat", "max_tokens": 100}]}
    held = Held(100 * MIB, 110 * MIB, 100 * MIB)
    [level] = told(tmp_path, [Planned(Closed(2), memory=held)], scenario=scenario).levels
    assert level.memory is not None
    assert (level.memory.streams, level.memory.tokens) == (2, 140.0)


def test_a_level_whose_load_took_much_says_so(tmp_path: Path) -> None:
    summary = told(tmp_path, [rung(users, tokens, arithmetic(users, tokens)) for users, tokens in RUNGS])
    memory = summary.levels[5].memory
    assert memory is not None
    assert memory.verdict == "grows"
    assert memory.because == ("69 MiB above the 82 MiB that it takes without load",)


# --- leaks ------------------------------------------------------------------------------------------------------------


def second_by_second(
    growth: Callable[[Floats, np.random.Generator], Floats], seed: int, seconds: int = 30, per_s: int = 20
) -> memory_leak.Kept | str:
    """A level of four users with so many requests a second; ``growth`` in MiB after so many requests."""
    randomness = np.random.default_rng(seed)
    t_ns = np.asarray(np.arange(seconds) * 1e9, np.float64)
    done_ns = np.sort(randomness.uniform(0, seconds * 1e9, seconds * per_s))
    requests = np.searchsorted(done_ns, t_ns).astype(np.float64)
    held = (200 + growth(requests, randomness)) * MIB
    return memory_leak.within(t_ns, held, done_ns, 4, seconds * 1e9, float(held[-1]))


def flat(requests: Floats, randomness: np.random.Generator) -> Floats:
    return randomness.normal(0, 3, requests.size)


def walk(requests: Floats, randomness: np.random.Generator) -> Floats:
    """An allocator that takes and gives back arenas."""
    return np.cumsum(randomness.normal(0, 2, requests.size))


def fills_up(requests: Floats, randomness: np.random.Generator) -> Floats:
    """A cache of 80 MiB that half the level fills."""
    return 80 * (1 - np.exp(-requests / 300)) + randomness.normal(0, 1, requests.size)


def swept(requests: Floats, randomness: np.random.Generator) -> Floats:
    """A heap that is collected whenever it has 40 MiB."""
    return (0.5 * requests) % 40 + randomness.normal(0, 1, requests.size)


def steps_up(requests: Floats, randomness: np.random.Generator) -> Floats:
    """Arenas of 64 MiB, taken once each."""
    return 64 * np.floor(requests / 250) + randomness.normal(0, 1, requests.size)


@pytest.mark.parametrize("growth", [flat, walk, fills_up, swept, steps_up])
def test_a_healthy_target_leaks_in_none_of_twenty_runs(growth: Callable[..., Floats]) -> None:
    found = [second_by_second(growth, seed) for seed in range(20)]
    assert [kept for kept in found if not isinstance(kept, str)] == []


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_is_found_under_noise_within_a_tenth(seed: int) -> None:
    def leaks(requests: Floats, randomness: np.random.Generator) -> Floats:
        return 1.0 * requests + randomness.normal(0, 3, requests.size)

    kept = second_by_second(leaks, seed)
    assert not isinstance(kept, str)
    assert kept.bytes_each == pytest.approx(MIB, rel=0.1)
    assert kept.low <= MIB <= kept.high


def test_what_is_given_back_after_the_drain_was_in_use() -> None:
    t_ns, done_ns = (np.asarray(np.arange(n) * each_ns, np.float64) for n, each_ns in ((30, 1e9), (600, 5e7)))
    held = np.asarray((200 + np.arange(30) * 10.0) * MIB, np.float64)
    found = memory_leak.within(t_ns, held, done_ns, 4, 30e9, 210.0 * MIB)
    assert isinstance(found, str)
    assert "given back after the drain" in found


def leaking(levels: int, users: tuple[int, ...], each: int) -> list[Planned]:
    """Levels of 15 s without readings, each of which keeps so much; some 65 requests a level."""
    made, now = [], 100
    for number in range(levels):
        made.append(
            Planned(Closed(users[number % len(users)]), memory=Held(now * MIB, (now + each) * MIB, (now + each) * MIB))
        )
        now += each
    return made


def without_readings(path: Path) -> Path:
    lines = (path / "telemetry.jsonl").read_bytes().splitlines(keepends=True)
    (path / "telemetry.jsonl").write_bytes(b"".join(line for line in lines if b'"memory","level"' not in line))
    return path


def test_levels_of_one_load_that_each_keep_as_much_leak(tmp_path: Path) -> None:
    summary = summarise(read(without_readings(write_run(tmp_path, leaking(6, (2,), 60)))))
    [memory] = summary.memory
    requests = sum(level.requests.attempted for level in summary.levels[1:])
    assert value(memory.leak_per_1000) == pytest.approx(5 * 60 * MIB / requests * 1000, rel=0.01)
    assert {level.memory.verdict for level in summary.levels if level.memory} == {"leaks"}


def test_memory_kept_by_a_ladder_that_only_climbs_is_its_loads(tmp_path: Path) -> None:
    path = without_readings(write_run(tmp_path, leaking(5, (1, 2, 4, 8, 16), 60)))
    summary = summarise(read(path))
    assert summary.memory[0].leak_per_1000.value_bytes is None
    assert not {level.memory.verdict for level in summary.levels if level.memory} & {"leaks"}


def test_what_leaks_from_level_to_level_is_not_taken_for_what_streams_hold(tmp_path: Path) -> None:
    [memory] = summarise(read(without_readings(write_run(tmp_path, leaking(8, (4, 1, 2, 3), 60))))).memory
    assert memory.leak_per_1000.value_bytes is not None
    assert memory.per_stream.value_bytes is None
    assert memory.levels == ()


def test_a_process_that_was_started_anew_begins_a_new_account(tmp_path: Path) -> None:
    levels = [Planned(Closed(2), memory=Held(100 * MIB, 160 * MIB, 160 * MIB)) for _ in range(6)]
    [memory] = summarise(read(without_readings(write_run(tmp_path, levels)))).memory
    assert memory.leak_per_1000.value_bytes is None


def test_a_leak_within_a_level_is_its_verdict_its_doubt_and_a_sentence(tmp_path: Path) -> None:
    level = Planned(Closed(2), duration_s=300.0, memory=Held(100 * MIB, 400 * MIB, 400 * MIB, noise=MIB))
    summary = told(tmp_path, [level])
    [found] = summary.levels
    assert found.memory is not None
    assert found.memory.verdict == "leaks"
    assert "memory_leak" in abouts(found)
    assert "memory_growth" not in abouts(found)
    assert "It leaks: it keeps " in summary.verdict.text


def test_what_a_short_level_keeps_may_be_a_cache_that_fills_and_its_slope_is_told(tmp_path: Path) -> None:
    level = Planned(Closed(2), duration_s=60.0, memory=Held(100 * MIB, 400 * MIB, 400 * MIB, noise=MIB))
    summary = told(tmp_path, [level])
    [found] = summary.levels
    assert found.memory is not None
    assert found.memory.verdict == "grows"
    assert "leaks" not in summary.verdict.text
    assert value(summary.memory[0].leak_per_1000) == pytest.approx(300 * MIB / found.requests.attempted * 1000, rel=0.1)
    assert "So far it keeps " in summary.verdict.text
    assert "a leak, or a cache that fills" in summary.verdict.text
    [doubt] = [caution for caution in found.cautions if caution.about == "memory_growth"]
    assert "five minutes" in doubt.advice


def test_short_levels_that_agree_leak(tmp_path: Path) -> None:
    levels = [
        Planned(Closed(2), duration_s=60.0, memory=Held(low * MIB, (low + 300) * MIB, (low + 300) * MIB, noise=MIB))
        for low in (100, 400, 700)
    ]
    summary = told(tmp_path, levels)
    assert {level.memory.verdict for level in summary.levels if level.memory} == {"leaks"}
    assert "It leaks" in summary.verdict.text


def test_growth_that_settles_is_no_leak_and_keeps_its_old_doubt(tmp_path: Path) -> None:
    held = Held(100 * MIB, 400 * MIB, 400 * MIB, noise=MIB, settles_s=10.0)
    summary = told(tmp_path, [Planned(Closed(2), duration_s=60.0, memory=held)])
    assert "It leaks" not in summary.verdict.text
    assert "memory_growth" in abouts(summary.levels[0])
    memory = summary.levels[0].memory
    assert memory is not None
    assert memory.because[-1] == "300 MiB more than before at its peak; the levels do not tell for what"


async def kept_by_the_scripted_endpoint(leak_bytes: int) -> memory_leak.Kept | str:
    """What three seconds of four users say of a real process, ten readings a second."""
    words = ("--leak-bytes", f"{leak_bytes}", "--first-token-ms", "20", "--gap-ms", "5", "--until-stdin-closes")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadbench", "fake", *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    address = urlsplit((await process.stdout.readline()).decode().split()[0])
    watch, done_ns, readings = MemoryWatch(process.pid), [], []
    end_ns = perf_counter_ns() + 3_000_000_000
    async with client_to(address.port or 0, model="fake-model:1") as client:

        async def user() -> None:
            while perf_counter_ns() < end_ns:
                done_ns.append((await ask(client)).done_ns)

        async def read_on() -> None:
            while (now_ns := perf_counter_ns()) < end_ns:
                readings.append((now_ns, (await asyncio.to_thread(watch.read)).rss_bytes))
                await asyncio.sleep(0.1)

        await asyncio.gather(read_on(), *(user() for _ in range(4)))
        after = (await asyncio.to_thread(watch.read)).rss_bytes
    process.stdin.close()
    await process.wait()
    t_ns, held = np.array(readings, np.float64).T
    return memory_leak.within(t_ns, held, np.sort(np.array(done_ns, np.float64)), 4, end_ns, float(after or 0))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a page that is not used may leave the resident memory")
async def test_a_leak_of_a_megabyte_a_request_is_found_in_a_real_process_and_none_in_a_healthy_one() -> None:
    leaks, healthy = await asyncio.gather(*map(kept_by_the_scripted_endpoint, (1_000_000, 0)))
    assert not isinstance(leaks, str), leaks
    assert leaks.bytes_each == pytest.approx(1_000_000, rel=0.1)
    assert isinstance(healthy, str), healthy


# --- words ------------------------------------------------------------------------------------------------------------


def test_the_answer_is_a_sentence(tmp_path: Path) -> None:
    rungs = [rung(users, tokens, arithmetic(users, tokens)) for users, tokens in RUNGS]
    rungs.append(rung(16, 4160, 500 * MIB, fails=0.5, state="oom_reported"))
    text = told(tmp_path, rungs, scenario=UNTIL_FAILURE).verdict.text
    assert (
        "On this machine synthetic-edge:1 takes 82 MiB plus 300 KiB a stream (± 0 B) and 16 KiB a token of every stream"
        in text.replace("± 1 B", "± 0 B")
    )
    assert (
        "; at 2,048 tokens 8 streams would need 340 MiB; the first failure came at 16 users × 4,160 tokens, as" in text
    )
    assert "as allocation errors that the service survived." in text


def test_a_fit_of_streams_alone_tells_what_twice_as_many_need(tmp_path: Path) -> None:
    text = told(tmp_path, [rung(users, 320, arithmetic(users, 320)) for users in (1, 2, 4, 8)]).verdict.text
    assert "takes 82 MiB plus 5.29 MiB a stream of 320 tokens" in text
    assert "; 16 such streams would need 167 MiB." in text


def test_a_ladder_that_tells_nothing_says_why(tmp_path: Path) -> None:
    path = write_run(tmp_path, [rung(1, 320, 90 * MIB), rung(2, 320, 95 * MIB)])
    facts = json.loads((path / "run.json").read_text())
    for level in facts["levels"]:
        level["purpose"] = "rung"
    (path / "run.json").write_text(json.dumps(facts))
    text = summarise(read(path)).verdict.text
    assert "What a stream takes is not told: 2 different loads raised the peak and did not fail; it takes 3." in text


def test_rungs_are_no_levels_of_capacity_prefill_slo_or_throughput(tmp_path: Path) -> None:
    plain = [Planned(Closed(users)) for users in (1, 2, 4)]
    rungs = [rung(users, tokens, arithmetic(users, tokens), stage=1) for users, tokens in RUNGS]
    scenario = {"slo": {"ttft": {"p95": "1ms"}}}
    summary = told(tmp_path, plain + rungs, scenario=scenario)
    assert [capacity.levels for capacity in summary.capacity] == [(0, 1, 2)]
    assert all(set(found.prefill.levels + found.decode.levels) <= {0, 1, 2} for found in summary.phases)
    assert [bool(level.slo) for level in summary.levels] == [True] * 3 + [False] * 6
    assert all(level.intervals == () for level in summary.levels[3:])


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("memory_limit", "The memory ladder reached its limit after 2 users × 320 tokens (1.6 GiB held)"),
        ("memory_floor", "The memory ladder was stopped to spare the machine after 2 users"),
        ("memory_failure", "The memory ladder ended in a failure after 2 users"),
        ("target_degraded", "The memory ladder was given up, not for want of memory, after 2 users"),
        ("not_started", "A rung was left out after 2 users"),
    ],
)
def test_why_a_memory_ladder_ended_is_said(rule: str, said: str, tmp_path: Path) -> None:
    rungs = [rung(users, tokens, arithmetic(users, tokens)) for users, tokens in RUNGS]
    left = {"model": "synthetic-edge:1", "stage": 0, "after_level": 1, "rule": rule, "because": "1.6 GiB held"}
    summary = told(tmp_path, rungs, not_run=[{**left, "levels": [4, 5]}])
    assert said in summary.verdict.text
    assert "not run: 2 users × 1,088 tokens and 4 users × 1,088 tokens." in summary.verdict.text


# --- recoveries and exit codes ----------------------------------------------------------------------------------------

CAME_BACK = {
    "event": "recovery",
    "t_ns": 99_000_000_000,
    "level": 0,
    "state": "crashed",
    "restarted": True,
    "lost": 128,
    "back": True,
    "limit_s": 60.0,
    "to_port_s": 0.4,
    "to_status_s": 0.4,
    "to_token_s": 0.9,
    "to_usual_s": 1.3,
    "ttft_before_ms": 12.0,
    "ttft_after_ms": 13.0,
    "rss_before_bytes": 100 * MIB,
    "rss_after_bytes": 101 * MIB,
    "canaries": 2,
}


def recovered(path: Path, **change: Any) -> Summary:
    write_run(path, [rung(4, 364, 500 * MIB, state="crashed", evidence=DEAD, fails=1.0, complete=False)])
    event = {name: what for name, what in (CAME_BACK | change).items() if what is not None}
    with (path / "telemetry.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    return summarise(read(path))


def test_a_recovery_is_told_step_by_step(tmp_path: Path) -> None:
    summary = recovered(tmp_path)
    [back] = summary.recoveries
    assert (back.level, back.to_port_s, back.to_token_s, back.to_ttft_s, back.memory_returned) == (
        0,
        0.4,
        0.9,
        1.3,
        True,
    )
    assert back.told == (
        "crashed at 4 users × 364 tokens, likely cause: want of memory; restarted by us; first good token after 0.9 s;"
        " as fast as before after 1.3 s; 128 requests lost"
    )
    assert f"The target: {back.told}." in summary.verdict.text


def test_a_target_that_stays_away_says_what_came_last(tmp_path: Path) -> None:
    gone: dict[str, Any] = dict.fromkeys(("to_port_s", "to_status_s", "to_token_s", "to_usual_s", "rss_after_bytes"))
    [back] = recovered(tmp_path, **gone, restarted=False, lost=1, last_failure="no connection: refused").recoveries
    assert back.to_token_s is None
    assert back.memory_returned is None
    assert back.told.endswith("; not back within 60 s (no connection: refused); 1 request lost")


def test_memory_that_does_not_come_down_again_is_said(tmp_path: Path) -> None:
    [back] = recovered(tmp_path, rss_after_bytes=300 * MIB).recoveries
    assert back.memory_returned is False
    assert back.told.endswith("its memory did not come down again")


def died(path: Path, load: Closed | Open, scenario: dict[str, Any], status: str = "complete") -> Summary:
    held = Held(80 * MIB, 90 * MIB, 90 * MIB)
    dead = Planned(load, duration_s=3.0, memory=held, state="crashed", evidence=DEAD, fails=1.0, complete=False)
    first = Planned(replace(load, concurrency=1) if isinstance(load, Closed) else load, memory=held)
    return told(path, [first, dead], scenario=scenario, status=status)


ASKED = Closed(4, ask=Ask(256, 64))


@pytest.mark.parametrize(
    ("load", "until", "status", "code"),
    [
        (Closed(4), "failure", "complete", 93),
        (ASKED, "failure", "complete", 0),
        (ASKED, "1GiB", "complete", 93),
        (ASKED, "failure", "target_died", 93),
        (ASKED, "failure", "interrupted", 130),
    ],
)
def test_a_death_is_93_unless_it_was_what_the_ladder_asked_for(
    load: Closed, until: str, status: str, code: int, tmp_path: Path
) -> None:
    summary = died(tmp_path, load, {"stages": [{"memory": {"until": until}}]}, status)
    assert verdict.exit_code(summary) == code


def test_the_line_about_93_names_the_level_where_the_run_went_on(tmp_path: Path) -> None:
    summary = died(tmp_path, Closed(4), {"stages": [{}]})
    assert verdict.why(summary, 93) == "target died: crashed at 4 users of synthetic-edge:1"


def test_a_rung_that_its_bound_cut_is_an_answer_and_one_that_failed_otherwise_is_none(tmp_path: Path) -> None:
    for outcome, code in (("censored", 0), ("out_of_memory", 0), ("http_5xx", 94)):
        rungs = [rung(1, 320, 90 * MIB), rung(2, 320, 100 * MIB, fails=1.0, outcome=outcome)]
        rungs[1] = replace(rungs[1], state="healthy")
        summary = told(tmp_path / outcome, rungs, scenario=UNTIL_FAILURE)
        assert verdict.exit_code(summary) == code, outcome


def test_a_ladder_up_to_so_many_bytes_that_could_read_none_is_invalid(tmp_path: Path) -> None:
    rungs = [replace(rung(users, 320, 90 * MIB), memory=None) for users in (1, 2)]
    path = write_run(tmp_path, rungs, scenario={"stages": [{"memory": {"until": "1GiB"}}]})
    lines = (path / "telemetry.jsonl").read_text()
    for known in (120, 130, 140):
        lines = lines.replace(f"{known * MIB}", "null")
    (path / "telemetry.jsonl").write_text(lines)
    summary = summarise(read(path))
    assert verdict.exit_code(summary) == 94
    assert verdict.why(summary, 94).startswith("result invalid: no memory of the target was read")


def test_requests_that_went_with_the_target_were_not_given_up_as_planned(tmp_path: Path) -> None:
    cut = replace(rung(2, 320, 90 * MIB, fails=1.0, outcome="censored"), state="healthy")
    dead = rung(4, 320, 300 * MIB, fails=1.0, outcome="censored", state="oom_killed")
    text = told(tmp_path, [cut, dead], scenario=UNTIL_FAILURE).verdict.text
    assert "2 of 6 requests were given up at the end of their rung, as planned." in text
    assert "4 of 6 requests were lost when the target died." in text


def test_a_kill_by_the_kernel_is_said_in_few_words(tmp_path: Path) -> None:
    rungs = [rung(1, 320, 90 * MIB), rung(4, 320, 300 * MIB, fails=1.0, state="oom_killed", evidence=DEAD)]
    left = {"model": "synthetic-edge:1", "stage": 0, "after_level": 1, "rule": "memory_failure"}
    because = "the target is oom_killed: the service's process ended: killed by SIGKILL; it held 512 MiB"
    summary = told(tmp_path, rungs, scenario=UNTIL_FAILURE, not_run=[{**left, "levels": [], "because": because}])
    assert "after 4 users × 320 tokens (killed by the kernel for want of memory)" in summary.verdict.text
    assert "SIGKILL" not in summary.verdict.text


def test_a_failure_that_was_asked_for_is_no_doubt_and_any_other_is(tmp_path: Path) -> None:
    for until, doubts in (("failure", set()), ("1GiB", {"unhealthy_target"})):
        rungs = [rung(1, 320, 90 * MIB), rung(2, 320, 300 * MIB, fails=1.0, state="oom_killed", evidence=DEAD)]
        summary = told(tmp_path / until, rungs, scenario={"stages": [{"memory": {"until": until}}]})
        assert abouts(summary.levels[1]) & {"unhealthy_target"} == doubts


def test_a_ladder_until_failure_that_found_none_says_how_far_it_went(tmp_path: Path) -> None:
    rungs = [replace(rung(users, 320, arithmetic(users, 320)), state="healthy") for users in (1, 2)]
    rungs.append(replace(rung(4, 320, arithmetic(4, 320), fails=1.0, outcome="censored"), state="healthy"))
    text = told(tmp_path, rungs, scenario=UNTIL_FAILURE).verdict.text
    assert "No failure for want of memory up to 4 users × 320 tokens, but 57% of the answers were cut off" in text


def test_a_ladder_until_failure_without_figures_and_without_failure_has_no_answer(tmp_path: Path) -> None:
    for state, code in (("healthy", 94), ("oom_killed", 0)):
        rungs = [replace(rung(users, 320, 90 * MIB), memory=None, state="healthy") for users in (1, 2)]
        rungs[1] = replace(rungs[1], state=state)
        path = write_run(tmp_path / state, rungs, scenario=UNTIL_FAILURE)
        lines = (path / "telemetry.jsonl").read_text()
        for known in (120, 130, 140):
            lines = lines.replace(f"{known * MIB}", "null")
        (path / "telemetry.jsonl").write_text(lines)
        assert verdict.exit_code(summarise(read(path))) == code, state


def test_an_interrupted_rung_accuses_nobody(tmp_path: Path) -> None:
    for status, doubts in (("interrupted", set()), ("complete", {"unhealthy_target"})):
        stopped = rung(8, 320, 120 * MIB, fails=1.0, outcome="censored", state="degraded", complete=False)
        path = write_run(tmp_path / status, [rung(1, 320, 90 * MIB), stopped], status=status)
        if status == "interrupted":
            lines = (path / "telemetry.jsonl").read_text().splitlines()
            ends = [n for n, line in enumerate(lines) if json.loads(line)["event"] == "issue_end"]
            lines[ends[-1]] = json.dumps(json.loads(lines[ends[-1]]) | {"reason": "interrupted"})
            (path / "telemetry.jsonl").write_text("\n".join(lines) + "\n")
        summary = summarise(read(path))
        assert abouts(summary.levels[1]) & {"unhealthy_target"} == doubts
        assert ("8 of 9 requests were cut off with their rung" in summary.verdict.text) is True


def test_a_ladder_that_sent_nothing_says_what_stopped_it(tmp_path: Path) -> None:
    nothing = replace(rung(1, 320, 90 * MIB), complete=False, fails=0.0)
    left = {"model": "synthetic-edge:1", "stage": 0, "after_level": None, "rule": "memory_floor", "levels": []}
    summary = told(tmp_path, [nothing], not_run=[{**left, "because": "19 GiB available, the floor is 500 GiB"}])
    counts = replace(summary.levels[0].requests, attempted=0, ok=0, failed={})
    summary = replace(summary, levels=(replace(summary.levels[0], requests=counts),))
    assert verdict.why(summary, 94) == ("result invalid: no request was sent: 19 GiB available, the floor is 500 GiB")


def test_a_rung_has_no_doubts_about_its_times(tmp_path: Path) -> None:
    summary = told(tmp_path, [rung(4, 320, 300 * MIB, fails=1.0, outcome="censored", state="healthy")])
    assert abouts(summary.levels[0]) == set()
    assert "4 of 4 requests were given up at the end of their rung, as planned." in summary.verdict.text
    assert "failed" not in summary.verdict.text
