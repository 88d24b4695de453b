"""What the scripted endpoint can do wrong: one row a fault, and the outcome that an honest client gives it.

To add a fault, add a row; ``fake_answer`` turns it into bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal


class End(Enum):
    """How an answer ends: as it should, with a FIN or an RST in the middle, or never."""

    COMPLETE = "complete"
    FIN = "fin"
    RESET = "reset"
    HANG = "hang"


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to go wrong. Every field but the first three keeps to the honest answer unless the row says otherwise.

    ``outcome`` is what this request should be called, ``later`` what those after it should. With ``status`` the answer
    is that and ``text`` in a JSON error, or ``body`` as it stands; but where ``in_stream``, a stream has status 200 and
    ``text`` comes as an event. "some" content is the script's ``fault_after`` tokens. ``event`` is an event's payload
    and ``raw`` bytes outside any framing, both sent after the content.
    """

    name: str
    outcome: str
    meaning: str
    status: int = 200
    text: str | None = None
    in_stream: bool = False
    event_line: bytes = b""
    headers: str = ""
    body: bytes | None = None
    event: bytes | None = None
    raw: bytes | None = None
    head: Literal["at_once", "slow", "none"] = "at_once"
    role: bool = True
    content: Literal["all", "some", "none", "endless"] = "all"
    pause: bool = False
    finish: bool = True
    done: bool = True
    end: End = End.COMPLETE
    gzip: bool = False
    byte_by_byte: bool = False
    server: Literal["lives", "refuses", "crashes"] = "lives"
    later: str = "ok"

    @property
    def label(self) -> str | None:
        """The name in the log; None where nothing goes wrong."""
        return None if self is HONEST else self.name


def _row(name: str, outcome: str, meaning: str, **ways: Any) -> Fault:
    return Fault(name, outcome, meaning, **ways)


def _error(name: str, outcome: str, status: int, text: str, **ways: Any) -> Fault:
    return Fault(name, outcome, f"HTTP {status} with the error's text in JSON", status=status, text=text, **ways)


def _error_event(name: str, outcome: str, status: int, text: str, **ways: Any) -> Fault:
    """An error that comes to a stream as an event under HTTP 200; ``status`` is what a request without stream gets."""
    ways = {"content": "none", "role": False, **ways}
    meaning = f"a stream of status 200 with an error event and no [DONE]; HTTP {status} without stream"
    return Fault(name, outcome, meaning, status=status, text=text, in_stream=True, finish=False, done=False, **ways)


# The texts of Foundry Local 2.2.1, seen, but for those marked (made up).
_CONTEXT = (
    "search_options.cc:108 int fl::ValidateGeneratorRequestBudget(int64_t, int, int) request requires 4005 total "
    "tokens (4002 input + 3 output), which exceeds the model's maximum context length of 2048 tokens"
)
_MEMORY = (
    "Could not allocate the key-value cache buffer of size 1073741824. Try reducing the max_length requested"  # (size)
)
_CAPACITY = "ORT GenAI Engine capacity made no progress for 30000 ms"
_FAILED = "onnxruntime: Non-zero status code returned while running GroupQueryAttention node"  # (made up)
_BUFFER = "SSE stream buffer limit exceeded"
_GARBAGE = b"\x16\x03\x01\x00\xff\xfe garbage \x00\r\n\r\n"
_HTML = b"<!DOCTYPE html><html><head><title>Welcome</title></head><body>It works!</body></html>"

FAULTS: dict[str, Fault] = {
    row.name: row
    for row in (
        _error("context_exceeded", "context_exceeded", 400, f"Invalid request: {_CONTEXT}"),
        _error_event("context_exceeded_stream", "context_exceeded", 400, _CONTEXT),
        _error("out_of_memory", "out_of_memory", 500, _MEMORY),
        _error_event("out_of_memory_stream", "out_of_memory", 500, _MEMORY),
        _error("engine_capacity", "engine_capacity", 500, _CAPACITY),
        _error_event("engine_capacity_stream", "engine_capacity", 500, _CAPACITY, role=True),
        _error("engine_failed", "engine_failed", 500, _FAILED),
        _error_event("engine_failed_stream", "engine_failed", 500, _FAILED, content="some", role=True),
        _error("model_not_found", "model_not_found", 404, "Model not found: No model matching 'fake'"),
        _error(
            "model_not_loaded", "model_not_loaded", 400,
            "Model not loaded: Model 'fake' must be loaded before inference",
        ),
        _error("http_4xx", "http_4xx", 429, "Rate limit reached, try again later", headers="Retry-After: 1\r\n"),
        _error("http_5xx", "http_5xx", 503, "The server is busy"),
        _error_event("stream_error", "stream_error", 500, _BUFFER, content="some", role=True),
        _error_event(
            "stream_error_event", "stream_error", 500, _BUFFER, content="some", role=True, event_line=b"event: error\n"
        ),
        _row("protocol", "protocol", "bytes that are no HTTP, then a FIN", head="none", role=False, content="none",
             raw=_GARBAGE, finish=False, done=False, end=End.FIN),
        _row("protocol_html", "protocol", "a web page with status 200", body=_HTML),
        _row("protocol_json", "protocol", "an event that is no JSON, after some tokens", content="some",
             event=b'{"choices":[{"delta":{"content":'),
        _row("protocol_framing", "protocol", "bytes that are no chunk, after some tokens", content="some", raw=_GARBAGE,
             finish=False, done=False, end=End.FIN),
        _row("redirect", "protocol", "302 to another host", status=302, body=b"",
             headers="Location: http://127.0.0.1:9/v1/chat/completions\r\n"),
        _row("gzip", "protocol", "a compressed body that nobody asked for", gzip=True),
        _row("empty", "empty", "finish_reason and [DONE], and no content", content="none"),
        _row("truncated", "truncated", "all tokens and [DONE], no finish_reason", finish=False),
        _row("truncated_no_done", "truncated", "all tokens and finish_reason, no [DONE]", done=False),
        _row("truncated_short", "truncated", "some tokens, then a clean end of the body", content="some", finish=False,
             done=False),
        _row("connection_lost", "connection_lost", "an RST after some tokens", content="some", finish=False, done=False,
             end=End.RESET),
        _row("connection_lost_close", "connection_lost", "a FIN after some tokens; truncated if close-delimited",
             content="some", finish=False, done=False, end=End.FIN),
        _row("connection_lost_early", "connection_lost", "an RST before the first byte", content="none", head="none",
             role=False, finish=False, done=False, end=End.RESET),
        _row("refused", "ok", "answers, stops listening, closes every idle connection", server="refuses",
             later="connect_refused"),
        _row("crash", "connection_lost", "an RST on every connection, and nobody listens any more", content="some",
             finish=False, done=False, end=End.RESET, server="crashes", later="connect_refused"),
        _row("first_token_deadline", "first_token_deadline", "never a token; keep-alives go on", content="none",
             end=End.HANG),
        _row("total_deadline", "total_deadline", "tokens for ever", content="endless"),
        _row("total_deadline_stall", "total_deadline", "some tokens, then silence for ever", content="some",
             end=End.HANG),
        _row("stall", "ok", "a pause of stall_ms after some tokens", pause=True),
        _row("slow_headers", "ok", "a header line every 20 ms", head="slow"),
        _row("split_writes", "ok", "a write a byte, 50 µs apart, after slow headers", head="slow", byte_by_byte=True),
    )
}  # fmt: skip

HONEST = Fault("none", "ok", "as it should be")
