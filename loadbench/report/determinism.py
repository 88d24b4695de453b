"""Lays out which prompts were answered the same every time, and how the others were: a sentence, and a table of those.

Formats and escaping are ``console``'s and ``markdown``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from loadbench.analysis.determinism import Answers
from loadbench.analysis.summary import Summary
from loadbench.records import load_title
from loadbench.report.findings import Finding, Stands
from loadbench.report.words import count

HEADINGS = ("prompts", "place", "answers", "different", "most frequent", "others came at")
WHY = (
    "At temperature 0 the likeliest token is taken, but a sum of rounded numbers depends on its order: an engine that"
    " batches adds up otherwise with others in the batch, or with part of the prompt in its cache, and near ties tip."
)


def lines(summary: Summary) -> list[str]:
    """A sentence a model that was asked a prompt more than once: 12 of 12 prompts answered identically in 3 levels."""
    return [_line(summary, model, prompts) for model, prompts in _repeated(summary)]


def findings(summary: Summary, most: int | None = None) -> list[Finding]:
    """A table a model of the prompts, at ``most`` so many, that were answered in more than one way."""
    told = []
    for model, prompts in _repeated(summary):
        others = [prompt for prompt in prompts if not prompt.identical]
        if others:
            rows = tuple(_row(summary, prompt) for prompt in others[:most])
            notes = [f"{len(others) - len(rows):,} more are in report.md"] if len(rows) < len(others) else []
            told.append(Finding(model, "prompts that were not answered identically", HEADINGS, rows, (*notes, WHY)))
    return told


def _repeated(summary: Summary) -> list[tuple[str, list[Answers]]]:
    """The prompts that were answered more than once, by model."""
    prompts = [prompt for prompt in summary.answers if prompt.identical is not None]
    return [(model, list(mine)) for model, mine in groupby(prompts, lambda prompt: prompt.model)]


def _line(summary: Summary, model: str, prompts: Sequence[Answers]) -> str:
    same = sum(1 for prompt in prompts if prompt.identical)
    levels = set().union(*(prompt.levels for prompt in prompts))
    answers = count(sum(prompt.answered for prompt in prompts), "answer")
    everywhere = all(set(prompt.levels) == levels for prompt in prompts)
    where = f" {'in all' if everywhere else 'over'} {len(levels)} levels" if len(levels) > 1 else ""
    told = f"{same:,} of {count(len(prompts), 'prompt')} answered identically{where} ({answers})"
    return f"{model}: {told}" if len({prompt.model for prompt in summary.answers}) > 1 else told


def _row(summary: Summary, prompt: Answers) -> tuple[str | Stands, ...]:
    titles = {level.index: load_title(level.load) for level in summary.levels}
    others_at = dict.fromkeys(titles[level] for level in prompt.others_at if level in titles)
    return (
        prompt.of,
        str(prompt.place),
        f"{prompt.answered:,}",
        f"{prompt.different:,}",
        f"{prompt.variants[0].count:,} times",
        Stands(prompt.others_at, ", ".join(others_at)),
    )
