"""The engine's client: stamps against the endpoint's own, deadlines on the clock, connections, what it sends."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any

import pytest

from loadbench.records import Sample
from loadbench.target.fake import FakeServer, Truth
from tests.asking import (
    DONE,
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
    event,
    faking,
    head,
    listening,
    measured,
)

pytestmark = pytest.mark.asyncio(loop_factories=["fast"])


def ns(stamp: int | None) -> int:
    assert stamp is not None
    return stamp


def by_seq(server: FakeServer, samples: list[Sample]) -> list[tuple[Sample, Truth]]:
    """Each sample with the endpoint's record of it, made in the turn of the one loop in which it sent the last byte."""
    truths = {truth.request_id: truth for truth in server.records}
    return [(sample, truths[f"load-3-{sample.seq}"]) for sample in samples]


@contextmanager
def unanswered() -> Iterator[int]:
    """A port that takes no more connections: its backlog is full, and Linux drops what comes then."""
    if sys.platform != "linux":
        pytest.skip("how a full backlog behaves is known for Linux only")
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as held:
        address = listener.getsockname()
        for _ in range(3):
            sock = held.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(address)
        yield address[1]


# --- stamps -----------------------------------------------------------------------------------------------------------


async def test_the_stamps_are_in_order_and_never_before_the_endpoints_own() -> None:
    async with faking(first_token_ms=20, gap_ms=5) as server, client_to(server.port) as client:
        samples = [await ask(client, seq=seq) for seq in range(5)]
        pairs = by_seq(server, samples)
    for sample, truth in pairs:
        stamps = [sample.due_ns, sample.sent_ns, sample.headers_ns, sample.first_event_ns, sample.first_token_ns]
        stamps += [sample.last_token_ns, sample.done_ns]
        assert stamps == sorted(map(ns, stamps))
        assert ns(sample.sent_ns) <= truth.received_ns <= ns(sample.headers_ns)
        assert ns(truth.first_token_ns) <= ns(sample.first_token_ns)
        assert ns(truth.last_token_ns) <= ns(sample.last_token_ns) <= ns(sample.done_ns)


async def test_the_first_and_the_last_token_are_stamped_when_the_endpoint_sent_them() -> None:
    async def errors_ns() -> list[int]:
        async with faking(first_token_ms=30, first_token_jitter_ms=20, gap_ms=2) as server:
            async with client_to(server.port) as client:
                await client.open(8)
                samples = []
                for first in range(0, 48, 8):
                    samples += await asyncio.gather(*(ask(client, seq=first + i) for i in range(8)))
            pairs = by_seq(server, samples)
        firsts = [ns(sample.first_token_ns) - ns(truth.first_token_ns) for sample, truth in pairs]
        lasts = [ns(sample.last_token_ns) - ns(truth.last_token_ns) for sample, truth in pairs]
        assert min(firsts) >= 0 and min(lasts) >= 0
        return [int(median(firsts)), int(median(lasts))]

    assert max(await measured(errors_ns, lambda errors: max(errors) < 2 * MS)) < 2 * MS


async def test_a_first_token_after_100_ms_reads_100_ms_whatever_came_before_it() -> None:
    async def ttfts_ns() -> list[int]:
        """With the role-only chunk at once and keep-alives, as Foundry Local sends them."""
        async with faking(first_token_ms=100, keep_alive_ms=20) as server, client_to(server.port) as client:
            await client.open(8)
            samples = []
            for first in range(0, 24, 8):
                samples += await asyncio.gather(*(ask(client, seq=first + i) for i in range(8)))
        assert all(sample.outcome == "ok" and sample.keep_alives >= 2 for sample in samples)
        early = [ns(sample.first_event_ns) - ns(sample.sent_ns) for sample in samples]
        assert median(early) < 50 * MS
        return [ns(sample.first_token_ns) - ns(sample.sent_ns) for sample in samples]

    p50_ns = median(await measured(ttfts_ns, lambda ttfts: abs(median(ttfts) - 100 * MS) <= 2 * MS))
    assert 100 * MS <= p50_ns <= 102 * MS


