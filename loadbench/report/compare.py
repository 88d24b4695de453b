"""Shows a comparison of two sets of runs: on the console, as compare.json and as compare.md.

Texts from servers and files pass ``plain`` or ``markdown``, as in every report.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import orjson
from rich.text import Text

from loadbench.analysis.compare_words import difference
from loadbench.analysis.compared import Compared, Comparison, Row, Said, Side
from loadbench.report import console as shown
from loadbench.report import markdown as written
from loadbench.report.content import CLOSED, OPEN, Cells, Table
from loadbench.report.escape import json_text, markdown, plain
from loadbench.report.github import verbatim
from loadbench.report.words import NONE, figure, milliseconds, octets, share

LOOPS = {"closed": CLOSED, "open": OPEN, "search": "search"}
MOST_PROMPTS = 12
BEYOND = "∞"
UNITS: dict[str, Callable[[float | None], str]] = {"ms": milliseconds, "bytes": octets, "share": share}
MEANING = (
    "Base and new are the medians over runs; change is the Hodges–Lehmann estimate of new ÷ base (of a share: of the"
    " difference, in points) with the 95 % interval of the exact Mann–Whitney test."
)


def comparison_json(comparison: Comparison) -> bytes:
    """compare.json as it is on disk, and as ``--json`` prints it."""
    return json_text(orjson.dumps(comparison, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


@verbatim()
def print_comparison(
    comparison: Comparison, folder: Path, stream: TextIO | None = None, *, quiet: bool = False
) -> None:
    """The whole comparison, or when ``quiet`` what came of it and where it is."""
    console = shown.console_on(stream or sys.stdout)
    style = shown.RESULT_STYLES.get(comparison.answer, "")
    head, _, rest = plain(comparison.text, limit=10_000).partition(":")
    shown.prose(console, Text.assemble((plain(comparison.name), "bold"), " · ", (head, style), f":{rest}"))
    if not quiet:
        for table in tables(comparison):
            shown.fit_and_show(console, table)
        if comparison.levels:
            console.print()
            for note in notes(comparison):
                shown.prose(console, Text(note, "dim"))
        prompts = [said for said in comparison.answers if said.result != "same"]
        if prompts:
            console.print()
            for line in _prompts(prompts[:MOST_PROMPTS]):
                shown.prose(console, Text(plain(line)))
            if prompts[MOST_PROMPTS:]:
                shown.prose(console, Text(f"and {len(prompts) - MOST_PROMPTS} more in compare.json", "dim"))
    console.print()
    shown.whole_line(console, "Compared", str(folder))


def tables(comparison: Comparison, *, everything: bool = False) -> Iterator[Table]:
    """A table a level, of the figures that are judged; ``everything``: of all."""
    for level in comparison.levels:
        rows = [row for row in level.rows if row.gates or everything]
        title = f"{level.load}, {LOOPS[level.loop]}"
        if rows:
            yield Table(_models(level), title, tuple(_columns(rows)), _note(level, rows))


def _models(level: Compared) -> str:
    return level.model if level.new_model == level.model else f"{level.model} → {level.new_model}"


def _columns(rows: list[Row]) -> Iterator[Cells]:
    def column(heading: str, rank: int, tell: Callable[[Row], str], left: bool = False) -> Cells:
        return Cells((heading,), rank, tuple(map(tell, rows)), left=left)

    yield column("figure", 0, lambda row: row.title)
    yield column("base", 1, lambda row: value(row, row.base))
    yield column("new", 1, lambda row: value(row, row.new))
    yield column("change", 1, change)
    yield column("95 % interval", 1, interval)
    yield column("answer", 1, lambda row: row.answer or "–", left=True)
    yield column("runs", 3, lambda row: f"{row.base.runs}, {row.new.runs}")
    yield column("base from … to", 4, lambda row: _range(row, row.base))
    yield column("new from … to", 4, lambda row: _range(row, row.new))


def _told(row: Row) -> Callable[[float | None], str]:
    tell = UNITS.get(row.unit, figure)
    return lambda value: BEYOND if value is not None and math.isinf(value) else tell(value)


def value(row: Row, side: Side) -> str:
    """A set's median, ~ where runs stand on few samples."""
    return ("~" if side.indicative else "") + _told(row)(side.median)


