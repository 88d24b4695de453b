"""The checklist of a scenario as it is told: a line an answer, as each comes, or JSON at the end."""

from __future__ import annotations

import asyncio
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, Literal

import click

from loadbench.report.escape import as_line, plain

if TYPE_CHECKING:
    from rich.progress import Progress

Mark = Literal["yes", "no", "none", "unknown"]
"""As it should be; not so; the question does not apply; it cannot be told."""

SIGNS: dict[Mark, tuple[str, str, str]] = {
    "yes": ("✓", "ok", "green"),
    "no": ("✗", "NO", "red"),
    "none": ("–", "-", "bright_black"),
    "unknown": ("?", "?", "yellow"),
}
"""The sign, what stands for it where the terminal cannot show it, its colour."""

PATIENCE_S = 2.0  # what takes longer is told of while it does


@dataclass(frozen=True, slots=True)
class Item:
    """One answer. ``model`` is the name that the scenario has, None: it is about the endpoint. ``cure``: what to do."""

    model: str | None
    question: str
    mark: Mark
    told: str
    cure: str | None = None


def exit_code(items: Sequence[Item]) -> int:
    """3 as for a target that cannot be measured where an answer is no; what cannot be told holds nothing up."""
    return 3 if any(item.mark == "no" for item in items) else 0


def as_json(items: Sequence[Item]) -> dict[str, Any]:
    """``check --probe --json``. Everything is made harmless as on the terminal, where it may end up."""
    checks = [{name: value and plain(value) for name, value in asdict(item).items()} for item in items]
    return {"ok": exit_code(items) == 0, "checks": checks}


class Telling:
    """Prints each answer on stdout as it comes, or JSON at the end; on a terminal says on stderr what takes long."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.items: list[Item] = []
        self._as_json = as_json
        self._heading: str | None = None
        self._waiting: Progress | None = None
        self._timer: asyncio.TimerHandle | None = None

    def tell(self, *items: Item) -> None:
        """Several that differ in their question only take one line."""
        self.items += items
        if self._as_json:
            return
        item = replace(items[0], question=", ".join(item.question for item in items))
        heading = "Endpoint" if item.model is None else as_line(item.model)
        if heading != self._heading:
            self._heading = heading
            click.echo(_shown(f"\n{heading}"))
        click.echo(_line(item))

    def say(self, text: str | None) -> None:
        """What is waited for from now on; None: nothing is."""
        if self._timer is not None:
            self._timer.cancel()
        if self._waiting is not None:
            self._waiting.stop()
        self._timer = self._waiting = None
        if text is None or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        what = TextColumn("{task.description}", markup=False)
        self._waiting = Progress(
            SpinnerColumn(), what, TimeElapsedColumn(), console=Console(stderr=True), transient=True
        )
        self._waiting.add_task(plain(text))
        self._timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._waiting.start)

    def end(self) -> int:
        """Print what comes after the last answer; returns the exit code."""
        if self._as_json:
            import orjson

            click.echo(orjson.dumps(as_json(self.items), option=orjson.OPT_INDENT_2))
        else:
            marks = [item.mark for item in self.items]
            counted = [f"{marks.count(mark)} {_sign(mark)}" for mark in SIGNS if mark in marks]
            click.echo(_shown(f"\n{', '.join(counted)}"))
        return exit_code(self.items)


def _line(item: Item) -> str:
    """One line; on a terminal it is broken where that ends, and hangs."""
    sign, told = _sign(item.mark), f"{item.question}: {as_line(item.told)}"
    if item.cure is not None:
        told += f" → {as_line(item.cure)}"
    if not sys.stdout.isatty():
        return _shown(f"  {sign} {told}")
    width = max(40, get_terminal_size().columns - 1)
    whole = textwrap.fill(told, width, initial_indent=" " * (3 + len(sign)), subsequent_indent=" " * 6)
    coloured = sign if os.environ.get("NO_COLOR") else click.style(sign, SIGNS[item.mark][2])
    return f"  {coloured} {_shown(whole.lstrip())}"


def _sign(mark: Mark) -> str:
    sign, spelt, _ = SIGNS[mark]
    return sign if _shown(sign) == sign else spelt


def _shown(text: str) -> str:
    """The text as far as the encoding of stdout goes."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
