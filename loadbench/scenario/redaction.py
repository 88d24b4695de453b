"""What must not be saved or shown: the values of secret-looking headers and keys, and credentials inside URLs.

Told by the name alone: a value hidden for nothing costs a reader little, a key in a shared report its owner a lot.
What a server says is another's text: there every header value of ours is cut out, whatever its name.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode, urlsafe_b64encode
from collections.abc import Mapping
from functools import lru_cache
from html import unescape
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

REDACTED = "redacted"

SECRET_CHARACTERS = 6
"""Shorter header values are no keys, and cutting them out would cut into words."""

# Whole words of a name, so that max_completion_tokens stays and Ocp-Apim-Subscription-Key goes.
_SECRET_WORDS = {
    *("apikey", "auth", "authorization", "cookie", "credential", "credentials", "jwt", "key"),
    *("passwd", "password", "pwd", "secret", "session", "sig", "signature", "token"),
}
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


def is_secret(name: str) -> bool:
    """Whether a header, query key or field of this name may hold a secret: ``X-Api-Key``, ``accessToken``."""
    return not _SECRET_WORDS.isdisjoint(word.lower() for word in _WORDS.findall(name))


def redact(value: Any, name: str = "") -> Any:
    """The value with everything under a secret name replaced, however deep it lies."""
    if is_secret(name):
        return REDACTED
    if isinstance(value, dict):
        return {key: redact(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return value


def redact_url(url: str) -> str:
    """The URL without user and password, and with the values of secret query keys replaced."""
    parts = urlsplit(url)
    query = urlencode([(key, redact(value, key)) for key, value in parse_qsl(parts.query, keep_blank_values=True)])
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))


_NEXT_URL = re.compile(r",\s*(?=https?://|\[|[\w.-]+:\d+(?:[/,]|$))")


def urls(text: str) -> list[str]:
    """The URLs that a text with commas between them lists; a comma within one is none between two."""
    return [url.strip() for url in _NEXT_URL.split(text)]


def redact_urls(text: str) -> str:
    """The same text without what ``redact_url`` leaves out of each."""
    return ",".join(map(redact_url, urls(text)))


def without_secrets(text: str, headers: Mapping[str, str]) -> str:
    """A server's text without what it repeats of our headers: plain, in base64, escaped or broken off at the end."""
    secrets = _secrets(tuple(headers.values()))
    seen = text
    for _ in range(3 if secrets else 0):  # as it is; escaped, as in JSON, HTML or a URL; and one in the other
        cut = _cut(seen, secrets)
        if cut != seen:
            text = cut
        seen = _unescaped(cut)
    return text


_ESCAPE = re.compile(r"""\\u([0-9a-f]{4})|(?:\\x|%)([0-9a-f]{2})|\\(["'/\\])""", re.IGNORECASE)


def _unescaped(text: str) -> str:
    return unescape(_ESCAPE.sub(lambda found: found[3] or chr(int(found[1] or found[2], 16)), text))


@lru_cache(maxsize=8)  # the same headers for the whole run, and a failing server asks for them with every request
def _secrets(values: tuple[str, ...]) -> tuple[str, ...]:
    """What may stand for these values, the longest first: a whole one is to go before a part of it."""
    plain: set[str] = set()
    for value in values:
        for part in (value, *re.split(r"[;,]\s*", value)):  # a cookie header holds several
            plain |= {part.strip(), part.rpartition(" ")[2], part.partition("=")[2]}
        if value[:6].lower() == "basic ":
            pair = _decoded(value[6:])
            plain |= {pair, pair.partition(":")[2]}
    raw = [secret.encode() for secret in plain if len(secret) >= SECRET_CHARACTERS]
    coded = {code(secret).decode().rstrip("=") for secret in raw for code in (b64encode, urlsafe_b64encode)}
    return tuple(sorted((each for each in plain | coded if len(each) >= SECRET_CHARACTERS), key=len, reverse=True))


def _decoded(text: str) -> str:
    try:
        return b64decode(text).decode()
    except ValueError:  # no base64, or no text in it
        return ""


def _cut(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, "…")
    whole = text.removesuffix("…")  # what somebody has shortened may end within a secret
    for secret in secrets:
        if whole[-SECRET_CHARACTERS:] not in secret or " " in secret:  # not the word Bearer at the end of a sentence
            continue
        for length in range(len(secret) - 1, SECRET_CHARACTERS - 1, -1):
            if whole.endswith(secret[:length]):
                return whole[:-length] + "…"
    return text
