"""Two sets of runs: the statistics against cases worked out by hand, and the command from directories to exit codes."""

from __future__ import annotations

import html
import itertools
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import orjson
import pytest
from click.testing import CliRunner, Result
from markdown_it import MarkdownIt
from pydantic import TypeAdapter

from loadbench.analysis.compare import ProvenanceError, compare
from loadbench.analysis.compare_words import change
from loadbench.analysis.compared import Comparison, Row
from loadbench.analysis.group import Loaded, load, runs_in
from loadbench.analysis.runwise import (
    ALARM,
    Shift,
    chances,
    interval_rank,
    mann_whitney_counts,
    runs_needed,
    shift,
)
from loadbench.cli import main
from loadbench.errors import UsageError
from loadbench.records import Closed, Open
from loadbench.report.compare import comparison_json, markdown_text
from loadbench.report.compare_page import html_text
from tests.asking import scripted
from tests.command import ROOT, ended, loadbench, started
from tests.played import Machine, write_levels
from tests.rundirs import Planned, run_facts, write_run

RUNS = 5
HOSTILE = "<script>alert(1)</script>\x1b[31m|`x`"


# The statistics


@pytest.mark.parametrize(("base", "new"), [(1, 1), (2, 3), (3, 4), (4, 4)])
def test_the_exact_distribution_counts_every_order_of_the_runs(base: int, new: int) -> None:
    counted: Counter[int] = Counter()
    for places in itertools.combinations(range(base + new), new):
        others = [place for place in range(base + new) if place not in places]
        counted[sum(place > other for place in places for other in others)] += 1
    assert mann_whitney_counts(base, new) == tuple(counted[u] for u in range(base * new + 1))


@pytest.mark.parametrize(
    ("base", "new", "rank"),
    [(3, 3, None), (4, 4, 1), (5, 5, 3), (5, 6, 4), (8, 8, 14), (10, 10, 24)],
)
def test_the_interval_has_the_ranks_of_the_published_tables(base: int, new: int, rank: int | None) -> None:
    # One more than the critical value of U, 5 % on both sides (Mann & Whitney 1947, and every textbook since).
    assert interval_rank(base, new) == rank


def test_the_shift_is_the_median_of_all_differences_and_its_interval_their_third_from_either_end() -> None:
    base, new = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([11.0, 12.0, 13.0, 14.0, 25.0])
    differences = sorted(b - a for a in base for b in new)
    assert shift(base, new) == Shift(differences[12], differences[2], differences[-3]) == Shift(10.0, 7.0, 22.0)


def test_three_against_three_have_a_shift_and_no_interval() -> None:
    assert shift(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0])) == Shift(1.0, None, None)


def test_the_clearest_of_252_deals_has_a_chance_of_one_in_252_whatever_else_is_looked_at() -> None:
    chance = np.random.default_rng(1)
    base, new = chance.normal(0, 0.05, (RUNS, 28)), chance.normal(0, 0.05, (RUNS, 28))
    new[:, 3] += math.log(2)
    found = chances(base, new)
    assert found[3] == pytest.approx(1 / 252)
    assert min(np.delete(found, 3)) > ALARM
    assert chances(-base, -new)[3] > 0.5  # it is not better


def test_of_identical_runs_with_many_figures_one_in_a_hundred_is_called_worse() -> None:
    chance, alarms, trials = np.random.default_rng(7), 0, 600
    for _ in range(trials):
        runs = chance.normal(0, 0.2, (2 * RUNS, 20))
        alarms += bool((chances(runs[:RUNS], runs[RUNS:]) <= ALARM).any())
    assert alarms <= 0.02 * trials  # 2 / 252 = 0.8 %, and what chance adds to 600 trials


def test_a_figure_that_some_runs_lack_takes_part_with_the_others() -> None:
    base, new = np.zeros((6, 2)) + np.arange(6)[:, None] / 100, np.ones((6, 2)) + np.arange(6)[:, None] / 100
    new[0, 0] = np.nan
    new[:, 1] = np.nan
    found = chances(base, new)
    assert found[0] <= 2 / math.comb(12, 6) * 12  # without the run that has none its place means nothing
    assert found[1] == 1.0


