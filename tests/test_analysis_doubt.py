"""What is doubted of a level, and what is not: warm-up, chance, our own instruments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from loadbench.analysis.rundir import read, read_gaps
from loadbench.analysis.span import span_of
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Caution, Level, Summary
from loadbench.errors import UsageError
from loadbench.records import Closed, Leg, Open
from tests import rundirs
from tests.asking import scripted
from tests.command import ended, started
from tests.rundirs import Planned, write_run

ONE_USER = Planned(Closed(1), model="phi:1")


def told(path: Path) -> Summary:
    return summarise(read(path))


def only(path: Path, level: Planned, **facts: Any) -> Level:
    """The one level of a run."""
    return told(write_run(path, [level], **facts)).levels[0]


def caution(level: Level, about: str) -> Caution:
    """Its caution of this name."""
    (found,) = (caution for caution in level.cautions if caution.about == about)
    return found


def abouts(level: Level) -> set[str]:
    return {caution.about for caution in level.cautions}


def edit(path: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Level:
    """Change every line of a file of JSON lines; returns the first level then."""
    lines = [orjson.loads(line) for line in (path / name).read_bytes().splitlines()]
    for line in lines:
        change(line)
    (path / name).write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return told(path).levels[0]


def edit_client(path: Path, **change: Any) -> Level:
    """Change what telemetry says of the client; returns the first level then."""
    return edit(path, "telemetry.jsonl", lambda line: line.get("client", {}).update(change))


# Warm-up


def test_a_warm_up_is_left_out_of_the_window_and_the_latencies_and_said(tmp_path: Path) -> None:
    level = only(tmp_path, Planned(Closed(1), duration_s=120.0, cold_s=10.0))
    trimmed_s = level.warmup_trimmed_s
    assert trimmed_s in (10.0, 15.0)
    assert level.window_s == 120.0 - trimmed_s
    samples = read(tmp_path).samples
    due_s = samples.due_ns[samples.said(samples.phase, "load")] / 1e9 - level.started_s
    assert level.requests.attempted == due_s.size
    ttft = level.latency_ms["ttft"]["service"]
    assert ttft.n == np.count_nonzero(due_s >= trimmed_s)
    assert ttft.max is not None
    assert ttft.max < 2 * rundirs.FIRST_NS / 1e6
    reason = caution(level, "warmup").reason
    assert f"{trimmed_s:.0f} s are left out of the window and all latencies" in reason
    assert not abouts(level) & {"drift", "never_settled"}


def test_rates_and_gaps_are_of_the_time_after_the_warm_up_too(tmp_path: Path) -> None:
    warm = only(tmp_path / "warm", Planned(Closed(1), duration_s=120.0))
    write_run(tmp_path, [Planned(Closed(1), duration_s=120.0, cold_s=10.0)])
    level = told(tmp_path).levels[0]
    for name in ("output_tokens_per_s", "requests_per_s"):
        assert level.throughput[name] == pytest.approx(warm.throughput[name], rel=0.02)
    assert level.concurrency_reached == pytest.approx(1.0, abs=0.01)
    run = read(tmp_path)
    start_ns = span_of(run, run.levels[0]).start_ns
    # The builder writes one interval for the level, whose middle is after the warm-up; the log of a run has seconds.
    assert read_gaps(run, {0: start_ns})[0]["chat"].total > 0
    assert read_gaps(run, {0: start_ns + 60_000_000_000}) == {0: {}}


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("load", [Closed(1), Closed(8), Open(3.0)], ids=["1 user", "8 users", "3 a second"])
def test_a_healthy_level_loses_nothing(load: Closed | Open, seed: int, tmp_path: Path) -> None:
    planned = [Planned(load, duration_s=seconds) for seconds in (15.0, 60.0)]
    short, long = told(write_run(tmp_path, planned, seed=seed)).levels
    assert (short.warmup_trimmed_s, long.warmup_trimmed_s) == (None, 0.0)
    assert (short.window_s, long.window_s) == (15.0, 60.0)
    assert long.latency_ms["ttft"]["service"].n == long.requests.ok


def test_the_share_that_met_the_slo_is_of_the_time_after_the_warm_up(tmp_path: Path) -> None:
    scenario = {"name": "edge", "warmup": {"requests": 2}, "slo": {"ttft": {"p95": "120ms"}}}
    level = only(tmp_path, Planned(Closed(1), duration_s=120.0, cold_s=10.0), scenario=scenario)
    assert level.warmup_trimmed_s
    assert level.throughput["goodput_share"] == 1.0


def test_no_firm_percentile_is_given_up_for_a_warm_up(tmp_path: Path) -> None:
    level = only(tmp_path, Planned(Closed(1), duration_s=35.0, cold_s=8.0))
    assert level.warmup_trimmed_s == 0.0
    assert level.latency_ms["ttft"]["service"].firm("p95") is not None
    assert "too few requests to leave that out" in caution(level, "warmup_kept").reason


def test_a_freeze_in_the_middle_of_a_level_stays_in_it(tmp_path: Path) -> None:
    def freeze(line: dict[str, Any]) -> None:
        if line["phase"] == "load" and 10e9 <= line["due_ns"] - 2_000_000_000 < 12e9:
            for stamp in ("first_token_ns", "last_token_ns", "done_ns"):
                line[stamp] += 5_000_000_000

    write_run(tmp_path, [Planned(Open(10.0), duration_s=60.0, batches=99)])
    level = edit(tmp_path, "samples.jsonl", freeze)
    assert level.warmup_trimmed_s == 0.0
    assert level.latency_ms["ttft"]["response"].max > 5_000  # type: ignore[operator]


def slow_down(line: dict[str, Any]) -> None:
    """Each request's first token comes half a millisecond later than the one before it."""
    if line["phase"] == "load":
        line["first_token_ns"] += line["seq"] * 500_000


