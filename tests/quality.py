"""Answers, marks and judgements as they lie in a run directory, for the tests of what is made of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from loadbench.engine.text import hash_of

FIRST, SECOND = "phi-4-mini:3", "qwen2.5-0.5b:4"
JUDGE = "judge-model:1"


def answer(model: str, place: int, text: str = "An answer.", repeat: int = 0, **more: Any) -> dict[str, Any]:
    """A line of answers.jsonl."""
    return {
        "model": model,
        "kind": "quality",
        "place": place,
        "id": f"p{place + 1}",
        "category": None,
        "repeat": repeat,
        "messages": [{"role": "user", "content": f"Question {place + 1}?"}],
        "answer": text,
        "answer_hash": hash_of(text),
        "outcome": "ok",
        "detail": None,
        "finish_reason": "stop",
        "output_tokens": 3,
        "e2e_ms": 12.5,
        "aspects": [],
        "rubric": None,
        "checks": {},
    } | more


def mark(said: dict[str, Any], number: int, rater: str = "ann") -> dict[str, Any]:
    """A line of marks.jsonl about an answer."""
    return _key(said) | {"mark": number, "note": None, "rater": rater, "at": "2026-11-22T21:00:00+00:00"}


def judgement(said: dict[str, Any], number: int | None, outcome: str = "ok", judge: str = JUDGE) -> dict[str, Any]:
    """A line of judgements.jsonl about an answer."""
    return _key(said) | {"judge": judge, "mark": number, "reason": "so it is", "outcome": outcome, "said": "{…}"}


def _key(said: dict[str, Any]) -> dict[str, Any]:
    return {name: said[name] for name in ("model", "id", "repeat", "answer_hash")}


def put(folder: Path, name: str, rows: Iterable[dict[str, Any]]) -> Path:
    """Write such a file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return folder
