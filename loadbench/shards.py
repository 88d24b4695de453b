"""Makes one run of the runs of its shards: puts their directories together.

What becomes of samples and histograms is ``engine.merge``'s, what run.json says is ``shard_facts``'; here is what
several shards say of one moment: how the target was, what the client did.
"""

from __future__ import annotations

import heapq
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from loadbench.engine.merge import HISTOGRAMS, SAMPLES, TELEMETRY, JsonLines, Requests, are_joined, parts, write_samples
from loadbench.engine.pulse import together
from loadbench.engine.sums import add_up
from loadbench.errors import UsageError
from loadbench.files import write_whole
from loadbench.shard_facts import AMISS, MOST_TOLD, Lost, Part, ended, merged_facts, not_ours, sees_memory
from loadbench.target.fleet import WORST_FIRST

LEAST_SHARE = 0.98  # of the time in flight that a shard counted, by its samples: both are of one clock, 0.1 % apart


def put_together(found: Sequence[Part], out: Path) -> tuple[str, str | None]:
    """Write the run of these shards to ``out``, which is new or empty: whole, or not at all. How it ended, and why."""
    whole = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: expected a new or an empty directory")
    if any(part.path.resolve() in (whole, *whole.parents) for part in found):
        raise UsageError(f"--out {out}: expected a directory that is not inside a shard")
    is_there, name = whole.is_dir(), f".{whole.name}.{os.getpid()}"  # and may be where one is, or a disk of its own
    making = whole / name if is_there else whole.with_name(name)
    try:
        making.mkdir(parents=True)
        ending = _write_run(found, making)
        if is_there:
            for path in sorted(making.iterdir(), key=lambda path: path.name == "run.json"):  # which makes it a run
                path.rename(whole / path.name)
        else:
            making.rename(whole)
    except OSError as error:
        raise UsageError(f"{out}: the shards cannot be put together: {error.strerror or error}") from error
    except AMISS as error:
        raise not_ours(f"{out}", error) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return ending


def _write_run(found: Sequence[Part], out: Path) -> tuple[str, str | None]:
    """Write the files of the run. How it ended."""
    torn = Counter[str]()
    for part in found:
        torn.update(part.facts.get("torn") or {})
    lost = _put_samples(found, out, torn)
    events = [JsonLines(part.path / TELEMETRY) for part in found]
    with (out / TELEMETRY).open("wb") as file:
        file.writelines(_telemetry(found, events, lost))
    torn[TELEMETRY] += sum(lines.torn for lines in events)
    logs = [path for part in found for path in parts(part.path, HISTOGRAMS)]
    torn[HISTOGRAMS] += add_up(logs, found[0].facts["anchors"]["start"]["wall_ns"], out / HISTOGRAMS)
    status, reason = ended(found, lost)
    facts = merged_facts(found, status, reason) | {"torn": dict(+torn)}
    write_whole(out / "run.json", orjson.dumps(facts, option=orjson.OPT_INDENT_2) + b"\n")
    return status, reason


def _put_samples(found: Sequence[Part], out: Path, torn: Counter[str]) -> Lost:
    """One file, or where that would be too large each shard's as it is, without a copy where the disk allows that."""
    samples = [(part, path) for part in found for path in parts(part.path, SAMPLES) if path.exists()]
    if are_joined([path for _, path in samples]):
        held: dict[int, list[Requests]] = {part.index: [] for part in found}
        for (part, _), requests in zip(
            samples, write_samples(out / SAMPLES, [path for _, path in samples]), strict=True
        ):
            held[part.index].append(requests)
            torn[SAMPLES] += requests.torn
        return {part.index: lost for part in found if (lost := _lost(part, held[part.index]))}
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
    return {}


