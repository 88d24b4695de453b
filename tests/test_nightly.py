"""A night as from a terminal: it goes on after failures, one at a time, and when cut short; and old runs go."""

from __future__ import annotations

import re
import shutil
import signal
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import orjson
import psutil
import pytest
from click.testing import CliRunner, Result

from loadbench.analysis.compared import Answer
from loadbench.analysis.history import FIGURES, Row
from loadbench.analysis.night import Against, Night, Turn, good, nights, read_night, worst
from loadbench.cli import main
from loadbench.nightly import Sweep, _last_line
from loadbench.records import Closed
from loadbench.report.night import page
from loadbench.report.night_words import news, since
from loadbench.report.write import write_report
from loadbench.scenario.load import Overrides, load_scenario
from loadbench.scenario.plan import describe, levels
from loadbench.target.processes import Born, end_tree
from tests.asking import scripted
from tests.browser import CHROMIUM, browser
from tests.command import ROOT, ended, eventually, rows, started
from tests.rundirs import Planned, write_run

HOSTILE = '<script>alert(1)</script>"\x1b[31m'
SCENARIO = """
name: {name}
endpoint: {url}
request: {{max_tokens: 4}}
prompts: [{{name: hello, text: Say hello}}]
warmup: {{requests: 0}}
deadlines: {{first_token: 5s, total: 10s}}
drain: 2s
stages: [{{concurrency: 1, {bound}}}]
"""


def scenarios(folder: Path, url: str, **bounds: str) -> None:
    """A scenario for each name; ``broken`` instead of a bound makes one that cannot be read."""
    place = folder / "scenarios" / "nightly"
    place.mkdir(parents=True, exist_ok=True)
    for name, bound in bounds.items():
        text = "stages: nonsense\n" if bound == "broken" else SCENARIO.format(name=name, url=url, bound=bound)
        (place / f"{name}.yaml").write_text(text, encoding="utf-8")


def night_of(folder: Path, place: int = 0) -> Night:
    """The last night, or one before it."""
    return nights(folder / "results" / "nightly")[place]


def told(*words: str) -> Result:
    """What a command says here, in this process: starting one takes a second."""
    return CliRunner(env={"PYTHONPATH": str(ROOT)}).invoke(main, words)


async def nightly(folder: Path, **env: str) -> tuple[int, str, str]:
    return await ended(await started("nightly", cwd=folder, **env))


# A night


async def test_a_night_goes_on_after_failures_and_the_next_is_held_against_what_was_good_in_it(tmp_path: Path) -> None:
    async with scripted() as server:
        scenarios(tmp_path, server.base_url, a="broken", b="requests: 11")
        scenarios(tmp_path, "http://127.0.0.1:9/v1", c="requests: 1")
        code, out, err = await nightly(tmp_path)
        night = night_of(tmp_path)
        assert [(turn.name, turn.state, turn.exit_code) for turn in night.turns] == [
            ("a", "done", 2),
            ("b", "done", 0),
            ("c", "done", 3),
        ], err
        assert code == 3
        assert night.status == "complete"
        assert "stages" in (night.turns[0].why or "")
        assert night.turns[1].against == Against(None, None, "there is none yet")
        shown = (night.folder / "index.html").read_text(encoding="utf-8")
        assert "1 of 3 good; 1 endpoint or model not servable, 1 usage or scenario wrong" in shown
        assert [line.partition(":")[0] for line in out.splitlines() if line[0] != " "][:3] == ["c", "a", "b"]
        assert out.rstrip().endswith(str(Path("results") / "nightly" / night.name / "index.html"))
        addresses = re.findall(r'href="([^"#]+)"', shown)
        assert "b/report.md" in addresses
        assert all((night.folder / address).exists() for address in addresses)
        assert [row["path"] for row in rows(tmp_path / "results" / "history.jsonl")] == [f"nightly/{night.name}/b"]

        (tmp_path / "scenarios" / "nightly" / "c.yaml").unlink()
        server.script = replace(server.script, first_token_ms=40)
        github = tmp_path / "summary.md"
        code, out, err = await nightly(tmp_path, GITHUB_STEP_SUMMARY=str(github))
    assert code == 2, err
    second = night_of(tmp_path)
    assert second.name == f"{night.name}-2"
    against = second.turns[1].against
    assert against is not None
    assert (against.night, against.answer) == (night.name, "inconclusive")  # one run cries no wolf
    assert against.brief
    shown = (second.folder / "index.html").read_text(encoding="utf-8")
    assert "Still bad: a. No longer there: c." in shown
    assert f'href="../{night.name}/index.html#b"' in shown
    assert re.search("TTFT p50.*was [0-9]", shown)
    assert f'href="{second.name}/index.html"' in (tmp_path / "results" / "nightly" / "index.html").read_text()
    assert github.read_text(encoding="utf-8").count("##") == 1  # the night's, and none of a run's
    assert "1 of 2 good; 1 usage or scenario wrong" in github.read_text(encoding="utf-8")


