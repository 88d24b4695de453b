"""How good a model's answers are: checks, marks of people, marks of a second model, and how far these two agree.

The prompt is the unit, not the mark: three answers to one prompt, or three raters of one answer, tell of one prompt.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from loadbench.analysis import quality_rows as rows
from loadbench.analysis.agreement import Agreement, agreement
from loadbench.analysis.interval import wilson
from loadbench.analysis.patterns import Patterns
from loadbench.analysis.quality_rows import HIGHEST, LOWEST, Answer, Judgement, Key, Mark
from loadbench.analysis.stats import TELLS, Range
from loadbench.scenario.quality_prompts import Checks

LEAST_PROMPTS = 10
"""Prompts from which on a mean is firm. Its interval by Student's t, simulated on seven ways of giving marks, holds the
truth 84 to 100 times of 100 at 10 prompts and at 20: where one answer in twenty is bad, it may be in none of them."""

MOST_REASONS = 100  # of a judge and a model; judgements.jsonl has all
LEAST_MARKED = 2  # prompts that a mean with its interval takes


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean of marks from 1 to 5, over ``prompts`` of each prompt's own mean; ``marks`` were given for it.

    With its 95 % interval, or neither: ``not_told`` says why. ``firm`` from 10 prompts on.
    """

    prompts: int
    marks: int
    mean: float | None
    interval_95: Range | None
    firm: bool
    not_told: str | None


