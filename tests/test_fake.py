"""The scripted endpoint: what comes over the wire for every knob and fault, and that its log tells the truth of it."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import signal
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import psutil
import pytest
import uvloop
from click.testing import CliRunner
from loadbench.engine.client import Client
from loadbench.engine.exchange import Wire
from loadbench.errors import UsageError
from loadbench.outcomes import OUTCOMES, classify
from loadbench.records import Prompt, Request
from loadbench.target.fake import FakeServer, Script, Truth, serve
from loadbench.target.fake_cli import fake_command
from loadbench.target.fake_faults import FAULTS
from loadbench.target.fake_pacer import Pacer, _LoopTimer
from loadbench.target.fake_script import script_from, script_from_file

MS = 1_000_000
QUICK: dict[str, Any] = {"first_token_ms": 0, "gap_ms": 0, "tokens": 6, "stall_ms": 30}
LOOPS = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
NewLoop = Callable[[], asyncio.AbstractEventLoop]


@asynccontextmanager
async def running(log: Path | None = None, token: str | None = None, **values: Any) -> AsyncIterator[FakeServer]:
    server = await serve(Script(**{**QUICK, **values}), log=log, token=token)
    try:
        yield server
    finally:
        await server.close()


@dataclass
class Got:
    """What came over the wire: raw bytes, when each read came, and how it ended."""

    raw: bytes = b""
    reads: list[tuple[int, bytes]] = field(default_factory=list)
    sent_ns: int = 0
    was_reset: bool = False

    @property
    def head(self) -> str:
        return self.raw.partition(b"\r\n\r\n")[0].decode()

    @property
    def status(self) -> int:
        return int(self.head.split()[1])

    @property
    def body(self) -> bytes:
        return self.raw.partition(b"\r\n\r\n")[2]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def chunks(self) -> list[bytes]:
        """The chunks of a chunked body, the empty last one included; what is no chunk ends the list."""
        chunks, rest = [], self.body
        while match := re.match(rb"([0-9A-F]+)\r\n", rest):
            size, start = int(match[1], 16), match.end()
            if rest[start + size : start + size + 2] != b"\r\n":
                break
            chunks.append(rest[start : start + size])
            rest = rest[start + size + 2 :]
        return chunks

    @property
    def text(self) -> bytes:
        return b"".join(self.chunks) if "Transfer-Encoding: chunked" in self.head else self.body

    @property
    def ended_as_framed(self) -> bool:
        return self.chunks[-1:] == [b""]

    @property
    def data(self) -> list[str]:
        return [line[6:] for line in self.text.decode().splitlines() if line.startswith("data: ")]

    @property
    def events(self) -> list[Any]:
        return [json.loads(data) for data in self.data if data != "[DONE]"]

    @property
    def contents(self) -> list[str]:
        said = [event["choices"][0]["delta"].get("content") for event in self.events if event.get("choices")]
        return [content for content in said if content]

    @property
    def finish_reason(self) -> str | None:
        reasons = [event["choices"][0]["finish_reason"] for event in self.events if event.get("choices")]
        return next((reason for reason in reasons if reason), None)

    @property
    def done(self) -> bool:
        return "[DONE]" in self.data

    @property
    def keep_alives(self) -> int:
        return self.text.count(b": keep-alive\n\n")

    def arrival_of(self, pattern: bytes) -> int:
        """When the read came that completed the first match."""
        seen = b""
        for at_ns, data in self.reads:
            seen += data
            if re.search(pattern, seen):
                return at_ns
        raise AssertionError(f"{pattern!r} never came")


FIRST_CONTENT = rb'"content":" amber"'


def request_bytes(headers: dict[str, str] | None = None, path: str = "/v1/chat/completions", **body: Any) -> bytes:
    content = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True, **body})
    lines = [f"POST {path} HTTP/1.1", "Host: fake", f"Content-Length: {len(content.encode())}"]
    lines += [f"{name}: {value}" for name, value in {"Connection": "close", **(headers or {})}.items()]
    return "\r\n".join([*lines, "", content]).encode()


async def exchange(server: FakeServer, data: bytes, until: bytes | None = None) -> Got:
    """Send on a connection of its own and read to its end, or until the bytes are seen (then leave)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    got = Got(sent_ns=perf_counter_ns())
    writer.write(data)
    try:
        while data := await reader.read(1 << 16):
            got.reads.append((perf_counter_ns(), data))
            got.raw += data
            if until is not None and until in got.raw:
                break
    except ConnectionResetError:
        got.was_reset = True
    writer.transport.abort()
    return got


async def ask(
    server: FakeServer, headers: dict[str, str] | None = None, until: bytes | None = None, **body: Any
) -> Got:
    return await exchange(server, request_bytes(headers, **body), until)


async def faulty(server: FakeServer, name: str, **body: Any) -> Got:
    return await ask(server, {"X-Fake-Fault": name}, **body)


async def get(server: FakeServer, path: str) -> Got:
    return await exchange(server, f"GET {path} HTTP/1.1\r\nHost: fake\r\nConnection: close\r\n\r\n".encode())


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop turn until it holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the server has no events for tests
            await asyncio.sleep(0)


def is_answering(server: FakeServer) -> bool:
    return any(connection.stream for connection in server.connections)


async def logged(server: FakeServer, count: int) -> list[Truth]:
    """The log, once it has that many records. The last is written in the turn of the loop after its last byte."""
    await until(lambda: len(server.records) >= count)
    return sorted(server.records)


