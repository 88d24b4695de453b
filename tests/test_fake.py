"""The scripted endpoint when nothing goes wrong: its bytes, its times against its log, its slots and its queue."""

from __future__ import annotations

import asyncio
import time
from time import perf_counter_ns
from typing import Any

import pytest

from loadbench.target.fake_pacer import Pacer, _LoopTimer
from loadbench.target.fake_script import Script, stretch
from tests.raw import FIRST_CONTENT, MS, ask, exchange, holds, is_answering, logged, request_bytes, running

on_every_loop = pytest.mark.asyncio(loop_factories=["fast", "asyncio"])


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


@on_every_loop
async def test_the_log_and_the_client_agree_on_every_stamp() -> None:
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


def test_what_is_shared_stretches_times_by_the_universal_scalability_law() -> None:
    script = Script(slowdown=0.1, crosstalk=0.01)
    assert [stretch(script, active) for active in (1, 2, 4, 11)] == pytest.approx([1, 1.12, 1.42, 3.1])
    assert [stretch(Script(slowdown=1), active) for active in (1, 2, 3)] == [1, 2, 3]
    throughput = [active / stretch(script, active) for active in range(1, 31)]
    assert throughput.index(max(throughput)) + 1 in (9, 10)  # sqrt((1 - 0.1) / 0.01) = 9.5, where the law has its peak


async def test_crosstalk_makes_each_pay_for_every_pair() -> None:
    async with running(first_token_ms=0, gap_ms=2, crosstalk=0.5) as server:
        await asyncio.gather(*(ask(server, max_tokens=11) for _ in range(3)))
        truths = await logged(server, 3)
    for truth in truths:  # three at once: 1 + 0.5 × 3 × 2 = 4 times as long, but for the first gaps while they gather
        assert truth.last_token_ns is not None and truth.last_token_ns - truth.received_ns > 60 * MS


@on_every_loop
@pytest.mark.parametrize("loop_timer", [False, True], ids=["timerfd", "loop timer"])
async def test_the_pacer_calls_in_order_and_never_early(loop_timer: bool) -> None:
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
        await holds(lambda: any(not connection.writable for connection in server.connections))
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
        await holds(lambda: is_answering(server))
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


async def test_the_role_chunk_may_wait_for_the_slot() -> None:
    async with running(first_token_ms=40, tokens=1, slots=1, role_chunk="slot") as server:
        _, queued = await asyncio.gather(ask(server), ask(server))
        first, second = await logged(server, 2)
    assert second.slot_wait_ns is not None
    assert second.received_ns + second.slot_wait_ns <= queued.reads[0][0] == queued.arrival_of(b'"role"')
    assert first.done_ns is not None and queued.reads[0][0] >= first.done_ns


async def test_keep_alives_fill_a_silence_only() -> None:
    async with running(gap_ms=5, tokens=20, keep_alive_ms=60_000) as server:
        assert (await ask(server)).keep_alives == 0
