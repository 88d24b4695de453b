"""The probe over loopback: figures of a real process, set onto another clock, for those who have the token alone."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from time import perf_counter_ns

import orjson
import pytest
from click.testing import CliRunner

from loadbench.errors import TargetError, UsageError
from loadbench.target import probe as probe_module
from loadbench.target.probe import CONNECTIONS_LIMIT, Probe, TargetWatch, serve_probe
from loadbench.target.probe_cli import probe_command
from loadbench.target.probe_client import RemoteMemory, offset_of
from loadbench.target.processes import find_service

TOKEN = "correct-horse-battery"
DEADLINE_S = 10.0


@asynccontextmanager
async def probing(token: str | None = None) -> AsyncIterator[Probe]:
    """A probe of this process."""
    probe = await serve_probe("127.0.0.1", 0, token, pid=os.getpid())
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield probe
    finally:
        await probe.close()


def port_of(probe: Probe) -> int:
    return int(probe.url.rpartition(":")[2])


async def say(probe: Probe, text: str) -> tuple[int, bytes]:
    """Send bytes and read until the probe closes: (status, all that came)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(probe))
    with closing(writer):
        writer.write(text.encode())
        said = await reader.read()
    return int(said.split()[1]), said


async def test_the_figures_are_those_of_the_process_and_stamped_on_the_runs_clock() -> None:
    origin_ns = perf_counter_ns()

    def clock() -> int:
        return perf_counter_ns() - origin_ns

    async with probing() as probe, RemoteMemory(probe.url, clock=clock) as remote:
        before_ns = clock()
        figures = await remote.fetch()
        after_ns = clock()
        assert remote.service is not None and f"({os.getpid()})" in remote.service
    error_ns = remote.offset.error_ns if remote.offset else 0
    assert before_ns - error_ns <= figures.t_ns <= after_ns + error_ns
    assert figures.processes is not None and (figures.rss_bytes or 0) > 10 << 20
    assert isinstance(remote.absent, dict) and all(isinstance(reason, str) for reason in remote.absent.values())


async def test_the_offset_of_a_shifted_clock_is_found_within_its_error_and_measured_again_at_the_end() -> None:
    shift_ns = 1_234_567_890_123
    async with probing() as probe, RemoteMemory(probe.url, clock=lambda: perf_counter_ns() - shift_ns) as remote:
        facts = await remote.finish()
    assert abs(facts["offset_ns"] - shift_ns) <= facts["error_ns"] < 5_000_000
    assert abs(facts["drift_ns"]) <= facts["error_ns"] + facts["end_error_ns"]


def test_an_offset_is_off_by_half_the_travel_at_most() -> None:
    # Theirs is 1000 ahead; out takes 30, their work 5, back 10.
    offset = offset_of(100, 1130, 1135, 145)
    assert (offset.offset_ns, offset.error_ns) == (1010, 20)


async def test_a_clock_that_was_set_anew_is_measured_again() -> None:
    shift_ns = 0
    async with probing() as probe, RemoteMemory(probe.url, clock=lambda: perf_counter_ns() + shift_ns) as remote:
        await remote.fetch()
        shift_ns = 3_600_000_000_000
        figures = await remote.fetch()
        assert abs(figures.t_ns - perf_counter_ns() - shift_ns) < 1_000_000_000


@pytest.mark.parametrize("given", ["wrong-token-entirely", TOKEN + "x", TOKEN[:-1], None])
async def test_without_the_token_nothing_is_told_and_the_refusal_names_none(given: str | None) -> None:
    async with probing(TOKEN) as probe:
        with pytest.raises(TargetError) as refused:
            async with RemoteMemory(probe.url, given):
                pass
        header = "" if given is None else f"Authorization: Bearer {given}\r\n"
        status, said = await say(probe, f"GET /v1/memory HTTP/1.1\r\n{header}\r\n")
        missing = await say(probe, f"GET /nowhere HTTP/1.1\r\n{header}\r\n")
        posted = await say(probe, f"POST /v1/memory HTTP/1.1\r\n{header}\r\n")
    assert "token" in str(refused.value)
    assert TOKEN not in str(refused.value) and (given is None or given not in str(refused.value))
    assert status == missing[0] == posted[0] == 401
    assert said.endswith(b'{"error":"Unauthorized"}')


