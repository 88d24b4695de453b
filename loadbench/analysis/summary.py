"""What is told about a run: these dataclasses are summary.json, field for field, and its JSON Schema is made from them.

Units are in the names: ``_ms``, ``_s``, ``_per_s``, ``_bytes``, ``_share`` (0 to 1); every latency is in milliseconds.
What never happened or could not be known is None (null), never 0. Filling them in is ``summarise.py``'s job.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter

from loadbench.analysis.agreement import Agreement
from loadbench.analysis.clients import Cluster
from loadbench.analysis.decision import Decision
from loadbench.analysis.determinism import Answers
from loadbench.analysis.energy import Energy
from loadbench.analysis.findings import (
    Capacity,
    Ladder,
    LevelMemory,
    Memory,
    NotRun,
    Phases,
    Recovery,
    Result,
    Search,
)
from loadbench.analysis.metrics import LATENCIES, RATES, Series
from loadbench.analysis.quality import Quality
from loadbench.analysis.stats import Distribution
from loadbench.records import Ask, Leg, Trace

SCHEMA = 1

# By metric (ttft, e2e, tpot, gap, lag), then by series; every metric and series of LATENCIES is always there.
Latencies = dict[str, dict[str, Distribution]]


@dataclass(frozen=True, slots=True)
class ClosedLoad:
    """N users, each sending its next request when its last one is done. With ``legs`` N is the most there ever are.

    ``ask`` makes it a rung of a memory ladder.
    """

    concurrency: int
    kind: Literal["closed"] = "closed"
    legs: tuple[Leg, ...] = ()
    ask: Ask | None = None


@dataclass(frozen=True, slots=True)
class OpenLoad:
    """A schedule laid down beforehand."""

    rate_per_s: float
    arrivals: str
    kind: Literal["open"] = "open"


@dataclass(frozen=True, slots=True)
class ShapedLoad(OpenLoad):
    """A schedule that is more than a rate: gamma arrivals, a rate that changes (the mean is given), or a trace."""

    burstiness: float | None = None
    legs: tuple[Leg, ...] = ()
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests of the load phase. ``failed`` counts by outcome, most frequent first."""

    attempted: int
    ok: int
    failed: dict[str, int]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of the successful requests. ``source`` counts requests by where their output count comes from."""

    input_mean: float | None
    output_mean: float | None
    output_total: int
    source: dict[str, int]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of prompt within a level."""

    kind: str
    requests: Requests
    tokens: Tokens
    latency_ms: Latencies


@dataclass(frozen=True, slots=True)
class Rss:
    """Resident memory of the target's processes around one level."""

    before: int | None = None
    peak: int | None = None
    after: int | None = None


@dataclass(frozen=True, slots=True)
class AtEndpoint:
    """One endpoint of a fleet within a level, and how it was after it.

    ``died_after_s``, from the level's start, is when the first request failed there after which none succeeded; None
    where it lives or none did.
    """

    url: str
    requests: Requests
    throughput: dict[str, float | None]
    tokens: Tokens
    latency_ms: Latencies
    state: str | None
    evidence: tuple[str, ...]
    rss_bytes: Rss
    died_after_s: float | None


@dataclass(frozen=True, slots=True)
class Client:
    """Our own state during a level. ``bound`` says whether we, not the target, shaped the numbers, and why.

    ``ceiling_share`` is what the level took of the calibrated ceiling, of events or requests per second whichever is
    more; None without a calibration. ``others_share`` is what programs that are neither we nor the target used of this
    machine's CPU, all cores together; None where the target is here and what it used is not known.

    Of several processes it is the worst that counts, and ``whose`` names it, figure by figure. ``start_late_ms`` is how
    long after the level's start the last of them began.
    """

    bound: bool | None
    bound_because: tuple[str, ...] = ()
    cpu_share: float | None = None
    ceiling_share: float | None = None
    loop_lag_p99_ms: float | None = None
    loop_lag_max_ms: float | None = None
    gc_pauses: int | None = None
    gc_pause_max_ms: float | None = None
    steal_share: float | None = None
    others_share: float | None = None
    new_connections: int | None = None
    rss_bytes: int | None = None
    start_late_ms: float | None = None
    whose: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Target:
    """How the target was at the end of a level, with the evidence."""

    state: str | None
    evidence: tuple[str, ...]
    rss_bytes: Rss


