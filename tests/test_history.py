"""history.jsonl: which run gets a row, what the row says, and what becomes of it when several write or one is torn."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadbench.analysis import history
from loadbench.analysis.history import FIGURES, Commit
from loadbench.analysis.provenance import hash_of
from loadbench.analysis.rundir import read, read_facts
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Requests
from loadbench.chronicle import Chronicle, working_tree
from loadbench.errors import UsageError
from loadbench.files import add_line, locked
from loadbench.records import Closed, Open
from loadbench.report.write import write_report
from loadbench.scenario.schema import Scenario
from tests.asking import scripted
from tests.command import ROOT, ended, environment, rows, started, summary
from tests.rundirs import Planned, write_run

SCENARIO = """
name: s
request: {max_tokens: 4}
prompts: [{name: hello, text: Say hello}]
warmup: {requests: 0}
stages: [{concurrency: 1, requests: 11}]
"""


def git(folder: Path, *words: str) -> None:
    names = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *names, *words], cwd=folder, check=True, capture_output=True)


def repository(folder: Path) -> None:
    git(folder, "init", "-q")
    (folder / "kept").write_text("one")
    git(folder, "add", "kept")
    git(folder, "commit", "-q", "-m", "one")


def noted(folder: Path, name: str, **facts: Any) -> dict[str, Any]:
    """The row of a made-up run below ``results``."""
    run = write_run(folder / "results" / name, [Planned(Closed(2)), Planned(Open(2.0), duration_s=20.0)], **facts)
    Chronicle(folder / "results").note(run, write_report(run), 0)
    return rows(folder / "results" / "history.jsonl")[-1]


async def test_a_run_into_the_results_is_noted_with_its_commit_and_figures(tmp_path: Path) -> None:
    repository(tmp_path)
    (tmp_path / "s.yaml").write_text(SCENARIO, encoding="utf-8")
    async with scripted() as server:
        code, _, err = await ended(
            await started("run", "s.yaml", "--endpoint", server.base_url, "--quiet", cwd=tmp_path)
        )
    assert code == 0, err
    (row,) = rows(tmp_path / "results" / "history.jsonl")
    run = tmp_path / "results" / row["path"]
    told = summary(run)
    assert row["scenario"] == "s"
    assert row["time"] == told["started"]
    assert (row["status"], row["exit_code"]) == ("complete", 0)
    assert row["commit"] == working_tree(tmp_path).id  # type: ignore[union-attr]
    assert row["dirty"] is False  # s.yaml is not tracked
    assert row["models"] == [told["models"][0]["id"]]
    (level,) = row["levels"]
    assert level["load"] == "1 user"
    assert level["ttft_p50_ms"] == told["levels"][0]["latency_ms"]["ttft"]["service"]["p50"]
    assert level["output_tokens_per_s"] == told["levels"][0]["throughput"]["output_tokens_per_s"]
    assert level["failures"] == 0
    ((_, figures),) = history.read(tmp_path / "results" / "history.jsonl")[0][0].levels.items()
    assert figures["ttft.p50"] == level["ttft_p50_ms"]


def test_a_run_that_was_sent_elsewhere_is_not_noted_and_one_deep_in_the_results_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "elsewhere", [Planned(Closed(1))])
    Chronicle(tmp_path / "results").note(run, write_report(run), 0)
    assert not (tmp_path / "results").exists()
    assert noted(tmp_path, "nightly/2026-11-22/s")["path"] == "nightly/2026-11-22/s"


def test_the_headline_latencies_of_an_open_loop_are_its_response_times(tmp_path: Path) -> None:
    row = noted(tmp_path, "a")
    level = summary(tmp_path / "results" / "a")["levels"][1]
    assert row["levels"][1]["load"] == "2/s poisson"
    assert row["levels"][1]["e2e_p50_ms"] == level["latency_ms"]["e2e"]["response"]["p50"]
    assert row["levels"][1]["tpot_p50_ms"] == level["latency_ms"]["tpot"]["service"]["p50"]
    assert row["levels"][1]["peak_rss_bytes"] == level["target"]["rss_bytes"]["peak"]


def test_which_figures_stand_on_few_samples_is_kept_with_them(tmp_path: Path) -> None:
    row = noted(tmp_path, "a")
    found = summary(tmp_path / "results" / "a")["levels"][0]["latency_ms"]
    assert found["ttft"]["service"]["indicative"] == ["p95"]
    assert row["levels"][0]["indicative"] == ["ttft_p95_ms", "e2e_p95_ms"]
    (kept,) = history.read(tmp_path / "results" / "history.jsonl")[0]
    assert kept.indicative[next(iter(kept.levels))] == {"ttft.p95", "e2e.p95"}


def test_what_a_rung_gives_up_at_its_end_as_planned_is_no_failure(tmp_path: Path) -> None:
    (level,) = write_report(write_run(tmp_path / "a", [Planned(Closed(2))])).levels
    level = replace(level, requests=Requests(attempted=4, ok=1, failed={"censored": 2, "connection_lost": 1}))
    assert FIGURES["failures"].of(level) == 3
    assert FIGURES["failures"].of(replace(level, purpose="rung")) == 1


def test_a_changed_tracked_file_makes_the_commit_dirty_and_no_repository_makes_none(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    assert working_tree(tmp_path / "outside") is None
    inside = tmp_path / "inside"
    inside.mkdir()
    repository(inside)
    clean = working_tree(inside)
    (inside / "kept").write_text("two")
    assert clean is not None
    assert working_tree(inside) == Commit(clean.id, dirty=True)


def test_a_scenario_that_asks_something_else_has_another_hash_and_another_name_alone_has_none(
    tmp_path: Path,
) -> None:
    first = noted(tmp_path, "a")
    scenario = read_facts(tmp_path / "results" / "a")["scenario"]
    again = noted(tmp_path, "b", scenario=scenario | {"name": "other", "description": "the same"})
    other = noted(tmp_path, "c", scenario=scenario | {"drain": "9s"})
    assert first["scenario_hash"] == again["scenario_hash"] != other["scenario_hash"]


def test_a_key_at_its_default_makes_no_other_scenario_so_that_a_later_version_may_have_more(tmp_path: Path) -> None:
    stages = [{"concurrency": [2], "duration": "3s"}]
    short: dict[str, Any] = {"name": "s", "prompts": [{"name": "p", "text": "hello"}], "stages": stages}
    whole = Scenario.model_validate(short).public_json()
    assert len(whole) > 2 * len(short)
    assert hash_of({"scenario": short}) == hash_of({"scenario": whole})
    assert hash_of({"scenario": short}) != hash_of({"scenario": short | {"seed": 43}})


def test_lines_of_many_writers_at_once_are_all_whole(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from loadbench.files import add_line
for number in range(200):
    add_line(Path("h.jsonl"), b'{"who":%b,"n":%d,"long":"%b"}' % (sys.argv[1].encode(), number, b"x" * 9000))
"""
    env = environment(PYTHONPATH=str(ROOT))
    writers = [subprocess.Popen([sys.executable, "-c", code, str(who)], cwd=tmp_path, env=env) for who in range(3)]
    assert [writer.wait(30) for writer in writers] == [0, 0, 0]
    found = rows(tmp_path / "h.jsonl")
    assert sorted((row["who"], row["n"]) for row in found) == [(who, n) for who in range(3) for n in range(200)]


