"""Names the state a target is in after a level, from evidence. A single symptom never becomes a certainty."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from loadbench.platform import describe_exit
from loadbench.records import Sample
from loadbench.target.autopsy import speaks_of_memory
from loadbench.target.containment import Limit

DEAD = frozenset({"crashed", "wedged", "unreachable", "oom_killed"})
"""States in which no further level can be measured."""

SERVERS_DOING = frozenset(
    {
        *("engine_failed", "engine_capacity", "out_of_memory", "http_5xx", "stream_error", "protocol", "truncated"),
        *("empty", "connect_refused", "connection_lost"),
    }
)
"""Failures that no client's request excuses. A missed deadline is not among them: load alone can be its cause."""

SIGKILL = 9  # Windows' signal module has none

ASKED_TO_END = frozenset({1, 2, 15})  # SIGHUP, SIGINT, SIGTERM

AT_LIMIT = 0.9  # memory is given out in pieces: the one that fails may be a tenth of it

DEADLINES = frozenset({"first_token_deadline", "total_deadline"})

HANGS = DEADLINES | {"engine_capacity"}
"""How a canary ends that was taken and not answered."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen of the target during and after a level.

    ``canary`` is the small request sent after it (None: not sent). ``outcomes`` counts the requests that were not ok,
    of ``attempted`` (None: not known). ``ended_by`` is why the level issued no more requests. ``exit_code`` is the
    embedded service's, None while it lives or where it is not ours. ``answers_status`` says whether its control routes
    answer (None: not asked). ``process`` is what the system says of a local one: running, sleeping, stopped, gone…

    The rest is evidence of a death for want of memory, None or empty where it cannot be had: how many processes the
    kernel had killed in the service's own cgroup, and on the machine, before and after; the lines in which it says
    that it killed this one; what the service wrote last; the limit it ran under, and the most it was seen to hold.
    ``starved`` requests failed with a text that speaks of memory where that limit makes allocations fail.
    """

    canary: Sample | None
    outcomes: Mapping[str, int]
    exit_code: int | None = None
    answers_status: bool | None = None
    pid_before: int | None = None
    pid_after: int | None = None
    attempted: int | None = None
    ended_by: str | None = None
    process: str | None = None
    starved: int = 0
    oom_kills_before: int | None = None
    oom_kills_after: int | None = None
    machine_oom_kills_before: int | None = None
    machine_oom_kills_after: int | None = None
    kernel_log: tuple[str, ...] = ()
    last_words: tuple[str, ...] = ()
    limit: Limit | None = None
    peak_bytes: int | None = None


def judge(seen: Evidence) -> tuple[str, list[str]]:
    """(state, evidence in words). States as in MEASUREMENT.md.

    A canary speaks of the moment, the level's requests of the level: where more than half of those that ended
    failed by the server's doing, a canary that is answered does not make it healthy.
    """
    if seen.exit_code is not None or seen.process == "gone":
        return _death(seen)
    canary = seen.canary
    gone = ["connection after connection was refused during the level"] if seen.ended_by == "target_died" else []
    if canary is None:
        return _without_canary(seen, ["no canary was sent", *gone])
    if canary.outcome == "ok":
        return _with_answer(seen, canary, gone)
    words = [f"a canary failed: {canary.outcome}" + (f" ({canary.detail})" if canary.detail else "")]
    if seen.ended_by == "stalled":
        words.insert(0, "no stream had a token for as long as a first one may take")
    if seen.process in ("stopped", "zombie"):
        words.append(f"its process is {seen.process}")
    if canary.outcome == "connect_refused":
        return "unreachable", words
    if seen.answers_status:
        words.append("its status route answers")
        return ("wedged" if canary.outcome in HANGS else "degraded"), words
    if seen.answers_status is False:
        return "unreachable", [*words, "its status route does not answer"]
    return "degraded", words


def _death(seen: Evidence) -> tuple[str, list[str]]:
    """Name what ended the process. That the kernel killed it takes the kernel's own word; all else is likely at best.

    | ended by | evidence                                            | state, cause                       |
    |----------|-----------------------------------------------------|------------------------------------|
    | SIGKILL  | its cgroup's count of kills rose, or the kernel log | oom_killed                         |
    | SIGKILL  | no count of its own, and the machine's rose         | crashed, likely for want of memory |
    | SIGKILL  | no count at all, and signs                          | crashed, likely for want of memory |
    | SIGKILL  | none of these                                       | crashed, cause not established     |
    | SIGTERM… | that is how one asks a process to end               | crashed, likely ended from outside |
    | other    | signs: requests, last words, memory at its limit    | crashed, likely for want of memory |
    | other    | none                                                | crashed, cause not established     |

    Where it is not our child nobody tells us its exit status: the kernel's word and signs both count then.
    """
    if seen.exit_code is None:
        words, signal = [f"its process {seen.pid_before} is gone; how it ended is known to its parent only"], None
    else:
        words, signal = [f"the service's process ended: {describe_exit(seen.exit_code)}"], _signal(seen.exit_code)
    words += [f"its last words: {line}" for line in seen.last_words]
    kernels, machines, signs = _kernels_word(seen), _machines_count(seen), _signs(seen)
    if signal == SIGKILL or seen.exit_code is None:
        if kernels:
            return "oom_killed", [*words, *kernels, *signs]
        signs += machines
    if signal in ASKED_TO_END:
        return "crashed", [*words, "likely cause: something outside ended it"]
    if signal == SIGKILL and not machines and _counted(seen):
        return "crashed", [*words, "the kernel counted no kill for want of memory", *signs, "cause not established"]
    if signs:
        return "crashed", [*words, *signs, "likely cause: want of memory"]
    return "crashed", [*words, "cause not established"]


