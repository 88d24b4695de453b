"""Lays out the decision: the models side by side, how their ranks arise, and why a figure is absent.

The numbers are ``analysis``'s; formats and escaping are ``console``'s and ``markdown``'s. A table that is wider than
its room goes on in a second block, with the models' names again: nothing is left out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from rich.cells import cell_len

from loadbench.analysis.decision import FIGURES, Candidate, Compared, Decision, Figure, Place, Ranking, Term
from loadbench.analysis.stats import Range
from loadbench.report.content import Cells, Table
from loadbench.report.escape import cell, plain
from loadbench.report.words import NONE, count, figure, milliseconds, octets, share

TITLE = "Decision"
GAP = 2  # columns between two cells, as on the console
NAME_WIDTH = 22  # of a model's name in a narrow terminal; the report begins with them in full
NARROW = 100
MOST_WORDS = 24  # characters of a licence or a device
MOST_DOUBT = 160  # characters of why a figure is in doubt; report.md has them all
_SURE = {True: "firm", False: "indicative", None: None}
_SHOW = {"ms": milliseconds, "bytes": octets, "share": share}


def tables(decision: Decision | None, room: int | None = None) -> list[Table]:
    """The models side by side, and below it how their ranks arise; in as many blocks as fit ``room`` columns."""
    if decision is None:
        return []
    # The console has the sum of the two; report.md and decision.csv have the parts as well.
    parts = () if room is None or not _is_told(decision.candidates, "cold_start_ms") else ("load_ms", "first_token_ms")
    made = _wrapped(_side_by_side(decision, parts), room)
    return made + (_wrapped(_ranks(decision.ranking), room) if _has_ranks(decision.ranking) else [])


def verdict(decision: Decision | None) -> str | None:
    """The ranking in words; None where nothing is weighed."""
    return decision.ranking.verdict if decision and decision.ranking else None


def notes(decision: Decision | None) -> list[str]:
    """Which models have no figures, and why single figures of the others are absent."""
    if decision is None:
        return []
    failed = [candidate for candidate in decision.candidates if candidate.status != "ok"]
    others = [candidate for candidate in decision.candidates if candidate.status == "ok"]
    told = [f"{candidate.model} {_status(candidate)}: the reason is among the cautions" for candidate in failed]
    if decision.ranking:  # whose verdict names them
        told = [*_ties(decision.ranking)]
    nowhere: dict[str, list[str]] = {}
    for name, compared in FIGURES.items():
        absent: dict[str, list[str]] = {}
        for candidate in others:
            if (found := _figure(candidate, name)).value is None:
                absent.setdefault(found.because or "", []).append(candidate.model)
        if [len(others)] == [len(models) for models in absent.values()]:
            nowhere.setdefault(next(iter(absent)), []).append(compared.title)
            continue
        told += [f"no {compared.title} of {', '.join(models)}: {because}" for because, models in absent.items()]
    if others and not any(candidate.licence for candidate in others):
        nowhere.setdefault("nobody says", []).append("licence")
    lacking = [f"{', '.join(names)} ({because})" for because, names in nowhere.items()]
    return told + ([f"not told: {'; '.join(lacking)}"] if lacking else [])


def details(decision: Decision) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """(title, headings, rows): every figure of each model with what it stands on, then every term of the scores."""
    headings = ("figure", "value", "95 %", "n", "", "source", "at", "because")
    for candidate in decision.candidates:
        found = [(name, _figure(candidate, name)) for name in FIGURES]
        rows = [_detail(candidate, name, each) for name, each in found if each.value is not None or each.because]
        if candidate.status == "ok":
            yield candidate.model, headings, rows
    for place in decision.ranking.places if decision.ranking else ():
        if place.terms:
            title = f"{place.model}: score {figure(place.score)}"
            terms = ("criterion", "weight", "value", "ratio to the best", "95 %", "factor", "share of what it lost")
            yield title, terms, [_term(term) for term in place.terms]


def _detail(candidate: Candidate, name: str, found: Figure) -> tuple[str, ...]:
    compared = FIGURES[name]
    return (
        compared.title,
        words(compared, found.value, candidate.currency),
        _between(compared, found.interval_95, candidate.currency) or _roughly(compared, found),
        "" if found.n is None else f"{found.n:,}",
        _SURE[found.firm] or "",
        found.source or "",
        found.at or "",
        found.because or "",
    )


def _term(term: Term) -> tuple[str, ...]:
    ends = "" if term.ratio_95 is None else f"{figure(term.ratio_95[0])} to {figure(term.ratio_95[1])}"
    return (
        term.criterion,
        f"{term.weight:g} ({share(term.share)})",
        words(FIGURES[term.figure], term.value, None),
        figure(term.ratio),
        ends,
        f"×{figure(term.factor)}",
        "" if term.lost_share is None else share(abs(term.lost_share)),
    )


def _figure(candidate: Candidate, name: str) -> Figure:
    found: Figure = getattr(candidate, name)
    return found


def words(compared: Compared, value: float | None, currency: str | None) -> str:
    """A figure of the decision with its unit."""
    show = _SHOW.get(compared.unit, figure)
    return show(value) + (f" {currency}" if compared.unit == "money" and currency and value is not None else "")


def _between(compared: Compared, reach: Range | None, currency: str | None) -> str:
    if reach is None:
        return ""
    return f"{words(compared, reach[0], None)} to {words(compared, reach[1], currency)}"


def _roughly(compared: Compared, found: Figure) -> str:
    if found.at_least:
        return "at least"
    return "" if found.rough is None else f"roughly {_between(compared, found.rough, None)}"


def _ties(ranking: Ranking) -> Iterator[str]:
    """Ties across ranks: b may be told apart from neither a nor c, which are told apart from each other."""
    ranks = {place.model: place.rank or 0 for place in ranking.places}
    for place in ranking.places:
        better = [model for model in place.ties if ranks[model] < (place.rank or 0)]
        if better:
            yield f"{place.model}, though its rank is {_rank(place)}, is not told apart from {', '.join(better)}"


def _status(candidate: Candidate) -> str:
    return candidate.status + (f" at {candidate.failed_at}" if candidate.failed_at else "")


def _is_told(candidates: Sequence[Candidate], name: str) -> bool:
    return any(_figure(candidate, name).value is not None for candidate in candidates)


def _doubted(candidates: Sequence[Candidate]) -> dict[str, list[str]]:
    """Why the level, or the judge, behind a model's figures is in doubt, with what of it."""
    found: dict[str, list[str]] = {}
    for candidate in candidates:
        for name in ("quality", "ttft_p50_ms"):
            each = _figure(candidate, name)
            if each.value is not None and each.firm is False and each.because and (name == "quality" or each.reach):
                found.setdefault(plain(each.because, MOST_DOUBT), []).append(candidate.model)
    return found