@dataclass(frozen=True, slots=True)
class SloClause:
    """One clause of the SLO on one level. ``undecided`` where the value is not firm or does not exist.

    ``value`` and ``limit`` are in ``unit``, ``ms`` or ``share``; the value stands on ``n`` samples.
    """

    clause: str  # "ttft.p95", "error_rate", "goodput"
    series: Series | None
    unit: Literal["ms", "share"]
    limit: float
    value: float | None
    n: int
    result: Result
    because: str | None


@dataclass(frozen=True, slots=True)
class Gate:
    """What was asserted on the command line, held against one level; ``level`` None: the run has none that is meant.

    ``asserted`` is the text as given; ``value`` and ``limit`` are in ``unit``, and the value stands on ``n`` samples.
    ``invalid`` where the value does not exist, or is indicative and that was not allowed; ``because`` says which.
    """

    asserted: str
    level: int | None
    clause: str  # "ttft.p95", "error_rate", "output_tokens_per_s"
    series: Series | None
    comparison: Literal["<", "<=", ">", ">="]
    limit: float | None
    value: float | None
    unit: str
    n: int
    result: Literal["pass", "fail", "invalid"]
    because: str | None


@dataclass(frozen=True, slots=True)
class Road:
    """Whether a level kept on the road: whether what was in flight stayed bounded, or went on growing.

    ``over_capacity``: more came than could be served, so its latencies say how long the level was and nothing else.
    ``left_s`` is when that began, in seconds from the level's start, ``left_at`` the load asked for then (requests/s);
    ``growth_per_s`` how many more were in flight every second after it, ``given_per_s`` how many answers' worth of work
    it did, of those under way or given up their share: not what was served. ``because`` says what it stands on, or why
    it is undecided.

    Of a load that changes, ``most_in_flight`` at ``most_at_s``, and from ``worked_off_s`` on there was no queue left.
    """

    result: Literal["steady", "over_capacity", "undecided"]
    because: str
    left_s: float | None = None
    left_at: float | None = None
    growth_per_s: float | None = None
    given_per_s: float | None = None
    most_in_flight: int | None = None
    most_at_s: float | None = None
    worked_off_s: float | None = None


@dataclass(frozen=True, slots=True)
class Interval:
    """A part of a level: requests due between ``start_s`` and ``start_s + length_s`` after the level's start.

    ``load`` is what was asked for in it on average, users or requests/s; ``throughput`` has the RATES of what ended in
    it, ``latency_ms`` the headline series of ttft, e2e and tpot.
    """

    start_s: float
    length_s: float
    load: float
    requests: Requests
    throughput: dict[str, float | None]
    concurrency_reached: float | None
    latency_ms: dict[str, Distribution]


@dataclass(frozen=True, slots=True)
class Caution:
    """A doubt that travels with a number: where, why, and what to do. ``about`` is a short name to group by."""

    about: str
    place: str
    reason: str
    advice: str