def test_what_never_differs_is_never_called_worse() -> None:
    assert chances(np.zeros((RUNS, 1)), np.zeros((RUNS, 1))).tolist() == [1.0]
    assert chances(np.full((RUNS, 1), 0.1 + 0.2), np.full((RUNS, 1), 0.3)).tolist() == [1.0]  # rounding


def test_what_is_worse_than_any_number_is_told_from_what_is_not_and_from_nothing_else() -> None:
    inf = math.inf
    base, new = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([11.0, 12.0, 13.0, inf, inf])
    assert shift(base, new) == Shift(11.0, 7.0, inf)
    assert shift(new, base) == Shift(-11.0, -inf, -7.0)
    assert shift(base + inf, new + inf) == Shift(0.0, -inf, inf)  # how far apart they are nobody knows
    column = new[:, None]
    assert chances(base[:, None], column)[0] == pytest.approx(1 / 252)
    assert chances(-base[:, None], -column)[0] == 1.0
    assert chances(base[:, None] + inf, column + inf)[0] == 1.0


def test_how_many_runs_would_tell_follows_from_their_spread() -> None:
    base = np.array([-0.1, 0.1, -0.1, 0.1, 0.0])  # of both a variance of 0.01
    assert runs_needed(base, base, 0.1) == math.ceil(math.pi / 3 * 2 * 1.96**2 * 0.01 / 0.1**2) == 9
    assert runs_needed(base, base, 0.001) is None


# Runs


def made(folder: Path, *levels: Planned, runs: int = RUNS, seed: int = 0, **more: Any) -> Path:
    """A group of runs that differ by chance."""
    planned = levels or (Planned(Closed(4)),)
    for number in range(runs):
        write_run(folder / str(number + 1), planned, seed=seed + number, **more)
    return folder


def compared(base: Path, new: Path, **options: Any) -> Comparison:
    return compare(load(runs_in(base)), load(runs_in(new)), **options)


def of(comparison: Comparison, metric: str, level: int = 0) -> Row:
    return next(row for row in comparison.levels[level].rows if row.metric == metric)


def rewrite(run: Path, change: Callable[[dict[str, Any]], None], event: str | None = None) -> None:
    """Change run.json, or the telemetry's events of this name."""
    if event is None:
        document = orjson.loads((run / "run.json").read_bytes())
        change(document)
        (run / "run.json").write_bytes(orjson.dumps(document))
        return
    rows = [orjson.loads(line) for line in (run / "telemetry.jsonl").read_bytes().splitlines()]
    for row in rows:
        if row["event"] == event:
            change(row)
    (run / "telemetry.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("base"))


def test_a_fifth_slower_is_found_in_every_figure_that_it_concerns(base: Path, tmp_path: Path) -> None:
    found = compared(base, made(tmp_path, Planned(Closed(4), slower=1.2), seed=50))
    assert (found.answer, found.compared) == ("regressed", True)
    row = of(found, "tpot.p50")
    assert (row.answer, row.because) == ("regressed", None)
    assert row.change is not None and row.change == pytest.approx(1.2, rel=0.03)
    assert row.low is not None and row.high is not None and 1.15 < row.low < row.change < row.high < 1.25
    assert row.chance == pytest.approx(1 / 252)
    tokens = of(found, "output_tokens_per_s")
    assert tokens.answer == "regressed" and tokens.change == pytest.approx(1 / 1.2, rel=0.03)
    assert tokens.high is not None and tokens.high < 1 / 1.05
    assert of(found, "failed_share").answer == of(found, "memory.peak").answer == "equivalent"
    assert found.text.startswith("Regressed: 5 new runs against 5 runs of the base. Worse: ")


def test_the_same_the_other_way_round_is_improved(base: Path, tmp_path: Path) -> None:
    found = compared(made(tmp_path, Planned(Closed(4), slower=1.2), seed=50), base)
    assert found.answer == "improved"
    assert of(found, "ttft.p50").answer == of(found, "output_tokens_per_s").answer == "improved"


def test_runs_that_do_not_differ_are_equivalent_where_they_scatter_little(base: Path, tmp_path: Path) -> None:
    found = compared(base, made(tmp_path, seed=50))
    assert found.answer in ("equivalent", "inconclusive")
    assert of(found, "tpot.p50").answer == of(found, "e2e.p50").answer == "equivalent"


def test_a_change_within_the_least_effect_is_no_regression_however_clear(base: Path, tmp_path: Path) -> None:
    new = made(tmp_path, Planned(Closed(4), slower=1.2), seed=50)
    row = of(compared(base, new, least_effect=0.5), "tpot.p50")
    assert row.answer == "equivalent"
    assert row.chance == pytest.approx(1 / 252)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (4, 9), (9, 4)])
