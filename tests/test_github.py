"""What GitHub Actions gets of a run: a step summary and annotations; nothing foreign is a command, HTML or Markdown."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from markdown_it import MarkdownIt

from loadbench.analysis.gates import asked
from loadbench.analysis.rundir import read
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Caution, Summary
from loadbench.analysis.verdict import exit_code
from loadbench.records import Closed
from loadbench.report.github import MOST_BYTES, commands, step_summary
from tests import rundirs
from tests.command import ROOT, loadbench
from tests.rundirs import Planned, write_run

HOSTILE = (
    "::stop-commands::x %0A%25 \r\n::error file=a,line=1::b\n<img src=x onerror=y>|\x1b[31m`c` ![i](http://x)"
    " ##[error]z"
)
ERROR = re.compile(r"::(error|warning) title=([^:,\r\n]*)::(.*)")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 and 8 users. Only for looking."""
    path = tmp_path_factory.mktemp("github") / "run"
    return write_run(path, [Planned(Closed(users), duration_s=40.0) for users in (1, 8)])


@pytest.fixture
def mine(one: Path, tmp_path: Path) -> Path:
    """The same to be written to."""
    return Path(shutil.copytree(one, tmp_path / "mine"))


def told(path: Path, *texts: str) -> Summary:
    return summarise(read(path), asked=asked(texts, allow_indicative=False))


def hostile(path: Path) -> Summary:
    """A run in which everything that may be foreign is."""
    found = told(path, "ttft.p95<300ms", "ttft.p99<2s")
    caution = Caution(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    levels = tuple(replace(level, model=HOSTILE, cautions=(caution,)) for level in found.levels)
    gates = tuple(replace(gate, asserted=f"ttft.p95<1s @ {HOSTILE}", because=HOSTILE) for gate in found.gates)
    words = replace(found.verdict, text=HOSTILE)
    return replace(found, name=HOSTILE, command=HOSTILE, levels=levels, gates=gates, cautions=(caution,), verdict=words)


def test_the_summary_of_a_step_tells_the_end_the_levels_the_promises_and_the_doubts(one: Path) -> None:
    summary = told(one, "ttft.p95<300ms", "error_rate<1%")
    text = step_summary(summary, exit_code(summary))
    assert text.startswith("## loadbench: edge · ❌ failed\n\n**gate missed: TTFT p95 at 8 users is ")
    assert "synthetic-edge:1 on Foundry Local 2.2.1" in text
    assert "| 8 users | 192/192 |" in text
    rows = [line for line in text.split("\n") if line.startswith(("| ❌", "| ✅"))]
    assert [row[:33] for row in rows] == [
        "| ❌ | ttft.p95&lt;300ms | 8 users",
        "| ✅ | ttft.p95&lt;300ms | 1 user ",
        "| ✅ | error_rate&lt;1% | 1 user |",
        "| ✅ | error_rate&lt;1% | 8 users ",
    ]
    assert "| synthetic | run | synthetic-edge:1 has random weights" in text
    assert text.endswith("Repeat: `loadbench run scenarios/edge.yaml`\n\n")


@pytest.mark.parametrize(
    ("words", "title"),
    [
        (["requests_per_s>0.1"], "✅ passed"),
        (["ttft.p99<2s"], "⚠️ invalid"),
        (["ttft.p50<1ms"], "❌ failed"),
    ],
)
def test_its_first_line_is_the_end(words: list[str], title: str, one: Path) -> None:
    summary = told(one, *words)
    assert step_summary(summary, exit_code(summary)).split("\n")[0] == f"## loadbench: edge · {title}"


def test_nothing_foreign_in_it_is_html_or_markdown(one: Path) -> None:
    text = step_summary(hostile(one), 99)
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    kinds = {leaf.type for token in tokens for leaf in token.children or []} | {token.type for token in tokens}
    assert not {"html_block", "html_inline", "image", "link_open"} & kinds
    assert "\x1b" not in text
    assert len([token for token in tokens if token.type == "table_open"]) == 3  # levels, promises, cautions
    widths = {len(re.split(r"(?<!\\)\|", line)) for line in text.split("\n") if line.startswith(("| ❌", "| ⚠️"))}
    assert widths == {6}


def test_it_stays_below_what_github_takes_and_keeps_the_verdict(one: Path) -> None:
    summary = told(one)
    caution = Caution("x", "run", "é" * 10_000, "")
    text = step_summary(replace(summary, cautions=(caution,) * 1000), 0)
    assert len(text.encode()) <= MOST_BYTES
    assert "… and 940 more" in text or "caution" not in text
    assert "synthetic-edge:1 on Foundry Local" in text


def test_what_was_missed_or_not_told_is_an_error_and_a_caution_a_warning(one: Path) -> None:
    summary = told(one, "ttft.p95<300ms", "ttft.p99<2s @ 1 user", "error_rate<1%")
    found = commands(summary, exit_code(summary))
    assert [ERROR.fullmatch(line) is not None for line in found] == [True] * len(found)
    assert found[:2] == [
        "::error title=loadbench%3A ttft.p99<2s at 1 user::"
        "TTFT p99 is 76 ms, asserted < 2 s (186 samples; p99 is firm from 662)",
        f"::error title=loadbench%3A ttft.p95<300ms at 8 users::TTFT p95 is {p95(summary)} ms, asserted < 300 ms",
    ]
    assert {line[:9] for line in found[2:]} == {"::warning"}


def p95(summary: Summary) -> str:
    return f"{summary.levels[1].latency_ms['ttft']['service'].p95:.0f}"


def test_a_run_that_is_invalid_without_a_promise_is_an_error_too(tmp_path: Path) -> None:
    summary = told(rundirs.all_failed(tmp_path))
    assert commands(summary, 94)[0].startswith("::error title=loadbench%3A the run::result invalid: ")


def test_foreign_text_in_an_annotation_is_escaped_and_ends_no_line(one: Path) -> None:
    found = commands(hostile(one), 99)
    assert len(found) == 5
    for line in found:
        match = ERROR.fullmatch(line)
        assert match is not None
        assert line.isprintable()
        assert "%0A%25" not in line.replace("%250A%2525", "")
    assert "%3A%3Aerror file=a%2Cline=1%3A%3Ab" in found[-1]


def test_there_are_no_more_of_a_kind_than_github_shows(one: Path) -> None:
    cautions = tuple(Caution(f"sort {number}", "run", "so", "") for number in range(30))
    found = [line for line in commands(replace(told(one), cautions=cautions), 0) if line.startswith("::warning")]
    assert len(found) == 10
    assert found[-1] == "::warning title=loadbench%3A more::21 more like these: see report.md"


# Through the command line


def report(path: Path, *words: str, **env: str) -> tuple[int, list[str], list[str]]:
    nowhere = {"GITHUB_ACTIONS": "", "GITHUB_STEP_SUMMARY": ""}
    done = loadbench("report", path, *words, cwd=ROOT, **(nowhere | env))
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def test_on_github_a_report_appends_its_summary_and_annotates(mine: Path, tmp_path: Path) -> None:
    target = tmp_path / "step.md"
    target.write_text("before\n", encoding="utf-8")
    env = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(target)}
    code, out, err = report(mine, "--assert", "ttft.p95<300ms", **env)
    assert code == 99
    assert target.read_text(encoding="utf-8").startswith("before\n## loadbench: edge · ❌ failed\n")
    began = next(number for number, line in enumerate(out) if line.startswith("::stop-commands::"))
    token = out[began].removeprefix("::stop-commands::")
    ended = out.index(f"::{token}::")
    assert (began, len(token)) == (0, 32)
    assert [line[:8] for line in out[ended + 1 :]] == ["::error ", "::warnin"]
    assert len(err) == 1


