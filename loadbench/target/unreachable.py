"""Why nobody answers at a base URL as a model server does, where somebody might, and what to do about it.

Looks at what went wrong, then at the doors beside it: the other scheme, another path, this machine's usual ports.
A key is shown to nobody but the host, port and scheme that it was given for.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address

from loadbench.errors import LoadbenchError, TargetError
from loadbench.outcomes import OUTCOMES
from loadbench.target.address import Url, parse_url
from loadbench.target.endpoint import Endpoint, Headers, StrangerError, discover
from loadbench.target.processes import FOUNDRY_PORTS, foundry_ports, is_this_machine

USUAL_PORTS = (*FOUNDRY_PORTS, 11434, 1234, 8080, 8000)
"""Foundry Local up to 0.8, Ollama, LM Studio, llama.cpp, vLLM."""

USUAL_PATHS = ("", "/api", "/openai", "/api/openai")
LOOK_TIMEOUT_S = 2.0
REMOTE_PAGE = "docs/remote-windows.md"
NO_WAY = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.EADDRNOTAVAIL})
START = "start it (`foundry server start`, up to 0.8 `foundry service start`), or take endpoint: embedded"


async def cure_of(text: str, error: TargetError, headers: Headers) -> str:
    """What to do where asking ``text`` who it is has ended in this error."""
    url = parse_url(text)
    if isinstance(error, StrangerError) and error.status in (401, 403):
        return key_cure(headers)
    match error.__cause__:
        case socket.gaierror():
            return f"check the spelling, or give the host's address instead of {url.host} (`ipconfig` shows it there)"
        case ConnectionRefusedError() if not _is_here(url):
            return (
                f"that host is up, but nothing takes connections to port {url.port} from here: start the service there,"
                f" check its port, and where it is bound to loopback, as Foundry Local is, pass the port on:"
                f" {REMOTE_PAGE}"
            )
        case TimeoutError() if not _is_here(url):
            return (
                "the host is off, asleep or elsewhere, or its firewall drops what comes, as Windows does with a port"
                f" that has no rule, or no listener but on loopback: {REMOTE_PAGE}"
            )
        case OSError(errno=number) if number in NO_WAY and not _is_here(url):
            return (
                "there is no way from here to there: are both in one network, or one VPN? On a Mac the terminal may"
                f" need Privacy & Security > Local Network: {REMOTE_PAGE}"
            )
    return await _other_door(url, error, headers) or await _other_port(url) or _plain_cure(error)


def key_cure(headers: Headers) -> str:
    """What to do about a refusal: there was no key, or a wrong one."""
    if any(name.lower() in ("authorization", "api-key", "x-api-key") for name in headers):
        return "the key that was sent is refused: put another into OPENAI_API_KEY, API_KEY or --header"
    return "no key was sent: put one into OPENAI_API_KEY or API_KEY, or give --header 'Authorization: Bearer …'"


def _plain_cure(error: TargetError) -> str:
    if error.__cause__ is not None:
        return f"no model server answers on this machine's usual ports: {START}"
    if "certificate" in str(error):
        return "let SSL_CERT_FILE name the file of the authority that signed it"
    if "no answer within" in str(error):
        return "something takes connections there and says nothing: start that service anew"
    return OUTCOMES["protocol"].advice


def _is_here(url: Url) -> bool:
    with suppress(ValueError):
        return is_this_machine(str(ip_address(url.host)))
    return url.host == "localhost" or url.host.lower() == socket.gethostname().lower()


async def _other_door(url: Url, error: TargetError, headers: Headers) -> str | None:
    """The same host and port by the other scheme, or below another path."""
    if error.__cause__ is not None:  # there is no connection at all
        return None
    if not isinstance(error, StrangerError) or error.status == 400:
        other = {"http": "https", "https": "http"}[url.scheme]
        with suppress(LoadbenchError):
            if await _speaks(str(replace(url, scheme=other))):
                return f"it speaks {'TLS' if other == 'https' else 'HTTP without TLS'}: write {other}:// in the URL"
    if isinstance(error, StrangerError):
        parts = url.path.split("/")
        above = ["/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
        for found in await _look([url.origin + path for path in dict.fromkeys([*above, *USUAL_PATHS])], headers):
            return f"the path is wrong: {found.title} answers at {found.url}"
    return None


async def _speaks(text: str) -> bool:
    """Whether there is HTTP to be had, whatever it says; without a key, since it may be in the clear."""
    try:
        await discover(text, timeout_s=LOOK_TIMEOUT_S)
    except StrangerError:
        return True
    except TargetError as error:
        return "certificate" in str(error)
    return True


async def _other_port(url: Url) -> str | None:
    """Which of the usual ports of this machine, or of those that a Foundry process listens on, has a model server."""
    if not _is_here(url):
        return None
    ports = sorted({*USUAL_PORTS, url.port, *await asyncio.to_thread(foundry_ports)})
    found = await _look([f"http://localhost:{port}" for port in ports], {})
    told = [f"{endpoint.title} answers at {endpoint.url}" for endpoint in found]
    return f"nobody is there, but {', '.join(told)}" if told else None


async def _look(texts: Iterable[str], headers: Mapping[str, str]) -> list[Endpoint]:
    """Those of these base URLs at which a model server answers."""
    looks = [discover(text, headers=headers, timeout_s=LOOK_TIMEOUT_S) for text in texts]
    found = await asyncio.gather(*looks, return_exceptions=True)
    for look in found:
        if isinstance(look, BaseException) and not isinstance(look, LoadbenchError):
            raise look
    return [look for look in found if isinstance(look, Endpoint)]
