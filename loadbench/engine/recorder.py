"""Puts what happened on disk as it happens: a run that is killed keeps every request that had ended.

Samples are written the moment they end, histogram intervals and telemetry once a second. Nothing grows
with the length of a run. Summing up is analysis' job; the few figures kept here are for the live view.
"""

from __future__ import annotations

import asyncio
import io
import math
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from loadbench.errors import UsageError
from loadbench.hdr import Hdr, HlogWriter, make_tag
from loadbench.outcomes import is_starved
from loadbench.records import Sample
from loadbench.scenario.schema import Slo


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that latencies of one request may be for it to be good, in nanoseconds, as `analysis.slo.good` has it.

    For the live view: what the report says is counted from the samples. Of several limits on one latency the highest
    percentile's counts.
    """

    ttft_ns: float = math.inf
    e2e_ns: float = math.inf
    tpot_ns: float = math.inf

    @classmethod
    def of(cls, slo: Slo | None) -> Limits | None:
        """Those of an SLO; None where it has none for single requests."""
        limits_ns: dict[str, float] = {}
        for metric, _, limit_s in slo.limits() if slo is not None else ():
            if metric != "gap":  # of each request only the largest is known
                limits_ns[f"{metric}_ns"] = max(1e9 * limit_s, limits_ns.get(f"{metric}_ns", 0.0))
        return cls(**limits_ns) if limits_ns else None


class Recorder:
    """The open files of one run. ``on_failure`` is told, once, of the error when the disk takes no more."""

    def __init__(self, folder: Path, started_wall_ns: int, on_failure: Callable[[OSError], None]) -> None:
        self._on_failure = on_failure
        self.failure: OSError | None = None
        self._samples = _append_to(folder / "samples.jsonl")
        self._telemetry = _append_to(folder / "telemetry.jsonl")
        self._histograms = _append_to(folder / "histograms.hlog")
        self._interval = Hdr()  # worn by one tag after the other: a new one costs 0.13 ms
        self._hlog = io.StringIO()
        self._hlog_writer = HlogWriter(self._hlog, started_wall_ns)
        self._level = -1
        self._interval_ns = 0
        self._values: dict[tuple[str, str], array[int]] = {}
        self._chunks = 0
        self.limits: Limits | None = None
        self.last_token_ns = 0
        self.begin_level(0, 0)

    def begin_level(self, level: int, now_ns: int, *, from_due: bool = False) -> None:
        """What comes from now on belongs to this level; its last interval has been closed.

        ``from_due``: latencies that are held against the limits count from when the request was due.
        """
        self._level, self._interval_ns, self._from_due = level, now_ns, from_due
        self._values = {}
        self._chunks = 0
        self.good = 0
        self.attempted = 0
        self.outcomes: Counter[str] = Counter()
        self.endpoints: list[Counter[str]] = []
        self.starved = 0
        self.ttft = Hdr()
        self.e2e = Hdr()

    @property
    def chunks(self) -> int:
        """Content chunks of this level so far; of an unfinished request all but its first."""
        return self._chunks + sum(len(values) for (name, _), values in self._values.items() if name == "gap")

    def gaps(self, kind: str) -> array[int]:
        """The array to which the gaps between chunks of this kind of prompt are appended, in nanoseconds."""
        return self._array("gap", kind)

    def add(self, sample: Sample) -> None:
        """Write down one request's end."""
        # At once, before the user's next request: whatever kills us, no answered request is ever lost. 3 µs.
        self._write(self._samples, orjson.dumps(sample._asdict(), option=orjson.OPT_APPEND_NEWLINE))
        self.last_token_ns = max(self.last_token_ns, sample.last_token_ns or 0)
        if sample.phase != "load":
            return
        self.outcomes[sample.outcome] += 1
        if sample.endpoint is not None:
            self.endpoints += [Counter() for _ in range(sample.endpoint + 1 - len(self.endpoints))]
            self.endpoints[sample.endpoint][sample.outcome] += 1
        self.starved += sample.detail is not None and is_starved(sample.detail)
        if sample.sent_ns is not None:
            self._array("lag", sample.kind).append(max(0, sample.sent_ns - sample.due_ns))
        if sample.first_token_ns is not None:
            self._chunks += 1
        if sample.outcome == "ok":
            self._add_latencies(sample)

    def _add_latencies(self, sample: Sample) -> None:
        kind, sent_ns, first_ns, last_ns = sample.kind, sample.sent_ns, sample.first_token_ns, sample.last_token_ns
        if sent_ns is None or last_ns is None:
            return
        self.good += self.limits is not None and self._is_good(self.limits, sample, sent_ns, last_ns)
        self._array("e2e_service", kind).append(last_ns - sent_ns)
        self._array("e2e_response", kind).append(last_ns - sample.due_ns)
        if first_ns is None:
            return
        self._array("ttft_service", kind).append(first_ns - sent_ns)
        self._array("ttft_response", kind).append(first_ns - sample.due_ns)
        if sample.output_tokens is not None and sample.output_tokens > 1:
            self._array("tpot", kind).append((last_ns - first_ns) // (sample.output_tokens - 1))

    def _is_good(self, limits: Limits, sample: Sample, sent_ns: int, last_ns: int) -> bool:
        since_ns = sample.due_ns if self._from_due else sent_ns
        first_ns, tokens = sample.first_token_ns, sample.output_tokens
        if last_ns - since_ns > limits.e2e_ns:
            return False
        if first_ns is None:
            return True
        if first_ns - since_ns > limits.ttft_ns:
            return False
        spread = tokens is not None and tokens > 1 and sample.chunks > 1
        return not spread or (last_ns - first_ns) / ((tokens or 0) - 1) <= limits.tpot_ns

    def event(self, t_ns: int, event: str, **facts: Any) -> None:
        """One line of telemetry."""
        self._write(self._telemetry, orjson.dumps({"t_ns": t_ns, "event": event, **facts}) + b"\n")

    async def close_interval(self, now_ns: int) -> None:
        """Write the histograms of what came since the last time, and begin the next interval.

        One tag a loop turn: encoding takes up to 0.5 ms, and a dozen in one go would be late stamps for whoever waits.
        """
        since_ns, self._interval_ns = self._interval_ns, now_ns
        level, values = self._level, self._values
        for (name, kind), series in tuple(values.items()):
            if series:
                self._write_interval(name, make_tag(name, kind, level), series, since_ns, now_ns)
                await asyncio.sleep(0)

    def _write_interval(self, name: str, tag: str, series: array[int], since_ns: int, now_ns: int) -> None:
        batch = np.array(series, dtype=np.int64)
        del series[:]  # in place: requests in flight hold on to the array
        if name == "gap":
            self._chunks += len(batch)
        histogram = self._interval
        histogram.reset()
        histogram.add(batch)
        if name == "ttft_service":
            self.ttft.merge(histogram)
        elif name == "e2e_service":
            self.e2e.merge(histogram)
        self._hlog_writer.write(tag, since_ns, now_ns, histogram)
        self._write(self._histograms, self._hlog.getvalue().encode("ascii"))
        self._hlog.seek(0)
        self._hlog.truncate()

    def close(self) -> None:
        """Everything to the disk."""
        for file in (self._samples, self._telemetry, self._histograms):
            try:
                file.close()
            except OSError as error:
                self._fail(error)

    def _array(self, name: str, kind: str) -> array[int]:
        values = self._values.get((name, kind))
        if values is None:
            values = self._values[name, kind] = array("q")
        return values

    def _write(self, file: BinaryIO, data: bytes) -> None:
        try:
            written = file.write(data)
            while written < len(data):  # a raw file may take a part
                written += file.write(data[written:])
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if self.failure is None:
            self.failure = error
            self._on_failure(error)


def _append_to(path: Path) -> BinaryIO:
    try:
        return path.open("ab", buffering=0)  # raw: what is written has left this process
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
