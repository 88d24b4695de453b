"""Doubts that travel with the numbers: each has a place, a reason and an advice. Here is every rule that raises one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from loadbench.analysis import clients, fleet, sharded
from loadbench.analysis.memory_leak import SO_FAR
from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.road import AT_ONCE_S, is_over
from loadbench.analysis.rundir import RunData
from loadbench.analysis.span import Span, headline_of
from loadbench.analysis.stats import FLOORS, NS_PER_MS, Distribution
from loadbench.analysis.steady import FIRST_BINS, drift
from loadbench.analysis.summary import Caution, Client, ClosedLoad, Latencies, Level, Road, Summary
from loadbench.analysis.words import listed
from loadbench.outcomes import OUTCOMES
from loadbench.records import load_title
from loadbench.target.state import DEAD

BOUND_SHARE = 0.10  # our lateness against the time to first token: MEASUREMENT.md, "Is it us?"
BUSY_SHARE = 0.50  # of one core, and of the calibrated ceiling: beyond, what arrives together waits for its stamp
FLOOR_TIMES = 10  # so much of our own error must fit into a first-token time
LAW_SHARE = 0.01
LAW_MS = 1.0  # a request is in flight some 0.3 ms longer than its stamps say: a turn of an idle loop at either end
BESIDE_SHARE = 0.10  # of all cores: what we take from a target on the same machine
STEAL_SHARE = 0.02
OTHERS_SHARE = 0.1  # of all cores: what a level lost to that is more than its own scatter
ASKED_SHARE = 0.99
REACHED_SHARE = 0.95
STATUS = {
    "interrupted": "the run was interrupted",
    "target_died": "the target died",
    "failed": "the run failed",
    "incomplete": "the run was cut off",
}
"""What happened to a run that is not complete, by its status."""
ENDED = STATUS | {"running": STATUS["incomplete"]}
GROWTH_SHARE, GROWTH_BYTES = 0.10, 64 << 20  # under either, allocators' caches and page rounding explain it


Found = Iterator[tuple[str, str, str]]


def place(level: Level) -> str:
    """What a level is called in sentences."""
    return f"{level.model} at {load_title(level.load)}"


def client_bound(client: Client, latency_ms: Latencies, *, whole: bool = False) -> tuple[str, ...] | None:
    """Why our own lateness may have shaped the numbers; empty: it did not; None: nothing to tell it from.

    Late is what takes over a tenth of the first token. A request that leaves late is held against the p50, as is the
    longest pause. The loop's lag p99 is held against the p95 (p50, where too few samples have one): a loop that is
    late once in a hundred times moves one stamp in a hundred, which a tail can show and a median cannot. ``whole``
    holds it against the whole answer instead: a throughput knows of no first tokens.
    """
    lag = latency_ms["lag"]["service"]
    first = latency_ms["e2e"]["service"] if whole else first_token(latency_ms)
    at, lag_ms = next(((q, ms) for q in ("p99", "p95", "p90", "max") if (ms := lag.value(q)) is not None), ("", None))
    tail = "p50" if first.p95 is None else "p95"
    reasons, of = [], "E2E" if whole else "first-token"
    looped, paused = (client.whose.get(name) for name in ("loop_lag_p99_ms", "gc_pause_max_ms"))
    for what, late_ms, held_against in (
        (f"requests left late, {at}", lag_ms, "p50"),
        (f"the event loop {f'of {looped} ' if looped else ''}ran late, p99", client.loop_lag_p99_ms, tail),
        (f"a collector pause held {paused or 'it'} up, at most", client.gc_pause_max_ms, "p50"),
    ):
        first_ms = first.value(held_against)
        if late_ms is not None and first_ms is not None and late_ms > BOUND_SHARE * first_ms:
            reasons.append(f"{what} {late_ms:.1f} ms: {late_ms / first_ms:.0%} of the {of} {held_against}")
    if client.cpu_share is not None and client.cpu_share > BUSY_SHARE:
        reasons.append(f"{client.whose.get('cpu_share', 'our process')} used {client.cpu_share:.0%} of a core")
    if client.ceiling_share is not None and client.ceiling_share > BUSY_SHARE:
        reasons.append(f"the load was {client.ceiling_share:.0%} of what this machine was calibrated to take")
    known = (lag_ms is not None or client.loop_lag_p99_ms is not None) and first.p50 is not None
    return tuple(reasons) if reasons or known else None


def first_token(latency_ms: Latencies) -> Distribution:
    """What stands for a level's latency: the TTFT, or without streaming the E2E."""
    ttft = latency_ms["ttft"]["service"]
    return ttft if ttft.n else latency_ms["e2e"]["service"]


