"""Prompts: the mix is drawn by weight from its seed; a prompt file that cannot be used is refused with its place."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from loadbench.errors import UsageError
from loadbench.records import Prompt
from loadbench.scenario.prompts import DECK, PromptMix, dealt, read_prompt_file
from loadbench.scenario.schema import Scenario


def drawn(
    entries: list[dict[str, Any]], count: int, *, seed: int = 1, scenario_seed: int = 42, **options: Any
) -> list[Prompt]:
    keys = {"prompts": entries, "request": {"max_tokens": 32}, "seed": scenario_seed}
    scenario = Scenario.model_validate(keys)
    folder = options.pop("folder", Path())
    return list(itertools.islice(PromptMix(scenario, folder, **options).draw(seed), count))


def text_of(prompt: Prompt) -> str:
    return str(prompt.messages[-1]["content"])


MIX = [
    {"name": "often", "weight": 3, "text": "Hello."},
    {"name": "seldom", "weight": 1, "input_tokens": {"mean": 50, "stdev": 10}, "max_tokens": 7},
]


def test_every_deck_holds_the_kinds_in_the_shares_of_their_weights() -> None:
    kinds = [prompt.kind for prompt in drawn(MIX, 20 * DECK)]
    decks = [kinds[at : at + DECK] for at in range(0, len(kinds), DECK)]
    assert {deck.count("seldom") for deck in decks} == {DECK // 4}
    assert len({tuple(deck) for deck in decks}) == len(decks)  # in an order that nobody can count on


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(0, 2**32))
def test_kinds_of_any_weights_get_their_shares_in_every_stretch(weights: list[float], seed: int) -> None:
    decks = 30
    counts = Counter(itertools.islice(dealt(weights, random.Random(seed)), decks * DECK))
    for place, weight in enumerate(weights):
        assert abs(counts[place] - decks * DECK * weight / sum(weights)) < len(weights)


def test_a_worker_that_takes_every_nth_prompt_has_about_the_shares_too() -> None:
    for workers in (2, 4, 5):
        for index in range(workers):
            kinds = [prompt.kind for prompt in drawn(MIX, 500 * workers)[index::workers]]
            assert kinds.count("seldom") == pytest.approx(125, abs=40)  # four deviations of an independent draw


def test_all_levels_of_a_scenario_are_asked_the_same_work_in_words_of_their_own() -> None:
    first, second = drawn(MIX, 200, seed=3), drawn(MIX, 200, seed=4)
    work = [[(p.kind, p.max_tokens, len(text_of(p))) for p in level] for level in (first, second)]
    assert work[0] == work[1]
    made_up = [{text_of(p)[:8] for p in level if p.kind == "seldom"} for level in (first, second)]
    assert made_up[0].isdisjoint(made_up[1])
    assert [p.kind for p in drawn(MIX, 200, scenario_seed=1)] != [p.kind for p in first]


def test_the_same_seed_draws_the_same_prompts_and_another_seed_others() -> None:
    assert drawn(MIX, 50, seed=3) == drawn(MIX, 50, seed=3)
    assert drawn(MIX, 50, seed=3) != drawn(MIX, 50, seed=4)


def test_prompts_are_numbered_and_carry_their_own_max_tokens_or_the_requests() -> None:
    prompts = drawn(MIX, 40)
    assert [prompt.index for prompt in prompts] == list(range(40))
    assert {(prompt.kind, prompt.max_tokens) for prompt in prompts} == {("often", 32), ("seldom", 7)}


def test_a_conversation_keeps_its_turns() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert drawn([{"name": "talk", "messages": turns}], 1)[0].messages == tuple(turns)


@pytest.mark.parametrize(("chars_per_token", "mean_characters"), [(1.0, 400), (4.0, 1600)])
def test_made_up_texts_have_about_the_tokens_asked_for(chars_per_token: float, mean_characters: int) -> None:
    entry = {"name": "made-up", "input_tokens": {"mean": 400, "stdev": 100, "min": 50, "max": 750}}
    lengths = [len(text_of(prompt)) for prompt in drawn([entry], 2000, chars_per_token=chars_per_token)]
    assert statistics.mean(lengths) == pytest.approx(mean_characters, rel=0.02)
    assert statistics.stdev(lengths) == pytest.approx(mean_characters / 4, rel=0.05)


def test_made_up_lengths_follow_a_truncated_normal_without_a_pile_at_the_bounds() -> None:
    entry = {"name": "made-up", "input_tokens": {"mean": 500, "stdev": 300, "min": 300, "max": 900}}
    lengths = [len(text_of(prompt)) for prompt in drawn([entry], 4000, chars_per_token=1.0)]
    assert min(lengths) >= 300
    assert max(lengths) <= 900
    bounds = (300 - 500) / 300, (900 - 500) / 300
    assert stats.kstest(lengths, stats.truncnorm(*bounds, loc=500, scale=300).cdf).pvalue > 0.01


@pytest.mark.parametrize(
    ("tokens", "length"),
    [({"mean": 7}, 7), ({"mean": 9, "stdev": 5, "min": 9, "max": 9}, 9), ({"mean": 200_000}, 200_000)],
)
def test_made_up_texts_may_be_of_one_length_short_or_very_long(tokens: dict[str, float], length: int) -> None:
    assert [len(text_of(p)) for p in drawn([{"name": "x", "input_tokens": tokens}], 3, chars_per_token=1.0)] == [
        length
    ] * 3


def test_no_two_made_up_texts_begin_alike_and_all_are_ascii() -> None:
    texts = [
        text_of(prompt) for prompt in drawn([{"name": "x", "input_tokens": {"mean": 300}}], 1000, chars_per_token=1.0)
    ]
    assert len({text[:8] for text in texts}) == 1000
    assert all(text.isascii() for text in texts)  # a byte is a token on the synthetic models


def test_a_file_may_hold_texts_chats_and_objects(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    items = ["one", chat, {"messages": chat, "max_tokens": 5}, {"prompt": "two", "category": "any"}, {"text": "three"}]
    (tmp_path / "p.json").write_text(json.dumps(items))
    chats = read_prompt_file(tmp_path / "p.json").chats
    assert [chat.messages[-1]["content"] for chat in chats] == ["one", "Why?", "Why?", "two", "three"]
    assert [chat.max_tokens for chat in chats] == [None, None, 5, None, None]
    prompts = drawn([{"name": "f", "file": "p.json"}], 200, folder=tmp_path)
    assert {prompt.max_tokens for prompt in prompts} == {5, 32}
    assert {text_of(prompt) for prompt in prompts} == {"one", "two", "three", "Why?"}


def test_a_file_may_be_an_object_with_prompts_and_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompts": ["one", "two"]}).encode())
    assert len(read_prompt_file(tmp_path / "p.json").chats) == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("not json", ":1: expected valid JSON: Expecting value"),
        ('["a",\n "b"', ":2: expected valid JSON: Expecting ',' delimiter"),
        ("[]", ": expected a list of prompts, got an empty list"),
        ("[" * 200_000, ": expected a prompt file, got lists or mappings nested too deep"),
        ('{"a": 1}', ": expected a list of prompts, got a dict"),
        ('["a", 5]', ": [1]: expected a text, a list of messages or an object with messages, prompt or text, got 5"),
        (
            '["a", " "]',
            ': [1]: expected a text, a list of messages or an object with messages, prompt or text, got " "',
        ),
        ('[{"question": "why?"}]', ": [0]: expected a text, a list of messages"),
        ('[[{"role": "user"}]]', ": [0]: expected messages with role and content, got 0.content: Field required"),
        ('[[{"role": "robot", "content": "x"}]]', ": [0]: expected messages with role and content, got 0.role"),
        ('[{"text": "x", "max_tokens": 0}]', ": [0].max_tokens: expected a number above 0, got 0"),
        ('[{"text": "x", "max_tokens": true}]', ": [0].max_tokens: expected a number above 0, got true"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_place(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(UsageError) as raised:
        read_prompt_file(path)
    assert str(raised.value).startswith(f"{path}{problem}")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nope\.json: expected a prompt file: No such file"):
        read_prompt_file(tmp_path / "nope.json")
    (tmp_path / "p.json").write_bytes(b'["\xff"]')
    with pytest.raises(UsageError, match=r"p\.json: expected JSON in UTF-8"):
        read_prompt_file(tmp_path / "p.json")
