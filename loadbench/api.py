"""A run for programs and notebooks: what its directory holds as numpy arrays, histograms and the summary's dataclasses.

What is here is public and stays: ``import loadbench`` has it, imported when it is first asked for. Loading reads and
never writes; running is ``api_run``'s. Errors that a user can put right are one line, and UsageErrors.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadbench.analysis import rundir
from loadbench.analysis.gates import kept
from loadbench.analysis.group import runs_in
from loadbench.analysis.metrics import LATENCIES, Series
from loadbench.analysis.stats import NS_PER_MS
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Level, Summary
from loadbench.analysis.verdict import exit_code
from loadbench.errors import UsageError
from loadbench.hdr import Hdr
from loadbench.records import load_title

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.object_]


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Requests as columns: numpy arrays of one length, a row a request.

    Columns ``_ns`` are nanoseconds since the run began, on the monotonic clock (``max_gap_ns``, ``stall_ns`` and
    ``connect_ns`` are durations): float64, NaN where a thing never happened. ``due_ns`` is when the schedule wanted it
    sent, ``sent_ns`` when it was, ``first_token_ns`` and ``last_token_ns`` when content came, ``done_ns`` when it was
    over. ``input_tokens``, ``output_tokens`` and ``chunks`` are counts, NaN where unknown. Columns of words (``phase``,
    ``kind``, ``outcome``, ``token_source``) are arrays of str, None where there is none. ``level`` is the level's
    index, ``place`` the prompt's place in its file, ``answer_hash`` a hash of the answer, 0 without one,
    ``endpoint`` the place in the fleet of the one that was asked, NaN where there is no fleet.

    ``samples.outcome == "ok"`` is a mask, for `where`. What is not here (``http_status``, ``detail``, …) is in the
    directory's samples.jsonl, a JSON object a line.
    """

    level: npt.NDArray[np.int32]
    phase: Words
    kind: Words
    outcome: Words
    token_source: Words
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
    answer_hash: npt.NDArray[np.uint64]
    endpoint: Floats
    _read: rundir.Samples = field(repr=False)

    @classmethod
    def _of(cls, read: rundir.Samples) -> Samples:
        words = np.array([*read.words, None], object)  # the last stands for -1, an absent word
        columns = {name: getattr(read, name) for name in rundir.COLUMNS}
        return cls(**columns | {name: words[columns[name]] for name in rundir.WORDS}, _read=read)

    def __len__(self) -> int:
        return len(self._read)

    def __repr__(self) -> str:
        return f"<Samples: {len(self):,} requests>"

    def where(self, mask: npt.NDArray[np.bool_]) -> Samples:
        """The requests where the mask is true."""
        return Samples._of(self._read.take(mask))

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Every column by its name, as ``pandas.DataFrame`` and ``polars.DataFrame`` take them."""
        return {name: getattr(self, name) for name in rundir.COLUMNS}

    def latency_ms(self, metric: str, series: Series = "service") -> Floats:
        """A latency of every request in milliseconds, NaN where it has none; failed requests included.

        ``metric`` is ttft, e2e, tpot, max_gap or lag. Service time counts from ``sent_ns``, response time (ttft and e2e
        only) from ``due_ns``. UsageError for any other: single gaps are kept as a histogram only.
        """
        stamps = LATENCIES[metric].series.get(series) if metric in LATENCIES else None
        if stamps is None:
            known = [f"{name} {each}" for name, row in LATENCIES.items() for each, how in row.series.items() if how]
            raise UsageError(f"latency_ms: expected one of {', '.join(known)}, got {metric} {series}")
        return stamps(self._read) / NS_PER_MS


class Histogram:
    """An HDR histogram of one latency: 1 µs to 1 h, three digits. ``len`` is how many values it counts."""

    __slots__ = ("_hdr",)

    def __init__(self, hdr: Hdr | None = None) -> None:
        self._hdr = hdr or Hdr()

    def __len__(self) -> int:
        return self._hdr.total

    def __repr__(self) -> str:
        return f"<Histogram: {len(self):,} values, p50 {self.percentile_ms(50)} ms, max {self.max_ms} ms>"

    @property
    def min_ms(self) -> float | None:
        """The smallest value in milliseconds; None when empty, as are all of these."""
        return _ms(self._hdr.min_ns)

    @property
    def max_ms(self) -> float | None:
        """The largest value in milliseconds."""
        return _ms(self._hdr.max_ns)

    @property
    def mean_ms(self) -> float | None:
        """The mean in milliseconds, to 0.05 %."""
        return _ms(self._hdr.mean_ns)

    def percentile_ms(self, percent: float) -> float | None:
        """The value in milliseconds that ``percent`` (0 to 100) of the values do not exceed, by nearest rank."""
        if not 0 <= percent <= 100:
            raise UsageError(f"percentile_ms: expected 0 to 100, got {percent}")
        return _ms(self._hdr.percentile(percent))

    def merged(self, *others: Histogram) -> Histogram:
        """A new one with the counts of all. Merge counts, never average percentiles."""
        return Histogram(Hdr.sum_of([self._hdr, *(other._hdr for other in others)]))

    def encode(self) -> str:
        """The V2 compressed form in base64, of nanoseconds, that every HdrHistogram library reads."""
        return self._hdr.encode()


def _ms(nanoseconds: float | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / NS_PER_MS


@dataclass(frozen=True, eq=False)
class RunLevel:
    """One load on one model. ``figures`` is what summary.json says of it, units in the names."""

    figures: Level
    _run: Run = field(repr=False)

    @property
    def index(self) -> int:
        """Its number in the run."""
        return self.figures.index

    @property
    def model(self) -> str:
        """The model's id."""
        return self.figures.model

    @property
    def load(self) -> str:
        """The load in words: ``4 users``, ``2/s poisson``; ``figures.load`` has it in numbers."""
        return load_title(self.figures.load)

    def __repr__(self) -> str:
        requests = self.figures.requests
        return f"<RunLevel {self.index}: {self.load} on {self.model}, {requests.ok} of {requests.attempted} ok>"

    @cached_property
    def samples(self) -> Samples:
        """All its requests in the order in which they were due, those of its warm-up too."""
        return Samples._of(self._run._data.samples.of_level(self.index))

    @cached_property
    def counted(self) -> Samples:
        """The requests that the latencies in ``figures`` are of: without the warm-up, where there was one."""
        return self.samples.where(self.samples.due_ns >= self._run._since_ns[self.index])

    def histogram(self, metric: str, series: Series | None = None) -> Histogram:
        """The latency of the successful requests that count (lag: of all that were sent), empty where there is none.

        ``metric`` is ttft, e2e, tpot, gap, max_gap or lag; ``series`` service or response, None: the level's headline
        where the metric has it. UsageError for any other.
        """
        row = LATENCIES.get(metric)
        if row is None or series not in (None, *row.series):
            known = [f"{name} {each}" for name, row in LATENCIES.items() for each in row.series]
            raise UsageError(f"histogram: expected one of {', '.join(known)}, got {metric} {series or ''}".rstrip())
        chosen: Series = series or (self.figures.headline if self.figures.headline in row.series else "service")
        if (stamps := row.series[chosen]) is None:
            return Histogram(Hdr.sum_of(self._run._gaps[self.index].values()))
        read, hdr = self.counted._read, Hdr()
        values_ns = stamps(read)[read.said(read.outcome, "ok") if row.of == "ok" else ~np.isnan(read.sent_ns)]
        hdr.add(values_ns[~np.isnan(values_ns)].astype(np.int64))
        return Histogram(hdr)


