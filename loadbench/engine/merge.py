"""Puts the files of several shards together: one run directory like any other. Counts are added, lines are joined.

Shards share one clock and one schedule, so nothing is rescaled and nothing is averaged. Memory does not grow with the
run: files are read side by side, in the order of time in which each was written.
"""

from __future__ import annotations

import contextlib
import heapq
import io
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from loadbench.errors import UsageError
from loadbench.hdr import Hdr, HlogReader, HlogWriter, Interval

INTERVAL_S = 1.0
"""Shards close their intervals about every second, each in its own moment: what began in one second is added up."""


def shard_folders(folder: Path) -> list[Path]:
    """Where the shards of a run write until they are merged, in their order; none in a run of one process."""
    return sorted((folder / "shards").glob("*"), key=lambda path: int(path.name))


def parts(folder: Path, name: str) -> list[Path]:
    """The files that hold ``name`` together, whenever a run or its merging was cut off."""
    merged = folder / "merged"
    if merged.exists():  # the merge was complete, the moving may not be
        return [merged / name if (merged / name).exists() else folder / name]
    return [folder / name, *(shard / name for shard in shard_folders(folder))]


def merge_shards(folder: Path, started_wall_ns: int) -> None:
    """Merge what lies in ``folder/shards`` into ``folder`` and remove it.

    The merged files are made in ``merging``; its renaming to ``merged`` is the one moment from which they count and the
    shards do not (`parts`). UsageError where the disk does not take them: then the shards stay, and are read.
    """
    shards = shard_folders(folder)
    if not shards:
        return
    merging, merged = folder / "merging", folder / "merged"
    try:
        merging.mkdir(exist_ok=True)
        _write(merging / "samples.jsonl", _samples(parts(folder, "samples.jsonl")))
        _write(merging / "telemetry.jsonl", _telemetry(folder, shards))
        _write(merging / "histograms.hlog", _histograms(parts(folder, "histograms.hlog"), started_wall_ns))
        merging.rename(merged)
        for path in list(merged.iterdir()):
            path.replace(folder / path.name)
        shutil.rmtree(folder / "shards")
        merged.rmdir()
    except OSError as error:
        shutil.rmtree(merging, ignore_errors=True)
        raise UsageError(f"{folder}: the workers' files cannot be put together: {error.strerror}") from error


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    with path.open("wb") as out:
        for piece in pieces:
            out.write(piece)


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The whole lines of a file, decoded and as they are; torn ones, as a full disk leaves them, are left out."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                with contextlib.suppress(orjson.JSONDecodeError):
                    yield orjson.loads(line), line if line.endswith(b"\n") else line + b"\n"


def _samples(paths: list[Path]) -> Iterator[bytes]:
    """All requests in the order in which they ended."""
    merged = heapq.merge(*(_lines(path) for path in paths), key=lambda row: row[0]["done_ns"] or 0)
    return (line for _, line in merged)


def _telemetry(folder: Path, shards: list[Path]) -> Iterator[bytes]:
    """The run's own events as they are, the shards' marked with whose they are: ``worker_tick``, ``"worker": 1``."""

    def marked(shard: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
        for event, _ in _lines(shard / "telemetry.jsonl"):
            mine = {**event, "event": f"worker_{event['event']}", "worker": int(shard.name)}
            yield mine, orjson.dumps(mine) + b"\n"

    sources = [_lines(folder / "telemetry.jsonl"), *(marked(shard) for shard in shards)]
    return (line for _, line in heapq.merge(*sources, key=lambda row: row[0]["t_ns"]))


def _histograms(paths: list[Path], started_wall_ns: int) -> Iterator[bytes]:
    """One interval a tag and second, counts added."""
    text = io.StringIO()
    writer = HlogWriter(text, started_wall_ns)
    readers = [HlogReader(path) for path in paths if path.exists()]
    together: dict[str, tuple[float, float, Hdr]] = {}
    second = 0
    for interval in heapq.merge(*readers, key=lambda interval: interval.start_s):
        if int(interval.start_s / INTERVAL_S) != second:
            second = int(interval.start_s / INTERVAL_S)
            yield _taken(writer, text, together)
        _add(together, interval)
    yield _taken(writer, text, together)


def _add(together: dict[str, tuple[float, float, Hdr]], interval: Interval) -> None:
    tag, end_s = interval.tag or "", interval.start_s + interval.length_s
    if tag not in together:
        together[tag] = (interval.start_s, end_s, interval.hdr)
        return
    start_s, last_s, hdr = together[tag]
    hdr.merge(interval.hdr)
    together[tag] = (start_s, max(last_s, end_s), hdr)


def _taken(writer: HlogWriter, text: io.StringIO, together: dict[str, tuple[float, float, Hdr]]) -> bytes:
    for tag, (start_s, end_s, hdr) in together.items():
        writer.write(tag, round(start_s * 1e9), round(end_s * 1e9), hdr)
    together.clear()
    data = text.getvalue().encode("ascii")
    text.seek(0)
    text.truncate()
    return data
