"""Reads a run directory into numpy columns. Lives with a run that was cut off anywhere; judges nothing.

A million samples take seconds and some hundred megabytes: lines are parsed a block at a time and only columns are kept.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import itemgetter
from os import SEEK_END
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import orjson

from loadbench.analysis import memory_columns
from loadbench.analysis.stats import Floats
from loadbench.engine.merge import parts
from loadbench.errors import UsageError
from loadbench.hdr import Hdr, HlogReader, split_tag

SCHEMA = 1
HISTOGRAMS = "histograms.hlog"
MOST_NS, MOST_TOKENS = 2**53, 2**31  # beyond are no stamps of ours, and no answers: they are taken as absent
BLOCK_BYTES = 128 << 10  # some 300 lines, whose dicts stay in the cache; a third faster than 4 MiB

Codes = npt.NDArray[np.int32]
Hashes = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples as columns, named as in ``records.Sample``. Absent numbers are NaN, absent words -1.

    Nanoseconds are doubles, which are exact up to 2**53 ns (104 days) and carry absence through every subtraction.
    Columns of words hold positions in ``words``; hashes of answers are numbers, 0 where there is none. They stand level
    by level, in each first its load, in the order in which it was due.
    """

    level: Codes
    phase: Codes
    kind: Codes
    outcome: Codes
    token_source: Codes
    due_ns: Floats
    sent_ns: Floats
    headers_ns: Floats
    first_event_ns: Floats
    first_token_ns: Floats
    last_token_ns: Floats
    done_ns: Floats
    input_tokens: Floats
    output_tokens: Floats
    chunks: Floats
    max_gap_ns: Floats
    stall_ns: Floats
    connect_ns: Floats
    place: Floats
    answer_hash: Hashes
    endpoint: Floats
    words: dict[str, int]

    def __len__(self) -> int:
        return self.level.size

    def take(self, which: Mask | Places | slice) -> Samples:
        """The samples where the mask is true, or those at these places, in their order; of a slice no copy is made."""
        return replace(self, **{column: getattr(self, column)[which] for column in COLUMNS})

    def of_level(self, level: int) -> Samples:
        """Those of a level's load, in the order in which they were due: a copy would be half of all memory."""
        first, beyond = np.searchsorted(self.level, (level, level + 1))
        loaded = np.count_nonzero(self.said(self.phase[first:beyond], "load"))
        return self.take(slice(first, first + loaded))

    def said(self, column: Codes, word: str) -> Mask:
        """Where a column of words holds this one."""
        mask: Mask = column == self.words.get(word, -2)
        return mask

    def counts(self, column: Codes) -> dict[str, int]:
        """How often each word is in the column, most frequent first; absent ones are not counted."""
        codes, counts = np.unique(column[column >= 0], return_counts=True)
        names = list(self.words)
        return {names[codes[i]]: int(counts[i]) for i in np.argsort(-counts, kind="stable")}


WORDS = ("phase", "kind", "outcome", "token_source")
COLUMNS = tuple(column.name for column in fields(Samples) if column.name != "words")
LATER = ("place", "answer_hash", "endpoint")  # older runs have none


TICKS = ("t_ns", "target_rss_bytes", "client_rss_bytes", "client_cpu_s", "loop_lag_max_ns")
"""What is kept of a tick: numbers, 40 bytes a second; as dicts an hour would take megabytes."""


@dataclass(slots=True)
class LevelEvents:
    """What telemetry says of one level. ``end`` is the level_end event, absent where the run was cut off before it.

    ``memory`` has the rows of ``memory_columns``, ``ticks`` those of ``TICKS``, laid end to end, NaN for absent.
    """

    index: int
    start_ns: int
    issue_end_ns: int | None = None
    ended_by: str | None = None
    end: dict[str, Any] | None = None
    last_tick_ns: int = 0
    peak_rss_bytes: int | None = None
    memory: array[float] = field(default_factory=lambda: array("d"))
    ticks: array[float] = field(default_factory=lambda: array("d"))

    def tick(self, event: dict[str, Any]) -> None:
        """Keep its numbers, and what is asked for of a run that was cut off."""
        given = map(event.get, TICKS)
        self.ticks.extend(np.nan if number is None else float(number) for number in given)
        self.last_tick_ns, rss_bytes = event["t_ns"], event["target_rss_bytes"]
        if rss_bytes is not None:
            self.peak_rss_bytes = max(rss_bytes, self.peak_rss_bytes or 0)


