"""Turns a run directory into its reports: JSON, CSV and Markdown; `run` ends here, `report` begins here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import orjson

from loadbench.analysis import rundir
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Summary
from loadbench.errors import UsageError
from loadbench.files import write_whole
from loadbench.report.hgrm import write_hgrm
from loadbench.report.markdown import markdown_text
from loadbench.report.tables import csv_text, intervals_csv_text


def _warn(line: str) -> None:
    click.echo(f"loadbench: {line}", err=True)


def write_report(run_dir: Path, *, hgrm: bool = False, warn: Callable[[str], None] = _warn) -> Summary:
    """Read the directory and write its reports, each whole; UsageError where it is no run.

    ``hgrm`` asks for the percentile distributions too. ``warn`` gets a line for what cannot be written, as in a
    directory that may only be read: the summary is there to be shown all the same.
    """
    run = rundir.read(run_dir)
    summary = summarise(run)
    texts = {
        "summary.json": summary_json(summary),
        "summary.csv": csv_text(summary).encode(),
        "report.md": markdown_text(summary, run.facts["scenario"]).encode(),
    }
    if (intervals := intervals_csv_text(summary)) is not None:
        texts["intervals.csv"] = intervals.encode()
    unwritten = []
    writers = [partial(write_whole, run_dir / name, data) for name, data in texts.items()]
    for write in [*writers, *([partial(write_hgrm, run)] if hgrm else [])]:
        try:
            write()
        except UsageError as error:
            unwritten.append(str(error))
    if unwritten:
        warn(unwritten[0] + (f" (and {len(unwritten) - 1} more like it)" if unwritten[1:] else ""))
    return summary


def summary_json(summary: Summary) -> bytes:
    """summary.json as it is on disk, and as ``--json`` prints it; keys in the order of the dataclasses' fields."""
    return orjson.dumps(summary, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
