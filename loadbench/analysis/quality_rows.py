"""Reads answers, marks and judgements of a run directory, a JSON line each. What they say is ``quality``'s job.

A line that was cut off, or makes no sense, is left out: marking goes on while a run is being made, and by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson

from loadbench.scenario.quality_prompts import Checks

ANSWERS, MARKS, JUDGEMENTS = "answers.jsonl", "marks.jsonl", "judgements.jsonl"
LOWEST, HIGHEST = 1, 5

Key = tuple[str, str, int]
"""An answer's model, its prompt's id and its repeat."""

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model answered to one prompt, with all that marking it takes; ``hash`` None: there is no text."""

    model: str
    place: int
    id: str
    category: str | None
    repeat: int
    messages: tuple[Mapping[str, Any], ...]
    text: str
    hash: str | None
    outcome: str
    detail: str | None
    finish_reason: str | None
    aspects: tuple[str, ...]
    rubric: str | None
    checks: Checks

    @property
    def key(self) -> Key:
        return self.model, self.id, self.repeat

    @property
    def can_be_marked(self) -> bool:
        return self.outcome == "ok" and bool(self.text.strip())


@dataclass(frozen=True, slots=True)
class Mark:
    """What one rater made of an answer."""

    key: Key
    hash: str | None
    mark: int
    note: str | None
    rater: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a second model made of it: ``outcome`` is ok, malformed, refused or failed, ``mark`` None but where ok."""

    key: Key
    hash: str | None
    judge: str
    mark: int | None
    reason: str | None
    outcome: str
    said: str


def answers(folder: Path) -> list[Answer]:
    """Every answer once, the last where one was given again, prompt by prompt in the order of their file."""
    found = {answer.key: answer for answer in _rows(folder / ANSWERS, _answer)}
    return sorted(found.values(), key=lambda answer: (answer.place, answer.repeat))  # stable: models as they came


def marks(folder: Path) -> list[Mark]:
    """Every rater's last mark of every answer."""
    return list({(mark.key, mark.rater): mark for mark in _rows(folder / MARKS, _mark)}.values())


def judgements(folder: Path) -> list[Judgement]:
    """Every judge's last word on every answer."""
    return list({(said.key, said.judge): said for said in _rows(folder / JUDGEMENTS, _judgement)}.values())


def _rows(path: Path, read: Callable[[dict[str, Any]], Row]) -> Iterator[Row]:
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for line in lines:
        try:
            row = orjson.loads(line)
            if isinstance(row, dict):
                yield read(row)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # half a line, or somebody else's


def _answer(row: dict[str, Any]) -> Answer:
    given = {name: tuple(map(str, row["checks"].get(name) or ())) for name in ("equals", "contains", "matches")}
    return Answer(
        model=str(row["model"]),
        place=int(row["place"]),
        id=str(row["id"]),
        category=_optional(row.get("category")),
        repeat=int(row["repeat"]),
        messages=tuple(dict(message) for message in row["messages"]),
        text=row["answer"] if isinstance(row["answer"], str) else "",
        hash=_optional(row.get("answer_hash")),
        outcome=str(row["outcome"]),
        detail=_optional(row.get("detail")),
        finish_reason=_optional(row.get("finish_reason")),
        aspects=tuple(map(str, row.get("aspects") or ())),
        rubric=_optional(row.get("rubric")),
        checks=Checks(**given, case_sensitive=row["checks"].get("case_sensitive") is True),
    )


def _mark(row: dict[str, Any]) -> Mark:
    mark = in_range(row["mark"])
    if mark is None:
        raise ValueError("no mark")
    return Mark(_key(row), _optional(row.get("answer_hash")), mark, _optional(row.get("note")), str(row["rater"]))


def _judgement(row: dict[str, Any]) -> Judgement:
    mark, outcome = in_range(row.get("mark")), str(row["outcome"])
    if (outcome == "ok") != (mark is not None):
        raise ValueError("a mark or an outcome that says why there is none")
    return Judgement(
        key=_key(row),
        hash=_optional(row.get("answer_hash")),
        judge=str(row["judge"]),
        mark=mark,
        reason=_optional(row.get("reason")),
        outcome=outcome,
        said=str(row.get("said") or ""),
    )


def in_range(mark: object) -> int | None:
    """The mark where it is a whole number from 1 to 5."""
    return mark if type(mark) is int and LOWEST <= mark <= HIGHEST else None


def _key(row: dict[str, Any]) -> Key:
    return str(row["model"]), str(row["id"]), int(row["repeat"])


def _optional(value: object) -> str | None:
    return None if value is None else str(value)