@dataclass(frozen=True, slots=True)
class Checked:
    """Answers that passed all of their checks, ``of`` those that have some and came.

    ``undecided``: a regular expression took too long; they count as not passed. ``interval_95`` is Wilson's, over
    ``prompts`` prompts.
    """

    passed: int
    of: int
    undecided: int
    share: float
    prompts: int
    interval_95: Range


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a judge gave an answer to this prompt its mark, in its own words."""

    prompt: str
    repeat: int
    mark: int
    reason: str


@dataclass(frozen=True, slots=True)
class Judged:
    """What one judge made of a model's answers. ``itself``: it is the model that it judges.

    ``malformed``, ``refused`` and ``failed`` are judgements without a mark, which count in no mean. ``reasons`` has
    what it said of its marks, the lowest first, of at most ``MOST_REASONS``.
    """

    judge: str
    itself: bool
    marks: Mean
    malformed: int
    refused: int
    failed: int
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class Graded:
    """The mark that a decision stands on: of one source and over the same prompts for every model that has any.

    That source is the one that marked most models, people before judges, and of judges the one with the most marks.
    ``n`` is prompts, and ``basis`` says whose marks and to which; a model that has none of that source stands on its
    own marks, with another basis. ``itself``: the judge is the model. ``doubt`` says why it may not be worth much.
    """

    value: float
    interval_95: Range
    n: int
    firm: bool
    source: Literal["human", "judge"]
    by: str
    basis: str = ""
    itself: bool = False
    doubt: str | None = None


@dataclass(frozen=True, slots=True)
class Quality:
    """A model's answers to the prompts that are marked. ``cut``: ended by max_tokens; ``failed``: no answer came.

    ``outdated`` marks and judgements are of an answer that has since been given again, and count nowhere.
    """

    model: str
    prompts: int
    answers: int
    failed: int
    cut: int
    checks: Checked | None
    raters: tuple[str, ...]
    human: Mean
    judges: tuple[Judged, ...]
    agreements: tuple[Agreement, ...]
    outdated: int
    mark: Graded | None


def of_run(folder: Path, models: Iterable[str]) -> tuple[tuple[Quality, ...], tuple[Agreement, ...]]:
    """What is told of each model, in the order of ``models``, and of each judge over all of them."""
    answers = rows.answers(folder)
    if not answers:
        return (), ()
    marks, judgements = rows.marks(folder), rows.judgements(folder)
    order = list(dict.fromkeys([*models, *(answer.model for answer in answers)]))
    with Patterns() as patterns:
        told = [
            _of_model(mine, marks, judgements, patterns)
            for model in order
            if (mine := [answer for answer in answers if answer.model == model])
        ]
    known = _known(answers)
    by_people, by_judges = _current(marks, known)[0], _current(judgements, known)[0]
    overall = tuple(_agreements(None, by_people, by_judges))
    checked = {found.judge for found in overall}
    graded = _graded(by_people, by_judges, checked, {quality.model: quality.prompts for quality in told})
    return tuple(replace(quality, mark=graded.get(quality.model)) for quality in told), overall


Said = TypeVar("Said", Mark, Judgement)


def _known(answers: Iterable[Answer]) -> dict[Key, str | None]:
    return {answer.key: answer.hash for answer in answers}


def _current(said: Sequence[Said], known: Mapping[Key, str | None]) -> tuple[list[Said], int]:
    """What was said of these answers as they are, and how much was said of what they were before."""
    mine = [one for one in said if one.key in known]
    current = [one for one in mine if one.hash == known[one.key]]
    return current, len(mine) - len(current)


def _of_model(
    answers: Sequence[Answer], marks: Sequence[Mark], judgements: Sequence[Judgement], patterns: Patterns
) -> Quality:
    model, known = answers[0].model, _known(answers)
    current, old = _current(marks, known)
    said, old_said = _current(judgements, known)
    human = _mean((mark.key[1], mark.mark) for mark in current)
    judges = tuple(_judged(model, judge, said) for judge in dict.fromkeys(one.judge for one in said))
    return Quality(
        model=model,
        prompts=len({answer.id for answer in answers}),
        answers=len(answers),
        failed=sum(answer.outcome != "ok" for answer in answers),
        cut=sum(answer.finish_reason == "length" for answer in answers),
        checks=_checked(answers, patterns),
        raters=tuple(dict.fromkeys(mark.rater for mark in current)),
        human=human,
        judges=judges,
        agreements=tuple(_agreements(model, current, said)),
        outdated=old + old_said,
        mark=None,
    )


def _judged(model: str, judge: str, judgements: Sequence[Judgement]) -> Judged:
    mine = [one for one in judgements if one.judge == judge]
    outcomes = Counter(one.outcome for one in mine)
    return Judged(
        judge=judge,
        itself=judge == model,
        marks=_mean((one.key[1], one.mark) for one in mine if one.mark is not None),
        malformed=outcomes["malformed"],
        refused=outcomes["refused"],
        failed=outcomes["failed"],
        reasons=_reasons(mine),
    )


def _reasons(judgements: Iterable[Judgement]) -> tuple[Reason, ...]:
    told = [
        Reason(one.key[1], one.key[2], one.mark, one.reason)
        for one in judgements
        if one.mark is not None and one.reason
    ]
    return tuple(sorted(told, key=lambda one: one.mark)[:MOST_REASONS])


def _mean(marks: Iterable[tuple[str, int]]) -> Mean:
    """Of pairs (prompt, mark)."""
    from scipy.special import stdtrit  # not at the start of every run

    by_prompt: dict[str, list[int]] = defaultdict(list)
    for prompt, mark in marks:
        by_prompt[prompt].append(mark)
    n, count = len(by_prompt), sum(map(len, by_prompt.values()))
    if n < LEAST_MARKED:
        why = "no answer is marked" if not n else "one prompt is marked; a mean with its interval takes two"
        return Mean(n, count, None, None, False, why)
    values = [sum(each) / len(each) for each in by_prompt.values()]
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    if deviation > 0:
        half = float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)
        low, high = mean - half, mean + half
    else:  # all alike: of n that show nothing else up to 3 in n may yet be anything (Hanley 1983)
        unseen = min(1.0, TELLS / n)
        low, high = mean - unseen * (mean - LOWEST), mean + unseen * (HIGHEST - mean)
    return Mean(n, count, mean, (max(low, LOWEST), min(high, HIGHEST)), n >= LEAST_PROMPTS, None)


PEOPLE = "people"
Given = dict[str, list[tuple[str, int]]]  # by model, prompts with their marks


def _graded(
    marks: Sequence[Mark], judgements: Sequence[Judgement], checked: Collection[str], asked: Mapping[str, int]
) -> dict[str, Graded]:
    """Each model's mark, on a basis that they share as far as there is one.

    ``checked`` are judges that can be held against people; ``asked`` is how many prompts each model was asked.
    """
    sources: dict[str | None, Given] = {None: _given((mark.key, mark.mark) for mark in marks)}  # None: people
    for judge in dict.fromkeys(one.judge for one in judgements):
        sources[judge] = _given((one.key, one.mark) for one in judgements if one.judge == judge and one.mark)
    order = sorted(sources, key=lambda judge: (judge is not None, -sum(map(len, sources[judge].values()))))
    models = dict.fromkeys(model for given in sources.values() for model in given)
    shared = max(order, key=lambda judge: len(sources[judge]))
    sets = [{prompt for prompt, _ in each} for each in sources[shared].values()]
    prompts = set.intersection(*sets) if sets else set[str]()
    found = {}
    for model in models:
        own = [judge for judge in (shared, *order) if model in sources[judge]]
        common = own[0] == shared and len(prompts) >= LEAST_MARKED
        mark = _grade(model, own[0], sources[own[0]][model], prompts if common else None, checked)
        left = asked[model] - len({prompt for prompt, _ in sources[own[0]][model]})
        lacks = [f"{left} of {asked[model]} prompts have no mark"] if left else []
        found[model] = replace(mark, doubt="; ".join([*filter(None, [mark.doubt]), *lacks]) or None)
    return found


def _given(marks: Iterable[tuple[Key, int]]) -> Given:
    """Marks by model, of the models of which so many prompts have one that there is a mean."""
    found: Given = defaultdict(list)
    for (model, prompt, _), mark in marks:
        found[model].append((prompt, mark))
    return {model: each for model, each in found.items() if len({prompt for prompt, _ in each}) >= LEAST_MARKED}


def _grade(
    model: str, judge: str | None, marks: list[tuple[str, int]], shared: set[str] | None, checked: Collection[str]
) -> Graded:
    """By people, or by this judge; of the prompts that all models have marks of, None: there are too few."""
    own = {prompt for prompt, _ in marks}
    told = _mean((prompt, mark) for prompt, mark in marks if shared is None or prompt in shared)
    assert told.mean is not None and told.interval_95 is not None
    doubts, by = [], judge or PEOPLE
    basis = f"{told.prompts} prompts marked by {by}"
    if shared is None:
        basis = f"marks by {by} of {', '.join(sorted(own))}"
    elif shared != own:
        doubts.append(f"of {len(own)} prompts with a mark only the {len(shared)} that have one for every model")
    if judge == model:
        doubts.append("it judged its own answers")
    elif judge is not None and judge not in checked:
        doubts.append(f"nobody has checked the marks of {judge} against people's")
    firm = told.firm and (judge is None or (judge != model and judge in checked))
    source: Literal["human", "judge"] = "human" if judge is None else "judge"
    doubt = "; ".join(doubts) or None
    return Graded(told.mean, told.interval_95, told.prompts, firm, source, by, basis, judge == model, doubt)


def _agreements(model: str | None, marks: Sequence[Mark], judgements: Sequence[Judgement]) -> Iterable[Agreement]:
    """Judge by judge: each mark of a person beside that of the judge for the same answer."""
    people: dict[Key, list[int]] = defaultdict(list)
    for mark in marks:
        people[mark.key].append(mark.mark)
    for judge in dict.fromkeys(one.judge for one in judgements):
        by_prompt: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for one in judgements:
            if one.judge == judge and one.mark is not None:
                by_prompt[one.key[1]] += [(mark, one.mark) for mark in people[one.key]]
        found = agreement(judge, model, by_prompt)
        if found is not None:
            yield found


def _checked(answers: Sequence[Answer], patterns: Patterns) -> Checked | None:
    by_prompt: dict[str, list[bool | None]] = defaultdict(list)
    for answer in answers:
        if answer.outcome == "ok" and answer.checks.as_json():
            by_prompt[answer.id].append(passes(answer.text, answer.checks, patterns))
    if not by_prompt:
        return None
    results = [result for each in by_prompt.values() for result in each]
    n = len(by_prompt)
    share = sum(sum(map(bool, each)) / len(each) for each in by_prompt.values()) / n
    return Checked(results.count(True), len(results), results.count(None), share, n, wilson(share, n))


def passes(text: str, checks: Checks, patterns: Patterns) -> bool | None:
    """Whether an answer passes all of its checks; None where a regular expression was given up."""

    def told(words: str) -> str:
        line = " ".join(words.split())
        return line if checks.case_sensitive else line.casefold()

    said = told(text)
    if checks.equals and said not in map(told, checks.equals):
        return False
    if not all(told(part) in said for part in checks.contains):
        return False
    return patterns.all_found(checks.matches, text.strip(), ignore_case=not checks.case_sensitive)
