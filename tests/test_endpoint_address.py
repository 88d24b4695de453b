"""What may be written for a base URL, and which address is asked."""

from __future__ import annotations

import socket

import pytest

from loadbench.errors import TargetError, UsageError
from loadbench.target.address import Url, locate, parse_url
from tests.endpoint_replay import at_socket


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://127.0.0.1:5273", "http://127.0.0.1:5273"),
        ("http://127.0.0.1:5273/", "http://127.0.0.1:5273"),
        ("localhost:5273/v1/", "http://localhost:5273/v1"),
        ("  10.1.2.3:5273/v1\n", "http://10.1.2.3:5273/v1"),
        ("box.local", "http://box.local"),
        ("http://box/v1", "http://box/v1"),
        ("https://gateway.example/llm/v1", "https://gateway.example/llm/v1"),
        ("https://gateway.example:443/v1", "https://gateway.example/v1"),
        ("http://box:80/v1", "http://box/v1"),
        ("HTTP://Box:5273//v1", "http://box:5273/v1"),
        ("http://127.0.0.1:5273/catalogs/local/v1/chat/completions", "http://127.0.0.1:5273/catalogs/local/v1"),
        ("http://0.0.0.0:5273/v1", "http://localhost:5273/v1"),
        ("http://[::]:5273/v1", "http://localhost:5273/v1"),
        ("http://box:5273/V1", "http://box:5273/v1"),
        ("http://box:5273/Catalogs/Local/V1/Chat/Completions", "http://box:5273/catalogs/local/v1"),
        ("http://box:5273/Team/V1", "http://box:5273/Team/v1"),
        ("[::1]:5273", "http://[::1]:5273"),
    ],
)
def test_a_base_url_is_read_as_freely_as_people_write_it(written: str, meant: str) -> None:
    assert str(parse_url(written)) == meant


def test_the_default_port_is_the_schemes_and_stays_out_of_the_host_header() -> None:
    assert parse_url("https://a.example/v1") == Url("https", "a.example", 443, "/v1")
    assert parse_url("https://a.example/v1").host_header == "a.example"
    assert parse_url("http://[::1]:5273").host_header == "[::1]:5273"


@pytest.mark.parametrize(
    "nonsense",
    ["", "embeded", "5273", "ftp://host/v1", "http://", "http:///v1", "http://host:0", "http://host:99999", "a b:1",
     "http://ho st/", "http://host/v1\x7f", "http://[::1/v1", "unix:///run/x.sock"],
)  # fmt: skip
def test_nonsense_is_refused_in_one_line_with_what_was_found(nonsense: str) -> None:
    with pytest.raises(UsageError, match=r"^endpoint: expected a URL such as http://host:5273/v1, got ") as caught:
        parse_url(nonsense)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("written", ["http://me:hunter2@host/v1", "host/v1?api_key=hunter2", "http://host/#hunter2"])
def test_a_secret_in_the_url_is_refused_and_not_repeated(written: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_url(written)
    assert "hunter2" not in str(caught.value)


async def test_localhost_is_asked_where_it_answers() -> None:
    async with at_socket(lambda *_: _say_nothing()) as url:
        address = await locate(parse_url(url.replace("127.0.0.1", "localhost")), timeout_s=5)
    assert (address.ip, address.host_header) == ("127.0.0.1", f"localhost:{address.port}")


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
@pytest.mark.parametrize("written", ["localhost", "0.0.0.0", "[::]"])
async def test_this_machine_is_asked_on_ipv6_if_only_that_answers(written: str) -> None:
    try:
        async with at_socket(lambda *_: _say_nothing(), host="::1") as url:
            address = await locate(parse_url(url.replace("[::1]", written)), timeout_s=5)
    except OSError as error:
        pytest.skip(f"this machine has no ::1 ({error.strerror})")
    assert address.ip == "::1"


async def test_a_refused_connection_is_one_line_that_asks_the_obvious() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refused for sure
        port = unused.getsockname()[1]
        with pytest.raises(
            TargetError, match=f"^http://localhost:{port}/v1: connection refused: is the service running"
        ):
            await locate(parse_url(f"localhost:{port}/v1"), timeout_s=5)


async def test_a_name_that_does_not_resolve_is_said_to_be_one() -> None:
    with pytest.raises(TargetError, match=r"the name nowhere\.invalid cannot be resolved"):
        await locate(parse_url("http://nowhere.invalid:5273"), timeout_s=5)


async def _say_nothing() -> None:
    return None
