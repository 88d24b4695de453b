"""night.json: what became of each scenario in one night. Made, read and judged here; ``nightly`` does the running.

``results/nightly/<date>/`` holds it, index.html, and for each scenario its run (or group of runs) and what it printed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import orjson

from loadbench.analysis.compare_words import change, size
from loadbench.analysis.compared import Answer, Comparison
from loadbench.analysis.history import Commit
from loadbench.files import write_whole
from loadbench.target.processes import Born

NIGHT = "night.json"
SCHEMA = 1

State = Literal["waiting", "running", "done", "overtime", "no_room"]
Status = Literal["running", "complete", "interrupted", "cut_short"]

OUTCOMES: dict[int, str] = {
    1: "broke: a fault of loadbench, or the system",
    2: "usage or scenario wrong",
    3: "endpoint or model not servable",
    93: "target died",
    94: "result invalid",
    95: "regression",
    99: "SLO missed",
    130: "interrupted",
    0: "good",
}
"""Exit codes in words; the worst first, but for interrupted, which says nothing of the target."""

REGRESSED, INVALID, MISSED, BROKE, INTERRUPTED = 95, 94, 99, 1, 130
_WORST = (BROKE, 93, 3, 2, INVALID, REGRESSED, MISSED, INTERRUPTED, 0)


@dataclass(slots=True)
class Against:
    """The comparison with the last good night: its date, the answer, what was said of it, and its page.

    ``brief`` is the greatest change that was told from chance, or why none was; ``doubts`` what to bear in mind.
    ``changed`` is why no earlier night measured the same thing, so that this one is a new baseline; ``broke``: a fault
    of loadbench or the system kept them from being compared.
    """

    night: str | None
    answer: Answer | None
    text: str
    page: str | None = None
    brief: str | None = None
    doubts: str | None = None
    changed: str | None = None
    broke: bool = False


@dataclass(slots=True)
class Turn:
    """A scenario's in the night. ``path`` is where its run or runs are, seen from the night's folder.

    ``process`` is the run that is under way, for who finds it left behind, ``until`` when it is stopped at the latest.
    ``accepted``: what regressed is good from now on. ``is_base``: if it was good, the next night is held against it
    rather than against an earlier one; not what was measured beside something else, nor what may have got worse.
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
    until: str | None = None
    against: Against | None = None
    accepted: bool = False
    is_base: bool = True

    @property
    def is_over(self) -> bool:
        return self.state not in ("waiting", "running")

    @property
    def code(self) -> int | None:
        """As what it counts: the worse of what it exited with and what the comparison says; None: it has not ended."""
        if self.exit_code in (0, MISSED) and self.against is not None:
            if self.against.broke:
                return BROKE
            if self.against.answer == "regressed" and not self.accepted:
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
    def worst_first(self) -> list[Turn]:
        """What is bad, what has not ended, what is good; by name among equals."""
        ranks = {None: _WORST.index(0) - 0.5} | {code: float(rank) for rank, code in enumerate(_WORST)}
        return sorted(self.turns, key=lambda turn: (ranks[turn.code], turn.state != "running"))

    @property
    def took_s(self) -> float:
        """The runs together: a night that was gone on with may have lain still for hours."""
        return sum(turn.took_s or 0.0 for turn in self.turns)

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
    """The nights in which a scenario was good, or was accepted, with where its run or runs are: those first that are
    bases, then the others, each as ``earlier`` has them.

    Not only nights in which all was: one scenario that fails for weeks would leave the others without a base.
    """
    found = [
        (night, turn, night.folder / turn.path)
        for night in earlier
        for turn in night.turns
        if turn.name == name and (turn.code == 0 or turn.accepted) and turn.path
    ]
    for night, _, path in sorted(found, key=lambda one: not (one[1].is_base or one[1].accepted)):
        if path.is_dir():
            yield night, path


@dataclass(frozen=True, slots=True)
class Standing:
    """What a scenario did in the nights before. ``before`` is how it ended the last time, in ``night``.

    ``bad`` nights in a row came right before this one, from ``since`` on.
    """

    before: int | None
    night: str | None
    bad: int
    since: str | None


def standing(earlier: Sequence[Night], name: str) -> Standing:
    """``earlier`` are the nights before, the last first; those in which it was not run say nothing."""
    past = [(night.name, turn.code) for night in earlier for turn in night.turns if turn.name == name and turn.is_over]
    bad = list(takewhile(lambda one: one[1] != 0, past))
    before, night = (past[0][1], past[0][0]) if past else (None, None)
    return Standing(before, night, len(bad), bad[-1][0] if bad else None)


def against(found: Comparison, night: str, page: str | None) -> Against:
    """A comparison as the night keeps it."""
    told = [(level, row) for level in found.levels for row in level.rows if row.gates and row.answer == found.answer]
    told.sort(key=lambda one: size(one[1]), reverse=True)
    brief = None
    if found.answer == "inconclusive":
        reasons = Counter(row.because for _, row in told if row.because)
        reasons.update(line for level in found.levels if not level.rows for line in level.left_out)
        brief = reasons.most_common(1)[0][0] if reasons else None
    elif told and found.answer in ("regressed", "improved"):
        level, row = told[0]
        more = f", and {len(told) - 1} more" if told[1:] else ""
        brief = f"{row.title} at {level.load} {change(row)}{more}"
    doubts: dict[str, str] = {}
    for doubt in (doubt for level in found.levels for doubt in level.doubts):
        doubts.setdefault(doubt.partition(" in ")[0], doubt)
    return Against(night, found.answer, found.text, page, brief, "; ".join(doubts.values()) or None)