# --- the honest answer ------------------------------------------------------------------------------------------------


async def test_a_stream_has_a_role_chunk_an_event_a_token_usage_and_done_each_in_a_chunk_of_its_own() -> None:
    async with running() as server:
        got = await ask(server, max_tokens=3, stream_options={"include_usage": True})
    assert got.status == 200 and "Content-Type: text/event-stream" in got.head
    assert got.events[0]["choices"][0]["delta"] == {"content": "", "role": "assistant"}
    assert got.contents == [" amber", " birch", " cedar"]
    assert got.finish_reason == "length"
    assert got.events[-1]["choices"] == []
    assert got.events[-1]["usage"] == {"completion_tokens": 3, "prompt_tokens": 5, "total_tokens": 8}
    assert got.data[-1] == "[DONE]"
    assert [chunk.count(b"data: ") for chunk in got.chunks] == [1, 1, 1, 1, 3, 0]
    assert got.ended_as_framed


async def test_usage_is_sent_only_where_it_is_asked_for_and_served() -> None:
    async with running() as server:
        assert not any("usage" in event for event in (await ask(server)).events)
        override = {"X-Fake-Script": '{"usage": false}'}
        got = await ask(server, override, stream_options={"include_usage": True})
    assert not any("usage" in event for event in got.events) and got.done


async def test_an_answer_without_stream_is_one_json_document_after_the_time_of_all_its_tokens() -> None:
    async with running(first_token_ms=20, gap_ms=10) as server:
        got = await ask(server, stream=False, max_tokens=4)
        [truth] = await logged(server, 1)
    assert got.json["choices"][0]["message"]["content"] == " amber birch cedar delta"
    assert got.json["choices"][0]["finish_reason"] == "length"
    assert got.json["usage"] == {"completion_tokens": 4, "prompt_tokens": 5, "total_tokens": 9}
    assert truth.first_token_ns is not None and truth.first_token_ns - truth.received_ns >= 50 * MS
    assert truth.tokens == 4


async def test_tokens_come_in_chunks_of_the_asked_size_and_the_last_has_the_rest() -> None:
    async with running(tokens_per_chunk=2) as server:
        got = await ask(server, max_tokens=5)
        [truth] = await logged(server, 1)
    assert got.contents == [" amber birch", " cedar delta", " ember"]
    assert truth.tokens == 5


async def test_without_max_tokens_the_script_says_how_many_and_the_model_stops() -> None:
    async with running(tokens=4) as server:
        got = await ask(server)
    assert (len(got.contents), got.finish_reason) == (4, "stop")


async def test_the_body_of_a_stream_may_end_with_the_connection() -> None:
    async with running(framing="close") as server:
        got = await exchange(server, request_bytes({"Connection": "keep-alive"}))
    assert "Transfer-Encoding" not in got.head and "Connection: close" in got.head
    assert len(got.contents) == 6 and got.body.endswith(b"data: [DONE]\n\n")


async def test_a_connection_is_kept_and_its_requests_are_answered_in_turn_even_when_sent_at_once() -> None:
    async with running(tokens=2) as server:
        first = request_bytes({"Connection": "keep-alive", "X-Request-Id": "a"})
        got = await exchange(server, first + request_bytes({"X-Request-Id": "b"}, stream=False))
        truths = await logged(server, 2)
    assert got.raw.index(b"[DONE]") < got.raw.index(b"Content-Length")
    assert [(truth.request_id, truth.connection) for truth in truths] == [("a", 1), ("b", 1)]


async def test_connection_close_is_said_and_done() -> None:
    async with running(connection_close=True) as server:
        got = await exchange(server, request_bytes({"Connection": "keep-alive"}))
    assert "Connection: close" in got.head and got.done


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/catalogs/local/v1/chat/completions"])
async def test_any_prefix_of_the_chat_route_is_served(path: str) -> None:
    async with running() as server:
        assert (await exchange(server, request_bytes(path=path))).done


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "expected a JSON object"),
        (b"[]", "expected a JSON object"),
        (b'{"model": "m"}', "expected a model and messages"),
        (b'{"model": "m", "messages": [], "max_tokens": "x"}', "max_tokens: expected a whole number, got 'x'"),
    ],
)
async def test_a_body_that_is_no_chat_request_gets_400_with_the_reason(body: bytes, said: str) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with running() as server:
        got = await exchange(server, head + body)
    assert got.status == 400 and said in got.json["error"]["message"]


async def test_what_is_no_http_gets_400_and_the_connection_is_closed() -> None:
    async with running() as server:
        assert (await exchange(server, b"hello there\r\n\r\n")).status == 400


# --- time -------------------------------------------------------------------------------------------------------------


@LOOPS
def test_the_log_and_the_client_agree_on_every_stamp(new_loop: NewLoop) -> None:
    async def main() -> None:
        async with running(first_token_ms=60, gap_ms=5, tokens=5) as server:
            got = await ask(server, {"X-Request-Id": "r-1"})
            [truth] = await logged(server, 1)
        assert truth.request_id == "r-1" and truth.tokens == 5 and truth.fault is None
        assert truth.first_token_ns and truth.last_token_ns and truth.done_ns and truth.max_late_ns is not None
        assert got.sent_ns <= truth.received_ns <= got.arrival_of(b'"role"')
        assert truth.received_ns + 60 * MS <= truth.first_token_ns <= got.arrival_of(FIRST_CONTENT)
        assert truth.received_ns + 80 * MS <= truth.last_token_ns <= truth.done_ns <= got.arrival_of(rb"\[DONE\]")
        assert truth.first_token_ns <= truth.received_ns + 60 * MS + truth.max_late_ns
        assert truth.last_token_ns <= truth.received_ns + 80 * MS + truth.max_late_ns

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


