"""Quality of answers: the prompts' file, checks, means over prompts, agreement of judges with people, and the words."""

from __future__ import annotations

import io
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from loadbench.analysis import quality, quality_rows, rundir
from loadbench.analysis.agreement import agreement
from loadbench.analysis.patterns import MOST_GIVEN_UP, Patterns
from loadbench.analysis.summarise import summarise
from loadbench.errors import UsageError
from loadbench.records import Closed
from loadbench.report.console import print_report
from loadbench.report.markdown import markdown_text
from loadbench.report.quality import block, tables
from loadbench.scenario.quality_prompts import Checks, read_quality_prompts
from tests.quality import FIRST, JUDGE, SECOND, answer, judgement, mark, put
from tests.rundirs import Planned, closed_ladder, model_row, write_run

# --- the prompts ------------------------------------------------------------------------------------------------------


def prompts(folder: Path, content: Any) -> Path:
    path = folder / "prompts.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_file_of_prompts_says_what_is_asked_and_by_what_an_answer_is_judged(tmp_path: Path) -> None:
    path = prompts(
        tmp_path,
        {
            "prompts": [
                {
                    "id": "capital",
                    "prompt": "Capital of France?",
                    "category": "facts",
                    "expected_aspects": ["Paris"],
                    "rubric": "5 only if short",
                    "checks": {"contains": "paris", "matches": [r"\bParis\b"], "case_sensitive": True},
                    "max_tokens": 20,
                },
                {"id": 7, "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
                {"text": "2 + 2?", "expected": ["4", "four"], "pattern": r"4|four", "author": "not ours"},
                "a bare text",
            ]
        },
    )
    first, second, third, last = read_quality_prompts(path)
    assert (first.place, first.id, first.category, first.aspects) == (0, "capital", "facts", ("Paris",))
    assert (first.rubric, first.max_tokens) == ("5 only if short", 20)
    assert first.checks == Checks(contains=("paris",), matches=(r"\bParis\b",), case_sensitive=True)
    assert (second.id, len(second.messages)) == ("7", 2)
    assert (third.id, third.checks) == ("3", Checks(equals=("4", "four"), matches=("4|four",)))
    assert (last.id, last.checks.as_json(), last.messages[0]["content"]) == ("4", {}, "a bare text")


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"prompt": "x", "pattern": "(a"}, '[1]: expected regular expressions that Python knows, got "(a"'),
        ({"prompt": "x", "checks": {"equal": "y"}}, "[1].checks: expected equals, contains, matches or case_sensitive"),
        ({"prompt": "x", "checks": []}, "[1].checks: expected equals, contains, matches, got []"),
        ({"prompt": "x", "checks": {"matches": 4}}, "[1].checks.matches: expected a text or a list of texts, got 4"),
        ({"prompt": "x", "checks": {"case_sensitive": "no"}}, "[1].checks.case_sensitive: expected true or false"),
        ({"prompt": "x", "expected": "y", "checks": {"equals": "y"}}, "[1].expected: expected it or checks.equals"),
        ({"prompt": "x", "aspects": [1]}, "[1].aspects: expected a text or a list of texts, got [1]"),
        ({"prompt": "x", "rubric": " "}, '[1].rubric: expected a text, got " "'),
        ({"prompt": "x", "id": "one"}, "[1].id: expected another one than [0] has, got 'one' again"),
        ({"id": "two"}, "[1]: expected a text, a list of messages"),
    ],
)
def test_a_mistake_in_the_prompts_is_told_with_its_file_and_place_in_one_line(
    tmp_path: Path, item: Any, said: str
) -> None:
    path = prompts(tmp_path, [{"id": "one", "prompt": "ok"}, item])
    with pytest.raises(UsageError) as told:
        read_quality_prompts(path)
    assert str(told.value).startswith(f"{path}: {said}")
    assert "\n" not in str(told.value)


# --- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "checks", "passed"),
    [
        (" PARIS\n", Checks(equals=("Paris",)), True),
        ("Paris.", Checks(equals=("Paris",)), False),
        ("four", Checks(equals=("4", "Four")), True),
        ("four", Checks(equals=("Four",), case_sensitive=True), False),
        ("It is\n  Paris, in France", Checks(contains=("is paris", "FRANCE")), True),
        ("It is Paris", Checks(contains=("paris", "france")), False),
        ("It is Paris", Checks(matches=(r"^it", r"s$")), True),
        ("It is Paris", Checks(matches=(r"^it",), case_sensitive=True), False),
        ("It is Paris", Checks(contains=("Paris",), matches=("London",)), False),
    ],
)
def test_an_answer_passes_when_it_is_one_of_equals_and_has_all_of_contains_and_matches(
    text: str, checks: Checks, passed: bool
) -> None:
    with Patterns() as patterns:
        assert quality.passes(text, checks, patterns) is passed


