"""Writes summary.csv, one row a level, every column of COLUMNS that has a place in it, and intervals.csv; RFC 4180.

Numbers are given in full, without separators; what is absent is an empty field; what came from a server or a file is
kept from becoming a formula in a spreadsheet.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from loadbench.analysis.metrics import LATENCIES, RATES
from loadbench.analysis.stats import Distribution
from loadbench.analysis.summary import Interval, Level, Summary
from loadbench.records import load_title
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


_INTERVAL_METRICS, _INTERVAL_STATISTICS = ("ttft", "e2e", "tpot"), ("p50", "p90", "p95", "p99", "max")


def intervals_csv_text(summary: Summary) -> str | None:
    """One row an interval of every level that has such results; None where there are none."""
    rows = [[*_interval(level, part)] for level in summary.levels for part in level.intervals]
    if not rows:
        return None
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow([name for name, _ in rows[0]])
    writer.writerows([_written(value) for _, value in row] for row in rows)
    return out.getvalue()


def _interval(level: Level, part: Interval) -> Iterator[tuple[str, str | int | float | None]]:
    """Its fields by name; latencies are of the level's headline series."""
    yield from (("level", level.index), ("model", level.model), ("level_load", load_title(level.load)))
    yield from (("start_s", part.start_s), ("length_s", part.length_s), ("load", part.load))
    yield from (("attempted", part.requests.attempted), ("ok", part.requests.ok))
    yield "failed", sum(part.requests.failed.values())
    yield "failures", " ".join(f"{outcome}={number}" for outcome, number in part.requests.failed.items())
    yield from ((rate, part.throughput.get(rate)) for rate in RATES)
    yield "in_flight", part.concurrency_reached
    indicative = []
    for metric in _INTERVAL_METRICS:
        told, unit = part.latency_ms.get(metric) or Distribution(0), LATENCIES[metric].unit
        yield f"{metric}_n", told.n
        yield from ((f"{metric}_{statistic}_{unit}", told.value(statistic)) for statistic in _INTERVAL_STATISTICS)
        indicative += [f"{metric}_{name}_{unit}" for name in told.indicative if name in _INTERVAL_STATISTICS]
    yield "indicative", " ".join(indicative)


def _field(column: Column, level: Level) -> str:
    return _written(column.get(level))


def _written(value: str | int | float | None) -> str:
    if isinstance(value, str):
        return cell(value)
    return "" if value is None else repr(value)


def _indicative(columns: list[Column], level: Level) -> str:
    """The names of the columns whose value in this row stands on too few samples to be firm."""
    return " ".join(column.name for column in columns if column.indicative(level))