def test_a_line_after_a_torn_one_begins_on_its_own(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    path.write_bytes(b'{"schema":1}\n{"sche')
    add_line(path, b"{}")
    assert path.read_bytes() == b'{"schema":1}\n{"sche\n{}\n'


def test_a_lock_is_held_against_another_process_and_gone_with_who_held_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = "import sys; from pathlib import Path; from loadbench.files import locked\n"
    code += "with locked(Path('lock')): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == b"held"
    with pytest.raises(BlockingIOError), locked(path):
        pass
    holder.kill()
    holder.communicate()
    with locked(path):
        pass


def test_torn_and_foreign_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    noted(tmp_path, "a")
    path = tmp_path / "results" / "history.jsonl"
    path.write_bytes(b'{"schema":1}\n[1]\nnonsense\n{"schema":99}\n\n' + path.read_bytes() + b'{"schema":1,"ti')
    found, unreadable = history.read(path)
    assert len(found) == 1
    assert unreadable == 5


def test_a_level_that_was_not_finished_has_no_figures_in_the_trend(tmp_path: Path) -> None:
    run = write_run(tmp_path / "results" / "a", [Planned(Closed(1), complete=False)])
    Chronicle(tmp_path / "results").note(run, write_report(run), 130)
    (found,) = history.read(tmp_path / "results" / "history.jsonl")[0]
    assert {*found.levels[next(iter(found.levels))].values()} == {None}


def test_a_history_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected the history"):
        history.read(tmp_path / "history.jsonl")


def test_results_that_cannot_be_written_cost_the_row_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "results" / "a", [Planned(Closed(1))])
    (tmp_path / "results" / "history.jsonl").mkdir()
    Chronicle(tmp_path / "results").note(run, summarise(read(run)), 0)
    assert "the run is not noted" in capsys.readouterr().err
    told: list[str] = []
    Chronicle(tmp_path / "results").note(run, summarise(read(run)), 0, told.append)
    assert "the run is not noted" in told[0] and capsys.readouterr().err == ""


def test_every_figure_has_a_name_and_a_key_of_its_own() -> None:
    assert len({figure.key for figure in FIGURES.values()}) == len(FIGURES)
