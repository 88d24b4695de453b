"""Ranks candidates by weights: the weighted product model, with what chance may have moved carried through.

A candidate's score is the product over the criteria of (ratio to the best) ** (weight ÷ all weights): 1 for one that is
best in everything. Ratios need no common unit and no scale, and which model the others are held against cannot change
the order. Source: Bridgman, Dimensional Analysis (1922); Miller & Starr, Executive Decisions and Operations Research
(1969); compared with others by Triantaphyllou, Multi-Criteria Decision Making Methods (2000), chapter 2.

Marks of 1 to 5 are taken as they are: a 2 is half of a 4. Failures count by the share that did not fail, since there is
no ratio to none: where 1 of 100 failed, that costs a hundredth.

The reach of a score has every figure at the bad end of its interval, and at the good end: wider than chance alone would
make it, and true however the figures of a model hang together. Scores whose reaches overlap are a tie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from loadbench.analysis.decision import CRITERIA, Candidate, Criterion, Figure, Place, Ranking, Term
from loadbench.analysis.stats import Range
from loadbench.analysis.words import listed, number, time
from loadbench.errors import UsageError

LEAST = 1e-9  # a ratio never falls to 0: its logarithm has to exist
NEAR = 1e-12  # scores of equal figures are equal, whatever the last bit says


def weights_of(text: str) -> dict[str, float]:
    """``ttft=3,quality=2``, each above 0. UsageError in one line for anything else."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (word.strip() for word in part.partition("="))
        if not part.strip() and text.strip():
            raise UsageError("--weights: expected NAME=NUMBER on both sides of each comma, got nothing beside one")
        if not equals or not name:
            raise UsageError(
                f"--weights: expected NAME=NUMBER,… such as ttft=3,quality=2, got {part.strip() or 'nothing'}"
            )
        if name not in CRITERIA:
            raise UsageError(f"--weights: expected one of {', '.join(CRITERIA)}, got {name}")
        if name in weights:
            raise UsageError(f"--weights: expected {name} once, got it twice")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (0 < weight < math.inf):
            raise UsageError(f"--weights: {name}: expected a number above 0, got {number or 'nothing'}")
        weights[name] = weight
    return weights


def rank(candidates: Sequence[Candidate], weights: Mapping[str, float]) -> Ranking:
    """Every candidate's place by these weights; those that lack a weighted figure come last, without a rank."""
    because = [_unranked(candidate, candidates, weights) for candidate in candidates]
    able = [candidate for candidate, why in zip(candidates, because, strict=True) if why is None]
    scored = sorted((_score(candidate, able, weights) for candidate in able), key=lambda place: -(place.score or 0.0))
    places = tuple(_placed(place, scored) for place in scored)
    left = tuple(
        Place(candidate.model, None, False, None, None, (), (), (), why)
        for candidate, why in zip(candidates, because, strict=True)
        if why is not None
    )
    return Ranking(dict(weights), places + left, " ".join([_verdict(places, left, weights), *_doubts(able, weights)]))


def _doubts(able: Sequence[Candidate], weights: Mapping[str, float]) -> Iterator[str]:
    """What the marks of a judge are worth, and which other figures stand on a measurement that is in doubt."""
    for name in weights:
        doubted: dict[str, list[str]] = {}
        for candidate in able:
            figure = figure_of(candidate, name)
            if figure.because and (name == "quality" or figure.at_least):
                doubted.setdefault(figure.because, []).append(candidate.model)
        for because, models in doubted.items():
            yield f"The {name} of {listed(models)} is in doubt: {because}."


def side_by_side(candidates: Sequence[Candidate]) -> Iterator[str]:
    """Several models in a sentence: how soon each begins and how much it gives, and which of them gave nothing."""
    told = []
    for candidate in candidates:
        name = candidate.model
        first, most = candidate.ttft_p50_ms, candidate.best_tokens_per_s
        if candidate.status != "ok":
            told.append(f"{name} {candidate.status}" + (f" at {candidate.failed_at}" if candidate.failed_at else ""))
            continue
        parts = [] if first.value is None else [f"TTFT p50 {_sure(first)}{time(first.value)} at {first.at}"]
        parts += [] if most.value is None else [f"at best {_sure(most)}{number(most.value)} tok/s at {most.at}"]
        told += [f"{name} {', '.join(parts)}"] if parts else []
    if len(told) > 1:
        yield f"Side by side: {'; '.join(told)}."


def _sure(figure: Figure) -> str:
    return "" if figure.firm else "about "


def figure_of(candidate: Candidate, criterion: str) -> Figure:
    """The figure that a criterion weighs."""
    found: Figure = getattr(candidate, CRITERIA[criterion].figure)
    return found


def _unranked(candidate: Candidate, candidates: Sequence[Candidate], weights: Mapping[str, float]) -> str | None:
    """Why it cannot be ranked by these weights."""
    if candidate.status != "ok":
        told = f"it {candidate.status}" if candidate.status == "failed" else f"it was {candidate.status}"
        return told + (f" at {candidate.failed_at}" if candidate.failed_at else "")
    for name in weights:
        figure = figure_of(candidate, name)
        if figure.value is None:
            return f"{name} is not known: {figure.because}"
        if _worth(CRITERIA[name], figure.value) <= 0:
            return "no request succeeded" if CRITERIA[name].kept else f"{name} is {figure.value:g}, which has no ratio"
        usual = _usual_load(candidates, name)
        if usual is not None and figure.at != usual:
            if name == "quality":
                return f"its quality stands on {figure.at}, that of the others on {usual}"
            return f"{name} is told at {figure.at}, of the others at {usual}"
    return None


