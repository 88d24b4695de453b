"""What a server says is quoted without what it repeats of our headers."""

from __future__ import annotations

import json
from base64 import b64encode, urlsafe_b64encode
from html import escape
from urllib.parse import quote

import pytest

from loadbench.scenario.redaction import without_secrets

KEY = 'sk-"a/b\\c+d&e=='
OURS = {"Authorization": f"Bearer {KEY}", "Accept": "*/*"}


@pytest.mark.parametrize(
    ("echo", "left"),
    [
        (KEY, "…"),
        (f"Bearer {KEY}", "…"),
        (json.dumps(KEY), '"…"'),
        (json.dumps({"sent": json.dumps({"key": KEY})}), '{"sent": "{"key": "…"}"}'),
        (json.dumps(KEY).replace("/", r"\/"), '"…"'),
        ("".join(f"\\u{ord(character):04X}" for character in KEY), "…"),
        (repr(KEY), "'…'"),
        (quote(KEY, safe=""), "…"),
        (escape(KEY).replace("/", "&#x2F;"), "…"),
        (b64encode(KEY.encode()).decode().rstrip("="), "…"),
        (urlsafe_b64encode(f"Bearer {KEY}".encode()).decode().rstrip("="), "…"),
        (KEY[:9], "…"),
        (KEY[:9] + "…", "…"),
    ],
)
def test_a_key_is_cut_out_however_it_is_written(echo: str, left: str) -> None:
    assert without_secrets(f"refused: {echo}", OURS) == f"refused: {left}"


def test_a_cookie_and_a_password_are_cut_out_on_their_own() -> None:
    basic = b64encode(b"me:hunter22").decode()
    assert without_secrets("me has no hunter22", {"Authorization": f"Basic {basic}"}) == "me has no …"
    assert without_secrets("session s3ssion-7 expired", {"Cookie": "a=b; id=s3ssion-7; c=d"}) == "session … expired"


@pytest.mark.parametrize(
    "text", ["CUDA failure 2: out of memory", r"C:\models\new\u0041.onnx 100%20 &amp;", "expected Bearer", ""]
)
def test_a_text_without_a_secret_stays_as_it_is(text: str) -> None:
    assert without_secrets(text, OURS) == text
    assert without_secrets(text, {}) == text


def test_a_value_too_short_for_a_key_does_not_cut_into_words() -> None:
    assert without_secrets("an error in one", {"X-Mode": "one", "Authorization": "Bearer or"}) == "an error in one"
