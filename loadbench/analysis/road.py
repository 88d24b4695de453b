"""Whether an open-loop level stayed on the road: whether what was in flight stayed bounded, or went on growing.

Under any load that can be served a queue may grow for a while, by chance. So what was in flight at the end is held
against what a server exactly at its capacity may have had: the requests in service, what came beyond what was asked
for, which is known, and what its own unevenness takes it to once in a hundred levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.span import Span
from loadbench.analysis.stats import Floats
from loadbench.analysis.summary import Road
from loadbench.records import Leg, Open, at

GROWS = "over capacity: it grows with the length of the level"
FALLS = "over capacity: it falls with the length of the level"

SURE_Z, DOUBT_Z = 2.576, 1.645  # begun empty, a queue at its capacity rises beyond once in 100 levels, once in 10
"""Simulated, 300 levels each of 50 to 200 requests and 150 of 500, one and four at a time, service times exponential,
even or of CV 0.3, arrivals constant, Poisson or gamma 0.5: at loads of 0.5 to 0.95 at most 1 of 300 is said to be over
capacity, at 1.0 at most 8. A processor that all share: 2 of 100 at 0.95 and 50 requests, none at 100 and 200.

Found of those at twice the capacity: 83 to 96 % of 50 Poisson arrivals, 62 to 69 % where it or service is burstier, and
95 % or more of 100. At 1.3 times: 69 to 84 % of 100 and 93 to 95 % of 200, of gamma arrivals 60 and 85 %, all of 100
constant ones; of exponential service 23 % of 100 and 94 % of 500: a hundred such answers tell their mean to 10 %, and
no test tells more. Of 16 at a time 52 % of 200 at 1.3 times, 92 % of 100 at twice; the others are mostly undecided, as
so short a level is but some answers long.

A server that gains by batches of dozens takes minutes to settle: given 80 % of its most, up to 16 of 100 shorter levels
are told to be over its capacity, given 95 % half of them. They do grow until their end."""

LEAST_REQUESTS = 20
LEAST_RISE = 3.0  # requests
LEAST_SHARE = 0.05  # of what came: within 5 % of the capacity no level is long enough
LATE_SHARE = 0.10  # of the rise in its second half; what only fills up rises at first
LEAST_ANSWERS = 10  # so many after each other, or a level may still be filling the server when it ends
CLEAR_SHARE = 0.25  # of what came: so much more than could be served is none of that
LEAST_CV, MOST_CV = 0.15, 1.5
LEAST_KNOWN = 5
FIRST = 8  # requests, which find the server as it is without a queue
DECODES_SHARE = 0.2  # of an answer: less, and the time of its tokens says nothing of the work in it
GRID = 2_000


def is_over(road: Road | None) -> bool:
    """Whether more came than could be served."""
    return road is not None and road.result == "over_capacity"


@dataclass(frozen=True, slots=True)
class Flow:
    """What came and went until the level stopped issuing, in seconds from its start, both in order of time.

    ``alone_s`` is what an answer takes without a queue, ``cv`` how uneven the work in them is: standard deviation ÷
    mean. ``began`` and ``ended`` are the first and the last token of every answer there ever was.
    """

    load: Open
    came: Floats
    went: Floats
    until_s: float
    alone_s: float
    cv: float
    began: Floats
    ended: Floats

    def in_flight(self, moments: Floats) -> Floats:
        """How many were in flight."""
        more = np.searchsorted(self.came, moments, "right") - np.searchsorted(self.went, moments, "right")
        return more.astype(np.float64)

    def in_flight_at(self, moment_s: float) -> float:
        """How many were in flight then."""
        return float(self.in_flight(np.array([moment_s]))[0])

    def asked(self, moments: Floats) -> Floats:
        """How many requests were asked for until then; of a trace its mean rate holds."""
        if self.load.legs:
            return asked_until(self.load.legs, moments)
        return moments * (self.came.size / self.until_s if self.load.trace else self.load.rate_per_s)

    def asked_at(self, moment_s: float) -> float:
        """The rate that was asked for then."""
        if self.load.legs:
            return at(self.load.legs, moment_s)
        return float(self.asked(np.array([1.0]))[0])

    def needs(self, moments: Floats) -> Floats:
        """How many are in flight without any queue: rate × time, and at least one."""
        if not self.load.legs:
            return np.full(moments.shape, max(1.0, self.asked_at(0.0) * self.alone_s))
        rates = np.array([at(self.load.legs, moment) for moment in moments.tolist()])
        return np.maximum(1.0, rates * self.alone_s)

    def answers_per_s(self, since_s: float) -> float:
        """How many answers it gave from then on, of one that was under way then or at the end its share."""
        inside_s = np.minimum(self.ended, self.until_s) - np.maximum(self.began, since_s)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.clip(inside_s / (self.ended - self.began), 0.0, 1.0)
        whole = (self.ended > since_s) & (self.ended <= self.until_s)
        return float(np.where(self.ended > self.began, shares, whole).sum()) / (self.until_s - since_s)


def asked_until(legs: Sequence[Leg], moments: Floats) -> Floats:
    """The load summed up from the level's start to these moments."""
    left, asked = moments.astype(np.float64), np.zeros(moments.shape)
    for leg in legs:
        within = np.clip(left, 0.0, leg.over_s)
        asked += leg.start * within + (leg.end - leg.start) * within**2 / (2 * leg.over_s)
        left = left - leg.over_s
    return asked + np.maximum(left, 0.0) * legs[-1].end


