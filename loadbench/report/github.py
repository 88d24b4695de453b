"""Tells a run to GitHub Actions: a short summary of the step, and annotations; does nothing anywhere else.

A line of output that begins with ``::`` is a command to the runner, and so is ``##[`` anywhere: what a report prints is
put out of its reach, and what goes into an annotation is escaped as its documentation asks.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click

from loadbench.analysis.summary import Summary
from loadbench.analysis.verdict import why
from loadbench.report import content
from loadbench.report.content import Table
from loadbench.report.escape import as_line, markdown, plain
from loadbench.report.escape import code as in_code
from loadbench.report.gates import Kept, promises
from loadbench.report.markdown import table_of

SUMMARY_FILE = "GITHUB_STEP_SUMMARY"
MOST_BYTES = 900_000  # GitHub drops a step's summary whole above 1 MiB, and other commands of the step may have some
MOST_ANNOTATIONS = 10  # of a kind and step; GitHub shows no more
MOST_ROWS = 60
MOST_COLUMNS = 9
MARKS: dict[Kept, str] = {"fail": "❌", "invalid": "⚠️", "skipped": "➖", "pass": "✅"}  # worst first
ENDS = {0: "✅ passed", 99: "❌ failed", 130: "⚠️ interrupted"}


def on_github(environment: Mapping[str, str] = os.environ) -> bool:
    return environment.get("GITHUB_ACTIONS") == "true"


@contextlib.contextmanager
def verbatim() -> Iterator[None]:
    """What is printed on stdout meanwhile is text for people: the runner is told to obey none of it."""
    if not on_github():
        yield
        return
    token = secrets.token_hex(16)  # which nobody can have put into a model's name
    click.echo(f"::stop-commands::{token}")
    try:
        yield
    finally:
        click.echo(f"::{token}::")


def tell(summary: Summary, exit_code: int, *, err: bool) -> None:
    """Append the summary where GitHub wants one, and annotate. What cannot be written is told, and fails nothing.

    ``err``: annotate on stderr, as stdout is JSON. Else on the stream that was ``verbatim``, for the runner may read
    the other one before it heeds commands again.
    """
    path = os.environ.get(SUMMARY_FILE)
    if not path:
        return
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(step_summary(summary, exit_code))
    except OSError as error:
        click.echo(as_line(f"loadbench: {SUMMARY_FILE} {path}: cannot be written: {error.strerror or error}"), err=True)
    if on_github():
        for line in commands(summary, exit_code):
            click.echo(line, err=err)


def step_summary(summary: Summary, exit_code: int) -> str:
    """Markdown: how it ended, the verdict, the levels, every clause, the cautions, how to repeat it."""
    end = ENDS.get(exit_code, "⚠️ invalid" if exit_code == 94 else f"❌ exit code {exit_code}")
    reason = [] if exit_code in (0, 130) else [f"**{markdown(why(summary, exit_code))}**"]
    blocks = [
        f"## loadbench: {markdown(summary.name)} · {end}",
        *reason,
        markdown(summary.verdict.text, limit=10_000),
        *_levels(summary),
        *_clauses(summary),
        *_cautions(summary),
        f"Repeat: {in_code(summary.command)}",
    ]
    while len(("\n\n".join(blocks)).encode()) > MOST_BYTES:
        del blocks[-2]
    return "\n\n".join(blocks) + "\n\n"


def _levels(summary: Summary) -> Iterator[str]:
    tables = [_main_columns(table) for table in content.level_tables(summary)]
    for table in tables:
        yield f"{in_code(table.model)}, {markdown(table.title)}"
        yield _table([" ".join(column.heading) for column in table.columns], table.rows)
    yield from (markdown(note) for note in content.footnotes(tables))


def _main_columns(table: Table) -> Table:
    """As many as are read without scrolling, those first that a narrow terminal would keep."""
    kept = sorted(table.columns, key=lambda column: column.rank)[:MOST_COLUMNS]
    return replace(table, columns=tuple(column for column in table.columns if column in kept))


def _clauses(summary: Summary) -> Iterator[str]:
    """Worst first, so that what is cut is what held."""
    found = sorted(promises(summary), key=lambda promise: [*MARKS].index(promise.kept))
    if found:
        rows = [(MARKS[one.kept], one.name, one.where, one.told) for one in found]
        yield _table(("", "promise", "at", "how it went"), rows)


def _cautions(summary: Summary) -> Iterator[str]:
    sorts = [cautions for kind in content.doubts(summary) for cautions in kind]
    if sorts:
        rows = []
        for cautions in sorts:
            first, others = cautions[0], len(cautions) - 1
            at = first.place + (f" and {others} more" if others else "")
            rows.append((first.about.replace("_", " "), at, first.reason, first.advice))
        yield _table(("caution", "at", "why", "advice"), rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    more = f"\n\n… and {len(rows) - MOST_ROWS} more" if rows[MOST_ROWS:] else ""
    return table_of(headings, rows[:MOST_ROWS]) + more


def commands(summary: Summary, exit_code: int) -> list[str]:
    """Commands to the runner: an error for what broke its promise or could not be told, a warning for each caution."""
    errors = [(f"{one.title}", one.told) for one in promises(summary) if one.kept in ("fail", "invalid")]
    if exit_code not in (0, 99, 130) and not errors:
        errors = [("the run", why(summary, exit_code))]
    warnings = [
        (
            f"{cautions[0].about.replace('_', ' ')} at {cautions[0].place}",
            f"{cautions[0].reason} → {cautions[0].advice}",
        )
        for kind in content.doubts(summary)
        for cautions in kind
    ]
    return [*_commands("error", errors), *_commands("warning", warnings)]


def _commands(kind: str, found: Sequence[tuple[str, str]]) -> Iterator[str]:
    told = list(found)
    if told[MOST_ANNOTATIONS:]:
        told = [
            *told[: MOST_ANNOTATIONS - 1],
            ("more", f"{len(told) - MOST_ANNOTATIONS + 1} more like these: see report.md"),
        ]
    for title, text in told:
        yield f"::{kind} title={_property(f'loadbench: {title}')}::{_data(text)}"


def _data(text: str) -> str:
    """As actions/toolkit escapes the text of a command; ``plain`` has left no line end, and the rule is kept whole."""
    return plain(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
