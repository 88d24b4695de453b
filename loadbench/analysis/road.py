"""Whether an open-loop level stayed on the road: whether what was in flight stayed bounded, or went on growing.

Under any load that can be served a queue may grow for a while, by chance. So what was in flight at the end is held
against what a server exactly at its capacity may have had: the requests in service, what came beyond what was asked
for, which is known, and what its own unevenness takes it to once in a hundred levels.

That nothing grew beyond chance is not yet steady: that is a claim of its own, and takes evidence of time to spare.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.rundir import RunData, Samples
from loadbench.analysis.span import Span, headline_of, span_of
from loadbench.analysis.stats import NS_PER_MS, Floats
from loadbench.analysis.steady import drift
from loadbench.analysis.summary import Level, Road
from loadbench.analysis.words import time
from loadbench.records import Leg, Open, at
from loadbench.target.state import DEAD

GROWS = "over capacity: it grows with the length of the level"
FALLS = "over capacity: it falls with the length of the level"

SURE_Z, DOUBT_Z = 2.576, 1.645  # begun empty, a queue at its capacity rises beyond once in 100 levels, once in 10
"""Simulated, 300 levels each of 50 to 500 requests, one, four and sixteen at a time, service times exponential, even or
of CV 0.3, arrivals constant, Poisson or gamma 0.5, and 100 on a processor that all share: at loads of 0.5 to 0.95 at
most 2 of 300 are said to be over capacity, at 1.0 at most 5; of the shared ones 1 and 4 of 100.

Found at twice the capacity: 66 to 100 % of 50 requests (16 at a time: 1 %), 90 % or more of 100. At 1.3 times, of
CV 0.3: 79 % or more of 100 and 96 % of 200, of gamma arrivals 56 and 85 %; of exponential service 25 and 50 %, and 94 %
of 500: a hundred such answers tell their mean to 10 %, and no test tells more.

A server that gains by batches of dozens takes minutes to settle: given 80 % of its most, up to 16 of 100 shorter levels
are told to be over its capacity, given 95 % half of them. They do grow until their end.

Said to be steady of 100 and 500 requests, in percent: at a load of 0.5 75 to 96 and 93 to 100, at 0.7 55 to 81 and 79
to 97, at 0.9 25 to 35 and 36 to 54, at 1.0, which grows by chance alone, 13 to 17 and 10 to 15, at 1.1 up to 10 and 2,
at 1.3 up to 2 and 0. Of 50 requests up to 21 at 1.0, 12 at 1.1 and 8 at 1.3. Constant arrivals, which bring no chance
of their own: 88 at 0.9, 33 and 19 at 1.0, at most 1 beyond. All else is undecided."""

LEAST_REQUESTS = 20
LEAST_RISE = 3.0  # requests
LEAST_SHARE = 0.05  # of what came: within 5 % of the capacity no level is long enough
LATE_SHARE = 0.10  # of the rise in its second half; what only fills up rises at first
LEAST_ANSWERS = 10  # so many after each other, or a level may still be filling the server when it ends
CLEAR_SHARE = 0.25  # of what came: so much more than could be served is none of that
LEAST_CV, MOST_CV = 0.15, 1.5
LEAST_KNOWN = 5
FIRST = 8  # requests, which find the server as it is without a queue
SHORT_SHARE = 0.05  # of what came: so much less that went is not steady
WANDERS = 0.6  # of what a queue at its capacity moves in one standard deviation: 1 in 25 of them stays within so little
SPARE = 2.0  # roots of the number of later arrivals: at its capacity hardly so many of them find no queue
LEAST_FILLED = 5  # answers after each other, before what is in flight without a queue is
DECODES_SHARE = 0.2  # of an answer: less, and the time of its tokens says nothing of the work in it
GRID = 2_000
AT_ONCE_S = 0.5  # what left the road sooner was never on it


def is_over(road: Road | None) -> bool:
    """Whether more came than could be served."""
    return road is not None and road.result == "over_capacity"


def told_spans(run: RunData, levels: Sequence[Level]) -> Iterator[tuple[Level, Span]]:
    """Each of these levels with what its figures are of: of one over capacity there is no warm-up to leave out."""
    events = {events.index: events for events in run.levels}
    for level in levels:
        span = span_of(run, events[level.index])
        yield level, span.unsettled() if is_over(level.road) else span


@dataclass(frozen=True, slots=True)
class Flow:
    """What came until the level stopped issuing, at ``until_s``, and what went, in seconds from its start and in order.

    ``alone_s`` is what an answer takes without a queue, as far as is known; ``seen_s`` what the quick ones of this
    level took. ``cv`` is how uneven the work in them is: standard deviation ÷ mean. ``began`` and ``ended`` are the
    first and the last token of every answer there ever was, ``shares`` how much of it that was: of one cut off, a part.
    ``waits_ms`` are the first tokens' latencies, or without streaming the answers', in the order in which they were
    due. ``gone`` goes on to the end of the drain.
    """

    load: Open
    came: Floats
    gone: Floats
    until_s: float
    alone_s: float
    seen_s: float
    cv: float
    began: Floats
    ended: Floats
    shares: Floats
    waits_ms: Floats

    def in_flight(self, moments: Floats) -> Floats:
        """How many were in flight."""
        more = np.searchsorted(self.came, moments, "right") - np.searchsorted(self.gone, moments, "right")
        return more.astype(np.float64)

    def between(self, moments: Floats, since_s: float) -> int:
        """How many of these lie between then and the end of issuing."""
        return int(np.count_nonzero((moments > since_s) & (moments <= self.until_s)))

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

    def answers_per_s(self, since_s: float, until_s: float) -> float:
        """How many answers' worth of work it did between these: of one under way at an end, or given up, its share."""
        inside_s = np.minimum(self.ended, until_s) - np.maximum(self.began, since_s)
        with np.errstate(divide="ignore", invalid="ignore"):
            within = np.clip(inside_s / (self.ended - self.began), 0.0, 1.0)
        whole = (self.ended > since_s) & (self.ended <= until_s)
        return float((self.shares * np.where(self.ended > self.began, within, whole)).sum()) / (until_s - since_s)