def test_a_run_that_takes_longer_than_it_may_is_stopped_and_counts_as_invalid(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections, and says nothing
        scenarios(home, f"http://127.0.0.1:{silent.getsockname()[1]}/v1", a="requests: 1")
        ran = told("nightly", "--limit", "1s")
    (turn,) = night_of(home).turns
    assert ran.exit_code == 94, ran.stderr
    assert (turn.state, turn.why) == ("overtime", "stopped after 0:01, the most that it may take")
    assert "took longer than it may" in (night_of(home).folder / "index.html").read_text(encoding="utf-8")


async def test_a_night_that_is_killed_or_interrupted_is_gone_on_with_and_one_at_a_time(home: Path) -> None:
    async with scripted(gap_ms=20) as server:
        scenarios(home, server.base_url, a="requests: 2", b="duration: 60s")
        killed = await started("nightly", cwd=home)
        await eventually(lambda: len(server.records) > 12)
        refused = told("nightly")
        assert refused.exit_code == 2
        assert f"another nightly is at work here: pid {killed.pid}" in refused.stderr
        killed.kill()
        await killed.wait()
        turn = night_of(home).turns[1]
        assert turn.state == "running"
        assert turn.process is not None
        orphan = psutil.Process(turn.process.pid)
        assert orphan.is_running()
        shown = (night_of(home).folder / "index.html").read_text(encoding="utf-8")
        assert "if that is past, the night was killed" in shown

        interrupted = await started("nightly", cwd=home)
        await eventually(lambda: len(rows(night_of(home).folder / "b-2" / "samples.jsonl")) > 2)
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
        interrupted.send_signal(signal.SIGINT)
        code, _, err = await ended(interrupted)
        assert code == 130, err
        assert "going on; 1 of 2 are done" in err
        assert "b: ended the run that was left behind" in err
        night = night_of(home)
        assert night.status == "interrupted"
        assert [(turn.state, turn.path, turn.why) for turn in night.turns] == [
            ("done", "a", None),
            ("waiting", "b-2", None),
        ]
        assert orjson.loads((night.folder / "b-2" / "summary.json").read_bytes())["status"] == "interrupted"
        assert "It was interrupted" in (night.folder / "index.html").read_text(encoding="utf-8")

        scenarios(home, server.base_url, b="requests: 2")
        code, _, err = await nightly(home)
    assert code == 0, err
    night = night_of(home)
    assert [(turn.state, turn.path, turn.why) for turn in night.turns] == [("done", "a", None), ("done", "b-3", None)]
    assert len(nights(home / "results" / "nightly")) == 1


def test_a_night_that_was_cut_short_long_ago_is_marked_and_a_new_one_begun(home: Path) -> None:
    scenarios(home, "http://127.0.0.1:9/v1", a="broken")
    folder = home / "results" / "nightly" / "2026-01-01"
    folder.mkdir(parents=True)
    turns = [Turn("a", str(Path("scenarios/nightly/a.yaml")), state="running", path="a")]
    Night(folder, "2026-01-01T02:30:00Z", "scenarios/nightly", None, None, turns=turns).write()
    ran = told("nightly")
    assert ran.exit_code == 2, ran.stderr
    assert "was cut short" in ran.stderr
    old = read_night(folder)
    assert old is not None
    assert old.status == "cut_short"
    assert "cut short" in (folder / "index.html").read_text(encoding="utf-8")
    assert night_of(home).status == "complete"


def test_without_room_on_the_disk_nothing_is_started_and_it_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = type(shutil.disk_usage(home))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 300 << 20))
    scenarios(home, "http://127.0.0.1:9/v1", a="requests: 1")
    (home / "results" / "nightly").mkdir(parents=True)
    sweep = Sweep(home / "results" / "nightly", home / "results", None)
    assert sweep.go(home / "scenarios", [home / "scenarios" / "nightly" / "a.yaml"], fresh=False) == 1
    assert "300 MiB are left" in capsys.readouterr().err
    assert night_of(home).turns[0].state == "no_room"


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_scenarios_is_refused(home: Path, there: bool) -> None:
    if there:
        (home / "empty").mkdir()
    done = told("nightly", "empty")
    assert done.exit_code == 2
    assert done.stderr.startswith("loadbench: empty: expected scenarios, found no")
    assert not (home / "results").exists()