def test_a_level_that_slows_down_inside_says_so(tmp_path: Path) -> None:
    assert abouts(only(tmp_path, Planned(Closed(1), duration_s=29.0))) == set()
    assert abouts(edit(tmp_path, "samples.jsonl", slow_down)) == {"drift"}
    only(tmp_path / "long", Planned(Closed(1), duration_s=60.0))
    level = edit(tmp_path / "long", "samples.jsonl", slow_down)
    assert abouts(level) == {"never_settled"}  # which says it all
    assert level.warmup_trimmed_s == 0.0
    assert level.latency_ms["ttft"]["service"].not_estimable == "the level was not steady"


def test_a_rate_that_changes_by_plan_has_neither_warm_up_nor_drift(tmp_path: Path) -> None:
    ramp = Open(3.0, legs=(Leg("ramp", 1.0, 5.0, 60.0),))
    only(tmp_path, Planned(ramp, duration_s=60.0))
    level = edit(tmp_path, "samples.jsonl", slow_down)
    assert level.warmup_trimmed_s is None
    assert not abouts(level) & {"warmup", "never_settled", "drift"}
    assert level.latency_ms["ttft"]["response"].not_estimable == "the load changes by plan"


# Chance


def test_closed_loop_has_intervals_of_what_its_requests_are_worth(tmp_path: Path) -> None:
    ttft = only(tmp_path, Planned(Closed(1), duration_s=60.0)).latency_ms["ttft"]["service"]
    assert ttft.interval_95 is not None
    assert ttft.not_estimable is None
    for name in ("mean", "p50", "p95"):
        low, high = getattr(ttft.interval_95, name)
        assert low < ttft.value(name) < high
    few = only(tmp_path / "few", Planned(Closed(1), duration_s=5.0)).latency_ms["ttft"]["service"]
    assert few.interval_95 is None
    assert few.not_estimable == "24 requests; an interval takes 50"


