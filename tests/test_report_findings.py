"""Capacity, searches, phases, what was not run, and results by interval: in every report, with what they stand on."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import yaml
from markdown_it import MarkdownIt

from loadbench.analysis.findings import NotRun, Usl
from loadbench.analysis.summary import ClosedLoad, Summary
from loadbench.records import Closed, Open
from loadbench.report.findings import bar, interval_tables
from loadbench.report.markdown import markdown_text
from loadbench.report.tables import csv_text, intervals_csv_text
from loadbench.report.write import write_report
from loadbench.scenario.stage import Stage
from tests import findings, rundirs
from tests.findings import estimate
from tests.rundirs import Planned, write_run
from tests.test_report import HOSTILE, console

BATCHED = {1: 166.0, 2: 300.0, 4: 444.0, 8: 440.0}


@pytest.fixture
def ladder(tmp_path: Path) -> Summary:
    """1, 2, 4 and 8 users, with a capacity by hand."""
    found = findings.capacity(
        BATCHED,
        "batches",
        up_to=4,
        estimates=(estimate("knee", 4.0), estimate("usl_peak", None, "the law takes 5 loads", (0, 1, 2, 3))),
        usl=Usl(100.0, 0.04, (0.03, 0.05), 0.002, (0.001, 0.003), (0, 1, 2, 3)),
    )
    return replace(write_report(rundirs.closed_ladder(tmp_path)), capacity=(found,), phases=(findings.phases(),))


@pytest.fixture
def searched(ladder: Summary) -> Summary:
    """A search in three levels, after one of a stage."""
    purposes = ("level", "probe", "probe", "confirmation")
    levels = [
        replace(findings.judged(level, "pass"), purpose=purpose)
        for level, purpose in zip(ladder.levels, purposes, strict=True)
    ]
    probes = (
        findings.probe(2, 4.0, "fail", -0.4),
        findings.probe(1, 2.0, "pass", 0.1133),
        findings.probe(3, 2.0, "pass", 5.0, "confirmation"),
    )
    search = findings.search(
        "confirmed",
        answer=2.0,
        passed=2.0,
        failed=4.0,
        estimate=2.6,
        because="confirmed by level 3: as it was",
        odd=("1 user failed and 2 users passed",),
        probes=probes,
    )
    return replace(ladder, levels=tuple(levels), searches=(search,))


@pytest.fixture
def soak(tmp_path: Path) -> Summary:
    """An open level of 40 intervals, slow in one of them."""
    summary = write_report(write_run(tmp_path, [Planned(Open(2.0), duration_s=60.0)]))
    parts = tuple(findings.interval(number, 400.0 if number == 21 else 80.0 + number) for number in range(40))
    return findings.with_levels(summary, [replace(summary.levels[0], intervals=parts)])


def rows_of(text: str, title: str) -> list[str]:
    """The lines of the console's table below this title, up to the next empty one."""
    lines = text.split("\n")
    start = next(index for index, line in enumerate(lines) if title in line) + 1
    end = next((index for index in range(start, len(lines)) if not lines[index].strip()), len(lines))
    return [line.rstrip() for line in lines[start:end]]


def links(report: str) -> tuple[set[str], set[str]]:
    """The anchors of a Markdown report, and what its links point to."""
    return set(re.findall(r'<a id="([^"]+)"></a>', report)), set(re.findall(r"\]\(#([^)]+)\)", report))


# Capacity