def _side_by_side(decision: Decision, left_out: Collection[str]) -> Table:
    candidates, ranks = list(decision.candidates), {}
    if decision.ranking:
        places = list(decision.ranking.places)
        order = {place.model: index for index, place in reversed([*enumerate(places)])}
        candidates.sort(key=lambda candidate: order[candidate.model])
        ranks = {place.model: _rank(place) for place in places}
    loads = {candidate.at for candidate in candidates if candidate.at is not None}
    columns = [Cells(("model",), 0, tuple(candidate.model for candidate in candidates), left=True)]
    if ranks:
        columns.append(Cells(("rank",), 1, tuple(ranks[candidate.model] for candidate in candidates)))
    if any(candidate.status != "ok" for candidate in candidates):
        columns.append(Cells(("status",), 1, tuple(candidate.status for candidate in candidates), left=True))
    if any(candidate.device for candidate in candidates):
        columns.append(Cells(("device",), 1, tuple(_brief(candidate.device) for candidate in candidates), left=True))
    if len(loads) > 1:
        columns.append(Cells(("at",), 1, tuple(candidate.at or NONE for candidate in candidates), left=True))
    columns += [_column(candidates, name) for name in FIGURES if name not in left_out and _is_told(candidates, name)]
    if any(candidate.licence for candidate in candidates):
        columns.append(Cells(("licence",), 1, tuple(_brief(candidate.licence) for candidate in candidates), left=True))
    if any(candidate.outcomes for candidate in candidates):
        columns.append(Cells(("failures",), 1, tuple(map(_outcomes, candidates)), left=True))
    at = f", TTFT and E2E at {loads.pop()}" if len(loads) == 1 else ""
    shown = [text for column in columns for text in column.cells]
    marks = ["~ indicative: on few samples, taken once, or in doubt"] if any("~" in text for text in shown) else []
    marks += ["≥ at least: an earlier model's memory was used again"] if any("≥" in text for text in shown) else []
    marks += [f"{', '.join(names)}: {why}" for why, names in _doubted(candidates).items()]
    return Table(TITLE, f"{count(len(candidates), 'model')}{at}", tuple(columns), "; ".join(marks) or None)


