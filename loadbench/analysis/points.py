"""A level as a point of the capacity curve: what it served per second at its own load, without how it began.

A closed loop with every user busy is counted by shares: a request in flight at an edge of the time that counts, counts
by the part of its time that lies inside. Without failures that is the interactive response time law X = N / E2E
(Denning & Buzen 1978) to the digit, so the two cannot disagree; it also holds with failures, is not biased by which
requests happen to end inside, and knows no ±k where k answers end together. The last requests end while users leave,
sooner than under the load: a level has to last longer than an answer. What is in flight under an open loop may grow,
and then shares would count what was never served: there whole completions count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from loadbench.analysis.cautions import client_bound
from loadbench.analysis.findings import Point
from loadbench.analysis.rundir import Mask, Samples
from loadbench.analysis.span import Span
from loadbench.analysis.stats import FLOORS, NS_PER_MS, Floats, Range
from loadbench.analysis.summary import Level

ANSWERS = 2  # a batch lasts so many
BATCHES = (5, 20)  # fewer leave no variance to tell, more are shorter than what they should be independent of
LEAST_SHARE = 0.01  # a constant server has no variance, and yet no clock and no machine repeats itself to 1 %
BUSY_SHARE = 0.2  # of all cores: levels of one machine whose speed changes between them draw a curve of their own
REFUSALS = ("http_4xx", "http_5xx")
REJECTED_SHARE = 0.03  # of the requests: fewer fail for many reasons
LEAST_STREAM = 0.05  # of E2E: in less nothing of the work is seen
SERVES_ON = (None, "healthy", "degraded")  # what refuses beyond its queue is degraded, and serves on all the while


@dataclass(frozen=True, slots=True)
class Seen:
    """A point with the mean times it stands on; ``stream_ms`` is from the first token to the last.

    ``doubt`` says why it is not firm; ``rejected_share`` of its requests was refused, None where the target broke.
    """

    point: Point
    ttft_ms: float | None
    stream_ms: float | None
    doubt: str | None
    rejected_share: float | None = None


def see(span: Span, level: Level) -> Seen:
    """The point of one plain level, without ``in_service``, which takes the others."""
    samples, ok = span.samples, span.ok
    closed = span.plan["load"]["kind"] == "closed"
    load = span.plan["load"]["concurrency" if closed else "rate_per_s"]
    since_ns = max(span.start_ns, _all_answered_ns(samples, load if closed else 1, span.end_ns))
    whole = np.asarray((samples.done_ns > since_ns) & (samples.done_ns <= span.end_ns), dtype=np.float64)
    share = _shares(samples.due_ns, samples.done_ns, since_ns, span.end_ns) if closed else whole
    seconds, served = (span.end_ns - since_ns) / 1e9, float(share[ok].sum())
    ended = int(whole[ok].sum())
    per_s = served / seconds if seconds > 0 and served > 0 else None
    e2e_ms = _mean_ms(samples.last_token_ns - samples.sent_ns, share * ok)
    stream_ms = _mean_ms(samples.last_token_ns - samples.first_token_ns, share * ok)
    doubt, ours = None, client_bound(level.client, level.latency_ms, whole=True)
    if ended < FLOORS["p50"]:
        doubt = f"only answers after every user's first count here, and there are {ended}; it takes {FLOORS['p50']}"
    elif closed and e2e_ms and seconds < e2e_ms / 1e3:
        doubt = f"{seconds:.1f} s were left once every user had an answer, and an answer takes {e2e_ms / 1e3:.1f} s"
    elif ours:
        doubt = f"the client was the limit: {'; '.join(ours)}"
    elif level.target.state not in SERVES_ON:
        doubt = f"the target was {level.target.state} after it"
    elif level.client.others_share is not None and level.client.others_share > BUSY_SHARE:
        doubt = f"other programs used {level.client.others_share:.0%} of this machine's CPU"
    return Seen(
        Point(
            level=level.index,
            load=float(load),
            per_s=per_s,
            per_s_interval_95=None if per_s is None else _interval(span, closed, since_ns, per_s, e2e_ms or 0.0),
            tokens_per_s=_tokens_per_s(samples, share * ok, seconds) if per_s else None,
            e2e_mean_ms=e2e_ms,
            in_service=None,
            firm=doubt is None and per_s is not None,
            doubt=doubt,
        ),
        ttft_ms=_mean_ms(samples.first_token_ns - samples.sent_ns, share * ok),
        stream_ms=stream_ms if stream_ms and e2e_ms and stream_ms > LEAST_STREAM * e2e_ms else None,
        doubt=doubt,
        rejected_share=_rejected_share(samples, ok) if level.target.state in SERVES_ON else None,
    )


def rejects_from(seen: Sequence[Seen]) -> float | None:
    """The load from which on requests are refused, where lower loads were not; None: there is none."""
    told = [one for one in seen if one.rejected_share is not None]
    served = [one.point.load for one in told if (one.rejected_share or 0.0) <= REJECTED_SHARE]
    refused = [one.point.load for one in told if (one.rejected_share or 0.0) > REJECTED_SHARE]
    return min(refused) if served and refused and max(served) < min(refused) else None


def _rejected_share(samples: Samples, ok: Mask) -> float | None:
    """The share of requests that were refused: an HTTP error that came sooner than half of the answers do."""
    took_ns = samples.done_ns - samples.due_ns
    if not ok.any():
        return None
    refused = np.logical_or.reduce([samples.said(samples.outcome, name) for name in REFUSALS])
    return float(np.mean(refused & (took_ns < np.median(took_ns[ok]))))


def with_in_service(seen: Sequence[Seen]) -> list[Seen]:
    """The points with how many were worked on: Little's law on the time in service, where a queue is before the stream.

    That is the stream, and before it what the first token takes where nothing queues, made as much longer as the stream
    is and throughput is not: who shares a processor shares it before the first token too. It is never above the TTFT.
    """
    low = next((one for one in seen if one.point.firm and one.stream_ms and one.ttft_ms), None)
    if low is None:
        return list(seen)
    assert low.stream_ms is not None and low.point.per_s is not None
    least_ms = min(one.ttft_ms for one in seen if one.point.firm and one.ttft_ms is not None)
    told = []
    for one in seen:
        if one.stream_ms is None or one.ttft_ms is None or one.point.per_s is None:
            told.append(one)
            continue
        slower = one.stream_ms / low.stream_ms * min(1.0, low.point.per_s / one.point.per_s)
        before_ms = min(one.ttft_ms, least_ms * max(1.0, slower))
        in_service = one.point.per_s * (before_ms + one.stream_ms) / 1e3
        told.append(replace(one, point=replace(one.point, in_service=in_service)))
    return told


def _all_answered_ns(samples: Samples, users: int, end_ns: int) -> int:
    """When each of the first ``users`` requests had ended, which is every user's first; never: the level's end.

    An empty server answers the first of them sooner than it ever does again.
    """
    done_ns = samples.done_ns[:users]
    return end_ns if done_ns.size < users or np.isnan(done_ns).any() else int(done_ns.max())


def _shares(due_ns: Floats, done_ns: Floats, since_ns: float, end_ns: float) -> Floats:
    """The share of each request's time, from due to done, that lies between these moments."""
    inside_ns = np.minimum(done_ns, end_ns) - np.maximum(due_ns, since_ns)
    share: Floats = np.clip(np.nan_to_num(inside_ns / np.maximum(done_ns - due_ns, 1.0)), 0.0, 1.0)
    return share


