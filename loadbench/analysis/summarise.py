"""Makes the Summary of a run from its directory's columns and events: the order of things, level by level.

What a number means is in ``metrics``, how sure it is in ``stats``, doubts are in ``cautions``, words in ``verdict``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from loadbench.analysis import cautions, slo, verdict
from loadbench.analysis.metrics import LATENCIES, RATES, Series, Window
from loadbench.analysis.rundir import LevelEvents, Mask, RunData, Samples
from loadbench.analysis.stats import NS_PER_MS, describe, describe_hdr
from loadbench.analysis.summary import (
    SCHEMA,
    Client,
    ClosedLoad,
    Kind,
    Latencies,
    Level,
    Model,
    OpenLoad,
    Requests,
    Rss,
    Summary,
    Target,
    Tokens,
    Verdict,
)
from loadbench.errors import UsageError
from loadbench.hdr import Hdr
from loadbench.scenario.schema import Slo


def summarise(run: RunData) -> Summary:
    """Everything that is told about a run."""
    facts = run.facts
    objective = _slo(run)
    levels = tuple(_level(run, events, objective) for events in run.levels)
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
        command=facts["command"],
        verdict=Verdict("", None, None),
        environment=facts["environment"],
        endpoint=facts["endpoint"],
        models=tuple(_model(model) for model in facts["models"]),
        levels_planned=len(facts["levels"]),
        levels=levels,
        cautions=(),
    )
    summary = replace(summary, cautions=cautions.of_run(summary, run))
    return replace(summary, verdict=verdict.of(summary))


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


def _model(model: dict[str, Any]) -> Model:
    return Model(
        asked=model["asked"],
        id=model["id"],
        synthetic=model["synthetic"],
        status=model["status"],
        reason=model["reason"],
        load_ms=model["load_ms"],
        first_ms=model["first_ms"],
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    """A level's samples of the load phase, and which of them succeeded."""

    samples: Samples
    ok: Mask
    sent: Mask

    @classmethod
    def of(cls, samples: Samples) -> _Measured:
        return cls(samples, samples.said(samples.outcome, "ok"), ~np.isnan(samples.sent_ns))

    def requests(self) -> Requests:
        outcomes = self.samples.counts(self.samples.outcome)
        return Requests(len(self.samples), outcomes.pop("ok", 0), outcomes)

    def tokens(self) -> Tokens:
        output = self.samples.output_tokens[self.ok]
        return Tokens(
            input_mean=_mean(self.samples.input_tokens[self.ok]),
            output_mean=_mean(output),
            output_total=int(np.nansum(output)),
            source=self.samples.counts(self.samples.token_source[self.ok]),
        )

    def latencies(self, gaps: Hdr) -> Latencies:
        """Every series of every metric; what no successful request has is empty."""
        counted = {"ok": self.ok, "sent": self.sent}
        latencies: Latencies = {}
        for metric in LATENCIES.values():
            latencies[metric.name] = {}
            for series, stamps in metric.series.items():
                if stamps is None:
                    latencies[metric.name][series] = describe_hdr(gaps)
                    continue
                values_ns = stamps(self.samples)[counted[metric.of]]
                # Failures count where the metric applies to these requests at all; non-streaming ones have no TTFT.
                applies = metric.of == "ok" and not (values_ns.size and np.isnan(values_ns).all())
                failed = int(np.count_nonzero(~self.ok)) if applies else None
                latencies[metric.name][series] = describe(values_ns, failed)
        return latencies


def _mean(values: Any) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _level(run: RunData, events: LevelEvents, objective: Slo | None) -> Level:
    plan = run.facts["levels"][events.index]
    load = _load(plan["load"])
    headline: Series = "service" if isinstance(load, ClosedLoad) else "response"
    everything = run.samples
    measured = _Measured.of(
        everything.take((everything.level == events.index) & everything.said(everything.phase, "load"))
    )
    samples = measured.samples
    gaps = {kind: hdr for (level, kind), hdr in run.gaps.items() if level == events.index}
    latency_ms = measured.latencies(_merged(gaps))
    requests = measured.requests()
    end_ns = _window_end_ns(events, samples)
    good = slo.good(objective, samples, measured.ok, headline) if objective else None
    window = Window(samples, measured.ok, good, events.start_ns, end_ns, latency_ms)
    throughput = {rate.name: rate.how(window) for rate in RATES.values()}
    level = Level(
        index=events.index,
        stage=plan["stage"],
        model=plan["model"],
        load=load,
        headline=headline,
        complete=bool(events.end and events.end["complete"]),
        ended_by=events.ended_by,
        started_s=events.start_ns / 1e9,
        window_s=window.seconds,
        requests=requests,
        throughput=throughput,
        concurrency_reached=_in_flight(window),
        issued_per_s=window.per_s(int(np.count_nonzero(samples.sent_ns <= end_ns))),
        latency_ms=latency_ms,
        tokens=measured.tokens(),
        by_kind=_by_kind(samples, gaps),
        client=_client(events.end["client"] if events.end else {}, latency_ms),
        target=_target(events),
        slo=slo.judge(objective, requests, latency_ms, throughput["goodput_share"], headline) if objective else (),
        cautions=(),
    )
    return replace(level, cautions=cautions.of_level(level, run, window))


