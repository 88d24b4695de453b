"""What the run.json of several shards say: whether they are of one run, how it ended, and what its own is to say."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import mul
from pathlib import Path
from typing import Any

import orjson

from loadbench.analysis.rundir import read_facts
from loadbench.analysis.words import listed
from loadbench.engine.merge import HISTOGRAMS, SAMPLES, TELEMETRY, parts
from loadbench.errors import UsageError

ENDED = {
    "target_died": "saw the target die",
    "interrupted": "was interrupted",
    "failed": "failed",
    "running": "was cut off",
}
"""What became of a shard that is not complete, by its status, worst first: so becomes the run."""

AMISS = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)
"""What comes of facts that are not as a run writes them."""

MOST_TOLD = 3  # shards that are named, of those that saw the same


@dataclass(frozen=True, slots=True)
class Part:
    """The run of one shard. ``facts`` is what its run.json says."""

    path: Path
    facts: dict[str, Any]

    @property
    def index(self) -> int:
        return int(self.facts["shard"]["index"])

    @property
    def name(self) -> str:
        return f"shard {self.index}/{self.facts['shard']['count']}"


def read_parts(paths: Sequence[Path]) -> list[Part]:
    """The shards in their order. UsageError where they are not shards of one run, or one is there twice."""
    found = []
    for path in paths:
        facts = read_facts(path)
        if facts.get("shards"):
            raise UsageError(f"{path}: expected a run made with --shard, found one of shards that are together already")
        if not facts.get("shard"):
            raise UsageError(f"{path}: expected a run made with --shard, found one of its own")
        for name in (SAMPLES, TELEMETRY, HISTOGRAMS):
            if not any(file.exists() for file in parts(path, name)):
                raise UsageError(f"{path}: expected the three files of a shard, found no {name}; copy it again")
        found.append(_checked(Part(path, facts)))
    found.sort(key=lambda part: part.index)
    for one, other in pairwise(found):
        if one.index == other.index:
            raise UsageError(f"{one.path} and {other.path}: expected each shard once, found {one.name} in both")
    first = _same(found[0])
    for part in found[1:]:
        if different := _first_difference(first, _same(part)):
            where, ours, theirs = different
            both = f"{found[0].path} and {part.path}"
            raise UsageError(f"{both}: expected shards of one run, found {where} {_told(ours)} and {_told(theirs)}")
    return found


def _checked(part: Part) -> Part:
    """The part, if its facts would do for a run of its own."""
    shard, status = part.facts["shard"], part.facts.get("status")
    try:
        if type(shard["index"]) is not int or type(shard["count"]) is not int or not part.index < shard["count"]:
            raise ValueError(f"shard {shard['index']} of {shard['count']}")
        if type(shard["machine"]) is not str or status not in ("complete", *ENDED):
            raise ValueError(f"machine {shard['machine']}, status {status}")
        _same(part)
        merged_facts([part], *ended([part], {}))
    except AMISS as error:
        raise not_ours(f"{part.path / 'run.json'}", error) from error
    return part


def not_ours(where: str, error: Exception) -> UsageError:
    found = f"none with {error}" if isinstance(error, KeyError) else f"something else ({error})"
    return UsageError(f"{where}: expected shards as loadbench run writes them, found {found}")


def _same(part: Part) -> dict[str, Any]:
    """What all shards of a run have in common."""
    facts = part.facts
    return {
        "loadbench": facts["loadbench"],
        "scenario": facts["scenario"],
        "models": [model["id"] for model in facts["models"]],
        "levels": facts["levels"],
        "shards": facts["shard"]["count"],
        "start": facts["started"],
    }


def _first_difference(ours: Any, theirs: Any, where: str = "") -> tuple[str, Any, Any] | None:
    if ours == theirs:
        return None
    if isinstance(ours, dict) and isinstance(theirs, dict):
        steps: list[Any] = list(dict.fromkeys((*ours, *theirs)))
        pairs = [(f"{where}.{step}" if where else str(step), ours.get(step), theirs.get(step)) for step in steps]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(f"{where}[{place}]", *pair) for place, pair in enumerate(zip(ours, theirs, strict=True))]
    else:
        return where, ours, theirs
    return next(found for step, one, other in pairs if (found := _first_difference(one, other, step)))


def _told(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else orjson.dumps(value).decode()
    return text if len(text) <= 80 else f"{text[:79]}…"


Lost = Mapping[int, Collection[int]]
"""By a shard's index the levels of which its files do not tell the same."""


