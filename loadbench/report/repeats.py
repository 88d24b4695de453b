"""Shows how the figures of a group of runs scatter from run to run: on the console, and as the group's report.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TextIO

from rich.text import Text

from loadbench.analysis.compare_judge import Cells as Values
from loadbench.analysis.compared import Compared, Side
from loadbench.analysis.group import Loaded
from loadbench.files import write_whole
from loadbench.report import console as shown
from loadbench.report import markdown as written
from loadbench.report.compare import LOOPS, UNITS
from loadbench.report.content import Cells, Table, run_line
from loadbench.report.escape import code, markdown, plain
from loadbench.report.github import verbatim
from loadbench.report.words import NONE, figure, share

Figures = Sequence[tuple[Compared, Sequence[Values]]]
MEANING = "Scatter is the widest distance of a run from the median of all, as a share of the median."


@verbatim()
def print_group(
    runs: Sequence[Loaded], figures: Figures, folder: Path, stream: TextIO | None = None, *, quiet: bool = False
) -> None:
    """A table a level, or when ``quiet`` only where the runs are."""
    console = shown.console_on(stream or sys.stdout)
    if not quiet:
        for table in _tables(figures):
            shown.fit_and_show(console, table)
        console.print()
        shown.prose(console, Text(MEANING, "dim"))
        console.print()
    shown.whole_line(console, "Group", f"{plain(folder)} ({len(runs)} runs)")


def write_group(runs: Sequence[Loaded], figures: Figures, folder: Path) -> None:
    """The group's report.md, with its runs."""
    name = runs[0].summary.name
    blocks = [f"# loadbench: {markdown(name)}, {len(runs)} runs", *written.tables_of(_tables(figures)), MEANING]
    rows = [(one.path.name, run_line(one.summary), one.summary.verdict.text) for one in runs]
    blocks += ["## The runs", written.table_of(("directory", "run", "verdict"), rows)]
    blocks += [f"Compare them with others: {code(f'loadbench compare {folder} -- NEW')}"]
    write_whole(folder / "report.md", ("\n\n".join(blocks) + "\n").encode())


def _tables(figures: Figures) -> Iterator[Table]:
    for level, values in figures:
        judged = [cells for cells in values if cells.figure.gates]
        columns = (
            Cells(("figure",), 0, tuple(cells.figure.title for cells in judged)),
            Cells(("median",), 1, tuple(_told(cells, cells.base.median) for cells in judged)),
            Cells(("least",), 1, tuple(_told(cells, min(_known(cells.base))) for cells in judged)),
            Cells(("most",), 1, tuple(_told(cells, max(_known(cells.base))) for cells in judged)),
            Cells(("scatter",), 1, tuple(_scatter(cells.base) for cells in judged)),
            Cells(("runs",), 1, tuple(str(cells.base.runs) for cells in judged)),
        )
        # The group was compared with itself: what is said of the base is said of all its runs.
        told = [f"{line.partition(' base runs')[0]} runs" for line in level.left_out if line.endswith("base runs")]
        told = [f"left out: {line}" for line in told]
        doubts = [f"{line.partition(' base runs')[0]} runs" for line in level.doubts]
        told += [f"bear in mind: {', '.join(doubts)}"] if doubts else []
        yield Table(level.model, f"{level.load}, {LOOPS[level.loop]}", columns, "; ".join(told) or None)


def _known(side: Side) -> list[float]:
    return [value for value in side.values if value is not None]


def _told(cells: Values, value: float | None) -> str:
    return UNITS.get(cells.figure.unit, figure)(value)


def _scatter(side: Side) -> str:
    known = _known(side)
    middle = median(known)
    return share(max(abs(value - middle) for value in known) / middle) if middle else NONE