def _lost(part: Part, held: Sequence[Requests]) -> set[int]:
    """The levels of which samples and telemetry, which a shard writes side by side, do not tell the same: one of them
    was copied in part. Of a shard that was cut off nothing can be said, and of a line or two that were torn it is."""
    if part.facts["status"] == "running":
        return set()
    counted, took_ns, file = Counter[int](), dict[int, float](), JsonLines(part.path / TELEMETRY)
    for event, _ in file:
        try:
            if event["event"] == "tick" and (level := event["level"]) is not None:
                counted[level] = max(counted[level], event["ended"])
            elif event["event"] == "level_end":
                took_ns[event["level"]] = event["client"]["in_flight_ns"] * 1
        except AMISS as error:
            raise file.amiss(repr(error)) from error
    ended, spent_ns = Counter[int](), Counter[int]()
    for requests in held:
        ended.update(requests.ended)
        spent_ns.update(requests.in_flight_ns)
    missing, torn = counted - ended, sum(requests.torn for requests in held)
    lost = set(missing) if missing.total() > torn else set()
    lost |= {level for level, took in took_ns.items() if not torn and spent_ns[level] < LEAST_SHARE * took}
    return lost | (set(ended) - set(took_ns))


# What happened, event by event.


def _telemetry(found: Sequence[Part], files: Sequence[JsonLines], lost: Lost) -> Iterator[bytes]:
    """A level's beginning and end as all shards together had them; of the target's memory what one of them saw; all
    else marked with whose it is: ``shard_tick``, ``"shard": 3``."""
    seen_by = sees_memory(found).index
    started, recovered = set[int](), set[int]()
    waiting: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    for event, index in heapq.merge(*map(_events, found, files), key=lambda told: told[0]["t_ns"]):
        name, level = event["event"], event.get("level", -1)
        if name == "level_start" and level not in started:
            started.add(level)
            yield _line(event)
        elif name in ("issue_end", "level_end"):
            said = waiting.setdefault((level, name), {})
            said[index] = event
            if len(said) == len(found):
                yield _line(_together(found, waiting.pop((level, name)), seen_by, lost))
        elif (name == "memory" and index == seen_by) or (name == "recovery" and level not in recovered):
            recovered |= {level} if name == "recovery" else set()
            yield _line(event)
        else:
            yield _line({**event, "event": f"shard_{name}", "shard": index})
    for said in waiting.values():  # not all of them came so far
        yield _line(_together(found, said, seen_by, lost))


def _events(part: Part, file: JsonLines) -> Iterator[tuple[dict[str, Any], int]]:
    """A shard's events. UsageError where one is not as a run writes it, or would not do as the only one of its kind."""
    index = part.index
    for event, _ in file:
        try:
            if event["event"] in ("level_start", "issue_end", "level_end"):
                if type(event["level"]) is not int:
                    raise ValueError(f"level {event['level']}")
                if event["event"] != "level_start":
                    _together([part], {index: event}, index, {})
        except AMISS as error:
            raise file.amiss(repr(error)) from error
        yield event, index


def _line(event: Mapping[str, Any]) -> bytes:
    return orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE)


def _together(found: Sequence[Part], said: Mapping[int, dict[str, Any]], seen_by: int, lost: Lost) -> dict[str, Any]:
    """The end of a level's issuing, or of the level, of those shards that came so far."""
    last = max(said.values(), key=lambda event: event["t_ns"])
    if last["event"] == "issue_end":
        reasons = [event["reason"] for event in said.values()]
        cut = [reason for reason in reasons if reason not in ("duration", "requests", "schedule")]
        return last | {"reason": (cut or reasons)[0]}
    targets = {index: event["target"] for index, event in said.items()}
    fleet = [_worst([(i, at["endpoints"][place]) for i, at in targets.items()]) for place in _places(targets)]
    machines = {part.index: part.facts["shard"]["machine"] for part in found}
    whole = len(said) == found[0].facts["shard"]["count"] and not any(
        last["level"] in levels for levels in lost.values()
    )
    return last | {
        "complete": whole and all(event["complete"] for event in said.values()),
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
