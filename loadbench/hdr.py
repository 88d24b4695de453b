"""HDR histograms of nanoseconds, and the log file that the world's HdrHistogram tools open.

One shape everywhere: 1 µs to 1 h, 3 significant digits. The one door for the hdrhistogram package, whose own
``record_value`` costs 3.3 µs a value and drops what is out of range without a word, and whose log writer (0.10.8)
raises on the start time, never writes tags and floors the maximum. What is recorded, and when, is the caller's.
"""

from __future__ import annotations

import binascii
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
from hdrh.codec import HdrCookieException, HdrLengthException, get_compression_cookie, get_encoding_cookie
from hdrh.codec import decode as unpack
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
BEYOND = 1e12  # in a log's columns: seconds, which other tools may count since 1970, and milliseconds, of which we clip

_INDEX = np.arange(_COUNTERS, dtype=np.int64)
_SHIFT = np.maximum((_INDEX >> _HALF_BITS) - 1, 0) + _UNIT_BITS
_LOWER_NS = np.where(_INDEX < _HALF, _INDEX, (_INDEX & (_HALF - 1)) + _HALF) << _SHIFT
_WIDTH_NS = np.int64(1) << _SHIFT

# What stands before the counters in the V2 form: cookie and length, then compressed cookie, length of the counters,
# offset, digits, lowest, highest and ratio.
_OUTER = struct.Struct(">II")
_INNER = struct.Struct(">IIIIqqd")
_OURS = (get_compression_cookie(), get_encoding_cookie(), 0, DIGITS, LOWEST_NS, HIGHEST_NS)

Ints = npt.NDArray[np.int64]


class Hdr:
    """A histogram of nanoseconds; 196 KB, so hold hundreds, not thousands.

    ``min_ns`` and ``max_ns`` are the true extremes of what was added (after ``decode``: the edges of their buckets).
    ``clipped`` counts values below 0 or above ``LARGEST_NS``; they are counted in the nearest bucket.
    """

    __slots__ = ("_counts", "_wire", "clipped", "max_ns", "min_ns", "total")

    def __init__(self) -> None:
        self._wire: Any = None  # the package's own, which takes 0.13 ms to make: only what is encoded has one
        self._counts: Ints = np.zeros(_COUNTERS, np.int64)
        self.total = 0
        self.clipped = 0
        self.min_ns: int | None = None
        self.max_ns: int | None = None

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
        if self._wire is None:
            self._wire, counts = HdrHistogram(LOWEST_NS, HIGHEST_NS, DIGITS), self._counts
            # The package's own counters, seen by numpy: what is added from now on is what the package encodes.
            self._counts = np.frombuffer(self._wire.counts, dtype=np.int64)
            self._counts += counts
        self._wire.total_count = self.total
        self._wire.max_value = min(max(self.max_ns or 0, 0), LARGEST_NS)
        encoded: bytes = self._wire.encode()
        return encoded.decode("ascii")

    @classmethod
    def decode(cls, encoded: str) -> Hdr:
        """The histogram that ``encode`` or another library wrote; ValueError where it is damaged or does not fit."""
        hdr = cls()
        first, last, hdr.total = _unpack_into(hdr._counts, hdr._counts.ctypes.data, encoded)
        if hdr.total:
            hdr.clipped = int(hdr._counts[-1])
            hdr._widen(int(_LOWER_NS[first]), _most_ns(last))
        return hdr

    def add_line(self, line: Line, room: Room) -> None:
        """Add the counts of a log's line as `decode` and `merge` would, in a tenth of the time; ValueError as there."""
        unpacked = room.counts
        first, last, total = _unpack_into(unpacked, room.address, line.payload)
        if total:
            touched = slice(first, last + 1)
            clipped, high_ns = int(unpacked[-1]), _most_ns(last)
            self._counts[touched] += unpacked[touched]
            unpacked[touched] = 0  # what was not touched need not be looked at
            self.total += total
            self.clipped += clipped
            self._widen(int(_LOWER_NS[first]), _exact_ns(high_ns, line.max_ns, clipped))

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


