"""Reads one streamed answer: server-sent events framed as the WHATWG page says, and what each chat chunk means.

No I/O and no clock: the caller hands in bytes and the moment they arrived. What costs is done once per answer instead
of once per token: when some content chunks have been decoded in full, the bytes around a text are remembered, and a
later event that differs from it in that text alone is a content chunk without being decoded again (`_learn` says why
that cannot misread). Everything else takes the slow path and is decoded.
"""

from __future__ import annotations

import re
from array import array
from typing import Any

import orjson

from loadbench.engine.text import KEPT_BYTES, Text
from loadbench.records import STALL_NS

EVENT_LIMIT_BYTES = 4 << 20
"""No chat chunk is this long; beyond it the answer is not a stream of events, and buffering on would eat our memory."""

_PLAIN = re.compile(rb'[^"\\\x00-\x1f\x7f]+').fullmatch  # JSON string text in which nothing is escaped and no line ends
_LINE_END = re.compile(rb"\r\n|\n|\r")
LEARN_AFTER = 4
"""Content chunks before the first template is tried: it costs as much as four chunks, and not at the first token."""

NO_TEMPLATE = b"\0"  # starts no event

_LEARN_LIMIT = 8  # templates tried per answer: a server whose chunks all differ is decoded chunk by chunk, for good