def test_every_estimator_stands_with_its_value_its_levels_and_its_reason(
    ladder: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(console(ladder, 120, monkeypatch), "capacity, closed loop")
    assert re.match(r"nature +batches, 4 at a time +1–8 users +that is what was seen", rows[2])
    assert any(re.match(r"knee.* 4 users +1–2 users +it is so", row) for row in rows)
    assert any(re.match(r"USL contention σ +0\.04 \(0\.03 to 0\.05\) +1–8 users", row) for row in rows)


def test_an_undecided_estimate_says_undecided_and_why(ladder: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(console(ladder, 120, monkeypatch), "capacity, closed loop")
    assert any(re.match(r"peak by the USL +undecided +1–8 users +the law takes 5 loads", row) for row in rows)
    unsure = replace(ladder.capacity[0], nature=None, saturated=None, because="nothing is firm")
    rows = rows_of(console(replace(ladder, capacity=(unsure,)), 120, monkeypatch), "capacity, closed loop")
    assert re.match(r"nature +undecided +1–8 users +nothing is firm", rows[2])
    assert re.match(r"saturated +undecided", rows[3])


def test_an_open_loop_has_no_saturation_as_it_gives_what_is_asked_for(
    ladder: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = replace(ladder.capacity[0], loop="open", nature=None, saturated=True, last_gain=None)
    rows = rows_of(console(replace(ladder, capacity=(opened,)), 120, monkeypatch), "capacity, open loop")
    assert not [row for row in rows if row.startswith("saturated")]


def test_in_report_md_every_finding_links_to_the_rows_of_its_levels(searched: Summary) -> None:
    report = markdown_text(searched, {})
    anchors, targets = links(report)
    assert anchors == {"level-0", "level-1", "level-2", "level-3"}
    assert targets == anchors
    assert '<a id="level-2"></a>4 users' in report
    assert (
        "| knee: nearly all the throughput from | 4 users | [1 user](#level-0), [2 users](#level-1) | it is so |"
        in report
    )
    assert "confirmed by [level 3](#level-3): as it was" in report
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(report)
    assert html.count('<a href="#level-0">1 user</a>') >= 3


def test_the_numbers_that_a_capacity_stands_on_are_in_report_md(ladder: Summary) -> None:
    assert "| [4 users](#level-2) | 13.9 | n/a | 444 | 200 ms | 1.00 | yes |" in markdown_text(ladder, {})


def test_prefill_and_decode_have_a_row_each_and_say_what_they_could_not_tell(
    ladder: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(console(ladder, 120, monkeypatch), "prefill and decode apart")
    assert re.match(r"reading the prompt +1,450 tokens/s, 12\.0 ms fixed +1 user ", rows[2])
    assert "7.10 ms for one, +4.10 ms for each" in rows[3]
    untold = replace(ladder.phases[0].prefill, not_told="prompts hardly differ", slope_ms=None)
    unsure = replace(ladder, phases=(findings.phases(prefill=untold, prefill_tokens_per_s=None),))
    rows = rows_of(console(unsure, 120, monkeypatch), "prefill and decode apart")
    assert re.match(r"reading the prompt +undecided +1 user +prompts hardly differ", rows[2])


def test_what_a_stop_rule_left_out_has_a_line(ladder: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    left = NotRun(findings.MODEL, 0, 3, "slo", "the SLO is missed at 8 users", ("16 users", "32 users"))
    told = replace(ladder, not_run=(left,))
    assert re.search(
        r"^not run +16 users, 32 users: after 8 users, the SLO is missed at 8 users",
        console(told, 100, monkeypatch),
        flags=re.MULTILINE,
    )
    assert "- not run: 16 users, 32 users: after 8 users, the SLO is missed at 8 users" in markdown_text(told, {})


# Search


def test_probes_stand_in_order_of_load_with_result_and_margin(
    searched: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = console(searched, 120, monkeypatch)
    rows = rows_of(text, "search: most users within the SLO")
    assert re.match(r"2 users +1 +probe +pass +\+12 % +TTFT p95 of level 1", rows[2])
    assert re.match(r"8 users +3 +confirmation +pass +over \+1,000 %", rows[3])
    assert re.match(r"4 users +2 +probe +fail +−33 % +TTFT p95 of level 2", rows[4])
    assert "answer: 2 users, confirmed by level 3: as it was" in rows
    assert "bracket: 2 users passed, 4 users failed" in rows
    assert "estimate: the monotone fit crosses the limit at 2.60 users" in rows
    assert "more load did better: 1 user failed and 2 users passed" in rows


def test_probes_have_a_table_of_their_own_and_no_place_in_the_list_of_clauses(
    searched: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = console(searched, 80, monkeypatch)
    assert "· closed loop: service time at concurrency N" in text
    assert "· search, closed loop: service time at concurrency N" in text
    assert re.search(r"ttft\.p95 ≤ 300 ms +pass at 1 user *\n", text)


def test_a_search_without_an_answer_says_so(searched: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    for result in ("undecided", "none"):
        found = replace(searched.searches[0], result=result, answer=None, because="cut short")
        assert f"answer: {result}, cut short" in console(replace(searched, searches=(found,)), 80, monkeypatch)


# Over capacity, and goodput


def test_a_level_over_capacity_is_marked_in_every_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = write_report(rundirs.open_loop(tmp_path))
    over = findings.with_levels(summary, (summary.levels[0], findings.over(summary.levels[1])))
    text = console(over, 80, monkeypatch)
    assert "3/s poisson ↑ " in text
    assert "2/s poisson ↑" not in text
    assert "↑ over capacity: more came than went" in text
    assert "</a>3/s poisson ↑ |" in markdown_text(over, {})
    (_, row) = csv.DictReader(io.StringIO(csv_text(over), newline=""))
    assert (row["road"], row["road_left_s"]) == ("over_capacity", "12.0")


def test_goodput_stands_beside_throughput_where_there_is_an_slo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"slo": {"ttft": {"p95": "300ms"}}}
    judged = write_report(rundirs.closed_ladder(tmp_path / "slo", scenario=limits))
    opened = write_report(rundirs.open_loop(tmp_path / "open", scenario=limits))
    plain = write_report(rundirs.closed_ladder(tmp_path / "plain"))
    for summary in (judged, opened):
        assert "goodput" in console(summary, 80, monkeypatch)
        assert re.search(r"good/s +goodput", console(summary, 120, monkeypatch))
    assert "good/s" not in console(plain, 300, monkeypatch)


# Intervals


def test_a_table_by_interval_is_a_picture_and_hides_no_peak(soak: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(console(soak, 120, monkeypatch), "by interval")
    heading, told = rows[1], rows[3:-1]
    assert len(told) == 20
    assert "of every 2 intervals the slowest; all are in report.md and intervals.csv" in rows[-1]
    for word in ("time", "req/s", "tok/s", "goodput", "in flight", "p95 ms", "failed"):
        assert word in heading
    (slowest,) = [row for row in told if row.endswith(" ████████████")]
    assert slowest.startswith("3:30")
    assert re.search(r" 400 ", slowest)
    assert all(row.endswith("█") or row[-1] in "▏▎▍▌▋▊▉" for row in told)


def test_report_md_and_intervals_csv_have_every_interval(soak: Summary) -> None:
    report = markdown_text(soak, {})
    assert len(re.findall(r"^\| \d+:\d\d \|", report, flags=re.MULTILINE)) == 40
    text = intervals_csv_text(soak)
    assert text is not None
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == 40
    assert [float(row["ttft_p95_ms"]) for row in rows[20:22]] == [100.0, 400.0]
    assert (rows[21]["start_s"], rows[21]["failures"], rows[21]["goodput_share"]) == ("210.0", "http_5xx=1", "0.95")
    assert rows[0]["indicative"] == "e2e_p95_ms"
    assert rows[0]["ttft_p99_ms"] == ""


def test_a_soak_of_users_says_users_and_one_without_streaming_draws_the_whole_answer(soak: Summary) -> None:
    level = replace(soak.levels[0], load=ClosedLoad(4))
    parts = tuple(
        replace(part, latency_ms=part.latency_ms | {"ttft": findings.told(0)}) for part in soak.levels[0].intervals[:3]
    )
    (table,) = interval_tables(findings.with_levels(soak, [replace(level, intervals=parts)]))
    headings = [" ".join(column.heading) for column in table.columns]
    assert "users" in headings
    assert headings[-1] == "E2E p95"
    assert not any(heading.startswith("TTFT") for heading in headings)


def test_an_interval_without_a_value_is_na_and_has_no_bar(soak: Summary) -> None:
    parts = (findings.interval(0, 80.0), findings.interval(1, None))
    (table,) = interval_tables(findings.with_levels(soak, [replace(soak.levels[0], intervals=parts)]))
    cells = {" ".join(column.heading): column.cells for column in table.columns}
    assert cells["TTFT p95 ms"][1] == "n/a"
    assert cells["TTFT p95"] == ("█" * 12, "")


def test_a_bar_is_as_long_as_its_share_to_an_eighth_of_a_column() -> None:
    assert bar(1.0) == "█" * 12
    assert bar(0.5) == "█" * 6
    assert bar(1 / 96) == "▏"
    assert bar(0.0) == ""
    assert bar(2.0) == bar(1.0)


def test_a_run_with_intervals_has_a_file_for_them_and_one_without_has_none(tmp_path: Path) -> None:
    write_report(write_run(tmp_path, [Planned(Closed(1), duration_s=20.0)]))
    assert not (tmp_path / "intervals.csv").exists()
    facts = orjson.loads((tmp_path / "run.json").read_bytes())
    facts["levels"][0]["interval_s"] = 5.0
    (tmp_path / "run.json").write_bytes(orjson.dumps(facts))
    summary = write_report(tmp_path)
    rows = list(csv.DictReader((tmp_path / "intervals.csv").open(encoding="utf-8", newline="")))
    assert [float(row["start_s"]) for row in rows] == [0.0, 5.0, 10.0, 15.0]
    assert sum(int(row["attempted"]) for row in rows) == summary.levels[0].requests.attempted


# All of it


@pytest.mark.parametrize("columns", [50, 80, 120])
def test_no_line_of_a_finding_is_wider_than_the_terminal_and_nothing_is_cut(
    searched: Summary, soak: Summary, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = NotRun(findings.MODEL, 0, 3, "slo", "the SLO is missed at 8 users", ("16 users",))
    for summary in (replace(searched, not_run=(left,)), soak):
        text = console(summary, columns, monkeypatch)
        assert max(len(line) for line in text.split("\n")) <= columns
        assert "…" not in text


def test_nothing_hostile_reaches_a_report_by_a_finding(searched: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = replace(searched.capacity[0], model=HOSTILE, because=HOSTILE)
    probes = tuple(replace(probe, because=HOSTILE) for probe in searched.searches[0].probes)
    search = replace(searched.searches[0], model=HOSTILE, because=HOSTILE, odd=(HOSTILE,), probes=probes)
    phases = findings.phases(model=HOSTILE, prefill=replace(findings.phases().prefill, not_told=HOSTILE))
    left = NotRun(HOSTILE, 0, 3, "slo", HOSTILE, (HOSTILE,))
    summary = replace(searched, capacity=(capacity,), searches=(search,), phases=(phases,), not_run=(left, left))
    report = markdown_text(summary, {})
    assert not re.search("[\x1b\u202e]", report + console(summary, 120, monkeypatch))
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(report)
    assert "<script" not in html
    assert html.count("<h1>") == 1
    for table in html.split("<table>")[1:]:
        rows = table.split("</table>")[0].split("<tr>")[1:]
        assert len({row.count("<td") + row.count("<th") for row in rows}) == 1


DOCS = Path(__file__).parent.parent / "docs"


def test_the_stages_that_the_manual_shows_are_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "saturation.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    stages = [Stage.model_validate(stage) for block in blocks for stage in yaml.safe_load(block)["stages"]]
    assert [stage.ladder for stage in stages] == [True, True, False, False, False]
    assert [stage.telling_s for stage in stages] == [None, None, None, 10.0, 60.0]


def test_the_rules_that_the_manual_calls_default_are_a_ladders() -> None:
    stop = Stage.model_validate({"rate": {"from": "1/s", "to": "4/s", "factor": 2}}).stop
    assert stop is not None
    assert (stop.gain_share, stop.slo, stop.error_rate, stop.degraded, stop.over_capacity, stop.time_s) == (
        0.05,
        True,
        0.1,
        True,
        True,
        None,
    )
