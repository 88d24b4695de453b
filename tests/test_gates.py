"""What --assert says, what came of it, and the exit code: a miss is a miss, and what cannot be told is no pass."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import orjson
import pytest

from loadbench.analysis.assertion import Scope, parse
from loadbench.analysis.gates import asked, held
from loadbench.analysis.rundir import read
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Summary, schema
from loadbench.analysis.verdict import exit_code, why
from loadbench.errors import UsageError
from loadbench.records import Ask, Closed, Open
from loadbench.report.markdown import markdown_text
from tests import findings, rundirs
from tests.asking import scripted
from tests.command import ended, loadbench, started, summary
from tests.rundirs import Planned, write_run


def scenario(**more: Any) -> dict[str, Any]:
    return {"name": "edge", "warmup": {"requests": 2}} | more


def told(path: Path, *texts: str, allow: bool = False) -> Summary:
    return summarise(read(path), asked=asked(texts, allow))


def of(path: Path, *texts: str, allow: bool = False) -> list[tuple[int | None, str, str | None]]:
    """Level, result and reason of every gate."""
    return [(gate.level, gate.result, gate.because) for gate in told(path, *texts, allow=allow).gates]


LEVELS = [Planned(Closed(users), duration_s=40.0) for users in (1, 4, 8)]


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1, 4 and 8 users with some 190 requests each: a p95 is firm, a p99 is not. Only for looking."""
    return write_run(tmp_path_factory.mktemp("gates") / "long", LEVELS)


@pytest.fixture
def mine(long: Path, tmp_path: Path) -> Path:
    """The same to be written to."""
    return Path(shutil.copytree(long, tmp_path / "mine"))


# What is said


@pytest.mark.parametrize(
    ("text", "clause", "series", "comparison", "limit", "unit"),
    [
        ("ttft.p95<2s", "ttft.p95", None, "<", 2000.0, "ms"),
        (" ttft . p95  <=  1.5 s ", "ttft.p95", None, "<=", 1500.0, "ms"),
        ("ttft.response.p99<250ms", "ttft.p99", "response", "<", 250.0, "ms"),
        ("e2e.p99.9<1m", "e2e.p99_9", None, "<", 60_000.0, "ms"),
        ("gap.max<500ms", "gap.max", None, "<", 500.0, "ms"),
        ("tpot.mean<50ms", "tpot.mean", None, "<", 50.0, "ms"),
        ("error_rate<1%", "error_rate", None, "<", 0.01, "share"),
        ("error_rate<=0", "error_rate", None, "<=", 0.0, "share"),
        ("goodput>=95%", "goodput", None, ">=", 0.95, "share"),
        ("requests_per_s>2.5/s", "requests_per_s", None, ">", 2.5, "1/s"),
        ("output_tok_per_s>100", "output_tokens_per_s", None, ">", 100.0, "tok/s"),
        ("output_tokens_per_s_per_user>=7 tok/s", "output_tokens_per_s_per_user", None, ">=", 7.0, "tok/s"),
        # k6's: bare numbers of times are milliseconds, and its duration counts from sending
        ("ttft: p(95)<2000", "ttft.p95", None, "<", 2000.0, "ms"),
        ("http_req_duration: p(99.9) < 400", "e2e.p99_9", "service", "<", 400.0, "ms"),
        ("http_req_duration:avg<200", "e2e.mean", "service", "<", 200.0, "ms"),
        ("tpot: med<20ms", "tpot.p50", None, "<", 20.0, "ms"),
        ("http_req_failed: rate<0.01", "error_rate", None, "<", 0.01, "share"),
        ("http_reqs: rate>10", "requests_per_s", None, ">", 10.0, "1/s"),
    ],
)
def test_an_assertion_is_read_in_our_form_and_in_that_of_k6(
    text: str, clause: str, series: str | None, comparison: str, limit: float, unit: str
) -> None:
    found = parse(text)
    assert (found.clause, found.series, found.comparison, found.unit) == (clause, series, comparison, unit)
    assert found.limit == pytest.approx(limit)
    assert found.scope is None


