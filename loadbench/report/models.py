"""How models are listed and how a download is followed: a table and a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

from loadbench.report.escape import as_line
from loadbench.report.words import NONE, clock, octets
from loadbench.target.models import ModelInfo

if TYPE_CHECKING:
    from rich.progress import Progress

HEADINGS = ("alias", "id", "device", "provider", "size", "licence", "can", "state")
NARROW = 110  # columns
LINE_EVERY_S = 5.0  # in a pipe
SPEED_WINDOW_S = 10.0  # of a download: the runtime tells of pieces of 2 MiB


def state(model: ModelInfo) -> str:
    """Where it is: loaded, in the cache, or online, to be downloaded; n/a where the server tells none of it."""
    if model.loaded:
        return "loaded"
    if model.cached is not None:
        return "cached" if model.cached else "online"
    return NONE if model.loaded is None else "not loaded"


def as_json(model: ModelInfo) -> dict[str, Any]:
    """One model of ``models list --json``; what is not known is null."""
    return {
        "alias": model.alias,
        "id": model.id,
        "device": model.device,
        "execution_provider": model.execution_provider,
        "size_bytes": model.size_bytes,
        "licence": model.licence,
        "capabilities": list(model.capabilities),
        "cached": model.cached,
        "loaded": model.loaded,
        "path": None if model.path is None else str(model.path),
    }


def _cells(model: ModelInfo, where: str) -> list[str]:
    provider = (model.execution_provider or NONE).removesuffix("ExecutionProvider")
    can = ", ".join(model.capabilities) or NONE
    told = (model.alias or NONE, model.id, model.device or NONE, provider, octets(model.size_bytes))
    return [as_line(cell) for cell in (*told, model.licence or NONE, can, where)]


def print_models(models: Sequence[tuple[ModelInfo, str]]) -> None:
    """Each with its state. In a pipe one line a model, fields apart by tabs, headed by their names.

    A narrow terminal has alias, what it can and id in one column, the id, which is long, in a line of its own.
    """
    rows = [_cells(*row) for row in models]
    if not sys.stdout.isatty():
        for cells in (HEADINGS, *rows):
            click.echo("\t".join(cells))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, headings, gap = Console(), list(HEADINGS), 1
    if console.width < NARROW:
        gap = 0
        headings = ["model", *HEADINGS[2:6], "state"]
        rows = [[f"{alias}: {can}\n  {id_}", *cells, where] for alias, id_, *cells, can, where in rows]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, gap, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold")
    for cells in rows:
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


class Pace:
    """What the percents of a download say: how much there is, at what rate, how long it will take still."""

    def __init__(self, size_bytes: int | None) -> None:
        self._size_bytes = size_bytes
        self._marks: deque[tuple[float, float]] = deque()  # when, and at what percent

    def told(self, percent: float, now_s: float) -> list[str]:
        """Share, bytes, rate, time left; what cannot be known yet is left out."""
        marks = self._marks
        if marks and percent < marks[-1][1]:  # it has begun anew
            marks.clear()
        marks.append((now_s, percent))
        while len(marks) > 2 and marks[1][0] < now_s - SPEED_WINDOW_S:
            marks.popleft()
        since_s, since = marks[0]
        parts = [f"{percent:.0f} %"]
        if self._size_bytes is not None:
            parts.append(f"{octets(self._size_bytes * percent / 100)} of {octets(self._size_bytes)}")
        if now_s > since_s and percent > since:
            speed = (percent - since) / (now_s - since_s)
            parts += [] if self._size_bytes is None else [f"{octets(self._size_bytes * speed / 100)}/s"]
            parts.append(f"{clock((100 - percent) / speed)} left")
        return parts


class Download:
    """Follows one download on stderr: a bar on a terminal, a line now and then in a pipe."""

    def __init__(self, model_id: str, size_bytes: int | None) -> None:
        self._name, self._pace = as_line(model_id), Pace(size_bytes)
        self._told_s = monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            text = TextColumn("{task.fields[told]}", markup=False)
            self._bar = Progress(BarColumn(20), text, console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=100.0, told=self._name)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, percent: float) -> None:
        now = monotonic()
        told = f"{self._name}  " + ", ".join(self._pace.told(percent, now))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=percent, told=told)
        elif now - self._told_s >= LINE_EVERY_S:
            self._told_s = now
            click.echo(told, err=True)

    def say(self, told: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(as_line(told), markup=False, highlight=False)
        else:
            click.echo(as_line(told), err=True)
