"""Control calls: one bounded HTTP request, one JSON answer. What the paths mean is the dialects'.

Measured requests never come this way. Here aiohttp is good enough, and every limit is explicit: a base URL may point at
anything, and what answers there may send gigabytes, HTML or nothing.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import orjson

from loadbench.errors import TargetError, UsageError
from loadbench.scenario.redaction import without_secrets
from loadbench.target.address import Address

if TYPE_CHECKING:
    import aiohttp

BODY_LIMIT_BYTES = 8 << 20
"""Foundry's whole public catalogue is below 1 MB; a server with ten thousand models would still fit."""

UNANSWERED = "no answer within"
"""In the error for a call that has not ended: what it asked for may still be done."""

QUOTE_LIMIT = 10_000
"""So much of an answer is looked through for what is worth quoting."""


class HopelessError(TargetError):
    """The server has said no in a way that no further try changes."""


def one_line(text: str, limit: int = 200) -> str:
    """Make foreign text fit to print: one line, no control characters, no more than ``limit`` characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def without_whereabouts(text: str) -> str:
    """Foundry's errors without the source file, line and C++ signature of each function that they came through."""
    while found := re.search(r"\S+\.(?:cc|cpp|h):\d+ [^(]*\(", text):
        depth, end = 1, found.end()
        while end < len(text) and depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        text = text[: found.start()] + text[end:].removeprefix(" const").removeprefix("::<lambda()>").lstrip()
    return text


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. ``json`` is None where the body is not JSON; ``said`` is what is worth quoting of it."""

    status: int
    server: str
    content_type: str
    json: Any
    said: str

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.json is not None


class Control:
    """Calls to one address, each on a connection of its own: a server that takes one at a time must not hang us.

    ``headers`` may hold secrets. They go to this address only, no redirect is followed, and no error repeats them,
    not even where the server does.
    """

    def __init__(self, address: Address, headers: Mapping[str, str] | None = None) -> None:
        for name, value in (headers or {}).items():
            if not (name + value).isprintable():
                raise UsageError(f"header {one_line(name)}: expected one line of text, got a control character in it")
        self._address = address
        self._secrets = dict(headers or {})
        self._headers = {"Accept": "application/json", "Accept-Encoding": "identity", **(headers or {})}
        # Connecting to the address and not the name: asked once, the same machine answers for the whole run.
        self._headers["Host"] = address.host_header
        ip = f"[{address.ip}]" if ":" in address.ip else address.ip
        self._origin = f"{address.scheme}://{ip}:{address.port}"
        self._name = f"{address.scheme}://{address.host_header}"

    async def __aenter__(self) -> Self:
        import aiohttp

        self._session: aiohttp.ClientSession = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=16, force_close=True),  # a discovery sends eight at once
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # we ask for identity; what comes packed all the same is refused, not unpacked
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ask(self, path: str, timeout_s: float, post: Mapping[str, Any] | None = None) -> Answer:
        """GET ``path``, or POST ``post`` to it. Raises TargetError where no whole HTTP answer came, or a redirect."""
        import aiohttp
        from yarl import URL

        where = self._name + path
        try:
            async with self._session.request(
                "GET" if post is None else "POST",
                URL(self._origin + path, encoded=True),  # Foundry does not decode %3A: the path goes out as it is
                data=None if post is None else orjson.dumps(post),
                headers=self._headers if post is None else self._headers | {"Content-Type": "application/json"},
                allow_redirects=False,
                server_hostname=self._address.host if self._address.scheme == "https" else None,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                if response.status in (301, 302, 303, 307, 308):
                    target = one_line(self._clean(response.headers.get("Location", "nowhere").partition("?")[0]))
                    raise TargetError(f"{where}: redirects to {target}: name the final address")
                return self._answer(response, await _read(response, where))
        except TimeoutError:
            raise TargetError(f"{where}: {UNANSWERED} {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise TargetError(f"{where}: {self._clean(_reason(error))}") from None

    async def lines(self, path: str, post: Mapping[str, Any], idle_timeout_s: float) -> AsyncIterator[str]:
        """POST and yield the answer line by line as it comes, for hours if need be. TargetError for anything but 200,
        for a connection that breaks, and for one on which nothing comes for so long.
        """
        import aiohttp
        from yarl import URL

        where = self._name + path
        try:
            async with self._session.post(
                URL(self._origin + path, encoded=True),
                data=orjson.dumps(post),
                headers=self._headers | {"Content-Type": "application/json"},
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_read=idle_timeout_s),
            ) as response:
                if response.status != 200:
                    answer = self._answer(response, await _read(response, where))
                    # 408 and 429 say themselves that it may be tried again
                    final = 400 <= answer.status < 500 and answer.status not in (408, 429)
                    raise (HopelessError if final else TargetError)(f"{where}: {answer.status}: {answer.said}")
                async for line in response.content:
                    yield self._clean(line.decode("utf-8", "replace"))
        except TimeoutError:
            raise TargetError(f"{where}: nothing came for {idle_timeout_s:g} s") from None
        except (aiohttp.ClientError, ValueError, OSError) as error:  # ValueError: a line without an end
            raise TargetError(f"{where}: {self._clean(_reason(error))}") from None

    def _clean(self, text: str) -> str:
        return without_secrets(text, self._secrets)

    def _answer(self, response: aiohttp.ClientResponse, body: bytes) -> Answer:
        try:
            json = orjson.loads(body)
        except orjson.JSONDecodeError:
            json = None
        server = one_line(self._clean(response.headers.get("Server", "")), 60)
        said, limit = _said(json, body)
        # Cut out before it is shortened: the beginning of a key is no less a key's.
        return Answer(
            response.status,
            server,
            one_line(self._clean(response.content_type), 60),
            json,
            one_line(self._clean(said), limit),
        )


async def _read(response: aiohttp.ClientResponse, where: str) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > BODY_LIMIT_BYTES:
            raise TargetError(f"{where}: expected a JSON answer, got more than {BODY_LIMIT_BYTES >> 20} MiB")
    return bytes(body)


def _said(json: Any, body: bytes) -> tuple[str, int]:
    """What to quote, and how much of it: an error's message, a page's title, or the beginning."""
    if isinstance(json, dict):
        error = json.get("error", json.get("detail", json))
        text = error.get("message", error) if isinstance(error, dict) else error
        return without_whereabouts(str(text)[:QUOTE_LIMIT]), 200
    text = body[:QUOTE_LIMIT].decode("utf-8", "replace")
    title = re.search(r"<title>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
    return (title[1] if title else text), 80


def _reason(error: Exception) -> str:
    """Say what an HTTP client's error means. The error's own text is not used where it may repeat the request."""
    import aiohttp

    match error:
        case aiohttp.ClientConnectorCertificateError():
            return (
                f"its certificate is not trusted ({one_line(str(error.certificate_error))}); SSL_CERT_FILE names others"
            )
        case aiohttp.ClientSSLError():
            return "no TLS there: is it http:// rather than https://?"
        case aiohttp.ServerDisconnectedError():
            return "the connection was closed without an answer: is it https:// rather than http://?"
        case aiohttp.ClientPayloadError():
            return "the answer broke off"
        case aiohttp.ClientResponseError():
            return f"does not speak HTTP ({one_line(error.message, 80)})"
        case OSError():
            return f"the connection failed ({error.strerror or type(error).__name__})"
        case _:
            return f"the connection failed ({type(error).__name__})"