async def test_the_headers_are_stamped_when_they_are_whole() -> None:
    async with faking() as server, client_to(server.port) as client:
        sample = await ask(client, "fake-fault:slow_headers")  # five lines, 20 ms apart
    assert 60 * MS < ns(sample.headers_ns) - ns(sample.sent_ns) <= ns(sample.first_event_ns) - ns(sample.sent_ns)


async def test_every_gap_between_chunks_is_kept_and_the_largest_is_in_the_sample() -> None:
    gaps = array("q")
    async with faking(gap_ms=5, stall_ms=60) as server, client_to(server.port, gaps) as client:
        sample = await ask(client, "fake-fault:stall", max_tokens=8)
        assert (sample.outcome, len(gaps), sample.max_gap_ns) == ("ok", 7, max(gaps))
        assert sum(gaps) == ns(sample.last_token_ns) - ns(sample.first_token_ns)
        assert ns(sample.max_gap_ns) > 50 * MS
        await ask(client, phase="warmup")
        assert len(gaps) == 7, "a warm-up is in no histogram"


async def test_only_an_answer_in_pieces_has_a_first_token() -> None:
    async with faking(first_token_ms=20, gap_ms=5) as server, client_to(server.port, stream=False) as client:
        sample = await ask(client)
        [truth] = server.records
    assert (sample.outcome, sample.first_event_ns, sample.first_token_ns, sample.max_gap_ns) == ("ok", None, None, None)
    assert ns(truth.last_token_ns) <= ns(sample.headers_ns) <= ns(sample.last_token_ns) == ns(sample.done_ns)
    assert (sample.chunks, sample.output_tokens, sample.token_source, sample.input_tokens) == (0, 6, "usage", 5)


# --- tokens -----------------------------------------------------------------------------------------------------------


async def test_tokens_are_the_endpoints_count_where_it_gives_one() -> None:
    async with faking(tokens_per_chunk=3) as server:
        sample = await ask_once(server.port)
    assert (sample.chunks, sample.output_tokens, sample.input_tokens, sample.token_source) == (2, 6, 5, "usage")


async def test_tokens_are_chunks_where_the_endpoint_gives_no_count() -> None:
    async with faking(tokens_per_chunk=3, usage=False) as server:
        sample = await ask_once(server.port)
    assert (sample.chunks, sample.output_tokens, sample.input_tokens, sample.token_source) == (2, 2, None, "chunks")


async def test_no_token_seen_and_none_counted_is_none_and_not_zero() -> None:
    async with listening(answering(STREAM_HEAD + chunked((event(""), event(None, "stop"), DONE)))) as port:
        sample = await ask_once(port)
    assert (sample.outcome, sample.output_tokens, sample.token_source) == ("empty", None, None)
    assert (sample.first_token_ns, sample.last_token_ns, sample.max_gap_ns) == (None, None, None)


# --- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "stream", "first_token_s", "total_s", "outcome"),
    [
        ("first_token_deadline", True, 0.1, 5.0, "first_token_deadline"),
        ("first_token_deadline", True, 5.0, 0.1, "total_deadline"),
        ("total_deadline", True, 0.05, 0.1, "total_deadline"),
        ("total_deadline_stall", True, 0.05, 0.1, "total_deadline"),
        ("first_token_deadline", False, 0.05, 0.1, "total_deadline"),
    ],
)
async def test_a_deadline_fires_on_the_clock_whatever_the_socket_does(
    fault: str, stream: bool, first_token_s: float, total_s: float, outcome: str
) -> None:
    async def late() -> Sample:
        deadlines = {"first_token_s": first_token_s, "total_s": total_s}
        async with (
            faking(keep_alive_ms=10) as server,
            client_to(server.port, None, stream=stream, **deadlines) as client,
        ):
            return await ask(client, f"fake-fault:{fault}")

    def waited_ms(sample: Sample) -> float:
        return (ns(sample.done_ns) - ns(sample.sent_ns)) / MS

    sample = await measured(late, lambda sample: waited_ms(sample) < 150)
    assert sample.outcome == outcome
    assert 100 <= waited_ms(sample) < 150
    assert stream == (sample.bytes_received > 0)
    assert (sample.keep_alives > 0) == (stream and fault != "total_deadline")


