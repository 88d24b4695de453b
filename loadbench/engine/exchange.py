"""One request and what is known of its answer: collects while it comes, decides at its end what it was. No sockets."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import perf_counter_ns
from typing import Any

import orjson

from loadbench.engine.sse import Stream, error_text, read_answer, readable
from loadbench.outcomes import classify
from loadbench.records import Request, Sample
from loadbench.scenario.redaction import is_secret, without_secrets

BODY_LIMIT_BYTES = 16 << 20
"""Largest answer kept in one piece (non-streaming, or an error page): beyond it the server is not answering a chat."""


@dataclass(frozen=True, slots=True)
class Wire:
    """Where requests go and what each of them carries besides its prompt.

    ``host`` and ``port`` are what is connected to (an address, resolved once); ``authority`` is what the Host header
    says. ``headers`` may hold secrets: they go to the socket and nowhere else, and where a server repeats one in an
    error text it is cut out. ``endpoint`` is its number in a fleet.
    """

    host: str
    port: int
    authority: str
    path: str
    tls: bool
    model: str
    stream: bool
    temperature: float | None
    first_token_s: float
    total_s: float
    headers: Mapping[str, str]
    extra: Mapping[str, Any]
    endpoint: int | None = None

    @classmethod
    def to_our_own(cls, port: int, model: str, **changes: Any) -> Wire:
        """Streams from a server that we have started on this machine, and leaves it its time."""
        usual = cls(
            host="127.0.0.1",
            port=port,
            authority=f"127.0.0.1:{port}",
            path="/v1/chat/completions",
            tls=False,
            model=model,
            stream=True,
            temperature=0.0,
            first_token_s=60.0,
            total_s=3600.0,
            headers={},
            extra={},
        )
        return replace(usual, **changes)

    def within(self, seconds: float) -> Wire:
        """The same with no deadline later than that."""
        return replace(self, first_token_s=min(self.first_token_s, seconds), total_s=min(self.total_s, seconds))

    def without_secrets(self, text: str) -> str:
        """The text without the value of any header of ours, however the server writes it."""
        return without_secrets(text, self.headers)


def request_head(wire: Wire) -> bytes:
    """What goes before every body; takes a request id's three parts and the body's length."""
    headers = {
        "Host": wire.authority,
        "Content-Type": "application/json",
        "Accept": "text/event-stream" if wire.stream else "application/json",
        "Accept-Encoding": "identity",
        "User-Agent": "loadbench",
    }
    given = {name.lower() for name in wire.headers}
    lines = [f"POST {wire.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items() if name.lower() not in given]
    lines += [f"{name}: {value}" for name, value in wire.headers.items()]
    head = "\r\n".join(lines).encode().replace(b"%", b"%%")  # what follows is a template
    return head + b"\r\nX-Request-Id: %s-%d-%d\r\nContent-Length: %d\r\n\r\n"


def request_body(wire: Wire, request: Request) -> bytes:
    """One request's JSON."""
    body: dict[str, Any] = {"model": wire.model, "messages": request.prompt.messages, "stream": wire.stream}
    if wire.stream:
        body["stream_options"] = {"include_usage": True}
    if wire.temperature is not None:
        body["temperature"] = wire.temperature
    body["max_tokens"] = request.prompt.max_tokens
    body.update(wire.extra)
    return orjson.dumps(body)


