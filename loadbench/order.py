"""What a run is asked to do, beside what its scenario says; and who is asked, with what headers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loadbench.errors import UsageError
from loadbench.records import Find
from loadbench.scenario.load import Loaded
from loadbench.target.containment import RLIMIT_DATA
from loadbench.target.fleet import Fleet
from loadbench.target.target import Target

LIMIT_KIND_VARIABLE = "LOADBENCH_MEMORY_LIMIT_KIND"
"""RLIMIT_DATA holds the embedded service by that though a cgroup could be made: to see allocations fail, not kills."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the command line asks for besides the scenario. ``headers`` may hold a key and are never written.

    ``workers`` is the number of load processes, None: as many as the calibrated ceiling asks for. ``find``: search for
    that instead of measuring the stages. ``i_own_the_target``: a target that is not ours may be loaded until it fails.
    ``quality_only``: the prompts of the scenario's quality are asked, and no level is run. ``shard``: this process is
    number i of n that carry out the same scenario on machines of their own, and all start at ``start_at_wall_ns``.
    ``cluster``: the address of the Ray cluster on whose nodes the load processes are, ``auto`` for the one here.
    """

    loaded: Loaded
    results: Path
    out: Path | None
    command: str
    headers: Mapping[str, str]
    workers: int | None = 1
    find: Find | None = None
    i_own_the_target: bool = False
    quality_only: bool = False
    shard: tuple[int, int] = (0, 1)
    start_at_wall_ns: int | None = None
    cluster: str | None = None


async def open_target(loaded: Loaded, headers: Mapping[str, str], say: Callable[[str], None]) -> Target:
    """Start the embedded service, or find out who answers; ``headers`` go where the scenario has none of that name."""
    scenario, source = loaded.scenario, loaded.endpoint_source
    if scenario.embedded:
        say("starting an embedded Foundry Local")
        kind = os.environ.get(LIMIT_KIND_VARIABLE) or None
        if kind not in (None, RLIMIT_DATA):
            raise UsageError(f"{LIMIT_KIND_VARIABLE}: expected {RLIMIT_DATA}, got {kind}")
        limit_bytes = scenario.memory_limit_bytes
        return await Target.embedded(scenario.models, source, memory_limit_bytes=limit_bytes, limit_kind=kind)
    say(f"asking {', '.join(scenario.redacted().endpoints)} what it is")
    sent = sent_headers(loaded, headers)
    if isinstance(scenario.endpoint, str):
        return await Target.at(scenario.endpoint, source, sent)
    return await Fleet.of(scenario.endpoint, source, sent)


def sent_headers(loaded: Loaded, headers: Mapping[str, str]) -> dict[str, str]:
    """What goes with every request: the scenario's headers, and of these those that it does not name."""
    theirs = loaded.scenario.request.headers
    said = {name.lower() for name in theirs}  # HTTP does not tell Authorization from authorization
    return {name: value for name, value in headers.items() if name.lower() not in said} | dict(theirs)