def _brief(text: str | None) -> str:
    """A licence may be a whole text; summary.json has it."""
    return NONE if text is None else plain(text, MOST_WORDS)


def _column(candidates: Sequence[Candidate], name: str) -> Cells:
    """One figure of all; the heading in lines, so that the column is no wider than its numbers."""
    compared = FIGURES[name]
    title = compared.title.replace("tok/s at 1 user", "tok/s\nat 1 user").replace("TTFT ", "TTFT\n")
    for long in ("E2E", "memory", "best", "cold", "first", "failed"):
        title = title.replace(f"{long} ", f"{long}\n")
    if compared.unit == "money":
        currency = next((candidate.currency for candidate in candidates if candidate.currency), None)
        title = f"{currency or 'cost'} per\n1M tokens"
    cells = tuple(_cell(candidate, name) for candidate in candidates)
    return Cells(tuple(title.split("\n")), 1, cells)


def _cell(candidate: Candidate, name: str) -> str:
    found = _figure(candidate, name)
    if found.value is None:
        return NONE
    told = ("≥" if found.at_least else "~" if found.firm is False else "") + words(FIGURES[name], found.value, None)
    if name == "best_tokens_per_s" and found.at:
        told += f" ({found.at})"
    # What nobody measured, and who marked, is said beside the figure in every table.
    return f"{told} {found.source}" if name in _NAMED and found.source else told


_NAMED = ("quality", "joules_per_output_token", "cost_per_million_output_tokens")


def _outcomes(candidate: Candidate) -> str:
    most = list(candidate.outcomes.items())
    told = [f"{name} {number:,}" for name, number in most[:2]]
    return ", ".join(told) + (", …" if most[2:] else "") or "–"


def _rank(place: Place) -> str:
    return "–" if place.rank is None else f"{place.rank}{'=' if place.tied else ''}"


def _has_ranks(ranking: Ranking | None) -> bool:
    return ranking is not None and any(place.rank is not None for place in ranking.places)


def _ranks(ranking: Ranking | None) -> Table:
    places = [place for place in ranking.places if place.rank is not None] if ranking else []
    weights = ranking.weights if ranking else {}
    total = sum(weights.values())
    columns = [
        Cells(("model",), 0, tuple(place.model for place in places), left=True),
        Cells(("rank",), 1, tuple(map(_rank, places))),
        Cells(("score",), 1, tuple(figure(place.score) for place in places)),
        Cells(("reach",), 1, tuple(map(_reach, places))),
    ]
    for index, (name, weight) in enumerate(weights.items()):
        terms = [place.terms[index] for place in places]
        cells = tuple(f"{figure(term.ratio)} ×{figure(term.factor)}" for term in terms)
        columns.append(Cells((name, f"{weight:g} of {total:g}"), 1, cells))
    how = (
        "by criterion: the ratio to the best, × what that makes of the score (ratio to the power of its weight's"
        " share); the score is their product, its reach that with every figure at an end of its interval; who overlaps"
        " is tied"
    )
    return Table(TITLE, "how the ranks arise", tuple(columns), how)