def asked_until(legs: Sequence[Leg], moments: Floats) -> Floats:
    """The load summed up from the level's start to these moments."""
    left, asked = moments.astype(np.float64), np.zeros(moments.shape)
    for leg in legs:
        within = np.clip(left, 0.0, leg.over_s)
        asked += leg.start * within + (leg.end - leg.start) * within**2 / (2 * leg.over_s)
        left = left - leg.over_s
    return asked + np.maximum(left, 0.0) * legs[-1].end


def roads_of(run: RunData, spans: Sequence[Span]) -> list[Road | None]:
    """Whether each of these levels kept on the road; of one that a lower rate did not keep on it, no one claims so."""
    alone_s = _alone_s(run, spans)
    roads = [road_of(span, None if _is_probe(span) else alone_s.get(span.plan["model"])) for span in spans]
    roads = [_of_all(span, road) for span, road in zip(spans, roads, strict=True)]
    return [_beside(span, road, spans, roads) for span, road in zip(spans, roads, strict=True)]


def road_of(span: Span, alone_s: float | None = None) -> Road | None:
    """Whether the level kept on it; None for a closed loop, where no more are in flight than there are users.

    ``alone_s`` is what an answer takes without company, where that is known from elsewhere: a level that is far beyond
    its capacity has no answer that was not slowed down.
    """
    if span.plan["load"]["kind"] == "closed":
        return None
    if not span.ok.any():
        return Road("undecided", "nothing succeeded")
    flow = _flow(span, alone_s)
    if flow.came.size < LEAST_REQUESTS:
        return Road("undecided", f"{flow.came.size} requests; it takes {LEAST_REQUESTS}")
    dropped = int(np.count_nonzero(span.samples.said(span.samples.outcome, "dropped")))
    road = judged(flow, varies=span.changes)
    if dropped and road.result != "over_capacity":
        reason = f"{dropped} of {len(span.samples)} requests were dropped, so no more could be in flight"
        return replace(road, result="undecided", because=reason)
    return road


def _alone_s(run: RunData, spans: Sequence[Span]) -> dict[str, float]:
    """What an answer takes without company, by model: the mean of a level of one user, or of the warm-up."""
    warm = run.samples.take(run.samples.said(run.samples.phase, "warmup"))
    warm = warm.take(warm.said(warm.outcome, "ok") & (warm.level >= 0))
    levels = run.facts["levels"]
    # A run that only gathers answers to be marked has warm-ups, and no levels.
    planned = [index for index in np.unique(warm.level).tolist() if index < len(levels)]
    told = [(levels[index]["model"], warm.take(warm.level == index)) for index in planned]
    told += [(span.plan["model"], span.samples.take(span.ok)) for span in spans if _is_of_one(span)]
    found: dict[str, float] = {}
    for model, answers in told:
        found[model] = min(float(np.mean(_took_s(answers))), found.get(model, math.inf))
    return found


