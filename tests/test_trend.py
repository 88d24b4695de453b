"""What a history shows: series of like runs, changes that are there and none that are not, drawn and as JSON."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner

from loadbench.analysis import history
from loadbench.analysis.history import Row
from loadbench.analysis.trend import FEWEST, changes, trend
from loadbench.cli import main
from loadbench.report.trend import draw, print_trends, trends_json

HOSTILE = "<b>\x1b[31m|`x`"
MACHINE = {"fingerprint": "m1", "machine": "x86_64", "cpu": "A CPU", "cores": 4, "memory_gib": 16, "os": "Linux"}


def line(number: int, ttft_ms: float | None, **more: Any) -> dict[str, Any]:
    """A row as a run leaves it."""
    level = {"model": "m:1", "load": "4 users", "complete": True, "ttft_p50_ms": ttft_ms, "ttft_p95_ms": ttft_ms}
    return {
        "schema": 1,
        "time": f"2026-{1 + number // 28:02}-{1 + number % 28:02}T02:30:00Z",
        "scenario": "s",
        "scenario_hash": "h1",
        "commit": f"{number:040x}",
        "dirty": False,
        "models": ["m:1"],
        "machine": MACHINE,
        "engine": {"title": "Foundry Local 2", "at": "this machine", "version": None, "versions": {"sdk": "1.0"}},
        "loadbench": "0.1.0",
        "status": "complete",
        "exit_code": 0,
        "path": f"run-{number}",
        "levels": [{**level, "output_tokens_per_s": 100.0, "failures": 0, "peak_rss_bytes": 1 << 28}],
        **more,
    }


def noise(count: int, spread: float = 0.03, seed: int = 1) -> list[float]:
    randomness = random.Random(seed)
    return [100 * randomness.lognormvariate(0, spread) for _ in range(count)]


def stepped(count: int, at: int, by: float) -> list[float]:
    return [value * (by if place >= at else 1.0) for place, value in enumerate(noise(count))]


def written(folder: Path, lines: list[dict[str, Any]]) -> list[Row]:
    path = folder / "results" / "history.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in lines))
    return history.read(path)[0]


def shown(rows: list[Row], width: int, monkeypatch: pytest.MonkeyPatch, *metrics: str) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    pipe = io.BytesIO()
    stream = io.TextIOWrapper(pipe, encoding="utf-8")
    print_trends([trend(rows, metrics or ("ttft.p50",), 200)], 0, stream)
    stream.flush()
    return pipe.getvalue().decode()


# Changes


def test_a_step_is_found_at_its_run_with_the_medians_on_either_side() -> None:
    pytest.importorskip("ruptures")
    (change,) = changes(stepped(24, 15, 1.25)) or ()
    assert change.run == 15
    assert change.before == pytest.approx(100, rel=0.03)
    assert change.after == pytest.approx(125, rel=0.03)


def test_a_step_up_and_back_are_two_changes() -> None:
    pytest.importorskip("ruptures")
    values = [value * (1.3 if 10 <= place < 20 else 1.0) for place, value in enumerate(noise(30))]
    assert [change.run for change in changes(values) or ()] == [10, 20]


@pytest.mark.parametrize("count", [10, 30, 60])
def test_of_many_series_of_noise_hardly_one_has_a_change(count: int) -> None:
    pytest.importorskip("ruptures")
    assert sum(bool(changes(noise(count, 0.05, seed))) for seed in range(60)) <= 1


def test_one_run_that_is_far_off_is_no_change() -> None:
    pytest.importorskip("ruptures")
    values = noise(20)
    values[12] *= 4
    assert changes(values) == ()


def test_a_change_that_is_sure_and_tiny_is_not_told() -> None:
    pytest.importorskip("ruptures")
    values = [value * (1.03 if place >= 10 else 1) for place, value in enumerate(noise(20, 0.001))]
    assert changes(values) == ()


def test_a_missing_run_does_not_move_the_place_of_a_change() -> None:
    pytest.importorskip("ruptures")
    values: list[float | None] = [*stepped(24, 15, 1.3)]
    values[3] = values[7] = None
    assert [change.run for change in changes(values) or ()] == [15]


def test_failures_that_begin_are_a_change_though_there_were_none_before() -> None:
    pytest.importorskip("ruptures")
    assert [change.run for change in changes([0.0] * 12 + [5.0, 6, 5, 7, 5, 6]) or ()] == [12]


@pytest.mark.parametrize("values", [[7.0] * 20, [0.0] * 20])
def test_a_series_that_never_moves_has_no_change(values: list[float]) -> None:
    pytest.importorskip("ruptures")
    assert changes(values) == ()


def test_with_too_few_runs_no_change_can_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = written(tmp_path, [line(number, 100.0 if number < 5 else 500.0) for number in range(FEWEST - 1)])
    assert trend(rows, ("ttft.p50",), 200).series[0].changes is None
    assert "No change can be told yet: it takes 10 runs" in shown(rows, 120, monkeypatch)


# Which runs are held together


def test_only_runs_like_the_last_make_a_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [
        line(0, 1.0, scenario_hash="h0"),
        line(1, 1.0, machine=MACHINE | {"fingerprint": "m0"}),
        line(2, 1.0, engine={"title": "vLLM", "at": "gpu:8000"}),
    ]
    rows = written(tmp_path, [*others, line(3, 100.0), line(4, 101.0)])
    found = trend(rows, ("ttft.p50",), 200)
    assert [row.path for row in found.rows] == ["run-3", "run-4"]
    assert found.unlike == 3
    assert "left out: 3 runs" in shown(rows, 120, monkeypatch)


def test_last_takes_the_newest_runs(tmp_path: Path) -> None:
    rows = written(tmp_path, [line(number, float(number + 1)) for number in range(8)])
    assert trend(rows, ("ttft.p50",), 3).series[0].values == (6.0, 7.0, 8.0)


def test_a_run_without_the_figure_keeps_its_place(tmp_path: Path) -> None:
    rows = written(tmp_path, [line(0, 1.0), line(1, None), line(2, 3.0, levels=[]), line(3, 4.0)])
    assert trend(rows, ("ttft.p50",), 9).series[0].values == (1.0, None, None, 4.0)


# What is shown


def test_bars_go_from_the_lowest_to_the_highest_and_say_where_one_is_missing() -> None:
    assert draw([1.0, 4.5, None, 8.0]) == "▁▅×█"


def test_a_figure_on_few_samples_has_its_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line(0, 40.0), line(1, 50.0)]
    lines[1]["levels"][0]["indicative"] = ["ttft_p95_ms"]
    rows = written(tmp_path, lines)
    told = shown(rows, 100, monkeypatch, "ttft.p50", "ttft.p95")
    assert re.search(r"TTFT p95 .* ~50(\.0)? ms", told)
    assert not re.search(r"TTFT p50 .* ~", told)
    assert "~: on few samples." in told
    series = trends_json([trend(rows, ("ttft.p50", "ttft.p95"), 200)], 0)["scenarios"][0]["series"]
    assert [one["indicative"] for one in series] == [(False, False), (False, True)]


def test_noise_of_a_hundredth_looks_like_none() -> None:
    assert set(draw([100.0, 100.5, 99.5, 100.2])) <= {"▄", "▅"}


@pytest.mark.parametrize("width", [80, 120])
def test_bars_and_figures_fit_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    rows = written(tmp_path, [line(number, value) for number, value in enumerate(noise(90))])
    told = shown(rows, width, monkeypatch, "ttft.p50", "output_tokens_per_s")
    bars = next(text for text in told.splitlines() if "TTFT p50" in text)
    assert len(bars) <= width
    assert sum(sign in "▁▂▃▄▅▆▇█" for sign in bars) >= 24
    assert "\x1b" not in told


def test_a_change_is_told_with_its_commit_and_the_engine_that_came_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ruptures")
    newer = {"title": "Foundry Local 2", "at": "this machine", "version": None, "versions": {"sdk": "1.1"}}
    lines = [line(number, value) for number, value in enumerate(stepped(20, 14, 1.4))]
    for row in lines[14:]:
        row["engine"] = newer
    told = shown(written(tmp_path, lines), 120, monkeypatch)
    assert "Changed on 2026-01-15: run-14" in told
    assert f"with commit {14:040x}"[:24] in told
    assert f"before it {13:040x}"[:22] in told
    assert "engine: Foundry Local 2, sdk 1.0 → Foundry Local 2, sdk 1.1" in told
    assert "worse   TTFT p50 at 4 users of m:1" in told
    assert "(+4" in told


def test_foreign_words_are_shown_and_not_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = line(0, 1.0, scenario=HOSTILE, machine=MACHINE | {"cpu": HOSTILE})
    row["levels"][0] |= {"model": HOSTILE, "load": HOSTILE}
    told = shown(written(tmp_path, [row]), 120, monkeypatch)
    assert "\x1b" not in told
    assert r"<b>\x1b[31m" in told


# The command


def test_the_command_draws_names_what_it_knows_and_gives_json(home: Path) -> None:
    written(home, [line(number, value) for number, value in enumerate(noise(12))])
    drawn = CliRunner().invoke(main, ["trend"])
    assert drawn.exit_code == 0, drawn.stderr
    assert "TTFT p50" in drawn.stdout
    assert "\x1b" not in drawn.stdout
    unknown = CliRunner().invoke(main, ["trend", "t"])
    assert unknown.exit_code == 2
    assert unknown.stderr.strip() == "loadbench: t: expected a scenario of s, as results has them"
    words = ["trend", "s", "--metric", "all", "--last", "11", "--json"]
    (scenario,) = orjson.loads(CliRunner().invoke(main, words).stdout)["scenarios"]
    assert len(scenario["runs"]) == 11
    assert {series["metric"] for series in scenario["series"]} >= {"ttft.p50", "output_tokens_per_s", "peak_rss"}
    assert all(len(series["values"]) == 11 for series in scenario["series"])


def test_a_metric_that_is_not_kept_is_refused_with_those_that_are(home: Path) -> None:
    refused = CliRunner().invoke(main, ["trend", "--metric", "ttft.p42"])
    assert refused.exit_code == 2
    assert "--metric: expected one of ttft.p50" in refused.stderr