async def test_the_role_chunk_comes_at_receipt_and_long_before_the_first_token() -> None:
    async with running(first_token_ms=80) as server:
        got = await ask(server)
        [truth] = await logged(server, 1)
    assert truth.first_token_ns is not None
    assert got.arrival_of(b'"role"') < truth.first_token_ns


@pytest.mark.parametrize(("role_chunk", "first_read"), [("token", b'"role"'), ("none", FIRST_CONTENT)])
async def test_the_role_chunk_may_come_with_the_first_token_or_not_at_all(role_chunk: str, first_read: bytes) -> None:
    async with running(role_chunk=role_chunk, first_token_ms=30) as server:
        got = await ask(server)
    assert got.reads[0][0] == got.arrival_of(FIRST_CONTENT) == got.arrival_of(first_read)
    assert (b'"role"' in got.raw) == (role_chunk == "token")


async def test_the_schedule_is_absolute_so_a_late_token_delays_no_other() -> None:
    async with running(first_token_ms=10, gap_ms=10, tokens=31) as server:
        server.pacer.call_at(perf_counter_ns() + 50 * MS, lambda due_ns: time.sleep(0.08))  # all stands still
        await ask(server)
        [truth] = await logged(server, 1)
    assert truth.max_late_ns is not None and truth.last_token_ns is not None
    assert truth.max_late_ns > 40 * MS
    assert truth.last_token_ns - (truth.received_ns + 310 * MS) < truth.max_late_ns - 20 * MS


async def test_the_first_token_waits_for_every_byte_of_the_prompt() -> None:
    async with running(first_token_ms=5, prefill_ms=0.5) as server:
        await ask(server, messages=[{"role": "system", "content": "x" * 60}, {"role": "user", "content": "ü" * 10}])
        parts = [{"type": "text", "text": "x" * 20}, {"type": "image_url"}]
        await ask(server, messages=[{"role": "user", "content": parts}])
        long, short = await logged(server, 2)
    assert long.first_token_ns and short.first_token_ns and long.max_late_ns is not None
    assert 45 * MS <= long.first_token_ns - long.received_ns <= 45 * MS + long.max_late_ns
    assert short.first_token_ns - short.received_ns >= 15 * MS


async def test_the_jitter_is_drawn_from_the_seed() -> None:
    async def drawn(seed: int) -> list[int]:
        async with running(first_token_jitter_ms=20, tokens=1, seed=seed) as server:
            for _ in range(4):
                await ask(server)
            truths = await logged(server, 4)
        # of a single token, the lateness is the first token's
        return [(t.first_token_ns or 0) - t.received_ns - (t.max_late_ns or 0) for t in truths]

    one, again, other = await drawn(1), await drawn(1), await drawn(2)
    assert one == again != other
    assert len(set(one)) == 4 and all(0 <= jitter_ns < 20 * MS for jitter_ns in one)


async def test_shared_by_two_it_takes_each_twice_as_long() -> None:
    async with running(gap_ms=4, slowdown=1) as server:
        await ask(server, max_tokens=10)
        await asyncio.gather(ask(server, max_tokens=10), ask(server, max_tokens=10))
        alone, *shared = await logged(server, 3)
    assert alone.last_token_ns is not None and alone.max_late_ns is not None
    assert alone.last_token_ns - alone.received_ns <= 36 * MS + alone.max_late_ns
    for truth in shared:
        assert truth.last_token_ns is not None and truth.last_token_ns - truth.received_ns > 60 * MS


@LOOPS
def test_the_pacer_calls_in_order_and_never_early(new_loop: NewLoop) -> None:
    async def main(loop_timer: bool) -> None:
        loop = asyncio.get_running_loop()
        pacer = Pacer(loop)
        if loop_timer:  # as where there is no timerfd
            pacer._alarm.close()
            pacer._alarm = _LoopTimer(loop, pacer._run)
        calls: list[tuple[int, int]] = []
        done = asyncio.Event()
        start_ns = perf_counter_ns()
        for after_ms in (9, 3, 0, 6, 3):
            pacer.call_at(start_ns + after_ms * MS, lambda due_ns: calls.append((due_ns, perf_counter_ns())))
        pacer.call_at(start_ns + 12 * MS, lambda due_ns: done.set())
        await done.wait()
        pacer.close()
        assert [(due_ns - start_ns) // MS for due_ns, _ in calls] == [0, 3, 3, 6, 9]
        assert all(due_ns <= called_ns for due_ns, called_ns in calls)

    for loop_timer in (False, True):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main(loop_timer))


async def test_what_the_pacer_calls_may_fail_and_the_rest_is_still_called() -> None:
    loop = asyncio.get_running_loop()
    failures: list[Any] = []
    loop.set_exception_handler(lambda loop, context: failures.append(context["exception"]))
    pacer, done = Pacer(loop), asyncio.Event()
    pacer.call_at(perf_counter_ns(), lambda due_ns: failures[7])
    pacer.call_at(perf_counter_ns(), lambda due_ns: done.set())
    await done.wait()
    pacer.close()
    assert [type(failure) for failure in failures] == [IndexError]