def road_of(span: Span) -> Road | None:
    """Whether the level kept on it; None for a closed loop, where no more are in flight than there are users."""
    if span.plan["load"]["kind"] == "closed":
        return None
    if not span.ok.any():
        return Road("undecided", "nothing succeeded")
    flow = _flow(span)
    if flow.came.size < LEAST_REQUESTS:
        return Road("undecided", f"{flow.came.size} requests; it takes {LEAST_REQUESTS}")
    dropped = int(np.count_nonzero(span.samples.said(span.samples.outcome, "dropped")))
    road = _judged(flow, varies=span.changes)
    if dropped and road.result != "over_capacity":
        reason = f"{dropped} of {len(span.samples)} requests were dropped, so no more could be in flight"
        return Road("undecided", reason)
    return road


def _flow(span: Span) -> Flow:
    samples, events = span.samples, span.events
    until_ns = span.end_ns if events.issue_end_ns is None else events.issue_end_ns
    came = np.sort((samples.sent_ns[~np.isnan(samples.sent_ns)] - events.start_ns) / 1e9)
    went = np.sort((samples.done_ns[~np.isnan(samples.done_ns)] - events.start_ns) / 1e9)
    until_s = max((until_ns - events.start_ns) / 1e9, 1e-3)
    e2e = LATENCIES["e2e"].series["service"]
    assert e2e is not None
    took_s = e2e(samples.take(span.ok)) / 1e9
    alone_s = float(min(np.nanmedian(took_s[:FIRST]), np.nanquantile(took_s, 0.25)))
    ended = (samples.last_token_ns - events.start_ns) / 1e9
    began = np.where(np.isnan(samples.first_token_ns), ended, (samples.first_token_ns - events.start_ns) / 1e9)
    answered = ~np.isnan(ended)
    return Flow(
        load=Open.from_json(span.plan["load"]),
        came=came[came <= until_s],
        went=went[went <= until_s],
        until_s=until_s,
        alone_s=alone_s,
        cv=_cv(span, alone_s),
        began=began[answered],
        ended=ended[answered],
    )


def _cv(span: Span, alone_s: float) -> float:
    """How uneven the work is, told from the time that answers take once they have begun, or from their lengths.

    On a server whose streams slow each other down that time varies more than the work, and so does what is in flight.
    """
    answers = span.samples.take(span.ok)
    streamed_s = (answers.last_token_ns - answers.first_token_ns) / 1e9
    if np.nan_to_num(streamed_s).mean() < DECODES_SHARE * alone_s:
        streamed_s = answers.output_tokens
    known = streamed_s[~np.isnan(streamed_s)]
    if known.size < LEAST_KNOWN or not known.mean():
        return 1.0
    return float(np.clip(known.std() / known.mean(), LEAST_CV, MOST_CV))


