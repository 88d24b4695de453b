"""Percentile distributions for HdrHistogram's plotters, of the requests that the summary tells of."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.rundir import read
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Road
from loadbench.records import Closed, Open
from loadbench.report.hgrm import write_hgrm
from loadbench.report.write import write_report
from tests import rundirs
from tests.command import loadbench
from tests.rundirs import Planned, write_run


def total(path: Path) -> int:
    (count,) = re.findall(r"Total count    = +(\d+)\]", path.read_text(encoding="ascii"))
    return int(count)


def at(path: Path, percentile: float) -> float:
    """The value of the first row that reaches the percentile, in milliseconds."""
    rows = [line.split() for line in path.read_text(encoding="ascii").splitlines()[2:] if not line.startswith("#")]
    return next(float(row[0]) for row in rows if float(row[1]) >= percentile)


def test_each_level_has_a_file_for_every_latency_with_the_summarys_values(tmp_path: Path) -> None:
    summary = write_report(rundirs.open_loop(tmp_path), hgrm=True)
    for level in summary.levels:
        for metric in LATENCIES.values():
            for series in metric.series:
                told = level.latency_ms[metric.name][series]
                path = tmp_path / f"{metric.name}.{series}.L{level.index}.hgrm"
                assert total(path) == told.n
                assert at(path, 0.5) == pytest.approx(told.p50, rel=2e-3, abs=1e-3)
    assert len(list(tmp_path.glob("*.hgrm"))) == 2 * sum(len(metric.series) for metric in LATENCIES.values())


def test_what_a_level_does_not_have_gets_no_file(tmp_path: Path) -> None:
    write_report(rundirs.non_streaming(tmp_path), hgrm=True)
    assert {path.name.split(".")[0] for path in tmp_path.glob("*.hgrm")} == {"e2e", "lag"}


def test_the_warm_up_is_left_out_as_it_is_of_the_summary(tmp_path: Path) -> None:
    summary = write_report(write_run(tmp_path, [Planned(Closed(1), duration_s=120.0, cold_s=10.0)]), hgrm=True)
    assert summary.levels[0].warmup_trimmed_s
    assert total(tmp_path / "ttft.service.L0.hgrm") == summary.levels[0].latency_ms["ttft"]["service"].n


def test_a_level_over_capacity_has_the_requests_of_its_summary(tmp_path: Path) -> None:
    """In it the latency grows to the end, which looks like a warm-up and is none."""
    cold = Planned(Open(3.0), duration_s=120.0, cold_s=10.0)
    run = read(write_run(tmp_path, [cold]))
    (level,) = summarise(run).levels
    assert level.warmup_trimmed_s and level.requests.ok > level.latency_ms["ttft"]["response"].n
    over = replace(level, road=Road("over_capacity", "it grew"))
    write_hgrm(run, [over])
    assert total(tmp_path / "ttft.response.L0.hgrm") == level.requests.ok


def test_they_are_written_when_asked_for_and_not_otherwise(tmp_path: Path) -> None:
    rundirs.closed_ladder(tmp_path)
    assert loadbench("report", tmp_path, "--quiet").returncode == 0
    assert not list(tmp_path.glob("*.hgrm"))
    assert loadbench("report", tmp_path, "--quiet", "--hgrm").returncode == 0
    assert (tmp_path / "ttft.service.L3.hgrm").is_file()
