"""Puts the files of several shards together: one run directory like any other. Counts are added, lines are joined.

Shards share one clock and one schedule, so nothing is rescaled and nothing is averaged. Memory does not grow with the
run: files are read side by side, in the order of time in which each was written.
"""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from loadbench.engine.sums import add_up
from loadbench.errors import UsageError
from loadbench.files import lines_of

SAMPLES, TELEMETRY, HISTOGRAMS = "samples.jsonl", "telemetry.jsonl", "histograms.hlog"

MOST_JOINED_BYTES = 1 << 30
"""Samples of more than this are not written once more: they stay in ``shards/0/samples.jsonl`` and so on, and are read
side by side. A gigabyte takes some ten seconds to join, and who has more of them has them on many machines."""

SIDE_BY_SIDE = "side-by-side"
"""A file that says so of the samples while the merged files are being moved."""


def shard_folders(folder: Path) -> list[Path]:
    """Where the shards of a run write until they are merged, in their order; none in a run of one process."""
    return sorted((folder / "shards").glob("*"), key=lambda path: int(path.name))


def parts(folder: Path, name: str) -> list[Path]:
    """The files that hold ``name`` together, whenever a run or its merging was cut off; some may not be there."""
    merged = folder / "merged"
    if merged.exists() and not (name == SAMPLES and (merged / SIDE_BY_SIDE).exists()):
        # The merge was complete, the moving may not be.
        return [merged / name if (merged / name).exists() else folder / name]
    return [folder / name, *(shard / name for shard in shard_folders(folder))]


def merge_shards(folder: Path, started_wall_ns: int) -> None:
    """Merge what lies in ``folder/shards`` into ``folder`` and remove it, but for samples that are too many to join.

    The merged files are made in ``merging``; its renaming to ``merged`` is the one moment from which they count and the
    shards do not (`parts`). UsageError where the disk does not take them: then the shards stay, and are read.
    """
    shards = shard_folders(folder)
    if not shards:
        return
    merging, merged, samples = folder / "merging", folder / "merged", parts(folder, SAMPLES)
    shutil.rmtree(merging, ignore_errors=True)
    try:
        merging.mkdir()
        if are_joined(samples):
            write_samples(merging / SAMPLES, samples)
        else:
            (merging / SIDE_BY_SIDE).touch()
        _write(merging / TELEMETRY, _telemetry(folder, shards))
        add_up(parts(folder, HISTOGRAMS), started_wall_ns, merging / HISTOGRAMS)
        merging.rename(merged)
        _move(merged, folder, shards)
    except OSError as error:
        shutil.rmtree(merging, ignore_errors=True)
        raise UsageError(f"{folder}: the workers' files cannot be put together: {error.strerror}") from error


def _move(merged: Path, folder: Path, shards: Sequence[Path]) -> None:
    """Have the merged files where a run's files are, and the shards' no more."""
    for path in list(merged.iterdir()):
        if path.name != SIDE_BY_SIDE:
            path.replace(folder / path.name)
    if (merged / SIDE_BY_SIDE).exists():
        for path in [path for shard in shards for path in shard.iterdir() if path.name != SAMPLES]:
            path.unlink()
    else:
        shutil.rmtree(folder / "shards")
    shutil.rmtree(merged.rename(folder / "merging"))


def are_joined(samples: Sequence[Path]) -> bool:
    """Whether these become one file."""
    return sum(path.stat().st_size for path in samples if path.exists()) <= MOST_JOINED_BYTES


def write_samples(path: Path, samples: Sequence[Path]) -> None:
    """All requests in the order in which they ended."""
    merged = heapq.merge(*map(json_lines, samples), key=lambda row: row[0]["done_ns"] or 0)
    _write(path, (line for _, line in merged))


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    with path.open("wb") as out:
        out.writelines(pieces)


def json_lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The whole lines of a file, decoded and as they are; torn ones, as a full disk leaves them, are left out."""
    for line in lines_of(path):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        yield row, line if line.endswith(b"\n") else line + b"\n"


def _telemetry(folder: Path, shards: list[Path]) -> Iterator[bytes]:
    """The run's own events as they are, the shards' marked with whose they are: ``worker_tick``, ``"worker": 1``."""

    def marked(shard: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
        for event, _ in json_lines(shard / TELEMETRY):
            mine = {**event, "event": f"worker_{event['event']}", "worker": int(shard.name)}
            yield mine, orjson.dumps(mine) + b"\n"

    sources = [json_lines(folder / TELEMETRY), *(marked(shard) for shard in shards)]
    return (line for _, line in heapq.merge(*sources, key=lambda row: row[0]["t_ns"]))
