"""What several levels say together: dataclasses of summary.json, as those of ``summary``. Every one names its levels.

``Capacity`` is what a model carries, ``Search`` how the largest load within the SLO was found, ``Phases`` prefill and
decode apart, ``NotRun`` what a stop rule left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loadbench.analysis.stats import Range
from loadbench.records import Find

Result = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True, slots=True)
class Point:
    """A level as the capacity verdict sees it. ``load`` is users or requests/s asked for.

    ``per_s`` are successful requests per second, counted once every user had an answer, with what chance may have moved
    them; ``in_service`` is how many were being worked on and not queueing, by Little's law on the time without the wait
    for a first token. ``firm``: enough of them to draw conclusions from; else ``doubt`` says why not.
    """

    level: int
    load: float
    per_s: float | None
    per_s_interval_95: Range | None
    tokens_per_s: float | None
    e2e_mean_ms: float | None
    in_service: float | None
    firm: bool
    doubt: str | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """One estimator's answer. ``undecided``: the levels do not bear it out, and ``because`` says why.

    ``name`` is asymptotic (N* = X_max · R_min), knee (smallest load measured with nearly all the throughput), usl_peak,
    parallelism (X_max / X(1)), in_service (worked on at once), slo (largest load measured that keeps it, below one that
    does not) or sustained (largest rate that stayed on the road). ``levels`` are the indices of those it stands on.
    """

    name: Literal["asymptotic", "knee", "usl_peak", "parallelism", "in_service", "slo", "sustained"]
    value: float | None
    unit: Literal["users", "1/s", "×", "requests"]
    result: Literal["firm", "undecided"]
    because: str
    levels: tuple[int, ...]
    interval_95: Range | None = None


@dataclass(frozen=True, slots=True)
class Usl:
    """The Universal Scalability Law X(N) = λN / (1 + σ(N - 1) + κN(N - 1)), where the levels tell it apart from a line
    and a ceiling. Intervals are 95 %."""

    per_s_alone: float
    contention: float
    contention_interval_95: Range
    coherency: float
    coherency_interval_95: Range
    levels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one model carries, of its levels of one loop; every statement names the levels it stands on.

    ``nature`` is how it takes several at once, None where undecided: serves_one_at_a_time (they queue),
    shares_the_processor (all slow down together), shares_in_turns (``up_to`` at a time share, the rest queue), batches
    (up to ``up_to`` at a time, and gains by it), scales (gains still: all at once, or ``up_to`` while others queue
    already). ``saturated`` None: undecided.
    ``last_gain`` is what the last step up added to the throughput, as a share. ``falls_to`` is the throughput at the
    highest load as a share of the best, where it is lower beyond doubt. ``rejects_from`` is the load from which on
    requests are refused that lower loads had answered. ``because`` says what the nature stands on, or
    why it is undecided.
    """

    model: str
    loop: Literal["closed", "open"]
    nature: Literal["serves_one_at_a_time", "shares_the_processor", "shares_in_turns", "batches", "scales"] | None
    up_to: int | None
    saturated: bool | None
    last_gain: float | None
    falls_to: float | None
    because: str
    levels: tuple[int, ...]
    points: tuple[Point, ...]
    estimates: tuple[Estimate, ...]
    usl: Usl | None
    rejects_from: float | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """One level of a search. ``margin`` is how far it kept from the SLO: the smallest ln(limit / value) over the
    clauses, above 0 within; ``clause`` is that one's name."""

    level: int
    load: float
    purpose: Literal["probe", "confirmation"]
    result: Result
    margin: float | None
    clause: str | None
    because: str | None = None


