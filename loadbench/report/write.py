"""Turns a run directory into summary.json, summary.csv and report.md; `run` ends here, `report` begins here."""

from __future__ import annotations

from pathlib import Path

import orjson

from loadbench.analysis import rundir
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Summary
from loadbench.files import write_whole
from loadbench.report.hgrm import write_hgrm
from loadbench.report.markdown import markdown_text
from loadbench.report.tables import csv_text


def write_report(run_dir: Path, *, hgrm: bool = False) -> Summary:
    """Read the directory, write its three reports, each whole; UsageError where it is no run or cannot be written.

    ``hgrm`` asks for the percentile distributions too.
    """
    run = rundir.read(run_dir)
    summary = summarise(run)
    texts = {
        "summary.json": summary_json(summary),
        "summary.csv": csv_text(summary).encode(),
        "report.md": markdown_text(summary, run.facts["scenario"]).encode(),
    }
    for name, data in texts.items():
        write_whole(run_dir / name, data)
    if hgrm:
        write_hgrm(run)
    return summary


def summary_json(summary: Summary) -> bytes:
    """summary.json as it is on disk, and as ``--json`` prints it; keys in the order of the dataclasses' fields."""
    return orjson.dumps(summary, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
