"""Which prompts were answered the same every time: by the hashes of their answers, over repeats and levels.

Only prompts that have a place in a file or a list can come again; what is made up is asked once. Two answers are the
same where every byte is. Requests that failed count for nothing here, and what a level left out as warm-up counts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadbench.analysis.rundir import RunData

MOST_VARIANTS = 16  # told of one prompt; a model that makes dice of it gives as many as there are requests
ASKED = ("load", "quality")
PART = 50_000


@dataclass(frozen=True, slots=True)
class Variant:
    """One answer to a prompt: its hash, how often it came, and at which levels; none for what was asked outside."""

    answer_hash: str
    count: int
    levels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answers:
    """How one prompt was answered; ``place`` is its place among its kind's, from 0.

    ``identical`` is None where it was answered once. ``variants`` has the most frequent of ``different`` answers;
    ``others_at`` the levels at which another than the most frequent came.
    """

    model: str
    kind: str
    place: int
    answered: int
    different: int
    identical: bool | None
    levels: tuple[int, ...]
    others_at: tuple[int, ...]
    variants: tuple[Variant, ...]
    phase: str = "load"

    @property
    def of(self) -> str:
        """The kind of prompt; of those that are asked for their answers alone, which a kind may be named like, that."""
        return self.kind if self.phase == "load" else f"{self.phase} prompts"


def answers(run: RunData) -> tuple[Answers, ...]:
    """Prompt by prompt, where every answer was to be the same; else only where every repeat was the same all the same.

    Answers are to be the same where the scenario asks for temperature 0 or gives a seed.
    """
    found = _counted(run)
    if not _are_to_be_the_same(run.facts["scenario"].get("request") or {}):
        repeated = [counts for counts in found.values() if counts.total() > 1]
        if not repeated or any(len({said for said, _ in counts}) > 1 for counts in repeated):
            return ()
    return tuple(_answers(*prompt, found[prompt]) for prompt in sorted(found))


def _are_to_be_the_same(request: Mapping[str, Any]) -> bool:
    return request.get("temperature") == 0 or "seed" in (request.get("extra") or {})


# By model, phase, kind and place; then by hash and level.
_Found = dict[tuple[str, str, str, int], Counter[tuple[int, int]]]


def _counted(run: RunData) -> _Found:
    """How often each prompt was answered how and at which level."""
    samples, planned = run.samples, run.facts["levels"]
    asked = np.isin(samples.phase, [samples.words.get(phase, -2) for phase in ASKED])
    which = asked & samples.said(samples.outcome, "ok") & ~np.isnan(samples.place) & (samples.answer_hash != 0)
    which &= (samples.level >= 0) & (samples.level < len(planned))
    columns = (samples.level, samples.phase, samples.kind, samples.place, samples.answer_hash)
    counts: Counter[tuple[int, int, int, float, int]] = Counter()
    places = np.flatnonzero(which)
    for part in np.array_split(places, places.size // PART + 1):  # as numbers of Python all at once take 100 MB
        counts.update(zip(*(column[part].tolist() for column in columns), strict=True))
    words = list(samples.words)
    found: _Found = defaultdict(Counter)
    for (level, phase, kind, place, said), count in counts.items():
        found[planned[level]["model"], words[phase], words[kind], int(place)][said, level] += count
    return found


def _answers(model: str, phase: str, kind: str, place: int, found: Counter[tuple[int, int]]) -> Answers:
    counts: Counter[int] = Counter()
    levels: dict[int, set[int]] = defaultdict(set)
    for (said, level), count in found.items():
        counts[said] += count
        levels[said] |= {level} if phase == "load" else set()
    ranked = sorted(counts, key=lambda said: (-counts[said], min(levels[said], default=-1), said))
    return Answers(
        model=model,
        kind=kind,
        place=place,
        answered=counts.total(),
        different=len(counts),
        identical=len(counts) == 1 if counts.total() > 1 else None,
        levels=tuple(sorted(set().union(*levels.values()))),
        others_at=tuple(sorted(set().union(*(levels[said] for said in ranked[1:])))),
        variants=tuple(
            Variant(f"{said:016x}", counts[said], tuple(sorted(levels[said]))) for said in ranked[:MOST_VARIANTS]
        ),
        phase=phase,
    )