def _load(load: dict[str, Any]) -> ClosedLoad | OpenLoad:
    if load["kind"] == "closed":
        return ClosedLoad(load["concurrency"])
    return OpenLoad(load["rate_per_s"], load["arrivals"])


def _merged(gaps: dict[str, Hdr]) -> Hdr:
    merged = Hdr()
    for hdr in gaps.values():
        merged.merge(hdr)
    return merged


def _window_end_ns(events: LevelEvents, samples: Samples) -> int:
    """When the level stopped issuing, which is the end of what is measured at its load.

    Where it was cut off before, the last thing that happened in it. Where it stopped so early that fewer than half of
    its requests had ended (eight users, eight requests), the end of the last: else nothing would be inside.
    """
    done_ns = samples.done_ns[~np.isnan(samples.done_ns)]
    last_ns = int(done_ns.max()) if done_ns.size else events.start_ns
    if events.issue_end_ns is None:
        last_tick_ns: int = events.ticks[-1]["t_ns"] if events.ticks else 0
        return max(last_ns, last_tick_ns)
    ended = np.count_nonzero(done_ns <= events.issue_end_ns)
    return events.issue_end_ns if 2 * ended >= len(samples) else max(last_ns, events.issue_end_ns)


def _in_flight(window: Window) -> float | None:
    """The time-weighted mean of requests in flight."""
    samples = window.samples
    done_ns = np.where(np.isnan(samples.done_ns), window.end_ns, samples.done_ns)
    inside_ns = np.minimum(done_ns, window.end_ns) - np.maximum(samples.sent_ns, window.start_ns)
    return window.per_s(float(np.nansum(np.maximum(inside_ns, 0.0))) / 1e9)


def _by_kind(samples: Samples, gaps: dict[str, Hdr]) -> tuple[Kind, ...]:
    """Each kind of prompt on its own, where there are several."""
    kinds = samples.counts(samples.kind)
    if len(kinds) < 2:
        return ()
    told = []
    for kind in kinds:
        measured = _Measured.of(samples.take(samples.said(samples.kind, kind)))
        told.append(Kind(kind, measured.requests(), measured.tokens(), measured.latencies(gaps.get(kind) or Hdr())))
    return tuple(told)


def _client(facts: dict[str, Any], latency_ms: Latencies) -> Client:
    client = Client(
        bound=None,
        cpu_share=facts.get("cpu_share"),
        loop_lag_p99_ms=_ms(facts.get("loop_lag_p99_ns")),
        loop_lag_max_ms=_ms(facts.get("loop_lag_max_ns")),
        gc_pauses=facts.get("gc_pauses"),
        gc_pause_max_ms=_ms(facts.get("gc_pause_max_ns")),
        steal_share=facts.get("steal_share"),
        new_connections=facts.get("new_connections"),
        rss_bytes=facts.get("rss_bytes"),
    )
    because = cautions.client_bound(client, latency_ms)
    return replace(client, bound=because if because is None else bool(because), bound_because=because or ())


def _ms(nanoseconds: float | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / NS_PER_MS


def _target(events: LevelEvents) -> Target:
    if events.end:
        target, rss = events.end["target"], events.end["target"]["rss_bytes"]
        return Target(target["state"], tuple(target["evidence"]), Rss(rss["before"], rss["peak"], rss["after"]))
    peak = max(
        (tick["target_rss_bytes"] for tick in events.ticks if tick["target_rss_bytes"] is not None), default=None
    )
    return Target(None, (), Rss(peak=peak))