async def test_a_client_that_does_not_read_fills_no_memory_and_gets_the_rest_when_it_reads() -> None:
    async with running() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(request_bytes(max_tokens=50_000))
        await until(lambda: any(not connection.writable for connection in server.connections))
        [connection] = server.connections
        assert connection.transport.get_write_buffer_size() < 1 << 20
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        raw = await reader.read()
        [truth] = await logged(server, 1)
        writer.close()
    assert raw.count(b'"delta":{"content":" ') == truth.tokens == 50_000


# --- slots and the queue ----------------------------------------------------------------------------------------------


async def test_eight_requests_on_two_slots_take_four_service_times() -> None:
    async with running(first_token_ms=20, tokens=1, slots=2) as server:
        await asyncio.gather(*(ask(server) for _ in range(8)))
        truths = await logged(server, 8)
    starts = sorted(truth.received_ns + (truth.slot_wait_ns or 0) for truth in truths)
    assert [later - start for start, later in zip(starts, starts[2:], strict=False)] == [20 * MS] * 6
    assert [truth.slot_wait_ns for truth in truths[:2]] == [0, 0]
    last = max(truth.last_token_ns or 0 for truth in truths)
    assert last - min(truth.received_ns for truth in truths) >= 80 * MS


async def test_the_queue_is_first_in_first_out() -> None:
    async with running(first_token_ms=5, tokens=1, slots=1) as server:
        await asyncio.gather(*(ask(server) for _ in range(5)))
        truths = await logged(server, 5)
    assert truths == sorted(truths, key=lambda truth: truth.last_token_ns or 0)


async def test_beyond_the_queue_limit_it_is_503_in_json_and_logged() -> None:
    async with running(first_token_ms=20, slots=1, queue_limit=2) as server:
        got = await asyncio.gather(*(ask(server) for _ in range(5)))
        truths = await logged(server, 5)
    assert sorted(one.status for one in got) == [200, 200, 200, 503, 503]
    refused = [one for one in got if one.status == 503]
    assert all("queue is full" in one.json["error"]["message"] for one in refused)
    assert [truth.status for truth in truths].count(503) == 2


async def test_who_leaves_the_queue_or_a_slot_makes_room() -> None:
    async with running(first_token_ms=60_000, slots=1, queue_limit=1) as server:
        served = asyncio.create_task(ask(server))
        await until(lambda: is_answering(server))
        await ask(server, until=b'"role"')  # waits, and leaves after its role chunk
        [left] = await logged(server, 1)
        assert left.slot_wait_ns is None and left.done_ns is None
        served.cancel()
        quick = {"X-Fake-Script": '{"first_token_ms": 0}'}
        assert (await ask(server, quick)).done


async def test_keep_alives_and_the_role_chunk_do_not_wait_for_a_slot() -> None:
    async with running(first_token_ms=100, tokens=1, slots=1, keep_alive_ms=20) as server:
        _, queued = await asyncio.gather(ask(server), ask(server))
        truths = await logged(server, 2)
    assert truths[1].slot_wait_ns is not None and truths[1].slot_wait_ns > 50 * MS
    before_service = queued.raw[: queued.raw.index(FIRST_CONTENT[:-1])]
    assert b'"role"' in before_service
    assert 2 <= before_service.count(b": keep-alive\n\n") <= 10


async def test_keep_alives_fill_a_silence_only() -> None:
    async with running(gap_ms=5, tokens=20, keep_alive_ms=60_000) as server:
        assert (await ask(server)).keep_alives == 0


# --- faults -----------------------------------------------------------------------------------------------------------

TEXT_FAULTS = [fault.name for fault in FAULTS.values() if fault.text is not None]
REFUSED = [fault.name for fault in FAULTS.values() if fault.text is not None and not fault.in_stream]
ERROR_EVENTS = [fault.name for fault in FAULTS.values() if fault.in_stream]


def test_every_outcome_that_a_server_can_cause_has_a_fault() -> None:
    ours_alone = {"dropped", "censored"}
    assert {fault.outcome for fault in FAULTS.values()} | {f.later for f in FAULTS.values()} == set(
        OUTCOMES
    ) - ours_alone


@pytest.mark.parametrize("name", TEXT_FAULTS)
def test_the_text_of_a_fault_is_recognised_as_its_outcome(name: str) -> None:
    fault = FAULTS[name]
    assert classify(fault.text or "", "http_5xx") in (fault.outcome, "http_5xx")
    if fault.outcome not in ("http_4xx", "http_5xx", "stream_error"):
        assert classify(fault.text or "", "unrecognised") == fault.outcome


@pytest.mark.parametrize("name", REFUSED)
async def test_a_refusal_has_its_status_and_its_text(name: str) -> None:
    async with running() as server:
        got = await faulty(server, name)
        [truth] = await logged(server, 1)
    assert got.status == FAULTS[name].status
    assert got.json["error"]["message"] == FAULTS[name].text
    assert (truth.status, truth.fault, truth.first_token_ns) == (got.status, name, None)