def _is_probe(span: Span) -> bool:
    """Whether a search stands on it, which judged it alone while the run went on, and must not be contradicted."""
    return bool(span.plan.get("purpose", "level") != "level")


def _is_of_one(span: Span) -> bool:
    load = span.plan["load"]
    if load["kind"] != "closed" or load["concurrency"] != 1 or span.changes or span.is_rung:
        return False
    return int(np.count_nonzero(span.ok)) >= LEAST_KNOWN


def _of_all(span: Span, road: Road | None) -> Road | None:
    """What an endpoint refuses because it is dead is off the road at once, and no sign that a fleet keeps up."""
    states = (span.events.end or {}).get("target", {}).get("endpoints") or ()
    if road is None or road.result != "steady" or not any(at["state"] in DEAD for at in states):
        return road
    return replace(road, result="undecided", because="an endpoint of the fleet was dead")


def _beside(span: Span, road: Road | None, spans: Sequence[Span], roads: Sequence[Road | None]) -> Road | None:
    if road is None or road.result != "steady" or span.changes:
        return road
    load = Open.from_json(span.plan["load"])
    for other, others in zip(spans, roads, strict=True):
        if is_over(others) and not other.changes and other.plan["model"] == span.plan["model"]:
            lower = Open.from_json(other.plan["load"])
            if lower.rate_per_s < load.rate_per_s:
                return replace(road, result="undecided", because=f"{lower.rate_per_s:.3g}/s was over capacity")
    return road


def _took_s(answers: Samples) -> Floats:
    e2e = LATENCIES["e2e"].series["service"]
    assert e2e is not None
    return e2e(answers) / 1e9