class Run:
    """A run's directory, read. ``path`` is where it lies, ``facts`` its run.json: scenario, environment, endpoint, …"""

    def __init__(self, path: Path, data: rundir.RunData) -> None:
        """Made by `load_run`, `load_runs` and `run`."""
        self.path = path
        self.facts: dict[str, Any] = data.facts
        self._data = data

    def __repr__(self) -> str:
        return (
            f"<Run {self.name}: {self.status}, {len(self._data.levels)} levels, {len(self._data.samples):,} requests>"
        )

    @property
    def name(self) -> str:
        """The scenario's."""
        return str(self.facts["name"])

    @property
    def status(self) -> str:
        """complete, interrupted, target_died, failed, or incomplete: cut off, or going on."""
        return self.summary.status

    @property
    def exit_code(self) -> int:
        """What the command line exits with: 0 done, 99 SLO or gate missed, …; ``loadbench run --help`` has them all."""
        return exit_code(self.summary)

    @cached_property
    def summary(self) -> Summary:
        """All that is told about the run: summary.json as dataclasses, made from the samples when first asked for."""
        return summarise(self._data, None, kept(self.path))

    @cached_property
    def levels(self) -> tuple[RunLevel, ...]:
        """Every level that was started, in order."""
        return tuple(RunLevel(level, self) for level in self.summary.levels)

    @cached_property
    def samples(self) -> Samples:
        """Every request, as they ended: of the levels (``phase`` "load"), warm-ups, canaries and the like."""
        read = self._data.samples
        return Samples._of(read.take(np.argsort(np.fmax(read.done_ns, read.due_ns), kind="stable")))

    @cached_property
    def _since_ns(self) -> dict[int, float]:
        """From when on the requests of each level count, as `analysis.span` has it."""
        began = {events.index: events.start_ns for events in self._data.levels}
        trimmed_s = {level.index: level.warmup_trimmed_s for level in self.summary.levels}
        return {index: start + int(s * 1e9) if (s := trimmed_s[index]) else -np.inf for index, start in began.items()}

    @cached_property
    def _gaps(self) -> dict[int, dict[str, Hdr]]:
        return rundir.read_gaps(self._data, self._since_ns)


def load_run(path: str | os.PathLike[str]) -> Run:
    """The run in this directory; a million requests take seconds. A run that was cut off is read as far as it goes.

    UsageError where there is no run, or one of another version's making.
    """
    folder = Path(path)
    return Run(folder, rundir.read(folder))


def load_runs(path: str | os.PathLike[str]) -> tuple[Run, ...]:
    """The runs right below a directory, in the order of their names: repeats, or whatever was put there.

    UsageError where there are none.
    """
    return tuple(load_run(folder) for folder in runs_in(Path(path)))
