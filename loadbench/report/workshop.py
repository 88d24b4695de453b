"""Writes benchmark_report.json and benchmark_report.md as the Foundry Local workshop's exporter does.

Its names, units, order and rounding, with our figures. That format has no place for doubts: what is not known is null
and `-`, and the paragraph below its table says why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadbench.analysis.candidates import load_order
from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.rundir import RunData
from loadbench.analysis.stats import FLOORS, LEASTS
from loadbench.analysis.summary import ClosedLoad, Level, Summary
from loadbench.records import load_title
from loadbench.report.escape import json_text, markdown
from loadbench.report.words import count

HEAD = "|Model|Avg Latency (s)|p95 (s)|Tokens/sec|Rounds|First Token (s)|\n|---|---|---|---|---|---|"


@dataclass(frozen=True, slots=True)
class Row:
    """A model by the name it was asked for, at its lowest load. Times are in seconds; ``rounds`` are its answers."""

    alias: str
    latency_avg: float
    latency_p95: float | None
    tokens_per_sec_avg: float | None
    rounds: int
    first_token_latency_avg: float | None
    at: Level


def workshop_files(summary: Summary, run: RunData) -> dict[str, bytes]:
    """Both files by name; models without an answer are in neither table, as there."""
    rows = list(_rows(summary, run))
    told = json.dumps([_fields(row) for row in rows], indent=2, ensure_ascii=False) + "\n"
    table = "\n".join([HEAD, *map(_line, rows)])
    text = f"{table}\n\n**Note** {' '.join(_notes(rows, run.facts['models']))}\n"
    return {"benchmark_report.json": json_text(told.encode()), "benchmark_report.md": text.encode()}


def _rows(summary: Summary, run: RunData) -> Iterator[Row]:
    for model in run.facts["models"]:
        mine = [level for level in summary.levels if level.model == model["id"] and level.requests.ok]
        plain = [level for level in mine if not (isinstance(level.load, ClosedLoad) and level.load.ask)]
        at = min(plain or mine, key=load_order, default=None)
        if at is None:
            continue
        e2e_ms, ttft_ms = (at.latency_ms[metric]["service"] for metric in ("e2e", "ttft"))
        if e2e_ms.mean is None:  # the answers that it has are all of its warm-up
            continue
        yield Row(
            alias=model["asked"],
            latency_avg=e2e_ms.mean / 1e3,
            latency_p95=None if e2e_ms.p95 is None else e2e_ms.p95 / 1e3,
            tokens_per_sec_avg=_tokens_per_s(run, at),
            rounds=e2e_ms.n,
            first_token_latency_avg=None if ttft_ms.mean is None else ttft_ms.mean / 1e3,
            at=at,
        )


def _tokens_per_s(run: RunData, level: Level) -> float | None:
    """The mean over the answers of their tokens, the prompt's too, ÷ their latency; None where not all have usage."""
    samples, since_s = run.samples, level.started_s + (level.warmup_trimmed_s or 0.0)
    counted = samples.said(samples.phase, "load") & samples.said(samples.outcome, "ok")
    mine = samples.take(counted & (samples.level == level.index) & (samples.due_ns >= round(since_s * 1e9)))
    series = LATENCIES["e2e"].series["service"]
    if series is None or not len(mine) or not mine.said(mine.token_source, "usage").all():
        return None
    rates = (mine.input_tokens + mine.output_tokens) / (series(mine) / 1e9)
    return float(rates.mean()) if np.isfinite(rates).all() else None


def _fields(row: Row) -> dict[str, Any]:
    """The exporter's keys in its order; the last one only where answers were streamed."""
    fields: dict[str, Any] = {
        "alias": row.alias,
        "latency_avg": row.latency_avg,
        "latency_p95": row.latency_p95,
        "tokens_per_sec_avg": row.tokens_per_sec_avg,
        "rounds": row.rounds,
    }
    if row.first_token_latency_avg is not None:
        fields["first_token_latency_avg"] = row.first_token_latency_avg
    return fields


def _line(row: Row) -> str:
    cells = (
        markdown(row.alias),
        f"{row.latency_avg:.2f}",
        _number(row.latency_p95, 2),
        _number(row.tokens_per_sec_avg, 1),
        str(row.rounds),
        _number(row.first_token_latency_avg, 2),
    )
    return f"|{'|'.join(cells)}|"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _notes(rows: Sequence[Row], models: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the table cannot say: what stands on too little, was not at one user, failed or is missing."""
    yield "Tokens/sec counts the prompt's tokens too, as the workshop does; output tokens alone are in report.md."
    if few := [row.alias for row in rows if row.rounds < LEASTS["p95"]]:
        yield f"p95 is `-` for {markdown(', '.join(few))}: below {LEASTS['p95']} rounds it is the maximum."
    if unsure := [row.alias for row in rows if LEASTS["p95"] <= row.rounds < FLOORS["p95"]]:
        yield f"p95 of {markdown(', '.join(unsure))} is indicative: it is firm from {FLOORS['p95']} rounds."
    for row in rows:
        if (load := load_title(row.at.load)) != "1 user":
            yield f"{markdown(row.alias)} was measured at {markdown(load)}, not at 1 user."
        if failed := row.at.requests.attempted - row.at.requests.ok:
            attempted = count(row.at.requests.attempted, "request")
            yield f"{markdown(row.alias)}: {failed:,} of {attempted} failed and are in no average."
    there = {row.alias for row in rows}
    for model in models:
        if model["asked"] not in there:
            why = f"failed at {model['failed_at']}" if model.get("failed_at") else "no answer"
            yield f"Not in the table: {markdown(model['asked'])} ({markdown(why)})."