@pytest.mark.parametrize(
    ("text", "scope"),
    [
        ("ttft.p95<2s @ 4 users", Scope(None, "4 users", None)),
        ("ttft.p95<2s@2/s", Scope(None, "2/s", None)),
        ("ttft: p(95)<2000 @ level 3", Scope(3, None, None)),
        ("slo @ 4 users of phi:1", Scope(None, "4 users", "phi:1")),
    ],
)
def test_an_assertion_may_name_its_level(text: str, scope: Scope) -> None:
    assert parse(text).scope == scope


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "character 1: expected a metric such as ttft or error_rate, but it ends there"),
        ("ttf.p95<1s", "character 1: expected ttft, e2e, "),
        ("ttft<2s", "character 5: expected a dot and a statistic of ttft, such as .p95, got '<2s'"),
        ("ttft.p59<2s", "character 6: expected p50, p90, p95, p99, p99.9, p99_all, mean, min or max, got 'p59<2s'"),
        ("tpot.response.p95<1s", "character 6: expected tpot without response: its only series is service"),
        ("ttft.p95>2s", "character 9: expected < or <=, as less of it is better, got '>2s'"),
        ("goodput<95%", "character 8: expected > or >=, as more of it is better, got '<95%'"),
        ("ttft.p95==2s", "character 9: expected < or <=, got '==2s'"),
        ("ttft.p95<==2s", "character 11: expected a number, got '=2s'"),
        ("ttft.p95<", "character 10: expected a number, but it ends there"),
        ("ttft.p95<2000", "character 14: expected a unit after 2000: s or ms, but it ends there"),
        ("ttft.p95<2parsec", "character 11: expected a unit after 2: s or ms, got 'parsec'"),
        ("ttft.p95<2s 4 users", "character 13: expected nothing more, or @ and a level such as @ 4 users"),
        ("ttft.p95<2s @ ", "character 14: expected a level: 4 users, 2/s or level 3, but it ends there"),
        ("error_rate.p95<1%", "character 11: expected a comparison, as error_rate is one number of a level"),
        ("error_rate<5", "character 12: expected a share from 0 to 1, or 0% to 100%, got '5'"),
        ("ttft: p(97)<2", "character 7: expected p(50), p(90), p(95), p(99), p(99.9), avg, med, min or max"),
        ("http_req_failed: count<3", "character 18: expected rate or value, got 'count<3'"),
        ("http_req_waiting: p(95)<2", "character 1: expected ttft, e2e, "),
        ("http_req_duration<2s", "character 18: expected a colon after http_req_duration, as k6 has it"),
        ("ttft.\x1b[31m", "character 6: expected p50, "),
        ("ttft.p95<\uff12s", "character 10: expected a number, got '\uff12s'"),
        ("error_rate<\uff11%", "character 12: expected a number, got '\uff11%'"),
        ("http_req_failed: rate<0.\uff101", "character 24: expected nothing more"),
        ("ttft: p(\uff19\uff15)<2", "character 7: expected p(50), "),
        ("ttft.p\uff19\uff15<2s", "character 6: expected p50, "),
        (f"ttft.p95<{'9' * 400}s", "character 10: expected a duration such as 15s, 250ms or 2m, got '999"),
        (f"error_rate<{'9' * 400}", "character 12: expected a share such as 1% or 0.01, got '999"),
    ],
)
def test_what_is_no_assertion_is_refused_with_its_place_and_what_was_expected(text: str, error: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(text)
    line = str(refused.value)
    assert line.startswith(f"--assert {text.strip()!r}: {error}")
    assert line.isprintable()


# What came of it


def test_a_limit_is_held_at_every_level_and_missed_by_any(long: Path) -> None:
    summary = told(long, "ttft.p95<300ms")
    assert [(gate.level, gate.result) for gate in summary.gates] == [(0, "pass"), (1, "pass"), (2, "fail")]
    assert exit_code(summary) == 99
    assert why(summary, 99) == "gate missed: TTFT p95 at 8 users is 563 ms, asserted < 300 ms"
    assert "Asserted, and missed: TTFT p95 at 8 users is 563 ms, asserted < 300 ms." in summary.verdict.text
    assert summary.verdict.slo is None


def test_what_holds_everywhere_exits_0_and_is_said(long: Path) -> None:
    summary = told(long, "ttft.p95<1s", "error_rate<=0", "requests_per_s>1", "max_gap.max<1s", "lag.mean<10ms")
    assert {gate.result for gate in summary.gates} == {"pass"}
    assert len(summary.gates) == 15
    assert exit_code(summary) == 0
    assert "What was asserted holds." in summary.verdict.text


def test_a_comparison_is_taken_at_its_word(long: Path) -> None:
    """A limit at the value itself tells < from <=."""
    value = told(long, "ttft.max<1s").gates[0].value
    at = f"ttft: max{{}}{value!r} @ 1 user"
    assert [result for _, result, _ in of(long, at.format("<"), at.format("<="))] == ["fail", "pass"]


def test_a_scope_takes_the_levels_that_it_names_and_no_others(long: Path) -> None:
    for scope in ("4 users", "4 Users", "level 1", "4 users of synthetic-edge:1", "4 users of synthetic-edge"):
        assert of(long, f"ttft.p95<300ms @ {scope}") == [(1, "pass", None)]
    assert [level for level, *_ in of(long, "ttft.p95<300ms @ 1 users")] == [0]


def test_rates_are_named_with_or_without_their_arrivals(tmp_path: Path) -> None:
    path = rundirs.open_loop(tmp_path)
    assert [level for level, *_ in of(path, "ttft.p50<1s @ 3/s", "e2e.p50<1s @ 3/s poisson")] == [1, 1]
    by_due, by_sending = told(path, "e2e.p50<1s @ 3/s", "http_req_duration: p(50)<1000 @ 3/s").gates
    assert (by_due.series, by_sending.series) == ("response", "service")


def test_a_level_that_there_is_not_is_invalid_and_says_which_there_are(long: Path) -> None:
    summary = told(long, "ttft.p95<2s @ 3 users")
    (gate,) = summary.gates
    assert (gate.level, gate.result, gate.n) == (None, "invalid", 0)
    assert exit_code(summary) == 94
    assert why(summary, 94).endswith("(no such level was measured; there are 1 user, 4 users, 8 users)")


def test_a_metric_without_samples_is_invalid(tmp_path: Path) -> None:
    """An answer in one piece has no first token."""
    summary = told(rundirs.non_streaming(tmp_path), "ttft.p50<2s")
    assert [(gate.result, gate.value, gate.n, gate.because) for gate in summary.gates] == [
        ("invalid", None, 0, "no samples")
    ] * 2
    assert exit_code(summary) == 94
    assert why(summary, 94).startswith(
        "result invalid: a gate without a firm value: TTFT p50 at 1 user, asserted < 2 s"
    )


def test_what_allowing_indicative_values_allows_is_no_empty_metric(tmp_path: Path) -> None:
    assert {result for _, result, _ in of(rundirs.non_streaming(tmp_path), "ttft.p50<2s", allow=True)} == {"invalid"}


def test_an_indicative_value_is_invalid_unless_allowed(long: Path) -> None:
    few = "186 samples; p99 is firm from 662"
    assert of(long, "ttft.p99<2s @ 1 user") == [(0, "invalid", few)]
    assert of(long, "ttft.p99<2s @ 1 user", allow=True) == [(0, "pass", f"indicative: {few}")]
    assert exit_code(told(long, "ttft.p99<2s")) == 94
    assert exit_code(told(long, "ttft.p99<2s", allow=True)) == 0
    assert exit_code(told(long, "ttft.p99<70ms", allow=True)) == 99


def test_a_percentile_that_cannot_be_told_at_all_is_not_allowed_either(long: Path) -> None:
    ((_, result, because),) = of(long, "ttft.p99.9<2s @ 1 user", allow=True)
    assert (result, because) == ("invalid", "186 samples; p99_9 can be told from 1000 and is firm from 6636")


def test_what_is_missed_beyond_doubt_is_missed_on_few_samples_too(long: Path) -> None:
    ((_, result, because),) = of(long, "ttft.p99<300ms @ 8 users")
    assert result == "fail"
    assert because is not None
    assert because.endswith("of 190 requests took longer than 300 ms")


@pytest.mark.parametrize("text", ["requests_per_s>0.1", "output_tokens_per_s>1", "e2e.mean<1m"])
def test_a_rate_and_a_mean_of_a_few_requests_are_indicative(text: str, tmp_path: Path) -> None:
    path = write_run(tmp_path, [Planned(Closed(1), duration_s=1.0)])
    ((_, result, because),) = of(path, text)
    assert result == "invalid"
    assert str(because).endswith("is firm from 11")
    assert of(path, text, allow=True)[0][1] == "pass"


def test_a_failed_gate_outranks_one_that_could_not_be_told(long: Path) -> None:
    assert exit_code(told(long, "ttft.p99<2s", "ttft.p50<1ms")) == 99


def test_what_failed_counts_as_infinite_unless_somebody_says_how_many_may(tmp_path: Path) -> None:
    path = write_run(tmp_path, [Planned(Closed(4), duration_s=60.0, fails=0.3)])
    assert of(path, "ttft.p95<2s")[0][1:] == ("fail", "118 of 365 requests failed")
    assert of(path, "ttft.p95<2s", "error_rate<50%") == [(0, "pass", None)] * 2
    assert of(path, "ttft.p99_all<2s", "error_rate<50%", allow=True)[0][1:] == (
        "fail",
        "indicative: 365 requests; p99_all is firm from 662",
    )
    assert of(path, "ttft.max<1m")[0][1] == "fail"


def test_a_run_of_which_most_failed_is_judged_by_the_error_rate_that_is_asserted(tmp_path: Path) -> None:
    path = write_run(tmp_path, [Planned(Closed(8), fails=0.7)])
    assert exit_code(told(path, "ttft.p50<10s")) == 94
    assert exit_code(told(path, "error_rate<1%")) == 99
    assert exit_code(told(path, "error_rate<90%", "ttft.p50<10s")) == 0
    assert exit_code(told(rundirs.all_failed(tmp_path / "all"), "error_rate<=100%")) == 94


def test_a_target_that_was_not_well_afterwards_kept_nothing(tmp_path: Path) -> None:
    path = write_run(tmp_path, [Planned(Closed(1), duration_s=40.0, state="degraded")])
    because = "the target was degraded after it"
    assert of(path, "ttft.p95<2s", "requests_per_s>1") == [(0, "fail", because)] * 2


def test_a_level_over_capacity_passes_no_latency_and_no_goodput(tmp_path: Path) -> None:
    summary = told(write_run(tmp_path, [Planned(Open(3.0), duration_s=60.0)]))
    level = findings.over(summary.levels[0])
    level = replace(level, throughput=level.throughput | {"goodput_share": 1.0})
    over = findings.with_levels(summary, [level])
    say = asked(["ttft.p95<10s", "goodput>10%", "error_rate<1%", "ttft.p95<1ms"], allow_indicative=True)
    assert say is not None
    assert [gate.result for gate in held(say, over, over.levels)] == ["invalid", "invalid", "pass", "fail"]


def test_a_level_that_was_cut_short_passes_nothing_and_may_miss(tmp_path: Path) -> None:
    path = write_run(tmp_path, [Planned(Closed(1), duration_s=40.0, complete=False)])
    assert of(path, "ttft.p95<2s", "ttft.p95<1ms") == [
        (0, "invalid", "the level did not end as planned"),
        (0, "fail", None),
    ]


def test_goodput_takes_an_slo_and_power_a_meter(long: Path) -> None:
    reasons = [because for *_, because in of(long, "goodput>1%", "joules_per_output_token<1J @ 1 user")]
    assert reasons == ["no value: goodput takes an slo in the scenario"] * 3 + ["no value: no power was measured"]


# Ladders, searches, memory


LADDER = scenario(stages=[{"concurrency": [{"from": 1, "to": 8, "factor": 2}]}])


def test_of_a_ladder_the_lowest_rung_counts_and_any_rung_that_is_named(tmp_path: Path) -> None:
    """It asks how far: with the rungs above an assertion would fail as often as the ladder finds its end."""
    path = write_run(tmp_path, LEVELS, scenario=LADDER)
    assert of(path, "ttft.p95<300ms") == [(0, "pass", None)]
    assert of(path, "ttft.p95<300ms @ 8 users") == [(2, "fail", None)]


def test_of_a_search_the_level_counts_that_confirmed_its_answer(long: Path) -> None:
    found = told(long)
    probes = [replace(level, purpose=purpose) for level, purpose in zip(found.levels, PURPOSES, strict=True)]
    say = asked(["ttft.p95<1s"], allow_indicative=False)
    assert say is not None
    confirmed = findings.with_levels(found, probes, searches=(findings.search("confirmed", answer=2.0),))
    assert [(gate.level, gate.result) for gate in held(say, confirmed, [])] == [(1, "pass")]
    none = findings.with_levels(found, probes, searches=(findings.search("none"),))
    (gate,) = held(say, none, [])
    assert (gate.level, gate.result, gate.because) == (None, "invalid", "the search has no answer")


PURPOSES = ("probe", "confirmation", "probe")


def test_a_rung_of_a_memory_ladder_has_no_times_to_assert(tmp_path: Path) -> None:
    path = write_run(tmp_path, [Planned(Closed(users, ask=Ask(64, 64))) for users in (1, 2)])
    assert (
        of(path, "ttft.p50<2s", "ttft.p50<2s @ 1 user")
        == [(None, "invalid", "a rung of a memory ladder has no times")] * 2
    )


# The SLO, asserted


def test_an_slo_without_a_firm_value_is_no_pass_whether_it_is_asserted_or_not(tmp_path: Path) -> None:
    path = rundirs.closed_ladder(tmp_path, scenario=scenario(slo={"ttft": {"p95": "10s"}, "error_rate": "1%"}))
    summary = told(path)
    assert exit_code(summary) == 94
    assert why(summary, 94) == (
        "result invalid: a gate without a firm value: TTFT p95 at 1 user, by the SLO (70 samples; p95 is firm from"
        " 130), and at 3 more"
    )
    assert exit_code(told(path, allow=True)) == 0
    summary = told(path, "slo")
    assert [(gate.clause, gate.result) for gate in summary.gates[:2]] == [
        ("ttft.p95", "invalid"),
        ("error_rate", "pass"),
    ]
    assert exit_code(summary) == 94
    assert exit_code(told(path, "slo", allow=True)) == 0


def test_an_slo_that_a_value_on_few_samples_misses_is_missed_where_such_values_are_allowed(tmp_path: Path) -> None:
    path = rundirs.closed_ladder(tmp_path, scenario=scenario(slo={"ttft": {"p95": "540ms"}}))
    assert exit_code(told(path)) == 94
    summary = told(path, allow=True)
    assert (exit_code(summary), why(summary, 99)) == (99, "SLO missed: ttft.p95 at 8 users")


def test_an_slo_that_there_is_not_cannot_be_asserted(long: Path) -> None:
    summary = told(long, "slo @ 1 user")
    assert [(gate.clause, gate.result, gate.because) for gate in summary.gates] == [
        ("slo", "invalid", "the scenario has no slo")
    ]
    assert exit_code(summary) == 94


# The whole way


def report(path: Path, *words: str) -> tuple[int, str]:
    done = loadbench("report", path, *words)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--assert", "ttft.p95<1s", "--assert", "http_req_failed: rate<0.01"], 0, ""),
        (["--assert", "ttft: p(95)<300"], 99, "gate missed: TTFT p95 at 8 users is 563 ms, asserted < 300 ms"),
        (["--assert=ttft.p99<2s"], 94, "result invalid: a gate without a firm value: TTFT p99 at 1 user is 76 ms"),
        (["--assert", "ttft.p99<2s", "--allow-indicative"], 0, ""),
        (["--assert", "joules_per_output_token<1"], 94, "result invalid: a gate without a firm value: J/token at 1"),
        (["--assert", "ttft.p95<2"], 2, "--assert 'ttft.p95<2': character 11: expected a unit after 2: s or ms"),
        (["--allow-indicative"], 0, ""),
    ],
)
def test_the_command_line_exits_by_its_gates_and_says_why_in_one_line(
    words: list[str], code: int, line: str, mine: Path
) -> None:
    returned, said = report(mine, *words)
    assert returned == code
    assert said.startswith(f"loadbench: {line}" if line else "")
    assert said.count("\n") == (1 if line else 0)


