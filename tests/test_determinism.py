"""Which prompts were answered the same every time, from the samples of a run to what its reports say."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import orjson
import pytest

from loadbench.analysis.determinism import MOST_VARIANTS, Answers
from loadbench.analysis.rundir import read
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Summary, schema
from loadbench.errors import UsageError
from loadbench.records import Closed
from loadbench.report.console import print_report
from loadbench.report.markdown import markdown_text
from loadbench.report.write import write_report
from tests.command import loadbench
from tests.rundirs import Planned, write_run

USERS = (1, 2, 4)
PLACES = 3
Row = dict[str, Any]


def said(number: int) -> str:
    return f"{number:016x}"


def usual(row: Row) -> Row:
    """Three prompts in turn, each with an answer of its own."""
    place = row["seq"] % PLACES
    return {"place": place, "answer_hash": said(100 + place)}


def run(
    path: Path, change: Callable[[Row], Row] = usual, *, models: tuple[str, ...] = ("synthetic-edge:1",), **request: Any
) -> Path:
    """A run at temperature 0, or as ``request`` has it, of a level for each number of users."""
    levels = [Planned(Closed(users), model=model, duration_s=4.0) for model in models for users in USERS]
    scenario = {"name": "same", "warmup": {"requests": 2}, "request": {"temperature": 0.0} | request}
    write_run(path, levels, scenario=scenario)
    lines = [orjson.loads(line) for line in (path / "samples.jsonl").read_bytes().splitlines()]
    written = [row | (change(row) if row["phase"] == "load" else {}) for row in lines]
    (path / "samples.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in written))
    return path


def told(path: Path) -> Summary:
    return summarise(read(path))


def console(summary: Summary, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "140")
    out = io.StringIO()
    print_report(summary, Path("results/x"), out)
    return out.getvalue()


def counts(answers: tuple[Answers, ...]) -> list[tuple[int, int, bool | None]]:
    return [(prompt.place, prompt.different, prompt.identical) for prompt in answers]


def odd_at_four_users(row: Row) -> Row:
    """The second prompt is answered otherwise now and then, where four users ask."""
    tipped = row["level"] == 2 and row["seq"] % (2 * PLACES) == 1
    return usual(row) | ({"answer_hash": said(7)} if tipped else {})


def test_prompts_that_were_answered_the_same_every_time_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = told(run(tmp_path))
    assert counts(summary.answers) == [(0, 1, True), (1, 1, True), (2, 1, True)]
    first = summary.answers[0]
    assert (first.model, first.kind, first.levels, first.others_at) == ("synthetic-edge:1", "chat", (0, 1, 2), ())
    [variant] = first.variants
    assert (variant.answer_hash, variant.count, variant.levels) == (said(100), first.answered, (0, 1, 2))
    total = sum(prompt.answered for prompt in summary.answers)
    assert total == sum(level.requests.ok for level in summary.levels)
    sentence = f"3 of 3 prompts answered identically in all 3 levels ({total} answers)"
    text = console(summary, monkeypatch)
    assert sentence in text
    assert "not answered identically" not in text
    assert sentence in markdown_text(summary, {}).replace("\\", "")


def test_a_prompt_that_was_answered_otherwise_is_told_with_how_often_and_at_which_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = told(run(tmp_path, odd_at_four_users))
    assert counts(summary.answers) == [(0, 1, True), (1, 2, False), (2, 1, True)]
    prompt = summary.answers[1]
    assert (prompt.others_at, prompt.levels) == ((2,), (0, 1, 2))
    assert [(variant.answer_hash, variant.levels) for variant in prompt.variants] == [
        (said(101), (0, 1, 2)),
        (said(7), (2,)),
    ]
    assert sum(variant.count for variant in prompt.variants) == prompt.answered
    text = console(summary, monkeypatch)
    assert "2 of 3 prompts answered identically in all 3 levels" in text
    row = next(line for line in text.splitlines() if line.startswith("chat"))
    most = prompt.variants[0].count
    assert row.split() == ["chat", "1", str(prompt.answered), "2", str(most), "times", "4", "users"]
    assert "batch" in text  # why that may be
    assert "[4 users](#level-2)" in markdown_text(summary, {})


def test_a_failed_request_has_no_answer(tmp_path: Path) -> None:
    def cut(row: Row) -> Row:
        return usual(row) | ({"outcome": "truncated", "answer_hash": said(9)} if row["seq"] % 5 == 0 else {})

    assert all(prompt.identical for prompt in told(run(tmp_path, cut)).answers)


def test_made_up_prompts_are_not_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = told(run(tmp_path, lambda row: {"place": None, "answer_hash": said(row["seq"])}))
    assert summary.answers == ()
    assert "answered identically" not in console(summary, monkeypatch) + markdown_text(summary, {})


def test_a_prompt_that_was_asked_once_is_kept_for_comparison_and_not_spoken_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = iter(range(1, 10**6))

    def each_its_own(row: Row) -> Row:
        place = next(number)
        return {"place": place, "answer_hash": said(place)}

    summary = told(run(tmp_path, each_its_own))
    assert summary.answers and all(prompt.identical is None for prompt in summary.answers)
    assert "answered identically" not in console(summary, monkeypatch) + markdown_text(summary, {})


@pytest.mark.parametrize("request_", [{"temperature": 0.7}, {"temperature": None}])
def test_with_a_temperature_only_what_is_the_same_all_the_same_is_worth_telling(
    request_: dict[str, Any], tmp_path: Path
) -> None:
    assert told(run(tmp_path / "odd", odd_at_four_users, **request_)).answers == ()
    assert len(told(run(tmp_path / "same", **request_)).answers) == PLACES


def test_with_a_seed_answers_are_to_be_the_same(tmp_path: Path) -> None:
    summary = told(run(tmp_path, odd_at_four_users, temperature=0.7, extra={"seed": 1}))
    assert counts(summary.answers)[1] == (1, 2, False)


def test_each_model_is_told_of_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_model(row: Row) -> Row:
        return usual(row) | {"answer_hash": said(row["seq"] % PLACES + 10 * (1 + row["level"] // len(USERS)))}

    summary = told(run(tmp_path, by_model, models=("a:1", "b:1")))
    assert [(prompt.model, prompt.identical) for prompt in summary.answers] == [("a:1", True)] * 3 + [("b:1", True)] * 3
    text = console(summary, monkeypatch)
    assert "a:1: 3 of 3 prompts answered identically in all 3 levels" in text
    assert "b:1: 3 of 3 prompts answered identically in all 3 levels" in text


def test_repeats_asked_to_be_marked_are_told_of_apart_from_the_loads(tmp_path: Path) -> None:
    def marked(row: Row) -> Row:
        return usual(row) | ({"phase": "quality", "answer_hash": said(row["seq"] % 2 + 1)} if row["level"] == 0 else {})

    summary = told(run(tmp_path, marked))
    by_load = [prompt for prompt in summary.answers if prompt.levels]
    marked_ones = [prompt for prompt in summary.answers if not prompt.levels]
    assert [prompt.identical for prompt in by_load] == [True] * PLACES
    assert marked_ones and all(prompt.different == 2 for prompt in marked_ones)


def test_a_kind_that_is_named_like_what_is_marked_is_told_apart_from_it(tmp_path: Path) -> None:
    def marked(row: Row) -> Row:
        at_first = row["level"] == 0
        return usual(row) | {
            "kind": "quality",
            "phase": "quality" if at_first else "load",
            "answer_hash": said(1 + at_first),
        }

    summary = told(run(tmp_path, marked))
    assert {(prompt.of, prompt.variants[0].answer_hash) for prompt in summary.answers} == {
        ("quality", said(1)),
        ("quality prompts", said(2)),
    }


def test_of_a_prompt_with_very_many_answers_the_most_frequent_are_told(tmp_path: Path) -> None:
    summary = told(run(tmp_path, lambda row: {"place": 0, "answer_hash": said(1 + row["level"] * 1000 + row["seq"])}))
    [prompt] = summary.answers
    assert prompt.different == prompt.answered > MOST_VARIANTS == len(prompt.variants)


def test_the_hash_survives_whatever_its_first_bit(tmp_path: Path) -> None:
    summary = told(run(tmp_path, lambda row: {"place": 0, "answer_hash": "f" * 16}))
    assert [variant.answer_hash for prompt in summary.answers for variant in prompt.variants] == ["f" * 16]


def test_a_run_from_before_there_were_hashes_is_read_and_says_nothing_of_them(tmp_path: Path) -> None:
    run(tmp_path)
    lines = [orjson.loads(line) for line in (tmp_path / "samples.jsonl").read_bytes().splitlines()]
    older = [{name: value for name, value in row.items() if name not in ("place", "answer_hash")} for row in lines]
    (tmp_path / "samples.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in older))
    summary = told(tmp_path)
    assert summary.answers == ()
    assert all(level.requests.ok for level in summary.levels)


@pytest.mark.parametrize("wrong", ["no hash", "f" * 17, 7])
def test_what_is_no_hash_is_one_clear_line(wrong: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=str(tmp_path)):
        read(run(tmp_path, lambda row: {"place": 0, "answer_hash": wrong}))


def test_the_answers_are_in_summary_json_as_its_schema_has_them(tmp_path: Path) -> None:
    write_report(run(tmp_path, odd_at_four_users))
    document = json.loads((tmp_path / "summary.json").read_bytes())
    jsonschema.validate(document, schema())
    assert [prompt["identical"] for prompt in document["answers"]] == [True, False, True]


def test_two_runs_on_a_real_service_give_the_same_hashes(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(["one two three", "name four colours", "tell of the sea"]))
    (tmp_path / "s.yaml").write_text(
        "request: {max_tokens: 16}\nwarmup: {requests: 1}\nprompts: [{name: chat, file: p.json}]\n"
        'stages: [{concurrency: "1, 3", requests: 15}]\n'
    )
    hashes = []
    for out in ("first", "second"):
        done = loadbench("run", "s.yaml", "--model", "synthetic:tiny", "--out", out, cwd=tmp_path)
        assert "3 of 3 prompts answered identically in all 2 levels (30 answers)" in done.stdout, done.stderr
        answers = json.loads((tmp_path / out / "summary.json").read_bytes())["answers"]
        hashes.append([(prompt["place"], [one["answer_hash"] for one in prompt["variants"]]) for prompt in answers])
    assert hashes[0] == hashes[1]
    assert [place for place, _ in hashes[0]] == [0, 1, 2]