def test_fewer_than_five_runs_on_a_side_are_inconclusive_and_say_what_it_takes(
    tmp_path: Path, before: int, after: int
) -> None:
    slow = Planned(Closed(4), slower=2.0)
    found = compared(made(tmp_path / "b", runs=before), made(tmp_path / "n", slow, runs=after, seed=50))
    assert (found.answer, found.compared) == ("inconclusive", False)
    row = of(found, "e2e.p50")
    assert row.change == pytest.approx(2.0, rel=0.03)
    assert row.because == f"5 runs a side are needed, {before} and {after} have a value"


def test_requests_that_fail_are_told_as_points_and_gate(base: Path, tmp_path: Path) -> None:
    found = compared(base, made(tmp_path, Planned(Closed(4), fails=0.2), seed=50))
    row = of(found, "failed_share")
    assert (row.kind, row.answer, row.base.median) == ("difference", "regressed", 0.0)
    assert row.change == pytest.approx(0.2, abs=0.05)
    assert "Failed at 4 users" in found.text


def test_every_figure_has_the_values_of_its_runs_and_rows_of_the_metrics_are_told_though_not_judged(
    base: Path,
) -> None:
    found = compared(base, base)
    row = of(found, "max_gap.p95")
    assert (row.gates, row.answer, len(row.base.values), row.base.runs) == (False, None, RUNS, RUNS)
    assert {"requests_per_s", "goodput_per_s"} & {row.metric for row in found.levels[0].rows} == {"requests_per_s"}


# What comes of it where the truth is known


def test_of_ten_identical_pairs_at_70_percent_none_is_called_worse_and_of_ten_a_fifth_slower_most_are(
    tmp_path: Path,
) -> None:
    """`make bench-compare` in small: servers that differ by 2 % from start to start, on the virtual clock."""
    pairs = 10

    def group(number: int, slower: float = 1.0) -> list[Loaded]:
        found = []
        for seed in range(RUNS * number, RUNS * (number + 1)):
            speed = random.Random(seed).lognormvariate(0.0, 0.02)
            machine = Machine(1, service_s=0.1 * speed * slower, chance="uniform")
            found.append(write_levels(tmp_path / str(seed), machine, [Open(7.0)], duration_s=10.0, seed=seed))
        return list(load(found))

    same = [group(number) for number in range(pairs + 1)]
    slow = [group(number, slower=1.2) for number in range(pairs + 1, 2 * pairs + 1)]
    alarms = [compare(base, new).answer for base, new in itertools.pairwise(same)].count("regressed")
    found = [compare(base, new).answer for base, new in zip(same, slow, strict=False)].count("regressed")
    assert (alarms, found >= 0.8 * pairs) == (0, True), (alarms, found)


# What is not silently compared


def overworked(row: dict[str, Any]) -> None:
    row["client"]["cpu_share"] = 0.9


def unfinished(row: dict[str, Any]) -> None:
    row["complete"] = False


def crashed(row: dict[str, Any]) -> None:
    row["target"]["state"] = "crashed"
    row["complete"] = False


@pytest.mark.parametrize(
    ("change", "told"),
    [(overworked, "client-bound in 1 of 5 new runs"), (unfinished, "cut short in 1 of 5 new runs")],
)
def test_a_run_whose_level_cannot_be_trusted_is_left_out_and_that_is_said(
    base: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], told: str
) -> None:
    new = made(tmp_path, Planned(Closed(4), slower=2.0), seed=50)
    rewrite(new / "2", change, "level_end")
    found = compared(base, new)
    assert found.levels[0].left_out == (told,)
    row = of(found, "ttft.p50")
    assert (row.answer, row.new.values[1], row.new.runs) == ("inconclusive", None, 4)
    assert told in markdown_text(found)


