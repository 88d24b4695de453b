"""Which runs a directory holds: one, or those of a group, which are in directories of their own below it.

A group needs no file that says so: who puts runs into one directory makes one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadbench.analysis.rundir import read
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Summary
from loadbench.errors import UsageError


@dataclass(frozen=True, slots=True)
class Loaded:
    """A run with what is told about it. Its samples are let go: ten runs of a million would fill a small machine.

    ``facts`` are what run.json says.
    """

    path: Path
    facts: dict[str, Any]
    summary: Summary


def runs_in(path: Path) -> tuple[Path, ...]:
    """The run directories at or right below ``path``, 2 before 10. UsageError where there are none."""
    if (path / "run.json").exists():
        return (path,)
    found = [below.parent for below in path.glob("*/run.json")] if path.is_dir() else []
    if not found:
        raise UsageError(f"{path}: expected a run directory, or one that holds such, found no run.json")
    return tuple(sorted(found, key=lambda run: _natural(run.name)))


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers by their value, the rest by its letters."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.findall(r"\d+|\D+", name)]


def load(paths: Iterable[Path]) -> tuple[Loaded, ...]:
    """The runs, read and summarised anew: whichever version measured them, one has made all their numbers."""
    return tuple(map(_load, paths))


def _load(path: Path) -> Loaded:
    run = read(path)
    return Loaded(path, run.facts, summarise(run))
