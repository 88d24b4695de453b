"""What was answered: the text as it streams, the hash of all of it, and both beside a request outside the load."""

from __future__ import annotations

import json
from array import array
from hashlib import blake2b
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadbench.engine import sse, text
from loadbench.engine.crew import Crew
from loadbench.engine.load import Clock
from loadbench.engine.sse import Stream
from loadbench.engine.text import Text, hash_of
from loadbench.records import Prompt, Request
from loadbench.scenario.schema import Scenario
from tests.asking import answering, ask_once, client_to, faking, head, listening, scripted, wire_to
from tests.command import rows
from tests.embedded import embedded

HELLO = Prompt("chat", 0, ({"role": "user", "content": "hello"},), 6, place=2)


def digest(said: str) -> str:
    return blake2b(said.encode(), digest_size=8).hexdigest()


def delta(**said: Any) -> bytes:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': said}]}, ensure_ascii=False)}\n\n".encode()


def heard(*events: bytes) -> Stream:
    stream = Stream(array("q"))
    for event in events:
        stream.feed(event, 1)
    return stream


# Text


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_a_texts_hash_is_that_of_its_pieces_together(pieces: list[str]) -> None:
    whole = Text()
    for piece in pieces:
        whole.add(piece.encode())
    said = "".join(pieces)
    assert str(whole) == said
    assert whole.hash() == (digest(said) if said else None) == hash_of(said)
    assert bool(whole) is bool(said)


@pytest.mark.parametrize("piece", ["x" * 60, "€" * 20, "😀" * 33])
def test_of_a_text_beyond_the_limit_the_beginning_is_kept_and_all_of_it_is_hashed(
    piece: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "KEPT_BYTES", 100)
    whole = Text()
    for _ in range(10):
        whole.add(piece.encode())
    kept = str(whole)
    assert (piece * 10).startswith(kept)
    assert 100 - 4 < len(kept.encode()) <= 100  # and no broken character at its end
    assert whole.hash() == digest(piece * 10) == whole.hash()
    assert len(whole.said) <= 100


def test_the_fast_path_too_hashes_beyond_the_limit_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "KEPT_BYTES", 100)
    monkeypatch.setattr(sse, "KEPT_BYTES", 100)
    words = [f"word{number} " for number in range(200)]
    stream = heard(*(delta(content=word) for word in words))
    assert stream.answer.hash() == digest("".join(words))
    assert len(stream.content.said) <= 100
    assert str(stream.answer) == "".join(words)[:100]


# What of a stream is the answer


def test_the_text_is_the_same_decoded_or_not() -> None:
    words = ["and", " so", " it", " goes", " on", ' "quoted"', " ü", " €", " 😀", "\n", " \\", " end"]
    assert str(heard(*(delta(content=word) for word in words)).answer) == "".join(words)


def test_reasoning_is_no_part_of_the_answer() -> None:
    stream = heard(delta(reasoning_content="let me see"), delta(content="42"), delta(reasoning="hm"))
    assert str(stream.answer) == "42"


def test_an_answer_that_never_came_to_its_content_is_its_reasoning() -> None:
    stream = heard(delta(reasoning_content="let me"), delta(reasoning_content=" see"))
    assert (str(stream.answer), stream.answer.hash()) == ("let me see", digest("let me see"))


def test_a_call_of_a_tool_is_no_text() -> None:
    assert heard(delta(tool_calls=[{"index": 0}])).answer.hash() is None


def test_content_in_parts_is_counted_and_is_no_text() -> None:
    stream = heard(delta(content=[{"type": "text", "text": "x"}]))
    assert (stream.chunks, stream.answer.hash()) == (1, None)


def test_of_several_choices_in_a_chunk_all_that_they_say_is_the_text() -> None:
    both = {"choices": [{"index": 0, "delta": {"content": "a"}}, {"index": 1, "delta": {"content": "b"}}]}
    event = f"data: {json.dumps(both)}\n\n".encode()
    assert str(heard(*[event] * 8).answer) == "ab" * 8


# With the record of a request