def test_a_level_that_counts_in_no_run_is_told(tmp_path: Path) -> None:
    only = made(tmp_path, runs=2)
    for run in only.iterdir():
        rewrite(run, overworked, "level_end")
    found = compared(only / "1", only / "2")
    left_out = "Nothing counts at 4 users: client-bound in 1 of 1 base runs and client-bound in 1 of 1 new runs."
    assert left_out in found.text and found.answer == "inconclusive"
    assert compared(only / "1", only / "2", force=True).levels[0].left_out == found.levels[0].left_out
    allowed = compared(only / "1", only / "2", allow_doubtful=True)
    assert allowed.levels[0].left_out == () and of(allowed, "ttft.p50").new.runs == 1
    assert "Bear in mind: client-bound in 1 of 1 base runs and 1 of 1 new runs, at 4 users." in allowed.text


def test_a_target_that_dies_under_the_new_runs_is_a_regression(base: Path, tmp_path: Path) -> None:
    new = made(tmp_path, seed=50)
    for run in new.iterdir():
        rewrite(run, crashed, "level_end")
    found = compared(base, new)
    assert of(found, "target_died").answer == found.answer == "regressed"
    assert of(found, "ttft.p50").answer == "inconclusive"


def served(folder: Path, *services_s: float, seed: int = 1) -> Path:
    """Runs of 7 requests a second that take so long each, one at a time."""
    for number, service_s in enumerate(services_s, start=1):
        machine = Machine(1, service_s)
        write_levels(folder / str(number), machine, [Open(7.0)], duration_s=30.0, seed=seed + number)
    return folder


@pytest.fixture(scope="module")
def kept_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served(tmp_path_factory.mktemp("kept_up"), *[0.1] * RUNS)


def test_a_latency_over_capacity_is_worse_than_any_number(kept_up: Path, tmp_path: Path) -> None:
    new = served(tmp_path, *[0.2] * RUNS, seed=50)
    found = compared(kept_up, new)
    assert of(found, "over_capacity").answer == of(found, "output_tokens_per_s").answer == "regressed"
    row = of(found, "ttft.p95")
    assert (row.base.runs, row.new.runs, row.new.beyond, row.answer) == (RUNS, RUNS, RUNS, "regressed")
    assert "TTFT p50 at 7/s poisson beyond any number, over capacity" in found.text
    assert "| ×∞ " in markdown_text(found)
    assert "none has regressed" not in html_text(found)
    kept = orjson.loads(comparison_json(found))
    jsonschema.validate(kept, orjson.loads((ROOT / "loadbench/schemas/compare.schema.json").read_bytes()))
    row = of(TypeAdapter(Comparison).validate_python(kept), "ttft.p95")  # as a night reads it
    assert (row.change, row.new.values, change(row)) == (None, (None,) * RUNS, "beyond any number, over capacity")
    back = compared(new, kept_up)
    assert (back.answer, of(back, "ttft.p95").answer) == ("improved", "improved")


def test_a_slowdown_that_takes_some_runs_over_capacity_is_found_by_the_gate(kept_up: Path, tmp_path: Path) -> None:
    new = served(tmp_path, 0.136, 0.136, 0.2, 0.136, 0.2, seed=50)
    found = compared(kept_up, new)
    assert of(found, "over_capacity").answer == "inconclusive"
    row = of(found, "ttft.p50")
    assert (row.new.beyond, row.answer, found.answer) == (2, "regressed", "regressed")
    assert gated(kept_up, new).exit_code == 95


def test_latencies_over_capacity_on_both_sides_are_told_to_be_no_measure_and_the_throughput_gates(
    tmp_path: Path,
) -> None:
    found = compared(served(tmp_path / "b", *[0.2] * RUNS), served(tmp_path / "n", *[0.2] * RUNS, seed=50))
    row = of(found, "ttft.p50")
    assert (row.answer, row.change, row.low) == ("inconclusive", None, None)
    assert row.because is not None and row.because.startswith("over capacity in all runs of both")
    assert of(found, "output_tokens_per_s").answer == "equivalent"
    assert found.missing == () and found.compared