# What is made of it


@pytest.mark.parametrize(
    ("codes", "found"),
    [((), 0), ((0, 99), 99), ((0, 99, 95), 95), ((94, 95), 94), ((3, 93), 93), ((93, 1), 1), ((0, 130), 130)],
)
def test_the_exit_code_of_a_night_is_the_worst(codes: Sequence[int], found: int) -> None:
    assert worst(codes) == found


def done(name: str, answer: Answer | None = None, exit_code: int = 0) -> Turn:
    against = Against("2026-11-20", answer, "what was said")
    return Turn(name, f"{name}.yaml", "done", exit_code, path=name, took_s=61.0, against=against)


def kept_night(root: Path, day: int, *turns: Turn) -> Night:
    night = Night(root / f"2026-11-{day:02}", f"2026-11-{day:02}T02:30:00Z", "s", "c" * 40, False, "complete")
    night.turns = list(turns)
    for turn in turns:
        (night.folder / turn.name).mkdir(parents=True)
    night.write()
    return night


def test_what_regressed_is_no_base_until_it_is_accepted(home: Path) -> None:
    root = home / "results" / "nightly"
    kept_night(root, 20, done("a"))
    kept_night(root, 21, done("a", "regressed"))
    assert night_of(home).code == 95
    assert next(good(nights(root), "a"))[0].name == "2026-11-20"
    refused = told("nightly", "--accept", "b", ".")
    (home / "s.yaml").write_text("name: s\n")
    assert refused.exit_code == 2
    accepted = told("nightly", "--accept", "a", ".")
    assert accepted.exit_code == 0, accepted.stderr
    assert night_of(home).code == 0
    assert next(good(nights(root), "a"))[0].name == "2026-11-21"


def test_what_is_new_still_bad_and_good_again_is_told(home: Path) -> None:
    root = home / "results" / "nightly"
    kept_night(root, 19, done("a"), done("b"), done("c", exit_code=99), done("gone"))
    kept_night(root, 20, done("a"), done("b", exit_code=99), done("c", exit_code=93))
    night = kept_night(root, 21, done("a", exit_code=93), done("b", exit_code=93), done("c"), done("d"))
    earlier = nights(root)[1:]
    assert [turn.name for turn in night.worst_first] == ["a", "b", "c", "d"]
    assert list(news(night, earlier)) == ["New: a.", "Still bad: b.", "Good again: c.", "For the first time: d."]
    assert [since(turn, earlier) for turn in night.turns] == [
        "new: it was good on 2026-11-20",
        "bad for 2 nights, since 2026-11-20, the last time SLO missed",
        "after 2 bad nights (target died)",
        "for the first time",
    ]
    assert "No longer there: gone." in list(news(earlier[0], earlier[1:]))


def test_a_night_reads_as_it_was_written(tmp_path: Path) -> None:
    night = kept_night(tmp_path, 20, done("a", "equivalent"), Turn("b", "b.yaml", "running", process=Born(7, 1.5)))
    assert read_night(night.folder) == night


def test_the_page_escapes_what_came_from_files_and_needs_nothing_else(tmp_path: Path) -> None:
    turn = done(HOSTILE, None, exit_code=94)
    turn.why, turn.file, turn.path = HOSTILE, HOSTILE, "a"
    assert turn.against is not None
    turn.against.text = HOSTILE
    night = Night(tmp_path, "2026-11-20T02:30:00Z", HOSTILE, HOSTILE, True, "complete", turns=[turn])
    run = write_run(tmp_path / "a", [Planned(Closed(1), model=HOSTILE)])
    write_report(run)
    row = Row(
        "t", "s", "h", None, "m", "", "", "", "", "complete", 0, "a", {(HOSTILE, HOSTILE, 0): dict.fromkeys(FIGURES)}
    )
    drawn = page(night, [], {f"{night.name}/a": row})
    assert "<script" not in drawn
    assert "\x1b" not in drawn
    assert drawn.count("&lt;script&gt;") >= 6
    assert "http" not in drawn
    assert "prefers-color-scheme: dark" in drawn


