"""HDR histograms of nanoseconds, and the log file that the world's HdrHistogram tools open.

One shape everywhere: 1 µs to 1 h, 3 significant digits. The one door for the hdrhistogram package, whose own
``record_value`` costs 3.3 µs a value and drops what is out of range without a word, and whose log writer (0.10.8)
raises on the start time, never writes tags and floors the maximum. What is recorded, and when, is the caller's.
"""

from __future__ import annotations

import binascii
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
from hdrh.codec import HdrCookieException, HdrLengthException
from hdrh.histogram import HdrHistogram

LOWEST_NS = 1_000
HIGHEST_NS = 3_600_000_000_000
DIGITS = 3

# The layout that follows from these three: a unit of 512 ns (1 µs rounded down to a power of two), 2,048 sub-buckets
# in the first bucket and 1,024 in each of the 22 above it. 24,576 counters of 8 bytes hold up to 2**42 - 1 ns (73 min).
_UNIT_BITS = 9
_HALF_BITS = 10
_HALF = 1 << _HALF_BITS
_COUNTERS = 24 * _HALF
_MASK = (2 * _HALF - 1) << _UNIT_BITS
LARGEST_NS = (1 << 42) - 1

_INDEX = np.arange(_COUNTERS, dtype=np.int64)
_SHIFT = np.maximum((_INDEX >> _HALF_BITS) - 1, 0) + _UNIT_BITS
_LOWER_NS = np.where(_INDEX < _HALF, _INDEX, (_INDEX & (_HALF - 1)) + _HALF) << _SHIFT
_WIDTH_NS = np.int64(1) << _SHIFT

Ints = npt.NDArray[np.int64]


