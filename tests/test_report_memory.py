"""Memory in every report: levels with their evidence, what a model takes and would need, deaths and the way back."""

from __future__ import annotations

import csv
import io
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from markdown_it import MarkdownIt

from loadbench.analysis.findings import LevelMemory, Memory, Recovery, Share
from loadbench.analysis.summary import ClosedLoad, Summary, Target
from loadbench.cli import main
from loadbench.records import Ask
from loadbench.report.markdown import markdown_text
from loadbench.report.tables import csv_text
from loadbench.report.write import write_report
from loadbench.scenario.memory import LEAST_FLOOR_BYTES, MOST_RUNGS, MemoryLadder
from loadbench.scenario.stage import Stage
from loadbench.target.recovery import LIMIT_S
from tests import findings, rundirs
from tests.findings import MODEL
from tests.test_report import HOSTILE, console
from tests.test_report_findings import links, rows_of

MIB, GIB = 1 << 20, 1 << 30
UNTOLD = Share(None, None, "fewer than three levels")
SOURCE = {
    "source": "local",
    "because": None,
    "absent": {"cgroup": "the target is in the root cgroup", "amd": "no card of the amdgpu driver"},
    "limit": {"kind": "cgroup v1", "bytes": GIB, "instead_of": "no cgroup v2 in /: Read-only file system"},
    "clock": None,
    "cost_share": 0.0015,
}


def of_level(peak_mib: float, verdict: Any = "fits", *because: str, **more: Any) -> LevelMemory:
    made = LevelMemory(
        of="rss",
        before_bytes=200 * MIB,
        peak_bytes=round(peak_mib * MIB),
        after_bytes=202 * MIB,
        exact=True,
        limit_bytes=GIB,
        available_min_bytes=20 * GIB,
        swap_peak_bytes=None,
        gpu_shared_peak_bytes=None,
        pressure_max_share=None,
        streams=4,
        tokens=1088.0,
        verdict=verdict,
        because=because or ("its peak is 25 % of the limit",),
    )
    return replace(made, **more)


def fitted(**more: Any) -> Memory:
    """200 MiB, 2 MiB a stream and 16 KiB a token."""
    made = Memory(
        model=MODEL,
        of="rss",
        base=Share(200.0 * MIB, (195.0 * MIB, 205.0 * MIB), None),
        per_stream=Share(2.0 * MIB, (1.0 * MIB, 3.0 * MIB), None),
        per_token=Share(16384.0, (16000.0, 16800.0), None),
        at_tokens=None,
        allocates="reserved",
        leak_per_1000=Share(None, None, "every level had a process of its own"),
        first_failure=3,
        how="as allocation errors that the service survived",
        levels=(0, 1, 2),
    )
    return replace(made, **more)


def way_back(**more: Any) -> Recovery:
    return replace(Recovery(3, "crashed", True, 0.4, 0.41, 0.93, 1.2, 60.0, 7, True, "back: port after 0.4 s"), **more)


@pytest.fixture
def rungs(tmp_path: Path) -> Summary:
    """Four rungs of a memory ladder: two fit, one spills, the last one fails."""
    made = write_report(rundirs.closed_ladder(tmp_path))
    memories = (
        of_level(220, streams=1),
        of_level(270, "grows"),
        of_level(420.4, "spills", "12 MiB went to swap", swap_peak_bytes=12 * MIB, exact=False),
        of_level(990, "out_of_memory", "3 requests failed for want of memory", "96 % of its limit", streams=8),
    )
    levels = [
        replace(
            level,
            load=ClosedLoad(users, ask=Ask(1024, 64)),
            purpose="rung",
            memory=memory,
            target=Target("healthy", ("a canary answered in 0.02 s",), level.target.rss_bytes),
        )
        for level, memory, users in zip(made.levels, memories, (1, 4, 4, 8), strict=True)
    ]
    evidence = ("a canary answered in 0.02 s", "3 requests failed for want of memory and it lives")
    levels[3] = replace(levels[3], target=replace(levels[3].target, state="oom_reported", evidence=evidence))
    return findings.with_levels(made, levels, memory=(fitted(),), memory_source=SOURCE)


def cells(row: str) -> list[str]:
    return re.split(r"\s{2,}", row.strip())


# Level by level


