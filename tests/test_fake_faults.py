"""What the scripted endpoint does wrong, byte for byte, and to which request."""

from __future__ import annotations

import asyncio
import gzip
import json
import re

import pytest

from loadbench.outcomes import OUTCOMES, classify
from loadbench.target.fake_faults import FAULTS
from tests.raw import MS, ask, faulty, holds, is_answering, logged, running

on_every_loop = pytest.mark.asyncio(loop_factories=["fast", "asyncio"])


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


@on_every_loop
@pytest.mark.parametrize(
    ("name", "contents", "was_reset"),
    [("connection_lost", 3, True), ("connection_lost_close", 3, False), ("connection_lost_early", 0, True)],
)
async def test_a_lost_connection_is_reset_or_closed_in_the_middle(name: str, contents: int, was_reset: bool) -> None:
    async with running() as server:
        got, whole = await faulty(server, name), await faulty(server, name, stream=False)
    assert (len(got.contents) if got.raw else 0, got.was_reset) == (contents, was_reset)
    assert not got.ended_as_framed
    promised = re.search(r"Content-Length: (\d+)", whole.head)
    assert promised is None or len(whole.body) < int(promised[1])


async def test_after_so_many_requests_nobody_listens_and_the_last_is_still_answered() -> None:
    async with running(refuse_after=2) as server:
        _, idle = await asyncio.open_connection("127.0.0.1", server.port)
        assert (await ask(server)).done
        assert (await ask(server)).done
        with pytest.raises(ConnectionRefusedError):
            await ask(server)
        await holds(lambda: not server.connections)  # the idle one was closed
        idle.close()


async def test_a_crash_resets_everybody_and_then_refuses() -> None:
    async with running(first_token_ms=1) as server:
        bystander = asyncio.create_task(ask(server, {"X-Fake-Script": '{"first_token_ms": 60000}'}))
        await holds(lambda: is_answering(server))
        assert (await faulty(server, "crash")).was_reset
        assert (await bystander).was_reset
        with pytest.raises(ConnectionRefusedError):
            await ask(server)


async def test_the_first_token_never_comes_and_keep_alives_go_on() -> None:
    async with running(keep_alive_ms=5) as server:
        got = await ask(
            server, {"X-Fake-Fault": "first_token_deadline"}, until=b": keep-alive\n\n\r\nE\r\n: keep-alive"
        )
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
    assert len(got.reads) > 20  # of some 400 writes; a busy machine reads several at once


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
