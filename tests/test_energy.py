"""Energy and its cost: from GPU power as recorded beside a level, or as stated, and never one taken for the other."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadbench.analysis.energy import Energy
from loadbench.analysis.summary import Level, Summary
from loadbench.errors import UsageError
from loadbench.records import Closed
from loadbench.report.markdown import markdown_text
from loadbench.report.write import write_report
from tests import rundirs
from tests.rundirs import MIB, Planned, model_row, write_run
from tests.test_report import console

GPU = {"index": 0, "name": "NVIDIA H100", "total_bytes": 80_000 * MIB, "used_bytes": 5000 * MIB}
Gpus = Sequence[dict[str, Any]]


def gpu(power_w: float | None, process_mib: float | None = 4000.0, index: int = 0) -> dict[str, Any]:
    held = {} if process_mib is None else {"process_bytes": round(process_mib * MIB)}
    return GPU | {"index": index} | held | ({} if power_w is None else {"power_w": power_w})


def with_gpus(run: Path, gpus: Callable[[float], Gpus], every_s: Callable[[float], float] = lambda at_s: 1.0) -> Path:
    """The run with a reading of these GPUs every so often, from a minute before its first level to a minute after."""
    path = run / "telemetry.jsonl"
    events = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    starts = {event["level"]: event["t_ns"] for event in events if event["event"] == "level_start"}
    ends = {event["level"]: event["t_ns"] for event in events if event["event"] == "level_end"}
    for level, start_ns in starts.items():
        at_s, end_s = -0.5, (ends[level] - start_ns) / 1e9 + 0.5
        while at_s < end_s:
            row = {"event": "memory", "level": level, "phase": "load", "gpus": [*gpus(at_s)]}
            events.append({"t_ns": start_ns + round(at_s * 1e9)} | row)
            at_s += every_s(at_s)
    # As they were recorded: a level's readings follow its start, but one that was before it.
    events.sort(key=lambda event: (event["event"] != "level_start", event["t_ns"]))
    path.write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in events))
    return run


def told(path: Path, gpus: Callable[[float], Gpus], **facts: Any) -> tuple[Level, Energy]:
    level = write_report(with_gpus(write_run(path, [Planned(Closed(1), duration_s=30.0)], **facts), gpus)).levels[0]
    assert level.energy is not None
    return level, level.energy


def scenario(**more: Any) -> dict[str, Any]:
    return {"scenario": {"name": "edge", **more}}


# Measured


def test_a_token_takes_the_mean_power_over_the_tokens_of_a_second(tmp_path: Path) -> None:
    level, energy = told(tmp_path, lambda at_s: [gpu(212.5)])
    tokens_per_s = level.throughput["output_tokens_per_s"]
    assert tokens_per_s is not None
    assert (energy.source, energy.of, energy.watts) == ("measured", "1 GPU", 212.5)
    assert energy.joules_per_output_token == pytest.approx(212.5 / tokens_per_s)
    assert energy.joules_per_output_token == level.throughput["joules_per_output_token"]
    assert energy.cost_per_million_output_tokens is None
    assert (energy.firm, energy.readings) == (True, 30)


def test_power_before_the_level_and_in_its_drain_does_not_count(tmp_path: Path) -> None:
    _, energy = told(tmp_path, lambda at_s: [gpu(300.0 if 0 <= at_s <= 30 else 60.0)])
    assert energy.watts == 300.0


def test_power_is_averaged_over_time_however_often_it_was_read(tmp_path: Path) -> None:
    """Ten readings a second while it draws 100 W, one while it draws 400."""
    run = with_gpus(
        write_run(tmp_path, [Planned(Closed(1), duration_s=30.0)]),
        lambda at_s: [gpu(100.0 if at_s < 15 else 400.0)],
        lambda at_s: 0.1 if at_s < 15 else 1.0,
    )
    energy = write_report(run).levels[0].energy
    assert energy is not None
    assert energy.watts == pytest.approx(250.0, abs=10.0)


def test_only_the_gpus_that_the_target_uses_count_and_all_of_them(tmp_path: Path) -> None:
    _, energy = told(tmp_path, lambda at_s: [gpu(200.0), gpu(150.0, index=1), gpu(90.0, None, 2), gpu(80.0, 10.0, 3)])
    assert (energy.of, energy.watts) == ("2 GPUs", 350.0)


def test_where_the_driver_does_not_know_our_processes_a_model_on_a_gpu_counts_all_of_the_machine(
    tmp_path: Path,
) -> None:
    rows = [model_row("synthetic-edge:1", device="GPU")]
    _, energy = told(tmp_path, lambda at_s: [gpu(200.0, None), gpu(50.0, None, 1)], models=rows)
    assert (energy.of, energy.watts) == ("2 GPUs of the machine", 250.0)


def test_the_power_of_a_gpu_that_nobody_says_it_uses_is_not_its_own(tmp_path: Path) -> None:
    _, energy = told(tmp_path, lambda at_s: [gpu(200.0, None)])
    assert (energy.watts, energy.joules_per_output_token, energy.source) == (None, None, None)
    assert energy.because == "nobody says that the target uses a GPU; state what the machine draws with power: 45W"


def test_a_gpu_that_does_not_say_its_power_leaves_none_and_not_that_of_the_others(tmp_path: Path) -> None:
    _, energy = told(tmp_path, lambda at_s: [gpu(200.0), gpu(None, index=1)])
    assert energy.watts is None
    assert energy.because == "0 readings of power inside the window; it takes 3"


def test_a_mean_of_few_readings_is_indicative_and_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_gpus(write_run(tmp_path, [Planned(Closed(1), duration_s=6.0)]), lambda at_s: [gpu(148.0)])
    summary = write_report(run)
    energy = summary.levels[0].energy
    assert energy is not None
    assert (energy.firm, energy.readings) == (False, 6)
    assert "~1.0" in console(summary, 200, monkeypatch)
    assert "measured" in console(summary, 200, monkeypatch)


def test_a_run_without_gpu_and_without_a_price_says_nothing_of_energy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = write_report(rundirs.closed_ladder(tmp_path))
    assert {level.energy for level in summary.levels} == {None}
    assert {level.throughput["joules_per_output_token"] for level in summary.levels} == {None}
    assert "J/token" not in console(summary, 300, monkeypatch)


# Stated


def stated(path: Path, **more: Any) -> Summary:
    return write_report(rundirs.closed_ladder(path, **scenario(**more)))


def test_stated_watts_count_for_every_level_and_are_called_stated(tmp_path: Path) -> None:
    for level in stated(tmp_path, power="45W").levels:
        energy, tokens_per_s = level.energy, level.throughput["output_tokens_per_s"]
        assert energy is not None
        assert tokens_per_s is not None
        assert (energy.source, energy.of, energy.watts) == ("stated", "the scenario's power", 45.0)
        assert energy.joules_per_output_token == pytest.approx(45.0 / tokens_per_s)


@pytest.mark.parametrize(("written", "watts"), [("45W", 45.0), ("1.2kW", 1200.0), ("900mW", 0.9), (45, 45.0)])
def test_stated_watts_are_read_as_the_scenario_writes_them(written: Any, watts: float, tmp_path: Path) -> None:
    energy = stated(tmp_path, power=written).levels[0].energy
    assert energy is not None
    assert energy.watts == pytest.approx(watts)


def test_watts_that_are_none_are_told_with_their_file(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"run\.json: scenario\.power: expected a power such as 45W or 1\.2kW, got 45 horses"
    ):
        stated(tmp_path, power="45 horses")


def test_what_the_user_states_comes_before_what_a_driver_says(tmp_path: Path) -> None:
    _, energy = told(tmp_path, lambda at_s: [gpu(200.0)], **scenario(power="45W"))
    assert (energy.source, energy.watts) == ("stated", 45.0)


# Cost


def test_a_million_tokens_cost_their_kilowatt_hours(tmp_path: Path) -> None:
    energy = stated(tmp_path, power="36W", price_per_kwh=0.25, currency="EUR").levels[0].energy
    assert energy is not None
    assert energy.joules_per_output_token is not None
    kwh = energy.joules_per_output_token * 1e6 / 3.6e6
    assert energy.cost_per_million_output_tokens == pytest.approx(0.25 * kwh)
    assert energy.currency == "EUR"


def test_a_price_without_power_has_a_reason_and_no_zero(tmp_path: Path) -> None:
    energy = stated(tmp_path, price_per_kwh=0.25).levels[0].energy
    assert energy is not None
    assert (energy.watts, energy.cost_per_million_output_tokens) == (None, None)
    assert energy.because == "no GPU was read; state what the machine draws with power: 45W"


def test_a_level_without_tokens_has_power_and_no_energy_per_token(tmp_path: Path) -> None:
    energy = write_report(rundirs.all_failed(tmp_path, **scenario(power="45W", price_per_kwh=0.3))).levels[0].energy
    assert energy is not None
    assert (energy.watts, energy.joules_per_output_token, energy.cost_per_million_output_tokens) == (45.0, None, None)
    assert energy.because == "no output token arrived in its window"


def test_a_meter_that_reads_nothing_makes_no_figure_and_says_so(tmp_path: Path) -> None:
    run = rundirs.three_models(tmp_path, **scenario(price_per_kwh=0.3))
    summary = write_report(with_gpus(run, lambda at_s: [gpu(0.0)]))
    assert summary.decision is not None
    found = summary.decision.candidates[0]
    assert found.joules_per_output_token.value is found.cost_per_million_output_tokens.value is None
    assert "0 W" in (found.joules_per_output_token.because or "")


# In every output


def test_every_output_says_whether_it_was_measured_or_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for word, more in (("stated", {"power": "45W"}), ("measured", {})):
        run = tmp_path / word
        facts = scenario(price_per_kwh=0.3, currency="EUR", **more)
        summary = write_report(with_gpus(rundirs.three_models(run, **facts), lambda at_s: [gpu(120.0)]))
        assert summary.decision is not None
        found = summary.decision.candidates[0]
        assert found.joules_per_output_token.source == found.cost_per_million_output_tokens.source == word
        assert found.joules_per_output_token.at == "1 user"
        reach = found.joules_per_output_token.reach
        assert reach is not None
        assert reach[0] < (found.joules_per_output_token.value or 0.0) < reach[1]
        for text in (console(summary, 250, monkeypatch), markdown_text(summary, {})):
            assert f"EUR {word}" in text
            assert text.count(word) > 4
        for name in ("summary.csv", "decision.csv"):
            row = next(csv.DictReader((run / name).open(encoding="utf-8", newline="")))
            assert word in (row.get("energy_source"), row.get("joules_per_output_token_source"))


def test_energy_ranks_models_where_it_is_asked_for(tmp_path: Path) -> None:
    ranked = write_report(rundirs.three_models(tmp_path, **scenario(power="45W")), weights={"energy": 1.0}).decision
    assert ranked is not None
    assert ranked.ranking is not None
    assert [(place.model, place.rank) for place in ranked.ranking.places] == [
        ("quick-cpu:1", 1),
        ("slow-gpu:1", 2),
        ("broken:1", None),
    ]
