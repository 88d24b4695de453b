"""Writes stable.json and stable.md: what a run found, without what changes by itself, to be kept under version control.

Of two runs of a deterministic scenario on one machine they differ in ``timings`` and nowhere else. So the fields are
picked, not left out: a new one of summary.json is no news here until somebody decides that it is. Not picked are

- stamps, durations, process ids, ports, addresses, paths and error texts, which hold them;
- memory, energy and the client's own state, which are never the same twice; calibration, intervals and cautions;
- the verdict, capacity, searches and rankings, which are made of timings;
- answers that were given while others were: an engine that batches may answer otherwise then (``determinism``).

Figures have three significant digits. Keys are sorted, levels and models are in the run's order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from loadbench.analysis.stats import Distribution
from loadbench.analysis.summary import ClosedLoad, Level, Summary
from loadbench.records import load_title
from loadbench.report.escape import code, json_text, markdown
from loadbench.report.words import NONE, figure

SCHEMA = 1
LATENCIES = (("ttft", "p50"), ("ttft", "p95"), ("e2e", "p50"), ("e2e", "p95"), ("tpot", "p50"))
RATES = ("requests_per_s", "output_tokens_per_s")
MODEL_FACTS = ("asked", "id", "status", "failed_at", "device", "execution_provider", "licence", "size_bytes")


def stable_files(summary: Summary, facts: Mapping[str, Any]) -> dict[str, bytes]:
    """Both files by name. ``facts`` is run.json."""
    found = document(summary, facts)
    text = orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)
    return {"stable.json": json_text(text), "stable.md": _markdown(found).encode()}


def document(summary: Summary, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What stable.json holds, in words, whole numbers and rounded ones; all that time tells is under ``timings``."""
    scenario, environment, endpoint = facts["scenario"], summary.environment, summary.endpoint
    return {
        "schema": SCHEMA,
        "loadbench": summary.loadbench,
        "scenario": summary.name,
        "status": summary.status,
        "seed": facts.get("seed"),
        "request": _without(scenario.get("request"), "headers"),
        "prompts": [_without(prompt, "file") for prompt in scenario.get("prompts") or ()],
        "machine": {name: environment.get(name) for name in ("cpu", "cores", "machine")}
        | {"os": _plain_os(environment.get("os"))},
        "engine": {
            "title": endpoint.get("title"),
            "embedded": endpoint.get("embedded"),
            "versions": (endpoint.get("facts") or {}).get("versions") or {},
        },
        "models": [{name: row.get(name) for name in MODEL_FACTS} for row in facts["models"]],
        "levels": [_level(level) for level in summary.levels],
        "answers": _answers(summary),
        "quality": [_quality(found) for found in summary.quality],
        "timings": {
            "models": [
                {
                    "model": row["id"] or row["asked"],
                    "load_ms": _round(row["load_ms"]),
                    "first_ms": _round(row["first_ms"]),
                }
                for row in facts["models"]
            ],
            "levels": [_timings(level) for level in summary.levels],
        },
    }


def _plain_os(told: str | None) -> str | None:
    """The system's name without its kernel's build, which every update changes: Linux-6.18 of Linux-6.18.44-fc-…"""
    return None if told is None else re.sub(r"^(Linux-\d+\.\d+)\S*", r"\1", told)


def _without(found: Mapping[str, Any] | None, *names: str) -> dict[str, Any]:
    return {name: value for name, value in (found or {}).items() if name not in names}


def _level(level: Level) -> dict[str, Any]:
    told = {"model": level.model, "load": load_title(level.load), "complete": level.complete}
    told["state"] = level.target.state
    return told if _is_timed(level) else told | _asked(level)


def _is_timed(level: Level) -> bool:
    """Whether how much was asked in it is a matter of speed."""
    return level.ended_by != "requests"


def _asked(level: Level) -> dict[str, Any]:
    requests, tokens = level.requests, level.tokens
    return {
        "attempted": requests.attempted,
        "ok": requests.ok,
        "failed": dict(requests.failed),
        "input_tokens_mean": _round(tokens.input_mean),
        "output_tokens": tokens.output_total,
    }