def test_what_is_asserted_of_a_report_is_of_that_report_only(mine: Path) -> None:
    assert report(mine, "--quiet", "--assert", "ttft.p50<1ms")[0] == 99
    document = summary(mine)
    assert [gate["asserted"] for gate in document["gates"]] == ["ttft.p50<1ms"] * 3
    assert report(mine, "--quiet")[0] == 0
    assert summary(mine)["gates"] == []


@pytest.mark.parametrize(
    ("text", "result", "floor"),
    [
        ("error_rate<1%", "invalid", 100),
        ("http_req_failed: rate<0.01", "invalid", 100),
        ("error_rate<5%", "pass", None),
        ("error_rate<=0", "pass", None),
        ("goodput>=99%", "invalid", 100),
        ("goodput>=95%", "pass", None),
        ("goodput>=100%", "pass", None),
    ],
)
def test_a_share_that_would_allow_no_failure_of_so_few_requests_is_no_pass(
    tmp_path: Path, text: str, result: str, floor: int | None
) -> None:
    slo = {"ttft": {"p50": 60.0}}
    path = write_run(tmp_path, [Planned(Closed(1))], scenario=scenario(slo=slo))
    n = told(path).levels[0].requests.attempted
    assert 20 <= n < 100
    because = None if floor is None else f"{n} requests; it is firm from {floor}, of which one may fail"
    assert of(path, text) == [(0, result, because)]
    assert of(path, text, allow=True)[0][1] == "pass"


