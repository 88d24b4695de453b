"""A night as from a terminal: it goes on after failures, one at a time, and when cut short; and old runs go."""

from __future__ import annotations

import re
import shutil
import signal
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
from loadbench.nightly import Sweep
from loadbench.records import Closed
from loadbench.report.night import page
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
    """What a command that starts nothing says here, in this process: starting one takes a second."""
    return CliRunner().invoke(main, words)


async def nightly(folder: Path, *words: str) -> tuple[int, str, str]:
    return await ended(await started("nightly", *words, cwd=folder))


# A night


async def test_a_night_goes_on_after_failures_exits_by_the_worst_and_tells_it_on_one_page(tmp_path: Path) -> None:
    async with scripted() as server:
        scenarios(tmp_path, server.base_url, a="broken", b="requests: 11")
        missing = SCENARIO.format(name="c", url="http://127.0.0.1:9/v1", bound="requests: 1")
        (tmp_path / "scenarios" / "nightly" / "c.yaml").write_text(missing, encoding="utf-8")
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
    told = (night.folder / "index.html").read_text(encoding="utf-8")
    assert "1 of 3 good" in told
    for words in ("usage or scenario (exit code 2)", "endpoint or model not servable (exit code 3)"):
        assert words in told
    assert out.rstrip().endswith(f"Night    {Path('results') / 'nightly' / night.name / 'index.html'}")
    addresses = re.findall(r'href="([^"#]+)"', told)
    assert "b/report.md" in addresses
    assert all((night.folder / address).exists() for address in addresses)
    noted = [row["path"] for row in rows(tmp_path / "results" / "history.jsonl")]
    assert noted == [f"nightly/{night.name}/b"]


async def test_a_run_that_takes_longer_than_it_may_is_stopped_and_counts_as_invalid(tmp_path: Path) -> None:
    async with scripted() as server:
        scenarios(tmp_path, server.base_url, a="duration: 60s")
        code, _, err = await nightly(tmp_path, "--limit", "2s")
    (turn,) = night_of(tmp_path).turns
    assert code == 94, err
    assert (turn.state, turn.why) == ("overtime", "stopped after 0:02, the most that it may take")
    assert "took longer than it may" in (night_of(tmp_path).folder / "index.html").read_text(encoding="utf-8")


async def test_the_next_night_is_compared_with_the_last_good_one_and_one_run_cries_no_wolf(tmp_path: Path) -> None:
    async with scripted() as server:
        scenarios(tmp_path, server.base_url, a="requests: 11")
        assert (await nightly(tmp_path))[0] == 0
        server.script = replace(server.script, first_token_ms=40)
        assert (await nightly(tmp_path))[0] == 0
    first, second = night_of(tmp_path, 1), night_of(tmp_path)
    assert (first.name, second.name) == (first.name, f"{first.name}-2")
    assert first.turns[0].against == Against(None, None, "there is none yet")
    against = second.turns[0].against
    assert against is not None
    assert (against.night, against.answer) == (first.name, "inconclusive")
    told = (second.folder / "index.html").read_text(encoding="utf-8")
    assert "inconclusive" in told
    assert f'href="../{first.name}/index.html"' in told


async def test_a_second_nightly_is_kept_out_while_the_first_is_at_work(tmp_path: Path) -> None:
    async with scripted(gap_ms=20) as server:
        scenarios(tmp_path, server.base_url, a="duration: 60s")
        first = await started("nightly", cwd=tmp_path)
        await eventually(lambda: len(server.records) > 2)
        code, _, err = await nightly(tmp_path)
        first.send_signal(signal.SIGINT)
        assert (await ended(first))[0] == 130
    assert code == 2
    assert f"another nightly is at work here: pid {first.pid}" in err


