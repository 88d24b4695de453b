"""From a run directory to its summary, on directories written as runs leave them."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import orjson
import pytest

from loadbench.analysis import summary as summary_module
from loadbench.analysis.metrics import METRICS
from loadbench.analysis.rundir import read, read_gaps
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Caution, Level, Summary
from loadbench.analysis.verdict import exit_code
from loadbench.errors import UsageError
from loadbench.hdr import Hdr, HlogWriter, make_tag
from loadbench.records import Closed, Open
from tests import rundirs
from tests.rundirs import MIB, Planned, write_run

SHIPPED = Path(summary_module.__file__).parent.parent / "schemas" / "summary.schema.json"


def told(path: Path) -> Summary:
    return summarise(read(path))


def scenario(**slo: object) -> dict[str, object]:
    return {"name": "edge", "warmup": {"requests": 2}, "slo": slo}


def abouts(cautions: tuple[Caution, ...]) -> set[str]:
    return {caution.about for caution in cautions}


def edit(path: Path, name: str, change: dict[str, object]) -> None:
    """Change keys of the samples of the load."""
    lines = [orjson.loads(line) for line in (path / name).read_bytes().splitlines()]
    for line in lines:
        if line["phase"] == "load":
            line.update(change)
    (path / name).write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


def edit_client(path: Path, **change: object) -> None:
    """Change what telemetry says of the client at the end of every level."""
    lines = [orjson.loads(line) for line in (path / "telemetry.jsonl").read_bytes().splitlines()]
    for line in lines:
        if line["event"] == "level_end":
            line["client"].update(change)
    (path / "telemetry.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


# Reading


def test_a_directory_that_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a run directory with run\.json, found none"):
        read(tmp_path)
    with pytest.raises(UsageError, match="expected a run directory"):
        read(tmp_path / "nowhere")
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"run\.json: expected JSON"):
        read(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": 2}', encoding="utf-8")
    with pytest.raises(UsageError, match=r"run\.json: expected schema 1, found 2"):
        read(tmp_path)


def test_samples_of_another_shape_are_refused_with_what_is_missing(tmp_path: Path) -> None:
    path = rundirs.empty_level(tmp_path)
    (path / "samples.jsonl").write_text('{"level": 0}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"expected 'phase' on every line"):
        read(path)


def test_absent_stamps_are_absent_and_not_zero(tmp_path: Path) -> None:
    samples = read(rundirs.non_streaming(tmp_path)).samples
    load = samples.take(samples.said(samples.phase, "load"))
    assert np.isnan(load.first_token_ns).all()
    assert not np.isnan(load.last_token_ns).any()
    assert samples.counts(samples.phase)["warmup"] == 2


def test_a_run_cut_off_anywhere_keeps_every_whole_line(tmp_path: Path) -> None:
    run = read(rundirs.torn(tmp_path))
    read_gaps(run, {})
    assert run.torn == {"samples.jsonl": 1, "telemetry.jsonl": 1, "histograms.hlog": 1}
    whole = (tmp_path / "samples.jsonl").read_bytes().count(b"\n")
    assert len(run.samples) == whole
    assert [level.index for level in run.levels] == [0, 1]


def test_a_run_without_any_log_is_read_as_one_in_which_nothing_happened(tmp_path: Path) -> None:
    path = rundirs.closed_ladder(tmp_path)
    for name in ("samples.jsonl", "telemetry.jsonl", "histograms.hlog"):
        (path / name).unlink()
    summary = told(path)
    assert summary.levels == ()
    assert exit_code(summary) == 94


# Numbers


def test_every_number_follows_from_the_stamps(tmp_path: Path) -> None:
    """One user, three identical requests of 10 tokens: 100 ms to the first, 10 ms for each other, one every 200 ms."""
    path = write_run(tmp_path, [Planned(Closed(1), duration_s=0.6)])
    template = orjson.loads((path / "samples.jsonl").read_bytes().splitlines()[-1])
    lines = []
    for seq in range(3):
        due_ns = 2_000_000_000 + seq * 200_000_000
        first_ns = due_ns + 101_000_000
        stamps = {"due_ns": due_ns, "sent_ns": due_ns + 1_000_000, "first_token_ns": first_ns}
        ends = {"last_token_ns": first_ns + 90_000_000, "done_ns": first_ns + 91_000_000}
        lines.append(template | stamps | ends | {"seq": seq, "output_tokens": 10, "chunks": 10})
    (path / "samples.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    (level,) = told(path).levels
    assert level.latency_ms["ttft"]["service"].p50 == pytest.approx(100)
    assert level.latency_ms["ttft"]["response"].p50 == pytest.approx(101)
    assert level.latency_ms["e2e"]["service"].max == pytest.approx(190)
    assert level.latency_ms["e2e"]["response"].min == pytest.approx(191)
    assert level.latency_ms["tpot"]["service"].mean == pytest.approx(10)
    assert level.latency_ms["lag"]["service"].p50 == pytest.approx(1)
    assert level.throughput["requests_per_s"] == pytest.approx(3 / 0.6)
    assert level.throughput["output_tokens_per_s"] == pytest.approx(30 / 0.6)
    assert level.throughput["output_tokens_per_s_per_user"] == pytest.approx(100)
    assert level.concurrency_reached == pytest.approx(3 * 0.191 / 0.6)
    assert level.tokens.output_total == 30


def test_tokens_count_where_they_arrived_and_not_where_their_request_ended(tmp_path: Path) -> None:
    """An answer of 11 tokens whose first comes 0.5 s before the end of the window and whose last 0.5 s after it."""
    path = write_run(tmp_path, [Planned(Closed(1), duration_s=1.0)])
    template = orjson.loads((path / "samples.jsonl").read_bytes().splitlines()[-1])
    stamps = {"due_ns": 2_000_000_000, "sent_ns": 2_000_000_000, "first_token_ns": 2_500_000_000}
    ends = {"last_token_ns": 3_500_000_000, "done_ns": 3_500_000_000, "output_tokens": 11, "chunks": 11}
    early = template | {"due_ns": 2_000_000_000, "sent_ns": 2_000_000_000, "first_token_ns": None, "output_tokens": 4}
    early |= {"last_token_ns": 2_100_000_000, "done_ns": 2_100_000_000, "chunks": 0}
    (path / "samples.jsonl").write_bytes(orjson.dumps(early) + b"\n" + orjson.dumps(template | stamps | ends))
    (level,) = told(path).levels
    assert level.window_s == 1.0
    assert level.throughput["output_tokens_per_s"] == pytest.approx(4 + 1 + 10 / 2)
    assert level.throughput["requests_per_s"] == 1.0
    assert level.concurrency_reached == pytest.approx(1.1)


def test_warmup_and_canary_enter_no_metric(tmp_path: Path) -> None:
    path = rundirs.closed_ladder(tmp_path)
    before = told(path)
    lines = (path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    slow = orjson.loads(lines[-1]) | {
        "phase": "canary",
        "done_ns": 10**15,
        "first_token_ns": 10**15,
        "outcome": "http_5xx",
    }
    (path / "samples.jsonl").write_bytes(b"".join(lines) + orjson.dumps(slow) + b"\n")
    assert told(path).levels == before.levels


def test_non_streaming_requests_have_no_ttft_tpot_or_gap_but_all_else(tmp_path: Path) -> None:
    for level in told(rundirs.non_streaming(tmp_path)).levels:
        assert {level.latency_ms[name]["service"].n for name in ("ttft", "tpot", "gap")} == {0}
        assert level.latency_ms["e2e"]["service"].n == level.requests.ok > 0
        assert level.throughput["output_tokens_per_s"]
        assert level.throughput["output_tokens_per_s_per_user"] is None


def test_gaps_come_from_the_histogram_log(tmp_path: Path) -> None:
    level = told(rundirs.closed_ladder(tmp_path)).levels[0]
    gap = level.latency_ms["gap"]["service"]
    assert gap.n == level.requests.ok * (rundirs.TOKENS - 1)
    assert gap.p50 == pytest.approx(rundirs.TOKEN_NS / 1e6, rel=0.05)


def test_kinds_of_prompt_are_told_apart_where_there_are_several(tmp_path: Path) -> None:
    closed, _ = told(rundirs.two_kinds(tmp_path / "two")).levels
    chat, summarised = closed.by_kind
    assert (chat.kind, summarised.kind) == ("chat", "summarise")
    assert chat.requests.attempted + summarised.requests.attempted == closed.requests.attempted
    assert (chat.tokens.output_mean, summarised.tokens.output_mean) == (32, 64)
    gaps = [kind.latency_ms["gap"]["service"].n for kind in closed.by_kind]
    assert sum(gaps) == closed.latency_ms["gap"]["service"].n
    assert told(rundirs.open_loop(tmp_path / "one")).levels[0].by_kind == ()


def test_failures_are_a_population_of_their_own(tmp_path: Path) -> None:
    level = told(rundirs.failures(tmp_path)).levels[1]
    attempted, ok, failed = level.requests.attempted, level.requests.ok, level.requests.failed
    assert failed == {"out_of_memory": attempted - ok}
    ttft = level.latency_ms["ttft"]["service"]
    assert ttft.n == ok
    assert ttft.p99_all == "inf"
    assert level.latency_ms["lag"]["service"].n == attempted
    assert level.latency_ms["lag"]["service"].p99_all is None


def test_a_level_with_fewer_requests_than_users_still_has_a_window(tmp_path: Path) -> None:
    path = write_run(tmp_path, [Planned(Closed(8), duration_s=0.05)])
    (level,) = told(path).levels
    assert level.requests.attempted == 8
    assert level.window_s > 1
    assert level.throughput["requests_per_s"] == pytest.approx(8 / level.window_s)


def test_the_summary_is_what_its_schema_says(tmp_path: Path) -> None:
    schema = json.loads(SHIPPED.read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    for name in ("closed_ladder", "two_kinds", "failures", "non_streaming", "empty_level"):
        made = getattr(rundirs, name)(tmp_path / name, scenario=scenario(ttft={"p95": "300ms"}, error_rate="1%"))
        document = orjson.loads(orjson.dumps(told(made)))
        validator.validate(document)
    del document["levels"][0]["latency_ms"]["tpot"]
    with pytest.raises(jsonschema.ValidationError, match="tpot"):
        validator.validate(document)


def test_every_metric_of_the_table_is_in_every_level(tmp_path: Path) -> None:
    for level in told(rundirs.empty_level(tmp_path)).levels:
        assert [*level.latency_ms, *level.throughput] == list(METRICS)


# SLO and goodput


def clause(level: Level, name: str) -> tuple[str, str | None]:
    (found,) = (clause for clause in level.slo if clause.clause == name)
    return found.result, found.because


def test_a_clause_counts_firm_values_only(tmp_path: Path) -> None:
    path = rundirs.closed_ladder(tmp_path, scenario=scenario(ttft={"p50": "200ms", "p95": "200ms", "p99": "200ms"}))
    low, *_, high = told(path).levels
    assert clause(low, "ttft.p50") == ("pass", None)
    assert clause(high, "ttft.p50") == ("fail", None)
    assert clause(low, "ttft.p95") == ("undecided", "70 samples; p95 is firm from 130")
    assert clause(low, "ttft.p99") == ("undecided", "70 samples; p99 can be told from 100 and is firm from 662")


def test_open_loop_is_held_to_response_time(tmp_path: Path) -> None:
    path = rundirs.open_loop(tmp_path, scenario=scenario(ttft={"p50": "1s"}, tpot={"p50": "1s"}))
    assert [(found.clause, found.series) for found in told(path).levels[0].slo] == [
        ("ttft.p50", "response"),
        ("tpot.p50", "service"),
    ]
    edit(path, "samples.jsonl", {"due_ns": 0})
    assert clause(told(path).levels[0], "ttft.p50")[0] == "fail"


def test_shares_are_decided_on_what_happened(tmp_path: Path) -> None:
    path = rundirs.failures(tmp_path, scenario=scenario(ttft={"p50": "300ms"}, error_rate="20%", goodput="80%"))
    some, most = told(path).levels
    assert (clause(some, "error_rate")[0], clause(some, "goodput")[0]) == ("pass", "pass")
    assert (clause(most, "error_rate")[0], clause(most, "goodput")[0]) == ("fail", "fail")


def test_goodput_is_of_requests_attempted(tmp_path: Path) -> None:
    path = rundirs.failures(tmp_path, scenario=scenario(ttft={"p50": "10s"}))
    some, _ = told(path).levels
    assert some.throughput["goodput_share"] == some.requests.ok / some.requests.attempted
    assert told(rundirs.failures(tmp_path / "none")).levels[0].throughput["goodput_share"] is None


# Cautions


def test_every_failure_has_the_advice_of_its_outcome_and_the_servers_words(tmp_path: Path) -> None:
    level = told(rundirs.failures(tmp_path)).levels[0]
    (caution,) = (caution for caution in level.cautions if caution.about == "out_of_memory")
    assert "Could not allocate the key-value cache buffer" in caution.reason
    assert caution.advice == "lower concurrency, max_tokens or the model's size"
    assert caution.place == "synthetic-edge:1 at 4 users"


def test_a_clean_level_with_enough_samples_has_no_caution(tmp_path: Path) -> None:
    summary = told(write_run(tmp_path, [Planned(Closed(1), model="phi:1", duration_s=40.0)]))
    assert summary.levels[0].requests.ok > 130
    assert summary.levels[0].cautions == summary.cautions == ()
    assert summary.levels[0].client.bound is False


def test_a_late_client_is_said_to_have_shaped_the_level(tmp_path: Path) -> None:
    path = rundirs.closed_ladder(tmp_path)
    edit_client(path, loop_lag_p99_ns=20_000_000)
    first, *_, last = told(path).levels
    assert first.client.bound is True
    assert first.client.bound_because == ("the event loop ran late, p99 20.0 ms: 29% of the first-token p95",)
    (caution,) = (caution for caution in first.cautions if caution.about == "client_bound")
    assert caution.reason == first.client.bound_because[0]
    assert last.client.bound is False  # 20 ms of 480


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"cpu_share": 0.95}, {"client_bound", "shared_machine"}),
        ({"cpu_share": 0.3}, {"shared_machine"}),
        ({"steal_share": 0.05}, {"stolen_cpu"}),
        ({"new_connections": 3}, {"new_connections"}),
        ({"gc_pause_max_ns": 20_000_000}, {"client_bound"}),
        ({"cpu_share": None, "steal_share": None, "loop_lag_p99_ns": None}, set()),
    ],
)
def test_what_the_client_did_is_said_where_it_matters(
    tmp_path: Path, change: dict[str, object], expected: set[str]
) -> None:
    path = write_run(tmp_path, [Planned(Closed(1), duration_s=40.0)])
    edit_client(path, **change)
    assert abouts(told(path).levels[0].cautions) == expected


def test_gaps_that_do_not_fit_the_histogram_are_said(tmp_path: Path) -> None:
    path = rundirs.closed_ladder(tmp_path)
    with (path / "histograms.hlog").open("w", encoding="ascii") as out:
        hdr = Hdr()
        hdr.add(np.array([1_000_000, 1 << 50], dtype=np.int64))
        HlogWriter(out, rundirs.STARTED_NS).write(make_tag("gap", "chat", 0), 0, 10**9, hdr)
    first, second, *_ = told(path).levels
    assert "clipped_gaps" in abouts(first.cautions)
    assert "clipped_gaps" not in abouts(second.cautions)


def test_a_model_that_was_not_measured_is_said(tmp_path: Path) -> None:
    path = rundirs.closed_ladder(tmp_path)
    facts = orjson.loads((path / "run.json").read_bytes())
    facts["models"].append(facts["models"][0] | {"id": "phi:1", "status": "skipped", "reason": "interrupted"})
    (path / "run.json").write_bytes(orjson.dumps(facts))
    (caution,) = (caution for caution in told(path).cautions if caution.about == "model")
    assert caution.reason == "phi:1 was not measured (skipped): interrupted"


def test_an_slo_that_cannot_be_read_is_refused_with_its_place(tmp_path: Path) -> None:
    path = rundirs.closed_ladder(tmp_path, scenario=scenario(ttft={"p95": "fast"}))
    with pytest.raises(UsageError, match=r"run\.json: scenario\.slo\.ttft\.p95: expected a duration .*got 'fast'"):
        told(path)


def test_a_schedule_that_was_not_kept_is_said(tmp_path: Path) -> None:
    path = write_run(tmp_path, [Planned(Open(5.0), duration_s=20.0)])
    assert "rate_missed" not in abouts(told(path).levels[0].cautions)
    lines = [orjson.loads(line) for line in (path / "samples.jsonl").read_bytes().splitlines()]
    for line in lines[-5:]:
        line.update(outcome="dropped", sent_ns=None, first_token_ns=None, last_token_ns=None, done_ns=None)
    (path / "samples.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    assert {"rate_missed", "dropped"} <= abouts(told(path).levels[0].cautions)


def test_tokens_counted_in_two_ways_are_never_mixed_silently(tmp_path: Path) -> None:
    path = write_run(tmp_path, [Planned(Closed(1)), Planned(Closed(2), token_source="chunks")])
    usage, chunks = told(path).levels
    assert not abouts(usage.cautions) & {"chunks_counted_as_tokens", "tokens_counted_two_ways"}
    assert "chunks_counted_as_tokens" in abouts(chunks.cautions)
    edit(path, "samples.jsonl", {"level": 0})
    mixed = told(path).levels[0]
    assert set(mixed.tokens.source) == {"usage", "chunks"}
    assert "tokens_counted_two_ways" in abouts(mixed.cautions)


def test_memory_that_is_not_given_back_is_said(tmp_path: Path) -> None:
    path = write_run(tmp_path, [Planned(Closed(1)), Planned(Closed(1), rss_after=300 * MIB)])
    kept, grown = told(path).levels
    assert "memory_growth" not in abouts(kept.cautions)
    assert "memory_growth" in abouts(grown.cautions)


def test_a_run_without_warmup_says_what_that_means(tmp_path: Path) -> None:
    path = rundirs.closed_ladder(tmp_path)
    lines = (path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (path / "samples.jsonl").write_bytes(b"".join(line for line in lines if b'"warmup"' not in line))
    assert "no_warmup" in abouts(told(path).cautions)


def test_a_synthetic_model_is_said_to_be_one(tmp_path: Path) -> None:
    assert "synthetic" in abouts(told(rundirs.closed_ladder(tmp_path)).cautions)


def test_a_run_cut_off_is_incomplete_with_what_was_not_run(tmp_path: Path) -> None:
    summary = told(rundirs.torn(tmp_path))
    assert summary.status == "incomplete"
    assert {"incomplete", "not_run", "torn"} <= abouts(summary.cautions)
    whole, cut = summary.levels
    assert (whole.complete, cut.complete) == (True, False)
    (caution,) = (caution for caution in cut.cautions if caution.about == "cut_short")
    assert caution.reason == "the level did not end as planned: the run was cut off"
    assert cut.latency_ms["ttft"]["service"].n > 0


def test_users_that_were_not_there_are_missed(tmp_path: Path) -> None:
    path = write_run(tmp_path, [Planned(Closed(2))])
    assert "concurrency_missed" not in abouts(told(path).levels[0].cautions)
    lines = (path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (path / "samples.jsonl").write_bytes(b"".join(line for line in lines if b'"user":1,' not in line))
    assert "concurrency_missed" in abouts(told(path).levels[0].cautions)
