"""The paragraph on top and the exit code."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadbench.analysis.findings import Fit, Ladder, NotRun, Usl
from loadbench.analysis.ladder import ladders
from loadbench.analysis.rundir import read
from loadbench.analysis.slo import CUT, as_gate
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Road, Summary
from loadbench.analysis.verdict import exit_code, of, why
from loadbench.records import Closed, Leg, Open, load_title
from loadbench.scenario.stage import Stage
from tests import findings, rundirs
from tests.rundirs import Planned, write_run


def told(path: Path) -> Summary:
    return summarise(read(path))


def text(path: Path) -> str:
    return told(path).verdict.text


def scenario(**slo: object) -> dict[str, object]:
    return {"name": "edge", "warmup": {"requests": 2}, "slo": slo}


def test_the_place_the_memory_and_the_doubts_are_told(tmp_path: Path) -> None:
    said = text(rundirs.closed_ladder(tmp_path))
    assert "synthetic-edge:1 on Foundry Local 2.2.1 (AMD EPYC 7B13, 2 cores, 8 GiB)." in said
    assert "The service's memory: 120 MiB before, 140 MiB at its peak, 130 MiB after." in said
    assert "random weights" in said


def test_the_slo_is_said_to_hold_up_to_where_it_holds(tmp_path: Path) -> None:
    levels = [Planned(Closed(users), duration_s=40.0) for users in (1, 4, 8)]
    summary = told(write_run(tmp_path, levels, scenario=scenario(ttft={"p95": "300ms"})))
    assert "The SLO holds up to 4 users and is missed at 8 users (TTFT p95 is " in summary.verdict.text
    assert summary.verdict.slo == "fail"


def test_a_level_beyond_capacity_misses_the_slo_without_a_latency(tmp_path: Path) -> None:
    summary = told(rundirs.open_loop(tmp_path))
    levels = [findings.judged(summary.levels[0], "pass"), findings.judged(findings.over(summary.levels[1]), "fail")]
    said = of(findings.with_levels(summary, levels)).text
    assert "is missed at 3/s poisson (over capacity; TTFT p95)." in said
    assert "600 ms" not in said


def test_what_missed_the_slo_is_told_with_its_load_where_that_is_not_the_first_named(tmp_path: Path) -> None:
    planned = [Planned(Open(rate), duration_s=20.0) for rate in (8.0, 4.0)]
    summary = told(write_run(tmp_path, planned))
    high, low = (findings.judged(level, "fail") for level in summary.levels)
    said = of(findings.with_levels(summary, [high, findings.over(low)])).text
    assert "is missed from 4/s poisson on (at 8/s poisson TTFT p95 is 600 ms, the limit 300 ms)." in said
    said = of(findings.with_levels(summary, [high, low])).text
    assert "is missed from 4/s poisson on (TTFT p95 is 600 ms, the limit 300 ms)." in said


def test_an_slo_that_is_undecided_for_several_reasons_is_told_by_the_load_of_the_first(tmp_path: Path) -> None:
    planned = [Planned(Closed(1), duration_s=8.0), Planned(Closed(2), duration_s=12.0)]
    said = text(write_run(tmp_path, planned, scenario=scenario(ttft={"p95": "10s"})))
    assert re.search(r"is undecided at 1 and 2 users \(at 1 user TTFT p95: \d+ samples", said)


def test_a_level_that_was_cut_short_keeps_no_slo(tmp_path: Path) -> None:
    planned = [Planned(Closed(1), duration_s=40.0, complete=False)]
    slo = scenario(ttft={"p50": "1s"}, error_rate="5%")
    summary = told(write_run(tmp_path / "held", planned, scenario=slo, status="interrupted"))
    assert {(clause.result, clause.because) for clause in summary.levels[0].slo} == {("undecided", CUT)}
    assert summary.verdict.slo == "undecided"
    assert f"The SLO is undecided at 1 user (TTFT p50: {CUT})." in summary.verdict.text
    assert {as_gate(clause, allow_indicative=True) for clause in summary.levels[0].slo} == {("invalid", CUT)}
    missed = told(write_run(tmp_path / "missed", planned, scenario=scenario(ttft={"p50": "1ms"})))
    assert missed.verdict.slo == "fail"


def test_loads_of_one_sort_are_named_together(tmp_path: Path) -> None:
    planned = [Planned(Open(rate), duration_s=20.0) for rate in (1.0, 2.0, 3.0, 4.0)]
    summary = told(write_run(tmp_path, [Planned(Closed(1), duration_s=20.0), *planned]))
    results = ("pass", "pass", "fail", "undecided", "fail")
    levels = [findings.judged(level, result) for level, result in zip(summary.levels, results, strict=True)]
    said = of(findings.with_levels(summary, levels)).text
    assert "The SLO holds at 1 user and at 1/s poisson, is missed at 2 and 4/s poisson (" in said
    assert "is undecided at 3/s poisson (" in said


def test_an_slo_on_too_few_samples_is_undecided(tmp_path: Path) -> None:
    summary = told(rundirs.closed_ladder(tmp_path, scenario=scenario(ttft={"p95": "10s"})))
    assert (
        "is undecided from 1 to 8 users (at 1 user TTFT p95: 70 samples; p95 is firm from 130)" in summary.verdict.text
    )
    assert summary.verdict.slo == "undecided"


def test_few_requests_give_no_throughput_and_no_nature(tmp_path: Path) -> None:
    one = text(write_run(tmp_path / "one", [Planned(Closed(1), duration_s=1.0)]))
    several = text(write_run(tmp_path / "several", [Planned(Closed(n), duration_s=1.0) for n in (1, 2, 3)]))
    assert "Too few requests succeeded to speak of throughput" in one
    assert "What it carries is undecided: " in several
    assert "tok/s" not in one + several


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


def test_an_undecided_slo_exits_94(tmp_path: Path) -> None:
    assert exit_code(told(rundirs.closed_ladder(tmp_path, scenario=scenario(ttft={"p95": "10s"})))) == 94


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
    assert "tok/s at 1 user, the first token after " in summary.verdict.text
    assert "2 users: more users" not in summary.verdict.text
    said = "No level ended as planned: the throughput in the tables is that of what was measured."
    assert said in of(replace(summary, levels=(cut,))).text
    assert "No level ended as planned" not in of(replace(summary, levels=(whole,))).text


def test_schedules_are_called_what_they_are(tmp_path: Path) -> None:
    ramp = Open(3.0, legs=(Leg("ramp", 1.0, 5.0, 30.0),))
    levels = [Planned(ramp, duration_s=30.0), Planned(Open(3.0, "gamma", 0.5), duration_s=30.0)]
    summary = told(write_run(tmp_path, levels))
    assert "At 1→5/s the first token" in summary.verdict.text
    assert "At 3/s gamma 0.5 the first token" in summary.verdict.text
    assert [level.cautions[0].place.removeprefix("synthetic-edge:1 at ") for level in summary.levels] == [
        "1→5/s",
        "3/s gamma 0.5",
    ]


# What a model carries


@pytest.fixture
def ladder(tmp_path: Path) -> Summary:
    """1, 2, 4 and 8 users, without anything that several levels say together."""
    return replace(told(rundirs.closed_ladder(tmp_path)), capacity=(), searches=(), phases=())


def says(summary: Summary, **more: object) -> str:
    return of(replace(summary, **more)).text  # type: ignore[arg-type]


FLAT = {1: 154.0, 2: 144.0, 4: 143.0, 8: 141.0}
BATCHED = {1: 166.0, 2: 300.0, 4: 444.0, 8: 440.0}


def test_sharing_the_processor_is_told_with_where_it_ends_and_what_company_costs(ladder: Summary) -> None:
    found = findings.capacity(
        FLAT, "shares_the_processor", estimates=(findings.estimate("knee", 1.0), findings.estimate("asymptotic", 1.04))
    )
    assert (
        "It shares the processor: throughput stays at about 144 tok/s from 1 to 8 users, so capacity is reached at"
        " 1 user (N* = 1); each further user only makes all slower (first token 60.4 ms → 481 ms)."
    ) in says(ladder, capacity=(found,))


def test_batching_is_told_with_its_gain_and_where_the_queue_begins(ladder: Summary) -> None:
    said = says(ladder, capacity=(findings.capacity(BATCHED, "batches", up_to=4),))
    assert "It batches up to 4: throughput grows 2.7-fold from 166 tok/s at 1 user to 444 at 4 and not beyond" in said
    assert "; beyond 4 further users queue (first token 239 ms → 481 ms)." in said


def test_one_at_a_time_and_in_turns_are_told_apart(ladder: Summary) -> None:
    assert "It serves one at a time: " in says(ladder, capacity=(findings.capacity(FLAT, "serves_one_at_a_time"),))
    in_turns = says(ladder, capacity=(findings.capacity(FLAT, "shares_in_turns", up_to=4),))
    assert "It works on 4 at a time, which share the processor: " in in_turns
    assert "; beyond 4 further users queue (" in in_turns


def test_further_users_queue_where_a_queue_was_seen_and_else_slow_each_other_down(ladder: Summary) -> None:
    found = findings.capacity(BATCHED, "batches", up_to=4)
    all_served = replace(found, points=tuple(replace(point, in_service=point.load) for point in found.points))
    assert "; beyond 4 further users slow each other down (" in says(ladder, capacity=(all_served,))
    not_told = replace(found, points=tuple(replace(point, in_service=None) for point in found.points))
    assert "beyond 4 " not in says(ladder, capacity=(not_told,))
    assert "beyond 8 " not in says(ladder, capacity=(replace(found, up_to=8),))
    between = replace(found, up_to=3)
    assert "; beyond 3 further users queue (" in says(ladder, capacity=(between,))


def test_what_is_not_saturated_says_how_much_the_last_step_gained_and_what_to_do(ladder: Summary) -> None:
    rising = findings.capacity({1: 100.0, 2: 190.0, 4: 308.0}, "scales", saturated=False, last_gain=0.62)
    climbing = (Ladder(0, ("gain",)),)
    assert "Not saturated: the last doubling still gained 62%: raise `to`." in says(
        ladder, capacity=(rising,), ladders=climbing
    )
    assert "gained 62%: try more users." in says(ladder, capacity=(rising,))
    ended = NotRun(findings.MODEL, 0, 3, "slo", "the SLO is missed", ("16 users",))  # a higher end would not be reached
    assert "gained 62%: try more users." in says(ladder, capacity=(rising,), ladders=climbing, not_run=(ended,))
    assert "gained 62%: try more users." in says(as_probes(ladder), capacity=(rising,), ladders=climbing)
    assert "queue in the app" not in says(ladder, capacity=(rising,))


def test_where_the_knee_is_undecided_users_beyond_those_worked_on_are_to_queue(ladder: Summary) -> None:
    knee = replace(findings.estimate("knee", 8.0), result="undecided")
    found = findings.capacity(BATCHED, "batches", up_to=4, estimates=(knee,))
    assert "Beyond 4 users queue in the app" in says(ladder, capacity=(found,))


def test_the_levels_that_were_left_out_are_named_in_the_table_and_not_in_the_paragraph(ladder: Summary) -> None:
    why = "of 2 loads none can be counted, and it takes 2; left out: 1 user (the client was the limit)"
    found = findings.capacity({1: 150.0, 2: 148.0}, None, because=why, saturated=None)
    unseen = replace(found, points=tuple(replace(point, firm=False) for point in found.points))
    said = says(ladder, capacity=(unseen,))
    assert "What it carries is undecided: of 2 loads none can be counted, and it takes 2." in said
    assert "left out" not in said


def test_an_undecided_nature_gives_its_reason_and_no_advice(ladder: Summary) -> None:
    said = says(ladder, capacity=(findings.capacity(FLAT, None, because="two levels are not firm"),))
    assert "how it takes several at once is undecided: two levels are not firm." in said
    assert "queue in the app" not in said


def test_levels_of_few_requests_are_left_out_of_the_throughput_that_is_told(ladder: Summary) -> None:
    points = (*findings.capacity({1: 150.0, 2: 148.0}, None).points, findings.point(3, 8.0, 999.0, firm=False))
    said = says(ladder, capacity=(findings.capacity(FLAT, "shares_the_processor", points=points),))
    assert "999" not in said
    assert "from 1 to 2 users" in said


def test_falling_past_the_peak_is_told(ladder: Summary) -> None:
    rates = {1: 100.0, 2: 200.0, 4: 122.0}
    said = says(ladder, capacity=(findings.capacity(rates, "batches", up_to=2, falls_to=0.61),))
    went = "throughput is 100 tok/s at 1 user, 200 at 2, and 122 at 4, 61% of the best"
    assert f"It batches up to 2 and degrades past that: {went}" in said
    assert "Past its peak" not in said
    unnamed = findings.capacity(rates, None, falls_to=0.61)
    assert "Past its peak it degrades: at 4 users throughput is 61% of the best." in says(ladder, capacity=(unnamed,))


def test_what_still_gains_while_some_queue_is_not_said_to_take_them_all(ladder: Summary) -> None:
    rising = {1: 100.0, 2: 200.0, 4: 300.0}
    found = findings.capacity(rising, "scales", up_to=3, saturated=None, last_gain=0.5)
    said = says(ladder, capacity=(found,))
    assert "It works on 3 of 4 users at once, the others queue: throughput is 100 tok/s at 1 user" in said
    assert "The last step up still gained 50%, though some queue already: measure 3 users too, or more than 4." in said
    assert "Not saturated" not in said


def test_from_which_load_on_requests_are_rejected_is_told_with_their_share(ladder: Summary) -> None:
    asked = ladder.levels[2].requests
    refused = replace(asked, ok=asked.attempted - 10, failed={"http_5xx": 10})
    levels = (*ladder.levels[:2], replace(ladder.levels[2], requests=refused), *ladder.levels[3:])
    found = findings.capacity(BATCHED, "batches", up_to=4, rejects_from=4.0)
    share = f"{10 / asked.attempted:.0%}"
    said = says(replace(ladder, levels=levels), capacity=(found,))
    assert f"From 4 users on it rejects requests instead of queueing them: {share} of those at 4 users." in said


def test_loads_are_named_by_the_requests_that_the_knee_goes_by_though_tokens_are_told(ladder: Summary) -> None:
    """At 4 users answers are longer by chance: more tokens, and no more requests."""
    found = findings.capacity({1: 100.0, 2: 390.0, 4: 400.0}, "batches", up_to=2)
    served = zip(found.points, (1.0, 4.1, 4.0), strict=True)
    points = tuple(replace(point, per_s=per_s) for point, per_s in served)
    said = says(ladder, capacity=(replace(found, points=points, estimates=(findings.estimate("knee", 2.0),)),))
    assert "throughput grows 3.9-fold from 100 tok/s at 1 user to 390 at 2 and not beyond" in said


def test_a_level_that_was_cut_short_is_not_said_to_keep_up(tmp_path: Path) -> None:
    summary = told(rundirs.open_loop(tmp_path))
    kept = replace(summary.levels[0], road=Road("steady", "in flight stayed"))
    assert "It keeps up with 2/s poisson." in of(findings.with_levels(summary, (kept,))).text
    assert "keeps up" not in of(findings.with_levels(summary, (replace(kept, complete=False),))).text


def test_prompts_without_a_fixed_cost_and_users_who_add_next_to_nothing_are_not_told_of(ladder: Summary) -> None:
    reading = replace(findings.phases().prefill, fixed_ms=-69.0)
    said = says(ladder, phases=(findings.phases(prefill=reading),))
    assert "reading the prompt goes at 1,450 tokens/s (" in said.lower()
    assert "plus" not in said
    few = replace(findings.phases().decode, slope_ms_interval_95=None)
    assert "ach further user adds 4.1 ms to every token" in says(ladder, phases=(findings.phases(decode=few),))
    flat = replace(few, fixed_ms=5.0, slope_ms=0.02)
    assert "further user adds" not in says(ladder, phases=(findings.phases(decode=flat),))


def test_estimators_that_disagree_are_shown_each_with_its_number(ladder: Summary) -> None:
    apart = (findings.estimate("asymptotic", 2.7), findings.estimate("knee", 8.0), findings.estimate("usl_peak", None))
    near = (findings.estimate("asymptotic", 2.7), findings.estimate("knee", 4.0))
    said = says(ladder, capacity=(findings.capacity(BATCHED, "batches", up_to=4, estimates=apart),))
    assert "The estimators disagree: N* by the asymptotic bound is 2.7 and the knee measured is 8." in said
    assert "disagree" not in says(ladder, capacity=(findings.capacity(BATCHED, "batches", up_to=4, estimates=near),))


def test_the_scalability_law_is_told_only_where_it_was_fitted(ladder: Summary) -> None:
    law = Usl(100.0, 0.04, (0.03, 0.05), 0.002, (0.001, 0.003), (0, 1, 2, 3))
    plain = findings.capacity(BATCHED, "batches", up_to=4)
    said = says(ladder, capacity=(replace(plain, usl=law, estimates=(findings.estimate("usl_peak", 21.9),)),))
    assert "contention 0.04 (0.03 to 0.05), coherency 0.002, its peak at 22 users." in said
    assert "Universal" not in says(ladder, capacity=(plain,))


@pytest.mark.parametrize(
    ("kind", "nature", "said"),
    [
        ("foundry-2", "shares_the_processor", "`engine.dynamic_batching` in its genai_config.json"),
        ("foundry-2", "batches", "raise `max_batch_size`"),
        ("foundry-0.8", "serves_one_at_a_time", "or move to 2.x"),
        ("ollama", "batches", "OLLAMA_NUM_PARALLEL"),
        ("llama.cpp", "batches", "--parallel"),
        ("vllm", "batches", "--max-num-seqs"),
        ("openai", "batches", "the server's own setting"),
    ],
)
def test_the_advice_is_for_the_target_at_hand(ladder: Summary, kind: str, nature: str, said: str) -> None:
    found = findings.capacity(BATCHED, nature, up_to=4)
    assert said in says(ladder, capacity=(found,), endpoint=ladder.endpoint | {"kind": kind})


def test_a_rate_that_is_kept_up_with_and_one_that_is_not(tmp_path: Path) -> None:
    summary = told(rundirs.open_loop(tmp_path))
    kept = replace(summary.levels[0], road=Road("steady", "in flight stayed"))
    over = replace(summary.levels[1], road=Road("over_capacity", "in flight grew", 12.0, 3.0, 1.1, 3.1))
    over = replace(over, throughput=over.throughput | {"requests_per_s": 2.3})  # the rest met its deadline
    said = of(findings.with_levels(summary, (kept, over))).text
    assert "It keeps up with 2/s poisson and is over capacity at 3/s poisson, where 2.3/s were served." in said
    assert "At 3/s poisson more came than went from 12 s on, so its latencies only say how long the level was." in said
    assert "At 2/s poisson the first token comes " in said
    assert "At 3/s poisson the first token comes " not in said


def test_each_rate_that_is_undecided_has_its_own_reason(tmp_path: Path) -> None:
    planned = [Planned(Open(rate), duration_s=8.0) for rate in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]
    summary = told(write_run(tmp_path, planned))
    reasons = ("18 requests; it takes 20", "56 were dropped", "56 were dropped", "it rises", "it falls", "it waits")
    levels = [
        replace(level, road=Road("undecided", because)) for level, because in zip(summary.levels, reasons, strict=True)
    ]
    said = of(findings.with_levels(summary, levels)).text
    assert "Whether it keeps up at 1/s poisson is undecided: 18 requests; it takes 20." in said
    assert "Whether it keeps up at 2 and 3/s poisson is undecided: 56 were dropped." in said
    assert "Whether it keeps up at 4/s poisson is undecided: it rises." in said
    assert "Nor is it decided at 5 and 6/s poisson." in said


def test_a_level_that_left_at_once_did_so_from_its_start_on(tmp_path: Path) -> None:
    summary = told(rundirs.open_loop(tmp_path))
    over = replace(summary.levels[1], road=Road("over_capacity", "in flight grew", 0.07, 3.0, 1.1, 2.3))
    assert (
        "At 3/s poisson more came than went from its start on, so " in of(findings.with_levels(summary, (over,))).text
    )


@pytest.mark.parametrize(
    ("worked_off_s", "said"),
    [
        (10.2, "the queue was worked off at 10.2 s."),
        (99.0, "the queue was worked off at 99 s, when no more came."),
        (None, "the queue was not worked off."),
    ],
)
def test_whether_it_came_back_after_a_rush_is_told(tmp_path: Path, worked_off_s: float | None, said: str) -> None:
    legs = (Leg("hold", 2.0, 2.0, 10.0), Leg("spike", 9.0, 9.0, 5.0), Leg("hold", 2.0, 2.0, 15.0))
    summary = told(write_run(tmp_path, [Planned(Open(95 / 30, legs=legs), duration_s=30.0)]))
    road = Road("steady", "", most_in_flight=135, most_at_s=6.862, worked_off_s=worked_off_s)
    (level,) = summary.levels
    verdict = of(findings.with_levels(summary, (replace(level, road=road),))).text
    assert f"at most 135 were in flight, 6.86 s after its start; {said}" in verdict


def test_of_many_rates_only_the_highest_that_holds_has_its_latency_told(tmp_path: Path) -> None:
    made = told(write_run(tmp_path, [Planned(Open(rate), duration_s=20.0) for rate in (1.0, 2.0, 3.0, 4.0)]))
    road = Road("steady", "in flight stayed")
    said = of(findings.with_levels(made, [replace(level, road=road) for level in made.levels])).text
    assert said.count("after it was due") == 1
    assert "At 4/s poisson the first token comes " in said


def test_results_by_interval_are_told_with_where_they_were_highest(tmp_path: Path) -> None:
    summary = told(rundirs.open_loop(tmp_path))
    parts = tuple(findings.interval(number, p95) for number, p95 in enumerate((80.0, 90.0, 400.0, 85.0)))
    level = replace(summary.levels[0], intervals=parts)
    lies = "first token's p95 of an interval lies between 80 ms and 400 ms, highest 20 s after the level's start."
    assert lies in of(findings.with_levels(summary, (level,))).text
    assert "of an interval" not in of(findings.with_levels(summary, (findings.over(level),))).text


def test_prefill_and_decode_are_told_apart(ladder: Summary) -> None:
    said = says(ladder, phases=(findings.phases(),))
    assert "Reading the prompt goes at 1,450 tokens/s (1,250 to 1,667) plus 12 ms; " in said
    assert "each further user adds 4.1 ms (±0.2 ms) to every token." in said
    untold = Fit(None, None, None, 20, (0,), "prompts hardly differ")
    neither = findings.phases(prefill=untold, prefill_tokens_per_s=None, decode=replace(untold, slope_ms=None))
    assert "prompt" not in says(ladder, phases=(neither,))


def test_a_ladder_that_ended_early_says_after_what_why_and_without_what(ladder: Summary) -> None:
    left = NotRun(findings.MODEL, 0, 3, "gain", "throughput gained under 5% twice", ("16 users", "32 users"))
    said = says(ladder, not_run=(left,))
    assert "The ladder ended after 8 users (throughput gained under 5% twice); not run: 16 and 32 users." in said


# The search


def test_the_answer_of_a_search_comes_first_with_what_confirmed_it(ladder: Summary) -> None:
    found = findings.search("confirmed", answer=2.0, passed=2.0, failed=4.0, because="confirmed by level 1: TTFT")
    said = says(ladder, searches=(found,), capacity=(findings.capacity(FLAT, "shares_the_processor"),))
    answer = (
        "The most users within the SLO: 2, confirmed by level 1: TTFT; it is missed at 4 users (TTFT p95 of level 2)."
    )
    assert answer in said
    assert said.index(answer) < said.index("It shares the processor")


def test_a_search_without_an_answer_says_why(ladder: Summary) -> None:
    undecided = says(
        ladder, searches=(findings.search("undecided", because="cut short", odd=("2 failed and 4 passed",)),)
    )
    assert "The most users within the SLO: undecided, cut short." in undecided
    assert "More load did better in places: 2 failed and 4 passed." in undecided
    rate = replace(findings.search("undecided"), unit="1/s")
    assert "The highest rate within the SLO: undecided" in says(ladder, searches=(rate,))
    assert "No load keeps the SLO: so it went." in says(ladder, searches=(findings.search("none"),))
    least = findings.search("none", probes=(findings.probe(0, 20.0, "fail", -0.4),))
    assert "Not even the lowest load keeps the SLO: so it went. Lower the stage's lowest load" in says(
        ladder, searches=(least,)
    )
    assert "Raise the stage's highest load" in says(ladder, searches=(findings.search("unbounded"),))


def as_probes(summary: Summary) -> Summary:
    return findings.with_levels(
        summary, [replace(findings.judged(level, "fail"), purpose="probe") for level in summary.levels]
    )


def code_of(summary: Summary) -> int:
    return exit_code(replace(summary, verdict=of(summary)))


@pytest.mark.parametrize(("result", "code"), [("confirmed", 0), ("unbounded", 0), ("none", 99), ("undecided", 94)])
def test_of_a_search_its_result_decides_the_exit_code_and_not_its_probes(
    ladder: Summary, result: str, code: int
) -> None:
    searched = replace(as_probes(ladder), searches=(findings.search(result),))
    assert code_of(searched) == code
    if code:
        assert "so it went" in why(replace(searched, verdict=of(searched)), code)
    assert "The SLO " not in of(searched).text.replace("The SLO holds wherever", "")


def test_a_probe_that_failed_may_have_no_answers_and_one_that_passed_may_not(ladder: Summary) -> None:
    searched = replace(as_probes(ladder), searches=(findings.search("confirmed", answer=2.0),))

    def without_answers(index: int) -> Summary:
        empty = replace(searched.levels[index].requests, ok=0)
        levels = [replace(x, requests=empty) if x.index == index else x for x in searched.levels]
        return findings.with_levels(searched, levels)

    assert code_of(without_answers(2)) == 0
    assert code_of(without_answers(1)) == 94


# Ladders and the exit code


def climbing(summary: Summary, results: tuple[str, ...], *rules: str) -> Summary:
    levels = [findings.judged(level, result) for level, result in zip(summary.levels, results, strict=True)]
    return findings.with_levels(summary, levels, ladders=(Ladder(0, rules),))


def test_a_ladder_that_the_slo_ends_fails_only_by_its_lowest_rung(ladder: Summary) -> None:
    assert code_of(climbing(ladder, ("pass", "pass", "fail", "fail"), "slo")) == 0
    assert code_of(climbing(ladder, ("fail", "pass", "pass", "pass"), "slo")) == 99
    assert code_of(climbing(ladder, ("pass", "pass", "pass", "fail"), "gain")) == 99  # its loads are to be held
    said = of(climbing(ladder, ("pass", "pass", "fail", "fail"), "slo")).text
    assert "The SLO holds up to 2 users and is missed from 4 users on (TTFT p95 is 600 ms, the limit 300 ms)." in said


def test_a_ladder_that_the_slo_does_not_end_fails_only_by_its_lowest_rung_too(ladder: Summary) -> None:
    beyond = climbing(ladder, ("pass", "pass", "fail", "fail"), "over_capacity")
    assert code_of(beyond) == 99
    assert code_of(replace(beyond, ladders=(Ladder(0, ("over_capacity",), climbs=True),))) == 0
    below = climbing(ladder, ("fail", "pass", "pass", "pass"))
    assert code_of(replace(below, ladders=(Ladder(0, (), climbs=True),))) == 99


def test_a_rung_where_errors_end_the_ladder_does_not_make_the_run_invalid(ladder: Summary) -> None:
    rejecting = [replace(x, requests=replace(x.requests, ok=x.requests.attempted // 4)) for x in ladder.levels[-1:]]
    broken = findings.with_levels(ladder, [*ladder.levels[:-1], *rejecting])
    assert code_of(broken) == 94
    assert code_of(replace(broken, ladders=(Ladder(0, ("error_rate",)),))) == 0
    assert code_of(findings.with_levels(broken, rejecting, ladders=(Ladder(0, ("error_rate",)),))) == 94


def test_which_stages_are_ladders_is_read_from_the_scenario_as_it_is_saved() -> None:
    climbs = {"concurrency": {"from": 1, "to": 8, "factor": 2}, "stop": {"gain": None}}
    stages = [
        Stage.model_validate(stage).model_dump(mode="json", by_alias=True) for stage in ({"concurrency": 4}, climbs)
    ]
    (with_slo,) = ladders({"stages": stages, "slo": {"ttft": {"p95": "2s"}}})
    (without,) = ladders({"stages": stages})
    assert (with_slo.stage, without.stage) == (1, 1)
    assert {"slo", "error_rate", "degraded"} <= set(with_slo.rules)
    assert "gain" not in with_slo.rules
    assert "slo" not in without.rules
    assert with_slo.climbs


@pytest.mark.parametrize(
    ("stage", "climbs"),
    [
        ({"rate": {"from": "1/s", "to": "8/s", "factor": 2}, "stop": False}, [True]),
        ({"concurrency": "1..8"}, [True]),
        ({"concurrency": [1, 8], "stop": {"gain": "5%"}}, [False]),
        ({"rate": {"from": "1/s", "to": "8/s"}, "duration": "5s"}, []),
    ],
)
def test_a_ladder_climbs_whichever_rules_it_has_and_a_list_does_not(stage: dict[str, Any], climbs: list[bool]) -> None:
    saved = Stage.model_validate(stage).model_dump(mode="json", by_alias=True)
    assert [found.climbs for found in ladders({"stages": [saved]})] == climbs


def test_the_line_about_an_exit_code_names_what_failed(ladder: Summary) -> None:
    missed = climbing(ladder, ("pass", "pass", "pass", "fail"), "gain")
    assert why(replace(missed, verdict=of(missed)), 99) == "SLO missed: ttft.p95 at 8 users"
    again = replace(missed, levels=(*missed.levels, replace(missed.levels[3], index=4)))
    assert "ttft.p95 at 8 users (level 3), ttft.p95 at 8 users (level 4)" in why(again, 99)
    several = replace(missed, levels=(replace(missed.levels[0], model="other:1"), *missed.levels[1:]))
    assert why(several, 99) == "SLO missed: ttft.p95 at 8 users of synthetic-edge:1"
    reason = replace(ladder, status="target_died", reason="it was killed")
    assert why(reason, 93) == "target died: it was killed"


def test_an_invalid_level_of_which_nothing_failed_says_what_it_lacks(tmp_path: Path) -> None:
    empty = told(rundirs.empty_level(tmp_path))
    assert exit_code(empty) == 94
    line = why(empty, 94)
    assert line.startswith("result invalid: no request was due at ")
    assert "gate" not in line and "failed" not in line
    one_token = findings.judged(empty.levels[0], "undecided")
    without = replace(empty, levels=(replace(one_token, slo=(replace(one_token.slo[0], n=0),)),))
    assert why(without, 94) == f"result invalid: no sample of TTFT p95 at {load_title(one_token.load)}"


def test_a_run_that_was_cut_off_is_invalid_for_that_and_not_for_its_requests(tmp_path: Path) -> None:
    cut = told(rundirs.torn(tmp_path))
    assert exit_code(cut) == 94
    assert why(cut, 94) == f"result invalid: the run was cut off when 1 of {cut.levels_planned} levels had ended"
