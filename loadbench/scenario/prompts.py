"""The mix of prompts: which kinds there are, and an endless seeded draw from them. Sending them is the engine's job.

What a prompt costs in tokens only the server knows (``usage``); made-up texts aim at a length through
``chars_per_token``: 4 for real tokenizers on English, exactly 1 for the synthetic models' bytes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

from pydantic import TypeAdapter, ValidationError

from loadbench.errors import UsageError
from loadbench.records import Ask, Closed, Load, Open, Prompt
from loadbench.scenario.reading import read_json
from loadbench.scenario.schema import InputTokens, Message, Scenario
from loadbench.scenario.traces import Row, replay

# Prompts that are dealt with their kinds in the shares of the weights. Shares from 5 % up are in every deck; a deck is
# shuffled, so that workers, who take every n-th prompt, have about these shares too.
DECK = 20

CHARS_PER_TOKEN = 4.0  # the usual rule of thumb for English; the exact count is the server's

RECORDED = "trace"  # what results call prompts whose length comes from a trace
MEMORY = "memory"  # what results call the prompts of a memory ladder

_CHAT = TypeAdapter(tuple[Message, ...])
_TEXT_KEYS = ("prompt", "text")
_SHAPES = "a text, a list of messages or an object with messages, prompt or text"

# Plain words, so that a made-up text is about as long in tokens as English of its length.
_WORDS = (
    "the of and to in is that for it on with as was are by this be from or an at not have but all they one can more"
    " when which will up out some time into only new other could these two may then first any like now such our over"
    " garden river morning window letter market winter paper bridge music summer village story kitchen island forest"
    " engine harbour teacher picture station weather journey question answer number valley colour silver yellow water"
    " carry follow gather remember listen build measure compare explain travel water open close begin finish wonder"
)


@dataclass(frozen=True, slots=True)
class Chat:
    """What one request says. ``max_tokens`` None: whatever the scenario says. ``place`` None: it is made up."""

    messages: tuple[dict[str, Any], ...]
    max_tokens: int | None = None
    place: int | None = None


def user_says(text: str) -> tuple[dict[str, Any], ...]:
    return ({"role": "user", "content": text},)


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A prompt file as read: its chats in order, and the SHA-256 of its bytes."""

    chats: tuple[Chat, ...]
    sha256: str


def read_prompt_file(path: Path) -> PromptFile:
    """Read a JSON list of prompts, or an object whose ``prompts`` is one.

    A prompt is a text, a list of chat messages, or an object with ``messages``, ``prompt`` or ``text`` and perhaps
    ``max_tokens``; its other keys (a category, an expected answer) are somebody else's. Raises UsageError that names
    the file and the place in it.
    """
    items, content = read_json(path, "a prompt file")
    if isinstance(items, dict) and "prompts" in items:
        items = items["prompts"]
    if not isinstance(items, list) or not items:
        found = "an empty list" if items == [] else f"a {type(items).__name__}"
        raise UsageError(f"{path}: expected a list of prompts, got {found}")
    chats = tuple(_chat(item, place, f"{path}: [{place}]") for place, item in enumerate(items))
    return PromptFile(chats, hashlib.sha256(content).hexdigest())


def _chat(item: Any, place: int, where: str) -> Chat:
    if isinstance(item, dict):
        max_tokens = item.get("max_tokens")
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise UsageError(f"{where}.max_tokens: expected a number above 0, got {json.dumps(max_tokens)}")
        inner = next((item[key] for key in ("messages", *_TEXT_KEYS) if key in item), None)
        return Chat(_messages(inner, where), max_tokens, place)
    return Chat(_messages(item, where), None, place)


def _messages(item: Any, where: str) -> tuple[dict[str, Any], ...]:
    if isinstance(item, str) and item.strip():
        return user_says(item)
    if isinstance(item, list) and item:
        try:
            return tuple(message.model_dump() for message in _CHAT.validate_python(item))
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(step) for step in first["loc"])
            raise UsageError(f"{where}: expected messages with role and content, got {path}: {first['msg']}") from None
    found = "nothing" if item in (None, "", []) else json.dumps(item)[:60]
    raise UsageError(f"{where}: expected {_SHAPES}, got {found}")


# One prompt of a kind: what it costs comes from the first generator, what makes it unlike all others from the second.
# The number is how many of its kind have come before.
Draw = Callable[[random.Random, random.Random, int], Chat]


