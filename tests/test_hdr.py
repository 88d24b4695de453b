"""Histograms: the same counts as the package's own, and a log that the world's tools read."""

from __future__ import annotations

import base64
import io
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader

from loadbench.hdr import (
    DIGITS,
    HIGHEST_NS,
    LARGEST_NS,
    LOWEST_NS,
    Hdr,
    HlogReader,
    HlogWriter,
    Ints,
    Line,
    Room,
    make_tag,
    split_tag,
)

STARTED_NS = 1_763_820_000_123_000_000  # 2025-11-22T14:00:00.123Z
JAR = Path("/usr/share/java/hdrhistogram.jar")


def lognormal(count: int, seed: int = 1) -> Ints:
    """Some 24 ms, with a tail to seconds."""
    return np.random.default_rng(seed).lognormal(17, 1, count).astype(np.int64)


def filled(values: Ints) -> Hdr:
    hdr = Hdr()
    hdr.add(values)
    return hdr


def record_value_counts(values: Ints) -> Ints:
    """The counts that the package's own record_value leaves."""
    histogram = HdrHistogram(LOWEST_NS, HIGHEST_NS, DIGITS)
    for value in values:
        assert histogram.record_value(int(value))
    return np.array(histogram.counts, dtype=np.int64)


def test_counts_equal_record_value_bit_for_bit_on_random_values() -> None:
    values = np.concatenate([lognormal(3_000), np.random.default_rng(2).integers(0, LARGEST_NS, 3_000)])
    assert np.array_equal(filled(values)._counts, record_value_counts(values))


def test_counts_equal_record_value_bit_for_bit_at_every_bucket_edge() -> None:
    powers = 1 << np.arange(42, dtype=np.int64)
    edges = np.array([0, 511, 512, LOWEST_NS, HIGHEST_NS, LARGEST_NS], dtype=np.int64)
    values = np.unique(np.concatenate([powers - 1, powers, powers + 1, edges]))
    assert np.array_equal(filled(values)._counts, record_value_counts(values))


def test_added_values_accumulate_over_batches() -> None:
    values = lognormal(1_000)
    hdr = filled(values[:400])
    hdr.add(values[400:])
    hdr.add(values[:0])
    assert hdr.total == 1_000
    assert np.array_equal(hdr._counts, filled(values)._counts)
    assert (hdr.min_ns, hdr.max_ns) == (values.min(), values.max())


def test_what_does_not_fit_is_counted_in_the_nearest_bucket_and_as_clipped() -> None:
    hdr = filled(np.array([-5, 1_000_000, LARGEST_NS + 1, 1 << 60], dtype=np.int64))
    assert (hdr.total, hdr.clipped) == (4, 3)
    assert (hdr.min_ns, hdr.max_ns) == (-5, 1 << 60)
    assert (hdr._counts[0], hdr._counts[-1]) == (1, 2)
    assert Hdr.decode(hdr.encode()).clipped == 2


def test_an_empty_histogram_has_no_values() -> None:
    hdr = Hdr()
    assert (hdr.percentile(50), hdr.mean_ns, hdr.min_ns, hdr.max_ns, hdr.total) == (None, None, None, None, 0)
    assert Hdr.decode(hdr.encode()).total == 0


def test_a_reset_histogram_is_empty() -> None:
    hdr = filled(lognormal(10))
    hdr.reset()
    assert (hdr.total, hdr.clipped, hdr.min_ns, hdr.max_ns, hdr.percentile(50)) == (0, 0, None, None, None)
    assert not hdr._counts.any()


@pytest.mark.parametrize("percent", [0.1, 50, 90, 99, 99.9, 100])
def test_a_percentile_is_the_nearest_rank_to_three_digits(percent: float) -> None:
    values = np.sort(lognormal(1_000))
    exact = values[int(np.ceil(round(percent * 10, 6))) - 1]
    found = filled(values).percentile(percent)
    assert found is not None
    assert exact <= found <= exact * 1.001


def test_the_mean_is_within_a_thousandth() -> None:
    values = lognormal(10_000)
    assert filled(values).mean_ns == pytest.approx(values.mean(), rel=1e-3)


def test_merging_adds_counts() -> None:
    first, second = lognormal(500, seed=1), lognormal(700, seed=2)
    merged = filled(first)
    merged.merge(filled(second))
    both = filled(np.concatenate([first, second]))
    assert np.array_equal(merged._counts, both._counts)
    assert (merged.total, merged.min_ns, merged.max_ns) == (both.total, both.min_ns, both.max_ns)


