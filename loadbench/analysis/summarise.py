"""Makes the Summary of a run from its directory's columns and events: the order of things, level by level.

What a number means is in ``metrics``, which requests count in ``span``, how sure it is in ``stats`` and ``interval``;
whether a level stayed on the ``road``, what it was ``intervals`` by intervals; what several levels say together in
``saturation``, ``search``, ``phases`` and ``memory``; doubts are in ``cautions``, words in ``verdict``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from loadbench.analysis import (
    candidates,
    cautions,
    clients,
    determinism,
    energy,
    fleet,
    gates,
    ladder,
    memory,
    quality,
    recoveries,
    saturation,
    search,
    slo,
    verdict,
)
from loadbench.analysis.findings import NotRun, Search
from loadbench.analysis.interval import MOST_LOAD, queue_needs
from loadbench.analysis.intervals import intervals_of
from loadbench.analysis.measured import Measured
from loadbench.analysis.metrics import RATES, Window
from loadbench.analysis.phases import phases
from loadbench.analysis.road import GROWS, is_over, roads_of
from loadbench.analysis.rundir import LevelEvents, RunData, read, read_gaps
from loadbench.analysis.span import Span, littles_law_error, span_of
from loadbench.analysis.stats import FLOORS, NS_PER_MS
from loadbench.analysis.summary import (
    SCHEMA,
    Client,
    ClosedLoad,
    Kind,
    Latencies,
    Level,
    Model,
    OpenLoad,
    Road,
    Rss,
    ShapedLoad,
    SloClause,
    Summary,
    Target,
    Verdict,
)
from loadbench.errors import UsageError
from loadbench.hdr import Hdr
from loadbench.records import Closed, Open, load_from_json, load_title
from loadbench.scenario.schema import Slo


def summarise(run: RunData, weights: Mapping[str, float] | None = None, asked: gates.Asked | None = None) -> Summary:
    """Everything that is told about a run. ``weights`` by criterion ask for its models to be ranked.

    ``asked`` is what the command line asserts.
    """
    facts = run.facts
    spans, levels = _levels(run)
    levels, takes = memory.of_run(run, spans, levels)
    levels = tuple(cautions.with_memory(level) for level in levels)
    graded, agreements = quality.of_run(run.path, (model["id"] for model in facts["models"] if model["id"]))
    end = facts["anchors"]["end"]
    end_ns = end["monotonic_ns"] - facts["anchors"]["start"]["monotonic_ns"] if end else _last_ns(run)
    summary = Summary(
        schema=SCHEMA,
        loadbench=facts["loadbench"],
        name=facts["name"],
        status="incomplete" if facts["status"] == "running" else facts["status"],
        reason=facts["reason"],
        started=facts["started"],
        duration_s=end_ns / 1e9,
        command=facts["command"] + _weighed(weights),
        verdict=Verdict("", None, None),
        environment=facts["environment"],
        endpoint=facts["endpoint"],
        models=tuple(_model(run, model) for model in facts["models"]),
        levels_planned=len(facts["levels"]),
        levels=levels,
        cautions=(),
        capacity=saturation.capacities(spans, levels),
        searches=_searches(facts, levels),
        phases=phases(spans),
        not_run=tuple(_not_run(facts, left) for left in facts.get("not_run") or ()),
        memory=takes,
        recoveries=recoveries.of_run(run, levels),
        memory_source=facts.get("memory"),
        ladders=ladder.ladders(facts["scenario"]),
        answers=determinism.answers(run),
        quality=graded,
        agreements=agreements,
        cluster=clients.cluster_of(facts),
    )
    if asked is not None:
        summary = replace(summary, allow_indicative=asked.allow_indicative)
        summary = replace(summary, gates=gates.held(asked, summary, verdict.gates(summary)))
    summary = replace(summary, decision=candidates.decide(run, spans, summary, weights))
    summary = replace(summary, cautions=cautions.of_run(summary, run))
    return replace(summary, verdict=verdict.of(summary))


def _weighed(weights: Mapping[str, float] | None) -> str:
    """What was weighed, for the line that repeats the run: a report may be the first to weigh."""
    return f" --weights {','.join(f'{name}={weight:g}' for name, weight in weights.items())}" if weights else ""


def so_far(folder: Path, only: Collection[int]) -> tuple[Level, ...]:
    """These levels of a run, as far as they have ended, while it goes on; its files are open, its shards not merged."""
    run = read(folder, only)
    return _levels(replace(run, levels=tuple(events for events in run.levels if events.end)))[1]


def _levels(run: RunData) -> tuple[Sequence[Span], tuple[Level, ...]]:
    """What counts of every level that was started, and what is told about it."""
    objective = _slo(run)
    settled = [span_of(run, events) for events in run.levels]
    roads = roads_of(run, settled)
    spans = [span.unsettled() if is_over(road) else span for span, road in zip(settled, roads, strict=True)]
    gaps = read_gaps(run, {span.events.index: span.since_ns for span in spans})
    best = _best_rates(spans)
    levels = tuple(
        _level(run, span, road, gaps[span.events.index], _no_interval(span, road, best[span.plan["model"]]), objective)
        for span, road in zip(spans, roads, strict=True)
    )
    return spans, levels


def _searches(facts: dict[str, Any], levels: Sequence[Level]) -> tuple[Search, ...]:
    """What the search for the largest load found, model by model."""
    if not facts.get("find"):
        return ()
    bounds, found = search.Bounds(**facts["find"]), []
    for model in dict.fromkeys(level.model for level in levels):
        probes = [
            search.probe_of(level, level.purpose)
            for level in levels
            if level.model == model and level.purpose != "level"
        ]
        found.append(search.conclude(bounds, model, probes, search.next_step(bounds, probes) is None))
    return tuple(found)


def _not_run(facts: dict[str, Any], left: dict[str, Any]) -> NotRun:
    loads = (load_title(load_from_json(facts["levels"][index]["load"])) for index in left["levels"])
    return NotRun(left["model"], left["stage"], left["after_level"], left["rule"], left["because"], tuple(loads))


def _slo(run: RunData) -> Slo | None:
    given = run.facts["scenario"].get("slo")
    try:
        return None if given is None else Slo.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("scenario", "slo", *first["loc"])))
        raise UsageError(f"{run.path / 'run.json'}: {where}: {first['msg']}, got {first['input']!r}") from error


def _last_ns(run: RunData) -> int:
    """The last thing that is known to have happened."""
    done_ns = run.samples.done_ns
    return max(run.last_event_ns, 0 if np.isnan(done_ns).all() else int(np.nanmax(done_ns)))


def _model(run: RunData, model: dict[str, Any]) -> Model:
    samples = run.samples
    levels = [index for index, level in enumerate(run.facts["levels"]) if level["model"] == model["id"]]
    warm = samples.take(samples.said(samples.phase, "keep_warm") & np.isin(samples.level, levels))
    return Model(
        asked=model["asked"],
        id=model["id"],
        how=model.get("how"),
        synthetic=model["synthetic"],
        status=model["status"],
        reason=model["reason"],
        load_ms=model["load_ms"],
        first_ms=model["first_ms"],
        downloaded_ms=model.get("downloaded_ms"),
        kept_warm=Measured.of(warm).requests() if len(warm) else None,
    )


def _window(span: Span) -> Window:
    return Window(span.samples, span.ok, span.inside, None, span.start_ns, span.end_ns, {})


def _best_rates(spans: Sequence[Span]) -> dict[str, float]:
    """The most successful requests per second that each model was seen to give: what stands for its capacity.

    A level of few requests says little of either.
    """
    best = {span.plan["model"]: 0.0 for span in spans}
    for span in spans:
        rate, model = RATES["requests_per_s"].how(_window(span)), span.plan["model"]
        if not span.is_rung and np.count_nonzero(span.ok) >= FLOORS["p50"]:
            best[model] = max(best[model], rate or 0.0)
    return best


def _no_interval(span: Span, road: Road | None, best_per_s: float) -> str | None:
    """Why this level allows no confidence intervals; None: nothing that is known beforehand forbids them."""
    window = _window(span)
    if is_over(road):
        return GROWS
    if span.beginning is not None and not span.trimmed_s:
        return "the level was not steady"
    if span.changes:
        return "the load changes by plan"
    if span.plan["load"]["kind"] == "closed":
        return None
    asked_per_s = window.per_s(int(np.count_nonzero(window.inside)))
    if not asked_per_s or not best_per_s:
        return "no throughput was seen to hold the rate against"
    share = asked_per_s / best_per_s
    asked = f"{asked_per_s:.3g}/s were asked for, {share:.0%} of the best throughput seen"
    if share > MOST_LOAD:
        return f"{asked}; intervals hold up to {MOST_LOAD:.0%}"
    n, needed = int(np.count_nonzero(span.ok & window.inside)), queue_needs(share)
    return f"{asked}, where an interval takes {needed:,} requests; these are {n:,}" if n < needed else None


def _level(
    run: RunData, span: Span, road: Road | None, gaps: dict[str, Hdr], no_interval: str | None, objective: Slo | None
) -> Level:
    plan, events, window = span.plan, span.events, _window(span)
    everything = Measured.of(span.samples)
    latency_ms = Measured.of(span.counted).latencies(Hdr.sum_of(gaps.values()), no_interval)
    requests = everything.requests()
    objective = None if span.is_rung else objective
    good = slo.good(objective, span.samples, span.ok, span.headline) if objective else None
    power = energy.power_of(run, span)
    window = replace(window, good=good, latency_ms=latency_ms, watts=power.watts)
    throughput = {rate.name: rate.how(window) for rate in RATES.values()}
    sent_ns, target = span.samples.sent_ns, _target(events)
    issued_per_s = window.per_s(int(np.count_nonzero((sent_ns >= span.start_ns) & (sent_ns <= span.end_ns))))
    clauses: tuple[SloClause, ...] = ()
    if objective:
        goodput = throughput["goodput_share"]
        clauses = slo.judge(objective, requests, latency_ms, goodput, span.headline, road, target.state)
    complete = bool(events.end and events.end["complete"])
    level = Level(
        index=events.index,
        stage=plan["stage"],
        model=plan["model"],
        load=_load(plan["load"]),
        headline=span.headline,
        complete=complete,
        ended_by=events.ended_by,
        started_s=events.start_ns / 1e9,
        window_s=window.seconds,
        warmup_trimmed_s=span.trimmed_s,
        requests=requests,
        throughput=throughput,
        concurrency_reached=window.in_flight(),
        issued_per_s=issued_per_s,
        littles_law_error=littles_law_error(span),
        latency_ms=latency_ms,
        tokens=everything.tokens(),
        by_kind=_by_kind(span, gaps),
        client=_client(run, span, latency_ms, throughput, issued_per_s),
        target=target,
        slo=clauses if complete else slo.until_cut(clauses),
        cautions=(),
        purpose=plan.get("purpose", "level"),
        road=road,
        intervals=() if span.is_rung else intervals_of(span, plan, objective),
        energy=energy.with_tokens(power, throughput["joules_per_output_token"], run.facts["scenario"]),
        endpoints=fleet.endpoints_of(run, span),
    )
    clipped = sum(hdr.clipped for hdr in gaps.values())
    return replace(level, cautions=cautions.of_level(level, run, span, clipped))


def _load(load: dict[str, Any]) -> ClosedLoad | OpenLoad:
    if load["kind"] == "closed":
        closed = Closed.from_json(load)
        return ClosedLoad(closed.concurrency, legs=closed.legs, ask=closed.ask)
    found = Open.from_json(load)
    if not (found.burstiness or found.legs or found.trace):
        return OpenLoad(found.rate_per_s, found.arrivals)
    return ShapedLoad(found.rate_per_s, found.arrivals, "open", found.burstiness, found.legs, found.trace)


def _by_kind(span: Span, gaps: dict[str, Hdr]) -> tuple[Kind, ...]:
    """Each kind of prompt on its own, where there are several."""
    samples = span.samples
    kinds = samples.counts(samples.kind)
    if len(kinds) < 2:
        return ()
    told = []
    for kind in kinds:
        mine = samples.said(samples.kind, kind)
        part = replace(span, samples=samples.take(mine), ok=span.ok[mine])
        everything = Measured.of(part.samples)
        latency_ms = Measured.of(part.counted).latencies(gaps.get(kind) or Hdr(), "told of the whole level only")
        told.append(Kind(kind, everything.requests(), everything.tokens(), latency_ms))
    return tuple(told)


def _client(
    run: RunData, span: Span, latency_ms: Latencies, throughput: dict[str, float | None], issued_per_s: float | None
) -> Client:
    facts = span.events.end["client"] if span.events.end else {}
    client = Client(
        bound=None,
        cpu_share=facts.get("cpu_share"),
        ceiling_share=_ceiling_share(run, span, throughput["output_tokens_per_s"], issued_per_s),
        loop_lag_p99_ms=_ms(facts.get("loop_lag_p99_ns")),
        loop_lag_max_ms=_ms(facts.get("loop_lag_max_ns")),
        gc_pauses=facts.get("gc_pauses"),
        gc_pause_max_ms=_ms(facts.get("gc_pause_max_ns")),
        steal_share=facts.get("steal_share"),
        others_share=_others_share(run, span),
        new_connections=facts.get("new_connections"),
        rss_bytes=facts.get("rss_bytes"),
        start_late_ms=_ms(facts.get("start_late_ns")),
        whose=clients.whose(facts),
    )
    because = cautions.client_bound(client, latency_ms)
    return replace(client, bound=because if because is None else bool(because), bound_because=because or ())


def _others_share(run: RunData, span: Span) -> float | None:
    """What programs that are neither we nor the target used of this machine's CPU; None where we were on others."""
    if run.facts.get("cluster"):
        return None
    end, cores = span.events.end or {}, run.facts["environment"].get("cores")
    client, target_s = end.get("client", {}), end.get("target", {}).get("cpu_s")
    machine_s, elapsed_s = client.get("machine_cpu_s"), client.get("elapsed_s")
    if machine_s is None or not elapsed_s or not cores or (run.facts["endpoint"].get("local") and target_s is None):
        return None
    others_s = float(machine_s) - client["cpu_s"] - (target_s or 0.0)
    return float(min(1.0, max(0.0, others_s / (cores * elapsed_s))))


def _ceiling_share(run: RunData, span: Span, tokens_per_s: float | None, issued_per_s: float | None) -> float | None:
    """How much of what this machine was calibrated to take the level took; the greater of events and requests.

    None where it was sent from others.
    """
    if run.facts.get("cluster"):
        return None
    calibration, processes = run.facts.get("calibration") or {}, run.facts.get("workers") or 1
    chunks, tokens = float(span.samples.chunks.sum()), float(np.nansum(span.samples.output_tokens))
    events_per_s = tokens_per_s * chunks / tokens if tokens_per_s and tokens else None
    shares = [
        per_s / (processes * ceiling)
        for per_s, ceiling in (
            (events_per_s, calibration.get("events_per_s")),
            (issued_per_s, calibration.get("requests_per_s")),
        )
        if per_s is not None and ceiling
    ]
    return max(shares, default=None)


def _ms(nanoseconds: float | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / NS_PER_MS


def _target(events: LevelEvents) -> Target:
    if events.end:
        target, rss = events.end["target"], events.end["target"]["rss_bytes"]
        return Target(target["state"], tuple(target["evidence"]), Rss(rss["before"], rss["peak"], rss["after"]))
    return Target(None, (), Rss(peak=events.peak_rss_bytes))
