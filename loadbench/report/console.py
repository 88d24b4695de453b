"""Prints the report at the end of a run, as wide as the terminal is. Goes to stdout; the live view has stderr.

Foreign text passes ``plain`` and is put into ``rich.text.Text``, never into markup.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from loadbench.analysis.summary import Caution, Summary
from loadbench.report import bars, content, decision, determinism, findings, gates, memory, quality
from loadbench.report.content import Cells, Table
from loadbench.report.escape import plain
from loadbench.report.findings import Finding, Stands
from loadbench.report.github import verbatim

TEXT_WIDTH = 100  # prose in longer lines is hard to read
MOST_ROWS = 30  # a longer table by kind, or by interval, is for report.md
MOST_PROMPTS = 12  # of those answered in several ways; the others too
GAP = 2  # columns between two cells
DETAIL = 400  # characters of a caution; servers' error texts may be pages
RESULT_STYLES = {"pass": "green", "fail": "bold red", "?": "yellow", "undecided": "yellow"}
RESULT_STYLES |= {"improved": "green", "regressed": "bold red", "inconclusive": "yellow"}


def print_report(summary: Summary, run_dir: Path, stream: TextIO | None = None, *, quiet: bool = False) -> None:
    """The whole report, or when ``quiet`` its last two lines: where the results are, and how to repeat the run."""
    console = console_on(stream or sys.stdout)
    if not quiet:
        _report(console, summary)
        console.print()
    whole_line(console, "Results", str(run_dir))
    whole_line(console, "Repeat", summary.command)


def _report(console: Console, summary: Summary) -> None:
    console.print(Text.assemble((plain(summary.name), "bold"), f" · {plain(content.run_line(summary))}"))
    for line in (content.endpoint_line(summary), *map(content.model_line, summary.models)):
        prose(console, Text(plain(line), "dim"))
    console.print()
    if ranking := decision.verdict(summary.decision):  # what was asked for
        prose(console, Text(plain(ranking, limit=10_000)))
        console.print()
    prose(console, Text(plain(summary.verdict.text, limit=10_000)))
    for table in decision.tables(summary.decision, console.width):
        _table(console, table)
    for note in decision.notes(summary.decision):
        prose(console, Text(plain(note), "dim"))
    for drawn in bars.bars(summary, console.width, console.encoding):
        _bars(console, drawn)
    kinds = (table for table in content.kind_tables(summary) if len(table.rows) <= MOST_ROWS)
    fleets = (table for table in content.endpoint_tables(summary) if len(table.rows) <= MOST_ROWS)
    told = [*content.level_tables(summary), *fleets, *findings.interval_tables(summary, MOST_ROWS), *kinds]
    tables = [_fitted(table, console.width) for table in told]
    for table in tables:
        _table(console, table)
    console.print()
    for note in content.footnotes(tables):
        prose(console, Text(note, "dim"))
    of_memory = memory.tables(summary)
    memories = [_fitted(table, console.width) for table in of_memory]
    if tables != told or memories != of_memory:
        prose(console, Text("More columns: in a wider terminal, in report.md and in summary.csv", "dim"))
    for finding in findings.findings(summary):
        _finding(console, finding)
    for finding in determinism.findings(summary, MOST_PROMPTS):
        _finding(console, finding)
    for table in memories:
        _table(console, table)
    for finding in memory.findings(summary):
        _finding(console, finding)
    _quality(console, summary)
    _facts(console, summary)
    failures, cautions = content.doubts(summary)
    counts = content.failure_counts(summary)
    _doubts(console, "Failures", [(f"{counts[sort[0].about]:,} {sort[0].about}", sort) for sort in failures], "red")
    _doubts(console, "Cautions", [(sort[0].about.replace("_", " "), sort) for sort in cautions], "yellow")


@verbatim()
def print_quality(summary: Summary, stream: TextIO | None = None) -> None:
    """What the report says of the quality of answers, alone."""
    _quality(console_on(stream or sys.stdout), summary)


def _quality(console: Console, summary: Summary) -> None:
    for table in quality.tables(summary):
        _table(console, _fitted(table, console.width))
    for finding in quality.findings(summary):
        _finding(console, finding)


def console_on(stream: TextIO) -> Console:
    """A console that shows texts as they are, and shows what its stream cannot spell as a question mark."""
    # A Windows pipe may be in a code page without · or ≤: a question mark is better than no report.
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return Console(file=stream, highlight=False, markup=False, emoji=False)


def prose(console: Console, text: Text) -> None:
    """A paragraph, in lines that can be read."""
    console.print(text, width=min(TEXT_WIDTH, console.width))


def whole_line(console: Console, label: str, text: str) -> None:
    """Never broken: it is there to be copied."""
    console.print(Text.assemble((f"{label:<8} ", "bold"), plain(text, limit=10_000)), soft_wrap=True)


def _facts(console: Console, summary: Summary) -> None:
    facts = [
        *content.slo_lines(summary),
        *(("asserted", f"{asserted}: {told}") for asserted, told in gates.lines(summary)),
        *(("not run", line) for line in findings.not_run(summary)),
        *(("answers", line) for line in determinism.lines(summary)),
        ("memory", memory.fact(summary)),
        ("client", content.client(summary)),
        ("cluster", content.cluster(summary)),
    ]
    told = [(Text(name, "bold"), Text(plain(fact))) for name, fact in facts if fact]
    if told:
        console.print()
        _pairs(console, told)


def _pairs(console: Console, pairs: Sequence[tuple[Text, Text]]) -> None:
    """A short word on the left of each paragraph, which wraps beside it."""
    grid = RichTable.grid(padding=(0, GAP, 0, 0))
    grid.add_column(no_wrap=True)
    for pair in pairs:
        grid.add_row(*pair)
    console.print(grid, width=min(TEXT_WIDTH, console.width))


def _doubts(console: Console, title: str, sorts: Sequence[tuple[str, Sequence[Caution]]], style: str) -> None:
    if not sorts:
        return
    console.print()
    console.print(Text(title, "bold"))
    pairs = []
    for name, cautions in sorts:
        first, others = cautions[0], [plain(caution.place) for caution in cautions[1:]]
        where = "" if first.place == "run" else f" at {plain(first.place)}"
        text = Text.assemble((name, style), f"{where}: {plain(first.reason, DETAIL)}")
        text.append(f" → {plain(first.advice)}" if first.advice else "")
        if others:
            text.append(f" (also {', '.join(others)})" if len(others) < 5 else f" (and {len(others)} more)", "dim")
        pairs.append((Text("!", style), text))
    _pairs(console, pairs)


def _table(console: Console, table: Table) -> None:
    console.print()
    console.print(Text.assemble((plain(table.model), "bold"), f" · {table.title}"))
    # The box has a blank between two columns; with one of padding on its left that is the gap.
    grid = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, GAP - 1))
    for column in table.columns:
        justify: Literal["left", "right"] = "right" if column.rank and not column.left else "left"
        grid.add_column(Text("\n".join(column.heading)), justify=justify, vertical="bottom", no_wrap=True)
    for row in table.rows:
        grid.add_row(*(Text(plain(cell), RESULT_STYLES.get(cell, "")) for cell in row))
    console.print(grid)
    if table.note:
        prose(console, Text(plain(table.note), "dim"))


def _bars(console: Console, drawn: bars.Bars) -> None:
    console.print()
    console.print(Text.assemble((plain(drawn.model), "bold"), f" · {drawn.loop} loop in bars"))
    console.print(Text(drawn.lines[0], "dim"))
    for line in drawn.lines[1:]:
        console.print(Text(line))
    if drawn.note:
        console.print(Text(drawn.note, "dim"))


def fit_and_show(console: Console, table: Table) -> None:
    """A table in as many of its columns as the terminal has room for."""
    _table(console, _fitted(table, console.width))


def _finding(console: Console, finding: Finding) -> None:
    """Short words on the left, the reason wraps on the right."""
    console.print()
    console.print(Text.assemble((plain(finding.model), "bold"), f" · {finding.title}"))
    rows = [[plain(cell.text if isinstance(cell, Stands) else cell) for cell in row] for row in finding.rows]
    # A reason that no row has needs no column.
    kept = [i for i in range(len(finding.headings)) if any(row[i] for row in rows)]
    grid = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, GAP - 1))
    width = min(TEXT_WIDTH, console.width)
    short = [max(cell_len(row[index]) for row in [finding.headings, *rows]) + GAP for index in kept[:-1]]
    whole = sum(short) <= 0.7 * width  # then only the last column, mostly the reason, wraps
    for index in kept:
        grid.add_column(finding.headings[index], overflow="fold", no_wrap=whole and index != kept[-1])
    for row in rows:
        grid.add_row(*(Text(row[index], RESULT_STYLES.get(row[index], "")) for index in kept))
    console.print(grid, width=width)
    for note in finding.notes:
        prose(console, Text(plain(note)))


def _fitted(table: Table, room: int) -> Table:
    """The table in as many columns as fit, without those of the highest ranks: no number is ever wrapped or cut."""
    columns = list(table.columns)
    while sum(map(_width, columns)) + GAP * (len(columns) - 1) > room:
        last = max(columns, key=lambda column: column.rank)
        if last.rank == 0:
            break
        columns.remove(last)
    return replace(table, columns=tuple(columns))


def _width(column: Cells) -> int:
    return max(cell_len(text) for text in (*column.heading, *map(plain, column.cells)))
