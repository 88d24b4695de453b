"""Bytes in, meaning out: the event stream of one answer, in every cut and with every oddity that servers have shown."""

import json
from array import array
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadbench.engine.sse import EVENT_LIMIT_BYTES, Stream, error_text, read_answer, readable
from loadbench.records import STALL_NS


def chunk(content: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    return {"id": "c-1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def event(document: Any, end: str = "\n\n") -> bytes:
    return f"data: {json.dumps(document)}{end}".encode()


DONE = b"data: [DONE]\n\n"
USAGE = {"id": "c-1", "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
WHOLE = (
    event(chunk("")) + event(chunk("Hel")) + event(chunk("lo")) + event(chunk("!")) + event(chunk(None, "stop"))
) + (event(USAGE) + DONE)


def read(*pieces: bytes, step_ns: int = 10) -> Stream:
    stream = Stream(array("q"))
    for number, piece in enumerate(pieces, 1):
        stream.feed(piece, number * step_ns)
    stream.end(len(pieces) * step_ns)
    return stream


def facts(stream: Stream) -> dict[str, Any]:
    names = ("chunks", "keep_alives", "finish_reason", "input_tokens", "output_tokens", "problem", "stray")
    return {name: getattr(stream, name) for name in names} | {"done": stream.done_ns is not None}


EXPECTED = {
    "chunks": 3,
    "keep_alives": 0,
    "finish_reason": "stop",
    "input_tokens": 7,
    "output_tokens": 3,
    "problem": None,
    "stray": None,
    "done": True,
}


def test_a_plain_stream_is_read() -> None:
    assert facts(read(WHOLE)) == EXPECTED


def test_the_role_only_chunk_is_the_first_event_and_not_the_first_token() -> None:
    stream = read(event(chunk("")), event(chunk("a")), event(chunk("b")))
    assert (stream.first_event_ns, stream.first_token_ns, stream.last_token_ns) == (10, 20, 30)


def test_gaps_between_content_chunks_are_kept_with_the_largest_and_the_stalls() -> None:
    gaps = array("q")
    stream = Stream(gaps)
    for now_ns in (0, 5, 5 + 2 * STALL_NS, 6 + 2 * STALL_NS):
        stream.feed(event(chunk("x")), now_ns)
    assert gaps.tolist() == [5, 2 * STALL_NS, 1]
    assert (stream.max_gap_ns, stream.stall_ns) == (2 * STALL_NS, 2 * STALL_NS)


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\r\r"])
def test_every_line_ending_of_the_standard_is_understood(end: str) -> None:
    body = b"".join(event(chunk(text), end) for text in ("a", "b", "c")) + event(chunk(None, "stop"), end)
    assert facts(read(body))["chunks"] == 3
    assert facts(read(*(body[i : i + 1] for i in range(len(body)))))["chunks"] == 3


def test_the_space_after_data_is_optional() -> None:
    assert facts(read(WHOLE.replace(b"data: ", b"data:"))) == EXPECTED


def test_comments_are_counted_as_keep_alives_and_are_no_event() -> None:
    stream = read(b": keep-alive\n\n", b": keep-alive\n\n", event(chunk("a")))
    assert (stream.keep_alives, stream.first_event_ns, stream.first_token_ns) == (2, 30, 30)


def test_data_over_several_lines_is_one_document() -> None:
    lines = json.dumps(chunk("a"), indent=1).splitlines()
    stream = read("".join(f"data: {line}\n" for line in lines).encode() + b"\n")
    assert (stream.chunks, stream.problem) == (1, None)


def test_ids_retries_and_unknown_event_names_change_nothing() -> None:
    stream = read(b"id: 7\nretry: 100\nevent: message\n" + event(chunk("a")))
    assert (stream.chunks, stream.stray) == (1, None)


def test_utf8_split_across_reads_is_put_together() -> None:
    body = 'data: {"choices": [{"delta": {"content": "ü€😀"}}]}\n\n'.encode()
    stream = read(*(body[i : i + 1] for i in range(len(body))))
    assert (stream.chunks, stream.problem) == (1, None)


def test_one_byte_per_read_gives_the_same_answer() -> None:
    assert facts(read(*(WHOLE[i : i + 1] for i in range(len(WHOLE))))) == EXPECTED


def test_ten_events_in_a_read_are_ten_tokens_at_one_moment() -> None:
    gaps = array("q")
    stream = Stream(gaps)
    stream.feed(b"".join(event(chunk(str(i))) for i in range(10)), 70)
    assert (stream.chunks, stream.first_token_ns, stream.last_token_ns) == (10, 70, 70)
    assert gaps.tolist() == [0] * 9


def test_a_usage_only_chunk_is_no_token() -> None:
    stream = read(event(USAGE))
    assert (stream.chunks, stream.input_tokens, stream.output_tokens) == (0, 7, 3)


def test_a_last_event_without_its_empty_line_still_counts() -> None:
    assert facts(read(WHOLE.rstrip(b"\n"))) == EXPECTED


def test_a_missing_done_is_seen() -> None:
    assert facts(read(WHOLE.removesuffix(DONE)))["done"] is False


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "tool_calls"])
def test_reasoning_and_tool_calls_are_content(key: str) -> None:
    assert read(event({"choices": [{"delta": {key: "thinking"}}]})).chunks == 1


def test_garbage_is_quoted_and_is_no_event() -> None:
    stream = read(b"<html><body>502 Bad Gateway</body></html>\n")
    assert stream.first_event_ns is None
    assert stream.stray == "<html><body>502 Bad Gateway</body></html>"


@pytest.mark.parametrize("payload", ["{", "nonsense", "[1,2]", "7", '"text"', '{"choices": 3}', '{"choices": ["x"]}'])
def test_an_event_that_is_no_chat_chunk_breaks_the_protocol(payload: str) -> None:
    problem = read(f"data: {payload}\n\n".encode()).problem
    assert problem is not None and problem[0] == "protocol"


def test_an_error_document_is_the_servers_error() -> None:
    stream = read(event({"error": {"message": "Model not loaded", "type": "invalid_request_error"}}))
    assert stream.problem == ("error", "Model not loaded: invalid_request_error")


def test_an_event_named_error_is_an_error_even_in_the_shape_of_a_chunk() -> None:
    stream = Stream(array("q"))
    for text in "abcdef":
        stream.feed(event(chunk(text)), 1)
    stream.feed(b"event: error\n", 2)
    stream.feed(event(chunk("g")), 3)  # alone in its read, and byte for byte a content chunk
    assert stream.chunks == 6
    assert stream.problem is not None and stream.problem[0] == "error"


def test_an_endless_event_is_refused_before_it_fills_the_memory() -> None:
    stream = Stream(array("q"))
    piece = b"data: " + b"x" * (1 << 20)
    for _ in range(2 + (EVENT_LIMIT_BYTES >> 20)):
        stream.feed(piece, 1)
    assert stream.problem == ("protocol", "an event of more than 4 MiB")


# The fast path: an event like the last one but for its text is not decoded again, and never misread.

AWKWARD = st.text(min_size=0, max_size=6) | st.sampled_from(
    ["", '"', "\\", '","finish_reason":"stop', "content", "assistant", "data: ", "\n\n", "}]}", "null", "c-1", "☃"]
)
CHUNKS = st.one_of(
    st.builds(chunk, AWKWARD),
    st.builds(chunk, AWKWARD, st.sampled_from(["stop", "length", None])),
    st.builds(lambda text: chunk(text, usage={"prompt_tokens": 1, "completion_tokens": 2}), AWKWARD),
    st.builds(lambda text: {"choices": [{"delta": {"role": "assistant", "content": text}}]}, AWKWARD),
    st.builds(lambda text: {"choices": [{"delta": {"content": text}, "finish_reason": text}]}, AWKWARD),
    st.builds(lambda text: {"error": {"message": text}, **chunk(text)}, AWKWARD),
    st.just(USAGE),
)


def reference(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """What a reader that decodes everything makes of it."""
    chunks, finish, problem = 0, None, None
    tokens: tuple[int | None, int | None] = (None, None)
    text = ""
    for document in documents:
        answer = read_answer(document, "delta")
        if answer is None:
            problem = problem or ("error" if error_text(document) is not None else "protocol")
            continue
        chunks += answer.has_content
        text += answer.content
        finish = answer.finish_reason or finish
        if answer.output_tokens is not None:
            tokens = (answer.input_tokens, answer.output_tokens)
    return {"chunks": chunks, "finish": finish, "tokens": tokens, "problem": problem, "text": text}


def seen(stream: Stream) -> dict[str, Any]:
    return {
        "chunks": stream.chunks,
        "finish": stream.finish_reason,
        "tokens": (stream.input_tokens, stream.output_tokens),
        "problem": stream.problem[0] if stream.problem else None,
        "text": str(stream.content),
    }


@given(st.lists(CHUNKS, max_size=20), st.booleans(), st.booleans())
def test_events_one_a_read_mean_what_their_json_means(documents: list[Any], compact: bool, raw: bool) -> None:
    style = (",", ":") if compact else (", ", ": ")
    lines = [json.dumps(document, separators=style, ensure_ascii=not raw) for document in documents]
    pieces = [f"data: {line}\n\n".encode("utf-8", "surrogatepass") for line in lines]
    assert seen(read(*pieces)) == reference(documents)


@given(st.lists(CHUNKS, max_size=8), st.lists(st.integers(1, 40), min_size=1), st.sampled_from(["\n", "\r\n"]))
def test_the_cut_of_the_reads_changes_nothing_but_the_stamps(
    documents: list[dict[str, Any]], cuts: list[int], end: str
) -> None:
    body = b"".join(event(document, end * 2) for document in documents) + b"data: [DONE]" + end.encode() * 2
    pieces: list[bytes] = []
    at = 0
    while at < len(body):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(body[at : at + size])
        at += size
    assert seen(read(*pieces)) == reference(documents)


class Watched(Stream):
    """Notes the reads that are decoded."""

    decoded: ClassVar[list[bytes]] = []

    def _event_alone(self, event: bytes, now_ns: int) -> None:
        self.decoded.append(event)
        super()._event_alone(event, now_ns)


def test_the_fast_path_is_taken_for_plain_tokens_and_for_nothing_else() -> None:
    stream = Watched(array("q"))
    for text in ("and", "so", "it", "goes", "on"):
        stream.feed(event(chunk(text)), 1)
    Watched.decoded.clear()
    awkward = [event(chunk("")), event(chunk('say "no"')), event(chunk("two", "stop"))]
    for data in (event(chunk("two")), *awkward, event(chunk("three"))):
        stream.feed(data, 2)
    assert stream.chunks == 5 + 4
    assert Watched.decoded == awkward


def test_texts_of_servers_become_one_printable_line() -> None:
    assert readable(b"a\x1b[31mred\x00\n\n  b") == "a [31mred b"
    assert len(readable(b"x" * 10_000)) == 500