def test_beside_json_annotations_go_to_stderr(mine: Path, tmp_path: Path) -> None:
    env = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "step.md")}
    code, out, err = report(mine, "--json", "--assert", "ttft.p95<300ms", **env)
    assert code == 99
    assert orjson.loads("\n".join(out))["gates"]
    assert [line[:8] for line in err[:2]] == ["::error ", "::warnin"]


def test_elsewhere_it_says_nothing_to_github(mine: Path, tmp_path: Path) -> None:
    _, out, err = report(mine)
    assert not any(line.startswith("::") for line in out + err)
    only = tmp_path / "step.md"  # as act and others set it
    _, out, err = report(mine, GITHUB_STEP_SUMMARY=str(only))
    assert only.exists()
    assert not any(line.startswith("::") for line in out + err)


def test_a_summary_that_cannot_be_written_is_told_and_changes_no_exit_code(mine: Path, tmp_path: Path) -> None:
    code, _, err = report(mine, GITHUB_STEP_SUMMARY=str(tmp_path))
    assert code == 0
    assert len(err) == 1
    assert "GITHUB_STEP_SUMMARY" in err[0]


def test_a_model_that_is_named_as_a_command_is_printed_within_what_is_no_command(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [Planned(Closed(1), model="::error::mine", duration_s=5.0)])
    _, out, _ = report(path, GITHUB_ACTIONS="true", COLUMNS="40")
    risky = [number for number, line in enumerate(out) if line.lstrip().startswith("::")]
    assert len(risky) > 2
    assert out[0].startswith("::stop-commands::")
    assert out[-1] == f"::{out[0].removeprefix('::stop-commands::')}::"
