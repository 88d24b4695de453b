"""A process of its own for each rung of a memory ladder: one that has given memory back keeps it for its next use."""

from __future__ import annotations

from collections.abc import Callable

from loadbench.aftermath import Site
from loadbench.engine.exchange import Wire
from loadbench.errors import TargetError
from loadbench.records import Level, Sample
from loadbench.target.models import Resolved
from loadbench.target.target import Target

TRIES = 2


async def start_afresh(
    site: Site, asked: str, level: Level, wires: Callable[[Target, Resolved], tuple[Wire, ...]]
) -> str | None:
    """Start the service anew, with the model loaded and one canary answered; else why not, at a second try too."""
    why = ""
    for _ in range(TRIES):
        try:
            await _start(site, asked, level, wires)
            return None
        except TargetError as error:
            why, site.gone = str(await site.explained(error)), True
        if site.crew.stop_reason is not None:
            break
    return f"no fresh process at {TRIES} tries: {why}"


async def _start(site: Site, asked: str, level: Level, wires: Callable[[Target, Resolved], tuple[Wire, ...]]) -> None:
    crew = site.crew
    await site.restart()
    model = await site.target.load(await site.target.resolve(asked))
    site.talk_to(model, wires(site.target, model))
    (canary,) = await site.canaries.send(level.index)
    if canary.outcome != "ok":
        raise TargetError(f"{model.id}: a canary failed in a fresh process: {outcome_of(canary)}")
    await site.vigil.renew()
    text = "a fresh process, the model loaded and one canary answered"
    crew.recorder.event(crew.clock.now_ns(), "note", level=level.index, text=text)


def outcome_of(sample: Sample) -> str:
    return sample.outcome + (f": {sample.detail}" if sample.detail else "")
