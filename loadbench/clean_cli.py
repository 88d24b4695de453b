"""The command ``clean``: removes old run directories, and nothing else.

What is no run directory stays, whatever it is, and so does what a baseline names, what is still being written, and each
scenario's last good night, which the next one is compared with.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import orjson

from loadbench.analysis.night import good, nights
from loadbench.errors import UsageError
from loadbench.report.escape import plain
from loadbench.report.words import count, octets

BASELINE = "baseline"
RUN_FILES = ("run.json", "samples.jsonl")
IDLE_S = 3600.0  # a run that writes its telemetry every second is over, whatever it says


@dataclass(frozen=True, slots=True)
class Found:
    """A run directory, or one that holds nothing but such: the repeats of one run. ``started`` sorts by time."""

    path: Path
    started: str


@click.command("clean")
@click.option("--keep", type=click.IntRange(0), default=30, show_default=True, metavar="N", help="So many stay.")
@click.option("--results", default="results", show_default=True, type=click.Path(path_type=Path), help="Where.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def clean_command(keep: int, results: Path, dry_run: bool) -> None:
    """Remove all but the last N runs from the results folder, and the runs of all but the last N nights.

    The repeats of one run count as one. What RESULTS/baseline names stays: a text file, or a folder of such, with a
    path a line, as seen from the results or from here, or a link to a run. So does history.jsonl, with all its rows,
    and every night's page.
    """
    if not results.is_dir():
        raise UsageError(f"{results}: expected the folder of the results, found none")
    old = _runs(results)[keep:]
    known = nights(results / "nightly")
    old += [run for night in known[keep:] for run in _runs(night.folder)]
    stays = dict.fromkeys(_bases(results), "its last good night") | dict.fromkeys(_named(results), "a baseline")
    freed_bytes, removed = 0, 0
    for run in old:
        if why := _kept(run.path, stays):
            click.echo(f"kept     {plain(run.path)}: {why}")
            continue
        size_bytes = sum(file.lstat().st_size for file in run.path.rglob("*") if not file.is_dir())
        click.echo(f"{'would remove' if dry_run else 'removed '} {plain(run.path)}")
        if not dry_run:
            try:
                shutil.rmtree(run.path)
            except OSError as error:
                raise UsageError(f"{run.path}: cannot be removed: {error.strerror}") from error
        freed_bytes, removed = freed_bytes + size_bytes, removed + 1
    click.echo(f"{count(removed, 'directory') if removed == 1 else f'{removed} directories'}, {octets(freed_bytes)}")


def _runs(folder: Path) -> list[Found]:
    """The runs right below a folder, the last first; links are somebody else's."""
    found = []
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_dir():
            continue
        started = [_started(path)] if _started(path) else [_started(run) for run in _group(path)]
        if started and (first := started[0]):
            found.append(Found(path, first))
    return sorted(found, key=lambda run: run.started, reverse=True)


def _group(path: Path) -> list[Path]:
    """The runs in it, if it holds nothing but runs, numbered, and files; else none."""
    folders = [below for below in path.iterdir() if below.is_dir() or below.is_symlink()]
    ours = all(not run.is_symlink() and run.name.isdecimal() and _started(run) for run in folders)
    return sorted(folders) if ours else []


def _started(path: Path) -> str | None:
    """When the run in this directory began; None: it is none of ours."""
    try:
        if not all((path / name).is_file() for name in RUN_FILES):
            return None
        facts = orjson.loads((path / "run.json").read_bytes())
        return str(facts["started"]) if facts["schema"] and facts["loadbench"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _named(results: Path) -> set[Path]:
    """What a baseline names: a run that it is or links to, or one of each line of a text, or any of these in a folder.

    UsageError where it cannot be read, or names what is not there: then nobody knows what may go.
    """
    place = results / BASELINE
    if not os.path.lexists(place):
        return set()
    if place.is_dir() and not _is_run(place):
        return {path for below in sorted(place.iterdir()) for path in _of_baseline(below, results)}
    return _of_baseline(place, results)


def _is_run(path: Path) -> bool:
    return path.is_dir() and bool(_started(path) or _group(path))


def _of_baseline(place: Path, results: Path) -> set[Path]:
    if _is_run(place):
        return {place.resolve()}
    named = set()
    try:
        lines = place.read_text(encoding="utf-8-sig").splitlines()
        for number, line in enumerate(map(str.strip, lines), 1):
            if line and not line.startswith("#"):
                forms = (line, re.split(r"\s+#", line)[0])  # a comment after it; but a name may hold a # of its own
                there = {path.resolve() for form in forms for path in (results / form, Path(form)) if path.exists()}
                if not there:
                    raise UsageError(f"{place}: line {number}: expected a path that is there, got {line}")
                named |= there
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in a path
        raise UsageError(f"{place}: expected a text with a path a line, found {error}") from error
    return named


def _bases(results: Path) -> set[Path]:
    """The run of the last good night of each scenario."""
    known = nights(results / "nightly")
    names = dict.fromkeys(turn.name for night in known for turn in night.turns)
    return {path.resolve() for name in names for path in _first(path for _, path in good(known, name))}


def _first(paths: Iterator[Path]) -> list[Path]:
    return [path for path in [next(paths, None)] if path is not None]


def _kept(path: Path, stays: Mapping[Path, str]) -> str | None:
    """Why it stays; None: it may go."""
    real = path.resolve()
    for other, why in stays.items():
        if real == other or real in other.parents or other in real.parents:
            return why
    newest_s = max((file.lstat().st_mtime for file in path.rglob("*")), default=0.0)
    return "it may be going on" if _is_going(path) and time.time() - newest_s < IDLE_S else None


def _is_going(path: Path) -> bool:
    for run in (path, *path.glob("*/")):
        try:
            if orjson.loads((run / "run.json").read_bytes())["status"] == "running":
                return True
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return False