def _timings(level: Level) -> dict[str, Any]:
    """The headline's latencies and rates. The SLO is kept or missed by them."""
    told: dict[str, Any] = {"model": level.model, "load": load_title(level.load)}
    indicative = []
    for metric, statistic in LATENCIES:
        name, series = f"{metric}_{statistic}_ms", level.latency_ms[metric]
        found = series.get(level.headline) or series.get("service") or Distribution(0)
        told[name] = _round(found.value(statistic))
        indicative += [name] if statistic in found.indicative else []
    told |= {name: _round(level.throughput.get(name)) for name in RATES}
    told["indicative"] = indicative
    if level.slo:
        told["slo"] = {clause.clause: clause.result for clause in level.slo}
    return told | _asked(level) if _is_timed(level) else told


def _answers(summary: Summary) -> dict[str, dict[str, dict[str, list[str]]]]:
    """The hashes of the answers by model, kind of prompt and place: of what was asked with nothing else under way."""
    alone = {level.index for level in summary.levels if _is_one_user(level)}
    found: dict[str, dict[str, dict[str, set[str]]]] = {}
    for prompt in summary.answers:
        said = {one.answer_hash for one in prompt.variants if alone & set(one.levels) or not prompt.levels}
        if said:
            places = found.setdefault(prompt.model, {}).setdefault(prompt.of, {})
            places.setdefault(f"{prompt.place:03}", set()).update(said)
    return {
        model: {kind: {place: sorted(said) for place, said in places.items()} for kind, places in kinds.items()}
        for model, kinds in found.items()
    }


def _is_one_user(level: Level) -> bool:
    return isinstance(level.load, ClosedLoad) and level.load.concurrency == 1


def _quality(found: Any) -> dict[str, Any]:
    checks, mark = found.checks, found.mark
    return {
        "model": found.model,
        "answers": found.answers,
        "failed": found.failed,
        "cut": found.cut,
        "checks_passed": None if checks is None else checks.passed,
        "checks_of": None if checks is None else checks.of,
        "mark": None if mark is None else _round(mark.value),
        "mark_prompts": None if mark is None else mark.n,
        "mark_by": None if mark is None else mark.by,
    }


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _markdown(found: Mapping[str, Any]) -> str:
    """The same for people; a line that differs has a timing in it."""
    machine, engine, timings = found["machine"], found["engine"], found["timings"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(engine["versions"].items()))
    facts = (
        f"{found['status']}, loadbench {found['loadbench']}, seed {found['seed']}",
        f"{engine['title']}{', embedded' if engine['embedded'] else ''}{f': {versions}' if versions else ''}",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['os']}",
    )
    request = orjson.dumps(found["request"], option=orjson.OPT_SORT_KEYS).decode()
    blocks = [
        f"# {markdown(found['scenario'])}",
        "\n".join(f"- {markdown(fact)}" for fact in facts) + f"\n- request {code(request)}",
        *_section("Models", found["models"]),
        *_section("Levels", found["levels"]),
        *_section("Answers, one at a time", list(_hashes(found["answers"]))),
        *_section("Quality", found["quality"]),
        *_section("Timings: models", timings["models"]),
        *_section("Timings: levels", timings["levels"]),
    ]
    return "\n\n".join(blocks) + "\n"


def _hashes(answers: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for model, kinds in sorted(answers.items()):
        for kind, places in sorted(kinds.items()):
            for place, said in sorted(places.items()):
                yield {"model": model, "prompts": kind, "place": int(place), "hashes": said}


def _section(title: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table of these, where there are any; a column that only some have is empty in others. ``~``: indicative."""
    if not rows:
        return
    yield f"## {title}"
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "indicative"]
    lines = [names, ["---"] * len(names), *([_cell(row, name) for name in names] for row in rows)]
    yield "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name, "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return figure(value) + (" ~" if name in row.get("indicative", ()) else "")
    if isinstance(value, Mapping):
        value = ", ".join(f"{word} {said}" for word, said in value.items())
    elif isinstance(value, list):
        value = ", ".join(value)
    return NONE if value is None else markdown(value)