@pytest.mark.parametrize("name", ERROR_EVENTS)
async def test_an_error_event_comes_under_200_and_without_done_but_without_stream_as_a_status(name: str) -> None:
    async with running() as server:
        got, whole = await faulty(server, name), await faulty(server, name, stream=False)
    assert got.status == 200 and not got.done and got.finish_reason is None and got.ended_as_framed
    assert got.events[-1]["error"]["message"] == FAULTS[name].text
    assert len(got.contents) == (3 if FAULTS[name].content == "some" else 0)
    assert (b"event: error\ndata: " in got.text) == (name == "stream_error_event")
    assert whole.status == FAULTS[name].status and whole.json["error"]["message"] == FAULTS[name].text


async def test_a_rate_limit_says_when_to_try_again() -> None:
    async with running() as server:
        assert "Retry-After: 1" in (await faulty(server, "http_4xx")).head


async def test_protocol_garbage_is_no_http() -> None:
    async with running() as server:
        for stream in (True, False):
            got = await faulty(server, "protocol", stream=stream)
            assert got.raw and not got.raw.startswith(b"HTTP")


async def test_protocol_html_is_a_page_with_status_200() -> None:
    async with running() as server:
        got = await faulty(server, "protocol_html")
    assert got.status == 200 and "Content-Type: text/html" in got.head and b"<html>" in got.body


async def test_protocol_json_is_an_event_that_breaks_off() -> None:
    async with running() as server:
        got = await faulty(server, "protocol_json")
        with pytest.raises(json.JSONDecodeError):
            json.loads((await faulty(server, "protocol_json", stream=False)).body)
    assert got.data[4] == '{"choices":[{"delta":{"content":'


async def test_protocol_framing_puts_bytes_where_a_chunk_should_be() -> None:
    async with running() as server:
        got = await faulty(server, "protocol_framing")
    assert len(got.contents) == 3 and not got.ended_as_framed and b"garbage" in got.raw


async def test_a_redirect_names_another_place() -> None:
    async with running() as server:
        got = await faulty(server, "redirect")
    assert got.status == 302 and "Location: http://127.0.0.1:9/" in got.head


async def test_gzip_packs_the_body_event_by_event() -> None:
    async with running(gap_ms=5) as server:
        got, whole = await faulty(server, "gzip"), await faulty(server, "gzip", stream=False)
    assert "Content-Encoding: gzip" in got.head and "Content-Encoding: gzip" in whole.head
    assert len(got.chunks) == 9
    assert gzip.decompress(got.text).endswith(b"data: [DONE]\n\n")
    assert json.loads(gzip.decompress(whole.body))["object"] == "chat.completion"


async def test_empty_is_complete_without_content() -> None:
    async with running() as server:
        got, whole = await faulty(server, "empty"), await faulty(server, "empty", stream=False)
    assert got.contents == [] and got.finish_reason == "stop" and got.done
    assert whole.json["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize(
    ("name", "contents", "finish_reason", "done"),
    [
        ("truncated", 6, None, True),
        ("truncated_no_done", 6, "stop", False),
        ("truncated_short", 3, None, False),
    ],
)
async def test_truncated_ends_cleanly_without(name: str, contents: int, finish_reason: str | None, done: bool) -> None:
    async with running() as server:
        got = await faulty(server, name)
    assert (len(got.contents), got.finish_reason, got.done, got.ended_as_framed) == (
        contents,
        finish_reason,
        done,
        True,
    )


@LOOPS
@pytest.mark.parametrize(
    ("name", "contents", "was_reset"),
    [("connection_lost", 3, True), ("connection_lost_close", 3, False), ("connection_lost_early", 0, True)],
)
def test_a_lost_connection_is_reset_or_closed_in_the_middle(
    new_loop: NewLoop, name: str, contents: int, was_reset: bool
) -> None:
    async def main() -> None:
        async with running() as server:
            got, whole = await faulty(server, name), await faulty(server, name, stream=False)
        assert (len(got.contents) if got.raw else 0, got.was_reset) == (contents, was_reset)
        assert not got.ended_as_framed
        promised = re.search(r"Content-Length: (\d+)", whole.head)
        assert promised is None or len(whole.body) < int(promised[1])

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


async def test_after_so_many_requests_nobody_listens_and_the_last_is_still_answered() -> None:
    async with running(refuse_after=2) as server:
        _, idle = await asyncio.open_connection("127.0.0.1", server.port)
        assert (await ask(server)).done
        assert (await ask(server)).done
        with pytest.raises(ConnectionRefusedError):
            await ask(server)
        await until(lambda: not server.connections)  # the idle one was closed
        idle.close()


async def test_a_crash_resets_everybody_and_then_refuses() -> None:
    async with running(first_token_ms=1) as server:
        bystander = asyncio.create_task(ask(server, {"X-Fake-Script": '{"first_token_ms": 60000}'}))
        await until(lambda: is_answering(server))
        assert (await faulty(server, "crash")).was_reset
        assert (await bystander).was_reset
        with pytest.raises(ConnectionRefusedError):
            await ask(server)


async def test_the_first_token_never_comes_and_keep_alives_go_on() -> None:
    async with running(keep_alive_ms=5) as server:
        got = await ask(server, {"X-Fake-Fault": "first_token_deadline"}, until=b": keep-alive\n\n\r\n11\r\n: keep")
        [truth] = await logged(server, 1)
    assert b'"role"' in got.raw and truth.tokens == 0 and truth.done_ns is None


async def test_tokens_come_for_ever() -> None:
    async with running() as server:
        got = await ask(server, {"X-Fake-Fault": "total_deadline"}, until=b'" pearl"', max_tokens=2)
    assert not got.done and len(got.contents) > 2


