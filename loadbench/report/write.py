"""Turns a run directory into its reports: JSON, CSV, Markdown and JUnit XML; `run` ends here, `report` begins here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import click
import orjson

from loadbench.analysis import rundir
from loadbench.analysis.gates import Asked, of_report
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Summary
from loadbench.errors import UsageError
from loadbench.files import write_whole
from loadbench.report.decision import decision_csv_text
from loadbench.report.escape import as_line, json_text
from loadbench.report.figures import figures, write_figures
from loadbench.report.hgrm import write_hgrm
from loadbench.report.html import html_text
from loadbench.report.junit import junit_xml
from loadbench.report.markdown import markdown_text
from loadbench.report.otlp import send
from loadbench.report.prometheus import prometheus_text
from loadbench.report.stable import stable_files
from loadbench.report.tables import csv_text, endpoints_csv_text, intervals_csv_text
from loadbench.report.workshop import workshop_files


def _warn(line: str) -> None:
    click.echo(as_line(f"loadbench: {line}"), err=True)


def write_report(
    run_dir: Path,
    *,
    hgrm: bool = False,
    pictures: bool = False,
    weights: Mapping[str, float] | None = None,
    stable: bool = False,
    form: str | None = None,
    exports: Collection[str] = (),
    gates: Asked | None = None,
    warn: Callable[[str], None] = _warn,
    note: Callable[[str], None] = _warn,
) -> Summary:
    """Read the directory and write its reports, each whole; UsageError where it is no run.

    ``hgrm`` asks for the percentile distributions too, ``pictures`` for SVG files (UsageError where none can be made),
    ``weights`` for a ranking of the models, ``stable`` for files to be kept under version control; ``form`` names a
    format of others: workshop; ``exports`` names where metrics go: prometheus (a file) and otlp (sent; UsageError where
    that fails). ``gates`` are asserted instead of those that the run was started with, if they assert anything.
    ``warn`` gets a line for what cannot be written, as in a directory that may only be read: the summary is there to be
    shown all the same; ``note`` gets one for the pictures that were made.
    """
    run = rundir.read(run_dir)
    summary = summarise(run, weights, of_report(gates, run_dir))
    drawn = list(figures(summary, run))
    texts = {
        "summary.json": summary_json(summary),
        "summary.csv": csv_text(summary).encode(),
        "report.md": markdown_text(summary, run.facts["scenario"]).encode(),
        "report.html": html_text(summary, run, drawn).encode(),
        "junit.xml": junit_xml(summary),
    }
    if (intervals := intervals_csv_text(summary)) is not None:
        texts["intervals.csv"] = intervals.encode()
    if (endpoints := endpoints_csv_text(summary)) is not None:
        texts["endpoints.csv"] = endpoints.encode()
    if summary.decision is not None:
        texts["decision.csv"] = decision_csv_text(summary.decision).encode()
    texts |= stable_files(summary, run.facts) if stable else {}
    texts |= workshop_files(summary, run) if form == "workshop" else {}
    texts |= {"metrics.prom": prometheus_text(summary).encode()} if "prometheus" in exports else {}
    unwritten = []
    writers = [partial(write_whole, run_dir / name, data) for name, data in texts.items()]
    for write in [*writers, *([partial(write_hgrm, run, summary.levels)] if hgrm else [])]:
        try:
            write()
        except UsageError as error:
            unwritten.append(str(error))
    if unwritten:
        warn(unwritten[0] + (f" (and {len(unwritten) - 1} more like it)" if unwritten[1:] else ""))
    if pictures:
        note(write_figures(run_dir / "figures", drawn))
    if "otlp" in exports:
        send(summary)
    return summary


def summary_json(summary: Summary) -> bytes:
    """summary.json as it is on disk, and as ``--json`` prints it; keys in the order of the dataclasses' fields."""
    return json_text(orjson.dumps(summary, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
