"""What a run directory is told as: on the console, in Markdown, in CSV and in JSON, all from one summary."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from markdown_it import MarkdownIt

from loadbench.analysis.metrics import LATENCIES, METRICS, RATES
from loadbench.analysis.summary import Caution, Summary, schema
from loadbench.outcomes import OUTCOMES
from loadbench.records import Closed, Open
from loadbench.report.columns import COLUMNS
from loadbench.report.console import print_report
from loadbench.report.markdown import markdown_text
from loadbench.report.tables import csv_text
from loadbench.report.words import figure, milliseconds
from loadbench.report.write import write_report
from tests import rundirs
from tests.rundirs import Planned, write_run

SLO = {"slo": {"ttft": {"p95": "300ms"}, "tpot": {"p95": "100ms"}, "error_rate": "1%"}}
HOSTILE = "[red]m[/] \x1b[31m|<script>x</script>`\u202e\n# =1"
BUILDERS = (
    rundirs.closed_ladder,
    rundirs.two_kinds,
    rundirs.open_loop,
    rundirs.failures,
    rundirs.all_failed,
    rundirs.non_streaming,
    rundirs.empty_level,
    rundirs.torn,
)
Builder = Callable[..., Path]


def console(summary: Summary, columns: int, monkeypatch: pytest.MonkeyPatch, directory: str = "results/x") -> str:
    """The report as a pipe of this width gets it."""
    monkeypatch.setenv("COLUMNS", str(columns))
    out = io.StringIO()
    print_report(summary, Path(directory), out)
    return out.getvalue()


def table_lines(text: str) -> list[list[str]]:
    """The heading's last line and the rows of the first table, as cells."""
    lines = text.split("\n")
    rule = next(index for index, line in enumerate(lines) if line.startswith("──"))
    rows = []
    for line in lines[rule + 1 :]:
        if not re.match(r"\d", line):
            break
        rows.append(re.split(r"\s{2,}", line.strip()))
    return [re.split(r"\s{2,}", lines[rule - 1].strip()), *rows]


# The console