def test_open_loop_has_intervals_only_well_below_the_best_throughput_and_with_requests_enough(tmp_path: Path) -> None:
    planned = [Planned(Closed(1)), *(Planned(Open(rate), duration_s=s) for rate, s in ((1.0, 600.0), (1.0, 60.0)))]
    closed, enough, few = told(write_run(tmp_path, [*planned])).levels
    assert closed.throughput["requests_per_s"] == pytest.approx(4.6, abs=0.1)
    assert enough.latency_ms["ttft"]["response"].interval_95 is not None
    because = few.latency_ms["ttft"]["response"].not_estimable
    assert because is not None
    assert "where an interval takes" in because
    _, high = told(write_run(tmp_path / "high", [Planned(Closed(1)), Planned(Open(4.0), duration_s=60.0)])).levels
    because = high.latency_ms["ttft"]["response"].not_estimable
    assert because is not None
    assert because.endswith("of the best throughput seen; intervals hold up to 70%")


def test_gaps_and_what_does_not_exist_have_no_interval(tmp_path: Path) -> None:
    level = only(tmp_path, Planned(Closed(1), duration_s=60.0))
    assert level.latency_ms["gap"]["service"].not_estimable == "gaps are kept as counts, without their order"
    absent = only(tmp_path / "plain", Planned(Closed(1), stream=False)).latency_ms["ttft"]["service"]
    assert (absent.interval_95, absent.not_estimable) == (None, None)


# Failures and freezes


def test_an_unfinished_request_counts_as_infinite_and_is_told(tmp_path: Path) -> None:
    level = only(tmp_path, Planned(Closed(4), duration_s=60.0, fails=0.1, outcome="censored"))
    assert level.latency_ms["ttft"]["service"].p99_all == "inf"
    assert level.latency_ms["ttft"]["service"].p99 is not None
    assert "the percentiles lack these, the slowest: p99_all counts them" in caution(level, "censored").reason


def test_a_freeze_that_the_gaps_hide_is_told_by_the_largest_of_each_request(tmp_path: Path) -> None:
    def freeze(line: dict[str, Any]) -> None:
        if line["phase"] == "load" and line["seq"] % 10 == 0:
            line.update(max_gap_ns=2_000_000_000, stall_ns=2_000_000_000)
            line["last_token_ns"] += 2_000_000_000

    write_run(tmp_path, [Planned(Closed(1), duration_s=60.0)])
    level = edit(tmp_path, "samples.jsonl", freeze)
    assert level.latency_ms["max_gap"]["service"].p95 == 2_000
    assert level.throughput["stalled_share"] == pytest.approx(0.1, abs=0.01)
    # 2 s in one of ten answers of 0.155 s each
    assert level.throughput["stall_time_share"] == pytest.approx(0.2 / (0.2 + 0.155), rel=0.05)
    plain = only(tmp_path / "plain", Planned(Closed(1), stream=False))
    assert plain.throughput["stalled_share"] is plain.throughput["stall_time_share"] is None


# Our own instruments


def test_littles_law_holds_on_a_sound_level_and_accuses_us_where_it_does_not(tmp_path: Path) -> None:
    level = only(tmp_path, ONE_USER)
    assert level.littles_law_error == 0.0
    counted = orjson.loads((tmp_path / "telemetry.jsonl").read_bytes().splitlines()[-1])["client"]["in_flight_ns"]
    for factor in (0.98, 1.02):
        level = edit_client(tmp_path, in_flight_ns=int(counted * factor))
        assert level.littles_law_error == pytest.approx(factor - 1, abs=1e-6)
        assert "littles_law" in abouts(level)
    level = edit_client(tmp_path, in_flight_ns=int(counted * 1.02), loop_lag_p99_ns=5_000_000)
    assert "littles_law" not in abouts(level)  # 2 % of 216 ms is our lateness, not our mistake
    assert "littles_law" not in abouts(edit_client(tmp_path, in_flight_ns=int(counted * 1.005)))