def of_level(level: Level, run: RunData, span: Span, clipped: int) -> tuple[Caution, ...]:
    """Every doubt about one level; ``clipped`` of its gaps did not fit the histogram."""
    found = _rung(level, run, span) if span.is_rung else _of_times(level, run, span, clipped)
    return tuple(Caution(about, place(level), reason, advice) for about, reason, advice in found)


def with_memory(level: Level) -> Level:
    """The level with the doubts that follow from what its memory did: they say better why it kept some."""
    memory = level.memory
    if memory is None or memory.verdict in ("fits", "undecided"):
        return level
    others = tuple(caution for caution in level.cautions if caution.about != "memory_growth")
    if kept := [line for line in memory.because if SO_FAR in line]:
        advice = "run it for five minutes or more: a cache has an end, a leak goes on"
        return replace(level, cautions=(*others, Caution("memory_growth", place(level), kept[0], advice)))
    if memory.verdict in ("grows", "out_of_memory"):
        return replace(level, cautions=others if memory.verdict == "grows" else level.cautions)
    about, advice = _MEMORY[memory.verdict]
    return replace(level, cautions=(*others, Caution(about, place(level), "; ".join(memory.because), advice)))


_MEMORY = {
    "leaks": ("memory_leak", "restart the service before memory runs out, and report it to the server's makers"),
    "spills": ("memory_spill", "lower concurrency, max_tokens or the model's size: what spills is slow"),
    "under_pressure": ("memory_pressure", "close other programs, or lower the load: latencies hold the wait"),
}


def _of_times(level: Level, run: RunData, span: Span, clipped: int) -> Found:
    yield from (
        *_cut_short(level, run),
        *_failures(level, run),
        *_samples(level, span),
        *_tokens(level, span),
        *_warm_up(level, span),
        *_steady(level, run, span),
        *_ours(level, run, span),
        *_measurement(level, run, clipped),
        *_target(level),
        *fleet.doubts(level),
    )


def _rung(level: Level, run: RunData, span: Span) -> Found:
    """A rung of a memory ladder ends at its bound or by failing; its times are no measurement."""
    if level.ended_by in ENDED:
        yield from _cut_short(level, run)
    by_plan = ["censored", "total_deadline", "nothing_succeeded", "few_succeeded", "memory_growth"]
    stages = run.facts["scenario"].get("stages") or ()
    asked = stages[level.stage].get("memory") if level.stage < len(stages) else None
    # A failure that was asked for is an answer; what an interrupted level left unanswered accuses nobody.
    if (asked and asked["until"] == "failure") or level.ended_by == "interrupted":
        by_plan.append("unhealthy_target")
    yield from (found for found in (*_failures(level, run), *_target(level)) if found[0] not in by_plan)
    yield from (found for found in _ours(level, run, span) if found[0] == "busy_machine")


def _cut_short(level: Level, run: RunData) -> Found:
    if not level.complete:
        why = ENDED.get(level.ended_by or run.facts["status"])
        if why is None and level.target.state in DEAD:
            why = f"the target was {level.target.state.replace('_', ' ')}"
        elif why is None:  # it issued all that was planned, and was not through when
            why = f"{ENDED.get(run.facts['status'], STATUS['incomplete'])} before it was through"
        yield "cut_short", f"the level did not end as planned: {why}", "repeat it before comparing it with others"


