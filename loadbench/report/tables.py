"""Writes summary.csv: one row a level, every column of COLUMNS that has a place in it, RFC 4180.

Numbers are given in full, without separators; what is absent is an empty field; what came from a server or a file is
kept from becoming a formula in a spreadsheet.
"""

from __future__ import annotations

import csv
import io

from loadbench.analysis.summary import Level, Summary
from loadbench.report.columns import COLUMNS, Column
from loadbench.report.escape import cell


def csv_text(summary: Summary) -> str:
    """The file's text, lines ended by CRLF as RFC 4180 has them."""
    columns = [column for column in COLUMNS if column.in_csv]
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow([*(column.name for column in columns), "indicative"])
    for level in summary.levels:
        writer.writerow([*(_field(column, level) for column in columns), _indicative(columns, level)])
    return out.getvalue()


def _field(column: Column, level: Level) -> str:
    value = column.get(level)
    if isinstance(value, str):
        return cell(value)
    return "" if value is None else repr(value)


def _indicative(columns: list[Column], level: Level) -> str:
    """The names of the columns whose value in this row stands on too few samples to be firm."""
    return " ".join(column.name for column in columns if column.indicative(level))
