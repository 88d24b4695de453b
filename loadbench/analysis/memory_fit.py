"""What a stream and a token take: the peaks of a model's levels as base + streams × (per stream + tokens × per token).

Weighted least squares over the levels whose peak tells something; a coefficient that the levels do not bear out is left
out with the reason, and the rest fitted again without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loadbench.analysis.findings import Memory, Share
from loadbench.analysis.stats import Floats, Range

LEAST_LEVELS = 3
ALIKE_SHARE = 1.05  # tokens a stream within 5 % are one load: prompts of a mix vary by chance
PAGES_BYTES, OFF_SHARE = 2 << 20, 0.02  # what a peak is off: allocators' pieces and threads' stacks, and of its growth
FRESH_BYTES, FRESH_SHARE = 16 << 20, 0.05  # above the least ever held before a level: still a process without a past
SEVERE = 100.0  # condition number of scaled columns (Belsley 1991): beyond, one cannot be told from the other
BETTER = 4.0  # times less misfit: then one reading of the tokens explains the peaks, and the other does not


@dataclass(frozen=True, slots=True)
class Rung:
    """A level as the fit sees it. ``asked`` and ``held`` are the tokens of a stream, NaN where not known: input and
    max_tokens, and what it came to hold at its end."""

    level: int
    streams: int
    asked: float
    held: float
    before_bytes: int | None
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Peaks:
    """The fit; as in `findings.Memory`."""

    base: Share
    per_stream: Share
    per_token: Share
    at_tokens: float | None
    allocates: Literal["reserved", "grows"] | None
    levels: tuple[int, ...]


def fit(rungs: Sequence[Rung]) -> Peaks:
    """The fit over these levels, given in the order in which they ran; none of them failed for want of memory."""
    telling = _telling(rungs)
    levels = tuple(rung.level for rung in telling)
    loads = {(rung.streams, round(rung.asked) if rung.asked == rung.asked else None) for rung in telling}
    if len(loads) < LEAST_LEVELS:
        reason = f"{len(loads)} different loads raised the peak and did not fail; it takes {LEAST_LEVELS}"
        return Peaks(*(_untold(reason),) * 3, None, None, levels)
    asked = np.array([rung.asked for rung in telling])
    held = np.array([rung.held for rung in telling])
    reserved = _fit(telling, asked)
    if np.isnan(held).any() or np.isnan(asked).any() or _alike(held / asked):
        return reserved.peaks
    grows = _fit(telling, held)
    if reserved.misfit * BETTER <= grows.misfit:
        return _allocates(reserved.peaks, "reserved")
    return _allocates(grows.peaks, "grows") if grows.misfit * BETTER <= reserved.misfit else reserved.peaks


def predict(found: Peaks | Memory, streams: float, tokens: float) -> float | None:
    """The peak with so many streams of so many tokens. What was not told from none is none."""
    base, stream, token = found.base.value_bytes, found.per_stream.value_bytes, found.per_token.value_bytes
    if base is None or (stream is None and token is None):
        return None
    return base + streams * ((stream or 0.0) + tokens * (token or 0.0))


def _allocates(peaks: Peaks, how: Literal["reserved", "grows"]) -> Peaks:
    told = how if peaks.per_token.value_bytes is not None else None
    return Peaks(peaks.base, peaks.per_stream, peaks.per_token, peaks.at_tokens, told, peaks.levels)


def _telling(rungs: Sequence[Rung]) -> list[Rung]:
    """The levels whose peak is their own.

    An allocator keeps what it was given back. So in a process that has served a larger level a smaller one does not
    raise the peak, and what it reads is the larger one's; in a fresh process every peak counts.
    """
    least = min((rung.before_bytes for rung in rungs if rung.before_bytes is not None), default=0)
    fresh_bytes = max(least + FRESH_BYTES, least * (1 + FRESH_SHARE))
    telling, most = [], 0
    for rung in rungs:
        if rung.before_bytes is not None and rung.before_bytes <= fresh_bytes:
            most = 0
        if rung.peak_bytes > max(most, rung.before_bytes or 0) + (PAGES_BYTES if most else 0):
            telling.append(rung)
        most = max(most, rung.peak_bytes)
    return telling


@dataclass(frozen=True, slots=True)
class _Fitted:
    peaks: Peaks
    misfit: float


def _fit(rungs: Sequence[Rung], tokens: Floats) -> _Fitted:
    """The line with as many of its coefficients as the levels bear out."""
    streams = np.array([rung.streams for rung in rungs], np.float64)
    peaks = np.array([rung.peak_bytes for rung in rungs], np.float64)
    known = not np.isnan(tokens).any()
    untold = {}
    names = ["stream", "token"]
    if _alike(streams):
        names.remove("stream")
        untold["stream"] = "every level had as many streams"
    if not known or _alike(tokens):
        names.remove("token")
        untold["token"] = "every level asked for as many tokens" if known else "the server gave no token counts"
    columns = {"stream": streams, "token": streams * tokens}
    weight = 1 / (PAGES_BYTES + OFF_SHARE * (peaks - peaks.min()))
    at_tokens = float(tokens.mean()) if known and names == ["stream"] else None
    while True:
        table = np.column_stack([np.ones_like(streams), *(columns[name] for name in names)])
        if reason := _not_solved(table * weight[:, None], len(rungs)):
            untold |= dict.fromkeys(names, reason)
            values, halves, misfit = np.full(1, np.nan), np.full(1, np.nan), np.inf
            names = []
            break
        values, halves, misfit = _least_squares(table * weight[:, None], peaks * weight)
        weakest = min(range(len(names)), key=lambda place: values[place + 1] / halves[place + 1], default=None)
        if weakest is None or values[weakest + 1] > halves[weakest + 1]:
            break
        most = max(values[weakest + 1] + halves[weakest + 1], 0.0)
        untold[names[weakest]] = f"not told from none: at most {most:,.0f} bytes"
        del names[weakest]
    shares = {name: _told(values[place + 1], halves[place + 1]) for place, name in enumerate(names)}
    shares |= {name: _untold(reason) for name, reason in untold.items()}
    base = _untold(untold.get("stream", "")) if np.isnan(values[0]) else _told(values[0], halves[0])
    levels = tuple(rung.level for rung in rungs)
    return _Fitted(Peaks(base, shares["stream"], shares["token"], at_tokens, None, levels), misfit)


def _not_solved(table: Floats, levels: int) -> str | None:
    """Why these columns have no answer."""
    if levels <= table.shape[1]:
        return f"{levels} levels for {table.shape[1]} unknowns; one more is needed to know how far they are off"
    condition = float(np.linalg.cond(table / np.linalg.norm(table, axis=0)))
    return "streams and tokens rose together: one cannot be told from the other" if condition > SEVERE else None


def _least_squares(table: Floats, values: Floats) -> tuple[Floats, Floats, float]:
    """The coefficients, half their 95 % intervals, and the sum of squares that is left."""
    from scipy.special import stdtrit  # not at the start of every run

    inverse = np.linalg.inv(table.T @ table)
    found: Floats = inverse @ table.T @ values
    misfit = float(((table @ found - values) ** 2).sum())
    freedom = table.shape[0] - table.shape[1]
    halves: Floats = float(stdtrit(freedom, 0.975)) * np.sqrt(np.diag(inverse) * misfit / freedom)
    return found, np.maximum(halves, 1.0), misfit  # what is exact to the byte is so by chance


def _alike(values: Floats) -> bool:
    return bool(values.max() <= ALIKE_SHARE * values.min())


def _told(value: float, half: float) -> Share:
    interval: Range = (float(value - half), float(value + half))
    return Share(float(value), interval, None)


def _untold(reason: str) -> Share:
    return Share(None, None, reason)