def test_a_figure_on_few_samples_has_its_mark_on_the_page(tmp_path: Path) -> None:
    turn, place = done("a"), ("m:1", "4 users", 0)
    turn.path = "a"
    night = Night(tmp_path, "2026-11-20T02:30:00Z", "s", "c", True, "complete", turns=[turn])
    figures = dict.fromkeys(FIGURES) | {"ttft.p50": 40.0, "ttft.p95": 260.0}
    row = Row("t", "s", "h", None, "m", "", "", "", "", "complete", 0, "a", {place: figures}, {place: {"ttft.p95"}})
    drawn = page(night, [], {f"{night.name}/a": row})
    assert ">~260 ms<" in drawn
    assert ">40 ms<" in drawn or ">40.0 ms<" in drawn
    assert "~: on few samples" in drawn
    assert "~" not in page(night, [], {f"{night.name}/a": replace(row, indicative={})})


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (
            "loadbench: run 1 of 2\nloadbench: SLO missed: ttft\nloadbench: run 2 of 2\n",
            "SLO missed: ttft (1 of 2 runs)",
        ),
        ("table\nloadbench: target died: oom_killed\n", "target died: oom_killed"),
        ("Traceback\nKeyError: 'x'\n", "KeyError: 'x'"),
        ("", None),
    ],
)
def test_why_a_run_failed_is_what_it_said_last_of_that(tmp_path: Path, log: str, why: str | None) -> None:
    (tmp_path / "log").write_text(log)
    assert _last_line(tmp_path / "log") == why


def test_the_end_of_a_process_is_not_the_end_of_another_with_its_number() -> None:
    me = Born.of(psutil.Process().pid)
    assert end_tree(replace(me, at_s=me.at_s - 60)) is False


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: .ci/run installs one")
async def test_the_page_fits_a_phone_and_a_desk_fetches_nothing_and_tells_the_night_first(tmp_path: Path) -> None:
    turns = [done("a", "inconclusive"), done("b", exit_code=93), Turn("c" * 60, "c.yaml")]
    turns[1].why = "w" * 300
    night = Night(tmp_path, "2026-11-20T02:30:00Z", "scenarios/nightly", "c" * 40, True, "interrupted", turns=turns)
    path = tmp_path / "index.html"
    path.write_text(page(night, [night], {}), encoding="utf-8")
    async with browser() as tab:
        for width, dark in ((1440, False), (390, True)):
            await tab.open(path, width=width, dark=dark)
            wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert await tab.ask(wide) <= 0, width
            said = await tab.ask("document.querySelector('.verdict').innerText")
            assert "1 of 3 good; 1 target died; 1 not run" in said
            assert "inconclusive (2026-11-20)" in said
        assert tab.console == []
        assert set(tab.requests) == {path.as_uri()}