def test_decoding_gives_back_what_was_encoded() -> None:
    hdr = filled(lognormal(5_000))
    again = Hdr.decode(hdr.encode())
    assert np.array_equal(again._counts, hdr._counts)
    again.add(lognormal(10))
    assert again.total == 5_010


@pytest.mark.parametrize("end", [-9, 40, 0])
def test_a_damaged_histogram_is_refused(end: int) -> None:
    with pytest.raises(ValueError, match="not a histogram"):
        Hdr.decode(filled(lognormal(100)).encode()[:end])


def test_a_line_is_added_bit_for_bit_as_what_it_decodes_to(tmp_path: Path) -> None:
    wide = np.concatenate([lognormal(2_000), np.random.default_rng(3).integers(0, LARGEST_NS, 50)])
    clipped = np.array([-5, 1_000_000, 1 << 60], dtype=np.int64)
    foreign = HdrHistogram(1, 10**9, 2)
    for value in (5_000, 70_000, 900_000_000):
        foreign.record_value(value)
    ours = [filled(values).encode() for values in (lognormal(1_000), wide, clipped, wide[:1])]
    room, added, merged = Room(), Hdr(), Hdr()
    for payload in (*ours, foreign.encode().decode("ascii"), Hdr().encode()):
        added.add_line(Line("gap.chat.L0", 0.0, 1.0, 0.0, payload), room)
        merged.merge(Hdr.decode(payload))
        assert not room.counts.any()
    assert np.array_equal(added._counts, merged._counts)
    assert (added.total, added.clipped, added.min_ns) == (merged.total, merged.clipped, merged.min_ns)


@pytest.mark.parametrize("end", [-9, 40, 0])
def test_a_damaged_line_adds_nothing_and_leaves_no_trace(end: int) -> None:
    room, hdr = Room(), filled(lognormal(100))
    with pytest.raises(ValueError, match="not a histogram"):
        hdr.add_line(Line(None, 0.0, 1.0, 0.0, filled(lognormal(100)).encode()[:end]), room)
    assert hdr.total == 100 and not room.counts.any()


@pytest.mark.parametrize("counters", [b"\xff" * 3, b"\x81" * 12, b"\x02" * 30_000])
def test_counters_that_cannot_be_are_refused(counters: bytes) -> None:
    raw = base64.b64decode(filled(lognormal(10)).encode())
    packed = zlib.compress(zlib.decompress(raw[8:])[:40] + counters)
    encoded = base64.b64encode(raw[:4] + len(packed).to_bytes(4, "big") + packed).decode("ascii")
    with pytest.raises(ValueError, match="not a histogram"):
        Hdr.decode(encoded)


def test_a_tag_survives_any_kind_of_prompt() -> None:
    for kind in ("chat", "a,b c", "per.cent%", "zwölf\n"):
        tag = make_tag("gap", kind, 12)
        assert not set(tag) & set(", \r\n")
        assert tag.isascii()
        assert split_tag(tag) == ("gap", kind, 12)
    assert split_tag("somebody.else") is None


def write_log(path: Path) -> dict[str, list[Hdr]]:
    """Three intervals of two tags."""
    written: dict[str, list[Hdr]] = {make_tag("gap", "chat", 0): [], make_tag("ttft_service", "a b", 3): []}
    with path.open("w", encoding="ascii") as out:
        writer = HlogWriter(out, STARTED_NS)
        for second in range(3):
            for number, (tag, hdrs) in enumerate(written.items()):
                hdrs.append(filled(lognormal(2_000, seed=10 * second + number)))
                writer.write(tag, second * 10**9, (second + 1) * 10**9, hdrs[-1])
        writer.write("gap.empty.L0", 0, 10**9, Hdr())
    return written


def test_the_log_reads_back_tag_times_counts_and_exact_maximum(tmp_path: Path) -> None:
    written = write_log(tmp_path / "h.hlog")
    reader = HlogReader(tmp_path / "h.hlog")
    intervals = list(reader)
    assert reader.torn == 0
    assert [(i.tag, i.start_s, i.length_s) for i in intervals] == [(tag, s, 1.0) for s in range(3) for tag in written]
    for interval in intervals:
        hdr = written[str(interval.tag)][int(interval.start_s)]
        assert np.array_equal(interval.hdr._counts, hdr._counts)
        assert interval.hdr.max_ns == hdr.max_ns