@dataclass(frozen=True, slots=True)
class Level:
    """One load on one model, measured over ``window_s`` seconds; every level that was started is here.

    ``warmup_trimmed_s`` is what was left out of the window and all latencies at the level's beginning; ``requests`` are
    of the whole level. None where the level was too short to tell a warm-up, or has no steady state by plan.
    ``littles_law_error`` is how far apart what the client counted in flight and throughput × mean latency are.

    ``headline`` names the series to look at first. ``concurrency_reached`` is the time-weighted mean of requests in
    flight; ``issued_per_s`` is what was really sent, against ``load.rate_per_s`` in open loop.
    """

    index: int
    stage: int
    model: str
    load: ClosedLoad | OpenLoad | ShapedLoad
    headline: Series
    complete: bool
    ended_by: str | None
    started_s: float
    window_s: float
    warmup_trimmed_s: float | None
    requests: Requests
    throughput: dict[str, float | None]
    concurrency_reached: float | None
    issued_per_s: float | None
    littles_law_error: float | None
    latency_ms: Latencies
    tokens: Tokens
    by_kind: tuple[Kind, ...]
    client: Client
    target: Target
    slo: tuple[SloClause, ...]
    cautions: tuple[Caution, ...]
    purpose: str = "level"
    road: Road | None = None
    intervals: tuple[Interval, ...] = ()
    memory: LevelMemory | None = None
    energy: Energy | None = None
    endpoints: tuple[AtEndpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """A model as asked for and as found; ``how`` says by what rule, and whether it was loaded for this run.

    ``first_ms`` is the first token of the first request after the load; ``downloaded_ms`` None: it was there.
    ``kept_warm`` are the light prompts between its levels, which count in no figure; None where there were none.
    """

    asked: str
    id: str | None
    how: str | None
    synthetic: bool
    status: str
    reason: str | None
    load_ms: float | None
    first_ms: float | None
    downloaded_ms: float | None = None
    kept_warm: Requests | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One paragraph in plain words; the worst state the target was in; whether the SLO held (None: there is none)."""

    text: str
    target: str | None
    slo: Result | None


@dataclass(frozen=True, slots=True)
class Summary:
    """A run. ``status`` is complete, interrupted, target_died, failed or incomplete (cut off: no end was written).

    ``cautions`` holds those of the run as a whole; each level carries its own. ``command`` repeats the run.
    ``memory_source`` is run.json's: where memory figures came from, what that does not give and why, the service's
    limit, a probe's clock, and the CPU time that reading took per second of it. ``quality`` is of each model that was
    asked prompts to be marked, ``agreements`` of each judge over all of them.

    ``answers`` says which prompts were answered the same every time, prompt by prompt, where that was to be so.
    ``cluster`` is where the load came from, None: from this machine alone.
    ``gates`` are the command line's assertions, each at every level that it is of.
    """

    schema: int
    loadbench: str
    name: str
    status: str
    reason: str | None
    started: str
    duration_s: float
    command: str
    verdict: Verdict
    environment: dict[str, Any]
    endpoint: dict[str, Any]
    models: tuple[Model, ...]
    levels_planned: int
    levels: tuple[Level, ...]
    cautions: tuple[Caution, ...]
    capacity: tuple[Capacity, ...] = ()
    searches: tuple[Search, ...] = ()
    phases: tuple[Phases, ...] = ()
    not_run: tuple[NotRun, ...] = ()
    memory: tuple[Memory, ...] = ()
    recoveries: tuple[Recovery, ...] = ()
    ladders: tuple[Ladder, ...] = ()
    memory_source: dict[str, Any] | None = None
    decision: Decision | None = None
    quality: tuple[Quality, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    answers: tuple[Answers, ...] = ()
    gates: tuple[Gate, ...] = ()
    allow_indicative: bool = False
    cluster: Cluster | None = None


def schema() -> dict[str, Any]:
    """The JSON Schema of summary.json; metrics and rates with their definitions."""
    made = TypeAdapter(Summary).json_schema(mode="serialization")
    for shape in (made, *made["$defs"].values()):
        shape["required"] = list(shape["properties"])  # what is null is written, too
    distribution = {"$ref": "#/$defs/Distribution"}
    latencies = {
        metric.name: {
            "description": metric.definition,
            "type": "object",
            "properties": dict.fromkeys(metric.series, distribution),
            "required": list(metric.series),
        }
        for metric in LATENCIES.values()
    }
    rates = {
        rate.name: {"description": f"{rate.definition} In {rate.unit}.", "type": ["number", "null"]}
        for rate in RATES.values()
    }
    for name in ("Level", "AtEndpoint", "Kind"):
        part = made["$defs"][name]["properties"]
        part["latency_ms"] = {"type": "object", "properties": latencies, "required": list(latencies)}
        if "throughput" in part:
            part["throughput"] = {"type": "object", "properties": rates, "required": list(rates)}
    made["properties"]["schema"] = {"const": SCHEMA}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "loadbench summary", **made}