def _interval(span: Span, closed: bool, since_ns: int, per_s: float, e2e_ms: float) -> Range:
    """95 % by batch means, at least 1 % and one completion to either side.

    A batch lasts two answers at least where the level does ten, so that batches hardly know of each other. Else the
    shares of one answer would make neighbours alike (of 95 % intervals 43 to 84 % held the truth), and whole
    completions count, of which the interval is wider, and holds it in 90 % and more.
    """
    from scipy.special import stdtrit

    seconds = (span.end_ns - since_ns) / 1e9
    answers = seconds / max(1e-3 * e2e_ms, 1e-9)
    batches = int(np.clip(answers / ANSWERS, *BATCHES))
    edges_ns = np.linspace(since_ns, span.end_ns, batches + 1)
    due_ns, done_ns = span.samples.due_ns[span.ok], span.samples.done_ns[span.ok]
    if closed and answers >= ANSWERS * batches:
        counts = np.array([_shares(due_ns, done_ns, *edges).sum() for edges in pairwise(edges_ns)])
    else:
        counts = np.histogram(done_ns, edges_ns)[0].astype(np.float64)
    error = float(counts.std(ddof=1)) / (seconds / batches) / batches**0.5
    half = max(float(stdtrit(batches - 1, 0.975)) * error, LEAST_SHARE * per_s + 1 / seconds)
    return (max(per_s - half, 0.0), per_s + half)


def _mean_ms(values_ns: Floats, share: Floats) -> float | None:
    """Their mean, each by its share; None where there is none."""
    known = ~np.isnan(values_ns) & (share > 0)
    return float(np.average(values_ns[known], weights=share[known])) / NS_PER_MS if known.any() else None


def _tokens_per_s(samples: Samples, share: Floats, seconds: float) -> float | None:
    known = ~np.isnan(samples.output_tokens)
    return float(np.dot(samples.output_tokens[known], share[known])) / seconds if known.any() else None