async def test_once_a_token_came_the_first_token_deadline_is_past() -> None:
    async with faking(gap_ms=20) as server:
        sample = await ask_once(server.port, first_token_s=0.05)
    assert (sample.outcome, sample.chunks) == ("ok", 6)


async def test_an_answer_in_one_piece_has_no_first_token_to_wait_for() -> None:
    async with faking(first_token_ms=120) as server:
        assert (await ask_once(server.port, stream=False, first_token_s=0.05)).outcome == "ok"


async def test_a_connection_is_given_up_at_the_deadline_and_called_refused() -> None:
    with unanswered() as port:
        sample = await ask_once(port, first_token_s=0.1)
    assert (sample.outcome, sample.sent_ns) == ("connect_refused", None)
    assert sample.detail == "no connection before the first-token deadline"


# --- connections ------------------------------------------------------------------------------------------------------


async def test_a_connection_is_kept_and_its_making_is_a_time_of_its_own() -> None:
    async with faking() as server, client_to(server.port) as client:
        samples = [await ask(client, seq=seq) for seq in range(3)]
        assert client.connections_opened == server.connections_seen == 1
    assert [sample.connect_ns is None for sample in samples] == [False, True, True]
    assert samples[0].due_ns + ns(samples[0].connect_ns) <= ns(samples[0].sent_ns)


async def test_connections_opened_beforehand_serve_the_first_requests() -> None:
    async with faking(first_token_ms=20) as server, client_to(server.port) as client:
        await client.open(70)
        await client.open(3)  # there are enough
        assert client.connections_opened == 70
        samples = await asyncio.gather(*(ask(client, seq=seq) for seq in range(71)))
        assert client.connections_opened == server.connections_seen == 71
    assert [sample.seq for sample in samples if sample.connect_ns is not None] == [70]
    assert {sample.outcome for sample in samples} == {"ok"}


@pytest.mark.parametrize("script", [{"connection_close": True}, {"framing": "close"}])
async def test_a_connection_that_the_endpoint_closes_is_not_used_again(script: dict[str, Any]) -> None:
    async with faking(**script) as server, client_to(server.port) as client:
        samples = [await ask(client, seq=seq) for seq in range(3)]
        assert client.connections_opened == 3
    assert [sample.outcome for sample in samples] == ["ok"] * 3


async def test_an_endpoint_that_is_not_there_is_no_error_until_a_request_is_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    async with client_to(port) as client:
        await client.open(8)
        sample = await ask(client)
    assert (sample.outcome, sample.sent_ns, sample.connect_ns) == ("connect_refused", None, None)
    assert sample.detail == "Connection refused"
    assert ns(sample.done_ns) >= sample.due_ns


async def test_what_is_idle_can_be_closed() -> None:
    async with faking() as server, client_to(server.port) as client:
        await client.open(3)
        client.close()
        await ask(client)
        assert len(server.connections) == 1


async def test_what_is_in_flight_can_be_ended_as_censored() -> None:
    asked = asyncio.Event()

    async def answer_all_but_the_second(peer: Peer) -> None:
        while request := await peer.request():
            await peer.send(STREAM if b"load-3-1" not in request else STREAM_HEAD + chunked(EVENTS[:2], end=b""))
            asked.set()

    async with listening(answer_all_but_the_second) as port, client_to(port) as client:
        await ask(client)
        asked.clear()
        endless = asyncio.create_task(ask(client, seq=1))
        await asked.wait()
        asked_ns = perf_counter_ns()
        client.abort("censored", "unfinished when the drain ended")
        sample, after = await endless, await ask(client, seq=2)
    assert (sample.outcome, sample.detail, sample.chunks) == ("censored", "unfinished when the drain ended", 1)
    assert ns(sample.last_token_ns) <= asked_ns <= ns(sample.done_ns)
    assert (after.outcome, after.connect_ns is None) == ("ok", False)


