"""The bytes of the scripted endpoint's answers, and when each is due. Sending them is ``fake``'s job.

The events are those of Foundry Local 2.2.1, key for key.
"""

from __future__ import annotations

import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import orjson

from loadbench.target.fake_faults import End, Fault
from loadbench.target.fake_script import Script

WORDS = (
    b" amber", b" birch", b" cedar", b" delta", b" ember", b" frost", b" grove", b" heron",
    b" ivory", b" jolly", b" karst", b" lemon", b" maple", b" north", b" ocean", b" pearl",
)  # fmt: skip
"""Token i says word i modulo 16. All are of one length, so all content events are."""

NOW = 0
"""Due as soon as what comes before it is sent."""

SLOW_LINE_NS = 20_000_000
SLOW_BYTE_NS = 50_000
LAST_CHUNK = b"0\r\n\r\n"
KEEP_ALIVE = b": keep-alive\n\n"
STARTED = int(time.time())  # the wall clock, for `created` alone

Step = tuple[int, bytes | End, int]
"""When it is due, in ns since the service began; what is sent, or how it ends; and how many tokens that holds."""


class Framing:
    """Wraps the payloads of one body for the wire."""

    def __init__(self, chunked: bool, gzip: bool) -> None:
        self._chunked = chunked
        self._pack = zlib.compressobj(wbits=zlib.MAX_WBITS | 16) if gzip else None

    def __call__(self, payload: bytes, last: bool = False) -> bytes:
        if self._pack is not None:
            payload = self._pack.compress(payload) + self._pack.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)
        if self._chunked:
            payload = b"%X\r\n%b\r\n" % (len(payload), payload) if payload else b""
            return payload + LAST_CHUNK if last else payload
        return payload


