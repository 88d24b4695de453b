"""history.jsonl: a row for each run, with the few figures that are watched over months. Made, written and read here.

What a figure is called and how it comes from a level is in ``FIGURES``; what they show over time is ``trend.py``'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from loadbench.analysis.metrics import LATENCIES, RATES
from loadbench.analysis.stats import Distribution
from loadbench.analysis.summary import Level, Summary
from loadbench.errors import UsageError
from loadbench.records import load_title

HISTORY = "history.jsonl"
SCHEMA = 1
MACHINE = ("machine", "cpu", "cores")
"""With the memory in GiB, what a machine is told by: a virtual one has some pages more or less at every start."""


Place = tuple[str, str, int]
BY_PLAN = ("censored", "total_deadline")  # how the requests of a rung end


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of a level that is kept. ``name`` is how it is asked for, ``key`` how the row spells it."""

    name: str
    key: str
    title: str
    unit: str
    of: Callable[[Level], float | None]
    lower_is_better: bool = True
    indicative: Callable[[Level], bool] = lambda level: False


def _latency(metric: str, percentile: str) -> Figure:
    def told(level: Level) -> Distribution:
        series = level.latency_ms[metric]
        return series.get(level.headline) or series["service"]

    return Figure(
        f"{metric}.{percentile}",
        f"{metric}_{percentile}_ms",
        f"{LATENCIES[metric].title} {percentile}",
        "ms",
        lambda level: told(level).value(percentile),
        indicative=lambda level: percentile in told(level).indicative,
    )


def _failures(level: Level) -> int:
    """Not what a rung of a memory ladder gives up at its end, as planned."""
    planned = sum(level.requests.failed.get(outcome, 0) for outcome in BY_PLAN) if level.purpose == "rung" else 0
    return level.requests.attempted - level.requests.ok - planned


_LATENCIES = (("ttft", "p50"), ("ttft", "p95"), ("e2e", "p50"), ("e2e", "p95"), ("tpot", "p50"))
_TOKENS = "output_tokens_per_s"

FIGURES: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        *(_latency(metric, percentile) for metric, percentile in _LATENCIES),
        Figure(_TOKENS, _TOKENS, RATES[_TOKENS].title, "tok/s", lambda level: level.throughput[_TOKENS], False),
        Figure("failures", "failures", "Failures", "", _failures),
        Figure("peak_rss", "peak_rss_bytes", "Peak memory", "bytes", lambda level: level.target.rss_bytes.peak),
    )
}


@dataclass(frozen=True, slots=True)
class Commit:
    """The commit that a working tree was at; ``dirty`` where tracked files differed from it."""

    id: str
    dirty: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A run as the history has it. ``engine`` are the service's title and versions, ``machine`` a hash of ``MACHINE``.

    ``scenario_hash`` is provenance's: of what is asked, and neither of whom nor of which model. ``levels`` has each
    level's figures, by name, under its model, its load and the how-manieth of these it is; ``indicative``, under the
    same, the names of those on few samples.
    """

    time: str
    scenario: str
    scenario_hash: str
    commit: Commit | None
    machine: str
    machine_title: str
    engine: str
    served_at: str
    loadbench: str
    status: str
    exit_code: int
    path: str
    levels: Mapping[Place, Mapping[str, float | None]]
    indicative: Mapping[Place, Collection[str]] = field(default_factory=dict)


def row(summary: Summary, scenario_hash: str, commit: Commit | None, code: int, path: str) -> dict[str, Any]:
    """A run's row, ready to be written. ``path`` is the run's directory as seen from the history's."""
    environment, endpoint = summary.environment, summary.endpoint
    memory_bytes = environment.get("memory_bytes")
    machine = {name: environment.get(name) for name in MACHINE}
    machine["memory_gib"] = None if memory_bytes is None else round(memory_bytes / 2**30)
    facts = endpoint.get("facts") or {}
    served_at = "this machine" if endpoint.get("local") else urlsplit(endpoint.get("url") or "").netloc
    return {
        "schema": SCHEMA,
        "time": summary.started,
        "scenario": summary.name,
        "scenario_hash": scenario_hash,
        "commit": None if commit is None else commit.id,
        "dirty": None if commit is None else commit.dirty,
        "models": [model.id or model.asked for model in summary.models],
        "machine": {"fingerprint": _hash(machine), **machine, "os": environment.get("os")},
        "engine": {
            "title": endpoint.get("title"),
            "at": served_at,
            "version": facts.get("version"),
            "versions": facts.get("versions"),
        },
        "loadbench": summary.loadbench,
        "status": summary.status,
        "exit_code": code,
        "path": path,
        "levels": [_level(level) for level in summary.levels if level.purpose != "probe"],
    }


