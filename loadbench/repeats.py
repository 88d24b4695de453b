"""One run, or the same several times: each has a directory, and where it is ours a target, of its own.

Only whole runs can be told from chance: what a service is like differs from start to start, and stays so for as long as
it lives.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from loadbench.errors import UsageError
from loadbench.order import Order
from loadbench.report.live import choose_view
from loadbench.runner import Run

Tell = Callable[..., int]
"""Reports a directory, ``quiet`` or not, and says with which exit code its run ends."""

Execute = Callable[[Callable[[], Coroutine[Any, Any, str]], Callable[[str], bool]], object]
"""Runs the first in the event loop, and calls the second at Ctrl-C."""

WORST_FIRST = (130, 93, 3, 94, 99)
INTERRUPTED = 130


def run_all(order: Order, execute: Execute, tell: Tell, *, quiet: bool, as_json: bool = False) -> int:
    """Run and report as often as the scenario says; returns the worst exit code. An interrupted run is the last."""

    def one(out: Path | None) -> Path:
        the_run = Run(replace(order, out=out), choose_view(quiet=quiet, keep=not sys.stdout.isatty()))
        execute(the_run.execute, the_run.stop)
        return the_run.folder

    times = order.loaded.scenario.repeat
    if times == 1:
        return tell(one(order.out))
    group, codes = _group(order), list[int]()
    try:
        for number in range(1, times + 1):
            if not quiet:
                click.echo(f"loadbench: run {number} of {times}", err=True)
            codes.append(tell(one(group / str(number)), quiet=True))
            if codes[-1] == INTERRUPTED:
                break
    finally:
        with contextlib.suppress(OSError):  # nothing was measured
            group.rmdir()
    tell_group(group, quiet=quiet, as_json=as_json)
    return worst(codes)


def report_all(directory: Path, tell: Tell, *, quiet: bool, as_json: bool = False) -> int:
    """Report a run, or every run of a group and then the group; returns the worst exit code."""
    from loadbench.analysis.group import runs_in

    if (directory / "run.json").exists() or not directory.is_dir():
        return tell(directory)
    codes = [tell(run, quiet=True) for run in runs_in(directory)]
    tell_group(directory, quiet=quiet, as_json=as_json)
    return worst(codes)


def tell_group(group: Path, *, quiet: bool, as_json: bool) -> None:
    """How the figures of a group scatter from run to run, in its report.md and on stdout, unless that is for JSON."""
    from loadbench.analysis.compare import repeated
    from loadbench.analysis.group import load, runs_in
    from loadbench.report.repeats import print_group, write_group

    runs = load(runs_in(group))
    figures = repeated(runs)
    write_group(runs, figures, group)
    if not as_json:
        print_group(runs, figures, group, quiet=quiet)


def worst(codes: list[int]) -> int:
    """The exit code of several runs."""
    return next((code for code in WORST_FIRST if code in codes), max(codes, default=0))


def _group(order: Order) -> Path:
    """The directory of the group: the one asked for, new or empty, or one named for the time and the scenario."""
    stamp = datetime.fromtimestamp(time.time(), UTC).strftime("%Y%m%dT%H%M%SZ")
    name = f"{stamp}-{order.loaded.scenario.name}"
    names = [order.out] if order.out is not None else [order.results / name]
    names += [] if order.out is not None else [order.results / f"{name}-{attempt}" for attempt in range(2, 100)]
    for folder in names:
        try:
            folder.mkdir(parents=True, exist_ok=order.out is not None)
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"{folder}: cannot be made: {error.strerror}") from error
        if not any(folder.iterdir()):
            return folder
    raise UsageError(f"--out {names[0]}: expected a new or an empty directory")
