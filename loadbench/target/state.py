"""Names the state a target is in after a level, from evidence. A single symptom never becomes a certainty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loadbench.platform import describe_exit
from loadbench.records import Sample

DEAD = frozenset({"crashed", "wedged", "unreachable", "oom_killed"})
"""States in which no further level can be measured."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen of the target after a level.

    ``canary`` is the small request sent then (None: not sent). ``exit_code`` is the embedded service's, None while it
    lives or where it is not ours. ``answers_status`` says whether its control routes answer (None: not asked).
    """

    canary: Sample | None
    outcomes: Mapping[str, int]
    exit_code: int | None = None
    answers_status: bool | None = None
    pid_before: int | None = None
    pid_after: int | None = None


def judge(seen: Evidence) -> tuple[str, list[str]]:
    """(state, evidence in words). States as in MEASUREMENT.md."""
    words: list[str] = []
    if seen.exit_code is not None:
        return "crashed", [f"the service's process ended: {describe_exit(seen.exit_code)}"]
    canary = seen.canary
    if canary is None:
        return "healthy" if not seen.outcomes else "degraded", ["no canary was sent"]
    oom = seen.outcomes.get("out_of_memory", 0)
    if canary.outcome == "ok":
        took_s = ((canary.done_ns or 0) - (canary.sent_ns or 0)) / 1e9
        words.append(f"a canary answered in {took_s:.2f} s")
        if seen.pid_before is not None and seen.pid_after is not None and seen.pid_after != seen.pid_before:
            return "restarted", [*words, f"its process changed from {seen.pid_before} to {seen.pid_after}"]
        if oom:
            return "oom_reported", [*words, f"{oom} requests failed for want of memory and it lives"]
        return "healthy", words
    words.append(f"a canary failed: {canary.outcome}" + (f" ({canary.detail})" if canary.detail else ""))
    if canary.outcome == "connect_refused":
        return "unreachable", words
    if seen.answers_status:
        hangs = canary.outcome in ("first_token_deadline", "total_deadline", "engine_capacity")
        words.append("its status route answers")
        return ("wedged" if hangs else "degraded"), words
    if seen.answers_status is False:
        return "unreachable", [*words, "its status route does not answer"]
    return "degraded", words