class PromptMix:
    """The kinds of prompt of a scenario, ready to be drawn from.

    Raises UsageError for a prompt file that cannot be used. ``folder`` is where relative ones are looked up.
    """

    def __init__(self, scenario: Scenario, folder: Path, chars_per_token: float = CHARS_PER_TOKEN) -> None:
        self.chars_per_token = chars_per_token
        self._max_tokens = scenario.request.max_tokens
        self._kinds: list[tuple[str, int, Draw]] = []
        for entry in scenario.prompts:
            one_of = _in_turn if entry.order == "sequential" else _drawn_from
            if entry.input_tokens is not None:
                draw = _made_up_like(entry.input_tokens, chars_per_token)
            elif entry.file is not None:
                draw = one_of(read_prompt_file(folder / entry.file).chats)
            elif entry.messages is not None:
                draw = one_of((Chat(tuple(message.model_dump() for message in entry.messages), place=0),))
            else:
                draw = one_of((Chat(user_says(entry.text or ""), place=0),))
            self._kinds.append((entry.name, entry.max_tokens or self._max_tokens, draw))
        self._weights = [entry.weight for entry in scenario.prompts]
        self._seed = scenario.seed
        _many_words()  # 3 ms that no level should pay

    def draw(self, seed: int, load: Load | None = None) -> Iterator[Prompt]:
        """Prompts without end; the same seed draws the same ones in the same order.

        Their kinds, the chats and the lengths come from the scenario's seed: levels that are compared are asked the
        same work, prompt by prompt. Kinds in sequential order begin with the first prompt of their file. Only the words
        of made-up texts come from ``seed``, the level's: no cache that an earlier level has filled can answer for the
        model.

        For a load from a trace there are as many as its rows, and a length that a row has decides: its input tokens
        make a text of the kind ``trace`` instead of one from the mix, its output tokens are max_tokens. Raises
        UsageError for a trace that is no longer there. A rung of a memory ladder has its own kind, ``memory``, alone.
        """
        words = random.Random(f"words {seed}")
        if isinstance(load, Closed) and load.ask is not None:
            return self._like(load.ask, words)
        drawn = self._drawn(random.Random(f"prompts {self._seed}"), words)
        trace = load.trace if isinstance(load, Open) else None
        return drawn if trace is None else self._as_recorded(replay(trace), drawn, random.Random(f"trace {seed}"))

    def _drawn(self, work: random.Random, words: random.Random) -> Iterator[Prompt]:
        turns = [0] * len(self._kinds)
        for index, kind in enumerate(dealt(self._weights, work)):
            name, max_tokens, draw = self._kinds[kind]
            chat = draw(work, words, turns[kind])
            turns[kind] += 1
            yield Prompt(name, index, chat.messages, chat.max_tokens or max_tokens, chat.place)

    def _like(self, ask: Ask, words: random.Random) -> Iterator[Prompt]:
        """Prompts of one length that ask for answers without end: what is held for them is to be ``max_tokens``."""
        for index in itertools.count():
            text = _made_up(round(ask.input_tokens * self.chars_per_token), words, ENDLESS)
            yield Prompt(MEMORY, index, user_says(text), ask.max_tokens)

    def _as_recorded(self, rows: Iterator[Row], mix: Iterator[Prompt], rng: random.Random) -> Iterator[Prompt]:
        for index, row in enumerate(rows):
            if row.input_tokens is None:
                prompt = next(mix)
            else:
                text = _made_up(round(row.input_tokens * self.chars_per_token), rng)
                prompt = Prompt(RECORDED, index, user_says(text), self._max_tokens)
            if row.output_tokens:  # and so it is no longer the prompt of its place
                prompt = replace(prompt, max_tokens=row.output_tokens, place=None)
            yield replace(prompt, index=index)


def dealt(weights: Sequence[float], rng: random.Random) -> Iterator[int]:
    """Places in ``weights`` without end, in decks of ``DECK`` that hold each by its weight, shuffled.

    What a deck cannot hold in whole cards is owed to the next ones, so shares hold in every stretch: independent draws
    would give 130 requests at a share of a fifth 26 ± 5, and levels with other work could not be compared.
    """
    total = sum(weights)
    owed = [0.0] * len(weights)
    while True:
        owed = [debt + DECK * weight / total for debt, weight in zip(owed, weights, strict=True)]
        counts = [max(0, math.floor(debt)) for debt in owed]
        most_owed = sorted(range(len(owed)), key=lambda place: counts[place] - owed[place])
        for place in most_owed[: DECK - sum(counts)]:
            counts[place] += 1
        owed = [debt - count for debt, count in zip(owed, counts, strict=True)]
        deck = [place for place, count in enumerate(counts) for _ in range(count)]
        rng.shuffle(deck)
        yield from deck


def _drawn_from(chats: tuple[Chat, ...]) -> Draw:
    return lambda work, words, turn: work.choice(chats)


def _in_turn(chats: tuple[Chat, ...]) -> Draw:
    """Round and round."""
    return lambda work, words, turn: chats[turn % len(chats)]


def _made_up_like(tokens: InputTokens, chars_per_token: float) -> Draw:
    """Texts of a drawn length."""

    def draw(work: random.Random, words: random.Random, turn: int) -> Chat:
        return Chat(user_says(_made_up(round(_truncated_normal(tokens, work) * chars_per_token), words)))

    return draw


@functools.cache
def _many_words() -> str:
    return " ".join(random.Random(_WORDS).choices(_WORDS.split(), k=10_000))


TASK = "summarise these notes"
ENDLESS = "tell a story without end"


def _made_up(length: int, rng: random.Random, task: str = TASK) -> str:
    """A text of so many characters that begins with a word of its own: no prefix cache can answer for the model.

    It is a window into one long seeded text: cutting one out costs microseconds, at any length.
    """
    stream = _many_words()
    start = rng.randrange(len(stream))
    text = stream * ((start + length) // len(stream) + 1)
    return (f"{_unique_word(rng)}: {task}. " + text[start : start + length])[:length]


def _unique_word(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8))


def _truncated_normal(tokens: InputTokens, rng: random.Random) -> int:
    """Drawn by inverting the distribution between the bounds: no pile-up at them, as clipping has, and no retries."""
    if tokens.stdev == 0:
        return round(tokens.mean)
    normal = NormalDist(tokens.mean, tokens.stdev)
    low = normal.cdf(tokens.min)
    high = 1.0 if tokens.max is None else normal.cdf(tokens.max)
    share = low + rng.random() * (high - low)
    # inv_cdf is defined inside (0, 1) only; rounding may step over a bound that is no whole number away.
    length = round(normal.inv_cdf(min(max(share, 1e-12), 1 - 1e-12)))
    return max(tokens.min, length if tokens.max is None else min(length, tokens.max))
