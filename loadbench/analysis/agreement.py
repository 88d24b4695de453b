"""How far two sets of marks agree, beyond what chance would give. Pure: takes pairs of marks, prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadbench.analysis.stats import Range

MARKS = np.arange(1, 6)
LEAST_PROMPTS = 10
"""That an interval takes: a bootstrap of fewer draws the same few again and again, and tells too little doubt."""

RESAMPLES = 2000
SEED = 1968

Pair = tuple[int, int]
Counts = npt.NDArray[np.float64]

_APART = (MARKS[:, None] - MARKS[None, :]).astype(np.float64) ** 2


@dataclass(frozen=True, slots=True)
class Agreement:
    """A judge's marks against those of people, of the same answers; ``model`` None: of all models together.

    ``pairs`` have two marks of ``prompts`` prompts. ``above`` is how much higher the judge marks on average. ``kappa``
    is Cohen's with quadratic weights (1968): 1 is agreement, 0 what chance gives; None where one of the two always
    gives the same mark. Its interval is a bootstrap over prompts; ``not_told`` says why it, or both, are not given.
    """

    judge: str
    model: str | None
    pairs: int
    prompts: int
    equal_share: float
    within_1_share: float
    above: float
    kappa: float | None
    kappa_interval_95: Range | None
    not_told: str | None


def agreement(judge: str, model: str | None, by_prompt: Mapping[str, Sequence[Pair]]) -> Agreement | None:
    """Of pairs (mark of a person, mark of the judge); None where there are none."""
    tables = np.array([_table(pairs) for pairs in by_prompt.values() if pairs])
    if not tables.size:
        return None
    table = tables.sum(axis=0)
    pairs, kappa = int(table.sum()), float(_kappas(table[None])[0])
    interval, why = None, None
    if np.isnan(kappa):
        why = "all marks are the same, which leaves nothing to agree on"
    elif len(tables) < LEAST_PROMPTS:
        why = f"{len(tables)} prompts with both marks; an interval takes {LEAST_PROMPTS}"
    else:
        interval = _bootstrap(tables)
        why = None if interval else "most resamples have one mark only"
    return Agreement(
        judge=judge,
        model=model,
        pairs=pairs,
        prompts=len(tables),
        equal_share=float(np.trace(table)) / pairs,
        within_1_share=float(table[_APART <= 1].sum()) / pairs,
        above=float((table * (MARKS[None, :] - MARKS[:, None])).sum()) / pairs,
        kappa=None if np.isnan(kappa) else kappa,
        kappa_interval_95=interval,
        not_told=why,
    )


def _table(pairs: Sequence[Pair]) -> Counts:
    """How often each pair occurs: rows are people's marks, columns the judge's."""
    table = np.zeros((MARKS.size, MARKS.size))
    for one, other in pairs:
        table[one - 1, other - 1] += 1
    return table


def _kappas(tables: Counts) -> Counts:
    """1 - Σ w·observed / Σ w·expected of each table, w the squared distance; NaN where nothing else was to expect."""
    totals = tables.sum(axis=(1, 2))
    expected = tables.sum(axis=2)[:, :, None] * tables.sum(axis=1)[:, None, :] / totals[:, None, None]
    seen, by_chance = (tables * _APART).sum(axis=(1, 2)), (expected * _APART).sum(axis=(1, 2))
    kappas: Counts = 1 - np.divide(seen, by_chance, out=np.full(seen.shape, np.nan), where=by_chance > 0)
    return kappas


def _bootstrap(tables: Counts) -> Range | None:
    """The middle 95 % of kappa over prompts drawn with replacement: answers to one prompt resemble each other."""
    prompts = len(tables)
    drawn = np.random.default_rng(SEED).multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES)
    kappas = _kappas(np.einsum("rp,pij->rij", drawn.astype(np.float64), tables))
    kappas = kappas[~np.isnan(kappas)]
    if kappas.size < 0.9 * RESAMPLES:
        return None
    low, high = np.quantile(kappas, (0.025, 0.975))
    return float(low), float(high)