def test_the_log_is_read_by_tag(tmp_path: Path) -> None:
    write_log(tmp_path / "h.hlog")
    only = list(HlogReader(tmp_path / "h.hlog", lambda tag: tag == "gap.chat.L0"))
    assert len(only) == 3


def test_torn_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "h.hlog"
    write_log(path)
    lines = path.read_text(encoding="ascii").splitlines(keepends=True)
    lines[5] = lines[5][:200] + "\n"
    path.write_text("".join(lines)[:-100], encoding="ascii")
    reader = HlogReader(path)
    assert len(list(reader)) == 4
    assert reader.torn == 2


def test_the_packages_own_reader_reads_the_log(tmp_path: Path) -> None:
    written = write_log(tmp_path / "h.hlog")
    reader = HistogramLogReader(str(tmp_path / "h.hlog"), HdrHistogram(LOWEST_NS, HIGHEST_NS, DIGITS))
    for second in range(3):
        for tag, hdrs in written.items():
            histogram = reader.get_next_interval_histogram()
            assert histogram.get_tag() == tag
            assert histogram.get_start_time_stamp() == STARTED_NS // 10**6 + 1_000 * second
            assert np.array_equal(np.array(histogram.counts, dtype=np.int64), hdrs[second]._counts)
    assert reader.get_next_interval_histogram() is None


@pytest.fixture(scope="module")
def java() -> list[str]:
    """The command that runs Java with HdrHistogram."""
    program = shutil.which("java")
    if program is None or not JAR.exists():
        pytest.skip(f"needs java and {JAR} (Debian: default-jre-headless libhdrhistogram-java)")
    return [program, "-cp", str(JAR)]


def test_java_reads_our_log_and_we_read_javas(tmp_path: Path, java: list[str]) -> None:
    written = write_log(tmp_path / "ours.hlog")
    source = Path(__file__).with_name("HdrCheck.java")
    command = [*java, str(source), str(tmp_path / "ours.hlog"), str(tmp_path / "theirs.hlog")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    expected = [(tag, second, hdrs[second]) for second in range(3) for tag, hdrs in written.items()]
    expected += [(str(i.tag), int(i.start_s), i.hdr) for i in HlogReader(tmp_path / "theirs.hlog")]
    assert len(printed) == len(expected) == 8
    for line, (tag, second, hdr) in zip(printed, expected, strict=True):
        java_tag, start_ms, length_ms, count, *values = line.split("\t")
        assert (java_tag, int(start_ms), int(length_ms)) == (tag, STARTED_NS // 10**6 + 1_000 * second, 1_000)
        assert int(count) == hdr.total
        for percent, value in zip((0.1, 50, 95, 99.9, 100), values, strict=True):
            found = hdr.percentile(percent)
            assert found is not None
            if tag == "gap.java.L1":  # two digits there, three here
                assert found == pytest.approx(int(value), rel=0.01)
            else:  # Java tells the maximum's bucket, we the maximum
                assert min(int(value), hdr.max_ns or 0) == found


def test_the_hgrm_is_what_javas_log_processor_prints(tmp_path: Path, java: list[str]) -> None:
    written = write_log(tmp_path / "ours.hlog")
    tag, hdrs = next(iter(written.items()))
    processor = ["org.HdrHistogram.HistogramLogProcessor", "-i", str(tmp_path / "ours.hlog"), "-tag", tag]
    subprocess.run([*java, *processor, "-o", str(tmp_path / "out")], check=True, capture_output=True)
    merged = Hdr()
    for hdr in hdrs:
        merged.merge(hdr)
    ours = io.StringIO()
    merged.write_hgrm(ours)
    theirs = (tmp_path / "out.hgrm").read_text(encoding="ascii").split("\n", 2)[2]
    # Java rounds halves up, Python to even: the last digit may differ.
    places = (1e-3, 1e-12, 0, 1e-2)
    for mine, javas in zip(ours.getvalue().splitlines(), theirs.splitlines(), strict=True):
        if mine.startswith("#") or not mine or "Value" in mine:
            assert mine == javas
            continue
        for number, java_number, place in zip(mine.split(), javas.split(), places, strict=False):
            assert float(number) == pytest.approx(float(java_number), rel=0, abs=1.1 * place)


def test_the_hgrm_of_an_empty_histogram_has_no_rows() -> None:
    out = io.StringIO()
    Hdr().write_hgrm(out)
    assert len([line for line in out.getvalue().splitlines() if line and line[0] != "#"]) == 1