@dataclass(slots=True)
class Ask:
    """A request that was understood, with what was drawn for it. ``stretch`` tells how much slower sharing makes it.

    ``tokens`` is the most that it may have. A ``text`` has a token a word; without one the answer has them all.
    """

    script: Script
    fault: Fault
    seq: int
    model: str
    stream: bool
    tokens: int
    finish_reason: str
    input_tokens: int
    include_usage: bool
    close: bool
    jitter_ns: int
    stretch: Callable[[], float]
    text: str | None = None
    pieces: tuple[bytes, ...] = field(init=False)
    frame: Framing = field(init=False)
    after: bytes = field(init=False)

    def __post_init__(self) -> None:
        words = [] if self.text is None else re.findall(r"\s*\S+|\s+$", self.text)
        self.pieces = tuple(orjson.dumps(word)[1:-1] for word in words)
        if self.text is not None and (self.finish_reason == "stop" or len(words) <= self.tokens):
            self.tokens, self.finish_reason = len(words), "stop"
        self.frame = Framing(self.stream and self.script.framing == "chunked", self.fault.gzip)
        kind = b"chat.completion.chunk" if self.stream else b"chat.completion"
        self.after = b'"created":%d,"id":"chatcmpl-%d","model":%b,"object":"%b","system_fingerprint":null' % (
            STARTED,
            self.seq,
            orjson.dumps(self.model),
            kind,
        )

    @property
    def status(self) -> int:
        """The HTTP status of the answer."""
        return 200 if self.fault.in_stream and self.stream else self.fault.status

    def head(self) -> bytes:
        """Status line and headers of a stream, sent with its first bytes; nothing where the fault deals with them."""
        return b"" if self.fault.head != "at_once" else self._head()

    def role(self) -> bytes:
        """The role-only first event; nothing where there is none."""
        if not self.fault.role or self.script.role_chunk == "none" or not self.stream:
            return b""
        return self.frame(self._event(b'{"content":"","role":"assistant"}', b"null"))

    def steps(self) -> Iterator[Step]:
        """Everything the service sends, in order. It ends with the body, or with how the connection does."""
        steps = self._streamed() if self.stream else self._whole()
        return _byte_by_byte(steps) if self.fault.byte_by_byte else steps

    def _head(self, content_length: int | None = None) -> bytes:
        lines = "HTTP/1.1 200 OK\r\nServer: loadbench-fake\r\n"
        if self.stream:
            lines += "Content-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
            lines += "Transfer-Encoding: chunked\r\n" if self.script.framing == "chunked" else ""
        else:
            lines += f"Content-Type: application/json\r\nContent-Length: {content_length}\r\n"
        lines += "Content-Encoding: gzip\r\n" if self.fault.gzip else ""
        lines += "Connection: close\r\n" if self.close else ""
        return lines.encode() + b"\r\n"

    def _event(self, delta: bytes, finish_reason: bytes) -> bytes:
        return b'data: {"choices":[{"delta":%b,"finish_reason":%b,"index":0,"logprobs":null}],%b}\n\n' % (
            delta,
            finish_reason,
            self.after,
        )

    def _streamed(self) -> Iterator[Step]:
        fault, frame = self.fault, self.frame
        if fault.head == "slow":
            yield from _slowly(self._head())
        role_at = self.script.role_chunk
        if role_at == "slot" or (role_at == "receipt" and fault.head == "slow"):
            yield NOW, self.role(), 0
        lead = self.role() if role_at == "token" else b""
        before, after = self._event(b'{"content":"|"}', b"null").split(b"|", 1)  # a model's name may have one
        at_ns = 0
        for at_ns, first, many in self._pace():
            words = WORDS[first & 15] if many == 1 and self.text is None else self._words(first, many)
            yield at_ns, lead + frame(before + words + after), many
            lead = b""
        event = error_body(self.status, fault.text) if fault.text else fault.event
        if event is not None:
            yield at_ns, lead + frame(b"%bdata: %b\n\n" % (fault.event_line, event)), 0
        if fault.raw is not None:
            yield NOW, fault.raw, 0
        if fault.end is End.COMPLETE:
            yield at_ns, lead + frame(self._tail(), last=True), 0
        else:
            yield at_ns, fault.end, 0

    def _whole(self) -> Iterator[Step]:
        """A JSON answer; its tokens are made one by one all the same, so that sharing slows it as it does a stream."""
        fault = self.fault
        at_ns, tokens = 0, 0
        for at_ns, _, many in self._pace():
            yield at_ns, b"", 0
            tokens += many
        reason = orjson.dumps(self.finish_reason) if fault.finish else b"null"
        message = b'{"content":"%b","refusal":null,"role":"assistant"}' % self._words(0, tokens)
        choice = b'{"finish_reason":%b,"index":0,"logprobs":null,"message":%b}' % (reason, message)
        body = b'{"choices":[%b],%b,"usage":%b}' % (choice, self.after, self._usage())
        body = self.frame(fault.event or body, last=True)
        head = self._head(len(body))
        if fault.raw is not None:
            yield at_ns, fault.raw, 0
        elif fault.end is End.COMPLETE:
            if fault.head == "slow":
                yield from ((at_ns + line_at_ns, line, 0) for line_at_ns, line, _ in _slowly(head))
            yield at_ns, (b"" if fault.head == "slow" else head) + body, tokens
        elif fault.content == "some":
            yield at_ns, head + body[: len(body) // 2], 0
        if fault.end is not End.COMPLETE:
            yield at_ns, fault.end, 0

    def _pace(self) -> Iterator[tuple[int, int, int]]:
        """When each content event is due, the number of its first token, and of its tokens."""
        script, fault, stretch = self.script, self.fault, self.stretch
        some = min(script.fault_after, self.tokens)
        count = {"all": self.tokens, "some": some, "none": 0, "endless": sys.maxsize}[fault.content]
        step = script.tokens_per_chunk
        gap_ns = script.gap_ms * step * 1e6
        at_ns = (script.first_token_ms + script.prefill_ms * self.input_tokens) * 1e6 * stretch() + self.jitter_ns
        pause_ns = script.stall_ms * 1e6 if fault.pause else 0
        for first in range(0, count, step):
            if pause_ns and first >= some:
                at_ns, pause_ns = at_ns + pause_ns, 0
            yield int(at_ns), first, min(step, count - first)
            at_ns += gap_ns * stretch()

    def _words(self, first: int, many: int) -> bytes:
        if self.text is not None:
            return b"".join(self.pieces[first : first + many])
        return b"".join(WORDS[i & 15] for i in range(first, first + many))

    def _tail(self) -> bytes:
        """What ends a stream: finish_reason, usage if asked for, [DONE]; less what the fault leaves out."""
        tail = self._event(b"{}", orjson.dumps(self.finish_reason)) if self.fault.finish else b""
        if self.include_usage and self.fault.finish:
            tail += b'data: {"choices":[],%b,"usage":%b}\n\n' % (self.after, self._usage())
        return tail + b"data: [DONE]\n\n" if self.fault.done else tail

    def _usage(self) -> bytes:
        made = 0 if self.fault.content == "none" else self.tokens
        return b'{"completion_tokens":%d,"prompt_tokens":%d,"total_tokens":%d}' % (
            made,
            self.input_tokens,
            self.input_tokens + made,
        )


def _slowly(head: bytes) -> Iterator[Step]:
    for i, line in enumerate(head.splitlines(keepends=True)):
        yield i * SLOW_LINE_NS, line, 0


def _byte_by_byte(steps: Iterator[Step]) -> Iterator[Step]:
    free_ns = 0
    for at_ns, payload, tokens in steps:
        if isinstance(payload, End):
            yield at_ns, payload, tokens
            continue
        free_ns = max(free_ns, at_ns)
        for i in range(len(payload)):
            yield free_ns, payload[i : i + 1], tokens if i == len(payload) - 1 else 0
            free_ns += SLOW_BYTE_NS


def error_body(status: int, text: str) -> bytes:
    """An error as Foundry Local (and OpenAI) words it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return orjson.dumps({"error": {"code": None, "message": text, "param": None, "type": kind}})


def reply(status: int, body: Any, headers: str = "", close: bool = False) -> bytes:
    """A whole answer. Bytes go as they are, text as plain text, everything else as JSON."""
    content = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else orjson.dumps(body)
    kind = "text/plain" if isinstance(body, str) else "text/html" if content[:1] == b"<" else "application/json"
    lines = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(content)}\r\n{headers}" + ("Connection: close\r\n" if close else "")
    )
    return lines.encode() + b"\r\n" + content
