"""Addresses: what a user may write for a base URL, and the one network address that is asked for the whole run."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from loadbench.errors import TargetError, UsageError

EXAMPLE = "a URL such as http://host:5273/v1"
_HOST = re.compile(r"[\w.-]+|[0-9a-f:.]+", re.ASCII | re.IGNORECASE)
_PATH = re.compile(r"[!-~]*")  # printable ASCII: anything else has to be percent-encoded in a request line
# What services report as "all interfaces" and nobody can connect to by that name on every system. As localhost both
# of this machine's addresses are tried: a socket on :: may answer on either.
_WILDCARDS = {"0.0.0.0": "localhost", "::": "localhost"}
# Servers know these in small letters only.
_KNOWN_END = re.compile(r"(/catalogs/local)?(/v1)?(/chat/completions)?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Url:
    """A base URL in its parts. ``path`` has no trailing slash; ``host`` has no brackets."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def host_header(self) -> str:
        """The value of the Host header: the name as the user wrote it, the port unless it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.host_header}"

    def __str__(self) -> str:
        return self.origin + self.path


@dataclass(frozen=True, slots=True)
class Address:
    """Where to connect: ``ip`` and ``port``. ``host`` is for the certificate, ``host_header`` for the request."""

    scheme: str
    host: str
    port: int
    ip: str
    host_header: str


def parse_url(text: str) -> Url:
    """Read a base URL, with or without scheme. Raises UsageError, which never repeats what may hold a key."""
    text = text.strip()
    if "@" in text:
        raise UsageError("endpoint: a user name or key in the URL is refused; give it as --header 'Authorization: …'")
    if "?" in text or "#" in text:
        raise UsageError(f"endpoint: expected {EXAMPLE}, without a query")
    found = UsageError(f"endpoint: expected {EXAMPLE}, got {text[:100]!r}")
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise found from None
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host) or not _PATH.fullmatch(parts.path):
        raise found
    # A bare word is a misspelt setting more often than a machine's name.
    if port == 0 or (
        "://" not in text and port is None and "." not in host and ":" not in host and host != "localhost"
    ):
        raise found
    path = re.sub(r"/{2,}", "/", parts.path).rstrip("/")
    path = _KNOWN_END.sub(lambda end: end[0].lower(), path).removesuffix("/chat/completions")
    default = 443 if parts.scheme == "https" else 80
    return Url(parts.scheme, _WILDCARDS.get(host, host), port or default, path)


async def locate(url: Url, timeout_s: float) -> Address:
    """Resolve the host once and keep the address that takes a connection first; ties go to the system's order.

    ``localhost`` is tried as 127.0.0.1 and ::1: services bind one of them, systems resolve it to either.
    Raises TargetError when none does; its cause is the system's own error.
    """
    try:
        async with asyncio.timeout(timeout_s):
            candidates = await _candidates(url)
            ip = await _first_to_connect(candidates, url.port)
    except TimeoutError as error:
        raise TargetError(f"{url}: no connection within {timeout_s:g} s: is the host up and the port open?") from error
    except socket.gaierror as error:
        raise TargetError(f"{url}: the name {url.host} cannot be resolved ({error.strerror})") from error
    except ConnectionRefusedError as error:
        raise TargetError(
            f"{url}: connection refused: is the service running? (`foundry server status` or `foundry service status` "
            "tells its address)"
        ) from error
    except OSError as error:
        raise TargetError(f"{url}: no connection ({error.strerror or error})") from error
    return Address(url.scheme, url.host, url.port, ip, url.host_header)


async def _candidates(url: Url) -> list[str]:
    if url.host == "localhost":
        return ["127.0.0.1", "::1"]
    try:
        ip_address(url.host)
    except ValueError:
        found = await asyncio.get_running_loop().getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
    return [url.host]


async def _first_to_connect(ips: Iterable[str], port: int) -> str:
    """Try all at once: on Windows a refused ::1 takes two seconds to say so. Raises OSError, a refusal first."""
    attempts = {asyncio.create_task(_connect(ip, port)): ip for ip in ips}
    pending = set(attempts)
    try:
        while pending:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if taken := [ip for task, ip in attempts.items() if task.done() and task.exception() is None]:
                return taken[0]
    finally:
        for task in pending:
            task.cancel()
    failures = [error for task in attempts if (error := task.exception())]
    raise next((error for error in failures if isinstance(error, ConnectionRefusedError)), failures[0])


async def _connect(ip: str, port: int) -> None:
    _, writer = await asyncio.open_connection(ip, port)
    writer.close()