def _counted(seen: Evidence) -> bool:
    return seen.oom_kills_after is not None or seen.machine_oom_kills_after is not None


def _kernels_word(seen: Evidence) -> list[str]:
    words = [f"the kernel's log: {line}" for line in seen.kernel_log]
    before, after = seen.oom_kills_before, seen.oom_kills_after
    if before is not None and after is not None and after > before:
        words.insert(0, f"its cgroup's count of processes killed for want of memory rose from {before} to {after}")
    return words


def _machines_count(seen: Evidence) -> list[str]:
    if seen.oom_kills_after is not None:
        return []  # its cgroup counts every kill in it, also one for want of the machine's memory
    before, after = seen.machine_oom_kills_before, seen.machine_oom_kills_after
    if before is None or after is None or after <= before:
        return []
    return [f"the machine's count of processes killed for want of memory rose from {before} to {after}"]


def _signs(seen: Evidence) -> list[str]:
    """What speaks for want of memory without proving it."""
    words = []
    if failed := _wanting(seen):
        words.append(f"{_requests(failed)} failed for want of memory before")
    limit = seen.limit
    if any(speaks_of_memory(line, _limited(seen)) for line in seen.last_words):
        words.append("its last words speak of memory")
    if limit and seen.peak_bytes and seen.peak_bytes >= AT_LIMIT * limit.limit_bytes:
        words.append(f"it had been seen to hold {seen.peak_bytes >> 20} MiB")
    if words and limit:
        words.append(f"it ran under a limit of {limit.limit_bytes >> 20} MiB ({limit.kind})")
    return words


def _signal(code: int) -> int | None:
    """The signal that an exit status tells of: -9, or 137 as a shell hands it on."""
    if code < 0:
        return -code
    return code - 128 if 128 < code < 160 else None


def _with_answer(seen: Evidence, canary: Sample, gone: list[str]) -> tuple[str, list[str]]:
    took_s = ((canary.done_ns or 0) - (canary.sent_ns or 0)) / 1e9
    words = [f"a canary answered in {took_s:.2f} s"]
    if seen.pid_before is not None and seen.pid_after is not None and seen.pid_after != seen.pid_before:
        changed = f"its process changed from {seen.pid_before} to {seen.pid_after}"
        return "restarted", [*words, changed, *_kernels_word(seen), *_machines_count(seen)]
    if oom := _wanting(seen):
        told = [f"{_requests(oom)} failed for want of memory and it lives"]
        if seen.starved and _limited(seen):
            told.append(f"{seen.starved} with a text that means it under a limit at which allocations fail")
        return "oom_reported", [*words, *told]
    faults = _count(seen, SERVERS_DOING)
    if 2 * faults > _ended(seen) > 0:
        return "degraded", [*words, *gone, _told(seen, SERVERS_DOING, _ended(seen))]
    return ("degraded" if gone else "healthy"), [*words, *gone]


def _without_canary(seen: Evidence, words: list[str]) -> tuple[str, list[str]]:
    """Judge from the level alone, where one fault is enough: nothing says that it is over."""
    failed = _count(seen, SERVERS_DOING | DEADLINES)
    if failed:
        words.append(_told(seen, SERVERS_DOING | DEADLINES, _sent(seen)))
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


def _ended(seen: Evidence) -> int:
    """How many of them ended by themselves: of what the level's end cut off nobody knows how it would have ended."""
    return max(0, _sent(seen) - seen.outcomes.get("censored", 0))


def _limited(seen: Evidence) -> bool:
    return seen.limit is not None and not seen.limit.kills


def _wanting(seen: Evidence) -> int:
    """How many requests failed for want of memory."""
    return seen.outcomes.get("out_of_memory", 0) + (seen.starved if _limited(seen) else 0)


def _requests(number: int) -> str:
    return f"{number} request" if number == 1 else f"{number} requests"


def _told(seen: Evidence, names: Set[str], asked: int) -> str:
    """``12 of 12 requests failed (12 http_5xx)``."""
    each = ", ".join(f"{count} {name}" for name, count in sorted(seen.outcomes.items()) if name in names and count)
    failed = _count(seen, names)
    if not asked:
        return f"{_requests(failed)} failed ({each})"
    ended = " that ended" if asked < _sent(seen) else ""
    return f"{failed} of {_requests(asked)}{ended} failed ({each})"
