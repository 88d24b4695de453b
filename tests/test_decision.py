"""Models side by side, and ranked: figures with what they stand on, ties, reasons, and the same in every output."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import orjson
import pytest
from markdown_it import MarkdownIt

from loadbench.analysis import candidates
from loadbench.analysis.candidates import of_median
from loadbench.analysis.decision import CRITERIA, FIGURES, Candidate, Decision, Figure, Ranking
from loadbench.analysis.findings import Share
from loadbench.analysis.ranking import rank, weights_of
from loadbench.analysis.summary import Summary, schema
from loadbench.errors import UsageError
from loadbench.records import Closed, Open
from loadbench.report.decision import notes
from loadbench.report.markdown import markdown_text
from loadbench.report.write import write_report
from tests import rundirs
from tests.command import loadbench
from tests.rundirs import MIB, Held, Planned, broken_row, model_row, write_run
from tests.test_report import HOSTILE, console

WEIGHTS = {"ttft": 3.0, "throughput": 2.0, "memory": 1.0}


def decision_of(summary: Summary) -> Decision:
    assert summary.decision is not None
    return summary.decision


@pytest.fixture
def three(tmp_path: Path) -> Summary:
    """Quick, broken and slow, ranked."""
    return write_report(rundirs.three_models(tmp_path), weights=WEIGHTS)


# The table


def test_every_model_of_the_run_has_a_row_in_the_order_of_the_scenario(three: Summary) -> None:
    found = decision_of(three).candidates
    assert [candidate.model for candidate in found] == ["quick-cpu:1", "broken:1", "slow-gpu:1"]
    assert [candidate.device for candidate in found] == ["CPU", None, "GPU"]
    assert [candidate.licence for candidate in found] == ["MIT", None, "Apache-2.0"]


def test_a_model_that_did_not_load_has_its_reason_and_no_figure_and_never_a_zero(three: Summary) -> None:
    broken = decision_of(three).candidates[1]
    assert (broken.status, broken.failed_at, broken.reason) == ("failed", "load", "no file model.onnx")
    for name in FIGURES:
        figure = getattr(broken, name)
        assert figure.value is None
        assert figure.because
    assert broken.best_tokens_per_s.because == "not measured"


def test_figures_are_those_of_the_levels(three: Summary) -> None:
    quick, _, slow = decision_of(three).candidates
    alone, _, slow_alone, slow_four = three.levels
    assert quick.ttft_p50_ms.value == alone.latency_ms["ttft"]["service"].p50
    assert quick.e2e_p95_ms.value == alone.latency_ms["e2e"]["service"].p95
    assert (quick.ttft_p50_ms.at, quick.ttft_p50_ms.n, quick.ttft_p50_ms.firm) == ("1 user", alone.requests.ok, True)
    assert not quick.ttft_p95_ms.firm
    assert slow.tokens_per_s.value == slow_alone.throughput["output_tokens_per_s"]
    assert slow.best_tokens_per_s.value == slow_four.throughput["output_tokens_per_s"]
    assert slow.best_tokens_per_s.at == "4 users"


def test_every_figure_has_a_value_or_a_reason_and_its_interval_holds_it(three: Summary) -> None:
    for candidate, name in itertools.product(decision_of(three).candidates, FIGURES):
        figure = getattr(candidate, name)
        assert (figure.value is None) <= bool(figure.because)
        for reach in (figure.interval_95, figure.rough):
            assert reach is None or reach[0] <= figure.value <= reach[1]


def test_the_interval_of_tokens_per_second_is_that_of_answers_per_second(three: Summary) -> None:
    quick = decision_of(three).candidates[0]
    point = three.capacity[0].points[0]
    assert point.per_s is not None
    assert point.per_s_interval_95 is not None
    assert quick.tokens_per_s.value is not None
    assert quick.tokens_per_s.interval_95 == pytest.approx(
        [quick.tokens_per_s.value * end / point.per_s for end in point.per_s_interval_95]
    )


def test_a_run_of_one_model_has_no_table_unless_quality_or_weights_are_asked_for(tmp_path: Path) -> None:
    run = rundirs.closed_ladder(tmp_path / "one")
    assert write_report(run).decision is None
    assert not (run / "decision.csv").exists()
    assert write_report(run, weights={"ttft": 1.0}).decision is not None
    quality = {"scenario": {"name": "edge", "quality": {"prompts": "prompts.json"}}}
    assert write_report(rundirs.closed_ladder(tmp_path / "two", **quality)).decision is not None


def test_without_a_level_of_one_user_the_lowest_load_is_taken_and_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, [Planned(Closed(8)), Planned(Open(1.0)), Planned(Closed(2))])
    found = decision_of(write_report(run, weights={"ttft": 1.0})).candidates[0]
    assert (found.at, found.ttft_p50_ms.at) == ("2 users", "2 users")
    assert found.tokens_per_s.value is None
    assert found.tokens_per_s.because == "no level of one user; the lowest load is 2 users"


def test_a_lowest_load_at_which_nothing_succeeded_is_not_the_one_that_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path, [Planned(Closed(1), fails=1.0), Planned(Closed(4))])
    found = decision_of(write_report(run, weights={"ttft": 1.0})).candidates[0]
    assert found.at == "4 users"
    assert list(found.outcomes) == ["out_of_memory"]


def test_memory_after_the_load_is_the_difference_that_the_load_made(tmp_path: Path) -> None:
    kept = model_row("b:1", rss_idle_bytes=300 * MIB, rss_loaded_bytes=299 * MIB)
    rows = [model_row("a:1", rss_idle_bytes=90 * MIB, rss_loaded_bytes=590 * MIB), kept, model_row("c:1")]
    rows[2] |= {"rss_idle_bytes": None}
    levels = [Planned(Closed(1), model=row["id"]) for row in rows]
    first, second, third = decision_of(write_report(write_run(tmp_path, levels, models=rows))).candidates
    assert first.memory_loaded_bytes.value == 500 * MIB
    assert second.memory_loaded_bytes.value is None
    assert "kept what an earlier model took" in str(second.memory_loaded_bytes.because)
    assert third.memory_loaded_bytes.because == "the service's memory was not read around the load"


def elsewhere(path: Path, *rows: dict[str, Any], **facts: Any) -> tuple[Candidate, ...]:
    """The candidates of a run on a service that is not ours."""
    levels = [Planned(Closed(1), model=row["id"]) for row in rows if row["status"] == "ok"]
    run = write_run(path, levels, models=list(rows), **facts)
    document = orjson.loads((run / "run.json").read_bytes())
    document["endpoint"]["embedded"] = False
    (run / "run.json").write_bytes(orjson.dumps(document))
    return decision_of(write_report(run, weights={"memory": 1.0})).candidates


def test_memory_that_one_process_had_taken_for_an_earlier_model_makes_the_next_a_lower_bound(tmp_path: Path) -> None:
    first = model_row("a:1", rss_idle_bytes=90 * MIB, rss_loaded_bytes=590 * MIB)
    large = model_row("b:1", rss_idle_bytes=580 * MIB, rss_loaded_bytes=660 * MIB)  # of 500 that were left, and more
    one, other = elsewhere(tmp_path / "as_written", first, large)
    assert (one.memory_loaded_bytes.value, one.memory_loaded_bytes.firm) == (500 * MIB, True)
    found = other.memory_loaded_bytes
    assert (found.value, found.firm, found.at_least, found.rough) == (80 * MIB, False, True, None)
    assert "held a:1" in str(found.because)
    one, other = elsewhere(tmp_path / "turned", first, large, model_order=[1, 0])
    assert (one.memory_loaded_bytes.at_least, other.memory_loaded_bytes.at_least) == (True, False)
    one, _ = elsewhere(tmp_path / "alone", first, broken_row("b:1", failed_at="resolve"))
    assert not one.memory_loaded_bytes.at_least


def test_a_lower_bound_is_shown_as_one_and_ranks_no_model_above_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [model_row("a:1", rss_loaded_bytes=590 * MIB), model_row("b:1", rss_loaded_bytes=170 * MIB)]
    elsewhere(tmp_path, *rows)
    summary = write_report(tmp_path, weights={"memory": 1.0})
    ranking = decision_of(summary).ranking
    assert ranking is not None
    assert places(ranking) == {"b:1": "1=", "a:1": "1="}
    assert "The memory of b:1 is in doubt: at least" in ranking.verdict
    assert "≥80 MiB" in console(summary, 200, monkeypatch)
    assert list(csv.DictReader((tmp_path / "decision.csv").open(encoding="utf-8")))[1]["memory_loaded_bytes_firm"] == (
        "at least"
    )


def test_less_memory_than_a_reading_is_off_is_no_figure(tmp_path: Path) -> None:
    row = model_row("a:1", rss_idle_bytes=90 * MIB, rss_loaded_bytes=90 * MIB + 12288)
    run = write_run(tmp_path, [Planned(Closed(1), model="a:1")], models=[row])
    found = decision_of(write_report(run, weights={"memory": 1.0})).candidates[0].memory_loaded_bytes
    assert (found.value, found.because) == (None, "12 KiB more than before, and a reading is 2 MiB off")


def test_the_best_throughput_is_the_most_there_was_and_one_in_doubt_says_so(tmp_path: Path) -> None:
    levels = [Planned(Closed(1)), Planned(Closed(4), batches=4, complete=False)]
    summary = write_report(write_run(tmp_path, levels), weights={"throughput": 1.0})
    found, (alone, four) = decision_of(summary).candidates[0].best_tokens_per_s, summary.levels
    most = four.throughput["output_tokens_per_s"]
    assert (most or 0.0) > 2 * (alone.throughput["output_tokens_per_s"] or 0.0)
    assert (found.value, found.at, found.firm, found.interval_95) == (most, "4 users", False, None)
    assert found.because == "the level was cut off"


@pytest.mark.parametrize(
    ("client", "told"),
    [
        ({"loop_lag_p99_ns": 90_000_000}, "the client was the limit: the event loop ran late"),
        ({"machine_cpu_s": 25.0, "elapsed_s": 15.0}, "other programs used"),
    ],
)
def test_what_speaks_against_a_level_speaks_against_its_times_in_the_decision(
    tmp_path: Path, client: dict[str, float], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, [Planned(Closed(1), model=model) for model in ("a:1", "b:1")])
    events = [orjson.loads(line) for line in (run / "telemetry.jsonl").read_bytes().splitlines()]
    for event in events:
        if "client" in event:
            event["client"] |= client
            event["target"] |= {"cpu_s": 1.0}
    (run / "telemetry.jsonl").write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in events))
    summary = write_report(run, weights={"ttft": 1.0})
    found = decision_of(summary).candidates[0].ttft_p50_ms
    assert (found.firm, found.interval_95, str(found.because)[: len(told)]) == (False, None, told)
    assert found.rough is not None
    ranking = decision_of(summary).ranking
    assert ranking is not None and ranking.places[0].rough == ("ttft",)
    text = " ".join(console(summary, 200, monkeypatch).split())
    assert "~60." in text[text.index("Decision") :] and told in text[text.index("in doubt") :]
    assert told in next(csv.DictReader((run / "decision.csv").open(encoding="utf-8")))["ttft_p50_ms_because"]


def test_memory_of_a_model_on_a_gpu_is_what_its_processes_hold_there(tmp_path: Path) -> None:
    gpus = {"gpus": [{"index": 0, "name": "H", "used_bytes": 5000 * MIB, "process_bytes": 4000 * MIB}]}
    held = Held(200 * MIB, 300 * MIB, 200 * MIB, also=gpus)
    levels = [Planned(Closed(users), memory=held) for users in (1, 2)]
    found = decision_of(write_report(write_run(tmp_path, levels), weights={"memory": 1.0})).candidates[0]
    assert found.memory_loaded_bytes.value == 4000 * MIB


def test_what_a_stream_takes_comes_from_the_fit_with_its_interval(tmp_path: Path) -> None:
    levels = [
        Planned(Closed(users), memory=Held(200 * MIB, (200 + 50 * users) * MIB, 200 * MIB)) for users in (1, 2, 4, 8)
    ]
    summary = write_report(write_run(tmp_path, levels), weights={"memory": 1.0})
    found, (takes,) = decision_of(summary).candidates[0].memory_per_stream_bytes, summary.memory
    assert found.value == takes.per_stream.value_bytes == pytest.approx(50 * MIB, rel=0.05)
    assert found.interval_95 == takes.per_stream.interval_95
    assert found.n == 4


def test_a_stream_of_which_only_the_tokens_are_known_is_not_told(tmp_path: Path) -> None:
    """Every level had as many streams: what a stream takes besides its tokens is unknown, which is not nothing."""
    levels = [Planned(Closed(users), memory=Held(200 * MIB, 300 * MIB, 200 * MIB)) for users in (1, 2, 4, 8)]
    summary = write_report(write_run(tmp_path, levels), weights={"memory": 1.0})
    (takes,) = summary.memory
    untold, each = Share(None, None, "every level had as many streams"), Share(16384.0, (16000.0, 17000.0), None)
    summary = replace(summary, memory=(replace(takes, per_stream=untold, per_token=each),))
    of = candidates._Measured({"id": takes.model, "status": "ok"}, (), summary, None, "", None)
    found = candidates._per_stream(of)
    assert (found.value, found.because) == (None, "every level had as many streams")


def test_memory_that_bears_no_line_is_absent_with_the_reason_of_the_fit(three: Summary) -> None:
    found = decision_of(three).candidates[0].memory_per_stream_bytes
    assert found.value is None
    assert "it takes 3" in str(found.because)


def test_a_cold_start_is_load_and_first_token_and_the_download_is_apart(tmp_path: Path) -> None:
    rows = [model_row("a:1", downloaded_ms=60_000.0, load_ms=800.0, first_ms=100.0), model_row("b:1", load_ms=None)]
    levels = [Planned(Closed(1), model=row["id"]) for row in rows]
    cold, warm = decision_of(write_report(write_run(tmp_path, levels, models=rows))).candidates
    assert (cold.cold_start_ms.value, cold.download_ms.value) == (900.0, 60_000.0)
    assert cold.cold_start_ms.firm is False
    assert cold.cold_start_ms.interval_95 is None
    assert warm.cold_start_ms.value is None
    assert "loaded already has no cold start" in str(warm.cold_start_ms.because)


def test_no_failure_of_ten_may_still_be_one_in_four(tmp_path: Path) -> None:
    run = write_run(tmp_path, [Planned(Closed(1), duration_s=2.2)])
    found = decision_of(write_report(run, weights={"failures": 1.0})).candidates[0].failed_share
    assert (found.value, found.n) == (0.0, 11)
    assert found.interval_95 == pytest.approx((0.0, 0.2588), abs=1e-3)  # Wilson's, by hand: z² / (n + z²)


def test_rows_of_an_older_run_have_a_table_too(tmp_path: Path) -> None:
    old = ("asked", "id", "synthetic", "status", "reason", "load_ms", "first_ms")
    rows = [{name: model_row(model)[name] for name in old} for model in ("a:1", "b:1")]
    run = write_run(tmp_path, [Planned(Closed(1), model=row["id"]) for row in rows], models=rows)
    found = decision_of(write_report(run)).candidates
    assert [candidate.disk_bytes.because for candidate in found] == ["nobody says how large it is on disk"] * 2


def test_marks_of_people_are_the_quality_and_say_so(tmp_path: Path) -> None:
    run = rundirs.three_models(tmp_path)
    marks = {"quick-cpu:1": 2, "slow-gpu:1": 5}
    answers: list[dict[str, Any]] = [
        {"model": model, "kind": "quality", "place": place, "id": str(place), "category": None, "repeat": 0}
        | {"messages": [{"role": "user", "content": "?"}], "answer": "yes", "answer_hash": "ab", "outcome": "ok"}
        | {"detail": None, "finish_reason": "stop", "output_tokens": 1, "e2e_ms": 10.0}
        | {"aspects": [], "rubric": None, "checks": {}}
        for model, place in itertools.product(marks, range(12))
    ]
    given = [
        {"model": row["model"], "id": row["id"], "repeat": 0, "answer_hash": "ab", "note": None, "rater": "r"}
        | {"mark": marks[row["model"]] - (row["place"] % 4 == 0), "at": "2026-11-22T14:30:00Z"}
        for row in answers
    ]
    for name, rows in (("answers", answers), ("marks", given)):
        (run / f"{name}.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    quick, broken, slow = decision_of(write_report(run, weights={"quality": 1.0})).candidates
    assert quick.quality.value == pytest.approx(1.75)
    assert (slow.quality.source, slow.quality.n, slow.quality.firm) == ("human", 12, True)
    assert slow.quality.interval_95 is not None
    assert broken.quality.because == "not measured"


def test_the_rough_reach_of_a_median_is_that_of_the_sign_test() -> None:
    assert of_median(np.arange(1.0, 6.0)) is None
    assert of_median(np.arange(1.0, 7.0)) == (1.0, 6.0)
    assert of_median(np.arange(1.0, 21.0)) == (6.0, 15.0)  # Conover, Practical Nonparametric Statistics, table A3
    assert of_median(np.arange(1.0, 51.0)) == (18.0, 33.0)
    assert of_median(np.empty(0)) is None


def test_the_rough_reach_of_a_median_of_thousands_does_not_underflow() -> None:
    low, high = of_median(np.arange(1.0, 5001.0)) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2500 - 0.98 * math.sqrt(5000), 2500 + 0.98 * math.sqrt(5000)), abs=2)


# The ranking

UNTOLD = Figure(None, because="nobody looked")


def known(value: float, spread: float = 0.0, at: str | None = "1 user") -> Figure:
    return Figure(value, (value * (1 - spread), value * (1 + spread)), 100, True, "measured", at)


def candidate(model: str, **figures: Any) -> Candidate:
    words: dict[str, Any] = dict.fromkeys(field.name for field in fields(Candidate))
    words |= {"model": model, "asked": model, "status": "ok", "capabilities": (), "at": "1 user", "outcomes": {}}
    return Candidate(**words | dict.fromkeys(FIGURES, UNTOLD) | figures)


def places(ranking: Ranking) -> dict[str, str]:
    return {place.model: f"{place.rank}{'=' if place.tied else ''}" for place in ranking.places}


def test_a_score_is_the_weighted_product_of_the_ratios_to_the_best() -> None:
    a = candidate("a", ttft_p50_ms=known(100.0), best_tokens_per_s=known(50.0))
    b = candidate("b", ttft_p50_ms=known(400.0), best_tokens_per_s=known(200.0))
    found = rank([a, b], {"ttft": 3.0, "throughput": 1.0})
    assert [place.model for place in found.places] == ["a", "b"]
    assert [place.score for place in found.places] == pytest.approx([0.25**0.25, 0.25**0.75])
    assert [(term.ratio, term.share) for term in found.places[0].terms] == [(1.0, 0.75), (0.25, 0.25)]
    assert [term.lost_share for term in found.places[0].terms] == pytest.approx([0.0, 1.0])
    for place in found.places:
        assert math.prod(term.factor for term in place.terms) == pytest.approx(place.score)


def test_weights_count_only_in_proportion_and_units_not_at_all() -> None:
    a = candidate("a", ttft_p50_ms=known(100.0), disk_bytes=Figure(2e9, firm=True))
    b = candidate("b", ttft_p50_ms=known(120.0), disk_bytes=Figure(1e9, firm=True))
    once, tenfold = rank([a, b], {"ttft": 1.0, "disk": 2.0}), rank([a, b], {"ttft": 10.0, "disk": 20.0})
    assert [place.score for place in once.places] == pytest.approx([place.score for place in tenfold.places])
    seconds = [replace(each, ttft_p50_ms=known((each.ttft_p50_ms.value or 0) / 1000)) for each in (a, b)]
    assert [place.score for place in rank(seconds, once.weights).places] == pytest.approx(
        [place.score for place in once.places]
    )


def test_a_third_model_does_not_turn_the_order_of_two() -> None:
    a = candidate("a", ttft_p50_ms=known(100.0), best_tokens_per_s=known(90.0))
    b = candidate("b", ttft_p50_ms=known(130.0), best_tokens_per_s=known(110.0))
    third = candidate("c", ttft_p50_ms=known(10.0), best_tokens_per_s=known(1.0))
    weights = {"ttft": 1.0, "throughput": 1.0}
    alone, beside = (
        [place.model for place in rank(some, weights).places if place.model != "c"] for some in ([a, b], [a, b, third])
    )
    assert alone == beside == ["a", "b"]


def test_scores_whose_reaches_overlap_share_a_rank() -> None:
    found = rank(
        [candidate("a", ttft_p50_ms=known(100.0, 0.1)), candidate("b", ttft_p50_ms=known(110.0, 0.1))], {"ttft": 1.0}
    )
    assert places(found) == {"a": "1=", "b": "1="}
    assert found.places[0].ties == ("b",)
    assert found.verdict == (
        "With these weights (ttft 1) a and b come first and are not told apart. a has the highest score: best in ttft."
    )


def test_of_a_chain_only_those_that_nobody_beats_share_the_first_rank() -> None:
    chain = [candidate(name, ttft_p50_ms=known(value, 0.06)) for name, value in (("a", 100), ("b", 110), ("c", 121))]
    found = rank(chain, {"ttft": 1.0})
    assert places(found) == {"a": "1=", "b": "1=", "c": "2"}
    assert found.places[2].ties == ("b",)
    assert notes(Decision(tuple(chain), found))[0] == "c, though its rank is 2, is not told apart from b"


def test_a_clear_winner_is_told_with_what_made_it_one() -> None:
    a = candidate("a", ttft_p50_ms=known(100.0, 0.02), quality=known(4.0, 0.02))
    b = candidate("b", ttft_p50_ms=known(200.0, 0.02), quality=known(5.0, 0.02))
    found = rank([a, b], {"ttft": 3.0, "quality": 1.0})
    assert places(found) == {"a": "1", "b": "2"}
    assert found.verdict == (
        "With these weights (ttft 3, quality 1) a comes first: best in ttft, 80% of the best in quality."
    )


def test_an_absent_figure_leaves_a_model_unranked_with_the_reason_neither_best_nor_worst() -> None:
    found = rank([candidate("a"), candidate("b", quality=known(3.0))], {"quality": 1.0})
    assert places(found) == {"b": "1", "a": "None"}
    assert found.places[1].because == "quality is not known: nobody looked"
    assert "b is the only one that can be ranked" in found.verdict
    assert "a is not ranked: quality is not known: nobody looked." in found.verdict


def test_where_nobody_has_a_figure_nothing_is_ranked() -> None:
    found = rank([candidate("a"), candidate("b")], {"quality": 1.0})
    assert {place.rank for place in found.places} == {None}
    assert found.verdict.startswith("With these weights (quality 1) nothing can be ranked.")


def test_a_figure_without_any_interval_is_told_apart_from_nothing() -> None:
    unsure = Figure(500.0, n=3, firm=False, at="1 user")
    found = rank([candidate("a", ttft_p50_ms=known(100.0)), candidate("b", ttft_p50_ms=unsure)], {"ttft": 1.0})
    assert places(found) == {"a": "1=", "b": "1="}
    assert "No interval can be estimated for ttft" in found.verdict


def test_a_size_that_is_known_to_the_byte_needs_no_interval() -> None:
    sizes = [candidate(name, disk_bytes=Figure(size, firm=True)) for name, size in (("a", 2000), ("b", 2001))]
    assert places(rank(sizes, {"disk": 1.0})) == {"a": "1", "b": "2"}


def test_equal_models_are_a_tie() -> None:
    same = [candidate(name, disk_bytes=Figure(2000, firm=True)) for name in ("a", "b")]
    assert places(rank(same, {"disk": 3.0})) == {"a": "1=", "b": "1="}


def test_no_failures_at_all_is_the_best_and_no_division_by_zero() -> None:
    share = {"a": Figure(0.0, (0.0, 0.01), 400, True), "b": Figure(0.5, (0.45, 0.55), 400, True)}
    found = rank([candidate(name, failed_share=figure) for name, figure in share.items()], {"failures": 1.0})
    assert places(found) == {"a": "1", "b": "2"}
    assert found.places[1].score == pytest.approx(0.5)


def test_a_model_of_which_nothing_succeeded_is_not_ranked() -> None:
    lost = candidate("a", failed_share=Figure(1.0, (0.99, 1.0), 400, True))
    found = rank([lost, candidate("b", failed_share=Figure(0.0, (0.0, 0.01), 400, True))], {"failures": 1.0})
    assert found.places[1].because == "no request succeeded"


def test_times_of_different_loads_are_not_held_against_each_other() -> None:
    some = [
        candidate(name, ttft_p50_ms=known(100.0, at=at))
        for name, at in zip("abc", ("1 user", "4 users", "1 user"), strict=True)
    ]
    found = rank(some, {"ttft": 1.0})
    assert found.places[2].because == "ttft is told at 4 users, of the others at 1 user"


def test_two_copies_of_one_model_tie_and_one_a_third_slower_does_not(tmp_path: Path) -> None:
    """Twelve runs of 15 s each, 70 requests or fewer of each model."""
    tied, parted = 0, 0
    for seed in range(12):
        names = {"a:1": 1.0, "b:1": 1.0, "c:1": 1.33}
        levels = [Planned(Closed(1), model=model, slower=slower) for model, slower in names.items()]
        run = write_run(tmp_path / str(seed), levels, seed=seed)
        ranking = decision_of(write_report(run, weights={"ttft": 1.0, "speed": 1.0})).ranking
        assert ranking is not None
        found = places(ranking)
        tied += found["a:1"] == found["b:1"] == "1="
        parted += found["c:1"] == "3"
    assert tied >= 11
    assert parted == 12


# --weights


def test_weights_are_read_by_name() -> None:
    assert weights_of("ttft=3, quality=0.5,memory=1e1") == {"ttft": 3.0, "quality": 0.5, "memory": 10.0}
    assert weights_of(",".join(f"{name}=1" for name in CRITERIA)) == dict.fromkeys(CRITERIA, 1.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("speeed=1", f"--weights: expected one of {', '.join(CRITERIA)}, got speeed"),
        ("ttft", "--weights: expected NAME=NUMBER,… such as ttft=3,quality=2, got ttft"),
        ("", "--weights: expected NAME=NUMBER,… such as ttft=3,quality=2, got nothing"),
        ("ttft=1,", "--weights: expected NAME=NUMBER on both sides of each comma, got nothing beside one"),
        ("ttft=0", "--weights: ttft: expected a number above 0, got 0"),
        ("ttft=-1", "--weights: ttft: expected a number above 0, got -1"),
        ("ttft=nan", "--weights: ttft: expected a number above 0, got nan"),
        ("ttft=inf", "--weights: ttft: expected a number above 0, got inf"),
        ("ttft=", "--weights: ttft: expected a number above 0, got nothing"),
        ("ttft=3,ttft=1", "--weights: expected ttft once, got it twice"),
    ],
)
def test_weights_that_cannot_be_are_refused_in_one_line(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        weights_of(text)
    assert str(caught.value) == told


def test_report_ranks_on_the_command_line_and_leaves_the_files(tmp_path: Path) -> None:
    run = rundirs.three_models(tmp_path)
    done = loadbench("report", run, "--weights", "ttft=3,memory=1")
    assert "With these weights (ttft 3, memory 1) quick-cpu:1 comes first" in done.stdout
    ranking = orjson.loads((run / "summary.json").read_bytes())["decision"]["ranking"]
    assert [place["rank"] for place in ranking["places"]] == [1, 2, None]
    assert loadbench("report", run, "--quiet").stdout.startswith("Results")
    assert orjson.loads((run / "summary.json").read_bytes())["decision"]["ranking"] is None


def test_wrong_weights_end_a_run_before_it_begins(tmp_path: Path) -> None:
    done = loadbench("run", "scenarios/smoke.yaml", "--out", tmp_path / "out", "--weights", "tttft=1")
    assert done.returncode == 2
    assert done.stderr.startswith("loadbench: --weights: expected one of ttft, ")
    assert not (tmp_path / "out").exists()


# In every output


@pytest.mark.parametrize("columns", [60, 80, 120, 250])
def test_the_console_shows_every_figure_in_as_many_blocks_as_it_takes(
    three: Summary, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = console(three, columns, monkeypatch)
    assert max(map(len, text[: text.index("Results")].split("\n"))) <= columns
    assert text.splitlines()[-1].endswith("loadbench run scenarios/edge.yaml --weights ttft=3,throughput=2,memory=1")
    told = text[text.index("Decision") : text.index("closed loop:")]
    for cell in (
        "60.4 ms",
        "~69.9 ms",
        "297 (4 users)",
        "810 MiB",
        "~2.91 s",
        "Apache-2.0",
        "failed",
        "0.775–0.826",
    ):
        assert cell in told
    assert ("Decision · goes on" in told) == (columns < 250)


def test_long_names_leave_room_for_figures_on_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"Phi-4-mini-reasoning-of-the-very-long-name-{kind}-gpu:{kind}" for kind in "12"]
    summary = write_report(write_run(tmp_path, [Planned(Closed(1), model=name) for name in names]))
    text = console(summary, 80, monkeypatch)
    told = text[text.index("Decision") : text.index("closed loop:")]
    assert max(map(len, told.split("\n"))) <= 80
    assert "Phi-4-mini…ame-1-gpu:1" in told
    assert names[0] in text


def test_markdown_has_the_table_the_ranks_and_what_every_figure_stands_on(three: Summary) -> None:
    text = markdown_text(three, {})
    section = text[text.index("## The models side by side") : text.index("## What the verdict stands on")]
    assert "| quick-cpu:1 | 1 | ok | CPU | 60.4 ms | ~69.9 ms |" in section
    assert "| broken:1 | – | failed | n/a |" in section
    assert "| TTFT p50 | 60.4 ms | 57.3 ms to 61.4 ms | 70 | firm | measured | 1 user |" in section
    assert "| throughput | 2 (33.3 %) |" in section
    tables = [token for token in MarkdownIt("commonmark").enable("table").parse(section) if token.type == "table_open"]
    assert len(tables) == 6


def test_decision_csv_has_a_row_a_model_with_every_figure_and_empty_fields_for_absent_ones(tmp_path: Path) -> None:
    run = rundirs.three_models(tmp_path)
    found = decision_of(write_report(run, weights=WEIGHTS))
    rows = list(csv.DictReader((run / "decision.csv").open(encoding="utf-8", newline="")))
    assert [row["model"] for row in rows] == [each.model for each in found.candidates]
    for row, each in zip(rows, found.candidates, strict=True):
        for name in FIGURES:
            figure = getattr(each, name)
            assert row[name] == ("" if figure.value is None else repr(figure.value))
            assert row[f"{name}_because"] == (figure.because or "")
    assert [row["rank"] for row in rows] == ["1", "", "2"]
    assert rows[1]["unranked_because"] == "it failed at load"
    assert [name for name, text in rows[1].items() if "no file model.onnx" in text] == ["reason"]


def test_summary_json_keeps_to_its_schema(tmp_path: Path) -> None:
    run = rundirs.three_models(tmp_path)
    write_report(run, weights=WEIGHTS)
    document = orjson.loads((run / "summary.json").read_bytes())
    jsonschema.validate(document, schema())
    assert {*document["decision"]["candidates"][0]} >= {*FIGURES}
    assert document["decision"]["candidates"][1]["ttft_p50_ms"]["value"] is None


def test_names_and_reasons_from_a_server_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [model_row(HOSTILE, licence=HOSTILE, device=HOSTILE), broken_row(HOSTILE + "2", reason=HOSTILE)]
    run = write_run(tmp_path, [Planned(Closed(1), model=HOSTILE)], models=rows)
    summary = write_report(run, weights={"ttft": 1.0})
    text = console(summary, 120, monkeypatch)
    assert "\x1b" not in text
    assert "\u202e" not in text
    html = MarkdownIt("commonmark").enable("table").render(markdown_text(summary, {}))
    assert "<script>" not in html
    assert "\x1b" not in (run / "decision.csv").read_text(encoding="utf-8")


def test_every_criterion_weighs_a_figure_of_the_table() -> None:
    assert {criterion.figure for criterion in CRITERIA.values()} <= {*FIGURES}
    assert {*FIGURES} <= {field.name for field in fields(Candidate)}


# Cold and warm


def test_light_prompts_that_keep_a_model_warm_are_counted_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [model_row("a:1", downloaded_ms=63_000.0), model_row("b:1")]
    run = write_run(tmp_path, [Planned(Closed(1), model=row["id"]) for row in rows], models=rows)
    before = write_report(run)
    first = orjson.loads((run / "samples.jsonl").read_bytes().splitlines()[0])
    light = [first | {"phase": "keep_warm", "level": 0, "seq": seq} for seq in range(3)]
    light[1] |= {"outcome": "http_5xx"}
    with (run / "samples.jsonl").open("ab") as samples:
        samples.writelines(orjson.dumps(row) + b"\n" for row in light)
    after = write_report(run)
    kept = after.models[0].kept_warm
    assert kept is not None
    assert (kept.attempted, kept.ok, kept.failed) == (3, 2, {"http_5xx": 1})
    assert after.models[1].kept_warm is None
    assert after.levels == before.levels
    assert decision_of(after) == decision_of(before)
    text = " ".join(console(after, 200, monkeypatch).split())
    assert "loaded in 812 ms; downloaded in 63.0 s" in text
    assert "kept warm by 3 light prompts, 1 of which failed, which no figure counts" in text
