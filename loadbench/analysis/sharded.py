"""What is to be borne in mind of a run that is one shard, and of one that was put together from several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from loadbench.analysis.summary import Summary

A_PART = "a_part"


def users_of(facts: Mapping[str, Any], users: int) -> int:
    """How many of a level's users a run had: a shard has its part of them."""
    shard = facts.get("shard")
    return users if not shard else len(range(shard["index"], users, shard["count"]))


def of_its_part(summary: Summary) -> Summary:
    """Of a run that is one shard without the levels of which it had no part: that nothing was due is no failure."""
    if not any(caution.about == A_PART for caution in summary.cautions):
        return summary
    empty = {level.index for level in summary.levels if level.complete and not level.requests.attempted}
    return replace(
        summary,
        levels=tuple(level for level in summary.levels if level.index not in empty),
        gates=tuple(gate for gate in summary.gates if gate.level not in empty),
    )


def doubts(facts: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """About, reason, advice."""
    if shard := facts.get("shard"):
        reason = f"this is shard {shard['index']}/{shard['count']}: loads are named as a whole, figures are of its part"
        yield A_PART, reason, "put all shards together with loadbench merge"
    for file, lines in (facts.get("torn") or {}).items():  # of whole files; of these are told when they are read
        reason = f"{lines} unreadable line{'s' if lines > 1 else ''} in {file} left out when shards were put together"
        yield "torn", reason, "expected of a process that was killed; else its disk was full or a copy is not whole"
    machines = len({shard["machine"] for shard in facts.get("shards") or ()})
    if machines > 1:
        reason = (
            f"the shards were on {machines} machines, and each began by its own wall clock: how far these are apart"
        )
        advice = "keep them in step by NTP (chronyc tracking tells how far off each is): latencies stand, each is of"
        yield "clocks_unknown", f"{reason} is not known", f"{advice} one clock; loads and sums by the second do not"