def test_littles_law_counts_the_connecting_that_no_latency_holds(tmp_path: Path) -> None:
    n = only(tmp_path, ONE_USER).requests.attempted
    counted = orjson.loads((tmp_path / "telemetry.jsonl").read_bytes().splitlines()[-1])["client"]["in_flight_ns"]
    edit(tmp_path, "samples.jsonl", lambda line: line.update(connect_ns=10_000_000))
    assert edit_client(tmp_path, in_flight_ns=counted + n * 10_000_000).littles_law_error == 0.0


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_littles_law_holds_on_a_real_run(workers: str, tmp_path: Path) -> None:
    scenario = tmp_path / "s.yaml"
    scenario.write_text(
        "{name: s, request: {max_tokens: 4}, prompts: [{name: hello, text: Hello}], canary: false,"
        " stages: [{concurrency: 4, requests: 16}]}"
    )
    async with scripted(first_token_ms=200, gap_ms=10) as server:
        words = ("run", str(scenario), "--endpoint", server.base_url, "--workers", workers, "--out", "out", "--quiet")
        code, _, error = await ended(await started(*words, cwd=tmp_path))
    assert code == 0, error
    law = told(tmp_path / "out").levels[0].littles_law_error
    assert law is not None
    assert -0.001 < law < 0.1  # above zero by a turn of the loop for each request, of 230 ms