@pytest.mark.parametrize("columns", [50, 80, 120, 200])
@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_no_line_is_wider_than_the_terminal_and_every_row_has_every_cell(
    build: Builder, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = console(write_report(build(tmp_path)), columns, monkeypatch)
    assert max(len(line) for line in text.split("\n")) <= columns
    assert "…" not in text
    heading, *rows = table_lines(text)
    assert rows
    assert {len(row) for row in rows} == {len(heading)}


def test_a_wider_terminal_shows_more_columns_and_the_narrow_one_keeps_the_main_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = write_report(rundirs.closed_ladder(tmp_path, scenario=SLO))
    narrow, wide, widest = (console(summary, columns, monkeypatch) for columns in (80, 120, 300))
    assert len(table_lines(narrow)[0]) < len(table_lines(wide)[0]) < len(table_lines(widest)[0])
    for heading in ("load", "ok/all", "req/s", "tok/s", "p50 ms", "p95 ms", "SLO"):
        assert heading in table_lines(narrow)[0]
    assert "More columns" in narrow
    assert "More columns" not in widest


def test_closed_loop_shows_service_time_at_a_concurrency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = write_report(rundirs.closed_ladder(tmp_path))
    text = console(summary, 80, monkeypatch)
    assert "closed loop: service time at concurrency N" in text
    service = summary.levels[3].latency_ms["ttft"]["service"].p50
    assert f"{service:.0f}" in table_lines(text)[4]


def test_open_loop_shows_response_time_with_service_time_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = write_report(rundirs.open_loop(tmp_path))
    ttft = {
        series: replace(d, p50=p50)
        for p50, (series, d) in zip((11.1, 99.9), summary.levels[0].latency_ms["ttft"].items(), strict=True)
    }
    level = replace(summary.levels[0], latency_ms={**summary.levels[0].latency_ms, "ttft": ttft})
    assert list(ttft) == ["service", "response"]
    text = console(replace(summary, levels=(level,)), 80, monkeypatch)
    row = table_lines(text)[1]
    narrow = table_lines(console(replace(summary, levels=(level,)), 50, monkeypatch))[1]
    assert "open loop: response time" in text
    assert row.index("99.9") < row.index("11.1")
    assert "99.9" in narrow
    assert "11.1" not in narrow
    assert "service" in text.split("──")[0]


def test_both_series_of_open_loop_stand_side_by_side_in_every_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = write_report(rundirs.open_loop(tmp_path))
    latencies = json.loads((tmp_path / "summary.json").read_bytes())["levels"][0]["latency_ms"]
    row = next(csv.DictReader((tmp_path / "summary.csv").open(encoding="utf-8", newline="")))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    wide = console(summary, 300, monkeypatch)
    for metric in ("ttft", "e2e"):
        title = LATENCIES[metric].title
        for statistic in ("p50", "p95"):
            assert f"| {title} {statistic} ms | " in report
            assert f"| {title} service {statistic} ms | " in report
            for series in ("service", "response"):
                value = latencies[metric][series][statistic]
                assert float(row[f"{metric}_{series}_{statistic}_ms"]) == value
                assert re.search(rf"~?{re.escape(figure(value))}\b", wide)


def test_intervals_are_told_in_report_md_and_the_headlines_on_a_wide_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = write_report(write_run(tmp_path, [Planned(Closed(1), duration_s=60.0), Planned(Closed(1))]))
    sure = summary.levels[0].latency_ms["ttft"]["service"]
    assert sure.interval_95 is not None
    assert sure.interval_95.p95 is not None
    low, high = sure.interval_95.p95
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"{milliseconds(sure.p95)} ({milliseconds(low)} to {milliseconds(high)})" in report.replace("\\", "")
    assert "p95: too few values lie above it" in report.replace("\\", "")
    assert f"{figure(low)}–{figure(high)}" in console(summary, 250, monkeypatch)


def test_an_indicative_value_carries_a_tilde_and_a_footnote_says_what_it_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = console(write_report(rundirs.closed_ladder(tmp_path)), 80, monkeypatch)
    assert re.search(r" ~\d", "\n".join(map(" ".join, table_lines(text))))
    assert "~ indicative: on fewer samples than a firm value takes (p95 130)" in text


def test_what_one_level_lacks_is_na_and_what_all_lack_is_named_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = [Planned(Closed(1), duration_s=3.0), Planned(Closed(2), duration_s=15.0)]
    text = console(write_report(write_run(tmp_path, levels)), 80, monkeypatch)
    assert "n/a" in table_lines(text)[1]
    assert "n/a: none, or on too few samples to tell it from the maximum" in text
    assert "too few samples for TTFT p99" in text


def test_a_run_without_streaming_has_no_first_token_column_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = console(write_report(rundirs.non_streaming(tmp_path)), 120, monkeypatch)
    assert "no TTFT, TPOT, Gap, Max gap: none streamed or none succeeded" in text
    assert "TTFT" not in text.split("──")[0].rsplit("\n\n", 1)[-1]


def test_kinds_of_prompt_have_a_table_of_their_own_where_there_are_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = console(write_report(rundirs.two_kinds(tmp_path / "two")), 80, monkeypatch)
    one = console(write_report(rundirs.closed_ladder(tmp_path / "one")), 80, monkeypatch)
    assert re.search(r"4 users  summarise +26/26", several)
    assert "by kind of prompt" not in one


def test_failures_are_told_by_class_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = write_report(rundirs.failures(tmp_path))
    text = " ".join(console(summary, 200, monkeypatch).split())
    number = sum(level.requests.failed["out_of_memory"] for level in summary.levels)
    assert f"Failures ! {number} out_of_memory at 4 users" in text
    assert OUTCOMES["out_of_memory"].advice in text


def test_every_caution_of_a_run_is_told_with_its_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = write_report(rundirs.torn(tmp_path))
    caution = Caution("odd", "run", "the moon was full", "wait a fortnight")
    text = " ".join(console(replace(summary, cautions=(*summary.cautions, caution)), 100, monkeypatch).split())
    assert "! odd: the moon was full → wait a fortnight" in text
    assert "incomplete" in text
    assert "unreadable line in samples.jsonl" in text


def test_one_caution_on_many_levels_is_told_once_with_its_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(console(write_report(rundirs.closed_ladder(tmp_path)), 100, monkeypatch).split())
    assert text.count("! few samples") == 1
    assert "(also 2 users, 4 users, 8 users)" in text


def test_a_level_that_was_cut_short_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = console(write_report(rundirs.torn(tmp_path)), 80, monkeypatch)
    assert [row[0] for row in table_lines(text)[1:]] == ["1 user", "2 users *"]
    assert "* the level did not end as planned" in text


def test_each_clause_of_the_slo_says_where_it_passed_and_by_what_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = write_report(rundirs.batching_ladder(tmp_path, scenario=SLO))
    text = console(summary, 200, monkeypatch)
    missed = next(clause.value for clause in summary.levels[3].slo if clause.clause == "ttft.p95")
    assert re.search(rf"ttft\.p95 ≤ 300 ms  pass at 2 users, 4 users; fail at 8 users \({missed:.0f} ms\)", text)
    assert [row[-1] for row in table_lines(console(summary, 80, monkeypatch))[1:]] == ["?", "pass", "pass", "fail"]


def test_the_last_two_lines_are_the_place_and_the_command_unbroken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "loadbench run scenarios/edge.yaml --set " + ",".join(f"stages.{n}.duration=5s" for n in range(9))
    summary = replace(write_report(rundirs.closed_ladder(tmp_path)), command=command)
    lines = console(summary, 80, monkeypatch, directory="results/" + "x" * 90).rstrip("\n").split("\n")
    assert lines[-2:] == ["Results  results/" + "x" * 90, f"Repeat   {command}"]


def test_quiet_leaves_the_last_two_lines_alone(tmp_path: Path) -> None:
    out = io.StringIO()
    print_report(write_report(rundirs.closed_ladder(tmp_path)), Path("results/x"), out, quiet=True)
    assert out.getvalue().split("\n") == ["Results  results/x", "Repeat   loadbench run scenarios/edge.yaml", ""]


def test_a_pipe_that_cannot_show_our_signs_gets_the_report_nevertheless(tmp_path: Path) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_report(write_report(rundirs.closed_ladder(tmp_path)), Path("results/x"), stream)
    stream.flush()
    assert b"148" in raw.getvalue()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_gets_colours_unless_no_color_is_set(
    no_color: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = write_report(rundirs.failures(tmp_path, scenario=SLO))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1" if no_color else "")
    assert ("\x1b[1;31mfail" in on_terminal(summary)) is not no_color


def on_terminal(summary: Summary) -> str:
    """What a pseudo-terminal receives of the report."""
    ours, theirs = os.openpty()
    received: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # Linux's word for a terminal that was hung up
            while data := os.read(ours, 1 << 16):
                received.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        print_report(summary, Path("results/x"), terminal)
    reader.join()
    os.close(ours)
    return b"".join(received).decode()


# Foreign text


def test_nothing_hostile_reaches_any_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (f"{HOSTILE} a", f"{HOSTILE} b")
    planned = Planned(Closed(2), model=HOSTILE, kinds=kinds, fails=0.3)
    environment = {"cpu": HOSTILE, "cores": 2, "memory_bytes": 1 << 30, "os": HOSTILE}
    endpoint = {"url": HOSTILE, "kind": HOSTILE, "title": HOSTILE, "local": True, "facts": {HOSTILE: HOSTILE}}
    write_run(
        tmp_path,
        [planned, replace(planned, load=Open(5.0))],
        name=HOSTILE,
        reason=HOSTILE,
        command=HOSTILE,
        environment=environment,
        endpoint=endpoint,
        scenario={"name": HOSTILE, "description": HOSTILE + "\n```\n<b>"},
    )
    summary = write_report(tmp_path)
    told = console(summary, 120, monkeypatch, directory=HOSTILE)
    assert r"[red]m[/] \x1b[31m|<script>" in told
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not re.search("[\x1b\u202e]", told + report)
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(report)
    assert "<script" not in html
    assert "<b>" not in html
    assert html.count("<h1>") == 1
    rows = list(csv.reader(io.StringIO((tmp_path / "summary.csv").read_bytes().decode(), newline="")))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert "\x1b" not in csv_text(replace(summary, levels=tuple(replace(x, model="=\x1b") for x in summary.levels)))


def test_a_model_name_that_would_be_a_formula_is_text_in_the_csv(tmp_path: Path) -> None:
    summary = write_report(write_run(tmp_path, [Planned(Closed(1), model="=cmd|' /C calc'!A0")]))
    (row,) = csv.DictReader(io.StringIO(csv_text(summary), newline=""))
    assert row["model"] == "'=cmd|' /C calc'!A0"


# Markdown


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_report_md_renders_with_every_table_whole(build: Builder, tmp_path: Path) -> None:
    write_report(build(tmp_path))
    html = MarkdownIt("commonmark").enable("table").render((tmp_path / "report.md").read_text(encoding="utf-8"))
    for table in html.split("<table>")[1:]:
        rows = table.split("</table>")[0].split("<tr>")[1:]
        assert len({row.count("<td") + row.count("<th") for row in rows}) == 1
    assert "| " not in re.sub(r"<code.*?</code>", "", html, flags=re.DOTALL)


def test_report_md_says_what_was_asked_where_and_what_the_numbers_mean(tmp_path: Path) -> None:
    scenario = {"name": "edge", "stages": [{"concurrency": [1, 2], "duration": "15s"}]}
    summary = write_report(rundirs.closed_ladder(tmp_path, scenario=scenario))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for word in (
        "AMD EPYC 7B13",
        "3.11.7",
        "aiohttp 3.14.5",
        "Foundry Local 2.2.1",
        "loaded in 812 ms",
        "duration: 15s",
    ):
        assert word in text
    html = MarkdownIt("commonmark").enable("table").render(text)
    for metric in METRICS.values():
        assert metric.definition.replace("<", "&lt;").replace(">", "&gt;") in html
    assert summary.verdict.text in text.replace("\\", "")
    assert text.rstrip().endswith("```sh\nloadbench run scenarios/edge.yaml\n```")


def test_every_caution_has_its_own_row_in_report_md(tmp_path: Path) -> None:
    summary = write_report(rundirs.closed_ladder(tmp_path))
    text = markdown_text(summary, {})
    assert len(re.findall(r"^\| few samples \| \d users? \|", text, flags=re.MULTILINE)) == 4


# CSV


def test_the_csv_has_a_row_a_level_and_a_column_for_every_metric_and_series(tmp_path: Path) -> None:
    summary = write_report(rundirs.closed_ladder(tmp_path))
    raw = (tmp_path / "summary.csv").read_bytes()
    assert raw.count(b"\r\n") == 5
    rows = list(csv.DictReader(io.StringIO(raw.decode(), newline="")))
    assert [row["concurrency"] for row in rows] == ["1", "2", "4", "8"]
    for level, row in zip(summary.levels, rows, strict=True):
        for metric in LATENCIES.values():
            for series in metric.series:
                p50 = level.latency_ms[metric.name][series].p50
                assert p50 is not None
                assert float(row[f"{metric.name}_{series}_p50_ms"]) == p50
        for rate in RATES:
            value = level.throughput[rate]
            assert row[rate] == ("" if value is None else repr(value))


def test_what_is_absent_is_an_empty_field_and_what_is_indicative_is_named(tmp_path: Path) -> None:
    (row, _) = csv.DictReader(io.StringIO(csv_text(write_report(rundirs.non_streaming(tmp_path))), newline=""))
    assert row["ttft_service_p50_ms"] == ""
    assert row["ttft_service_n"] == "0"
    assert row["rate_per_s"] == ""
    assert "e2e_service_p95_ms" in row["indicative"].split()


def test_no_two_columns_have_one_name() -> None:
    names = [column.name for column in COLUMNS]
    assert len(names) == len(set(names))


# One table for all

ADD_A_METRIC = """
import sys
from pathlib import Path
from loadbench.analysis import metrics
row = metrics.Metric("head", "Head", "To the headers.", {"service": lambda s: s.headers_ns - s.sent_ns})
metrics.LATENCIES["head"] = metrics.METRICS["head"] = row
from loadbench.report.console import print_report
from loadbench.report.write import write_report
print_report(write_report(Path(sys.argv[1])), Path("results/x"))
"""


def test_a_row_in_metrics_is_all_that_a_new_metric_takes_to_be_told_everywhere(tmp_path: Path) -> None:
    rundirs.closed_ladder(tmp_path)
    command = [sys.executable, "-c", ADD_A_METRIC, str(tmp_path)]
    environment = {**os.environ, "COLUMNS": "250", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"Head" in done.stdout
    assert json.loads((tmp_path / "summary.json").read_bytes())["levels"][0]["latency_ms"]["head"]["service"]["n"] == 70
    assert "head_service_p95_ms" in (tmp_path / "summary.csv").read_text(encoding="utf-8")
    assert "| Head | ms | To the headers. |" in (tmp_path / "report.md").read_text(encoding="utf-8")


# Writing


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_summary_json_is_what_the_schema_says_and_the_same_each_time(build: Builder, tmp_path: Path) -> None:
    build(tmp_path)
    write_report(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    jsonschema.validate(json.loads(first["summary.json"]), schema())
    assert first["summary.json"].startswith(b'{\n  "schema": 1,\n')
    write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert not [name for name in first if name.endswith(".tmp")]


def test_what_cannot_be_written_is_one_warning_and_the_rest_is_written_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (rundirs.closed_ladder(tmp_path) / "summary.csv").mkdir()
    assert len(write_report(tmp_path).levels) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("loadbench: ")
    assert line.endswith("summary.csv: expected a file that can be written, found Is a directory")
    assert (tmp_path / "report.md").exists()
    (tmp_path / "report.md").unlink()
    (tmp_path / "report.md").mkdir()
    said: list[str] = []
    write_report(tmp_path, warn=said.append)
    assert [line.endswith("found Is a directory (and 1 more like it)") for line in said] == [True]


# Models and endpoint


HOW = "auto: phi:1, the first of 2 listed; loaded for this run in 0.3 s"


def with_facts(path: Path) -> Path:
    """A run that chose a model by itself on a service that tells its versions and where its cache is."""
    rundirs.closed_ladder(path)
    facts = json.loads((path / "run.json").read_bytes())
    facts["models"][0] |= {"id": "phi:1", "how": HOW, "load_ms": 303.0, "synthetic": False}
    facts["endpoint"]["facts"] = {"model_cache_path": "/home/ann/.cache", "versions": {"sdk": "2.2.1", "ort": "1.31"}}
    facts["environment"]["versions"]["loadbench"] = "0.1.0"
    (path / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    return path


def test_which_model_was_measured_and_why_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = write_report(with_facts(tmp_path))
    assert summary.models[0].how == HOW
    line = f"{HOW}; first answer in 95.0 ms"
    assert line in console(summary, 120, monkeypatch).split("\n")
    assert line in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_report_md_tells_each_version_once_in_words_and_nobodys_home(tmp_path: Path) -> None:
    write_report(with_facts(tmp_path))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| endpoint: versions | sdk 2.2.1, ort 1.31 |" in text
    assert "/home/ann" not in text
    assert text.count("0.1.0") == 1
