"""Asks a model the prompts whose answers are to be marked, one after another, and keeps what it answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from loadbench.errors import UsageError
from loadbench.records import Prompt

if TYPE_CHECKING:
    from loadbench.engine.crew import Crew
    from loadbench.scenario.quality_prompts import QualityPrompt

PHASE = KIND = "quality"
"""Of the samples, which count in no figure, and of the prompts."""

Write = Callable[[dict[str, Any]], None]


async def collect(
    crew: Crew,
    model: str,
    prompts: Sequence[QualityPrompt],
    repeats: int,
    max_tokens: int,
    write: Write,
    *,
    level: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """Ask each prompt, in the order of its file, so often; ``write`` gets a line of answers.jsonl for each answer.

    ``max_tokens`` is for prompts that do not state their own. ``progress`` is called before each request with how many
    are done, and of how many. A stop of the crew ends it. Returns how many answers came.
    """
    good = 0
    asked = [(repeat, prompt) for repeat in range(repeats) for prompt in prompts]
    for done, (repeat, prompt) in enumerate(asked):
        if crew.stop_reason is not None:
            break
        progress(done, len(asked))
        said = Prompt(KIND, done, prompt.messages, prompt.max_tokens or max_tokens, prompt.place)
        answer = await crew.ask(said, PHASE, level)
        sample = answer.sample
        good += sample.outcome == "ok"
        e2e_ns = (
            None if sample.last_token_ns is None or sample.sent_ns is None else sample.last_token_ns - sample.sent_ns
        )
        write(
            {
                "model": model,
                "kind": KIND,
                "place": prompt.place,
                "id": prompt.id,
                "category": prompt.category,
                "repeat": repeat,
                "messages": prompt.messages,
                "answer": answer.text,
                "answer_hash": sample.answer_hash,
                "outcome": sample.outcome,
                "detail": sample.detail,
                "finish_reason": sample.finish_reason,
                "output_tokens": sample.output_tokens,
                "e2e_ms": None if e2e_ns is None else e2e_ns / 1e6,
                "aspects": prompt.aspects,
                "rubric": prompt.rubric,
                "checks": prompt.checks.as_json(),
            }
        )
    return good


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line to a file of JSON lines, at once: seconds lie between two of them. UsageError: it cannot be written.

    Half a line that a killed process left is ended first.
    """
    try:
        with path.open("a+b") as file:
            torn = b""
            if file.seek(0, 2):
                file.seek(-1, 2)
                torn = b"" if file.read(1) == b"\n" else b"\n"
            file.write(torn + orjson.dumps(dict(row)) + b"\n")
    except OSError as error:
        raise UsageError(f"{path}: expected a file that can be written, found {error.strerror}") from error