def _judged(flow: Flow, varies: bool) -> Road:
    """Where the rate is constant, the rise after a quarter of the level; else all that is more than the load needs."""
    since_s = 0.0 if varies else min(max(flow.until_s / 4, flow.alone_s), flow.until_s / 2)
    needs = float(flow.needs(np.array([flow.until_s]))[0])
    first, middle, last = map(flow.in_flight_at, (since_s, (since_s + flow.until_s) / 2, flow.until_s))
    before = needs if varies else max(first, needs)
    came = int(np.count_nonzero(flow.came > since_s))
    went = int(np.count_nonzero(flow.went > since_s))
    # Of what is in flight without a queue, chance moves as many as its root (M/G/∞); one is for the moment of the end.
    chance = math.sqrt(flow.cv**2 * went + min(before, needs) + 1)
    excess = last - before - _luck(flow, since_s)
    matters = excess >= LEAST_RISE and excess >= LEAST_SHARE * came
    goes_on = varies or last - middle >= LATE_SHARE * (last - before)
    began = f"{first:.0f} in flight after {since_s:.0f} s"
    if varies:
        began = f"{needs:.0f} in flight without a queue, {flow.in_flight(flow.came).max():.0f} at the most"
    told = (
        f"{began}, {last:.0f} at the end; chance takes it to {last - excess + SURE_Z * chance:.0f} in 1 of 100 levels"
    )
    if not matters or excess < DOUBT_Z * chance:
        return Road("steady", told)
    if not goes_on:
        return Road("undecided", f"{told}, but most of them came in the first half: hold it longer")
    if excess < SURE_Z * chance:
        return Road("undecided", f"{told}: hold it longer")
    if flow.until_s < LEAST_ANSWERS * flow.alone_s and excess < CLEAR_SHARE * came:
        return Road("undecided", f"{told}, but an answer takes {flow.alone_s:.1f} s: hold it longer")
    left_s = _left(flow, varies)
    growth_per_s = (last - flow.in_flight_at(left_s)) / (flow.until_s - left_s)
    return Road("over_capacity", told, left_s, flow.asked_at(left_s), growth_per_s)


def _unqueued(flow: Flow, since_s: float) -> Floats:
    """The moments just before an arrival at which no more were in flight than the load needs."""
    moments = flow.came[flow.came > since_s]
    return moments[flow.in_flight(moments) - 1 <= flow.needs(moments)]


def _luck(flow: Flow, since_s: float) -> float:
    """The most that came beyond what was asked for since a moment at which the server may have had time to spare.

    A server just at its capacity would have so many waiting.
    """
    moments = np.concatenate([[since_s], _unqueued(flow, since_s)])
    came = flow.came.size - np.searchsorted(flow.came, moments, "left")
    asked = flow.asked(np.array([flow.until_s])) - flow.asked(moments)
    return max(0.0, float((came - asked).max()))


def _left(flow: Flow, varies: bool) -> float:
    """When the level left the road: the last moment without a queue.

    Where the rate changes, the last at which a queue of the capacity seen at the end would have been empty: close to
    its capacity a server has a queue by chance for long before.
    """
    without = _unqueued(flow, 0.0)
    last_s = min(float(without[-1]), flow.until_s * (1 - 1 / GRID)) if without.size else 0.0
    if not (varies and flow.load.legs):
        return last_s
    since_s = max(last_s, 0.75 * flow.until_s)
    moments = np.linspace(0.0, flow.until_s, GRID, endpoint=False)
    waiting = flow.asked(moments) - flow.answers_per_s(since_s) * moments
    empty = np.flatnonzero(waiting <= np.minimum.accumulate(waiting))
    return float(moments[min(empty[-1] + 1, GRID - 1)])  # a spike has begun then