async def test_with_the_token_it_answers_and_no_text_of_the_client_holds_it() -> None:
    async with probing(TOKEN) as probe, RemoteMemory(probe.url, TOKEN) as remote:
        assert (await remote.fetch()).rss_bytes
        assert TOKEN not in repr(remote)
        await probe.close()
        with pytest.raises(TargetError) as gone:
            for _ in range(2):
                await remote.fetch()
    assert TOKEN not in str(gone.value)


async def test_beyond_loopback_a_token_is_needed_before_anything_listens() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(UsageError, match="loopback address unless a token is given"):
            await serve_probe(host, 0, pid=os.getpid())


@pytest.mark.parametrize("token", ["", "two words", "line\r\nX: y", "schlüssel"])
async def test_a_token_that_no_header_can_carry_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(UsageError) as refused:
        await serve_probe("127.0.0.1", 0, token, pid=os.getpid())
    with pytest.raises(UsageError, match=r"^LOADBENCH_PROBE_TOKEN: expected printable ASCII"):
        RemoteMemory("http://127.0.0.1:5280", token)
    assert not token or token not in str(refused.value)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET /v1/other HTTP/1.1\r\n\r\n", 404),
        ("GET /v1/memory/../../etc/passwd HTTP/1.1\r\n\r\n", 404),
        ("POST /v1/memory HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 405),
        ("PUT /v1/memory HTTP/1.1\r\n\r\n", 405),
        ("GET /v1/memory HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 400),
        ("GET /v1/memory HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        ("hello\r\n\r\n", 400),
        ("GET /v1/memory HTTP/1.1\r\nX: " + 5000 * "x" + "\r\n\r\n", 431),
        ("GET /" + 5000 * "x", 431),
    ],
)
async def test_what_is_not_offered_is_answered_once_and_the_connection_closed(request_: str, status: int) -> None:
    async with probing() as probe:
        assert (await say(probe, request_))[0] == status
        assert (await say(probe, "GET /v1/clock HTTP/1.1\r\nContent-Length: 0\r\n\r\nrest\r\n\r\n"))[0] == 200


async def test_a_connection_that_sends_its_request_slowly_or_never_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "REQUEST_TIMEOUT_S", 0.1)
    async with probing(TOKEN) as probe:
        assert (await say(probe, ""))[0] == 408
        assert (await say(probe, "GET /v1/memory HTTP/1.1\r\nX-Slow: "))[0] == 408


async def test_a_ninth_connection_is_refused_and_a_place_that_is_left_can_be_taken() -> None:
    async with probing() as probe:
        held = [await asyncio.open_connection("127.0.0.1", port_of(probe)) for _ in range(CONNECTIONS_LIMIT)]
        for reader, writer in held:  # answered: so each has its place
            writer.write(b"GET /v1/clock HTTP/1.1\r\n\r\n")
            await reader.readuntil(b"}")
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(probe))
        assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
        held[0][1].write(b"GET / HTTP/1.1\r\n\r\n")
        await held[0][0].read()  # to its end: the probe has closed it
        async with RemoteMemory(probe.url) as remote:
            assert (await remote.fetch()).rss_bytes
        writer.close()
        for _, each in held:
            each.close()


async def test_silent_connections_give_way_the_oldest_first_and_those_who_have_shown_the_token_stay() -> None:
    async with probing(TOKEN) as probe, RemoteMemory(probe.url, TOKEN) as known:
        assert (await known.fetch()).rss_bytes
        held = [await asyncio.open_connection("127.0.0.1", port_of(probe)) for _ in range(CONNECTIONS_LIMIT - 1)]
        async with RemoteMemory(probe.url, TOKEN) as newcomer:
            assert (await newcomer.fetch()).rss_bytes
            assert await held[0][0].read() == b""  # ended for the newcomer
            assert (await known.fetch()).rss_bytes
            held[1][1].write(b"GET / HTTP/1.1\r\n\r\n")
            assert (await held[1][0].readuntil(b"\r\n")).startswith(b"HTTP/1.1 401 ")
        for _, writer in held:
            writer.close()


async def test_beyond_loopback_a_token_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"16 characters or more to listen on 0\.0\.0\.0, got one of 15$"):
        await serve_probe("0.0.0.0", 0, "x" * 15, pid=os.getpid())


async def test_an_address_that_does_not_resolve_is_said_to_be_none() -> None:
    with pytest.raises(
        UsageError, match=r"--listen: expected an address of this machine, got 999\.1\.1\.1: no such host$"
    ):
        await serve_probe("999.1.1.1", 5, TOKEN, pid=os.getpid())