class Stream:
    """What one streamed answer has said so far. Stamps are absolute nanoseconds on the caller's clock.

    ``problem`` is None until the answer breaks its protocol or carries an error: then ``(kind, text)`` with kind
    ``error`` (the server reports one) or ``protocol`` (it makes no sense). ``stray`` is the first line that is no
    event's: the standard has us ignore it, but an answer made of nothing else deserves to be quoted. ``over``: [DONE]
    or a problem was seen, and nothing that follows can change the outcome.

    ``content`` is what was answered, ``reasoning`` what a model that thinks aloud said before it; ``answer`` is the
    first, or the second where it never came to the first (max_tokens was reached while it thought).
    """

    __slots__ = (
        "_between",
        "_buffer",
        "_data",
        "_event",
        "_gaps",
        "_learn_left",
        "_prefix",
        "_said",
        "_skip_newline",
        "_suffix",
        "chunks",
        "content",
        "done_ns",
        "finish_reason",
        "first_event_ns",
        "first_token_ns",
        "input_tokens",
        "keep_alives",
        "last_token_ns",
        "max_gap_ns",
        "output_tokens",
        "over",
        "problem",
        "reasoning",
        "stall_ns",
        "stray",
    )

    def __init__(self, gaps: array[int]) -> None:
        self._gaps = gaps
        self._buffer = b""
        self._data: list[bytes] = []
        self._event = b""
        self._skip_newline = False
        self._prefix = self._suffix = NO_TEMPLATE
        self._between = slice(0)
        self._learn_left = _LEARN_LIMIT
        self.first_event_ns: int | None = None
        self.first_token_ns: int | None = None
        self.last_token_ns: int | None = None
        self.done_ns: int | None = None
        self.max_gap_ns: int | None = None
        self.stall_ns = 0
        self.chunks = 0
        self.content = Text()
        self._said = self.content.said  # a call less per chunk
        self.reasoning = Text()
        self.keep_alives = 0
        self.finish_reason: str | None = None
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self.problem: tuple[str, str] | None = None
        self.stray: str | None = None
        self.over = False

    def feed(self, data: bytes, now_ns: int) -> None:
        """Take bytes of the body, in any cut, that arrived at ``now_ns``."""
        if not (self._buffer or self._data or self._event or self._skip_newline):
            if data.startswith(self._prefix) and self._took_content_alone(data):
                self._token(now_ns)
                return
            if data.startswith(b"data: ") and data.find(b"\n") == len(data) - 2 and data.endswith(b"\n\n"):
                self._event_alone(data, now_ns)
                return
        if self._skip_newline:  # the last read ended in CR: an LF now belongs to it
            self._skip_newline = False
            data = data.removeprefix(b"\n")
        self._buffer += data
        self._lines(now_ns)
        if len(self._buffer) + sum(map(len, self._data)) > EVENT_LIMIT_BYTES:
            self._fail("protocol", f"an event of more than {EVENT_LIMIT_BYTES >> 20} MiB")
            self._buffer, self._data = b"", []

    def end(self, now_ns: int) -> None:
        """The body ended: a last event without its empty line still counts (servers omit it after [DONE])."""
        if self._buffer:
            self._line(self._buffer, now_ns)
            self._buffer = b""
        self._dispatch(now_ns)

    @property
    def answer(self) -> Text:
        """What an answer's hash is of."""
        return self.content or self.reasoning

    def _took_content_alone(self, data: bytes) -> bool:
        """Whether what starts like the template is a content chunk and nothing else; then its text is taken."""
        if not data.endswith(self._suffix):
            return False
        text = data[self._between]
        if _PLAIN(text) is None or not (text.isascii() or _is_utf8(text)):
            return False
        said = self._said
        said += text
        if len(said) > KEPT_BYTES:
            self.content.let_go()
        return True

    def _event_alone(self, event: bytes, now_ns: int) -> None:
        """A read that is one event on one line, as nearly all are: no need to look for lines in it."""
        if b"\r" in event:
            self._buffer = event
            self._lines(now_ns)
            return
        chunks = self.chunks
        self._understand(event[6:-2], b"", now_ns)
        if self._learn_left and self.chunks > chunks >= LEARN_AFTER:
            self._learn(event)

    def _token(self, now_ns: int) -> None:
        last = self.last_token_ns
        if last is None:
            self.first_token_ns = now_ns
        else:
            gap = now_ns - last
            self._gaps.append(gap)
            if self.max_gap_ns is None or gap > self.max_gap_ns:
                self.max_gap_ns = gap
            if gap > STALL_NS:
                self.stall_ns += gap
        self.last_token_ns = now_ns
        self.chunks += 1

    def _lines(self, now_ns: int) -> None:
        buffer, start = self._buffer, 0
        if self.first_event_ns is None and buffer.startswith(b"\xef\xbb\xbf"):
            start = 3
        self._skip_newline = buffer.endswith(b"\r")
        for match in _LINE_END.finditer(buffer, start):
            self._line(buffer[start : match.start()], now_ns)
            start = match.end()
        self._buffer = buffer[start:]

    def _line(self, line: bytes, now_ns: int) -> None:
        if not line:
            self._dispatch(now_ns)
            return
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
        elif field == b"":
            self.keep_alives += 1
        elif field == b"event":
            self._event = value.strip()
        elif field not in (b"id", b"retry") and self.stray is None:
            self.stray = readable(line)

    def _dispatch(self, now_ns: int) -> None:
        name, self._event = self._event, b""
        if not self._data:
            return
        payload = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data = []
        self._understand(payload, name, now_ns)

    def _understand(self, payload: bytes, name: bytes, now_ns: int) -> None:
        """Take the data of one event of that name."""
        if self.first_event_ns is None:
            self.first_event_ns = now_ns
        if payload == b"[DONE]":
            if self.done_ns is None:
                self.done_ns = now_ns
            self.over = True
            return
        try:
            chunk = orjson.loads(payload)
        except orjson.JSONDecodeError:
            self._fail("error" if name == b"error" else "protocol", readable(payload))
            return
        if name == b"error":
            self._fail("error", error_text(chunk) or readable(payload))
        else:
            self._chunk(chunk, payload, now_ns)

    def _chunk(self, chunk: Any, payload: bytes, now_ns: int) -> None:
        answer = read_answer(chunk, "delta")
        if answer is None:
            text = error_text(chunk)
            self._fail("error" if text is not None else "protocol", text or readable(payload))
            return
        if answer.has_content:
            self._token(now_ns)
            if answer.content:
                self.content.add(answer.content.encode())
            elif answer.reasoning:
                self.reasoning.add(answer.reasoning.encode())
        if answer.finish_reason is not None:
            self.finish_reason = answer.finish_reason
        if answer.output_tokens is not None:
            self.input_tokens, self.output_tokens = answer.input_tokens, answer.output_tokens

    def _learn(self, event: bytes) -> None:
        """Remember the bytes around the text of a content chunk, if an event that shares them can be nothing else.

        ``event`` is one event on one line. The text is found by value, replaced by a marker, and the result decoded:
        only when that gives the same object with the marker as ``choices[0].delta.content``, and this chunk carries
        neither finish_reason nor usage, are the bytes before and after the text kept. An event that shares them to the
        letter, with unescaped string text between, then decodes to the same object with another text: a content chunk.
        With several choices in one chunk that text would not be all that it says.
        """
        self._learn_left -= 1
        try:
            chunk = orjson.loads(event[6:])
            (choice,) = chunk["choices"]
            text = choice["delta"]["content"]
        except (ValueError, LookupError, TypeError):  # a JSONDecodeError is a ValueError
            return
        if not isinstance(text, str) or not text or choice.get("finish_reason") or chunk.get("usage"):
            return
        spelt = orjson.dumps(text)
        start = event.rfind(spelt) + 1
        prefix, suffix = event[:start], event[start + len(spelt) - 2 :]
        choice["delta"]["content"] = marker = "\N{SNOWMAN}"
        try:
            same = start > 0 and orjson.loads((prefix + marker.encode() + suffix)[6:]) == chunk
        except orjson.JSONDecodeError:
            return
        if same:
            self._prefix, self._suffix = prefix, suffix
            self._between = slice(len(prefix), -len(suffix))

    def _fail(self, kind: str, text: str) -> None:
        if self.problem is None:
            self.problem = (kind, text)
        self.over = True


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class Answer:
    """What one chat completion object, whole or a chunk, says."""

    __slots__ = ("content", "finish_reason", "has_content", "input_tokens", "output_tokens", "reasoning")

    def __init__(self) -> None:
        self.has_content = False
        self.content = ""
        self.reasoning = ""
        self.finish_reason: str | None = None
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None


