"""Who answers at a base URL: told from recorded answers, and from what is no model server at all."""

from __future__ import annotations

import asyncio
import re
import socket
from base64 import b64encode
from gzip import compress
from time import perf_counter
from typing import Any

import pytest

from loadbench.errors import TargetError, UsageError
from loadbench.target.control import BODY_LIMIT_BYTES
from loadbench.target.endpoint import discover
from tests.endpoint_replay import at_socket, replay


@pytest.mark.parametrize(
    ("recording", "kind", "title"),
    [
        ("foundry-2-public", "foundry-2", "Foundry Local 2"),
        ("foundry-0.8", "foundry-0.8", "Foundry Local 0.8 or older"),
        ("foundry-0.3", "foundry-0.8", "Foundry Local 0.8 or older"),
        ("ollama", "ollama", "Ollama 0.12.6"),
        ("lm-studio", "lm-studio", "LM Studio"),
        ("llama.cpp", "llama.cpp", "llama.cpp b8681-0000000"),
        ("llama.cpp-router", "llama.cpp", "llama.cpp b9992-0000000"),
        ("vllm", "vllm", "vLLM 0.11.0"),
    ],
)
@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/chat/completions"])
async def test_a_server_is_told_by_what_it_answers(recording: str, kind: str, title: str, path: str) -> None:
    async with replay(recording) as server:
        endpoint = await discover(server.url + path)
    assert (endpoint.kind, endpoint.title, endpoint.url) == (kind, title, server.url + "/v1")
    assert endpoint.root == server.url


async def test_a_server_behind_a_path_is_found_below_it() -> None:
    async with replay("vllm", below="/models/small") as server:
        endpoint = await discover(server.url + "/models/small/v1")
    assert (endpoint.kind, endpoint.url) == ("vllm", server.url + "/models/small/v1")


async def test_a_foundry_is_asked_for_its_status_only_for_its_public_catalogue_goes_to_the_internet() -> None:
    async with replay("foundry-2-public") as server:
        await discover(server.url)
        assert sorted(server.asked) == ["/openai/status", "/status"]


async def test_the_catalogue_that_was_named_stays_in_the_url() -> None:
    async with replay("foundry-2-public") as server:
        for written in ("/catalogs/local", "/catalogs/local/v1", "/catalogs/local/v1/chat/completions"):
            assert (await discover(server.url + written)).url == server.url + "/catalogs/local/v1"


async def test_a_server_that_lists_models_the_openai_way_is_taken_with_or_without_v1() -> None:
    listing = {"object": "list", "data": [{"id": "m", "object": "model"}]}
    for path in ("/v1", ""):
        async with replay({"answers": {f"{path}/models": listing}}) as server:
            endpoint = await discover(server.url)
        assert (endpoint.kind, endpoint.url) == ("openai", server.url + path)


async def test_a_server_that_lists_nothing_is_taken_if_it_objects_to_get_on_the_chat_route() -> None:
    chat = {"status": 405, "text": "method not allowed"}
    async with replay({"answers": {"/v1/chat/completions": chat}}) as server:
        assert (await discover(server.url)).kind == "openai"


async def test_a_web_page_is_named_as_what_it_is() -> None:
    page = {"status": 200, "text": "<html><title>Welcome to\n<b>nginx</b>!</title>…</html>"}
    async with replay({"answers": {"*": page}, "headers": {"Server": "nginx/1.24"}}) as server:
        with pytest.raises(TargetError) as caught:
            await discover(server.url)
    assert str(caught.value) == (
        f"{server.url}: expected a model server, got 200 text/plain from nginx/1.24 for GET /v1/models: "
        "Welcome to <b>nginx</b>!"
    )


async def test_an_answer_of_200_with_an_error_in_it_is_no_model_server() -> None:
    async with replay({"answers": {"*": {"error": "Unexpected endpoint or method."}}}) as server:
        with pytest.raises(TargetError, match=r"expected a model server, got 200 .* Unexpected endpoint"):
            await discover(server.url)


async def test_a_server_that_wants_a_key_says_where_to_put_one() -> None:
    refusal = {"status": 401, "json": {"error": {"message": "Invalid API key"}}}
    async with replay({"answers": {"*": refusal}}) as server:
        with pytest.raises(TargetError, match=r"refuses us with 401: Invalid API key; a key goes into OPENAI_API_KEY"):
            await discover(server.url)


async def test_a_header_with_a_line_break_is_refused_before_anything_is_sent() -> None:
    async with replay("ollama") as server:
        with pytest.raises(UsageError, match="header Authorization: expected one line of text") as caught:
            await discover(server.url, headers={"Authorization": "Bearer hunter2\n"})
        assert "hunter2" not in str(caught.value)
        assert server.asked == []


async def test_headers_go_to_the_server_and_nowhere_else() -> None:
    key = {"Authorization": "Bearer hunter2"}
    async with replay("ollama") as server:
        endpoint = await discover(server.url, headers=key)
        assert server.headers["Authorization"] == "Bearer hunter2"
        assert "hunter2" not in repr(endpoint)
    for status in (401, 500):
        async with replay({"answers": {"*": {"status": status, "text": "no"}}}) as server:
            with pytest.raises(TargetError) as caught:
                await discover(server.url, headers=key)
            assert "hunter2" not in repr(caught.value) and caught.value.__cause__ is None