@dataclass(frozen=True, slots=True)
class Search:
    """The search for the largest load of one model that keeps the SLO.

    ``answer`` is the load that a fresh level confirmed; None where none was. ``passed`` and ``failed`` are the bracket:
    the largest load that passed and the smallest above it that failed. ``estimate`` is where the monotone fit crosses
    the limit. ``result``: confirmed; unbounded (the highest load allowed passed); none (the lowest failed); undecided.
    ``odd`` tells every pair of probes in which more load did better, beyond doubt.
    """

    model: str
    find: Find
    unit: Literal["users", "1/s"]
    result: Literal["confirmed", "unbounded", "none", "undecided"]
    answer: float | None
    passed: float | None
    failed: float | None
    estimate: float | None
    because: str
    odd: tuple[str, ...]
    probes: tuple[Probe, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """A line through samples or levels: ``fixed_ms + slope_ms · x``. ``not_told`` says why there is none."""

    fixed_ms: float | None
    slope_ms: float | None
    slope_ms_interval_95: Range | None
    n: int
    levels: tuple[int, ...]
    not_told: str | None


@dataclass(frozen=True, slots=True)
class Phases:
    """Prefill and decode of one model apart: TTFT against input tokens where nothing queues, TPOT p50 against users.

    ``prefill_tokens_per_s`` is 1,000 / prefill.slope_ms.
    """

    model: str
    prefill: Fit
    prefill_tokens_per_s: float | None
    decode: Fit


@dataclass(frozen=True, slots=True)
class NotRun:
    """Levels that a rule left out.

    Those of a ladder: ``rule`` is gain, slo, error_rate, over_capacity, degraded or time. Those of a memory ladder:
    memory_limit (it took as much as was to be reached), memory_floor (the guard), memory_failure (the target failed for
    want of memory, or died), target_degraded (it failed for another reason), not_started (no fresh process for that
    one rung, after no level). Those of a model: target_died.
    """

    model: str
    stage: int
    after_level: int | None
    rule: str
    because: str
    loads: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ladder:
    """A stage that climbs, or that a rule may end: ``rules`` are those that may, of gain, slo, error_rate, degraded,
    over_capacity and time. It asks how far, so that a miss above its lowest rung is an answer and no failure.
    ``climbs``: by a factor, not by a list of loads."""

    stage: int
    rules: tuple[str, ...]
    climbs: bool = False


@dataclass(frozen=True, slots=True)
class LevelMemory:
    """What the target's memory did over one level.

    ``of`` says what ``before``, ``peak`` and ``after`` count: gpu (used by its processes on all devices, or by the
    devices), cgroup, footprint (macOS), private (Windows) or rss; ``exact`` whether the peak is a high-water mark or
    the highest of samples. ``verdict`` is the worst that is true: fits, grows (with load: see `Memory`), leaks, spills
    (into shared GPU memory or swap), under_pressure, out_of_memory; undecided where nothing was read. ``because`` has
    the evidence. ``streams`` were in flight at most, each asking for ``tokens`` (input + max_tokens) on average.
    """

    of: Literal["gpu", "cgroup", "footprint", "private", "rss"] | None
    before_bytes: int | None
    peak_bytes: int | None
    after_bytes: int | None
    exact: bool
    limit_bytes: int | None
    available_min_bytes: int | None
    swap_peak_bytes: int | None
    gpu_shared_peak_bytes: int | None
    pressure_max_share: float | None
    streams: int | None
    tokens: float | None
    verdict: Literal["fits", "grows", "leaks", "spills", "under_pressure", "out_of_memory", "undecided"]
    because: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Share:
    """One coefficient of a fit, in bytes, with its 95 % interval; None: the levels do not tell it, and why."""

    value_bytes: float | None
    interval_95: Range | None
    not_told: str | None


@dataclass(frozen=True, slots=True)
class Memory:
    """What one model takes, of its closed levels: peak = base + streams × (``per_stream`` + tokens × ``per_token``).

    ``tokens`` of ``per_token`` are those asked for (reserved at the start) or those held at the end (growing),
    whichever explains the peaks better: ``allocates`` says which. ``per_stream`` is at ``at_tokens`` each where only
    the number of streams varied. ``leak_per_1000`` is the memory kept for every 1,000 requests, after the drain.
    ``first_failure`` is the first level that failed for want of memory, ``how`` in what way.
    """

    model: str
    of: str
    base: Share
    per_stream: Share
    per_token: Share
    at_tokens: float | None
    allocates: Literal["reserved", "grows"] | None
    leak_per_1000: Share
    first_failure: int | None
    how: str | None
    levels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recovery:
    """After a failure of the target at ``level``: when it came back, in seconds since its last good token.

    ``to_port_s`` a connection, ``to_status_s`` its status route, ``to_token_s`` a first good token, ``to_ttft_s`` a
    TTFT within 10 % (or 50 ms) of before. None: not within ``limit_s``. ``restarted``: by us. ``lost`` counts the
    requests that failed by it. ``told`` says it in words, ``memory_returned`` whether its memory came down again.
    """

    level: int
    state: str
    restarted: bool
    to_port_s: float | None
    to_status_s: float | None
    to_token_s: float | None
    to_ttft_s: float | None
    limit_s: float
    lost: int
    memory_returned: bool | None
    told: str
