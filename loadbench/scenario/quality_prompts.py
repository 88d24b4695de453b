"""Reads the prompts whose answers are to be marked: what is asked, and by what an answer is judged."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadbench.errors import UsageError
from loadbench.scenario.prompts import read_prompt_file

_LISTS = ("equals", "contains", "matches")
_SHORT = {"expected": "equals", "pattern": "matches"}  # beside the prompt, without ``checks``


@dataclass(frozen=True, slots=True)
class Checks:
    """What an answer must be, by itself: one of ``equals``, all of ``contains``, and found by all of ``matches``.

    White space around an answer does not count, and case only where ``case_sensitive``.
    """

    equals: tuple[str, ...] = ()
    contains: tuple[str, ...] = ()
    matches: tuple[str, ...] = ()
    case_sensitive: bool = False

    def as_json(self) -> dict[str, Any]:
        """Without what does not apply: ``{}`` where nothing is checked."""
        told: dict[str, Any] = {name: list(getattr(self, name)) for name in _LISTS if getattr(self, name)}
        return told | ({"case_sensitive": True} if told and self.case_sensitive else {})


@dataclass(frozen=True, slots=True)
class QualityPrompt:
    """One prompt: ``place`` in its file from 0, ``id`` its own or else its number from 1."""

    place: int
    id: str
    messages: tuple[dict[str, Any], ...]
    max_tokens: int | None = None
    category: str | None = None
    aspects: tuple[str, ...] = ()
    rubric: str | None = None
    checks: Checks = Checks()


def read_quality_prompts(path: Path) -> tuple[QualityPrompt, ...]:
    """Read what ``read_prompt_file`` reads, and what is beside each prompt, in the file's order.

    Keys of an object: ``id``, ``category``, ``expected_aspects`` or ``aspects`` (texts), ``rubric``, ``checks``
    (``equals``, ``contains``, ``matches``: a text or texts; ``case_sensitive``), ``expected`` for ``equals``,
    ``pattern`` for ``matches``; others are somebody else's. Raises UsageError that names the file and the place in it.
    """
    chats = read_prompt_file(path).chats
    items = json.loads(path.read_bytes().decode("utf-8-sig"))
    items = items["prompts"] if isinstance(items, dict) else items
    prompts: list[QualityPrompt] = []
    seen: dict[str, int] = {}
    for place, (item, chat) in enumerate(zip(items, chats, strict=True)):
        where = f"{path}: [{place}]"
        said: dict[str, Any] = item if isinstance(item, dict) else {}
        name = _id(said.get("id"), place, where)
        if name in seen:
            raise UsageError(f"{where}.id: expected another one than [{seen[name]}] has, got {name!r} again")
        seen[name] = place
        aspects = next((key for key in ("expected_aspects", "aspects") if said.get(key) is not None), "aspects")
        prompts.append(
            QualityPrompt(
                place=place,
                id=name,
                messages=chat.messages,
                max_tokens=chat.max_tokens,
                category=_text(said.get("category"), f"{where}.category"),
                aspects=_texts(said.get(aspects), f"{where}.{aspects}"),
                rubric=_text(said.get("rubric"), f"{where}.rubric"),
                checks=_checks(said, where),
            )
        )
    return tuple(prompts)


def _id(value: Any, place: int, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value, f"{where}.id") or str(place + 1)


def _checks(said: dict[str, Any], where: str) -> Checks:
    given = said.get("checks") if said.get("checks") is not None else {}
    if not isinstance(given, dict):
        raise UsageError(f"{where}.checks: expected {', '.join(_LISTS)}, got {_shown(given)}")
    if unknown := next((key for key in given if key not in (*_LISTS, "case_sensitive")), None):
        raise UsageError(f"{where}.checks: expected {', '.join(_LISTS)} or case_sensitive, got {_shown(unknown)}")
    case_sensitive = given.get("case_sensitive", False)
    if not isinstance(case_sensitive, bool):
        raise UsageError(f"{where}.checks.case_sensitive: expected true or false, got {_shown(case_sensitive)}")
    lists = {name: _texts(given.get(name), f"{where}.checks.{name}") for name in _LISTS}
    for short, name in _SHORT.items():
        if said.get(short) is not None and lists[name]:
            raise UsageError(f"{where}.{short}: expected it or checks.{name}, got both")
        lists[name] = lists[name] or _texts(said.get(short), f"{where}.{short}")
    for pattern in lists["matches"]:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            problem = f"{_shown(pattern)}: {error}"
            raise UsageError(f"{where}: expected regular expressions that Python knows, got {problem}") from None
    return Checks(**lists, case_sensitive=case_sensitive)


def _text(value: Any, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where}: expected a text, got {_shown(value)}")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    """One text is a list of one."""
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and item.strip() for item in items):
        raise UsageError(f"{where}: expected a text or a list of texts, got {_shown(value)}")
    return tuple(items)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
