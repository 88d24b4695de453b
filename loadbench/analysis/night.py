"""night.json: what became of each scenario in one night. Made, read and judged here; ``nightly`` does the running.

``results/nightly/<date>/`` holds it, index.html, and for each scenario its run (or group of runs) and what it printed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from loadbench.analysis.compared import Answer
from loadbench.analysis.history import Commit
from loadbench.files import write_whole
from loadbench.target.processes import Born

NIGHT = "night.json"
SCHEMA = 1

State = Literal["waiting", "running", "done", "overtime", "no_room"]
Status = Literal["running", "complete", "interrupted", "cut_short"]

OUTCOMES: dict[int, str] = {
    1: "broke: a fault of loadbench, or the system",
    2: "usage or scenario",
    3: "endpoint or model not servable",
    93: "target died",
    94: "result invalid",
    95: "regression",
    99: "SLO missed",
    130: "interrupted",
    0: "good",
}
"""Exit codes in words; the worst first, but for interrupted, which says nothing of the target."""

REGRESSED, INVALID, BROKE, INTERRUPTED = 95, 94, 1, 130
_WORST = (BROKE, 93, 3, 2, INVALID, REGRESSED, 99, INTERRUPTED, 0)


@dataclass(slots=True)
class Against:
    """The comparison with the last good night: its date, the answer, what was said of it, and its page."""

    night: str | None
    answer: Answer | None
    text: str
    page: str | None = None


@dataclass(slots=True)
class Turn:
    """A scenario's in the night. ``path`` is where its run or runs are, seen from the night's folder.

    ``process`` is the run that is under way, for who finds it left behind. ``accepted``: what regressed is good from
    now on.
    """

    name: str
    file: str
    state: State = "waiting"
    exit_code: int | None = None
    why: str | None = None
    took_s: float | None = None
    path: str | None = None
    log: str | None = None
    process: Born | None = None
    against: Against | None = None
    accepted: bool = False

    @property
    def is_over(self) -> bool:
        return self.state not in ("waiting", "running")

    @property
    def code(self) -> int | None:
        """As what it counts: what it exited with, or what that stands for; None: it has not ended."""
        regressed = self.against is not None and self.against.answer == "regressed"
        if self.exit_code == 0 and regressed and not self.accepted:
            return REGRESSED
        if self.exit_code is None or self.exit_code in OUTCOMES:
            return self.exit_code
        return BROKE


@dataclass(slots=True)
class Night:
    """One night; ``folder`` is where it is kept. ``commit`` is what the working tree was at."""

    folder: Path
    started: str
    scenarios: str
    commit: str | None
    dirty: bool | None
    status: Status = "running"
    ended: str | None = None
    turns: list[Turn] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def code(self) -> int:
        """The exit code of all: the worst; 130 where it was interrupted before anything worse was known."""
        codes = [turn.code for turn in self.turns if turn.code is not None]
        if self.status in ("interrupted", "cut_short"):
            codes.append(INTERRUPTED)
        return worst(codes)

    @property
    def at(self) -> Commit | None:
        return None if self.commit is None else Commit(self.commit, bool(self.dirty))

    def write(self) -> None:
        """UsageError where the disk does not take it."""
        kept = {name: value for name, value in asdict(self).items() if name != "folder"}
        data = orjson.dumps({"schema": SCHEMA, **kept, "exit_code": self.code}, option=orjson.OPT_INDENT_2)
        write_whole(self.folder / NIGHT, data + b"\n")


def worst(codes: Sequence[int]) -> int:
    """Of several exit codes; 0 of none."""
    return next((code for code in _WORST if code in codes), BROKE if codes else 0)


def read_night(folder: Path) -> Night | None:
    """The night in this folder; None where there is none, or none that can be read."""
    try:
        found = orjson.loads((folder / NIGHT).read_bytes())
        if found.pop("schema") != SCHEMA:
            return None
        found.pop("exit_code")
        turns = [_turn(turn) for turn in found.pop("turns")]
        return Night(folder=folder, turns=turns, **found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _turn(found: dict[str, Any]) -> Turn:
    against, process = found.pop("against"), found.pop("process")
    return Turn(
        **found,
        process=None if process is None else Born(**process),
        against=None if against is None else Against(**against),
    )


def nights(root: Path) -> list[Night]:
    """Every night below ``root``, the last first."""
    found = (read_night(folder) for folder in root.iterdir()) if root.is_dir() else ()
    return sorted((night for night in found if night is not None), key=lambda night: night.started, reverse=True)


def good(earlier: Sequence[Night], name: str) -> Iterator[tuple[Night, Path]]:
    """The nights in which a scenario was good, as ``earlier`` has them, with where its run or runs are.

    Not only nights in which all was: one scenario that fails for weeks would leave the others without a base.
    """
    for night in earlier:
        for turn in night.turns:
            if turn.name == name and turn.code == 0 and turn.path and (night.folder / turn.path).is_dir():
                yield night, night.folder / turn.path
