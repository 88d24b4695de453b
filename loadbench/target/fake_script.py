"""What the scripted endpoint does: its values, with their limits, and which request goes wrong.

``Script`` is the one home of every knob: the command line, the JSON file and the ``X-Fake-Script`` header are read
from its fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from loadbench.errors import UsageError
from loadbench.target.fake_faults import FAULTS, HONEST, Fault
from loadbench.target.fake_flavours import FLAVOURS

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


def _knob(default: Any, meaning: str) -> Any:
    return Field(default=default, description=meaning)


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Script:
    """How the endpoint behaves when nothing goes wrong, and how often what goes wrong.

    A request is served from when it has a slot. Token i is due ``first_token_ms`` + jitter + ``prefill_ms`` × input
    tokens + i × ``gap_ms`` after that: the schedule is absolute, a late token delays no other.
    """

    first_token_ms: NonNegative = _knob(100, "time to the first token")
    first_token_jitter_ms: NonNegative = _knob(0, "and up to so much more, drawn uniformly")
    prefill_ms: NonNegative = _knob(0, "and so much more per input token (a UTF-8 byte of the messages)")
    gap_ms: NonNegative = _knob(20, "time from token to token")
    tokens: Count = _knob(32, "tokens of an answer whose request sets no max_tokens")
    answers: tuple[str, ...] = _knob(
        (), "texts of the answers, in turn; PATTERN => TEXT: of those to a last message that has this pattern"
    )
    tokens_per_chunk: Positive = _knob(1, "tokens per content event")
    slowdown: NonNegative = _knob(0, "each other active request stretches all times by so much; 1: shared")
    crosstalk: NonNegative = _knob(0, "and so much more for each ordered pair of active requests")
    slots: Positive | None = _knob(None, "requests served at a time; the others queue, first in first out")
    queue_limit: Count | None = _knob(None, "requests that may queue; beyond it, HTTP 503")
    role_chunk: Literal["receipt", "slot", "token", "none"] = _knob("receipt", "when the role-only chunk is sent")
    keep_alive_ms: Annotated[float, Field(gt=0)] | None = _knob(
        None, "a comment after so long a silence (Foundry Local: 250)"
    )
    framing: Literal["chunked", "close"] = _knob("chunked", "what ends the body of a stream")
    connection_close: bool = _knob(False, "close every connection after its answer")
    nagle: bool = _knob(False, "hold back small writes until all is acknowledged (as Foundry Local 2.2 does)")
    usage: bool = _knob(True, "send usage when stream_options.include_usage asks for it")
    leak_bytes: Count = _knob(0, "memory taken, and never given back, by each request")
    faults: tuple[str, ...] = _knob(
        (), "NAME (always), NAME:0.1 (with that probability) or NAME@20 (every 20th request)"
    )
    fault_after: Count = _knob(3, "tokens before a fault in the middle of an answer")
    stall_ms: NonNegative = _knob(2000, "the pause of the fault `stall`")
    stall_at_s: NonNegative | None = _knob(None, "all work stops, once, so long after the first request")
    stall_for_s: NonNegative = _knob(2, "and goes on so much later")
    refuse_after: Positive | None = _knob(None, "stop listening after so many requests")
    flavour: str = _knob("openai", "whose status routes to answer: " + ", ".join(FLAVOURS))
    prefix: str = _knob("", "serve the models below this path only (Foundry Local: /catalogs/local)")
    models: tuple[str, ...] = _knob(("fake-model:1",), "ids of the models")
    loaded: tuple[str, ...] | None = _knob(None, "ids of those loaded at the start (default: all)")
    seed: int = _knob(0, "of jitter and of faults with a probability")

    @field_validator("faults")
    @classmethod
    def _faults_exist(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        for rule in rules:
            _parse_rule(rule)
        return rules

    @field_validator("answers")
    @classmethod
    def _patterns_make_sense(cls, answers: tuple[str, ...]) -> tuple[str, ...]:
        for answer in answers:
            try:
                re.compile(_split(answer)[0] or "")
            except re.error as error:
                raise ValueError(f"expected a regular expression before{ARROW}: {error}") from None
        return answers

    @field_validator("flavour")
    @classmethod
    def _flavour_exists(cls, flavour: str) -> str:
        if flavour not in FLAVOURS:
            raise ValueError(f"expected one of {', '.join(FLAVOURS)}")
        return flavour


SCRIPT = TypeAdapter(Script)


def script_from(values: Mapping[str, Any], where: str, start: Script | None = None) -> Script:
    """Return ``start`` (the default script) with ``values`` in place. UsageError names ``where`` and the field."""
    try:
        return SCRIPT.validate_python({**(asdict(start) if start else {}), **values})
    except ValidationError as error:
        first = error.errors()[0]
        knob = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{where}: {knob}: {first['msg']}, got {first['input']!r}") from None


def script_from_json(text: bytes | str, where: str, start: Script | None = None) -> Script:
    """The same, from a JSON object."""
    try:
        values = TypeAdapter(dict[str, Any]).validate_json(text)
    except ValidationError:
        raise UsageError(f"{where}: expected a JSON object of script values, got {text[:80]!r}") from None
    return script_from(values, where, start)


def script_from_file(path: Path) -> Script:
    """The same, from a file."""
    try:
        return script_from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"{path}: expected a JSON file that can be read: {error.strerror}") from None


ARROW = " => "


def _split(answer: str) -> tuple[str | None, str]:
    """The pattern, if any, and the text."""
    pattern, arrow, text = answer.partition(ARROW)
    return (pattern, text) if arrow else (None, answer)


def choose_answer(script: Script, seq: int, question: str) -> str | None:
    """What request number ``seq`` (from 1) is answered; None: as many words as it asks for.

    The first pattern that its last message has decides, else the turn of those without one.
    """
    answers = [_split(answer) for answer in script.answers]
    for pattern, text in answers:
        if pattern is not None and re.search(pattern, question):
            return text
    in_turn = [text for pattern, text in answers if pattern is None]
    return in_turn[(seq - 1) % len(in_turn)] if in_turn else None


SAID_IN_TEXT = re.compile(r"\bfake-fault:(\w+)")
RULE = re.compile(r"(?P<name>\w+)(:(?P<probability>[0-9.]+(e-?[0-9]+)?)|@(?P<every>[1-9][0-9]*))?")


def fault_named(name: str) -> Fault:
    """The row of that name; UsageError if there is none."""
    if name == HONEST.name:
        return HONEST
    if name not in FAULTS:
        raise UsageError(f"fault: expected one of {', '.join(FAULTS)}, got {name!r}")
    return FAULTS[name]


def stretch(script: Script, active: int) -> float:
    """How much longer all times are while so many requests are served: as Gunther's Universal Scalability Law has it.

    N users who never pause then get N / (1 + slowdown (N - 1) + crosstalk N (N - 1)) times one user's throughput.
    """
    return 1 + script.slowdown * (active - 1) + script.crosstalk * active * (active - 1)


@lru_cache(maxsize=256)
def _parse_rule(rule: str) -> tuple[Fault, float, int]:
    """The fault, its probability, and which requests it is for (1: each). ValueError if the rule makes no sense."""
    match = RULE.fullmatch(rule)
    if match is None or match["name"] not in FAULTS:
        raise ValueError(f"expected NAME, NAME:PROBABILITY or NAME@EVERY, with NAME one of {', '.join(FAULTS)}")
    probability = float(match["probability"] or 1)
    if not 0 <= probability <= 1:
        raise ValueError("expected a probability from 0 to 1")
    return FAULTS[match["name"]], probability, int(match["every"] or 1)


def choose_fault(script: Script, seq: int, draw: Random, header: str | None, texts: tuple[str, ...]) -> Fault:
    """What goes wrong with request number ``seq`` (from 1).

    The ``X-Fake-Fault`` header decides, else ``fake-fault:NAME`` in one of the ``texts`` (the model's name, the last
    message), else the first rule of the script that applies. UsageError for a name that is not in the table.
    """
    if header is not None:
        return fault_named(header)
    for text in texts:
        said = SAID_IN_TEXT.search(text)
        if said:
            return fault_named(said[1])
    for rule in script.faults:
        fault, probability, every = _parse_rule(rule)
        if seq % every == 0 and (probability == 1 or draw.random() < probability):
            return fault
    return HONEST
