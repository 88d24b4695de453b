"""Puts the files of several shards together: one run directory like any other. Counts are added, lines are joined.

Shards share one clock and one schedule, so nothing is rescaled and nothing is averaged. Memory does not grow with the
run: files are read side by side, in the order of time in which each was written.
"""

from __future__ import annotations

import heapq
import shutil
from collections import Counter
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
    found = (path for path in (folder / "shards").glob("*") if path.name.isdecimal())  # and no .DS_Store
    return sorted(found, key=lambda path: int(path.name))


def parts(folder: Path, name: str) -> list[Path]:
    """The files that hold ``name`` together, whenever a run or its merging was cut off; some may not be there."""
    merged = folder / "merged"
    if merged.exists() and not (name == SAMPLES and (merged / SIDE_BY_SIDE).exists()):
        # The merge was complete, the moving may not be.
        return [merged / name if (merged / name).exists() else folder / name]
    return [folder / name, *(shard / name for shard in shard_folders(folder))]


def merge_shards(folder: Path, started_wall_ns: int) -> dict[str, int]:
    """Merge what lies in ``folder/shards`` into ``folder`` and remove it, but for samples that are too many to join.

    Returns how many lines of which file could not be read, and are lost with that.
    The merged files are made in ``merging``; its renaming to ``merged`` is the one moment from which they count and the
    shards do not (`parts`). UsageError where the disk does not take them: then the shards stay, and are read.
    """
    shards = shard_folders(folder)
    if not shards:
        return {}
    torn = Counter[str]()
    merging, merged, samples = folder / "merging", folder / "merged", parts(folder, SAMPLES)
    shutil.rmtree(merging, ignore_errors=True)
    try:
        merging.mkdir()
        if are_joined(samples):
            torn[SAMPLES] = sum(file.torn for file in write_samples(merging / SAMPLES, samples))
        else:
            (merging / SIDE_BY_SIDE).touch()
        events = [JsonLines(folder / TELEMETRY), *(JsonLines(shard / TELEMETRY) for shard in shards)]
        _write(merging / TELEMETRY, _telemetry(events))
        torn[TELEMETRY] = sum(file.torn for file in events)
        torn[HISTOGRAMS] = add_up(parts(folder, HISTOGRAMS), started_wall_ns, merging / HISTOGRAMS)
        merging.rename(merged)
        _move(merged, folder, shards)
    except OSError as error:
        shutil.rmtree(merging, ignore_errors=True)
        raise UsageError(f"{folder}: the workers' files cannot be put together: {error.strerror}") from error
    return dict(+torn)


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


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    with path.open("wb") as out:
        out.writelines(pieces)


class JsonLines:
    """Iterates over the whole lines of a file, decoded and as they are, each of a moment, which ``moment`` names.

    ``torn`` then counts the others, as a full disk leaves them. UsageError where a line is of no moment.
    """

    moment = "t_ns"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = self.torn = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        for line in lines_of(self.path):
            self.line += 1
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                row = None
            if not isinstance(row, dict):
                self.torn += 1
                continue
            self.look_at(row)
            yield row, line if line.endswith(b"\n") else line + b"\n"

    def look_at(self, row: dict[str, Any]) -> None:
        if type(row.get(self.moment)) is not int:
            raise self.amiss(f"{self.moment} {row.get(self.moment, 'missing')}")

    def amiss(self, found: object) -> UsageError:
        """What to say of the line that was read last."""
        return UsageError(f"{self.path}:{self.line}: expected a line as loadbench run writes it, found {found}")


NEVER = float("inf")


class Requests(JsonLines):
    """Samples. ``ended`` then counts those of each level's load, and ``in_flight_ns`` is how long these took from when
    they were due, `NEVER` where one did not end."""

    moment = "done_ns"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.ended = Counter[int]()
        self.in_flight_ns: dict[int, float] = {}

    def look_at(self, row: dict[str, Any]) -> None:
        done_ns, due_ns, level = row.get("done_ns"), row.get("due_ns"), row.get("level")
        if done_ns is not None or "done_ns" not in row:
            super().look_at(row)
        if row.get("phase") != "load":
            return
        if type(level) is not int or type(due_ns) is not int:
            raise self.amiss(f"level {level}, due_ns {due_ns}")
        self.ended[level] += 1
        spent_ns = NEVER if done_ns is None else done_ns - due_ns
        self.in_flight_ns[level] = self.in_flight_ns.get(level, 0) + spent_ns


def write_samples(path: Path, samples: Sequence[Path]) -> list[Requests]:
    """All requests in the order in which they ended; what each file held."""
    files = list(map(Requests, samples))
    merged = heapq.merge(*files, key=lambda row: row[0]["done_ns"] or 0)
    _write(path, (line for _, line in merged))
    return files


def _telemetry(files: Sequence[JsonLines]) -> Iterator[bytes]:
    """The run's own events as they are, the shards' marked with whose they are: ``worker_tick``, ``"worker": 1``."""

    def marked(file: JsonLines) -> Iterator[tuple[dict[str, Any], bytes]]:
        for event, _ in file:
            mine = {**event, "event": f"worker_{event['event']}", "worker": int(file.path.parent.name)}
            yield mine, orjson.dumps(mine) + b"\n"

    own, *shards = files
    return (line for _, line in heapq.merge(own, *map(marked, shards), key=lambda row: row[0]["t_ns"]))
