"""What a rule left out of a run, in a sentence: where the ladder ended, why, and which loads were not run."""

from __future__ import annotations

from collections.abc import Mapping

from loadbench.analysis.findings import NotRun
from loadbench.analysis.summary import Level
from loadbench.analysis.words import listed
from loadbench.records import load_title

MOST_NAMED, FIRST = 8, 3  # loads that were not run, one by one; of more the first

_ENDED = {
    "memory_limit": "The memory ladder reached its limit",
    "memory_floor": "The memory ladder was stopped to spare the machine",
    "memory_failure": "The memory ladder ended in a failure",
    "target_degraded": "The memory ladder was given up, not for want of memory,",
    "not_started": "A rung was left out",
    "target_died": "The model was given up",
}


def not_run(left: NotRun, levels: Mapping[int, Level]) -> str:
    """``The ladder ended after 16 users (…); not run: 32 and 64 users.``"""
    loads = [*left.loads]
    if all(told.endswith(" users") for told in loads):
        loads = [told.removesuffix(" users") for told in loads[:-1]] + loads[-1:]
    loads = loads if len(loads) <= MOST_NAMED else [*loads[:FIRST], f"{len(loads) - FIRST} more"]
    last = None if left.after_level is None else levels.get(left.after_level)
    after = "" if last is None else f" after {load_title(last.load)}"
    ended = _ENDED.get(left.rule, "The ladder ended")
    return f"{ended}{after} ({left.because})" + (f"; not run: {listed(loads)}." if loads else ".")