async def test_a_request_that_still_waits_for_its_connection_can_be_ended_too() -> None:
    with unanswered() as port:
        async with client_to(port) as client:
            waiting = asyncio.create_task(ask(client))
            done, _ = await asyncio.wait({waiting}, timeout=0.05)
            assert not done
            asked_ns = perf_counter_ns()
            client.abort("censored", "unfinished when the drain ended")
            sample = await waiting
    assert (sample.outcome, sample.detail) == ("censored", "unfinished when the drain ended")
    assert sample.sent_ns is None
    assert asked_ns <= ns(sample.done_ns) < asked_ns + 1000 * MS


async def test_it_can_even_be_ended_in_the_moment_of_its_deadline() -> None:
    loop, errors = asyncio.get_running_loop(), list[Any]()
    loop.set_exception_handler(lambda loop, context: errors.append(context))
    with unanswered() as port:
        async with client_to(port, first_token_s=0.02) as client:
            waiting = asyncio.create_task(ask(client))
            loop.call_later(0.03, client.abort, "censored", "unfinished when the drain ended")
            loop.call_soon(time.sleep, 0.1)  # then both are due in one turn of the loop
            sample = await waiting
    assert (sample.outcome, sample.sent_ns, errors) == ("censored", None, [])


async def test_a_request_that_is_cancelled_takes_its_connection_with_it() -> None:
    left = asyncio.Event()

    async def never_answer(peer: Peer) -> None:
        while await peer.request() is not None:
            asked.set()
        left.set()

    asked = asyncio.Event()
    async with listening(never_answer) as port, client_to(port) as client:
        asking = asyncio.create_task(ask(client))
        await asked.wait()
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        async with asyncio.timeout(5):
            await left.wait()


# --- what is sent -----------------------------------------------------------------------------------------------------


async def sent(**changes: Any) -> tuple[str, dict[str, str], dict[str, Any]]:
    """What a server reads of one request: request line, headers, body."""
    requests: list[bytes] = []
    async with listening(answering(STREAM, requests=requests)) as port:
        await ask_once(port, authority="box:5273", **changes)
    [request] = requests
    text, _, body = request.partition(b"\r\n\r\n")
    line, *lines = text.decode().split("\r\n")
    headers = dict(header.split(": ", 1) for header in lines)
    assert len(headers) == len(lines), "no header comes twice"
    return line, headers, json.loads(body)


async def test_a_streaming_request_says_all_that_matters() -> None:
    line, headers, body = await sent()
    assert line == "POST /v1/chat/completions HTTP/1.1"
    assert headers.pop("Content-Length").isdigit()
    assert headers == {
        "Host": "box:5273",
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "Accept-Encoding": "identity",
        "User-Agent": "loadbench",
        "X-Request-Id": "load-3-0",
    }
    assert body == {
        "model": "m:1",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "max_tokens": 6,
    }


async def test_without_stream_and_temperature_nothing_is_said_of_them() -> None:
    _, headers, body = await sent(stream=False, temperature=None)
    assert headers["Accept"] == "application/json"
    assert (body["stream"], "stream_options" in body, "temperature" in body) == (False, False, False)


async def test_extra_keys_arrive_and_override() -> None:
    _, _, body = await sent(extra={"top_k": 1, "stop": ["\n"], "temperature": 0.7})
    assert (body["top_k"], body["stop"], body["temperature"]) == (1, ["\n"], 0.7)


async def test_headers_arrive_as_they_are_and_instead_of_ours() -> None:
    given = {"user-agent": "me", "X-Load": "100 %d %s", "X-Name": "Jürgen"}
    line, headers, _ = await sent(headers=given, path="/models/a%3A1%20b/chat")
    assert line == "POST /models/a%3A1%20b/chat HTTP/1.1"
    assert {name: headers[name] for name in given} == given
    assert "User-Agent" not in headers


async def test_the_request_id_says_which_sample_it_was() -> None:
    async with faking() as server, client_to(server.port) as client:
        await ask(client, seq=41, phase="warmup")
        assert server.records[0].request_id == "warmup-3-41"


