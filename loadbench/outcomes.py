"""What can happen to a request: one row each, with the texts it is recognised by and what a user can do about it.

To add an outcome, add a row. Order matters where patterns overlap: the first row that matches an error text wins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """One thing that can happen to a request.

    ``pattern`` is searched, without regard to case, in the error text that the server sent (None: never told from a
    text). ``advice`` is what the reader can do.
    """

    name: str
    meaning: str
    advice: str
    pattern: re.Pattern[str] | None = None


def _row(name: str, meaning: str, advice: str, pattern: str | None = None) -> Outcome:
    return Outcome(name, meaning, advice, re.compile(pattern, re.IGNORECASE) if pattern else None)


OUTCOMES: dict[str, Outcome] = {
    row.name: row
    for row in (
        _row("ok", "finished: a finish_reason and the end of the stream were seen", ""),
        _row(
            "context_exceeded",
            "prompt and max_tokens do not fit the model's context",
            "shorten the prompts or lower max_tokens",
            r"maximum context length|context (window|length|size).{0,40}(exceed|overflow)|exceeds? the .{0,12}context",
        ),
        _row(
            "engine_capacity",
            "the engine made no progress for want of cache blocks",
            "restart the service: this state does not heal; lower concurrency × max_tokens",
            r"capacity made no progress",
        ),
        _row(
            "out_of_memory",
            "the server could not allocate memory",
            "lower concurrency, max_tokens or the model's size",
            r"could not allocate|failed to allocate|out of memory|CUDA failure 2\b|bad_alloc|insufficient memory",
        ),
        _row(
            "model_not_loaded",
            "the model is known but not loaded",
            "load it first, for example with `foundry model load`",
            r"model\b.{0,120}\bnot loaded",
        ),
        _row(
            "model_not_found",
            "the endpoint does not know the model",
            "name an exact id that the endpoint lists",
            r"model\b.{0,120}(not found|does not exist|not exist)|unknown model|no such model",
        ),
        _row(
            "engine_failed",
            "the engine reported a failure of its own",
            "read the service's log",
            r"onnxruntime|genai engine|generation failed|inference failed|engine (error|failed|failure)|CUDA failure",
        ),
        _row("http_4xx", "the server refused the request", "read the detail in samples.jsonl"),
        _row("http_5xx", "the server failed", "read the service's log"),
        _row("stream_error", "an error event came inside a stream with HTTP 200", "read the detail in samples.jsonl"),
        _row("truncated", "the stream ended without finish_reason or [DONE]", "the server died or was cut off"),
        _row("empty", "the stream was complete but held no content", "check the chat template and max_tokens"),
        _row("protocol", "the answer was not what the protocol allows", "check that the base URL is the API's"),
        _row("connect_refused", "no connection could be made", "check that the service runs and the port"),
        _row("connection_lost", "the connection broke before the answer was complete", "the server died or reset it"),
        _row("first_token_deadline", "no token came before the first-token deadline", "raise it, or lower the load"),
        _row("total_deadline", "the answer was not complete before the total deadline", "raise it, or lower the load"),
        _row("dropped", "never sent: max_in_flight was reached", "raise max_in_flight or lower the rate"),
        _row("censored", "unfinished when the level's drain ended", "give the level more time"),
    )
}


_STARVED = re.compile(r"Resource temporarily unavailable", re.IGNORECASE)


def is_starved(text: str) -> bool:
    """Whether an error text speaks of memory if there is a limit at which allocations fail, and else of who knows what.

    No thread can be started then either, for want of its stack. Elsewhere that may mean a limit of threads.
    """
    return _STARVED.search(text) is not None


def classify(text: str, otherwise: str) -> str:
    """Name the outcome that an error text speaks of, or ``otherwise`` where no row recognises it."""
    for row in OUTCOMES.values():
        if row.pattern is not None and row.pattern.search(text):
            return row.name
    return otherwise
