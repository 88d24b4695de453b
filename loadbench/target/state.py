"""Names the state a target is in after a level, from evidence. A single symptom never becomes a certainty."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from loadbench.platform import describe_exit
from loadbench.records import Sample

DEAD = frozenset({"crashed", "wedged", "unreachable", "oom_killed"})
"""States in which no further level can be measured."""

SERVERS_DOING = frozenset(
    {
        *("engine_failed", "engine_capacity", "out_of_memory", "http_5xx", "stream_error", "protocol", "truncated"),
        *("empty", "connect_refused", "connection_lost"),
    }
)
"""Failures that no client's request excuses. A missed deadline is not among them: load alone can be its cause."""

DEADLINES = frozenset({"first_token_deadline", "total_deadline"})


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen of the target during and after a level.

    ``canary`` is the small request sent after it (None: not sent). ``outcomes`` counts the requests that were not ok,
    of ``attempted`` (None: not known). ``ended_by`` is why the level issued no more requests. ``exit_code`` is the
    embedded service's, None while it lives or where it is not ours. ``answers_status`` says whether its control routes
    answer (None: not asked).
    """

    canary: Sample | None
    outcomes: Mapping[str, int]
    exit_code: int | None = None
    answers_status: bool | None = None
    pid_before: int | None = None
    pid_after: int | None = None
    attempted: int | None = None
    ended_by: str | None = None


def judge(seen: Evidence) -> tuple[str, list[str]]:
    """(state, evidence in words). States as in MEASUREMENT.md, but for oom_killed: nothing looks for it yet.

    A canary speaks of the moment, the level's requests of the level: where more than half of these failed by the
    server's doing, a canary that is answered does not make it healthy.
    """
    if seen.exit_code is not None:
        return "crashed", [f"the service's process ended: {describe_exit(seen.exit_code)}"]
    canary = seen.canary
    gone = ["connection after connection was refused during the level"] if seen.ended_by == "target_died" else []
    if canary is None:
        return _without_canary(seen, ["no canary was sent", *gone])
    if canary.outcome == "ok":
        return _with_answer(seen, canary, gone)
    words = [f"a canary failed: {canary.outcome}" + (f" ({canary.detail})" if canary.detail else "")]
    if canary.outcome == "connect_refused":
        return "unreachable", words
    if seen.answers_status:
        hangs = canary.outcome in ("first_token_deadline", "total_deadline", "engine_capacity")
        words.append("its status route answers")
        return ("wedged" if hangs else "degraded"), words
    if seen.answers_status is False:
        return "unreachable", [*words, "its status route does not answer"]
    return "degraded", words


def _with_answer(seen: Evidence, canary: Sample, gone: list[str]) -> tuple[str, list[str]]:
    took_s = ((canary.done_ns or 0) - (canary.sent_ns or 0)) / 1e9
    words = [f"a canary answered in {took_s:.2f} s"]
    if seen.pid_before is not None and seen.pid_after is not None and seen.pid_after != seen.pid_before:
        return "restarted", [*words, f"its process changed from {seen.pid_before} to {seen.pid_after}"]
    if oom := seen.outcomes.get("out_of_memory", 0):
        return "oom_reported", [*words, f"{oom} requests failed for want of memory and it lives"]
    faults = _count(seen, SERVERS_DOING)
    if 2 * faults > _sent(seen) > 0:
        return "degraded", [*words, *gone, _told(seen, SERVERS_DOING)]
    return ("degraded" if gone else "healthy"), [*words, *gone]


def _without_canary(seen: Evidence, words: list[str]) -> tuple[str, list[str]]:
    """Judge from the level alone, where one fault is enough: nothing says that it is over."""
    failed = _count(seen, SERVERS_DOING | DEADLINES)
    if failed:
        words.append(_told(seen, SERVERS_DOING | DEADLINES))
    if seen.ended_by == "target_died":
        return "unreachable", words
    if not failed and 0 < _sent(seen) <= _count(seen, seen.outcomes.keys() - {"dropped"}):
        return "degraded", [*words, f"none of {_sent(seen)} requests succeeded"]
    return ("degraded" if failed else "healthy"), words


def _count(seen: Evidence, names: Set[str]) -> int:
    return sum(count for name, count in seen.outcomes.items() if name in names)


def _sent(seen: Evidence) -> int:
    """How many requests reached for the server; 0 where that is not known."""
    return 0 if seen.attempted is None else seen.attempted - seen.outcomes.get("dropped", 0)


def _told(seen: Evidence, names: Set[str]) -> str:
    """``12 of 12 requests failed (12 http_5xx)``."""
    each = ", ".join(f"{count} {name}" for name, count in sorted(seen.outcomes.items()) if name in names and count)
    of = f" of {_sent(seen)}" if _sent(seen) else ""
    return f"{_count(seen, names)}{of} requests failed ({each})"