def _failures(level: Level, run: RunData) -> Found:
    attempted, ok = level.requests.attempted, level.requests.ok
    for name, count in level.requests.failed.items():
        outcome = OUTCOMES.get(name)
        unknown = ("not a known outcome", "report it: another version of loadbench may have written this run")
        meaning, advice = (outcome.meaning, outcome.advice) if outcome else unknown
        detail = run.details.get((level.index, name))
        reason = f"{count} of {attempted} requests: {meaning}" + (f" ({detail})" if detail else "")
        reason += "; the percentiles lack these, the slowest: p99_all counts them" if name == "censored" else ""
        yield name, reason, advice
    if attempted == 0:
        yield "nothing_sent", "no request was sent", "give the level more time or a higher rate"
    elif ok == 0:
        yield "nothing_succeeded", f"none of {attempted} requests succeeded, so there is no latency", "see the failures"
    elif ok < attempted / 2:
        reason = f"only {ok} of {attempted} requests succeeded, and the percentiles speak of these alone"
        yield "few_succeeded", reason, "look at p99_all, which counts failures as infinite"


def _samples(level: Level, span: Span) -> Found:
    n, enough = first_token(level.latency_ms).n, FLOORS["p95"]
    if 0 < n < enough:
        reason = f"{n} samples: p95 is firm from {enough}, p99 from {FLOORS['p99']}"
        yield "few_samples", reason, _enough(level, span, enough / n)


def _enough(level: Level, span: Span, times: float) -> str:
    """What to set for so many times the samples, in a form that the level's stage takes."""
    requests, duration = math.ceil(times * level.requests.attempted), f"{math.ceil(1.1 * times * level.window_s)}s"
    if span.plan["load"].get("trace"):
        return "replay more of the trace, or a longer one"
    if span.plan["requests"] is None:
        return f"set min_requests: {requests}, or duration: {duration}"
    return f"set requests: {requests}" + ("" if span.plan["duration_s"] is None else f" and duration: {duration}")


def _tokens(level: Level, span: Span) -> Found:
    samples = span.samples
    none = (samples.output_tokens == 0) | (np.isnan(samples.output_tokens) & (samples.token_source >= 0))
    odd = samples.take(span.ok & none & (samples.chunks > 0))
    if len(odd):
        found = f"{len(odd)} answers that came in {odd.chunks.sum():.0f} chunks"
        reason = f"the server's usage says 0 tokens, or more than can be, for {found}"
        yield "no_tokens_counted", reason, "do not trust tok/s and TPOT of this level; report it to the server's makers"
    sources = level.tokens.source
    if len(sources) > 1:
        told = " and ".join(f"{count} by {source}" for source, count in sources.items())
        reason = f"tokens were counted in two ways ({told})"
        yield "tokens_counted_two_ways", reason, "do not trust tok/s and TPOT of this level"
    elif "chunks" in sources:
        reason = "the server sent no usage: tokens are counted as chunks"
        yield "chunks_counted_as_tokens", reason, "compare tok/s with endpoints that are counted the same way only"


def _warm_up(level: Level, span: Span) -> Found:
    begun = span.beginning
    if begun is None:
        return
    metric, _ = headline_of(span.samples, span.ok, span.headline)
    first, rest = f"{begun.first / NS_PER_MS:.1f} ms", f"{begun.rest / NS_PER_MS:.1f} ms"
    began = f"{LATENCIES[metric].title} was {first} on average in the first {FIRST_BINS} s"
    longer = f"make it longer than {math.ceil(2 * (level.window_s + (level.warmup_trimmed_s or 0)))}s"
    if begun.cut is None:
        advice = f"no percentile describes it: find out what changes, or {longer}"
        yield "never_settled", f"{began} and {rest} in the second half, and no steady state came between", advice
    elif level.warmup_trimmed_s:
        out = f"{level.warmup_trimmed_s:.0f} s are left out of the window and all latencies"
        reason = f"{began} and {rest} later: {out}"
        yield "warmup", reason, "raise warmup: {requests: …} to have it before the level"
    else:
        reason = f"{began} and {rest} later, and too few requests to leave that out: no firm percentile may be lost"
        yield "warmup_kept", reason, f"raise warmup: {{requests: …}}, or {longer}"


