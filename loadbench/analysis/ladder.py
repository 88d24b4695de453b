"""Which stages are ladders, and when one has told what it can: the stop rules, held against its levels so far.

Deciding it between levels is ``runner``'s job.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from loadbench.analysis import words
from loadbench.analysis.findings import Ladder
from loadbench.analysis.search import told
from loadbench.analysis.stats import FLOORS
from loadbench.analysis.summary import AtEndpoint, Level
from loadbench.analysis.words import is_fixed, load_of
from loadbench.records import load_title
from loadbench.scenario.shapes import StopRules, is_ladder
from loadbench.target.state import DEAD

MEMORY_FAILURE = "memory_failure"
IN_A_ROW = 2
"""So many gains must be too small: one may be a bad quarter of a minute."""


def ladders(scenario: Mapping[str, Any]) -> tuple[Ladder, ...]:
    """The stages of a scenario, as run.json has it, that a rule may end; a rule on an SLO that there is not is none."""
    found = []
    for index, stage in enumerate(scenario.get("stages") or ()):
        given = {name: value for name, value in (stage.get("stop") or {}).items() if value not in (None, False)}
        rules = tuple(name for name in given if name != "slo" or scenario.get("slo"))
        if memory := stage.get("memory"):
            rules += (MEMORY_FAILURE if memory["until"] == "failure" else "memory_limit", "memory_floor")
        climbs = is_ladder(stage.get("concurrency")) or is_ladder(stage.get("rate"))
        if rules or climbs:
            found.append(Ladder(index, rules, climbs))
    return tuple(found)


def stop_after(rules: StopRules, levels: Sequence[Level], elapsed_s: float) -> tuple[str, str] | None:
    """The rule that ends the stage after these levels of it, and why; None: go on. ``elapsed_s`` is the stage's."""
    return next(_broken(rules, levels, elapsed_s), None) if levels else None


def _broken(rules: StopRules, levels: Sequence[Level], elapsed_s: float) -> Iterator[tuple[str, str]]:
    """The gravest first."""
    last = levels[-1]
    where, living = f"at {load_title(last.load)}", [here for here in last.endpoints if here.state not in DEAD]
    whose, asked = (" by endpoints that live", living) if living else ("", [last])
    attempted = sum(part.requests.attempted for part in asked)
    failed = attempted - sum(part.requests.ok for part in asked)
    if rules.degraded and (unwell := _unwell(last, living)):
        yield "degraded", unwell
    if rules.error_rate is not None and failed > rules.error_rate * attempted:
        share = failed / attempted
        yield (
            "error_rate",
            f"{failed} of {attempted} requests failed{whose} {where}: {share:.0%}, over {rules.error_rate:.0%}",
        )
    if rules.over_capacity and last.road is not None and last.road.result == "over_capacity":
        yield "over_capacity", f"over capacity: {last.road.because}"
    if rules.slo and (missed := next((clause for clause in last.slo if clause.result == "fail"), None)):
        yield "slo", f"the SLO is missed {where}: {told(missed)}"
    if rules.gain_share is not None and (because := _no_gain(rules.gain_share, levels)):
        yield "gain", because
    if rules.time_s is not None and elapsed_s >= rules.time_s:
        yield "time", f"the stage has taken {elapsed_s:.0f} s, and its time is {rules.time_s:g} s"


def _unwell(level: Level, living: Sequence[AtEndpoint]) -> str | None:
    """How the target was not healthy. Of a fleet those count that live: a ladder goes on beside a dead one."""
    if not living:
        return None if level.target.state in (None, "healthy") else f"the target was {level.target.state} after it"
    sick = (here for here in living if here.state not in (None, "healthy"))
    return next((f"{here.url} was {here.state} after it" for here in sick), None)


def _no_gain(least: float, levels: Sequence[Level]) -> str | None:
    """Why the throughput is at its end: the last steps up all gained less than ``least``, of an open loop as well.

    A step smaller than twice ``least`` cannot be asked for so much: of it half counts, or rungs 4 % apart would end
    every ladder that begins. Levels of few requests say nothing, and after one as the last there is nothing new.
    """
    telling = [level for level in levels if level.requests.ok >= FLOORS["p50"] and is_fixed(level)]
    if len(telling) <= IN_A_ROW or telling[-1] is not levels[-1]:
        return None
    parts = []
    for before, after in pairwise(telling[-IN_A_ROW - 1 :]):
        grown, gained = load_of(after) / load_of(before) - 1, _gained(before, after)
        if grown <= 0 or gained is None or gained >= min(least, grown / 2):
            return None
        parts.append(f"{words.signed(gained)} at {load_title(after.load)}")
    steps = " and ".join(parts)
    return f"throughput gained under {least:.0%} twice in a row: {steps}"


def _gained(before: Level, after: Level) -> float | None:
    """What the step up added to the throughput, as a share.

    In tokens/s where answers are streamed: they are counted as they come. A level is often a few answers long, and then
    how many of them ended inside it moves by a whole batch with where its end falls.
    """
    streamed = all(level.latency_ms["ttft"][level.headline].n for level in (before, after))
    name = "output_tokens_per_s" if streamed else "requests_per_s"
    was, now = before.throughput[name], after.throughput[name]
    return None if not was or now is None else now / was - 1