async def test_some_tokens_and_then_silence_for_ever() -> None:
    async with running(keep_alive_ms=5) as server:
        got = await ask(server, {"X-Fake-Fault": "total_deadline_stall"}, until=b": keep-alive")
    assert len(got.contents) == 3 and not got.done


async def test_a_stall_is_one_pause_after_some_tokens() -> None:
    async with running(gap_ms=1) as server:
        got = await faulty(server, "stall")
        [truth] = await logged(server, 1)
    assert len(got.contents) == 6 and got.done
    third, fourth = got.arrival_of(b'" cedar"'), got.arrival_of(b'" delta"')
    assert fourth - third > 20 * MS
    assert truth.last_token_ns and truth.first_token_ns and truth.last_token_ns - truth.first_token_ns >= 30 * MS


async def test_slow_headers_come_line_by_line() -> None:
    async with running() as server:
        for stream in (True, False):
            got = await faulty(server, "slow_headers", stream=stream)
            lines = got.head.count("\r\n") + 2  # and the empty one
            assert got.reads[-1][0] - got.reads[0][0] > (lines - 2) * 20 * MS
            assert got.status == 200
        assert got.json["object"] == "chat.completion"


async def test_split_writes_change_nothing_but_the_writes() -> None:
    async with running(tokens=2) as server:
        got = await faulty(server, "split_writes")
    assert got.contents == [" amber", " birch"] and got.done and got.ended_as_framed
    assert len(got.reads) > 5


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", FAULTS)
async def test_our_own_client_calls_a_fault_by_its_outcome(name: str, stream: bool) -> None:
    async with running(gap_ms=1) as server:
        wire = Wire(
            "127.0.0.1", server.port, "fake", "/v1/chat/completions", False, "m", stream, 0.0,
            first_token_s=0.25, total_s=0.4, headers={"X-Fake-Fault": name}, extra={},
        )  # fmt: skip
        client = Client(wire, 0, lambda kind: array("q"))
        prompt = Prompt("chat", 0, ({"role": "user", "content": "hello"},), 6)
        samples = [await client.send(Request(i, prompt, 0), level=0, phase="load") for i in range(2)]
        client.close()
    whole = {"truncated_no_done": "ok", "first_token_deadline": "total_deadline", "stream_error": "http_5xx",
             "stream_error_event": "http_5xx", "truncated_short": "truncated"}  # fmt: skip
    expected = FAULTS[name].outcome if stream else whole.get(name, FAULTS[name].outcome)
    assert samples[0].outcome == expected, samples[0].detail
    if FAULTS[name].later != "ok":
        assert samples[1].outcome == FAULTS[name].later


# --- which request goes wrong -----------------------------------------------------------------------------------------


async def test_the_model_or_the_last_message_may_name_the_fault() -> None:
    message = {"role": "user", "content": "please fail: fake-fault:http_5xx now"}
    async with running() as server:
        assert (await ask(server, model="fake-fault:out_of_memory")).status == 500
        assert (await ask(server, messages=[message])).status == 503
        assert (await ask(server, messages=[message, {"role": "user", "content": "go on"}])).status == 200
        assert (await ask(server, {"X-Fake-Fault": "none"}, messages=[message])).status == 200


async def test_every_nth_request_fails() -> None:
    async with running(faults=("http_5xx@3",)) as server:
        statuses = [(await ask(server)).status for _ in range(7)]
    assert statuses == [200, 200, 503, 200, 200, 503, 200]


async def test_a_share_of_the_requests_fails_and_the_seed_says_which() -> None:
    async def statuses(seed: int) -> list[int]:
        async with running(faults=("http_4xx:0.3",), seed=seed, tokens=0) as server:
            return [(await ask(server)).status for _ in range(40)]

    one, again, other = await statuses(1), await statuses(1), await statuses(2)
    assert one == again != other
    assert 3 <= one.count(429) <= 24


async def test_the_first_rule_that_applies_decides() -> None:
    async with running(faults=("http_5xx@2", "http_4xx")) as server:
        assert [(await ask(server)).status for _ in range(4)] == [429, 503, 429, 503]


async def test_a_fault_that_does_not_exist_is_a_400_that_names_those_that_do() -> None:
    async with running() as server:
        got = await faulty(server, "oom")
    assert got.status == 400
    assert (
        "expected one of context_exceeded" in got.json["error"]["message"] and "'oom'" in got.json["error"]["message"]
    )


async def test_a_header_changes_the_script_for_its_own_request() -> None:
    async with running() as server:
        assert len((await ask(server, {"X-Fake-Script": '{"tokens": 2}'})).contents) == 2
        assert len((await ask(server)).contents) == 6
        got = await ask(server, {"X-Fake-Script": '{"tokens": -2}'})
    assert got.status == 400 and got.json["error"]["message"].startswith("X-Fake-Script: tokens: ")


# --- the whole server -------------------------------------------------------------------------------------------------