def _steady(level: Level, run: RunData, span: Span) -> Found:
    metric, values_ns = headline_of(span.samples, span.ok, span.headline)
    settled = span.beginning is None or span.beginning.cut is not None
    found = drift(values_ns[span.inside & ~np.isnan(values_ns)])
    if level.road is not None and is_over(level.road):
        yield _over(level.road)
    elif found and settled and not span.changes:
        before, after = f"{found.first / NS_PER_MS:.1f} ms", f"{found.last / NS_PER_MS:.1f} ms"
        reason = f"{LATENCIES[metric].title} p50 went from {before} in the first third to {after} in the last"
        yield "drift", reason, "no percentile describes both: find out what changed, or run it longer"
    if isinstance(level.load, ClosedLoad) and not level.load.legs and level.concurrency_reached is not None:
        users = sharded.users_of(run.facts, level.load.concurrency)
        if level.concurrency_reached < REACHED_SHARE * users:
            reason = f"{level.concurrency_reached:,.1f} of {users:,} users had a request in flight on average"
            yield "concurrency_missed", reason, "make the level longer, or see why users waited"


def _over(road: Road) -> tuple[str, str, str]:
    assert road.left_s is not None and road.left_at is not None  # judged to be over capacity, it has both
    since = f"from {road.left_s:.0f} s on" if road.left_s >= AT_ONCE_S else "from its start on"
    reason = f"more came than could be served {since}, at {road.left_at:.3g}/s: latencies tell how long the level was"
    reason += f" ({road.because})"
    return "over_capacity", reason, "lower the rate; what it shows is the throughput at its most"


def _ours(level: Level, run: RunData, span: Span) -> Found:
    client = level.client
    if client.bound:
        advice = "give the client a machine of its own, or lower the load"
        yield "client_bound", "; ".join(client.bound_because), advice
    cores = run.facts["environment"].get("cores")
    if client.cpu_share and cores and run.facts["endpoint"].get("local") and client.cpu_share > BESIDE_SHARE * cores:
        reason = f"our process used {client.cpu_share:.0%} of a core on the target's own machine of {cores}"
        yield "shared_machine", reason, "send the load from another machine to know what this one can do alone"
    if client.others_share is not None and client.others_share > OTHERS_SHARE:
        reason = f"other programs used {client.others_share:.0%} of this machine's CPU"
        yield "busy_machine", reason, "close them and repeat the level: they slow the client or the target down"
    if client.steal_share is not None and client.steal_share > STEAL_SHARE:
        reason = f"the hypervisor gave {client.steal_share:.0%} of the CPU time to others"
        yield "stolen_cpu", reason, "repeat the level, on a quieter machine if you can"
    if client.new_connections:
        reason = f"{client.new_connections} connections were opened inside the level; lag and response time hold it"
        yield "new_connections", reason, "see whether the server closes connections"
    due = np.count_nonzero(span.samples.due_ns <= span.end_ns)
    sent = np.count_nonzero(span.samples.sent_ns <= span.end_ns)
    if level.load.kind == "open" and due and sent < ASKED_SHARE * due:
        reason = f"{sent} of {due} requests that were due left in time ({sent / due:.1%})"
        yield "rate_missed", reason, "lower the rate: this level's load is not the one that was asked for"
    yield from clients.late_start(client.start_late_ms, client.whose.get("start_late_ms"))


def _measurement(level: Level, run: RunData, clipped: int) -> Found:
    """Where our own instruments are at their end."""
    first_ms = first_token(level.latency_ms).p50
    error_ms = (run.facts.get("calibration") or {}).get("ttft_error_p99_ms")
    if first_ms is not None and error_ms is not None and first_ms < FLOOR_TIMES * error_ms:
        reason = f"the first-token p50 of {first_ms:.2g} ms is under {FLOOR_TIMES} times our error ({error_ms:.2g} ms)"
        advice = "take such times for upper bounds; `loadbench calibrate` measures the error anew"
        yield "near_the_floor", reason, advice
    law, e2e_ms = level.littles_law_error, level.latency_ms["e2e"]["service"].mean
    # What our own lateness adds is client-bound's to tell; nothing of ours can take away.
    late_ms = max(LAW_MS, level.client.loop_lag_p99_ms or 0.0) if law is not None and law > 0 else 0.0
    if law is not None and abs(law) > LAW_SHARE and abs(law) * (e2e_ms or 0.0) > late_ms:
        reason = f"what was counted in flight is {abs(law):.1%} {'above' if law > 0 else 'below'} throughput × latency"
        yield "littles_law", reason, "do not trust this level: our counts or our stamps are wrong; please report it"
    if clipped:
        reason = f"{clipped} gaps did not fit the histogram (over 73 minutes)"
        yield "clipped_gaps", reason, "look at max_gap_ns in the samples"