def test_littles_law_is_held_over_all_load_processes_and_not_where_nothing_was_counted(tmp_path: Path) -> None:
    only(tmp_path, ONE_USER)
    client = orjson.loads((tmp_path / "telemetry.jsonl").read_bytes().splitlines()[-1])["client"]
    first = {**client, "in_flight_ns": client["in_flight_ns"] // 3}
    second = {**client, "in_flight_ns": client["in_flight_ns"] - first["in_flight_ns"]}
    assert edit_client(tmp_path, workers=[first, second]).littles_law_error == 0.0
    level = edit_client(tmp_path, workers=None, in_flight_ns=None)
    assert level.littles_law_error is None
    assert "littles_law" not in abouts(level)


@pytest.mark.parametrize(
    ("ceiling", "share"),
    [({"events_per_s": 200.0, "requests_per_s": 1e4}, 0.74), ({"events_per_s": 1e5, "requests_per_s": 6.0}, 0.77)],
    ids=["events", "requests"],
)
def test_a_level_above_half_of_the_calibrated_ceiling_is_client_bound(
    ceiling: dict[str, float], share: float, tmp_path: Path
) -> None:
    calibration = ceiling | {"ttft_error_p99_ms": 0.5}
    level = only(tmp_path, ONE_USER, calibration=calibration)
    assert level.client.ceiling_share == pytest.approx(share, abs=0.01)
    assert level.client.bound is True
    assert "calibrated to take" in caution(level, "client_bound").reason
    two = only(tmp_path / "two", ONE_USER, calibration=calibration, workers=2)
    assert two.client.ceiling_share == pytest.approx(share / 2, abs=0.01)
    assert two.client.bound is False


def test_a_first_token_near_our_own_error_is_told_with_a_calibration_and_not_without(tmp_path: Path) -> None:
    far = {"events_per_s": 1e5, "requests_per_s": 1e4, "ttft_error_p99_ms": 5.9}
    assert "near_the_floor" not in abouts(only(tmp_path / "far", ONE_USER, calibration=far))
    near = only(tmp_path / "near", ONE_USER, calibration=far | {"ttft_error_p99_ms": 6.2})
    assert caution(near, "near_the_floor").reason == "the first-token p50 of 60 ms is under 10 times our error (6.2 ms)"
    assert "near_the_floor" not in abouts(only(tmp_path / "none", ONE_USER, calibration=None))


# Advice


def test_every_caution_comes_with_an_advice(tmp_path: Path) -> None:
    builders = ("closed_ladder", "two_kinds", "failures", "all_failed", "non_streaming", "empty_level", "torn")
    runs = [told(getattr(rundirs, name)(tmp_path / name)) for name in builders]
    runs.append(told(write_run(tmp_path / "odd", [Planned(Closed(1), fails=0.2, outcome="of_the_future")])))
    found = [caution for run in runs for caution in (*run.cautions, *(c for lvl in run.levels for c in lvl.cautions))]
    assert len({caution.about for caution in found}) > 10
    assert [caution for caution in found if not caution.advice] == []


def test_intervals_and_all_new_fields_survive_json(tmp_path: Path) -> None:
    level = orjson.loads(orjson.dumps(told(rundirs.closed_ladder(tmp_path))))["levels"][0]
    assert level["warmup_trimmed_s"] is None
    assert level["latency_ms"]["ttft"]["service"]["interval_95"]["p50"][0] < np.inf


def test_few_samples_are_advised_what_their_stage_takes(tmp_path: Path) -> None:
    def advice(**plan: Any) -> str:
        write_run(tmp_path, [Planned(Closed(1))])
        facts = orjson.loads((tmp_path / "run.json").read_bytes())
        facts["levels"][0] |= plan
        (tmp_path / "run.json").write_bytes(orjson.dumps(facts))
        return caution(told(tmp_path).levels[0], "few_samples").advice

    assert advice() == "set min_requests: 130, or duration: 31s"
    assert advice(requests=70, duration_s=None) == "set requests: 130"
    assert advice(requests=70) == "set requests: 130 and duration: 31s"
    trace = {"file": "a.csv", "sha256": "0", "timestamps": None, "speed": 1.0, "requests": 70, "length_s": 15.0}
    load = {"kind": "open", "rate_per_s": 4.6, "arrivals": "trace", "trace": trace}
    assert advice(load=load, duration_s=None) == "replay more of the trace, or a longer one"


def test_a_loop_that_is_late_once_in_a_hundred_times_is_held_against_the_tail(tmp_path: Path) -> None:
    first = only(tmp_path, ONE_USER).latency_ms["ttft"]["service"]
    assert first.p50 is not None
    assert first.p95 is not None
    between_ms = 0.1 * (first.p50 + first.p95) / 2  # over a tenth of the p50, under a tenth of the p95
    assert edit_client(tmp_path, loop_lag_p99_ns=round(between_ms * 1e6)).client.bound is False
    assert edit_client(tmp_path, loop_lag_p99_ns=round(0.11 * first.p95 * 1e6)).client.bound is True
    assert edit_client(tmp_path, loop_lag_p99_ns=0, gc_pause_max_ns=round(between_ms * 1e6)).client.bound is True


def test_without_a_p95_the_late_loop_is_held_against_the_p50(tmp_path: Path) -> None:
    first = only(tmp_path, Planned(Closed(1), duration_s=3.0)).latency_ms["ttft"]["service"]
    assert first.p95 is None
    level = edit_client(tmp_path, loop_lag_p99_ns=round(0.11 * (first.p50 or 0) * 1e6))
    assert level.client.bound_because[0].endswith("of the first-token p50")


@pytest.mark.parametrize(
    ("ended_by", "status", "why"),
    [
        ("target_died", "target_died", "the target died"),
        ("interrupted", "interrupted", "the run was interrupted"),
        ("duration", "target_died", "the target died before it was through"),
        ("requests", "running", "the run was cut off before it was through"),
    ],
)
def test_a_level_that_was_cut_short_says_by_what(ended_by: str, status: str, why: str, tmp_path: Path) -> None:
    write_run(tmp_path, [ONE_USER], status=status)

    def cut(line: dict[str, Any]) -> None:
        changes: dict[str, dict[str, Any]] = {"issue_end": {"reason": ended_by}, "level_end": {"complete": False}}
        line.update(changes.get(line["event"], {}))

    level = edit(tmp_path, "telemetry.jsonl", cut)
    assert caution(level, "cut_short").reason == f"the level did not end as planned: {why}"


@pytest.mark.parametrize("tokens", [0, 2**62, 2**64, 10**300])
def test_token_counts_that_cannot_be_are_told_and_break_nothing(tokens: float, tmp_path: Path) -> None:
    assert "no_tokens_counted" not in abouts(only(tmp_path, ONE_USER))

    def count(line: dict[str, Any]) -> None:
        line["output_tokens"] = tokens if tokens < 2**64 else float(tokens)

    level = edit(tmp_path, "samples.jsonl", count)
    assert level.tokens.output_total == 0
    assert "70 answers that came in 2240 chunks" in caution(level, "no_tokens_counted").reason
    orjson.dumps(told(tmp_path))


@pytest.mark.parametrize("change", [{"level": 2**62}, {"output_tokens": "many"}])
def test_what_is_no_number_is_refused_in_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path, [ONE_USER])
    with pytest.raises(UsageError, match="expected numbers where samples have numbers"):
        edit(tmp_path, "samples.jsonl", lambda line: line.update(change))
