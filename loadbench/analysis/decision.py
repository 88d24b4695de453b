"""Models side by side: dataclasses of summary.json, the figures that are compared, and the criteria to rank them by.

``candidates`` fills the figures in, ``ranking`` weighs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loadbench.analysis.stats import Range


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a candidate. ``value`` None: ``because`` says why; else that says why it has no interval.

    ``source`` is measured, stated (by the user), told (by the service or a file), or who gave the marks: human, judge,
    or itself, a judge of its own answers. ``at`` is the load that it is of; of marks, who gave them and to which
    prompts. ``firm`` is False for one that is indicative: on few samples, on one load of the model, or of a level that
    is in doubt. ``rough`` is for figures without an interval: too narrow to rely on, wide enough to doubt by.
    ``at_least``: it may be any amount more.
    """

    value: float | None
    interval_95: Range | None = None
    n: int | None = None
    firm: bool | None = None
    source: str | None = None
    at: str | None = None
    because: str | None = None
    rough: Range | None = None
    at_least: bool = False

    @property
    def reach(self) -> Range | None:
        """How far chance may have moved it, as well as that is known."""
        if self.at_least and self.value is not None:
            return self.value, math.inf
        return self.interval_95 or self.rough


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row of run.json's models: what it is, how it ended, and its figures.

    ``outcomes`` counts failed requests, most frequent first. Latencies, ``tokens_per_s`` and energy are of its lowest
    load, which ``at`` names; ``tokens_per_s`` exists at one user only. ``memory_per_stream_bytes`` is from the memory
    fit. ``cold_start_ms`` is load and first token; the download is apart. ``capabilities`` as the service lists them.
    """

    model: str
    asked: str
    status: str
    failed_at: str | None
    reason: str | None
    device: str | None
    execution_provider: str | None
    licence: str | None
    capabilities: tuple[str, ...]
    at: str | None
    ttft_p50_ms: Figure
    ttft_p95_ms: Figure
    e2e_p50_ms: Figure
    e2e_p95_ms: Figure
    tokens_per_s: Figure
    best_tokens_per_s: Figure
    memory_loaded_bytes: Figure
    memory_per_stream_bytes: Figure
    download_ms: Figure
    load_ms: Figure
    first_token_ms: Figure
    cold_start_ms: Figure
    disk_bytes: Figure
    quality: Figure
    failed_share: Figure
    joules_per_output_token: Figure
    cost_per_million_output_tokens: Figure
    currency: str | None
    outcomes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Term:
    """What one criterion does to a score: ``ratio`` to the best of those ranked, 1 for the best, and ``factor``, which
    is ratio ** share; ``share`` is its weight's of all. The score is the product of the factors; ``lost_share`` is how
    much of what that lost of 1 this one took, in logarithms, None where nothing was lost.
    """

    criterion: str
    figure: str
    weight: float
    share: float
    value: float
    ratio: float
    ratio_95: Range | None
    factor: float
    lost_share: float | None


@dataclass(frozen=True, slots=True)
class Place:
    """A candidate's place. ``rank`` is one more than the candidates that are better beyond doubt, None: not ranked, and
    ``because`` says why. ``tied``: it shares its rank. ``ties`` are all whose scores' reach overlaps its own.

    ``score_reach`` is the score with every figure at the bad end of its interval, and at the good one; None where a
    figure has none at all. ``rough`` names the criteria whose interval cannot be estimated.
    """

    model: str
    rank: int | None
    tied: bool
    score: float | None
    score_reach: Range | None
    ties: tuple[str, ...]
    rough: tuple[str, ...]
    terms: tuple[Term, ...]
    because: str | None


@dataclass(frozen=True, slots=True)
class Ranking:
    """The places by these weights, best first, those not ranked last; ``verdict`` says it in words."""

    weights: dict[str, float]
    places: tuple[Place, ...]
    verdict: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Every model of the run, side by side, in the order of the scenario; ranked where weights are given."""

    candidates: tuple[Candidate, ...]
    ranking: Ranking | None


@dataclass(frozen=True, slots=True)
class Compared:
    """A figure of the table: heading, unit (ms, tok/s, bytes, share, J, money, or none) and what it is."""

    title: str
    unit: str
    definition: str


FIGURES: Mapping[str, Compared] = {
    "ttft_p50_ms": Compared("TTFT p50", "ms", "Time to the first token at the lowest load."),
    "ttft_p95_ms": Compared("TTFT p95", "ms", "The same, of which 95 % stay below."),
    "e2e_p50_ms": Compared("E2E p50", "ms", "Time to the last token at the lowest load."),
    "e2e_p95_ms": Compared("E2E p95", "ms", "The same, of which 95 % stay below."),
    "tokens_per_s": Compared("tok/s at 1 user", "tok/s", "Output tokens per second with one user."),
    "best_tokens_per_s": Compared("best tok/s", "tok/s", "The most output tokens per second, of all its levels."),
    "quality": Compared("quality", "", "Mean mark, 1 to 5: by people, else by a judging model."),
    "failed_share": Compared("failed requests", "share", "Requests that failed ÷ attempted, all its levels together."),
    "memory_loaded_bytes": Compared("memory loaded", "bytes", "What the service holds more after the load."),
    "memory_per_stream_bytes": Compared("memory per stream", "bytes", "What each request in flight takes, by the fit."),
    "cold_start_ms": Compared("cold start", "ms", "Load and first token after it; the download is apart."),
    "load_ms": Compared("load", "ms", "Time to load the model."),
    "first_token_ms": Compared("first token", "ms", "TTFT of the first request after the load."),
    "download_ms": Compared("download", "ms", "Time to download the model."),
    "disk_bytes": Compared("disk", "bytes", "Size on disk."),
    "joules_per_output_token": Compared("J/token", "J", "Energy per output token at the lowest load."),
    "cost_per_million_output_tokens": Compared("cost per 1M", "money", "Its price per million output tokens."),
}
"""What a candidate's figures are called, in the order in which tables show them."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """What a weight weighs: the figure, and whether more of it is better. ``kept``: by what is left of 1."""

    figure: str
    more_is_better: bool = False
    kept: bool = False


CRITERIA: Mapping[str, Criterion] = {
    "ttft": Criterion("ttft_p50_ms"),
    "e2e": Criterion("e2e_p50_ms"),
    "throughput": Criterion("best_tokens_per_s", more_is_better=True),
    "speed": Criterion("tokens_per_s", more_is_better=True),
    "memory": Criterion("memory_loaded_bytes"),
    "cold": Criterion("cold_start_ms"),
    "disk": Criterion("disk_bytes"),
    "quality": Criterion("quality", more_is_better=True),
    "failures": Criterion("failed_share", more_is_better=True, kept=True),
    "energy": Criterion("joules_per_output_token"),
}
"""What ``--weights`` may name. Latencies are weighed by their median, which few samples bear out; failures by the share
of requests that did not fail, since no ratio to zero failures exists."""