async def test_hammering_reads_the_figures_no_more_than_every_fifty_milliseconds() -> None:
    now_ns = 1
    watch = TargetWatch(lambda: find_service(os.getpid()), named_by_pid=True, clock=lambda: now_ns)
    stamps = []
    for _ in range(100):
        stamps.append((await watch.figures())[0].t_ns)
        now_ns += 10_000_000
    assert len(set(stamps)) == 17  # each the first that comes more than 50 ms after the one before


SERVICE = """
import socket, sys
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print(listening.getsockname()[1], flush=True)
sys.stdin.read()
"""


def service(port: int) -> tuple[subprocess.Popen[str], int]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", SERVICE, str(port)], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


async def test_a_service_that_ended_is_absent_and_its_successor_on_the_port_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe_module, "SEARCH_EVERY_NS", 0)
    monkeypatch.setattr(probe_module, "FRESH_NS", 0)
    first, port = service(0)
    second = None
    probe = await serve_probe("127.0.0.1", 0, service_port=port)
    try:
        async with RemoteMemory(probe.url) as remote:
            assert (await remote.fetch()).processes == 1 and f"({first.pid})" in str(remote.service)
            with first:
                first.kill()
            figures = await remote.fetch()
            assert figures.processes is None and "ended" in remote.absent["process"]
            assert figures.total_bytes
            second, _ = service(port)
            assert (await remote.fetch()).processes == 1 and f"({second.pid})" in str(remote.service)
            assert "process" not in remote.absent
    finally:
        await probe.close()
        for each in (first, second):
            if each is not None:
                with each:
                    each.kill()


async def test_nothing_to_watch_is_an_error_that_says_what_to_give() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(TargetError, match="is not listened on"):
            await serve_probe("127.0.0.1", 0, service_port=unused.getsockname()[1])
    with pytest.raises(TargetError, match="no process is called like nobody-is-called-so"):
        await serve_probe("127.0.0.1", 0, name="nobody-is-called-so")


async def test_what_is_no_probe_is_said_to_be_none_and_what_it_echoes_is_not_repeated() -> None:
    body = orjson.dumps({"echo": TOKEN})
    answers = [
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body),
        b"HTTP/1.1 302 Found\r\nLocation: http://x/%s\r\n\r\n" % TOKEN.encode(),
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n",
        b"SSH-2.0-%s\r\n\r\n" % TOKEN.encode(),
    ]
    for answer in answers:

        async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: bytes = answer) -> None:
            if await reader.readline():  # locate only connects
                writer.write(answer)
            writer.close()

        async with await asyncio.start_server(reply, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(TargetError, match="expected a loadbench probe") as refused:
                async with RemoteMemory(f"127.0.0.1:{port}", TOKEN):
                    pass
        assert TOKEN not in str(refused.value)


async def test_a_probe_that_does_not_answer_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TargetError, match=r"no answer within 0\.1 s"):
            async with RemoteMemory(url, timeout_s=0.1):
                pass


def test_the_command_says_where_it_listens_takes_the_token_from_the_environment_and_ends_when_told() -> None:
    code = "from loadbench.target.probe_cli import probe_command; probe_command()"
    command = [sys.executable, "-c", code, "--listen", "127.0.0.1:0", "--pid", str(os.getpid())]
    environment = os.environ | {"LOADBENCH_PROBE_TOKEN": TOKEN}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        url, watching = process.stdout.readline().strip(), process.stdout.readline()

        async def ask(token: str) -> int | None:
            async with RemoteMemory(url, token) as remote:
                return (await remote.fetch()).rss_bytes

        try:
            assert f"({os.getpid()})" in watching
            assert asyncio.run(ask(TOKEN))
            with pytest.raises(TargetError):
                asyncio.run(ask("another"))
        finally:
            process.send_signal(signal.SIGINT if sys.platform != "win32" else signal.SIGTERM)
            process.wait(DEADLINE_S)
    assert process.returncode == 0 or sys.platform == "win32"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--listen", "nowhere"], "expected HOST:PORT"),
        (["--listen", "127.0.0.1:70000"], "expected HOST:PORT"),
        (["--pid", "1", "--port", "2"], "expected one of"),
        (["--name", "("], "expected a regular expression"),
    ],
)
def test_a_wrong_option_is_said_in_one_line(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(probe_command, arguments)
    assert isinstance(result.exception, UsageError)
    assert expected in str(result.exception) and "\n" not in str(result.exception)