async def test_in_a_stall_of_the_server_nothing_moves_and_afterwards_everything_goes_on() -> None:
    async with running(gap_ms=10, tokens=10, stall_at_s=0.05, stall_for_s=0.2, keep_alive_ms=30) as server:
        streaming = asyncio.create_task(ask(server))
        await until(lambda: is_answering(server))
        frozen = asyncio.Event()
        asyncio.get_running_loop().call_later(0.08, frozen.set)
        await frozen.wait()
        asked_ns = perf_counter_ns()
        models, late = await asyncio.gather(get(server, "/v1/models"), ask(server))
        got = await streaming
        first, second = await logged(server, 2)
    thawed_ns = first.received_ns + 250 * MS
    assert asked_ns < thawed_ns <= min(models.reads[0][0], late.reads[0][0])
    assert got.keep_alives == 0, "a server that stands still sends no comments"
    assert first.last_token_ns is not None and first.last_token_ns >= first.received_ns + 290 * MS
    assert second.received_ns < thawed_ns <= second.received_ns + (second.slot_wait_ns or 0)
    arrivals = [at_ns for at_ns, _ in got.reads]
    assert max(later - earlier for earlier, later in pairwise(arrivals)) > 190 * MS


async def test_memory_that_a_request_leaks_is_resident_and_stays() -> None:
    process = psutil.Process()
    async with running(leak_bytes=24 << 20) as server:
        before = process.memory_info().rss
        await ask(server)
        await ask(server)
        assert process.memory_info().rss - before > 40 << 20


async def test_without_the_token_there_is_no_answer_and_beyond_loopback_no_server() -> None:
    async with running(token="secret") as server:
        assert (await ask(server)).status == 401
        assert (await ask(server, {"Authorization": "Bearer wrong"})).status == 401
        assert (await ask(server, {"Authorization": "Bearer secret"})).done
    with pytest.raises(
        UsageError, match=r"^fake: --host: expected a loopback address unless --token is given, got 0\."
    ):
        await serve(Script(), host="0.0.0.0")
    everywhere = await serve(Script(), host="0.0.0.0", token="secret")
    assert everywhere.base_url == f"http://127.0.0.1:{everywhere.port}/v1"
    await everywhere.close()


async def test_a_port_that_is_taken_is_an_error_of_one_line() -> None:
    async with running() as server:
        with pytest.raises(UsageError, match=f"^fake: cannot listen on 127.0.0.1:{server.port}: .*in use"):
            await serve(Script(), port=server.port)


async def test_the_log_has_a_line_a_request_as_soon_as_it_ends(tmp_path: Path) -> None:
    log = tmp_path / "truth.jsonl"
    async with running(log=log) as server:
        await ask(server, {"X-Request-Id": "one"})
        await faulty(server, "http_5xx")
        truths = await logged(server, 2)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert lines == [truth._asdict() for truth in server.records]
        unfinished = asyncio.create_task(ask(server, {"X-Fake-Fault": "first_token_deadline"}))
        await until(lambda: is_answering(server))
    await unfinished
    assert len(truths) == 2
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["fault"], last["done_ns"]) == ("first_token_deadline", None)


# --- who it says it is ------------------------------------------------------------------------------------------------


async def test_foundry_2_tells_its_pid_lists_its_models_and_knows_nothing_else() -> None:
    async with running(flavour="foundry2", models=("tiny:1",)) as server:
        status = (await get(server, "/status")).json
        assert status["endpoints"] == [f"http://127.0.0.1:{server.port}"]
        assert status["pid"] == psutil.Process().pid
        models = (await get(server, "/v1/models")).json
        assert [model["id"] for model in models["data"]] == ["tiny:1"]
        lost = await get(server, "/health")
    assert lost.status == 404 and "text/plain" in lost.head


async def test_foundry_2_loads_by_alias_and_serves_by_id_what_is_loaded() -> None:
    async with running(flavour="foundry2", models=("tiny:1", "edge:1"), loaded=("edge:1",)) as server:
        assert (await get(server, "/models/loaded")).json == ["edge:1"]
        refused = await ask(server, model="tiny:1")
        assert refused.status == 400 and classify(refused.text.decode(), "") == "model_not_loaded"
        assert (await get(server, "/models/load/tiny:1")).status == 404
        assert (await get(server, "/models/load/tiny")).json == {"status": "loaded"}
        assert (await ask(server, model="tiny:1")).done
        assert (await get(server, "/models/unload/edge")).status == 200
        assert (await get(server, "/models/loaded")).json == ["tiny:1"]
        unknown = await ask(server, model="tiny")
    assert unknown.status == 404 and classify(unknown.text.decode(), "") == "model_not_found"


async def test_foundry_2_serves_models_of_ones_own_below_their_prefix_only() -> None:
    async with running(flavour="foundry2", prefix="/catalogs/local", models=("tiny:1",)) as server:
        assert server.base_url.endswith("/catalogs/local/v1")
        assert (await exchange(server, request_bytes(path="/catalogs/local/v1/chat/completions", model="tiny:1"))).done
        assert (await ask(server, model="tiny:1")).status == 404
        assert (await get(server, "/v1/models")).json["data"] == []
        assert (await get(server, "/catalogs/local/models/loaded")).json == ["tiny:1"]
        assert (await get(server, "/models/loaded")).json == []
        assert (await get(server, "/catalogs/local/models/unload/tiny")).status == 200
        assert (await get(server, "/catalogs/local/models/loaded")).json == []
        assert (await get(server, "/status")).status == 200


async def test_foundry_0_8_answers_its_own_routes() -> None:
    async with running(flavour="foundry08", models=("tiny-cpu:1",), loaded=()) as server:
        assert (await get(server, "/openai/status")).json["endpoints"] == [f"http://127.0.0.1:{server.port}"]
        assert (await get(server, "/openai/models")).json == ["tiny-cpu:1"]
        assert (await get(server, "/openai/load/tiny-cpu:1?ttl=600")).status == 200
        assert (await get(server, "/openai/loadedmodels")).json == ["tiny-cpu:1"]
        [row] = (await get(server, "/foundry/list")).json
    assert (row["name"], row["alias"], row["fileSizeMb"]) == ("tiny-cpu:1", "tiny-cpu", 822)