def test_a_regular_expression_that_would_take_for_ever_is_given_up_and_the_next_one_answered() -> None:
    began = perf_counter()
    with Patterns(limit_s=0.5) as patterns:
        for _ in range(MOST_GIVEN_UP + 20):
            assert patterns.found("(a+)+$", "a" * 60 + "!", ignore_case=True) is None
        assert patterns.found("b+", "abba", ignore_case=True) is True
        assert patterns.found("c", "abba", ignore_case=True) is False
        assert patterns.all_found(("(a+)+$", "c"), "a" * 60 + "!", ignore_case=True) is False
    assert perf_counter() - began < 10  # without giving up, these would take years


def test_a_pattern_may_take_its_whole_limit_however_long_the_process_takes_to_start() -> None:
    with Patterns(limit_s=0.02) as patterns:  # Python takes longer than that to start
        assert patterns.found("b+", "abba", ignore_case=True) is True


def test_a_pattern_that_ends_the_process_leaves_the_next_one_a_new_one() -> None:
    with Patterns() as patterns:
        assert patterns.found("(", "abba", ignore_case=True) is None  # no pattern at all: re.error ends it
        assert patterns.found("b+", "abba", ignore_case=True) is True


def test_answers_that_failed_are_no_failed_checks_and_a_share_of_few_prompts_has_a_wide_interval(
    tmp_path: Path,
) -> None:
    checks: dict[str, Any] = {"checks": {"contains": ["yes"]}}
    rows = [answer(FIRST, place, "yes", **checks) for place in range(3)]
    rows.append(answer(FIRST, 3, "", outcome="total_deadline", answer_hash=None, **checks))
    (told,), _ = quality.of_run(put(tmp_path, "answers.jsonl", rows), [FIRST])
    assert told.checks is not None
    assert (told.answers, told.failed, told.checks.passed, told.checks.of) == (4, 1, 3, 3)
    assert told.checks.interval_95 == pytest.approx((0.4385, 1.0), abs=1e-4)  # Wilson's, of 3 of 3


# --- means ------------------------------------------------------------------------------------------------------------


def of_marks(folder: Path, marks: list[list[int]]) -> quality.Quality:
    """One model whose prompts got these marks, one by each rater."""
    rows = [answer(FIRST, place, f"text {place}") for place in range(len(marks))]
    given = [mark(row, n, f"rater {i}") for row, each in zip(rows, marks, strict=True) for i, n in enumerate(each)]
    put(folder, "answers.jsonl", rows)
    (told,), _ = quality.of_run(put(folder, "marks.jsonl", given), [FIRST])
    return told


def test_a_mean_counts_prompts_and_not_marks_and_its_interval_is_students(tmp_path: Path) -> None:
    few, many = of_marks(tmp_path / "1", [[2], [3], [4]]), of_marks(tmp_path / "9", [[2] * 3, [3] * 3, [4] * 3])
    for told in (few, many):
        assert told.human.mean == 3.0
        # 3 ± 4.303 · 1/√3, cut to what marks can be
        assert told.human.interval_95 == pytest.approx((1.0, 5.0))
        assert (told.human.prompts, told.human.firm) == (3, False)
    assert (few.human.marks, many.human.marks) == (3, 9)
    enough = of_marks(tmp_path / "12", [[3], [4]] * 6)
    # 3.5 ± 2.201 · 0.5222/√12
    assert enough.human.interval_95 == pytest.approx((3.168, 3.832), abs=1e-3)
    assert enough.mark == quality.Graded(
        3.5, enough.human.interval_95 or (0, 0), 12, True, "human", "people", "12 prompts marked by people"
    )


def test_marks_that_are_all_the_same_do_not_make_a_mean_certain(tmp_path: Path) -> None:
    assert of_marks(tmp_path / "3", [[4]] * 3).human.interval_95 == (1.0, 5.0)
    told = of_marks(tmp_path / "30", [[4]] * 30).human
    assert told.interval_95 == pytest.approx((3.7, 4.1))  # of 30, up to 3 may yet be anything


