"""Writes summary.csv, one row a level, every column of COLUMNS that has a place in it, intervals.csv and endpoints.csv.

Numbers are given in full, without separators; what is absent is an empty field; what came from a server or a file is
kept from becoming a formula in a spreadsheet.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from loadbench.analysis.metrics import LATENCIES, RATES
from loadbench.analysis.stats import Distribution
from loadbench.analysis.summary import AtEndpoint, Interval, Level, Summary
from loadbench.records import load_title
from loadbench.report.columns import COLUMNS, Column, Value
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
    return _rows_text([[*_interval(level, part)] for level in summary.levels for part in level.intervals])


def endpoints_csv_text(summary: Summary) -> str | None:
    """One row an endpoint of every level that went to a fleet; None where none did."""
    return _rows_text([[*_endpoint(level, here)] for level in summary.levels for here in level.endpoints])


def _rows_text(rows: list[list[tuple[str, Value]]]) -> str | None:
    if not rows:
        return None
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow([name for name, _ in rows[0]])
    writer.writerows([_written(value) for _, value in row] for row in rows)
    return out.getvalue()


def _endpoint(level: Level, here: AtEndpoint) -> Iterator[tuple[str, Value]]:
    """Its fields by name; latencies are of the level's headline series."""
    yield from (("level", level.index), ("model", level.model), ("level_load", load_title(level.load)))
    yield from (("endpoint", here.url), ("state", here.state), ("died_after_s", here.died_after_s))
    yield from ((f"rss_{name}_bytes", size) for name, size in asdict(here.rss_bytes).items())
    yield from _results(here, {metric: told.get(level.headline) for metric, told in here.latency_ms.items()})


def _interval(level: Level, part: Interval) -> Iterator[tuple[str, Value]]:
    """Its fields by name; latencies are of the level's headline series."""
    yield from (("level", level.index), ("model", level.model), ("level_load", load_title(level.load)))
    yield from (("start_s", part.start_s), ("length_s", part.length_s), ("load", part.load))
    yield from _results(part, part.latency_ms, ("in_flight", part.concurrency_reached))


def _results(
    part: Interval | AtEndpoint, latency_ms: Mapping[str, Distribution | None], *more: tuple[str, Value]
) -> Iterator[tuple[str, Value]]:
    yield from (("attempted", part.requests.attempted), ("ok", part.requests.ok))
    yield "failed", sum(part.requests.failed.values())
    yield "failures", " ".join(f"{outcome}={number}" for outcome, number in part.requests.failed.items())
    yield from ((rate, part.throughput.get(rate)) for rate in RATES)
    yield from more
    indicative = []
    for metric in _INTERVAL_METRICS:
        told, unit = latency_ms.get(metric) or Distribution(0), LATENCIES[metric].unit
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