@dataclass(frozen=True, slots=True)
class RunData:
    """A run directory, read, but for its histograms. ``details`` keeps the first error text of each (level, outcome).

    ``torn`` counts unreadable lines by file, those of the histogram log once `read_gaps` has read it. ``recoveries``
    are the events in which the target came back, or did not.
    """

    path: Path
    facts: dict[str, Any]
    samples: Samples
    details: dict[tuple[int, str], str]
    levels: tuple[LevelEvents, ...]
    last_event_ns: int
    torn: dict[str, int]
    recoveries: tuple[dict[str, Any], ...] = ()


def read(path: Path, only: Collection[int] | None = None) -> RunData:
    """The run in this directory; UsageError where it is none.

    ``only`` these levels of a run that goes on, which costs what they have and not what the run has by then.
    """
    facts = read_facts(path)
    torn: dict[str, int] = {}
    try:
        samples, details = _samples(parts(path, "samples.jsonl"), torn, min(only or (0,)))
        levels, last_event_ns, recoveries = _telemetry(path / "telemetry.jsonl", torn)
    except KeyError as error:
        raise UsageError(f"{path}: expected {error} on every line of its JSON lines, found one without") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{path}: expected numbers where samples have numbers, found none ({error})") from error
    if only is not None:
        levels = tuple(events for events in levels if events.index in only)
    return RunData(
        path=path,
        facts=facts,
        samples=samples,
        details=details,
        levels=levels,
        last_event_ns=last_event_ns,
        torn=torn,
        recoveries=recoveries,
    )


def read_facts(path: Path) -> dict[str, Any]:
    """What run.json says; UsageError where the directory has none that is ours."""
    try:
        facts = orjson.loads((path / "run.json").read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: expected a run directory with run.json, found none ({error.strerror})") from error
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path / 'run.json'}: expected JSON, found something else ({error})") from error
    found = facts.get("schema") if isinstance(facts, dict) else None
    if found != SCHEMA:
        raise UsageError(f"{path / 'run.json'}: expected schema {SCHEMA}, found {found}")
    return dict(facts)


def _blocks(path: Path, since: int = 0) -> Iterator[bytes]:
    """The file in blocks of whole lines; a last line without an end comes as it is. A missing file is an empty one."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(_start_of(since, file) if since else 0)
        while block := file.read(BLOCK_BYTES):
            yield block + file.readline()


def _start_of(level: int, file: BinaryIO) -> int:
    """Where a file has no line of a level before this one any more, less than a block too early.

    Levels follow one another in what a process writes, so the place is found by halves: what came before costs nothing.
    """
    low, high = 0, file.seek(0, SEEK_END)
    while high - low > BLOCK_BYTES:
        file.seek((low + high) // 2)
        file.readline()
        start, row = file.tell(), _object(file.readline())
        if isinstance(row, dict) and row["level"] < level:
            low = start
        else:
            high = (low + high) // 2
    return low


def _records(path: Path, torn: dict[str, int], since: int = 0) -> Iterator[list[dict[str, Any]]]:
    """The objects in a file of JSON lines, a block at a time; what is no object is counted as torn and skipped."""
    for block in _blocks(path, since):
        try:
            # One parse of a whole block takes two thirds of the time of one per line.
            rows = orjson.loads(b"[" + block.rstrip(b"\n").replace(b"\n", b",") + b"]")
        except orjson.JSONDecodeError:
            rows = [_object(line) for line in block.splitlines()]
        whole = [row for row in rows if isinstance(row, dict)]
        if len(whole) < len(rows):
            torn[path.name] = torn.get(path.name, 0) + len(rows) - len(whole)
        yield whole


def _object(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None


class _Words(dict[str | None, int]):
    """Numbers words as they come; None is -1."""

    def __missing__(self, word: str | None) -> int:
        self[word] = code = -1 if word is None else len(self) - (None in self)
        return code


def _samples(paths: Sequence[Path], torn: dict[str, int], since: int) -> tuple[Samples, dict[tuple[int, str], str]]:
    """The samples, those of levels before ``since`` left out as far as that saves reading them."""
    words = _Words()
    # Arrays that grow where they are: a list of small ones leaves as much memory again in pieces.
    grown = {column: array(_typecode(column)) for column in COLUMNS}
    details: dict[tuple[int, str], str] = {}
    always = [column for column in COLUMNS if column not in LATER]
    cells = itemgetter(*always)
    for rows in (rows for path in paths for rows in _records(path, torn, since)):
        for column, values in zip(always, zip(*map(cells, rows), strict=True), strict=False):
            numbers = map(words.__getitem__, values) if column in WORDS else values
            # numpy turns None into NaN.
            grown[column].frombytes(np.array(tuple(numbers), grown[column].typecode).tobytes())
        for column in ("place", "endpoint"):
            grown[column].frombytes(np.array([row.get(column) for row in rows], np.float64).tobytes())
        hashes = [row.get("answer_hash") for row in rows]
        grown["answer_hash"].extend([int(said, 16) if said else 0 for said in hashes])
        for row in rows:
            if row["detail"] is not None and row["phase"] == "load":
                details.setdefault((row["level"], row["outcome"]), row["detail"])
    level, phase, due_ns = (np.asarray(grown[column]) for column in ("level", "phase", "due_ns"))
    order = np.lexsort((due_ns, phase != words.get("load", -2), level))
    # One column after the other, so that at most one is there twice.
    columns: dict[str, Any] = {column: _possible(column, np.asarray(grown.pop(column))[order]) for column in COLUMNS}
    return Samples(**columns, words={word: code for word, code in words.items() if word is not None}), details


def _typecode(column: str) -> str:
    """Of an array, and of numpy: 64 bits unsigned, a 32-bit int, a double."""
    if column == "answer_hash":
        return "Q"
    return "i" if column in WORDS or column == "level" else "d"


def _possible(column: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The column without what cannot be: a server may say that it made 2**62 tokens."""
    if values.dtype == np.float64:
        values[np.abs(values) > (MOST_NS if column.endswith("_ns") else MOST_TOKENS)] = np.nan
    return values


