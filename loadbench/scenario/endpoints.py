"""Where a scenario says that its requests go: to one endpoint or to a fleet, and the probe on the host of one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from loadbench.scenario.part import refuse
from loadbench.scenario.redaction import urls

EMBEDDED = "embedded"
PROBE_TOKEN_VARIABLE = "LOADBENCH_PROBE_TOKEN"  # of the environment; never read from a file, never saved
MOST_ENDPOINTS = 64  # more are no fleet whose rows anybody reads, and the clients' connections add up


def _endpoint(value: object) -> str | tuple[str, ...]:
    """One endpoint, or those of a fleet, as a list or with commas between them, as flags write it."""
    expected = "expected embedded or a URL such as http://127.0.0.1:5273/v1"
    listed = urls(value) if isinstance(value, str) else value
    if not isinstance(listed, list | tuple):
        raise PydanticCustomError("expected", "{expected}, or a list of URLs", {"expected": expected})
    if isinstance(value, str) and len(listed) == 1:
        return value if value == EMBEDDED else _url(value, expected)
    return _fleet(listed)


def _fleet(listed: Sequence[object]) -> tuple[str, ...]:
    if not 2 <= len(listed) <= MOST_ENDPOINTS:
        raise refuse(f"expected 2 to {MOST_ENDPOINTS} URLs in the list, got {len(listed)}")
    found = []
    for number, text in enumerate(listed, start=1):
        try:
            found.append(_url(str(text), ""))
        except PydanticCustomError:
            raise refuse(f"expected URLs in the list, got something else as number {number}") from None
        if found.count(found[-1]) > 1:
            raise refuse(f"expected each URL once, got number {number} twice")
    return tuple(found)


def _probes(value: object) -> str | tuple[str, ...]:
    """One probe, or those of a fleet's hosts, in a list or with commas between them."""
    listed = urls(value) if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not listed:
        raise PydanticCustomError("expected", "expected the URL of a loadbench probe, or a list of URLs")
    found = tuple(_probe(str(url)) for url in listed)
    return found[0] if isinstance(value, str) and len(found) == 1 else found


def _probe(text: str) -> str:
    """What may hold a key is refused, and never repeated."""
    if "@" in text or "?" in text:
        raise refuse(f"expected a URL without user name, key or query: the token comes from {PROBE_TOKEN_VARIABLE}")
    return _url(text, "expected the URL of a loadbench probe, such as http://192.168.1.7:5280")


def _url(text: str, expected: str) -> str:
    if re.match(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):\d+(/|$)", text):  # host:port, as people type it
        text = f"http://{text}"
    try:
        parts = urlsplit(text)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an unclosed [
        whole = False
    if not whole:
        raise PydanticCustomError("expected", "{expected}", {"expected": expected})
    return text


_MANY = {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": MOST_ENDPOINTS, "uniqueItems": True}
_JSON = WithJsonSchema({"anyOf": [{"type": "string"}, _MANY]})

Endpoints = Annotated[str | tuple[str, ...], BeforeValidator(_endpoint), _JSON]
"""The URL of one, ``embedded``, or the URLs of several."""

Probes = Annotated[str | tuple[str, ...], BeforeValidator(_probes), _JSON]
"""The URL of one host's probe, or those of a fleet's hosts in the order of the endpoints."""