class Hdr:
    """A histogram of nanoseconds; 196 KB, so hold hundreds, not thousands.

    ``min_ns`` and ``max_ns`` are the true extremes of what was added (after ``decode``: the edges of their buckets).
    ``clipped`` counts values below 0 or above ``LARGEST_NS``; they are counted in the nearest bucket.
    """

    __slots__ = ("_counts", "_wire", "clipped", "max_ns", "min_ns", "total")

    def __init__(self) -> None:
        self._wear(HdrHistogram(LOWEST_NS, HIGHEST_NS, DIGITS))
        self.total = 0
        self.clipped = 0
        self.min_ns: int | None = None
        self.max_ns: int | None = None

    def _wear(self, wire: Any) -> None:
        self._wire = wire
        # The package's own counters, seen by numpy: what is added here is what the package encodes.
        self._counts: Ints = np.frombuffer(wire.counts, dtype=np.int64)

    def add(self, values_ns: Ints) -> None:
        """Count every value; the counts equal ``record_value``'s, bit for bit. 20 µs a call and 5 ns a value."""
        if not values_ns.size:
            return
        low, high = int(values_ns.min()), int(values_ns.max())
        if low < 0 or high > LARGEST_NS:
            self.clipped += int(np.count_nonzero((values_ns < 0) | (values_ns > LARGEST_NS)))
            values_ns = values_ns.clip(0, LARGEST_NS)
        # frexp's exponent is the bit length, exactly: the values have 42 bits and a double holds 53.
        bits = np.frexp((values_ns | _MASK).astype(np.float64))[1].astype(np.int64)
        bucket = bits - (_UNIT_BITS + _HALF_BITS + 1)
        binned = np.bincount((bucket << _HALF_BITS) + (values_ns >> (bucket + _UNIT_BITS)))
        self._counts[: binned.size] += binned
        self.total += values_ns.size
        self._widen(low, high)

    def _widen(self, low: int | None, high: int | None) -> None:
        if low is not None and high is not None:
            self.min_ns = low if self.min_ns is None else min(self.min_ns, low)
            self.max_ns = high if self.max_ns is None else max(self.max_ns, high)

    def merge(self, other: Hdr) -> None:
        """Add the other's counts."""
        self._counts += other._counts
        self.total += other.total
        self.clipped += other.clipped
        self._widen(other.min_ns, other.max_ns)

    @classmethod
    def sum_of(cls, parts: Iterable[Hdr]) -> Hdr:
        """All counts of the parts together."""
        total = cls()
        for part in parts:
            total.merge(part)
        return total

    def reset(self) -> None:
        self._counts.fill(0)
        self.total = self.clipped = 0
        self.min_ns = self.max_ns = None

    def percentile(self, percent: float) -> int | None:
        """The smallest value that at least ``percent`` of the values do not exceed; None when empty.

        Nearest rank, as HdrHistogram for Java counts it, to the upper edge of the bucket but never above the maximum.
        """
        if self.max_ns is None:
            return None
        # One step below, like Java: 99.9 % of 1,000 is 999, although 0.999 * 1000 may come out above it.
        rank = max(1, int(np.ceil(np.nextafter(percent, 0.0) * self.total / 100)))
        index = int(np.searchsorted(np.cumsum(self._counts), rank))
        return min(int(_LOWER_NS[index] + _WIDTH_NS[index] - 1), self.max_ns)

    @property
    def mean_ns(self) -> float | None:
        """Mean of the buckets' middles, within 0.05 % of the mean of the values."""
        return self._moment(1) if self.total else None

    def _moment(self, order: int) -> float:
        filled = np.flatnonzero(self._counts)
        middles = (_LOWER_NS[filled] + (_WIDTH_NS[filled] >> 1)).astype(np.float64)
        return float(np.dot(middles**order, self._counts[filled])) / self.total

    def encode(self) -> str:
        """The V2 compressed, base64 form that all HdrHistogram libraries read."""
        self._wire.total_count = self.total
        self._wire.max_value = min(max(self.max_ns or 0, 0), LARGEST_NS)
        encoded: bytes = self._wire.encode()
        return encoded.decode("ascii")

    @classmethod
    def decode(cls, encoded: str) -> Hdr:
        """The histogram that ``encode`` or another library wrote; ValueError where it is damaged or does not fit."""
        try:
            wire = HdrHistogram.decode(encoded)
            if (wire.unit_magnitude, wire.sub_bucket_half_count_magnitude, wire.counts_len) != (
                _UNIT_BITS,
                _HALF_BITS,
                _COUNTERS,
            ):
                foreign, wire = wire, HdrHistogram(LOWEST_NS, HIGHEST_NS, DIGITS)
                wire.add(foreign)
        except (binascii.Error, zlib.error, HdrCookieException, HdrLengthException, IndexError) as error:
            raise ValueError(f"not a histogram of up to an hour: {error}") from error
        hdr = cls.__new__(cls)
        hdr._wear(wire)
        hdr.total = int(hdr._counts.sum())
        hdr.clipped = int(hdr._counts[-1])
        filled = np.flatnonzero(hdr._counts)
        hdr.min_ns = int(_LOWER_NS[filled[0]]) if filled.size else None
        hdr.max_ns = int(_LOWER_NS[filled[-1]] + _WIDTH_NS[filled[-1]] - 1) if filled.size else None
        return hdr

    def write_hgrm(self, out: IO[str], ns_per_unit: float = 1e6, ticks_per_half: int = 5) -> None:
        """The percentile distribution as HistogramLogProcessor prints it (``.hgrm``), in milliseconds by default.

        The package's own prints the standard deviation unscaled.
        """
        out.write(f"{'Value':>12} {'Percentile':>14} {'TotalCount':>10} {'1/(1-Percentile)':>14}\n\n")
        below = np.cumsum(self._counts)
        percent, reached = 0.0, 0
        while reached < self.total:
            index = int(np.argmax((100.0 * below / self.total >= percent) & (self._counts > 0)))
            reached = int(below[index])
            value = (_LOWER_NS[index] + _WIDTH_NS[index] - 1) / ns_per_unit
            out.write(f"{value:12.3f} {percent / 100:.12f} {reached:10d} {1 / (1 - percent / 100):14.2f}\n")
            # Ticks double with every halving of the distance to 100 %.
            percent += 100 / (ticks_per_half * 2 ** (int(np.log2(100 / (100 - percent))) + 1))
        if self.total:
            out.write(f"{value:12.3f} {1:.12f} {self.total:10d}\n")
        mean = self._moment(1) if self.total else 0.0
        deviation = max(self._moment(2) - mean**2, 0.0) ** 0.5 if self.total else 0.0
        most = value if self.total else 0.0
        out.write(f"#[Mean    = {mean / ns_per_unit:12.3f}, StdDeviation   = {deviation / ns_per_unit:12.3f}]\n")
        out.write(f"#[Max     = {most:12.3f}, Total count    = {self.total:12d}]\n")
        out.write(f"#[Buckets = {_COUNTERS // _HALF - 1:12d}, SubBuckets     = {2 * _HALF:12d}]\n")


