"""The paragraph on top and the exit code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from loadbench.analysis.rundir import read
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Summary
from loadbench.analysis.verdict import exit_code, of
from loadbench.records import Closed, Open, Ramp
from tests import rundirs
from tests.rundirs import Planned, write_run


def told(path: Path) -> Summary:
    return summarise(read(path))


def text(path: Path) -> str:
    return told(path).verdict.text


def scenario(**slo: object) -> dict[str, object]:
    return {"name": "edge", "warmup": {"requests": 2}, "slo": slo}


def test_flat_throughput_is_said_to_be_flat_and_what_a_user_costs(tmp_path: Path) -> None:
    said = text(rundirs.closed_ladder(tmp_path))
    assert "synthetic-edge:1 on Foundry Local 2.2.1 (AMD EPYC 7B13, 2 cores, 8 GiB)." in said
    assert "stays at about 147 tok/s from 1 to 8 users: more users only wait longer." in said
    assert "Each further user adds about 60 ms to the first token: p50 60.4 ms at 1 user, 481 ms at 8." in said
    assert "The service's memory: 120 MiB before, 140 MiB at its peak, 130 MiB after." in said
    assert "random weights" in said


def test_a_batching_engine_grows_to_its_batch_and_steps_beyond(tmp_path: Path) -> None:
    said = text(rundirs.batching_ladder(tmp_path))
    assert "grows from 148 tok/s at 1 user to 594 at 4 and not beyond; at 8 it is 321." in said
    assert "takes about 60 ms (p50) up to 4 users and steps up to 479 ms at 8." in said


def test_a_ladder_that_ended_too_early_says_so(tmp_path: Path) -> None:
    said = text(write_run(tmp_path, [Planned(Closed(users), batches=64) for users in (1, 2, 4)]))
    assert "still grows at 4 users, the most that was tried" in said
    assert "The first token stays at about 60 ms (p50) up to 4 users." in said


def test_the_slo_is_said_to_hold_up_to_where_it_holds(tmp_path: Path) -> None:
    levels = [Planned(Closed(users), duration_s=40.0) for users in (1, 4, 8)]
    summary = told(write_run(tmp_path, levels, scenario=scenario(ttft={"p95": "300ms"})))
    assert "The SLO holds at 1 and 4 users and is missed at 8 users (TTFT p95 is " in summary.verdict.text
    assert summary.verdict.slo == "fail"


def test_an_slo_on_too_few_samples_is_undecided(tmp_path: Path) -> None:
    summary = told(rundirs.closed_ladder(tmp_path, scenario=scenario(ttft={"p95": "10s"})))
    assert "is undecided at 1, 2, 4 and 8 users (TTFT p95: 70 samples; p95 is firm from 130)" in summary.verdict.text
    assert summary.verdict.slo == "undecided"


def test_few_requests_give_no_throughput_and_no_slope(tmp_path: Path) -> None:
    said = text(write_run(tmp_path, [Planned(Closed(users), duration_s=1.0) for users in (1, 2, 3)]))
    assert "Too few requests succeeded to speak of throughput" in said
    assert "tok/s" not in said
    assert "further user" not in said


def test_open_loop_is_told_from_when_requests_were_due(tmp_path: Path) -> None:
    said = text(rundirs.open_loop(tmp_path))
    assert "At 3/s poisson the first token comes 59.4 ms (p50) and 70.6 ms (p95) after it was due." in said
    assert "At 2/s poisson the first token comes 60.8 ms (p50) after it was due." in said  # 120 samples: no firm p95


def test_an_incomplete_run_says_so_first(tmp_path: Path) -> None:
    said = text(rundirs.torn(tmp_path))
    assert said.startswith("The run was cut off: what follows is what was measured until then.")
    assert "2 of 4 planned levels were not run" in said


def test_failures_are_counted_in_words(tmp_path: Path) -> None:
    assert "106 of 220 requests failed (106 out_of_memory)." in text(rundirs.failures(tmp_path))


def test_the_worst_state_of_the_target_is_the_verdicts(tmp_path: Path) -> None:
    assert told(rundirs.all_failed(tmp_path / "a")).verdict.target == "degraded"
    assert told(rundirs.closed_ladder(tmp_path / "b")).verdict.target == "healthy"


def test_the_same_directory_gives_the_same_summary_anywhere(tmp_path: Path) -> None:
    here = rundirs.two_kinds(tmp_path / "here")
    there = here.rename(tmp_path / "there")
    before = orjson.dumps(told(there))
    assert orjson.dumps(told(there.rename(here))) == before


def test_a_good_run_exits_0(tmp_path: Path) -> None:
    assert exit_code(told(rundirs.closed_ladder(tmp_path))) == 0


def test_an_undecided_slo_exits_0(tmp_path: Path) -> None:
    assert exit_code(told(rundirs.closed_ladder(tmp_path, scenario=scenario(ttft={"p95": "10s"})))) == 0


def test_a_missed_slo_exits_99(tmp_path: Path) -> None:
    assert exit_code(told(rundirs.closed_ladder(tmp_path, scenario=scenario(ttft={"p50": "1ms"})))) == 99


@pytest.mark.parametrize(
    ("status", "code"), [("target_died", 93), ("interrupted", 130), ("failed", 94), ("running", 94)]
)
def test_a_run_that_ended_otherwise_exits_by_how_it_ended(tmp_path: Path, status: str, code: int) -> None:
    missed = rundirs.closed_ladder(tmp_path, status=status, scenario=scenario(ttft={"p50": "1ms"}))
    assert exit_code(told(missed)) == code


def test_a_level_where_nothing_succeeded_is_invalid_whatever_the_slo_says(tmp_path: Path) -> None:
    assert exit_code(told(rundirs.all_failed(tmp_path / "a"))) == 94
    assert exit_code(told(rundirs.all_failed(tmp_path / "b", scenario=scenario(error_rate="100%")))) == 94
    assert exit_code(told(rundirs.empty_level(tmp_path / "c"))) == 94


def test_mostly_failed_is_invalid_unless_the_slo_speaks_of_failures(tmp_path: Path) -> None:
    assert exit_code(told(rundirs.failures(tmp_path / "a"))) == 94
    assert exit_code(told(rundirs.failures(tmp_path / "b", scenario=scenario(ttft={"p50": "10s"})))) == 94
    assert exit_code(told(rundirs.failures(tmp_path / "c", scenario=scenario(error_rate="1%")))) == 99
    assert exit_code(told(rundirs.failures(tmp_path / "d", scenario=scenario(error_rate="90%")))) == 0


def test_a_clause_without_samples_is_invalid_and_never_a_pass(tmp_path: Path) -> None:
    assert exit_code(told(rundirs.non_streaming(tmp_path, scenario=scenario(ttft={"p50": "10s"})))) == 94


def test_a_model_that_could_not_be_served_exits_3(tmp_path: Path) -> None:
    summary = told(rundirs.closed_ladder(tmp_path))
    failed = replace(summary.models[0], status="failed", reason="not found")
    assert exit_code(replace(summary, models=(*summary.models, failed))) == 3


def test_throughput_without_an_order_is_not_called_a_trend(tmp_path: Path) -> None:
    levels = [Planned(Closed(1), batches=2), Planned(Closed(2)), Planned(Closed(3), batches=2), Planned(Closed(4))]
    summary = told(write_run(tmp_path, levels))
    shuffled = tuple(
        replace(level, throughput=level.throughput | {"output_tokens_per_s": rate})
        for level, rate in zip(summary.levels, (116.0, 91.0, 71.0, 121.0), strict=True)
    )
    assert (
        "does not grow with users: 71 to 121 tok/s between 1 and 4 users, in no order."
        in of(replace(summary, levels=shuffled)).text
    )


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("target_died", "The target died: "),
        ("failed", "The run failed: "),
        ("interrupted", "The run was interrupted: "),
        ("running", "The run was cut off: "),
    ],
)
def test_how_a_run_ended_is_said_in_a_sentence(status: str, said: str, tmp_path: Path) -> None:
    summary = told(rundirs.closed_ladder(tmp_path, status=status))
    assert summary.verdict.text.startswith(said)
    assert said.removesuffix(": ").lower() in {caution.reason.lower() for caution in summary.cautions}


def test_a_level_that_was_cut_short_is_no_throughput(tmp_path: Path) -> None:
    summary = told(rundirs.torn(tmp_path))
    whole, cut = summary.levels
    assert "tok/s at 1 user." in summary.verdict.text
    assert "2 users: more users" not in summary.verdict.text
    assert "No level ended as planned" in of(replace(summary, levels=(cut,))).text
    assert "No level ended as planned" not in of(replace(summary, levels=(whole,))).text


def test_schedules_are_called_what_they_are(tmp_path: Path) -> None:
    ramp = Open(3.0, ramp=Ramp(1.0, 5.0, 30.0))
    levels = [Planned(ramp, duration_s=30.0), Planned(Open(3.0, "gamma", 0.5), duration_s=30.0)]
    summary = told(write_run(tmp_path, levels))
    assert "At 1→5/s ramp the first token" in summary.verdict.text
    assert "At 3/s gamma 0.5 the first token" in summary.verdict.text
    assert [level.cautions[0].place.removeprefix("synthetic-edge:1 at ") for level in summary.levels] == [
        "1→5/s ramp",
        "3/s gamma 0.5",
    ]