def test_one_prompt_gives_no_mean(tmp_path: Path) -> None:
    told = of_marks(tmp_path, [[4, 5, 4]])
    assert (told.human.mean, told.human.marks, told.mark) == (None, 3, None)
    assert told.human.not_told == "one prompt is marked; a mean with its interval takes two"


def test_the_last_mark_of_a_rater_counts_and_one_of_an_answer_given_again_does_not(tmp_path: Path) -> None:
    rows = [answer(FIRST, place, f"text {place}") for place in range(2)]
    old = mark(rows[0], 5)
    put(tmp_path, "marks.jsonl", [mark(rows[0], 1), old, mark(rows[1], 3), mark(rows[1], 5) | {"answer_hash": "00"}])
    (told,), _ = quality.of_run(put(tmp_path, "answers.jsonl", rows), [FIRST])
    assert (told.human.marks, told.outdated) == (1, 1)
    put(tmp_path, "marks.jsonl", [mark(rows[0], 1), old, mark(rows[1], 3)])
    (told,), _ = quality.of_run(tmp_path, [FIRST])
    assert told.human.mean == 4.0


def test_half_a_line_at_the_end_and_lines_that_make_no_sense_are_left_out(tmp_path: Path) -> None:
    rows = [answer(FIRST, place, f"text {place}") for place in range(2)]
    for name, lines in (("answers.jsonl", rows), ("marks.jsonl", [mark(row, 3) for row in rows])):
        put(tmp_path, name, lines)
        with (tmp_path / name).open("ab") as file:
            file.write(
                b'[1]\n{"model": 1}\n' + json.dumps(lines[0] | {"mark": 6, "checks": 3}).encode() + b'\n{"model"'
            )
    (told,), _ = quality.of_run(tmp_path, [FIRST])
    assert (told.answers, told.human.mean) == (2, 3.0)


# --- judges and people ------------------------------------------------------------------------------------------------


def test_agreement_is_what_it_is_by_hand() -> None:
    pairs = [(1, 1), (2, 3), (3, 3), (4, 4), (5, 4)]
    told = agreement(JUDGE, None, {f"p{i}": [pair] for i, pair in enumerate(pairs)})
    assert told is not None
    # Σ(h−j)² = 2 was seen. By chance Σᵢ Σⱼ (hᵢ−jⱼ)² / 5 = (5·55 + 5·51 − 2·15·15) / 5 = 16. 1 − 2/16.
    assert told.kappa == pytest.approx(0.875)
    assert (told.pairs, told.equal_share, told.within_1_share, told.above) == (5, 0.6, 1.0, 0.0)
    assert told.kappa_interval_95 is None
    assert told.not_told == "5 prompts with both marks; an interval takes 10"


def test_agreement_of_enough_prompts_has_an_interval_that_more_raters_of_the_same_prompts_do_not_narrow() -> None:
    pairs = [(1, 1), (2, 3), (3, 3), (4, 4), (5, 4), (2, 2), (5, 5), (4, 2), (1, 2), (3, 4), (5, 5), (2, 1)]
    one = agreement(JUDGE, None, {f"p{i}": [pair] for i, pair in enumerate(pairs)})
    ten = agreement(JUDGE, None, {f"p{i}": [pair] * 10 for i, pair in enumerate(pairs)})
    assert one is not None and ten is not None and one.kappa is not None and one.kappa_interval_95 is not None
    low, high = one.kappa_interval_95
    assert 0 < low < one.kappa < high < 1
    assert ten.kappa_interval_95 == pytest.approx(one.kappa_interval_95)


def test_a_judge_that_always_gives_the_mark_that_people_do_leaves_nothing_to_agree_on() -> None:
    told = agreement(JUDGE, None, {f"p{i}": [(4, 4)] for i in range(12)})
    assert told is not None
    assert (told.kappa, told.kappa_interval_95, told.equal_share) == (None, None, 1.0)
    assert told.not_told == "all marks are the same, which leaves nothing to agree on"
    assert agreement(JUDGE, None, {}) is None


def both(folder: Path) -> Path:
    """Two models, six prompts; people and a judge, who gives no mark three times."""
    rows = [answer(model, place, f"{model} {place}") for model in (FIRST, SECOND) for place in range(6)]
    put(folder, "answers.jsonl", rows)
    put(folder, "marks.jsonl", [mark(row, 1 + i % 5) for i, row in enumerate(rows[:6])])
    said = [judgement(row, min(5, 2 + i % 5)) for i, row in enumerate(rows)]
    said[9:] = [
        judgement(row, None, how) for row, how in zip(rows[9:], ("malformed", "refused", "failed"), strict=True)
    ]
    return put(folder, "judgements.jsonl", said)


