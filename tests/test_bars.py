"""The small bars of the console: as long as what they show, within the terminal, in characters that it can spell."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from loadbench.analysis.rundir import read
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Summary
from loadbench.records import Closed
from loadbench.report.bars import bars
from loadbench.report.console import print_report
from tests import rundirs
from tests.rundirs import Planned, write_run


def told(path: Path) -> Summary:
    return summarise(read(path))


def lines(summary: Summary, room: int = 80, encoding: str = "utf-8") -> tuple[str, ...]:
    (drawn,) = bars(summary, room, encoding)
    return drawn.lines


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """1, 2, 4 and 8 users on an engine that serves one at a time, some 70 requests each: a p95 is indicative."""
    return told(rundirs.closed_ladder(tmp_path_factory.mktemp("bars") / "run"))


def test_throughput_and_ttft_grow_as_their_numbers_do(tmp_path: Path) -> None:
    drawn = lines(told(rundirs.batching_ladder(tmp_path)))[1:]
    rates = [line.split("  ")[1:] for line in drawn]
    lengths = [len(next(cell for cell in cells if cell.strip("█ ") == "" and cell)) for cells in rates]
    assert lengths[0] == pytest.approx(lengths[2] / 4, abs=1) and lengths[1] == pytest.approx(lengths[2] / 2, abs=1)
    assert max(lengths) == lengths[2]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("build", [rundirs.closed_ladder, rundirs.open_loop, rundirs.two_kinds, rundirs.failures])
def test_they_fit_the_terminal(build: Callable[..., Path], columns: int, tmp_path: Path) -> None:
    for drawn in bars(told(build(tmp_path)), columns, "utf-8"):
        assert max(map(len, drawn.lines)) <= columns
        assert all("█" in line or "░" in line for line in drawn.lines[1:])


def test_there_are_none_where_there_is_no_room_or_only_one_load(ladder: Summary, tmp_path: Path) -> None:
    assert not list(bars(ladder, 40, "utf-8"))
    assert not list(bars(told(write_run(tmp_path / "one", [Planned(Closed(1))])), 80, "utf-8"))
    assert not list(
        bars(told(write_run(tmp_path / "none", [Planned(Closed(n), fails=1.0) for n in (1, 2)])), 80, "utf-8")
    )


def test_what_is_indicative_has_another_ink_and_a_note(ladder: Summary, tmp_path: Path) -> None:
    (drawn,) = bars(ladder, 80, "utf-8")
    assert drawn.lines[4].endswith("█░░░") and "481 - ~549" in drawn.lines[4]
    assert drawn.note == "░ and ~: indicative, on few samples"
    firm = write_run(tmp_path, [Planned(Closed(users), duration_s=40.0) for users in (1, 8)])
    (drawn,) = bars(told(firm), 80, "utf-8")
    assert drawn.lines[2].endswith("█▒▒▒") and drawn.note is None


def test_without_a_stream_it_is_e2e(tmp_path: Path) -> None:
    assert "E2E █ p50 ▒ p95" in lines(told(rundirs.non_streaming(tmp_path)))[0]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_where_blocks_cannot_be_spelt_they_are_ascii(
    encoding: str, ladder: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(line.isascii() for line in lines(ladder, encoding=encoding))
    monkeypatch.setenv("COLUMNS", "80")
    out = io.TextIOWrapper(raw := io.BytesIO(), encoding=encoding)
    print_report(ladder, Path("x"), out)
    out.flush()
    printed = raw.getvalue().decode(encoding)
    assert "8 users    147  ########################    481 - ~549  #####################..." in printed


def test_without_a_terminal_or_with_no_color_there_is_no_escape(
    ladder: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("COLUMNS", "80"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
        out = io.StringIO()
        print_report(ladder, Path("x"), out)
        assert "\x1b" not in out.getvalue() and "TTFT █ p50 ▒ p95" in out.getvalue()