def test_every_level_has_its_memory_and_its_verdict(rungs: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(console(rungs, 120, monkeypatch), "memory by level: resident memory of its processes")
    heading = ["load", "before", "peak", "after", "limit", "available", "in swap", "streams", "each", "verdict"]
    assert cells(rows[1]) == heading
    first, _, spilt, last = (cells(row) for row in rows[3:7])
    assert first[:7] == ["1 user × 1,088 tokens", "200 MiB", "220 MiB", "202 MiB", "1 GiB", "20 GiB", "–"]
    assert first[7:] == ["1", "1,088", "fits"]
    assert spilt[2:3] + spilt[6:7] == ["≥ 420 MiB", "12 MiB"]
    assert last[-1] == "out of memory"


def test_what_rungs_gave_up_at_their_end_has_a_column(rungs: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "given" not in console(rungs, 160, monkeypatch).split("by what evidence")[0]
    last = rungs.levels[3]
    cut = replace(last, requests=replace(last.requests, failed={"censored": 7}))
    text = console(replace(rungs, levels=(*rungs.levels[:3], cut)), 160, monkeypatch)
    rows = rows_of(text, "memory by level: resident memory of its processes")
    assert [cells(row)[-2] for row in rows[3:7]] == ["0", "0", "0", "7"]


def test_where_room_is_short_peak_and_verdict_stay(rungs: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(console(rungs, 50, monkeypatch), "memory by level")
    last = next(cells(row) for row in rows if row.startswith("8 users"))
    assert (last[0], last[-1]) == ("8 users × 1,088 tokens", "out of memory")
    assert "990 MiB" in last


def test_a_peak_that_is_the_highest_of_samples_says_so(rungs: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    text = console(rungs, 120, monkeypatch)
    assert "≥ the highest of samples" in text
    exact = [replace(level, memory=of_level(220)) for level in rungs.levels]
    assert "≥" not in console(replace(rungs, levels=tuple(exact)), 120, monkeypatch)


def test_what_was_wrong_stands_with_its_evidence_and_the_rest_of_it_in_report_md(
    rungs: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(console(rungs, 120, monkeypatch), "memory and state, by what evidence")
    assert re.match(r"4 users × 1,088 tokens +spills +12 MiB went to swap", rows[2])
    assert re.match(
        r"8 users × 1,088 tokens +out of memory: oom reported +3 requests failed for want of memory; 96", rows[3]
    )
    assert "a canary answered in 0.02 s" in " ".join(rows[3:])
    assert not any("fits" in row or "grows" in row for row in rows)
    report = markdown_text(rungs, {})
    assert "| [1 user × 1,088 tokens](#level-0) | fits | its peak is 25 % of the limit |" in report


def test_a_failure_for_want_of_memory_has_one_row_and_says_nothing_twice(
    rungs: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = rungs.levels[3].target.evidence
    memory = of_level(990, "out_of_memory", "the target was oom_reported", *shared)
    text = console(replace(rungs, levels=(replace(rungs.levels[3], memory=memory, cautions=()),)), 120, monkeypatch)
    rows = rows_of(text, "memory and state, by what evidence")
    assert re.match(r"8 users × 1,088 tokens +out of memory: oom reported +a canary answered", rows[2])
    assert "the target was" not in " ".join(rows)
    assert " ".join(rows).count("a canary answered") == 1


def test_levels_with_the_same_evidence_share_a_row(rungs: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = of_level(1, "undecided", "no figures: another host, and no probe", of=None, peak_bytes=None)
    levels = [replace(level, memory=nothing, target=replace(level.target, state=None)) for level in rungs.levels]
    text = console(replace(rungs, levels=tuple(levels), memory=()), 120, monkeypatch)
    rows = rows_of(text, "memory and state, by what evidence")
    assert re.match(r"3 loads up to 8 users × 1,088 tokens +undecided +no figures", rows[2])
    assert len(rows) == 3
    assert "memory by level" not in text


def test_a_run_without_such_figures_has_the_line_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = write_report(rundirs.closed_ladder(tmp_path))
    old = [replace(level, memory=None) for level in summary.levels]
    text = console(findings.with_levels(summary, old, memory=(), memory_source=None), 80, monkeypatch)
    assert re.search(r"^memory +\d+ MiB before, peak \d+ MiB at", text, re.MULTILINE)
    assert "memory by level" not in text


def test_rungs_stand_in_a_table_of_their_own(rungs: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    text = console(rungs, 80, monkeypatch)
    assert "· memory ladder, closed loop: service time at concurrency N" in text
    assert "search" not in text


def test_the_csv_has_what_was_asked_and_every_figure(rungs: Summary) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(rungs), newline="")))
    assert (rows[2]["ask_max_tokens"], rows[2]["ask_input_tokens"], rows[2]["purpose"]) == ("1024", "64", "rung")
    assert (rows[2]["memory_verdict"], rows[2]["memory_of"], rows[2]["memory_exact"]) == ("spills", "rss", "no")
    assert rows[2]["memory_swap_peak_bytes"] == str(12 * MIB)
    assert (rows[0]["memory_swap_peak_bytes"], rows[0]["memory_exact"]) == ("", "yes")


# What it takes, and would need


def test_what_a_model_takes_has_its_intervals_and_says_what_cannot_be_told(
    rungs: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(console(rungs, 120, monkeypatch), "what it takes: resident memory of its processes")
    assert re.match(r"with no stream +200 MiB \(195 to 205 MiB\)", rows[2])
    assert any(re.match(r"each of a stream's tokens +16\.0 KiB \(15\.6 to 16\.4 KiB\)", row) for row in rows)
    assert any(re.match(r"kept per 1,000 requests +not told +every level had a process", row) for row in rows)
    assert any(re.match(r"first failure +8 users × 1,088 tokens +as allocation errors", row) for row in rows)


def test_needs_are_the_fit_multiplied_out_and_marked_where_they_do_not_fit(
    rungs: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(console(rungs, 120, monkeypatch), "what it would need")
    assert cells(rows[0]) == ["users", "512 tokens each", "2,048 tokens each", "8,192 tokens each"]
    needs = {cells(row)[0]: cells(row)[1:] for row in rows[2:9]}
    assert needs["1"] == ["210 MiB", "(234 MiB)", "(330 MiB)"]
    assert needs["4"][0] == "240 MiB"
    assert needs["8"] == ["(280 MiB)", "(472 MiB) !", "(1.21 GiB) !"]
    assert needs["32"][1] == "(1.26 GiB) !"
    assert needs["at most"] == ["82", "7", "6"]
    assert "! no less than the load that failed" in rows
    assert "! more than the 1 GiB that there are: its limit" in rows[-1]


def test_what_an_answer_that_was_cut_off_would_have_grown_to_was_not_measured(
    rungs: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = [replace(level, requests=replace(level.requests, ok=level.requests.ok - 1)) for level in rungs.levels]
    summary = replace(rungs, levels=tuple(cut), memory=(fitted(allocates="grows"),))
    needs = rows_of(console(summary, 120, monkeypatch), "what it would need")[2:8]
    assert all(cell.startswith("(") for row in needs for cell in cells(row)[1:])


def test_rlimit_data_bounds_what_load_adds_and_fewer_fit_than_it_says(
    rungs: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SOURCE | {"limit": {"kind": "RLIMIT_DATA", "bytes": 192 * MIB, "instead_of": None}}
    levels = [replace(level, memory=replace(level.memory, limit_bytes=192 * MIB)) for level in rungs.levels]  # type: ignore[type-var]
    rows = rows_of(
        console(replace(rungs, levels=tuple(levels), memory_source=source), 120, monkeypatch), "what it would need"
    )
    needs = {cells(row)[0]: cells(row)[1:] for row in rows[2:9]}
    assert needs["8"] == ["(280 MiB)", "(472 MiB) !", "(1.21 GiB) !"]
    assert needs["4"] == ["240 MiB", "(336 MiB)", "(720 MiB) !"]
    assert needs["at most"] == ["fewer than 20", "fewer than 6", "fewer than 2"]
    assert "grows by more than its limit of 192 MiB" in " ".join(rows)


def test_without_a_limit_needs_are_held_against_what_the_machine_had_left(
    rungs: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [
        replace(level, memory=of_level(220, limit_bytes=None, available_min_bytes=30 * MIB)) for level in rungs.levels
    ]
    rows = rows_of(console(replace(rungs, levels=tuple(free)), 120, monkeypatch), "what it would need")
    assert "more than the 250 MiB that there are: what it held at its peak, and what its machine had left" in rows[-1]
    assert cells(rows[8])[1:] == ["5", "1", "none"]


def test_of_a_gpu_it_is_the_devices_memory_that_needs_are_held_against(
    rungs: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = of_level(5000, of="gpu", limit_bytes=8 * GIB, available_min_bytes=MIB, gpu_shared_peak_bytes=3 * GIB)
    levels = tuple(replace(level, memory=device) for level in rungs.levels)
    text = console(replace(rungs, levels=levels, memory=(fitted(of="gpu"),)), 120, monkeypatch)
    assert "memory by level: GPU memory" in text
    assert re.search(r"shared GPU\b", text)
    assert "what it takes: GPU memory" in text
    assert "! more than the 8 GiB that there are: its device's memory" in text
    assert "its limit" not in text


def test_where_only_users_varied_needs_are_told_for_the_tokens_that_were_measured(
    rungs: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fitted(per_token=UNTOLD, at_tokens=88.0)
    text = console(replace(rungs, memory=(found,)), 120, monkeypatch)
    assert re.search(r"each stream of 88 tokens +2 MiB \(1 to 3 MiB\)", text)
    assert cells(rows_of(text, "what it would need")[0]) == ["users", "88 tokens each"]


def test_a_load_that_was_measured_is_in_no_brackets_though_its_tokens_differ_by_chance(
    rungs: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fit's mean is 88 tokens a stream; a level of 8 users had 86."""
    levels = [
        replace(level, memory=replace(level.memory, streams=8, tokens=tokens)) if level.memory else level
        for level, tokens in zip(rungs.levels, [86.0] + [60.0] * len(rungs.levels), strict=False)
    ]
    found = replace(fitted(per_token=UNTOLD, at_tokens=88.0), levels=tuple(level.index for level in levels))
    text = console(replace(rungs, levels=tuple(levels), memory=(found,)), 120, monkeypatch)
    needs = {row[0]: row[1] for row in map(cells, rows_of(text, "what it would need")) if len(row) > 1}
    assert not needs["8"].startswith("(")
    assert needs["16"].startswith("(")


def test_nothing_is_foretold_from_a_fit_that_cannot_tell_a_stream_from_none(
    rungs: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsure = Share(0.1 * MIB, (-1.0 * MIB, 1.2 * MIB), None)
    for found in (fitted(per_stream=unsure, per_token=UNTOLD), fitted(base=UNTOLD)):
        assert "what it would need" not in console(replace(rungs, memory=(found,)), 120, monkeypatch)
    text = console(replace(rungs, memory=(fitted(per_stream=unsure, per_token=UNTOLD),)), 120, monkeypatch)
    assert "102 KiB (−1 to 1.2 MiB)" in text


def test_a_fit_that_tells_nothing_says_why_in_report_md_alone(rungs: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = fitted(base=UNTOLD, per_stream=UNTOLD, per_token=UNTOLD, allocates=None, first_failure=None, how=None)
    summary = replace(rungs, memory=(nothing,))
    assert "what it takes" not in console(summary, 120, monkeypatch)
    assert "| what a stream takes | not told | fewer than three levels |" in markdown_text(summary, {})


# The way back


def test_a_recovery_has_its_times_and_what_was_lost(rungs: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(console(replace(rungs, recoveries=(way_back(),)), 120, monkeypatch), "the way back")
    told = next(row for row in rows if row.startswith("8 users"))
    assert cells(told)[1:] == ["crashed", "yes", "0.4", "0.41", "0.93", "1.20", "7", "yes"]


def test_a_target_that_did_not_come_back_is_told_so_with_the_reason(
    rungs: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    untold = "did not come back within 60 s; no connection: Connection refused"
    gone = way_back(
        to_port_s=None, to_status_s=None, to_token_s=None, to_ttft_s=None, memory_returned=None, told=untold
    )
    rows = rows_of(console(replace(rungs, recoveries=(gone,)), 120, monkeypatch), "the way back")
    told = next(row for row in rows if row.startswith("8 users × 1,088 tokens "))
    assert cells(told)[1:] == ["crashed", "yes", *["> 60"] * 4, "7", "–"]
    assert f"after 8 users × 1,088 tokens: {untold}" in " ".join(rows)


def test_a_ttft_that_nobody_knew_before_is_no_long_wait(rungs: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(console(replace(rungs, recoveries=(way_back(to_ttft_s=None),)), 120, monkeypatch), "the way back")
    told = next(row for row in rows if row.startswith("8 users × 1,088 tokens "))
    assert cells(told)[5:7] == ["0.93", "–"]


# Where the figures came from


def test_source_limit_and_cost_are_told_and_report_md_says_why_something_is_absent(
    rungs: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = " ".join(console(rungs, 100, monkeypatch).split())
    assert "memory read on this machine; a limit of 1 GiB by cgroup v1 (no cgroup v2 in /: Read-only file" in line
    assert "reading took 0.15 % of a core; not given: cgroup, amd (report.md says why)" in line
    report = markdown_text(rungs, {})
    assert "| not given: cgroup | the target is in the root cgroup |" in report
    assert "| limit | a limit of 1 GiB by cgroup" in report


def test_a_probes_clock_has_its_error(rungs: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"offset_ns": 5_000_000_000, "error_ns": 210_000, "drift_ns": -1_400_000, "end_error_ns": 200_000}
    source = SOURCE | {"source": "probe", "limit": None, "clock": clock}
    line = " ".join(console(replace(rungs, memory_source=source), 100, monkeypatch).split())
    assert "read by a probe on its host; the probe's clock known to ±0.21 ms, drift 1.40 ms" in line


def test_a_target_on_another_host_without_a_probe_says_why_there_is_nothing(
    rungs: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"source": None, "because": "the endpoint is on another host and no target_probe is given"}
    levels = tuple(replace(level, memory=None) for level in rungs.levels)
    line = " ".join(console(replace(rungs, levels=levels, memory_source=source), 100, monkeypatch).split())
    assert "not read: the endpoint is on another host and no target_probe is given" in line


# All of it


def test_in_report_md_every_row_of_evidence_links_to_its_levels(rungs: Summary) -> None:
    report = markdown_text(replace(rungs, recoveries=(way_back(),)), {})
    anchors, targets = links(report)
    assert targets <= anchors
    assert report.count("## Memory of the target") == 1
    assert "[8 users × 1,088 tokens](#level-3) | as allocation errors that the service survived" in report


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_no_line_about_memory_is_wider_than_the_terminal_and_nothing_is_cut(
    rungs: Summary, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = console(replace(rungs, recoveries=(way_back(),)), columns, monkeypatch)
    assert max(len(line) for line in text.split("\n")) <= columns
    assert "…" not in text


def test_nothing_hostile_reaches_a_report_by_memory(rungs: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = tuple(
        replace(
            level,
            model=HOSTILE,
            memory=of_level(1, "spills", HOSTILE),
            target=replace(level.target, state="crashed", evidence=(HOSTILE,)),
        )
        for level in rungs.levels
    )
    source = SOURCE | {"absent": {HOSTILE: HOSTILE}, "limit": {"kind": HOSTILE, "bytes": 1, "instead_of": HOSTILE}}
    summary = replace(
        rungs,
        levels=levels,
        memory=(fitted(model=HOSTILE, how=HOSTILE, per_stream=Share(None, None, HOSTILE)),),
        recoveries=(way_back(told=HOSTILE, to_ttft_s=None),),
        memory_source=source,
    )
    report = markdown_text(summary, {})
    assert not re.search("[\x1b\u202e]", report + console(summary, 120, monkeypatch))
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(report)
    assert "<script" not in html
    for table in html.split("<table>")[1:]:
        rows = table.split("</table>")[0].split("<tr>")[1:]
        assert len({row.count("<td") + row.count("<th") for row in rows}) == 1


# The manual

MANUAL = (Path(__file__).parent.parent / "docs" / "memory.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].removesuffix(" &").strip()
    for block in re.findall(r"```(?:sh|powershell)\n(.*?)```", MANUAL, flags=re.DOTALL)
    for line in block.splitlines()
    if re.search(r"\bloadbench [a-z]+ ", line.split("#")[0]) and "DisplayName" not in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_manual_is_understood(command: str) -> None:
    program, name, *arguments = shlex.split(command.replace("\\", "/"))
    assert program.endswith("loadbench")
    found = main.get_command(click.Context(main), name)
    assert found is not None
    found.make_context(name, list(arguments))
    for word in arguments:
        assert not word.endswith(".yaml") or (Path(__file__).parent.parent / word).is_file()


def test_the_ladder_that_the_manual_shows_is_valid_and_its_defaults_are_true() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", MANUAL, flags=re.DOTALL)
    (shown,) = (Stage.model_validate(stage) for stage in yaml.safe_load(block)["stages"])
    least = Stage.model_validate({"memory": {"until": "80%"}})
    assert shown.memory is not None
    spelt_out = {"until": "80%", "concurrency": "1..16", "max_tokens": [256, 1024, 4096], "input_tokens": 64}
    assert least.memory == MemoryLadder.model_validate(spelt_out)
    assert (shown.duration_s, least.duration_s) == (20.0, 20.0)
    assert least.memory.floor_of(64 * GIB) == round(0.05 * 64 * GIB)
    assert (MOST_RUNGS, LEAST_FLOOR_BYTES, LIMIT_S) == (64, 512 * MIB, 60.0)