def test_judgements_without_a_mark_are_counted_by_name_and_in_no_mean(tmp_path: Path) -> None:
    (first, second), (overall,) = quality.of_run(both(tmp_path), [FIRST, SECOND])
    (judged,) = second.judges
    assert (judged.marks.marks, judged.malformed, judged.refused, judged.failed) == (3, 1, 1, 1)
    assert first.mark is not None and second.mark is not None
    assert (first.mark.source, second.mark.source, second.mark.by) == ("judge", "judge", JUDGE)
    assert (second.agreements, [found.model for found in first.agreements]) == ((), [FIRST])
    assert (overall.pairs, overall.model, overall.within_1_share) == (6, None, 1.0)


def graded(folder: Path, people: dict[str, list[int]], judge: dict[str, list[int]], by: str = JUDGE) -> dict[str, Any]:
    """The mark of each model, of which the first prompts have these marks of a person and of a judge."""
    models = {*people, *judge}
    said = {model: [answer(model, place, f"{model} {place}") for place in range(12)] for model in models}
    put(folder, "answers.jsonl", [row for each in said.values() for row in each])
    put(folder, "marks.jsonl", [mark(r, n) for m, each in people.items() for r, n in zip(said[m], each, strict=False)])
    judged = [judgement(r, n, judge=by) for m, each in judge.items() for r, n in zip(said[m], each, strict=False)]
    told, _ = quality.of_run(put(folder, "judgements.jsonl", judged), sorted(models))
    return {one.model: one.mark for one in told}


def test_marks_of_people_and_of_a_judge_are_never_held_against_each_other(tmp_path: Path) -> None:
    marks = graded(tmp_path / "both", {FIRST: [5, 4] * 6}, {FIRST: [2, 3] * 6, SECOND: [4, 3] * 6})
    assert {(mark.source, mark.value) for mark in marks.values()} == {("judge", 2.5), ("judge", 3.5)}
    assert marks[FIRST].basis == marks[SECOND].basis
    marks = graded(tmp_path / "all", {FIRST: [5, 4] * 6, SECOND: [1, 2] * 6}, {FIRST: [2, 3] * 6, SECOND: [4, 3] * 6})
    assert {(mark.source, mark.value) for mark in marks.values()} == {("human", 4.5), ("human", 1.5)}
    marks = graded(tmp_path / "apart", {FIRST: [5, 4] * 6}, {SECOND: [4, 3] * 6})
    assert (marks[FIRST].source, marks[SECOND].source) == ("human", "judge")
    assert marks[FIRST].basis != marks[SECOND].basis  # by which the ranking refuses one of them


def test_models_are_held_against_each_other_over_the_prompts_that_all_have_marks_of(tmp_path: Path) -> None:
    marks = graded(tmp_path, {FIRST: [2] * 6 + [5] * 6, SECOND: [3] * 6}, {})
    assert (marks[FIRST].value, marks[FIRST].n) == (2.0, 6)
    assert (marks[SECOND].value, marks[SECOND].n) == (3.0, 6)
    assert marks[FIRST].basis == marks[SECOND].basis == "6 prompts marked by people"
    assert marks[FIRST].doubt == "of 12 prompts with a mark only the 6 that have one for every model"
    assert marks[SECOND].doubt == "6 of 12 prompts have no mark"


def test_a_judge_of_its_own_answers_and_one_that_nobody_has_checked_are_in_doubt(tmp_path: Path) -> None:
    alone = graded(tmp_path / "alone", {}, {FIRST: [2, 3] * 6, SECOND: [4, 3] * 6}, by=FIRST)
    assert (alone[FIRST].itself, alone[FIRST].doubt, alone[FIRST].firm) == (True, "it judged its own answers", False)
    assert alone[SECOND].doubt == f"nobody has checked the marks of {FIRST} against people's"
    assert (alone[SECOND].itself, alone[SECOND].firm) == (False, False)
    checked = graded(tmp_path / "checked", {FIRST: [2, 3]}, {FIRST: [2, 3] * 6, SECOND: [4, 3] * 6})
    assert {(mark.source, mark.doubt, mark.firm) for mark in checked.values()} == {("judge", None, True)}