@pytest.mark.parametrize("stream", [True, False])
async def test_a_sample_has_its_prompts_place_and_its_answers_hash_streamed_or_not(stream: bool) -> None:
    async with faking() as server, client_to(server.port, stream=stream) as client:
        sent = await client.send(Request(0, HELLO, perf_counter_ns()), level=0, phase="load")
        asked = await client.ask(Request(1, HELLO, perf_counter_ns()), level=0, phase="quality")
    assert len(asked.text.split()) == HELLO.max_tokens
    assert sent.place == asked.sample.place == 2
    assert sent.answer_hash == asked.sample.answer_hash == digest(asked.text)
    assert (asked.sample.phase, asked.sample.outcome) == ("quality", "ok")


async def test_where_nothing_was_answered_there_is_no_hash() -> None:
    async with faking(faults=("http_5xx",)) as server:
        sample = await ask_once(server.port)
    assert (sample.place, sample.answer_hash) == (None, None)


async def test_a_request_that_failed_is_told_with_what_was_said_until_then() -> None:
    async with faking(faults=("truncated_short",)) as server, client_to(server.port) as client:
        asked = await client.ask(Request(0, HELLO, perf_counter_ns()), level=0, phase="quality")
    assert asked.sample.outcome == "truncated"
    assert asked.text and asked.sample.answer_hash == digest(asked.text)


async def test_a_key_of_ours_that_a_server_repeats_is_in_no_answer() -> None:
    key = "sk-0123456789abcdef"
    said = json.dumps({"choices": [{"message": {"content": f"You sent {key}."}, "finish_reason": "stop"}]}).encode()
    start = head("Content-Type: application/json", f"Content-Length: {len(said)}")
    headers = {"Authorization": f"Bearer {key}", "X-Team": "You sent"}
    async with listening(answering(start + said)) as port, client_to(port, stream=False, headers=headers) as client:
        asked = await client.ask(Request(0, HELLO, perf_counter_ns()), level=0, phase="quality")
    assert asked.text == "You sent …."
    assert asked.sample.answer_hash == digest(f"You sent {key}.")


# Asked by a crew


@pytest.mark.parametrize("workers", [0, 2])
async def test_a_crew_asks_by_itself_also_with_workers_hired(workers: int, tmp_path: Path) -> None:
    scenario = Scenario.model_validate({"prompts": [{"name": "a", "text": "one"}]})
    async with scripted() as server, Crew(tmp_path, Clock(), 0) as crew:
        if workers:
            await crew.hire(workers, scenario.public_json(), tmp_path)
        crew.talk_to(wire_to(server.port))
        first, second = [await crew.ask(HELLO, "quality", 0) for _ in range(2)]
        one = await crew.one(HELLO, "canary", 0)
    assert first.text == second.text != ""
    assert first.sample.answer_hash == second.sample.answer_hash == one.answer_hash == digest(first.text)
    assert crew.phase == "idle"
    written = rows(tmp_path / "samples.jsonl")
    assert [(row["phase"], row["place"], row["answer_hash"]) for row in written] == [
        (phase, 2, digest(first.text)) for phase in ("quality", "quality", "canary")
    ]


# For real


async def test_a_real_model_at_temperature_0_answers_the_same_twice() -> None:
    async with embedded("synthetic:tiny") as asked:
        wire: dict[str, Any] = {"path": asked.model.chat_path, "model": asked.model.id, "temperature": 0.0}
        prompts = [Prompt("chat", 0, ({"role": "user", "content": said},), 24) for said in ("one two", "x" * 60)]
        async with client_to(asked.target.endpoint.address.port, **wire) as client:
            told = [
                [
                    await client.ask(Request(0, prompt, perf_counter_ns()), level=0, phase="quality")
                    for prompt in prompts
                ]
                for _ in range(2)
            ]
    first, second = [[(answer.text, answer.sample.answer_hash) for answer in each] for each in told]
    assert first == second
    assert all(said and found == digest(said) for said, found in first)
    assert len({found for _, found in first}) == 2