def make_tag(metric: str, kind: str, level: int) -> str:
    """``gap.chat.L3``. What a tag must not hold (commas, spaces, line breaks) is percent-encoded in the kind."""
    return f"{metric}.{quote(kind, safe='')}.L{level}"


def split_tag(tag: str) -> tuple[str, str, int] | None:
    """(metric, kind, level) of a tag of ours, None for any other."""
    match = re.fullmatch(r"(\w+)\.(.*)\.L(\d+)", tag)
    return (match[1], unquote(match[2]), int(match[3])) if match else None


class HlogWriter:
    """Appends interval lines to an open text file, log format 1.3. Flushing and closing are the caller's.

    ``started_wall_ns`` is the wall clock at the run's beginning, from which every interval counts.
    """

    def __init__(self, out: IO[str], started_wall_ns: int) -> None:
        self._out = out
        # asctime speaks English in every locale, as the Java tools do.
        date = time.asctime(time.gmtime(started_wall_ns // 10**9))
        out.write(
            "#[Histogram log format version 1.3]\n"
            f"#[StartTime: {started_wall_ns / 1e9:.3f} (seconds since epoch), {date[:19]} UTC {date[20:]}]\n"
            "#[Histograms hold nanoseconds; Interval_Max is in milliseconds (ratio 1000000)]\n"
            '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"\n'
        )

    def write(self, tag: str, start_ns: int, end_ns: int, hdr: Hdr) -> None:
        """One interval, its bounds in ns since the run began. An empty histogram is not written."""
        if hdr.max_ns is not None:
            length_s = (end_ns - start_ns) / 1e9
            self._out.write(f"Tag={tag},{start_ns / 1e9:.3f},{length_s:.3f},{hdr.max_ns / 1e6:.6f},{hdr.encode()}\n")


@dataclass(frozen=True, slots=True)
class Interval:
    """One line of a histogram log; ``start_s`` counts from the log's StartTime."""

    tag: str | None
    start_s: float
    length_s: float
    hdr: Hdr


_LINE = re.compile(r"(?:Tag=(?P<tag>[^,]*),)?(?P<start>[\d.]+),(?P<length>[\d.]+),(?P<max>[\d.]+),(?P<payload>\S+)\n")


class HlogReader:
    """Iterates over the intervals of a log whose tag is ``wanted``; ``torn`` then counts unreadable lines."""

    def __init__(self, path: Path, wanted: Callable[[str | None], bool] = lambda tag: True) -> None:
        self._path = path
        self._wanted = wanted
        self.torn = 0

    def __iter__(self) -> Iterator[Interval]:
        with self._path.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith(("#", '"')):
                    continue
                match = _LINE.fullmatch(line)
                if match and not self._wanted(match["tag"]):
                    continue
                try:
                    if match is None:
                        raise ValueError("not an interval line")
                    hdr = Hdr.decode(match["payload"])
                    start_s, length_s, max_ns = float(match["start"]), float(match["length"]), float(match["max"]) * 1e6
                except ValueError:
                    self.torn += 1
                    continue
                # The column holds the maximum itself, the counts only its bucket; other tools may scale it otherwise.
                if hdr.max_ns and (hdr.clipped or abs(hdr.max_ns - max_ns) <= max(1 << _UNIT_BITS, hdr.max_ns / 1000)):
                    hdr.max_ns = round(max_ns)
                yield Interval(match["tag"], start_s, length_s, hdr)