def stolen(row: dict[str, Any]) -> None:
    row["client"]["steal_share"] = 0.2


def crowded(row: dict[str, Any]) -> None:
    """Half of four cores went to other programs."""
    row["client"] |= {"machine_cpu_s": 1.2 + 0.5 * 4 * 15, "elapsed_s": 15.0}
    row["target"]["cpu_s"] = 5.0


@pytest.mark.parametrize(
    ("mark", "told"), [(crowded, "the machine was busy"), (stolen, "the hypervisor took CPU time")]
)
def test_runs_beside_something_busy_on_one_side_only_are_left_out_and_the_gate_says_why(
    base: Path, tmp_path: Path, mark: Callable[[dict[str, Any]], None], told: str
) -> None:
    new = made(tmp_path, Planned(Closed(4), slower=1.3), seed=50)
    for run in new.iterdir():
        rewrite(run, mark, "level_end")
    found = compared(base, new)
    why = f"{told} in 5 of 5 new runs"
    assert (found.answer, found.levels[0].left_out) == ("inconclusive", (why,))
    assert why in found.text
    done = gated(base, new)
    assert done.exit_code == 94 and why in done.stderr and done.stderr.count("\n") == 1
    assert gated(new, base).exit_code == 94  # a base that was slowed hides what the new runs lost
    allowed = compared(base, new, allow_doubtful=True)
    assert allowed.answer == "regressed" and f"Bear in mind: {why}, at 4 users." in allowed.text
    assert gated(base, new, "--allow-doubtful").exit_code == 95


def test_a_spare_run_takes_the_place_of_one_that_something_else_slowed(base: Path, tmp_path: Path) -> None:
    new = made(tmp_path, Planned(Closed(4), slower=1.3), runs=RUNS + 1, seed=50)
    rewrite(new / "2", crowded, "level_end")
    found = compared(base, new)
    assert (found.answer, of(found, "ttft.p50").new.runs) == ("regressed", RUNS)
    assert "Left out: the machine was busy in 1 of 6 new runs, at 4 users." in found.text


def test_runs_beside_something_busy_on_both_sides_are_compared_with_a_caution_on_top(tmp_path: Path) -> None:
    slow = Planned(Closed(4), slower=1.3)
    sides = made(tmp_path / "b"), made(tmp_path / "n", slow, seed=50)
    for run in (run for side in sides for run in side.iterdir()):
        rewrite(run, crowded, "level_end")
    found = compared(*sides)
    assert (found.answer, found.levels[0].left_out) == ("regressed", ())
    assert "Bear in mind: the machine was busy in 5 of 5 base runs and 5 of 5 new runs, at 4 users." in found.text


def test_it_is_improved_only_where_nothing_may_be_worse(base: Path, tmp_path: Path) -> None:
    new = made(tmp_path, Planned(Closed(4), slower=0.5, fails=0.012), seed=50)
    found = compared(base, new)
    assert of(found, "ttft.p50").answer == "improved"
    failed = of(found, "failed_share")
    assert failed.answer == "inconclusive" and failed.high is not None and failed.high > 0.01
    assert found.answer == "inconclusive"


def test_a_level_that_only_one_set_has_is_named_and_keeps_the_whole_from_being_equivalent(
    base: Path, tmp_path: Path
) -> None:
    found = compared(base, made(tmp_path, Planned(Closed(4)), Planned(Closed(8)), seed=50), force=True)
    assert found.not_compared == ("8 users of synthetic-edge:1: in no base run",)
    assert found.answer == "inconclusive"


# Provenance


def test_the_name_the_address_and_what_is_made_of_results_make_no_run_another_one(base: Path, tmp_path: Path) -> None:
    scenario = {"name": "other", "description": "x", "endpoint": "http://127.0.0.1:9/v1", "repeat": 5}
    new = made(tmp_path, seed=50, scenario=scenario | {"warmup": {"requests": 2}}, loadbench="0.2.0")
    found = compared(base, new)
    assert {(one.about, one.what) for one in found.differences} == {("instrument", "loadbench")}
    assert "What measured differs, too: instrument loadbench: 0.1.0 against 0.2.0" in found.text