class Exchange:
    """One request and what is known of its answer so far. Stamps are absolute; `sample` relates them to the run."""

    def __init__(self, request: Request, level: int, phase: str, wire: Wire, gaps: array[int]) -> None:
        self.request = request
        self.level = level
        self.phase = phase
        self.wire = wire
        self.stream = Stream(gaps)
        self.sent_ns: int | None = None
        self.headers_ns: int | None = None
        self.end_ns: int | None = None
        self.connect_ns: int | None = None
        self.http_status: int | None = None
        self.streamed = False
        self.body = b""
        self.bytes_received = 0
        self.outcome: str | None = None
        self.detail: str | None = None

    def fail(self, outcome: str, detail: str | None) -> None:
        """Settle the outcome; the first one to be settled stands."""
        if self.outcome is None:
            self.outcome, self.detail = outcome, detail
        if self.end_ns is None:
            self.end_ns = perf_counter_ns()

    def keep(self, body: bytes) -> bool:
        """Add to an answer that comes in one piece; False where it has grown too large."""
        if len(self.body) + len(body) > BODY_LIMIT_BYTES:
            return False
        self.body += body
        return True

    def settle(self, end_ns: int) -> None:
        """The whole answer is here: decide what it was."""
        self.end_ns = end_ns
        if self.outcome is not None:
            return
        status = self.http_status or 0
        if self.streamed:
            self.stream.end(end_ns)
            self._settle_stream()
        elif status == 200:
            self._settle_body(end_ns)
        else:
            try:
                text = error_text(orjson.loads(self.body)) or readable(self.body)
            except orjson.JSONDecodeError:
                text = readable(self.body)
            kind = "http_4xx" if 400 <= status < 500 else "http_5xx" if status >= 500 else "protocol"
            text = text or f"HTTP {status} without a body"
            self.outcome, self.detail = classify(text, kind), text

    def _settle_stream(self) -> None:
        stream = self.stream
        if stream.problem is not None:
            kind, text = stream.problem
            self.outcome = classify(text, "stream_error") if kind == "error" else "protocol"
            self.detail = text
        elif stream.first_event_ns is None:
            self.outcome = "protocol" if stream.stray else "truncated"
            self.detail = stream.stray or "the stream held no event"
        elif stream.finish_reason is None:
            self.outcome, self.detail = "truncated", "no finish_reason"
        elif stream.done_ns is None:
            self.outcome, self.detail = "truncated", "no [DONE]"
        else:
            self.outcome = "ok" if stream.chunks else "empty"

    def _settle_body(self, end_ns: int) -> None:
        try:
            document = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            self.outcome, self.detail = "protocol", readable(self.body) or "HTTP 200 without a body"
            return
        answer = read_answer(document, "message")
        if answer is None or self.wire.stream:
            text = error_text(document)
            self.outcome = classify(text, "stream_error") if text else "protocol"
            self.detail = text or readable(self.body)
            return
        stream = self.stream
        stream.finish_reason = answer.finish_reason
        stream.input_tokens, stream.output_tokens = answer.input_tokens, answer.output_tokens
        if answer.finish_reason is None:
            self.outcome, self.detail = "truncated", "no finish_reason"
        elif answer.has_content:
            self.outcome, stream.last_token_ns = "ok", end_ns
            stream.content.add(answer.content.encode())
            stream.reasoning.add(answer.reasoning.encode())
        else:
            self.outcome = "empty"

    def text(self) -> str:
        """What was answered, without a key of ours that the server repeats; its hash is of what the server said."""
        keys = {name: value for name, value in self.wire.headers.items() if is_secret(name)}
        return without_secrets(str(self.stream.answer), keys)

    def sample(self, origin_ns: int) -> Sample:
        """The record of it, in nanoseconds since the run began."""
        stream, request = self.stream, self.request
        tokens = stream.output_tokens
        source = None if tokens is None else "usage"
        if tokens is None and stream.chunks:
            tokens, source = stream.chunks, "chunks"

        def since(stamp: int | None) -> int | None:
            return None if stamp is None else stamp - origin_ns

        return Sample(
            level=self.level,
            phase=self.phase,
            seq=request.seq,
            kind=request.prompt.kind,
            user=request.user,
            due_ns=request.due_ns,
            sent_ns=since(self.sent_ns),
            headers_ns=since(self.headers_ns),
            first_event_ns=since(stream.first_event_ns),
            first_token_ns=since(stream.first_token_ns),
            last_token_ns=since(stream.last_token_ns),
            done_ns=since(stream.done_ns if stream.done_ns is not None else self.end_ns),
            outcome=self.outcome or "protocol",
            detail=None if self.detail is None else self.wire.without_secrets(self.detail),
            http_status=self.http_status,
            finish_reason=stream.finish_reason,
            input_tokens=stream.input_tokens,
            output_tokens=tokens,
            token_source=source,
            chunks=stream.chunks,
            keep_alives=stream.keep_alives,
            max_gap_ns=stream.max_gap_ns,
            stall_ns=stream.stall_ns,
            bytes_received=self.bytes_received,
            connect_ns=self.connect_ns,
            place=request.prompt.place,
            answer_hash=stream.answer.hash(),
            endpoint=self.wire.endpoint,
        )
