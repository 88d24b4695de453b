"""Makes one run of the runs of its shards: holds their facts against each other, and puts their directories together.

What becomes of samples and histograms is ``engine.merge``'s; here is what several shards say of one thing: how the run
ended, how the target was, what the client did.
"""

from __future__ import annotations

import heapq
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import mul
from pathlib import Path
from typing import Any

import orjson

from loadbench.analysis.rundir import read_facts
from loadbench.analysis.words import listed
from loadbench.engine.merge import HISTOGRAMS, SAMPLES, TELEMETRY, are_joined, json_lines, parts, write_samples
from loadbench.engine.pulse import together
from loadbench.engine.sums import add_up
from loadbench.errors import UsageError
from loadbench.files import write_whole
from loadbench.target.fleet import WORST_FIRST

ENDED = {
    "target_died": "saw the target die",
    "interrupted": "was interrupted",
    "failed": "failed",
    "running": "was cut off",
}
"""What became of a shard that is not complete, by its status, worst first: so becomes the run."""

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
        if not facts.get("shard"):
            raise UsageError(f"{path}: expected a run made with --shard, found one of its own")
        found.append(Part(path, facts))
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


def put_together(found: Sequence[Part], out: Path) -> None:
    """Write the run of these shards to ``out``, which is new or empty: whole, or not at all."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: expected a new or an empty directory")
    making = (whole := out.resolve()).with_name(f".{whole.name}.{os.getpid()}")
    try:
        making.mkdir(parents=True)
        _put_samples(found, making)
        with (making / TELEMETRY).open("wb") as file:
            file.writelines(_telemetry(found))
        logs = [path for part in found for path in parts(part.path, HISTOGRAMS)]
        add_up(logs, found[0].facts["anchors"]["start"]["wall_ns"], making / HISTOGRAMS)
        write_whole(making / "run.json", orjson.dumps(_facts(found), option=orjson.OPT_INDENT_2) + b"\n")
        if out.exists():
            out.rmdir()  # Windows renames over nothing
        making.rename(out)
    except OSError as error:
        raise UsageError(f"{out}: the shards cannot be put together: {error.strerror or error}") from error
    except (KeyError, TypeError) as error:
        raise UsageError(f"{out}: expected shards as loadbench run writes them, found one without {error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _put_samples(found: Sequence[Part], out: Path) -> None:
    """One file, or where that would be too large each shard's as it is, without a copy where the disk allows that."""
    samples = [(part, path) for part in found for path in parts(part.path, SAMPLES) if path.exists()]
    if are_joined([path for _, path in samples]):
        write_samples(out / SAMPLES, [path for _, path in samples])
        return
    (out / SAMPLES).touch()
    for part, path in samples:
        place = part.index
        while (folder := out / "shards" / str(place)).exists():  # what its workers wrote and nobody joined
            place += int(part.facts["shard"]["count"])
        folder.mkdir(parents=True)
        try:
            os.link(path, folder / SAMPLES)
        except OSError:  # another disk, or one without links
            shutil.copyfile(path, folder / SAMPLES)


# What happened, event by event.


def _telemetry(found: Sequence[Part]) -> Iterator[bytes]:
    """A level's beginning and end as all shards together had them; of the target's memory what one of them saw; all
    else marked with whose it is: ``shard_tick``, ``"shard": 3``."""
    seen_by = _sees_memory(found).index
    started, recovered = set[int](), set[int]()
    waiting: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    for event, index in heapq.merge(*map(_events, found), key=lambda told: told[0]["t_ns"]):
        name, level = event["event"], event.get("level", -1)
        if name == "level_start" and level not in started:
            started.add(level)
            yield _line(event)
        elif name in ("issue_end", "level_end"):
            said = waiting.setdefault((level, name), {})
            said[index] = event
            if len(said) == len(found):
                yield _line(_together(found, waiting.pop((level, name)), seen_by))
        elif (name == "memory" and index == seen_by) or (name == "recovery" and level not in recovered):
            recovered |= {level} if name == "recovery" else set()
            yield _line(event)
        else:
            yield _line({**event, "event": f"shard_{name}", "shard": index})
    for said in waiting.values():  # not all of them came so far
        yield _line(_together(found, said, seen_by))


def _events(part: Part) -> Iterator[tuple[dict[str, Any], int]]:
    index = part.index
    return ((event, index) for event, _ in json_lines(part.path / TELEMETRY))


