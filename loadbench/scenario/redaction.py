"""What must not be saved or shown: the values of secret-looking headers and keys, and credentials inside URLs.

Told by the name alone: a value hidden for nothing costs a reader little, a key in a shared report its owner a lot.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

REDACTED = "redacted"

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