def _flow(span: Span, alone_s: float | None) -> Flow:
    samples, events = span.samples, span.events
    until_ns = span.end_ns if events.issue_end_ns is None else events.issue_end_ns
    came = np.sort((samples.sent_ns[~np.isnan(samples.sent_ns)] - events.start_ns) / 1e9)
    gone = np.sort((samples.done_ns[~np.isnan(samples.done_ns)] - events.start_ns) / 1e9)
    until_s = max((until_ns - events.start_ns) / 1e9, 1e-3)
    took_s = _took_s(samples.take(span.ok))
    first_s = float(np.nanmedian(took_s[:FIRST]))
    seen_s = min(first_s, float(np.nanquantile(took_s, 0.25)))
    ended = (samples.last_token_ns - events.start_ns) / 1e9
    began = np.where(np.isnan(samples.first_token_ns), ended, (samples.first_token_ns - events.start_ns) / 1e9)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.clip(samples.chunks / np.median(samples.chunks[span.ok]), 0.0, 1.0)
    answered = ~np.isnan(ended)
    _, waits_ns = headline_of(samples, span.ok, span.headline)
    return Flow(
        load=Open.from_json(span.plan["load"]),
        came=came[came <= until_s],
        gone=gone,
        until_s=until_s,
        alone_s=seen_s if alone_s is None else min(first_s, alone_s),
        seen_s=seen_s,
        cv=_cv(span, seen_s),
        began=began[answered],
        ended=ended[answered],
        shares=np.where(span.ok, 1.0, np.nan_to_num(parts))[answered],
        waits_ms=waits_ns[~np.isnan(waits_ns)] / NS_PER_MS,
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


def judged(flow: Flow, varies: bool) -> Road:
    """Where the rate is constant, the rise after a quarter of the level; else all that is more than the load needs."""
    since_s = 0.0 if varies else min(max(flow.until_s / 4, flow.alone_s), flow.until_s / 2)
    needs = float(flow.needs(np.array([flow.until_s]))[0])
    first, middle, last = map(flow.in_flight_at, (since_s, (since_s + flow.until_s) / 2, flow.until_s))
    before = needs if varies else max(first, needs)
    came, went = flow.between(flow.came, since_s), flow.between(flow.gone, since_s)
    # Of what is in flight without a queue, chance moves as many as its root (M/G/∞); one is for the moment of the end.
    chance = math.sqrt(flow.cv**2 * went + min(before, needs) + 1)
    excess = last - before - _luck(flow, since_s)
    matters = excess >= LEAST_RISE and excess >= LEAST_SHARE * came
    goes_on = varies or last - middle >= LATE_SHARE * (last - before)
    began = f"{first:.0f} in flight after {since_s:.3g} s"
    if varies:
        began = f"{needs:.0f} in flight without a queue, {flow.in_flight(flow.came).max():.0f} at the most"
    told = (
        f"{began}, {last:.0f} at the end; chance takes it to {last - excess + SURE_Z * chance:.0f} in 1 of 100 levels"
    )
    road = Road("undecided", told)
    if varies:
        most, most_s, gone_s = _rush(flow)
        road = replace(road, most_in_flight=most, most_at_s=most_s, worked_off_s=gone_s)
    if not matters or excess < DOUBT_Z * chance:
        doubt = None if varies else _unsteady(flow)
        return replace(road, because=doubt) if doubt else replace(road, result="steady")
    if not goes_on:
        return replace(road, because=f"{told}, but most of them came in the first half: hold it longer")
    if excess < SURE_Z * chance:
        return replace(road, because=f"{told}: hold it longer")
    if flow.until_s < LEAST_ANSWERS * flow.seen_s and excess < CLEAR_SHARE * came:
        return replace(road, because=f"{told}, but an answer takes {flow.seen_s:.1f} s: hold it longer")
    left_s = _left(flow, varies)
    growth_per_s = (last - flow.in_flight_at(left_s)) / (flow.until_s - left_s)
    busy_s = float(flow.gone[-int(last / 2) - 1]) if last >= 2 else flow.until_s  # the half of a queue keeps it busy
    given_per_s = flow.answers_per_s(left_s, max(flow.until_s, busy_s))
    return replace(
        road,
        result="over_capacity",
        left_s=left_s,
        left_at=flow.asked_at(left_s),
        growth_per_s=growth_per_s,
        given_per_s=given_per_s,
    )


def _unsteady(flow: Flow) -> str | None:
    """Why a constant rate is not said to be kept up with; None: what went, how late, and time to spare say it is.

    Time to spare shows in one of two ways. What is in flight wanders less than a queue at its capacity, begun empty,
    would in so many requests. Or late arrivals often find no queue, as they hardly do where it only fails to grow.
    """
    since_s = min(max(flow.until_s / 8, flow.alone_s), flow.until_s / 2)
    came, went = flow.between(flow.came, since_s), flow.between(flow.gone, since_s)
    if flow.until_s < LEAST_FILLED * flow.alone_s:
        return f"an answer takes {flow.alone_s:.1f} s: hold it longer"
    if came - went > max(LEAST_RISE, SHORT_SHARE * came):
        return f"of {came} requests after {since_s:.3g} s {went} were served: hold it longer"
    found = drift(flow.waits_ms)
    if found and found.last > found.first:
        return f"latencies rise, from {time(found.first)} to {time(found.last)} (p50 of the first and last third)"
    moments = flow.came[flow.came > since_s]
    inside = flow.in_flight(moments)
    gaps = np.diff(moments)
    bursts = 0.0 if gaps.size < LEAST_KNOWN else float(gaps.var() / gaps.mean() ** 2)
    wanders = float(inside.max() - inside.min())
    late = moments[moments > flow.until_s / 2]
    spare = int(np.count_nonzero(flow.in_flight(late) - 1 <= flow.needs(late)))
    if wanders <= max(LEAST_RISE, WANDERS * math.sqrt((bursts + flow.cv**2) * went)):
        return None
    if spare >= SPARE * math.sqrt(late.size):
        return None
    return f"{came:,} requests do not tell it from a load just at its capacity: hold it longer"


def _rush(flow: Flow) -> tuple[int | None, float | None, float | None]:
    """The most in flight, when, and when after that there was no queue any more, while it issued or in the drain.

    None where chance brings together as many without any queue.
    """
    inside = flow.in_flight(flow.came)
    most_s = float(flow.came[int(np.argmax(inside))])
    needs = float(flow.needs(flow.came).max())
    if inside.max() <= needs + LEAST_RISE + SURE_Z * math.sqrt(needs):
        return None, None, None
    after = flow.gone[flow.gone > most_s]
    without = after[flow.in_flight(after) <= flow.needs(after)]
    return int(inside.max()), most_s, float(without[0]) if without.size else None


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
    waiting = flow.asked(moments) - flow.answers_per_s(since_s, flow.until_s) * moments
    empty = np.flatnonzero(waiting <= np.minimum.accumulate(waiting))
    return float(moments[min(empty[-1] + 1, GRID - 1)])  # a spike has begun then