def test_two_requests_say_nothing_of_one_percent_but_a_miss_is_a_miss(tmp_path: Path) -> None:
    kept = write_run(tmp_path / "two", [Planned(Closed(1), duration_s=0.3)])
    assert told(kept).levels[0].requests.attempted < 5
    assert of(kept, "error_rate<1%")[0][1] == "invalid"
    failing = write_run(tmp_path / "failing", [Planned(Closed(1), fails=0.4)])
    assert of(failing, "error_rate<1%")[0][1:] == ("fail", None)
    assert of(write_run(tmp_path / "long", LEVELS[:1]), "error_rate<1%")[0][1:] == ("pass", None)


def test_allowing_indicative_values_keeps_what_the_run_asserts(mine: Path) -> None:
    asked(["ttft.p95<1ms"], False).keep(mine)  # type: ignore[union-attr]
    for words in ((), ("--allow-indicative",), ()):
        code, said = report(mine, "--quiet", *words)
        assert code == 99
        assert "gate missed: TTFT p95 at 1 user" in said
    asked(["ttft.p99<2s"], False).keep(mine)  # type: ignore[union-attr]
    assert report(mine, "--quiet")[0] == 94
    assert report(mine, "--quiet", "--allow-indicative")[0] == 0
    assert [gate["result"] for gate in summary(mine)["gates"]] == ["pass"] * 3