def other_cpu(facts: dict[str, Any]) -> None:
    facts["environment"]["cpu"] = "Snapdragon"


def other_scenario(facts: dict[str, Any]) -> None:
    facts["scenario"] = {"request": {"max_tokens": 8}, "warmup": {"requests": 2}}


def other_engine(facts: dict[str, Any]) -> None:
    facts["endpoint"]["title"] = "Foundry Local 3.0"


def other_device(facts: dict[str, Any]) -> None:
    facts["models"][0]["device"] = "GPU"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_cpu, "machine cpu: AMD EPYC 7B13 against Snapdragon"),
        (other_scenario, "scenario request.max_tokens: 64 against 8"),
        (other_engine, "engine service: Foundry Local 2.2.1 against Foundry Local 3.0"),
        (other_device, 'engine models on: ["CPU CPUExecutionProvider"] against ["GPU CPUExecutionProvider"]'),
    ],
)
def test_runs_of_different_provenance_are_refused_with_what_differs_and_marked_by_force(
    base: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], told: str
) -> None:
    new = made(tmp_path, seed=50)
    rewrite(new / "3", change)  # one of ten is enough
    with pytest.raises(ProvenanceError) as refused:
        compared(base, new)
    assert told in str(refused.value) and "--force" in str(refused.value)
    found = compared(base, new, force=True)
    assert f"By force, though these differ: {told}" in found.text
    assert html.escape(told) in html_text(found)


def test_another_model_is_compared_by_force_in_the_place_of_the_one_that_is_gone(base: Path, tmp_path: Path) -> None:
    new = made(tmp_path, Planned(Closed(4), model="other:2", slower=0.5), seed=50)
    with pytest.raises(ProvenanceError, match=r'models: \["synthetic-edge:1"\] against \["other:2"\]'):
        compared(base, new)
    found = compared(base, new, force=True)
    assert (found.levels[0].model, found.levels[0].new_model) == ("synthetic-edge:1", "other:2")
    assert of(found, "ttft.p50").answer == "improved"


# Answers


def answering(folder: Path, answers: Callable[[int, int], int]) -> Path:
    """Runs at temperature 0 of three prompts; ``answers`` of run and prompt is the number of the answer."""
    scenario = {"warmup": {"requests": 2}, "request": {"temperature": 0.0}}
    made(folder, scenario=scenario)
    for number in range(1, RUNS + 1):
        path = folder / str(number) / "samples.jsonl"
        rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        for row in rows:
            row |= {"place": row["seq"] % 3, "answer_hash": f"{answers(number, row['seq'] % 3):016x}"}
        path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return folder


def test_prompts_are_told_apart_that_are_answered_as_before_otherwise_and_in_several_ways(tmp_path: Path) -> None:
    before = answering(tmp_path / "base", lambda run, place: 100 + place)
    after = answering(tmp_path / "new", lambda run, place: (100, 7, 102 + run % 2)[place])
    found = compared(before, after)
    assert [said.result for said in found.answers] == ["same", "changed", "unstable"]
    assert (found.answers[1].base, found.answers[1].new) == ((f"{101:016x}",), (f"{7:016x}",))
    told = "Of 3 prompts, answered 1 as before, byte for byte, 1 otherwise and 1 in several ways in one of the sets."
    assert told in found.text and f"{7:016x}" in markdown_text(found)


# What is written


def test_compare_json_is_what_its_schema_says(base: Path, tmp_path: Path) -> None:
    done = loadbench("compare", base, "--", made(tmp_path / "new", seed=50), "--json")
    assert done.returncode == 0, done.stderr
    document = orjson.loads(done.stdout)
    jsonschema.validate(document, orjson.loads((ROOT / "loadbench/schemas/compare.schema.json").read_bytes()))
    assert (tmp_path / "new" / "compare.json").read_bytes() == done.stdout.encode()