async def test_a_key_arrives_and_is_nowhere_in_the_sample_even_if_the_server_repeats_it() -> None:
    key = "sk-4711-0815"
    _, headers, _ = await sent(headers={"Authorization": f"Bearer {key}"})
    assert headers["Authorization"] == f"Bearer {key}"
    said = json.dumps({"error": {"message": f"Incorrect API key provided: {key}"}}).encode()
    refusal = head(f"Content-Length: {len(said)}", status="401 Unauthorized") + said
    async with listening(answering(refusal)) as port:
        sample = await ask_once(port, headers={"Authorization": f"Bearer {key}"})
    assert (sample.outcome, sample.detail) == ("http_4xx", "Incorrect API key provided: …")
    assert key not in str(sample)


# --- networks ---------------------------------------------------------------------------------------------------------


async def test_ipv6_is_served_like_everything_else() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    async with faking("::1") as server:
        sample = await ask_once(server.port, host="::1", authority=f"[::1]:{server.port}")
    assert (sample.outcome, sample.chunks) == ("ok", 6)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate in one file, for localhost and ::1, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:::1", "-keyout", "key.pem", "-out", "certificate.pem"]
    subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_bytes((folder / "key.pem").read_bytes() + (folder / "certificate.pem").read_bytes())
    return both


@pytest.mark.parametrize("authority", ["localhost:8443", "localhost", "[::1]:8443", "[::1]"])
async def test_tls_is_spoken_to_who_is_trusted(
    authority: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    async with listening(answering(STREAM), tls) as port, client_to(port, tls=True, authority=authority) as client:
        samples = [await ask(client, seq=seq) for seq in range(2)]
    assert [(sample.outcome, sample.chunks) for sample in samples] == [("ok", 3)] * 2, samples[0].detail
    assert [sample.connect_ns is None for sample in samples] == [False, True]


@pytest.mark.parametrize(("authority", "trusted"), [("localhost:8443", False), ("elsewhere:8443", True)])
async def test_tls_is_not_spoken_to_a_stranger(
    authority: str, trusted: bool, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    async with listening(answering(STREAM), tls) as port:
        sample = await ask_once(port, tls=True, authority=authority)
    assert (sample.outcome, sample.sent_ns) == ("connect_refused", None)
    assert sample.detail is not None and "CERTIFICATE_VERIFY_FAILED" in sample.detail


@pytest.mark.skipif(sys.platform != "linux", reason="delayed acknowledgements are switched off differently elsewhere")
async def test_tokens_are_seen_when_a_server_with_nagle_sends_them() -> None:
    """As Foundry Local 2.2.1 sends: the headers, then size, event and line end of each chunk in small writes."""
    gap_s, tokens = 0.004, 12
    sent_ns: list[int] = []

    async def play(listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        sock, _ = await loop.sock_accept(listener)
        with sock:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
            while await loop.sock_recv(sock, 1 << 16):
                await loop.sock_sendall(sock, STREAM_HEAD)
                for _ in range(tokens):
                    await asyncio.sleep(gap_s)
                    sent_ns.append(perf_counter_ns())
                    for piece in (b"%x\r\n" % len(event("x")), event("x"), b"\r\n"):
                        await loop.sock_sendall(sock, piece)
                await loop.sock_sendall(sock, chunked((event(None, "stop"), DONE)))

    async def errors_ns() -> list[int]:
        """How late the first tokens were, and the largest gaps, of requests on a connection that is not new."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            playing = asyncio.create_task(play(listener))
            async with client_to(listener.getsockname()[1]) as client:
                await ask(client)
                samples, firsts = [], []
                for seq in range(1, 6):
                    sent_ns.clear()
                    samples.append(await ask(client, seq=seq))
                    firsts.append(ns(samples[-1].first_token_ns) - sent_ns[0])
                assert client.connections_opened == 1
            with suppress(ConnectionError):
                await playing
        assert {(sample.outcome, sample.chunks) for sample in samples} == {("ok", tokens)}
        return [int(median(firsts)), int(median(ns(sample.max_gap_ns) for sample in samples))]

    errors = await measured(errors_ns, lambda errors: max(errors) < 20 * MS)
    assert max(errors) < 20 * MS, "the acknowledgement that Linux delays by 40 ms held the tokens back"
