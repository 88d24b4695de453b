"""Notes a run in the history of its results folder, with the commit that the working tree was at when it began."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import click
import orjson

from loadbench.analysis.history import HISTORY, Commit, row
from loadbench.analysis.provenance import hash_of
from loadbench.analysis.rundir import read_facts
from loadbench.analysis.summary import Summary
from loadbench.files import add_line
from loadbench.report.escape import as_line

PATIENCE_S = 5.0  # git looks at every tracked file


def _warn(line: str) -> None:
    click.echo(as_line(f"loadbench: {line}"), err=True)


class Chronicle:
    """Of a results folder. Made when a run begins: by its end the working tree may be at another commit."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.commit = working_tree(Path())

    def note(self, folder: Path, summary: Summary, code: int, warn: Callable[[str], None] = _warn) -> None:
        """Add a row for the run in ``folder``, if it went to the results or below; what fails ``warn`` is only told.

        A run that was sent elsewhere is somebody's own affair: it has no row.
        """
        try:
            path = folder.resolve().relative_to(self.results.resolve()).as_posix()
        except ValueError:
            return
        file = self.results / HISTORY
        line = orjson.dumps(row(summary, hash_of(read_facts(folder)), self.commit, code, path))
        try:
            add_line(file, line)
        except OSError as error:
            warn(f"{file}: the run is not noted: {error.strerror or error}")


def working_tree(folder: Path) -> Commit | None:
    """The commit that is checked out there, and whether tracked files differ; None: no repository, or no git."""
    head = _git(folder, "rev-parse", "--verify", "HEAD")
    if not head:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return Commit(head, dirty=changed != "")


def _git(folder: Path, *words: str) -> str | None:
    """What git answers; None where it fails. It takes no lock that would disturb another, and starts nothing."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
