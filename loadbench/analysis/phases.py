"""Prefill and decode apart: TTFT against input tokens where nothing queues, TPOT against users.

Lines through medians of slopes (Theil–Sen), which a third of outliers does not move; none where a line does not
describe what was seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loadbench.analysis import words
from loadbench.analysis.findings import Fit, Phases
from loadbench.analysis.metrics import LATENCIES, Window
from loadbench.analysis.span import Span
from loadbench.analysis.stats import FLOORS, NS_PER_MS, Floats
from loadbench.analysis.steady import SURE_Z

LEAST_REQUESTS = 30
LEAST_TIMES = 2.0  # p90 ÷ p10 of the input tokens
MOST_APART = 3.0  # a speed that may be three times as high is none
MOST_REQUESTS = 1_000  # the slopes of all pairs are compared: half a million
ALONE = 0.5  # in flight on average in open loop: then six in ten requests and more find the server idle
LEAST_LEVELS = 3
LEAST_POINTS = 5  # of fewer the slopes' 95 % hold the truth in 68 % (3 points) and 92 % (4)
PARTS = 4  # of the prompts, by their tokens: a line that is none lies beside the short or the long ones
MISS_SHARE = 0.10  # of a level's TPOT: what a line may be off at any level
MISS_PART_SHARE = 0.20  # of the TTFT of prompts of a size: a tenth of freezes shifts the line by a tenth


def phases(spans: Sequence[Span]) -> tuple[Phases, ...]:
    """Of each model, in the order of its levels; rungs of memory ladders say nothing."""
    spans = [span for span in spans if not span.is_rung]
    return tuple(
        _phases(model, [span for span in spans if span.plan["model"] == model])
        for model in dict.fromkeys(span.plan["model"] for span in spans)
    )


def _phases(model: str, spans: Sequence[Span]) -> Phases:
    prefill, decode = _prefill(spans), _decode(spans)
    return Phases(model, prefill, 1e3 / prefill.slope_ms if prefill.slope_ms else None, decode)


def _users(span: Span) -> int | None:
    """How many there are all the time; None where that changes, and in open loop."""
    load = span.plan["load"]
    users: int | None = None if span.changes else load.get("concurrency")
    return users


def _unqueued(spans: Sequence[Span]) -> list[Span]:
    """The levels in which least queues: those of the fewest users, and of open loop those that are mostly idle."""
    fewest = min((users for span in spans if (users := _users(span)) is not None), default=None)
    return [
        span
        for span in spans
        if (_users(span) == fewest if span.plan["load"]["kind"] == "closed" else _in_flight(span) <= ALONE)
    ]


def _in_flight(span: Span) -> float:
    window = Window(span.samples, span.ok, span.inside, None, span.start_ns, span.end_ns, {})
    mean = window.in_flight()
    return np.inf if mean is None else mean


def _not_told(reason: str, n: int = 0, levels: tuple[int, ...] = ()) -> Fit:
    return Fit(None, None, None, n, levels, reason)


def _values(span: Span, metric: str) -> Floats:
    """A metric of the successful requests that count, in milliseconds, NaN where it does not exist."""
    stamps = LATENCIES[metric].series["service"]
    assert stamps is not None
    return stamps(span.samples.take(span.ok & span.inside)) / NS_PER_MS


def _prefill(spans: Sequence[Span]) -> Fit:
    spans = _unqueued(spans)
    if not spans:
        return _not_told("no level in which nothing queues: run one user, or a low rate")
    levels = tuple(span.events.index for span in spans)
    tokens = np.concatenate([span.samples.input_tokens[span.ok & span.inside] for span in spans])
    first_ms = np.concatenate([_values(span, "ttft") for span in spans])
    if np.isnan(first_ms).all():
        return _not_told("no answer was streamed", levels=levels)
    if np.isnan(tokens).all():
        return _not_told("the server gave no input token counts", levels=levels)
    known = ~np.isnan(tokens) & ~np.isnan(first_ms)
    tokens, first_ms = tokens[known], first_ms[known]
    n = tokens.size
    if n < LEAST_REQUESTS:
        return _not_told(f"{n} requests at the lowest load; it takes {LEAST_REQUESTS}", n, levels)
    low, high = np.quantile(tokens, [0.1, 0.9])
    if high < LEAST_TIMES * low:
        return _not_told(f"prompts vary too little: {low:.0f} to {high:.0f} input tokens for 8 of 10", n, levels)
    some = np.linspace(0, n - 1, min(n, MOST_REQUESTS)).astype(np.intp)
    fit = _line(tokens[some], first_ms[some], n, levels)
    if fit.slope_ms_interval_95 is not None and fit.slope_ms_interval_95[0] <= 0:
        reason = "TTFT does not grow with the input tokens beyond chance"
        return _not_told(f"{reason}; a server that keeps the prefixes of repeated prompts looks like this", n, levels)
    if fit.slope_ms_interval_95 is not None and fit.slope_ms_interval_95[1] > MOST_APART * fit.slope_ms_interval_95[0]:
        low, high = (1e3 / slope_ms for slope_ms in reversed(fit.slope_ms_interval_95))
        return _not_told(f"the prompts tell no speed: {low:,.0f} to {high:,.0f} tokens/s", n, levels)
    if beside := _beside(fit, tokens, first_ms):
        return _not_told(f"no line describes it: {beside}", n, levels)
    return fit


def _beside(fit: Fit, tokens: Floats, first_ms: Floats) -> str | None:
    """Where the prompts of one size lie off the line beyond chance: the sizes, and by how much."""
    assert fit.slope_ms is not None
    left_ms = first_ms - fit.slope_ms * tokens
    left_ms -= np.median(left_ms)
    worst, where = MISS_PART_SHARE, None
    for part in np.array_split(np.argsort(tokens, kind="stable"), PARTS):
        share = abs(float(np.median(left_ms[part]))) / float(np.median(first_ms[part]))
        uneven = abs(np.count_nonzero(left_ms[part] > 0) - part.size / 2) / (part.size**0.5 / 2)
        if share > worst and uneven > SURE_Z:
            worst = share
            where = f"the best is {share:.0%} off at {tokens[part].min():.0f} to {tokens[part].max():.0f} input tokens"
    return where


def _decode(spans: Sequence[Span]) -> Fit:
    points: list[tuple[int, float, int]] = []
    for span in spans:
        users, values_ms = _users(span), _values(span, "tpot")
        values_ms = values_ms[~np.isnan(values_ms)]
        # A median of 0 says that answers came in one piece, and nothing of their tokens.
        if users is not None and values_ms.size >= FLOORS["p50"] and np.median(values_ms) > 0:
            points.append((users, float(np.median(values_ms)), span.events.index))
    levels = tuple(level for _, _, level in points)
    loads = len({users for users, _, _ in points})
    if loads < LEAST_LEVELS:
        return _not_told(
            f"a line takes a firm TPOT at {LEAST_LEVELS} numbers of users; there are {loads}", len(points), levels
        )
    at, tpot_ms, _ = np.array(points, dtype=np.float64).T
    fit = _line(at, tpot_ms, len(points), levels)
    assert fit.fixed_ms is not None and fit.slope_ms is not None
    missed = np.abs(fit.fixed_ms + fit.slope_ms * at - tpot_ms) / tpot_ms
    worst = int(np.argmax(missed))
    if missed[worst] > MISS_SHARE:
        reason = f"no line describes it: the best is {missed[worst]:.0%} off at {words.users(at[worst])}"
        return _not_told(reason, len(points), levels)
    return fit


def _line(x: Floats, y: Floats, n: int, levels: tuple[int, ...]) -> Fit:
    from scipy.stats import theilslopes  # not at the start of every run

    slope, fixed, low, high = (float(value) for value in theilslopes(y, x, 0.95))
    return Fit(fixed, slope, (low, high) if x.size >= LEAST_POINTS else None, n, levels, None)
