"""Results fit for version control: two runs of one deterministic scenario differ in timings and in nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadbench.records import Closed
from loadbench.report.stable import document
from loadbench.report.write import write_report
from tests import rundirs
from tests.command import ROOT, facts, loadbench, summary
from tests.test_determinism import odd_at_four_users, run, said

PROMPTS = 12
TIMES = ("_ms", "_per_s")
Leaves = dict[tuple[str, ...], Any]


def leaves(found: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value with the keys that lead to it."""
    if isinstance(found, (dict, list)) and found:
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from leaves(value, (*at, str(key)))
    else:
        yield at, found


def stable(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads((folder / "stable.json").read_bytes())
    return found


def cells(text: str) -> dict[tuple[str, int, str], str]:
    """Every cell of stable.md by section, row and heading; every other line by itself."""
    found, section, head = {}, "", list[str]()
    for number, line in enumerate(text.splitlines()):
        if line.startswith("#"):
            section, head = line, []
        if not line.startswith("|"):
            found[section, number, ""] = line
            continue
        row = line.strip("| ").split(" | ")
        head = head or row
        found |= {(section, number, name): cell for name, cell in zip(head, row, strict=False)}
    return found


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The deterministic scenario on the real service, two times."""
    folders = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("after")
    for folder in folders:
        done = loadbench(
            *("run", ROOT / "scenarios" / "repeat.yaml", "--model", "synthetic:tiny", "--set", "stages.0.rounds=3"),
            *("--out", folder / "out", "--stable", "--quiet"),
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr
    return folders


def test_two_runs_of_the_deterministic_scenario_answer_the_same(twice: tuple[Path, Path]) -> None:
    before, after = (stable(folder / "out")["answers"] for folder in twice)
    assert before == after
    hashes = before["synthetic-tiny:1"]["chat"]
    assert len(hashes) == PROMPTS
    assert all(len(each) == 1 and len(each[0]) == 16 for each in hashes.values())
    answers = summary(twice[0] / "out")["answers"]
    assert [row["identical"] for row in answers] == [True] * PROMPTS
    assert [hashes[f"{row['place']:03}"] for row in answers] == [[row["variants"][0]["answer_hash"]] for row in answers]


def test_their_stable_json_differs_in_timings_only(twice: tuple[Path, Path]) -> None:
    before, after = (dict(leaves(stable(folder / "out"))) for folder in twice)
    assert set(before) == set(after)
    differing = {at for at in before if before[at] != after[at]}
    assert differing, "no two runs take the same time"
    for at in differing:
        assert at[0] == "timings"
        assert at[-1].endswith(TIMES), at


def test_their_stable_markdown_differs_in_timings_only(twice: tuple[Path, Path]) -> None:
    before, after = (cells((folder / "out" / "stable.md").read_text(encoding="utf-8")) for folder in twice)
    assert set(before) == set(after)
    differing = {at for at in before if before[at] != after[at]}
    assert differing
    for section, _, heading in differing:
        assert section.startswith("## Timings")
        assert heading.endswith(TIMES), heading


def test_neither_file_holds_what_changes_by_itself(twice: tuple[Path, Path]) -> None:
    folder, run_facts = twice[0], facts(twice[0])
    url = run_facts["endpoint"]["url"]
    for name in ("stable.json", "stable.md"):
        text = (folder / "out" / name).read_text(encoding="utf-8")
        for word in (str(folder), str(ROOT), f"{Path.home()}/", url, url.split(":")[2].split("/")[0]):
            assert word not in text
        assert run_facts["started"][:10] not in text


def test_report_writes_the_same_files_again(twice: tuple[Path, Path]) -> None:
    folder = twice[1] / "out"
    kept = {name: (folder / name).read_bytes() for name in ("stable.json", "stable.md")}
    for name in kept:
        (folder / name).unlink()
    assert loadbench("report", folder, "--quiet").returncode == 0
    assert not any((folder / name).exists() for name in kept)
    assert loadbench("report", folder, "--stable", "--quiet").returncode == 0
    assert {name: (folder / name).read_bytes() for name in kept} == kept


def test_keys_are_sorted_and_figures_have_three_digits(twice: tuple[Path, Path]) -> None:
    text = (twice[0] / "out" / "stable.json").read_bytes()
    plain = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    assert text == orjson.dumps(orjson.loads(text), option=plain)
    figures = [value for _, value in leaves(orjson.loads(text)) if isinstance(value, float)]
    assert figures
    assert all(value == float(f"{value:.3g}") for value in figures)


def test_answers_given_among_others_are_not_kept(tmp_path: Path) -> None:
    """The engine may batch them otherwise the next time."""
    odd = run(tmp_path / "odd", odd_at_four_users)
    write_report(odd, stable=True)
    assert said(7) in {one["answer_hash"] for row in summary(odd)["answers"] for one in row["variants"]}
    answers = stable(odd)["answers"]
    assert answers == {"synthetic-edge:1": {"chat": {f"{place:03}": [said(100 + place)] for place in range(3)}}}


def test_an_answer_that_changes_at_one_user_is_seen(tmp_path: Path) -> None:
    folders = run(tmp_path / "a"), run(tmp_path / "b", lambda row: {"place": row["seq"] % 3, "answer_hash": said(5)})
    for folder in folders:
        write_report(folder, stable=True)
    assert stable(folders[0])["answers"] != stable(folders[1])["answers"]


def test_how_much_a_level_of_some_seconds_asked_is_a_timing(tmp_path: Path) -> None:
    levels = [rundirs.Planned(Closed(users), duration_s=20.0) for users in (1, 2)]
    before = rundirs.write_run(tmp_path / "before", levels)
    after = rundirs.write_run(tmp_path / "after", [replace(level, slower=1.2) for level in levels])
    for folder in (before, after):
        write_report(folder, stable=True)
    one, other = stable(before), stable(after)
    assert one["timings"]["levels"][0]["attempted"] != other["timings"]["levels"][0]["attempted"]
    assert one | {"timings": None} == other | {"timings": None}


def test_a_model_that_failed_is_kept_with_its_step_and_without_its_reason(tmp_path: Path) -> None:
    broken = rundirs.model_row("broken:1", status="failed", failed_at="load", load_ms=None, first_ms=None)
    broken |= {"asked": "broken", "reason": "no such file: /home/ann/models/x"}
    rows = [rundirs.model_row("synthetic-edge:1"), broken]
    found = write_report(rundirs.write_run(tmp_path / "run", [rundirs.Planned(Closed(1))], models=rows), stable=True)
    kept = stable(tmp_path / "run")
    assert [(row["asked"], row["status"], row["failed_at"]) for row in kept["models"]][1] == (
        "broken",
        "failed",
        "load",
    )
    assert b"/home/ann" not in (tmp_path / "run" / "stable.json").read_bytes()
    run_facts = orjson.loads((tmp_path / "run" / "run.json").read_bytes())
    assert orjson.loads(orjson.dumps(document(found, run_facts))) == kept