def _target(level: Level) -> Found:
    state, evidence, rss = level.target.state, level.target.evidence, level.target.rss_bytes
    if state not in (None, "healthy") and not level.endpoints:
        why = f": {'; '.join(evidence)}" if evidence else ""
        yield "unhealthy_target", f"the target was {state} at the end of the level{why}", "read the service's log"
    if rss.before is not None and rss.after is not None:
        grown = rss.after - rss.before
        if grown > max(GROWTH_BYTES, GROWTH_SHARE * rss.before):
            reason = f"the target kept {grown / 2**20:.0f} MiB more after the level than before"
            yield "memory_growth", reason, "repeat the level: growth that goes on is a leak"


def of_run(summary: Summary, run: RunData) -> tuple[Caution, ...]:
    """Every doubt about the run as a whole."""
    return tuple(Caution(about, "run", reason, advice) for about, reason, advice in _whole(summary, run))


def _whole(summary: Summary, run: RunData) -> Found:
    if summary.status != "complete":
        why = f": {summary.reason}" if summary.reason else ""
        yield (
            summary.status,
            f"{STATUS[summary.status]}{why}",
            "repeat it: the command is in the report",
        )
    told = {level.index for level in summary.levels}  # and what a rule left out, which is told as what it is
    told |= {index for left in run.facts.get("not_run") or () for index in left["levels"]}
    failed = {model.id for model in summary.models if model.status == "failed"}  # which is told below
    missing = [plan for plan in run.facts["levels"] if plan["index"] not in told and plan["model"] not in failed]
    if missing:
        yield "not_run", f"{len(missing)} of {summary.levels_planned} planned levels were not run", "repeat the run"
    timed = [model.id or model.asked for model in summary.models if model.synthetic and model.status == "ok"]
    if timed:
        have, its = ("has", "its") if len(timed) == 1 else ("have", "their")
        reason = f"{listed(timed)} {have} random weights: {its} timings are the engine's, {its} words mean nothing"
        yield "synthetic", reason, "name a real model to learn about that model"
    for model, row in zip(summary.models, run.facts["models"], strict=True):
        name, why = model.id or model.asked, f": {model.reason}" if model.reason else ""
        if model.status == "failed":
            where = f" at {row['failed_at']}" if row.get("failed_at") else ""
            yield "model", f"{name} failed{where}{why}", "see that the endpoint can load it"
        elif model.status != "ok":
            yield "model", f"{name} was not measured ({model.status}){why}", "repeat the run"
    for quality in summary.quality:
        if quality.mark and quality.mark.itself:
            reason = f"{quality.model} judged its own answers, and its mark stands on that"
            yield "judged_itself", reason, "let a model judge that is none of those compared, or mark answers yourself"
    for memory in summary.memory:
        for share in (memory.per_token, memory.per_stream):
            if share.value_bytes is not None and share.interval_95 is None and share.not_told:
                reason = f"what a stream of {memory.model} takes has no interval: {share.not_told}"
                if "cut off" in share.not_told:
                    yield "answers_cut", reason, "lengthen the rung (duration) until most answers come to their end"
                else:
                    yield "no_line", reason, "take no load from it that was not measured"
                break
    yield from clients.clocks(summary.cluster)
    yield from sharded.doubts(run.facts)
    warm = run.samples.said(run.samples.phase, "warmup")
    if summary.levels and not warm.any():
        yield "no_warmup", "no warm-up request: the first level pays for what happens once", "set warmup: {requests: 2}"
    for file, lines in run.torn.items():
        reason = f"{lines} unreadable line{'s' if lines > 1 else ''} in {file} skipped"
        yield "torn", reason, "expected of a run that was killed; else the disk was full or the file was edited"
