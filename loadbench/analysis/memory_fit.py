"""What a stream and a token take: the peaks of a model's levels as base + streams × (per stream + tokens × per token).

Weighted least squares over the levels whose peak tells something; a coefficient that the levels do not bear out is left
out with the reason, and the rest fitted again without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from loadbench.analysis.findings import Memory, Share
from loadbench.analysis.stats import Floats, Range
from loadbench.analysis.words import size

LEAST_LEVELS = 3
ALIKE_SHARE = 1.05  # tokens a stream within 5 % are one load: prompts of a mix vary by chance
PAGES_BYTES, OFF_SHARE = 2 << 20, 0.02  # what a peak is off: allocators' pieces and threads' stacks, and of its growth
FRESH_BYTES, FRESH_SHARE = 16 << 20, 0.05  # above the least ever held before a level: still a process without a past
SEVERE = 100.0  # condition number of scaled columns (Belsley 1991): beyond, one cannot be told from the other
BETTER = 4.0  # times less misfit: then one reading of the tokens explains the peaks, and the other does not
FAR_OFF = 3.0  # times what a peak is off, on average: then no line tells them; seen where one does: 0.2 to 1
INHERITED_SHARE = 0.1  # of all growth, held before a level began: then earlier levels explain its peak, too
LEAK_SHARE = 0.5  # of what a leak would have kept: a smaller or equal load that kept less proves that it is none


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
    requests: int | None = None  # as many as streams


@dataclass(frozen=True, slots=True)
class Peaks:
    """The fit; as in `findings.Memory`."""

    base: Share
    per_stream: Share
    per_token: Share
    at_tokens: float | None
    allocates: Literal["reserved", "grows"] | None
    levels: tuple[int, ...]


def fit(rungs: Sequence[Rung], *, leaks_not: bool = False) -> Peaks:
    """The fit over these levels, given in the order in which they ran; none of them failed for want of memory.

    ``leaks_not``: it is known from elsewhere that the target keeps nothing for a request.
    """
    telling = _telling(rungs)
    levels = tuple(rung.level for rung in telling)
    loads = {(rung.streams, round(rung.asked) if rung.asked == rung.asked else None) for rung in telling}
    if len(loads) < LEAST_LEVELS:
        reason = f"{len(loads)} different loads raised the peak and did not fail; it takes {LEAST_LEVELS}"
        return Peaks(*(_untold(reason),) * 3, None, None, levels)
    if not leaks_not and (why := _inherited(rungs, telling)):
        return Peaks(*(_untold(why),) * 3, None, None, ())
    asked = np.array([rung.asked for rung in telling])
    held = np.array([rung.held for rung in telling])
    reserved = _fit(telling, asked)
    if (slots := _queues_beyond(telling, asked, held)) is not None:
        reason = f"the peaks do not lie on a line: it seems to queue what is beyond {slots}"
        return Peaks(*(_untold(reason),) * 3, None, None, levels)
    if np.isnan(held).any() or np.isnan(asked).any() or _alike(held / asked):
        return _on_a_line(reserved, reserved.peaks)
    grows = _fit(telling, held)
    if reserved.misfit * BETTER <= grows.misfit:
        return _on_a_line(reserved, _allocates(reserved.peaks, "reserved"))
    if grows.misfit * BETTER <= reserved.misfit:
        return _on_a_line(grows, _allocates(grows.peaks, "grows"))
    return _on_a_line(reserved, reserved.peaks)


def _on_a_line(found: _Fitted, peaks: Peaks) -> Peaks:
    """The fit, without intervals where its peaks are too far off for the model to hold."""
    off = (found.misfit / max(1, len(peaks.levels) - 3)) ** 0.5
    if peaks.base.value_bytes is None or off <= FAR_OFF:
        return peaks
    return unsure(peaks, f"the peaks do not lie on a line: they are {off:.0f} times as far off as peaks usually are")


def unsure(peaks: Peaks, reason: str) -> Peaks:
    """The fit without its intervals, and why it has none."""
    shares = peaks.base, peaks.per_stream, peaks.per_token
    base, stream, token = (Share(told.value_bytes, None, told.not_told or reason) for told in shares)
    return replace(peaks, base=base, per_stream=stream, per_token=token)


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


def _inherited(rungs: Sequence[Rung], telling: Sequence[Rung]) -> str | None:
    """Why peaks in one process do not tell what a load takes: a leak would have raised them, too.

    It is none where a later level, which asked for no more, kept less than a leak would have for its requests.
    """
    before = [rung.before_bytes for rung in telling if rung.before_bytes is not None]
    grown = max(rung.peak_bytes for rung in telling) - min(before, default=0)
    held = max(before, default=0) - min(before, default=0)
    if held <= max(PAGES_BYTES, INHERITED_SHARE * grown):
        return None
    others = [rung for rung in rungs if rung not in telling and rung.before_bytes is not None]
    kept = sum(max(0, rung.peak_bytes - (rung.before_bytes or 0)) for rung in others)
    leaked = grown / sum(map(_requests, telling)) * sum(map(_requests, others))
    if leaked > PAGES_BYTES and kept < LEAK_SHARE * leaked:
        return None
    return "one process ran these levels and kept what earlier ones took: for their load, or for every request"


def _requests(rung: Rung) -> int:
    return rung.streams if rung.requests is None else rung.requests


def _queues_beyond(rungs: Sequence[Rung], tokens: Floats, held: Floats) -> int | None:
    """Of how many streams it holds memory at most, where that explains the peaks and a line does not."""
    line, most = min(_fit(rungs, each).misfit for each in (tokens, held)), max(rung.streams for rung in rungs)
    if line <= len(rungs):  # every peak within what a peak is off
        return None
    misfits = {}
    for slots in sorted({rung.streams for rung in rungs} - {most}):
        capped = [replace(rung, streams=min(rung.streams, slots)) for rung in rungs]
        misfits[slots] = np.inf if _alike(np.array([rung.streams for rung in capped])) else _fit(capped, tokens).misfit
    best = min(misfits, key=lambda slots: misfits[slots], default=None)
    return best if best is not None and misfits[best] * BETTER <= line < np.inf else None


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
        untold[names[weakest]] = f"not told from none: at most {size(most)}"
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