def _reach(place: Place) -> str:
    return NONE if place.score_reach is None else "–".join(f"{end:.3f}" for end in place.score_reach)


def _wrapped(table: Table, room: int | None) -> list[Table]:
    """The table in blocks that fit, each with the first column; a note stands below the last."""
    if room is None:
        return [table]
    first, *others = table.columns
    first = replace(first, cells=_short(first.cells)) if room < NARROW else first
    blocks = _blocks(first, others, room)
    while room > 1 and len(narrower := _blocks(first, others, room - 1)) == len(blocks):  # all about as wide
        blocks, room = narrower, room - 1
    made = [replace(table, columns=tuple(block), note=None) for block in blocks]
    made = [made[0], *(replace(block, title="goes on") for block in made[1:])]
    return [*made[:-1], replace(made[-1], note=table.note)]


def _blocks(first: Cells, others: Sequence[Cells], room: int) -> list[list[Cells]]:
    blocks: list[list[Cells]] = [[first]]
    for column in others:
        if len(blocks[-1]) > 1 and sum(map(_width, [*blocks[-1], column])) + GAP * len(blocks[-1]) > room:
            blocks.append([first])
        blocks[-1].append(column)
    return blocks


def _short(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names with their middle left out where they are long, if that still tells them apart."""
    half = NAME_WIDTH // 2
    short = tuple(name if len(name) <= NAME_WIDTH else f"{name[: half - 1]}…{name[-half:]}" for name in names)
    return short if len(set(short)) == len(set(names)) else names


def _width(column: Cells) -> int:
    return max(cell_len(text) for text in (*column.heading, *map(plain, column.cells)))


def decision_csv_text(decision: Decision) -> str:
    """decision.csv: a row a model, every figure with its interval, n, firmness, source and why it is absent."""
    out = io.StringIO(newline="")
    rows = [list(_row(decision, candidate)) for candidate in decision.candidates]
    writer = csv.writer(out)
    writer.writerow([name for name, _ in rows[0]])
    writer.writerows([_written(value) for _, value in row] for row in rows)
    return out.getvalue()


def _row(decision: Decision, candidate: Candidate) -> Iterator[tuple[str, object]]:
    plainly = ("model", "asked", "status", "failed_at", "reason", "device", "execution_provider", "licence")
    yield from ((name, getattr(candidate, name)) for name in plainly)
    yield "capabilities", " ".join(candidate.capabilities)
    yield "at", candidate.at
    ranking = decision.ranking
    if ranking is not None:
        place = next(place for place in ranking.places if place.model == candidate.model)
        yield from (("rank", place.rank), ("score", place.score))
        reach = place.score_reach or (None, None)
        yield from (("score_low", reach[0]), ("score_high", reach[1]))
        yield from (("not_told_apart_from", " ".join(place.ties)), ("unranked_because", place.because))
        terms = {term.criterion: term for term in place.terms}
        for name in ranking.weights:
            yield f"ratio_{name}", terms[name].ratio if name in terms else None
            yield f"factor_{name}", terms[name].factor if name in terms else None
    for name in FIGURES:
        found = _figure(candidate, name)
        low, high = found.interval_95 or (None, None)
        yield from ((name, found.value), (f"{name}_low_95", low), (f"{name}_high_95", high), (f"{name}_n", found.n))
        yield f"{name}_firm", "at least" if found.at_least else _SURE[found.firm]
        yield from ((f"{name}_source", found.source), (f"{name}_at", found.at), (f"{name}_because", found.because))
    yield "currency", candidate.currency
    yield "failures", " ".join(f"{outcome}={number}" for outcome, number in candidate.outcomes.items())


def _written(value: object) -> str:
    if isinstance(value, str):
        return cell(value)
    return "" if value is None else repr(value)
