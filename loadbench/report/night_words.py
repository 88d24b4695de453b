"""What is said of a night and of each scenario in it: the same words on the page, on the console and to GitHub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from loadbench.analysis.night import OUTCOMES, Against, Night, Turn, standing
from loadbench.report.escape import markdown, plain
from loadbench.report.markdown import table_of
from loadbench.report.words import clock, count

STATES = {
    "waiting": "waiting for its turn",
    "running": "running",
    "overtime": "stopped: it took longer than it may",
    "no_room": "not run: the disk is nearly full",
}
STATUS = {
    "interrupted": "It was interrupted: the same command goes on with the others.",
    "cut_short": "It was cut short: the program or the machine ended in the middle of it.",
}


def lead(night: Night) -> str:
    """The night in one line."""
    turns = night.worst_first
    codes = dict.fromkeys(turn.code for turn in turns if turn.code)
    bad = ", ".join(f"{sum(turn.code == code for turn in turns)} {OUTCOMES[code]}" for code in codes if code)
    left = sum(not turn.is_over for turn in turns)
    good = f"{sum(turn.code == 0 for turn in turns)} of {len(turns)} good"
    return good + (f"; {bad}" if bad else "") + (f"; {left} not run" if left else "")


def status(night: Night) -> str | None:
    """What there is to know of a night that did not come to its end."""
    if night.status != "running":
        return STATUS.get(night.status)
    until = next((turn.until for turn in night.turns if turn.state == "running" and turn.until), None)
    if until is None:
        return "It goes on."
    killed = "if that is past, the night was killed, and the same command goes on with it."
    return f"It goes on. What runs is stopped at {moment(until)} at the latest: {killed}"


def news(night: Night, earlier: Sequence[Night]) -> Iterator[str]:
    """What is not as it was, by the names of the scenarios. ``earlier`` are the nights before, the last first."""
    if not earlier:
        return
    known = {turn.name: standing(earlier, turn.name) for turn in night.turns}
    over = [turn for turn in night.worst_first if turn.code is not None]
    past = {turn.name for turn in earlier[0].turns} if earlier[0].scenarios == night.scenarios else set()
    for what, names in (
        ("New", [turn.name for turn in over if turn.code and known[turn.name].before == 0]),
        ("Still bad", [turn.name for turn in over if turn.code and known[turn.name].bad]),
        ("Good again", [turn.name for turn in over if not turn.code and known[turn.name].bad]),
        ("For the first time", [turn.name for turn in over if known[turn.name].night is None]),
        ("No longer there", sorted(past - set(known))),
    ):
        if names:
            yield f"{what}: {', '.join(names)}."


def ended(turn: Turn) -> str:
    """How it ended, with the exit code where that says more."""
    if turn.state == "running" or turn.state not in STATES:
        code = f" (exit code {turn.exit_code})" if turn.exit_code else ""
        return "running" if turn.state == "running" else f"{OUTCOMES[turn.code or 0]}{code}"
    return STATES[turn.state]


def since(turn: Turn, earlier: Sequence[Night]) -> str:
    """Whether that is new; empty where it is good as it was, or there is nothing to hold it against."""
    past = standing(earlier, turn.name)
    if turn.code is None or not earlier or (past.bad == 0 and turn.code == 0 and past.night is not None):
        return ""
    if past.before is None:
        return "for the first time"
    if turn.code == 0:
        return f"after {count(past.bad, 'bad night')} ({OUTCOMES[past.before]})"
    if past.bad == 0:
        return f"new: it was good on {past.night}"
    as_it_was = "" if past.before == turn.code else f", the last time {OUTCOMES[past.before]}"
    return f"bad for {count(past.bad + 1, 'night')}, since {past.since}{as_it_was}"


def held(against: Against) -> str:
    """The comparison in a few words."""
    if against.night is None:
        return "no good night before it"
    return against.answer or ("new baseline" if against.changed else "not compared")


def told(turn: Turn, earlier: Sequence[Night]) -> str:
    """A scenario's night in a line of the console."""
    parts = [ended(turn)]
    parts += [now] if (now := since(turn, earlier)) else []
    if turn.against is not None:
        brief = f": {turn.against.brief}" if turn.against.brief else ""
        instead = "instead of" if turn.against.changed else "against"
        night = f" {instead} {turn.against.night}" if turn.against.night else ""
        parts.append(f"{held(turn.against)}{night}{brief}")
    parts += [f"took {clock(turn.took_s)}"] if turn.took_s is not None else []
    return "; ".join(parts)


def step_summary(night: Night, earlier: Sequence[Night]) -> str:
    """Markdown, for the summary of a step on GitHub."""
    mark = "✅" if night.code == 0 else "❌"
    rows = [
        (
            plain(turn.name),
            "; ".join(filter(None, (ended(turn), since(turn, earlier), plain(turn.why or "", 200)))),
            "" if turn.against is None else ": ".join(filter(None, (held(turn.against), turn.against.brief))),
            "" if turn.took_s is None else clock(turn.took_s),
        )
        for turn in night.worst_first
    ]
    blocks = [f"## {mark} Night of {night.name}: {markdown(lead(night))}", markdown(" ".join(news(night, earlier)))]
    blocks += [table_of(("scenario", "how it ended", "against the last good night", "took"), rows)]
    return "\n\n".join(block for block in blocks if block) + "\n\n"


def moment(time: str) -> str:
    """A time of night.json for people: 2026-11-22 23:59 UTC."""
    return f"{datetime.fromisoformat(time):%Y-%m-%d %H:%M} UTC"