def read_answer(document: Any, part: str) -> Answer | None:
    """Read a chat completion; ``part`` is ``delta`` in a stream, ``message`` else. None: it is not one, or an error."""
    if not isinstance(document, dict) or document.get("error"):
        return None
    choices, usage = document.get("choices"), document.get("usage")
    if not isinstance(choices, list) and not isinstance(usage, dict):
        return None
    answer = Answer()
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict):
            return None
        said = choice.get(part)
        if isinstance(said, dict):
            if content := said.get("content"):
                answer.has_content = True
                if isinstance(content, str):
                    answer.content += content
            elif reasoning := said.get("reasoning_content") or said.get("reasoning"):
                answer.has_content = True
                if isinstance(reasoning, str):
                    answer.reasoning += reasoning
            elif said.get("tool_calls"):
                answer.has_content = True
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            answer.finish_reason = reason
    if isinstance(usage, dict):
        answer.input_tokens = _count(usage.get("prompt_tokens"))
        answer.output_tokens = _count(usage.get("completion_tokens"))
    return answer


def _count(value: Any) -> int | None:
    """A token count, None for what cannot be one: a server may say anything, and 2**62 tokens would be summed up."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else None


def error_text(document: Any) -> str | None:
    """The message of an error document in any of its usual shapes, or None where it is no error document."""
    if not isinstance(document, dict):
        return None
    error = document.get("error")
    if isinstance(error, dict):
        parts = [str(error[key]) for key in ("message", "type", "code") if error.get(key)]
        return readable(": ".join(parts[:2]).encode("utf-8", "replace")) if parts else "an error without a message"
    text = error or document.get("detail") or document.get("message")
    return readable(str(text).encode("utf-8", "replace")) if text else None


def readable(body: bytes, limit: int = 500) -> str:
    """The start of what a server sent, as text fit for one line of a log: data, never markup or control characters."""
    text = body[: limit * 4].decode("utf-8", "replace")
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