def _usual_load(candidates: Sequence[Candidate], name: str) -> str | None:
    """The load at which most candidates' figure was taken, or whose marks most have; None where any will do. Times of 1
    and of 8 users are no two answers to one question."""
    if name not in ("ttft", "e2e", "energy", "quality"):
        return None
    loads = [figure.at for candidate in candidates if (figure := figure_of(candidate, name)).value is not None]
    return max(dict.fromkeys(loads), key=loads.count, default=None)


def _worth(criterion: Criterion, value: float) -> float:
    return 1.0 - value if criterion.kept else value


def _ratio(criterion: Criterion, value: float, best: float) -> float:
    worth = _worth(criterion, value)
    return max(worth / best if criterion.more_is_better else best / max(worth, LEAST), LEAST)


def _score(candidate: Candidate, able: Sequence[Candidate], weights: Mapping[str, float]) -> Place:
    total = sum(weights.values())
    terms = tuple(_term(candidate, able, name, weight, total) for name, weight in weights.items())
    score = math.prod(term.factor for term in terms)
    lost = math.log(score)
    if lost < -NEAR:
        terms = tuple(replace(term, lost_share=math.log(term.factor) / lost) for term in terms)
    reach: Range | None = (
        math.prod(term.ratio_95[0] ** term.share for term in terms if term.ratio_95),
        math.prod(term.ratio_95[1] ** term.share for term in terms if term.ratio_95),
    )
    if any(term.ratio_95 is None for term in terms):
        reach = None
    rough = tuple(name for name in weights if _is_rough(figure_of(candidate, name)))
    return Place(candidate.model, None, False, score, reach, (), rough, terms, None)


def _is_rough(figure: Figure) -> bool:
    return figure.interval_95 is None and (figure.rough is not None or figure.n is not None)


def _term(candidate: Candidate, able: Sequence[Candidate], name: str, weight: float, total: float) -> Term:
    criterion, figure = CRITERIA[name], figure_of(candidate, name)
    worths = [_worth(criterion, figure_of(one, name).value or 0.0) for one in able]
    best = max(worths) if criterion.more_is_better else min(worths)
    assert figure.value is not None
    # A size that is known to the byte has no number of samples, and no interval either.
    exact = (figure.value, figure.value) if figure.n is None else None
    reach = figure.reach or exact
    ratio, ends = _ratio(criterion, figure.value, best), None
    if reach is not None:
        first, second = (_ratio(criterion, end, best) for end in reach)
        ends = (min(first, second), max(first, second))
    share = weight / total
    return Term(name, criterion.figure, weight, share, figure.value, ratio, ends, ratio**share, None)


def _placed(place: Place, scored: Sequence[Place]) -> Place:
    """With its rank among them: one more than those that are better beyond doubt."""
    others = [other for other in scored if other is not place]
    better = sum(_beats(other, place) for other in others)
    ranks = [1 + sum(_beats(third, other) for third in scored if third is not other) for other in others]
    ties = tuple(other.model for other in others if not _beats(other, place) and not _beats(place, other))
    return replace(place, rank=1 + better, tied=1 + better in ranks, ties=ties)


def _beats(one: Place, other: Place) -> bool:
    """Whether it is better beyond doubt; nothing is, where a figure could be anything."""
    return (
        one.score_reach is not None
        and other.score_reach is not None
        and (one.score_reach[0] > other.score_reach[1] + NEAR)
    )


def _verdict(places: Sequence[Place], left: Sequence[Place], weights: Mapping[str, float]) -> str:
    weighed = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    without = [f"{place.model} is not ranked: {place.because}." for place in left]
    if not places:
        return " ".join([f"With these weights ({weighed}) nothing can be ranked.", *without])
    first = [place for place in places if place.rank == 1]
    if len(first) == 1:
        alone = "is the only one that can be ranked" if len(places) == 1 else f"comes first{_why(first[0])}"
        told = [f"With these weights ({weighed}) {first[0].model} {alone}."]
        if first[0].ties:
            told.append(f"{_are(first[0].ties)} not told apart from it.")
    else:
        names = listed([place.model for place in first])
        leads = (first[0].score or 0.0) > (first[1].score or 0.0) + NEAR
        best = f" {first[0].model} has the highest score{_why(first[0])}." if leads else ""
        told = [f"With these weights ({weighed}) {names} come first and are not told apart.{best}"]
    rough = list(dict.fromkeys(name for place in places for name in place.rough))
    if rough and len(places) > 1:
        told.append(f"No interval can be estimated for {listed(rough)}: there the ranks are indicative.")
    return " ".join([*told, *without])


def _why(place: Place) -> str:
    """Where it is best, and where most of what it lost went."""
    best = [term.criterion for term in place.terms if term.ratio >= 1 - NEAR]
    worst = min(place.terms, key=lambda term: term.factor)
    told = [f"best in {listed(best)}"] if best else []
    if worst.ratio < 1 - NEAR:
        told.append(f"{worst.ratio:.0%} of the best in {worst.criterion}")
    return f": {', '.join(told)}" if told else ""


def _are(names: Sequence[str]) -> str:
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'}"