def test_a_narrow_table_keeps_the_number_of_prompts_beside_the_mean(tmp_path: Path) -> None:
    (table,) = tables(summarise(rundir.read(both(closed_ladder(tmp_path / "run")))))
    cells = {column.heading: column.cells for column in table.columns}
    assert [cell.partition(") ")[2] for cell in cells["mark by", "judge (95 %)"]] == ["n 6", "n 3 of 6"]
    assert f"{SECOND}: no mark by {JUDGE} for 3 of 6 prompts" in (table.note or "")


def test_a_judge_of_its_own_answers_is_in_the_verdict_and_beside_the_figure(tmp_path: Path) -> None:
    models = [model_row(FIRST), model_row(SECOND)]
    run = write_run(tmp_path / "run", [Planned(Closed(1), model=row["id"]) for row in models], models=models)
    graded(run, {}, {FIRST: [2, 3] * 6, SECOND: [4, 3] * 6}, by=FIRST)
    summary = summarise(rundir.read(run), {"quality": 1.0})
    assert f"{FIRST} judged its own answers" in summary.verdict.text
    assert summary.decision is not None and summary.decision.ranking is not None
    assert f"The quality of {FIRST} is in doubt: it judged its own answers." in summary.decision.ranking.verdict
    assert f"The quality of {SECOND} is in doubt: nobody has checked" in summary.decision.ranking.verdict
    assert "~2.50 itself" in markdown_text(summary, {})


# --- the words --------------------------------------------------------------------------------------------------------


def test_a_run_with_answers_tells_quality_on_the_console_in_markdown_and_in_json(tmp_path: Path) -> None:
    run = rundir.read(both(closed_ladder(tmp_path / "run")))
    summary = summarise(run)
    out = io.StringIO()
    print_report(summary, run.path, out)
    shown, written = out.getvalue(), markdown_text(summary, {})
    assert "marks from 1 to 5" in shown and "## Quality of the answers" in written
    for text in (shown, written):
        assert "malformed" in text and "refused" in text and "both marked" in text
        assert "fewer than 10 prompts" in text
    assert summary.quality[0].human.interval_95 is not None


def test_the_markdown_has_the_reasons_of_the_judge_with_the_lowest_marks_first(tmp_path: Path) -> None:
    evil = "<b>short\x1b[31m|"
    rows = [answer(FIRST, place, "text") for place in range(3)]
    folder = put(closed_ladder(tmp_path / "run"), "answers.jsonl", rows)
    given = [
        judgement(row, number) | {"reason": f"{evil} {number}"} for row, number in zip(rows, (4, 1, 3), strict=True)
    ]
    put(folder, "judgements.jsonl", given)
    written = markdown_text(summarise(rundir.read(folder)), {})
    told = [line for line in written.splitlines() if "short" in line]
    assert [line.split(" | ")[2] for line in told] == ["1", "3", "4"]
    assert all("&lt;b&gt;short" in line and "\x1b" not in line for line in told)


def test_what_a_model_says_cannot_colour_a_terminal_or_leave_its_cell(tmp_path: Path) -> None:
    evil = "\x1b[31mred|<b>x</b>\u202e:1"
    rows = [answer(evil, place, "text") for place in range(2)]
    folder = put(closed_ladder(tmp_path / "run"), "answers.jsonl", rows)
    put(folder, "judgements.jsonl", [judgement(row, None, "malformed", judge=evil) for row in rows])
    summary = summarise(rundir.read(folder))
    out = io.StringIO()
    print_report(summary, folder, out)
    for text in (out.getvalue(), markdown_text(summary, {})):
        assert "\x1b" not in text and "\u202e" not in text
    rows_of_it = [line for line in markdown_text(summary, {}).splitlines() if line.startswith("|") and "x1b" in line]
    assert rows_of_it and all("&lt;b&gt;" in line and "red\\|" in line and "<b>" not in line for line in rows_of_it)
    assert block("a\x1b[2J\tb\n\u202edef") == "a\\x1b[2J   b\n\\u202edef"


def test_a_run_without_answers_says_nothing_of_quality(tmp_path: Path) -> None:
    summary = summarise(rundir.read(closed_ladder(tmp_path / "run")))
    assert (summary.quality, summary.agreements) == ((), ())
    assert "Quality" not in markdown_text(summary, {})


def test_identical_rows_are_read_once(tmp_path: Path) -> None:
    rows = [answer(FIRST, 1), answer(FIRST, 0), answer(FIRST, 1, "given again")]
    found = quality_rows.answers(put(tmp_path, "answers.jsonl", rows))
    assert [(one.id, one.text) for one in found] == [("p1", "An answer."), ("p2", "given again")]
