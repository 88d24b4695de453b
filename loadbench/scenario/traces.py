"""Trace files: when recorded requests came and how long they were, from JSONL or CSV. Replaying is ``arrivals``' job.

A row needs a timestamp: a number, or a date and time (UTC unless it says otherwise; counted in whole microseconds).
The first request is due at once and the others as long after it as they were, so traces may count from anywhere.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from loadbench.errors import UsageError
from loadbench.records import Trace

# Column names: ours, then those of the public traces of Azure (2023 to 2025), Mooncake and BurstGPT.
_TIMES = ("timestamp", "timestamp_s", "timestamp_ms", "TIMESTAMP", "Timestamp")
_INPUTS = ("input_tokens", "input_length", "ContextTokens", "Request tokens")
_OUTPUTS = ("output_tokens", "output_length", "GeneratedTokens", "Response tokens")
_STATED = {"timestamp_s": "s", "timestamp_ms": "ms"}
_MOONCAKES = {"input_length", "output_length"}  # whose plain timestamps are milliseconds

_UNITS_NS = {"s": 1_000_000_000, "ms": 1_000_000}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_SURELY_MS = 1e11  # as milliseconds since 1970 it is the year 1973, as seconds 5138
_MOST = 1e15  # more is microseconds or nanoseconds since 1970, or no time at all

Fields = Mapping[str, Any]


class Row(NamedTuple):
    """One recorded request. ``due_ns`` counts from the first; a length that is not recorded is None."""

    due_ns: int
    input_tokens: int | None
    output_tokens: int | None


@dataclass(frozen=True, slots=True)
class TraceFile:
    """A trace file: the SHA-256 of its bytes, and its rows, once, parsed as they are asked for."""

    sha256: str
    rows: Iterator[Row]


def read_trace(path: Path, timestamps: str | None, speed: float) -> TraceFile:
    """Read a trace; ``timestamps`` is the unit of plain numbers (s, ms), None: what the columns say, else seconds.

    Raises UsageError where the file cannot be read, and while rows are asked for where one of them is wrong.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: expected a trace file: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: expected JSONL or CSV in UTF-8, got other bytes") from None
    lines = io.StringIO(text, newline=None)
    entries = _json_lines(path, lines) if text.lstrip()[:1] in ("{", "[") else _csv_rows(path, lines)
    return TraceFile(hashlib.sha256(content).hexdigest(), _rows(path, entries, timestamps, speed))


def replay(trace: Trace) -> Iterator[Row]:
    """The rows of a trace whose scenario was read before. The file is read now, so that nothing waits for it later."""
    found = read_trace(Path(trace.file), trace.timestamps, trace.speed)
    if found.sha256 != trace.sha256:
        raise UsageError(f"{trace.file}: expected the trace as it was when the scenario was read, got another")
    return found.rows


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Fields]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise UsageError(f"{place}: expected a JSON object: {error.msg}") from None
        if not isinstance(fields, dict):
            raise UsageError(f"{place}: expected a JSON object, got a {type(fields).__name__}")
        yield place, fields


def _csv_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Fields]]:
    reader = csv.DictReader(lines, skipinitialspace=True)
    try:
        if reader.fieldnames is not None:
            _timestamp_in(reader.fieldnames, f"{path}:{reader.line_num}")
        for fields in reader:
            yield f"{path}:{reader.line_num}", fields
    except csv.Error as error:
        raise UsageError(f"{path}:{reader.line_num}: expected valid CSV: {error}") from None


def _rows(path: Path, entries: Iterator[tuple[str, Fields]], timestamps: str | None, speed: float) -> Iterator[Row]:
    first_ns = unit_ns = None
    due_ns = 0
    for place, fields in entries:
        name = _timestamp_in(fields, place)
        moment = _moment(fields[name], f"{place}: {name}")
        if unit_ns is None:
            unit_ns = _UNITS_NS[timestamps or _unit(fields, moment)]
        moment_ns = (moment - _EPOCH) // _MICROSECOND * 1000 if isinstance(moment, datetime) else moment * unit_ns
        if first_ns is None:
            first_ns = moment_ns
        before_ns, due_ns = due_ns, round((moment_ns - first_ns) / speed)
        if due_ns < before_ns:
            raise UsageError(f"{place}: {name}: expected the requests in order of time, got an earlier one")
        yield Row(due_ns, _tokens(fields, _INPUTS, place), _tokens(fields, _OUTPUTS, place))
    if first_ns is None:
        raise UsageError(f"{path}: expected requests, got none")


def _used(names: Iterable[str], columns: Container[str]) -> str | None:
    """Which of these names the trace uses, if any."""
    for name in names:
        if name in columns:
            return name
    return None


def _timestamp_in(columns: Collection[str], place: str) -> str:
    name = _used(_TIMES, columns)
    if name is None:
        raise UsageError(f"{place}: expected a timestamp, got {_shown(', '.join(map(str, columns)))}")
    return name


def _unit(fields: Fields, moment: float | datetime) -> str:
    """The unit of a trace's numbers where the scenario does not state it, told from its first row."""
    column = _used(_TIMES, fields)
    if column in _STATED:  # its name says it, whatever stands beside it
        return _STATED[column]
    mooncake = column == "timestamp" and not _MOONCAKES.isdisjoint(fields)
    return "ms" if mooncake or (not isinstance(moment, datetime) and moment >= _SURELY_MS) else "s"


def _moment(value: object, place: str) -> float | datetime:
    """A number as it is, or a date and time."""
    moment: float | datetime | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        moment = value
    elif isinstance(value, str):
        try:
            moment = float(value)
        except ValueError:
            moment = _date(value)
    if moment is None or (not isinstance(moment, datetime) and not abs(moment) <= _MOST):
        raise UsageError(f"{place}: expected a number or a date and time, got {_shown(value)}")
    return moment


def _date(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _tokens(fields: Fields, names: Iterable[str], place: str) -> int | None:
    """A length, at least 1: public traces record failed requests with 0, and nobody can be asked for no token."""
    name = _used(names, fields)
    value = None if name is None else fields[name]
    if value in (None, ""):
        return None
    try:
        tokens = float(value)  # pandas writes whole numbers as 374.0 where some are missing
    except (TypeError, ValueError):
        tokens = math.nan
    if isinstance(value, bool) or not (tokens >= 0 and tokens.is_integer()):
        raise UsageError(f"{place}: {name}: expected a number of tokens, got {_shown(value)}")
    return max(1, int(tokens))


def _shown(value: object) -> str:
    """A value as it may stand in an error: short and on one line."""
    return "nothing" if value in (None, "") else ascii(value)[:60]