def _telemetry(path: Path, torn: dict[str, int]) -> tuple[tuple[LevelEvents, ...], int, tuple[dict[str, Any], ...]]:
    levels: dict[int, LevelEvents] = {}
    recoveries: list[dict[str, Any]] = []
    last_ns = 0
    for event in (event for events in _records(path, torn) for event in events):
        last_ns = max(last_ns, event["t_ns"])
        level = levels.get(event.get("level", -1))
        match event["event"]:
            case "level_start":
                levels[event["level"]] = LevelEvents(event["level"], event["t_ns"])
            case "tick" if level:
                level.tick(event)
            case "memory" if level:
                level.memory.extend(memory_columns.row(event))
            case "recovery":
                recoveries.append(event)
            case "issue_end" if level:
                level.issue_end_ns, level.ended_by = event["t_ns"], event["reason"]
            case "level_end" if level:
                level.end = event
    return tuple(levels[index] for index in sorted(levels)), last_ns, tuple(recoveries)


def read_gaps(run: RunData, since_ns: Mapping[int, float]) -> dict[int, dict[str, Hdr]]:
    """For each level in ``since_ns`` the histograms of its gaps by kind of prompt, from that moment on.

    They are kept by the second: one that is more than half over by then is left out.
    """
    gaps: dict[int, dict[str, Hdr]] = {level: defaultdict(Hdr) for level in since_ns}
    run.torn.pop(HISTOGRAMS, None)
    for path in (path for path in parts(run.path, HISTOGRAMS) if path.exists()):
        reader = HlogReader(path, lambda tag: _gaps_of(tag)[1] in gaps)
        for interval in reader:
            kind, level = _gaps_of(interval.tag)
            middle_ns = (interval.start_s + interval.length_s / 2) * 1e9
            if middle_ns >= since_ns[level]:
                gaps[level][kind].merge(interval.hdr)
        if reader.torn:
            run.torn[HISTOGRAMS] = run.torn.get(HISTOGRAMS, 0) + reader.torn
    return {level: dict(kinds) for level, kinds in gaps.items()}


def _gaps_of(tag: str | None) -> tuple[str, int]:
    """The kind of prompt and the level of a histogram of gaps; -1 as the level of any other."""
    metric, kind, level = split_tag(tag or "") or ("", "", -1)
    return (kind, level) if metric == "gap" else ("", -1)
