"""Bytes at the socket: each framing that HTTP/1.1 allows, in every cut, and what the client makes of the others."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from typing import Any, Literal

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadbench.outcomes import OUTCOMES
from loadbench.records import Sample
from tests.asking import (
    EVENTS,
    MS,
    STREAM,
    STREAM_HEAD,
    Peer,
    answering,
    ask,
    ask_once,
    chunked,
    client_to,
    head,
    listening,
)

pytestmark = pytest.mark.asyncio(loop_factories=["fast", "asyncio"])

BODY = b"".join(EVENTS)
WHOLE = json.dumps({"choices": [{"message": {"content": "Hello!"}, "finish_reason": "stop"}]}).encode()
ERROR = b'data: {"error":{"message":"Could not allocate the key-value cache buffer"}}\n\n'


def by_length(body: bytes, *lines: str, status: str = "200 OK", version: str = "1.1") -> bytes:
    return head(f"Content-Length: {len(body)}", *lines, status=status, version=version) + body


def pieces_of(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


async def answer(*pieces: bytes, end: Literal["stay", "close", "half", "reset"] = "stay", **changes: Any) -> Sample:
    """What the client makes of these bytes."""
    async with listening(answering(*pieces, end=end)) as port:
        return await ask_once(port, **changes)


def facts(sample: Sample) -> tuple[str, int, str | None, int | None]:
    return sample.outcome, sample.chunks, sample.finish_reason, sample.http_status


HONEST = ("ok", 3, "stop", 200)


# --- framings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "end"),
    [
        pytest.param(STREAM, "stay", id="a chunk an event"),
        pytest.param(STREAM_HEAD + chunked([BODY]), "stay", id="one chunk"),
        pytest.param(STREAM_HEAD + chunked(pieces_of(BODY, 7)), "stay", id="chunks that cut through events"),
        pytest.param(STREAM.replace(b"\r\ndata", b';a=1;b="c"\r\ndata'), "stay", id="chunk extensions"),
        pytest.param(STREAM_HEAD + chunked(end=b"0\r\nX-Took: 3\r\n\r\n"), "stay", id="trailers"),
        pytest.param(STREAM_HEAD + chunked(end=b"000\r\n\r\n"), "stay", id="a long zero"),
        pytest.param(by_length(BODY), "stay", id="content-length"),
        pytest.param(head() + BODY, "close", id="to the close"),
        pytest.param(head() + BODY, "half", id="to the half-close"),
        pytest.param(head(version="1.0") + BODY, "close", id="HTTP/1.0"),
        pytest.param(by_length(BODY, version="1.0"), "stay", id="HTTP/1.0 with content-length"),
        pytest.param(STREAM.replace(b"Content-Type", b"content-TYPE"), "stay", id="header names in any case"),
        pytest.param(by_length(BODY, *(f"X-{i}: {'x' * 1024}" for i in range(64))), "stay", id="64 KiB of headers"),
        pytest.param(by_length(BODY, f"X-Long: {'x' * 65536}"), "stay", id="one header of 64 KiB"),
    ],
)
async def test_an_honest_answer_is_ok_in_any_framing_and_any_cut(data: bytes, end: Literal["stay", "close"]) -> None:
    for pieces in ([data], pieces_of(data, max(1, len(data) // 50)), [data[:-1], data[-1:]]):
        assert facts(await answer(*pieces, end=end)) == HONEST


async def test_one_byte_a_write_is_slow_and_right() -> None:
    sample = await answer(*pieces_of(STREAM, 1))
    assert facts(sample) == HONEST
    assert sample.bytes_received == len(STREAM)
    assert sample.max_gap_ns is not None and sample.max_gap_ns > 0


@pytest.mark.parametrize(
    "interim",
    [
        head(status="100 Continue"),
        head("Content-Length: 0", status="100 Continue"),
        head("Link: </style.css>; rel=preload", "Content-Type: application/json", status="103 Early Hints"),
        head(status="102 Processing") * 5,
    ],
)
@pytest.mark.parametrize("framing", ["chunked", "close"])
async def test_interim_answers_are_passed_over(interim: bytes, framing: str) -> None:
    data, end = (STREAM, "stay") if framing == "chunked" else (head() + BODY, "close")
    assert facts(await answer(interim + data, end=end)) == HONEST  # type: ignore[arg-type]
    sample = await answer(interim, data, end=end)  # type: ignore[arg-type]
    assert facts(sample) == HONEST
    assert sample.headers_ns is not None and sample.first_event_ns is not None
    assert sample.first_event_ns - sample.headers_ns < 20 * MS


@pytest.mark.parametrize(
    ("data", "end"),
    [
        (by_length(WHOLE, "Content-Type: application/json"), "stay"),
        (head("Transfer-Encoding: chunked") + chunked(pieces_of(WHOLE, 9)), "stay"),
        (head() + WHOLE, "close"),
        (by_length(WHOLE, version="1.0"), "stay"),
    ],
)
async def test_a_document_is_read_in_any_framing(data: bytes, end: Literal["stay", "close"]) -> None:
    for pieces in ([data], pieces_of(data, 11)):
        sample = await answer(*pieces, end=end, stream=False)
        assert (sample.outcome, sample.finish_reason, sample.first_token_ns) == ("ok", "stop", None)


# --- what comes before, after and between answers ---------------------------------------------------------------------


async def test_a_half_close_after_a_whole_answer_costs_no_request() -> None:
    """The bytes of the answer and the FIN are both there when the client looks, and it asks again at once."""

    async def play(listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(3):
            sock, _ = await loop.sock_accept(listener)
            with sock:
                sock.setblocking(False)
                await loop.sock_recv(sock, 1 << 16)
                sock.sendall(STREAM)
                sock.shutdown(socket.SHUT_WR)
                await loop.sock_recv(sock, 1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        playing = asyncio.create_task(play(listener))
        async with client_to(listener.getsockname()[1]) as client:
            samples = [await ask(client, seq=seq) for seq in range(3)]
            assert client.connections_opened == 3
        playing.cancel()
    assert [facts(sample) for sample in samples] == [HONEST] * 3


async def test_what_nobody_asked_for_spoils_the_idle_connection_and_no_request() -> None:
    left = asyncio.Event()

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(STREAM)
        if not left.is_set():
            await peer.send(by_length(b"", status="408 Request Timeout"))
            await peer.request()
            left.set()

    async with listening(play) as port, client_to(port) as client:
        first = await ask(client)
        async with asyncio.timeout(5):
            await left.wait()  # the client closes what it cannot use
        second = await ask(client, seq=1)
        assert client.connections_opened == 2
    assert [facts(first), facts(second)] == [HONEST] * 2
    assert first.bytes_received == len(STREAM)


async def test_what_nobody_asked_for_is_found_even_if_it_lies_unread() -> None:
    """It came in the same turn of the loop in which the next request is sent."""
    connections: list[Peer] = []

    async def play(peer: Peer) -> None:
        connections.append(peer)
        while await peer.request() is not None:
            await peer.send(STREAM)

    async with listening(play) as port, client_to(port) as client:
        first = await ask(client)
        connections[0].send_now(by_length(b"", status="408 Request Timeout"))
        second = await ask(client, seq=1)
        assert client.connections_opened == 2
    assert [facts(first), facts(second)] == [HONEST] * 2


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(STREAM, id="the same again"),
        pytest.param(by_length(b"busy", status="503 Service Unavailable"), id="another answer"),
        pytest.param(b"\r\nHTTP/1.1 200", id="the beginning of one"),
        pytest.param(b"garbage", id="garbage"),
    ],
)
async def test_bytes_after_the_answer_break_the_protocol_and_change_nothing_else(extra: bytes) -> None:
    async with listening(answering(STREAM + extra)) as port, client_to(port) as client:
        sample = await ask(client)
        assert (sample.outcome, sample.chunks, sample.http_status) == ("protocol", 3, 200)
        assert sample.detail is not None and ("after the end" in sample.detail or "not HTTP" in sample.detail)
        await ask(client, seq=1)
        assert client.connections_opened == 2


@pytest.mark.parametrize(
    "data", [by_length(BODY, "Connection: close"), by_length(BODY, version="1.0")], ids=["close", "HTTP/1.0"]
)
async def test_a_connection_that_is_to_be_closed_is_not_used_again_though_it_stays_open(data: bytes) -> None:
    async with listening(answering(data)) as port, client_to(port) as client:
        samples = [await ask(client, seq=seq) for seq in range(2)]
        assert client.connections_opened == 2
    assert [facts(sample) for sample in samples] == [HONEST] * 2


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "outcome", "detail"),
    [
        (
            by_length(b"", "Location: https://elsewhere/v1", status="307 Temporary Redirect"),
            "protocol",
            "redirect (307) to https://elsewhere/v1 refused: name the final URL",
        ),
        (by_length(b"", status="302 Found"), "protocol", "redirect (302) to nowhere refused: name the final URL"),
        (
            by_length(gzip.compress(BODY), "Content-Encoding: gzip"),
            "protocol",
            "content-encoding gzip, though identity was asked for",
        ),
        (
            head("Upgrade: websocket", "Connection: Upgrade", status="101 Switching Protocols"),
            "protocol",
            "the server wants to switch protocols",
        ),
        (by_length(b"", status="204 No Content"), "protocol", "HTTP 204 without a body"),
        (by_length(WHOLE, "Content-Type: application/json"), "protocol", WHOLE.decode()),
        (by_length(b"no such route", status="404 Not Found"), "http_4xx", "no such route"),
        (by_length(b"", status="502 Bad Gateway"), "http_5xx", "HTTP 502 without a body"),
        (by_length(b"<h1>\x1b[31mOops\r\n</h1>", status="500 Oops"), "http_5xx", "<h1> [31mOops </h1>"),
    ],
)
async def test_an_answer_that_is_no_stream_is_refused_with_its_reason(data: bytes, outcome: str, detail: str) -> None:
    for pieces in ([data], pieces_of(data, 10)):
        sample = await answer(*pieces)
        assert (sample.outcome, sample.detail, sample.chunks) == (outcome, detail, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"garbage",
        b"\x16\x03\x01\x00\xff\xfe \x00\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 two hundred\r\n\r\n",
        head("Content-Length: many"),
        head("Content-Length: 5", "Content-Length: 6") + b"123456",
        head("No colon") + BODY,
        STREAM_HEAD + b"xyz\r\n",
    ],
)
async def test_what_is_not_http_is_quoted(data: bytes) -> None:
    sample = await answer(data)
    assert sample.outcome == "protocol"
    assert sample.detail is not None and sample.detail.startswith("not HTTP: ") and sample.detail.isprintable()


async def test_an_answer_without_end_is_refused_before_it_fills_the_memory() -> None:
    page = head("Transfer-Encoding: chunked", status="500 Oops") + chunked([b"x" * (1 << 20)] * 17)
    sample = await answer(page)
    assert (sample.outcome, sample.detail) == ("protocol", "an answer of more than 16 MiB")


# --- connections that break -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "half", "reset"])
@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"", "before the headers"),
        (STREAM_HEAD[:20], "before the headers"),
        (STREAM_HEAD, "after 0 content chunks"),
        (STREAM_HEAD + chunked(EVENTS[:3], end=b""), "after 2 content chunks"),
        (STREAM_HEAD + chunked(EVENTS[:5], end=b""), "after 3 content chunks"),
        (by_length(BODY)[:-80], "after 3 content chunks"),
    ],
)
async def test_a_connection_that_ends_early_is_lost(
    data: bytes, where: str, end: Literal["close", "half", "reset"]
) -> None:
    sample = await answer(data, end=end)
    why = "Connection reset by peer" if end == "reset" else "closed"
    assert (sample.outcome, sample.detail) == ("connection_lost", f"{why} {where}")


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_an_answer_of_which_only_the_framing_is_missing_is_whole(end: Literal["close", "reset"]) -> None:
    assert facts(await answer(STREAM_HEAD + chunked(end=b""), end=end)) == HONEST


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_an_error_that_was_sent_is_told_though_the_connection_breaks_after_it(
    end: Literal["close", "reset"],
) -> None:
    sample = await answer(STREAM_HEAD + chunked([*EVENTS[:2], ERROR], end=b""), end=end)
    assert (sample.outcome, sample.chunks) == ("out_of_memory", 1)
    assert sample.detail == "Could not allocate the key-value cache buffer"


@pytest.mark.asyncio(loop_factories=["fast"])  # it takes the client's whole second of grace
@pytest.mark.parametrize(("said", "outcome"), [(EVENTS, "ok"), ((*EVENTS[:2], ERROR), "out_of_memory")])
async def test_an_http_message_that_does_not_end_is_not_waited_for_when_all_is_said(
    said: tuple[bytes, ...], outcome: str
) -> None:
    async def play(peer: Peer) -> None:
        while request := await peer.request():
            await peer.send(STREAM if b"load-3-1" in request else STREAM_HEAD + chunked(said, end=b""))

    async with listening(play) as port, client_to(port) as client:
        async with asyncio.timeout(3):  # less than every deadline
            sample = await ask(client)
        after = await ask(client, seq=1)
        assert client.connections_opened == 2
    assert (sample.outcome, after.outcome) == (outcome, "ok")
    if outcome == "ok":
        assert sample.done_ns is not None and sample.last_token_ns is not None
        assert sample.done_ns - sample.last_token_ns < 500 * MS, "the end is [DONE], not the end of our patience"


async def test_a_close_delimited_stream_that_is_cut_is_truncated() -> None:
    sample = await answer(head() + b"".join(EVENTS[:3]), end="close")
    assert (sample.outcome, sample.detail, sample.chunks) == ("truncated", "no finish_reason", 2)


async def test_an_empty_stream_is_truncated() -> None:
    sample = await answer(STREAM_HEAD + chunked([]))
    assert (sample.outcome, sample.detail) == ("truncated", "the stream held no event")


# --- everything else --------------------------------------------------------------------------------------------------

ANSWERS = [
    (STREAM, True),
    (by_length(BODY), True),
    (head(status="100 Continue") + STREAM_HEAD + chunked([BODY], end=b"0\r\nX-Took: 3\r\n\r\n"), True),
    (by_length(WHOLE), False),
    (by_length(b'{"error":{"message":"Model not loaded"}}', status="400 Bad Request"), True),
]
CUTS = st.lists(st.integers(1, 90), min_size=1, max_size=12)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces: list[bytes] = []
    at = 0
    while at < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[at : at + size])
        at += size
    return pieces


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[bytes, bool]:
    """An honest answer, of which up to four places were overwritten, doubled, cut out or broken off."""
    data, stream = draw(st.sampled_from(ANSWERS))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        upto = at + draw(st.integers(0, 40))
        how = draw(st.sampled_from(["overwrite", "insert", "double", "remove", "break off"]))
        if how in ("overwrite", "insert"):
            noise = draw(st.binary(max_size=8) | st.sampled_from([b"\r\n", b"\r\n\r\n", b"0", b"HTTP/1.1 ", b"data: "]))
            data = data[:at] + noise + data[at if how == "insert" else at + len(noise) :]
        elif how == "double":
            data = data[:upto] + data[at:]
        else:
            data = data[:at] + (data[upto:] if how == "remove" else b"")
    return data, stream


@settings(max_examples=200, deadline=None)
@given(spoilt(), CUTS, st.sampled_from(["close", "half", "reset"]))
async def test_whatever_comes_there_is_a_sample_and_soon(
    answer_: tuple[bytes, bool], sizes: list[int], end: Literal["close", "half", "reset"]
) -> None:
    data, stream = answer_
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    async with asyncio.timeout(5):
        sample = await answer(*cut(data, sizes), end=end, stream=stream, first_token_s=2.0, total_s=2.0)
    assert sample.outcome in OUTCOMES
    assert sample.detail is None or (sample.detail.isprintable() and len(sample.detail) <= 500)
    assert orjson.dumps(sample._asdict())
    assert not errors


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([data for data, stream in ANSWERS[:3]]), CUTS)
async def test_an_honest_answer_is_ok_in_whatever_cut(data: bytes, sizes: list[int]) -> None:
    assert facts(await answer(*cut(data, sizes))) == HONEST