@pytest.mark.parametrize("path", sorted((ROOT / "scenarios" / "nightly").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_nightly_scenarios_are_valid_short_and_on_this_machine(path: Path) -> None:
    loaded = load_scenario(path, Overrides(), {})
    plan = describe(loaded.scenario, levels(loaded.scenario, loaded.scenario.models, loaded.traces))
    assert loaded.scenario.embedded
    assert plan.estimated_s * loaded.scenario.repeat < 120


# Old runs go


def runs(folder: Path, count: int) -> list[Path]:
    """Run directories, oldest first."""
    return [
        write_run(folder / f"run-{day}", [Planned(Closed(1), duration_s=1.0)], started=f"2026-11-{day:02}T00:00:00Z")
        for day in range(1, count + 1)
    ]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_clean_keeps_the_last_runs_the_baseline_and_whatever_is_no_run(home: Path) -> None:
    results = home / "results"
    made = runs(results, 6)
    (results / "baseline").write_text("# kept for the release\nrun-2\n", encoding="utf-8")
    (results / "notes").mkdir()
    (results / "notes" / "run.json").write_text("{}")
    (results / "history.jsonl").write_text("{}\n")
    outside = write_run(home / "outside", [Planned(Closed(1), duration_s=1.0)])
    (results / "link").symlink_to(outside, target_is_directory=True)
    write_run(results / "going", [Planned(Closed(1), duration_s=1.0)], status="running", started="2026-01-01T00:00:00Z")
    planned = told("clean", "--keep", "2", "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    assert all(run.exists() for run in made)
    cleaned = told("clean", "--keep", "2")
    assert cleaned.exit_code == 0, cleaned.stderr
    stays = {"run-2", "run-5", "run-6", "baseline", "notes", "history.jsonl", "link", "going"}
    assert left(results) == stays
    assert "a baseline" in cleaned.stdout
    assert "it may be going on" in cleaned.stdout
    assert (outside / "run.json").exists()


def test_clean_keeps_the_pages_of_old_nights_and_each_last_good_run(home: Path) -> None:
    root = home / "results" / "nightly"
    for day in (20, 21, 22):
        night = kept_night(root, day, done("a"), done("b", exit_code=0 if day == 20 else 99))
        for turn in night.turns:
            for number in (1, 2):
                write_run(night.folder / turn.name / str(number), [Planned(Closed(1), duration_s=1.0)])
        (night.folder / "index.html").write_text("page")
    cleaned = told("clean", "--keep", "1")
    assert cleaned.exit_code == 0, cleaned.stderr
    assert "kept     results/nightly/2026-11-20/b: its last good night" in cleaned.stdout
    assert left(root / "2026-11-20") == {"night.json", "index.html", "b"}
    assert left(root / "2026-11-21") == {"night.json", "index.html"}
    assert left(root / "2026-11-22") == {"night.json", "index.html", "a", "b"}


def test_clean_leaves_a_group_that_holds_something_else(home: Path) -> None:
    group = home / "results" / "group"
    write_run(group / "1", [Planned(Closed(1), duration_s=1.0)])
    (group / "mine").mkdir()
    assert told("clean", "--keep", "0").exit_code == 0
    assert left(group) == {"1", "mine"}


@pytest.mark.parametrize(
    ("baseline", "line"),
    [
        (b"\xff\xfe", "expected a text with a path a line, found 'utf-8' codec"),
        (b"run-1\0\n", "line 1: expected a path that is there, got run-1\\x00"),
        (b"# the good one\nrun-l\n", "line 2: expected a path that is there, got run-l"),
    ],
)
def test_clean_removes_nothing_where_the_baseline_cannot_be_read_or_names_nothing(
    home: Path, baseline: bytes, line: str
) -> None:
    (made,) = runs(home / "results", 1)
    (home / "results" / "baseline").write_bytes(baseline)
    done = told("clean", "--keep", "0")
    assert done.exit_code == 2
    assert done.stderr.startswith("loadbench: results/baseline: " + line)
    assert done.stderr.count("\n") == 1
    assert made.exists()


@pytest.mark.parametrize(
    "text", ["run-1  # the good one\n", "\ufeffrun-1\n", "\ufeff# a comment\r\nresults/run-1\r\n", "run-1\t# good\n"]
)
def test_clean_reads_a_baseline_as_people_write_it(home: Path, text: str) -> None:
    runs(home / "results", 2)
    (home / "results" / "baseline").write_bytes(text.encode())
    assert told("clean", "--keep", "0").exit_code == 0
    assert left(home / "results") == {"run-1", "baseline"}


@pytest.mark.parametrize("place", ["baseline", "baseline/good"])
def test_clean_keeps_a_run_that_the_baseline_links_to(home: Path, place: str) -> None:
    made = runs(home / "results", 2)
    link = home / "results" / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(made[0], target_is_directory=True)
    assert told("clean", "--keep", "0").exit_code == 0
    assert left(home / "results") == {"run-1", "baseline"}


def test_clean_keeps_a_run_that_is_the_baseline_itself(home: Path) -> None:
    (made,) = runs(home / "results", 1)
    made.rename(home / "results" / "baseline")
    assert told("clean", "--keep", "0").exit_code == 0
    assert left(home / "results") == {"baseline"}