def _range(row: Row, side: Side) -> str:
    known = [value for value in side.values if value is not None]
    return f"{_told(row)(min(known))} … {_told(row)(max(known))}" if known else NONE


def _step(row: Row, value: float) -> str:
    """``1.20`` times, or ``+2.0`` points."""
    if math.isinf(value):
        return BEYOND
    return f"{value:.3f}" if row.kind == "ratio" else f"{100 * value:+.1f}".replace("-", "−")


def change(row: Row) -> str:
    """``×1.200``, ``+2.0 pt``."""
    if row.change is None:
        return NONE
    return f"×{_step(row, row.change)}" if row.kind == "ratio" else f"{_step(row, row.change)} pt"


def interval(row: Row) -> str:
    """``1.150 to 1.280``."""
    if row.low is None or row.high is None:
        return NONE
    return f"{_step(row, row.low)} to {_step(row, row.high)}"


def _note(level: Compared, rows: list[Row]) -> str | None:
    """What is left out, doubts, and what inconclusive figures would take."""
    told = [f"left out: {line}" for line in level.left_out] + (
        [f"bear in mind: {', '.join(level.doubts)}"] if level.doubts else []
    )
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.because is not None:
            reasons.setdefault(row.because, []).append(row.title)
    told += [f"{', '.join(titles)}: {why}" for why, titles in reasons.items()]
    return "; ".join(told) or None


def notes(comparison: Comparison) -> Iterator[str]:
    """What the columns mean."""
    yield MEANING
    yield (
        f"Regressed: five runs a side or more, the whole interval beyond {100 * comparison.least_effect:g} % (of a"
        f" share: 1 point), and so clear among all judged figures that runs which do not differ come to it in"
        f" {100 * comparison.alarm:g} % of comparisons at most. Equivalent: the whole interval within."
    )
    if any(side.indicative for level in comparison.levels for row in level.rows for side in (row.base, row.new)):
        yield "~ in some runs on fewer samples than a firm value takes: how far that scatters is in the interval"
    if any(side.beyond for level in comparison.levels for row in level.rows for side in (row.base, row.new)):
        yield f"{BEYOND} over capacity: a latency there only says how long the level was, and is worse than any other"


def _prompts(prompts: list[Said]) -> Iterator[str]:
    for said in prompts:
        told = f"{', '.join(said.base)} in the base, {', '.join(said.new)} now"
        yield f"{said.model}: prompt {said.place} of {said.kind} {said.result}: {told}"


def markdown_text(comparison: Comparison) -> str:
    """The text of compare.md."""
    blocks = [f"# loadbench compare: {markdown(comparison.name)}", markdown(comparison.text, limit=10_000)]
    if comparison.differences:
        blocks.append("## What differs besides")
        blocks.append("\n".join(f"- {markdown(difference(one))}" for one in comparison.differences))
    if comparison.levels:
        blocks.append("## Levels")
    blocks += written.tables_of(tables(comparison, everything=True))
    if comparison.levels:
        blocks.append("\n".join(f"- {markdown(note)}" for note in notes(comparison)))
    if comparison.not_compared:
        blocks += ["## Not compared", "\n".join(f"- {markdown(line)}" for line in comparison.not_compared)]
    if comparison.answers:
        blocks.append("## The same answers")
        headings = ("model", "kind", "prompt", "answered", "base", "new")
        rows = [
            (s.model, s.kind, str(s.place), s.result, ", ".join(s.base), ", ".join(s.new)) for s in comparison.answers
        ]
        blocks.append(written.table_of(headings, rows))
    blocks.append("## The runs")
    runs = [(side, run) for side, runs in (("base", comparison.base), ("new", comparison.new)) for run in runs]
    rows_of_runs = [(side, run.path, run.started, run.status, run.scenario[:12]) for side, run in runs]
    blocks.append(written.table_of(("set", "directory", "started", "status", "scenario (SHA-256)"), rows_of_runs))
    return "\n\n".join(blocks) + "\n"