def _line(event: Mapping[str, Any]) -> bytes:
    return orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE)


def _sees_memory(found: Sequence[Part]) -> Part:
    """The first shard that reads the target's memory: all that do read the same."""
    return next((part for part in found if (part.facts.get("memory") or {}).get("source")), found[0])


def _together(found: Sequence[Part], said: Mapping[int, dict[str, Any]], seen_by: int) -> dict[str, Any]:
    """The end of a level's issuing, or of the level, of those shards that came so far."""
    last = max(said.values(), key=lambda event: event["t_ns"])
    if last["event"] == "issue_end":
        reasons = [event["reason"] for event in said.values()]
        cut = [reason for reason in reasons if reason not in ("duration", "requests", "schedule")]
        return last | {"reason": (cut or reasons)[0]}
    targets = {index: event["target"] for index, event in said.items()}
    fleet = [_worst([(i, at["endpoints"][place]) for i, at in targets.items()]) for place in _places(targets)]
    machines = {part.index: part.facts["shard"]["machine"] for part in found}
    return last | {
        "complete": len(said) == len(found) and all(event["complete"] for event in said.values()),
        "target": {**targets.get(seen_by, last["target"]), **_worst([*targets.items()]), "endpoints": fleet},
        "client": _client({index: event["client"] for index, event in said.items()}, machines),
    }


def _places(targets: Mapping[int, Mapping[str, Any]]) -> range:
    return range(min(len(target.get("endpoints") or ()) for target in targets.values()))


def _worst(seen: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """The state of the target as the shard saw it that saw it worst, with what it saw."""
    state = min((target["state"] for _, target in seen), key=WORST_FIRST.index)
    alike = [(index, target) for index, target in seen if target["state"] == state]
    if state == "healthy":
        return {"state": state, "evidence": list(alike[0][1]["evidence"])}
    evidence = [f"shard {index}: {line}" for index, target in alike[:MOST_TOLD] for line in target["evidence"]]
    more = len(alike) - MOST_TOLD
    return {"state": state, "evidence": evidence + ([f"{more} more shards saw the like"] if more > 0 else [])}


def _client(clients: Mapping[int, dict[str, Any]], machines: Mapping[int, str]) -> dict[str, Any]:
    """The state of all clients over a level. What is a machine's is told where all were on one."""
    ours: dict[str, Any] = {"cpu_s": 0.0, "gc_pauses": 0, "rss_bytes": 0, "machine_cpu_s": None, "elapsed_s": None}
    if len({machines[index] for index in clients}) == 1:
        busiest = max(clients.values(), key=lambda client: client.get("machine_cpu_s") or 0.0)
        ours |= {name: busiest.get(name) for name in ("machine_cpu_s", "elapsed_s")}
    facts = together(
        ours,
        [
            {name: value for name, value in client.items() if name != "workers"} | {"shard": index}
            for index, client in sorted(clients.items())
        ],
    )
    # Of one that was cut off there are samples, and nobody counted what it had in flight.
    lost = [{"shard": index, "in_flight_ns": None} for index in machines.keys() - clients.keys()]
    return facts | {"workers": [*facts["workers"], *lost]}


# What run.json says.


def _facts(found: Sequence[Part]) -> dict[str, Any]:
    first = found[0].facts
    status, reason = ended(found)
    ends = [(part.facts["anchors"]["start"], part.facts["anchors"]["end"]) for part in found]
    lasted_ns = max((end["monotonic_ns"] - start["monotonic_ns"] for start, end in ends if end), default=None)
    start = first["anchors"]["start"]
    local = next((part.facts["endpoint"] for part in found if part.facts["endpoint"].get("local")), None)
    merged = {
        **first,
        "status": status,
        "reason": reason,
        "command": _command(first["command"]),
        "anchors": {
            "start": start,
            "end": None
            if lasted_ns is None
            else {"wall_ns": start["wall_ns"] + lasted_ns, "monotonic_ns": start["monotonic_ns"] + lasted_ns},
        },
        "endpoint": local or first["endpoint"],
        "models": [_model(found, place) for place in range(len(first["models"]))],
        "not_run": _not_run(found),
        "memory": _sees_memory(found).facts.get("memory"),
        "workers": sum(part.facts.get("workers") or 1 for part in found),
        "calibration": _calibration(found),
        "shards": [_row(part) for part in found],
    }
    del merged["shard"]
    return merged


def ended(found: Sequence[Part]) -> tuple[str, str | None]:
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