def test_what_a_server_calls_itself_is_text_in_every_output(tmp_path: Path) -> None:
    def named(folder: Path, seed: int) -> Path:
        facts = run_facts([Planned(Closed(4))], "complete", 0)
        return made(folder, Planned(Closed(4), model=HOSTILE), seed=seed, name=HOSTILE, endpoint=facts["endpoint"])

    found = compared(named(tmp_path / "b", 0), named(tmp_path / "n", 50))
    for text in (html_text(found), MarkdownIt("commonmark", {"html": True}).render(markdown_text(found))):
        assert "<script>alert" not in text and "\x1b" not in text and "alert(1)" in text


# The command


def gated(base: Path, new: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["compare", str(base), "--", str(new), "--gate", "--quiet", *more])


def without_first_tokens(run: Path) -> None:
    path = run / "samples.jsonl"
    rows = [orjson.loads(line) | {"first_event_ns": None, "first_token_ns": None} for line in path.open("rb")]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


def test_a_gate_on_what_the_new_runs_have_no_samples_of_exits_with_94(base: Path, tmp_path: Path) -> None:
    new = made(tmp_path, seed=50)
    for run in new.iterdir():
        without_first_tokens(run)
    done = gated(base, new)
    assert done.exit_code == 94
    told = "loadbench: not all that the base has could be compared: TTFT p50, TTFT p95 and TPOT p50 at 4 users"
    assert done.stderr.startswith(told) and "nothing in the new runs to compare with" in done.stderr


TWO = (Planned(Closed(4)), Planned(Closed(8)))


def test_a_gate_on_a_level_that_the_new_runs_lack_exits_with_94(tmp_path: Path) -> None:
    base, new = made(tmp_path / "b", *TWO), made(tmp_path / "n", seed=50)
    done = gated(base, new)
    told = "loadbench: not all that the base has could be compared: 8 users of synthetic-edge:1: in no new run\n"
    assert (done.exit_code, done.stderr) == (94, told)


def test_a_gate_on_a_level_that_only_our_client_shaped_in_the_new_runs_exits_with_94(tmp_path: Path) -> None:
    base = made(tmp_path / "b", *TWO)
    new = made(tmp_path / "n", TWO[0], Planned(Closed(8), slower=2.0), seed=50)
    for run in new.iterdir():
        rewrite(run, lambda row: overworked(row) if row["level"] == 1 else None, "level_end")
    done = gated(base, new)
    assert done.exit_code == 94
    assert "at 8 users of synthetic-edge:1: client-bound in 5 of 5 new runs" in done.stderr


def test_runs_that_mostly_died_are_told_and_exit_with_94(base: Path, tmp_path: Path) -> None:
    new = made(tmp_path, seed=50)
    for number in "123":
        rewrite(new / number, crashed, "level_end")
    done = gated(base, new)
    assert done.exit_code == 94 and "target crashed in 3 of 5 new runs" in done.stderr
    assert "Left out: target crashed in 3 of 5 new runs, at 4 users." in " ".join(done.stdout.split())


def test_that_nothing_succeeds_on_either_side_is_no_pass(tmp_path: Path) -> None:
    none = Planned(Closed(2), duration_s=3.0, fails=1.0, outcome="http_5xx")
    done = gated(made(tmp_path / "b", none), made(tmp_path / "n", none, seed=50))
    assert (done.exit_code, done.stderr) == (94, "loadbench: nothing could be compared: no figure has an answer\n")


def test_a_run_that_is_there_twice_is_refused_on_whichever_side(base: Path, tmp_path: Path) -> None:
    new = made(tmp_path / "n", seed=50)
    shutil.copytree(new / "1", new / "6")
    shutil.copytree(base / "1", tmp_path / "copy")
    for side, first in ((new, new / "1"), (tmp_path / "copy", base / "1")):
        done = gated(base, side)
        assert done.exit_code == 2
        assert f"expected different runs, its samples are those of {first}\n" in done.stderr


def test_a_run_whose_samples_are_gone_is_refused(base: Path, tmp_path: Path) -> None:
    new = made(tmp_path, seed=50)
    (new / "3" / "samples.jsonl").unlink()
    done = gated(base, new)
    assert done.exit_code == 2 and f"{new / '3'}: expected samples.jsonl" in done.stderr