KEY = 'sk-"quoted"/and\\long'


@pytest.mark.parametrize(
    "refusal",
    [
        {"status": 401, "json": {"error": {"message": f"Incorrect API key provided: {KEY}"}}},
        {"status": 401, "json": {"detail": {"headers": {"authorization": f"Bearer {KEY}"}}}},
        {"status": 401, "text": "who is " + b64encode(f"Bearer {KEY}".encode()).decode()},
        {"status": 500, "text": f"{'x' * 60} {KEY}"},  # shortened in the middle of the key
        {"status": 500, "text": f"<title>No {KEY} here</title>"},
    ],
)
async def test_a_server_that_repeats_the_key_does_not_get_it_onto_the_terminal(refusal: dict[str, Any]) -> None:
    headers = {"Server": f"proxy {KEY}"}
    async with replay({"answers": {"*": refusal}, "headers": headers}) as server:
        with pytest.raises(TargetError, match="…") as caught:
            await discover(server.url, headers={"Authorization": f"Bearer {KEY}"})
    line = str(caught.value)
    assert "sk-" not in line and "quoted" not in line
    assert b64encode(f"Bearer {KEY}".encode()).decode()[:12] not in line


async def test_a_redirect_that_repeats_the_key_does_not_get_it_onto_the_terminal() -> None:
    async def elsewhere(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 307 Go\r\nLocation: /login/hunter2%21\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async with at_socket(elsewhere) as url:
        with pytest.raises(TargetError, match="redirects to /login/…: name the final address"):
            await discover(url, headers={"Authorization": "Bearer hunter2!"})


async def test_the_host_header_is_the_name_that_was_written() -> None:
    async with replay("ollama") as server:
        await discover(server.url.replace("127.0.0.1", "localhost"))
        assert server.headers["Host"] == server.url.replace("127.0.0.1", "localhost").removeprefix("http://")


async def test_a_redirect_is_refused_and_the_key_does_not_follow_it() -> None:
    async def elsewhere(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 307 Go\r\nLocation: {other.url}/v1?token=x\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()

    async with replay("ollama") as other, at_socket(elsewhere) as url:
        with pytest.raises(TargetError, match=f"redirects to {re.escape(other.url)}/v1: name the final address"):
            await discover(url, headers={"Authorization": "Bearer hunter2"})
        assert other.asked == []


async def test_an_answer_without_end_is_cut_off() -> None:
    async def gush(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        while True:
            writer.write(b" " * (1 << 20))
            await writer.drain()

    async with at_socket(gush) as url:
        with pytest.raises(TargetError, match=f"expected a JSON answer, got more than {BODY_LIMIT_BYTES >> 20} MiB"):
            await discover(url)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not speak HTTP"),
        (b"", "closed without an answer: is it https:// rather than http://"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "the answer broke off"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", "does not speak HTTP"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + compress(b'{"data": []}', mtime=0),
            "expected a model server",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"[" * 200_000, "expected a model server"),
    ],
)
async def test_what_speaks_something_else_is_one_clear_line(said: bytes, found: str) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        await writer.drain()

    async with at_socket(speak) as url:
        with pytest.raises(TargetError, match=found) as caught:
            await discover(url)
    line = str(caught.value)
    assert line.isprintable() and line.startswith(url) and len(line) < 400


async def test_a_server_that_never_answers_is_given_up_in_time() -> None:
    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with at_socket(wait) as url:
        start = perf_counter()
        with pytest.raises(TargetError, match=r"no answer within 0\.2 s"):
            await discover(url, timeout_s=0.2)
        assert perf_counter() - start < 2


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
async def test_an_ipv6_address_is_asked_like_any_other() -> None:
    async def list_models(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"data":[]}')
        await writer.drain()

    try:
        async with at_socket(list_models, host="::1") as url:
            endpoint = await discover(url)
    except OSError as error:
        pytest.skip(f"this machine has no ::1 ({error.strerror})")
    assert (endpoint.kind, endpoint.url, endpoint.local) == ("openai", url + "/v1", True)


async def test_https_to_a_plain_port_says_so() -> None:
    async with replay("ollama") as server:
        with pytest.raises(TargetError, match="no TLS there: is it http:// rather than https://"):
            await discover(server.url.replace("http:", "https:"))


async def test_a_server_that_serves_one_connection_at_a_time_is_still_discovered() -> None:
    gate = asyncio.Lock()
    body = b'{"object":"list","data":[{"id":"m"}]}'

    async def one_by_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with gate:
            while head := await reader.readuntil(b"\r\n\r\n"):
                found = b" /v1/models " in head
                status, text = (b"200 OK", body) if found else (b"404 Not Found", b"no")
                writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(text), text))
                await writer.drain()
                if b"connection: close" in head.lower():
                    return

    async with at_socket(one_by_one) as url:
        assert (await discover(url, timeout_s=5)).kind == "openai"


async def test_a_claimed_pid_that_does_not_listen_here_is_not_taken_for_the_target() -> None:
    async with replay("foundry-2-public") as server:  # its status says pid 1, as in a container
        endpoint = await discover(server.url)
    assert endpoint.local and endpoint.pid is None
    assert endpoint.pid_absent is not None and "1" in endpoint.pid_absent
