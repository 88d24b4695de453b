"""What a run's numbers come from, as far as two runs must have it in common to be compared: a difference is named.

What only says where results go, or what is made of them afterwards, makes no run another one.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import orjson
from pydantic import ValidationError

from loadbench.scenario.schema import Scenario

APART = (
    "name",
    "description",
    "endpoint",
    "models",
    "models_file",
    "target_probe",
    "on_target_death",
    "repeat",
    "price_per_kwh",
    "currency",
)
"""Keys of a scenario that leave the load as it is. Which models were found, and who served them, is told apart."""

MACHINE = ("cpu", "cores", "machine")
OURS = ("os", "python", "event_loop")
ENGINE = ("version", "versions", "memory_limit")


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that the runs have not in common: ``base`` and ``new`` as far as they say it. ``about`` is scenario,
    model, engine, machine, or instrument, which does not forbid to compare."""

    about: str
    what: str
    base: str
    new: str


Facts = Mapping[str, Any]
"""What run.json says."""


def hash_of(facts: Facts) -> str:
    """SHA-256 of the scenario as it was resolved, without what leaves the load as it is, nor what is at its default: a
    history goes on when a version has more keys."""
    given = facts["scenario"]
    with contextlib.suppress(ValidationError):  # of a version that knew other keys: as it was written
        given = Scenario.model_validate(given).model_dump(mode="json", exclude_defaults=True)
    kept = {key: value for key, value in given.items() if key not in APART}
    return hashlib.sha256(orjson.dumps(kept, option=orjson.OPT_SORT_KEYS)).hexdigest()


def differences(base: Sequence[Facts], new: Sequence[Facts]) -> tuple[Difference, ...]:
    """Everything that not all of these runs have in common, in the order of ``about``."""
    first, found = _told_of(base[0]), dict[tuple[str, str], Difference]()
    for other in map(_told_of, (*base[1:], *new)):
        for place in dict.fromkeys((*first, *other)):
            mine, theirs = first.get(place, NOTHING), other.get(place, NOTHING)
            if mine != theirs and place not in found:
                found[place] = Difference(*place, _told(mine), _told(theirs))
    return tuple(sorted(found.values(), key=lambda one: ABOUT.index(one.about)))


NOTHING = object()
ABOUT = ("scenario", "model", "engine", "machine", "instrument")


def _told_of(facts: Facts) -> dict[tuple[str, str], Any]:
    """What is held against another run's, by what it is about and what it is."""
    endpoint, environment = facts["endpoint"], facts["environment"]
    engine = {name: value for name, value in (endpoint.get("facts") or {}).items() if name in ENGINE}
    local = endpoint.get("local")
    found = {("scenario", path): value for path, value in _leaves(_scenario(facts))}
    shard = facts.get("shard")
    found["scenario", "load"] = "all of it" if not shard else f"the part of shard {shard['index']}/{shard['count']}"
    found |= {("scenario", "find " + path): value for path, value in _leaves(facts.get("find") or {})}
    served = [model for model in facts["models"] if model["id"] is not None]
    found["model", "models"] = [model["id"] for model in served]
    runs_on = (filter(None, (model.get("device"), model.get("execution_provider"))) for model in served)
    found["engine", "models on"] = list(map(" ".join, runs_on))
    found |= {("engine", path): value for path, value in _leaves({"service": endpoint.get("title")} | engine)}
    found |= {("machine", name): environment.get(name) for name in MACHINE}
    memory_bytes = environment.get("memory_bytes")  # a virtual machine has some pages more or less at every start
    found["machine", "memory"] = None if memory_bytes is None else f"{memory_bytes / 2**30:.0f} GiB"
    found["machine", "target"] = "this machine" if local else urlsplit(endpoint.get("url") or "").netloc
    found |= {("instrument", name): environment.get(name) for name in OURS}
    found["instrument", "loadbench"] = facts["loadbench"]
    found["instrument", "workers"] = facts.get("workers") or 1
    return found


def _scenario(facts: Facts) -> dict[str, Any]:
    """The scenario with what it does not state as this version has it: a key that came later changes no run."""
    given = facts["scenario"]
    try:
        given = Scenario.model_validate(given).public_json()
    except ValidationError:  # of a version that knew other keys: as it was written
        given = dict(given)
    return {key: value for key, value in given.items() if key not in APART}


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """``stages.0.rate`` and its value, of everything below a mapping or a list."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(node, Mapping):
        inner = list(node.items())
    elif isinstance(node, list) and any(isinstance(part, Mapping) for part in node):
        inner = list(enumerate(node))
    if not inner and path:
        yield path, node
    for key, value in inner:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def _told(value: Any) -> str:
    if value is NOTHING or value is None:
        return "nothing"
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


SHOWN = 80