@pytest.mark.parametrize(
    ("flavour", "path", "key"),
    [
        ("ollama", "/api/version", "version"),
        ("ollama", "/api/tags", "models"),
        ("llamacpp", "/props", "default_generation_settings"),
        ("vllm", "/version", "version"),
        ("lmstudio", "/api/v0/models", "data"),
    ],
)
async def test_the_others_are_told_by_their_routes(flavour: str, path: str, key: str) -> None:
    async with running(flavour=flavour) as server, running() as plain:
        assert key in (await get(server, path)).json
        assert (await get(server, "/v1/models")).json["data"][0]["id"] == "fake-model:1"
        assert (await get(plain, path)).status == 404


async def test_ollama_loads_and_unloads_by_post() -> None:
    async with running(flavour="ollama", models=("llama:1b",), loaded=()) as server:
        assert (await get(server, "/api/ps")).json == {"models": []}
        for keep_alive, loaded in ((60, ["llama:1b"]), (0, [])):
            load = request_bytes(path="/api/generate", model="llama:1b", keep_alive=keep_alive)
            assert (await exchange(server, load)).status == 200
            assert [model["name"] for model in (await get(server, "/api/ps")).json["models"]] == loaded
        assert (await ask(server, model="other")).status == 404


# --- the script, the command, the process -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"gap_ms": -1}, "here: gap_ms: Input should be greater than or equal to 0, got -1"),
        ({"gap_ms": "fast"}, "here: gap_ms: .*, got 'fast'"),
        ({"slots": 0}, "here: slots: .*, got 0"),
        ({"gap": 1}, "here: gap: Unexpected keyword argument, got 1"),
        ({"faults": ["oom"]}, "here: faults: .*expected NAME, NAME:PROBABILITY or NAME@EVERY"),
        ({"faults": ["empty:2"]}, "here: faults: .*expected a probability from 0 to 1"),
        ({"flavour": "tgi"}, "here: flavour: .*expected one of openai, foundry2"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_its_name(values: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=f"^{error}") as caught:
        script_from(values, "here")
    assert "\n" not in str(caught.value)


def test_a_script_file_is_read_and_a_bad_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    path.write_text('{"gap_ms": 3, "faults": ["empty@2"]}')
    assert (script_from_file(path).gap_ms, script_from_file(path).faults) == (3, ("empty@2",))
    path.write_text("[1]")
    with pytest.raises(UsageError, match=r"script\.json: expected a JSON object"):
        script_from_file(path)
    with pytest.raises(UsageError, match=r"none\.json: expected a JSON file that can be read: No such file"):
        script_from_file(tmp_path / "none.json")


def test_the_command_has_an_option_for_every_value_and_tells_every_fault() -> None:
    text = CliRunner().invoke(fake_command, ["--help"]).output
    for name in (script_field.name for script_field in fields(Script)):
        assert re.search(rf"--{name.replace('_', '-').removesuffix('s')}", text), name
    for name in FAULTS:
        assert re.search(rf"^ +{name} ", text, re.MULTILINE), name


def test_an_option_that_makes_no_sense_is_one_line() -> None:
    for options, error in (
        (["--gap-ms", "-1"], r"fake: gap_ms: .*got '-1'"),
        (["--duration", "soon"], r"fake: --duration: expected a duration such as 15s, .*got 'soon'"),
    ):
        with pytest.raises(UsageError, match=error):
            CliRunner().invoke(fake_command, options, catch_exceptions=False)


def started(*options: str) -> tuple[subprocess.Popen[str], str]:
    code = "from loadbench.target.fake_cli import fake_command; fake_command()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_process_of_its_own_prints_its_url_first_and_stamps_with_our_clock(tmp_path: Path) -> None:
    (tmp_path / "script.json").write_text('{"first_token_ms": 30, "gap_ms": 50, "tokens": 2}')
    log = tmp_path / "truth.jsonl"
    process, url = started("--script", str(tmp_path / "script.json"), "--gap-ms", "2", "--log", str(log))
    port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/v1", url)[1])  # type: ignore[index]
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sent_ns = perf_counter_ns()
        sock.sendall(request_bytes())
        while sock.recv(1 << 16):
            pass
        ended_ns = perf_counter_ns()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    [truth] = [json.loads(line) for line in log.read_text().splitlines()]
    assert sent_ns <= truth["received_ns"] <= truth["first_token_ns"] - 30 * MS
    assert truth["first_token_ns"] < truth["last_token_ns"] <= truth["done_ns"] <= ended_ns
    assert truth["last_token_ns"] - truth["received_ns"] <= 32 * MS + truth["max_late_ns"]


@pytest.mark.parametrize("how", ["stdin closes", "duration", "SIGINT"])
def test_the_process_ends_when_it_was_told_to(how: str) -> None:
    options = {"stdin closes": ["--until-stdin-closes"], "duration": ["--duration", "100ms"], "SIGINT": []}[how]
    process, url = started(*options)
    assert url.startswith("http://127.0.0.1:")
    if how == "stdin closes":
        assert process.stdin is not None
        process.stdin.close()
    elif how == "SIGINT":
        process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