async def test_what_a_run_was_started_with_holds_for_every_report_of_it(tmp_path: Path) -> None:
    text = "prompts: [{name: hello, text: Say hello}]\nstages: [{concurrency: 1, requests: 20}]\n"
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    async with scripted() as server:
        words = ("s.yaml", "--endpoint", server.base_url, "--out", "out", "--quiet", "--assert", "ttft.p50<1us")
        code, out, err = await ended(await started("run", *words, cwd=tmp_path))
    assert code == 99, err
    assert "gate missed: TTFT p50 at 1 user is " in err
    assert out.rstrip().endswith("--quiet --assert 'ttft.p50<1us'")
    again = loadbench("report", "out", "--quiet", cwd=tmp_path)
    assert again.returncode == 99
    assert again.stderr in err
    instead = loadbench("report", "out", "--quiet", "--assert", "ttft.p50<1m", cwd=tmp_path)
    assert instead.returncode == 0


def test_a_bad_assertion_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    done = loadbench("run", "missing.yaml", "--assert", "ttft<2s", cwd=tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "--assert 'ttft<2s': character 5" in done.stderr


def test_gates_json_that_is_broken_is_one_line(mine: Path) -> None:
    (mine / "gates.json").write_text('{"assert": 3}', encoding="utf-8")
    code, said = report(mine)
    assert code == 2
    assert "gates.json: expected what --assert said, got" in said
    assert said.count("\n") == 1


# What is told


def test_gates_are_in_summary_json_as_its_schema_has_them(long: Path) -> None:
    document = orjson.loads(orjson.dumps(told(long, "ttft.p95<300ms", "error_rate<1% @ 9 users")))
    jsonschema.validate(document, schema())
    assert document["gates"][2] == {
        "asserted": "ttft.p95<300ms",
        "level": 2,
        "clause": "ttft.p95",
        "series": "service",
        "comparison": "<",
        "limit": 300.0,
        "value": pytest.approx(563.0, abs=1.0),
        "unit": "ms",
        "n": 190,
        "result": "fail",
        "because": None,
    }


def test_console_and_markdown_tell_what_came_of_every_assertion(mine: Path) -> None:
    done = loadbench("report", mine, "--assert", "ttft.p95<300ms", "--assert", "error_rate<1% @ 1 user")
    assert "asserted  ttft.p95<300ms: fail at 8 users (563 ms); pass at 1 user" in " ".join(done.stdout.split("\n"))
    text = (mine / "report.md").read_text(encoding="utf-8")
    assert "## Gates" in text
    assert "| error_rate&lt;1% @ 1 user | pass at 1 user (0.0%) |" in text


def test_a_value_beside_its_limit_is_told_in_as_many_digits_as_it_takes(long: Path) -> None:
    found = told(long, "ttft.p95<300ms")
    gate = replace(found.gates[0], value=300.0004, result="fail")
    assert "is 300.0004 ms, asserted < 300 ms" in why(replace(found, gates=(gate,)), 99)


def test_foreign_text_in_an_assertion_stays_text(long: Path) -> None:
    summary = told(long, "ttft.p95<2s @ <script>|\n::error::x\x1b[31m")
    text = markdown_text(summary, {})
    assert "<script>" not in text
    assert "\x1b" not in text
    assert "\n::error" not in text


def test_gates_of_nothing_are_none() -> None:
    assert asked([], allow_indicative=False) is None