def _level(level: Level) -> dict[str, Any]:
    """A probe is not here: which loads a search tries is another question every time."""
    figures = {figure.key: figure.of(level) for figure in FIGURES.values()}
    few = [figure.key for figure in FIGURES.values() if figure.indicative(level)]
    named = {"model": level.model, "load": load_title(level.load), "complete": level.complete}
    return {**named, **figures, "indicative": few}


def _hash(node: Any) -> str:
    return hashlib.sha256(orjson.dumps(node, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def read(path: Path) -> tuple[list[Row], int]:
    """Every row, oldest first, and how many lines are none: torn, or of another schema. UsageError: no file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"{path}: expected the history that `loadbench run` writes, found {error.strerror}") from error
    rows, unreadable = [], 0
    for line in lines:
        try:
            rows.append(_read_row(orjson.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            unreadable += bool(line.strip())
    return sorted(rows, key=lambda row: row.time), unreadable


def _read_row(found: dict[str, Any]) -> Row:
    """ValueError, KeyError, TypeError or AttributeError where it is none."""
    if found["schema"] != SCHEMA:
        raise ValueError("another schema")
    machine, engine = found["machine"], found["engine"]
    versions = [f"{name} {version}" for name, version in (engine.get("versions") or {}).items()]
    cores, gib = machine.get("cores"), machine.get("memory_gib")
    named = (machine.get("cpu"), f"{cores} cores" if cores else None, f"{gib} GiB" if gib else None)
    levels, indicative = _read_levels(found["levels"])
    return Row(
        time=str(found["time"]),
        scenario=str(found["scenario"]),
        scenario_hash=str(found["scenario_hash"]),
        commit=None if found["commit"] is None else Commit(str(found["commit"]), bool(found["dirty"])),
        machine=str(machine["fingerprint"]),
        machine_title=", ".join(str(part) for part in named if part),
        engine=", ".join(str(part) for part in (engine.get("title"), engine.get("version"), *versions) if part),
        served_at=str(engine.get("at")),
        loadbench=str(found["loadbench"]),
        status=str(found["status"]),
        exit_code=int(found["exit_code"]),
        path=str(found["path"]),
        levels=levels,
        indicative=indicative,
    )


def _read_levels(
    found: Sequence[Mapping[str, Any]],
) -> tuple[dict[Place, dict[str, float | None]], dict[Place, frozenset[str]]]:
    """The figures, and which of them stand on few samples; rows of before that was kept say of none."""
    levels: dict[Place, dict[str, float | None]] = {}
    indicative: dict[Place, frozenset[str]] = {}
    for level in found:
        model, load = str(level["model"]), str(level["load"])
        place = (model, load, sum((model, load) == known[:2] for known in levels))
        figures = {name: _number(level.get(figure.key)) for name, figure in FIGURES.items()}
        levels[place] = figures if level["complete"] else dict.fromkeys(figures)
        few = level.get("indicative") or ()
        indicative[place] = frozenset(name for name, figure in FIGURES.items() if figure.key in few)
    return levels, indicative


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
