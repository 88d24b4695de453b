"""The processes that sent the load, where there were several: which of them did worst, and what is known of the clocks
of those on other machines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loadbench.analysis.stats import NS_PER_MS

APART_MS = 5.0
"""What begins within so much of each other began together. No latency holds the difference of two clocks, or of two
beginnings: all stamps of a request are one process'. It moves the shards of a schedule against each other, and the
seconds over which they are added up: 5 ms are 0.5 % of the finest of these."""

FIGURES = {
    "cpu_share": "cpu_share",
    "loop_lag_p99_ms": "loop_lag_p99_ns",
    "gc_pause_max_ms": "gc_pause_max_ns",
    "start_late_ms": "start_late_ns",
}
"""The client's figures that are those of its worst process, and what telemetry calls them."""


@dataclass(frozen=True, slots=True)
class RemoteClient:
    """A load process on another machine: how far its clock was ahead of ours, when the run began and when it ended.

    Each is right to within its error, half the shortest round trip of eight. None at the end of one that was lost.
    """

    name: str
    node: str
    offset_ms: float
    error_ms: float
    end_offset_ms: float | None
    end_error_ms: float | None

    @property
    def drift_ms(self) -> float | None:
        """How much its clock gained on ours over the run."""
        return None if self.end_offset_ms is None else self.end_offset_ms - self.offset_ms

    @property
    def apart_ms(self) -> float:
        """What its stamps may be off against the others' at most; they were set by the offset at the beginning."""
        if self.drift_ms is None or self.end_error_ms is None:
            return self.error_ms
        return max(self.error_ms, abs(self.drift_ms) + self.end_error_ms)


@dataclass(frozen=True, slots=True)
class Cluster:
    """The cluster on whose nodes the load processes were, at that address; ``ray`` is its version."""

    address: str
    ray: str
    workers: tuple[RemoteClient, ...]


def name_of(place: int, worker: Mapping[str, Any]) -> str:
    """``worker 1 on node-b``; ``shard 1`` in a run that was put together."""
    if "shard" in worker:
        return f"shard {worker['shard']}"
    node = worker.get("node")
    return f"worker {worker.get('worker', place)}" + (f" on {node}" if node else "")


def whose(facts: Mapping[str, Any]) -> dict[str, str]:
    """Of several processes the name of that which each figure of the client is of."""
    workers = facts.get("workers") or ()
    names = {}
    for figure, fact in FIGURES.items() if len(workers) > 1 or any("node" in one for one in workers) else ():
        found = [(one[fact], place) for place, one in enumerate(workers) if one.get(fact) is not None]
        if found:
            place = max(found)[1]
            names[figure] = name_of(place, workers[place])
    return names


def cluster_of(facts: Mapping[str, Any]) -> Cluster | None:
    """The cluster of a run; None where its load processes were here."""
    told = facts.get("cluster")
    if not told:
        return None
    return Cluster(told["address"], told["ray"], tuple(_remote(worker) for worker in told["workers"]))


def _remote(worker: Mapping[str, Any]) -> RemoteClient:
    ms = {name: worker[f"{name}_ns"] / NS_PER_MS for name in ("offset", "error")}
    ended = {name: worker.get(f"end_{name}_ns") for name in ("offset", "error")}
    end_ms = {name: None if ns is None else ns / NS_PER_MS for name, ns in ended.items()}
    name = name_of(0, {"worker": worker["index"], "node": worker["node"]})
    return RemoteClient(name, worker["node"], ms["offset"], ms["error"], end_ms["offset"], end_ms["error"])


def late_start(late_ms: float | None, name: str | None) -> Iterator[tuple[str, str, str]]:
    """A doubt where a process began its part of a level well after the moment at which all were to."""
    if late_ms is not None and late_ms > APART_MS:
        reason = f"{name or 'the load'} began {late_ms:.1f} ms after the level's start"
        yield "late_start", reason, "repeat the level: its machine was busy, or the line to it slow"


def clocks(cluster: Cluster | None) -> Iterator[tuple[str, str, str]]:
    """A doubt where the clocks of a cluster may have been further apart than what began together may be."""
    worst = max(cluster.workers, key=lambda worker: worker.apart_ms, default=None) if cluster is not None else None
    if worst is not None and worst.apart_ms > APART_MS:
        reason = f"the clock of {worst.name} may be off by {worst.apart_ms:.1f} ms against the others'"
        if worst.drift_ms is not None and abs(worst.drift_ms) > worst.error_ms:
            reason += f": it gained {worst.drift_ms:.1f} ms over the run"
        advice = "latencies stand, since each is of one clock; synchronise the hosts' clocks (NTP) for the rest"
        yield "clocks_apart", reason, advice