def merged_facts(found: Sequence[Part], status: str, reason: str | None) -> dict[str, Any]:
    first = found[0].facts
    ends = [(part.facts["anchors"]["start"], part.facts["anchors"]["end"]) for part in found]
    lasted_ns = max((end["monotonic_ns"] - start["monotonic_ns"] for start, end in ends if end), default=None)
    start = first["anchors"]["start"]
    local = next((part.facts["endpoint"] for part in found if part.facts["endpoint"].get("local")), None)
    merged = {
        **first,
        "status": status,
        "reason": reason,
        "command": _command(first["command"]),
        "environment": first["environment"] | {"shards": _spread(found)},
        "anchors": {
            "start": start,
            "end": None
            if lasted_ns is None
            else {"wall_ns": start["wall_ns"] + lasted_ns, "monotonic_ns": start["monotonic_ns"] + lasted_ns},
        },
        "endpoint": local or first["endpoint"],
        "models": [_model(found, place) for place in range(len(first["models"]))],
        "not_run": _not_run(found),
        "memory": sees_memory(found).facts.get("memory"),
        "workers": sum(part.facts.get("workers") or 1 for part in found),
        "calibration": _calibration(found),
        "shards": [_row(part) for part in found],
    }
    del merged["shard"]
    return merged


def _spread(found: Sequence[Part]) -> dict[str, int]:
    """On how much the load was spread, the first shard's machine being the one that is described."""
    machines = {part.facts["shard"]["machine"] for part in found}
    processes = sum(part.facts.get("workers") or 1 for part in found)
    return {"count": len(found), "machines": len(machines), "processes": processes}


def ended(found: Sequence[Part], lost: Lost) -> tuple[str, str | None]:
    """How the run of these shards ended, and why not as planned."""
    count = found[0].facts["shard"]["count"]
    missing = sorted(set(range(count)) - {part.index for part in found})
    told, status = [], "complete"
    for how, words in ENDED.items():
        parts_so = [part for part in found if part.facts["status"] == how]
        if parts_so and status == "complete":
            status = "failed" if how == "running" else how
        told += [
            f"{part.name} {words}" + (f": {part.facts['reason']}" if part.facts["reason"] else "")
            for part in parts_so[:MOST_TOLD]
        ]
        told += [f"{len(parts_so) - MOST_TOLD} more {words}"] if len(parts_so) > MOST_TOLD else []
    if halves := [part.name for part in found if part.index in lost]:
        names = halves[:MOST_TOLD] + ([f"{len(halves) - MOST_TOLD} more"] if len(halves) > MOST_TOLD else [])
        told.append(f"{SAMPLES} and {TELEMETRY} of {listed(names)} do not belong together: copied in part")
        status = "failed" if status == "complete" else status
    if missing:
        names = [f"{index}" for index in missing[:MOST_TOLD]]
        names += [f"{len(missing) - MOST_TOLD} more"] if len(missing) > MOST_TOLD else []
        are = "s {} of {} are" if len(missing) > 1 else " {} of {} is"
        told.insert(0, f"shard{are.format(listed(names), count)} missing")
        status = "failed" if status == "complete" else status
    return status, "; ".join(told) or None


def _command(command: str) -> str:
    """With a place to put each shard's number, and the time, since the one of this run is over."""
    return re.sub(r"(--start-at[ =])\S+", r"\1TIME", re.sub(r"(--shard[ =])\d+", r"\1I", command))


def _model(found: Sequence[Part], place: int) -> dict[str, Any]:
    """A model as the first shard had it, or as the first that could not have it."""
    rows = [(part, part.facts["models"][place]) for part in found]
    for part, row in rows:
        if row["status"] == "failed":
            return {**row, "reason": f"{part.name}: {row['reason']}"}
    return dict(next((row for _, row in rows if row["status"] != "ok"), rows[0][1]))


def _not_run(found: Sequence[Part]) -> list[dict[str, Any]]:
    """What any of them left out; of what several left out the first one's reason."""
    left = {tuple(row["levels"]): row for part in reversed(found) for row in part.facts.get("not_run") or ()}
    return list(left.values())


def _calibration(found: Sequence[Part]) -> dict[str, Any] | None:
    """What a process of theirs can take on average, and the largest error; None where one was not calibrated."""
    known = [dict(part.facts["calibration"]) for part in found if part.facts.get("calibration")]
    if len(known) < len(found):
        return None
    processes = [part.facts.get("workers") or 1 for part in found]
    for name in ("events_per_s", "requests_per_s"):
        ceilings = [calibration.get(name) for calibration in known]
        if None not in ceilings:
            known[0][name] = sum(map(mul, processes, ceilings)) / sum(processes)
    errors_ms = [calibration.get("ttft_error_p99_ms") for calibration in known]
    return known[0] | {"ttft_error_p99_ms": max((error for error in errors_ms if error is not None), default=None)}


def _row(part: Part) -> dict[str, Any]:
    """A shard, for run.json."""
    facts, machine = part.facts, part.facts["environment"]
    return {
        **{name: facts["shard"][name] for name in ("index", "machine")},
        **{name: facts[name] for name in ("status", "reason")},
        "workers": facts.get("workers") or 1,
        **{name: machine.get(name) for name in ("os", "cpu", "cores", "memory_bytes", "python")},
    }


def sees_memory(found: Sequence[Part]) -> Part:
    """The first shard that reads the target's memory: all that do read the same."""
    return next((part for part in found if (part.facts.get("memory") or {}).get("source")), found[0])
