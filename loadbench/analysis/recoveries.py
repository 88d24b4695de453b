"""How the target came back after each failure of a run, in figures and in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loadbench.analysis.findings import Recovery
from loadbench.analysis.rundir import RunData
from loadbench.analysis.summary import Level
from loadbench.records import load_title

RETURNED_SHARE, RETURNED_BYTES = 0.10, 64 << 20  # above before: what a service keeps of its first request


def of_run(run: RunData, levels: Sequence[Level]) -> tuple[Recovery, ...]:
    """In the order in which they happened."""
    by_index = {level.index: level for level in levels}
    return tuple(_recovery(event, by_index.get(event["level"])) for event in run.recoveries)


def _recovery(event: dict[str, Any], level: Level | None) -> Recovery:
    return Recovery(
        level=event["level"],
        state=event["state"],
        restarted=event["restarted"],
        to_port_s=event.get("to_port_s"),
        to_status_s=event.get("to_status_s"),
        to_token_s=event.get("to_token_s"),
        to_ttft_s=event.get("to_usual_s"),
        limit_s=event["limit_s"],
        lost=event["lost"],
        memory_returned=_returned(event.get("rss_before_bytes"), event.get("rss_after_bytes")),
        told=_told(event, level),
    )


def _returned(before_bytes: int | None, after_bytes: int | None) -> bool | None:
    if before_bytes is None or after_bytes is None:
        return None
    return after_bytes <= before_bytes + max(RETURNED_BYTES, RETURNED_SHARE * before_bytes)


def _told(event: dict[str, Any], level: Level | None) -> str:
    """``crashed at 8 users, likely cause: want of memory; restarted by us; first good token after 0.9 s; …``."""
    at = "" if level is None else f" at {load_title(level.load)}"
    cause = None if level is None else next((line for line in level.target.evidence if "cause" in line), None)
    what = "killed by the kernel for want of memory" if event["state"] == "oom_killed" else None
    told = [f"{what}{at}" if what else f"{event['state'].replace('_', ' ')}{at}{f', {cause}' if cause else ''}"]
    told += ["restarted by us"] if event["restarted"] else []
    token_s, ttft_s = event.get("to_token_s"), event.get("to_usual_s")
    if token_s is None:
        last = event.get("last_failure")
        told.append(f"not back within {event['limit_s']:g} s{f' ({last})' if last else ''}")
    else:
        noticed_s = event.get("noticed_s")
        when = "" if noticed_s is None else f" from the last one ({token_s - noticed_s:.1f} s from when it was noticed)"
        told.append(f"first good token after {token_s:.1f} s{when}")
        if ttft_s is not None and ttft_s > token_s:
            told.append(f"as fast as before after {ttft_s:.1f} s")
        elif ttft_s is None and event.get("ttft_before_ms") is not None:
            told.append(f"not as fast as before within {event['limit_s']:g} s")
    told.append(f"{event['lost']:,} request{'' if event['lost'] == 1 else 's'} lost")
    returned = _returned(event.get("rss_before_bytes"), event.get("rss_after_bytes"))
    return "; ".join(told + (["its memory did not come down again"] if returned is False else []))
