"""METRICS: what is measured, each in one row: name, title, unit, definition, and how it comes from the samples.

To add a metric from existing stamps, add a row; JSON and its schema, CSV, console, report and README follow. The
definitions are the words users read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loadbench.analysis.rundir import Mask, Samples
from loadbench.analysis.stats import Distribution, Floats
from loadbench.records import STALL_NS

Series = Literal["service", "response"]
Stamps = Callable[[Samples], Floats]


@dataclass(frozen=True, slots=True)
class Metric:
    """A latency of one request. ``series`` gives nanoseconds per sample, NaN where it does not exist.

    A series of None is recorded as a histogram only. ``of`` names the requests that count.
    """

    name: str
    title: str
    definition: str
    series: Mapping[Series, Stamps | None]
    of: Literal["ok", "sent"] = "ok"
    unit: str = "ms"
    lower_is_better: bool = True


@dataclass(frozen=True, slots=True)
class Window:
    """What rates are made of: a level's samples and the time in which it was under its load, without its warm-up.

    ``inside`` marks the requests that were due in that time; ``good`` those that met the SLO, None where there is none
    for single requests. ``latency_ms`` is by metric and series. ``watts`` is the mean power, where it is known.
    """

    samples: Samples
    ok: Mask
    inside: Mask
    good: Mask | None
    start_ns: int
    end_ns: int
    latency_ms: Mapping[str, Mapping[str, Distribution]]
    watts: float | None = None

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    def per_s(self, amount: float) -> float | None:
        """An amount in the window as a rate, None for a window without length."""
        return amount / self.seconds if self.seconds > 0 else None

    def done_inside(self, mask: Mask) -> int:
        """How many of these ended inside the window."""
        done_ns = self.samples.done_ns[mask]
        return int(np.count_nonzero((done_ns >= self.start_ns) & (done_ns <= self.end_ns)))

    def in_flight(self) -> float | None:
        """The time-weighted mean of requests in flight."""
        done_ns = np.where(np.isnan(self.samples.done_ns), self.end_ns, self.samples.done_ns)
        inside_ns = np.minimum(done_ns, self.end_ns) - np.maximum(self.samples.sent_ns, self.start_ns)
        return self.per_s(float(np.nansum(np.maximum(inside_ns, 0.0))) / 1e9)


@dataclass(frozen=True, slots=True)
class Rate:
    """A number per level."""

    name: str
    title: str
    unit: str
    definition: str
    how: Callable[[Window], float | None]
    lower_is_better: bool = False


def _tpot(samples: Samples) -> Floats:
    """Absent for one token, and for an answer that came in one piece: its tokens have no times of their own."""
    spread = (samples.output_tokens > 1) & (samples.chunks > 1)
    between = np.where(spread, samples.output_tokens - 1, np.nan)
    return (samples.last_token_ns - samples.first_token_ns) / between


def _tokens_inside(window: Window) -> float:
    """Tokens that arrived inside the window, of failed requests too: the first of an answer at its stamp, the others
    spread evenly up to the last; without a stamp for the first, all at the last.
    """
    samples = window.samples
    last_ns = samples.last_token_ns
    first_ns = np.where(np.isnan(samples.first_token_ns), last_ns, samples.first_token_ns)
    tokens = np.where(np.isnan(first_ns), 0.0, np.nan_to_num(samples.output_tokens))
    span_ns = last_ns - first_ns
    inside_ns = np.minimum(last_ns, window.end_ns) - np.maximum(first_ns, window.start_ns)
    with np.errstate(divide="ignore", invalid="ignore"):
        later_share = np.where(span_ns > 0, np.clip(inside_ns / span_ns, 0.0, 1.0), inside_ns >= 0)
    first_inside = (first_ns >= window.start_ns) & (first_ns <= window.end_ns)
    return float(np.sum(np.minimum(tokens, 1.0) * first_inside + np.maximum(tokens - 1.0, 0.0) * later_share))


def _joules_per_token(window: Window) -> float | None:
    tokens_per_s = window.per_s(_tokens_inside(window))
    return window.watts / tokens_per_s if window.watts is not None and tokens_per_s else None


def _per_user(window: Window) -> float | None:
    tpot_ms = window.latency_ms["tpot"]["service"].p50
    return 1e3 / tpot_ms if tpot_ms else None


def _goodput(window: Window) -> float | None:
    return None if window.good is None else window.per_s(window.done_inside(window.good))


def _goodput_share(window: Window) -> float | None:
    if window.good is None or not window.inside.any():
        return None
    return float(window.good[window.inside].mean())


def _stalled_share(window: Window) -> float | None:
    largest_ns = window.samples.max_gap_ns[window.inside]
    several = ~np.isnan(largest_ns)
    return float((largest_ns[several] > STALL_NS).mean()) if several.any() else None


def _stall_time_share(window: Window) -> float | None:
    samples = window.samples
    streaming_ns = samples.last_token_ns - samples.first_token_ns
    several = window.inside & ~np.isnan(samples.stall_ns) & (streaming_ns > 0)
    return float(samples.stall_ns[several].sum() / streaming_ns[several].sum()) if several.any() else None


LATENCIES: dict[str, Metric] = {
    row.name: row
    for row in (
        Metric(
            "ttft",
            "TTFT",
            "Time to first token: from sending the request (service) or from when it was due (response) to the first"
            " non-empty content, reasoning or tool-call delta. Absent without streaming.",
            {
                "service": lambda s: s.first_token_ns - s.sent_ns,
                "response": lambda s: s.first_token_ns - s.due_ns,
            },
        ),
        Metric(
            "e2e",
            "E2E",
            "End to end: from sending the request (service) or from when it was due (response) to the last token.",
            {
                "service": lambda s: s.last_token_ns - s.sent_ns,
                "response": lambda s: s.last_token_ns - s.due_ns,
            },
        ),
        Metric(
            "tpot",
            "TPOT",
            "Time per output token after the first: (last token − first token) / (N − 1) for N > 1 output tokens."
            " Absent without streaming.",
            {"service": _tpot},
        ),
        Metric(
            "gap",
            "Gap",
            "Time between two content chunks of an answer; every gap counts, so a freeze is one gap among hundreds.",
            {"service": None},
        ),
        Metric(
            "max_gap",
            "Max gap",
            "The largest gap of each request: a freeze of two seconds, which all the other gaps hide, is told here.",
            {"service": lambda s: s.max_gap_ns},
        ),
        Metric(
            "lag",
            "Lag",
            "Our own lateness: from when a request was due to when it was sent. Of all requests that were sent.",
            {"service": lambda s: s.sent_ns - s.due_ns},
            of="sent",
        ),
    )
}

RATES: dict[str, Rate] = {
    row.name: row
    for row in (
        Rate(
            "requests_per_s",
            "Requests/s",
            "1/s",
            "Successful requests that ended inside the level's window ÷ its length.",
            lambda window: window.per_s(window.done_inside(window.ok)),
        ),
        Rate(
            "goodput_per_s",
            "Goodput/s",
            "1/s",
            "Requests that succeeded within every latency limit of the SLO and ended inside the window ÷ its length.",
            _goodput,
        ),
        Rate(
            "goodput_share",
            "Goodput",
            "share",
            "Requests that succeeded within every latency limit of the SLO ÷ requests attempted.",
            _goodput_share,
        ),
        Rate(
            "output_tokens_per_s",
            "Output tok/s",
            "tok/s",
            "Tokens that arrived inside the level's window ÷ its length, all requests together.",
            lambda window: window.per_s(_tokens_inside(window)),
        ),
        Rate(
            "output_tokens_per_s_per_user",
            "tok/s per user",
            "tok/s",
            "What one user sees once the answer has begun: 1 / TPOT p50.",
            _per_user,
        ),
        Rate(
            "stalled_share",
            "Stalled",
            "share",
            "Answers with a gap over 1 s ÷ answers of more than one chunk, failed ones included.",
            _stalled_share,
            lower_is_better=True,
        ),
        Rate(
            "stall_time_share",
            "Time stalled",
            "share",
            "Time in gaps over 1 s ÷ time from the first to the last token, all these answers together.",
            _stall_time_share,
            lower_is_better=True,
        ),
        Rate(
            "joules_per_output_token",
            "J/token",
            "J",
            "Mean power in the level's window ÷ output tok/s: of the GPUs that the target uses, as measured, or as"
            " stated by the scenario.",
            _joules_per_token,
            lower_is_better=True,
        ),
    )
}

METRICS: dict[str, Metric | Rate] = {**LATENCIES, **RATES}
