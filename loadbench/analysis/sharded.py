"""What is to be borne in mind of a run that is one shard, and of one that was put together from several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def users_of(facts: Mapping[str, Any], users: int) -> int:
    """How many of a level's users a run had: a shard has its part of them."""
    shard = facts.get("shard")
    return users if not shard else len(range(shard["index"], users, shard["count"]))


def doubts(facts: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """About, reason, advice."""
    if shard := facts.get("shard"):
        reason = f"this is shard {shard['index']}/{shard['count']}: loads are named as a whole, figures are of its part"
        yield "a_part", reason, "put all shards together with loadbench merge"
    machines = len({shard["machine"] for shard in facts.get("shards") or ()})
    if machines > 1:
        reason = (
            f"the shards were on {machines} machines, and each began by its own wall clock: how far these are apart"
        )
        advice = "keep them in step by NTP (chronyc tracking tells how far off each is): latencies stand, each is of"
        yield "clocks_unknown", f"{reason} is not known", f"{advice} one clock; loads and sums by the second do not"
