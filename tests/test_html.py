"""report.html and the figures: whole, offline, and shut against what servers and files say."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import orjson
import pytest

from loadbench.analysis import rundir
from loadbench.analysis.estimates import slo
from loadbench.analysis.gates import asked
from loadbench.analysis.percentile_curve import percentile_curves
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Summary
from loadbench.analysis.timeline import GIVEN_UP, MOST_BINS, Failed, Timeline, timeline
from loadbench.records import Ask, Closed, Open
from loadbench.report.figures import figures
from loadbench.report.figures_time import time_figures
from loadbench.report.page import script_json
from loadbench.report.picture import BAD, MUTED, Figure, LeftOut, fitting, layer
from loadbench.report.write import write_report
from tests import findings, rundirs
from tests.command import loadbench
from tests.rundirs import MIB, Held, Planned, write_run

HOSTILE = (
    "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> \x1b[31m [x](http://e.vil) 'a\" \u2028 &lt;"
)
SLO = {"name": "edge", "slo": {"ttft": {"p95": "300ms"}, "error_rate": "1%"}}


class Parsed(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, its scripts, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        attributes = self.elements[-1][1] if self.elements else {}
        if self.cdata_elem == "script":
            self.scripts.append((attributes, data))
        elif self.cdata_elem == "style":
            self.styles.append(data)
        else:
            self.text += data

    @property
    def policy(self) -> str:
        return next(str(a["content"]) for _, a in self.elements if a.get("http-equiv") == "Content-Security-Policy")

    @property
    def specs(self) -> list[Any]:
        return [orjson.loads(data) for attributes, data in self.scripts if "data-plot" in attributes]


def memory_ladder(path: Path, **facts: Any) -> Path:
    """Peaks that grow with users and tokens."""
    levels = []
    for users in (1, 2, 4):
        for tokens in (256, 1024):
            peak = 80 * MIB + users * (MIB + tokens * 16384)
            held = Held(80 * MIB, peak, 80 * MIB)
            levels.append(Planned(Closed(users, ask=Ask(tokens, 64)), duration_s=3.0, memory=held))
    return write_run(path, levels, **facts)


BUILDERS = (
    rundirs.closed_ladder,
    rundirs.batching_ladder,
    rundirs.two_kinds,
    rundirs.open_loop,
    rundirs.failures,
    rundirs.all_failed,
    rundirs.refused,
    rundirs.non_streaming,
    rundirs.empty_level,
    rundirs.torn,
    rundirs.three_models,
    memory_ladder,
)


def page_of(path: Path) -> Parsed:
    write_report(path)
    return Parsed((path / "report.html").read_text(encoding="utf-8"))


def drawn(path: Path) -> list[Figure | LeftOut]:
    run = rundir.read(path)
    return list(figures(summarise(run), run))


@pytest.mark.parametrize("build", BUILDERS)
def test_every_figure_compiles_without_a_warning(build: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    vl_convert = pytest.importorskip("vl_convert")
    for figure in drawn(build(tmp_path)):
        if isinstance(figure, LeftOut):
            assert figure.because, figure
        else:
            vl_convert.vegalite_to_vega(figure.spec, vl_version="6.4", show_warnings=True)
            assert figure.rows, figure.name
    assert "WARN" not in "".join(capfd.readouterr())


def test_the_first_part_of_the_page_has_verdict_machine_model_slo_and_every_caution(tmp_path: Path) -> None:
    summary = write_report(rundirs.failures(tmp_path, scenario=SLO))
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    first = " ".join(Parsed(source[: source.index('<section id="load"')]).text.split())
    for words in (summary.verdict.text[:60], "AMD EPYC 7B13", "synthetic-edge:1", "ttft.p95 ≤ 300 ms", "SLO missed"):
        assert words in first
    abouts = {c.about for c in (*summary.cautions, *(c for level in summary.levels for c in level.cautions))}
    assert abouts
    for about in abouts:
        assert about.replace("_", " ") in first


def test_every_picture_has_its_numbers_as_a_table_and_says_in_words_what_it_shows(tmp_path: Path) -> None:
    page = page_of(rundirs.two_kinds(tmp_path))
    plots = [a for _, a in page.elements if a.get("class") == "plot"]
    assert len(plots) == len(page.specs) > 5
    assert all(a["role"] == "img" and a["aria-label"] for a in plots)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("figure") == len(plots)
    for start in (place for place, tag in enumerate(tags) if tag == "figure"):
        assert "table" in tags[start : start + 12]


def test_what_servers_and_files_say_is_shown_as_text_and_runs_nowhere(tmp_path: Path) -> None:
    planned = Planned(
        Closed(2), model=HOSTILE, kinds=(HOSTILE, "chat"), fails=0.2, evidence=(HOSTILE,), state="degraded"
    )
    models = [rundirs.model_row(HOSTILE, licence=HOSTILE), rundirs.broken_row(HOSTILE + "2", reason=HOSTILE)]
    run = write_run(
        tmp_path,
        [planned, Planned(Closed(4), model=HOSTILE, kinds=(HOSTILE, "chat"))],
        models=models,
        name=HOSTILE,
        command=HOSTILE,
        scenario={"name": HOSTILE, "description": HOSTILE},
    )
    lines = (run / "samples.jsonl").read_bytes().replace(b"Could not allocate the key-value cache buffer", b"@")
    said = orjson.dumps(HOSTILE)[1:-1]
    (run / "samples.jsonl").write_bytes(lines.replace(b'"detail":"@"', b'"detail":"' + said + b'"'))
    page = page_of(run)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "iframe", "object", "embed", "form", "base"}
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert not [a for tag, a in page.elements if tag == "a" and not str(a["href"]).startswith("#")]
    assert len([a for a, _ in page.scripts if a.get("type") != "application/json"]) == 2
    assert page.text.count("<script>alert(1)</script>") > 5
    assert "\x1b" not in page.text and "\u2028" not in page.text
    assert "\\x1b[31m" in page.text and "[x](http://e.vil)" in page.text
    assert len(page.specs) == len([a for _, a in page.elements if a.get("class") == "plot"])
    for spec in page.specs:
        for expression in expressions(spec):
            assert "alert" not in expression


def expressions(value: Any) -> list[str]:
    """Everything in a spec that Vega evaluates."""
    if isinstance(value, list):
        return [found for each in value for found in expressions(each)]
    if not isinstance(value, dict):
        return []
    names = {"labelExpr", "expr", "test", "calculate", "filter", "signal", "href", "url", "format"}
    mine = [str(value[name]) for name in names & value.keys()]
    return mine + [found for name, each in value.items() if name != "values" for found in expressions(each)]


def test_json_in_a_script_ends_neither_the_script_nor_a_line(tmp_path: Path) -> None:
    made = script_json({"a": HOSTILE, "b": "<!--\u2029"})
    assert not set("<>&\u2028\u2029") & set(made)
    assert orjson.loads(made) == {"a": HOSTILE, "b": "<!--\u2029"}


def test_the_policy_allows_the_pages_own_scripts_and_nothing_else(tmp_path: Path) -> None:
    page = page_of(rundirs.closed_ladder(tmp_path))
    scripts = [data for a, data in page.scripts if a.get("type") != "application/json"]
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (*scripts, *page.styles)}
    assert set(re.findall("'sha256-([^']+)'", page.policy)) == hashes
    assert page.policy.startswith("default-src 'none'")
    assert "unsafe" not in page.policy and "http" not in page.policy


def test_the_page_names_no_address_to_fetch_and_is_under_six_megabytes(tmp_path: Path) -> None:
    levels = [Planned(Closed(users), kinds=("a", "b", "c"), duration_s=40.0) for users in range(1, 25)]
    page = page_of(write_run(tmp_path, levels))
    assert (tmp_path / "report.html").stat().st_size < 6_000_000
    assert not [a for _, a in page.elements if "src" in a]
    assert {str(a["href"])[:5] for tag, a in page.elements if tag == "link"} == {"data:"}
    assert not [style for style in page.styles if "url(" in style or "@import" in style]
    for spec in page.specs:
        assert '"url"' not in orjson.dumps(spec).decode()


def test_without_the_plot_library_the_report_is_written_without_pictures_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    page = page_of(rundirs.closed_ladder(tmp_path / "run"))
    assert "Pictures are left out: the package vl-convert-python cannot be imported here" in page.text
    assert not page.specs
    assert "How much does it carry?" in page.text and "8 users" in page.text


def test_a_report_whose_bundle_is_in_the_cache_does_not_import_the_plot_library(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    run = rundirs.closed_ladder(tmp_path)
    write_report(run)
    code = (
        "import sys; from pathlib import Path; from loadbench.report.write import write_report;"
        f"write_report(Path({str(run)!r})); print('vl_convert' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_figures_writes_the_core_ones_as_svg_that_holds_no_script_and_no_colour_of_the_page(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    done = loadbench("report", rundirs.three_models(tmp_path / "run"), "--figures", "--quiet")
    assert done.returncode in (0, 3), done.stderr
    names = {path.stem for path in (tmp_path / "run" / "figures").iterdir()}
    folder = tmp_path / "run" / "figures"
    assert all(f"{name}.svg" in done.stderr.partition(f"figures in {folder}: ")[2] for name in names)
    assert "Nothing to show: " in done.stderr
    assert {"models", "over-time", "throughput-closed-0", "ttft-closed-1"} <= names
    for path in (tmp_path / "run" / "figures").iterdir():
        tree = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        assert tree.tag.endswith("svg")
        assert not [element for element in tree.iter() if element.tag.endswith(("script", "foreignObject", "image"))]
        assert "var(--" not in path.read_text(encoding="utf-8")


def test_indicative_values_are_hollow_and_firm_ones_filled(tmp_path: Path) -> None:
    figure = next(f for f in drawn(rundirs.closed_ladder(tmp_path)) if f.title.startswith("How long until"))
    assert isinstance(figure, Figure)
    told = {row["tip"]: row["sure"] for part in figure.spec["layer"] for row in part["data"]["values"] if "sure" in row}
    assert {True, False} == {*told.values()}
    assert all(("indicative" in tip) is not firm for tip, firm in told.items())
    assert "hollow: indicative" in figure.spec["title"]["subtitle"]


def test_a_level_in_doubt_is_hollow_for_its_own_reason(tmp_path: Path) -> None:
    """251 answers are not few: the machine was busy."""
    planned = [Planned(Closed(users), batches=4, duration_s=40.0) for users in (1, 2, 4)]
    run = rundir.read(write_run(tmp_path, planned))
    events = run.levels[2].end
    assert events is not None
    # 2 cores for 40 s and more: others had 60 of their 80 CPU seconds
    events["client"] |= {"machine_cpu_s": 62.0, "elapsed_s": 40.0, "cpu_s": 1.0}
    events["target"] |= {"cpu_s": 1.0}
    figure = next(f for f in figures(summarise(run), run) if f.title.startswith("How much does it carry"))
    assert isinstance(figure, Figure)
    assert "hollow: in doubt, the table says why" in figure.spec["title"]["subtitle"]
    assert "few samples" not in figure.spec["title"]["subtitle"]
    assert figure.rows[2][-1] == "in doubt: other programs used 75% of this machine's CPU"
    assert [row[-1] for row in figure.rows[:2]] == ["firm", "firm"]


def test_an_slo_is_kept_up_to_a_load_only_where_every_lower_one_was_seen_to_keep_it(tmp_path: Path) -> None:
    run = rundir.read(rundirs.closed_ladder(tmp_path, scenario=SLO | {"slo": {"error_rate": "1%"}}))
    summary = summarise(run)

    def bound(results: tuple[Any, ...]) -> str:
        levels = [findings.judged(level, result) for level, result in zip(summary.levels, results, strict=True)]
        estimates = (slo("users", levels)[0],)
        found = replace(summary, levels=tuple(levels), capacity=(replace(summary.capacity[0], estimates=estimates),))
        figure = next(f for f in figures(found, run) if f.title.startswith("How much does it carry"))
        assert isinstance(figure, Figure)
        return figure.alt

    assert "SLO kept up to 4 users." in bound(("pass", "pass", "pass", "fail"))
    assert "SLO kept at 4 users." in bound(("undecided", "undecided", "pass", "fail"))


def test_the_throughput_of_the_figure_and_of_the_table_are_told_apart(tmp_path: Path) -> None:
    found = drawn(rundirs.closed_ladder(tmp_path))
    figure = next(f for f in found if isinstance(f, Figure) and f.title.startswith("How much does it carry"))
    assert figure.note is not None
    assert "the table of levels counts what ended in its whole window" in figure.note
    assert "ceiling" not in str(figure.spec)


def test_the_percentile_figure_tells_the_series_of_the_table(tmp_path: Path) -> None:
    """A closed loop whose requests went out 40 ms after they were due: the table has service time."""
    run = rundir.read(write_run(tmp_path, [Planned(Closed(1))]))
    run.samples.due_ns[:] -= 4e7
    summary = summarise(run)
    found = figures(summary, run)
    figure = next(f for f in found if isinstance(f, Figure) and f.title.startswith("How slow are the slowest? TTFT"))
    assert "half within 60." in figure.alt  # response time is 40 ms more


def test_the_value_of_a_model_stands_at_its_mark(tmp_path: Path) -> None:
    figure = next(f for f in drawn(rundirs.three_models(tmp_path)) if isinstance(f, Figure) and f.name == "models")
    assert isinstance(figure, Figure)
    words = [one for view in figure.spec["vconcat"] for one in view["layer"] if one["encoding"].get("text")]
    assert words
    assert {one["encoding"]["x"]["field"] for one in words} == {"x"}


def test_no_outlier_is_lost_where_a_long_run_is_thinned(tmp_path: Path) -> None:
    run = rundir.read(write_run(tmp_path, [Planned(Open(5.0), duration_s=900.0)]))
    slowest = int(np.nanargmax(run.samples.first_token_ns - run.samples.sent_ns))
    run.samples.first_token_ns[slowest] += 7e9
    run.samples.last_token_ns[slowest] += 7e9
    line = timeline(run, {})
    assert len(line.ttft) <= MOST_BINS + 2
    assert sum(bin_.n for bin_ in line.ttft) == np.count_nonzero(run.samples.said(run.samples.phase, "load"))
    worst = max(line.ttft, key=lambda bin_: bin_.most)
    took_ms = (run.samples.first_token_ns[slowest] - run.samples.sent_ns[slowest]) / 1e6
    assert worst.most == pytest.approx(took_ms)
    assert worst.start_s <= run.samples.due_ns[slowest] / 1e9 < worst.end_s
    assert worst.median < 1_000


def test_what_is_in_flight_over_time_is_what_the_requests_overlap(tmp_path: Path) -> None:
    run = rundir.read(write_run(tmp_path, [Planned(Closed(4), duration_s=20.0)]))
    line = timeline(run, {})
    middle = [bin_ for bin_ in line.in_flight if 4 < bin_.start_s < 20]
    assert {bin_.most for bin_ in middle} == {4.0}
    assert all(3.9 < bin_.median <= 4 for bin_ in middle)


def test_the_percentile_curve_goes_through_the_percentiles_of_the_level(tmp_path: Path) -> None:
    run = rundir.read(rundirs.open_loop(tmp_path))
    summary = summarise(run)
    curves = {(c.level, c.metric, c.series): c for c in percentile_curves(run, summary)}
    assert len(curves) == 8
    for level in summary.levels:
        told = level.latency_ms["ttft"]["response"]
        curve = curves[level.index, "ttft", "response"]
        assert curve.n == told.n
        at = {round(step.share, 4): step for step in curve.steps}
        for name, wanted in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95)):
            assert at[wanted].ms == pytest.approx(told.value(name), rel=2e-3)
            assert at[wanted].firm is (name not in told.indicative)
        assert curve.steps[-1].ms == pytest.approx(told.max, rel=2e-3)


def test_slo_and_gates_are_on_the_first_screen_with_pass_fail_and_invalid(tmp_path: Path) -> None:
    run = rundirs.closed_ladder(tmp_path, scenario=SLO)
    gates = asked(["ttft.p95<300ms", "ttft.p99.9<9s @ 1 user", "error_rate<5%"], allow_indicative=False)
    write_report(run, gates=gates)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    first = " ".join(Parsed(source[: source.index('<section id="load"')]).text.split())
    assert "✗ 1 of 3 gates failed" in first
    assert "SLO ttft.p95 ≤ 300 ms: ✗ fail at 8 users" in first
    assert "gate ttft.p99.9<9s @ 1 user: ? invalid at 1 user" in first
    assert "gate error_rate<5%: ✓ pass on every level" in first


def test_what_was_asserted_of_the_whole_slo_is_there_once_with_its_limits(tmp_path: Path) -> None:
    write_report(rundirs.closed_ladder(tmp_path, scenario=SLO), gates=asked(["slo"], allow_indicative=False))
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    first = " ".join(Parsed(source[: source.index('<section id="load"')]).text.split())
    assert "gate slo ttft.p95 ≤ 300 ms: ✗ fail" in first
    assert "SLO ttft.p95" not in first


def test_where_requests_failed_the_pictures_of_load_and_latency_say_so(tmp_path: Path) -> None:
    shown = [figure for figure in drawn(rundirs.failures(tmp_path)) if isinstance(figure, Figure)]
    for title in ("How much does it carry?", "How long until", "How slow are the slowest?"):
        figure = next(figure for figure in shown if figure.title.startswith(title))
        assert re.search(r"failed: [\d.]+ % at 4 users, [\d.]+ % at 8 users", figure.note or ""), title
    marks = [row["mark"] for part in shown[0].spec["layer"] for row in part["data"]["values"] if row.get("mark")]
    assert set(marks) == {"✗"}


def over_time(summary: Summary, line: Timeline) -> list[Any]:
    """The views of the figure over time, the strip first."""
    figure = next(time_figures(summary, line))
    assert isinstance(figure, Figure)
    views: list[Any] = figure.spec["vconcat"]
    return views


def test_over_time_every_stretch_of_levels_has_the_name_of_its_model_where_there_are_several(tmp_path: Path) -> None:
    run = rundir.read(rundirs.three_models(tmp_path))
    strip = over_time(summarise(run), timeline(run, {}))[0]
    names = [row["name"] for part in strip["layer"] for row in part["data"]["values"] if row.get("y") == "model"]
    assert len(names) > 1 and len(set(names)) == len(names)


def test_over_time_what_was_given_up_as_planned_is_grey_and_what_failed_is_red(tmp_path: Path) -> None:
    run = rundir.read(rundirs.closed_ladder(tmp_path))
    failed = (Failed(0.0, 1.0, GIVEN_UP, 3), Failed(1.0, 2.0, "out_of_memory", 1))
    views = over_time(summarise(run), replace(timeline(run, {}), failed=failed))
    bars = next(view for view in views if view["title"]["text"].startswith("failed"))["layer"][-1]
    assert bars["encoding"]["color"]["scale"] == {"domain": ["given up", "out of memory"], "range": [MUTED, BAD]}


def test_a_strip_names_a_load_only_where_there_is_room(tmp_path: Path) -> None:
    rows = [{"name": "4×1088", "short": "4", "room": room} for room in (0.1, 0.03, 0.001)]
    spec = fitting({"vconcat": [{"layer": [layer(rows, "text")]}]}, width=500)
    assert [row["name"] for row in spec["vconcat"][0]["layer"][0]["data"]["values"]] == ["4×1088", "4"]
