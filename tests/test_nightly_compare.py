"""What a night is held against, what is told of that, and what is the base of the next one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from loadbench import nightly_compare
from loadbench.analysis.night import Against, Night, Turn, good, nights
from loadbench.errors import UsageError
from loadbench.nightly import Sweep
from loadbench.nightly_compare import hold
from loadbench.records import Closed
from loadbench.report.night import page
from loadbench.report.night_words import told
from loadbench.report.write import write_report
from tests.asking import scripted
from tests.command import ROOT
from tests.rundirs import Planned
from tests.test_compare import made, rewrite
from tests.test_nightly import done, kept_night, night_of, nightly, scenarios
from tests.test_nightly import told as said


@pytest.fixture(autouse=True)
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is compared in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def after(
    earlier: list[Night], root: Path, day: int, *, exit_code: int = 0, change: Callable[[Path], None] | None = None,
    **how: Any,
) -> Night:  # fmt: skip
    """A night more, the last first: its runs, made for real, held against those before it."""
    night = Night(root / f"2026-11-{day:02}", f"2026-11-{day:02}T02:30:00Z", "s", "c" * 40, False, "complete")
    slower, runs = how.get("slower", 1.0), how.get("runs", 5)
    made(night.folder / "a", Planned(Closed(4), slower=slower), runs=runs, seed=100 * day)
    for run in (night.folder / "a").iterdir():
        if change is not None:
            change(run)
        write_report(run)
    turn = Turn("a", "a.yaml", "done", exit_code, path="a", took_s=61.0)
    night.turns = [turn]
    if exit_code in (0, 99):
        hold(earlier, night, turn)
    night.write()
    earlier.insert(0, night)
    return night


def upgraded(run: Path) -> None:
    rewrite(run, lambda facts: facts["endpoint"].update(title="Foundry Local 3.0"))


def busy(run: Path) -> None:
    def crowded(row: dict[str, Any]) -> None:
        row["client"].update(machine_cpu_s=1.2 + 0.5 * 4 * 15, elapsed_s=15.0)
        row["target"]["cpu_s"] = 5.0

    rewrite(run, crowded, "level_end")


def against(night: Night) -> Against:
    found = night.turns[0].against
    assert found is not None
    return found


def test_a_night_that_is_slower_regresses_and_is_no_base(tmp_path: Path) -> None:
    earlier: list[Night] = []
    first = after(earlier, tmp_path, 20)
    slow = after(earlier, tmp_path, 21, slower=1.5)
    assert (slow.code, against(slow).answer, against(slow).page) == (95, "regressed", "a/compare.html")
    again = after(earlier, tmp_path, 22, slower=1.5)
    assert (again.code, against(again).night) == (95, first.name)
    assert "regression" in told(again.turns[0], earlier[1:])


def test_a_night_that_misses_its_slo_and_regressed_exits_as_the_worse_of_both_and_can_be_accepted(home: Path) -> None:
    root = home / "results" / "nightly"
    kept_night(root, 20, done("a"))
    kept_night(root, 21, done("a", "regressed", 99))
    assert night_of(home).code == 95
    (home / "s.yaml").write_text("name: s\n")
    accepted = said("nightly", "--accept", "a", ".")
    assert accepted.exit_code == 0, accepted.stderr
    assert night_of(home).code == 99  # the SLO is missed all the same
    assert next(good(nights(root), "a"))[0].name == "2026-11-21"


def test_an_upgrade_is_told_as_a_new_baseline_with_what_it_changed_and_later_nights_are_held_against_it(
    tmp_path: Path,
) -> None:
    earlier: list[Night] = []
    old = after(earlier, tmp_path, 20)
    new = after(earlier, tmp_path, 21, slower=2.0, change=upgraded)
    assert (new.code, against(new).answer, against(new).night) == (0, None, old.name)
    line = told(new.turns[0], [old])
    assert "new baseline instead of 2026-11-20: engine service: " in line
    assert "against Foundry Local 3.0 changed; compared all the same: regressed: " in line
    shown = page(new, [old], {})
    assert "It is a new baseline, as it is not the same thing any more (engine service: " in shown
    assert 'class="doubt"><a href="a/compare.html">new baseline</a>' in shown
    slower = after(earlier, tmp_path, 22, slower=3.0, change=upgraded)
    assert (slower.code, against(slower).night) == (95, new.name)
    back = after(earlier, tmp_path, 23)  # the upgrade is undone
    assert (back.code, against(back).night, against(back).changed) == (0, old.name, None)


def test_a_night_beside_something_else_is_neither_a_regression_nor_a_base(tmp_path: Path) -> None:
    earlier: list[Night] = []
    quiet = after(earlier, tmp_path, 20)
    noisy = after(earlier, tmp_path, 21, slower=1.3, change=busy)
    assert (noisy.code, against(noisy).answer) == (0, "inconclusive")
    assert "the machine was busy in 5 of 5 new runs" in against(noisy).text
    assert "the machine was busy in 5 of 5 new runs" in page(noisy, [quiet], {})
    slow = after(earlier, tmp_path, 22, slower=1.3)
    assert (slow.code, against(slow).night) == (95, quiet.name)


def test_where_every_night_is_busy_the_last_one_is_the_base(tmp_path: Path) -> None:
    earlier: list[Night] = []
    for day in (20, 21):
        after(earlier, tmp_path, day, change=busy, runs=1)
    assert against(after(earlier, tmp_path, 22, change=busy, runs=1)).night == "2026-11-21"


def test_what_gets_a_little_slower_every_night_is_told_once_it_adds_up(tmp_path: Path) -> None:
    earlier, code, slower = list[Night](), 0, 1.0
    for day in range(1, 9):
        code = after(earlier, tmp_path, day, slower=slower).code
        if code:
            break
        slower *= 1.04
    assert code == 95
    assert against(earlier[0]).night == "2026-11-01"


def test_a_single_run_that_can_tell_nothing_is_the_base_of_the_next(tmp_path: Path) -> None:
    earlier: list[Night] = []
    for day in (20, 21, 22):
        after(earlier, tmp_path, day, runs=1)
    assert (against(earlier[0]).night, against(earlier[0]).answer) == ("2026-11-21", "inconclusive")


def test_comparing_that_breaks_leaves_the_night_going_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier: list[Night] = []
    after(earlier, tmp_path, 20, runs=1)
    (tmp_path / "loadbench").mkdir()
    (tmp_path / "loadbench" / "__init__.py").touch()
    (tmp_path / "loadbench" / "__main__.py").write_text("raise KeyError('x')\n")
    monkeypatch.chdir(tmp_path)
    night = after(earlier, tmp_path, 21, runs=1)
    assert night.code == 1
    assert against(night).text == "not compared: KeyError: 'x'"
    assert "not compared against 2026-11-20" in told(night.turns[0], earlier)


def test_a_base_that_cannot_be_read_is_told_and_no_fault(tmp_path: Path) -> None:
    earlier: list[Night] = []
    base = after(earlier, tmp_path, 20, runs=1)
    (base.folder / "a" / "1" / "run.json").write_text("{")
    night = after(earlier, tmp_path, 21, runs=1)
    assert night.code == 0
    assert "run.json: expected JSON" in against(night).text


def test_a_disk_that_fills_up_during_a_run_leaves_no_run_behind(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenarios(home, "http://127.0.0.1:9/v1", a="requests: 1")
    (home / "results" / "nightly").mkdir(parents=True)
    sweep, write = Sweep(home / "results" / "nightly", home / "results", None), Sweep._write
    left: list[psutil.Process] = []

    def full(self: Sweep, night: Night) -> None:
        if night.turns[0].process is not None:
            left.append(psutil.Process(night.turns[0].process.pid))
            raise UsageError("night.json: No space left on device")
        write(self, night)

    monkeypatch.setattr(Sweep, "_write", full)
    assert sweep.go(home / "scenarios", [home / "scenarios" / "nightly" / "a.yaml"], fresh=False) == 1
    assert left and not left[0].is_running()
    shown = capsys.readouterr()
    assert "a: running" not in shown.out
    assert "No space left on device" in shown.err


def test_what_is_compared_knows_nothing_of_githubs_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "here")
    assert nightly_compare.environment() == {k: v for k, v in os.environ.items() if k != "GITHUB_STEP_SUMMARY"}


def test_old_nights_without_a_word_about_bases_are_bases(tmp_path: Path) -> None:
    kept_night(tmp_path, 20, done("a"))
    path = tmp_path / "2026-11-20" / "night.json"
    path.write_text(
        path.read_text().replace('"is_base": true', '"accepted": false').replace('"broke": false', '"page": null')
    )
    assert [night.name for night, _ in good(nights(tmp_path), "a")] == ["2026-11-20"]


async def test_a_night_in_which_a_target_dies_exits_with_that_and_goes_on(home: Path) -> None:
    async with scripted() as server, scripted(refuse_after=60, connection_close=True) as mortal:
        scenarios(home, mortal.base_url, a="duration: 3s")
        scenarios(home, server.base_url, b="requests: 11")
        code, out, err = await nightly(home)
    assert {turn.name: turn.code for turn in night_of(home).turns} == {"a": 93, "b": 0}, err
    assert code == 93
    assert "1 of 2 good; 1 target died" in out
    assert "target died: unreachable" in (night_of(home).folder / "index.html").read_text(encoding="utf-8")