class Room:
    """Where `Hdr.add_line` unpacks, one line after the other: counters that are all 0 before and after."""

    def __init__(self) -> None:
        self.counts: Ints = np.zeros(_COUNTERS, np.int64)
        self.address = int(self.counts.ctypes.data)


def _most_ns(index: int) -> int:
    """The largest value that this counter counts."""
    return int(_LOWER_NS[index] + _WIDTH_NS[index] - 1)


def _exact_ns(high_ns: int, said_ns: float, clipped: int) -> int:
    """The maximum, of which the counts know the bucket that ends at ``high_ns`` and the log's column the value itself.

    Other tools may scale the column otherwise; and where values were clipped it is beyond every bucket.
    """
    agree = clipped or abs(high_ns - said_ns) <= max(1 << _UNIT_BITS, high_ns / 1000)
    return round(said_ns) if agree else high_ns


def _unpack_into(counts: Ints, address: int, encoded: str) -> tuple[int, int, int]:
    """Put what is encoded into counters that are all 0; which are the first and last that are not 0, and their sum.

    By the package's own routine, without the objects that it makes around it: 20 µs in place of 190. ValueError where
    it is damaged or does not fit; the counters are then 0 again.
    """
    try:
        raw = binascii.a2b_base64(encoded)
        outer, length = _OUTER.unpack_from(raw)
        data = zlib.decompress(memoryview(raw)[_OUTER.size :])
        inner, _, offset, digits, lowest, highest, _ = _INNER.unpack_from(data)
        if (outer, inner, offset, digits, lowest, highest) == _OURS and length == len(raw) - _OUTER.size:
            found = unpack(data, _INNER.size, address, _COUNTERS, counts.itemsize)
            return found["min_nonzero_index"], found["max_nonzero_index"], found["total"]
        wire = HdrHistogram(LOWEST_NS, HIGHEST_NS, DIGITS)
        wire.add(HdrHistogram.decode(encoded))
    except (
        ValueError,
        zlib.error,
        struct.error,
        HdrCookieException,
        HdrLengthException,
        LookupError,
        ArithmeticError,
    ) as error:
        counts.fill(0)
        raise ValueError(f"not a histogram of up to an hour: {error}") from error
    counts += np.frombuffer(wire.counts, dtype=np.int64)
    filled = np.flatnonzero(counts)
    return (int(filled[0]), int(filled[-1]), int(counts[filled].sum())) if filled.size else (0, 0, 0)


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


class Line(NamedTuple):
    """The same, before its histogram is decoded."""

    tag: str | None
    start_s: float
    length_s: float
    max_ns: float
    payload: str


def read_line(text: str) -> Line | None:
    """What a line of a log says; None where it is a comment. ValueError where it is no line of a log."""
    if text.startswith(("#", '"')):
        return None
    # Split, not matched: a regular expression takes 4 µs of the 25 that a line takes.
    tag, rest = None, text
    if text.startswith("Tag="):
        tag, _, rest = text[4:].partition(",")
    start, length, most, payload = rest.split(",")
    if not payload.endswith("\n"):
        raise ValueError("not a whole line")
    start_s, length_s, most_ms = float(start), float(length), float(most)
    if not abs(start_s) + abs(length_s) + abs(most_ms) < BEYOND:  # nor for nan
        raise ValueError("not a time")
    return Line(tag, start_s, length_s, most_ms * 1e6, payload)


class HlogReader:
    """Iterates over the intervals of a log whose tag is ``wanted``; ``torn`` then counts unreadable lines."""

    def __init__(self, path: Path, wanted: Callable[[str | None], bool] = lambda tag: True) -> None:
        self._path = path
        self._wanted = cache(wanted)  # a log has a dozen tags, and a line of each every second
        self.torn = 0

    def __iter__(self) -> Iterator[Interval]:
        with self._path.open(encoding="ascii", errors="replace") as lines:
            for text in lines:
                try:
                    line = read_line(text)
                    if line is None or not self._wanted(line.tag):
                        continue
                    hdr = Hdr.decode(line.payload)
                except ValueError:
                    self.torn += 1
                    continue
                if hdr.max_ns:
                    hdr.max_ns = _exact_ns(hdr.max_ns, line.max_ns, hdr.clipped)
                yield Interval(line.tag, line.start_s, line.length_s, hdr)