def test_out_that_is_a_file_is_refused_before_anything_is_read(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    done = gated(base, base / ".." / base.name / "1", "--out", str(tmp_path / "file"))
    assert done.exit_code == 2
    done = gated(base, made(tmp_path / "n", seed=50), "--out", str(tmp_path / "file"))
    assert (done.exit_code, done.stderr) == (
        2,
        f"loadbench: --out {tmp_path / 'file'}: expected a directory, found a file\n",
    )
    done = gated(base, tmp_path / "n", "--out", str(tmp_path / "file" / "below"))
    assert done.exit_code == 2 and done.stderr


def slow(folder: Path) -> Path:
    return made(folder, Planned(Closed(4), slower=1.5), seed=50)


def test_a_gate_exits_with_95_on_a_regression_and_writes_what_it_found(base: Path, tmp_path: Path) -> None:
    done = loadbench("compare", base, "--", slow(tmp_path / "new"), "--gate", "--out", tmp_path)
    assert done.returncode == 95
    assert done.stderr.splitlines()[-1] == "loadbench: regressed"
    assert "regressed" in done.stdout and "TTFT p50" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"new", "compare.json", "compare.md", "compare.html"}


def test_without_a_gate_a_regression_is_told_and_no_error(base: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["compare", str(base), str(slow(tmp_path)), "--quiet"])
    assert done.exit_code == 0, done.stderr
    assert "Regressed: 5 new runs" in done.stdout


def test_a_gate_that_could_not_fail_exits_with_94(tmp_path: Path) -> None:
    few, more = made(tmp_path / "few", runs=4), made(tmp_path / "more", seed=50)
    words = ["compare", str(few), "--", str(more)]
    done = CliRunner().invoke(main, [*words, "--gate"])
    assert done.exit_code == 94
    assert done.stderr == "loadbench: nothing could be compared: no figure has an answer\n"
    rewrite(more / "1", other_cpu)
    refused = [CliRunner().invoke(main, [*words, *gate]) for gate in ([], ["--gate"])]
    assert [done.exit_code for done in refused] == [2, 94]
    assert all("machine cpu: AMD EPYC 7B13 against Snapdragon" in done.stderr for done in refused)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["1"], "expected BASE… -- NEW…"),
        (["--", "1"], "expected BASE… -- NEW…"),
        (["1", "2", "3"], "expected BASE… -- NEW…"),
        (["1", "--", "."], "expected different runs in the base and in the new ones, got it in both"),
        (["1", "--", "nowhere"], "nowhere: expected a run directory, or one that holds such, found no run.json"),
        (["1", "--", "2", "--least", "lots"], "--least: expected a share"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    base: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(base)
    done = CliRunner().invoke(main, ["compare", *words])
    assert done.exit_code == 2
    assert told in done.stderr and done.stderr.count("\n") == 1


# Groups


def test_a_group_has_its_runs_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    made(tmp_path, runs=11)
    assert [run.name for run in runs_in(tmp_path)] == [str(number) for number in range(1, 12)]
    assert runs_in(tmp_path / "3") == (tmp_path / "3",)
    with pytest.raises(UsageError, match=r"found no run\.json"):
        runs_in(tmp_path / "3" / "samples.jsonl")


async def test_a_scenario_is_run_as_often_as_it_says_and_its_group_reported(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "prompts: [{name: hello, text: Say hello}]\nstages: [{concurrency: 1, requests: 12}]\nrepeat: 5\n",
        encoding="utf-8",
    )
    async with scripted(first_token_ms=5, gap_ms=1) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        words = ("run", "s.yaml", "--endpoint", url, "--repeat", "2", "--out", "out")
        code, out, err = await ended(await started(*words, cwd=tmp_path))
    assert code == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"1", "2", "report.md"}
    assert orjson.loads((tmp_path / "out" / "2" / "run.json").read_bytes())["scenario"]["repeat"] == 2
    assert "run 2 of 2" in err and "Group    out (2 runs)" in out and "scatter" in out
    again = loadbench("report", "out", cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.endswith("Group    out (2 runs)\n")


def test_repeating_into_a_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    done = loadbench("run", ROOT / "scenarios" / "smoke.yaml", "--repeat", "2", "--out", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "loadbench: --out out: expected a new or an empty directory\n")