async def test_ctrl_c_has_the_run_end_tidily_and_the_same_command_goes_on(tmp_path: Path) -> None:
    async with scripted(gap_ms=20) as server:
        scenarios(tmp_path, server.base_url, a="requests: 2", b="duration: 60s")
        first = await started("nightly", cwd=tmp_path)
        await eventually(lambda: len(server.records) > 12)
        first.send_signal(signal.SIGINT)
        code, _, err = await ended(first)
        assert code == 130, err
        night = night_of(tmp_path)
        assert night.status == "interrupted"
        assert [turn.state for turn in night.turns] == ["done", "waiting"]
        assert orjson.loads((night.folder / "b" / "summary.json").read_bytes())["status"] == "interrupted"
        assert "It was interrupted" in (night.folder / "index.html").read_text(encoding="utf-8")
        scenarios(tmp_path, server.base_url, b="requests: 2")
        code, _, err = await nightly(tmp_path)
    assert code == 0, err
    assert "going on; 1 of 2 are done" in err
    night = night_of(tmp_path)
    assert [(turn.state, turn.path) for turn in night.turns] == [("done", "a"), ("done", "b-2")]
    assert len(nights(tmp_path / "results" / "nightly")) == 1


async def test_a_night_that_was_killed_is_gone_on_with_and_its_orphan_ended(tmp_path: Path) -> None:
    async with scripted(gap_ms=20) as server:
        scenarios(tmp_path, server.base_url, a="requests: 2", b="duration: 60s")
        first = await started("nightly", cwd=tmp_path)
        await eventually(lambda: len(server.records) > 12)
        first.kill()
        await first.wait()
        turn = night_of(tmp_path).turns[1]
        assert turn.state == "running"
        assert turn.process is not None
        orphan = psutil.Process(turn.process.pid)
        assert orphan.is_running()
        scenarios(tmp_path, server.base_url, b="requests: 2")
        code, _, err = await nightly(tmp_path)
    assert code == 0, err
    assert "b: ended the run that was left behind" in err
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert [turn.state for turn in night_of(tmp_path).turns] == ["done", "done"]


async def test_a_night_that_was_cut_short_elsewhere_is_marked_and_a_new_one_begun(tmp_path: Path) -> None:
    async with scripted() as server:
        scenarios(tmp_path, server.base_url, a="requests: 2")
        folder = tmp_path / "results" / "nightly" / "2026-01-01"
        folder.mkdir(parents=True)
        turns = [Turn("a", str(Path("scenarios/nightly/a.yaml")), state="running", path="a")]
        Night(folder, "2026-01-01T02:30:00Z", "scenarios/nightly", None, None, turns=turns).write()
        code, _, err = await nightly(tmp_path)
    assert code == 0, err
    assert "was cut short" in err
    old = read_night(folder)
    assert old is not None
    assert old.status == "cut_short"
    assert "cut short" in (folder / "index.html").read_text(encoding="utf-8")
    assert night_of(tmp_path).status == "complete"


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
    drawn = page(night, [], {"a": row})
    assert "<script" not in drawn
    assert "\x1b" not in drawn
    assert drawn.count("&lt;script&gt;") >= 6
    assert "http" not in drawn
    assert "prefers-color-scheme: dark" in drawn


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
    assert left(root / "2026-11-20") == {"night.json", "index.html", "b"}
    assert left(root / "2026-11-21") == {"night.json", "index.html"}
    assert left(root / "2026-11-22") == {"night.json", "index.html", "a", "b"}


def test_clean_leaves_a_group_that_holds_something_else(home: Path) -> None:
    group = home / "results" / "group"
    write_run(group / "1", [Planned(Closed(1), duration_s=1.0)])
    (group / "mine").mkdir()
    assert told("clean", "--keep", "0").exit_code == 0
    assert left(group) == {"1", "mine"}


def test_clean_removes_nothing_where_the_baseline_cannot_be_read(home: Path) -> None:
    (made,) = runs(home / "results", 1)
    (home / "results" / "baseline").write_bytes(b"\xff\xfe")
    done = told("clean", "--keep", "0")
    assert done.exit_code == 2
    assert made.exists()
